"""The paper's tables beside our records: paper | ours | difference | runs | the command that fills the cell.

table = table2(load_paper())          Table(name="table2", title=..., about=..., body=markdown)

Every table is a function of results/paper/ and of the records below `root`; a cell without a record says "not run".
Links are relative to results/. Speeds are in speed.py, memory and structures in cost.py, and page.py
puts them all on one page.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .. import units
from ..records import Run
from ..text import NOT_RUN, markdown
from .cells import CELLS, EXPERIMENTS, OPTIMIZERS, Cell
from .numbers import SIZES, Paper
from .records import RUNS, Filling, basis_similarities, fill

HEAD = ("paper", "ours", "difference", "ours, GaLore's evaluation", "runs (seeds)", "command")
BASIS_COLUMNS = (1, 2, 4, 8)  # of Figure 6


@dataclass(frozen=True)
class Table:
    """One table of the page: its file name, heading, what a reader must know, and markdown."""

    name: str
    title: str
    about: str
    body: str


# ------------------------------------------------------------------------------------------- cells of perplexity


def table2(paper: Paper, root: Path = RUNS) -> Table:
    """Table 2, every cell: methods by size, with Adam (starred) or the candidate on the last layer."""
    rows = []
    for cell in _cells("table2"):
        rows.append([cell.row, cell.column + (" (cited)" if cell.cited else ""), *line(cell, paper, root)])
    for size, values in paper.tables["table2"]["rows"]["Adam (cited)"].items():
        rows.append(["Adam (cited)", f"{size}* (cited)", f"{values['ppl_star']:.2f}", *["–"] * 5])
    order = ["Adam", "Adam (cited)", "GaLore", "Fira", "Apollo-mini", "Apollo-svd", "Muon", "RACS", "Alice-0", "Alice"]
    rows.sort(key=lambda row: order.index(row[0]))  # stable: sizes stay in order
    return Table(
        "table2",
        "Table 2: final perplexity on C4",
        "A star: Adam trains the last layer (`optimizer.last_layer=adam`, the default). Cited cells are other papers' "
        "numbers, which the authors did not run; GaLore's and Fira's commands have this paper's hyper-parameters, Apollo's "
        "those of its own. Muon's row is of the ICLR version, which prints no hyper-parameters for it. Table 2 prints two "
        "decimals, mostly cut off; the difference is to the four decimals of Figures 1 and 2 where they show the run.",
        markdown(["method", "size", *HEAD], rows, left=2) + others(_cells("table2"), root),
    )


def table2_overview(paper: Paper, root: Path = RUNS) -> str:
    """Table 2 in its printed shape: "paper / ours" in each cell, a dash for ours where nothing counts."""
    cells = {(cell.row, cell.column): fill(cell, root) for cell in _cells("table2")}
    rows = []
    for name in OPTIMIZERS:
        row = units.optimizer_name(name)
        texts = []
        for size in SIZES:
            for star in ("", "*"):
                printed = paper.printed(name, size, bool(star))
                found = cells.get((row, size + star))
                ours = units.perplexity(found.value) if found and found.values else "–"
                texts.append("" if printed is None else f"{printed:.2f} / {ours}")
        rows.append([row, *texts])
    return markdown(["paper / ours", *(size + star for size in SIZES for star in ("", "*"))], rows)


def table4(paper: Paper, root: Path = RUNS) -> Table:
    """Table 4: 1B models of RACS and Alice at four steps, beside the 7B models that the paper cites."""
    rows = [
        [row, column, f"{value:.2f}", *["–"] * 5]
        for row, values in paper.tables["table4"]["rows"].items()
        if "7B" in row
        for column, value in zip(paper.tables["table4"]["columns"][1:], values[1:], strict=True)
    ]
    rows = [[row[0], row[1] + " (cited)", *row[2:]] for row in rows]
    rows += [[cell.row, cell.column, *line(cell, paper, root)] for cell in _cells("table4")]
    return Table(
        "table4",
        "Table 4: a 1B model against 7B models",
        "Perplexity at 40K, 80K, 120K and 150K steps of one run, Adam on the last layer. The four 7B rows are cited "
        "from Zhu et al. (2412.05270). A record counts for a step as soon as it holds the evaluation there.",
        markdown(["model", "step", *HEAD], rows, left=2) + others(_cells("table4"), root),
    )


def table5(paper: Paper, root: Path = RUNS) -> Table:
    """Table 5: the parts of Alice, one after the other, at 130M."""
    rows = [[cell.row, *line(cell, paper, root)] for cell in _cells("table5")]
    return Table(
        "table5",
        "Table 5: the parts of Alice",
        "130M, last layer by Alice. A public note on the ICLR version says 350M for the same numbers, wrongly: 21.95 "
        "is Alice's 130M cell of Table 2.",
        markdown(["parts", *HEAD], rows) + others(_cells("table5"), root),
    )


def figure5(paper: Paper, root: Path = RUNS) -> Table:
    """Figures 5a to 5e: the final values that their legends print."""
    cells = [cell for cell in CELLS if cell.table.startswith("figure5")]
    rows = [[cell.table.removeprefix("figure"), cell.row, *line(cell, paper, root, digits=4)] for cell in cells]
    return Table(
        "figure5",
        "Figure 5: tracking, switching, compensation, last layer, RACS's averages",
        "130M. 5a and 5b run without compensation. 5a's 25.1113 and 5b's and 5c's 25.1149 are one configuration run "
        "twice, so 0.004 is the paper's only number on the noise between runs. The legends' \"lm head\" means that "
        "Adam trains it.",
        markdown(["figure", "curve", *HEAD], rows, left=2) + others(cells, root),
    )


def line(cell: Cell, paper: Paper, root: Path, digits: int = 2) -> list[str]:
    """The columns of HEAD for one cell. `digits`: of the printed value."""
    filling = fill(cell, root)
    command = f"`train.py experiment={cell.experiment}`"
    printed = "–" if cell.paper_value is None else f"{cell.paper_value:.{digits}f}"
    if not filling.values:
        return [printed, NOT_RUN, "–", "–", "0", command]
    seeds = ", ".join(str(run.seed) for run in filling.runs)
    spread = "" if filling.spread is None else f" ± {filling.spread:.2g}"
    ours = f"[{units.perplexity(filling.value)}{spread}](runs/paper/{cell.experiment})"
    reference = reference_value(cell, paper)
    difference = "–"
    if reference is not None and math.isfinite(filling.value):
        difference = f"{filling.value - reference:+.2f} ({filling.value / reference - 1:+.1%})"
    return [printed, ours, difference, _galore(filling, cell), f"{len(filling.runs)} ({seeds})", command]


def reference_value(cell: Cell, paper: Paper) -> float | None:
    """What a cell's difference is taken to: the printed value, with more digits where a figure has them."""
    if cell.table == "table2":
        run = EXPERIMENTS[cell.experiment]
        return paper.perplexity(run.optimizer, cell.column.rstrip("*"), cell.column.endswith("*"))
    if cell.table == "table5":
        same = [other for other in CELLS if other.table.startswith("figure5") and other.experiment == cell.experiment]
        return same[0].paper_value if same else cell.paper_value
    return cell.paper_value


def _galore(filling: Filling, cell: Cell) -> str:
    """The mean perplexity by the convention of GaLore's code, which is known for the end of a run only."""
    values = [(run.summary or {}).get("perplexity_galore") for run in filling.runs]
    known = [float(value) for value in values if value is not None and math.isfinite(value)]
    return units.perplexity(statistics.fmean(known)) if cell.step is None and len(known) == len(values) else "–"


def others(cells: Iterable[Cell], root: Path) -> str:
    """A list of the records that lie where these cells' records belong but are not the cells' numbers, with labels."""
    lines: dict[Path, str] = {}
    for cell in cells:
        for run, reasons in fill(cell, root).others:
            name = f"{cell.experiment}/{run.path.name}"
            text = f"- [{name}](runs/paper/{name}): {label(run)}. Not the cell's number: {'; '.join(reasons)}."
            lines.setdefault(run.path, text)
    return "\n\nOther records of these experiments:\n\n" + "\n".join(lines.values()) if lines else ""


def label(run: Run) -> str:
    """Perplexity, tokens and data of a record that stands for itself."""
    tokens = (run.summary or {}).get("tokens") or (run.train["tokens"][-1] if len(run.train["tokens"]) else math.nan)
    outcome = "not finished" if math.isnan(run.perplexity) else f"perplexity {units.perplexity(run.perplexity)}"
    return f"{outcome} after {units.count(float(tokens))} tokens of {run.data}, seed {run.seed}"


def _cells(table: str) -> list[Cell]:
    return [cell for cell in CELLS if cell.table == table]


def figure6(paper: Paper, root: Path = RUNS) -> Table:
    """Figure 6 in numbers: the mean similarity of a column of the basis before and after its updates."""
    rows = []
    for cell in _cells("figure6"):
        similar: list[list[float]] = [[] for _ in BASIS_COLUMNS]
        runs = fill(cell, root).runs
        matrices = basis_similarities(runs[0]) if runs else {}
        for steps in matrices.values():
            for values in steps.values():
                for series, value in zip(similar, values, strict=False):
                    series.append(value)
        for column, ours in zip(BASIS_COLUMNS, similar, strict=True):
            _, printed = paper.curve(f"fig6_index{column}", cell.row)
            rows.append(
                [
                    cell.row,
                    str(column),
                    f"{printed.mean():.2f}",
                    f"[{statistics.fmean(ours):.2f}](runs/paper/{cell.experiment})" if ours else NOT_RUN,
                    f"{statistics.fmean(ours) - float(printed.mean()):+.2f}" if ours else "–",
                    str(len(matrices)) if ours else "0",
                    f"`train.py experiment={cell.experiment}`",
                ]
            )
    return Table(
        "figure6",
        "Figure 6: how much of the basis an update keeps",
        "|cosine| between a column of U before and after an update (every 200 steps), mean over the updates of a "
        "run; columns by descending eigenvalue. The paper shows one matrix and does not say which; ours is the mean "
        "over all matrices that were recorded (`optimizer.log_basis=true`).",
        markdown(["run", "column", "paper", "ours", "difference", "matrices", "command"], rows, left=2),
    )


# ------------------------------------------------------------------------------------------- others' numbers


def peers(paper: Paper) -> Table:
    """What other papers report for the same methods, sizes and, but for 60M, steps."""
    scale = paper.peers["scale_2506.16659"]["ppl"]
    rows = []
    for optimizer in ("muon", "adam", "galore", "fira"):
        name = units.optimizer_name(optimizer)
        printed = [paper.printed(optimizer, size, True) for size in SIZES]
        pairs = zip(printed, scale[name], strict=True)
        rows.append([name, *(f"{'–' if here is None else f'{here:.2f}'} / {there:.2f}" for here, there in pairs)])
    return Table(
        "peers",
        "The same baselines in another paper",
        "This paper / SCALE (2506.16659, its README), final perplexity, Adam on the last layer; SCALE's 60M runs "
        "have 11,000 steps instead of 10,000. Perplexities of different papers compare loosely (subset of "
        "evaluation, padding, tuning), but Adam and Muon are 1.9 to 3.9 points better there at 60M and 130M, so this "
        "paper's baselines may be weakly tuned. GaLore's and Fira's cells of this paper are cited.",
        markdown(["method", *SIZES], rows),
    )
