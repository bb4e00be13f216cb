"""The command: two runs in, a screen of text out, JSON if asked for, one sentence for what cannot be done."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import compare
from tests.reporting.synthetic import write_run

ROOT = Path(__file__).resolve().parents[2]
COMMAND = Path(compare.__file__)


@pytest.fixture
def runs(tmp_path):
    for name, perplexity in (("adam", 60.0), ("alice", 55.0)):
        for seed in (42, 43, 44):
            write_run(
                tmp_path / name / f"s{seed}", name, seed=seed, perplexity=perplexity + seed - 43, steps=20, eval_every=5
            )
    return [str(tmp_path / "adam"), str(tmp_path / "alice")]


def test_two_configurations(runs, capsys, tmp_path):
    assert compare.main([*runs, "--json", str(tmp_path / "difference.json")]) == 0
    printed = capsys.readouterr().out
    for words in (
        f"A  {runs[0]}",
        "Alice on llama_tiny",
        "optimizer.name",
        "B is better than A",
        "Cost",
        "peak memory",
    ):
        assert words in printed
    found = json.loads((tmp_path / "difference.json").read_text())
    assert found["result"]["verdict"] == "better"
    assert [row["step"] for row in found["curve"]["steps"]] == [5, 10, 15, 20]
    assert "Holm's correction" in found["result"]["rule"]


def test_the_first_is_the_reference(runs, capsys):
    assert compare.main(runs[::-1]) == 0
    assert "B is worse than A" in capsys.readouterr().out


def broken(folder):
    folder.mkdir()
    (folder / "config.yaml").write_text("optimizer: {name: adam}\n")
    (folder / "metrics.jsonl").write_text("not json\n{}\n")
    return str(folder)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: str(folder / "nowhere"), "There is no folder"),
        (lambda folder: str(folder), "holds runs of several configurations (optimizer.name: adam, alice)"),
        (lambda folder: broken(folder / "broken"), "metrics.jsonl, line 1: not a metrics line"),
        (lambda folder: str(folder / "adam/s42/config.yaml"), "There is no folder"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(runs, tmp_path, capsys, make, words):
    given = make(tmp_path)
    assert compare.main([runs[0], given]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert words in printed.err


def test_a_pattern_without_quotes_is_explained(runs, capsys):
    with pytest.raises(SystemExit) as end:
        compare.main([*runs, "another"])
    assert end.value.code == 2
    assert "two RUNs are compared, not 3: put quotes around a pattern" in capsys.readouterr().err


def test_a_file_that_cannot_be_written(runs, tmp_path, capsys):
    assert compare.main([*runs, "--json", str(tmp_path / "new/folder.json")]) == 0
    capsys.readouterr()
    (tmp_path / "file").write_text("")
    assert compare.main([*runs, "--json", str(tmp_path / "file/difference.json")]) == 1
    assert "that can be written" in capsys.readouterr().err


def test_as_a_command_from_another_folder(runs, tmp_path):
    done = subprocess.run(
        [sys.executable, str(COMMAND), "adam", "alice/s4*"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "Claim  B is better than A" in done.stdout


def test_committed_records_compare(capsys):
    folder = ROOT / "results/runs/compare"
    sides = [f"{folder}/adam-lr0.001-adam0.02-s*", f"{folder}/muon-lr0.02-adam0.02-s*"]
    assert compare.main(sides) == 0
    assert "B is better than A" in capsys.readouterr().out
