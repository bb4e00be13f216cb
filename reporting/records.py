"""Reading run records: the folders that the trainer leaves behind.

run = load_run("runs/quickstart/llama_tiny-alice-s42")
run.perplexity, run.train["loss"], run.evals["perplexity"]
runs = find_runs("results/runs/compare")
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

TRAIN_KEYS = ("step", "loss", "lr", "adam_lr", "tokens", "tokens_per_second", "optimizer_ms", "grad_norm")
EVAL_KEYS = ("step", "loss", "perplexity", "tokens")

C4 = "allenai/c4"
_C4_FILE = re.compile(r"c4-(?:train\.\d{5}-of-01024|validation\.\d{5}-of-00008)\.json\.gz")  # as many as the Hub has

# What makes up a record: small enough to commit. Checkpoints, the model and pictures can be made again from the rest.
RECORD_FILES = (
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "summary.json",
    "samples.txt",
    "diverged.json",
    "evaluations.json",
)

# libyaml's where PyYAML has it: ten times as fast, and a sweep is hundreds of records
SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Columns = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Run:
    """One run record. `train` and `evals` map each key of the metric lines to an array `[lines]`, ordered by step.

    A key that a line lacks, or that is null there, reads NaN. The keys of the contract are always present, with empty
    arrays where nothing has been recorded yet.
    """

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    summary: dict[str, Any] | None  # None: the run has not ended
    train: Columns
    evals: Columns
    diverged: dict[str, Any] | None = None  # left by a sweep whose run ended in a non-finite loss

    def setting(self, key: str, default: Any = None) -> Any:
        """A value of the resolved configuration by its dotted name; `default` where absent or null."""
        return lookup(self.config, key, default)

    @property
    def optimizer(self) -> str:
        return str(self.setting("optimizer.name", "unknown"))

    @property
    def model(self) -> str:
        return str(self.setting("model.name", "unknown"))

    @property
    def data(self) -> str:
        return str(self.setting("data.name", lookup(self.environment, "data.name", "unknown")))

    @property
    def lr(self) -> float:
        """Peak rate of the matrices."""
        return float(self.setting("optimizer.lr", math.nan))

    @property
    def adam_lr(self) -> float:
        """Peak rate of everything that is not a matrix; the configuration's null means the rate of the matrices."""
        return float(self.setting("optimizer.adam_lr", self.lr))

    @property
    def seed(self) -> int | None:
        return self.setting("seed")

    @property
    def perplexity(self) -> float:
        """Final validation perplexity: infinite for a diverged run, NaN for one that has not ended."""
        if self.diverged is not None:
            return math.inf
        value = (self.summary or {}).get("perplexity")
        if value is None:
            return math.nan
        return float(value) if math.isfinite(value) else math.inf

    def training_tokens(self, steps: NDArray[np.float64]) -> NDArray[np.float64]:
        """Training tokens seen by the given steps, shape `[len(steps)]`, from the lines of the training."""
        if len(self.train["step"]) == 0:
            return np.full(len(steps), math.nan)
        return np.interp(steps, np.r_[0.0, self.train["step"]], np.r_[0.0, self.train["tokens"]])


def lookup(tree: Any, key: str, default: Any = None) -> Any:
    """`tree["a"]["b"]` for the key "a.b"; `default` where something on the way is absent or null."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return default if tree is None else tree


def dataset_of(run: Run, split: str = "train") -> str | None:
    """The data set on the Hub that a run read for `split`, as far as its record tells; None for other text.

    data=c4_local names a layout that any text can have: its record tells by the manifest of scripts/fetch_c4.py, or by
    the file names of the whole C4, whether it is that. Prepared data carries what it was made from.
    """
    source = lookup(run.environment, f"data.{split}", {})
    repository, name = source.get("repository"), source.get("name", run.data)
    if repository is not None:
        return str(repository)
    if _C4_FILE.fullmatch(str(source.get("first_file", "")).rpartition("/")[2]):
        return C4
    return str(name) if run.setting("data.kind") == "hub" or name == C4 else None


def load_run(path: str | Path) -> Run:
    """The record in the folder `path`, which may belong to a run that is still going on or was cut off.

    Raises:
        FileNotFoundError: the folder holds no record.
        ValueError: a file of the record is malformed; the message names the file, and the line in metrics.jsonl.
    """
    path = Path(path)
    if not (path / "config.yaml").is_file():
        raise FileNotFoundError(
            f"{path} is not a run folder, because it holds no config.yaml: "
            "give the folder that train.py names as run_dir."
        )
    train, evals = _metrics(path / "metrics.jsonl")
    return Run(
        path=path,
        config=_config(path / "config.yaml"),
        environment=_json(path / "environment.json") or {},
        summary=_json(path / "summary.json"),
        train=train,
        evals=evals,
        diverged=_json(path / "diverged.json"),
    )


def find_runs(folder: str | Path) -> list[Run]:
    """Every record below `folder`, itself included, ordered by path."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}: give one that holds run records.")
    if _is_run(folder):
        return [load_run(folder)]
    runs: list[Run] = []
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not child.name.startswith("."):
            runs += find_runs(child)
    return runs


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and any((folder / name).is_file() for name in RECORD_FILES[1:])


def _config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: restore it, or give another run folder.") from error
    return _mapping(config, path)


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: restore it, or give another run folder.") from error
    return _mapping(value, path)


def _mapping(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a mapping of keys to values: restore it, or give another run folder.")
    return value


def _metrics(path: Path) -> tuple[Columns, Columns]:
    lines: dict[str, dict[int, dict[str, Any]]] = {"train": {}, "eval": {}}
    content = path.read_bytes() if path.is_file() else b""
    *whole, rest = content.split(b"\n")
    for number, raw in enumerate([*whole, rest], start=1):
        if not raw.strip():
            continue
        try:
            line = json.loads(raw)
            kind, step = line["kind"], int(line["step"])
        except (ValueError, KeyError, TypeError) as error:
            if number > len(whole):
                break  # no line end: the process died while writing it
            raise ValueError(
                f"{path}, line {number}: not a metrics line (JSON with kind and step): remove the line, "
                "or restore the file."
            ) from error
        # A run that went on from a checkpoint writes the steps after that checkpoint again: the later line counts.
        lines.setdefault(kind, {})[step] = line
    return _columns(lines["train"], TRAIN_KEYS), _columns(lines["eval"], EVAL_KEYS)


def _columns(lines: dict[int, dict[str, Any]], keys: tuple[str, ...]) -> Columns:
    rows = [lines[step] for step in sorted(lines)]
    names = [*keys, *sorted({key for row in rows for key, value in row.items() if _is_number(value)} - set(keys))]
    return {
        name: np.array([row[name] if _is_number(row.get(name)) else math.nan for row in rows], dtype=np.float64)
        for name in names
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
