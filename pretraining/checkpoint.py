"""Checkpoints: torch.distributed.checkpoint in safetensors files, keyed by parameter names, and one JSON file.

Nothing is pickled, so opening a checkpoint runs nobody's code.
"""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import TensorStorageMetadata

from data.errors import UserError

PREFIX = "step-"
RATES = ("lr", "initial_lr")  # of a parameter group: the schedule sets them


def save(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, meta: dict[str, Any], keep_last: int
) -> Path:
    """Write ``folder/step-N``, all ranks together, and prune older ones.

    The folder appears under its name only when it is whole.

    Args:
        folder: where checkpoints live.
        step: finished optimizer steps.
        model: the model itself, not a wrapper of it, since its parameter names are the keys.
        optimizer: over that model's parameters.
        meta: more to keep, as JSON.
        keep_last: how many checkpoints stay.
    """
    main = not dist.is_initialized() or dist.get_rank() == 0
    target = folder / f"{PREFIX}{step:07d}"
    temporary = folder / f".{target.name}.partial"
    if main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    _barrier()
    tensors, numbers = optimizer_state(model, optimizer)
    tensors |= {f"model/{name}": p.detach() for name, p in model.named_parameters()}
    tensors["random/cpu"] = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(temporary), save_distributed=True))
    if main:
        (temporary / "state.json").write_text(json.dumps({"step": step, "numbers": numbers, **meta}, indent=1) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        for old in list_checkpoints(folder)[:-keep_last]:
            shutil.rmtree(old)
    _barrier()
    return target


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, options: dict[str, Any]) -> dict[str, Any]:
    """Put a checkpoint's weights, states and the CPU's random state in place; returns what was saved as ``meta``.

    Args:
        options: the optimizer's configuration, as ``meta["optimizer"]`` held it when the checkpoint was saved.

    Raises:
        UserError: not a checkpoint, or one of another model or optimizer; nothing has been changed then.
    """
    tensors, meta = _read(path)
    _check_options(path, meta["optimizer"], options)
    _put_weights(path, tensors, model)
    load_optimizer_state(model, optimizer, tensors, meta.pop("numbers"))
    torch.set_rng_state(tensors["random/cpu"])
    return meta


def step_of(path: Path) -> int:
    """Finished steps of a checkpoint.

    Raises:
        UserError: not a whole checkpoint.
    """
    return _read_json(path)["step"]


def _check_options(path: Path, saved: dict[str, Any], own: dict[str, Any]) -> None:
    """Refuse states that another method, or the same one with other options, has made.

    Rates and weight decay may differ.

    Raises:
        UserError: naming the first option that does.
    """
    for key in sorted((saved.keys() | own.keys()) - {"lr", "adam_lr", "weight_decay"}):
        if saved.get(key) != own.get(key):
            raise UserError(
                f"{path} was made with optimizer.{key}={saved.get(key)}, not {own.get(key)}: set it so, or start anew"
            )


def set_aside_later(folder: Path, step: int) -> None:
    """Rename checkpoints of steps that are about to be done again, so that none of them is taken for new."""
    for path in list_checkpoints(folder):
        if step_of(path) > step:
            target = folder / f"before-going-back-{path.name}"
            shutil.rmtree(target, ignore_errors=True)
            path.rename(target)


def load_model(path: Path, model: nn.Module) -> None:
    """Put a checkpoint's weights in place, and nothing else."""
    _put_weights(path, _read(path)[0], model)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    meta = _read_json(path)
    try:
        reader = dcp.HuggingFaceStorageReader(str(path))
        saved = reader.read_metadata().state_dict_metadata
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a whole checkpoint ({error}): pass the path of another one") from error
    tensors = {
        name: torch.empty(info.size, dtype=info.properties.dtype)
        for name, info in saved.items()
        if isinstance(info, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tensors, storage_reader=reader)
    return tensors, meta


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a whole checkpoint ({error}): pass the path of another one") from error


def _put_weights(path: Path, tensors: dict[str, Tensor], model: nn.Module) -> None:
    saved = {name.removeprefix("model/"): x for name, x in tensors.items() if name.startswith("model/")}
    own = dict(model.named_parameters())
    wrong = sorted(
        n for n in saved.keys() | own.keys() if n not in saved or n not in own or saved[n].shape != own[n].shape
    )
    if wrong:
        raise UserError(f"{path} is of another model ({wrong[0]} differs): pass the model it was made with")
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(saved[name])


def optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """States as flat tensors ``optimizer/<parameter>/<state>``, and those that are Python numbers, by parameter.

    Some libraries keep counters and averages in the groups: these are there as ``group <i>``, rates excepted.

    Raises:
        UserError: a library keeps states of another kind.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    stored: set[int] = set()
    for name, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor):
                shared = value.untyped_storage().data_ptr() in stored  # safetensors keeps no two names of one tensor
                tensors[f"optimizer/{name}/{key}"] = value.clone() if shared else value
                stored.add(value.untyped_storage().data_ptr())
            elif value is None or isinstance(value, (bool, int, float, str)):
                numbers.setdefault(name, {})[key] = value
            else:
                raise UserError(
                    f"the optimizer keeps a {type(value).__name__} ({key}) for {name}, which checkpoints cannot hold: "
                    "set trainer.save_every=0"
                )
    for i, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if isinstance(value, Tensor) and key not in RATES:
                tensors[f"optimizer/group {i}/{key}"] = value
            elif isinstance(value, (bool, int, float)) and key not in RATES:
                numbers.setdefault(f"group {i}", {})[key] = value
    return tensors, numbers


def load_optimizer_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, Tensor],
    numbers: dict[str, dict[str, Any]],
) -> None:
    """The inverse of :func:`optimizer_state`, through the optimizer's own ``load_state_dict``."""
    names = {p: name for name, p in model.named_parameters()}
    by_name: dict[str, dict[str, Any]] = {name: dict(values) for name, values in numbers.items()}
    for key, value in tensors.items():
        kind, _, rest = key.partition("/")
        if kind == "optimizer":
            name, _, state = rest.rpartition("/")
            by_name.setdefault(name, {})[state] = value
    state_dict = optimizer.state_dict()
    for i, group in enumerate(state_dict["param_groups"]):
        group.update(by_name.pop(f"group {i}", {}))
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    state_dict["state"] = {i: by_name[names[p]] for i, p in enumerate(ordered) if names[p] in by_name}
    optimizer.load_state_dict(state_dict)


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if (path / "state.json").exists())


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
