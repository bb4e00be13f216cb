"""What is really stored for one matrix, against Tables 1 and 6 of the paper (less the weight itself) and our formulas."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from optimizers import METHODS, create

m, n, r = 6, 10, 4  # sides and rank; leading and K do not count


def block_bytes(entries: int) -> int:
    return entries + 4 * math.ceil(entries / 256)


# name -> elements beside the weight. Where the paper's tables have the method, its formula stands first, and what we keep
# more is added and said.
ELEMENTS = {
    "adam": 2 * m * n,
    "adamw": 2 * m * n,
    "shampoo": m**2 + n**2,
    "eigen_adam": 2 * m * n + 2 * m**2,
    "soap": 2 * m * n + 2 * m**2 + 2 * n**2,
    "racs": m + n + 1,
    "racs_no_ema": m + n + 1,
    "galore": 2 * n * r + m * r,
    "fira": 2 * n * r + m * r + 1,  # the limiter's norm, which the paper does not count
    "fira_plus": 2 * n * r + m * r + r**2,
    "alice": 2 * n * r + m * r + n + r**2 + 1,
    "alice_0": 2 * n * r + m * r + n + 1,
    "apollo": 2 * n * r + 1,
    "apollo_mini": 2 * n + 1,  # its paper counts one more, the seed, which is an option here
    "apollo_svd": 2 * n * r + m * r + 1,
    "muon": m * n,
    "muon_paper": m * n,
    # no formula in the paper
    "soap_factored": m * n + 2 * m**2 + 2 * n**2 + m + n,
    "low_rank_soap": m * r + n * r + 4 * r**2 + 2 * r + 2,
    "normalization": 0,
    "whitening": 0,
    "swan": 0,
    "lars": m * n,
    "lamb": 2 * m * n,
    "sgd": m * n,
    "lion": m * n,
    "signum": m * n,
    "sophia_g": 2 * m * n,
    "sophia_h": 2 * m * n,
    "adafactor": m + n + 1,
    "any": m * n,  # RMSprop, below
}


class Config:
    hidden_size, num_attention_heads = m, 2


def stored(name: str, shape: tuple[int, int]) -> dict[str, Tensor]:
    """The state tensors of the one matrix of a model after a step."""
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.q_proj = torch.nn.Linear(*reversed(shape), bias=False)
    model.config = Config()
    options = {key: r for key in ("rank",) if name in LOW_RANK} | ({"leading": 2} if name in SWITCHED else {})
    if name == "any":
        options = {"target": "torch.optim.RMSprop", "lr": 0.1, "options": {}}
    optimizer = create(name, model, verbose=False, **options)
    model.q_proj.weight.grad = torch.randn(shape)
    if hasattr(optimizer, "update_estimate"):
        optimizer.update_estimate({model.q_proj.weight: torch.ones(shape)})
    optimizer.step()
    state = optimizer.state[model.q_proj.weight]
    return {key: value for key, value in state.items() if isinstance(value, Tensor) and key != "step"}


SWITCHED = {"alice", "alice_0", "fira_plus", "low_rank_soap"}
LOW_RANK = SWITCHED | {"galore", "galore_8bit", "fira", "apollo", "apollo_svd"}


@pytest.mark.parametrize("shape", [(m, n), (n, m)])
@pytest.mark.parametrize("name", ELEMENTS)
def test_elements(name: str, shape: tuple[int, int]) -> None:
    assert sum(value.numel() for value in stored(name, shape).values()) == ELEMENTS[name]


def test_8bit_galore_keeps_a_byte_for_each_moment_and_a_maximum_for_each_block() -> None:
    sizes = {key: value.nbytes for key, value in stored("galore_8bit", (m, n)).items()}
    assert sizes == {"U": 4 * m * r, "m": n * r, "v": n * r, "m_absmax": 4, "v_absmax": 4}


def test_adam_mini_keeps_one_second_moment_for_each_head() -> None:
    state = stored("adam_mini", (m, m))  # a query matrix of two heads
    assert state["m"].numel() == m * m and state["vmean"].numel() == 2


def test_small_tensors_of_8bit_adam_stay_wide() -> None:
    state = stored("adam_8bit", (m, n))
    assert {state["state1"].dtype, state["state2"].dtype} == {torch.float32}


def test_every_method_is_counted_and_documented() -> None:
    assert set(METHODS) == set(ELEMENTS) | {"galore_8bit", "adam_mini", "adam_8bit"}
    text = (Path(__file__).parents[2] / "docs" / "optimizers.md").read_text()
    in_tables = {name for line in text.splitlines() if line.startswith("| `") for name in re.findall(r"`(\w+)`", line)}
    assert set(METHODS) - in_tables == {"any"}  # which has a section of its own
