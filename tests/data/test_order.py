"""The order of data is a contract: which rows a step sees depends on the source, the seed and the protocol alone."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data import Source, Tokenizer, TrainingBatches, UserError, open_source
from data.rows import shuffled
from data.sources import shard_order

from .conftest import Corpus

ROWS = ("truncate", "pack")
FROZEN = [22, 23, 20, 25, 19, 26, 27, 21, 29, 31, 24, 32]  # first documents of seed 42, epoch 0, buffer 5
SMALL = {"length": 16, "batch_size": 7, "shuffle_buffer": 5, "prefetch": 0}


def batches(source: Source, tokenizer: Tokenizer, **options: Any) -> TrainingBatches:
    return TrainingBatches(source, tokenizer, **{**SMALL, **options})


def steps(loader: TrainingBatches, count: int) -> list[torch.Tensor]:
    """Input ids and labels of `count` steps, [2, b, length] each."""
    with loader:
        return [torch.stack((b["input_ids"], b["labels"])) for b in (next(loader) for _ in range(count))]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_divide_the_rows_of_a_step(train: Source, tokenizer: Tokenizer, rows: str, world_size: int) -> None:
    whole = steps(batches(train, tokenizer, rows=rows), 14)
    parts = [
        steps(batches(train, tokenizer, rows=rows, rank=rank, world_size=world_size), 14) for rank in range(world_size)
    ]
    sizes = [part[0].shape[1] for part in parts]
    assert sum(sizes) == 7 and max(sizes) - min(sizes) <= 1
    assert same(whole, [torch.cat(step, dim=1) for step in zip(*parts, strict=True)])


@pytest.mark.parametrize("rows", ROWS)
def test_the_background_thread_changes_nothing(train: Source, tokenizer: Tokenizer, rows: str) -> None:
    ours = steps(batches(train, tokenizer, rows=rows), 12)
    assert same(ours, steps(batches(train, tokenizer, rows=rows, prefetch=3), 12))


def numbers(texts: Iterator[str]) -> list[int]:
    return [int(text.split()[1]) for text in texts]


def test_an_epoch_has_every_document_once_in_an_order_of_its_own(train: Source) -> None:
    first, second, other = (numbers(shuffled(train, seed, epoch, 5)) for seed, epoch in ((42, 0), (42, 1), (43, 0)))
    assert sorted(first) == sorted(second) == sorted(other) == list(range(37))
    assert len({tuple(first), tuple(second), tuple(other), tuple(range(37))}) == 4


def test_the_order_is_frozen(train: Source) -> None:
    """Published runs can only be repeated while this stays: changing it changes every run."""
    assert numbers(shuffled(train, 42, 0, 5))[:12] == FROZEN
    assert numbers(shuffled(train, 42, 0, 0)) == list(range(37))


@pytest.mark.parametrize("buffer", [1, 5, 36, 37, 38, 1000])
@pytest.mark.parametrize("counted", [False, True])
def test_starting_inside_an_epoch(corpus: Corpus, buffer: int, counted: bool) -> None:
    """From every place, whether the number of documents is known or not."""
    config = corpus(15, 4, 18)
    whole = numbers(shuffled(open_source(config, "train"), 42, 3, buffer))
    for start in range(39):
        source = open_source(config, "train")
        if counted:
            list(source.documents())
        assert numbers(shuffled(source, 42, 3, buffer, start)) == whole[start:], start


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("by_state", [False, True])
@pytest.mark.parametrize("first", [1, 4, 5, 9, 11])
def test_resuming_twice(corpus: Corpus, tokenizer: Tokenizer, rows: str, by_state: bool, first: int) -> None:
    """Steps 5 and 10 end within an epoch and in the next one; each resume has a new process's empty source."""
    config = corpus(15, 4, 18)
    whole = steps(batches(open_source(config, "train"), tokenizer, rows=rows), 20)

    def resumed(step: int, state: str | None) -> TrainingBatches:
        source = open_source(config, "train")
        if state is None:
            return batches(source, tokenizer, rows=rows, start_step=step)
        loader = batches(source, tokenizer, rows=rows, prefetch=2)
        loader.load_state_dict(json.loads(state))
        return loader

    got, state = [], None
    begin = batches(open_source(config, "train"), tokenizer, rows=rows, prefetch=2)
    for loader, count in ((begin, first), (None, 3), (None, 20 - first - 3)):
        loader = loader or resumed(len(got), state)
        part = steps(loader, count)
        assert loader.step == len(got) + count
        got += part
        state = json.dumps(loader.state_dict()) if by_state else None
    assert same(whole, got)


def test_the_state_holds_for_another_number_of_ranks(corpus: Corpus, tokenizer: Tokenizer) -> None:
    config = corpus(15, 4, 18)
    whole = steps(batches(open_source(config, "train"), tokenizer), 8)
    states = []
    for rank in range(2):
        loader = batches(open_source(config, "train"), tokenizer, rank=rank, world_size=2, prefetch=2)
        steps(loader, 5)
        states.append(loader.state_dict())
    assert states[0] == states[1]
    alone = batches(open_source(config, "train"), tokenizer)
    alone.load_state_dict(states[1])
    assert same(whole[5:], steps(alone, 3))


@pytest.mark.parametrize(
    "change", [{"seed": 7}, {"length": 8}, {"batch_size": 6}, {"rows": "pack"}, {"shuffle_buffer": 6}]
)
def test_a_state_of_other_settings_is_refused(train: Source, tokenizer: Tokenizer, change: dict[str, Any]) -> None:
    state = batches(train, tokenizer).state_dict()
    with pytest.raises(UserError, match=next(iter(change))):
        batches(train, tokenizer, **change).load_state_dict(state)


def test_a_state_of_another_corpus_is_refused(corpus: Corpus, tokenizer: Tokenizer) -> None:
    state = batches(open_source(corpus(15, 4, 18), "train"), tokenizer).state_dict()
    other = open_source(corpus(15, 5, 18), "train")
    with pytest.raises(UserError, match="source"):
        batches(other, tokenizer).load_state_dict(state)


class Counting:
    """A tokenizer that counts the texts it is given."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.texts = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode(self, texts: list[str], limit: int | None = None) -> list[list[int]]:
        self.texts += len(texts)
        return self._tokenizer.encode(texts, limit)


def test_truncation_tokenises_nothing_but_the_rank_s_rows(train: Source, tokenizer: Tokenizer) -> None:
    counting: Any = Counting(tokenizer)
    steps(batches(train, counting, start_step=9, rank=1, world_size=2), 2)
    assert counting.texts == 2 * 4


def test_resuming_reads_no_more_than_it_needs(corpus: Corpus, tokenizer: Tokenizer, monkeypatch: Any) -> None:
    """A saved place costs neither the shards before it nor, with packing, tokenising what lies before it."""
    config = corpus(*[20] * 10)
    loader = batches(open_source(config, "train"), tokenizer, rows="pack", batch_size=2)
    before = steps(loader, 30)
    assert loader.epoch == 0 and len(before) == 30
    source = open_source(config, "train")
    opened: list[int] = []
    read = source.read
    monkeypatch.setattr(source, "read", lambda shard: opened.append(shard) or read(shard))
    counting: Any = Counting(tokenizer)
    resumed = batches(source, counting, rows="pack", batch_size=2)
    resumed.load_state_dict(loader.state_dict())
    steps(resumed, 1)
    assert len(opened) <= 5 and counting.texts <= 64


def test_the_epoch_is_that_of_the_last_row(train: Source, tokenizer: Tokenizer) -> None:
    loader = batches(train, tokenizer)  # 37 documents, 7 a step: step 5 has 2 of the first epoch and 5 of the second
    seen = []
    for _ in range(11):
        next(loader)
        seen.append(loader.epoch)
    assert seen == [0] * 5 + [1] * 5 + [2]


def test_a_state_from_before_there_was_a_choice_of_attention(train: Source, tokenizer: Tokenizer) -> None:
    state = batches(train, tokenizer, rows="pack").state_dict()
    del state["contract"]["attention"]
    batches(train, tokenizer, rows="pack").load_state_dict(state)
    with pytest.raises(UserError, match="attention was 'row' and is 'document'"):
        batches(train, tokenizer, rows="pack", attention="document").load_state_dict(state)


def test_impossible_settings(train: Source, tokenizer: Tokenizer) -> None:
    for options, message in (
        ({"batch_size": 2, "world_size": 3}, "divided over 3 ranks"),
        ({"rank": 2, "world_size": 2}, "Rank 2 of 2"),
        ({"rows": "cut"}, "data.rows"),
        ({"length": 1}, "data.length"),
        ({"start_step": -1}, "negative"),
        ({"workers": -1}, "negative"),
        ({"attention": "column"}, "data.attention is 'column'"),
        ({"attention": "document"}, "one document already"),
    ):
        with pytest.raises(UserError, match=message):
            batches(train, tokenizer, **options)


@pytest.mark.parametrize("rows", ROWS)
def test_a_run_that_damage_has_stopped_goes_on_by_leaving_it_out(
    corpus: Corpus, tokenizer: Tokenizer, rows: str
) -> None:
    config = corpus(150, 150)
    last = shard_order(2, 42, 0)[-1]
    shard = Path(config["path"]) / "en" / f"c4-train.{last:05d}-of-00002.json.gz"
    lines = gzip.decompress(shard.read_bytes()).splitlines(keepends=True)
    lines[100] = b"not JSON\n"
    shard.write_bytes(gzip.compress(b"".join(lines)))
    skipping = {**config, "on_error": "skip"}

    stopped = batches(open_source(config, "train"), tokenizer, rows=rows)
    found: list[torch.Tensor] = []
    with stopped, pytest.raises(UserError, match="line 101"):
        for b in stopped:
            found.append(torch.stack((b["input_ids"], b["labels"])))
    assert len(found) > 5
    more = 10
    expected = steps(batches(open_source(skipping, "train"), tokenizer, rows=rows), len(found) + more)
    state = stopped.state_dict()
    with pytest.raises(UserError, match="line 101"):
        again = batches(open_source(config, "train"), tokenizer, rows=rows)
        again.load_state_dict(state)
        steps(again, more)
    goes_on = batches(open_source(skipping, "train"), tokenizer, rows=rows)
    goes_on.load_state_dict(state)
    assert same(expected, found + steps(goes_on, more))
    back = batches(open_source(config, "train"), tokenizer, rows=rows)
    with pytest.raises(UserError, match="does not fit this run: source"):
        back.load_state_dict(goes_on.state_dict())


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("workers", [0, 1])
def test_what_was_left_out_is_counted_once_over_a_resumption(
    corpus: Corpus, tokenizer: Tokenizer, rows: str, workers: int
) -> None:
    config = {**corpus(15, 4, 18), "on_error": "skip"}
    for shard in (0, 2):
        path = Path(config["path"]) / "en" / f"c4-train.{shard:05d}-of-00003.json.gz"
        path.write_bytes(gzip.compress(b"not JSON\n" + gzip.decompress(path.read_bytes()) + b"neither\n"))
    begun = batches(open_source(config, "train"), tokenizer, rows=rows)
    steps(begun, 60)
    state = json.loads(json.dumps(begun.state_dict()))
    assert begun.epoch > 0 and state["damaged"] == {"0": 2, "2": 2}

    source = open_source(config, "train")
    resumed = batches(source, tokenizer, rows=rows, workers=workers)
    resumed.load_state_dict(state)
    assert source.damaged == {0: 2, 2: 2} and resumed.state_dict() == state
    steps(resumed, 20)
    assert source.damaged == {0: 2, 2: 2}

    del state["damaged"]  # older states do not have it
    older = open_source(config, "train")
    batches(older, tokenizer, rows=rows).load_state_dict(state)
    assert older.damaged == {}


BEYOND = 10**30
DAMAGED_STATES: dict[str, tuple[Any, str]] = {
    **{f"no {key}": ({key: ...}, key) for key in ("step", "epoch", "position", "shard_lengths", "contract")},
    **{
        f"{key} {value!r}": ({key: value}, key)
        for key, values in {
            "step": ("10", 10.0, None, True, -1, BEYOND),
            "epoch": ("1", None, -1),
            "position": (
                [1],
                [1, 33, 0, 0],
                ["a", 0, 0],
                "012",
                5,
                [-1, 0, 0],
                [1, -4, 0],
                [1, 33, -1],
                [1, BEYOND, 0],
            ),
            "shard_lengths": ([], None, {"a": 1}, {"0": "x"}, {"0": -1}, {"3": 3}, {"-1": 3}, {"٠": 15}, {"0": BEYOND}),
            "damaged": ([], {"0": None}, {"7": 1}),
            "contract": ([], "x", None),
        }.items()
        for value in values
    },
    "another step": ({"step": 9}, "step 9 cannot begin at position"),
    "another epoch": ({"epoch": 5}, "cannot begin at position"),
    "a position of another epoch": ({"position": [3, 33, 0]}, "cannot begin at position"),
    "a position never reached": ({"position": [0, 10**12, 0]}, "cannot begin at position"),
    "an offset never reached": ({"position": [1, 33, 10**12]}, "cannot begin at position"),
    "a shard left out": ({"shard_lengths": {"0": 15, "1": 4}}, "cannot begin at position"),
    "a shard of another length": ({"shard_lengths": {"0": 15, "1": 4, "2": 0}}, "cannot begin at position"),
    "nothing": (None, "the whole of it"),
    "a list": ([], "the whole of it"),
}


TRUNCATED_ONLY = ("another step", "a shard of another length")  # packed, only tokenising all text would tell


@pytest.mark.parametrize(
    ("rows", "name"), [(r, n) for r in ROWS for n in DAMAGED_STATES if r == "truncate" or n not in TRUNCATED_ONLY]
)
def test_a_damaged_state_changes_nothing(corpus: Corpus, tokenizer: Tokenizer, rows: str, name: str) -> None:
    """Step 10 of rows of one document begins 33 documents into the second epoch, and so it is said for packed rows."""
    config = corpus(15, 4, 18)
    source = open_source(config, "train")
    loader = batches(source, tokenizer, rows=rows)
    good = {"step": 10, "epoch": 1, "position": [1, 33, 0], "shard_lengths": {"0": 15, "1": 4, "2": 18}, "damaged": {}}
    good["contract"] = loader.state_dict()["contract"]
    change, words = DAMAGED_STATES[name]
    state = change
    if isinstance(change, dict):
        state = {key: value for key, value in {**good, **change}.items() if value is not ...}
    before = loader.state_dict()
    with pytest.raises(UserError, match=r"saved place in the data is damaged \(.*: resume from an earlier") as caught:
        loader.load_state_dict(state)
    assert words in str(caught.value)
    assert loader.state_dict() == before and source.lengths == {} and source.damaged == {}
    loader.load_state_dict(good)
    assert loader.step == 10
