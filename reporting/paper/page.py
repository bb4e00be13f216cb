"""results/README.md and results/tables/: every table and figure of the paper beside our records, as text.

files = generate()             {"README.md": text, "tables/table2.md": text, ...}, paths relative to results/
differences(files, RESULTS)    what on disk is not that, a sentence each

Both are functions of results/paper/, the records below results/, and shapes; nothing here trains or needs a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from ..text import anchor
from . import cost, speed, tables
from .cells import CELLS
from .cost import Memory
from .numbers import RESULTS, Paper, load_paper
from .records import RUNS, fill
from .tables import Table

FIGURES = "figures/paper"  # below results/

# Figures under a table, with what they show
_PICTURES = {
    "table2": [("figure1_2", "Figures 1 and 2: validation perplexity over steps")],
    "speedups": [("speedups", "Speed-up over Adam in steps and in wall-clock time")],
    "throughput": [("figure3", "Figure 3: throughput and effective throughput")],
    "table3": [("memory_perplexity", "Memory against final perplexity, Tables 2 and 3")],
    "figure4": [("figure4", "Figure 4: memory footprint")],
    "figure5": [("figure5", "Figure 5: ablations")],
    "figure6": [("figure6", "Figure 6: similarity of the basis at each update")],
}
_LONG = ("table2", "throughput", "table3", "figure4")  # folded on the page

_ORIGIN = {  # of the paper's numbers
    "table1": "`tables.json`: table1",
    "table2": "`tables.json`: table2, iclr2026; curves: `figures.json`",
    "speedups": "`figures.json`: speedup, fig1, fig2a to fig2c",
    "throughput": "`tables.json`: table2; `figures.json`: fig3a, fig3b",
    "table3": "`tables.json`: table3, table4, iclr2026",
    "figure4": "`figures.json`: fig4_memory_footprint_GB",
    "table4": "`tables.json`: table4",
    "table5": "`tables.json`: table5",
    "figure5": "`figures.json`: fig5a to fig5e",
    "figure6": "`figures.json`: fig6_index1 to fig6_index8",
    "table6": "`tables.json`: table6",
    "peers": "`peers.json`",
}

_REPORTS = (  # pages that other commands write
    ("fair/README.md", "The fair comparison: every method on the same grids, two proxies"),
    ("runs/compare/README.md", "Adam, Muon, RACS and Alice on grids of rates, the quickstart's task"),
    ("runs/all/README.md", "Every method on the same task, 100 steps: speeds, states, rates"),
    ("benchmarks/README.md", "Milliseconds of optimizer steps and tokens a second of trainers, ours beside others'"),
    ("fisher/README.md", "How well each structure of the Fisher matrix fits real gradients"),
)


_FAIR = "The fair comparison"


def make_tables(root: Path = RUNS, printed: Memory | None = None, exact: Memory | None = None) -> list[Table]:
    """Every table, in the order of the page.

    Args:
        root: where the records of the paper's cells lie.
        printed, exact: memory in both conventions; computed from shapes (with torch) by default.

    Raises:
        ValueError: a record is malformed.
    """
    paper = load_paper()
    printed = cost.computed_memory(paper, "paper") if printed is None else printed
    exact = cost.computed_memory(paper, "exact") if exact is None else exact
    return [
        tables.table2(paper, root),
        speed.speedups(paper, root),
        speed.throughput(paper, root),
        cost.table3(paper, printed, exact),
        cost.figure4(paper, exact),
        tables.table4(paper, root),
        tables.table5(paper, root),
        tables.figure5(paper, root),
        tables.figure6(paper, root),
        cost.table1(paper),
        cost.table6(paper),
        tables.peers(paper),
    ]


def generate(
    root: Path = RUNS, printed: Memory | None = None, exact: Memory | None = None, fair: str = ""
) -> dict[str, str]:
    """The text of every generated file, by its path relative to results/.

    Args:
        root, printed, exact: as of `make_tables`.
        fair: what the page says of the fair comparison (`reporting.fair.page.summary`); "": only where it is.
    """
    paper = load_paper()
    printed = cost.computed_memory(paper, "paper") if printed is None else printed
    made = make_tables(root, printed, exact)
    files = {f"tables/{table.name}.md": _file(table) for table in made}
    return {"README.md": _page(paper, made, root, printed, fair)} | files


def differences(files: Mapping[str, str], results: Path = RESULTS) -> list[str]:
    """A sentence for each generated file that is missing, stale or superfluous, naming the tables; none: all agree."""
    found = []
    for name, text in files.items():
        path = results / name
        if not path.is_file():
            found.append(f"{name} is missing.")
        elif (old := path.read_text(encoding="utf-8")) != text:
            found.append(f"{name} disagrees with the records in: {', '.join(_changed(old, text))}.")
    if (results / "tables").is_dir():
        for path in sorted((results / "tables").glob("*.md")):
            if f"tables/{path.name}" not in files:
                found.append(f"tables/{path.name} is the table of nothing.")
    for pictures in _PICTURES.values():
        for name, _ in pictures:
            for suffix in ("png", "svg"):
                if not (results / FIGURES / f"{name}.{suffix}").is_file():
                    found.append(f"{FIGURES}/{name}.{suffix} is missing.")
    return found


def _changed(old: str, new: str) -> list[str]:
    """Headings of the sections in which two versions of a page differ."""
    before, after = sections(old), sections(new)
    return [name for name in {**after, **before} if before.get(name) != after.get(name)] or ["the beginning"]


def sections(text: str) -> dict[str, str]:
    """The sections of a page: heading -> what stands under it, as far as the next heading of any level."""
    pieces = re.split(r"^#+ (.*)$", text, flags=re.M)[1:]
    return dict(zip(pieces[::2], pieces[1::2], strict=True))


def _file(table: Table) -> str:
    """A file of results/tables/; links of tables are relative to results/."""
    body = f"# {table.title}\n\n{table.about}\n\nThe paper's numbers: [results/paper](paper/README.md), {_ORIGIN[table.name]}. "
    body += f"Generated by `make tables`.\n\n{table.body}\n"
    return re.sub(r"\]\((?!https?:)", "](../", body)


def _page(paper: Paper, made: list[Table], root: Path, printed: Memory, fair: str) -> str:
    filled = [cell for cell in CELLS if cell.table != "figure6" and fill(cell, root).values]
    cells = [cell for cell in CELLS if cell.table != "figure6"]
    parts = [
        "# Results",
        "Generated by `make tables` from run records and from the paper's numbers; not to be edited. `python "
        "scripts/tables.py --check` fails if it disagrees with them.",
        f"**{len(filled)} of {len(cells)} cells with a perplexity of the paper have been run here** (cells without a record "
        'say "not run"; Figure 6\'s two, which are curves, are not counted). Every perplexity that the authors ran names the '
        "command that fills it, cited ones where hyper-parameters are known. `python train.py "
        "experiment=table2/alice_60m` is the whole command of a cell; `python scripts/reproduce.py table2 --size 60m` "
        "estimates time and cost, runs what "
        "is missing, files the records under `results/runs/paper/<experiment>/s<seed>/` and makes this page again. A "
        "record counts for a cell if model, method, last layer, the hyper-parameters of Tables 7 to 11, steps, batch "
        "and data (C4, 10M validation tokens) are the paper's; any other is listed under the table with its label.",
        "*Ours* is exp(mean loss) over all validation tokens, the mean over seeds ± standard deviation. *GaLore's "
        "evaluation* is the same run by the formula of the code base that the published numbers probably come from, "
        "whose perplexity is too low by 1 to 14 %; nobody knows whether the authors used it. The paper's numbers, "
        "their sources and misprints are in [results/paper](paper/README.md); the tables are also single files in "
        f"[results/tables](tables), the figures in [results/{FIGURES}]({FIGURES}) as PNG and SVG.",
        "What the paper's comparison leaves open is the subject, at a small scale, of "
        f"[the fair comparison]({_REPORTS[0][0]}).",
        "\n".join(
            [
                "Contents:",
                "",
                *(f"- [{table.title}](#{anchor(table.title)})" for table in made),
                *([f"- [{_FAIR}](#{anchor(_FAIR)})"] if fair else []),
                "- [Other reports](#other-reports)",
            ]
        ),
    ]
    for table in made:
        parts += [f"## {table.title}", table.about, f"Paper: {_ORIGIN[table.name]}."]
        if table.name == "table2":
            parts.append(tables.table2_overview(paper, root))
        if table.name == "table3":
            parts.append(cost.overview(paper, printed))
        parts += [f"![{text}]({FIGURES}/{name}.png)" for name, text in _PICTURES.get(table.name, [])]
        if table.name in _LONG:
            rows = table.body.count("\n| ") - 1
            parts.append(f"<details><summary>All {rows} cells, with commands</summary>\n\n{table.body}\n\n</details>")
        else:
            parts.append(table.body)
    parts += [f"## {_FAIR}", fair] if fair else []
    parts += ["## Other reports", "\n".join(f"- [{text}]({path})" for path, text in _REPORTS)]
    parts.append("Notebooks that show the same and let you change it: [results/notebooks](notebooks).")
    return "\n\n".join(parts) + "\n"
