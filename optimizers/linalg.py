"""Eigenvectors, inverse roots, orthogonal factors, subspace iteration and complement bases, for batches of matrices."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .bfloat16 import widened

if TYPE_CHECKING:
    from .base import Context

# Muon's polynomial a x + b x^3 + c x^5: steepest at 0 among those that keep singular values near 1.
QUINTIC = (3.4445, -4.7750, 2.0315)
# Products X X^T of fewer rows than twice these are computed whole: two smaller ones take as long.
GRAM_ROWS = 128
# Largest entries of a gradient whose squares, and products of four, may be added up in float32 as they are.
MODERATE = (1e-5, 1e5)


class NoConvergenceError(torch.linalg.LinAlgError):
    """Every attempt at the eigenvectors of a finite matrix failed; see :func:`or_previous`."""


def each(f: Callable[..., Any], *stacks: Tensor, **options: Any) -> Any:
    """``f(x, ..., **options)`` for every x, ... of ``stacks`` [B, ...], results stacked: products of single matrices, on the
    CPU or if B = 1.

    There these take less time than products of stacks, which elsewhere are the point.
    """
    if stacked(stacks[0]):
        return torch.vmap(lambda *xs: f(*xs, **options))(*stacks)
    outs = [f(*xs, **options) for xs in zip(*(X.unbind(0) for X in stacks), strict=True)]
    join = torch.stack if len(outs) > 1 else lambda alone: alone[0].unsqueeze(0)
    return tuple(map(join, zip(*outs, strict=True))) if isinstance(outs[0], tuple) else join(outs)


def stacked(X: Tensor) -> bool:
    """Whether the matrices of ``X`` [B, m, n] are worked on together, as on a GPU."""
    return len(X) > 1 and X.device.type != "cpu"


def product(A: Tensor, B: Tensor) -> Tensor:
    """A B for stacks of matrices. On the CPU a stack of one takes longer than the matrices by themselves in bfloat16."""
    return A @ B if len(A) > 1 else (A[0] @ B[0]).unsqueeze(0)


def gram(X: Tensor) -> Tensor:
    """X X^T of ``X`` [m, n], not on the CPU also [B, m, n].

    On the CPU three quarters of it: the lower left one is the upper right one, transposed.
    """
    m = len(X)
    if X.device.type != "cpu" or m < 2 * GRAM_ROWS:
        return X @ X.mT
    A, upper, lower = X.new_empty(m, m), X[: m // 2], X[m // 2 :]
    torch.mm(upper, X.mT, out=A[: m // 2])
    torch.mm(lower, lower.mT, out=A[m // 2 :, m // 2 :])
    A[m // 2 :, : m // 2] = A[: m // 2, m // 2 :].mT
    return A


def column_energy(X: Tensor) -> Tensor:
    """Squared norms of the columns of ``X`` [B, m, n], in float32 at least: [B, n]."""
    if X.stride(-2) == 1 and X.dtype != torch.bfloat16:  # a tall matrix, turned: its columns lie side by side
        return torch.linalg.vector_norm(X, dim=-2).square_()
    return (X.float().square_() if X.dtype == torch.bfloat16 else X.square()).sum(-2)


def looks_are_free(X: Tensor) -> bool:
    """May the host look at numbers of ``X`` without waiting for a device, and without ending a compiled graph?"""
    return X.device.type == "cpu" and not torch.compiler.is_compiling()


def largest_entry(X: Tensor) -> Tensor:
    """The largest absolute entry of each matrix of ``X`` [B, m, n]: [B, 1, 1]."""
    if not looks_are_free(X):
        return torch.linalg.vector_norm(X, ord=float("inf"), dim=(-2, -1), keepdim=True)
    # there aminmax reads the matrix once, row by row as it is stored; the norm takes 14 times as long
    extremes = [torch.aminmax(x.mT if x.stride(-2) == 1 else x) for x in X.unbind(0)]
    largest = [max(abs(low.item()), abs(high.item())) for low, high in extremes]
    return X.new_tensor(largest).view(-1, 1, 1)


def matmul_rounding() -> float:
    """Relative error of the factors of float32 products, as torch has been told to compute them (TF32 or bfloat16).

    The larger one of GPU and CPU. ``torch.get_float32_matmul_precision`` would raise where they were told apart.
    """
    cpu = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    told = (torch.backends.cuda.matmul.fp32_precision, cpu.fp32_precision)
    return max({"tf32": 2.0**-10, "bf16": 2.0**-7}.get(each, 2.0**-23) for each in told)


def unit_scale(X: Tensor) -> Tensor:
    """``X`` [B, m, n] divided by its largest absolute entry, matrix by matrix; 0 stays 0.

    Gradients of 1e-20 have squares that float32 cannot hold. Methods that do not depend on the scale lose nothing.
    """
    return X / largest_entry(X).clamp_min(torch.finfo(X.dtype).tiny)


def unit_norm(X: Tensor) -> Tensor:
    """``X`` [B, m, n] divided by its Frobenius norm, matrix by matrix; 0 stays 0."""
    X = unit_scale(X)
    return X / X.flatten(1).norm(dim=1).clamp_min(torch.finfo(X.dtype).tiny)[:, None, None]


def bounded(G: Tensor, energy: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """``G`` [B, m, n], scaled down where an entry exceeds the cube root of what its dtype can hold (7e12 in float32).

    Averages and sums of squares are so kept finite, whatever the gradient: sums of 10^12 squares still fit. Other
    gradients are returned unchanged, to the bit.

    Args:
        energy: squared norms of the columns of ``G``, if they are known. Where the largest norm of each matrix is
            ``MODERATE``, entries need not be looked at.

    Returns:
        The gradient, and the largest absolute entry of each matrix of it, [B, 1, 1]; None where it was not looked at.
    """
    if energy is not None and all(MODERATE[0] ** 2 <= x <= MODERATE[1] ** 2 for x in energy.amax(-1).tolist()):
        return G, None
    limit = torch.finfo(G.dtype).max ** (1 / 3)
    largest = largest_entry(G)
    if looks_are_free(G) and largest.max().item() <= limit:
        return G, largest  # to look at a number is free there, a pass is not
    factor = (limit / largest).clamp(max=1.0)
    return G * factor, largest * factor


def thin_qr(H: Tensor) -> Tensor:
    """The orthonormal factor [B, m, r] of ``H`` [B, m, r]. H = 0 gives the first r unit vectors."""
    return _or_on_cpu(lambda H: torch.linalg.qr(H).Q, H)


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
    A = unit_scale(A)
    return _eigh((A + A.mT) / 2)[1].flip(-1)[..., :r].contiguous()


def inverse_root(A: Tensor, power: float) -> Tensor:
    """``A`` to the power -``power``, for symmetric positive semi-definite ``A`` [B, m, m].

    Eigenvalues below the rounding error of the largest are raised to it: what a singular matrix does not determine
    stays finite. A = 0 gives the identity.

    Raises:
        torch.linalg.LinAlgError: ``A`` has entries that are not finite, or no solver converges.
    """
    largest = A.abs().amax(dim=(-2, -1), keepdim=True)
    largest = largest.where(largest != 0, 1.0)
    A = A / largest
    values, vectors = _eigh((A + A.mT) / 2)
    floor = torch.finfo(A.dtype).eps * values[..., -1:]
    roots = values.maximum(floor).where(floor > 0, 1.0).pow(-power).unsqueeze(-2)
    return (vectors * (roots * largest.pow(-power))) @ vectors.mT


def _eigh(A: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues in ascending order and eigenvectors: as is, in float64 on the CPU, then with a jitter as well.

    Ill-conditioned or low-precision covariances make some solvers give up (a complaint of GaLore's users), and a GPU that
    is nearly full has no room for theirs; the slow, reliable one then saves the run, for the matrices that need it.

    Args:
        A: [B, m, m], symmetric, its largest entry about 1.

    Raises:
        NoConvergenceError: nothing helped.
        torch.linalg.LinAlgError: ``A`` has entries that are not finite.
    """
    try:
        return tuple(torch.linalg.eigh(A))
    except RuntimeError as error:  # LinAlgError among them
        if not isinstance(error, torch.linalg.LinAlgError):
            _make_room(error)
        if not torch.isfinite(A).all():
            raise torch.linalg.LinAlgError(
                "the gradient covariance has entries that are not finite: the loss has diverged; "
                "lower the learning rate or clip the gradient"
            ) from None
    if A.ndim > 2 and len(A) > 1:  # a stack, of which one may have failed
        values, vectors = zip(*map(_eigh, A.split(1)), strict=True)
        return torch.cat(values), torch.cat(vectors)
    wide = A.cpu().double()
    for jitter in (0.0, 1e-10):
        try:
            values, vectors = torch.linalg.eigh(wide + jitter * torch.eye(A.shape[-1], dtype=wide.dtype, device="cpu"))
            return values.to(A), vectors.to(A)
        except torch.linalg.LinAlgError:
            continue
    raise NoConvergenceError(
        f"no eigen-solver converged for a matrix {list(A.shape[-2:])} with finite entries, nor in float64 with a "
        "jitter; lower the learning rate or clip the gradient"
    )


def _or_on_cpu(solve: Callable[..., Tensor], *stacks: Tensor) -> Tensor:
    """``solve(*stacks)``, on the CPU where the GPU's library cannot."""
    try:
        return solve(*stacks)
    except RuntimeError as error:
        _make_room(error)
        return solve(*(x.cpu() for x in stacks)).to(stacks[0].device)


def _make_room(error: RuntimeError) -> None:
    """After a failure of CUDA's solvers, as a rule for want of memory: give back what is cached, and say so.

    torch makes a LinAlgError of few of their complaints; most are plain RuntimeErrors with the library's code.

    Raises:
        RuntimeError: ``error`` itself, if it is another one.
    """
    words = str(error)
    if (
        not isinstance(error, torch.OutOfMemoryError)
        and "cusolver" not in words.lower()
        and "CUBLAS_STATUS" not in words
    ):
        raise error
    warnings.warn(
        f"a decomposition failed on the GPU ({words.splitlines()[0]}): it is tried again in parts or on the CPU, which is "
        "slow; if this goes on, leave more memory free, for example by smaller micro-batches",
        stacklevel=4,
    )
    torch.cuda.empty_cache()


def or_previous(solve: Callable[[], Tensor], previous: Tensor, ctx: Context, first: Tensor | None = None) -> Tensor:
    """What ``solve`` returns, or ``previous`` with a warning if no eigen-solver converged: the run goes on.

    Args:
        solve: computes a basis (or root) [B, m, r]; errors about entries that are not finite are not caught.
        previous: [B, m, r], the one of the last refresh.
        ctx: names the matrices, and tells whether there was a refresh before.
        first: stands for ``previous`` at the first step; None for the first r unit vectors.
    """
    try:
        return solve()
    except NoConvergenceError as error:
        instead = "the previous basis" if ctx.step > 1 else "a start that looks at no gradient"
        warnings.warn(
            f"{', '.join(ctx.names)}, step {ctx.step}: {error} (this run goes on with {instead})", stacklevel=2
        )
    if ctx.step > 1:
        return previous
    return torch.eye(*previous.shape[-2:]).to(previous).expand_as(previous).clone() if first is None else first


def newton_schulz(A: Tensor, iterations: int) -> Tensor:
    """A^(-1/2) by the coupled iteration of App. B.8: Y to A^(1/2) and Z to A^(-1/2), up to the scale.

    Args:
        A: [B, m, m], positive semi-definite, its largest entry about 1.
        iterations: 5 in the paper. Eigenvalues below about (4/9)^iterations times the norm have not converged: their
            inverse roots come out too small. Those of a singular matrix stay finite.
    """
    norm = A.flatten(1).norm(dim=1).clamp_min(torch.finfo(A.dtype).tiny)[:, None, None]
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    Y, Z = A / norm, eye.expand_as(A)
    for _ in range(iterations):
        T = (3 * eye - Z @ Y) / 2
        Y, Z = Y @ T, T @ Z
    return Z / norm.sqrt()


def quintic(X: Tensor, steps: int, eps: float) -> Tensor:
    """Muon's orthogonalisation (Jordan et al. 2024): singular values go to about 0.7 to 1.2, whatever they were.

    Args:
        X: [B, m, n], m <= n; its dtype is the one computed in.
        steps: of the iteration, 5 as a rule.
        eps: the least Frobenius norm to divide by.
    """
    # Not by vmap, which makes three operations of a product that is added to something.
    with widened(X):
        return _orthogonalised(X, steps, eps) if stacked(X) else each(_orthogonalised, X, steps=steps, eps=eps)


def _orthogonalised(X: Tensor, steps: int, eps: float) -> Tensor:
    """Of one matrix [m, n] or a stack of them."""
    if not looks_are_free(X) or X.norm().isinf():  # of what is infinite, nothing would be left
        X = bounded(X.unsqueeze(0))[0].squeeze(0) if X.ndim == 2 else bounded(X)[0]
    if X.stride(-2) == 1:  # a tall matrix, turned: as it is stored, from the right
        return _quintic(X.mT, steps, eps, right=True).mT
    return _quintic(X, steps, eps)


def _quintic(X: Tensor, steps: int, eps: float, right: bool = False) -> Tensor:
    a, b, c = QUINTIC
    add_product = torch.addmm if X.ndim == 2 else torch.baddbmm
    X = X / torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True).clamp(min=eps)  # now no singular value exceeds 1
    for _ in range(steps):
        A = gram(X.mT if right else X)
        B = add_product(A, A, A, beta=b, alpha=c)
        X = add_product(X, X, B, beta=a) if right else add_product(X, B, X, beta=a)
    return X


def power_step(A: Tensor, U: Tensor) -> tuple[Tensor, Tensor]:
    """One power iteration and QR from the complete basis ``U``, as SOAP's code refreshes its bases.

    Args:
        A: [B, m, m], symmetric.
        U: [B, m, m], orthonormal.

    Returns:
        The new basis, and order [B, m]: the columns of ``U`` sorted by their Rayleigh quotients, largest first,
        which is how quantities kept in the old basis have to be permuted.
    """
    AU = unit_scale(A) @ U
    order = (U * AU).sum(-2).argsort(dim=-1, descending=True)
    return thin_qr(AU.gather(-1, order.unsqueeze(-2).expand_as(AU))), order


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
    E = torch.zeros(*index.shape[:-1], U.shape[-2], index.shape[-1], dtype=U.dtype, device=U.device)
    E.scatter_(-2, (index + U.shape[-1]).unsqueeze(-2), 1.0)
    return _or_on_cpu(lambda U, E: torch.ormqr(*torch.geqrf(U), E), U, E)


def align_signs(U: Tensor, U_prev: Tensor) -> Tensor:
    """Negate each column of ``U`` that points away from the same column of ``U_prev`` (both [B, m, r]).

    Eigenvectors have no sign of their own, but the momentum is kept in their coordinates: without a rule,
    trajectories depend on the solver. Not in the paper.
    """
    return U * torch.where((U * U_prev).sum(-2, keepdim=True) < 0, -1.0, 1.0).to(U)
