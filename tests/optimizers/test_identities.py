"""Mathematical identities of RACS, Alice, the limiter, subspace iteration and switching, as property tests.

They hold for every gradient, so they need no reference values. The optimizers run in float64 with lr = scale = 1
from zero weights, so that the weights after a step are minus the update direction.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizers import RACS, Alice
from tests.optimizers import oracle

SETTINGS = settings(derandomize=True, max_examples=25, deadline=None)
TOLERANCE = 1e-9  # relative; float64 rounding amplified by the eigenvalue gaps of the drawn gradients
SEEDS = st.integers(0, 10**6)


@st.composite
def shapes(draw, least=3, square=True):
    """m <= n, both small."""
    m = draw(st.integers(least, 8))
    return m, draw(st.integers(m if square else m + 1, 12))


@st.composite
def ranks(draw, shape=None):
    """(m, n, r, l) with 1 <= r < m and a complement large enough for r - l columns."""
    m, n = draw(shapes() if shape is None else shape)
    r = draw(st.integers(1, m - 1))
    return m, n, r, draw(st.integers(max(0, 2 * r - m), r))


def make_gradients(m, n, seed, steps=1):
    """Full rank, with a spectrum that decays by about 0.7, slowly varying."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((m, m)))[0]
    right = np.linalg.qr(rng.standard_normal((n, n)))[0][:, :m]
    mean = left @ np.diag(3 * 0.7 ** np.arange(m)) @ right.T
    return [mean + 0.1 * rng.standard_normal((m, n)) for _ in range(steps)]


def run(optimizer_class, gradients, **options):
    """Yield (update direction, state as arrays) after each step."""
    W = torch.nn.Parameter(torch.zeros(gradients[0].shape, dtype=torch.float64))
    optimizer = optimizer_class([W], lr=1.0, **{"scale": 1.0} | options)
    for G in gradients:
        with torch.no_grad():
            W.zero_()
        W.grad = torch.from_numpy(np.array(G))
        optimizer.step()
        state = {k: v.numpy().copy() if torch.is_tensor(v) else v for k, v in optimizer.state[W].items()}
        yield -W.detach().numpy(), state


def last(steps):
    """What the last step gave."""
    *_, final = steps
    return final


def low_rank_part(state, eps):
    return state["U"] @ (state["m"] / (np.sqrt(state["v"]) + eps))


def relative(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def nonnegative_with_gap(m, n, seed):
    """A matrix with entries > 0 close to rank 1, hence a gap after its first singular value."""
    rng = np.random.default_rng(seed)
    return np.outer(rng.uniform(0.2, 5, m), rng.uniform(0.2, 5, n)) * rng.uniform(0.4, 1.6, (m, n))


def signed_root(P, seed):
    """A gradient whose element-wise square is P."""
    return np.sqrt(P) * np.random.default_rng([seed, 7]).choice([-1.0, 1.0], P.shape)


# RACS ---------------------------------------------------------------------------------------------------------


@SETTINGS
@given(shapes(least=2), SEEDS)
def test_racs_fixed_point_is_the_rank_one_svd(shape, seed):
    """s and q converge to the principal singular vectors of G^2, and q s^T to its rank-1 SVD."""
    P = nonnegative_with_gap(*shape, seed)
    u, sigma, vt = np.linalg.svd(P)
    _, state = last(run(RACS, [signed_root(P, seed)], beta=0.0, iterations=60))
    q, s = state["q"], state["s"]
    assert relative(q / np.linalg.norm(q), np.abs(u[:, 0])) < TOLERANCE
    assert relative(s / np.linalg.norm(s), np.abs(vt[0])) < TOLERANCE
    assert relative(np.outer(q, s), sigma[0] * np.outer(u[:, 0], vt[0])) < TOLERANCE


@SETTINGS
@given(shapes(least=2), SEEDS, st.integers(1, 5))
def test_racs_error_shrinks_by_the_squared_gap_in_each_iteration(shape, seed, iterations):
    """An iteration is one power step with P P^T: tan(q, u_1) shrinks by (sigma_2 / sigma_1)^2, from q = 1."""
    P = nonnegative_with_gap(*shape, seed)
    u, sigma, _ = np.linalg.svd(P)

    def tangent(q):
        cosine = abs(q @ u[:, 0])
        return np.linalg.norm(q - (q @ u[:, 0]) * u[:, 0]) / cosine

    _, state = last(run(RACS, [signed_root(P, seed)], beta=0.0, iterations=iterations))
    bound = (sigma[1] / sigma[0]) ** (2 * iterations) * tangent(np.ones(shape[0]))
    assert tangent(state["q"]) <= bound * (1 + 1e-9) + 1e-14


def test_racs_default_is_five_iterations():
    G = signed_root(nonnegative_with_gap(4, 6, 0), 0)
    default, five, four = (last(run(RACS, [G], **o))[0] for o in (dict(), dict(iterations=5), dict(iterations=4)))
    assert np.array_equal(default, five) and relative(default, four) > 1e-12


@SETTINGS
@given(shapes(), SEEDS, st.floats(-5, 5), st.sampled_from([0.0, 0.9]))
def test_racs_is_invariant_to_the_gradient_scale(shape, seed, exponent, beta):
    """g -> c g: the update stays, s becomes c^2 s, q stays."""
    c = 10.0**exponent
    gradients = make_gradients(*shape, seed, steps=5)
    scaled = [c * G for G in gradients]
    runs = zip(run(RACS, gradients, beta=beta), run(RACS, scaled, beta=beta), strict=True)
    for (update, state), (update_c, state_c) in runs:
        assert relative(update_c, update) < TOLERANCE
        assert relative(state_c["s"], c**2 * state["s"]) < TOLERANCE
        assert relative(state_c["q"], state["q"]) < TOLERANCE


@SETTINGS
@given(st.integers(2, 7), st.floats(0.2, 5), SEEDS)
def test_racs_with_equal_row_scales_is_normalisation(m, ratio, seed):
    """Where q stays at 1 (G^2 made of two circulant blocks), RACS is sqrt(m) G Diag(column norms)^-1."""
    rng = np.random.default_rng(seed)
    firsts = rng.uniform(0.1, 1, (2, m))
    blocks = [np.stack([np.roll(first, i) for i in range(m)]) for first in firsts]
    G = signed_root(np.concatenate([blocks[0], ratio * blocks[1]], axis=1), seed)
    update, state = last(run(RACS, [G], beta=0.0, limiter=None))
    assert relative(state["q"], np.ones(m)) < TOLERANCE
    assert relative(update, np.sqrt(m) * G / np.linalg.norm(G, axis=0)) < TOLERANCE


@SETTINGS
@given(shapes(square=False), SEEDS)
def test_racs_transposed(shape, seed):
    gradients = make_gradients(*shape, seed, steps=4)
    transposed = [G.T for G in gradients]
    for (wide, _), (tall, _) in zip(run(RACS, gradients), run(RACS, transposed), strict=True):
        assert relative(tall.T, wide) < TOLERANCE


def test_square_matrices_are_not_transposed():
    """Transposing a square gradient does not transpose the update: m is always the number of rows."""
    gradients = make_gradients(6, 6, 0, steps=3)
    options = dict(rank=3, leading=1, update_interval=2)
    for optimizer_class, opts in ((RACS, dict(iterations=1)), (Alice, options)):
        update = last(run(optimizer_class, gradients, **opts))[0]
        other = last(run(optimizer_class, [G.T for G in gradients], **opts))[0]
        assert relative(other.T, update) > 1e-2


# The limiter --------------------------------------------------------------------------------------------------


@SETTINGS
@given(ranks(), SEEDS, st.sampled_from([1.0, 1.01, 1.5]), st.sampled_from(["optimal", "fira"]))
def test_limited_norms_grow_by_gamma_at_most(sizes, seed, gamma, compensation):
    """phi_t <= gamma phi_{t-1}, and phi is the norm of what was limited, in RACS and Alice."""
    m, n, r, l = sizes
    jumps = np.random.default_rng([seed, 1]).uniform(-1, 1, 8)
    gradients = [G * 10**x for G, x in zip(make_gradients(m, n, seed, steps=8), jumps, strict=True)]

    phi = np.inf
    for update, state in run(RACS, gradients, limiter=gamma):
        assert state["phi"] <= gamma * phi * (1 + 1e-12)
        assert relative(np.linalg.norm(update), state["phi"]) < TOLERANCE
        phi = state["phi"]

    options = dict(rank=r, leading=l, update_interval=3, compensation=compensation, compensation_scale=0.5)
    phi = np.inf
    for update, state in run(Alice, gradients, limiter=gamma, **options):
        assert 0 < state["phi"] <= gamma * phi * (1 + 1e-12)
        phi = state["phi"]
        added = (update - low_rank_part(state, 1e-8)) / (0.5 if compensation == "optimal" else 1)
        assert relative(np.linalg.norm(added), phi) < 1e-6


@pytest.mark.parametrize("limiter", (1.01, None))
def test_without_limiter_norms_grow(limiter):
    """The bound above is the limiter's doing: the same gradients break it when it is off."""
    gradients = make_gradients(4, 6, 0, steps=8)
    gradients[-1] = 100 * gradients[-1]
    options = dict(rank=2, leading=1, update_interval=10, betas=(0.9, 0.9, 0.9))
    for optimizer_class, opts in ((RACS, {}), (Alice, options)):
        phis = [state["phi"] for _, state in run(optimizer_class, gradients, limiter=limiter, **opts)]
        assert (phis[-1] > 1.01 * phis[-2] * (1 + 1e-9)) == (limiter is None)


# Switching and subspace iteration -----------------------------------------------------------------------------


@SETTINGS
@given(ranks(), SEEDS, st.sampled_from(["optimal", "fira", "fira_plus"]), st.sampled_from(["evd", "gaussian"]))
def test_complement_switching_keeps_the_basis_orthonormal(sizes, seed, compensation, initial_basis):
    """U^T U = I after every switch, and the compensation lies outside the subspace: U^T C = 0."""
    m, n, r, l = sizes
    gradients = make_gradients(m, n, seed, steps=7)
    options = dict(rank=r, leading=l, update_interval=2, compensation=compensation, initial_basis=initial_basis)
    for update, state in run(Alice, gradients, **options):
        U = state["U"]
        assert U.shape == (m, r)
        assert np.linalg.norm(U.T @ U - np.eye(r)) < 1e-12
        C = update - low_rank_part(state, 1e-8)
        assert np.linalg.norm(C) > 1e-3
        assert np.linalg.norm(U.T @ C) < TOLERANCE * np.linalg.norm(C)


@SETTINGS
@given(ranks(), SEEDS, st.booleans())
def test_gaussian_columns_have_unit_length_and_are_not_orthogonal(sizes, seed, mix):
    m, n, r, l = sizes
    switching = "gaussian_mix" if mix else "gaussian"
    _, state = last(run(Alice, make_gradients(m, n, seed), rank=r, leading=l, switching=switching))
    gram = state["U"].T @ state["U"]
    kept = l if mix else 0
    assert np.linalg.norm(np.diag(gram) - 1) < 1e-12
    assert np.linalg.norm(gram[:kept, :kept] - np.eye(kept)) < 1e-12
    if r - kept > 0 and r > 1:
        assert np.linalg.norm(gram - np.eye(r)) > 1e-3


@SETTINGS
@given(ranks(), SEEDS)
def test_first_switch_excludes_the_discarded_eigenvectors(sizes, seed):
    """Drawn columns are orthogonal to all r leading eigenvectors of G G^T, not only to the l that are kept."""
    m, n, r, l = sizes
    (G,) = make_gradients(m, n, seed)
    vectors = oracle.evd(G @ G.T, m)
    _, state = last(run(Alice, [G], rank=r, leading=l))
    cosines = vectors.T @ state["U"]
    assert np.linalg.norm(np.abs(cosines[:l, :l]) - np.eye(l)) < TOLERANCE
    assert np.linalg.norm(cosines[:r, l:]) < TOLERANCE


def test_full_basis_can_keep_the_discarded_eigenvectors():
    """Unlike the complement, the pool of "full_basis" holds Ritz vectors l + 1 .. r."""
    (G,) = make_gradients(8, 12, 0)
    vectors = oracle.evd(G @ G.T, 8)
    hits = {"complement": 0, "full_basis": 0}
    for switching in hits:
        for seed in range(10):
            _, state = last(run(Alice, [G], rank=4, leading=1, switching=switching, seed=seed))
            cosines = np.abs(vectors.T @ state["U"])
            hits[switching] += int(np.sum(cosines[1:4, 1:] > 1 - 1e-9))
            assert np.linalg.norm(cosines[0, 1:]) < TOLERANCE
    assert hits["complement"] == 0 and hits["full_basis"] > 0


@SETTINGS
@given(ranks(), SEEDS)
def test_leading_eigenvectors_survive_switching(sizes, seed):
    """With a constant gradient the l leading eigenvectors are a fixed point of iteration, Ritz step and switch."""
    m, n, r, l = sizes
    (G,) = make_gradients(m, n, seed)
    vectors = oracle.evd(G @ G.T, m)
    for _, state in run(Alice, [G] * 6, rank=r, leading=l, update_interval=1, tracking=False):
        cosines = np.abs(vectors[:, :l].T @ state["U"])
        assert np.linalg.norm(cosines - np.eye(l, r)) < 1e-7


@SETTINGS
@given(ranks(), SEEDS)
def test_a_refresh_is_one_subspace_iteration(sizes, seed):
    """The angle to the leading eigenspace shrinks by lambda_{r+1} / lambda_r at each refresh, but not to 0."""
    m, n, r, _ = sizes
    (G,) = make_gradients(m, n, seed)
    vectors, values = oracle.evd(G @ G.T, m), np.linalg.svd(G)[1] ** 2

    def tangent(U):
        return np.linalg.norm(vectors[:, r:].T @ U @ np.linalg.inv(vectors[:, :r].T @ U), 2)

    options = dict(rank=r, leading=r, update_interval=1, tracking=False, initial_basis="gaussian")
    previous = np.inf
    for i, (_, state) in enumerate(run(Alice, [G] * 5, **options)):
        U = state["U"]
        assert i > 0 or tangent(U) > 1e-12
        assert tangent(U) <= values[r] / values[r - 1] * previous * (1 + 1e-6) + 1e-12
        previous = tangent(U)
        H = U.T @ G @ G.T @ U  # Ritz vectors: diagonal and descending
        assert np.linalg.norm(H - np.diag(np.diag(H))) < TOLERANCE * np.linalg.norm(H)
        assert np.all(np.diff(np.diag(H)) <= 0)


@SETTINGS
@given(ranks(), SEEDS)
def test_zero_initial_basis_is_the_first_unit_vectors(sizes, seed):
    """QR of the zero matrix gives unit vectors, so the printed start spans the first r coordinates."""
    m, n, r, _ = sizes
    _, state = last(run(Alice, make_gradients(m, n, seed), rank=r, leading=r, initial_basis="zeros"))
    U = state["U"]
    assert np.linalg.norm(U @ U.T - np.diag(np.arange(m) < r)) < 1e-12


@SETTINGS
@given(shapes(), SEEDS, st.data())
def test_small_complement_is_filled_with_ritz_vectors(shape, seed, data):
    """2 r - l > m: the result is that of l = 2 r - m."""
    m, n = shape
    r = data.draw(st.integers(m // 2 + 1, m - 1))
    l = data.draw(st.integers(0, 2 * r - m - 1))
    gradients = make_gradients(m, n, seed, steps=5)
    runs = [run(Alice, gradients, rank=r, leading=leading, update_interval=2) for leading in (l, 2 * r - m)]
    for (one, state), (other, _) in zip(*runs, strict=True):
        assert np.array_equal(one, other)
        assert np.linalg.norm(state["U"].T @ state["U"] - np.eye(r)) < 1e-12


# Tracking -----------------------------------------------------------------------------------------------------


@SETTINGS
@given(shapes(), SEEDS)
def test_full_rank_alice_is_eigen_adam(shape, seed):
    """r = m, exact EVD at every step, no compensation: Eigen-Adam with momentum in the subspace.

    It needs the rotated Q~; with the printed one the reconstruction mixes two bases and the identity fails.
    """
    m, n = shape
    gradients = make_gradients(m, n, seed, steps=10)
    betas = (0.9, 0.8, 0.95)
    options = dict(rank=m, leading=m, update_interval=1, switching="none", compensation="none", betas=betas)
    reference = oracle.EigenAdam(np.zeros(shape), betas=betas)
    rotated = run(Alice, gradients, tracking_basis="rotated", **options)
    printed = run(Alice, gradients, tracking_basis="printed", **options)
    gap = 0.0
    for G, (update, state), (other, _) in zip(gradients, rotated, printed, strict=True):
        before = reference.W
        reference.step(G, lr=1.0)
        expected = before - reference.W
        assert relative(update, expected) < 1e-8
        assert relative(state["U"] @ state["Q"] @ state["U"].T, reference.Q) < TOLERANCE
        gap = max(gap, relative(other, expected))
    assert gap > 1e-2


@SETTINGS
@given(ranks(), SEEDS, st.sampled_from(["none", "complement", "full_basis"]))
def test_rotated_tracking_is_the_projection_of_q(sizes, seed, switching):
    """At a refresh lines 6 and 12 agree, Q~_t = U_t^T Q_t U_t, if Q~ is rotated, and only then."""
    m, n, r, l = sizes
    beta3 = 0.9
    gradients = make_gradients(m, n, seed, steps=6)
    differences = {}
    for tracking_basis in ("rotated", "printed"):
        previous = None
        options = dict(switching=switching, tracking_basis=tracking_basis, betas=(0.9, 0.9, beta3))
        steps = run(Alice, gradients, rank=r, leading=l, update_interval=2, **options)
        differences[tracking_basis] = []
        for G, (_, state) in zip(gradients, steps, strict=True):
            if previous is not None and state["step"] % 2 == 0:
                U = previous["U"]
                Q = beta3 * U @ previous["Q"] @ U.T + (1 - beta3) * G @ G.T
                projected = state["U"].T @ Q @ state["U"]
                differences[tracking_basis].append(relative(state["Q"], projected))
            previous = state
    assert max(differences["rotated"]) < TOLERANCE
    assert max(differences["printed"]) > 1e-6


@SETTINGS
@given(ranks(), SEEDS, st.sampled_from(["none", "complement", "full_basis", "gaussian_mix"]))
def test_alice_0_is_alice_with_beta3_zero(sizes, seed, switching):
    m, n, r, l = sizes
    gradients = make_gradients(m, n, seed, steps=5)
    options = dict(rank=r, leading=l, update_interval=2, switching=switching)
    without = run(Alice, gradients, tracking=False, **options)
    zero = run(Alice, gradients, betas=(0.9, 0.9, 0.0), **options)
    tracked = run(Alice, gradients, betas=(0.9, 0.9, 0.99), **options)
    gap = 0.0
    for (one, state), (other, _), (third, _) in zip(without, zero, tracked, strict=True):
        assert "Q" not in state
        assert relative(one, other) < TOLERANCE
        gap = max(gap, relative(third, other))
    assert gap > 1e-9 or (switching == "gaussian_mix" and l == 0)  # where no column depends on Q


@SETTINGS
@given(shapes(), SEEDS)
def test_alice_in_the_standard_basis_is_adam_without_bias_correction(shape, seed):
    """Gradients with orthogonal rows of decreasing norm have U_f = I: Adam on the entries themselves."""
    m, n = shape
    rng = np.random.default_rng(seed)
    options = dict(rank=m, leading=m, switching="none", update_interval=1, betas=(0.9, 0.8, 0.9))
    gradients = []
    for _ in range(6):
        rows = np.linalg.qr(rng.standard_normal((n, n)))[0][:m]
        gradients.append(rows * (0.5 ** np.arange(m) * rng.uniform(0.9, 1.1, m))[:, None])
    first, second = np.zeros(shape), np.zeros(shape)
    for G, (update, _) in zip(gradients, run(Alice, gradients, **options), strict=True):
        first = 0.9 * first + 0.1 * G
        second = 0.8 * second + 0.2 * G**2
        assert relative(update, first / (np.sqrt(second) + 1e-8)) < 1e-7


# Compensation -------------------------------------------------------------------------------------------------


@SETTINGS
@given(ranks(), SEEDS, st.sampled_from(["complement", "none", "full_basis"]))
def test_one_sample_compensation_has_equal_columns(sizes, seed, switching):
    """With p of one sample and before the limiter, each column of C has norm sqrt(m - r)."""
    m, n, r, l = sizes
    options = dict(rank=r, leading=l, betas=(0.0, 0.9, 0.9), limiter=None, eps=1e-30, compensation_scale=1.0)
    gradients = make_gradients(m, n, seed, steps=4)
    for update, state in run(Alice, gradients, switching=switching, update_interval=2, **options):
        C = update - low_rank_part(state, 0)
        assert np.allclose(np.linalg.norm(C, axis=0), np.sqrt(m - r), rtol=1e-7, atol=0)


@SETTINGS
@given(ranks(shapes(least=3).filter(lambda s: s[0] <= 5 and s[1] <= 7)), SEEDS, st.floats(0, 0.95))
def test_theorem_5_1(sizes, seed, beta1):
    """The scales S with which the code compensates minimise ||S^-2 (x) U_c U_c^T - F_c||_F^2.

    F_c is block diagonal with blocks U_c Diag(E[(U_c^T g_i)^2]) U_c^T, E being the running average of weight
    (1 - beta_1) beta_1^(T - t).
    """
    m, n, r, l = sizes
    gradients = make_gradients(m, n, seed, steps=4)
    options = dict(betas=(beta1, 0.9, 0.9), limiter=None, eps=1e-30, compensation_scale=1.0)
    update, state = last(run(Alice, gradients, rank=r, leading=l, update_interval=100, **options))
    U, G = state["U"], gradients[-1]
    U_c = oracle.qr_complement(U)
    C = update - low_rank_part(state, 0)
    residual = U_c @ U_c.T @ G
    S = np.sum(C * residual, axis=0) / np.sum(residual**2, axis=0)
    assert np.all(S > 0) and relative(residual * S, C) < 1e-7

    weights = (1 - beta1) * beta1 ** np.arange(3, -1, -1, dtype=float)
    energies = sum(w * (U_c.T @ past) ** 2 for w, past in zip(weights, gradients, strict=True))
    F_c = np.zeros((m * n, m * n))
    for i in range(n):
        block = slice(i * m, (i + 1) * m)
        F_c[block, block] = U_c @ np.diag(energies[:, i]) @ U_c.T

    def objective(scales):
        return np.linalg.norm(np.kron(np.diag(scales**-2.0), U_c @ U_c.T) - F_c) ** 2

    for i in range(n):  # the objective is convex in S^-2: a minimum in each coordinate is the minimum
        for factor in (0.99, 1.01):
            scales = S.copy()
            scales[i] *= factor
            assert objective(scales) > objective(S)
            gain = (m - r) * (scales[i] ** -2 - S[i] ** -2) ** 2  # the value of the parabola there
            assert abs(objective(scales) - objective(S) - gain) < 1e-4 * gain + 1e-12 * objective(S)


# Symmetries of Alice ------------------------------------------------------------------------------------------


@SETTINGS
@given(
    ranks(shapes(square=False)),
    SEEDS,
    st.sampled_from(["none", "complement", "full_basis", "gaussian_mix", "gaussian"]),
    st.sampled_from(["none", "optimal", "fira", "fira_plus"]),
)
def test_alice_transposed(sizes, seed, switching, compensation):
    """Transposing a non-square parameter transposes its update."""
    m, n, r, l = sizes
    gradients = make_gradients(m, n, seed, steps=5)
    options = dict(rank=r, leading=l, update_interval=2, switching=switching, compensation=compensation)
    transposed = [G.T for G in gradients]
    for (wide, _), (tall, _) in zip(run(Alice, gradients, **options), run(Alice, transposed, **options), strict=True):
        assert relative(tall.T, wide) < 1e-8


@SETTINGS
@given(ranks(), SEEDS, st.floats(-4, 4), st.sampled_from(["complement", "none", "full_basis"]))
def test_alice_is_invariant_to_the_gradient_scale(sizes, seed, exponent, switching):
    """Without eps both U omega and C are of degree 0 in the gradient.

    Not so with Gaussian columns: U is not orthonormal, p can be negative, and where it is clamped eps decides.
    """
    m, n, r, l = sizes
    c = 10.0**exponent
    gradients = make_gradients(m, n, seed, steps=5)
    options = dict(rank=r, leading=l, update_interval=2, switching=switching, eps=1e-30)
    scaled = [c * G for G in gradients]
    for (one, _), (other, _) in zip(run(Alice, gradients, **options), run(Alice, scaled, **options), strict=True):
        assert relative(other, one) < 1e-7


@SETTINGS
@given(ranks(), SEEDS, st.booleans())
def test_alice_follows_rotations_of_the_rows(sizes, seed, tracking):
    """G -> O G turns U into O U, and so the update into O times itself, as for Eigen-Adam."""
    m, n, r, l = sizes
    O = np.linalg.qr(np.random.default_rng([seed, 2]).standard_normal((m, m)))[0]
    gradients = make_gradients(m, n, seed, steps=5)
    options = dict(rank=r, leading=l, update_interval=2, switching="none", tracking=tracking)
    turned = [O @ G for G in gradients]
    for (one, _), (other, _) in zip(run(Alice, gradients, **options), run(Alice, turned, **options), strict=True):
        assert relative(other, O @ one) < 1e-7


# State sizes --------------------------------------------------------------------------------------------------


@SETTINGS
@given(ranks(), st.booleans())
def test_state_sizes(sizes, tall):
    """Elements kept per matrix: Tables 1 and 6 of the paper, plus one for phi where they leave it out."""
    m, n, r, l = sizes
    shape = (n, m) if tall else (m, n)

    def count(optimizer_class, **options):
        _, state = last(run(optimizer_class, [np.random.default_rng(0).standard_normal(shape)], **options))
        return sum(value.size for value in state.values() if isinstance(value, np.ndarray))

    assert count(RACS) == m + n + 1
    assert count(Alice, rank=r, leading=l) == 2 * n * r + m * r + n + r * r + 1
    assert count(Alice, rank=r, leading=l, tracking=False) == 2 * n * r + m * r + n + 1
    assert count(Alice, rank=r, leading=l, compensation="none") == 2 * n * r + m * r + r * r
