"""Where documents come from: files in C4's layout, text files, the Hugging Face Hub, the embedded sample.

A source is a list of shards (files, for most sources), each a sequence of documents in file order. Documents
that are empty or whitespace are skipped and counted; the numbering of documents leaves them out. With
on_error="skip" so are damaged documents and what follows a damaged place of a file, which is always the same for
the same bytes. What is not in the bytes always stops the run: a file that is missing, cannot be read or has changed.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError
from .lines import Damage, decoded, file_chunks, file_size, inflate, json_text, split_lines
from .mirror import Mirror, find_mirror

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

SAMPLE = Path(__file__).resolve().parent / "sample"
SPLITS = ("train", "validation")
TEXT_ENDINGS = (".txt", ".txt.gz")
JSON_ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
ON_ERROR = ("stop", "skip")
MISSING = "???"  # what Hydra leaves where a value must be given
RECORD_ONLY = ("path", "present")  # parts of a description that do not tell what the documents are


Document = Any  # a text, or where a source has tokenised before (`Source.tokens`), an array of token ids


def generator(seed: int, epoch: int) -> random.Random:
    """The random numbers of one epoch. Only its `random()` is used: the method whose sequence Python promises."""
    digest = hashlib.sha256(f"rows {seed} {epoch}".encode()).digest()
    return random.Random(int.from_bytes(digest, "big"))


def permuted(count: int, rng: random.Random) -> list[int]:
    """The numbers below `count` in a random order; takes `count` - 1 numbers of `rng`."""
    order = list(range(count))
    for i in range(count - 1, 0, -1):
        j = int(rng.random() * (i + 1))
        order[i], order[j] = order[j], order[i]
    return order


def shard_order(shards: int, seed: int, epoch: int) -> list[int]:
    """The order in which the shuffled rows of an epoch read the shards."""
    return permuted(shards, generator(seed, epoch))


class Source:
    """Documents of one split, in a stated order. Subclasses define `shards` and `read`.

    `description` is what a run record should keep (plain strings and numbers). `skipped` counts the documents
    without text in the shards read to their end so far. `damaged` is the number of places left out with
    on_error="skip" by shard, of the shards that have some.
    """

    shards: int  # number of shards
    description: dict[str, Any]

    def __init__(self, on_error: str = "stop") -> None:
        self.lengths: dict[int, int] = {}  # documents of the shards read to their end, by shard number
        self.damaged: dict[int, int] = {}
        self._empty: dict[int, int] = {}
        self._on_error = on_error
        self._noted: set[int] = set()  # shards whose damage was written about

    def read(self, shard: int) -> Iterator[str]:
        """All documents of one shard, in file order, empty ones included."""
        raise NotImplementedError

    def tokens(
        self, documents: Sequence[Document], tokenizer: Tokenizer, limit: int | None = None
    ) -> Sequence[Sequence[int]]:
        """Token ids of documents of this source, without special tokens; with `limit`, the first `limit` of each."""
        return tokenizer.encode(documents, limit)

    def documents(self, start: int = 0, order: Sequence[int] | None = None) -> Iterator[Document]:
        """Documents from number `start` on, shard after shard in `order` (default: 0, 1, 2, ...).

        Shards that were read to their end before are skipped without opening them. Raises `UserError` for
        damaged input, and where the whole split turns out to hold no document.
        """
        for shard in range(self.shards) if order is None else order:
            known = self.lengths.get(shard)
            if known is not None and start >= known:
                start -= known
                continue
            count = empty = 0
            for text in self.read(shard):
                if not text or text.isspace():
                    empty += 1
                    continue
                count += 1
                if start:
                    start -= 1
                else:
                    yield text
            if known not in (None, count):
                raise UserError(
                    f"{self.label} has changed: shard {shard} had {known} documents and has {count}; restore the old "
                    "files or start a new run."
                )
            self.lengths[shard], self._empty[shard] = count, empty
        self.check()

    def _leave_out(self, shard: int, count: int, what: str) -> None:
        """Raise, or count the damaged place number `count` of a shard and say so once a file."""
        if self._on_error == "stop":
            raise UserError(what)
        self.damaged[shard] = max(count, self.damaged.get(shard, 0))
        if shard not in self._noted:
            self._noted.add(shard)
            print(
                f"data: {what} Left out, as is all other damage of this file (data.on_error=skip).",
                file=sys.stderr,
                flush=True,
            )

    def check(self) -> None:
        """Raise `UserError` where the split is known to hold no document."""
        if self.total == 0:
            raise UserError(f"{self.label} holds no documents with text: check data.path and the split.")

    @property
    def label(self) -> str:
        """How messages call this source."""
        where = self.description.get("path") or self.description["name"]
        return f"The {self.description['split']} split of {where}"

    @property
    def total(self) -> int | None:
        """Number of documents, or None before every shard was read to its end once."""
        return sum(self.lengths.values()) if len(self.lengths) == self.shards else None

    @property
    def skipped(self) -> int:
        """Documents without text met so far, in shards read to their end."""
        return sum(self._empty.values())

    @property
    def identity(self) -> str:
        """Digest of the description without the path: a moved copy of the same files stays the same source.

        So does a mirror that holds another part of the same files.
        """
        return self._digest(RECORD_ONLY)

    @property
    def former_identity(self) -> str:
        """That of the same source with on_error="stop": a run that damage has stopped may go on by leaving it out."""
        return self._digest((*RECORD_ONLY, "on_error"))

    def _digest(self, left_out: Sequence[str]) -> str:
        facts = {key: value for key, value in self.description.items() if key not in left_out}
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


class LineSource(Source):
    """Documents of files of lines, one shard a file. Subclasses define `place` and `chunks`.

    Files ending in .json, .jsonl (also .gz) hold one JSON object a line with the text under `text_column`.
    Files ending in .txt (also .gz) are cut into documents at blank lines: a document ends at the first blank
    line after `document_characters` characters, so a smaller file is one document. With `holdout=N`, a
    document whose SHA-256 is 0 modulo N belongs to validation and every other to training; equal texts never
    fall on both sides.
    """

    def __init__(
        self, split: str, text_column: str, document_characters: int, holdout: int | None, on_error: str
    ) -> None:
        super().__init__(on_error)
        self._split = split
        self._text_column = text_column
        self._document_characters = document_characters
        self._holdout = holdout

    def place(self, shard: int) -> str:
        """How messages call a shard; it ends as the name of the file does."""
        raise NotImplementedError

    def chunks(self, shard: int) -> Iterator[bytes]:
        """The bytes of a shard. Raises `UserError`, also at the end where they were not the bytes of the listing."""
        raise NotImplementedError

    def read(self, shard: int) -> Iterator[str]:
        place, number, left_out = self.place(shard), 0, 0
        chunks = self.chunks(shard)

        def lines() -> Iterator[bytes | None]:
            nonlocal number
            for line in split_lines(inflate(chunks) if place.endswith(".gz") else chunks):
                number += 1
                yield line

        def leave_out(what: str) -> None:
            nonlocal left_out
            left_out += 1
            if self._on_error == "stop":
                deque(chunks, maxlen=0)  # to the end, where it turns out whether the bytes are those of the listing
            self._leave_out(shard, left_out, what)

        is_text = place.endswith(TEXT_ENDINGS)
        try:
            for text in self._read_text(lines()) if is_text else self._read_json(lines()):
                if isinstance(text, Damage):
                    leave_out(f"{place}, line {number}: {text}")
                elif self._holdout is None or held_out(text, self._holdout) == (self._split == "validation"):
                    yield text
        except Damage as damage:
            deque(chunks, maxlen=0)
            leave_out(f"{place}, after line {number}: {damage}")
        else:
            if number == 0 and not is_text:
                leave_out(f"{place} is empty: fetch the file again or remove it.")

    def _read_json(self, lines: Iterator[bytes | None]) -> Iterator[str | Damage]:
        for line in lines:
            try:
                text = decoded(line)
                if text.isspace():
                    continue
                text = json_text(text, self._text_column)
            except Damage as damage:
                yield damage
            else:
                yield text

    def _read_text(self, lines: Iterator[bytes | None]) -> Iterator[str | Damage]:
        parts: list[str] = []
        size, whole = 0, True
        for line in lines:
            try:
                text = decoded(line)
            except Damage as damage:
                if whole:
                    yield damage
                whole, parts = False, []
                size += len(line or b"")
                continue
            if size > self._document_characters and text.isspace():
                if whole:
                    yield "".join(parts).strip()
                parts, size, whole = [], 0, True
            else:
                size += len(text)
                if whole:
                    parts.append(text)
        if whole:
            yield "".join(parts).strip()


class FileSource(LineSource):
    """Documents of local files."""

    def __init__(
        self,
        name: str,
        split: str,
        files: Sequence[Path] | Mirror,
        path: Path,
        *,
        text_column: str = "text",
        document_characters: int = 2000,
        holdout: int | None = None,
        on_error: str = "stop",
    ) -> None:
        super().__init__(split, text_column, document_characters, holdout, on_error)
        self._mirror = files if isinstance(files, Mirror) else None
        if isinstance(files, Mirror):
            self._files, self._sizes = files.files, files.sizes
        else:
            self._files = list(files)
            self._sizes = {i: file_size(file) for i, file in enumerate(self._files)}
        self.shards = len(self._files)
        self.description = {
            "name": name,
            "split": split,
            "path": str(path),
            "files": self.shards,
            "first_file": self._files[0].name,
            "last_file": self._files[-1].name,
            "holdout": holdout,
        }
        if text_column != "text":
            self.description["text_column"] = text_column
        if self._mirror is not None and self._mirror.facts is not None:
            self.description |= {**self._mirror.facts, "present": len(self._sizes)}
        else:
            listing = [(file.name, self._sizes[i]) for i, file in enumerate(self._files)]
            self.description["bytes"] = sum(self._sizes.values())
            self.description["listing_sha256"] = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
        if any(file.name.endswith(TEXT_ENDINGS) for file in self._files):
            self.description["document_characters"] = document_characters
        if on_error != "stop":
            self.description["on_error"] = on_error

    @property
    def files(self) -> list[Path]:
        """The files. Raises `UserError` unless all of them are here."""
        for shard in range(self.shards):
            self._check_presence(shard)
        return self._files

    def place(self, shard: int) -> str:
        return str(self._files[shard])

    def chunks(self, shard: int) -> Iterator[bytes]:
        self._check_presence(shard)
        return file_chunks(self._files[shard], self._sizes[shard])

    def _check_presence(self, shard: int) -> None:
        if shard not in self._sizes:
            assert self._mirror is not None
            raise self._mirror.absent(shard)


def open_source(cfg: Mapping[str, Any], split: str) -> Source:
    """The source that a data config (`configs/data/*.yaml`) describes, for `split` "train" or "validation".

    `cfg.kind` chooses: `sample` (embedded), `c4_local` (C4's layout below `path`), `text` (files at `path`),
    `hub` (the data set `name`), `prepared` (tokenised before, at `path`). Raises `UserError`.
    """
    if split not in SPLITS:
        raise UserError(f"There is no split {split!r}: use one of {', '.join(SPLITS)}.")
    kind = cfg.get("kind")
    on_error = cfg.get("on_error") or "stop"
    if on_error not in ON_ERROR:
        raise UserError(f"data.on_error is {on_error!r}: use one of {', '.join(ON_ERROR)}.")
    if kind == "prepared":
        from .prepared import open_prepared

        return open_prepared(_path(cfg, "path"), split)
    if kind == "sample":
        return FileSource("sample", split, find_mirror(SAMPLE, split), Path("data/sample"), on_error=on_error)
    if kind == "c4_local":
        path = _path(cfg, "path")
        return FileSource(
            cfg.get("name") or "c4_local", split, find_mirror(path, split), path,
            text_column=cfg.get("text_column") or "text",
            on_error=on_error,
        )  # fmt: skip
    if kind == "text":
        return _open_text(cfg, split, on_error)
    if kind == "hub":
        return _open_hub(cfg, split, on_error)
    raise UserError(f"data.kind is {kind!r}: use one of sample, c4_local, text, hub, prepared (see configs/data).")


def _open_text(cfg: Mapping[str, Any], split: str, on_error: str) -> FileSource:
    path = _path(cfg, "path")
    files = _text_files(path)
    holdout: int | None = _whole(cfg, "holdout", 50, 2)
    if cfg.get("validation_path"):
        other = _path(cfg, "validation_path")
        validation = _text_files(other)
        holdout = None
        if split == "validation":
            path, files = other, validation
        else:
            kept = {file.resolve() for file in validation}
            files = [file for file in files if file.resolve() not in kept]
            if not files:
                raise UserError(
                    "data.validation_path covers all of data.path, nothing is left to train on: set it to only some of the "
                    "files, or leave it out."
                )
    return FileSource(
        cfg.get("name") or "text", split, files, path,
        text_column=cfg.get("text_column") or "text",
        document_characters=_whole(cfg, "document_characters", 2000, 1),
        holdout=holdout,
        on_error=on_error,
    )  # fmt: skip


def _open_hub(cfg: Mapping[str, Any], split: str, on_error: str) -> Source:
    from .hub import HubFileSource, HubSource

    if cfg.get("name") in (None, "", MISSING):
        raise UserError("data.name is missing: give the data set's name on the Hub, as in data.name=allenai/c4.")
    by_file = bool(cfg.get("train_files"))
    key = "files" if by_file else "split"
    own = cfg.get(f"validation_{key}")
    part = own if split == "validation" and own else cfg.get(f"train_{key}") or "train"
    options: dict[str, Any] = {
        "revision": cfg.get("revision"),
        "text_column": cfg.get("text_column") or "text",
        "holdout": None if own else _whole(cfg, "holdout", 50, 2),
        "on_error": on_error,
        "retries": _whole(cfg, "retries", 8, 0),
        "timeout": float(cfg.get("timeout") or 30),
    }
    if by_file:
        return HubFileSource(cfg["name"], split, part, **options)
    return HubSource(cfg["name"], split, config=cfg.get("config"), hub_split=part, **options)


def _whole(cfg: Mapping[str, Any], key: str, default: int, least: int) -> int:
    value = cfg.get(key)
    if value is None:
        return default
    if type(value) is not int or value < least:
        raise UserError(f"data.{key} is {value!r}: it must be a whole number and at least {least}.")
    return value


def held_out(text: str, holdout: int) -> bool:
    """Whether a document belongs to validation, where one in `holdout` does."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") % holdout == 0


def _path(cfg: Mapping[str, Any], key: str) -> Path:
    if cfg.get(key) in (None, "", MISSING):
        raise UserError(f"data.{key} is missing: give the folder or file to read, as in data.{key}=/some/folder.")
    path = Path(str(cfg[key])).expanduser()
    try:
        if path.exists():
            return path
    except OSError as error:
        raise UserError(
            f"data.{key}={path} cannot be read: {error.strerror or error}; give the folder or file to read."
        ) from error
    raise UserError(f"data.{key}={path} does not exist: give the folder or file to read.")


def _text_files(path: Path) -> list[Path]:
    """The text files at `path`: itself, or those anywhere below it, by relative path."""
    endings = TEXT_ENDINGS + JSON_ENDINGS
    if path.is_file():
        if path.name.endswith(endings):
            return [path]
        raise UserError(f"{path}: this kind of file is not read; use one ending in {', '.join(endings)}.")
    files = sorted(file for file in path.rglob("*") if file.name.endswith(endings) and not file.is_dir())
    if not files:
        raise UserError(f"{path} holds no file ending in {', '.join(endings)}: give another data.path.")
    return files
