"""The parts of the paper's low-rank framework (section 5): switching, compensation, and their rivals (F.7).

Shapes: G [B, m, n] with m <= n; U [B, m, r]; sigma, omega [B, r, n]; p [B, n]; phi [B].
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from .limiter import limit_growth
from .linalg import complement_columns

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


def optimal_compensation(
    G: Tensor,
    U: Tensor,
    sigma: Tensor,
    p: Tensor,
    phi: Tensor,
    beta: float,
    gamma: float | None,
    eps: float,
    orthonormal: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 3: what the subspace leaves out, scaled column by column as Theorem 5.1 says is optimal.

    The printed energy of column i, ||g_i||^2 - ||sigma_i||^2, is ||g_i - U sigma_i||^2 if U is orthonormal. The second
    form is used there: a U kept in bfloat16 is orthonormal to three digits only, and a difference that comes out at or
    below 0 would be divided by. Gaussian bases (``orthonormal`` False) take the printed form.

    Returns:
        eta C [B, m, n], p and phi.
    """
    m, r = U.shape[-2:]
    residual = G - U @ sigma
    energy = residual.square().sum(-2) if orthonormal else G.square().sum(-2) - sigma.square().sum(-2)
    p = beta * p + (1 - beta) * energy
    D = 1 / (p.clamp_min(0).sqrt() + eps)
    C = math.sqrt(m - r) * residual * D.unsqueeze(-2)
    C, phi = limit_growth(C, phi, gamma)
    return C, p, phi


def fira_compensation(
    G: Tensor,
    U: Tensor,
    sigma: Tensor,
    omega: Tensor,
    eps: float,
    kept: float = 1.0,
) -> Tensor:
    """Fira's residual (Chen et al. 2024), scaled by how much Adam scales the same column of the projection.

    ``kept`` is the part of U sigma that is taken out of G: all of it, but alpha in the published code.

    Returns:
        S [B, m, n], before the limiter.
    """
    scaling = omega.norm(dim=-2) / (sigma.norm(dim=-2) + eps)
    return (G - kept * (U @ sigma)) * scaling.unsqueeze(-2)


def basis_cosines(U_prev: Tensor, U: Tensor) -> Tensor:
    """|cosine| between each column of ``LOGGED`` before and after an update of the basis (Figure 6).

    Returns:
        [B, 4], less where r < 8.
    """
    columns = [j - 1 for j in LOGGED if j <= U.shape[-1]]
    return cosine_similarity(U_prev[..., columns], U[..., columns], dim=-2).abs()


def match_norm(S: Tensor, reference: Tensor) -> Tensor:
    """Fira+ (F.7): ``S`` scaled to the Frobenius norm of ``reference``, matrix by matrix."""
    norms = [X.flatten(1).norm(dim=1) for X in (reference, S)]
    return S * (norms[0] / norms[1].clamp_min(torch.finfo(S.dtype).tiny))[:, None, None]
