"""Time every optimizer on the quickstart's steps: milliseconds of an update, of a refresh, tokens per second, state bytes.

    python scripts/benchmark_optimizers.py                       every method with its quickstart recipe
    python scripts/benchmark_optimizers.py --only alice,racs --out speed.json
    python scripts/benchmark_optimizers.py trainer.device=cuda   arguments key=value go to the configuration of train.py

The machine must have nothing else to do. Every method makes the trainer's own steps, from the same weights on the same
batches. Methods take turns in two rounds, the second in reverse order, so that a machine that becomes faster or slower shows.
Steps that refresh bases (or estimate curvature) are told apart, and count with the share that they have of all steps.
"""

from __future__ import annotations

import argparse
import gc
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from omegaconf import DictConfig  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarking.record import refuse_to_lose, write  # noqa: E402
from data.errors import UserError  # noqa: E402
from optimizers import partition  # noqa: E402
from optimizers.base import is_update_time  # noqa: E402
from pretraining.config import choices, compose, validate  # noqa: E402
from pretraining.plan import Plan, make_plan  # noqa: E402
from pretraining.record import environment  # noqa: E402
from pretraining.trainer import Trainer  # noqa: E402
from reporting.survey import SPEED_FORMAT  # noqa: E402

OUT = ROOT / "results" / "runs" / "all" / "speed.json"
ROUNDS = 2
# What a measurement needs nothing of. The schedule stays that of the recipe, so the rates are those of its first steps.
SETTINGS = (
    "experiment=quickstart",
    "eval.ngrams=false",
    "data.validation_max_tokens=256",
    "trainer.save_every=0",
    "trainer.save_model=false",
    "trainer.sample_tokens=0",
)

Batch = dict[str, Tensor]


@dataclass
class Times:
    """Milliseconds, one for each step that counts: of updates, of updates with a refresh, and of all else in a step."""

    step_ms: list[float] = field(default_factory=list)
    refresh_ms: list[float] = field(default_factory=list)
    other_ms: list[float] = field(default_factory=list)


class Stepper:
    """The trainer's steps of one method, made and timed one at a time."""

    def __init__(self, cfg: DictConfig, plan: Plan) -> None:
        self.trainer = Trainer(cfg, plan)
        self.optimizer = self.trainer.optimizer
        self.group: dict[str, Any] = next(
            (group for group in self.optimizer.param_groups if group.get("update_interval", 1) > 1), {}
        )

    @property
    def interval(self) -> int:
        """K, steps between refreshes; 1 for a method that does the same at every step."""
        return self.group.get("update_interval", 1)

    @property
    def next_step(self) -> int:
        """t of the next update, as the matrices count."""
        return 1 + max((self.optimizer.state[p].get("step", 0) for p in self.group["params"]), default=0)

    def is_refresh(self, t: int) -> bool:
        return self.interval > 1 and is_update_time(t, self.interval, self.group["update_times"])

    def skip_to_refresh(self) -> None:
        """Let the next step be a refresh, with the interval as it is: a few counts of steps are left out."""
        t = self.next_step
        while not self.is_refresh(t):
            t += 1
        for p in self.group["params"]:
            self.optimizer.state[p]["step"] = t - 1

    def batches(self, count: int) -> list[Batch]:
        """The first batches of the training data, which stay in memory."""
        with self.trainer.batches as batches:
            return [next(batches) for _ in range(count)]

    def step(self, batch: Batch, times: Times) -> None:
        refreshes = self.interval > 1 and self.is_refresh(self.next_step)
        began = time.perf_counter()
        timer = self.trainer.train_on(batch).timer
        assert timer is not None  # no step is skipped
        optimizer_ms = timer.milliseconds()  # waits for the device
        times.other_ms.append(1000 * (time.perf_counter() - began) - optimizer_ms)
        (times.refresh_ms if refreshes else times.step_ms).append(optimizer_ms)

    def state_bytes(self) -> dict[str, int]:
        """Bytes of the states of attention and MLP matrices, and of everything else's."""
        # The same split for all methods, also those with groups of their own.
        split = partition(
            self.trainer.model, last_layer=self.trainer.cfg.optimizer.get("last_layer", "adam"), verbose=False
        )
        matrices = {p for group in split if not group.get("adam") for _, p in group["params"]}
        found: dict[str, dict[int, int]] = {"matrix": {}, "other": {}}
        for p, state in self.optimizer.state.items():
            place = found["matrix" if p in matrices else "other"]
            place.update({x.data_ptr() or id(x): x.nbytes for x in state.values() if isinstance(x, Tensor)})
        return {f"{name}_state_bytes": sum(sizes.values()) for name, sizes in found.items()}


def measure_round(stepper: Stepper, batches: Sequence[Batch], warmup: int, steps: int) -> Times:
    """``steps`` ordinary updates after ``warmup`` (the first of which refreshes), and at least two refreshes."""
    times, count = Times(), 0

    def one(into: Times) -> None:
        nonlocal count
        stepper.step(batches[count % len(batches)], into)
        count += 1

    for _ in range(warmup):
        one(Times())
    while len(times.step_ms) < steps:
        one(times)
    while stepper.interval > 1 and len(times.refresh_ms) < 2:
        stepper.skip_to_refresh()
        one(times)
    return times


def summarize(name: str, rounds: Sequence[Times], tokens: int, interval: int, sizes: dict[str, int]) -> dict[str, Any]:
    """The record of one method. ``optimizer_ms`` is the mean over an interval: K - 1 ordinary steps and a refresh."""
    step = statistics.median(ms for times in rounds for ms in times.step_ms)
    refreshes = [ms for times in rounds for ms in times.refresh_ms]
    refresh = statistics.median(refreshes) if refreshes else None
    mean = step if refresh is None else step + (refresh - step) / interval
    other = statistics.median(ms for times in rounds for ms in times.other_ms)
    return {
        "optimizer": name,
        "interval": interval,
        "step_ms": step,
        "refresh_ms": refresh,
        "optimizer_ms": mean,
        "forward_backward_ms": other,
        "tokens_per_second": 1000 * tokens / (mean + other),
        **sizes,
        "rounds": [{key: [round(ms, 3) for ms in values] for key, values in vars(times).items()} for times in rounds],
    }


def measure(names: Sequence[str], steps: int, warmup: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Time the methods called ``names``; returns the record.

    Raises:
        UserError: settings that cannot work, before anything is measured.
    """
    began = time.monotonic()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # before this process adds to it
    rounds: dict[str, list[Times]] = {name: [] for name in names}
    facts: dict[str, list[Any]] = {}  # interval and state bytes
    with tempfile.TemporaryDirectory() as folder:
        jobs = {name: prepare(name, overrides, Path(folder)) for name in names}
        first, plan = jobs[names[0]]
        batches = Stepper(first, plan).batches(warmup + steps)
        one_turn(first, plan, batches, 1, 1)  # thread pools and caches, which the first method would pay for
        for number in range(ROUNDS):
            for name in names if number % 2 == 0 else reversed(names):
                times, *facts[name] = one_turn(*jobs[name], batches, warmup, steps)
                rounds[name].append(times)
                report(began, number, name, times)
    return {
        "format": SPEED_FORMAT,
        "settings": {
            "steps": steps,
            "warmup": warmup,
            "rounds": ROUNDS,
            "model": first.model.name,
            "data": first.data.name,
            "batch_size": first.trainer.batch_size,
            "length": first.data.length,
            "tokens_per_step": plan.tokens_per_step,
            "precision": plan.precision,
            "overrides": list(overrides),
            "seconds": round(time.monotonic() - began),
        },
        "environment": environment(plan.device, 1, load_average_before=load),
        "methods": [summarize(name, rounds[name], plan.tokens_per_step, *facts[name]) for name in names],
    }


def prepare(name: str, overrides: Sequence[str], folder: Path) -> tuple[DictConfig, Plan]:
    """A method's configuration and plan; its optimizer is made once without memory, to see that it can be."""
    cfg = compose([*SETTINGS, f"optimizer={name}", f"run_dir={folder / name}", *overrides])
    validate(cfg)
    return cfg, make_plan(cfg)


def one_turn(
    cfg: DictConfig, plan: Plan, batches: Sequence[Batch], warmup: int, steps: int
) -> tuple[Times, int, dict[str, int]]:
    """A round of one method on a new model: times, interval and state bytes. The model before it is gone by then."""
    gc.collect()  # models and optimizers hold each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    stepper = Stepper(cfg, plan)
    return measure_round(stepper, batches, warmup, steps), stepper.interval, stepper.state_bytes()


def report(began: float, number: int, name: str, times: Times) -> None:
    refresh = f", refresh {statistics.median(times.refresh_ms):.1f} ms" if times.refresh_ms else ""
    print(
        f"[{time.monotonic() - began:4.0f} s] round {number + 1}, {name}: update {statistics.median(times.step_ms):.1f} ms"
        f"{refresh}, forward and backward {statistics.median(times.other_ms):.0f} ms",
        flush=True,
    )


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="methods, as in alice,racs; default every one in configs/optimizer")
    parser.add_argument(
        "--steps", type=int, default=5, help="ordinary updates of each method in each of the two rounds"
    )
    parser.add_argument("--warmup", type=int, default=3, help="steps before them, which do not count")
    parser.add_argument("--out", type=Path, default=OUT, help="default results/runs/all/speed.json")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for the configuration of train.py")
    asked = parser.parse_intermixed_args(words)
    if min(asked.steps, asked.warmup) < 1:
        parser.error("--steps and --warmup must be at least 1.")
    names = [name.strip() for name in asked.only.split(",") if name.strip()]
    names = list(dict.fromkeys(names)) or [name for name in choices("optimizer") if name != "any"]
    try:
        refuse_to_lose(asked.out, names, "methods", "optimizer")
        record = measure(names, asked.steps, asked.warmup, asked.overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nInterrupted: nothing was written.", file=sys.stderr)
        return 130
    record["environment"]["command"] = shlex.join(["python", "scripts/benchmark_optimizers.py", *words])
    write(record, asked.out, ("methods",))
    print(f"{len(names)} methods in {record['settings']['seconds']} s: {asked.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
