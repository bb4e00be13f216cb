"""Two configurations, each with one run or several seeds: what differs, who is better, what it costs.

a, b = load_side("results/runs/compare/adam-lr0.001-adam0.02-s*"), load_side("results/runs/compare/alice-lr0.02-adam0.02-s*")
difference(a, b)["result"]["verdict"]       B against A: "better", "worse" or None, by the rule in statistics.py

`difference` returns plain values for JSON; difference_text.py writes them for a terminal. A number that does not exist, or
is not finite, is None there. A is the reference: differences are B - A, ratios B / A.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .curves import first_evaluation, shared_curve
from .records import Run, lookup
from .sides import Side, budget, facts, is_number, last_step, runs_at_once, settings, state, value_text
from .statistics import RULE, Welch, against_reference, deviation, final_losses, mean

# hardware that speeds and memory depend on
MEASURED = ("device", "cpu", "instructions", "cores", "threads", "processes")
# What of a source's description says where it lies or how it is stored, not which documents it has.
STORAGE = ("path", "present", "prepared", "max_tokens")
VALIDATION_SETTINGS = ("data.rows", "data.length", "data.attention", "data.validation_max_tokens")
TRAINING_SETTINGS = ("data.rows", "data.length", "data.attention", "data.shuffle_buffer", "data.protocol")
COSTS = (
    "parameters",
    "optimizer_state_bytes",
    "peak_memory_bytes",
    "tokens_per_second",
    "optimizer_ms",
    "wall_seconds",
)


def difference(a: Side, b: Side) -> dict[str, Any]:
    """Everything that the two sides can say about each other, as values for JSON."""
    data = _data(a, b)
    comparable = not data["validation"]
    return {
        "a": _side(a),
        "b": _side(b),
        "configuration": _configuration(a, b),
        "environment": _environment(a, b),
        "data": data,
        "result": _result(a, b, comparable),
        "curve": _curves(a, b, comparable),
        "cost": _costs(a, b),
        "warnings": _warnings(a, b, data),
    }


def _side(side: Side) -> dict[str, Any]:
    first = side.runs[0]
    return {
        "name": side.name,
        "optimizer": first.optimizer,
        "model": first.model,
        "data": first.data,
        "steps": first.setting("trainer.steps"),
        "runs": [
            {
                "path": str(run.path),
                "seed": run.seed,
                "state": state(run),
                "step": last_step(run),
                "perplexity": _finite(run.perplexity),
            }
            for run in side.runs
        ],
    }


# What the runs were ---------------------------------------------------------------------------------------------------


def _configuration(a: Side, b: Side) -> list[dict[str, Any]]:
    """Settings whose values differ, the optimizer's first; one that a side lacks has no value there."""
    left, right = settings(a.runs[0]), settings(b.runs[0])
    groups = ("optimizer", "model", "trainer", "data")
    place = {group: number for number, group in enumerate(groups)}
    rows = []
    for key in sorted({**left, **right}, key=lambda key: place.get(key.split(".")[0], len(groups))):
        if key not in left or key not in right or value_text(left[key]) != value_text(right[key]):
            rows.append(
                {"key": key} | {name: _plain(side[key]) for name, side in (("a", left), ("b", right)) if key in side}
            )
    return rows


def _plain(value: Any) -> Any:
    """What JSON can hold, as it is; anything else as text."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, (bool, str)) or is_number(value) else value_text(value)


def _environment(a: Side, b: Side) -> list[dict[str, Any]]:
    """Facts that differ between the sides or were not recorded on one of them; each with all values of the side."""
    left, right = facts(a), facts(b)
    return [
        {"key": key, "a": left.get(key, []), "b": right.get(key, [])}
        for key in dict.fromkeys([*left, *right])
        if left.get(key) != right.get(key)
    ]


def _data(a: Side, b: Side) -> dict[str, Any]:
    """`training` and `validation`: names of what differs. `known` is False where a side has not recorded its text."""
    found: dict[str, Any] = {"known": True}
    for split, keys in (("training", TRAINING_SETTINGS), ("validation", VALIDATION_SETTINGS)):
        sides = [[_read(run, "train" if split == "training" else split, keys) for run in side.runs] for side in (a, b)]
        names = dict.fromkeys(name for side in sides for row in side for name in row)
        found[split] = []
        for name in names:
            left, right = ({row[name] for row in side if row.get(name) is not None} for side in sides)
            if left and right and len(left | right) > 1:
                found[split].append(name)
            found["known"] &= name != "text" or bool(left and right)
    return found


def _read(run: Run, split: str, keys: Iterable[str]) -> dict[str, str | None]:
    """What decides which rows of a split a run has read; None where it is not recorded."""
    text = lookup(run.environment, f"data.{split}")
    if isinstance(text, dict):
        text = {key: value for key, value in sorted(text.items()) if key not in STORAGE}
    read: dict[str, Any] = {
        "text": text,
        "tokenizer": lookup(run.environment, "tokenizer.fingerprint", run.setting("tokenizer")),
        # A setting that an older version did not have is unknown; null is a value.
        **{key: value_text(run.setting(key)) for key in keys if key.split(".")[1] in (run.setting("data") or {})},
    }
    if split == "validation":
        evaluated = run.evals["tokens"][np.isfinite(run.evals["tokens"])]
        tokens = (run.summary or {}).get("validation_tokens", evaluated[-1] if len(evaluated) else None)
        read["number of tokens"] = int(tokens) if is_number(tokens) else None
    return {key: None if value is None else str(value) for key, value in read.items()}


# What came out --------------------------------------------------------------------------------------------------------


def _result(a: Side, b: Side, comparable: bool) -> dict[str, Any]:
    """Final losses and perplexities over the seeds, and the rule's verdict on B; no difference where none has a meaning."""
    losses = [final_losses(side.runs) for side in (a, b)]
    if not comparable:
        test, verdict = Welch(None, why="the validation sets differ"), None
    elif _shared(a, b):
        test, verdict = Welch(None, why="both sides contain the same run"), None
    else:
        pair = against_reference(losses[0], {"b": losses[1]})["b"]
        test, verdict = pair.test, pair.verdict
    budgets = {name: sorted({budget(run) for run in side.ended}) for name, side in (("a", a), ("b", b))}
    return {
        "loss": {name: _moments(values) for name, values in zip("ab", losses, strict=True)},
        "perplexity": {
            name: _moments([_exp(loss) for loss in values]) for name, values in zip("ab", losses, strict=True)
        },
        "difference_of_losses": test.difference,
        "interval": test.interval,
        "p": test.p,
        "why_no_p": test.why,
        "verdict": verdict,
        "rule": RULE,
        "training": {
            name: [{"steps": steps, "tokens": tokens} for steps, tokens in each] for name, each in budgets.items()
        },
    }


def _shared(a: Side, b: Side) -> bool:
    return bool({run.path.resolve() for run in a.runs} & {run.path.resolve() for run in b.runs})


def _moments(values: Sequence[float]) -> dict[str, Any]:
    return {"mean": _finite(mean(values)), "deviation": deviation(values), "seeds": len(values)}


def _exp(loss: float) -> float:
    return math.inf if math.isinf(loss) else math.exp(min(loss, 700.0))


def _curves(a: Side, b: Side, comparable: bool) -> dict[str, Any]:
    """Validation losses (means over seeds) where both have them, and the steps that each needs to the other's end.

    Nobody is ahead and no speed-up exists unless the losses are comparable.

    `steps`: evaluations at equal steps. `tokens`: at the tokens of A's evaluations, B's loss interpolated between its own;
    None where a step has the same number of tokens in both, so that equal steps are equal tokens.
    """
    curve_a, curve_b = _curve(a), _curve(b)
    common = [step for step in curve_a if step in curve_b and step > 0]
    rows = [
        {"step": step, "tokens_a": _finite(curve_a[step][0]), "tokens_b": _finite(curve_b[step][0])}
        | {"a": curve_a[step][1], "b": curve_b[step][1], "ahead": _ahead(curve_a[step][1], curve_b[step][1])}
        for step in common
    ]
    if not comparable:
        return {
            "steps": [row | {"ahead": None} for row in rows],
            "tokens": None,
            "speedup_of_b": None,
            "speedup_of_a": None,
        }
    return {
        "steps": rows,
        "tokens": None if _same_pace(curve_a, curve_b) else _at_equal_tokens(curve_a, curve_b),
        "speedup_of_b": _speedup(a, curve_b),
        "speedup_of_a": _speedup(b, curve_a),
    }


Curve = dict[int, tuple[float, float]]  # step -> training tokens, validation loss


def _curve(side: Side) -> Curve:
    """The mean over seeds of validation losses, at the steps that all of them have, of runs as far as possible alike."""
    going = [run for run in side.runs if run.diverged is None and math.isnan(run.perplexity)]
    runs = side.ended or going or side.runs
    steps, perplexities = shared_curve(runs)
    good = (np.isfinite(perplexities) & (perplexities > 0)).all(axis=0)
    steps, losses = steps[good], np.log(perplexities[:, good])
    tokens = np.array([run.training_tokens(steps) for run in runs])
    columns = zip(steps, tokens.T, losses.T, strict=True)
    return {int(step): (statistics.fmean(seen), statistics.fmean(loss)) for step, seen, loss in columns}


def _same_pace(a: Curve, b: Curve) -> bool:
    paces = [tokens / step for curve in (a, b) for step, (tokens, _) in curve.items() if step > 0]
    paces = [pace for pace in paces if math.isfinite(pace)]
    return not paces or max(paces) < 1.001 * min(paces)


def _at_equal_tokens(a: Curve, b: Curve) -> list[dict[str, Any]]:
    tokens, losses = (np.array([point[i] for step, point in b.items() if step > 0]) for i in (0, 1))
    rows = []
    for step, (at, loss) in a.items():
        if step > 0 and len(tokens) and tokens[0] <= at <= tokens[-1]:
            other = float(np.interp(at, tokens, losses))
            rows.append({"tokens": at, "a": loss, "b": other, "ahead": _ahead(loss, other)})
    return rows


def _ahead(a: float, b: float) -> str:
    return "equal" if a == b else "a" if a < b else "b"


def _speedup(reference: Side, candidate: Curve) -> dict[str, Any] | None:
    """The paper's speed-up in steps, and the same in tokens; `step` None: the candidate never gets there.

    None as a whole: the reference has not ended, or the candidate has no evaluations.
    """
    if not reference.ended or not candidate:
        return None
    steps, tokens = (statistics.fmean(values) for values in zip(*map(budget, reference.ended), strict=True))
    target = statistics.fmean(math.log(run.perplexity) for run in reference.ended)
    places: NDArray[np.float64] = np.array([step for step in candidate if step > 0], dtype=np.float64)
    losses = np.array([candidate[int(step)][1] for step in places])
    first = first_evaluation(places, losses, target + 1e-12, every=1)  # equal up to the rounding of the logarithms
    seen = candidate[first][0] if first else math.nan
    return {
        "target": math.exp(target),
        "of": steps,
        "step": first,
        "in_steps": steps / first if first else None,
        "in_tokens": _finite(tokens / seen) if first and seen > 0 else None,
        "evaluated_every": int(np.diff(places, prepend=0.0).max()) if len(places) else None,
    }


def _costs(a: Side, b: Side) -> list[dict[str, Any]]:
    """Medians over the runs that have ended, from their summaries."""
    rows = []
    for key in COSTS:
        left, right = (_median((run.summary or {}).get(key) for run in side.ended) for side in (a, b))
        if left is not None or right is not None:
            rows.append({"key": key, "a": left, "b": right, "ratio": right / left if left and right else None})
    return rows


def _median(values: Iterable[Any]) -> float | None:
    numbers = [float(value) for value in values if is_number(value)]
    return statistics.median(numbers) if numbers else None


# What must be said about it -------------------------------------------------------------------------------------------


def _warnings(a: Side, b: Side, data: Mapping[str, Any]) -> list[str]:
    """Sentences about what makes the comparison less than it looks."""
    notes: list[str] = []
    if _shared(a, b):
        notes.append("Both sides contain the same run: they are not independent.")
    for label, side in (("A", a), ("B", b)):
        notes += _about_runs(label, side)
    if data["validation"]:
        notes.append(
            f"The validation sets differ ({', '.join(data['validation'])}): the perplexities are not comparable."
        )
    if not data["known"]:
        notes.append("One side has not recorded which text it read: whether the data are the same is not known.")
    if data["training"]:
        notes.append(f"The training data differ ({', '.join(data['training'])}).")
    models = [{run.model for run in side.runs} for side in (a, b)]
    sizes = [{(run.summary or run.environment).get("parameters") for run in side.runs} - {None} for side in (a, b)]
    if models[0] != models[1] or (sizes[0] and sizes[1] and sizes[0] != sizes[1]):
        notes.append("The models differ: the results are not those of the optimizers alone.")
    tokens = [{budget(run)[1] for run in side.ended} for side in (a, b)]
    if tokens[0] and tokens[1] and tokens[0] != tokens[1]:
        notes.append(f"The final results are after different numbers of training tokens ({_counts(tokens)}).")
    return [*notes, *_about_speed(a, b)]


def _about_runs(label: str, side: Side) -> Iterator[str]:
    for run in side.runs:
        where = "" if last_step(run) is None else f" at step {last_step(run)}"
        if state(run) == "diverged":
            yield f"{label}: seed {run.seed} diverged{where}."
        elif state(run) == "not ended":
            progress = f" ({where.strip()} of {run.setting('trainer.steps')})" if where else ""
            yield f"{label}: seed {run.seed} has not ended{progress}; it is not in the result."
        for key, what in (("skipped_steps", "steps were skipped"), ("damaged_documents", "damaged documents left out")):
            if (run.summary or {}).get(key):
                yield f"{label}: seed {run.seed}: {run.summary[key]} {what}."  # type: ignore[index]
    seeds = [run.seed for run in side.runs]
    repeated = sorted({str(seed) for seed in seeds if seeds.count(seed) > 1})
    if repeated:
        yield f"{label}: several runs of seed {', '.join(repeated)}: repeats of one draw, they count once, by their mean."


def _about_speed(a: Side, b: Side) -> Iterator[str]:
    known = [facts(side) for side in (a, b)]
    hardware = [{key: each.get(f"hardware.{key}", []) for key in MEASURED} for each in known]
    # Early records do not tell the CPU's instructions.
    told = [key for key in MEASURED if key != "instructions" or (hardware[0][key] and hardware[1][key])]
    differ = [key for key in told if hardware[0][key] != hardware[1][key]]
    if differ:
        yield f"The hardware differs ({', '.join(differ)}): do not compare speeds or memory."
    elif any(len(values) > 1 for values in hardware[0].values()):
        yield "The runs of each side are from different hardware: do not compare speeds or memory."
    kinds = [{(run.summary or {}).get("peak_memory_kind") for run in side.ended} for side in (a, b)]
    if kinds[0] and kinds[1] and kinds[0] != kinds[1]:
        yield "The peaks of memory were measured in different ways: do not compare them."
    at_once = [max(map(runs_at_once, side.runs)) for side in (a, b)]
    if max(at_once) > 1:
        many = f"{max(at_once)}" if at_once[0] == at_once[1] else f"A {at_once[0]}, B {at_once[1]}"
        yield f"Several runs shared the machine ({many} at once): tokens/s and optimizer ms are no measure of a method."


def _counts(tokens: Sequence[set[int]]) -> str:
    return ", ".join(
        f"{label} {' or '.join(f'{count:,}' for count in sorted(each))}"
        for label, each in zip("AB", tokens, strict=True)
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
