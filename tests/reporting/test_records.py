import math

import numpy as np
import pytest

from reporting import find_runs, load_run
from tests.reporting.synthetic import TOKENS_PER_STEP, write_run


def test_a_record_reads_back_as_written(tmp_path):
    run = load_run(write_run(tmp_path / "run", lr=0.02, adam_lr=0.005, perplexity=57.25, steps=40, eval_every=20))
    assert (run.optimizer, run.model, run.data, run.seed) == ("alice", "llama_tiny", "sample", 42)
    assert (run.lr, run.adam_lr, run.perplexity) == (0.02, 0.005, 57.25)
    assert run.train["step"].tolist() == list(range(1, 41))
    assert run.train["optimizer_ms"].tolist() == [21.5] * 40
    assert run.evals["perplexity"][-1] == pytest.approx(57.25)
    # The lines of the evaluation count validation tokens; what the run had trained on comes from the training lines.
    assert run.training_tokens(run.evals["step"]).tolist() == [20 * TOKENS_PER_STEP, 40 * TOKENS_PER_STEP]


def test_without_an_adam_rate_of_its_own_everything_has_the_matrix_rate(tmp_path):
    assert load_run(write_run(tmp_path / "run", "adam", lr=0.003, adam_lr=None)).adam_lr == 0.003


def test_a_last_line_cut_short_is_ignored(tmp_path):
    file = write_run(tmp_path / "run", steps=10, finished=False) / "metrics.jsonl"
    file.write_bytes(file.read_bytes() + b'{"kind": "train", "step": 11, "loss": 6.0, "gr')
    run = load_run(tmp_path / "run")
    assert run.train["step"][-1] == 10
    assert run.summary is None and math.isnan(run.perplexity)


@pytest.mark.parametrize(
    "bad", ['{"kind": "train", "step": 1, "lo', "[1, 2]", '{"step": 3}', '{"kind": "train", "step": null}']
)
def test_any_other_malformed_line_is_named(tmp_path, bad):
    file = write_run(tmp_path / "run", steps=10) / "metrics.jsonl"
    lines = file.read_text().splitlines()
    lines[4] = bad
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 5:"):
        load_run(tmp_path / "run")


def test_a_malformed_last_line_that_was_ended_is_no_crash(tmp_path):
    file = write_run(tmp_path / "run", steps=2) / "metrics.jsonl"
    file.write_text(file.read_text() + "nonsense\n")
    with pytest.raises(ValueError, match="line 4"):
        load_run(tmp_path / "run")


def test_steps_done_again_after_a_resume_count_once_with_their_last_values(tmp_path):
    file = write_run(tmp_path / "run", steps=3) / "metrics.jsonl"
    file.write_text(file.read_text() + '{"kind": "train", "step": 2, "loss": 1.25}\n')
    run = load_run(tmp_path / "run")
    assert run.train["step"].tolist() == [1, 2, 3]
    assert run.train["loss"][1] == 1.25
    assert np.isnan(run.train["grad_norm"][1])  # that line has none


def test_null_and_unknown_keys_are_tolerated(tmp_path):
    file = write_run(tmp_path / "run", steps=2) / "metrics.jsonl"
    file.write_text(
        '{"kind": "train", "step": 1, "loss": 2.0, "adam_lr": null, "rank_used": 8, "note": "x"}\n'
        '{"kind": "other", "step": 1}\n'
    )
    run = load_run(tmp_path / "run")
    assert np.isnan(run.train["adam_lr"][0])
    assert run.train["rank_used"].tolist() == [8.0]
    assert "note" not in run.train
    assert len(run.evals["step"]) == 0


@pytest.mark.parametrize("name", ["summary.json", "environment.json", "config.yaml"])
def test_a_malformed_file_is_named(tmp_path, name):
    (write_run(tmp_path / "run", steps=2) / name).write_text("{")
    with pytest.raises(ValueError, match=name):
        load_run(tmp_path / "run")


def test_a_folder_without_a_record_says_what_to_give(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.yaml"):
        load_run(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        find_runs(tmp_path / "absent")


def test_find_runs_finds_nested_records_and_nothing_else(tmp_path):
    write_run(tmp_path / "b", "racs", steps=2)
    write_run(tmp_path / "a" / "deep", "alice", steps=2)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("a: 1")
    assert [run.optimizer for run in find_runs(tmp_path)] == ["alice", "racs"]
    assert [run.optimizer for run in find_runs(tmp_path / "b")] == ["racs"]


def test_a_perplexity_that_is_not_finite_counts_as_diverged(tmp_path):
    assert load_run(write_run(tmp_path / "nan", steps=2, summary={"perplexity": math.nan})).perplexity == math.inf
    assert load_run(write_run(tmp_path / "stopped", steps=9, diverged=4)).perplexity == math.inf
