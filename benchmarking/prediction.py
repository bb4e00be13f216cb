"""What the optimizer's step of large models costs on clusters: a prediction from shapes and data sheets, nothing measured.

    everything()     rows for the tables and the figure of docs/scaling.md

Arithmetic is that of `benchmarking.bounds`, at a part of what a data sheet promises; owners, rounds and bytes are those of
optimizers/sharding.py; a message costs its bytes at a part of the link's rate and NCCL's own estimate of latencies. Nothing
overlaps but gradients (and FSDP2's weights) with the backward (and forward) pass.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import ceil, log2
from typing import Any

import torch
from torch.nn import Parameter

from optimizers import partition
from optimizers.base import CHUNK_ENTRIES
from optimizers.memory import RANKS, llama, state_bytes
from pretraining.config import compose
from pretraining.throughput import PEAK_FLOPS, flops_per_token

from .bounds import WORK
from .peers import ours
from .traffic import Shape, costs, owners_of, rounds

METHODS = ("adam", "racs", "alice", "galore", "muon", "soap")
LAYOUTS = ("replicated", "all", "node", "fsdp2", "hsdp")
SIZES = ("llama_1b", "llama_7b")
GPUS = (8, 16, 32, 64, 128, 256, 512)
NODE = 8
TOKENS, LENGTH = 131_072, 256  # 512 rows of 256: a step of the paper
BYTES = 2  # bfloat16 weights, gradients and states
GB, US, MS = 1e9, 1e-6, 1e-3


@dataclass(frozen=True)
class Machine:
    """Peaks of a GPU by its data sheet: FLOP/s; bytes/s of its memory, to the node (one direction), to the network."""

    name: str
    bf16: float
    fp32: float
    memory: float
    nvlink: float
    network: float


MACHINES = (
    Machine("A100", PEAK_FLOPS["A100"], 19.5e12, 2039 * GB, 300 * GB, 25 * GB),
    Machine("H100", PEAK_FLOPS["H100"], 67e12, 3350 * GB, 450 * GB, 50 * GB),
)


@dataclass(frozen=True)
class Assumptions:
    """What no data sheet says. Latencies in seconds."""

    mfu: float = 0.4  # of forward and backward pass
    arithmetic: float = 0.5  # part of the peaks that an optimizer's step reaches, products and memory
    solver: float = 0.02  # part of the float32 peak that eigenvectors and QR reach
    links: float = 0.8  # part of the links' rates
    launches: float = 300 * US  # of a batch of equal matrices: 60 kernels
    base: float = 8.4 * US  # of a collective
    hop: float = 3.4 * US  # from rank to rank of a ring, within a node
    network_hop: float = 14.0 * US  # and between nodes
    peer: float = 1.0 * US  # of each partner of an all-to-all
    bucket: float = 25 * 2**20  # bytes of gradients that DDP sums at a time


ASSUMED = Assumptions()

# label, A100, H100, source: every constant of the prediction
CONSTANTS = (
    ("bfloat16 products, TFLOP/s", "312", "989", "NVIDIA data sheets, SXM, dense"),
    ("float32 products, TFLOP/s", "19.5", "67", "NVIDIA data sheets, without TF32"),
    ("memory, GB/s", "2,039", "3,350", "NVIDIA data sheets, 80 GB"),
    ("NVLink, one direction, GB/s", "300", "450", "half of the data sheets' 600 and 900"),
    ("InfiniBand, per GPU, GB/s", "25", "50", "200 and 400 Gbit/s: DGX A100 and DGX H100, a port for each GPU"),
    ("latency of a collective, us", "8.4", "8.4", "NCCL's tuning table (src/graph/tuning.cc): ring, Simple"),
    ("latency of a hop, NVLink / network, us", "3.4 / 14", "3.4 / 14", "the same table"),
    ("forward and backward pass, MFU", "0.4", "0.4", "assumption"),
    ("part of a link's rate", "0.8", "0.8", "assumption"),
    ("part of the peaks in an optimizer's step", "0.5", "0.5", "assumption; on a CPU Adam 0.87, Alice 0.65, RACS 0.13 in "
     "float32, and 0.69, 0.12, 0.06 in bfloat16"),
    ("part of the float32 peak in EVD and QR", "0.02", "0.02", "assumption"),
    ("launches for each batch of equal matrices, ms", "0.3", "0.3", "assumption: 60 kernels of 5 us"),
    ("each partner in an all-to-all, us", "1", "1", "assumption"),
)  # fmt: skip


@dataclass(frozen=True)
class Model:
    """Shapes of the matrices, numbers that Adam updates, all parameters, layers, FLOP of a token, r."""

    name: str
    shapes: tuple[Shape, ...]
    adam: int
    parameters: int
    layers: int
    flops: float
    rank: int


@cache
def model(name: str) -> Model:
    cfg = compose([f"model={name}"]).model
    network = llama(cfg, device="meta")
    matrices, adam = partition(network, verbose=False)
    parameters = sum(p.numel() for p in network.parameters())
    return Model(
        name,
        tuple((p.shape[0], p.shape[1]) for _, p in matrices["params"]),
        sum(p.numel() for _, p in adam["params"]),
        parameters,
        cfg.num_hidden_layers,
        flops_per_token(cfg, parameters, LENGTH),
        RANKS[name],
    )


# Arithmetic -----------------------------------------------------------------------------------------------------------


@cache
def interval(method: str) -> int | None:
    clock = ours(method).clock
    return clock.interval if clock else None


@cache
def matrix_seconds(method: str, shape: Shape, rank: int, gpu: Machine, a: Assumptions) -> tuple[float, float]:
    """An ordinary step of one matrix, and what a refresh adds."""
    m, n = sorted(shape)
    work = WORK[method](m, n, rank)
    numbers = BYTES * work.numbers + 4 * work.float32
    if method == "racs":  # its ten products read G^2, which no cache holds for a whole batch; made once
        numbers += 4 * 11 * m * n
    seconds = numbers / (gpu.memory * a.arithmetic)
    for product in work.products:
        seconds += product.operations / ((gpu.bf16 if product.bfloat16 else gpu.fp32) * a.arithmetic)
    products, solver = refresh_work(method, m, n, rank)
    return seconds, products / (gpu.fp32 * a.arithmetic) + solver / (gpu.fp32 * a.solver)


def refresh_work(method: str, m: int, n: int, r: int) -> tuple[float, float]:
    """FLOP of products, and of decompositions: 9 m^3 for all eigenvectors, 4 m r^2 for an orthogonal factor [m, r]."""
    if method == "alice":  # Q U twice; QR, the Ritz matrix [r, r], columns of the complement
        return 8 * m * n * r + 12 * m * r * r + 4 * r**3, 8 * m * r * r + 9 * r**3
    if method == "galore":  # G G^T
        return 2 * m * m * n, 9 * m**3
    if method == "soap":  # the covariances belong to every step
        return 0, 9 * m**3 + 9 * n**3
    return 0, 0


def arithmetic(method: str, shapes: Iterable[Shape], rank: int, gpu: Machine, a: Assumptions) -> float:
    """Seconds of a step on these matrices, refreshes spread over all steps."""
    every = interval(method)
    total = 0.0
    for shape, count in Counter(shapes).items():
        step, refresh = matrix_seconds(method, shape, rank, gpu, a)
        total += count * (step + (refresh / every if every else 0))
        if method != "adam":  # whose kernel takes all tensors at once
            total += a.launches * ceil(count / max(1, CHUNK_ENTRIES // (shape[0] * shape[1])))
    return total


@cache
def divided(shapes: tuple[Shape, ...], ranks: int) -> tuple[tuple[Shape, ...], ...]:
    """Each rank's matrices."""
    own: dict[int, list[Shape]] = defaultdict(list)
    for shape, owner in zip(shapes, owners_of(shapes, ranks), strict=True):
        own[owner].append(shape)
    return tuple(tuple(own[rank]) for rank in range(ranks))


def busiest(method: str, m: Model, ranks: int, gpu: Machine, a: Assumptions) -> float:
    """Seconds of the rank that has most to do."""
    return max(arithmetic(method, own, m.rank, gpu, a) for own in set(divided(m.shapes, ranks)))


def adam_group(m: Model, gpu: Machine, a: Assumptions) -> float:
    """Embedding, norms and last layer: read weight, gradient and two moments, write three."""
    return 7 * m.adam * BYTES / (gpu.memory * a.arithmetic)


# Messages -------------------------------------------------------------------------------------------------------------


def ring(ranks: int, gpu: Machine, a: Assumptions) -> tuple[float, float]:
    """Bytes/s through a ring of all ranks, all ports of a node in use, and the latency of its ranks - 1 hops."""
    nodes = ceil(ranks / NODE)
    rate = a.links * (gpu.nvlink if nodes == 1 else min(gpu.nvlink, NODE * gpu.network))
    return rate, (ranks - nodes) * a.hop + (nodes - 1) * a.network_hop


def broadcasts(shapes: Sequence[Shape], ranks: int, gpu: Machine, a: Assumptions) -> float:
    """The matrices one after the other, each from its owner to all: NCCL's broadcast is a ring."""
    rate, latency = ring(ranks, gpu, a)
    return sum(a.base + latency + BYTES * m * n / rate for m, n in shapes)


def exchanges(shapes: Sequence[Shape], ranks: int, gpu: Machine, a: Assumptions) -> float:
    """FSDP2: in each round weights, then gradients, to their owners, and weights back."""
    owners = owners_of(shapes, ranks)
    near = (min(ranks, NODE) - 1) / (ranks - 1)  # part of what travels that stays within the node
    total = 0.0
    for some in rounds(shapes, owners, ranks):
        whole: dict[int, int] = defaultdict(int)
        for i in some:
            whole[owners[i]] += BYTES * shapes[i][0] * shapes[i][1]
        most = max(*whole.values(), sum(whole.values()) // ranks, 0) * (ranks - 1) / ranks
        seconds = max(near * most / gpu.nvlink, (1 - near) * most / gpu.network) / a.links
        latency = a.base + (a.hop if ranks <= NODE else a.network_hop) + (ranks - 1) * a.peer
        total += 3 * (seconds + latency)
    return total


def all_reduce(size: float, ranks: int, gpu: Machine, a: Assumptions) -> float:
    """Within nodes and, an eighth by each port, between them at the same time; in DDP's buckets."""
    nodes = ceil(ranks / NODE)
    inside = 2 * (NODE - 1) / NODE * size / gpu.nvlink
    between = 2 * (nodes - 1) / nodes * size / NODE / gpu.network
    latency = a.base + 2 * (NODE - 1) * a.hop + 2 * log2(nodes) * a.network_hop
    return max(inside, between) / a.links + ceil(size / a.bucket) * latency


# A step ---------------------------------------------------------------------------------------------------------------


def forward_backward(m: Model, ranks: int, gpu: Machine, a: Assumptions, tokens: int = TOKENS) -> float:
    """At the stated MFU, and not faster than memory gives three times the weights and takes the gradients."""
    return max(m.flops * tokens / (ranks * gpu.bf16 * a.mfu), 4 * BYTES * m.parameters / gpu.memory)


def gradients(m: Model, ranks: int, gpu: Machine, a: Assumptions) -> float:
    """What is left of the sum of gradients when the backward pass, two thirds of the time, has ended."""
    size = BYTES * m.parameters
    last = all_reduce(a.bucket, ranks, gpu, a)
    return max(last, all_reduce(size, ranks, gpu, a) - 2 / 3 * forward_backward(m, ranks, gpu, a))


def gathers(m: Model, ranks: int, gpu: Machine, a: Assumptions) -> float:
    """FSDP2: what is left of gathering weights twice and scattering gradients, layer by layer, beside both passes."""
    rate, latency = ring(ranks, gpu, a)
    one = BYTES * m.parameters * (ranks - 1) / ranks / rate + m.layers * (a.base + latency)
    return max(one / m.layers, 3 * one - forward_backward(m, ranks, gpu, a))


def optimizer(method: str, m: Model, layout: str, ranks: int, gpu: Machine, a: Assumptions = ASSUMED) -> float:
    """Seconds of the optimizer's step: arithmetic of the busiest rank, then messages; the Adam group included."""
    others = adam_group(m, gpu, a)
    if layout == "replicated":
        return arithmetic(method, m.shapes, m.rank, gpu, a) + others
    team = NODE if layout in ("node", "hsdp") else ranks
    if layout in ("fsdp2", "hsdp"):
        others /= team
        if method == "adam":  # on the shards
            return arithmetic(method, m.shapes, m.rank, gpu, a) / team + others
        return busiest(method, m, team, gpu, a) + exchanges(m.shapes, team, gpu, a) + others
    return busiest(method, m, team, gpu, a) + broadcasts(m.shapes, team, gpu, a) + others


@cache
def matrix_state_bytes(method: str, shape: Shape, rank: int) -> int:
    p = Parameter(torch.empty(shape, dtype=torch.bfloat16, device="meta"))
    return state_bytes(ours(method).make([("W", p)], rank))[0]


def rank_state_bytes(method: str, m: Model, layout: str, ranks: int) -> int:
    """Of the rank that has most; the Adam group's two moments included."""
    others = 2 * BYTES * m.adam
    if layout == "replicated":
        return sum(matrix_state_bytes(method, shape, m.rank) for shape in m.shapes) + others
    team = NODE if layout in ("node", "hsdp") else ranks
    if layout in ("fsdp2", "hsdp"):
        others = ceil(others / team)
        if method == "adam":
            return ceil(2 * BYTES * sum(x * y for x, y in m.shapes) / team) + others
    parts = set(divided(m.shapes, team))
    return max(sum(matrix_state_bytes(method, shape, m.rank) for shape in own) for own in parts) + others


# Tables ---------------------------------------------------------------------------------------------------------------


def everything() -> dict[str, Any]:
    """Rows of dictionaries: ``times``, ``steps``, ``division``, ``states``, ``tokens``; and ``constants``."""
    models = [model(name) for name in SIZES]
    cases = [(m, gpu, ranks) for m in models for gpu in MACHINES for ranks in GPUS]
    times = [
        {
            "model": m.name,
            "gpu": gpu.name,
            "ranks": ranks,
            "method": method,
            **{layout: optimizer(method, m, layout, ranks, gpu) / MS for layout in LAYOUTS},
            "doubt": [[optimizer(method, m, layout, ranks, gpu, a) / MS for layout in LAYOUTS] for a in DOUBTS],
        }
        for m, gpu, ranks in cases
        for method in METHODS
    ]
    steps = [
        {
            "model": m.name,
            "gpu": gpu.name,
            "ranks": ranks,
            "forward_backward": forward_backward(m, ranks, gpu, ASSUMED) / MS,
            "gradients": gradients(m, ranks, gpu, ASSUMED) / MS,
            "gathers": gathers(m, ranks, gpu, ASSUMED) / MS,
        }
        for m, gpu, ranks in cases
    ]
    division = [
        {"model": m.name, "matrices": len(m.shapes), "ranks": ranks, **balance(m, ranks)}
        for m in models
        for ranks in (64, 128, len(m.shapes), 512)
    ]
    states = [
        {
            "model": m.name,
            "method": method,
            **{f"{layout}_{ranks}": rank_state_bytes(method, m, layout, ranks) for layout, ranks in STATE_COLUMNS},
        }
        for m in models
        for method in METHODS
    ]
    return {"times": times, "steps": steps, "division": division, "states": states, "constants": CONSTANTS}


# Arithmetic of the optimizer half and twice as fast, latencies half and twice
DOUBTS = (
    replace(ASSUMED, arithmetic=0.25, solver=0.01, launches=600 * US),
    replace(ASSUMED, arithmetic=1.0, solver=0.04, launches=150 * US),
    replace(ASSUMED, base=4.2 * US, hop=1.7 * US, network_hop=7 * US, peer=0.5 * US),
    replace(ASSUMED, base=16.8 * US, hop=6.8 * US, network_hop=28 * US, peer=2 * US),
)
STATE_COLUMNS = (("replicated", 8), ("node", 8), ("all", 64), ("all", 512), ("fsdp2", 64), ("fsdp2", 512))


def balance(m: Model, ranks: int) -> dict[str, Any]:
    """How evenly ``assign`` divides: the largest load over the mean, ranks without a matrix, rounds of an exchange."""
    owners, weights = owners_of(m.shapes, ranks), costs(m.shapes)
    loads = [0.0] * ranks
    for owner, weight in zip(owners, weights, strict=True):
        loads[owner] += weight
    return {
        "largest": max(loads) * ranks / sum(loads),
        "idle": loads.count(0),
        "speedup": sum(loads) / max(loads),
        "rounds": len(rounds(m.shapes, owners, ranks)),
    }
