"""The list of cells: complete, with the paper's numbers, and one run where the paper shows one run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from reporting.paper.cells import ALIASES, CELLS, EXPERIMENTS, table2_name

ROOT = Path(__file__).parents[2]
FIGURES = json.loads((ROOT / "results" / "paper" / "figures.json").read_text())
VALUES = {(cell.table, cell.row, cell.column): cell.paper_value for cell in CELLS}


@pytest.mark.parametrize(
    ("cell", "value"),
    [  # read off the paper by eye
        (("table2", "Alice", "60M"), 28.69),
        (("table2", "Alice", "60M*"), 29.33),
        (("table2", "Adam", "1.3B*"), 16.44),
        (("table2", "RACS", "350M*"), 16.51),
        (("table2", "Alice-0", "130M"), 21.99),
        (("table2", "GaLore", "130M*"), 25.36),
        (("table2", "Fira", "1.3B"), 15.14),
        (("table2", "Muon", "350M*"), 19.3),
        (("table4", "RACS (1B)", "40K"), 16.43),
        (("table4", "Alice (1B)", "150K"), 12.97),
        (("table5", "Tracking+Switch", "130M"), 25.11),
        (("figure5a", "switch no tracking", "130M"), 25.5181),
        (("figure5b", "gaussian mix", "130M"), 27.3643),
        (("figure5c", "fira+", "130M"), 22.4653),
        (("figure5d", "GaLore + lm head", "130M"), 25.2859),
        (("figure5e", "RACS w.o. EMA", "130M"), 29.7469),
        (("figure6", "tracking no switch", "130M"), None),
    ],
)
def test_cells_hold_the_printed_numbers(cell: tuple[str, str, str], value: float | None) -> None:
    assert VALUES[cell] == value


def test_every_table_is_there_and_no_cell_twice() -> None:
    counts = Counter(cell.table for cell in CELLS)
    assert counts == {
        "table2": 52,
        "table4": 8,
        "table5": 4,
        "figure5a": 4,
        "figure5b": 4,
        "figure5c": 4,
        "figure5d": 4,
        "figure5e": 2,
        "figure6": 2,
    }
    assert len(VALUES) == len(CELLS)


def test_cells_and_experiments_name_each_other() -> None:
    assert {cell.experiment for cell in CELLS} == set(EXPERIMENTS)
    assert all(name == experiment.name for name, experiment in EXPERIMENTS.items())
    assert not set(ALIASES) & set(EXPERIMENTS) and set(ALIASES.values()) <= set(EXPERIMENTS)


def test_cells_that_share_a_run_show_one_number() -> None:
    """What the paper prints in two places agrees to its own rounding and repetition, but for the cited GaLore."""
    shared: dict[str, list[float]] = {}
    for cell in CELLS:
        if cell.step is None and cell.paper_value is not None and not cell.cited:
            shared.setdefault(cell.experiment, []).append(cell.paper_value)
    several = {name: values for name, values in shared.items() if len(values) > 1}
    assert {"table2/alice_130m_candidate", "table5/tracking_switch", "table2/racs_130m"} <= set(several)
    assert all(max(values) - min(values) < 0.011 for values in several.values())
    # and no two runs have one number: a cell that points to the wrong run would
    rounded = [round(values[0], 2) for name, values in shared.items() if name.startswith(("table5", "figure5"))]
    assert len(set(rounded)) == len(rounded)


def test_a_star_is_adam_on_the_last_layer_and_other_papers_methods_are_cited_there() -> None:
    for cell in CELLS:
        experiment = EXPERIMENTS[cell.experiment]
        if cell.table == "table2":
            starred = cell.column.endswith("*")
            assert experiment.last_layer == ("adam" if starred else "candidate")
            assert cell.cited == (starred and cell.row in ("GaLore", "Fira", "Apollo-mini", "Apollo-svd"))
        else:
            assert not cell.cited
    assert table2_name("alice", "60m", False) == "table2/alice_60m_candidate"


def test_steps_are_evaluations_of_the_run_and_curves_are_in_the_figures() -> None:
    for cell in CELLS:
        if cell.step is not None:
            assert cell.step % 500 == 0 and cell.step <= EXPERIMENTS[cell.experiment].steps
        if cell.table == "figure6":
            assert len(FIGURES["fig6_index1"][cell.row]) in (99, 100)
    # Figure 6 has updates of 20,000 steps: the size of its runs
    assert {EXPERIMENTS[cell.experiment].steps for cell in CELLS if cell.table == "figure6"} == {20_000}


def test_the_list_needs_no_torch() -> None:
    code = "import sys, reporting.paper.cells; assert 'torch' not in sys.modules and 'hydra' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
