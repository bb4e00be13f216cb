"""What a step of divided matrices sends, and how long it takes: on the processes of one torchrun, with gloo, on CPUs.

    torchrun --nproc_per_node 2 scripts/scaling.py measure --model llama_tiny

Every rank has one thread. The matrices are those of a model's attention and MLP layers, the gradients those of
`benchmarking.optimizers`, equal on all ranks, as after DDP's sum. A time is that of the slowest rank, from a barrier on. In
each round everybody has a turn, in rotating order; steps that refresh bases are timed in rounds of their own. Messages are
counted by wrapping torch.distributed, and must be those that shapes say.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.errors import UserError
from optimizers import partition
from optimizers.memory import RANKS, llama, measured_state_bytes
from optimizers.sharding import Owners, is_sharded, shard
from pretraining.config import choices, compose
from pretraining.parallel import ELEMENTWISE
from pretraining.record import environment
from pretraining.throughput import keep_freed_memory
from reporting.scaling import FORMAT

from . import record as records
from .optimizers import DTYPES, SEED, make_gradient
from .peers import LR, ours
from .traffic import Traffic, ddp_traffic, fsdp2_traffic

FOLDER = Path(__file__).resolve().parent.parent / "results" / "scaling"
METHODS = ("adam", "racs", "alice", "muon", "galore", "soap")
ADAM_GROUP = "adam_group"
SLOW_MS = 4_000  # steps that take longer are repeated SLOW_REPEATS times
SLOW_REPEATS = 3
PRODUCT_SIDE = 512  # of the products behind which weights travel
Shapes = dict[str, tuple[int, int]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="llama_60m", help="whose matrices: a file of configs/model; llama_60m")
    parser.add_argument(
        "--only", default="", help=f"some of {','.join((*METHODS, ADAM_GROUP))}, as in adam,alice; default all"
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of weights and gradients; default fp32")
    parser.add_argument("--repeats", type=int, default=10, help="rounds; default 10")
    parser.add_argument("--out", type=Path, help="default results/scaling/<model>_<processes>.json")


def run(asked: argparse.Namespace, words: Sequence[str]) -> int:
    """The command, on every rank; the first writes the record. Raises UserError before anything is measured."""
    names = [name.strip() for name in asked.only.split(",") if name.strip()] or [*METHODS, ADAM_GROUP]
    if wrong := [name for name in names if name not in (*METHODS, ADAM_GROUP)]:
        raise UserError(f"{wrong[0]} is not measured here: choose --only from {', '.join((*METHODS, ADAM_GROUP))}.")
    if asked.model not in choices("model"):
        raise UserError(f"There is no model {asked.model!r}: choose one of {', '.join(choices('model'))}.")
    if asked.repeats < 1:
        raise UserError("--repeats must be at least 1: choose a larger number.")
    if "RANK" not in os.environ:
        raise UserError("Start this with torchrun: torchrun --nproc_per_node 2 scripts/scaling.py measure.")
    dist.init_process_group("gloo")
    try:
        return _run(asked, words, names)
    finally:
        gc.collect()  # optimizers and their owners hold each other and the group, whose threads must end before Python does
        dist.destroy_process_group()


def _run(asked: argparse.Namespace, words: Sequence[str], names: list[str]) -> int:
    ranks, began = dist.get_world_size(), time.monotonic()
    out = asked.out or FOLDER / f"{asked.model}_{ranks}.json"
    records.refuse_to_lose(out, names)
    torch.set_num_threads(1)
    kept = keep_freed_memory()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    machine = environment(torch.device("cpu"), ranks, load_average_before=load)
    machine["command"] = f"torchrun --nproc_per_node {ranks} " + records.command(
        words, "scripts/scaling.py"
    ).removeprefix("python ")
    model = partition(llama(compose([f"model={asked.model}"]).model, device="meta"), verbose=False)
    shapes: Shapes = {name: (p.shape[0], p.shape[1]) for name, p in model[0]["params"]}
    dtype = DTYPES[asked.dtype]
    rank = min(RANKS[asked.model], *(min(shape) for shape in shapes.values()))
    lines = [
        measure_adam_group([p.shape for _, p in model[1]["params"]], dtype, asked.repeats)
        if name == ADAM_GROUP
        else measure_method(name, shapes, dtype, rank, asked.repeats)
        for name in names
    ]
    if dist.get_rank() == 0:
        record = {
            "format": FORMAT,
            "kind": "scaling",
            "settings": {
                "model": asked.model,
                "processes": ranks,
                "cores": os.cpu_count(),
                "threads": 1,
                "dtype": asked.dtype,
                "matrices": len(shapes),
                "parameters": sum(m * n for m, n in shapes.values()),
                "rank": rank,
                "repeats": asked.repeats,
                "keeps_freed_memory": kept,
                "seconds": time.monotonic() - began,
            },
            "environment": machine,
            "contestants": lines,
        }
        records.write(record, out)
        print(f"{record['settings']['seconds']:.0f} s: {out}", flush=True)  # type: ignore[index]
    return 0


# Messages -------------------------------------------------------------------------------------------------------------


@contextmanager
def counted() -> Iterator[Traffic]:
    """What this rank sends and receives inside, by broadcasts and all-to-alls among all ranks.

    Of a broadcast the source sends the tensor once, whatever the backend makes of it, and everybody else receives it; what a
    rank keeps of its own part of an all-to-all does not count.
    """
    traffic, rank = Traffic(), dist.get_rank()
    broadcast, all_to_all = dist.broadcast, dist.all_to_all_single

    def count_broadcast(
        tensor: Tensor, src: Any = None, group: Any = None, async_op: bool = False, group_src: Any = None
    ) -> Any:
        own = rank == (src if group_src is None else group_src)
        traffic.add(tensor.nbytes if own else 0, 0 if own else tensor.nbytes)
        return broadcast(tensor, src, group, async_op, group_src)

    def count_all_to_all(
        output: Tensor, input: Tensor, receives: Any, sends: Any, group: Any = None, async_op: bool = False
    ) -> Any:
        size = input.element_size()
        traffic.add(size * (sum(sends) - sends[rank]), size * (sum(receives) - receives[rank]))
        return all_to_all(output, input, receives, sends, group, async_op)

    dist.broadcast, dist.all_to_all_single = count_broadcast, count_all_to_all  # type: ignore[assignment]
    try:
        yield traffic
    finally:
        dist.broadcast, dist.all_to_all_single = broadcast, all_to_all


# Turns ----------------------------------------------------------------------------------------------------------------


@dataclass
class Layout:
    """One optimizer on one layout of the weights."""

    optimizer: torch.optim.Optimizer
    params: list[Tensor]
    owners: Owners | None = None

    @property
    def interval(self) -> int | None:
        """K; None for a method that does the same at every step."""
        return self.optimizer.param_groups[0].get("update_interval")

    def prepare(self, refresh: bool) -> None:
        """Let the next step be a refresh or an ordinary one: counters of steps are set, states stay."""
        if self.interval is None:
            return
        later = self.optimizer.param_groups[0]["update_times"] == "zero_based"
        t = self.interval + later if refresh else 2
        for state in self.optimizer.state.values():
            state["step"] = t - 1

    def step(self) -> None:
        self.optimizer.step()

    def travel(self) -> None:
        """The messages of a step, without its arithmetic."""
        assert self.owners is not None
        for team in self.owners.teams:
            if is_sharded(self.params[0]):
                weights = {p: p.detach() for p in team.params}
                whole = team.collect(weights)
                team.collect({p: p.grad for p in team.params if p.grad is not None})
                team.deliver(whole, weights)
            else:
                for work in team.broadcast(set(team.params)):
                    work.wait()


def timed(work: Callable[[], object]) -> float:
    """Milliseconds from a barrier until ``work`` has ended on this rank."""
    dist.barrier()
    began = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - began)


def slowest(ms: float) -> float:
    """Of all ranks."""
    x = torch.tensor(ms, dtype=torch.float64)
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x.item()


def in_turns(turns: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """``repeats`` rounds; in each, everybody once, in rotating order: name -> milliseconds of the slowest rank."""
    found: dict[str, list[float]] = {name: [] for name in turns}
    names = list(turns)
    gc.collect()
    gc.disable()
    try:
        for number in range(repeats):
            start = number % len(names)
            for name in [*names[start:], *names[:start]]:
                found[name].append(round(slowest(turns[name]()), 3))
    finally:
        gc.enable()
    return found


def everywhere(value: int) -> list[int]:
    """Every rank's."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def messages(layout: Layout, expected: list[Traffic]) -> dict[str, Any]:
    """What an ordinary step sends, counted; raises if shapes say something else."""
    layout.prepare(refresh=False)
    with counted() as traffic:
        layout.step()
    if traffic != expected[dist.get_rank()]:
        raise RuntimeError(
            f"a step sent {traffic}, and the shapes say {expected[dist.get_rank()]}: one of the two is wrong."
        )
    return {
        "calls": traffic.calls,
        "sent_bytes": everywhere(traffic.sent),
        "received_bytes": everywhere(traffic.received),
        "state_bytes": everywhere(measured_state_bytes(layout.optimizer)),
    }


# Matrices -------------------------------------------------------------------------------------------------------------


def measure_method(name: str, shapes: Shapes, dtype: torch.dtype, rank: int, repeats: int) -> dict[str, Any]:
    """The line of one method in the record."""
    ranks = dist.get_world_size()
    layouts = make_layouts(name, shapes, dtype, rank)
    for layout in layouts.values():
        layout.step()  # states and first bases
        layout.prepare(refresh=False)
        layout.step()
    slow = slowest(_ordinary(layouts["replicated"])) > SLOW_MS
    turns: dict[str, Callable[[], float]] = {}
    for key, layout in layouts.items():
        turns[f"{key}.step_ms"] = partial(_ordinary, layout)
        if layout.owners is not None:
            turns[f"{key}.travel_ms"] = partial(timed, layout.travel)
    if "ddp" in layouts:
        work = products(layouts["ddp"])
        turns["ddp.products_ms"] = partial(timed, work)
        turns["ddp.overlapped_ms"] = partial(_overlapped, layouts["ddp"], work)
    times = in_turns(turns, SLOW_REPEATS if slow else repeats)
    interval = layouts["replicated"].interval
    if interval is not None:
        refreshes = {f"{key}.refresh_ms": partial(_refresh, x) for key, x in layouts.items()}
        first = in_turns(refreshes, 1)
        slow = first["replicated.refresh_ms"][0] > SLOW_MS
        more = in_turns(refreshes, (SLOW_REPEATS if slow else repeats) - 1)
        times |= {key: first[key] + more[key] for key in refreshes}
    sizes = list(shapes.values())
    itemsize = dtype.itemsize
    expected = {
        "replicated": [Traffic()] * ranks,
        "ddp": ddp_traffic(sizes, ranks, itemsize),
        "fsdp2": [Traffic()] * ranks if name in ELEMENTWISE else fsdp2_traffic(sizes, ranks, itemsize),
    }
    line: dict[str, Any] = {"name": name, "interval": interval}
    for key, layout in layouts.items():
        own = {k.partition(".")[2]: ms for k, ms in times.items() if k.startswith(f"{key}.")}
        line[key] = {**messages(layout, expected[key]), **own}
    return line


def _ordinary(layout: Layout) -> float:
    layout.prepare(refresh=False)
    return timed(layout.step)


def _refresh(layout: Layout) -> float:
    layout.prepare(refresh=True)
    return timed(layout.step)


def make_layouts(name: str, shapes: Shapes, dtype: torch.dtype, rank: int) -> dict[str, Layout]:
    """``replicated``: every rank updates everything; with more than one rank ``ddp``: owners; ``fsdp2``: owners of shards."""
    generator = torch.Generator().manual_seed(SEED)
    weights = {key: (0.02 * torch.randn(shape, generator=generator)).to(dtype) for key, shape in shapes.items()}
    gradients = [make_gradient(shape, generator).to(dtype) for shape in shapes.values()]
    contestant = ours(name)
    found = {}
    for key in ("replicated", "ddp", "fsdp2") if dist.get_world_size() > 1 else ("replicated",):
        params = _sharded(weights) if key == "fsdp2" else [nn.Parameter(W.clone()) for W in weights.values()]
        for p, G in zip(params, gradients, strict=True):
            p.grad = _shard_of(G, p) if key == "fsdp2" else G
        optimizer = contestant.make(list(zip(weights, params, strict=True)), rank)
        divides = key == "ddp" or (key == "fsdp2" and name not in ELEMENTWISE)
        found[key] = Layout(optimizer, list(params), shard(optimizer) if divides else None)
    return found


def _sharded(weights: Mapping[str, Tensor]) -> list[nn.Parameter]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module = nn.Module()
    for i, W in enumerate(weights.values()):
        module.register_parameter(f"W{i}", nn.Parameter(W.clone()))
    fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return list(module.parameters())


def _shard_of(G: Tensor, p: Any) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(G, p.device_mesh, p.placements)


def products(layout: Layout) -> Callable[[], None]:
    """Products of matrices that take about as long as the weights travel: what a forward pass would be."""
    A, B = torch.randn(PRODUCT_SIDE, PRODUCT_SIDE), torch.randn(PRODUCT_SIDE, PRODUCT_SIDE)
    out = A @ B
    one = slowest(min(timed(lambda: torch.matmul(A, B, out=out)) for _ in range(5)))
    count = max(1, round(min(slowest(timed(layout.travel)) for _ in range(3)) / one))

    def work() -> None:
        for _ in range(count):
            torch.matmul(A, B, out=out)

    return work


def _overlapped(layout: Layout, work: Callable[[], None]) -> float:
    """A step whose weights travel while ``work`` is done."""
    owners = layout.owners
    assert owners is not None

    def both() -> None:
        layout.step()
        work()
        owners.wait()

    layout.prepare(refresh=False)
    owners.overlap = True
    ms = timed(both)
    owners.overlap = False
    return ms


# Embeddings, norms, last layer ----------------------------------------------------------------------------------------


def measure_adam_group(shapes: Sequence[torch.Size], dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Fused AdamW on what ``partition`` leaves to Adam: on every rank; by ZeroRedundancyOptimizer; by owners (``shard``)."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    generator = torch.Generator().manual_seed(SEED)
    weights = [(0.02 * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]
    gradients = [(1e-3 * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]

    def make(cls: Callable[..., torch.optim.Optimizer], **options: Any) -> torch.optim.Optimizer:
        params = [nn.Parameter(W.clone()) for W in weights]
        for p, G in zip(params, gradients, strict=True):
            p.grad = G
        return cls(params, lr=LR, weight_decay=0.0, fused=True, **options)

    optimizers = {"replicated": make(torch.optim.AdamW)}
    if dist.get_world_size() > 1:
        optimizers["zero"] = make(ZeroRedundancyOptimizer, optimizer_class=torch.optim.AdamW)
        optimizers["owners"] = make(torch.optim.AdamW)
        shard(optimizers["owners"])
    line: dict[str, Any] = {
        "name": ADAM_GROUP,
        "tensors": len(shapes),
        "parameters": sum(W.numel() for W in weights),
    }
    for key, optimizer in optimizers.items():
        for _ in range(2):
            optimizer.step()
        with counted() as traffic:
            optimizer.step()
        inner = optimizer.optim if key == "zero" else optimizer  # type: ignore[attr-defined]
        line[key] = {
            "calls": traffic.calls,
            "sent_bytes": everywhere(traffic.sent),
            "received_bytes": everywhere(traffic.received),
            "state_bytes": everywhere(measured_state_bytes(inner)),
        }
    times = in_turns({key: partial(timed, x.step) for key, x in optimizers.items()}, repeats)
    for key, ms in times.items():
        line[key]["step_ms"] = ms
    return line
