"""Where documents come from: files in C4's layout, text files, the Hugging Face Hub, the embedded sample.

A source is a list of shards (files, for local sources), each a sequence of documents in file order. Documents
that are empty or whitespace are skipped and counted; the numbering of documents leaves them out.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

SAMPLE = Path(__file__).resolve().parent / "sample"
SPLITS = ("train", "validation")
TEXT_ENDINGS = (".txt", ".txt.gz")
JSON_ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
MISSING = "???"  # what Hydra leaves where a value must be given
OFFLINE = "offline use data=c4_local data.path=DIR with a mirror of the files, data=text data.path=FILE, or data=sample"


Document = Any  # a text, or where a source has tokenised before (`Source.tokens`), an array of token ids


class Source:
    """Documents of one split, in a stated order. Subclasses define `shards` and `read`.

    `description` is what a run record should keep (plain strings and numbers). `skipped` counts the documents
    without text in the shards read to their end so far.
    """

    shards: int  # number of shards
    description: dict[str, Any]

    def __init__(self) -> None:
        self.lengths: dict[int, int] = {}  # documents of the shards read to their end, by shard number
        self._empty: dict[int, int] = {}

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
            self.lengths[shard], self._empty[shard] = count, empty
        self.check()

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
        """Digest of the description without the path: a moved copy of the same files stays the same source."""
        facts = {key: value for key, value in self.description.items() if key != "path"}
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


class FileSource(Source):
    """Documents of local files, one shard a file.

    Files ending in .json, .jsonl (also .gz) hold one JSON object a line with the text under `text_column`.
    Files ending in .txt (also .gz) are cut into documents at blank lines: a document ends at the first blank
    line after `document_characters` characters, so a smaller file is one document. With `holdout=N`, a
    document whose SHA-256 is 0 modulo N belongs to validation and every other to training; equal texts never
    fall on both sides.
    """

    def __init__(
        self,
        name: str,
        split: str,
        files: Sequence[Path],
        path: Path,
        *,
        text_column: str = "text",
        document_characters: int = 2000,
        holdout: int | None = None,
    ) -> None:
        super().__init__()
        self._files = list(files)
        self._text_column = text_column
        self._document_characters = document_characters
        self._holdout = holdout
        self._split = split
        self.shards = len(self._files)
        listing = [(file.name, file.stat().st_size) for file in self._files]
        self.description = {
            "name": name,
            "split": split,
            "path": str(path),
            "files": len(listing),
            "first_file": listing[0][0],
            "last_file": listing[-1][0],
            "bytes": sum(size for _, size in listing),
            "listing_sha256": hashlib.sha256(json.dumps(listing).encode()).hexdigest(),
            "holdout": holdout,
        }
        if any(file.name.endswith(TEXT_ENDINGS) for file in self._files):
            self.description["document_characters"] = document_characters

    def read(self, shard: int) -> Iterator[str]:
        path = self._files[shard]
        texts = self._read_text(path) if path.name.endswith(TEXT_ENDINGS) else self._read_json(path)
        if self._holdout is None:
            return texts
        return (text for text in texts if _held_out(text, self._holdout) == (self._split == "validation"))

    def _read_json(self, path: Path) -> Iterator[str]:
        number = 0
        for number, line in _lines(path):
            if line.isspace():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: not a JSON object ({error.msg}); each line must be one document like "
                    f'{{"{self._text_column}": "..."}}.'
                ) from error
            text = record.get(self._text_column) if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise UserError(
                    f'{path}, line {number}: no text under the key "{self._text_column}"; correct the file or set '
                    "data.text_column."
                )
            yield text
        if number == 0:
            raise UserError(f"{path} is empty: fetch the file again or remove it.")

    def _read_text(self, path: Path) -> Iterator[str]:
        parts: list[str] = []
        size = 0
        for _, line in _lines(path):
            if size > self._document_characters and line.isspace():
                yield "".join(parts).strip()
                parts, size = [], 0
            else:
                parts.append(line)
                size += len(line)
        yield "".join(parts).strip()


class HubSource(Source):
    """Documents streamed from a data set on the Hugging Face Hub, one shard a file of the data set.

    The commit is looked up once, with one short request, so that a missing connection is an error within
    seconds and the run record names an exact revision. `holdout` as in `FileSource`, for data sets without a
    validation split.
    """

    def __init__(
        self,
        name: str,
        split: str,
        *,
        config: str | None = None,
        revision: str | None = None,
        text_column: str = "text",
        hub_split: str = "train",
        holdout: int | None = None,
        timeout: float = 10.0,
    ) -> None:
        super().__init__()
        revision = _hub_commit(name, revision, timeout)
        import datasets

        try:
            self._data = datasets.load_dataset(name, config, split=hub_split, streaming=True, revision=revision)
            self.shards = self._data.num_shards
        except Exception as error:  # the library lets many kinds through, down to those of its HTTP client
            raise UserError(
                f"The data set {name} (config {config}, split {hub_split}) could not be opened: {_short(error)}; check "
                f"data.name, data.config and the split, or {OFFLINE}."
            ) from error
        self._text_column = text_column
        self._holdout = holdout
        self._split = split
        self.description = {
            "name": name,
            "split": split,
            "config": config,
            "hub_split": hub_split,
            "revision": revision,
            "files": self.shards,
            "holdout": holdout,
        }

    def read(self, shard: int) -> Iterator[str]:
        data = self._data.shard(num_shards=self.shards, index=shard)
        place = f"{self.description['name']}, shard {shard}"
        records = iter(data)
        count = 0
        while True:
            try:
                record = next(records)
            except StopIteration:
                return
            except Exception as error:
                raise UserError(
                    f"{place}: reading failed after {count} documents: {_short(error)}; start again to resume from the "
                    f"last checkpoint, or {OFFLINE}."
                ) from error
            count += 1
            text = record.get(self._text_column)
            if not isinstance(text, str):
                raise UserError(
                    f'{place}, document {count}: no text in the column "{self._text_column}"; it has '
                    f"{', '.join(sorted(record))}: set data.text_column."
                )
            if self._holdout is None or _held_out(text, self._holdout) == (self._split == "validation"):
                yield text


def open_source(cfg: Mapping[str, Any], split: str) -> Source:
    """The source that a data config (`configs/data/*.yaml`) describes, for `split` "train" or "validation".

    `cfg.kind` chooses: `sample` (embedded), `c4_local` (C4's layout below `path`), `text` (files at `path`),
    `hub` (the data set `name`). Raises `UserError`.
    """
    if split not in SPLITS:
        raise UserError(f"There is no split {split!r}: use one of {', '.join(SPLITS)}.")
    kind = cfg.get("kind")
    if kind == "sample":
        return FileSource("sample", split, _c4_files(SAMPLE, split), Path("data/sample"))
    if kind == "c4_local":
        path = _path(cfg, "path")
        return FileSource(
            cfg.get("name") or "c4_local", split, _c4_files(path, split), path,
            text_column=cfg.get("text_column") or "text",
        )  # fmt: skip
    if kind == "text":
        return _open_text(cfg, split)
    if kind == "hub":
        if cfg.get("name") in (None, "", MISSING):
            raise UserError("data.name is missing: give the data set's name on the Hub, as in data.name=allenai/c4.")
        own = cfg.get("validation_split")
        return HubSource(
            cfg["name"],
            split,
            config=cfg.get("config"),
            revision=cfg.get("revision"),
            text_column=cfg.get("text_column") or "text",
            hub_split=(own if split == "validation" and own else cfg.get("train_split") or "train"),
            holdout=None if own else _holdout(cfg),
        )
    raise UserError(f"data.kind is {kind!r}: use one of sample, c4_local, text, hub (see configs/data).")


def _open_text(cfg: Mapping[str, Any], split: str) -> FileSource:
    path = _path(cfg, "path")
    files = _text_files(path)
    holdout: int | None = _holdout(cfg)
    if cfg.get("validation_path"):
        other = _path(cfg, "validation_path")
        held_out = _text_files(other)
        holdout = None
        if split == "validation":
            path, files = other, held_out
        else:
            kept = {file.resolve() for file in held_out}
            files = [file for file in files if file.resolve() not in kept]
            if not files:
                raise UserError("data.validation_path covers all of data.path: nothing is left to train on.")
    return FileSource(
        cfg.get("name") or "text", split, files, path,
        text_column=cfg.get("text_column") or "text",
        document_characters=int(cfg.get("document_characters") or 2000),
        holdout=holdout,
    )  # fmt: skip


def _holdout(cfg: Mapping[str, Any]) -> int:
    holdout = int(cfg.get("holdout") or 50)
    if holdout < 2:
        raise UserError(f"data.holdout is {holdout}: one document in N is held out, so N must be at least 2.")
    return holdout


def _held_out(text: str, holdout: int) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") % holdout == 0


def _path(cfg: Mapping[str, Any], key: str) -> Path:
    if cfg.get(key) in (None, "", MISSING):
        raise UserError(f"data.{key} is missing: give the folder or file to read, as in data.{key}=/some/folder.")
    path = Path(str(cfg[key])).expanduser()
    if not path.exists():
        raise UserError(f"data.{key}={path} does not exist: give the folder or file to read.")
    return path


def _c4_files(path: Path, split: str) -> list[Path]:
    """Files `*-<split>.*.json.gz` of `path/en`, or of `path` itself, by name."""
    for folder in (path / "en", path):
        files = sorted(file for file in folder.glob(f"*-{split}.*.json.gz") if file.is_file())
        prefixes = sorted({file.name.split(f"-{split}.")[0] for file in files})
        if len(prefixes) > 1:
            raise UserError(f"{folder} mixes several data sets ({', '.join(prefixes)}): give each a folder of its own.")
        if files:
            return files
    raise UserError(
        f"No file named c4-{split}.*.json.gz in {path} or {path / 'en'}: data.path must be a folder with the Hub's layout "
        "of allenai/c4."
    )


def _text_files(path: Path) -> list[Path]:
    """The text files at `path`: itself, or those anywhere below it, by relative path."""
    endings = TEXT_ENDINGS + JSON_ENDINGS
    if path.is_file():
        if path.name.endswith(endings):
            return [path]
        raise UserError(f"{path}: this kind of file is not read; use one ending in {', '.join(endings)}.")
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(endings))
    if not files:
        raise UserError(f"{path} holds no file ending in {', '.join(endings)}: give another data.path.")
    return files


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of each line of a plain or gzipped UTF-8 file."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb") as file:
            for line in file:
                number += 1
                yield number, line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {number}: not UTF-8 ({error.reason}); convert the file to UTF-8.") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(
            f"{path}, after line {number}: damaged or cut gzip file ({error}); fetch the file again."
        ) from error
    except OSError as error:
        raise UserError(f"{path}, after line {number}: cannot be read ({error.strerror or error}).") from error


def _short(error: BaseException) -> str:
    """Kind and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _hub_commit(name: str, revision: str | None, timeout: float) -> str | None:
    """The commit behind `revision`, asked for once: `datasets` alone would retry a missing connection for minutes."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise UserError(f"HF_HUB_OFFLINE is set, and {name} is streamed from the Hub: unset it, or {OFFLINE}.")
    import huggingface_hub

    try:
        return huggingface_hub.HfApi().dataset_info(name, revision=revision, timeout=timeout).sha
    except Exception as error:
        raise UserError(
            f"The data set {name} could not be reached on the Hub ({_short(error)}): check data.name, data.revision and "
            f"the connection, or {OFFLINE}."
        ) from error
