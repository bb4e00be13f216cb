"""Shampoo (Gupta et al. 2018; Algorithm 5 of arXiv 2502.07752)."""

from typing import Any

import torch
from torch import Tensor

from .base import Context, MatrixOptimizer, check, is_update_time
from .linalg import inverse_root, or_previous


class Shampoo(MatrixOptimizer):
    r"""The gradient preconditioned by roots of its two summed Gram matrices.

    Each matrix W [m, n], m <= n (a taller one is transposed), is updated by

    .. math::
        L \leftarrow L + G G^\top, \qquad R \leftarrow R + G^\top G, \qquad
        W \leftarrow W - \lambda L^{-1/4} G R^{-1/4}

    from L = eps I_m and R = eps I_n (Algorithm 5, which prints + lambda; a descent is meant). With ``power=0.5`` the
    direction is Trace(L)^(1/2) L^(-1/2) G R^(-1/2) (Vyas et al. 2024, Algorithm 1).

    State: L and R, m^2 + n^2 numbers in float32; as many again for their roots if ``update_interval`` > 1; mn for the
    momentum. Leave matrices with a side of 10^4 to Adam.

    Args:
        params: tensors [m, n], ``(name, tensor)`` pairs, or groups such as :func:`optimizers.partition` returns.
        lr: lambda.
        power: of L and R, without its sign: 0.25 or 0.5.
        beta: None for sums; else of averages, L = beta L + (1 - beta) G G^T, in which eps I fades away.
        eps: of L_0 and R_0.
        update_interval: steps between computations of the roots.
        update_times: "printed", t = 1, K, 2K, ...; "zero_based", t = 1, K + 1, 2K + 1, ...
        momentum: of an average of the gradients that is preconditioned in place of G; 0 for none.
        weight_decay: decoupled, multiplied by lr.
        state_dtype: dtype of the momentum; None for the parameter's.

    Raises:
        ValueError: an option out of its range, or a tensor that is not a matrix.
        torch.linalg.LinAlgError: the gradient is not finite.
    """

    full_precision = frozenset({"L", "R", "L_root", "R_root"})
    compilable = False

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.02,
        *,
        power: float = 0.25,
        beta: float | None = None,
        eps: float = 1e-6,
        update_interval: int = 1,
        update_times: str = "printed",
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        state_dtype: torch.dtype | str | None = None,
    ) -> None:
        super().__init__(
            params,
            dict(
                lr=lr,
                power=power,
                beta=beta,
                eps=eps,
                update_interval=update_interval,
                update_times=update_times,
                momentum=momentum,
                weight_decay=weight_decay,
                state_dtype=state_dtype,
            ),
        )

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check(group, "power", lambda x: x in (0.25, 0.5), "0.25 or 0.5")
        check(group, "beta", lambda b: b is None or 0 <= b < 1, "in [0, 1), or None for sums")
        check(group, "momentum", lambda b: 0 <= b < 1, "in [0, 1)")

    def init_state(self, shape: tuple[int, int], group: dict[str, Any]) -> dict[str, Tensor]:
        m, n = shape
        eps = group["eps"]
        state = {"L": eps * torch.eye(m, dtype=torch.float64), "R": eps * torch.eye(n, dtype=torch.float64)}
        if group["update_interval"] > 1:
            state |= {"L_root": torch.zeros(m, m), "R_root": torch.zeros(n, n)}
        if group["momentum"]:
            state["m"] = torch.zeros(m, n)
        return state

    def direction(self, G: Tensor, state: dict[str, Tensor], group: dict[str, Any], ctx: Context) -> Tensor:
        """Algorithm 5. The roots are computed here, not in ``refresh``, as they need this step's L and R."""
        old, new = (1.0, 1.0) if group["beta"] is None else (group["beta"], 1 - group["beta"])
        L = state["L"].mul_(old).add_(G @ G.mT, alpha=new)
        R = state["R"].mul_(old).add_(G.mT @ G, alpha=new)
        roots = {name: state[name] for name in ("L_root", "R_root") if name in state}
        if not roots or is_update_time(ctx.step, group["update_interval"], group["update_times"]):
            power = group["power"]
            # For 1/2, Trace(L)^(1/2) belongs to the root of L, whichever step that is of.
            trace = L.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(torch.finfo(L.dtype).tiny)[:, None, None]
            roots = {
                "L_root": root(L / trace if power == 0.5 else L, power, roots.get("L_root"), ctx),
                "R_root": root(R, power, roots.get("R_root"), ctx),
            }
            state.update({name: value for name, value in roots.items() if name in state})
        if group["momentum"]:
            G = state["m"].mul_(group["momentum"]).add_(G, alpha=1 - group["momentum"])
        return roots["L_root"] @ G @ roots["R_root"]


def root(A: Tensor, power: float, previous: Tensor | None, ctx: Context) -> Tensor:
    """A^(-power); should no solver converge, the previous root, or that of the mean eigenvalue times I."""
    mean = A.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(A.dtype).tiny)[:, None, None]
    isotropic = mean.pow(-power) * torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    previous = isotropic if previous is None else previous
    return or_previous(lambda: inverse_root(A, power), previous, ctx, first=isotropic)
