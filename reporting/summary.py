"""Tables of runs, and which run of a sweep counts as an optimizer's best."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise

from . import units
from .records import Run

Rates = tuple[float, float]  # (rate of the matrices, rate of everything else)


def by_optimizer(runs: Iterable[Run]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.optimizer, []).append(run)
    return groups


def cells(runs: Iterable[Run]) -> dict[Rates, list[Run]]:
    """Runs of one optimizer by their pair of rates, ordered by rates; several runs of a cell differ in the seed."""
    groups: dict[Rates, list[Run]] = {}
    for run in runs:
        groups.setdefault((run.lr, run.adam_lr), []).append(run)
    return {rates: sorted(groups[rates], key=lambda run: run.seed or 0) for rates in sorted(groups)}


def selection_perplexity(cell: Sequence[Run], runs: Sequence[Run]) -> float:
    """What a cell of `runs` is ranked by: its mean perplexity over the seeds that every cell of the optimizer has.

    Extra seeds of the best cell must not change which cell is the best: they show its spread, and nothing else has
    them. Where no seed is common to all, each cell counts with the seeds it has.
    """
    common = set.intersection(*({run.seed for run in group} for group in cells(runs).values()))
    values = [run.perplexity for run in cell if not common or run.seed in common]
    return statistics.fmean(values)


def best_cell(runs: Iterable[Run]) -> list[Run]:
    """The runs (one for each seed) of the cell with the lowest perplexity. Diverged counts as infinite.

    Args:
        runs: runs of one optimizer; those that have not ended are left out.

    Raises:
        ValueError: no run has ended.
    """
    ended = [run for run in runs if not math.isnan(run.perplexity)]
    if not ended:
        raise ValueError("None of these runs has ended, so none is the best: let at least one finish.")
    return min(cells(ended).values(), key=lambda cell: selection_perplexity(cell, ended))


def ranking(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """The best cell of each optimizer, best optimizer first, by the mean over all seeds that the cell has.

    Optimizers without a run that has ended are left out.
    """
    ended = by_optimizer(run for run in runs if not math.isnan(run.perplexity))
    best = {name: best_cell(group) for name, group in ended.items()}
    return dict(sorted(best.items(), key=lambda item: mean_perplexity(item[1])))


def mean_perplexity(cell: Sequence[Run]) -> float:
    return statistics.fmean(run.perplexity for run in cell)


def results_table(runs: Iterable[Run]) -> str:
    """Markdown table with the best cell of each optimizer, best first.

    The spread is the standard deviation over the seeds of that cell, then the smallest and the largest value.
    """
    lines = [
        "| Optimizer | Matrix rate | Adam rate | Final perplexity | Seeds | Spread over seeds | Optimizer state | "
        "Tokens/s |",
        "|:--|--:|--:|--:|--:|:--|--:|--:|",
    ]
    for name, cell in ranking(runs).items():
        values = [run.perplexity for run in cell]
        state = [
            run.summary["optimizer_state_bytes"]
            for run in cell
            if run.summary and run.summary.get("optimizer_state_bytes") is not None
        ]
        speed = [
            run.summary["tokens_per_second"]
            for run in cell
            if run.summary and run.summary.get("tokens_per_second") is not None
        ]
        lines.append(
            f"| {units.optimizer_name(name)} | {cell[0].lr:g} | {cell[0].adam_lr:g} "
            f"| {units.perplexity(mean_perplexity(cell))} "
            f"| {len(cell)} | {_spread(values)} | {units.size(state[0]) if state else 'unknown'} "
            f"| {f'{statistics.median(speed):,.0f}' if speed else 'unknown'} |"
        )
    return "\n".join(lines)


def grid_table(runs: Iterable[Run]) -> str:
    """Markdown table with every cell that was run: optimizer, rates, seed, outcome. Nothing is left out."""
    lines = ["| Optimizer | Matrix rate | Adam rate | Seed | Final perplexity |", "|:--|--:|--:|--:|--:|"]
    for name, group in sorted(by_optimizer(runs).items()):
        for (lr, adam_lr), cell in cells(group).items():
            for run in cell:
                outcome = units.perplexity(run.perplexity)
                if run.diverged is not None and run.diverged.get("step") is not None:
                    outcome += f" at step {run.diverged['step']}"
                elif math.isnan(run.perplexity):
                    outcome = "not finished"
                lines.append(f"| {units.optimizer_name(name)} | {lr:g} | {adam_lr:g} | {run.seed} | {outcome} |")
    return "\n".join(lines)


def findings(runs: Iterable[Run]) -> list[str]:
    """What a reader of the table must know: the order, what the seeds cannot tell apart, bests at a grid's edge."""
    runs = [run for run in runs if not math.isnan(run.perplexity)]
    best = ranking(runs)
    if not best:
        return []
    values = {name: [run.perplexity for run in cell] for name, cell in best.items()}
    notes = [
        "Order, best first: "
        + ", ".join(
            f"{units.optimizer_name(name)} {units.perplexity(mean_perplexity(cell))}" for name, cell in best.items()
        )
        + "."
    ]
    for first, second in pairwise(best):
        names = f"{units.optimizer_name(first)} and {units.optimizer_name(second)}"
        if len(values[first]) < 2 or len(values[second]) < 2:
            notes.append(f"{names}: a single seed of one of them, so their difference has no error bar.")
        elif max(values[first]) >= min(values[second]):
            notes.append(f"{names}: the ranges over seeds overlap, so this sweep does not tell them apart.")
    for name in best:
        rates = list(cells(by_optimizer(runs)[name]))
        for index, what in enumerate(("matrix rate", "adam_lr")):
            tried = sorted({pair[index] for pair in rates})
            chosen = (best[name][0].lr, best[name][0].adam_lr)[index]
            if len(tried) > 1 and chosen in (tried[0], tried[-1]):
                end = "smallest" if chosen == tried[0] else "largest"
                notes.append(
                    f"{units.optimizer_name(name)}: the best {what} ({chosen:g}) is the {end} that was tried, "
                    "so a better one may lie outside the grid."
                )
    return notes


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "one seed"
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < len(values):
        return f"{len(values) - len(finite)} of {len(values)} diverged"
    return f"± {statistics.stdev(values):.2g} ({units.perplexity(min(values))} to {units.perplexity(max(values))})"
