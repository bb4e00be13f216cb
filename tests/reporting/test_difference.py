"""Two sides from synthetic records: what is found, and what is left unsaid where it would mislead."""

import copy
import json
import math

import pytest
import yaml

from reporting.difference import difference
from reporting.difference_text import WIDTH, difference_text
from reporting.sides import load_side
from tests.reporting.synthetic import write_run

TEXT = {"train": {"name": "sample", "files": 4, "path": "texts"}, "validation": {"name": "sample", "path": "texts"}}


def write(folder, config=None, environment=None, **options):
    """A record with both texts; `config` and `environment` change values by dotted names, None removes one."""
    write_run(folder, **options)
    for name, changes, reader, writer in (
        ("config.yaml", config, yaml.safe_load, yaml.safe_dump),
        ("environment.json", {"data": copy.deepcopy(TEXT)} | (environment or {}), json.loads, json.dumps),
    ):
        file = folder / name
        tree = reader(file.read_text())
        for key, value in (changes or {}).items():
            *groups, last = key.split(".")
            place = tree
            for group in groups:
                place = place.setdefault(group, {})
            place[last] = value
        file.write_text(writer(tree))
    return folder


def write_seeds(folder, perplexities, **options):
    for i, perplexity in enumerate(perplexities):
        write(folder / f"s{42 + i}", seed=42 + i, perplexity=perplexity, **options)
    return folder


def compare(a, b):
    """What was found, after a round trip through strict JSON, and the text."""
    found = difference(load_side(str(a)), load_side(str(b)))
    json.dumps(found, allow_nan=False)
    return found, difference_text(found)


def noted(found, words):
    return any(words in note for note in found["warnings"])


def test_a_side_is_a_folder_of_seeds_a_pattern_or_a_list(tmp_path):
    write_seeds(tmp_path / "a", [60, 61, 62])
    for given in (tmp_path / "a", f"{tmp_path}/a/s4*", f"{tmp_path}/a/s43,{tmp_path}/a/s42, {tmp_path}/a/s44"):
        assert [run.seed for run in load_side(str(given)).runs] == [42, 43, 44]
    assert [run.seed for run in load_side(f"{tmp_path}/a/s43,{tmp_path}/a/s4*3").runs] == [43]  # named twice, one run


def test_what_is_not_a_side_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*nowhere: give"):
        load_side(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*x-s"):
        load_side(f"{tmp_path}/x-s*")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no run record: give the folder"):
        load_side(str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match="holds no run record"):
        load_side(",")
    write(tmp_path / "grid/one", lr=0.02)
    write(tmp_path / "grid/two", lr=0.05, seed=43)
    with pytest.raises(ValueError, match=r"several configurations \(optimizer\.lr: 0\.02, 0\.05\)"):
        load_side(str(tmp_path / "grid"))


def test_a_setting_of_a_newer_version_does_not_split_the_seeds(tmp_path):
    write(tmp_path / "a/s42", seed=42)
    write(tmp_path / "a/s43", {"data.attention": "row"}, seed=43)
    assert len(load_side(str(tmp_path / "a")).runs) == 2


def test_seeds_of_parts_that_follow_the_runs_seed_do_not_split_the_seeds(tmp_path):
    for seed in (42, 43):
        write(tmp_path / f"a/s{seed}", {"data.seed": seed, "optimizer.seed": seed}, seed=seed)
        write(tmp_path / f"b/s{seed}", {"data.seed": seed, "optimizer.seed": 0}, seed=seed)
    found, _ = compare(tmp_path / "a", tmp_path / "b")
    assert found["configuration"] == [{"key": "optimizer.seed", "b": 0}]
    write(tmp_path / "a/another", {"data.seed": 44, "optimizer.seed": 7}, seed=44)
    write(tmp_path / "a/one_more", {"data.seed": 45, "optimizer.seed": 8}, seed=45)
    with pytest.raises(ValueError, match=r"several configurations \(optimizer\.seed: 7, 8\)"):
        load_side(f"{tmp_path}/a/another,{tmp_path}/a/one_more")


def test_only_settings_that_say_something_are_shown(tmp_path):
    write(
        tmp_path / "a", {"run_dir": "x", "data.path": "p", "paths.runs": "r", "trainer.log_every": 1, "data.seed": 42}
    )
    write(
        tmp_path / "b",
        {"run_dir": "y", "data.path": "q", "paths.runs": "s", "trainer.log_every": 9, "data.seed": 43}
        | {"optimizer.lr": 0.05, "optimizer.betas": [0.9, 0.99], "optimizer.tracking": False, "trainer.grad_clip": 1},
        seed=43,
    )
    found, text = compare(tmp_path / "a", tmp_path / "b")
    assert found["configuration"] == [
        {"key": "optimizer.betas", "a": [0.9, 0.9, 0.999], "b": [0.9, 0.99]},
        {"key": "optimizer.lr", "a": 0.02, "b": 0.05},
        {"key": "optimizer.tracking", "b": False},
        {"key": "trainer.grad_clip", "a": None, "b": 1},
    ]
    assert "only B has  optimizer.tracking=false" in text
    [line] = [line for line in text.splitlines() if "grad_clip" in line]
    assert line.split() == ["trainer.grad_clip", "null", "1"]


def test_values_of_other_types_but_the_same_number_are_equal(tmp_path):
    write(tmp_path / "a", {"optimizer.lr": 1, "optimizer.eps": 0.12345678})
    write(tmp_path / "b", {"optimizer.lr": 1.0, "optimizer.eps": 0.12345679})
    found, _ = compare(tmp_path / "a", tmp_path / "b")
    assert [row["key"] for row in found["configuration"]] == ["optimizer.eps"]


def test_the_environment_and_its_resumed_parts(tmp_path):
    write(tmp_path / "a")
    resumed = [{"step": 5, "commit": "beef" * 10, "versions": {"torch": "2.14.0"}}]
    write(tmp_path / "b", environment={"resumed": resumed, "hardware.threads": 1, "precision": "fp32"})
    found, text = compare(tmp_path / "a", tmp_path / "b")
    rows = {row["key"]: (row["a"], row["b"]) for row in found["environment"]}
    assert rows == {
        "commit": (["4f81fa7c0ffee"], ["4f81fa7c0ffee", "beef" * 10]),
        "versions.torch": (["2.13.0"], ["2.13.0", "2.14.0"]),
        "hardware.threads": (["2"], ["1"]),
        "precision": ([], ["fp32"]),
    }
    assert "4f81fa7c0f | beefbeefbe" in text
    assert noted(found, "The hardware differs (threads): do not compare speeds or memory.")


def test_a_difference_with_seeds_has_the_test_of_its_losses(tmp_path):
    a = write_seeds(tmp_path / "a", [60.0, 61.0, 60.5], optimizer="adam")
    b = write_seeds(tmp_path / "b", [55.0, 54.0, 54.5])
    found, text = compare(a, b)
    result = found["result"]
    assert result["loss"]["a"]["mean"] == pytest.approx(sum(map(math.log, (60.0, 61.0, 60.5))) / 3)
    assert result["perplexity"]["b"] == {"mean": pytest.approx(54.5), "deviation": pytest.approx(0.5), "seeds": 3}
    assert result["difference_of_losses"] == pytest.approx(result["loss"]["b"]["mean"] - result["loss"]["a"]["mean"])
    assert result["interval"][0] < result["difference_of_losses"] < result["interval"][1] < 0
    assert result["verdict"] == "better"
    assert "Claim  B is better than A: Welch's two-sided p " in text
    assert compare(b, a)[0]["result"]["verdict"] == "worse"
    assert "validation perplexity 60.50 ± 0.5 54.50 ± 0.5 -6.00" in " ".join(text.split())


def test_seeds_that_overlap_give_no_claim(tmp_path):
    a, b = write_seeds(tmp_path / "a", [60.0, 63.0, 61.5]), write_seeds(tmp_path / "b", [61.0, 59.0, 62.5])
    found, text = compare(a, b)
    assert found["result"]["p"] > 0.05
    assert found["result"]["verdict"] is None
    assert "Claim  none, p is not below 0.05" in text


def test_one_seed_gives_no_claim(tmp_path):
    found, text = compare(write(tmp_path / "a", perplexity=60.0), write(tmp_path / "b", perplexity=30.0))
    assert (found["result"]["p"], found["result"]["verdict"]) == (None, None)
    assert "Claim  none, one seed: no spread known." in text
    assert found["result"]["difference_of_losses"] == pytest.approx(math.log(0.5))


def test_a_side_against_itself_claims_nothing(tmp_path):
    a = write_seeds(tmp_path / "a", [60.0, 61.0])
    found, text = compare(a, a)
    assert found["configuration"] == found["environment"] == []
    assert found["result"]["verdict"] is None
    assert "Claim  none, both sides contain the same run." in text
    assert {row["ahead"] for row in found["curve"]["steps"]} == {"equal"}


def test_repeats_of_a_seed_count_once(tmp_path):
    write(tmp_path / "a/one", seed=42, perplexity=60.0)
    write(tmp_path / "a/two", seed=42, perplexity=61.0)
    found, _ = compare(tmp_path / "a", write(tmp_path / "b"))
    assert found["result"]["loss"]["a"]["seeds"] == 1
    assert noted(found, "A: several runs of seed 42: repeats of one draw")


@pytest.mark.parametrize(
    ("config", "environment", "more", "what"),
    [
        ({}, {"data.validation": {"name": "other"}}, {}, "text"),
        ({}, {"tokenizer.fingerprint": "another"}, {}, "tokenizer"),
        ({"data.rows": "pack"}, {}, {}, "data.rows"),
        ({"data.validation_max_tokens": 9}, {}, {}, "data.validation_max_tokens"),
        ({}, {}, {"summary": {"validation_tokens": 9}}, "number of tokens"),
    ],
)
def test_other_validation_sets_are_not_compared(tmp_path, config, environment, more, what):
    write(tmp_path / "a", {"data.validation_max_tokens": None})
    write(tmp_path / "b", {"data.validation_max_tokens": None} | config, environment, perplexity=30.0, **more)
    found, text = compare(tmp_path / "a", tmp_path / "b")
    assert found["data"]["validation"] == [what]
    assert noted(found, f"The validation sets differ ({what}): the perplexities are not comparable.")
    assert found["result"]["difference_of_losses"] is None
    assert found["curve"]["speedup_of_b"] is None
    assert {row["ahead"] for row in found["curve"]["steps"]} == {None}
    assert "Claim  none, the validation sets differ." in text
    assert "reaches" not in text


def test_a_moved_or_prepared_copy_is_the_same_text(tmp_path):
    write(tmp_path / "a")
    moved = {split: part | {"path": "elsewhere", "prepared": "f00", "max_tokens": 256} for split, part in TEXT.items()}
    write(tmp_path / "b", environment={"data": moved})
    assert compare(tmp_path / "a", tmp_path / "b")[0]["data"] == {"known": True, "training": [], "validation": []}


def test_other_training_text_is_noted_and_compared(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b", environment={"data.train": {"name": "c4"}})
    found, _ = compare(tmp_path / "a", tmp_path / "b")
    assert noted(found, "The training data differ (text).")
    assert found["result"]["difference_of_losses"] is not None


def test_an_unrecorded_text_is_not_called_the_same(tmp_path):
    write(tmp_path / "a")
    (write(tmp_path / "b") / "environment.json").unlink()
    found, text = compare(tmp_path / "a", tmp_path / "b")
    assert noted(found, "One side has not recorded which text it read")
    assert "the same" not in next(line for line in text.splitlines() if line.startswith("Data"))


def test_the_speedup_follows_the_papers_definition(tmp_path):
    """300 steps over the first evaluation, every 20, at or under A's final perplexity."""
    a = load_side(str(write(tmp_path / "a", perplexity=60.0, eval_every=20)))
    b = load_side(str(write(tmp_path / "b", perplexity=50.0, eval_every=20)))
    evals = b.runs[0].evals
    first = next(step for step, ppl in zip(evals["step"], evals["perplexity"], strict=True) if ppl <= 60.0)
    speed = difference(a, b)["curve"]["speedup_of_b"]
    assert 0 < first < 300
    assert speed == {
        "target": pytest.approx(60.0),
        "of": 300,
        "step": first,
        "in_steps": pytest.approx(300 / first),
        "in_tokens": pytest.approx(300 / first),
        "evaluated_every": 20,
    }
    assert difference(a, b)["curve"]["speedup_of_a"]["step"] is None
    assert "A never reaches B's final perplexity 50.00." in difference_text(difference(a, b))


def test_equal_curves_reach_each_other_at_the_end(tmp_path):
    for name in "ab":
        write(tmp_path / name, perplexity=57.3)
    found, text = compare(tmp_path / "a", tmp_path / "b")
    assert found["curve"]["speedup_of_b"]["in_steps"] == 1
    assert "B reaches A's final perplexity 57.30 by step 300 of A's 300: 1.00 times as fast in steps" in text


def test_curves_are_the_mean_over_seeds_at_common_steps(tmp_path):
    a = write_seeds(tmp_path / "a", [60.0, 64.0], eval_every=50)
    b = write_seeds(tmp_path / "b", [50.0], eval_every=100)
    rows = compare(a, b)[0]["curve"]["steps"]
    assert [row["step"] for row in rows] == [100, 200, 300]
    assert rows[-1]["a"] == pytest.approx(math.log(math.sqrt(60.0 * 64.0)))
    assert rows[-1]["ahead"] == "b"
    assert rows[-1]["tokens_a"] == rows[-1]["tokens_b"] == 300 * 4096


def halve_the_batch(folder):
    """Half the tokens a step."""
    file = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        if line["kind"] == "train":
            line["tokens"] //= 2
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_another_batch_is_compared_at_equal_tokens_too(tmp_path):
    a = write(tmp_path / "a", perplexity=60.0)
    b = halve_the_batch(write(tmp_path / "b", perplexity=58.0, summary={"tokens": 300 * 2048}))
    found, text = compare(a, b)
    assert {row["ahead"] for row in found["curve"]["steps"]} == {"b"}
    rows = found["curve"]["tokens"]
    assert [row["tokens"] for row in rows] == [4096 * step for step in (50, 100, 150)]
    assert rows[-1]["b"] == pytest.approx(math.log(58.0))  # B's end
    assert "Perplexity at tokens" in text
    speed = found["curve"]["speedup_of_b"]
    assert speed["in_tokens"] == pytest.approx(2 * speed["in_steps"])
    assert noted(found, "different numbers of training tokens (A 1,228,800, B 614,400)")


def test_runs_that_have_not_ended_or_diverged_say_so(tmp_path):
    write(tmp_path / "a/s42", seed=42, perplexity=60.0)
    write(tmp_path / "a/s43", seed=43, finished=False)
    write(tmp_path / "b/s42", seed=42, diverged=120)
    write(tmp_path / "b/s43", seed=43, perplexity=55.0)
    found, text = compare(tmp_path / "a", tmp_path / "b")
    assert noted(found, "A: seed 43 has not ended (at step 300 of 300); it is not in the result.")
    assert noted(found, "B: seed 43 diverged at step 120.") is False
    assert noted(found, "B: seed 42 diverged at step 120.")
    assert found["result"]["loss"]["a"] == {"mean": pytest.approx(math.log(60.0)), "deviation": None, "seeds": 1}
    assert found["result"]["verdict"] is None
    assert "1 of 2 diverged" in text
    assert [run["state"] for run in found["b"]["runs"]] == ["diverged", "ended"]


@pytest.mark.parametrize("end", [{"finished": False}, {"diverged": 7}])
def test_single_runs_without_an_end(tmp_path, end):
    a, b = write(tmp_path / "a", **end), write(tmp_path / "b", perplexity=50.0)
    for first, second in ((a, b), (b, a), (a, write(tmp_path / "c", **end))):
        found, text = compare(first, second)
        assert found["result"]["difference_of_losses"] is None
        assert ("not ended" if "finished" in end else "diverged") in text
    assert compare(a, b)[0]["curve"]["speedup_of_b"] is None  # no final perplexity to reach


def test_a_run_that_has_only_begun(tmp_path):
    a = write(tmp_path / "a", finished=False)
    for name in ("metrics.jsonl", "environment.json"):
        (a / name).write_text("" if name == "metrics.jsonl" else "{}")
    found, text = compare(a, write(tmp_path / "b"))
    assert found["curve"]["steps"] == []
    assert "no evaluation at the same step" in text
    assert noted(found, "A: seed 42 has not ended; it is not in the result.")


def test_costs_are_medians_and_ratios(tmp_path):
    for seed, speed in ((42, 100.0), (43, 130.0), (44, 700.0)):
        write(tmp_path / f"b/s{seed}", seed=seed, summary={"tokens_per_second": speed, "optimizer_state_bytes": 0})
    write(tmp_path / "a", summary={"tokens_per_second": 65.0, "mfu": None, "wall_seconds": None})
    found, text = compare(tmp_path / "a", tmp_path / "b")
    costs = {row["key"]: (row["a"], row["b"], row["ratio"]) for row in found["cost"]}
    assert costs["tokens_per_second"] == (65.0, 130.0, 2.0)
    assert costs["optimizer_state_bytes"] == (24_117_248, 0.0, None)
    assert costs["wall_seconds"] == (None, 93.4, None)
    assert [line.split() for line in text.splitlines() if "tokens/s " in line] == [["tokens/s", "65", "130", "2"]]


def test_models_of_other_sizes_are_noted(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b", {"model.name": "llama_60m", "model.hidden_size": 512}, summary={"parameters": 58_073_600})
    found, _ = compare(tmp_path / "a", tmp_path / "b")
    assert [row["key"] for row in found["configuration"]] == ["model.hidden_size", "model.name"]
    assert noted(found, "The models differ")


def test_runs_of_a_sweep_with_several_jobs_are_no_measure_of_speed(tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/sweep.yaml").write_text("jobs: 2\n")
    found, _ = compare(write(tmp_path / "sweep/a"), write(tmp_path / "sweep/b"))
    assert noted(found, "Several runs shared the machine (2 at once)")
    found, _ = compare(write(tmp_path / "sweep/llama_tiny/a"), write(tmp_path / "b"))
    assert noted(found, "Several runs shared the machine (A 2, B 1 at once)")
    found, _ = compare(write(tmp_path / "alone"), write(tmp_path / "alone_too"))
    assert found["warnings"] == []


def test_skipped_steps_and_damaged_documents_are_noted(tmp_path):
    write(tmp_path / "a", summary={"skipped_steps": 3, "damaged_documents": 2})
    found, _ = compare(tmp_path / "a", write(tmp_path / "b"))
    assert found["warnings"] == ["A: seed 42: 3 steps were skipped.", "A: seed 42: 2 damaged documents left out."]


def test_the_text_fits_a_screen(tmp_path):
    a, b = (
        write_seeds(tmp_path / "a", [60.0, 61.0], optimizer="adam"),
        write_seeds(tmp_path / "b", [55.0, 54.0], eval_every=5),
    )
    _, text = compare(a, b)
    assert len(text.splitlines()) <= 45
    assert max(len(line) for line in text.splitlines() if not line.startswith(("A  ", "B  "))) <= WIDTH
