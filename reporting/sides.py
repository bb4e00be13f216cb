"""Sides of a comparison: the runs of one configuration, and what their records say about them."""

from __future__ import annotations

import glob
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import yaml

from .records import Run, find_runs, lookup

# Settings that say nothing about a result, and those that only repeat others (recipe: its values are in the configuration).
SAYS_NOTHING = (
    "data.on_error",
    "data.path",
    "data.retries",
    "data.timeout",
    "data.workers",
    "eval.ngrams",
    "experiment_name",
    "paths",
    "recipe",
    "run_dir",
    "seed",  # every run is listed with its seed
    "tracker",
    "trainer.dry_run",
    "trainer.keep_every",
    "trainer.keep_last",
    "trainer.log_every",
    "trainer.max_skipped",
    "trainer.on_nonfinite",
    "trainer.resume",
    "trainer.sample_prompt",
    "trainer.sample_tokens",
    "trainer.save_every",
    "trainer.save_model",
)


@dataclass(frozen=True)
class Side:
    """Runs of one configuration, ordered by seed; several differ in the seed."""

    name: str
    runs: list[Run]

    @property
    def ended(self) -> list[Run]:
        """Those with a final perplexity; not the diverged ones."""
        return [run for run in self.runs if math.isfinite(run.perplexity)]


def load_side(given: str) -> Side:
    """The runs that `given` names: a run folder, a folder of runs, a pattern (`*`), or several of these between commas.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a record is malformed, or the runs are not of one configuration.
    """
    runs: dict[Path, Run] = {}
    for part in [given] if Path(given).exists() else [part.strip() for part in given.split(",") if part.strip()]:
        folders = [part] if Path(part).exists() else sorted(path for path in glob.glob(part) if Path(path).is_dir())
        if not folders:
            raise FileNotFoundError(
                f"There is no folder {part}: give the folder of a run, or one that holds its seeds."
            )
        runs |= {run.path.resolve(): run for folder in folders for run in find_runs(folder)}
    if not runs:
        raise FileNotFoundError(f"{given} holds no run record: give the folder that train.py names as run_dir.")
    ordered = sorted(runs.values(), key=lambda run: (run.seed or 0, str(run.path)))
    all_settings = [settings(run) for run in ordered]
    common = set.intersection(*map(set, all_settings))  # a setting that only some have came with a newer version
    for key in sorted(common):
        values = {value_text(each[key]) for each in all_settings}
        if len(values) > 1:
            raise ValueError(
                f"{given} holds runs of several configurations ({key}: {', '.join(sorted(values)[:4])}): "
                "name the runs of one of them, with commas between the folders or by a pattern."
            )
    return Side(given, ordered)


def state(run: Run) -> str:
    """One of "ended", "diverged" and "not ended"."""
    if math.isnan(run.perplexity):
        return "not ended"
    return "ended" if math.isfinite(run.perplexity) else "diverged"


def last_step(run: Run) -> int | None:
    """The step that the run diverged at, ended with, or has logged last."""
    logged = run.train["step"][-1] if len(run.train["step"]) else None
    steps = ((run.diverged or {}).get("step"), (run.summary or {}).get("steps"), logged)
    return next((int(step) for step in steps if is_number(step)), None)


def settings(run: Run) -> dict[str, Any]:
    """The configuration with dotted keys, without what says nothing. A part's seed says something if it is not the run's."""

    def flat(tree: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
        for key, value in tree.items():
            if isinstance(value, Mapping):
                yield from flat(value, f"{before}{key}.")
            else:
                yield f"{before}{key}", value

    return {
        key: value
        for key, value in flat(run.config)
        if not any(key == name or key.startswith(name + ".") for name in SAYS_NOTHING)
        and not (key.endswith(".seed") and value == run.seed)
    }


def value_text(value: Any) -> str:
    """A setting as the configuration writes it."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, (int, float)):
        return f"{value:.12g}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(value_text, value))}]"
    return str(value)


def facts(side: Side) -> dict[str, list[str]]:
    """All values that the environments of a side hold for each fact, those of resumed parts included."""
    found: dict[str, set[str]] = {}
    for run in side.runs:
        resumed = run.environment.get("resumed")
        for part in [run.environment, *(resumed if isinstance(resumed, list) else [])]:
            for key in ("commit", "uncommitted_changes", "python", "versions", "hardware", "precision"):
                value = lookup(part, key)
                inner = value if isinstance(value, dict) else {"": value}
                for name, fact in inner.items():
                    if fact is not None:
                        found.setdefault(f"{key}.{name}".strip("."), set()).add(value_text(fact))
    return {key: sorted(values) for key, values in found.items()}


def budget(run: Run) -> tuple[int, int]:
    """Steps and tokens of a run that has ended."""
    steps, tokens = ((run.summary or {}).get(key) for key in ("steps", "tokens"))
    return int(steps) if is_number(steps) else 0, int(tokens) if is_number(tokens) else 0


def runs_at_once(run: Run) -> int:
    """How many runs the sweep that left this record had going at a time, by its sweep.yaml; 1 if there is none.

    A sweep keeps it in the folder of its records, which lie there or, with several models, in a folder for each.
    """
    for folder in (run.path.parent, run.path.parent.parent):
        try:
            kept = yaml.safe_load((folder / "sweep.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue
        jobs = lookup(kept, "jobs", 1)
        return int(jobs) if is_number(jobs) else 1
    return 1


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float, np.floating)) and not isinstance(value, bool) and math.isfinite(value)
