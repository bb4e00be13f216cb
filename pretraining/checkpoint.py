"""Checkpoints: torch.distributed.checkpoint in safetensors files, keyed by parameter names, and one JSON file.

Nothing is pickled, so opening a checkpoint runs nobody's code. A folder ``step-N`` appears under its name only when it
is whole and on the disk; ``SHA256SUMS`` in it, in the format of ``sha256sum --check``, covers every other file and is
held against them on loading. docs/checkpoints.md states what is promised.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import TensorStorageMetadata
from torch.distributed.checkpoint.api import CheckpointException

from data.errors import UserError
from optimizers.sharding import is_sharded, local

from .record import read_regular, without_younger
from .throughput import Meters

PREFIX = "step-"
SUMS = "SHA256SUMS"
VISIBLE_SECONDS = 30.0  # that a folder may take to be seen by other nodes
STATE = "state.json"
FREE = ("lr", "adam_lr", "weight_decay", "log_basis")  # options that a later run may change
NO_FUNCTION = {"name", "attn_implementation", "tokenizer", "initializer_range"}  # of a model's settings
SET_ANEW = (*FREE, "initial_lr")  # of a parameter group: not restored


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    meta: dict[str, Any],
    keep_last: int,
    keep_every: int | None = None,
) -> Path:
    """Write ``folder/step-N``, all ranks together, and prune older ones.

    A crash, a full disk or a signal in the middle leaves every earlier checkpoint as it was.

    Args:
        folder: where checkpoints live.
        step: finished optimizer steps.
        model: the model itself, not a wrapper of it, since its parameter names are the keys.
        optimizer: over that model's parameters.
        meta: more to keep, as JSON.
        keep_last: how many checkpoints stay.
        keep_every: those of the steps k * keep_every stay for good besides.

    Raises:
        UserError: it could not be written; on all ranks.
    """
    target = folder / f"{PREFIX}{step:07d}"
    partial = folder / f".{target.name}.partial"
    tensors, numbers = optimizer_state(model, optimizer)
    tensors |= {f"model/{name}": p.detach() for name, p in model.named_parameters()}
    tensors |= _random_states()
    kinds = {name: _kind(x.dtype, x.shape) for name, x in tensors.items() if not name.startswith("random/cuda")}
    kinds, numbers = _merged(kinds), _merged(numbers)  # each rank has the states of its own matrices
    state = {"step": step, "numbers": numbers, "tensors": dict(sorted(kinds.items())), **meta}
    device = next(model.parameters()).device

    def write() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True))
            except CheckpointException as error:  # of all ranks: what happened on the first that failed
                raise next(iter(error.failures.values()))[0] from error

    def finish() -> None:
        (partial / STATE).write_text(json.dumps(state, indent=1) + "\n")
        write_sums(partial)
        _put_in_place(partial, target)
        _prune(folder, keep_last, keep_every)

    def see() -> None:
        until = time.monotonic() + VISIBLE_SECONDS
        while not partial.is_dir() and time.monotonic() < until:
            time.sleep(0.5)
        if not partial.is_dir():  # the writer would make one, on the disk of this machine
            raise FileNotFoundError(
                f"{partial.name} is not seen on this machine: put run_dir on a disk that all nodes share"
            )

    try:
        _on_main(lambda: _make_empty(partial), device)
        _on_all(see, device)
        _on_all(write, device)
        _on_main(finish, device)
    except Exception as error:
        if not isinstance(error, (OSError, SafetensorError, _OtherRank)):
            raise
        if _is_main():
            shutil.rmtree(partial, ignore_errors=True)
        good = [path for path in list_checkpoints(folder) if path != target]
        raise UserError(
            f"the checkpoint of step {step} could not be written to {folder} ({_reason(error)}); "
            + (f"{good[-1].name} is untouched" if good else "there is no earlier one")
            + ": free some space or repair the filesystem, then run the same command again"
        ) from error
    return target


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> dict[str, Any]:
    """Put a checkpoint's weights, states and random states in place; returns what was saved as ``meta``.

    It may have been written on another device, by another number of ranks, or with weights of another dtype. Optimizer
    states keep the dtype that they were saved with.

    Args:
        config: of the run; its ``optimizer`` is what ``meta["optimizer"]`` held when the checkpoint was saved.

    Raises:
        UserError: not a checkpoint, a damaged one, or one of another model or optimizer; nothing has been changed then.
    """
    try:
        _on_main(lambda: verify(path), next(model.parameters()).device)
    except _OtherRank as error:
        raise UserError(f"{path} cannot be used: the first rank says why") from error
    tensors, meta = _read(path, _Layout(model, optimizer))
    try:
        _check_model(path, meta.get("model", {}), config)
        _check_options(path, meta["optimizer"], config)
        numbers = meta.pop("numbers")
        _put_weights(path, tensors, model)
        load_optimizer_state(model, optimizer, tensors, numbers)
        _put_random_states(tensors)
    except (KeyError, IndexError, TypeError, ValueError, OverflowError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} does not hold what this version saves ({error!r}){_instead(path)}") from error
    return meta


def verify(path: Path, complete: bool = True) -> None:
    """Hold every file of a checkpoint against its SHA256SUMS.

    Args:
        complete: whether another file is an error too.

    Raises:
        UserError: naming the first file that is missing, cut, edited or damaged, and the checkpoint before this one.
    """
    sums = _read_sums(path)
    present = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} - {SUMS}
    for name in sorted(sums.keys() | present):
        if name not in sums and not complete:
            continue
        if name not in sums:
            raise UserError(f"{path / name} does not belong to this checkpoint{_instead(path)}")
        if name not in present:
            raise UserError(f"{path / name} is missing{_instead(path)}")
    for name, digest in _digests(path, sorted(sums)).items():
        if digest != sums[name]:
            raise UserError(
                f"{path / name} is not what was saved (SHA-256 {digest[:12]}..., not {sums[name][:12]}...): it was cut, "
                f"edited or damaged{_instead(path)}"
            )


def step_of(path: Path) -> int:
    """Finished steps of a checkpoint.

    Raises:
        UserError: not a whole checkpoint.
    """
    return _read_json(path)["step"]


def _check_model(path: Path, saved: dict[str, Any], config: dict[str, Any]) -> None:
    """Refuse weights of another function, such as one with other heads, whose shapes may be the same."""
    own = config.get("model", {})
    for key in sorted(saved.keys() & own.keys() - NO_FUNCTION):
        if saved[key] != own[key]:
            raise UserError(f"{path} was made with model.{key}={saved[key]}, not {own[key]}: set it so, or start anew")


def _check_options(path: Path, saved: dict[str, Any], config: dict[str, Any]) -> None:
    """Refuse states that another method, or the same one with other options, has made.

    Rates and weight decay may differ, and log_basis, which changes no state.

    Raises:
        UserError: naming the first option that does.
    """
    own, named_saved = ({f"optimizer.{key}": x for key, x in part.items()} for part in (config["optimizer"], saved))
    compared = without_younger(own, named_saved, config)
    for key in sorted((named_saved.keys() | compared.keys()) - {f"optimizer.{key}" for key in FREE}):
        if named_saved.get(key) != compared.get(key):
            raise UserError(
                f"{path} was made with {key}={named_saved.get(key)}, not {compared.get(key)}: set it so, or start anew"
            )


def set_aside_later(folder: Path, step: int) -> None:
    """Rename checkpoints of steps that are about to be done again, so that none of them is taken for new."""
    for path in list_checkpoints(folder):
        if _order(path) > _order(Path(f"{PREFIX}{step:07d}")):
            target = folder / f"before-going-back-{path.name}"
            shutil.rmtree(target, ignore_errors=True)
            path.rename(target)


def load_model(path: Path, model: nn.Module) -> None:
    """Put a checkpoint's weights in place, and nothing else. Errors as in :func:`load`."""
    verify(path)
    _put_weights(path, _read(path, _Layout(model))[0], model)


class _Layout:
    """Which tensors of a checkpoint this rank wants, and where it keeps them."""

    def __init__(self, model: nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.parameters = dict(model.named_parameters()) if model else {}
        self.owners = getattr(optimizer, "owners", None)

    def place(self, name: str, info: TensorStorageMetadata) -> Tensor | None:
        """Memory for what is to be read; None for what belongs to other ranks."""
        kind, _, rest = name.partition("/")
        if name.startswith("random/cuda/") and name != f"random/cuda/{_rank()}":
            return None
        p = self.parameters.get(rest if kind == "model" else rest.rpartition("/")[0])
        if kind == "optimizer" and p is not None and self.owners and not self.owners.keeps(p):
            return None
        owned = kind == "optimizer" and self.owners is not None and any(p in team.owner for team in self.owners.teams)
        if p is not None and is_sharded(p) and not owned and info.size == p.shape:
            return torch.empty_like(p, dtype=info.properties.dtype, requires_grad=False)
        return torch.empty(info.size, dtype=info.properties.dtype)


def _read(path: Path, layout: _Layout | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    meta = _read_json(path)
    try:
        reader = dcp.HuggingFaceStorageReader(str(path))
        saved = reader.read_metadata().state_dict_metadata
        infos = {name: info for name, info in saved.items() if isinstance(info, TensorStorageMetadata)}
        kinds = {name: _kind(info.properties.dtype, info.size) for name, info in infos.items()}
        listed: dict[str, str] = meta["tensors"]
        wrong = sorted(name for name in listed.keys() | kinds.keys() if kinds.get(name) != listed.get(name))
        wrong = [name for name in wrong if not name.startswith("random/cuda")]  # as many as there were ranks
        if wrong:
            raise ValueError(f"{wrong[0]} is {kinds.get(wrong[0])} there, and {listed.get(wrong[0])} in {STATE}")
        layout = layout or _Layout()  # everything, whole
        places = {name: layout.place(name, info) for name, info in infos.items()}
        tensors = {name: x for name, x in places.items() if x is not None}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(tensors, storage_reader=reader)
    except (Exception, CheckpointException) as error:  # the library's own is no Exception
        raise UserError(f"{path} cannot be read ({_reason(error)}){_instead(path)}") from error
    return tensors, meta


def _read_json(path: Path) -> dict[str, Any]:
    if not (path / STATE).exists():
        raise UserError(f"{path} is not a whole checkpoint (no {STATE} in it){_instead(path)}")
    try:
        meta = json.loads(read_regular(path / STATE))
        if not isinstance(meta, dict):
            raise ValueError("not an object")
        _check_state(meta)
        if path.name.startswith(PREFIX) and path.name != f"{PREFIX}{meta['step']:07d}":
            raise ValueError(f"it is of step {meta['step']}")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path / STATE} cannot be read ({error}){_instead(path)}") from error
    return meta


def _kind(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {'x'.join(map(str, shape))}".rstrip()


def _check_state(meta: dict[str, Any]) -> None:
    """Raise ValueError for a state.json that `save` cannot have written for the trainer."""

    def whole(x: Any, high: int = 2**53) -> bool:
        return isinstance(x, int) and not isinstance(x, bool) and 0 <= x <= high

    step: Any = meta.get("step")
    if not whole(step):
        raise ValueError("no step in it")
    numbers = meta.get("numbers")
    if not isinstance(numbers, dict) or not all(isinstance(values, dict) for values in numbers.values()):
        raise ValueError("its numbers are of another kind")
    if not isinstance(meta.get("tensors"), dict):
        raise ValueError("it has no list of tensors")
    if meta.keys().isdisjoint(("data", "evaluated", "meters", "skipped")):  # not of a training run
        return
    if not (whole(meta.get("evaluated"), step) and whole(meta.get("skipped"), step)):
        raise ValueError("evaluated or skipped is no step of this run")
    data, meters = meta.get("data"), meta.get("meters")
    if not isinstance(data, dict) or data.get("step") != step:
        raise ValueError("its place in the data is that of another step")
    try:
        restored = Meters.restore(meters)  # type: ignore[arg-type]
        sums = [*vars(restored.every).values(), *vars(restored.steady).values()]
        sums += [restored.wall_seconds, restored.peak_memory_bytes]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its meters are incomplete ({error})") from error
    if not all(isinstance(x, (int, float)) and not isinstance(x, bool) and x >= 0 for x in sums):
        raise ValueError("its meters are no numbers")


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
    owners = getattr(optimizer, "owners", None)
    for name, p in model.named_parameters():
        if owners and not owners.keeps(p):  # a class may have made one, which nobody updates
            continue
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor):
                place = local(value).untyped_storage().data_ptr()  # safetensors keeps no two names of one tensor
                tensors[f"optimizer/{name}/{key}"] = value.clone() if place in stored else value.contiguous()
                stored.add(place)
            elif value is None or isinstance(value, (bool, int, float, str)):
                numbers.setdefault(name, {})[key] = value
            else:
                raise UserError(
                    f"the optimizer keeps a {type(value).__name__} ({key}) for {name}, which checkpoints cannot hold: "
                    "set trainer.save_every=0"
                )
    for i, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if isinstance(value, Tensor) and key not in SET_ANEW:
                tensors[f"optimizer/group {i}/{key}"] = value
            elif isinstance(value, (bool, int, float)) and key not in SET_ANEW:
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
        saved = by_name.pop(f"group {i}", {})
        group.update({key: value for key, value in saved.items() if key not in SET_ANEW})
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    owners = getattr(optimizer, "owners", None)
    kept = {i: names[p] for i, p in enumerate(ordered) if owners is None or owners.keeps(p)}
    state_dict["state"] = {i: by_name[name] for i, name in kept.items() if name in by_name}
    optimizer.load_state_dict(state_dict)


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if (path / STATE).exists()]
    return sorted(found, key=_order)


def _order(path: Path) -> tuple[int, str]:
    """Sorts by step, from the name alone: the folder may be damaged."""
    return len(path.name), path.name


def _instead(path: Path) -> str:
    """The end of a sentence about an unusable checkpoint: what can be done."""
    before = [
        other for other in list_checkpoints(path.parent) if (len(other.name), other.name) < (len(path.name), path.name)
    ]
    if before:
        return f": resume from the one before, trainer.resume={before[-1]}, or remove {path}"
    return f": remove {path}, or pass another checkpoint"


# Files --------------------------------------------------------------------------------------------------------------


def _make_empty(partial: Path) -> None:
    """The folder for a new checkpoint; what crashes have left beside it goes."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    _sweep(partial.parent)
    partial.mkdir()


def tidy(folder: Path, keep_last: int, keep_every: int | None = None) -> None:
    """Finish what a crash has left undone after the last checkpoint was in place."""
    _sweep(folder)
    _prune(folder, keep_last, keep_every)


def _sweep(folder: Path) -> None:
    for left in [*folder.glob(f".{PREFIX}*.partial"), *folder.glob(f".{PREFIX}*.old")]:
        shutil.rmtree(left)


def _put_in_place(partial: Path, target: Path) -> None:
    """Rename, durably: a folder is either absent or whole, also after a power failure."""
    _sync(partial)
    if target.exists():
        _remove(target)
    partial.rename(target)
    _sync(target.parent)


def _prune(folder: Path, keep_last: int, keep_every: int | None) -> None:
    for old in list_checkpoints(folder)[:-keep_last]:
        if not keep_every or step_of(old) % keep_every:
            _remove(old)


def _remove(path: Path) -> None:
    """Delete a checkpoint so that a crash leaves none of its parts under its name."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    path.rename(old)
    shutil.rmtree(old)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digests(folder: Path, names: list[str]) -> dict[str, str]:
    def digest(name: str) -> str:
        with (folder / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(min(8, len(names) or 1)) as pool:  # hashing releases the interpreter
        return dict(zip(names, pool.map(digest, names), strict=True))


def write_sums(folder: Path) -> None:
    """The digest of every file in a folder, and all of them on the disk."""
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file() and file.name != SUMS)
    (folder / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in _digests(folder, names).items()))
    for name in [*names, SUMS]:
        _sync(folder / name)


def _read_sums(path: Path) -> dict[str, str]:
    if not (path / SUMS).exists():
        raise UserError(f"{path} is not a whole checkpoint (no {SUMS} in it){_instead(path)}")
    try:
        text = read_regular(path / SUMS).decode()
        pairs = [line.split("  ", 1) for line in text.splitlines()]
        if not text.endswith("\n") or any(len(pair) != 2 or len(pair[0]) != 64 for pair in pairs):
            raise ValueError("not lines of a SHA-256 and a name")
    except (OSError, ValueError) as error:
        raise UserError(f"{path / SUMS} cannot be read ({error}){_instead(path)}") from error
    return {name: digest for digest, name in pairs}


# Random states ------------------------------------------------------------------------------------------------------


def _random_states() -> dict[str, Tensor]:
    """The global generators. Nothing of ours draws from them after the start, but a library's optimizer may."""
    _, python, gauss = random.getstate()
    numpy: Any = np.random.get_state(legacy=False)
    states = {
        "random/cpu": torch.get_rng_state(),
        "random/python": torch.tensor(python),
        "random/numpy": torch.tensor([*numpy["state"]["key"].tolist(), numpy["state"]["pos"], numpy["has_gauss"]]),
        # Both keep a second normal number: Python's one or none, numpy's one.
        "random/gauss": torch.tensor([gauss is not None, gauss or 0.0, numpy["gauss"]], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states[f"random/cuda/{_rank()}"] = torch.cuda.get_rng_state()
    return states


def _put_random_states(tensors: dict[str, Tensor]) -> None:
    torch.set_rng_state(tensors["random/cpu"])
    kept, python_gauss, numpy_gauss = tensors["random/gauss"].tolist()
    random.setstate((3, tuple(tensors["random/python"].tolist()), python_gauss if kept else None))
    *key, pos, has_gauss = tensors["random/numpy"].tolist()
    state = {"key": np.array(key, dtype=np.uint32), "pos": pos}
    np.random.set_state({"bit_generator": "MT19937", "state": state, "has_gauss": has_gauss, "gauss": numpy_gauss})
    own = tensors.get(f"random/cuda/{_rank()}")
    if own is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(own)


# Ranks --------------------------------------------------------------------------------------------------------------


class _OtherRank(Exception):
    """Another rank has failed, and says why."""

    def __init__(self) -> None:
        super().__init__("another rank says why")


def _merged(own: dict[str, Any]) -> dict[str, Any]:
    """The entries of all ranks, of which those that have the same key agree."""
    if not dist.is_initialized():
        return own
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    merged = {key: value for part in parts for key, value in part.items()}
    different = [key for part in parts for key in part if part[key] != merged[key]]
    if different:
        raise RuntimeError(f"ranks disagree on {different[0]}, so that no checkpoint can be right; report it, please")
    return merged


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _is_main() -> bool:
    return _rank() == 0


def _on_main(function: Callable[[], None], device: torch.device) -> None:
    """Call it on the first rank; where it fails, all fail, instead of waiting for one that has left."""
    _on_all(function if _is_main() else lambda: None, device)


def _on_all(function: Callable[[], None], device: torch.device) -> None:
    failure: BaseException | None = None
    try:
        function()
    except Exception as error:
        failure = error
    if dist.is_initialized():
        failed = torch.tensor(int(failure is not None), device=device)
        dist.all_reduce(failed)
        if failed.item() and failure is None:
            raise _OtherRank
    if failure is not None:
        raise failure


def _reason(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip()[:200]}" if lines else type(error).__name__
