"""Memory of weights and optimizer states beside the paper's Table 3, and what fits on a GPU.

    python scripts/memory.py                                  bytes that our optimizers allocate, beside Table 3
    python scripts/memory.py --convention paper               as the paper counts: every printed cell comes out
    python scripts/memory.py --json memory.json --optimizers all --models all
    python scripts/memory.py --gpu 24GB                       the largest micro-batch of each model and optimizer
    python scripts/memory.py --gpu 24GB --model llama_1b --optimizer alice    one of them in detail, and its command

Weights and states are in BF16 and GiB (2^30 bytes). With --gpu everything is an estimate: docs/memory.md says how good.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import yaml  # noqa: E402

from data.errors import UserError  # noqa: E402
from optimizers import METHODS  # noqa: E402
from optimizers.memory import CONVENTIONS, PAPER_STATES, RANKS  # noqa: E402
from pretraining import memory as planner  # noqa: E402
from reporting import units  # noqa: E402
from reporting.paper.cost import METHODS as ROWS  # noqa: E402
from reporting.paper.cost import MODELS, memory_of, printed_memory, shape_of, table3_cells  # noqa: E402
from reporting.paper.numbers import SIZES as PAPER_SIZES  # noqa: E402
from reporting.paper.numbers import load_paper  # noqa: E402
from reporting.terminal import printing  # noqa: E402

CONFIGS = ROOT / "configs"

LAST_LAYERS = ("candidate", "adam")
# Our names -> the paper's sizes. Table 3 has no 7B.
SIZES = {MODELS[size]: size for size in PAPER_SIZES}
OPTIMIZERS = (*ROWS, "apollo", "muon")
PLANNED = ("adam", "galore", "alice", "racs")

Cells = dict[tuple[str, str, str], float]  # (optimizer, model, last layer) -> GiB


def compute(optimizers: Sequence[str], models: Sequence[str], convention: str) -> Cells:
    try:
        return memory_of(product(optimizers, models, LAST_LAYERS), convention)
    except ValueError as error:
        raise UserError(f"{error}.") from error


def table(ours: Cells, paper: Cells) -> str:
    """Table 3, a line for each optimizer and last layer: paper | ours | difference."""
    models = list(dict.fromkeys(model for _, model, _ in ours))
    head = "".join(f"| {SIZES.get(model, model):^20}" for model in models)
    lines = [f"{'':13} {'last layer':10}{head}", f"{'':13} {'':10}" + "| paper   ours  diff  " * len(models)]
    for name in dict.fromkeys(name for name, _, _ in ours):
        for last in LAST_LAYERS:
            if name == "adam" and last == "candidate":
                continue  # it is the candidate
            cells = [_cell(paper.get((name, model, last)), ours[name, model, last]) for model in models]
            lines.append(f"{units.optimizer_name(name):13} {last:10}" + "".join(f"| {cell}" for cell in cells))
    return "\n".join(line.rstrip() for line in lines)


def _cell(paper: float | None, ours: float) -> str:
    number = f"{ours:6.2f}" if ours >= 0.1 else f"{ours:6.4f}"
    if paper is None:
        return f"{'-':>5} {number} {'':7} "
    difference = round(ours, 2) - paper
    return f"{paper:5.2f} {number} " + (f"{difference:+6.2f}* " if abs(difference) > 0.004 else f"{'0':>6}  ")


def report(ours: Cells, convention: str, models: Sequence[str]) -> str:
    """The table of these models, how many printed cells come out, and the cells that are printed elsewhere."""
    printed = load_paper()
    paper = printed_memory(printed)
    lines = [
        f"Weights and optimizer states in GiB, BF16, {convention} convention (* differs from the print)",
        "Last layer: candidate, the method itself trains it; adam, Adam trains it (the paper's starred columns)",
        "",
    ]
    lines += [table({key: value for key, value in ours.items() if key[1] in models}, paper), ""]
    of_table_3 = list(paper)[: len(table3_cells(printed))]
    compared = [key for key in of_table_3 if key in ours]
    if compared:
        equal = sum(round(ours[key], 2) == paper[key] for key in compared)
        lines.append(f"Table 3: {equal} of {len(compared)} printed cells are equal.")
    for key in list(paper)[len(of_table_3) :]:
        if key in ours:
            name, model, _ = key
            where = "ICLR version" if name == "muon" else "Table 4"
            size = next(size for size, known in MODELS.items() if known == model)
            lines.append(f"{where}, {units.optimizer_name(name)} ({size}): {_cell(paper[key], ours[key]).strip()}")
    return "\n".join(lines)


# The planner ------------------------------------------------------------------------------------------------------


def bytes_of(text: str) -> int:
    """24GB, 24GiB, 24: a card's name says GB and means GiB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:gi?b?)?", text.strip(), re.IGNORECASE)
    size = float(found[1]) if found else 0.0
    if not 0 < size < 10_000:
        raise UserError(f"--gpu {text!r} is not a size: write for example --gpu 24GB.")
    return int(size * 2**30)


def plan(gpu: int, optimizers: Sequence[str], models: Sequence[str]) -> str:
    """The largest micro-batch of every model, precision and optimizer, and what layer-wise updates would add."""
    width = max(8, *(len(units.optimizer_name(name)) for name in optimizers)) + 1
    head = "".join(f"{units.optimizer_name(name):>{width}}" for name in optimizers)
    lines = [
        f"Largest micro-batch (rows of {planner.LENGTH} tokens) on one GPU of {gpu / 2**30:g} GiB, estimated; "
        f"at most {planner.MOST_ROWS}, the paper's batch",
        "",
        f"{'model':14}{'precision':12}{head}",
    ]

    def row(model: str, precision: str, layerwise: bool) -> str:
        shape = shape_of(model)
        cells = [
            planner.largest_micro_batch(gpu, shape, name, precision=precision, layerwise=layerwise)
            for name in optimizers
        ]
        first = precision == planner.PRECISIONS[0]
        return f"{model if first else '':14}{precision:12}" + "".join(f"{cell or '-':>{width}}" for cell in cells)

    lines += [row(model, precision, False) for model in models for precision in planner.PRECISIONS]
    lines += ["", "with trainer.layerwise=true, which cannot accumulate: it is then the batch of a step", lines[2]]
    lines += [row(model, "bf16", True) for model in models]
    one = f"--model {models[-1]} --optimizer {'alice' if 'alice' in optimizers else optimizers[-1]}"
    return "\n".join(
        [*lines, "", allowance(gpu), "", f"The parts of one of them, and the command that runs it: add {one}"]
    )


def allowance(gpu: int) -> str:
    return (
        f"{(gpu - planner.usable(gpu)) / 2**30:.1f} GiB ({planner.CONTEXT_BYTES / 2**30:g} GiB and "
        f"{planner.FRAGMENTATION:.0%}) are left for CUDA's context, library workspaces and holes in its allocator:\n"
        "an allowance, not measured here. On several GPUs the gradients lie in DDP's buckets."
    )


def detail(gpu: int, optimizer: str, model: str, precision: str) -> str:
    """The parts of one cell, for the micro-batch that fits, and the command that runs it."""
    shape = shape_of(model)
    fits = planner.largest_micro_batch(gpu, shape, optimizer, precision=precision)
    need = planner.footprint(shape, optimizer, precision=precision, rows=fits or 1)
    size = lambda number: f"{number / 2**30:8.2f} GiB"  # noqa: E731
    lines = [
        f"{model}, {units.optimizer_name(optimizer)}, {precision}, micro-batch of {fits or 1} x {planner.LENGTH} tokens, "
        "estimated",
        f"  weights            {size(need.weights)}",
        f"  gradients          {size(need.gradients)}",
        f"  optimizer states   {size(need.states)}",
        f"  activations        {size(need.activations)}",
        f"  logits and loss    {size(need.loss)}   with the activations",
        f"  optimizer's step   {size(need.update)}   instead of activations, logits and loss",
        f"  peak               {size(need.peak)}",
        f"  GPU                {size(gpu)}, {planner.usable(gpu) / 2**30:.2f} GiB of it for tensors",
        "",
        allowance(gpu),
        "",
    ]
    if not fits:
        alone = planner.largest_micro_batch(gpu, shape, optimizer, precision=precision, layerwise=True)
        if not alone:
            lines.append("Not one row fits. Nor with layer-wise updates.")
        else:
            lines.append(f"Not one row fits. With trainer.layerwise=true as the whole batch of a step: {alone}.")
            lines.append(command(optimizer, model, precision, alone, layerwise=True))
    else:
        lines.append(command(optimizer, model, precision, fits))
    return "\n".join(lines)


def command(optimizer: str, model: str, precision: str, rows: int, layerwise: bool = False) -> str:
    """What to type; evaluation is given no more rows than training."""
    words = [f"python train.py model={model} optimizer={optimizer}"]
    file = CONFIGS / "recipe" / f"{optimizer}-{model}.yaml"
    recipe = yaml.safe_load(file.read_text()) if file.is_file() else None
    if not recipe:
        words.append(f"recipe=none trainer.steps={steps_of(model)}")
    if layerwise or not recipe:
        words.append(f"trainer.batch_size={rows if layerwise else planner.MOST_ROWS}")
    options = yaml.safe_load((CONFIGS / "optimizer" / f"{optimizer}.yaml").read_text())
    given = (recipe or {}).get("optimizer", {}).get("rank")
    if "rank" in options and optimizer != "apollo_mini" and given != RANKS[model]:  # the rank that was counted
        words.append(f"optimizer.rank={RANKS[model]}")
    words.append(f"trainer.precision={precision} trainer.micro_batch_size={rows} eval.batch_size={min(rows, 64)}")
    if layerwise:
        words.append("trainer.layerwise=true")
    return " ".join(words)


def steps_of(model: str) -> int:
    """The recipe's steps at this size; at 7B those of Table 4."""
    recipe = CONFIGS / "recipe" / f"any-{model}.yaml"
    return yaml.safe_load(recipe.read_text())["trainer"]["steps"] if recipe.is_file() else 150_000


def names(asked: str | None, default: Sequence[str], known: Sequence[str], what: str) -> tuple[str, ...]:
    """The names of a comma-separated argument; ``all`` stands for every one."""
    if asked is None:
        return tuple(default)
    found = tuple(known) if asked == "all" else tuple(dict.fromkeys(name.strip() for name in asked.split(",")))
    for name in found:
        if name not in known:
            raise UserError(f"no {what} is called {name!r}: choose from {', '.join(known)}, or all.")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--convention", choices=CONVENTIONS, help="how bytes are counted; default exact")
    parser.add_argument("--optimizers", "--optimizer", help="config names, as in alice,racs; or all")
    parser.add_argument("--models", "--model", help="config names, as in llama_60m,llama_1b; or all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    parser.add_argument("--gpu", metavar="SIZE", help="what fits on a GPU of this size, as in 24GB")
    parser.add_argument(
        "--precision", choices=planner.PRECISIONS, help="with --gpu, of one model and one optimizer; default bf16"
    )
    asked = parser.parse_args(argv)
    try:
        models = names(asked.models, tuple(MODELS.values()), tuple(RANKS), "model")
        if asked.gpu is not None:
            print(fitting(asked, models))
            return 0
        if asked.precision:
            raise UserError("--precision belongs to --gpu: weights and states are counted in BF16.")
        convention = asked.convention or "exact"
        counted: Mapping[str, Any] = PAPER_STATES if convention == "paper" else METHODS
        known = tuple(name for name in counted if name != "any")  # a class of the user's
        optimizers = names(asked.optimizers, OPTIMIZERS, known, f"optimizer of the {convention} convention")
        cells = compute(optimizers, models, convention)
        print(report(cells, convention, models if asked.models else tuple(SIZES)))
        if asked.json:
            write(asked.json, cells)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def fitting(asked: argparse.Namespace, models: Sequence[str]) -> str:
    """What --gpu prints: one cell in detail, or the table."""
    if asked.json:
        raise UserError("--json holds weights and states only: leave --gpu out.")
    if asked.convention:
        raise UserError("--gpu estimates what our optimizers allocate: leave --convention out.")
    gpu = bytes_of(asked.gpu)
    optimizers = names(asked.optimizers, PLANNED, tuple(planner.STEP_COPIES), "optimizer of the planner")
    if len(models) == len(optimizers) == 1:
        return detail(gpu, optimizers[0], models[0], asked.precision or "bf16")
    if asked.precision:
        raise UserError(
            "the table of --gpu shows every precision: leave --precision out, or name one --model and one --optimizer."
        )
    return plan(gpu, optimizers, models)


def write(path: Path, cells: Cells) -> None:
    rows = [
        {"optimizer": name, "model": model, "last_layer": last, "gib": x} for (name, model, last), x in cells.items()
    ]
    try:
        path.write_text(json.dumps(rows, indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}): choose another file for --json."
        ) from error


if __name__ == "__main__":
    raise SystemExit(printing(main))
