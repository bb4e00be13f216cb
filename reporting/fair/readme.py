"""The verdicts and the table of stage 2 in README.md, between two marks."""

from __future__ import annotations

import os
from pathlib import Path

from .. import units
from ..text import NOT_RUN, markdown
from .answer import name_of, verdicts_in_words
from .records import Fair, again, methods
from .tables import values

PAIRED = "results/fair/README.md#again-with-beta_2--095"  # from the root: the same seeds with both values of beta_2
BEGIN, END = "<!-- stage 2: python scripts/fair_report.py -->\n", "<!-- end of stage 2 -->"


def fill(page: str, fair: Fair, folder: Path) -> str:
    """The page with verdicts and table as the records have them.

    Args:
        folder: of the page, from which its links lead.

    Raises:
        ValueError: a mark is missing.
    """
    before, mark, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(
            f"README.md has lost {(mark and END) or BEGIN.strip()}: put it back around the table of stage 2"
        )
    said = "\n".join(f"- {sentence}" for sentence in verdicts_in_words(fair))
    return f"{before}{mark}\n{said}\n\n{table(fair, folder)}\n\n{end}{after}"


def table(fair: Fair, folder: Path) -> str:
    """Final perplexities with Adam's default beta_2 and with 0.95, in each column over the seeds that all its methods have.

    A number leads to the record of the first of these seeds.
    """
    columns: dict[str, dict[str, str]] = {}
    seeds_of: dict[str, list[set[int | None]]] = {}
    order: list[str] = []
    for source, what in ((fair, ""), (again(fair), "beta_2 0.95, ")):
        for model in fair.models:
            rows = [row for row in methods(source, model) if row.runs]
            order += [row.name for row in rows if row.name not in order]
            seeds: set[int | None] = (
                set.intersection(*({run.seed for run in row.runs} for row in rows)) if rows else set()
            )
            seeds_of.setdefault(model, []).append(seeds)
            cells = {}
            for row in rows:
                runs = [run for run in row.runs if run.seed in seeds]
                if row.diverged:
                    cells[row.name] = f"{row.diverged} of {len(row.runs)} diverged"
                elif runs:
                    link = os.path.relpath(runs[0].path, folder)
                    cells[row.name] = f"[{values([run.perplexity for run in runs])}]({link})"
            read = {run.summary.get("tokens") for row in rows for run in row.runs if run.summary}
            bigram = next((each for each in fair.ngrams.get(model, ()) if {each.tokens} == read), None)
            if bigram:
                cells["bigram"] = f"[{units.perplexity(bigram.bigram)}]({os.path.relpath(bigram.path, folder)})"
            columns[f"`{model}`, {what}{len(seeds)} seeds"] = cells
    names = {name: name_of(name) for name in order} | {"bigram": "a bigram model of as much text"}
    lines = [[said, *(cells.get(name, NOT_RUN) for cells in columns.values())] for name, said in names.items()]
    text = markdown(["", *columns], lines)
    if any(len(set(map(frozenset, each))) > 1 for each in seeds_of.values()):
        text += f"\n\nColumns are of different seeds, so none can be read against another; [this table]({PAIRED}) can."
    return text
