"""The n-gram models against the formulas written out with dictionaries."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from data import (
    IGNORE,
    Source,
    Tokenizer,
    load_tokenizer,
    ngram_perplexities,
    ngrams,
    open_source,
    training_sequences,
    validation_rows,
)
from data.ngrams import estimate

V, D = 7, 0.75
TRAIN = [[1, 2, 3, 1, 2, 4], [5], [1, 2, 2, 2, 3], [], [4, 1, 2, 3]]


def written_out(train: list[list[int]]) -> tuple[dict[int, float], dict[tuple[int, int], float]]:
    """p(w) and p(w | h) for all tokens, after the formulas in the module's docstring."""
    pairs = Counter((h, w) for ids in train for h, w in itertools.pairwise(ids))
    following = Counter(w for (_, w), count in pairs.items() for _ in range(count))
    contexts = Counter(w for _, w in pairs)
    total = sum(following.values())
    unigram = {w: max(following[w] - D, 0) / total + D * len(following) / total / V for w in range(V)}
    lower = {w: max(contexts[w] - D, 0) / len(pairs) + D * len(contexts) / len(pairs) / V for w in range(V)}
    bigram = {}
    for h in range(V):
        count = sum(n for (first, _), n in pairs.items() if first == h)
        followers = sum(first == h for first, _ in pairs)
        for w in range(V):
            own = max(pairs[h, w] - D, 0) / count + D * followers / count * lower[w] if count else lower[w]
            bigram[h, w] = own
    return unigram, bigram


@pytest.mark.parametrize("at_once", [1, 4, 1 << 20])
def test_probabilities(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(ngrams, "PAIRS_AT_ONCE", at_once)
    model, sequences, total = estimate(TRAIN, V)
    assert (sequences, total) == (5, 5 + 0 + 4 + 0 + 3)
    unigram, bigram = written_out(TRAIN)
    grid = np.indices((V, V))
    ours = model.bigram(grid[0].ravel(), grid[1].ravel()).reshape(V, V)
    np.testing.assert_allclose(model.unigram(np.arange(V)), [unigram[w] for w in range(V)], rtol=1e-12)
    np.testing.assert_allclose(ours, [[bigram[h, w] for w in range(V)] for h in range(V)], rtol=1e-12)
    np.testing.assert_allclose(model.unigram(np.arange(V)).sum(), 1, rtol=1e-12)
    np.testing.assert_allclose(ours.sum(axis=1), 1, rtol=1e-12)  # contexts 0 and 6 were never seen
    assert (ours > 0).all()


def test_targets_are_those_of_the_loss() -> None:
    """Labels shifted by one; padding does not count; a first token is context and never a target."""
    ids = torch.tensor([[1, 2, 3, 0], [4, 1, 2, 6], [3, 0, 0, 0]])
    labels = ids.masked_fill(torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]]).bool(), IGNORE)
    result = ngram_perplexities(TRAIN, ids, labels, V)
    unigram, bigram = written_out(TRAIN)
    targets = [(1, 2), (2, 3), (4, 1), (1, 2), (2, 6)]
    assert result["targets"] == len(targets)
    assert result["unigram"] == pytest.approx(math.exp(-sum(math.log(unigram[w]) for _, w in targets) / 5))
    assert result["bigram"] == pytest.approx(math.exp(-sum(math.log(bigram[pair]) for pair in targets) / 5))


def test_padded_rows_train_as_their_documents_do() -> None:
    rows = torch.full((3, 6), IGNORE)
    for i, ids in enumerate(([1, 2, 3, 1, 2, 4], [1, 2, 2, 2, 3], [4, 1, 2, 3])):
        rows[i, : len(ids)] = torch.tensor(ids)
    ids = torch.tensor([[1, 2, 3]])
    ours, theirs = (ngram_perplexities(train, ids, ids, V) for train in (rows, TRAIN))
    assert (ours["unigram"], ours["bigram"]) == (theirs["unigram"], theirs["bigram"])


def test_the_cap_is_reported(train: Source, tokenizer: Tokenizer) -> None:
    ids = torch.tensor([[5, 6, 7]])
    sequences = training_sequences(train, tokenizer, 16, "truncate")
    result = ngram_perplexities(sequences, ids, ids, tokenizer.vocab_size, max_documents=3)
    assert (result["max_documents"], result["train_sequences"]) == (3, 3)
    assert len(list(training_sequences(train, tokenizer, 16, "pack", max_documents=4))) == 4


def test_sequences_follow_the_protocol(train: Source, tokenizer: Tokenizer) -> None:
    """Truncated: the rows. Packed: every pair of the joined stream, once."""
    rows, labels = validation_rows(train, tokenizer, 16, "truncate")
    for sequence, row, label in zip(training_sequences(train, tokenizer, 16, "truncate"), rows, labels, strict=True):
        assert sequence.tolist() == row[label != IGNORE].tolist()
    eos = tokenizer.eos_id
    stream = [eos] + [token for ids in tokenizer.encode(list(train.documents())) for token in [*ids, eos]]
    pairs = [
        pair
        for sequence in training_sequences(train, tokenizer, 16, "pack")
        for pair in itertools.pairwise(sequence.tolist())
    ]
    assert pairs == list(itertools.pairwise(stream))


def test_a_wrong_vocabulary_is_an_error() -> None:
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match="does not fit a vocabulary of 4"):
        ngram_perplexities(TRAIN, ids, ids, 4)


@pytest.mark.parametrize("rows", ["truncate", "pack"])
def test_the_sample(rows: str) -> None:
    """The bigram must be far better than the unigram, and both better than the uniform model."""
    tokenizer = load_tokenizer("sample_1k")
    sources = [open_source({"kind": "sample"}, split) for split in ("train", "validation")]
    validation = validation_rows(sources[1], tokenizer, 256, rows)
    result = ngram_perplexities(training_sequences(sources[0], tokenizer, 256, rows), *validation, tokenizer.vocab_size)
    assert 50 < result["bigram"] < 100 < 350 < result["unigram"] < 450
