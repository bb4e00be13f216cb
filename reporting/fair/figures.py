"""Pictures of the fair comparison; PNG and SVG, the same bytes for the same records.

available(fair)                          names of the pictures that have data
draw("curves", fair, folder)             folder/curves.png and .svg

Methods differ in colour, dash and marker, as in every figure of this project.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .. import style, units
from ..curves import shared_curve
from ..style import GREY, LOOKS, WIDE, even_ticks
from .answer import variant_name
from .axes import empty, legend, panels, perplexity_axis, rate_axis, rate_lines, unfinished
from .gains import CONTROLLED, Gains, at_end, best_at, gains, tried
from .records import PLAIN, REFERENCE, Fair, Row, ablations, again, methods, wall_clock
from .tables import CHOICES, PARTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PROXIES = ((style.BLUE, "o"), (style.VERMILION, "s"))  # of figures that show both proxies in one panel
_RATIOS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
_ABOVE = 1.35  # curves are shown from where they come this near to the worst of the final values


def available(fair: Fair) -> list[str]:
    """Names of the pictures that have something to show."""
    ended = {sweep for sweep in fair.sweeps if any(math.isfinite(run.perplexity) for run in fair.runs(sweep))}
    found = []
    alone = len({asked.name for asked in fair.asked("fair_best_b95") if asked.folder in fair.ended}) < 2
    for name, (sweep, _) in FIGURES.items():
        if sweep in ended and not (name == "gains" and not _gain_bars(fair)) and not (name == "curves_b95" and alone):
            found.append(name)
    return found


def draw(name: str, fair: Fair, folder: Path) -> list[Path]:
    """Draw one of FIGURES: the two files written.

    Raises:
        ImportError: matplotlib is not installed.
    """
    return style.save_both(FIGURES[name][1](fair), folder, name)


def stale(fair: Fair, pictures: Sequence[Path]) -> list[Path]:
    """Those of the saved pictures that show something else than the records."""
    figures = {name: FIGURES[name][1](fair) for name in {path.stem for path in pictures}}
    return [path for path in pictures if not style.shows(path, figures[path.stem])]


def _provisional(rows: Sequence[Row]) -> str:
    """That seeds are missing, on lines of their own; nothing once all have ended."""
    there = [len(row.runs) for row in rows if row.runs]
    if not there or all(row.settled or row.name == REFERENCE for row in rows):
        return ""
    whole = sum(len(row.runs) == row.asked for row in rows)
    if any(row.settled and row.pair for row in rows):
        return f"\n{whole} of {len(rows)} have all {rows[0].asked} seeds:\nno difference claimed of the others"
    return f"\n{min(there)} of {rows[0].asked} seeds: no difference claimed"


# Stage 2 ---------------------------------------------------------------------------------------------------------------


def _curves(fair: Fair, words: str = "beta_2 = 0.999, best rates") -> Figure:
    with panels(fair, 4.9) as (figure, parts):
        for model, axes in parts:
            rows = [row for row in methods(fair, model) if row.runs and not row.diverged]
            if not rows:
                empty(axes)
                continue
            finals = [row.perplexity for row in rows if row.perplexity is not None]
            low, high = min(finals), max(finals)
            start = math.inf  # the last evaluation before any curve comes into sight
            for row in rows:
                colour, dash, marker, _ = LOOKS[row.name]
                steps, values = shared_curve(row.runs)
                kept = steps > 0
                steps, values = steps[kept], values[:, kept]
                above = steps[values.mean(axis=0) > high * _ABOVE]
                start = min(start, above[-1] if len(above) else steps[0])
                if len(row.runs) > 1:
                    axes.fill_between(
                        steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.18, linewidth=0
                    )
                text = f"{units.optimizer_name(row.name)}  {units.perplexity(row.perplexity or math.nan)}"
                axes.plot(
                    steps, values.mean(axis=0), color=colour, linestyle=dash, marker=marker, markersize=3.5, linewidth=1.2,
                    label=text,
                )  # fmt: skip
            perplexity_axis(axes, low / 1.03, high * _ABOVE)
            even_ticks(axes.xaxis, start, steps[-1], most=6)
            axes.set_xlim(start, 1.02 * steps[-1])
            axes.set_xlabel(f"steps{_provisional(methods(fair, model))}")
            axes.legend(title="final, best first", loc="upper left", bbox_to_anchor=(1.0, 1.02), handlelength=3.2)
        axes_with = [axes for _, axes in parts]
        axes_with[0].set_ylabel("validation perplexity")
        style.title(figure, f"Validation perplexity, {words}: lower is better (bands: lowest to highest seed)")
    return figure


def _curves_again(fair: Fair) -> Figure:
    return _curves(again(fair), "beta_2 = 0.95, best rates")


def _speedup(fair: Fair) -> Figure:
    notes, every = [], 0
    with panels(fair, 4.2) as (figure, parts):
        for model, axes in parts:
            rows = [
                row
                for row in methods(fair, model)
                if row.runs and row.pair is not None and row.pair.test.difference is not None
            ]
            if not rows:
                empty(axes)
                continue
            rows = sorted(reversed(rows), key=lambda row: row.speedup or 0)  # upwards, equal ones by perplexity
            every = max([every, *np.diff(shared_curve(rows[0].runs)[0]).astype(int)])
            times, why = wall_clock(methods(fair, model))
            if why:
                notes.append(f"{model}: no times, {why}")
            height = 0.38 if times else 0.62
            for place, row in enumerate(rows):
                if not row.speedup:
                    _beside(axes, 0, place, "never reaches it", GREY)
                    continue
                bars = [(row.speedup, style.BLUE, "")] + ([(times[row.name], "white", "////")] if times else [])
                for index, (value, colour, hatch) in enumerate(bars):
                    y = place + (0.5 - index) * height if times else place
                    axes.barh(y, value, height, color=colour, hatch=hatch, edgecolor=style.BLUE, linewidth=0.8)
                    _beside(axes, value, y, f"{value:.2f}", "black")
            axes.axvline(1, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=3)
            axes.set_yticks(range(len(rows)), [units.optimizer_name(row.name) for row in rows])
            axes.grid(False, axis="y")
            axes.set_ylim(-0.6, len(rows) - 0.4)
            axes.set_xlim(0, max([1.0, *(row.speedup or 0 for row in rows), *times.values()]) * 1.12)
            axes.set_xlabel(f"times as fast as Adam to Adam's final perplexity{_provisional(rows)}")
        if any(len(axes.patches) and axes.patches[-1].get_hatch() for _, axes in parts):
            from matplotlib.patches import Patch

            handles = [
                Patch(facecolor=style.BLUE, edgecolor=style.BLUE, label="in steps"),
                Patch(facecolor="white", edgecolor=style.BLUE, hatch="////", label="in seconds on this machine"),
            ]
            figure.legend(handles=handles, loc="outside lower center", ncols=2)
        elif notes:
            figure.supxlabel("in steps; in seconds not shown (see the page)", fontsize=7.5, color=GREY)
        least = f" (at least so much: evaluated every {every:,} steps)" if every else ""
        style.title(figure, f"Speed-up over Adam: more is better{least}")
    return figure


def _beside(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    axes.annotate(
        text, (x, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7, color=colour
    )  # fmt: skip


def _memory(fair: Fair) -> Figure:
    shown: list[str] = []
    with panels(fair, 4.2) as (figure, parts):
        for model, axes in parts:
            points = []
            for row in methods(fair, model):
                size = (row.runs[0].summary or {}).get("optimizer_state_bytes") if row.runs else None
                if size and row.perplexity is not None and not row.diverged:
                    points.append((row.name, size / 2**20, row.perplexity, row.spread))
            if not points:
                empty(axes)
                continue
            for name, x, y, spread in points:
                colour, _, marker, _ = LOOKS[name]
                axes.errorbar(
                    x, y, yerr=spread, color=colour, marker=marker, markersize=6.5, linestyle="", capsize=2.5,
                    markeredgecolor="black", markeredgewidth=0.5, elinewidth=1,
                )  # fmt: skip
                shown.append(name)
            ends = [y + sign * (spread or 0) for _, _, y, spread in points for sign in (-1, 1)]
            perplexity_axis(axes, min(ends) / 1.04, max(ends) * 1.04)
            axes.set_xlim(0, max(x for _, x, _, _ in points) * 1.08)
            axes.set_xlabel(
                f"optimizer states, those of the Adam group included, MiB{_provisional(methods(fair, model))}"
            )
        parts[0][1].set_ylabel("final perplexity")
        legend(figure, shown, lines=False)
        style.title(figure, "Memory and final perplexity: lower left is better (bars: standard deviation over seeds)")
    return figure


# Stage 1 and control ---------------------------------------------------------------------------------------------------


def _group_rate(fair: Fair) -> Figure:
    shown: list[str] = []
    hollow = above = False
    with panels(fair, 4.9) as (figure, parts):
        for model, axes in parts:
            lines, ends = {}, {}
            for name in LOOKS:
                found = {rate: best_at(fair, model, name, rate) for rate in tried(fair, model, name)}
                points = {rate: run.perplexity for rate, run in found.items() if run is not None}
                if points:
                    lines[name] = points
                    ends[name] = [rate for rate, run in found.items() if at_end(fair, model, run)]
            if not lines:
                empty(axes)
                continue
            above |= rate_lines(axes, lines, 1.15, ends)
            hollow |= any(ends.values())
            shown += lines
            rate_axis(axes, sorted({rate for points in lines.values() for rate in points}))
            axes.set_xlabel("peak rate of the Adam group: embeddings, norms, lm_head")
        parts[0][1].set_ylabel("final perplexity, best matrix rate")
        words = "hollow: the best matrix rate is an end of those tried" if hollow else ""
        legend(figure, shown, provisional=unfinished(fair), hollow=words)
        style.title(figure, f"Final perplexity against the Adam group's rate: lower is better ({_seed(above)})")
    return figure


def _seed(above: bool) -> str:
    return "one seed; ▲: above the axis" if above else "one seed"


def _sensitivity(fair: Fair) -> Figure:
    shown: list[str] = []
    above = False
    with panels(fair, 4.9) as (figure, parts):
        for model, axes in parts:
            lines = {}
            for name in LOOKS:
                grid = fair.grid(model, name)
                if grid.best is not None:
                    profile = {lr: value for lr, value in grid.profile().items() if math.isfinite(value)}
                    lines[name] = {lr / grid.best.lr: value for lr, value in profile.items()}
            if not lines:
                empty(axes)
                continue
            above |= rate_lines(axes, lines, 1.25)
            shown += lines
            ratios = [x for points in lines.values() for x in points]
            rate_axis(axes, [x for x in _RATIOS if min(ratios) / 1.2 <= x <= max(ratios) * 1.2])
            axes.set_xlabel("matrix rate / the method's best matrix rate")
        parts[0][1].set_ylabel("final perplexity, best rate of the Adam group")
        legend(figure, shown, provisional=unfinished(fair))
        style.title(figure, f"Sensitivity to the matrix rate: flatter and lower is better ({_seed(above)})")
    return figure


def _gain_bars(fair: Fair) -> dict[tuple[str, str], Gains]:
    """Methods whose gains are known as far as the figure needs them, by model and method."""
    found = {
        (model, name): gains(fair, model, name) for model in fair.models for name in CONTROLLED if name != REFERENCE
    }
    return {
        key: each
        for key, each in found.items()
        if None not in (each.as_paper, each.rates, each.optimizer, each.optimizer_low)
    }


def _gains(fair: Fair) -> Figure:
    known = _gain_bars(fair)
    keys = ("as_paper", "rates", "optimizer", "optimizer_low")
    every = [0.0, *(value for each in known.values() for key in keys if (value := getattr(each, key)) is not None)]
    room = 0.1 * (max(every) - min(every))
    bounds = min(every) - (room if min(every) < 0 else 0), max(every) + room
    kinds = (
        (
            "as_paper",
            "as the paper probably compares: Adam's rates 0.001, the method's Adam group 0.02",
            style.DARK,
            "",
        ),
        ("rates", "of that, from the rates: Adam with its Adam group at 0.02 as well", style.ORANGE, "////"),
        ("optimizer", "and from the optimizer: both with the Adam group at 0.02", "white", "\\\\\\\\"),
        (
            "optimizer_low",
            "or, if the optimizer is changed first: both with the Adam group at 0.001",
            "white",
            "....",
        ),
    )
    with panels(fair, 3.9) as (figure, parts):
        for model, axes in parts:
            names = [name for name in CONTROLLED if (model, name) in known]
            if not names:
                empty(axes)
                continue
            for index, (key, label, colour, hatch) in enumerate(kinds):
                heights = [getattr(known[model, name], key) for name in names]
                places = np.arange(len(names)) + (index - 1.5) * 0.21
                axes.bar(
                    places, heights, 0.19, color=colour, hatch=hatch, edgecolor="black", linewidth=0.7, label=label
                )
                for place, value, name in zip(places, heights, names, strict=True):
                    mark = "†" if key in known[model, name].ends else ""
                    axes.annotate(
                        f"{value:.2f}{mark}", (place, value), xytext=(0, 2 if value >= 0 else -2), textcoords="offset points",
                        ha="center", va="bottom" if value >= 0 else "top", fontsize=7,
                    )  # fmt: skip
            axes.axhline(0, color="black", linewidth=0.8)
            axes.set_ylim(*bounds)
            axes.set_xticks(range(len(names)), [units.optimizer_name(name) for name in names])
            axes.grid(False, axis="x")
        parts[0][1].set_ylabel("gain over Adam in loss, nats")
        handles = next(axes.get_legend_handles_labels() for _, axes in parts if axes.containers)
        figure.legend(*handles, loc="outside lower center", ncols=1)
        ends = any(key in each.ends for each in known.values() for key in keys)
        note = "; †: best matrix rate at an end" if ends else ""
        style.title(figure, f"What the rates and the optimizer gain: up is better (one seed{note})")
    return figure


# Ablations -------------------------------------------------------------------------------------------------------------


def _ablations(fair: Fair) -> Figure:
    tables = {model: {row.name: row for row in ablations(fair, model)} for model in fair.models}
    figure, rc = style.figure(WIDE, 4.4)
    with rc:
        left, right = figure.subplots(1, 2)
        for axes, names, what in ((left, PARTS, "parts of Alice"), (right, CHOICES, "open choices")):
            known = [name for name in names if name != PLAIN and any(_dot(rows.get(name)) for rows in tables.values())]
            axes.set_title(what)
            if not known:
                empty(axes)
                continue
            for index, rows in enumerate(tables.values()):
                colour, marker = _PROXIES[index % len(_PROXIES)]
                for place, name in enumerate(reversed(known)):
                    dot = _dot(rows.get(name))
                    if dot is None:
                        continue
                    middle, reach, claimed = dot
                    y = place + 0.17 * (1 - 2 * index)
                    if reach:
                        axes.plot(reach, (y, y), color=colour, linewidth=1.2)
                    axes.plot(
                        middle, y, color=colour, marker=marker, markersize=5.5, linestyle="",
                        markerfacecolor=colour if claimed else "white", markeredgewidth=1.2,
                    )  # fmt: skip
            axes.axvline(0, color="black", linewidth=0.8)
            axes.set_yticks(range(len(known)), [variant_name(name) for name in reversed(known)])
            axes.set_ylim(-0.6, len(known) - 0.4)
            axes.set_xlabel("loss less plain Alice's, nats")
        _proxy_legend(figure, fair.models)
        style.title(
            figure, "Variants of Alice: left of 0 is better than plain Alice (lines: 95 % intervals, seeds not paired)"
        )
    return figure


def _dot(row: Row | None) -> tuple[float, tuple[float, float] | None, bool] | None:
    if row is None or row.pair is None or row.pair.test.difference is None:
        return None
    return row.pair.test.difference, row.pair.test.interval, row.claim is not None


def _proxy_legend(figure: Figure, models: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", label=model)
        for model, (colour, marker) in zip(models, _PROXIES, strict=False)
    ]
    handles.append(Line2D([], [], color=GREY, marker="o", linestyle="", label="filled: a difference by the rule"))
    handles.append(
        Line2D([], [], color=GREY, marker="o", linestyle="", markerfacecolor="white", label="hollow: none claimed")
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=4)


# The sweep that a picture needs, and what draws it.
FIGURES: dict[str, tuple[str, Callable[[Fair], Figure]]] = {
    "curves": ("fair_best", _curves),
    "curves_b95": ("fair_best_b95", _curves_again),
    "speedup": ("fair_best", _speedup),
    "memory": ("fair_best", _memory),
    "group_rate": ("fair_rates", _group_rate),
    "sensitivity": ("fair_rates", _sensitivity),
    "gains": ("fair_control", _gains),
    "ablations": ("fair_ablations", _ablations),
}
