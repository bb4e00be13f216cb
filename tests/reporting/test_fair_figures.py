"""What stands on the pictures of the fair comparison."""

import shutil

import pytest

from reporting.fair import figures
from reporting.fair.axes import beyond
from reporting.fair.records import load_fair
from scripts.fair_report import plans
from tests.reporting.fair_plans import perplexity, write_plans
from tests.reporting.fair_records import write_fair

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def fair(tmp_path_factory):
    """Stage 1 and a control whose rates at 0.001 have the best one of RACS at their end."""
    root = tmp_path_factory.mktemp("fair")
    only = ("fair_rates", "fair_control")
    folder = write_plans(root / "plans")
    write_fair(root / "runs", folder, lambda sweep, job, name: perplexity(sweep, job, name) if sweep in only else None)
    return load_fair(root / "runs", plans(root / "runs", folder))


def test_points_at_an_end_of_their_matrix_rates_are_hollow_as_the_table_marks_them(fair):
    from reporting.fair.tables import group_rates

    figure = figures.FIGURES["group_rate"][1](fair)
    for model, axes in zip(fair.models, figure.axes, strict=True):
        inside, at_end = set(), set()
        for line in axes.lines:
            places = {float(x) for x in line.get_xdata()}
            hollow = line.get_markerfacecolor() == "white"
            (at_end if hollow else inside).update((line.get_color(), place) for place in places)
        marked = group_rates(fair, model, fair.ended["fair_rates/llama_tiny/adam-lr0.001-adam0.02-s42"].path)
        assert at_end < inside
        assert len(at_end) == marked.count("†")
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words[-1] == "hollow: the best matrix rate is an end of those tried"


def test_what_a_triangle_means_is_said_only_where_there_is_one(fair):
    for name in ("group_rate", "sensitivity"):
        figure = figures.FIGURES[name][1](fair)
        above = any(line.get_marker() == "^" and not line.get_clip_on() for axes in figure.axes for line in axes.lines)
        assert ("▲" in figure.get_suptitle()) == above


def test_points_above_the_axis_are_marked_on_its_edge():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    assert not beyond(axes, {0.01: 50.0}, 60.0, "black") and not axes.lines
    assert beyond(axes, {0.01: 50.0, 0.02: 70.0, 0.03: 80.0}, 60.0, "black", hollow=[0.03])
    assert [(*line.get_data(), line.get_markerfacecolor()) for line in axes.lines] == [
        ([0.02], [60.0], "black"),
        ([0.03], [60.0], "white"),
    ]


def test_a_picture_says_which_methods_may_not_be_told_apart_yet(tmp_path):
    folder, only = write_plans(tmp_path / "plans"), ("fair_rates", "fair_best")
    write_fair(
        tmp_path / "runs", folder, lambda sweep, job, name: perplexity(sweep, job, name) if sweep in only else None
    )

    def notes():
        fair = load_fair(tmp_path / "runs", plans(tmp_path / "runs", folder))
        return [axes.get_xlabel().partition("\n")[2] for axes in figures.FIGURES["curves"][1](fair).axes]

    assert notes() == ["", ""]
    shutil.rmtree(tmp_path / "runs/fair_best/llama_tiny/racs-s45")
    shutil.rmtree(tmp_path / "runs/fair_best/llama_tiny_4k/adam-s45")
    some, none = notes()
    assert some == "2 of 3 have all 3 seeds:\nno difference claimed of the others"
    assert none == "2 of 3 seeds: no difference claimed"
