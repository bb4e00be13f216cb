"""Validation perplexity: the unbiased one, and the one that the published numbers were computed with."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data import IGNORE as IGNORE

from .loss import last_hidden, real_targets, target_count, token_losses
from .loss import row_losses as row_losses  # of whole logits, for those who have them


@dataclass(frozen=True)
class Evaluation:
    """Attributes:
    loss: mean negative log-likelihood of a target token, in nats.
    tokens: target tokens.
    perplexity_galore: see :func:`galore_perplexity`.
    """

    loss: float
    tokens: int
    perplexity_galore: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700))


@torch.no_grad()
def evaluate(
    model: nn.Module,
    rows: Sequence[Tensor],
    batch_size: int = 64,
    galore_rows: int = 256,
    accelerator=None,
    autocast: AbstractContextManager | None = None,
    interrupted: Callable[[], bool] = lambda: False,
    together: nn.Module | None = None,
) -> Evaluation | None:
    """The loss over all ``rows`` (ids, labels and perhaps position ids, [N, T] each), in evaluation mode.

    Every rank evaluates a contiguous part; sums are kept for each row in float64, so the result does not depend on
    ``batch_size`` or on the number of ranks beyond the model's own rounding. Logits exist for some tokens at a time
    only (see loss.py), whatever the batch.

    Args:
        interrupted: asked before every batch, equally often on all ranks: whether to give up (the result is None then).
        together: the model's PretrainingLoss, if its forward pass needs all ranks (sharded weights): one that has no rows
            left takes part with a row that does not count.
    """
    input_ids, labels, *positions = rows
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    device = next(model.parameters()).device
    sums = torch.zeros(len(labels), dtype=torch.float64, device=device)
    mine = range(rank * len(labels) // world, (rank + 1) * len(labels) // world)
    largest = -(-len(labels) // world)  # rows of the rank that has most
    training = model.training
    model.eval()
    try:
        with autocast or nullcontext():
            for i in range(mine.start, mine.start + largest, batch_size):
                if interrupted():
                    return None
                batch = slice(i, min(i + batch_size, mine.stop))
                idle = batch.start >= batch.stop
                if idle and together is None:
                    continue
                if idle:
                    batch = slice(0, 1)
                inputs = {"input_ids": input_ids[batch].to(device)}
                if positions:
                    inputs["position_ids"] = positions[0][batch].to(device)
                found = _row_sums(model, inputs, labels[batch], together).double()
                if not idle:
                    sums[batch] = found
    finally:
        model.train(training)
    if accelerator and world > 1:
        sums = accelerator.reduce(sums, reduction="sum")
    counts = target_count(labels)
    losses = sums.cpu()
    return Evaluation(
        loss=(losses.sum() / counts.sum()).item(),
        tokens=int(counts.sum()),
        perplexity_galore=galore_perplexity(losses, counts, galore_rows),
    )


def _row_sums(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor, together: nn.Module | None) -> Tensor:
    """Summed loss of each row, [b]: added up over all positions in one order, wherever targets and chunks lie."""
    places, targets = (x.to(inputs["input_ids"].device) for x in real_targets(labels))
    if together is None:
        losses = token_losses(*last_hidden(model, inputs, places), targets)
    else:
        losses = together(inputs, places, targets, each=True)
    return losses.new_zeros(labels.numel()).index_copy_(0, places, losses).view(labels.shape).sum(dim=1)


def galore_perplexity(losses: Tensor, counts: Tensor, rows: int = 256) -> float:
    """exp(sum of batch-mean losses / (N + 1)) over N virtual batches of ``rows`` rows, in the order given.

    What the code base of the published numbers computes: it counts one batch too many, so the result is too low
    by the factor exp(-loss / (N + 1)). Only for comparison with published numbers. The last batch may be short.

    Args:
        losses: [rows] summed loss of each row.
        counts: [rows] targets of each row.
    """
    means = [
        (a.sum() / b.sum().clamp_min(1)).item() for a, b in zip(losses.split(rows), counts.split(rows), strict=True)
    ]
    return math.exp(min(sum(means) / (len(means) + 1), 700))
