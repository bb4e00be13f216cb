"""Mirrors of the run record: wandb and TensorBoard, imported only if asked for."""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig

from data.errors import UserError


class Tracker(Protocol):
    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class NoTracker:
    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class TensorBoard:
    def __init__(self, run_dir: Path, done: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "tracker.name=tensorboard needs a package: pip install tensorboard, or use tracker.name=none"
            ) from error
        # What an interrupted part has told of steps that are done again is not shown.
        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=done + 1)

    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    def __init__(self, run_dir: Path, cfg: DictConfig, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "tracker.name=wandb needs a package: pip install wandb, or use tracker.name=none"
            ) from error
        # The same folder is the same run, also after a resume; a folder begun anew is another one.
        file = run_dir / "wandb-id"
        if not file.exists():
            file.write_text(secrets.token_hex(8) + "\n")
        identity = file.read_text().strip()
        self.run = wandb.init(
            project=cfg.project,
            entity=cfg.entity,
            mode=cfg.mode,
            id=identity,
            resume="allow",
            name=run_dir.name,
            dir=str(run_dir),
            config=config,
        )
        # An axis of our own: wandb drops what comes with a step below its last one, as steps that are done again do.
        self.run.define_metric("*", step_metric="step")

    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        self.run.log({"step": step, **{f"{kind}/{name}": value for name, value in values.items()}})

    def close(self) -> None:
        self.run.finish()


def make_tracker(cfg: DictConfig, run_dir: Path, config: dict[str, Any], done: int, write: bool) -> Tracker:
    """The tracker of ``cfg.name``: none | wandb | tensorboard; none on all ranks but the first.

    Args:
        done: steps that the run has behind it.
    """
    if not write or cfg.name == "none":
        return NoTracker()
    return TensorBoard(run_dir, done) if cfg.name == "tensorboard" else Wandb(run_dir, cfg, config)
