"""From documents to rows of T tokens: the shuffled order, truncation, packing, the fixed validation rows.

rows="truncate" is the published recipe: one document a row, exactly what T5's tokenizer gives for
`tokenizer(text, max_length=T, truncation=True, padding="max_length")`: the first T - 1 tokens of the
document, then the end-of-text token (also where the document was cut), then padding. rows="pack": the
documents' tokens, each followed by end-of-text, joined and cut every T tokens; across epochs too, so that no
token is lost. With attention="document", rows="pack" has positions that start again at every document, by which
attention stays inside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias, overload

import numpy as np

from .errors import UserError
from .sources import Document, Source, generator, permuted
from .tokenizer import Tokenizer

if TYPE_CHECKING:  # imported where it is used: a process that makes steps starts ten times faster without it
    import torch

IGNORE = -100  # label of positions that do not count in the loss, as in torch's cross_entropy
ROWS = ("truncate", "pack")
ATTENTION = ("row", "document")
CHUNK = 64  # documents tokenised in one call

Row: TypeAlias = "tuple[torch.Tensor, torch.Tensor]"


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
    order = permuted(source.shards, rng)
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


def truncated_ids(tokens: Sequence[Sequence[int]], length: int, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Rows of one document each; see the module's docstring.

    Returns input ids, int32 [len(tokens), length], and the tokens of each row before its padding, int32
    [len(tokens)].
    """
    ids = np.full((len(tokens), length), tokenizer.pad_id, dtype=np.int32)
    sizes = np.empty(len(tokens), dtype=np.int32)
    for i, document in enumerate(tokens):
        size = min(len(document), length - 1)
        ids[i, :size] = document[:size]
        ids[i, size] = tokenizer.eos_id
        sizes[i] = size + 1
    return ids, sizes


def ended(tokens: Sequence[int], tokenizer: Tokenizer) -> np.ndarray:
    """The tokens of a document and end-of-text, int32."""
    ids = np.empty(len(tokens) + 1, dtype=np.int32)
    ids[:-1] = tokens
    ids[-1] = tokenizer.eos_id
    return ids


def with_labels(ids: np.ndarray, sizes: np.ndarray | None) -> Row:
    """Input ids and labels, int64 [N, length]: labels are IGNORE after the first `sizes` of a row (None: nowhere)."""
    import torch

    input_ids = ids.astype(np.int64)
    labels = input_ids.copy()
    if sizes is not None:
        labels[np.arange(ids.shape[1]) >= sizes[:, None]] = IGNORE
    return torch.from_numpy(input_ids), torch.from_numpy(labels)


def truncated(tokens: Sequence[Sequence[int]], length: int, tokenizer: Tokenizer) -> Row:
    """Input ids and labels of `truncated_ids`."""
    return with_labels(*truncated_ids(tokens, length, tokenizer))


def document_positions(input_ids: torch.Tensor, labels: torch.Tensor, tokenizer: Tokenizer) -> Row:
    """Labels and position ids of packed rows for attention inside documents, int64 [N, length].

    Positions start at 0 at the beginning of a row and after each end-of-text. Nothing in its own document
    predicts a document's first token, so its label is IGNORE; that of a row's first token, which nothing predicts
    anyway, stays.
    """
    import torch

    ids = input_ids.numpy()
    column = np.arange(ids.shape[1])
    begins = np.zeros(ids.shape, dtype=bool)
    begins[:, 1:] = ids[:, :-1] == tokenizer.eos_id
    positions = column - np.maximum.accumulate(np.where(begins, column, 0), axis=1)
    return torch.from_numpy(np.where(begins, IGNORE, labels.numpy())), torch.from_numpy(positions)


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


def check_rows(rows: str, length: int, attention: str = "row") -> None:
    """Raise `UserError` unless the protocol is known and the length can hold a prediction."""
    if rows not in ROWS:
        raise UserError(f"data.rows is {rows!r}: use one of {', '.join(ROWS)}.")
    if attention not in ATTENTION:
        raise UserError(f"data.attention is {attention!r}: use one of {', '.join(ATTENTION)}.")
    if rows == "truncate" and attention == "document":
        raise UserError(
            "data.attention=document is for data.rows=pack: with data.rows=truncate a row is one document already; set "
            "data.attention=row."
        )
    if length < 2:
        raise UserError(f"data.length is {length}: a row needs at least 2 tokens.")


@overload
def validation_rows(
    source: Source, tokenizer: Tokenizer, length: int, rows: str, max_tokens: int | None = None
) -> Row: ...
@overload
def validation_rows(
    source: Source, tokenizer: Tokenizer, length: int, rows: str, max_tokens: int | None = None, attention: str = "row"
) -> tuple[torch.Tensor, ...]: ...
def validation_rows(
    source: Source,
    tokenizer: Tokenizer,
    length: int,
    rows: str,
    max_tokens: int | None = None,
    attention: str = "row",
) -> tuple[torch.Tensor, ...]:
    """The fixed validation rows, in file order, without a shuffle.

    Reading stops at the first row with which the tokens that are not padding reach `max_tokens`. With
    rows="pack" the last row is filled with padding. Returns input_ids and labels, int64 [N, length], and with
    attention="document" position_ids; the rows themselves are the same. Raises `UserError`.
    """
    check_rows(rows, length, attention)
    if rows == "truncate":
        return _truncated_validation(source, tokenizer, length, max_tokens)
    input_ids, labels = _packed_validation(source, tokenizer, length, max_tokens)
    if attention == "row":
        return input_ids, labels
    return input_ids, *document_positions(input_ids, labels, tokenizer)


def _truncated_validation(source: Source, tokenizer: Tokenizer, length: int, max_tokens: int | None) -> Row:
    count = 0
    kept: list[Sequence[int]] = []
    for ids in tokenised(source, source.documents(), tokenizer, length - 1):
        kept.append(ids)
        count += min(len(ids) + 1, length)
        if max_tokens is not None and count >= max_tokens:
            break
    return truncated(kept, length, tokenizer)


def _packed_validation(source: Source, tokenizer: Tokenizer, length: int, max_tokens: int | None) -> Row:
    parts: list[np.ndarray] = []
    count = 0
    # The budget is reached at a multiple of the length, or at the end of the text.
    enough = math.inf if max_tokens is None else -(-max_tokens // length) * length
    for ids in tokenised(source, source.documents(), tokenizer):
        parts.append(ended(ids, tokenizer))
        count += len(parts[-1])
        if count >= enough:
            break
    size = int(min(count, enough))
    rows = np.full((-(-size // length), length), tokenizer.pad_id, dtype=np.int32)
    rows.reshape(-1)[:size] = np.concatenate(parts)[:size]
    return with_labels(rows, np.clip(size - length * np.arange(len(rows)), 0, length))
