"""Fetch the part of C4 that a run reads, on a machine with a connection: python scripts/fetch_c4.py --to DIR --steps 10000

The shuffled order of the training files depends on the seed alone, so that the first N steps are known to need the
first few files of that order; with them come all validation files. DIR then serves `data=c4_local data.path=DIR`
without a connection, and a run on it reads the rows that a run on all of C4 reads. Safe to stop at any time: the same
command goes on where it was, also with more steps. Every file is checked against the Hub's SHA-256, once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fnmatch
import hashlib
import math
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import yaml  # noqa: E402
from tqdm import tqdm  # noqa: E402

from data import UserError  # noqa: E402
from data.hub import HubFile, Repository, open_repository  # noqa: E402
from data.mirror import MANIFEST, read_manifest, write_manifest  # noqa: E402
from data.sources import shard_order  # noqa: E402
from pretraining.lock import RunLock  # noqa: E402

CONFIG = ROOT / "configs" / "data" / "c4.yaml"
# Lower bounds. C4 en has 364,868,892 documents in 1,024 files, about 356,317 each; 2,000 of them have 491 T5 tokens on
# average.
DOCUMENTS = 350_000  # of a file
TOKENS = 400  # of a document, on average over a file
AHEAD = 64  # steps that a loader may have prepared beyond the last one


def files_needed(
    steps: int, batch_size: int, rows: str = "truncate", length: int = 256, shuffle_buffer: int = 1000
) -> int:
    """Files that the first `steps` steps read at most, if each has `DOCUMENTS` documents of `TOKENS` tokens."""
    sequences = (steps + AHEAD) * batch_size
    documents = sequences if rows == "truncate" else math.ceil(sequences * length / TOKENS)
    return math.ceil((documents + shuffle_buffer) / DOCUMENTS)


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder of the files")
    parser.add_argument("--steps", type=_positive, required=True, help="optimizer steps of the run (trainer.steps)")
    parser.add_argument("--batch-size", type=_positive, default=512, help="sequences of a step (trainer.batch_size)")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--rows", choices=("truncate", "pack"), default="truncate", help="as data.rows")
    parser.add_argument("--length", type=_positive, default=256, help="tokens of a row (data.length)")
    parser.add_argument("--shuffle-buffer", type=int, default=1000, help="documents (data.shuffle_buffer)")
    parser.add_argument("--revision", help="commit of the data set (default: that of configs/data/c4.yaml)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be fetched, and stop")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    asked = arguments(words)
    try:
        fetch(asked, yaml.safe_load(CONFIG.read_text(encoding="utf-8")))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def fetch(asked: argparse.Namespace, cfg: dict[str, Any]) -> None:
    """Fetch the files, or say what would be fetched. Raises `UserError`."""
    repository = open_repository(
        cfg["name"], asked.revision or cfg["revision"], int(cfg["retries"]), float(cfg["timeout"])
    )
    folder: Path = asked.to.expanduser()
    verified = verified_files(folder, repository)
    wanted = wanted_files(repository, cfg, asked)
    missing = [file for file in wanted if not _is_verified(folder, file, verified)]
    to_fetch = sum(file.size - _size(folder, file) for file in missing)
    free = shutil.disk_usage(
        next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    ).free
    print(
        f"{asked.steps} steps of {asked.batch_size} sequences need {len(wanted)} files, {_gb(sum(f.size for f in wanted))}; "
        f"{len(wanted) - len(missing)} are there.\nTo fetch: {_gb(to_fetch)}, free: {_gb(free)} in {folder}"
    )
    if to_fetch > free:
        raise UserError(
            f"{folder} has too little space: make room for {_gb(to_fetch - free)} more, or take fewer --steps."
        )
    if missing and not asked.dry_run:
        with _alone_in(folder), tqdm(total=to_fetch, unit="B", unit_scale=True) as bar:
            verified = verified_files(folder, repository)  # another call may have ended meanwhile
            for number, file in enumerate(missing, 1):
                bar.set_description(f"file {number} of {len(missing)}")
                digest = _fetch(repository, file, folder, bar)
                verified[file.path] = {"size": file.size, "sha256": digest}
                _write(folder, repository, verified)
    print(f"To train on it: {train_command(asked, folder)}")


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other calls out. Raises `UserError`."""
    lock = RunLock(folder / "fetch")
    try:
        lock.__enter__()
    except UserError as error:
        if isinstance(error.__cause__, OSError):
            why = error.__cause__.strerror or error.__cause__
            raise UserError(f"{folder} cannot be written ({why}): choose another folder for --to.") from error
        raise UserError(
            f"Another call is fetching into {folder}: let it end, or choose another folder for --to."
        ) from error
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


def verified_files(folder: Path, repository: Repository) -> dict[str, dict[str, Any]]:
    """The manifest's files. Raises `UserError` where the folder holds another revision."""
    manifest = read_manifest(folder)
    if manifest is None:
        return {}
    if (manifest["repository"], manifest["revision"]) != (repository.name, repository.revision):
        raise UserError(
            f"{folder / MANIFEST} is of {manifest['repository']} at {manifest['revision']}, not {repository.name} at "
            f"{repository.revision}: choose another folder for --to, or give --revision."
        )
    return manifest["files"]


def wanted_files(repository: Repository, cfg: dict[str, Any], asked: argparse.Namespace) -> list[HubFile]:
    """The validation files, and the training files that the steps read, in the order in which they do."""
    train, validation = (
        [
            file
            for file in repository.list_files(cfg[key].rpartition("/")[0])
            if fnmatch.fnmatchcase(file.path, cfg[key])
        ]
        for key in ("train_files", "validation_files")
    )
    if not train or not validation:
        raise UserError(
            f"{repository.name} has no files {cfg['train_files']} and {cfg['validation_files']} at "
            f"{repository.revision}: correct --revision."
        )
    order = shard_order(len(train), asked.seed, 0) if asked.shuffle_buffer else range(len(train))
    count = files_needed(asked.steps, asked.batch_size, asked.rows, asked.length, asked.shuffle_buffer)
    return [*validation, *(train[i] for i in order[:count])]


def train_command(asked: argparse.Namespace, folder: Path) -> str:
    """The command that trains on the folder with the settings asked for."""
    settings = (
        "data=c4_local", f"data.path={folder.absolute()}", f"trainer.steps={asked.steps}",
        f"trainer.batch_size={asked.batch_size}", f"seed={asked.seed}", f"data.rows={asked.rows}",
        f"data.length={asked.length}", f"data.shuffle_buffer={asked.shuffle_buffer}",
    )  # fmt: skip
    return shlex.join(["python", "train.py", *settings])


def _fetch(repository: Repository, file: HubFile, folder: Path, bar: Any) -> str:
    """Fetch one file, or what is missing of it. Returns its SHA-256. Raises `UserError`."""
    target = folder / file.path
    part = target.with_name(target.name + ".part")
    try:
        if target.is_file() and target.stat().st_size == file.size:  # it came here in another way
            digest = _digest(target)
            if file.sha256 not in (None, digest.hexdigest()):
                raise UserError(f"{target} does not have the Hub's SHA-256: remove it and run the same command again.")
            return digest.hexdigest()
        target.parent.mkdir(parents=True, exist_ok=True)
        if part.exists() and part.stat().st_size > file.size:
            part.unlink()
        with open(part, "ab") as output:
            digest = _digest(part)
            for chunk in repository.read(dataclasses.replace(file, sha256=None), output.tell()):
                output.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
            output.flush()
            os.fsync(output.fileno())
        if file.sha256 not in (None, digest.hexdigest()):
            part.unlink()
            raise UserError(f"{target} was damaged on its way here and was removed: run the same command again.")
        part.replace(target)
    except OSError as error:
        raise UserError(
            f"{target} cannot be written ({error.strerror or error}): put it right and run again."
        ) from error
    return digest.hexdigest()


def _digest(path: Path) -> hashlib._Hash:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256")


def _write(folder: Path, repository: Repository, verified: dict[str, dict[str, Any]]) -> None:
    try:
        write_manifest(folder, repository.name, repository.revision, verified)
    except OSError as error:
        raise UserError(
            f"{folder / MANIFEST} cannot be written ({error.strerror or error}): put it right and run again; what was "
            "fetched stays."
        ) from error


def _is_verified(folder: Path, file: HubFile, verified: dict[str, dict[str, Any]]) -> bool:
    path = folder / file.path
    return file.path in verified and path.is_file() and path.stat().st_size == file.size


def _size(folder: Path, file: HubFile) -> int:
    """Bytes of a file that are there already."""
    target = folder / file.path
    sizes = (path.stat().st_size for path in (target.with_name(target.name + ".part"), target) if path.is_file())
    return min(next(sizes, 0), file.size)


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return number


if __name__ == "__main__":
    raise SystemExit(main())
