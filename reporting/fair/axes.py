"""What the pictures of the fair comparison share: the look of each method, panels for the models, and axes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .. import units
from ..figures import _GREY, _figure
from ..paper import curves as paper_curves
from .records import Fair

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# colour, dash, marker, hatch
LOOKS: dict[str, tuple[str, Any, str, str]] = {
    **paper_curves.LOOKS,
    "soap": ("#8C564B", (0, (7, 2)), "h", "oo"),
    "adamw": ("#9A9A9A", (0, (1, 2.2)), "d", ""),
}


@contextmanager
def panels(fair: Fair, height: float) -> Iterator[tuple[Figure, list[tuple[str, Axes]]]]:
    """A figure with a panel for each model, side by side, and the style to draw it in."""
    figure, rc = _figure(paper_curves.WIDE, height)
    with rc:
        row = figure.subplots(1, len(fair.models), squeeze=False)[0]
        for model, axes in zip(fair.models, row, strict=True):
            axes.set_title(model)
        yield figure, list(zip(fair.models, row, strict=True))


def legend(figure: Figure, names: Sequence[str], lines: bool = True, provisional: Sequence[str] = ()) -> None:
    """One legend of methods below all panels; `provisional`: those of `names` whose grids are not finished."""
    from matplotlib.lines import Line2D

    def text(name: str) -> str:
        return units.optimizer_name(name) + (" (provisional)" if name in provisional else "")

    handles = [
        Line2D([], [], color=LOOKS[name][0], linestyle=LOOKS[name][1] if lines else "", marker=LOOKS[name][2],
               markersize=5, linewidth=1.4, label=text(name))
        for name in LOOKS if name in names
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=4 if provisional else 6, handlelength=3.2)


def unfinished(fair: Fair) -> list[str]:
    """Methods with a grid that has begun and is not finished."""
    grids = {name: [fair.grid(model, name) for model in fair.models] for name in fair.plans.published}
    return [name for name, each in grids.items() if any(grid.runs and not grid.finished for grid in each)]


def beyond(axes: Axes, points: dict[float, float], top: float, colour: str) -> None:
    for x, y in points.items():
        if y > top:
            axes.plot(x, top, color=colour, marker="^", markersize=6, linestyle="", clip_on=False, zorder=4)


def perplexity_axis(axes: Axes, low: float, high: float) -> None:
    """A logarithmic axis over less than a decade, with evenly spaced round numbers."""
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    even_ticks(axes.yaxis, low, high)


def even_ticks(axis: Any, low: float, high: float) -> None:
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

    ticks = MaxNLocator(8, steps=[1, 2, 5, 10]).tick_values(low, high)
    axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:.4g}")


def rate_axis(axes: Axes, places: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set_xscale("log")
    if places:
        axes.set_xlim(min(places) / 1.35, max(places) * 1.35)
    axes.xaxis.set_major_locator(FixedLocator(list(places)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def empty(axes: Axes) -> None:
    axes.text(0.5, 0.5, "not run", ha="center", va="center", transform=axes.transAxes, color=_GREY)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
