"""Time and memory of optimizer steps, ours and other packages', side by side on the same gradients.

The matrices are those of a model's attention and MLP layers (what the paper's methods update; embeddings, norms and the
output layer are left out, for everybody). Every contestant has its own weights; all get the same gradient tensors: low rank
plus noise, drawn once. Timing does not depend on their values, but decompositions must not meet degenerate ones.

Contestants are measured in groups, which bounds memory: each group holds a method, its rivals and torch's fused AdamW, so
that every ratio is one of neighbours. In each round of a group everybody makes one ordinary step, in rotating order; steps
that refresh bases are timed apart.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from data.errors import UserError
from optimizers import partition
from optimizers.memory import RANKS, measured_state_bytes
from pretraining.config import choices, compose
from pretraining.model import build_model
from pretraining.throughput import keep_freed_memory
from reporting.benchmarks import FORMAT, aligned, optimizer_table

from . import record as records
from .bounds import Machine, synchronize
from .peers import ADAMW, LR, Contestant, leading, select

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SEED = 0
WARMUP = 3  # steps of each contestant that do not count; the first makes states and the first bases
SLOW_MS = 5_000  # of a refresh: slower ones are timed once
MB = 10**6

Result = TypeVar("Result")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="llama_60m", help="whose matrices: a file of configs/model; default llama_60m"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of weights and gradients; default fp32")
    parser.add_argument(
        "--only", default="", help="methods of ours, as in alice,racs; default all; rivals come with them"
    )
    parser.add_argument("--rank", type=int, help="r; default the paper's for the model, 128 for llama_60m")
    parser.add_argument(
        "--repeats", type=int, default=30, help="rounds, each an ordinary step of everybody; default 30"
    )
    parser.add_argument("--refreshes", type=int, default=3, help="at least so many of each; default 3")
    parser.add_argument("--threads", type=int, help="of the CPU; default all")
    parser.add_argument("--out", type=Path, help="default results/benchmarks/optimizers_<model>_<device>_<dtype>.json")


def run(asked: argparse.Namespace) -> int:
    """The command: measure, write the record, print the table. Raises UserError before anything is measured."""
    if min(asked.repeats, asked.refreshes, asked.threads or 1, asked.rank or 1) < 1:
        raise UserError("--repeats, --refreshes, --threads and --rank must be at least 1: choose a larger number.")
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU: use --device cpu, or install a CUDA build of torch.")
    if asked.model not in choices("model"):
        raise UserError(f"There is no model {asked.model!r}: choose one of {', '.join(choices('model'))}.")
    groups = select(name.strip() for name in asked.only.split(",") if name.strip())
    shapes = matrix_shapes(asked.model)
    rank = min(asked.rank or RANKS[asked.model], *(min(shape) for shape in shapes.values()))
    out = asked.out or records.FOLDER / f"optimizers_{asked.model}_{asked.device}_{asked.dtype}.json"
    records.refuse_to_lose(out, [c.name for group in groups.values() for c in group if c.installed])
    if asked.threads:
        torch.set_num_threads(asked.threads)

    began = time.monotonic()
    device, dtype = torch.device(asked.device), DTYPES[asked.dtype]
    kept = device.type == "cpu" and keep_freed_memory()  # as train.py: without it, page faults are what is measured
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # before this process adds to it
    machine = records.describe_machine(device, asked.words, packages(groups), load_average_before=load)
    record: dict[str, Any] = {
        "format": FORMAT,
        "kind": "optimizers",
        "settings": {
            "model": asked.model,
            "device": asked.device,
            "dtype": asked.dtype,
            "matrices": {f"{m}x{n}": count for (m, n), count in Counter(shapes.values()).items()},
            "parameters": sum(m * n for m, n in shapes.values()),
            "rank": rank,
            "leading": leading(rank),
            "lr": LR,
            "repeats": asked.repeats,
            "warmup": WARMUP,
            "seed": SEED,
            "threads": torch.get_num_threads(),
            "keeps_freed_memory": kept,
            "memory_limit_bytes": memory_limit(shapes.values()),
        },
        "environment": machine,
        "contestants": [],
    }
    replaces = out.is_file()  # a whole record, which an interrupted measurement must not replace
    for lines, speeds in measure(groups, shapes, device, dtype, rank, asked.repeats, asked.refreshes):
        record["contestants"] += lines
        record["settings"] |= {**speeds, "seconds": time.monotonic() - began}
        if not replaces:
            records.write(record, out)  # what is measured stays, whatever happens to the groups after it
    records.write(record, out)
    print(aligned(optimizer_table(records.rounded(record))))
    print(f"\n{record['settings']['seconds']:.0f} s: {out}")
    failed = [line for line in record["contestants"] if line["config"] and "error" in line]
    for line in failed:
        print(f"error: {line['name']}: {line['error']}", file=sys.stderr)
    # what a card has no room for is a result
    return 1 if any(not line["error"].startswith("OutOfMemoryError") for line in failed) else 0


def packages(groups: dict[str, list[Contestant]]) -> list[str]:
    return sorted({c.package for group in groups.values() for c in group if not c.config} - {"torch"})


def matrix_shapes(model: str) -> dict[str, tuple[int, int]]:
    """Name -> shape of every attention and MLP matrix of a model of configs/model, in its order."""
    built = build_model(compose([f"model={model}"]).model, device="meta")
    return {name: (p.shape[0], p.shape[1]) for name, p in partition(built, verbose=False)[0]["params"]}


def memory_limit(shapes: Iterable[tuple[int, int]]) -> int:
    """Bytes that a step may need beyond weights, gradients and states: 64 MB, or three float32 copies of the largest matrix."""
    return max(64 * MB, 3 * 4 * max(m * n for m, n in shapes))


def make_gradient(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """[m, n] in float32, entries of about 1e-3: a part of rank min(m, n) / 8 whose singular values fall, and noise."""
    k = max(1, min(shape) // 8)
    A, B = (torch.randn(*size, generator=generator) for size in ((shape[0], k), (k, shape[1])))
    low_rank = (A * torch.linspace(1.0, 0.1, k)) @ B / k**0.5
    return 1e-3 * (low_rank + 0.3 * torch.randn(shape, generator=generator))


class Runner:
    """One contestant with its own weights, stepped and timed.

    Attributes:
        step_ms, refresh_ms: of ordinary steps and of those that refresh bases, in the order made.
        own: copies of the gradients, renewed before each step, for an optimizer that changes what it is given; else None.
    """

    def __init__(self, contestant: Contestant, weights: dict[str, Tensor], gradients: Sequence[Tensor], rank: int):
        self.contestant, self.gradients = contestant, gradients
        self.device = gradients[0].device
        self.named = [(name, torch.nn.Parameter(W.clone())) for name, W in weights.items()]
        self.optimizer = contestant.make(self.named, rank)
        self.step_ms: list[float] = []
        self.refresh_ms: list[float] = []
        self.peaks: dict[bool, int] = {}  # bytes of a refresh (True) and of an ordinary step (False)
        self.own: list[Tensor] | None = None

    def warm_up(self) -> None:
        """Steps that do not count: states, first bases, compilation; and whether gradients come out as they went in."""
        self.own = [G.clone() for G in self.gradients]
        for _ in range(WARMUP):
            versions = [g._version + 1 for g in self.own]  # renewing them is a change
            self.step()
            changed = versions != [g._version for g in self.own]
        clock = self.contestant.clock
        if clock is not None and clock.place == "hidden":
            for _ in range(clock.interval):  # the first refresh compiles its kernels
                self.step()
        self.own = self.own if changed else None

    def step(self) -> tuple[float, bool]:
        """One step: its milliseconds, and whether it was a refresh."""
        if self.own is not None:
            for g, G in zip(self.own, self.gradients, strict=True):
                g.copy_(G)
        for (_, p), g in zip(self.named, self.own or self.gradients, strict=True):
            p.grad = g  # some optimizers drop it
        synchronize(self.device)
        began = time.perf_counter()
        self.optimizer.step()
        synchronize(self.device)
        ms = 1000 * (time.perf_counter() - began)
        clock = self.contestant.clock
        return ms, clock is not None and clock.refreshed(self.optimizer)

    def ordinary(self) -> None:
        """Steps up to and with an ordinary one."""
        while True:
            ms, refreshed = self.step()
            (self.refresh_ms if refreshed else self.step_ms).append(ms)
            if not refreshed:
                return

    def refresh(self) -> None:
        """A step that refreshes; ordinary ones before it, if its counter cannot be moved, do not count."""
        clock = self.contestant.clock
        assert clock is not None
        clock.skip(self.optimizer)
        for _ in range(2 * clock.interval):
            ms, refreshed = self.step()
            if refreshed:
                self.refresh_ms.append(ms)
                return
        raise RuntimeError(f"no refresh in {2 * clock.interval} steps")

    def measure_memory(self) -> None:
        """Peaks of an ordinary step and, where there are refreshes, of one. Steps are slow here: their times are not kept."""
        clock = self.contestant.clock
        wanted, tries = {False}, 1
        if clock is not None:
            wanted, tries = {False, True}, 2 * clock.interval
            clock.skip(self.optimizer)
        for _ in range(tries):
            peak, (_, refreshed) = peak_bytes(self.step, self.device)
            self.peaks.setdefault(refreshed, peak)
            if wanted <= self.peaks.keys():
                return


def peak_bytes(work: Callable[[], Result], device: torch.device) -> tuple[int, Result]:
    """The most memory that ``work`` held at a time beyond what was there before, as torch's allocator counts it; its result.

    What libraries such as oneDNN and BLAS allocate by themselves is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, result
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = work()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak, result


def measure(
    groups: dict[str, list[Contestant]],
    shapes: dict[str, tuple[int, int]],
    device: torch.device,
    dtype: torch.dtype,
    rank: int,
    repeats: int,
    refreshes: int,
) -> Iterator[tuple[list[dict[str, Any]], dict[str, float]]]:
    """For one group after the other a line for each contestant, and how fast the machine moves bytes."""
    generator = torch.Generator().manual_seed(SEED)
    gradients = [make_gradient(shape, generator).to(device, dtype) for shape in shapes.values()]
    weights = {name: (0.02 * torch.randn(s, generator=generator)).to(device, dtype) for name, s in shapes.items()}
    machine, counted = Machine(gradients), Counter(shapes.values())
    speeds = {"copy_bytes_per_second": machine.copy_bandwidth, "bytes_per_second": machine.bandwidth}
    for title, contestants in groups.items():
        began = time.monotonic()
        runners = measure_group(contestants, weights, gradients, rank, repeats, refreshes)
        yield [describe(title, c, runners, machine.bound(c.method, counted, rank, c.low)) for c in contestants], speeds
        del runners
        tidy()
        if any(G._version for G in gradients):  # nobody after it would have had the same ones
            raise UserError(
                f"A contestant of the group {title!r} has changed the gradients: leave that group out (--only)."
            )
        print(f"{title}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def measure_group(
    contestants: Sequence[Contestant],
    weights: dict[str, Tensor],
    gradients: Sequence[Tensor],
    rank: int,
    repeats: int,
    refreshes: int,
) -> dict[str, Runner | str | None]:
    """Everybody's measured runner; for one that cannot be measured the reason, None if it is not installed."""
    found: dict[str, Runner | str | None] = {}
    for contestant in contestants:
        found[contestant.name] = None
        if contestant.installed:
            found[contestant.name] = guarded(lambda: warm_up(contestant, weights, gradients, rank))  # noqa: B023

    def going() -> list[Runner]:
        return [runner for runner in found.values() if isinstance(runner, Runner)]

    def attempt(runner: Runner, work: Callable[[], None]) -> None:
        reason = guarded(work)
        if isinstance(reason, str):  # out of memory in a refresh, say
            found[runner.contestant.name] = reason

    gc.collect()
    gc.disable()  # a collection in the middle of somebody's step
    try:
        for number in range(repeats):
            runners = going()
            start = number % max(1, len(runners))
            for runner in [*runners[start:], *runners[:start]]:
                attempt(runner, runner.ordinary)
    finally:
        gc.enable()
    for runner in going():
        attempt(runner, lambda: measure_rest(runner, refreshes))  # noqa: B023
    return found


def measure_rest(runner: Runner, refreshes: int) -> None:
    """What is not measured by turns: refreshes, and memory."""
    if runner.contestant.clock is not None:
        while len(runner.refresh_ms) < refreshes and not (runner.refresh_ms and runner.refresh_ms[-1] > SLOW_MS):
            runner.refresh()
    runner.measure_memory()


def warm_up(contestant: Contestant, weights: dict[str, Tensor], gradients: Sequence[Tensor], rank: int) -> Runner:
    runner = Runner(contestant, weights, gradients, rank)
    runner.warm_up()
    return runner


def guarded(work: Callable[[], Result]) -> Result | str:
    """What ``work`` returns, or what went wrong, in a line: the others are still measured."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of packages, about themselves
            return work()
    except Exception as error:
        said = str(error).strip().splitlines()
        return f"{type(error).__name__}: {said[0][:200] if said else 'no message'}"


def tidy() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def describe(
    title: str, contestant: Contestant, runners: dict[str, Runner | str | None], bound: dict[str, float]
) -> dict[str, Any]:
    """The line of one contestant in the record."""
    line: dict[str, Any] = {"group": title, "name": contestant.name, "config": contestant.config}
    line |= {"package": contestant.package, "rivals": list(contestant.rivals), "differs": contestant.differs}
    runner = runners[contestant.name]
    if not isinstance(runner, Runner):
        return line | {"error": runner or "not installed"}
    clock = contestant.clock
    step = statistics.median(runner.step_ms)
    refresh = statistics.median(runner.refresh_ms) if runner.refresh_ms else None
    amortised = step if refresh is None or clock is None else step + (refresh - step) / clock.interval
    return line | {
        "interval": clock.interval if clock else None,
        "step_ms": step,
        "quartiles_ms": quartiles(runner.step_ms),
        "refresh_ms": refresh,
        "refresh_quartiles_ms": quartiles(runner.refresh_ms) if runner.refresh_ms else None,
        "amortised_ms": amortised,
        "to_adamw": step / median_of(runners, ADAMW) if measured(runners, ADAMW) else None,
        "to_rivals": {name: step / median_of(runners, name) for name in contestant.rivals if measured(runners, name)},
        "refresh_to_rivals": {
            name: refresh / statistics.median(other.refresh_ms)
            for name in contestant.rivals
            if refresh is not None and isinstance(other := runners[name], Runner) and other.refresh_ms
        },
        **bound,
        "fraction": bound["bound_ms"] / step,
        "step_peak_bytes": runner.peaks.get(False),
        "refresh_peak_bytes": runner.peaks.get(True),
        "changes_gradients": runner.own is not None,
        "state_bytes": measured_state_bytes(runner.optimizer),
        "samples_ms": [round(ms, 3) for ms in runner.step_ms],
        "refresh_samples_ms": [round(ms, 3) for ms in runner.refresh_ms],
    }


def measured(runners: dict[str, Runner | str | None], name: str) -> bool:
    return isinstance(runners.get(name), Runner)


def median_of(runners: dict[str, Runner | str | None], name: str) -> float:
    runner = runners[name]
    assert isinstance(runner, Runner)
    return statistics.median(runner.step_ms)


def quartiles(values: Sequence[float]) -> list[float]:
    """First and third; of a single value twice that value."""
    if len(values) == 1:
        return [values[0]] * 2
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]
