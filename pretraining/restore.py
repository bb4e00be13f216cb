"""Opening what a run has left: its final model, or one of its checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data import load_tokenizer, open_source, validation_rows
from data.errors import UserError

from . import checkpoint
from .arithmetic import autocast, products
from .config import RULES
from .evaluation import Evaluation, evaluate
from .model import build_model, choose_attention, weight_dtype
from .plan import choose_device, choose_precision
from .record import at_its_commit, read_config, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Saved:
    """A model in evaluation mode with all that belongs to it."""

    cfg: DictConfig
    model: PreTrainedModel
    tokenizer: Any
    precision: str

    @contextmanager
    def computing(self) -> Iterator[None]:
        """For forward passes, in the run's precision."""
        device = next(self.model.parameters()).device
        with autocast(device, self.precision), products(device, self.precision):
            yield


def open_saved(cfg: DictConfig) -> Saved:
    """The model that ``cfg.checkpoint`` means: a run folder, one of its checkpoints, or its ``model`` folder.

    Tokenizer and precision are the run's own unless ``cfg`` gives others.

    Raises:
        UserError: there is nothing of the kind.
    """
    path = Path(cfg.checkpoint)
    run_dir = _run_folder(path)
    run: DictConfig = OmegaConf.create(read_config(run_dir / "config.yaml"))
    try:
        return _open(cfg, path, run_dir, run)
    except (OmegaConfBaseException, AttributeError, TypeError) as error:
        raise UserError(
            f"{run_dir / 'config.yaml'} is not the configuration of a run ({str(error).splitlines()[0]}): restore it"
        ) from error


def _open(cfg: DictConfig, path: Path, run_dir: Path, run: DictConfig) -> Saved:
    device = choose_device(cfg.device)
    precision = cfg.precision or run.trainer.precision
    holds, words = RULES["precision"]
    if not holds(precision):
        raise UserError(f"{run_dir / 'config.yaml'}: trainer.precision must be {words}, not {precision!r}: restore it")
    precision = choose_precision(precision, device)
    for key in ("data.length", "data.rows", "data.validation_max_tokens", "eval.batch_size", "eval.galore_rows"):
        holds, words = RULES[key]
        value = OmegaConf.select(run, key, default=MISSING)
        if value is MISSING or not holds(value):
            raise UserError(f"{run_dir / 'config.yaml'}: {key} must be {words}: restore the file")

    tokenizer = load_tokenizer(cfg.tokenizer or run.tokenizer)
    if (path / checkpoint.STATE).exists() or path.name.startswith(checkpoint.PREFIX):
        model: PreTrainedModel = build_model(run.model, device=device, dtype=weight_dtype(precision))
        checkpoint.load_model(path, model)
    else:
        folder = path if (path / "model.safetensors").exists() or path.name == "model" else run_dir / "model"
        if not folder.is_dir():
            raise UserError(
                f"{run_dir} has no final model: pass one of its checkpoints ({run_dir / 'checkpoints'}/step-...), "
                "or finish the run"
            )
        attention = choose_attention(run.model.get("attn_implementation", "auto"))  # as in the run, to the last digit
        model = open_model(folder, weight_dtype(precision), attention)
        model.to(device)  # type: ignore[arg-type]
        with torch.device(device):  # as in the run: frequencies computed elsewhere may differ in the last digit
            model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size:,} pieces, but the model {model.config.vocab_size:,}:"
            " leave tokenizer out to use the run's own"
        )
    return Saved(run, model.eval(), tokenizer, precision)


def open_model(folder: Path, dtype: torch.dtype, attention: str = "sdpa") -> PreTrainedModel:
    """An exported model. Where it has checksums, its files are held against them.

    Raises:
        UserError: it is damaged, incomplete, or no LLaMA in safetensors.
    """
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    if (folder / checkpoint.SUMS).exists():
        checkpoint.verify(folder, complete=False)
    logging.disable_progress_bar()  # of a file that loads in no time
    try:
        config = read_json(folder / "config.json")
        if config.get("model_type") != "llama":
            raise ValueError(f"model_type is {config.get('model_type')!r}, not llama")
        loaded: Any = LlamaForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
        model, found = loaded
        wrong = [*found["missing_keys"], *found["unexpected_keys"], *found["mismatched_keys"]]
        if wrong:
            raise ValueError(f"the weights do not fit the model, such as {wrong[0]}")
    except UserError:
        raise
    except Exception as error:  # the library lets many kinds through
        lines = str(error).strip().splitlines() or [""]
        raise UserError(
            f"{folder} does not hold a model that can be opened ({type(error).__name__}: {lines[0][:200]}): pass one of the "
            "run's checkpoints, or finish the run again"
        ) from error
    return model


def evaluate_saved(cfg: DictConfig) -> Evaluation:
    """The validation loss of ``cfg.checkpoint``, on its run's data unless ``cfg.data`` names others."""
    saved = open_saved(cfg)
    data = cfg.data if cfg.get("data") else at_its_commit(saved.cfg.data, _run_folder(Path(cfg.checkpoint)))
    rows = validation_rows(
        open_source(data, split="validation"),
        saved.tokenizer,
        data.length,
        data.rows,
        data.validation_max_tokens,
        data.get("attention", "row"),
    )
    if data.length != saved.cfg.data.length:
        own = saved.cfg.data.length
        print(f"rows of {data.length} tokens, where the run had {own}: data.length={own} evaluates at its own length")
    batch_size = cfg.eval.batch_size or saved.cfg.eval.batch_size
    galore_rows = cfg.eval.galore_rows or saved.cfg.eval.galore_rows
    result = evaluate(saved.model, rows, batch_size, galore_rows, autocast=saved.computing())
    assert result is not None  # nobody interrupts it
    if not math.isfinite(result.loss):
        raise UserError(
            f"the validation loss of {cfg.checkpoint} on {result.tokens:,} tokens is not a number: use a checkpoint from "
            "before its weights were lost, or give data with something to predict"
        )
    return result


def _run_folder(path: Path) -> Path:
    """The folder with config.yaml that ``path`` is, or lies in."""
    for folder in (path, path.parent, path.parent.parent):
        with suppress(OSError):
            if (folder / "config.yaml").exists():
                return folder
    raise UserError(
        f"{path} is not a run folder, nor part of one (no config.yaml there): pass checkpoint=runs/.../NAME"
    )
