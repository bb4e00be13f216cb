"""Write the report of the fair comparison, results/fair/README.md and its figures, from the records in results/runs.

    python scripts/fair_report.py           page and figures, whatever has run so far; the effects in docs/deviations.md
    python scripts/fair_report.py --check   fail if a committed page disagrees with the records

The rules are in docs/fair_comparison.md, the plans in configs/sweep/fair_*.yaml. Seconds, nothing is trained.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import yaml  # noqa: E402

from reporting.fair.deviations import fill  # noqa: E402
from reporting.fair.figures import available, draw  # noqa: E402
from reporting.fair.page import page, write  # noqa: E402
from reporting.fair.records import Asked, Plans, load_fair  # noqa: E402
from reporting.paper.page import sections  # noqa: E402
from sweeps import Plan, Sweep, load_plan  # noqa: E402

PLANS = ROOT / "configs" / "sweep"
AGAIN = "make it again with python scripts/fair_report.py"
SWEEPS = (
    "fair_rates", "fair_control", "fair_best", "fair_ablations", "fair_batch", "fair_repeat", "fair_adam", "fair_long"
)  # fmt: skip


def plans(records: Path, folder: Path) -> Plans:
    """What the plans in `folder` ask for, given the records.

    Raises:
        ValueError: a record of other settings than its plan's, or a malformed one.
    """
    loaded = {name: load_plan(folder / f"{name}.yaml") for name in SWEEPS}
    rates_plan = loaded["fair_rates"]
    sweep = Sweep(rates_plan, records / rates_plan.name)
    sweep.read()
    keys = [(model, name) for model in rates_plan.models for name in rates_plan.optimizers]
    best = {key: rates_plan.best(*key, sweep.results) for key in keys}
    finished = {
        (str(model), name): rates_plan.interior(model, name, sweep.results)
        for (model, name), pair in best.items()
        if pair is not None
    }
    asked = _asked(rates_plan, sweep.results)
    for name in SWEEPS[1:]:
        plan = loaded[name]
        real = replace(plan, rates={key: pair for key, pair in best.items() if pair is not None})
        other = Sweep(real, records / name)
        other.read()  # the records must be those of the plan
        # Which variants a plan has does not depend on their rates: all of them count as asked for.
        counted = replace(plan, rates={key: (1.0, 1.0) for key in keys}) if plan.variants else real
        asked += _asked(counted, other.results)
    noted = {name: found for name in SWEEPS if (found := _noted(records / name)) is not None}
    return Plans(
        asked=asked,
        published={name: rates_plan.lr[name][len(rates_plan.lr[name]) // 2] for name in rates_plan.optimizers},
        finished=finished,
        commands={name: command for name, (command, _) in noted.items()},
        at_once={name: jobs for name, (_, jobs) in noted.items()},
    )


def _asked(plan: Plan, results: dict[str, float]) -> list[Asked]:
    found = []
    for job in plan.jobs(results):
        name = job.name.rpartition("/")[2].rpartition("-s")[0] if plan.variants else job.optimizer
        found.append(Asked(f"{plan.name}/{job.name}", str(job.model), name, job.optimizer, job.seed))
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
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "fair", help="of the page; default results/fair")
    parser.add_argument(
        "--figures", type=Path, default=ROOT / "results" / "figures" / "fair", help="default results/figures/fair"
    )
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
    out, figures = asked.out.resolve(), asked.figures.resolve()
    choices = asked.deviations or (None if asked.records else ROOT / "docs" / "deviations.md")
    try:
        fair = load_fair(records, plans(records, PLANS))
        names = available(fair)
        text = write(page(fair, out, [figures / f"{name}.png" for name in names]))
        before = choices.read_text(encoding="utf-8") if choices else ""
        if asked.check:
            pictures = [figures / f"{name}.{end}" for name in names for end in ("png", "svg")]
            wrong = _check(out / "README.md", text, pictures)
            if choices and fill(before, fair) != before:
                print(f"error: {shown(choices)}: an effect disagrees with the records: {AGAIN}.", file=sys.stderr)
                wrong = 1
            return wrong
        for name in names:
            draw(name, fair, figures)
        out.mkdir(parents=True, exist_ok=True)
        (out / "README.md").write_text(text, encoding="utf-8")
        if choices:
            choices.write_text(fill(before, fair), encoding="utf-8")
    except (OSError, ValueError, ImportError) as error:
        print(
            f"error: {error}" + (": put it right and run again" if isinstance(error, OSError) else ""), file=sys.stderr
        )
        return 1
    done = f"{len(fair.runs())} of {len(fair.asked())} runs"
    print(f"{shown(out / 'README.md')}: {done}; {len(names)} figures in {shown(figures)}")
    return 0


def _check(file: Path, text: str, pictures: Sequence[Path]) -> int:
    if not file.is_file():
        print(f"error: {shown(file)} is missing: {AGAIN}.", file=sys.stderr)
        return 1
    there, made = sections(file.read_text(encoding="utf-8")), sections(text)
    wrong = [title for title in dict.fromkeys([*made, *there]) if made.get(title) != there.get(title)]
    for title in wrong:
        print(f'error: {shown(file)}, "{title}": disagrees with the records: {AGAIN}.', file=sys.stderr)
    missing = [path for path in pictures if not path.is_file()]
    for path in missing:
        print(f"error: {shown(path)} is missing: {AGAIN}.", file=sys.stderr)
    if wrong or missing:
        return 1
    print(f"{shown(file)} and {len(pictures)} pictures: the page agrees with the records.")
    return 0


def shown(path: Path) -> Path:
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


if __name__ == "__main__":
    raise SystemExit(main())
