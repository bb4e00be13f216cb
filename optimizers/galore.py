"""GaLore: gradient low-rank projection (Zhao et al. 2024, arXiv 2403.03507; Algorithm 8 of arXiv 2502.07752)."""

from typing import Any

import torch
from torch import Tensor

from .alice import PARTS_OFF, Alice
from .base import MatrixOptimizer


class GaLore(Alice):
    r"""Adam in the span of the leading left singular vectors of the gradient.

    Each matrix W [m, n], m <= n (a taller one is transposed), is updated by

    .. math:: W \leftarrow W - \lambda \alpha c_t\, U \omega, \qquad \omega = m / (\sqrt{v} + \epsilon),

    where m and v are the moments of U^T G and c_t = sqrt(1 - beta_2^t) / (1 - beta_1^t). This is :class:`Alice` with
    tracking, switching and compensation off: what is outside the subspace is discarded. State: U, m, v, that is
    mr + 2nr numbers. The defaults are those of the published code (its settings for pretraining); Table 7 has the paper's
    rates. The printed Algorithm 8 is ``bias_correction=False, update_times="printed", square="rows"``.

    Args:
        params, lr, rank, update_interval, weight_decay: see :class:`Alice`.
        betas: beta_1 and beta_2.
        scale: alpha.
        eps: added to the square root of v.
        bias_correction: the factor c_t; False leaves it out, as Algorithm 8 prints.
        update_times: "zero_based", t = 1, K + 1, 2K + 1, ...; or "printed", t = 1, K, 2K, ...
        square: side of a square matrix that is projected, "columns" or "rows".
        state_dtype: of U, m and v; None for the parameter's. "8bit" keeps m and v in block-wise 8-bit codes
            (8-bit GaLore) and U in the parameter's dtype.
        products, log_basis: see :class:`Alice`.

    Raises:
        ValueError: an option out of its range, or a tensor that is not a matrix or too small for the rank.
    """

    tracks = False

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.01,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        rank: int = 128,
        update_interval: int = 200,
        scale: float = 0.25,
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        update_times: str = "zero_based",
        square: str = "columns",
        state_dtype: torch.dtype | str | None = None,
        products: str = "float32",
        log_basis: bool = False,
    ) -> None:
        self.basis_log = [] if log_basis else None
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
                "eps": eps,
                "weight_decay": weight_decay,
                "bias_correction": bias_correction,
                "update_times": update_times,
                "square": square,
                "state_dtype": state_dtype,
                "products": products,
            },
        )
