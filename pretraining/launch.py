"""Whether the processes of a job are one run, and what to say when one of them has lost the others.

A launcher tells each process its place by environment variables: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
MASTER_ADDR, MASTER_PORT. What happens without them is silent: every process trains the whole run alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf

from data.errors import UserError

from .signals import LOST_CONTACT

# Set to 1 by whoever starts several runs in one job on purpose, each with a run_dir of its own.
INDEPENDENT = "RACS_ALICE_INDEPENDENT"

RANKS = "torchrun --nproc_per_node=N train.py ..."
# How many processes a starter of processes has started, in its own words. SLURM_NTASKS is not among them: it is
# there in a batch script too, which runs once, whatever was asked for.
TASKS = {
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "MV2_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun or srun",
    "SLURM_STEP_NUM_TASKS": "srun",
}
NCCL_SIGNS = (
    "remote process exit",
    "ncclremoteerror",
    "ncclsystemerror",
    "timed out",
    "timeout",
    "aborted",
    "connection",
)


class LostContact(UserError):
    """Another rank has ended or does not answer; this one cannot go on."""

    exit_code = LOST_CONTACT


def check_launch(environ: Mapping[str, str], device: torch.device) -> None:
    """Refuse processes that would train the same run one beside the other, or that do not fit together.

    To be asked before Accelerate is, which fills in what is missing.

    Raises:
        UserError: the launcher made independent processes, or its variables contradict each other.
    """
    world = _whole(environ, "WORLD_SIZE")
    rank = _whole(environ, "RANK")
    local, local_world = _whole(environ, "LOCAL_RANK"), _whole(environ, "LOCAL_WORLD_SIZE")
    if environ.get(INDEPENDENT) != "1":
        _refuse_independent(environ, world or 1)
    if world in (None, 1) and rank in (None, 0):
        return
    if world is None or rank is None:
        there, other = ("RANK", "WORLD_SIZE") if world is None else ("WORLD_SIZE", "RANK")
        raise UserError(
            f"{there}={environ[there]} is set, but {other} is not: unset {there} to train with one process, or start all of "
            f"them with {RANKS}"
        )
    if not 0 <= rank < world:
        raise UserError(
            f"RANK={rank} does not fit WORLD_SIZE={world}: ranks are numbered from 0; unset both, or start with {RANKS}"
        )
    if local is not None and local_world is not None and not 0 <= local < local_world:
        raise UserError(
            f"LOCAL_RANK={local} does not fit LOCAL_WORLD_SIZE={local_world}: unset both, or start with {RANKS}"
        )
    missing = [name for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
    if missing:
        raise UserError(
            f"WORLD_SIZE={world}, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set, by which the "
            f"processes find each other and their GPUs: start them with {RANKS}"
        )
    if device.type == "cuda" and local_world is not None and "TORCHELASTIC_RUN_ID" in environ:
        gpus = torch.cuda.device_count()
        if local_world > gpus:
            raise UserError(
                f"{local_world} processes were started on a machine with {gpus} GPU{'s' * (gpus != 1)}: start at most "
                f"{gpus} with --nproc_per_node (--num_processes of accelerate launch counts those of all machines)"
            )
    if device.type == "cuda" and local is not None and local >= torch.cuda.device_count():
        raise UserError(
            f"LOCAL_RANK={local}, but this process sees {torch.cuda.device_count()} GPU(s): let it see all GPUs of its node "
            "(with srun, --gpus-per-node instead of --gpus-per-task), or start the processes with torchrun"
        )


def _refuse_independent(environ: Mapping[str, str], world: int) -> None:
    """Raises UserError if more processes were started than know of each other."""
    elastic = "TORCHELASTIC_RUN_ID" in environ
    joined = (_whole(environ, "GROUP_WORLD_SIZE") or 1) if elastic else world
    for name, starter in TASKS.items():
        tasks = _whole(environ, name)
        if tasks is not None and tasks > joined:
            what = f"in {joined} group{'s' * (joined != 1)} of torchrun" if elastic else f"with WORLD_SIZE={world}"
            raise UserError(
                f"{starter} has started {tasks} tasks ({name}), but this one is {what}, so that each would train "
                "the whole run alone: start one task for each node, and torchrun in it (docs/launch.md), or set "
                f"{INDEPENDENT}=1 if they are different runs"
            )
    # It exports an address for the others only where more than one process was asked for, and then starts one.
    if world == 1 and not elastic and "ACCELERATE_MIXED_PRECISION" in environ and environ.get("MASTER_ADDR"):
        raise UserError(
            "accelerate launch was asked for several processes and has started one (it does so on a CPU, and on GPUs "
            f"without --multi_gpu): start them with {RANKS}, or accelerate launch --multi_gpu, or take --num_processes 1 "
            "and unset MASTER_ADDR"
        )


def _whole(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name)
    if text is None or not text.strip():
        return None
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name}={text!r} is not a number: unset it, or start with {RANKS}") from None


def check_same_configuration(cfg: DictConfig, world: int) -> None:
    """Refuse ranks with different settings; all of them call it together, after the process group is there.

    Raises:
        UserError: on all ranks alike, naming the first setting that differs and whose.
    """
    ours = dict(_leaves(OmegaConf.to_container(cfg, resolve=True)))
    if found := _first_difference(ours, world):
        key, first, other, rank = found
        raise UserError(
            f"the ranks have different settings: {key} is {first!r} on rank 0 and {other!r} on rank {rank}; start all "
            "of them with the same command, from the same files, without ${oc.env:...} that differs between machines"
        )


def check_same_data(facts: dict[str, Any], world: int) -> None:
    """Refuse ranks that read other text or tokenise it otherwise, such as from folders of their own machines.

    Args:
        facts: what identifies text, tokenizer and validation rows.

    Raises:
        UserError: on all ranks alike.
    """
    if found := _first_difference(dict(_leaves(facts)), world):
        key, _, _, rank = found
        raise UserError(
            f"ranks 0 and {rank} read different data ({key} differs): give all machines the same files, and with data=hub a "
            "data.revision"
        )


def _first_difference(ours: dict[str, Any], world: int) -> tuple[str, Any, Any, int] | None:
    """The first key whose values differ between ranks: the key, the value on rank 0, another and whose; on all ranks alike."""
    if world == 1 or not dist.is_initialized():
        return None
    text = json.dumps(ours, sort_keys=True)
    digests: list[str] = [""] * world
    dist.all_gather_object(digests, hashlib.sha256(text.encode()).hexdigest())
    if len(set(digests)) == 1:
        return None
    every: list[dict[str, Any]] = [{}] * world
    dist.all_gather_object(every, ours)
    other = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
    missing = object()
    key = next(
        key
        for key in dict.fromkeys([*every[0], *every[other]])
        if every[0].get(key, missing) != every[other].get(key, missing)
    )
    first, second = (every[rank].get(key, "not there") for rank in (0, other))
    return key, first, second, other


def _leaves(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values; a list is a value."""
    if isinstance(node, dict) and node:
        for key, child in node.items():
            yield from _leaves(child, f"{name}.{key}" if name else str(key))
    else:
        yield name, node


def lost_contact(error: BaseException) -> str | None:
    """What to tell the user if ``error``, or what it came from, means that the other ranks are gone; None otherwise.

    gloo raises plain RuntimeErrors, so its words have to do; they were found by killing and stopping ranks. NCCL's are
    from its documentation, not from a machine.
    """
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        if _is_contact(at):
            rank, world = (os.environ.get(name, "?") for name in ("RANK", "WORLD_SIZE"))
            reason = str(at).strip().splitlines()[0] if str(at).strip() else type(at).__name__
            return (
                f"rank {rank} of {world} has lost the others ({_short(reason)}): another rank has ended or hangs, look for "
                "its error above or in the output of its node; the same command resumes from the last checkpoint"
            )
        at = at.__cause__ or at.__context__
    return None


def _is_contact(error: BaseException) -> bool:
    if isinstance(error, (dist.DistNetworkError, dist.DistStoreError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    text = str(error)
    if "enforce fail" in text:  # ranks that called different things: a mistake in the program
        return False
    if "gloo/transport" in text or "monitoredBarrier" in text:
        return True
    return isinstance(error, dist.DistBackendError) and any(sign in text.lower() for sign in NCCL_SIGNS)


def _short(reason: str) -> str:
    """Without the place in the source and the advice that gloo adds."""
    if reason.startswith("[") and "gloo/transport" in reason:
        reason = reason.partition("] ")[2]
    reason = reason.partition(". This is typically")[0]
    return reason if len(reason) <= 200 else reason[:200] + "..."
