"""Records of the paper's experiments, without having trained anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from reporting.paper.cells import EXPERIMENTS
from reporting.paper.records import expected

from .synthetic import TOKENS_PER_STEP, write_run


def write_cell(
    root: Path,
    experiment: str,
    perplexity: float = 30.0,
    seed: int = 42,
    data: str = "allenai/c4",
    settings: dict[str, Any] | None = None,
    summary: dict[str, Any] | None = None,
    **how: Any,
) -> Path:
    """A record at `root`/<experiment>/s<seed> that fits the paper but for `settings` (dotted names).

    Args:
        how: passed to `write_run`, as in steps=300 or finished=False.
    """
    about = EXPERIMENTS[experiment]
    steps = how.pop("steps", about.steps)
    values = {
        "skipped_steps": 0,
        "tokens": 131072 * steps,
        "validation_tokens": 10_000_000,
        "training_seconds": 0.01 * steps,
    }
    folder = write_run(
        root / experiment / f"s{seed}",
        about.optimizer,
        perplexity=perplexity,
        seed=seed,
        steps=steps,
        eval_every=500,
        log_every=500,
        data=data,
        kind="hub",
        tokenizer="t5-base",
        summary=values | (summary or {}),
        **how,
    )
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for key, value in (expected(about) | {"trainer.steps": steps} | (settings or {})).items():
        part, name = key.split(".")
        config[part][name] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def add_basis(folder: Path, cosines: dict[str, dict[int, list[float]]]) -> None:
    """Lines of kind "basis": matrix -> step -> |cosine| of columns 1, 2, 4, 8."""
    with (folder / "metrics.jsonl").open("a") as file:
        for name, steps in cosines.items():
            for step, cosine in steps.items():
                file.write(json.dumps({"kind": "basis", "step": step, "name": name, "cosine": cosine}) + "\n")


__all__ = ["TOKENS_PER_STEP", "add_basis", "write_cell"]
