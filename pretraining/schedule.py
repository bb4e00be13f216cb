"""The learning rate schedule of the published recipe."""

import math

import torch


def rate_factor(k: int, steps: int, warmup_fraction: float = 0.1, min_ratio: float = 0.1) -> float:
    """The part of the base rate that optimizer step ``k`` (from 0) uses.

    Linear from 0 over the first ``warmup_fraction`` of ``steps``, then a cosine down to ``min_ratio``. As in the
    code base that the published numbers come from, the very first step has rate 0.
    """
    warmup = round(steps * warmup_fraction)
    if k < warmup:
        return k / warmup
    progress = (k - warmup) / max(1, steps - warmup)
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give every group ``factor`` times its base rate, which is its rate when this is first called."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
