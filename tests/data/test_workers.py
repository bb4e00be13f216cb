"""The process that makes steps: the same rows, its errors reach the consumer, and it never outlives its training."""

from __future__ import annotations

import gc
import json
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from data import Source, Tokenizer, TrainingBatches, UserError, open_source

from .conftest import Corpus

ROOT = Path(__file__).resolve().parents[2]
SMALL: dict[str, Any] = {"length": 16, "batch_size": 7, "shuffle_buffer": 5}


def children() -> list[psutil.Process]:
    """Data processes of this one; other tests may have started others."""
    return [child for child in psutil.Process().children() if "data.producer" in " ".join(child.cmdline())]


def wait_for(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def take(loader: TrainingBatches, count: int) -> list[torch.Tensor]:
    """Input ids and labels of `count` steps, [2, b, length] each."""
    return [torch.stack((b["input_ids"], b["labels"])) for b in (next(loader) for _ in range(count))]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class Ending(Source):
    """Sixty documents, and then an error, or silence. It prints, as libraries do."""

    shards = 1

    def __init__(self, error: Exception | None) -> None:
        super().__init__()
        self.description = {"name": "ending", "split": "train"}
        self.error = error

    def read(self, shard: int) -> Iterator[str]:
        print("reading")
        yield from ["text"] * 60
        if self.error is not None:
            raise self.error
        time.sleep(1000)


@pytest.mark.parametrize("rows", ["truncate", "pack"])
def test_rows_and_states_are_those_of_the_thread_through_three_resumes(
    corpus: Corpus, tokenizer: Tokenizer, rows: str
) -> None:
    """Rank 1 of 2, over three epochs; one resume changes the number of workers, one goes back to none."""
    config = corpus(15, 4, 18)
    options = {**SMALL, "rows": rows, "rank": 1, "world_size": 2}
    whole = TrainingBatches(open_source(config, "train"), tokenizer, prefetch=0, **options)
    got: list[torch.Tensor] = []
    state: dict[str, Any] | None = None
    for count, more in ((4, {"workers": 1, "prefetch": 0}), (3, {"workers": 3}), (2, {}), (6, {"workers": 1})):
        with TrainingBatches(open_source(config, "train"), tokenizer, **options, **more) as loader:
            if state is not None:
                loader.load_state_dict(json.loads(json.dumps(state)))
            part = take(loader, count)
            got += part
            state = loader.state_dict()
        assert same(part, take(whole, count))
        assert (loader.step, loader.epoch) == (whole.step, whole.epoch)
        assert state["position"] == whole.state_dict()["position"]
    assert loader.epoch == 2 or rows == "pack"


def test_errors_reach_the_consumer_after_the_good_steps(tokenizer: Tokenizer) -> None:
    options: dict[str, Any] = {"length": 8, "batch_size": 8, "shuffle_buffer": 0, "workers": 1}
    for error, expected, message in (
        (UserError("the disk is gone"), UserError, "^the disk is gone$"),
        (ValueError("a bug"), RuntimeError, r"Traceback(.|\n)*in read\n(.|\n)*ValueError: a bug"),
    ):
        with TrainingBatches(Ending(error), tokenizer, **options) as loader:
            take(loader, 7)
            for _ in range(2):
                with pytest.raises(expected, match=message):
                    next(loader)
        assert not children()


def test_a_source_that_cannot_be_sent(tokenizer: Tokenizer) -> None:
    class Local(Ending):
        pass

    with (
        TrainingBatches(Local(None), tokenizer, workers=1) as loader,
        pytest.raises(UserError, match=r"split of ending.*Local.*data\.workers=0"),
    ):
        next(loader)


def test_signals_leave_it_alone_and_its_death_is_told(train: Source, tokenizer: Tokenizer, monkeypatch: Any) -> None:
    """There is no moment at which a signal for the whole job would end it, not even before it has run a line."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    start = subprocess.Popen

    def signalled(*arguments: Any, **options: Any) -> subprocess.Popen:
        process = start(*arguments, **options)
        for number in numbers:
            process.send_signal(number)
        return process

    monkeypatch.setattr(subprocess, "Popen", signalled)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with TrainingBatches(train, tokenizer, workers=1, **SMALL) as loader:
        take(loader, 1)
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before  # ours are as they were
        (process,) = children()
        for number in numbers:
            process.send_signal(number)
        take(loader, 20)
        assert children() == [process]
        process.kill()
        with pytest.raises(UserError, match=r"ended from outside \(Killed\).*memory"):
            while True:  # what is in the pipe comes first
                next(loader)


def test_closing_and_forgetting(train: Source, tokenizer: Tokenizer) -> None:
    loader = TrainingBatches(train, tokenizer, workers=1, **SMALL)
    assert not children()  # not before the first step
    take(loader, 1)
    (process,) = children()
    loader.close()
    loader.close()
    assert gone(process.pid)
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)
    forgotten = TrainingBatches(train, tokenizer, workers=1, **SMALL)
    take(forgotten, 1)
    (process,) = children()
    del forgotten
    gc.collect()
    assert wait_for(lambda: gone(process.pid))


def test_an_interrupted_wait_loses_no_step(train: Source, tokenizer: Tokenizer, monkeypatch: Any) -> None:
    """Ctrl-C while the consumer waits: a new process goes on at the same place."""
    expected = take(TrainingBatches(train, tokenizer, prefetch=0, **SMALL), 9)

    def interrupted() -> Iterator[Any]:
        raise KeyboardInterrupt
        yield

    with TrainingBatches(train, tokenizer, workers=1, **SMALL) as loader:
        got = take(loader, 7)
        (process,) = children()
        monkeypatch.setattr(loader, "_steps", interrupted())
        with pytest.raises(KeyboardInterrupt):
            next(loader)
        assert gone(process.pid)
        assert same(expected, got + take(loader, 2))


def test_nothing_is_left_when_the_training_process_is_killed() -> None:
    """SIGKILL, while the data process waits for text and so would not notice a closed pipe by writing to it."""
    code = (
        "import psutil, time\n"
        "from data import TrainingBatches, load_tokenizer\n"
        "from tests.data.test_workers import Ending\n"
        "loader = TrainingBatches(Ending(None), load_tokenizer('sample_1k'), 8, batch_size=8, shuffle_buffer=0, workers=1)\n"
        "for _ in range(7): next(loader)\n"
        "print(*[child.pid for child in psutil.Process().children(recursive=True)], flush=True)\n"
        "time.sleep(1000)"
    )
    training = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with training:
        assert training.stdout
        pids = [int(pid) for pid in training.stdout.readline().split()]
        assert len(pids) == 1 and not gone(pids[0])
        training.send_signal(signal.SIGKILL)
    assert wait_for(lambda: gone(pids[0]))


def test_the_interpreter_ends_while_the_process_works() -> None:
    code = (
        "import psutil\n"
        "from data import *\n"
        "loader = TrainingBatches(open_source({'kind': 'sample'}, 'train'), load_tokenizer('sample_1k'), workers=2)\n"
        "next(loader)\n"
        "print(*[child.pid for child in psutil.Process().children(recursive=True)])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.strip()) == (0, "")
    assert gone(int(done.stdout))


def test_what_a_process_needs_can_be_sent(train: Source, tokenizer: Tokenizer) -> None:
    copy: Any = pickle.loads(pickle.dumps(tokenizer))
    texts = list(train.documents())
    assert copy.encode(texts) == tokenizer.encode(texts)
    assert list(pickle.loads(pickle.dumps(train)).documents()) == texts
