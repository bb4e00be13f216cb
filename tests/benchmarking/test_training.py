"""The training benchmark: the loops do the same work, turns are timed as said, and what is not equal is reported.

Nothing here depends on how fast anything is. Loops run in this process; processes are stubs.
"""

import argparse
import json
import sys

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from benchmarking import loops, training
from data import load_tokenizer
from data.errors import UserError

STEPS = 4
TINY = [
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=2",
]


def arguments(*words):
    parser = argparse.ArgumentParser()
    training.add_arguments(parser)
    asked = parser.parse_args(words)
    asked.words = list(words)
    return asked


def job(tmp_path, *words):
    """Settings of a benchmark of four tiny steps, and its contestants by name."""
    fixed = ("--precision", "fp32", "--rounds", "2", "--steps", "1", "--settle", "1", "--rows", "4", "--length", "16")
    asked = arguments(*fixed, "--micro", "2", "--shared", *TINY, *words)
    training.check(asked)
    shared, _ = training.shared_settings(asked, tmp_path)
    return asked, shared, {one.name: one for one in training.contestants(asked)}


def play(tmp_path, shared, contestant):
    """All answers of a contestant that gets two turns."""
    turns = iter([{"settle": 1, "steps": 1}] * 2)
    sent = []
    overrides = [*shared, *training.own_settings(contestant, tmp_path)]
    spec = {"loop": contestant.loop, "overrides": overrides, "share": True}
    AcceleratorState._reset_state(True)  # one for the process, which a contestant has to itself
    loops.serve(spec, lambda: next(turns, None), sent.append)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()  # or later optimizers that accelerate wraps would not step
    return sent


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loops")
    _, shared, people = job(folder)
    return {name: play(folder, shared, one) for name, one in people.items()}


def test_all_loops_train_the_same_model_on_the_same_rows(played):
    assert set(played) == {"transformers", "galore_style", "ours_adam"}
    end = {name: sent[-1]["end"] for name, sent in played.items()}
    ready = {name: sent[0]["ready"] for name, sent in played.items()}
    ours = end["ours_adam"]["losses"]
    assert len(ours) == STEPS and len({round(loss, 4) for loss in ours}) == STEPS  # it learns, on other rows each time
    for name in ("transformers", "galore_style"):
        assert end[name]["losses"] == pytest.approx(ours, rel=1e-5)
        assert ready[name] == ready["ours_adam"]
        assert end[name]["tokens_per_step"] == end["ours_adam"]["tokens_per_step"] == 4 * 16
    assert end["ours_adam"]["optimizer_ms"] > 0
    assert ready["ours_adam"]["rows_per_pass"] == 2 and ready["ours_adam"]["attention"] == "eager"
    assert ready["ours_adam"]["dtype"] == "float32" and ready["ours_adam"]["autocast"] is None


def test_a_loop_answers_for_every_turn(played):
    for sent in played.values():
        assert [next(iter(message)) for message in sent] == ["ready", "seconds", "seconds", "end"]
        assert all(message["steps"] == 1 and message["seconds"] > 0 for message in sent[1:3])


@pytest.mark.parametrize("precision", ["bf16", "bf16_mixed"])
def test_the_precision_is_the_same_for_all(tmp_path, precision):
    _, shared, people = job(tmp_path, "--precision", precision)
    sent = {name: play(tmp_path, shared, one) for name, one in people.items()}
    ready = [messages[0]["ready"] for messages in sent.values()]
    assert ready[0] == ready[1] == ready[2]
    assert ready[0]["dtype"] == ("bfloat16" if precision == "bf16" else "float32")
    ours = sent["ours_adam"][-1]["end"]["losses"]
    for messages in sent.values():
        assert training.distance(ours, messages[-1]["end"]["losses"]) <= training.TOLERANCE[precision]


def test_a_loop_that_cannot_start_says_why(tmp_path):
    _, shared, people = job(tmp_path, "--variant", "odd:trainer.colour=red")
    (message,) = play(tmp_path, shared, people["ours_odd"])
    assert "trainer.colour" in message["error"]


def test_rows_that_do_not_divide_are_refused(tmp_path):
    _, shared, people = job(tmp_path, "--rows", "3")
    (message,) = play(tmp_path, shared, people["transformers"])
    assert "3 rows do not divide into passes of 2" in message["error"]


def test_steps_that_settle_are_not_timed(monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(loops.time, "perf_counter", lambda: float(next(clock)))
    given, answers = iter([{"settle": 2, "steps": 3}, {"settle": 0, "steps": 1}]), []
    turns = loops.Turns(torch.device("cpu"), lambda: next(given, None), answers.append)
    begun = 0
    with pytest.raises(loops.Ended):
        while True:
            turns.begin()
            begun += 1
    assert begun == 2 + 3 + 1
    # One look at the clock when the first timed step begins, one when the step after the last would begin.
    assert answers == [{"seconds": 10.0, "steps": 3}, {"seconds": 10.0, "steps": 1}]


def test_the_enlarged_tokenizer_encodes_as_the_embedded_one(tmp_path):
    large = load_tokenizer(str(training.enlarged_tokenizer(32_000, tmp_path)))
    small = load_tokenizer("sample_4k")
    texts = ["A quick look at <unused_5000>, and naïve prices: 5 €.", ""]
    assert large.vocab_size == 32_000
    assert large.encode(texts) == small.encode(texts)
    assert (large.eos_id, large.pad_id) == (small.eos_id, small.pad_id)


def test_models_of_a_large_vocabulary_need_no_network(tmp_path):
    asked = arguments("--model", "llama_60m")
    shared, plan = training.shared_settings(asked, tmp_path)
    assert plan.parameters == 58_073_600
    assert any(word.startswith("tokenizer=") for word in shared)


# Processes ----------------------------------------------------------------------------------------------------------

STUB = """
import json, sys
spec = json.loads(sys.stdin.readline())
name = next(word for word in spec["overrides"] if word.startswith("run_dir=")).rpartition("/")[2].strip("'")
say = lambda message: print(json.dumps(message), flush=True)
if "galore" in name:
    print("no room left", file=sys.stderr)
    sys.exit(7)
say({"ready": {"parameters_updated": 5, "attention": "sdpa" if "racs" in name else "eager"}})
seconds = iter([9.0, 2.0, 4.0] if name == "transformers" else [9.0, 1.0, 4.0])
for line in sys.stdin:
    turn = json.loads(line)
    say({"seconds": turn["steps"] * next(seconds), "steps": turn["steps"]})
say({"end": {"losses": [3.0, 2.0], "tokens_per_step": 64, "peak_memory_bytes": 1, "peak_memory_kind": "stub"}})
"""


@pytest.fixture
def record(tmp_path, monkeypatch, capfd):
    """Of a run with stubs, two that work and one that ends at once: exit code, record, what stood on stderr."""
    monkeypatch.setattr(training, "COMMAND", (sys.executable, "-c", STUB))
    out = tmp_path / "record.json"
    asked = arguments(
        "--precision", "fp32", "--rounds", "3", "--steps", "2", "--rows", "2", "--length", "32", "--methods", "adam,racs",
        "--out", str(out), "--shared", *TINY,
    )  # fmt: skip
    code = training.run(asked)
    return code, json.loads(out.read_text()), capfd.readouterr().err


def test_the_first_round_does_not_count_and_ratios_are_taken_within_rounds(record):
    code, found, _ = record
    assert code == 0 and found["kind"] == "training" and found["unfair"] == []
    lines = {line["name"]: line for line in found["contestants"]}
    assert lines["transformers"]["step_ms"] == [2000.0, 4000.0]
    assert lines["ours_adam"]["ratios"] == [2.0, 1.0] and lines["ours_adam"]["ratio_to_transformers"] == 1.5
    assert lines["ours_adam"]["tokens_per_second"] == 64 * (1 / 1 + 1 / 4) / 2
    assert found["settings"]["rounds"] == 2 and found["settings"]["tokens_per_step"] == 64


def test_a_contestant_that_ends_does_not_stop_the_others(record):
    _, found, said = record
    failed = next(line for line in found["contestants"] if line["name"] == "galore_style")
    assert failed["error"] == "its process ended with exit code 7" and failed["tokens_per_second"] is None
    assert "no room left" in said


def test_the_record_names_no_folder_of_this_machine(record, tmp_path):
    assert str(tmp_path) not in json.dumps(record[1])


def test_a_shorter_session_does_not_replace_a_longer_one(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "COMMAND", (sys.executable, "-c", STUB))
    words = [
        "--precision",
        "fp32",
        "--rows",
        "2",
        "--length",
        "32",
        "--out",
        str(tmp_path / "r.json"),
        "--shared",
        *TINY,
    ]
    assert training.run(arguments("--rounds", "2", "--rivals", "transformers", *words)) == 0
    with pytest.raises(UserError, match="would not be measured now"):
        training.run(arguments("--rounds", "2", "--rivals", "none", *words))


def test_an_interrupted_session_leaves_its_rounds_and_no_older_record_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "COMMAND", (sys.executable, "-c", STUB))
    hear = training.Contestant.hear

    def interrupted(one):
        if len(one.seconds_per_step) == 2:
            raise KeyboardInterrupt
        return hear(one)

    out = tmp_path / "r.json"
    words = ["--rounds", "3", "--rivals", "transformers", "--precision", "fp32", "--rows", "2", "--length", "32"]
    asked = arguments(*words, "--out", str(out), "--shared", *TINY)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.Contestant, "hear", interrupted)
        training.run(asked)
    found = json.loads(out.read_text())
    assert found["unfair"] == ["stopped after 1 of 2 rounds, losses were not compared"]
    assert found["settings"]["rounds"] == 1 and [len(line["step_ms"]) for line in found["contestants"]] == [1, 1]
    assert training.run(asked) == 0
    whole = out.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.Contestant, "hear", interrupted)
        training.run(asked)
    assert out.read_bytes() == whole


# What is equal ------------------------------------------------------------------------------------------------------


def line(name, loop, losses=(3.0, 2.0), settings=(), **facts):
    equal = {key: 1 for key in training.EQUAL}
    return {"name": name, "loop": loop, "method": "adam", "settings": list(settings), "losses": list(losses),
            "error": None, **equal, **facts}  # fmt: skip


def test_what_is_not_equal_is_said():
    ours = line("ours_adam", "ours")
    assert training.unfairness([ours, line("transformers", "transformers")], "fp32") == []
    (said,) = training.unfairness([ours, line("transformers", "transformers", attention="eager")], "fp32")
    assert "attention is 1 for our trainer and eager for transformers" in said
    (said,) = training.unfairness([ours, line("galore_style", "galore_style", losses=[3.0, 2.1])], "fp32")
    assert "losses" in said


def test_a_variant_may_differ_in_its_settings_but_not_in_its_losses():
    ours = line("ours_adam", "ours")
    variant = line("ours_small", "ours", settings=["trainer.micro_batch_size=1"], rows_per_pass=2)
    assert training.unfairness([ours, variant], "fp32") == []
    assert training.unfairness([ours, {**variant, "losses": [3.0, 2.1]}], "fp32")


@pytest.mark.parametrize("losses", [[], [float("nan"), 2.0], [3.0, float("nan")]])
def test_losses_that_are_missing_or_not_finite_do_not_agree(losses):
    assert training.unfairness([line("ours_adam", "ours"), line("t", "transformers", losses)], "bf16")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rivals", "megatron"], "there is no rival megatron"),
        (["--variant", "trainer.compile=true"], "write it as name:key=value"),
        (["--variant", "adam:trainer.compile=true"], "two contestants are called ours_adam"),
        (["--rounds", "1"], "--rounds must be at least 2"),
        (["--rivals", "none", "--methods", ""], "there is nobody to measure"),
    ],
)
def test_what_cannot_work_is_refused(words, message):
    with pytest.raises(UserError, match=message):
        asked = arguments(*words)
        training.check(asked)
        training.contestants(asked)


def test_variants_are_our_trainer_with_settings_of_their_own():
    people = training.contestants(
        arguments(
            "--ours", "trainer.log_every=5", "--variant", "a:optimizer=racs,trainer.compile=true", "--rivals", "none"
        )
    )
    assert [(one.name, one.method, one.overrides) for one in people] == [
        ("ours_adam", "adam", ["trainer.log_every=5"]),
        ("ours_a", "racs", ["trainer.log_every=5", "trainer.compile=true"]),
    ]


def test_all_contestants_get_one_environment(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    found = training.process_environment(arguments("--malloc", "--threads", "2", "--device", "cuda"))
    assert found["CUDA_VISIBLE_DEVICES"] == "3" and found["OMP_NUM_THREADS"] == "2"
    assert "glibc.malloc" in found["GLIBC_TUNABLES"]
    assert "GLIBC_TUNABLES" not in training.process_environment(arguments())
