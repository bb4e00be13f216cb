"""Full-rank methods: identities that hold for every gradient, behaviour at the edges, and the eigen-solver's ladder.

Optimizers run with lr = 1 from given weights, so that the change of the weights is minus the update direction.
"""

import warnings

import pytest
import torch

from optimizers import Alice, base, linalg
from optimizers.base import Context
from optimizers.bfloat16 import widened
from optimizers.eigen_adam import EigenAdam
from optimizers.lamb import LAMB
from optimizers.lars import LARS
from optimizers.muon import Muon
from optimizers.normalization import Normalization
from optimizers.shampoo import Shampoo
from optimizers.soap import SOAP
from optimizers.soap_factored import SOAPFactored
from optimizers.swan import SWAN
from optimizers.whitening import Whitening

VARIANTS = {
    "normalization": (Normalization, {}),
    "whitening": (Whitening, {}),
    "whitening_evd": (Whitening, {"solver": "evd"}),
    "swan": (SWAN, {}),
    "swan_evd": (SWAN, {"solver": "evd"}),
    "muon": (Muon, {}),
    "muon_float32": (Muon, {"ns_dtype": "float32", "adjust_lr_fn": "match_rms_adamw"}),
    "muon_newton_schulz": (Muon, {"orthogonalization": "newton_schulz", "nesterov": False}),
    "muon_evd": (Muon, {"orthogonalization": "evd", "adjust_lr_fn": "none"}),
    "lars": (LARS, {}),
    "lamb": (LAMB, {}),
    "shampoo": (Shampoo, {}),
    "shampoo_half": (Shampoo, {"power": 0.5, "update_interval": 2, "momentum": 0.9}),
    "shampoo_average": (Shampoo, {"beta": 0.9, "eps": 0.0}),
    "eigen_adam": (EigenAdam, {"update_interval": 2}),
    "eigen_adam_corrected": (EigenAdam, {"update_interval": 3, "bias_correction": True}),
    "soap": (SOAP, {"update_interval": 2}),
    "soap_published": (SOAP, {"update_interval": 2, "form": "published"}),
    "soap_factored": (SOAPFactored, {"update_interval": 2}),
    "soap_factored_published": (SOAPFactored, {"update_interval": 2, "form": "published"}),
}
each_variant = pytest.mark.parametrize(("method", "options"), VARIANTS.values(), ids=VARIANTS)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(m, n, steps=6, dtype=torch.float64):
    """A mean and noise, so that there is something to average."""
    mean = draw(m, n, seed=99)
    return [(mean + 0.5 * draw(m, n, seed=t)).to(dtype) for t in range(steps)]


def orthogonal(size, seed):
    return torch.linalg.qr(draw(size, size, seed=seed)).Q


def run(method, grads, W=None, **options):
    """The directions of all steps, each from the same weights, and the optimizer's final state."""
    W = torch.zeros_like(grads[0]) if W is None else W
    p = torch.nn.Parameter(W.clone())
    optimizer = method([("matrix", p)], lr=1.0, **options)
    directions = []
    for G in grads:
        with torch.no_grad():
            p.copy_(W)
        p.grad = G.clone()
        optimizer.step()
        directions.append((W - p).detach())
    return directions, optimizer.state[p]


def polar_factor(G):
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    return U @ Vh


def close(a, b, tolerance=1e-9):
    return (a - b).norm() <= tolerance * b.norm()


# All methods ----------------------------------------------------------------------------------------------------------

KINDS = {
    "zero": lambda G: 0 * G,
    "tiny": lambda G: 1e-30 * G,
    "huge": lambda G: 1e30 * G,
    "rank one": lambda G: G[:, :1] @ G[:1],
    "single row": lambda G: G * (torch.arange(len(G)) == 1)[:, None],
    "single column": lambda G: G * (torch.arange(G.shape[1]) == 1),
    "constant": lambda G: torch.full_like(G, 0.1),
    "all": None,
}


@each_variant
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(4, 6), (5, 5), (1, 5)], ids=str)
def test_extreme_gradients_leave_everything_finite(method, options, kind, shape):
    plain = gradients(*shape, steps=7, dtype=torch.float32)
    makers = [make for make in KINDS.values() if make]
    grads = [make(plain[0]) for make in makers] if kind == "all" else [KINDS[kind](G) for G in plain[:4]]
    directions, state = run(method, grads, **options)
    for X in [*directions, *(value for name, value in state.items() if name != "step")]:
        assert torch.isfinite(X).all()
    if kind == "zero":
        assert all(D.count_nonzero() == 0 for D in directions)


@pytest.mark.parametrize(
    "name", ["normalization", "whitening", "whitening_evd", "swan", "muon_newton_schulz", "muon_evd", "lars"]
)
@pytest.mark.parametrize("scale", [1e-30, 1e30], ids=str)
def test_direction_does_not_depend_on_the_scale_of_the_gradient(name, scale):
    method, options = VARIANTS[name]
    grads = gradients(4, 6, steps=2, dtype=torch.float32)
    plain, scaled = (run(method, [c * G for G in grads], **options)[0] for c in (1.0, scale))
    assert all(close(a, b, 1e-4) for a, b in zip(scaled, plain, strict=True))
    assert plain[-1].norm() > 0.1


@each_variant
def test_a_transposed_parameter_has_the_transposed_update(method, options):
    if method is Muon:
        options = {**options, "adjust_lr_fn": "none"}  # "original" depends on the stored orientation
    grads, W = gradients(4, 6), draw(4, 6, seed=50)
    wide, _ = run(method, grads, W, **options)
    tall, _ = run(method, [G.mT for G in grads], W.mT, **options)
    assert all(close(a.mT, b) for a, b in zip(tall[1:], wide[1:], strict=True))


@pytest.mark.parametrize(
    "name",
    [
        "whitening",
        "muon_evd",
        "muon_newton_schulz",
        "shampoo",
        "shampoo_half",
        "soap",
        "soap_published",
        "soap_factored",
    ],
)
def test_methods_with_gram_matrices_on_both_sides_turn_with_the_gradient(name):
    """P G S with orthogonal P and S has the update P D S; elementwise methods have no such property."""
    method, options = VARIANTS[name]
    grads, P, S = gradients(5, 5), orthogonal(5, 11), orthogonal(5, 12)
    plain, _ = run(method, grads, **options)
    turned, _ = run(method, [P @ G @ S for G in grads], **options)
    assert all(close(a, P @ b @ S, 1e-6) for a, b in zip(turned, plain, strict=True))
    assert plain[-1].norm() > 0.1


@each_variant
def test_matrices_updated_together_do_not_mix(monkeypatch, method, options):
    """As on a GPU, where matrices of one shape are stacked."""
    if method is Muon:  # bfloat16 products of stacks and of single matrices are rounded at different places
        options = {**options, "ns_dtype": "float32"}
    grads = [gradients(4, 6), [-3 * G.flip(0) for G in gradients(4, 6)]]
    weights = [draw(4, 6, seed=50), 0 * draw(4, 6)]
    alone = [run(method, G, W, **options)[0] for G, W in zip(grads, weights, strict=True)]
    monkeypatch.setattr(base, "BATCHED_DEVICES", {"cpu"})
    params = [torch.nn.Parameter(W.clone()) for W in weights]
    optimizer = method(params, lr=1.0, **options)
    for t in range(len(grads[0])):
        with torch.no_grad():
            for p, W, G in zip(params, weights, grads, strict=True):
                p.copy_(W)
                p.grad = G[t].clone()
        optimizer.step()
        assert all(close(W - p, D[t]) for p, W, D in zip(params, weights, alone, strict=True))


m, n = 4, 6
STATES = {  # name: {state: (shape, kept in float32)}
    "normalization": {},
    "whitening": {},
    "swan": {},
    "muon": {"m": ((m, n), False)},
    "lars": {"m": ((m, n), False)},
    "lamb": {"m": ((m, n), False), "v": ((m, n), False)},
    "shampoo": {"L": ((m, m), True), "R": ((n, n), True)},
    "shampoo_half": {
        "L": ((m, m), True),
        "R": ((n, n), True),
        "L_root": ((m, m), True),
        "R_root": ((n, n), True),
        "m": ((m, n), False),
    },
    "eigen_adam": {"Q": ((m, m), True), "U": ((m, m), False), "m": ((m, n), False), "v": ((m, n), False)},
    "soap": {
        "L": ((m, m), True),
        "R": ((n, n), True),
        "U_L": ((m, m), False),
        "U_R": ((n, n), False),
        "m": ((m, n), False),
        "v": ((m, n), False),
    },
    "soap_factored": {
        "L": ((m, m), True),
        "R": ((n, n), True),
        "U_L": ((m, m), False),
        "U_R": ((n, n), False),
        "m": ((m, n), False),
        "a": ((m,), True),
        "c": ((n,), True),
    },
}


@pytest.mark.parametrize("name", STATES)
def test_states_and_their_dtypes(name):
    method, options = VARIANTS[name]
    grads, W = gradients(n, m, dtype=torch.bfloat16), draw(n, m).bfloat16()  # tall: states are of the turned matrix
    if method not in (LARS, LAMB):
        expected = STATES[name]
    else:  # not turned
        expected = {key: (shape[::-1], wide) for key, (shape, wide) in STATES[name].items()}
    directions, state = run(method, grads, W, **options)
    found = {key: (tuple(x.shape), x.dtype) for key, x in state.items() if key != "step"}
    assert found == {key: (shape, torch.float32 if wide else torch.bfloat16) for key, (shape, wide) in expected.items()}
    assert directions[-1].norm() > 0


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (Whitening, {"solver": "svd"}, "solver"),
        (Whitening, {"iterations": 0}, "iterations"),
        (SWAN, {"solver": "svd"}, "solver"),
        (SWAN, {"eps": -1.0}, "eps"),
        (Normalization, {"eps": -1.0}, "eps"),
        (Muon, {"momentum": 1.0}, "momentum"),
        (Muon, {"orthogonalization": "qr"}, "orthogonalization"),
        (Muon, {"adjust_lr_fn": "best"}, "adjust_lr_fn"),
        (Muon, {"ns_dtype": "float16"}, "ns_dtype"),
        (Muon, {"ns_steps": 0}, "ns_steps"),
        (LARS, {"momentum": -0.1}, "momentum"),
        (LAMB, {"betas": (0.9,)}, "betas"),
        (Shampoo, {"power": 1.0}, "power"),
        (Shampoo, {"beta": 1.0}, "beta"),
        (Shampoo, {"momentum": 1.0}, "momentum"),
        (Shampoo, {"update_interval": 0}, "update_interval"),
        (EigenAdam, {"betas": (0.9, 0.9)}, "betas"),
        (EigenAdam, {"update_times": "often"}, "update_times"),
        (SOAP, {"form": "preprint"}, "form"),
        (SOAP, {"betas": (0.9, 0.9, 1.0)}, "betas"),
        (SOAPFactored, {"betas": (0.9, 0.9)}, "betas"),
    ],
)
def test_options_out_of_range_are_refused(method, options, message):
    with pytest.raises(ValueError, match=message):
        method([torch.nn.Parameter(torch.zeros(3, 4))], **options)


# Stateless methods ----------------------------------------------------------------------------------------------------


def test_normalization_gives_columns_the_norm_sqrt_m():
    G = gradients(4, 6)[0]
    (D,), _ = run(Normalization, [G])
    assert close(D.norm(dim=0), torch.full((6,), 2.0, dtype=torch.float64))
    assert close(torch.nn.functional.cosine_similarity(D, G, dim=0), torch.ones(6, dtype=torch.float64))


def test_whitening_is_sqrt_n_times_the_polar_factor():
    G = gradients(4, 6)[0]
    (D,), _ = run(Whitening, [G], solver="evd")
    assert close(D, 6**0.5 * polar_factor(G))
    (iterated,), _ = run(Whitening, [G], iterations=40)
    assert close(iterated, D)


@pytest.mark.parametrize("iterations", [1, 5])
def test_newton_schulz_follows_its_scalar_recursion(iterations):
    """In the eigenbasis, Z Y is p with p <- p (3 - p)^2 / 4 from lambda / ||A||_F: the singular values are sqrt(p)."""
    G = gradients(4, 6)[0]
    (D,), _ = run(Whitening, [G], iterations=iterations)
    sigma = torch.linalg.svdvals(G)
    p = sigma.square() / (G @ G.mT).norm()
    for _ in range(iterations):
        p = p * (3 - p) ** 2 / 4
    assert close(torch.linalg.svdvals(D) / 6**0.5, p.sqrt().sort(descending=True).values)


def test_swan_whitens_standardised_rows():
    G = gradients(4, 6)[0]
    (D,), _ = run(SWAN, [G], solver="evd")
    standardised = (G - G.mean(1, keepdim=True)) / G.std(1, correction=0, keepdim=True)
    assert close(D, polar_factor(standardised))


def test_swan_does_not_depend_on_the_scale_and_offset_of_rows():
    G = gradients(4, 6)[0]
    scales, offsets = torch.tensor([1e-3, 1.0, 5.0, 1e4]).double(), torch.tensor([0.0, 1e-3, -2.0, 1e4]).double()
    plain, changed = (run(SWAN, [X])[0][0] for X in (G, scales[:, None] * G + offsets[:, None]))
    assert close(changed, plain)


def test_swan_leaves_constant_rows_alone():
    """0.1 is no binary number: float32 computes a mean that differs, and standardising would blow that up."""
    G = gradients(4, 6, dtype=torch.float32)[0]
    G[2] = 0.1
    (D,), _ = run(SWAN, [G], solver="evd")
    assert D[2].count_nonzero() == 0 and D[[0, 1, 3]].norm() > 1


# Muon -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 8), (16, 48), (48, 16)], ids=str)
@pytest.mark.parametrize("rule", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_agrees_with_torch(shape, rule, decay, nesterov):
    ours, theirs = (torch.nn.Parameter(draw(*shape, dtype=torch.float32)) for _ in range(2))
    options = dict(lr=0.02, adjust_lr_fn=rule, weight_decay=decay, nesterov=nesterov)
    a, b = Muon([ours], **options), torch.optim.Muon([theirs], **options)
    for t in range(30):
        ours.grad, theirs.grad = (draw(*shape, seed=t, dtype=torch.float32) for _ in range(2))
        a.step()
        with widened(torch.zeros(1).bfloat16()):  # by the kernels that ours takes, where the CPU has none for bfloat16
            b.step()
    # The same bfloat16 numbers come out of the iteration; what is left is float32 rounding of the weights.
    assert close(ours, theirs, 1e-5)
    m = a.state[ours]["m"]
    assert torch.equal(m.mT if shape[0] > shape[1] else m, b.state[theirs]["momentum_buffer"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_quintic_iteration_brings_singular_values_near_one(dtype):
    (D,), _ = run(Muon, [gradients(16, 24, dtype=torch.float32)[0]], ns_dtype=dtype)
    values = torch.linalg.svdvals(D)
    assert values.min() > 0.6 and values.max() < 1.25


def test_the_papers_muon_is_whitened_momentum():
    grads = gradients(4, 6)
    options = dict(momentum=0.9, nesterov=False, adjust_lr_fn="none", ns_steps=40)
    directions, _ = run(Muon, grads, orthogonalization="newton_schulz", **options)
    m = torch.zeros_like(grads[0])
    for G, D in zip(grads, directions, strict=True):
        m = 0.9 * m + 0.1 * G
        assert close(D, polar_factor(m))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_muon_does_not_lose_gradients_whose_norm_overflows(dtype):
    """The reference divides by an infinite norm and stands still; below eps both fade."""
    G = gradients(4, 6, dtype=torch.float32)[0]
    plain, huge, tiny = (run(Muon, [scale * G], ns_dtype=dtype)[0][0] for scale in (1.0, 1e30, 1e-20))
    assert close(huge, plain, 0.05) and tiny.norm() < 1e-6


@pytest.mark.parametrize(
    ("shape", "rule", "factor"),
    [
        ((4, 6), "original", 1.0),
        ((6, 4), "original", 1.5**0.5),
        ((4, 6), "match_rms_adamw", 0.2 * 6**0.5),
        ((6, 4), "match_rms_adamw", 0.2 * 6**0.5),
    ],
)
def test_muon_factor_follows_the_stored_shape(shape, rule, factor):
    G = gradients(*shape)[0]
    (D,), _ = run(Muon, [G], orthogonalization="evd", adjust_lr_fn=rule)
    assert close(D, factor * polar_factor(G))


# LARS and LAMB --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [LARS, LAMB])
def test_lr_is_the_relative_change_of_the_weights(method):
    W = 7 * draw(4, 6, seed=50)
    directions, _ = run(method, gradients(4, 6), W)
    assert all(close(D.norm(), W.norm()) for D in directions)


@pytest.mark.parametrize("method", [LARS, LAMB])
def test_zero_weights_move_by_lr(method):
    directions, _ = run(method, gradients(4, 6))
    assert all(close(D.norm(), torch.tensor(1.0)) for D in directions)


def test_lars_follows_the_average_gradient():
    grads = gradients(4, 6)
    directions, _ = run(LARS, grads, momentum=0.8)
    m = sum(0.2 * 0.8 ** (len(grads) - 1 - t) * G for t, G in enumerate(grads))
    assert close(directions[-1], m / m.norm())


def test_lamb_is_the_normalised_adam_update():
    grads, betas = gradients(4, 6), (0.8, 0.9)
    p = torch.nn.Parameter(torch.zeros(4, 6, dtype=torch.float64))
    adam = torch.optim.Adam([p], lr=1.0, betas=betas, eps=1e-2)
    directions, _ = run(LAMB, grads, betas=betas, eps=1e-2)
    for G, D in zip(grads, directions, strict=True):
        with torch.no_grad():
            p.zero_()
        p.grad = G.clone()
        adam.step()
        assert close(D, -p.detach() / p.detach().norm())


def test_lamb_bias_correction_matters_beside_eps_only():
    grads = gradients(4, 6)
    with_eps, without_eps = (
        [run(LAMB, grads, eps=e, bias_correction=c)[0][0] for c in (True, False)] for e in (0.1, 0)
    )
    assert close(*without_eps) and not close(*with_eps, 1e-3)


# Shampoo --------------------------------------------------------------------------------------------------------------


def test_first_shampoo_step_is_the_polar_factor():
    G = gradients(4, 6)[0]
    (D,), _ = run(Shampoo, [G], eps=0.0)
    assert close(D, polar_factor(G), 1e-6)


def test_shampoo_with_power_one_half_inverts_the_singular_values():
    G = gradients(5, 5)[0]
    (D,), _ = run(Shampoo, [G], eps=0.0, power=0.5)
    assert close(D, G.norm() * torch.linalg.inv(G).mT, 1e-6)


def test_shampoo_sums_slow_down_and_averages_do_not():
    """After t equal gradients sums are t times as large, and the direction is t^(-1/2) as long."""
    G = gradients(5, 5)[0]
    sums, _ = run(Shampoo, [G] * 9, eps=0.0)
    averages, _ = run(Shampoo, [G] * 9, eps=0.0, beta=0.5)
    assert close(sums[8], polar_factor(G) / 3, 1e-6)
    assert close(averages[8], polar_factor(G) / (1 - 0.5**9) ** 0.5, 1e-6)


def test_shampoo_accumulates_from_eps():
    grads = gradients(4, 6)
    _, state = run(Shampoo, grads, eps=0.3)
    assert close(state["L"], 0.3 * torch.eye(4).double() + sum(G @ G.mT for G in grads))
    assert close(state["R"], 0.3 * torch.eye(6).double() + sum(G.mT @ G for G in grads))


def test_shampoo_roots_are_kept_between_update_times():
    grads = gradients(4, 6, steps=7)
    roots = [run(Shampoo, grads[:t], update_interval=3)[1]["L_root"] for t in range(1, 8)]
    changes = [t for t in range(2, 8) if not torch.equal(roots[t - 1], roots[t - 2])]
    assert changes == [3, 6]
    every, kept = run(Shampoo, grads)[0], run(Shampoo, grads, update_interval=3)[0]
    same = [t for t in range(1, 8) if close(kept[t - 1], every[t - 1])]
    assert same == [1, 3, 6]


def test_shampoo_momentum_averages_what_is_preconditioned():
    grads = gradients(4, 6, steps=3)
    directions, state = run(Shampoo, grads, momentum=0.9)
    m = 0.081 * grads[0] + 0.09 * grads[1] + 0.1 * grads[2]
    root = {name: linalg.inverse_root(state[name][None], 0.25)[0] for name in "LR"}
    assert close(directions[-1], root["L"] @ m @ root["R"])


# Eigen-Adam -----------------------------------------------------------------------------------------------------------


def rows_in_order(m, n):
    """A gradient whose G G^T is diagonal and descending: its eigenvectors are unit vectors, up to the sign."""
    return torch.diag(torch.arange(m, 0, -1).double()) @ orthogonal(n, 5)[:m]


def test_eigen_adam_with_unit_vectors_is_adam():
    """With a bias correction and eps = 0, torch's Adam to the last digits."""
    grads = [rows_in_order(4, 6), *gradients(4, 6)]
    options = dict(betas=(0.8, 0.9, 0.999), update_interval=100, eps=0.0)
    corrected, state = run(EigenAdam, grads, bias_correction=True, **options)
    plain, _ = run(EigenAdam, grads, **options)
    assert close(state["U"].abs(), torch.eye(4).double())
    p = torch.nn.Parameter(torch.zeros(4, 6, dtype=torch.float64))
    adam = torch.optim.Adam([p], lr=1.0, betas=(0.8, 0.9), eps=0.0)
    for t, G in enumerate(grads, 1):
        with torch.no_grad():
            p.zero_()
        p.grad = G.clone()
        adam.step()
        assert close(corrected[t - 1], -p.detach())
        assert close(plain[t - 1], -p.detach() * (1 - 0.8**t) / (1 - 0.9**t) ** 0.5)


def test_eigen_adam_is_alice_of_full_rank_while_the_basis_stays():
    """Afterwards they part: Alice keeps the momentum in the coordinates of the basis."""
    grads = gradients(4, 6)
    ours, _ = run(EigenAdam, grads, update_interval=5)
    alice, _ = run(Alice, grads, update_interval=5, rank=4, leading=4, scale=1.0, switching="none", compensation="none")
    same = [close(a, b, 1e-6) for a, b in zip(ours, alice, strict=True)]
    assert same == [True] * 4 + [False] * 2


def test_eigen_adam_basis_is_the_evd_of_the_averaged_covariance():
    grads = gradients(4, 6, steps=4)
    _, state = run(EigenAdam, grads, betas=(0.9, 0.9, 0.7), update_interval=2)
    Q = sum(0.3 * 0.7 ** (3 - t) * G @ G.mT for t, G in enumerate(grads))
    assert close(state["Q"], Q)
    diagonal = state["U"].mT @ Q @ state["U"]
    assert close(diagonal, torch.diag(torch.linalg.eigvalsh(Q).flip(0)))


@pytest.mark.parametrize(("method", "basis"), [(EigenAdam, "U"), (SOAP, "U_R")])
def test_signs_of_the_basis_change_no_update(method, basis):
    grads = gradients(5, 5, steps=12)
    fixed, free = (run(method, grads, update_interval=1, fix_signs=fix) for fix in (True, False))
    assert all(close(a, b) for a, b in zip(fixed[0], free[0], strict=True))
    assert close(fixed[1][basis].abs(), free[1][basis].abs())


def test_fixed_signs_agree_with_the_previous_basis():
    grads = gradients(5, 5, steps=12)
    bases = [run(EigenAdam, grads[:t], update_interval=1)[1]["U"] for t in range(1, 13)]
    assert all((a * b).sum(0).min() >= 0 for a, b in zip(bases[1:], bases[:-1], strict=True))


# SOAP -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["paper", "published"])
def test_soap_bases_stay_orthonormal(form):
    _, state = run(SOAP, gradients(4, 6, steps=9), form=form, update_interval=2)
    for basis in ("U_L", "U_R"):
        assert close(state[basis].mT @ state[basis], torch.eye(len(state[basis])).double())


def test_soap_default_update_times_follow_the_form():
    p = torch.nn.Parameter(torch.zeros(3, 4))
    rules = [SOAP([p], form=form).defaults["update_times"] for form in ("paper", "published")]
    assert rules == ["printed", "zero_based"]
    assert SOAP([p], update_times="zero_based").defaults["update_times"] == "zero_based"


def test_soap_with_unit_vectors_is_adam_without_bias_correction():
    scales = torch.zeros(4, 4, dtype=torch.float64).diagonal_scatter(torch.tensor([4.0, 3, 2, 1]).double())
    grads = [scales, *gradients(4, 4)]
    directions, state = run(SOAP, grads, betas=(0.8, 0.9, 0.999), update_interval=100, eps=1e-3)
    m, v = torch.zeros_like(scales), torch.zeros_like(scales)
    for G, D in zip(grads, directions, strict=True):
        m, v = 0.8 * m + 0.2 * G, 0.9 * v + 0.1 * G**2
        assert close(D, m / (v.sqrt() + 1e-3))
    assert close(state["v"], v)


def test_published_soap_only_initialises_at_first():
    G = gradients(4, 6)[0]
    (D,), state = run(SOAP, [G], form="published", betas=(0.9, 0.8, 0.7))
    assert D.count_nonzero() == 0 and state["m"].count_nonzero() == 0 and state["v"].count_nonzero() == 0
    assert close(state["L"], 0.3 * G @ G.mT) and close(state["R"], 0.3 * G.mT @ G)
    assert close(state["U_L"].mT @ G @ G.mT @ state["U_L"], torch.diag(torch.linalg.svdvals(G) ** 2))


def test_published_soap_steps_in_the_previous_bases():
    """Step 2, corrected with t = 1, is sign(sigma) in the bases of the first gradient."""
    grads = gradients(4, 4, steps=2)
    _, before = run(SOAP, grads[:1], form="published", update_interval=1)
    directions, after = run(SOAP, grads, form="published", update_interval=1, eps=0.0)
    sigma = before["U_L"].mT @ grads[1] @ before["U_R"]
    assert close(directions[1], before["U_L"] @ sigma.sign() @ before["U_R"].mT)
    assert not close(after["U_L"], before["U_L"], 1e-3)


@pytest.mark.parametrize("shape", [(6, 6), (5, 9), (9, 5)], ids=str)
def test_published_soap_agrees_with_pytorch_optimizer(shape):
    """It computes QR in float32 whatever the dtype, hence the tolerance; decay is off as it decays after the update."""
    library = pytest.importorskip("pytorch_optimizer")
    ours, theirs = (torch.nn.Parameter(draw(*shape, seed=50)) for _ in range(2))
    a = SOAP([ours], lr=0.01, form="published", betas=(0.95, 0.9, 0.97), update_interval=3)
    b = library.SOAP(
        [theirs], lr=0.01, betas=(0.95, 0.9), shampoo_beta=0.97, precondition_frequency=3, weight_decay=0.0
    )
    for t in range(30):
        ours.grad, theirs.grad = (draw(*shape, seed=t) for _ in range(2))
        a.step()
        b.step()
        if t == 0:  # one gradient leaves |m - n| directions of the longer side to the solver's choice
            bases = [a.state[ours][name].clone() for name in ("U_L", "U_R")]
            b.state[theirs]["Q"] = bases[::-1] if shape[0] > shape[1] else bases
    assert close(ours, theirs, 1e-6)
    assert not close(ours, draw(*shape, seed=50), 1e-2)


def test_second_moments_follow_the_columns_of_the_bases():
    v = 10 * torch.arange(3)[None, :, None] + torch.arange(4)[None, None, :]
    left, right = torch.tensor([[2, 0, 1]]), torch.tensor([[0, 3, 2, 1]])
    full, factored = {"v": v}, {"a": v[..., 0], "c": v[:, 0]}
    p = torch.nn.Parameter(torch.zeros(3, 4))
    SOAP([p]).permute(full, left, right)
    SOAPFactored([p]).permute(factored, left, right)
    assert full["v"].tolist() == [[[20, 23, 22, 21], [0, 3, 2, 1], [10, 13, 12, 11]]]
    assert factored["a"].tolist() == [[20, 0, 10]] and factored["c"].tolist() == [[0, 3, 2, 1]]


def test_factored_soap_without_averages_is_shampoo_of_power_one_half():
    grads = gradients(5, 5, steps=3)
    factored, _ = run(SOAPFactored, grads, betas=(0.0, 0.0, 0.0), update_interval=1, eps=0.0)
    shampoo, _ = run(Shampoo, grads, power=0.5, beta=0.0, eps=0.0)
    assert all(close(a, b, 1e-6) for a, b in zip(factored, shampoo, strict=True))


@pytest.mark.parametrize("form", ["paper", "published"])
def test_factored_soap_keeps_the_marginals_of_soap(form):
    grads = gradients(4, 6, steps=7)
    options = dict(form=form, update_interval=2)
    _, full = run(SOAP, grads, **options)
    _, factored = run(SOAPFactored, grads, **options)
    assert close(factored["a"], full["v"].sum(1)) and close(factored["c"], full["v"].sum(0))


# linalg ---------------------------------------------------------------------------------------------------------------


def test_bounded_changes_only_what_could_overflow():
    G = torch.stack([gradients(4, 6, dtype=torch.float32)[0] * scale for scale in (0.0, 1e-30, 1.0, 1e12, 1e30)])
    B, largest = linalg.bounded(G)
    assert torch.equal(B[:4], G[:4])
    assert torch.equal(largest.flatten(), B.abs().amax((-2, -1)))
    assert torch.isfinite((B @ B.mT) * 1e10).all()
    wild = torch.tensor([[[float("inf"), 1.0]], [[float("nan"), 1.0]]])
    assert linalg.bounded(wild)[0].isnan().flatten(1).any(1).all()


@pytest.mark.parametrize("power", [0.25, 0.5])
def test_inverse_root_of_regular_and_singular_matrices(power):
    X = draw(2, 5, 8)
    A = X @ X.mT * torch.tensor([1.0, 1e-8]).double()[:, None, None]
    inverse = torch.linalg.matrix_power(linalg.inverse_root(A, power), round(1 / power))
    assert close(inverse @ A, torch.eye(5).double().expand(2, 5, 5))
    assert torch.equal(linalg.inverse_root(torch.zeros(1, 3, 3), power), torch.eye(3)[None])
    singular = X[:, :, :2] @ X[:, :, :2].mT
    assert torch.isfinite(linalg.inverse_root(singular, power)).all()


def test_power_step_sorts_columns_by_their_rayleigh_quotients():
    V = orthogonal(4, 3)
    A = (V * torch.tensor([4.0, 3.0, 2.0, 1.0]).double()) @ V.mT
    U, order = linalg.power_step(A[None], V[None][..., [2, 0, 3, 1]])
    assert order.tolist() == [[1, 3, 0, 2]]
    assert close(U.abs(), V[None].abs())


# The eigen-solver's ladder --------------------------------------------------------------------------------------------


class Flaky:
    """torch.linalg.eigh that fails in float32, and ``failures`` times in float64."""

    def __init__(self, monkeypatch, failures):
        self.eigh, self.failures, self.calls = torch.linalg.eigh, failures, []
        monkeypatch.setattr(torch.linalg, "eigh", self)

    def __call__(self, A):
        self.calls.append(A)
        wide = A.dtype == torch.float64
        self.failures -= wide
        if not wide or self.failures >= 0 or not A.isfinite().all():
            raise torch.linalg.LinAlgError("did not converge")
        return self.eigh(A)


def covariance():
    X = draw(1, 4, 9, dtype=torch.float32)
    return X @ X.mT


@pytest.mark.parametrize("failures", [0, 1])
def test_ladder_of_the_eigen_solver(monkeypatch, failures):
    """Float64 on the CPU first, then a small jitter on the diagonal; neither changes the eigenvectors visibly."""
    A = covariance()
    expected = linalg.top_eigenvectors(A, 3)
    flaky = Flaky(monkeypatch, failures)
    U = linalg.top_eigenvectors(A, 3)
    assert U.dtype == torch.float32 and close((U * expected).sum(-2).abs(), torch.ones(1, 3), 1e-5)
    assert len(flaky.calls) == 2 + failures and flaky.calls[-1].dtype == torch.float64
    jitter = flaky.calls[-1] - flaky.calls[0].double()
    assert (jitter.diagonal(dim1=-2, dim2=-1) > 0).all() == bool(failures)
    assert jitter.abs().max() <= 1e-9


def test_ladder_ends_in_an_error(monkeypatch):
    Flaky(monkeypatch, 2)
    with pytest.raises(torch.linalg.LinAlgError, match="float64 with a jitter; lower the learning rate"):
        linalg.top_eigenvectors(covariance(), 3)


LADDER = {"eigen_adam": ("U",), "soap": ("U_L", "U_R"), "shampoo_half": ("L_root", "R_root")}


@pytest.mark.parametrize("name", LADDER)
def test_a_failing_solver_keeps_the_previous_basis_and_says_so(monkeypatch, name):
    method, options = VARIANTS[name]
    grads = gradients(4, 6, dtype=torch.float32)
    p = torch.nn.Parameter(torch.zeros(4, 6))
    optimizer = method([("layers.0.weight", p)], lr=1.0, **options)
    p.grad = grads[0]
    optimizer.step()
    before = {key: optimizer.state[p][key].clone() for key in LADDER[name]}
    with monkeypatch.context() as patch:
        Flaky(patch, 100)
        p.grad = grads[1]
        with pytest.warns(UserWarning, match=r"layers\.0\.weight, step 2: no eigen-solver.*previous"):
            optimizer.step()  # K = 2, printed: an update time
    assert all(torch.equal(optimizer.state[p][key], value) for key, value in before.items())
    assert torch.isfinite(p).all()
    for G in grads[2:4]:
        p.grad = G
        optimizer.step()
    assert not any(torch.equal(optimizer.state[p][key], value) for key, value in before.items())


@pytest.mark.parametrize("name", ["eigen_adam", "soap", "soap_published"])
def test_a_solver_that_fails_at_first_leaves_unit_vectors(monkeypatch, name):
    method, options = VARIANTS[name]
    Flaky(monkeypatch, 100)
    with pytest.warns(UserWarning, match="matrix, step 1"):
        _, state = run(method, gradients(4, 6, steps=1, dtype=torch.float32), **options)
    for key in {"U", "U_L", "U_R"} & state.keys():
        assert torch.equal(state[key], torch.eye(len(state[key])))


@pytest.mark.parametrize("interval", [1, 2])
def test_shampoo_without_a_root_takes_the_mean_eigenvalue(monkeypatch, interval):
    G = gradients(4, 6, dtype=torch.float32)[0]
    Flaky(monkeypatch, 100)
    with pytest.warns(UserWarning, match="matrix, step 1"):
        (D,), _ = run(Shampoo, [G], eps=0.0, update_interval=interval)
    assert close(D, G / (G.square().sum() ** 2 / 24) ** 0.25, 1e-5)


@pytest.mark.parametrize("name", [*LADDER, "soap_published", "shampoo", "whitening_evd"])
def test_gradients_that_are_not_finite_are_an_error(name):
    method, options = VARIANTS[name]
    bad = gradients(4, 6, steps=1, dtype=torch.float32)[0]
    bad[1, 2] = float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(torch.linalg.LinAlgError, match="not finite: the loss has diverged"):
            run(method, [bad], **options)


def test_or_previous_takes_the_first_unit_vectors_of_a_low_rank_basis():
    def fail():
        raise linalg.NoConvergenceError("no")

    previous = draw(2, 5, 3)
    with pytest.warns(UserWarning, match="a, b, step 1: no"):
        U = linalg.or_previous(fail, previous, Context(1, ("a", "b"), False))
    assert torch.equal(U, torch.eye(5, 3).double().expand(2, 5, 3))
    with pytest.warns(UserWarning, match="a, b, step 7: no"):
        assert linalg.or_previous(fail, previous, Context(7, ("a", "b"), False)) is previous


def test_of_a_stack_only_the_matrices_that_need_it_go_to_the_slow_solver(monkeypatch):
    """On a GPU hundreds of matrices are solved together."""
    X = draw(3, 4, 6).float()
    A = X @ X.mT
    original, asked = torch.linalg.eigh, []

    def eigh(M):
        asked.append((len(M), M.dtype))
        if len(M) > 1 or (torch.equal(M[0].float(), A[1]) and M.dtype == torch.float32):
            raise torch.linalg.LinAlgError("no")
        return original(M)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    values, vectors = linalg._eigh(A)
    assert asked == [(3, torch.float32), *[(1, torch.float32)] * 2, (1, torch.float64), (1, torch.float32)]
    assert torch.equal(torch.stack([*original(A[0])[1:]])[0], vectors[0])
    torch.testing.assert_close(vectors * values.unsqueeze(-2) @ vectors.mT, A)


CUSOLVER = "cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED, when calling `cusolverDnXsyevd( handle, params, jobz)`"


def failing_once(monkeypatch, module, name, error):
    """``module.name``, whose first call raises; the list of its calls' arguments."""
    original, asked = getattr(module, name), []

    def stand_in(*args):
        asked.append(args)
        if len(asked) == 1:
            raise error
        return original(*args)

    monkeypatch.setattr(module, name, stand_in)
    return asked


@pytest.mark.parametrize("error", [RuntimeError(CUSOLVER), torch.OutOfMemoryError("CUDA out of memory. Tried 1 GiB.")])
def test_what_cuda_has_no_room_for_is_solved_in_parts_or_on_the_cpu(monkeypatch, error):
    """Of cuSOLVER's complaints torch makes a LinAlgError of one kind only."""
    X = draw(2, 5, 6).float()
    A = X @ X.mT
    U = linalg.top_eigenvectors(A, 3)
    rest = linalg.complement_columns(U, torch.tensor([[0], [1]]))
    Q = linalg.thin_qr(X[..., :2])
    asked = failing_once(monkeypatch, torch.linalg, "eigh", error)
    with pytest.warns(
        UserWarning, match="failed on the GPU .*leave more memory free, for example by smaller micro-batches"
    ):
        again = linalg.top_eigenvectors(A, 3)
    assert [len(M) for (M,) in asked] == [2, 1, 1], "as a stack, then one by one"
    close_up_to_signs = ((again * U).sum(-2).abs() - 1).abs().max() < 1e-5
    assert close_up_to_signs
    for module, name, solve, expected in (
        (torch.linalg, "qr", lambda: linalg.thin_qr(X[..., :2]), Q),
        (torch, "geqrf", lambda: linalg.complement_columns(U, torch.tensor([[0], [1]])), rest),
    ):
        failing_once(monkeypatch, module, name, error)
        with pytest.warns(UserWarning, match="failed on the GPU"):
            assert torch.equal(solve(), expected)


def test_errors_that_are_no_failure_of_a_solver_are_not_caught(monkeypatch):
    failing_once(monkeypatch, torch.linalg, "eigh", RuntimeError("expected scalar type Float"))
    with pytest.raises(RuntimeError, match="expected scalar type"):
        linalg.top_eigenvectors(covariance(), 3)
    failing_once(monkeypatch, torch.linalg, "qr", RuntimeError("an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        linalg.thin_qr(draw(1, 4, 2))
