"""Alice: adaptive low-dimensional subspace estimation (Algorithm 4 of arXiv 2502.07752)."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import PRODUCTS, Context, MatrixOptimizer, bias_correction, check
from .factored import Factored
from .limiter import growth_limit
from .linalg import (
    align_signs,
    or_previous,
    product,
    subspace_iteration,
    thin_qr,
    top_eigenvectors,
    unit_scale,
)
from .low_rank import (
    COMPENSATION,
    SWITCHING,
    adam_quotient,
    basis_cosines,
    draw_gaussian,
    fira_scaling,
    is_rounded,
    matching,
    optimal_compensation,
    residual_energy,
    rounding,
    switch,
    unit_gaussian,
    with_residual,
)

# Alice's options with every part off: from here GaLore, Fira and Apollo start.
PARTS_OFF: dict[str, Any] = {
    "leading": 0,
    "tracking": False,
    "switching": "none",
    "compensation": "none",
    "compensation_scale": 0.0,
    "limiter": None,
    "initial_basis": "evd",
    "tracking_basis": "printed",
    "fix_signs": False,
    "products": "float32",
}


class Alice(MatrixOptimizer):
    r"""Low-rank Eigen-Adam with tracking, switching and optimal compensation.

    Each matrix W [m, n], m <= n (a taller one is transposed), is updated by

    .. math:: W \leftarrow W - \lambda \alpha (U \omega + \alpha_c C).

    The defaults are Algorithm 4 as printed, with the values of Table 11 for 60M parameters; neither moment is
    bias-corrected. What the print leaves open is an option whose default says what we read. State: U, m, v, Q~, p and
    phi, mr + 2nr + r^2 + n + 1 numbers.

    Args:
        params: tensors [m, n], ``(name, tensor)`` pairs, or groups such as :func:`optimizers.partition` returns.
        lr: lambda.
        betas: beta_1 of the first moment and of p, beta_2 of the second moment, beta_3 of the tracked Q~.
        rank: r, at most the smaller side.
        leading: l, the eigenvectors kept at a switch, at most r.
        update_interval: K, steps between refreshes of the basis.
        scale: alpha.
        compensation_scale: alpha_c.
        limiter: gamma, the most that the norm of C may grow in a step; None for no limit.
        eps: added to the square roots of v and of p (the paper prints none).
        weight_decay: decoupled, multiplied by lr.
        tracking: keep Q~ (Eq. 17); False is Alice-0, the same algorithm with beta_3 = 0.
        switching: "complement" (Algorithm 2), "none" (U = EVD(Q, r)), or the rivals of Figure 5b, "full_basis",
            "gaussian_mix", "gaussian".
        compensation: "optimal" (Algorithm 3), "none", or the rivals of Figure 5c: "fira", which compensation_scale does not
            multiply, and "fira_plus", whose norm is that of U omega, so that the limiter has nothing to do.
        initial_basis: what the first refresh starts from, where ``switching`` keeps Ritz vectors. "evd": the singular vectors
            of the first gradient, as the text of section 5 means; "gaussian": a random orthonormal U_0; "zeros": U_0 = 0 as
            printed, whose QR gives the first r unit vectors, within which the first refresh then turns.
        tracking_basis: at a refresh "printed" keeps the numbers of Q~, although they belong to the old basis;
            "rotated" expresses it in the new one.
        update_times: "printed", t = 1, K, 2K, ...; "zero_based", t = 1, K + 1, 2K + 1, ... as GaLore's code.
        fix_signs: choose the signs of a new basis by those of the old one (see ``linalg.align_signs``).
        bias_correction: multiply the update by sqrt(1 - beta_2^t) / (1 - beta_1^t), as in Adam; the paper does not. It is
            right for omega only: C, whose p starts at 0 too, is larger than later on without it, and still larger with it.
        square: side of a square matrix that is projected: its "rows", as the paper's m <= n says, or its "columns", as
            the code of GaLore, Fira and Apollo does.
        state_dtype: dtype of U, m and v; None for the parameter's, as in the paper; "8bit" for block-wise codes of m and v.
            Q~, p and phi are float32.
        products: what the products with U are computed from: "float32" (float64 for float64 parameters), or "bfloat16",
            faster where the hardware has it, which makes errors of 0.4 % of the largest entries; gradients and
            parameters in bfloat16 are then not widened. Refreshes are computed in float32 whatever this says.
        seed: of the random switching.
        log_basis: collect in ``basis_log``, at each update of a basis but the first, the names of the matrices and
            ``low_rank.basis_cosines`` (Figure 6). Changes nothing else; who asks for it has to empty the list.

    Raises:
        ValueError: an option out of its range, or a tensor that is not a matrix or too small for the rank.
    """

    full_precision = frozenset({"Q", "p", "phi"})
    as_stored = frozenset({"U", "m", "v"})
    moments: ClassVar[dict[str, bool]] = {"m": True, "v": False}
    tracks = True  # False: a method without beta_3
    basis_log: list[tuple[tuple[str, ...], Tensor]] | None = None  # of log_basis: names [B], cosines [B, 4]

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.02,
        *,
        betas: tuple[float, float, float] = (0.9, 0.9, 0.999),
        rank: int = 128,
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
        initial_basis: str = "evd",
        tracking_basis: str = "printed",
        update_times: str = "printed",
        fix_signs: bool = True,
        bias_correction: bool = False,
        square: str = "rows",
        state_dtype: torch.dtype | str | None = None,
        products: str = "float32",
        seed: int = 0,
        log_basis: bool = False,
    ) -> None:
        self.basis_log = [] if log_basis else None
        super().__init__(
            params,
            dict(
                lr=lr,
                betas=tuple(betas),
                rank=rank,
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
                initial_basis=initial_basis,
                tracking_basis=tracking_basis,
                update_times=update_times,
                fix_signs=fix_signs,
                bias_correction=bias_correction,
                square=square,
                state_dtype=state_dtype,
                products=products,
                seed=seed,
            ),
        )

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        count, words = (3, "three") if self.tracks else (2, "two")
        check(group, "betas", lambda b: len(b) == count and all(0 <= x < 1 for x in b), f"{words} numbers in [0, 1)")
        check(group, "rank", lambda r: r >= 1, "at least 1")
        check(group, "leading", lambda l: 0 <= l <= group["rank"], f"between 0 and rank = {group['rank']}")
        check(group, "compensation_scale", lambda a: a >= 0, "at least 0")
        check(group, "switching", SWITCHING)
        check(group, "compensation", COMPENSATION)
        check(group, "initial_basis", ("evd", "gaussian", "zeros"))
        check(group, "tracking_basis", ("printed", "rotated"))
        check(group, "products", PRODUCTS)

    def check_matrix(self, name: str, shape: tuple[int, int], group: dict[str, Any]) -> None:
        if group["rank"] > min(shape):
            raise ValueError(
                f"rank {group['rank']} is larger than the smaller side of {name} {list(shape)}; "
                f"set rank to at most {min(shape)}, or give this tensor to Adam"
            )

    def init_state(self, shape: tuple[int, int], group: dict[str, Any]) -> dict[str, Tensor]:
        (m, n), r = shape, group["rank"]
        state = {"U": torch.zeros(m, r), "m": torch.zeros(r, n), "v": torch.zeros(r, n)}
        if group["tracking"]:
            state["Q"] = torch.zeros(r, r)
        if group["compensation"] == "optimal":
            state["p"] = torch.zeros(n)
        if group["compensation"] in ("optimal", "fira"):
            state["phi"] = torch.zeros(())
        return state

    def refresh(self, G: Tensor, state: dict[str, Tensor], group: dict[str, Any], ctx: Context) -> None:
        """Lines 6 and 7 of Algorithm 4: the reconstructed covariance Q and the new basis U."""
        U_prev = state["U"]
        U = or_previous(lambda: self.new_basis(G, state, group, ctx), U_prev, ctx)
        if group["fix_signs"] and ctx.step > 1:
            U = align_signs(U, U_prev)
        if self.basis_log is not None and ctx.step > 1:
            self.basis_log.append((ctx.names, basis_cosines(U_prev, U)))
        if group["tracking"] and group["tracking_basis"] == "rotated":
            R = U.mT @ U_prev
            state["Q"] = R @ state["Q"] @ R.mT
        state["U"] = U

    def new_basis(self, G: Tensor, state: dict[str, Tensor], group: dict[str, Any], ctx: Context) -> Tensor:
        """U [B, m, r] from Q = beta_3 U Q~ U^T + (1 - beta_3) G G^T, by Algorithm 2 or one of its rivals."""
        m, r = state["U"].shape[-2:]
        if ctx.step == 1 or not group["tracking"]:  # Q is a multiple of G G^T, and squares of 1e-20 leave float32
            G = unit_scale(G)
        U_prev, beta3 = state["U"], group["betas"][2] if group["tracking"] else 0.0
        # With r = m there is nothing to switch to.
        switching = "none" if r == m and group["switching"] in ("complement", "full_basis") else group["switching"]
        if switching == "gaussian":
            return unit_gaussian(m, r, ctx.generators).to(G)
        if ctx.step == 1 and group["initial_basis"] == "gaussian" and switching != "none":
            U_prev = thin_qr(draw_gaussian(m, r, ctx.generators).to(G))

        def Q(X: Tensor) -> Tensor:
            """Q X, in O(mnr): Q itself is m x m."""
            QX = (1 - beta3) * (G @ (G.mT @ X))
            return QX + beta3 * (U_prev @ (state["Q"] @ (U_prev.mT @ X))) if beta3 else QX

        if switching == "none":
            tracked = beta3 * (U_prev @ state["Q"] @ U_prev.mT) if beta3 else 0.0
            return top_eigenvectors((1 - beta3) * (G @ G.mT) + tracked, r)
        first = ctx.step == 1 and group["initial_basis"] == "evd"
        ritz = top_eigenvectors(G @ G.mT, r) if first else subspace_iteration(Q, U_prev)
        return switch(ritz, group["leading"], switching, ctx.generators)

    def needs_energy(self, group: dict[str, Any]) -> bool:
        return group["compensation"] != "none"

    def direction(self, G: Tensor, state: dict[str, Tensor], group: dict[str, Any], ctx: Context) -> Factored:
        """Lines 11 to 17 of Algorithm 4."""
        U = self.basis(G, state, group, ctx)
        if group["products"] == "bfloat16":
            U = U.bfloat16()

        sigma = product(U.mT, G.to(U.dtype))  # line 11
        if group["tracking"]:
            state["Q"].lerp_(product(sigma, sigma.mT).to(state["Q"].dtype), 1 - group["betas"][2])  # line 12
        sigma = sigma.to(state["m"].dtype)
        omega = adam_quotient(sigma, state["m"], state["v"], group["betas"][:2], group["eps"])  # lines 13 to 15
        return self.compose(G, U, sigma, omega, state, group, ctx)  # lines 16 and 17

    def factor(self, shape: torch.Size, group: dict[str, Any], ctx: Context) -> float | Tensor:
        """lambda alpha, and c_t if asked for."""
        factor = super().factor(shape, group, ctx)
        return factor * bias_correction(ctx.step, *group["betas"][:2]) if group["bias_correction"] else factor

    def basis(self, G: Tensor, state: dict[str, Tensor], group: dict[str, Any], ctx: Context) -> Tensor:
        """U [B, m, r], as the last refresh left it."""
        return state["U"]

    def compose(
        self,
        G: Tensor,
        U: Tensor,
        sigma: Tensor,
        omega: Tensor,
        state: dict[str, Tensor],
        group: dict[str, Any],
        ctx: Context,
    ) -> Factored:
        """Line 16, and the sum of line 17: U omega + alpha_c C."""
        m, r = U.shape[-2:]
        if group["compensation"] == "none" or r == m:  # with r = m nothing is left to compensate for
            return Factored(U=U, R=omega)
        gamma, eps, alpha_c = group["limiter"], group["eps"], group["compensation_scale"]
        accuracy = rounding(U, ctx), "gaussian" not in group["switching"] and not is_rounded(U, ctx)
        residual = residual_energy(G, U, sigma, *accuracy, whole=ctx.energy_of(G))
        if group["compensation"] == "optimal":
            c, state["p"], state["phi"] = optimal_compensation(
                residual, m - r, state["p"], state["phi"], group["betas"][0], gamma, eps
            )
            return with_residual(U, omega, G, sigma, alpha_c * c)  # C = (G - U sigma) Diag(c)
        s = fira_scaling(sigma, omega, eps)
        if group["compensation"] == "fira":
            norm = (residual * s.square().squeeze(-2)).sum(-1).sqrt()  # of S = (G - U sigma) Diag(s)
            eta, state["phi"] = growth_limit(norm, state["phi"], gamma)
            return with_residual(U, omega, G, sigma, s * eta)
        return with_residual(U, omega, G, sigma, alpha_c * s * matching(G, U, sigma, omega, s, accuracy))
