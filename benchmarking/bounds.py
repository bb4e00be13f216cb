"""What this machine can do, and the least that a step of each method has to do: together the least time of a step.

Counted for one matrix [m, n], m <= n: numbers that have to be read or written at least once each, because everything does
not fit into a cache, and products of matrices, by the cheapest arithmetic that we know of. Vector operations, random
numbers and passes that a cache can serve count nothing. Memory and arithmetic may overlap, so the bound is the larger of the
two times. What a cache keeps from one step to the next can beat it, with matrices that fit in there.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

NS_STEPS = 5  # of Muon
REPEATS = 7  # of each measurement of the machine; the fastest counts
BATCH_ENTRIES = 2**28  # numbers in the largest operand of a batch of products


@dataclass(frozen=True)
class Product:
    """[rows, inner] @ [inner, columns], ``count`` times; half of it where the result is symmetric."""

    rows: int
    inner: int
    columns: int
    count: float = 1.0
    bfloat16: bool = False  # whatever the parameters are

    @property
    def operations(self) -> float:
        return 2.0 * self.rows * self.inner * self.columns * self.count


@dataclass(frozen=True)
class Work:
    """Of one matrix: numbers moved, in the parameters' dtype and in float32, and products."""

    numbers: int
    float32: int = 0
    products: tuple[Product, ...] = ()


def adam(m: int, n: int, r: int) -> Work:
    """W, m and v are read and written, G is read."""
    return Work(7 * m * n)


def racs(m: int, n: int, r: int) -> Work:
    """W is read and written, G read; s, q and phi. The fixed point's passes over G^2 are left to the caches."""
    return Work(3 * m * n, 2 * (m + n + 1))


def galore(m: int, n: int, r: int) -> Work:
    """W, G, both moments [r, n] and U; U^T G and U omega."""
    return Work(3 * m * n + 4 * r * n + m * r, products=(Product(r, m, n), Product(m, r, n)))


def alice_0(m: int, n: int, r: int) -> Work:
    """GaLore's, since the compensation is a correction of omega and a multiple of G's columns; p and phi."""
    base = galore(m, n, r)
    return Work(base.numbers, 2 * (n + 1), base.products)


def alice(m: int, n: int, r: int) -> Work:
    """Alice-0's, and the tracked Q~ with sigma sigma^T."""
    base = alice_0(m, n, r)
    return Work(base.numbers, base.float32 + 2 * r * r, (*base.products, Product(r, n, r, 0.5)))


def fira(m: int, n: int, r: int) -> Work:
    """GaLore's: the residual's columns, scaled, are a correction of omega and a multiple of G's columns; phi."""
    base = galore(m, n, r)
    return Work(base.numbers, 2, base.products)


def apollo(m: int, n: int, r: int) -> Work:
    """W, G, both moments; U^T G. Random numbers count nothing."""
    return Work(3 * m * n + 4 * r * n, 2, (Product(r, m, n),))


def apollo_stored(m: int, n: int, r: int) -> Work:
    """Apollo's, and U is read."""
    base = apollo(m, n, r)
    return Work(base.numbers + m * r, base.float32, base.products)


def apollo_mini(m: int, n: int, r: int) -> Work:
    """Apollo's at rank 1."""
    return apollo(m, n, 1)


def muon(m: int, n: int, r: int) -> Work:
    """W and the momentum are read and written, G read; A = X X^T, A A and (..) X in each iteration, in bfloat16."""
    products = Product(m, n, m, NS_STEPS / 2, True), Product(m, m, m, NS_STEPS / 2, True)
    return Work(5 * m * n, products=(*products, Product(m, m, n, NS_STEPS, True)))


def soap(m: int, n: int, r: int) -> Work:
    """Adam's; U_L and U_R, L and R; G and m into both bases, the quotient back, G G^T and G^T G."""
    squares = m * m + n * n
    turns = Product(m, m, n, 3), Product(m, n, n, 3)
    return Work(7 * m * n + squares, 2 * squares, (*turns, Product(m, n, m, 0.5), Product(n, m, n, 0.5)))


WORK: dict[str, Callable[[int, int, int], Work]] = {
    f.__name__: f for f in (adam, racs, galore, alice_0, alice, fira, apollo, apollo_stored, apollo_mini, muon, soap)
}


# The machine ----------------------------------------------------------------------------------------------------------


class Machine:
    """What a device can do with matrices such as a model's.

    Attributes:
        copy_bandwidth: bytes read and written per second by a copy of all the matrices, one after the other.
        bandwidth: the same of a scaling in place if that is faster: on a CPU a copy also reads what it overwrites.
    """

    def __init__(self, matrices: Sequence[Tensor]) -> None:
        self.device, self.dtype = matrices[0].device, matrices[0].dtype
        copies = [torch.empty_like(x) for x in matrices]
        moved = 2 * sum(x.nbytes for x in matrices)
        seconds = fastest(lambda: [x.copy_(y) for x, y in zip(copies, matrices, strict=True)], self.device)
        self.copy_bandwidth = moved / seconds
        seconds = fastest(lambda: [x.mul_(1.0) for x in copies], self.device)
        self.bandwidth = max(self.copy_bandwidth, moved / seconds)
        self.seconds = cache(self._seconds)  # of a product

    def _seconds(self, rows: int, inner: int, columns: int, dtype: torch.dtype, batch: int) -> float:
        """Of one of ``batch`` products at a time. On a CPU, which one product fills, one at a time."""
        largest = max(rows * inner, inner * columns, rows * columns)
        batch = 1 if self.device.type == "cpu" else max(1, min(batch, BATCH_ENTRIES // largest))
        A, B = (torch.randn(batch, *shape, device=self.device).to(dtype) for shape in ((rows, inner), (inner, columns)))
        if batch == 1:
            A, B = A[0], B[0]
        out = A @ B
        return fastest(lambda: torch.matmul(A, B, out=out), self.device) / batch

    def bound(self, method: str, shapes: Counter[tuple[int, int]], rank: int, low: bool = False) -> dict[str, float]:
        """The least milliseconds of an ordinary step of ``method`` on matrices: shape -> how many, and what they come from.

        ``low``: all its products are of bfloat16 numbers.
        """
        moved = operations = seconds = 0.0
        for shape, count in shapes.items():
            work = WORK[method](min(shape), max(shape), rank)
            moved += count * (work.numbers * self.dtype.itemsize + work.float32 * 4)
            for product in work.products:
                dtype = torch.bfloat16 if low or product.bfloat16 else self.dtype
                one = self.seconds(product.rows, product.inner, product.columns, dtype, count)
                seconds += count * product.count * one
                operations += count * product.operations
        bytes_ms, product_ms = 1000 * moved / self.bandwidth, 1000 * seconds
        return {
            "bound_ms": max(bytes_ms, product_ms),
            "bytes": moved,
            "bytes_ms": bytes_ms,
            "operations": operations,
            "product_ms": product_ms,
        }


def fastest(work: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """Seconds of the fastest of ``repeats`` calls, after one that does not count; each lasts at least a millisecond."""
    work()
    loops = 1
    while _timed(work, device, loops) < 1e-3:
        loops *= 4
    return min(_timed(work, device, loops) for _ in range(repeats)) / loops


def _timed(work: Callable[[], object], device: torch.device, loops: int) -> float:
    synchronize(device)
    began = time.perf_counter()
    for _ in range(loops):
        work()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that the host's clock tells its time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
