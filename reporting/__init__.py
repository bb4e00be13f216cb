"""Tables, figures and model cards from run records. Reads folders; knows no trainer."""

from __future__ import annotations

from pathlib import Path

from . import units
from .figures import comparison_figure, training_picture
from .model_card import write_model_card
from .pages import write_page
from .records import RECORD_FILES, Run, find_runs, load_run
from .summary import best_cell, findings, grid_table, results_table
from .survey import load_speed, survey_figure, survey_report, survey_table

__all__ = [
    "RECORD_FILES",
    "Run",
    "best_cell",
    "comparison_figure",
    "find_runs",
    "findings",
    "finish",
    "grid_table",
    "load_run",
    "load_speed",
    "results_table",
    "survey_figure",
    "survey_report",
    "survey_table",
    "training_picture",
    "units",
    "write_model_card",
    "write_page",
]


def finish(run_dir: str | Path) -> list[Path | str]:
    """Picture and model card of a run that has ended: the file written, or a sentence that says why it was not.

    A training run must not fail for want of a picture, so whatever is missing becomes a note.
    """
    lines: list[Path | str] = []
    for make in (training_picture, write_model_card):
        try:
            lines.append(make(run_dir))
        except (FileNotFoundError, ValueError, ImportError) as error:
            lines.append(str(error))
    return lines
