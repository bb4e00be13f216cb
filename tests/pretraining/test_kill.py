"""Real training processes that are killed or told to stop, and started again by the same command.

What the runs leave is compared, bit for bit, with a run that was never disturbed. Where the kills fall is random.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

from pretraining.signals import EXIT_CODE
from scripts import soak

KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def server():
    with soak.ForkServer() as server:
        yield server


@pytest.fixture(scope="module")
def alice(server, tmp_path_factory):
    return soak.Soak(server, tmp_path_factory.mktemp("alice"), "alice-pack", random.Random(0))


@pytest.fixture
def copy(alice, tmp_path):
    return Path(shutil.copytree(alice.whole, tmp_path / "copy"))


def until(processes, reached):
    """Wait for a moment that comes while all processes live."""
    limit = time.monotonic() + soak.PATIENCE
    while not reached():
        codes = [process.poll() for process in processes]
        assert codes == [None] * len(codes), f"ended early: {codes}"
        assert time.monotonic() < limit
        time.sleep(0.0005)


def words(run_dir, *more):
    return [*soak.SETTINGS, *soak.VARIANTS["alice-pack"], f"run_dir={run_dir}", *more]


# Killed


def kill_until(one, enough, runs=4):
    while one.runs < runs and not one.problems and not enough():
        one.run(24)
    assert not one.problems, "\n".join(one.problems)
    assert enough(), one.kills


def test_a_run_that_is_killed_again_and_again_is_the_run_that_was_not(alice):
    """At least 20 times, in each of its parts, at least 5 times while a checkpoint is half written."""
    phases = {"start-up", "training", "evaluating", "saving", "ending"}
    kill_until(
        alice,
        lambda: (
            len(alice.kills) >= 20
            and sum(kill["partial"] for kill in alice.kills) >= 5
            and {kill["fell"] for kill in alice.kills} >= phases
        ),
    )
    assert alice.lines >= soak.STEPS + soak.STEPS // soak.EVAL_EVERY
    # Soak has held each process's first line against the last checkpoint; here: they were of many steps.
    assert len({kill["resumed_from"] for kill in alice.kills} - {None, 0}) >= 5


def test_one_whose_rows_come_from_another_process_leaves_no_process_behind(server, tmp_path):
    one = soak.Soak(server, tmp_path, "sophia-truncate", random.Random(1))
    one.run(5, last=1)
    assert not one.problems, "\n".join(one.problems)
    assert len(one.kills) >= 3
    assert {kill["resumed_from"] for kill in one.kills} - {None, 0}


def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def set_bit(file, part):
    """Change the lowest bit of the first number of the first tensor whose name holds ``part``."""
    content = bytearray(file.read_bytes())
    header = int.from_bytes(content[:8], "little")
    names = json.loads(content[8 : 8 + header])
    name = next(name for name in names if part in name)
    content[8 + header + names[name]["data_offsets"][0]] ^= 1
    file.write_bytes(content)


def swap_lines(file):
    first, second, *rest = file.read_text().splitlines(keepends=True)
    file.write_text("".join([second, first, *rest]))


LAST = f"checkpoints/step-{soak.STEPS:07d}"
SHARD = f"{LAST}/shard-00001-model-00001-of-00001.safetensors"


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda run: set_bit(run / "model/model.safetensors", "lm_head"), "model: lm_head"),
        (lambda run: set_bit(run / SHARD, "/Q"), f"{LAST}: optimizer/.*/Q differs"),
        (lambda run: set_bit(run / SHARD, "random/cpu"), "random/cpu differs"),
        (lambda run: edit(run / LAST / "state.json", '"step": 48', '"step": 47'), "state.json: step is 47, not 48"),
        (lambda run: edit(run / "metrics.jsonl", '"step": 7,', '"step": 8,'), "metrics.jsonl: .* instead of"),
        (lambda run: swap_lines(run / "metrics.jsonl"), "metrics.jsonl: .* instead of"),
        (lambda run: edit(run / "metrics.jsonl", '"grad_norm": 0.', '"grad_norm": 1.'), "metrics.jsonl: .* instead of"),
        (lambda run: edit(run / "metrics.jsonl", "{", "{}\n{"), "metrics.jsonl: .* instead of"),
        (lambda run: edit(run / "samples.txt", "The", "the"), "samples.txt differs"),
        (lambda run: edit(run / "summary.json", '"perplexity": ', '"perplexity": 1'), "summary.json: perplexity is 1"),
        (lambda run: (run / "checkpoints/.step-0000048.partial").mkdir(), "partial was left behind"),
        (lambda run: (run / "summary.json.new").touch(), "summary.json.new was left behind"),
        (lambda run: (run.parent / ".copy.lock").touch(), ".copy.lock was left beside it"),
        (lambda run: shutil.rmtree(run / "checkpoints/step-0000045"), "step-0000045/state.json is missing"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)  # fmt: skip
def test_the_comparison_sees_every_difference(alice, copy, damage, named):
    assert soak.compare(alice.whole, copy) == []
    damage(copy)
    found = "\n".join(soak.compare(alice.whole, copy))
    assert re.search(named, found), found


# Told to stop


def stopped_at(log, name):
    """The step that the last message names."""
    text = log.read_text()
    assert f"{name}: stopping after this step; a second signal leaves at once" in text
    return int(re.findall(rf"^stopped by {name} after step (\d+), which is saved: the same command", text, re.M)[-1])


def stop_twice(server, run, folder):
    """Send a second signal before the first has been obeyed; returns the checkpoints that were there."""
    for attempt in range(9):
        watch, log = soak.Watch(run), folder / f"twice-{attempt}.log"
        process = server.start(words(run), log)
        until([process], lambda w=watch: w.started() and w.last()[1] > w.resumes and w.last()[1] % 3 == 1)
        process.send_signal(signal.SIGTERM)
        while process.poll() is None and "stopping after this step" not in log.read_text():
            time.sleep(0.0005)
        process.send_signal(signal.SIGSTOP)  # it would have obeyed long before somebody loses patience
        time.sleep(1.2)
        before = watch.saved()
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        if process.wait() == EXIT_CODE:  # this process was too slow
            continue
        assert process.wait() == 128 + signal.SIGINT
        assert "second signal (SIGINT): leaving at once" in log.read_text()
        assert watch.saved() == before
        return before
    raise AssertionError("no second signal arrived in time")


def test_signals_save_and_the_same_command_continues(server, alice, tmp_path):
    """The first to the command itself, in an interpreter of its own, with a data process beside it."""
    run, saved = tmp_path / "run", []
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        watch, log = soak.Watch(run), tmp_path / f"{name}.log"
        if name == "SIGTERM":
            process = server.door(words(run, "data.workers=1"), log)
        else:
            process = server.start(words(run), log)
        until([process], lambda w=watch: w.started() and w.last()[1] >= w.resumes + 4)
        process.send_signal(getattr(signal, name))
        assert process.wait(soak.PATIENCE) == EXIT_CODE, log.read_text()
        assert server.strays() == []
        saved.append(stopped_at(log, name))
        assert watch.saved()[-1] == saved[-1]
        assert watch.last()[1] == saved[-1]
    assert saved == sorted(set(saved)) and saved[-1] < soak.STEPS

    before = stop_twice(server, run, tmp_path)
    assert server.start(words(run), tmp_path / "last.log").wait() == 0
    assert f"after step {before[-1]}\n" in (tmp_path / "last.log").read_text()
    assert soak.compare(alice.whole, run) == []


# Two ranks


SHORT = "trainer.steps=24"


def start_ranks(server, run_dir, log):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        server.start(words(run_dir, SHORT), log.with_suffix(f".{rank}"), RANK=rank, LOCAL_RANK=rank, **group)
        for rank in "01"
    ]


def test_two_ranks_stop_together_and_go_on(server, alice, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert [rank.wait() for rank in start_ranks(server, whole, tmp_path / "whole.log")] == [0, 0]

    # A launcher passes its signal on to all ranks.
    watch, log = soak.Watch(run), tmp_path / "torchrun.log"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    job = server.door(words(run, SHORT), log, launcher)
    until([job], lambda: watch.started() and watch.last()[1] >= 4)
    job.send_signal(signal.SIGTERM)
    assert job.wait(soak.PATIENCE) != 0
    assert server.strays() == []
    assert watch.saved()[-1] == watch.last()[1] == stopped_at(log, "SIGTERM")

    # One rank alone is told.
    watch, log = soak.Watch(run), tmp_path / "one.log"
    ranks = start_ranks(server, run, log)
    until(ranks, lambda: watch.started() and watch.last()[1] >= watch.resumes + 4)
    ranks[1].send_signal(signal.SIGTERM)
    assert [rank.wait() for rank in ranks] == [EXIT_CODE, EXIT_CODE]
    assert watch.saved()[-1] == watch.last()[1] > watch.resumes
    assert "stopped by a signal to another rank after step" in log.with_suffix(".0").read_text()

    # One rank is killed: the other one must not wait for ever.
    watch = soak.Watch(run)
    ranks = start_ranks(server, run, tmp_path / "killed.log")
    until(ranks, lambda: watch.started() and watch.last()[1] >= watch.resumes + 4)
    ranks[0].send_signal(signal.SIGKILL)
    codes = [rank.wait() for rank in ranks]
    assert codes[0] == KILLED and codes[1] not in (0, KILLED)
    assert watch.saved()[-1] > watch.resumes

    # On as many ranks as before, and on one.
    alone = Path(shutil.copytree(run, tmp_path / "alone"))
    assert server.start(words(alone, SHORT), tmp_path / "alone.log").wait() == 0
    assert [rank.wait() for rank in start_ranks(server, run, tmp_path / "last.log")] == [0, 0]
    assert soak.compare(whole, run) == []
    for ours, theirs in zip(
        soak.metrics_lines(alone / "metrics.jsonl"), soak.metrics_lines(whole / "metrics.jsonl"), strict=True
    ):
        assert (ours["kind"], ours["step"]) == (theirs["kind"], theirs["step"])
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
