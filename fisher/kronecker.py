"""Structures A (x) B: one factor for the columns of the gradient, A [n, n], one for its rows, B [m, m]."""

from typing import Self

import torch
from torch import Tensor

from .base import Structure, covariance, matrix_power, pseudo_power, squared_norm


class Kronecker(Structure):
    """F~ = A (x) B. A factor is a symmetric matrix, or a vector if it is diagonal.

    Args:
        A: [n, n] or [n], for the columns.
        B: [m, m] or [m], for the rows.
    """

    formula = "A ⊗ B"

    def __init__(self, A: Tensor, B: Tensor) -> None:
        self.A, self.B = A, B
        self.shape = (len(B), len(A))

    def product(self, X: Tensor) -> Tensor:
        return sandwich(self.B, X, self.A)

    def inverse_sqrt(self, X: Tensor) -> Tensor:
        return sandwich(power(self.B, -0.5), X, power(self.A, -0.5))

    def squared_norm(self) -> float:
        return squared_norm(self.A) * squared_norm(self.B)

    def elements(self) -> int:
        return self.A.numel() + self.B.numel()


class Scalar(Kronecker):
    """c I: plain gradient descent, up to its rate. c = E|G|^2 / (mn) is the minimiser."""

    formula = "c I"

    @classmethod
    def fit(cls, G: Tensor) -> Self:
        m, n = G.shape[-2:]
        return cls(G.new_ones(n), G.square().mean().expand(m))

    def elements(self) -> int:
        return 1


class Whitening(Kronecker):
    """I (x) M, the same block for every column: M = E[G G^T] / n is the minimiser (Proposition 2, Eq. 7)."""

    formula = "I ⊗ M"

    @classmethod
    def fit(cls, G: Tensor) -> Self:
        n = G.shape[-1]
        return cls(G.new_ones(n), covariance(G) / n)

    def elements(self) -> int:
        return self.B.numel()


class RightWhitening(Kronecker):
    """R (x) I: R = E[G^T G] / m is the minimiser (Proposition 5)."""

    formula = "R ⊗ I"

    @classmethod
    def fit(cls, G: Tensor) -> Self:
        m = G.shape[-2]
        return cls(covariance(G.mT) / m, G.new_ones(m))

    def elements(self) -> int:
        return self.A.numel()


class Normalization(Kronecker):
    """S (x) I, S diagonal: S_ii = E|g_i|^2 / m for the columns g_i is the minimiser (Proposition 2, Eq. 8)."""

    formula = "S ⊗ I"

    @classmethod
    def fit(cls, G: Tensor) -> Self:
        return cls(G.square().mean(dim=(0, 1)), G.new_ones(G.shape[-2]))

    def elements(self) -> int:
        return self.A.numel()


class TwoSidedScaling(Kronecker):
    """S (x) Q, both diagonal (RACS): q s^T is the rank-one SVD of E[G^2], the minimiser (Proposition 3)."""

    formula = "S ⊗ Q"

    @classmethod
    def fit(cls, G: Tensor) -> Self:
        # The fixed point of Eq. 16, computed directly; the principal singular vectors have one sign.
        U, sigma, Vh = torch.linalg.svd(G.square().mean(0), full_matrices=False)
        return cls(sigma[0] * Vh[0].abs(), U[:, 0].abs())


class ScaledWhitening(Kronecker):
    """S (x) M, S diagonal: the fixed point of Theorem D.1 (Eq. 42), which is the minimiser."""

    formula = "S ⊗ M"

    @classmethod
    def fit(cls, G: Tensor, tolerance: float = 1e-14, iterations: int = 1000) -> Self:
        """Iterate Eq. 42 from S = I until s moves by less than ``tolerance``, relatively."""
        X = G.movedim(0, 1).contiguous()  # [m, N, n]
        s = G.new_ones(G.shape[-1])
        for _ in range(iterations):
            M = covariance(G * s.clamp_min(0).sqrt()) / s.square().sum()
            MX = (M @ X.flatten(1)).view_as(X)
            before, s = s, (X * MX).sum(dim=(0, 1)) / (len(G) * M.square().sum())
            if (s - before).norm() <= tolerance * s.norm():
                break
        return cls(s, M)


class Shampoo(Kronecker):
    """R^(1/2) (x) L^(1/2), R = E[G^T G] / m and L = E[G G^T] / n (Theorem 3.1).

    They minimise the upper bound of Eq. 4, not the distance to F; :class:`NearestKronecker` does that.
    """

    formula = "R^½ ⊗ L^½"

    def __init__(self, R: Tensor, L: Tensor) -> None:
        super().__init__(matrix_power(R, 0.5), matrix_power(L, 0.5))

    @classmethod
    def fit(cls, G: Tensor) -> Self:
        m, n = G.shape[-2:]
        return cls(covariance(G.mT) / m, covariance(G) / n)


class NearestKronecker(Kronecker):
    """The R (x) L nearest to F: what Shampoo's structure could reach. Not in the paper (see Van Loan and Pitsianis 1993)."""

    formula = "R ⊗ L, nearest"

    @classmethod
    def fit(cls, G: Tensor, tolerance: float = 1e-14, iterations: int = 1000) -> Self:
        """Eq. 42 with a full S: power iteration from L = I until R moves by less than ``tolerance``, relatively."""
        m, n = G.shape[-2:]
        L = torch.eye(m, dtype=G.dtype, device=G.device)
        R = G.new_zeros(n, n)
        rows, columns = G.movedim(0, 1).flatten(1), G.flatten(0, 1)  # [m, Nn] and [Nm, n]
        for _ in range(iterations):
            before, R = R, columns.mT @ (L @ G).flatten(0, 1) / (len(G) * L.square().sum())
            L = (G @ R).movedim(0, 1).flatten(1) @ rows.mT / (len(G) * R.square().sum())
            if (R - before).norm() <= tolerance * R.norm():
                break
        return cls((R + R.mT) / 2, (L + L.mT) / 2)


def sandwich(B: Tensor, X: Tensor, A: Tensor) -> Tensor:
    """B X A for symmetric or, as vectors, diagonal A and B."""
    X = B.unsqueeze(-1) * X if B.ndim == 1 else B @ X
    return X * A if A.ndim == 1 else X @ A


def power(M: Tensor, p: float) -> Tensor:
    """M^p of a factor: a vector stays one."""
    return pseudo_power(M, p) if M.ndim == 1 else matrix_power(M, p)
