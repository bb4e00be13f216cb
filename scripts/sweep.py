"""Run a sweep: many training runs, as a file of configs/sweep/ plans them.

    python scripts/sweep.py compare --jobs 2       configs/sweep/compare.yaml, two runs at a time
    python scripts/sweep.py compare --only alice,racs
    python scripts/sweep.py fair_best --seeds 43,44    some of a plan's seeds first
    python scripts/sweep.py compare --dry-run      what would run, and for how long
    python scripts/sweep.py compare --report-only  tables and figures again, from the records alone
    python scripts/sweep.py compare --gpus 0,1,2,3 --gpus-per-job 2                   two runs at a time, on two GPUs each
    python scripts/sweep.py compare --executor slurm --slurm FILE --jobs 16           an array of SLURM, 16 at a time
    python scripts/sweep.py compare --write-recipe DIR                                the best of each method as a recipe

Arguments of the form key=value go to train.py. Every run has a folder of its own and is run once: after an interruption the
same command goes on with what is missing. A run that crashes is started again, twice; then the sweep goes on without it.
Several calls, also on several machines, may share a folder of records. docs/sweeps.md tells more.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import yaml  # noqa: E402

from pretraining.files import replace_text  # noqa: E402
from reporting import load_run, units, write_page  # noqa: E402
from reporting.terminal import printing  # noqa: E402
from sweeps import Plan, SearchSweep, Sweep, load_plan  # noqa: E402
from sweeps.cluster import EXECUTORS, Cluster, read_options  # noqa: E402
from sweeps.recipe import write_recipe  # noqa: E402
from sweeps.slots import slots  # noqa: E402

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
    if not grid.lr:
        raise ValueError(f"{plan.name} takes its rates from {plan.rates_from}, which is no grid: correct rates_from.")
    beside = records / grid.name
    sweep = Sweep(grid, beside if beside.is_dir() else RECORDS / grid.name)
    sweep.read()
    found = {(model, name): grid.best(model, name, sweep.results) for model in grid.models for name in grid.optimizers}
    return replace(plan, rates={key: rates for key, rates in found.items() if rates is not None})


def _with_seeds(plan: Plan, wanted: Sequence[str] | None) -> Plan:
    """The plan with some of its seeds.

    Raises:
        ValueError: a seed that is none of the plan's, or a plan whose choices are made by all of its seeds.
    """
    if wanted is None:
        return plan
    if not plan.variants:
        raise ValueError(f"{plan.name} chooses by its seeds, so it needs all of them: leave --seeds out.")
    odd = [seed for seed in wanted if seed not in map(str, plan.seeds)]
    if odd:
        raise ValueError(f"{plan.name} has no seed {', '.join(odd)}: choose from {', '.join(map(str, plan.seeds))}.")
    return replace(plan, seeds=tuple(seed for seed in plan.seeds if str(seed) in wanted))


def main(argv: Sequence[str] | None = None, **commands: Sequence[str]) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(sorted(path.stem for path in PLANS.glob("*.yaml")))
    parser.add_argument("plan", help=f"a file, or the name of one in configs/sweep: {names}")
    parser.add_argument("--out", type=Path, help="folder of the records; default results/runs/PLAN")
    parser.add_argument(
        "--figure", type=Path, help="of the report; default results/figures/PLAN.png, with --out beside the records"
    )
    parser.add_argument("--jobs", type=int, help="runs at the same time; default: as many as the GPUs allow, or 1")
    parser.add_argument("--gpus", type=_names, help="to use, as in 0,1,2,3; default: all that are there")
    parser.add_argument("--gpus-per-job", type=int, default=1, help="more than one: started by torchrun")
    parser.add_argument(
        "--executor", default="process", choices=["process", *EXECUTORS], help="process: here; others: submitit's"
    )
    parser.add_argument("--slurm", type=Path, metavar="FILE", help="options of jobs, as configs/sweep/slurm/*.yaml")
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="of jobs, as in timeout_min=600"
    )
    parser.add_argument("--wait", action="store_true", help="for submitted jobs, until nothing is missing")
    parser.add_argument(
        "--write-recipe", type=Path, metavar="DIR", help="the best of each method as DIR/METHOD-MODEL.yaml; run nothing"
    )
    parser.add_argument("--only", type=_names, help="some of its optimizers or variants, as in alice,racs")
    parser.add_argument("--seeds", type=_names, help="some of the seeds of a plan with variants, as in 43,44")
    parser.add_argument("--report-only", action="store_true", help="tables and figures from the records, run nothing")
    parser.add_argument("--dry-run", action="store_true", help="print what would run and stop")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="for train.py")
    asked = parser.parse_intermixed_args(words)
    if (asked.jobs is not None and asked.jobs < 1) or asked.gpus_per_job < 1:
        parser.error("--jobs and --gpus-per-job must be at least 1.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        parser.error("a sweep starts its runs itself: call it without accelerate launch, torchrun or srun.")
    odd = [word for word in asked.settings if "=" not in word]
    if odd:
        parser.error(f"cannot read {odd[0]!r}: write settings as key=value.")
    file = Path(asked.plan) if asked.plan.endswith(".yaml") else PLANS / f"{asked.plan}.yaml"
    if not file.is_file():
        parser.error(f"there is no plan {asked.plan}: choose from {names}, or give a file.")
    out = (asked.out or RECORDS / file.stem).resolve()
    try:
        plan = with_rates(_with_seeds(load_plan(file, asked.only), asked.seeds), out.parent)
        kind = SearchSweep if plan.search else Sweep
        here = asked.executor == "process" and not (asked.report_only or asked.dry_run or asked.write_recipe)
        places = slots(asked.jobs, asked.gpus, asked.gpus_per_job) if here else [()] * (asked.jobs or 1)
        sweep = kind(plan, out, asked.settings, places, **commands)
        sweep.read()
        if asked.report_only:
            return _report(plan, out, asked.figure)
        if asked.write_recipe:
            return _recipes(sweep, asked.write_recipe)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    missing = sweep.missing()
    print(
        f"{plan.name}: {len(sweep.results)} runs recorded, {sweep.known() - len(sweep.results)} to do"
        f"{', more as the grids grow' if plan.extend else ''}; about {units.duration(sweep.remaining())} "
        f"at {plan.seconds:g} s a run.",
        flush=True,
    )
    if plan.waiting():
        print(f"left out until the grids of {plan.rates_from} are finished: {', '.join(plan.waiting())}.")
    if asked.dry_run:
        for job in missing:
            print(shlex.join(["python", "train.py", *sweep.arguments(job)]))
        if plan.search:
            print(f"and {sweep.known() - sweep.ended() - len(missing)} runs whose settings Optuna chooses one by one")
        return 0
    try:
        if sweep.known() > sweep.ended():
            note(out, words, len(places))
        if asked.executor != "process":
            if asked.gpus_per_job > 1:
                asked.option.insert(0, f"gpus_per_node={asked.gpus_per_job}")
            options = read_options(asked.slurm, asked.option, plan.slurm)
            return _submit(Cluster(sweep, asked.executor, options, asked.jobs), asked)
        sweep.run()
        for why in sweep.failed.values():
            print(f"error: {why}", file=sys.stderr)
        if sweep.results or not sweep.failed:
            _report(plan, out, asked.figure)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted: the same command goes on with the runs that have not ended.", file=sys.stderr)
        return 130
    return 1 if sweep.failed else 0


def _submit(cluster: Cluster, asked: argparse.Namespace) -> int:
    """Submit what is missing; with --wait, stay until it has ended."""
    before = cluster.busy()
    if before:
        print(f"{len(before)} jobs wait or run already: {', '.join(before.values())}.")
    numbers = cluster.submit()
    print(f"submitted {len(numbers)} jobs" + (f": {', '.join(numbers)}." if numbers else "."), flush=True)
    if asked.wait:
        cluster.wait()
    lost = cluster.lost() if asked.wait or asked.executor == "debug" else {}
    for why in lost.values():
        print(f"error: {why}", file=sys.stderr)
    sweep = cluster.sweep
    if sweep.results:
        _report(sweep.plan, sweep.out, asked.figure)
    print(f"{len(sweep.results)} of {sweep.known()} runs recorded in {short(sweep.out)}")
    return 1 if lost else 0


def _recipes(sweep: Sweep, folder: Path) -> int:
    """The best run of each method and model as a recipe; those whose grid or search has not ended are named."""
    plan = sweep.plan
    if plan.variants:
        raise ValueError(f"{plan.name} tunes nothing, it compares variants: take the recipes from a grid or a search.")
    left_out = []
    for model in plan.models:
        for name in plan.optimizers:
            best = sweep.best(model, name)
            if best is None:
                left_out.append(f"{model} {name}" if model else name)
            else:
                runs = sum((job.model, job.optimizer) == (model, name) for job in sweep.jobs())
                print(
                    f"wrote {short(write_recipe(load_run(sweep.out / best.name), folder.resolve(), plan.name, runs))}"
                )
    if left_out:
        print(f"error: no best yet of {', '.join(left_out)}: let their runs end first.", file=sys.stderr)
    return 1 if left_out else 0


def _report(plan: Plan, out: Path, figure: Path | None) -> int:
    """Page and figure of the kind that the plan asks for, if any."""
    if plan.report is None:
        return 0
    figures = ROOT / "results" / "figures" if out == RECORDS / plan.name else out
    figure = (figure or figures / f"{plan.name}.png").resolve()
    expected = {
        name: len({(job.lr, job.adam_lr) for job in plan.jobs({}) if job.optimizer == name}) for name in plan.optimizers
    }
    shown = write_page(plan.report, out, figure, plan.name, expected)
    print(f"\n{shown}\n\nfigure {short(figure)}\nrecords and report {short(out)}")
    return 0


def note(out: Path, words: Sequence[str], jobs: int) -> None:
    """Keep how the sweep was run beside its records: the last command, and the most runs that shared the machine."""
    file = out / "sweep.yaml"
    before = (yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None) or {}
    # data.path says something about this machine alone
    words = ["data.path=DIR" if word.startswith("data.path=") else word for word in words]
    out.mkdir(parents=True, exist_ok=True)
    kept = {"command": command_of(words), "jobs": max(jobs, before.get("jobs", 1))}
    replace_text(file, yaml.safe_dump(kept, width=1000), draft=uuid.uuid4().hex)  # calls may run side by side


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
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup: it goes on when the terminal is closed
        signal.signal(signal.SIGHUP, _stop)
    raise SystemExit(printing(main))
