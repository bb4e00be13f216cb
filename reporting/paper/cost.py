"""Cost beside the paper: structures (Table 1), elements (Table 6), memory (Tables 3 and 4, Figure 4).

Elements come from records of real optimizers (results/fisher, results/runs/all/speed.json); bytes of whole models are
computed from shapes by optimizers.memory and given to these functions as `Memory`.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .. import units
from ..records import Run, find_runs
from ..survey import load_speed
from ..text import NOT_RUN, markdown
from .numbers import RESULTS, SIZES, Paper
from .tables import Table

Memory = Mapping[tuple[str, str, str], float]  # (optimizer, model, last_layer) -> GiB of weights and states

MODELS = {"60M": "llama_60m", "130M": "llama_130m", "350M": "llama_350m", "1.3B": "llama_1b", "7B": "llama_7b"}
CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "model"
METHODS = ("adam", "galore", "fira", "apollo_mini", "apollo_svd", "racs", "alice_0", "alice")  # rows of Table 3
FOOTPRINT_SIZES = ("350M", "1.3B", "7B")  # of Figure 4
FOOTPRINT_METHODS = ("adam", "galore", "fira", "racs", "alice_0", "alice")

# Column of Table 1 -> structure in results/fisher/records.json, config name
_STRUCTURES = {
    "Adam": ("Diagonal", "adam"),
    "Shampoo": ("Shampoo", "shampoo"),
    "Eigen-Adam/AdaDiag": ("EigenAdam", "eigen_adam"),
    "SOAP/AdaDiag++": ("SOAP", "soap"),
    "GaLore": ("GaLore", "galore"),
    "RACS": ("TwoSidedScaling", "racs"),
    "Alice": ("Alice, switched", "alice"),
}


def elements(formula: str, m: int, n: int, r: int = 0) -> int:
    """The value of a formula as the tables print it: elements("mn+2nr+r^2", m, n, r).

    Raises:
        ValueError: a term that is not a number times letters m, n, r with powers.
    """
    total = 0
    for term in formula.replace(" ", "").split("+"):
        match = re.fullmatch(r"(\d*)((?:[mnr](?:\^\d)?)*)", term)
        if not match or not term:
            raise ValueError(
                f"{formula!r} is not a sum of products of m, n and r: correct it in results/paper/tables.json."
            )
        value = int(match[1] or 1)
        for letter, power in re.findall(r"([mnr])(?:\^(\d))?", match[2]):
            value *= {"m": m, "n": n, "r": r}[letter] ** int(power or 1)
        total += value
    return total


def table1(paper: Paper, records: Path = RESULTS / "fisher" / "records.json") -> Table:
    """Table 1 with measured columns: error of each structure, stored elements, milliseconds.

    Raises:
        ValueError: the Fisher record is damaged.
    """
    table, record = paper.tables["table1"], _fisher(records)
    rows = []
    for index, column in enumerate(table["columns"]):
        formula = table["memory_elements_incl_weight"][index]
        rows.append(
            [
                column,
                f"`{table['structure'][index]}`",
                table["generalizes"][index] or "–",
                f"`{table['computation'][index]}`",
                "yes" if table["full_rank_update"][index] else "no",
                f"`{formula}`",
                *(_measured(record, *_STRUCTURES[column], formula) if record else [NOT_RUN] * 5),
            ]
        )
    head = ["method", "structure", "generalizes", "computation", "full-rank update", "memory (elements)"]
    head += ["memory by it", "ours", "difference", "error of the structure", "ms a step"]
    return Table(
        "table1",
        "Table 1: structures, and what they cost",
        "Up to the formula of memory as printed; then our numbers for one block of seven matrices of `llama_tiny`, "
        "from the [Fisher report](fisher/README.md) (`make fisher`, one run, seed 42): what the formula gives there, "
        "what our optimizers store with the weights, the median of |F − F~|² / |F|² over gradients of single "
        "sequences (0 is exact), and the optimizer's time on two CPU cores. The difference is the limiter's norm, "
        "one number a matrix, which the paper counts for RACS only.",
        markdown(head, rows, left=6),
    )


def _fisher(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: restore it from git, or run `make fisher`.") from error


def _measured(record: dict[str, Any], structure: str, optimizer: str, formula: str) -> list[str]:
    shapes = {entry["layer"]: (min(entry["shape"]), max(entry["shape"])) for entry in record["errors"]}
    timings = [entry for entry in record["timings"] if entry["optimizer"] == optimizer]
    by_formula = sum(elements(formula, *shapes[entry["layer"]], record["settings"]["rank"]) for entry in timings)
    ours = sum(math.prod(shapes[entry["layer"]]) + entry["state"] for entry in timings)
    errors = [
        1 - entry["captured"]
        for entry in record["errors"]
        if entry["structure"] == structure and entry["kind"] == "sequences"
    ]
    return [
        f"{by_formula:,}",
        f"{ours:,}",
        _signed(ours - by_formula),
        f"{statistics.median(errors):.4f}",
        f"{sum(entry['ms'] for entry in timings):.2f}",
    ]


def table6(paper: Paper, survey: Path = RESULTS / "runs" / "all") -> Table:
    """Table 6 with the elements that real optimizers stored for the matrices of `llama_tiny`.

    Raises:
        ValueError: the speed record is damaged.
    """
    table, speed = paper.tables["table6"], load_speed(survey / "speed.json")
    stored = {entry["optimizer"]: entry["matrix_state_bytes"] // 4 for entry in (speed or {}).get("methods", [])}
    rows = []
    for index, column in enumerate(table["columns"]):
        name = column.lower().replace("-", "_")
        parts = [f"`{table['rows'][part][index]}`" if table["rows"][part][index] else "–" for part in _PARTS]
        runs = find_runs_of(name, survey)
        if name not in stored or not runs:
            rows.append([column, *parts, NOT_RUN, NOT_RUN, "–"])
            continue
        rank = int(runs[0].setting("optimizer.rank", 0))
        shapes = matrix_shapes(runs[0])
        printed = sum(elements(table["rows"]["Total"][index], *shape, rank) for shape in shapes)
        ours = stored[name] + sum(math.prod(shape) for shape in shapes)
        rows.append([column, *parts, f"{printed:,}", f"{ours:,}", _signed(ours - printed)])
    return Table(
        "table6",
        "Table 6: elements of the low-rank optimizers",
        "Formulas as printed (m < n, r ≪ m), their value for all 28 matrices of `llama_tiny` at its recipes' rank, "
        "and the elements that our optimizers stored there ([record](runs/all/speed.json): bytes of float32 states "
        "over 4; `python scripts/benchmark_optimizers.py`). The difference is a counter of Adam's and the limiter's "
        "norm, one number a matrix, which the paper does not count.",
        markdown(["method", *_PARTS, "total, paper's formula", "ours", "difference"], rows),
    )


_PARTS = ("Total", "First moment", "Second moment", "U", "C_t (vector p)", "Q~")


def find_runs_of(optimizer: str, survey: Path) -> list[Run]:
    """The records of one optimizer in a sweep's folder."""
    folders = sorted(survey.glob(f"{optimizer}-lr*")) if survey.is_dir() else []
    return [run for folder in folders for run in find_runs(folder)]


def matrix_shapes(run: Run) -> list[tuple[int, int]]:
    """(m, n), m <= n, of every attention and MLP matrix of a run's LLaMA."""
    hidden, wide = int(run.setting("model.hidden_size")), int(run.setting("model.intermediate_size"))
    return (4 * [(hidden, hidden)] + 3 * [(min(hidden, wide), max(hidden, wide))]) * int(
        run.setting("model.num_hidden_layers")
    )


def table3(paper: Paper, printed: Memory, exact: Memory) -> Table:
    """Table 3, each cell in the paper's convention and counted; then the computed memory cells of Table 4 and of Muon.

    Args:
        printed: GiB in the paper's convention (scripts/memory.py --convention paper).
        exact: GiB that our optimizers allocate (--convention exact).
    """
    rows = []
    for method, size, star, value in [*table3_cells(paper), *more_cells(paper)]:
        key = memory_key(method, size, star)
        rows.append(
            [
                units.optimizer_name(method),
                size + star,
                f"{value:.2f}",
                *_beside(printed.get(key), value),
                *_beside(exact.get(key), value),
                f"`scripts/memory.py --optimizers {method} --models {MODELS[size]}`",
            ]
        )
    cells = rows[: len(table3_cells(paper))]
    agree = [sum(row[column] == row[2] for row in cells) for column in (3, 5)]
    head = ["method", "size", "paper", "paper's convention", "difference", "exact", "difference", "command"]
    return Table(
        "table3",
        "Table 3: memory of weights and states, GiB",
        "BF16; a star: Adam has the last layer. In the paper's convention (deduced: whole millions of elements, p "
        f"and Q~ in FP32, norms left out) {agree[0]} of {len(cells)} cells equal the printed ones; counted exactly, "
        f"as our optimizers allocate, {agree[1]} of {len(cells)}. The last three rows are no part of it: Apollo and "
        "Apollo-mini at 7B are of Table 4 (rank 256), whose 2.98 and 4.6 for the 1B models are RACS 1.3B* and Alice "
        "1.3B* here, and Muon's only memory cell is of the ICLR version. Table 4's 26 and 18 for the 8-bit methods "
        "are cited.",
        markdown(head, rows, left=2),
    )


def table3_cells(paper: Paper) -> list[tuple[str, str, str, float]]:
    """(method, size, "*" or "", GiB) of the 48 printed cells."""
    table = paper.tables["table3"]
    cells = []
    for method in METHODS:
        for column, value in zip(table["columns"], table["rows"][units.optimizer_name(method)], strict=True):
            if value is not None:
                cells.append((method, column.rstrip("*"), "*" if column.endswith("*") else "", value))
    return cells


def more_cells(paper: Paper) -> list[tuple[str, str, str, float]]:
    """Memory cells printed elsewhere: Table 4's two 7B models that the paper computed, and Muon of the ICLR version."""
    seven = paper.tables["table4"]["rows"]
    return [
        ("apollo", "7B", "*", seven["Apollo (7B)"][0]),
        ("apollo_mini", "7B", "*", seven["Apollo-mini (7B)"][0]),
        ("muon", "1.3B", "*", paper.tables["iclr2026"]["muon"]["mem_1.3B_G"]),
    ]


def computed_memory(paper: Paper, convention: str) -> dict[tuple[str, str, str], float]:
    """`Memory` for every cell of Table 3, those of `more_cells`, and, if it is "exact", of Figure 4.

    Args:
        convention: "exact" | "paper".

    Raises:
        ImportError: torch is not installed.
    """
    keys = list(printed_memory(paper))
    if convention == "exact":
        keys += [footprint_key(method, size) for method in FOOTPRINT_METHODS for size in FOOTPRINT_SIZES]
    return memory_of(keys, convention)


def printed_memory(paper: Paper) -> dict[tuple[str, str, str], float]:
    """`Memory` as printed: the cells of Table 3, then those of `more_cells`."""
    return {
        memory_key(method, size, star): value
        for method, size, star, value in [*table3_cells(paper), *more_cells(paper)]
    }


def memory_of(keys: Iterable[tuple[str, str, str]], convention: str) -> dict[tuple[str, str, str], float]:
    """`Memory` of any optimizers and models, from shapes, by `optimizers.memory`.

    Raises:
        ImportError: torch is not installed.
        ValueError: an optimizer that the convention does not know.
    """
    from optimizers.memory import gib

    wanted = list(dict.fromkeys(keys))
    shapes = {model: shape_of(model) for model in dict.fromkeys(model for _, model, _ in wanted)}
    return {(name, model, last): gib(name, shapes[model], last, convention) for name, model, last in wanted}


def shape_of(model: str) -> dict[str, Any]:
    """The numbers of configs/model/<model>.yaml."""
    return yaml.safe_load((CONFIGS / f"{model}.yaml").read_text(encoding="utf-8"))


def memory_key(optimizer: str, size: str, star: str) -> tuple[str, str, str]:
    """("alice", "1.3B", "*") -> ("alice", "llama_1b", "adam"), a key of `Memory`."""
    return optimizer, MODELS[size], "adam" if star else "candidate"


def _beside(ours: float | None, printed: float) -> list[str]:
    if ours is None:
        return ["–", "–"]
    return [f"{ours:.2f}", _signed(round(round(ours, 2) - printed, 2))]


def _signed(number: float) -> str:
    return "0" if number == 0 else f"{number:+,}" if isinstance(number, int) else f"{number:+.2f}"


def footprint_key(optimizer: str, size: str) -> tuple[str, str, str]:
    """Key of `Memory` for a bar of Figure 4: the candidate has the last layer (F.4), but for Adam and RACS."""
    return memory_key(optimizer, size, "*" if optimizer in ("adam", "racs") else "")


def figure4(paper: Paper, exact: Memory) -> Table:
    """Figure 4: the paper's measured footprints beside our computed weights and states."""
    rows = []
    for optimizer in FOOTPRINT_METHODS:
        for size in FOOTPRINT_SIZES:
            bars = paper.figures["fig4_memory_footprint_GB"][size]
            name = units.optimizer_name(optimizer)
            layerwise, ours = bars.get(f"{name}-layerwise"), exact.get(footprint_key(optimizer, size))
            rows.append(
                [
                    name,
                    size,
                    f"{bars[name]:.1f}",
                    "–" if layerwise is None else f"{layerwise:.1f}",
                    NOT_RUN if ours is None else f"{ours:.2f}",
                    NOT_RUN,
                    f"`scripts/memory.py --optimizers {optimizer} --models {MODELS[size]}`",
                ]
            )
    head = ["method", "size", "paper, measured", "paper, layer by layer", "ours, weights and states", "ours, measured"]
    return Table(
        "figure4",
        "Figure 4: memory footprint",
        "Paper: the whole footprint in GB, a batch of 256 tokens, BF16, read from bars to 0.1. Ours: weights and "
        "states alone in GiB, computed from shapes (exact convention), so a difference would compare unlike things: "
        "gradients and activations are on top. The paper does not print the ranks of its 7B bars; ours there is 256.",
        markdown([*head, "command"], rows, left=2),
    )


def overview(paper: Paper, printed: Memory) -> str:
    """Table 3 in its printed shape: "paper / ours" in the paper's convention."""
    everything = [*table3_cells(paper), *more_cells(paper)]
    cells = {(method, size + star): value for method, size, star, value in everything}
    columns = [size + star for size in SIZES for star in ("", "*")]
    rows: list[Sequence[str]] = []
    for method in (*METHODS[:5], "muon", *METHODS[5:]):
        texts = []
        for column in columns:
            value = cells.get((method, column))
            ours = printed.get(memory_key(method, column.rstrip("*"), column[len(column.rstrip("*")) :]))
            texts.append("" if value is None else f"{value:.2f} / " + ("–" if ours is None else f"{ours:.2f}"))
        rows.append([units.optimizer_name(method), *texts])
    return markdown(["paper / ours", *columns], rows)
