"""The battery over every registered method, against declared properties; and the battery itself, on broken optimizers.

A registered method without an entry in DECLARED, a failure that is not declared and a declared one that no longer
happens all fail here, so that the table says what the code does.
"""

import io
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from optimizers import METHODS, battery, create
from pretraining.model import build_model

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Declared:
    """What a method is, with the values of its configuration file. ``battery.Properties`` says what the words mean.

    The defaults are what most methods are: invariant to the scale of the gradient and equivariant to transposition of
    matrices that are not square.

    Attributes:
        solver: it calls a solver of torch.linalg.
        expected_failures: check -> why the method or its library cannot pass it; that it fails is asserted.
        options: other values than the configuration's, where those suit large matrices only.
    """

    scale_degree: float | None = 0.0
    transposition: bool = True
    elementwise: bool = False
    stateless: bool = False
    differs_from_adam: bool = True
    solver: bool = False
    expected_failures: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


ONE_GROUP_EACH = "adam-mini makes a parameter group of its own for each named tensor, and takes no others later"
SQUARES = "the library squares gradients of 1e30 to infinity, and divides infinity by infinity"

DECLARED = {
    "adafactor": Declared(expected_failures={"huge": SQUARES}),
    "adam": Declared(elementwise=True, differs_from_adam=False),
    "adam_8bit": Declared(  # 8-bit codes share a scale; tensors below 4,096 entries would keep float32 states
        differs_from_adam=False, options={"min_8bit_size": 1}, expected_failures={"huge": SQUARES}
    ),
    # one second moment for each row as it is stored
    "adam_mini": Declared(transposition=False, expected_failures={"groups": ONE_GROUP_EACH}),
    "adamw": Declared(elementwise=True, differs_from_adam=False),
    "alice": Declared(solver=True),
    "alice_0": Declared(solver=True),
    "any": Declared(elementwise=True, options={"target": "torch.optim.RMSprop", "lr": 1e-3, "options": {"alpha": 0.9}}),
    "apollo": Declared(),
    "apollo_mini": Declared(),
    "apollo_svd": Declared(solver=True),
    "eigen_adam": Declared(solver=True),
    "fira": Declared(solver=True),
    "fira_plus": Declared(solver=True),
    "galore": Declared(solver=True),
    "galore_8bit": Declared(solver=True),
    "lamb": Declared(),
    "lars": Declared(),
    "lion": Declared(elementwise=True),
    "low_rank_soap": Declared(solver=True),
    "muon": Declared(transposition=False),  # its rate grows with sqrt(rows / columns) where that is above 1
    "muon_paper": Declared(),
    "normalization": Declared(stateless=True),
    "racs": Declared(),
    "racs_no_ema": Declared(),  # the limiter remembers the last norm
    "sgd": Declared(scale_degree=1.0, elementwise=True),
    "shampoo": Declared(solver=True),
    "signum": Declared(elementwise=True),
    "soap": Declared(solver=True),
    "soap_factored": Declared(solver=True),
    # the curvature is given from outside, and does not scale with these gradients
    "sophia_g": Declared(scale_degree=None, elementwise=True),
    "sophia_h": Declared(scale_degree=None, elementwise=True),
    "swan": Declared(stateless=True),
    "whitening": Declared(stateless=True),
}
SMALL = {"rank": 4, "leading": 2, "update_interval": 3}
LLAMA = {
    "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 12,
    "max_position_embeddings": 16, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "initializer_range": 0.25,
    "tie_word_embeddings": False,
}  # fmt: skip


class Matrices(nn.Module):
    """Parameters as a model that ``create`` takes; the configuration is for Adam-mini, which wants head counts."""

    config = SimpleNamespace(hidden_size=8, num_attention_heads=2)

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__()
        self.mlp = nn.ParameterList(params)


def options(name: str) -> dict[str, Any]:
    """The method's configuration, with ranks and intervals that suit matrices of 6 rows."""
    file = ROOT / "configs" / "optimizer" / f"{name}.yaml"
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    values |= {key: min(value, values[key]) for key, value in SMALL.items() if values.get(key) is not None}
    values |= {key: 0 for key, value in values.items() if value == "${seed}"}
    values |= {key: values[x[12:-1]] for key, x in values.items() if str(x).startswith("${optimizer.")}
    values |= declared(name).options
    return {key: value for key, value in values.items() if key != "name"}


def declared(name: str) -> Declared:
    return DECLARED.get(name, Declared())


def curvature(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """A made-up estimate for Sophia, so that some entries are clipped and some are not."""
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.update_estimate({p: torch.full_like(p, 100.0) for p in tensors})


def build(name: str, model: nn.Module, **more: Any) -> torch.optim.Optimizer:
    optimizer = create(name, model, verbose=False, **{**options(name), **more})
    if hasattr(optimizer, "update_estimate"):
        optimizer.register_step_pre_hook(curvature)
    return optimizer


def maker(name: str) -> battery.Make:
    def make(params: list[Any]) -> torch.optim.Optimizer:
        if not isinstance(params[0], dict):
            return build(name, Matrices(params))
        first, *rest = params
        optimizer = build(name, Matrices(first["params"]))
        (optimizer,) = getattr(optimizer, "optimizers", (optimizer,))  # a Combined takes no groups
        named = "param_names" in optimizer.param_groups[0]
        for i, group in enumerate(rest):
            added = [(f"{i}.{j}", p) if named else p for j, p in enumerate(group["params"])]
            optimizer.add_param_group({**group, "params": added})
        return optimizer

    return make


def name_of(value: Any) -> str:
    return getattr(value, "name", None) or getattr(value, "__name__", str(value))


@pytest.mark.parametrize("check", battery.CHECKS, ids=name_of)
@pytest.mark.parametrize("name", METHODS)
def test_every_method(name: str, check: battery.Check) -> None:
    verdict = battery.verdict(check, maker(name))
    if check.name == "eigen_solver" and verdict.outcome == "not applicable":
        assert not declared(name).solver, f"DECLARED says that {name} calls a solver, and it calls none"
        return
    reason = declared(name).expected_failures.get(check.name)
    if reason is None:
        assert verdict.outcome == "pass", f"{name}: {verdict}"
    else:
        assert verdict.outcome == "fail", f"{name} now passes {check.name}; remove its expected failure ({reason})"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_as_declared(name: str) -> None:
    assert name in DECLARED, f"{name} is registered in optimizers/factory.py; add what it is to DECLARED in this file"
    measured = battery.measure(maker(name))
    found = {f.name: getattr(measured, f.name) for f in fields(Declared) if hasattr(measured, f.name)}
    found["solver"] = bool(measured.solvers)
    assert len(found) == 6
    assert found == {key: getattr(DECLARED[name], key) for key in found}, f"{name}: correct the method, or DECLARED"


def test_expected_failures_name_checks() -> None:
    names = {check.name for check in battery.CHECKS}
    assert len(names) == len(battery.CHECKS)
    assert {key for entry in DECLARED.values() for key in entry.expected_failures} <= names


@pytest.mark.parametrize("name", [name for name in METHODS if declared(name).solver])
@pytest.mark.filterwarnings("ignore:.*previous basis:", "ignore:.*looks at no gradient:")
def test_every_method_outlives_a_solver_that_never_converges(name: str) -> None:
    battery.check_eigen_solver(maker(name), always=True)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_a_llama_and_resumes(name: str) -> None:
    """`transformers`' LLaMA with everything that is not a matrix on Adam, saved after 9 of 14 steps."""
    torch.manual_seed(0)
    model, other = build_model(LLAMA), build_model(LLAMA)
    optimizer = build(name, model, adam_lr=0.01)
    text = battery.tokens(LLAMA["vocab_size"])

    def advance(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        logits = model(text).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    losses = [advance(model, optimizer) for _ in range(9)]
    assert losses[-1] < losses[0] - 0.05
    assert all(not torch.equal(p, before[key]) for key, p in model.named_parameters())

    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(model.state_dict())
    resumed = build(name, other, adam_lr=0.01)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    for _ in range(5):
        advance(model, optimizer)
        advance(other, resumed)
    assert battery.same(list(model.parameters()), list(other.parameters()))


# The battery itself -----------------------------------------------------------------------------------------------


class Sound(torch.optim.Optimizer):
    """Momentum divided by its largest entry. Passes every check; the classes below break one thing each."""

    def __init__(self, params: Any, lr: float = 0.01, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        self.move(p, p.grad.float(), group)
        return loss

    def move(self, p: Tensor, G: Tensor, group: dict[str, Any]) -> None:
        state = self.state_of(p)
        if not state:
            state["m"] = torch.zeros_like(p)
        state["m"].lerp_(G.to(p.dtype), 0.1)
        p.sub_(group["lr"] * (self.update(state["m"].float(), state) + group["weight_decay"] * p))

    def state_of(self, p: Tensor) -> dict[str, Any]:
        return self.state[p]

    def update(self, m: Tensor, state: dict[str, Any]) -> Tensor:
        return m / m.abs().max().clamp_min(1e-38)


class Ascends(Sound):
    def update(self, m, state):
        return -super().update(m, state)


class TakesTransposesForTheMatrix(Sound):
    def update(self, m, state):
        return super().update(m.mT.reshape(m.shape), state)


class LeavesLargeMatricesAlone(Sound):
    def update(self, m, state):
        return super().update(m, state) * (m.numel() < 100)


class WrongInBfloat16(Sound):
    def update(self, m, state):
        m = m.flip(0) if state["m"].dtype == torch.bfloat16 else m
        return super().update(m, state)


class ReplacesParameters(Sound):
    def move(self, p, G, group):
        super().move(p, G, group)
        p.data = p.data.float()


class TakesNoneForZero(Sound):
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        return super().step(closure)


class KeepsStateToItself(Sound):
    def state_of(self, p):
        self.hidden = getattr(self, "hidden", {})
        return self.hidden.setdefault(p, {})


class KeepsObjects(Sound):
    def update(self, m, state):
        state["shape"] = SimpleNamespace(shape=m.shape)
        return super().update(m, state)


class ReadsTheDefaultRate(Sound):
    def move(self, p, G, group):
        super().move(p, G, self.defaults)


class IgnoresWeightDecay(Sound):
    def move(self, p, G, group):
        super().move(p, G, {**group, "weight_decay": 0.0})


class DrawsGlobally(Sound):
    def update(self, m, state):
        return super().update(m + 0.01 * torch.randn_like(m), state)


class ForgetsTheLoss(Sound):
    def step(self, closure=None):
        super().step(closure)


class DividesByZero(Sound):
    def update(self, m, state):
        return m / m.abs().max()


class StopsAtZero(Sound):
    def update(self, m, state):
        state["norm"] = torch.minimum(1.01 * state.get("norm", torch.tensor(1e30)), m.norm())
        return m / m.norm().clamp_min(1e-30) * state["norm"].clamp(max=1.0)


class SquaresTiny(Sound):
    def update(self, m, state):
        return m / m.square().mean().sqrt() if m.any() else m


class SquaresHuge(Sound):
    def update(self, m, state):
        return m.square() / m.where(m != 0, 1.0)


class InvertsTheCovariance(Sound):
    def update(self, m, state):
        largest = m.abs().max().clamp_min(1e-38)
        return (
            torch.linalg.inv((m / largest) @ (m / largest).mT) @ m if len(m) <= m.shape[1] and m.any() else m / largest
        )


class NormalizesRows(Sound):
    def update(self, m, state):
        return m / (m / m.abs().max()).norm(dim=1, keepdim=True) / m.abs().max() if m.any() else m


class TrustsTheSolver(Sound):
    def update(self, m, state):
        X = m / m.abs().max().clamp_min(1e-38)
        U = torch.linalg.eigh(X @ X.mT).eigenvectors
        return U @ (U.mT @ X)


BROKEN = [
    (Ascends, "quadratic", "does not point against its gradient"),
    (Ascends, "transformer", "loss of a transformer went from"),
    (TakesTransposesForTheMatrix, "quadratic", "6 x 12|12 x 6|8 x 8"),
    (LeavesLargeMatricesAlone, "transformer", "loss of a transformer went from"),
    (WrongInBfloat16, "dtypes", "point elsewhere"),
    (ReplacesParameters, "dtypes", "changed their dtype"),
    (TakesNoneForZero, "none_gradients", "grad is None was changed"),
    (KeepsStateToItself, "state_dict", "differs from the uninterrupted one"),
    (KeepsObjects, "state_dict", "weights_only=True"),
    (ReadsTheDefaultRate, "groups", "three times the learning rate"),
    (IgnoresWeightDecay, "groups", "weight decay of a group has no effect"),
    (DrawsGlobally, "determinism", "global random state"),
    (ForgetsTheLoss, "closure", "does not return the loss"),
    (DividesByZero, "zero", "not finite after a zero gradient"),
    (StopsAtZero, "zero", "no longer move"),
    (SquaresTiny, "tiny", "not finite after a gradient of 1e-30"),
    (SquaresHuge, "huge", "not finite after a gradient of 1e30"),
    (InvertsTheCovariance, "rank_deficient", "LinAlgError|not finite after a gradient of rank 1"),
    (NormalizesRows, "single_row", "not finite after a gradient with a single row"),
    (TrustsTheSolver, "eigen_solver", "torch.linalg.eigh that does not converge ends the run"),
]
CHECKS = {check.name: check for check in battery.CHECKS}


def test_every_check_is_tried_on_something_broken() -> None:
    assert {name for _, name, _ in BROKEN} == set(CHECKS)


@pytest.mark.parametrize(("optimizer_class", "name", "message"), BROKEN, ids=name_of)
def test_a_broken_optimizer_is_found_out(optimizer_class: type, name: str, message: str) -> None:
    verdict = battery.verdict(CHECKS[name], optimizer_class)
    assert verdict.outcome == "fail"
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(verdict.text)


def test_a_sound_optimizer_passes() -> None:
    outcomes = {verdict.check.name: verdict.outcome for verdict in battery.run(Sound)}
    assert outcomes == {**dict.fromkeys(CHECKS, "pass"), "eigen_solver": "not applicable"}


def test_the_battery_leaves_no_trace() -> None:
    """Neither in the global random state, nor in torch.linalg after a solver that was made to fail."""
    eigh, state = torch.linalg.eigh, torch.get_rng_state()
    battery.run(TrustsTheSolver)
    battery.measure(DrawsGlobally)
    assert torch.linalg.eigh is eigh
    assert torch.equal(torch.get_rng_state(), state)


def test_properties_of_known_methods() -> None:
    descent = battery.measure(lambda params: torch.optim.SGD(params, lr=0.1))
    assert (descent.scale_degree, descent.stateless, descent.elementwise) == (1.0, True, True)
    momentum = battery.measure(lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9))
    assert not momentum.stateless and momentum.state_per_weight == 1.0
    adam = battery.measure(torch.optim.Adam)
    assert not adam.differs_from_adam and adam.scale_degree == 0.0 and adam.state_per_weight == 2.0
    rows = battery.measure(NormalizesRows)
    assert not rows.transposition and not rows.elementwise and rows.differs_from_adam
    assert battery.measure(TrustsTheSolver).solvers == ("eigh",)
    squares = battery.measure(SquaresHuge)
    assert squares.scale_degree == 1.0
    decayed = battery.measure(lambda params: torch.optim.SGD(params, lr=0.1, weight_decay=1.0))
    assert decayed.scale_degree is None  # G + W


def test_an_error_of_the_optimizer_is_a_failure_in_one_line() -> None:
    verdict = battery.verdict(CHECKS["huge"], lambda params: torch.optim.SGD(params, lr="high"))
    assert verdict.outcome == "fail" and "\n" not in str(verdict)


# The document -----------------------------------------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    """The code blocks of docs/add_your_optimizer.md, without the indentation of lists."""
    text = (ROOT / "docs" / "add_your_optimizer.md").read_text(encoding="utf-8")
    return [textwrap.dedent(block) for block in re.findall(rf"^ *```{language}\n(.*?)^ *```$", text, re.S | re.M)]


def test_the_documents_example_runs_and_passes() -> None:
    """Its last lines run the battery and assert that nothing fails."""
    namespace: dict[str, Any] = {}
    for block in blocks("python"):
        exec(compile(block, "add_your_optimizer.md", "exec"), namespace)
    assert namespace["verdict"].check is battery.CHECKS[-1] and namespace["verdict"].outcome == "pass"


def test_the_documents_files_fit_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    namespace: dict[str, Any] = {}
    exec(blocks("python")[0], namespace)
    monkeypatch.setitem(METHODS, "eigen_sign", (namespace["EigenSign"], {}))
    _, config, recipe = map(yaml.safe_load, blocks("yaml"))  # the first is the plan of a sweep
    reference = yaml.safe_load((ROOT / "configs" / "recipe" / "racs-llama_tiny.yaml").read_text(encoding="utf-8"))
    assert recipe["recipe"] == f"{config['name']}-llama_tiny"
    assert recipe["optimizer"].keys() <= config.keys() and recipe["trainer"].keys() == reference["trainer"].keys()
    optimizer = create(**config, model=build_model(LLAMA), verbose=False)
    assert all(config[key] == value for key, value in optimizer.param_groups[0].items() if key in config)


def test_the_document_lists_every_check() -> None:
    text = (ROOT / "docs" / "add_your_optimizer.md").read_text(encoding="utf-8")
    table = "\n".join(line for line in text.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`(\w+)`", table)) >= set(CHECKS)
