"""docs/scaling.md: the records of scripts/scaling.py and its prediction as tables and a figure.

load("results/scaling")                 the measured lines
fill(page, tables(lines, predicted))    the page with its tables written again
draw(predicted["times"], "results/figures")
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import style, units
from .text import NOT_RUN, markdown

FORMAT = 1  # of the records
MODELS = ("llama_tiny", "llama_60m")
METHODS = ("adam", "racs", "alice", "galore", "muon", "soap")
NAMES = {"llama_1b": "1.3B", "llama_7b": "7B"}
MEASURED = {1: ("replicated",), 2: ("replicated", "ddp", "fsdp2"), 4: ("replicated", "ddp", "fsdp2")}
PREDICTED = ("replicated", "all", "node", "fsdp2", "hsdp")
OWNERS = ("replicated", "node", "all")  # what DDP can do, the simplest first

Line = dict[str, Any]
Lines = dict[tuple[str, int, str], Line]


def load(folder: str | Path) -> Lines:
    """(model, processes, method) -> line, with the settings of its record.

    Raises:
        ValueError: no folder, a file that is no such record, or two of the same line.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is not a folder: name the one that holds the records.")
    found: Lines = {}
    for path in sorted(Path(folder).glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            known = record["format"] == FORMAT and record["kind"] == "scaling"
            lines = [((s := record["settings"])["model"], s["processes"], x["name"], x) for x in record["contestants"]]
        except (ValueError, KeyError, TypeError):
            known = False
        if not known:
            raise ValueError(f"{path} is not a record of scripts/scaling.py: measure again, or remove it.")
        for model, processes, name, line in lines:
            if (model, processes, name) in found:
                raise ValueError(
                    f"{path} has {name} of {model} on {processes} processes, as another record: remove one."
                )
            found[model, processes, name] = {**line, "settings": record["settings"]}
    return found


def fill(page: str, tables: Mapping[str, str]) -> str:
    """The page with each table between its marks, ``<!-- table: name -->`` and ``<!-- end -->``.

    Raises:
        ValueError: a table without marks, or marks without a table.
    """
    marked = re.findall(r"<!-- table: (\w+) -->", page)
    if sorted(marked) != sorted(tables):
        odd = sorted({*marked} ^ {*tables}) or sorted(marked)
        raise ValueError(f"the page must have the marks of each table once, and {odd[0]} is not so: correct the page.")
    for name, table in tables.items():
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        page = re.sub(pattern, lambda found, table=table: f"{found[1]}{table}\n{found[2]}", page, flags=re.DOTALL)  # type: ignore[misc]
    return page


def tables(lines: Lines, predicted: Mapping[str, Any]) -> dict[str, str]:
    """Name -> Markdown."""
    return {
        "messages": messages(lines),
        "steps": times(lines, "step_ms"),
        "refreshes": times(lines, "refresh_ms"),
        "travel": travel(lines),
        "adam_group": adam_group(lines),
        "constants": markdown(["Constant, source", "A100", "H100"], _constants(predicted["constants"])),
        "division": division(predicted["division"]),
        "alice": parts(predicted["times"], predicted["steps"]),
        "methods": methods(predicted["times"]),
        "best": best(predicted["times"]),
        "states": states(predicted["states"]),
    }


# Measured -------------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> str:
    """Median and quartiles; how many values, if fewer than ten."""
    middle = statistics.median(values)
    first, _, third = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [middle] * 3
    few = "" if len(values) >= 10 else f", {len(values)} times"
    return f"{ms(middle)} ({ms(first)} to {ms(third)}{few})"


def ms(value: float) -> str:
    """Three significant digits, all digits before the point."""
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"


def messages(lines: Lines) -> str:
    """What a step sends: the same for every method that wants whole matrices."""
    rows = []
    for model in MODELS:
        for processes in (2, 4):
            for layout in ("ddp", "fsdp2"):
                some = [
                    line[layout]
                    for (of, n, name), line in lines.items()
                    if (of, n) == (model, processes) and name in METHODS and line[layout]["calls"]
                ]
                if not some:
                    rows.append([model, str(processes), layout, *[NOT_RUN] * 4])
                    continue
                counts = {
                    (x["calls"], max(x["sent_bytes"]), max(x["received_bytes"]), sum(x["sent_bytes"])) for x in some
                }
                if len(counts) > 1:
                    raise ValueError(
                        f"methods on {model} and {processes} processes send different messages: measure again."
                    )
                calls, *sizes = counts.pop()
                kind = "broadcasts" if layout == "ddp" else "all-to-alls"
                rows.append([model, str(processes), layout, f"{calls} {kind}", *map(mb, sizes)])
    head = ["Model", "Processes", "Layout", "A step", "A rank sends, MB", "receives, MB", "All ranks send, MB"]
    return markdown(head, rows, left=4)


def mb(size: float) -> str:
    return f"{size / 1e6:,.1f}"


def times(lines: Lines, key: str) -> str:
    """Times of a step by method, processes and layout; of refreshes, only where there are some."""
    rows = []
    for model in MODELS:
        for method in METHODS:
            there = [lines.get((model, processes, method)) for processes in MEASURED]
            if not any(line and key in line["replicated"] for line in there) and key != "step_ms":
                continue
            cells = [
                spread(line[layout][key]) if line else NOT_RUN
                for line, layouts in zip(there, MEASURED.values(), strict=True)
                for layout in layouts
            ]
            rows.append([model, units.optimizer_name(method), *cells])
    head = ["Model", "Method", "1 process"]
    head += [f"{n}, {layout}" for n in (2, 4) for layout in ("replicated", "DDP owners", "FSDP2")]
    return markdown(head, rows, left=2)


def travel(lines: Lines) -> str:
    """Messages alone, and the part of a step's that vanishes behind products."""
    rows = []
    for model in MODELS:
        for processes in (2, 4):
            some = [line for (of, n, name), line in lines.items() if (of, n) == (model, processes) and name in METHODS]
            if not some:
                rows.append([model, str(processes), *[NOT_RUN] * 3])
                continue
            ddp = [statistics.median(line["ddp"]["travel_ms"]) for line in some]
            fsdp2 = [statistics.median(line["fsdp2"]["travel_ms"]) for line in some if "travel_ms" in line["fsdp2"]]
            hidden = [overlapped(line["ddp"]) for line in some]
            rows.append(
                [model, str(processes), over(ddp, ms), over(fsdp2, ms), over(hidden, lambda x: f"{100 * x:.0f} %")]
            )
    head = ["Model", "Processes", "DDP: broadcasts, ms", "FSDP2: all-to-alls, ms", "DDP: hidden behind products"]
    return markdown(head, rows, left=2)


def over(values: Sequence[float], text: Any) -> str:
    """Median over methods, and the least and the most."""
    return f"{text(statistics.median(values))} ({text(min(values))} to {text(max(values))})" if values else NOT_RUN


def overlapped(line: Mapping[str, Any]) -> float:
    """The part of the messages' time that a step, with products after it, gains by sending in the background."""
    middle = {key: statistics.median(line[f"{key}_ms"]) for key in ("step", "travel", "products", "overlapped")}
    return (middle["step"] + middle["products"] - middle["overlapped"]) / middle["travel"]


def adam_group(lines: Lines) -> str:
    """The Adam group of DDP, replicated and divided."""
    rows = []
    for model in MODELS:
        for processes in (2, 4):
            line = lines.get((model, processes, "adam_group"))
            if line is None:
                rows.append([model, str(processes), *[NOT_RUN] * 5])
                continue
            sent = max(line["zero"]["received_bytes"])
            rows.append(
                [
                    model,
                    str(processes),
                    *(spread(line[key]["step_ms"]) for key in ("replicated", "zero", "owners")),
                    mb(sent),
                    f"{mb(max(line['replicated']['state_bytes']))} / {mb(max(line['zero']['state_bytes']))}",
                ]
            )
    head = [
        "Model", "Processes", "Replicated, ms", "ZeroRedundancyOptimizer, ms", "`shard`, ms", "A rank receives, MB",
        "State of a rank, replicated / divided, MB",
    ]  # fmt: skip
    return markdown(head, rows, left=2)


def _constants(rows: Iterable[Sequence[str]]) -> list[list[str]]:
    return [[f"{label} ({source})", *values] for label, *values, source in rows]


# Predicted ------------------------------------------------------------------------------------------------------------


def division(rows: Iterable[Mapping[str, Any]]) -> str:
    body = [
        [
            f"{NAMES[row['model']]} ({row['matrices']} matrices)",
            str(row["ranks"]),
            f"{row['speedup']:.1f}",
            f"{row['largest']:.2f}",
            str(row["idle"]),
            str(3 * row["rounds"]),
        ]
        for row in rows
    ]
    return markdown(
        ["Model", "Ranks", "Work divided by", "Largest load / mean", "Ranks without a matrix", "All-to-alls of FSDP2"],
        body,
    )


def parts(times: Iterable[Mapping[str, Any]], steps: Iterable[Mapping[str, Any]]) -> str:
    """Alice's step in parts."""
    alice = {(row["model"], row["gpu"], row["ranks"]): row for row in times if row["method"] == "alice"}
    body = []
    for step in steps:
        row = alice[step["model"], step["gpu"], step["ranks"]]
        if step["ranks"] not in (8, 64, 512):
            continue
        least = min(row[layout] for layout in OWNERS)
        whole = step["forward_backward"] + step["gradients"]
        body.append(
            [
                f"{NAMES[step['model']]}, {step['ranks']} {step['gpu']}",
                *(ms(step[key]) for key in ("forward_backward", "gradients", "gathers")),
                *(ms(row[layout]) for layout in PREDICTED),
                f"{100 * row['replicated'] / (whole + row['replicated']):.0f} % / {100 * least / (whole + least):.0f} %",
            ]
        )
    head = [
        "Prediction, ms", "Forward, backward", "Gradients, beyond it", "FSDP2's gathers, beyond it", "Alice replicated",
        "all ranks", "node", "FSDP2", "HSDP", "Part of a DDP step, replicated / best",
    ]  # fmt: skip
    return markdown(head, body)


def methods(times: Sequence[Mapping[str, Any]], ranks: int = 64) -> str:
    """Every method on so many GPUs of both kinds."""
    body = []
    for model in NAMES:
        for method in METHODS:
            pair = [r for r in times if (r["model"], r["method"], r["ranks"]) == (model, method, ranks)]
            body.append(
                [
                    NAMES[model],
                    units.optimizer_name(method),
                    *(" / ".join(ms(r[layout]) for r in pair) for layout in PREDICTED),
                ]
            )
    head = ["Model", f"{ranks} GPUs, A100 / H100, ms", "replicated", "all ranks", "node", "FSDP2", "HSDP"]
    return markdown(head, body, left=2)


def best(times: Sequence[Mapping[str, Any]]) -> str:
    """DDP's best layout; a star where one of the doubts has another."""
    counts = sorted({row["ranks"] for row in times} - {8})
    body = []
    for model in NAMES:
        for method in METHODS:
            own = [row for row in times if (row["model"], row["method"]) == (model, method)]
            cells = [" / ".join(dict.fromkeys(_best(row) for row in own if row["ranks"] == ranks)) for ranks in counts]
            stops = [
                _stops([row for row in own if row["gpu"] == gpu]) for gpu in dict.fromkeys(row["gpu"] for row in own)
            ]
            body.append([NAMES[model], units.optimizer_name(method), *cells, " / ".join(stops)])
    head = ["Model", "Method, A100 / H100", *(f"{n} GPUs" for n in counts), "all slower than replicated from"]
    return markdown(head, body, left=2)


def _best(row: Mapping[str, Any]) -> str:
    found = min(OWNERS, key=row.__getitem__)
    doubts = [dict(zip(PREDICTED, values, strict=True)) for values in row["doubt"]]
    return found + ("*" if any(min(OWNERS, key=doubt.__getitem__) != found for doubt in doubts) else "")


def _stops(rows: Iterable[Mapping[str, Any]]) -> str:
    """The first number of GPUs on which owners among all take longer than everybody doing everything."""
    slower = [row["ranks"] for row in rows if row["all"] > row["replicated"]]
    return str(min(slower)) if slower else "never"


def states(rows: Iterable[Mapping[str, Any]]) -> str:
    columns = ("replicated_8", "node_8", "all_64", "all_512", "fsdp2_64", "fsdp2_512")
    body = [
        [NAMES[row["model"]], units.optimizer_name(row["method"]), *(f"{row[key] / 2**30:.2f}" for key in columns)]
        for row in rows
    ]
    head = [
        "Model",
        "GiB of the fullest rank",
        "replicated",
        "node",
        "64 ranks",
        "512 ranks",
        "FSDP2, 64",
        "FSDP2, 512",
    ]
    return markdown(head, body, left=2)


# Figure ---------------------------------------------------------------------------------------------------------------

_SHOWN = ("racs", "alice", "muon", "soap")
# Colour, dash and marker, so that black and white do
_LINES = {
    "replicated": ("replicated on every rank", style.GREY, (0, (1, 1.2)), "s"),
    "all": ("owners among all ranks", style.BLUE, "-", "o"),
    "node": ("owners within a node", style.VERMILION, (0, (5, 1.5)), "^"),
    "fsdp2": ("FSDP2", style.GREEN, (0, (3, 1.2, 1, 1.2)), "D"),
}


def draw(times: Sequence[Mapping[str, Any]], folder: str | Path, gpu: str = "A100") -> list[Path]:
    """`folder`/scaling.png and .svg: the optimizer's step by number of GPUs, methods side by side, a row for each model.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, rc = style.figure(style.WIDE, 4.8)
    with rc:
        grid = figure.subplots(len(NAMES), len(_SHOWN), sharex=True)
        for axes_row, (model, size) in zip(grid.tolist(), NAMES.items(), strict=True):
            for axes, method in zip(axes_row, _SHOWN, strict=True):
                rows = [r for r in times if (r["model"], r["method"], r["gpu"]) == (model, method, gpu)]
                for layout, (label, colour, dash, marker) in _LINES.items():
                    values = [row[layout] for row in rows]
                    axes.plot(
                        [row["ranks"] for row in rows], values, color=colour, linestyle=dash, marker=marker,
                        markersize=3.5, linewidth=1.3, label=label,
                    )  # fmt: skip
                every = [row[layout] for row in rows for layout in _LINES]
                axes.set_xscale("log", base=2)
                style.log_axis(axes, min(every) * 0.8, max(every) * 1.25)
                ranks = [row["ranks"] for row in rows]
                axes.set_xticks(ranks[::2], [str(n) for n in ranks[::2]])
                axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
                axes.set_title(f"{units.optimizer_name(method)}, {size}")
                if axes is axes_row[0]:
                    axes.set_ylabel("ms a step")
                if axes in grid[-1]:
                    axes.set_xlabel(f"{gpu} GPUs")
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        style.title(figure, "Prediction, not measured: the optimizer's part of a step, messages and refreshes included")
        return style.save_both(figure, Path(folder), "scaling")
