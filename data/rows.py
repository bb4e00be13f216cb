"""From documents to rows of T tokens: the shuffled order, truncation, packing, the fixed validation rows.

rows="truncate" is the published recipe: one document a row, exactly what T5's tokenizer gives for
`tokenizer(text, max_length=T, truncation=True, padding="max_length")`: the first T - 1 tokens of the
document, then the end-of-text token (also where the document was cut), then padding. rows="pack": the
documents' tokens, each followed by end-of-text, joined and cut every T tokens; across epochs too, so that no
token is lost.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from .errors import UserError
from .sources import Document, Source
from .tokenizer import Tokenizer

IGNORE = -100  # label of positions that do not count in the loss, as in torch's cross_entropy
ROWS = ("truncate", "pack")
CHUNK = 64  # documents tokenised in one call

Row = tuple[torch.Tensor, torch.Tensor]


def generator(seed: int, epoch: int) -> random.Random:
    """The random numbers of one epoch. Only its `random()` is used: the method whose sequence Python promises."""
    digest = hashlib.sha256(f"rows {seed} {epoch}".encode()).digest()
    return random.Random(int.from_bytes(digest, "big"))


def shuffled(source: Source, seed: int, epoch: int, buffer: int, start: int = 0) -> Iterator[Document]:
    """Documents of one epoch from place `start` of its shuffled order on; nothing where the epoch is shorter.

    Shards are read in a random order through a buffer of `buffer` documents, of which a random one leaves
    next. Places before `start` are replayed on document numbers alone; the text is then read from the first
    number that the buffer still holds. buffer=0 keeps the order of the files.
    """
    if buffer == 0:
        yield from source.documents(start)
        return
    rng = generator(seed, epoch)
    order = list(range(source.shards))
    for i in range(len(order) - 1, 0, -1):
        j = int(rng.random() * (i + 1))
        order[i], order[j] = order[j], order[i]
    state = rng.getstate()
    while True:
        total = source.total  # None: the end is not known, suppose that the stream goes on
        rng.setstate(state)
        end = buffer if total is None else min(buffer, total)
        held = list(range(end))
        for _ in range(start if total is None else min(start, total)):
            slot = int(rng.random() * len(held))
            if total is None or end < total:
                held[slot] = end
                end += 1
            else:
                held[slot] = held[-1]
                held.pop()
        if not held:
            return
        first = min(held)
        texts = source.documents(first, order)
        wanted = set(held)
        found = {number: text for number, text in zip(range(first, end), texts, strict=False) if number in wanted}
        if len(found) == len(wanted):
            break
        if source.total == total:
            raise UserError(f"{source.label} changed while it was read: start again.")
        if start == 0:  # the whole epoch is smaller than the buffer
            held = sorted(found)
            break
    slots = [found[number] for number in held]
    del found
    while slots:
        slot = int(rng.random() * len(slots))
        text = slots[slot]
        following = next(texts, None)
        if following is not None:
            slots[slot] = following
        else:
            slots[slot] = slots[-1]
            slots.pop()
        yield text


def stream(source: Source, seed: int, buffer: int, epoch: int, document: int) -> Iterator[tuple[int, int, Document]]:
    """Endless (epoch, place in the epoch, text) from the given place on; a place beyond the epoch's end carries on."""
    while True:
        for i, text in enumerate(shuffled(source, seed, epoch, buffer, document)):
            yield epoch, document + i, text
        source.check()
        total = source.total
        assert total  # an epoch that ended was read to its end
        epoch, document = (epoch + document // total, document % total) if document >= total else (epoch + 1, 0)


def truncated(tokens: Sequence[Sequence[int]], length: int, tokenizer: Tokenizer) -> Row:
    """Rows of one document each; see the module's docstring.

    Returns input_ids and labels, int64 [len(tokens), length]; labels are IGNORE at padding.
    """
    input_ids = np.full((len(tokens), length), tokenizer.pad_id, dtype=np.int64)
    labels = np.full((len(tokens), length), IGNORE, dtype=np.int64)
    for i, ids in enumerate(tokens):
        row = [*ids[: length - 1], tokenizer.eos_id]
        input_ids[i, : len(row)] = row
        labels[i, : len(row)] = row
    return torch.from_numpy(input_ids), torch.from_numpy(labels)


def tokenised(
    source: Source, documents: Iterable[Document], tokenizer: Tokenizer, limit: int | None = None
) -> Iterator[Sequence[int]]:
    """Token ids of each document of `source` (the first `limit`), CHUNK documents at a time."""
    chunk: list[Document] = []
    for document in documents:
        chunk.append(document)
        if len(chunk) == CHUNK:
            yield from source.tokens(chunk, tokenizer, limit)
            chunk = []
    yield from source.tokens(chunk, tokenizer, limit)


def check_rows(rows: str, length: int) -> None:
    """Raise `UserError` unless the protocol is known and the length can hold a prediction."""
    if rows not in ROWS:
        raise UserError(f"data.rows is {rows!r}: use one of {', '.join(ROWS)}.")
    if length < 2:
        raise UserError(f"data.length is {length}: a row needs at least 2 tokens.")


def validation_rows(source: Source, tokenizer: Tokenizer, length: int, rows: str, max_tokens: int | None = None) -> Row:
    """The fixed validation rows, in file order, without a shuffle.

    Reading stops at the first row with which the tokens that are not padding reach `max_tokens`. With
    rows="pack" the last row is filled with padding. Returns input_ids and labels, int64 [N, length]. Raises
    `UserError`.
    """
    check_rows(rows, length)
    count = 0
    ids: list[Sequence[int]] = []
    tail: list[int] = []
    documents = tokenised(source, source.documents(), tokenizer, length - 1 if rows == "truncate" else None)
    while max_tokens is None or count < max_tokens:
        following = next(documents, None)
        if rows == "truncate":
            if following is not None:
                ids.append(following)
                count += min(len(following) + 1, length)
        else:
            tail += [] if following is None else [*following, tokenizer.eos_id]
            while len(tail) >= length or (tail and following is None):
                ids.append(tail[:length])
                tail = tail[length:]
                count += len(ids[-1])
                if max_tokens is not None and count >= max_tokens:
                    break
        if following is None:
            break
    if rows == "truncate":
        return truncated(ids, length, tokenizer)
    input_ids = torch.full((len(ids), length), tokenizer.pad_id)
    labels = torch.full((len(ids), length), IGNORE)
    for i, row in enumerate(ids):
        input_ids[i, : len(row)] = labels[i, : len(row)] = torch.tensor(row)
    return input_ids, labels
