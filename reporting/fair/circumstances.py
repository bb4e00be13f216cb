"""How the fair comparison was made: counts of runs, circumstances, and every record with its link."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .. import units
from ..records import Run, lookup
from ..sides import is_number
from ..text import markdown
from .gains import growing
from .records import Fair

WHAT = {
    "fair_rates": "stage 1",
    "fair_control": "control",
    "fair_best": "stage 2",
    "fair_ablations": "ablations",
    "fair_batch": "batch size",
    "fair_repeat": "the same run twice",
    "fair_again": "the same run by later code",
    "fair_adam": "Adam's averages",
    "fair_constants": "constants",
    "fair_long": "longer runs",
    "fair_rates_b95": "stage 1 with beta_2 = 0.95",
    "fair_best_b95": "stage 2 with beta_2 = 0.95",
}

TEXT = (
    "The text is Wikipedia in C4's file layout (`c4_local` names the layout), not C4: 197 MB, compressed in the files to "
    "the bytes below. The first token of a row is not predicted: 131,072 validation tokens in rows of 256 are 130,560 "
    "predicted ones."
)


def progress(fair: Fair) -> str:
    """One line: how many runs of each part have ended."""
    parts = [f"{WHAT.get(sweep, sweep)} {len(fair.runs(sweep))} of {len(fair.asked(sweep))}" for sweep in fair.sweeps]
    more = [WHAT.get(sweep, sweep) for sweep in growing(fair)]
    verb = "asks" if len(more) == 1 else "ask"
    grow = f"; {' and '.join(more)} {verb} for more while grids grow" if more else ""
    return f"Runs that have ended: {', '.join(parts)}{grow}."


def made(fair: Fair) -> str:
    """The text, commands and budgets of each sweep, then what all runs share."""
    head = ["part", "command", "runs", "diverged", "steps", "tokens a run", "seeds", "runs at once", "time of all runs"]
    rows = []
    for sweep in fair.sweeps:
        runs = fair.runs(sweep)
        summaries = [run.summary for run in runs if run.summary]
        seconds = [value for summary in summaries if is_number(value := summary.get("wall_seconds"))]
        rows.append(
            [
                WHAT.get(sweep, sweep),
                f"`{fair.plans.commands.get(sweep, f'python scripts/sweep.py {sweep} data.path=DIR')}`",
                f"{len(runs)} of {len(fair.asked(sweep))}",
                str(sum(math.isinf(run.perplexity) for run in runs)),
                _all(run.setting("trainer.steps") for run in runs),
                _all(f"{summary['tokens']:,}" for summary in summaries if summary.get("tokens")),
                _all(run.seed for run in runs),
                str(fair.plans.at_once.get(sweep, "not noted yet")) if runs else "–",
                units.duration(sum(seconds)) if seconds else "–",
            ]
        )
    return "\n\n".join(
        [TEXT, markdown(head, rows, left=2), *([_shared(fair), *_uncommitted(fair)] if fair.runs() else [])]
    )


def _uncommitted(fair: Fair) -> list[str]:
    """That runs are from a working tree with changes, if some are, and what shows whether that matters."""
    changed = [run for run in fair.runs() if run.environment.get("uncommitted_changes")]
    if not changed:
        return []
    return [
        f"{len(changed)} runs were made in a working tree with uncommitted changes, which no commit tells. Some of them were "
        "[run again](#the-same-run-twice) at a commit: what those differ by."
    ]


def _shared(fair: Fair) -> str:
    """Facts of all records, commits by sweep; several values mean that they differed."""
    runs = fair.runs()
    environments = [run.environment for run in runs]
    hardware = (
        ", ".join(f"{key} {value}" for key, value in each.get("hardware", {}).items()) or None for each in environments
    )
    versions = sorted({name for each in environments for name in each.get("versions", {})})
    models = {
        run.model: lookup(run.summary, "parameters", lookup(run.environment, "parameters")) for run in runs if run.model
    }
    facts = [
        ("Models", "; ".join(f"{name} ({count:,} parameters)" for name, count in sorted(models.items()) if count)),
        ("Tokenizers", _all(lookup(each, "tokenizer.name") for each in environments)),
        ("Training text", _all(_text(lookup(each, "data.train")) for each in environments)),
        ("Validation text", _all(_text(lookup(each, "data.validation")) for each in environments)),
        ("Validation tokens", _all(map(_validation_tokens, runs))),
        ("Precision", _all(run.setting("trainer.precision") for run in runs)),
        ("Hardware", _all(hardware)),
        ("Python", _all(each.get("python") for each in environments)),
        *((name, _all(lookup(each, "versions", {}).get(name) for each in environments)) for name in versions),
        *(
            (f"Commits, {WHAT.get(sweep, sweep)}", _all(map(commit_of, fair.runs(sweep))))
            for sweep in fair.sweeps
            if fair.runs(sweep)
        ),
    ]
    return "\n".join(f"- {name}: {value}" for name, value in facts)


def commit_of(run: Run) -> str | None:
    commit = run.environment.get("commit")
    changes = " with uncommitted changes" if run.environment.get("uncommitted_changes") else ""
    return f"{commit[:10]}{changes}" if commit else None


def _validation_tokens(run: Run) -> str | None:
    """How many were predicted: the first of a row is not."""
    predicted = (run.summary or {}).get("validation_tokens")
    most, length = run.setting("data.validation_max_tokens"), run.setting("data.length")
    if not is_number(predicted):
        return None
    return f"{predicted:,} predicted" + (f" (rows of {length}, at most {most:,} tokens)" if is_number(most) else "")


def _text(source: Any) -> str | None:
    """What identifies a text: files, bytes and the checksum of their list; never where it lay."""
    if not isinstance(source, dict):
        return None
    size, packed = source.get("bytes"), str(source.get("first_file", "")).endswith((".gz", ".zst"))
    parts = [
        str(source.get("name", "unknown")),
        _count(source.get("files"), "file"),
        f"{size:,} bytes{' compressed' if packed else ''}" if is_number(size) else "",
        f"list {source['listing_sha256'][:12]}" if source.get("listing_sha256") else "",
    ]
    return ", ".join(part for part in parts if part)


def _count(number: Any, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}" if number else ""


def _all(values: Iterable[Any]) -> str:
    return "; ".join(sorted({str(value) for value in values if value is not None})) or "–"


def everything(fair: Fair, out: Path) -> str:
    """A table of all records for each sweep, folded."""
    blocks = ["Each links to its record."]
    for sweep in fair.sweeps:
        rows = []
        for asked in fair.asked(sweep):
            run = fair.ended.get(asked.folder)
            if run is None:
                continue
            name = asked.folder.removeprefix(f"{sweep}/")
            outcome = units.perplexity(run.perplexity)
            if run.diverged and run.diverged.get("step") is not None:
                outcome += f" at step {run.diverged['step']}"
            rows.append([f"[{name}]({os.path.relpath(run.path, out)})", f"{run.lr:g}", f"{run.adam_lr:g}", outcome])
        if rows:
            table = markdown(["run", "matrix rate", "Adam group", "perplexity"], rows)
            blocks.append(
                f"<details><summary>{WHAT.get(sweep, sweep)}: {len(rows)} runs</summary>\n\n{table}\n\n</details>"
            )
    return "\n\n".join(blocks) if len(blocks) > 1 else "None has ended."
