"""Rebuild the embedded sample, `data/sample/en`, byte for byte (with zlib; another gzip packs the same
lines).

    python scripts/build_sample.py                       # fetches the wheel with pip into a temporary folder
    python scripts/build_sample.py exllamav3-1.6.5-py3-none-any.whl

The text comes from two calibration files that the wheel exllamav3 1.6.5 carries: English Wikipedia articles
(`wiki.utf8`, CC BY-SA) and Common Crawl documents (`c4.utf8`). Cleaning only removes: extraction debris,
stubs, documents that are not running English, and documents that repeat a long line of an earlier one.
"""

from __future__ import annotations

import argparse
import gzip
import html
import io
import json
import random
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

WHEEL = "exllamav3==1.6.5"
FOLDER = "exllamav3/conversion/standard_cal_data/"
OUTPUT = Path(__file__).resolve().parent.parent / "data" / "sample" / "en"
TRAIN_SHARDS = 4
VALIDATION_SHARE = 0.06  # of the characters
MINIMUM_CHARACTERS = 200
UNKNOWN = "unknown"  # neither file keeps the time at which a page was read

Document = dict[str, str]

STOP_WORDS = frozenset(
    re.findall(r"\w+", "the of and to a in is that for it on with as was are be this by from at or you we")
)
UNWANTED = re.compile(r"\b(porn\w*|livejasmin|sexcam\w*|webcam ?sex|xxx|escorts?|nude|naked|fuck\w*|shit)\b", re.I)


def wikipedia(text: str) -> Iterator[Document]:
    """Articles of `wiki.utf8`: `<doc id url title>` blocks, as the tool wikiextractor writes them."""
    for url, title, body in re.findall(r'<doc id="\d+" url="([^"]*)" title="([^"]*)">\n(.*?)</doc>', text, re.S):
        body = html.unescape(html.unescape(body))
        if "formula_" in body:  # the extractor left placeholders instead of mathematics
            continue
        body = re.sub(r"<[^<>\n]{1,200}>", "", body)  # template remnants such as <onlyinclude>
        body = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", body).replace("[[", "").replace("]]", "")
        body = re.sub(r" ?\(\s*[;,\s]*\)", "", body)  # a parenthesis whose template was dropped
        body = re.sub(r"\((?:[;,]\s*)+", "(", body)
        body = re.sub(r" +([,.;])(?=\s)", r"\1", body)
        lines = [re.sub(r"[ \t]+", " ", line).strip() for line in body.split("\n")]
        lines = [line for line in lines if line]
        title = html.unescape(html.unescape(title))
        head, rest = ([title], lines[1:]) if lines and lines[0] == title else ([], lines)
        # A heading ("Results.") whose list or table was dropped is followed by another heading or by nothing.
        heading = [len(line) < 50 and line.endswith(".") and line.count(" ") < 6 for line in rest]
        kept = [line for i, line in enumerate(rest) if not heading[i] or (i + 1 < len(rest) and not heading[i + 1])]
        if sum(map(len, kept)) >= MINIMUM_CHARACTERS:
            yield {"text": "\n".join(head + kept), "timestamp": UNKNOWN, "url": url}


def common_crawl(text: str) -> Iterator[Document]:
    """Documents of `c4.utf8`: one a line, without addresses; those that are running English are kept."""
    for line in text.split("\n"):
        line = re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", line)
        line = re.sub(r" {2,}", " ", line).strip()
        words = re.findall(r"\w+", line.lower())
        if len(line) < MINIMUM_CHARACTERS or "{" in line or UNWANTED.search(line):  # braces: as C4 does
            continue
        sentences = len(re.findall(r"[a-z0-9,)\"”’][.!?](?:\s|$)", line))
        running = sum(word in STOP_WORDS for word in words) >= 0.15 * len(words) and len(words) <= 40 * sentences
        ascii_share = sum(ord(letter) < 128 for letter in line) / len(line)
        if running and ascii_share >= 0.95:
            yield {"text": line, "timestamp": UNKNOWN, "url": ""}


def distinct(documents: list[Document]) -> list[Document]:
    """The documents, less those that repeat a URL, a text, or a line of 100 characters of an earlier one."""
    seen: set[str] = set()
    result = []
    for document in documents:
        marks = {line.casefold() for line in document["text"].split("\n") if len(line) >= 100}
        marks |= {document["text"].casefold()[:100], document["url"]} - {""}
        if not marks & seen:
            result.append(document)
        seen |= marks
    return result


def write(path: Path, documents: list[Document]) -> None:
    """Write gzipped JSON lines without a time or a file name in the gzip header."""
    text = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", fileobj=buffer, mode="wb", compresslevel=9, mtime=0) as file:
        file.write(text.encode())
    path.write_bytes(buffer.getvalue())
    print(f"{path.name}: {len(documents)} documents, {len(text.encode()):,} bytes, {path.stat().st_size:,} gzipped")


def build(wheel: Path, output: Path) -> None:
    """Write the sample's shards into the folder `output`."""
    with zipfile.ZipFile(wheel) as archive:
        articles = archive.read(FOLDER + "wiki.utf8").decode()
        pages = archive.read(FOLDER + "c4.utf8").decode()
    documents = distinct([*wikipedia(articles), *common_crawl(pages)])
    # `random()` is the one method whose sequence Python promises to keep.
    rng = random.Random(2502_07752)
    order = sorted((rng.random(), i) for i in range(len(documents)))
    documents = [documents[i] for _, i in order]
    budget = VALIDATION_SHARE * sum(len(document["text"]) for document in documents)
    held_out = 0
    while budget > 0:
        budget -= len(documents[held_out]["text"])
        held_out += 1
    validation, train = documents[:held_out], documents[held_out:]

    output.mkdir(parents=True, exist_ok=True)
    for old in output.glob("*.json.gz"):
        old.unlink()
    for shard in range(TRAIN_SHARDS):
        part = train[len(train) * shard // TRAIN_SHARDS : len(train) * (shard + 1) // TRAIN_SHARDS]
        write(output / f"c4-train.{shard:05d}-of-{TRAIN_SHARDS:05d}.json.gz", part)
    write(output / "c4-validation.00000-of-00001.json.gz", validation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", nargs="?", type=Path, help=f"the wheel of {WHEEL}; fetched with pip if left out")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    if options.wheel is not None:
        build(options.wheel, options.output)
        return
    with tempfile.TemporaryDirectory() as folder:
        # The wheel is pure Python, so that naming an interpreter only keeps an older local one from refusing
        # it.
        fetch = [
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "--python-version=3.11",
        ]
        subprocess.run([sys.executable, *fetch, "--dest", folder, WHEEL], check=True)
        build(next(Path(folder).glob("*.whl")), options.output)


if __name__ == "__main__":
    main()
