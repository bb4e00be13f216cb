"""Which runs a plan asks for, given what is known."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sweeps import Plan, load_plan

ROOT = Path(__file__).resolve().parents[2]
GRID = Plan("grid", "fair", adam_lr=(0.006, 0.02, 0.06), lr={"alice": (0.006, 0.02, 0.06)}, extend=6)


def play(plan, perplexity):
    """Run a plan against a function of the rates: all results, and how often it was asked."""
    results = {}
    while True:
        missing = [job for job in plan.jobs(results) if job.name not in results]
        if not missing:
            return results
        results[missing[0].name] = perplexity(missing[0])


def bowl(lr, adam_lr):
    return lambda job: 50 + math.log(job.lr / lr) ** 2 + math.log(job.adam_lr / adam_lr) ** 2


def test_a_grid_is_every_matrix_rate_with_every_rate_of_the_adam_group():
    jobs = GRID.jobs({})
    assert [(job.lr, job.adam_lr) for job in jobs] == [(a, b) for a in (0.006, 0.02, 0.06) for b in (0.006, 0.02, 0.06)]
    assert jobs[1].name == "alice-lr0.006-adam0.02-s42"
    assert jobs[1].arguments() == ["optimizer=alice", "optimizer.lr=0.006", "optimizer.adam_lr=0.02", "seed=42"]


def test_a_grid_with_its_best_pair_in_the_middle_does_not_grow():
    results = play(GRID, bowl(0.02, 0.02))
    assert len(results) == 9 and GRID.interior(None, "alice", results)


@settings(max_examples=25, deadline=None)
@given(lr=st.floats(3e-5, 3), adam_lr=st.floats(3e-5, 3))
def test_a_grid_grows_until_its_best_pair_has_worse_neighbours(lr, adam_lr):
    surface = bowl(lr, adam_lr)
    results = play(GRID, surface)
    best = GRID.best(None, "alice", results)
    assert GRID.interior(None, "alice", results)
    for i, wanted in enumerate((lr, adam_lr)):  # the nearest rate that the ladder has
        ladder = [a * 10.0**k for k in range(-7, 3) for a in (2, 6)]
        nearest = min(ladder, key=lambda rate: abs(math.log(rate / wanted)))
        # as near, in factors: two rates may be equally near
        assert abs(math.log(wanted / best[i])) == pytest.approx(abs(math.log(wanted / nearest)), abs=1e-9)


def test_a_grid_gives_up_growing_after_so_many_rates():
    plan = replace(GRID, extend=2)
    results = play(plan, bowl(1e6, 0.02))
    assert max(job.lr for job in plan.jobs(results)) == 0.6 and not plan.interior(None, "alice", results)


def test_a_single_rate_does_not_grow():
    plan = replace(GRID, adam_lr=(0.001,))
    assert {job.adam_lr for job in plan.jobs(play(plan, bowl(0.2, 0.02)))} == {0.001}
    assert plan.best(None, "alice", play(plan, bowl(0.2, 0.02))) == (0.2, 0.001)


def test_a_ridge_that_runs_past_the_cross_around_the_best_pair_is_followed():
    valley = {(0.02, 0.02): 50.0, (0.06, 0.06): 51.0, (0.2, 0.06): 45.0}
    surface = lambda job: valley.get((job.lr, job.adam_lr), 60.0)  # noqa: E731
    assert GRID.best(None, "alice", play(GRID, surface)) == (0.02, 0.02)
    near = replace(GRID, near=0.03)
    results = play(near, surface)
    assert near.best(None, "alice", results) == (0.2, 0.06) and near.interior(None, "alice", results)
    nearer = replace(GRID, near=0.01)  # 51 is more than 1 % above 50
    assert nearer.best(None, "alice", play(nearer, surface)) == (0.02, 0.02)


def test_a_pair_that_diverged_counts_as_worse():
    results = play(GRID, lambda job: math.inf if job.lr > 0.02 else bowl(0.02, 0.02)(job))
    assert GRID.best(None, "alice", results) == (0.02, 0.02) and len(results) == 9


def test_without_extension_a_grid_stays_and_more_seeds_of_the_best_follow():
    plan = replace(GRID, extend=0, more_seeds=(43, 42, 44))
    results = play(plan, bowl(0.06, 0.06))
    assert len(results) == 11
    assert {name for name in results if not name.endswith("s42")} == {
        "alice-lr0.06-adam0.06-s43",
        "alice-lr0.06-adam0.06-s44",
    }


def test_more_seeds_do_not_change_which_pair_is_the_best():
    plan = replace(GRID, extend=0, more_seeds=(43, 44))
    results = play(plan, lambda job: bowl(0.02, 0.02)(job) + (1000 if job.seed != 42 else 0))
    assert plan.best(None, "alice", results) == (0.02, 0.02)


def test_an_unfinished_grid_has_no_best():
    results = play(GRID, bowl(0.02, 0.02))
    results.pop("alice-lr0.06-adam0.06-s42")
    assert GRID.best(None, "alice", results) is None


def test_variants_take_the_best_rates_of_their_optimizer_seeds_outermost():
    plan = Plan(
        "best",
        "fair",
        models=("a", "b"),
        seeds=(1, 2),
        settings=("trainer.steps=9",),
        settings_of={"alice": ("optimizer.rank=4",)},
        rates={("a", "alice"): (0.02, 0.006), ("a", "adam"): (0.001, 0.02)},
        variants={"adam": {}, "cold": {"optimizer": "alice", "lr_factor": 3, "adam_lr": 0.001, "settings": ["x.y=1"]}},
    )
    jobs = plan.jobs({})
    assert [job.name for job in jobs] == ["a/adam-s1", "a/cold-s1", "a/adam-s2", "a/cold-s2"]
    assert (jobs[1].lr, jobs[1].adam_lr) == (0.06, 0.001)
    assert jobs[1].arguments()[:2] == ["model=a", "optimizer=alice"]
    assert jobs[1].arguments()[-3:] == ["trainer.steps=9", "optimizer.rank=4", "x.y=1"]
    assert plan.waiting() == ["b adam", "b alice"]


def write(tmp_path, **changes):
    values = {"experiment": "fair", "adam_lr": [0.006, 0.02], "lr": {"alice": [0.006, 0.02]}} | changes
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return file


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rates": [1]}, "is not a plan \\(rates\\)"),
        ({"experiment": None}, "no experiment"),
        ({"variants": {"alice": {}}}, "either lr and adam_lr"),
        ({"extend": 2, "adam_lr": [0.001, 0.005, 0.02]}, "two to a decade"),
        ({"extend": 2, "adam_lr": [0.02, 0.2]}, "two to a decade"),
        ({"lr": None, "adam_lr": None, "variants": {"alice": {"x": []}}, "rates_from": "r"}, "a variant has no x"),
        ({"lr": None, "adam_lr": None, "variants": {"alice": {}}}, "no rates_from"),
        ({"adam_lr": None}, "either lr and adam_lr"),
        ({"lr": {}}, "lr must be a mapping"),
        ({"seeds": 42}, "seeds must be a list, not 42: write \\[42\\]"),
        ({"adam_lr": ["x"]}, "rates must be a list of numbers"),
        ({"lr": {"alice": 0.02}}, "rates must be a list of numbers"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_plan(write(tmp_path, **changes))


def test_a_plan_that_is_not_yaml_is_refused(tmp_path):
    (tmp_path / "plan.yaml").write_text("lr: [1, 2")
    twice = tmp_path / "twice.yaml"
    twice.write_text("experiment: null\nsettings: [a=1]\nlr: {adam: [1]}\nadam_lr: [1]\nsettings: [b=1]\n")
    with pytest.raises(ValueError, match=r"is not valid YAML \(settings is there twice"):
        load_plan(twice)
    with pytest.raises(ValueError, match="is not valid YAML"):
        load_plan(tmp_path / "plan.yaml")


def test_only_what_is_asked_for(tmp_path):
    file = write(tmp_path, lr={"alice": [0.02], "racs": [0.02]}, adam_lr={"default": [0.02], "racs": [0.001]})
    assert [job.adam_lr for job in load_plan(file, ["racs"]).jobs({})] == [0.001]
    with pytest.raises(ValueError, match="has no lion: choose from alice, racs"):
        load_plan(file, ["lion"])


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "sweep").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_committed_plans_can_be_read_and_name_each_run_once(file):
    plan = load_plan(file)
    rates = {(model, name): (0.02, 0.02) for model in plan.models for name in plan.optimizers}
    rates |= {
        (model, v.get("rates", v.get("optimizer"))): (0.02, 0.02)
        for model in plan.models
        for v in plan.variants.values()
    }
    if plan.search is None:
        names = [job.name for job in replace(plan, rates=rates).jobs({})]
        assert names and len(names) == len(set(names))
    assert plan.experiment is None or (ROOT / "configs" / "experiment" / f"{plan.experiment}.yaml").is_file()


@pytest.mark.parametrize("name", ["paper_search", "paper_search_1b"])
def test_the_papers_search_is_the_same_for_all_methods_around_the_published_rates(name):
    plan = load_plan(ROOT / "configs" / "sweep" / f"{name}.yaml")
    assert {"adam", "galore", "fira", "racs", "alice"} <= set(plan.optimizers)
    assert {"trainer.device=cuda", "trainer.eval_every=500"} <= set(plan.settings)
    for method, ranges in plan.search.ranges.items():
        assert list(ranges) == ["optimizer.lr", "optimizer.adam_lr"]
        assert ranges["optimizer.adam_lr"] == plan.search.ranges["adam"]["optimizer.adam_lr"]
        low, high = ranges["optimizer.lr"]
        assert high / low == pytest.approx(100)
        for model in plan.models:
            recipe = yaml.safe_load((ROOT / "configs" / "recipe" / f"{method}-{model}.yaml").read_text())
            assert math.sqrt(low * high) == pytest.approx(recipe["optimizer"]["lr"])
            trainer, start = recipe["trainer"], plan.search.prune_from
            first = start if isinstance(start, int) else start[model]
            assert first == 2 * trainer["warmup_fraction"] * trainer["steps"]


def test_the_committed_grid_of_make_compare_is_the_promised_one():
    plan = load_plan(ROOT / "configs/sweep/compare.yaml")
    assert plan.adam_lr == (0.001, 0.005, 0.02) and plan.optimizers == ["adam", "muon", "racs", "alice"]
    assert len(plan.jobs({})) == 36


def test_the_plan_for_a_class_of_ones_own_in_the_docs(tmp_path):
    text = (ROOT / "docs/add_your_optimizer.md").read_text(encoding="utf-8")
    file = tmp_path / "mine.yaml"
    file.write_text(text.partition("```yaml\n# mine.yaml")[2].partition("\n")[2].partition("```")[0])
    jobs = load_plan(file).jobs({})
    assert len(jobs) == 27
    own = [job.arguments() for job in jobs if job.optimizer == "any"]
    expected = {"optimizer=any", "optimizer.target=my_file.Mine", "+optimizer.options={momentum: 0.9}"}
    assert len(own) == 9 and all(expected <= set(arguments) for arguments in own)
    assert not any("target" in word for job in jobs if job.optimizer != "any" for word in job.arguments())
