"""Bytes of weights and optimizer states, from shapes alone."""

import math
from collections.abc import Callable
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
    formula = _LIBRARY.get(f"{type(optimizer).__module__.split('.')[0]}.{type(optimizer).__name__}")
    if formula is None:
        raise ValueError(
            f"the states of {type(optimizer).__name__} are unknown before its first step; measure them then"
        )
    return formula(p, group)


def _adam_mini(p: Tensor, group: dict[str, Any]) -> int:
    """The first moment, and a float32 number for each head of query and key, row of other matrices, or norm."""
    query_or_key = any(word in group["name"] for word in ("q_proj", "k_proj"))
    blocks = p.numel() // group["head_numel"] if query_or_key else p.shape[0] if p.ndim == 2 else 1
    return p.nbytes + 4 * blocks


def _eight_bit(p: Tensor, group: dict[str, Any]) -> int:
    """bitsandbytes: two codes, two maxima for each block of 256; small tensors in float32. (Two tables are shared by all.)"""
    return 2 * p.numel() + 8 * math.ceil(p.numel() / 256) if p.numel() >= 4096 else 8 * p.numel()


# Bytes of what library classes keep for one parameter
_LIBRARY: dict[str, Callable[[Tensor, dict[str, Any]], int]] = {
    "torch.Adam": lambda p, group: 2 * p.nbytes + 4,  # the counter is a float32 tensor
    "torch.AdamW": lambda p, group: 2 * p.nbytes + 4,
    "torch.Muon": lambda p, group: p.nbytes,
    "torch.SGD": lambda p, group: p.nbytes if group["momentum"] else 0,
    "pytorch_optimizer.Lion": lambda p, group: p.nbytes,
    "pytorch_optimizer.SignSGD": lambda p, group: p.nbytes if group["momentum"] else 0,
    "transformers.Adafactor": lambda p, group: (
        4 * (sum(p.shape) + 1 + (p.numel() if group["beta1"] is not None else 0))
    ),
    "adam_mini.Adam_mini": _adam_mini,
    "bitsandbytes.AdamW8bit": _eight_bit,
}


def measured_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the states that exist now; what several parameters share counts once."""
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return sum({v.data_ptr() or id(v): v.nbytes for v in tensors}.values())
