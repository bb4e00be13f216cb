"""Every optimizer's update is the square-root natural-gradient step of its structure (sections 3 to 5, App. C).

Each runs in float64 without its first moment, with E[.] as its own averages realise it: one sample, sums over the
samples, or a state of which the last step makes their mean. The structure is fitted to the same samples.
"""

import math

import pytest
import torch

import fisher
from optimizers import RACS, Alice, Context, create
from optimizers.eigen_adam import EigenAdam
from optimizers.factored import Factored
from optimizers.galore import GaLore
from optimizers.lars import LARS
from optimizers.muon import Muon
from optimizers.normalization import Normalization
from optimizers.shampoo import Shampoo
from optimizers.soap import SOAP
from optimizers.swan import SWAN
from optimizers.whitening import Whitening

M, N, COUNT, R = 4, 6, 5, 2
KEEP = (COUNT - 1) / COUNT  # an average with this beta of the mean of the others, and the last sample, is the mean


def samples(seed=0, count=COUNT):
    """Gradients [count, M, N] with rows and columns of different sizes and a common part."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return torch.exp(0.5 * normal(M, 1)) * (normal(count, M, N) + 0.5 * normal(M, N)) * torch.exp(0.5 * normal(N))


def updates(optimizer_class, gradients, tall=False, **options):
    """The update direction after the last of ``gradients``; with ``tall`` of the transposed matrix."""
    turn = (lambda X: X.mT) if tall else (lambda X: X)
    W = torch.nn.Parameter(torch.zeros_like(turn(gradients[0])))
    scale = {"scale": 1.0} if optimizer_class in (RACS, Alice, GaLore) else {}
    optimizer = optimizer_class([W], lr=1.0, **scale, **options)
    for G in gradients:
        with torch.no_grad():
            W.zero_()
        W.grad = turn(G).clone()
        optimizer.step()
    return turn(-W.detach())


def from_state(optimizer_class, G, state, **options):
    """The direction for the last of ``G`` from a given state, at a step that refreshes nothing."""
    W = torch.nn.Parameter(torch.zeros(M, N, dtype=torch.float64))
    optimizer = optimizer_class([W], lr=1.0, **options)
    group = optimizer.param_groups[0]
    full = {name: x.double() for name, x in optimizer.init_state((M, N), group).items()} | state
    batched = {name: x.clone()[None] for name, x in full.items()}
    update = optimizer.direction(G[-1:], batched, group, Context(step=2, names=("W",), transposed=False))
    return (update.dense() if isinstance(update, Factored) else update)[0]


def close(update, structure, G, tolerance=1e-7):
    torch.testing.assert_close(update, structure.inverse_sqrt(G), rtol=tolerance, atol=tolerance)


# One sample -----------------------------------------------------------------------------------------------------------

ONE_SAMPLE = {
    "normalization": (Normalization, {}, fisher.Normalization.fit, 1.0),
    "whitening": (Whitening, {"solver": "evd"}, fisher.Whitening.fit, 1.0),
    "whitening, Newton-Schulz": (Whitening, {"solver": "newton_schulz", "iterations": 40}, fisher.Whitening.fit, 1.0),
    # Muon omits sqrt(n): App. E.5
    "muon": (
        Muon,
        {"momentum": 0.0, "nesterov": False, "orthogonalization": "evd", "adjust_lr_fn": "none"},
        fisher.Whitening.fit,
        1 / math.sqrt(N),
    ),
    # Lars is the normalisation of the whole matrix as one column, of which one sample is known: App. E.5
    "lars": (LARS, {"momentum": 0.0}, fisher.Scalar.fit, 1 / math.sqrt(M * N)),
    "racs": (RACS, {"beta": 0.0, "limiter": None, "iterations": 200}, fisher.TwoSidedScaling.fit, 1.0),
    "eigen_adam": (EigenAdam, {"betas": (0, 0, 0), "eps": 1e-30}, fisher.EigenAdam.fit, 1.0),
    "soap": (SOAP, {"form": "paper", "betas": (0, 0, 0), "eps": 1e-30}, fisher.SOAP.fit, None),
    "galore": (GaLore, {"betas": (0, 0), "rank": R, "eps": 1e-30}, lambda G: fisher.GaLore.fit(G, R), 1.0),
    "alice": (
        Alice,
        {
            "betas": (0, 0, 0),
            "rank": R,
            "leading": R,
            "switching": "none",
            "compensation_scale": 1.0,
            "limiter": None,
            "eps": 1e-30,
        },
        lambda G: fisher.Alice.fit(G, R),
        1.0,
    ),
}


@pytest.mark.parametrize("tall", [False, True], ids=["wide", "tall"])
@pytest.mark.parametrize("name", [name for name in ONE_SAMPLE if name != "soap"])
def test_one_sample(name, tall):
    optimizer_class, options, fit, factor = ONE_SAMPLE[name]
    G = samples(count=1)
    update = updates(optimizer_class, G, tall, **options)
    close(update / factor, fit(G), G[0])


def test_soap_with_one_sample_is_whitening():
    """U_L^T G U_R is diagonal then, and D is its square: the zeros are rounding errors, and only the rest is compared."""
    G = samples(count=1)
    structure = fisher.SOAP.fit(G)
    optimizer_class, options, _, _ = ONE_SAMPLE["soap"]
    in_bases = structure.U_L.mT @ updates(optimizer_class, G, **options) @ structure.U_R
    torch.testing.assert_close(
        in_bases.diagonal().abs(), (structure.U_L.mT @ structure.inverse_sqrt(G[0]) @ structure.U_R).diagonal().abs()
    )
    close(structure.inverse_sqrt(G[0]) * math.sqrt(N), fisher.Whitening.fit(G), G[0])


def test_swan_whitens_standardised_gradients():
    """A composition of two operators, each a square-root step (App. E.5), up to sqrt(n)."""
    G = samples(count=1)
    centred = G - G.mean(-1, keepdim=True)
    standardised = centred / centred.square().mean(-1, keepdim=True).sqrt()
    update = updates(SWAN, G, solver="evd")
    close(update * math.sqrt(N), fisher.Whitening.fit(standardised), standardised[0])


# Averages over samples ------------------------------------------------------------------------------------------------


def test_adam():
    """Its bias-corrected average is a mean with weights beta2^(t - i): App. B.1 and Proposition 1."""
    beta2, G = 0.7, samples()
    layer = torch.nn.ModuleDict({"layer": torch.nn.Linear(N, M, bias=False, dtype=torch.float64)})
    W = layer["layer"].weight
    optimizer = create("adam", layer, lr=1.0, betas=(0.0, beta2), eps=1e-30, verbose=False)
    for X in G:
        with torch.no_grad():
            W.zero_()
        W.grad = X.clone()
        optimizer.step()
    weights = beta2 ** torch.arange(COUNT - 1, -1, -1, dtype=torch.float64)
    weights = weights / weights.sum()
    weighted = (COUNT * weights).sqrt()[:, None, None] * G
    close(-W.detach(), fisher.Diagonal.fit(weighted), G[-1])


def test_shampoo():
    """Its sums lack the factors of E, 1/m and 1/n: F~^(-1/2) G = (mn)^(1/4) sqrt(N) L^(-1/4) G R^(-1/4) (App. C.1)."""
    G = samples()
    update = updates(Shampoo, G, power=0.25, eps=1e-12)
    close(update * (M * N) ** 0.25 * math.sqrt(COUNT), fisher.Shampoo.fit(G), G[-1], tolerance=1e-6)


def test_eigen_adam():
    G = samples()
    structure = fisher.EigenAdam.fit(G)
    U = structure.U_L
    v = (U.mT @ G[:-1]).square().mean(0)
    update = from_state(EigenAdam, G, {"U": U, "v": v}, betas=(0, KEEP, 0), eps=1e-30)
    close(update, structure, G[-1])


def test_soap():
    G = samples()
    structure = fisher.SOAP.fit(G)
    U_L, U_R = structure.U_L, structure.U_R
    v = (U_L.mT @ G[:-1] @ U_R).square().mean(0)
    state = {"U_L": U_L, "U_R": U_R, "v": v}
    update = from_state(SOAP, G, state, form="paper", betas=(0, KEEP, 0), eps=1e-30)
    close(update, structure, G[-1])


def test_alice():
    """Both of its averages, v and p, over the samples; alpha_c = 1 and no limiter."""
    G = samples()
    structure = fisher.Alice.fit(G, R)
    U = structure.low_rank.U_L
    sigma = U.mT @ G
    state = {
        "U": U,
        "v": sigma[:-1].square().mean(0),
        "p": (G[:-1].square().sum(1) - sigma[:-1].square().sum(1)).mean(0),
        "m": sigma[-1],  # with beta_1 as p has it, the average of this and the gradient is the gradient
    }
    options = dict(betas=(KEEP, KEEP, 0), rank=R, leading=R, compensation_scale=1.0, limiter=None, eps=1e-30)
    close(from_state(Alice, G, state, **options), structure, G[-1])


def test_galore():
    """Alice without tracking, switching and compensation; its update lies in the subspace (section 5.4)."""
    G = samples()
    structure = fisher.GaLore.fit(G, R)
    U = structure.U_L
    state = {"U": U, "v": (U.mT @ G[:-1]).square().mean(0)}
    update = from_state(GaLore, G, state, betas=(0, KEEP), rank=R, eps=1e-30, bias_correction=False)
    close(update, structure, G[-1])
    torch.testing.assert_close(U @ (U.mT @ update), update)


def test_racs_is_not_the_fit_of_its_average():
    """RACS averages s and q, not G^2: with several samples its update is near to the structure's and not the same."""
    G = samples()
    update = updates(RACS, G, beta=0.5, limiter=None, iterations=200)
    target = fisher.TwoSidedScaling.fit(G).inverse_sqrt(G[-1])
    cosine = (update * target).sum() / (update.norm() * target.norm())
    assert 0.9 < cosine < 0.9999
