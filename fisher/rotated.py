"""Structures that are diagonal in some basis, with a free number for every basis vector, and general blocks."""

from typing import Self

import torch
from torch import Tensor

from .base import Structure, covariance, eigenbasis, pseudo_power, squared_norm


class Rotated(Structure):
    """F~ = (U_R (x) U_L) Diag_M(D) (U_R (x) U_L)^T, where None stands for the identity.

    For given bases with orthonormal columns, D = E[(U_L^T G U_R)^2] minimises the distance to F (Theorem 3.3, step 2).

    Args:
        D: [r, k], not negative.
        U_L: [m, r], r <= m, or None for r = m.
        U_R: [n, k], k <= n, or None for k = n.
    """

    def __init__(self, D: Tensor, U_L: Tensor | None = None, U_R: Tensor | None = None) -> None:
        self.D, self.U_L, self.U_R = D, U_L, U_R
        self.shape = (len(D) if U_L is None else len(U_L), D.shape[-1] if U_R is None else len(U_R))

    @classmethod
    def fit_in(cls, G: Tensor, U_L: Tensor | None = None, U_R: Tensor | None = None) -> Self:
        """The best D for the samples ``G`` in the given bases."""
        return cls(rotate(G, U_L, U_R).square().mean(0), U_L, U_R)

    def product(self, X: Tensor) -> Tensor:
        return self.rotate_back(self.D * rotate(X, self.U_L, self.U_R))

    def inverse_sqrt(self, X: Tensor) -> Tensor:
        return self.rotate_back(rotate(X, self.U_L, self.U_R) * pseudo_power(self.D, -0.5, rounding(self.D)))

    def rotate_back(self, X: Tensor) -> Tensor:
        """U_L X U_R^T."""
        return rotate(X, *(None if U is None else U.mT for U in (self.U_L, self.U_R)))

    def squared_norm(self) -> float:
        return squared_norm(self.D)

    def elements(self) -> int:
        return sum(x.numel() for x in (self.D, self.U_L, self.U_R) if x is not None)


class Diagonal(Rotated):
    """Diag_v(v), Adam's second moment: v = E[g^2] is the minimiser (Proposition 1)."""

    formula = "Diag(v)"

    @classmethod
    def fit(cls, G: Tensor) -> Self:
        return cls.fit_in(G)


class EigenAdam(Rotated):
    """Diag_B(U D_1 U^T, ..., U D_n U^T): the one refinement of Theorem 3.2, not the joint minimiser.

    U = EVD(E[G G^T]) is best if all D_i are equal; D is best for that U.
    """

    formula = "Diag_B(U D_i Uᵀ)"

    @classmethod
    def fit(cls, G: Tensor) -> Self:
        return cls.fit_in(G, U_L=eigenbasis(covariance(G)))


class SOAP(Rotated):
    """(U_R (x) U_L) D (U_R (x) U_L)^T: the one refinement of Theorem 3.3, not the joint minimiser.

    U_R = EVD(E[G^T G]) and U_L = EVD(E[G G^T]) are Shampoo's; D is best for them.
    """

    formula = "(U_R ⊗ U_L) D (U_R ⊗ U_L)ᵀ"

    @classmethod
    def fit(cls, G: Tensor) -> Self:
        return cls.fit_in(G, U_L=eigenbasis(covariance(G)), U_R=eigenbasis(covariance(G.mT)))


class GaLore(Rotated):
    """Diag_B(U D_i U^T) with r columns of U: Eigen-Adam's structure without its complement, so of rank rn."""

    formula = "Diag_B(U D_i Uᵀ), r < m"

    @classmethod
    def fit(cls, G: Tensor, rank: int, U: Tensor | None = None) -> Self:
        """D is best for ``U`` [m, r]; None takes the r leading eigenvectors of E[G G^T]."""
        return cls.fit_in(G, U_L=leading_basis(G, rank) if U is None else U)


class Alice(Structure):
    """Diag_B(U D_i U^T) + O (x) U_c U_c^T: Eigen-Adam within U and, outside, one number for each column.

    [U, U_c] is orthonormal, so the parts do not meet and both fits are best for that U: D = E[(U^T G)^2] as in
    Theorem 3.2, O_ii = E[|g_i|^2 - |U^T g_i|^2] / (m - r) as in Theorem 5.1, where O = S^-2. The direction is that of
    Algorithm 4 with alpha_c = 1, without momentum and limiter.

    Args:
        low_rank: the part within U [m, r].
        o: [n], the diagonal of O.
    """

    formula = "Diag_B(U D_i Uᵀ) + S⁻² ⊗ U_c U_cᵀ"

    def __init__(self, low_rank: GaLore, o: Tensor) -> None:
        self.low_rank, self.o = low_rank, o
        self.shape = low_rank.shape

    @classmethod
    def fit(cls, G: Tensor, rank: int, U: Tensor | None = None) -> Self:
        """Both parts for ``U`` [m, r], r < m; None takes the r leading eigenvectors of E[G G^T].

        Raises:
            ValueError: r = m, where there is no complement.
        """
        low_rank = GaLore.fit(G, rank, U)
        m, r = low_rank.shape[0], len(low_rank.D)
        if r >= m:
            raise ValueError(f"rank {r} leaves no complement of {m} rows; use EigenAdam there")
        return cls(low_rank, cls.outside(low_rank, G).square().sum(-2).mean(0) / (m - r))

    @staticmethod
    def outside(low_rank: GaLore, X: Tensor) -> Tensor:
        """U_c U_c^T X."""
        return X - low_rank.rotate_back(rotate(X, low_rank.U_L, low_rank.U_R))

    def product(self, X: Tensor) -> Tensor:
        return self.low_rank.product(X) + self.outside(self.low_rank, X) * self.o

    def inverse_sqrt(self, X: Tensor) -> Tensor:
        return self.low_rank.inverse_sqrt(X) + self.outside(self.low_rank, X) * pseudo_power(self.o, -0.5)

    def squared_norm(self) -> float:
        m, r = self.shape[0], len(self.low_rank.D)
        return self.low_rank.squared_norm() + (m - r) * squared_norm(self.o)

    def elements(self) -> int:
        return self.low_rank.elements() + self.o.numel()


class BlockDiagonal(Structure):
    """Diag_B(M_1, ..., M_n), nothing else assumed: M_i = E[g_i g_i^T] is the minimiser (Proposition 6).

    The blocks are kept as the samples that they are made of, so that layers of real size can be served.

    Args:
        X: [n, m, N], M_i = X_i X_i^T.
    """

    formula = "Diag_B(M_i)"

    def __init__(self, X: Tensor) -> None:
        self.X = X
        self.shape = (X.shape[1], X.shape[0])

    @classmethod
    def fit(cls, G: Tensor) -> Self:
        return cls(G.permute(2, 1, 0) / len(G) ** 0.5)

    def product(self, X: Tensor) -> Tensor:
        columns = X.reshape(-1, *self.shape).permute(2, 1, 0)  # [n, m, B]
        return (self.X @ (self.X.mT @ columns)).permute(2, 1, 0).reshape(X.shape)

    def inverse_sqrt(self, X: Tensor) -> Tensor:
        U, sigma, _ = torch.linalg.svd(self.X, full_matrices=False)
        tolerance = max(self.X.shape[1:]) * torch.finfo(sigma.dtype).eps
        inverse = torch.stack([pseudo_power(s, -1.0, tolerance) for s in sigma]).unsqueeze(-1)
        columns = X.reshape(-1, *self.shape).permute(2, 1, 0)
        return (U @ (inverse * (U.mT @ columns))).permute(2, 1, 0).reshape(X.shape)

    def squared_norm(self) -> float:
        return squared_norm(self.X.mT @ self.X)

    def elements(self) -> int:
        m, n = self.shape
        return n * m * m


def rotate(X: Tensor, U_L: Tensor | None, U_R: Tensor | None) -> Tensor:
    """U_L^T X U_R, where None stands for the identity."""
    X = X if U_L is None else U_L.mT @ X
    return X if U_R is None else X @ U_R


def leading_basis(G: Tensor, rank: int) -> Tensor:
    """EVD(E[G G^T], r) [m, r]: the eigenvectors of the largest eigenvalues, in descending order.

    Raises:
        ValueError: more vectors than there are.
    """
    m = G.shape[-2]
    if not 1 <= rank <= m:
        raise ValueError(f"rank {rank} is not between 1 and the number of rows, {m}; choose a rank in that range")
    return eigenbasis(covariance(G))[:, :rank]


def rounding(D: Tensor) -> float:
    """Entries of ``D`` below this part of the largest are squares of rounding errors: zeros."""
    return (sum(D.shape) * torch.finfo(D.dtype).eps) ** 2
