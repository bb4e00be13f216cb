"""What the pictures of the fair comparison share: panels for the models, legends, and axes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .. import style, units
from ..style import GREY, LOOKS, WIDE, even_ticks
from .records import Fair

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@contextmanager
def panels(fair: Fair, height: float) -> Iterator[tuple[Figure, list[tuple[str, Axes]]]]:
    """A figure with a panel for each model, side by side, and the style to draw it in."""
    figure, rc = style.figure(WIDE, height)
    with rc:
        row = figure.subplots(1, len(fair.models), squeeze=False)[0]
        for model, axes in zip(fair.models, row, strict=True):
            axes.set_title(model)
        yield figure, list(zip(fair.models, row, strict=True))


def legend(
    figure: Figure, names: Sequence[str], lines: bool = True, provisional: Sequence[str] = (), hollow: str = ""
) -> None:
    """One legend of methods below all panels.

    Args:
        provisional: those of `names` whose grids are not finished.
        hollow: what hollow markers mean; "" if there are none.
    """
    from matplotlib.lines import Line2D

    def text(name: str) -> str:
        return units.optimizer_name(name) + (" (provisional)" if name in provisional else "")

    handles = [
        Line2D([], [], color=LOOKS[name][0], linestyle=LOOKS[name][1] if lines else "", marker=LOOKS[name][2],
               markersize=5, linewidth=1.4, label=text(name))
        for name in LOOKS if name in names
    ]  # fmt: skip
    if hollow:
        handles.append(Line2D([], [], color=GREY, marker="o", linestyle="", markerfacecolor="white", label=hollow))
    figure.legend(handles=handles, loc="outside lower center", ncols=4 if provisional else 6, handlelength=3.2)


def unfinished(fair: Fair) -> list[str]:
    """Methods with a grid that has begun and is not finished."""
    grids = {name: [fair.grid(model, name) for model in fair.models] for name in fair.plans.published}
    return [name for name, each in grids.items() if any(grid.runs and not grid.finished for grid in each)]


def beyond(axes: Axes, points: dict[float, float], top: float, colour: str, hollow: Collection[float] = ()) -> bool:
    """Mark the points above the axis on its upper edge, hollow those at the places `hollow`; whether there are any.

    On a logarithmic axis; a mark whose place is taken stands to the right of the others.
    """
    above = [x for x, y in points.items() if y > top]
    for x in above:
        taken = sum(line.get_marker() == "^" and line.get_label() == f"_above {x:g}" for line in axes.lines)
        axes.plot(
            x * 1.09**taken, top, label=f"_above {x:g}", color=colour, marker="^", markersize=6, linestyle="",
            clip_on=False, zorder=4, markerfacecolor="white" if x in hollow else colour,
        )  # fmt: skip
    return bool(above)


def rate_lines(
    axes: Axes, lines: dict[str, dict[float, float]], slack: float, hollow: dict[str, list[float]] | None = None
) -> bool:
    """A line of rate -> perplexity for each method, and the axis for them; whether points lie above it.

    Args:
        slack: the axis reaches at least so many times the worst of the methods' best perplexities.
        hollow: places of each method that are drawn hollow.
    """
    best = [min(points.values()) for points in lines.values()]
    top = max(1.6 * min(best), slack * max(best))
    above = False
    for name, points in lines.items():
        colour, dash, marker, _ = LOOKS[name]
        look: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4.5}
        axes.plot(list(points), list(points.values()), linestyle=dash, linewidth=1.2, **look)
        ends = hollow[name] if hollow else []
        if hollow:
            axes.plot(ends, [points[rate] for rate in ends], linestyle="", markerfacecolor="white", **look)
        above |= beyond(axes, points, top, colour, ends)
    perplexity_axis(axes, min(best) / 1.03, top)
    return above


def perplexity_axis(axes: Axes, low: float, high: float) -> None:
    """A logarithmic axis over less than a decade, with evenly spaced round numbers."""
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    even_ticks(axes.yaxis, low, high)


def rate_axis(axes: Axes, places: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set_xscale("log")
    if places:
        axes.set_xlim(min(places) / 1.35, max(places) * 1.35)
    axes.xaxis.set_major_locator(FixedLocator(list(places)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def empty(axes: Axes) -> None:
    axes.text(0.5, 0.5, "not run", ha="center", va="center", transform=axes.transAxes, color=GREY)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
