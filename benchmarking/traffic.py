"""What a step of divided matrices sends, from shapes alone: who owns what, in which rounds, and how many bytes.

It follows optimizers/sharding.py; `benchmarking.scaling` compares it with what was counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from optimizers.sharding import ROUND_ENTRIES, assign, cost

Shape = tuple[int, int]


@dataclass
class Traffic:
    """Of one rank in one step: collective calls, bytes that it sends (a broadcast counts once) and receives."""

    calls: int = 0
    sent: int = 0
    received: int = 0

    def add(self, sent: int, received: int) -> None:
        self.calls += 1
        self.sent += sent
        self.received += received


def costs(shapes: Sequence[Shape]) -> list[int]:
    return [cost(torch.empty(shape, device="meta")) for shape in shapes]


def owners_of(shapes: Sequence[Shape], ranks: int) -> list[int]:
    """The owner of each matrix."""
    return list(_owners_of(tuple(shapes), ranks))


@cache
def _owners_of(shapes: tuple[Shape, ...], ranks: int) -> list[int]:
    return assign(costs(shapes), ranks)


def ddp_traffic(shapes: Sequence[Shape], ranks: int, itemsize: int) -> list[Traffic]:
    """Of each rank, weights replicated: a broadcast for each matrix."""
    found = [Traffic() for _ in range(ranks)]
    for (m, n), owner in zip(shapes, owners_of(shapes, ranks), strict=True):
        for rank, traffic in enumerate(found):
            size = m * n * itemsize
            traffic.add(*((size, 0) if rank == owner else (0, size)))
    return found


def rounds(shapes: Sequence[Shape], owners: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices of the matrices that travel together: by turns of the owners, in rounds of ROUND_ENTRIES on each rank."""
    turns: dict[int, int] = {}
    keys = []
    for owner in owners:
        keys.append((turns.get(owner, 0), owner))
        turns[owner] = turns.get(owner, 0) + 1
    found: list[list[int]] = []
    entries = ROUND_ENTRIES * ranks
    for i in sorted(range(len(shapes)), key=keys.__getitem__):
        if entries >= ROUND_ENTRIES * ranks:
            found.append([])
            entries = 0
        found[-1].append(i)
        entries += shapes[i][0] * shapes[i][1]
    return found


def rows_of(rows: int, rank: int, ranks: int) -> int:
    """How many of the ``rows`` lie on ``rank``, as torch.chunk divides them."""
    length = -(-rows // ranks)
    return max(0, min(length, rows - rank * length))


def fsdp2_traffic(shapes: Sequence[Shape], ranks: int, itemsize: int) -> list[Traffic]:
    """Of each rank, weights sharded by rows: in each round weights and gradients go to the owners, weights come back."""
    owners = owners_of(shapes, ranks)
    found = [Traffic() for _ in range(ranks)]
    for some in rounds(shapes, owners, ranks):
        for rank, traffic in enumerate(found):
            to_owners = sum(rows_of(shapes[i][0], rank, ranks) * shapes[i][1] for i in some if owners[i] != rank)
            own = sum(
                (shapes[i][0] - rows_of(shapes[i][0], rank, ranks)) * shapes[i][1] for i in some if owners[i] == rank
            )
            for sent, received in ((to_owners, own), (to_owners, own), (own, to_owners)):
                traffic.add(itemsize * sent, itemsize * received)
    return found
