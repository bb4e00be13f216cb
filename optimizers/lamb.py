"""LAMB: Adam with LARS's layer-wise scale (You et al. 2019; App. E.5 of arXiv 2502.07752)."""

from typing import Any

import torch
from torch import Tensor

from .base import Context, MatrixOptimizer, check
from .lars import match_weights


class LAMB(MatrixOptimizer):
    r"""Adam's update scaled to the norm of the weights, matrix by matrix.

    Each matrix W is updated, as it is stored, by

    .. math:: W \leftarrow W - \lambda \|W\|_F \frac{\omega}{\|\omega\|_F}, \qquad
        \omega = \frac{\hat m}{\sqrt{\hat v} + \epsilon},

    so that lr is the relative change of the weights in a step. Where W = 0 the factor ||W|| is 1. The paper
    describes the method in words only. State: m and v, 2mn numbers.

    Args:
        params: tensors [m, n], ``(name, tensor)`` pairs, or groups such as :func:`optimizers.partition` returns.
        lr: lambda.
        betas: beta_1 of the first moment, beta_2 of the second.
        eps: added to the square root of v.
        bias_correction: of both moments, as in Adam. As the direction is normalised, it matters only beside eps.
        weight_decay: decoupled, multiplied by lr; in You et al. it enters the norm.
        state_dtype: dtype of m and v; None for the parameter's.

    Raises:
        ValueError: an option out of its range, or a tensor that is not a matrix.
    """

    orient = False
    uses_weights = True
    compilable = False

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.002,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        bias_correction: bool = True,
        weight_decay: float = 0.0,
        state_dtype: torch.dtype | str | None = None,
    ) -> None:
        super().__init__(
            params,
            dict(
                lr=lr,
                betas=tuple(betas),
                eps=eps,
                bias_correction=bias_correction,
                weight_decay=weight_decay,
                state_dtype=state_dtype,
            ),
        )

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check(group, "betas", lambda b: len(b) == 2 and all(0 <= x < 1 for x in b), "two numbers in [0, 1)")

    def init_state(self, shape: tuple[int, int], group: dict[str, Any]) -> dict[str, Tensor]:
        return {"m": torch.zeros(shape), "v": torch.zeros(shape)}

    def direction(self, G: Tensor, state: dict[str, Tensor], group: dict[str, Any], ctx: Context) -> Tensor:
        """Adam's direction, then LARS's normalisation."""
        beta1, beta2 = group["betas"]
        m = state["m"].mul_(beta1).add_(G, alpha=1 - beta1)
        v = state["v"].mul_(beta2).addcmul_(G, G, value=1 - beta2)
        if group["bias_correction"]:
            m, v = m / (1 - beta1**ctx.step), v / (1 - beta2**ctx.step)
        return match_weights(m / (v.sqrt() + group["eps"]), ctx.W)
