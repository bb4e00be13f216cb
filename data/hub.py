"""Documents from the Hugging Face Hub, read as they are needed.

Data sets of JSON lines or text files (`HubFileSource`, such as C4) are read file by file with requests for ranges of
bytes; any other (`HubSource`) with the `datasets` library. A request that fails or stalls is tried again, at the
byte or the document where it was, with growing pauses; each time is one line on standard error.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path, PurePosixPath
from random import SystemRandom
from typing import Any
from urllib.parse import quote

from .errors import UserError
from .lines import Damage, encodable, file_chunks
from .sources import JSON_ENDINGS, TEXT_ENDINGS, LineSource, Source, held_out

BLOCK = 1 << 23  # bytes of a request: a connection is never kept waiting for training
LONGEST_PAUSE = 60.0  # seconds, where the Hub does not ask for more
LONGEST_WISH = 900.0  # seconds that the Hub may ask for
FIRST_CONTACT = 2  # retries of a connection that has never worked
COMMIT = re.compile(r"[0-9a-f]{40}")
NETWORK = {"httpx", "httpx2", "httpcore", "httpcore2", "aiohttp", "requests", "urllib3", "http"}  # packages
TRANSIENT = {408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 525}  # HTTP status codes
OFFLINE = (
    "offline use data=c4_local data.path=DIR with a mirror of the files (scripts/fetch_c4.py), data=text data.path=FILE, "
    "or data=sample"
)
RESUME = "start again to resume from the last checkpoint"

pause = time.sleep


class Retries:
    """Counts failures in a row of one thing, and pauses after each."""

    def __init__(self, what: str, limit: int) -> None:
        self.what = what
        self.limit = limit
        self.count = 0

    def failed(self, error: Exception, first_contact: bool = False) -> None:
        """Pause, or raise `UserError` where trying again is no use or was tried often enough."""
        limit = self.limit
        if first_contact and _status(error) is None:
            limit = min(limit, FIRST_CONTACT)
        self.count += 1
        if not _transient(error):
            raise UserError(
                f"{self.what} failed: {_short(error)}; check data.name, data.revision and the access to it, or {OFFLINE}."
            ) from error
        if self.count > limit:
            raise UserError(
                f"{self.what} failed {self.count} times in a row, the last time with {_short(error)}: check the "
                f"connection, raise data.retries or data.timeout, and {RESUME}; for a new run, {OFFLINE}."
            ) from error
        seconds = min(LONGEST_PAUSE, 2.0 ** (self.count - 1)) * SystemRandom().uniform(0.75, 1.25)
        asked = _asked_pause(error)
        if asked is not None:  # all ranks are told the same, and should not come back together
            seconds = max(seconds, min(asked, LONGEST_WISH) * SystemRandom().uniform(1.0, 1.25))
        print(
            f"data: {self.what} failed ({_short(error)}); retry {self.count} of {limit} in {seconds:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        pause(seconds)

    def worked(self) -> None:
        self.count = 0


def _status(error: Exception) -> int | None:
    """The HTTP status of an answer that was an error."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _transient(error: Any) -> bool:
    """Whether the same request may work later."""
    status = _status(error)
    if status is not None:  # an address that the Hub sent us on to refuses where it has expired
        return status in TRANSIENT or (status == 403 and bool(getattr(error.response, "history", None)))
    if isinstance(error, (FileNotFoundError, PermissionError)):
        return False
    packages = {base.__module__.split(".")[0] for base in type(error).__mro__}
    return isinstance(error, OSError) or not packages.isdisjoint(NETWORK)


def _asked_pause(error: Exception) -> float | None:
    """Seconds to wait that an answer asks for (Retry-After, or the Hub's own header)."""
    from huggingface_hub.utils import parse_ratelimit_headers

    headers = getattr(getattr(error, "response", None), "headers", {})
    limit = parse_ratelimit_headers(headers)
    wish = headers.get("retry-after")
    with contextlib.suppress(ValueError):
        if wish is not None and wish.strip().isdigit():
            return float(wish)
        if wish is not None:
            return max(0.0, parsedate_to_datetime(wish).timestamp() - time.time())
    return float(limit.reset_in_seconds) if limit is not None and limit.remaining == 0 else None


def _short(error: BaseException) -> str:
    """Kind and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


# Requests -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HubFile:
    """A file of a data set: path, bytes, and the SHA-256 that the Hub keeps of large files."""

    path: str
    size: int
    sha256: str | None


@dataclass(frozen=True)
class Repository:
    """One commit of a data set on the Hub (or on the server that HF_ENDPOINT names)."""

    name: str
    revision: str  # a commit
    retries: int
    timeout: float  # seconds without an answer
    endpoint: str | None  # None: the library's own

    def list_files(self, folder: str) -> tuple[HubFile, ...]:
        """The files of a folder (not those below it), by name. Raises `UserError`."""
        files = _cached_listing(self, folder) if offline() else _listing(self, folder)
        return tuple(sorted(files, key=lambda file: file.path))

    def cached(self, file: HubFile) -> Path | None:
        """Where the library's cache keeps the file, if it does."""
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(self.name, file.path, revision=self.revision, repo_type="dataset")
        return Path(path) if isinstance(path, str) else None

    def read(self, file: HubFile, start: int = 0) -> Iterator[bytes]:
        """The bytes of a file from `start` on. Raises `UserError`.

        A file read from its beginning is compared with the Hub's SHA-256 when it ends.
        """
        from huggingface_hub import hf_hub_url

        home = hf_hub_url(self.name, file.path, repo_type="dataset", revision=self.revision, endpoint=self.endpoint)
        url = home
        retries = Retries(f"reading {self.name}/{file.path}", self.retries)
        digest = hashlib.sha256() if start == 0 and file.sha256 else None
        while start < file.size:
            block = bytearray()
            end = min(start + BLOCK, file.size)
            while start + len(block) < end:
                try:
                    url = self._read_range(url, url == home, file, start + len(block), end, block)
                except UserError:
                    raise
                except Exception as error:  # the HTTP client lets many kinds through
                    if url == home or _transient(error):
                        retries.failed(error)
                    url = home  # the address that it led to may have expired
            retries.worked()
            if digest is not None:
                digest.update(block)
            start = end
            yield bytes(block)
        if digest is not None and digest.hexdigest() != file.sha256:
            raise UserError(
                f"{self.name}/{file.path} was damaged on its way here (its SHA-256 is not the Hub's): {RESUME}, or {OFFLINE}."
            )

    def _read_range(self, url: str, own: bool, file: HubFile, start: int, end: int, block: bytearray) -> str:
        """Append bytes `start` to `end` of `url` to `block`; whatever was read before an error is there too.

        Returns the address that the Hub sent us on to, which holds for a while and costs it nothing. Only
        its `own` address gets our token.
        """
        from huggingface_hub import get_session
        from huggingface_hub.utils import hf_raise_for_status

        headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        if own:
            headers |= _headers()
        with get_session().stream("GET", url, headers=headers, timeout=self.timeout, follow_redirects=True) as response:
            if response.status_code >= 400:
                response.read()
            hf_raise_for_status(response)
            given = response.headers.get("content-range", f"bytes 0-/{response.headers.get('content-length')}")
            if not given.startswith(f"bytes {start}-") or not given.endswith((f"/{file.size}", "/*")):
                raise UserError(
                    f"{response.url.host} answers with {given} where bytes {start} to {end - 1} of {file.size} of "
                    f"{self.name}/{file.path} were asked for: use another HF_ENDPOINT, or {OFFLINE}."
                )
            for piece in response.iter_raw():
                block += piece[: end - start]
                start += len(piece)
                if start >= end:
                    return str(response.url)
        raise ConnectionError(f"the connection ended {end - start} bytes too early")


def offline() -> bool:
    """Whether requests are forbidden by HF_HUB_OFFLINE."""
    import huggingface_hub

    return (
        os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE") or huggingface_hub.is_offline_mode()
    )


def open_repository(name: str, revision: str | None, retries: int, timeout: float) -> Repository:
    """The data set `name` at the commit behind `revision`. Raises `UserError`."""
    endpoint = os.environ.get("HF_ENDPOINT") or None
    return Repository(name, find_commit(name, revision, retries, timeout), retries, timeout, endpoint)


def find_commit(name: str, revision: str | None, retries: int, timeout: float) -> str:
    """The commit behind a branch or tag (None: the main branch), with one request; a commit is known to be one."""
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    if offline():
        raise UserError(
            f"HF_HUB_OFFLINE is set, and data.revision={revision} of {name} is not a commit: give the 40 digits of one, or "
            f"{OFFLINE}."
        )
    from huggingface_hub import HfApi

    attempts = Retries(f"looking up {name}", retries)
    while True:
        try:
            sha = (
                HfApi(os.environ.get("HF_ENDPOINT") or None).dataset_info(name, revision=revision, timeout=timeout).sha
            )
        except Exception as error:
            attempts.failed(error, first_contact=True)
        else:
            assert sha is not None
            return sha


@functools.lru_cache(maxsize=8)  # both splits of a data set are in one listing
def _listing(repository: Repository, folder: str) -> tuple[HubFile, ...]:
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import hf_raise_for_status

    # HfApi.list_repo_tree asks the same, but waits for ever.
    url: str | None = (
        f"{repository.endpoint or constants.ENDPOINT}/api/datasets/{repository.name}/tree/{repository.revision}"
    )
    url = f"{url}/{quote(folder, safe='')}" if folder else url
    attempts = Retries(f"listing {repository.name}/{folder}", repository.retries)
    files: list[HubFile] = []
    while url is not None:
        try:
            response = get_session().get(url, headers=_headers(), timeout=repository.timeout)
            hf_raise_for_status(response)
            page = [
                HubFile(entry["path"], int(entry["size"]), entry["lfs"]["oid"] if entry.get("lfs") else None)
                for entry in response.json()
                if entry["type"] == "file"
            ]
        except Exception as error:
            attempts.failed(error, first_contact=not files)
            continue
        attempts.worked()
        files += page
        url = response.links.get("next", {}).get("url")
    return tuple(files)


def _cached_listing(repository: Repository, folder: str) -> tuple[HubFile, ...]:
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        tree = get_cached_repo_tree(repository.name, repo_type="dataset", revision=repository.revision)
    except CachedRepoTreeNotFoundError as error:
        raise UserError(
            f"HF_HUB_OFFLINE is set, and the list of files of {repository.name} at {repository.revision} is not in the "
            f"cache: unset it, fill the cache with `hf download --repo-type dataset {repository.name} --revision "
            f"{repository.revision} --include '{folder}/*'`, or {OFFLINE}."
        ) from error
    return tuple(
        HubFile(entry.path, entry.size, None)
        for entry in tree
        if str(PurePosixPath(entry.path).parent) == (folder or ".")
    )


def _headers() -> dict[str, str]:
    from huggingface_hub.utils import build_hf_headers

    return build_hf_headers(library_name="racs-alice")


# Sources --------------------------------------------------------------------------------------------------------------


class HubFileSource(LineSource):
    """Documents of the files of a data set whose path fits `pattern`, such as en/c4-train.*.json.gz, one shard a file.

    One listing of the pattern's folder at one commit, and then nothing but the bytes of the files in turn. A
    file that is in the library's cache is read there. `holdout` as in `LineSource`, for data sets without
    validation files.
    """

    def __init__(
        self,
        name: str,
        split: str,
        pattern: str,
        *,
        revision: str | None = None,
        text_column: str = "text",
        document_characters: int = 2000,
        holdout: int | None = None,
        on_error: str = "stop",
        retries: int = 8,
        timeout: float = 30.0,
    ) -> None:
        super().__init__(split, text_column, document_characters, holdout, on_error)
        self._repository = open_repository(name, revision, retries, timeout)
        folder = pattern.rpartition("/")[0]
        if re.search(r"[*?\[]", folder):
            raise UserError(
                f"{pattern}: data.train_files and data.validation_files may have * only after the last slash."
            )
        self._files = [file for file in self._repository.list_files(folder) if fnmatch.fnmatchcase(file.path, pattern)]
        if not self._files:
            raise UserError(
                f"The data set {name} has no file {pattern} at {self._repository.revision}: correct data.train_files, "
                "data.validation_files or data.revision."
            )
        other = [file.path for file in self._files if not file.path.endswith(JSON_ENDINGS + TEXT_ENDINGS)]
        if other:
            raise UserError(
                f"{name}/{other[0]}: this kind of file is not read; leave data.train_files and data.validation_files null."
            )
        self.shards = len(self._files)
        listing = [(file.path, file.size) for file in self._files]
        self.description = {
            "name": name,
            "split": split,
            "revision": self._repository.revision,
            "files": self.shards,
            "first_file": listing[0][0],
            "last_file": listing[-1][0],
            "bytes": sum(size for _, size in listing),
            "listing_sha256": hashlib.sha256(json.dumps(listing).encode()).hexdigest(),
            "holdout": holdout,
        }
        if text_column != "text":
            self.description["text_column"] = text_column
        if on_error != "stop":
            self.description["on_error"] = on_error

    def place(self, shard: int) -> str:
        return f"{self.description['name']}/{self._files[shard].path}"

    def chunks(self, shard: int) -> Iterator[bytes]:
        file = self._files[shard]
        path = self._repository.cached(file)
        if path is not None:
            return file_chunks(path, file.size)
        if offline():
            raise UserError(
                f"HF_HUB_OFFLINE is set, and {self.place(shard)} is not in the cache: unset it, or {OFFLINE}."
            )
        return self._repository.read(file)


class HubSource(Source):
    """Documents streamed with `datasets` from a data set on the Hub, one shard a file of the data set.

    The commit is looked up once, so that a missing connection is an error within seconds (`datasets` alone would
    try for minutes) and the run record names an exact revision. `holdout` as in `LineSource`.
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
        on_error: str = "stop",
        retries: int = 8,
        timeout: float = 30.0,
    ) -> None:
        super().__init__(on_error)
        if offline():
            raise UserError(f"HF_HUB_OFFLINE is set, and {name} is streamed from the Hub: unset it, or {OFFLINE}.")
        revision = find_commit(name, revision, retries, timeout)
        import datasets

        attempts = Retries(f"opening {name} (config {config}, split {hub_split})", retries)
        while True:
            try:
                self._data = datasets.load_dataset(name, config, split=hub_split, streaming=True, revision=revision)
                self.shards = self._data.num_shards
                break
            except Exception as error:  # the library lets many kinds through, down to those of its HTTP client
                attempts.failed(error, first_contact=True)
        self._retries = retries
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
        if text_column != "text":
            self.description["text_column"] = text_column
        if on_error != "stop":
            self.description["on_error"] = on_error

    def read(self, shard: int) -> Iterator[str]:
        place = f"{self.description['name']}, shard {shard}"
        left_out = 0
        for number, record in enumerate(self._records(shard, place), 1):
            if isinstance(record, Damage):
                left_out += 1
                self._leave_out(shard, left_out, f"{place}, after document {number - 1}: {record}")
                return
            text = record.get(self._text_column)
            try:
                if not isinstance(text, str):
                    raise Damage(
                        f'no text in the column "{self._text_column}"; it has {", ".join(sorted(record))}: set '
                        "data.text_column."
                    )
                encodable(text)
            except Damage as damage:
                left_out += 1
                self._leave_out(shard, left_out, f"{place}, document {number}: {damage}")
                continue
            if self._holdout is None or held_out(text, self._holdout) == (self._split == "validation"):
                yield text

    def _records(self, shard: int, place: str) -> Iterator[Any]:
        """The records of a shard. After a failure it is opened again, and what was read is read over."""
        attempts = Retries(f"reading {place}", self._retries)
        count = 0
        while True:
            records = enumerate(self._data.shard(num_shards=self.shards, index=shard))
            while True:
                try:
                    number, record = next(records)
                except StopIteration:
                    return
                except Exception as error:
                    if not _transient(error):
                        yield Damage(f"cannot be read ({_short(error)}); correct the file or choose another data set.")
                        return
                    attempts.failed(error)
                    break
                if number == count:
                    count += 1
                    attempts.worked()
                    yield record
