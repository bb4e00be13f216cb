"""What each of four ranks of test_ranks.py does: python -m tests.pretraining.ranks FOLDER

One interpreter imports everything and forks the ranks, by the engine of torchrun; they work together, in pairs and in a group
of three, one after the other. Imports and starts are most of what ranks cost.
"""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from data.errors import UserError
from optimizers import sharding
from pretraining.evaluation import evaluate
from pretraining.loss import PretrainingLoss
from pretraining.signals import Stopped
from pretraining.trainer import Trainer, make_plan, train

from .test_trainer import ALICE, config

RANKS = 4
# Six rows on four ranks are shares of 1, 2, 1 and 2, of unequal numbers of tokens; micro-batches of one row; the limit is
# below every step's norm.
SETTINGS = [
    "trainer.save_every=3", "trainer.keep_last=9", "trainer.micro_batch_size=1", "trainer.grad_clip=0.3",
    "data.rows=truncate", "data.length=64", "trainer.sample_tokens=0",
]  # fmt: skip
BASES = [*ALICE, "optimizer.log_basis=true"]
BF16 = ["trainer.precision=bf16", "trainer.steps=4"]
SOPHIA = ["optimizer=sophia_h", "optimizer.update_interval=3", "trainer.steps=6", "trainer.save_every=0"]
MINI = ["optimizer=adam_mini", "trainer.steps=4", "trainer.save_every=0"]
TIED = "model.tie_word_embeddings=true"
FSDP2, REPLICATED, NODE = "trainer.parallel=fsdp2", "trainer.shard_optimizer=false", "trainer.shard_group=node"
SIZES = (1, 5, 64)
# The common run: how many ranks, their layout, and the step at which the last of them alone gets a signal
CHAIN = ((4, "ddp", 2), (2, "fsdp2", 4), (3, "ddp", 6))


def join(folder: Path, own: list[int], rank: int) -> None:
    """Make ``own``, ranks of the launch, a world of their own, as a launch of so many processes would be."""
    if dist.is_initialized():
        gc.collect()  # what still holds a group
        dist.destroy_process_group()
    place, size = own.index(rank), len(own)
    names = {"RANK": place, "LOCAL_RANK": place, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {name: str(value) for name, value in names.items()}
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    store = dist.FileStore(str(folder / f"world-{'-'.join(map(str, own))}"), size)
    dist.init_process_group("gloo", store=store, rank=place, world_size=size)


def evaluations(folder: Path) -> list[list[float]]:
    cfg = config(folder)
    trainer = Trainer(cfg, make_plan(cfg))
    torch.manual_seed(0)  # weights that tell rows apart
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(torch.randn(p.shape) * 0.05)
    results = [evaluate(trainer.model, trainer.validation, size, 16, trainer.accelerator) for size in SIZES]
    trainer.batches.close()
    return [[r.loss, r.perplexity, r.perplexity_galore, r.tokens] for r in results]


def skip_on_one_rank(folder: Path, *more: str) -> int:
    """Only the last rank's loss is not a number; none may update, and none may wait for the others."""
    original = PretrainingLoss.forward
    calls = []

    def forward(self, *inputs, **named):
        calls.append(1)
        loss = original(self, *inputs, **named)
        return loss * math.nan if len(calls) == 3 and dist.get_rank() == dist.get_world_size() - 1 else loss

    cfg = config(
        folder, "trainer.on_nonfinite=skip", "trainer.steps=4", "trainer.micro_batch_size=64", "trainer.eval_every=4",
        "trainer.sample_tokens=0", *more,
    )  # fmt: skip
    trainer = Trainer(cfg, make_plan(cfg))
    PretrainingLoss.forward = forward  # type: ignore[method-assign]
    trainer.run()
    PretrainingLoss.forward = original  # type: ignore[method-assign]
    weights = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in trainer.model.parameters())
    digest = torch.tensor(sum(p.double().sum().item() for p in weights), dtype=torch.float64)
    everywhere = trainer.accelerator.gather(digest.reshape(1))
    assert (everywhere == everywhere[0]).all() and torch.isfinite(everywhere).all()
    return trainer.skipped


def gradients_in_memory(folder: Path) -> list[bool]:
    """Of the first steps: whether gradients lie in one place from the first micro-batch on."""
    cfg = config(folder, *SETTINGS, *BASES)
    trainer = Trainer(cfg, make_plan(cfg))
    original = trainer.parallel.accumulate
    places: list[set[int]] = []

    def accumulate(wrapped, last):
        places[-1] |= {p.grad.data_ptr() for p in trainer.model.parameters() if p.grad is not None}
        return original(wrapped, last)

    trainer.parallel.accumulate = accumulate  # type: ignore[method-assign]
    for _ in range(3):
        places.append(set())
        trainer.train_on(next(trainer.batches))
        places[-1] |= {p.grad.data_ptr() for p in trainer.model.parameters()}
    trainer.batches.close()
    after = {p.grad.data_ptr() for p in trainer.model.parameters()}
    return [place == after for place in places]


class Late:
    """A message that arrives when it is waited for, and not before."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.send = partial(dist.broadcast, *args, **options)

    def wait(self) -> None:
        self.send()


@contextmanager
def late_messages() -> Iterator[None]:
    """Owners' new weights are at the others' when they are waited for: who forgets that computes with old ones."""
    original = dist.broadcast

    def broadcast(*args, async_op=False, **options):
        return Late(*args, **options) if async_op else original(*args, **options)

    sharding.dist = SimpleNamespace(**{**vars(dist), "broadcast": broadcast})  # type: ignore[assignment]
    try:
        yield
    finally:
        sharding.dist = dist


def limits(folder: Path, *more: str) -> list[float]:
    """Minutes after which messages of the groups within this launch are given up."""
    cfg = config(folder, *SETTINGS, *BASES, *more)
    trainer = Trainer(cfg, make_plan(cfg))
    trainer.batches.close()
    assert trainer.parallel.owners is not None
    groups = {team.group for team in trainer.parallel.owners.teams} | ({trainer.parallel.copies} - {None})
    cpu = torch.device("cpu")
    return [group._get_backend(cpu).options._timeout.total_seconds() / 60 for group in groups]


@contextmanager
def unequal_cards() -> Iterator[None]:
    """The last rank has room for more rows at a time than the first."""
    from pretraining import trainer

    original = trainer.micro_batch_rows
    trainer.micro_batch_rows = lambda *_: 1 + dist.get_rank()
    try:
        yield
    finally:
        trainer.micro_batch_rows = original


def drift(folder: Path, *more: str) -> str:
    """What is said of a rank that has computed something else; nothing is saved."""
    cfg = config(folder, *SETTINGS, *BASES, *more)
    trainer = Trainer(cfg, make_plan(cfg))
    trainer.train_on(next(trainer.batches))
    trainer._save()
    trainer.train_on(next(trainer.batches))
    if dist.get_rank() == dist.get_world_size() - 1:
        with torch.no_grad():
            weight = sharding.local(trainer.model.lm_head.weight)[3, 5]
            weight.copy_(torch.nextafter(weight, torch.tensor(1.0)))
    try:
        trainer._save()
    except UserError as error:
        return str(error)
    finally:
        trainer.batches.close()
    return "saved"


def stop_the_chain(folder: Path, parallel: str, step: int) -> None:
    """Work on the common run until the last rank alone gets a signal."""
    original = Trainer._backward

    def backward(self, rows, targets):
        if self.done + 1 == step and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, rows, targets)

    Trainer._backward = backward  # type: ignore[method-assign]
    try:
        train(config(folder / "chain", *SETTINGS, *BASES, f"trainer.parallel={parallel}"))
    except Stopped:
        return
    finally:
        Trainer._backward = original  # type: ignore[method-assign]
    raise AssertionError("the signal was lost")


def work(folder: Path, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def run(name: str, *more: str) -> None:
        train(config(folder / name, *SETTINGS, *(more if {SOPHIA[0], MINI[0]} & set(more) else [*BASES, *more])))

    join(folder, [0, 1, 2, 3], rank)
    found["evaluations 4"] = evaluations(folder / "unused-4")
    run("ddp-4")
    run("fsdp2-4", FSDP2)
    found["skipped ddp-4"] = skip_on_one_rank(folder / "skip-ddp-4")
    os.environ |= {"LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": "2"}  # as on two nodes
    run("node-ddp-4", NODE)
    run("node-fsdp2-4", NODE, FSDP2)
    found["limits"] = [*limits(folder / "limits", NODE), *limits(folder / "limits-fsdp2", NODE, FSDP2)]
    found["drift node-fsdp2"] = drift(folder / "drift-node-fsdp2", NODE, FSDP2)
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "4"}
    stop_the_chain(folder, *CHAIN[0][1:])

    join(folder, [0, 1] if rank < 2 else [2, 3], rank)
    if rank < 2:
        run("ddp-2")
        run("fsdp2-2", FSDP2, "trainer.sample_tokens=4")
        run("sophia-2", *SOPHIA)
        found["gradients"] = gradients_in_memory(folder / "gradients")
        found["drift"] = drift(folder / "drift")
        run("adam_mini-2", *MINI)
        stop_the_chain(folder, *CHAIN[1][1:])
    else:
        found["evaluations 2"] = evaluations(folder / "unused-2")
        run("replicated-2", REPLICATED)
        run("tied-2", TIED)
        with unequal_cards():
            run("fsdp2-unequal-2", FSDP2)
        with late_messages():
            run("late-2")
        run("bf16-ddp-2", *BF16)
        run("bf16-fsdp2-2", *BF16, FSDP2)
        found["skipped fsdp2-2"] = skip_on_one_rank(folder / "skip-fsdp2-2", FSDP2)

    if rank < 3:
        dist.barrier() if rank < 2 else None
        join(folder, [0, 1, 2], rank)
        stop_the_chain(folder, *CHAIN[2][1:])
    return found


def start(folder: str) -> None:
    rank = int(os.environ["RANK"])
    Accelerator.end_training = lambda self: None  # type: ignore[method-assign]  # one group for many runs
    (Path(folder) / f"found-{rank}.json").write_text(json.dumps(work(Path(folder), rank)))


def main() -> None:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    torch.set_num_threads(1)
    how = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=RANKS, run_id="ranks", rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", start_method="fork", max_restarts=0,
    )  # fmt: skip
    elastic_launch(how, start)(sys.argv[1])


if __name__ == "__main__":
    main()
