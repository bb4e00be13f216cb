"""Run a sweep: many training runs, as a file of configs/sweep/ plans them.

    python scripts/sweep.py compare --jobs 2       configs/sweep/compare.yaml, two runs at a time
    python scripts/sweep.py compare --only alice,racs
    python scripts/sweep.py compare --dry-run      what would run, and for how long
    python scripts/sweep.py compare --report-only  tables and figures again, from the records alone

Arguments of the form key=value go to train.py. Every run has a folder of its own and is run once: after an interruption the
same command goes on with what is missing. A run that crashes is started again, twice; then the sweep goes on without it.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import yaml  # noqa: E402

from reporting import units, write_page  # noqa: E402
from sweeps import Plan, Sweep, load_plan  # noqa: E402

PLANS = ROOT / "configs" / "sweep"
RECORDS = ROOT / "results" / "runs"


def with_rates(plan: Plan, records: Path) -> Plan:
    """The plan with the best rates of the grids in ``rates_from``, as far as those are finished.

    Raises:
        ValueError: there is no such plan.
    """
    if plan.rates_from is None:
        return plan
    if not (PLANS / f"{plan.rates_from}.yaml").is_file():
        raise ValueError(f"{plan.name} takes its rates from {plan.rates_from}, which is no plan: correct rates_from.")
    grid = load_plan(PLANS / f"{plan.rates_from}.yaml")
    beside = records / grid.name
    sweep = Sweep(grid, beside if beside.is_dir() else RECORDS / grid.name)
    sweep.read()
    found = {(model, name): grid.best(model, name, sweep.results) for model in grid.models for name in grid.optimizers}
    return replace(plan, rates={key: rates for key, rates in found.items() if rates is not None})


def main(argv: Sequence[str] | None = None, **commands: Sequence[str]) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(sorted(path.stem for path in PLANS.glob("*.yaml")))
    parser.add_argument("plan", help=f"a file, or the name of one in configs/sweep: {names}")
    parser.add_argument("--out", type=Path, help="folder of the records; default results/runs/PLAN")
    parser.add_argument("--figure", type=Path, help="of the report; default results/figures/PLAN.png")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--only", type=_names, help="some of its optimizers or variants, as in alice,racs")
    parser.add_argument("--report-only", action="store_true", help="tables and figures from the records, run nothing")
    parser.add_argument("--dry-run", action="store_true", help="print what would run and stop")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="for train.py")
    asked = parser.parse_intermixed_args(words)
    if asked.jobs < 1:
        parser.error("--jobs must be at least 1.")
    odd = [word for word in asked.settings if "=" not in word]
    if odd:
        parser.error(f"cannot read {odd[0]!r}: write settings as key=value.")
    file = Path(asked.plan) if asked.plan.endswith(".yaml") else PLANS / f"{asked.plan}.yaml"
    if not file.is_file():
        parser.error(f"there is no plan {asked.plan}: choose from {names}, or give a file.")
    out = (asked.out or RECORDS / file.stem).resolve()
    try:
        plan = with_rates(load_plan(file, asked.only), out.parent)
        sweep = Sweep(plan, out, asked.settings, asked.jobs, **commands)
        sweep.read()
        if asked.report_only:
            return _report(plan, out, asked.figure)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    missing = sweep.missing()
    print(
        f"{plan.name}: {len(sweep.results)} runs recorded, {len(missing)} to do"
        f"{', more as the grids grow' if plan.extend else ''}; about {units.duration(sweep.remaining())} "
        f"at {plan.seconds:g} s a run.",
        flush=True,
    )
    if plan.waiting():
        print(f"left out until the grids of {plan.rates_from} are finished: {', '.join(plan.waiting())}.")
    if asked.dry_run:
        for job in missing:
            print(shlex.join(["python", "train.py", *sweep.arguments(job)]))
        return 0
    try:
        if missing:
            note(out, words, asked.jobs)
        sweep.run()
        _report(plan, out, asked.figure)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted: the same command goes on with the runs that have not ended.", file=sys.stderr)
        return 130
    for why in sweep.failed.values():
        print(f"error: {why}", file=sys.stderr)
    return 1 if sweep.failed else 0


def _report(plan: Plan, out: Path, figure: Path | None) -> int:
    """Page and figure of the kind that the plan asks for, if any."""
    if plan.report is None:
        return 0
    figure = (figure or ROOT / "results" / "figures" / f"{plan.name}.png").resolve()
    expected = {
        name: len({(job.lr, job.adam_lr) for job in plan.jobs({}) if job.optimizer == name}) for name in plan.optimizers
    }
    shown = write_page(plan.report, out, figure, plan.name, expected)
    print(f"\n{shown}\n\nfigure {short(figure)}\nrecords and report {short(out)}")
    return 0


def note(out: Path, words: Sequence[str], jobs: int) -> None:
    """Keep how the sweep was run beside its records: the last command, and the most runs that shared the machine."""
    file = out / "sweep.yaml"
    before = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    # data.path says something about this machine alone
    words = ["data.path=DIR" if word.startswith("data.path=") else word for word in words]
    out.mkdir(parents=True, exist_ok=True)
    kept = {"command": command_of(words), "jobs": max(jobs, before.get("jobs", 1))}
    file.write_text(yaml.safe_dump(kept, width=1000), encoding="utf-8")


def command_of(words: Sequence[str]) -> str:
    return shlex.join(["python", "scripts/sweep.py", *words])


def short(path: Path) -> Path:
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def _stop(number: int, _: Any) -> NoReturn:
    """End as after Ctrl-C, so that the training processes end as well."""
    raise KeyboardInterrupt


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    raise SystemExit(main())
