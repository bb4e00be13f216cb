"""The sweep with a stand-in for train.py, which writes a record at once."""

import sys
from pathlib import Path

import pytest
import yaml

from reporting import find_runs, load_run
from scripts import compare

ROOT = Path(__file__).resolve().parents[2]

# Perplexity 50 + 1000 |lr - 0.02| + seed - 42; broken.yaml names a run that fails, lr=0.5 diverges at step 7.
STAND_IN = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tests.reporting.synthetic import write_run
here = Path(__file__).parent
given = dict(word.split("=", 1) for word in sys.argv[1:])
with (here / "calls.txt").open("a") as calls:
    print(*sys.argv[1:], "threads=" + os.environ.get("OMP_NUM_THREADS", "any"), file=calls)
lr, seed, folder = float(given["optimizer.lr"]), int(given["seed"]), Path(given["run_dir"])
if (here / "broken").exists() and (here / "broken").read_text() in folder.name:
    print("some progress\\nerror: the disk is full")
    sys.exit(2)
record = dict(optimizer=given["optimizer"], lr=lr, adam_lr=float(given["optimizer.adam_lr"]), seed=seed, steps=9)
if lr == 0.5:
    write_run(folder, **record, diverged=6)
    (folder / "diverged.json").unlink()
    print("error: the loss is nan at step 7 (rate 0.5, Adam group 0.005); lower optimizer.lr")
    sys.exit(3)
write_run(folder, **record, perplexity=50 + 1000 * abs(lr - 0.02) + seed - 42)
(folder / "checkpoints").mkdir()
(folder / "training.png").write_text("not part of the record")
"""


@pytest.fixture
def sweep(tmp_path, capsys):
    """Run the sweep on a small grid with some arguments; what it printed, its exit code and the calls of train.py."""
    (tmp_path / "trainer.py").write_text(STAND_IN)
    (tmp_path / "plan.yaml").write_text(
        yaml.safe_dump(
            {
                "experiment": "quickstart",
                "adam_lr": [0.005],
                "lr": {"alice": [0.01, 0.02], "racs": [0.02, 0.5]},
                "overrides": ["trainer.save_every=0"],
                "seconds_per_cell": 60,
            }
        )
    )

    def run(*words):
        calls = tmp_path / "calls.txt"
        calls.write_text("")
        code = compare.main(
            [
                "--out",
                str(tmp_path / "out"),
                "--figure",
                str(tmp_path / "figures" / "compare.png"),
                "--plan",
                str(tmp_path / "plan.yaml"),
                *words,
            ],
            trainer=[sys.executable, str(tmp_path / "trainer.py")],
        )
        printed = capsys.readouterr()
        return code, printed.out + printed.err, calls.read_text().splitlines()

    run.out = tmp_path / "out"
    run.folder = tmp_path
    return run


def test_the_grid_then_more_seeds_of_each_best_then_figure_and_report(sweep):
    code, printed, calls = sweep("--extra-seeds", "43", "trainer.batch_size=4")
    assert code == 0
    assert [call.split()[4].rsplit("/", 1)[1] for call in calls] == [
        "alice-lr0.01-adam0.005-s42",
        "alice-lr0.02-adam0.005-s42",
        "racs-lr0.02-adam0.005-s42",
        "racs-lr0.5-adam0.005-s42",
        "alice-lr0.02-adam0.005-s43",
        "racs-lr0.02-adam0.005-s43",
    ]
    assert all("experiment=quickstart trainer.save_every=0 trainer.batch_size=4" in call for call in calls)
    assert (sweep.folder / "figures" / "compare.png").is_file()
    report = (sweep.out / "README.md").read_text()
    assert "| Alice | 0.02 | 0.005 | 50.50 | 2 | ± 0.71 (50.00 to 51.00) |" in report
    assert "| Alice | 0.02 | 0.005 | 50.50 | 2 |" in printed
    assert "--extra-seeds 43 trainer.batch_size=4" in report
    assert "cpu An Example CPU" in report and "../figures/compare.png" in report
    assert "| RACS | 0.5 | 0.005 | 42 | diverged at step 7 |" in report
    assert "4 cells (alice, racs) and 1 more seeds of each best: 6 runs, 0 recorded already; about 6 min" in printed
    assert "[6/6] racs lr=0.02 adam_lr=0.005 seed=43: perplexity 51.00" in printed


def test_only_the_record_of_a_cell_is_kept(sweep):
    sweep("--only", "alice", "--extra-seeds", "")
    kept = {path.name for path in (sweep.out / "alice-lr0.01-adam0.005-s42").iterdir()}
    assert kept == {"config.yaml", "environment.json", "metrics.jsonl", "summary.json"}
    assert not list(sweep.out.glob("*.log"))


def test_recorded_and_diverged_cells_are_skipped_and_unfinished_ones_run_again(sweep):
    sweep("--extra-seeds", "")
    _, printed, calls = sweep("--extra-seeds", "")
    assert calls == [] and "6 runs" not in printed and "4 runs, 4 recorded already" in printed
    (sweep.out / "racs-lr0.02-adam0.005-s42" / "summary.json").unlink()
    code, _, calls = sweep("--extra-seeds", "")
    assert code == 0
    assert len(calls) == 1 and "racs-lr0.02-adam0.005-s42" in calls[0]


def test_a_diverged_cell_is_recorded_with_its_step(sweep):
    sweep("--only", "racs", "--extra-seeds", "")
    run = load_run(sweep.out / "racs-lr0.5-adam0.005-s42")
    assert run.diverged["step"] == 7
    assert "the loss is nan" in run.diverged["message"]


def test_any_other_failure_stops_with_the_end_of_the_log_and_the_sweep_goes_on_later(sweep):
    (sweep.folder / "broken").write_text("alice-lr0.02")
    code, printed, calls = sweep("--extra-seeds", "")
    assert code == 1 and len(calls) == 2
    assert "alice lr=0.02 adam_lr=0.005 seed=42 ended with exit code 2" in printed
    assert printed.rstrip().endswith("some progress\nerror: the disk is full")
    (sweep.folder / "broken").unlink()
    code, _, calls = sweep("--extra-seeds", "")
    assert code == 0 and len(calls) == 3


def test_two_at_once_share_the_cores(sweep):
    code, _, calls = sweep("--jobs", "2", "--extra-seeds", "")
    assert code == 0
    assert len(find_runs(sweep.out)) == len(calls) == 4
    assert all(call.endswith(f"threads={max(1, compare.cores() // 2)}") for call in calls)


def test_a_dry_run_trains_nothing_and_writes_nothing(sweep):
    code, printed, calls = sweep("--dry-run", "--steps", "5")
    assert code == 0 and calls == [] and not sweep.out.exists()
    assert printed.count("trainer.steps=5") == 4
    assert "optimizer=racs optimizer.lr=0.5 optimizer.adam_lr=0.005 seed=42" in printed


def test_cells_of_different_settings_are_not_mixed(sweep):
    sweep("--only", "alice", "--extra-seeds", "", "--steps", "9")
    code, printed, calls = sweep("--only", "alice", "--extra-seeds", "")
    assert code == 1 and calls == []
    assert "other settings" in printed and "trainer.steps=9" in printed


def test_the_report_is_rebuilt_from_records_alone(sweep):
    sweep("--jobs", "2", "--extra-seeds", "")
    report, figure = sweep.out / "README.md", sweep.folder / "figures" / "compare.png"
    text, picture = report.read_text(), figure.read_bytes()
    report.unlink()
    figure.unlink()
    code, printed, calls = sweep("--report-only")
    assert code == 0 and calls == [] and "| Alice | 0.02 |" in printed
    assert (report.read_text(), figure.read_bytes()) == (text, picture)  # also the sweep's command and jobs
    assert "--jobs 2 --extra-seeds ''`" in text and "- Runs at once: 2" in text


def test_records_of_a_sweep_before_commands_were_noted_can_be_reported(sweep):
    sweep("--extra-seeds", "")
    kept = yaml.safe_load((sweep.out / "sweep.yaml").read_text())
    (sweep.out / "sweep.yaml").write_text(yaml.safe_dump({"settings": kept["settings"]}))
    assert sweep("--report-only")[0] == 0
    report = (sweep.out / "README.md").read_text()
    assert "Runs at once" not in report and "--report-only" not in report
    assert sweep("--extra-seeds", "")[2] == []  # and such a sweep goes on


def test_without_records_a_report_says_so(sweep):
    code, printed, calls = sweep("--report-only")
    assert code == 1 and calls == []
    assert printed.startswith("error: There is no folder") and len(printed.splitlines()) == 1


@pytest.mark.parametrize("asked", ["by the plan", "by the command"])
def test_a_survey_instead_of_the_grid(sweep, asked):
    plan = sweep.folder / "plan.yaml"
    if asked == "by the plan":
        plan.write_text(plan.read_text() + "report: survey\n")
    words = ["--report", "survey"] if asked == "by the command" else []
    code, printed, calls = sweep("--extra-seeds", "", *words)
    assert code == 0 and len(calls) == 4
    report = (sweep.out / "README.md").read_text()
    assert "| Alice `alice` | 0.02 | 0.005 | 50.00 | 60.00 |" in report and "| Alice `alice` |" in printed
    assert "| RACS `racs` | 0.02 | 0.005 | 50.00 | diverged |" in report
    assert "each method at the best of its pairs of rates" in report and ": 2 pairs." in report
    assert "- Steps: 9" in report and "- Seeds: 42" in report and "- Commit: 4f81fa7c0ffee" in report
    assert "Not measured yet" in report and "../figures/compare.png" in report
    [again] = [line for line in report.splitlines() if line.startswith("- This report, from the records: ")]
    assert again.endswith("--report-only`")
    assert (sweep.folder / "figures" / "compare.png").is_file()


def test_a_broken_speed_record_is_named(sweep):
    sweep("--extra-seeds", "")
    (sweep.out / "speed.json").write_text("{}")
    code, printed, _ = sweep("--report", "survey", "--report-only")
    assert code == 1 and "speed.json is not a speed record" in printed


def test_an_optimizer_without_a_grid_is_refused_with_the_choices(sweep, capsys):
    with pytest.raises(SystemExit) as stopped:
        sweep("--only", "alice,lion")
    assert stopped.value.code == 2
    assert "no grid for lion: choose from alice, racs" in capsys.readouterr().err


def test_the_committed_grid_is_the_promised_one():
    plan = yaml.safe_load(compare.PLAN.read_text())
    assert plan["adam_lr"] == [0.001, 0.005, 0.02]
    assert list(plan["lr"]) == ["adam", "muon", "racs", "alice"]
    cells = compare.grid(plan, plan["lr"], [42])
    assert len(cells) == len(set(cells)) == 36
