"""The background thread: its errors reach the consumer, and it ends when it should."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import data.loader
from data import Source, Tokenizer, TrainingBatches, UserError, open_source

ROOT = Path(__file__).resolve().parents[2]


def threads() -> int:
    return sum(thread.name == "data-prefetch" for thread in threading.enumerate())


def wait_for(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


class Broken(Source):
    """Forty documents, then an error."""

    shards = 1

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.description = {"name": "broken", "split": "train"}
        self.error = error
        self.read_so_far = 0

    def read(self, shard: int) -> Iterator[str]:
        for self.read_so_far in range(1, 41):
            yield "text"
        raise self.error


class Late(Source):
    """Documents that come when told."""

    shards = 1

    def __init__(self) -> None:
        super().__init__()
        self.description = {"name": "late", "split": "train"}
        self.come = threading.Event()

    def read(self, shard: int) -> Iterator[str]:
        assert self.come.wait(20)
        yield from ["text"] * 40


def test_a_long_wait_is_told(tokenizer: Tokenizer, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A line every so often, until the step is there; the seconds of all waits are kept."""
    source = Late()
    tell = data.loader._tell
    waits: list[float] = []

    def recorded(label: str, seconds: float) -> None:
        tell(label, seconds)
        waits.append(seconds)
        if len(waits) == 3:
            source.come.set()

    monkeypatch.setattr(data.loader, "PATIENCE", 0.05)
    monkeypatch.setattr(data.loader, "_tell", recorded)
    with TrainingBatches(source, tokenizer, 8, batch_size=8, shuffle_buffer=0, rank=1, world_size=2) as loader:
        assert loader.waited == 0
        for _ in range(4):
            next(loader)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "data: training has waited 0 s for its next step; being read: The train split of late (rank 1)"
    assert len(lines) == len(waits) >= 3
    assert 0.05 <= waits[0] < waits[1] < waits[2] <= loader.waited


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("error", [UserError("the disk is gone"), ValueError("a bug")])
def test_errors_reach_the_consumer_after_the_good_steps(tokenizer: Tokenizer, prefetch: int, error: Exception) -> None:
    loader = TrainingBatches(Broken(error), tokenizer, length=8, batch_size=8, shuffle_buffer=1, prefetch=prefetch)
    for _ in range(4):  # the buffer of one document is ahead of the rows: the fifth step would need the error's place
        next(loader)
    for _ in range(2):
        with pytest.raises(type(error), match=str(error)):
            next(loader)
    assert wait_for(lambda: threads() == 0)


def test_the_thread_runs_ahead_but_not_far(tokenizer: Tokenizer) -> None:
    source = Broken(ValueError())
    with TrainingBatches(source, tokenizer, length=8, batch_size=4, shuffle_buffer=0, prefetch=2) as loader:
        next(loader)
        assert wait_for(lambda: source.read_so_far >= 3 * 4)
        time.sleep(0.2)
        assert source.read_so_far <= 4 * 4  # one taken, two in the queue, one in the hand
    assert threads() == 0


def test_closing(train: Source, tokenizer: Tokenizer) -> None:
    loader = TrainingBatches(train, tokenizer, length=8, batch_size=4)
    next(loader)
    assert threads() == 1
    loader.close()
    loader.close()
    assert threads() == 0
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


def test_a_forgotten_loader_stops_its_thread(train: Source, tokenizer: Tokenizer) -> None:
    loader = TrainingBatches(train, tokenizer, length=8, batch_size=4)
    next(loader)
    del loader
    gc.collect()
    assert wait_for(lambda: threads() == 0)


def test_an_interrupted_wait_loses_no_step(train: Source, tokenizer: Tokenizer, monkeypatch: Any) -> None:
    """Ctrl-C while the consumer waits."""
    options: dict[str, Any] = {"length": 8, "batch_size": 4}
    whole = TrainingBatches(train, tokenizer, prefetch=0, **options)
    expected = [next(whole)["input_ids"].tolist() for _ in range(4)]
    with TrainingBatches(train, tokenizer, **options) as loader:
        got = [next(loader)["input_ids"].tolist() for _ in range(2)]

        def interrupted() -> Iterator[Any]:
            raise KeyboardInterrupt
            yield

        monkeypatch.setattr(loader, "_steps", interrupted())
        with pytest.raises(KeyboardInterrupt):
            next(loader)
        got += [next(loader)["input_ids"].tolist() for _ in range(2)]
    assert got == expected


@pytest.mark.parametrize("prefetch", [0, 2])
def test_the_interpreter_ends_in_the_middle(prefetch: int) -> None:
    code = (
        "from data import *\n"
        "source, tokenizer = open_source({'kind': 'sample'}, 'train'), load_tokenizer('sample_1k')\n"
        f"loader = TrainingBatches(source, tokenizer, prefetch={prefetch})\n"
        "next(loader)\n"
        "print('leaving')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip(), done.stderr.strip()) == (0, "leaving", "")


def test_a_damaged_file_is_named_by_the_training_loop(corpus: Any, tokenizer: Tokenizer) -> None:
    config = corpus(3)
    path = next(Path(config["path"]).glob("en/c4-train*"))
    path.write_bytes(path.read_bytes()[:-20])
    with TrainingBatches(open_source(config, "train"), tokenizer) as loader, pytest.raises(UserError, match=path.name):
        next(loader)
