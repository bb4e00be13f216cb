"""What every structure offers, against the dense matrices that it stands for."""

import pytest
import torch

import fisher

M, N = 3, 5
RANK = 2


def samples(seed=0, count=6, m=M, n=N):
    """Gradients [count, m, n] with rows and columns of different sizes and a common part."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return torch.exp(0.5 * normal(m, 1)) * (normal(count, m, n) + 0.5 * normal(m, n)) * torch.exp(0.5 * normal(n))


def kron(A, B):
    return torch.kron(A.contiguous(), B.contiguous())


def mean(X):
    return X.mean(0)


def root(A, p):
    """A^p of a symmetric matrix, 0 on its null space."""
    values, vectors = torch.linalg.eigh(A)
    powers = torch.tensor([x**p if x > 1e-12 * values.max() else 0.0 for x in values.tolist()], dtype=A.dtype)
    return vectors @ torch.diag(powers) @ vectors.mT


def top(covariance, r=None):
    return torch.linalg.eigh(covariance).eigenvectors.flip(-1)[:, :r].contiguous()


def rank_one(P):
    """s, q with q s^T the best rank-one fit of P."""
    U, sigma, Vh = torch.linalg.svd(P)
    return sigma[0] * Vh[0], U[:, 0]


def rotated(G, U_L, U_R):
    V = kron(U_R, U_L)
    return V @ torch.diag(mean((U_L.mT @ G @ U_R) ** 2).mT.flatten()) @ V.mT


def complement(G):
    """Alice's second part, with a basis of the complement."""
    U_c = top(mean(G @ G.mT))[:, RANK:]
    o = mean(((U_c.mT @ G) ** 2).sum(-2)) / (M - RANK)
    return kron(torch.diag(o), U_c @ U_c.mT)


# Each closed form written out with Kronecker products and dense matrices, sharing nothing with the package.
DENSE = {
    "Scalar": lambda G: mean(G**2).mean() * torch.eye(M * N, dtype=G.dtype),
    "Diagonal": lambda G: torch.diag(mean(G**2).mT.flatten()),
    "Whitening": lambda G: kron(torch.eye(N, dtype=G.dtype), mean(G @ G.mT) / N),
    "RightWhitening": lambda G: kron(mean(G.mT @ G) / M, torch.eye(M, dtype=G.dtype)),
    "Normalization": lambda G: kron(torch.diag(mean((G**2).sum(1)) / M), torch.eye(M, dtype=G.dtype)),
    "TwoSidedScaling": lambda G: kron(*(torch.diag(x) for x in rank_one(mean(G**2)))),
    "Shampoo": lambda G: kron(root(mean(G.mT @ G) / M, 0.5), root(mean(G @ G.mT) / N, 0.5)),
    "EigenAdam": lambda G: rotated(G, top(mean(G @ G.mT)), torch.eye(N, dtype=G.dtype)),
    "SOAP": lambda G: rotated(G, top(mean(G @ G.mT)), top(mean(G.mT @ G))),
    "BlockDiagonal": lambda G: torch.block_diag(*(mean(G[..., i : i + 1] @ G[..., i : i + 1].mT) for i in range(N))),
    "GaLore": lambda G: rotated(G, top(mean(G @ G.mT), RANK), torch.eye(N, dtype=G.dtype)),
    "Alice": lambda G: DENSE["GaLore"](G) + complement(G),
}
FIXED_POINTS = ("ScaledWhitening", "NearestKronecker")
ALL = [*DENSE, *FIXED_POINTS]


def fit(name, G):
    return getattr(fisher, name).fit(G, *[RANK] if name in ("GaLore", "Alice") else [])


def test_every_structure_is_tested():
    classes = {name for name in fisher.__all__ if isinstance(getattr(fisher, name), type)} - {"Structure"}
    assert classes == set(ALL)


@pytest.mark.parametrize("name", DENSE)
def test_the_matrix_is_the_closed_form(name):
    G = samples()
    torch.testing.assert_close(fit(name, G).matrix(), DENSE[name](G), rtol=1e-10, atol=1e-10)


def test_the_fisher_matrix_stacks_columns():
    g = torch.tensor([[1.0, 3.0], [2.0, 4.0]], dtype=torch.float64)
    vec = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(fisher.empirical_fisher(torch.stack([g, -g])), torch.outer(vec, vec))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("other", [False, True], ids=["fitted samples", "other samples"])
def test_the_error_needs_no_fisher_matrix(name, other):
    G = samples()
    structure = fit(name, G)
    G = samples(seed=1, count=4) if other else G
    F = fisher.empirical_fisher(G)
    dense = (F - structure.matrix()).square().sum() / F.square().sum()
    assert structure.error(G) == pytest.approx(dense.item(), rel=1e-10)


@pytest.mark.parametrize("name", ALL)
def test_the_rescaled_error_is_that_of_the_best_multiple(name):
    """Of other samples than the fitted ones; for those, a minimiser is its own best multiple."""
    G = samples()
    structure = fit(name, G)
    F_tilde, F = structure.matrix().flatten(), fisher.empirical_fisher(samples(seed=1)).flatten()
    c = torch.linalg.lstsq(F_tilde[:, None], F[:, None]).solution.item()
    best = ((F - c * F_tilde).square().sum() / F.square().sum()).item()
    assert structure.error(samples(seed=1), rescaled=True) == pytest.approx(best, rel=1e-10)
    own, rescaled = structure.error(G), structure.error(G, rescaled=True)
    assert rescaled < own - 1e-3 if name == "Shampoo" else rescaled == pytest.approx(own, rel=1e-10)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("count", [6, 1], ids=["six samples", "one sample"])
def test_the_direction_is_the_pseudo_inverse_root(name, count):
    G = samples(count=count)
    structure = fit(name, G)
    dense = root(structure.matrix(), -0.5) @ G[0].mT.flatten()
    torch.testing.assert_close(structure.inverse_sqrt(G[0]), dense.reshape(N, M).mT, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_stacks_are_served_matrix_by_matrix(name):
    G = samples()
    structure = fit(name, G)
    for function in (structure.product, structure.inverse_sqrt):
        torch.testing.assert_close(function(G), torch.stack([function(X) for X in G]))


@pytest.mark.parametrize("name", ALL)
def test_scale(name):
    """c G has c^2 F~ and the same direction, for every c that the samples leave inside the range of float64."""
    G = samples()
    reference, error = fit(name, G).inverse_sqrt(G[0]), fit(name, G).error(G)
    for c in (1e-30, 1e30):
        structure = fit(name, c * G)
        torch.testing.assert_close(structure.inverse_sqrt(c * G[0]), reference, rtol=1e-8, atol=1e-8)
        assert structure.error(c * G) == pytest.approx(error, rel=1e-8)


def test_elements():
    sizes = {name: fit(name, samples()).elements() for name in ALL}
    assert sizes == {
        "Scalar": 1,
        "Diagonal": M * N,
        "Whitening": M * M,
        "RightWhitening": N * N,
        "Normalization": N,
        "TwoSidedScaling": M + N,
        "ScaledWhitening": M * M + N,
        "Shampoo": M * M + N * N,
        "NearestKronecker": M * M + N * N,
        "EigenAdam": M * N + M * M,
        "SOAP": M * N + M * M + N * N,
        "BlockDiagonal": N * M * M,
        "GaLore": RANK * N + M * RANK,
        "Alice": RANK * N + M * RANK + N,
    }


def test_zero_gradients_have_no_error_and_no_direction():
    G = torch.zeros(2, M, N, dtype=torch.float64)
    with pytest.raises(ValueError, match="not all zero"):
        fisher.Diagonal.fit(G).error(G)
    assert not fisher.Diagonal.fit(G).inverse_sqrt(G[0]).any()
    assert fisher.Diagonal.fit(G).error(samples(), rescaled=True) == 1


@pytest.mark.parametrize(("structure", "rank"), [(fisher.GaLore, 4), (fisher.Alice, 0), (fisher.Alice, 3)])
def test_ranks_out_of_range(structure, rank):
    with pytest.raises(ValueError, match=r"choose a rank|use EigenAdam"):
        structure.fit(samples(), rank)
