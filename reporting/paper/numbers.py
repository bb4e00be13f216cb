"""The paper's printed numbers, and its own definitions applied to its curves and to ours.

paper = load_paper()
paper.perplexity("alice", "60M", starred=False)          28.6970, what Figure 2a prints
step_speedup(*paper.curve("fig2a_60M", "Alice"), target=33.9451, total=10_000)      2.22

The files of results/paper/ are described in results/paper/README.md. Names of methods are config names ("alice_0").
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import units
from ..curves import first_evaluation
from ..records import Run, lookup

RESULTS = Path(__file__).resolve().parents[2] / "results"

SIZES = ("60M", "130M", "350M", "1.3B")
CURVES = {"60M": "fig2a_60M", "130M": "fig2b_130M", "350M": "fig2c_350M", "1.3B": "fig1_1.3B"}  # the figure of a size
TOKENS_PER_STEP = 512 * 256  # padding included
EVALUATE_EVERY = 500  # steps; deduced: only this grid gives all printed speed-ups

# Table 2 takes these values from the papers that published the methods; the authors did not run them.
CITED = {("galore", True), ("fira", True), ("apollo_mini", True), ("apollo_svd", True)}

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]  # steps and values, both [points]


@dataclass(frozen=True)
class Paper:
    """The three files: tables as printed, figures as digitised, numbers of other papers."""

    tables: Mapping[str, Any]
    figures: Mapping[str, Any]
    peers: Mapping[str, Any]

    def steps(self, size: str) -> int:
        """Optimizer steps of the size in Table 10."""
        return int(self.tables["table10"]["rows"][size][4])

    def printed(self, optimizer: str, size: str, starred: bool) -> float | None:
        """The perplexity that Table 2 prints (two decimals, mostly truncated); None where its cell is empty."""
        if optimizer == "muon":  # the row of the ICLR version; Adam has the last layer there
            return self.tables["iclr2026"]["muon"]["ppl"][size] if starred else None
        row = self.tables["table2"]["rows"].get(units.optimizer_name(optimizer), {}).get(size, {})
        return row.get("ppl_star" if starred else "ppl")

    def perplexity(self, optimizer: str, size: str, starred: bool) -> float | None:
        """The final perplexity: with the four decimals that a figure prints, else as in Table 2."""
        printed = self.printed(optimizer, size, starred)
        if printed is None or (optimizer, starred) in CITED:
            return printed
        return self.figures["final_values_printed_in_figures"][CURVES[size]].get(
            curve_name(optimizer, starred), printed
        )

    def curve(self, figure: str, name: str) -> Curve:
        """A digitised curve of figures.json."""
        points = np.asarray(self.figures[figure][name], dtype=np.float64)
        return points[:, 0], points[:, 1]

    def throughput(self, optimizer: str, size: str, effective: bool = False) -> float | None:
        """Tokens/s of Figure 3 (the three methods of Table 2 to the unit); None where there is no bar."""
        bars = self.figures["fig3b_effective_throughput" if effective else "fig3a_throughput_tokens_per_s"]
        values = dict(zip(bars["sizes"], bars.get(units.optimizer_name(optimizer), []), strict=False))
        return values.get(size) or None  # a bar of height 0: the method never reached Adam's perplexity


@lru_cache
def load_paper(folder: Path = RESULTS / "paper") -> Paper:
    """Read tables.json, figures.json and peers.json.

    Raises:
        FileNotFoundError, ValueError: a file is missing or is not JSON.
    """
    contents = []
    for name in ("tables", "figures", "peers"):
        path = folder / f"{name}.json"
        try:
            contents.append(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise FileNotFoundError(f"{path} with the paper's numbers is missing: restore it from git.") from None
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON: restore it from git.") from error
    return Paper(*contents)


def curve_name(optimizer: str, starred: bool) -> str:
    """How the paper's figures call a method; "lm head" there means that Adam trains the last layer, our starred."""
    if optimizer == "adam":
        return "AdamW"
    name = units.optimizer_name(optimizer)
    return f"{name}+lm head" if starred and optimizer in ("alice", "alice_0") else name


def step_speedup(
    steps: NDArray[np.float64], values: NDArray[np.float64], target: float, total: int, every: int = EVALUATE_EVERY
) -> float | None:
    """The paper's speed-up in steps: all steps of the reference over the candidate's steps to its final perplexity.

    Args:
        target: final perplexity of the reference.
        total: steps of the reference.
    """
    first = first_evaluation(steps, values, target, every)
    return total / first if first else None


@dataclass(frozen=True)
class Speedup:
    """One printed speed-up of Alice (last layer by Alice) in Figures 1 and 2, and what its curve gives."""

    size: str
    reference: str  # config name
    printed: float
    computed: float | None


def printed_speedups(paper: Paper) -> list[Speedup]:
    """The 12 speed-ups over Adam, GaLore and Fira, then the 4 over the cited Adam of Table 2 ("adam_cited")."""
    found = []
    for size in SIZES:
        figure = CURVES[size]
        finals = paper.figures["final_values_printed_in_figures"][figure]
        for reference in ("adam", "galore", "fira"):
            name = curve_name(reference, starred=False)
            found.append(
                _speedup(paper, size, reference, finals[name], paper.figures["speedup"]["printed"][figure][name])
            )
    cited = paper.tables["table2"]["rows"]["Adam (cited)"]
    text = paper.figures["speedup"]["vs_cited_adam"]["text"]
    return found + [_speedup(paper, size, "adam_cited", cited[size]["ppl_star"], text[size]) for size in SIZES]


def _speedup(paper: Paper, size: str, reference: str, target: float, printed: float) -> Speedup:
    computed = step_speedup(*paper.curve(CURVES[size], "Alice"), target, paper.steps(size))
    return Speedup(size, reference, printed, computed)


def final_evaluation(run: Run) -> float:
    """The last validation perplexity of a run's curve: what others of the same curve are held against, to the last bit.

    Infinite for a diverged run, NaN for one without an evaluation.
    """
    if not np.isfinite(run.perplexity) or len(run.evals["perplexity"]) == 0:
        return run.perplexity
    return float(run.evals["perplexity"][-1])


def effective_throughput(run: Run, reference: Run) -> float | None:
    """Tokens of the whole reference run over the seconds that `run` needs to its final perplexity, as Table 2 defines it.

    The seconds are the run's time in training steps (no evaluations, no checkpoints) by the share of its steps: lines of
    metrics.jsonl may be every 20th step, and refreshes of a basis, every 200th, would count 20 times in them.

    None if `run` never gets there or its time is not recorded. Both must have run on the same machine to mean anything.
    """
    target = final_evaluation(reference)
    first = first_evaluation(run.evals["step"], run.evals["perplexity"], target, EVALUATE_EVERY)
    seconds, steps = (lookup(run.summary, key) for key in ("training_seconds", "steps"))
    total = lookup(reference.summary, "tokens")
    if first is None or not seconds or not steps or not total:
        return None
    return float(total) / (float(seconds) * first / steps)
