"""What every structure can do, and the empirical Fisher matrix itself.

Conventions: samples G [N, m, n]; E is the mean over them; vec stacks columns, so F is [mn, mn] and
(A (x) B) vec(X) = vec(B X A^T). A mean with weights w_i is that of the samples sqrt(N w_i) G_i. Nothing here needs
m <= n. Roots of singular matrices are those of the pseudo-inverse, as in Eq. 19.
"""

from abc import ABC, abstractmethod
from typing import Any, Self

import torch
from torch import Tensor


class Structure(ABC):
    """A symmetric positive semi-definite F~ [mn, mn] of some structure; ``formula`` writes it."""

    formula: str
    shape: tuple[int, int]

    @classmethod
    @abstractmethod
    def fit(cls, G: Tensor, *args: Any, **kwargs: Any) -> Self:
        """The paper's solution for the samples ``G`` [N, m, n]; see each class for what it minimises."""

    @abstractmethod
    def product(self, X: Tensor) -> Tensor:
        """Mat(F~ vec(X)) for each matrix of ``X`` [..., m, n]."""

    @abstractmethod
    def inverse_sqrt(self, X: Tensor) -> Tensor:
        """Mat(F~^(-1/2) vec(X)) for each matrix of ``X`` [..., m, n]: the square-root natural-gradient direction."""

    @abstractmethod
    def squared_norm(self) -> float:
        """|F~|_F^2."""

    @abstractmethod
    def elements(self) -> int:
        """Numbers that describe F~ (both halves of symmetric matrices counted, as in the paper's Table 1)."""

    def matrix(self) -> Tensor:
        """F~ [mn, mn] itself, of a fit in float64. For tiny shapes only: a layer of 256 x 688 would take 250 GB."""
        m, n = self.shape
        units = torch.eye(m * n, dtype=torch.float64).reshape(m * n, n, m).mT  # unit i is unvec(e_i)
        return self.product(units).mT.reshape(m * n, m * n).mT

    def captured(self, G: Tensor, rescaled: bool = False) -> float:
        """1 - :meth:`error`, precise where that is close to 1.

        It is (2 mean_i <G_i, F~ G_i> - |F~|^2) / mean_ij <G_i, G_j>^2: O(N) products with F~, and never F.

        Raises:
            ValueError: all samples are zero.
        """
        total, norm = fisher_squared_norm(G), self.squared_norm()
        if total == 0:
            raise ValueError("the Fisher matrix of zero gradients is zero; give samples that are not all zero")
        overlap = (G * self.product(G)).sum(dim=(-2, -1), dtype=torch.float64).mean().item()
        if rescaled:
            return overlap / total * (overlap / norm) if norm else 0.0
        return (2 * overlap - norm) / total

    def error(self, G: Tensor, rescaled: bool = False) -> float:
        """|F - F~|_F^2 / |F|_F^2 for the F of the samples ``G`` [N, m, n], without forming F.

        Args:
            G: samples, those that F~ was fitted to or others.
            rescaled: the error of c F~ for the best c, which a learning rate can make up for: one minus the squared
                cosine between F and F~.

        Raises:
            ValueError: all samples are zero.
        """
        return 1 - self.captured(G, rescaled)


def empirical_fisher(G: Tensor) -> Tensor:
    """F = E[vec(G) vec(G)^T], [mn, mn], from samples ``G`` [N, m, n]. For tiny shapes only."""
    g = G.mT.flatten(1)
    return g.mT @ g / len(G)


def fisher_squared_norm(G: Tensor) -> float:
    """|F|_F^2 = mean_ij <G_i, G_j>^2, from samples ``G`` [N, m, n]."""
    g = G.flatten(1)
    return (g @ g.mT).double().square().mean().item()


def squared_norm(X: Tensor) -> float:
    """The sum of squares of all entries, added up in float64."""
    return X.double().square().sum().item()


def covariance(G: Tensor) -> Tensor:
    """E[G G^T], [m, m], as one product."""
    X = G.movedim(0, 1).flatten(1)
    return X @ X.mT / len(G)


def eigenbasis(M: Tensor) -> Tensor:
    """Eigenvectors of a symmetric matrix, in descending order of eigenvalue."""
    return torch.linalg.eigh(M).eigenvectors.flip(-1)


def pseudo_power(v: Tensor, p: float, tolerance: float = 0.0) -> Tensor:
    """v^p entry by entry, 0 where v is at most ``tolerance`` times its largest entry."""
    positive = v > tolerance * v.max()
    return torch.where(positive, v, 1.0).pow(p) * positive


def matrix_power(M: Tensor, p: float) -> Tensor:
    """M^p of symmetric positive semi-definite ``M`` [k, k], pseudo-inverted where it is singular."""
    values, vectors = torch.linalg.eigh(M)
    return vectors * pseudo_power(values, p, len(M) * torch.finfo(M.dtype).eps) @ vectors.mT
