"""Column normalisation, the one-sample form of the structure S (x) I (Proposition 2 of arXiv 2502.07752)."""

from typing import Any

import torch
from torch import Tensor

from .base import Context, MatrixOptimizer
from .linalg import unit_scale


class Normalization(MatrixOptimizer):
    r"""Every column of the gradient scaled to the norm sqrt(m).

    Each matrix W [m, n], m <= n (a taller one is transposed), with gradient columns g_j, is updated by

    .. math:: W \leftarrow W - \lambda \sqrt{m}\, G\, \mathrm{Diag}(\|g_j\|^2)^{-1/2} \qquad \text{(section 3.3)}.

    There is no state. The update has entries of root mean square 1, whatever the scale of the gradient.

    Args:
        params: tensors [m, n], ``(name, tensor)`` pairs, or groups such as :func:`optimizers.partition` returns.
        lr: lambda.
        eps: the least squared column norm to divide by, for gradients scaled to a largest entry of 1 (the paper
            prints none); columns that are smaller shrink to 0 with it.
        weight_decay: decoupled, multiplied by lr.

    Raises:
        ValueError: an option out of its range, or a tensor that is not a matrix.
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, *, eps: float = 1e-30, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, dict(lr=lr, eps=eps, weight_decay=weight_decay))

    def init_state(self, shape: tuple[int, int], group: dict[str, Any]) -> dict[str, Tensor]:
        return {}

    def direction(self, G: Tensor, state: dict[str, Tensor], group: dict[str, Any], ctx: Context) -> Tensor:
        """The optimum for S (x) I with one sample: S_jj = ||g_j||^2 / m."""
        G = unit_scale(G)
        S = G.square().sum(-2, keepdim=True) / G.shape[-2]
        floor = max(group["eps"] / G.shape[-2], torch.finfo(G.dtype).tiny)
        return G * S.clamp_min(floor).rsqrt()
