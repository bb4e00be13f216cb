"""Malformed inputs that nobody has thought of, by Hypothesis: what was not damaged comes out as it is, or a `UserError`
names the file; never another exception, never other rows.

HYPOTHESIS_PROFILE=long: other examples each time, and many more of them.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from data import UserError, load_tokenizer, open_source
from data.mirror import MANIFEST
from data.prepared import MANIFEST as PREPARED_MANIFEST
from pretraining import checkpoint
from pretraining.config import PATH_KEYS, RULES, TEXT_KEYS, compose, quoted, validate
from pretraining.record import RunRecord, read_lines
from pretraining.restore import open_saved

from .test_malformed import KNOWN, within
from .test_malformed_configs import base, having
from .test_malformed_data import TEXTS, gz, mirror, record, rows, same
from .test_malformed_runs import STEP, TENSORS, composed_eval, make_sums, resume, resume_in, run  # noqa: F401
from .test_malformed_stores import MODEL, folder  # noqa: F401

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
FIRST = "c4-train.00000-of-00002.json.gz"


def fuzz(examples: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=examples * (40 if LONG else 1),
        derandomize=not LONG,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def waits_for(*kinds: str) -> pytest.MarkDecorator:
    """Left out as long as a case of the tables is known to fail for the same reason."""
    known = [name for cases in KNOWN.values() for name in cases if name.startswith(kinds)]
    return pytest.mark.skipif(bool(known), reason=f"{len(known)} cases like {known[:1]} are known to fail")


@contextmanager
def new_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


# Edits ----------------------------------------------------------------------------------------------------------------

EDIT = st.tuples(
    st.sampled_from(["flip", "cut", "insert", "delete", "zero", "repeat"]),
    st.floats(0, 1),
    st.integers(1, 64),
    st.binary(min_size=1, max_size=20),
)
EDITS = st.lists(EDIT, min_size=1, max_size=3)


def edited(content: bytes, edits: list[tuple[str, float, int, bytes]]) -> bytes:
    for kind, part, size, more in edits:
        i = min(int(part * len(content)), max(0, len(content) - 1))
        if kind == "flip" and content:
            content = content[:i] + bytes([content[i] ^ (1 << size % 8)]) + content[i + 1 :]
        elif kind == "cut":
            content = content[:i]
        elif kind == "insert":
            content = content[:i] + more + content[i:]
        elif kind == "delete":
            content = content[:i] + content[i + size :]
        elif kind == "zero":
            content = content[:i] + bytes(len(content[i : i + size])) + content[i + size :]
        elif kind == "repeat":
            content = content[: i + size] + content[i:]
    return content


# Text -----------------------------------------------------------------------------------------------------------------


def unzipped(content: bytes) -> tuple[bytes, bool]:
    """What can be had of a gzip file, one byte after another, and whether that is all."""
    out, engine, first = [], None, True
    for i in range(len(content)):
        byte = content[i : i + 1]
        if engine is None:
            if byte == b"\0" and not first:
                continue
            engine, first = zlib.decompressobj(31), False
        try:
            out.append(engine.decompress(byte))
        except zlib.error:
            return b"".join(out), False
        if engine.eof:
            engine = None
    return b"".join(out), engine is None


def expected(content: bytes, ending: str) -> tuple[list[str], int]:
    """The documents of a file of JSON lines that are not damaged, and the number of damaged places."""
    whole = True
    if ending.endswith(".gz"):
        content, whole = unzipped(content)
    lines = content.split(b"\n")
    if not (whole and lines[-1]):  # the end of the last line, or a line whose rest is lost
        lines.pop()
    found, places = [], 0 if whole else 1
    if whole and not lines:
        return [], 1
    for line in lines:
        try:
            text = line.decode()
            if text.strip():
                value = json.loads(text)["text"]
                value.encode()
                found.append(value)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            places += 1
    return [text for text in found if text.strip()], places


def expected_text(content: bytes, characters: int) -> tuple[list[str], int]:
    """The same of a text file: documents end at the first blank line after so many characters."""
    found: list[str] = []
    places = size = 0
    parts: list[str] | None = []
    for line in content.split(b"\n"):
        try:
            text: str | None = line.decode()
        except UnicodeDecodeError:
            text = None
        if text is None:
            places += parts is not None
            parts, size = None, size + len(line) + 1
        elif size > characters and not text.strip():
            found += ["\n".join(parts).strip()] if parts is not None else []
            parts, size = [], 0
        else:
            size += len(text) + 1
            if parts is not None:
                parts.append(text)
    found += ["\n".join(parts).strip()] if parts is not None else []
    return [text for text in found if text], places


def check_documents(name: str, content: bytes, left: list[str], places: int) -> None:
    """With data.on_error=stop and =skip, whatever the sizes in which the file is read."""
    with new_folder() as place, within():
        (place / name).write_bytes(content)
        (place / "zz.jsonl").write_bytes(record("always there"))
        config = {"kind": "text", "path": str(place), "holdout": 10**9, "document_characters": 10}
        source = open_source(config | {"on_error": "skip"}, "train")
        assert list(source.documents()) == [*left, "always there"]
        assert source.damaged == ({0: places} if places else {})
        if places:
            with pytest.raises(UserError, match=re.escape(str(place / name))):
                list(open_source(config, "train").documents())
        else:
            assert list(open_source(config, "train").documents()) == [*left, "always there"]


@fuzz(60)
@given(st.one_of(st.binary(max_size=300), st.lists(st.binary(max_size=40)).map(b"\n".join)))
@example(b"\n")
@example(b"\0")
@example(b"{}")
@example(b'{"text": "a"}\r')
def test_arbitrary_bytes(content: bytes) -> None:
    check_documents("a.jsonl", content, *expected(content, ".jsonl"))
    check_documents("a.json.gz", content, *expected(content, ".json.gz"))
    check_documents("a.json.gz", gz(content), *expected(gz(content), ".json.gz"))
    check_documents("a.txt", content, *expected_text(content, 10))
    check_documents("a.txt.gz", gz(content), *expected_text(content, 10))


LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(codec=None)))
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "a", ""]), inner, max_size=3),
    max_leaves=6,
)


@fuzz(60)
@given(st.lists(VALUES | st.fixed_dictionaries({"text": LEAVES}), min_size=1, max_size=5), st.booleans())
def test_arbitrary_values_as_lines(values: list[Any], ascii_only: bool) -> None:
    try:
        content = b"".join(json.dumps(value, ensure_ascii=ascii_only).encode() + b"\n" for value in values)
    except UnicodeEncodeError:
        assume(False)
    check_documents("a.jsonl", content, *expected(content, ".jsonl"))


@fuzz(60)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(0, 4), EDITS)
def test_an_edited_zip_gives_the_documents_before_the_damage(levels: list[int], count: int, edits: Any) -> None:
    """One or more members, stored or compressed; Python's own reader tells whether the file is whole."""
    lines = [record(text) for text in TEXTS[: 2 * count]]
    members = [gzip.compress(b"".join(lines[i :: len(levels)]), level, mtime=0) for i, level in enumerate(levels)]
    content = edited(b"".join(members), edits)
    left, places = expected(content, ".json.gz")
    try:
        whole = gzip.decompress(content)
    except (OSError, EOFError, zlib.error):
        assert places
    else:
        assert (left, places) == expected(whole, ".jsonl")
    check_documents("a.json.gz", content, left, places)


@fuzz(8)
@given(
    st.lists(st.sampled_from([*(record(text) for text in TEXTS), b"{\n", b'{"text": "\xff"}\n']), max_size=12), EDITS
)
def test_the_rows_are_those_of_the_documents_that_are_left(lines: list[bytes], edits: Any) -> None:
    """In the shuffled order, over epochs, truncated and packed."""
    content = edited(gz(b"".join(lines)), edits)
    left, _ = expected(content, ".json.gz")
    for protocol in ("truncate", "pack"):
        found = []
        for raw in (content, gz(b"".join(map(record, left))) if left else gz(b"\n")):
            with new_folder() as place, within():
                mirror(place, FIRST)
                (place / FIRST).write_bytes(raw)
                (place / FIRST.replace("00000-", "00001-")).write_bytes(gz(record("always there")))
                config = {"kind": "c4_local", "path": str(place), "on_error": "skip"}
                found.append(rows(config, 5, rows=protocol))
        assert same(*found)


@fuzz(50)
@given(st.lists(st.text(st.characters(codec=None), max_size=60), min_size=1, max_size=6), st.integers(2, 12))
@example(["\ud800", "a\ud83d\ude00b", "\0", "\u202e\u2066", "</s><pad>", "\u200b"], 5)
@example(["a b. C d", "x " * 40, " x", "x  y\n\n z"], 3)
def test_arbitrary_texts_as_rows(texts: list[str], length: int) -> None:
    """Each row is the beginning of one document's tokens, and end-of-text."""
    content = b"".join(record(text) for text in texts)
    left, _ = expected(content, ".jsonl")
    tokenizer = load_tokenizer("sample_1k")
    # SentencePiece writes a space as U+2581 and takes one in a text for the other.
    assert [tokenizer.decode(ids) for ids in tokenizer.encode(left)] == [text.replace("▁", " ") for text in left]
    for limit in (1, 3, length):
        assert tokenizer.encode(left, limit) == [ids[:limit] for ids in tokenizer.encode(left)]
    with new_folder() as place, within():
        (place / "a.jsonl").write_bytes(content)
        config = {"kind": "text", "path": str(place), "holdout": 10**9, "on_error": "skip"}
        if not left:
            with pytest.raises(UserError, match="holds no documents"):
                rows(config, 1)
            return
        made = rows(config, 1, batch_size=len(left), length=length, shuffle_buffer=0)[0].tolist()
    wanted = [[*ids[: length - 1], tokenizer.eos_id] for ids in tokenizer.encode(left)]
    assert made == [[*ids, *[tokenizer.pad_id] * (length - len(ids))] for ids in wanted]


@waits_for("folder")
@fuzz(50)
@given(
    st.recursive(VALUES, lambda x: st.dictionaries(st.sampled_from(["size", FIRST, "a"]), x)),
    st.sampled_from(["kind", "format", "repository", "revision", "files", "size"]),
)
def test_arbitrary_values_in_a_mirrors_manifest(value: Any, key: str) -> None:
    with new_folder() as place, within():
        config = mirror(place, FIRST)
        entry = {"size": (place / FIRST).stat().st_size, "sha256": ""}
        manifest = {"kind": "mirror", "format": 1, "repository": "a/b", "revision": "c", "files": {FIRST: entry}}
        (entry if key == "size" else manifest)[key] = value
        (place / MANIFEST).write_text(json.dumps(manifest))
        try:
            source = open_source(config, "train")
            found = list(source.documents(order=[0]))
        except UserError as error:
            assert str(place) in str(error)
        else:
            assert found == TEXTS


# Tokenizers -----------------------------------------------------------------------------------------------------------


@fuzz(60)
@given(EDITS)
def test_an_edited_tokenizer_is_refused_or_stays_inside_its_vocabulary(edits: Any) -> None:
    with new_folder() as place, within():
        (place / "x.model").write_bytes(edited(MODEL, edits))
        try:
            tokenizer = load_tokenizer(place / "x.model")
        except UserError as error:
            assert str(place / "x.model") in str(error)
            return
        assert 0 <= tokenizer.eos_id < tokenizer.vocab_size and 0 <= tokenizer.pad_id < tokenizer.vocab_size
        ids = [
            token
            for limit in (None, 3)
            for each in tokenizer.encode([*TEXTS, "", "\0 é 漢 🙂"], limit)
            for token in each
        ]
        assert all(0 <= token < tokenizer.vocab_size for token in ids)
        tokenizer.decode(ids)


# Prepared data --------------------------------------------------------------------------------------------------------


@fuzz(40)
@given(st.data())
def test_an_edited_prepared_folder_gives_the_same_rows_or_names_the_file(folder: Path, data: Any) -> None:  # noqa: F811
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    name = data.draw(st.sampled_from(files))
    with new_folder() as place, within():
        copy = Path(shutil.copytree(folder, place / "p"))
        (copy / name).write_bytes(edited((folder / name).read_bytes(), data.draw(EDITS)))
        wanted = rows({"kind": "prepared", "path": str(folder)}, 20)
        try:
            found = rows({"kind": "prepared", "path": str(copy)}, 20)
        except UserError as error:
            assert str(copy / PREPARED_MANIFEST) in str(error) or str(copy / name) in str(error)
        else:
            assert same(found, wanted)


# Checkpoints ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trainer(run: Path) -> Any:  # noqa: F811
    return resume(run, run / STEP)


@pytest.fixture(scope="module")
def other(run: Path) -> Any:  # noqa: F811
    """One into which anything may be loaded."""
    return resume(run, run / STEP)


def everything(trainer: Any) -> dict[str, torch.Tensor]:
    found = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    states, _ = checkpoint.optimizer_state(trainer.model, trainer.optimizer)
    return found | {name: x.clone() for name, x in states.items()}


def load(trainer: Any, path: Path) -> bool:
    """Whether a checkpoint can be loaded; where it cannot, nothing has been changed."""
    before = everything(trainer)
    try:
        checkpoint.load(path, trainer.model, trainer.optimizer, trainer.record.config["optimizer"])
    except UserError as error:
        assert str(path) in str(error)
        after = everything(trainer)
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        return False
    return True


@fuzz(30)
@given(st.sampled_from([TENSORS, checkpoint.STATE, checkpoint.SUMS]), EDITS)
def test_an_edited_checkpoint_is_refused_or_the_same(trainer: Any, run: Path, name: str, edits: Any) -> None:  # noqa: F811
    before = everything(trainer)
    with new_folder() as place, within():
        path = Path(shutil.copytree(run / STEP, place / "step-0000008"))
        (path / name).write_bytes(edited((path / name).read_bytes(), edits))
        load(trainer, path)
    after = everything(trainer)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@waits_for("edited")
@fuzz(20)
@given(EDITS)
def test_edited_tensors_whose_sums_were_made_anew(run: Path, other: Any, edits: Any) -> None:  # noqa: F811
    """Other numbers cannot be told from the saved ones then; but nothing else than a `UserError` comes of it."""
    with new_folder() as place, within():
        copy = Path(shutil.copytree(run, place / "run"))
        content = (copy / STEP / TENSORS).read_bytes()
        size = 8 + int.from_bytes(content[:8], "little")
        head, rest = content[:size], content[size:]
        (copy / STEP / TENSORS).write_bytes(edited(head, edits) + rest)
        make_sums(copy / STEP)
        try:
            resume_in(other, copy / STEP)
        except UserError as error:
            assert str(copy / STEP) in str(error)


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, child in inner for found in paths(child, (*path, key)))]


@waits_for("edited")
@fuzz(30)
@given(st.data(), VALUES | st.dictionaries(st.text(max_size=3), st.integers()))
def test_arbitrary_values_in_the_state_of_a_checkpoint(run: Path, other: Any, data: Any, value: Any) -> None:  # noqa: F811
    state = json.loads((run / STEP / checkpoint.STATE).read_text())
    path = data.draw(st.sampled_from(paths(state)))
    with new_folder() as place, within():
        copy = Path(shutil.copytree(run, place / "run"))
        if not path:
            state = value
        else:
            node = state
            for key in path[:-1]:
                node = node[key]
            node[path[-1]] = value
        (copy / STEP / checkpoint.STATE).write_text(json.dumps(state))
        make_sums(copy / STEP)
        try:
            resume_in(other, copy / STEP)
        except UserError as error:
            assert str(copy) in str(error) or "The saved place in the data" in str(error)


# Records --------------------------------------------------------------------------------------------------------------

LINES = st.lists(st.one_of(VALUES, st.fixed_dictionaries({"kind": VALUES, "step": VALUES})).map(json.dumps), max_size=4)


@waits_for("record")
@fuzz(30)
@given(st.one_of(st.binary(max_size=200), LINES.map(lambda lines: "\n".join(lines).encode())))
def test_arbitrary_bytes_as_a_record(content: bytes) -> None:
    with new_folder() as place, within():
        for name in ("metrics.jsonl", "config.yaml", "environment.json", "samples.txt"):
            folder = place / name[:3]
            folder.mkdir()
            (folder / name).write_bytes(content)
            try:
                found = RunRecord(folder, base())
                found.start({}, 8)
                lines = read_lines(found.metrics_file)
            except UserError as error:
                assert str(folder) in str(error)
            else:
                assert all(isinstance(line["step"], int) and isinstance(line["kind"], str) for line in lines)


@waits_for("model")
@fuzz(20)
@given(st.sampled_from(["config.yaml", "model/config.json", "model/model.safetensors"]), EDITS)
@pytest.mark.filterwarnings("ignore")
def test_an_edited_run_is_the_same_model_or_refused(run: Path, name: str, edits: Any) -> None:  # noqa: F811
    cfg = composed_eval().copy()
    cfg.checkpoint = str(run)
    wanted = dict(open_saved(cfg).model.named_parameters())
    with new_folder() as place, within():
        copy = Path(shutil.copytree(run, place / "run"))
        (copy / name).write_bytes(edited((copy / name).read_bytes(), edits))
        cfg.checkpoint = str(copy)
        try:
            found = dict(open_saved(cfg).model.named_parameters())
        except UserError:
            return
        assert all(torch.equal(found[key], wanted[key]) for key in wanted) and found.keys() == wanted.keys()


# Command lines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", RULES)
@fuzz(2)
@given(VALUES | st.text(st.characters(codec=None), max_size=5) | st.floats() | st.integers())
def test_any_value_of_any_key(key: str, value: Any) -> None:
    cfg = having(key)
    section, _, last = key.rpartition(".")
    try:
        (OmegaConf.select(cfg, section) if section else cfg)[last] = value
    except Exception:  # no value that OmegaConf has, which the command line cannot give either
        return
    try:
        validate(cfg)
    except UserError as error:
        assert last in str(error) and len(str(error).splitlines()) == 1
    else:
        assert RULES[key][0](value) or value is None or (isinstance(value, str) and "${" in value)


@waits_for("grammar")
@fuzz(25)
@given(
    st.sampled_from(["", "+", "++", "~"]),
    st.sampled_from(["trainer.steps", "optimizer", "data", "model.name", "run_dir", "eval", "a.b", "seed", ""]),
    st.text(st.characters(codec=None, exclude_categories=["Cs"]), max_size=8)
    | st.sampled_from(list("[]{}'\"$,=()?: #")),
)
def test_any_words_on_the_command_line(sign: str, key: str, value: str) -> None:
    with within():
        try:
            validate(compose([f"{sign}{key}={value}"]))
        except UserError as error:
            assert len(str(error).splitlines()) == 1


@fuzz(25)
@given(
    st.sampled_from(["prompt", "checkpoint"]),
    st.text(st.characters(codec=None, exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
    | st.text(st.sampled_from(list("ab\\'\"=,[]{}() $#:;&~+?")), min_size=1, max_size=8),
)
@example("prompt", "\\")
@example("prompt", "\\'")
@example("checkpoint", "a b/=,[1]{x}\\")
def test_texts_and_paths_reach_the_door_as_the_shell_gave_them(key: str, text: str) -> None:
    assert key in (*TEXT_KEYS, *PATH_KEYS)
    assume(text != "???" and "${" not in text and not (text[0] in "'\"" and text[-1] == text[0] and len(text) > 1))
    others = [] if key == "checkpoint" else ["checkpoint=x"]
    with within():
        found = compose([*others, quoted(f"{key}={text}")], root="generate")[key]
    assert str(found) == text or (key == "checkpoint" and isinstance(found, (int, float, bool)))
