"""Kill training runs at random instants, start them again, and compare what they leave with runs that were never killed.

    python scripts/soak.py --kills 200 --seed 0 --out results/soak/cpu.json
    python scripts/soak.py --kills 50 --door 0.2     a fifth of the processes start as a user's do, python train.py ...

A run is killed with SIGKILL, by the clock or when its folder shows that it is in the middle of something, and the same
command is given again, until it ends by itself. Then every file is compared, bit for bit but for figures of time. The
seed fixes what is waited for; the instants themselves are real. To start quickly, processes are forked from one that
has imported everything and computed nothing. Exit code 1 when anything differs; the folders are kept then.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tqdm import tqdm  # noqa: E402

STEPS, EVAL_EVERY = 48, 5
SETTINGS = (
    "experiment=quickstart",
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "trainer.device=cpu",
    "trainer.precision=fp32",
    f"trainer.steps={STEPS}",
    f"trainer.eval_every={EVAL_EVERY}",
    "trainer.batch_size=6",
    "trainer.save_every=3",
    "trainer.keep_last=2",
    "trainer.keep_every=15",
    "trainer.sample_tokens=4",
    "data.length=32",
    "data.validation_max_tokens=2000",
    "eval.batch_size=8",
    "eval.ngrams=false",
)
VARIANTS = {
    # A refresh with random switching at every third step; rows that straddle documents.
    "alice-pack": (
        "optimizer=alice",
        "optimizer.rank=8",
        "optimizer.leading=3",
        "optimizer.update_interval=3",
        "optimizer.lr=0.02",
        "data.rows=pack",
        "data.workers=0",
    ),
    # Estimates of the Hessian at every second step; a process of its own makes the rows.
    "sophia-truncate": (
        "optimizer=sophia_g",
        "optimizer.update_interval=2",
        "optimizer.gamma=1",
        "optimizer.lr=0.001",
        "data.rows=truncate",
        "data.workers=1",
    ),
}
# Figures of time and memory: all that may differ between two runs of one configuration.
TIMES = {"optimizer_ms", "data_ms", "tokens_per_second", "peak_memory_bytes", "data_share", "mfu"}
TIMES |= {"training_seconds", "wall_seconds"}
MARK = "RACS_ALICE_SOAK"  # an environment variable, by which processes that were left behind are found
PATIENCE = 120.0  # seconds after which a process that should have ended is stuck


class Process(Protocol):
    """What subprocess.Popen and Forked have in common."""

    pid: int

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, sig: int) -> None: ...


# Processes ----------------------------------------------------------------------------------------------------------


class ForkServer:
    """Starts training processes by forking one that has imported all that train.py needs.

    Use it as a context manager; whatever still runs when it is left is killed.
    """

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        self._ended: dict[int, int] = {}
        self._answers: deque[list[Any]] = deque()
        self._rest = b""

    def environment(self) -> dict[str, str]:
        """Of every training process: one thread, so that sums have one order however the process is started."""
        return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "MPLBACKEND": "agg", MARK: self.mark}

    def __enter__(self) -> ForkServer:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self.environment(),
            start_new_session=True,  # Ctrl-C is for this process, which then closes the other
        )
        self._answer("ready")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait(PATIENCE)
        for pid in _marked(self.mark):
            os.kill(pid, signal.SIGKILL)
        self._process.stdout.close()

    def start(self, words: Sequence[str], log: Path, **variables: str) -> Forked:
        """Run ``train.py words...`` with its output appended to ``log``, in an environment with more ``variables``."""
        self.tell("start", list(words), str(log), variables)
        return Forked(self, self._answer("started"))

    def door(self, words: Sequence[str], log: Path, launcher: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        """The same in an interpreter of its own, as users start it."""
        with log.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, *launcher, "train.py", *words],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self.environment(),
                start_new_session=True,
            )

    def tell(self, *order: Any) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()

    def ended(self, pid: int) -> int | None:
        """Exit code of a process that has ended; negative: the signal that ended it."""
        self._read(0)
        return self._ended.get(pid)

    def _answer(self, kind: str) -> int:
        limit = time.monotonic() + PATIENCE
        while not self._answers:
            if time.monotonic() > limit:
                raise RuntimeError(f"the fork server has not answered for {PATIENCE:g} s")
            self._read(1.0)
        answer = self._answers.popleft()
        assert answer[0] == kind, answer
        return answer[1]

    def _read(self, seconds: float) -> None:
        assert self._process.stdout
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            return
        text = os.read(self._process.stdout.fileno(), 65536)
        if not text:
            raise RuntimeError("the fork server has ended; what it printed says why")
        *lines, self._rest = (self._rest + text).split(b"\n")
        for line in lines:
            kind, *values = json.loads(line)
            if kind == "ended":
                self._ended[values[0]] = values[1]
            else:
                self._answers.append([kind, *values])

    def strays(self) -> list[int]:
        """Processes that a training process has left behind; they are given ten seconds to notice that it is gone.

        Only where there is a /proc.
        """
        limit = time.monotonic() + 10
        while found := [pid for pid in _marked(self.mark) if pid != self._process.pid]:
            if time.monotonic() > limit:
                return found
            time.sleep(0.01)
        return []


class Forked:
    """A training process of a ForkServer, with the methods of subprocess.Popen."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self.server, self.pid = server, pid

    def poll(self) -> int | None:
        return self.server.ended(self.pid)

    def wait(self, timeout: float | None = None) -> int:
        limit = time.monotonic() + (timeout or PATIENCE)
        while (code := self.poll()) is None:
            if time.monotonic() > limit:
                raise subprocess.TimeoutExpired("train.py", timeout or PATIENCE)
            time.sleep(0.001)
        return code

    def send_signal(self, sig: int) -> None:
        # The server sends it: until it has waited for a process, nobody else can get that process's number.
        self.server.tell("signal", self.pid, int(sig))


def _marked(mark: str) -> list[int]:
    text, found = f"{MARK}={mark}".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if text in (process / "environ").read_bytes():
                found.append(int(process.name))
        except OSError:  # it has ended, or is somebody else's
            continue
    return found


def serve() -> None:
    """Body of the fork server: orders come on standard input, one a line; answers go to standard output.

    Everything costly is imported here. No tensor is made: threads of torch would not live on in a fork.
    """
    import accelerate  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import sentencepiece  # noqa: F401
    from matplotlib.backends import backend_agg  # noqa: F401
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

    import reporting  # noqa: F401
    import train  # noqa: F401
    from pretraining import trainer  # noqa: F401
    from pretraining.config import compose

    compose(SETTINGS)  # which imports more

    def answer(*values: Any) -> None:
        os.write(1, json.dumps(values).encode() + b"\n")

    children: set[int] = set()
    rest = b""
    answer("ready", os.getpid())
    while True:
        if select.select([0], [], [], 0.002)[0]:
            text = os.read(0, 65536)
            if not text:
                for pid in children:
                    os.kill(pid, signal.SIGKILL)
                return
            *orders, rest = (rest + text).split(b"\n")
            for order in orders:
                kind, *values = json.loads(order)
                if kind == "signal" and values[0] in children:
                    os.kill(*values)
                elif kind == "start":
                    if (pid := os.fork()) == 0:
                        _train(*values)
                    children.add(pid)
                    answer("started", pid)
        for pid in [*children]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                children.remove(pid)
                answer("ended", pid, os.waitstatus_to_exitcode(status))


def _train(words: list[str], log: str, variables: dict[str, str]) -> NoReturn:
    """What train.py does with these words on its command line; the process then ends as any other."""
    from pretraining.config import run_door
    from train import main as train

    output, nothing = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), os.open(os.devnull, os.O_RDONLY)
    for old, new in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(old, new)
    os.environ.update(variables)
    sys.argv = ["train.py", *words]
    run_door(train, root="train")
    raise SystemExit(0)


# What a folder shows -------------------------------------------------------------------------------------------------


class Watch:
    """A run folder seen from outside, and how it was when this was made: before a process was started on it."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.metrics, self.checkpoints = run_dir / "metrics.jsonl", run_dir / "checkpoints"
        self.resumes = max(self.saved(), default=0)
        self._before = {path: _stamp(path) for path in [self.metrics, run_dir / "model", *self._hidden()]}
        self._written: set[str] = set()

    def new(self, path: Path) -> bool:
        """Whether it is there and has been made or changed since."""
        return _stamp(path) not in (None, self._before.get(path))

    def started(self) -> bool:
        """Whether the process has come as far as its record, which it writes anew when it starts."""
        return self.new(self.metrics)

    def saved(self) -> list[int]:
        """Steps of the checkpoints that are in place."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.checkpoints.glob("step-*"))

    def partial(self) -> Path | None:
        """The checkpoint that is being written, or was when the process ended."""
        return next((path for path in self._hidden() if path.suffix == ".partial" and self.new(path)), None)

    def pruning(self) -> bool:
        return any(path.suffix == ".old" and self.new(path) for path in self._hidden())

    def saves(self) -> int:
        """How many checkpoints the process has begun to write, as far as this was called often enough."""
        if partial := self.partial():
            self._written.add(partial.name)
        return len(self._written)

    def last(self) -> tuple[str, int]:
        """Kind and step of the last line of the record; ("", 0) if there is none."""
        try:
            lines = self.metrics.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return "", 0
        line: dict[str, Any] = next(
            (json.loads(line) for line in reversed(lines) if line.endswith(b"\n")), {"kind": "", "step": 0}
        )
        return line["kind"], line["step"]

    def phase(self) -> str:
        """What the process was doing, now that it has ended."""
        kind, step = self.last()
        if (self.run_dir / "summary.json").exists():
            return "ending"
        if not self.started():
            return "start-up"
        if self.partial() or self.pruning():
            return "saving"
        if step == STEPS and STEPS in self.saved():
            return "ending"
        if kind == "eval" or (kind == "train" and (step % EVAL_EVERY == 0 or step == STEPS)):
            # Its sample, and what comes between an evaluation and the checkpoint or the line of the next step.
            return "evaluating"
        return "training"

    def _hidden(self) -> list[Path]:
        return [*self.checkpoints.glob(".step-*")]


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_ctime_ns  # numbers of inodes are given again


Moment = tuple[Callable[[], bool], float]  # whether it has come, and up to how many seconds to wait then


def moments(rng: random.Random, watch: Watch, startup: float) -> tuple[dict[str, Moment], dict[str, Moment]]:
    """Moments to kill a process that is being started now: before the end of the last step, and after it.

    Args:
        startup: seconds that it needs before its first step.
    """
    instant = time.monotonic() + rng.uniform(0, 1.5 * startup)
    steps, saves = rng.randint(1, 7), rng.randint(1, 2)
    summary = watch.run_dir / "summary.json"

    def evaluating() -> bool:
        kind, step = watch.last()
        return watch.started() and kind == "train" and step % EVAL_EVERY == 0

    def writing(pattern: str) -> bool:
        partial = watch.partial() if watch.saves() >= saves else None
        return partial is not None and any(partial.glob(pattern))

    before: dict[str, Moment] = {
        "while it starts": (lambda: True, 0.7 * startup),
        "at some time": (lambda: time.monotonic() > instant, 0),
        "after some steps": (lambda: watch.started() and watch.last()[1] >= watch.resumes + steps, 0.005),
        "when a checkpoint is begun": (lambda: watch.saves() >= saves, 0.005),
        "while a checkpoint is written": (lambda: watch.saves() >= saves, 0.04),
        "while its tensors are written": (lambda: writing("*.safetensors"), 0.01),
        "while its sums are written": (lambda: writing("SHA256SUMS"), 0.001),
        "when a checkpoint is in place": (lambda: max(watch.saved(), default=0) > watch.resumes, 0.002),
        "while evaluating": (evaluating, 0.02),
        "while the sample is written": (lambda: watch.started() and watch.last()[0] == "eval", 0.05),
    }
    after: dict[str, Moment] = {
        "after the last step": (lambda: STEPS in watch.saved() and watch.started(), 0.2),
        "while the model is written": (lambda: watch.new(watch.run_dir / "model"), 0.02),
        "when the summary is written": (lambda: summary.exists() or summary.with_suffix(".json.new").exists(), 0.001),
        "while the picture is drawn": (summary.exists, 0.5),
    }
    return before, after


def compare(whole: Path, killed: Path) -> list[str]:
    """In what a run differs from another one of its configuration, in words; figures of time and memory aside."""
    there, here = _files(whole), _files(killed)
    found = [f"{name} is missing" for name in sorted(there - here)]
    found += [f"{name} was left behind" for name in sorted(here - there)]
    # For an instant, who takes the lock has a file of its own beside it; a kill just then is not held against the run.
    beside = sorted(path.name for path in killed.parent.glob(f".{killed.name}.*"))
    found += [f"{name} was left beside it" for name in beside if not re.search(r"\.lock\.[0-9a-f]{32}$", name)]
    for name in sorted(there & here):
        a, b = whole / name, killed / name
        if name == "metrics.jsonl":
            pairs = zip_longest(metrics_lines(a), metrics_lines(b))
            found += [f"{name}: {y} instead of {x}" for x, y in pairs if x != y][:3]
        elif name == "summary.json" or a.name == "state.json":
            # A checkpoint that a signal asked for, of a step with an evaluation, was saved before that: it says so, and
            # who goes on from it evaluates first. Evaluations themselves are in metrics.jsonl.
            aside = TIMES | {"meters", "evaluated"}
            x, y = ({k: v for k, v in json.loads(f.read_bytes()).items() if k not in aside} for f in (a, b))
            found += [f"{name}: {k} is {y.get(k)}, not {x.get(k)}" for k in sorted(x | y) if x.get(k) != y.get(k)]
        elif name == "samples.txt" or (a.parent.name == "model" and a.name != "README.md"):
            found += [f"{name} differs"] if a.read_bytes() != b.read_bytes() else []
    for folder in sorted({str(Path(name).parent) for name in there & here if name.endswith(".safetensors")}):
        found += [f"{folder}: {tensor} differs" for tensor in _different_tensors(whole / folder, killed / folder)[:3]]
    return found


def _files(folder: Path) -> set[str]:
    """Files, and folders that are empty."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() or not any(path.iterdir())}


def metrics_lines(file: Path) -> list[dict[str, Any]]:
    """Without the figures of time."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def _different_tensors(a: Path, b: Path) -> list[str]:
    """Names of tensors that differ in a bit. Which of a folder's files holds a tensor means nothing."""
    import torch
    from safetensors.torch import load_file

    def load(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
        tensors = {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}
        # Bits: NaN equals itself, and 0 is not -0.
        return {
            name: (str(x.dtype), tuple(x.shape), x.reshape(-1).view(torch.uint8).numpy().tobytes())
            for name, x in tensors.items()
        }

    x, y = load(a), load(b)
    return [name for name in sorted(x.keys() | y.keys()) if x.get(name) != y.get(name)]


# Killing ------------------------------------------------------------------------------------------------------------


class Soak:
    """Runs of one variant that are killed and started again.

    Attributes:
        kills: where each fell; a line of the record.
        restarts, runs, lines: processes started after a kill, runs that have ended, lines of metrics compared.
        problems: in what anything differed from what it should be.
    """

    def __init__(self, server: ForkServer, folder: Path, variant: str, rng: random.Random, door: float = 0.0) -> None:
        """Train the run that is never killed.

        Args:
            door: share of the processes that are started by the command, in an interpreter of their own.
        """
        self.server, self.folder, self.variant, self.rng, self.door = server, folder, variant, rng, door
        self.kills: list[dict[str, Any]] = []
        self.problems: list[str] = []
        self.restarts = self.runs = self.lines = self._logs = 0
        self._startup = {False: 0.5, True: 8.0}
        self._decks: dict[bool, list[str]] = {False: [], True: []}
        folder.mkdir(parents=True, exist_ok=True)
        self.whole = folder / "whole"
        code, _ = self._attempt(self.whole, kill=False)
        if code != 0:
            raise RuntimeError(f"the run that was left alone ended with {code}: {self._tail()}")

    def run(self, kills: int, last: int = 4, told: Callable[[], None] = lambda: None) -> None:
        """One run, killed up to ``kills`` times, ``last`` of them after its last step; then it may end, and is compared.

        It can be fewer: a process may end before the moment that was waited for has come.
        """
        self.runs += 1
        run_dir = self.folder / f"run-{self.runs}"
        after = 0  # kills after the last step: they cost a run no progress, so there has to be an end of them
        for left in range(kills, -1, -1):
            ending = (run_dir / "checkpoints" / f"step-{STEPS:07d}").exists() or left <= last - after
            kill = left > 0 and after < last
            code, fell = self._attempt(run_dir, kill, self.rng.random() < self.door, ending)
            if code != -signal.SIGKILL:
                break
            after += ending
            self.restarts += 1
            self.kills.append({"variant": self.variant, "run": self.runs, **fell})
            told()
            if self.problems:
                return
        if code != 0:
            self._problem(f"ended with exit code {code}: {self._tail()}")
            return
        for difference in compare(self.whole, run_dir):
            self._problem(difference)
        self.lines += len(metrics_lines(run_dir / "metrics.jsonl"))
        if not self.problems:
            shutil.rmtree(run_dir)

    def _attempt(
        self, run_dir: Path, kill: bool, door: bool = False, ending: bool = False
    ) -> tuple[int, dict[str, Any]]:
        """Start the run's command once; its exit code, and where it was when it was killed."""
        words = [*SETTINGS, *VARIANTS[self.variant], f"run_dir={run_dir}"]
        self._logs += 1
        self._log = self.folder / f"{self._logs:04d}.log"
        self._log.touch()  # a process may be killed before it has opened it
        watch = Watch(run_dir)
        began = time.monotonic()
        started = None
        choices = moments(self.rng, watch, self._startup[door])[ending]
        if not self._decks[ending]:  # every moment gets its turn
            self._decks[ending] = self.rng.sample(list(choices), len(choices))
        name = self._decks[ending].pop() if kill else ""
        reached, longest = choices.get(name, (lambda: False, 0))
        process: Process = (self.server.door if door else self.server.start)(words, self._log)
        try:
            while process.poll() is None:
                if started is None and watch.started():
                    started = time.monotonic() - began
                    self._startup[door] = started
                if kill and reached():
                    time.sleep(self.rng.uniform(0, longest))
                    break
                if time.monotonic() > began + PATIENCE:
                    self._problem(f"a process was stuck for {PATIENCE:g} s: {self._tail()}")
                    break
                time.sleep(0.0005)
        finally:
            process.send_signal(signal.SIGKILL)
        code = process.wait(PATIENCE)
        if strays := self.server.strays():
            self._problem(f"processes {strays} were left behind")
        resumed = self._check_start(watch)
        step = watch.last()[1] if watch.started() else watch.resumes
        fell = {"wanted": name, "fell": watch.phase(), "step": step, "partial": watch.partial() is not None}
        return code, {**fell, "resumed_from": resumed, "door": door}

    def _check_start(self, watch: Watch) -> int | None:
        """The step from which the process went on; None if it did not come so far."""
        found = re.search(r"^resumed from .*, after step (\d+)$", self._log.read_text(), re.MULTILINE)
        resumed = int(found[1]) if found else (0 if watch.started() else None)
        if resumed not in (None, watch.resumes):
            self._problem(f"resumed from step {resumed}, but the last checkpoint was of step {watch.resumes}")
        return resumed

    def _problem(self, what: str) -> None:
        self.problems.append(f"{self.variant}, run {self.runs}, after {len(self.kills)} kills: {what}")

    def _tail(self) -> str:
        return self._log.read_text()[-2000:]


def soak(kills: int, seed: int, door: float, folder: Path) -> tuple[list[Soak], float]:
    """Kill ``kills`` times, the variants in turn; returns what happened to each, and seconds."""
    began = time.monotonic()
    rng = random.Random(seed)
    with ForkServer() as server, tqdm(total=kills, unit="kill", dynamic_ncols=True, disable=None) as bar:
        soaks = [Soak(server, folder / name, name, rng, door) for name in VARIANTS]
        done = 0
        while done < kills and not any(one.problems for one in soaks):
            one = min(soaks, key=lambda one: len(one.kills))
            one.run(min(kills - done, 25), told=bar.update)
            done = sum(len(one.kills) for one in soaks)
    return soaks, time.monotonic() - began


# The record ---------------------------------------------------------------------------------------------------------


def make_record(soaks: Sequence[Soak], seconds: float, settings: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    from pretraining.record import environment

    kills = [kill for one in soaks for kill in one.kills]
    problems = [problem for one in soaks for problem in one.problems]
    return {
        "format": 1,
        "result": {"identical": not problems, "problems": problems},
        "kills": len(kills),
        "fell": dict(Counter(kill["fell"] for kill in kills).most_common()),
        "while_a_partial_checkpoint_lay_there": sum(kill["partial"] for kill in kills),
        "of_the_command_itself": sum(kill["door"] for kill in kills),
        "runs": sum(one.runs for one in soaks),
        "restarts": sum(one.restarts for one in soaks),
        "resumed_from": sorted({kill["resumed_from"] for kill in kills} - {None}),
        "compared_lines": sum(one.lines for one in soaks),
        "seconds": round(seconds),
        "settings": {**settings, "common": SETTINGS, "variants": VARIANTS},
        "environment": environment(torch.device("cpu"), 1),
        "each": kills,
    }


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words == ["--serve"]:
        serve()
        return 0
    from benchmarking.record import write  # after serve(): the fork server chooses what it imports

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of what is waited for before each kill")
    parser.add_argument("--door", type=float, default=0.0, help="share of processes in an interpreter of their own")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "soak" / "cpu.json")
    asked = parser.parse_args(words)
    if asked.kills < 1 or not 0 <= asked.door <= 1:
        parser.error("--kills must be at least 1 and --door between 0 and 1.")
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    keep = False
    try:
        soaks, seconds = soak(asked.kills, asked.seed, asked.door, folder)
        record = make_record(soaks, seconds, {"seed": asked.seed, "door": asked.door})
        keep = not record["result"]["identical"]
    except KeyboardInterrupt:
        print("\nInterrupted: nothing was written.", file=sys.stderr)
        return 130
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    record["environment"]["hardware"]["threads"] = 1
    record["environment"]["command"] = shlex.join(["python", "scripts/soak.py", *words])
    write(record, asked.out, ("each",))
    fell = ", ".join(f"{number} {phase}" for phase, number in record["fell"].items())
    print(f"{record['kills']} kills ({fell}) of {record['runs']} runs in {record['seconds']} s: {asked.out}")
    for problem in record["result"]["problems"]:
        print(problem, file=sys.stderr)
    if keep:
        print(f"NOT identical; the folders and logs are in {folder}", file=sys.stderr)
    else:
        print(f"identical: {record['compared_lines']} lines of metrics, weights, states and samples")
    return int(keep)


if __name__ == "__main__":
    raise SystemExit(main())
