"""The best configuration of a sweep as a recipe: a file for configs/recipe/."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from reporting import Run, units

from .local import ROOT

# Of the trainer's settings, those that recipes set
TRAINER = ("steps", "batch_size", "warmup_fraction", "min_lr_ratio")


def recipe_text(run: Run, sweep: str, runs: int) -> str:
    """A recipe with the settings of `run`, and where they come from.

    Args:
        sweep: its name.
        runs: of this method and model, among which this is the best.
    """
    name = f"{run.optimizer}-{run.model}"
    shown = run.path.relative_to(ROOT) if run.path.is_relative_to(ROOT) else Path(run.path.parent.name, run.path.name)
    recipe = {
        "recipe": name,
        "optimizer": _own_settings(run),
        "trainer": {key: run.setting(f"trainer.{key}") for key in TRAINER if run.setting(f"trainer.{key}") is not None},
    }
    comments = [
        "# @package _global_",
        f"# The best of {runs} runs of the sweep {sweep}, by the validation loss of seed {run.seed}: "
        f"{math.log(run.perplexity):.4f} (perplexity",
        f"# {units.perplexity(run.perplexity)}) on data={run.data}. Record: {shown}, commit "
        f"{str(run.environment.get('commit', 'unknown'))[:12]}.",
    ]
    return "\n".join(comments) + "\n" + yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None)


def write_recipe(run: Run, folder: Path, sweep: str, runs: int) -> Path:
    """Write `folder`/METHOD-MODEL.yaml.

    Raises:
        ValueError: the file is there already.
    """
    file = folder / f"{run.optimizer}-{run.model}.yaml"
    if file.exists():
        raise ValueError(f"{file} exists: give another folder to --write-recipe, or remove it first.")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(recipe_text(run, sweep, runs), encoding="utf-8")
    return file


def _own_settings(run: Run) -> dict[str, Any]:
    """Both rates, and what differs from the method's defaults."""
    file = ROOT / "configs" / "optimizer" / f"{run.optimizer}.yaml"
    defaults: Mapping[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    given: Mapping[str, Any] = run.config.get("optimizer", {})

    def differs(key: str) -> bool:
        usual = defaults.get(key)
        if isinstance(usual, str) and (name := re.fullmatch(r"\$\{optimizer\.(\w+)\}", usual)):
            usual = given.get(name[1])
        elif isinstance(usual, str) and "${" in usual:
            return False  # of the run's own, such as its seed
        return key != "name" and (key not in defaults or usual != given[key])

    return {"lr": run.lr, "adam_lr": run.adam_lr} | {key: given[key] for key in given if differs(key)}
