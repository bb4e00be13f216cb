"""What a run computes in, on a CPU for whose bfloat16 torch has no kernels."""

from __future__ import annotations

import pytest
import torch

from optimizers.bfloat16 import Widened
from pretraining import arithmetic, plan
from pretraining.arithmetic import products
from pretraining.config import compose
from pretraining.restore import evaluate_saved
from pretraining.trainer import Trainer, make_plan, train
from tests.optimizers.test_bfloat16 import Seen

from .test_trainer import config, losses

CPU = torch.device("cpu")


@pytest.fixture
def plain_loop(monkeypatch):
    """As on a CPU with AVX2 alone, whatever this one has."""
    monkeypatch.setattr(arithmetic, "has_kernels", lambda: False)
    monkeypatch.setattr(plan, "has_kernels", lambda: False)


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
