"""Truncation as T5's tokenizer does it, packing without loss, the fixed validation rows."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data import IGNORE, Source, Tokenizer, TrainingBatches, UserError, load_tokenizer, open_source, validation_rows
from data.rows import truncated
from data.tokenizer import HubTokenizer

from .conftest import Corpus, write_shard


@pytest.fixture(scope="module")
def t5() -> Any:
    """The T5 tokenizer class of transformers with its sentinels, over a small vocabulary."""
    from transformers import T5Tokenizer

    words = ["▁the", "▁cat", "s", "▁sat", "▁on", "▁mat", *"▁abcdefghijklmnopqrstuvwxyz.,"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((word, -1.0 - 0.1 * i) for i, word in enumerate(words))]
    sentinels = [(f"<extra_id_{i}>", 0.0) for i in range(99, -1, -1)]
    return T5Tokenizer(vocab=pieces + sentinels)


def test_truncated_rows_are_those_of_t5(t5: Any) -> None:
    """Documents shorter than, as long as, and longer than a row, against the call of the published code."""
    texts = [" ".join(["the cats sat on mats."] * count) for count in (1, 2, 3, 10)] + ["the", "the cat sat on the mat"]
    ours = HubTokenizer(t5, "t5")
    lengths = [len(ids) for ids in ours.encode(texts)]
    for length in (2, 8, lengths[0], lengths[0] + 1, lengths[0] + 2, 64):
        theirs = t5(texts, max_length=length, truncation=True, padding="max_length", return_tensors="pt")
        input_ids, labels = truncated(ours.encode(texts, length - 1), length, ours)
        assert torch.equal(input_ids, theirs.input_ids)
        assert torch.equal(labels, theirs.input_ids.masked_fill(theirs.attention_mask == 0, IGNORE))


def test_sentinels_do_not_count(t5: Any) -> None:
    ours = HubTokenizer(t5, "t5")
    assert ours.vocab_size == len(t5) - 100
    assert max(ours.encode(["<extra_id_0> the </s> cat"])[0]) < ours.vocab_size
    assert ours.eos_id not in ours.encode(["the </s> cat"])[0]


def packed(texts: list[str], tokenizer: Tokenizer) -> list[int]:
    return [token for ids in tokenizer.encode(texts) for token in [*ids, tokenizer.eos_id]]


def test_packing_loses_no_token_across_epochs(train: Source, tokenizer: Tokenizer) -> None:
    """In file order, two epochs joined are the documents twice, wherever rows and steps end."""
    stream = packed(list(train.documents()) * 2, tokenizer)
    with TrainingBatches(train, tokenizer, length=16, rows="pack", batch_size=3, shuffle_buffer=0) as loader:
        rows = [next(loader) for _ in range(len(stream) // 48)]
    assert loader.epoch == 1
    got = torch.cat([step["input_ids"].flatten() for step in rows]).tolist()
    assert got == stream[: len(got)]
    assert all(torch.equal(step["input_ids"], step["labels"]) for step in rows)


def test_truncated_training_rows(train: Source, tokenizer: Tokenizer) -> None:
    """In file order, a step's rows are the next documents; labels are the ids, and IGNORE at padding alone."""
    texts = list(train.documents())[:8]
    with TrainingBatches(train, tokenizer, length=24, batch_size=4, shuffle_buffer=0) as loader:
        steps = [next(loader) for _ in range(2)]
    rows = torch.cat([step["input_ids"] for step in steps])
    labels = torch.cat([step["labels"] for step in steps])
    for text, row, label in zip(texts, rows, labels, strict=True):
        ids = [*tokenizer.encode([text])[0][:23], tokenizer.eos_id]
        assert row.tolist() == ids + [tokenizer.pad_id] * (24 - len(ids))
        assert label.tolist() == ids + [IGNORE] * (24 - len(ids))
    assert (labels == IGNORE).any() and (labels[:, -1] == tokenizer.eos_id).any()  # both kinds were there


def test_validation_rows_keep_every_token(corpus: Corpus, tokenizer: Tokenizer) -> None:
    source = open_source(corpus(15, 4, 18), "train")
    texts = list(source.documents())
    input_ids, labels = validation_rows(source, tokenizer, 16, "pack")
    assert labels[labels != IGNORE].tolist() == packed(texts, tokenizer)
    assert (labels[:-1] != IGNORE).all()
    assert torch.equal(input_ids == labels, labels != IGNORE)
    input_ids, labels = validation_rows(source, tokenizer, 16, "truncate")
    assert torch.equal(input_ids, truncated(tokenizer.encode(texts), 16, tokenizer)[0])
    assert torch.equal(input_ids == labels, labels != IGNORE)


@pytest.mark.parametrize("rows", ["truncate", "pack"])
def test_validation_stops_at_the_row_that_reaches_the_budget(train: Source, tokenizer: Tokenizer, rows: str) -> None:
    everything, labels = validation_rows(train, tokenizer, 16, rows)
    for budget in (1, 16, 17, 100):
        some, kept = validation_rows(train, tokenizer, 16, rows, max_tokens=budget)
        assert torch.equal(some, everything[: len(some)])
        assert int((kept != IGNORE).sum()) >= budget > int((kept[:-1] != IGNORE).sum())
    assert len(validation_rows(train, tokenizer, 16, rows, max_tokens=10**6)[0]) == len(everything)
    assert int((labels != IGNORE).sum()) < 10**6


def test_a_split_without_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_shard(tmp_path / "c4-train.00000-of-00001.json.gz", ["", " \n "])
    source = open_source({"kind": "c4_local", "path": str(tmp_path)}, "train")
    with pytest.raises(UserError, match="no documents with text"):
        validation_rows(source, tokenizer, 16, "pack")
    with TrainingBatches(source, tokenizer) as loader, pytest.raises(UserError, match="no documents with text"):
        next(loader)


def test_limits_give_the_beginning_of_the_tokens() -> None:
    """The shortcut for long documents is exact, on text with few and with many characters a token."""
    texts = list(open_source({"kind": "sample"}, "validation").documents())
    texts += ["word " * 500, "a" * 3000, "漢字 かな " * 300, "x  " * 900, "incomprehensibilities " * 90, "", "one"]
    for name in ("sample_1k", "sample_4k"):
        tokenizer = load_tokenizer(name)
        word = max((w for w in set(texts[0].split()) if len(tokenizer.encode([w])[0]) == 1), key=len)
        assert len(word) > 6
        everything = [*texts, f"{word} " * 600]
        whole = tokenizer.encode(everything)
        for limit in (1, 7, 255):
            assert tokenizer.encode(everything, limit) == [ids[:limit] for ids in whole]


def positions_by_hand(row: list[int], end: int) -> list[int]:
    positions: list[int] = []
    for i in range(len(row)):
        positions.append(0 if i == 0 or row[i - 1] == end else positions[-1] + 1)
    return positions


def test_attention_inside_documents(corpus: Corpus, tokenizer: Tokenizer) -> None:
    """The rows are the same; positions start again after each end-of-text, and nothing predicts a first token."""
    config = corpus(15, 4, 18)
    options: dict[str, Any] = {"length": 16, "rows": "pack", "batch_size": 7, "shuffle_buffer": 5}
    plain = TrainingBatches(open_source(config, "train"), tokenizer, prefetch=0, **options)
    starts = 0
    with TrainingBatches(open_source(config, "train"), tokenizer, attention="document", **options) as loader:
        for _ in range(12):
            step, expected = next(loader), next(plain)
            assert set(step) == {"input_ids", "labels", "position_ids"} and set(expected) == {"input_ids", "labels"}
            assert step["position_ids"].dtype == torch.int64
            assert torch.equal(step["input_ids"], expected["input_ids"])
            for row, labels, positions in zip(*map(torch.Tensor.tolist, step.values()), strict=True):
                assert positions == positions_by_hand(row, tokenizer.eos_id)
                assert labels == [IGNORE if i and not positions[i] else row[i] for i in range(16)]
                starts += positions[1:].count(0)
    assert starts > 12


def test_validation_rows_for_attention_inside_documents(train: Source, tokenizer: Tokenizer) -> None:
    for budget in (None, 100):
        expected, kept = validation_rows(train, tokenizer, 16, "pack", budget)
        input_ids, labels, positions = validation_rows(train, tokenizer, 16, "pack", budget, attention="document")
        assert torch.equal(input_ids, expected)
        assert positions.tolist() == [positions_by_hand(row, tokenizer.eos_id) for row in input_ids.tolist()]
        first = (positions == 0) & (torch.arange(16) > 0)
        assert first.any() and torch.equal(labels, kept.masked_fill(first, IGNORE))
    with pytest.raises(UserError, match="one document already"):
        validation_rows(train, tokenizer, 16, "truncate", attention="document")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("training", [False, True])
def test_position_ids_alone_keep_attention_inside_documents(
    train: Source, tokenizer: Tokenizer, implementation: str, training: bool
) -> None:
    """What `transformers` makes of them: each document of a packed row gets the logits that it gets alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=tokenizer.vocab_size,
        initializer_range=0.5, use_cache=False, attn_implementation=implementation, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().train(training)
    input_ids, _, positions = validation_rows(train, tokenizer, 32, "pack", 128, attention="document")
    together = model(input_ids=input_ids, position_ids=positions).logits
    across = model(input_ids=input_ids).logits
    assert (together - across).abs().max() > 1
    parts = 0
    for row in range(len(input_ids)):
        begins = [*(positions[row] == 0).nonzero().flatten().tolist(), 32]
        for first, end in itertools.pairwise(begins):
            alone = model(input_ids=input_ids[row : row + 1, first:end]).logits[0]
            torch.testing.assert_close(together[row, first:end], alone, rtol=1e-4, atol=1e-4)  # float32 inside
            parts += 1
    assert parts > 2 * len(input_ids)


def test_numpy_tokens_make_the_same_rows(tokenizer: Tokenizer, train: Source) -> None:
    """Sources that hold tokens give arrays, others lists; against a slow reference."""
    tokens = tokenizer.encode(list(train.documents()))
    for length in (2, 16, 64):
        for given in (tokens, [np.array(ids, dtype=np.uint16) for ids in tokens]):
            input_ids, labels = truncated(given, length, tokenizer)
            for ids, row, label in zip(tokens, input_ids.tolist(), labels.tolist(), strict=True):
                whole = [*ids[: length - 1], tokenizer.eos_id]
                assert row == whole + [tokenizer.pad_id] * (length - len(whole))
                assert label == whole + [IGNORE] * (length - len(whole))
