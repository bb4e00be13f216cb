"""Apollo: the raw gradient, scaled as Adam scales its random projection (Zhu et al. 2024, arXiv 2412.05270)."""

from typing import Any

import torch
from torch import Tensor

from .alice import PARTS_OFF, Alice
from .base import Context, MatrixOptimizer, check, last_update_time
from .factored import Factored
from .limiter import growth_limit
from .low_rank import column_energy, draw_gaussian


class Apollo(Alice):
    r"""SGD whose columns get the scale that Adam gives them in a small space (Algorithm 9 of arXiv 2502.07752).

    Each matrix W [m, n], m <= n (a taller one is transposed), is updated by

    .. math:: W \leftarrow W - \lambda \alpha c_t\, \eta\, G\, \mathrm{Diag}(s), \qquad
              s_j = \|\omega_j\| / \|\sigma_j\|,

    with sigma = U^T G [r, n], omega = m / (sqrt(v) + eps) from the moments of sigma,
    c_t = sqrt(1 - beta_2^t) / (1 - beta_1^t) and eta from the limiter. This is :class:`Alice` with tracking and switching
    off and another last line: nothing is projected back. Algorithm 9 prints s over 0..m; there are n columns.

    State: m and v, 2nr numbers; U is drawn from its seed at every step, unless ``store_projection``. Apollo-svd has U as
    well (mr). Apollo-mini is ``rank=1, scaling="tensor"``, 2n numbers (Table 6 has 2 more, for the seed and the limiter).

    Args:
        params, lr, rank, update_interval, weight_decay: see :class:`Alice`.
        betas: beta_1 and beta_2.
        scale: alpha, sqrt(128) for Apollo-mini. (The published code multiplies by the root of what it calls scale.)
        projection: "gaussian", U with independent N(0, 1/r) entries; "svd", the leading left singular vectors of G.
        scaling: "columns", one s for each column; "tensor", ||omega|| / ||sigma|| for the whole matrix.
        limiter: gamma, the most that the norm of the update may grow in a step (1.01 in the published code, not printed in
            Algorithm 9); None for no limit.
        eps: added to the square root of v.
        bias_correction: the factor c_t.
        update_times: "zero_based", t = 1, K + 1, 2K + 1, ...; or "printed", t = 1, K, 2K, ...
        square: side of a square matrix that is projected, "columns" or "rows".
        store_projection: keep a Gaussian U in the state, mr numbers more: drawing it on the CPU at every step takes time
            that a GPU waits for.
        state_dtype: of m, v and a stored U; None for the parameter's, "8bit" for codes of m and v.
        products: see :class:`Alice`.
        seed: of the random projections.

    Raises:
        ValueError: an option out of its range, or a tensor that is not a matrix or too small for the rank.
    """

    tracks = False
    compilable = False

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.01,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        rank: int = 128,
        update_interval: int = 200,
        scale: float = 1.0,
        projection: str = "gaussian",
        scaling: str = "columns",
        limiter: float | None = None,
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        update_times: str = "zero_based",
        square: str = "columns",
        store_projection: bool = False,
        state_dtype: torch.dtype | str | None = None,
        products: str = "float32",
        seed: int = 0,
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
                "projection": projection,
                "scaling": scaling,
                "limiter": limiter,
                "eps": eps,
                "weight_decay": weight_decay,
                "bias_correction": bias_correction,
                "update_times": update_times,
                "square": square,
                "store_projection": store_projection,
                "state_dtype": state_dtype,
                "products": products,
                "seed": seed,
            },
        )

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check(group, "projection", ("gaussian", "svd"))
        check(group, "scaling", ("columns", "tensor"))

    def init_state(self, shape: tuple[int, int], group: dict[str, Any]) -> dict[str, Tensor]:
        state = super().init_state(shape, group)
        if group["projection"] == "gaussian" and not group["store_projection"]:
            del state["U"]
        if group["limiter"] is not None:
            state["phi"] = torch.zeros(())
        return state

    def refresh(self, G: Tensor, state: dict[str, Tensor], group: dict[str, Any], ctx: Context) -> None:
        if group["projection"] == "svd":
            super().refresh(G, state, group, ctx)
        elif group["store_projection"]:
            state["U"] = self.draw(G, group, ctx)

    def needs_energy(self, group: dict[str, Any]) -> bool:
        return True

    def basis(self, G: Tensor, state: dict[str, Tensor], group: dict[str, Any], ctx: Context) -> Tensor:
        return state["U"] if "U" in state else self.draw(G, group, ctx)

    def draw(self, G: Tensor, group: dict[str, Any], ctx: Context) -> Tensor:
        """U [B, m, r], independent N(0, 1/r) entries, as drawn at the last update time."""
        step = last_update_time(ctx.step, group["update_interval"], group["update_times"])
        X = draw_gaussian(G.shape[-2], group["rank"], ctx.generators_of(step))
        return (X / group["rank"] ** 0.5).to(G)

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
        """eta G Diag(s), with norms of G / c, whose squares float32 can hold."""
        c, X, projection = ctx.moderate(G, sigma)
        whole, in_space, projected = ctx.energy_of(X), column_energy(omega), column_energy(projection)
        if group["scaling"] == "tensor":
            whole, in_space, projected = (x.sum(-1, keepdim=True) for x in (whole, in_space, projected))
        # A column that U misses altogether would be divided by rounding errors.
        least = torch.finfo(sigma.dtype).tiny ** 0.5
        s = in_space.sqrt() / projected.sqrt().maximum(1e-8 * whole.sqrt()).clamp_min(least)
        s = s.where(whole > 0, 0.0)
        columns = s.unsqueeze(-2) / c
        if group["limiter"] is not None:
            eta, state["phi"] = growth_limit((whole * s.square()).sum(-1).sqrt(), state["phi"], group["limiter"])
            columns = columns * eta
        return Factored(G=G, columns=columns)
