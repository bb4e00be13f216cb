"""Eigen-Adam: Adam in the eigenbasis of the gradient covariance (Algorithm 7 of arXiv 2502.07752)."""

from typing import Any

import torch
from torch import Tensor

from .base import Context, MatrixOptimizer, bias_correction, check
from .linalg import align_signs, or_previous, top_eigenvectors


class EigenAdam(MatrixOptimizer):
    r"""The update of the structure Diag_B(U D_i U^T): Adam's second moment in a shared eigenbasis.

    Also known as AdaDiag and one-sided SOAP. Each matrix W [m, n], m <= n (a taller one is transposed), is updated by

    .. math:: W \leftarrow W - \lambda U \frac{U^\top m}{\sqrt{v} + \epsilon}, \qquad
        m = \mathrm{EMA}_{\beta_1}(G),\; v = \mathrm{EMA}_{\beta_2}((U^\top G)^2),\;
        U = \mathrm{EVD}(\mathrm{EMA}_{\beta_3}(G G^\top)).

    State: Q and U [m, m], m and v [m, n]; 2 m^2 + 2mn numbers. The momentum is kept in the original space, v in
    the coordinates of U, and is not turned with it.

    Args:
        params: tensors [m, n], ``(name, tensor)`` pairs, or groups such as :func:`optimizers.partition` returns.
        lr: lambda.
        betas: beta_1 of m, beta_2 of v, beta_3 of Q.
        update_interval: K, steps between computations of U.
        update_times: "printed", t = 1, K, 2K, ...; "zero_based", t = 1, K + 1, 2K + 1, ...
        bias_correction: multiply the direction by sqrt(1 - beta_2^t) / (1 - beta_1^t); the paper has none.
        fix_signs: choose the signs of a new basis by those of the old one. Here that changes U only: neither v nor
            the update depends on them.
        eps: added to the square root of v (the paper prints none).
        weight_decay: decoupled, multiplied by lr.
        state_dtype: dtype of U, m and v; None for the parameter's, as in the paper. Q is float32.

    Raises:
        ValueError: an option out of its range, or a tensor that is not a matrix.
        torch.linalg.LinAlgError: the gradient is not finite.
    """

    full_precision = frozenset({"Q"})

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float, float] = (0.9, 0.9, 0.999),
        update_interval: int = 200,
        update_times: str = "printed",
        bias_correction: bool = False,
        fix_signs: bool = True,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state_dtype: torch.dtype | str | None = None,
    ) -> None:
        super().__init__(
            params,
            dict(
                lr=lr,
                betas=tuple(betas),
                update_interval=update_interval,
                update_times=update_times,
                bias_correction=bias_correction,
                fix_signs=fix_signs,
                eps=eps,
                weight_decay=weight_decay,
                state_dtype=state_dtype,
            ),
        )

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check(group, "betas", lambda b: len(b) == 3 and all(0 <= x < 1 for x in b), "three numbers in [0, 1)")

    def init_state(self, shape: tuple[int, int], group: dict[str, Any]) -> dict[str, Tensor]:
        m, n = shape
        return {"Q": torch.zeros(m, m), "U": torch.zeros(m, m), "m": torch.zeros(m, n), "v": torch.zeros(m, n)}

    def refresh(self, G: Tensor, state: dict[str, Tensor], group: dict[str, Any], ctx: Context) -> None:
        """U = EVD(Q), with the Q that ``direction`` will store for this step."""
        Q = state["Q"].lerp(G @ G.mT, 1 - group["betas"][2])
        U = or_previous(lambda: top_eigenvectors(Q, Q.shape[-1]), state["U"], ctx)
        state["U"] = align_signs(U, state["U"]) if group["fix_signs"] and ctx.step > 1 else U

    def direction(self, G: Tensor, state: dict[str, Tensor], group: dict[str, Any], ctx: Context) -> Tensor:
        """Algorithm 7 but for the basis."""
        beta1, beta2, beta3 = group["betas"]
        U = state["U"]
        state["Q"].lerp_(G @ G.mT, 1 - beta3)
        m = state["m"].mul_(beta1).add_(G, alpha=1 - beta1)
        sigma = U.mT @ G
        v = state["v"].mul_(beta2).addcmul_(sigma, sigma, value=1 - beta2)
        return U @ ((U.mT @ m) / (v.sqrt() + group["eps"]))

    def factor(self, shape: torch.Size, group: dict[str, Any], ctx: Context) -> float | Tensor:
        """lambda alpha, and c_t if asked for."""
        factor = super().factor(shape, group, ctx)
        return factor * bias_correction(ctx.step, *group["betas"][:2]) if group["bias_correction"] else factor
