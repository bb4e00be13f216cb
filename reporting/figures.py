"""Pictures of run records. matplotlib is imported only when something is drawn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from . import style, units
from .records import Run, load_run
from .summary import by_optimizer, cells, mean_perplexity, ranking, selection_perplexity

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def training_picture(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Draw one run: perplexity in training and validation over tokens, learning rates and gradient norm.

    Args:
        run_dir: a run folder; the run may still be going on.
        out: file to write; `training.png` in the run folder by default.

    Raises:
        ValueError: nothing has been recorded yet.
        ImportError: matplotlib is not installed.
    """
    run = load_run(run_dir)
    if len(run.train["step"]) == 0:
        raise ValueError(f"{run.path}/metrics.jsonl holds no training steps yet: draw it after the first ones.")
    figure, rc = style.figure(9.0, 4.3)
    with rc:
        grid = figure.add_gridspec(2, 2, width_ratios=[2.5, 1])
        main, rates, norm = (figure.add_subplot(grid[spot]) for spot in ((slice(None), 0), (0, 1), (1, 1)))
        _draw_perplexity(main, run)
        tokens = run.train["tokens"]
        _draw_rates(rates, run)
        norm.plot(tokens, run.train["grad_norm"], color=style.BLUE, alpha=0.35, linewidth=0.7)
        norm.plot(
            tokens,
            np.exp(_smooth(np.log(np.maximum(run.train["grad_norm"], 1e-30)))),
            color=style.BLUE,
            linewidth=1.3,
        )
        norm.set_title("gradient norm")
        finite = run.train["grad_norm"][np.isfinite(run.train["grad_norm"])]
        if len(finite) and finite.min() > 0:
            style.log_axis(norm, finite.min() * 0.9, finite.max() * 1.1)
        for axes in (main, rates, norm):
            axes.set_xlim(0, tokens[-1] * 1.015)
            axes.xaxis.set_major_formatter(lambda value, _: units.count(value))
        rates.tick_params(labelbottom=False)
        main.set_xlabel("training tokens")
        norm.set_xlabel("training tokens")
        style.title(figure, _headline(run))
        path = style.save(figure, Path(out) if out is not None else run.path / "training.png")
    return path


def _draw_perplexity(axes: Axes, run: Run) -> None:
    """Training as exp(loss), validation, and the n-gram references, on one logarithmic axis."""
    tokens, loss = run.train["tokens"], run.train["loss"]
    colour, reference = style.BLUE, style.ORANGE
    smooth = _smooth(loss)
    axes.plot(tokens, np.exp(np.minimum(loss, 700)), color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(tokens, np.exp(np.minimum(smooth, 700)), color=colour, linewidth=1.4, label="training (smoothed)")
    shown = [np.exp(np.minimum(loss[np.isfinite(loss)], 700))]

    x, y = run.training_tokens(run.evals["step"]), run.evals["perplexity"]
    if len(x):
        axes.plot(
            x, y, color=style.VERMILION, marker="o", markersize=4, linewidth=1.4, label="validation", clip_on=False
        )
        shown.append(y[np.isfinite(y)])
    references = _references(run)
    values = np.concatenate([*shown, np.array([value for _, value in references])])
    values = values[np.isfinite(values) & (values > 0)]
    low, high = (values.min(), values.max()) if len(values) else (1.0, 10.0)
    style.log_axis(axes, low * 0.88, high * 1.1)
    for name, value in references:
        axes.axhline(value, color=reference, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            f"{name} {units.perplexity(value)}",
            (0 if name == "bigram" else 1, value),  # where the curves are not, in a run that learns something
            xycoords=("axes fraction", "data"),
            xytext=(4 if name == "bigram" else -2, 2.5),
            textcoords="offset points",
            ha="left" if name == "bigram" else "right",
            va="bottom",
            fontsize=8,
            color="#8A5F00",
        )
    if len(y) and math.isfinite(y[-1]):
        axes.annotate(
            units.perplexity(y[-1]),
            (x[-1], y[-1]),
            xytext=(2, 6),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=9,
            fontweight="bold",
            color="#B34A00",
            annotation_clip=False,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6},
        )
    axes.set_title("perplexity (log scale)")
    axes.legend(loc="upper right")


def _draw_rates(axes: Axes, run: Run) -> None:
    """The schedule of the matrices' rate and, where it differs, of everything else's."""
    tokens, lr, adam_lr = (run.train[key] for key in ("tokens", "lr", "adam_lr"))
    if not np.isfinite(lr).any():
        return
    axes.plot(tokens, lr, color=style.BLUE, linewidth=1.4)
    peak = int(np.nanargmax(lr))
    two = np.isfinite(adam_lr).any() and not np.allclose(lr, adam_lr, equal_nan=True)
    axes.annotate(
        "matrices" if two else "all parameters",
        (tokens[peak], lr[peak]),
        xytext=(4, 5),
        textcoords="offset points",
        fontsize=8,
        color=style.BLUE,
        va="bottom",
    )
    if two:
        axes.plot(tokens, adam_lr, color=style.DARK, linewidth=1.4)
        axes.annotate(
            "the rest (Adam)",
            (tokens[peak], adam_lr[peak]),
            xytext=(4, 5),
            textcoords="offset points",
            fontsize=8,
            color=style.DARK,
            va="bottom",
        )
    axes.set_title("learning rate")
    axes.set_ylim(0, np.nanmax([lr, adam_lr]) * 1.2)


def _headline(run: Run) -> str:
    parameters = (run.summary or {}).get("parameters", run.environment.get("parameters"))
    model = run.model + (f" ({units.count(parameters)} parameters)" if parameters else "")
    tokens = units.count(float(run.train["tokens"][-1]))
    text = f"{model}, {units.optimizer_name(run.optimizer)}, data: {run.data}, {tokens} tokens"
    if run.summary and run.summary.get("perplexity") is not None:
        return f"{text}: validation perplexity {units.perplexity(run.perplexity)}"
    return f"{text}: not finished"


def comparison_figure(runs: Iterable[Run], out: str | Path) -> Path:
    """Draw a sweep over matrix rate and Adam rate: each optimizer's best curve, and what the Adam rate changes.

    Left, the validation curve of the best cell of each optimizer (mean over its seeds; the band spans them). Right,
    final perplexity against the Adam rate: the line goes through the best matrix rate at each Adam rate, faint points
    are the other matrix rates. A run that diverged, or ended far above the others, sits at the upper edge.

    Raises:
        ValueError: no run has ended.
        ImportError: matplotlib is not installed.
    """
    methods = by_optimizer([run for run in runs if not math.isnan(run.perplexity)])
    if not methods:
        raise ValueError("None of these runs has ended, so there is nothing to compare: let at least one finish.")
    best = ranking(run for group in methods.values() for run in group)
    ranked = list(best)
    figure, rc = style.figure(9.0, 4.3)
    with rc:
        left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
        _draw_best_curves(left, best)
        _draw_rate_dependence(right, ranked, methods)
        some = methods[ranked[0]][0]
        style.title(figure, f"{some.model}, data: {some.data}: final validation perplexity, lower is better")
        path = style.save(figure, Path(out))
    return path


def _draw_best_curves(axes: Axes, best: dict[str, list[Run]]) -> None:
    shown: list[float] = []
    for index, (name, runs) in enumerate(best.items()):
        colour, marker = style.look(name, index)
        rates = f"{units.optimizer_name(name)}  lr {runs[0].lr:g}, adam {runs[0].adam_lr:g}"
        steps = runs[0].evals["step"]
        curves = [run.evals["perplexity"] for run in runs if np.array_equal(run.evals["step"], steps)]
        # Before the first step every method is the untrained model: the curves are told apart after it.
        after = steps > 0
        if math.isinf(runs[0].perplexity):
            axes.plot([], [], color=colour, marker="x", linestyle="", label=f"{rates}: diverged")
            continue
        x, stack = runs[0].training_tokens(steps)[after], np.array(curves)[:, after]
        if stack.shape[0] > 1:
            axes.fill_between(x, stack.min(axis=0), stack.max(axis=0), color=colour, alpha=0.2, linewidth=0)
        label = f"{rates}: {units.perplexity(mean_perplexity(runs))}"
        axes.plot(x, stack.mean(axis=0), color=colour, marker=marker, markersize=4.5, linewidth=1.4, label=label)
        shown += stack[np.isfinite(stack)].tolist()
    bigram = [value for name, value in _references(next(iter(best.values()))[0]) if name == "bigram"]
    values = shown + bigram
    if values:
        style.log_axis(axes, *_padded(min(values), max(values)))
    _draw_bigram(axes, bigram, side="left")
    axes.xaxis.set_major_formatter(lambda value, _: units.count(value))
    axes.set_xlabel("training tokens")
    seeds = max(len(runs) for runs in best.values())
    axes.set_title("validation perplexity, best rates of each" + (f" (band: {seeds} seeds)" if seeds > 1 else ""))
    axes.legend(loc="upper center", bbox_to_anchor=(0.46, -0.15), ncols=2, columnspacing=1.2, handletextpad=0.5)


def _draw_rate_dependence(axes: Axes, ranked: Sequence[str], methods: dict[str, list[Run]]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    grids = {
        name: {rates: selection_perplexity(group, runs) for rates, group in cells(runs).items()}
        for name, runs in methods.items()
    }
    through = {
        name: {
            adam_lr: min(y for (_, other), y in grid.items() if other == adam_lr)
            for adam_lr in sorted({adam_lr for _, adam_lr in grid})
        }
        for name, grid in grids.items()
    }
    bigram = [value for run in methods[ranked[0]][:1] for name, value in _references(run) if name == "bigram"]
    lines = [y for points in through.values() for y in points.values() if math.isfinite(y)]
    finite = [y for grid in grids.values() for y in grid.values() if math.isfinite(y)]
    # The axis serves the lines; single bad cells far above them go to the edge instead of flattening everything.
    # The span of the grid's usual values keeps most faint points inside.
    low, top = _padded(
        min([*finite, *bigram], default=1.0),
        max([*lines, *bigram, float(np.percentile(finite, 80)) if finite else 10.0]),
    )
    style.log_axis(axes, low, top)
    if top < 4 * low:  # round numbers at equal differences reach both ends of so short an axis
        style.even_ticks(axes.yaxis, low, top)
    _draw_bigram(axes, bigram, side="right")
    beyond = False
    places = sorted({adam_lr for points in through.values() for adam_lr in points})
    for index, name in enumerate(ranked):
        colour, marker = style.look(name, index)
        # A little aside for each optimizer, so that points of equal rates do not hide each other.
        aside = 1.045 ** (index - (len(ranked) - 1) / 2)
        for (_, adam_lr), y in grids[name].items():
            on_line = y == through[name][adam_lr]
            if y > top:
                beyond = True
                axes.plot(
                    adam_lr * aside,
                    top,
                    color=colour,
                    marker="x" if math.isinf(y) else "^",
                    markersize=6,
                    linestyle="",
                    clip_on=False,
                    zorder=4,
                    alpha=1.0 if on_line else 0.55,
                )
            elif not on_line:
                axes.plot(
                    adam_lr * aside,
                    y,
                    color=colour,
                    marker=marker,
                    markersize=4,
                    linestyle="",
                    alpha=0.3,
                    markeredgewidth=0,
                )
        x = [adam_lr * aside for adam_lr, y in through[name].items() if y <= top]
        axes.plot(
            x,
            [y for y in through[name].values() if y <= top],
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=1.4,
            zorder=3,
        )
    axes.set_xscale("log")
    if places:
        axes.set_xlim(places[0] / 1.35, places[-1] * 1.35)
    axes.xaxis.set_major_locator(FixedLocator(places))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel(
        "adam_lr, the peak rate of embeddings, norms and lm_head"
        + ("\nat the upper edge: × diverged, ▲ above the axis" if beyond else "")
    )
    axes.set_title("final, one seed; line: best matrix rate, faint: others")


def _padded(low: float, high: float) -> tuple[float, float]:
    """The range with room on both sides, as a logarithmic axis needs it."""
    room = max(high / low, 1.05) ** 0.06
    return low / room, high * room


def _draw_bigram(axes: Axes, values: Sequence[float], side: Literal["left", "right"]) -> None:
    for value in values:
        axes.axhline(value, color=style.GREY, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            f"bigram {units.perplexity(value)}",
            (0.02 if side == "left" else 0.99, value),
            xycoords=("axes fraction", "data"),
            xytext=(0, 2),
            textcoords="offset points",
            fontsize=8,
            color=style.GREY,
            ha=side,
            va="bottom",
        )


def _references(run: Run) -> list[tuple[str, float]]:
    """Perplexities of the counting models that were fitted to the same training split, where recorded."""
    summary = run.summary or {}
    return [
        (name, float(summary[f"{name}_perplexity"]))
        for name in ("unigram", "bigram")
        if summary.get(f"{name}_perplexity")
    ]


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centred moving average over a twentieth of the run; [n] -> [n]. NaN stays NaN and spoils no neighbour.

    A trailing average would lag behind a falling loss and make it seem worse than it is. At the steep beginning the
    window shrinks evenly on both sides, at the flat end only on the side that is missing.
    """
    n = len(values)
    half = max(1, n // 40)
    centre = np.arange(n)
    first, last = np.maximum(centre - half, 0), np.minimum(centre + np.minimum(half, centre), n - 1)
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    mean = (sums[last + 1] - sums[first]) / np.maximum(counts[last + 1] - counts[first], 1)
    return np.where(known, mean, math.nan)
