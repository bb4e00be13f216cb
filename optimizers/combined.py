"""One optimizer object around two: somebody else's class on the matrices, another one on the rest."""

from collections.abc import Callable
from typing import Any

import torch

from .base import restore_dtypes
from .sharding import check_share


class Combined(torch.optim.Optimizer):
    """Steps ``matrix_optimizer``, then ``other``, behind the interface of a single optimizer.

    Parameter groups and states are the ones of the two, not copies, so that a scheduler, a checkpoint or a
    wrapper sees everything.

    Args:
        matrix_optimizer: any torch optimizer.
        other: any torch optimizer, over other parameters; None if there are none.

    Raises:
        ValueError: a parameter group is added later; nobody could know to which of the two.
    """

    optimizers: tuple[torch.optim.Optimizer, ...] = ()

    def __init__(self, matrix_optimizer: torch.optim.Optimizer, other: torch.optim.Optimizer | None = None) -> None:
        parts = (matrix_optimizer,) if other is None else (matrix_optimizer, other)
        super().__init__([group for part in parts for group in part.param_groups], {})
        for part in parts:
            self.state.update(part.state)
        self.optimizers = parts
        self._share()

    def _share(self) -> None:
        """Let the two work on this object's state and groups."""
        first = 0
        for part in self.optimizers:
            part.param_groups = self.param_groups[first : first + len(part.param_groups)]
            part.state = self.state
            first += len(part.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self.optimizers:
            raise ValueError("add the group to one of the two optimizers before combining them")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.optimizers:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_share(self, state_dict)
        super().load_state_dict(state_dict)
        restore_dtypes(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "optimizers": self.optimizers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()
