"""Sophia: clipped second-order updates (Liu et al. 2023, arXiv 2305.14342, Algorithm 3)."""

from typing import Any

import torch
from torch import Tensor

from .base import Context, MatrixOptimizer, check

ESTIMATORS = ("hutchinson", "gauss_newton_bartlett")


class Sophia(MatrixOptimizer):
    r"""Momentum divided by an average of estimates of the Hessian's diagonal, clipped entry by entry.

    .. math:: W \leftarrow W - \lambda\, \mathrm{clip}(m / \max(\gamma h, \epsilon), 1).

    At t = 1, K + 1, 2K + 1, ... whoever owns the loss has to supply an estimate: ``wanted_estimate`` says which one, and
    ``update_estimate`` takes it before ``step`` (this project's trainer does so). Without one these steps are an error.
    State: m and h, 2mn numbers.

    Args:
        params: tensors [m, n], ``(name, tensor)`` pairs, or groups such as :func:`optimizers.partition` returns.
        lr: lambda, the most that an entry changes in a step.
        betas: beta_1 of m, beta_2 of h.
        gamma: of h; 0.01 for Sophia-H and 0.05 for Sophia-G in the paper.
        update_interval: K, steps between estimates; 10 in the paper.
        estimator: "hutchinson" (Sophia-H, u * (H u) with u ~ N(0, I)) or "gauss_newton_bartlett" (Sophia-G, B g * g, where
            g is the gradient of the mean loss of B labels drawn from the model).
        eps: the least value of the denominator.
        weight_decay: decoupled, multiplied by lr (0.2 in the paper's code).
        state_dtype: of m and h; None for the parameter's.

    Raises:
        ValueError: an option out of its range, a tensor that is not a matrix, a missing estimate.
    """

    orient = False
    bounds = False  # no square of G is kept, and a limit would change the weights of an average

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 6e-4,
        *,
        betas: tuple[float, float] = (0.96, 0.99),
        gamma: float = 0.01,
        update_interval: int = 10,
        estimator: str = "hutchinson",
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        state_dtype: torch.dtype | str | None = None,
    ) -> None:
        super().__init__(
            params,
            dict(
                lr=lr,
                betas=tuple(betas),
                gamma=gamma,
                update_interval=update_interval,
                update_times="zero_based",
                estimator=estimator,
                eps=eps,
                weight_decay=weight_decay,
                state_dtype=state_dtype,
            ),
        )

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check(group, "betas", lambda b: len(b) == 2 and all(0 <= x < 1 for x in b), "two numbers in [0, 1)")
        check(group, "gamma", lambda x: x > 0, "a positive number")
        check(group, "estimator", ESTIMATORS)

    def init_state(self, shape: tuple[int, int], group: dict[str, Any]) -> dict[str, Tensor]:
        return {"m": torch.zeros(shape), "h": torch.zeros(shape)}

    def refresh(self, G: Tensor, state: dict[str, Tensor], group: dict[str, Any], ctx: Context) -> None:
        """Lines 7 to 9."""
        if ctx.estimate is None:
            raise ValueError(
                f"Sophia needs an estimate of the Hessian's diagonal at step {ctx.step}; call update_estimate with the "
                f"{group['estimator']} estimate before step, as pretraining/curvature.py does"
            )
        beta2 = group["betas"][1]
        state["h"].mul_(beta2).add_(ctx.estimate, alpha=1 - beta2)

    def direction(self, G: Tensor, state: dict[str, Tensor], group: dict[str, Any], ctx: Context) -> Tensor:
        """Lines 6 and 13."""
        beta1 = group["betas"][0]
        m = state["m"].mul_(beta1).add_(G, alpha=1 - beta1)
        return (m / (group["gamma"] * state["h"]).clamp_min(group["eps"])).clamp(-1, 1)
