"""The numbers of the fair comparison (docs/fair_comparison.md), from its run records; page.py writes them down.

fair = load_fair(Path("results/runs"), plans)            plans: what was asked for, from scripts/fair_report.py
fair.grid("llama_tiny", "alice").best                    the best run of stage 1
methods(fair, "llama_tiny")                              stage 2, best first, with the rule of significance
methods(again(fair), "llama_tiny")                       the same with beta_2 = 0.95 in every Adam
ablations(fair, "llama_tiny")                            Alice's variants against plain Alice

Losses are final validation losses in nats. Whatever has not run is None or empty. gains.py has what the optimizer gains
and what the rates gain, of single seeds.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from .. import units
from ..curves import first_evaluation, shared_curve
from ..records import Run, find_runs, load_run, lookup
from ..sides import is_number, settings
from ..statistics import Pair, Paired, Welch, against_reference, deviation, final_losses, mean, paired, welch

REFERENCE = "adam"  # of the tables of methods
PLAIN = "alice"  # of the ablations
ELSEWHERE = "compare"  # records of the same methods on the embedded text (make compare)
OWED = 0.02  # nats: a variant of fair_adam that gains more gets a grid of its own, by the rules
FLAT = 1.05  # a matrix rate is near the best if its perplexity is at most 5 % higher
AGAIN = "_b95"  # ends the names of the plans of stages 1 and 2 with beta_2 = 0.95 in every Adam
EQUAL_SHARE = (
    1.2  # runs shared the machine equally if no method's slowest seed took longer than so many times its fastest
)


@dataclass(frozen=True)
class Asked:
    """A run that a plan asks for: its folder below the records, as in fair_best/llama_tiny/adam-s43."""

    sweep: str
    folder: str
    model: str
    name: str  # of the method or the variant
    optimizer: str
    seed: int


@dataclass(frozen=True)
class Plans:
    """What the plans ask for, as far as the records tell them by now.

    Attributes:
        asked: the runs of all sweeps, in the order of their plans.
        published: the methods of stage 1, each with its published matrix rate.
        finished: the grids of rates that have ended, by sweep, model and method, and whether the best pair is interior.
        commands: the command of each sweep that has ended.
        at_once: how many of its runs shared the machine.
    """

    asked: Sequence[Asked]
    published: Mapping[str, float]
    finished: Mapping[tuple[str, str, str], bool] = field(default_factory=dict)
    commands: Mapping[str, str] = field(default_factory=dict)
    at_once: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Grid:
    """The runs of one method in stage 1, those that have ended."""

    runs: list[Run]
    asked: int
    finished: bool
    interior: bool

    @property
    def best(self) -> Run | None:
        found = lowest(self.runs)
        return found if found is not None and math.isfinite(found.perplexity) else None

    def at(self, lr: float, adam_lr: float) -> Run | None:
        return next((run for run in self.runs if math.isclose(run.lr, lr) and math.isclose(run.adam_lr, adam_lr)), None)

    def profile(self) -> dict[float, float]:
        """The lowest perplexity at each matrix rate, over the rates of the Adam group."""
        rates = sorted({run.lr for run in self.runs})
        return {lr: min(run.perplexity for run in self.runs if run.lr == lr) for lr in rates}

    def flat(self) -> tuple[float, float, bool] | None:
        """The smallest and the largest matrix rate around the best that are near it, and whether all tried ones are."""
        best, profile = self.best, self.profile()
        if best is None:
            return None
        rates = list(profile)
        low = high = rates.index(best.lr)
        while low > 0 and profile[rates[low - 1]] <= FLAT * best.perplexity:
            low -= 1
        while high < len(rates) - 1 and profile[rates[high + 1]] <= FLAT * best.perplexity:
            high += 1
        return rates[low], rates[high], low == 0 or high == len(rates) - 1


@dataclass(frozen=True)
class Ngrams:
    """Perplexities of n-gram models on the validation rows of the runs (data/ngrams.py).

    Attributes:
        tokens: of training text that they were counted on, the first ones; None: all.
        targets: validation tokens that they predicted.
        path: the record.
    """

    tokens: int | None
    targets: int
    unigram: float
    bigram: float
    path: Path


class Fair:
    """The records of the comparison, by what was asked for.

    Args:
        runs: by their folder below the records, as `Asked` has it; those that have not ended are left out.
        ngrams: n-gram models by the proxy whose tokenizer and rows they have.
        elsewhere: runs of another task, to set beside these; not part of the comparison.
    """

    def __init__(
        self,
        plans: Plans,
        runs: Mapping[str, Run],
        ngrams: Mapping[str, Sequence[Ngrams]] | None = None,
        elsewhere: Sequence[Run] = (),
    ) -> None:
        self.plans = plans
        self.ended = {folder: run for folder, run in runs.items() if not math.isnan(run.perplexity)}
        self.ngrams = dict(ngrams or {})
        self.elsewhere = [run for run in elsewhere if not math.isnan(run.perplexity)]

    @cached_property
    def models(self) -> list[str]:
        return list(dict.fromkeys(asked.model for asked in self.plans.asked))

    @cached_property
    def sweeps(self) -> list[str]:
        return list(dict.fromkeys(asked.sweep for asked in self.plans.asked))

    def names(self, sweep: str) -> list[str]:
        """Methods or variants of a sweep."""
        return list(dict.fromkeys(asked.name for asked in self.plans.asked if asked.sweep == sweep))

    def asked(self, sweep: str | None = None, model: str | None = None, name: str | None = None) -> list[Asked]:
        wanted = {"sweep": sweep, "model": model, "name": name}
        return [
            asked
            for asked in self.plans.asked
            if all(value is None or getattr(asked, key) == value for key, value in wanted.items())
        ]

    def runs(self, sweep: str | None = None, model: str | None = None, name: str | None = None) -> list[Run]:
        """Those that have ended, diverged ones among them, in the order of the plan."""
        return [self.ended[a.folder] for a in self.asked(sweep, model, name) if a.folder in self.ended]

    def complete(self, sweep: str, model: str | None = None, name: str | None = None) -> bool:
        asked = self.asked(sweep, model, name)
        return bool(asked) and all(each.folder in self.ended for each in asked)

    def grid(self, model: str, method: str) -> Grid:
        key = ("fair_rates", model, method)
        return Grid(
            self.runs("fair_rates", model, method),
            len(self.asked("fair_rates", model, method)),
            key in self.plans.finished,
            self.plans.finished.get(key, False),
        )


def again(fair: Fair) -> Fair:
    """Stages 1 and 2 with beta_2 = 0.95, in the place of the first ones: whatever reads those reads these."""
    plans = Plans(
        asked=[
            replace(asked, sweep=asked.sweep.removesuffix(AGAIN))
            for asked in fair.plans.asked
            if asked.sweep.endswith(AGAIN)
        ],
        published=fair.plans.published,
        finished={
            (sweep.removesuffix(AGAIN), model, method): interior
            for (sweep, model, method), interior in fair.plans.finished.items()
            if sweep.endswith(AGAIN)
        },
    )
    folders = [asked.folder for asked in plans.asked]
    return Fair(plans, {folder: fair.ended[folder] for folder in folders if folder in fair.ended}, fair.ngrams)


def load_fair(root: Path, plans: Plans) -> Fair:
    """The comparison from the records below `root`.

    Raises:
        ValueError: a malformed record.
    """
    folders = [asked.folder for asked in plans.asked if (root / asked.folder / "config.yaml").is_file()]
    ngrams = {file.stem: _ngrams(file) for file in sorted((root / "fair_ngrams").glob("*.json"))}
    other = find_runs(root / ELSEWHERE) if (root / ELSEWHERE).is_dir() else []
    return Fair(plans, {folder: load_run(root / folder) for folder in folders}, ngrams, other)


def _ngrams(file: Path) -> list[Ngrams]:
    """A record of scripts/ngrams.py."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        targets = int(record["validation_tokens"])
        return [
            Ngrams(case["tokens"], targets, float(case["unigram"]), float(case["bigram"]), file)
            for case in record["cases"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no record of scripts/ngrams.py: restore it.") from error


def lowest(runs: Iterable[Run]) -> Run | None:
    """The run with the lowest perplexity, the first of several; None without runs."""
    return min(runs, key=lambda run: run.perplexity, default=None)


# Stage 2 ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A method in stage 2, or a variant of the ablations.

    Attributes:
        runs: one for each seed that has ended.
        asked: seeds that the plan asks for.
        pair: against the reference, by the rule; None for the reference itself.
        settled: all seeds of it and of the reference have ended: only then is a difference claimed.
        waiting: seeds of others in its family have not: where none is claimed, one may still be when they have.
        first: the first step whose mean perplexity is at or under the reference's final mean, over the seeds that both
            have; None if it never is, or the reference has not run.
        steps: of a whole run.
        paired: its losses against the reference's with the same seeds; None for the reference itself.
    """

    name: str
    runs: list[Run]
    asked: int
    pair: Pair | None = None
    settled: bool = False
    waiting: bool = False
    first: int | None = None
    steps: int | None = None
    paired: Paired | None = None

    @property
    def perplexity(self) -> float | None:
        """Mean over seeds; infinite where one diverged."""
        return mean([run.perplexity for run in self.runs])

    @property
    def spread(self) -> float | None:
        return deviation([run.perplexity for run in self.runs])

    @property
    def diverged(self) -> int:
        return sum(math.isinf(run.perplexity) for run in self.runs)

    @property
    def claim(self) -> str | None:
        """ "better", "worse" or None, by the rule, and only when all seeds have ended."""
        return self.pair.verdict if self.pair and self.settled else None

    @property
    def speedup(self) -> float | None:
        """The paper's: steps of a whole run over `first`."""
        return self.steps / self.first if self.first and self.steps else None


def methods(fair: Fair, model: str) -> list[Row]:
    """Stage 2 on one proxy, best mean perplexity first; what has not run comes last, in the order of the plan."""
    return _rows(fair, "fair_best", model, fair.names("fair_best"), REFERENCE)


def ablations(fair: Fair, model: str) -> list[Row]:
    """Plain Alice and its variants on one proxy, in the order of the plan; plain Alice is the reference."""
    names = dict.fromkeys(a.name for a in fair.asked("fair_ablations", model) if a.optimizer == PLAIN)
    return _rows(fair, "fair_ablations", model, list(names), PLAIN, ordered=False)


def _rows(fair: Fair, sweep: str, model: str, names: list[str], reference: str, ordered: bool = True) -> list[Row]:
    runs = {name: fair.runs(sweep, model, name) for name in names}
    losses = {name: final_losses(each) for name, each in runs.items()}
    there = {name: fair.complete(sweep, model, name) for name in names}
    # A method that has not run stays in the family: it makes no other claim easier. Nor does one with missing seeds, whose
    # p may yet grow: for those that have all of theirs it counts as 1.
    theirs = losses.pop(reference, [])
    pairs = against_reference(theirs, losses)
    whole = against_reference(theirs, {name: each if there[name] else [] for name, each in losses.items()})
    pairs |= {name: pair for name, pair in whole.items() if there[name] and there.get(reference, False)}
    rows = []
    for name in names:
        total = lookup(runs[name][0].config, "trainer.steps") if runs[name] else None
        # The reference's final mean over the seeds that are there of both: seeds differ more than methods.
        seeds = {run.seed for run in runs[name]} & {run.seed for run in runs.get(reference, [])}
        target = mean([run.perplexity for run in runs.get(reference, []) if run.seed in seeds])
        common = [run for run in runs[name] if run.seed in seeds]
        first = None if target is None or math.isinf(target) else _first(common, target)
        settled = there[name] and there.get(reference, False)
        asked = len(fair.asked(sweep, model, name))
        pair = paired(by_seed(runs.get(reference, [])), by_seed(runs[name])) if name != reference else None
        waiting = not all(there.values())
        rows.append(Row(name, runs[name], asked, pairs.get(name), settled, waiting, first, total, pair))
    return sorted(rows, key=lambda row: math.inf if row.perplexity is None else row.perplexity) if ordered else rows


def by_seed(runs: Sequence[Run]) -> dict[int, float]:
    """Final losses."""
    return {run.seed: math.log(run.perplexity) for run in runs if run.seed is not None}


def _first(runs: Sequence[Run], target: float) -> int | None:
    if not runs or any(math.isinf(run.perplexity) for run in runs):
        return None
    steps, values = shared_curve(runs)
    after = steps > 0
    # Up to rounding: the reference reaches its own final mean.
    return first_evaluation(steps[after], values.mean(axis=0)[after], target * (1 + 1e-12), every=1)


def against_plain(fair: Fair, model: str) -> list[Row]:
    """Stage 2 held against plain Alice instead of Adam: a second family of tests, by the same rule."""
    return _rows(fair, "fair_best", model, fair.names("fair_best"), PLAIN)


def out_of_domain(runs: Sequence[Run]) -> list[float]:
    """Perplexities on C4's validation text, of the runs that have been evaluated on it."""
    found = (lookup(_evaluations(run), "c4.perplexity") for run in runs)
    return [float(value) for value in found if is_number(value)]


def unseen(runs: Sequence[Run]) -> list[float]:
    """Perplexities on validation rows by which nothing was chosen, of the runs that have been evaluated on them.

    "fresh" is the mean loss of all validation rows, those on which rates were selected first: they are taken out.
    """
    found = []
    for run in runs:
        evaluated, used = _evaluations(run), lookup(run.summary, "validation_tokens")
        loss, tokens = (lookup(evaluated, f"fresh.{name}") for name in ("loss", "tokens"))
        if is_number(loss) and is_number(tokens) and is_number(used) and tokens > used and not run.diverged:
            found.append(math.exp((loss * tokens - math.log(run.perplexity) * used) / (tokens - used)))
    return found


def _evaluations(run: Run) -> Mapping[str, object]:
    """What a finished run was evaluated on afterwards, by name; {} if there is nothing."""
    file = run.path / "evaluations.json"
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: restore it.") from error


def wall_clock(rows: Sequence[Row]) -> tuple[dict[str, float], str]:
    """Speed-up over the reference in seconds of training, by method, or nothing and why it cannot be said."""
    ended = [run for row in rows for run in row.runs if run.summary]
    reference = next((row for row in rows if row.name == REFERENCE), None)
    if reference is None or not reference.runs or len(rows) < 2:
        return {}, "stage 2 has not run"
    if len({json.dumps(run.environment.get("hardware"), sort_keys=True) for run in ended}) > 1:
        return {}, "the runs are from different hardware"
    seconds = {row.name: [_seconds(run) for run in row.runs] for row in rows if row.runs and not row.diverged}
    if any(not all(values) for values in seconds.values()):
        return {}, "not every run has recorded its time"
    if any(len(values) < 2 for values in seconds.values()):
        return {}, "a method has one seed so far, which cannot show whether the runs shared the machine equally"
    shares = {name: max(values) / min(values) for name, values in seconds.items()}
    worst = max(shares, key=lambda name: shares[name], default=None)
    if worst is not None and shares[worst] > EQUAL_SHARE:
        why = f"equal runs took up to {shares[worst]:.1f} times as long as each other ({units.optimizer_name(worst)})"
        return {}, f"{why}, so they did not share the machine equally"
    if REFERENCE not in seconds:
        return {}, "Adam diverged"
    means = {name: statistics.fmean(values) for name, values in seconds.items()}
    found = {row.name: means[REFERENCE] / means[row.name] * row.speedup for row in rows if row.speedup}
    return found, ""


def _seconds(run: Run) -> float:
    value = lookup(run.summary, "training_seconds", lookup(run.summary, "wall_seconds"))
    return float(value) if is_number(value) else 0.0


def missed(fair: Fair) -> float:
    """The most, in nats, that a parabola over log matrix rate through a best rate and its neighbours lies below the best."""
    found = [0.0]
    for model in fair.models:
        for method in fair.plans.published:
            grid = fair.grid(model, method)
            profile = {lr: value for lr, value in grid.profile().items() if math.isfinite(value)}
            rates = list(profile)
            place = rates.index(grid.best.lr) if grid.best else 0
            if 0 < place < len(rates) - 1:
                around = rates[place - 1 : place + 2]
                x = np.log([lr / rates[place] for lr in around])
                y = np.log([profile[lr] / profile[rates[place]] for lr in around])
                a, b, c = np.polyfit(x, y, 2)
                found.append(float(b * b / (4 * a) - c) if a > 0 else 0.0)
    return max(found)


# Steps of the paper's ablations, repetitions ----------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """From one variant to another, as the paper's figure shows it: where, and its names there in tables.json's fig5.

    The paper's Alice trains the last layer by itself in Figures 5a to 5c, ours by Adam; in 5d "lm head" means by Adam.
    """

    figure: str
    panel: str
    before: str
    after: str
    paper_before: str
    paper_after: str


_A, _B, _C, _D = "a_tracking_no_compensation", "b_switching", "c_compensation", "d_last_layer"
STEPS = (
    Step("5a", _A, "nothing", "tracking", "no switch no tracking", "no switch tracking"),
    Step("5a", _A, "nothing", "switch", "no switch no tracking", "switch no tracking"),
    Step("5a", _A, "tracking", "tracking_switch", "no switch tracking", "switch tracking"),
    Step("5a", _A, "switch", "tracking_switch", "switch no tracking", "switch tracking"),
    Step("5b", _B, "tracking_switch", "full_basis", "complement basis (ours)", "full basis"),
    Step("5b", _B, "tracking_switch", "gaussian_mix", "complement basis (ours)", "gaussian mix"),
    Step("5b", _B, "tracking_switch", "gaussian", "complement basis (ours)", "gaussian"),
    Step("5c", _C, "tracking_switch", "alice", "no compensation", "ours"),
    Step("5c", _C, "tracking_switch", "fira_compensation", "no compensation", "fira"),
    Step("5c", _C, "tracking_switch", "fira_plus_compensation", "no compensation", "fira+"),
    Step("5c", _C, "alice", "fira_compensation", "ours", "fira"),
    Step("5c", _C, "alice", "fira_plus_compensation", "ours", "fira+"),
    Step("5d", _D, "alice", "alice_last_layer", "alice+lm head", "alice"),
    Step("5d", _D, "galore", "galore_last_layer", "GaLore + lm head", "GaLore"),
    Step("5e", "e_racs_ema", "racs", "racs_no_ema", "RACS", "RACS w.o. EMA"),
)


def step_test(fair: Fair, model: str, step: Step) -> Welch:
    """The difference of mean losses that the step makes, with its interval; its p is not corrected for other steps."""
    before, after = (final_losses(fair.runs("fair_ablations", model, name)) for name in (step.before, step.after))
    return welch(before, after)


def repeats(fair: Fair, model: str) -> list[tuple[Run, Run]]:
    """Runs of fair_repeat and fair_again, each with an earlier one of the same configuration and seed.

    A setting that only one of them has came with a newer version, as its default.
    """
    earlier = [*fair.runs("fair_rates", model), *fair.runs("fair_ablations", model)]
    found: list[tuple[Run, Run]] = []
    for run in (*fair.runs("fair_repeat", model), *fair.runs("fair_again", model)):
        mine = settings(run)
        alike = (
            each
            for each in earlier
            if each.seed == run.seed and all(mine[key] == x for key, x in settings(each).items() if key in mine)
        )
        twin = next(alike, None)
        # Once, where both plans have repeated it by the same code: that gave the same number.
        known = any(first is twin and _outcome(second) == _outcome(run) for first, second in found)
        if twin is not None and not known:
            found.append((twin, run))
    return found


def _outcome(run: Run) -> tuple[object, ...]:
    return run.perplexity, run.environment.get("commit"), run.environment.get("uncommitted_changes")
