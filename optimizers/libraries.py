"""Element-wise methods and everybody else's: a library's class on the matrices, Adam elsewhere.

Imported when they are asked for, so that this package needs torch alone. Which class, and why (each was compared with its
paper's formulas in float64, and with the other candidates):

    sgd        torch.optim.SGD
    adam_8bit  bitsandbytes: updates 8-bit codes on CPUs too; torchao's compiles every step and refuses a rate that changes
    adafactor  transformers: adds eps_1 = 1e-30 as the paper does; torch's clamps at 1e-7 in float32, at 8e-3 in bfloat16
    adam_mini  adam-mini: the published partition; pytorch_optimizer's has one second moment for a whole MLP matrix
    lion       pytorch_optimizer, equal to lion-pytorch
    signum     pytorch_optimizer.SignSGD: the sign of an average of gradients
"""

import difflib
import importlib
import importlib.util
import inspect
import logging
from typing import Any

import torch
from torch import Tensor, nn

from .base import FUSED, MatrixOptimizer, laid_alike, laid_as
from .combined import Combined
from .sharding import is_sharded

# What a user has to install for a target, where the name differs from the module's
PACKAGES = {"pytorch_optimizer": "pytorch-optimizer", "adam_mini": "adam-mini"}


def load_class(target: str) -> Any:
    """The optimizer class that ``target``, "package.module.Class", names.

    Raises:
        ValueError: there is no such module or class, or it is not an optimizer.
    """
    module_name, _, name = target.rpartition(".")
    if not module_name:
        raise ValueError(f"{target} names no class: write package.Class, for example torch.optim.RMSprop")
    # bitsandbytes complains at import about a kernel for matrix products, which optimizers do not use
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if importlib.util.find_spec(missing.split(".")[0]) and "." in missing:
            raise ValueError(f"there is no module {missing}: check the spelling") from error
        if module_name == missing or module_name.startswith(f"{missing}."):
            package = PACKAGES.get(missing, missing)
            raise ValueError(
                f"there is no module {missing}: install it (pip install {package}), or start this command in the folder of "
                "its file"
            ) from error
        raise ValueError(
            f"{module_name} needs {missing}, which is not installed: install it, then try again"
        ) from error
    except Exception as error:
        said = " ".join(str(error).split()) or "no message"
        raise ValueError(
            f"importing {module_name} failed with {type(error).__name__}: {said}; correct that file, then try again"
        ) from error
    found = getattr(module, name, None)
    if found is None:
        near = difflib.get_close_matches(name, dir(module), n=1)
        hint = f"do you mean {near[0]}?" if near else "check the spelling"
        raise ValueError(f"{module_name} has no class {name}: {hint}")
    if not (inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)):
        raise ValueError(f"{target} is not an optimizer class: derive it from torch.optim.Optimizer")
    return found


def on_matrices(groups: list[dict[str, Any]], target: str, lr: float | Tensor, **options: Any) -> torch.optim.Optimizer:
    """``target(matrices, lr=lr, **options)``, and Adam for the second group if there is one.

    Raises:
        ValueError: see :func:`load_class`; or the class takes no such option.
    """
    cls = load_class(target)
    try:
        matrix = cls([p for _, p in groups[0]["params"]], lr=lr, **options)
    except Exception as error:
        accepted = ", ".join(name for name in inspect.signature(cls).parameters if name not in ("params", "lr"))
        raise ValueError(f"{target} does not start: {error}; give it options that it takes: lr, {accepted}") from error
    if isinstance(matrix, MatrixOptimizer) and any("estimator" in group for group in matrix.param_groups):
        raise ValueError("Sophia gets its estimates under its own names; use optimizer=sophia_h or sophia_g")
    matrix.param_groups[0].setdefault("param_names", [name for name, _ in groups[0]["params"]])
    rest = [{**group, "lr": lr if group["lr"] is None else group["lr"]} for group in groups[1:]]
    optimizer = Combined(matrix, adam(rest) if rest else None)
    if torch.__version__ < "2.13" and any(is_sharded(p) for _, p in groups[0]["params"]):
        _one_by_one(optimizer)
        optimizer.register_load_state_dict_post_hook(_one_by_one)
    return optimizer


def _one_by_one(optimizer: torch.optim.Optimizer) -> None:
    """DTensor has no _foreach_lerp and no _foreach_sign before torch 2.13; Lion and Signum would call them."""
    for group in optimizer.param_groups:
        if "foreach" in group and not group.get("adam"):
            group["foreach"] = False


def adam(groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """torch's Adam on everything, each group with its own rate; ``weight_decay`` is decoupled."""
    lr = options.get("lr", 1e-3)
    for group in groups:
        if group.pop("state_dtype", None) is not None:
            raise ValueError("torch's Adam keeps its moments in the parameter's dtype; leave adam_state_dtype out")
        group["lr"] = lr if group.get("lr") is None else group["lr"]
    params = [p for group in groups for _, p in group["params"]]
    fused = all(p.device.type in FUSED and (is_sharded(p) or laid_alike(p)) for p in params)
    # None: torch chooses what is right for any layout
    return AdamW(groups, **{"weight_decay": 0.0, "lr": lr, **options}, fused=True if fused else None)


class AdamW(torch.optim.AdamW):
    """torch's, with gradients and moments laid in memory as their parameters: its fused kernels take that for granted."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.register_step_pre_hook(_lay_alike)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if _lay_alike not in self._optimizer_step_pre_hooks.values():  # which copies leave behind
            self.register_step_pre_hook(_lay_alike)


def _lay_alike(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for p in (p for group in optimizer.param_groups if group["fused"] for p in group["params"]):
        if p.grad is None or is_sharded(p) or p.grad.is_sparse:
            continue
        p.grad = laid_as(p, p.grad)
        state = optimizer.state.get(p, {})
        state.update({name: laid_as(p, x) for name, x in state.items() if name != "step"})


def adam_mini(groups: list[dict[str, Any]], model: nn.Module, lr: float | Tensor, **options: Any) -> Combined:
    """Adam-mini on everything (Zhang et al. 2024, arXiv 2406.16793): one second moment for each block of a tensor.

    A block is a head of a query or key matrix, a row (neuron) of the others, a token of embedding and output layer;
    parameter names decide which (those of Hugging Face's LLaMA are understood), head counts come from ``model.config``.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "num_attention_heads"):
        raise ValueError(
            "adam_mini needs model.config.num_attention_heads; use a Hugging Face model, or another method"
        )
    heads = config.num_attention_heads
    named = [(name, p) for group in groups for name, p in group["params"]]
    optimizer = load_class("adam_mini.Adam_mini")(
        named,
        lr=lr,
        dim=config.hidden_size,
        n_heads=heads,
        n_kv_heads=getattr(config, "num_key_value_heads", heads),
        verbose=False,
        **options,
    )
    # Of the class's own guesses two are wrong for us: heads of another size than hidden / heads, and that each visible
    # GPU holds a shard.
    optimizer.head_numel = getattr(config, "head_dim", None) or config.hidden_size // heads
    optimizer.head_numel *= config.hidden_size
    optimizer.world_size = 1
    matrices = len(groups[0]["params"])
    for i, group in enumerate(optimizer.param_groups):  # one for each tensor, in the order given
        group["adam"], group["head_numel"] = i >= matrices, optimizer.head_numel
        group["param_names"] = [named[i][0]]
        if i >= matrices and groups[1]["lr"] is not None:
            group["lr"] = groups[1]["lr"]
    # In bfloat16 an average with beta_2 near 1 never decays.
    optimizer.register_step_post_hook(_widen_block_means)
    return Combined(optimizer)


def _widen_block_means(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for state in optimizer.state.values():
        if "vmean" in state and state["vmean"].dtype in (torch.bfloat16, torch.float16):
            state["vmean"] = state["vmean"].float()
