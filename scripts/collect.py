"""A sweep in one table and one plot: every run with its final loss, those that diverged, were pruned or never ran, and final
loss against rate for each method.

    python scripts/collect.py results/runs/quickstart_rates             into that folder: table.md, .csv, .json, rates.png, .svg
    python scripts/collect.py results/runs/a results/runs/b --out DIR   each with its tables in a folder DIR/NAME

Works for grids, variants and searches, at any time. Which runs are missing is told by the plan in configs/sweep that has the
folder's name, or the one that the sweep's own note (sweep.yaml) names.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import yaml  # noqa: E402

from reporting import find_runs  # noqa: E402
from reporting.collected import Row, best_table, collect, label, write_collection  # noqa: E402
from scripts.sweep import PLANS, with_rates  # noqa: E402
from sweeps import Plan, load_plan  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", metavar="FOLDER", nargs="+", type=Path, help="of the records of a sweep")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for the tables; default: the folder itself")
    asked = parser.parse_args(argv)
    try:
        for folder in (folder.resolve() for folder in asked.folders):
            note = _note(folder)
            plan = _plan(folder, note)
            rows = collect(folder, _planned(plan, folder) if plan else [])
            out = folder if asked.out is None else asked.out / folder.name if len(asked.folders) > 1 else asked.out
            files = write_collection(rows, out, folder.name, note)
            print(f"{folder.name}\n\n{best_table(rows)}\n")
            if plan is None:
                print("No plan is known, so runs that never began are not listed.")
            print("\n".join(f"wrote {file}" for file in files))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ImportError as error:
        print(f"error: {error}: install the packages of requirements.txt.", file=sys.stderr)
        return 1
    return 0


def _note(folder: Path) -> dict[str, Any]:
    file = folder / "sweep.yaml"
    kept = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return kept if isinstance(kept, dict) else {}


def _plan(folder: Path, note: dict[str, Any]) -> Plan | None:
    """The plan of the records in `folder`, where it can be found."""
    words = [word for word in shlex.split(str(note.get("command", "")))[2:] if not word.startswith("-")]
    for name in (folder.name, *words):
        file = Path(name) if name.endswith(".yaml") else PLANS / f"{name}.yaml"
        if file.is_file():
            return with_rates(load_plan(file), folder.parent)
    return None


def _planned(plan: Plan, folder: Path) -> list[Row]:
    """The runs that the plan asks for, given those that have ended; without results."""
    if plan.search:
        keys = [(model, name) for model in plan.models for name in plan.optimizers]
        names = [
            (f"{model}/{name}-t{i:03d}" if model else f"{name}-t{i:03d}", model, name)
            for model, name in keys
            for i in range(plan.search.trials)
        ]
        return [Row(full, name, name, model or _only_model(folder)) for full, model, name in names]
    found = {run.path.relative_to(folder).as_posix(): run.perplexity for run in find_runs(folder)}
    results = {name: value for name, value in found.items() if not math.isnan(value)}
    return [
        Row(
            job.name,
            label(job.name, job.optimizer),
            job.optimizer,
            job.model or _only_model(folder),
            job.lr,
            job.adam_lr,
            job.seed,
        )
        for job in plan.jobs(results)
    ]


def _only_model(folder: Path) -> str | None:
    """The model of a sweep that names none: the one of its records."""
    return next((run.model for run in find_runs(folder)), None)


if __name__ == "__main__":
    raise SystemExit(main())
