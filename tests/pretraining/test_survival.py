"""What may happen to a run: signals, numbers that are not finite, full disks, a second process, damaged checkpoints."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import pty
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from safetensors.torch import load_file

from data.errors import UserError
from data.sources import open_source
from pretraining import checkpoint, lock, storage
from pretraining import trainer as trainer_module
from pretraining.config import compose
from pretraining.lock import RunLock
from pretraining.record import _flatten, without_younger
from pretraining.restore import evaluate_saved
from pretraining.signals import EXIT_CODE, STOPPING, Stopped, StopSignals
from pretraining.trainer import NonFiniteLoss, Trainer, make_plan, train

from .test_trainer import ALICE, ROOT, config, lines, losses


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "model/model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return checkpoint._read(path)[0]


@pytest.fixture(autouse=True)
def as_in_a_terminal():
    """Here and in processes started here, whatever nohup or a shell's & have set."""
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGINT)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Eight steps, checkpoints after 2, 4, 6 and 8."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(config(folder, "trainer.save_every=2", "trainer.keep_last=9"))
    return folder


@pytest.fixture
def copy(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "run"))


# Signals


def send_at(monkeypatch, step: int, number: int = signal.SIGTERM) -> None:
    """Send the process a signal in the middle of a step."""
    original = Trainer._backward

    def backward(self, rows, targets):
        if self.done + 1 == step:
            os.kill(os.getpid(), number)
        return original(self, rows, targets)

    monkeypatch.setattr(Trainer, "_backward", backward)


@pytest.mark.parametrize("name", [number.name for number in STOPPING])
def test_a_signal_saves_at_the_end_of_the_step_and_the_same_command_continues(run, tmp_path, monkeypatch, name):
    cfg = config(tmp_path / "run", "trainer.save_every=2", "trainer.keep_last=9")
    with monkeypatch.context() as patch:
        send_at(patch, 3, getattr(signal, name))
        with pytest.raises(
            Stopped, match=f"stopped by {name} after step 3, which is saved: the same command continues"
        ):
            train(cfg)
    assert checkpoint.list_checkpoints(tmp_path / "run/checkpoints")[-1].name == "step-0000003"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train(config(tmp_path / "run", "trainer.save_every=2", "trainer.keep_last=9"))
    assert losses(tmp_path / "run") == losses(run)
    assert same(weights(tmp_path / "run"), weights(run))
    assert (tmp_path / "run/samples.txt").read_text() == (run / "samples.txt").read_text()


def test_a_signal_during_an_evaluation_waits_for_none_of_it(run, tmp_path, monkeypatch):
    """The evaluation is made up for, once, even if the process that makes up for it is killed before it can save."""
    calls = []
    original = trainer_module.evaluate

    def evaluate(*arguments):
        calls.append(1)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(*arguments)

    settings = ["trainer.save_every=3", "trainer.keep_last=9"]
    monkeypatch.setattr(trainer_module, "evaluate", evaluate)
    with pytest.raises(Stopped, match="after step 4, which is saved"):
        train(config(tmp_path / "run", *settings))
    assert [line["step"] for line in lines(tmp_path / "run", "eval")] == []

    class Killed(Exception):
        pass

    def die(self):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", die)
        with pytest.raises(Killed):
            train(config(tmp_path / "run", *settings))
    assert [line["step"] for line in lines(tmp_path / "run", "eval")] == [4]
    train(config(tmp_path / "run", *settings))
    assert losses(tmp_path / "run") == losses(run)


def test_a_run_stays_at_the_commit_of_the_data_set_that_it_began_with(tmp_path, monkeypatch):
    """The set's branch moves while the run stands still; the sample's text stands for the set's."""
    branch = ["a" * 40]

    def open_hub(cfg, split, on_error):
        source = open_source({"kind": "sample"}, split)
        source.description["revision"] = cfg["revision"] or branch[0]
        return source

    monkeypatch.setattr("data.sources._open_hub", open_hub)
    settings = ["data=hub", "data.name=some/set", "data.length=32", "data.validation_max_tokens=2000"]
    with monkeypatch.context() as patch:
        send_at(patch, 3)
        with pytest.raises(Stopped, match="after step 3, which is saved"):
            train(config(tmp_path / "run", *settings))
    branch[0] = "b" * 40
    train(config(tmp_path / "run", *settings))
    environment = json.loads((tmp_path / "run/environment.json").read_text())
    began, (resumed,) = environment["data"], environment["resumed"]
    assert began["train"]["revision"] == "a" * 40 and resumed["data"] == began
    saved = tmp_path / "run/checkpoints/step-0000008"
    train(config(tmp_path / "branched", *settings, "trainer.steps=10", f"trainer.resume={saved}"))
    train(config(tmp_path / "new", *settings, "trainer.steps=1"))
    for name, letter in (("branched", "a"), ("new", "b")):
        environment = json.loads((tmp_path / name / "environment.json").read_text())
        assert environment["data"]["train"]["revision"] == letter * 40

    revisions = []
    monkeypatch.setattr(
        "data.sources._open_hub", lambda cfg, *rest: revisions.append(cfg["revision"]) or open_hub(cfg, *rest)
    )
    evaluate_saved(compose([f"checkpoint={tmp_path / 'run'}"], root="eval"))
    assert revisions == ["a" * 40]


def test_a_branch_is_looked_up_once_for_all_parts_of_a_run(tmp_path, monkeypatch):
    class Reached(Exception):
        pass

    def published(cfg, *_, **__):
        opened.append(cfg.revision)
        raise Reached

    def open_hub(cfg, split, on_error):
        opened.append(cfg["revision"])
        source = open_source({"kind": "sample"}, split)
        source.description["revision"] = "a" * 40
        return source

    opened: list[str | None] = []
    monkeypatch.setattr("data.sources._open_hub", open_hub)
    monkeypatch.setattr("data.published.PublishedBatches", published)
    settings = ["data=hub", "data.name=some/set", "data.rows=truncate", "data.protocol=published"]
    with pytest.raises(Reached):
        train(config(tmp_path / "run", *settings))
    assert opened == [None, "a" * 40, "a" * 40]


def test_a_signal_without_checkpoints_says_that_nothing_is_saved(tmp_path, monkeypatch):
    send_at(monkeypatch, 2)
    with pytest.raises(Stopped, match=r"after step 2; trainer\.save_every=0: nothing is saved"):
        train(config(tmp_path / "run", "trainer.save_every=0"))


def test_a_signal_before_the_first_step_ends_the_run_there(tmp_path, monkeypatch):
    original = Trainer._check_room
    monkeypatch.setattr(Trainer, "_check_room", lambda self: (os.kill(os.getpid(), signal.SIGTERM), original(self))[1])
    with pytest.raises(Stopped, match="before the first step"):
        train(config(tmp_path / "run"))
    assert lines(tmp_path / "run") == []


def test_the_second_signal_ends_the_process_at_once():
    program = (
        "import os, signal, time\nfrom pretraining.signals import StopSignals\n"
        "with StopSignals() as s:\n    os.kill(os.getpid(), signal.SIGUSR1); assert s.received == 'SIGUSR1'\n"
        "    os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 128 + signal.SIGTERM
    assert "SIGUSR1: stopping after this step" in done.stderr and "second signal (SIGTERM)" in done.stderr


def test_outside_the_main_thread_signals_are_left_alone():
    seen = []

    def enter():
        with StopSignals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]


def test_the_exit_code_is_the_documented_one():
    assert Stopped.exit_code == EXIT_CODE == 75
    assert "75" in (ROOT / "docs/checkpoints.md").read_text()


# Numbers that are not finite


def poison(monkeypatch, *steps: int, value: float = math.nan) -> None:
    original = Trainer._backward

    def backward(self, rows, targets):
        loss = original(self, rows, targets)
        if self.done + 1 in steps:
            self.model.model.layers[0].mlp.up_proj.weight.grad[0, 0] = value
        return loss

    monkeypatch.setattr(Trainer, "_backward", backward)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_skipped_step_changes_neither_weights_nor_states(tmp_path, monkeypatch, value):
    poison(monkeypatch, 4, value=value)
    folder = tmp_path / "run"
    train(config(folder, "trainer.on_nonfinite=skip", "trainer.save_every=1", "trainer.keep_last=9"))
    before, after = (tensors_of(folder / f"checkpoints/step-000000{n}") for n in (3, 4))
    assert same(before, after)
    numbers = [json.loads((folder / f"checkpoints/step-000000{n}/state.json").read_text()) for n in (3, 4)]
    assert numbers[0]["numbers"] == numbers[1]["numbers"]
    (skipped,) = lines(folder, "skipped")
    assert skipped["step"] == 4 and skipped["grad_norm"] is None and math.isfinite(skipped["loss"])
    assert [line["step"] for line in lines(folder, "train")] == [1, 2, 3, 5, 6, 7, 8]
    assert json.loads((folder / "summary.json").read_text())["skipped_steps"] == 1


def test_too_many_skipped_steps_stop_the_run_and_resuming_does_not_forget_them(tmp_path, monkeypatch):
    poison(monkeypatch, 2, 3, 6)
    settings = ["trainer.on_nonfinite=skip", "trainer.max_skipped=2", "trainer.save_every=1"]
    for _ in range(2):  # the second time from the checkpoint of step 5
        with pytest.raises(NonFiniteLoss, match=r"not finite at step 6 .*and 2 steps were skipped before"):
            train(config(tmp_path / "run", *settings))
    train(config(tmp_path / "run", *settings[:1], "trainer.max_skipped=3", "trainer.save_every=1"))
    assert json.loads((tmp_path / "run/summary.json").read_text())["skipped_steps"] == 3


def test_a_run_that_was_stopped_may_go_on_by_skipping(tmp_path, monkeypatch):
    poison(monkeypatch, 5)
    with pytest.raises(NonFiniteLoss):
        train(config(tmp_path / "run"))
    train(config(tmp_path / "run", "trainer.on_nonfinite=skip"))
    assert [line["step"] for line in lines(tmp_path / "run", "skipped")] == [5]


class Lagging(Trainer):
    """As on a GPU: figures are read one step late."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.lag = 1


def test_figures_that_are_read_late_are_the_same(run, tmp_path):
    cfg = config(tmp_path / "run", "trainer.save_every=3", "trainer.keep_last=9")
    Lagging(cfg, make_plan(cfg)).run()
    assert losses(tmp_path / "run") == losses(run)
    assert same(weights(tmp_path / "run"), weights(run))


@pytest.mark.parametrize("step", [4, 5, 8])
def test_what_is_not_finite_is_seen_late_but_before_anything_is_saved(tmp_path, monkeypatch, step):
    poison(monkeypatch, step)
    cfg = config(
        tmp_path / "run", "trainer.save_every=1" if step != 5 else "trainer.save_every=6", "trainer.keep_last=99"
    )
    with pytest.raises(NonFiniteLoss, match=f"at step {step} "):
        Lagging(cfg, make_plan(cfg)).run()
    for path in checkpoint.list_checkpoints(tmp_path / "run/checkpoints"):
        assert checkpoint.step_of(path) < step
        assert all(torch.isfinite(x).all() for x in tensors_of(path).values() if x.is_floating_point())


def test_clipping_bounds_the_gradient_that_the_optimizer_sees(tmp_path, monkeypatch):
    norms = []
    original = Trainer._update

    def update(self, *arguments):
        norms.append(torch.stack([p.grad.norm() for p in self.model.parameters()]).norm().item())
        return original(self, *arguments)

    monkeypatch.setattr(Trainer, "_update", update)
    train(config(tmp_path / "run", "trainer.grad_clip=0.5", "trainer.steps=3"))
    assert norms == pytest.approx([0.5] * 3, rel=1e-4)
    assert all(line["grad_norm"] > 0.5 for line in lines(tmp_path / "run", "train"))  # the record has it unclipped


# The disk


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_make_batches", lambda self: pytest.fail("began to work"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*choose a run_dir"):
        train(config(tmp_path / "file" / "run"))
    full = SimpleNamespace(free=10_000)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: full)
    with pytest.raises(
        UserError, match=r"has 0\.00 GiB free, and this run needs about .* \(3 checkpoints of .* model\)"
    ):
        train(config(tmp_path / "run"))


def test_room_that_the_run_takes_already_is_not_asked_for_again(copy, monkeypatch):
    (copy / "summary.json").unlink()
    taken = sum(file.stat().st_size for file in (copy / "checkpoints").rglob("*"))
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    storage.check_folder(copy, taken - 100_000, "")
    with pytest.raises(UserError, match="free some space"):
        storage.check_folder(copy, taken + 100_000, "")


def test_a_disk_that_fills_up_leaves_the_last_checkpoint_and_the_record(tmp_path):
    """A real limit of the system: files may not grow past 200 kB, which the checkpoints do after step 4."""
    program = f"""
import resource, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from tests.pretraining.test_survival import *
class Small(Trainer):
    def _save(self):
        if self.done == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        super()._save()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
trainer_module.Trainer = Small
try:
    train(config(Path({str(tmp_path)!r}) / "run", "trainer.save_every=2"))
except UserError as error:
    print(error)
    raise SystemExit(7)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 7, done.stderr[-2000:]
    assert "the checkpoint of step 6 could not be written" in done.stdout and "step-0000004 is untouched" in done.stdout
    left = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert left == ["step-0000002", "step-0000004"]
    for name in left:
        checkpoint.verify(tmp_path / "run/checkpoints" / name)
    train(config(tmp_path / "run", "trainer.save_every=2"))
    assert [line["step"] for line in lines(tmp_path / "run", "train")] == list(range(1, 9))


def test_a_record_that_cannot_be_written_says_so(tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write_json(file, values):
        raise full

    cfg = config(tmp_path / "run")
    trainer = Trainer(cfg, make_plan(cfg))
    monkeypatch.setattr("pretraining.record.write_json", write_json)
    with pytest.raises(UserError, match=r"record in .* cannot be written \(No space left on device\): free some space"):
        trainer.record.summary({})
    trainer.batches.close()


# Checkpoints


def test_checkpoints_are_verified_by_sha256sum_too(run):
    path = run / "checkpoints/step-0000004"
    done = subprocess.run(
        ["sha256sum", "--check", "--quiet", checkpoint.SUMS], cwd=path, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == done.stderr == ""


def test_every_damage_is_named_and_the_one_before_offered(copy):
    (copy / "summary.json").unlink()
    path = copy / "checkpoints/step-0000008"
    names = sorted(file.name for file in path.iterdir())
    assert len(names) >= 3
    for name in names:
        file, good = path / name, (path / name).read_bytes()
        middle = len(good) // 2
        flipped = bytes([*good[:middle], good[middle] ^ 1, *good[middle + 1 :]])
        for bad in (good[:-1], good[: len(good) // 2], b"", flipped, good + b" ", None):
            file.unlink() if bad is None else file.write_bytes(bad)
            offered = "step-0000006"
            if bad is None and name == checkpoint.STATE:  # not a whole checkpoint: `auto` takes the one before
                assert checkpoint.list_checkpoints(copy / "checkpoints")[-1].name == offered
                file.write_bytes(good)
                continue
            with pytest.raises(UserError, match=offered) as caught:
                train(config(copy, "trainer.save_every=2", "trainer.keep_last=9"))
            # A damaged list of checksums may put the blame on a file that it lists.
            assert name in str(caught.value) or name == checkpoint.SUMS
            file.write_bytes(good)
    (path / "extra.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"extra.bin does not belong to this checkpoint.*step-0000006"):
        train(config(copy, "trainer.save_every=2", "trainer.keep_last=9"))


def test_the_one_before_can_be_resumed_as_offered(copy, run):
    (copy / "summary.json").unlink()
    (copy / "checkpoints/step-0000008" / checkpoint.STATE).write_bytes(b"{}")
    settings = ["trainer.save_every=2", "trainer.keep_last=9"]
    with pytest.raises(UserError) as caught:
        train(config(copy, *settings))
    offered = str(caught.value).split("trainer.resume=")[1].split(",")[0]
    train(config(copy, *settings, f"trainer.resume={offered}"))
    assert losses(copy) == losses(run) and same(weights(copy), weights(run))


def test_eval_refuses_a_damaged_checkpoint(copy):
    path = copy / "checkpoints/step-0000004"
    file = next(path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match=f"{file.name} is not what was saved .*step-0000002"):
        evaluate_saved(compose([f"checkpoint={path}"], root="eval"))


def test_a_crash_while_saving_leaves_the_previous_one_and_nothing_else_in_the_way(copy, run, monkeypatch):
    """At every point of a save at which the process can die."""
    (copy / "summary.json").unlink()
    settings = ["trainer.save_every=2", "trainer.keep_last=2", f"trainer.resume={copy}/checkpoints/step-0000004"]

    class Crash(BaseException):
        pass

    points = ["_make_empty", "write_sums", "_put_in_place", "_prune", "_sync"]
    for point in points:
        shutil.rmtree(copy)
        shutil.copytree(run, copy)
        (copy / "summary.json").unlink()
        with monkeypatch.context() as patch:
            original = getattr(checkpoint, point)

            def crash(*arguments, original=original, point=point):
                if point in ("write_sums", "_sync"):
                    original(*arguments)
                raise Crash

            patch.setattr(checkpoint, point, crash)
            with pytest.raises(Crash):
                train(config(copy, *settings))
        for path in checkpoint.list_checkpoints(copy / "checkpoints"):
            checkpoint.verify(path)
        train(config(copy, *settings[:2]))
        assert losses(copy) == losses(run)
        names = [p.name for p in (copy / "checkpoints").iterdir() if not p.name.startswith("before-")]
        assert sorted(names) == ["step-0000006", "step-0000008"]


def test_a_run_folder_that_another_node_does_not_see_is_refused(tmp_path, monkeypatch):
    """Else that node would write its part to a disk of its own, and the checkpoint be without it."""
    monkeypatch.setattr(checkpoint, "_make_empty", lambda partial: None)  # as it looks on the other node
    monkeypatch.setattr(checkpoint, "VISIBLE_SECONDS", 0.0)
    with pytest.raises(UserError, match="put run_dir on a disk that all nodes share"):
        train(config(tmp_path / "run", "trainer.save_every=2"))


def test_keep_every_keeps_more_than_the_last(tmp_path):
    train(config(tmp_path / "run", "trainer.save_every=1", "trainer.keep_last=1", "trainer.keep_every=3"))
    assert [checkpoint.step_of(p) for p in checkpoint.list_checkpoints(tmp_path / "run/checkpoints")] == [3, 6, 8]


def test_loading_unpickles_nothing(copy, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("unpickled")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, refuse)
    (copy / "summary.json").unlink()
    cfg = config(copy, "trainer.save_every=2", "trainer.keep_last=9", f"trainer.resume={copy}/checkpoints/step-0000006")
    trainer = Trainer(cfg, make_plan(cfg))
    assert trainer.done == 6
    trainer.batches.close()


def test_all_global_random_states_come_back(copy):
    (copy / "summary.json").unlink()
    settings = ["trainer.save_every=2", "trainer.keep_last=9"]
    random.seed(5), np.random.seed(6), torch.manual_seed(7)
    random.gauss(0, 1), np.random.normal()  # both keep a second number
    cfg = config(copy, *settings, f"trainer.resume={copy}/checkpoints/step-0000002")
    trainer = Trainer(cfg, make_plan(cfg))
    random.seed(5), np.random.seed(6), torch.manual_seed(7)
    random.gauss(0, 1), np.random.normal()
    path = checkpoint.save(
        copy / "x", 1, trainer.model, trainer.optimizer, {"optimizer": trainer.record.config["optimizer"]}, 1
    )

    def draws():
        return [random.gauss(0, 1), random.random(), np.random.normal(), np.random.normal(), torch.rand(()).item()]

    expected = draws()
    assert draws() != expected
    checkpoint.load(path, trainer.model, trainer.optimizer, trainer.record.config)
    assert draws() == expected
    trainer.batches.close()


@pytest.mark.parametrize("optimizer", ["alice", "racs", "muon", "adam"])
@pytest.mark.parametrize(("first", "then"), [("fp32", "bf16"), ("bf16", "fp32"), ("fp32", "bf16_mixed")])
def test_a_checkpoint_opens_in_another_precision(tmp_path, optimizer, first, then):
    """In a run folder of its own; the weights are rounded or widened.

    States stay what they were; a library's class puts its own into the weights' dtype.
    """
    more = [f"optimizer={optimizer}", *(ALICE[1:] if optimizer == "alice" else []), "trainer.sample_tokens=0"]
    train(config(tmp_path / "first", *more, f"trainer.precision={first}"))
    path = tmp_path / "first/checkpoints/step-0000004"
    cfg = config(tmp_path / "then", *more, f"trainer.precision={then}", f"trainer.resume={path}")
    trainer = Trainer(cfg, make_plan(cfg))
    saved = tensors_of(path)
    own, _ = checkpoint.optimizer_state(trainer.model, trainer.optimizer)
    for name, x in own.items():
        theirs = saved[name].to(x.dtype) if optimizer == "adam" else saved[name]
        assert torch.equal(x, theirs) and x.dtype == theirs.dtype
    assert len(own) > 10
    trainer.run()
    there, here = (lines(tmp_path / name, "train")[-1]["loss"] for name in ("first", "then"))
    assert here == pytest.approx(there, rel=0.05)


def test_weight_decay_of_a_run_that_goes_on_elsewhere_is_its_own(run, tmp_path):
    start = f"trainer.resume={run}/checkpoints/step-0000004"
    cfg = config(tmp_path / "then", "optimizer.weight_decay=0.25", start)
    trainer = Trainer(cfg, make_plan(cfg))
    groups = trainer.optimizer.param_groups
    assert [group["weight_decay"] for group in groups if not group["adam"]] == [0.25]
    trainer.batches.close()


def test_a_setting_that_is_younger_than_the_run_has_its_default(copy):
    """In the record and in the checkpoint; another value of it is another run."""
    file, more = copy / "config.yaml", ["trainer.save_every=2", "trainer.keep_last=9"]
    cfg = yaml.safe_load(file.read_text())
    del cfg["optimizer"]["fix_signs"], cfg["trainer"]["warmup_fraction"]
    file.write_text(yaml.safe_dump(cfg))
    path = copy / "checkpoints/step-0000004"
    with pytest.raises(UserError, match=r"optimizer.fix_signs: None there, False here"):
        train(config(copy, *more, "optimizer.fix_signs=false", f"trainer.resume={path}"))
    state = path / "state.json"
    saved = json.loads(state.read_text())
    del saved["optimizer"]["fix_signs"]
    with pytest.raises(UserError, match=r"optimizer.fix_signs=None, not False"):
        checkpoint._check_options(
            path, saved["optimizer"], {**cfg, "optimizer": {**cfg["optimizer"], "fix_signs": False}}
        )
    checkpoint._check_options(path, saved["optimizer"], {**cfg, "optimizer": {**cfg["optimizer"], "fix_signs": True}})
    train(config(copy, *more, f"trainer.resume={path}"))


@pytest.mark.parametrize("data", ["c4", "hub", "c4_local", "text", "prepared"])
def test_defaults_are_those_of_the_runs_own_model_data_and_seed(data):
    given = {"c4": [], "hub": ["data.name=a/b"]}.get(data, ["data.path=x"])
    cfg = compose([f"data={data}", "model=llama_tiny", "optimizer=alice", "seed=43", *given])
    here = dict(_flatten(OmegaConf.to_container(cfg, resolve=True)))
    younger = {"optimizer.rank", "optimizer.leading", "optimizer.seed", "trainer.grad_clip", "data.rows"}
    there = {key: value for key, value in here.items() if key not in younger}
    config = OmegaConf.to_container(cfg, resolve=True)
    assert without_younger(here, there, config).keys() == there.keys()
    other = {**here, "optimizer.leading": 40}  # of 60M
    assert without_younger(other, there, config).keys() == there.keys() | {"optimizer.leading"}


# The record


def test_a_damaged_record_is_named(copy):
    (copy / "summary.json").unlink()
    settings = ["trainer.save_every=2", "trainer.keep_last=9", f"trainer.resume={copy}/checkpoints/step-0000004"]
    for name, bad, message in (
        ("metrics.jsonl", b'{"kind": "train"}\n', "metrics.jsonl, line 1: not a line of a run record"),
        ("metrics.jsonl", b"\xff\xfe\n", "metrics.jsonl, line 1"),
        ("metrics.jsonl", b"[]\n{}\n", "metrics.jsonl, line 1"),
        ("config.yaml", b"a: [1, 2", "config.yaml is not the configuration of a run"),
        ("config.yaml", b"\x00", "config.yaml is not the configuration of a run"),
        ("config.yaml", b"- 1\n", "config.yaml is not the configuration of a run"),
        ("environment.json", b"{", "environment.json cannot be read"),
    ):
        good = (copy / name).read_bytes()
        (copy / name).write_bytes(bad)
        with pytest.raises(UserError, match=message):
            train(config(copy, *settings))
        (copy / name).write_bytes(good)
    train(config(copy, *settings))


def test_time_and_waiting_are_counted_over_all_processes(copy):
    before = json.loads((copy / "summary.json").read_text())
    assert 0 <= before["data_share"] < 1
    state = json.loads((copy / "checkpoints/step-0000006/state.json").read_text())["meters"]
    assert state["every"]["steps"] == 6
    (copy / "summary.json").unlink()
    train(
        config(copy, "trainer.save_every=2", "trainer.keep_last=9", f"trainer.resume={copy}/checkpoints/step-0000006")
    )
    after = json.loads((copy / "summary.json").read_text())
    assert after["training_seconds"] > state["every"]["seconds"]
    assert after["wall_seconds"] > state["wall_seconds"]


# What killing a real process has found (scripts/soak.py)


class Killed(BaseException):
    """Nothing of ours catches it."""


def killed(cfg):
    with pytest.raises(Killed):
        train(cfg)


@pytest.mark.parametrize("place", ["before pruning", "in the middle of it"])
def test_a_crash_after_the_last_save_is_tidied_up(tmp_path, monkeypatch, place):
    cfg = config(tmp_path / "run", "trainer.save_every=2", "trainer.keep_last=2")
    with monkeypatch.context() as patch:
        prune, rmtree = checkpoint._prune, shutil.rmtree

        def stop_before(folder, *more):
            if (folder / "step-0000008").exists():
                raise Killed
            prune(folder, *more)

        def stop_within(path, **more):
            if Path(path).name == ".step-0000004.old" and not more:
                raise Killed
            rmtree(path, **more)

        if place == "before pruning":
            patch.setattr(checkpoint, "_prune", stop_before)
        else:
            patch.setattr(checkpoint.shutil, "rmtree", stop_within)
        killed(cfg)
    train(cfg)
    assert sorted(os.listdir(tmp_path / "run/checkpoints")) == ["step-0000006", "step-0000008"]


def test_a_signal_during_a_save_does_not_put_the_checkpoint_at_risk_again(tmp_path, monkeypatch):
    """Written again under its own name it would first have to go: with keep_last=1 there is no other."""
    cfg, saved, save = config(tmp_path / "run", "trainer.save_every=2", "trainer.keep_last=1"), [], checkpoint.save

    def save_and_be_told(folder, step, *more):
        if step == 4 and step not in saved:
            os.kill(os.getpid(), signal.SIGTERM)
        saved.append(step)
        return save(folder, step, *more)

    monkeypatch.setattr(checkpoint, "save", save_and_be_told)
    with pytest.raises(Stopped, match="after step 4, which is saved"):
        train(cfg)
    assert saved == [2, 4]


def test_the_lock_of_a_process_that_was_killed_at_its_very_end_goes(copy):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    file = copy.parent / f".{copy.name}.lock"
    file.write_text(json.dumps({**lock._ourselves(), "pid": child.pid}))
    train(config(copy, "trainer.save_every=2", "trainer.keep_last=9"))
    assert not file.exists()


@pytest.mark.parametrize("cut", [b"--- ste", "--- step 8\nTh\u00e9".encode()[:-1]])
def test_samples_that_a_full_disk_has_cut_are_written_again(copy, cut):
    file = copy / "samples.txt"
    whole = file.read_bytes()
    shutil.rmtree(copy / "checkpoints/step-0000008")
    (copy / "summary.json").unlink()
    file.write_bytes(whole[: whole.index(b"--- step 8")] + cut)
    train(config(copy, "trainer.save_every=2", "trainer.keep_last=9"))
    assert file.read_bytes() == whole


def test_a_launchers_echo_of_a_signal_is_not_a_second_one(monkeypatch):
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # torchrun passes on what SLURM has sent to all
        assert signals.received == "SIGTERM"


def test_what_is_gone_asks_for_nothing_twice():
    """A closed terminal and a launcher that has ended come beside what somebody asked for, in any order."""
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received == "SIGINT"
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGTERM)  # torchrun and sweep.py, which have received it too
        assert signals.received == "SIGHUP"


def test_nohup_keeps_a_run_alive():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received is None
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


# Waits until it is asked to stop and `done` says that its launcher or its terminal is gone, then writes what asked.
WAITING = """
import os, pathlib, sys, time
from pretraining.signals import StopSignals
parent = os.getppid()
with StopSignals() as signals:
    print("waiting", flush=True)
    limit = time.monotonic() + 60
    while not (signals.received and {done}) and time.monotonic() < limit:
        time.sleep(0.05)
    time.sleep(0.3)
    print("a line that nobody reads", flush=True)
    print("another one", file=sys.stderr, flush=True)
    pathlib.Path(sys.argv[1]).write_text(str(signals.received))
"""


def wait_for(file: Path) -> str:
    limit = time.monotonic() + 60
    while not (file.is_file() and file.read_text()) and time.monotonic() < limit:
        time.sleep(0.05)
    return file.read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process is not told that its launcher has ended")
@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP", "SIGUSR1"])
def test_a_signal_to_launcher_and_run_alike_lets_the_run_save(tmp_path, name):
    """Ctrl-C under `accelerate launch` of one process reaches both; the launcher ends at once, and passes nothing on."""
    launcher = (
        "import os, subprocess, sys\n"
        "os.environ['ACCELERATE_MIXED_PRECISION'] = 'no'\n"
        "subprocess.Popen([sys.executable, '-c', sys.argv[1], sys.argv[2]]).wait()\n"
    )
    program = WAITING.format(done="os.getppid() != parent")
    environment = {k: v for k, v in os.environ.items() if k != "TORCHELASTIC_RUN_ID"}
    job = subprocess.Popen(
        [sys.executable, "-c", launcher, program, str(tmp_path / "asked")],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True, text=True,
    )  # fmt: skip
    assert job.stdout.readline() == "waiting\n"
    os.killpg(job.pid, getattr(signal, name))
    assert job.wait(60) == -getattr(signal, name)
    assert wait_for(tmp_path / "asked") == name
    job.stdout.close()


def test_a_run_whose_terminal_is_closed_can_still_write_and_save(tmp_path):
    program = WAITING.format(done="True")
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", program, str(tmp_path / "asked")])
    while b"waiting" not in os.read(terminal, 1000):
        pass
    os.close(terminal)  # as when the window or the connection goes
    assert os.waitpid(pid, 0)[1] == 0
    assert (tmp_path / "asked").read_text() == "SIGHUP"


def test_the_seed_reaches_pythons_and_numpys_generators(tmp_path):
    drawn = []
    for other in (1, 2):
        random.seed(other)
        np.random.seed(other)
        cfg = config(tmp_path / str(other))
        Trainer(cfg, make_plan(cfg)).batches.close()
        drawn.append((random.random(), np.random.rand()))
    assert drawn[0] == drawn[1]


def test_what_a_killed_process_left_beside_its_lock_goes(tmp_path):
    old, new = tmp_path / f".run.lock.{'0' * 32}", tmp_path / f".run.lock.{'1' * 32}"
    for path in (old, new):
        path.write_text("")
    os.utime(old, (0, 0))
    with RunLock(tmp_path / "run"):
        assert not old.exists() and new.exists()  # the new one may be in use at this instant


# Two runs in one folder


def holder(**more) -> str:
    return json.dumps({"host": "elsewhere", "machine": "another boot", "pid": 1, "began": "1", "id": "x", **more})


def test_a_second_process_is_refused_while_the_first_lives(tmp_path):
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom pretraining.lock import RunLock\n"
        f"with RunLock(Path({str(tmp_path / 'run')!r})):\n    print('held', flush=True); time.sleep(300)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"is being written by process {other.pid} on {socket.gethostname()}"):
            train(config(tmp_path / "run"))
        assert not (tmp_path / "run").exists()
    finally:
        other.kill()
        other.wait()
    train(config(tmp_path / "run", "trainer.steps=1"))  # its lock is stale now
    assert (tmp_path / "run/summary.json").exists()
    assert not list(tmp_path.glob(".run.lock*"))


def test_a_process_number_that_was_given_away_again_does_not_hold_a_lock(tmp_path):
    own = json.loads(RunLock(tmp_path / "run")._text)
    (tmp_path / ".run.lock").write_text(json.dumps({**own, "began": "12345"}))
    with RunLock(tmp_path / "run"):
        pass
    (tmp_path / ".run.lock").write_text(json.dumps(own))
    if own["began"] is not None:
        with pytest.raises(UserError, match="is being written by process"), RunLock(tmp_path / "run"):
            pass


def test_a_lock_of_another_machine_is_stale_only_after_silence(tmp_path, monkeypatch, capsys):
    path = tmp_path / ".run.lock"
    path.write_text(holder())
    os.utime(path, (time.time() - 3600,) * 2)  # silent for an hour
    with RunLock(tmp_path / "run"):
        assert json.loads(path.read_text())["pid"] == os.getpid()

    path.write_text(holder())
    monkeypatch.setattr(lock, "SILENCE", 0.5)
    monkeypatch.setattr(lock, "HEARTBEAT", 0.2)
    began = time.monotonic()
    with RunLock(tmp_path / "run"):
        assert time.monotonic() - began > 0.3
    assert "waiting up to" in capsys.readouterr().err

    path.write_text(holder())
    monkeypatch.setattr(lock, "SILENCE", 60)
    beat = threading.Timer(0.3, lambda: os.utime(path, (time.time() + 5,) * 2))
    beat.start()
    with pytest.raises(UserError, match="is being written by process 1 on elsewhere"), RunLock(tmp_path / "run"):
        pass
    assert json.loads(path.read_text())["host"] == "elsewhere"  # left alone


@pytest.mark.parametrize("text", ["", "[]", "{", '{"pid": "x"}'])
def test_a_lock_that_cannot_be_read_is_given_time(tmp_path, monkeypatch, text):
    monkeypatch.setattr(lock, "SILENCE", 0.3)
    (tmp_path / ".run.lock").write_text(text)
    with RunLock(tmp_path / "run"):
        pass
    assert not (tmp_path / ".run.lock").exists()


def test_a_lock_that_was_lost_stops_the_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.05)
    with RunLock(tmp_path / "run") as held:
        held.check()
        (tmp_path / ".run.lock").write_text(holder())
        for _ in range(200):
            if held.lost:
                break
            time.sleep(0.02)
        with pytest.raises(UserError, match="was taken over by another process"):
            held.check()
    assert json.loads((tmp_path / ".run.lock").read_text())["host"] == "elsewhere"


def test_of_many_that_want_a_stale_lock_one_gets_it(tmp_path):
    (tmp_path / ".run.lock").write_text(holder())
    os.utime(tmp_path / ".run.lock", (0, 0))
    inside, refused, most = [], [], []

    def enter():
        try:
            with RunLock(tmp_path / "run"):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.05)
                inside.pop()
        except UserError:
            refused.append(1)

    threads = [threading.Thread(target=enter) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(most) + len(refused) == 8 and refused


def test_filesystems_without_hard_links_lock_too(tmp_path, monkeypatch):
    def link(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(lock.os, "link", link)
    with RunLock(tmp_path / "run"), pytest.raises(UserError, match="is being written"), RunLock(tmp_path / "run"):
        pass
    assert not list(tmp_path.iterdir())
