"""A small corpus in C4's layout, whose documents name themselves."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from data import Source, Tokenizer, load_tokenizer, open_source

Corpus = Callable[..., dict[str, Any]]


def write_shard(path: Path, texts: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text, "timestamp": "unknown", "url": ""}) + "\n")


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer("sample_1k")


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """corpus(sizes) writes one training shard a size, with documents `document 0`, `document 1`, ... of various lengths.

    Document 5 is longer than several steps of the tests.
    Returns a data config; the documents are numbered in file order over all shards.
    """

    def make(*sizes: int) -> dict[str, Any]:
        number = 0
        for shard, size in enumerate(sizes):
            texts = [
                f"document {number + i}" + " and so on" * (300 if number + i == 5 else (number + i) % 7)
                for i in range(size)
            ]
            number += size
            write_shard(tmp_path / "en" / f"c4-train.{shard:05d}-of-{len(sizes):05d}.json.gz", texts)
        write_shard(tmp_path / "en" / "c4-validation.00000-of-00001.json.gz", ["held out one", "held out two"])
        return {"kind": "c4_local", "path": str(tmp_path)}

    return make


@pytest.fixture
def train(corpus: Corpus) -> Source:
    """37 documents in three shards: neither divides the batches of the tests."""
    return open_source(corpus(15, 4, 18), "train")
