"""What a sweep shows while it runs."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from reporting import units

from .plan import Job

if TYPE_CHECKING:
    from .local import Sweep


class Display:
    """A line for each job that ends; on a terminal, below them, a table of what runs and how far each optimizer is."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep, self.live, self.lines, self.drawn = sweep, sys.stdout.isatty(), 0, 0.0

    def say(self, job: Job, outcome: str) -> None:
        self._wipe()
        sweep = self.sweep
        times = (
            f"elapsed {units.duration(time.monotonic() - sweep.began)}, about {units.duration(sweep.remaining())} left"
        )
        print(f"[{sweep.ended()}/{sweep.known()}] {job.name}: {outcome}   {times}", flush=True)
        self.drawn = 0.0

    def refresh(self) -> None:
        if not self.live or time.monotonic() - self.drawn < 2:
            return
        self.drawn = time.monotonic()
        text = table(self.sweep)
        self._wipe()
        self.lines = len(text)
        print("\n".join(text), flush=True)

    def close(self) -> None:
        self._wipe()

    def _wipe(self) -> None:
        if self.lines:
            print(f"\x1b[{self.lines}A\x1b[J", end="", flush=True)
            self.lines = 0


def table(sweep: Sweep) -> list[str]:
    """Progress by model and optimizer, and how far each running job is; no line wider than the terminal."""
    rows: dict[tuple[str, str], list[Job]] = {}
    for job in sweep.jobs():
        rows.setdefault((job.model or "", job.optimizer), []).append(job)
    lines = [f"{'':<16}{'optimizer':<16}{'runs':>9}  best so far"]
    for (model, name), jobs in rows.items():
        ended = {job.name: sweep.results[job.name] for job in jobs if job.name in sweep.results}
        best = min(ended, key=lambda job: ended[job]) if ended else None
        note = f"{units.perplexity(ended[best])}  {best.rpartition('/')[2]}" if best else ""
        lines.append(f"{model:<16}{name:<16}{len(ended):>4}/{len(jobs):<4}  {note}")
    for entry in sweep.running.values():
        lines.append(f"running {entry.job.name}: step {last_step(sweep.out / entry.job.name)}")
    lines.append(f"about {units.duration(sweep.remaining())} left")
    width = shutil.get_terminal_size().columns
    return [line[: width - 1] for line in lines]


def last_step(folder: Path) -> int:
    """The last step on a run's record, 0 where there is none yet."""
    file = folder / "metrics.jsonl"
    lines = file.read_bytes().splitlines() if file.is_file() else []
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue  # the line that is being written
    return 0
