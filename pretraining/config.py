"""Composing, checking and explaining a run's configuration: what stands between the shell and the trainer.

    compose(["optimizer=alice", "model=llama_1b"])   the configuration, as Hydra composes it; UserError if it cannot
    validate(cfg)                                     UserError with one sentence for every value that cannot work
    run_door(main, root="train")                      the whole of train.py: shell -> configuration -> main(cfg)

Hydra's compose interface is used rather than its decorator: a door neither changes directory nor writes logs, and a
mistake on the command line ends in one sentence and exit code 2.
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.errors import UserError

from .settings import comments, described
from .signals import LOST_CONTACT, Stopped

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
ROOTS = ("train", "eval", "generate")
SECTIONS = {
    "train": ("trainer", "eval", "tracker", "data", "model", "optimizer", "paths"),
    "eval": ("eval",),
    "generate": (),
}
SHOWN_GROUPS = ("experiment", "model", "optimizer", "data", "recipe")

# Free text and paths may hold what Hydra's grammar reserves (commas, brackets, equals signs): quoted for the user.
TEXT_KEYS = ("prompt", "trainer.sample_prompt")
PATH_KEYS = ("checkpoint", "data.path", "paths.runs", "run_dir", "tokenizer", "trainer.resume")


# ---------------------------------------------------------------------------------------------- composing


def choices(group: str, folders: bool = False) -> list[str]:
    """The files of a config group, by name; with `folders`, those in its folders as well, as folder/name."""
    root = CONFIGS / group
    found = root.rglob("*.yaml") if folders else root.glob("*.yaml")
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in found)


def _listed(group: str) -> str:
    """The choices for people: of a folder and of recipes, only how many there are."""
    if group == "recipe":
        return f"none, METHOD-MODEL ({len(choices(group))} of them, chosen by optimizer= and model=)"
    nested = Counter(name.partition("/")[0] for name in choices(group, folders=True) if "/" in name)
    folders = [f"{folder}/NAME ({count} of them)" for folder, count in sorted(nested.items())]
    return ", ".join([*choices(group), *folders])


def compose(overrides: Iterable[str] = (), root: str = "train") -> DictConfig:
    """The configuration of a door, from `key=value` overrides in Hydra's grammar; not yet validated."""
    from hydra.errors import HydraException

    overrides = list(overrides)
    _check_overrides(overrides)
    try:
        return _compose(overrides, root)
    except UserError:
        raise
    except (HydraException, OmegaConfBaseException, *_OTHERS) as error:
        raise UserError(_explain(error, overrides, root)) from error


# What Hydra lets through where an override has an unexpected form
_OTHERS = (AttributeError, KeyError, RecursionError, TypeError, ValueError)


def _check_overrides(overrides: Sequence[str]) -> None:
    """Refuse what Hydra takes, but nothing here can work with."""
    groups = {path.name for path in CONFIGS.iterdir() if path.is_dir()}
    known: Any = OmegaConf.load(CONFIGS / "train.yaml")
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        section, _, name = key.partition(".")
        if (
            override.startswith("+")
            and name
            and section in ("trainer", "eval", "tracker")
            and name not in known[section]
        ):
            raise UserError(
                f"{override}: there is no setting {key}; without the + the ones that there are would be named."
            )
        if not override.isprintable() and (override.startswith("~") or key in groups or not key.strip()):
            raise UserError(f"Cannot read the argument {override!r}: write settings as key=value.")
        if override.startswith("~"):
            raise UserError(
                f"{override}: settings cannot be removed; leave it out, or give {override.strip('~')} another value."
            )
        if not key.strip():
            raise UserError(f"Cannot read the argument {override!r}: write settings as key=value.")
        if key in groups and "," in value:
            raise UserError(_NO_SWEEP)
        if key in groups and value not in choices(key, folders=True) and (key, value) != ("recipe", "none"):
            raise UserError(_no_choice(key, value))


def _with_hydra(overrides: list[str], root: str) -> DictConfig:
    """The configuration as Hydra composes it, its own section included."""
    import hydra

    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose(root, overrides, return_hydra_config=True)


def _compose(overrides: list[str], root: str) -> DictConfig:
    cfg = _with_hydra(overrides, root)
    chosen = cfg.hydra.runtime.choices.get("recipe")
    cfg = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    for section in SECTIONS[root]:
        if not OmegaConf.is_dict(cfg.get(section)):
            raise UserError(f"{section} is a group of settings: set them one by one, as in {section}.NAME=VALUE.")
    # The recipe is optional for Hydra, so that a pair without one composes and can be explained by `validate`; a
    # mistyped `recipe=` would vanish silently the same way.
    if chosen is not None and f"{cfg.optimizer.name}-{cfg.model.name}" != chosen and chosen not in choices("recipe"):
        raise UserError(_no_choice("recipe", str(chosen)))
    return cfg


def _no_choice(group: str, name: str) -> str:
    near = difflib.get_close_matches(name, choices(group, folders=True), n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"There is no {group}={name}.{hint} Choices: {_listed(group) or 'none'}."


def _explain(error: Exception, overrides: list[str], root: str) -> str:
    """One sentence for what Hydra says in several lines."""
    from hydra.errors import MissingConfigException, OverrideParseException

    text = str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and "/" in error.missing_cfg_file:
        return _no_choice(*error.missing_cfg_file.removesuffix(".yaml").strip("/").split("/", 1))
    if isinstance(error, OverrideParseException):
        return (
            f"Cannot read the argument {error.override!r}: write settings as key=value, and quote values that hold "
            "spaces, commas or brackets, as in \"key='a, b'\"."
        )
    if "Ambiguous value for argument" in text or "requires --multirun" in text:
        return _NO_SWEEP
    unknown = re.search(r"Could not override '([^']+)'|Could not delete from config\. '([^']+)' does not exist", text)
    if unknown:
        return _no_setting(unknown[1] or unknown[2], overrides, root)
    what = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    return (
        f"Cannot compose the configuration from {' '.join(overrides)}: {what}; correct or leave out what does not fit."
    )


def _no_setting(key: str, overrides: list[str], root: str) -> str:
    """`key` is not in the configuration: say what is there instead."""
    others = [o for o in overrides if o.lstrip("+~").split("=", 1)[0].split("@", 1)[0] != key]
    message = f"There is no setting {key!r}."
    try:
        cfg = compose(others, root)
    except UserError:
        return f"{message} {Path(sys.argv[0]).name} --help lists the settings."
    parents = key.split(".")[:-1]
    node: Any = cfg
    while parents and OmegaConf.select(cfg, ".".join(parents), throw_on_missing=False) is None:
        parents.pop()
    if parents:
        node = OmegaConf.select(cfg, ".".join(parents))
    if not OmegaConf.is_dict(node):
        return f"{message} {'.'.join(parents)!r} is a single value."
    prefix = "".join(f"{part}." for part in parents)
    names = [prefix + str(name) for name in node]
    settings = _flat(OmegaConf.to_container(cfg))
    last = key.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(key, [*names, *settings, *SHOWN_GROUPS], n=1) or [
        name for name in settings if name.rsplit(".", 1)[-1] == last
    ]
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{message}{hint} There are: {', '.join(names)}."


def _flat(node: Any, name: str = "") -> list[str]:
    """The dotted names of all single values."""
    if not isinstance(node, dict) or not node:
        return [name]
    return [leaf for key, child in node.items() for leaf in _flat(child, f"{name}.{key}" if name else str(key))]


# ---------------------------------------------------------------------------------------------- checking


def _whole(low: int, high: int = 10**15) -> tuple[Callable[[Any], bool], str]:
    """`high` is far beyond use: what would take all memory, or for ever, is a slip of the keyboard."""
    return (
        lambda x: isinstance(x, int) and not isinstance(x, bool) and low <= x <= high,
        f"a whole number of at least {low}" + (f" and at most {high:,}" if high != 10**15 else ""),
    )


def _number(
    low: float, high: float = math.inf, *, open_low: bool = False, open_high: bool = False
) -> tuple[Callable[[Any], bool], str]:
    def holds(x: Any) -> bool:
        return (
            isinstance(x, (int, float))
            and not isinstance(x, bool)
            and math.isfinite(x)
            and (x > low if open_low else x >= low)
            and (x < high if open_high else x <= high)
        )

    words = f"greater than {low:g}" if open_low else f"at least {low:g}"
    if high < math.inf:
        words += f" and {'below' if open_high else 'at most'} {high:g}"
    return holds, f"a number {words}"


def _one_of(*names: str) -> tuple[Callable[[Any], bool], str]:
    return lambda x: x in names, f"one of {', '.join(names)}"


def _or(other: Any, rule: tuple[Callable[[Any], bool], str]) -> tuple[Callable[[Any], bool], str]:
    return (
        lambda x: (x is None if other is None else x == other) or rule[0](x),
        f"{'null' if other is None else other} or {rule[1]}",
    )


_FLAG = (lambda x: isinstance(x, bool), "true or false")
_TEXT = (lambda x: isinstance(x, str) and bool(x.strip()), "a non-empty text")
_PATH = (
    lambda x: (
        isinstance(x, str) and bool(x.strip()) and "\0" not in x and len(x) < 4096 and max(map(len, x.split("/"))) < 256
    ),
    "a non-empty text, with fewer than 256 characters between slashes",
)
_LARGEST = 1e30  # of factors: float32 ends at 3e38
_SEED = (_whole(0, 2**63 - 1)[0], "a whole number of at least 0 and below 2^63")
_WRITING = ("seed", "tokens", "temperature")  # of generate.py: no run has them
_RATE = _number(0, _LARGEST, open_low=True)


def _betas(low: int, high: int) -> tuple[Callable[[Any], bool], str]:
    return (
        lambda x: (
            isinstance(x, list) and low <= len(x) <= high and all(_number(0, 1, open_high=True)[0](beta) for beta in x)
        ),
        f"a list of {low if low == high else f'{low} or {high}'} numbers of at least 0 and below 1",
    )


_PRECISION = _one_of("bf16", "bf16_mixed", "fp32", "auto")
_DEVICE = _one_of("auto", "cpu", "cuda")

# Every key that can be wrong on its own. A rule applies where its key exists, whichever door or method has it; what
# only makes sense between two keys is in `validate`.
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed": _SEED,
    "run_dir": _PATH,
    "checkpoint": _PATH,
    "json": _or(None, _PATH),
    "paths.runs": _PATH,
    "tokenizer": _TEXT,
    "precision": _PRECISION,
    "device": _DEVICE,
    "prompt": (lambda x: isinstance(x, (str, int, float)), "a text"),
    "tokens": _whole(1),
    "temperature": _number(0),
    "top_k": _whole(1),
    "trainer.steps": _whole(1, 10**9),
    "trainer.batch_size": _whole(1, 2**24),
    "trainer.micro_batch_size": _or("auto", _whole(1)),
    "trainer.precision": _PRECISION,
    "trainer.loss": _one_of("full", "chunked", "liger"),
    "trainer.compile": _FLAG,
    "trainer.compile_optimizer": _FLAG,
    "trainer.layerwise": _FLAG,
    "trainer.parallel": _one_of("ddp", "fsdp2"),
    "trainer.shard_optimizer": _FLAG,
    "trainer.shard_group": _one_of("all", "node"),
    "trainer.device": _DEVICE,
    "trainer.warmup_fraction": _number(0, 1),
    "trainer.min_lr_ratio": _number(0, 1),
    "trainer.grad_clip": _or(None, _number(0, open_low=True)),
    "trainer.eval_every": _whole(1),
    "trainer.save_every": _whole(0),
    "trainer.keep_last": _whole(1),
    "trainer.keep_every": _or(None, _whole(1)),
    "trainer.on_nonfinite": _one_of("stop", "skip"),
    "trainer.max_skipped": _whole(0),
    "trainer.log_every": _whole(1),
    "trainer.resume": (lambda x: isinstance(x, str) and bool(x), "auto, never or the path of a checkpoint"),
    "trainer.dry_run": _FLAG,
    "trainer.save_model": _FLAG,
    "data.length": _whole(2, 2**20),
    "data.rows": _one_of("truncate", "pack"),
    "data.seed": _SEED,
    "data.shuffle_buffer": _whole(0, 10**8),
    "data.validation_max_tokens": _or(None, _whole(1)),
    "data.protocol": _one_of("exact", "published"),
    "data.attention": _one_of("row", "document"),
    "data.on_error": _one_of("stop", "skip"),
    "data.workers": _or("auto", _whole(0, 1024)),
    "data.retries": _whole(0),
    "data.timeout": _number(0, open_low=True),
    "data.published_workers": _whole(1, 1024),
    "data.published_batch": _or(None, _whole(1)),
    "eval.ngrams": _FLAG,
    "trainer.sample_tokens": _whole(0),
    "trainer.sample_prompt": (lambda x: isinstance(x, str), "a text"),
    "eval.batch_size": _whole(1),
    "eval.galore_rows": _whole(1),
    "tracker.name": _one_of("none", "wandb", "tensorboard"),
    "tracker.mode": _one_of("offline", "online"),
    "model.rms_norm_eps": _number(0, 1, open_low=True),
    "model.rope_theta": _number(0, _LARGEST, open_low=True),
    "model.initializer_range": _number(0, 1e3),
    "model.tie_word_embeddings": _FLAG,
    "model.attn_implementation": _one_of("auto", "sdpa", "eager"),
    "optimizer.lr": _RATE,
    "optimizer.adam_lr": _or(None, _RATE),
    "optimizer.last_layer": _one_of("adam", "candidate"),
    "optimizer.betas": _betas(2, 3),
    "optimizer.adam_betas": _betas(2, 2),
    "optimizer.beta": _or(None, _number(0, 1, open_high=True)),
    "optimizer.momentum": _number(0, 1, open_high=True),
    "optimizer.eps": (
        lambda x: all(_number(0)[0](e) for e in (x if isinstance(x, list) and len(x) == 2 else [x])),
        "a number at least 0 (two of them for adafactor)",
    ),
    "optimizer.adam_eps": _number(0),
    "optimizer.weight_decay": _number(0, _LARGEST),
    "optimizer.scale": _number(0, _LARGEST, open_low=True),
    "optimizer.compensation_scale": _number(0, _LARGEST),
    "optimizer.limiter": _or(None, _number(1)),
    "optimizer.iterations": _whole(1),
    "optimizer.ns_steps": _whole(1),
    "optimizer.rank": _whole(1),
    "optimizer.leading": _whole(0),
    "optimizer.update_interval": _whole(1),
    "optimizer.nesterov": _FLAG,
    "optimizer.tracking": _FLAG,
    "optimizer.fix_signs": _FLAG,
    "optimizer.log_basis": _FLAG,
    "optimizer.switching": _one_of("none", "complement", "full_basis", "gaussian_mix", "gaussian"),
    "optimizer.compensation": _one_of("none", "optimal", "fira", "fira_plus", "columns"),
    "optimizer.right_rank": _or(None, _whole(1)),
    "optimizer.initial_basis": _one_of("evd", "gaussian", "zeros"),
    "optimizer.tracking_basis": _one_of("printed", "rotated"),
    "optimizer.update_times": _or(None, _one_of("printed", "zero_based")),
    "optimizer.state_dtype": _or(None, _one_of("bfloat16", "float32", "float64", "8bit")),
    "optimizer.adam_state_dtype": _or(None, _one_of("bfloat16", "float32", "float64")),
    "optimizer.products": _one_of("float32", "bfloat16"),
    "optimizer.seed": _SEED,
    "optimizer.adjust_lr_fn": _one_of("original", "match_rms_adamw", "none"),
    "optimizer.bias_correction": _FLAG,
    "optimizer.square": _one_of("rows", "columns"),
    "optimizer.residual": _one_of("exact", "scaled"),
    "optimizer.projection": _one_of("gaussian", "svd"),
    "optimizer.scaling": _one_of("columns", "tensor"),
    "optimizer.store_projection": _FLAG,
    "optimizer.gamma": _number(0, open_low=True),
    "optimizer.estimator": _one_of("hutchinson", "gauss_newton_bartlett"),
    "optimizer.target": _TEXT,
    "optimizer.options": (lambda x: isinstance(x, dict), "a mapping of the class's keywords"),
    "optimizer.scale_parameter": _FLAG,
    "optimizer.clip_threshold": _number(0, open_low=True),
    "optimizer.beta1": _or(None, _number(0, 1, open_high=True)),
    "optimizer.solver": _one_of("newton_schulz", "evd"),
    "optimizer.orthogonalization": _one_of("quintic", "newton_schulz", "evd"),
    "optimizer.ns_dtype": _one_of("bfloat16", "float32"),
    "optimizer.power": (lambda x: x in (0.25, 0.5), "0.25 or 0.5"),
    "optimizer.form": _one_of("paper", "published"),
}


def validate(cfg: DictConfig) -> None:
    """Raise UserError for the first thing in `cfg` that cannot work, in one sentence that says what to do."""
    training = "optimizer" in cfg and "model" in cfg
    if training:
        _check_recipe(cfg)
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        OmegaConf.to_container(cfg, resolve=True)
    except (OmegaConfBaseException, *_OTHERS) as error:
        raise UserError(
            f"Cannot resolve {_unresolved(cfg)} ({str(error).strip().splitlines()[0]}): correct what ${{...}} refers to."
        ) from error
    if missing:
        raise UserError(
            f"{' and '.join(missing)} {'has' if len(missing) == 1 else 'have'} no value: add "
            f"{' '.join(f'{key}=...' for key in missing)}"
        )
    for key, (holds, words) in RULES.items():
        node = OmegaConf.select(cfg, key.rpartition(".")[0]) if "." in key else cfg
        if not OmegaConf.is_dict(node) or key.rpartition(".")[2] not in node:
            continue
        value = OmegaConf.select(cfg, key)
        value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        # In the other doors null is the run's own value, where it has one.
        needed = training or key in ("checkpoint", "device") or ("prompt" in cfg and key in _WRITING)
        if not holds(value) and (value is not None or needed):
            shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
            raise UserError(f"{key} must be {words}, not {shown}.")
    if training:
        from pretraining.model import check_model

        check_model(cfg.model)
        _check_rank(cfg)
        if OmegaConf.is_list(cfg.optimizer.get("eps")) and cfg.optimizer.name != "adafactor":
            raise UserError(f"optimizer.eps must be one number for optimizer={cfg.optimizer.name}.")


def _unresolved(cfg: DictConfig) -> str:
    """The first setting whose interpolations cannot be filled in."""
    for key in _flat(OmegaConf.to_container(cfg)):
        try:
            OmegaConf.select(cfg, key)
        except (OmegaConfBaseException, *_OTHERS):
            return key
    return "the configuration"


def _check_recipe(cfg: DictConfig) -> None:
    method, size, recipe = cfg.optimizer.name, cfg.model.name, cfg.get("recipe")
    if recipe == "none":
        return
    pairs = [tuple(name.rsplit("-", 1)) for name in choices("recipe") if "-" in name]
    if recipe is None:
        methods, sizes = ([p[0] for p in pairs if p[1] == size], [p[1] for p in pairs if p[0] == method])
        raise UserError(
            f"There is no recipe for optimizer={method} with model={size}: the paper gives no hyper-parameters for this "
            f"pair. Recipes for model={size}: {', '.join(methods) or 'none'}; for optimizer={method}: "
            f"{', '.join(sizes) or 'none'}. To use your own numbers, pass recipe=none optimizer.lr=... "
            "trainer.steps=... trainer.batch_size=..."
        )
    owner = recipe.rsplit("-", 1)[0]
    if owner != method:
        raise UserError(
            f"recipe={recipe} holds hyper-parameters of optimizer={owner}, not of optimizer={method}: choose "
            f"a recipe of {method}, or pass recipe=none with your own numbers."
        )


def _check_rank(cfg: DictConfig) -> None:
    rank, leading = cfg.optimizer.get("rank"), cfg.optimizer.get("leading")
    if rank is None:
        return
    side = min(cfg.model.hidden_size, cfg.model.intermediate_size)
    if rank > side:
        raise UserError(
            f"optimizer.rank ({rank}) is larger than the smaller side of the matrices of model="
            f"{cfg.model.name} ({side}): choose at most {side}."
        )
    if leading is not None and leading > rank:
        raise UserError(
            f"optimizer.leading ({leading}) is larger than optimizer.rank ({rank}): the leading directions "
            "are a part of the basis, so choose at most the rank."
        )


# ---------------------------------------------------------------------------------------------- the door

_NO_SWEEP = (
    "A door runs one configuration: under a launcher, a sweep inside the process hangs its ranks. "
    "Start one command per configuration."
)
_RANK_DELAY = 3.0  # seconds in which a launcher has stopped the other ranks, if rank 0 failed as well


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message[:1].upper()}{message[1:]}: write settings as key=value; --help lists them.")


def run_door(function: Callable[[DictConfig], Any], root: str = "train", argv: Sequence[str] | None = None) -> None:
    """Run `function(cfg)` with the configuration that the command line asks for.

    Besides `key=value` overrides, `--help` (choices and settings), `--cfg job` (print the configuration and stop) and
    `--resolve` (with interpolations filled in) are understood. A UserError, from the configuration or from `function`,
    becomes one sentence on stderr and exit code 2, without a traceback unless HYDRA_FULL_ERROR=1 or
    RACS_ALICE_TRACEBACK=1; a run that a signal has stopped ends with 75. Other exceptions are bugs and keep theirs. An
    integer that `function` returns is the exit code.

    Under a launcher every rank comes through here. What is wrong with the command line is wrong on all of them, so
    rank 0 alone says it; an error while running may belong to one rank, which then says so under its number, after
    giving rank 0 the time to report a common one.
    """
    if "" not in sys.path:
        sys.path.append("")  # the current folder: where the file of optimizer.target=my_file.Mine lies
    rank = int(os.environ.get("RANK") or 0)
    tracebacks = any(os.environ.get(name) == "1" for name in ("HYDRA_FULL_ERROR", "RACS_ALICE_TRACEBACK"))
    try:
        cfg = _from_shell(function, root, list(sys.argv[1:] if argv is None else argv), speak=rank == 0)
    except UserError as error:
        if tracebacks:
            raise
        _stop(error, rank, say=rank == 0)
    if cfg is None:
        return
    try:
        code = function(cfg)
    except UserError as error:
        if tracebacks:
            raise
        if rank != 0 and error.exit_code != LOST_CONTACT:  # with little time: the launcher ends what is left
            time.sleep(_RANK_DELAY)
        _stop(error, rank, say=True)
    except Stopped as stopped:
        if rank == 0:
            print(f"{stopped}.", file=sys.stderr, flush=True)
        raise SystemExit(stopped.exit_code) from None
    except KeyboardInterrupt:
        if tracebacks:
            raise
        if rank == 0:
            print("\nInterrupted.", file=sys.stderr)
        raise SystemExit(130) from None
    if isinstance(code, int) and not isinstance(code, bool) and code != 0:
        raise SystemExit(code)


def _stop(error: UserError, rank: int, say: bool) -> NoReturn:
    if say:
        print(f"{f'[rank {rank}] ' if rank else ''}error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(error.exit_code) from None


def _from_shell(function: Callable[[DictConfig], Any], root: str, argv: list[str], speak: bool) -> DictConfig | None:
    """The validated configuration; None if the command line only asked for information."""
    parser = _Parser(prog=f"{root}.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--cfg", "-c", choices=["job"])
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_intermixed_args(argv)
    if asked.multirun:
        raise UserError(_NO_SWEEP)
    overrides = [quoted(override) for override in asked.overrides]
    cfg = compose(overrides, root)
    if asked.help or asked.cfg:
        if speak and asked.help:
            print(_help(function, root, cfg, overrides))
        elif speak:
            print(OmegaConf.to_yaml(cfg, resolve=asked.resolve).rstrip("\n"))
        return None
    validate(cfg)
    return cfg


def quoted(override: str) -> str:
    """Free text and paths as the shell delivers them, quoted for Hydra's grammar where it needs that."""
    key, equals, value = override.partition("=")
    plain = not value or "${" in value or (value[0] in "'\"" and value[-1] == value[0] and len(value) > 1)
    if (
        not equals
        or plain
        or not (key in TEXT_KEYS or (key in PATH_KEYS and re.search(r"[^\w/.+%@?*|:$-]", value, re.ASCII)))
    ):
        return override
    value = re.sub(r"(\\*)'", r"\1\1\\'", value)  # a quote, and any backslashes just before it
    value = re.sub(r"(\\+)$", r"\1\1", value)
    return f"{key}='{value}'"


def _help(function: Callable[[DictConfig], Any], root: str, cfg: DictConfig, overrides: list[str]) -> str:
    about = (function.__doc__ or "").strip().splitlines()
    lines = [f"python {root}.py [key=value ...] [--cfg job [--resolve]] [--help]", ""]
    if about:
        lines += [about[0], ""]
    groups = [group for group in SHOWN_GROUPS if root == "train" or (group == "data" and root == "eval")]
    if groups:
        lines += ["Choices", *(f"  {group + '=':<12} {_listed(group)}" for group in groups), ""]
    lines += [
        "Settings, with the values that this command line gives them (??? must be given)",
        *(f"  {line}" for line in described(cfg, comments(_files(root, overrides)))),
    ]
    return "\n".join(lines)


def _files(root: str, overrides: list[str]) -> dict[str, Path]:
    """The files in which the settings are explained, by the section that they fill; "" is the root."""
    chosen = _with_hydra(overrides, root).hydra.runtime.choices
    files = {group: CONFIGS / group / f"{chosen.get(group)}.yaml" for group in ("paths", "model", "optimizer", "data")}
    return {"": CONFIGS / f"{root}.yaml"} | {group: file for group, file in files.items() if chosen.get(group)}
