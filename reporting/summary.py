"""Tables of runs, and which run of a sweep counts as an optimizer's best."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from . import units
from .records import Run

Rates = tuple[float, float]  # (rate of the matrices, rate of everything else)

FEW = 8  # optimizers, of which each gets sentences of its own


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
    """What a reader of the table must know: the order, what the seeds cannot tell apart, bests at a grid's edge.

    With more than `FEW` optimizers, a sentence for each kind of remark instead of one for each optimizer, and no order, which
    their table shows.
    """
    runs = [run for run in runs if not math.isnan(run.perplexity)]
    best = ranking(runs)
    if not best:
        return []
    edges = _edges(runs, best)
    if len(best) > FEW:
        return [*_compact_seeds(best), *_compact_edges(edges, len(best))]
    notes = [
        "Order, best first: "
        + ", ".join(
            f"{units.optimizer_name(name)} {units.perplexity(mean_perplexity(cell))}" for name, cell in best.items()
        )
        + "."
    ]
    for first, second in pairwise(best):
        names = f"{units.optimizer_name(first)} and {units.optimizer_name(second)}"
        if len(best[first]) < 2 or len(best[second]) < 2:
            notes.append(f"{names}: a single seed of one of them, so their difference has no error bar.")
        elif _overlap(best[first], best[second]):
            notes.append(f"{names}: the ranges over seeds overlap, so this sweep does not tell them apart.")
    notes += [
        f"{units.optimizer_name(edge.name)}: the best {edge.what} ({edge.rate:g}) is the {edge.end} that was tried, "
        "so a better one may lie outside the grid."
        for edge in edges
    ]
    return notes


@dataclass(frozen=True)
class _Edge:
    """An optimizer whose best rate is the smallest or largest of those tried."""

    name: str
    what: str  # matrix rate, adam_lr
    rate: float
    end: str  # smallest, largest
    tried: int  # values


def _edges(runs: Sequence[Run], best: Mapping[str, Sequence[Run]]) -> list[_Edge]:
    groups, found = by_optimizer(runs), []
    for name, cell in best.items():
        pairs, chosen = list(cells(groups[name])), (cell[0].lr, cell[0].adam_lr)
        for index, what in enumerate(("matrix rate", "adam_lr")):
            tried = sorted({pair[index] for pair in pairs})
            if len(tried) > 1 and chosen[index] in (tried[0], tried[-1]):
                end = "smallest" if chosen[index] == tried[0] else "largest"
                found.append(_Edge(name, what, chosen[index], end, len(tried)))
    return found


def _overlap(first: Sequence[Run], second: Sequence[Run]) -> bool:
    """Do the ranges over seeds of two cells overlap, of which the first has the lower mean?"""
    return max(run.perplexity for run in first) >= min(run.perplexity for run in second)


def _compact_seeds(best: Mapping[str, Sequence[Run]]) -> list[str]:
    single = [units.optimizer_name(name) for name, cell in best.items() if len(cell) < 2]
    notes = []
    if len(single) == len(best):
        notes.append("A single seed of every optimizer: no difference has an error bar.")
    elif single:
        notes.append(f"A single seed, so no error bar on differences from others: {', '.join(single)}.")
    near = [
        f"{units.optimizer_name(first)} and {units.optimizer_name(second)}"
        for first, second in pairwise(best)
        if min(len(best[first]), len(best[second])) > 1 and _overlap(best[first], best[second])
    ]
    if near:
        notes.append(f"The ranges over seeds overlap, so this sweep does not tell apart: {'; '.join(near)}.")
    return notes


def _compact_edges(edges: Sequence[_Edge], optimizers: int) -> list[str]:
    notes = []
    for what in ("matrix rate", "adam_lr"):
        some = [edge for edge in edges if edge.what == what]
        if not some:
            continue
        parts = []
        for end in ("smallest", "largest"):
            here = [edge for edge in some if edge.end == end]
            rates = {edge.rate for edge in here}
            if here:
                which = f"{end} ({rates.pop():g})" if len(rates) == 1 else end
                parts.append(f"the {which} for {', '.join(units.optimizer_name(edge.name) for edge in here)}")
        counts = sorted({edge.tried for edge in some})
        tried = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
        notes.append(
            f"The best {what} is at an end of its grid ({tried} values) for {len(some)} of {optimizers} optimizers, so a "
            f"better one may lie outside: {'; '.join(parts)}."
        )
    return notes


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "one seed"
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < len(values):
        return f"{len(values) - len(finite)} of {len(values)} diverged"
    return f"± {statistics.stdev(values):.2g} ({units.perplexity(min(values))} to {units.perplexity(max(values))})"
