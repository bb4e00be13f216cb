"""Bytes from shapes, against the paper's printed cells and against what real optimizers allocate."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from optimizers import METHODS, create
from optimizers.memory import (
    PAPER_STATES,
    RANKS,
    exact_bytes,
    gib,
    llama,
    make,
    measured_state_bytes,
    paper_bytes,
    state_bytes,
)
from pretraining.model import build_model

ROOT = Path(__file__).parents[2]
TABLES = json.loads((ROOT / "results/paper/tables.json").read_text())
SIZES = {"60M": "llama_60m", "130M": "llama_130m", "350M": "llama_350m", "1.3B": "llama_1b"}
ROWS = {
    "Adam": "adam",
    "GaLore": "galore",
    "Fira": "fira",
    "Apollo-mini": "apollo_mini",
    "Apollo-svd": "apollo_svd",
    "RACS": "racs",
    "Alice-0": "alice_0",
    "Alice": "alice",
}
SHAPES = {name: yaml.safe_load((ROOT / f"configs/model/{name}.yaml").read_text()) for name in RANKS}


def test_every_printed_cell_of_table_3_comes_out() -> None:
    table = TABLES["table3"]
    wrong, cells = [], 0
    for row, values in table["rows"].items():
        for column, printed in zip(table["columns"], values, strict=True):
            if printed is None:
                continue
            cells += 1
            last_layer = "adam" if column.endswith("*") else "candidate"
            ours = gib(ROWS[row], SHAPES[SIZES[column.rstrip("*")]], last_layer, "paper")
            if ours != printed:
                wrong.append((row, column, printed, ours))
    assert cells == 48 and not wrong


def test_the_cells_printed_elsewhere_come_out() -> None:
    rows = TABLES["table4"]["rows"]
    for row, name, model in (
        ("Apollo (7B)", "apollo", "llama_7b"),
        ("Apollo-mini (7B)", "apollo_mini", "llama_7b"),
        ("RACS (1B)", "racs", "llama_1b"),
        ("Alice (1B)", "alice", "llama_1b"),
    ):
        assert gib(name, SHAPES[model], "adam", "paper") == rows[row][0]
    muon = TABLES["iclr2026"]["muon"]["mem_1.3B_G"]
    assert gib("muon", SHAPES["llama_1b"], "adam", "paper") == muon
    assert gib("muon", SHAPES["llama_1b"], "candidate", "paper") != muon


def test_ranks_are_those_of_the_recipes() -> None:
    for model in RANKS.keys() - {"llama_7b"}:
        recipe = yaml.safe_load((ROOT / f"configs/recipe/alice-{model}.yaml").read_text())
        assert recipe["optimizer"]["rank"] == RANKS[model]


@pytest.mark.parametrize("name", PAPER_STATES)
def test_both_conventions_differ_by_what_the_docs_say(name: str) -> None:
    """Floors to millions (2 bytes of a weight, 4 of Adam's), norm gains, limiters' norms, RACS' vectors in FP32."""
    shape = SHAPES["llama_130m"]
    gains = 6 * (2 * shape["num_hidden_layers"] + 1) * shape["hidden_size"]
    difference = exact_bytes(name, shape) - paper_bytes(name, shape)
    vectors = 2 * 84 * (768 + 2048 + 1) if name == "racs" else 4 * 200
    assert 0 <= difference < 6 * 10**6 + gains + vectors


@pytest.mark.parametrize("model", ["llama_tiny", "llama_1b"])
def test_names_and_shapes_are_those_of_the_trained_model(model: str) -> None:
    ours, trained = (
        {name: (tuple(p.shape), p.dtype) for name, p in built.named_parameters()}
        for built in (llama(SHAPES[model]), build_model(SHAPES[model], device="meta", dtype=torch.bfloat16))
    )
    assert ours == trained


def test_a_tied_output_layer_is_counted_once() -> None:
    shape = SHAPES["llama_tiny"]
    saved = exact_bytes("adam", shape) - exact_bytes("adam", {**shape, "tie_word_embeddings": True})
    assert saved == 6 * 1024 * 256 + 4  # weight, two moments, a counter


def allocated(name: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of weights and of states after a step with random gradients."""
    torch.manual_seed(0)
    for p in model.parameters():
        p.data.normal_()
        p.grad = torch.randn_like(p)
    if hasattr(optimizer, "update_estimate"):
        optimizer.update_estimate({p: torch.ones_like(p) for group in optimizer.param_groups for p in group["params"]})
    optimizer.step()
    return sum(p.nbytes for p in model.parameters()) + measured_state_bytes(optimizer)


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"any"}))
def test_real_optimizers_of_llama_tiny_allocate_the_exact_bytes(name: str) -> None:
    shape = SHAPES["llama_tiny"]
    model = llama(shape, torch.bfloat16, device="cpu")
    assert allocated(name, model, make(name, model, rank=64)) == exact_bytes(name, shape)


@pytest.mark.parametrize(
    ("name", "last_layer"), [("alice", "adam"), ("alice", "candidate"), ("racs", "adam"), ("adam", "adam")]
)
def test_real_optimizers_of_llama_60m_allocate_the_exact_bytes(name: str, last_layer: str) -> None:
    shape = SHAPES["llama_60m"]
    model = llama(shape, torch.bfloat16, device="cpu")
    options = {"rank": 128, "initial_basis": "gaussian"} if name == "alice" else {}  # which needs no eigenvectors
    optimizer = create(name, model, last_layer=last_layer, verbose=False, **options)
    for p in model.parameters():
        p.data.zero_()
        p.grad = torch.ones_like(p)
    optimizer.step()
    total = sum(p.nbytes for p in model.parameters()) + measured_state_bytes(optimizer)
    assert total == exact_bytes(name, shape, last_layer)


def test_many_matrices_of_few_kinds_are_all_counted() -> None:
    model = llama(SHAPES["llama_tiny"])
    matrices, others = state_bytes(make("racs", model))
    assert matrices == 4 * sum(p.shape[0] + p.shape[1] + 1 for n, p in model.named_parameters() if "_proj" in n)
    assert others == sum(2 * p.nbytes + 4 for n, p in model.named_parameters() if "_proj" not in n)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: gib("soap", s, convention="paper"), "no memory formula for soap"),
        (lambda s: gib("alice", s, convention="printed"), "exact or paper"),
        (lambda s: gib("alice", s, "last", "paper"), "adam or candidate"),
        (lambda s: gib("alice", s, "last"), "adam or candidate"),
        (lambda s: gib("any", s), "a class of yours"),
        (lambda s: gib("alise", s), "choose one of"),
        (lambda s: gib("alice", {**s, "name": "mine"}, convention="paper"), "no rank is known for mine"),
    ],
)
def test_errors_say_what_to_do(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(SHAPES["llama_tiny"])
