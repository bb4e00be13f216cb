"""Every method on every device that is there: float32 follows float64 on the CPU, and bfloat16 stays finite.

The other tests of this folder compute on the CPU. Where there is a GPU, these are what shows that a method's batches,
solvers and draws work on it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from optimizers import METHODS, create
from pretraining.model import build_model

ROOT = Path(__file__).resolve().parents[2]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
LLAMA = {
    "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64,
    "max_position_embeddings": 32, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "initializer_range": 0.1,
    "tie_word_embeddings": False,
}  # fmt: skip
SMALL = {"rank": 6, "leading": 2, "update_interval": 2}
STEPS = 5  # with refreshes at 1, 2 and 4, or at 1, 3 and 5
# Largest relative error of the whole movement of the weights. Muon's products are on bfloat16 inputs. Of the others, bases
# have the signs that the solver happens to give, and moments are not turned when a basis changes: a flipped sign shows.
SIGNS = ("apollo_svd", "fira", "galore", "galore_8bit", "low_rank_soap", "soap", "soap_factored")
TOLERANCE = {"muon": 0.05, "muon_paper": 0.05, **dict.fromkeys(SIGNS, 0.3)}
# Where there is no gradient these lift a solver's rounding: at their own eps, 1e-6 of the largest entry moves SOAP by 0.6.
EPS = {"soap": 1e-4, "shampoo": 1e-2}
NO_FLOAT64 = {"adam_8bit"}  # keeps no codes of float64 weights


def build(name: str, device: str, dtype: torch.dtype) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model with the same weights for every device and dtype, and the method."""
    torch.manual_seed(0)
    model = build_model(LLAMA).to(device)
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model, configured(name, model)


def configured(name: str, model: torch.nn.Module, **more: Any) -> torch.optim.Optimizer:
    """The method with the values of its file, for small matrices, and ``more`` of its options."""
    values: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "optimizer" / f"{name}.yaml").read_text())
    values |= {key: min(most, values[key]) for key, most in SMALL.items() if values.get(key) is not None}
    values |= {key: 0 for key, value in values.items() if value == "${seed}"}
    values |= {key: values[x[12:-1]] for key, x in values.items() if str(x).startswith("${optimizer.")}
    values |= {"eps": EPS[name]} if name in EPS else {}
    del values["name"]
    return create(name, model, verbose=False, **values | more)


def train(name: str, device: str, dtype: torch.dtype) -> Tensor:
    """How the weights have moved after a few updates with given gradients, as one float64 vector on the CPU."""
    model, optimizer = build(name, device, dtype)
    before = flat(model)
    draw = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        for p in model.parameters():
            # Entries that bfloat16 holds: every dtype sees the same gradient. Columns differ, so that bases are determined.
            spread = torch.linspace(0.5, 2.0, p.shape[-1])
            p.grad = (torch.randn(p.shape, generator=draw) * spread).bfloat16().to(device, dtype)
        step(optimizer)
    return flat(model) - before


def step(optimizer: Any) -> None:
    """With an estimate of the curvature for Sophia."""
    if getattr(optimizer, "wanted_estimate", lambda: None)():
        params = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.update_estimate({p: torch.full_like(p, 100.0) for p in params})
    optimizer.step()


def flat(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().double().cpu().flatten() for p in model.parameters()])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [name for name in METHODS if name not in {"any", *NO_FLOAT64}])
def test_float32_follows_float64(name: str, device: str, library: Callable[[str], None]) -> None:
    library(name)
    exact, moved = train(name, "cpu", torch.float64), train(name, device, torch.float32)
    assert exact.norm() > 0
    assert (moved - exact).norm() < TOLERANCE.get(name, 2e-3) * exact.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [name for name in METHODS if name != "any"])
def test_bfloat16_moves_and_stays_finite(name: str, device: str, library: Callable[[str], None]) -> None:
    library(name)
    moved = train(name, device, torch.bfloat16)
    assert moved.isfinite().all() and moved.norm() > 0
