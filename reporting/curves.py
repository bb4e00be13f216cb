"""Validation curves: where several runs meet, and when a curve reaches a value."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .records import Run

Array = NDArray[np.float64]


def shared_curve(runs: Sequence[Run]) -> tuple[Array, Array]:
    """Validation curves of several runs: the steps that all of them have, [points], and perplexities [runs, points]."""
    each = [dict(zip(run.evals["step"], run.evals["perplexity"], strict=True)) for run in runs]
    steps = sorted(set.intersection(*map(set, each))) if each else []
    return np.array(steps), np.array([[one[step] for step in steps] for one in each]).reshape(len(each), len(steps))


def first_evaluation(steps: Array, values: Array, target: float, every: int) -> int | None:
    """The first step of the evaluation grid whose value is at or under `target`; None if there is none.

    Args:
        steps: evaluated steps, increasing, [points].
        values: perplexities or losses there, [points].
        every: only multiples of it count, so that finer evaluations give nobody an advantage; the last point always does.
    """
    for step, value in zip(steps, values, strict=True):
        if value <= target and (step % every == 0 or step == steps[-1]):
            return int(step)
    return None
