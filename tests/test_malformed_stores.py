"""Malformed tokenizers, and prepared data that is damaged or was edited so that every checksum still holds."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import load_tokenizer, open_source
from data.prepared import MANIFEST, PLAN, digest
from data.sources import SAMPLE
from scripts import prepare_data

from .test_malformed import open_cases, refused, within
from .test_malformed_data import NESTED, gz, record, rows

# Prepared data --------------------------------------------------------------------------------------------------------

Edit = Callable[[Path], object]
SHARD = "train/00000.tokens"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of 40 and 30 documents, prepared whole."""
    base = tmp_path_factory.mktemp("prepared")
    (base / "c4").mkdir()
    for shard, count in ((0, 40), (1, 30)):
        content = b"".join(record(f"document {shard} {i}" + " and so on" * (i % 5)) for i in range(count))
        (base / f"c4/c4-train.{shard:05d}-of-00002.json.gz").write_bytes(gz(content))
    (base / "c4/c4-validation.00000-of-00001.json.gz").write_bytes(gz(record("held out")))
    words = ["data=c4_local", f"data.path={base / 'c4'}", "tokenizer=sample_1k", "model=llama_tiny"]
    prepare_data.run(
        argparse.Namespace(to=base / "p", max_tokens="all", steps=None, batch_size=4, jobs=1, overrides=words)
    )
    return base / "p"


def rewritten(edit: Callable[[dict[str, Any]], object]) -> Edit:
    """An edit of the manifest, with its own digest made anew."""

    def change(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        edit(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest | {"digest": digest(manifest)}))

    return change


def rewritten_shard(edit: Callable[[np.ndarray, np.ndarray], object], **facts: Any) -> Edit:
    """An edit of the first shard's tokens and ends, with every checksum made anew; `facts` go into its entry."""

    def change(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        entry = manifest["splits"]["train"]["files"][0]
        content = bytearray((folder / SHARD).read_bytes())
        tokens = np.frombuffer(content, "<u2", entry["tokens"])
        ends = np.frombuffer(content, "<u8", entry["documents"], len(content) - 8 * entry["documents"])
        edit(tokens, ends)
        (folder / SHARD).write_bytes(content)
        entry |= {"sha256": hashlib.sha256(content).hexdigest(), **facts}
        (folder / MANIFEST).write_text(json.dumps(manifest | {"digest": digest(manifest)}))

    return change


def put(name: str, content: bytes) -> Edit:
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str, left: Callable[[int], int]) -> Edit:
    return lambda folder: os.truncate(folder / name, left((folder / name).stat().st_size))


def flip(name: str, part: float) -> Edit:
    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[int(part * (len(content) - 1))] ^= 4
        (folder / name).write_bytes(content)

    return change


def instead(name: str, make: Callable[[Path], object]) -> Edit:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


def entry(**facts: Any) -> Edit:
    return rewritten(lambda m: m["splits"]["train"]["files"][0].update(facts))


def train(**facts: Any) -> Edit:
    return rewritten(lambda m: m["splits"]["train"].update(facts))


# name: (what is done to the folder, words of the message)
PREPARED: dict[str, tuple[Edit, str]] = {
    "no manifest": (lambda f: [(f / name).unlink() for name in (MANIFEST, PLAN)], f"{MANIFEST} is missing"),
    "not ended": (lambda f: (f / MANIFEST).unlink(), f"{MANIFEST} is missing, the preparation has not ended"),
    "empty manifest": (put(MANIFEST, b""), f"{MANIFEST} cannot be read"),
    "cut manifest": (cut(MANIFEST, lambda size: size // 2), f"{MANIFEST} cannot be read"),
    "manifest without its end": (cut(MANIFEST, lambda size: size - 3), f"{MANIFEST} cannot be read"),
    "manifest not UTF-8": (put(MANIFEST, b'{"kind": "\xff"}'), f"{MANIFEST} cannot be read"),
    "deep manifest": (put(MANIFEST, NESTED), f"{MANIFEST} cannot be read"),
    "list as manifest": (put(MANIFEST, b"[]"), f"{MANIFEST} is not that of prepared data"),
    "number as manifest": (put(MANIFEST, b"NaN"), f"{MANIFEST} is not that of prepared data"),
    "manifest of a mirror": (put(MANIFEST, b'{"kind": "mirror", "format": 1}'), "is not that of prepared data"),
    "manifest of a later format": (put(MANIFEST, b'{"kind": "prepared", "format": 2}'), f"{MANIFEST} has format 2"),
    "manifest in words": (put(MANIFEST, b'{"kind": "prepared", "format": "1"}'), f"{MANIFEST} has format 1"),
    "manifest without digest": (put(MANIFEST, b'{"kind": "prepared", "format": 1}'), "was edited or damaged"),
    "edited manifest": (
        lambda f: put(MANIFEST, (f / MANIFEST).read_bytes().replace(b'"documents": 40', b'"documents": 41'))(f),
        f"{MANIFEST} was edited or damaged",
    ),
    "manifest is a folder": (instead(MANIFEST, Path.mkdir), f"{MANIFEST} cannot be read"),
    "manifest links to itself": (instead(MANIFEST, lambda p: p.symlink_to(p)), f"{MANIFEST} cannot be read"),
    "manifest is a pipe": (instead(MANIFEST, os.mkfifo), MANIFEST),
    "no shard": (lambda f: (f / SHARD).unlink(), f"{SHARD} is missing"),
    "empty shard": (put(SHARD, b""), f"{SHARD} has 0 bytes"),
    "shard without its last byte": (cut(SHARD, lambda size: size - 1), f"{SHARD} has"),
    "half a shard": (cut(SHARD, lambda size: size // 2), f"{SHARD} has"),
    "longer shard": (cut(SHARD, lambda size: size + 8), f"{SHARD} has"),
    **{
        f"shard flipped at {part:.0%}": (flip(SHARD, part), f"{SHARD} is damaged: its SHA-256 is")
        for part in (0, 0.3, 0.6, 1)
    },
    "shard is a folder": (instead(SHARD, Path.mkdir), SHARD),
    "shard links to nowhere": (instead(SHARD, lambda p: p.symlink_to("nowhere")), f"{SHARD} is missing"),
    "shard is a pipe": (instead(SHARD, os.mkfifo), SHARD),
    "the other shard": (lambda f: shutil.copy(f / "train/00001.tokens", f / SHARD), f"{SHARD} has"),
    "zeros of the same size": (
        lambda f: (f / SHARD).write_bytes(bytes((f / SHARD).stat().st_size)),
        f"{SHARD} is damaged: its SHA-256 is",
    ),
    # Edited, with every checksum made anew
    "no splits": (rewritten(lambda m: m.pop("splits")), MANIFEST),
    "no training split": (rewritten(lambda m: m["splits"].pop("train")), MANIFEST),
    "list of splits": (rewritten(lambda m: m.update(splits=[])), MANIFEST),
    "no tokenizer": (rewritten(lambda m: m.pop("tokenizer")), MANIFEST),
    "no fingerprint": (rewritten(lambda m: m["tokenizer"].pop("fingerprint")), MANIFEST),
    "no longest": (rewritten(lambda m: m.pop("max_tokens")), MANIFEST),
    "longest in words": (rewritten(lambda m: m.update(max_tokens="all")), MANIFEST),
    "no files": (train(files=None), MANIFEST),
    "files in words": (train(files=["a"]), MANIFEST),
    "file without a name": (rewritten(lambda m: m["splits"]["train"]["files"][0].pop("file")), MANIFEST),
    "number as file": (entry(file=5), MANIFEST),
    "bytes in words": (entry(bytes="many"), MANIFEST),
    "shards in words": (train(shards="2"), MANIFEST),
    "no shards": (train(shards=0), ""),
    "fewer shards than files": (train(shards=1), MANIFEST),
    "one shard twice": (entry(index=1), ""),
    "shard below zero": (entry(index=-1), ""),
    "documents in words": (entry(documents="40"), MANIFEST),
    "fewer documents": (entry(documents=39), MANIFEST),
    "more documents": (entry(documents=41), MANIFEST),
    "documents below zero": (entry(documents=-40), MANIFEST),
    "more tokens than bytes": (entry(tokens=10**9), MANIFEST),
    "tokens below zero": (entry(tokens=-8), MANIFEST),
    "source is a text": (train(source="c4"), MANIFEST),
    "SHA-256 is a number": (entry(sha256=5), MANIFEST),
    "ends that fall": (rewritten_shard(lambda tokens, ends: np.copyto(ends, ends[::-1].copy())), SHARD),
    "ends beyond the tokens": (rewritten_shard(lambda tokens, ends: ends.fill(2**40)), SHARD),
    "ends of 2^64 - 1": (rewritten_shard(lambda tokens, ends: ends.fill(2**64 - 1)), SHARD),
    "ends that leave tokens over": (rewritten_shard(lambda tokens, ends: np.copyto(ends, ends // 2)), SHARD),
    "ids outside the vocabulary": (rewritten_shard(lambda tokens, ends: tokens.fill(60_000)), SHARD),
    "one id outside the vocabulary": (rewritten_shard(lambda tokens, ends: np.copyto(tokens[5:6], 1024)), SHARD),
}


@pytest.mark.parametrize("name", open_cases("prepared", PREPARED))
def test_prepared_data_that_cannot_be_used(tmp_path: Path, folder: Path, name: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "p"))
    edit, words = PREPARED[name]
    edit(copy)
    config = {"kind": "prepared", "path": str(copy)}
    refused(lambda: rows(config, 20, length=64), str(copy), words)


def test_the_folder_itself_is_whole(folder: Path) -> None:
    """What the cases above begin from: its rows are those of the text."""
    ours = rows({"kind": "prepared", "path": str(folder)}, 20, length=64)
    theirs = rows({"kind": "c4_local", "path": str(folder.parent / "c4")}, 20, length=64)
    assert all((a == b).all() for a, b in zip(ours, theirs, strict=True))


# Tokenizers -----------------------------------------------------------------------------------------------------------

MODEL = (SAMPLE / "sample_1k.model").read_bytes()


def sentencepiece(**options: Any) -> bytes:
    import sentencepiece as library

    out = io.BytesIO()
    sentences = iter(["a small set of words to learn from", "and another set"] * 20)
    library.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_writer=out, vocab_size=30, minloglevel=9, model_type="bpe", **options
    )
    return out.getvalue()


def a_file(content: bytes | Callable[[], bytes], name: str = "x.model") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content())
        return folder / name

    return make


def a_folder(change: Callable[[Path], object], **files: Any) -> Callable[[Path], Path]:
    """A folder as `save_pretrained` writes it, but without the SentencePiece file; changed."""

    def make(folder: Path) -> Path:
        load_tokenizer("sample_1k").save_pretrained(folder / "t")
        (folder / "t/spiece.model").unlink()
        change(folder / "t")
        return folder / "t"

    return make


def edited(name: str, edit: Callable[[Any], object]) -> Callable[[Path], Path]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        edit(content)
        (folder / name).write_text(json.dumps(content))

    return a_folder(change)


def nested_file(name: str) -> Callable[[Path], Path]:
    return a_folder(lambda f: (f / name).write_bytes(NESTED))


def with_piece(old: bytes, new: bytes) -> bytes:
    assert old in MODEL and len(old) == len(new)
    return MODEL.replace(old, new, 1)


TOKENIZERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing there": (lambda f: f / "x.model", "There is no tokenizer at"),
    "empty file": (a_file(b""), "x.model has no end-of-text piece"),
    "zeros": (a_file(bytes(5000)), "x.model is not a SentencePiece model"),
    "text": (a_file(b"just words\n"), "x.model is not a SentencePiece model"),
    "zipped": (a_file(gzip.compress(MODEL)), "x.model is not a SentencePiece model"),
    "pickle": (a_file(pickle.dumps({"vocab": ["a"]})), "x.model is not a SentencePiece model"),
    "large file pointer": (a_file(b"version https://git-lfs.github.com/spec/v1\n"), "is not a SentencePiece model"),
    "vocabulary of words": (a_file(b"the\t-1.5\nof\t-2.5\n", "x.vocab"), "x.vocab is not a SentencePiece model"),
    "tokenizer.json": (a_file(b'{"version": "1.0"}', "tokenizer.json"), "tokenizer.json is not a SentencePiece model"),
    **{
        f"cut at {part:.0%}": (a_file(MODEL[: int(part * len(MODEL))]), "x.model is not a SentencePiece model")
        for part in (0.1, 0.5, 0.9)
    },
    "without the last byte": (a_file(MODEL[:-1]), "x.model is not a SentencePiece model"),
    "without the normaliser": (a_file(MODEL[:-16]), "x.model is not a SentencePiece model"),
    "bytes after it": (a_file(MODEL + b"\xff"), "x.model is not a SentencePiece model"),
    "first byte flipped": (a_file(b"\x0b" + MODEL[1:]), "x.model is not a SentencePiece model"),
    "piece that is no text": (a_file(lambda: with_piece(b"tion", b"ti\xff\xff")), "is not a SentencePiece model"),
    "no end-of-text piece": (a_file(lambda: sentencepiece(eos_id=-1)), "x.model has no end-of-text piece"),
    "a pipe": (lambda f: (os.mkfifo(f / "x.model"), f / "x.model")[1], "There is no tokenizer at"),
    "a folder": (lambda f: ((f / "x.model").mkdir(), f / "x.model")[1], "x.model holds no tokenizer"),
    "empty folder": (lambda f: f, "holds no tokenizer"),
    "link to nowhere": (lambda f: ((f / "x.model").symlink_to("nowhere"), f / "x.model")[1], "There is no tokenizer"),
    "folder with an empty SentencePiece file": (
        lambda f: ((f / "spiece.model").write_bytes(b""), f)[1],
        "spiece.model has no end-of-text piece",
    ),
    "folder without tokenizer.json": (a_folder(lambda f: (f / "tokenizer.json").unlink()), "holds no tokenizer"),
    "empty tokenizer.json": (a_folder(lambda f: (f / "tokenizer.json").write_bytes(b"")), "holds no tokenizer"),
    "cut tokenizer.json": (a_folder(lambda f: os.truncate(f / "tokenizer.json", 5000)), "holds no tokenizer"),
    "deep tokenizer.json": (nested_file("tokenizer.json"), "holds no tokenizer"),
    "list as tokenizer.json": (a_folder(lambda f: (f / "tokenizer.json").write_text("[]")), "holds no tokenizer"),
    "tokenizer.json without a model": (edited("tokenizer.json", lambda t: t.pop("model")), "holds no tokenizer"),
    "tokenizer.json of another kind": (
        edited("tokenizer.json", lambda t: t["model"].update(type="Other")),
        "holds no tokenizer",
    ),
    "merges of unknown pieces": (
        edited("tokenizer.json", lambda t: t["model"].update(merges=[["no", "such"]])),
        "holds no tokenizer",
    ),
    "ids in words": (edited("tokenizer.json", lambda t: t["model"]["vocab"].update(a="b")), "holds no tokenizer"),
    "cut settings": (a_folder(lambda f: os.truncate(f / "tokenizer_config.json", 20)), "holds no tokenizer"),
    "deep settings": (nested_file("tokenizer_config.json"), "holds no tokenizer"),
    "list as settings": (a_folder(lambda f: (f / "tokenizer_config.json").write_text("[]")), "holds no tokenizer"),
    "settings without end-of-text": (
        edited("tokenizer_config.json", lambda t: t.pop("eos_token")),
        "has no end-of-text token",
    ),
    "settings with code of their own": (
        edited(
            "tokenizer_config.json",
            lambda t: t.update(auto_map={"AutoTokenizer": [None, "code.Fast"]}, tokenizer_class="NoSuchTokenizer"),
        ),
        "holds no tokenizer",
    ),
}
CASES = [*(f"prepared, {name}" for name in PREPARED), *(f"tokenizer, {name}" for name in TOKENIZERS)]


@pytest.mark.parametrize("name", open_cases("tokenizer", TOKENIZERS))
@pytest.mark.filterwarnings("ignore")
def test_a_tokenizer_that_cannot_be_loaded(tmp_path: Path, name: str) -> None:
    make, words = TOKENIZERS[name]
    path = make(tmp_path)
    refused(lambda: load_tokenizer(path), str(path), words)


def test_a_damaged_tokenizer_that_still_loads_is_another_one(folder: Path, tmp_path: Path) -> None:
    """A letter of a piece changed: prepared data, and saved places in the data, know the file by its digest."""
    (tmp_path / "x.model").write_bytes(with_piece(b"tion", b"tiom"))
    tokenizer = load_tokenizer(tmp_path / "x.model")
    source = open_source({"kind": "prepared", "path": str(folder)}, "train")
    with within():
        refused(
            lambda: source.tokens(list(source.documents()), tokenizer), "x.model", "was prepared with the tokenizer"
        )
