"""Who is measured: our optimizers, other people's, and who stands beside whom.

Settings of a pair agree: rank, interval between refreshes, projected side, moments, iterations (as in
tests/optimizers/test_packages.py, where most of these pairs are shown to compute the same). A package that does something
else under the same name says so in `differs`. Packages are imported only when they are measured.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import Parameter

from data.errors import UserError
from optimizers.base import is_update_time
from optimizers.factory import METHODS

Named = list[tuple[str, Parameter]]
Make = Callable[[Named, int], torch.optim.Optimizer]  # from matrices and the rank
Options = Mapping[str, Any] | Callable[[int], Mapping[str, Any]]  # or a function of the rank

LR = 1e-4  # of everybody: time does not depend on it
INTERVAL = 200  # K of the low-rank methods
SOAP_INTERVAL = 10
LEADING = 40  # of Alice; half the rank where that is less
ADAMW = "torch AdamW (fused)"  # what everybody is compared with, in every group


@dataclass(frozen=True)
class Clock:
    """When an optimizer refreshes its bases, and where it counts.

    Attributes:
        interval: K, steps from one refresh to the next.
        rule: see `optimizers.base.is_update_time`.
        place: where t, the number of steps made, is kept: "state" of every parameter, or the "group"; "hidden": HeavyBall's,
            which only tells after a step whether it was a refresh.
    """

    interval: int
    rule: str = "zero_based"
    place: str = "state"

    def refreshed(self, optimizer: torch.optim.Optimizer) -> bool:
        """Was the step just made a refresh?"""
        if self.place == "hidden":
            return bool(optimizer._is_preconditioning)  # type: ignore[attr-defined]
        return is_update_time(self._counters(optimizer)[0]["step"], self.interval, self.rule)

    def skip(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the next step be a refresh, if the counter can be moved: a few counts of steps are left out."""
        if self.place == "hidden":
            return
        counters = self._counters(optimizer)
        t = counters[0]["step"] + 1
        while not is_update_time(t, self.interval, self.rule):
            t += 1
        for counter in counters:
            counter["step"] = t - 1

    def _counters(self, optimizer: torch.optim.Optimizer) -> list[Any]:
        return list(optimizer.state.values()) if self.place == "state" else optimizer.param_groups


@dataclass(frozen=True)
class Contestant:
    """One optimizer with its settings.

    Attributes:
        name: as tables show it.
        method: what it computes, a key of `bounds.WORK`.
        make: the optimizer of matrices, for a rank.
        clock: None for a method that does the same at every step.
        config: the name in configs/optimizer of one of ours; None for a package's.
        rivals: names of the packages' optimizers that ours is compared with.
        module, package: what is imported, and what pip calls it.
        differs: how a package's algorithm differs from ours under the same name.
        low: its products are of bfloat16 numbers, whatever the dtype of the parameters.
    """

    name: str
    method: str
    make: Make
    clock: Clock | None = None
    config: str | None = None
    rivals: tuple[str, ...] = ()
    module: str = "torch"
    package: str = "torch"
    differs: str = ""
    low: bool = False

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None


def leading(rank: int) -> int:
    return min(LEADING, rank // 2)


# Ours -----------------------------------------------------------------------------------------------------------------


def ours(config: str, rivals: Iterable[str] = (), label: str = "", method: str = "", **options: Any) -> Contestant:
    """The method of configs/optimizer/<config>.yaml, with the options in which it agrees with its rivals."""
    build, preset = METHODS[config]
    takes = inspect.signature(build).parameters

    def make(named: Named, rank: int) -> torch.optim.Optimizer:
        more = {"rank": rank} if "rank" in takes and "rank" not in preset else {}
        if "leading" in takes:
            more["leading"] = leading(rank)
        return build([{"params": list(named), "adam": False}], **{**preset, "lr": LR, **more, **options})

    clock = None
    if "update_interval" in takes:
        rule = "printed" if takes["update_times"].default == "printed" else "zero_based"
        clock = Clock(options.get("update_interval", takes["update_interval"].default), rule)
    name = f"{config} ({label})" if label else config
    return Contestant(name, method or config, make, clock, config, tuple(rivals), package="racs-alice")


def compiled(plain: Contestant) -> Contestant:
    """The same, with ``MatrixOptimizer.compile``."""

    def make(named: Named, rank: int) -> torch.optim.Optimizer:
        optimizer = plain.make(named, rank)
        optimizer.compile()  # type: ignore[attr-defined]
        return optimizer

    label = f"{plain.name[:-1]}, compiled)" if plain.name.endswith(")") else f"{plain.name} (compiled)"
    return replace(plain, name=label, make=make)


def low_products(config: str, *rivals: str, label: str = "", **options: Any) -> Contestant:
    """The same, with products of bfloat16 numbers."""
    words = f"{label}, bfloat16 products" if label else "bfloat16 products"
    return replace(ours(config, rivals, words, products="bfloat16", **options), low=True)


# Other people's -------------------------------------------------------------------------------------------------------


def package_optimizer(
    name: str,
    method: str,
    target: str,
    package: str,
    options: Options | None = None,
    group: Options | None = None,
    clock: Clock | None = None,
    differs: str = "",
) -> Contestant:
    """``target`` ("module.Class") with ``options`` of its constructor and of its parameter group (functions of the rank)."""
    module, _, cls = target.rpartition(".")

    def make(named: Named, rank: int) -> torch.optim.Optimizer:
        given = [dict(x(rank) if callable(x) else x or {}) for x in (options, group)]
        params = [{"params": [p for _, p in named], **given[1]}]
        # which galore-torch imports, and which complains about a kernel that optimizers do not use
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
        return getattr(importlib.import_module(module), cls)(params, **{"lr": LR, **given[0]})

    return Contestant(name, method, make, clock, None, (), module.split(".")[0], package, differs)


def low_rank(**more: Any) -> Callable[[int], dict[str, Any]]:
    return lambda rank: {"rank": rank, "update_proj_gap": INTERVAL, "proj_type": "std", **more}


def alice(beta3: float) -> Callable[[int], dict[str, Any]]:
    return lambda rank: {
        "rank": rank,
        "leading_basis": leading(rank),
        "update_interval": INTERVAL,
        "betas": (0.9, 0.9, beta3),
    }


QUIET = {"no_deprecation_warning": True}
OTHER_ALICE = "never transposes; forms the m x m covariance and a complete QR"
SOAPS = ("pytorch_optimizer SOAP", "heavyball SOAP")
SOAP_CLOCK = Clock(SOAP_INTERVAL, place="group")


def adamw() -> Contestant:
    """torch's fused AdamW: in every group, so that each ratio is measured side by side."""
    return package_optimizer(ADAMW, "adam", "torch.optim.AdamW", "torch", {"fused": True, "weight_decay": 0.0})


def all_groups() -> dict[str, list[Contestant]]:
    """Contestants that are measured side by side, beside the fused AdamW, which is in every group."""
    other = package_optimizer
    return {
        "adam": [ours("adam", [ADAMW])],
        "racs": [
            ours("racs", ["pytorch_optimizer RACS"]),
            compiled(ours("racs", ["pytorch_optimizer RACS"])),
            other(
                "pytorch_optimizer RACS",
                "racs",
                "pytorch_optimizer.RACS",
                "pytorch-optimizer",
                differs="has no fixed point: means of rows and columns of G^2",
            ),
        ],
        "low rank": [
            ours("alice", ["galore-torch", "pytorch_optimizer Alice"]),
            low_products("alice", "galore-torch", "pytorch_optimizer Alice"),
            compiled(low_products("alice", "galore-torch", "pytorch_optimizer Alice")),
            ours("alice_0", ["galore-torch", "pytorch_optimizer Alice-0"]),
            low_products("alice_0", "galore-torch", "pytorch_optimizer Alice-0"),
            compiled(low_products("alice_0", "galore-torch", "pytorch_optimizer Alice-0")),
            ours("galore", ["galore-torch"]),
            low_products("galore", "galore-torch"),
            other(
                "galore-torch",
                "galore",
                "galore_torch.GaLoreAdamW",
                "galore-torch",
                QUIET,
                low_rank(scale=0.25),
                Clock(INTERVAL),
            ),
            *(
                other(
                    f"pytorch_optimizer {name}",
                    method,
                    "pytorch_optimizer.Alice",
                    "pytorch-optimizer",
                    alice(beta3),
                    clock=Clock(INTERVAL, "printed", "group"),
                    differs=OTHER_ALICE,
                )
                for name, method, beta3 in (("Alice", "alice", 0.999), ("Alice-0", "alice_0", 0.0))
            ),
        ],
        "fira": [
            ours("fira", ["fira package"], residual="scaled"),
            low_products("fira", "fira package", residual="scaled"),
            other("fira package", "fira", "fira.FiraAdamW", "fira", QUIET, low_rank(alpha=0.25), Clock(INTERVAL)),
        ],
        "apollo": [
            ours("apollo", ["apollo-torch"]),
            ours("apollo", ["apollo-torch"], "stored U", "apollo_stored", store_projection=True),
            low_products("apollo", "apollo-torch", label="stored U", method="apollo_stored", store_projection=True),
            ours("apollo_mini", ["apollo-torch mini"]),
            other(
                "apollo-torch",
                "apollo_stored",
                "apollo_torch.APOLLOAdamW",
                "apollo-torch",
                QUIET,
                low_rank(scale=1.0, proj="random", scale_type="channel"),
                Clock(INTERVAL),
            ),
            other(
                "apollo-torch mini",
                "apollo_mini",
                "apollo_torch.APOLLOAdamW",
                "apollo-torch",
                QUIET,
                lambda rank: low_rank(scale=128.0, proj="random", scale_type="tensor")(1),
                Clock(INTERVAL),
            ),
        ],
        "muon": [
            ours("muon", ["torch Muon", "pytorch_optimizer Muon", "heavyball Muon"]),
            other("torch Muon", "muon", "torch.optim.Muon", "torch", {"weight_decay": 0.0}),
            other(
                "pytorch_optimizer Muon",
                "muon",
                "pytorch_optimizer.Muon",
                "pytorch-optimizer",
                group={"use_muon": True},
            ),
            other(
                "heavyball Muon",
                "muon",
                "heavyball.Muon",
                "heavyball",
                {"betas": (0.95, 0.95)},
            ),
        ],
        "soap": [
            ours("soap", SOAPS, form="published", update_interval=SOAP_INTERVAL),
            low_products("soap", *SOAPS, form="published", update_interval=SOAP_INTERVAL),
            other(
                "pytorch_optimizer SOAP",
                "soap",
                "pytorch_optimizer.SOAP",
                "pytorch-optimizer",
                {"precondition_frequency": SOAP_INTERVAL, "shampoo_beta": 0.95, "weight_decay": 0.0},
                clock=SOAP_CLOCK,
            ),
            other(
                "heavyball SOAP",
                "soap",
                "heavyball.SOAP",
                "heavyball",
                {
                    "betas": (0.95, 0.95),
                    "precondition_frequency": SOAP_INTERVAL,
                    "max_precond_dim": 10_000,
                    "merge_dims": False,
                    "weight_decay": 0.0,
                },
                clock=Clock(SOAP_INTERVAL, place="hidden"),
            ),
        ],
    }


def select(only: Iterable[str] = ()) -> dict[str, list[Contestant]]:
    """The groups with the methods of ours in ``only`` (config names; none: all) and their rivals, each led by the AdamW.

    Raises:
        UserError: a name that is not measured here.
    """
    everybody = all_groups()
    wanted = set(only)
    known = {c.config for group in everybody.values() for c in group if c.config}
    if unknown := sorted(wanted - known):
        raise UserError(f"{unknown[0]} is not in this benchmark: choose from {', '.join(sorted(known))}.")
    chosen = {}
    for title, group in everybody.items():
        mine = [c for c in group if c.config and (not wanted or c.config in wanted)]
        rivals = {name for c in mine for name in c.rivals}
        if mine:
            chosen[title] = [adamw(), *mine, *(c for c in group if c.name in rivals)]
    return chosen
