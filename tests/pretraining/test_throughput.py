"""What keeps the accelerator busy: nothing in a step waits for it, and the switches change no number that matters."""

import gc
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from data.errors import UserError
from data.loader import TrainingBatches
from pretraining import throughput
from pretraining.config import compose
from pretraining.model import build_model, compile_layers
from pretraining.plan import make_optimizer
from pretraining.trainer import Trainer, make_plan, train

from .test_trainer import ROOT, config, lines


class Reads(TorchDispatchMode):
    """Operations whose result the host has to wait for on a GPU: numbers, truth values, shapes that depend on numbers."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if masks or name in (
            "_local_scalar_dense",
            "item",
            "nonzero",
            "masked_select",
            "equal",
            "_unique2",
            "allclose",
        ):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_steps_that_settle_are_left_out_of_the_figures():
    meters = throughput.Meters()
    for seconds in [100.0] * throughput.WARMUP_STEPS + [1.0, 1.0]:
        meters.add(seconds, 0.0, 0.0)
    assert (meters.best.steps, meters.best.seconds, meters.every.steps) == (2, 2.0, throughput.WARMUP_STEPS + 2)


def test_flops_of_a_token_at_60m_by_hand():
    model = compose(["model=llama_60m", "optimizer=adam"]).model
    weights = 58_073_600 - 32_000 * 512  # without the embedding, which is looked up
    assert throughput.flops_per_token(model, 58_073_600, 256) == 6 * weights + 12 * 8 * 512 * 256


def made(trainer: Trainer, steps: int = 1) -> list[str]:
    """What is read between a batch and the end of its update; the first step makes the optimizer's states."""
    batches = [next(trainer.batches) for _ in range(steps + 1)]
    trainer.lag = 1  # as on a GPU: figures are read one step later
    trainer.train_on(batches[0])
    with Reads() as reads:
        for rows in batches[1:]:
            trainer.train_on(rows)
    trainer.batches.close()
    return reads.found


@pytest.mark.parametrize("more", ["trainer.loss=full", "data.rows=truncate", "data.attention=document"])
def test_nothing_is_read_between_a_batch_and_its_update(tmp_path, more):
    """But for the places of real targets, which are found on the host, once for each of two micro-batches."""
    more = ["optimizer=adam", "trainer.micro_batch_size=4", "trainer.grad_clip=1", "data.length=64", more]
    trainer = Trainer(cfg := config(tmp_path / "run", *more), make_plan(cfg))
    assert made(trainer, steps=2) == ["nonzero"] * 4


def test_reading_would_be_noticed(tmp_path):
    cfg = config(tmp_path / "run", "optimizer=adam")
    trainer = Trainer(cfg, make_plan(cfg))
    clip = trainer._clip
    trainer._clip = lambda: torch.full((), clip().item())
    assert sorted(made(trainer)) == ["_local_scalar_dense", "nonzero"]


def test_the_norm_is_that_of_all_gradients(tmp_path):
    cfg = config(tmp_path / "run", "optimizer=adam", "trainer.precision=bf16", "trainer.grad_clip=0.01")
    trainer = Trainer(cfg, make_plan(cfg))
    rows = next(trainer.batches)
    trainer._backward(rows, (rows["labels"][:, 1:] >= 0).sum())
    parts = [p.grad.double().square().sum() for p in trainer.model.parameters()]
    norm = trainer._clip()
    assert norm.dtype == torch.float32 and norm.item() == pytest.approx(sum(parts).sqrt().item(), rel=1e-6)
    after = sum(p.grad.double().square().sum() for p in trainer.model.parameters()).sqrt().item()
    assert after == pytest.approx(0.01, rel=1e-2)
    trainer.batches.close()


def test_the_loader_pins_rows_in_its_own_thread_for_this_ranks_device(monkeypatch, tmp_path):
    import threading

    threads, devices = [], []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda i: devices.append((threading.current_thread().name, i)))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: threads.append(threading.current_thread().name) or x)
    cfg = config(tmp_path / "run", "optimizer=adam")
    trainer = Trainer(cfg, make_plan(cfg))
    plan = trainer.batches.plan
    for pinned in (True, False):
        threads.clear()
        devices.clear()
        with TrainingBatches(plan.source, plan.tokenizer, 32, "pack", 6, pin_memory=pinned) as batches:
            rows = next(batches)
            assert rows["input_ids"].shape == (6, 32)
        assert set(threads) == ({"data-prefetch"} if pinned else set())
        assert devices == ([("data-prefetch", 3)] if pinned else [])


def test_objects_from_before_are_left_out_of_collections_and_come_back():
    class Ring:
        pass

    def ring():
        one = Ring()
        one.self = one

    ring()
    before = gc.get_freeze_count()
    with throughput.frozen_garbage():
        assert gc.get_freeze_count() > before + 1000
        gc.collect()
        ring()
        assert gc.collect() > 0  # what is made inside is found
        assert gc.isenabled()
    assert gc.get_freeze_count() == before


def test_freed_memory_is_used_again_without_new_pages():
    code = (
        "import resource, torch, json; from pretraining.throughput import keep_freed_memory\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(3): torch.zeros(2**24)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "first = faults(); kept = keep_freed_memory()\n"
        # a small block at the wrong place makes one call or another take new pages
        "print(json.dumps([kept, first, min(faults() for _ in range(8))]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    kept, first, then = json.loads(done.stdout)
    if not kept:
        pytest.skip("another C library than glibc")
    assert then < first / 20


def test_a_compiled_layer_is_not_cut_at_ddps_buckets(monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "optimize_ddp", True)
    compile_layers(build_model(compose(["experiment=quickstart", "optimizer=adam"]).model))
    assert torch._dynamo.config.optimize_ddp is False


@pytest.mark.slow
def test_compiled_layers_train_alike_and_leave_names_alone(tmp_path):
    """A smaller last micro-batch has code of its own, made once; evaluations and samples go without."""
    more = [
        "optimizer=adam",
        "trainer.micro_batch_size=4",
        "trainer.steps=4",
        "trainer.eval_every=2",
        "trainer.save_every=2",
    ]
    train(config(tmp_path / "plain", *more))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    train(config(tmp_path / "compiled", *more, "trainer.compile=true"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] in (
        2,
        4,
    )  # two sizes of micro-batches; the grad modes
    plain, compiled = (lines(tmp_path / name) for name in ("plain", "compiled"))
    assert [a["step"] for a in plain] == [b["step"] for b in compiled]
    assert [b["loss"] for b in compiled] == pytest.approx([a["loss"] for a in plain], rel=1e-4)
    assert (tmp_path / "compiled/samples.txt").read_text().strip()
    ours, theirs = (load_file(tmp_path / name / "model/model.safetensors") for name in ("plain", "compiled"))
    assert ours.keys() == theirs.keys()


@pytest.mark.slow
def test_a_compiled_optimizer_trains_alike(tmp_path):
    more = ["trainer.steps=3", "trainer.eval_every=3", "trainer.save_every=0"]
    cfg = config(tmp_path, "optimizer=racs", "trainer.compile_optimizer=true")
    assert make_optimizer(cfg, build_model(cfg.model))._compiled is not None
    for method, rank in (("racs", []), ("alice", ["optimizer.rank=8", "optimizer.leading=3"])):
        for name, asked in (("plain", "false"), ("compiled", "true")):
            options = [f"optimizer={method}", *rank, f"trainer.compile_optimizer={asked}"]
            train(config(tmp_path / method / name, *more, *options))
        plain, compiled = ([x["loss"] for x in lines(tmp_path / method / name)] for name in ("plain", "compiled"))
        assert compiled == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("method", ["soap", "adam"])
def test_what_cannot_be_compiled_is_refused(tmp_path, method):
    with pytest.raises(UserError, match=r"set trainer\.compile_optimizer=false"):
        train(config(tmp_path, f"optimizer={method}", "trainer.compile_optimizer=true"))


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA A100 MIG 1g.5gb", None),
    ],
)
def test_peaks_are_those_of_the_card(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert throughput.peak_flops(torch.device("cuda")) == peak


def test_too_little_memory_ends_in_advice(tmp_path, monkeypatch):
    cfg = config(tmp_path / "run", "trainer.micro_batch_size=3")
    trainer = Trainer(cfg, make_plan(cfg))

    def full(rows, targets):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 3 GiB"
        )

    monkeypatch.setattr(trainer, "_backward", full)
    with pytest.raises(
        UserError, match=r"step 1 with 3 rows at a time \(.* 2.00 GiB\): lower trainer.micro_batch_size"
    ):
        trainer.run()
