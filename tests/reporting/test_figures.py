import math
import subprocess
import sys

import numpy as np
import pytest

from reporting import comparison_figure, figures, find_runs, load_run, style, training_picture
from tests.reporting.synthetic import TOKENS_PER_STEP, write_run


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, to look at what stands on their axes."""
    saved = []
    save = style.save
    monkeypatch.setattr(style, "save", lambda figure, path: saved.append(figure) or save(figure, path))
    return saved


def line(axes, label):
    [found] = [line for line in axes.lines if str(line.get_label()).startswith(label)]
    return found


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_a_saved_picture_tells_what_it_shows(tmp_path):
    """So that one of older records is found out, whatever version of matplotlib has drawn it."""

    def made(values=(1.0, 2.0), label="Alice", title="A title", names=("RACS", "Muon"), scale="linear"):
        figure, rc = style.figure(3.0, 2.0)
        with rc:
            axes = figure.add_subplot()
            axes.plot([1, 2], values, label=label)
            axes.bar([1, 2], [3.0, values[1]])
            axes.scatter([1, 2], values)
            axes.set_xticks([1, 2], names)
            axes.set_yscale(scale)
            axes.legend()
            style.title(figure, title)
        return figure

    for path in style.save_both(made(), tmp_path, "picture"):
        assert style.shows(path, made()) and style.shows(path, made((1.0, 2.0 + 1e-9)))
        others = (
            {"values": (1.0, 2.001)},
            {"label": "RACS"},
            {"title": "Another"},
            {"names": ("Muon", "RACS")},
            {"scale": "log"},
        )
        for other in (made(**changed) for changed in others):
            assert not style.shows(path, other)


def test_the_training_picture_shows_the_numbers_of_the_record(tmp_path, drawn):
    folder = write_run(tmp_path / "run", steps=60, eval_every=20)
    path = training_picture(folder)
    assert path == folder / "training.png" and path.read_bytes().startswith(b"\x89PNG")
    main, rates, norm = drawn[0].axes
    run = load_run(folder)
    x, y = line(main, "validation").get_data()
    np.testing.assert_array_equal(x, np.array([20, 40, 60]) * TOKENS_PER_STEP)
    np.testing.assert_array_equal(y, run.evals["perplexity"])
    np.testing.assert_allclose(main.lines[0].get_ydata(), np.exp(run.train["loss"]))
    assert main.get_yscale() == "log"
    assert {"unigram 412.5", "bigram 103.8", "57.25"} <= set(texts(main))
    assert {412.5, 103.75} <= {float(line.get_ydata()[0]) for line in main.lines}
    assert main.get_ylim()[0] < 57.25 and main.get_ylim()[1] > 412.5
    np.testing.assert_array_equal(rates.lines[0].get_ydata(), run.train["lr"])
    np.testing.assert_array_equal(rates.lines[1].get_ydata(), run.train["adam_lr"])
    np.testing.assert_array_equal(norm.lines[0].get_ydata(), run.train["grad_norm"])
    title = drawn[0].get_suptitle()
    assert title == "llama_tiny (3.7M parameters), Alice, data: sample, 246k tokens: validation perplexity 57.25"


def test_a_run_that_goes_on_has_a_picture_and_an_empty_one_a_sentence(tmp_path, drawn):
    folder = write_run(tmp_path / "run", steps=5, eval_every=9, finished=False)
    training_picture(folder, tmp_path / "elsewhere" / "now.png")
    assert (tmp_path / "elsewhere" / "now.png").is_file()
    assert drawn[0].get_suptitle().endswith("not finished")
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no training steps yet"):
        training_picture(folder)


def test_null_figures_leave_gaps_not_errors(tmp_path):
    folder = write_run(tmp_path / "run", steps=4)
    (folder / "metrics.jsonl").write_text(
        '{"kind": "train", "step": 1, "loss": 6.0, "lr": 0.0, "adam_lr": null, "tokens": 10, "grad_norm": 0.0}\n'
        '{"kind": "train", "step": 2, "loss": NaN, "lr": 0.1, "adam_lr": null, "tokens": 20, "grad_norm": NaN}\n'
    )
    assert training_picture(folder).is_file()


def test_smoothing_keeps_constants_and_lines_and_skips_gaps():
    np.testing.assert_allclose(figures._smooth(np.full(200, 3.0)), 3.0)
    straight = np.linspace(5.0, 1.0, 200)
    np.testing.assert_allclose(figures._smooth(straight)[:195], straight[:195])  # it does not lag
    straight[50] = math.nan
    smooth = figures._smooth(straight)
    assert np.isnan(smooth).nonzero()[0].tolist() == [50]


@pytest.fixture
def sweep(tmp_path):
    """Two optimizers on 2 x 2 rates: RACS is best at (0.02, 0.005), Alice at (0.01, 0.001) with three seeds."""
    for lr, adam_lr, racs, alice in (
        (0.01, 0.001, 66.0, 54.0),
        (0.01, 0.005, 64.0, 57.0),
        (0.02, 0.001, 65.0, 58.0),
        (0.02, 0.005, 59.0, None),
    ):
        write_run(tmp_path / f"racs{lr}{adam_lr}", "racs", lr, adam_lr, perplexity=racs, steps=6, eval_every=2)
        write_run(
            tmp_path / f"alice{lr}{adam_lr}",
            "alice",
            lr,
            adam_lr,
            perplexity=alice or 90.0,
            steps=6,
            eval_every=2,
            diverged=None if alice else 3,
        )
    for seed, value in ((43, 55.0), (44, 56.0)):
        write_run(tmp_path / f"alice-s{seed}", "alice", 0.01, 0.001, seed, value, steps=6, eval_every=2)
    return find_runs(tmp_path)


def test_the_left_panel_holds_the_best_curve_of_each_optimizer(tmp_path, drawn, sweep):
    assert comparison_figure(sweep, tmp_path / "out.png").is_file()
    left = drawn[0].axes[0]
    assert [text.get_text() for text in left.get_legend().get_texts()] == [
        "Alice  lr 0.01, adam 0.001: 55.00",
        "RACS  lr 0.02, adam 0.005: 59.00",
    ]
    racs = line(left, "RACS")
    assert racs.get_xdata().tolist() == [step * TOKENS_PER_STEP for step in (2, 4, 6)]
    assert racs.get_ydata()[-1] == pytest.approx(59.0)
    assert line(left, "Alice").get_ydata()[-1] == pytest.approx(55.0)  # the mean of its seeds
    band = left.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(54.0)
    assert "bigram 103.8" in texts(left)


def test_the_right_panel_goes_through_the_best_matrix_rate_at_each_adam_rate(tmp_path, drawn, sweep):
    comparison_figure(sweep, tmp_path / "out.png")
    right = drawn[0].axes[1]
    lines = {tuple(line.get_ydata()) for line in right.lines if line.get_linestyle() == "-"}
    assert lines == {(54.0, 57.0), (65.0, 59.0)}
    faint = sorted(float(line.get_ydata()[0]) for line in right.lines if line.get_alpha() == 0.3)
    assert faint == [58.0, 64.0, 66.0]
    assert right.get_xscale() == "log"
    assert [tick for tick in right.get_xticks() if tick in (0.001, 0.005)] == [0.001, 0.005]


def test_the_right_panel_has_numbers_up_to_its_highest_line(tmp_path, drawn):
    """Round numbers by factors would leave a gap above 100."""
    for adam_lr, perplexity in ((0.001, 127.0), (0.005, 98.0), (0.02, 61.0)):
        write_run(tmp_path / f"{adam_lr}", "adam", 0.001, adam_lr, perplexity=perplexity, steps=6, eval_every=2)
    comparison_figure(find_runs(tmp_path), tmp_path / "out.png")
    ticks = drawn[0].axes[1].get_yticks()
    assert ticks.max() > 0.9 * 127 and len(ticks) >= 4
    assert np.ptp(np.diff(ticks)) == pytest.approx(0)


def test_each_method_keeps_its_colour_and_others_take_none_of_theirs(tmp_path, drawn):
    for name in ("fira", "muon", "lion"):
        write_run(tmp_path / name, name, 0.01, 0.001, perplexity=60.0, steps=6, eval_every=2)
    comparison_figure(find_runs(tmp_path), tmp_path / "out.png")
    left = drawn[0].axes[0]
    for name, start in (("fira", "Fira"), ("muon", "Muon")):
        assert (line(left, start).get_color(), line(left, start).get_marker()) == style.LOOKS[name][::2]
    assert line(left, "Lion").get_color() not in [colour for colour, *_ in style.LOOKS.values()]


def test_a_diverged_run_stands_at_the_upper_edge(tmp_path, drawn, sweep):
    comparison_figure(sweep, tmp_path / "out.png")
    right = drawn[0].axes[1]
    [cross] = [line for line in right.lines if line.get_marker() == "x"]
    assert cross.get_ydata() == [right.get_ylim()[1]]
    assert 0.004 < cross.get_xdata()[0] < 0.006
    assert "diverged" in right.get_xlabel()


def test_an_optimizer_that_always_diverged_is_still_in_the_figure(tmp_path, drawn, sweep):
    diverged = load_run(write_run(tmp_path / "muon", "muon", 0.05, 0.005, steps=6, diverged=2))
    comparison_figure([*sweep, diverged], tmp_path / "out.png")
    labels = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert labels[-1] == "Muon  lr 0.05, adam 0.005: diverged"
    assert comparison_figure([diverged], tmp_path / "alone.png").is_file()


def test_nothing_to_compare_is_said(tmp_path):
    with pytest.raises(ValueError, match="nothing to compare"):
        comparison_figure([load_run(write_run(tmp_path / "run", steps=3, finished=False))], tmp_path / "out.png")


def test_without_matplotlib_drawing_says_what_to_install(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run", steps=3)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        training_picture(folder)


def test_importing_reporting_loads_neither_matplotlib_nor_torch():
    code = "import sys, reporting; print({'matplotlib', 'torch', 'pretraining', 'data'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
