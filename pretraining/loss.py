"""The training loss: next-token cross-entropy, with all logits at once or a part of them at a time.

The logits of a micro-batch are its largest tensor by far (16,384 tokens with 32,000 pieces: 1 GiB in bfloat16), and its
loss needs three more of that size in float32. ``linear_cross_entropy`` makes them for some tokens at a time, turns them
into losses and gradients at once, and forgets them: nothing of that size is kept for the backward pass, nothing is
computed twice, and positions without a target (padding) are left out.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from data import IGNORE
from data.errors import UserError

from .model import hidden_states

LOSSES = ("full", "chunked", "liger")

# Tokens whose logits exist at a time: measured on the CPU (docs/performance.md); on a GPU not, chosen so that the
# weight's gradient, which every chunk reads and writes, is little beside the products.
CHUNK_TOKENS = {"cuda": 2**12, "cpu": 2**9}


def row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed negative log-likelihood of each row's targets: [b] from logits [b, T, V] and labels [b, T].

    The target of position t is the label of t + 1. Logits are widened to float32 first: in bfloat16 a loss of 3
    has a resolution of 1/64.
    """
    # Flat, with the last position ignored rather than cut off: no copy, and the softmax runs along memory.
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), following(labels).flatten(), ignore_index=IGNORE, reduction="none"
    )
    return losses.view(labels.shape).sum(dim=1)


def target_count(labels: Tensor) -> Tensor:
    """Targets in each row: [b]."""
    return (labels[:, 1:] != IGNORE).sum(dim=1)


def following(labels: Tensor) -> Tensor:
    """The target of each position, or IGNORE: [b, T]. Those of a row's last position would lie outside."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def real_targets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The positions that have a target, counted through all rows, and these targets: [K] each.

    Their number decides shapes, so a GPU would have to wait for it: call it with labels on the host.
    """
    targets = following(labels).flatten()
    places = (targets != IGNORE).nonzero().squeeze(1)
    return places, targets[places]


def check_loss(kind: str, device: torch.device) -> None:
    """Raise UserError if trainer.loss=``kind`` cannot run on ``device``."""
    if kind != "liger":
        return
    if device.type != "cuda":
        raise UserError(
            f"trainer.loss=liger needs a CUDA GPU, and this run is on {device.type}: use trainer.loss=chunked"
        )
    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError("trainer.loss=liger needs the package liger-kernel: install it, or use trainer.loss=chunked")


class PretrainingLoss(nn.Module):
    """A model and its loss as one module, so that DDP sees a single forward pass; parameters stay the model's own.

    Args:
        model: a LLaMA of `transformers`.
        kind: full: all logits at once | chunked: :func:`linear_cross_entropy` | liger: the kernel of liger-kernel.
    """

    def __init__(self, model: nn.Module, kind: str = "chunked") -> None:
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, inputs: dict[str, Tensor], places: Tensor, targets: Tensor, each: bool = False) -> Tensor:
        """The summed loss of all targets, in float32 (float64 for a float64 model).

        Args:
            inputs: of the model: input_ids and perhaps position_ids, [b, T].
            places, targets: of :func:`real_targets`; there may be none, and all gradients are 0 then.
            each: the loss of each target instead, [K], without gradients; for evaluation.
        """
        if each:
            return token_losses(*last_hidden(self.model, inputs, places), targets)
        if self.kind == "full":
            logits = self.model.lm_head(hidden_states(self.model, **inputs)).flatten(0, 1)  # type: ignore[operator]
            every = targets.new_full((len(logits),), IGNORE).index_copy_(0, places, targets)
            wide = torch.promote_types(logits.dtype, torch.float32)
            return F.cross_entropy(logits.to(wide), every, ignore_index=IGNORE, reduction="none").sum()
        hidden, weight = last_hidden(self.model, inputs, places)
        if self.kind == "liger":
            return _liger(hidden, weight, targets)
        return linear_cross_entropy(hidden, weight, targets)


def last_hidden(model: Any, inputs: dict[str, Tensor], places: Tensor) -> tuple[Tensor, Tensor]:
    """What the last layer multiplies at ``places``, [K, h], and its weight [V, h]."""
    hidden = hidden_states(model, **inputs).flatten(0, 1)
    return hidden.index_select(0, places), model.lm_head.weight


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int | None = None) -> Tensor:
    """The summed cross-entropy of logits hidden @ weight^T, ``chunk`` tokens at a time: a scalar.

    Where gradients are wanted they are computed with the losses, from the same logits, and the backward pass only
    multiplies them by the gradient of the sum; this is why the sum is returned and not the losses, whose gradients
    could differ. The weight's gradient is added up over chunks in float32. Under autocast the products are in its dtype;
    the softmax is in float32 (float64 for float64 products).

    Args:
        hidden: [N, h].
        weight: [V, h].
        targets: [N], all real: see :func:`real_targets`.
        chunk: tokens at a time; None: ``CHUNK_TOKENS`` of the device.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(hidden, weight, targets, chunk)
    return token_losses(hidden, weight, targets, chunk).sum()


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int | None = None) -> Tensor:
    """The cross-entropy of every target, [N], for evaluation. Arguments are those of :func:`linear_cross_entropy`."""
    H, W = _factors(hidden, weight)
    scores = _Scores(W, len(H), chunk)
    losses = H.new_empty(len(H), dtype=scores.logs.dtype)
    for part in scores.parts:
        logs = scores.log_softmax(H[part])
        losses[part] = -logs.gather(1, targets[part].unsqueeze(1)).squeeze(1)
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int | None) -> Tensor:
        H, W = _factors(hidden, weight)
        scores = _Scores(W, len(H), chunk)
        dH, dW = torch.empty_like(H), torch.zeros_like(W, dtype=scores.logs.dtype)
        total = dW.new_zeros(())
        for part in scores.parts:
            logs, t, h = scores.log_softmax(H[part]), targets[part].unsqueeze(1), H[part]
            own = logs.gather(1, t)
            total -= own.sum()
            # The gradient of the logits: their probabilities, less 1 at the target.
            G = scores.in_their_dtype(logs.exp_().scatter_(1, t, own.expm1()))
            torch.mm(G, W, out=dH[part])
            if G.dtype == dW.dtype:
                dW.addmm_(G.mT, h)
            else:
                dW += G.mT @ h
        ctx.save_for_backward(dH, dW)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        # Written in the dtype that is wanted: one pass, and no float32 copy on the way to bfloat16. A GPU would first round a
        # scalar to the tensor's dtype, by up to 0.4 % in bfloat16; with a vector of one number it widens the tensor.
        gradient = gradient if gradient.device.type == "cpu" else gradient.reshape(1)
        dH, dW = (
            torch.mul(x, gradient, out=torch.empty_like(x, dtype=dtype))
            for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return dH, dW, None, None


class _Scores:
    """Logits of a chunk, in memory that all chunks share: on a CPU new pages cost nearly as much as the arithmetic."""

    def __init__(self, W: Tensor, tokens: int, chunk: int | None) -> None:
        size = chunk or CHUNK_TOKENS[W.device.type]
        self.parts = [slice(i, min(i + size, tokens)) for i in range(0, tokens, size)]
        self.W = W
        self.logits = W.new_empty(min(size, tokens), len(W))
        wide = torch.promote_types(W.dtype, torch.float32)
        self.widened = self.logits if wide == W.dtype else torch.empty_like(self.logits, dtype=wide)
        self.logs = torch.empty_like(self.widened)

    def log_softmax(self, h: Tensor) -> Tensor:
        """Logarithms of the probabilities, in float32: [n, V] from h [n, h]; until the next call."""
        logits, widened, logs = (x[: len(h)] for x in (self.logits, self.widened, self.logs))
        torch.mm(h, self.W.mT, out=logits)
        if widened.dtype != logits.dtype:
            widened.copy_(logits)
        return torch.log_softmax(widened, dim=-1, out=logs)

    def in_their_dtype(self, x: Tensor) -> Tensor:
        """``x`` in the dtype of the logits, in their place."""
        return x if x.dtype == self.logits.dtype else self.logits[: len(x)].copy_(x)


def _factors(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of their product."""
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return hidden.to(dtype), weight.to(dtype)


def _liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Run by Triton's interpreter only, not on CUDA (tests/pretraining/test_liger.py).

    The library reads its count of targets, so that the host waits once in each forward pass.
    """
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # type: ignore[import-not-found, unused-ignore]

    if not len(targets):
        return (hidden.sum() + weight.sum()).float() * 0
    H, W = _factors(hidden, weight)
    loss = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE, reduction="sum", accum_dtype=torch.float32)
    return loss(W, H, targets)
