"""The models are the paper's: parameter for parameter, and drawn as the published code bases draw them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from data.errors import UserError
from pretraining.config import choices, compose
from pretraining.model import build_model, choose_attention, parameter_count

PUBLISHED = {"llama_60m": 58_073_600, "llama_130m": 134_105_856, "llama_350m": 367_969_280, "llama_1b": 1_339_082_752}
PROXIES = {"llama_tiny": 3_688_704, "llama_tiny_4k": 1_840_256}
LLAMA_7B = 6_738_415_616


def model_config(name: str) -> Any:
    return compose([f"model={name}", "recipe=none"]).model


@pytest.mark.parametrize(("name", "count"), [*PUBLISHED.items(), *PROXIES.items(), ("llama_7b", LLAMA_7B)])
def test_parameter_counts_on_the_meta_device(name: str, count: int) -> None:
    with torch.device("meta"):
        model = build_model(model_config(name))
    assert parameter_count(model) == count
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_every_model_file_is_counted_above() -> None:
    assert set(choices("model")) == {*PUBLISHED, *PROXIES, "llama_7b"}


@pytest.mark.parametrize(("name", "share"), [("llama_tiny", 0.86), ("llama_tiny_4k", 0.43)])
def test_share_of_the_attention_and_mlp_matrices_in_the_proxies(name: str, share: float) -> None:
    model = build_model(model_config(name), device="meta")
    matrices = sum(p.numel() for key, p in model.named_parameters() if "attn" in key or "mlp" in key)
    assert matrices / parameter_count(model) == pytest.approx(share, abs=0.005)


@pytest.fixture(scope="module")
def tiny() -> Any:
    torch.manual_seed(0)
    return build_model(model_config("llama_tiny"), pad_token_id=3, eos_token_id=1, bos_token_id=2)


def test_deviation_of_the_start() -> None:
    """0.02 for the paper's sizes; the proxies, which are smaller, start at 1 / sqrt(hidden size)."""
    for name in ("llama_60m", "llama_130m", "llama_350m", "llama_1b", "llama_7b"):
        assert model_config(name).initializer_range == 0.02
    for name in ("llama_tiny", "llama_tiny_4k"):
        assert model_config(name).initializer_range == pytest.approx(model_config(name).hidden_size ** -0.5, rel=0.01)


def test_every_matrix_is_normal(tiny: Any) -> None:
    sigma = tiny.config.initializer_range
    matrices = {name: p.detach() for name, p in tiny.named_parameters() if p.ndim == 2}
    assert "model.embed_tokens.weight" in matrices and "lm_head.weight" in matrices
    for name, matrix in matrices.items():
        assert matrix.std().item() == pytest.approx(sigma, rel=0.03), name
        assert abs(matrix.mean().item()) < 5 * sigma / matrix.numel() ** 0.5, name
        assert 3.5 * sigma < matrix.abs().max().item() < 7 * sigma, name  # tails of a normal, not of a cut one


def test_the_padding_row_is_drawn_and_trained_like_any_other(tiny: Any) -> None:
    embedding = copy.deepcopy(tiny).model.embed_tokens
    assert embedding.weight[3].std().item() == pytest.approx(tiny.config.initializer_range, rel=0.3)
    embedding(torch.tensor([3])).sum().backward()
    assert embedding.weight.grad[3].eq(1).all()


def test_norm_gains_are_ones_and_nothing_has_a_bias(tiny: Any) -> None:
    vectors = {name: p for name, p in tiny.named_parameters() if p.ndim != 2}
    assert len(vectors) == 2 * 4 + 1
    assert all(name.endswith("norm.weight") and p.eq(1).all() for name, p in vectors.items())


def test_token_ids_sdpa_and_no_cache_reach_the_config(tiny: Any) -> None:
    assert (tiny.config.pad_token_id, tiny.config.eos_token_id, tiny.config.bos_token_id) == (3, 1, 2)
    assert tiny.generation_config.eos_token_id == 1
    assert tiny.config._attn_implementation == "sdpa" and tiny.config.use_cache is False
    assert tiny.lm_head.weight is not tiny.model.embed_tokens.weight


def test_the_seed_decides_the_weights() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return build_model(model_config("llama_tiny_4k")).lm_head.weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_bf16_starts_at_the_rounded_float32_weights_with_exact_positions(tiny: Any) -> None:
    torch.manual_seed(0)
    low = build_model(model_config("llama_tiny"), dtype=torch.bfloat16)
    assert low.dtype == torch.bfloat16
    for (name, a), b in zip(low.named_parameters(), tiny.parameters(), strict=True):
        assert a.dtype == torch.bfloat16 and torch.equal(a, b.to(torch.bfloat16)), name
    assert torch.equal(low.model.rotary_emb.inv_freq, tiny.model.rotary_emb.inv_freq)


def test_tied_weights_count_once() -> None:
    cfg = model_config("llama_tiny")
    cfg.tie_word_embeddings = True
    assert parameter_count(build_model(cfg)) == PROXIES["llama_tiny"] - 1024 * 256


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("num_attention_heads", 3, "multiple"),
        ("num_attention_heads", 256, "even"),
        ("vocab_size", 0, "vocab_size"),
        ("hidden_size", "wide", "hidden_size"),
        ("num_hidden_layers", True, "num_hidden_layers"),
    ],
)
def test_impossible_shapes_are_named(key: str, value: Any, word: str) -> None:
    cfg = model_config("llama_tiny")
    cfg[key] = value
    with pytest.raises(UserError, match=word):
        build_model(cfg, device="meta")


def test_attention_is_chosen_by_device_and_length():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [choose_attention("auto", cpu, n) for n in (256, 512, 513)] == ["eager", "eager", "sdpa"]
    assert choose_attention("auto", cuda, 256) == choose_attention("auto") == "sdpa"
    assert choose_attention("sdpa", cpu, 256) == "sdpa" and choose_attention("eager", cuda, 4096) == "eager"
