"""Malformed command lines: every one ends in a sentence that names the setting, before anything is computed."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from pretraining.config import CONFIGS, RULES, choices, compose, validate
from pretraining.restore import evaluate_saved
from pretraining.trainer import train

from .pretraining.test_trainer import ALICE, TINY
from .test_malformed import ROOT, open_cases, refused

SHORT = ["trainer.steps=1", "trainer.eval_every=1", "trainer.save_every=0", "trainer.sample_tokens=2"]


@cache
def base() -> DictConfig:
    cfg = compose([*TINY, *ALICE, *SHORT, "run_dir=unused"])
    validate(cfg)
    return cfg


def attempt(*overrides: str, run_dir: Path) -> None:
    """All of train.py, as the command line asks for it."""
    cfg = compose([*TINY, *ALICE, *SHORT, f"run_dir={run_dir}", *overrides])
    validate(cfg)
    train(cfg)


def attempt_value(override: str, run_dir: Path) -> None:
    """The same for one value, read by Hydra's own parser but without composing anew, which takes most of the time."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    cfg = base().copy()
    cfg.run_dir = str(run_dir)
    parsed = OverridesParser.create().parse_override(override)
    OmegaConf.update(cfg, parsed.key_or_group, parsed.value(), merge=True)
    validate(cfg)
    train(cfg)


# The command line itself ----------------------------------------------------------------------------------------------

DELETED = (
    *("trainer", "data", "model", "optimizer", "seed", "tokenizer", "run_dir", "eval", "tracker", "recipe"),
    *("trainer.steps", "trainer.precision", "trainer.device", "trainer.resume", "trainer.save_model"),
    *("data.kind", "data.length", "data.rows", "data.seed", "data.attention", "data.shuffle_buffer"),
    *("data.protocol", "data.validation_max_tokens", "eval.batch_size", "eval.ngrams", "tracker.name"),
    *("model.name", "model.hidden_size", "model.vocab_size", "model.rms_norm_eps", "model.tokenizer"),
    *("model.tie_word_embeddings", "optimizer.lr", "optimizer.name"),
)
# override: words of the message
GRAMMAR: dict[str, str] = {
    "loose": "'loose'",
    "=1": "'=1'",
    "trainer.steps": "'trainer.steps'",
    "trainer.steps=[1": "'trainer.steps=[1'",
    "trainer.steps={a": "'trainer.steps={a'",
    "trainer.steps='1": "trainer.steps='1",
    "tokenizer=${x": "'tokenizer=${x'",
    "seed=int(abc)": "'seed=int(abc)'",
    "seed=五": "'seed=五'",
    "seed=１": "'seed=１'",
    "trainer.stéps=1": "'trainer.stéps=1'",
    "optimizer=álice": "There is no optimizer=álice. Did you mean alice",
    "seed=\ud800": "seed=",
    "seed=a\0b": "seed=",
    "seed=1,2": "one configuration",
    "seed=range(1,3)": "one configuration",
    "seed=choice(1,2)": "one configuration",
    "seed=interval(0,1)": "one configuration",
    "seed=glob(*)": "one configuration",
    "optimizer=adam,racs": "one configuration",
    "trainer.step=1": "'trainer.step'. Did you mean 'trainer.steps'",
    "trainer.steps.x=1": "'trainer.steps.x'",
    "lr=1": "'lr'. Did you mean 'optimizer.lr'",
    "Trainer.steps=1": "'Trainer.steps'",
    "nothing.at.all=1": "'nothing.at.all'",
    "~nothing": "~nothing: settings cannot be removed",
    "~trainer.steps\r\n": "'~trainer.steps\\r\\n'",
    "optimizer=alice\r": "'optimizer=alice\\r'",
    "optimizer=alicia": "There is no optimizer=alicia. Did you mean alice",
    "model=llama_2t": "There is no model=llama_2t",
    "data=C4": "There is no data=C4",
    "experiment=slow": "There is no experiment=slow",
    "recipe=alice-llama_tin": "There is no recipe=alice-llama_tin",
    "recipe=adam-llama_tiny": "recipe=adam-llama_tiny holds hyper-parameters of optimizer=adam",
    "optimizer=../model/llama_1b": "optimizer=../model/llama_1b",
    "optimizer=''": "optimizer=",
    "optimizer=null": "optimizer",
    "optimizer=[]": "optimizer",
    "optimizer=5": "optimizer",
    "model=''": "model=",
    "model=5": "model",
    "data=null": "data",
    "data=5": "data",
    "recipe=null": "recipe",
    "experiment=null": "experiment",
    "paths=null": "paths",
    "optimizer.betas={a:1}": "optimizer.betas",
    "trainer=[]": "trainer",
    "trainer=5": "trainer",
    "trainer=null": "trainer",
    "eval=3": "eval",
    "tracker=none": "tracker",
    **{f"~{key}": key for key in DELETED},
}


@pytest.mark.parametrize("override", open_cases("grammar", GRAMMAR))
def test_a_command_line_that_cannot_be_composed(tmp_path: Path, override: str) -> None:
    refused(lambda: attempt(override, run_dir=tmp_path / "run"), GRAMMAR[override])
    assert not (tmp_path / "run/config.yaml").exists()


# Values ---------------------------------------------------------------------------------------------------------------

VALUES: dict[str, str] = {
    # interpolations
    "tokenizer=${nowhere}": "tokenizer",
    "seed=${seed}": "seed",
    "seed=${oc.env:NO_SUCH_VARIABLE}": "NO_SUCH_VARIABLE",
    "run_dir=${trainer.steps.x}": "run_dir",
    "data.length=${trainer}": "data.length must be a whole number of at least 2",
    "seed=${no_such_resolver:1}": "no_such_resolver",
    # other types
    "trainer.steps=": "trainer.steps must be a whole number of at least 1",
    "trainer.steps=null": "trainer.steps must be a whole number of at least 1",
    "trainer.steps=ten": "trainer.steps must be a whole number of at least 1",
    "trainer.steps='5'": "trainer.steps must be a whole number of at least 1",
    "trainer.steps=true": "trainer.steps must be a whole number of at least 1",
    "trainer.steps=1.0": "trainer.steps must be a whole number of at least 1",
    "trainer.steps=[1]": "trainer.steps must be a whole number of at least 1",
    "trainer.steps={a:1}": "trainer.steps must be a whole number of at least 1",
    "trainer.steps={a:{b:[1,{c:2}]}}": "trainer.steps must be a whole number of at least 1",
    "seed=0x10": "seed must be",
    "seed=1_000.5": "seed must be",
    "seed=shuffle(1)": "seed must be a whole number of at least 0",
    "data.rows=[pack]": "data.rows must be one of truncate, pack, not ['pack']",
    "data.rows={a:1}": "data.rows must be one of truncate, pack",
    "run_dir=[a]": "run_dir must be a non-empty text",
    "run_dir={a:b}": "run_dir must be a non-empty text",
    "run_dir=null": "run_dir must be a non-empty text",
    "run_dir=''": "run_dir must be a non-empty text",
    "run_dir='  '": "run_dir must be a non-empty text",
    "tokenizer=5": "tokenizer must be a non-empty text, not 5",
    "tokenizer=[a]": "tokenizer must be a non-empty text",
    "trainer.resume=5": "trainer.resume must be auto, never or the path of a checkpoint, not 5",
    "trainer.resume=null": "trainer.resume must be auto, never or the path",
    "trainer.grad_clip=off": "trainer.grad_clip must be null or a number",
    "trainer.device=tpu": "trainer.device must be one of auto, cpu, cuda",
    "trainer.dry_run=maybe": "trainer.dry_run must be true or false",
    "eval.ngrams=1": "eval.ngrams must be true or false, not 1",
    "optimizer.lr=true": "optimizer.lr must be a number greater than 0",
    "optimizer.lr='0.1'": "optimizer.lr must be a number greater than 0",
    "optimizer.betas=0.9": "optimizer.betas must be a list of 2 or 3 numbers",
    "optimizer.betas=[]": "optimizer.betas must be a list of 2 or 3 numbers",
    "optimizer.betas=[0.9]": "optimizer.betas must be a list of 2 or 3 numbers",
    "optimizer.betas=[0.9,0.9]": "betas = (0.9, 0.9) is out of range",
    "optimizer.betas=[[0.9],0.9,0.9]": "optimizer.betas must be a list of 2 or 3 numbers",
    "optimizer.betas=[true,0.9,0.9]": "optimizer.betas must be a list of 2 or 3 numbers",
    "optimizer.betas=[null,0.9,0.9]": "optimizer.betas must be a list of 2 or 3 numbers",
    "optimizer.eps=[1,2]": "eps",
    "optimizer.eps=[]": "optimizer.eps must be a number at least 0",
    "optimizer.state_dtype=int8": "optimizer.state_dtype must be null or one of",
    "optimizer.state_dtype=[a]": "optimizer.state_dtype must be null or one of",
    # not finite, out of range
    "optimizer.lr=nan": "optimizer.lr must be a number greater than 0",
    "optimizer.lr=inf": "optimizer.lr must be a number greater than 0",
    "optimizer.lr=-inf": "optimizer.lr must be a number greater than 0",
    "optimizer.lr=1e400": "optimizer.lr must be a number greater than 0",
    "optimizer.lr=0": "optimizer.lr must be a number greater than 0",
    "optimizer.lr=-0.0": "optimizer.lr must be a number greater than 0",
    "optimizer.adam_lr=-1": "optimizer.adam_lr must be null or a number",
    "optimizer.betas=[nan,0.9,0.9]": "optimizer.betas must be a list of 2 or 3 numbers",
    "optimizer.betas=[1,0.9,0.9]": "optimizer.betas must be a list of 2 or 3 numbers",
    "optimizer.adam_betas=[0.9,-0.1]": "optimizer.adam_betas must be a list of 2 numbers",
    "optimizer.eps=-1e-9": "optimizer.eps must be a number at least 0",
    "optimizer.eps=nan": "optimizer.eps must be a number at least 0",
    "optimizer.limiter=0.99": "optimizer.limiter must be null or a number at least 1",
    "optimizer.weight_decay=-1": "optimizer.weight_decay must be a number at least 0",
    "optimizer.rank=0": "optimizer.rank must be a whole number of at least 1",
    "optimizer.rank=33": "optimizer.rank (33) is larger than the smaller side",
    "optimizer.leading=9": "optimizer.leading (9) is larger than optimizer.rank (8)",
    "optimizer.switching=never": "optimizer.switching must be one of",
    "optimizer.name=foo": "optimizer=foo",
    "trainer.warmup_fraction=nan": "trainer.warmup_fraction must be a number at least 0 and at most 1",
    "trainer.warmup_fraction=1.01": "trainer.warmup_fraction must be a number at least 0 and at most 1",
    "trainer.min_lr_ratio=-0.1": "trainer.min_lr_ratio must be a number at least 0 and at most 1",
    "trainer.grad_clip=0": "trainer.grad_clip must be null or a number greater than 0",
    "trainer.keep_every=0": "trainer.keep_every must be null or a whole number of at least 1",
    "trainer.batch_size=-6": "trainer.batch_size must be a whole number of at least 1",
    "data.length=1": "data.length must be a whole number of at least 2",
    "data.shuffle_buffer=-1": "data.shuffle_buffer must be a whole number of at least 0",
    "data.workers=-1": "data.workers must be auto or a whole number of at least 0",
    "data.validation_max_tokens=0": "data.validation_max_tokens must be null or a whole number",
    "data.on_error=ignore": "data.on_error must be one of stop, skip",
    "data.attention=none": "data.attention must be one of row, document",
    "data.protocol=published": "data.protocol=published trains on one document a row: set data.rows=truncate",
    "data.kind=parquet": "data.kind is 'parquet'",
    "data.kind=null": "data.kind is None",
    "data.kind=[sample]": "data.kind is ['sample']",
    "data.seed=null": "data.seed must be",
    "data.seed=abc": "data.seed must be",
    "data.seed=-1": "data.seed must be",
    "data.seed=1.5": "data.seed must be",
    "data.seed=[1]": "data.seed must be",
    "seed=-1": "seed must be a whole number of at least 0",
    # too large for this machine or for any
    "seed=18446744073709551616": "seed must be",
    "trainer.steps=99999999999999999999999": "trainer.steps",
    "trainer.batch_size=1000000000000000": "trainer.batch_size",
    "data.length=1000000000000": "data.length",
    "data.length=100000000": "data.length",
    "data.shuffle_buffer=1000000000000": "data.shuffle_buffer",
    "data.workers=100000000": "data.workers",
    "eval.galore_rows=99999999999999999999999": "eval.galore_rows",
    "model.num_hidden_layers=1000000": "model.num_hidden_layers",
    "model.hidden_size=1000000000": "model.hidden_size must be",
    # the model
    "model.hidden_size=0": "model.hidden_size must be a whole number of at least 1",
    "model.hidden_size=33": "model.hidden_size (33) must be a multiple of model.num_attention_heads",
    "model.num_attention_heads=32": "model.hidden_size / model.num_attention_heads is 1",
    "model.num_attention_heads=2.0": "model.num_attention_heads must be a whole number",
    "model.num_hidden_layers=null": "model.num_hidden_layers must be a whole number",
    "model.vocab_size=5": "the tokenizer sample_1k has 1,024 pieces, but llama_tiny has 5",
    "tokenizer=sample_4k": "the tokenizer sample_4k has 4,096 pieces, but llama_tiny has 1,024",
    **{
        f"model.{key}={value}": f"model.{key}"
        for key, values in {
            "rms_norm_eps": ("abc", "-1", "null", "nan", "inf"),
            "rope_theta": ("abc", "0", "-1", "null", "[1]", "nan", "inf"),
            "initializer_range": ("abc", "-1.0", "nan", "null", "1e38"),
            "tie_word_embeddings": ("maybe", "null", "2"),
        }.items()
        for value in values
    },
    # files
    "tokenizer=/nowhere/x.model": "There is no tokenizer at /nowhere/x.model",
    f"tokenizer={ROOT}/README.md": "README.md is not a SentencePiece model",
    f"tokenizer={ROOT}/configs": "configs holds no tokenizer",
    "trainer.resume=nowhere": "nowhere is not a whole checkpoint",
    f"trainer.resume={ROOT}/README.md": "README.md is not a whole checkpoint",
    "trainer.resume='a\0b'": "is not a whole checkpoint",
    f"run_dir={ROOT}/README.md": "README.md cannot be written",
    f"run_dir={ROOT}/README.md/x": "cannot be written",
    f"run_dir={'x' * 300}": "xxx",
    f"run_dir={'x/' * 3000}": "x/x",
    "run_dir='a\0b'": "run_dir",
    # what is written on at every evaluation
    "trainer.sample_prompt=null": "trainer.sample_prompt",
    "trainer.sample_prompt=5": "trainer.sample_prompt",
    "trainer.sample_prompt=[a]": "trainer.sample_prompt",
    "trainer.sample_prompt={a:1}": "trainer.sample_prompt",
    # weights that become infinite without a loss that is
    "optimizer.adam_lr=1e30": "the validation loss is not finite after step 1",
    "optimizer.scale=1e30": "the validation loss is not finite after step 1",
    "optimizer.adam_lr=1e308": "optimizer.adam_lr must be",
    "optimizer.scale=1e308": "optimizer.scale must be",
    "optimizer.weight_decay=1e308": "optimizer.weight_decay must be",
}


@pytest.mark.parametrize("override", open_cases("value", VALUES))
def test_a_value_that_cannot_be_used(tmp_path: Path, override: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(lambda: attempt_value(override, tmp_path / "run"), VALUES[override])
    assert not [name for name in os.listdir(tmp_path) if name not in ("run", "x")]


@pytest.mark.parametrize("rows", ["truncate", "pack"])
def test_an_unusual_value_that_works(tmp_path: Path, rows: str) -> None:
    """The other side of the refusals: what is odd but means something is done."""
    attempt(
        *(f"data.rows={rows}", "trainer.micro_batch_size=1000000000000", "data.validation_max_tokens=1"),
        *("trainer.log_every=1000000000000", "data.length=2", "trainer.warmup_fraction=1"),
        *("optimizer.adam_betas=[0,0]", "eval.batch_size=1000000000000", "trainer.sample_prompt='\ue000 漢字 🙂'"),
        run_dir=tmp_path / "run",
    )
    assert (tmp_path / "run/summary.json").exists()


# Every key ------------------------------------------------------------------------------------------------------------

NONSENSE: tuple[Any, ...] = ({"a": 1}, [{"a": [None]}], float("nan"), "\ud800\0", -(10**30))


@cache
def configurations() -> list[DictConfig]:
    """One for each optimizer and data set, and one for each other door: together they have every key of RULES."""
    found = []
    for group in ("optimizer", "data"):
        for name in choices(group):
            cfg = base().copy()
            cfg[group] = OmegaConf.load(CONFIGS / group / f"{name}.yaml")
            cfg.recipe = "none"
            cfg.optimizer.update({key: 4 for key in ("rank", "leading") if key in cfg.optimizer})
            for key in OmegaConf.missing_keys(cfg):
                OmegaConf.update(cfg, key, 1.0 if key.endswith("lr") else "x")
            found.append(cfg)
    return [*found, *(compose(["checkpoint=x"], root) for root in ("eval", "generate"))]


def having(key: str) -> DictConfig:
    section, _, last = key.rpartition(".")
    for cfg in configurations():
        node = OmegaConf.select(cfg, section) if section else cfg
        if OmegaConf.is_dict(node) and last in node:
            return cfg.copy()
    raise AssertionError(f"{key} is a rule for no configuration")


@pytest.mark.parametrize("key", RULES)
def test_no_key_takes_nonsense(key: str) -> None:
    for value in NONSENSE:
        cfg = having(key)
        section, _, last = key.rpartition(".")
        (OmegaConf.select(cfg, section) if section else cfg)[last] = value
        if key in TAKES and isinstance(value, TAKES[key]):
            continue
        refused(lambda cfg=cfg: validate(cfg), key)


TAKES: dict[str, tuple[type, ...]] = {  # any text, any number, any mapping: what is wrong with it is found later
    **{
        key: (str,)
        for key in (
            "run_dir",
            "checkpoint",
            "paths.runs",
            "tokenizer",
            "trainer.resume",
            "optimizer.target",
            "data.text_column",
        )
    },
    **{key: (str,) for key in ("data.train_files", "data.name")},
    "prompt": (str, int, float),
    "trainer.sample_prompt": (str,),
    "optimizer.options": (dict,),
}


# The other doors ------------------------------------------------------------------------------------------------------

OTHERS: dict[str, str] = {
    "checkpoint=null": "checkpoint",
    "checkpoint=5": "checkpoint",
    "checkpoint=[a]": "checkpoint",
    "checkpoint={a:1}": "checkpoint",
    "checkpoint=''": "checkpoint",
    "checkpoint=nowhere": "nowhere is not a run folder",
    f"checkpoint={ROOT}/README.md": "README.md is not a run folder",
    f"checkpoint={'x' * 300}": "xxx",
    "checkpoint='a\0b'": "checkpoint",
    "precision=fp16": "precision must be one of",
    "device=tpu": "device must be one of",
    "eval.batch_size=0": "eval.batch_size must be",
    "eval.galore_rows=1.5": "eval.galore_rows must be",
    "tokenizer=5": "tokenizer must be a non-empty text",
}


@pytest.mark.parametrize("override", open_cases("eval", OTHERS))
def test_what_eval_cannot_use(override: str) -> None:
    def attempt() -> None:
        cfg = compose(["checkpoint=nowhere", override], root="eval")
        validate(cfg)
        evaluate_saved(cfg)

    refused(attempt, OTHERS[override])


CASES = [
    *(f"grammar, {name}" for name in GRAMMAR),
    *(f"value, {name}" for name in VALUES),
    *(f"eval, {name}" for name in OTHERS),
]
