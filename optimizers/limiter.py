"""The norm-growth limiter (Chen et al. 2024, Fira; lines 9 and 10 of Algorithm 1, and in Algorithm 3)."""

from torch import Tensor


def limit_growth(X: Tensor, phi: Tensor, gamma: float | None) -> tuple[Tensor, Tensor]:
    """Scale ``X`` so that its norm grows at most by the factor ``gamma`` from one step to the next.

    eta = gamma / max(||X|| / phi, gamma) if phi > 0 else 1, the norm being Frobenius', per matrix.
    The paper prints "if t > 1" in Algorithm 1: the two differ only after a zero gradient, where a ratio to
    phi = 0 would stop the matrix for ever.

    Args:
        X: [B, m, n].
        phi: [B], the limited norm of the step before; 0 at the start.
        gamma: the limit, 1.01 in the paper; None switches the limiter off.

    Returns:
        eta * X and the new phi = ||eta * X||.
    """
    norm = X.flatten(1).norm(dim=1)
    if gamma is None:
        return X, norm
    # gamma / max(norm / phi, gamma), written so that phi = 0 needs no division
    limit = gamma * phi
    eta = (limit / norm.clamp_min(1e-38)).clamp(max=1.0).where(phi > 0, 1.0)
    return X * eta[:, None, None], norm * eta
