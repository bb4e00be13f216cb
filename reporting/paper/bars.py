"""Figures 3 and 4, speed-ups, and memory against perplexity. Drawn by figures.py.

The paper's bars are filled and hatched, ours white with a thick edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .. import style, units
from ..style import GREY, LOOKS, WIDE
from .cells import EXPERIMENTS
from .cost import FOOTPRINT_METHODS, FOOTPRINT_SIZES, Memory, footprint_key
from .numbers import CURVES, SIZES, Paper, curve_name
from .speed import MODEL_SIZES, counting, our_effective, our_speedup, reference_experiment

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def figure3(paper: Paper, root: Path, memory: Memory | None) -> Figure:
    """Throughput and effective throughput; our bars beside the paper's where there are records."""
    methods = ("adam", "galore", "fira", "racs", "alice_0", "alice")
    figure, rc = style.figure(WIDE, 6.0)
    with rc:
        for axes, effective in zip(figure.subplots(2, 1), (False, True), strict=True):
            heights = {name: [paper.throughput(name, size, effective) or 0.0 for size in SIZES] for name in methods}
            ours = {name: [_our_throughput(name, size, effective, root) for size in SIZES] for name in methods}
            _bars(axes, SIZES, heights, ours, "{:.0f}k", 1000)
            axes.set_title(
                "effective tokens/s: Adam's tokens over the time to Adam's perplexity (no bar: never reached)"
                if effective
                else "tokens/s"
            )
            axes.yaxis.set_major_formatter(lambda value, _: units.count(value))
        figure.axes[0].legend(ncols=len(methods), loc="upper right", handlelength=2.4)
        style.title(figure, "Throughput (Figure 3): the paper's bars (A100)" + _bar_note(figure))
    return figure


def _our_throughput(optimizer: str, size: str, effective: bool, root: Path) -> float | None:
    run = counting(reference_experiment(optimizer, size), root)
    if run is None:
        return None
    return our_effective(optimizer, size, root) if effective else (run.summary or {}).get("tokens_per_second")


def figure4(paper: Paper, root: Path, memory: Memory | None) -> Figure:
    """Memory: the paper's measured footprints, and ours computed from shapes.

    Args:
        memory: (optimizer, model, last_layer) -> GiB of weights and states; None leaves our bars out.
    """
    from matplotlib.patches import Patch

    sizes, methods = FOOTPRINT_SIZES, FOOTPRINT_METHODS
    figure, rc = style.figure(WIDE, 3.6)
    with rc:
        bars = paper.figures["fig4_memory_footprint_GB"]
        for axes, size in zip(figure.subplots(1, 3), sizes, strict=True):
            names = [units.optimizer_name(name) for name in methods]
            x = np.arange(len(methods))
            whole = [bars[size][name] for name in names]
            layerwise = [bars[size].get(f"{name}-layerwise", np.nan) for name in names]
            colours = [LOOKS[name][0] for name in methods]
            axes.bar(x - 0.27, whole, 0.27, color=colours, edgecolor="black", linewidth=0.4)
            axes.bar(x, layerwise, 0.27, color=colours, alpha=0.5, hatch="////", edgecolor="black", linewidth=0.4)
            if memory is not None:
                computed = [memory.get(footprint_key(name, size), np.nan) for name in methods]
                axes.bar(x + 0.27, computed, 0.27, color="white", edgecolor=colours, linewidth=1.2)
            axes.set_xticks(x, names, rotation=45, ha="right")
            axes.grid(False, axis="x")
            axes.set_title(size)
        figure.axes[0].set_ylabel("GB" if memory is None else "paper: GB, ours: GiB")
        layerwise_text = "paper, measured, layer by layer, GB (none for Adam)"
        kinds = [
            Patch(facecolor=GREY, edgecolor="black", label="paper, measured, GB"),
            Patch(facecolor="#C8C8C8", edgecolor="black", hatch="////", label=layerwise_text),
            Patch(facecolor="white", edgecolor=GREY, label="ours, computed: weights and states only, GiB"),
        ]
        figure.legend(handles=kinds[: 3 if memory is not None else 2], loc="outside lower center", ncols=3)
        style.title(figure, "Memory (Figure 4, paper: 256 tokens a batch, BF16)")
    return figure


def speedup_bars(paper: Paper, root: Path, memory: Memory | None) -> Figure:
    """Speed-up over Adam in steps and in wall-clock time."""
    methods = ("racs", "alice_0", "alice")
    figure, rc = style.figure(WIDE, 3.8)
    with rc:
        steps = paper.figures["speedup"]["recomputed"]
        in_steps, in_time = {}, {}
        for name in methods:
            label = curve_name(name, starred=False)
            in_steps[name] = [steps[CURVES[size]]["AdamW"][label]["speedup"] for size in SIZES]
            in_time[name] = [
                (paper.throughput(name, size, effective=True) or 0.0) / (paper.throughput("adam", size) or np.nan)
                for size in SIZES
            ]
        ours_steps = {name: [our_speedup(paper, name, size, root) for size in SIZES] for name in methods}
        ours_time = {name: [_our_time_speedup(name, size, root) for size in SIZES] for name in methods}
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, heights, ours, about in (
            (left, in_steps, ours_steps, "in steps"),
            (right, in_time, ours_time, "in wall-clock time: effective throughput over Adam's"),
        ):
            _bars(axes, SIZES, heights, ours, "{:.2f}", 1)
            axes.axhline(1, color=GREY, linewidth=0.8)
            axes.set_title(about)
        left.legend(loc="upper left", ncols=3, handlelength=2.4)
        left.set_ylim(0, max(3.4, left.get_ylim()[1]))
        style.title(figure, "Speed-up over Adam, by the paper's definition: the paper's bars" + _bar_note(figure))
    return figure


def _our_time_speedup(optimizer: str, size: str, root: Path) -> float | None:
    effective, adam = (our_effective(name, size, root) for name in (optimizer, "adam"))
    return effective / adam if effective and adam else None


def _bars(
    axes: Axes,
    groups: Sequence[str],
    heights: dict[str, list[float]],
    ours: dict[str, list[float | None]],
    text: str,
    unit: float,
) -> None:
    """Groups of bars, a method each: the paper's hatched, ours beside them in white with a thick edge."""
    anything = any(value is not None for values in ours.values() for value in values)
    width = 0.84 / len(heights)
    for index, (name, values) in enumerate(heights.items()):
        colour, _, _, hatch = LOOKS[name]
        x = np.arange(len(groups)) + (index - (len(heights) - 1) / 2) * width
        part = width / 2 if anything else width
        places = x - part / 2 if anything else x
        axes.bar(
            places, values, part, color=colour, alpha=0.85, hatch=hatch, edgecolor="white", linewidth=0.4,
            label=units.optimizer_name(name),
        )  # fmt: skip
        for place, value in zip(places, values, strict=True):
            if value and np.isfinite(value):
                axes.annotate(text.format(value / unit), (place, value), ha="center", va="bottom", fontsize=5.5)
        known = [(place + part, value) for place, value in zip(places, ours[name], strict=True) if value]
        if known:
            axes.bar(
                [place for place, _ in known],
                [value for _, value in known],
                part,
                color="white",
                edgecolor=colour,
                linewidth=1.4,
                label="_ours",
            )
    axes.set_xticks(np.arange(len(groups)), groups)
    axes.grid(False, axis="x")


def _bar_note(figure: Figure) -> str:
    drawn = any(container.get_label() == "_ours" for axes in figure.axes for container in axes.containers)
    return " and ours (white)" if drawn else "; none of them has been run here yet"


def memory_perplexity(paper: Paper, root: Path, memory: Memory | None) -> Figure:
    """Final perplexity against memory, Tables 2 and 3."""
    figure, rc = style.figure(WIDE, 6.6)
    rows = paper.tables["table3"]["rows"]
    columns = paper.tables["table3"]["columns"]
    looks = {name: look for name, look in LOOKS.items() if name == "muon" or units.optimizer_name(name) in rows}
    with rc:
        for axes, size in zip(figure.subplots(2, 2).flat, SIZES, strict=True):
            for place, (name, (colour, _, marker, _)) in enumerate(looks.items()):
                for starred in (True, False):
                    y = paper.perplexity(name, size, starred)
                    if name == "muon":
                        x = paper.tables["iclr2026"]["muon"]["mem_1.3B_G"] if size == "1.3B" else None
                    else:
                        x = rows[units.optimizer_name(name)][columns.index(size + ("*" if starred else ""))]
                    if x is None or y is None:
                        continue
                    axes.plot(
                        x, y, marker=marker, markersize=5.5, linestyle="", color=colour, alpha=0.85,
                        markerfacecolor=colour if starred else "white", markeredgewidth=1.1,
                        zorder=3 - 0.1 * place,  # the last of LOOKS, Apollo among them, lie below
                    )  # fmt: skip
                    experiment = f"table2/{name}_{MODEL_SIZES[size]}" + ("" if starred else "_candidate")
                    run = counting(experiment, root) if experiment in EXPERIMENTS else None
                    if run is not None:
                        axes.plot(x, run.perplexity, marker=marker, markersize=4, linestyle="", color="black")
            axes.set_title(size)
            axes.set_xlabel("weights and states, GiB")
            axes.set_ylabel("perplexity")
        from matplotlib.lines import Line2D

        handles = [
            Line2D([], [], color=colour, marker=marker, linestyle="", markersize=7, label=units.optimizer_name(name))
            for name, (colour, _, marker, _) in looks.items()
        ]
        handles.append(Line2D([], [], color=GREY, marker="o", linestyle="", label="last layer: Adam"))
        handles.append(
            Line2D([], [], color=GREY, marker="o", linestyle="", markerfacecolor="white", label="last layer: method")
        )
        figure.legend(handles=handles, loc="outside lower center", ncols=6)
        ours = any(line.get_color() == "black" for axes in figure.axes for line in axes.lines)
        note = " (filled GaLore, Fira, Apollo: cited; black: ours)" if ours else " (filled GaLore, Fira, Apollo: cited)"
        style.title(figure, "Memory and perplexity as printed: lower left is better" + note)
    return figure
