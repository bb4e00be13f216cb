"""Estimates of the Hessian's diagonal, for optimizers that want them (Sophia, arXiv 2305.14342, section 2.3)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .evaluation import IGNORE, row_losses


def hutchinson(
    logits: Callable[[Any], Tensor],
    pieces: Sequence[tuple[Any, Tensor]],
    params: Sequence[Tensor],
    generator: torch.Generator,
) -> list[Tensor]:
    """u * (H u) with u ~ N(0, I), H being the Hessian of the summed loss over all ``pieces``.

    Args:
        logits: of a micro-batch's inputs: [b, T, V].
        pieces: micro-batches, (inputs, labels [b, T]) each.
        params: whose diagonal is wanted.
        generator: of u, on the device of ``params``; equal on all ranks, whose results can then be added up.

    Returns:
        A float32 tensor for each parameter.
    """
    u = [torch.randn(p.shape, generator=generator, device=p.device, dtype=torch.float32).to(p.dtype) for p in params]
    estimates = [torch.zeros_like(p, dtype=torch.float32) for p in params]
    for inputs, labels in pieces:
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second derivative
            loss = row_losses(logits(inputs), labels).sum()
            gradients = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
            products = torch.autograd.grad(gradients, params, grad_outputs=u, materialize_grads=True)
        for estimate, direction, product in zip(estimates, u, products, strict=True):
            estimate.addcmul_(direction.float(), product.float())
    return estimates


def label_gradient(
    logits: Callable[[Any], Tensor],
    pieces: Sequence[tuple[Any, Tensor]],
    params: Sequence[Tensor],
    generator: torch.Generator,
) -> list[Tensor]:
    """The gradient of the summed loss if the labels are drawn from the model itself.

    With g this gradient divided by the number B of targets, B g * g is the Gauss-Newton-Bartlett estimate. Arguments and
    result are those of :func:`hutchinson`; ``generator`` draws the labels, so ranks want different ones.
    """
    total = [torch.zeros_like(p, dtype=torch.float32) for p in params]
    for inputs, labels in pieces:
        scores = logits(inputs)
        probabilities = scores.detach()[:, :-1].float().softmax(-1).flatten(0, 1)
        drawn = torch.multinomial(probabilities, 1, generator=generator).view(len(labels), -1)
        sampled = labels.clone()
        sampled[:, 1:] = torch.where(labels[:, 1:] == IGNORE, IGNORE, drawn)
        loss = row_losses(scores, sampled).sum()
        for summed, gradient in zip(total, torch.autograd.grad(loss, params, materialize_grads=True), strict=True):
            summed += gradient
    return total
