"""Runs on the GPUs of one machine, with a stand-in for train.py; and several processes at one grid."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pretraining.lock import RunLock
from sweeps import Plan, Sweep
from sweeps.claims import claim, release
from sweeps.slots import cores, environment, exit_code, launch, slots

GRID = Plan("grid", "quickstart", adam_lr=(0.02,), lr={"alice": (0.01, 0.02), "adam": (0.001, 0.003)})


@pytest.fixture
def gpus(monkeypatch):
    return lambda names: monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)


def test_without_gpus_as_many_runs_as_asked_for(gpus):
    gpus("")
    assert slots() == [()] and slots(3) == [(), (), ()]
    with pytest.raises(ValueError, match="shows no GPU"):
        slots(each=2)


def test_gpus_are_divided_among_the_runs(gpus):
    gpus("0,1,2,3")
    assert slots() == [("0",), ("1",), ("2",), ("3",)] and slots(2) == [("0",), ("1",)]
    assert slots(each=2) == [("0", "1"), ("2", "3")]
    assert slots(gpus=["4", "5", "6"], each=2) == [("4", "5")]
    assert slots(gpus=["0", "0"]) == [("0",), ("0",)]  # shared on purpose


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"jobs": 3, "each": 2}, "3 runs at a time with 2 GPUs each need 6 GPUs, not 4"),
        ({"each": 5}, "1 runs at a time with 5 GPUs each need 5 GPUs, not 4"),
        ({"gpus": ["0", "0"], "each": 2}, "gives a run the same GPU twice"),
    ],
)
def test_more_than_there_is_is_refused(gpus, asked, message):
    gpus("0,1,2,3")
    with pytest.raises(ValueError, match=message):
        slots(**asked)


def test_a_run_sees_its_gpus_and_its_share_of_the_cores():
    assert environment(("2", "3"), 2) == {
        "CUDA_VISIBLE_DEVICES": "2,3",
        "OMP_NUM_THREADS": str(max(1, cores() // 4)),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "100",  # of torchrun, below a job's warning of 120 s
    }
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" not in environment(("2",), 2)
    assert environment((), 1) == {}


def test_one_gpu_needs_no_launcher():
    assert launch(["python", "train.py"], ("0",)) == ["python", "train.py"]


def test_the_launcher_hides_the_exit_code_but_prints_it():
    text = "[0]:\n  exitcode  : 1 (pid: 7)\nRoot Cause (first observed failure):\n[0]:\n  exitcode  : 3 (pid: 8)\n"
    assert exit_code(1, text) == 3 and exit_code(1, "no such line") == 1 and exit_code(2, text) == 2


@pytest.mark.slow
def test_a_run_on_two_gpus_is_started_by_torchrun_and_its_divergence_is_seen(gpus, trainer, tmp_path):
    gpus("0,1")
    (tmp_path / "diverge").write_text("alice-lr0.02")
    plan = Plan("grid", "quickstart", adam_lr=(0.02,), lr={"alice": (0.01, 0.02)})
    sweep = Sweep(plan, tmp_path / "out", slots=slots(each=2), trainer=trainer)
    sweep.run()
    assert trainer.calls() == [[f"alice-lr{lr}-adam0.02-s42", "0,1", "0"] for lr in (0.01, 0.02)]
    assert not sweep.failed
    diverged = json.loads((tmp_path / "out/alice-lr0.02-adam0.02-s42/diverged.json").read_text())
    assert diverged["step"] == 7 and sweep.results["alice-lr0.01-adam0.02-s42"] > 50


def test_runs_at_a_time_have_a_gpu_each(gpus, trainer, tmp_path):
    gpus("0,1")
    Sweep(GRID, tmp_path / "out", slots=slots(), trainer=trainer).run()
    assert len(trainer.calls()) == 4 and {call[1] for call in trainer.calls()} == {"0", "1"}


def test_what_another_process_is_at_is_left_to_it(trainer, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    mine = claim(out / "alice-lr0.01-adam0.02-s42")
    with RunLock(out / "adam-lr0.001-adam0.02-s42"):  # a training that has outlived its sweep
        sweep = Sweep(GRID, out, trainer=trainer, patient=False)
        sweep.run()
    assert sorted(trainer.names()) == ["adam-lr0.003-adam0.02-s42", "alice-lr0.02-adam0.02-s42"]
    release(mine)
    Sweep(GRID, out, trainer=trainer).run()
    assert len(trainer.names()) == 4 and not list(out.glob(".*"))


def test_what_a_dead_process_was_at_is_taken_over(tmp_path):
    root = str(Path(__file__).resolve().parents[2])
    code = (
        f"import os, sys; sys.path.insert(0, {root!r}); from pathlib import Path; from sweeps.claims import claim;"
        f"claim(Path({str(tmp_path / 'run')!r})); os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    assert (tmp_path / ".run.sweep.lock").is_file()
    lock = claim(tmp_path / "run")
    assert lock is not None
    release(lock)


def test_a_run_that_another_process_has_ended_is_taken_from_its_record(trainer, tmp_path):
    out = tmp_path / "out"
    sweep = Sweep(GRID, out, trainer=trainer)
    sweep.out.mkdir()
    sweep.read()
    Sweep(GRID, out, trainer=trainer).run()
    sweep._fill()  # it still takes all four for missing
    assert len(trainer.names()) == 4 and len(sweep.results) == 1


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        claim(tmp_path / "file" / "run")
