"""Layer-wise updates: the ordinary path's numbers, few gradients at a time, and nothing silently wrong."""

import gc
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile

from data.errors import UserError
from optimizers import METHODS, create
from pretraining.config import CONFIGS, compose, validate
from pretraining.layerwise import LayerWise
from pretraining.model import build_model
from pretraining.schedule import rate_factor, set_rates
from pretraining.trainer import NonFiniteLoss, Trainer, make_plan, train

K = 3  # update_interval
REFUSED = ("any", "sophia_g", "sophia_h")


# Every method, without a trainer --------------------------------------------------------------------------------------


def small_model(dtype=torch.float32, **shape):
    numbers = compose(["model=llama_tiny", "optimizer=adam"]).model
    # 64 x 64: the least that adam_8bit keeps in 8 bits
    numbers.update({"hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 1, "vocab_size": 96, **shape})
    torch.manual_seed(0)
    return build_model(numbers, dtype=dtype)


def small_optimizer(name, model):
    file = (CONFIGS / "optimizer" / f"{name}.yaml").read_text()
    small = {"rank": 1 if name == "apollo_mini" else 8, "leading": 3, "update_interval": K}
    options = {key: value for key, value in small.items() if f"\n{key}:" in file}
    return create(name, model, verbose=False, **options)


def step(model, optimizer, hooks, ids):
    """One of either kind; returns loss and norm."""
    if hooks:
        hooks.begin()
    loss = model(ids, labels=ids).loss
    loss.backward()
    if hooks:
        return loss.item(), hooks.norm().item()
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in model.parameters()]
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), torch.linalg.vector_norm(torch.stack(norms)).item()


def trained(name, layerwise, dtype=torch.float32, **shape):
    """Everything that 2 K + 1 steps leave behind."""
    model = small_model(dtype, **shape)
    optimizer = small_optimizer(name, model)
    hooks = LayerWise(model, optimizer, torch.device("cpu")) if layerwise else None
    draws = torch.Generator().manual_seed(1)
    figures = []
    for k in range(2 * K + 1):
        set_rates(optimizer, rate_factor(k, 2 * K + 1, 0.3))
        figures += step(model, optimizer, hooks, torch.randint(96, (2, 8), generator=draws))
    params = list(model.parameters())
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return {"figures": figures, "weights": params, "states": [optimizer.state[p] for p in params], "groups": groups}


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize("name", [name for name in METHODS if name not in REFUSED])
def test_every_method_is_equal_to_its_ordinary_path(name):
    """Also what libraries keep in their groups: some count steps there."""
    ordinary, layerwise = (trained(name, choice) for choice in (False, True))
    for key in ordinary:
        assert equal(ordinary[key], layerwise[key]), key


@pytest.mark.parametrize("name", ["alice", "racs", "adam"])
def test_equal_in_bf16_with_a_shared_embedding(name):
    """Of a shared weight there is one gradient, the sum of both uses, and so one update."""
    shape = {"dtype": torch.bfloat16, "tie_word_embeddings": True}
    ordinary, layerwise = (trained(name, choice, **shape) for choice in (False, True))
    assert len(ordinary["weights"]) == len(list(small_model().parameters())) - 1
    assert equal(ordinary, layerwise)


def test_a_second_backward_pass_is_noticed():
    model = small_model()
    hooks = LayerWise(model, optimizer := small_optimizer("racs", model), torch.device("cpu"))
    ids = torch.zeros(1, 4, dtype=torch.long)
    step(model, optimizer, hooks, ids)
    with pytest.raises(RuntimeError, match="call begin before each backward pass"):
        model(ids, labels=ids).loss.backward()


# Memory ---------------------------------------------------------------------------------------------------------------


def peak_bytes(function):
    """The most that was allocated at a time while ``function`` ran, by torch's memory profiler."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("name", ["adam", "racs"])
def test_few_gradients_live_at_a_time(name):
    """Twelve layers, four tokens: next to gradients and the copies of an update everything else is small."""
    peaks = {}
    for layerwise in (False, True):
        model = small_model(hidden_size=128, intermediate_size=128, num_hidden_layers=12)
        optimizer = small_optimizer(name, model)
        hooks = LayerWise(model, optimizer, torch.device("cpu")) if layerwise else None
        ids = torch.zeros(1, 4, dtype=torch.long)
        step(model, optimizer, hooks, ids)  # makes the states
        peaks[layerwise] = peak_bytes(lambda m=model, o=optimizer, h=hooks, i=ids: step(m, o, h, i))
        assert all(p.grad is None for p in model.parameters())
    gradients = sum(p.nbytes for p in model.parameters())
    largest = max(p.nbytes for p in model.parameters())
    assert peaks[False] > gradients > 80 * largest
    assert peaks[True] < 10 * largest


# In the trainer -------------------------------------------------------------------------------------------------------

TINY = [
    "experiment=quickstart",
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "trainer.steps=8",
    "trainer.batch_size=6",
    "trainer.precision=fp32",
    "trainer.eval_every=4",
    "trainer.save_every=3",
    "trainer.keep_last=9",
    "trainer.sample_tokens=0",
    "trainer.save_model=false",
    "data.length=32",
    "data.validation_max_tokens=2000",
    "eval.ngrams=false",
    "optimizer.lr=0.02",
]
ALICE = ["optimizer=alice", "optimizer.rank=8", "optimizer.leading=3", f"optimizer.update_interval={K}"]


def config(run_dir, *more, layerwise=True):
    method = [] if any(m.startswith("optimizer=") for m in more) else ALICE
    cfg = compose([*TINY, *method, f"run_dir={run_dir}", f"trainer.layerwise={str(layerwise).lower()}", *more])
    validate(cfg)
    return cfg


def record(run_dir):
    """Every figure that is not a time."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [
        {key: line[key] for key in line if key not in ("optimizer_ms", "data_ms", "tokens_per_second")}
        for line in lines
    ]


def last_checkpoint(run_dir):
    folder = sorted((run_dir / "checkpoints").iterdir())[-1]
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return {"tensors": tensors, "numbers": json.loads((folder / "state.json").read_text())["numbers"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run by both paths, saved after 3, 6 and 8 steps: {layerwise: folder}."""
    folders = {choice: tmp_path_factory.mktemp("runs") / str(choice) for choice in (False, True)}
    for choice, folder in folders.items():
        train(config(folder, layerwise=choice))
    return folders


def test_a_run_is_the_same_to_the_bit(runs):
    """Losses, norms, rates, evaluations; weights, states, counters and random states at the end."""
    assert len(record(runs[True])) == 8 + 2
    assert record(runs[True]) == record(runs[False])
    assert equal(last_checkpoint(runs[True]), last_checkpoint(runs[False]))
    assert all(line["grad_norm"] > 0 for line in record(runs[True]) if line["kind"] == "train")


@pytest.mark.parametrize(("before", "after"), [(True, True), (True, False), (False, True)])
def test_resuming_is_the_same_to_the_bit(runs, tmp_path, before, after):
    """Also from one path to the other. Step 6, the next to be saved, is an update time."""
    start = f"trainer.resume={runs[before]}/checkpoints/step-0000003"
    train(config(tmp_path / "run", start, layerwise=after))
    assert record(tmp_path / "run") == [line for line in record(runs[False]) if line["step"] > 3]
    assert equal(last_checkpoint(tmp_path / "run"), last_checkpoint(runs[False]))


def test_the_time_of_the_updates_is_reported(runs):
    lines = map(json.loads, (runs[True] / "metrics.jsonl").read_text().splitlines())
    assert all(line["optimizer_ms"] > 0 for line in lines if line["kind"] == "train")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ["trainer.micro_batch_size=4"],
            r"trainer.micro_batch_size=4 means 4 of the 6 rows .* set .*_batch_size=6, or",
        ),
        (["trainer.batch_size=200"], r"micro_batch_size=auto means 128 of the 200 rows"),
        (["trainer.grad_clip=1.0"], "set trainer.grad_clip=null"),
        (["trainer.on_nonfinite=skip"], "set trainer.on_nonfinite=stop"),
        (["optimizer=sophia_g"], "optimizer=sophia_g needs estimates of curvature"),
        (["optimizer=sophia_h"], "optimizer=sophia_h needs estimates of curvature"),
        (["optimizer=any", "optimizer.target=torch.optim.SGD"], "choose a method that has a name"),
    ],
)
def test_what_needs_the_whole_gradient_is_refused(tmp_path, more, said):
    make_plan(config(tmp_path / "run", *more, layerwise=False))
    with pytest.raises(UserError, match="trainer.layerwise=true updates inside the backward pass: .*" + said):
        make_plan(config(tmp_path / "run", *more))


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="it works in one process only"):
        make_plan(config(tmp_path / "run"))


def test_the_plan_counts_the_largest_gradient_alone(tmp_path):
    layerwise, ordinary = (make_plan(config(tmp_path, layerwise=choice)).text for choice in (True, False))
    assert "gradients 0.1 MiB" in layerwise and "weights 0.3 MiB, gradients 0.3 MiB" in ordinary


# Divergence -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bad", "lag"), [(2, 0), (2, 1), (K, 1)])
def test_a_gradient_that_is_not_finite_stops_the_run(runs, tmp_path, bad, lag):
    """Weights are lost, as on a GPU (lag 1), but no checkpoint has them. Step K refreshes bases."""
    cfg = config(tmp_path / "run", "trainer.save_every=1")
    trainer = Trainer(cfg, make_plan(cfg))
    trainer.lag = lag
    poisoned = trainer.model.model.layers[0].mlp.up_proj.weight
    poisoned.register_hook(lambda gradient: gradient * math.nan if trainer.done + 1 == bad else gradient)
    with pytest.raises(
        NonFiniteLoss, match=f"gradient norm is not finite at step {bad} .* record is step {bad - 1}"
    ) as e:
        trainer.run()
    assert e.value.exit_code == 3
    train(config(tmp_path / "run", "trainer.save_every=1"))
    assert record(tmp_path / "run") == record(runs[True])


def test_a_loss_that_is_not_finite_reaches_no_weight_on_a_cpu(tmp_path):
    cfg = config(tmp_path / "run")
    trainer = Trainer(cfg, make_plan(cfg))
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.wrapped.register_forward_hook(lambda module, inputs, loss: loss * math.nan)
    with pytest.raises(NonFiniteLoss, match="the loss is not finite at step 1 "):
        trainer.run()
    assert equal(before, list(trainer.model.parameters()))
    assert not trainer.optimizer.state


def test_a_decomposition_that_fails_stops_the_run(tmp_path, monkeypatch):
    """With finite numbers; the rest of the backward pass is not done, and nothing is saved."""
    cfg = config(tmp_path / "run", "trainer.save_every=1")
    trainer = Trainer(cfg, make_plan(cfg))
    refresh = trainer.optimizer.refresh

    def fails(G, state, group, ctx):
        if ctx.step == K and "layers.1.mlp" in ctx.names[0]:
            raise torch.linalg.LinAlgError("did not converge")
        refresh(G, state, group, ctx)

    monkeypatch.setattr(trainer.optimizer, "refresh", fails)
    with pytest.raises(NonFiniteLoss, match=f"no eigenvectors at step {K}: did not converge"):
        trainer.run()
    assert trainer.model.model.layers[0].mlp.up_proj.weight.grad is None
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step-0000001", "step-0000002"]
