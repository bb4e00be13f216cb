"""Our optimizers, and the classes of others that we use, against other people's packages.

The packages are pinned in `requirements-oracles.txt`; a test whose package is missing is skipped. Two optimizers get
the same prescribed gradients, so that an error is neither damped nor amplified by a loss, and their weights are compared
at every step by ||W - W'|| / ||W' - W_0||. In 140 steps with an interval of 20 each basis is made seven times.

All runs but those marked so are in float64. Packages that convert to float32 on the way (``torch.float`` in their
module) get ``torch`` with float64 under that name, so that agreement is tested to rounding, not to single precision.
Nothing is stored in bfloat16 by any of them unless the parameters are bfloat16.
"""

import importlib
import importlib.util
import math
import sys
import types
from pathlib import Path

import pytest
import torch

from optimizers import Alice, Combined, quantization
from optimizers.apollo import Apollo
from optimizers.fira import Fira
from optimizers.galore import GaLore
from optimizers.lamb import LAMB
from optimizers.lars import LARS
from optimizers.muon import Muon
from optimizers.shampoo import Shampoo
from optimizers.soap import SOAP
from optimizers.sophia import Sophia
from tests.optimizers.test_oracle import make_gradients, make_weight

ROOT = Path(__file__).resolve().parents[2]
STEPS, K, LR = 140, 20, 0.01
SHAPES = {"wide": (12, 20), "tall": (20, 12), "square": (16, 16)}
TOLERANCE = 1e-10  # 140 float64 steps; an eigenvector is known to rounding over its gap, here about 1e-13
SINGLE_TOLERANCE = 1e-3  # the same in float32, whose rounding over the gap is about 1e-5

shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.mark.skipif(not (ROOT / ".venv" / "oracles").is_dir(), reason="scripts/setup.sh has not installed the packages")
def test_packages_that_were_installed_are_found():
    """Otherwise the tests below would be skipped without a word."""
    modules = [
        "galore_torch",
        "fira",
        "apollo_torch",
        "pytorch_optimizer",
        "lion_pytorch",
        "sophia_opt",
        "adam_mini",
        "timm",
        "nbformat",
        "nbclient",
    ]
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []


def problem(shape, dtype=torch.float64, steps=STEPS, size=1.0):
    """W_0 and a gradient for each step, with entries of the order of ``size``."""
    gradients = [size * torch.tensor(G, dtype=dtype) for G in make_gradients(shape, seed=3, steps=steps)]
    return torch.tensor(make_weight(shape, seed=3), dtype=dtype), gradients


def distances(ours, theirs, W, gradients, ours_step=None, theirs_step=None):
    """Relative distance of the weights after each step; ``ours`` and ``theirs`` make an optimizer from a parameter."""
    p, q = (torch.nn.Parameter(W.clone()) for _ in range(2))
    first, second = ours(p), theirs(q)
    found = []
    for t, G in enumerate(gradients, start=1):
        p.grad, q.grad = G.clone(), G.clone()
        for optimizer, step in ((first, ours_step), (second, theirs_step)):
            if step is None:
                optimizer.step()
            else:
                step(optimizer, t)
        moved = (q - W).norm().item()
        error = (p - q).norm().item()
        assert math.isfinite(error), f"not finite at step {t}"  # which the largest of several would not show
        found.append(error / moved if moved else math.inf if error else 0.0)
    return found


def distance(*args, **kwargs):
    return max(distances(*args, **kwargs))


class Torch:
    """``torch``, but for the dtypes of some names."""

    def __init__(self, **dtypes):
        self.__dict__.update(dtypes)

    def __getattr__(self, name):
        return getattr(torch, name)


DOUBLE_FOR_FLOAT = Torch(float=torch.float64, float32=torch.float64)


# GaLore, Fira, Apollo ---------------------------------------------------------------------------------------------------


@pytest.fixture
def follow_signs(monkeypatch):
    """Let a package's projector take our signs of singular vectors, which an SVD leaves free, after checking the rest.

    Moments are kept in the coordinates of the basis, so that trajectories depend on the signs at each refresh.
    """

    def patch(module_name, projector, current, tolerance=1e-9):
        module = importlib.import_module(module_name)
        cls = getattr(module, projector)
        original = cls.get_orthogonal_matrix

        def aligned(self, weights, rank, type):
            basis = original(self, weights, rank, type)
            U = current()
            cosines = ((basis.T if type == "right" else basis) * U).sum(0)
            assert (cosines.abs() - 1).abs().max() < tolerance
            return basis * (cosines.sign()[:, None] if type == "right" else cosines.sign())

        monkeypatch.setattr(cls, "get_orthogonal_matrix", aligned)
        if tolerance < 1e-6:
            monkeypatch.setattr(module, "torch", DOUBLE_FOR_FLOAT)

    return patch


class Pair:
    """Makes ours and theirs, and gives the package's projector a look at our basis."""

    def __init__(self, cls, package, options, package_options):
        self.cls, self.package, self.options, self.package_options = cls, package, options, package_options

    def ours(self, p):
        self.parameter = p
        self.optimizer = self.cls([p], lr=LR, rank=5, update_interval=K, **self.options)
        return self.optimizer

    def theirs(self, p):
        group = {"params": [p], "rank": 5, "update_proj_gap": K, "proj_type": "std"} | self.package_options
        constructor = {name: group.pop(name) for name in ("correct_bias", "disable_nl") if name in group}
        return self.package([group], lr=LR, no_deprecation_warning=True, **constructor)

    def basis(self):
        return self.optimizer.state[self.parameter]["U"]

    def distances(self, W, gradients):
        """As the function; and sets ``tolerance``.

        Published code adds 1e-8 to the last norm before it limits the growth by it, and limited norms build on each
        other. Ours adds nothing. Three times, as weights move less far than the sum of their steps.
        """
        self.tolerance = TOLERANCE

        def step(optimizer, t):
            optimizer.step()
            state = optimizer.state[self.parameter]
            if "phi" in state:
                self.tolerance += 3e-8 / state["phi"].item()

        return distances(self.ours, self.theirs, W, gradients, ours_step=step)


def galore(options=None, package_options=None):
    package = pytest.importorskip("galore_torch").GaLoreAdamW
    return Pair(GaLore, package, dict(scale=0.25) | (options or {}), dict(scale=0.25) | (package_options or {}))


def fira(options=None, package_options=None):
    package = pytest.importorskip("fira").FiraAdamW
    options = dict(scale=0.25, residual="scaled") | (options or {})
    return Pair(Fira, package, options, dict(alpha=0.25) | (package_options or {}))


def apollo(options=None, package_options=None):
    """The package multiplies by the root of what it calls scale."""
    package = pytest.importorskip("apollo_torch").APOLLOAdamW
    options = dict(scale=3.0, limiter=1.01, store_projection=True) | (options or {})
    group = dict(scale=9.0, proj="random", scale_type="channel") | (package_options or {})
    return Pair(Apollo, package, options, group)


GALORE_PROJECTOR = ("galore_torch.galore_projector", "GaLoreProjector")
FIRA_PROJECTOR = ("fira.gradient_projection", "GradientProjector")
SVD_PROJECTOR = ("apollo_torch.svd_projector", "GaLoreProjector")
LOW_RANK = {
    "galore": (galore, GALORE_PROJECTOR, {}, {}),
    "galore_uncorrected": (galore, GALORE_PROJECTOR, dict(bias_correction=False), dict(correct_bias=False)),
    "fira": (fira, FIRA_PROJECTOR, {}, {}),
    "fira_uncorrected": (fira, FIRA_PROJECTOR, dict(bias_correction=False), dict(correct_bias=False)),
    # With alpha = 1 the package's residual is the paper's.
    "fira_exact": (fira, FIRA_PROJECTOR, dict(scale=1.0, residual="exact"), dict(alpha=1.0)),
    "apollo_svd": (apollo, SVD_PROJECTOR, dict(projection="svd"), dict(proj="svd")),
    "apollo_svd_unlimited": (
        apollo,
        SVD_PROJECTOR,
        dict(projection="svd", limiter=None),
        dict(proj="svd", disable_nl=True),
    ),
}


def compare_low_rank(name, shape, follow_signs, options=None, package_options=None, dtype=torch.float64, steps=STEPS):
    """Distances at each step, and what they may be."""
    make, projector, ours, theirs = LOW_RANK[name]
    pair = make(ours | (options or {}), theirs | (package_options or {}))
    follow_signs(*projector, pair.basis, 1e-9 if dtype == torch.float64 else 1e-4)
    # sizes beside which an epsilon of 1e-8 in a quotient is nothing
    return pair.distances(*problem(shape, dtype, steps, size=1e4)), pair.tolerance


@shapes
@pytest.mark.parametrize("name", LOW_RANK)
def test_galore_fira_and_apollo_svd(name, shape, follow_signs):
    found, tolerance = compare_low_rank(name, shape, follow_signs)
    assert max(found) < tolerance < 1e-6


@pytest.mark.parametrize("name", ["galore", "fira", "apollo_svd"])
def test_galore_fira_and_apollo_svd_in_float32(name, follow_signs):
    found, _ = compare_low_rank(name, (12, 20), follow_signs, dtype=torch.float32)
    assert max(found) < SINGLE_TOLERANCE


@pytest.mark.parametrize("name", ["galore", "fira"])
def test_rows_of_a_square_matrix_are_the_packages_left_projection(name, follow_signs):
    """``square="rows"`` is this paper's reading; the packages' default for square matrices is the other side.

    (The Apollo package takes norms over the wrong side in that case, and stops.)
    """
    found, tolerance = compare_low_rank(
        name, (16, 16), follow_signs, dict(square="rows"), dict(proj_type="reverse_std")
    )
    assert max(found) < tolerance < 1e-6


@pytest.mark.parametrize("name", ["galore", "fira", "apollo_svd"])
def test_printed_update_times_part_from_the_packages_at_the_second_refresh(name, follow_signs):
    make, projector, ours, theirs = LOW_RANK[name]
    pair = make(ours | dict(update_times="printed"), theirs)
    follow_signs(*projector, pair.basis)
    found = pair.distances(*problem((12, 20), steps=K))
    assert max(found[: K - 1]) < 1e-6 and found[K - 1] > 1e-3


def test_exact_residual_is_not_what_the_fira_package_computes(follow_signs):
    found, _ = compare_low_rank("fira", (12, 20), follow_signs, dict(residual="exact"), steps=30)
    assert max(found) > 0.05


@pytest.mark.parametrize("signed", [True, False])
def test_8bit_codes_are_those_of_bitsandbytes(signed):
    """The same 256 values and block maxima. Ours takes the nearest value; theirs may miss it by a little on the CPU."""
    package = pytest.importorskip("bitsandbytes").functional
    values = package.create_dynamic_map(signed=signed)
    X = problem((48, 64), torch.float32, steps=1)[1][0] * torch.logspace(-3, 0, 48)[:, None]
    X = X if signed else X.square()
    codes, absmax = quantization.quantize(X, signed)
    theirs, statistics = package.quantize_blockwise(X, code=values, blocksize=256)
    torch.testing.assert_close(absmax, statistics.absmax, rtol=0, atol=0)
    entire = torch.arange(256, dtype=torch.uint8)
    torch.testing.assert_close(quantization.dequantize(entire, torch.ones(1), signed), values, rtol=0, atol=1e-7)
    ours = quantization.dequantize(codes, absmax, signed)
    theirs = package.dequantize_blockwise(theirs, statistics)
    assert ((X - ours).abs() <= (X - theirs).abs() + 1e-6 * absmax.max()).all()
    assert (ours - theirs).norm() < 0.01 * X.norm()


def test_galore_8bit(follow_signs, monkeypatch):
    """Nearer to the package than to its own full-precision run, so that the codes are seen to be the reason.

    The package leaves states of fewer than 4096 entries in float32; here they have just as many.
    """
    package = pytest.importorskip("galore_torch").GaLoreAdamW8bit
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)  # which it calls on the CPU as well
    options = dict(lr=LR, rank=16, update_interval=K, scale=0.25)
    pair = galore()

    def ours(p):
        pair.parameter, pair.optimizer = p, GaLore([p], state_dtype="8bit", **options)
        return pair.optimizer

    def theirs(p):
        group = dict(params=[p], rank=16, update_proj_gap=K, scale=0.25, proj_type="std")
        return package([group], lr=LR, eps=1e-6, weight_decay=0.0)

    follow_signs(*GALORE_PROJECTOR, pair.basis, 1e-4)
    W, gradients = problem((40, 256), torch.float32, steps=3 * K)
    found = distances(ours, theirs, W, gradients)
    codes = distances(
        lambda p: GaLore([p], state_dtype="8bit", **options), lambda p: GaLore([p], **options), W, gradients
    )
    assert found[-1] < 0.02 and found[-1] < 0.5 * codes[-1] and codes[-1] < 0.03


@shapes
@pytest.mark.parametrize("name", ["channel", "tensor", "unlimited"])
def test_apollo_and_apollo_mini(name, shape, monkeypatch):
    """The two draw different projections, so the package is given ours; their scales are compared below."""
    options, group = {
        "channel": (dict(), dict()),
        "tensor": (dict(rank=1, scaling="tensor", scale=math.sqrt(128)), dict(rank=1, scale_type="tensor", scale=128)),
        "unlimited": (dict(limiter=None), dict(disable_nl=True)),
    }[name]
    pair = apollo({}, group)
    pair.ours = lambda p: start(p, {"rank": 5} | pair.options | options)

    def start(p, options):
        pair.parameter, pair.optimizer = p, Apollo([p], lr=LR, update_interval=K, **options)
        return pair.optimizer

    drawn = []

    def ours(self, weights, rank, type, seed):
        U = pair.basis()
        drawn.append(U.clone())
        assert U.shape == (min(weights.shape), rank) and (type == "right") == (weights.shape[0] >= weights.shape[1])
        return U.T.clone() if type == "right" else U.clone()

    module = importlib.import_module("apollo_torch.random_projector")
    monkeypatch.setattr(module.GradientProjector, "get_orthogonal_matrix", ours)
    found = pair.distances(*problem(shape, size=1e4))
    assert max(found) < pair.tolerance < 1e-5
    assert len(drawn) == math.ceil(STEPS / K) and not torch.equal(drawn[0], drawn[1])


def test_random_projections_of_apollo_have_the_packages_distribution():
    module = pytest.importorskip("apollo_torch.random_projector")
    theirs = module.GradientProjector(16).get_orthogonal_matrix(torch.zeros(200, 300), 16, "left", seed=1)
    p = torch.nn.Parameter(torch.zeros(200, 300))
    p.grad = torch.ones_like(p)
    ours = Apollo([p], rank=16, store_projection=True)
    ours.step()
    U = ours.state[p]["U"]
    assert U.shape == theirs.shape
    for X in (U, theirs):  # 3200 entries of variance 1/16: the mean of their squares has a relative error of 0.025
        assert X.square().mean().item() == pytest.approx(1 / 16, rel=0.125)
        assert abs(X.mean().item()) < 5 / math.sqrt(16 * 3200)


# Muon, SOAP, Shampoo ----------------------------------------------------------------------------------------------------

MUON = {
    "default": {},
    "no_nesterov": dict(nesterov=False),
    "match_rms_adamw": dict(adjust_lr_fn="match_rms_adamw"),
    "options": dict(momentum=0.8, ns_steps=3),
}


def muon_distance(shape, options, dtype, ns_dtype):
    weight_decay = dict(weight_decay=0.1)
    return distance(
        lambda p: Muon([p], lr=LR, ns_dtype=ns_dtype, **weight_decay, **options),
        lambda p: torch.optim.Muon([p], lr=LR, **weight_decay, **options),
        *problem(shape, dtype),
    )


@shapes
@pytest.mark.parametrize("name", MUON)
def test_muon(name, shape, monkeypatch):
    """With torch's cast to bfloat16 taken out of its iteration, everything agrees to rounding."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    # The same in torch 2.15, which writes G.to(dtype=torch.bfloat16, copy=True).
    monkeypatch.setattr(importlib.import_module("torch.optim._muon"), "torch", Torch(bfloat16=torch.float64))
    assert muon_distance(shape, MUON[name], torch.float64, "float32") < TOLERANCE


@shapes
def test_muon_in_bfloat16(shape):
    """As installed. Five iterations in bfloat16 leave each entry an error of the order of 2^-8; over the steps they average."""
    assert muon_distance(shape, {}, torch.float32, "bfloat16") < 2**-8


@shapes
@pytest.mark.parametrize("shampoo_beta", [0.95, 0.8])
def test_soap(shape, shampoo_beta, monkeypatch):
    """``form="published"``. Only its first basis of a Gram matrix that has no full rank is free: there we give ours."""
    module = pytest.importorskip("pytorch_optimizer.optimizer.soap")
    monkeypatch.setattr(module, "torch", DOUBLE_FOR_FLOAT)
    made = {}
    original = module.SOAP.get_orthogonal_matrix

    def first_bases(grams):
        state = made["ours"].state[made["parameter"]]
        by_size = {state[name].shape[0]: state[name] for name in ("U_L", "U_R")}
        bases = [by_size[len(gram)].clone() for gram in grams]
        for gram, U in zip(grams, bases, strict=True):
            D = U.T @ gram @ U
            assert (D - D.diagonal().diag()).abs().max() < 1e-12 * D.max() and (
                D.diagonal().diff() < 1e-12 * D.max()
            ).all()
        return bases

    square = shape[0] == shape[1]
    monkeypatch.setattr(module.SOAP, "get_orthogonal_matrix", staticmethod(original if square else first_bases))
    options = dict(betas=(0.9, 0.95, shampoo_beta), form="published", update_interval=K, eps=1e-8)

    def ours(p):
        made.update(ours=SOAP([p], lr=LR, **options), parameter=p)
        return made["ours"]

    def theirs(p):
        options = dict(betas=(0.9, 0.95), shampoo_beta=shampoo_beta, precondition_frequency=K, weight_decay=0.0)
        return module.SOAP([p], lr=LR, eps=1e-8, **options)

    assert distance(ours, theirs, *problem(shape)) < TOLERANCE


@shapes
def test_shampoo(shape):
    """Exponent -1/4, sums from eps I, no grafting, roots at every step (at intervals the package starts with a zero root)."""
    package = pytest.importorskip("pytorch_optimizer").Shampoo
    found = distance(
        lambda p: Shampoo([p], lr=LR, eps=1e-4),
        lambda p: package([p], lr=LR, matrix_eps=1e-4, preconditioning_compute_steps=1),
        *problem(shape),
    )
    assert found < TOLERANCE


# LARS, LAMB -------------------------------------------------------------------------------------------------------------


def timm_optim(name):
    """timm.optim.<name> alone: timm itself imports torchvision, which optimizers do not need."""
    found = importlib.util.find_spec("timm")
    if found is None:
        pytest.skip("timm is not installed")
    package = types.ModuleType("timm_optim_alone")
    package.__path__ = [f"{found.submodule_search_locations[0]}/optim"]
    sys.modules.setdefault(package.__name__, package)
    return importlib.import_module(f"{package.__name__}.{name}")


@shapes
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_lars(shape, momentum):
    """timm, as the LARS paper, normalises the gradient and accumulates after; B.10 of the paper normalises the average.

    So its class without momentum is given the average as the gradient.
    """
    package = timm_optim("lars").Lars
    W, gradients = problem(shape)
    average = torch.zeros_like(W)

    def step_on_average(optimizer, t):
        average.lerp_(gradients[t - 1], 1 - momentum)
        optimizer.param_groups[0]["params"][0].grad = average.clone()
        optimizer.step()

    found = distance(
        lambda p: LARS([p], lr=LR, momentum=momentum),
        lambda p: package([p], lr=LR, momentum=0.0, trust_coeff=1.0, eps=0.0, always_adapt=True),
        W,
        gradients,
        theirs_step=step_on_average,
    )
    assert found < TOLERANCE


@shapes
@pytest.mark.parametrize("bias_correction", [True, False])
def test_lamb(shape, bias_correction):
    """timm's without its clipping of the global norm, and with the trust ratio that it leaves out at no weight decay."""
    package = timm_optim("lamb").Lamb
    options = dict(lr=LR, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.0, bias_correction=bias_correction)
    found = distance(
        lambda p: LAMB([p], **options),
        lambda p: package([p], max_grad_norm=None, always_adapt=True, **options),
        *problem(shape),
    )
    assert found < TOLERANCE


# Sophia -----------------------------------------------------------------------------------------------------------------


def sophia_estimates(shape, negative):
    rng = torch.Generator().manual_seed(8)
    estimates = {t: torch.randn(shape, generator=rng, dtype=torch.float64) for t in range(1, STEPS + 1, 10)}
    return estimates if negative else {t: X.abs() for t, X in estimates.items()}


@shapes
def test_sophia_h(shape):
    """The package clips m / max(h, eps) at p: with gamma in the estimate and p = 1 that is the paper's line 13."""
    package = pytest.importorskip("pytorch_optimizer").SophiaH
    gamma, estimates = 0.05, sophia_estimates(shape, negative=True)

    def ours(optimizer, t):
        if t in estimates:
            optimizer.update_estimate({optimizer.param_groups[0]["params"][0]: estimates[t]})
        optimizer.step()

    found = distance(
        lambda p: Sophia([p], lr=LR, gamma=gamma, weight_decay=0.1),
        lambda p: package([p], lr=LR, betas=(0.96, 0.99), p=1.0, eps=1e-12, weight_decay=0.1, update_period=10**9),
        *problem(shape),
        ours_step=ours,
        theirs_step=lambda optimizer, t: optimizer.step(hessian=[gamma * estimates[t]] if t in estimates else None),
    )
    # Where h passes through 0, a rounding of m / h beside the clipping is as large as any; it is not here.
    assert found < TOLERANCE


@shapes
def test_sophia_g(shape):
    """Its authors' class: rho is gamma, bs is B; it squares the gradient of sampled labels itself."""
    package = pytest.importorskip("sophia_opt").SophiaG
    B, estimates = 64, sophia_estimates(shape, negative=False)

    def ours(optimizer, t):
        if t in estimates:
            optimizer.update_estimate({optimizer.param_groups[0]["params"][0]: B * estimates[t].square()})
        optimizer.step()

    def theirs(optimizer, t):
        p = optimizer.param_groups[0]["params"][0]
        G = p.grad
        if t in estimates:
            p.grad = estimates[t]
            optimizer.update_hessian()
        p.grad = G
        optimizer.step(bs=B)

    found = distance(
        lambda p: Sophia([p], lr=LR, gamma=0.05, estimator="gauss_newton_bartlett", weight_decay=0.1),
        lambda p: package([p], lr=LR, betas=(0.96, 0.99), rho=0.05, weight_decay=0.1),
        *problem(shape),
        ours_step=ours,
        theirs_step=theirs,
    )
    assert found < TOLERANCE


# The classes of others that we use --------------------------------------------------------------------------------------


@shapes
def test_lion_is_the_same_in_two_packages(shape):
    chosen, other = pytest.importorskip("pytorch_optimizer").Lion, pytest.importorskip("lion_pytorch").Lion
    options = dict(lr=LR, betas=(0.9, 0.99), weight_decay=0.1)
    assert distance(lambda p: chosen([p], **options), lambda p: other([p], **options), *problem(shape)) < TOLERANCE


def test_signum_takes_the_sign_of_the_average():
    chosen = pytest.importorskip("pytorch_optimizer").SignSGD
    W, gradients = problem((12, 20))
    p = torch.nn.Parameter(W.clone())
    optimizer = chosen([p], lr=LR, momentum=0.9, weight_decay=0.1)
    m, X = torch.zeros_like(W), W.clone()
    for G in gradients:
        p.grad = G.clone()
        optimizer.step()
        m = 0.9 * m + 0.1 * G
        X = X - LR * (m.sign() + 0.1 * X)
    torch.testing.assert_close(p.detach(), X, rtol=0, atol=1e-12)


def adafactors(eps=None):
    chosen = pytest.importorskip("transformers.optimization").Adafactor
    options = {} if eps is None else {"eps": eps}
    return (
        lambda p: chosen([p], lr=LR, relative_step=False),
        lambda p: torch.optim.Adafactor([p], lr=LR, **options),
    )


@shapes
def test_adafactor_of_transformers_is_torchs_with_the_papers_epsilon(shape):
    """As long as lr is below torch's own 1 / sqrt(t), that is for 10,000 steps."""
    assert distance(*adafactors(eps=(1e-30, 1e-3)), *problem(shape)) < TOLERANCE


def test_adafactor_of_torch_depends_on_the_scale_of_small_gradients():
    """Why torch's class is not used: its clamp at eps (1e-7 in float32) acts on gradients such as large models have."""
    W, gradients = problem((12, 20), torch.float32, steps=20)
    weights = []
    for scale in (1.0, 1e-6):
        for make in adafactors():
            p = torch.nn.Parameter(W.clone())
            optimizer = make(p)
            for G in gradients:
                p.grad = scale * G
                optimizer.step()
            weights.append(p.detach() - W)
    (chosen, torchs), (chosen_small, torchs_small) = weights[:2], weights[2:]
    assert (chosen - chosen_small).norm() < 1e-5 * chosen.norm()
    assert (torchs - torchs_small).norm() > 0.1 * torchs.norm()


def test_adam_8bit_stays_near_adam():
    """Codes have a relative error of some percent, which moments average, and so have the moves of weights: 4 % here."""
    chosen = pytest.importorskip("bitsandbytes").optim.AdamW8bit
    W, gradients = problem((64, 72), torch.float32, steps=100)
    options = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    found = distances(lambda p: chosen([p], **options), lambda p: torch.optim.AdamW([p], **options), W, gradients)
    assert 0 < found[-1] < 0.08


LLAMA = {
    "layers.0.self_attn.q_proj.weight": (16, 16),
    "layers.0.self_attn.k_proj.weight": (8, 16),
    "layers.0.self_attn.v_proj.weight": (8, 16),
    "layers.0.self_attn.o_proj.weight": (16, 16),
    "layers.0.mlp.gate_proj.weight": (24, 16),
    "layers.0.mlp.down_proj.weight": (16, 24),
    "embed_tokens.weight": (32, 16),
    "lm_head.weight": (32, 16),
}


def adam_mini_reference(name, W, gradients, lr, beta1, beta2, eps):
    """The method's paper: Adam, but v averages the squares over a head (query, key), else over an output row or token."""
    rows = 4 if "q_proj" in name or "k_proj" in name else 1
    m, v = torch.zeros_like(W), torch.zeros(len(W) // rows, 1, 1, dtype=W.dtype)
    for t, G in enumerate(gradients, start=1):
        m = beta1 * m + (1 - beta1) * G
        v = beta2 * v + (1 - beta2) * G.view(-1, rows, W.shape[1]).square().mean((1, 2), keepdim=True)
        root = (v / (1 - beta2**t)).sqrt().expand(-1, rows, 1).reshape(len(W), 1)
        W = W - lr * m / (1 - beta1**t) / (root + eps)
    return W


@pytest.mark.parametrize("name", LLAMA)
def test_adam_mini_has_the_published_blocks(name):
    """With grouped-query attention: 4 query heads and 2 key heads of 4 rows."""
    chosen = pytest.importorskip("adam_mini").Adam_mini
    W, gradients = problem(LLAMA[name])
    p = torch.nn.Parameter(W.clone())
    options = dict(lr=LR, betas=(0.9, 0.95), eps=1e-8)
    optimizer = chosen([(name, p)], dim=16, n_heads=4, n_kv_heads=2, verbose=False, **options)
    for G in gradients:
        p.grad = G.clone()
        optimizer.step()
    X = adam_mini_reference(name, W, gradients, LR, 0.9, 0.95, 1e-8)
    torch.testing.assert_close(p.detach(), X, rtol=0, atol=1e-12)
    blocks = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2], len(W))
    assert optimizer.state[p]["vmean"].numel() == blocks


def test_adam_mini_of_pytorch_optimizer_has_other_blocks():
    """Why that class is not used: one second moment for a whole MLP matrix, all of Adam's for embedding and output layer."""
    other = pytest.importorskip("pytorch_optimizer").AdamMini
    model = torch.nn.ModuleDict(
        {"mlp": torch.nn.Linear(16, 24, bias=False), "lm_head": torch.nn.Linear(16, 32, bias=False)}
    )
    optimizer = other(model, lr=LR, num_embeds=16, num_heads=4)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[model["mlp"].weight]["v_mean"].numel() == 1
    assert optimizer.state[model["lm_head"].weight]["v"].numel() == 32 * 16


def elementwise(name):
    """The chosen class on [(name, tensor), ...]."""
    module, _, cls = {
        "sgd": "torch.optim.SGD",
        "adafactor": "transformers.optimization.Adafactor",
        "adam_8bit": "bitsandbytes.optim.AdamW8bit",
        "adam_mini": "adam_mini.Adam_mini",
        "lion": "pytorch_optimizer.Lion",
        "signum": "pytorch_optimizer.SignSGD",
    }[name].rpartition(".")
    options = {
        "sgd": dict(momentum=0.9),
        "adafactor": dict(relative_step=False),
        "adam_mini": dict(dim=16, n_heads=4, n_kv_heads=2, verbose=False),
    }.get(name, {})
    found = getattr(pytest.importorskip(module), cls)
    return lambda named: found(named if name == "adam_mini" else [p for _, p in named], lr=LR, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["sgd", "adafactor", "adam_8bit", "adam_mini", "lion", "signum"])
def test_chosen_classes_resume_to_the_bit_within_combined(name, dtype):
    make, named_shapes = elementwise(name), {"q_proj.weight": (16, 16), "mlp.up_proj.weight": (280, 16)}
    rng = torch.Generator().manual_seed(1)

    def start(weights):
        params = [(n, torch.nn.Parameter(W.clone())) for n, W in weights.items()]
        return params, Combined(make(params))

    def train(params, optimizer, gradients):
        for G in gradients:
            for (_, p), g in zip(params, G, strict=True):
                p.grad = g.clone()
            optimizer.step()

    draw = lambda: [torch.randn(shape, generator=rng).to(dtype) for shape in named_shapes.values()]  # noqa: E731
    first, second = [draw() for _ in range(7)], [draw() for _ in range(7)]
    params, optimizer = start(dict(zip(named_shapes, draw(), strict=True)))
    train(params, optimizer, first)
    resumed_params, resumed = start({n: p.detach() for n, p in params})
    resumed.load_state_dict(optimizer.state_dict())
    train(params, optimizer, second)
    train(resumed_params, resumed, second)
    for (n, p), (_, q) in zip(params, resumed_params, strict=True):
        assert torch.equal(p, q), n
        assert torch.isfinite(p).all(), n


# The paper's own methods ------------------------------------------------------------------------------------------------


def test_alice_with_its_parts_off_is_the_galore_package(follow_signs):
    """The paper's claim that the low-rank methods are one family, against somebody else's GaLore."""
    pair = galore()
    options = dict(betas=(0.9, 0.999, 0.0), tracking=False, switching="none", compensation="none", fix_signs=False)
    options |= dict(bias_correction=True, update_times="zero_based", square="columns", eps=1e-6, scale=0.25)

    def ours(p):
        pair.parameter = p
        pair.optimizer = Alice([p], lr=LR, rank=5, leading=0, update_interval=K, **options)
        return pair.optimizer

    follow_signs(*GALORE_PROJECTOR, pair.basis)
    assert distance(ours, pair.theirs, *problem((12, 20))) < TOLERANCE
