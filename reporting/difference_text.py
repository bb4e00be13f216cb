"""What `difference` found, for a terminal: about a screen, at most WIDTH columns."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from . import units
from .sides import value_text

WIDTH = 110
POINTS = 6  # evaluations shown of a curve; the JSON has all
CELL = 40  # characters of a setting; longer ones are cut
_COSTS = {
    "parameters": ("parameters", units.count),
    "optimizer_state_bytes": ("optimizer state", units.size),
    "peak_memory_bytes": ("peak memory", units.size),
    "tokens_per_second": ("tokens/s", lambda value: f"{value:,.0f}"),
    "optimizer_ms": ("optimizer ms", lambda value: f"{value:.3g}" if value < 1000 else f"{value:.0f}"),
    "wall_seconds": ("wall time", units.duration),
}


def difference_text(found: Mapping[str, Any]) -> str:
    """All of it, warnings last, where a terminal shows them."""
    parts = [_heads(found), _settings(found), _environment(found), _data(found), _result(found), _curve(found)]
    return "\n\n".join(part for part in [*parts, _cost(found), _warnings(found)] if part)


def _heads(found: Mapping[str, Any]) -> str:
    lines = []
    for label in "ab":
        side = found[label]
        seeds = ", ".join(str(run["seed"]) for run in side["runs"])
        lines += [
            f"{label.upper()}  {side['name']}",
            f"   {units.optimizer_name(side['optimizer'])} on {side['model']}, data {side['data']}, {side['steps']} steps, "
            f"{'seed' if len(side['runs']) == 1 else 'seeds'} {seeds}",
        ]
    return "\n".join(lines)


def _settings(found: Mapping[str, Any]) -> str:
    rows = found["configuration"]
    if not rows:
        return "Configuration  the same"
    both = [[row["key"], _cell(row["a"]), _cell(row["b"])] for row in rows if "a" in row and "b" in row]
    lines = [_table(["Configuration", "A", "B"], both, align="lll")]
    for label in "ab":
        only = [f"{row['key']}={_cell(row[label])}" for row in rows if label in row and len(row) == 2]
        if only:
            lines.append(_wrap(f"only {label.upper()} has  ", "  ".join(only)))
    return "\n".join(lines)


def _environment(found: Mapping[str, Any]) -> str:
    rows = found["environment"]
    if not rows:
        return "Environment    the same versions and hardware, as far as recorded"
    texts = [[row["key"], *(_cell(" | ".join(_short(row, side)) or "not recorded") for side in "ab")] for row in rows]
    return _table(["Environment", "A", "B"], texts, align="lll")


def _short(row: Mapping[str, Any], side: str) -> list[str]:
    return [value[:10] for value in row[side]] if row["key"] == "commit" else row[side]


def _data(found: Mapping[str, Any]) -> str:
    data = found["data"]
    if not data["known"]:
        return "Data           not recorded on both sides"
    said = [
        f"{name} {'differs: ' + ', '.join(data[name]) if data[name] else 'the same'}"
        for name in ("training", "validation")
    ]
    return f"Data           {'; '.join(said)}"


def _result(found: Mapping[str, Any]) -> str:
    result = found["result"]
    rows = []
    for what, digits in (("loss", ".4f"), ("perplexity", "")):
        sides = [result[what][side] for side in "ab"]
        texts = [_outcome(found[side]) if each["mean"] is None else _spread(each, digits)
                 for side, each in zip("ab", sides, strict=True)]  # fmt: skip
        rows.append([f"validation {what}", *texts, ""])
    change = result["difference_of_losses"]
    if change is not None:
        rows[0][-1] = f"{change:+.4f}{_interval(result['interval'])}"
        rows[1][-1] = f"{result['perplexity']['b']['mean'] - result['perplexity']['a']['mean']:+.2f}"
    for what, show in (("steps", lambda number: f"{number:,}"), ("tokens", units.count)):
        budgets = [" | ".join(show(each[what]) for each in result["training"][side]) or "-" for side in "ab"]
        rows.append([f"training {what}", *budgets, ""])
    return _table(["Result", "A", "B", "B - A"], rows, align="lrrl") + "\n" + _significance(result)


def _outcome(side: Mapping[str, Any]) -> str:
    """What stands in the place of a number that does not exist."""
    states = [run["state"] for run in side["runs"]]
    if "diverged" not in states:
        return "not ended"
    return "diverged" if len(states) == 1 else f"{states.count('diverged')} of {len(states)} diverged"


def _spread(moments: Mapping[str, Any], digits: str) -> str:
    """Mean and standard deviation."""
    show = units.perplexity if not digits else lambda value: f"{value:{digits}}"
    spread = "" if moments["deviation"] is None else f" ± {moments['deviation']:{digits or '.2g'}}"
    return f"{show(moments['mean'])}{spread}"


def _interval(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f" (95 % interval {interval[0]:+.4f} to {interval[1]:+.4f})"


def _significance(result: Mapping[str, Any]) -> str:
    p, seeds = result["p"], " and ".join(str(result["loss"][side]["seeds"]) for side in "ab")
    if p is None:
        return _wrap("Claim  ", f"none, {result['why_no_p']}.")
    said = {"better": "B is better than A", "worse": "B is worse than A", None: "none, p is not below 0.05"}
    return _wrap(
        "Claim  ",
        f"{said[result['verdict']]}: Welch's two-sided p {_p(p)} over {seeds} seeds, for this pair alone. In a table of "
        "several pairs Holm's correction comes on top; a statement in general needs both proxies.",
    )


def _p(value: float) -> str:
    return f"= {value:.2g}" if value >= 1e-4 else "< 0.0001"


def _curve(found: Mapping[str, Any]) -> str:
    curve = found["curve"]
    lines = []
    if curve["steps"]:
        alike = curve["tokens"] is None
        rows = [
            [f"{row['step']:,}", _tokens(row, alike), *_losses(row), _ahead(row["ahead"])]
            for row in _some(curve["steps"])
        ]
        heads = ["Perplexity at step", "tokens", "A", "B", "ahead"]
        lines.append(_table(heads, rows, align="rrrrl"))
    else:
        lines.append("Curves         no evaluation at the same step")
    if curve["tokens"]:
        rows = [[units.count(row["tokens"]), *_losses(row), _ahead(row["ahead"])] for row in _some(curve["tokens"])]
        lines.append(_table(["Perplexity at tokens", "A", "B, interpolated", "ahead"], rows, align="rrrl"))
    lines += filter(None, (_speedup(curve["speedup_of_b"], "B", "A"), _speedup(curve["speedup_of_a"], "A", "B")))
    return "\n".join(lines)


def _tokens(row: Mapping[str, Any], alike: bool) -> str:
    sides = [row["tokens_a"]] if alike else [row["tokens_a"], row["tokens_b"]]
    return " | ".join("?" if side is None else units.count(side) for side in sides)


def _losses(row: Mapping[str, Any]) -> list[str]:
    return [units.perplexity(math.exp(min(row[side], 700.0))) for side in "ab"]


def _ahead(side: str | None) -> str:
    return {None: "?", "equal": "equal"}.get(side) or str(side).upper()


def _some(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """At most POINTS of the rows, evenly spread, the last among them."""
    if len(rows) <= POINTS:
        return list(rows)
    return [rows[round((i + 1) * len(rows) / POINTS) - 1] for i in range(POINTS)]


def _speedup(speed: Mapping[str, Any] | None, label: str, reference: str) -> str:
    """The paper's definition, in a sentence."""
    if speed is None:
        return ""
    target = f"{reference}'s final perplexity {units.perplexity(speed['target'])}"
    if speed["step"] is None:
        return f"{label} never reaches {target}."
    text = (
        f"{label} reaches {target} by step {speed['step']:,} of {reference}'s {speed['of']:,.0f}: "
        f"{speed['in_steps']:.2f} times as fast in steps"
    )
    if speed["in_tokens"] is not None and not math.isclose(speed["in_tokens"], speed["in_steps"], rel_tol=0.005):
        text += f", {speed['in_tokens']:.2f} in tokens"
    return f"{text} (evaluated every {speed['evaluated_every']:,})."


def _cost(found: Mapping[str, Any]) -> str:
    rows = []
    for row in found["cost"]:
        name, show = _COSTS[row["key"]]
        values = ["-" if row[side] is None else show(row[side]) for side in "ab"]
        rows.append([name, *values, "" if row["ratio"] is None else f"{row['ratio']:.3g}"])
    return _table(["Cost", "A", "B", "B / A"], rows, align="lrrr") if rows else ""


def _warnings(found: Mapping[str, Any]) -> str:
    return "\n".join(_wrap("note: ", text) for text in found["warnings"])


def _cell(value: Any) -> str:
    text = " ".join(value_text(value).split())
    return text if len(text) <= CELL else f"{text[: CELL - 1]}…"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    """Columns under their heads, two spaces apart; `align` has "l" or "r" for each."""
    lines = [list(heads), *([f"  {row[0]}" if align[0] == "l" else row[0], *row[1:]] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    return "\n".join(
        "  ".join(
            text.ljust(width) if side == "l" else text.rjust(width)
            for text, width, side in zip(line, widths, align, strict=True)
        ).rstrip()
        for line in lines
    )


def _wrap(head: str, text: str) -> str:
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_on_hyphens=False,
        break_long_words=False,
    )
