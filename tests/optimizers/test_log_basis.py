"""The log of bases (Figure 6): the right cosines, and nothing else is changed by asking for them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from optimizers import Alice, GaLore, base
from optimizers.low_rank import basis_cosines
from pretraining.config import compose, validate
from pretraining.plan import make_plan
from pretraining.trainer import Trainer, train
from reporting.paper.records import basis_similarities
from reporting.records import load_run

SHAPES = {"square": (12, 12), "wide": (12, 20), "tall": (20, 12)}
INTERVAL, STEPS = 3, 10
WAYS: dict[str, tuple[type, dict[str, Any]]] = {
    "alice": (Alice, {}),
    "alice_0": (Alice, {"tracking": False}),
    "tracking alone": (Alice, {"switching": "none", "compensation": "none"}),
    "neither": (Alice, {"tracking": False, "switching": "none", "compensation": "none"}),
    "rotated": (Alice, {"tracking_basis": "rotated"}),
    "gaussian": (Alice, {"switching": "gaussian", "fix_signs": False}),
    "zero_based": (Alice, {"update_times": "zero_based"}),
    "galore": (GaLore, {}),
    "8bit": (GaLore, {"state_dtype": "8bit"}),
}


def parameters(dtype: torch.dtype) -> list[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (name, torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))) for name, shape in SHAPES.items()
    ]


def build(way: str, log_basis: bool, dtype: torch.dtype = torch.float32, rank: int = 8) -> Any:
    cls, options = WAYS[way]
    leading = {"leading": 8} if cls is Alice and rank >= 8 else {"leading": 1} if cls is Alice else {}
    return cls(
        parameters(dtype), lr=0.01, rank=rank, update_interval=INTERVAL, log_basis=log_basis, **leading, **options
    )


def run(optimizer: Any, steps: int = STEPS) -> list[dict[str, Tensor]]:
    """Take steps on random gradients; U of every matrix after each step, by name."""
    generator, bases = torch.Generator().manual_seed(7), []
    group = optimizer.param_groups[0]
    for _ in range(steps):
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()
        named = zip(group["param_names"], group["params"], strict=True)
        bases.append({name: optimizer.state[p]["U"].clone() for name, p in named})
    return bases


def updates(way: str) -> list[int]:
    """Steps of updates after the first."""
    zero_based = way in ("galore", "8bit", "zero_based")
    return [t for t in range(2, STEPS + 1) if (t - 1 if zero_based else t) % INTERVAL == 0]


def logged(optimizer: Any) -> list[tuple[str, list[float]]]:
    return [
        (name, row) for names, cosines in optimizer.basis_log for name, row in zip(names, cosines.tolist(), strict=True)
    ]


@pytest.mark.parametrize("way", WAYS)
def test_the_cosines_are_those_of_the_stored_bases(way: str) -> None:
    optimizer = build(way, True)
    bases = run(optimizer)
    expected = []
    for t in updates(way):
        for name in SHAPES:
            old, new = bases[t - 2][name].double(), bases[t - 1][name].double()
            pairs = [(old[:, j - 1], new[:, j - 1]) for j in (1, 2, 4, 8)]
            expected.append((name, [abs(float(a @ b)) / float(a.norm() * b.norm()) for a, b in pairs]))
    found = logged(optimizer)
    assert len(expected) == 9 and [name for name, _ in found] == [name for name, _ in expected]
    for (_, row), (_, right) in zip(found, expected, strict=True):
        assert row == pytest.approx(right, abs=1e-6)
    assert min(min(row) for _, row in found) < 0.9  # the bases did move


def test_bfloat16_bases_are_compared_to_their_rounding() -> None:
    optimizer = build("tracking alone", True, torch.bfloat16)
    bases = run(optimizer)
    (_, row), old, new = logged(optimizer)[0], bases[1]["square"].float(), bases[2]["square"].float()
    assert row == pytest.approx([abs(float(old[:, j] @ new[:, j])) for j in (0, 1, 3, 7)], abs=0.02)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_states_and_state_dict_are_bit_for_bit_those_without_it(way: str, dtype: torch.dtype) -> None:
    plain, logging = build(way, False, dtype), build(way, True, dtype)
    run(plain)
    run(logging)
    assert logging.basis_log and plain.basis_log is None
    for p, q in zip(plain.param_groups[0]["params"], logging.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)
    mine, theirs = plain.state_dict(), logging.state_dict()
    assert mine["param_groups"] == theirs["param_groups"] and mine["state"].keys() == theirs["state"].keys()
    for i, state in mine["state"].items():
        assert state.keys() == theirs["state"][i].keys()
        for name, value in state.items():
            other = theirs["state"][i][name]
            assert torch.equal(value, other) if isinstance(value, Tensor) else value == other, name


def test_stacked_matrices_are_logged_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def collect() -> list[tuple[str, list[float]]]:
        generator = torch.Generator().manual_seed(1)
        named = [(f"layer {i}", torch.nn.Parameter(torch.randn(12, 20, generator=generator))) for i in range(3)]
        optimizer = Alice(named, rank=4, leading=2, update_interval=INTERVAL, log_basis=True)
        run(optimizer, INTERVAL)
        return logged(optimizer)

    alone = collect()
    monkeypatch.setattr(base, "BATCHED_DEVICES", {"cpu"})
    stacked = collect()
    assert [name for name, _ in stacked] == ["layer 0", "layer 1", "layer 2"] == [name for name, _ in alone]
    for (_, row), (_, other) in zip(stacked, alone, strict=True):
        assert len(row) == 3 and row == pytest.approx(other, abs=1e-5)  # columns 1, 2 and 4


def test_columns_are_compared_whatever_their_length_and_sign() -> None:
    U = torch.eye(10)[None]
    turned = U.clone()
    turned[..., 0] *= -3
    turned[..., 1] = (U[..., 1] + U[..., 2]) / 2
    assert basis_cosines(U, turned).tolist() == [pytest.approx([1, 0.5**0.5, 1, 1])]
    assert basis_cosines(U[..., :3], U[..., :3]).shape == (1, 2)


# ---------------------------------------------------------------------------------------------- in a run

TINY = [
    *("experiment=quickstart", "optimizer=alice", "optimizer.rank=8", "optimizer.leading=3", "optimizer.lr=0.02"),
    *("optimizer.update_interval=3", "model.hidden_size=32", "model.intermediate_size=48", "model.num_hidden_layers=1"),
    *("model.num_attention_heads=2", "trainer.steps=8", "trainer.batch_size=4", "trainer.precision=fp32"),
    *("trainer.eval_every=8", "trainer.save_every=4", "trainer.sample_tokens=0", "data.length=32"),
    *("data.validation_max_tokens=500", "eval.ngrams=false", "trainer.save_model=false", "trainer.device=cpu"),
]


def trained(folder: Path, *more: str) -> list[dict[str, Any]]:
    """The lines of a run's metrics."""
    cfg = compose([*TINY, f"run_dir={folder}", *more])
    validate(cfg)
    train(cfg)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "logged"
    trained(path, "optimizer.log_basis=true")
    return path


def test_a_run_records_every_update_and_trains_the_same(folder: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    bases = [line for line in lines if line["kind"] == "basis"]
    assert {line["step"] for line in bases} == {3, 6} and len(bases) == 2 * 7  # q, k, v, o, gate, up, down
    assert all(set(line) == {"kind", "step", "name", "cosine"} and len(line["cosine"]) == 4 for line in bases)
    assert all(0 <= x <= 1 for line in bases for x in line["cosine"])
    plain = trained(tmp_path / "plain")
    numbers = [
        [(line["kind"], line["step"], line["loss"]) for line in some if "loss" in line] for some in (lines, plain)
    ]
    assert numbers[0] == numbers[1] and not [line for line in plain if line["kind"] == "basis"]


def test_figures_that_are_read_a_step_later_keep_their_step(folder: Path, tmp_path: Path) -> None:
    cfg = compose([*TINY, f"run_dir={tmp_path}/late", "optimizer.log_basis=true"])
    trainer = Trainer(cfg, make_plan(cfg))
    trainer.lag = 1  # as on a GPU
    trainer.run()
    late, kept = (
        [line for line in (path / "metrics.jsonl").read_text().splitlines() if '"basis"' in line]
        for path in (tmp_path / "late", folder)
    )
    assert late == kept


def test_reporting_reads_them(folder: Path) -> None:
    run = load_run(folder)
    assert len(run.train["step"]) == 8 and len(run.evals["step"]) == 1
    found = basis_similarities(run)
    assert len(found) == 7 and all(set(steps) == {3, 6} for steps in found.values())


def test_a_resumed_run_writes_them_once_and_the_option_may_change(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "resumed"
    shutil.copytree(folder, copy)
    whole = sorted((copy / "metrics.jsonl").read_text().splitlines())
    (copy / "summary.json").unlink()
    shutil.rmtree(max((copy / "checkpoints").iterdir()))  # that of step 8: the run goes on after step 4
    again = trained(copy, "optimizer.log_basis=true")
    kept = [json.loads(line) for line in whole]
    bases = [[line for line in some if line["kind"] == "basis"] for some in (again, kept)]
    key = lambda line: (line["step"], line["name"])  # noqa: E731
    assert sorted(bases[0], key=key) == sorted(bases[1], key=key)
    (copy / "summary.json").unlink()
    shutil.rmtree(max((copy / "checkpoints").iterdir()))
    off = trained(copy, "optimizer.log_basis=false")
    assert {line["step"] for line in off if line["kind"] == "basis"} == {3}
