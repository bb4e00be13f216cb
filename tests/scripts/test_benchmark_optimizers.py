"""The benchmark of all optimizers, on a model of a few thousand weights. Nothing here depends on how fast anything is."""

import json
import statistics

import pytest

from optimizers.memory import state_bytes
from pretraining.model import build_model
from pretraining.plan import make_optimizer
from reporting import load_speed
from scripts import benchmark_optimizers as script

TINY = [
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=2",
    "data.length=16",
    "trainer.batch_size=2",
    "trainer.precision=fp32",
    "trainer.device=cpu",
]
RANK = ["optimizer.rank=8", "optimizer.leading=3"]
TIMES = {"step_ms", "refresh_ms", "other_ms"}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Methods without and with an interval, and one with curvature estimates: file, record."""
    out = tmp_path_factory.mktemp("speed") / "speed.json"
    assert script.main(["--only", "sgd,soap,sophia_h", "--steps", "2", "--warmup", "1", "--out", str(out), *TINY]) == 0
    return out, load_speed(out)


def stepper(folder, *overrides):
    return script.Stepper(*script.prepare("alice", [*TINY, *RANK, *overrides], folder))


def test_the_record_holds_every_step_of_both_rounds(measured):
    out, record = measured
    assert [line["optimizer"] for line in record["methods"]] == ["sgd", "soap", "sophia_h"]
    for line in record["methods"]:
        assert len(line["rounds"]) == script.ROUNDS and all(set(times) == TIMES for times in line["rounds"])
        assert [len(times["step_ms"]) for times in line["rounds"]] == [2, 2]
        refreshes = [len(times["refresh_ms"]) for times in line["rounds"]]
        assert refreshes == ([0, 0] if line["optimizer"] == "sgd" else [2, 2])
        assert all(len(t["other_ms"]) == len(t["step_ms"]) + len(t["refresh_ms"]) for t in line["rounds"])
    assert [line["interval"] for line in record["methods"]] == [1, 10, 10]
    assert record["settings"]["tokens_per_step"] == 2 * 16
    assert record["environment"]["command"].startswith("python scripts/benchmark_optimizers.py --only sgd,soap")
    assert record["environment"]["versions"]["torch"] and record["environment"]["hardware"]["threads"]
    assert len(out.read_text().splitlines()) < 20  # a line for each method


def test_a_refresh_counts_with_its_share_of_the_steps():
    rounds = [script.Times([10.0, 12.0], [100.0], [50.0] * 3), script.Times([14.0], [120.0], [70.0, 50.0])]
    line = script.summarize("soap", rounds, 4096, 10, {"matrix_state_bytes": 8})
    assert (line["step_ms"], line["refresh_ms"], line["forward_backward_ms"]) == (12.0, 110.0, 50.0)
    assert line["optimizer_ms"] == pytest.approx(statistics.fmean([12.0] * 9 + [110.0]))
    assert line["tokens_per_second"] == pytest.approx(4096 / (0.050 + line["optimizer_ms"] / 1000))
    assert line["matrix_state_bytes"] == 8


def test_state_bytes_are_those_of_the_formulas(measured, tmp_path):
    for line in measured[1]["methods"]:
        cfg, _ = script.prepare(line["optimizer"], TINY, tmp_path)
        optimizer = make_optimizer(cfg, build_model(cfg.model, device="meta"))
        matrices, others = state_bytes(optimizer)
        assert (line["matrix_state_bytes"], line["other_state_bytes"]) == (matrices, others)
        assert others > 0


def test_steps_are_told_apart_by_the_methods_own_update_times(tmp_path):
    one = stepper(tmp_path, "optimizer.update_interval=4", "optimizer.update_times=printed")
    batches, times = one.batches(2), script.Times()
    marks = []
    for t in range(1, 9):
        before = len(times.refresh_ms)
        one.step(batches[t % 2], times)
        marks.append(len(times.refresh_ms) > before)
    assert [t for t, refreshed in enumerate(marks, start=1) if refreshed] == [1, 4, 8]


@pytest.mark.parametrize(("rule", "t"), [("printed", 8), ("zero_based", 9)])
def test_skipping_leads_to_a_real_refresh(tmp_path, rule, t):
    one = stepper(tmp_path, "optimizer.update_interval=8", f"optimizer.update_times={rule}")
    batches = one.batches(3)
    one.step(batches[0], script.Times())
    one.step(batches[1], script.Times())
    p = one.group["params"][0]
    basis = one.optimizer.state[p]["U"].clone()
    one.skip_to_refresh()
    times = script.Times()
    one.step(batches[2], times)
    assert len(times.refresh_ms) == 1 and not times.step_ms
    assert one.optimizer.state[p]["step"] == t
    assert not basis.equal(one.optimizer.state[p]["U"])


def test_figures_of_two_sessions_are_not_mixed(measured, capsys, monkeypatch):
    monkeypatch.setattr(script, "measure", lambda *_: pytest.fail("measured"))
    out, _ = measured
    before = out.read_bytes()
    assert script.main(["--only", "adam", "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "holds 3 methods that would not be measured now" in said
    assert len(said.splitlines()) == 1 and out.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--only", "sgdd"], "There is no optimizer=sgdd"),
        (["--only", "sgd", "model.hidden=3"], "There is no setting 'model.hidden'"),
        (["--only", "alice", "optimizer.rank=0"], "rank"),
    ],
)
def test_mistakes_end_in_one_sentence_and_leave_no_file(tmp_path, capsys, words, sentence):
    out = tmp_path / "speed.json"
    assert script.main([*words, "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and sentence in said and len(said.splitlines()) == 1
    assert not out.exists()


@pytest.mark.parametrize("content", [{"mine": 1}, {"methods": ["adam"]}, [1]])
def test_another_file_or_folder_is_not_overwritten(content, tmp_path, capsys):
    out = tmp_path / "speed.json"
    out.write_text(json.dumps(content))
    assert script.main(["--only", "sgd", "--out", str(out)]) == 2
    assert "not a record of this benchmark" in capsys.readouterr().err
    assert json.loads(out.read_text()) == content
    assert script.main(["--only", "sgd", "--out", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
