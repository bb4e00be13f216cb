"""Products of bfloat16 matrices on a CPU for which torch has no kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from optimizers import Muon, bfloat16
from optimizers.bfloat16 import Widened, widened

NAMES = ("mm", "addmm", "addmm_", "bmm", "baddbmm")


class Seen(TorchDispatchMode):
    """Collects the dtypes that products are computed in."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in NAMES:
            self.dtypes.add(args[-1].dtype)
        return function(*args, **(kwargs or {}))


def integers(*shape: int) -> Tensor:
    """Small enough for their products to be exact in float32."""
    return torch.randint(-9, 10, shape).bfloat16()


@pytest.mark.parametrize("name", ["mm", "mm out", "bmm", "addmm", "addmm_", "linear", "matmul"])
def test_products_are_the_exact_ones_rounded_once(name):
    torch.manual_seed(0)
    batch = (3,) if name in ("bmm", "matmul") else ()
    A, B, C = integers(*batch, 40, 300), integers(*batch, 300, 30), integers(*batch, 40, 30)
    compute = {
        "mm": lambda: A.mm(B),
        "mm out": lambda: torch.mm(A, B, out=torch.zeros_like(C)),
        "bmm": lambda: A.bmm(B),
        "addmm": lambda: torch.addmm(C, A, B, beta=2.0, alpha=0.5),
        "addmm_": lambda: C.clone().addmm_(A, B),
        "linear": lambda: torch.nn.functional.linear(A, B.mT.contiguous()),
        "matmul": lambda: A @ B,
    }[name]
    exact = A.double() @ B.double()
    exact = {"addmm": 2 * C + 0.5 * exact, "addmm_": C + exact}.get(name, exact)
    with Seen() as seen, Widened():
        found = compute()
    assert seen.dtypes == {torch.float32}
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.bfloat16())


def test_what_is_written_into_is_what_is_returned():
    A, B, C = integers(4, 5), integers(5, 6), integers(4, 6)
    before, out = C.clone(), torch.zeros_like(C)
    with Widened():
        assert torch.mm(A, B, out=out) is out
        assert C.addmm_(A, B) is C
    assert torch.equal(out, A @ B) and torch.equal(C, torch.addmm(before, A, B)) and C.abs().sum() > 0


def test_other_dtypes_stay_as_they_are():
    A, B = torch.randn(4, 5), torch.randn(5, 6)
    with Seen() as seen, Widened():
        assert torch.equal(A @ B, A.mm(B))
        assert (A.double() @ B.double()).dtype == torch.float64
    assert seen.dtypes == {torch.float32, torch.float64}


def test_only_bfloat16_on_a_cpu_without_kernels_needs_it(monkeypatch):
    monkeypatch.setattr(bfloat16, "has_kernels", lambda: False)
    assert isinstance(widened(torch.zeros(2, 2).bfloat16()), Widened)
    assert not isinstance(widened(torch.zeros(2, 2)), Widened)
    assert not isinstance(widened(torch.zeros(2, 2, dtype=torch.bfloat16, device="meta")), Widened)
    monkeypatch.setattr(bfloat16, "has_kernels", lambda: True)
    assert not isinstance(widened(torch.zeros(2, 2).bfloat16()), Widened)


@pytest.mark.parametrize("shape", [(40, 70), (70, 40), (300, 520)])
def test_muon_computes_no_product_in_the_plain_loop(monkeypatch, shape):
    """Its iteration is in bfloat16 by default; the update is that of other kernels up to their rounding."""
    moved = {}
    for kernels in (True, False):
        monkeypatch.setattr(bfloat16, "has_kernels", lambda kernels=kernels: kernels)
        p = torch.nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        optimizer = Muon([p], lr=1.0)
        with Seen() as seen:
            optimizer.step()
        assert seen.dtypes == {torch.bfloat16 if kernels else torch.float32}
        moved[kernels] = p.detach().clone()
    assert (moved[True] - moved[False]).norm() < 0.02 * moved[True].norm()
