"""A launch that loses one of its processes and what becomes of its run; classes that cannot be divided."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from data.errors import UserError
from pretraining.parallel import Parallel
from pretraining.trainer import train

from .test_trainer import ALICE, ROOT, TINY, config, lines

PATIENCE = 60  # seconds
STEPS = [
    "trainer.steps=40",
    "trainer.save_every=2",
    "trainer.keep_last=99",
    "trainer.eval_every=40",
    "trainer.device=cpu",
]


def children(pid: int) -> dict[int, int]:
    """Rank -> process, of a launcher."""
    found = {}
    for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        names = dict(x.split("=", 1) for x in Path(f"/proc/{child}/environ").read_text().split("\0") if "=" in x)
        if "LOCAL_RANK" in names:
            found[int(names["RANK"])] = child
    return found


def test_a_launch_that_loses_a_rank_ends_and_goes_on_with_fewer(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    command += [*TINY, *ALICE, *STEPS, f"run_dir={run}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        limit = time.monotonic() + 3 * PATIENCE
        while not (run / "checkpoints/step-0000002").exists():
            assert launcher.poll() is None and time.monotonic() < limit, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.005)
        os.kill(children(launcher.pid)[1], signal.SIGKILL)
        try:
            code = launcher.wait(PATIENCE)
        finally:
            launcher.kill()
    assert code not in (0, 75)  # neither finished, nor stopped in an orderly way
    text = (tmp_path / "log").read_text()
    assert "Signal 9 (SIGKILL)" in text, text[-3000:]
    done = [line["step"] for line in lines(run, "train")]
    assert done == list(range(1, len(done) + 1)) and 2 <= len(done) < 40

    train(config(run, *STEPS))
    train(config(tmp_path / "whole", *STEPS))
    environment = json.loads((run / "environment.json").read_text())
    assert environment["hardware"]["processes"] == 2
    assert [part["hardware"]["processes"] for part in environment["resumed"]] == [1]
    ours, theirs = (
        [(line["kind"], line["step"], line["loss"]) for line in lines(x)] for x in (run, tmp_path / "whole")
    )
    assert [line[:2] for line in ours] == [line[:2] for line in theirs]
    distances = [abs(a[2] - b[2]) / b[2] for a, b in zip(ours, theirs, strict=True)]
    assert max(distances) < 1e-3, max(distances)


@pytest.mark.parametrize("elsewhere", [0.5, 0.25])
def test_a_class_that_computes_a_number_from_all_matrices_is_refused(monkeypatch, elsewhere):
    """As Prodigy does; the other rank's groups are made up."""
    here = object.__new__(Parallel)
    here.ranks, here.owners = 2, True
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2, 2))], lr=0.1)
    optimizer.param_groups[0]["d"] = 0.5

    def gather(every, ours):
        every[:] = [ours, [{**group, "d": elsewhere} for group in ours]]

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    if elsewhere == 0.5:
        here.check_groups(optimizer)
    else:
        with pytest.raises(UserError, match=r"computes d from all matrices together.*trainer.shard_optimizer=false"):
            here.check_groups(optimizer)
