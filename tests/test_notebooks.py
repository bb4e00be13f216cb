"""The notebooks run from top to bottom and show pictures; they are committed without outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "results" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")


def test_there_are_notebooks() -> None:
    assert [path.name for path in NOTEBOOKS] == ["figures.ipynb", "tables.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_pictures(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    committed = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert committed and all(not cell.outputs and cell.execution_count is None for cell in committed)
    # An exception in a cell raises CellExecutionError here.
    nbclient.NotebookClient(
        notebook, kernel_name="python3", timeout=300, resources={"metadata": {"path": str(FOLDER)}}
    ).execute()
    outputs: list[Any] = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    kinds = [kind for output in outputs for kind in output.get("data", {})]
    assert kinds.count("image/png") >= (1 if path.stem == "tables" else 5)
    assert (path.stem != "tables") or kinds.count("text/markdown") >= 4
    assert not [output for output in outputs if output.output_type == "error"]
