"""What a plan says before anything is allocated."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from optimizers.memory import state_bytes
from pretraining.config import compose
from pretraining.model import build_model, parameter_count
from pretraining.plan import choose_precision, data_workers, make_optimizer, make_plan, micro_batch_rows

TABLES = json.loads((Path(__file__).parents[2] / "results/paper/tables.json").read_text())
SIZES = ("60m", "130m", "350m", "1b")
ROWS = {"adam": "Adam", "racs": "RACS", "alice_0": "Alice-0", "alice": "Alice"}
CELLS = [
    (optimizer, size, last_layer, TABLES["table3"]["rows"][row][2 * i + (last_layer == "adam")])
    for optimizer, row in ROWS.items()
    for i, size in enumerate(SIZES)
    for last_layer in ("candidate", "adam")
    if TABLES["table3"]["rows"][row][2 * i + (last_layer == "adam")] is not None
]


@pytest.mark.parametrize(("optimizer", "size", "last_layer", "printed"), CELLS)
def test_memory_is_the_papers(optimizer, size, last_layer, printed):
    """Table 3 to 0.01 GiB: bfloat16 weights and states, Q~ and p in float32, counted, not rounded as printed."""
    overrides = [f"optimizer={optimizer}", f"model=llama_{size}"]
    cfg = compose(overrides + ([f"optimizer.last_layer={last_layer}"] if optimizer != "adam" else []))
    model = build_model(cfg.model, device="meta", dtype=torch.bfloat16)
    total = 2 * parameter_count(model) + sum(state_bytes(make_optimizer(cfg, model)))
    assert total / 2**30 == pytest.approx(printed, abs=0.01)


def test_every_cell_of_the_four_methods_is_checked():
    assert len(CELLS) == 24


def test_both_rates_and_the_bfloat16_warning_are_shown():
    text = make_plan(compose(["optimizer=alice", "model=llama_60m", "optimizer.adam_lr=0.001"])).text
    assert "rate 0.02 x scale 0.3 = 0.006" in text
    assert "rate 0.001" in text
    assert "never shrink" in text
    mixed = make_plan(compose(["optimizer=alice", "model=llama_60m", "trainer.precision=bf16_mixed"])).text
    assert "never shrink" not in mixed


def test_the_candidate_may_have_the_last_layer():
    text = make_plan(compose(["optimizer=alice", "model=llama_60m", "optimizer.last_layer=candidate"])).text
    assert "57 matrices" in text and "32000x512" in text


def test_precision_is_only_chosen_when_asked():
    assert choose_precision("bf16", torch.device("cpu")) == "bf16"
    assert choose_precision("auto", torch.device("cpu")) in ("bf16_mixed", "fp32")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([], "2, ddp: weights on each, each matrix is updated, and its state kept, by one"),
        (["trainer.shard_optimizer=false"], "2, ddp: weights on each, all states on each"),
        (
            ["trainer.parallel=fsdp2"],
            "2, fsdp2: weights and states are divided among all, each matrix is updated whole",
        ),
        (["trainer.parallel=fsdp2", "optimizer=adam", "trainer.shard_group=node"], "divided among those of a node"),
    ],
)
def test_the_plan_says_where_several_processes_keep_what(monkeypatch, settings, words):
    alone = make_plan(compose(["experiment=quickstart", *settings])).text
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert words in make_plan(compose(["experiment=quickstart", *settings])).text and "processes" not in alone


@pytest.mark.parametrize(
    ("model", "gib", "rows"),
    [("llama_60m", 24, 64), ("llama_1b", 80, 64), ("llama_1b", 40, 32), ("llama_7b", 80, 16), ("llama_7b", 1, 1)],
)
def test_auto_rows_depend_on_the_model_and_on_the_gpu(monkeypatch, model, gib, rows):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=gib * 2**30))
    cfg = compose([f"model={model}", "recipe=none", "trainer.steps=10"])
    assert micro_batch_rows(cfg, 512, torch.device("cuda")) == rows
    assert micro_batch_rows(cfg, 512, torch.device("cpu")) == 16
    cfg.trainer.micro_batch_size = 128
    assert micro_batch_rows(cfg, 512, torch.device("cuda")) == 128


def test_threads_are_planned_for_the_cores_of_the_job(monkeypatch):
    cfg = compose(["model=llama_60m", "optimizer=adam", "data.workers=auto"])
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    for cores, workers in ((32, 3), (128, 4), (8, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        assert data_workers(cfg, torch.device("cuda")) == workers


def test_too_few_refreshes_are_told_of():
    short = make_plan(compose(["optimizer=alice", "model=llama_60m", "trainer.steps=1000"])).text
    assert "every 200 steps, 6 times in 1,000 steps" in short and "optimizer.update_interval=20 would" in short
    for settings in (["trainer.steps=1000", "optimizer.update_interval=20"], []):
        assert "made anew" not in make_plan(compose(["optimizer=alice", "model=llama_60m", *settings])).text
