"""The loss without all logits at once, against the loss that has them."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from data import IGNORE
from data.errors import UserError
from pretraining.config import compose, validate
from pretraining.evaluation import evaluate
from pretraining.loss import (
    PretrainingLoss,
    check_loss,
    linear_cross_entropy,
    real_targets,
    row_losses,
    target_count,
    token_losses,
)
from pretraining.model import build_model, hidden_states
from pretraining.plan import make_plan

SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "initializer_range": 0.25,
    "tie_word_embeddings": False,
}
ROWS, LENGTH = 5, 12


def batch(padding: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels; with padding, rows of several lengths and one that is nothing else."""
    ids = torch.randint(SHAPE["vocab_size"], (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    if padding:
        labels[1, 7:] = labels[3, 1:] = labels[4] = IGNORE
    return ids, labels


def model(dtype=torch.float32, **changes):
    torch.manual_seed(1)
    return build_model(SHAPE | changes, dtype=dtype)


def loss_and_gradients(net, kind, inputs, labels, autocast=False, scale=1 / 37):
    net.zero_grad()
    device = net.lm_head.weight.device.type
    with torch.autocast(device, dtype=torch.bfloat16) if autocast else nullcontext():
        loss = PretrainingLoss(net, kind)(inputs, *real_targets(labels))
    (loss * scale).backward()
    return [loss.detach()] + [p.grad.clone() for p in net.parameters()]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Of 7 tokens, so that every test has several and a last one that is smaller."""
    monkeypatch.setattr("pretraining.loss.CHUNK_TOKENS", {"cpu": 7})


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [
        (torch.float64, False, 1e-12),
        (torch.float32, False, 1e-6),
        (torch.float32, True, 2e-2),  # bfloat16 has 8 bits; how far the two are from the truth is compared below
        (torch.bfloat16, False, 2e-2),
    ],
    ids=["fp64", "fp32", "bf16_mixed", "bf16"],
)
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
@pytest.mark.parametrize("padding", [False, True])
def test_chunks_give_the_loss_and_gradients_of_all_logits(dtype, autocast, tolerance, changes, padding):
    net, (ids, labels) = model(dtype, **changes), batch(padding)
    full, chunked = (
        loss_and_gradients(net, kind, {"input_ids": ids}, labels, autocast) for kind in ("full", "chunked")
    )
    assert all(a.dtype == b.dtype for a, b in zip(full, chunked, strict=True))
    assert [distance(a, b) for a, b in zip(chunked, full, strict=True)] == pytest.approx([0] * len(full), abs=tolerance)
    assert full[0].item() == pytest.approx(row_losses(net(input_ids=ids).logits, labels).sum().item(), rel=1e-2)


@pytest.mark.parametrize("autocast", [True, False], ids=["bf16_mixed", "bf16"])
def test_in_bfloat16_chunks_are_as_near_to_the_truth_as_all_logits(autocast):
    net, (ids, labels) = model(torch.float32 if autocast else torch.bfloat16), batch()
    exact = model(torch.float64)
    exact.load_state_dict(net.state_dict())
    truth = loss_and_gradients(exact, "full", {"input_ids": ids}, labels)
    errors = {}
    for kind in ("full", "chunked"):
        found = loss_and_gradients(net, kind, {"input_ids": ids}, labels, autocast)
        errors[kind] = distance(*(torch.cat([g.double().flatten() for g in x]) for x in (found, truth)))
    assert 0 < errors["chunked"] < 1.1 * errors["full"]


def test_documents_of_a_row_keep_their_positions():
    net, (ids, labels) = model(), batch(padding=False)
    positions = torch.arange(LENGTH).repeat(ROWS, 1)
    positions[:, 5:] -= 5
    labels[:, 5] = IGNORE
    inputs = {"input_ids": ids, "position_ids": positions}
    full, chunked = (loss_and_gradients(net, kind, inputs, labels) for kind in ("full", "chunked"))
    for a, b in zip(chunked, full, strict=True):
        assert distance(a, b) < 1e-6
    alone = loss_and_gradients(net, "chunked", {"input_ids": ids}, labels)
    assert distance(alone[0], full[0]) > 1e-3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_hidden_states_are_those_of_transformers_to_the_bit(attention, documents, autocast):
    net, (ids, _) = model(attn_implementation=attention), batch()
    inputs = {"input_ids": ids}
    if documents:
        inputs["position_ids"] = torch.arange(LENGTH).repeat(ROWS, 1)
        inputs["position_ids"][1:, 5:] -= 5
        inputs["position_ids"][2:, 9:] = torch.arange(LENGTH - 9)
    with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext():
        ours, theirs = hidden_states(net, **inputs), net.model(**inputs).last_hidden_state
    assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    gradients = []
    for hidden in (ours, theirs):
        net.zero_grad()
        hidden.square().sum().backward()
        gradients.append([p.grad for p in net.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("kind", ["full", "chunked"])
def test_rows_of_padding_alone_have_no_loss_and_gradients_of_zero(kind):
    net, (ids, labels) = model(), batch()
    loss, *gradients = loss_and_gradients(net, kind, {"input_ids": ids[4:]}, labels[4:])
    assert loss == 0 and all((g == 0).all() for g in gradients)


def test_gradients_are_the_derivatives():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 3, dtype=torch.float64, generator=generator, requires_grad=True) for n in (7, 5))
    targets = torch.randint(5, (7,), generator=generator)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets, 3), (hidden, weight))
    assert torch.autograd.gradcheck(lambda h: 3 * linear_cross_entropy(h, weight.detach(), targets, 2), hidden)


def test_the_loss_of_a_target_far_from_certain_is_finite():
    """Probability 0 in float32 at the target, loss 1000: no infinity, and the gradient of the logits is p - 1."""
    weight = torch.tensor([[0.0], [1.0]], requires_grad=True)
    loss = linear_cross_entropy(torch.tensor([[1000.0]]), weight, torch.tensor([0]))
    loss.backward()
    assert loss.item() == 1000 and weight.grad.tolist() == [[-1000.0], [1000.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_never_exist_for_more_than_a_chunk(dtype):
    """Neither in training nor in evaluation: no tensor has more entries than the chunk's logits or the weight."""
    from torch.utils._python_dispatch import TorchDispatchMode

    tokens, vocabulary, hidden = 300, 97, 4

    class Largest(TorchDispatchMode):
        entries = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    self.entries = max(self.entries, x.numel())
            return out

    H = torch.randn(tokens, hidden, dtype=dtype, requires_grad=True)
    W = torch.randn(vocabulary, hidden, dtype=dtype, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,))
    with Largest() as seen:
        linear_cross_entropy(H, W, targets, 20).backward()
        with torch.no_grad():
            token_losses(H, W, targets, 20)
    assert seen.entries == 20 * vocabulary < tokens * vocabulary


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_vocabulary_and_the_tokens():
    H, W = torch.randn(50, 4, requires_grad=True), torch.randn(97, 4, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        linear_cross_entropy(H, W, torch.randint(97, (50,)))
    assert sorted(kept) == [(50, 4), (97, 4)]


def test_evaluation_gives_the_rows_sums_of_all_logits_for_every_chunk(monkeypatch):
    net, (ids, labels) = model(), batch()
    with torch.no_grad():
        expected = row_losses(net(input_ids=ids).logits, labels).double().sum() / target_count(labels).sum()
    for chunk in (1, 7, 1000):
        monkeypatch.setattr("pretraining.loss.CHUNK_TOKENS", {"cpu": chunk})
        for size in (1, 2, 5):
            assert evaluate(net, (ids, labels), size).loss == pytest.approx(expected.item(), rel=1e-6)


def test_the_kernels_library_is_named_where_it_cannot_run(monkeypatch):
    with pytest.raises(UserError, match="needs a CUDA GPU, and this run is on cpu: use trainer"):
        make_plan(compose(["experiment=quickstart", "optimizer=adam", "trainer.loss=liger", "trainer.device=cpu"]))
    with monkeypatch.context() as patch, pytest.raises(UserError, match="needs the package liger-kernel"):
        patch.setattr("pretraining.loss.importlib.util.find_spec", lambda name: None)  # as if it were not installed
        check_loss("liger", torch.device("cuda"))
    with pytest.raises(UserError, match="must be one of full, chunked, liger"):
        validate(compose(["experiment=quickstart", "optimizer=adam", "trainer.loss=fast"]))


def test_the_kernels_library_gets_real_targets_in_the_dtype_of_the_products(monkeypatch):
    """Its place is taken by a stand-in with its signature: the kernel itself needs a GPU."""
    import sys

    class StandIn(torch.nn.Module):
        def __init__(self, ignore_index, reduction, accum_dtype):
            super().__init__()
            assert (ignore_index, reduction, accum_dtype) == (IGNORE, "sum", torch.float32)

        def forward(self, lin_weight, _input, target):
            assert lin_weight.dtype == _input.dtype == torch.bfloat16 and (target >= 0).all() and len(target)
            return F.cross_entropy((_input @ lin_weight.mT).float(), target, reduction="sum")

    library = SimpleNamespace(LigerFusedLinearCrossEntropyLoss=StandIn)
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace(transformers=library))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", library)
    net, (ids, labels) = model(), batch()
    ours, theirs = (
        loss_and_gradients(net, kind, {"input_ids": ids}, labels, autocast=True) for kind in ("chunked", "liger")
    )
    assert [distance(a, b) for a, b in zip(ours, theirs, strict=True)] == pytest.approx([0] * len(ours), abs=1e-2)
    nothing = loss_and_gradients(net, "liger", {"input_ids": ids[4:]}, labels[4:])
    assert all((x == 0).all() for x in nothing)
