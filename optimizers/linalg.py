"""Eigenvectors, subspace iteration and complement bases, for batches of matrices."""

from collections.abc import Callable

import torch
from torch import Tensor


def thin_qr(H: Tensor) -> Tensor:
    """The orthonormal factor [B, m, r] of ``H`` [B, m, r]. H = 0 gives the first r unit vectors."""
    return torch.linalg.qr(H).Q


def top_eigenvectors(A: Tensor, r: int) -> Tensor:
    """EVD(A, r): the r leading eigenvectors of symmetric ``A``, in descending order of eigenvalue.

    Args:
        A: [B, m, m], positive semi-definite.
        r: how many, at most m.

    Returns:
        [B, m, r], orthonormal columns, signs free.

    Raises:
        torch.linalg.LinAlgError: ``A`` has entries that are not finite, or no solver converges.
    """
    # Gradients of 1e-20 square to something that float32 cannot hold; eigenvectors do not depend on the scale.
    A = A / A.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(A.dtype).tiny)
    return _eigh((A + A.mT) / 2).flip(-1)[..., :r].contiguous()


def _eigh(A: Tensor) -> Tensor:
    """Eigenvectors in ascending order, with one retry of the batch in float64 on the CPU.

    Ill-conditioned or low-precision covariances make some solvers give up (a complaint of GaLore's users);
    the slow, reliable one then saves the run.
    """
    try:
        return torch.linalg.eigh(A).eigenvectors
    except torch.linalg.LinAlgError:
        if not torch.isfinite(A).all():
            raise torch.linalg.LinAlgError(
                "the gradient covariance has entries that are not finite: the loss has diverged; "
                "lower the learning rate or clip the gradient"
            ) from None
        return torch.linalg.eigh(A.cpu().double()).eigenvectors.to(A)


def subspace_iteration(A: Callable[[Tensor], Tensor], U: Tensor, steps: int = 1) -> Tensor:
    """Algorithm 10: orthogonal iteration from ``U``, then the Ritz rotation.

    The paper's last lines return EVD(V), an r x r matrix; the Ritz vectors U EVD(V) are the only reading whose
    shape fits Algorithm 2.

    Args:
        A: maps X [B, m, r] to A X, for a symmetric m x m matrix A that need never be formed.
        U: [B, m, r], where to start.
        steps: of iteration; 1 in the paper.

    Returns:
        [B, m, r], orthonormal, in descending order of Ritz value.
    """
    for _ in range(steps):
        U = thin_qr(A(U))
    V = U.mT @ A(U)
    return U @ top_eigenvectors(V, V.shape[-1])


def complement_columns(U: Tensor, index: Tensor) -> Tensor:
    """Columns r + ``index`` of the complete QR of ``U``: some of the m - r directions orthogonal to U.

    Only the wanted columns are formed, from the Householder reflectors of the thin QR: O(mrk), not O(m^3).

    Args:
        U: [B, m, r], orthonormal columns.
        index: [B, k], in 0 .. m - r - 1.

    Returns:
        [B, m, k].
    """
    reflectors, tau = torch.geqrf(U)
    E = torch.zeros(*index.shape[:-1], U.shape[-2], index.shape[-1], dtype=U.dtype, device=U.device)
    E.scatter_(-2, (index + U.shape[-1]).unsqueeze(-2), 1.0)
    return torch.ormqr(reflectors, tau, E)


def align_signs(U: Tensor, U_prev: Tensor) -> Tensor:
    """Negate each column of ``U`` that points away from the same column of ``U_prev`` (both [B, m, r]).

    Eigenvectors have no sign of their own, but the momentum is kept in their coordinates: without a rule,
    trajectories depend on the solver. Not in the paper.
    """
    return U * torch.where((U * U_prev).sum(-2, keepdim=True) < 0, -1.0, 1.0).to(U)
