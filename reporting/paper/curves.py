"""Figures 1, 2, 5 and 6: the paper's curves, digitised, with ours over them. Drawn by figures.py.

Methods differ in colour, dash and marker, so that the figures can be read in black and white. The paper's curves are thin
and without markers, ours have them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import style, units
from ..records import Run
from ..style import LOOKS, WIDE
from .cells import CELLS, EXPERIMENTS
from .cost import Memory
from .numbers import CURVES, SIZES, Paper, curve_name
from .records import basis_similarities, experiment_runs, misfits
from .speed import counting, reference_experiment
from .tables import BASIS_COLUMNS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SERIES = (  # of figures whose curves are not methods
    (style.BLUE, "-", "o"),
    (style.VERMILION, (0, (5, 1.5)), "X"),
    (style.GREEN, (0, (3, 1.2, 1, 1.2)), "s"),
    (style.DARK, (0, (1, 1.2)), "v"),
)
# White behind the words, because our curves come in from above
_LEGEND: dict[str, Any] = {
    "loc": "upper right",
    "fontsize": 7,
    "title_fontsize": 7,
    "handlelength": 3.2,
    "frameon": True,
    "framealpha": 0.85,
    "edgecolor": "none",
}


def figure1_2(paper: Paper, root: Path, memory: Memory | None) -> Figure:
    """Validation perplexity over steps at the four sizes."""
    figure, rc = style.figure(WIDE, 7.4)
    with rc:
        grid = figure.subplots(2, 2)
        for axes in grid[:, 0]:
            axes.set_ylabel("validation perplexity")
        for axes, size in zip(grid.flat, SIZES, strict=True):
            figure_name = CURVES[size]
            for optimizer in ("adam", "galore", "fira", "racs", "alice_0", "alice"):
                colour, dash, marker, _ = LOOKS[optimizer]
                steps, values = paper.curve(figure_name, curve_name(optimizer, starred=False))
                starred = optimizer in ("adam", "racs")  # the others train the last layer themselves
                final = paper.printed(optimizer, size, starred)
                star = "*" if starred else ""
                text = f"{units.optimizer_name(optimizer)}{star}  {final:.2f}"
                axes.plot(steps, values, color=colour, linestyle=dash, linewidth=1.1, label=text)
                _draw_ours(axes, reference_experiment(optimizer, size), root, colour, marker)
            style.log_axis(axes, *_range(axes))
            axes.set_title(f"{size}  (Figure {figure_name.split('_')[0].removeprefix('fig')})")
            axes.xaxis.set_major_formatter(lambda value, _: units.count(value))
            axes.set_xlabel("steps")
            axes.legend(title="paper, final", **_LEGEND)
        style.title(figure, "C4: the paper's curves (*: last layer by Adam)" + _ours_note(figure))
    return figure


def figure5(paper: Paper, root: Path, memory: Memory | None) -> Figure:
    """The ablations at 130M."""
    panels = {
        "5a": ("fig5a_tracking", "tracking and switching, no compensation"),
        "5b": ("fig5b_switching", "how the rest of the basis is drawn"),
        "5c": ("fig5c_compensation", "compensation"),
        "5d": ("fig5d_last_layer", "last layer; lm head: by Adam"),
        "5e": ("fig5e_racs_ema", "RACS's averages"),
    }
    figure, rc = style.figure(WIDE, 6.0)
    with rc:
        grid = list(figure.subplots(2, 3).flat)
        for axes, (panel, (key, about)) in zip(grid, panels.items(), strict=False):
            cells = [cell for cell in CELLS if cell.table == f"figure{panel}"]
            for cell, (colour, dash, marker) in zip(cells, _SERIES, strict=False):
                steps, values = paper.curve(key, cell.row)
                name = "optimal" if cell.row == "ours" else cell.row
                text = f"{name}  {cell.paper_value:.4f}"
                axes.plot(steps, values, color=colour, linestyle=dash, linewidth=1.1, label=text)
                _draw_ours(axes, cell.experiment, root, colour, marker)
            style.log_axis(axes, *_range(axes, room=1.2))
            axes.set_title(f"{panel}: {about}", fontsize=8.5)
            axes.xaxis.set_major_formatter(lambda value, _: units.count(value))
            axes.set_xlabel("steps")
            axes.legend(**_LEGEND)
        grid[-1].set_axis_off()
        style.title(figure, "Ablations at 130M, validation perplexity: the paper's curves" + _ours_note(figure))
    return figure


def figure6(paper: Paper, root: Path, memory: Memory | None) -> Figure:
    """Similarity of four columns of the basis before and after each update."""
    figure, rc = style.figure(WIDE, 5.6)
    with rc:
        grid = figure.subplots(2, 2)
        for axes in grid[:, 0]:
            axes.set_ylabel("|cosine| before and after an update")
        for axes, (index, column) in zip(grid.flat, enumerate(BASIS_COLUMNS), strict=True):
            cells = [cell for cell in CELLS if cell.table == "figure6"]
            for cell, (colour, dash, marker) in zip(cells, _SERIES, strict=False):
                steps, values = paper.curve(f"fig6_index{column}", cell.row)
                axes.plot(steps, values, color=colour, linestyle=dash, linewidth=0.9, label=cell.row)
                run = counting(cell.experiment, root)
                if run is not None and (ours := _mean_similarity(run, index)):
                    axes.plot(
                        *ours,
                        color=colour,
                        marker=marker,
                        markersize=3,
                        markevery=10,
                        linewidth=1.8,
                        label=f"ours: {cell.row}",
                    )
            axes.set_ylim(0, 1.02)
            axes.set_title(f"column {column} of U, by descending eigenvalue")
            axes.xaxis.set_major_formatter(lambda value, _: units.count(value))
            axes.set_xlabel("steps")
        handles, texts = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, texts, loc="outside lower center", ncols=len(texts), handlelength=3.2)
        style.title(figure, "The basis at each update (Figure 6): the paper's curves" + _ours_note(figure))
    return figure


def _mean_similarity(run: Run, index: int) -> tuple[list[int], list[float]] | None:
    """Mean over the recorded matrices at each update."""
    by_step: dict[int, list[float]] = {}
    for steps in basis_similarities(run).values():
        for step, values in steps.items():
            if index < len(values):
                by_step.setdefault(step, []).append(values[index])
    if not by_step:
        return None
    return sorted(by_step), [float(np.mean(by_step[step])) for step in sorted(by_step)]


def _draw_ours(axes: Axes, experiment: str, root: Path, colour: str, marker: str) -> None:
    """Our curves of an experiment: the mean over seeds with a band, and thinly each record that is not the paper's setting."""
    runs = [run for run in experiment_runs(experiment, root) if (run.evals["step"] > 0).any()]
    fitting = [run for run in runs if not misfits(run, EXPERIMENTS[experiment])]
    if fitting:
        steps = min((run.evals["step"] for run in fitting), key=len)
        curves = np.array([run.evals["perplexity"][: len(steps)] for run in fitting if _starts_as(run, steps)])
        after, mean = steps > 0, curves.mean(axis=0)
        if len(curves) > 1:
            axes.fill_between(
                steps[after], curves.min(axis=0)[after], curves.max(axis=0)[after], color=colour, alpha=0.25
            )
        every = max(1, int(after.sum()) // 12)
        text = f"ours: {units.perplexity(float(mean[-1]))}"
        axes.plot(
            steps[after],
            mean[after],
            color=colour,
            marker=marker,
            markersize=4,
            markevery=every,
            linewidth=2.0,
            label=text,
        )
    for run in runs:
        if run not in fitting:
            after = run.evals["step"] > 0
            text = f"ours: {units.count(run.training_tokens(run.evals['step'])[-1])} tokens of {run.data}"
            axes.plot(
                run.evals["step"][after],
                run.evals["perplexity"][after],
                color=colour,
                marker=marker,
                markersize=4,
                markerfacecolor="white",
                linewidth=0.8,
                label=text,
            )


def _starts_as(run: Run, steps: Any) -> bool:
    return bool(np.array_equal(run.evals["step"][: len(steps)], steps))


def _range(axes: Axes, room: float = 1.03) -> tuple[float, float]:
    """What holds the paper's curves whole and the ends of ours, whose beginnings are far above; `room` above for words."""
    low, high = [], []
    for line in axes.lines:
        values = np.asarray(line.get_ydata(), dtype=float)
        ours = str(line.get_label()).startswith("ours: ")
        low.append(float(np.nanmin(values)))
        high.append(float(values[-1] if ours else np.nanmax(values)))
    return min(low) / 1.03, max(value for value in high if np.isfinite(value)) * room


def _ours_note(figure: Figure) -> str:
    drawn = any(str(line.get_label()).startswith("ours: ") for axes in figure.axes for line in axes.lines)
    return " (thin) and ours (markers)" if drawn else "; none of them has been run here yet"
