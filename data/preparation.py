"""Tokenises a data set once, shard by shard, into the folder that `prepared.py` reads (`scripts/prepare_data.py`).

Shards are written whole or not at all, by several processes, and those that are there are taken over; so a preparation
that was stopped goes on by being asked for again.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from .errors import UserError
from .lines import read_json
from .prepared import (
    FORMAT,
    KIND,
    MANIFEST,
    PLAN,
    digest,
    finished_shard,
    read_manifest,
    remove_temporary,
    write_json,
    write_shard,
)
from .rows import validation_rows
from .sources import Source, shard_order
from .tokenizer import Tokenizer

AHEAD = 4096  # documents prepared beyond the last that is needed: the loader reads a little ahead
SAMPLE = 200  # documents that the needed space is estimated from
# The part of what a sample lets expect that must be free: what else the files hold, such as addresses, makes it too much.
GUESS = 0.75
BAR: dict[str, Any] = {"unit": " documents", "unit_scale": True, "dynamic_ncols": True}


@dataclass(frozen=True)
class Size:
    """Documents, their tokens, and the longest document's: of a shard, or of several."""

    documents: float = 0
    tokens: float = 0
    longest: float = 0

    def __add__(self, other: Size) -> Size:
        return Size(self.documents + other.documents, self.tokens + other.tokens, max(self.longest, other.longest))

    def times(self, factor: float) -> Size:
        return Size(factor * self.documents, factor * self.tokens, self.longest)

    @property
    def bytes(self) -> float:
        return 2 * self.tokens + 8 * self.documents


@dataclass(frozen=True)
class Request:
    """What the rows are for; `steps` None: any number of any settings."""

    rows: str
    length: int
    seed: int
    shuffle_buffer: int
    steps: int | None
    batch_size: int

    def enough(self, size: Size) -> bool:
        """Whether shards of this size, the first in the shuffled order, surely hold all rows of the steps."""
        if self.steps is None:
            return False
        rows = self.steps * self.batch_size
        waiting = self.shuffle_buffer + AHEAD  # documents read that have not left the buffer
        if self.rows == "truncate":
            return size.documents >= rows + waiting
        return size.tokens + size.documents >= rows * self.length + 1 + waiting * (size.longest + 1)


@dataclass(frozen=True)
class Text:
    """What is prepared.

    Attributes:
        sources: by split, "train" and "validation".
        max_tokens: kept of each document; None: all.
        validation: rows, length and max_tokens of the validation rows, as `validation_rows` takes them; None keeps
            the whole split.
    """

    sources: dict[str, Source]
    tokenizer: Tokenizer
    max_tokens: int | None
    validation: dict[str, Any] | None

    def plan(self) -> dict[str, Any]:
        """What a folder is begun for: the part of the manifest that no later preparation may change."""
        names = ("name", "fingerprint", "vocab_size", "eos_id", "pad_id")
        return {
            "kind": KIND,
            "format": FORMAT,
            "tokenizer": {name: getattr(self.tokenizer, name) for name in names},
            "max_tokens": self.max_tokens,
            "splits": {
                split: {"source": source.description, "identity": source.identity, "shards": source.shards}
                for split, source in self.sources.items()
            },
            "validation": self.validation,
        }


@dataclass(frozen=True)
class Work:
    """All that a worker process needs; ``plan`` is the plan's digest."""

    text: Text
    folder: Path
    plan: str

    def shard(self, split: str, shard: int, most: int | None = None) -> dict[str, Any]:
        """Write a shard of a split, or its first `most` documents; returns its entry in the manifest."""
        told = _progress if most is None else lambda documents: None
        text, file = self.text, _file(split, shard)
        return write_shard(
            text.sources[split], shard, text.tokenizer, text.max_tokens, self.folder, file, self.plan, most, told
        )

    def validation_documents(self) -> list[dict[str, Any]]:
        """The shards of the documents that the validation rows need, the last of them cut."""
        assert self.text.validation is not None
        counted = _Counted(self.text.sources["validation"])
        validation_rows(counted, self.text.tokenizer, **self.text.validation)
        missing, entries = counted.read_documents + AHEAD, []
        for shard in range(counted.shards):
            entries.append(self.shard("validation", shard, missing))
            missing -= entries[-1]["documents"]
            if missing == 0:
                break
        return entries


def _file(split: str, shard: int) -> str:
    return f"{split}/{shard:05d}.tokens"


class _Counted(Source):
    """A source that counts the documents taken from it."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self._source = source
        self.shards, self.description = source.shards, source.description
        self.read_documents = 0

    def documents(self, start: int = 0, order: Sequence[int] | None = None) -> Iterator[Any]:
        for document in self._source.documents(start, order):
            self.read_documents += 1
            yield document


# Worker processes -----------------------------------------------------------------------------------------------------

_work: Work
_progress: Callable[[int], object]


def _begin(work: Work, counter: Any, alive: Connection) -> None:
    """Make this process a worker, which ends with the other end of `alive`, however that was closed."""
    global _work, _progress
    os.environ["RAYON_NUM_THREADS"] = "1"
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()

    def count(documents: int) -> None:
        with counter.get_lock():
            counter.value += documents

    _work, _progress = work, count


def _end_with(alive: Connection) -> NoReturn:
    with contextlib.suppress(OSError):
        alive.poll(None)
    os._exit(1)


def _submit(executor: Executor, function: Callable[..., Any], *args: Any) -> Future[Any]:
    """Submit with Ctrl-C blocked: it stays so in a process that this starts, where only the first process reacts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return executor.submit(function, *args)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _shard(split: str, shard: int) -> tuple[str, list[dict[str, Any]]]:
    return split, [_work.shard(split, shard)]


def _validation() -> tuple[str, list[dict[str, Any]]]:
    return "validation", _work.validation_documents()


class _Here(Executor):
    """Does the work in this process, at once."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except UserError as error:
            future.set_exception(error)
        return future


@contextlib.contextmanager
def workers(work: Work, jobs: int, bar: tqdm[Any]) -> Iterator[tuple[Executor, Callable[[], object]]]:
    """An executor of `jobs` processes (one: this process), and what brings the bar up to date."""
    global _work, _progress
    if jobs == 1:
        _work, _progress = work, bar.update
        yield _Here(), bar.refresh
        return
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q")
    reader, writer = context.Pipe(duplex=False)
    first = bar.n

    def update() -> None:
        bar.update(first + counter.get_obj().value - bar.n)  # without the lock, which a killed worker may hold

    executor = ProcessPoolExecutor(jobs, context, _begin, (work, counter, reader))
    try:
        yield executor, update
    except BrokenProcessPool as error:
        raise UserError(
            "A worker process was killed, which the system does when the memory is full: run the same command again, with "
            "fewer --jobs; it does only what is missing."
        ) from error
    finally:
        writer.close()  # the workers end at once, and leave what they had not finished
        executor.shutdown(wait=True, cancel_futures=True)


# The whole ------------------------------------------------------------------------------------------------------------


def prepare(folder: Path, text: Text, request: Request, jobs: int, last_check: Callable[[], object]) -> dict[str, Any]:
    """Write what is missing of ``request`` into ``folder``, with ``jobs`` processes; returns the manifest.

    Only one process may do so at a time. ``last_check`` is called before the manifest is written, and raises where
    that has not been so.

    Raises:
        UserError: the folder is of something else, a source is damaged, the disk is too small, a worker was killed.
    """
    plan = _settle(folder, text.plan())
    remove_temporary(folder)
    work = Work(text, folder, digest(plan))
    try:
        manifest = _run(work, plan, request, jobs)
    finally:
        remove_temporary(folder)
    last_check()
    write_json(folder / MANIFEST, manifest)
    return manifest


def _settle(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """The plan of the folder: the one that is there if it is the same, otherwise `facts`, written. Raises `UserError`."""
    path = folder / PLAN
    if not path.exists():
        others = [other.name for other in folder.iterdir() if not other.name.startswith(".")]
        if others:
            raise UserError(f"{folder} holds other files ({others[0]}): give an empty or a new folder as --to.")
        write_json(path, facts)
        return facts
    try:
        plan = read_json(path)
        ours, theirs = _essence(facts), _essence(plan)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error}): give a new folder as --to.") from error
    different = [f"{key} was {theirs[key][1]} and is {ours[key][1]}" for key in ours if ours[key][0] != theirs[key][0]]
    if different:
        raise UserError(f"{folder} was begun for something else: {'; '.join(different)}; give a new folder as --to.")
    return plan


def _essence(plan: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What must be the same for two preparations to share a folder, and how to show it."""
    tokenizer = plan["tokenizer"]
    facts = {"the format": plan["format"], "--max-tokens": plan["max_tokens"]}
    facts |= {f"the {split} split": part["identity"] for split, part in plan["splits"].items()}
    facts["what the validation rows need"] = plan["validation"]
    shown = f"{tokenizer['name']} ({tokenizer['fingerprint'][:12]})"
    return {"the tokenizer": (tokenizer["fingerprint"], shown), **{key: (fact, fact) for key, fact in facts.items()}}


def _run(work: Work, plan: dict[str, Any], request: Request, jobs: int) -> dict[str, Any]:
    """Write the shards that are missing; returns the manifest."""
    before = _manifest_before(work)
    listed = {split: before["splits"].get(split, {}).get("files", []) for split in work.text.sources}
    splits = {"train": Shards(work, "train", request, listed["train"])}
    cut: list[dict[str, Any]] = []  # the validation shards, where not the whole split is kept
    if work.text.validation is None:
        splits["validation"] = Shards(work, "validation", replace(request, steps=None, shuffle_buffer=0), [])
    elif all(finished_shard(work.folder, entry["file"], work.plan) == entry for entry in listed["validation"]):
        cut = listed["validation"]
    kept = "all tokens" if work.text.max_tokens is None else f"the first {work.text.max_tokens} tokens"
    print(f"keeping {kept} of each document, in {work.folder}", flush=True)
    sure = _check_space(work, splits)
    began = time.perf_counter()
    failure: UserError | None = None
    running: set[Future[Any]] = set()
    bar: tqdm[Any]
    with (
        tqdm(initial=round(sum(shards.finished.documents for shards in splits.values())), **BAR) as bar,
        workers(work, jobs, bar) as (executor, update),
    ):
        if work.text.validation is not None and not cut:
            running.add(_submit(executor, _validation))
        while True:
            bar.total = round(sum(shards.expected.documents for shards in splits.values())) or None
            update()
            if (cut or work.text.validation is None) and all(shards.ended for shards in splits.values()):
                break
            for split, shards in splits.items():
                while not failure and len(running) < jobs and (shard := shards.next()) is not None:
                    running.add(_submit(executor, _shard, split, shard))
            if failure and not running:  # what was being written is finished first, and may turn out to be enough
                raise UserError(f"{failure} The shards that were finished are kept.") from failure
            assert running
            ended, running = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in ended:
                if isinstance(error := future.exception(), UserError):
                    failure = failure or error
                    continue
                split, entries = future.result()
                if split in splits:
                    splits[split].add(entries[0])
                else:
                    cut = entries
            if not sure and all(shards.done for shards in splits.values()):
                sure = _check_space(work, splits)
    seconds, written = time.perf_counter() - began, sum(shards.written for shards in splits.values())
    if written:
        print(f"wrote {written:,} tokens in {seconds:.1f} s with --jobs {jobs}: {written / seconds:,.0f} tokens/s")
    parts = {split: shards.needed() for split, shards in splits.items()}
    requests = [*before["prepared_for"], asdict(request)]
    manifest = {
        **plan,
        "plan": work.plan,
        "prepared_for": [r for i, r in enumerate(requests) if r not in requests[:i]],
        "splits": {split: _part(plan, split, parts.get(split, cut)) for split in work.text.sources},
    }
    if manifest["splits"]["train"]["documents"] == 0:
        raise UserError(f"{work.text.sources['train'].label} holds no documents with text: check data.path.")
    return manifest | {"digest": digest(manifest)}


def _manifest_before(work: Work) -> dict[str, Any]:
    """The manifest of an earlier preparation that ended here; an empty one if there is none that can be used."""
    with contextlib.suppress(UserError):
        manifest = read_manifest(work.folder)
        if manifest["plan"] == work.plan:
            return manifest
    return {"prepared_for": [], "splits": {}}


def _part(plan: dict[str, Any], split: str, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """A split in the manifest."""
    sums = {key: sum(entry[key] for entry in entries) for key in ("documents", "tokens", "skipped", "damaged", "bytes")}
    return {**plan["splits"][split], **sums, "files": entries}


class Shards:
    """The shards of a split: which are finished, which are needed, which comes next.

    With `request.steps`, how many are needed is predicted from the mean of those that are finished (before the
    first: from a sample), and known when all of them are finished.

    Attributes: `done`, the entries of the finished shards; `finished` and `expected`, the size of those and of all
    that are needed; `ended`; `written`, the tokens written by this run.
    """

    def __init__(self, work: Work, split: str, request: Request, listed: Sequence[dict[str, Any]]) -> None:
        source = work.text.sources[split]
        self.request = request
        numbers = range(source.shards)
        # Steps beyond the first epoch need every shard anyway.
        self.order = list(numbers if request.shuffle_buffer == 0 else shard_order(source.shards, request.seed, 0))
        self.done: dict[int, dict[str, Any]] = {}
        self.finished = Size()
        self.written = 0
        for shard in numbers:
            entry = finished_shard(work.folder, _file(split, shard), work.plan)
            if entry is not None and entry["whole"]:
                self._count(entry)
        self._kept = [entry["index"] for entry in listed]  # in the manifest that is there
        self._waiting = deque(i for i, shard in enumerate(self.order) if shard not in self.done)
        self._lost = [shard for shard in self._kept if shard not in self.done]
        self._sample = None if self.done else _mean_shard(work, split, self.order)
        self._look()

    def next(self) -> int | None:
        """The shard to begin now, if one more is needed."""
        if self._lost:
            return self._lost.pop()
        while self._waiting and self._waiting[0] < self._last:
            shard = self.order[self._waiting.popleft()]
            if shard not in self._kept:
                return shard
        return None

    def add(self, entry: dict[str, Any]) -> None:
        """Shard `entry` is finished."""
        self._count(entry)
        self.written += entry["tokens"]
        self._look()

    def needed(self) -> list[dict[str, Any]]:
        """The entries of the manifest, at the end."""
        return [self.done[shard] for shard in sorted({*self.order[: self._last], *self._kept})]

    def _count(self, entry: dict[str, Any]) -> None:
        self.done[entry["index"]] = entry
        self.finished += _size(entry)

    def _look(self) -> None:
        """How many of the order are needed, and whether they are all finished."""
        left = len(self.order) - len(self.done)
        mean = self._sample
        if self.done:
            mean = self.finished.times(1 / len(self.done))
        self._last, self.expected = len(self.order), self.finished
        self.ended = not left
        if self.request.steps is None:
            self.expected += mean.times(left) if mean else Size()
            return
        self.expected = Size()
        missing = False
        for i, shard in enumerate(self.order):
            size = _size(self.done[shard]) if shard in self.done else mean
            missing = missing or shard not in self.done
            self.expected += size or Size()
            if size is None or self.request.enough(self.expected):
                self._last = i + 1
                break
        self.ended = not missing and not self._lost and all(shard in self.done for shard in self._kept)


def _size(entry: dict[str, Any]) -> Size:
    return Size(entry["documents"], entry["tokens"], entry["longest"])


def _mean_shard(work: Work, split: str, order: Sequence[int]) -> Size | None:
    """The size of a shard as a sample of its documents lets expect; None where the source does not tell its bytes."""
    source = work.text.sources[split]
    facts = source.description
    sizes = getattr(source, "_sizes", {})  # of a mirror that holds part of the files
    if "bytes" in facts:
        sizes = {shard: facts["bytes"] / facts["files"] for shard in range(facts["files"])}
    if not sizes:
        return None
    texts: list[str] = []
    try:
        texts.extend(itertools.islice(source.documents(order=order), SAMPLE))
    except UserError:
        if not texts:  # otherwise the sample reached into a shard that may not be needed
            raise
    tokens = [len(ids) for ids in work.text.tokenizer.encode(texts, work.text.max_tokens)]
    name = str(facts.get("first_file"))
    content = "\n".join(json.dumps({"text": text}) if "json" in name else text for text in texts).encode()
    size = len(zlib.compress(content)) if name.endswith(".gz") else len(content)
    share = 1 / facts["holdout"] if split == "validation" and facts.get("holdout") else 1  # of a file's documents
    documents = sum(sizes.values()) / len(sizes) / size * len(texts) * share
    return Size(documents, documents * sum(tokens) / len(tokens), max(tokens))


def _check_space(work: Work, splits: dict[str, Shards]) -> bool:
    """Say how much space is needed and free; whether that comes from finished shards. Raises `UserError` if it is short."""
    missing = [shards for shards in splits.values() if not shards.ended]
    sure = all(shards.done for shards in missing)
    more = sum(shards.expected.bytes - shards.finished.bytes for shards in missing)
    if not sure and not more:
        print("space: the source does not tell its size; the first shard will")
        return False
    if work.text.validation is not None:
        # Whole documents of twice the counted tokens, and their ends; or all that is there.
        more += min(
            8 * work.text.validation["max_tokens"],
            4 * work.text.sources["validation"].description.get("bytes", math.inf),
        )
    free = shutil.disk_usage(work.folder).free
    about = f"about {gigabytes(more)} needed{'' if sure else ' (from a sample)'}, {gigabytes(free)} free"
    tqdm.write(f"space: {about}")
    if more * (1 if sure else GUESS) > free:
        raise UserError(
            f"The disk of {work.folder} is too small, {about}: free some space, give another --to, or prepare less with "
            "--steps or --max-tokens."
        )
    return sure


def gigabytes(size: float) -> str:
    """'1.25 GB', or in MB below a tenth of one."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.2f} MB"
