"""Runs as jobs of a cluster: submitit's own executors, and a SLURM made of three shell scripts."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

pytest.importorskip("submitit")

from scripts import sweep as command
from sweeps import Plan, Sweep
from sweeps.cluster import Cluster, checked, read_options

NAMES = ["alice-lr0.01-adam0.02-s42", "alice-lr0.02-adam0.02-s42"]
PLAN = {"experiment": "quickstart", "adam_lr": [0.02], "lr": {"alice": [0.01, 0.02]}}
SEARCH = {"experiment": "quickstart", "search": {"trials": 4, "span": 10, "ranges": {"alice": {"lr": 0.02}}}}


@pytest.fixture
def call(tmp_path, trainer, capsys):
    def run(*words, plan=PLAN):
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
        code = command.main([str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out"), *words], trainer=trainer)
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def wait_for(what, seconds=60):
    until = time.monotonic() + seconds
    while not what() and time.monotonic() < until:
        time.sleep(0.1)
    assert what()


def test_a_grid_as_jobs_of_this_machine_lies_in_the_same_folders(call, trainer, tmp_path):
    code, printed = call("--executor", "local", "--jobs", "2", "--wait")
    assert code == 0 and sorted(trainer.names()) == NAMES, printed
    assert "submitted 2 jobs" in printed and "2 of 2 runs recorded" in printed
    assert all((tmp_path / "out" / name / "summary.json").is_file() for name in NAMES)
    assert (tmp_path / "out/.submitit/.gitignore").read_text() == "*\n"
    code, printed = call("--executor", "local", "--wait")
    assert code == 0 and "submitted 0 jobs." in printed and len(trainer.names()) == 2


def test_a_search_as_workers_that_share_its_journal(call, trainer):
    pytest.importorskip("optuna")
    code, printed = call("--executor", "local", "--jobs", "2", "--wait", plan=SEARCH)
    assert code == 0 and "submitted 2 jobs" in printed, printed
    assert sorted(trainer.names()) == [f"alice-t00{i}" for i in range(4)] and "4 of 4 runs recorded" in printed


def test_without_more_jobs_at_a_time_they_follow_one_another(call, trainer):
    assert "submitted 1 jobs" in call("--executor", "local", "--wait")[1]
    assert trainer.names() == NAMES


def test_in_this_process(call, trainer):
    code, printed = call("--executor", "debug")
    assert code == 0 and sorted(trainer.names()) == NAMES and "2 of 2 runs recorded" in printed


def test_what_still_runs_is_not_submitted_again_and_what_was_interrupted_goes_on(call, trainer, tmp_path):
    (tmp_path / "hang").write_text("alice-lr0.02")
    assert call("--executor", "local", "--jobs", "2")[0] == 0
    metrics = tmp_path / "out" / NAMES[1] / "metrics.jsonl"
    wait_for(metrics.is_file)
    _, printed = call("--executor", "local", "--jobs", "2")
    assert "1 jobs wait or run already" in printed and "submitted 0 jobs." in printed, printed
    # SLURM's warning: the run ends, and submitit starts the same job once more.
    (tmp_path / "hang").unlink()
    wait_for(lambda: trainer.names().count(NAMES[0]) == 1)
    number = json.loads((tmp_path / "out/.submitit/jobs.json").read_text())[NAMES[1]][1]
    children = Path(f"/proc/{number}/task/{number}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGUSR1)
    wait_for((tmp_path / "out" / NAMES[1] / "summary.json").is_file)
    assert trainer.names().count(NAMES[1]) == 2 and trainer.names().count(NAMES[0]) == 1


def test_a_job_that_ends_without_a_record_is_told_and_submitted_again_by_the_next_call(call, trainer, tmp_path):
    (tmp_path / "broken").write_text("alice-lr0.02")
    code, printed = call("--executor", "local", "--wait")
    assert code == 1 and f"error: {NAMES[1]} has ended without a record: read " in printed
    (tmp_path / "broken").unlink()
    code, printed = call("--executor", "local", "--wait")
    assert code == 0 and "submitted 1 jobs" in printed


# Enough of SLURM to run an array: sbatch starts the elements one after the other, sacct knows which have ended.
SBATCH = """#!/bin/bash
cp "$1" "$SLURM_STAND_IN/script.sh"
n=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$1")
echo "Submitted batch job 77"
( sleep 0.5; for i in $(seq 0 ${n:-0}); do
  SLURM_JOB_ID=$((77 + i)) SLURM_ARRAY_JOB_ID=77 SLURM_ARRAY_TASK_ID=$i bash "$1"; echo $i >> "$SLURM_STAND_IN/ended"
done ) >"$SLURM_STAND_IN/out" 2>&1 &
"""
SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do [[ "$1" == --output || "$1" == --error ]] && shift; shift; done
exec "$@"
"""
SACCT = """#!/bin/bash
echo "JobID|State|NodeList"
for i in 0 1; do
  if grep -qx $i "$SLURM_STAND_IN/ended" 2>/dev/null; then echo "77_$i|COMPLETED|n"; else echo "77_$i|RUNNING|n"; fi
done
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("sacct", SACCT)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_STAND_IN", str(folder))
    return folder


def test_an_array_of_slurm(call, trainer, tmp_path, slurm):
    (tmp_path / "cluster.yaml").write_text(
        "timeout_min: 600\nslurm_partition: cpu\nslurm_setup: ['module load cuda']\n"
    )
    words = ("--executor", "slurm", "--slurm", str(tmp_path / "cluster.yaml"), "--option", "slurm_partition=gpu")
    code, printed = call(*words, "--jobs", "5")
    assert code == 0 and "submitted 2 jobs: 77_0, 77_1." in printed, printed
    _, printed = call(*words)
    assert "2 jobs wait or run already: 77_0, 77_1." in printed and "submitted 0 jobs." in printed
    wait_for(lambda: len(list((tmp_path / "out").glob("*/summary.json"))) == 2)
    assert sorted(trainer.names()) == NAMES
    lines = (slurm / "script.sh").read_text().splitlines()
    wanted = ("--partition=gpu", "--time=600", "--requeue", "--array=0-1%2", "--signal=USR1@120", "--job-name=plan")
    assert {f"#SBATCH {option}" for option in wanted} <= set(lines)
    assert "module load cuda" in lines and "export SUBMITIT_PREEMPT_SIGNAL=USR1" in lines
    assert subprocess.run(["bash", "-n", str(slurm / "script.sh")], check=False).returncode == 0


def test_without_slurm_it_says_so(call, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, printed = call("--executor", "slurm", "--option", "timeout_min=10")
    assert code == 1 and "error: this machine has no SLURM" in printed


@pytest.mark.parametrize(
    ("executor", "options", "message"),
    [
        ("slurm", {}, "needs a time limit"),
        ("local", {"nodes": 2}, "nodes is 2, but a run of a sweep takes one node"),
        ("pbs", {}, "there is no executor pbs"),
    ],
)
def test_options_that_a_sweep_cannot_use_are_refused(executor, options, message):
    with pytest.raises(ValueError, match=message):
        checked(executor, options)


def test_an_option_that_submitit_does_not_know_is_refused(tmp_path, trainer):
    plan = Plan("grid", "quickstart", adam_lr=(0.02,), lr={"alice": (0.01,)})
    with pytest.raises(ValueError, match="submitit refuses an option"):
        Cluster(Sweep(plan, tmp_path / "out", trainer=trainer), "local", {"color": "red"}).submit()


def test_options_come_from_the_plan_then_the_file_then_the_command_line(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("b: 2\nc: 2\n")
    assert read_options(file, ["c=3"], {"a": 1, "b": 1}) == {"a": 1, "b": 2, "c": 3}
    file.write_text("- a list")
    with pytest.raises(ValueError, match="must hold options as KEY: VALUE"):
        read_options(file, [], {})
    with pytest.raises(ValueError, match="cannot read --option gpu: write KEY=VALUE"):
        read_options(None, ["gpu"], {})
