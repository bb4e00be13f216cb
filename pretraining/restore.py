"""Opening what a run has left: its final model, or one of its checkpoints."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf

from data import load_tokenizer, open_source, validation_rows
from data.errors import UserError

from . import checkpoint
from .evaluation import Evaluation, evaluate
from .model import build_model
from .plan import choose_device, choose_precision, weight_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Saved:
    """A model in evaluation mode with all that belongs to it."""

    cfg: DictConfig
    model: PreTrainedModel
    tokenizer: Any
    precision: str

    @property
    def autocast(self) -> AbstractContextManager:
        device = next(self.model.parameters()).device
        return torch.autocast(device.type, dtype=torch.bfloat16) if self.precision == "bf16_mixed" else nullcontext()


def open_saved(cfg: DictConfig) -> Saved:
    """The model that ``cfg.checkpoint`` means: a run folder, one of its checkpoints, or its ``model`` folder.

    Tokenizer and precision are the run's own unless ``cfg`` gives others.

    Raises:
        UserError: there is nothing of the kind.
    """
    path = Path(cfg.checkpoint)
    run_dir = _run_folder(path)
    run: DictConfig = OmegaConf.load(run_dir / "config.yaml")  # type: ignore[assignment]
    device = choose_device(cfg.device)
    precision = choose_precision(cfg.precision or run.trainer.precision, device)

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
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()  # of a file that loads in no time
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=weight_dtype(precision))
        model.to(device)  # type: ignore[arg-type]
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size:,} pieces, but the model {model.config.vocab_size:,}:"
            " leave tokenizer out to use the run's own"
        )
    return Saved(run, model.eval(), tokenizer, precision)


def evaluate_saved(cfg: DictConfig) -> Evaluation:
    """The validation loss of ``cfg.checkpoint``, on its run's data unless ``cfg.data`` names others."""
    saved = open_saved(cfg)
    data = cfg.data if cfg.get("data") else saved.cfg.data
    rows = validation_rows(
        open_source(data, split="validation"),
        saved.tokenizer,
        data.length,
        data.rows,
        data.validation_max_tokens,
        data.get("attention", "row"),
    )
    batch_size = cfg.eval.batch_size or saved.cfg.eval.batch_size
    galore_rows = cfg.eval.galore_rows or saved.cfg.eval.galore_rows
    result = evaluate(saved.model, rows, batch_size, galore_rows, autocast=saved.autocast)
    assert result is not None  # nobody interrupts it
    return result


def _run_folder(path: Path) -> Path:
    """The folder with config.yaml that ``path`` is, or lies in."""
    for folder in (path, path.parent, path.parent.parent):
        if (folder / "config.yaml").exists():
            return folder
    raise UserError(
        f"{path} is not a run folder, nor part of one (no config.yaml there): pass checkpoint=runs/.../NAME"
    )
