"""RACS and Alice against the independent NumPy transcription in `oracle.py`.

Weights are compared at every step by ||W - W'|| / ||W' - W_0|| (W' is the oracle's), in the Frobenius norm and in
each row and column by itself; states by relative Frobenius error. All must stay below 1e-10 over 30 float64
steps. Gradients are prescribed, so that an error is neither damped nor amplified by a loss.
"""

import itertools

import numpy as np
import pytest
import torch

from optimizers import RACS, Alice, low_rank
from optimizers import alice as alice_module
from tests.optimizers import oracle

TOLERANCE = 1e-10
STEPS = 30
LR = 0.02
WIDE, TALL, SQUARE = (12, 20), (20, 12), (14, 14)
SHAPES = {"wide": WIDE, "tall": TALL, "square": SQUARE}
SWITCHINGS = ("none", "complement", "full_basis", "gaussian_mix", "gaussian")
COMPENSATIONS = ("none", "optimal", "fira", "fira_plus")

# All different from each other and from the defaults, so that a mixed-up letter shows.
ALICE = dict(
    betas=(0.9, 0.95, 0.8),
    rank=6,
    leading=3,
    update_interval=7,
    scale=0.3,
    compensation_scale=0.4,
    limiter=1.1,
    eps=1e-8,
)
ORACLE_NAMES = {
    "rank": "r",
    "leading": "l",
    "update_interval": "K",
    "scale": "alpha",
    "compensation_scale": "alpha_c",
    "limiter": "gamma",
}


def for_oracle(options):
    """The package's option names turned into the oracle's letters."""
    return {ORACLE_NAMES.get(name, name): value for name, value in options.items()}


def make_gradients(shape, seed, steps=STEPS):
    """Full-rank gradients: a slowly turning low-noise signal with a separated spectrum, of changing size."""
    rng = np.random.default_rng([seed, *shape])
    k = min(shape)
    spectrum = 3 * 0.8 ** np.arange(k)

    def signal():
        left = np.linalg.qr(rng.standard_normal((shape[0], k)))[0]
        right = np.linalg.qr(rng.standard_normal((shape[1], k)))[0]
        return left @ np.diag(spectrum) @ right.T

    first, second = signal(), signal()
    rows = np.exp(0.3 * rng.standard_normal((shape[0], 1)))
    columns = np.exp(0.3 * rng.standard_normal((1, shape[1])))
    gradients = []
    for t in range(steps):
        angle = 0.05 * t
        G = np.cos(angle) * first + np.sin(angle) * second + 0.15 * rng.standard_normal(shape)
        gradients.append(np.exp(0.4 * rng.standard_normal()) * rows * G * columns)
    return gradients


def make_weight(shape, seed):
    return np.random.default_rng([seed, *shape, 1]).standard_normal(shape)


@pytest.fixture
def draws(monkeypatch):
    """The package's random draws, logged in call order (one entry per matrix); empty ones are left out."""
    log = []
    draw_columns, draw_gaussian = low_rank.draw_columns, low_rank.draw_gaussian

    def logged_columns(total, count, generators):
        drawn = draw_columns(total, count, generators)
        assert drawn.shape == (len(generators), count)
        for indices in drawn:
            assert len(set(indices.tolist())) == count and all(0 <= i < total for i in indices.tolist())
            if count > 0:
                log.append(("columns", total, count, indices.tolist()))
        return drawn

    def logged_gaussian(rows, count, generators):
        drawn = draw_gaussian(rows, count, generators)
        assert drawn.shape == (len(generators), rows, count) and drawn.dtype == torch.float64
        for matrix in drawn:
            if count > 0:
                log.append(("gaussian", rows, count, matrix.numpy().copy()))
        return drawn

    monkeypatch.setattr(low_rank, "draw_columns", logged_columns)
    monkeypatch.setattr(low_rank, "draw_gaussian", logged_gaussian)
    monkeypatch.setattr(alice_module, "draw_gaussian", logged_gaussian, raising=False)
    return log


def relative(actual, expected):
    actual = np.asarray(actual, dtype=np.float64).reshape(np.shape(expected))
    distance, size = np.linalg.norm(actual - expected), np.linalg.norm(expected)
    assert np.isfinite(distance), "not finite, which the largest of several errors would not show"
    return distance / size if size > 0 else distance


def weight_error(parameter, reference, W_0):
    """The worst relative error of W - W_0 as a whole, of its rows and of its columns."""
    actual, expected = parameter.detach().numpy() - W_0, reference.W - W_0
    lines = [*zip(actual, expected, strict=True), *zip(actual.T, expected.T, strict=True)]
    return max(relative(a, e) for a, e in [(actual, expected), *lines])


class SignWatch:
    """An eigenvector's sign at the first refresh is the solver's choice; after that the sign rule decides."""

    def __init__(self, fix_signs):
        self.fix_signs = fix_signs
        self.first = None

    def __call__(self, U, U_reference):
        signs = np.where(np.sum(U * U_reference, axis=0) < 0, -1.0, 1.0)
        if not self.fix_signs:
            # The oracle has adopted the package's signs where they are free, so none may be left to choose.
            assert np.all(signs == 1)
        if self.first is None:
            self.first = signs
        assert np.array_equal(signs, self.first), "the sign rule was applied differently"
        return signs


def alice_state_errors(state, reference, watch):
    """Relative errors of every tensor which the package keeps for one matrix."""
    kept = {name: value.numpy() for name, value in state.items() if torch.is_tensor(value)}
    d = watch(kept["U"], reference.U)
    errors = {
        "U": relative(kept["U"] * d, reference.U),
        "m": relative(kept["m"] * d[:, None], reference.m_t),
        "v": relative(kept["v"], reference.v_t),
    }
    assert ("Q" in kept) == reference.tracking
    if reference.tracking:
        errors["Q"] = relative(kept["Q"] * np.outer(d, d), reference.Q)
    assert "phi" not in kept or reference.compensation != "fira_plus"  # which cancels the limiter
    if reference.compensation in ("optimal", "fira"):
        errors["phi"] = relative(kept["phi"], reference.phi)
    if reference.compensation == "optimal":
        errors["p"] = relative(kept["p"], reference.p)
    assert state["step"] == reference.t
    return errors


def compare_alice(log, shapes=(WIDE,), steps=STEPS, lrs=None, gradients=None, changed=None, **options):
    """Run both sides on every matrix of `shapes`; return (worst weight error, worst state errors, oracles).

    `changed` gives the oracle other options than the package, to show that the comparison would see it.
    """
    options = ALICE | options
    weights = [make_weight(shape, i) for i, shape in enumerate(shapes)]
    gradients = gradients or [make_gradients(shape, i, steps) for i, shape in enumerate(shapes)]
    parameters = [torch.nn.Parameter(torch.from_numpy(W.copy())) for W in weights]
    optimizer = Alice(parameters, lr=LR, **options)
    references = [oracle.Alice(W, **for_oracle(options | (changed or {}))) for W in weights]
    watches = [SignWatch(options.get("fix_signs", True)) for _ in shapes]
    replay = oracle.Draws(log)
    worst_weight, worst_state = 0.0, {}
    for t in range(steps):
        lr = lrs[t] if lrs else LR
        optimizer.param_groups[0]["lr"] = lr
        for parameter, G in zip(parameters, gradients, strict=True):
            parameter.grad = torch.from_numpy(G[t].copy())
        optimizer.step()
        for parameter, reference, G, W_0, watch in zip(
            parameters, references, gradients, weights, watches, strict=True
        ):
            state = optimizer.state[parameter]
            reference.step(G[t], lr, draws=replay, signs_of=state["U"].numpy())
            worst_weight = max(worst_weight, weight_error(parameter, reference, W_0))
            if not changed:
                for name, error in alice_state_errors(state, reference, watch).items():
                    worst_state[name] = max(worst_state.get(name, 0.0), error)
    if not changed:
        assert replay.used == len(log), "the package drew more than the algorithm asks for"
    return worst_weight, worst_state, references


def assert_alice(log, **options):
    worst_weight, worst_state, references = compare_alice(log, **options)
    assert worst_weight < TOLERANCE, worst_weight
    assert max(worst_state.values()) < TOLERANCE, worst_state
    return references


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("compensation", COMPENSATIONS)
@pytest.mark.parametrize("switching", SWITCHINGS)
def test_alice_grid(draws, switching, compensation, shape):
    (reference,) = assert_alice(draws, shapes=(SHAPES[shape],), switching=switching, compensation=compensation)
    refreshes = 1 + STEPS // 7
    assert len(draws) == (0 if switching == "none" else refreshes)
    if compensation != "none":  # the limiter both acted and let pass
        assert min(reference.etas) < 1 and reference.etas.count(1.0) > 1


@pytest.mark.parametrize("compensation", ("none", "optimal"))
@pytest.mark.parametrize("switching", SWITCHINGS)
def test_alice_0(draws, switching, compensation):
    assert_alice(draws, tracking=False, switching=switching, compensation=compensation)


@pytest.mark.parametrize("tracking_basis", ("printed", "rotated"))
@pytest.mark.parametrize("switching", SWITCHINGS)
def test_alice_tracking_basis(draws, switching, tracking_basis):
    assert_alice(draws, switching=switching, tracking_basis=tracking_basis)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("initial_basis", ("evd", "gaussian", "zeros"))
@pytest.mark.parametrize("switching", ("none", "complement", "full_basis", "gaussian_mix"))
def test_alice_initial_basis(draws, switching, initial_basis, shape):
    assert_alice(draws, shapes=(SHAPES[shape],), switching=switching, initial_basis=initial_basis)
    if initial_basis == "gaussian" and switching != "none":
        assert draws[0][:3] == ("gaussian", min(SHAPES[shape]), 6)


@pytest.mark.parametrize("update_times", ("printed", "zero_based"))
@pytest.mark.parametrize("update_interval", (1, 2, 7))
def test_alice_update_times(draws, update_interval, update_times):
    assert_alice(draws, update_interval=update_interval, update_times=update_times)
    times = [t for t in range(1, STEPS + 1) if t == 1 or t % update_interval == 0]
    if update_times == "zero_based":
        times = [t for t in range(1, STEPS + 1) if (t - 1) % update_interval == 0]
    assert len(draws) == len(times)


@pytest.mark.parametrize("fix_signs", (True, False))
@pytest.mark.parametrize("switching", SWITCHINGS)
def test_alice_signs(draws, switching, fix_signs):
    """With the rule off the oracle adopts the solver's signs for eigenvectors only, never for drawn columns."""
    assert_alice(draws, switching=switching, fix_signs=fix_signs, tracking_basis="rotated")


@pytest.mark.parametrize("fix_signs", (True, False))
def test_sign_rule_can_be_switched_off(draws, fix_signs):
    """Gaussian columns have no free sign: they are kept as drawn, or turned towards the previous ones."""
    W = torch.nn.Parameter(torch.zeros(WIDE, dtype=torch.float64))
    optimizer = Alice([W], lr=LR, **ALICE | dict(switching="gaussian", fix_signs=fix_signs, update_interval=1))
    turned = 0
    for t, G in enumerate(make_gradients(WIDE, 0, steps=6)):
        previous = optimizer.state[W]["U"].clone() if t else None
        W.grad = torch.from_numpy(G)
        optimizer.step()
        drawn = torch.from_numpy(draws[-1][3])
        drawn = drawn / drawn.norm(dim=0)
        if t:
            against = (drawn * previous).sum(0) < 0
            turned += int(against.sum())
            if fix_signs:
                drawn[:, against] *= -1
        torch.testing.assert_close(optimizer.state[W]["U"], drawn, rtol=1e-13, atol=1e-13)
    assert turned > 0


@pytest.mark.parametrize("compensation", COMPENSATIONS)
@pytest.mark.parametrize("switching", SWITCHINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_alice_full_rank(draws, shape, switching, compensation):
    """r = m: no complement, hence no compensation, and nothing to switch to but Gaussian columns."""
    rank = min(SHAPES[shape])
    assert_alice(draws, shapes=(SHAPES[shape],), rank=rank, leading=5, switching=switching, compensation=compensation)
    assert (len(draws) > 0) == switching.startswith("gaussian")


@pytest.mark.parametrize("tracking_basis", ("printed", "rotated"))
@pytest.mark.parametrize("switching", SWITCHINGS)
@pytest.mark.parametrize("rank, leading", ((8, 2), (10, 4), (11, 4), (9, 6), (6, 0), (5, 5), (1, 0)))
def test_alice_ranks(draws, rank, leading, switching, tracking_basis):
    """Includes 2r - l > m, where the complement of a 12-row matrix is too small to fill r - l columns."""
    # With one row left over, p is a difference of column energies a million times its size: it has no 10 digits.
    compensation = "fira" if rank == 11 else "optimal"
    assert_alice(
        draws,
        rank=rank,
        leading=leading,
        switching=switching,
        tracking_basis=tracking_basis,
        compensation=compensation,
    )
    if switching == "complement" and rank > leading:
        assert all(entry[:3] == ("columns", 12 - rank, min(rank - leading, 12 - rank)) for entry in draws)


@pytest.mark.parametrize("compensation", COMPENSATIONS)
def test_alice_weight_decay_and_schedule(draws, compensation):
    """The learning rate starts at 0, as with a warm-up, and changes at every step."""
    lrs = [0.05 * np.sin(0.1 * t) for t in range(STEPS)]
    assert_alice(draws, lrs=lrs, weight_decay=0.3, compensation=compensation)


@pytest.mark.parametrize("compensation", COMPENSATIONS)
@pytest.mark.parametrize("eps", (1e-2, 1e-12))
def test_alice_epsilon(draws, eps, compensation):
    """A large eps shows where it stands."""
    assert_alice(draws, eps=eps, compensation=compensation)


@pytest.mark.parametrize("compensation", ("optimal", "fira", "fira_plus"))
def test_alice_without_limiter(draws, compensation):
    (reference,) = assert_alice(draws, limiter=None, compensation=compensation)
    assert set(reference.etas) == {1.0}


@pytest.mark.parametrize("compensation", COMPENSATIONS)
def test_alice_zero_columns_and_gradients(draws, compensation):
    """Columns which are always zero (unused tokens), and a gradient that vanishes at a step without refresh."""
    gradients = make_gradients(WIDE, 0)
    for G in gradients:
        G[:, [0, 7]] = 0
    gradients[9][:] = 0
    if compensation == "fira_plus":
        gradients[9][:, 1:3] = gradients[8][:, 1:3]  # its scale is 0/0 at a vanishing gradient
    (reference,) = assert_alice(draws, gradients=[gradients], compensation=compensation)
    assert np.all(np.isfinite(reference.W))


@pytest.mark.parametrize("switching", SWITCHINGS)
def test_alice_several_matrices(draws, switching):
    """Equal and unequal shapes in one optimizer: each matrix must follow its own oracle."""
    assert_alice(draws, shapes=(WIDE, WIDE, WIDE, TALL, SQUARE, WIDE), switching=switching, steps=16)
    if switching == "complement":
        one_refresh = [tuple(entry[3]) for entry in draws[:4]]
        assert len(set(one_refresh)) > 1, "matrices of equal shape must not share their draws"


def test_alice_missing_gradient(draws):
    """A matrix without gradient is left alone, and its own clock stands still."""
    weights = [make_weight(WIDE, i) for i in range(2)]
    gradients = [make_gradients(WIDE, i, 16) for i in range(2)]
    parameters = [torch.nn.Parameter(torch.from_numpy(W.copy())) for W in weights]
    optimizer = Alice(parameters, lr=LR, **ALICE)
    references = [oracle.Alice(W, **for_oracle(ALICE)) for W in weights]
    replay = oracle.Draws(draws)
    for t in range(16):
        for i in range(2):
            parameters[i].grad = None if i == t % 3 else torch.from_numpy(gradients[i][t].copy())
        optimizer.step()
        for i in range(2):
            if i != t % 3:
                references[i].step(gradients[i][t], LR, draws=replay)
    for parameter, reference, W_0 in zip(parameters, references, weights, strict=True):
        assert 0 < reference.t < 16
        assert weight_error(parameter, reference, W_0) < TOLERANCE


def test_alice_groups(draws):
    """Each parameter group has its own options."""
    changes = [dict(), dict(lr=0.05, scale=0.25, compensation_scale=0.2, limiter=1.3, betas=(0.8, 0.85, 0.9))]
    weights = [make_weight(WIDE, i) for i in range(2)]
    gradients = [make_gradients(WIDE, i, 16) for i in range(2)]
    parameters = [torch.nn.Parameter(torch.from_numpy(W.copy())) for W in weights]
    groups = [dict(params=[p]) | change for p, change in zip(parameters, changes, strict=True)]
    optimizer = Alice(groups, lr=LR, **ALICE)
    own = [{name: value for name, value in change.items() if name != "lr"} for change in changes]
    references = [oracle.Alice(W, **for_oracle(ALICE | o)) for W, o in zip(weights, own, strict=True)]
    replay = oracle.Draws(draws)
    for t in range(16):
        for parameter, G in zip(parameters, gradients, strict=True):
            parameter.grad = torch.from_numpy(G[t].copy())
        optimizer.step()
        for reference, G, change in zip(references, gradients, changes, strict=True):
            reference.step(G[t], change.get("lr", LR), draws=replay)
    for parameter, reference, W_0 in zip(parameters, references, weights, strict=True):
        assert weight_error(parameter, reference, W_0) < TOLERANCE


def test_alice_draws_are_independent(draws):
    """No random number is used twice: not by two matrices, two refreshes, or two draws of one refresh."""
    assert_alice(draws, shapes=(WIDE, WIDE), switching="gaussian_mix", initial_basis="gaussian", steps=8)
    numbers = np.concatenate([entry[3].ravel() for entry in draws])
    assert numbers.size == 2 * 12 * (6 + 3 + 3)
    assert np.unique(numbers).size == numbers.size


@pytest.mark.parametrize("switching", ("complement", "gaussian"))
def test_alice_seed(switching):
    """The seed decides the draws, and nothing else does (such as torch's global generator)."""

    def run(seed, global_seed):
        torch.manual_seed(global_seed)
        W = torch.nn.Parameter(torch.zeros(WIDE, dtype=torch.float64))
        optimizer = Alice([W], lr=LR, seed=seed, **ALICE | dict(switching=switching))
        for G in make_gradients(WIDE, 0, 8):
            W.grad = torch.from_numpy(G)
            optimizer.step()
        return W.detach()

    assert torch.equal(run(3, 0), run(3, 1))
    assert not torch.allclose(run(3, 0), run(4, 0), rtol=1e-3)


# Changes that the comparison must notice: if it does not, it proves nothing about that option.
CHANGES = {
    "beta1": dict(betas=(0.91, 0.95, 0.8)),
    "beta2": dict(betas=(0.9, 0.94, 0.8)),
    "beta3": dict(betas=(0.9, 0.95, 0.7)),
    "scale": dict(scale=0.31),
    "compensation_scale": dict(compensation_scale=0.41),
    "limiter": dict(limiter=1.02),
    "no_limiter": dict(limiter=None),
    "eps": dict(eps=1e-6),
    "weight_decay": dict(weight_decay=0.01),
    "tracking": dict(tracking=False),
    "tracking_basis": dict(tracking_basis="rotated"),
    "update_interval": dict(update_interval=14),
    "initial_basis": dict(initial_basis="zeros"),
    "no_compensation": dict(compensation="none"),
    "fira": dict(compensation="fira"),
    "fira_plus": dict(compensation="fira_plus"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_comparison_notices(draws, change):
    worst_weight, _, _ = compare_alice(draws, changed=CHANGES[change])
    assert worst_weight > 1e4 * TOLERANCE


def compare_racs(shapes=(WIDE,), steps=STEPS, lrs=None, gradients=None, changed=None, **options):
    """As `compare_alice`, for RACS."""
    weights = [make_weight(shape, i) for i, shape in enumerate(shapes)]
    gradients = gradients or [make_gradients(shape, i, steps) for i, shape in enumerate(shapes)]
    parameters = [torch.nn.Parameter(torch.from_numpy(W.copy())) for W in weights]
    optimizer = RACS(parameters, lr=LR, **options)
    references = [oracle.RACS(W, **for_oracle(options | (changed or {}))) for W in weights]
    worst_weight, worst_state = 0.0, dict.fromkeys(("s", "q", "phi"), 0.0)
    for t in range(steps):
        lr = lrs[t] if lrs else LR
        optimizer.param_groups[0]["lr"] = lr
        for parameter, G in zip(parameters, gradients, strict=True):
            parameter.grad = torch.from_numpy(G[t].copy())
        optimizer.step()
        for parameter, reference, G, W_0 in zip(parameters, references, gradients, weights, strict=True):
            reference.step(G[t], lr)
            worst_weight = max(worst_weight, weight_error(parameter, reference, W_0))
            state = optimizer.state[parameter]
            assert state["step"] == reference.t
            for name in worst_state:
                error = relative(state[name].numpy(), getattr(reference, name))
                worst_state[name] = max(worst_state[name], error)
    return worst_weight, worst_state, references


def assert_racs(**options):
    worst_weight, worst_state, references = compare_racs(**options)
    assert worst_weight < TOLERANCE, worst_weight
    assert max(worst_state.values()) < TOLERANCE, worst_state
    return references


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("limiter", (1.01, None))
@pytest.mark.parametrize("beta", (0.9, 0.0))
def test_racs_grid(beta, limiter, shape):
    (reference,) = assert_racs(shapes=(SHAPES[shape],), beta=beta, limiter=limiter)
    if limiter:
        assert min(reference.etas) < 1 and reference.etas.count(1.0) > 1
    else:
        assert set(reference.etas) == {1.0}


@pytest.mark.parametrize("iterations", (1, 2, 50))
def test_racs_iterations(iterations):
    assert_racs(iterations=iterations)


def test_racs_weight_decay_and_schedule():
    assert_racs(lrs=[0.05 * np.sin(0.1 * t) for t in range(STEPS)], weight_decay=0.3)


def test_racs_several_matrices():
    assert_racs(shapes=(WIDE, WIDE, TALL, SQUARE, WIDE), scale=0.02)


@pytest.mark.parametrize("eps", (0.3, 30.0))
def test_racs_epsilon(eps):
    """An eps large enough to act on q and s (0.3) and on the norms (30) shows where it stands.

    The package takes the norms of G / max|G| (section 0 asks for it in tiny gradients only), so the floor of a
    norm is relative to max|G|; here that is 1.
    """
    gradients = [G / np.abs(G).max() for G in make_gradients(WIDE, 0)]
    assert_racs(eps=eps, gradients=[gradients])


@pytest.mark.parametrize("size", (1e-6, 1e-10, 1e-13))
def test_racs_tiny_gradients(size):
    assert_racs(gradients=[[size * G for G in make_gradients(WIDE, 0)]])


def test_racs_zero_columns_rows_and_gradients():
    gradients = make_gradients(WIDE, 0)
    for G in gradients:
        G[:, [0, 7]] = 0
        G[4, :] = 0
    for t in (0, 9):
        gradients[t][:] = 0
    (reference,) = assert_racs(gradients=[gradients])
    assert np.all(np.isfinite(reference.W)) and reference.phi > 0


@pytest.mark.parametrize(
    "changed",
    (
        dict(beta=0.89),
        dict(beta=0.0),
        dict(scale=0.051),
        dict(limiter=1.02),
        dict(limiter=None),
        dict(iterations=4),
        dict(eps=1.0),
        dict(weight_decay=0.01),
    ),
    ids=str,
)
def test_racs_comparison_notices(changed):
    worst_weight, _, _ = compare_racs(changed=changed)
    assert worst_weight > 1e4 * TOLERANCE


def test_every_variant_is_different():
    """The variants of section 8 give different updates, so agreeing with one is not agreeing with another."""
    G = make_gradients(WIDE, 0, 16)
    rng = np.random.default_rng(0)
    finals = {}
    for switching, compensation in itertools.product(SWITCHINGS, COMPENSATIONS):
        reference = oracle.Alice(np.zeros(WIDE), **for_oracle(ALICE), switching=switching, compensation=compensation)

        class FreshDraws:
            def columns(self, total, count):
                return list(rng.permutation(total)[:count])

            def gaussian(self, rows, count):
                return rng.standard_normal((rows, count))

        for t in range(16):
            reference.step(G[t], LR, draws=FreshDraws())
        finals[switching, compensation] = reference.W
    for one, other in itertools.combinations(finals, 2):
        assert relative(finals[one], finals[other]) > 1e-2, (one, other)
