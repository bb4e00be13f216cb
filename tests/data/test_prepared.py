"""Prepared data: the rows of the source itself; folders that are damaged, partial, interrupted or somebody else's."""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import data.prepared
from data import (
    Source,
    Tokenizer,
    TrainingBatches,
    UserError,
    load_tokenizer,
    open_source,
    preparation,
    validation_rows,
)
from data.prepared import digest
from pretraining.config import compose
from scripts import prepare_data as script

from .conftest import Corpus, write_shard

ROOT = Path(__file__).resolve().parents[2]
PROTOCOL = {"rows": "truncate", "length": 16, "seed": 42, "shuffle_buffer": 5, "validation_max_tokens": None}
Prepare = Callable[..., Path]


@pytest.fixture
def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    """prepare(config, option=..., rows=...) runs the command, in this process, and returns the folder."""

    def run(config: dict[str, Any], to: str = "prepared", tokenizer: str = "sample_1k", **options: Any) -> Path:
        protocol = {key: options.pop(key, value) for key, value in PROTOCOL.items()}
        cfg = OmegaConf.create({"tokenizer": tokenizer, "data": {**config, **protocol}})
        monkeypatch.setattr(script, "compose", lambda words: cfg)  # Hydra's takes most of the time
        asked = {"to": tmp_path / to, "max_tokens": "all", "steps": None, "batch_size": 7, "jobs": 1, "overrides": []}
        script.run(argparse.Namespace(**{**asked, **options}))
        return tmp_path / to

    return run


def prepared(folder: Path, split: str = "train") -> Any:
    return open_source({"kind": "prepared", "path": str(folder)}, split)


def batches(source: Source, tokenizer: Tokenizer, **options: Any) -> TrainingBatches:
    small = {"length": 16, "batch_size": 7, "shuffle_buffer": 5, "prefetch": 0}
    return TrainingBatches(source, tokenizer, **{**small, **options})


def steps(loader: TrainingBatches, count: int) -> list[dict[str, torch.Tensor]]:
    with loader:
        return [next(loader) for _ in range(count)]


def same(ours: list[dict[str, torch.Tensor]], theirs: list[dict[str, torch.Tensor]]) -> bool:
    return len(ours) == len(theirs) and all(
        a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)
        for a, b in zip(ours, theirs, strict=True)
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["truncate", "pack"])
@pytest.mark.parametrize(("seed", "buffer"), [(42, 5), (7, 1000), (3, 0)])
def test_the_rows_are_those_of_the_source(
    corpus: Corpus, tokenizer: Tokenizer, prepare: Prepare, rows: str, seed: int, buffer: int
) -> None:
    """Over several epochs, on one rank and on three."""
    config = corpus(15, 4, 18)
    folder = prepare(config, max_tokens="row" if rows == "truncate" else "all", rows=rows)
    for ranks in (1, 3):
        for rank in range(ranks):
            options = {"rows": rows, "seed": seed, "shuffle_buffer": buffer, "rank": rank, "world_size": ranks}
            theirs = steps(batches(open_source(config, "train"), tokenizer, **options), 24)
            assert same(steps(batches(prepared(folder), tokenizer, **options), 24), theirs)


@pytest.mark.parametrize("rows", ["truncate", "pack"])
def test_a_run_goes_on_with_the_other_kind_of_data(
    corpus: Corpus, tokenizer: Tokenizer, prepare: Prepare, rows: str
) -> None:
    """A saved place in the text is one in the prepared data and the other way round, three resumes in a row."""
    config = corpus(15, 4, 18)
    folder = prepare(config)
    whole = steps(batches(open_source(config, "train"), tokenizer, rows=rows), 20)
    got, state = [], None
    for kind, count in (("prepared", 4), ("text", 3), ("prepared", 6), ("prepared", 7)):
        source = prepared(folder) if kind == "prepared" else open_source(config, "train")
        loader = batches(source, tokenizer, rows=rows, prefetch=2)
        if state is not None:
            loader.load_state_dict(json.loads(state))
        got += steps(loader, count)
        state = json.dumps(loader.state_dict())
    assert same(got, whole)
    for start in (1, 6, 13):
        assert same(
            steps(batches(prepared(folder), tokenizer, rows=rows, start_step=start), 3), whole[start : start + 3]
        )


@pytest.mark.parametrize("rows", ["truncate", "pack"])
@pytest.mark.parametrize("budget", [None, 1, 300, 5000, 10**6])
def test_the_validation_rows_are_those_of_the_source(
    tmp_path: Path, tokenizer: Tokenizer, prepare: Prepare, rows: str, budget: int | None, monkeypatch: Any
) -> None:
    monkeypatch.setattr(preparation, "AHEAD", 64)
    write_shard(tmp_path / "c4-train.00000-of-00001.json.gz", ["train"])
    for shard in range(3):
        texts = [f"held out {i}" + " and more" * (i % 40) for i in range(100)]
        write_shard(tmp_path / f"c4-validation.{shard:05d}-of-00003.json.gz", texts)
    config = {"kind": "c4_local", "path": str(tmp_path)}
    folder = prepare(config, rows=rows, validation_max_tokens=budget)
    source = prepared(folder, "validation")
    theirs = validation_rows(open_source(config, "validation"), tokenizer, 16, rows, budget)
    ours = validation_rows(source, tokenizer, 16, rows, budget)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    if budget in (1, 300):  # far from all of it is kept
        with pytest.raises(
            UserError, match=rf"the validation rows of data.rows={rows}.*max_tokens={budget}: use these"
        ):
            validation_rows(source, tokenizer, 16, rows, None)
    elif budget != 5000:
        assert source.total == 300


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=()), max_size=40) | st.sampled_from(
    ["", " \n", "a b c " * 50]
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shards=st.lists(st.lists(TEXTS, max_size=12), min_size=1, max_size=4),
    rows=st.sampled_from(["truncate", "pack"]),
    buffer=st.integers(0, 20),
    start=st.integers(0, 9),
)
def test_any_corpus(
    tmp_path: Path, tokenizer: Tokenizer, prepare: Prepare, shards: Any, rows: str, buffer: int, start: int
) -> None:
    for path in tmp_path.iterdir():
        shutil.rmtree(path)
    shards[0].append("at least one document")
    for i, texts in enumerate(shards):
        write_shard(tmp_path / "en" / f"c4-train.{i:05d}-of-{len(shards):05d}.json.gz", [*texts, " "])
    write_shard(tmp_path / "en" / "c4-validation.00000-of-00001.json.gz", ["held out"])
    config = {"kind": "c4_local", "path": str(tmp_path)}
    folder = prepare(config)
    options = {"rows": rows, "shuffle_buffer": buffer, "start_step": start}
    theirs = open_source(config, "train")
    assert same(
        steps(batches(prepared(folder), tokenizer, **options), 3), steps(batches(theirs, tokenizer, **options), 3)
    )
    ours = prepared(folder)
    list(theirs.documents())
    assert (ours.total, ours.lengths, ours.skipped) == (theirs.total, theirs.lengths, theirs.skipped)
    assert ours.identity == theirs.identity


def test_documents_are_views_and_places_are_reached_without_reading(
    corpus: Corpus, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.prepared, "IN_MEMORY", 0)  # so that even these small files are mapped
    source = pickle.loads(pickle.dumps(prepared(prepare(corpus(15, 4, 18)))))
    documents = list(source.documents())
    assert {ids.dtype for ids in documents} == {np.dtype("<u2")} and not any(ids.flags.owndata for ids in documents)
    assert len({ids.__array_interface__["data"][0] for ids in documents}) == 37 and not documents[0].flags.writeable
    opened: list[tuple[int, int]] = []
    read_from = source._read_from

    def noted(shard: int, start: int) -> Any:
        opened.append((shard, start))
        return read_from(shard, start)

    monkeypatch.setattr(source, "_read_from", noted)
    assert [list(ids) for ids in source.documents(20, order=[2, 0, 1])] == [list(ids) for ids in documents[2:19]]
    assert opened == [(0, 2), (1, 0)]


def test_each_file_is_verified_once_in_a_process(
    corpus: Corpus, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = prepared(prepare(corpus(15, 4, 18)))
    hashed: list[str] = []
    file_digest = hashlib.file_digest

    def noted(file: Any, kind: str) -> Any:
        hashed.append(Path(file.name).name)
        return file_digest(file, kind)

    monkeypatch.setattr(hashlib, "file_digest", noted)
    for _ in range(3):
        list(source.documents())
    assert hashed == ["00000.tokens", "00001.tokens", "00002.tokens"]


# What was kept --------------------------------------------------------------------------------------------------------


def test_the_beginning_of_documents(corpus: Corpus, tokenizer: Tokenizer, prepare: Prepare) -> None:
    config = corpus(15, 4, 18)
    folder = prepare(config, max_tokens="20")
    source = prepared(folder)
    texts = list(open_source(config, "train").documents())
    assert [ids.tolist() for ids in source.documents()] == [tokenizer.encode([text], 20)[0] for text in texts]
    for length in (2, 16, 21):
        theirs = steps(batches(open_source(config, "train"), tokenizer, length=length), 6)
        assert same(steps(batches(prepared(folder), tokenizer, length=length), 6), theirs)
    with pytest.raises(UserError, match=r"first 20 tokens of each document, and these rows need 21: .* at most 21"):
        steps(batches(source, tokenizer, length=22), 1)
    with pytest.raises(UserError, match="these rows need all of them"):
        steps(batches(source, tokenizer, rows="pack"), 1)
    with pytest.raises(UserError, match=r"less than data.rows=pack"):
        prepare(config, "other", max_tokens="20", rows="pack")
    with pytest.raises(UserError, match=r"less than data.rows=truncate with data.length=16"):
        prepare(config, "other", max_tokens="14")
    assert json.loads((prepare(config, "row", max_tokens="row") / "manifest.json").read_text())["max_tokens"] == 15


def test_only_the_tokenizer_it_was_made_with(corpus: Corpus, tokenizer: Tokenizer, prepare: Prepare) -> None:
    config = corpus(15, 4, 18)
    other = load_tokenizer("sample_4k")
    with pytest.raises(UserError, match=r"prepared with the tokenizer sample_1k .* set tokenizer=sample_1k"):
        steps(batches(prepared(prepare(config)), other), 1)


def test_a_vocabulary_beyond_16_bits(corpus: Corpus, prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    large = load_tokenizer("sample_1k")
    large.vocab_size = 65_537
    monkeypatch.setattr(script, "load_tokenizer", lambda name: large)
    with pytest.raises(UserError, match="65,537 pieces, and prepared data hold at most 65,536"):
        prepare(corpus(5))
    large.vocab_size = 65_536
    prepare(corpus(5))


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Ten shards of about 40 documents; the command keeps little more than it needs."""
    monkeypatch.setattr(preparation, "AHEAD", 64)
    for shard in range(10):
        texts = [f"document {shard} {i}" + " and so on" * (i % 5) for i in range(38 + shard % 4)]
        write_shard(tmp_path / f"c4-train.{shard:05d}-of-00010.json.gz", texts)
    write_shard(tmp_path / "c4-validation.00000-of-00001.json.gz", ["held out"])
    return {"kind": "c4_local", "path": str(tmp_path)}


@pytest.mark.parametrize(("rows", "buffer"), [("truncate", 5), ("pack", 5), ("truncate", 0)])
def test_only_what_some_steps_need(
    large: dict[str, Any], tokenizer: Tokenizer, prepare: Prepare, rows: str, buffer: int
) -> None:
    options = {"rows": rows, "shuffle_buffer": buffer}
    folder = prepare(large, steps=4, **options)
    some = {path.name for path in (folder / "train").glob("*.tokens")}
    assert 1 <= len(some) < 10
    whole = steps(batches(open_source(large, "train"), tokenizer, **options), 200 if rows == "truncate" else 60)
    loader = batches(prepared(folder), tokenizer, **options, prefetch=2)
    assert same(steps(loader, 4), whole[:4])
    resumed = batches(prepared(folder), tokenizer, **options)
    resumed.load_state_dict(loader.state_dict())
    with pytest.raises(UserError, match=r"prepared for 4 steps of 7 rows \(.*data.seed=42.*run .*more --steps"):
        steps(resumed, 196)
    assert prepare(large, steps=20, **options) == folder
    more = {path.name for path in (folder / "train").glob("*.tokens")}
    assert some < more
    assert same(steps(batches(prepared(folder), tokenizer, **options), 20), whole[:20])
    prepare(large, steps=4, seed=1, **options)
    for seed, count in ((1, 4), (42, 20)):
        theirs = steps(batches(open_source(large, "train"), tokenizer, seed=seed, **options), count)
        assert same(steps(batches(prepared(folder), tokenizer, seed=seed, **options), count), theirs)
    prepare(large, **options)
    assert same(steps(batches(prepared(folder), tokenizer, **options), len(whole)), whole)


def test_more_steps_than_an_epoch_need_everything(large: dict[str, Any], prepare: Prepare) -> None:
    assert prepared(prepare(large, steps=1000)).total == sum(38 + shard % 4 for shard in range(10))


def test_a_shard_that_is_not_needed_may_be_damaged(large: dict[str, Any], prepare: Prepare) -> None:
    order = preparation.shard_order(10, 42, 0)
    bad = Path(large["path"]) / f"c4-train.{order[6]:05d}-of-00010.json.gz"
    bad.write_bytes(b"no gzip")
    folder = prepare(large, steps=4)
    with pytest.raises(UserError, match=rf"{bad.name}.*were finished are kept"):
        prepare(large)
    assert len(list((folder / "train").glob("*.tokens"))) == 6


def test_part_of_a_mirror(large: dict[str, Any], prepare: Prepare, tokenizer: Tokenizer) -> None:
    """The files that some steps need are enough for these steps, and for no more."""
    whole = steps(batches(open_source(large, "train"), tokenizer), 6)
    needed = prepare(large, "whole", steps=6)
    for file in Path(large["path"]).glob("c4-train.*"):
        if not (needed / "train" / f"{file.name[9:14]}.tokens").exists():
            file.unlink()
    assert same(steps(batches(prepared(prepare(large, steps=6)), tokenizer), 6), whole)
    with pytest.raises(UserError, match=r"is not here.*fetch_c4.py"):
        prepare(large)
    with pytest.raises(UserError, match=r"is not here.*fetch_c4.py.*were finished are kept"):
        prepare(large, steps=30)


# Damage ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 100, -1])
def test_a_flipped_bit(corpus: Corpus, tokenizer: Tokenizer, prepare: Prepare, place: int) -> None:
    """Training stops before the first row of the file; the message leads to a folder as it was."""
    config = corpus(15, 4, 18)
    folder = prepare(config)
    good = contents(folder)
    path = folder / "train" / "00001.tokens"
    damaged = bytearray(path.read_bytes())
    damaged[place] ^= 16
    path.write_bytes(damaged)
    source = prepared(folder)
    assert len([next(source.documents()) for _ in range(3)]) == 3
    with pytest.raises(UserError, match=r"00001.tokens is damaged.*delete it and run the same scripts/prepare_data.py"):
        steps(batches(source, tokenizer), 6)
    path.unlink()
    prepare(config)
    assert contents(folder) == good


def test_a_file_that_is_cut_or_missing(corpus: Corpus, prepare: Prepare) -> None:
    config = corpus(15, 4, 18)
    folder = prepare(config)
    good = contents(folder)
    path = folder / "train" / "00001.tokens"
    source = prepared(folder)
    path.write_bytes(path.read_bytes()[:-8])
    for act in (lambda: prepared(folder), lambda: list(source.documents())):
        with pytest.raises(UserError, match=r"00001.tokens has [\d,]+ bytes instead of [\d,]+: run the same"):
            act()
    path.unlink()
    with pytest.raises(UserError, match=r"00001.tokens is missing"):
        prepared(folder)
    prepare(config)
    assert contents(folder) == good


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace('"documents": 15', '"documents": 14'), "was edited or damaged"),
        (lambda text: text.replace("sample_1k", "sample_4k"), "was edited or damaged"),
        (lambda text: text[:-100], "cannot be read"),
        (lambda text: "[]", "is not that of prepared data"),
        (lambda text: text.replace('"kind": "prepared"', '"kind": "mirror"'), "is not that of prepared data"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "has format 2, and this version reads 1"),
    ],
)
def test_an_edited_manifest(corpus: Corpus, prepare: Prepare, change: Callable[[str], str], message: str) -> None:
    config = corpus(15, 4, 18)
    folder = prepare(config)
    good = contents(folder)
    path = folder / "manifest.json"
    text = path.read_text()
    assert change(text) != text
    path.write_text(change(text))
    with pytest.raises(UserError, match=rf"manifest.json .*{message}"):
        prepared(folder)
    prepare(config)
    assert contents(folder) == good


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"{}", b'{"plan": 5}', None])
def test_a_description_that_says_nothing_is_written_again(
    corpus: Corpus, prepare: Prepare, content: bytes | None
) -> None:
    """The JSON file beside a shard; None: a pipe, at which nobody waits."""
    config = corpus(15, 4, 18)
    folder = prepare(config)
    good = contents(folder)
    path = folder / "train/00001.json"
    path.unlink()
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content)
    prepare(config)
    assert contents(folder) == good


def test_a_description_with_other_numbers_is_written_again(corpus: Corpus, prepare: Prepare) -> None:
    config = corpus(15, 4, 18)
    folder = prepare(config)
    good = contents(folder)
    path = folder / "train/00001.json"
    for key, value in (("documents", -4), ("documents", 5), ("tokens", "many"), ("bytes", None), ("sha256", 5)):
        described = json.loads(good["train/00001.json"])
        described["entry"][key] = value
        path.write_text(json.dumps(described))
        prepare(config)
        assert contents(folder) == good


def test_a_folder_that_is_not_prepared(corpus: Corpus, prepare: Prepare) -> None:
    config = corpus(15, 4, 18)
    with pytest.raises(UserError, match=r"manifest.json is missing: give a folder that scripts/prepare_data.py wrote"):
        prepared(Path(config["path"]))
    folder = prepare(config)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"the preparation has not ended: run the same"):
        prepared(folder)
    with pytest.raises(UserError, match="does not exist"):
        prepared(folder / "nowhere")


def test_damaged_text_is_the_source_s_error(corpus: Corpus, prepare: Prepare, tmp_path: Path) -> None:
    config = corpus(15, 4, 18)
    path = tmp_path / "en" / "c4-train.00001-of-00003.json.gz"
    good = path.read_bytes()
    path.write_bytes(good[:-12])
    with pytest.raises(UserError, match=path.name):
        prepare(config)
    assert not (tmp_path / "prepared" / "manifest.json").exists()


def test_damaged_text_may_be_left_out(corpus: Corpus, prepare: Prepare, tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = {**corpus(15, 4, 18), "on_error": "skip"}
    path = tmp_path / "en" / "c4-train.00001-of-00003.json.gz"
    path.write_bytes(path.read_bytes()[:-12])
    theirs = open_source(config, "train")
    rows = steps(batches(theirs, tokenizer), 12)
    source = prepared(prepare(config))
    assert same(steps(batches(source, tokenizer), 12), rows)
    assert source.damaged == theirs.damaged == {1: 1} and source.identity == theirs.identity


def test_a_corpus_without_text(tmp_path: Path, prepare: Prepare) -> None:
    for split in ("train", "validation"):
        for shard in range(2):
            write_shard(tmp_path / f"c4-{split}.{shard:05d}-of-00002.json.gz", [" "])
    with pytest.raises(UserError, match="holds no documents with text"):
        prepare({"kind": "c4_local", "path": str(tmp_path)})


# A folder belongs to one preparation ----------------------------------------------------------------------------------


def test_another_preparation_is_refused(corpus: Corpus, prepare: Prepare, tmp_path: Path) -> None:
    config = corpus(15, 4, 18)
    folder = prepare(config)
    good = contents(folder)
    with pytest.raises(UserError, match=r"something else: the tokenizer was sample_1k .* is sample_4k .*new folder"):
        prepare(config, tokenizer="sample_4k")
    elsewhere = tmp_path / "copy.model"
    shutil.copy(ROOT / "data" / "sample" / "sample_1k.model", elsewhere)
    prepare(config, tokenizer=str(elsewhere))  # the same one by another name
    with pytest.raises(UserError, match="--max-tokens was None and is 15"):
        prepare(config, max_tokens="row")
    with pytest.raises(UserError, match="what the validation rows need was None and is"):
        prepare(config, validation_max_tokens=10)
    write_shard(tmp_path / "en" / "c4-train.00001-of-00003.json.gz", ["another text"])
    with pytest.raises(UserError, match="the train split was"):
        prepare(config)
    assert contents(folder) == good
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(UserError, match=r"holds other files \(thesis.txt\)"):
        prepare(config, "mine")
    with pytest.raises(UserError, match="Only text can be prepared"):
        prepare({"kind": "prepared", "path": str(folder)}, "again")


def test_two_at_once_are_refused(corpus: Corpus, prepare: Prepare, tmp_path: Path) -> None:
    config = corpus(5)
    (tmp_path / "prepared").mkdir()
    with (
        script.RunLock(tmp_path / "prepared" / "preparation"),
        pytest.raises(UserError, match="being written by process"),
    ):
        prepare(config)
    prepare(config)


# Interruptions --------------------------------------------------------------------------------------------------------


def run_and_die(act: Callable[[], object], operation: int) -> bool:
    """Whether a child process, doing `act`, came to its disk operation of this number; it is killed just before it."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1] != 0
    left = operation

    def deadly(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "replace", "open"):
        setattr(os, name, deadly(getattr(os, name)))
    try:
        act()
        os._exit(0)
    finally:
        os._exit(2)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_killed_at_any_instant(corpus: Corpus, prepare: Prepare, tmp_path: Path) -> None:
    config = corpus(15, 4)
    good = contents(prepare(config, "undisturbed"))
    operation, kept = 0, set()
    while run_and_die(lambda: prepare(config, "killed"), operation):
        described = [path.with_suffix(".tokens") for path in (tmp_path / "killed").glob("*/*.json")]
        finished = {path: path.stat().st_ino for path in described}
        kept.add(len(finished))
        folder = prepare(config, "killed")
        assert contents(folder) == good, operation
        assert all(path.stat().st_ino == node for path, node in finished.items())
        shutil.rmtree(folder)
        operation += 1
    assert operation >= 25 and kept == {0, 1, 2, 3}


def processes() -> dict[int, int]:
    """The running processes, each with its parent."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if fields[0] != "Z":
            found[int(path.parent.name)] = int(fields[1])
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_a_killed_pool_leaves_no_process_and_the_same_files(tmp_path: Path, prepare: Prepare) -> None:
    """The command with two workers is killed; what two new ones make of it is what one process makes alone."""
    for shard in range(40):
        texts = [f"document {shard} {i}" + " and so on" * 100 for i in range(400)]
        write_shard(tmp_path / f"c4-train.{shard:05d}-of-00040.json.gz", texts)
    write_shard(tmp_path / "c4-validation.00000-of-00001.json.gz", ["held out"])
    folder = tmp_path / "prepared"
    command = [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), "--to", str(folder), "--jobs", "2"]
    command += ["data=c4_local", f"data.path={tmp_path}", "tokenizer=sample_1k"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while process.poll() is None and not list(folder.glob("train/0*.json")):
            time.sleep(0.002)
        workers = {pid for pid, parent in processes().items() if parent == process.pid}
        process.kill()
    finished = {path: path.with_suffix(".tokens").stat().st_ino for path in folder.glob("train/0*.json")}
    assert len(workers) >= 2 and finished and not (folder / "manifest.json").exists()
    deadline = time.monotonic() + 60
    while workers & processes().keys() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not workers & processes().keys()
    config = {"kind": "c4_local", "name": "c4_local", "path": str(tmp_path)}
    options = {"max_tokens": "row", "length": 256, "shuffle_buffer": 1000, "validation_max_tokens": 10_000_000}
    prepare(config, jobs=2, batch_size=512, **options)
    assert all(path.with_suffix(".tokens").stat().st_ino == node for path, node in finished.items())
    assert contents(prepare(config, "alone", batch_size=512, **options)) == contents(folder)
    cfg = compose(["data=prepared", f"data.path={folder}", "tokenizer=sample_1k"])
    assert open_source(cfg.data, "train").total == 16_000


def test_ctrl_c_says_how_to_go_on(corpus: Corpus, prepare: Prepare, monkeypatch: Any, capsys: Any) -> None:
    config = corpus(15, 4, 18)
    folder = prepare(config, "undisturbed")
    good = contents(folder)
    shutil.rmtree(folder)
    calls: list[Any] = []
    write = preparation.write_shard

    def interrupted(*args: Any) -> dict[str, Any]:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write(*args)

    monkeypatch.setattr(preparation, "write_shard", interrupted)
    words = ["--to", str(folder), "--max-tokens", "all", "--batch-size", "7", "--jobs", "1"]
    assert script.main(words) == 130
    assert f"python scripts/prepare_data.py {' '.join(words)}" in capsys.readouterr().err
    assert script.main(words) == 0
    assert contents(folder) == good and len(calls) == 5


def test_a_full_disk(corpus: Corpus, prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    config = corpus(15, 4, 18)
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=500))
    with pytest.raises(UserError, match=r"too small, about 0.0\d MB needed \(from a sample\), 0.00 MB free"):
        prepare(config)
    monkeypatch.setattr(shutil, "disk_usage", usage)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    fsync = os.fsync
    with monkeypatch.context() as context, pytest.raises(UserError, match=r"0.*cannot be written \(No space left"):
        context.setattr(os, "fsync", lambda handle: full(handle) if os.fstat(handle).st_size > 1500 else fsync(handle))
        prepare(config)
    folder = prepare(config)
    assert not list(folder.rglob(".*")) and prepared(folder).total == 37
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["digest"] == digest(manifest)
