"""The published loader's order, held against a transcription of what its parts do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data import Tokenizer, TrainingBatches, UserError, open_source
from data.published import PublishedBatches
from data.rows import truncated

from .conftest import write_shard

ROOT = Path(__file__).resolve().parents[2]
SIZES = (23, 31, 17, 40, 25, 38, 19, 27)  # documents of each file
LENGTH, BUFFER, SEED = 12, 16, 42


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("c4")
    for i, size in enumerate(SIZES):
        write_shard(path / "en" / f"c4-train.{i:05d}-of-{len(SIZES):05d}.json.gz", documents(i, size))
    write_shard(path / "en" / "c4-validation.00000-of-00001.json.gz", ["held out"])
    return path


def documents(shard: int, size: int) -> list[str]:
    return [f"{shard} {i}" + " and so on" * (i % 5) for i in range(size)]


def config(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "c4_local", "path": str(folder), "rows": "truncate", "length": LENGTH, "seed": SEED,
        "shuffle_buffer": BUFFER, "published_workers": 2, **changes,
    }  # fmt: skip


# The transcription: `datasets` 5.2.0, GaLore's data set, torch's DataLoader ------------------------------------------


def stream(rank: int, world_size: int, worker: int, workers: int) -> Iterator[str]:
    """The documents that `datasets` gives to one worker of one rank, before that worker leaves out most of them."""
    order = list(range(len(SIZES)))
    np.random.default_rng(SEED).shuffle(order)
    own = order[rank::world_size][worker::workers]
    groups = [list(part) for part in np.array_split(own, min(10, len(own)))]
    sources = [iter([text for shard in group for text in documents(shard, SIZES[shard])]) for group in groups]

    def in_turn() -> Iterator[str]:
        while sources:
            for source in list(sources):
                text = next(source, None)
                if text is None:
                    sources.remove(source)
                else:
                    yield text

    rng = np.random.default_rng(np.random.default_rng(SEED).integers(0, 1 << 63) - worker)
    held: list[str] = []
    for text in in_turn():
        held.append(text)
        if len(held) >= BUFFER:
            mixed = [held[i] for i in rng.permutation(len(held))]
            given = len(held) - BUFFER // 2
            yield from mixed[:given]
            held = mixed[given:]
    yield from (held[i] for i in rng.permutation(len(held)))


def published(rank: int, world_size: int, workers: int, size: int, batches_a_step: int) -> list[list[str]]:
    """The documents of each step of one rank."""
    queues = []
    for worker in range(workers):
        texts = list(stream(rank, world_size, worker, workers))[worker::workers]
        queues.append([texts[i : i + size] for i in range(0, len(texts), size)])
    batches: list[list[str]] = []
    while any(queues):
        batches += [queue.pop(0) for queue in queues if queue]
    steps = [batches[i : i + batches_a_step] for i in range(0, len(batches), batches_a_step)]
    return [[text for batch in step for text in batch] for step in steps if len(step) == batches_a_step]


# ----------------------------------------------------------------------------------------------------------------------


def rows(texts: list[str], tokenizer: Tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    return truncated(tokenizer.encode(texts, LENGTH - 1), LENGTH, tokenizer)


@pytest.mark.parametrize(
    ("world_size", "workers", "size", "batches_a_step"), [(1, 2, 4, 1), (1, 3, 4, 2), (2, 2, 8, 1), (2, 3, 3, 2)]
)
def test_the_order_is_the_published_one(
    folder: Path, tokenizer: Tokenizer, world_size: int, workers: int, size: int, batches_a_step: int
) -> None:
    for rank in range(world_size):
        expected = published(rank, world_size, workers, size, batches_a_step)
        assert len(expected) > 2
        cfg = config(folder, published_workers=workers, published_batch=size)
        with PublishedBatches(cfg, tokenizer, size * batches_a_step * world_size, rank, world_size) as batches:
            for number, texts in enumerate(expected, 1):
                batch = next(batches)
                input_ids, labels = rows(texts, tokenizer)
                assert torch.equal(batch["input_ids"], input_ids) and torch.equal(batch["labels"], labels)
                assert (batches.step, batches.epoch) == (number, 0)
            with pytest.raises(UserError, match=rf"ends before step {len(expected) + 1}.* one document in {workers};"):
                next(batches)
            assert batches.waited > 0


def test_seven_of_eight_documents_are_lost(folder: Path) -> None:
    seen = [text for step in published(0, 1, 8, 1, 1) for text in step]
    assert len(seen) == len(set(seen)) and 0.11 < len(seen) / sum(SIZES) < 0.15


def test_resuming_three_times(folder: Path, tokenizer: Tokenizer) -> None:
    cfg = config(folder, published_batch=3)
    with PublishedBatches(cfg, tokenizer, 6) as batches:
        whole = [batch["input_ids"] for batch in (next(batches) for _ in range(9))]
    got: list[torch.Tensor] = []
    state = None
    for count in (2, 1, 3, 3):
        with PublishedBatches(cfg, tokenizer, 6) as batches:
            if state is not None:
                batches.load_state_dict(state)
            got += [next(batches)["input_ids"] for _ in range(count)]
            state = batches.state_dict()
            assert state["step"] == batches.step == len(got)
    assert all(torch.equal(a, b) for a, b in zip(got, whole, strict=True))


def test_a_state_fits_only_what_it_was_taken_from(folder: Path, tokenizer: Tokenizer) -> None:
    batches = PublishedBatches(config(folder), tokenizer, 8)
    state = batches.state_dict()
    for other, message in (
        (PublishedBatches(config(folder, published_workers=3), tokenizer, 8), "published_workers was 2 and is 3"),
        (PublishedBatches(config(folder), tokenizer, 8, 1, 2), "ranks was 1 and is 2"),
        (TrainingBatches(open_source(config(folder), "train"), tokenizer, LENGTH, batch_size=8), "was None and is"),
    ):
        with pytest.raises(UserError, match=message):
            other.load_state_dict(state)
    exact = TrainingBatches(open_source(config(folder), "train"), tokenizer, LENGTH, batch_size=8).state_dict()
    with pytest.raises(UserError, match="protocol was None and is 'published'"):
        batches.load_state_dict(exact)


def test_random_numbers_of_the_model_are_not_touched(folder: Path, tokenizer: Tokenizer) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    with PublishedBatches(config(folder), tokenizer, 8) as batches:
        next(batches)
    assert torch.equal(before, torch.random.get_rng_state())
    with pytest.raises(RuntimeError, match="closed"):
        next(batches)


@pytest.mark.parametrize(
    ("changes", "batch_size", "world_size", "message"),
    [
        ({"rows": "pack"}, 8, 1, "one document a row"),
        ({"attention": "document"}, 8, 1, "one document a row"),
        ({"on_error": "skip"}, 8, 1, "cannot leave out damaged documents"),
        ({}, 8, 3, "8 cannot be divided by 3 ranks"),
        ({"published_batch": 3}, 8, 1, "published_batch=3 does not divide the 8 sequences"),
        ({"kind": "text"}, 8, 1, "needs a data set with validation files"),
    ],
)
def test_settings_that_cannot_work(
    folder: Path, tokenizer: Tokenizer, changes: dict[str, Any], batch_size: int, world_size: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        PublishedBatches(config(folder, **changes), tokenizer, batch_size, 0, world_size)


def test_a_part_of_a_mirror_will_not_do(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_shard(tmp_path / "c4-train.00001-of-00002.json.gz", ["text"])
    with pytest.raises(UserError, match=r"c4-train\.00000-of-00002\.json\.gz is not here"):
        PublishedBatches(config(tmp_path), tokenizer, 8)


def test_a_damaged_file_ends_in_a_sentence(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for i in range(2):
        write_shard(tmp_path / f"c4-train.{i:05d}-of-00002.json.gz", documents(i, 20))
    batches = PublishedBatches(config(tmp_path), tokenizer, 8)
    with open(tmp_path / "c4-train.00001-of-00002.json.gz", "r+b") as file:
        file.truncate(60)
    with batches, pytest.raises(UserError, match=r"Worker \d of data\.protocol=published failed to read: "):
        while True:
            next(batches)


def test_the_hub_is_asked_as_by_the_published_code(
    folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    from huggingface_hub import constants

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    calls: list[Any] = []
    load = datasets.load_dataset
    files = sorted(str(file) for file in (folder / "en").glob("c4-train*"))

    def load_dataset(*names: Any, **options: Any) -> Any:
        calls.append((names, options))
        return load("json", data_files={"train": files}, split="train", streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    commit = "0" * 40
    hub = {"kind": "hub", "name": "allenai/c4", "config": "en", "revision": commit, "validation_split": "validation"}
    with PublishedBatches({**config(folder), **hub}, tokenizer, 8) as batches:
        assert torch.equal(next(batches)["input_ids"], rows(published(0, 1, 2, 8, 1)[0], tokenizer)[0])
    assert calls[-1] == (("allenai/c4", "en"), {"split": "train", "streaming": True, "revision": commit})


RUN = """
import multiprocessing, os, signal, sys
from data import load_tokenizer
from data.published import PublishedBatches
numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
if __name__ == "__main__":
    for number in numbers:
        signal.signal(number, lambda *_: None)
    cfg = {"kind": "c4_local", "path": sys.argv[1], "rows": "truncate", "length": 12, "seed": 42, "shuffle_buffer": 16,
           "published_workers": 2}
    with PublishedBatches(cfg, load_tokenizer("sample_1k"), 2) as batches:
        next(batches)
        for number in numbers:
            os.killpg(0, number)
        for _ in range(40):
            next(batches)
        print(*(process.pid for process in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
def test_workers_outlive_signals_but_not_the_training_process(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(RUN)
    output = tmp_path / "output"
    with open(output, "w") as file:  # not a pipe, which a worker that lives on would keep open
        done = subprocess.run(
            [sys.executable, str(script), str(folder)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=file, stderr=subprocess.STDOUT, timeout=60, start_new_session=True,
        )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, output.read_text()
    workers = [int(number) for number in output.read_text().split()]
    assert len(workers) == 2
    for _ in range(100):
        if not any(map(alive, workers)):
            break
        time.sleep(0.1)
    assert not any(map(alive, workers))
