"""Low-rank SOAP: the theorem of docs/low_rank_soap.md, its limits, and an independent transcription in NumPy."""

import copy
import io
import itertools

import numpy as np
import pytest
import torch

from optimizers import Alice, low_rank
from optimizers import base as base_module
from optimizers.low_rank_soap import LowRankSOAP

# All different from each other and from the defaults, so that a mixed-up letter shows. eps is large because the first
# sigma is diagonal but for rounding, which a small one would amplify (section 7 of the documentation).
OPTIONS = dict(
    betas=(0.9, 0.95, 0.8),
    rank=5,
    right_rank=7,
    leading=3,
    update_interval=6,
    scale=0.3,
    compensation_scale=0.4,
    limiter=1.1,
    eps=1e-4,
)
SHAPES = [(10, 16), (16, 10), (11, 11)]
PLAIN = dict(scale=1.0, compensation_scale=1.0, limiter=None, eps=1e-30)


def make_gradients(shape, seed, steps):
    """Full rank, a decaying spectrum, slowly turning, of changing size."""
    rng = np.random.default_rng([seed, *shape])
    s = min(shape)

    def signal():
        left, right = (np.linalg.qr(rng.standard_normal((side, s)))[0] for side in shape)
        return left @ np.diag(3 * 0.8 ** np.arange(s)) @ right.T

    first, second = signal(), signal()
    return [
        np.exp(0.4 * rng.standard_normal())
        * (np.cos(0.05 * t) * first + np.sin(0.05 * t) * second + 0.15 * rng.standard_normal(shape))
        for t in range(steps)
    ]


def run(optimizer_class, gradients, dtype=torch.float64, **options):
    """Yield (update direction, state as arrays) after each step."""
    W = torch.nn.Parameter(torch.zeros(gradients[0].shape, dtype=dtype))
    optimizer = optimizer_class([W], lr=1.0, **options)
    for G in gradients:
        with torch.no_grad():
            W.zero_()
        W.grad = torch.as_tensor(G).to(dtype)
        optimizer.step()
        state = {k: v.numpy().copy() if torch.is_tensor(v) else v for k, v in optimizer.state[W].items()}
        yield -W.detach().numpy(), state


def last(steps):
    *_, final = steps
    return final


def relative(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def low_rank_part(state):
    return state["U"] @ (state["m"] / np.sqrt(state["v"])) @ state["V"].T


def complement(U):
    return np.linalg.qr(U, mode="complete")[0][:, U.shape[1] :]


def evd(M, r):
    return np.linalg.eigh((M + M.T) / 2)[1][:, ::-1][:, :r]


# An independent transcription ---------------------------------------------------------------------------------


class Reference:
    """The algorithm of docs/low_rank_soap.md with explicit complements and covariances, for m <= n."""

    def __init__(self, m, n, *, betas, rank, right_rank, leading, update_interval, scale, compensation_scale,
                 limiter, eps, tracking=True, switching="complement", compensation="optimal"):  # fmt: skip
        self.b1, self.b2, self.b3 = betas
        self.K, self.l, self.alpha, self.alpha_c = update_interval, leading, scale, compensation_scale
        self.gamma, self.eps, self.kind, self.tracking = limiter, eps, compensation, tracking
        self.switching, self.t, self.phi, self.energy = switching, 0, 0.0, {}
        self.bases = [np.zeros((m, rank)), np.zeros((n, right_rank))]
        self.Q = [np.zeros((rank, rank)), np.zeros((right_rank, right_rank))]
        self.m_t = self.v_t = np.zeros((rank, right_rank))

    def new_basis(self, U, Q_tilde, G, draw):
        beta3 = self.b3 if self.tracking else 0.0
        Q = beta3 * U @ Q_tilde @ U.T + (1 - beta3) * G @ G.T
        r = U.shape[1]
        if self.t == 1 or self.switching == "none":
            new = evd(Q, r)
        else:
            new = np.linalg.qr(Q @ U)[0]
            new = new @ evd(new.T @ Q @ new, r)
        if self.switching == "complement":
            new = np.hstack([new[:, : self.l], complement(new)[:, draw(U.shape[0] - r, r - self.l)]])
        if self.t > 1:
            new = new * np.where(np.sum(new * U, axis=0) < 0, -1, 1)
        return new, new.T @ (U @ Q_tilde @ U.T) @ new

    def scaled(self, name, block, axis):
        """A block of U_f^T G V_f over the root of its averaged mean square along ``axis``."""
        energy = np.sum(block**2, axis=axis, keepdims=True)
        self.energy[name] = self.b1 * self.energy.get(name, 0) + (1 - self.b1) * energy
        return block * np.sqrt(block.size / energy.size) / (np.sqrt(self.energy[name]) + self.eps)

    def direction(self, G, draw):
        self.t += 1
        if self.t == 1 or self.t % self.K == 0:
            for i, X in enumerate((G, G.T)):
                self.bases[i], self.Q[i] = self.new_basis(self.bases[i], self.Q[i], X, draw)
        U, V = self.bases
        for i, X in enumerate((U.T @ G, V.T @ G.T)):
            self.Q[i] = self.b3 * self.Q[i] + (1 - self.b3) * X @ X.T
        U_c, V_c = complement(U), complement(V)
        sigma = U.T @ G @ V
        self.m_t = self.b1 * self.m_t + (1 - self.b1) * sigma
        self.v_t = self.b2 * self.v_t + (1 - self.b2) * sigma**2
        update = U @ (self.m_t / (np.sqrt(self.v_t) + self.eps)) @ V.T
        if self.kind == "none":
            return self.alpha * update
        C = U @ self.scaled("q", U.T @ G @ V_c, 1) @ V_c.T
        if self.kind == "optimal":
            C = C + U_c @ self.scaled("p", U_c.T @ G @ V, 0) @ V.T
            C = C + U_c @ self.scaled("e", U_c.T @ G @ V_c, (0, 1)) @ V_c.T
        else:
            C = C + U_c @ self.scaled("p", U_c.T @ G, 0)
        norm = np.linalg.norm(C)
        eta = 1.0 if self.phi == 0 else self.gamma / max(norm / self.phi, self.gamma)
        self.phi = eta * norm
        return self.alpha * (update + self.alpha_c * eta * C)


@pytest.fixture
def draws(monkeypatch):
    """The columns that the package draws for each basis, in call order."""
    log, draw_columns = [], low_rank.draw_columns

    def logged(total, count, generators):
        drawn = draw_columns(total, count, generators)
        log.extend((total, count, row.tolist()) for row in drawn)
        return drawn

    monkeypatch.setattr(low_rank, "draw_columns", logged)
    return log


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compensation": "columns"},
        {"compensation": "none"},
        {"tracking": False},
        {"switching": "none"},
        {"right_rank": 4},
    ],
    ids=str,
)
def test_agrees_with_the_transcription(shape, options, draws):
    """30 steps with six refreshes, in float64: updates to 1e-9 at every step, the states at the end."""
    options = {**OPTIONS, **options}
    turn = (lambda X: X.T) if shape[0] > shape[1] else (lambda X: X)
    reference = Reference(*sorted(shape), **options)

    def draw(total, count):
        wanted, number, drawn = draws.pop(0)
        assert (wanted, number) == (total, count)
        return drawn

    gradients, state = make_gradients(shape, 0, 30), {}
    for G, (update, state) in zip(gradients, run(LowRankSOAP, gradients, **options), strict=True):  # noqa: B007
        assert relative(turn(update), reference.direction(turn(G), draw)) < 1e-9
    assert not draws
    # Columns are compared up to their signs, which are free at the first step.
    for i, (basis, tracked) in enumerate((("U", "Q_L"), ("V", "Q_R"))):
        signs = np.sign(np.sum(state[basis] * reference.bases[i], axis=0))
        assert relative(state[basis] * signs, reference.bases[i]) < 1e-9
        if options.get("tracking", True):
            assert relative(signs[:, None] * state[tracked] * signs, reference.Q[i]) < 1e-9
    if options.get("compensation") != "none":
        assert state["phi"] == pytest.approx(reference.phi, rel=1e-9)


# The theorem --------------------------------------------------------------------------------------------------


def discarded_energies(gradients, U, V, beta):
    """E[(U_f^T G V_f)^2] with 0 for the kept block, E being the average whose weights are (1 - beta) beta^(T - t)."""
    U_f, V_f = np.hstack([U, complement(U)]), np.hstack([V, complement(V)])
    D = 0
    for G in gradients:
        D = beta * D + (1 - beta) * (U_f.T @ G @ V_f) ** 2
    D[: U.shape[1], : V.shape[1]] = 0
    return U_f, V_f, D


@pytest.mark.parametrize("beta1", [0.0, 0.7])
@pytest.mark.parametrize(("m", "n", "r", "k"), [(3, 4, 1, 2), (3, 4, 2, 1), (4, 4, 2, 3), (3, 5, 3, 2), (3, 4, 2, 4)])
def test_compensation_is_the_minimiser_of_the_stated_problem(m, n, r, k, beta1):
    """Least squares over every (A, B, o) of the invariant class, off-diagonals included, against the optimizer."""
    options = dict(rank=r, right_rank=k, leading=0, update_interval=100, betas=(beta1, 0.9, 0.9), **PLAIN)
    gradients = make_gradients((m, n), 1, 4)
    update, state = last(run(LowRankSOAP, gradients, **options))
    U, V, G = state["U"], state["V"], gradients[-1]
    U_f, V_f, D = discarded_energies(gradients, U, V, beta1)
    big = np.kron(V_f, U_f)
    F_c = big @ np.diag(D.T.ravel()) @ big.T
    U_out, V_out = np.eye(m) - U @ U.T, np.eye(n) - V @ V.T

    def unit(size, i, j):
        E = np.zeros((size, size))
        E[i, j] = E[j, i] = 1
        return E

    basis = [np.kron(V @ unit(k, i, j) @ V.T, U_out) for i in range(k) for j in range(i + 1)]
    basis += [np.kron(V_out, U @ unit(r, i, j) @ U.T) for i in range(r) for j in range(i + 1)]
    basis += [np.kron(V_out, U_out)]
    columns = np.stack([X.ravel() for X in basis], axis=1)
    X = (columns @ np.linalg.lstsq(columns, F_c.ravel(), rcond=None)[0]).reshape(m * n, m * n)

    values, vectors = np.linalg.eigh(X)
    rank = m * n - r * k  # the class covers all that is discarded
    values, vectors = values[-rank:], vectors[:, -rank:]
    assert values[0] > 1e-6
    expected = vectors @ ((vectors.T @ G.T.ravel()) / np.sqrt(values))
    assert relative(update - low_rank_part(state), expected.reshape(n, m).T) < 1e-9


def test_no_larger_class_is_independent_of_the_complement_bases():
    """The symmetric matrices on the discarded space that commute with all rotations of U_c and V_c are the class."""
    rng = np.random.default_rng(0)
    m, n, r, k = 3, 4, 1, 2
    U_f, V_f = (np.linalg.qr(rng.standard_normal((side, side)))[0] for side in (m, n))

    def rotation(basis, rank, sign):
        side = len(basis)
        R = np.eye(side)
        R[rank:, rank:] = np.linalg.qr(rng.standard_normal((side - rank, side - rank)))[0]
        R[:, -1] *= sign  # proper and improper ones, on each side by itself
        return basis @ R @ basis.T

    kept = np.kron(V_f[:, :k] @ V_f[:, :k].T, U_f[:, :r] @ U_f[:, :r].T)
    eye = np.eye(m * n)
    constraints = [np.kron(kept, eye), np.kron(eye, kept)]
    for signs in itertools.product((1, -1), repeat=2):
        T = np.kron(rotation(V_f, k, signs[0]), rotation(U_f, r, signs[1]))
        constraints.append(np.kron(T.T, eye) - np.kron(eye, T))
    symmetric = []
    for i in range(m * n):
        for j in range(i + 1):
            E = np.zeros((m * n, m * n))
            E[i, j] = E[j, i] = 1
            symmetric.append(E.ravel())
    singular = np.linalg.svd(np.vstack(constraints) @ np.stack(symmetric, axis=1), compute_uv=False)
    assert np.sum(singular < 1e-9) == k * (k + 1) // 2 + r * (r + 1) // 2 + 1


def test_columns_is_the_minimiser_of_its_problem():
    """Moving any of the n + r scales of "columns" raises the distance to the Fisher matrix by the parabola's value."""
    m, n, r, k, beta1 = 4, 5, 2, 2, 0.7
    options = dict(rank=r, right_rank=k, leading=1, betas=(beta1, 0.9, 0.9), compensation="columns", **PLAIN)
    gradients = make_gradients((m, n), 2, 4)
    update, state = last(run(LowRankSOAP, gradients, **options))
    U, V, G = state["U"], state["V"], gradients[-1]
    C = update - low_rank_part(state)
    V_out, U_out = np.eye(n) - V @ V.T, np.eye(m) - U @ U.T
    projectors = [np.kron(np.diag(np.eye(n)[j]), U_out) for j in range(n)]
    projectors += [np.kron(V_out, np.outer(U[:, i], U[:, i])) for i in range(r)]
    g, c = G.T.ravel(), C.T.ravel()
    o = [(c @ P @ g / (g @ P @ g)) ** -2 for P in projectors]
    assert relative(sum(x**-0.5 * P @ g for x, P in zip(o, projectors, strict=True)), c) < 1e-9

    weights = (1 - beta1) * beta1 ** np.arange(3, -1, -1)
    F = sum(w * np.outer(X.T.ravel(), X.T.ravel()) for w, X in zip(weights, gradients, strict=True))
    support = sum(projectors)
    F_c = support @ F @ support

    def objective(scales):
        return np.linalg.norm(sum(x * P for x, P in zip(scales, projectors, strict=True)) - F_c) ** 2

    for i, P in enumerate(projectors):
        for factor in (0.9, 1.1):
            moved = [x * (factor if j == i else 1) for j, x in enumerate(o)]
            gain = np.trace(P) * (moved[i] - o[i]) ** 2
            assert objective(moved) - objective(o) == pytest.approx(gain, rel=1e-6)


@pytest.mark.parametrize("kind", ["optimal", "columns"])
def test_one_sample_compensation_is_of_unit_size(kind):
    """Without memory each part has the norm sqrt(its coordinates), so that |C|^2 = mn - rk; and C has no kept part."""
    m, n, r, k = 10, 16, 5, 7
    options = {**OPTIONS, **PLAIN, "betas": (0.0, 0.9, 0.9), "compensation": kind}
    gradients = make_gradients((m, n), 3, 11)
    steps = zip(gradients, run(LowRankSOAP, gradients, **options), strict=True)
    for G, (update, state) in itertools.islice(steps, 1, None):  # at the first step whole parts are 0
        C, U, V = update - low_rank_part(state), state["U"], state["V"]
        assert np.linalg.norm(U.T @ C @ V) < 1e-9 * np.linalg.norm(C)
        assert np.sum((U.T @ C) ** 2, axis=1) == pytest.approx(np.full(r, n - k))
        if kind == "optimal":
            assert np.sum(C**2) == pytest.approx(m * n - r * k)
            outside = C - U @ (U.T @ C)
            assert np.sum((outside @ V) ** 2, axis=0) == pytest.approx(np.full(k, m - r))
        else:
            outside = C - U @ (U.T @ C)
            assert np.sum(outside**2, axis=0) == pytest.approx(np.full(n, m - r))
        assert np.sum(C * G) > 0


# Limits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["optimal", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_step_descends_although_whole_parts_of_it_are_rounding(kind, dtype):
    """U and V diagonalise the first gradient: "lower" and "upper" of leading vectors are 0 but for rounding."""
    for seed in range(20):
        gradients = [100 * G for G in make_gradients((6, 12), seed, 1)]
        W = torch.nn.Parameter(torch.zeros(6, 12, dtype=dtype))
        W.grad = torch.from_numpy(gradients[0]).to(dtype)
        optimizer = LowRankSOAP([W], lr=1.0, rank=4, leading=4, scale=1.0, compensation_scale=1.0, compensation=kind)
        optimizer.step()
        G, update = W.grad.double(), -W.detach().double()
        U, V = (optimizer.state[W][name].double() for name in "UV")
        C = update - U @ (optimizer.state[W]["m"] / optimizer.state[W]["v"].sqrt().add(1e-8)).double() @ V.mT
        assert (update * G).sum() > 0.1 * update.norm() * G.norm()
        assert (U.mT @ C @ V).norm() < (1e-4 if dtype == torch.float32 else 0.1) * C.norm()


def sizes(m, n, r, k):
    return {**OPTIONS, "rank": r, "right_rank": k, "leading": min(r, k, 3)}


@pytest.mark.parametrize("kind", ["optimal", "columns"])
def test_with_every_right_vector_and_v_the_identity_it_is_alice(kind):
    """G^T G diagonal and descending makes V = I: the whole trajectory is Alice's with Q~ rotated at a switch."""
    m, r = 9, 4
    rng = np.random.default_rng(4)
    first = np.linalg.qr(rng.standard_normal((m, m)))[0]
    gradients = []
    for t in range(20):
        turned = np.linalg.qr(first + 0.1 * t * rng.standard_normal((m, m)))[0]
        gradients.append(turned * (0.6 ** np.arange(m) * rng.uniform(0.95, 1.05, m)))
    options = sizes(m, m, r, m)
    ours = run(LowRankSOAP, gradients, compensation=kind, **options)
    del options["right_rank"]
    alices = run(Alice, gradients, tracking_basis="rotated", **options)
    for (one, state), (other, _) in zip(ours, alices, strict=True):
        assert np.abs(np.abs(state["V"]) - np.eye(m)).max() < 1e-9
        assert relative(one, other) < 1e-7


@pytest.mark.parametrize(("m", "n"), [(6, 9), (9, 9)])
def test_with_every_right_vector_the_compensation_is_alices_of_the_rotated_gradient(m, n):
    r = 3
    eps = 1e-4  # at the first step p is 0 but for rounding
    options = {**sizes(m, n, r, n), **PLAIN, "eps": eps}
    p, columns_p = torch.zeros(1, n, dtype=torch.float64), torch.zeros(1, n, dtype=torch.float64)
    gradients = make_gradients((m, n), 5, 5)
    for kind in ("optimal", "columns"):
        steps = run(LowRankSOAP, gradients, compensation=kind, **options)
        for G, (update, state) in zip(gradients, steps, strict=True):
            U, V, X = (torch.from_numpy(x)[None] for x in (state["U"], state["V"], G))
            phi = torch.zeros(1, dtype=torch.float64)
            if kind == "optimal":
                C, p = compensation(X @ V, U, p, phi, eps)
                C = C @ V.mT
            else:
                C, columns_p = compensation(X, U, columns_p, phi, eps)
            kept = state["U"] @ (state["m"] / (np.sqrt(state["v"]) + eps)) @ state["V"].T
            assert relative(update - kept, C[0].numpy()) < 1e-7


def compensation(G, U, p, phi, eps):
    """Alice's C [1, m, n] without limiter, and p."""
    residual = G - U @ (U.mT @ G)
    energy = residual.square().sum(-2)
    c, p, _ = low_rank.optimal_compensation(energy, G.shape[-2] - U.shape[-1], p, phi, 0.9, None, eps)
    return residual * c, p


@pytest.mark.parametrize("kind", ["optimal", "columns"])
@pytest.mark.parametrize(("m", "n", "K"), [(6, 9, 1), (7, 7, 4)])
def test_with_both_sides_full_it_is_soap_with_momentum_in_the_eigenspace(m, n, K, kind):
    """Wide matrices with K = 1 only: after one gradient the n - m last right eigenvectors are anybody's."""
    betas, eps = (0.9, 0.8, 0.7), 1e-4
    L, R, m_t, v_t = np.zeros((m, m)), np.zeros((n, n)), np.zeros((m, n)), np.zeros((m, n))
    U, V = np.zeros((m, m)), np.zeros((n, n))
    gradients = make_gradients((m, n), 6, 15)
    options = dict(rank=m, right_rank=n, leading=2, update_interval=K, betas=betas, scale=1.0, eps=eps)
    steps = run(LowRankSOAP, gradients, compensation=kind, **options)
    for t, (G, (update, _)) in enumerate(zip(gradients, steps, strict=True), 1):
        L = betas[2] * L + (1 - betas[2]) * G @ G.T
        R = betas[2] * R + (1 - betas[2]) * G.T @ G
        if t == 1 or t % K == 0:
            U_prev, V_prev, U, V = U, V, evd(L, m), evd(R, n)
            U = U * np.where(np.sum(U * U_prev, axis=0) < 0, -1, 1)
            V = V * np.where(np.sum(V * V_prev, axis=0) < 0, -1, 1)
        sigma = U.T @ G @ V
        m_t = betas[0] * m_t + (1 - betas[0]) * sigma
        v_t = betas[1] * v_t + (1 - betas[1]) * sigma**2
        assert relative(update, U @ (m_t / (np.sqrt(v_t) + eps)) @ V.T) < 1e-9


def test_with_every_left_vector_only_the_right_complement_is_compensated():
    m, n, k = 6, 9, 4
    options = {**sizes(m, n, m, k), **PLAIN}
    for update, state in itertools.islice(run(LowRankSOAP, make_gradients((m, n), 7, 11), **options), 1, None):
        C = update - low_rank_part(state)
        assert np.linalg.norm(C @ state["V"]) < 1e-9 * np.linalg.norm(C)


def test_rank_one_and_a_transposed_parameter():
    options = {**OPTIONS, "rank": 1, "right_rank": 2, "leading": 1}
    gradients = make_gradients((5, 8), 8, 14)
    transposed = [G.T for G in gradients]
    for (wide, _), (tall, _) in zip(
        run(LowRankSOAP, gradients, **options), run(LowRankSOAP, transposed, **options), strict=True
    ):
        assert relative(tall.T, wide) < 1e-9


# The contract -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("switching", ["none", "complement"])
def test_bases_are_orthonormal_and_tracked_covariances_stay_those_of_the_basis(switching):
    """Within a block Q~ = U^T Q U of the covariance that was last reconstructed and then averaged on."""
    beta3 = OPTIONS["betas"][2]
    previous = None
    gradients = make_gradients((10, 16), 9, 20)
    for G, (_, state) in zip(gradients, run(LowRankSOAP, gradients, switching=switching, **OPTIONS), strict=True):
        for basis, tracked, X in (("U", "Q_L", G), ("V", "Q_R", G.T)):
            U = state[basis]
            assert np.abs(U.T @ U - np.eye(U.shape[1])).max() < 1e-12
            Q = 0 if previous is None else previous[basis] @ previous[tracked] @ previous[basis].T
            assert relative(state[tracked], U.T @ (beta3 * Q + (1 - beta3) * X @ X.T) @ U) < 1e-10
        previous = state


@pytest.mark.parametrize("compensation", ["none", "optimal", "columns"])
@pytest.mark.parametrize("kind", ["zero", "tiny", "huge", "rank_one", "one_entry", "zero_then_some"])
@pytest.mark.parametrize("shape", [(6, 9), (1, 7), (7, 1), (1, 1)])
def test_degenerate_gradients_give_finite_updates(kind, shape, compensation):
    rng = np.random.default_rng(10)
    G = np.outer(rng.standard_normal(shape[0]), rng.standard_normal(shape[1])) + 0.1 * rng.standard_normal(shape)
    one = np.zeros(shape)
    one[0, -1] = 1.0
    gradients = {
        "zero": [0 * G] * 5,
        "tiny": [1e-30 * G] * 5,
        "huge": [1e30 * G] * 5,
        "rank_one": [np.outer(G[:, 0], G[0])] * 5,
        "one_entry": [one] * 5,
        "zero_then_some": [0 * G, 0 * G, G, 0 * G, G],
    }[kind]
    r = min(2, *shape)
    options = dict(rank=r, right_rank=min(3, shape[0] if shape[0] > shape[1] else shape[1]), leading=1)
    for update, state in run(
        LowRankSOAP, gradients, torch.float32, update_interval=2, compensation=compensation, **options
    ):
        assert np.isfinite(update).all() and np.abs(update).max() < 100
        assert all(np.isfinite(value).all() for value in state.values())


@pytest.mark.parametrize("compensation", ["none", "optimal", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decreases_a_quadratic(compensation, dtype):
    torch.manual_seed(0)
    W = torch.nn.Parameter(torch.zeros(8, 12, dtype=dtype))
    target = (torch.randn(8, 3) @ torch.randn(3, 12) + 0.3 * torch.randn(8, 12)).to(dtype)
    options = dict(rank=4, right_rank=5, leading=2, update_interval=5, compensation=compensation, scale=1.0)
    optimizer = LowRankSOAP([W], lr=0.1, **options)
    remaining = []
    for t in range(150):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - t / 150)
        W.grad = W.detach() - target
        optimizer.step()
        if t % 30 == 29:
            remaining.append(((W - target).float().norm() / target.float().norm()).item())
    assert remaining == sorted(remaining, reverse=True)
    assert remaining[-1] < 0.6


def train(params, optimizer, start, stop):
    for t in range(start, stop):
        generator = torch.Generator().manual_seed(t)
        for p in params:
            p.grad = (p.detach() + torch.randn(p.shape, generator=generator)).to(p)
        optimizer.step()


def fresh(dtype, **options):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in (*SHAPES, (10, 16))]
    return params, LowRankSOAP(params, **OPTIONS, **options)


@pytest.mark.parametrize("compensation", ["none", "optimal", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_round_trip_is_bit_identical_and_runs_repeat(compensation, dtype):
    params, optimizer = fresh(dtype, compensation=compensation)
    train(params, optimizer, 0, 8)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    resumed_params = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = LowRankSOAP(resumed_params, **OPTIONS, compensation=compensation)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    repeated_params, repeated = fresh(dtype, compensation=compensation)
    train(params, optimizer, 8, 20)
    train(resumed_params, resumed, 8, 20)
    train(repeated_params, repeated, 0, 20)
    for a, b, c in zip(params, resumed_params, repeated_params, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_the_seed_decides_the_draws():
    one, other = fresh(torch.float64), fresh(torch.float64, seed=1)
    train(*one, 0, 1)
    train(*other, 0, 1)
    assert not torch.equal(one[0][0], other[0][0])


def test_batched_and_looped_matrices_agree(monkeypatch):
    looped, batched = fresh(torch.float64), fresh(torch.float64)
    train(*looped, 0, 14)
    monkeypatch.setattr(base_module, "BATCHED_DEVICES", {"cpu"})
    train(*batched, 0, 14)
    for x, y in zip(looped[0], batched[0], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
def test_state_sizes_are_those_of_the_documentation(shape):
    (m, n), r, k = sorted(shape), 5, 7

    def count(**options):
        _, state = last(run(LowRankSOAP, [np.random.default_rng(0).standard_normal(shape)], **OPTIONS, **options))
        return sum(value.size for value in state.values() if isinstance(value, np.ndarray))

    bases_and_moments = m * r + n * k + 2 * r * k
    assert count() == bases_and_moments + r * r + k * k + (r + k + 2)
    assert count(tracking=False) == bases_and_moments + (r + k + 2)
    assert count(compensation="columns") == bases_and_moments + r * r + k * k + (r + n + 1)
    assert count(compensation="none") == bases_and_moments + r * r + k * k


def test_full_precision_states_in_a_bfloat16_model():
    params, optimizer = fresh(torch.bfloat16)
    train(params, optimizer, 0, 1)
    state = copy.copy(optimizer.state[params[0]])
    assert {name for name, value in state.items() if name != "step" and value.dtype == torch.bfloat16} == set("UVmv")
    assert {name for name, value in state.items() if name != "step" and value.dtype == torch.float32} == {
        "Q_L", "Q_R", "p", "q", "e", "phi"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 9}, "set rank to at most 8"),
        ({"right_rank": 13}, "set right_rank to at most 12"),
        ({"leading": 5}, "between 0 and the smaller of the two ranks, 4"),
        ({"leading": 3, "right_rank": 2}, "between 0 and the smaller of the two ranks, 2"),
        ({"right_rank": 0, "leading": 0}, "at least 1, or None for rank"),
        ({"switching": "gaussian"}, "one of none, complement"),
        ({"compensation": "fira"}, "one of none, optimal, columns"),
        ({"betas": (0.9, 0.9)}, "three numbers"),
    ],
)
def test_errors_say_what_to_do(options, message):
    with pytest.raises(ValueError, match=message):
        LowRankSOAP([torch.nn.Parameter(torch.zeros(12, 8))], **{"rank": 4, "leading": 2, **options})


def test_right_rank_is_rank_if_not_given():
    _, state = last(run(LowRankSOAP, make_gradients((5, 8), 0, 1), rank=3, leading=1))
    assert state["U"].shape == (5, 3) and state["V"].shape == (8, 3)
