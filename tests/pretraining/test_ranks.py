"""The same numbers on 1, 2 and 4 processes (gloo, started by torchrun), and one run that changes between them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretraining.trainer import train

from . import ranks
from .test_trainer import ROOT, config, lines

STOPS = {2: 3, 4: 6}  # the common run: to step 3 on two ranks, to step 6 on four, to the end on one


def launch(processes: int, folder: Path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
        "-m", "tests.pretraining.ranks", str(folder), str(STOPS[processes]),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    results = {1: ranks.work(folder)}
    for processes in STOPS:
        launch(processes, folder)
        results[processes] = json.loads((folder / f"found-{processes}.json").read_text())
    return folder, results


def test_the_evaluation_is_the_same_number_for_every_batch_size_and_number_of_processes(found):
    _, results = found
    (loss, perplexity, galore, tokens), *_ = results[1]["evaluations"]
    assert tokens > 1500 and loss > 5
    for result in results.values():
        assert len(result["evaluations"]) == len(ranks.SIZES)
        for evaluation in result["evaluations"]:
            assert evaluation == pytest.approx([loss, perplexity, galore, tokens], rel=1e-6)


@pytest.mark.parametrize("processes", STOPS)
def test_training_is_the_same_but_for_the_order_of_sums(found, processes):
    """Six rows on four ranks: shares of 1, 2, 1 and 2."""
    folder, _ = found
    ours, theirs = (lines(folder / f"whole-{n}") for n in (1, processes))
    assert [(a["kind"], a["step"]) for a in ours] == [(b["kind"], b["step"]) for b in theirs]
    assert [b["loss"] for b in theirs] == pytest.approx([a["loss"] for a in ours], rel=1e-4)


def test_a_run_may_change_its_number_of_processes(found):
    """Two, then four, then one; each time stopped by a signal that one rank alone has got."""
    folder, _ = found
    names = sorted(path.name for path in (folder / "chain/checkpoints").iterdir())
    assert names == ["step-0000003", "step-0000006"]
    train(config(folder / "chain", *ranks.SETTINGS))
    ours, theirs = lines(folder / "whole-1"), lines(folder / "chain")
    assert [(a["kind"], a["step"]) for a in ours] == [(b["kind"], b["step"]) for b in theirs]
    assert [b["loss"] for b in theirs] == pytest.approx([a["loss"] for a in ours], rel=1e-4)
    environment = json.loads((folder / "chain/environment.json").read_text())
    assert [environment["hardware"]["processes"], *(p["hardware"]["processes"] for p in environment["resumed"])] == [
        2,
        4,
        1,
    ]


@pytest.mark.parametrize("processes", STOPS)
def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_on_all(found, processes):
    folder, results = found
    assert results[processes]["skipped"] == 1
    assert [line["step"] for line in lines(folder / f"skip-{processes}", "skipped")] == [3]
