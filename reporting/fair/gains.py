"""What the optimizer gains over Adam, what the Adam group's rate gains, and how batch size changes it; one seed, no tests.

gains(fair, "llama_tiny", "alice").optimizer             gain over Adam at equal rates of the Adam group, in nats

A gain is a loss that became smaller.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..records import Run
from .records import OWED, REFERENCE, Asked, Fair, again, lowest

CONTROLLED = ("adam", "muon", "racs", "alice")  # methods of the control and of the batch sizes
ADAM_RATE = 0.001  # of the paper's Adam, for all its parameters
# Of the Adam group of the paper's candidates, if they share the matrices' rate as in the code base that the paper
# probably grew from; it does not say.
CANDIDATE_RATE = 0.02


def tried(fair: Fair, model: str, method: str) -> dict[float, list[Run]]:
    """Runs of stage 1 and of the control by rate of the Adam group."""
    found: dict[float, list[Run]] = {}
    for run in [*fair.runs("fair_control", model, method), *fair.runs("fair_rates", model, method)]:
        found.setdefault(run.adam_lr, []).append(run)
    return dict(sorted(found.items()))


def best_at(fair: Fair, model: str, method: str, adam_lr: float) -> Run | None:
    """The best run over matrix rates at one rate of the Adam group; None if there is none or all have diverged."""
    run = lowest(tried(fair, model, method).get(adam_lr, []))
    return run if run is not None and math.isfinite(run.perplexity) else None


def at_end(fair: Fair, model: str, run: Run | None) -> bool:
    """Whether a run has the smallest or the largest matrix rate tried at its rate of the Adam group, or the only one."""
    if run is None:
        return False
    rates = [each.lr for each in tried(fair, model, run.optimizer).get(run.adam_lr, [])]
    return bool(rates) and run.lr in (min(rates), max(rates))


@dataclass(frozen=True)
class Gains:
    """The comparison that the paper probably makes, in nats, and what it is made of: as_paper = rates + optimizer.

    Attributes:
        as_paper: Adam with both rates at 0.001 less the method with its Adam group at 0.02.
        rates: Adam with both rates at 0.001 less Adam with its Adam group at 0.02, best matrix rate.
        optimizer: Adam less the method, both with the Adam group at 0.02, each at its best matrix rate.
        optimizer_low: Adam less the method, both with the Adam group at 0.001, each at its best matrix rate.
        at_own_best: Adam less the method, each at its best pair.
        within: the method with the Adam group at 0.001 less the method at its best rate of that group.
        ends: names of those gains in which a best matrix rate is at an end of those tried (`at_end`).
    """

    as_paper: float | None
    rates: float | None
    optimizer: float | None
    optimizer_low: float | None
    at_own_best: float | None
    within: float | None
    ends: frozenset[str] = frozenset()


def gains(fair: Fair, model: str, method: str) -> Gains:
    both = next(
        (run for run in tried(fair, model, REFERENCE).get(ADAM_RATE, []) if math.isclose(run.lr, ADAM_RATE)), None
    )
    adam_low, low = (best_at(fair, model, name, ADAM_RATE) for name in (REFERENCE, method))
    adam_equal, equal = (best_at(fair, model, name, CANDIDATE_RATE) for name in (REFERENCE, method))
    adam_best, best = (
        lowest(run for runs in tried(fair, model, name).values() for run in runs) for name in (REFERENCE, method)
    )
    selected = {  # runs that are the best of several matrix rates
        "as_paper": (equal,),
        "rates": (adam_equal,),
        "optimizer": (adam_equal, equal),
        "optimizer_low": (adam_low, low),
        "at_own_best": (adam_best, best),
        "within": (low, best),
    }
    return Gains(
        as_paper=gain(both, equal),
        rates=gain(both, adam_equal),
        optimizer=gain(adam_equal, equal),
        optimizer_low=gain(adam_low, low),
        at_own_best=gain(adam_best, best),
        within=gain(low, best),
        ends=frozenset(name for name, runs in selected.items() if any(at_end(fair, model, run) for run in runs)),
    )


def settled(fair: Fair, model: str, method: str) -> bool:
    """Whether all runs of the method and of Adam that its gains are made of have ended."""
    return all(
        fair.grid(model, name).finished and fair.complete("fair_control", model, name) for name in (REFERENCE, method)
    )


def growing(fair: Fair) -> list[str]:
    """The sweeps that may ask for more: stage 1, also with the other beta_2, by its grids, and the control."""
    grids = {(each.sweep, each.model, each.name) for each in fair.asked() if each.sweep.startswith("fair_rates")}
    found = {sweep for sweep, *_ in grids - set(fair.plans.finished)}
    if not all(each.folder in fair.ended for each in fair.asked("fair_control")):
        found.add("fair_control")
    return [sweep for sweep in fair.sweeps if sweep in found]


def gain(before: Run | None, after: Run | None) -> float | None:
    """Final loss of one run less that of another; None if one is missing or diverged."""
    if before is None or after is None or not (math.isfinite(before.perplexity) and math.isfinite(after.perplexity)):
        return None
    return math.log(before.perplexity) - math.log(after.perplexity)


def batch_runs(fair: Fair, model: str, method: str, tokens: str) -> tuple[list[Run], int]:
    """Runs of a method at a batch size ("2k", "16k", "64k"), and how many were asked for: one for each matrix rate."""
    names = [name for name in fair.names("fair_batch") if name.startswith(f"{method}_{tokens}")]
    runs = [run for name in names for run in fair.runs("fair_batch", model, name)]
    return runs, sum(len(fair.asked("fair_batch", model, name)) for name in names)


def unchanged(fair: Fair, model: str, method: str) -> Run | None:
    """The run of one seed that a variant is held against: the method's best pair once more, by the code of the variants.

    Until that (fair_again) has ended, stage 1's, some of which are older.
    """
    return next(iter(fair.runs("fair_again", model, method)), fair.grid(model, method).best)


def untuned_changes(
    fair: Fair, model: str, sweep: str = "fair_adam"
) -> list[tuple[Asked, Run | None, Run | None, float | None]]:
    """Variants of one seed: the run without the change, the variant's, and how much higher its loss is."""
    found = []
    for asked in fair.asked(sweep, model):
        before, run = unchanged(fair, model, asked.optimizer), fair.ended.get(asked.folder)
        found.append((asked, before, run, gain(run, before)))
    return found


def by_interval(fair: Fair, model: str) -> dict[str, dict[int, Run | None]]:
    """Runs of fair_constants by method or variant, then by steps between refreshes; None: asked for, not ended.

    A method's first is :func:`unchanged`.
    """
    found: dict[str, dict[int, Run | None]] = {}
    for asked in fair.asked("fair_constants", model):
        name, _, steps = asked.name.rpartition("_k")
        if not name:
            continue  # a variant of another constant
        runs = found.setdefault(name, {})
        before = unchanged(fair, model, name)
        if not runs and before is not None and (first := before.setting("optimizer.update_interval")):
            runs[int(first)] = before
        runs[int(steps)] = fair.ended.get(asked.folder)
    return {name: dict(sorted(runs.items())) for name, runs in found.items()}


def owed(fair: Fair) -> list[tuple[str, str]]:
    """Model and method where a variant has gained so much that the rules ask for a grid: those of `again` that are open."""
    gained = [
        (model, asked.optimizer)
        for model in fair.models
        for asked, _, _, change in untuned_changes(fair, model)
        if change is not None and change < -OWED
    ]
    grids = again(fair)
    return [(model, method) for model, method in dict.fromkeys(gained) if not grids.grid(model, method).finished]


def by_length(fair: Fair, model: str, method: str) -> dict[int, Run]:
    """One run for each number of steps at 2k tokens a step, at the method's best pair of stage 1.

    Of the longest runs, which have two matrix rates, the better.
    """
    best = fair.grid(model, method).best
    if best is None:
        return {}
    sweeps = (("fair_batch", f"{method}_2k"), ("fair_best", method))
    runs = [best, *(run for sweep, name in sweeps for run in fair.runs(sweep, model, name)[:1])]
    longest, asked = long_runs(fair, model, method)
    if len(longest) == asked and (better := lowest(longest)):
        runs.append(better)
    return {int(run.setting("trainer.steps", 0)): run for run in runs}


def long_runs(fair: Fair, model: str, method: str) -> tuple[list[Run], int]:
    """The longest runs of a method, and how many were asked for: one for each matrix rate."""
    folders = [asked.folder for asked in fair.asked("fair_long", model) if asked.optimizer == method]
    return [fair.ended[folder] for folder in folders if folder in fair.ended], len(folders)
