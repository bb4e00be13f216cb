"""Runs the jobs of a plan on this machine: one process (or launcher) each, a few at a time, records kept."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pretraining.files import replace_text
from pretraining.lock import RunLock
from reporting import RECORD_FILES, load_run, units
from reporting.records import lookup

from .claims import claim, release
from .plan import Job, Plan
from .progress import Display, last_step
from .slots import Slot, environment, exit_code, launch

ROOT = Path(__file__).resolve().parent.parent
TRAINER = (sys.executable, str(ROOT / "train.py"))
EVALUATOR = (sys.executable, str(ROOT / "eval.py"))
DIVERGED = 3  # exit code of train.py for a loss that is not finite
ATTEMPTS = 3  # of a job that crashes
LOOK = 5.0  # seconds between looks at runs that another process is at
PRUNED = "pruned.json"  # left by a search in the folder of a run that it has ended early
KEPT = (*RECORD_FILES, PRUNED)

# glibc gives large blocks back to the system and faults them in again at every step: a sixth of a small model's step on
# a CPU (docs/performance.md). No number depends on it, and other C libraries ignore it.
MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8000000000:glibc.malloc.top_pad=268435456"


@dataclass
class Running:
    job: Job
    process: subprocess.Popen[bytes]
    slot: Slot
    lock: RunLock
    began: float = field(default_factory=time.monotonic)


class Sweep:
    """A plan on its way: every job in a folder of its own below ``out``, none run twice, also by several processes.

    Args:
        out: folder of the records.
        settings: arguments of train.py that all jobs share, after the plan's own.
        slots: where runs go, one at a time in each (slots.py).
        trainer, evaluator: commands; the arguments of a job are appended.
        chosen: the jobs of the plan that this process is for; default: all.
        patient: wait for runs that other processes are at, in case they do not end.
    """

    def __init__(
        self,
        plan: Plan,
        out: Path,
        settings: Sequence[str] = (),
        slots: Sequence[Slot] = ((),),
        trainer: Sequence[str] = TRAINER,
        evaluator: Sequence[str] = EVALUATOR,
        chosen: Sequence[Job] | None = None,
        patient: bool = True,
    ) -> None:
        self.plan, self.out, self.settings, self.slots, self.chosen = plan, out, list(settings), list(slots), chosen
        self.patient = patient
        self.trainer, self.evaluator = list(trainer), list(evaluator)
        self.results: dict[str, float] = {}
        self.texts: set[str | None] = set()  # fingerprints of the training text: one, the same for all
        self.failed: dict[str, str] = {}  # jobs given up, and why
        self.crashes: Counter[str] = Counter()
        self.running: dict[str, Running] = {}
        self.others: dict[str, float] = {}  # jobs that another process is at, and when to look again
        self.spent: dict[str, float] = {}  # seconds of the jobs trained here, all their processes together
        self.timed: list[float] = []  # those of the jobs that have ended
        self.began = time.monotonic()

    def arguments(self, job: Job) -> list[str]:
        """Of train.py."""
        # Relative to the repository where possible: records are committed, and paths of this machine say nothing.
        folder = self.out / job.name
        folder = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
        experiment = [f"experiment={self.plan.experiment}"] if self.plan.experiment else []
        return [*experiment, *job.arguments(), f"run_dir={folder}", *self.settings]

    def jobs(self) -> list[Job]:
        """What is to be run, as far as that is known."""
        return self.plan.jobs(self.results) if self.chosen is None else list(self.chosen)

    def read(self) -> None:
        """Take in the records that are there.

        Raises:
            ValueError: a record of other settings than its job's.
        """
        while True:
            new = [job for job in self.jobs() if job.name not in self.results and self._ended(job)]
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
        self.texts.add(text)
        if len(self.texts) > 1:
            raise ValueError(
                f"{run.path} was trained on another text than the runs before it: give all the same data.path, or remove "
                "that folder."
            )
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
        return [job for job in self.jobs() if job.name not in self.results and job.name not in self.failed]

    def best(self, model: str | None, optimizer: str) -> Job | None:
        """The run of the best rates (and the plan's first seed) of a finished grid; None before, or if all diverged."""
        rates = self.plan.best(model, optimizer, self.results)
        jobs = [job for job in self.jobs() if (job.model, job.optimizer) == (model, optimizer)]
        return next((job for job in jobs if (job.lr, job.adam_lr) == rates), None)

    def known(self) -> int:
        """How many runs the sweep has, as far as that is known."""
        return len(self.jobs())

    def ended(self) -> int:
        return len(self.results) + len(self.failed)

    def run(self) -> None:
        """Train until the plan asks for nothing more; ``failed`` holds what could not be done.

        Raises:
            RuntimeError: train.py refuses the first run by its settings.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        self.read()
        for job in self.jobs():
            if job.name in self.results:
                self._tidy(job)  # of runs that ended while nobody looked on
        display = Display(self)
        try:
            while True:
                self._fill()
                if not self.running:
                    if not self.missing() or not self.patient:
                        return
                    time.sleep(LOOK)  # other processes are at the rest
                    continue
                time.sleep(0.05 if len(self.timed) < 3 else 0.5)
                for name, entry in list(self.running.items()):
                    if entry.process.poll() is not None:
                        outcome = self._end(entry)
                        del self.running[name]
                        release(entry.lock)
                        display.say(entry.job, outcome)
                    else:
                        self._watch(entry)
                display.refresh()
        finally:
            self.stop()
            for entry in self.running.values():
                release(entry.lock)
            display.close()

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End all runs by a signal and wait; they leave a checkpoint."""
        for entry in self.running.values():
            entry.process.send_signal(number)
        for entry in self.running.values():
            entry.process.wait()

    def _fill(self) -> None:
        """Start what is missing, as far as there is room."""
        free = list(self.slots)
        for entry in self.running.values():
            free.remove(entry.slot)
        for job in self.missing():
            if not free:
                return
            if job.name in self.running or time.monotonic() < self.others.get(job.name, 0):
                continue
            lock = claim(self.out / job.name)
            if lock is None:
                self.others[job.name] = time.monotonic() + LOOK
            elif self._ended(job):  # by another process, meanwhile
                self._tidy(job)
                self._take(job)
                release(lock)
                return  # what is missing may be something else now
            else:
                slot = free.pop(0)
                self.running[job.name] = Running(job, self._start(job, slot), slot, lock)

    def _watch(self, entry: Running) -> None:
        """Look at a run on its way."""

    def remaining(self) -> float:
        """Seconds that the jobs known so far will take, by the mean of those timed."""
        each = sum(self.timed) / len(self.timed) if self.timed else self.plan.seconds
        return (self.known() - self.ended()) * each / len(self.slots)

    def _log(self, job: Job) -> Path:
        return self.out / f"{job.name}.log"

    def _start(self, job: Job, slot: Slot) -> subprocess.Popen[bytes]:
        variables = {"GLIBC_TUNABLES": MALLOC, **os.environ, **environment(slot, len(self.slots))}
        # A finished run that lacks an evaluation only needs that.
        folder = self.out / job.name
        owed = self._owed(folder) if (folder / "summary.json").is_file() else []
        training = [*launch(self.trainer, slot), *self.arguments(job)]
        command = self._evaluation(folder, owed[0]) if owed else training
        self._log(job).parent.mkdir(parents=True, exist_ok=True)
        with self._log(job).open("wb") as log:
            return subprocess.Popen(
                command,
                cwd=ROOT,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C reaches this process alone, which passes one signal on: a second one would end the run at once.
                process_group=0,
            )

    def _evaluation(self, folder: Path, name: str) -> list[str]:
        arguments = [f"checkpoint={folder}", *self.plan.evaluate[name], f"json={folder / 'evaluation.json'}"]
        return [*self.evaluator, *arguments]

    def _end(self, entry: Running) -> str:
        """Keep the record of a process that has ended, or count its crash; says what became of it."""
        job = entry.job
        folder, log = self.out / job.name, self._log(job)
        text = log.read_text(encoding="utf-8", errors="replace")
        code = exit_code(entry.process.returncode, text)
        evaluated = folder / "evaluation.json"
        seconds = time.monotonic() - entry.began
        if not evaluated.is_file() or job.name in self.spent:  # one that was only evaluated here does not tell
            self.spent[job.name] = self.spent.get(job.name, 0.0) + seconds
        if code == DIVERGED and (folder / "config.yaml").is_file():
            if not (folder / "diverged.json").is_file():  # train.py writes it
                (folder / "diverged.json").write_text(json.dumps(divergence(text, folder), indent=2) + "\n")
        elif code != 0 or not (folder / "summary.json").is_file():
            return self._crash(job, code, text)
        elif evaluated.is_file():
            _merge(folder / "evaluations.json", self._owed(folder)[0], evaluated)
        if not self._ended(job):
            return "trained; its other evaluations follow"  # the job is missing still, and comes next
        self._tidy(job)
        if job.name in self.spent:
            self.timed.append(self.spent[job.name])
        self._take(job)
        run = load_run(folder)
        outcome = (
            f"perplexity {units.perplexity(run.perplexity)}"
            if not run.diverged
            else f"diverged at step {run.diverged['step']}"
        )
        return f"{outcome} in {units.duration(self.spent.get(job.name, seconds))}"

    def _tidy(self, job: Job) -> None:
        """Leave only the record of a run that has ended: it is committed."""
        for path in (self.out / job.name).glob("*"):
            if path.name not in KEPT:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
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


def asked_for(arguments: Sequence[str]) -> dict[str, Any]:
    """What a job's arguments must have become in its record: plain values by key, and the names of the groups."""
    pairs = dict(argument.lstrip("+").partition("=")[::2] for argument in arguments)
    wanted = {key: _value(value) for key, value in pairs.items() if "." in key and key != "data.path"}
    wanted |= {f"{group}.name": pairs[group] for group in ("model", "optimizer") if group in pairs}
    return wanted | {"seed": int(pairs["seed"])}


def _value(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:  # plain text, such as *.jsonl
        return text
    if isinstance(value, (dict, bool)) and text.lower() not in ("true", "false") and not text.startswith("{"):
        return text  # "a: b" and yes, which are text for Hydra
    if isinstance(value, str):
        with contextlib.suppress(ValueError):  # 1e-05, a number for Hydra but none for YAML
            return float(value)
    return value


def divergence(text: str, folder: Path) -> dict[str, Any]:
    """Where a run diverged: the step that its error names, or the last one that it recorded."""
    errors = [line.strip() for line in re.split(r"[\r\n]+", text) if "error:" in line]
    message = errors[-1] if errors else ""
    step = re.search(r"\bat step ([\d,]+)", message)
    return {"step": int(step[1].replace(",", "")) if step else last_step(folder) or None, "message": message}


def _merge(file: Path, name: str, evaluated: Path) -> None:
    there: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    result = json.loads(evaluated.read_text(encoding="utf-8"))
    replace_text(file, json.dumps({**there, name: result}, indent=2) + "\n")
    evaluated.unlink()
