"""The norm-growth limiter (Chen et al. 2024, Fira; lines 9 and 10 of Algorithm 1, and in Algorithm 3)."""

from typing import Any

from torch import Tensor


def growth_limit(norm: Tensor, phi: Tensor, gamma: float | None) -> tuple[Any, Tensor]:
    """The factor that lets a norm grow at most by ``gamma`` from one step to the next.

    eta = gamma / max(||X|| / phi, gamma) if phi > 0 else 1, the norm being Frobenius', per matrix.
    The paper prints "if t > 1" in Algorithm 1: the two differ only after a zero gradient, where a ratio to
    phi = 0 would stop the matrix for ever.

    Args:
        norm: ||X|| [B].
        phi: [B], the limited norm of the step before; 0 at the start.
        gamma: the limit, 1.01 in the paper; None switches the limiter off.

    Returns:
        eta [B, 1, 1] (1.0 without a limit) and the new phi = eta ||X|| [B].
    """
    if gamma is None:
        return 1.0, norm
    # gamma / max(norm / phi, gamma), written so that phi = 0 needs no division
    limit = gamma * phi
    eta = (limit / norm.clamp_min(1e-38)).clamp(max=1.0).where(phi > 0, 1.0)
    return eta[:, None, None], norm * eta


def limit_growth(X: Tensor, phi: Tensor, gamma: float | None) -> tuple[Tensor, Tensor]:
    """``X`` [B, m, n] scaled by :func:`growth_limit`, and the new phi."""
    eta, phi = growth_limit(X.flatten(1).norm(dim=1), phi, gamma)
    return X if gamma is None else X * eta, phi
