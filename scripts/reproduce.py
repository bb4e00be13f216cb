"""Fill cells of the paper: say which are there and what the others cost, run those, refresh the tables.

    python scripts/reproduce.py table2 --size 60m                    the 60M column of Table 2, both last layers
    python scripts/reproduce.py table2 --size 60m --dry-run          what is there, what is missing, how long it takes
    python scripts/reproduce.py table2 --optimizers alice,racs --seeds 42,43
    python scripts/reproduce.py table5 --launcher "accelerate launch --num_processes 8"
    python scripts/reproduce.py table2 --size 1b --list | xargs -r -L 1 sbatch scripts/slurm/train.sbatch
    python scripts/reproduce.py table2 --size 1b --collect           what those jobs have finished

Arguments of the form key=value go to train.py. One run after the other, in runs/paper/<experiment>/s<seed> (paths.runs=DIR:
in DIR/paper/...); a run that was stopped goes on from its checkpoint. The record of a finished run is copied to
results/runs/paper/<experiment>/s<seed>. A run that fails is reported and the others go on; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import math
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from reporting import RECORD_FILES, load_run, units  # noqa: E402
from reporting.paper.cells import CELLS, EXPERIMENTS, OPTIMIZERS, RECORDS, SIZES, Experiment  # noqa: E402
from reporting.paper.numbers import TOKENS_PER_STEP, load_paper  # noqa: E402
from reporting.paper.records import misfits  # noqa: E402
from reporting.terminal import printing  # noqa: E402
from sweeps.slots import visible_gpus  # noqa: E402

WHAT = ("table2", "table4", "table5", "figure5", "figure6")
STOPPED = 75  # exit code of train.py after a signal: the state is saved


@dataclass
class Job:
    """A run, and how far it is.

    Attributes:
        name: below both folders: experiment and seed.
        folder: of the run itself, as train.py is told.
        state: "recorded", "finished" (its record is not copied yet), "stopped" or "missing".
        note: for people.
        steps, done: of the optimizer.
        tokens_per_step: padding included.
    """

    experiment: Experiment
    seed: int
    name: str
    folder: Path
    state: str
    note: str
    steps: int
    done: int = 0
    tokens_per_step: int = TOKENS_PER_STEP

    @property
    def tokens(self) -> int:
        """Training tokens that are left."""
        return (self.steps - self.done) * self.tokens_per_step

    @property
    def size(self) -> str:
        return self.experiment.model.removeprefix("llama_")


def selected(what: str, sizes: Sequence[str], optimizers: Sequence[str]) -> list[Experiment]:
    """The experiments of a table or figure, each once, in the order of their cells."""
    names = dict.fromkeys(cell.experiment for cell in CELLS if what == "all" or cell.table.startswith(what))
    experiments = [EXPERIMENTS[name] for name in names]
    return [e for e in experiments if e.model.removeprefix("llama_") in sizes and e.optimizer in optimizers]


def look(experiment: Experiment, seed: int, tag: str, settings: Sequence[str], root: Path) -> Job:
    """How far a run is, from its record or its run folder."""
    name = f"{experiment.name}/s{seed}{'-' + tag if tag else ''}"
    job = Job(experiment, seed, name, Path("runs/paper", name), "missing", "", experiment.steps)
    if settings:
        cfg = _composed(experiment, seed, settings)
        job.folder = Path(cfg.paths.runs, "paper", name)
        job.steps, job.tokens_per_step = cfg.trainer.steps, cfg.trainer.batch_size * cfg.data.length
    for folder, ended in ((root / RECORDS / name, "recorded"), (root / job.folder, "finished")):
        if not (folder / "config.yaml").is_file():
            continue
        run = load_run(folder)
        if run.summary is not None or run.diverged is not None:
            why = misfits(run, experiment)
            job.state, job.done = ended, job.steps
            job.note = units.perplexity(run.perplexity) + (f", not the cell's number: {'; '.join(why)}" if why else "")
            return job
        if ended == "finished" and len(run.train["step"]):
            job.state, job.done = "stopped", min(job.steps, int(run.train["step"][-1]))
            job.note = f"at step {job.done:,}"
    return job


def _composed(experiment: Experiment, seed: int, settings: Sequence[str]) -> Any:
    """What train.py would make of it. UserError if it would refuse it."""
    from pretraining.config import compose, quoted, validate

    cfg = compose([f"experiment={experiment.name}", f"seed={seed}", *map(quoted, settings)])
    validate(cfg)
    return cfg


# ---------------------------------------------------------------------------------------------- the estimate


def throughput(job: Job, given: dict[str, float]) -> tuple[float, str]:
    """Tokens per second, and where the number is from."""
    if job.size in given:
        return given[job.size], ""
    paper, printed = load_paper(), SIZES[job.size]
    speed = paper.throughput(job.experiment.optimizer, printed)
    if speed:
        return speed, "paper"
    return paper.throughput("adam", printed) or math.nan, "Adam's in the paper"


def report(jobs: Sequence[Job], given: dict[str, float], price: float | None) -> str:
    """What is there, what is missing, and what that takes."""
    values = {cell.experiment: cell.paper_value for cell in CELLS if cell.paper_value is not None}
    width = max(len(job.name) for job in jobs)
    lines, seconds, sources = [], 0.0, set()
    for job in jobs:
        line = f"{job.state:<9} {job.name:<{width}}  "
        if job.state in ("recorded", "finished"):
            line += f"{job.note} (paper: {values[job.experiment.name]:g})"
        else:
            speed, source = throughput(job, given)
            seconds += job.tokens / speed
            sources.add(source)
            line += f"{units.count(job.tokens)} tokens, {units.duration(job.tokens / speed)} at {speed:,.0f} tokens/s"
            line += (f" ({source})" if source else "") + (f", {job.note}" if job.note else "")
        lines.append(line)
    left = [job for job in jobs if job.state in ("stopped", "missing")]
    lines.append(f"{len(jobs)} runs: {len(jobs) - len(left)} ended, {len(left)} to do.")
    if left:
        tokens = sum(job.tokens for job in left)
        cost = f", {seconds / 3600 * price:,.2f} at {price:g} an hour" if price is not None else ""
        lines.append(
            f"To do: {units.count(tokens)} tokens, {units.duration(seconds)} of training{cost}. Evaluations come on top "
            "(about 5 % if a forward pass takes a third of a step)."
        )
        if sources - {""}:
            lines.append(
                "Throughput of Figure 3: A100s, the paper does not say how many. For your machine: --tokens-per-second."
            )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- the runs


class Terminated(BaseException):
    """SIGTERM came, to this process alone."""


def arguments(job: Job, settings: Sequence[str]) -> list[str]:
    """What train.py is told of a run."""
    return [f"experiment={job.experiment.name}", f"seed={job.seed}", f"run_dir={job.folder.as_posix()}", *settings]


def train(job: Job, trainer: Sequence[str], settings: Sequence[str], root: Path) -> int:
    """One run to its end; its exit code."""
    command = [*trainer, *arguments(job, settings)]
    print(f"\n$ {shlex.join(command)}", flush=True)
    with subprocess.Popen(command, cwd=root) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:  # from the terminal, which has told the run as well: it saves
            process.wait()
            raise
        except Terminated:
            process.terminate()
            process.wait()
            raise


def keep(job: Job, root: Path) -> None:
    """Copy the record of a finished run to the results, whole or not at all."""
    source, target = root / job.folder, root / RECORDS / job.name
    new = target.with_name(target.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    for name in RECORD_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, new / name)
    shutil.rmtree(target, ignore_errors=True)  # what an unfinished run may have left
    new.rename(target)


def work(jobs: Sequence[Job], trainer: Sequence[str], settings: Sequence[str], root: Path) -> dict[str, str]:
    """Run what is missing, keep the records of what has ended; the runs that failed, and why.

    Raises:
        KeyboardInterrupt: stopped by the user.
        Terminated: stopped by a signal.
    """
    failed = {}
    for job in jobs:
        if job.state == "recorded":
            continue
        if job.state != "finished":
            code = train(job, trainer, settings, root)
            diverged = (root / job.folder / "diverged.json").is_file()  # a result; a launcher's exit code may hide it
            if code == STOPPED:
                raise Terminated
            if code != 0 and not diverged:
                failed[job.name] = f"ended with exit code {code}"
                print(f"error: {job.name} ended with exit code {code}; going on with the others", file=sys.stderr)
                continue
            if not diverged and not (root / job.folder / "summary.json").is_file():
                failed[job.name] = "wrote no summary.json"
                continue
        keep(job, root)
        print(f"recorded {(RECORDS / job.name).as_posix()}", flush=True)
    return failed


def refresh(root: Path) -> bool:
    """Rebuild the tables from the records; False if that failed."""
    if not (root / "scripts" / "tables.py").is_file():
        print("note: scripts/tables.py is not there; the tables were not refreshed")
        return True
    return subprocess.run([sys.executable, "scripts/tables.py"], cwd=root, check=False).returncode == 0


# ---------------------------------------------------------------------------------------------- the command


def main(argv: Sequence[str] | None = None, root: Path = ROOT, trainer: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # nargs: without it a missing table would be reported as a missing key=value too
    parser.add_argument("what", nargs="?", type=_what, help=f"{', '.join(WHAT)} or all")
    parser.add_argument(
        "--size", type=_some(SIZES), default=list(SIZES), help="60m, 130m, 350m, 1b; several as in 60m,1b"
    )
    parser.add_argument("--optimizers", type=_some(OPTIMIZERS), default=list(OPTIMIZERS), help=", ".join(OPTIMIZERS))
    parser.add_argument("--seeds", type=_seeds, default=[42], help="default 42")
    parser.add_argument("--launcher", default=shlex.quote(sys.executable), help="what runs train.py")
    parser.add_argument("--tag", type=_tag, help="end of the folders' names, for runs with other settings")
    parser.add_argument(
        "--tokens-per-second", type=_speeds, default={}, metavar="N", help="of your machine; or by size: 60m=N,1b=N"
    )
    parser.add_argument("--price-per-hour", type=_positive, metavar="P", help="of the whole machine")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--dry-run", action="store_true", help="stop after the estimate")
    instead.add_argument(
        "--list", action="store_true", help="print what train.py would be told of each run to do, a line each, and stop"
    )
    instead.add_argument(
        "--collect", action="store_true", help="train nothing: keep the records of what has ended, refresh the tables"
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="for train.py")
    asked = parser.parse_intermixed_args(sys.argv[1:] if argv is None else argv)
    if asked.what is None:
        parser.error(f"nothing is asked for: choose from {', '.join(WHAT)}, all.")
    for setting in asked.settings:
        key, equals, _ = setting.partition("=")
        if not equals:
            parser.error(f"cannot read {setting!r}: settings for train.py are written key=value.")
        if key in ("experiment", "seed", "run_dir"):
            parser.error(
                f"{key} is what this command chooses for each run: leave it out (--seeds and --tag are yours)."
            )
    experiments = selected(asked.what, asked.size, asked.optimizers)
    if not experiments:
        parser.error(f"{asked.what} has no cell of these sizes and optimizers: leave out --size or --optimizers.")
    speeds = asked.tokens_per_second
    sizes = sorted({experiment.model.removeprefix("llama_") for experiment in experiments}, key=list(SIZES).index)
    if isinstance(speeds, float):
        if len(sizes) > 1:
            parser.error(f"one --tokens-per-second for {', '.join(sizes)}: give one for each, as in {sizes[0]}=90000.")
        speeds = {sizes[0]: speeds}
    from data.errors import UserError

    try:
        jobs = [look(e, seed, asked.tag or "", asked.settings, root) for e in experiments for seed in asked.seeds]
    except (OSError, ValueError, UserError) as error:
        print(
            f"error: {error}" + ("; put it right and try again" if isinstance(error, OSError) else ""), file=sys.stderr
        )
        return 2 if isinstance(error, UserError) else 1
    if asked.list:
        for job in jobs:
            if job.state in ("stopped", "missing"):
                print(shlex.join(arguments(job, asked.settings)))
        return 0
    print(report(jobs, speeds, asked.price_per_hour), flush=True)
    gpus = len(visible_gpus())
    if gpus > 1 and asked.launcher == parser.get_default("launcher") and not asked.collect:
        launcher = f"torchrun --standalone --nproc_per_node={gpus}"
        print(f"Each run uses one of {gpus} GPUs: for all of them, add --launcher '{launcher}'.", flush=True)
    if asked.collect:
        jobs = [job for job in jobs if job.state == "finished"]
    if asked.dry_run:
        return 0
    try:
        failed = work(jobs, trainer or [*shlex.split(asked.launcher), "train.py"], asked.settings, root)
    except (KeyboardInterrupt, Terminated) as stop:
        print("\nStopped: the same command goes on from here.", file=sys.stderr)
        return 130 if isinstance(stop, KeyboardInterrupt) else STOPPED
    except OSError as error:
        print(f"error: {error}; put it right and run the same command again", file=sys.stderr)
        return 1
    refreshed = refresh(root)
    for name, why in failed.items():
        print(f"error: {name} {why}; the same command tries it again", file=sys.stderr)
    if not refreshed:
        print("error: the tables could not be refreshed; run scripts/tables.py", file=sys.stderr)
    return 0 if refreshed and not failed else 1


def _what(text: str) -> str:
    if text in ("figure1", "figure2", "figure3"):
        raise argparse.ArgumentTypeError("Figures 1 to 3 show runs of Table 2: ask for table2.")
    if text in ("table1", "table3", "table6", "figure4"):
        raise argparse.ArgumentTypeError(f"{text} needs no training: scripts/tables.py makes it.")
    if text not in (*WHAT, "all"):
        raise argparse.ArgumentTypeError(f"there is no {text!r}: choose from {', '.join(WHAT)}, all.")
    return text


def _some(choices: Any) -> Any:
    """Names out of `choices`, separated by commas."""

    def read(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        for name in names:
            if name not in choices:
                raise argparse.ArgumentTypeError(f"there is no {name!r}: choose from {', '.join(choices)}.")
        if not names:
            raise argparse.ArgumentTypeError(f"nothing is named: choose from {', '.join(choices)}.")
        return list(dict.fromkeys(names))

    return read


def _seeds(text: str) -> list[int]:
    try:
        seeds = list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        seeds = [-1]
    if min(seeds) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of seeds: write whole numbers, as in 42,43.")
    return seeds


def _tag(text: str) -> str:
    if not text.replace("-", "").replace("_", "").isalnum():
        raise argparse.ArgumentTypeError(f"{text!r} ends no folder's name well: use letters, digits, - and _.")
    return text


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0: give one, as in 90000.")
    return number


def _speeds(text: str) -> float | dict[str, float]:
    if "=" not in text:
        return _positive(text)
    pairs = [part.partition("=") for part in text.split(",")]
    return {_some(SIZES)(size)[0]: _positive(number) for size, _, number in pairs}


def _terminate(number: int, _: Any) -> NoReturn:
    raise Terminated


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminate)
    raise SystemExit(printing(main))
