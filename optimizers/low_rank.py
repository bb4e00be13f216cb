"""The parts of the paper's low-rank framework (section 5): switching, compensation, and their rivals (F.7).

Shapes: G [B, m, n] with m <= n; U [B, m, r]; sigma, omega [B, r, n]; p [B, n]; phi [B].
"""

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from .base import Context
from .factored import Factored
from .limiter import growth_limit
from .linalg import column_energy, complement_columns, largest_entry, looks_are_free

SWITCHING = ("none", "complement", "full_basis", "gaussian_mix", "gaussian")
COMPENSATION = ("none", "optimal", "fira", "fira_plus")
LOGGED = (1, 2, 4, 8)  # columns of U that Figure 6 shows, in descending order of eigenvalues


def draw_columns(total: int, count: int, generators: list[torch.Generator]) -> Tensor:
    """``count`` of ``total`` indices without replacement, in the order drawn: [B, count], on the CPU."""
    return torch.stack([torch.randperm(total, generator=generator, device="cpu")[:count] for generator in generators])


def draw_gaussian(rows: int, count: int, generators: list[torch.Generator]) -> Tensor:
    """Independent N(0, 1) entries: [B, rows, count], float64 on the CPU (the same for every device and dtype)."""
    return torch.stack(
        [torch.randn(rows, count, dtype=torch.float64, generator=generator, device="cpu") for generator in generators]
    )


def switch(ritz: Tensor, leading: int, kind: str, generators: list[torch.Generator]) -> Tensor:
    """Algorithm 2, lines 2 to 5: keep the ``leading`` Ritz vectors, draw the other r - l directions.

    Args:
        ritz: U' [B, m, r], orthonormal, in descending order.
        leading: l.
        kind: where the other directions come from: "complement" of U' (the paper's), the "full_basis" but for
            the leading vectors, or unit-length "gaussian_mix" vectors, which are not orthogonalised.
        generators: one for each matrix.

    Returns:
        U [B, m, r].
    """
    m, r = ritz.shape[-2:]
    if kind == "complement":
        leading = max(leading, 2 * r - m)  # with fewer than r - l complement directions, keep more Ritz vectors
        index = draw_columns(m - r, r - leading, generators).to(ritz.device)
        drawn = complement_columns(ritz, index)
    elif kind == "full_basis":
        index = draw_columns(m - leading, r - leading, generators).to(ritz.device)
        everything = torch.arange(m - r, device=ritz.device).expand(len(ritz), -1)
        rest = torch.cat([ritz[..., leading:], complement_columns(ritz, everything)], dim=-1)
        drawn = rest.gather(-1, index.unsqueeze(-2).expand(-1, m, -1))
    elif kind == "gaussian_mix":
        drawn = unit_gaussian(m, r - leading, generators).to(ritz)
    else:
        raise ValueError(f"no switching called {kind!r}; choose one of {', '.join(SWITCHING)}")
    return torch.cat([ritz[..., :leading], drawn], dim=-1)


def unit_gaussian(rows: int, count: int, generators: list[torch.Generator]) -> Tensor:
    """Gaussian columns scaled to unit length (F.7): [B, rows, count]."""
    X = draw_gaussian(rows, count, generators)
    return X / X.norm(dim=-2, keepdim=True)


def adam_quotient(sigma: Tensor, m: Tensor, v: Tensor, betas: tuple[float, float], eps: float) -> Tensor:
    """m / (sqrt(v) + eps), after the averages m and v have taken in sigma and its square (lines 13 to 15 of Algorithm 4).

    All are [B, r, n] of one dtype; in bfloat16, everything is computed in float32 and rounded once. On the CPU torch's
    fused Adam does so in one pass: its step of rate -1 from a weight 0, late enough for its bias corrections to be 1.
    """
    beta1, beta2 = betas
    if looks_are_free(sigma) and sigma.stride() == m.stride():
        omega = torch.zeros_like(sigma)
        torch._fused_adam_(
            [omega], [sigma], [m], [v], [], [_late()],
            lr=-1.0, beta1=beta1, beta2=beta2, weight_decay=0.0, eps=eps, amsgrad=False, maximize=False,
        )  # fmt: skip
        return omega
    wide = torch.promote_types(m.dtype, torch.float32)
    sigma, M, V = sigma.to(wide), m.to(wide), v.to(wide)
    M.lerp_(sigma, 1 - beta1)
    V.mul_(beta2).addcmul_(sigma, sigma, value=1 - beta2)
    if M is not m:
        m.copy_(M)
        v.copy_(V)
    return (M / V.sqrt().add_(eps)).to(m.dtype)


@cache
def _late() -> Tensor:
    return torch.tensor(math.inf, device="cpu")


def residual_energy(
    G: Tensor,
    U: Tensor,
    sigma: Tensor,
    rounding: float,
    orthonormal: bool = True,
    kept: float = 1.0,
    whole: Tensor | None = None,
) -> Tensor:
    """||g_j - kept U sigma_j||^2 for each column: [B, n], without forming the difference.

    Args:
        whole: ||g_j||^2 [B, n], where it is known.

    It is ||g_j||^2 - (2 kept - kept^2) ||sigma_j||^2 if U is ``orthonormal``, else it takes U^T U. Where that is below
    ``rounding`` times ||g_j||^2, nothing is known of it but that it is small: this least value stands for it, as one at or
    below 0 would be divided by.
    """
    whole, projected = column_energy(G) if whole is None else whole, column_energy(sigma)
    if orthonormal:
        rest = whole - (2 * kept - kept**2) * projected
    else:
        U, sigma = U.to(projected.dtype), sigma.to(projected.dtype)
        rest = whole - 2 * kept * projected + kept**2 * (sigma * (U.mT @ U @ sigma)).sum(-2)
    return rest.maximum(rounding * whole)


def with_residual(U: Tensor, inner: Tensor, G: Tensor, sigma: Tensor, columns: Tensor, kept: float = 1.0) -> Factored:
    """U inner + (G - kept U sigma) Diag(columns), as U (inner - kept sigma Diag(columns)) + G Diag(columns).

    Args:
        columns: [B, 1, n].
    """
    columns = columns.to(sigma.dtype)
    return Factored(U=U, R=torch.addcmul(inner, columns, sigma, value=-kept), G=G, columns=columns)


def optimal_compensation(
    residual: Tensor,
    dimension: int,
    p: Tensor,
    phi: Tensor,
    beta: float,
    gamma: float | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 3: what the subspace leaves out, scaled column by column as Theorem 5.1 says is optimal.

    eta C = (G - U sigma) Diag(c), so ||C|| follows from the norms of the columns of the residual.

    Args:
        residual: [B, n], ||g_i - U sigma_i||^2, what p averages: ||g_i||^2 - ||sigma_i||^2 as printed, for orthonormal U. Of
            one that is not, the printed difference can be negative.
        dimension: m - r.

    Returns:
        c [B, 1, n], p and phi.
    """
    p = p.lerp(residual, 1 - beta)
    # p is negative only in states that older versions saved with Gaussian bases
    D = math.sqrt(dimension) / p.clamp_min(0).sqrt().add_(eps)
    eta, phi = growth_limit((residual * D.square()).sum(-1).sqrt(), phi, gamma)
    return D.unsqueeze(-2) * eta, p, phi


def fira_scaling(sigma: Tensor, omega: Tensor, eps: float) -> Tensor:
    """Fira's scale of a residual's columns (Chen et al. 2024), as Adam scales those of the projection: [B, 1, n]."""
    return (column_energy(omega).sqrt() / column_energy(sigma).sqrt().add_(eps)).unsqueeze(-2)


def matching(G: Tensor, U: Tensor, sigma: Tensor, omega: Tensor, s: Tensor, accuracy: tuple[float, bool]) -> Tensor:
    """Fira+ (F.7): ||U omega|| / ||(G - U sigma) Diag(s)||, [B, 1, 1]; 0 if nothing is left of the gradient."""
    c = largest_entry(G).clamp_min(torch.finfo(G.dtype).tiny)  # without it, squares of 1e-20 leave float32
    residual = residual_energy(G / c, U, sigma / c, *accuracy)
    low_rank = (U.to(omega.dtype) @ omega).flatten(1).norm(dim=1)
    norm = (residual * s.square().squeeze(-2)).sum(-1).sqrt()
    return (low_rank / norm.where(norm > 0, float("inf")))[:, None, None] / c


def rounding(U: Tensor, ctx: Context) -> float:
    """What part of ||g||^2 the difference ||g||^2 - ||sigma||^2 may be wrong by, as products are computed."""
    # of bfloat16 numbers a quarter of their resolution: measured 0.0006 at most for U [512, 128] and random gradients
    own = torch.finfo(U.dtype).eps / (4 if U.dtype == torch.bfloat16 else 1)
    return max(own, ctx.rounding) if U.dtype == torch.float32 else own


def is_rounded(U: Tensor, ctx: Context) -> bool:
    """Is ``U`` kept in a dtype narrower than the one computed in, in which it is orthonormal to three digits only?"""
    return ctx.stored is not None and torch.finfo(ctx.stored).eps > torch.finfo(U.dtype).eps


def basis_cosines(U_prev: Tensor, U: Tensor) -> Tensor:
    """|cosine| between each column of ``LOGGED`` before and after an update of the basis (Figure 6).

    Returns:
        [B, 4], less where r < 8.
    """
    columns = [j - 1 for j in LOGGED if j <= U.shape[-1]]
    return cosine_similarity(U_prev[..., columns], U[..., columns], dim=-2).abs()
