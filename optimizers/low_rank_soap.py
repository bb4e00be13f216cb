"""Low-rank SOAP: tracking, switching and compensation (section 5 of arXiv 2502.07752) on both sides of a gradient.

Experimental: not in the paper, which leaves SOAP's low-rank version as future work. The derivation, with proofs and a
list of what is a choice, is docs/low_rank_soap.md.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .base import Context, MatrixOptimizer, check
from .limiter import limit_growth
from .linalg import align_signs, or_previous, subspace_iteration, thin_qr, top_eigenvectors
from .low_rank import switch


class LowRankSOAP(MatrixOptimizer):
    r"""SOAP (Algorithm 6) with r left and k right eigenvectors, as Alice is low-rank Eigen-Adam.

    Experimental: not in the paper. Each matrix W [m, n], m <= n (a taller one is transposed), is updated by

    .. math:: W \leftarrow W - \lambda \alpha (U \omega V^\top + \alpha_c C),

    U [m, r], V [n, k] the tracked and switched bases, omega [r, k] the moments' ratio of the projected gradient
    U^T G V, and C the compensation for the other mn - rk coordinates. No moment is bias-corrected, as in Alice.

    Args:
        params: tensors [m, n], ``(name, tensor)`` pairs, or groups such as :func:`optimizers.partition` returns.
        lr: lambda.
        betas: beta_1 of the first moment and of the energies p, q and e, beta_2 of the second moment, beta_3 of the
            tracked Q_L~ and Q_R~.
        rank: r, at most the smaller side.
        right_rank: k, at most the larger side; None for ``rank``.
        leading: l, the eigenvectors kept at a switch on either side, at most both ranks.
        update_interval: K, steps between refreshes of the bases.
        scale: alpha.
        compensation_scale: alpha_c.
        limiter: gamma, the most that the norm of C may grow in a step; None for no limit.
        eps: added to the square roots of v and of the energies.
        weight_decay: decoupled, multiplied by lr.
        tracking: keep Q_L~ and Q_R~; False is beta_3 = 0.
        switching: "complement" (Algorithm 2 on each side) or "none" (the leading eigenvectors themselves).
        compensation: "optimal" (Theorem 1 of the derivation: k + r + 1 scales, in the coordinates of the bases),
            "columns" (its section 5: n + r scales; Alice's for what is outside U, and r for the rest) or "none".
        update_times: "printed", t = 1, K, 2K, ...; "zero_based", t = 1, K + 1, 2K + 1, ...
        fix_signs: choose the signs of new bases by those of the old ones (see ``linalg.align_signs``).
        state_dtype: dtype of U, V, m and v; None for the parameter's. The other states are float32.
        seed: of the random switching.

    Raises:
        ValueError: an option out of its range, or a tensor that is not a matrix or too small for the ranks.
    """

    full_precision = frozenset({"Q_L", "Q_R", "p", "q", "e", "phi"})

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.02,
        *,
        betas: tuple[float, float, float] = (0.9, 0.9, 0.999),
        rank: int = 128,
        right_rank: int | None = None,
        leading: int = 40,
        update_interval: int = 200,
        scale: float = 0.3,
        compensation_scale: float = 0.4,
        limiter: float | None = 1.01,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        tracking: bool = True,
        switching: str = "complement",
        compensation: str = "optimal",
        update_times: str = "printed",
        fix_signs: bool = True,
        state_dtype: torch.dtype | str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            dict(
                lr=lr,
                betas=tuple(betas),
                rank=rank,
                right_rank=right_rank,
                leading=leading,
                update_interval=update_interval,
                scale=scale,
                compensation_scale=compensation_scale,
                limiter=limiter,
                eps=eps,
                weight_decay=weight_decay,
                tracking=tracking,
                switching=switching,
                compensation=compensation,
                update_times=update_times,
                fix_signs=fix_signs,
                state_dtype=state_dtype,
                seed=seed,
            ),
        )

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        least = min(ranks(group))
        check(group, "betas", lambda b: len(b) == 3 and all(0 <= x < 1 for x in b), "three numbers in [0, 1)")
        check(group, "rank", lambda r: r >= 1, "at least 1")
        check(group, "right_rank", lambda k: k is None or k >= 1, "at least 1, or None for rank")
        check(group, "leading", lambda l: 0 <= l <= least, f"between 0 and the smaller of the two ranks, {least}")
        check(group, "compensation_scale", lambda a: a >= 0, "at least 0")
        check(group, "switching", ("none", "complement"))
        check(group, "compensation", ("none", "optimal", "columns"))

    def check_matrix(self, name: str, shape: tuple[int, int], group: dict[str, Any]) -> None:
        for key, rank, side in zip(("rank", "right_rank"), ranks(group), shape, strict=True):
            if rank > side:
                raise ValueError(
                    f"{key} {rank} is larger than a side of {name}, which has {shape[0]} x {shape[1]} entries; "
                    f"set {key} to at most {side}, or give this tensor to Adam"
                )

    def init_state(self, shape: tuple[int, int], group: dict[str, Any]) -> dict[str, Tensor]:
        (m, n), (r, k) = shape, ranks(group)
        state = {"U": torch.zeros(m, r), "V": torch.zeros(n, k), "m": torch.zeros(r, k), "v": torch.zeros(r, k)}
        if group["tracking"]:
            state |= {"Q_L": torch.zeros(r, r), "Q_R": torch.zeros(k, k)}
        if group["compensation"] == "optimal":
            state |= {"p": torch.zeros(k), "q": torch.zeros(r), "e": torch.zeros(()), "phi": torch.zeros(())}
        if group["compensation"] == "columns":
            state |= {"p": torch.zeros(n), "q": torch.zeros(r), "phi": torch.zeros(())}
        return state

    def refresh(self, G: Tensor, state: dict[str, Tensor], group: dict[str, Any], ctx: Context) -> None:
        """New bases: Algorithm 2 on the rows, then on the columns, with draws from the same generators."""
        for basis, tracked, X in (("U", "Q_L", G), ("V", "Q_R", G.mT)):
            U_prev, Q_prev = state[basis], state.get(tracked)
            U = or_previous(partial(new_basis, X, U_prev, Q_prev, group, ctx), U_prev, ctx)
            if group["fix_signs"] and ctx.step > 1:
                U = align_signs(U, U_prev)
            if Q_prev is not None:  # into the new coordinates, so that Q~ remains U^T (tracked covariance) U
                R = U.mT @ U_prev
                state[tracked] = R @ Q_prev @ R.mT
            state[basis] = U

    def direction(self, G: Tensor, state: dict[str, Tensor], group: dict[str, Any], ctx: Context) -> Tensor:
        """U omega V^T + alpha_c C."""
        beta1, beta2, beta3 = group["betas"]
        U, V = state["U"], state["V"]

        UG, GV = U.mT @ G, G @ V
        sigma = U.mT @ GV
        if group["tracking"]:
            state["Q_L"] = beta3 * state["Q_L"] + (1 - beta3) * UG @ UG.mT
            state["Q_R"] = beta3 * state["Q_R"] + (1 - beta3) * GV.mT @ GV
        m = state["m"].mul_(beta1).add_(sigma, alpha=1 - beta1)
        v = state["v"].mul_(beta2).addcmul_(sigma, sigma, value=1 - beta2)
        omega = m / (v.sqrt() + group["eps"])
        low_rank = U @ omega @ V.mT

        if group["compensation"] == "none":
            return low_rank
        compensate = {"optimal": optimal_compensation, "columns": column_compensation}[group["compensation"]]
        C = compensate(G, U, V, UG, GV, state, beta1, group["eps"])
        C, state["phi"] = limit_growth(C, state["phi"], group["limiter"])
        return low_rank + group["compensation_scale"] * C


def ranks(group: dict[str, Any]) -> tuple[int, int]:
    """r and k."""
    return group["rank"], group["rank"] if group["right_rank"] is None else group["right_rank"]


def new_basis(X: Tensor, U_prev: Tensor, Q_prev: Tensor | None, group: dict[str, Any], ctx: Context) -> Tensor:
    """The next basis of the rows of X [B, m, n] (m > n as well), from Q = beta_3 U Q~ U^T + (1 - beta_3) X X^T.

    Args:
        X: the gradient, or its transpose for the right basis.
        U_prev: [B, m, r], the basis so far; 0 before the first refresh.
        Q_prev: Q~ [B, r, r], in the coordinates of ``U_prev``; None without tracking.

    Returns:
        [B, m, r], orthonormal.
    """
    m, r = U_prev.shape[-2:]
    beta3 = 0.0 if Q_prev is None else group["betas"][2]
    # Q is of the second order in X: at 1e-30 it would vanish in float32. Eigenvectors do not depend on the scale.
    c = X.abs().amax((-2, -1), keepdim=True)
    if Q_prev is not None:
        c = c.maximum(Q_prev.abs().amax((-2, -1), keepdim=True).sqrt())
    c = c.clamp_min(torch.finfo(X.dtype).tiny)
    X = X / c

    def Q(Y: Tensor) -> Tensor:
        QY = (1 - beta3) * (X @ (X.mT @ Y))
        return QY if Q_prev is None else QY + beta3 * (U_prev @ ((Q_prev / c / c) @ (U_prev.mT @ Y)))

    switching = group["switching"] != "none" and r < m  # with r = m there is nothing to switch to
    if ctx.step == 1 or not switching:
        ritz = eigenvectors_within(Q, torch.cat([X, U_prev], dim=-1), r)
    else:
        ritz = subspace_iteration(Q, U_prev)
    return switch(ritz, group["leading"], "complement", ctx.generators) if switching else ritz


def eigenvectors_within(A: Callable[[Tensor], Tensor], X: Tensor, r: int) -> Tensor:
    """EVD(A, r) of a symmetric A [m, m] whose range lies in that of X [B, m, N], without forming A if N < m.

    Rayleigh-Ritz on an orthonormal basis of X is exact there. Where X has fewer than r independent columns, QR fills up.
    """
    Z = thin_qr(X)
    return Z @ top_eigenvectors(Z.mT @ A(Z), r)


def optimal_compensation(
    G: Tensor,
    U: Tensor,
    V: Tensor,
    UG: Tensor,
    GV: Tensor,
    state: dict[str, Tensor],
    beta: float,
    eps: float,
) -> Tensor:
    """C of Theorem 1: each of the three discarded blocks with its optimal scales. Updates p [k], q [r] and e.

    Energies are taken from the residuals, not from differences of squares: bases kept in bfloat16 are orthonormal to
    three digits only (see ``low_rank.optimal_compensation``).
    """
    (m, r), (n, k) = U.shape[-2:], V.shape[-2:]
    lower = project_out(GV, U)  # U_c U_c^T G V
    upper = project_out(UG.mT, V).mT  # U^T G V_c V_c^T
    rest = G - U @ UG - lower @ V.mT  # U_c U_c^T G V_c V_c^T
    p = state["p"] = beta * state["p"] + (1 - beta) * lower.square().sum(-2)
    q = state["q"] = beta * state["q"] + (1 - beta) * upper.square().sum(-1)
    e = state["e"] = beta * state["e"] + (1 - beta) * rest.square().sum((-2, -1))
    return (
        (lower * inverse_root(p, m - r, eps).unsqueeze(-2)) @ V.mT
        + U @ (upper * inverse_root(q, n - k, eps).unsqueeze(-1))
        + rest * inverse_root(e, (m - r) * (n - k), eps)[:, None, None]
    )


def column_compensation(
    G: Tensor,
    U: Tensor,
    V: Tensor,
    UG: Tensor,
    GV: Tensor,
    state: dict[str, Tensor],
    beta: float,
    eps: float,
) -> Tensor:
    """C of section 5: Alice's for all that is outside U, by columns; the block U^T G V_c as above. Updates p [n], q."""
    (m, r), (n, k) = U.shape[-2:], V.shape[-2:]
    outside = G - U @ UG  # U_c U_c^T G
    upper = project_out(UG.mT, V).mT  # U^T G V_c V_c^T
    p = state["p"] = beta * state["p"] + (1 - beta) * outside.square().sum(-2)
    q = state["q"] = beta * state["q"] + (1 - beta) * upper.square().sum(-1)
    return outside * inverse_root(p, m - r, eps).unsqueeze(-2) + U @ (upper * inverse_root(q, n - k, eps).unsqueeze(-1))


def project_out(X: Tensor, U: Tensor) -> Tensor:
    """(I - U U^T) X, twice: where X lies in the range of U, what remains is rounding, and C will give it unit size.

    After one pass that rounding can point anywhere, even against X; after two it is orthogonal to U, hence harmless.
    """
    for _ in range(2):
        X = X - U @ (U.mT @ X)
    return X


def inverse_root(energy: Tensor, dimension: int, eps: float) -> Tensor:
    """(energy / dimension)^(-1/2): it gives a part of so many coordinates a root mean square of 1. 0 if there are none."""
    return math.sqrt(dimension) / (energy.sqrt() + eps)
