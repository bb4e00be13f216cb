"""Plans of sweeps: a file of configs/sweep/, and the runs that it asks for given what is known already.

A plan is one of three kinds. A *grid* gives each optimizer matrix rates and rates of the Adam group:

    experiment: fair
    models: [llama_tiny, llama_tiny_4k]   # default: the experiment's model
    seeds: [42]
    adam_lr: [0.006, 0.02, 0.06]
    lr: {adam: [0.0003, 0.001, 0.003], alice: [0.006, 0.02, 0.06]}
    extend: 6                             # up to so many further rates on each side, until the best pair is interior,
    near: 0.03                            # and every pair whose perplexity is at most so much (3 %) above the best
    more_seeds: [43, 44]                  # of the best pair alone
    settings: [trainer.log_every=20]      # of every run, for train.py
    settings_of: {alice: [optimizer.update_interval=12]}

*Variants* take their optimizer's best rates from the records of another plan:

    rates_from: fair_rates
    seeds: [43, 44, 45]
    variants: {adam: , alice: , no_tracking: {optimizer: alice, settings: [optimizer.tracking=false]}}

with the keys ``optimizer`` (default: the variant's name), ``rates`` (of which optimizer; default: its own), ``lr_factor``,
``adam_lr`` and ``settings``. Both kinds may ``evaluate`` each run on other text: names, with arguments of eval.py.

A *search* lets Optuna choose (search.py); each optimizer has its own, of equally many runs:

    seeds: [42]                           # one
    search:
      trials: 30                          # of each optimizer
      span: 10                            # a number v below stands for the range v / 10 to 10 v
      seed: 0                             # of the sampler
      prune: median                       # runs that look bad: median | halving | none
      prune_from: 1000                    # not before this step; or of each model, {llama_60m: 2000, llama_130m: 4000}
      ranges: {adam: {lr: 0.001}, alice: {lr: 0.02, scale: 0.3, adam_lr: [0.0005, 0.05]}}

Names without a dot are the optimizer's. All ranges are logarithmic; the first run is at the middle of each. Any plan may have
``slurm``: options of the jobs, for ``--executor slurm`` (cluster.py).

What comes next may depend on results (a grid grows until its best pair is interior), so a plan is asked again after
every run: ``plan.jobs(results)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import yaml

KEYS = {
    "experiment", "models", "seeds", "adam_lr", "lr", "extend", "near", "more_seeds", "settings", "settings_of",
    "rates_from", "variants", "evaluate", "report", "seconds", "search", "slurm",
}  # fmt: skip
SEARCH_KEYS = {"trials", "span", "seed", "prune", "prune_from", "ranges"}
PRUNERS = ("median", "halving", "none")
VARIANT_KEYS = {"optimizer", "rates", "lr_factor", "adam_lr", "settings"}

Results = Mapping[str, float]  # final perplexity of the jobs that have ended, by name; infinite if diverged


@dataclass(frozen=True)
class Job:
    """One training run: ``name`` is its folder below the sweep's, ``overrides`` the arguments of train.py.

    A rate that is NaN is the recipe's.
    """

    name: str
    optimizer: str
    lr: float
    adam_lr: float
    seed: int
    overrides: tuple[str, ...] = ()
    model: str | None = None

    def arguments(self) -> list[str]:
        """For train.py, but ``run_dir``."""
        model = [f"model={self.model}"] if self.model else []
        given = {"lr": self.lr, "adam_lr": self.adam_lr}
        rates = [f"optimizer.{key}={rate:g}" for key, rate in given.items() if not math.isnan(rate)]
        return [*model, f"optimizer={self.optimizer}", *rates, f"seed={self.seed}", *self.overrides]


@dataclass(frozen=True)
class Search:
    """What Optuna searches: ``ranges`` by optimizer and dotted setting, (lowest, highest), on a log scale.

    ``prune_from`` is a step, or one for each model.
    """

    trials: int
    ranges: Mapping[str, Mapping[str, tuple[float, float]]]
    seed: int = 0
    prune: str = "none"
    prune_from: int | Mapping[str, int] = 0


@dataclass(frozen=True)
class Plan:
    """A sweep. Attributes are the keys of its file; ``rates`` are those of ``rates_from``, by model and optimizer."""

    name: str
    experiment: str | None
    models: tuple[str | None, ...] = (None,)
    seeds: tuple[int, ...] = (42,)
    adam_lr: tuple[float, ...] | Mapping[str, tuple[float, ...]] = ()
    lr: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    extend: int = 0
    near: float = 0.0
    more_seeds: tuple[int, ...] = ()
    settings: tuple[str, ...] = ()
    settings_of: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rates_from: str | None = None
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rates: Mapping[tuple[str | None, str], tuple[float, float]] = field(default_factory=dict)
    evaluate: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    report: str | None = None
    seconds: float = 120.0
    search: Search | None = None
    slurm: Mapping[str, Any] = field(default_factory=dict)

    @property
    def optimizers(self) -> list[str]:
        return list(self.search.ranges if self.search else self.lr or self.variants)

    def jobs(self, results: Results) -> list[Job]:
        """Every run that the plan asks for, in the order of wanting them, given the results so far.

        Of a search, none: Optuna knows them.
        """
        if self.variants:
            return list(self._variants())
        return [job for model, name in product(self.models, self.lr) for job in self._grid(model, name, results)]

    def best(self, model: str | None, optimizer: str, results: Results) -> tuple[float, float] | None:
        """The best pair of rates of a finished grid; None while runs of it are missing, or if all have diverged.

        A pair counts with its mean over ``seeds``: further seeds of the best must not change which is the best.
        """
        jobs = [job for job in self._grid(model, optimizer, results) if job.seed in self.seeds]
        if not jobs or any(job.name not in results for job in jobs):
            return None
        pair = _best(jobs, results)
        return None if math.isinf(_mean(jobs, pair, results)) else pair

    def interior(self, model: str | None, optimizer: str, results: Results) -> bool:
        """Whether the best pair of the finished grid has neighbours on all four sides, all of them worse."""
        jobs = [job for job in self._grid(model, optimizer, results) if job.seed in self.seeds]
        lr, adam_lr = _best(jobs, results)
        there = {(job.lr, job.adam_lr) for job in jobs}
        return all(
            any(
                pair[side] * sign > (lr, adam_lr)[side] * sign and pair[1 - side] == (lr, adam_lr)[1 - side]
                for pair in there
            )
            for side, sign in product((0, 1), (1, -1))
        )

    def _grid(self, model: str | None, optimizer: str, results: Results) -> Iterator[Job]:
        def at(lr: float, adam_lr: float, seed: int) -> Job:
            name = f"{optimizer}-lr{lr:g}-adam{adam_lr:g}-s{seed}"
            settings = (*self.settings, *self.settings_of.get(optimizer, ()))
            return Job(f"{model}/{name}" if model else name, optimizer, lr, adam_lr, seed, settings, model)

        adam_rates = self.adam_lr[optimizer] if isinstance(self.adam_lr, Mapping) else self.adam_lr
        pairs = list(product(self.lr[optimizer], adam_rates))
        ladders = Ladder(self.lr[optimizer], self.extend), Ladder(adam_rates, self.extend)
        jobs = [at(*pair, seed) for seed in self.seeds for pair in pairs]
        yield from jobs
        while all(job.name in results for job in jobs):
            best = _best(jobs, results)
            limit = (1 + self.near) * _mean(jobs, best, results)
            close = [pair for pair in pairs if _mean(jobs, pair, results) <= limit] if self.extend else []
            around = [(rate, adam_lr) for lr, adam_lr in close for rate in ladders[0].neighbours(lr)]
            around += [(lr, rate) for lr, adam_lr in close for rate in ladders[1].neighbours(adam_lr)]
            around = [pair for pair in dict.fromkeys(around) if pair not in pairs]
            if not around or math.isinf(limit):
                yield from (at(*best, seed) for seed in self.more_seeds if seed not in self.seeds)
                return
            pairs += around
            new = [at(*pair, seed) for seed in self.seeds for pair in around]
            jobs += new
            yield from new

    def _variants(self) -> Iterator[Job]:
        # Seeds outermost: when time runs out, each variant has as many seeds as the others.
        for model, seed, (variant, given) in product(self.models, self.seeds, self.variants.items()):
            optimizer = given.get("optimizer", variant)
            rates = self.rates.get((model, given.get("rates", optimizer)))
            if rates is None:
                continue  # the grid of its optimizer is not finished
            lr = float(f"{given.get('lr_factor', 1) * rates[0]:.6g}")
            adam_lr = given.get("adam_lr", rates[1])
            settings = (*self.settings, *self.settings_of.get(optimizer, ()), *given.get("settings", ()))
            name = f"{variant}-s{seed}"
            yield Job(f"{model}/{name}" if model else name, optimizer, lr, float(adam_lr), seed, settings, model)

    def waiting(self) -> list[str]:
        """Variants without rates yet, as model and optimizer."""
        wanted = {
            (model, given.get("rates", given.get("optimizer", variant)))
            for model, (variant, given) in product(self.models, self.variants.items())
        }
        return [" ".join(filter(None, pair)) for pair in sorted(wanted - set(self.rates), key=str)]


@dataclass(frozen=True)
class Ladder:
    """Rates two to a decade, ... 0.002 0.006 0.02 0.06 ..., from the few that a plan gives."""

    given: tuple[float, ...]
    extend: int

    def neighbours(self, rate: float) -> list[float]:
        """The next smaller and the next larger rate, as far as ``extend`` rates beyond the given ones."""
        if not self.extend or len(self.given) == 1:
            return []  # a single rate is meant
        all_rates = self.rates()
        at = all_rates.index(rate)
        return [all_rates[i] for i in (at - 1, at + 1) if 0 <= i < len(all_rates)]

    def rates(self) -> list[float]:
        rates = list(self.given)
        for _ in range(self.extend):
            rates = [float(f"{rates[1] / 10:.6g}"), *rates, float(f"{rates[-2] * 10:.6g}")]
        return rates


def _mean(jobs: list[Job], pair: tuple[float, float], results: Results) -> float:
    values = [results[job.name] for job in jobs if (job.lr, job.adam_lr) == pair]
    return sum(values) / len(values)


def _best(jobs: list[Job], results: Results) -> tuple[float, float]:
    pairs = list(dict.fromkeys((job.lr, job.adam_lr) for job in jobs))
    return min(pairs, key=lambda pair: _mean(jobs, pair, results))


class _Once(yaml.SafeLoader):
    """YAML without keys that are given twice, of which the last would win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(problem=f"{twice} is there twice")
        return super().construct_mapping(node, deep)


def load_plan(path: Path, only: list[str] | None = None) -> Plan:
    """The plan in a file of configs/sweep/; ``only`` leaves out all but the named optimizers or variants.

    Raises:
        ValueError: a key, a rate or a name that a plan cannot have.
    """
    try:
        given = yaml.load(path.read_text(encoding="utf-8"), _Once)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML ({str(error).splitlines()[0]}): correct it.") from error
    if not isinstance(given, dict) or not (given.keys() <= KEYS) or "experiment" not in given:
        wrong = ", ".join(sorted(map(str, set(given) - KEYS))) if isinstance(given, dict) else "no mapping"
        raise ValueError(f"{path} is not a plan ({wrong or 'no experiment'}): its keys are {', '.join(sorted(KEYS))}.")
    if sum(key in given for key in ("lr", "variants", "search")) != 1 or ("lr" in given) != ("adam_lr" in given):
        raise ValueError(f"{path} must have either lr and adam_lr (a grid), or variants and rates_from, or search.")
    if "variants" in given and "rates_from" not in given:
        raise ValueError(f"{path} has variants but no rates_from: name the plan whose best rates they take.")
    for key in ("models", "seeds", "more_seeds", "settings"):
        if not isinstance(given.get(key, []), list):
            raise ValueError(f"{path}: {key} must be a list, not {given[key]!r}: write [{given[key]}].")
    for key in ("lr", "variants", "settings_of", "evaluate", "search", "slurm"):
        if key in given and not (isinstance(given[key], dict) and given[key]):
            raise ValueError(
                f"{path}: {key} must be a mapping of names, not {given[key]!r}: fill it in, or leave it out."
            )
    if "search" in given:
        return _search_plan(given, path, only)
    names = list(given.get("lr") or given["variants"])
    wanted = _wanted(names, only, path)
    values = _common(given)
    if "lr" in given:
        values["lr"] = {name: _rates(given["lr"][name], given.get("extend", 0), path) for name in wanted}
        adam = given["adam_lr"]
        values["adam_lr"] = (
            {name: _rates(adam[name if name in adam else "default"], given.get("extend", 0), path) for name in wanted}
            if isinstance(adam, dict)
            else _rates(adam, given.get("extend", 0), path)
        )
    else:
        values["variants"] = {name: given["variants"][name] or {} for name in wanted}
        odd = {key for variant in values["variants"].values() for key in variant} - VARIANT_KEYS
        if odd:
            raise ValueError(
                f"{path}: a variant has no {', '.join(sorted(odd))}: its keys are {', '.join(sorted(VARIANT_KEYS))}."
            )
    return Plan(name=path.stem, **values)


def _wanted(names: list[str], only: list[str] | None, path: Path) -> list[str]:
    unknown = [name for name in only or [] if name not in names]
    if unknown:
        raise ValueError(f"{path.name} has no {', '.join(unknown)}: choose from {', '.join(names)}.")
    return only or names


def _common(given: Mapping[str, Any]) -> dict[str, Any]:
    """What all kinds of plans share."""
    plain = ("experiment", "extend", "near", "rates_from", "report", "seconds", "slurm")
    values = {key: given[key] for key in plain if key in given}
    values |= {key: tuple(given[key]) for key in ("models", "seeds", "more_seeds", "settings") if key in given}
    for key in ("settings_of", "evaluate"):
        values[key] = {name: tuple(items) for name, items in (given.get(key) or {}).items()}
    return values


def _search_plan(given: Mapping[str, Any], path: Path, only: list[str] | None) -> Plan:
    search = given["search"]
    other = given.keys() & {"extend", "near", "more_seeds", "rates_from", "evaluate"}
    if other:
        raise ValueError(f"{path}: a search has no {', '.join(sorted(other))}: leave it out.")
    if not (search.keys() <= SEARCH_KEYS) or not {"trials", "ranges"} <= search.keys():
        raise ValueError(
            f"{path}: search needs trials and ranges, and may have {', '.join(sorted(SEARCH_KEYS))}, not "
            f"{', '.join(sorted(map(str, search)))}: correct its keys."
        )
    if len(given.get("seeds", [42])) != 1:
        raise ValueError(f"{path}: the runs of a search have one seed, not {given['seeds']}: give one.")
    start = search.get("prune_from", 0)
    if isinstance(start, dict) and (not start or start.keys() != set(given.get("models") or ())):
        raise ValueError(
            f"{path}: prune_from of search must be one number, or name each of models once, not {start!r}."
        )
    counts = [("trials", 1, search["trials"]), ("seed", 0, search.get("seed", 0))]
    counts += [("prune_from", 0, value) for value in (start.values() if isinstance(start, dict) else [start])]
    for key, least, value in counts:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{path}: {key} of search must be a whole number from {least} on, not {value!r}.")
    if search.get("prune", "none") not in PRUNERS:
        raise ValueError(f"{path}: prune must be one of {', '.join(PRUNERS)}, not {search['prune']!r}.")
    ranges = search["ranges"]
    if not isinstance(ranges, dict) or not all(isinstance(keys, dict) and keys for keys in ranges.values()):
        raise ValueError(f"{path}: ranges must name optimizers, and settings of each, as in alice: {{lr: 0.02}}.")
    found = {
        name: {
            key if "." in key else f"optimizer.{key}": _range(value, search.get("span"), f"{path}: {key} of {name}")
            for key, value in ranges[name].items()
        }
        for name in _wanted(list(ranges), only, path)
    }
    chosen = {key: search[key] for key in ("trials", "seed", "prune", "prune_from") if key in search}
    return Plan(name=path.stem, search=Search(ranges=found, **chosen), **_common(given))


def _range(value: Any, span: Any, what: str) -> tuple[float, float]:
    try:
        if isinstance(value, list):
            low, high = map(float, value)
        else:
            low, high = float(value) / float(span), float(value) * float(span)
    except (TypeError, ValueError):
        raise ValueError(
            f"{what} must be [lowest, highest], or a number if search has a span, not {value!r}."
        ) from None
    if not 0 < low < high < math.inf:
        raise ValueError(f"{what} must be a range of positive numbers, the lower one first, not {low:g} to {high:g}.")
    return float(f"{low:.6g}"), float(f"{high:.6g}")


def _rates(values: list[float], extend: int, path: Path) -> tuple[float, ...]:
    try:
        rates = tuple(sorted(map(float, values)))
    except (TypeError, ValueError):
        raise ValueError(f"{path}: rates must be a list of numbers, not {values!r}: correct them.") from None
    two_to_a_decade = all(math.isclose(high, 10 * low) for low, high in zip(rates, rates[2:], strict=False))
    if extend and len(rates) > 1 and not (two_to_a_decade and rates[1] < 10 * rates[0]):
        raise ValueError(
            f"{path}: a grid that extends needs rates two to a decade, as 0.006, 0.02, 0.06, not {values}: "
            "change them, or leave extend out."
        )
    return rates
