"""The paper's figures with our records in them; PNG and SVG, the same bytes for the same records.

draw_all("results/figures/paper")          every figure
draw("figure5", "results/figures/paper")   one of FIGURES
make("figure5")                            the same, not saved

curves.py draws curves, bars.py the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .. import style
from . import bars, curves
from .cost import Memory
from .numbers import Paper, load_paper
from .records import RUNS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_all(out: str | Path, root: Path = RUNS, memory: Memory | None = None) -> list[Path]:
    """Every figure, into the folder `out`: the files written. `memory`: see `figure4`."""
    return [path for name in FIGURES for path in draw(name, out, root, memory)]


def draw(name: str, out: str | Path, root: Path = RUNS, memory: Memory | None = None) -> list[Path]:
    """One of FIGURES as `out`/<name>.png and .svg.

    Raises:
        ValueError: there is no such figure, or a record is malformed.
        ImportError: matplotlib is not installed.
    """
    return style.save_both(make(name, root, memory), Path(out), name)


def stale(out: str | Path, root: Path = RUNS, memory: Memory | None = None) -> list[Path]:
    """The saved pictures in the folder `out` that show something else than the records."""
    found = []
    for name in FIGURES:
        saved = [path for end in ("png", "svg") if (path := Path(out) / f"{name}.{end}").is_file()]
        figure = make(name, root, memory) if saved else None
        found += [path for path in saved if figure and not style.shows(path, figure)]
    return found


def make(name: str, root: Path = RUNS, memory: Memory | None = None) -> Figure:
    """One of FIGURES, not saved: for notebooks."""
    if name not in FIGURES:
        raise ValueError(f"There is no figure {name!r}: choose one of {', '.join(FIGURES)}.")
    return FIGURES[name](load_paper(), root, memory)


FIGURES: dict[str, Callable[[Paper, Path, Memory | None], Figure]] = {
    "figure1_2": curves.figure1_2,
    "figure3": bars.figure3,
    "figure4": bars.figure4,
    "figure5": curves.figure5,
    "figure6": curves.figure6,
    "speedups": bars.speedup_bars,
    "memory_perplexity": bars.memory_perplexity,
}
