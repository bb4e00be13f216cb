"""The embedded sample and tokenizers: schema, separation of the splits, size, and that the scripts rebuild them."""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from data import IGNORE, load_tokenizer, open_source, validation_rows

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "data" / "sample"


def records(split: str) -> list[dict[str, Any]]:
    found = []
    for path in sorted((SAMPLE / "en").glob(f"c4-{split}.*.json.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            found += [json.loads(line) for line in file]
    return found


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("split", ["train", "validation"])
def test_schema(split: str) -> None:
    found = records(split)
    assert len(found) >= 50
    for record in found:
        assert set(record) == {"text", "timestamp", "url"}
        assert record["timestamp"] == "unknown"
        assert record["url"] == "" or record["url"].startswith("https://en.wikipedia.org/")
        assert len(record["text"]) >= 200 and record["text"] == record["text"].strip()
        if record["url"]:  # an article: no debris of its extraction
            assert not re.search(r"&lt;|\[\[|\{\{|</|formula_", record["text"])
    assert list(open_source({"kind": "sample"}, split).documents()) == [record["text"] for record in found]


def test_no_document_url_or_long_line_is_in_both_splits() -> None:
    def marks(split: str) -> set[str]:
        found = records(split)
        lines = {line for record in found for line in record["text"].split("\n") if len(line) >= 100}
        return lines | {record["url"] for record in found if record["url"]} | {record["text"] for record in found}

    assert not marks("train") & marks("validation")


def test_sizes() -> None:
    assert sum(path.stat().st_size for path in SAMPLE.rglob("*") if path.is_file()) <= 3_000_000
    tokenizer = load_tokenizer("sample_1k")
    _, labels = validation_rows(open_source({"kind": "sample"}, "validation"), tokenizer, 256, "pack")
    assert int((labels != IGNORE).sum()) >= 60_000


def test_the_readme_counts_right() -> None:
    readme = (SAMPLE / "README.md").read_text()
    for split in ("train", "validation"):
        texts = [record["text"] for record in records(split)]
        counts = [len(texts), sum(len(text.encode()) for text in texts)]
        counts += [sum(len(ids) + 1 for ids in load_tokenizer(f"sample_{n}k").encode(texts)) for n in (1, 4)]
        assert " | ".join(f"{count:,}" for count in counts) in readme


ARTICLE = '<doc id="{0}" url="https://en.wikipedia.org/wiki?curid={0}" title="Title {0}">\nTitle {0}\n\n{1}\n\n</doc>\n'


def test_the_sample_script_cleans_and_is_deterministic(tmp_path: Path) -> None:
    build = script("build_sample").build
    body = "The [[river|stream]] ( ; ) of number {0} was &lt;ref&gt; known to the people of the town "
    body = (body + "that lies {0} miles from its bridge of {0} arches .\n") * 5
    articles = [
        ARTICLE.format(i, body.format(i) + "Results.\nLegacy.\nIt is remembered by all of those who live there.\n")
        for i in range(60)
    ]
    articles += [
        ARTICLE.format(98, "A stub."),
        ARTICLE.format(99, body.format(0)),
        ARTICLE.format(97, "formula_1" * 99),
    ]
    page = "This is page {0}, and it is one of the pages that the crawler has read in the night of the year. " * 4
    pages = [page.format(i) for i in range(20)] + ["buy cheap shoes " * 50, "function() {{ }} " + page.format(21)]
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("exllamav3/conversion/standard_cal_data/wiki.utf8", "".join(articles))
        archive.writestr("exllamav3/conversion/standard_cal_data/c4.utf8", "\n".join(pages))
    for folder in ("a", "b"):
        build(wheel, tmp_path / folder)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (SAMPLE / "en").iterdir())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    lines = [gzip.decompress((tmp_path / "a" / name).read_bytes()).decode().splitlines() for name in files]
    built = [json.loads(line) for part in lines for line in part]
    assert len(built) == 60 + 20
    article = next(record["text"] for record in built if record["url"].endswith("=7"))
    line = "The stream of number 7 was known to the people of the town that lies 7 miles from its bridge of 7 arches."
    assert article == "\n".join(["Title 7", *[line] * 5, "Legacy.", "It is remembered by all of those who live there."])


def test_the_tokenizer_script_is_deterministic() -> None:
    train = script("build_tokenizers").train
    assert train(1024) == train(1024)
