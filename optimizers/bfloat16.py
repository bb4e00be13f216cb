"""Products of bfloat16 matrices on CPUs that have no instructions for them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_PRODUCTS = {  # and what computes them, without writing into what is there
    _aten.mm.default: _aten.mm.default,
    _aten.mm.out: _aten.mm.default,
    _aten.bmm.default: _aten.bmm.default,
    _aten.addmm.default: _aten.addmm.default,
    _aten.addmm_.default: _aten.addmm.default,
}


def has_kernels() -> bool:
    """Whether torch has kernels for bfloat16 products on this CPU: with AVX-512, AMX or the like, not with AVX2 alone."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def widened(X: Tensor) -> AbstractContextManager:
    """For products of ``X`` and what is computed from it: ``Widened`` where torch has a plain loop only."""
    slow = X.device.type == "cpu" and X.dtype == torch.bfloat16 and not torch.compiler.is_compiling()
    return Widened() if slow and not has_kernels() else nullcontext()


class Widened(TorchDispatchMode):
    """While entered, float32 kernels compute the products of bfloat16 matrices, which are then rounded.

    They round like the kernels that other CPUs have: sums are made in float32, and once rounded.
    """

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if function not in _PRODUCTS or args[-1].dtype is not torch.bfloat16:
            return function(*args, **kwargs)
        target = args[0] if function is _aten.addmm_.default else kwargs.pop("out", None)
        product = _PRODUCTS[function](*(x.float() for x in args), **kwargs)
        return product.bfloat16() if target is None else target.copy_(product)
