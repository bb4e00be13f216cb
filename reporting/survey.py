"""All optimizers on one task: one row each, from a sweep's records and from speeds measured apart from it.

    speed = load_speed("results/runs/all/speed.json")      written by scripts/benchmark_optimizers.py; None if absent
    survey_table(find_runs("results/runs/all"), speed)
    survey_figure(find_runs("results/runs/all"), "results/figures/all.png", speed)

`expected` maps every optimizer that the sweep is to hold to its number of pairs of rates. One that has not run keeps its row.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import style, units
from .records import Run
from .summary import Rates, best_cell, by_optimizer, cells, findings, grid_table, selection_perplexity

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SPEED_FORMAT = 1  # of speed.json

# As docs/optimizers.md groups them, with colours of their own: they are no methods.
FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "the paper's own": (style.BLUE, ("racs", "racs_no_ema", "alice", "alice_0", "eigen_adam")),
    "our experiment": (style.ORANGE, ("low_rank_soap",)),
    "low-rank relatives": (
        style.VERMILION,
        ("galore", "galore_8bit", "fira", "fira_plus", "apollo", "apollo_mini", "apollo_svd"),
    ),
    "block-diagonal, normalizing": (
        style.GREEN,
        ("normalization", "whitening", "swan", "muon", "muon_paper", "lars", "lamb"),
    ),
    "Kronecker and eigenspace": (style.PINK, ("shampoo", "soap", "soap_factored")),
    "element-wise": (
        style.DARK,
        ("sgd", "adam", "adamw", "adam_8bit", "adam_mini", "adafactor", "lion", "signum", "sophia_g", "sophia_h"),
    ),
}
_OTHER = ("other", style.OLIVE)

_COLUMNS = (
    ("Optimizer", ":--"),
    ("Matrix rate", "--:"),
    ("Adam rate", "--:"),
    ("Perplexity", "--:"),
    ("Worst pair", "--:"),
    ("{state}", "--:"),
    ("/ Adam's", "--:"),
    ("Optimizer ms", "--:"),
    ("Refresh ms", "--:"),
    ("Tokens/s", "--:"),
)


@dataclass(frozen=True)
class Entry:
    """What is known of one optimizer.

    Attributes:
        pairs: (matrix rate, Adam rate) -> perplexity, infinite for a diverged run; of those that have ended.
        best: the rates with the lowest perplexity; None if nothing has ended.
        expected: how many pairs there are to be, where known.
        state: bytes of optimizer states, of the matrices' or of all (`entries` says which).
        speed: its record in speed.json.
    """

    name: str
    pairs: dict[Rates, float]
    best: Rates | None
    expected: int | None
    state: int | None
    speed: Mapping[str, Any] | None

    @property
    def perplexity(self) -> float:
        """Of the best pair; NaN if none has ended."""
        return self.pairs[self.best] if self.best is not None else math.nan

    @property
    def family(self) -> tuple[str, str]:
        """Its name and colour."""
        return next(((title, look) for title, (look, names) in FAMILIES.items() if self.name in names), _OTHER)


def load_speed(path: str | Path) -> dict[str, Any] | None:
    """The record that scripts/benchmark_optimizers.py has written; None where there is none.

    Raises:
        ValueError: the file is something else, or of another version.
    """
    path = Path(path)
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        known = record["format"] == SPEED_FORMAT and isinstance(record["methods"], list)
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise ValueError(
            f"{path} is not a speed record of this version: measure again with scripts/benchmark_optimizers.py, or remove it."
        )
    return record


def entries(
    runs: Iterable[Run], speed: Mapping[str, Any] | None = None, expected: Mapping[str, int] | None = None
) -> tuple[list[Entry], str]:
    """Every optimizer, the lowest perplexity first and those not run last; and whose states the bytes are.

    The second value is "matrices" if the speed record knows every optimizer, else "all parameters", as runs record.
    """
    groups = by_optimizer(run for run in runs if not math.isnan(run.perplexity))
    speeds = {line["optimizer"]: line for line in (speed or {}).get("methods", [])}
    names = list(dict.fromkeys([*groups, *speeds, *(expected or {})]))
    of_matrices = bool(groups) and all("matrix_state_bytes" in speeds.get(name, {}) for name in groups)
    found = []
    for name in names:
        group = groups.get(name, [])
        best = best_cell(group) if group else []
        found.append(
            Entry(
                name,
                {rates: selection_perplexity(cell, group) for rates, cell in cells(group).items()},
                (best[0].lr, best[0].adam_lr) if best else None,
                (expected or {}).get(name),
                speeds.get(name, {}).get("matrix_state_bytes") if of_matrices else _all_states(group),
                speeds.get(name),
            )
        )
    found.sort(key=lambda entry: (math.isnan(entry.perplexity), entry.perplexity, units.optimizer_name(entry.name)))
    return found, "matrices" if of_matrices else "all parameters"


def _all_states(group: Sequence[Run]) -> int | None:
    sizes = ((run.summary or {}).get("optimizer_state_bytes") for run in group)
    return next((size for size in sizes if size), None)


def survey_table(
    runs: Iterable[Run], speed: Mapping[str, Any] | None = None, expected: Mapping[str, int] | None = None
) -> str:
    """Markdown table with a row for each optimizer, the lowest perplexity first."""
    rows, whose = entries(runs, speed, expected)
    reference = _adam_state(rows)
    lines = [
        "| " + " | ".join(title.format(state=f"State ({whose})") for title, _ in _COLUMNS) + " |",
        "|" + "|".join(mark for _, mark in _COLUMNS) + "|",
    ]
    lines += ["| " + " | ".join(_cells(entry, reference)) + " |" for entry in rows]
    return "\n".join(lines)


def _adam_state(rows: Iterable[Entry]) -> int | None:
    return next((entry.state for entry in rows if entry.name == "adam"), None)


def _cells(entry: Entry, reference: int | None) -> list[str]:
    missing = "not run"
    quality = [missing] * 4
    if entry.best is not None:
        worst = max(entry.pairs.values())
        quality = [f"{rate:g}" for rate in entry.best] + [units.perplexity(x) for x in (entry.perplexity, worst)]
    state = [missing, missing]
    if entry.state is not None:
        state = [units.size(entry.state), f"{entry.state / reference:.2f}" if reference else "unknown"]
    times = [missing] * 3
    if entry.speed is not None:
        refresh, interval = entry.speed["refresh_ms"], entry.speed["interval"]
        times = [
            _ms(entry.speed["optimizer_ms"]),
            "-" if refresh is None else f"{_ms(refresh)}, every {interval}",
            f"{entry.speed['tokens_per_second']:,.0f}",
        ]
    return [f"{units.optimizer_name(entry.name)} `{entry.name}`", *quality, *state, *times]


def _ms(value: float) -> str:
    """Three significant digits, all digits before the point."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(max(value, 0.1))))}f}" if value > 0 else "0"


def survey_remarks(
    runs: Iterable[Run], speed: Mapping[str, Any] | None = None, expected: Mapping[str, int] | None = None
) -> list[str]:
    """What stands behind the table and is in none of its cells: pairs that diverged or have not ended, how far the two rounds
    of the benchmark agree."""
    runs = list(runs)
    notes = []
    short = [
        f"{units.optimizer_name(entry.name)} ({len(entry.pairs)} of {entry.expected})"
        for entry in entries(runs, speed, expected)[0]
        if entry.expected is not None and len(entry.pairs) < entry.expected
    ]
    if short:
        notes.append(f"Not all pairs have ended: {', '.join(short)}.")
    diverged = [
        f"{units.optimizer_name(run.optimizer)} ({run.lr:g}, {run.adam_lr:g})"
        + (f" at step {run.diverged['step']}" if run.diverged and run.diverged.get("step") is not None else "")
        for run in sorted(runs, key=lambda run: (run.optimizer, run.lr, run.adam_lr))
        if math.isinf(run.perplexity)
    ]
    ended = sum(not math.isnan(run.perplexity) for run in runs)
    if diverged:
        notes.append(f"Diverged (matrix rate, Adam rate): {', '.join(diverged)}.")
    elif ended:
        notes.append(f"None of the {ended} runs diverged.")
    methods = (speed or {}).get("methods", [])
    if methods:
        notes.append(
            "Agreement of the benchmark's two rounds (medians, larger over smaller): "
            + "; ".join(
                f"{what} {statistics.median(ratios):.2f} for the usual optimizer, {max(ratios):.2f} at most ({worst})"
                for what, ratios, worst in _agreement(methods)
            )
            + "."
        )
    return notes


def _agreement(methods: Sequence[Mapping[str, Any]]) -> Iterable[tuple[str, list[float], str]]:
    for what, key in (("ordinary update", "step_ms"), ("forward and backward", "other_ms")):
        ratios = {}
        for method in methods:
            medians = [statistics.median(times[key]) for times in method["rounds"] if times[key]]
            if len(medians) > 1 and min(medians) > 0:
                ratios[method["optimizer"]] = max(medians) / min(medians)
        if ratios:
            yield what, list(ratios.values()), units.optimizer_name(max(ratios, key=ratios.__getitem__))


def survey_report(
    runs: Iterable[Run],
    speed: Mapping[str, Any] | None,
    expected: Mapping[str, int],
    figure: str,
    made: Iterable[tuple[str, str]],
) -> str:
    """The whole survey as Markdown.

    Args:
        figure: link to the picture.
        made: names and values for "How it was made".
    """
    runs = list(runs)
    steps = ", ".join(sorted({str(run.setting("trainer.steps")) for run in runs}))
    return "\n\n".join(
        [
            "# Every optimizer on the quickstart task",
            f"Validation perplexity after {steps} steps, each method at the best of its pairs of rates (of matrices, and of "
            f"everything else by Adam): {_pairs(expected)}.",
            survey_table(runs, speed, expected),
            f"![Perplexity, state and update time of every optimizer]({figure})",
            "*Worst pair*: the highest perplexity among the pairs. *State*: bytes of optimizer states, and their ratio to "
            "Adam's. *Optimizer ms*: mean time of an update over its interval of refreshes; *Refresh ms*: of an update that "
            "refreshes bases or estimates curvature. *Tokens/s*: of whole training steps.",
            "## What to make of it",
            "It shows how well each method trains from the start, at what price, and roughly where its rates lie. It does not "
            "rank methods: rates are few, all other settings are the recipes' (`configs/recipe`), and the first steps of a "
            "small model say little about long training of a large one.",
            _bullets([*findings(runs), *survey_remarks(runs, speed, expected)]),
            "## How it was made",
            _bullets(f"{name}: {value}" for name, value in made),
            "## Speeds",
            _speeds(speed),
            "## Every run",
            grid_table(runs),
        ]
    )


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _pairs(expected: Mapping[str, int]) -> str:
    """'4 pairs, 6 of Adam'."""
    counts = list(expected.values())
    usual = max(counts, key=counts.count)
    others = [f"{count} of {units.optimizer_name(name)}" for name, count in expected.items() if count != usual]
    return ", ".join([f"{usual} pairs", *others])


def _speeds(speed: Mapping[str, Any] | None) -> str:
    if speed is None:
        return (
            "Not measured yet: `python scripts/benchmark_optimizers.py` does it, on a machine with nothing else to do. The "
            "runs' own times are no measure where several of them shared a machine."
        )
    made, s = speed["environment"], speed["settings"]
    load = made.get("load_average_before")
    rows = [
        f"Command: `{made['command']}`",
        f"Task: {s['model']}, data {s['data']}, {s['tokens_per_step']:,} tokens a step, {s['precision']}",
        f"Hardware: {', '.join(f'{name} {value}' for name, value in made['hardware'].items())}",
        f"torch: {made['versions']['torch']}",
        f"Commit: {made['commit']}" + (" with uncommitted changes" if made.get("uncommitted_changes") else ""),
        f"Steps: {s['rounds']} rounds, the second in reverse order of methods; in each {s['warmup']} steps that do not count, "
        f"then {s['steps']} and at least two refreshes",
        *([] if load is None else [f"Load average of the machine before: {load:.2f}"]),
        f"Duration: {units.duration(s['seconds'])}",
    ]
    return (
        "Measured apart from the runs above, method by method; every step is in [speed.json](speed.json). The optimizer's time "
        "is the mean over an interval K: K - 1 ordinary updates and a refresh (medians of each), curvature estimates included. "
        f"Tokens/s adds the method's median of everything else in a step.\n\n{_bullets(rows)}"
    )


# The figure -----------------------------------------------------------------------------------------------------------


def survey_figure(
    runs: Iterable[Run],
    out: str | Path,
    speed: Mapping[str, Any] | None = None,
    expected: Mapping[str, int] | None = None,
) -> Path:
    """Draw a row for each optimizer, the lowest perplexity on top: perplexity, state, and time of an update.

    A large dot is the best pair of rates, small ones are the others; a mark at the right edge is a pair that diverged or lies
    beyond. The dashed lines are Adam's.

    Raises:
        ValueError: no run has ended.
        ImportError: matplotlib is not installed.
    """
    runs = list(runs)
    rows, whose = entries(runs, speed, expected)
    if all(entry.best is None for entry in rows):
        raise ValueError("None of these runs has ended, so there is nothing to draw: let at least one finish.")
    timed = any(entry.speed is not None for entry in rows)
    figure, rc = style.figure(9.0, 1.35 + 0.215 * len(rows))
    with rc:
        panels = figure.subplots(1, 3 if timed else 2, sharey=True, width_ratios=[2.3, 1, 1] if timed else [2.3, 1])
        _draw_perplexities(panels[0], rows)
        _draw_states(panels[1], rows, whose)
        if timed:
            _draw_times(panels[2], rows)
        panels[0].set_ylim(len(rows) - 0.1, -0.6)  # room for Adam's name below the last row
        panels[0].set_yticks(range(len(rows)), [_label(entry) for entry in rows])
        for tick, entry in zip(panels[0].get_yticklabels(), rows, strict=True):
            tick.set_color(entry.family[1])
        for panel in panels:
            panel.tick_params(axis="y", length=0)
            panel.grid(axis="x", which="minor", visible=False)
        some = next(run for run in runs if not math.isnan(run.perplexity))
        style.title(
            figure,
            f"{some.model}, data: {some.data}, {some.setting('trainer.steps')} steps, one seed, few rates: validation "
            "perplexity, lower is better",
        )
        used = {entry.family: None for entry in rows}
        order = {
            family: look
            for family, look in [*((f, c) for f, (c, _) in FAMILIES.items()), _OTHER]
            if (family, look) in used
        }
        handles = [
            panels[0].plot([], [], "o", color=look, markersize=6, label=family)[0] for family, look in order.items()
        ]
        figure.legend(
            handles=handles, loc="outside lower center", ncols=len(handles), columnspacing=1.4, handletextpad=0.1
        )
        path = style.save(figure, Path(out))
    return path


def _label(entry: Entry) -> str:
    return (
        f"{units.optimizer_name(entry.name)}  {'not run' if entry.best is None else units.perplexity(entry.perplexity)}"
    )


def _draw_perplexities(axes: Axes, rows: Sequence[Entry]) -> None:
    values = [x for entry in rows for x in entry.pairs.values() if math.isfinite(x)]
    bests = [entry.perplexity for entry in rows if math.isfinite(entry.perplexity)]
    if not values:  # every run diverged
        values = bests = [1.0, 10.0]
    # Single bad pairs far away go to the edge instead of flattening everything.
    low, usual = min(values) / 1.03, sorted(values)[int(0.95 * (len(values) - 1))]
    high = max(max(bests) * 1.05, min(max(values) * 1.05, usual * 1.1))
    _log_x(axes, low, high)
    for place, entry in enumerate(rows):
        look = entry.family[1]
        inside = [x for x in entry.pairs.values() if x <= high]
        if inside:
            axes.plot([min(inside), max(entry.pairs.values()) if len(inside) == len(entry.pairs) else high], [place] * 2,
                      color=look, linewidth=1.0, alpha=0.35, zorder=2)  # fmt: skip
        for rates, x in entry.pairs.items():
            if x > high:
                mark = "x" if math.isinf(x) else ">"
                axes.plot(high, place, mark, color=look, markersize=5, clip_on=False, zorder=4)
            elif rates == entry.best:
                axes.plot(x, place, "o", color=look, markersize=7.5, zorder=5)
            else:
                axes.plot(x, place, "o", color=look, markersize=3.6, alpha=0.55, markeredgewidth=0, zorder=3)
    _adam_line(axes, rows, lambda entry: entry.perplexity)
    axes.set_title("perplexity: best pair of rates, and the others (log scale)")


def _draw_states(axes: Axes, rows: Sequence[Entry], whose: str) -> None:
    reference = _adam_state(rows)
    unit = reference or 2**20
    for place, entry in enumerate(rows):
        if entry.state is not None:
            _stem(axes, place, 0, entry.state / unit, entry.family[1])
    axes.set_xlim(left=0)
    _adam_line(axes, rows, lambda entry: None if entry.state is None else entry.state / unit)
    axes.set_title(f"state of {whose} / Adam's" if reference else f"state of {whose}, MiB")


def _draw_times(axes: Axes, rows: Sequence[Entry]) -> None:
    times = {entry.name: float(entry.speed["optimizer_ms"]) for entry in rows if entry.speed is not None}
    low, high = min(times.values()) / 1.5, max(times.values()) * 1.3
    _log_x(axes, low, high)
    for place, entry in enumerate(rows):
        if entry.name in times:
            _stem(axes, place, low, times[entry.name], entry.family[1])
    _adam_line(axes, rows, lambda entry: times.get(entry.name))
    axes.set_title("optimizer ms per step (log)")


def _stem(axes: Axes, place: int, start: float, end: float, look: str) -> None:
    axes.plot([start, end], [place] * 2, color=look, linewidth=1.6, alpha=0.35, solid_capstyle="butt", zorder=2)
    axes.plot(end, place, "o", color=look, markersize=5, clip_on=False, zorder=3)


def _adam_line(axes: Axes, rows: Sequence[Entry], value: Any) -> None:
    x = next((value(entry) for entry in rows if entry.name == "adam"), None)
    if x is not None and math.isfinite(x):
        axes.axvline(x, color=style.GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        place = len(rows) - 0.15
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axes.text(x, place, "Adam", fontsize=7, color=style.GREY, ha="center", va="bottom", bbox=box, zorder=6)


def _log_x(axes: Axes, low: float, high: float) -> None:
    """A logarithmic x axis from `low` to `high` with four to eight round numbers."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set_xscale("log")
    axes.set_xlim(low, high)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for steps in (
        (1,),
        (1, 3),
        (1, 2, 5),
        (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8),
        tuple(k / 20 for k in range(20, 200)),
        tuple(k / 100 for k in range(100, 1000)),
    ):
        ticks = [step * 10.0**power for power, step in product(powers, steps) if low <= step * 10.0**power <= high]
        if len(ticks) >= 4:
            break
    axes.xaxis.set_major_locator(FixedLocator(ticks[:: math.ceil(len(ticks) / 8)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
