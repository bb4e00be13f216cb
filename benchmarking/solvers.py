"""Which solver for a refresh: time and accuracy of QR, eigenvectors and complement columns, and what a refresh consists of.

Matrices G [B, m, n] in float32 are low rank plus noise, as in `benchmarking.optimizers`. U [B, m, r] is the basis that Alice's
first refresh leaves, H = G (G^T U) what the next one has to orthonormalise, V = Z^T G G^T Z with Z = qr(H) the Ritz matrix. A
line of the record is one solver on one shape and one B: milliseconds per matrix, and how wrong its result is, computed in
float64 for the first matrix:

    orthogonality   |X^T X - I|, largest entry
    residual        QR: |H - X X^T H| over |H|; eigenvectors: |A x - x (x^T A x)| over |A|; complement: |U^T X|, largest entries

``used``: the solver that a step with optimizers/linalg.py runs now on this device.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from data.errors import UserError
from optimizers import Alice, alice, linalg
from optimizers.base import BATCHED_DEVICES, CHUNK_ENTRIES, Context
from optimizers.low_rank import draw_columns
from reporting.benchmarks import FORMAT, aligned, solver_tables

from . import record as records
from .bounds import synchronize
from .optimizers import make_gradient
from .peers import leading

SHAPES = (
    "512x1376r128,768x2048r256,1024x2736r256,2048x5461r512"  # an MLP matrix of 60M, 130M, 350M and 1.3B, and its rank
)
BATCH = 8
CONDITION = 1e6  # of the ill-conditioned H
SEED = 0
LEAST, MOST = 5, 20  # calls of each solver that count
SECONDS = 2.0  # for those of one solver; where LEAST do not fit, as many as do, at least one
STEP = 200  # of the refresh that is taken apart

Solve = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    """G [m, n], m < n or equal, and the rank r < m."""

    m: int
    n: int
    r: int

    def __str__(self) -> str:
        return f"{self.m}x{self.n}r{self.r}"


@dataclass(frozen=True)
class Task:
    """One thing to compute from ``inputs`` [B, ...], and who can do it.

    Attributes:
        solvers: name -> function of the inputs; the first is that of optimizers/linalg.py.
        errors: of a result for the first matrix: (X [m, k], inputs) in float64 -> orthogonality and residual.
        hard: inputs [1, ...] on which errors, not times, are measured as well.
    """

    name: str
    inputs: tuple[Tensor, ...]
    solvers: dict[str, Solve]
    errors: Callable[..., tuple[float, float]]
    hard: tuple[Tensor, ...] | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    parser.add_argument(
        "--shapes", default=SHAPES, help=f"m x n r rank, m at most n; default {SHAPES}. Other shapes of the record stay"
    )
    parser.add_argument("--out", type=Path, help="default results/benchmarks/solvers_<device>.json")


def run(asked: argparse.Namespace) -> int:
    """The command: measure, write the record, print the tables. Raises UserError before anything is measured."""
    shapes = parse_shapes(asked.shapes)
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU: use --device cpu, or install a CUDA build of torch.")
    out = asked.out or records.FOLDER / f"solvers_{asked.device}.json"
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # before this process adds to it
    device = torch.device(asked.device)
    machine = records.describe_machine(device, asked.words, ())
    settings = {"device": asked.device, "dtype": "fp32", "condition": CONDITION, "seed": SEED}
    settings |= {"threads": torch.get_num_threads()}
    old = kept(out, settings, machine)

    for shape in shapes:  # what is measured is written: a shape takes up to minutes
        began = time.monotonic()
        lines = measure_shape(shape, device)
        about = {"command": machine["command"], "load_average_before": load, "seconds": time.monotonic() - began}
        old["runs"][str(shape)] = about
        old["lines"] = [line for line in old["lines"] if line["shape"] != str(shape)] + lines
        old["lines"].sort(key=lambda line: size(line["shape"]))
        print(f"{shape}: {about['seconds']:.0f} s", file=sys.stderr, flush=True)
        record = {"format": FORMAT, "kind": "solvers", "settings": settings, "environment": machine, **old}
        records.write(record, out, ("lines",))
    for title, table in solver_tables(records.rounded(record)).items():
        print(f"\n{title}\n{aligned(table)}")
    print(f"\n{out}")
    return 0


def parse_shapes(text: str) -> list[Shape]:
    """``text`` as in 512x1376r128,768x2048r256. Raises UserError."""
    shapes = []
    for word in filter(None, (word.strip() for word in text.split(","))):
        found = re.fullmatch(r"(\d+)x(\d+)r(\d+)", word)
        shape = Shape(*map(int, found.groups())) if found else None
        if shape is None or not 1 <= shape.r < shape.m <= shape.n:
            raise UserError(f"--shapes: {word!r} is no shape: write m x n r rank as in 512x1376r128, rank < m <= n.")
        shapes.append(shape)
    if not shapes:
        raise UserError("--shapes is empty: name at least one, as in 512x1376r128.")
    return list(dict.fromkeys(shapes))


def size(name: str) -> tuple[int, ...]:
    return tuple(int(word) for word in re.findall(r"\d+", name))


def kept(out: Path, settings: dict[str, Any], machine: dict[str, Any]) -> dict[str, Any]:
    """Runs and lines of the record ``out``, if there is one. Raises UserError if its figures are not comparable."""
    if not out.exists():
        return {"runs": {}, "lines": []}
    try:
        found = json.loads(out.read_text(encoding="utf-8"))
        runs, lines, there = found["runs"], found["lines"], found["environment"]
        same = found["settings"] == settings and all(there[k] == machine[k] for k in ("hardware", "versions", "malloc"))
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{out} is not a record of this benchmark: choose another --out.") from None
    if not same:
        raise UserError(
            f"{out} was measured with other hardware, versions or settings: choose another --out, or remove it."
        )
    return {"runs": runs, "lines": lines}


# What is measured -----------------------------------------------------------------------------------------------------


def measure_shape(shape: Shape, device: torch.device) -> list[dict[str, Any]]:
    """Every line of one shape: each task with one matrix and with a batch, then the parts of a refresh."""
    single = draw(shape, 1, device)
    lines = [line for task in tasks(shape, *single) for line in measure_task(task, shape, device)]
    batch = batch_size(shape, device)
    if batch > 1:
        many = draw(shape, batch, device)
        lines += [line for task in tasks(shape, *many) for line in measure_task(task, shape, device)]
    G, U = single
    condition = torch.linalg.cond((G @ (G.mT @ U))[0].double()).item()
    return [*lines, {**refresh_parts(shape, G, U), "condition": condition}]


def batch_size(shape: Shape, device: torch.device) -> int:
    """At most what a step stacks; on a CPU 2 of the largest, whose eigenvectors take seconds."""
    largest = 2 if device.type == "cpu" and shape.m > 1024 else BATCH
    return max(1, min(largest, CHUNK_ENTRIES // (shape.m * shape.n)))


def draw(shape: Shape, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Gradients G [B, m, n], scaled to entries of about 1, and bases U [B, m, r] as Alice's first refresh leaves them."""
    generator = torch.Generator().manual_seed(SEED)
    G = linalg.unit_scale(torch.stack([make_gradient((shape.m, shape.n), generator) for _ in range(batch)]).to(device))
    optimizer, group = make_alice(shape)
    state = {"U": torch.zeros(batch, shape.m, shape.r, device=device)}
    state["Q"] = torch.zeros(batch, shape.r, shape.r, device=device)
    optimizer.refresh(G, state, group, context(1, batch))
    return G, state["U"]


def make_alice(shape: Shape) -> tuple[Alice, dict[str, Any]]:
    p = torch.nn.Parameter(torch.empty(shape.m, shape.n, device="meta"))
    optimizer = Alice([p], rank=shape.r, leading=leading(shape.r), update_interval=STEP)
    return optimizer, optimizer.param_groups[0]


def context(step: int, batch: int) -> Context:
    return Context(step, tuple(f"matrix {i}" for i in range(batch)), transposed=False)


def tasks(shape: Shape, G: Tensor, U: Tensor) -> list[Task]:
    """The four decompositions of a refresh."""
    H = G @ (G.mT @ U)
    Q = linalg.thin_qr(H)
    V = Q.mT @ (G @ (G.mT @ Q))
    wanted = shape.r - max(leading(shape.r), 2 * shape.r - shape.m)
    index = draw_columns(shape.m - shape.r, wanted, context(1, len(G)).generators).to(G.device)
    return [
        Task(
            "qr",
            (H,),
            {
                "qr": linalg.thin_qr,
                "cholesky": cholesky_qr,
                "cholesky_twice": lambda H: cholesky_qr(H, times=2),
                "cholesky_twice_fp64": lambda H: cholesky_qr(H.double(), times=2).to(H),
            },
            qr_errors,
            (ill_conditioned(shape, G.device),),
        ),
        Task(
            "covariance",
            (G,),
            {
                "eigh": lambda G: linalg.top_eigenvectors(G @ G.mT, shape.r),
                "svd": lambda G: torch.linalg.svd(G, full_matrices=False).U[..., : shape.r],
            },
            lambda X, G: eigen_errors(X, G @ G.mT),
        ),
        Task("ritz", (V,), {"eigh": lambda V: linalg.top_eigenvectors(V, shape.r)}, eigen_errors),
        Task(
            "complement",
            (U, index),
            {"reflectors": linalg.complement_columns, "complete_qr": complete_qr},
            complement_errors,
        ),
    ]


def cholesky_qr(H: Tensor, times: int = 1) -> Tensor:
    """H R^(-1) with R^T R = H^T H, again from its result. Its error grows with the square of the condition of H."""
    for _ in range(times):
        R = torch.linalg.cholesky(H.mT @ H, upper=True)
        H = torch.linalg.solve_triangular(R, H, upper=True, left=False)
    return H


def complete_qr(U: Tensor, index: Tensor) -> Tensor:
    """What `linalg.complement_columns` does not form."""
    everything = torch.linalg.qr(U, mode="complete").Q
    return everything.gather(-1, (index + U.shape[-1]).unsqueeze(-2).expand(-1, U.shape[-2], -1))


def ill_conditioned(shape: Shape, device: torch.device) -> Tensor:
    """H [1, m, r] with singular values from 1 to 1 / CONDITION in equal ratios, none of its columns small."""
    generator = torch.Generator().manual_seed(SEED)
    left, right = (
        torch.linalg.qr(torch.randn(rows, shape.r, generator=generator, dtype=torch.float64)).Q
        for rows in (shape.m, shape.r)
    )
    exponents = torch.linspace(0, 1, shape.r, dtype=torch.float64)
    return ((left * CONDITION**-exponents) @ right.mT).float().to(device).unsqueeze(0)


# Accuracy -------------------------------------------------------------------------------------------------------------


def orthogonality(X: Tensor) -> float:
    return largest(X.mT @ X - torch.eye(X.shape[-1], dtype=X.dtype, device=X.device))


def largest(X: Tensor) -> float:
    return X.abs().max().item()


def qr_errors(X: Tensor, H: Tensor) -> tuple[float, float]:
    return orthogonality(X), largest(H - X @ (X.mT @ H)) / largest(H)


def eigen_errors(X: Tensor, A: Tensor) -> tuple[float, float]:
    AX = A @ X
    return orthogonality(X), largest(AX - X * (X * AX).sum(-2)) / largest(A)


def complement_errors(X: Tensor, U: Tensor, index: Tensor) -> tuple[float, float]:
    return orthogonality(X), largest(U.mT @ X)


def errors(task: Task, solve: Solve, inputs: Sequence[Tensor]) -> tuple[float, float] | None:
    """Orthogonality and residual for the first matrix; None if the solver fails."""
    first = [x[:1] for x in inputs]
    try:
        X = solve(*first)[0].double()
    except torch.linalg.LinAlgError:
        return None
    if not torch.isfinite(X).all():
        return None
    return task.errors(X, *(x[0].double() if x.is_floating_point() else x[0] for x in first))


# Time -----------------------------------------------------------------------------------------------------------------


def ways(name: str, solve: Solve, batch: int, device: torch.device) -> dict[tuple[str, str], Solve]:
    """(solver, way to call it) -> function. GaLore's SVD is called as galore-torch does, a matrix at a time."""
    found: dict[tuple[str, str], Solve] = {(name, "single"): solve}
    if batch > 1:
        found = {(name, "batched"): solve, (name, "looped"): looped(solve)}
        if name == "svd":
            del found[name, "batched"]
    if device.type != "cpu":
        found[name, "on the CPU"] = through_cpu(solve)
    return found


def looped(solve: Solve) -> Solve:
    return lambda *X: torch.cat([solve(*(x[i : i + 1] for x in X)) for i in range(len(X[0]))])


def through_cpu(solve: Solve) -> Solve:
    return lambda *X: solve(*(x.cpu() for x in X)).to(X[0].device)


def measure_task(task: Task, shape: Shape, device: torch.device) -> list[dict[str, Any]]:
    """A line for each solver and way, called in turn; those that are slow fall out early."""
    batch = len(task.inputs[0])
    if batch > 1 and device.type == "cpu" and shape.m > 1024:
        names = [name for name in task.solvers if name != "svd"]  # a loop of one more, tens of seconds each
    else:
        names = list(task.solvers)
    callers = {key: f for name in names for key, f in ways(name, task.solvers[name], batch, device).items()}
    samples: dict[tuple[str, str], list[float]] = {}
    counts: dict[tuple[str, str], int] = {}
    for key, solve in callers.items():
        try:
            first = timed(solve, task.inputs, device)
        except torch.linalg.LinAlgError:
            samples[key], counts[key] = [], 0
            continue
        counts[key] = calls(first)
        samples[key] = [] if counts[key] >= LEAST else [first]  # of slow ones the first counts as well
    for _ in range(MOST):
        for key, solve in callers.items():
            if len(samples[key]) < counts[key]:
                samples[key].append(timed(solve, task.inputs, device))
    usual = "batched" if batch > 1 and device.type in BATCHED_DEVICES else "looped" if batch > 1 else "single"
    lines = []
    for (name, way), ms in samples.items():
        line: dict[str, Any] = {"shape": str(shape), "task": task.name, "batch": batch, "solver": name, "way": way}
        line |= {"used": name == names[0] and way == usual, "ms": statistics.median(ms) / batch if ms else None}
        line["samples_ms"] = [round(x / batch, 4) for x in ms]
        line["orthogonality"], line["residual"] = errors(task, callers[name, way], task.inputs) or (None, None)
        if task.hard is not None and batch == 1:
            hard = errors(task, callers[name, way], task.hard) or (None, None)
            line["hard_orthogonality"], line["hard_residual"] = hard
        lines.append(line)
    return lines


def timed(solve: Solve, inputs: Sequence[Tensor], device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    solve(*inputs)
    synchronize(device)
    return 1000 * (time.perf_counter() - began)


def calls(ms: float) -> int:
    """How many calls that take ``ms`` each count."""
    return max(1, min(MOST, int(1000 * SECONDS / max(ms, 1e-3))))


# A refresh, taken apart -----------------------------------------------------------------------------------------------

PARTS = ("products", "qr", "ritz", "switch")


def refresh_parts(shape: Shape, G: Tensor, U: Tensor) -> dict[str, Any]:
    """Alice's own `refresh` of one matrix at a later update time: milliseconds as a whole, and of its parts.

    The parts are timed within it: (1) products with Q, (2) thin QR, (3) eigenvectors of the Ritz matrix, (4) the switch.
    On a GPU that means waiting for the device after each, so the whole is timed by itself as well.
    """
    optimizer, group = make_alice(shape)
    sigma = U.mT @ G
    before = {"U": U, "Q": (1 - group["betas"][2]) * (sigma @ sigma.mT)}
    clock = Stopwatch(G.device)

    def refresh() -> Tensor:
        optimizer.refresh(G, state := dict(before), group, context(STEP, len(G)))
        return state["U"]

    def iterate(A: Callable[[Tensor], Tensor], U: Tensor) -> Tensor:
        return subspace_iteration(clock.watch("products", A), U)

    count = calls(timed(refresh, (), G.device))
    whole = [timed(refresh, (), G.device) for _ in range(count)]
    subspace_iteration = linalg.subspace_iteration
    laps: list[dict[str, float]] = []
    with (
        patch.object(alice, "subspace_iteration", iterate),
        patch.object(linalg, "thin_qr", clock.watch("qr", linalg.thin_qr)),
        patch.object(linalg, "top_eigenvectors", clock.watch("ritz", linalg.top_eigenvectors)),
        patch.object(alice, "switch", clock.watch("switch", alice.switch)),
    ):
        for _ in range(count):
            clock.ms = dict.fromkeys(PARTS, 0.0)
            all_of_it = timed(refresh, (), G.device)
            laps.append({**clock.ms, "rest": all_of_it - sum(clock.ms.values())})
    parts = {name: statistics.median(lap[name] for lap in laps) for name in (*PARTS, "rest")}
    line: dict[str, Any] = {"shape": str(shape), "task": "refresh", "batch": 1, "ms": statistics.median(whole)}
    return line | {"parts_ms": parts, "samples_ms": [round(x, 4) for x in whole]}


class Stopwatch:
    """Adds up the milliseconds of the functions it watches."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ms = dict.fromkeys(PARTS, 0.0)

    def watch(self, name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def watched(*args: Any) -> Tensor:
            synchronize(self.device)
            began = time.perf_counter()
            result = function(*args)
            synchronize(self.device)
            self.ms[name] += 1000 * (time.perf_counter() - began)
            return result

        return watched
