"""Time, memory and arithmetic: what a step costs on this machine."""

import ctypes
import gc
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from omegaconf import DictConfig

# Dense bfloat16 peak in FLOP/s, from the makers' data sheets (without sparsity).
PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


# Steps after each start that the figures leave out: compilation, caches and the first basis of every matrix fall in them.
WARMUP_STEPS = 10


@dataclass
class Sums:
    """Steps, and over them: seconds, milliseconds in the optimizer, seconds of waiting for data."""

    steps: int = 0
    seconds: float = 0.0
    optimizer_ms: float = 0.0
    data_seconds: float = 0.0

    def add(self, seconds: float, optimizer_ms: float, data_seconds: float) -> None:
        self.steps += 1
        self.seconds += seconds
        self.optimizer_ms += optimizer_ms
        self.data_seconds += data_seconds


@dataclass
class Meters:
    """A run's time, over all the processes that have worked on it: ``state`` goes into checkpoints.

    Attributes:
        every: all steps.
        steady: without the first ``WARMUP_STEPS`` after each start.
        wall_seconds: of earlier processes.
        peak_memory_bytes: of earlier processes.
    """

    every: Sums = field(default_factory=Sums)
    steady: Sums = field(default_factory=Sums)
    wall_seconds: float = 0.0
    peak_memory_bytes: int = 0
    _here: int = 0  # steps of this process

    def add(self, seconds: float, optimizer_ms: float, data_seconds: float) -> None:
        self._here += 1
        self.every.add(seconds, optimizer_ms, data_seconds)
        if self._here > WARMUP_STEPS:
            self.steady.add(seconds, optimizer_ms, data_seconds)

    @property
    def best(self) -> Sums:
        """What figures are made of: steady steps, if there are any."""
        return self.steady if self.steady.steps else self.every

    def state(self, wall_seconds: float, peak_memory_bytes: int) -> dict[str, Any]:
        """To keep, with what this process adds to the wall clock and the peak."""
        return {
            "every": asdict(self.every),
            "steady": asdict(self.steady),
            "wall_seconds": self.wall_seconds + wall_seconds,
            "peak_memory_bytes": max(self.peak_memory_bytes, peak_memory_bytes),
        }

    @classmethod
    def restore(cls, state: dict[str, Any]) -> "Meters":
        return cls(Sums(**state["every"]), Sums(**state["steady"]), state["wall_seconds"], state["peak_memory_bytes"])


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bfloat16 peak, or None where it is unknown (then no MFU is reported)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if "MIG" in name:  # a slice of a card
        return None
    # GeForce cards have slower ones of nearly the same name (Laptop, D); GPUs for servers say memory and form behind theirs
    fits = (flops for key, flops in PEAK_FLOPS.items() if (name.endswith(key) if "RTX" in key else key in name))
    return next(fits, None)


def flops_per_token(model: DictConfig, parameters: int, length: int) -> float:
    """Forward and backward FLOPs of one token: 6 for each weight but the embedding's, 12 L h T for attention.

    The usual count (Chowdhery et al. 2022, appendix B): no allowance for the causal mask.
    """
    embedding = 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size
    return 6 * (parameters - embedding) + 12 * model.num_hidden_layers * model.hidden_size * length


def peak_memory(device: torch.device) -> tuple[int, str]:
    """Peak bytes so far, and what they count: the allocator's on CUDA, the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "cuda allocator"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "process resident set"


class StepTimer:
    """Milliseconds between ``start`` and ``stop`` on the device, read later so that nothing waits for them."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def start(self) -> None:
        self._begin = self._now()

    def stop(self) -> None:
        self._end = self._now()

    def _now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self) -> float:
        """Of the last interval. On CUDA this waits for its end."""
        if not self.cuda:
            return 1000 * (self._end - self._begin)
        self._end.synchronize()
        return self._begin.elapsed_time(self._end)


@contextmanager
def frozen_garbage() -> Iterator[None]:
    """Leave all objects that exist now out of Python's garbage collections.

    Libraries make some 400,000, so that a collection of all of them takes a third of a second, at any step. What is made
    inside is collected as always.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def keep_freed_memory() -> bool:
    """Let the C library keep freed blocks of any size for this process, which asks for the same ones at every step.

    Otherwise glibc gives large ones back to the system, and faults their pages in again, zeroed: a sixth of a small
    model's step on a CPU (docs/performance.md). The process so stays as large as it ever was. Nothing happens, and
    False is returned, with other C libraries.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 - others may have the function with other numbers
        trim_threshold, top_pad, mmap_max = -1, -2, -4
        return all(libc.mallopt(*o) == 1 for o in ((trim_threshold, -1), (top_pad, 2**28), (mmap_max, 0)))
    except (OSError, AttributeError, TypeError):
        return False
