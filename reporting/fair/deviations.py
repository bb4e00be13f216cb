"""The effects of the choices that the paper leaves open, filled into the last column of docs/deviations.md."""

from __future__ import annotations

import re
from math import isfinite, isinf
from statistics import fmean

from ..statistics import paired
from ..text import NOT_RUN
from .records import PLAIN, Fair, by_seed

# What a variant is held against, where that is not plain Alice
AGAINST = {"galore_last_layer": "galore", "racs_no_ema": "racs"}
SWEEP = "fair_ablations"


def fill(page: str, fair: Fair) -> str:
    """The page with its effects as the records have them.

    A table's last cell that names variants of the ablations, in code quotes, holds their effects and nothing else.

    Raises:
        ValueError: a cell names variants, and something that is none.
    """
    known = set(fair.names(SWEEP)) - {PLAIN, *AGAINST.values()}

    def row(line: str) -> str:
        start, bar, last = line.removesuffix("|").rpartition("|")
        names = re.findall(r"`(\w+)`", last)
        if not bar or not known.intersection(names):
            return line
        if strange := [name for name in names if name not in known]:
            raise ValueError(f"{strange[0]} is no variant of {SWEEP}: correct the line that begins with {line[:30]!r}")
        return f"{start}| {'; '.join(f'`{name}`: {effect(fair, name)}' for name in names)} |"

    return "\n".join(row(line) if line.startswith("|") else line for line in page.split("\n"))


def effect(fair: Fair, name: str) -> str:
    """On each proxy: the mean difference of final losses between runs with the same seed, its interval, missing seeds."""
    found = []
    for model in fair.models:
        plain, variant = (by_seed(fair.runs(SWEEP, model, each)) for each in (AGAINST.get(name, PLAIN), name))
        common = [seed for seed in variant if seed in plain]
        if not common:
            found.append(NOT_RUN)
            continue
        mean, reach = fmean(variant[seed] - plain[seed] for seed in common), paired(plain, variant).interval
        text = f"{mean:+.3f}" + (f" [{reach[0]:+.3f}, {reach[1]:+.3f}]" if reach else "")
        if not isfinite(mean):
            lost, plainly = (sum(isinf(each[seed]) for seed in common) for each in (variant, plain))
            text = f"{lost} of {len(common)} diverged" + (f", of the default {plainly}" if plainly else "")
        asked = len(fair.asked(SWEEP, model, name))
        found.append(text + (f" ({len(common)} of {asked} seeds)" if len(common) < asked else ""))
    return " / ".join(found) if set(found) != {NOT_RUN} else NOT_RUN
