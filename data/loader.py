"""The training loader: which rows an optimizer step sees, and how a run goes on where it stopped.

Step k sees rows [kB, (k+1)B) of one endless sequence of rows, which depends on the source, the seed and the
protocol alone. Ranks divide a step's rows into contiguous shares; their number changes nothing about the
rows. Every rank reads all text, but with rows="truncate" it tokenises its own rows only.
"""

from __future__ import annotations

import itertools
import queue
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .errors import UserError
from .rows import CHUNK, check_rows, stream, tokenised, truncated
from .sources import Document, Source
from .tokenizer import Tokenizer

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Position:
    """Where the next step starts: `offset` tokens into place `document` of the shuffled `epoch`."""

    epoch: int
    document: int
    offset: int = 0


@dataclass(frozen=True)
class Plan:
    """What decides a rank's rows: the sequence of rows, how many a step takes, and the rank's `share` of them."""

    source: Source
    tokenizer: Tokenizer
    length: int
    rows: str
    batch_size: int
    seed: int
    shuffle_buffer: int
    share: tuple[int, int]

    def documents(self, place: Position) -> Iterator[tuple[int, int, Document]]:
        """Endless (epoch, place in the epoch, text) from `place` on."""
        return stream(self.source, self.seed, self.shuffle_buffer, place.epoch, place.document)


@dataclass(frozen=True)
class Step:
    """One produced step: this rank's rows, the epoch of its last row, and the state after it."""

    batch: Batch
    epoch: int
    following: Position
    lengths: dict[int, int]


class TrainingBatches:
    """Endless iterator over optimizer steps; each yields this rank's rows.

    A step is `{"input_ids", "labels"}`, int64 [b, length], where b is the rank's share of `batch_size` (the
    sequences of a step of all ranks together); labels equal input_ids except IGNORE at padding. `epoch` is
    the epoch of the last row yielded, `step` the number of the next step. A step may straddle two epochs; no
    row is dropped.

    Two ways to go on at step k, both bit-identical to a run that was never interrupted: `start_step=k`, which
    finds the place by reading (with rows="pack": tokenising) what lies before; and `load_state_dict`, which
    goes straight there. `prefetch` steps are prepared by a background thread (0: none); its errors are raised
    by the next step. Use it as a context manager or call `close()`. Raises `UserError`.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        length: int = 256,
        rows: str = "truncate",
        batch_size: int = 512,
        seed: int = 42,
        shuffle_buffer: int = 1000,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        prefetch: int = 2,
    ) -> None:
        check_rows(rows, length)
        if not 0 <= rank < world_size:
            raise UserError(
                f"Rank {rank} of {world_size} ranks does not exist: check the launcher's RANK and WORLD_SIZE."
            )
        if batch_size < world_size:
            raise UserError(
                f"A batch of {batch_size} sequences cannot be divided over {world_size} ranks: raise "
                "trainer.batch_size or use fewer ranks."
            )
        if shuffle_buffer < 0 or start_step < 0 or prefetch < 0:
            raise UserError("data.shuffle_buffer, the first step and the prefetch must not be negative.")
        share = (batch_size * rank // world_size, batch_size * (rank + 1) // world_size)
        self.plan = Plan(source, tokenizer, length, rows, batch_size, seed, shuffle_buffer, share)
        self.prefetch = prefetch
        self.step = start_step
        self.epoch = 0
        self._position: Position | None = None if start_step else Position(0, 0)
        self._lengths: dict[int, int] = {}
        self._steps: Iterator[Step] | None = None
        self._stop: weakref.finalize | None = None
        self._error: BaseException | None = None
        self._closed = False

    def __iter__(self) -> TrainingBatches:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise RuntimeError("these TrainingBatches are closed")
        if self._error is not None:
            raise self._error
        if self._steps is None:
            self._start()
            assert self._steps is not None
        try:
            step = next(self._steps)
        except Exception as error:
            self._error = error
            raise
        except BaseException:  # Ctrl-C while waiting: the next call starts again at the same place
            self._halt()
            raise
        self.step += 1
        self.epoch = step.epoch
        self._position = step.following
        self._lengths = step.lengths
        return step.batch

    def _start(self) -> None:
        steps = _steps(self.plan, self._position, self.step)
        if self.prefetch == 0:
            self._steps = steps
            return
        items: queue.Queue[Step | BaseException] = queue.Queue(self.prefetch)
        stop = threading.Event()
        thread = threading.Thread(target=_produce, args=(steps, items, stop), name="data-prefetch", daemon=True)
        # Neither the thread nor the generator refers to this object, so a forgotten loader is collected and
        # stops its thread; at interpreter exit the thread is stopped before Python's machinery is taken down
        # under it.
        self._stop = weakref.finalize(self, _stop, stop, thread)
        self._steps = _consume(items, thread)
        thread.start()

    def close(self) -> None:
        """Stop the background thread. Safe to call twice."""
        self._closed = True
        self._halt()

    def _halt(self) -> None:
        if self._stop is not None:
            self._stop()
        self._stop = self._steps = None

    def __enter__(self) -> TrainingBatches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Where the next step starts, in plain numbers and strings; the same on every rank.

        Steps that were prefetched but not yielded are not counted.
        """
        position = self._position
        return {
            "step": self.step,
            "epoch": self.epoch,
            "position": None if position is None else [position.epoch, position.document, position.offset],
            "shard_lengths": {str(shard): count for shard, count in sorted(self._lengths.items())},
            "contract": self._contract(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. The number of ranks may differ; anything that orders rows may not."""
        theirs, ours = state["contract"], self._contract()
        different = sorted(key for key in ours if theirs.get(key) != ours[key])
        if different:
            changes = ", ".join(f"{key} was {theirs.get(key)!r} and is {ours[key]!r}" for key in different)
            raise UserError(
                f"The saved place in the data does not fit this run: {changes}; restore the old settings or start a new "
                "run."
            )
        self._halt()
        self._error = None
        self.step = int(state["step"])
        self.epoch = int(state["epoch"])
        self._position = None if state["position"] is None else Position(*map(int, state["position"]))
        self._lengths = {int(shard): int(count) for shard, count in state["shard_lengths"].items()}
        self.plan.source.lengths.update(self._lengths)

    def _contract(self) -> dict[str, Any]:
        """Everything that orders rows."""
        plan = self.plan
        return {
            "source": plan.source.identity,
            "tokenizer": plan.tokenizer.fingerprint,
            "length": plan.length,
            "rows": plan.rows,
            "batch_size": plan.batch_size,
            "seed": plan.seed,
            "shuffle_buffer": plan.shuffle_buffer,
        }


def _steps(plan: Plan, place: Position | None, step: int) -> Iterator[Step]:
    """The steps from `place` on, or from the one where `step` starts. A generator: nothing is read before the first."""
    if plan.rows == "truncate":
        # A row is a document, and the stream itself finds a place that lies epochs ahead.
        yield from _truncated_steps(plan, place or Position(0, step * plan.batch_size))
    else:
        yield from _packed_steps(plan, place or _packed_place(plan, step * plan.batch_size * plan.length))


def _truncated_steps(plan: Plan, place: Position) -> Iterator[Step]:
    documents = plan.documents(place)
    first, end = plan.share
    while True:
        own: list[Document] = []
        for i in range(plan.batch_size):
            epoch, document, text = next(documents)
            if first <= i < end:
                own.append(text)
        ids = list(tokenised(plan.source, own, plan.tokenizer, plan.length - 1))
        input_ids, labels = truncated(ids, plan.length, plan.tokenizer)
        batch = {"input_ids": input_ids, "labels": labels}
        yield Step(batch, epoch, Position(epoch, document + 1), dict(plan.source.lengths))


def _packed_steps(plan: Plan, place: Position) -> Iterator[Step]:
    documents = _encoded(plan, place)
    need = plan.batch_size * plan.length
    pieces: deque[tuple[Position, np.ndarray]] = deque()  # tokens not yet used, with the place of the first
    available = 0
    while True:
        while available <= need:  # one token more, so that the place of the next step is known
            pieces.append(next(documents))
            available += len(pieces[-1][1])
        taken: list[np.ndarray] = []
        missing = need
        while missing:
            at, ids = pieces.popleft()
            taken.append(ids[:missing])
            if missing < len(ids):
                pieces.appendleft((Position(at.epoch, at.document, at.offset + missing), ids[missing:]))
            missing -= len(taken[-1])
        available -= need
        rows = np.concatenate(taken).reshape(plan.batch_size, plan.length)[slice(*plan.share)]
        input_ids = torch.from_numpy(rows.copy())
        batch = {"input_ids": input_ids, "labels": input_ids.clone()}
        yield Step(batch, at.epoch, pieces[0][0], dict(plan.source.lengths))


def _encoded(plan: Plan, place: Position) -> Iterator[tuple[Position, np.ndarray]]:
    """Tokens of each document, end-of-text included, from `place` on, without end."""
    documents = plan.documents(place)
    skip = place.offset
    while True:
        chunk = list(itertools.islice(documents, CHUNK))
        tokens = plan.source.tokens([document for _, _, document in chunk], plan.tokenizer)
        for (epoch, document, _), ids in zip(chunk, tokens, strict=True):
            yield (
                Position(epoch, document, skip),
                np.array([*ids, plan.tokenizer.eos_id], dtype=np.int64)[skip:],
            )
            skip = 0


def _packed_place(plan: Plan, tokens: int) -> Position:
    """Where token number `tokens` of the whole sequence lies.

    Every epoch has the same tokens in another order, so that whole epochs are counted, not read.
    """
    epoch = passed = 0
    documents = _encoded(plan, Position(0, 0))
    while True:
        at, ids = next(documents)
        if at.epoch > epoch:  # the first epoch ended before the place
            epoch, tokens = divmod(tokens, passed)
            passed = 0
            documents = _encoded(plan, Position(epoch, 0))
        elif passed + len(ids) > tokens:
            return Position(epoch, at.document, tokens - passed)
        else:
            passed += len(ids)


def _produce(steps: Iterator[Step], items: queue.Queue[Step | BaseException], stop: threading.Event) -> None:
    """Body of the background thread: put steps, or the error that ended them, until told to stop."""
    while not stop.is_set():
        item: Step | BaseException
        try:
            item = next(steps)
        except BaseException as error:
            item = error
        while not stop.is_set():
            try:
                items.put(item, timeout=0.1)
                break
            except queue.Full:
                continue
        if isinstance(item, BaseException):
            return


def _consume(items: queue.Queue[Step | BaseException], thread: threading.Thread) -> Iterator[Step]:
    while True:
        try:
            item = items.get(timeout=1.0)
        except queue.Empty:
            if thread.is_alive() or not items.empty():
                continue
            raise RuntimeError("the data thread ended without a word") from None
        if isinstance(item, BaseException):
            raise item
        yield item


def _stop(stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    thread.join(timeout=10.0)
