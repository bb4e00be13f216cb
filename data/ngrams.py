"""Perplexities of unigram and bigram models: what any language model worth its name must beat.

Both are estimated by interpolated absolute discounting with D = 0.75. The bigram backs off to Kneser-Ney's
continuation counts (in how many contexts a token was seen), the unigram and the continuation model to the
uniform one:

    p(w)     = max(c(w) - D, 0) / N     + D K / N                 / V      K: tokens seen
    p_kn(w)  = max(n(w) - D, 0) / n     + D K / n                 / V      n(w): contexts of w, n: distinct pairs
    p(w | h) = max(c(hw) - D, 0) / c(h) + D n(h) / c(h) * p_kn(w)          n(h): followers of h; unseen h: p_kn(w)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .rows import IGNORE, check_rows, tokenised
from .sources import Source
from .tokenizer import Tokenizer

if TYPE_CHECKING:  # see rows.py
    import torch

DISCOUNT = 0.75
PAIRS_AT_ONCE = 1 << 23  # pairs kept before they are counted: bounds the memory at 64 MiB


def training_sequences(
    source: Source, tokenizer: Tokenizer, length: int, rows: str, max_documents: int | None = None
) -> Iterator[np.ndarray]:
    """The training documents as token sequences, such that their pairs are those a model sees under the
    protocol.

    rows="truncate": the row of each document, without padding. rows="pack": each document with the
    end-of-text token of the one before; pairs that a row boundary separates are kept. File order, first
    `max_documents` documents.
    """
    check_rows(rows, length)
    eos = tokenizer.eos_id
    limit = length - 1 if rows == "truncate" else None
    for ids in tokenised(source, itertools.islice(source.documents(), max_documents), tokenizer, limit):
        yield np.array([*ids, eos] if rows == "truncate" else [eos, *ids, eos], dtype=np.int64)


class NgramModel:
    """Unigram and bigram model of a vocabulary of `vocab_size` tokens, estimated on pairs (previous, next)."""

    def __init__(self, vocab_size: int, pairs: np.ndarray, counts: np.ndarray) -> None:
        """`pairs`: sorted distinct codes previous * vocab_size + next, int64; `counts`: their counts."""
        self._size = vocab_size
        self._pairs = pairs
        self._counts = counts
        previous, following = pairs // vocab_size, pairs % vocab_size
        self._context = np.bincount(previous, counts, vocab_size)  # c(h)
        self._followers = np.bincount(previous, minlength=vocab_size)  # n(h)
        self._unigram = _discounted(np.bincount(following, counts, vocab_size))
        self._continuation = _discounted(np.bincount(following, minlength=vocab_size).astype(np.float64))

    def unigram(self, following: np.ndarray) -> np.ndarray:
        """p(following), float64 of the same shape."""
        return self._unigram[following]

    def bigram(self, previous: np.ndarray, following: np.ndarray) -> np.ndarray:
        """p(following | previous), float64 of the same shape."""
        codes = previous.astype(np.int64) * self._size + following
        place = np.minimum(np.searchsorted(self._pairs, codes), len(self._pairs) - 1)
        count = np.where(self._pairs[place] == codes, self._counts[place], 0)
        context = self._context[previous]
        known = np.maximum(context, 1)
        back_off = np.where(context > 0, DISCOUNT * self._followers[previous] / known, 1.0)
        return np.maximum(count - DISCOUNT, 0) / known + back_off * self._continuation[following]


def estimate(train: Iterable[Any], vocab_size: int) -> tuple[NgramModel, int, int]:
    """Model, number of sequences and number of pairs of `train`: 1-D sequences of ids, negative ids left out."""
    waiting: list[np.ndarray] = []
    pairs, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    size = sequences = total = 0
    for sequence in train:
        ids = np.asarray(sequence, dtype=np.int64)
        ids = ids[ids >= 0]
        if len(ids) and ids.max() >= vocab_size:
            raise ValueError(f"token id {ids.max()} does not fit a vocabulary of {vocab_size}")
        waiting.append(ids[:-1] * vocab_size + ids[1:])
        sequences += 1
        total += len(waiting[-1])
        size += len(waiting[-1])
        if size >= PAIRS_AT_ONCE:
            pairs, counts = _merged(pairs, counts, waiting)
            waiting, size = [], 0
    pairs, counts = _merged(pairs, counts, waiting)
    if len(pairs) == 0:
        raise ValueError("the training sequences hold no pair of tokens")
    return NgramModel(vocab_size, pairs, counts), sequences, total


def ngram_perplexities(
    train: Iterable[Any],
    val_ids: torch.Tensor | np.ndarray,
    val_labels: torch.Tensor | np.ndarray,
    vocab_size: int,
    max_documents: int | None = None,
) -> dict[str, Any]:
    """Perplexities on exactly the targets of the language model's validation loss.

    `train`: sequences of token ids (`training_sequences`), or rows or labels [N, T] whose padding is
    negative; at most the first `max_documents` of them are used. `val_ids`, `val_labels` [N, T]: targets are
    the labels at positions 1 to T - 1 that are not IGNORE, each predicted from the id before it; the first
    token of a row is context only.

    Returns `unigram`, `bigram` (perplexities), `targets`, `train_sequences`, `train_targets`,
    `max_documents`.
    """
    model, sequences, total = estimate(itertools.islice(train, max_documents), vocab_size)
    labels = np.asarray(val_labels)[:, 1:]
    counted = labels != IGNORE
    following, previous = labels[counted], np.asarray(val_ids)[:, :-1][counted]
    if len(following) == 0:
        raise ValueError("the validation rows hold no target")
    return {
        "unigram": float(np.exp(-np.log(model.unigram(following)).mean())),
        "bigram": float(np.exp(-np.log(model.bigram(previous, following)).mean())),
        "targets": len(following),
        "train_sequences": sequences,
        "train_targets": total,
        "max_documents": max_documents,
    }


def _discounted(counts: np.ndarray) -> np.ndarray:
    """Probabilities [V] from counts [V]: discounted, the rest spread evenly."""
    total = counts.sum()
    rest = DISCOUNT * np.count_nonzero(counts) / total
    return np.maximum(counts - DISCOUNT, 0) / total + rest / len(counts)


def _merged(pairs: np.ndarray, counts: np.ndarray, more: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Add the codes `more` to sorted distinct codes and their counts."""
    new, new_counts = np.unique(np.concatenate([np.empty(0, np.int64), *more]), return_counts=True)
    both, place = np.unique(np.concatenate([pairs, new]), return_inverse=True)
    return both, np.bincount(place, np.concatenate([counts, new_counts]), len(both)).astype(np.int64)
