"""Muon: orthogonalised momentum (Jordan et al. 2024; App. B.9 of arXiv 2502.07752)."""

import math
from typing import Any

import torch
from torch import Tensor

from .base import Context, MatrixOptimizer, check
from .linalg import quintic
from .whitening import whiten


class Muon(MatrixOptimizer):
    r"""The momentum with its singular values made (about) equal.

    Each matrix W [m, n], m <= n (a taller one is transposed), is updated by

    .. math:: m \leftarrow \beta m + (1 - \beta) G, \qquad W \leftarrow W - \lambda c\, \mathrm{Ortho}(M),

    where M is m, or with Nesterov's momentum (1 - beta) G + beta m. The defaults agree with ``torch.optim.Muon``,
    but for lr and weight_decay. Eq. 33 is ``momentum=0.9, nesterov=False, orthogonalization="newton_schulz",
    adjust_lr_fn="none"``. State: m [m, n], mn numbers.

    Args:
        params: tensors [m, n], ``(name, tensor)`` pairs, or groups such as :func:`optimizers.partition` returns.
        lr: lambda.
        momentum: beta.
        nesterov: look one step ahead.
        orthogonalization: "quintic", the reference's polynomial iteration, which stops at singular values of about
            0.7 to 1.2; "newton_schulz", the iteration of App. B.8; "evd", exact up to rounding.
        ns_steps: of either iteration.
        adjust_lr_fn: c, from the shape of W as it is stored: "original", sqrt(max(1, rows / columns));
            "match_rms_adamw", 0.2 sqrt(max(rows, columns)); "none", 1.
        ns_dtype: what the quintic iteration computes in: "bfloat16" as the reference, or "float32" (float64 for
            float64 parameters), in which the other two always do.
        eps: the least Frobenius norm that the quintic iteration divides by, as in the reference: momenta that are
            smaller shrink the update.
        weight_decay: decoupled, multiplied by lr (not by c).
        state_dtype: dtype of m; None for the parameter's.

    Raises:
        ValueError: an option out of its range, or a tensor that is not a matrix.
        torch.linalg.LinAlgError: the gradient is not finite and ``orthogonalization`` is "evd".
    """

    bounds = False  # no square of G is kept, and a limit would change the weights of an average

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.02,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        orthogonalization: str = "quintic",
        ns_steps: int = 5,
        adjust_lr_fn: str = "original",
        ns_dtype: str = "bfloat16",
        eps: float = 1e-7,
        weight_decay: float = 0.0,
        state_dtype: torch.dtype | str | None = None,
    ) -> None:
        super().__init__(
            params,
            dict(
                lr=lr,
                momentum=momentum,
                nesterov=nesterov,
                orthogonalization=orthogonalization,
                ns_steps=ns_steps,
                adjust_lr_fn=adjust_lr_fn,
                ns_dtype=ns_dtype,
                eps=eps,
                weight_decay=weight_decay,
                state_dtype=state_dtype,
            ),
        )

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check(group, "momentum", lambda b: 0 <= b < 1, "in [0, 1)")
        check(group, "orthogonalization", ("quintic", "newton_schulz", "evd"))
        check(group, "ns_steps", lambda i: i >= 1, "at least 1")
        check(group, "adjust_lr_fn", ("original", "match_rms_adamw", "none"))
        check(group, "ns_dtype", ("bfloat16", "float32"))

    def init_state(self, shape: tuple[int, int], group: dict[str, Any]) -> dict[str, Tensor]:
        return {"m": torch.zeros(shape)}

    def direction(self, G: Tensor, state: dict[str, Tensor], group: dict[str, Any], ctx: Context) -> Tensor:
        """Eq. 33, or the reference's quintic form of it."""
        beta, steps = group["momentum"], group["ns_steps"]
        m = state["m"].lerp_(G, 1 - beta)
        M = G.lerp(m, beta) if group["nesterov"] else m
        if group["orthogonalization"] == "quintic":
            return quintic(M.bfloat16() if group["ns_dtype"] == "bfloat16" else M, steps, group["eps"])
        return whiten(M, group["orthogonalization"], steps)

    def factor(self, shape: torch.Size, group: dict[str, Any], ctx: Context) -> float | Tensor:
        """lambda c."""
        rows, columns = shape
        return super().factor(shape, group, ctx) * learning_rate_factor(rows, columns, group["adjust_lr_fn"])


def learning_rate_factor(rows: int, columns: int, rule: str) -> float:
    """c, by the name that torch.optim.Muon gives to the rule."""
    if rule == "original":
        return math.sqrt(max(1, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns)) if rule == "match_rms_adamw" else 1.0
