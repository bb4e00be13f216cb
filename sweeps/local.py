"""Runs the jobs of a plan on this machine: one process each, a few at a time, records kept."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from reporting import RECORD_FILES, load_run, units
from reporting.records import lookup

from .plan import Job, Plan

ROOT = Path(__file__).resolve().parent.parent
TRAINER = (sys.executable, str(ROOT / "train.py"))
EVALUATOR = (sys.executable, str(ROOT / "eval.py"))
DIVERGED = 3  # exit code of train.py for a loss that is not finite
ATTEMPTS = 3  # of a job that crashes

# glibc gives large blocks back to the system and faults them in again at every step: a sixth of a small model's step on
# a CPU (docs/performance.md). No number depends on it, and other C libraries ignore it.
MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8000000000:glibc.malloc.top_pad=268435456"


@dataclass
class Running:
    job: Job
    process: subprocess.Popen[bytes]
    began: float = field(default_factory=time.monotonic)


class Sweep:
    """A plan on its way: every job in a folder of its own below ``out``, none run twice.

    Args:
        out: folder of the records.
        settings: arguments of train.py that all jobs share, after the plan's own.
        jobs: processes at a time.
        trainer, evaluator: commands; the arguments of a job are appended.
    """

    def __init__(
        self,
        plan: Plan,
        out: Path,
        settings: Sequence[str] = (),
        jobs: int = 1,
        trainer: Sequence[str] = TRAINER,
        evaluator: Sequence[str] = EVALUATOR,
    ) -> None:
        self.plan, self.out, self.settings, self.parallel = plan, out, list(settings), jobs
        self.trainer, self.evaluator = list(trainer), list(evaluator)
        self.results: dict[str, float] = {}
        self.text: str | None = None  # fingerprint of the training text, the same for all
        self.failed: dict[str, str] = {}  # jobs given up, and why
        self.crashes: Counter[str] = Counter()
        self.running: dict[str, Running] = {}
        self.timed: list[float] = []
        self.began = time.monotonic()

    def arguments(self, job: Job) -> list[str]:
        """Of train.py."""
        # Relative to the repository where possible: records are committed, and paths of this machine say nothing.
        folder = self.out / job.name
        folder = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
        return [f"experiment={self.plan.experiment}", *job.arguments(), f"run_dir={folder}", *self.settings]

    def read(self) -> None:
        """Take in the records that are there.

        Raises:
            ValueError: a record of other settings than its job's.
        """
        while True:
            new = [job for job in self.plan.jobs(self.results) if job.name not in self.results and self._ended(job)]
            for job in new:
                self._take(job)
            if not new:
                return

    def _ended(self, job: Job) -> bool:
        folder = self.out / job.name
        if (folder / "diverged.json").is_file():
            return True
        return (folder / "summary.json").is_file() and not self._owed(folder)

    def _owed(self, folder: Path) -> list[str]:
        """Evaluations of the plan that a finished run still lacks."""
        file = folder / "evaluations.json"
        there = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return [name for name in self.plan.evaluate if name not in there]

    def _take(self, job: Job) -> None:
        run = load_run(self.out / job.name)
        text = lookup(run.environment, "data.train.listing_sha256")
        if self.results and text != self.text:
            raise ValueError(
                f"{run.path} was trained on another text than the runs before it: give all the same data.path, or remove "
                "that folder."
            )
        self.text = text
        if math.isnan(run.perplexity):
            raise ValueError(
                f"{run.path}/summary.json has no perplexity: remove that folder, and the run is done again."
            )
        for key, wanted in asked_for([*job.arguments(), *self.settings]).items():
            there = run.setting(key)
            if there != wanted and not (isinstance(wanted, float) and math.isclose(float(there or 0), wanted)):
                raise ValueError(
                    f"{run.path} was run with {key}={there}, but the sweep asks for {wanted}: choose another --out, or "
                    "remove that folder."
                )
        self.results[job.name] = run.perplexity

    def missing(self) -> list[Job]:
        return [
            job for job in self.plan.jobs(self.results) if job.name not in self.results and job.name not in self.failed
        ]

    def run(self) -> None:
        """Train until the plan asks for nothing more; ``failed`` holds what could not be done.

        Raises:
            RuntimeError: train.py refuses the first run by its settings.
        """
        self.read()
        self.out.mkdir(parents=True, exist_ok=True)
        for job in self.plan.jobs(self.results):
            if job.name in self.results:
                self._tidy(job)  # of runs that ended while nobody looked on
        display = Display(self)
        try:
            while True:
                for job in self.missing():
                    if len(self.running) == self.parallel:
                        break
                    if job.name not in self.running:
                        self.running[job.name] = Running(job, self._start(job))
                if not self.running:
                    return
                time.sleep(0.05 if len(self.timed) < 3 else 0.5)
                for name, entry in list(self.running.items()):
                    if entry.process.poll() is not None:
                        del self.running[name]
                        display.say(entry.job, self._end(entry))
                display.refresh()
        finally:
            for entry in self.running.values():
                entry.process.terminate()
            for entry in self.running.values():
                entry.process.wait()
            display.close()

    def remaining(self) -> float:
        """Seconds that the jobs known so far will take, by the mean of those timed."""
        each = sum(self.timed) / len(self.timed) if self.timed else self.plan.seconds
        return len(self.missing()) * each / self.parallel

    def _log(self, job: Job) -> Path:
        return self.out / f"{job.name}.log"

    def _start(self, job: Job) -> subprocess.Popen[bytes]:
        environment = {"GLIBC_TUNABLES": MALLOC, **os.environ}
        if self.parallel > 1:  # or every process would take all cores and they would slow each other down
            environment["OMP_NUM_THREADS"] = str(max(1, cores() // self.parallel))
        # A finished run that lacks an evaluation only needs that.
        folder = self.out / job.name
        owed = self._owed(folder) if (folder / "summary.json").is_file() else []
        command = self._evaluation(folder, owed[0]) if owed else [*self.trainer, *self.arguments(job)]
        self._log(job).parent.mkdir(parents=True, exist_ok=True)
        with self._log(job).open("wb") as log:
            return subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    def _evaluation(self, folder: Path, name: str) -> list[str]:
        arguments = [f"checkpoint={folder}", *self.plan.evaluate[name], f"json={folder / 'evaluation.json'}"]
        return [*self.evaluator, *arguments]

    def _end(self, entry: Running) -> str:
        """Keep the record of a process that has ended, or count its crash; says what became of it."""
        job, code = entry.job, entry.process.returncode
        folder, log = self.out / job.name, self._log(job)
        text = log.read_text(encoding="utf-8", errors="replace")
        evaluated = folder / "evaluation.json"
        if code == DIVERGED and (folder / "config.yaml").is_file():
            (folder / "diverged.json").write_text(json.dumps(divergence(text, folder), indent=2) + "\n")
        elif code != 0 or not (folder / "summary.json").is_file():
            return self._crash(job, code, text)
        elif evaluated.is_file():
            _merge(folder / "evaluations.json", self._owed(folder)[0], evaluated)
        if not self._ended(job):
            return "trained; its other evaluations follow"  # the job is missing still, and comes next
        self._tidy(job)
        self.timed.append(time.monotonic() - entry.began)
        self._take(job)
        run = load_run(folder)
        outcome = (
            f"perplexity {units.perplexity(run.perplexity)}"
            if not run.diverged
            else f"diverged at step {run.diverged['step']}"
        )
        return f"{outcome} in {units.duration(self.timed[-1])}"

    def _tidy(self, job: Job) -> None:
        """Leave only the record of a run that has ended: it is committed."""
        for path in (self.out / job.name).iterdir():
            if path.name not in RECORD_FILES:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._log(job).unlink(missing_ok=True)

    def _crash(self, job: Job, code: int, text: str) -> str:
        self.crashes[job.name] += 1
        what = f"ended with exit code {code}" if code else "wrote no summary.json"
        if self.crashes[job.name] < ATTEMPTS and code != 2:  # 2: the user's mistake, which a restart repeats
            return f"{what}; it starts again"
        tail = "\n".join(re.split(r"[\r\n]+", text.strip())[-15:])
        if code == 2 and not self.timed:  # before any run has ended: it is the sweep that was asked for wrongly
            raise RuntimeError(
                f"{job.name} {what}, and so would the others; put it right. The end of its output:\n{tail}"
            )
        self.failed[job.name] = f"{job.name} {what}; the end of {self._log(job)}:\n{tail}"
        return f"{what}; given up"


class Display:
    """A line for each job that ends; on a terminal, below them, a table of what runs and how far each optimizer is."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep, self.live, self.lines, self.drawn = sweep, sys.stdout.isatty(), 0, 0.0

    def say(self, job: Job, outcome: str) -> None:
        self._wipe()
        sweep = self.sweep
        known = len(sweep.plan.jobs(sweep.results))
        done = len(sweep.results) + len(sweep.failed)
        times = (
            f"elapsed {units.duration(time.monotonic() - sweep.began)}, about {units.duration(sweep.remaining())} left"
        )
        print(f"[{done}/{known}] {job.name}: {outcome}   {times}", flush=True)
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
    for job in sweep.plan.jobs(sweep.results):
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


def asked_for(arguments: Sequence[str]) -> dict[str, Any]:
    """What a job's arguments must have become in its record: plain values by key, and the names of the groups."""
    pairs = dict(argument.lstrip("+").partition("=")[::2] for argument in arguments)
    wanted = {key: yaml.safe_load(value) for key, value in pairs.items() if "." in key and key != "data.path"}
    wanted |= {f"{group}.name": pairs[group] for group in ("model", "optimizer") if group in pairs}
    return wanted | {"seed": int(pairs["seed"])}


def divergence(text: str, folder: Path) -> dict[str, Any]:
    """Where a run diverged: the step that its error names, or the last one that it recorded."""
    errors = [line.strip() for line in re.split(r"[\r\n]+", text) if "error:" in line]
    message = errors[-1] if errors else ""
    step = re.search(r"\bat step ([\d,]+)", message)
    return {"step": int(step[1].replace(",", "")) if step else last_step(folder) or None, "message": message}


def _merge(file: Path, name: str, evaluated: Path) -> None:
    there: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    result = json.loads(evaluated.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**there, name: result}, indent=2) + "\n", encoding="utf-8")
    evaluated.unlink()


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
