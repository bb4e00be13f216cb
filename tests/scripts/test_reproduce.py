"""scripts/reproduce.py with a trainer that only writes records."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from reporting import RECORD_FILES
from scripts import reproduce as script

ROOT = Path(__file__).parents[2]

# Writes what a run leaves, and a line into calls.txt; experiments named in crash.txt end with the code there.
TRAINER = """
import json, pathlib, signal, sys, time
words = dict(word.split("=", 1) for word in sys.argv[1:])
with open("calls.txt", "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + chr(10))
crash = pathlib.Path("crash.txt")
codes = json.loads(crash.read_text()) if crash.exists() else {}
folder = pathlib.Path(words["run_dir"])
(folder / "checkpoints").mkdir(parents=True, exist_ok=True)
(folder / "checkpoints" / "weights").write_text("large")
(folder / "config.yaml").write_text("model: {name: llama_60m}" + chr(10) + f"seed: {words['seed']}" + chr(10))
(folder / "metrics.jsonl").write_text("")
code = codes.get(words["experiment"], 0)
if code == "wait":
    def saved(*_):
        (folder / "saved").write_text("")
        raise SystemExit(75)
    signal.signal(signal.SIGTERM, saved)
    (folder / "waiting").write_text("")
    time.sleep(60)
if code:
    raise SystemExit(code)
(folder / "summary.json").write_text(json.dumps({"perplexity": 31.5, "steps": 10000}))
"""
RACS_AND_ADAM = ["table2", "--size", "60m", "--optimizers", "adam,racs"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "trainer.py").write_text(TRAINER)
    return tmp_path


def reproduce(place: Path, *words: str) -> int:
    return script.main([*words], root=place, trainer=[sys.executable, "trainer.py"])


def calls(place: Path) -> list[dict[str, str]]:
    file = place / "calls.txt"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [dict(word.split("=", 1) for word in line) for line in lines]


def partial(place: Path, name: str, step: int) -> None:
    """A run that was stopped after `step`."""
    folder = place / "runs" / "paper" / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 42\n")
    line = {"kind": "train", "step": step, "loss": 3.0, "tokens": step * 131_072}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")


def test_a_dry_run_says_what_is_missing_and_what_it_takes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    partial(place, "table2/racs_60m/s42", 4000)
    words = [*RACS_AND_ADAM, "--dry-run", "--tokens-per-second", "131072", "--price-per-hour", "9"]
    assert reproduce(place, *words) == 0
    text = capsys.readouterr().out
    assert "missing   table2/adam_60m/s42  1.3B tokens, 2 h 46 min at 131,072 tokens/s\n" in text
    assert "stopped   table2/racs_60m/s42  786M tokens, 1 h 40 min at 131,072 tokens/s, at step 4,000\n" in text
    # 16,000 steps of one second
    assert "2 runs: 0 ended, 2 to do." in text and "2.1B tokens, 4 h 26 min of training, 40.00 at 9 an hour" in text
    assert "Figure 3" not in text and not calls(place) and not (place / "results").exists()


def test_without_a_throughput_the_papers_is_named_as_such(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce(place, "table2", "--size", "1b", "--optimizers", "muon,alice", "--dry-run") == 0
    text = capsys.readouterr().out
    assert "53,588 tokens/s (Adam's in the paper)" in text and "45,523 tokens/s (paper)" in text
    assert "Figure 3: A100s" in text
    assert reproduce(place, "all", "--dry-run", "--tokens-per-second", "60m=1000,1b=2000") == 0
    text = capsys.readouterr().out
    assert "64 runs: 0 ended, 64 to do." in text and "at 1,000 tokens/s\n" in text and "at 2,000 tokens/s\n" in text


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (["table2"], 52),
        (["table2", "--size", "60m"], 13),
        (["table4"], 2),
        (["table5"], 4),
        (["figure5"], 15),
        (["figure6"], 2),
        (["figure6", "--seeds", "1,2,3"], 6),
    ],
)
def test_what_is_selected(place: Path, capsys: pytest.CaptureFixture[str], words: list[str], count: int) -> None:
    assert reproduce(place, *words, "--dry-run") == 0
    text = capsys.readouterr().out
    assert f"{count} runs: 0 ended" in text and text.count("missing ") == count


def test_missing_runs_are_run_once_and_their_records_kept(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce(place, *RACS_AND_ADAM, "--seeds", "42,43", "trainer.micro_batch_size=8") == 0
    assert "note: scripts/tables.py is not there" in capsys.readouterr().out
    assert [(call["experiment"], call["seed"], call["run_dir"]) for call in calls(place)] == [
        (f"table2/{name}", seed, f"runs/paper/table2/{name}/s{seed}")
        for name in ("adam_60m", "racs_60m")
        for seed in ("42", "43")
    ]
    assert all(call["trainer.micro_batch_size"] == "8" for call in calls(place))
    record = place / "results" / "runs" / "paper" / "table2" / "racs_60m" / "s43"
    assert {file.name for file in record.iterdir()} == {"config.yaml", "metrics.jsonl", "summary.json"}
    assert {file.name for file in record.iterdir()} < set(RECORD_FILES)
    assert (place / "runs/paper/table2/racs_60m/s43/checkpoints/weights").exists()

    assert reproduce(place, *RACS_AND_ADAM, "--seeds", "42,43") == 0
    assert len(calls(place)) == 4
    text = capsys.readouterr().out
    assert "recorded  table2/adam_60m/s42  31.50, not the cell's number: " in text and "(paper: 33.94)" in text
    assert "4 runs: 4 ended, 0 to do." in text and "To do" not in text


def test_a_run_that_ended_by_itself_is_recorded_without_training(place: Path) -> None:
    partial(place, "table2/adam_60m/s42", 10_000)
    (place / "runs/paper/table2/adam_60m/s42/summary.json").write_text('{"perplexity": 34.0}')
    left_over = place / "results/runs/paper/table2/adam_60m/s42"
    left_over.mkdir(parents=True)
    (left_over / "samples.txt").write_text("of an unfinished run")
    assert reproduce(place, "table2", "--size", "60m", "--optimizers", "adam") == 0
    assert not calls(place)
    assert {file.name for file in left_over.iterdir()} == {"config.yaml", "metrics.jsonl", "summary.json"}


def test_a_crash_is_reported_and_the_others_go_on(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "crash.txt").write_text(json.dumps({"table2/adam_60m": 3}))
    assert reproduce(place, *RACS_AND_ADAM) == 1
    assert "error: table2/adam_60m/s42 ended with exit code 3; the same command tries it again" in (
        capsys.readouterr().err
    )
    assert [call["experiment"] for call in calls(place)] == ["table2/adam_60m", "table2/racs_60m"]
    assert not (place / "results/runs/paper/table2/adam_60m").exists()
    (place / "crash.txt").unlink()
    assert reproduce(place, *RACS_AND_ADAM) == 0
    assert [call["experiment"] for call in calls(place)][2:] == ["table2/adam_60m"]


@pytest.mark.parametrize("code", [3, 1])  # of train.py, and of a launcher that started it
def test_a_run_that_diverged_is_recorded_and_not_run_again(place: Path, code: int) -> None:
    (place / "crash.txt").write_text(json.dumps({"table2/racs_60m": code}))
    (place / "trainer.py").write_text(
        TRAINER.replace(
            "if code:", 'if code:\n    (folder / "diverged.json").write_text(\'{"step": 7, "message": ""}\')'
        )
    )
    assert reproduce(place, *RACS_AND_ADAM) == 0
    assert (place / "results/runs/paper/table2/racs_60m/s42/diverged.json").is_file()
    before = len(calls(place))
    assert reproduce(place, *RACS_AND_ADAM) == 0 and len(calls(place)) == before == 2


def test_a_trainer_that_leaves_no_summary_has_failed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "trainer.py").write_text("")
    assert reproduce(place, "figure6") == 1
    assert capsys.readouterr().err.count("wrote no summary.json") == 2


def test_a_run_that_was_stopped_ends_the_command(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "crash.txt").write_text(json.dumps({"table2/adam_60m": 75}))
    assert reproduce(place, *RACS_AND_ADAM) == 75
    assert "the same command goes on" in capsys.readouterr().err and len(calls(place)) == 1


def test_sigterm_reaches_the_run(place: Path) -> None:
    (place / "crash.txt").write_text(json.dumps({"table2/adam_60m": "wait"}))
    code = (
        "import pathlib, signal, sys; from scripts import reproduce as r; signal.signal(signal.SIGTERM, r._terminate); "
        f"sys.exit(r.main({RACS_AND_ADAM!r}, root=pathlib.Path({str(place)!r}), trainer=[sys.executable, 'trainer.py']))"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        try:
            wait_for(place / "runs/paper/table2/adam_60m/s42/waiting", process)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 75
        finally:
            process.kill()
    assert (place / "runs/paper/table2/adam_60m/s42/saved").exists() and len(calls(place)) == 1


def wait_for(file: Path, process: subprocess.Popen[Any]) -> None:
    for _ in range(600):
        if file.exists():
            return
        assert process.poll() is None
        time.sleep(0.1)
    raise AssertionError(f"{file} never appeared")


def test_jobs_of_a_cluster_are_listed_and_collected(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = f"paths.runs={place / 'far away'}"
    assert reproduce(place, *RACS_AND_ADAM, elsewhere, "--list") == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [dict(word.split("=", 1) for word in line) for line in lines] == [
        {
            "experiment": f"table2/{name}", "seed": "42", "run_dir": f"{place}/far away/paper/table2/{name}/s42",
            "paths.runs": f"{place}/far away",
        }
        for name in ("adam_60m", "racs_60m")
    ]  # fmt: skip
    assert not calls(place)
    subprocess.run([sys.executable, "trainer.py", *lines[1]], cwd=place, check=True)  # one job ends
    assert reproduce(place, *RACS_AND_ADAM, elsewhere, "--collect") == 0
    assert "1 ended, 1 to do" in capsys.readouterr().out and len(calls(place)) == 1
    assert (place / "results/runs/paper/table2/racs_60m/s42/summary.json").is_file()
    assert not (place / "results/runs/paper/table2/adam_60m").exists() and not (place / "runs").exists()
    assert reproduce(place, *RACS_AND_ADAM, elsewhere, "--list") == 0
    assert capsys.readouterr().out == shlex.join(lines[0]) + "\n"
    monkeypatch.setenv("RUNS", str(place / "far away"))
    assert (
        reproduce(place, *RACS_AND_ADAM, "paths.runs=${oc.env:RUNS}", "--list") == 0
    )  # the same place by another name
    assert capsys.readouterr().out.split()[0] == "experiment=table2/adam_60m"
    assert reproduce(place, "table2", "--size", "60m", "--optimizers", "racs", "++" + elsewhere, "--list") == 0
    assert capsys.readouterr().out == ""


def test_settings_change_the_estimate_and_a_tag_the_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["table2", "--size", "60m", "--optimizers", "adam", "--tag", "short", "trainer.steps=100"]
    assert reproduce(place, *words, "--dry-run") == 0
    assert "missing   table2/adam_60m/s42-short  13.1M tokens" in capsys.readouterr().out
    assert reproduce(place, *words) == 0
    assert calls(place)[0]["run_dir"] == "runs/paper/table2/adam_60m/s42-short"
    assert calls(place)[0]["trainer.steps"] == "100"


def test_the_tables_are_refreshed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "scripts").mkdir()
    tables = place / "scripts" / "tables.py"
    tables.write_text("open('refreshed', 'w').close()")
    assert reproduce(place, "figure6") == 0 and (place / "refreshed").exists()
    tables.write_text("raise SystemExit(1)")
    assert reproduce(place, "figure6") == 1
    assert "error: the tables could not be refreshed" in capsys.readouterr().err


def test_the_launcher_comes_before_train_py(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "train.py").write_text(TRAINER)
    assert script.main(["figure6", "--launcher", f"{sys.executable} -B"], root=place) == 0
    assert (
        len(calls(place)) == 2 and f"$ {sys.executable} -B train.py experiment=table5/none" in capsys.readouterr().out
    )
    assert script.main(["figure6", "--launcher", "no-such-launcher --num_processes 8"], root=place) == 0  # all recorded
    assert script.main(["table4", "--launcher", "no-such-launcher"], root=place) == 1
    assert "error: [Errno 2]" in capsys.readouterr().err


def test_gpus_that_a_run_would_leave_idle_are_named(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "Each run uses one of 4 GPUs: for all of them, add --launcher 'torchrun --standalone --nproc_per_node=4'."
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert reproduce(place, "figure6", "--dry-run") == 0 and said in capsys.readouterr().out
    assert reproduce(place, "figure6", "--dry-run", "--launcher", "accelerate launch") == 0
    assert said not in capsys.readouterr().out
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    assert reproduce(place, "figure6", "--dry-run") == 0 and "GPUs" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing is asked for: choose from table2, table4, table5, figure5, figure6, all."),
        (["figure1"], "Figures 1 to 3 show runs of Table 2: ask for table2."),
        (["table3"], "table3 needs no training: scripts/tables.py makes it."),
        (["table7"], "there is no 'table7': choose from table2"),
        (["table2", "--size", "7b"], "there is no '7b': choose from 60m, 130m, 350m, 1b"),
        (["table2", "--optimizers", "soap"], "there is no 'soap': choose from adam"),
        (["table2", "--optimizers", ","], "nothing is named"),
        (["table4", "--size", "60m"], "table4 has no cell of these sizes and optimizers"),
        (["table2", "--seeds", "42,x"], "'42,x' is no list of seeds"),
        (["table2", "--seeds=-1"], "is no list of seeds"),
        (["table2", "--tag", "a/b"], "letters, digits"),
        (["table2", "--tokens-per-second", "0"], "not a number above 0"),
        (["table2", "--tokens-per-second", "60m=fast"], "not a number above 0"),
        (["table2", "--tokens-per-second", "90000"], "one --tokens-per-second for 60m, 130m, 350m, 1b"),
        (["table2", "--price-per-hour", "nan"], "not a number above 0"),
        (["table2", "loose"], "key=value"),
        (["table2", "run_dir=x"], "run_dir is what this command chooses"),
    ],
)
def test_mistakes_end_in_a_sentence(
    place: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        reproduce(place, *words, "--dry-run")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and message in said and "required" not in said


def test_settings_that_train_py_would_refuse_are_refused_first(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce(place, "figure6", "trainer.step=5") == 2
    assert "error: There is no setting 'trainer.step'. Did you mean 'trainer.steps'?" in capsys.readouterr().err
    assert reproduce(place, "figure6", "trainer.steps=0") == 2
    assert "trainer.steps must be" in capsys.readouterr().err and not calls(place)


def test_a_damaged_record_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    partial(place, "table5/none/s42", 5)
    (place / "runs/paper/table5/none/s42/config.yaml").write_text("a: [")
    assert reproduce(place, "figure6", "--dry-run") == 1
    assert "config.yaml is not valid YAML" in capsys.readouterr().err
