"""Products of bfloat16 matrices on a CPU for which torch has no kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pretraining import arithmetic, plan
from pretraining.arithmetic import Widened, products
from pretraining.config import compose
from pretraining.restore import evaluate_saved
from pretraining.trainer import Trainer, make_plan, train

from .test_trainer import config, losses

CPU = torch.device("cpu")
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


@pytest.fixture
def plain_loop(monkeypatch):
    """As on a CPU with AVX2 alone, whatever this one has."""
    monkeypatch.setattr(arithmetic, "has_kernels", lambda: False)
    monkeypatch.setattr(plan, "has_kernels", lambda: False)


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


def test_only_a_cpu_without_kernels_needs_it(plain_loop, monkeypatch):
    assert isinstance(products(CPU, "bf16"), Widened) and isinstance(products(CPU, "bf16_mixed"), Widened)
    assert not isinstance(products(CPU, "fp32"), Widened)
    assert not isinstance(products(torch.device("cuda"), "bf16"), Widened)
    monkeypatch.setattr(arithmetic, "has_kernels", lambda: True)
    assert not isinstance(products(CPU, "bf16"), Widened)


@pytest.mark.parametrize("precision", ["bf16", "bf16_mixed"])
@pytest.mark.parametrize("loss", ["full", "chunked"])
def test_a_run_computes_no_product_in_the_plain_loop(tmp_path, monkeypatch, plain_loop, precision, loss):
    """Forward, backward, evaluation and samples; its losses are those of other kernels up to rounding."""
    settings = [f"trainer.precision={precision}", f"trainer.loss={loss}", "trainer.sample_tokens=4"]
    with Seen() as seen:
        train(config(tmp_path / "run", *settings))
        evaluate_saved(compose([f"checkpoint={tmp_path / 'run'}"], root="eval"))
    assert seen.dtypes == {torch.float32}
    monkeypatch.setattr(arithmetic, "has_kernels", lambda: True)
    with Seen() as other:
        train(config(tmp_path / "other", *settings))
    assert torch.bfloat16 in other.dtypes
    for (*what, loss), (*other_what, other_loss) in zip(
        losses(tmp_path / "run"), losses(tmp_path / "other"), strict=True
    ):
        assert what == other_what and loss == pytest.approx(other_loss, rel=0.01)


def test_compiled_code_is_left_alone_and_the_plan_says_what_that_costs(tmp_path, plain_loop):
    cfg = config(tmp_path / "run", "trainer.precision=bf16_mixed")
    found = make_plan(cfg)
    trainer = Trainer(cfg, found)
    trainer.batches.close()
    assert isinstance(trainer.products(), Widened)
    assert "trainer.precision=fp32 is faster" in found.text
    cfg.trainer.compile = trainer.cfg.trainer.compile = True
    assert not isinstance(trainer.products(), Widened)
    assert "set trainer.precision=fp32, or compile nothing" in make_plan(cfg).text
    cfg.trainer.precision = "fp32"
    assert "bfloat16" not in make_plan(cfg).text
