"""Runs of a sweep as jobs of a cluster, by submitit: an array of SLURM, or the same on this machine without a scheduler.

A grid is a job for each run; a search is some workers, which share its journal. Jobs lie in the same folders as without a
cluster. One that SLURM interrupts saves and is queued again; a second call does not submit what still waits or runs.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from .local import ROOT, Sweep
from .plan import Job
from .search import SearchSweep
from .slots import environment, visible_gpus

EXECUTORS = ("slurm", "local", "debug")  # submitit's: a cluster, processes of this machine, this very process
FOLDER = ".submitit"  # of scripts, logs and results of jobs, in the folder of the sweep
STOPPED = 75  # exit code of a job that was told to end, as of train.py

# SLURM sends its warning to every process of a job: it must be one that train.py takes as a request to save.
_WARNING = "USR1"
LEAD = 120  # seconds before the end of its time that a job is warned, unless slurm_signal_delay_s says otherwise


class Task:
    """What a job does: the chosen runs, or what a search has left. It is pickled, and again if it is interrupted."""

    def __init__(self, sweep: Sweep, chosen: Sequence[Job] | None) -> None:
        self.kind, self.plan, self.out, self.settings = type(sweep), sweep.plan, sweep.out, sweep.settings
        self.commands = {"trainer": sweep.trainer, "evaluator": sweep.evaluator}
        self.chosen = chosen

    def __call__(self) -> str:
        sweep = self.kind(
            self.plan,
            self.out,
            self.settings,
            [tuple(visible_gpus())],  # all that the job has been given
            **self.commands,
            chosen=self.chosen,
            patient=False,
        )
        self._sweep = sweep

        def stop(number: int, _: FrameType | None) -> NoReturn:
            sweep.stop(number)  # the same signal: train.py takes another one as a second request, and leaves at once
            raise SystemExit(STOPPED)

        here = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, stop) if here else None
        try:
            sweep.run()
        except (OSError, ValueError, RuntimeError) as error:
            return f"error: {error}"
        finally:
            if here:
                signal.signal(signal.SIGTERM, before)
        return "\n".join(f"error: {why}" for why in sweep.failed.values()) or "ended"

    def checkpoint(self) -> Any:
        """Called by submitit when SLURM's warning comes: end the runs, which save, and say what to queue again."""
        from submitit.helpers import DelayedSubmission

        self._sweep.stop(getattr(signal, f"SIG{_WARNING}"))
        return DelayedSubmission(self)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_sweep"}


class Cluster:
    """A sweep whose runs are submitted.

    Args:
        executor: one of ``EXECUTORS``.
        options: of submitit's AutoExecutor, such as timeout_min, gpus_per_node, slurm_partition.
        jobs: at a time; of a search, workers. Default: all of a grid on a cluster, one here, one worker.
    """

    def __init__(self, sweep: Sweep, executor: str, options: Mapping[str, Any], jobs: int | None = None) -> None:
        self.sweep, self.executor, self.jobs = sweep, executor, jobs
        self.options = checked(executor, options)
        self.folder = sweep.out.absolute() / FOLDER
        self.tried: dict[str, Any] = {}  # submitit's jobs that this call has submitted

    def submit(self) -> list[str]:
        """Submit what is missing and neither waits nor runs; the numbers of the new jobs."""
        self.sweep.read()
        tasks = self._tasks()
        busy = self.busy()
        new = {name: task for name, task in tasks.items() if name not in busy and name not in self.tried}
        if self.executor == "local":  # nobody else keeps them from starting all at once
            room = (self.jobs or 1) - len(busy)
            new = {name: new[name] for name in list(new)[: max(0, room)]}
        if not new:
            return []
        executor = self._engine()
        with executor.batch():
            jobs = [executor.submit(task) for task in new.values()]
        self.tried |= dict(zip(new, jobs, strict=True))
        noted = self._noted() | {name: [self.executor, self.tried[name].job_id] for name in new}
        file = self.folder / "jobs.json"
        file.with_suffix(".part").write_text(json.dumps(noted, indent=1) + "\n", encoding="utf-8")
        file.with_suffix(".part").replace(file)
        if self.executor == "debug":
            for job in jobs:
                job.result()
        return [job.job_id for job in jobs]

    def busy(self) -> dict[str, str]:
        """Submitted jobs that wait or run, with their numbers."""
        import submitit

        noted = self._noted()
        queued: dict[str, Any] = {
            name: submitit.SlurmJob(folder=self.folder, job_id=number)
            for name, (executor, number) in noted.items()
            if executor == "slurm"
        }
        if queued:
            next(iter(queued.values())).done(force_check=True)  # asks for all of them at once
        found = {name: number for name, (_, number) in noted.items() if name in queued and not queued[name].done()}
        here = {name: number for name, (executor, number) in noted.items() if executor == "local"}
        return found | {name: number for name, number in here.items() if self._runs_here(name, number)}

    def wait(self) -> None:
        """Stay until nothing is missing or on its way; submit what the plan asks for meanwhile."""
        while True:
            numbers = self.submit()
            if numbers:
                print(f"submitted {len(numbers)} jobs more: {', '.join(numbers)}.", flush=True)
            if not self.busy():
                self.sweep.read()
                return
            time.sleep(0.5 if self.executor == "local" else 30)

    def lost(self) -> dict[str, str]:
        """Runs that this call has submitted and that have ended without a record: where to look."""
        self.sweep.read()
        lacking = [name for name in self._tasks() if name in self.tried and name not in self.busy()]
        return {
            name: f"{name} has ended without a record: read {self.sweep.out / name}.log and "
            f"{self.tried[name].job_id}_0_log.* "
            f"in {self.folder}."
            for name in lacking
        }

    def _tasks(self) -> dict[str, Task]:
        sweep = self.sweep
        if isinstance(sweep, SearchSweep):
            left = sweep.known() - sweep.ended()
            return {f"worker-{i}": Task(sweep, None) for i in range(min(self.jobs or 1, left))}
        return {job.name: Task(sweep, [job]) for job in sweep.missing()}

    def _engine(self) -> Any:
        import submitit

        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / ".gitignore").write_text("*\n")
        # Jobs unpickle classes of this repository, wherever they start.
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "SUBMITIT_PREEMPT_SIGNAL": _WARNING}
        if self.executor != "slurm":
            os.environ |= environment((), self.jobs or 1)
            executor = submitit.AutoExecutor(self.folder, cluster=self.executor)
            executor.update_parameters(timeout_min=7 * 24 * 60)
        else:
            try:
                executor = submitit.AutoExecutor(self.folder, cluster="slurm", slurm_max_num_timeout=1000)
            except RuntimeError as error:
                raise ValueError(f"this machine has no SLURM ({error}): leave --executor slurm out.") from error
            setup = [
                f"export PYTHONPATH={shlex.quote(str(ROOT))}:$PYTHONPATH",
                f"export SUBMITIT_PREEMPT_SIGNAL={_WARNING}",
            ]
            executor.update_parameters(
                name=self.sweep.plan.name,
                slurm_setup=[*setup, *self.options.get("slurm_setup", [])],
                slurm_additional_parameters={
                    "requeue": True,
                    "signal": f"{_WARNING}@{self.options.get('slurm_signal_delay_s', LEAD)}",
                    **self.options.get("slurm_additional_parameters", {}),
                },
                **({"slurm_array_parallelism": self.jobs} if self.jobs else {}),
            )
        own = ("slurm_setup", "slurm_additional_parameters")
        try:
            executor.update_parameters(**{key: value for key, value in self.options.items() if key not in own})
        except (NameError, TypeError, ValueError) as error:
            raise ValueError(
                f"submitit refuses an option ({error}): correct the plan's slurm, the file of --slurm or --option"
            ) from error
        return executor

    def _noted(self) -> dict[str, list[str]]:
        file = self.folder / "jobs.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def _runs_here(self, name: str, number: str) -> bool:
        """Whether a job of submitit's local executor, whose number is its process's, has neither ended nor died."""
        if name in self.tried:
            return not self.tried[name].done()
        if any(self.folder.glob(f"{number}_*_result.pkl")):
            return False
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            return False
        return True


def checked(executor: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, if a sweep can use them.

    Raises:
        ValueError: it cannot, or submitit is not installed.
    """
    try:
        import submitit  # noqa: F401
    except ImportError as error:
        raise ValueError("--executor needs submitit, which is not installed: pip install submitit.") from error
    if executor not in EXECUTORS:
        raise ValueError(f"there is no executor {executor}: choose from process, {', '.join(EXECUTORS)}.")
    for key in ("nodes", "tasks_per_node"):
        if options.get(key, 1) != 1:
            raise ValueError(
                f"{key} is {options[key]}, but a run of a sweep takes one node and one task: leave it out."
            )
    if executor == "slurm" and "timeout_min" not in options:
        raise ValueError("a SLURM job needs a time limit: give it, as in --option timeout_min=600.")
    return dict(options)


def read_options(path: Path | None, pairs: Sequence[str], plan: Mapping[str, Any]) -> dict[str, Any]:
    """Options of jobs: the plan's, then those of a file, then those of the command line.

    Raises:
        ValueError: the file holds no mapping, or a pair is not KEY=VALUE.
    """
    import yaml

    options = dict(plan)
    if path is not None:
        try:
            given = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read ({str(error).splitlines()[0]}): correct it.") from error
        if not isinstance(given, dict):
            raise ValueError(f"{path} must hold options as KEY: VALUE, such as timeout_min: 600.")
        options |= given
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise ValueError(f"cannot read --option {pair}: write KEY=VALUE, as in timeout_min=600.")
        options[key] = yaml.safe_load(value)
    return options
