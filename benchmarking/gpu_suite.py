"""Everything that a GPU is needed for, in order of worth and within a given time (scripts/gpu_suite.py).

Each job is a process of its own; what it was and how it ended is written down as it ends, and so are its records, so
that nothing is lost with the machine.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from data.errors import UserError
from pretraining.files import replace_text
from pretraining.record import read_json, write_json
from pretraining.signals import end_with_parent
from reporting import RECORD_FILES, load_run, units
from reporting.benchmarks import optimizer_table, solver_tables
from sweeps.local import DIVERGED, divergence

from .training import enlarged_tokenizer, table

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
MACHINE = (  # in a process of its own: this one must not hold memory of the device
    "import json, sys; from pretraining.plan import choose_device; from pretraining.record import environment; "
    "print(json.dumps(environment(choose_device(sys.argv[1]), 1)))"
)
STAGES = ("tests", "optimizers", "training", "comparison")
METHODS = ("alice", "racs", "muon", "fira", "galore", "alice_0")  # after Adam; all have a recipe for llama_60m
ADAM_RATES = "0.001,0.003"  # the paper's, and three times as much: its Adam looks weakly tuned
TRAINING = {  # in order of worth: minutes, rows of a forward pass, rounds, steps of a turn
    "llama_60m": (4, 64, 5, 8),
    "llama_350m": (6, 32, 4, 5),
    "llama_130m": (4, 64, 5, 8),
    "llama_1b": (10, 8, 4, 3),  # rows for the models of all contestants on one card of 80 GB
}
GRACE = 60.0  # seconds that a training gets to save its state
LINES = 30  # of a job's output that are kept where it fails
STOPPED = 75  # exit code of train.py after a signal: the state is saved
OPTIMIZERS = {  # minutes, dtypes: in float32, the 1.3B matrices with all optimizers of a group need more than 80 GB
    "llama_60m": (2, ("bf16", "fp32")),
    "llama_350m": (4, ("bf16",)),
    "llama_1b": (8, ("bf16",)),
}
# Above 60M. Apollo's draws and SOAP's decompositions would take minutes of each.
LARGE = ("--only", "adam,racs,alice,alice_0,galore,muon", "--repeats", "10")
SOLVERS = "512x1376r128,1024x2736r256"  # of refreshes at 60M and 350M
MODELS = tuple(dict.fromkeys((*OPTIMIZERS, *TRAINING)))
LEAST_STEPS = 100  # a shorter comparison says nothing
GUESS = 250_000.0  # tokens/s of llama_60m, where nothing has been measured
SAFETY = 0.8  # part of the time that the comparison's steps are planned for: slower methods and refreshes take the rest
OTHER = 60.0  # seconds of a run that are not steps: start, evaluations, checkpoints
SWITCHES = {"full": "trainer.loss=full", "liger": "trainer.loss=liger", "compile": "trainer.compile=true"}


@dataclass(frozen=True)
class Job:
    """A process, and what it leaves.

    Attributes:
        name: stage and job; also the name of its files.
        command: to run, in the repository.
        minutes: that it should take: a guess.
        run: folder of a training, whose record is kept; None for other jobs.
    """

    name: str
    command: tuple[str, ...]
    minutes: float
    run: Path | None = None

    @property
    def stage(self) -> str:
        return self.name.partition("/")[0]


@dataclass
class Suite:
    """What was asked for, and where things are.

    Attributes:
        out: records, to be committed.
        work: run folders with checkpoints, logs, packages: not to be committed.
        deadline: by the monotonic clock.
        dry: nothing is written.
        models: of the stages optimizers and training.
    """

    out: Path
    work: Path
    device: str
    tiny: bool
    stages: tuple[str, ...]
    adam_rates: tuple[str, ...]
    methods: tuple[str, ...]
    data: Path | None
    tokenizer: str | None
    deadline: float
    dry: bool = False
    models: tuple[str, ...] = MODELS

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def marker(self, job: Job) -> Path:
        return self.out / "jobs" / f"{job.name.replace('/', '-')}.json"

    def state(self, job: Job) -> dict[str, Any]:
        """What is known of a job: {} where it has never begun."""
        file = self.marker(job)
        return read_json(file) if file.is_file() else {}


# The plan -----------------------------------------------------------------------------------------------------------


def jobs(suite: Suite) -> Iterator[Job]:
    """All jobs in order of worth. Those of the comparison depend on what the jobs before have measured."""
    for stage in STAGES:
        if stage in suite.stages:
            yield from {
                "tests": tests,
                "optimizers": optimizer_benchmarks,
                "training": training_benchmarks,
                "comparison": comparison,
            }[stage](suite)


def tests(suite: Suite) -> Iterator[Job]:
    def pytest(name: str, minutes: float, *arguments: str) -> Job:
        return Job(f"tests/{name}", (PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments), minutes)

    if suite.tiny:
        yield pytest("devices", 0.3, "tests/optimizers/test_devices.py", "-k", "racs and float32")
        return
    # side by side where the plugin is there: they wait for the CPU, not for the GPU
    several = ("-n", str(min(8, os.cpu_count() or 1))) if find_spec("xdist") else ()
    yield pytest("devices", 2, *several, "tests/optimizers/test_devices.py")
    # trainer.device=auto takes the GPU where there is one
    files = (f"tests/pretraining/test_{name}.py" for name in ("trainer", "methods", "liger"))
    yield pytest("trainer", 4, *several, *files)


def optimizer_benchmarks(suite: Suite) -> Iterator[Job]:
    def benchmark(model: str, dtype: str, minutes: float, *more: str) -> Job:
        name = f"optimizers_{model}_{suite.device}_{dtype}"
        arguments = ("--model", model, "--device", suite.device, "--dtype", dtype, "--out", record(suite, name))
        return Job(f"optimizers/{model}_{dtype}", (*benchmark_command("optimizers"), *arguments, *more), minutes)

    if suite.tiny:
        yield benchmark("llama_tiny", "fp32", 0.3, "--only", "racs", "--repeats", "2", "--refreshes", "1")
        return
    solvers = (*benchmark_command("solvers"), "--device", suite.device, "--shapes", SOLVERS)
    yield Job("optimizers/solvers", (*solvers, "--out", record(suite, f"solvers_{suite.device}")), 1)
    for model, (minutes, dtypes) in OPTIMIZERS.items():
        for dtype in dtypes if model in suite.models else ():
            yield benchmark(model, dtype, minutes, *(LARGE if model != "llama_60m" else ()))


def training_benchmarks(suite: Suite) -> Iterator[Job]:
    def benchmark(model: str, minutes: float, *more: str) -> Job:
        out = training_record(suite, model)
        arguments = ("--model", model, "--device", suite.device, "--out", shown(out), *more)
        return Job(f"training/{model}", (*benchmark_command("training"), *arguments), minutes)

    if suite.tiny:
        small = (
            "--precision fp32 --rounds 2 --steps 1 --settle 1 --rows 2 --length 32 --methods adam,racs --rivals none"
        )
        yield benchmark("llama_tiny", 0.5, *small.split(), "--shared", *TINY[:4])
        return
    switches = [word for name, setting in SWITCHES.items() for word in ("--variant", f"{name}:{setting}")]
    for model, (minutes, micro, rounds, steps) in TRAINING.items():
        if model not in suite.models:
            continue
        size = f"--precision bf16 --micro {micro} --rounds {rounds} --steps {steps} --methods adam,alice,racs"
        yield benchmark(model, minutes, *size.split(), *switches)


def benchmark_command(what: str) -> tuple[str, ...]:
    return (PYTHON, "scripts/benchmark.py", what)


def training_record(suite: Suite, model: str) -> Path:
    return suite.out / f"training_{model}_{suite.device}_{'fp32' if suite.tiny else 'bf16'}.json"


def record(suite: Suite, name: str) -> str:
    return shown(suite.out / f"{name}.json")


TINY = (  # a model and steps of milliseconds
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=2",
    "trainer.batch_size=2",
    "data.length=32",
    "data.validation_max_tokens=256",
    "trainer.precision=fp32",
)


def comparison(suite: Suite) -> Iterator[Job]:
    """Trainings on one order of data for one number of steps: Adam's first, since everything is compared with it."""
    runs: list[tuple[str, str, tuple[str, ...]]]
    runs = [(f"adam-{rate}", "adam", (f"optimizer.lr={rate}",)) for rate in suite.adam_rates]
    runs += [(method, method, ()) for method in suite.methods]
    settled = settle(suite, len(runs))
    if settled is None:
        return
    steps, seconds = settled["steps"], settled["seconds_per_run"]
    model = "llama_tiny" if suite.tiny else "llama_60m"
    for name, method, own in runs:
        folder = suite.work / "runs" / name
        settings = [
            f"model={model}",
            f"optimizer={method}",
            *data_settings(suite, model),
            f"trainer.device={suite.device}",
            f"trainer.steps={steps}",
            f"trainer.eval_every={max(1, steps // 5)}",
            "data.validation_max_tokens=2000000",
            f"trainer.save_every={max(1, steps // 4)}",
            "trainer.keep_last=1",
            "trainer.save_model=false",
            "trainer.sample_tokens=0",
            f"trainer.log_every={max(1, steps // 500)}",
            "trainer.resume=auto",
            *own,
            *refreshes(method, steps),
            *(TINY if suite.tiny else ()),
            f"run_dir={shown(folder)}",
        ]
        yield Job(f"comparison/{name}", (PYTHON, "train.py", *settings), seconds / 60, folder)


def refreshes(method: str, steps: int) -> list[str]:
    """A fiftieth of the steps between refreshes, as in the paper's runs, where a method's own interval is longer."""
    file = ROOT / "configs" / "optimizer" / f"{method}.yaml"
    interval = OmegaConf.select(OmegaConf.load(file), "update_interval") if file.is_file() else None
    return [f"optimizer.update_interval={max(1, min(interval, steps // 50))}"] if interval else []


def settle(suite: Suite, runs: int) -> dict[str, Any] | None:
    """Steps of every run, fixed when the comparison first begins; None where there is no time for one that means anything."""
    file = suite.out / "comparison.json"
    if file.is_file():
        there = read_json(file)
        if there["runs"] != runs or there["data"] != data_name(suite):
            raise UserError(
                f"{shown(file)} is of {there['runs']} runs on {there['data']}, not of {runs} on {data_name(suite)}: give "
                "the same --methods, --adam-rates and --data, or another --out and --work."
            )
        return there
    tokens = 2 * 32 if suite.tiny else 512 * 256
    speed, measured = tokens_per_second(suite)
    most, least = (20, 2) if suite.tiny else (10_000, LEAST_STEPS)
    other = 0.0 if suite.tiny else OTHER
    steps = min(most, int((SAFETY * max(0.0, suite.left()) / runs - other) * speed / tokens))
    if steps < least:
        return None
    settled = {
        "steps": steps,
        "runs": runs,
        "data": data_name(suite),
        "tokens_per_step": tokens,
        "tokens_per_second": speed,
        "measured": measured,
        "seconds_per_run": (steps * tokens / speed + other) / SAFETY,
    }
    if not suite.dry:
        write_json(file, settled)
    return settled


def tokens_per_second(suite: Suite) -> tuple[float, bool]:
    """Of the slowest method of our trainer that was measured, and whether any was."""
    file = training_record(suite, "llama_tiny" if suite.tiny else "llama_60m")
    if file.is_file():
        lines = read_json(file)["contestants"]
        speeds = [line["tokens_per_second"] for line in lines if line["loop"] == "ours" and not line["settings"]]
        if speeds := [speed for speed in speeds if speed]:
            return min(speeds), True
    return GUESS if not suite.tiny else 2000.0, False


def data_name(suite: Suite) -> str:
    return suite.data.name if suite.data else "the embedded sample"


def data_settings(suite: Suite, model: str) -> list[str]:
    tokenizer = [f"tokenizer={suite.tokenizer}"] if suite.tokenizer else []
    if suite.data is not None:
        kind = "prepared" if (suite.data / "manifest.json").is_file() else "c4_local"
        return [f"data={kind}", f"data.path={suite.data}", *tokenizer]
    if not tokenizer and not suite.tiny:
        tokenizer = [f"tokenizer={shown(suite.work / 'sample_4k_of_32000.model')}"]
    return ["data=sample", *tokenizer]


def shown(path: Path) -> str:
    """Relative to the repository where possible: records are committed, and folders of this machine say nothing."""
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


# Running ------------------------------------------------------------------------------------------------------------


def work(suite: Suite) -> bool:
    """Do what is not done, as far as the time reaches; whether everything that was begun went well."""
    prepare(suite)
    well, seen = True, []
    for job in jobs(suite):
        seen.append(job)
        if suite.state(job).get("state") in ("done", "diverged"):
            print(f"{job.name}: done before", flush=True)
            continue
        # half of what it should take, or a minute of a training, which can go on
        if suite.left() < (min(60.0, 30 * job.minutes) if job.run else 30 * job.minutes):
            print(f"{job.name}: no time left", flush=True)
            continue
        try:
            found = run(suite, job)
        finally:
            write_summary(suite, seen)
        print(f"{job.name}: {found['state']} in {units.duration(found['seconds'])}", flush=True)
        well &= found["state"] in ("done", "diverged", "stopped")
    if "comparison" in suite.stages and not any(job.stage == "comparison" for job in seen):
        print("comparison: no time left for a training that says anything", flush=True)
    write_summary(suite, seen)
    return well


def prepare(suite: Suite) -> None:
    """Folders, and a tokenizer of the model's size where text comes from the embedded sample."""
    asked = subprocess.run([PYTHON, "-c", MACHINE, suite.device], cwd=ROOT, capture_output=True, text=True)
    if asked.returncode:
        why = (asked.stderr.strip().splitlines() or ["no message"])[-1].rpartition("Error: ")[2]
        raise UserError(
            f"the device {suite.device} cannot be used ({why}): see python scripts/doctor.py, or try --device cpu --tiny."
        )
    if "comparison" in suite.stages and (suite.out / "comparison.json").is_file():
        settle(
            suite, len(suite.adam_rates) + len(suite.methods)
        )  # another comparison than the one begun is refused at once
    for folder in (suite.out / "jobs", suite.work / "logs", suite.work / "runs"):
        folder.mkdir(parents=True, exist_ok=True)
    facts = json.loads(asked.stdout)
    del facts["command"]
    write_json(suite.out / "machine.json", facts)
    if suite.data is None and not suite.tiny and "comparison" in suite.stages:
        enlarged_tokenizer(32_000, suite.work)


def run(suite: Suite, job: Job) -> dict[str, Any]:
    """One job to its end or to the end of the time; its marker.

    A training is asked to save first; whatever is left of the job's process group after that is killed.
    """
    before = suite.state(job)
    log = suite.work / "logs" / f"{job.name.replace('/', '-')}.log"
    variables = {**os.environ, "PYTHONUNBUFFERED": "1", "MPLBACKEND": "agg"}
    # A training may use all that is left; another job at most four times what it should take.
    grace = GRACE if job.run is not None and not suite.tiny else 5.0
    limit = suite.left() - grace
    if job.run is None:
        limit = min(limit, 240 * job.minutes)
    print(f"{job.name}: {units.duration(max(1.0, limit))} at most", flush=True)
    began = time.monotonic()
    code: int | None = None
    slow = False  # it is the job that took too long, not that the suite's time is over
    with log.open("ab" if job.run is not None else "wb") as output:
        process = subprocess.Popen(
            job.command,
            cwd=ROOT,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=end_with_parent,  # nothing goes on beside the next suite if this one is killed
        )
        try:
            code = process.wait(timeout=max(1.0, limit))
        except subprocess.TimeoutExpired:
            slow = suite.left() > 2 * grace
        finally:
            end(process, grace)
            seconds = time.monotonic() - began + (before.get("seconds", 0.0) if job.run is not None else 0.0)
            found = finish(suite, job, code, slow, seconds, log)
    return found


def end(process: subprocess.Popen[bytes], grace: float) -> None:
    """Ask the process to stop if it has not, then kill all of its group."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=grace)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def finish(suite: Suite, job: Job, code: int | None, slow: bool, seconds: float, log: Path) -> dict[str, Any]:
    """Keep what a job has left; ``code`` is None where it was stopped. Returns its marker."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    state = "done" if code == 0 else "stopped" if code in (None, STOPPED) and not slow else "failed"
    if job.run is not None and (job.run / "config.yaml").is_file():
        if code == DIVERGED:
            state = "diverged"
            if not (job.run / "diverged.json").is_file():  # train.py writes it
                write_json(job.run / "diverged.json", divergence(text, job.run))
        keep = suite.out / "runs" / job.run.name
        keep.mkdir(parents=True, exist_ok=True)
        for name in RECORD_FILES:
            if (job.run / name).is_file():
                content = (job.run / name).read_text(encoding="utf-8")
                replace_text(keep / name, without_folders(content, suite))
        if state in ("done", "diverged"):
            shutil.rmtree(job.run / "checkpoints", ignore_errors=True)  # of a run that is over: only space
    found: dict[str, Any] = {
        "job": job.name,
        "state": state,
        "exit_code": code,
        "seconds": round(seconds, 1),
        "command": shlex.join(["python", *(without_folders(word, suite) for word in job.command[1:])]),
    }
    if state != "done":
        found["end_of_output"] = lines[-LINES:]
    write_json(suite.marker(job), found)
    return found


def without_folders(text: str, suite: Suite) -> str:
    """``text`` without the places of this machine."""
    for place in (suite.data, suite.out, suite.work, ROOT):
        if place is not None and str(place) != place.name:
            text = text.replace(str(place), place.name)
    return text


# The summary --------------------------------------------------------------------------------------------------------


def write_summary(suite: Suite, planned: Sequence[Job]) -> None:
    """summary.md, from the records alone: of these jobs and of those that earlier calls have run."""
    facts = read_json(suite.out / "machine.json")
    hardware = facts["hardware"]
    parts = [
        "# What ran on this machine",
        "",
        f"{hardware['device']}, {hardware['cpu']}, {hardware['cores']} cores; torch {facts['versions']['torch']}; commit "
        f"{facts['commit'] or 'unknown'}{' with changes' if facts['uncommitted_changes'] else ''}.",
        "",
    ]
    known = [read_json(file) for file in sorted((suite.out / "jobs").glob("*.json"))]
    states = {found["job"]: found for found in known} | {job.name: suite.state(job) for job in planned}
    states = dict(sorted(states.items(), key=lambda item: STAGES.index(item[0].partition("/")[0])))
    parts += ["| job | state | time |", "|---|---|---|"]
    for name, found in states.items():
        time_taken = units.duration(found["seconds"]) if found else ""
        parts.append(f"| {name} | {found.get('state', 'not run')} | {time_taken} |")
    for file in sorted(suite.out.glob("training_*.json")):
        parts += ["", *training_text(read_json(file))]
    for file in sorted(suite.out.glob("optimizers_*.json")):
        parts += [
            "",
            f"## Optimizer steps: {file.stem.removeprefix('optimizers_')}",
            "",
            optimizer_table(read_json(file)),
        ]
    for file in sorted(suite.out.glob("solvers_*.json")):
        tables = solver_tables(read_json(file))
        parts += [line for title, text in tables.items() for line in ("", f"## {title}", "", text)]
    parts += comparison_table(suite)
    for name, found in states.items():
        if found.get("state") == "failed":
            why = "too slow" if found["exit_code"] is None else f"exit code {found['exit_code']}"
            output = [without_folders(line, suite) for line in found["end_of_output"]]
            parts += ["", f"## {name} failed ({why})", "", "```", *output, "```"]
    replace_text(suite.out / "summary.md", "\n".join(parts) + "\n")


def training_text(found: dict[str, Any]) -> list[str]:
    s = found["settings"]
    return [f"## Training: {s['model']}_{s['device']}_{s['precision']}", "", "```", table(found), "```"]


def comparison_table(suite: Suite) -> list[str]:
    folders = sorted((suite.out / "runs").glob("*/config.yaml"))
    if not folders:
        return []
    settled = read_json(suite.out / "comparison.json")
    lines = [
        "",
        f"## Training on {settled['data']}, {settled['steps']:,} steps of {settled['tokens_per_step']:,} tokens",
        "",
        "| run | steps | validation perplexity | tokens/s |",
        "|---|---|---|---|",
    ]
    if suite.data is None:
        lines[3:3] = [
            "The embedded sample is read many times over: this shows that the runs work, and ranks nothing.",
            "",
        ]
    for file in folders:
        loaded = load_run(file.parent)
        done = int(loaded.train["step"][-1]) if len(loaded.train["step"]) else 0
        summary = loaded.summary or {}
        quality = units.perplexity(loaded.perplexity) if loaded.summary or loaded.diverged else "not finished"
        speed = f"{summary['tokens_per_second']:,.0f}" if summary.get("tokens_per_second") else ""
        lines.append(f"| {file.parent.name} | {done:,} | {quality} | {speed} |")
    return lines


def dry_run(suite: Suite) -> str:
    """The plan, and which of it the time reaches."""
    lines, minutes, left = [], 0.0, suite.left() / 60
    for job in jobs(suite):
        state = suite.state(job).get("state", "to do")
        if state not in ("done", "diverged"):
            minutes += job.minutes
            if job.stage != "comparison":  # which plans for what the others leave
                suite.deadline -= 60 * job.minutes
        fits = "" if minutes <= left else "  (probably no time)"
        lines.append(f"{state:<9} {job.minutes:6.1f} min  {job.name}{fits}")
        lines.append(f"          {without_folders(shlex.join(['python', *job.command[1:]]), suite)}")
    if "comparison" in suite.stages and not any(" comparison/" in line for line in lines):
        lines.append("comparison: no time for a training that says anything")
    lines.append(f"about {minutes:.0f} of {left:.0f} minutes; all times are guesses until something is measured")
    return "\n".join(lines)
