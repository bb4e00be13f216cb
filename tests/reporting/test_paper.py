"""The paper's numbers agree with each other, and its definitions give what it prints."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reporting.curves import first_evaluation
from reporting.paper.numbers import (
    CURVES,
    EVALUATE_EVERY,
    SIZES,
    effective_throughput,
    load_paper,
    printed_speedups,
    step_speedup,
)
from reporting.records import load_run
from tests.reporting.synthetic import write_run

PAPER = load_paper()


def test_all_printed_speedups_come_out_of_the_digitised_curves() -> None:
    found = printed_speedups(PAPER)
    of_figures = [line for line in found if line.reference != "adam_cited"]
    assert len(of_figures) == 12 and len(found) == 16
    assert [(line.size, line.reference) for line in found if round(line.computed or 0, 2) != line.printed] == []


def test_the_first_evaluations_are_those_of_the_specification() -> None:
    """Alice reaches Adam's perplexity at these steps, RACS at those (spec, section 9)."""
    finals = PAPER.figures["final_values_printed_in_figures"]
    for name, steps in (("Alice", (4500, 10000, 24500, 35500)), ("RACS", (6000, 12000, 25500, 36500))):
        curves = {size: PAPER.curve(CURVES[size], name) for size in SIZES}
        found = [first_evaluation(*curves[size], finals[CURVES[size]]["AdamW"], EVALUATE_EVERY) for size in SIZES]
        assert found == list(steps)


def test_a_coarser_or_finer_grid_does_not_give_the_printed_speedups() -> None:
    """So the grid of 500 steps is a deduction that could have failed."""
    steps, values = PAPER.curve("fig2a_60M", "Alice")
    assert step_speedup(steps, values, 33.9451, 10_000, every=500) == pytest.approx(2.22, abs=0.005)
    assert step_speedup(steps, values, 33.9451, 10_000, every=1000) == 2.0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("optimizer", ["adam", "galore", "fira", "racs", "alice_0", "alice"])
@pytest.mark.parametrize("starred", [True, False])
def test_table_2_prints_the_values_of_the_figures(optimizer: str, size: str, starred: bool) -> None:
    printed, value = (ask(optimizer, size, starred) for ask in (PAPER.printed, PAPER.perplexity))
    assert (printed is None) == (value is None) == ((optimizer, starred) in {("adam", False), ("racs", False)})
    if printed is not None and value is not None:
        assert abs(value - printed) < 0.01 + 1e-9  # cut off, or rounded


def test_only_the_papers_own_runs_have_four_decimals() -> None:
    assert PAPER.perplexity("alice", "60M", starred=False) == 28.697
    assert PAPER.perplexity("alice", "60M", starred=True) == 29.3336
    assert PAPER.perplexity("galore", "130M", starred=True) == 25.36  # cited, although Figure 5d has 25.2859
    assert PAPER.perplexity("muon", "1.3B", starred=True) == 16.08
    assert PAPER.perplexity("racs", "60M", starred=False) is None


def test_throughputs_of_figure_3_equal_those_of_table_2() -> None:
    for key, effective in (("throughput_tokens_per_s", False), ("effective_throughput", True)):
        for method, sizes in PAPER.tables["table2"][key].items():
            for size, value in sizes.items():
                assert PAPER.throughput(method.lower(), size, effective) == value
    assert PAPER.throughput("galore", "60M", effective=True) is None  # a bar of height 0


def test_last_points_of_curves_are_the_printed_finals() -> None:
    checked = 0
    for figure, finals in PAPER.figures["final_values_printed_in_figures"].items():
        for name, value in finals.items():
            _, values = PAPER.curve(figure, name)
            assert values[-1] == pytest.approx(value, abs=1.1e-3)
            checked += 1
    assert checked == 32 + 18


def test_only_multiples_of_the_grid_count() -> None:
    steps, values = np.array([100.0, 250.0, 500.0, 750.0, 1000.0]), np.array([90.0, 40.0, 50.0, 30.0, 20.0])
    assert first_evaluation(steps, values, target=45, every=500) == 1000
    assert first_evaluation(steps, values, target=45, every=250) == 250
    assert first_evaluation(steps, values, target=50, every=500) == 500
    assert first_evaluation(steps, values, target=19.9, every=500) is None
    assert step_speedup(steps, values, 19.9, 1000) is None


def test_the_last_evaluation_counts_wherever_it_is() -> None:
    assert first_evaluation(np.array([500.0, 777.0]), np.array([9.0, 5.0]), target=6, every=500) == 777


@given(st.lists(st.floats(1.0, 1e6), min_size=1, max_size=20), st.floats(1.0, 1e6), st.floats(1.0, 1e6))
def test_an_easier_target_is_never_reached_later(values: list[float], one: float, other: float) -> None:
    steps = 500.0 * np.arange(1, len(values) + 1)
    hard, easy = (first_evaluation(steps, np.array(values), target, 500) for target in sorted((one, other)))
    assert hard is None or (easy is not None and easy <= hard)


def test_effective_throughput_is_adams_tokens_over_the_time_to_its_perplexity(tmp_path: Path) -> None:
    times = {"training_seconds": 50.0}
    adam = load_run(write_run(tmp_path / "adam", "adam", perplexity=60.0, steps=1000, eval_every=500))
    fast = write_run(tmp_path / "a", perplexity=30.0, steps=2000, eval_every=500, log_every=100, summary=times)
    first = first_evaluation(load_run(fast).evals["step"], load_run(fast).evals["perplexity"], 60.0, 500)
    assert first in (1000, 1500)
    assert effective_throughput(load_run(fast), adam) == pytest.approx(1000 * 4096 / (50.0 * first / 2000))
    slow = write_run(tmp_path / "b", perplexity=61.0, steps=1000, eval_every=500, summary=times)
    assert effective_throughput(load_run(slow), adam) is None
    untimed = write_run(tmp_path / "c", perplexity=30.0, steps=1000, eval_every=500)
    assert effective_throughput(load_run(untimed), adam) is None


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tables\.json .* restore it"):
        load_paper(tmp_path)
    for name in ("tables", "figures"):
        (tmp_path / f"{name}.json").write_text("{}")
    (tmp_path / "peers.json").write_text("{")
    with pytest.raises(ValueError, match=r"peers\.json is not valid JSON"):
        load_paper(tmp_path)


def test_nothing_in_the_papers_files_is_not_a_number() -> None:
    def numbers(tree: object) -> list[float]:
        if isinstance(tree, dict):
            return [x for value in tree.values() for x in numbers(value)]
        if isinstance(tree, list):
            return [x for value in tree for x in numbers(value)]
        return [float(tree)] if isinstance(tree, (int, float)) and not isinstance(tree, bool) else []

    folder = Path(__file__).parents[2] / "results" / "paper"
    found = [x for path in sorted(folder.glob("*.json")) for x in numbers(json.loads(path.read_text()))]
    assert len(found) > 4000 and all(math.isfinite(x) for x in found)
