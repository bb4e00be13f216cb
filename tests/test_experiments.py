"""One command per cell: every experiment of the paper composes, would run, and is what the paper's tables say."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from data.errors import UserError
from pretraining.config import CONFIGS, choices, compose, validate
from pretraining.plan import Plan, make_plan
from pretraining.trainer import train
from reporting.paper.cells import ALIASES
from scripts import write_experiments
from scripts.write_experiments import files

TABLES = json.loads((CONFIGS.parent / "results" / "paper" / "tables.json").read_text())
PEERS = json.loads((CONFIGS.parent / "results" / "paper" / "peers.json").read_text())
SIZES = {"60m": "60M", "130m": "130M", "350m": "350M", "1b": "1.3B"}
LM_HEAD = {"60m": "32000x512", "130m": "32000x768", "350m": "32000x1024", "1b": "32000x2048"}
# Appendix F.7; what a name does not say here is as in Table 11
PARTS: dict[str, dict[str, Any]] = {
    "table5/none": {"tracking": False, "switching": "none", "compensation": "none"},
    "table5/tracking": {"tracking": True, "switching": "none", "compensation": "none"},
    "table5/tracking_switch": {"tracking": True, "switching": "complement", "compensation": "none"},
    "table5/tracking_switch_compensation": {"tracking": True, "switching": "complement", "compensation": "optimal"},
    "figure5/switch_only": {"tracking": False, "switching": "complement", "compensation": "none"},
    "figure5/switching_full_basis": {"tracking": True, "switching": "full_basis", "compensation": "none"},
    "figure5/switching_gaussian_mix": {"tracking": True, "switching": "gaussian_mix", "compensation": "none"},
    "figure5/switching_gaussian": {"tracking": True, "switching": "gaussian", "compensation": "none"},
    "figure5/compensation_fira": {"tracking": True, "switching": "complement", "compensation": "fira"},
    "figure5/compensation_fira_plus": {"tracking": True, "switching": "complement", "compensation": "fira_plus"},
    "figure5/compensation_none": {"tracking": True, "switching": "complement", "compensation": "none"},
    "figure6/no_tracking_no_switch": {
        "tracking": False,
        "switching": "none",
        "compensation": "none",
        "log_basis": True,
    },
    "figure6/tracking_no_switch": {"tracking": True, "switching": "none", "compensation": "none", "log_basis": True},
}
NAMES = [name for name in choices("experiment", folders=True) if "/" in name]


@cache
def composed(name: str) -> DictConfig:
    cfg = compose([f"experiment={name}", "trainer.dry_run=true"])
    validate(cfg)
    return cfg


@cache
def planned(name: str) -> Plan:
    """What a dry run prints, on the meta device."""
    return make_plan(composed(name))


def described(name: str) -> tuple[str, str, str]:
    """Optimizer, size and last layer, from the name alone."""
    if name in PARTS:
        return "alice", "130m", "candidate"
    if name == "figure5/racs_no_ema":
        return "racs", "130m", "adam"
    optimizer, size = name.partition("/")[2].removesuffix("_candidate").rsplit("_", 1)
    return optimizer, size, "candidate" if name.endswith("_candidate") else "adam"


def published(optimizer: str, size: str) -> dict[str, Any]:
    """The method's numbers in Tables 7 to 9 and 11."""
    if optimizer == "muon":
        return {"lr": 0.02, "momentum": 0.95, "nesterov": True, "ns_steps": 5, "adam_lr": 3e-4}  # of its own code
    if optimizer in ("apollo_mini", "apollo_svd"):  # of its own publication
        place = list(SIZES).index(size)
        peer = PEERS["apollo_2412.05270"]
        ranks = peer["rank"]["Mini" if optimizer == "apollo_mini" else "APOLLO"]
        # "1 below 1B; 1B: ... APOLLO w. SVD 0.4; Mini sqrt(128) (... 192 for 130M)"
        scale = math.sqrt(192 if size == "130m" else 128) if optimizer == "apollo_mini" else 0.4 if size == "1b" else 1
        shared = {key: peer["hyper"][key] for key in ("lr", "limiter", "betas", "eps")}
        return shared | {"rank": ranks[place], "scale": pytest.approx(scale, rel=1e-8), "update_interval": 200}
    number = {"galore": 7, "fira": 7, "adam": 8, "racs": 9, "alice": 11, "alice_0": 11}[optimizer]
    table = TABLES[f"table{number}"]
    row = dict(zip(table["columns"], table["rows"][SIZES[size]], strict=True))
    if number == 7:
        return {"lr": row["learning_rate"], "scale": row["update_scale"], "rank": row["rank"], "update_interval": 200}
    if number == 8:
        return {"lr": row["learning_rate"], "betas": [row["beta1"], row["beta2"]]}
    if number == 9:
        return {
            "lr": row["learning_rate"],
            "beta": row["beta"],
            "scale": row["alpha"],
            "limiter": 1.01,
            "iterations": 5,
        }
    return {
        "lr": row["learning_rate"],
        "scale": row["alpha"],
        "compensation_scale": row["alpha_c"],
        "betas": [row["beta1"], row["beta2"], row["beta3"] if optimizer == "alice" else 0],
        "update_interval": row["K"],
        "rank": row["rank"],
        "leading": row["l"],
        "tracking": optimizer == "alice",
        "switching": "complement",
        "compensation": "optimal",
        "limiter": 1.01,
    }


def test_files_and_the_list_of_cells_are_the_same() -> None:
    wanted = files()
    root = CONFIGS / "experiment"
    assert {path.relative_to(root).with_suffix("").as_posix() for path in wanted} == set(NAMES)
    stale = [path.name for path, text in wanted.items() if path.read_text() != text]
    assert not stale, "run scripts/write_experiments.py"


def test_the_check_of_the_files_writes_nothing_and_names_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(write_experiments, "FOLDER", tmp_path)
    assert write_experiments.main([]) == 0 and write_experiments.main(["--check"]) == 0
    changed, gone = tmp_path / "table5/none.yaml", tmp_path / "table4/racs_1b.yaml"
    changed.write_text("seed: 1\n")
    gone.unlink()
    (tmp_path / "figure6/old.yaml").write_text("")
    capsys.readouterr()
    assert write_experiments.main(["--check"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert [error.split()[1] for error in errors] == ["figure6/old.yaml", "table4/racs_1b.yaml", "table5/none.yaml"]
    assert "delete it" in errors[0] and not gone.exists() and changed.read_text() == "seed: 1\n"
    with pytest.raises(SystemExit) as stop:
        write_experiments.main(["--chekc"])
    assert stop.value.code == 2


def test_table_2_has_an_experiment_for_every_printed_number_of_a_method_that_we_run() -> None:
    rows = {
        "Adam": "adam", "GaLore": "galore", "Fira": "fira", "Apollo-mini": "apollo_mini", "Apollo-svd": "apollo_svd",
        "RACS": "racs", "Alice-0": "alice_0", "Alice": "alice",
    }  # fmt: skip
    wanted = {f"table2/muon_{size}" for size in SIZES}
    for row, optimizer in rows.items():
        for size, column in SIZES.items():
            printed = TABLES["table2"]["rows"][row][column]
            wanted |= {f"table2/{optimizer}_{size}"} if printed["ppl_star"] is not None else set()
            wanted |= {f"table2/{optimizer}_{size}_candidate"} if printed["ppl"] is not None else set()
    assert wanted == {name for name in NAMES if name.startswith("table2/")}
    assert len(wanted) == 52


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_is_the_run_of_the_paper(name: str) -> None:
    cfg, (optimizer, size, last_layer) = composed(name), described(name)
    o, t = cfg.optimizer, cfg.trainer
    assert (o.name, cfg.model.name, cfg.recipe) == (optimizer, f"llama_{size}", f"{optimizer}-llama_{size}")
    steps = dict(zip(TABLES["table10"]["columns"], TABLES["table10"]["rows"][SIZES[size]], strict=True))["steps"]
    table4 = name.startswith("table4/")
    assert t.steps == (150_000 if table4 else steps)
    assert (t.batch_size, t.warmup_fraction, t.min_lr_ratio, t.eval_every, t.precision) == (512, 0.1, 0.1, 500, "bf16")
    assert (cfg.data.name, cfg.data.length, cfg.data.rows, cfg.data.protocol) == (
        "allenai/c4",
        256,
        "truncate",
        "exact",
    )
    assert (cfg.tokenizer, cfg.data.validation_max_tokens, t.grad_clip) == ("t5-base", 10_000_000, None)
    assert (o.last_layer, o.weight_decay) == (last_layer, 0)
    wanted = published(optimizer, size)
    if table4 and optimizer == "alice":  # F.3
        wanted |= {"scale": 0.3, "compensation_scale": 0.2, "rank": 512, "leading": 160}
    if name == "figure5/racs_no_ema":
        wanted["beta"] = 0
    for key, value in (wanted | PARTS.get(name, {})).items():
        assert o[key] == value, key
    if optimizer != "muon":
        assert o.adam_lr is None  # everything else at the same rate, as in the code base of the paper


@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_gives_the_last_layer_to_the_right_optimizer(name: str) -> None:
    optimizer, size, last_layer = described(name)
    text, head = planned(name).text, LM_HEAD[size]
    if optimizer == "adam":
        return
    matrices = next(line for line in text.splitlines() if "matrices" in line)
    assert (f"1 of {head}" in matrices) == (last_layer == "candidate")
    assert planned(name).tokens_per_step == 512 * 256


def test_the_door_prints_the_plan_and_stops(capsys: pytest.CaptureFixture[str]) -> None:
    assert train(composed("table2/alice_60m")) is None
    text = capsys.readouterr().out
    assert "58,073,600 parameters" in text and "10,000 steps of 512 rows x 256 tokens = 1.31B tokens" in text
    assert "runs/paper/table2/alice_60m/s42" in text


def test_runs_have_folders_of_their_own_and_aliases_the_same_run() -> None:
    folders = {name: composed(name).run_dir for name in NAMES}
    assert all(folders[name] == f"runs/paper/{ALIASES.get(name, name)}/s42" for name in NAMES)
    for alias, target in ALIASES.items():
        assert OmegaConf.to_container(composed(alias)) == OmegaConf.to_container(composed(target))


def test_the_command_line_beats_an_experiment() -> None:
    more = ["optimizer.last_layer=adam", "optimizer.rank=64", "trainer.steps=7", "data=sample", "run_dir=x", "seed=3"]
    cfg = compose(["experiment=table5/none", *more])
    assert (cfg.optimizer.last_layer, cfg.optimizer.rank, cfg.trainer.steps, cfg.data.kind) == ("adam", 64, 7, "sample")
    assert (cfg.run_dir, cfg.data.seed, cfg.optimizer.tracking) == ("x", 3, False)
    other = compose(["experiment=table2/racs_60m", "optimizer=adam", "model=llama_130m"])
    assert (other.recipe, other.optimizer.lr, other.trainer.steps) == ("adam-llama_130m", 0.001, 20_000)


@pytest.mark.parametrize("name", ["table2/alice_61m", "table2", "../model/llama_60m", "table2/"])
def test_names_that_do_not_exist_are_explained(name: str) -> None:
    with pytest.raises(UserError, match=r"table2/NAME \(52 of them\)"):
        compose([f"experiment={name}"])


def test_a_near_name_is_offered() -> None:
    with pytest.raises(UserError, match="Did you mean table2/alice_60m"):
        compose(["experiment=table2/alice_60"])
