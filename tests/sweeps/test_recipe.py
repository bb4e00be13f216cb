"""The best of a sweep as a recipe that train.py takes."""

import shutil
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from reporting import load_run
from scripts import sweep as command
from sweeps.recipe import write_recipe
from tests.reporting.synthetic import write_run

ROOT = Path(__file__).resolve().parents[2]
PLAN = {"experiment": "quickstart", "adam_lr": [0.02], "lr": {"alice": [0.01, 0.02], "adam": [0.001, 0.003]}}
SEARCH = {
    "experiment": "quickstart",
    "search": {"trials": 4, "span": 10, "ranges": {"alice": {"lr": 0.02, "scale": 0.5}}},
}


@pytest.fixture
def call(tmp_path, trainer, capsys):
    def run(*words, plan=PLAN):
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
        code = command.main([str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out"), *words], trainer=trainer)
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def test_the_best_of_each_method_of_a_grid(call, tmp_path):
    call()
    code, printed = call("--write-recipe", str(tmp_path / "recipes"))
    assert code == 0 and "alice-llama_tiny.yaml" in printed
    text = (tmp_path / "recipes/alice-llama_tiny.yaml").read_text()
    assert text.startswith(
        "# @package _global_\n# The best of 2 runs of the sweep plan, by the validation loss of seed 42: 3.9120"
    )
    assert "out/alice-lr0.02-adam0.02-s42, commit 4f81fa7c0ffe." in text and str(tmp_path) not in text
    written = yaml.safe_load(text)
    assert written["optimizer"] == {"lr": 0.02, "adam_lr": 0.02, "rank": 64}  # 64: not the method's default
    assert written["trainer"] == {"steps": 20, "batch_size": 16, "warmup_fraction": 0.1}
    assert yaml.safe_load((tmp_path / "recipes/adam-llama_tiny.yaml").read_text())["optimizer"]["lr"] == 0.003


def test_the_best_of_a_search_with_what_was_searched(call, tmp_path):
    pytest.importorskip("optuna")
    call(plan=SEARCH)
    code, _ = call("--write-recipe", str(tmp_path / "recipes"), plan=SEARCH)
    written = yaml.safe_load((tmp_path / "recipes/alice-llama_tiny.yaml").read_text())
    best = min((tmp_path / "out").glob("alice-t*"), key=lambda folder: load_run(folder).perplexity)
    assert code == 0 and written["optimizer"]["scale"] == load_run(best).setting("optimizer.scale")


def test_a_method_that_has_not_ended_is_named_and_has_no_recipe(call, tmp_path):
    call("--only", "alice")
    code, printed = call("--write-recipe", str(tmp_path / "recipes"))
    assert code == 1 and "error: no best yet of adam: let their runs end first." in printed
    assert [file.name for file in (tmp_path / "recipes").iterdir()] == ["alice-llama_tiny.yaml"]


def test_a_recipe_that_is_there_stays(call, tmp_path):
    call("--only", "alice")
    (tmp_path / "alice-llama_tiny.yaml").write_text("mine")
    code, printed = call("--only", "alice", "--write-recipe", str(tmp_path))
    assert code == 1 and "exists: give another folder to --write-recipe" in printed
    assert (tmp_path / "alice-llama_tiny.yaml").read_text() == "mine"


WORDS = {
    "alice": [
        "optimizer.adam_lr=3e-05",
        "optimizer.tracking=false",
        "optimizer.rank=16",
        "optimizer.betas=[0.8,0.9,0.99]",
    ],
    "adam": ["optimizer.betas=[0.8,0.9]", "optimizer.adam_betas=[0.9,0.95]"],
}


@pytest.mark.parametrize("method", WORDS)
def test_train_composes_to_the_same_settings_from_the_recipe(tmp_path, method):
    """The recipe of a run that changed defaults, in a copy of configs/."""
    configs = tmp_path / "configs"
    shutil.copytree(ROOT / "configs", configs)

    def composed(*overrides):
        with initialize_config_dir(version_base=None, config_dir=str(configs)):
            return compose("train", overrides=["experiment=quickstart", f"optimizer={method}", *overrides])

    wanted = composed("optimizer.lr=0.0123", "trainer.steps=77", *WORDS[method])
    run = write_run(tmp_path / "run", optimizer=method, perplexity=60.0)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["optimizer"] = OmegaConf.to_container(wanted.optimizer, resolve=True)
    config["trainer"] = {key: wanted.trainer[key] for key in ("steps", "batch_size", "warmup_fraction", "min_lr_ratio")}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (configs / f"recipe/{method}-llama_tiny.yaml").unlink()
    write_recipe(load_run(run), configs / "recipe", "plan", 1)
    found = composed()
    assert found.optimizer == wanted.optimizer and found.trainer == wanted.trainer
