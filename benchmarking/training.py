"""Tokens per second of our trainer against a plain `transformers.Trainer` and a GaLore-style loop, side by side in one run.

Every contestant is a process of its own (benchmarking/loops.py) with the same environment, that waits while it is not its
turn. In each of --rounds rounds each makes --steps steps, in rotating order; the first round does not count. Ratios are
taken within a round and then summarised, so that a machine that becomes slower during the run moves no ratio.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.tokenizer import EMBEDDED
from pretraining.config import compose, quoted, validate
from pretraining.plan import Plan, make_plan
from pretraining.throughput import flops_per_token, peak_flops

from . import record as records

ROOT = Path(__file__).resolve().parent.parent
FORMAT = 1
COMMAND = (sys.executable, "-m", "benchmarking.loops")  # of a contestant's process
RIVALS = {"transformers": "transformers.Trainer", "galore_style": "GaLore-style loop"}
BASE = "transformers"  # what ratios are to
EQUAL = (
    "tokens_per_step",
    "parameters_updated",
    "dtype",
    "autocast",
    "attention",
    "rows_per_pass",
    "threads",
    "keeps_freed_memory",
)
# How far the losses of the first steps may lie apart, relatively. The loops sum in different orders; in bfloat16 a
# weight has 8 bits, and an update that rounds the other way is seen in the next loss.
TOLERANCE = {"fp32": 1e-4, "bf16_mixed": 2e-3, "bf16": 5e-3}
COMPARED = 5  # first steps whose losses are compared
# The quickstart's job without what a measurement needs nothing of.
SETTINGS = (
    "experiment=quickstart",
    "eval.ngrams=false",
    "data.validation_max_tokens=256",
    "trainer.save_every=0",
    "trainer.save_model=false",
    "trainer.sample_tokens=0",
    "trainer.resume=never",
)


@dataclass
class Contestant:
    """One loop, and what it has answered.

    Attributes:
        loop: a key of benchmarking.loops.LOOPS.
        method: of optimizers.
        overrides: of its own, for train.py.
        facts: of its process, see loops.facts; later also losses, tokens and memory.
        seconds_per_step: one for each round.
        error: why it left.
    """

    name: str
    loop: str
    method: str = "adam"
    overrides: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    seconds_per_step: list[float] = field(default_factory=list)
    error: str | None = None
    process: subprocess.Popen[str] | None = None

    def say(self, message: dict[str, Any]) -> None:
        assert self.process and self.process.stdin
        with suppress(OSError):  # it has ended: what it answers says why
            print(json.dumps(message), file=self.process.stdin, flush=True)

    def hear(self) -> dict[str, Any]:
        """Its next answer. Where there is none, ``error`` is set and the answer is empty."""
        assert self.process and self.process.stdout
        line = self.process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line.strip() else {}
        if not answer:
            self.error = f"its process ended with exit code {self.process.wait()}"
        elif "error" in answer:
            self.error, answer = answer["error"], {}
        return answer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="llama_tiny", help="as in configs/model; default llama_tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    parser.add_argument(
        "--precision", choices=("auto", "fp32", "bf16_mixed", "bf16"), default="auto", help="as trainer.precision"
    )
    parser.add_argument("--rows", type=int, help="sequences of a step; default 512 on cuda, 16 for llama_tiny, else 4")
    parser.add_argument("--micro", type=int, help="sequences of a forward pass; default the trainer's own choice")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence; default 256")
    parser.add_argument("--rounds", type=int, default=5, help="the first does not count; default 5")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a turn; default 8")
    parser.add_argument(
        "--settle", type=int, default=2, help="steps at the start of a turn that do not count; default 2"
    )
    parser.add_argument("--methods", default="adam", help="of our trainer, as in adam,alice,racs; default adam")
    parser.add_argument("--rivals", default=",".join(RIVALS), help=f"default {','.join(RIVALS)}; none: without")
    parser.add_argument(
        "--ours", nargs="+", default=[], metavar="key=value", help="settings of train.py for our trainer alone"
    )
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="name:key=value,key=value",
        help="one more of our trainer with these settings (adam unless it says optimizer=); may be repeated",
    )
    parser.add_argument(
        "--shared", nargs="+", default=[], metavar="key=value", help="settings of train.py for all, as data= or model."
    )
    parser.add_argument(
        "--malloc", action="store_true", help="let glibc keep large blocks, as scripts/sweep.py does; default: as it is"
    )
    parser.add_argument("--threads", type=int, help="CPU threads of each; default all")
    parser.add_argument(
        "--out", type=Path, help="default results/benchmarks/training_<model>_<device>_<precision>.json"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write the record; 1 where the comparison is not fair or nothing could be measured.

    Raises:
        UserError: settings that cannot work, before anything is measured.
    """
    check(args)
    began = time.monotonic()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    with tempfile.TemporaryDirectory() as folder:
        shared, plan = shared_settings(args, Path(folder))
        out = args.out or records.FOLDER / f"training_{args.model}_{args.device}_{plan.precision}.json"
        people = contestants(args)
        records.refuse_to_lose(out, [one.name for one in people])
        variables = process_environment(args)
        replaces = out.is_file()  # a whole record, which an interrupted measurement must not replace

        def keep(rounds: int) -> None:
            """What is measured stays, whatever happens in the rounds after it."""
            if rounds > 1 and not replaces:
                records.write(make_record(people, args, shared, plan, variables, load, rounds), out)

        measure(people, args, shared, Path(folder), variables, keep)
        record = make_record(people, args, shared, plan, variables, load)
    record["settings"]["seconds"] = round(time.monotonic() - began)
    print(table(record))
    if not any(line["tokens_per_second"] for line in record["contestants"]):
        print("error: nothing could be measured: see the messages above.", file=sys.stderr)
        return 1
    records.write(record, out)
    print(f"written to {out.relative_to(ROOT) if out.is_relative_to(ROOT) else out}")
    return 1 if record["unfair"] else 0


def check(args: argparse.Namespace) -> None:
    for name, least in (("rounds", 2), ("steps", 1), ("settle", 0), ("length", 2)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} must be at least {least}.")
    for name in ("rows", "micro", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1.")


def contestants(args: argparse.Namespace) -> list[Contestant]:
    """Rivals, our trainer with each of --methods, and each --variant of it."""
    rivals = [name for name in words(args.rivals) if name != "none"]
    for name in rivals:
        if name not in RIVALS:
            raise UserError(f"there is no rival {name}: choose from {', '.join(RIVALS)}, or none.")
    people = [Contestant(name, name) for name in rivals]
    methods = words(args.methods)
    people += [Contestant(f"ours_{name}", "ours", name, list(args.ours)) for name in methods]
    for text in args.variant:
        name, colon, settings = text.partition(":")
        if not colon or not name or any("=" not in part for part in settings.split(",")):
            raise UserError(f"--variant {text}: write it as name:key=value,key=value.")
        parts = settings.split(",")
        method = next((part.partition("=")[2] for part in parts if part.startswith("optimizer=")), "adam")
        parts = [part for part in parts if not part.startswith("optimizer=")]
        people.append(Contestant(f"ours_{name}", "ours", method, [*args.ours, *parts]))
    names = [one.name for one in people]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two contestants are called {twice[0]}: give the variant another name.")
    if not people:
        raise UserError("there is nobody to measure: give --methods, --rivals or --variant.")
    return people


def words(text: str) -> list[str]:
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def shared_settings(args: argparse.Namespace, folder: Path) -> tuple[list[str], Plan]:
    """Settings of all contestants, and the plan of the first. Raises UserError where they cannot work."""
    total = args.rounds * (args.settle + args.steps)
    rows = args.rows or (512 if args.device == "cuda" else 16 if args.model.startswith("llama_tiny") else 4)
    settings = [
        *SETTINGS,
        f"model={args.model}",
        f"data.length={args.length}",
        f"trainer.device={args.device}",
        f"trainer.precision={args.precision}",
        f"trainer.batch_size={rows}",
        f"trainer.steps={total + 1}",  # the last one begins, but is never made
        f"trainer.eval_every={total + 2}",
        *([f"trainer.micro_batch_size={args.micro}"] if args.micro else []),
        *args.shared,
    ]
    tokenizer = compose([*settings, "optimizer=adam"]).tokenizer
    if tokenizer not in EMBEDDED and not any(word.startswith(("tokenizer=", "data=")) for word in args.shared):
        size = compose([*settings, "optimizer=adam"]).model.vocab_size
        settings += [quoted(f"tokenizer={enlarged_tokenizer(size, folder)}")]
    cfg = compose([*settings, "optimizer=adam", quoted(f"run_dir={folder / 'plan'}")])
    validate(cfg)
    return settings, make_plan(cfg)


def enlarged_tokenizer(size: int, folder: Path) -> Path:
    """The embedded tokenizer with unused pieces up to ``size``: models of that vocabulary train without a network.

    A SentencePiece model is a protocol buffer, in which repeated fields may be appended: field 1, a piece, holds its text
    (field 1) and its kind (field 3; 5 is "unused", which no text is ever encoded with).
    """
    model = EMBEDDED["sample_4k"].read_bytes()
    added = bytearray()
    for i in range(4096, size):
        text = f"<unused_{i}>".encode()
        piece = b"\x0a" + bytes([len(text)]) + text + b"\x18\x05"
        added += b"\x0a" + bytes([len(piece)]) + piece
    file = folder / f"sample_4k_of_{size}.model"
    file.write_bytes(model + added)
    return file


def own_settings(one: Contestant, folder: Path) -> list[str]:
    # The others have one rate for all parameters. It changes no speed, but without it losses could not be compared.
    rate = ["optimizer.adam_lr=null"] if one.method == "adam" else []
    return [f"optimizer={one.method}", *rate, quoted(f"run_dir={folder / one.name}"), *one.overrides]


def process_environment(args: argparse.Namespace) -> dict[str, str]:
    """Variables that all contestants get besides those of this process."""
    found = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if args.malloc:
        from sweeps.local import MALLOC

        found["GLIBC_TUNABLES"] = MALLOC
    if args.threads:
        found["OMP_NUM_THREADS"] = str(args.threads)
    if args.device == "cuda":  # one GPU: transformers' Trainer would spread over all that it sees
        found["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return found


# Measuring ----------------------------------------------------------------------------------------------------------


def measure(
    people: Sequence[Contestant],
    args: argparse.Namespace,
    shared: Sequence[str],
    folder: Path,
    variables: Mapping[str, str],
    keep: Callable[[int], None],
) -> None:
    """Let all take turns; figures and errors go to the contestants. After each round ``keep(rounds)`` is called."""
    began = time.monotonic()

    def tell(what: str) -> None:
        print(f"[{time.monotonic() - began:4.0f} s] {what}", flush=True)

    with processes(people, folder, variables):
        for one in people:
            one.say({
                "loop": one.loop,
                "overrides": [*shared, *own_settings(one, folder)],
                "share": len(people) > 1,
            })  # fmt: skip
        for one in people:
            one.facts |= one.hear().get("ready", {})
            tell(f"{one.name}: {one.error or 'ready'}")
        for number in range(args.rounds):
            playing = [one for one in people if one.error is None]
            first = number % max(1, len(playing))
            for one in [*playing[first:], *playing[:first]]:
                one.say({"settle": args.settle, "steps": args.steps})
                answer = one.hear()
                if answer:
                    one.seconds_per_step.append(answer["seconds"] / answer["steps"])
                    tell(f"round {number + 1}, {one.name}: {1000 * one.seconds_per_step[-1]:.1f} ms a step")
                else:
                    tell(f"round {number + 1}, {one.name}: {one.error}")
            keep(number + 1)
        for one in people:
            if one.error is None:
                assert one.process and one.process.stdin
                one.process.stdin.close()  # no further turn
                one.facts |= one.hear().get("end", {})
    for one in people:
        if one.error is not None:
            print(f"{one.name}: {one.error}\n{tail(folder / f'{one.name}.log', 10)}", file=sys.stderr)


@contextmanager
def processes(people: Sequence[Contestant], folder: Path, variables: Mapping[str, str]) -> Iterator[None]:
    """The contestants' processes, which are gone afterwards; their messages lie in the folder."""
    try:
        for one in people:
            with (folder / f"{one.name}.log").open("wb") as log:
                one.process = subprocess.Popen(
                    COMMAND,
                    cwd=ROOT,
                    env={**os.environ, **variables},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    encoding="utf-8",
                )
        yield
    finally:
        for one in people:
            if one.process is not None:
                if one.process.poll() is None and one.error is None and one.facts.get("losses") is not None:
                    one.process.wait(timeout=60)
                one.process.kill()
                one.process.wait()
                for stream in (one.process.stdin, one.process.stdout):
                    if stream is not None and not stream.closed:
                        stream.close()


def tail(file: Path, lines: int) -> str:
    return "\n".join(file.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


# Figures ------------------------------------------------------------------------------------------------------------


def make_record(
    people: Sequence[Contestant],
    args: argparse.Namespace,
    shared: Sequence[str],
    plan: Plan,
    variables: Mapping[str, str],
    load: float | None,
    rounds: int | None = None,
) -> dict[str, Any]:
    """The record; with ``rounds``, that of a session that has made so many and may be stopped at any time."""
    cfg = compose([*shared, "optimizer=adam"])
    peak, flops = peak_flops(plan.device), flops_per_token(cfg.model, plan.parameters, cfg.data.length)
    base = next((one for one in people if one.loop == BASE and one.error is None), None)
    lines = [summarize(one, base, plan.tokens_per_step, flops, peak) for one in people]
    tunables = variables.get("GLIBC_TUNABLES", os.environ.get("GLIBC_TUNABLES"))
    return {
        "format": FORMAT,
        "kind": "training",
        "settings": {
            "model": cfg.model.name,
            "device": args.device,
            "precision": plan.precision,
            "rows": cfg.trainer.batch_size,
            "length": cfg.data.length,
            "tokens_per_step": plan.tokens_per_step,
            "rounds": (rounds or args.rounds) - 1,
            "warmup_rounds": 1,
            "steps": args.steps,
            "settle": args.settle,
            "data": cfg.data.name,
            "tokenizer": Path(cfg.tokenizer).name,
            "shared": [without_folder(word) for word in args.shared],
            "glibc_tunables": tunables,
            "loss_tolerance": TOLERANCE[plan.precision],
        },
        "environment": records.describe_machine(
            plan.device, [without_folder(word) for word in args.words], (), load_average_before=load
        ),
        "unfair": [f"stopped after {rounds - 1} of {args.rounds - 1} rounds, losses were not compared"]
        if rounds
        else unfairness(lines, plan.precision),
        "contestants": lines,
    }


def without_folder(word: str) -> str:
    """A setting without the folder of this machine that it may name."""
    key, sign, value = word.partition("=")
    return f"{key}={Path(value).name}" if sign and Path(value).is_absolute() else word


def summarize(
    one: Contestant, base: Contestant | None, tokens: int, flops: float, peak: float | None
) -> dict[str, Any]:
    """The record of one contestant. The first round is a warm-up and counts for nothing."""
    seconds = one.seconds_per_step[1:]
    speeds = [tokens / s for s in seconds]
    speed = statistics.median(speeds) if speeds else None
    theirs = base.seconds_per_step[1:] if base else []
    ratios = [a / b for a, b in zip(theirs, seconds, strict=False)]
    return {
        "name": one.name,
        "loop": one.loop,
        "method": one.method,
        "settings": one.overrides,
        "tokens_per_second": speed,
        "least": min(speeds, default=None),
        "most": max(speeds, default=None),
        f"ratio_to_{BASE}": statistics.median(ratios) if ratios else None,
        "ratios": ratios,
        "step_ms": [1000 * s for s in seconds],
        "mfu": speed * flops / peak if speed and peak else None,
        **one.facts,
        "error": one.error,
    }


def unfairness(lines: Sequence[Mapping[str, Any]], precision: str) -> list[str]:
    """Sentences that say what is not equal between our trainer (adam, no settings of its own) and the rivals.

    Variants may differ on purpose, in rows of a pass for example; that is in their lines, but is no comparison of loops.
    """
    present = [line for line in lines if line["error"] is None and line["method"] == "adam"]
    ours = next((line for line in present if line["loop"] == "ours" and not line["settings"]), None)
    found = []
    for line in present:
        if ours is None or line["loop"] == "ours":
            continue
        for key in EQUAL:
            if line.get(key) != ours.get(key):
                found.append(f"{key} is {ours.get(key)} for our trainer and {line.get(key)} for {line['name']}")
    for line in present:
        if ours is not None and line is not ours:
            far = distance(ours["losses"], line["losses"])
            if not far <= TOLERANCE[precision]:
                found.append(
                    f"the first {COMPARED} losses of {ours['name']} and {line['name']} differ by {far:.1e}, more "
                    f"than {TOLERANCE[precision]:g}"
                )
    return found


def distance(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest relative difference of the first losses; infinite where there are none."""
    pairs = list(zip(ours[:COMPARED], theirs[:COMPARED], strict=False))
    if not pairs or not all(math.isfinite(a + b) and a for a, b in pairs):
        return math.inf
    return max(abs(a - b) / abs(a) for a, b in pairs)


def table(record: Mapping[str, Any]) -> str:
    s, lines = record["settings"], record["contestants"]
    text = [
        f"{s['model']}, {s['device']}, {s['precision']}, {s['rows']} rows x {s['length']} tokens a step; medians of "
        f"{s['rounds']} rounds of {s['steps']} steps",
        f"{'':<22}{'tokens/s':>10} {'least':>10} {'most':>10}  {'to ' + RIVALS[BASE]:<24}{'MFU':>6} {'peak memory':>12}  "
        f"{'optimizer':<18}passes of",
    ]
    for line in lines:
        name = RIVALS.get(line["name"], line["name"])
        if line["tokens_per_second"] is None:
            text.append(f"{name:<22}{line['error']}")
            continue
        ratio, ratios = line[f"ratio_to_{BASE}"], line["ratios"]
        shown = f"{ratio:.3f} ({min(ratios):.3f} to {max(ratios):.3f})" if ratios else "-"
        mfu = f"{line['mfu']:.1%}" if line["mfu"] is not None else "-"
        memory = f"{line['peak_memory_bytes'] / 2**30:.2f} GiB" if "peak_memory_bytes" in line else "-"
        ms = line.get("optimizer_ms")
        update = f"{ms:.1f} ms ({ms / statistics.median(line['step_ms']):.1%})" if ms is not None else "-"
        text.append(
            f"{name:<22}{line['tokens_per_second']:>10,.0f} {line['least']:>10,.0f} {line['most']:>10,.0f}  {shown:<24}"
            f"{mfu:>6} {memory:>12}  {update:<18}{line.get('rows_per_pass', '?')} rows"
        )
    return "\n".join([*text, *(f"NOT A FAIR COMPARISON: {sentence}" for sentence in record["unfair"])])
