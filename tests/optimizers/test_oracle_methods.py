"""Every other optimizer against the independent NumPy transcriptions in `oracle_full_rank.py` and `oracle_low_rank.py`.

Measures and gradients are those of `test_oracle.py`: weights at every step, as a whole, row by row and column by
column, and states, in float64. Here the learning rate changes from step to step and weights decay.
"""

import functools
import hashlib

import numpy as np
import pytest
import torch

from optimizers.apollo import Apollo
from optimizers.eigen_adam import EigenAdam
from optimizers.fira import Fira
from optimizers.galore import GaLore
from optimizers.lamb import LAMB
from optimizers.lars import LARS
from optimizers.muon import Muon
from optimizers.normalization import Normalization
from optimizers.racs import RACS
from optimizers.shampoo import Shampoo
from optimizers.soap import SOAP
from optimizers.soap_factored import SOAPFactored
from optimizers.swan import SWAN
from optimizers.whitening import Whitening
from tests.optimizers import oracle, oracle_full_rank, oracle_low_rank, test_oracle
from tests.optimizers.test_oracle import draws, for_oracle, make_gradients, make_weight, relative, weight_error

__all__ = ["draws"]  # a fixture

TOLERANCE = 1e-10
ROOTS_TOLERANCE = 1e-9  # of methods with inverse roots of matrices whose condition is up to 1e6
LR = 0.02
K = 7
STEPS = 30
SHAPES = {"wide": (8, 12), "tall": (12, 8), "square": (9, 9), "row": (1, 6), "column": (6, 1)}
SEED = 5
BASES = ("U", "U_L", "U_R")

# Different from the defaults and from each other, so that a mixed-up letter shows; a large eps shows where it stands.
TWO_BETAS = dict(betas=(0.9, 0.95))
THREE_BETAS = dict(betas=(0.9, 0.95, 0.8), eps=1e-3, update_interval=K)
LOW_RANK = TWO_BETAS | dict(rank=4, update_interval=K, scale=0.3, eps=1e-3)

# name: (file.class, oracle, options)
FULL = oracle_full_rank
FULL_RANK_METHODS = {
    "normalization": (Normalization, FULL.Normalization, dict()),
    "whitening_evd": (Whitening, FULL.Whitening, dict(solver="evd")),
    "whitening": (Whitening, FULL.Whitening, dict(solver="newton_schulz")),
    "whitening_9": (Whitening, FULL.Whitening, dict(solver="newton_schulz", iterations=9)),
    "swan_evd": (SWAN, FULL.SWAN, dict(solver="evd")),
    "swan": (SWAN, FULL.SWAN, dict(solver="newton_schulz")),
    "muon_paper": (
        Muon,
        FULL.Muon,
        dict(momentum=0.9, nesterov=False, orthogonalization="newton_schulz", adjust_lr_fn="none"),
    ),
    "muon_evd": (Muon, FULL.Muon, dict(orthogonalization="evd", adjust_lr_fn="match_rms_adamw")),
    "muon": (Muon, FULL.Muon, dict(ns_dtype="float32")),
    "muon_no_nesterov": (Muon, FULL.Muon, dict(ns_dtype="float32", nesterov=False, ns_steps=3, momentum=0.8)),
    "muon_match": (Muon, FULL.Muon, dict(ns_dtype="float32", adjust_lr_fn="match_rms_adamw")),
    "lars": (LARS, FULL.LARS, dict(momentum=0.8)),
    "lamb": (LAMB, FULL.LAMB, TWO_BETAS | dict(eps=1e-3)),
    "lamb_uncorrected": (LAMB, FULL.LAMB, TWO_BETAS | dict(eps=1e-3, bias_correction=False)),
    "shampoo": (Shampoo, FULL.Shampoo, dict(eps=1e-6)),
    "shampoo_average": (Shampoo, FULL.Shampoo, dict(beta=0.9, eps=2**-10)),
    "shampoo_half": (Shampoo, FULL.Shampoo, dict(power=0.5, eps=2**-10)),
    "shampoo_half_average": (Shampoo, FULL.Shampoo, dict(power=0.5, beta=0.9, eps=2**-10)),
    "shampoo_momentum": (Shampoo, FULL.Shampoo, dict(beta=0.9, eps=2**-10, momentum=0.8)),
    "shampoo_stale": (Shampoo, FULL.Shampoo, dict(update_interval=K, eps=2**-10)),
    "shampoo_half_stale": (Shampoo, FULL.Shampoo, dict(update_interval=K, eps=2**-10, power=0.5)),
    "eigen_adam": (EigenAdam, FULL.EigenAdam, THREE_BETAS),
    "eigen_adam_corrected": (EigenAdam, FULL.EigenAdam, THREE_BETAS | dict(bias_correction=True)),
    "eigen_adam_free_signs": (EigenAdam, FULL.EigenAdam, THREE_BETAS | dict(fix_signs=False)),
    "soap": (SOAP, FULL.SOAP, THREE_BETAS | dict(form="paper")),
    "soap_published": (SOAP, FULL.SOAPPublished, THREE_BETAS | dict(form="published")),
    "soap_factored": (SOAPFactored, FULL.SOAPFactored, THREE_BETAS),
    "soap_factored_published": (
        SOAPFactored,
        FULL.SOAPFactoredPublished,
        THREE_BETAS | dict(form="published"),
    ),
    "racs_no_ema": (RACS, oracle.RACS, dict(beta=0.0)),
}
# Options that the package has and the transcription expresses by itself.
OWN = ("ns_dtype", "form", "fix_signs", "store_projection", "seed")
PRINTED = dict(update_times="printed", bias_correction=False)
LOW_RANK_METHODS = {
    "galore": (GaLore, oracle_low_rank.GaLore, dict()),
    "galore_printed": (GaLore, oracle_low_rank.GaLore, PRINTED),
    "galore_rows": (GaLore, oracle_low_rank.GaLore, dict(square="rows")),
    "fira": (Fira, oracle_low_rank.Fira, dict(limiter=1.1)),
    "fira_scaled": (Fira, oracle_low_rank.Fira, dict(limiter=1.05, residual="scaled")),
    "fira_printed": (Fira, oracle_low_rank.Fira, PRINTED | dict(limiter=None)),
    "apollo": (Apollo, oracle_low_rank.Apollo, dict(seed=SEED)),
    "apollo_limited": (Apollo, oracle_low_rank.Apollo, dict(seed=SEED, limiter=1.1)),
    "apollo_stored": (Apollo, oracle_low_rank.Apollo, dict(seed=SEED, store_projection=True)),
    "apollo_printed": (Apollo, oracle_low_rank.Apollo, PRINTED | dict(seed=SEED, square="rows")),
    "apollo_mini": (Apollo, oracle_low_rank.Apollo, dict(seed=SEED, rank=1, scaling="tensor")),
    "apollo_mini_limited": (
        Apollo,
        oracle_low_rank.Apollo,
        dict(seed=SEED, rank=1, scaling="tensor", limiter=1.1),
    ),
    "apollo_svd": (Apollo, oracle_low_rank.Apollo, dict(projection="svd")),
    "apollo_svd_limited": (Apollo, oracle_low_rank.Apollo, dict(projection="svd", limiter=1.1)),
}
# Each class with nothing said but what must be.
DEFAULTS = {
    "whitening": (Whitening, FULL.Whitening, dict()),
    "swan": (SWAN, FULL.SWAN, dict()),
    "lars": (LARS, FULL.LARS, dict()),
    "lamb": (LAMB, FULL.LAMB, dict()),
    "shampoo": (Shampoo, FULL.Shampoo, dict()),
    "eigen_adam": (EigenAdam, FULL.EigenAdam, dict()),
    "galore": (GaLore, oracle_low_rank.GaLore, dict(rank=4)),
    "fira": (Fira, oracle_low_rank.Fira, dict(rank=4)),
    "apollo": (Apollo, oracle_low_rank.Apollo, dict(rank=4, seed=SEED)),
}


def drawn(step, m, r, name="parameter 0"):
    """Standard normal numbers [m, r] for a parameter of an optimizer with seed SEED, at `step`."""
    digest = hashlib.sha256(f"{SEED}/{name}/{step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") // 2)
    return torch.randn(m, r, generator=generator, dtype=torch.float64).numpy()


def state_errors(state, reference):
    """Relative errors of every tensor that the package keeps; signs of bases are free."""
    errors = {}
    for name, value in state.items():
        if not torch.is_tensor(value):
            continue
        expected = getattr(reference, {"m": "m_t", "v": "v_t"}.get(name, name))
        actual = value.numpy()
        if name == "phi" and expected < 1e-12:  # of a full-rank residual: nothing but rounding
            continue
        if name in BASES:
            actual = actual * np.where(np.sum(actual * expected, axis=0) < 0, -1.0, 1.0)
        errors[name] = relative(actual, expected)
    return errors


def compare(optimizer, parameter, reference, gradients, handed_over=True):
    """Both sides on one matrix: the worst error of the weight, and of each state."""
    W_0 = parameter.detach().numpy().copy()
    worst, worst_state = 0.0, {}
    for t, G in enumerate(gradients):
        lr = LR * (1 + 0.5 * np.sin(0.3 * t))
        optimizer.param_groups[0]["lr"] = lr
        parameter.grad = torch.from_numpy(G.copy())
        optimizer.step()
        state = optimizer.state[parameter]
        bases = {name: state[name].numpy() for name in BASES if name in state}
        injected = {} if isinstance(reference, oracle.RACS) else {"like": bases if handed_over and bases else None}
        reference.step(G, lr, **injected)
        if np.any(reference.W != W_0):
            worst = max(worst, weight_error(parameter, reference, W_0))
        else:
            assert np.array_equal(parameter.detach().numpy(), W_0)
        if handed_over:
            for name, error in state_errors(state, reference).items():
                worst_state[name] = max(worst_state.get(name, 0.0), error)
    return worst, worst_state


def run(table, name, shape, steps=STEPS, handed_over=True, changed=None, W=None, **more):
    """`compare` for one entry of a table; `changed` gives the transcription alone other options."""
    cls, transcription, options = table[name]
    shape = SHAPES.get(shape, shape)
    low_rank = transcription.__module__ == oracle_low_rank.__name__
    if table is not DEFAULTS:
        options = (LOW_RANK if low_rank else {}) | dict(weight_decay=0.1) | options
    options = options | more
    if low_rank:
        options["rank"] = min(options["rank"], *shape)
    own = {name: value for name, value in (options | (changed or {})).items() if name not in OWN}
    own = for_oracle(own) if low_rank else own
    if transcription is oracle_low_rank.Apollo:
        own["drawn"] = drawn
    W = make_weight(shape, 0) if W is None else W
    parameter = torch.nn.Parameter(torch.from_numpy(W.copy()))
    optimizer = cls([parameter], lr=LR, **options)
    reference = transcription(W, **own)
    worst, worst_state = compare(optimizer, parameter, reference, make_gradients(shape, 0, steps), handed_over)
    return worst, worst_state, reference


def assert_same(*args, tolerance=TOLERANCE, **options):
    worst, worst_state, reference = run(*args, **options)
    assert worst < tolerance, worst
    assert max(worst_state.values(), default=0.0) < tolerance, worst_state
    return reference


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LOW_RANK_METHODS)
def test_low_rank(name, shape):
    reference = assert_same(LOW_RANK_METHODS, name, shape)
    if LOW_RANK_METHODS[name][2].get("limiter") and reference.m > 1:  # the limiter both acted and let pass
        assert min(reference.etas) < 1 and reference.etas.count(1.0) > 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FULL_RANK_METHODS)
def test_full_rank(name, shape):
    # The rows that SWAN whitens have mean 0, so a square Gram matrix is singular; its square root has half the digits.
    tolerance = 1e-6 if (name, shape) == ("swan_evd", "square") else ROOTS_TOLERANCE
    assert_same(FULL_RANK_METHODS, name, shape, tolerance=tolerance)


def test_muon_in_bfloat16():
    """The default precision of Newton-Schulz changes the update by a few roundings of bfloat16, not more."""
    worst, _, _ = run(FULL_RANK_METHODS, "muon", (64, 96), steps=3, ns_dtype="bfloat16", weight_decay=0.0)
    assert 1e-4 < worst < 0.1


def test_shampoo_starts_in_float64():
    """The first L and R are eps I in the precision of the statistics."""
    W = torch.nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
    state = Shampoo([W], eps=1e-3).new_state(W, Shampoo([W], eps=1e-3).param_groups[0])
    assert state["L"].tolist() == [[1e-3, 0], [0, 1e-3]]


@pytest.mark.parametrize("shape", ("wide", "tall"))
@pytest.mark.parametrize("name", ("lars", "lamb"))
def test_vanishing_weight(name, shape):
    """The factor ||W|| is 1 where it would be 0, so that training can start from zero."""
    reference = assert_same(FULL_RANK_METHODS, name, shape, W=np.zeros(SHAPES[shape]))
    assert np.linalg.norm(reference.W) > 0


@pytest.mark.parametrize("shape", ("wide", "tall"))
@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults(name, shape):
    """Nothing is said but the rank: the numbers are those of the methods' papers and codes."""
    assert_same(DEFAULTS, name, shape)


@pytest.mark.parametrize("shape", ("wide", "tall", "square"))
@pytest.mark.parametrize("name", ("galore", "fira", "fira_scaled", "apollo_svd"))
def test_signs_do_not_matter_before_the_second_basis(name, shape):
    """Nothing of the package's is handed over: negating columns of the first basis changes no weight."""
    assert_same(LOW_RANK_METHODS, name, shape, handed_over=False, update_interval=STEPS)


@pytest.mark.parametrize("rank", (1, 2, 8))
@pytest.mark.parametrize("name", ("galore", "fira", "fira_scaled", "apollo", "apollo_svd"))
def test_ranks(name, rank):
    """Rank 8 is full for 8 rows: Fira's exact residual vanishes there, up to rounding."""
    assert_same(LOW_RANK_METHODS, name, "wide", rank=rank)


@pytest.mark.parametrize("update_times", ("printed", "zero_based"))
@pytest.mark.parametrize("update_interval", (1, 2))
@pytest.mark.parametrize("name", ("galore", "fira", "apollo", "apollo_svd"))
def test_update_times(name, update_interval, update_times):
    assert_same(LOW_RANK_METHODS, name, "wide", steps=10, update_interval=update_interval, update_times=update_times)


@pytest.mark.parametrize("update_times", ("printed", "zero_based"))
@pytest.mark.parametrize("update_interval", (1, 2))
@pytest.mark.parametrize("name", ("shampoo_stale", "eigen_adam", "soap", "soap_factored"))
def test_full_rank_update_times(name, update_interval, update_times):
    times = dict(update_interval=update_interval, update_times=update_times)
    assert_same(FULL_RANK_METHODS, name, "wide", steps=10, tolerance=ROOTS_TOLERANCE, **times)


@pytest.mark.parametrize("update_interval", (1, 2))
@pytest.mark.parametrize("name", ("soap_published", "soap_factored_published"))
def test_published_soap_update_times(name, update_interval):
    assert_same(FULL_RANK_METHODS, name, "wide", steps=10, update_interval=update_interval)


@pytest.mark.parametrize("names", (("parameter 0", "parameter 1"), ("a.weight", "b.weight")), ids=str)
def test_apollo_names(names):
    """Every parameter has its own projections, which belong to its name where it has one."""
    options = LOW_RANK | dict(seed=SEED)
    weights = [make_weight(SHAPES["wide"], i) for i in range(2)]
    gradients = [make_gradients(SHAPES["wide"], i) for i in range(2)]
    parameters = [torch.nn.Parameter(torch.from_numpy(W.copy())) for W in weights]
    named = list(zip(names, parameters, strict=True))
    optimizer = Apollo(named if "a.weight" in names else parameters, lr=LR, **options)
    own = {name: value for name, value in for_oracle(options).items() if name not in OWN}
    references = [
        oracle_low_rank.Apollo(W, drawn=functools.partial(drawn, name=name), **own)
        for W, name in zip(weights, names, strict=True)
    ]
    for t in range(16):
        for parameter, G in zip(parameters, gradients, strict=True):
            parameter.grad = torch.from_numpy(G[t].copy())
        optimizer.step()
        for reference, G in zip(references, gradients, strict=True):
            reference.step(G[t], LR)
    for parameter, reference, W_0 in zip(parameters, references, weights, strict=True):
        assert weight_error(parameter, reference, W_0) < TOLERANCE


@pytest.mark.parametrize("name", ("eigen_adam", "soap", "soap_published", "shampoo_average"))
def test_full_rank_long_run(name):
    assert_same(FULL_RANK_METHODS, name, "wide", steps=250, update_interval=20, tolerance=ROOTS_TOLERANCE)


@pytest.mark.parametrize("shape", ((6, 10), (10, 6), (7, 7)), ids=str)
@pytest.mark.parametrize(
    "name", ("galore", "galore_printed", "fira", "fira_scaled", "apollo", "apollo_mini", "apollo_svd")
)
def test_long_run(name, shape):
    assert_same(LOW_RANK_METHODS, name, shape, steps=250, update_interval=20)


ALICE_RUNS = {
    "corrected": dict(bias_correction=True),
    "columns": dict(square="columns"),
    "both": dict(bias_correction=True, square="columns", update_times="zero_based"),
    "both_without_compensation": dict(bias_correction=True, square="columns", compensation="none"),
    "both_without_tracking": dict(bias_correction=True, square="columns", tracking=False),
    "fira_plus": dict(tracking=False, switching="none", compensation="fira_plus"),
    "fira_plus_columns": dict(tracking=False, switching="none", compensation="fira_plus", square="columns"),
}


def alice_errors(draws, monkeypatch, **options):
    """`compare_alice` with the transcription that knows the two further options."""
    monkeypatch.setattr(oracle, "Alice", oracle_low_rank.Alice)
    worst, worst_state, _ = test_oracle.compare_alice(draws, **options)
    return max(worst, *worst_state.values(), 0.0)


@pytest.mark.parametrize("shape", ("wide", "tall", "square"))
@pytest.mark.parametrize("name", ALICE_RUNS)
def test_alice_options(draws, monkeypatch, name, shape):
    shapes = (test_oracle.SHAPES[shape],)
    assert alice_errors(draws, monkeypatch, shapes=shapes, **ALICE_RUNS[name]) < TOLERANCE


@pytest.mark.parametrize("shape", ((1, 6), (6, 1)), ids=str)
def test_alice_single_row(draws, monkeypatch, shape):
    options = dict(rank=1, leading=1, bias_correction=True)
    assert alice_errors(draws, monkeypatch, shapes=(shape,), **options) < TOLERANCE


@pytest.mark.parametrize("name", ("printed", "both", "both_without_tracking", "fira_plus"))
def test_alice_long_run(draws, monkeypatch, name):
    options = dict(rank=3, leading=1, update_interval=20, steps=250) | ALICE_RUNS.get(name, {})
    error = alice_errors(draws, monkeypatch, shapes=((6, 10), (10, 6), (7, 7)), **options)
    assert error < TOLERANCE


# Changes of the transcription alone, which the comparison must notice.
NOTICED = {
    "galore": (dict(betas=(0.91, 0.95)), dict(betas=(0.9, 0.94)), dict(eps=1.1e-3), dict(scale=0.31)),
    "galore_printed": (dict(update_times="zero_based"), dict(bias_correction=True)),
    "fira": (dict(limiter=1.2), dict(limiter=None), dict(residual="scaled"), dict(scale=0.31), dict(eps=1.1e-3)),
    "apollo": (dict(betas=(0.9, 0.94)), dict(scaling="tensor"), dict(projection="svd"), dict(limiter=1.1)),
    "apollo_mini": (dict(scaling="columns"), dict(bias_correction=False), dict(scale=0.31)),
    "apollo_svd": (dict(projection="gaussian"), dict(update_interval=8)),
    "whitening": (dict(solver="evd"), dict(iterations=6)),
    "swan": (dict(solver="evd"), dict(iterations=6)),
    "muon": (dict(nesterov=False), dict(momentum=0.94), dict(ns_steps=4), dict(orthogonalization="newton_schulz")),
    "lars": (dict(momentum=0.9), dict(weight_decay=0.11)),
    "lamb": (dict(betas=(0.9, 0.94)), dict(bias_correction=False), dict(eps=1.1e-3)),
    "shampoo_stale": (dict(power=0.5), dict(beta=0.9), dict(update_interval=8), dict(eps=1.1e-3)),
    "eigen_adam": (dict(betas=(0.9, 0.95, 0.7)), dict(bias_correction=True), dict(eps=1.1e-3)),
    "soap": (dict(betas=(0.9, 0.95, 0.7)), dict(update_times="zero_based"), dict(bias_correction=True)),
    "soap_published": (dict(betas=(0.9, 0.95, 0.7)), dict(update_interval=8), dict(eps=1.1e-3)),
}
LOW_RANK_AND_FULL = LOW_RANK_METHODS | FULL_RANK_METHODS


@pytest.mark.parametrize("name, changed", [(name, c) for name, changes in NOTICED.items() for c in changes], ids=str)
def test_comparison_notices(name, changed):
    worst, _, _ = run(LOW_RANK_AND_FULL, name, "wide", changed=changed)
    assert worst > 1e4 * TOLERANCE


@pytest.mark.parametrize("name", ("galore", "fira", "apollo", "apollo_svd"))
def test_comparison_notices_the_side(name):
    """The other side of a square matrix gives another update."""
    worst, _, _ = run(LOW_RANK_METHODS, name, "square", changed=dict(square="rows"))
    assert worst > 1e-2


def test_coupled_iteration_converges_to_the_polar_factor():
    """The transcription's two ways to whiten are one in the limit."""
    G = make_gradients(SHAPES["wide"], 0, 1)[0]
    np.testing.assert_allclose(FULL.newton_schulz(G, 40), FULL.polar(G), atol=1e-10)


def test_only_undetermined_parts_of_a_basis_are_adopted():
    M = np.diag([5.0, 3.0, 0.0, 0.0])
    mixed = np.eye(4)
    mixed[2:, 2:] = [[0.6, -0.8], [0.8, 0.6]]
    mixed[:, 0] *= -1
    np.testing.assert_array_equal(FULL.eigenbasis(M, mixed), mixed)
    with pytest.raises(AssertionError, match="eigenspace"):
        FULL.eigenbasis(M, np.eye(4)[:, [0, 2, 1, 3]])
