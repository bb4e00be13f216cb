"""Launchers: what they leave in the environment, ranks with different settings, ranks that are lost, two "nodes".

torchrun ... -m tests.pretraining.test_launch quickstart|kill|hang FOLDER      what the ranks do
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from data.errors import UserError
from pretraining.launch import check_launch, check_same_configuration, lost_contact
from pretraining.signals import LOST_CONTACT
from pretraining.trainer import train

from .test_trainer import ROOT, TINY, config, lines

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PYTHON = sys.executable
GROUP = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
TORCHRUN = {**GROUP, **ADDRESS, "TORCHELASTIC_RUN_ID": "none", "GROUP_WORLD_SIZE": "1"}
ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True"}


# What a launcher has left ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"PATH": "/bin", "WORLD_SIZE": ""},
        {"WORLD_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {**GROUP, **ADDRESS},
        TORCHRUN,
        ACCELERATE,  # accelerate launch of one process
        {**TORCHRUN, **ACCELERATE},  # accelerate launch --multi_gpu
        ADDRESS,  # exported by a job script; no launcher
        {**ACCELERATE, **ADDRESS, "RACS_ALICE_INDEPENDENT": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {"OMPI_COMM_WORLD_SIZE": "2", **GROUP, **ADDRESS},  # mpirun, with the variables that torch wants
        {"OMPI_COMM_WORLD_SIZE": "2", "RACS_ALICE_INDEPENDENT": "1"},
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # a batch script runs once, whatever it asked for
        {"SLURM_STEP_NUM_TASKS": "1"},
        {**TORCHRUN, "SLURM_STEP_NUM_TASKS": "2", "GROUP_WORLD_SIZE": "2"},  # one torchrun on each of two nodes
    ],
)
def test_processes_that_belong_together_or_are_alone_may_start(environ):
    check_launch(environ, CPU)


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({**ACCELERATE, **ADDRESS}, "accelerate launch was asked for several processes and has started one"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, r"mpirun has started 2 tasks \(OMPI_COMM_WORLD_SIZE\), .* WORLD_SIZE=1"),
        ({"PMI_SIZE": "4", "WORLD_SIZE": "1", "RANK": "0"}, "mpirun or srun has started 4 tasks"),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"}, "srun has started 8 tasks .* one task for each node"),
        ({**TORCHRUN, "SLURM_STEP_NUM_TASKS": "2"}, "srun has started 2 tasks .* in 1 group of torchrun"),
        ({"RANK": "1"}, "RANK=1 is set, but WORLD_SIZE is not: unset RANK"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set, but RANK is not: unset WORLD_SIZE"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' is not a number"),
        ({**GROUP, **ADDRESS, "RANK": "2"}, "RANK=2 does not fit WORLD_SIZE=2"),
        ({**GROUP, **ADDRESS, "RANK": "-1"}, "RANK=-1 does not fit WORLD_SIZE=2"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK=1 does not fit WORLD_SIZE=1"),
        ({**GROUP, **ADDRESS, "LOCAL_RANK": "2"}, "LOCAL_RANK=2 does not fit LOCAL_WORLD_SIZE=2"),
        ({**GROUP, "MASTER_ADDR": "here"}, "WORLD_SIZE=2, but MASTER_PORT is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK and MASTER_ADDR and MASTER_PORT are not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "RACS_ALICE_INDEPENDENT": "1"}, "LOCAL_RANK and MASTER_ADDR"),
    ],
)
def test_processes_that_do_not_know_of_each_other_are_refused(environ, said):
    with pytest.raises(UserError, match=said) as caught:
        check_launch(environ, CPU)
    assert "\n" not in str(caught.value)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="2 processes were started on a machine with 1 GPU: "):
        check_launch(TORCHRUN, CUDA)
    with pytest.raises(UserError, match=r"LOCAL_RANK=1, but this process sees 1 GPU\(s\): .* --gpus-per-node"):
        check_launch({**GROUP, **ADDRESS}, CUDA)  # srun, which shows each task its own GPU: DDP would ask for cuda:1
    check_launch({**GROUP, **ADDRESS, "LOCAL_RANK": "0"}, CUDA)
    check_launch(TORCHRUN, CPU)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_launch(TORCHRUN, CUDA)


@pytest.mark.parametrize(
    ("words", "refused"),
    [("--cpu --num_processes 2", True), ("--num_processes 2", True), ("--cpu --num_processes 1", False)],
)
def test_accelerate_launch_on_a_cpu_starts_one_process_whatever_it_is_asked_for(monkeypatch, words, refused):
    """The real launcher up to the process, because only the environment betrays it."""
    from accelerate.commands import launch

    started = []

    class Process:
        returncode = 0

        def __init__(self, command, env):
            started.append(env)

        def wait(self):
            pass

    for name in [name for name in os.environ if name.startswith(("MASTER_", "ACCELERATE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(launch.subprocess, "Popen", Process)
    monkeypatch.setattr(launch, "default_config_file", "/nowhere")
    launch.launch_command(launch.launch_command_parser().parse_args([*words.split(), "train.py"]))
    (environ,) = started
    if not refused:
        return check_launch(environ, CPU)
    with pytest.raises(UserError, match="accelerate launch was asked for several processes and has started one"):
        check_launch(environ, CPU)


# Settings -------------------------------------------------------------------------------------------------------------


def test_one_process_has_the_same_configuration_as_itself():
    check_same_configuration(OmegaConf.create({"a": 1}), 1)


# A rank is lost -------------------------------------------------------------------------------------------------------

GLOO = "[/builder/third_party/gloo/gloo/transport/tcp/pair.cc:553] "
ADVICE = ". This is typically caused by a remote worker crashing. Check the logs of the remote worker."


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError(f"{GLOO}Connection closed by peer [127.0.0.1]:2208{ADVICE}"), "Connection closed by peer"),
        (RuntimeError(f"{GLOO}Read error [127.0.0.1]:8: Connection reset by peer{ADVICE}"), "Connection reset by peer"),
        (RuntimeError(f"{GLOO}Timed out waiting 8000ms for recv operation to complete"), "Timed out waiting 8000ms"),
        (
            RuntimeError("[Rank 0]: Rank 2 failed to pass monitoredBarrier in 1800000 ms\n Original ..."),
            "Rank 2 failed",
        ),
        (dist.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed."), "Failed to recv"),
        (dist.DistStoreError("wait timeout after 10000ms, keys: /default_pg/0"), "wait timeout"),
        (dist.DistBackendError("NCCL error: remote process exited or there was a network error"), "remote process"),
    ],
)
def test_errors_that_mean_that_a_rank_is_gone(error, reason, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    said = lost_contact(error)
    assert said is not None and said.startswith("rank 1 of 4 has lost the others (") and reason in said
    assert "typically" not in said and "pair.cc" not in said and "\n" not in said
    assert "the same command resumes from the last checkpoint" in said
    try:
        try:
            raise error
        except RuntimeError as first:
            raise ValueError("step 3 failed") from first
    except ValueError as later:
        assert lost_contact(later) == said


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("Connection closed by peer"),  # of a download
        ConnectionResetError("Connection reset by peer"),
        RuntimeError(f"{GLOO}[enforce fail at pair.cc:446] op.preamble.length <= op.nbytes. 4 vs 8"),
        dist.DistBackendError("NCCL error: ncclInvalidUsage: Duplicate GPU detected : rank 0 and rank 1"),
        UserError("the loss is not finite"),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_are_left_alone(error):
    assert lost_contact(error) is None


# Real ranks -----------------------------------------------------------------------------------------------------------


def run(command, timeout=120, **more):
    """To the end, without what this process may have of a launcher."""
    return subprocess.run(command, env=_environment(**more), cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def _environment(**more):
    ours = {
        k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "MASTER_", "SLURM_", "TORCHELASTIC"))
    }
    return {**ours, "OMP_NUM_THREADS": "1", **more}


def torchrun(*words, nodes=1, ranks=2):
    """Start one launcher for each "node", all of them here, which meet at a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        PYTHON, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc_per_node={ranks}", "--rdzv_backend=c10d",
        f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=test", "-m", "tests.pretraining.test_launch", *map(str, words),
    ]  # fmt: skip
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    jobs = [subprocess.Popen(command, env=_environment(), cwd=ROOT, **pipes) for _ in range(nodes)]
    try:
        said = [job.communicate(timeout=120)[0] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    return [job.returncode for job in jobs], "\n".join(said)


@pytest.mark.slow
def test_two_nodes_of_two_ranks_run_the_quickstart(tmp_path):
    """Two launchers on this machine, which meet at a port: what two machines do."""
    more = ["trainer.steps=3", "trainer.eval_every=3", "trainer.save_every=3", "optimizer=racs", "trainer.device=cpu"]
    more += ["trainer.save_model=false", "trainer.sample_tokens=0"]
    command = [
        PYTHON, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2", "--rdzv_backend=c10d",
        f"--rdzv_endpoint=localhost:{free_port()}", "--rdzv_id=test", "train.py", *TINY, *more,
        f"run_dir={tmp_path / 'four'}",
    ]  # fmt: skip
    codes, said = together([command] * 2, [{}] * 2)
    assert codes == [0, 0], said[-4000:]
    train(config(tmp_path / "one", *more))
    ours, theirs = lines(tmp_path / "four"), lines(tmp_path / "one")
    assert [(a["kind"], a["step"]) for a in ours] == [(b["kind"], b["step"]) for b in theirs]
    assert [a["loss"] for a in ours] == pytest.approx([b["loss"] for b in theirs], rel=1e-4)
    environment = json.loads((tmp_path / "four/environment.json").read_text())
    assert environment["hardware"]["processes"] == 4


RANK = """
import datetime, json, os, signal, sys
import torch, torch.distributed as dist
from omegaconf import OmegaConf
from data.errors import UserError
from pretraining.launch import check_same_configuration, check_same_data, lost_contact

rank = int(os.environ["RANK"])
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=40))
found = {}
for name, settings in {
    "same": {"seed": 1, "run": {"dir": "here", "list": [1, 2]}},
    "another": {"seed": 1, "run": {"dir": f"node{rank}"}, "z": rank},
    "more": {"seed": 1, "run": {"dir": "here", **({"old": None} if rank else {})}},
}.items():
    try:
        check_same_configuration(OmegaConf.create(settings), 2)
    except UserError as error:
        found[name] = str(error)
for name, text in {"same data": "a", "other data": f"of rank {rank}"}.items():
    try:
        check_same_data({"training text": "x", "validation rows": text}, 2)
    except UserError as error:
        found[name] = str(error)
if rank == 1:
    print(json.dumps(found), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
try:
    while True:
        dist.all_reduce(torch.ones(3))
except RuntimeError as error:
    print(json.dumps({**found, "lost": lost_contact(error)}), flush=True)
os._exit(74)
"""


def test_ranks_compare_their_settings_and_notice_that_one_is_killed():
    group = {**ADDRESS, "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    codes, said = together([[PYTHON, "-c", RANK]] * 2, [{**group, "RANK": rank} for rank in "01"])
    assert codes == [LOST_CONTACT, -signal.SIGKILL], said
    ours, theirs = sorted(
        (json.loads(line) for line in said.splitlines() if line.startswith("{")), key=len, reverse=True
    )
    assert ours.pop("lost").startswith("rank 0 of 2 has lost the others (")
    assert ours == theirs  # every rank says the same, and names the first setting
    assert ours["other data"].startswith(
        "ranks 0 and 1 read different data (validation rows differs): give all machines"
    )
    assert set(ours) == {"another", "more", "other data"}
    assert "run.dir is 'node0' on rank 0 and 'node1' on rank 1" in ours["another"]
    assert "run.old is 'not there' on rank 0 and None on rank 1" in ours["more"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def together(commands, environs):
    """Run them at the same time, to the end: exit codes, and all that they say."""
    ours = {
        k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "MASTER_", "SLURM_", "TORCHELASTIC"))
    }
    ours |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    jobs = [subprocess.Popen(c, env=ours | e, **pipes) for c, e in zip(commands, environs, strict=True)]
    try:
        said = [job.communicate(timeout=120)[0] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    return [job.returncode for job in jobs], "\n".join(said)
