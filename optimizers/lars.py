"""LARS: layer-wise adaptive rate scaling (You et al. 2017; App. B.10 of arXiv 2502.07752)."""

from typing import Any

import torch
from torch import Tensor

from .base import Context, MatrixOptimizer, check
from .linalg import unit_norm


class LARS(MatrixOptimizer):
    r"""Momentum scaled to the norm of the weights, matrix by matrix.

    Each matrix W is updated, as it is stored, by Eq. 34 with phi(x) = x,

    .. math:: m \leftarrow \beta m + (1 - \beta) G, \qquad W \leftarrow W - \lambda \|W\|_F \frac{m}{\|m\|_F},

    so that lr is the relative change of the weights in a step. Where W = 0 the factor ||W|| is 1. (App. E.5 says
    that the raw gradient is normalised; the formula is followed.) State: m, mn numbers.

    Args:
        params: tensors [m, n], ``(name, tensor)`` pairs, or groups such as :func:`optimizers.partition` returns.
        lr: lambda.
        momentum: beta.
        weight_decay: decoupled, multiplied by lr; in You et al. it enters the norm.
        state_dtype: dtype of m; None for the parameter's.

    Raises:
        ValueError: an option out of its range, or a tensor that is not a matrix.
    """

    orient = False
    uses_weights = True
    bounds = False  # no square of G is kept, and a limit would change the weights of an average

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.01,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        state_dtype: torch.dtype | str | None = None,
    ) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, state_dtype=state_dtype))

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check(group, "momentum", lambda b: 0 <= b < 1, "in [0, 1)")

    def init_state(self, shape: tuple[int, int], group: dict[str, Any]) -> dict[str, Tensor]:
        return {"m": torch.zeros(shape)}

    def direction(self, G: Tensor, state: dict[str, Tensor], group: dict[str, Any], ctx: Context) -> Tensor:
        """Eq. 34."""
        beta = group["momentum"]
        m = state["m"].mul_(beta).add_(G, alpha=1 - beta)
        return match_weights(m, ctx.W)


def match_weights(X: Tensor, W: Tensor | None) -> Tensor:
    """phi(||W||) X / ||X|| with Frobenius norms and phi(x) = x, but phi(0) = 1; X = 0 stays 0. Both [B, m, n]."""
    assert W is not None  # uses_weights
    norm = W.flatten(1).norm(dim=1)[:, None, None]
    return norm.where(norm > 0, 1.0) * unit_norm(X)
