"""The command, and its planner against measured bytes: what autograd keeps, and the peak of a forward and backward pass."""

import gc
import json
import shlex
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from torch.profiler import ProfilerActivity, profile

from optimizers import METHODS
from pretraining import memory
from pretraining.config import compose, validate
from pretraining.evaluation import row_losses
from pretraining.loss import PretrainingLoss, real_targets
from pretraining.model import build_model, weight_dtype
from pretraining.plan import make_plan
from scripts import memory as script

CONFIGS = Path(__file__).parents[2] / "configs"
GIB = 2**30


def shape(model: str) -> dict:
    return yaml.safe_load((CONFIGS / "model" / f"{model}.yaml").read_text())


# The tables -------------------------------------------------------------------------------------------------------


def test_the_papers_convention_gives_all_cells(capsys, tmp_path) -> None:
    file = tmp_path / "memory.json"
    assert script.main(["--convention", "paper", "--json", str(file)]) == 0
    text = capsys.readouterr().out
    assert "48 of 48" in text and "*" not in text.partition("\n")[2]
    rows = {(row["optimizer"], row["model"], row["last_layer"]): row["gib"] for row in json.loads(file.read_text())}
    assert len(rows) == len(script.OPTIMIZERS) * len(script.MODELS) * 2
    assert "candidate, the method itself trains it" in text
    for line in (
        "Apollo (7B): 15.03  15.03      0",
        "Apollo-mini (7B): 13.53  13.53      0",
        "Muon (1.3B): 5.23   5.23",
    ):
        assert line in text
    assert rows["alice", "llama_1b", "candidate"] == 4.42
    assert rows["apollo", "llama_7b", "adam"] == 15.03


def test_the_exact_convention_marks_differences(capsys) -> None:
    assert script.main(["--optimizers", "adam", "--models", "llama_350m"]) == 0
    text = capsys.readouterr().out
    assert "2.05   2.06  +0.01*" in text and "0 of 1 printed cells are equal" in text


def test_every_optimizer_can_be_asked_for(tmp_path) -> None:
    file = tmp_path / "memory.json"
    assert script.main(["--optimizers", "all", "--models", "llama_tiny", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert {row["optimizer"] for row in rows} == METHODS.keys() - {"any"}
    assert all(row.keys() == {"optimizer", "model", "last_layer", "gib"} and row["gib"] > 0.006 for row in rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optimizers", "alise"], "no optimizer of the exact convention is called 'alise'"),
        (["--optimizers", "soap", "--convention", "paper"], "choose from adam, muon"),
        (["--models", "llama_3b"], "no model is called 'llama_3b'"),
        (["--models", "llama_tiny", "--json", "no/such/folder/x.json"], "choose another file"),
        (["--gpu", "big"], "--gpu 24GB"),
        (["--gpu", "0"], "--gpu 24GB"),
        (["--gpu", "24GB", "--optimizers", "soap"], "no optimizer of the planner"),
        (["--gpu", "24GB", "--json", "x.json"], "leave --gpu out"),
        (["--gpu", "24GB", "--convention", "paper"], "leave --convention out"),
        (["--gpu", "24GB", "--precision", "fp32"], "leave --precision out, or name one --model and one --optimizer"),
        (["--gpu", "24GB", "--precision", "bf16", "--model", "llama_60m"], "leave --precision out"),
        (["--precision", "fp32"], "--precision belongs to --gpu"),
    ],
)
def test_mistakes_end_in_one_sentence(capsys, words, message) -> None:
    assert script.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


# Activations, measured ----------------------------------------------------------------------------------------------


def forward(model: torch.nn.Module, precision: str, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The trainer's logits and loss of one micro-batch."""
    with torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bf16_mixed" else nullcontext():
        logits = model(input_ids=ids).logits
        return logits, row_losses(logits, ids).sum()


def saved_bytes(model: torch.nn.Module, precision: str, ids: torch.Tensor) -> int:
    """Bytes of all storages that a forward pass keeps for the backward pass, the model's own left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        forward(model, precision, ids)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    return sum(size for place, size in storages.items() if place not in own)


@pytest.mark.parametrize("precision", memory.PRECISIONS)
@pytest.mark.parametrize(("model", "rows", "length"), [("llama_tiny", 3, 40), ("llama_60m", 1, 24)])
def test_activations_are_what_autograd_keeps(model: str, rows: int, length: int, precision: str) -> None:
    numbers = shape(model) | ({"num_hidden_layers": 3} if model == "llama_60m" else {})  # of eight equal ones: quicker
    built = build_model(numbers, dtype=weight_dtype(precision))
    ids = torch.randint(numbers["vocab_size"], (rows, length))
    targets = rows * length  # a row's last position has none, but its logits are there
    of_loss = targets * (4 * numbers["vocab_size"] + 8)  # log-probabilities in float32, and which of them counts
    expected = memory.activation_bytes(numbers, rows, length, precision) + of_loss
    assert saved_bytes(built, precision, ids) == pytest.approx(expected, rel=1e-4)


def peak_bytes(function) -> int:
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


@pytest.mark.parametrize("precision", memory.PRECISIONS)
def test_activations_and_loss_are_the_measured_peak(precision: str) -> None:
    numbers, rows, length = shape("llama_tiny"), 4, 128
    built = build_model(numbers, dtype=weight_dtype(precision))
    ids = torch.randint(numbers["vocab_size"], (rows, length))
    forward(built, precision, ids)[1].backward()  # gradients exist now, as from the second micro-batch of a step

    def micro_batch() -> None:
        logits, loss = forward(built, precision, ids)  # the trainer holds the logits as well
        loss.backward()
        del logits

    measured = peak_bytes(micro_batch)
    expected = memory.activation_bytes(numbers, rows, length, precision)
    expected += memory.loss_bytes(numbers, rows, length, precision, "full")
    assert measured == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("precision", memory.PRECISIONS)
@pytest.mark.parametrize("model", ["llama_tiny", "llama_tiny_4k"])
@pytest.mark.parametrize(("rows", "part"), [(1, 512), (4, 512), (4, 96)])
def test_activations_and_the_loss_in_parts_are_the_measured_peak(
    model: str, rows: int, part: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(memory.CHUNK_TOKENS, device, part)
    numbers, length = shape(model), 128
    loss = PretrainingLoss(build_model(numbers, dtype=weight_dtype(precision)), "chunked")
    ids = torch.randint(numbers["vocab_size"], (rows, length))
    places, targets = real_targets(ids)

    def micro_batch() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16_mixed"):
            total = loss({"input_ids": ids}, places, targets)
        total.backward()

    micro_batch()
    measured = peak_bytes(micro_batch)
    expected = memory.activation_bytes(numbers, rows, length, precision)
    expected += memory.loss_bytes(numbers, rows, length, precision)
    # A CPU widens a bfloat16 summand as a whole before it is added to a float32 sum.
    widened = 0 if precision == "fp32" else 4 * numbers["vocab_size"] * numbers["hidden_size"]
    assert measured == pytest.approx(expected + widened, rel=0.025)


@pytest.mark.parametrize("name", ["galore", "alice", "racs"])
def test_the_step_takes_no_more_than_its_copies(name: str) -> None:
    from optimizers import create

    torch.manual_seed(0)
    layer = torch.nn.Linear(256, 256, bias=False, dtype=torch.bfloat16)
    options = {} if name == "racs" else {"rank": 64} | ({"leading": 20} if name == "alice" else {})
    optimizer = create(name, torch.nn.Sequential(layer), matrices=["0"], verbose=False, **options)
    layer.weight.grad = torch.randn_like(layer.weight)
    measured = peak_bytes(optimizer.step)  # the first step refreshes the basis; it makes the states as well
    copies = (measured - sum(x.nbytes for x in optimizer.state[layer.weight].values() if torch.is_tensor(x))) / (
        4 * layer.weight.numel()
    )
    assert memory.STEP_COPIES[name] - 4 < copies <= memory.STEP_COPIES[name]


# The planner --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize(("model", "name", "size"), [("llama_60m", "alice", 4), ("llama_1b", "racs", 24)])
def test_the_largest_micro_batch_fits_and_twice_as_much_does_not(model, name, size, layerwise) -> None:
    numbers = shape(model)
    rows = memory.largest_micro_batch(size * GIB, numbers, name, layerwise=layerwise)
    small, large = (memory.footprint(numbers, name, rows=n, layerwise=layerwise).peak for n in (rows, 2 * rows))
    assert small <= memory.usable(size * GIB) < large


def test_nothing_fits_on_a_small_card_and_the_papers_batch_is_enough() -> None:
    assert memory.largest_micro_batch(2 * GIB, shape("llama_1b"), "alice") == 0
    assert memory.largest_micro_batch(1000 * GIB, shape("llama_tiny"), "adam") == memory.MOST_ROWS


def test_layerwise_keeps_one_gradient() -> None:
    numbers = shape("llama_1b")
    whole, layerwise = (memory.footprint(numbers, "alice", layerwise=choice) for choice in (False, True))
    assert layerwise.gradients == 2 * 32000 * 2048 and whole.gradients == whole.weights
    assert layerwise.peak < whole.peak


def test_the_papers_measured_footprints_lie_near() -> None:
    """Figure 4, 256 tokens; Adam, whose update takes nothing: 12.0 at 1.3B, 52.9 at 7B."""
    bars = json.loads((CONFIGS.parent / "results/paper/figures.json").read_text())["fig4_memory_footprint_GB"]
    for size, model in (("1.3B", "llama_1b"), ("7B", "llama_7b")):
        rest = bars[size]["Adam"] - memory.footprint(shape(model), "adam", loss="full").peak / GIB
        assert 0 < rest < 1.5  # a context and workspaces, perhaps; their code is not ours


def test_the_table_has_a_row_for_each_model_and_precision(capsys) -> None:
    assert script.main(["--gpu", "24GB", "--models", "llama_350m,llama_1b", "--optimizers", "adam,racs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines]
    assert ["llama_1b", "bf16", "16", "16"] in rows and ["bf16_mixed", "-", "8"] in rows
    assert any("trainer.layerwise=true" in line and "cannot accumulate" in line for line in lines)
    assert any("allowance, not measured" in line for line in lines)
    assert lines[-1] == "The parts of one of them, and the command that runs it: add --model llama_1b --optimizer racs"
    assert rows.count(["model", "precision", "Adam", "RACS"]) == 2  # the layer-wise table has its own


def test_a_precision_can_be_asked_for_of_one_cell(capsys) -> None:
    assert script.main(["--gpu", "24GB", "--model", "llama_60m", "--optimizer", "adam", "--precision", "fp32"]) == 0
    assert "llama_60m, Adam, fp32, micro-batch of 128 x 256" in capsys.readouterr().out


@pytest.mark.parametrize(("model", "name"), [("llama_1b", "alice"), ("llama_130m", "apollo"), ("llama_7b", "racs")])
def test_the_command_it_gives_can_be_run(capsys, model: str, name: str) -> None:
    assert script.main(["--gpu", "80GB", "--model", model, "--optimizer", name]) == 0
    text = capsys.readouterr().out
    words = shlex.split(text.splitlines()[-1])
    assert words[:2] == ["python", "train.py"]
    cfg = compose(words[2:])
    validate(cfg)
    rows = cfg.trainer.micro_batch_size
    assert rows == memory.largest_micro_batch(80 * GIB, shape(model), name) and cfg.eval.batch_size <= rows
    need = memory.footprint(shape(model), name, rows=rows)
    assert f"{need.peak / GIB:.2f} GiB" in text
    plan = make_plan(cfg)  # of the rank that was counted: Apollo's recipe at 130M has another
    assert plan.checkpoint_bytes == need.weights + need.states


@pytest.mark.parametrize("name", ["racs", "galore"])  # with a recipe and without
def test_what_fits_only_layer_by_layer_can_be_run_so(capsys, name: str) -> None:
    assert script.main(["--gpu", "24GB", "--model", "llama_7b", "--optimizer", name]) == 0
    *_, said, words = capsys.readouterr().out.splitlines()
    rows = memory.largest_micro_batch(24 * GIB, shape("llama_7b"), name, layerwise=True)
    assert said == f"Not one row fits. With trainer.layerwise=true as the whole batch of a step: {rows}."
    cfg = compose(shlex.split(words)[2:])
    validate(cfg)
    make_plan(cfg)
    t = cfg.trainer
    assert t.layerwise and t.batch_size == t.micro_batch_size == rows


def test_a_pipe_that_is_closed_early_is_no_error() -> None:
    """As in `python scripts/memory.py | head -1`."""
    command = [sys.executable, "scripts/memory.py"]
    with subprocess.Popen(command, cwd=CONFIGS.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_a_cell_that_does_not_fit_says_so(capsys) -> None:
    assert script.main(["--gpu", "2GB", "--model", "llama_1b", "--optimizer", "alice"]) == 0
    assert "Not one row fits. Nor with layer-wise updates." in capsys.readouterr().out
