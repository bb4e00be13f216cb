"""Any method by its name, in one line."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from . import libraries
from .alice import Alice
from .apollo import Apollo
from .eigen_adam import EigenAdam
from .fira import Fira
from .galore import GaLore
from .lamb import LAMB
from .lars import LARS
from .low_rank_soap import LowRankSOAP
from .muon import Muon
from .normalization import Normalization
from .partition import partition
from .racs import RACS
from .shampoo import Shampoo
from .soap import SOAP
from .soap_factored import SOAPFactored
from .sophia import Sophia
from .swan import SWAN
from .whitening import Whitening

_PARTITION = ("last_layer", "adam_lr", "adam_betas", "adam_eps", "matrices", "adam", "adam_weight_decay",
              "adam_state_dtype", "verbose")  # fmt: skip


def _any(
    groups: list[dict[str, Any]], target: str, lr: float, options: dict[str, Any] | None = None
) -> torch.optim.Optimizer:
    return libraries.on_matrices(groups, target, lr, **(options or {}))


def _on_matrices(target: str) -> Callable[..., torch.optim.Optimizer]:
    return partial(libraries.on_matrices, target=target)


# name -> how it is made from partition's groups, and the options that distinguish it from others of its class
METHODS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "adafactor": (_on_matrices("transformers.optimization.Adafactor"), {"lr": 0.01, "relative_step": False}),
    "adam": (libraries.adam, {}),
    "adam_8bit": (_on_matrices("bitsandbytes.optim.AdamW8bit"), {"lr": 1e-3, "weight_decay": 0.0}),
    "adam_mini": (libraries.adam_mini, {"lr": 1e-3, "betas": (0.9, 0.95)}),
    "adamw": (libraries.adam, {"weight_decay": 0.1}),
    "alice": (Alice, {}),
    "alice_0": (Alice, {"tracking": False}),
    "any": (_any, {}),
    "apollo": (Apollo, {"limiter": 1.01}),
    "apollo_mini": (Apollo, {"rank": 1, "scaling": "tensor", "scale": 128**0.5, "limiter": 1.01}),
    "apollo_svd": (Apollo, {"projection": "svd", "limiter": 1.01}),
    "eigen_adam": (EigenAdam, {}),
    "fira": (Fira, {}),
    "fira_plus": (Alice, {"compensation": "fira_plus"}),
    "galore": (GaLore, {}),
    "galore_8bit": (GaLore, {"state_dtype": "8bit"}),
    "lamb": (LAMB, {}),
    "lars": (LARS, {}),
    "lion": (_on_matrices("pytorch_optimizer.Lion"), {"lr": 1e-4}),
    "low_rank_soap": (LowRankSOAP, {}),
    "muon": (Muon, {}),
    "muon_paper": (
        Muon,
        {"momentum": 0.9, "nesterov": False, "orthogonalization": "newton_schulz", "adjust_lr_fn": "none"},
    ),
    "normalization": (Normalization, {}),
    "racs": (RACS, {}),
    "racs_no_ema": (RACS, {"beta": 0.0}),
    "sgd": (_on_matrices("torch.optim.SGD"), {"lr": 0.1, "momentum": 0.9}),
    "shampoo": (Shampoo, {}),
    "signum": (_on_matrices("pytorch_optimizer.SignSGD"), {"lr": 1e-4}),
    "soap": (SOAP, {}),
    "soap_factored": (SOAPFactored, {}),
    "sophia_g": (Sophia, {"estimator": "gauss_newton_bartlett", "gamma": 0.05}),
    "sophia_h": (Sophia, {}),
    "swan": (SWAN, {}),
    "whitening": (Whitening, {}),
}


def create(name: str, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """The optimizer called ``name`` for all of ``model``: ``create("alice", model, rank=64, adam_lr=0.005)``.

    Args:
        name: one of ``METHODS`` (docs/optimizers.md describes them).
        model: any module.
        **options: keywords of :func:`optimizers.partition` and of the method's class. ``any`` takes ``target``, the class
            to use on the matrices as "package.Class", ``lr``, and ``options``, its other keywords.

    Raises:
        ValueError: an unknown name, or an option out of its range.
        TypeError: an option that the method does not have.
    """
    if name not in METHODS:
        raise ValueError(f"no optimizer is called {name!r}; choose one of {', '.join(sorted(METHODS))}")
    build, preset = METHODS[name]
    asked = set(options)
    if build is libraries.adam:  # one Adam for every parameter, unless something else is said of the Adam group
        options = {f"adam_{key}": options[key] for key in ("betas", "eps") if key in options} | options
    groups = partition(model, **{key: options.pop(key) for key in _PARTITION if key in options})
    if build is libraries.adam_mini:  # whose blocks follow the model's heads, and which is the Adam of all groups
        options["model"] = model
        if given := sorted({"adam_betas", "adam_eps", "adam_weight_decay", "adam_state_dtype"} & asked):
            raise ValueError(f"adam_mini updates every parameter with the same betas and eps; leave out {given[0]}")
    return build(groups, **{**preset, **options})
