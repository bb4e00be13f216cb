"""Malformed text: shards in C4's layout, JSON lines, .txt files, and folders whose files do not belong together.

A damaged document or file ends the run in a sentence that names the file. With data.on_error=skip it is left out and
counted, and the rows are those of a folder that holds the other documents alone.
"""

from __future__ import annotations

import gzip
import json
import os
import socket
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from data import IGNORE, Source, TrainingBatches, UserError, load_tokenizer, open_source
from data.lines import LONGEST_LINE
from data.mirror import MANIFEST

from .test_malformed import open_cases, refused, within

TEXTS = [f"document {i}" + " and so on" * (i % 4) for i in range(8)]
VALIDATION = "c4-validation.00000-of-00001.json.gz"
FIRST = "c4-train.00000-of-00001.json.gz"


def record(text: object, key: str = "text") -> bytes:
    return json.dumps({key: text, "url": ""}).encode() + b"\n"


def gz(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


LINES = [record(text) for text in TEXTS]
PLAIN = b"".join(LINES)
ZIPPED = gz(PLAIN)
NESTED = b"[" * 100_000


@dataclass(frozen=True)
class Damaged:
    """A file, the numbers of the TEXTS that survive in it, how many places are damaged, and words of the message."""

    name: str
    content: bytes
    left: tuple[int, ...]
    places: int
    words: str


ALL = tuple(range(len(TEXTS)))
WITHOUT_3 = (0, 1, 2, 4, 5, 6, 7)


def instead_of_3(line: bytes) -> bytes:
    return b"".join((*LINES[:3], line, *LINES[4:]))


# One damaged line among good ones -------------------------------------------------------------------------------------

BAD_LINES = {
    "words": (b"no JSON at all\n", "line 4: not a JSON object"),
    "cut object": (LINES[3][:-5] + b"\n", "line 4: not a JSON object"),
    "two objects": (LINES[3].strip() + LINES[4], "line 4: not a JSON object"),
    "comma after it": (LINES[3].strip() + b",\n", "line 4: not a JSON object"),
    "single quotes": (b"{'text': 'x'}\n", "line 4: not a JSON object"),
    "byte order mark": (b"\xef\xbb\xbf" + LINES[3], "line 4: not a JSON object"),
    "tab in a string": (b'{"text": "a\tb"}\n', "line 4: not a JSON object"),
    "zeros": (bytes(512) + b"\n", "line 4: not a JSON object"),
    "carriage returns": (b'{"text": "a"}\r{"text": "b"}\n', "line 4: not a JSON object"),
    "deep nesting": (b'{"text": "x", "more": ' + NESTED + b"\n", "line 4: not a JSON object"),
    "number of 5,000 digits": (b'{"text": "x", "n": ' + b"9" * 5000 + b"}\n", "line 4: not a JSON object"),
    "array": (b'["text"]\n', 'line 4: no text under the key "text"'),
    "number": (b"17\n", 'line 4: no text under the key "text"'),
    "not a number": (b"NaN\n", 'line 4: no text under the key "text"'),
    "string": (b'"text"\n', 'line 4: no text under the key "text"'),
    "null": (b"null\n", 'line 4: no text under the key "text"'),
    "empty object": (b"{}\n", 'line 4: no text under the key "text"'),
    "another key": (record("words", "content"), 'line 4: no text under the key "text"'),
    "key in capitals": (record("words", "TEXT"), 'line 4: no text under the key "text"'),
    "text is null": (record(None), 'line 4: no text under the key "text"'),
    "text is a number": (record(5), 'line 4: no text under the key "text"'),
    "text is a list": (record(["a", "b"]), 'line 4: no text under the key "text"'),
    "text is an object": (record({"text": "a"}), 'line 4: no text under the key "text"'),
    "text is true": (record(True), 'line 4: no text under the key "text"'),
    "high surrogate": (b'{"text": "half \\ud83d of it"}\n', r"line 4: half of a surrogate pair (\ud83d)"),
    "low surrogate": (b'{"text": "half \\ude00 of it"}\n', r"line 4: half of a surrogate pair (\ude00)"),
    "surrogates in reverse": (b'{"text": "\\ude00\\ud83d"}\n', "line 4: half of a surrogate pair"),
    "Latin-1": (b'{"text": "caf\xe9"}\n', "line 4: not UTF-8"),
    "byte 0xff": (b'{"text": "\xff"}\n', "line 4: not UTF-8"),
    "cut character": (b'{"text": "\xf0\x9f\x99"}\n', "line 4: not UTF-8"),
    "overlong character": (b'{"text": "\xc0\xaf"}\n', "line 4: not UTF-8"),
    "surrogates as UTF-8": (b'{"text": "\xed\xa0\xbd\xed\xb8\x80"}\n', "line 4: not UTF-8"),
    "beyond Unicode": (b'{"text": "\xf4\x90\x80\x80"}\n', "line 4: not UTF-8"),
    "UTF-16": ('{"text": "x"}'.encode("utf-16") + b"\n", "line 4: not UTF-8"),
    "UTF-16 without mark": ('{"text": "x"}'.encode("utf-16-le") + b"\n", "line 4: not a JSON object"),
}

# Whole files ----------------------------------------------------------------------------------------------------------

TWO = gz(b"".join(LINES[:4])) + gz(b"".join(LINES[4:]))
SECOND = len(gz(b"".join(LINES[:4])))
# Not compressed, so that the place of a cut is the same whatever the library.
STORED = gzip.compress(PLAIN, 0, mtime=0)
HALF = len(gzip.compress(b"".join(LINES[:4]), 0, mtime=0))
STORED_TWO = b"".join(gzip.compress(b"".join(part), 0, mtime=0) for part in (LINES[:4], LINES[4:]))


def changed(content: bytes, place: int, value: int) -> bytes:
    return content[:place] + bytes([value]) + content[place + 1 :]


BAD_ZIPS = [
    Damaged("empty file", b"", (), 1, "is empty"),
    Damaged("nothing zipped", gz(b""), (), 1, "is empty"),
    Damaged("not zipped", PLAIN, (), 1, "after line 0: damaged or cut gzip file"),
    Damaged("zstandard", b"\x28\xb5\x2f\xfd" + bytes(60), (), 1, "after line 0: damaged or cut"),
    Damaged("zip archive", b"PK\x03\x04" + bytes(60), (), 1, "after line 0: damaged or cut"),
    Damaged("web page", b"<!DOCTYPE html><html>404</html>", (), 1, "after line 0: damaged or cut"),
    Damaged(
        "large file pointer", b"version https://git-lfs.github.com/spec/v1\n", (), 1, "after line 0: damaged or cut"
    ),
    Damaged("zeros", bytes(4096), (), 1, "after line 0: damaged or cut"),
    Damaged("only zeros after the first byte", b"\x1f" + bytes(99), (), 1, "after line 0: damaged or cut"),
    Damaged("cut in the header", ZIPPED[:7], (), 1, "after line 0: damaged or cut"),
    Damaged("header alone", ZIPPED[:10], (), 1, "after line 0: damaged or cut"),
    Damaged("without the checksum", ZIPPED[:-8], ALL, 1, "after line 8: damaged or cut"),
    Damaged("without the last byte", ZIPPED[:-1], ALL, 1, "after line 8: damaged or cut"),
    Damaged("wrong checksum", changed(ZIPPED, len(ZIPPED) - 8, ZIPPED[-8] ^ 1), ALL, 1, "after line 8: damaged or cut"),
    Damaged("wrong length", changed(ZIPPED, len(ZIPPED) - 1, ZIPPED[-1] ^ 1), ALL, 1, "after line 8: damaged or cut"),
    Damaged("another compression", changed(ZIPPED, 2, 9), (), 1, "after line 0: damaged or cut"),
    Damaged("reserved flags", changed(ZIPPED, 3, 0xE0), (), 1, "after line 0: damaged or cut"),
    Damaged("words after it", ZIPPED + b"and more", ALL, 1, "after line 8: damaged or cut"),
    Damaged("second member cut", TWO[:-5], ALL, 1, "after line 8: damaged or cut"),
    Damaged("cut in a line", STORED[: STORED.index(LINES[5]) + 9], (0, 1, 2, 3, 4), 1, "after line 5: damaged or cut"),
    Damaged("cut after a line", STORED[: STORED.index(LINES[5])], (0, 1, 2, 3, 4), 1, "after line 5: damaged or cut"),
    Damaged("words in the middle", STORED_TWO[:HALF] + PLAIN + STORED_TWO[HALF:], ALL[:4], 1, "after line 4: damaged"),
    Damaged("second member's header cut", TWO[: SECOND + 4], (0, 1, 2, 3), 1, "after line 4: damaged or cut"),
    Damaged("second member flipped", changed(TWO, SECOND, 0), (0, 1, 2, 3), 1, "after line 4: damaged or cut"),
]

PARAGRAPHS = [f"paragraph {i} " + "x" * 40 for i in range(8)]
BAD_TEXTS = {
    "Latin-1": ("caf\xe9".encode("latin-1"), "not UTF-8"),
    "byte 0xff": (b"\xff", "not UTF-8"),
    "UTF-16": ("text".encode("utf-16"), "not UTF-8"),
    "surrogates as UTF-8": (b"\xed\xa0\xbd\xed\xb8\x80", "not UTF-8"),
    "cut character": (b"\xe2\x82", "not UTF-8"),
    "a picture": (b"\x89PNG\r\x1a\x0f" + bytes(range(128, 256)), "not UTF-8"),
    "two bad lines": (b"\xff\n\xfe", "not UTF-8"),
}


def shards() -> dict[str, Damaged]:
    """Every damaged line in a zipped shard and in a plain file, and every damaged zip."""
    found = {}
    for kind in (".json.gz", ".jsonl"):
        for name, (line, words) in BAD_LINES.items():
            content = instead_of_3(line)
            found[f"{kind}, {name}"] = Damaged(
                name, gz(content) if kind == ".json.gz" else content, WITHOUT_3, 1, words
            )
    for case in BAD_ZIPS:
        found[f".json.gz, {case.name}"] = case
    everything = b"".join(line for line, _ in BAD_LINES.values())
    found[".jsonl, all at once"] = Damaged("", everything + LINES[5], (5,), len(BAD_LINES), "line 1: not a JSON object")
    found[".jsonl, last line cut"] = Damaged("", PLAIN[:-9], ALL[:-1], 1, "line 8: not a JSON object")
    found[".jsonl, binary"] = Damaged("", bytes(range(256)) * 4, (), 5, "line 1: not")
    found[".jsonl, empty file"] = Damaged("", b"", (), 1, "is empty")
    return found


SHARDS = shards()


def write_folder(folder: Path, name: str, content: bytes, more: list[str]) -> dict[str, Any]:
    """A training file with `content`, a good one with the documents `more`, a validation file; the data config."""
    folder.mkdir(parents=True)
    good = b"".join(record(text) for text in more)
    if name.endswith(".json.gz"):
        (folder / "c4-train.00000-of-00002.json.gz").write_bytes(content)
        (folder / "c4-train.00001-of-00002.json.gz").write_bytes(gz(good))
        (folder / VALIDATION).write_bytes(gz(good))
        return {"kind": "c4_local", "path": str(folder)}
    (folder / "train").mkdir()
    (folder / "train" / f"a{name}").write_bytes(content)
    (folder / "train" / "b.jsonl").write_bytes(good)
    (folder / "valid.jsonl").write_bytes(good)
    return {"kind": "text", "path": str(folder / "train"), "validation_path": str(folder / "valid.jsonl")}


def rows(config: dict[str, Any], count: int = 6, **options: Any) -> list[torch.Tensor]:
    """Input ids and labels of the first steps, in the shuffled order, over several epochs."""
    settings: dict[str, Any] = {"length": 12, "batch_size": 4, "shuffle_buffer": 3, "prefetch": 0}
    with TrainingBatches(
        open_source(config, "train"), load_tokenizer("sample_1k"), **{**settings, **options}
    ) as batches:
        steps = [next(batches) for _ in range(count)]
    return [step[key] for step in steps for key in ("input_ids", "labels")]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", open_cases("shard", SHARDS))
def test_a_damaged_shard_stops_the_run_or_is_left_out(tmp_path: Path, name: str, capfd: Any) -> None:
    case, more = SHARDS[name], ["another document", "and one more"]
    ending = name.partition(",")[0]
    config = write_folder(tmp_path / "bad", ending, case.content, more)
    file = str(next((tmp_path / "bad").rglob(f"a{ending}" if ending == ".jsonl" else "c4-train.00000*")))
    message = refused(lambda: rows(config), file, case.words)
    assert refused(lambda: list(open_source(config, "train").documents())) == message

    source = open_source(config | {"on_error": "skip"}, "train")
    with within():
        assert list(source.documents()) == [*(TEXTS[i] for i in case.left), *more]
    assert source.damaged == {0: case.places}
    assert file in capfd.readouterr().err
    left = b"".join(LINES[i] for i in case.left)
    clean = write_folder(tmp_path / "good", ".jsonl", left or b"\n", more)
    clean["path"] = str(tmp_path / "good/train")
    assert same(rows(config | {"on_error": "skip"}), rows(clean))


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", open_cases("text", BAD_TEXTS))
def test_a_damaged_document_of_a_text_file(tmp_path: Path, name: str, zipped: bool) -> None:
    bad, words = BAD_TEXTS[name]
    parts = [text.encode() for text in PARAGRAPHS]
    content = b"\n\n".join([*parts[:3], b"begins well\n" + bad + b"\nand ends well " + b"x" * 40, *parts[3:]])
    path = tmp_path / ("a.txt.gz" if zipped else "a.txt")
    path.write_bytes(gz(content) if zipped else content)
    config = {"kind": "text", "path": str(path), "document_characters": 30, "holdout": 10**9}
    refused(lambda: rows(config), f"{path}, line 8: ", words)
    source = open_source(config | {"on_error": "skip"}, "train")
    assert list(source.documents()) == PARAGRAPHS
    assert source.damaged == {0: 1}


# Texts that are odd but not damaged -----------------------------------------------------------------------------------

ODD = {
    "NUL": "a\0b",
    "controls": "".join(map(chr, range(32))),
    "bidirectional": "\u202eabc\u202c \u2066x\u2069",
    "combining": "e" + "\u0301" * 500,
    "not characters": "\ufffe\uffff\U0010ffff",
    "private use": "\ue000\U000f0000",
    "zero width": "\u200b\u200c\u200d\ufeff",
    "one word of 1 MB": "a" * 2**20,
    "1 MB without spaces": "漢字" * 2**18,
    "line separators": "a\u2028b\u2029c\x85d\x0be",
    "special tokens": "</s><pad><unk><0x0A>",
    "emoji": "👩‍👩‍👧" * 100,
}


@pytest.mark.parametrize("name", open_cases("odd", ODD))
def test_an_odd_text_is_a_document_like_any_other(tmp_path: Path, name: str) -> None:
    text = ODD[name]
    config = write_folder(tmp_path / "x", ".json.gz", gz(record(text)), [f"other {i}" for i in range(70)])
    with within():
        assert next(open_source(config, "train").documents()) == text
        for protocol in ("truncate", "pack"):
            ids = torch.cat(rows(config, 2, rows=protocol, shuffle_buffer=0)[::2])
            assert ids.min() >= 0 and ids.max() < 1024
    tokenizer = load_tokenizer("sample_1k")
    if len(text) < 10_000:
        assert tokenizer.decode(tokenizer.encode([text])[0]) == text


@pytest.mark.parametrize("text", ["", " ", "\n\n\t", "\u00a0\u3000", "\x1c\x1d"])
def test_documents_without_text_are_counted_and_make_no_row(tmp_path: Path, text: str) -> None:
    config = write_folder(tmp_path / "x", ".json.gz", gz(b"".join(LINES[:2]) + record(text) + LINES[2]), ["other"])
    source = open_source(config, "train")
    assert list(source.documents()) == [*TEXTS[:3], "other"]
    assert source.skipped == 1 and source.damaged == {}


# Sizes ----------------------------------------------------------------------------------------------------------------

LARGE = {"one word": "漢字" * (10 * 2**20 // 6), "words": "all work and no play " * (10 * 2**20 // 21)}


@pytest.mark.parametrize("kind", [".json.gz", ".jsonl", ".txt"])
@pytest.mark.parametrize("what", LARGE)
def test_a_document_of_10_megabytes_is_read_and_cut_into_a_row(tmp_path: Path, kind: str, what: str) -> None:
    content = LARGE[what].encode() if kind == ".txt" else record(LARGE[what])
    config = write_folder(tmp_path / "x", kind, gz(content) if kind == ".json.gz" else content, ["other"])
    with within():
        assert next(open_source(config, "train").documents()) == LARGE[what].strip(" " if kind == ".txt" else "")
        ids, labels = rows(config, 1, batch_size=2)
        assert ids.shape == (2, 12) and (labels != IGNORE).all(1).any()


def packed(folder: Path, large: int, small: int) -> None:
    """A step of packed rows, from so many documents of 10 MB and so many small ones."""
    content = gz(record(LARGE["one word"]) * large)
    config = write_folder(folder / "x", ".json.gz", content, [f"other {i}" for i in range(small)])
    assert all((labels != IGNORE).all() for labels in rows(config, 1, rows="pack", length=64, shuffle_buffer=0)[1::2])


SIZES = {
    "a document of 10 MB among others, packed": lambda folder: packed(folder, 1, 70),
    "documents of 10 MB alone, packed": lambda folder: packed(folder, 2, 1),
}


def test_a_line_of_50_megabytes(tmp_path: Path) -> None:
    """One JSON line within the limit is a document; without an end of line too."""
    large = "x y" * (50 * 2**20 // 3)
    config = write_folder(tmp_path / "x", ".jsonl", record(large).rstrip(), ["other"])
    with within(30):
        assert [len(text) for text in open_source(config, "train").documents()] == [len(large), 5]


@pytest.mark.parametrize("kind", [".json.gz", ".jsonl", ".txt"])
def test_a_line_beyond_the_limit_is_refused_or_left_out(tmp_path: Path, kind: str) -> None:
    content = b"\n".join([*LINES[:2], b"x" * LONGEST_LINE, *LINES[2:4]])
    config = write_folder(tmp_path / "x", kind, gz(content) if kind == ".json.gz" else content, ["other"])
    refused(lambda: list(open_source(config, "train").documents()), str(tmp_path / "x"), "longer than 64 MiB")
    source = open_source(config | {"on_error": "skip"}, "train")
    with within():
        documents = list(source.documents())
    assert documents[-1] == "other" and source.damaged == {0: 1}
    assert documents[:-1] == ([] if kind == ".txt" else TEXTS[:4])


def test_a_gzip_bomb_takes_no_memory(tmp_path: Path) -> None:
    """A file of 0.3 MB that is one line of 256 MB: read past, never held."""
    engine = zlib.compressobj(9, zlib.DEFLATED, 31)
    million = b"x" * 2**20
    content = b"".join([*(engine.compress(million) for _ in range(256)), engine.flush()])
    config = write_folder(tmp_path / "x", ".json.gz", content, ["other"])
    tracemalloc.start()
    try:
        refused(lambda: list(open_source(config, "train").documents()), "c4-train.00000-of-00002", "longer than 64 MiB")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**28


def test_a_checksum_tells_that_a_letter_was_flipped_but_not_where(tmp_path: Path, capfd: Any) -> None:
    """The file is read once: what was delivered before its end may hold the damage, which is said and counted there."""
    place = STORED.index(b"document 6")
    config = write_folder(tmp_path / "x", ".json.gz", changed(STORED, place, ord("e")), ["other"])
    refused(lambda: list(open_source(config, "train").documents()), "c4-train.00000-of-00002", "incorrect data check")
    source = open_source(config | {"on_error": "skip"}, "train")
    assert list(source.documents()) == [*TEXTS[:6], "e" + TEXTS[6][1:], TEXTS[7], "other"]
    assert source.damaged == {0: 1} and "c4-train.00000-of-00002" in capfd.readouterr().err


# Folders --------------------------------------------------------------------------------------------------------------


def mirror(folder: Path, *names: str) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    for name in (*names, VALIDATION):
        (folder / name).write_bytes(ZIPPED)
    return {"kind": "c4_local", "path": str(folder)}


def listed(folder: Path, manifest: Any, *names: str) -> dict[str, Any]:
    """A mirror with a manifest: raw bytes, or what replaces parts of a good one."""
    config = mirror(folder, *(names or (FIRST,)))
    if not isinstance(manifest, bytes):
        entries = {file.name: {"size": len(ZIPPED), "sha256": "0" * 64} for file in folder.glob("*.gz")}
        good = {"kind": "mirror", "format": 1, "repository": "some/set", "revision": "c0ffee", "files": entries}
        manifest = json.dumps({**good, **manifest}).encode()
    (folder / MANIFEST).write_bytes(manifest)
    return config


def train_shard(i: int, count: int) -> str:
    return f"c4-train.{i:05d}-of-{count:05d}.json.gz"


def absent(folder: Path) -> dict[str, Any]:
    return {"kind": "c4_local", "path": str(folder / "nowhere")}


def a_folder(folder: Path) -> dict[str, Any]:
    config = mirror(folder)
    (folder / FIRST).mkdir()
    return config


def a_link_to_nowhere(folder: Path) -> dict[str, Any]:
    config = mirror(folder)
    (folder / FIRST).symlink_to(folder / "nowhere")
    return config


def a_link_to_itself(folder: Path) -> dict[str, Any]:
    config = mirror(folder)
    (folder / FIRST).symlink_to(folder / FIRST)
    return config


def a_pipe(folder: Path) -> dict[str, Any]:
    config = mirror(folder)
    os.mkfifo(folder / FIRST)
    return config


def a_socket(folder: Path) -> dict[str, Any]:
    config = mirror(folder)
    here = Path.cwd()
    os.chdir(folder)  # the path of a socket must be short
    try:
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(FIRST)
    finally:
        os.chdir(here)
    return config


def a_pipe_as_text(folder: Path) -> dict[str, Any]:
    os.mkfifo(folder / "x.txt")
    return {"kind": "text", "path": str(folder / "x.txt")}


def manifest_is(what: Callable[[Path], object]) -> Callable[[Path], dict[str, Any]]:
    def make(folder: Path) -> dict[str, Any]:
        config = mirror(folder, FIRST)
        what(folder / MANIFEST)
        return config

    return make


def text(files: dict[str, bytes], **options: Any) -> Callable[[Path], dict[str, Any]]:
    def make(folder: Path) -> dict[str, Any]:
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        return {"kind": "text", "path": str(folder), **options}

    return make


ANOTHER_SIZE = {"size": len(ZIPPED) + 1, "sha256": ""}
# name: (what makes the folder and returns its data config, words of the message)
FOLDERS: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "no folder": (absent, "nowhere does not exist"),
    "nothing in it": (lambda f: {"kind": "c4_local", "path": str(f)}, "No file named c4-train.*.json.gz in"),
    "a file as folder": (
        lambda f: ((f / "x").write_bytes(ZIPPED), {"kind": "c4_local", "path": str(f / "x")})[1],
        "No file named c4-train.*.json.gz in",
    ),
    "no training files": (lambda f: mirror(f), "No file named c4-train.*.json.gz in"),
    "two data sets": (lambda f: mirror(f, FIRST, FIRST.replace("c4", "wiki")), "mixes several data sets"),
    "two counts": (lambda f: mirror(f, train_shard(0, 2), train_shard(1, 3)), "disagree about how many there are"),
    "numbered and not": (lambda f: mirror(f, FIRST, "c4-train.more.json.gz"), "disagree about how many there are"),
    "number beyond the count": (lambda f: mirror(f, train_shard(5, 2)), "is not a file of a set of 2"),
    "another width": (lambda f: mirror(f, train_shard(0, 3), "c4-train.1-of-00003.json.gz"), "is not a file of a set"),
    "a set of none": (lambda f: mirror(f, train_shard(0, 0)), "is not a file of a set of 0"),
    "a set of 10^11": (lambda f: mirror(f, train_shard(0, 10**11)), "00000-of-100000000000"),
    "a set of 10^5000": (lambda f: mirror(f, "c4-train.0-of-1" + "0" * 200 + ".json.gz"), "c4-train.0-of-1000"),
    "the second of two": (lambda f: mirror(f, train_shard(1, 2)), "00000-of-00002.json.gz is not here"),
    "a folder as shard": (a_folder, f"{FIRST} is not a regular file"),
    "a link to nowhere": (a_link_to_nowhere, f"{FIRST} cannot be read"),
    "a link to itself": (a_link_to_itself, f"{FIRST} cannot be read"),
    "a pipe as shard": (a_pipe, f"{FIRST} is not a regular file"),
    "a socket as shard": (a_socket, f"{FIRST} is not a regular file"),
    "empty manifest": (lambda f: listed(f, b""), f"{MANIFEST} cannot be read"),
    "cut manifest": (lambda f: listed(f, b'{"kind": "mirror", "fo'), f"{MANIFEST} cannot be read"),
    "manifest not UTF-8": (lambda f: listed(f, b'{"kind": "\xff"}'), f"{MANIFEST} cannot be read"),
    "deep manifest": (lambda f: listed(f, NESTED), f"{MANIFEST} cannot be read"),
    "manifest with a number of 5,000 digits": (lambda f: listed(f, b"9" * 5000), f"{MANIFEST} cannot be read"),
    "manifest is a folder": (manifest_is(Path.mkdir), f"{MANIFEST} cannot be read"),
    "manifest links to itself": (manifest_is(lambda p: p.symlink_to(p)), f"{MANIFEST} cannot be read"),
    "manifest of a later format": (lambda f: listed(f, {"format": 2}), f"{MANIFEST} has format 2"),
    "manifest without a format": (lambda f: listed(f, {"format": None}), f"{MANIFEST} has format None"),
    "manifest with a list of files": (lambda f: listed(f, {"files": []}), f"{MANIFEST} is damaged"),
    "manifest without files": (lambda f: listed(f, {"files": None}), f"{MANIFEST} is damaged"),
    "manifest with files of no size": (lambda f: listed(f, {"files": {FIRST: {}}}), f"{MANIFEST} is damaged"),
    "manifest with a size in words": (lambda f: listed(f, {"files": {FIRST: {"size": "9"}}}), f"{MANIFEST} is damaged"),
    "manifest with sizes alone": (lambda f: listed(f, {"files": {FIRST: 9}}), f"{MANIFEST} is damaged"),
    "manifest without revision": (lambda f: listed(f, {"revision": None}), f"{MANIFEST} is damaged"),
    "manifest with a list of repositories": (lambda f: listed(f, {"repository": ["a"]}), f"{MANIFEST} is damaged"),
    "another size than listed": (
        lambda f: listed(f, {"files": {FIRST: ANOTHER_SIZE}}),
        f"{FIRST} has {len(ZIPPED)} bytes",
    ),
    "a size below zero": (lambda f: listed(f, {"files": {FIRST: {"size": -1}}}), f"{FIRST} has {len(ZIPPED)} bytes"),
    "a shard that is not listed": (lambda f: listed(f, {"files": {}}), f"{FIRST} is not here, or was never verified"),
    "listed in another folder": (
        lambda f: listed(f, {"files": {f"../{FIRST}": {"size": len(ZIPPED)}}}),
        f"{FIRST} is not here, or was never verified",
    ),
    "no text files": (text({"x.pdf": b"%PDF"}), "holds no file ending in"),
    "another kind of file": (
        lambda f: {**text({"x.pdf": b"%PDF"})(f), "path": str(f / "x.pdf")},
        "x.pdf: this kind of file is not read",
    ),
    "a pipe as text": (a_pipe_as_text, "x.txt"),
    "empty text": (text({"x.txt": b""}), "holds no documents with text"),
    "blank text": (text({"x.txt": b" \n\t\n\n"}), "holds no documents with text"),
    "lines without text": (text({"x.jsonl": record("") * 9}), "holds no documents with text"),
    "blank lines alone": (text({"x.jsonl": b"\n\n\n"}), "holds no documents with text"),
    "everything is validation": (text({"x.txt": b"some text"}, validation_path="."), "nothing is left to train on"),
    "no validation there": (text({"x.txt": b"text"}, validation_path="nowhere"), "data.validation_path=nowhere"),
    "another column": (text({"x.jsonl": PLAIN}, text_column="content"), 'no text under the key "content"'),
    "one document held out of one": (text({"x.txt": b"some text"}, holdout=1), "data.holdout is 1"),
    "fewer than none held out": (text({"x.txt": b"some text"}, holdout=-3), "data.holdout is -3"),
    **{
        f"{key} is {value!r}": (text({"x.txt": b"some text"}, **{key: value}), f"data.{key}")
        for key, values in {"holdout": ("abc", 0, 2.5, [2], True), "document_characters": ("abc", -1, 0.5, [9])}.items()
        for value in values
    },
    "no path": (lambda f: {"kind": "text", "path": None}, "data.path is missing"),
    "empty path": (lambda f: {"kind": "text", "path": ""}, "data.path is missing"),
    "a path of 10,000 characters": (lambda f: {"kind": "text", "path": "x" * 10_000}, "data.path=xxx"),
    "a path with a NUL": (lambda f: {"kind": "text", "path": "a\0b"}, "data.path="),
    "a path with a surrogate": (lambda f: {"kind": "text", "path": "a\ud800b"}, "data.path="),
    "an unknown kind": (lambda f: {"kind": "parquet"}, "data.kind is 'parquet'"),
    "no kind": (lambda f: {}, "data.kind is None"),
    "an unknown choice on errors": (lambda f: {"kind": "sample", "on_error": "ignore"}, "data.on_error is 'ignore'"),
}

CASES = [
    *(f"shard, {name}" for name in SHARDS),
    *(f"text, {name}" for name in BAD_TEXTS),
    *(f"odd, {name}" for name in ODD),
    *(f"size, {name}" for name in SIZES),
    *(f"folder, {name}" for name in FOLDERS),
]


@pytest.mark.parametrize("name", open_cases("size", SIZES))
def test_large_documents(tmp_path: Path, name: str) -> None:
    with within():
        SIZES[name](tmp_path)


@pytest.mark.parametrize("name", open_cases("folder", FOLDERS))
def test_a_folder_that_cannot_be_read(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither option lets it pass: nothing in it is a damaged document."""
    make, words = FOLDERS[name]
    monkeypatch.chdir(tmp_path)
    config = make(tmp_path)
    for on_error in ("stop", "skip"):
        asked = config if "on_error" in config else config | {"on_error": on_error}
        if name == "another column" and on_error == "skip":
            words = "holds no documents with text"
        refused(lambda asked=asked: rows(asked), words)


class Changing:
    """What happens to a file between its listing and its reading, or in the middle of it."""

    def vanish(self, file: Path) -> None:
        file.unlink()

    def grow(self, file: Path) -> None:
        file.write_bytes(file.read_bytes() + gz(record("more")))

    def shrink(self, file: Path) -> None:
        file.write_bytes(gz(b"".join(LINES[:4])))

    def become_a_pipe(self, file: Path) -> None:
        file.unlink()
        os.mkfifo(file)

    def become_a_folder(self, file: Path) -> None:
        file.unlink()
        file.mkdir()

    def become_a_link_to_nowhere(self, file: Path) -> None:
        file.unlink()
        file.symlink_to("nowhere")


@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize("what", [name for name in vars(Changing) if not name.startswith("_")])
def test_a_file_that_changes_under_the_run_always_stops_it(tmp_path: Path, what: str, on_error: str) -> None:
    source = open_source(mirror(tmp_path, FIRST) | {"on_error": on_error}, "train")
    getattr(Changing(), what)(tmp_path / FIRST)
    refused(lambda: list(source.documents()), str(tmp_path / FIRST))
    assert source.damaged == {}


def test_another_content_of_the_same_size_is_noticed_by_its_documents(tmp_path: Path) -> None:
    """Plain text has no checksum; fewer documents than at the first reading are seen at the second."""
    config = write_folder(tmp_path / "x", ".jsonl", PLAIN, ["other"])
    source = open_source(config, "train")
    list(source.documents())
    (tmp_path / "x/train/a.jsonl").write_bytes(b"".join(LINES[:-1]) + b" " * (len(LINES[-1]) - 1) + b"\n")
    refused(
        lambda: list(source.documents()), str(tmp_path / "x/train"), "has changed: shard 0 had 8 documents and has 7"
    )


def test_every_error_is_for_users(tmp_path: Path) -> None:
    """Also through the background thread and the process that read ahead, again at every call."""
    config = write_folder(tmp_path / "x", ".json.gz", ZIPPED[:-9], ["other"])
    for workers in (0, 1):
        source = open_source(config, "train")
        with TrainingBatches(source, load_tokenizer("sample_1k"), length=12, batch_size=4, workers=workers) as batches:
            for _ in range(2):
                refused(lambda batches=batches: [next(batches) for _ in range(9)], "c4-train.00000-of-00002.json.gz")
    assert issubclass(UserError, Exception) and isinstance(source, Source)
