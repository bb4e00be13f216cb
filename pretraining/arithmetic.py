"""What a model is computed in: autocast, and products of bfloat16 matrices where the CPU has no instructions for them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from optimizers.bfloat16 import Widened, has_kernels


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """For forward passes: bfloat16 products in ``bf16_mixed``, nothing otherwise."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16_mixed" else nullcontext()


def products(device: torch.device, precision: str) -> AbstractContextManager:
    """For forward and backward passes: ``Widened`` on a CPU for whose bfloat16 torch has a plain loop only."""
    return Widened() if device.type == "cpu" and precision.startswith("bf16") and not has_kernels() else nullcontext()
