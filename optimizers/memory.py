"""Bytes of weights and optimizer states, from shapes alone."""

from typing import Any

import torch
from torch import Tensor

from .base import MatrixOptimizer
from .combined import Combined


def state_bytes(optimizer: torch.optim.Optimizer) -> list[int]:
    """Bytes that the states of each parameter group take once every parameter has been updated.

    Nothing is allocated, and a meta-device model will do. Counters kept as Python numbers count nothing.

    Raises:
        ValueError: an optimizer class that this function does not know.
    """
    if isinstance(optimizer, Combined):
        return [size for part in optimizer.optimizers for size in state_bytes(part)]
    return [sum(_bytes(optimizer, p, group) for p in group["params"]) for group in optimizer.param_groups]


def _bytes(optimizer: torch.optim.Optimizer, p: Tensor, group: dict[str, Any]) -> int:
    if isinstance(optimizer, MatrixOptimizer):
        state = optimizer.new_state(torch.empty_like(p, device="meta"), group)
        return sum(value.nbytes for value in state.values() if isinstance(value, Tensor))
    if isinstance(optimizer, torch.optim.Adam):  # and AdamW; the counter is a float32 tensor
        return 2 * p.nbytes + 4
    if isinstance(optimizer, torch.optim.Muon):
        return p.nbytes
    raise ValueError(f"the states of {type(optimizer).__name__} are unknown before its first step; measure them then")


def measured_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the states that exist now."""
    return sum(v.nbytes for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))
