"""The same numbers on 1, 2 and 4 processes (gloo), in every layout, and one run that changes between them.

LIMITS, relative, of losses and of gradient norms. Layouts add up gradients in other orders, which in float32 changes entries
by some 2^-24; test_rounding_alone_moves_losses_by_less shows that 16 times as much moves losses by less than the limit, in one
process. In bfloat16 each gradient is rounded by 2^-9, each rank's and their sum, and a norm shows it; losses less.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from pretraining.trainer import Trainer, train

from . import ranks
from .test_trainer import ROOT, config, lines

LIMITS = {"loss": 1e-6, "grad_norm": 1e-5}
BF16_LIMITS = {"loss": 1e-3, "grad_norm": 2e-2}
REFERENCES = {
    "one": ranks.BASES,
    "bf16": [*ranks.BASES, *ranks.BF16],
    "tied": [*ranks.BASES, ranks.TIED],
    "sophia": ranks.SOPHIA,
    "adam_mini": ranks.MINI,
}
# run -> the run of one process
RUNS = {
    **dict.fromkeys(
        ["ddp-2", "late-2", "replicated-2", "fsdp2-2", "ddp-4", "fsdp2-4", "node-ddp-4", "node-fsdp2-4", "chain"], "one"
    ),
    "tied-2": "tied",
    "fsdp2-unequal-2": "one",
    **dict.fromkeys(["bf16-ddp-2", "bf16-fsdp2-2"], "bf16"),
    "sophia-2": "sophia",
    "adam_mini-2": "adam_mini",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.pretraining.ranks", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-6000:]
    results = [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(ranks.RANKS)]
    for name, more in REFERENCES.items():
        train(config(folder / name, *ranks.SETTINGS, *more))
    return folder, results


@pytest.fixture(scope="module")
def chain(found):
    """The common run: 4 processes, 2, 3, each stopped by a signal that one rank alone has got, and now 1."""
    folder, _ = found
    saved = sorted(path.name for path in (folder / "chain/checkpoints").iterdir())
    train(config(folder / "chain", *ranks.SETTINGS, *ranks.BASES))
    return saved


def test_the_evaluation_is_the_same_number_for_every_batch_size_and_number_of_processes(found, tmp_path):
    _, results = found
    (loss, perplexity, galore, tokens), *rest = ranks.evaluations(tmp_path)
    assert tokens > 1500 and loss > 5
    every = [one for result in results for key in ("evaluations 4", "evaluations 2") for one in result.get(key, [])]
    assert len(every) == 6 * len(ranks.SIZES)
    for evaluation in rest + every:
        assert evaluation == pytest.approx([loss, perplexity, galore, tokens], rel=1e-6)


@pytest.mark.parametrize("name", RUNS)
def test_training_is_the_same_but_for_the_order_of_sums(found, chain, name):
    """With accumulation, clipping, rows of unequal lengths in unequal shares, refreshes and switching."""
    folder, _ = found
    ours, theirs = lines(folder / RUNS[name]), lines(folder / name)
    ours, theirs = ([line for line in some if line["kind"] != "basis"] for some in (ours, theirs))
    assert [(a["kind"], a["step"]) for a in ours] == [(b["kind"], b["step"]) for b in theirs]
    for key, limit in (BF16_LIMITS if "bf16" in name else LIMITS).items():
        expected = [a[key] for a in ours if key in a]
        assert [b[key] for b in theirs if key in b] == pytest.approx(expected, rel=limit)
    assert min(a["grad_norm"] for a in ours if "grad_norm" in a) > 0.3  # every step is clipped


def test_rounding_alone_moves_losses_by_less(found, tmp_path, monkeypatch):
    """One process whose gradients are off by a random 2^-20 of each entry, 16 roundings: what LIMITS have to bear."""
    folder, _ = found
    original = Trainer._clip
    generator = torch.Generator().manual_seed(0)

    def rounded(self):
        for p in self.model.parameters():
            p.grad.mul_(1 + (torch.rand(p.shape, generator=generator) * 2 - 1) * 2**-20)
        return original(self)

    monkeypatch.setattr(Trainer, "_clip", rounded)
    train(config(tmp_path, *ranks.SETTINGS, *ranks.BASES))
    ours, theirs = ([line["loss"] for line in lines(run) if "loss" in line] for run in (folder / "one", tmp_path))
    assert ours != theirs and ours == pytest.approx(theirs, rel=LIMITS["loss"])


def test_a_run_may_change_its_number_of_processes_and_their_layout(found, chain):
    folder, _ = found
    assert chain == [f"step-000000{step}" for step in (2, 3, 4, 6)]
    environment = json.loads((folder / "chain/environment.json").read_text())
    processes = [environment["hardware"], *(part["hardware"] for part in environment["resumed"])]
    assert [hardware["processes"] for hardware in processes] == [*(n for n, _, _ in ranks.CHAIN), 1]


@pytest.mark.parametrize("name", RUNS)
def test_all_matrices_are_in_the_record(found, chain, name):
    """Angles between old and new bases, whoever owns them."""
    folder, _ = found
    ours, theirs = (
        {(line["step"], line["name"]) for line in lines(folder / run, "basis")} for run in (RUNS[name], name)
    )
    assert ours == theirs and (RUNS[name] in ("sophia", "adam_mini") or len({matrix for _, matrix in ours}) == 14)


@pytest.mark.parametrize("name", RUNS)
def test_states_are_counted_once(found, chain, name):
    """Those of fsdp2 are balanced, since Adam's are divided too."""
    folder, _ = found
    one, many = (json.loads((folder / run / "summary.json").read_text()) for run in (RUNS[name], name))
    assert many["optimizer_state_bytes"] == one["optimizer_state_bytes"]
    by_rank = many.get("optimizer_state_bytes_by_rank")
    if name == "chain":  # ended by one
        assert by_rank is None
    elif name == "replicated-2":
        assert by_rank == [one["optimizer_state_bytes"]] * 2
    elif name.startswith("node"):
        assert by_rank[:2] == by_rank[2:] and min(by_rank) < one["optimizer_state_bytes"]
    elif "fsdp2" in name:
        assert max(by_rank) < 1.15 * one["optimizer_state_bytes"] / len(by_rank)
    else:
        assert max(by_rank) < one["optimizer_state_bytes"]


def test_accumulated_gradients_lie_in_ddps_buckets(found):
    """And not beside them: twice the memory."""
    _, results = found
    assert [result["gradients"] for result in results if "gradients" in result] == [[True, True, True]] * 2


def test_ranks_that_have_drifted_apart_save_nothing(found):
    """One rounding in one weight of one rank."""
    folder, results = found
    for name, some, more in (("drift", results[:2], False), ("drift node-fsdp2", results, True)):
        for result in some:
            assert "after step 2, which is not saved, the processes have different weights" in result[name]
            assert ("trainer.shard_group=all, and each matrix is computed once" in result[name]) == more
            assert result[name].endswith("use equal ones, and the same command goes on from the last checkpoint")
        saved = folder / name.replace(" ", "-") / "checkpoints"
        assert [path.name for path in saved.iterdir()] == ["step-0000001"]


def test_every_group_waits_as_long_as_the_whole(found):
    """Half an hour: while the first rank hashes a checkpoint, groups of a node have messages in the queue."""
    _, results = found
    for result in results:
        assert len(result["limits"]) == 3 and set(result["limits"]) == {30.0}


@pytest.mark.parametrize("name", ["ddp-4", "fsdp2-2"])
def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_on_all(found, name):
    folder, results = found
    assert [result[f"skipped {name}"] for result in results if f"skipped {name}" in result] == [1] * int(name[-1])
    assert [line["step"] for line in lines(folder / f"skip-{name}", "skipped")] == [3]


def test_ranks_that_hold_parts_write_a_text_together(found):
    folder, _ = found
    assert (folder / "fsdp2-2/samples.txt").read_text().count("\n") > 2
