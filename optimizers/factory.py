"""Any method by its name, in one line."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .alice import Alice
from .combined import Combined
from .partition import partition
from .racs import RACS

_PARTITION = ("last_layer", "adam_lr", "adam_betas", "adam_eps", "matrices", "adam", "adam_weight_decay",
              "adam_state_dtype", "verbose")  # fmt: skip


def _adam(groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """The reference: torch's Adam on everything, the other parameters with their own rate."""
    lr = options.get("lr", 1e-3)
    for group in groups:
        if group.pop("state_dtype", None) is not None:
            raise ValueError("torch's Adam keeps its moments in the parameter's dtype; leave adam_state_dtype out")
        group["lr"] = lr if group.get("lr") is None else group["lr"]
    devices = {p.device.type for group in groups for _, p in group["params"]}
    fused = devices <= {"cpu", "cuda", "mps", "xpu"}
    return torch.optim.AdamW(groups, **{"weight_decay": 0.0, "lr": lr, **options}, fused=fused)


def _muon(groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """torch's Muon on the matrices, Adam elsewhere."""
    options = {"lr": 0.02, "weight_decay": 0.0, **options}
    matrix = torch.optim.Muon(groups[0]["params"], **options)
    if len(groups) == 1:
        return matrix
    other = groups[1]
    if other["lr"] is None:
        other["lr"] = options["lr"]
    return Combined(matrix, _adam([other]))


METHODS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "adam": (_adam, {}),
    "alice": (Alice, {}),
    "alice_0": (Alice, {"tracking": False}),
    "muon": (_muon, {}),
    "racs": (RACS, {}),
}


def create(name: str, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """The optimizer called ``name`` for all of ``model``: ``create("alice", model, rank=64, adam_lr=0.005)``.

    Args:
        name: adam, alice, alice_0, muon, racs.
        model: any module.
        **options: keywords of :func:`optimizers.partition` and of the method's class.

    Raises:
        ValueError: an unknown name, or an option out of its range.
        TypeError: an option that the method does not have.
    """
    if name not in METHODS:
        raise ValueError(f"no optimizer is called {name!r}; choose one of {', '.join(sorted(METHODS))}")
    build, preset = METHODS[name]
    groups = partition(model, **{key: options.pop(key) for key in _PARTITION if key in options})
    return build(groups, **{**preset, **options})
