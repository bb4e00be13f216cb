"""Reading local files: order, what is held out, parts of a mirror, damage, and messages that name file and line."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import pickle
import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from data import Source, Tokenizer, UserError, lines, open_source
from data.lines import Damage, inflate, split_lines
from data.mirror import write_manifest
from data.rows import shuffled
from data.sources import shard_order

from .conftest import Corpus, write_shard

ROOT = Path(__file__).resolve().parents[2]


def texts(config: dict[str, Any], split: str = "train") -> list[str]:
    return list(open_source(config, split).documents())


def test_documents_come_in_file_order_from_any_place(corpus: Corpus) -> None:
    source = open_source(corpus(3, 2, 4), "train")
    assert source.shards == 3 and source.total is None
    everything = list(source.documents())
    assert [int(text.split()[1]) for text in everything] == list(range(9))
    assert source.total == 9
    for start in range(10):
        assert list(source.documents(start)) == everything[start:]
    assert [int(text.split()[1]) for text in source.documents(1, order=[2, 0, 1])] == [6, 7, 8, 0, 1, 2, 3, 4]


def test_known_shards_are_not_read_again(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(corpus(3, 2, 4), "train")
    list(source.documents())
    opened: list[int] = []
    read = source.read
    monkeypatch.setattr(source, "read", lambda shard: opened.append(shard) or read(shard))
    assert len(list(source.documents(6))) == 3
    assert opened == [2]


def test_empty_documents_are_skipped_and_counted(tmp_path: Path) -> None:
    write_shard(tmp_path / "c4-train.00000-of-00001.json.gz", ["one", "", " \n\t", "two"])
    source = open_source({"kind": "c4_local", "path": str(tmp_path)}, "train")
    for _ in range(2):
        assert list(source.documents()) == ["one", "two"]
    assert source.skipped == 2


def test_both_layouts_and_other_prefixes(tmp_path: Path) -> None:
    write_shard(tmp_path / "en" / "wiki-train.00000-of-00001.json.gz", ["inside en"])
    write_shard(tmp_path / "wiki-train.00000-of-00001.json.gz", ["beside en"])
    assert texts({"kind": "c4_local", "path": str(tmp_path)}) == ["inside en"]
    assert texts({"kind": "c4_local", "path": str(tmp_path / "en")}) == ["inside en"]
    write_shard(tmp_path / "en" / "c4-train.00000-of-00001.json.gz", ["another set"])
    with pytest.raises(UserError, match="mixes several data sets"):
        texts({"kind": "c4_local", "path": str(tmp_path)})


def test_another_column_is_another_source(tmp_path: Path) -> None:
    write_shard(tmp_path / "c4-train.00000-of-00001.json.gz", ["some text"])

    def identity(**column: str) -> str:
        return open_source({"kind": "c4_local", "path": str(tmp_path), **column}, "train").identity

    assert identity() == identity(text_column="text") != identity(text_column="summary")


def test_a_copy_elsewhere_is_the_same_source_and_another_file_is_not(tmp_path: Path) -> None:
    def identity(folder: str, text: str) -> str:
        write_shard(tmp_path / folder / "c4-train.00000-of-00001.json.gz", [text])
        return open_source({"kind": "c4_local", "path": str(tmp_path / folder)}, "train").identity

    assert identity("a", "some text") == identity("b", "some text") != identity("c", "a much longer other text")


# Part of a mirror


def mirror(folder: Path, present: list[int], count: int = 6) -> dict[str, Any]:
    """A mirror that holds some of `count` training files, file i with documents 10 i to 10 i + 9."""
    for i in present:
        texts = [f"document {10 * i + j}" for j in range(10)]
        write_shard(folder / "en" / f"c4-train.{i:05d}-of-{count:05d}.json.gz", texts)
    return {"kind": "c4_local", "path": str(folder)}


def numbers(texts: Iterable[str]) -> list[int]:
    return [int(text.split()[1]) for text in texts]


def test_a_part_has_the_order_of_the_whole(tmp_path: Path) -> None:
    order = shard_order(6, 42, 0)
    whole = open_source(mirror(tmp_path / "whole", list(range(6))), "train")
    part = open_source(mirror(tmp_path / "part", order[:2]), "train")
    assert part.shards == whole.shards == 6
    ours, theirs = shuffled(part, 42, 0, 5), shuffled(whole, 42, 0, 5)
    assert numbers(itertools.islice(ours, 15)) == numbers(itertools.islice(theirs, 15))
    with pytest.raises(UserError) as error:
        list(ours)
    missing = f"c4-train.{order[2]:05d}-of-00006.json.gz"
    assert missing in str(error.value) and "fetch_c4.py --to" in str(error.value)
    assert "2 of the 6 files are): fetch" in str(error.value) and str(tmp_path / "part") + " " in str(error.value)


def test_which_part_is_here_is_not_the_identity(tmp_path: Path) -> None:
    def identity(name: str, present: list[int], count: int = 6) -> str:
        return open_source(mirror(tmp_path / name, present, count), "train").identity

    assert identity("a", [0, 1]) == identity("b", [5]) == identity("a", [0, 1, 3])
    assert identity("a", [0, 1]) != identity("c", [0, 1], 7)
    assert identity("d", list(range(6))) == identity("e", list(range(6)))


def test_a_manifest_tells_what_the_files_are(tmp_path: Path) -> None:
    def opened(name: str, present: list[int], revision: str) -> Source:
        config = mirror(tmp_path / name, present)
        files = {
            f"en/{file.name}": {"size": file.stat().st_size, "sha256": "0" * 64}
            for file in (tmp_path / name / "en").iterdir()
        }
        write_manifest(tmp_path / name, "allenai/c4", revision, files)
        return open_source(config, "train")

    some, all_files = opened("a", [0, 1], "abc"), opened("b", list(range(6)), "abc")
    assert some.identity == all_files.identity != opened("c", [0, 1], "abd").identity
    assert some.description["revision"] == "abc" and some.description["present"] == 2
    folder = {"kind": "c4_local", "path": str(tmp_path / "a" / "en")}  # the folder `en` itself
    assert open_source(folder, "train").identity == some.identity

    mirror(tmp_path / "a", [2])  # not verified
    with pytest.raises(UserError, match=r"00002-of-00006.* was never verified \(2 of the 6 files are\)"):
        list(open_source(mirror(tmp_path / "a", []), "train").documents())
    write_shard(tmp_path / "a" / "en" / "c4-train.00001-of-00006.json.gz", ["changed since"])
    with pytest.raises(
        UserError, match=r"00001-of-00006\.json\.gz has .* bytes, and .*manifest\.json says .* fetch it"
    ):
        open_source(mirror(tmp_path / "a", []), "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read .* run scripts/fetch_c4.py again"),
        ('{"kind": "mirror", "format": 2}', "has format 2"),
        ('{"kind": "mirror", "format": 1, "revision": "a"}', "is damaged"),
        ('{"kind": "mirror", "format": 1, "repository": "a", "revision": "a", "files": {"x": 5}}', "is damaged"),
    ],
)
def test_damaged_manifests(tmp_path: Path, content: str, message: str) -> None:
    config = mirror(tmp_path, [0])
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        open_source(config, "train")
    assert str(tmp_path / "manifest.json") in str(error.value)


def test_a_manifest_of_something_else_means_nothing(tmp_path: Path) -> None:
    config = mirror(tmp_path, [0])
    without = open_source(config, "train").identity
    (tmp_path / "manifest.json").write_text('["another tool\'s"]')
    assert open_source(config, "train").identity == without


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["00000-of-00002", "00001-of-00003"], "names disagree"),
        (["00000-of-00002", "last"], "names disagree"),
        (["00003-of-00003"], "not a file of a set of 3, numbered from 0"),
    ],
)
def test_names_that_make_no_set(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        write_shard(tmp_path / f"c4-train.{name}.json.gz", ["text"])
    with pytest.raises(UserError, match=message):
        open_source({"kind": "c4_local", "path": str(tmp_path)}, "train")


def test_names_without_numbers_are_a_set_as_they_are(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_shard(tmp_path / f"c4-train.{name}.json.gz", [name])
    assert texts({"kind": "c4_local", "path": str(tmp_path)}) == ["a", "b"]


def test_the_order_of_shards_is_that_of_the_rows(corpus: Corpus) -> None:
    source = open_source(corpus(1, 1, 1, 1, 1, 1, 1), "train")
    for seed, epoch in ((42, 0), (42, 1), (7, 0)):
        assert numbers(shuffled(source, seed, epoch, 1)) == shard_order(7, seed, epoch)


# Damaged files


def gz(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


def random_documents(count: int) -> bytes:
    """Documents that gzip cannot make much smaller, so that they fill many chunks."""
    rng = random.Random(0)
    return b"".join(b'{"text": "%d %s"}\n' % (i, rng.randbytes(40).hex().encode()) for i in range(count))


GOOD = b'{"text": "fine"}\n'
CUT = gz(random_documents(3000))
FLIPPED = bytearray(CUT)
FLIPPED[len(CUT) // 2] ^= 0xFF
# content; the message of on_error="stop"; documents left and places counted with on_error="skip"
DAMAGE: dict[str, tuple[bytes, str, int, int]] = {
    "nothing": (b"", "is empty", 0, 1),
    "empty gzip": (gz(b""), "is empty", 0, 1),
    "not gzip": (b"not gzip at all", "after line 0: damaged or cut", 0, 1),
    "cut": (gz(GOOD * 3000)[:-5], "damaged or cut", 3000, 1),
    "wrong checksum": (gz(GOOD)[:-8] + b"\0" * 8, "after line 1: damaged or cut", 1, 1),
    "something after the end": (gz(GOOD) + b"more", "after line 1: damaged or cut", 1, 1),
    "cut JSON": (gz(GOOD + b'{"text": "cut'), "line 2: not a JSON object", 1, 1),
    "a list": (gz(GOOD + GOOD + b"[1]\n" + GOOD), 'line 3: no text under the key "text"', 3, 1),
    "another key": (gz(GOOD + b'{"content": "x"}\n' + GOOD), "line 2: no text", 2, 1),
    "a number": (gz(b'{"text": 5}\n' + GOOD), "line 1: no text", 1, 1),
    "null": (gz(b'{"text": null}\n' * 3 + GOOD), "line 1: no text", 1, 3),
    "Latin-1": (gz(GOOD + b'{"text": "caf\xe9"}\n' + GOOD), "line 2: not UTF-8", 2, 1),
    "surrogate": (
        gz(GOOD + b'{"text": "a \\ud800 b"}\n' + GOOD),
        r"line 2: half of a surrogate pair \(\\ud800\)",
        2,
        1,
    ),
    "deep": (gz(b"[" * 100_000 + b"\n" + GOOD), "line 1: not a JSON object", 1, 1),
    "huge number": (gz(b'{"text": "x", "n": ' + b"9" * 5000 + b"}\n" + GOOD), "line 1: not a JSON object", 1, 1),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_shards(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    content, message, left, places = DAMAGE[case]
    path = tmp_path / "c4-train.00000-of-00002.json.gz"
    path.write_bytes(content)
    write_shard(tmp_path / "c4-train.00001-of-00002.json.gz", ["the file after it"])
    config = {"kind": "c4_local", "path": str(tmp_path)}
    with pytest.raises(UserError, match=message) as error:
        texts(config)
    assert str(path) in str(error.value)

    source = open_source({**config, "on_error": "skip"}, "train")
    for _ in range(2):  # the numbers of the second reading are those of the first
        everything = list(source.documents())
        assert everything[:-1] == ["fine"] * left and everything[-1] == "the file after it"
        assert source.damaged == {0: places} and source.total == left + 1
        assert list(source.documents(left)) == ["the file after it"]
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 1 and re.search(message, notes[0]) and "data.on_error=skip" in notes[0]


def test_what_lies_before_damage_does_not_depend_on_how_the_bytes_come() -> None:
    def read(content: bytes, size: int) -> list[bytes | None]:
        lines = []
        with pytest.raises(Damage):
            for line in split_lines(inflate(content[i : i + size] for i in range(0, len(content), size))):
                lines.append(line)
        return lines

    for content in (bytes(FLIPPED), CUT[: len(CUT) // 2], CUT[:-4] + b"\0\0\0\0"):
        whole = read(content, len(content))
        assert 1000 < len(whole) <= 3000
        assert read(content, 4099) == read(content, 100_000) == whole


def test_left_out_documents_are_part_of_the_identity(corpus: Corpus) -> None:
    config = corpus(2)
    stop, skip = open_source(config, "train"), open_source({**config, "on_error": "skip"}, "train")
    assert "on_error" not in stop.description and stop.identity != skip.identity
    assert stop.identity == open_source({**config, "on_error": "stop"}, "train").identity
    with pytest.raises(UserError, match=r"data\.on_error is 'ignore': use one of stop, skip"):
        open_source({**config, "on_error": "ignore"}, "train")


def test_several_members_and_zeros_after_them_are_one_gzip_file(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl.gz").write_bytes(gz(GOOD) + gz(b"") + gz(GOOD) + b"\0" * 1000)
    assert texts({"kind": "text", "path": str(tmp_path), "holdout": 10**9}) == ["fine"] * 2


def test_large_and_odd_documents_are_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    odd = ["x" * 10_000_000, "before \0 after", "\u2028 line \x85 ends \r\n inside", "\U0001f600 pair"]
    write_shard(tmp_path / "c4-train.00000-of-00001.json.gz", odd)
    got = texts({"kind": "c4_local", "path": str(tmp_path)})
    assert got == odd
    assert all(tokenizer.encode(got[1:]))


def test_a_line_that_never_ends_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lines, "LONGEST_LINE", 1_000_000)
    path = tmp_path / "c4-train.00000-of-00001.json.gz"
    path.write_bytes(gz(GOOD + b'{"text": "' + b"x" * 2_000_000 + b'"}\n' + GOOD))
    with pytest.raises(UserError, match="line 2: longer than 0 MiB"):
        texts({"kind": "c4_local", "path": str(tmp_path)})
    assert texts({"kind": "c4_local", "path": str(tmp_path), "on_error": "skip"}) == ["fine"] * 2


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "c4-train.00000-of-00001.json.gz"
    for change, message in (
        (lambda: path.write_bytes(CUT[:-100]), "has changed since it was opened"),
        (lambda: path.write_bytes(CUT + gz(GOOD)), "has changed since it was opened"),
        (path.unlink, "after byte 0: cannot be read"),
    ):
        path.write_bytes(CUT)
        source = open_source({"kind": "c4_local", "path": str(tmp_path), "on_error": "skip"}, "train")
        change()
        with pytest.raises(UserError, match=message) as error:
            list(source.documents())
        assert str(path) in str(error.value) and not source.lengths


def test_a_shard_with_another_number_of_documents_has_changed(corpus: Corpus) -> None:
    source = open_source(corpus(4, 4), "train")
    source.lengths[0] = 5  # as a checkpoint says
    with pytest.raises(UserError, match="shard 0 had 5 documents and has 4"):
        list(source.documents())


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_loop(path: Path) -> None:
    path.symlink_to(path)


def make_broken_link(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [make_pipe, make_loop, make_broken_link, make_device, Path.mkdir])
def test_what_is_no_file_does_not_hang(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "c4-train.00000-of-00002.json.gz"
    make(path)
    write_shard(tmp_path / "c4-train.00001-of-00002.json.gz", ["text"])
    for config in ({"kind": "c4_local"}, {"kind": "text", "holdout": 10**9}):
        if make is Path.mkdir and config["kind"] == "text":  # a folder, whatever its name
            assert texts({**config, "path": str(tmp_path)}) == ["text"]
            continue
        with pytest.raises(UserError, match=re.escape(str(path)) + " (is not a regular file|cannot be read)"):
            open_source({**config, "path": str(tmp_path)}, "train")


def test_a_file_that_turns_into_a_pipe(tmp_path: Path) -> None:
    path = tmp_path / "c4-train.00000-of-00001.json.gz"
    path.write_bytes(gz(GOOD))
    source = open_source({"kind": "c4_local", "path": str(tmp_path), "on_error": "skip"}, "train")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="is not a regular file"):
        list(source.documents())


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c4-train.00000-of-00001.json.gz"
    path.write_bytes(gz(GOOD))
    source = open_source({"kind": "c4_local", "path": str(tmp_path), "on_error": "skip"}, "train")

    def refuse(*_: Any) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)  # the tests may run as root, whom no mode keeps out
    with pytest.raises(UserError, match=re.escape(str(path)) + r", after byte 0: cannot be read \(Permission denied\)"):
        list(source.documents())


def test_damaged_text_files(tmp_path: Path) -> None:
    parts = [f"paragraph {i}".encode() for i in range(6)]
    parts[2] += b"\xff\nmore of it\xff"
    (tmp_path / "x.txt").write_bytes(b"\n\n".join(parts))
    config = {"kind": "text", "path": str(tmp_path), "document_characters": 5, "holdout": 10**9, "on_error": "skip"}
    source = open_source(config, "train")
    assert list(source.documents()) == [f"paragraph {i}" for i in (0, 1, 3, 4, 5)]
    assert source.damaged == {0: 1}


def test_sources_can_be_sent_to_another_process(corpus: Corpus) -> None:
    source = open_source(corpus(3, 2), "train")
    copy = pickle.loads(pickle.dumps(source))
    assert list(copy.documents()) == list(source.documents()) and copy.identity == source.identity


# Configs that cannot work


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "data.kind"),
        ({"kind": "c4_local"}, "data.path is missing"),
        ({"kind": "c4_local", "path": "???"}, "data.path is missing"),
        ({"kind": "c4_local", "path": "/no/such/folder"}, "does not exist"),
        ({"kind": "c4_local", "path": str(ROOT / "configs")}, r"No file named c4-train\.\*\.json\.gz"),
        ({"kind": "text", "path": str(ROOT / "data" / "sample" / "sample_1k.model")}, "this kind of file"),
        ({"kind": "text", "path": str(ROOT / "configs")}, "holds no file ending in"),
        ({"kind": "hub"}, "data.name is missing"),
        ({"kind": "prepared"}, "data.path is missing"),
        ({"kind": "c4_local", "path": "/" + "x" * 300}, "cannot be read: File name too long"),
        ({"kind": "text", "path": str(ROOT / "data" / "sample"), "holdout": 1}, "at least 2"),
    ],
)
def test_configs_that_cannot_work(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_source(config, "train")


def test_an_unknown_split() -> None:
    with pytest.raises(UserError, match="train, validation"):
        open_source({"kind": "sample"}, "test")


# Text files


def words(text: str) -> list[str]:
    return text.split()


def test_text_files_are_cut_at_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("\n\n".join(f"paragraph {i}\nwith two lines" for i in range(100)) + "\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("small\n\nfile")
    (tmp_path / "ignored.pdf").write_bytes(b"%PDF")
    config = {"kind": "text", "path": str(tmp_path), "document_characters": 200, "holdout": 10**9}
    documents = texts(config)
    assert documents[-1] == "small\n\nfile"
    large = documents[:-1]
    assert words(" ".join(large)) == words((tmp_path / "b.txt").read_text())
    assert all(200 < len(text) < 240 and text.startswith("paragraph") for text in large[:-1])


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".json.gz"])
def test_held_out_documents_are_never_training(tmp_path: Path, ending: str) -> None:
    if ending == ".txt":
        (tmp_path / "x.txt").write_text("\n\n".join(f"paragraph number {i}" for i in range(2000)))
    else:
        lines = "".join(json.dumps({"text": f"document {i % 500}"}) + "\n" for i in range(2000))  # with repetitions
        data = lines.encode()
        (tmp_path / f"x{ending}").write_bytes(gz(data) if ending.endswith(".gz") else data)
    config = {"kind": "text", "path": str(tmp_path), "document_characters": 10, "holdout": 20}
    train, validation = texts(config), texts(config, "validation")
    assert not set(train) & set(validation)
    assert len(train) + len(validation) == 2000
    assert 0.02 < len(validation) / 2000 < 0.09


def test_a_validation_path_takes_nothing_from_training_but_its_own_files(tmp_path: Path) -> None:
    for name in ("a", "b", "valid"):
        (tmp_path / f"{name}.txt").write_text(f"text of {name}")
    config = {"kind": "text", "path": str(tmp_path), "validation_path": str(tmp_path / "valid.txt"), "holdout": 2}
    assert texts(config) == ["text of a", "text of b"]
    assert texts(config, "validation") == ["text of valid"]
    with pytest.raises(UserError, match="nothing is left to train on"):
        texts(config | {"validation_path": str(tmp_path)})


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("fine\nna\xefve\n".encode("latin-1"))
    with pytest.raises(UserError, match=re.escape(str(path)) + ", line 2: not UTF-8"):
        texts({"kind": "text", "path": str(path)})


def test_json_with_another_column(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"content": "words"}\n')
    config = {"kind": "text", "path": str(tmp_path), "text_column": "content", "holdout": 10**9}
    assert texts(config) == ["words"]


# The configs


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "data").glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_share_their_fields(path: Path) -> None:
    config = OmegaConf.create({"seed": 42, "data": OmegaConf.load(path)}).data  # in the place that Hydra gives it
    common = {"kind", "name", "path", "rows", "length", "seed", "shuffle_buffer", "validation_max_tokens"}
    assert common <= set(config)
    published = path.stem.startswith(("c4", "prepared"))
    assert config.rows == ("truncate" if published else "pack")
    assert config.validation_max_tokens == (10_000_000 if published else None)
    assert (config.protocol, config.attention, config.on_error, config.workers) == ("exact", "row", "stop", "auto")
    assert (config.length, config.seed, config.shuffle_buffer) == (256, 42, 1000)
    assert "tokenizer" not in config


@pytest.mark.parametrize("name", ["sample", "c4_local", "text"])
def test_configs_open_their_source(name: str, corpus: Corpus, tmp_path: Path) -> None:
    """As Hydra hands them over: every key that the code reads is spelled as in the files."""
    given = {"c4_local": {"path": corpus(2)["path"]}, "text": {"path": str(tmp_path / "x.txt")}}
    (tmp_path / "x.txt").write_text("some text")
    file = ROOT / "configs" / "data" / f"{name}.yaml"
    config = OmegaConf.merge(OmegaConf.load(file), given.get(name, {}))
    OmegaConf.set_struct(config, True)
    assert open_source(config, "train").description["split"] == "train"  # type: ignore[arg-type]
    if name in given:
        with pytest.raises(UserError, match=r"data\.path is missing"):
            open_source(OmegaConf.load(file), "train")  # type: ignore[arg-type]
