"""Compare optimizers fairly: each on its own grid of matrix rate x adam_lr, the best with more seeds, one figure.

    python scripts/compare.py                      the sweep of configs/sweep/compare.yaml (make compare)
    python scripts/compare.py --only alice,racs    some of its optimizers
    python scripts/compare.py --dry-run            what would run, and for how long

    python scripts/compare.py --report-only        table and figure again, from the records alone

Arguments of the form key=value go to train.py. Stopping is safe: the same command goes on with the cells that have
not ended. Records, figure and table are written whatever the order of the optimizers turns out to be.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import yaml  # noqa: E402

from reporting import (  # noqa: E402
    RECORD_FILES,
    Run,
    comparison_figure,
    find_runs,
    findings,
    grid_table,
    load_run,
    load_speed,
    results_table,
    survey_figure,
    survey_report,
    survey_table,
    units,
)
from reporting.summary import ranking  # noqa: E402

PLAN = ROOT / "configs" / "sweep" / "compare.yaml"
TRAINER = (sys.executable, str(ROOT / "train.py"))
DIVERGED = 3  # exit code of train.py for a loss that is not finite


@dataclass(frozen=True)
class Cell:
    """One training run of the sweep."""

    optimizer: str
    lr: float
    adam_lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.optimizer}-lr{self.lr:g}-adam{self.adam_lr:g}-s{self.seed}"

    def __str__(self) -> str:
        return f"{self.optimizer} lr={self.lr:g} adam_lr={self.adam_lr:g} seed={self.seed}"


class Sweep:
    """Runs cells as separate processes and keeps their records under `out`.

    Args:
        settings: arguments of train.py that all cells share.
        trainer: the command that trains; the settings of a cell are appended.
        total: cells of the whole sweep, for the progress lines.
        seconds: a guess of one cell's duration, until one has been timed.
    """

    def __init__(
        self, out: Path, settings: Sequence[str], trainer: Sequence[str], jobs: int, total: int, seconds: float
    ) -> None:
        self.out, self.settings, self.trainer, self.jobs = out, list(settings), list(trainer), jobs
        self.total, self.ended, self.guess = total, 0, seconds
        self.began = time.monotonic()
        self.timed: list[float] = []

    def has_ended(self, cell: Cell) -> bool:
        return any((self.out / cell.name / file).is_file() for file in ("summary.json", "diverged.json"))

    def command(self, cell: Cell) -> list[str]:
        # Relative to the repository where possible: records are committed, and paths of this machine say nothing.
        folder = self.out / cell.name
        folder = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
        return [
            *self.trainer,
            f"optimizer={cell.optimizer}",
            f"optimizer.lr={cell.lr:g}",
            f"optimizer.adam_lr={cell.adam_lr:g}",
            f"seed={cell.seed}",
            f"run_dir={folder}",
            *self.settings,
        ]

    def run(self, cells: Iterable[Cell]) -> None:
        """Train every cell that has not ended, `jobs` at a time.

        Raises:
            RuntimeError: a cell failed other than by diverging; its output is in the message. The others are stopped.
        """
        waiting: deque[Cell] = deque()
        for cell in cells:
            if self.has_ended(cell):
                self._say(cell, "recorded earlier")
            else:
                waiting.append(cell)
        running: dict[Cell, tuple[subprocess.Popen[bytes], float]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self.jobs:
                    cell = waiting.popleft()
                    running[cell] = self._start(cell), time.monotonic()
                time.sleep(0.05)
                for cell, (process, began) in list(running.items()):
                    if process.poll() is not None:
                        del running[cell]
                        self.timed.append(time.monotonic() - began)
                        self._end(cell, process.returncode)
        finally:
            for process, _ in running.values():
                process.terminate()
            for process, _ in running.values():
                process.wait()

    def remaining(self) -> float:
        """Seconds that the cells still to come will take, by the mean of those timed so far."""
        each = sum(self.timed) / len(self.timed) if self.timed else self.guess
        return (self.total - self.ended) * each / self.jobs

    def _log(self, cell: Cell) -> Path:
        return self.out / f"{cell.name}.log"

    def _start(self, cell: Cell) -> subprocess.Popen[bytes]:
        environment = dict(os.environ)
        if self.jobs > 1:  # or every process would take all cores and they would slow each other down
            environment["OMP_NUM_THREADS"] = str(max(1, cores() // self.jobs))
        self.out.mkdir(parents=True, exist_ok=True)
        with self._log(cell).open("wb") as log:
            return subprocess.Popen(
                self.command(cell),
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _end(self, cell: Cell, code: int) -> None:
        folder, log = self.out / cell.name, self._log(cell)
        text = log.read_text(encoding="utf-8", errors="replace")
        if code == DIVERGED and (folder / "config.yaml").is_file():
            (folder / "diverged.json").write_text(json.dumps(divergence(text, folder), indent=2) + "\n")
        elif code != 0 or not (folder / "summary.json").is_file():
            what = f"ended with exit code {code}" if code else "wrote no summary.json"
            tail = "\n".join(re.split(r"[\r\n]+", text.strip())[-15:])
            raise RuntimeError(
                f"{cell} {what}, so the sweep stops; put it right and start the same command again. "
                f"The end of {log}:\n{tail}"
            )
        for path in folder.iterdir():  # only the record stays: it is committed
            if path.name not in RECORD_FILES:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        log.unlink()
        run = load_run(folder)
        outcome = (
            f"diverged at step {run.diverged['step']}"
            if run.diverged
            else f"perplexity {units.perplexity(run.perplexity)}"
        )
        self._say(cell, f"{outcome} in {units.duration(self.timed[-1])}")

    def _say(self, cell: Cell, outcome: str) -> None:
        self.ended += 1
        print(
            f"[{self.ended:{len(str(self.total))}}/{self.total}] {cell}: {outcome}   "
            f"elapsed {units.duration(time.monotonic() - self.began)}, "
            f"about {units.duration(self.remaining())} left",
            flush=True,
        )


def divergence(text: str, folder: Path) -> dict[str, Any]:
    """Where a run diverged: the step that its error names, or the last one that it recorded."""
    errors = [line.strip() for line in re.split(r"[\r\n]+", text) if "error:" in line]
    message = errors[-1] if errors else ""
    step = re.search(r"\bat step ([\d,]+)", message)
    if step:
        return {"step": int(step[1].replace(",", "")), "message": message}
    steps = load_run(folder).train["step"]
    return {"step": int(steps[-1]) if len(steps) else None, "message": message}


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def grid(plan: dict[str, Any], optimizers: Iterable[str], seeds: Iterable[int]) -> list[Cell]:
    return [
        Cell(name, float(lr), float(adam_lr), seed)
        for seed in seeds
        for name in optimizers
        for lr in plan["lr"][name]
        for adam_lr in plan["adam_lr"]
    ]


def keep_settings(out: Path, settings: Sequence[str], command: str, jobs: int) -> None:
    """Note what all cells of `out` share, and refuse to mix cells of different settings in one comparison."""
    file = out / "sweep.yaml"
    there = kept_settings(out).get("settings", list(settings))
    if there != list(settings):
        raise ValueError(
            f"{out} holds a sweep with other settings ({' '.join(there)}): choose another --out, or remove that folder."
        )
    out.mkdir(parents=True, exist_ok=True)
    kept = {"settings": list(settings), "command": command, "jobs": jobs}
    file.write_text(yaml.safe_dump(kept, sort_keys=False, width=1000), encoding="utf-8")


def kept_settings(out: Path) -> dict[str, Any]:
    """What `keep_settings` has noted; empty where there is nothing."""
    file = out / "sweep.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}


def write_report(out: Path, figure: Path, command: str, jobs: int | None) -> str:
    """Draw the figure, write `out`/README.md, and return the table with what must be said about it."""
    runs = find_runs(out)
    comparison_figure(runs, figure)
    table = results_table(runs)
    remarks = "\n".join(f"- {note}" for note in findings(runs))
    text = "\n\n".join(
        [
            "# Optimizers on the same task, each at its best rates",
            table,
            remarks,
            f"![Best curves, and final perplexity against adam_lr]({os.path.relpath(figure, out)})",
            "Every optimizer was run on its own grid of matrix rate and adam_lr. A cell is chosen by the seed that the whole "
            "grid has; its other seeds were run afterwards and only show the spread (standard deviation, smallest to "
            "largest). Because the best of a grid is chosen by one seed, that seed's value tends to be lucky.",
            "## How it was made",
            "\n".join(f"- {name}: {value}" for name, value in circumstances(runs, command, jobs)),
            "## Every run",
            grid_table(runs),
        ]
    )
    (out / "README.md").write_text(text + "\n", encoding="utf-8")
    return f"{table}\n\n{remarks}"


def write_survey(out: Path, figure: Path, command: str, jobs: int | None, again: str, expected: dict[str, int]) -> str:
    """As `write_report`, for many optimizers with few pairs of rates each, and with the speeds in `out`/speed.json.

    Args:
        command: that ran the sweep.
        again: the command that makes the report from the records.
        expected: optimizers of the plan, and how many pairs of rates each is to have.
    """
    runs, speed = find_runs(out), load_speed(out / "speed.json")
    survey_figure(runs, figure, speed, expected)
    made = [*circumstances(runs, command, jobs), ("This report, from the records", f"`{again}`")]
    (out / "README.md").write_text(
        survey_report(runs, speed, expected, os.path.relpath(figure, out), made) + "\n", encoding="utf-8"
    )
    return survey_table(runs, speed, expected)


def circumstances(runs: Sequence[Run], command: str, jobs: int | None) -> list[tuple[str, str]]:
    def all_values(values: Iterable[Any]) -> str:
        return "; ".join(sorted({str(value) for value in values if value is not None})) or "unknown"

    hardware = all_values(
        ", ".join(f"{name} {value}" for name, value in run.environment.get("hardware", {}).items()) for run in runs
    )
    summaries = [run.summary for run in runs if run.summary]
    rows = [
        ("Command", f"`{command}`"),
        ("Model", all_values(run.model for run in runs)),
        ("Data", all_values(run.data for run in runs)),
        ("Steps", all_values(run.setting("trainer.steps") for run in runs)),
        ("Training tokens", all_values(f"{summary['tokens']:,}" for summary in summaries if summary.get("tokens"))),
        ("Seeds", ", ".join(map(str, sorted({run.seed for run in runs if run.seed is not None})))),
        ("Precision", all_values(run.environment.get("precision", run.setting("trainer.precision")) for run in runs)),
        ("Hardware", hardware),
        *([("Runs at once", f"{jobs}" + (" (which lowers tokens/s)" if jobs > 1 else ""))] if jobs else []),
        ("torch", all_values(run.environment.get("versions", {}).get("torch") for run in runs)),
        ("Commit", all_values(run.environment.get("commit") for run in runs)),
    ]
    for name in ("bigram", "unigram"):
        values = {summary[f"{name}_perplexity"] for summary in summaries if summary.get(f"{name}_perplexity")}
        if values:
            rows.append((f"Perplexity of the {name} model", all_values(units.perplexity(value) for value in values)))
    return rows


def main(argv: Sequence[str] | None = None, trainer: Sequence[str] = TRAINER) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "results/runs/compare", help="folder of the records")
    parser.add_argument("--figure", type=Path, default=ROOT / "results/figures/compare.png")
    parser.add_argument("--plan", type=Path, default=PLAN, help="the grid; default configs/sweep/compare.yaml")
    parser.add_argument("--only", type=_names, default=None, help="optimizers, as in alice,racs; default all")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--seeds", type=_seeds, default=[42], help="seeds of the whole grid, as in 42,43")
    parser.add_argument(
        "--extra-seeds", type=_seeds, default=[43, 44], help="more seeds of the best cells; '' for none"
    )
    parser.add_argument("--steps", type=int, default=None, help="shorter runs, to try the sweep out")
    parser.add_argument(
        "--report",
        choices=("grid", "survey"),
        default=None,
        help="grid: curves and all rates of a few optimizers; survey: a row for each of many; default: the plan's, else grid",
    )
    parser.add_argument(
        "--report-only", action="store_true", help="write report and figure from the records, run nothing"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would run and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for train.py")
    asked = parser.parse_intermixed_args(words)
    if asked.jobs < 1:
        parser.error("--jobs must be at least 1.")

    plan = yaml.safe_load(asked.plan.read_text(encoding="utf-8"))
    optimizers = asked.only or list(plan["lr"])
    unknown = [name for name in optimizers if name not in plan["lr"]]
    if unknown:
        parser.error(f"{asked.plan.name} has no grid for {', '.join(unknown)}: choose from {', '.join(plan['lr'])}.")
    if asked.report_only:
        try:
            return _say_report(asked, make_report(asked, plan, optimizers, words))
        except (OSError, ValueError, ImportError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    settings = [
        f"experiment={plan['experiment']}",
        *plan["overrides"],
        *([f"trainer.steps={asked.steps}"] if asked.steps else []),
        *asked.overrides,
    ]
    cells = grid(plan, optimizers, asked.seeds)
    extra_seeds = [seed for seed in asked.extra_seeds if seed not in asked.seeds]
    sweep = Sweep(
        asked.out.resolve(),
        settings,
        trainer,
        asked.jobs,
        total=len(cells) + len(optimizers) * len(extra_seeds),
        seconds=plan["seconds_per_cell"],
    )

    ended = sum(map(sweep.has_ended, cells))
    runs_left = sweep.total - ended
    print(
        f"{len(cells)} cells ({', '.join(optimizers)}) and {len(extra_seeds)} more seeds of each best: "
        f"{sweep.total} runs, {ended} recorded already; about "
        f"{units.duration(runs_left * sweep.guess / asked.jobs)} at {sweep.guess:g} s a run.",
        flush=True,
    )
    if asked.dry_run:
        for cell in cells:
            print(shlex.join(sweep.command(cell)) + ("   # recorded" if sweep.has_ended(cell) else ""))
        return 0
    try:
        keep_settings(sweep.out, settings, command_of(words), asked.jobs)
        sweep.run(cells)
        best = ranking(find_runs(sweep.out))
        more = [
            Cell(name, best[name][0].lr, best[name][0].adam_lr, seed)
            for name in optimizers
            for seed in extra_seeds
            if best[name][0].diverged is None
        ]
        sweep.total = len(cells) + len(more)
        sweep.run(more)
        report = make_report(asked, plan, optimizers, words)
    except (RuntimeError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted: the same command goes on with the cells that have not ended.", file=sys.stderr)
        return 130
    return _say_report(asked, report)


def make_report(
    asked: argparse.Namespace, plan: dict[str, Any], optimizers: Sequence[str], words: Sequence[str]
) -> str:
    """Write the figure and README.md that the plan or --report asks for; returns what is shown of it."""
    out, figure = asked.out.resolve(), asked.figure.resolve()
    kept = kept_settings(out)
    words = [word for word in words if word != "--report-only"]
    command, jobs = kept.get("command", command_of(words)), kept.get("jobs")
    if (asked.report or plan.get("report", "grid")) == "grid":
        return write_report(out, figure, command, jobs)
    expected = {name: len(plan["lr"][name]) * len(plan["adam_lr"]) for name in optimizers}
    return write_survey(out, figure, command, jobs, command_of([*words, "--report-only"]), expected)


def command_of(words: Sequence[str]) -> str:
    return shlex.join(["python", "scripts/compare.py", *words])


def _say_report(asked: argparse.Namespace, report: str) -> int:
    print(f"\n{report}\n\nfigure {asked.figure}\nrecords and report {asked.out}")
    return 0


def _stop(number: int, _: Any) -> NoReturn:
    """End as after Ctrl-C, so that the training process that is running ends as well."""
    raise KeyboardInterrupt


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _seeds(text: str) -> list[int]:
    return [int(seed) for seed in _names(text)]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    raise SystemExit(main())
