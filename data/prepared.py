"""Prepared data: a source tokenised once (`scripts/prepare_data.py`), read as arrays, with the rows of the source itself.

A folder holds `manifest.json` (what it was made from and for, and the size and SHA-256 of every file) and one
file a shard of the source, such as `train/00017.tokens`, in the order of the source and with its numbering:

    tokens      uint16, little-endian   the documents' token ids one after another, without end-of-text
    padding     zeros up to a multiple of 8 bytes
    ends        uint64, little-endian   for each document, the number of tokens up to its end

Documents without text are left out, as in the numbering of a source, so that one shuffle gives one order.
`plan.json` and the `.json` beside each shard are what an interrupted preparation goes on from; reading needs
neither.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import UserError
from .lines import misfit, open_regular, read_json
from .sources import Document, Source
from .tokenizer import Tokenizer

KIND, FORMAT = "prepared", 1
MANIFEST = "manifest.json"
PLAN = "plan.json"
COMMAND = "scripts/prepare_data.py"
VOCABULARY = 1 << 16  # ids that a uint16 tells apart
IN_MEMORY = 1 << 20  # bytes; smaller shards are read at once: a mapped file keeps a file descriptor
DOCUMENTS, CHARACTERS = 512, 1 << 21  # tokenised in one call, whichever comes first
AGAIN = f"run the same {COMMAND} command again, it does only what is missing"

# What reading relies on, as `misfit` checks it.
ENTRY = {
    **dict.fromkeys(("documents", "tokens", "longest", "skipped", "damaged", "bytes"), int),
    **{"file": str, "sha256": str, "whole": bool, "index": object},
}
SPLIT = {"source": {"split": str}, "identity": str, "shards": int, "documents": int, "skipped": int, "files": [ENTRY]}
REQUEST = {"steps": (int, None), **dict.fromkeys(("batch_size", "rows", "length", "seed", "shuffle_buffer"), object)}
CONTENT = {
    "plan": str,
    "tokenizer": {"name": str, "fingerprint": str, "vocab_size": int},
    "max_tokens": (int, None),
    "splits": {"train": SPLIT, "validation": SPLIT},
    "validation": (None, dict.fromkeys(("rows", "length", "max_tokens"), object)),
    "prepared_for": [REQUEST],
}


# Reading --------------------------------------------------------------------------------------------------------------


class PreparedSource(Source):
    """Documents of a prepared split, as uint16 arrays of token ids (views; no document is copied).

    Its identity is that of the source it was made from, because the rows are the same. Numbers of documents
    are known from the manifest, so that any place is reached without reading what lies before it. The size
    of every file is checked at once; the SHA-256 of each, and whether its content can be as it says, before it is used
    for the first time in a process.
    """

    def __init__(self, folder: Path, split: str) -> None:
        super().__init__()
        manifest = read_manifest(folder)
        part = manifest["splits"][split]
        self._folder = folder
        self._manifest = manifest
        self._part = part
        self._files: dict[int, dict[str, Any]] = {entry["index"]: entry for entry in part["files"]}
        self._verified: set[int] = set()
        self.shards = part["shards"]
        self.description = {
            **part["source"],
            "path": str(folder),
            "prepared": manifest["digest"],
            "max_tokens": manifest["max_tokens"],
        }
        self.lengths = {index: entry["documents"] for index, entry in self._files.items() if entry["whole"]}
        self.damaged = {index: entry["damaged"] for index, entry in self._files.items() if entry["damaged"]}
        for entry in part["files"]:
            self._check_size(entry)

    @property
    def identity(self) -> str:
        return self._part["identity"]

    @property
    def skipped(self) -> int:
        """Documents without text in the shards that were prepared."""
        return self._part["skipped"]

    def tokens(
        self, documents: Sequence[Document], tokenizer: Tokenizer, limit: int | None = None
    ) -> Sequence[Sequence[int]]:
        """The documents, or the first `limit` tokens of each. Raises `UserError` if they were prepared for others."""
        made_with, most = self._manifest["tokenizer"], self._manifest["max_tokens"]
        if tokenizer.fingerprint != made_with["fingerprint"]:
            raise UserError(
                f"{self._folder} was prepared with the tokenizer {made_with['name']} ({made_with['fingerprint'][:12]}), "
                f"not with {tokenizer.name} ({tokenizer.fingerprint[:12]}): set tokenizer={made_with['name']}, or prepare "
                "another folder with this tokenizer."
            )
        if most is not None and (limit is None or limit > most):
            raise UserError(
                f"{self._folder} holds the first {most} tokens of each document, and these rows need "
                f"{'all of them' if limit is None else limit}: use data.rows=truncate with data.length of at most "
                f"{most + 1}, or prepare another folder with a larger --max-tokens."
            )
        return documents if limit is None else [ids[:limit] for ids in documents]

    def documents(self, start: int = 0, order: Sequence[int] | None = None) -> Iterator[np.ndarray]:
        """As `Source.documents`; what lies before `start` is not read."""
        for shard in range(self.shards) if order is None else order:
            known = self.lengths.get(shard)
            if known is not None and start >= known:
                start -= known
                continue
            yield from self._read_from(shard, start)
            start = 0
        self.check()

    def read(self, shard: int) -> Iterator[Any]:
        return self._read_from(shard, 0)

    def _read_from(self, shard: int, start: int) -> Iterator[np.ndarray]:
        entry = self._files.get(shard)
        if entry is None:
            raise UserError(self._not_prepared(f"shard {shard} of the {self.description['split']} split"))
        tokens, ends = self._open(entry)
        first = int(ends[start - 1]) if 0 < start <= len(ends) else 0
        for i in range(start, len(ends), 4096):
            for end in ends[i : i + 4096].tolist():
                yield tokens[first:end]
                first = end
        if not entry["whole"]:
            raise UserError(self._not_prepared(f"what follows document {len(ends)} of {entry['file']}"))

    def _not_prepared(self, what: str) -> str:
        if self.description["split"] == "validation":  # the whole split, unless its rows were limited
            limit = self._manifest["validation"]
            return (
                f"{self._folder} does not hold {what}; it was prepared for the validation rows of data.rows={limit['rows']}, "
                f"data.length={limit['length']}, data.validation_max_tokens={limit['max_tokens']}: use these settings, or "
                "prepare another folder for yours."
            )
        made_for = "; ".join(
            f"{request['steps']} steps of {request['batch_size']} rows (data.rows={request['rows']}, data.length="
            f"{request['length']}, data.seed={request['seed']}, data.shuffle_buffer={request['shuffle_buffer']})"
            for request in self._manifest["prepared_for"]
        )
        return (
            f"{self._folder} does not hold {what}; it was prepared for {made_for}: run {COMMAND} with it again, "
            "with these settings and more --steps, or without --steps."
        )

    def _open(self, entry: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a shard, uint16, and the end of each document, uint64; mapped where the file is large."""
        path = self._folder / entry["file"]
        self._check_size(entry)
        try:
            if entry["index"] not in self._verified:
                with open_regular(path) as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                if found != entry["sha256"]:
                    raise UserError(
                        f"{path} is damaged: its SHA-256 is {found[:12]}..., not {entry['sha256'][:12]}... as when it was "
                        f"written; delete it and {AGAIN}."
                    )
            if entry["bytes"] > IN_MEMORY:
                content = np.asarray(np.memmap(path, np.uint8, "r"))
            else:
                content = np.fromfile(path, np.uint8)
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror or error}): put it right, or delete it and {AGAIN}."
            ) from error
        tokens = content[: 2 * entry["tokens"]].view("<u2")
        ends = content[entry["bytes"] - 8 * entry["documents"] :].view("<u8")
        if entry["index"] not in self._verified:
            self._check_content(path, tokens, ends)
            self._verified.add(entry["index"])
        return tokens, ends

    def _check_content(self, path: Path, tokens: np.ndarray, ends: np.ndarray) -> None:
        """What no damage, only another writer or an edit can have done, but would give other rows without a word."""
        total = int(ends[-1]) if len(ends) else 0
        vocabulary = self._manifest["tokenizer"]["vocab_size"]
        if (ends[1:] < ends[:-1]).any() or total != len(tokens):
            what = f"its documents do not end one after another, the last at token {len(tokens):,}"
        elif (highest := int(tokens.max(initial=0))) >= vocabulary:
            what = f"it has the token id {highest}, and the vocabulary has {vocabulary:,}"
        else:
            return
        raise UserError(f"{path} is not as {COMMAND} writes it: {what}; delete it and {AGAIN}.")

    def _check_size(self, entry: dict[str, Any]) -> None:
        path = self._folder / entry["file"]
        try:
            size = path.stat().st_size
        except OSError as error:
            raise UserError(f"{path} is missing ({error.strerror or error}): {AGAIN}.") from error
        if size != entry["bytes"]:
            raise UserError(f"{path} has {size:,} bytes instead of {entry['bytes']:,}: {AGAIN}.")


def open_prepared(folder: Path, split: str) -> PreparedSource:
    """The split "train" or "validation" of a folder that `scripts/prepare_data.py` wrote. Raises `UserError`."""
    return PreparedSource(folder, split)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder. Raises `UserError` where it is missing, of another format or edited."""
    path = folder / MANIFEST
    try:
        manifest = read_json(path)
        intact = isinstance(manifest, dict) and manifest.get("digest") == digest(manifest)
    except FileNotFoundError as error:
        if (folder / PLAN).exists():
            raise UserError(f"{path} is missing, the preparation has not ended: {AGAIN}.") from error
        raise UserError(f"{path} is missing: give a folder that {COMMAND} wrote.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): {AGAIN}.") from error
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise UserError(f"{path} is not that of prepared data: give a folder that {COMMAND} wrote.")
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{path} has format {manifest.get('format')}, and this version reads {FORMAT}: use the version that wrote it, or "
            "prepare another folder."
        )
    if not intact:
        raise UserError(f"{path} was edited or damaged since it was written: {AGAIN}.")
    if (wrong := _inconsistent(manifest)) is not None:
        raise UserError(f"{path} was edited, or changed while it was read ({wrong}): {AGAIN}.")
    return manifest


def _inconsistent(manifest: dict[str, Any]) -> str | None:
    """What a manifest whose digest fits cannot say, or None."""
    part = misfit(manifest, CONTENT)
    if part is not None:
        return f"{part} is missing or of another kind"
    for name, split in manifest["splits"].items():
        files = split["files"]
        if len(files) > split["shards"]:
            return f"the {name} split has {len(files)} files and {split['shards']} shards"
        after = 0
        for entry in files:
            number = re.fullmatch(rf"{name}/(\d{{5,9}})\.tokens", entry["file"], re.ASCII)
            if number is None:
                return f"the {name} split has a file of another name"
            shard = int(number[1])
            if not after <= shard < split["shards"] or entry["index"] != shard:
                return f"the {name} split does not hold shard {shard} in its place, or not under its number"
            if not _adds_up(entry):
                return f"the numbers of {entry['file']} do not add up"
            after = shard + 1
    return None


def _adds_up(entry: dict[str, Any]) -> bool:
    """Whether so many tokens and documents take so many bytes."""
    return entry["bytes"] == -(-2 * entry["tokens"] // 8) * 8 + 8 * entry["documents"]


# Writing --------------------------------------------------------------------------------------------------------------


def write_shard(
    source: Source,
    shard: int,
    tokenizer: Tokenizer,
    max_tokens: int | None,
    folder: Path,
    file: str,
    plan: str,
    most: int | None = None,
    progress: Callable[[int], object] = lambda documents: None,
) -> dict[str, Any]:
    """Tokenise one shard of `source` into `folder/file`, and describe it in a JSON file beside it.

    The file appears under its name when it is whole and on the disk, its description after it. Memory is
    bounded: DOCUMENTS documents at a time, and 8 bytes for each document of the shard.

    Args:
        max_tokens: tokens kept of each document, as `tokenizer.encode(texts, max_tokens)` gives; None: all.
        plan: `digest` of the plan that this shard belongs to; `finished_shard` compares it.
        most: stop after so many documents; None: the whole shard.
        progress: called with the number of documents of each part that was written.

    Returns the shard's entry in the manifest. Raises `UserError`.
    """
    path = folder / file
    ends = array("Q")
    longest = total = 0
    checksum = hashlib.sha256()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(path) as temporary, temporary.open("wb") as out:

            def put(content: bytes) -> None:
                checksum.update(content)
                out.write(content)

            for texts in _parts(itertools.islice(source.documents(order=[shard]), most)):
                tokens = tokenizer.encode(texts, max_tokens)
                lengths = [len(ids) for ids in tokens]
                longest = max(longest, *lengths)
                ends.extend(total + end for end in itertools.accumulate(lengths))
                total = ends[-1]
                put(np.fromiter(itertools.chain.from_iterable(tokens), "<u2", sum(lengths)).tobytes())
                progress(len(texts))
            put(bytes(-2 * total % 8))
            put(np.frombuffer(ends, np.uint64).astype("<u8").tobytes())
            size = out.tell()
            out.flush()
            os.fsync(out.fileno())
            os.replace(temporary, path)
        _sync(path.parent)
        entry = {
            "index": shard,
            "file": file,
            "whole": most is None or len(ends) < most,
            "documents": len(ends),
            "tokens": total,
            "longest": longest,
            "skipped": source._empty.get(shard, 0),
            "damaged": source.damaged.get(shard, 0),
            "bytes": size,
            "sha256": checksum.hexdigest(),
        }
        write_json(path.with_suffix(".json"), {"plan": plan, "entry": entry})
    except OSError as error:
        raise _cannot_write(path, error) from error
    return entry


def finished_shard(folder: Path, file: str, plan: str) -> dict[str, Any] | None:
    """The entry of a shard that was written to its end for this plan, or None; its size is checked."""
    path = folder / file
    try:
        found = read_json(path.with_suffix(".json"))
        if misfit(found, {"plan": str, "entry": ENTRY}) is not None:
            return None
        entry = found["entry"]
        whole = found["plan"] == plan and entry["file"] == file and path.stat().st_size == entry["bytes"]
    except (OSError, ValueError):
        return None
    return entry if whole and _adds_up(entry) else None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file that appears whole or not at all. Raises `UserError`."""
    try:
        with _temporary(path) as temporary:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(json.dumps(content, indent=1, sort_keys=True) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be written ({error.strerror or error}): put that right, then {AGAIN}.")


def digest(content: dict[str, Any]) -> str:
    """SHA-256 of a JSON object without its own key "digest"."""
    facts = {key: value for key, value in content.items() if key != "digest"}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def remove_temporary(folder: Path) -> None:
    """Remove what a killed preparation has left half written."""
    for path in folder.rglob(".*.tmp"):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Make a rename last through a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _parts(texts: Iterable[str]) -> Iterator[list[str]]:
    part: list[str] = []
    size = 0
    for text in texts:
        part.append(text)
        size += len(text)
        if len(part) == DOCUMENTS or size >= CHARACTERS:
            yield part
            part, size = [], 0
    if part:
        yield part
