"""Tokenizers: text that comes back, T5's layout, and the same ids after a round trip through transformers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from data import Tokenizer, UserError, load_tokenizer, open_source

EMBEDDED = {"sample_1k": 1024, "sample_4k": 4096}
ODD = [
    "",
    " ",
    "two  spaces and three   spaces ",
    " leading",
    "lines\nand\n\nblank lines\r\n\ttabs",
    "naïve café Ω ∑ 漢字 かな 한국어 🙂👩‍👩‍👧 \u200d\u0301\u00a0\u3000",
    "aaaaaaa ------- ======= ......",
    "</s> <pad> <unk> <0x0A> <s> <extra_id_0>",
]


@pytest.fixture(params=EMBEDDED)
def embedded(request: pytest.FixtureRequest) -> Tokenizer:
    return load_tokenizer(request.param)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Real text, odd strings, and random strings over an alphabet of trouble."""
    rng = random.Random(0)
    alphabet = [
        "a",
        "b",
        " ",
        "  ",
        "\n",
        "-",
        "é",
        "漢",
        "🙂",
        "</s>",
        "<pad>",
        "the ",
        "\t",
        "\u0301",
        "aaa",
        "\u00a0",
        "\r\n",
    ]
    noise = ["".join(rng.choice(alphabet) for _ in range(rng.randrange(40))) for _ in range(500)]
    return [*open_source({"kind": "sample"}, "validation").documents(), *ODD, *noise]


def test_layout(embedded: Tokenizer) -> None:
    assert embedded.vocab_size == EMBEDDED[embedded.name]
    assert (embedded.pad_id, embedded.eos_id) == (0, 1)
    assert len(embedded.fingerprint) == 64


def test_decoding_gives_back_the_text(embedded: Tokenizer, texts: list[str]) -> None:
    ids = embedded.encode(texts)
    assert [embedded.decode(i) for i in ids] == texts
    used = {token for i in ids for token in i}
    assert max(used) < embedded.vocab_size
    assert not used & {embedded.pad_id, embedded.eos_id, 2}  # no special token, not even from text that spells one


def test_decoding_leaves_out_special_tokens(embedded: Tokenizer) -> None:
    ids = embedded.encode(["some words"])[0]
    assert embedded.decode([*ids, embedded.eos_id, embedded.pad_id, -100]) == "some words"


def test_more_pieces_need_fewer_tokens(texts: list[str]) -> None:
    small, large = (sum(map(len, load_tokenizer(name).encode(texts[:50]))) for name in EMBEDDED)
    characters = sum(map(len, texts[:50]))
    assert characters / small > 2.2 and characters / large > 3.0


def test_transformers_encodes_the_same(embedded: Tokenizer, texts: list[str], tmp_path: Path) -> None:
    """Also after transformers itself has saved and loaded it."""
    from transformers import AutoTokenizer

    embedded.save_pretrained(tmp_path / "ours")
    first = AutoTokenizer.from_pretrained(tmp_path / "ours")
    first.save_pretrained(tmp_path / "theirs")
    for theirs in (first, AutoTokenizer.from_pretrained(tmp_path / "theirs")):
        assert (len(theirs), theirs.pad_token_id, theirs.eos_token_id) == (embedded.vocab_size, 0, 1)
        assert theirs(texts).input_ids == embedded.encode(texts)
        ids = embedded.encode(texts)
        assert [theirs.decode(i) for i in ids] == texts
        assert theirs.decode([*ids[0], 1, 0], skip_special_tokens=True) == texts[0]


def test_folders_and_files_load(embedded: Tokenizer, tmp_path: Path) -> None:
    embedded.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "spiece.model"):
        loaded = load_tokenizer(path)
        assert loaded.fingerprint == embedded.fingerprint
        assert loaded.encode(ODD) == embedded.encode(ODD)
    (tmp_path / "spiece.model").unlink()  # a folder of somebody else's
    other = load_tokenizer(tmp_path)
    assert other.encode(ODD) == embedded.encode(ODD)
    assert (other.vocab_size, other.pad_id, other.eos_id) == (embedded.vocab_size, 0, 1)
    assert other.decode([*other.encode(ODD[-1:])[0], 1, -100]) == ODD[-1]


@pytest.mark.filterwarnings("ignore")
def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    with pytest.raises(UserError, match=r"There is no tokenizer at /no/such/spiece\.model"):
        load_tokenizer("/no/such/spiece.model")
    with pytest.raises(UserError, match=r"could not be fetched from the Hub \(ConnectionError\).*sample_1k"):
        load_tokenizer("no-such-tokenizer")
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "x.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        load_tokenizer(tmp_path / "x.model")
