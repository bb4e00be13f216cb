"""Whitening, the one-sample form of the structure I (x) M (Proposition 2 of arXiv 2502.07752)."""

import math
from typing import Any

from torch import Tensor

from .base import Context, MatrixOptimizer, check
from .linalg import inverse_root, newton_schulz, unit_scale

SOLVERS = ("newton_schulz", "evd")


class Whitening(MatrixOptimizer):
    r"""The gradient with all singular values made equal.

    Each matrix W [m, n], m <= n (a taller one is transposed), is updated by

    .. math:: W \leftarrow W - \lambda \sqrt{n}\, (G G^\top)^{-1/2} G \qquad \text{(section 3.3)}.

    There is no state. The update has entries of root mean square 1, whatever the scale of the gradient.

    Args:
        params: tensors [m, n], ``(name, tensor)`` pairs, or groups such as :func:`optimizers.partition` returns.
        lr: lambda.
        solver: of the inverse root: "newton_schulz", the iteration of App. B.8; "evd", exact up to rounding.
        iterations: of Newton-Schulz. After 5, singular values below about a seventh of ||G G^T||_F^(1/2) come out
            smaller than 1.
        weight_decay: decoupled, multiplied by lr.

    Raises:
        ValueError: an option out of its range, or a tensor that is not a matrix.
        torch.linalg.LinAlgError: the gradient is not finite and ``solver`` is "evd".
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        solver: str = "newton_schulz",
        iterations: int = 5,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, dict(lr=lr, solver=solver, iterations=iterations, weight_decay=weight_decay))

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check(group, "solver", SOLVERS)
        check(group, "iterations", lambda i: i >= 1, "at least 1")

    def init_state(self, shape: tuple[int, int], group: dict[str, Any]) -> dict[str, Tensor]:
        return {}

    def direction(self, G: Tensor, state: dict[str, Tensor], group: dict[str, Any], ctx: Context) -> Tensor:
        """The optimum for I (x) M with one sample: M = G G^T / n."""
        return math.sqrt(G.shape[-1]) * whiten(G, group["solver"], group["iterations"])


def whiten(G: Tensor, solver: str, iterations: int) -> Tensor:
    """GradWhitening (Eq. 31): (G G^T)^(-1/2) G for G [B, m, n], m <= n.

    The rows of the result are orthonormal where G has full rank; its null space stays null, and 0 stays 0.
    """
    G = unit_scale(G)
    A = G @ G.mT
    return (newton_schulz(A, iterations) if solver == "newton_schulz" else inverse_root(A, 0.5)) @ G
