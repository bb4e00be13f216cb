"""The page and the figure of a sweep, from its records: `grid` for a few methods in depth, `survey` for many."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from . import units
from .figures import comparison_figure
from .records import Run, find_runs
from .summary import findings, grid_table, results_table
from .survey import load_speed, survey_figure, survey_report, survey_table


def write_page(kind: str, out: Path, figure: Path, plan: str, expected: dict[str, int]) -> str:
    """Write the page `out`/README.md and its figure; what the terminal shows of it.

    Args:
        kind: `grid` or `survey`.
        plan: name of the sweep.
        expected: optimizers of the plan, and how many pairs of rates each is to have.

    Raises:
        FileNotFoundError: there are no records in `out`.
        ValueError: a record that cannot be read.
    """
    file = out / "sweep.yaml"
    made = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    command = f"python scripts/sweep.py {plan}"
    ran, jobs = made.get("command", command), made.get("jobs")
    if kind == "grid":
        return write_grid(out, figure, ran, jobs)
    return write_survey(out, figure, ran, jobs, f"{command} --report-only", expected)


def write_grid(out: Path, figure: Path, command: str, jobs: int | None) -> str:
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
    """As `write_grid`, for many optimizers with few pairs of rates each, and with the speeds in `out`/speed.json.

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
