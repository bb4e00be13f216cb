"""Write the report of the fair comparison, results/fair/README.md, runs.md and figures, from the records in results/runs.

    python scripts/fair_report.py           pages and figures, whatever has run so far; also the effects in docs/deviations.md
                                            and the table of stage 2 in README.md
    python scripts/fair_report.py --check   fail if a committed page disagrees with the records

The rules are in docs/fair_comparison.md, the plans in configs/sweep/fair_*.yaml. Seconds, nothing is trained.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import yaml  # noqa: E402

from reporting.fair import readme  # noqa: E402
from reporting.fair.deviations import fill  # noqa: E402
from reporting.fair.figures import available, draw, stale  # noqa: E402
from reporting.fair.page import RUNS, list_of_runs, page, write  # noqa: E402
from reporting.fair.records import Asked, Fair, Plans, load_fair  # noqa: E402
from reporting.paper.page import sections  # noqa: E402
from sweeps import Plan, Sweep, load_plan  # noqa: E402

PLANS = ROOT / "configs" / "sweep"
AGAIN = "make it again with python scripts/fair_report.py"
SWEEPS = (
    "fair_rates", "fair_control", "fair_best", "fair_ablations", "fair_batch", "fair_repeat", "fair_again", "fair_adam",
    "fair_constants", "fair_long", "fair_rates_b95", "fair_best_b95",
)  # fmt: skip


def plans(records: Path, folder: Path) -> Plans:
    """What the plans in `folder` ask for, given the records.

    Raises:
        ValueError: a record of other settings than its plan's, or a malformed one.
    """
    loaded = {name: load_plan(folder / f"{name}.yaml") for name in SWEEPS}
    best: dict[str, dict[tuple[str | None, str], tuple[float, float]]] = {}
    finished: dict[tuple[str, str, str], bool] = {}
    for grid in {plan.rates_from for plan in loaded.values() if plan.rates_from}:
        plan = loaded[grid]
        results = _read(plan, records)
        pairs = {(model, name): plan.best(model, name, results) for model in plan.models for name in plan.optimizers}
        best[grid] = {key: pair for key, pair in pairs.items() if pair is not None}
        finished |= {(grid, str(model), name): plan.interior(model, name, results) for model, name in best[grid]}
    asked = []
    for plan in loaded.values():
        if plan.rates_from is None:
            asked += _asked(plan, _read(plan, records))
            continue
        results = _read(replace(plan, rates=best[plan.rates_from]), records)  # the records must be those of the plan
        # Which variants a plan has does not depend on their rates: all of them count as asked for.
        grid_plan = loaded[plan.rates_from]
        every = {(model, name): (1.0, 1.0) for model in grid_plan.models for name in grid_plan.optimizers}
        asked += _asked(replace(plan, rates=every), results)
    first = loaded["fair_rates"]
    noted = {name: found for name in SWEEPS if (found := _noted(records / name)) is not None}
    return Plans(
        asked=asked,
        published={name: first.lr[name][len(first.lr[name]) // 2] for name in first.optimizers},
        finished=finished,
        commands={name: command for name, (command, _) in noted.items()},
        at_once={name: jobs for name, (_, jobs) in noted.items()},
    )


def _read(plan: Plan, records: Path) -> dict[str, float]:
    """The results of a plan's runs that have ended, by name."""
    sweep = Sweep(plan, records / plan.name)
    sweep.read()
    return sweep.results


def _asked(plan: Plan, results: dict[str, float]) -> list[Asked]:
    found = []
    for job in plan.jobs(results):
        name = job.name.rpartition("/")[2].rpartition("-s")[0] if plan.variants else job.optimizer
        found.append(Asked(plan.name, f"{plan.name}/{job.name}", str(job.model), name, job.optimizer, job.seed))
    return found


def _noted(folder: Path) -> tuple[str, int] | None:
    """Command and runs at once of a sweep that has ended; the command without the folder of its text."""
    file = folder / "sweep.yaml"
    kept = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
    if not isinstance(kept, dict) or "command" not in kept:
        return None
    return re.sub(r"data\.path=\S+", "data.path=DIR", str(kept["command"])), int(kept.get("jobs") or 1)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, help="default results/runs")
    parser.add_argument(
        "--out", type=Path, help="of the page; default results/fair, with --records the folder report there"
    )
    parser.add_argument("--figures", type=Path, help="default results/figures/fair, with --records that of the page")
    parser.add_argument(
        "--deviations", type=Path, help="page of the open choices; default docs/deviations.md, with --records none"
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if the page disagrees with the records"
    )
    asked = parser.parse_args(argv)
    if asked.records is not None and not asked.records.is_dir():
        print(f"error: --records {asked.records} is not a folder: name the one that holds the sweeps.", file=sys.stderr)
        return 2
    records = (asked.records or ROOT / "results" / "runs").resolve()
    own = records / "report" if asked.records else None  # others' records do not take the place of these pages
    out = (asked.out or own or ROOT / "results" / "fair").resolve()
    figures = (asked.figures or (out if own else ROOT / "results" / "figures" / "fair")).resolve()
    choices = asked.deviations or (None if asked.records else ROOT / "docs" / "deviations.md")
    try:
        fair = load_fair(records, plans(records, PLANS))
        names = available(fair)
        texts = {
            out / "README.md": write(page(fair, out, [figures / f"{name}.png" for name in names])),
            out / RUNS: write(list_of_runs(fair, out)),
        }
        filled = {choices: fill} if choices else {}
        if not asked.records:
            filled[ROOT / "README.md"] = lambda page, fair: readme.fill(page, fair, ROOT)
        before = {file: file.read_text(encoding="utf-8") for file in filled}
        if asked.check:
            pictures = [figures / f"{name}.{end}" for name in names for end in ("png", "svg")]
            wrong = _check(texts, pictures, fair)
            for file in (file for file, make in filled.items() if make(before[file], fair) != before[file]):
                print(f"error: {shown(file)}: a number disagrees with the records: {AGAIN}.", file=sys.stderr)
                wrong = 1
            return wrong
        for name in names:
            draw(name, fair, figures)
        out.mkdir(parents=True, exist_ok=True)
        for file, text in texts.items():
            file.write_text(text, encoding="utf-8")
        for file, make in filled.items():
            file.write_text(make(before[file], fair), encoding="utf-8")
    except (OSError, ValueError, ImportError) as error:
        print(
            f"error: {error}" + (": put it right and run again" if isinstance(error, OSError) else ""), file=sys.stderr
        )
        return 1
    done = f"{len(fair.runs())} of {len(fair.asked())} runs"
    print(f"{shown(out / 'README.md')}: {done}; {len(names)} figures in {shown(figures)}")
    return 0


def _check(texts: Mapping[Path, str], pictures: Sequence[Path], fair: Fair) -> int:
    failed = 0
    for file in stale(fair, [path for path in pictures if path.is_file()]):
        print(f"error: {shown(file)} shows something else than the records: {AGAIN}.", file=sys.stderr)
        failed = 1
    for file in [path for path in (*texts, *pictures) if not path.is_file()]:
        print(f"error: {shown(file)} is missing: {AGAIN}.", file=sys.stderr)
        failed = 1
    for file, text in texts.items():
        there, made = sections(file.read_text(encoding="utf-8")) if file.is_file() else {}, sections(text)
        for title in dict.fromkeys([*made, *there] if there else []):
            if made.get(title) != there.get(title):
                print(f'error: {shown(file)}, "{title}": disagrees with the records: {AGAIN}.', file=sys.stderr)
                failed = 1
    if not failed:
        names = " and ".join(str(shown(file)) for file in texts)
        print(f"{names} and {len(pictures)} pictures: the pages agree with the records.")
    return failed


def shown(path: Path) -> Path:
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


if __name__ == "__main__":
    raise SystemExit(main())
