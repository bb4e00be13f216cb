"""The look of every picture: palette, each method's colour, dash, marker and hatch, axes, titles, files.

figure, rc = style.figure(9.0, 4.3)            an empty figure, and the context to draw on it in
style.title(figure, "What it shows")
style.save(figure, Path("picture.png"))        the same record gives the same bytes

matplotlib is imported only when something is drawn.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart, and what it has too few of
BLUE, SKY, GREEN, ORANGE, VERMILION, PINK = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7"
OLIVE, VIOLET, BROWN, DARK = "#B8A000", "#7A4FB5", "#8C564B", "#4D4D4D"
GREY = "#6B6B6B"  # of what is no method: references, notes

# Colour, dash, marker and hatch of each method, the same in every figure, so that it can be read in black and white.
LOOKS: dict[str, tuple[str, Any, str, str]] = {
    "adam": (DARK, (0, (6, 1.5, 1, 1.5, 1, 1.5)), "D", ""),
    "galore": (PINK, (0, (1, 1.2)), "v", "...."),
    "fira": (VERMILION, (0, (5, 1.5)), "X", "////"),
    "racs": (GREEN, (0, (3, 1.2, 1, 1.2)), "s", "\\\\\\\\"),
    "alice_0": (SKY, (0, (2, 1)), "P", "----"),
    "alice": (BLUE, "-", "o", "xxxx"),
    "apollo_mini": (OLIVE, "-", "<", ""),
    "apollo_svd": (VIOLET, "-", ">", ""),
    "muon": (ORANGE, "-", "^", ""),
    "soap": (BROWN, (0, (7, 2)), "h", "oo"),
    "adamw": ("#9A9A9A", (0, (1, 2.2)), "d", ""),
}
# Of the other methods, by their place in a figure; no colour and no marker of LOOKS.
_SPARE = (("#A01C3C", "*"), ("#00797A", "p"), ("#66A61E", "8"), ("#E7298A", "H"), ("#1B2A6B", "1"))

WIDE = 9.0  # inches, of a page's figures
_DPI = 200  # a 9-inch figure shows sharp at a README's 900 pixels, also on dense screens
_PAGE_DPI = 150  # sharp enough where there are many

_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "axes.titlelocation": "left",
}


def figure(width: float, height: float) -> tuple[Figure, Any]:
    """An empty figure (inches) and the context that styles what is drawn on it; no global state, no window.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Drawing needs matplotlib, which is not installed: pip install matplotlib.") from error
    made = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(made)
    return made, matplotlib.rc_context(_STYLE)


def title(figure: Figure, text: str) -> None:
    """The heading of a whole figure."""
    figure.suptitle(text, x=0.01, ha="left", fontsize=10.5, fontweight="bold")


def look(name: str, place: int) -> tuple[str, str]:
    """Colour and marker of a method; of one that LOOKS does not have, by its `place` in the figure."""
    if name in LOOKS:
        colour, _, marker, _ = LOOKS[name]
        return colour, marker
    return _SPARE[place % len(_SPARE)]


def log_axis(axes: Axes, low: float, high: float) -> None:
    """A logarithmic y axis from `low` to `high` with round numbers at readable distances."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set_yscale("log")
    axes.set_ylim(low, high)
    steps: tuple[float, ...]
    for steps in (
        (1,),
        (1, 3),
        (1, 2, 5),
        (1, 1.5, 2, 3, 5, 7),
        tuple(np.arange(1, 10, 0.5)),
        tuple(np.arange(1, 10, 0.1)),
        tuple(np.arange(1, 10, 0.02)),
    ):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
        if len(ticks) >= 4:
            break
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")


def even_ticks(axis: Any, low: float, high: float, most: int = 9) -> None:
    """At most so many round numbers at equal differences: for an axis over less than a decade, logarithmic or not."""
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

    ticks = MaxNLocator(most - 1, steps=[1, 2, 5, 10]).tick_values(low, high)
    axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:.4g}")


def content(figure: Figure) -> str:
    """A digest of what a figure shows, to five digits: its words, and the numbers of its lines, bars and points.

    Look, size and place on the page do not count, so that another version of matplotlib gives the same. A saved picture
    holds it, see :func:`shows`.
    """
    words, numbers = [figure.get_suptitle(), *(text.get_text() for text in figure.texts)], []
    for axes in figure.axes:
        words += [axes.get_title("left"), axes.get_title(), axes.get_xlabel(), axes.get_ylabel()]
        words += [text.get_text() for text in axes.texts] + [axes.get_xscale(), axes.get_yscale()]
        ticks = [label.get_text() for axis in (axes.xaxis, axes.yaxis) for label in axis.get_majorticklabels()]
        words += [tick for tick in ticks if tick[:1].isalpha()]  # names, not numbers, which matplotlib chooses
        numbers += [line.get_xydata() for line in axes.lines]
        numbers += [patch.get_path().transformed(patch.get_patch_transform()).vertices for patch in axes.patches]
        for drawn in axes.collections:
            numbers += [drawn.get_offsets(), *(path.vertices for path in drawn.get_paths())]
    legends = [*figure.legends, *(legend for axes in figure.axes if (legend := axes.get_legend()))]
    words += [text.get_text() for legend in legends for text in (legend.get_title(), *legend.get_texts())]
    parts: list[Any] = [np.ma.asarray(part, float).filled(np.nan).ravel() for part in numbers]
    digits = [f"{x:.5g}" for part in parts for x in part]
    return "shows " + hashlib.sha256("\n".join([*words, *digits]).encode()).hexdigest()[:16]


def shows(path: Path, figure: Figure) -> bool:
    """Is the saved picture one of this figure's content?"""
    return content(figure).encode() in path.read_bytes()


def save(figure: Figure, path: Path, dpi: int = _DPI) -> Path:
    """Write a PNG or an SVG, as the file's name ends."""
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    # No date, no version and no random names inside: the same records give the same bytes.
    about: dict[str, Any] = {"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": None}
    about["Description"] = content(figure)
    with matplotlib.rc_context({"svg.hashsalt": "racs-alice", "hatch.linewidth": 0.5}):
        figure.savefig(path, dpi=dpi, metadata=about)
    return path


def save_both(figure: Figure, folder: Path, name: str) -> list[Path]:
    """`folder`/<name>.png and .svg, for a page."""
    return [save(figure, folder / f"{name}.{end}", _PAGE_DPI) for end in ("png", "svg")]
