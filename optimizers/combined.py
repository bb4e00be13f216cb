"""One optimizer object around two: somebody else's class on the matrices, another one on the rest."""

from collections.abc import Callable
from typing import Any

import torch

from .base import restore_dtypes


class Combined(torch.optim.Optimizer):
    """Steps ``matrix_optimizer``, then ``other``, behind the interface of a single optimizer.

    Parameter groups and states are the ones of the two, not copies, so that a scheduler, a checkpoint or a
    wrapper sees everything.

    Args:
        matrix_optimizer: any torch optimizer.
        other: any torch optimizer, over other parameters.
    """

    def __init__(self, matrix_optimizer: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
        self.optimizers = (matrix_optimizer, other)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        super().__init__([{"params": []}], {})
        self.param_groups = groups
        for optimizer in self.optimizers:
            self.state.update(optimizer.state)
        self._share()

    def _share(self) -> None:
        """Let the two work on this object's state and groups."""
        first = len(self.optimizers[0].param_groups)
        self.optimizers[0].param_groups = self.param_groups[:first]
        self.optimizers[1].param_groups = self.param_groups[first:]
        for optimizer in self.optimizers:
            optimizer.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        restore_dtypes(self, state_dict)
        self._share()
