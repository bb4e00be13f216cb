"""RACS: row and column scaled SGD (Algorithm 1 of arXiv 2502.07752)."""

from typing import Any

import torch
from torch import Tensor

from .base import Context, MatrixOptimizer, check
from .factored import Factored
from .limiter import growth_limit
from .linalg import each, product


class RACS(MatrixOptimizer):
    r"""The update of the structure S (x) Q, both diagonal: one scale for each column and one for each row.

    Each matrix W [m, n], m <= n (a taller one is transposed), is updated by

    .. math:: W \leftarrow W - \lambda \eta \alpha\, \mathrm{Diag}(q)^{-1/2} G\, \mathrm{Diag}(s)^{-1/2}.

    State: s [n], q [m] and phi, m + n + 1 numbers. There is no first moment and no bias correction: the first
    steps are up to 1 / (1 - beta) times too large, which warm-up has to cover.

    Args:
        params: tensors [m, n], ``(name, tensor)`` pairs, or groups such as :func:`optimizers.partition` returns.
        lr: lambda.
        beta: of the averages of s and q; 0 is "RACS w/o EMA".
        scale: alpha.
        limiter: gamma, the most that the norm of the update may grow in a step; None for no limit.
        iterations: of the fixed point (Eq. 16), each of them one update of s and one of q.
        eps: the least value of s and q (the paper prints none; s scales as the square of the gradient).
        weight_decay: decoupled, multiplied by lr.

    Raises:
        ValueError: an option out of its range, or a tensor that is not a matrix.
    """

    full_precision = frozenset({"s", "q", "phi"})
    uses_squares = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.02,
        *,
        beta: float = 0.9,
        scale: float = 0.05,
        limiter: float | None = 1.01,
        iterations: int = 5,
        eps: float = 1e-30,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params,
            dict(
                lr=lr,
                beta=beta,
                scale=scale,
                limiter=limiter,
                iterations=iterations,
                eps=eps,
                weight_decay=weight_decay,
            ),
        )

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check(group, "beta", lambda b: 0 <= b < 1, "in [0, 1)")
        check(group, "iterations", lambda i: i >= 1, "at least 1")

    def init_state(self, shape: tuple[int, int], group: dict[str, Any]) -> dict[str, Tensor]:
        m, n = shape
        return {"s": torch.zeros(n), "q": torch.zeros(m), "phi": torch.zeros(())}

    def direction(self, G: Tensor, state: dict[str, Tensor], group: dict[str, Any], ctx: Context) -> Factored:
        """Lines 5 to 10 of Algorithm 1."""
        beta, eps = group["beta"], group["eps"]
        # s is of the second order in G, ||s||^2 of the fourth: unscaled, gradients below 1e-10 would leave float32.
        c, X = ctx.moderate(G)
        P, sums = ctx.squares_of(X)

        s, q = each(fixed_point, P, sums, iterations=group["iterations"], eps=eps)  # line 5, s for G / c
        s = state["s"].lerp_(s * c[..., 0].square(), 1 - beta)  # line 6
        q = state["q"].lerp_(q, 1 - beta)  # line 7
        rows, columns = q.clamp_min(eps).rsqrt().unsqueeze(-1), s.clamp_min(eps).rsqrt().unsqueeze(-2)  # line 8
        # ||Diag(q)^(-1/2) G Diag(s)^(-1/2)||^2 = (1/q)^T G^2 (1/s)
        inverse_s = (columns * c).square().clamp(max=torch.finfo(P.dtype).max)  # of G / c; a zero column times it is 0
        norm = (rows.square() * product(P, inverse_s.mT)).sum((-2, -1)).sqrt()
        eta, state["phi"] = growth_limit(norm, state["phi"], group["limiter"])  # lines 9 and 10
        return Factored(G=G, rows=rows, columns=columns).times(eta)


def fixed_point(P: Tensor, sums: Tensor, iterations: int, eps: float) -> tuple[Tensor, Tensor]:
    """Eq. 16 from q = 1: power iteration to the principal singular vectors of the squared gradient.

    Args:
        P: [m, n], entries of the gradient squared.
        sums: [n], of the columns of P: P^T q for q = 1.
        iterations: how many pairs of updates, s first.
        eps: the least value of a denominator.

    Returns:
        s [n] and q [m]; q s^T is the least-squares fit of q to P for that s.
    """
    s = sums / max(len(P), eps)  # q = 1: the squared norm is m
    q = P.mv(s) / s.dot(s).clamp_min(eps)
    for _ in range(iterations - 1):
        s = P.mT.mv(q) / q.dot(q).clamp_min(eps)
        q = P.mv(s) / s.dot(s).clamp_min(eps)
    return s, q
