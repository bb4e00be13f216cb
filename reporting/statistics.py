"""Means, spreads and the rule of significance: when a difference between methods may be claimed.

test = welch([4.41, 4.43, 4.40], [4.26, 4.27, 4.26])
test.difference, test.interval, test.p      -0.15, its confidence interval, Welch's two-sided p
family = against_reference(losses_of_adam, {"alice": losses_of_alice, "racs": losses_of_racs})
family["alice"].verdict                     "better", "worse" or None

The numbers compared are final validation losses, the logarithms of perplexities, one for each seed. A run that diverged has
an infinite loss. Whatever cannot be tested has no p (None, never NaN), a sentence that says why, and no claim.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from .records import Run

ALPHA = 0.05
ONE_SIDE = "one of them has no run that has ended"
# Fixed before the runs of the fair comparison; `against_reference` and `in_general` do what it says.
RULE = (
    "Method A is better than B on a proxy if the difference of mean final validation losses has Welch's two-sided p < 0.05 "
    "after Holm's correction over all pairs with the reference in that table; otherwise no difference is claimed; a "
    "statement about optimizers in general needs it on both proxies, in the same direction."
)

Verdict = Literal["better", "worse"]


def mean(values: Sequence[float]) -> float | None:
    """The mean; infinite where a run diverged, None without values."""
    return statistics.fmean(values) if values else None


def deviation(values: Sequence[float]) -> float | None:
    """The standard deviation over n - 1; None for fewer than two values, or where a run diverged."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    return statistics.stdev(values)  # exact sums: equal values give 0, not a remainder of rounding


def final_losses(runs: Iterable[Run]) -> list[float]:
    """Final validation losses of runs of one configuration, one value for each seed, in the order of the seeds.

    Runs that have not ended are left out, diverged ones are infinite. Runs with the same seed are repeats of one draw and
    count once, by their mean.

    Raises:
        ValueError: a record's perplexity is 0 or negative.
    """
    seeds: dict[int, list[float]] = {}
    for run in runs:
        if math.isnan(run.perplexity):
            continue
        if run.perplexity <= 0:
            raise ValueError(f"{run.path}/summary.json has a perplexity of {run.perplexity:g}: restore the file.")
        seeds.setdefault(run.seed or 0, []).append(math.log(run.perplexity))
    return [statistics.fmean(seeds[seed]) for seed in sorted(seeds)]


@dataclass(frozen=True)
class Welch:
    """Welch's test of two samples with unequal variances.

    Attributes:
        difference: mean of the second sample less that of the first; None if a sample is empty or not finite.
        p: two-sided; None if the test does not apply, and then `why` says why.
        interval: confidence interval of the difference at the level that was asked for.
        freedom: Welch and Satterthwaite's degrees of freedom.
        why: "" if there is a p.
    """

    difference: float | None
    p: float | None = None
    interval: tuple[float, float] | None = None
    freedom: float | None = None
    why: str = ""


def welch(first: Sequence[float], second: Sequence[float], level: float = 1 - ALPHA) -> Welch:
    """Is the mean of `second` another one than that of `first`?

    t = (mean_2 - mean_1) / sqrt(s_1^2/n_1 + s_2^2/n_2), with the degrees of freedom of B. L. Welch, Biometrika 34 (1947).

    Args:
        level: of the confidence interval, between 0 and 1.
    """
    if not first or not second:
        return Welch(None, why=ONE_SIDE if first or second else "no run has ended")
    diverged = [sum(not math.isfinite(x) for x in values) for values in (first, second)]
    if any(diverged):
        whose = (" of the reference", "")
        counts = [f"{bad} of {len(x)}{of}" for bad, x, of in zip(diverged, (first, second), whose, strict=True) if bad]
        return Welch(None, why=f"{' and '.join(counts)} diverged: no test")
    difference = statistics.fmean(second) - statistics.fmean(first)
    if min(len(first), len(second)) < 2:
        return Welch(difference, why="one seed: no spread known")
    error_1, error_2 = (statistics.stdev(x) / math.sqrt(len(x)) for x in (first, second))
    error = math.hypot(error_1, error_2)
    if error == 0:
        return Welch(difference, why="no spread at all: the test does not apply")

    from scipy.special import stdtr, stdtrit  # Student's distribution and its inverse

    share = (error_1 / error) ** 2  # of the first sample in the variance of the difference
    freedom = 1 / (share**2 / (len(first) - 1) + (1 - share) ** 2 / (len(second) - 1))
    p = min(1.0, 2 * float(stdtr(freedom, -abs(difference) / error)))
    reach = error * float(stdtrit(freedom, (1 + level) / 2))
    return Welch(difference, p, (difference - reach, difference + reach), freedom)


@dataclass(frozen=True)
class Paired:
    """Differences between runs with the same seed: a description, beside the rule, of which no claim is made.

    Attributes:
        lower: in how many seeds the loss is lower than the reference's.
        seeds: those that both have.
        interval: confidence interval of the mean difference by Student's t; None with one seed, no spread, or divergence.
    """

    lower: int
    seeds: int
    interval: tuple[float, float] | None = None


def paired(reference: Mapping[int, float], losses: Mapping[int, float], level: float = 1 - ALPHA) -> Paired:
    """`losses` less `reference`, each by seed, in the seeds that both have."""
    common = [seed for seed in losses if seed in reference]
    lower = sum(losses[seed] < reference[seed] for seed in common)
    if not all(math.isfinite(each[seed]) for seed in common for each in (reference, losses)):
        return Paired(lower, len(common))
    differences = [losses[seed] - reference[seed] for seed in common]
    around = deviation(differences)
    if not around:
        return Paired(lower, len(common))

    from scipy.special import stdtrit

    reach = around / math.sqrt(len(common)) * float(stdtrit(len(common) - 1, (1 + level) / 2))
    middle = statistics.fmean(differences)
    return Paired(lower, len(common), (middle - reach, middle + reach))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction over a family of tests: p-values that may each be held against the same level.

    A pair without a test keeps None but counts in the family as p = 1, so that a run that diverged makes no other claim
    easier. Source: S. Holm, Scandinavian Journal of Statistics 6 (1979).
    """
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    # The smallest of m is multiplied by m, the next by m - 1, ...; none may fall below the one before it.
    steps = accumulate((min(1.0, (len(p_values) - k) * p) for k, (p, _) in enumerate(order)), max)
    corrected: list[float | None] = [None] * len(p_values)
    for (_, i), p in zip(order, steps, strict=True):
        corrected[i] = p
    return corrected


@dataclass(frozen=True)
class Pair:
    """A method against the reference, by the rule."""

    test: Welch  # difference: the method's mean loss less the reference's
    p: float | None  # after Holm's correction over the family
    verdict: Verdict | None  # None: no difference is claimed


def against_reference(reference: Sequence[float], methods: Mapping[str, Sequence[float]]) -> dict[str, Pair]:
    """The rule on one proxy: each method's final losses against the reference's; the methods are the family."""
    tests = {name: welch(reference, losses) for name, losses in methods.items()}
    corrected = holm([test.p for test in tests.values()])
    return {name: Pair(test, p, _verdict(test, p)) for (name, test), p in zip(tests.items(), corrected, strict=True)}


def _verdict(test: Welch, p: float | None) -> Verdict | None:
    if p is None or test.difference is None or p >= ALPHA:
        return None
    return "better" if test.difference < 0 else "worse"


def in_general(verdicts: Sequence[Verdict | None]) -> Verdict | None:
    """The rule over proxies: what all of them say, of which there must be two at least; else None."""
    return verdicts[0] if len(verdicts) > 1 and len(set(verdicts)) == 1 else None
