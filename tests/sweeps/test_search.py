"""Searches with a stand-in for train.py: what Optuna is told, and who runs what."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

pytest.importorskip("optuna")

from sweeps import Plan, SearchSweep, load_plan
from sweeps.claims import claim, release
from sweeps.plan import Search

ROOT = Path(__file__).resolve().parents[2]
RANGES = {
    "alice": {"optimizer.lr": (0.002, 0.2), "optimizer.scale": (0.03, 3.0)},
    "adam": {"optimizer.lr": (1e-5, 0.1)},
}
ALICE = {"alice": RANGES["alice"]}


def plan(trials=3, ranges=ALICE, **more):
    return Plan("plan", "quickstart", search=Search(trials, ranges, **more))


@pytest.fixture
def search(tmp_path, trainer):
    def make(*args, patient=True, slots=((),), **more):
        return SearchSweep(plan(*args, **more), tmp_path / "out", slots=slots, trainer=trainer, patient=patient)

    return make


def run(sweep):
    sweep.run()
    return sweep


def states(sweep):
    return {f"{name}-t{trial.number:03d}": trial.state.name for _, name, trial in sweep._trials()}


def settings(sweep):
    return {job.name: (job.lr, *job.overrides) for job in sweep.jobs()}


def test_every_optimizer_gets_its_trials_the_first_at_the_middle_of_its_ranges(search, trainer):
    sweep = run(search(trials=3, ranges=RANGES))
    assert sorted(trainer.names()) == [f"{name}-t00{i}" for name in ("adam", "alice") for i in range(3)]
    assert trainer.names()[:2] == ["alice-t000", "adam-t000"]  # in turns
    assert settings(sweep)["alice-t000"] == (0.02, "optimizer.scale=0.3")
    assert settings(sweep)["adam-t000"] == (0.001,)
    assert sweep.results["alice-t000"] == pytest.approx(50)
    assert set(states(sweep).values()) == {"COMPLETE"}
    assert sweep.best(None, "alice").name == min(
        (name for name in sweep.results if "alice" in name), key=sweep.results.get
    )


def test_a_search_that_has_ended_runs_nothing_and_one_with_more_trials_goes_on(search, trainer):
    run(search(trials=3))
    assert run(search(trials=3)).results and len(trainer.names()) == 3
    sweep = run(search(trials=6))
    assert trainer.names()[3:] == ["alice-t003", "alice-t004", "alice-t005"]
    # A sampler that began with the same seed in each process would give the same settings again.
    assert len({lr for lr, _ in settings(sweep).values()}) == 6


def test_the_same_seed_suggests_the_same_and_another_one_does_not(search, trainer, tmp_path):
    first = settings(run(search(trials=3)))

    def other(name, **more):
        return settings(run(SearchSweep(plan(3, **more), tmp_path / name, trainer=trainer)))

    assert other("again") == first
    assert other("else", seed=1) != first


def test_an_interrupted_trial_is_begun_again_with_its_settings_in_its_folder(search, trainer, tmp_path):
    (tmp_path / "hang").write_text("alice-t001")
    sweep = search(trials=3)

    def interrupt(entry):
        if (tmp_path / "out" / "alice-t001" / "metrics.jsonl").is_file():
            raise KeyboardInterrupt

    sweep._watch = interrupt
    with pytest.raises(KeyboardInterrupt):
        sweep.run()
    before = settings(sweep)["alice-t001"]
    assert states(search(trials=3))["alice-t001"] == "RUNNING"
    (tmp_path / "hang").unlink()
    sweep = run(search(trials=3))
    assert trainer.names() == ["alice-t000", "alice-t001", "alice-t001", "alice-t002"]
    assert settings(sweep)["alice-t001"] == before and states(sweep)["alice-t001"] == "COMPLETE"


def test_a_run_that_ended_unknown_to_the_journal_is_not_run_again(search, trainer):
    sweep = search(trials=2)
    sweep._take = lambda job: (_ for _ in ()).throw(KeyboardInterrupt)  # killed between the record and the journal
    with pytest.raises(KeyboardInterrupt):
        sweep.run()
    sweep = run(search(trials=2))
    assert trainer.names() == ["alice-t000", "alice-t001"] and len(sweep.results) == 2


def test_a_bad_run_is_pruned_recorded_and_not_run_again(search, trainer, tmp_path):
    (tmp_path / "hang").write_text("alice-t006")
    sweep = run(search(trials=8, prune="median"))
    assert states(sweep)["alice-t006"] == "PRUNED" and sweep.pruned["alice-t006"] == 5
    folder = tmp_path / "out" / "alice-t006"
    assert json.loads((folder / "pruned.json").read_text()) == {"step": 5, "loss": 99.0, "by": "median"}
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "environment.json", "metrics.jsonl", "pruned.json",
    }  # fmt: skip
    count = len(trainer.names())
    again = run(search(trials=8, prune="median"))
    assert len(trainer.names()) == count and again.pruned == sweep.pruned and again.results == sweep.results


def test_nothing_is_pruned_before_the_step_that_the_plan_names(search, tmp_path):
    (tmp_path / "hang").write_text("alice-t006")
    sweep = search(trials=8, prune="median", prune_from=6)
    looked = []
    watch = sweep._watch

    def look(entry):
        watch(entry)
        if entry.job.name == "alice-t006" and sweep._seen.get("alice-t006"):
            looked.append(dict(sweep._ending))
            raise KeyboardInterrupt

    sweep._watch = look
    with pytest.raises(KeyboardInterrupt):
        sweep.run()
    assert looked == [{}] and states(sweep)["alice-t006"] == "RUNNING"


def test_each_model_may_have_its_own_first_step_of_pruning(tmp_path):
    start = {"llama_60m": 2000, "llama_130m": 4000}
    found = load_plan(write(tmp_path, GIVEN | {"prune": "median", "prune_from": start}, models=list(start)))
    sweep = SearchSweep(found, tmp_path / "out")
    assert [sweep._pruner(model)._n_warmup_steps for model in start] == [2000, 4000]


def test_a_diverged_run_counts_as_the_worst(search, tmp_path):
    (tmp_path / "diverge").write_text("alice-t001")
    sweep = run(search(trials=4))
    assert math.isinf(sweep.results["alice-t001"]) and states(sweep)["alice-t001"] == "COMPLETE"
    assert (tmp_path / "out/alice-t001/diverged.json").is_file() and sweep.best(None, "alice").name != "alice-t001"
    assert search(trials=4).best(None, "alice") is None  # of what has not been read


def test_a_run_that_fails_is_given_up_and_tried_again_by_the_next_call(search, trainer, tmp_path):
    (tmp_path / "broken").write_text("alice-t001")
    sweep = run(search(trials=3))
    assert list(sweep.failed) == ["alice-t001"] and trainer.names().count("alice-t001") == 3
    assert sweep.best(None, "alice") is None
    (tmp_path / "broken").unlink()
    assert not run(search(trials=3)).failed and trainer.names().count("alice-t001") == 4


def test_a_trial_that_another_process_is_at_is_left_to_it(search, trainer, tmp_path):
    (tmp_path / "out").mkdir()
    lock = claim(tmp_path / "out" / "alice-t000")
    sweep = search(trials=2, patient=False)
    sweep.run()
    assert trainer.names() == ["alice-t001"]
    release(lock)
    assert len(run(search(trials=2)).results) == 2


def test_two_processes_share_a_search_and_no_trial_runs_twice(tmp_path, trainer):
    file = tmp_path / "plan.yaml"
    file.write_text(
        yaml.safe_dump(
            {"experiment": "quickstart", "search": {"trials": 5, "span": 10, "ranges": {"alice": {"lr": 0.02}}}}
        )
    )
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path; from sweeps import *;"
        f"SearchSweep(load_plan(Path({str(file)!r})), Path({str(tmp_path / 'out')!r}), slots=[(), ()],"
        f" trainer={list(trainer)!r}).run()"
    )
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert sorted(trainer.names()) == [f"alice-t00{i}" for i in range(5)]
    sweep = SearchSweep(load_plan(file), tmp_path / "out")
    sweep.read()
    assert len(sweep.results) == 5 and set(states(sweep).values()) == {"COMPLETE"}


def test_a_journal_of_other_ranges_is_refused(search, tmp_path, trainer):
    run(search(trials=1))
    other = {"alice": {"optimizer.lr": (0.001, 0.1), "optimizer.scale": (0.03, 3.0)}}
    with pytest.raises(ValueError, match="holds a search of alice with other ranges"):
        SearchSweep(plan(2, other), tmp_path / "out", trainer=trainer).read()


def test_looking_at_a_search_that_has_not_begun_writes_nothing(search, tmp_path):
    sweep = search(trials=2)
    sweep.read()
    assert sweep.jobs() == [] and sweep.known() == 2 and not (tmp_path / "out").exists()


GIVEN = {"trials": 4, "span": 10, "ranges": {"alice": {"lr": 0.02, "scale": [0.1, 1], "trainer.grad_clip": 1}}}


def write(tmp_path, search, **more):
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump({"experiment": "quickstart", "search": search, **more}))
    return file


def test_ranges_are_given_by_a_middle_and_a_span_or_by_their_ends(tmp_path):
    found = load_plan(write(tmp_path, GIVEN)).search
    assert found.ranges == {
        "alice": {"optimizer.lr": (0.002, 0.2), "optimizer.scale": (0.1, 1), "trainer.grad_clip": (0.1, 10)}
    }
    assert replace(found, trials=1).prune == "none"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trials": None}, "search needs trials and ranges"),
        ({"sampler": "tpe"}, "search needs trials and ranges"),
        ({"trials": 0}, "trials of search must be a whole number from 1"),
        ({"prune_from": 0.5}, "prune_from of search must be a whole number"),
        ({"prune_from": {"llama_60m": 5}}, "prune_from of search must be one number, or name each of models once"),
        ({"prune": "best"}, "prune must be one of median, halving, none, not 'best'"),
        ({"ranges": {"alice": None}}, "ranges must name optimizers"),
        ({"ranges": {"alice": {"lr": [0.2, 0.02]}}}, "must be a range of positive numbers"),
        ({"ranges": {"alice": {"lr": "high"}}}, "lr of alice must be \\[lowest, highest\\], or a number"),
        ({"span": None}, "a number if search has a span, not 0.02"),
    ],
)
def test_a_search_that_cannot_be_is_refused(tmp_path, changes, message):
    search = {key: value for key, value in (GIVEN | changes).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        load_plan(write(tmp_path, search))


def test_a_search_has_one_seed_and_no_grid(tmp_path):
    with pytest.raises(ValueError, match="have one seed, not \\[1, 2\\]"):
        load_plan(write(tmp_path, GIVEN, seeds=[1, 2]))
    with pytest.raises(ValueError, match="a search has no extend"):
        load_plan(write(tmp_path, GIVEN, extend=2))
    with pytest.raises(ValueError, match="either lr and adam_lr"):
        load_plan(write(tmp_path, GIVEN, lr={"alice": [0.02]}, adam_lr=[0.02]))
