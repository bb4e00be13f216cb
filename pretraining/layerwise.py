"""Layer-wise updates: every parameter is updated inside the backward pass, and its gradient freed at once.

The gradients of a model are as large as its weights; so only a few of them ever exist together (the "layerwise" bars of
Figure 4). What a step then cannot do any more is to look at the whole gradient before it changes a weight.
"""

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from data.errors import UserError

from .throughput import StepTimer


def check_layerwise(cfg: DictConfig, rows: int) -> None:
    """Refuse what cannot be done without all gradients at once.

    Args:
        cfg: the run's configuration, with ``trainer.layerwise``.
        rows: of one forward pass.

    Raises:
        UserError: the first setting that does not go with it.
    """
    t, method = cfg.trainer, cfg.optimizer.name
    if "estimator" in cfg.optimizer:
        why = (
            f"optimizer={method} needs estimates of curvature after the backward pass: choose another method, or leave "
            "it out"
        )
    elif method == "any":
        why = (
            "whether a class of yours can update one parameter at a time is unknown: choose a method that has a name, or "
            "leave it out"
        )
    elif int(os.environ.get("WORLD_SIZE", 1)) > 1:
        why = (
            "it works in one process only, where no gradient has to be summed over several: launch one, or leave it out"
        )
    elif rows < t.batch_size:
        why = (
            f"gradients cannot be accumulated, and trainer.micro_batch_size={t.micro_batch_size} means {rows} of the "
            f"{t.batch_size} rows of a step: set trainer.micro_batch_size={t.batch_size}, or a smaller trainer.batch_size"
        )
    elif t.grad_clip is not None:
        why = "the norm of the whole gradient is known too late to clip by it: set trainer.grad_clip=null"
    elif t.on_nonfinite == "skip":
        why = "a step that is not finite is known too late to be skipped: set trainer.on_nonfinite=stop"
    else:
        return
    raise UserError(f"trainer.layerwise=true updates inside the backward pass: {why}")


@dataclass
class UpdateTimes:
    """The time of all updates of a step, read later like a StepTimer."""

    timers: list[StepTimer] = field(default_factory=list)

    def milliseconds(self) -> float:
        return sum(timer.milliseconds() for timer in self.timers)


class LayerWise:
    """Hooks that step ``optimizer`` for each parameter alone, as soon as autograd has summed up its gradient.

    From now on a backward pass updates the model, and ``begin`` has to be called before each. An update is an ordinary
    step of an optimizer that sees nothing but this parameter, so that it costs the same however many there are.

    Args:
        model: whose parameters are updated.
        optimizer: over them; also a Combined.
        device: theirs.

    Attributes:
        times: of the updates since ``begin``.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.optimizer, self.device = optimizer, device
        self.times = UpdateTimes()
        self._params = [p for p in model.parameters() if p.requires_grad]
        self._norms: dict[Tensor, Tensor] = {}
        self._places: dict[Tensor, tuple[torch.optim.Optimizer, dict[str, Any], dict[str, Any]]] = {}
        for p in self._params:
            p.register_post_accumulate_grad_hook(self._update)

    def begin(self) -> None:
        """Before the backward pass of a step, with the rates of this step."""
        self.times, self._norms, self._places = UpdateTimes(), {}, {}
        for part in getattr(self.optimizer, "optimizers", (self.optimizer,)):
            for group in part.param_groups:
                for i, p in enumerate(group["params"]):
                    # A group of its own for each. All start with the same numbers: some libraries count steps there.
                    alone = {key: [group[key][i]] for key in ("params", "param_names") if key in group}
                    self._places[p] = part, group, {**group, **alone}

    def norm(self) -> Tensor:
        """Of the whole gradient since ``begin``, in float32; after an error, of what there was of it; 0 before all."""
        norms = [self._norms[p] for p in self._params if p in self._norms]  # always in the model's order
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), device=self.device)

    def _update(self, p: Tensor) -> None:
        if p not in self._places:
            raise RuntimeError("a parameter would be updated twice in a step; call begin before each backward pass")
        self._norms[p] = torch.linalg.vector_norm(p.grad, dtype=torch.float32)
        timer = StepTimer(self.device)
        timer.start()
        part, group, alone = self._places.pop(p)
        groups, part.param_groups = part.param_groups, [alone]
        try:
            part.step()
        finally:
            part.param_groups = groups
        group.update({key: alone[key] for key in alone.keys() - {"params", "param_names"}})
        timer.stop()
        self.times.timers.append(timer)
        p.grad = None
