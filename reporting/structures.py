"""Structures of the Fisher matrix, measured: the tables and the picture of results/fisher, from its record alone."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .units import optimizer_name

RECORD_FORMAT = 1
TYPES = ("q", "k", "v", "o", "gate", "up", "down")
KINDS = ("sequences", "batches")
# (special, general) by Appendix E.1: how often does the general closed form come out worse?
ORDER = (
    ("Scalar", "Normalization"),
    ("Scalar", "Whitening"),
    ("Normalization", "TwoSidedScaling"),
    ("TwoSidedScaling", "Diagonal"),
    ("TwoSidedScaling", "ScaledWhitening"),
    ("Whitening", "ScaledWhitening"),
    ("Whitening", "EigenAdam"),
    ("ScaledWhitening", "EigenAdam"),
    ("Diagonal", "EigenAdam"),
    ("EigenAdam", "BlockDiagonal"),
    ("EigenAdam", "SOAP"),
    ("Diagonal", "SOAP"),
    ("Shampoo", "SOAP"),
    ("NearestKronecker", "SOAP"),
    ("Shampoo", "NearestKronecker"),
)
TIE = 1e-4  # relative differences of what is captured below this are ties: float32, and fixed points stopped early


@dataclass(frozen=True)
class Row:
    """A structure, as a row of the tables: its name in the record, its formula, and the optimizer that uses it."""

    name: str
    formula: str
    optimizer: str | None


# Records --------------------------------------------------------------------------------------------------------------


def read_record(path: Path) -> dict[str, Any]:
    """The record of an earlier measurement.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or of another format.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no {path}: measure first, without --from-records.") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: restore it, or measure again.") from error
    if not isinstance(record, dict) or record.get("format") != RECORD_FORMAT:
        raise ValueError(f"{path} was written by another version: measure again.")
    return record


# The report -----------------------------------------------------------------------------------------------------------


def digits(x: float) -> str:
    """Errors near to 1 differ in the fourth digit, far ones in the first."""
    return f"{x:.4f}" if x < 10 else f"{x:.0f}"


def spread(errors: Sequence[float]) -> str:
    """Median and range, '0.9123 (0.8500 to 0.9900)'; '-' without values."""
    if not errors:
        return "-"
    return f"{middle(errors)} ({digits(min(errors))} to {digits(max(errors))})"


def middle(errors: Sequence[float]) -> str:
    return digits(statistics.median(errors)) if errors else "-"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def captured(record: dict[str, Any], measure: str = "captured", **where: Any) -> dict[str, list[float]]:
    """A measure by structure, of the lines that agree with ``where``; cases come in the same order for all."""
    found: dict[str, list[float]] = defaultdict(list)
    for line in record["errors"]:
        if all(line[key] == value for key, value in where.items()):
            found[line["structure"]].append(line[measure])
    return found


def errors(record: dict[str, Any], measure: str = "captured", **where: Any) -> dict[str, list[float]]:
    """One minus :func:`captured`."""
    return {name: [1 - x for x in values] for name, values in captured(record, measure, **where).items()}


def prices(record: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """For each optimizer, over the seven matrices of one block: state elements, their ratio to mn, ms of a step."""
    sizes = {line["layer"]: line["shape"][0] * line["shape"][1] for line in record["errors"]}
    found: dict[str, tuple[float, float, float]] = {}
    for name in {line["optimizer"] for line in record["timings"]}:
        lines = [line for line in record["timings"] if line["optimizer"] == name]
        state = sum(line["state"] for line in lines)
        found[name] = state, state / sum(sizes[line["layer"]] for line in lines), sum(line["ms"] for line in lines)
    return found


def label(r: Row) -> str:
    return r.formula + (f" ({r.name.partition(', ')[2]} basis)" if ", " in r.name else "")


def main_table(record: dict[str, Any], rows: Sequence[Row]) -> str:
    """Structure, optimizer, error on the samples of both kinds, state and time."""
    cost = prices(record)
    columns = [errors(record, kind=kind) for kind in KINDS]
    lines = []
    for r in rows:
        state, ratio, ms = cost.get(r.optimizer or "", (None, None, None))
        lines.append(
            [
                label(r),
                optimizer_name(r.optimizer) if r.optimizer else "-",
                *(spread(column.get(r.name, [])) for column in columns),
                "-" if state is None else f"{state:,.0f}",
                "-" if ratio is None else f"{ratio:.3f}",
                "-" if ms is None else f"{ms:.2f}",
            ]
        )
    head = ["structure", "optimizer", *(f"error, {kind}" for kind in KINDS)]
    return table([*head, "state elements", "state / mn", "ms per step"], lines)


def scale_table(record: dict[str, Any], rows: Sequence[Row]) -> str:
    """Errors of the best multiple of F~, and what is captured relative to general blocks (medians)."""
    columns = [errors(record, measure, kind=kind) for kind in KINDS for measure in ("rescaled", "held_out")]
    lines = []
    for r in rows:
        ratios = []
        for kind in KINDS:
            values = captured(record, kind=kind)
            pairs = zip(values.get(r.name, []), values.get("BlockDiagonal", []), strict=True)
            shares = [x / blocks for x, blocks in pairs if blocks > 0]
            ratios.append(f"{statistics.median(shares):.3f}" if shares else "-")
        lines.append([r.name, *(middle(column.get(r.name, [])) for column in columns), *ratios])
    head = [f"{kind}, {which}" for kind in KINDS for which in ("same samples", "held out")]
    return table(["structure", *head, *(f"captured / blocks, {kind}" for kind in KINDS)], lines)


def layer_table(record: dict[str, Any], rows: Sequence[Row], kind: str) -> str:
    columns = [errors(record, kind=kind, layer=layer) for layer in TYPES]
    return table(["structure", *TYPES], ([r.name, *(middle(c.get(r.name, [])) for c in columns)] for r in rows))


def time_table(record: dict[str, Any], rows: Sequence[Row]) -> str:
    cells = {(line["optimizer"], line["layer"]): line for line in record["timings"]}
    lines = []
    for r in rows:
        some = [cells.get((r.optimizer, layer)) for layer in TYPES]
        if any(some):
            interval = next(line["interval"] for line in some if line)
            lines.append(
                [
                    optimizer_name(r.optimizer or ""),
                    *(f"{line['ms']:.2f}" if line else "-" for line in some),
                    f"{sum(line['refresh_ms'] for line in some if line):.1f}" if interval > 1 else "-",
                    str(interval) if interval > 1 else "-",
                ]
            )
    return table(["optimizer", *TYPES, "refresh, all seven", "refreshed every"], lines)


def worse(record: dict[str, Any], special: str, general: str, kind: str, measure: str) -> tuple[int, int]:
    """In how many cases, of how many, the general structure's fit captures less than the special one's."""
    values = captured(record, measure, kind=kind)
    pairs = list(zip(values[special], values[general], strict=True))
    return sum(b < a - TIE * abs(a) for a, b in pairs), len(pairs)


def order_table(record: dict[str, Any]) -> str:
    columns = [(kind, measure) for kind in KINDS for measure in ("captured", "held_out")]
    lines = []
    for special, general in ORDER:
        cells = [worse(record, special, general, *column) for column in columns]
        if all(total for _, total in cells):
            lines.append([special, general, *(f"{count} of {total}" for count, total in cells)])
    head = [kind + (", held out" if measure == "held_out" else "") for kind, measure in columns]
    return table(["special", "general", *head], lines)


def headline(record: dict[str, Any]) -> str:
    found = [worse(record, "Diagonal", "EigenAdam", kind, "captured") for kind in KINDS]
    if not any(count for count, _ in found):
        cases = " and ".join(f"{total} cases with {kind}" for kind, (_, total) in zip(KINDS, found, strict=True))
        return (
            "Eigen-Adam's structure contains Adam's; its one refinement (Theorem 3.2) need not find the best member, and in "
            f"{cases} was never worse than Adam's diagonal."
        )
    parts = [
        f"{count} of {total} cases ({count / max(total, 1):.0%}) with {kind}"
        for kind, (count, total) in zip(KINDS, found, strict=True)
    ]
    return (
        "Eigen-Adam's structure contains Adam's, but its one refinement (Theorem 3.2) does not find the best member: it "
        f"approximates worse than Adam's diagonal in {' and in '.join(parts)}."
    )


def report(record: dict[str, Any], rows: Sequence[Row]) -> str:
    """README.md, with the structures in the order of ``rows``."""
    s = record["settings"]
    n = s["samples"]
    return "\n\n".join(
        [
            "# Structured approximations of the Fisher matrix, measured",
            "Table 1 of arXiv 2502.07752 with measured columns. Error: |F - F~|² / |F|² in the Frobenius norm, 0 is exact; "
            "median, and smallest to largest, over matrices and moments. State and time: of the optimizer, summed over the "
            "seven matrices of one block; mn is their number of weights.",
            main_table(record, rows),
            headline(record),
            "![Error, state and time of each structure](fisher.png)",
            "## What was measured",
            f"F is the empirical Fisher matrix E[vec(G) vec(G)ᵀ] of one weight matrix over N = {n} gradients, so its rank is "
            f"at most {n}. *sequences*: gradients of single sequences of {s['length']} tokens at fixed weights. *batches*: "
            f"gradients of {n} successive training steps of {s['batch_size']} sequences, while the weights move.",
            f"GaLore and Alice have rank {s['rank']}, in the rows of square matrices. The switched basis has "
            f"{s['leading']} leading eigenvectors and the rest from the complement (Algorithm 2), the leading basis "
            "eigenvectors only. The nearest R ⊗ L is no optimizer: it shows what Shampoo's structure could reach. I ⊗ M is "
            "also the structure of Muon and SWAN.",
            "## Up to scale, and on other gradients",
            "A learning rate makes up for the size of F~. Here the error is that of the best multiple of F~ (one minus the "
            f"squared cosine of F and F~), medians. *held out*: F~ is fitted to the same {n} gradients, and F is that of "
            f"{n} others (*batches*: of the steps that follow), as an optimizer uses it. *captured / blocks*: one minus the "
            "error of the main table, relative to that of the best block-diagonal F~, which is all that structures without "
            "correlations between columns can capture.",
            scale_table(record, rows),
            "## Does a more general structure approximate better?",
            "In how many cases the fit of the general structure is worse than that of the special one which it contains "
            "(Appendix E.1), held out: up to scale. For exact minimisers it never is; those of EigenAdam, SOAP and Shampoo "
            "are not exact, and held out even exact ones need not keep the order.",
            order_table(record),
            *(
                part
                for kind in KINDS
                for part in (f"## Error by layer, {kind} (medians)", layer_table(record, rows, kind))
            ),
            "## Milliseconds of an optimizer step",
            "One matrix, float32, median of several steps; refreshes of bases are included with their share. Each optimizer "
            "refreshes as often as its defaults say.",
            time_table(record, rows),
            "## How it was made",
            "\n".join(f"- {key}: {value}" for key, value in circumstances(record).items()),
        ]
    )


def circumstances(record: dict[str, Any]) -> dict[str, Any]:
    s, env = record["settings"], record["environment"]
    return {
        "Command": f"`python scripts/{env['command']}`",
        "Model": f"{s['model']}, trained by {optimizer_name(s['optimizer'])} for {s['steps']} steps, float32",
        "Data": f"{s['data']['name']}, {s['data']['split']}",
        "Moments": ", ".join(map(str, s["moments"])) + " (steps)",
        "Matrices": f"{', '.join(TYPES)} of blocks {', '.join(map(str, s['blocks']))}",
        "Seed": s["seed"],
        "Hardware": ", ".join(f"{key} {value}" for key, value in env["hardware"].items()),
        "torch": env["versions"]["torch"],
        "Commit": env["commit"],
        "Duration": f"{s['seconds']} s",
    }


def short(x: float) -> str:
    return f"{x:.0f}" if x >= 10 else f"{x:.2g}"


def draw(record: dict[str, Any], rows: Sequence[Row], path: Path) -> None:
    """Three panels that share the structures: errors, state and time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.9), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3, sharey=True, width_ratios=[2.4, 1, 1])
    places = {r.name: len(rows) - i for i, r in enumerate(rows)}
    looks = {"sequences": ("#0072B2", 0.17), "batches": ("#D55E00", -0.17)}
    floor = 1e-6  # of the logarithmic axis; what captures nothing is drawn there
    for kind, (colour, aside) in looks.items():
        for name, values in captured(record, kind=kind).items():
            ends = [max(floor, x) for x in (min(values), max(values))]
            axes[0].plot(ends, [places[name] + aside] * 2, color=colour, alpha=0.35, linewidth=3)
        for measure, face in (("captured", colour), ("held_out", "white")):
            medians = {name: statistics.median(x) for name, x in captured(record, measure, kind=kind).items()}
            axes[0].plot(
                [max(floor, x) for x in medians.values()],
                [places[name] + aside for name in medians],
                "o",
                color=colour,
                markerfacecolor=face,
                markersize=5,
                label=kind if measure == "captured" else f"{kind}, held out, best scale",
            )
    axes[0].set_xscale("log")
    axes[0].set_xlim(right=1.3)
    axes[0].set_title("captured part of |F|²: 1 - error (line: range)", fontsize=9, loc="left")
    axes[0].legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=2, fontsize=7.5, frameon=False)
    axes[0].set_yticks(list(places.values()), list(places), fontsize=8)
    cost = prices(record)
    for r in rows:
        if r.optimizer in cost:
            _, ratio, ms = cost[r.optimizer]
            for panel, value in ((axes[1], ratio), (axes[2], ms)):
                panel.barh(places[r.name], value, height=0.55, color="#56B4E9")
                panel.annotate(
                    f" {short(value)} {optimizer_name(r.optimizer)}", (value, places[r.name]), va="center", fontsize=7
                )
    axes[1].set_title("state / mn", fontsize=9, loc="left")
    axes[2].set_title("ms per step, one block", fontsize=9, loc="left")
    axes[1].set_xlim(0, 1.9 * max((ratio for _, ratio, _ in cost.values()), default=1.0) + 0.01)
    axes[2].set_xscale("log")
    if cost:
        times = [ms for *_, ms in cost.values()]
        axes[2].set_xlim(min(times) / 2, max(times) * 30)
    for panel in axes:
        panel.tick_params(labelsize=8)
        panel.grid(axis="x", color="#E6E6E6", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=200, metadata={"Software": None})
