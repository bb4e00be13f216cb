"""SOAP: Adam in both eigenbases of Shampoo (Algorithm 6 of arXiv 2502.07752; Vyas et al. 2024)."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .base import PRODUCTS, Context, MatrixOptimizer, bias_correction, check, is_update_time
from .linalg import align_signs, each, gram, or_previous, power_step, product, top_eigenvectors

BASES = (("L", "U_L"), ("R", "U_R"))


class SOAP(MatrixOptimizer):
    r"""Adam's second moment in the eigenbases of the two gradient covariances.

    Each matrix W [m, n], m <= n (a taller one is transposed), is updated by

    .. math:: W \leftarrow W - \lambda U_L \frac{U_L^\top m U_R}{\sqrt{v} + \epsilon} U_R^\top, \qquad
        m = \mathrm{EMA}_{\beta_1}(G),\; v = \mathrm{EMA}_{\beta_2}((U_L^\top G U_R)^2),

    with the eigenvectors U_L [m, m], U_R [n, n] of L = EMA(G G^T), R = EMA(G^T G), both with beta_3. State: these
    four, m and v [m, n]; 2 m^2 + 2 n^2 + 2mn numbers. Leave matrices with a side of 10^4 to Adam.

    ``form="paper"`` is Algorithm 6: this step's bases, by EVD; v is not turned with them; no bias correction.
    At step 1 the rotated gradient is diagonal but for rounding errors, which the division lifts to full size: in float32
    most of that update is noise, so let the learning rate start at 0.

    ``form="published"`` is the algorithm of Vyas et al.'s code: step 1 only sets up L, R and the bases; later steps
    use the bases that the step before left, correct the bias with t - 1, then update L and R; at update times, one
    power iteration and QR refresh the bases, whose columns are sorted by estimated eigenvalue, v with them. That code
    also decays the weights after the update, not before, and not at step 1, and has an identity for the basis of a side
    above 10^4.

    Args:
        params: tensors [m, n], ``(name, tensor)`` pairs, or groups such as :func:`optimizers.partition` returns.
        lr: lambda.
        form: "paper" or "published".
        betas: beta_1 of m, beta_2 of v, beta_3 of L and R. Vyas et al. use one number for beta_2 and beta_3.
        update_interval: K, steps between refreshes of the bases.
        update_times: "printed", t = 1, K, 2K, ...; "zero_based", t = 1, K + 1, 2K + 1, ...; None for the first in
            the form "paper" and the second in "published".
        fix_signs: in the form "paper", choose the signs of new bases by those of the old ones. That changes the
            bases only: neither v nor the update depends on them.
        eps: added to the square root of v (the paper prints none).
        weight_decay: decoupled, multiplied by lr; at step 1 as well.
        state_dtype: dtype of U_L, U_R, m and v; None for the parameter's. L and R are float32.
        products: what the products of a step are computed from: "float32" (float64 for float64 parameters), or "bfloat16",
            faster where the hardware has it, which makes errors of 0.4 % of the largest entries, in L and R as well. New
            bases are computed in float32 whatever this says.

    Raises:
        ValueError: an option out of its range, or a tensor that is not a matrix.
        torch.linalg.LinAlgError: the gradient is not finite.
    """

    full_precision = frozenset({"L", "R"})
    as_stored = frozenset({"U_L", "U_R", "m"})
    compilable = False

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 3e-3,
        *,
        form: str = "paper",
        betas: tuple[float, float, float] = (0.95, 0.95, 0.95),
        update_interval: int = 10,
        update_times: str | None = None,
        fix_signs: bool = True,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state_dtype: torch.dtype | str | None = None,
        products: str = "float32",
    ) -> None:
        super().__init__(
            params,
            dict(
                lr=lr,
                form=form,
                betas=tuple(betas),
                update_interval=update_interval,
                update_times=update_times or ("zero_based" if form == "published" else "printed"),
                fix_signs=fix_signs,
                eps=eps,
                weight_decay=weight_decay,
                state_dtype=state_dtype,
                products=products,
            ),
        )

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check(group, "form", ("paper", "published"))
        check(group, "products", PRODUCTS)
        check(group, "betas", lambda b: len(b) == 3 and all(0 <= x < 1 for x in b), "three numbers in [0, 1)")

    def init_state(self, shape: tuple[int, int], group: dict[str, Any]) -> dict[str, Tensor]:
        m, n = shape
        squares = {"L": torch.zeros(m, m), "R": torch.zeros(n, n)}
        bases = {"U_L": torch.zeros(m, m), "U_R": torch.zeros(n, n)}
        return {**squares, **bases, "m": torch.zeros(m, n), **self.init_second_moment(m, n)}

    def refresh(self, G: Tensor, state: dict[str, Tensor], group: dict[str, Any], ctx: Context) -> None:
        """U_L = EVD(L) and U_R = EVD(R), with the L and R that ``direction`` will store for this step."""
        if group["form"] == "published" and ctx.step > 1:
            return  # its later refreshes come after the update
        for (name, basis), square in zip(BASES, gram_matrices(G), strict=True):
            A = state[name].lerp(square, 1 - group["betas"][2])
            U = or_previous(partial(top_eigenvectors, A, A.shape[-1]), state[basis], ctx)
            state[basis] = align_signs(U, state[basis]) if group["fix_signs"] and ctx.step > 1 else U

    def direction(self, G: Tensor, state: dict[str, Tensor], group: dict[str, Any], ctx: Context) -> Tensor:
        X = G.bfloat16() if group["products"] == "bfloat16" else G  # what products are computed from
        if group["form"] == "published":
            return self.published_step(G, X, state, group, ctx)
        update = self.adam(G, X, state, group)  # Algorithm 6 but for the bases
        self.average_squares(X, state, group)
        return update

    def published_step(
        self, G: Tensor, X: Tensor, state: dict[str, Tensor], group: dict[str, Any], ctx: Context
    ) -> Tensor:
        """Vyas et al.'s: nothing at step 1; afterwards the update first, then L and R, then perhaps new bases."""
        if ctx.step == 1:
            self.average_squares(X, state, group)
            return torch.zeros_like(G)
        update = self.adam(G, X, state, group).mul_(bias_correction(ctx.step - 1, *group["betas"][:2]))
        self.average_squares(X, state, group)
        if is_update_time(ctx.step, group["update_interval"], group["update_times"]):
            orders = []
            for name, basis in BASES:
                state[basis], order = power_step(state[name], state[basis].to(state[name].dtype))
                orders.append(order)
            self.permute(state, *orders)
        return update

    def average_squares(self, X: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """L and R take in G G^T and G^T G."""
        for (name, _), square in zip(BASES, gram_matrices(X), strict=True):
            state[name].lerp_(square.to(state[name].dtype), 1 - group["betas"][2])

    def adam(self, G: Tensor, X: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        """Adam in the bases of ``state``, back in the original space. ``X``: G in the dtype of the products."""
        beta1, beta2, _ = group["betas"]
        U_L, U_R, compute = state["U_L"].to(X.dtype), state["U_R"].to(X.dtype), state["L"].dtype
        m = state["m"].lerp_(G.to(state["m"].dtype), 1 - beta1)
        root_v = self.second_moment(rotated(X, U_L, U_R).to(compute), state, beta2)
        omega = rotated(m.to(X.dtype), U_L, U_R).to(compute) / root_v.add_(group["eps"])
        return rotated(omega.to(X.dtype), U_L.mT, U_R.mT)

    # How the second moment is stored -----------------------------------------------------------------------------

    def init_second_moment(self, m: int, n: int) -> dict[str, Tensor]:
        """Its states for a matrix [m, n]."""
        return {"v": torch.zeros(m, n)}

    def second_moment(self, sigma: Tensor, state: dict[str, Tensor], beta2: float) -> Tensor:
        """Average in the square of the rotated gradient ``sigma`` [B, m, n]; returns the square root."""
        return state["v"].mul_(beta2).addcmul_(sigma, sigma, value=1 - beta2).sqrt()

    def permute(self, state: dict[str, Tensor], left: Tensor, right: Tensor) -> None:
        """Follow the columns of U_L, now in the order ``left`` [B, m], and of U_R, ``right`` [B, n]."""
        v = state["v"]
        v = v.gather(-2, left.unsqueeze(-1).expand_as(v))
        state["v"] = v.gather(-1, right.unsqueeze(-2).expand_as(v))


def rotated(X: Tensor, U_L: Tensor, U_R: Tensor) -> Tensor:
    """U_L^T X U_R."""
    return product(product(U_L.mT, X), U_R)


def gram_matrices(G: Tensor) -> tuple[Tensor, Tensor]:
    """G G^T [B, m, m] and G^T G [B, n, n]."""
    return each(gram, G), each(gram, G.mT)
