"""Validation perplexity: the unbiased one, and the one that the published numbers were computed with."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import IGNORE


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


def row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed negative log-likelihood of each row's targets: [b] from logits [b, T, V] and labels [b, T].

    The target of position t is the label of t + 1. Logits are widened to float32 first: in bfloat16 a loss of 3
    has a resolution of 1/64.
    """
    targets = labels[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORE, reduction="none")
    return losses.sum(dim=1)


def target_count(labels: Tensor) -> Tensor:
    """Targets in each row: [b]."""
    return (labels[:, 1:] != IGNORE).sum(dim=1)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    rows: Sequence[Tensor],
    batch_size: int = 64,
    galore_rows: int = 256,
    accelerator=None,
    autocast: AbstractContextManager | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """The loss over all ``rows`` (ids, labels and perhaps position ids, [N, T] each), in evaluation mode.

    Every rank evaluates a contiguous part; sums are kept for each row in float64, so the result does not depend on
    ``batch_size`` or on the number of ranks beyond the model's own rounding.

    Args:
        interrupted: asked before every batch, equally often on all ranks: whether to give up (the result is None then).
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
                if batch.start < batch.stop:
                    more = {"position_ids": positions[0][batch].to(device)} if positions else {}
                    logits = model(input_ids=input_ids[batch].to(device), **more).logits
                    sums[batch] = row_losses(logits, labels[batch].to(device)).double()
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
