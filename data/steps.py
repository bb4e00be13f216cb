"""Which rows a step has: one rank's endless sequence of steps, from any place on."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from .errors import UserError
from .rows import CHUNK, document_positions, ended, stream, truncated_ids, with_labels
from .sources import Document, Source
from .tokenizer import Tokenizer

if TYPE_CHECKING:  # see rows.py
    import torch

Batch: TypeAlias = "dict[str, torch.Tensor]"


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
    attention: str
    batch_size: int
    seed: int
    shuffle_buffer: int
    share: tuple[int, int]


@dataclass(frozen=True)
class Counts:
    """What a source has counted so far, by shard, as `Source.lengths` and `Source.damaged`."""

    lengths: dict[int, int]
    damaged: dict[int, int]

    def add_to(self, source: Source) -> None:
        """Tell a source that did not read by itself."""
        source.lengths.update(self.lengths)
        source.damaged.update(self.damaged)


# Documents that were read at one go, each with its epoch and its place there; and what was counted by then.
Reading = tuple[list[tuple[int, int, Document]], Counts]


@dataclass(frozen=True)
class Step:
    """This rank's rows of one step, without what follows from them: small enough for a pipe between processes.

    `ids` are integers of any width, [b, length]; `sizes` [b] the tokens of each row before its padding, None where
    there is none. `epoch` is that of the step's last row; `following` and `counts.lengths` are the state after it.
    """

    ids: np.ndarray
    sizes: np.ndarray | None
    epoch: int
    following: Position
    counts: Counts


Reader = Callable[[Iterator[Reading]], Iterator[Reading]]


def steps(
    plan: Plan, place: Position | None, step: int, chunk: int = CHUNK, reader: Reader = lambda readings: readings
) -> Iterator[Step]:
    """The steps from `place` on, or from the one where `step` starts. A generator: nothing is read before the first.

    Neither `chunk`, the documents tokenised in one call with rows="pack", nor `reader`, which may run the reading
    in another thread, changes a row.
    """
    if plan.rows == "truncate":
        # A row is a document, and the stream itself finds a place that lies epochs ahead.
        place = place or Position(0, step * plan.batch_size)
        yield from _truncated_steps(plan, reader(_readings(plan, place, plan.batch_size)))
    else:
        place = place or _packed_place(plan, step * plan.batch_size * plan.length)
        yield from _packed_steps(plan, _encoded(plan, reader(_readings(plan, place, chunk)), place.offset))


def batch(plan: Plan, step: Step) -> Batch:
    """The tensors of a step: int64 [b, length] each."""
    input_ids, labels = with_labels(step.ids, step.sizes)
    if plan.attention == "row":
        return {"input_ids": input_ids, "labels": labels}
    labels, position_ids = document_positions(input_ids, labels, plan.tokenizer)
    return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}


def _readings(plan: Plan, place: Position, count: int) -> Iterator[Reading]:
    """The documents from `place` on, without end, `count` at a time."""
    documents = stream(plan.source, plan.seed, plan.shuffle_buffer, place.epoch, place.document)
    while True:
        some = list(itertools.islice(documents, count))
        yield some, Counts(dict(plan.source.lengths), dict(plan.source.damaged))


def _truncated_steps(plan: Plan, readings: Iterator[Reading]) -> Iterator[Step]:
    for documents, counts in readings:
        own = [document for _, _, document in documents[slice(*plan.share)]]
        tokens = plan.source.tokens(own, plan.tokenizer, plan.length - 1)
        ids, sizes = truncated_ids(tokens, plan.length, plan.tokenizer)
        epoch, last, _ = documents[-1]
        yield Step(ids, sizes, epoch, Position(epoch, last + 1), counts)


def _packed_steps(plan: Plan, encoded: Iterator[Encoded]) -> Iterator[Step]:
    need = plan.batch_size * plan.length
    pieces: deque[tuple[Position, np.ndarray]] = deque()  # tokens not yet used, with the place of the first
    available = 0
    while True:
        while available <= need:  # one token more, so that the place of the next step is known
            at, ids, counts = next(encoded)
            pieces.append((at, ids))
            available += len(ids)
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
        yield Step(rows, None, at.epoch, pieces[0][0], counts)


Encoded = tuple[Position, np.ndarray, Counts]


def _encoded(plan: Plan, readings: Iterator[Reading], skip: int = 0) -> Iterator[Encoded]:
    """Place and tokens of each document, end-of-text included, but for the first `skip` tokens; and what was counted."""
    for documents, counts in readings:
        tokens = plan.source.tokens([document for _, _, document in documents], plan.tokenizer)
        for (epoch, document, _), ids in zip(documents, tokens, strict=True):
            if skip > len(ids):
                raise UserError(
                    f"The saved place in the data is damaged (token {skip} of a document that has {len(ids) + 1}): resume "
                    "from an earlier checkpoint or start a new run."
                )
            yield Position(epoch, document, skip), ended(ids, plan.tokenizer)[skip:], counts
            skip = 0


def _packed_place(plan: Plan, tokens: int) -> Position:
    """Where token number `tokens` of the whole sequence lies.

    Every epoch has the same tokens in another order, so that whole epochs are counted, not read.
    """
    epoch = passed = 0
    documents = _encoded(plan, _readings(plan, Position(0, 0), CHUNK))
    while True:
        at, ids, _ = next(documents)
        if at.epoch > epoch:  # the first epoch ended before the place
            epoch, tokens = divmod(tokens, passed)
            passed = 0
            documents = _encoded(plan, _readings(plan, Position(epoch, 0), CHUNK))
        elif passed + len(ids) > tokens:
            return Position(epoch, at.document, tokens - passed)
        else:
            passed += len(ids)
