"""Which run records fill a cell of the paper: those of its experiment that were run as the paper says.

cell = CELLS[0]
filling = fill(cell)                    Filling(runs=[], others=[]) where nobody has run it
filling.value, filling.spread           mean over seeds and standard deviation

A record lies at results/runs/paper/<experiment>/<any folder>/. One that was shortened, fed with other data or changed in
a number that the paper prints is not the cell's number: it comes in `others`, with the reasons.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from .. import units
from ..records import C4, Run, SafeLoader, dataset_of, find_runs, lookup
from ..statistics import deviation
from .cells import EXPERIMENTS, RECORDS, SIZES, Cell, Experiment
from .numbers import RESULTS, load_paper

CONFIGS = RESULTS.parent / "configs"
RUNS = RESULTS.parent / RECORDS

# T5's tokenizer, as the published code base has it: the sizes share one model, whose names on the Hub are many.
T5 = re.compile(r"(?:google-t5/|google/)?t5-(?:small|base|large|3b|11b)")
T5_MODEL = "9e925505c08efc3173ed8aa1d7e7e396fa47f6e4aa7aee5a5f56093ca6722a93"  # SHA-256 of its spiece.model
VALIDATION_TOKENS = 9_900_000  # at least; the evaluation of the protocol reads 10M tokens

# Columns of Tables 7 to 9 and 11 by our keys; betas are compared as a list.
_KEYS = {
    "learning_rate": "lr",
    "update_scale": "scale",
    "alpha": "scale",
    "alpha_c": "compensation_scale",
    "rank": "rank",
    "update_interval": "update_interval",
    "K": "update_interval",
    "l": "leading",
    "beta": "beta",
}
_TABLES = {
    "galore": "table7",
    "fira": "table7",
    "adam": "table8",
    "racs": "table9",
    "alice": "table11",
    "alice_0": "table11",
}
_PARTS = {"optimizer.tracking": True, "optimizer.switching": "complement", "optimizer.compensation": "optimal"}
# Changes no number, or none beyond rounding. The tokenizer that was used is compared by itself: its file has many names.
_SILENT = ("optimizer.log_basis", "model.attn_implementation", "model.tokenizer")


@dataclass(frozen=True)
class Filling:
    """What has been run for a cell.

    Attributes:
        runs: records that count, by seed.
        others: (record, reasons why it does not count).
        values: the cell's number of each run, infinite where it diverged.
    """

    runs: list[Run]
    others: list[tuple[Run, list[str]]]
    values: list[float]

    @property
    def value(self) -> float:
        """Mean over seeds; NaN where nobody has run it."""
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds (n - 1); None with one seed or a diverged run."""
        return deviation(self.values)


def fill(cell: Cell, root: str | Path = RUNS) -> Filling:
    """The records of a cell's experiment below `root`, sorted into those that count and those that do not.

    Raises:
        ValueError: a record is malformed.
    """
    filling = Filling([], [], [])
    for run in experiment_runs(cell.experiment, root):
        value = value_of(run, cell)
        reasons = misfits(run, EXPERIMENTS[cell.experiment])
        if math.isnan(value):
            reasons = [*reasons, "not finished" if cell.step is None else f"no evaluation at step {cell.step:,}"]
        if not reasons and run.seed in [counted.seed for counted in filling.runs]:
            reasons = [f"seed {run.seed} is counted already"]
        if reasons:
            filling.others.append((run, reasons))
        else:
            filling.runs.append(run)
            filling.values.append(value)
    return filling


def experiment_runs(experiment: str, root: str | Path = RUNS) -> list[Run]:
    """Every record of an experiment, by seed, of one seed the shortest name (s42) first; none if there is no folder."""
    folder = Path(root) / experiment
    return (
        sorted(find_runs(folder), key=lambda run: (run.seed or 0, len(run.path.name), run.path.name))
        if folder.is_dir()
        else []
    )


def value_of(run: Run, cell: Cell) -> float:
    """The perplexity that the cell asks for: final, or at its step. NaN if it is not there yet, infinite if it never will."""
    if cell.step is None:
        return run.perplexity
    for step, value in zip(run.evals["step"], run.evals["perplexity"], strict=True):
        if step == cell.step:
            return float(value)
    return math.nan if run.diverged is None else math.inf


def misfits(run: Run, experiment: Experiment) -> list[str]:
    """Why a record is not a run of `experiment`: each difference from what the paper says, in a few words."""
    found = []
    printed = wanted(experiment)
    for key, value in expected(experiment).items():
        if key not in printed and not _recorded(run, key):
            continue  # a key that is younger than the record
        got = run.setting(key)
        if not _same(got, value):
            found.append(
                f"{key.removeprefix('optimizer.').removeprefix('trainer.')} {_show(got)} instead of {_show(value)}"
            )
    for split in ("train", "validation"):
        if dataset_of(run, split) != C4:
            found.append(f"{split} data {_source(run, split)} instead of C4")
    name, model = (lookup(run.environment, f"tokenizer.{key}") for key in ("name", "fingerprint"))
    name = name or run.setting("tokenizer")
    if model != T5_MODEL and not T5.fullmatch(str(name)):
        found.append(f"tokenizer {name} instead of T5's")
    if skipped := (run.summary or {}).get("skipped_steps"):
        found.append(f"{skipped:,} steps without an update")
    tokens = (run.summary or {}).get("validation_tokens")
    if tokens is not None and tokens < VALIDATION_TOKENS:
        found.append(f"evaluated on {units.count(tokens)} tokens instead of 10M")
    done = (run.summary or {}).get("steps")
    if done is not None and done != run.setting("trainer.steps"):
        found.append(f"ended at step {done:,}")
    return list(dict.fromkeys(found))


def wanted(experiment: Experiment) -> dict[str, Any]:
    """What the paper prints about a run, by dotted name: the model, the protocol, and Tables 7 to 11."""
    values: dict[str, Any] = {
        "model.name": experiment.model,
        "optimizer.name": experiment.optimizer,
        "trainer.steps": experiment.steps,
        "trainer.batch_size": 512,
        "trainer.warmup_fraction": 0.1,
        "trainer.min_lr_ratio": 0.1,
        "data.length": 256,
        "data.rows": "truncate",
        "data.protocol": "exact",
    }
    if experiment.optimizer != "adam":
        values["optimizer.last_layer"] = experiment.last_layer
    values |= _hyper_parameters(experiment)
    if experiment.optimizer in ("alice", "alice_0"):
        values |= _PARTS | ({"optimizer.tracking": False} if experiment.optimizer == "alice_0" else {})
    return values | {key: value for key, value in experiment.settings.items() if key not in _SILENT}


@cache
def _yaml(group: str, name: str) -> dict[str, Any]:
    file = CONFIGS / group / f"{name}.yaml"
    return yaml.load(file.read_text(encoding="utf-8"), Loader=SafeLoader) if file.is_file() else {}


def expected(experiment: Experiment) -> dict[str, Any]:
    """What a record's configuration must hold, by dotted name: what the paper prints, and what the experiment's files set.

    A run that changes what the paper leaves open (the Adam group's rate, the first basis) is another run than the command's.
    """
    recipe = _yaml("recipe", f"{experiment.optimizer}-{experiment.model}")
    values = {f"model.{key}": value for key, value in _yaml("model", experiment.model).items()}
    values |= {
        f"{section}.{key}": value
        for section, own in (
            ("optimizer", _yaml("optimizer", experiment.optimizer)),
            ("optimizer", recipe.get("optimizer", {})),
            ("trainer", recipe.get("trainer", {})),
        )
        for key, value in own.items()
    }
    values |= {"trainer.precision": "bf16", "trainer.grad_clip": None, "optimizer.last_layer": experiment.last_layer}
    if experiment.optimizer == "adam":
        del values["optimizer.last_layer"]
    values |= experiment.settings
    values |= wanted(experiment)
    for key, value in values.items():
        if isinstance(value, str) and value.startswith("${optimizer."):  # Adam's group, where it is as the rest
            values[key] = values.get(value[2:-1], value)
    return {
        key: value
        for key, value in values.items()
        if key not in _SILENT and not (isinstance(value, str) and "${" in value)
    }


def _recorded(run: Run, key: str) -> bool:
    """Whether a record's configuration has the key, be it null."""
    section, _, name = key.partition(".")
    return name in (run.config.get(section) or {})


def _hyper_parameters(experiment: Experiment) -> dict[str, Any]:
    if experiment.optimizer not in _TABLES:
        return {}  # Muon, Apollo: not in this paper
    table = load_paper().tables[_TABLES[experiment.optimizer]]
    size = SIZES[experiment.model.removeprefix("llama_")]
    row: Mapping[str, Any] = dict(zip(table["columns"], table["rows"][size], strict=True))
    values = {f"optimizer.{_KEYS[name]}": value for name, value in row.items() if name in _KEYS}
    if "beta1" in row:  # beta3 says nothing without tracking, which is asked for by itself
        values["optimizer.betas"] = [row["beta1"], row["beta2"]]
    return values


def _source(run: Run, split: str) -> str:
    """What is known of a text that is not known to be C4."""
    name = str(lookup(run.environment, f"data.{split}.name", run.data))
    return f"{name} (a layout, not a text: scripts/fetch_c4.py keeps where it is from)" if name == "c4_local" else name


def _same(got: Any, value: Any) -> bool:
    if isinstance(value, list):
        return isinstance(got, list) and len(got) >= len(value) and all(map(_same, got, value))
    if isinstance(value, float) and isinstance(got, (int, float)):
        return math.isclose(got, value)
    return bool(got == value)


def _show(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "[" + ", ".join(map(str, value)) + "]" if isinstance(value, list) else str(value)


def basis_similarities(run: Run) -> dict[str, dict[int, list[float]]]:
    """The lines of kind "basis": matrix -> step -> |cosine| of columns 1, 2, 4, 8 before and after the update (Figure 6).

    Empty without optimizer.log_basis. A line that a resumed run wrote again replaces the earlier one.
    """
    found: dict[str, dict[int, list[float]]] = {}
    path = run.path / "metrics.jsonl"
    for raw in path.read_bytes().split(b"\n") if path.is_file() else []:
        if b'"basis"' not in raw:
            continue
        try:
            line = json.loads(raw)
        except ValueError:
            continue  # the last line of a process that died; load_run names any other
        if line.get("kind") == "basis":
            found.setdefault(line["name"], {})[int(line["step"])] = [float(value) for value in line["cosine"]]
    return found
