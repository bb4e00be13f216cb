"""A whole sweep in one table and one picture: every run, whatever became of it, and final loss against rate.

    found = collect(Path("results/runs/all"), planned)
    write_collection(found, Path("results/runs/all"))

`planned` are the runs that the sweep's plan asks for: those without a record are listed as missing.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import style, units
from .pages import circumstances
from .records import Run, find_runs
from .sides import last_step, settings, state, value_text
from .summary import best_cell, findings, selection_perplexity
from .text import markdown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STATES = ("ended", "diverged", "pruned", "not ended", "missing")
TOGETHER = 8  # methods in one panel
TRIAL = re.compile(r"-t\d+$")  # of a search


@dataclass(frozen=True)
class Row:
    """One run of a sweep.

    Attributes:
        name: its folder below the sweep's.
        label: the method, or the variant of it.
        other: settings besides the rates in which the runs of this label differ, as text.
        state: one of ``STATES``.
        step: that it ended with, diverged or was pruned at, or has logged last.
        loss: final validation loss, the mean over tokens; NaN unless ended.
        run: the record; None if missing.
    """

    name: str
    label: str
    optimizer: str
    model: str | None
    lr: float = math.nan
    adam_lr: float = math.nan
    seed: int | None = None
    other: str = ""
    state: str = "missing"
    step: int | None = None
    loss: float = math.nan
    run: Run | None = None


def collect(folder: Path, planned: Iterable[Row] = ()) -> list[Row]:
    """The runs below `folder`, and those planned that have no record.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a record is malformed.
    """
    rows = [_row(run, folder) for run in find_runs(folder)]
    groups: dict[tuple[str | None, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.model, row.label), []).append(row)
    rows = [row for group in groups.values() for row in _with_others(group)]
    there = {row.name for row in rows}
    return rows + [row for row in planned if row.name not in there]


def label(name: str, optimizer: str) -> str:
    """The method or variant by the folder's name: `alice-lr0.02-adam0.02-s42`, `alice-t007`, `no_tracking-s43`."""
    last = name.rpartition("/")[2]
    if last.startswith(f"{optimizer}-lr") or TRIAL.search(last):
        return optimizer
    return re.sub(r"-s\d+$", "", last)


def _row(run: Run, folder: Path) -> Row:
    name = run.path.relative_to(folder).as_posix() if run.path != folder else folder.name
    file = run.path / "pruned.json"
    found, step = state(run), last_step(run)
    if file.is_file() and found == "not ended":
        found, step = "pruned", json.loads(file.read_text(encoding="utf-8")).get("step", step)
    return Row(
        name=name,
        label=label(name, run.optimizer),
        optimizer=run.optimizer,
        model=run.model,
        lr=run.lr,
        adam_lr=run.adam_lr,
        seed=run.seed,
        state=found,
        step=step,
        loss=math.log(run.perplexity) if found == "ended" else math.nan,
        run=run,
    )


def _with_others(group: Sequence[Row]) -> list[Row]:
    """The rows of one label, each with the settings that distinguish it."""
    each = [settings(row.run) if row.run else {} for row in group]
    texts = [{key: value_text(value) for key, value in values.items()} for values in each]
    keys = sorted({key for values in texts for key in values} - {"optimizer.lr", "optimizer.adam_lr"})
    differ = [key for key in keys if len({values.get(key) for values in texts}) > 1]
    return [
        replace(row, other=", ".join(f"{key.removeprefix('optimizer.')} {values.get(key, 'null')}" for key in differ))
        for row, values in zip(group, texts, strict=True)
    ]


# Tables ---------------------------------------------------------------------------------------------------------------


def write_collection(rows: Sequence[Row], out: Path, title: str, made: Mapping[str, Any] | None = None) -> list[Path]:
    """Write table.md, table.csv, table.json, rates.png and rates.svg into `out`.

    Args:
        title: of the page, usually the sweep's name.
        made: the sweep's own note (sweep.yaml): its last command, and how many runs shared the machine.

    Raises:
        ValueError: there is nothing to show.
        ImportError: matplotlib is not installed.
    """
    if not rows:
        raise ValueError(f"{title} has no records and no plan: give the folder of a sweep.")
    out.mkdir(parents=True, exist_ok=True)
    drawn = rates_figure(rows, out, title)
    files = [out / "table.md", out / "table.csv", out / "table.json"]
    files[0].write_text(page(rows, title, made or {}, bool(drawn)), encoding="utf-8")
    with files[1].open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(_plain(rows[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(_plain(row) for row in rows)
    kept = {"sweep": title, "runs": [_plain(row) for row in rows]}
    files[2].write_text(json.dumps(kept, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return [*files, *drawn]


def page(rows: Sequence[Row], title: str, made: Mapping[str, Any], drawn: bool) -> str:
    """The markdown page."""
    runs = [row.run for row in rows if row.run is not None]
    notes = [_counts(rows)]
    for model in models(rows):
        here = [row for row in rows if row.model == model]
        if all(row.label == row.optimizer for row in here):
            prefix = f"{model}: " if len(models(rows)) > 1 else ""
            notes += [prefix + note for note in findings(row.run for row in here if row.run and row.state == "ended")]
    parts = [
        f"# {title}: every run",
        "The best of each by its final validation loss (mean over tokens, natural logarithm); with several seeds, their mean.",
        best_table(rows),
        "\n".join(f"- {note}" for note in notes),
    ]
    if drawn:
        parts.append("![Final loss against the rate of the matrices](rates.png)")
    parts += ["## Every run", run_table(rows)]
    if runs:
        jobs = made.get("jobs")
        command = str(made.get("command", "unknown"))
        parts += [
            "## How it was made",
            "\n".join(f"- {name}: {value}" for name, value in circumstances(runs, command, jobs)),
        ]
    return "\n\n".join(parts) + "\n"


def best_table(rows: Sequence[Row]) -> str:
    """A row for each method or variant of each model, the lowest loss first."""
    lines = []
    for model in models(rows):
        found = []
        for name in labels(rows, model):
            group = [row for row in rows if (row.model, row.label) == (model, name)]
            cell = _best(group)
            cells = [model or "", units.optimizer_name(name), "-", "-", "", "none ended", "", f"0/{len(group)}"]
            loss = math.inf
            if cell is not None:
                best = next(row for row in group if row.run is cell[0])
                loss = sum(math.log(run.perplexity) for run in cell) / len(cell)
                cells = [
                    *cells[:2],
                    f"{best.lr:g}",
                    f"{best.adam_lr:g}",
                    best.other,
                    f"{loss:.4f}",
                    units.perplexity(math.exp(loss)),
                    f"{sum(row.state == 'ended' for row in group)}/{len(group)}",
                ]
            found.append((loss, cells))
        lines += [cells for _, cells in sorted(found, key=lambda pair: pair[0])]
    head = ("Model", "Method", "Matrix rate", "Adam rate", "Other settings", "Final loss", "Perplexity", "Ended")
    return _table(head, lines)


def run_table(rows: Sequence[Row]) -> str:
    """Every run, by model and method in order of rates."""
    lines = [
        [
            f"`{row.name}`",
            units.optimizer_name(row.label),
            _number(row.lr),
            _number(row.adam_lr),
            row.other,
            "" if row.seed is None else str(row.seed),
            outcome(row),
            units.perplexity(math.exp(row.loss)) if row.state == "ended" else "",
        ]
        for row in ordered(rows)
    ]
    head = ("Run", "Method", "Matrix rate", "Adam rate", "Other settings", "Seed", "Final loss", "Perplexity")
    return _table(head, lines)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Without the column of other settings where there are none."""
    kept = [i for i, title in enumerate(head) if title != "Other settings" or any(line[i] for line in lines)]
    return markdown([head[i] for i in kept], [[line[i] for i in kept] for line in lines], left=2)


def outcome(row: Row) -> str:
    if row.state == "ended":
        return f"{row.loss:.4f}"
    if row.state == "missing":
        return "not run"
    where = {"diverged": "at step", "pruned": "at step", "not ended": "yet, step"}[row.state]
    return row.state if row.step is None else f"{row.state} {where} {row.step}"


def ordered(rows: Sequence[Row]) -> list[Row]:
    places = {key: i for i, key in enumerate((m, name) for m in models(rows) for name in labels(rows, m))}

    def place(row: Row) -> tuple[Any, ...]:
        rates = (math.inf if math.isnan(rate) else rate for rate in (row.lr, row.adam_lr))
        return places[row.model, row.label], *rates, row.seed or 0, row.name

    return sorted(rows, key=place)


def models(rows: Sequence[Row]) -> list[str | None]:
    return list(dict.fromkeys(row.model for row in rows))


def labels(rows: Sequence[Row], model: str | None) -> list[str]:
    return list(dict.fromkeys(row.label for row in rows if row.model == model))


def _counts(rows: Sequence[Row]) -> str:
    counts = Counter(row.state for row in rows)
    text = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    return f"{len(rows)} runs: {text}."


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:g}"


def _plain(row: Row) -> dict[str, Any]:
    """For CSV and JSON: numbers, text, and nothing where there is nothing."""
    summary = (row.run.summary if row.run else None) or {}
    values: dict[str, Any] = {
        "name": row.name,
        "model": row.model,
        "method": row.label,
        "optimizer": row.optimizer,
        "lr": row.lr,
        "adam_lr": row.adam_lr,
        "other": row.other,
        "seed": row.seed,
        "state": row.state,
        "step": row.step,
        "loss": row.loss,
        "perplexity": math.exp(row.loss),
        "wall_seconds": summary.get("wall_seconds"),
    }
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in values.items()}


# The figure -----------------------------------------------------------------------------------------------------------


def rates_figure(rows: Sequence[Row], out: Path, title: str) -> list[Path]:
    """Draw final loss against the rate of the matrices; nothing if no run has ended. A panel for each model; with more than
    `TOGETHER` methods, for each of them as well.

    A mark is a configuration, at the mean of its seeds; a line joins the best at each rate of a grid, and the large mark is
    the best of all. Marks at the upper edge are runs that diverged, were pruned, or lie above the axis.
    """
    shown = [model for model in models(rows) if any(row.state == "ended" and row.model == model for row in rows)]
    if not shown:
        return []
    names = list(dict.fromkeys(name for model in shown for name in labels(rows, model)))
    apart = len(names) > TOGETHER
    across = 6 if apart else len(shown)
    down = len(shown) * math.ceil(len(names) / 6) if apart else 1
    wide = style.WIDE if across > 1 else 6.0
    figure, rc = style.figure(wide, 0.9 + 1.25 * down if apart else 4.2)
    with rc:
        panels = figure.subplots(down, across, squeeze=False, sharex=apart)
        for i, model in enumerate(shown):
            here = [row for row in rows if row.model == model]
            if apart:
                rest = list(panels[i * down // len(shown) : (i + 1) * down // len(shown)].flat)
                for axes, name in zip(rest, names, strict=False):
                    _draw(axes, here, [name])
                    text = units.optimizer_name(name)
                    axes.set_title(text if len(shown) == 1 else f"{text}, {model}", fontsize=7.5)
                    axes.tick_params(labelsize=6.5)
                for axes in rest[len(names) :]:
                    axes.set_visible(False)
            else:
                _draw(panels[0, i], here, names)
                panels[0, i].set_title(f"{model}: final validation loss")
        what = "peak rate of the matrices (large mark: the best)" + _edge_note(panels.flat)
        if apart:
            figure.supxlabel(what, fontsize=8.5)
        else:
            for axes in panels.flat:
                axes.set_xlabel(what.replace("; at", "\nat"))
            handles, texts = panels[0, 0].get_legend_handles_labels()
            figure.legend(handles, texts, loc="outside lower center", ncols=min(len(texts), 4), handlelength=3.2)
        style.title(figure, f"{title}: final validation loss" if apart else title)
        return style.save_both(figure, out, "rates")


def _draw(axes: Axes, rows: Sequence[Row], names: Sequence[str]) -> None:
    """The named methods of one model; the axes serve all of its `rows`."""
    losses = sorted(row.loss for row in rows if row.state == "ended")
    # Single bad runs far above the others go to the edge instead of flattening everything.
    low, usual = losses[0], losses[int(0.9 * (len(losses) - 1))]
    top = min(losses[-1], usual + max(usual - low, 0.05))
    room = max(top - low, 0.02) * 0.08
    high = top + room
    for place, name in enumerate(names):
        group = [row for row in rows if row.label == name and not math.isnan(row.lr)]
        colour, marker = style.look(name, place)
        dash = style.LOOKS[name][1] if name in style.LOOKS else "-"
        cells: dict[tuple[float, float, str], list[float]] = {}
        for row in group:
            if row.state == "ended":
                cells.setdefault((row.lr, row.adam_lr, row.other), []).append(row.loss)
        points = [(rates[0], sum(values) / len(values)) for rates, values in cells.items()]
        inside = [(lr, loss) for lr, loss in points if loss <= high]
        axes.plot(*_columns(inside), marker, color=colour, markersize=4, alpha=0.55, markeredgewidth=0.6)
        if not any(TRIAL.search(row.name) for row in group):
            line = sorted((lr, min(y for x, y in inside if x == lr)) for lr in {lr for lr, _ in inside})
            axes.plot(*_columns(line), color=colour, linestyle=dash, marker=marker, markersize=5)
        best = _best(group)
        if best is not None:
            loss = sum(math.log(run.perplexity) for run in best) / len(best)
            size = 7 if len(names) == 1 else 10
            axes.plot(best[0].lr, loss, marker, color=colour, markersize=size, markeredgecolor="black", zorder=4)
        # An empty line for the legend, which shows dash and marker together
        axes.plot([], [], color=colour, linestyle=dash, marker=marker, markersize=6, label=units.optimizer_name(name))
        edge = [(row.state, row.lr) for row in group] + [("above", lr) for lr, loss in points if loss > high]
        for kind, lr in edge:
            if kind in _EDGE:
                mark: Any = {"marker": _EDGE[kind][0], "linestyle": "", "markersize": 7, "clip_on": False}
                axes.plot(lr, high, color=colour, zorder=5, gid=kind, **mark)
    axes.set_ylim(low - 2 * room, high)
    axes.set_xscale("log")
    _rate_ticks(axes, sorted({row.lr for row in rows if not math.isnan(row.lr)}), few=len(names) == 1)


def _best(group: Sequence[Row]) -> list[Run] | None:
    """The runs of the best settings, one for each seed; settings of which a seed diverged are the last to be chosen."""
    cells = []
    for other in dict.fromkeys(row.other for row in group):
        here = [row for row in group if row.other == other and row.run and row.state in ("ended", "diverged")]
        if any(row.state == "ended" for row in here):
            runs = [row.run for row in here if row.run]
            cell = best_cell(runs)
            cells.append((selection_perplexity(cell, runs), cell))
    best = min(cells, key=lambda pair: pair[0], default=None)
    return best[1] if best and math.isfinite(best[0]) else None


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


# Matplotlib's marker, and what it says
_EDGE = {
    "diverged": ("x", "× diverged"),
    "pruned": ("|", "| pruned"),
    "above": (r"$\uparrow$", "↑ above the axis"),
}


def _edge_note(panels: Iterable[Axes]) -> str:
    """What the marks at the upper edges mean, if there are any."""
    used = {line.get_gid() for axes in panels for line in axes.lines}
    notes = [text for kind, (_, text) in _EDGE.items() if kind in used]
    return f"; at the upper edge: {', '.join(notes)}" if notes else ""


def _rate_ticks(axes: Axes, rates: Sequence[float], few: bool) -> None:
    """1, 2, 5 of each power of ten, or 1 alone where there is little room."""
    from matplotlib.ticker import FixedLocator, NullLocator

    low, high = rates[0] / 1.4, rates[-1] * 1.4
    axes.set_xlim(low, high)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10.0**power for power, step in product(powers, steps) if low <= step * 10.0**power <= high]
        if len(ticks) <= (3 if few else 8):
            break
    ticks = ticks[:: math.ceil(len(ticks) / 3)] if few else ticks
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
