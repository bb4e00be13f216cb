"""SWAN: SGD with whitening and normalisation (Ma et al. 2024; App. B.7 of arXiv 2502.07752)."""

from typing import Any

from torch import Tensor

from .base import Context, MatrixOptimizer, check
from .whitening import SOLVERS, whiten


class SWAN(MatrixOptimizer):
    r"""Rows of the gradient standardised, the result whitened; no state.

    Each matrix W [m, n], m <= n (a taller one is transposed), is updated by Eqs. 30 to 32,

    .. math::
        \tilde G = \frac{G - \bar g 1^\top}{s 1^\top}, \qquad
        W \leftarrow W - \lambda (\tilde G \tilde G^\top)^{-1/2} \tilde G,

    with the means and standard deviations (over n, not n - 1) of the rows. The singular values of the update are
    1, its entries of the order n^(-1/2): there is no sqrt(n), unlike in :class:`Whitening`.

    Args:
        params: tensors [m, n], ``(name, tensor)`` pairs, or groups such as :func:`optimizers.partition` returns.
        lr: lambda.
        solver: of the whitening: "newton_schulz", the iteration of App. B.8; "evd", exact up to rounding.
        iterations: of Newton-Schulz.
        eps: rows whose deviation is below this part of their largest entry count as constant and get no update
            (the paper prints none; what float32 leaves of them would be noise).
        weight_decay: decoupled, multiplied by lr.

    Raises:
        ValueError: an option out of its range, or a tensor that is not a matrix.
        torch.linalg.LinAlgError: the gradient is not finite and ``solver`` is "evd".
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.02,
        *,
        solver: str = "newton_schulz",
        iterations: int = 5,
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, dict(lr=lr, solver=solver, iterations=iterations, eps=eps, weight_decay=weight_decay))

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check(group, "solver", SOLVERS)
        check(group, "iterations", lambda i: i >= 1, "at least 1")

    def init_state(self, shape: tuple[int, int], group: dict[str, Any]) -> dict[str, Tensor]:
        return {}

    def direction(self, G: Tensor, state: dict[str, Tensor], group: dict[str, Any], ctx: Context) -> Tensor:
        """GradNorm, then GradWhitening."""
        return whiten(standardize(G, group["eps"]), group["solver"], group["iterations"])


def standardize(G: Tensor, eps: float) -> Tensor:
    """GradNorm (Eq. 30): the rows of G [B, m, n] with mean 0 and standard deviation 1; constant rows become 0."""
    largest = G.abs().amax(-1, keepdim=True)
    X = G / largest.where(largest > 0, 1.0)
    X = X - X.mean(-1, keepdim=True)
    s = X.square().mean(-1, keepdim=True).sqrt()
    varies = ~(s <= eps)  # so that what is not a number stays visible
    return (X / s.where(varies, 1.0)).where(varies, 0.0)
