"""Which parameter goes where, on models of several makers."""

import warnings

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from optimizers import create, describe, partition


def llama(**more):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, **more
        )
    )


def names(groups):
    return [[name for name, _ in group["params"]] for group in groups]


def test_llama_matrices_are_attention_and_mlp():
    matrix, adam = names(partition(llama(), verbose=False))
    assert len(matrix) == 2 * 7
    assert all(".self_attn." in name or ".mlp." in name for name in matrix)
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= set(adam)


def test_last_layer_by_the_candidate():
    matrix, adam = names(partition(llama(), last_layer="candidate", verbose=False))
    assert "lm_head.weight" in matrix and "model.embed_tokens.weight" in adam


def test_tied_embeddings_appear_once_and_go_to_adam():
    model = llama(tie_word_embeddings=True)
    matrix, adam = names(partition(model, verbose=False))
    assert sum("embed" in name or "lm_head" in name for name in matrix + adam) == 1
    assert len(matrix) == 14
    with pytest.raises(ValueError, match="set last_layer to adam"):
        partition(model, last_layer="candidate", verbose=False)


def test_conv1d_of_gpt2_and_position_embeddings():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    matrix, adam = names(partition(model, verbose=False))
    assert len(matrix) == 4 and all("c_" in name for name in matrix)
    assert {"transformer.wte.weight", "transformer.wpe.weight"} <= set(adam)


def test_a_vector_that_is_stored_as_a_matrix_goes_to_adam():
    """Magnitudes of weight_norm [m, 1], gates of shared experts and class tokens [1, n]; unless a pattern asks for them."""
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 16)), nn.Linear(16, 1), nn.Linear(16, 4))
    matrix, adam = names(partition(model, verbose=False))
    assert matrix == ["0.parametrizations.weight.original1", "2.weight"]
    assert {"0.parametrizations.weight.original0", "1.weight"} <= set(adam)
    assert "1.weight" in names(partition(model, matrices=["weight$"], verbose=False))[0]


def with_checkpoints(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    return model


@pytest.mark.parametrize("wrap", [torch.compile, lambda m: nn.ModuleDict({"module": m}), with_checkpoints])
def test_wrappers_change_no_name(wrap):
    expected = names(partition(llama(), verbose=False))
    assert names(partition(wrap(llama()), verbose=False)) == expected


def test_output_layer_of_a_plain_module_is_known_by_name():
    model = nn.ModuleDict({"tok": nn.Embedding(10, 4), "body": nn.Linear(4, 4), "output": nn.Linear(4, 10, bias=False)})
    assert names(partition(model, verbose=False))[0] == ["body.weight"]
    assert names(partition(model, last_layer="candidate", verbose=False))[0] == ["body.weight", "output.weight"]


def test_an_output_layer_deep_inside_is_known_where_its_name_says_enough():
    inner = nn.ModuleDict(
        {"lm_head": nn.Linear(4, 10, bias=False), "attention": nn.ModuleDict({"output": nn.Linear(4, 4)})}
    )
    matrix, adam = names(partition(nn.ModuleDict({"a": nn.ModuleDict({"b": inner})}), verbose=False))
    assert matrix == ["a.b.attention.output.weight"]
    assert adam == ["a.b.lm_head.weight", "a.b.attention.output.bias"]


class Own(nn.Module):
    """A language model with names of its own, more places than words and blocks of their embedding's shape."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.places = nn.Embedding(64, 12)
        self.words = nn.Embedding(50, 12)
        self.blocks = nn.ModuleList([nn.Linear(12, 64)])
        self.to_words = nn.Linear(12, 50)
        if outputs == 2:
            self.to_other_words = nn.Linear(12, 50)


def test_an_output_layer_is_known_by_its_shape_where_only_one_has_it():
    def matrices(outputs, **options):
        return [tuple(p.shape) for _, p in partition(Own(outputs), verbose=False, **options)[0]["params"]]

    assert matrices(1) == [(64, 12)] and matrices(1, last_layer="candidate") == [(64, 12), (50, 12)]
    assert matrices(2) == [(64, 12), (50, 12), (50, 12)]


def test_experts_that_are_stored_together_go_to_adam_with_a_warning(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    model = nn.ModuleDict({"up": nn.Linear(4, 4, bias=False), "moe": nn.Module()})
    model["moe"].experts = nn.Parameter(torch.zeros(3, 4, 4))
    model["moe"].experts_bias = nn.Parameter(torch.zeros(3, 4))
    with pytest.warns(UserWarning, match=r"of three dimensions \(1, such as moe.experts\) go to Adam"):
        assert names(partition(model, verbose=False)) == [["up.weight"], ["moe.experts", "moe.experts_bias"]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        partition(model, adam=["experts"], verbose=False)
        partition(model, matrices=["up"], verbose=False)
        other = nn.ModuleDict({"up": nn.Linear(4, 4), "conv": nn.Conv1d(4, 4, 3), "vit": nn.Module()})
        other["vit"].position = nn.Parameter(torch.zeros(1, 5, 4))
        other["vit"].scale = nn.Parameter(torch.zeros(5, 1, 4))
        partition(other, verbose=False)
        monkeypatch.setenv("RANK", "1")
        partition(model, verbose=False)


def test_every_trainable_parameter_once():
    model = llama()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    groups = partition(model, verbose=False)
    listed = [id(p) for group in groups for _, p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_patterns():
    model = llama()
    matrix, _ = names(partition(model, matrices=["self_attn"], verbose=False))
    assert len(matrix) == 8 and all("self_attn" in name for name in matrix)
    matrix, adam = names(partition(model, adam=[r"layers\.0\."], verbose=False))
    assert len(matrix) == 7 and "model.layers.0.mlp.up_proj.weight" in adam
    with pytest.raises(ValueError, match="'atention' matches no trainable parameter"):
        partition(model, matrices=["atention"], verbose=False)
    with pytest.raises(ValueError, match="no trainable matrix"):
        partition(nn.Embedding(4, 4), verbose=False)
    with pytest.raises(ValueError, match="adam or candidate"):
        partition(model, last_layer="both", verbose=False)


def test_says_what_went_where(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    groups = partition(llama())
    printed = capsys.readouterr().out
    assert printed == describe(groups) + "\n"
    assert "14 matrices" in printed and "8 of 8x8" in printed and "lm_head" in printed
    monkeypatch.setenv("RANK", "1")
    partition(llama())
    assert capsys.readouterr().out == ""


def test_description_of_an_optimizers_groups_is_the_same():
    groups = partition(llama(), verbose=False)
    assert describe(create("racs", llama(), verbose=False).param_groups) == describe(groups)
