"""The benchmark of the loader, on the embedded sample. Nothing here depends on how fast anything is."""

import json

import pytest

from scripts import benchmark_data as script

SMALL = ["--rows", "pack", "--steps", "3", "--tokens-per-second", "1e9"]


@pytest.mark.parametrize("work", ["sleep", "compute"])
def test_every_repeat_of_every_case_is_in_the_record(tmp_path, capsys, work):
    out = tmp_path / "data.json"
    words = [*SMALL, "--workers", "0", "--ranks", "2", "--repeats", "2", "--work", work, "--json", str(out)]
    assert script.main(words) == 0
    record = json.loads(out.read_text())
    (case,) = record["cases"]
    assert (case["source"], case["rows"], case["workers"], case["error"]) == ("sample", "pack", 0, None)
    for figure in ("first_step_seconds", "rows_per_second", "tokens_per_second", "wait_share"):
        assert len(case[figure]) == 2 and min(case[figure]) > 0
    assert max(case["wait_share"]) < 1
    assert case["tokens_per_second"] == pytest.approx([256 * rate for rate in case["rows_per_second"]])
    assert record["environment"]["hardware"]["cpu"] and record["environment"]["versions"]["sentencepiece"]
    assert str(tmp_path) not in out.read_text()  # a record leaves this machine
    assert record["environment"]["command"].endswith("--json data.json")
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_mistakes_end_in_sentences(tmp_path, capsys):
    assert script.main(["--data", "c4_local", "--path", str(tmp_path), *SMALL]) == 2
    assert "error: No file named c4-train" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.main(["--steps", "0"])


def test_folders_stay_out_of_the_command():
    words = ["--path", "/far/away", "--tokenizer=/far/t5.model", "--data", "c4_local"]
    assert script.command(words) == (
        "python scripts/benchmark_data.py --path away --tokenizer=t5.model --data c4_local"
    )
