"""Where the runs of a sweep go on one machine: its GPUs divided into slots, or its cores."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence

Slot = tuple[str, ...]  # the GPUs of one run, as CUDA_VISIBLE_DEVICES names them; empty: it runs on the CPU

# torchrun passes these on to its processes. SIGUSR1 is not among its own: SLURM sends it to every process of a job.
_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


def slots(jobs: int | None = None, gpus: Sequence[str] | None = None, each: int = 1) -> list[Slot]:
    """Places for as many runs as may go at a time.

    Args:
        jobs: runs at a time; default: as many as the GPUs allow, 1 without GPUs.
        gpus: that may be used; default: all that this process sees. One that is named twice takes two runs.
        each: GPUs of a run.

    Raises:
        ValueError: the GPUs do not suffice.
    """
    asked = gpus is not None or each > 1
    gpus = visible_gpus() if gpus is None else gpus
    if not gpus:
        if asked:
            raise ValueError("this machine shows no GPU: leave --gpus and --gpus-per-job out to run on the CPU.")
        return [()] * (jobs or 1)
    found = [tuple(gpus[i : i + each]) for i in range(0, len(gpus) - each + 1, each)]
    if not found or (jobs or 1) > len(found):
        raise ValueError(
            f"{jobs or 1} runs at a time with {each} GPUs each need {(jobs or 1) * each} GPUs, not {len(gpus)}: lower "
            "--jobs, or name a GPU several times in --gpus to let runs share it."
        )
    if any(len(set(slot)) < each for slot in found):
        raise ValueError(f"--gpus {','.join(gpus)} gives a run the same GPU twice: put the repetitions apart.")
    return found[:jobs]


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES names, or else every GPU that the driver lists."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(
        ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return listed.stdout.split() if listed.returncode == 0 else []


def environment(slot: Slot, parallel: int) -> dict[str, str]:
    """Variables of a run that has `slot` while `parallel` runs share the machine."""
    found = {"CUDA_VISIBLE_DEVICES": ",".join(slot)} if slot else {}
    processes = parallel * max(1, len(slot))
    if processes > 1:  # or every process would take all cores and they would slow each other down
        found["OMP_NUM_THREADS"] = str(max(1, cores() // processes))
    if len(slot) > 1:  # torchrun kills what it has told to stop after 30 s, which a step and a save may exceed
        found["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "100")
    return found


def launch(command: Sequence[str], slot: Slot) -> list[str]:
    """The command of a training: with several GPUs, `python FILE ...` is started by torchrun, a process for each."""
    if len(slot) < 2:
        return list(command)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={len(slot)}"]
    return [sys.executable, *torchrun, f"--signals-to-handle={_SIGNALS}", *command[1:]]


def exit_code(code: int, text: str) -> int:
    """What train.py ended with: torchrun ends with 1 whatever happened, and prints the code of the first that failed."""
    found = re.findall(r"exitcode\s*:\s*(-?\d+)", text)
    return int(found[-1]) if code == 1 and found else code


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
