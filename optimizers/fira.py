"""Fira: full-rank training under a low-rank constraint (Chen et al. 2024, arXiv 2410.01623)."""

from typing import Any

import torch
from torch import Tensor

from .alice import PARTS_OFF, Alice
from .base import Context, MatrixOptimizer, check
from .factored import Factored
from .limiter import growth_limit
from .low_rank import fira_scaling, is_rounded, residual_energy, rounding, with_residual


class Fira(Alice):
    r"""GaLore, and the residual scaled column by column as Adam scales the projection.

    Each matrix W [m, n], m <= n (a taller one is transposed), is updated by

    .. math:: W \leftarrow W - \lambda c_t (\alpha U \omega + \eta S), \qquad
              S = (G - U \sigma)\, \mathrm{Diag}(\|\omega_i\| / \|\sigma_i\|),

    with sigma = U^T G, omega = m / (sqrt(v) + eps), eta from the norm-growth limiter and
    c_t = sqrt(1 - beta_2^t) / (1 - beta_1^t). This is :class:`Alice` with tracking and switching off and another
    compensation, which alpha does not scale. State: U, m, v and phi, that is mr + 2nr + 1 numbers. Defaults: the published
    code's but for ``residual``; Table 7 has the paper's rates.

    Args:
        params, lr, rank, update_interval, weight_decay: see :class:`Alice`.
        betas: beta_1 and beta_2.
        scale: alpha, of the low-rank part only.
        limiter: gamma, the most that the norm of S may grow in a step; None for no limit.
        eps: added to the square root of v.
        residual: "exact", G - U U^T G as in the paper; "scaled", G - alpha U U^T G as in the published code, where
            projecting back multiplies by alpha.
        bias_correction: the factor c_t.
        update_times: "zero_based", t = 1, K + 1, 2K + 1, ...; or "printed", t = 1, K, 2K, ...
        square: side of a square matrix that is projected, "columns" or "rows".
        state_dtype: of U, m and v; None for the parameter's, "8bit" for codes of m and v.
        products: see :class:`Alice`.

    Raises:
        ValueError: an option out of its range, or a tensor that is not a matrix or too small for the rank.
    """

    tracks = False
    applies_scale = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.01,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        rank: int = 128,
        update_interval: int = 200,
        scale: float = 0.25,
        limiter: float | None = 1.01,
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        residual: str = "exact",
        bias_correction: bool = True,
        update_times: str = "zero_based",
        square: str = "columns",
        state_dtype: torch.dtype | str | None = None,
        products: str = "float32",
    ) -> None:
        MatrixOptimizer.__init__(
            self,
            params,
            {
                **PARTS_OFF,
                "lr": lr,
                "betas": tuple(betas),
                "rank": rank,
                "update_interval": update_interval,
                "scale": scale,
                "limiter": limiter,
                "eps": eps,
                "weight_decay": weight_decay,
                "compensation": "fira",
                "bias_correction": bias_correction,
                "update_times": update_times,
                "square": square,
                "state_dtype": state_dtype,
                "products": products,
                "residual": residual,
            },
        )

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check(group, "residual", ("exact", "scaled"))

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
        """alpha U omega + eta S."""
        alpha = group["scale"]
        kept = alpha if group["residual"] == "scaled" else 1.0
        s = fira_scaling(sigma, omega, 1e-8)
        energy = residual_energy(G, U, sigma, rounding(U, ctx), not is_rounded(U, ctx), kept, ctx.energy_of(G))
        eta, state["phi"] = growth_limit(
            (energy * s.square().squeeze(-2)).sum(-1).sqrt(), state["phi"], group["limiter"]
        )
        return with_residual(U, alpha * omega, G, sigma, s * eta, kept)
