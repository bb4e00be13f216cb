"""Adafactor in Shampoo's eigenbases (Vyas et al. 2024, Algorithm 2, and the factorised SOAP of their section 7)."""

import torch
from torch import Tensor

from .soap import SOAP


class SOAPFactored(SOAP):
    r"""SOAP with a second moment of rank 1 in the rotated space.

    As :class:`SOAP`, whose options it has, with v replaced by

    .. math:: \hat v = \frac{a c^\top}{1^\top a}, \qquad
        a = \mathrm{EMA}_{\beta_2}(\sigma^{\odot 2} 1_n),\; c = \mathrm{EMA}_{\beta_2}(1_m^\top \sigma^{\odot 2}),\;
        \sigma = U_L^\top G U_R.

    The momentum is kept, in the original space; Algorithm 2 has none (``betas[0] = 0``), and expectations in place of
    the averages. It prints eps inside the square root; here, as in SOAP, it is added outside. With ``betas`` equal to
    0, a and c are the eigenvalues of L and R, and the update is that of Shampoo with the power 1/2. State: L and
    U_L [m, m], R and U_R [n, n], m [m, n], a [m] and c [n]; 2 m^2 + 2 n^2 + mn + m + n numbers. a and c are float32.

    Raises:
        ValueError: an option out of its range, or a tensor that is not a matrix.
        torch.linalg.LinAlgError: the gradient is not finite.
    """

    full_precision = frozenset({"L", "R", "a", "c"})

    def init_second_moment(self, m: int, n: int) -> dict[str, Tensor]:
        return {"a": torch.zeros(m), "c": torch.zeros(n)}

    def second_moment(self, sigma: Tensor, state: dict[str, Tensor], beta2: float) -> Tensor:
        P = sigma.square()
        a = state["a"].mul_(beta2).add_(P.sum(-1), alpha=1 - beta2)
        c = state["c"].mul_(beta2).add_(P.sum(-2), alpha=1 - beta2)
        share = a / a.sum(-1, keepdim=True).clamp_min(torch.finfo(a.dtype).tiny)  # a c^T itself may overflow
        return share.sqrt().unsqueeze(-1) * c.sqrt().unsqueeze(-2)

    def permute(self, state: dict[str, Tensor], left: Tensor, right: Tensor) -> None:
        state["a"], state["c"] = state["a"].gather(-1, left), state["c"].gather(-1, right)
