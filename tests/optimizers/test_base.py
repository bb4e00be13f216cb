"""The contract that every optimizer of the package keeps, whatever its algorithm."""

import copy
import inspect
import io
import math

import pytest
import torch
from torch import nn

import optimizers
from optimizers import RACS, Alice, Combined, MatrixOptimizer, create, libraries, partition
from optimizers import base as base_module
from optimizers.memory import measured_state_bytes, state_bytes
from optimizers.muon import Muon
from optimizers.normalization import Normalization

SMALL = {"rank": 4, "leading": 2, "update_interval": 3}
METHODS = {
    "alice": SMALL,
    "alice_0": SMALL,
    "racs": {},
    "muon": {},
    "galore_8bit": {"rank": 4, "update_interval": 3},
    "adam": {},
    "any": {"target": "torch.optim.Muon", "lr": 0.02, "options": {"weight_decay": 0.0}},
}
OURS = ["alice", "alice_0", "racs"]
VARIANTS = [
    {"switching": switching, "compensation": compensation}
    for switching in ("none", "complement", "full_basis", "gaussian_mix", "gaussian")
    for compensation in ("none", "optimal", "fira", "fira_plus")
]


def network(dtype=torch.float32, seed=0):
    """Matrices wide, tall and square, two of a shape, and biases."""
    torch.manual_seed(seed)
    sizes = [(6, 12), (12, 8), (8, 8), (8, 8), (8, 5)]
    return nn.Sequential(*(nn.Linear(a, b) for a, b in sizes)).to(dtype)


def train(model, optimizer, steps, start=0):
    """Deterministic gradients that depend on the weights: a difference in one step grows into the next."""
    p0 = next(model.parameters())
    for k in range(start, start + steps):
        generator = torch.Generator().manual_seed(k)
        x = torch.randn(16, 6, generator=generator).to(p0.dtype)
        optimizer.zero_grad()
        model(x).tanh().square().sum().backward()
        for p in model.parameters():
            if p.grad is not None:
                p.grad += 0.1 * torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", METHODS)
def test_descends_in_every_dtype(name, dtype):
    """On a quadratic of full rank the distance to the minimum falls, with all shapes at once."""
    torch.manual_seed(0)
    shapes = [(6, 12), (12, 6), (8, 8), (8, 8)]
    targets = [torch.randn(s, dtype=dtype) for s in shapes]
    model = nn.ParameterList([nn.Parameter(torch.zeros(s, dtype=dtype)) for s in shapes])
    rates = {"racs": 0.2, "muon": 0.05, "adam": 0.05, "galore_8bit": 0.4}  # times 0.25
    options = {"lr": rates.get(name, 0.1)}
    optimizer = create(name, model, verbose=False, **{**METHODS[name], **options})

    def distance():
        return sum((p - t).float().square().sum().item() for p, t in zip(model, targets, strict=True))

    before = distance()
    for _ in range(60):
        optimizer.zero_grad()
        sum((p - t).square().sum() for p, t in zip(model, targets, strict=True)).backward()
        optimizer.step()
    assert distance() < 0.3 * before
    assert all(p.dtype == dtype for p in model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrap", ["plain", "file", "accelerate"])
@pytest.mark.parametrize("name", METHODS)
def test_state_dict_continues_bit_identically(name, dtype, wrap):
    model = network(dtype)
    optimizer = create(name, model, verbose=False, **METHODS[name])
    train(model, optimizer, 4)
    saved_model, saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 6, start=4)

    other = network(dtype, seed=1)
    resumed = create(name, other, verbose=False, **METHODS[name])
    other.load_state_dict(saved_model)
    if wrap == "file":
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
    if wrap == "accelerate":
        from accelerate import Accelerator

        resumed = Accelerator(cpu=True).prepare_optimizer(resumed)
    resumed.load_state_dict(saved)
    train(other, resumed, 6, start=4)
    assert same(weights(model), weights(other))


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(o.values()))
def test_every_variant_resumes_bit_identically(options):
    model = network(torch.bfloat16)
    optimizer = create("alice", model, verbose=False, **SMALL, **options)
    train(model, optimizer, 4)
    saved_model, saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 5, start=4)
    other = network(torch.bfloat16, seed=1)
    resumed = create("alice", other, verbose=False, **SMALL, **options)
    other.load_state_dict(saved_model)
    resumed.load_state_dict(saved)
    train(other, resumed, 5, start=4)
    assert same(weights(model), weights(other))


def test_loading_keeps_the_dtype_of_every_state():
    """torch casts states to the parameter's dtype; in bfloat16 that would round Q, p and phi."""
    model = network(torch.bfloat16)
    optimizer = create("alice", model, verbose=False, **SMALL, state_dtype="float32")
    train(model, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    for values in saved["state"].values():
        values["step"] = torch.tensor(1001.0) if isinstance(values["step"], torch.Tensor) else 1001
    optimizer.load_state_dict(saved)
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        for key, value in saved["state"][i].items():
            loaded = optimizer.state[p][key]
            assert torch.equal(torch.as_tensor(loaded), torch.as_tensor(value))
            assert getattr(loaded, "dtype", None) == getattr(value, "dtype", None)


def test_full_precision_states_in_a_bfloat16_model():
    model = network(torch.bfloat16)
    optimizer = create("alice", model, verbose=False, **SMALL)
    train(model, optimizer, 1)
    state = optimizer.state[model[0].weight]
    assert {key: value.dtype for key, value in state.items() if key != "step"} == {
        **dict.fromkeys(("U", "m", "v"), torch.bfloat16),
        **dict.fromkeys(("Q", "p", "phi"), torch.float32),
    }


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-9)])
def test_batched_and_looped_matrices_agree(name, dtype, tolerance, monkeypatch):
    """Stacks, as on GPUs, and one matrix at a time, as on CPUs, are the same algorithm."""
    start, looped, batched = network(dtype), network(dtype), network(dtype)
    a = create(name, looped, verbose=False, **METHODS[name])
    b = create(name, batched, verbose=False, **METHODS[name])
    train(looped, a, 7)
    monkeypatch.setattr(base_module, "BATCHED_DEVICES", {"cpu"})
    train(batched, b, 7)
    for w, x, y in zip(weights(start), weights(looped), weights(batched), strict=True):
        assert (x - y).norm() < tolerance * (x - w).norm()  # rounding, grown over seven steps


OWN = [
    name
    for name, (build, _) in optimizers.METHODS.items()
    if isinstance(build, type) and issubclass(build, MatrixOptimizer)
]


@pytest.mark.parametrize("name", OWN)
def test_of_a_stack_every_matrix_has_its_own_clock_scale_and_estimate(name, monkeypatch):
    """Gradients and estimates of very different sizes, one matrix without a gradient at a time."""
    build, preset = optimizers.METHODS[name]
    known = inspect.signature(build).parameters.keys() - preset.keys()
    options = {key: value for key, value in {"rank": 3, "leading": 1, "update_interval": 3}.items() if key in known}
    options |= {"ns_dtype": "float32"} if name == "muon" else {}

    def trained(devices):
        monkeypatch.setattr(base_module, "BATCHED_DEVICES", devices)
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(6, 10, generator=generator).double()) for _ in range(3)]
        optimizer = create(name, nn.ParameterList(params), verbose=False, **options)
        for t in range(7):
            for i, p in enumerate(params):
                G = 10.0**i * torch.randn(6, 10, generator=generator).double()
                p.grad = None if t == i + 1 else G
            if name.startswith("sophia"):
                optimizer.update_estimate({p: torch.full_like(p, 100.0 * (i + 1)) for i, p in enumerate(params)})
            optimizer.step()
        return [p.detach() for p in params]

    for alone, stacked in zip(trained(set()), trained({"cpu"}), strict=True):
        assert (alone - stacked).norm() <= 1e-6 * alone.norm()


def test_chunks_change_nothing(monkeypatch):
    whole, parts = network(torch.float64), network(torch.float64)
    monkeypatch.setattr(base_module, "BATCHED_DEVICES", {"cpu"})
    train(whole, create("alice", whole, verbose=False, **SMALL), 5)
    monkeypatch.setattr(base_module, "CHUNK_ENTRIES", 1)
    train(parts, create("alice", parts, verbose=False, **SMALL), 5)
    for x, y in zip(weights(whole), weights(parts), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_adam_group_is_torchs_adam():
    ours, theirs = network(), network()
    optimizer = create("racs", ours, adam_lr=0.01, adam_betas=(0.8, 0.95), adam_eps=1e-6, verbose=False)
    reference = torch.optim.Adam(theirs.parameters(), lr=0.01, betas=(0.8, 0.95), eps=1e-6, fused=True)
    for k in range(5):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(k))
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b) == name.endswith("bias"), name


@pytest.mark.parametrize("method", ["racs", "adam"])
@pytest.mark.parametrize("layout", ["turned gradient", "one number for all", "turned weight", "weight with gaps"])
def test_adam_is_right_wherever_weights_and_gradients_lie(method, layout):
    """torch's fused kernels read memory in order, whatever the strides: 0.1 and more is wrong then, without a word."""
    values = torch.randn(5, 12, generator=torch.Generator().manual_seed(9))
    memory = values.clone()
    weight = {"turned weight": memory.T.contiguous().T, "weight with gaps": memory[:, ::2]}.get(layout, memory)
    module = nn.Module()
    module.norm = nn.Parameter(weight)
    theirs = nn.Parameter(weight.detach().clone().contiguous())
    reference = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.0, foreach=False, fused=False)
    groups = [{"params": [("norm", module.norm)], "adam": True, "lr": 0.1}]
    optimizer = RACS(groups) if method == "racs" else libraries.adam(groups)
    for k in range(3):
        gradient = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(k))
        if layout == "one number for all":
            gradient = gradient[:1, :1].expand_as(gradient)
        theirs.grad = gradient.contiguous()
        module.norm.grad = gradient.T.contiguous().T if layout == "turned gradient" else gradient
        optimizer.step()
        reference.step()
    assert (module.norm - theirs).abs().max() < 1e-6
    if layout == "weight with gaps":
        assert torch.equal(memory[:, 1::2], values[:, 1::2]), "what lies between"


@pytest.mark.parametrize("method", ["racs", "adam", "copied adam"])
def test_adam_is_right_after_loading_moments_of_another_layout(method):
    def made(p):
        groups = [{"params": [("norm", p)], "adam": True, "lr": 0.1}]
        return RACS(groups) if method == "racs" else libraries.adam(groups)

    p = nn.Parameter(torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(9)))
    old = made(p)
    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    old.step()
    q = nn.Parameter(p.detach().clone().to(memory_format=torch.channels_last))
    new = made(q)
    new.load_state_dict(copy.deepcopy(old.state_dict()))
    if method == "copied adam":
        new = copy.deepcopy(new)
        q = new.param_groups[0]["params"][0]
    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    q.grad = p.grad.clone()  # of the first layout
    old.step()
    new.step()
    assert (p - q).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_what_is_said_of_adam_holds_for_all_of_it_unless_said_otherwise(name):
    for options, rest in (({}, (0.8, 0.9)), ({"adam_betas": (0.7, 0.95)}, (0.7, 0.95))):
        optimizer = create(name, network(), betas=(0.8, 0.9), eps=1e-6, verbose=False, **options)
        assert [group["betas"] for group in optimizer.param_groups] == [(0.8, 0.9), rest]
        assert [group["eps"] for group in optimizer.param_groups] == [1e-6, 1e-6]


def test_decay_in_the_adam_group_is_adamws():
    ours, theirs = (nn.Parameter(torch.ones(5)) for _ in range(2))
    optimizer = RACS([{"params": [ours], "adam": True, "lr": 0.01, "weight_decay": 0.5}])
    reference = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.5, fused=True)
    for k in range(3):
        ours.grad = torch.randn(5, generator=torch.Generator().manual_seed(k))
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("method", "lr", "decay"), [(Normalization, 0.0016, 1.0), (Muon, 0.0064, 0.25)])
def test_decay_and_update_are_rounded_once_in_bfloat16(method, lr, decay):
    """Each alone is less than half a unit in the last place below 1, 2^-9; together they are not."""
    p = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    method([p], lr=lr, weight_decay=decay).step()
    assert (p == 1 - 2**-8).all()


def test_adam_moments_narrower_than_the_parameter():
    """bfloat16 moments of a float32 model save memory; the weights keep every bit of theirs."""
    model, reference = network(), network()
    for m, dtype in ((model, "bfloat16"), (reference, None)):
        optimizer = create("racs", m, adam_lr=1e-4, adam_state_dtype=dtype, verbose=False)
        train(m, optimizer, 20)
        assert optimizer.state[m[0].bias]["exp_avg"].dtype == (torch.bfloat16 if dtype else torch.float32)
    moved = reference[0].bias - network()[0].bias
    assert (model[0].bias - reference[0].bias).norm() < 0.05 * moved.norm()


def test_loading_puts_adams_counter_beside_its_parameter():
    """A state loaded from the CPU into a model elsewhere (here: meta) ends up where the kernels want it."""
    model = network()
    optimizer = create("racs", model, verbose=False)
    train(model, optimizer, 1)
    with torch.device("meta"):
        shadow = network()
    resumed = create("racs", shadow, verbose=False)
    resumed.load_state_dict(optimizer.state_dict())
    assert {x.device.type for x in resumed.state[shadow[0].bias].values()} == {"meta"}


def test_compensation_in_bfloat16_is_of_the_size_it_has_in_float32():
    """U kept in bfloat16 is orthonormal to three digits; no column of the complement may be divided by nothing."""
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = network(dtype)
        train(model, create("alice", model, verbose=False, **SMALL), 7)
        moved[dtype] = max(
            (x - y).float().abs().max().item() for x, y in zip(weights(model), weights(network(dtype)), strict=True)
        )
    assert moved[torch.bfloat16] < 3 * moved[torch.float32]


def test_draws_ignore_the_default_device():
    p = nn.Parameter(torch.zeros(6, 9))
    optimizer = Alice([p], **SMALL)
    p.grad = torch.randn(6, 9)
    torch.set_default_device("meta")
    try:
        optimizer.step()
    finally:
        torch.set_default_device(None)
    assert torch.isfinite(p).all() and p.abs().sum() > 0


def test_adam_moments_wider_than_the_parameter():
    """In bfloat16 with beta2 = 0.999 v never falls; with float32 moments it does."""
    falls = {}
    for dtype in (None, torch.float32):
        model = network(torch.bfloat16)
        optimizer = create("racs", model, adam_state_dtype=dtype, verbose=False)
        bias = model[0].bias
        for scale in [10.0] + [0.0] * 300:
            for p in model.parameters():
                p.grad = torch.full_like(p, scale)
            optimizer.step()
            if scale:
                peak = optimizer.state[bias]["exp_avg_sq"].float().clone()
        falls[dtype] = (optimizer.state[bias]["exp_avg_sq"].float() / peak).max().item()
    assert falls[None] == 1.0
    assert falls[torch.float32] == pytest.approx(0.999**300, rel=1e-3)


def test_nothing_leaks_into_adam_groups_or_the_callers_dicts():
    model = network()
    groups = partition(model, verbose=False)
    optimizer = Alice(groups, **SMALL)
    assert set(optimizer.param_groups[1]) == {
        "params", "param_names", "adam", "lr", "betas", "eps", "weight_decay", "state_dtype"
    }  # fmt: skip
    assert optimizer.param_groups[1]["betas"] == (0.9, 0.999)
    assert optimizer.param_groups[1]["lr"] == 0.02
    assert RACS(groups, lr=0.5).param_groups[1]["lr"] == 0.5  # Alice left no mark on the groups
    assert groups[1]["lr"] is None


def test_frozen_missing_gradients_and_parameters_that_skip_steps():
    model = network()
    model[0].weight.requires_grad_(False)
    frozen = model[0].weight.clone()
    optimizer = create("alice", model, verbose=False, **SMALL)
    train(model, optimizer, 2)
    skipped = model[1].weight.clone()
    for p in model.parameters():
        p.grad = None if p is model[1].weight or not p.requires_grad else torch.randn_like(p)
    optimizer.step()
    assert torch.equal(model[1].weight, skipped)
    assert torch.equal(model[0].weight, frozen)
    assert optimizer.state[model[1].weight]["step"] == 2
    assert optimizer.state[model[2].weight]["step"] == 3
    train(model, optimizer, 2)
    assert optimizer.state[model[1].weight]["step"] == 4


def test_closure_and_its_gradient():
    model = network()
    optimizer = create("racs", model, lr=0.1, verbose=False)
    x = torch.randn(4, 6)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


@pytest.mark.parametrize("optimizer_class", [Alice, RACS])
def test_plain_tensors_groups_and_empty_groups(optimizer_class):
    options = SMALL if optimizer_class is Alice else {}
    a, b = (nn.Parameter(torch.zeros(5, 9)) for _ in range(2))
    optimizer = optimizer_class([{"params": [a]}, {"params": [b], "lr": 0.0}, {"params": []}], lr=0.1, **options)
    a.grad, b.grad = torch.randn(5, 9), torch.randn(5, 9)
    optimizer.step()
    assert a.abs().sum() > 0 and b.abs().sum() == 0
    optimizer_class([a, b], lr=0.1, **options).step()


def test_rates_may_be_tensors():
    a, b = network(), network()
    train(a, create("alice", a, lr=0.02, adam_lr=0.02, verbose=False, **SMALL), 4)
    train(b, create("alice", b, lr=torch.tensor(0.02), adam_lr=0.02, verbose=False, **SMALL), 4)
    for x, y in zip(weights(a), weights(b), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_draws_depend_on_seed_and_name_not_on_company():
    """Switching draws the same directions alone or among others, and others under another seed."""

    def final(names, seed):
        params = {n: nn.Parameter(torch.zeros(6, 10, dtype=torch.float64)) for n in names}
        optimizer = Alice(list(params.items()), rank=4, leading=1, update_interval=2, seed=seed)
        for k in range(5):
            for n, p in params.items():
                p.grad = torch.randn(
                    6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(7 * k + len(n))
                )
            optimizer.step()
        return params

    assert torch.equal(final(["a", "bb"], 0)["a"], final(["ccc", "a"], 0)["a"])
    assert not torch.equal(final(["a"], 0)["a"], final(["a"], 1)["a"])
    assert not torch.equal(final(["a", "b"], 0)["a"], final(["a", "b"], 0)["b"])


@pytest.mark.parametrize("name", OURS)
def test_checkpoint_library_leaves_no_trace(name):
    """torch.distributed.checkpoint steps an empty optimizer with zero gradients to learn its states."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    touched, untouched = network(), network()
    a = create(name, touched, verbose=False, **METHODS[name])
    b = create(name, untouched, verbose=False, **METHODS[name])
    get_optimizer_state_dict(touched, a)
    assert same(weights(touched), weights(untouched))
    train(touched, a, 5)
    train(untouched, b, 5)
    assert same(weights(touched), weights(untouched))

    resumed = network()
    c = create(name, resumed, verbose=False, **METHODS[name])
    saved = copy.deepcopy(get_optimizer_state_dict(touched, a))
    set_optimizer_state_dict(resumed, c, saved)
    resumed.load_state_dict(touched.state_dict())
    train(touched, a, 3, start=5)
    train(resumed, c, 3, start=5)
    assert same(weights(touched), weights(resumed))


def test_a_zero_gradient_with_rate_zero_later_is_a_step():
    model = network()
    optimizer = create("racs", model, verbose=False)
    train(model, optimizer, 1)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert optimizer.state[model[0].weight]["step"] == 2


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_bytes_from_shapes_are_the_allocated_ones(name, dtype):
    model = network(dtype)
    optimizer = create(name, model, verbose=False, **METHODS[name])
    with torch.device("meta"):
        shadow = network(dtype)
    expected = sum(state_bytes(create(name, shadow, verbose=False, **METHODS[name])))
    train(model, optimizer, 1)
    assert measured_state_bytes(optimizer) == expected == sum(state_bytes(optimizer))


def test_zero_and_tiny_gradients_stay_finite():
    for name in OURS:
        model = network()
        optimizer = create(name, model, verbose=False, **METHODS[name])
        for scale in (0.0, 1e-20, 1.0, 0.0, 1e10, 1e-12, 1.0):
            for p in model.parameters():
                p.grad = scale * torch.randn_like(p)
            optimizer.step()
            assert all(torch.isfinite(p).all() for p in model.parameters()), (name, scale)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda m: create("alice", m, rank=9, leading=2), r"rank 9 is larger than the smaller side of 0.weight"),
        (lambda m: create("alice", m, rank=4, leading=5), "leading = 5 .* between 0 and rank = 4"),
        (lambda m: create("alice", m, rank=4, leading=2, lr=-1.0), "lr = -1.0 is out of range"),
        (lambda m: create("racs", m, adam_lr=-1.0), "lr = -1.0 is out of range"),
        (lambda m: create("racs", m, beta=1.0), "beta = 1.0 is out of range"),
        (lambda m: create("racs", m, adam_betas=(0.9, 1.0)), "betas = .* is out of range; set it to two numbers"),
        (lambda m: create("racs", m, adam_eps=-1.0), "eps = -1.0 is out of range"),
        (lambda m: create("racs", m, adam_weight_decay=-0.1), "weight_decay = -0.1 is out of range"),
        (lambda m: RACS([torch.zeros(0, 5)]), r"parameter 0 \[0, 5\] has no entries; leave it out"),
        (
            lambda m: RACS([{"params": [nn.Parameter(torch.zeros(3, dtype=torch.cfloat))], "adam": True}]),
            "parameter 0 has dtype torch.complex64; freeze it or convert it",
        ),
        (
            lambda m: create("alice", m, rank=4, leading=2, state_dtype="float16"),
            "state_dtype = 'float16' is not possible",
        ),
        (lambda m: create("racs", m, limiter=0.5), "limiter = 0.5"),
        (lambda m: create("alice", m, switching="sometimes"), "one of none, complement"),
        (lambda m: create("alic", m), "choose one of adafactor, adam"),
        (lambda m: create("alice", m, rank=4, leading=2, state_dtype="int7"), "state_dtype = 'int7' .* or 8bit"),
        (
            lambda m: create("alice", m, rank=4, leading=2, adam_state_dtype="8bit"),
            "state_dtype = '8bit' is not possible",
        ),
        (lambda m: create("soap", m, state_dtype="8bit"), "state_dtype = '8bit' is not possible"),
        (lambda m: create("galore", m, rank=4, betas=(0.9, 0.9, 0.999)), "set it to two numbers"),
        (lambda m: create("any", m, target="torch.optim.Adam.Foo", lr=1), "torch.optim.Adam: check the spelling"),
        (lambda m: create("any", m, target="nowhere.X", lr=1), "no module nowhere: install it"),
        (lambda m: create("any", m, target="optimizers.Sophia", lr=1), "use optimizer=sophia_h"),
        (
            lambda m: create("any", m, target="torch.optim.SGD", lr=1, options={"lrs": 1}),
            "give it options that it takes: lr, momentum",
        ),
        (lambda m: create("adam_mini", m), "needs model.config.num_attention_heads"),
        (lambda m: create("adam_mini", m, adam_eps=1e-6), "leave out adam_eps"),
        (
            lambda m: create("sophia_h", m).update_estimate({m[0].weight: m[0].weight}),
            "estimate of 1.weight is missing",
        ),
        (lambda m: RACS(m.parameters()), r"parameter 1 has shape \[12\], and RACS updates matrices only"),
    ],
)
def test_mistakes_end_in_a_sentence(build, message):
    with pytest.raises(ValueError, match=message):
        build(network())


@pytest.mark.parametrize("adam", [False, True])
def test_a_sparse_gradient_is_refused_before_anything_changes(adam):
    a, b = (nn.Parameter(torch.zeros(8, 12)) for _ in range(2))
    groups = [{"params": [("a", a)]}, {"params": [("b", b)], "adam": adam}]
    optimizer = Alice(groups, rank=4, leading=2, update_interval=5)
    a.grad, b.grad = torch.ones(8, 12), torch.sparse_coo_tensor([[1], [2]], [1.0], (8, 12))
    with pytest.raises(ValueError, match="the gradient of b is sparse; make it dense"):
        optimizer.step()
    assert not optimizer.state
    b.grad = b.grad.to_dense()
    optimizer.step()
    assert optimizer.state[a]["U"].any(), "the first step with a gradient chooses the first basis"


def test_a_scaler_leaves_out_a_step_that_overflows():
    """docs/optimizers.md: with its counters, so that the next one is the one that would have been made."""
    plain, scaled = network(), network()
    ours, theirs = (create("alice", model, verbose=False, **SMALL) for model in (plain, scaled))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for k in range(5):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(k))
        for p in scaled.parameters():
            p.grad = None
        loss = scaled(x).tanh().square().sum()
        scaler.scale(loss * math.inf if k == 2 else loss).backward()
        scaler.unscale_(theirs)
        scaler.step(theirs)
        scaler.update()
        if k != 2:
            ours.zero_grad()
            plain(x).tanh().square().sum().backward()
            ours.step()
    assert scaler.get_scale() == 2 and same(weights(plain), weights(scaled))


def test_optimizers_of_single_parameters_draw_by_their_names():
    """docs/optimizers.md: the same gradient, so that only the columns of a switch tell two matrices apart."""
    torch.manual_seed(0)
    start = torch.randn(8, 12)
    gradients = [torch.randn(8, 12) for _ in range(7)]
    options = {"rank": 4, "leading": 1, "update_interval": 2, "lr": 0.1}

    def moved(*names):
        params = [nn.Parameter(start.clone()) for _ in names]
        optimizers = [Alice([(name, p)] if name else [p], **options) for name, p in zip(names, params, strict=True)]
        for gradient in gradients:
            for p, optimizer in zip(params, optimizers, strict=True):
                p.grad = gradient.clone()
                optimizer.step()
        return params

    assert torch.equal(*moved(None, None)) and not torch.equal(*moved("layers.0.q", "layers.1.q"))


def test_diverged_gradients_are_named_at_a_refresh():
    p = nn.Parameter(torch.zeros(6, 9))
    optimizer = Alice([p], **SMALL)
    p.grad = torch.full((6, 9), math.nan)
    with pytest.raises(torch.linalg.LinAlgError, match="diverged"):
        optimizer.step()


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("name", ["alice", "galore", "eigen_adam", "sophia_h"])
def test_a_step_that_fails_is_made_again_with_its_refresh(name, failing):
    """A clock that had gone on would leave the refresh out, and the matrices without a basis for K steps."""
    a, b = (nn.Parameter(torch.randn(8, 12, generator=torch.Generator().manual_seed(i))) for i in range(2))
    build, preset = optimizers.METHODS[name]
    options = {
        key: x for key, x in (SMALL | {"update_interval": 50}).items() if key in inspect.signature(build).parameters
    }
    optimizer = build([("a", a), ("b", b)], lr=0.01, **{**preset, **options})
    reference = [nn.Parameter(p.detach().clone()) for p in (a, b)]
    expected = build(list(zip("ab", reference, strict=True)), lr=0.01, **{**preset, **options})

    def gradients(params, k):
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * k + i))

    gradients((a, b), 0)
    (a, b)[failing].grad[0, 0] = math.nan
    if name == "sophia_h" and failing:
        optimizer._estimates = {a: torch.ones_like(a)}
    with pytest.raises((torch.linalg.LinAlgError, ValueError, KeyError)):  # Sophia: an estimate is missing
        optimizer.step()
    assert [optimizer.state[p]["step"] for p in (a, b)] == [failing, 0]
    optimizer._estimates = {}
    for k in range(3):
        for steps, params in ((optimizer, (a, b)), (expected, reference)):
            gradients(params, k)
            if steps.wanted_estimate():
                steps.update_estimate({p: torch.ones_like(p) for p in params})
            steps.step()
    assert torch.equal((a, b)[failing], reference[failing])


def test_a_refused_group_is_not_there():
    a, b = nn.Parameter(torch.zeros(8, 12)), nn.Parameter(torch.zeros(3, 5))
    optimizer = Alice([a], **SMALL)
    with pytest.raises(ValueError, match="rank 4 is larger"):
        optimizer.add_param_group({"params": [b]})
    with pytest.raises(TypeError):
        optimizer.add_param_group({"params": [b], "adam": True, "betas": 0.9})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [b], "rank": 2})
    a.grad, b.grad = torch.ones(8, 12), torch.ones(3, 5)
    optimizer.step()
    assert optimizer.state[b]["U"].shape == (3, 2)


def test_float16_weights_have_states_that_hold_squares():
    """Squares of 1e-4 are 0 in float16, and those of 300 infinite."""
    for size in (1e-4, 300.0):
        moved = []
        for dtype in (torch.float32, torch.float16):
            p, bias = nn.Parameter(torch.zeros(8, 12, dtype=dtype)), nn.Parameter(torch.zeros(12, dtype=dtype))
            optimizer = Alice([{"params": [p]}, {"params": [bias], "adam": True}], lr=1e-2, **SMALL)
            for k in range(4):
                for x in (p, bias):
                    x.grad = size * torch.randn(x.shape, generator=torch.Generator().manual_seed(k)).to(dtype)
                optimizer.step()
            assert optimizer.state[p]["v"].dtype == optimizer.state[bias]["exp_avg_sq"].dtype == torch.float32
            moved.append([x.detach().double() for x in (p, bias)])
        for wide, narrow in zip(*moved, strict=True):
            assert (narrow - wide).norm() < 0.05 * wide.norm()


def test_states_of_older_versions_are_widened_and_harmless():
    """float16 was an option, and p could become negative with Gaussian bases."""
    p = nn.Parameter(torch.randn(8, 12, generator=torch.Generator().manual_seed(0)))
    optimizer = Alice([p], switching="gaussian", **SMALL)
    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["state_dtype"] = "float16"
    saved["state"][0]["v"] = saved["state"][0]["v"].half()
    saved["state"][0]["p"][:3] = -1.0
    optimizer.load_state_dict(saved)
    assert optimizer.state[p]["v"].dtype == torch.float32 and optimizer.param_groups[0]["state_dtype"] == "float32"
    p.grad = 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2))
    optimizer.step()
    assert p.isfinite().all()


def test_combined_is_the_two_optimizers():
    joint, apart = network(), network()
    combined = create("any", joint, adam_lr=0.003, verbose=False, **METHODS["any"])
    assert isinstance(combined, Combined)
    matrices = [p for p in apart.parameters() if p.ndim == 2]
    others = [p for p in apart.parameters() if p.ndim != 2]
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0)
    adam = torch.optim.Adam(others, lr=0.003, fused=True)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda k: 1 / (k + 1)) for o in (combined, muon, adam)]
    with pytest.raises(ValueError, match="before combining"):
        combined.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    copied_model, copied = copy.deepcopy((joint, combined))
    for k in range(4):
        train(joint, combined, 1, start=k)
        for p in apart.parameters():
            p.grad = None
        generator = torch.Generator().manual_seed(k)
        apart(torch.randn(16, 6, generator=generator)).tanh().square().sum().backward()
        for p in apart.parameters():
            p.grad += 0.1 * torch.randn(p.shape, generator=generator)
        muon.step()
        adam.step()
        for scheduler in schedulers:
            scheduler.step()
    assert same(weights(joint), weights(apart))
    train(copied_model, copied, 1)  # a copy is an optimizer of the copied model
    assert not same(weights(copied_model), weights(network()))
