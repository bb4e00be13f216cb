"""Records of the fair comparison as its sweeps would leave them, without training: a perplexity for every job of a plan."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import yaml

from sweeps import Job, Plan, load_plan
from sweeps.local import asked_for
from tests.reporting.synthetic import write_run

Value = Callable[[str, Job, str], float | None]  # (sweep, job, variant) -> perplexity; inf: diverges; None: not run


def write_fair(root: Path, plans: Path, value: Value, c4: float = 2.0) -> None:
    """Write the records of all plans in a folder below `root`; `c4` times the perplexity is what C4's text gives."""
    loaded = [load_plan(file) for file in sorted(plans.glob("fair_*.yaml"))]
    best = {}
    for grid in [plan for plan in loaded if plan.rates_from is None]:
        results = _write(root, grid, value, c4)
        keys = [(model, name) for model in grid.models for name in grid.optimizers]
        best[grid.name] = {key: pair for key in keys if (pair := grid.best(*key, results)) is not None}
    for plan in [plan for plan in loaded if plan.rates_from is not None]:
        _write(root, replace(plan, rates=best[plan.rates_from]), value, c4)


def _write(root: Path, plan: Plan, value: Value, c4: float) -> Mapping[str, float]:
    results: dict[str, float] = {}
    left_out: set[str] = set()
    while new := [job for job in plan.jobs(results) if job.name not in results and job.name not in left_out]:
        for job in new:
            name = job.name.rpartition("/")[2].rpartition("-s")[0] if plan.variants else job.optimizer
            perplexity = value(plan.name, job, name)
            if perplexity is None:
                left_out.add(job.name)
                continue
            write_job(root / plan.name / job.name, job, perplexity)
            if plan.evaluate and perplexity != float("inf"):
                file = root / plan.name / job.name / "evaluations.json"
                summary = json.loads((file.parent / "summary.json").read_text())
                used, loss = summary["validation_tokens"], math.log(perplexity)
                # Twice as many rows, the new ones at 1.5 times the perplexity.
                fresh = {"loss": loss + math.log(1.5) / 2, "tokens": 2 * used}
                file.write_text(json.dumps({"c4": {"perplexity": c4 * perplexity}, "fresh": fresh}))
            results[job.name] = perplexity
    return results


def write_job(folder: Path, job: Job, perplexity: float) -> None:
    wanted = asked_for(job.arguments())
    steps = int(wanted.get("trainer.steps", 12))
    diverged = perplexity == float("inf")
    write_run(
        folder,
        job.optimizer,
        job.lr,
        job.adam_lr,
        job.seed,
        perplexity=50.0 if diverged else perplexity,
        steps=steps,
        log_every=steps,
        eval_every=max(1, steps // 12),
        diverged=max(1, steps // 2) if diverged else None,
        summary={"training_seconds": 100.0, "optimizer_state_bytes": STATES.get(job.optimizer, 30_000_000)},
        data="c4_local",
        kind="c4_local",
    )
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for key, value in wanted.items():
        *path, last = key.split(".")
        tree = config
        for part in path:
            tree = tree.setdefault(part, {})
        tree[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


STATES = {"adam": 29_500_000, "adamw": 29_500_000, "muon": 16_000_000, "racs": 4_300_000, "alice": 13_500_000}
