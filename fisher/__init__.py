"""The framework of arXiv 2502.07752, executable: structured approximations of the empirical Fisher matrix.

An optimizer is read as a structure F~ of the Fisher matrix F = E[vec(G) vec(G)^T] of one layer's gradients G, fitted by
minimising |F~ - F|_F^2 (Eq. 2), and its update as the square-root natural-gradient step Mat(F~^(-1/2) vec(G)).

    structure = fisher.Whitening.fit(G)     # G [N, m, n]: samples
    structure.error(G)                      # |F - F~|_F^2 / |F|_F^2, without forming F
    structure.inverse_sqrt(G[-1])           # the update direction [m, n]
"""

from .base import Structure, empirical_fisher, fisher_squared_norm
from .kronecker import (
    NearestKronecker,
    Normalization,
    RightWhitening,
    Scalar,
    ScaledWhitening,
    Shampoo,
    TwoSidedScaling,
    Whitening,
)
from .rotated import SOAP, Alice, BlockDiagonal, Diagonal, EigenAdam, GaLore

__all__ = [
    "SOAP",
    "Alice",
    "BlockDiagonal",
    "Diagonal",
    "EigenAdam",
    "GaLore",
    "NearestKronecker",
    "Normalization",
    "RightWhitening",
    "Scalar",
    "ScaledWhitening",
    "Shampoo",
    "Structure",
    "TwoSidedScaling",
    "Whitening",
    "empirical_fisher",
    "fisher_squared_norm",
]
