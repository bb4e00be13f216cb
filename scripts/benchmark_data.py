"""How fast the training loader is, and what share of a step's time a consumer of a given speed waits for it.

    python scripts/benchmark_data.py --data c4_local --path DIR --tokenizer spiece.model --workers 0,1,2,4
    python scripts/benchmark_data.py --data c4_local --path DIR --prepared DIR2 --tokenizer spiece.model --json FILE
    python scripts/benchmark_data.py --data c4_local --path DIR --tokenizer t5-base --ranks 8 --tokens-per-second 4e5

The machine must have nothing else to do. Steps are the paper's, 512 rows of 256 tokens; tokens are counted with padding, as
the trainer does. Each case is measured --repeats times, in turns: as fast as the loader can, and then by a consumer
that takes a step whenever a device of --tokens-per-second a rank would have finished the one before. In between it
sleeps, or with --work compute multiplies small matrices from Python, as a trainer that keeps a device busy. The share is the
time inside `next` over all time. Neither figure counts the first step or those that warm queues would hide.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarking import record  # noqa: E402
from data import Tokenizer, TrainingBatches, UserError, load_tokenizer, open_source  # noqa: E402
from pretraining.files import replace_text  # noqa: E402
from pretraining.record import environment  # noqa: E402

FORMAT = 1
BATCH, LENGTH = 512, 256
PREFETCH = 2
WARMUP = 5 * PREFETCH  # steps before either figure: more than the queues hold
PLACES = ("--path", "--prepared", "--tokenizer", "--json")  # where things lie on this machine: not for the record


@dataclass
class Case:
    """One way to load, and what was measured in each repeat; `error` where it cannot be."""

    source: str
    rows: str
    workers: int
    first_step_seconds: list[float] = field(default_factory=list)
    rows_per_second: list[float] = field(default_factory=list)
    tokens_per_second: list[float] = field(default_factory=list)
    wait_share: list[float] = field(default_factory=list)
    error: str | None = None


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def compute(seconds: float) -> None:
    """Short operations one after another: the interpreter's lock is wanted all the time."""
    end = time.perf_counter() + seconds
    matrix = torch.full((64, 64), 1 / 64)
    while time.perf_counter() < end:
        matrix = matrix @ matrix


def measure(
    case: Case,
    config: dict[str, Any],
    tokenizer: Tokenizer,
    steps: int,
    ranks: int,
    speed: float,
    work: Callable[[float], None],
) -> None:
    """Add one repeat to `case`: rank 0's loader of `ranks`, in steps of `BATCH` rows of all ranks together."""
    loader = TrainingBatches(
        open_source(config, "train"),
        tokenizer,
        LENGTH,
        case.rows,
        BATCH,
        world_size=ranks,
        prefetch=PREFETCH,
        workers=case.workers,
    )
    with loader:
        began = time.perf_counter()
        tokens = next(loader)["input_ids"].numel()
        first = time.perf_counter() - began
        for _ in range(WARMUP):
            next(loader)
        began = time.perf_counter()
        for _ in range(steps):
            next(loader)
        rate = steps * tokens / (time.perf_counter() - began)
        for i in range(WARMUP + steps):
            if i == WARMUP:
                began, waited = time.perf_counter(), loader.waited
            next(loader)
            work(tokens / speed)
        share = (loader.waited - waited) / (time.perf_counter() - began)
    case.first_step_seconds.append(first)
    case.tokens_per_second.append(rate)
    case.rows_per_second.append(rate / LENGTH)
    case.wait_share.append(share)


def table(cases: Sequence[Case], speed: float) -> str:
    """Medians of the repeats, and the extremes of the share."""
    lines = [
        f"{'source':<10} {'rows':<8} {'workers':>7} {'rows/s':>8} {'tokens/s':>11} {'per worker':>11} {'first step':>10}  "
        f"waiting at {speed:,.0f} tokens/s (least to most)"
    ]
    for case in cases:
        name = f"{case.source:<10} {case.rows:<8} {case.workers:>7}"
        if case.error is not None:
            lines.append(f"{name} {case.error}")
            continue
        rate = statistics.median(case.tokens_per_second)
        lines.append(
            f"{name} {statistics.median(case.rows_per_second):>8,.0f} {rate:>11,.0f} {rate / max(1, case.workers):>11,.0f} "
            f"{statistics.median(case.first_step_seconds):>8.2f} s  {statistics.median(case.wait_share):.2%} "
            f"({min(case.wait_share):.2%} to {max(case.wait_share):.2%})"
        )
    return "\n".join(lines)


def command(words: Sequence[str]) -> str:
    return record.command(words, "scripts/benchmark_data.py", PLACES)


def numbers(text: str) -> list[int]:
    return sorted({int(number) for number in text.split(",")})


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("c4_local", "prepared", "sample", "text"), default="sample")
    parser.add_argument("--path", type=Path, help="folder of --data")
    parser.add_argument("--prepared", type=Path, help="a prepared folder to measure beside it")
    parser.add_argument("--tokenizer", default="sample_1k", help="as tokenizer= of train.py; default sample_1k")
    parser.add_argument("--rows", default="truncate,pack", help="default truncate,pack")
    parser.add_argument("--workers", type=numbers, default=[0, 1, 2], help="default 0,1,2")
    parser.add_argument("--ranks", type=int, default=1, help="measure rank 0 of so many; default 1")
    parser.add_argument("--tokens-per-second", type=float, default=1e6, help="of the consumer; default 1e6")
    parser.add_argument(
        "--work", choices=("sleep", "compute"), default="compute", help="between steps; default compute"
    )
    parser.add_argument("--steps", type=int, default=60, help="of each of the two figures; default 60")
    parser.add_argument("--repeats", type=int, default=3, help="default 3")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a record")
    asked = parser.parse_args(words)
    if min(asked.steps, asked.repeats, asked.ranks) < 1 or asked.tokens_per_second <= 0:
        parser.error("--steps, --repeats, --ranks and --tokens-per-second must be positive.")
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    path = None if asked.path is None else str(asked.path)
    configs = {asked.data: {"kind": asked.data, "path": path}}
    if asked.prepared is not None:
        configs["prepared"] = {"kind": "prepared", "path": str(asked.prepared)}
    cases = [
        Case(kind, rows, workers) for kind in configs for rows in asked.rows.split(",") for workers in asked.workers
    ]
    try:
        tokenizer = load_tokenizer(asked.tokenizer)
        sources = {kind: open_source(config, "train").description for kind, config in configs.items()}
        for number in range(asked.repeats):
            for case in cases:
                if case.error is not None:
                    continue
                try:
                    measure(
                        case, configs[case.source], tokenizer, asked.steps, asked.ranks, asked.tokens_per_second,
                        {"sleep": sleep, "compute": compute}[asked.work],
                    )  # fmt: skip
                except UserError as error:  # such as a folder prepared for other rows
                    case.error = str(error).replace(str(configs[case.source]["path"]), case.source)
                print(f"repeat {number + 1}: {case.source}, {case.rows}, {case.workers} workers", file=sys.stderr)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(table(cases, asked.tokens_per_second))
    if asked.json is not None:
        record = {
            "format": FORMAT,
            "settings": {
                "steps": asked.steps, "warmup": WARMUP, "repeats": asked.repeats, "ranks": asked.ranks,
                "batch_size": BATCH, "length": LENGTH, "prefetch": PREFETCH, "work": asked.work,
                "consumed_tokens_per_second": asked.tokens_per_second,
                "tokenizer": {"name": Path(asked.tokenizer).name, "fingerprint": tokenizer.fingerprint},
                "sources": {kind: {**facts, "path": None} for kind, facts in sources.items()},
            },
            "environment": {
                **environment(torch.device("cpu"), 1, load_average_before=load), "command": command(words)
            },
            "cases": [asdict(case) for case in cases],
        }  # fmt: skip
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        replace_text(asked.json, json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
