"""What the command line composes: the paper's numbers by themselves, and one sentence for every mistake."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from data.errors import UserError
from optimizers import METHODS, create
from pretraining import config
from pretraining.config import CONFIGS, choices, compose, run_door, validate
from pretraining.model import build_model
from pretraining.settings import comments

TABLES = json.loads((CONFIGS.parent / "results" / "paper" / "tables.json").read_text())
SIZES = {"60M": "llama_60m", "130M": "llama_130m", "350M": "llama_350m", "1.3B": "llama_1b"}
PAPER_METHODS = ("adam", "galore", "fira", "racs", "alice", "alice_0")
QUICK = ["experiment=quickstart"]


# ---------------------------------------------------------------------------------------------- the paper's recipes


def published(method: str, size: str) -> dict[str, Any]:
    """Keys of cfg.optimizer with the values of the method's table."""
    if method == "adam":
        row = dict(zip(TABLES["table8"]["columns"], TABLES["table8"]["rows"][size], strict=True))
        return {"lr": row["learning_rate"], "betas": [row["beta1"], row["beta2"]], "weight_decay": 0}
    if method == "racs":
        row = dict(zip(TABLES["table9"]["columns"], TABLES["table9"]["rows"][size], strict=True))
        return {
            "lr": row["learning_rate"],
            "beta": row["beta"],
            "scale": row["alpha"],
            "limiter": 1.01,
            "iterations": 5,
        }
    if method in ("galore", "fira"):
        row = dict(zip(TABLES["table7"]["columns"], TABLES["table7"]["rows"][size], strict=True))
        return {
            "lr": row["learning_rate"],
            "scale": row["update_scale"],
            "rank": row["rank"],
            "update_interval": row["update_interval"],
        }
    row = dict(zip(TABLES["table11"]["columns"], TABLES["table11"]["rows"][size], strict=True))
    tracked = method == "alice"
    return {
        "lr": row["learning_rate"],
        "scale": row["alpha"],
        "compensation_scale": row["alpha_c"],
        "betas": [row["beta1"], row["beta2"], row["beta3"] if tracked else 0],
        "update_interval": row["K"],
        "rank": row["rank"],
        "leading": row["l"],
        "limiter": 1.01,
        "tracking": tracked,
    }


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", PAPER_METHODS)
def test_recipe_holds_the_numbers_of_the_paper(method: str, size: str) -> None:
    cfg = compose([f"optimizer={method}", f"model={SIZES[size]}"])
    validate_except_data(cfg)
    assert cfg.recipe == f"{method}-{SIZES[size]}"
    for key, value in published(method, size).items():
        assert cfg.optimizer[key] == value, key
    architecture = dict(zip(TABLES["table10"]["columns"], TABLES["table10"]["rows"][size], strict=True))
    assert cfg.trainer.steps == architecture["steps"]
    assert (cfg.trainer.batch_size, cfg.trainer.warmup_fraction, cfg.trainer.min_lr_ratio) == (512, 0.1, 0.1)
    assert cfg.trainer.steps * 512 * 256 / 1e9 == pytest.approx(architecture["tokens_B"], abs=0.1)
    assert cfg.optimizer.adam_lr is None and cfg.optimizer.last_layer == "adam" and cfg.optimizer.weight_decay == 0


@pytest.mark.parametrize("size", SIZES)
def test_model_shapes_are_table_10_with_its_misprint_corrected(size: str) -> None:
    row = dict(zip(TABLES["table10"]["columns"], TABLES["table10"]["rows"][size], strict=True))
    row |= {key: value for key, value in TABLES["table10"]["corrections"].get(size, {}).items() if key in row}
    model = compose([f"model={SIZES[size]}"]).model
    assert (model.hidden_size, model.intermediate_size, model.num_attention_heads, model.num_hidden_layers) == (
        row["hidden"],
        row["intermediate"],
        row["heads"],
        row["layers"],
    )


@pytest.mark.parametrize("method", ["adam", "adamw"])
def test_betas_of_adam_are_those_of_every_parameter(method: str) -> None:
    cfg = compose([f"optimizer={method}", "optimizer.betas=[0.8,0.9]", "optimizer.eps=1e-6"])
    assert cfg.optimizer.adam_betas == [0.8, 0.9] and cfg.optimizer.adam_eps == 1e-6
    cfg = compose([f"optimizer={method}", "optimizer.adam_betas=[0.8,0.9]"])
    assert cfg.optimizer.betas == [0.9, 0.999]


def test_the_command_the_project_exists_for() -> None:
    cfg = compose(["optimizer=alice", "model=llama_1b"])
    o, t = cfg.optimizer, cfg.trainer
    assert (o.lr, o.rank, o.leading, o.scale, o.compensation_scale) == (0.02, 512, 160, 0.25, 0.2)
    assert (t.steps, t.batch_size, t.precision, t.eval_every) == (100_000, 512, "bf16", 500)
    assert cfg.tokenizer == "t5-base" and cfg.run_dir == "runs/paper/llama_1b-alice-s42"


@pytest.mark.parametrize(("method", "model"), [*((name, "llama_tiny") for name in METHODS), ("alice", "llama_tiny_4k")])
def test_quickstart_finds_the_recipe_of_its_method_and_model(method: str, model: str) -> None:
    given = ["optimizer.target=torch.optim.RMSprop", "optimizer.lr=0.01"] if method == "any" else []
    cfg = compose([*QUICK, f"optimizer={method}", f"model={model}", *given])
    validate_except_data(cfg)
    assert cfg.recipe == f"{method}-{model}" and cfg.optimizer.name == method
    assert cfg.trainer.steps == 300 and cfg.trainer.batch_size == 16 and cfg.trainer.precision == "auto"
    assert cfg.tokenizer == {"llama_tiny": "sample_1k", "llama_tiny_4k": "sample_4k"}[model]
    assert cfg.run_dir == f"runs/quickstart/{model}-{method}-s42"


def test_recipe_files_name_themselves_and_belong_to_existing_choices() -> None:
    for name in choices("recipe"):
        recipe = OmegaConf.load(CONFIGS / "recipe" / f"{name}.yaml")
        assert recipe.recipe == name
        if name != "none":
            method, model = name.rsplit("-", 1)
            assert method in choices("optimizer") and model in choices("model")
            unknown = set(recipe.get("optimizer", {})) - set(OmegaConf.load(CONFIGS / "optimizer" / f"{method}.yaml"))
            assert not unknown, f"{name} sets keys that {method} does not have"


@pytest.mark.parametrize("group", ["model", "optimizer"])
def test_file_and_name_agree(group: str) -> None:
    assert [OmegaConf.load(CONFIGS / group / f"{name}.yaml").name for name in choices(group)] == choices(group)


@pytest.mark.parametrize("method", choices("optimizer"))
def test_optimizer_files_hold_options_that_the_method_takes(method: str) -> None:
    options = OmegaConf.to_container(OmegaConf.load(CONFIGS / "optimizer" / f"{method}.yaml"))
    model = build_model(compose(QUICK).model, device="meta", dtype=torch.float32)
    if method == "any":
        options |= {"target": "torch.optim.RMSprop", "lr": 0.1, "options": {"alpha": 0.5}}
    small = {key: 2 for key in ("rank", "leading") if options.get(key, 1) != 1 and key in options}
    optimizer = create(options.pop("name"), model, verbose=False, **(options | small))
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.parameters()}


OURS = {name: build for name, (build, _) in METHODS.items() if isinstance(build, type)}


@pytest.mark.parametrize("method", OURS)
def test_optimizer_files_and_signatures_have_the_same_defaults(method: str) -> None:
    options = OmegaConf.to_container(OmegaConf.load(CONFIGS / "optimizer" / f"{method}.yaml"))
    preset = METHODS[method][1]
    # what a name stands for, beyond the options that make it: the paper's or the published code's values
    own = {
        "alice_0": {"betas": [0.9, 0.9, 0.0]},
        "apollo_mini": {"scale": 11.3137085},
        "muon_paper": {"ns_dtype": "float32"},
    }.get(method, {})
    for name, parameter in inspect.signature(OURS[method]).parameters.items():
        if name == "seed":
            assert options.pop(name) == "${seed}"  # the run's, so that repetitions draw other directions
        elif name != "params":
            default = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
            assert options.pop(name) == own.get(name, preset.get(name, default)), name
    assert set(options) == {"name", "last_layer", "adam_lr", "adam_betas", "adam_eps", "adam_state_dtype"}


def test_every_method_has_a_file_and_a_quickstart_recipe() -> None:
    assert sorted(METHODS) == choices("optimizer")
    recipes = set(choices("recipe"))
    assert not {f"{name}-{model}" for name in METHODS for model in ("llama_tiny", "llama_tiny_4k")} - recipes


COMPARED = {"adam", "alice", "alice_0", "muon", "racs"}  # whose rates are those of make compare, with 300 steps


@pytest.mark.parametrize("method", sorted(set(METHODS) - COMPARED - {"any"}))
def test_quickstart_rates_are_the_best_of_the_survey(method: str) -> None:
    records = (CONFIGS.parent / "results" / "runs" / "all").glob(f"{method}-lr*/summary.json")
    best = min(records, key=lambda file: json.loads(file.read_text())["perplexity"])
    ran = OmegaConf.load(best.parent / "config.yaml").optimizer
    recipe = OmegaConf.load(CONFIGS / "recipe" / f"{method}-llama_tiny.yaml").optimizer
    assert (recipe.lr, recipe.adam_lr) == (ran.lr, ran.adam_lr)


def test_experiments_set_no_hyper_parameters_of_methods() -> None:
    for name in choices("experiment"):
        experiment = OmegaConf.load(CONFIGS / "experiment" / f"{name}.yaml")
        assert experiment.experiment_name == name
        assert not {"optimizer", "recipe"} & set(experiment), name
        assert not {"warmup_fraction", "min_lr_ratio"} & set(experiment.get("trainer", {})), name


# ---------------------------------------------------------------------------------------------- precedence


def test_the_command_line_beats_recipe_and_experiment() -> None:
    cfg = compose(
        [
            *QUICK,
            "optimizer.lr=0.123",
            "optimizer.rank=7",
            "trainer.steps=9",
            "trainer.precision=fp32",
            "trainer.eval_every=3",
            "tokenizer=t5-base",
            "data=c4",
            "run_dir=elsewhere",
        ]
    )
    assert (cfg.optimizer.lr, cfg.optimizer.rank, cfg.trainer.steps) == (0.123, 7, 9)
    assert (cfg.trainer.precision, cfg.trainer.eval_every, cfg.tokenizer, cfg.run_dir) == (
        "fp32",
        3,
        "t5-base",
        "elsewhere",
    )
    assert cfg.data == compose(["data=c4"]).data


def test_another_recipe_of_the_same_method_can_be_borrowed() -> None:
    cfg = compose(["model=llama_7b", "recipe=alice-llama_1b"])
    validate_except_data(cfg)
    assert (cfg.model.name, cfg.optimizer.rank, cfg.trainer.steps) == ("llama_7b", 512, 100_000)


def test_own_numbers_need_no_recipe() -> None:
    cfg = compose(
        [
            "model=llama_60m",
            "optimizer=muon",
            "recipe=none",
            "optimizer.lr=0.01",
            "trainer.steps=5",
            "trainer.batch_size=4",
        ]
    )
    validate_except_data(cfg)
    assert (cfg.recipe, cfg.optimizer.lr, cfg.trainer.steps) == ("none", 0.01, 5)


# ---------------------------------------------------------------------------------------------- mistakes


def validate_except_data(cfg: DictConfig) -> None:
    """`validate`, whatever a data set still wants to be told (c4_local needs a path)."""
    cfg = cfg.copy()
    cfg.data = {}
    validate(cfg)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer=soapy"], ["optimizer=soapy", "mean soap?", "adam_mini, adamw, alice, alice_0", "racs"]),
        (["model=llama_2b"], ["model=llama_2b", "Did you mean", "llama_1b", "llama_tiny_4k"]),
        (["experiment=quickstrat"], ["Did you mean quickstart"]),
        (["recipe=alice-llama_1"], ["Did you mean alice-llama_1b"]),
        (["optimizer.learning_rate=1"], ["'optimizer.learning_rate'", "optimizer.lr"]),
        (["trainer.step=1"], ["Did you mean 'trainer.steps'"]),
        (["lr=1"], ["Did you mean 'optimizer.lr'"]),
        (["optimizer=adam", "optimizer.rank=4"], ["'optimizer.rank'", "optimizer.betas"]),
        (["~nothing"], ["~nothing", "cannot be removed"]),
        (["optimizer=adam,racs"], ["one configuration"]),
        (["loose"], ["'loose'", "key=value"]),
    ],
)
def test_what_cannot_be_composed_is_explained(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        compose(overrides)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer.lr=0"], r"optimizer.lr must be a number greater than 0 and at most 1e\+30, not 0"),
        (["optimizer.lr=-0.1"], "optimizer.lr must"),
        (["optimizer.lr=fast"], "optimizer.lr must"),
        (["optimizer.lr=.inf"], "optimizer.lr must"),
        (["optimizer.adam_lr=-1"], "optimizer.adam_lr must be null or a number greater than 0"),
        (["optimizer.betas=[0.9,1.0,0.9]"], "optimizer.betas must"),
        (["optimizer.scale=0"], "optimizer.scale must"),
        (["optimizer.limiter=0.5"], "optimizer.limiter must be null or a number at least 1"),
        (["optimizer.update_interval=0"], "optimizer.update_interval must"),
        (["optimizer.rank=0"], "optimizer.rank must be a whole number of at least 1"),
        (["optimizer.rank=513"], r"optimizer.rank \(513\) is larger .* at most 512"),
        (["optimizer.leading=129"], r"optimizer.leading \(129\) is larger than optimizer.rank \(128\)"),
        (["optimizer.last_layer=galore"], "optimizer.last_layer must be one of adam, candidate"),
        (["optimizer.switching=often"], "optimizer.switching must be one of"),
        (["optimizer.tracking=2"], "optimizer.tracking must be true or false"),
        (["trainer.steps=0"], "trainer.steps must"),
        (["trainer.steps=1e4"], "trainer.steps must be a whole number"),
        (
            ["trainer.batch_size=0"],
            "trainer.batch_size must be a whole number of at least 1 and at most 16,777,216, not 0",
        ),
        (["trainer.micro_batch_size=0"], "trainer.micro_batch_size must be auto or a whole number"),
        (["trainer.precision=fp16"], "trainer.precision must be one of bf16, bf16_mixed, fp32, auto"),
        (["trainer.warmup_fraction=1.5"], "trainer.warmup_fraction must"),
        (["trainer.dry_run=maybe"], "trainer.dry_run must be true or false, not 'maybe'"),
        (["trainer.eval_every=null"], "trainer.eval_every must .* not null"),
        (["eval.batch_size=0"], "eval.batch_size must"),
        (["tracker.name=mlflow"], "tracker.name must be one of none, wandb, tensorboard"),
        (["seed=null"], "seed must"),
        (["seed=-1"], "seed must"),
        (["tokenizer=${nowhere}"], "nowhere"),
        (["model.num_attention_heads=7"], "multiple"),
        (
            ["optimizer=lion"],
            "no recipe for optimizer=lion with model=llama_60m.*adam, alice, alice_0, any, apollo.*recipe=none "
            "optimizer.lr=... trainer.steps=... trainer.batch_size=...",
        ),
        (["model=llama_7b"], "no recipe for optimizer=alice with model=llama_7b"),
        (["recipe=adam-llama_60m"], "optimizer=adam, not of optimizer=alice"),
        (
            ["recipe=none"],
            r"trainer.batch_size and trainer.steps have no value: add trainer.batch_size=\.\.\. "
            r"trainer.steps=\.\.\.$",
        ),
    ],
)
def test_what_cannot_work_is_refused(overrides: list[str], words: str) -> None:
    cfg = compose(overrides)
    with pytest.raises(UserError, match=words):
        validate_except_data(cfg)


def test_values_at_the_limits_pass() -> None:
    validate_except_data(
        compose(
            [
                "optimizer.rank=512",
                "optimizer.leading=512",
                "optimizer.compensation_scale=0",
                "optimizer.limiter=1",
                "trainer.steps=1",
                "trainer.batch_size=1",
                "trainer.micro_batch_size=3",
                "trainer.warmup_fraction=0",
                "trainer.min_lr_ratio=1",
                "trainer.grad_clip=1.0",
                "optimizer.adam_lr=0.001",
                "seed=0",
                "optimizer.limiter=null",
            ]
        )
    )


# ---------------------------------------------------------------------------------------------- the door


def door(argv: list[str], root: str = "train") -> list[DictConfig]:
    seen: list[DictConfig] = []
    run_door(seen.append, root, argv)
    return seen


def test_door_hands_over_a_validated_configuration() -> None:
    (cfg,) = door(["optimizer=racs", "model=llama_130m", "trainer.dry_run=true"])
    assert cfg.optimizer.name == "racs" and cfg.trainer.dry_run is True and "hydra" not in cfg


def test_doors_of_evaluation_and_generation() -> None:
    (cfg,) = door(["checkpoint=runs/a b/lr=0.1", "eval.galore_rows=8"], "eval")
    assert cfg.checkpoint == "runs/a b/lr=0.1" and cfg.data is None and cfg.eval.galore_rows == 8
    (cfg,) = door(["checkpoint=x", "data=sample"], "eval")
    expected = compose(["data=sample"]).data
    assert {k: v for k, v in cfg.data.items() if k != "seed"} == {k: v for k, v in expected.items() if k != "seed"}
    (cfg,) = door(["checkpoint=x", 'prompt=Well, it\'s "odd" (a=b) \\'], "generate")
    assert cfg.prompt == 'Well, it\'s "odd" (a=b) \\'
    (cfg,) = door(["checkpoint=x", "prompt='as Hydra quotes'", "top_k=null"], "generate")
    assert cfg.prompt == "as Hydra quotes" and cfg.top_k is None


@pytest.mark.parametrize(
    ("argv", "root", "words"),
    [
        (["optimizer=nope"], "train", "There is no optimizer=nope"),
        (["optimizer=lion"], "train", "no recipe"),
        (["--multirun", "seed=1,2"], "train", "one configuration"),
        (["-m", "seed=1"], "train", "one configuration"),
        (["--verbose"], "train", "--verbose"),
        ([], "eval", "checkpoint has no value: add checkpoint=..."),
        (["++trainer.grad_clp=1.0"], "train", "there is no setting trainer.grad_clp"),
        (["+trainer.micro_batchsize=4"], "train", "there is no setting trainer.micro_batchsize"),
        (["checkpoint=x", "device=null"], "eval", "device must be one of auto, cpu, cuda, not null"),
        (["checkpoint=x", "seed=null"], "generate", "seed must be a whole number"),
        (["checkpoint=x", "temperature=null"], "generate", "temperature must be a number"),
        (["checkpoint=x", "temperature=-1"], "generate", "temperature must"),
        (["checkpoint=x", "eval.batch_size=0"], "eval", "eval.batch_size must"),
    ],
)
def test_mistakes_are_one_sentence_on_stderr_with_exit_code_2(
    argv: list[str], root: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        door(argv, root)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.startswith("error: ") and words in err and len(err.strip().splitlines()) == 1


def test_user_errors_of_the_run_too_and_bugs_keep_their_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(cfg: DictConfig) -> None:
        raise UserError("The shard is empty: replace it.")

    def breaks(cfg: DictConfig) -> None:
        raise ZeroDivisionError

    with pytest.raises(SystemExit) as stop:
        run_door(fails, "train", [])
    assert stop.value.code == 2 and capsys.readouterr().err == "error: The shard is empty: replace it.\n"
    with pytest.raises(ZeroDivisionError):
        run_door(breaks, "train", [])


def test_an_exit_code_is_passed_on() -> None:
    with pytest.raises(SystemExit) as stop:
        run_door(lambda cfg: 3, "train", [])
    assert stop.value.code == 3
    run_door(lambda cfg: 0, "train", [])


@pytest.mark.parametrize("switch", ["HYDRA_FULL_ERROR", "RACS_ALICE_TRACEBACK"])
def test_tracebacks_on_request(switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(switch, "1")
    with pytest.raises(UserError, match="nope"):
        door(["optimizer=nope"])


def test_other_ranks_leave_the_command_line_to_rank_0_but_report_their_own_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(config, "_RANK_DELAY", 0.0)
    with pytest.raises(SystemExit) as stop:
        door(["optimizer=nope"])
    assert stop.value.code == 2 and capsys.readouterr().err == ""

    def fails(cfg: DictConfig) -> None:
        raise UserError("Line 7 is malformed.")

    with pytest.raises(SystemExit) as stop:
        run_door(fails, "train", [])
    assert stop.value.code == 2 and capsys.readouterr().err == "[rank 3] error: Line 7 is malformed.\n"


def test_cfg_job_prints_a_configuration_that_composes_back(capsys: pytest.CaptureFixture[str]) -> None:
    assert door(["optimizer=racs", "--cfg", "job", "--resolve", "optimizer.lr=0.5"]) == []
    printed = OmegaConf.create(capsys.readouterr().out)
    assert printed == OmegaConf.create(
        OmegaConf.to_container(compose(["optimizer=racs", "optimizer.lr=0.5"]), resolve=True)
    )


def test_help_lists_choices_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert door(["--help"]) == []
    out = capsys.readouterr().out
    for word in ("llama_tiny_4k", "alice_0", "quickstart", "trainer:", "micro_batch_size", "--cfg job"):
        assert word in out


def test_help_shows_values_with_what_the_files_say_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert door(["--help", "optimizer=racs", "data=text", "data.path=x", "trainer.keep_last=7"]) == []
    shown = {line.split("  # ")[0].strip(): line.partition("  # ")[2] for line in capsys.readouterr().out.splitlines()}
    assert shown["keep_last: 7"] == "checkpoints kept"
    said = [name.split(":")[0] for name, comment in shown.items() if comment]
    assert {"eval_every", "log_every", "weight_decay", "scale", "attn_implementation", "shuffle_buffer", "runs"} <= {
        *said
    }
    assert "on_error" in said  # of data/text.yaml
    assert not any(line.startswith("rank:") for line in shown)  # nothing of another optimizer's


def test_help_explains_data_by_its_own_file(capsys: pytest.CaptureFixture[str]) -> None:
    for name in choices("data"):
        assert door(["--help", f"data={name}", "data.path=x"] if name != "c4" else ["--help"]) == []
        section = capsys.readouterr().out.partition("\n  data:\n")[2]
        for key, comment in comments({"": CONFIGS / "data" / f"{name}.yaml"}).items():
            assert re.search(rf"^    {key}: .*  # {re.escape(comment)}$", section, re.M), (name, key)


def test_help_of_what_cannot_be_resolved(capsys: pytest.CaptureFixture[str]) -> None:
    assert door(["--help", "data.kind=${nothing}"]) == []
    assert "kind: ${nothing}" in capsys.readouterr().out


def test_every_setting_of_the_trainer_is_explained_in_its_file() -> None:
    found = comments({"": CONFIGS / "train.yaml"})
    cfg = compose(["model=llama_60m"])
    settings = {f"{section}.{name}" for section in ("trainer", "eval", "tracker") for name in cfg[section]}
    assert settings <= found.keys()
    assert found["trainer.keep_last"] == "checkpoints kept"


@pytest.mark.parametrize("name", choices("optimizer"))
def test_every_setting_of_an_optimizer_is_explained_in_its_file(name: str) -> None:
    file = CONFIGS / "optimizer" / f"{name}.yaml"
    assert set(OmegaConf.load(file)) - comments({"": file}).keys() == {"name"}


def test_help_shows_a_list_on_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert door(["--help", "optimizer=alice"]) == []
    out = capsys.readouterr().out
    assert re.search(r"^    betas: \[0\.9, 0\.9, 0\.999\] +# beta_1 of m and p, beta_2 of v, beta_3 of Q~$", out, re.M)
    assert re.search(r"^    adam_betas: \[0\.9, 0\.999\] +# Adam's", out, re.M)


def test_help_prints_a_configuration_that_composes_back(capsys: pytest.CaptureFixture[str]) -> None:
    assert door(["--help", "optimizer=alice"]) == []
    _, _, settings = capsys.readouterr().out.partition("must be given)\n")
    assert OmegaConf.create(textwrap.dedent(settings)) == compose(["optimizer=alice"])


def test_a_door_in_a_shell(tmp_path: Path) -> None:
    """End to end in another folder: configs are found, nothing is written, no traceback, stdout stays clean."""
    script = tmp_path / "door.py"
    script.write_text(
        "import sys; sys.path.insert(0, sys.argv.pop(1))\nfrom pretraining.config import run_door\n"
        "run_door(lambda cfg: print(cfg.optimizer.name), 'train')\n"
    )
    good, bad = (
        subprocess.run(
            [sys.executable, script, CONFIGS.parent, argument],
            cwd=tmp_path,
            text=True,
            capture_output=True,
            timeout=120,
        )
        for argument in ("optimizer=racs", "optimizer=x")
    )
    assert (good.returncode, good.stdout, good.stderr) == (0, "racs\n", "")
    assert bad.returncode == 2 and bad.stdout == "" and "Traceback" not in bad.stderr
    assert bad.stderr.startswith("error: There is no optimizer=x.")
    assert [path.name for path in tmp_path.iterdir()] == ["door.py"]
