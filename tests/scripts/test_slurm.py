"""The job script with stand-ins for SLURM's programs: what is started, where, and when the job goes back to the queue."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.doctor import cache_variables

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/slurm/train.sbatch"
TORCHRUN = ROOT / "scripts/slurm/torchrun.py"

SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
    "show hostnames") printf 'first\\nsecond\\n' ;;
    "show job") echo "JobId=7 JobName=x JobState=$STATE Reason=None" ;;
    requeue*) echo "$2" >> "$LOG/requeued" ;;
    *) exit 9 ;;
esac
"""
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$LOG/srun"
env > "$LOG/environment"
exit "$CODE"
"""
WAITING = """#!/usr/bin/env bash
trap 'echo USR1 >> "$LOG/signals"; exit 75' USR1
trap 'echo TERM >> "$LOG/signals"; exit 137' TERM
touch "$LOG/srun"
for _ in $(seq 600); do sleep 0.05; done
"""


@pytest.fixture
def job(tmp_path):
    """Start the script as SLURM does; its process."""
    stubs, log = tmp_path / "bin", tmp_path / "log"
    for folder in (stubs, log):
        folder.mkdir()

    def start(*words, code=0, state="RUNNING", srun=SRUN, settings=True, **more):
        words = words or (("optimizer=racs",) if settings else ())
        for name, text in (("srun", srun), ("scontrol", SCONTROL)):
            (stubs / name).write_text(text)
            (stubs / name).chmod(0o755)
        ours = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "WANDB_", "SLURM_", "RACS_"))}
        ours |= {
            "PATH": f"{stubs}:{os.environ['PATH']}", "LOG": str(log), "CODE": str(code), "STATE": state,
            "PYTHON": sys.executable, "SLURM_JOB_ID": "1000007", "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_GPUS_ON_NODE": "4", "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_CPUS_PER_TASK": "32",
        }  # fmt: skip
        ours = {name: value for name, value in (ours | more).items() if value is not None}
        # SLURM runs a copy from another place
        copy = shutil.copy(SCRIPT, tmp_path / "slurm_script")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(["bash", copy, *words], env=ours, cwd=tmp_path, **pipes)

    start.log = log
    return start


def finish(process):
    said = process.communicate(timeout=30)[0]
    return process.returncode, said


# What is known of sbatch's options, and how their values look
KNOWN = {
    "job-name": r"[\w-]+", "nodes": r"\d+", "ntasks-per-node": r"\d+", "gpus-per-node": r"\d+", "cpus-per-task": r"\d+",
    "mem": r"\d+[KMGT]?", "time": r"(\d+-)?\d+:\d\d:\d\d", "requeue": None, "signal": r"((B|R):)?(USR1|TERM|INT)@\d{1,5}",
    "open-mode": "append|truncate", "output": r"\S+",
}  # fmt: skip


def test_the_options_are_those_of_sbatch():
    options = {}
    lines = SCRIPT.read_text().splitlines()
    directives = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert directives and max(directives) < first_command  # sbatch reads no further
    for i in directives:
        word = lines[i].split("#")[1].split()[1:]  # a comment may follow
        assert len(word) == 1 and word[0].startswith("--"), lines[i]
        name, _, value = word[0][2:].partition("=")
        assert name in KNOWN
        assert value == "" if KNOWN[name] is None else re.fullmatch(KNOWN[name], value), lines[i]
        options[name] = value
    assert options["ntasks-per-node"] == "1" and "requeue" in options
    name, seconds = options["signal"].split("@")
    patience = int(re.search(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-(\d+)", SCRIPT.read_text())[1])
    assert name == "USR1" and patience < int(seconds)  # B: would tell this shell alone


def test_what_is_started(job):
    code, said = finish(job("optimizer=alice", "trainer.sample_prompt=two words, and more"))
    assert code == 0, said
    words = (job.log / "srun").read_text().splitlines()
    python = words.index(sys.executable)
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=0", "--wait=60"} == set(
        words[:python]
    )
    assert words[python + 1] == "scripts/slurm/torchrun.py"
    torchrun, train = words[python + 2 : words.index("train.py")], words[words.index("train.py") :]
    assert train == ["train.py", "optimizer=alice", "trainer.sample_prompt=two words, and more"]
    # torchrun's own parser reads it
    from torch.distributed.run import parse_args

    read = parse_args([*torchrun, "train.py"])
    assert (read.nnodes, read.nproc_per_node, read.rdzv_backend, read.rdzv_endpoint) == (
        "2",
        "4",
        "c10d",
        "first:20007",
    )
    assert read.rdzv_id == "1000007.0" and "SIGUSR1" in read.signals_to_handle.split(",")


def test_nothing_is_fetched_and_all_caches_have_one_root(job, tmp_path):
    root = tmp_path / "cache"
    finish(job(RACS_ALICE_CACHE=str(root), HF_HUB_CACHE="/somewhere/else", SLURM_RESTART_COUNT="2"))
    environment = dict(line.split("=", 1) for line in (job.log / "environment").read_text().splitlines() if "=" in line)
    assert environment["HF_HUB_OFFLINE"] == environment["HF_DATASETS_OFFLINE"] == "1"
    assert environment["SRUN_CPUS_PER_TASK"] == "32"
    names = cache_variables()
    assert {"HF_HOME", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "WANDB_DIR"} <= set(names)
    assert all(Path(environment[name]).is_relative_to(root) for name in names)
    assert len({environment[name] for name in names}) == len(names)
    assert "HF_HUB_CACHE" not in environment
    assert "--rdzv_id=1000007.2" in (job.log / "srun").read_text()  # a new meeting after each requeue


def test_the_defaults_can_be_changed(job):
    finish(job(HF_HUB_OFFLINE="0", HF_HOME="/mine"))
    environment = (job.log / "environment").read_text().splitlines()
    assert {"HF_HUB_OFFLINE=0", "HF_DATASETS_OFFLINE=0", "HF_HOME=/mine"} <= set(environment)


@pytest.mark.parametrize(
    ("code", "state", "requeued"),
    [
        (75, "RUNNING", True),
        (75, "CANCELLED", False),
        (75, "COMPLETING", False),
        *((code, "RUNNING", False) for code in (0, 1, 2, 3, 74, 137)),
    ],
)
def test_only_an_interrupted_run_goes_back_to_the_queue(job, code, state, requeued):
    ended, said = finish(job(code=code, state=state))
    assert ended == code
    assert (job.log / "requeued").exists() == requeued
    assert ("saved its state" in said) == (code == 75)
    if requeued:
        assert (job.log / "requeued").read_text() == "1000007\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_script_reaches_the_ranks_and_it_waits_for_them(job, number):
    process = job(srun=WAITING)
    until = time.monotonic() + 20
    while not (job.log / "srun").exists() and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(number)
    code, said = finish(process)
    assert (job.log / "signals").read_text() == "USR1\n"  # SIGTERM would make srun kill its tasks
    assert code == 75 and (job.log / "requeued").exists(), said


@pytest.mark.parametrize(
    ("words", "more", "said"),
    [
        ((), {"SLURM_JOB_ID": None}, "this is a job script: sbatch scripts/slurm/train.sbatch"),
        ((), {"settings": False}, "no settings are given: sbatch scripts/slurm/train.sbatch optimizer=alice"),
        ((), {"SLURM_SUBMIT_DIR": "/"}, "there is no train.py in /"),
        ((), {"SLURM_GPUS_ON_NODE": None}, "the job has no GPUs"),
        ((), {"PYTHON": "/no/python"}, "PYTHON=/no/python is not a command here"),
        (("trainer.save_every=0",), {}, "trainer.save_every=0 saves nothing"),
        (("seed=1", "trainer.resume=runs/x/checkpoints/step-1"), {}, "would go back there each time"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(job, words, more, said):
    code, text = finish(job(*words, **more))
    assert code == 2 and text.startswith("error: ") and said in text
    assert not (job.log / "srun").exists()


def test_a_run_that_is_trained_anew_is_so_only_the_first_time(job):
    words = ("trainer.resume=never", "seed=3")
    finish(job(*words))
    assert (job.log / "srun").read_text().splitlines()[-2:] == list(words)
    finish(job(*words, SLURM_RESTART_COUNT="1"))
    assert (job.log / "srun").read_text().splitlines()[-2:] == ["train.py", "seed=3"]


def test_shellcheck_has_nothing_to_say():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    files = [SCRIPT, ROOT / "scripts/slurm/caches.sh"]
    done = subprocess.run(["shellcheck", "-x", *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# torchrun -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exits", "code"),
    [
        ([75], 75),
        ([75, -15], 75),  # torchrun ends the others
        ([75, 75, 75], 75),
        ([74, 74], 74),
        ([-9, 74, -15], 137),
        ([3, 74], 3),
        ([75, 1], 1),  # one has failed while it saved
        ([-15], 143),
    ],
)
def test_the_exit_code_is_that_of_the_rank_that_is_the_reason(exits, code):
    spec = importlib.util.spec_from_file_location("slurm_torchrun", TORCHRUN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.code_of(exits) == code
    assert module.code_of(exits[::-1]) == code


RANKS = """
import os, sys, time
how = sys.argv[1]
if how == "wait":
    os.write(1, b"ready\\n")  # at once: both ranks write to one pipe
    time.sleep(60)
sys.exit(75 if how == "stopped" or os.environ["RANK"] == "0" else 0)
"""


def start_torchrun(tmp_path, how):
    (tmp_path / "ranks.py").write_text(RANKS)
    command = [sys.executable, TORCHRUN, "--standalone", "--nproc_per_node=2", "--signals-to-handle=SIGTERM,SIGUSR1"]
    ours = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC")} | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, tmp_path / "ranks.py", how],
        env=ours,
        stdout=subprocess.PIPE,
        stderr=(tmp_path / "stderr.txt").open("w"),
        text=True,
    )


def test_torchrun_passes_the_code_of_its_ranks_on(tmp_path):
    job = start_torchrun(tmp_path, "stopped")
    job.communicate(timeout=60)
    assert job.returncode == 75


def test_torchrun_that_gets_a_signal_was_interrupted(tmp_path):
    job = start_torchrun(tmp_path, "wait")
    ready = [job.stdout.readline() for _ in range(2)]
    assert ready == ["ready\n"] * 2, (tmp_path / "stderr.txt").read_text()
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=60)
    assert job.returncode == 75
