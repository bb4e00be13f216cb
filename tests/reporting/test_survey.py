import json
import math
from itertools import pairwise

import pytest

from pretraining.config import choices
from reporting import find_runs, load_speed, style, survey_figure, survey_report, survey_table, units
from reporting.survey import FAMILIES, SPEED_FORMAT, entries, survey_remarks
from tests.reporting.synthetic import write_run

METHODS = [name for name in choices("optimizer") if name != "any"]
PAIRS = [(lr, adam_lr) for lr in (0.01, 0.03) for adam_lr in (0.01, 0.03)]


def method(name, ms=10.0, refresh=None, interval=1, state=1000, other=400.0, second=1.0):
    mean = ms if refresh is None else ms + (refresh - ms) / interval
    rounds = [
        {"step_ms": [ms * f] * 3, "refresh_ms": [] if refresh is None else [refresh], "other_ms": [other]}
        for f in (1.0, second)
    ]
    return {
        "optimizer": name,
        "interval": interval,
        "step_ms": ms,
        "refresh_ms": refresh,
        "optimizer_ms": mean,
        "forward_backward_ms": other,
        "tokens_per_second": 4096_000 / (mean + other),
        "matrix_state_bytes": state,
        "other_state_bytes": 77,
        "rounds": rounds,
    }


def speed_of(*methods):
    return {
        "format": SPEED_FORMAT,
        "settings": {"steps": 5, "warmup": 3, "rounds": 2, "model": "llama_tiny", "data": "sample", "seconds": 300}
        | {"precision": "fp32", "tokens_per_step": 4096, "overrides": []},
        "environment": {"commit": "f00d", "uncommitted_changes": False, "load_average_before": 0.05}
        | {"command": "python scripts/benchmark_optimizers.py", "versions": {"torch": "2.13.0"}}
        | {"hardware": {"device": "cpu", "cpu": "Another CPU", "threads": 4}},
        "methods": list(methods),
    }


def write(folder, name, values, **more):
    """One run for each pair of rates; None is a run that has not ended, infinity one that diverged at step 7."""
    for (lr, adam_lr), value in zip(PAIRS, values, strict=False):
        how = {"finished": False} if value is None else {"diverged": 7} if math.isinf(value) else {"perplexity": value}
        write_run(folder / f"{name}-{lr}-{adam_lr}", name, lr, adam_lr, steps=8, **how, **more)


@pytest.fixture
def sweep(tmp_path):
    """Adam 60, RACS 58 with a diverged pair, Alice only diverged, Muon with one pair ended, SGD not run."""
    write(tmp_path, "adam", [70.0, 60.0, 75.0, 80.0])
    write(tmp_path, "racs", [61.0, 62.0, 58.0, math.inf])
    write(tmp_path, "alice", [math.inf] * 4)
    write(tmp_path, "muon", [64.0, None])
    return find_runs(tmp_path)


EXPECTED = dict.fromkeys(("adam", "racs", "alice", "muon", "sgd"), 4)


def table_rows(text):
    return {
        line.split("`")[1]: [cell.strip() for cell in line.strip("|").split("|")][1:] for line in text.splitlines()[2:]
    }


def test_every_method_has_a_name_of_its_own_and_a_family():
    names = [units.optimizer_name(name) for name in METHODS]
    assert len(set(names)) == len(METHODS)
    assert [name for name in METHODS if units.optimizer_name(name) == name] == []
    assert sorted(name for _, members in FAMILIES.values() for name in members) == METHODS


def test_the_table_is_sorted_by_the_best_pair_and_says_what_is_missing(sweep):
    speed = speed_of(
        method("adam", 5.0, state=2000), method("racs", 4.0, state=20), method("alice", 20.0, 120.0, 25, 500),
        method("muon", 150.0, state=1000),
    )  # fmt: skip
    text = survey_table(sweep, speed, EXPECTED)
    assert "State (matrices)" in text.splitlines()[0]
    rows = table_rows(text)
    assert list(rows) == ["racs", "adam", "muon", "alice", "sgd"]
    assert rows["racs"] == ["0.03", "0.01", "58.00", "diverged", "20 B", "0.01", "4.00", "-", "10,139"]
    assert rows["adam"] == ["0.01", "0.03", "60.00", "80.00", "2.0 KiB", "1.00", "5.00", "-", "10,114"]
    assert rows["muon"][2:4] == ["64.00", "64.00"]
    assert rows["alice"][2:] == ["diverged", "diverged", "500 B", "0.25", "24.0", "120, every 25", "9,660"]
    assert rows["sgd"] == ["not run"] * 9


def test_without_speeds_of_every_method_the_state_is_that_of_all_parameters(sweep):
    for speed in (None, speed_of(method("adam", state=2000))):
        text = survey_table(sweep, speed, EXPECTED)
        assert "State (all parameters)" in text.splitlines()[0]
        rows = table_rows(text)
        assert rows["racs"][4:6] == ["23.0 MiB", "1.00"]
        assert rows["racs"][6:] == ["not run"] * 3
        assert rows["alice"][4:6] == ["not run"] * 2  # a diverged run has no summary


def test_a_method_that_only_the_benchmark_knows_has_a_row(sweep):
    rows = table_rows(survey_table(sweep, speed_of(method("lion", 3.0))))
    assert rows["lion"][2] == "not run" and rows["lion"][6] == "3.00"


def test_pairs_are_ranked_by_the_seed_that_all_have(tmp_path):
    write(tmp_path, "racs", [61.0, 62.0])
    for seed in (43, 44):
        write_run(tmp_path / f"again-{seed}", "racs", *PAIRS[0], seed=seed, perplexity=99.0, steps=8)
    [entry], _ = entries(find_runs(tmp_path))
    assert (entry.best, entry.perplexity) == (PAIRS[0], 61.0)


def test_the_remarks_name_diverged_cells_missing_pairs_and_disagreement(sweep):
    speed = speed_of(method("adam", second=1.02), method("racs", second=0.5), method("muon"))
    notes = survey_remarks(sweep, speed, EXPECTED)
    assert notes[0] == "Not all pairs have ended: Muon (1 of 4), SGD (0 of 4)."
    assert notes[1].startswith("Diverged (matrix rate, Adam rate): Alice (0.01, 0.01) at step 7, Alice (0.01, 0.03)")
    assert notes[1].endswith("RACS (0.03, 0.03) at step 7.")
    assert "ordinary update 1.02 for the usual optimizer, 2.00 at most (RACS)" in notes[2]
    assert "forward and backward 1.00 for the usual optimizer" in notes[2]


def test_the_report_names_where_its_speeds_are_from(sweep):
    text = survey_report(sweep, None, EXPECTED, "all.png", [("Commit", "abc")])
    assert "Not measured yet: `python scripts/benchmark_optimizers.py`" in text
    text = survey_report(sweep, speed_of(method("adam")), {**EXPECTED, "adam": 6}, "all.png", [("Commit", "abc")])
    assert "after 8 steps" in text and "4 pairs, 6 of Adam." in text
    assert "- Commit: abc" in text and "![Perplexity, state and update time of every optimizer](all.png)" in text
    speeds = text[text.index("## Speeds") :]
    assert "`python scripts/benchmark_optimizers.py`" in speeds and "Another CPU" in speeds and "f00d" in speeds
    assert "| RACS | 0.03 | 0.03 | 42 | diverged at step 7 |" in text


def test_speeds_are_read_back_and_anything_else_is_refused(tmp_path):
    path = tmp_path / "speed.json"
    assert load_speed(path) is None
    path.write_text(json.dumps(speed_of(method("adam"))))
    assert load_speed(path) == speed_of(method("adam"))
    for bad in ("{", "[]", '{"format": 0, "methods": []}', '{"format": 1}'):
        path.write_text(bad)
        with pytest.raises(ValueError, match=r"measure again with scripts/benchmark_optimizers\.py"):
            load_speed(path)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, to look at what stands on their axes."""
    saved = []
    save = style.save
    monkeypatch.setattr(style, "save", lambda figure, path: saved.append(figure) or save(figure, path))
    return saved


def test_the_figure_has_a_row_for_each_method_and_its_pairs(sweep, tmp_path, drawn):
    speed = speed_of(*(method(name, 3.0 * k, state=500 * k) for k, name in enumerate(EXPECTED, start=1)))
    path = survey_figure(sweep, tmp_path / "all.png", speed, EXPECTED)
    assert path.read_bytes().startswith(b"\x89PNG")
    main, states, times = drawn[0].axes
    assert [tick.get_text() for tick in main.get_yticklabels()] == [
        "RACS  58.00", "Adam  60.00", "Muon  64.00", "Alice  diverged", "SGD  not run",
    ]  # fmt: skip
    dots = {(line.get_xdata()[0], line.get_ydata()[0]) for line in main.lines if len(line.get_xdata()) == 1}
    assert {(58.0, 0), (61.0, 0), (62.0, 0), (60.0, 1), (70.0, 1), (64.0, 2)} <= dots
    assert (main.get_xlim()[1], 0) in dots and (main.get_xlim()[1], 3) in dots  # diverged: at the edge
    assert not any(y == 4 for _, y in dots)
    ratios = {
        y: x
        for x, y in (
            (line.get_xdata()[-1], line.get_ydata()[-1]) for line in states.lines if len(line.get_xdata()) == 1
        )
    }
    assert ratios == {0: 2.0, 1: 1.0, 2: 4.0, 3: 3.0, 4: 5.0}
    assert [text.get_text() for text in times.texts] == ["Adam"]


def test_the_figure_needs_an_ended_run_and_no_speeds(tmp_path, drawn):
    write(tmp_path / "some", "racs", [61.0])
    survey_figure(find_runs(tmp_path / "some"), tmp_path / "all.png")
    assert len(drawn[0].axes) == 2
    write(tmp_path / "none", "racs", [None])
    with pytest.raises(ValueError, match="let at least one finish"):
        survey_figure(find_runs(tmp_path / "none"), tmp_path / "none.png")


def test_thirty_three_rows_fit(tmp_path, drawn):
    for k, name in enumerate(METHODS):
        write(tmp_path, name, [60.0 + k, 61.0 + k, 62.0 + 3 * k, 700.0])
    survey_figure(find_runs(tmp_path), tmp_path / "all.png", speed_of(*map(method, METHODS)))
    [figure] = drawn
    figure.draw_without_rendering()
    labels = [tick.get_window_extent() for tick in figure.axes[0].get_yticklabels()]
    assert len(labels) == len(METHODS) >= 33
    assert all(lower.y1 <= upper.y0 for upper, lower in pairwise(labels))
    assert min(label.x0 for label in labels) >= 0
