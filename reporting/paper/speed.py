"""Speed beside our records: step speed-ups (Figures 1 and 2), throughput and effective throughput (Figure 3, Table 2).

Throughputs compare with each other only if they are of the same hardware, which the table names.
"""

from __future__ import annotations

import math
from pathlib import Path

from .. import units
from ..records import Run
from ..text import NOT_RUN, markdown
from .cells import EXPERIMENTS
from .cells import SIZES as OUR_SIZES
from .numbers import (
    EVALUATE_EVERY,
    SIZES,
    Paper,
    effective_throughput,
    final_evaluation,
    printed_speedups,
    step_speedup,
)
from .records import RUNS, experiment_runs, misfits
from .tables import Table

MODEL_SIZES = {printed: ours for ours, printed in OUR_SIZES.items()}  # "60M" -> "60m"


def reference_experiment(optimizer: str, size: str) -> str:
    """The run of Figures 1 to 3: the candidate has the last layer, but for Adam, RACS and Muon, which have no such run."""
    end = "" if optimizer in ("adam", "racs", "muon") else "_candidate"
    return f"table2/{optimizer}_{MODEL_SIZES[size]}{end}"


def counting(experiment: str, root: Path = RUNS) -> Run | None:
    """The finished record of the smallest seed that fits the paper's settings; None if there is none."""
    for run in experiment_runs(experiment, root):
        if not math.isnan(run.perplexity) and not misfits(run, EXPERIMENTS[experiment]):
            return run
    return None


def speedups(paper: Paper, root: Path = RUNS) -> Table:
    """The step speed-ups of Figures 1 and 2 and of the text: printed, from the digitised curves, and from records."""
    rows = []
    for found in printed_speedups(paper):
        cited = found.reference == "adam_cited"
        computed = "–" if found.computed is None else f"{found.computed:.2f}"
        target = paper.tables["table2"]["rows"]["Adam (cited)"][found.size]["ppl_star"] if cited else None
        ours = our_speedup(paper, "alice", found.size, root, found.reference, target)
        names = ["alice"] if cited else ["alice", found.reference]
        experiments = [reference_experiment(name, found.size) for name in names]
        rows.append(
            [
                found.size,
                "Adam (cited)" if cited else units.optimizer_name(found.reference),
                f"{found.printed:.2f}",
                computed,
                "yes" if computed == f"{found.printed:.2f}" else "no",
                NOT_RUN if ours is None else "never reached" if ours == 0 else f"{ours:.2f}",
                "–" if ours is None else ", ".join(f"[{name}](runs/paper/{name})" for name in experiments),
                " and ".join(f"`train.py experiment={name}`" for name in experiments),
            ]
        )
    head = ["size", "over", "paper", "from its curve", "equal", "ours", "records", "command"]
    return Table(
        "speedups",
        "Figures 1 and 2: speed-up of Alice in steps",
        "All steps of the reference over the first evaluation of Alice (last layer by Alice) at or under the "
        f"reference's final perplexity, on a grid of {EVALUATE_EVERY} steps. That grid is deduced: with it the "
        "digitised curves give all 12 values printed in the figures, and the 4 against the cited Adam. Ours needs a "
        "record of Alice and, but for the cited Adam, one of the reference; of several seeds it takes the smallest.",
        markdown(head, rows, left=2),
    )


def our_speedup(
    paper: Paper, optimizer: str, size: str, root: Path, reference: str = "adam", target: float | None = None
) -> float | None:
    """The step speed-up in our records: 0 if the perplexity is never reached, None where a record is missing.

    Args:
        target: the perplexity to reach; the final one of our record of `reference` by default.
    """
    run = counting(reference_experiment(optimizer, size), root)
    if target is None:
        other = counting(reference_experiment(reference, size), root)
        target = final_evaluation(other) if other else None
    if run is None or target is None:
        return None
    return step_speedup(run.evals["step"], run.evals["perplexity"], target, paper.steps(size)) or 0.0


def our_effective(optimizer: str, size: str, root: Path = RUNS) -> float | None:
    """Effective tokens/s over Adam in our records: 0 if Adam's perplexity is never reached, None where one is missing."""
    run, adam = (counting(reference_experiment(name, size), root) for name in (optimizer, "adam"))
    if run is None or adam is None or hardware(run) != hardware(adam):
        return None
    if step_speedup(run.evals["step"], run.evals["perplexity"], final_evaluation(adam), total=1) is None:
        return 0.0
    return effective_throughput(run, adam)


def throughput(paper: Paper, root: Path = RUNS) -> Table:
    """Figure 3 and the lower part of Table 2: tokens/s, and effective tokens/s against Adam."""
    rows = []
    for optimizer in ("adam", "galore", "fira", "racs", "alice_0", "alice"):
        for size in SIZES:
            experiment = reference_experiment(optimizer, size)
            run = counting(experiment, root)
            speed = (run.summary or {}).get("tokens_per_second") if run else None
            effective = our_effective(optimizer, size, root)
            rows.append(
                [
                    units.optimizer_name(optimizer),
                    size,
                    f"{paper.throughput(optimizer, size):,.0f}",
                    NOT_RUN if speed is None else f"[{speed:,.0f}](runs/paper/{experiment})",
                    f"{paper.throughput(optimizer, size, effective=True) or 0:,.0f}",
                    NOT_RUN if effective is None else f"{effective:,.0f}",
                    "–" if run is None else hardware(run),
                    f"`train.py experiment={experiment}`",
                ]
            )
    head = ["method", "size", "paper", "ours", "paper, effective", "ours, effective", "our hardware", "command"]
    return Table(
        "throughput",
        "Figure 3 and Table 2: tokens per second",
        "Paper: on A100 GPUs (it does not say how many). Effective: Adam's training tokens over the time that the "
        "method needs to Adam's final perplexity; 0: never reached. No difference is given, because ours are of the "
        "hardware that the column names and compare with each other only; an effective throughput needs a record of "
        "Adam on the same hardware. Adam, RACS and Alice are printed in Table 2, the other bars are read from Figure "
        "3. GaLore, Fira, Alice-0 and Alice have the last layer.",
        markdown(head, rows, left=2),
    )


def hardware(run: Run) -> str:
    """Number of processes and accelerator (or processor), as recorded."""
    about = run.environment.get("hardware", {})
    name = about.get("device") or "unknown"
    name = about.get("cpu") or name if name == "cpu" else name
    return f"{about.get('processes', 1)} × {name}".replace("|", "/")
