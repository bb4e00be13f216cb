"""The sweep with a stand-in for train.py, which writes a record at once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from reporting import find_runs, load_run
from scripts import sweep as command
from sweeps import Sweep, load_plan
from sweeps.local import MALLOC
from sweeps.progress import table as command_table
from sweeps.slots import cores

ROOT = Path(__file__).resolve().parents[2]

# Perplexity 50 + 1000 |lr - 0.02| + seed - 42; the file "broken" holds the start of the names of runs that fail, with the
# exit code after a blank; "shaky" those that fail the first time; lr=0.5 diverges at step 7.
STAND_IN = f"""
import os, sys, json
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tests.reporting.synthetic import write_run
here = Path(__file__).parent
given = dict(word.split("=", 1) for word in sys.argv[1:])
with (here / "calls.txt").open("a") as calls:
    print(*sys.argv[1:], "threads=" + os.environ.get("OMP_NUM_THREADS", "any"), os.environ["GLIBC_TUNABLES"], file=calls)
if "checkpoint" in given:
    (Path(given["json"])).write_text(json.dumps({{"perplexity": 99.5, "on": given["data"]}}))
    sys.exit()
lr, seed, folder = float(given["optimizer.lr"]), int(given["seed"]), Path(given["run_dir"])
for name in ("broken", "shaky"):
    if (here / name).exists():
        start, code = (here / name).read_text().split()
        if folder.name.startswith(start):
            if name == "shaky":
                (here / name).unlink()
            print("some progress\\nerror: the disk is full")
            sys.exit(int(code))
record = dict(optimizer=given["optimizer"], lr=lr, adam_lr=float(given["optimizer.adam_lr"]), seed=seed, steps=9)
if lr == 0.5:
    write_run(folder, **record, diverged=6)
    (folder / "diverged.json").unlink()
    print("error: the loss is nan at step 7 (rate 0.5, Adam group 0.005); lower optimizer.lr")
    sys.exit(3)
write_run(folder, **record, perplexity=50 + 1000 * abs(lr - 0.02) + seed - 42)
(folder / "checkpoints").mkdir(exist_ok=True)
(folder / "training.png").write_text("not part of the record")
"""


PLAN = {
    "experiment": "quickstart",
    "adam_lr": [0.005],
    "lr": {"alice": [0.01, 0.02], "racs": [0.02, 0.5]},
    "settings": ["trainer.batch_size=16"],
    "seconds": 60,
    "report": "grid",
}


@pytest.fixture
def sweep(tmp_path, capsys):
    """Run the sweep on a small grid with some arguments: its exit code, what it printed, the calls of train.py."""
    trainer = [sys.executable, str(tmp_path / "trainer.py")]
    (tmp_path / "trainer.py").write_text(STAND_IN)

    def run(*words, **changes):
        plan = {key: value for key, value in (PLAN | changes).items() if value is not None}
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
        (tmp_path / "calls.txt").write_text("")
        places = ["--out", str(tmp_path / "out"), "--figure", str(tmp_path / "figures" / "plan.png")]
        code = command.main([str(tmp_path / "plan.yaml"), *places, *words], trainer=trainer, evaluator=trainer)
        printed = capsys.readouterr()
        return code, printed.out + printed.err, (tmp_path / "calls.txt").read_text().splitlines()

    run.out, run.folder = tmp_path / "out", tmp_path
    return run


def names(calls):
    return [word.rpartition("/")[2] for call in calls for word in call.split() if word.startswith("run_dir=")]


def test_the_grid_then_more_seeds_of_each_best_then_figure_and_page(sweep):
    code, printed, calls = sweep("trainer.steps=9", more_seeds=[43])
    assert code == 0
    assert names(calls) == [
        "alice-lr0.01-adam0.005-s42",
        "alice-lr0.02-adam0.005-s42",
        "alice-lr0.02-adam0.005-s43",
        "racs-lr0.02-adam0.005-s42",
        "racs-lr0.5-adam0.005-s42",
        "racs-lr0.02-adam0.005-s43",
    ]
    assert all(call.startswith("experiment=quickstart optimizer=") for call in calls)
    assert all("trainer.batch_size=16" in call and call.split()[-3] == "trainer.steps=9" for call in calls)
    page = (sweep.out / "README.md").read_text()
    assert "| Alice | 0.02 | 0.005 | 50.50 | 2 | ± 0.71 (50.00 to 51.00) |" in page
    assert "| Alice | 0.02 | 0.005 | 50.50 | 2 |" in printed
    assert "plan.yaml" in page and "trainer.steps=9" in page and "../figures/plan.png" in page
    assert "cpu An Example CPU" in page and "| RACS | 0.5 | 0.005 | 42 | diverged at step 7 |" in page
    assert (sweep.folder / "figures" / "plan.png").is_file()
    assert "plan: 0 runs recorded, 4 to do; about 4 min 00 s at 60 s a run." in printed
    assert "[6/6] racs-lr0.02-adam0.005-s43: perplexity 51.00" in printed


def test_only_the_record_of_a_run_is_kept(sweep):
    sweep("--only", "alice")
    kept = {path.name for path in (sweep.out / "alice-lr0.01-adam0.005-s42").iterdir()}
    assert kept == {"config.yaml", "environment.json", "metrics.jsonl", "summary.json"}
    assert not list(sweep.out.rglob("*.log"))


def test_a_run_that_ended_while_nobody_looked_on_is_taken_and_tidied(sweep):
    sweep("--only", "alice")
    folder = sweep.out / "alice-lr0.01-adam0.005-s42"
    (folder / "training.png").write_text("left by a sweep that was killed")
    folder.with_name(f"{folder.name}.log").write_text("so was this")
    assert sweep("--only", "alice", "--dry-run")[2] == [] and (folder / "training.png").is_file()
    assert sweep("--only", "alice")[2] == []
    assert not (folder / "training.png").exists() and not list(sweep.out.rglob("*.log"))


def test_recorded_and_diverged_runs_are_not_run_again_and_unfinished_ones_are(sweep):
    sweep()
    _, printed, calls = sweep()
    assert calls == [] and "4 runs recorded, 0 to do" in printed
    (sweep.out / "racs-lr0.02-adam0.005-s42" / "summary.json").unlink()
    code, _, calls = sweep()
    assert code == 0 and names(calls) == ["racs-lr0.02-adam0.005-s42"]


def test_a_run_that_diverged_is_recorded_with_its_step(sweep):
    sweep("--only", "racs")
    run = load_run(sweep.out / "racs-lr0.5-adam0.005-s42")
    assert run.diverged["step"] == 7 and "the loss is nan" in run.diverged["message"]


def test_a_run_that_crashes_once_is_started_again(sweep):
    (sweep.folder / "shaky").write_text("alice-lr0.02 1")
    code, printed, calls = sweep("--only", "alice")
    assert code == 0 and names(calls).count("alice-lr0.02-adam0.005-s42") == 2
    assert "ended with exit code 1; it starts again" in printed


@pytest.mark.parametrize(("exit_code", "times"), [(1, 3), (2, 1)])
def test_a_run_that_keeps_failing_is_given_up_and_the_others_go_on(sweep, exit_code, times):
    (sweep.folder / "broken").write_text(f"alice-lr0.02 {exit_code}")
    code, printed, calls = sweep()
    assert code == 1 and names(calls).count("alice-lr0.02-adam0.005-s42") == times
    assert len(set(names(calls))) == 4
    assert f"alice-lr0.02-adam0.005-s42 ended with exit code {exit_code}" in printed
    assert printed.rstrip().endswith("some progress\nerror: the disk is full")
    (sweep.folder / "broken").unlink()
    assert names(sweep()[2]) == ["alice-lr0.02-adam0.005-s42"]


def test_settings_that_train_refuses_stop_the_sweep_at_once(sweep):
    (sweep.folder / "broken").write_text("alice 2")
    code, printed, calls = sweep()
    assert code == 1 and len(calls) == 1
    assert "ended with exit code 2, and so would the others" in printed and "error: the disk is full" in printed


def test_a_complete_sweep_leaves_its_notes_alone(sweep):
    sweep("--jobs", "2", "data.path=somewhere/of/mine")
    kept = (sweep.out / "sweep.yaml").read_bytes()
    assert b"data.path=DIR" in kept and b"mine" not in kept and b"jobs: 2" in kept
    sweep("--only", "alice")
    assert (sweep.out / "sweep.yaml").read_bytes() == kept
    (sweep.out / "alice-lr0.02-adam0.005-s42" / "summary.json").unlink()
    sweep("--only", "alice")
    assert b"jobs: 2" in (sweep.out / "sweep.yaml").read_bytes()  # the most that shared the machine


def test_a_record_of_another_text_is_refused(sweep):
    sweep("--only", "alice")
    file = sweep.out / "alice-lr0.02-adam0.005-s42" / "environment.json"
    values = json.loads(file.read_text())
    values["data"]["train"]["listing_sha256"] = "another"
    file.write_text(json.dumps(values))
    code, printed, calls = sweep()
    assert code == 1 and calls == [] and "was trained on another text" in printed


def test_a_word_that_is_no_setting_is_refused(sweep, capsys):
    with pytest.raises(SystemExit) as stopped:
        sweep("foo")
    assert stopped.value.code == 2 and "cannot read 'foo': write settings as key=value" in capsys.readouterr().err


def test_two_at_once_share_the_cores(sweep):
    code, _, calls = sweep("--jobs", "2")
    assert code == 0 and len(find_runs(sweep.out)) == len(calls) == 4
    assert all(call.split()[-2] == f"threads={max(1, cores() // 2)}" for call in calls)
    assert all(call.endswith(MALLOC) for call in calls)
    assert "- Runs at once: 2" in (sweep.out / "README.md").read_text()


def test_a_dry_run_trains_nothing_and_writes_nothing(sweep):
    code, printed, calls = sweep("--dry-run", "trainer.steps=5")
    assert code == 0 and calls == [] and not sweep.out.exists()
    assert printed.count("trainer.steps=5") == 4
    assert "optimizer=racs optimizer.lr=0.5 optimizer.adam_lr=0.005 seed=42" in printed


def test_records_of_other_settings_are_not_mixed_in(sweep):
    sweep("--only", "alice", "trainer.steps=9")
    code, printed, calls = sweep("--only", "alice", "trainer.steps=10")
    assert code == 1 and calls == []
    assert "was run with trainer.steps=9, but the sweep asks for 10" in printed and len(printed.splitlines()) == 1


def test_the_page_is_rebuilt_from_records_alone(sweep):
    sweep("--jobs", "2")
    page, figure = sweep.out / "README.md", sweep.folder / "figures" / "plan.png"
    text, picture = page.read_text(), figure.read_bytes()
    page.unlink()
    figure.unlink()
    code, printed, calls = sweep("--report-only")
    assert code == 0 and calls == [] and "| Alice | 0.02 |" in printed
    assert (page.read_text(), figure.read_bytes()) == (text, picture)  # also the sweep's command and jobs


def test_without_records_a_page_says_so(sweep):
    code, printed, calls = sweep("--report-only")
    assert code == 1 and calls == []
    assert printed.startswith("error: There is no folder") and len(printed.splitlines()) == 1


def test_a_survey_instead_of_the_grid(sweep):
    code, printed, calls = sweep(report="survey")
    assert code == 0 and len(calls) == 4
    page = (sweep.out / "README.md").read_text()
    assert "| Alice `alice` | 0.02 | 0.005 | 50.00 | 60.00 |" in page and "| Alice `alice` |" in printed
    assert "| RACS `racs` | 0.02 | 0.005 | 50.00 | diverged |" in page
    assert ": 2 pairs." in page and "- Seeds: 42" in page and "- Commit: 4f81fa7c0ffee" in page
    [again] = [line for line in page.splitlines() if line.startswith("- This report, from the records: ")]
    assert again.endswith("sweep.py plan --report-only`")
    (sweep.out / "speed.json").write_text("{}")
    code, printed, _ = sweep("--report-only", report="survey")
    assert code == 1 and "speed.json is not a speed record" in printed


def test_every_run_is_evaluated_on_other_text_as_well_before_its_model_goes(sweep):
    code, _, calls = sweep("--only", "alice", evaluate={"c4": ["data=c4_local"], "own": ["data=sample"]})
    assert code == 0 and len(calls) == 6
    found = json.loads((sweep.out / "alice-lr0.02-adam0.005-s42" / "evaluations.json").read_text())
    assert found == {"c4": {"perplexity": 99.5, "on": "c4_local"}, "own": {"perplexity": 99.5, "on": "sample"}}
    assert sweep("--only", "alice", evaluate={"c4": ["data=c4_local"]})[2] == []


def test_the_time_of_a_run_is_that_of_its_training_and_its_evaluations(sweep):
    (sweep.folder / "slow.py").write_text("import time\ntime.sleep(0.5)\n" + STAND_IN)
    plan = PLAN | {"lr": {"alice": [0.02]}, "evaluate": {"c4": ["data=c4_local"], "own": ["data=sample"]}}
    (sweep.folder / "plan.yaml").write_text(yaml.safe_dump(plan))
    slow = [sys.executable, str(sweep.folder / "slow.py")]
    jobs = Sweep(load_plan(sweep.folder / "plan.yaml"), sweep.out, trainer=slow, evaluator=slow)
    jobs.run()
    [seconds] = jobs.timed
    assert seconds > 3 * 0.5  # each of its three processes slept so long
    (sweep.out / "alice-lr0.02-adam0.005-s42" / "evaluations.json").unlink()
    jobs = Sweep(jobs.plan, sweep.out, trainer=slow, evaluator=slow)
    jobs.run()
    assert jobs.results and not jobs.timed  # only evaluated now, which says nothing about the others


def test_variants_with_the_best_rates_of_another_sweep(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "PLANS", tmp_path)
    (tmp_path / "rates.yaml").write_text(yaml.safe_dump(PLAN))
    trainer = [sys.executable, str(tmp_path / "trainer.py")]
    assert command.main(["rates", "--out", str(tmp_path / "rates"), "--only", "alice",
                         "--figure", str(tmp_path / "a.png")], trainer=trainer) == 0  # fmt: skip
    variants = {"alice": {}, "cold": {"optimizer": "alice", "adam_lr": 0.001}, "racs": {}}
    changes = {
        "lr": None,
        "adam_lr": None,
        "report": None,
        "seeds": [1, 2],
        "variants": variants,
        "rates_from": "rates",
    }
    code, printed, calls = sweep("--seeds", "2", **changes)
    assert code == 0 and sorted(names(calls)) == ["alice-s2", "cold-s2"]
    code, printed, calls = sweep(**changes)
    assert code == 0 and sorted(names(calls)) == ["alice-s1", "cold-s1"], "the rest"
    assert "has no seed 3: choose from 1, 2." in sweep("--seeds", "1,3", **changes)[1]
    assert "plan chooses by its seeds, so it needs all of them: leave --seeds out." in sweep("--seeds", "42")[1]
    assert all("optimizer.lr=0.02" in call for call in calls)
    assert "left out until the grids of rates are finished: racs." in printed


def test_an_interrupted_sweep_ends_its_runs_and_goes_on_later(tmp_path):
    (tmp_path / "trainer.py").write_text(
        "import time, pathlib, os\nopen(__file__ + str(os.getpid()), 'w')\ntime.sleep(60)"
    )
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(PLAN))
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from scripts import sweep; import signal;"
        "signal.signal(signal.SIGTERM, sweep._stop);"
        f"sys.exit(sweep.main([{str(tmp_path / 'plan.yaml')!r}, '--jobs', '2', '--out', {str(tmp_path / 'out')!r}],"
        f" trainer=[sys.executable, {str(tmp_path / 'trainer.py')!r}]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while len(started := list(tmp_path.glob("trainer.py?*"))) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and b"the same command goes on" in errors
    assert len(started) == 2
    for file in started:
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.name.removeprefix("trainer.py")), 0)


def test_a_plan_that_is_not_there_is_refused_with_the_choices(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["nothing"])
    assert stopped.value.code == 2 and "choose from all, compare" in capsys.readouterr().err


def test_the_table_of_progress(sweep):
    sweep("--only", "alice")
    plan = command.load_plan(sweep.folder / "plan.yaml")
    running = command.Sweep(plan, sweep.out)
    running.read()
    text = command_table(running)
    assert [line.split() for line in text[1:3]] == [
        ["alice", "2/2", "50.00", "alice-lr0.02-adam0.005-s42"],
        ["racs", "0/2"],
    ]
    assert text[-1] == "about 2 min 00 s left"
