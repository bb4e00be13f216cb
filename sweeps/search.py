"""Searches: Optuna chooses the settings of each run, and which runs end early.

All that Optuna knows lies in one file, ``optuna.journal``, in the folder of the sweep. Its lock is a file made by O_EXCL, which
holds on NFS from version 3 on, so several processes and machines may work on one search. Each optimizer of each model has a
study of its own, with equally many trials; trial 7 of Alice is the run ``alice-t007``.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretraining.files import replace_text

from .local import PRUNED, Running, Sweep
from .plan import Job, Search

if TYPE_CHECKING:
    import optuna

JOURNAL = "optuna.journal"
RATES = ("optimizer.lr", "optimizer.adam_lr")
ASKED = timedelta(seconds=60)  # a trial without settings for so long was left by a process that died


class SearchSweep(Sweep):
    """A sweep whose plan has a ``search``. Arguments and attributes as `Sweep`; results of pruned runs are infinite.

    A trial is RUNNING in the journal until its run has ended; one that nobody is at (claims.py) is taken up again.
    """

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        assert self.plan.search is not None
        self.search: Search = self.plan.search
        self.pruned: dict[str, int] = {}  # runs ended early, and their last step
        self._storage: optuna.storages.JournalStorage | None = None
        self._studies: dict[tuple[str | None, str], optuna.Study] = {}
        self._ending: dict[str, int] = {}  # running jobs that have been told to end, and why: their step
        self._seen: dict[str, int] = {}  # bytes of metrics.jsonl that have been read

    # What there is ----------------------------------------------------------------------------------------------------

    def jobs(self) -> list[Job]:
        """The run of every trial that has its settings."""
        return [self._job(model, name, trial) for model, name, trial in self._trials() if self._complete(name, trial)]

    def known(self) -> int:
        return self.search.trials * len(list(self._keys()))

    def read(self) -> None:
        """Take in the trials that have ended.

        Raises:
            ValueError: a record of other settings than its trial's, or a journal of other ranges than the plan's.
        """
        for model, name, trial in self._trials():
            job = self._job(model, name, trial) if self._complete(name, trial) else None
            if job is None or job.name in self.results or not trial.state.is_finished():
                continue
            if trial.state.name == "PRUNED":
                self._prune(job, trial.last_step or 0)
            elif self._ended(job):
                super()._take(job)
            else:  # its record was removed, the journal still knows
                loss = math.inf if trial.value is None else trial.value
                self.results[job.name] = math.exp(loss) if math.isfinite(loss) else math.inf

    def best(self, model: str | None, optimizer: str) -> Job | None:
        """The run with the lowest loss of a search that has ended; None before, or if every run diverged or was pruned."""
        jobs = [job for job in self.jobs() if (job.model, job.optimizer) == (model, optimizer)]
        if len(jobs) < self.search.trials or any(job.name not in self.results for job in jobs):
            return None
        best = min(jobs, key=lambda job: self.results[job.name])
        return None if math.isinf(self.results[best.name]) else best

    def _keys(self) -> Iterator[tuple[str | None, str]]:
        return product(self.plan.models, self.search.ranges)

    def _trials(self) -> Iterator[tuple[str | None, str, optuna.trial.FrozenTrial]]:
        if not self._studies and not (self.out / JOURNAL).is_file():
            return
        for model, name in self._keys():
            study = self._study(model, name)
            for trial in study.get_trials(deepcopy=False) if study else ():
                if trial.number < self.search.trials and trial.state.name not in ("FAIL", "WAITING"):
                    yield model, name, trial

    def _complete(self, name: str, trial: optuna.trial.FrozenTrial) -> bool:
        return trial.params.keys() >= self.search.ranges[name].keys()

    def _job(self, model: str | None, name: str, trial: optuna.trial.FrozenTrial) -> Job:
        lr, adam_lr = (float(f"{trial.params.get(key, math.nan):.6g}") for key in RATES)
        others = [f"{key}={value:.6g}" for key, value in trial.params.items() if key not in RATES]
        settings = (*self.plan.settings, *self.plan.settings_of.get(name, ()), *others)
        folder = f"{name}-t{trial.number:03d}"
        return Job(f"{model}/{folder}" if model else folder, name, lr, adam_lr, self.plan.seeds[0], settings, model)

    # What Optuna is asked and told ------------------------------------------------------------------------------------

    def _study(self, model: str | None, name: str, create: bool = False) -> optuna.Study | None:
        """The study of an optimizer, made if it is missing and ``create`` is set."""
        if (model, name) in self._studies:
            return self._studies[model, name]
        optuna, storage = _optuna(), self._journal()
        title = f"{model}/{name}" if model else name
        ranges = {key: list(ends) for key, ends in self.search.ranges[name].items()}
        try:
            study = optuna.create_study(storage=storage, study_name=title) if create else None
            if study is not None:  # nobody else made it
                study.set_user_attr("ranges", ranges)
                study.enqueue_trial({key: math.sqrt(low * high) for key, (low, high) in ranges.items()})
        except optuna.exceptions.DuplicatedStudyError:
            study = None
        try:
            study = study or optuna.load_study(storage=storage, study_name=title)
        except KeyError:
            return None
        study.pruner = self._pruner(model)
        for _ in range(20):  # its maker may be about to write them
            there = study.user_attrs.get("ranges")
            if there is not None:
                break
            time.sleep(0.05)
        if there is not None and there != ranges:
            raise ValueError(
                f"{self.out / JOURNAL} holds a search of {title} with other ranges: choose another --out, or remove "
                "that folder."
            )
        self._studies[model, name] = study
        return study

    def _journal(self) -> optuna.storages.JournalStorage:
        if self._storage is None:
            optuna = _optuna()
            from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

            file = str(self.out / JOURNAL)
            self._storage = optuna.storages.JournalStorage(JournalFileBackend(file, lock_obj=JournalFileOpenLock(file)))
        return self._storage

    def _pruner(self, model: str | None) -> optuna.pruners.BasePruner:
        pruners, search = _optuna().pruners, self.search
        start = search.prune_from if isinstance(search.prune_from, int) else search.prune_from[str(model)]
        if search.prune == "median":
            return pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=start)
        if search.prune == "halving":
            return pruners.SuccessiveHalvingPruner(min_resource=max(1, start), reduction_factor=3)
        return pruners.NopPruner()

    def _trial(self, job: Job) -> optuna.Trial:
        """A job's trial, to report to."""
        study = self._study(job.model, job.optimizer)
        assert study is not None
        [trial] = [each for each in study.get_trials(deepcopy=False) if each.number == _number(job)]
        return _optuna().Trial(study, trial._trial_id)

    def _suggest(self, study: optuna.Study, name: str, trial: optuna.Trial) -> None:
        """Give a trial the settings that it lacks."""
        # A sampler of its own for each trial: one that all begin with the plan's seed would repeat itself in every process.
        words = f"{self.search.seed} {study.study_name} {trial.number}"
        seed = int.from_bytes(hashlib.sha256(words.encode()).digest()[:4], "big")
        study.sampler = _optuna().samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
        for key, (low, high) in self.search.ranges[name].items():
            trial.suggest_float(key, low, high, log=True)

    def _fill(self) -> None:
        """Go on with trials that nobody is at, then ask for new ones, of the optimizer that has had the fewest."""
        for model, name in self._keys():
            self._study(model, name, create=True)
        self._finish_asking()
        super()._fill()
        while len(self.running) < len(self.slots):
            open_ = {key: count for key in self._keys() if (count := self._asked(*key)) < self.search.trials}
            if not open_:
                return
            self._ask(*min(open_, key=open_.__getitem__))
            super()._fill()

    def _asked(self, model: str | None, name: str) -> int:
        study = self._study(model, name)
        assert study is not None
        return sum(trial.state.name != "WAITING" for trial in study.get_trials(deepcopy=False))

    def _ask(self, model: str | None, name: str) -> None:
        study = self._study(model, name)
        assert study is not None
        trial = study.ask()
        if trial.number >= self.search.trials:  # another process has asked for the last one meanwhile
            study.tell(trial, state=_optuna().trial.TrialState.FAIL)
        else:
            self._suggest(study, name, trial)

    def _finish_asking(self) -> None:
        for model, name, trial in list(self._trials()):
            old = trial.datetime_start is not None and datetime.now() - trial.datetime_start > ASKED
            if old and not trial.state.is_finished() and not self._complete(name, trial):
                study = self._study(model, name)
                assert study is not None
                self._suggest(study, name, _optuna().Trial(study, trial._trial_id))

    def _watch(self, entry: Running) -> None:
        """Report evaluations, and end a run that looks bad."""
        job, file = entry.job, self.out / entry.job.name / "metrics.jsonl"
        size = file.stat().st_size if file.is_file() else 0
        if job.name in self._ending or size == self._seen.get(job.name, 0):
            return
        self._seen[job.name] = size
        trial = self._trial(job)
        for step in _report(trial, file):
            if trial.should_prune():
                self._ending[job.name] = step
                entry.process.terminate()
                return

    def _end(self, entry: Running) -> str:
        job, step = entry.job, self._ending.pop(entry.job.name, None)
        folder = self.out / job.name
        if step is None or (folder / "summary.json").is_file():
            return super()._end(entry)
        losses = dict(_evaluations(folder / "metrics.jsonl"))
        kept = {"step": step, "loss": losses.get(step), "by": self.search.prune}
        replace_text(folder / PRUNED, json.dumps(kept, indent=2) + "\n")
        self._tidy(job)
        self._take(job)
        return f"pruned at step {step}"

    def _ended(self, job: Job) -> bool:
        return (self.out / job.name / PRUNED).is_file() or super()._ended(job)

    def _take(self, job: Job) -> None:
        """Keep the result, and tell Optuna."""
        states = _optuna().trial.TrialState
        trial = self._trial(job)
        file = self.out / job.name / PRUNED
        if file.is_file():
            self._prune(job, json.loads(file.read_text(encoding="utf-8"))["step"])
            told: dict[str, Any] = {"state": states.PRUNED}
        else:
            super()._take(job)
            # The last ones, or all of a run that nobody has watched: later runs are compared with them.
            list(_report(trial, self.out / job.name / "metrics.jsonl"))
            told = {"values": math.log(self.results[job.name]), "state": states.COMPLETE}
        trial.study.tell(trial, skip_if_finished=True, **told)

    def _prune(self, job: Job, step: int) -> None:
        self.pruned[job.name] = step
        self.results[job.name] = math.inf


def _number(job: Job) -> int:
    return int(job.name.rpartition("-t")[2])


def _report(trial: optuna.Trial, file: Path) -> Iterator[int]:
    """Tell Optuna of the evaluations that it does not know yet; their steps."""
    frozen = trial.storage.get_trial(trial._trial_id)
    if frozen.state.is_finished():
        return
    for step, loss in _evaluations(file):
        if step not in frozen.intermediate_values:  # a run that goes on from a checkpoint repeats them
            trial.report(loss, step)
            yield step


def _evaluations(file: Path) -> Iterator[tuple[int, float]]:
    """Step and validation loss of each evaluation on record."""
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        try:
            entry = json.loads(line)
            if entry["kind"] == "eval":
                yield int(entry["step"]), float(entry["loss"])
        except (ValueError, KeyError, TypeError):
            continue  # the line that is being written


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ValueError("a search needs Optuna, which is not installed: pip install optuna.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
