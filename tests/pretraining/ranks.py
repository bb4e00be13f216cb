"""What every rank of tests/pretraining/test_ranks.py does: torchrun --nproc_per_node N -m tests.pretraining.ranks FOLDER"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from pretraining.evaluation import evaluate
from pretraining.loss import PretrainingLoss
from pretraining.signals import Stopped
from pretraining.trainer import Trainer, make_plan, train

from .test_trainer import config

RANK, WORLD = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
SETTINGS = ["trainer.save_every=3", "trainer.keep_last=9"]
SIZES = (1, 5, 64)


def work(folder: Path) -> dict[str, object]:
    """All that is compared between 1, 2 and 4 processes."""
    found: dict[str, object] = {}
    cfg = config(folder / f"unused-{WORLD}")
    trainer = Trainer(cfg, make_plan(cfg))
    torch.manual_seed(0)  # weights that tell rows apart
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(torch.randn(p.shape) * 0.05)
    results = [evaluate(trainer.model, trainer.validation, size, 16, trainer.accelerator) for size in SIZES]
    found["evaluations"] = [[r.loss, r.perplexity, r.perplexity_galore, r.tokens] for r in results]
    trainer.batches.close()

    train(config(folder / f"whole-{WORLD}", *SETTINGS))
    if WORLD > 1:
        found["skipped"] = skip_on_one_rank(folder)
    return found


def skip_on_one_rank(folder: Path) -> int:
    """Only the last rank's loss is not a number; none may update, and none may wait for the others."""
    original = PretrainingLoss.forward
    calls = []

    def forward(self, *inputs):
        calls.append(1)
        loss = original(self, *inputs)
        return loss * math.nan if len(calls) == 3 and RANK == WORLD - 1 else loss

    PretrainingLoss.forward = forward  # type: ignore[method-assign]
    cfg = config(
        folder / f"skip-{WORLD}", "trainer.on_nonfinite=skip", "trainer.steps=4", "trainer.micro_batch_size=64",
        "trainer.eval_every=4",
    )  # fmt: skip
    trainer = Trainer(cfg, make_plan(cfg))
    trainer.run()
    PretrainingLoss.forward = original  # type: ignore[method-assign]
    digest = torch.tensor(sum(p.double().sum().item() for p in trainer.model.parameters()), dtype=torch.float64)
    everywhere = trainer.accelerator.gather(digest.reshape(1))
    assert (everywhere == everywhere[0]).all() and torch.isfinite(everywhere).all()
    return trainer.skipped


def stop_the_chain(folder: Path, step: int) -> None:
    """Work on the common run until the last rank alone gets a signal."""
    original = Trainer._backward

    def backward(self, rows, targets):
        if self.done + 1 == step and WORLD - 1 == RANK:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, rows, targets)

    Trainer._backward = backward  # type: ignore[method-assign]
    try:
        train(config(folder / "chain", *SETTINGS))
    except Stopped:
        return
    finally:
        Trainer._backward = original  # type: ignore[method-assign]
    raise AssertionError("the signal was lost")


def main() -> None:
    folder, stop = Path(sys.argv[1]), int(sys.argv[2])
    Accelerator.end_training = lambda self: None  # type: ignore[method-assign]  # one group for all runs of the process
    found = work(folder)
    stop_the_chain(folder, stop)
    if RANK == 0:
        (folder / f"found-{WORLD}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
