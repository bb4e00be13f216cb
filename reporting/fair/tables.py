"""The tables of the fair comparison's page, as markdown. Links start from the folder `out` of the page."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from .. import units
from ..paper.numbers import load_paper
from ..records import Run
from ..statistics import ONE_SIDE, Paired, deviation, mean, paired, welch
from ..summary import ranking
from ..text import NOT_RUN, markdown
from .answer import NO_CLAIM, OPEN, name_of, word
from .circumstances import commit_of
from .gains import (
    ADAM_RATE,
    CANDIDATE_RATE,
    CONTROLLED,
    at_end,
    batch_runs,
    best_at,
    by_interval,
    by_length,
    gain,
    gains,
    long_runs,
    settled,
    tried,
    untuned_changes,
)
from .records import (
    OWED,
    PLAIN,
    REFERENCE,
    STEPS,
    Asked,
    Fair,
    Row,
    ablations,
    again,
    against_plain,
    by_seed,
    lowest,
    methods,
    out_of_domain,
    repeats,
    step_test,
    unseen,
)

BATCHES = ("2k", "16k", "64k")  # tokens a step

# Alice's variants by the question that they ask; what is in neither list is left out of the page's words, not of its tables.
PARTS = {
    "alice": "tracking, complement switching, optimal compensation; Adam on the last layer",
    "nothing": "no tracking, no switching, no compensation",
    "tracking": "tracking alone",
    "switch": "switching alone",
    "tracking_switch": "no compensation",
    "full_basis": "no compensation, switching draws from the full basis",
    "gaussian_mix": "no compensation, leading and Gaussian vectors",
    "gaussian": "no compensation, Gaussian vectors alone",
    "fira_compensation": "Fira's compensation",
    "fira_plus_compensation": "Fira's compensation at the norm of the low-rank update",
    "alice_last_layer": "the last layer by Alice",
}
CHOICES = {
    "initial_gaussian": "first basis: Gaussian, not the EVD of the first gradient",
    "initial_zeros": "first basis: zeros, as printed",
    "rotated": "the tracked matrix is rotated into the new basis",
    "free_signs": "signs of basis vectors as the solver gives them",
    "zero_based": "updates at steps 1, K+1, 2K+1, as in GaLore's code",
    "bias_correction": "bias correction of the moments",
    "no_warmup": "no warm-up",
}

UNTUNED = {
    "adam_b98": "Adam's beta_2 0.98, of all parameters",
    "adam_b98_lr3": "the same, three times the matrix rate",
    "adam_b95": "Adam's beta_2 0.95, of all parameters",
    "adam_b95_lr3": "the same, three times the matrix rate",
    "adam_m95": "Adam's beta_1 and beta_2 0.95 on the matrices, 0.9 and 0.95 elsewhere",
    "adam_m95_lr3": "the same, three times the matrix rate",
    "alice_b95": "beta_2 0.95 in the Adam group",
    "racs_b95": "beta_2 0.95 in the Adam group",
    "muon_b95": "beta_2 0.95 in the Adam group",
    "soap_k10": "SOAP's published interval of 10 steps",
    "adam_group_b95": "beta_2 0.95 in the Adam group alone",
    "adamw_b95": "beta_2 0.95, of all parameters",
    "galore_b95": "beta_2 0.95, of all parameters",
    "fira_b95": "beta_2 0.95, of all parameters",
    "apollo_svd_b95": "beta_2 0.95, of all parameters",
    "apollo_mini_b95": "beta_2 0.95, of all parameters",
    "alice_0_b95": "beta_2 0.95 in the Adam group",
    "soap_b95": "beta_2 0.95 in the Adam group",
    "alice_b3_98": "Alice's beta_3 0.98: tracking averages over 50 steps instead of 1,000",
    "fira_scaled": "the residual of Fira's published code, G - alpha U U^T G",
}


def stage_2(fair: Fair, model: str, out: Path) -> str:
    head = ["method", "matrix rate", "Adam group", "perplexity", "difference to Adam [95 %]", "p (Holm)", "verdict",
            "same seeds: lower in"]  # fmt: skip
    rows = [
        [
            name_of(row.name),
            f"{row.runs[0].lr:g}",
            f"{row.runs[0].adam_lr:g}",
            spread(row),
            *compared(row),
            same_seeds(row),
        ]
        for row in methods(fair, model)
        if row.runs
    ]
    return markdown(head, rows) + _missing([name_of(row.name) for row in methods(fair, model) if not row.runs])


def stage_2_beside(fair: Fair, model: str, out: Path) -> str:
    """What else the runs of stage 2 tell, of which no test is made."""
    reference = fair.runs("fair_best", model, REFERENCE)
    rows = []
    for row in methods(fair, model):
        if row.runs:
            size = (row.runs[0].summary or {}).get("optimizer_state_bytes")
            rows.append(
                [
                    name_of(row.name),
                    *(_evaluated(row, kind(row.runs), kind(reference)) for kind in (unseen, out_of_domain)),
                    "1" if row.name == REFERENCE else _speedup(row),
                    units.size(size) if size else "–",
                    seeds(row, out),
                ]
            )
    head = ["method", "perplexity on unseen rows", "on C4", "speed-up in steps", "states", "seeds"]
    return markdown(head, rows)


def verdicts(fair: Fair) -> str:
    """What the rule says of each method against Adam and against Alice; "" while no method's seeds have all ended."""
    forms = [(fair, ", beta_2 0.999"), (again(fair), ", beta_2 0.95")]
    columns = {}
    for form, suffix in forms:
        for against, table in ((REFERENCE, methods), (PLAIN, against_plain)):
            for model in form.models:
                rows = {row.name: row for row in table(form, model)}
                if any(row.settled and row.pair is not None for row in rows.values()):
                    columns[f"{name_of(against)}{suffix}, {model}"] = against, rows
    names = [row.name for row in methods(fair, fair.models[0]) if row.name != REFERENCE] if fair.models else []

    def cell(name: str, against: str, rows: dict[str, Row]) -> str:
        row = rows.get(name)
        if name == against:
            return "–"
        return word(row) if row is not None else OPEN

    lines = [[name_of(name), *(cell(name, *column) for column in columns.values())] for name in names]
    return markdown(["than", *columns], lines) if columns else ""


def _evaluated(row: Row, found: Sequence[float], reference: Sequence[float]) -> str:
    """Perplexity on other text; below it the difference of mean losses to the reference's there, of which no test is made."""
    if row.diverged:
        return "–"
    if not found:
        return NOT_RUN
    text = values(found) + (f" ({len(found)} of {len(row.runs)} seeds)" if len(found) < len(row.runs) else "")
    losses, others = ([math.log(value) for value in each] for each in (found, reference))
    test = welch(others, losses)
    if row.pair is None or test.difference is None:
        return text
    return f"{text}<br>{interval(test.difference, test.interval)}"


def stage_2_against_plain(fair: Fair, model: str, out: Path) -> str:
    """Without the reference of the first family, on which that one decides; it counts in this one's correction."""
    head = ["method", f"difference to {name_of(PLAIN)} [95 %]", "p (Holm)", "verdict", "same seeds: lower in"]
    rows = [
        [name_of(row.name), *compared(row), same_seeds(row)]
        for row in against_plain(fair, model)
        if row.runs and row.name != REFERENCE
    ]
    return markdown(head, rows) if fair.runs("fair_best", model, PLAIN) else ""


def both_betas(first: Fair, model: str, out: Path) -> str:
    """Stage 2 with beta_2 = 0.999 and with 0.95, and the difference between runs of one seed; no test is made."""
    second = again(first)
    before = {row.name: row for row in methods(first, model)}
    rows = []
    for row in methods(second, model):
        sides = before[row.name].runs, row.runs
        common = set.intersection(*({run.seed for run in runs} for runs in sides))
        if common:
            shown = [
                spread(Row(row.name, kept, len(kept)))
                for kept in ([run for run in runs if run.seed in common] for runs in sides)
            ]
            rows.append([name_of(row.name), *shown, _lower(paired(by_seed(sides[0]), by_seed(sides[1])))])
    return markdown(["method", "0.999", "0.95", "same seeds: lower in"], rows) if rows else ""


def stage_1(fair: Fair, model: str, out: Path) -> str:
    head = ["method", "best matrix rate", "Adam group", "perplexity", "runs", "interior", "near the best: matrix rates",
            "published matrix rate", "perplexity there"]  # fmt: skip
    rows, missing = [], []
    for method, published in fair.plans.published.items():
        grid = fair.grid(model, method)
        if not grid.runs:
            missing.append(name_of(method))
            continue
        best, flat, there = grid.best, grid.flat(), grid.at(published, CANDIDATE_RATE)
        count = f"{len(grid.runs)} of {grid.asked}" if not grid.finished else str(len(grid.runs))
        lost = sum(math.isinf(run.perplexity) for run in grid.runs)
        interior = ("yes" if grid.interior else "no") if grid.finished else "provisional"
        near = "–"
        if flat:
            low, high, open_end = flat
            near = f"{low:g} alone" if low == high else f"{low:g} to {high:g} (× {high / low:.3g})"
            near += ", an end of the grid" if open_end else ""
        rows.append(
            [
                name_of(method),
                f"{best.lr:g}" if best else "–",
                f"{best.adam_lr:g}" if best else "–",
                linked(best, out) if best else "all diverged",
                count + (f", {lost} diverged" if lost else ""),
                interior,
                near,
                f"{published:g}",
                linked(there, out) if there else NOT_RUN,
            ]
        )
    return markdown(head, rows) + _missing(missing)


def _missing(names: Sequence[str]) -> str:
    return f"\n\n{NOT_RUN.capitalize()}: {', '.join(names)}." if names else ""


def _speedup(row: Row) -> str:
    if row.speedup:
        return f"{row.speedup:.2f}"
    return "never" if row.pair and row.pair.test.difference is not None else "–"


def group_rates(fair: Fair, model: str, out: Path) -> str:
    by_method = {method: tried(fair, model, method) for method in CONTROLLED}
    rates = sorted({ADAM_RATE, CANDIDATE_RATE, *(rate for found in by_method.values() for rate in found)})

    def cell(method: str, rate: float) -> str:
        runs = by_method[method].get(rate, [])
        best = best_at(fair, model, method, rate)
        if best is None:
            return "diverged" if runs else NOT_RUN
        return f"{linked(best, out)} ({best.lr:g}{'†' if at_end(fair, model, best) else ''})"

    rows = [
        [name_of(method) + _provisional(fair, model, method), *(cell(method, rate) for rate in rates)]
        for method in CONTROLLED
        if by_method[method]
    ]
    missing = [name_of(method) for method in CONTROLLED if not by_method[method]]
    return markdown(["method", *(f"{rate:g}" for rate in rates)], rows) + _missing(missing)


def gains_table(fair: Fair) -> str:
    columns = {
        "as_paper": "as the paper probably compares",
        "rates": "from the rates",
        "optimizer": "from the optimizer",
        "optimizer_low": "optimizer, groups at 0.001",
        "at_own_best": "optimizer, each at its best pair",
        "within": "group rate within the method",
    }
    meant = {REFERENCE: ("as_paper", "rates", "within")}  # Adam against itself
    rows = []
    for model in fair.models:
        for method in CONTROLLED:
            if not tried(fair, model, method):
                continue
            if not all(fair.grid(model, name).finished for name in (REFERENCE, method)):
                rows.append([f"`{model}`", f"{name_of(method)} (grid not finished)", *("–" for _ in columns)])
                continue
            found = gains(fair, model, method)
            cells = [
                nats(value := getattr(found, name)) + ("†" if value is not None and name in found.ends else "")
                if name in meant.get(method, columns)
                else "–"
                for name in columns
            ]
            rows.append([f"`{model}`", name_of(method) + _provisional(fair, model, method), *cells])
    return markdown(["model", "method", *columns.values()], rows, left=2)


def _provisional(fair: Fair, model: str, method: str) -> str:
    return "" if settled(fair, model, method) else " (provisional)"


def variants(fair: Fair, names: dict[str, str], out: Path) -> str:
    rows = {model: {row.name: row for row in ablations(fair, model)} for model in fair.models}
    lines = []
    for name, about in names.items():
        line = [f"`{name}`", about]
        for model in fair.models:
            row = rows[model].get(name, Row(name, [], 0))
            difference, p, verdict = compared(row)
            tested = f"{difference}; p {p}; {verdict}" if p != "–" else "; ".join({difference: 1, verdict: 1})
            tested += f"; same seeds: lower in {same_seeds(row)}" if row.paired and row.paired.seeds else ""
            own = "reference" if name == PLAIN else tested if row.runs else "–"
            line += [spread(row) if row.runs else NOT_RUN, own, seeds(row, out)]
        lines.append(line)
    columns = [f"{what}{model}" for model in fair.models for what in ("", "difference, ", "seeds, ")]
    return markdown(["variant", "what", *columns], lines, left=2)


def steps_table(fair: Fair) -> str:
    printed = load_paper().tables["fig5"]
    head = ["figure", "from", "to", "paper", "paper: difference"]
    for model in fair.models:
        head += [f"{model}", "difference [95 %]", "sign"]
    rows = []
    for step in STEPS:
        before, after = (printed[step.panel][key] for key in (step.paper_before, step.paper_after))
        theirs = math.log(after / before)
        row = [step.figure, f"`{step.before}`", f"`{step.after}`", f"{before:.2f} → {after:.2f}", f"{theirs:+.4f}"]
        for model in fair.models:
            test = step_test(fair, model, step)
            sides = [fair.runs("fair_ablations", model, name) for name in (step.before, step.after)]
            if not all(sides):
                row += [NOT_RUN, "–", "–"]
                continue
            whole = all(fair.complete("fair_ablations", model, name) for name in (step.before, step.after))
            row.append(" → ".join(spread(Row("", runs, len(runs))) for runs in sides))
            row += [interval(test.difference, test.interval) if test.difference is not None else test.why]
            sign = _sign(theirs, test.difference, test.interval)
            counts = " and ".join(str(len(runs)) for runs in sides)
            row.append(sign if whole or sign == "–" else f"{sign} (provisional: {counts} seeds)")
        rows.append(row)
    return markdown(head, rows, left=3)


def _sign(theirs: float, ours: float | None, reach: tuple[float, float] | None) -> str:
    if ours is None or ours == 0:
        return "–"
    if reach and reach[0] <= 0 <= reach[1]:
        return "not told apart"
    return ("as the paper" if (ours < 0) == (theirs < 0) else "opposite") + ("" if reach else " (one seed)")


def batch(fair: Fair, model: str, out: Path) -> str:
    by_size = {}
    for method in CONTROLLED:
        for size in BATCHES:
            runs, asked = batch_runs(fair, model, method, size)
            by_size[method, size] = lowest(runs), f", {len(runs)} of {asked} rates" if len(runs) < asked else ""
        by_size[method, "stage 2"] = _stage_2_of_batch(fair, model, method), ""
    rows = []
    for method in CONTROLLED:
        row = [name_of(method)]
        for size in (*BATCHES, "stage 2"):
            run, note = by_size[method, size]
            text = f"{linked(run, out)} ({run.lr:g}{note})" if run else NOT_RUN
            # The loss of the method less Adam's.
            difference = gain(run, by_size[REFERENCE, size][0]) if method != REFERENCE else None
            row.append(text + (f"<br>{difference:+.4f}" if difference is not None else ""))
        rows.append(row)
    heads = []
    for size in (*BATCHES, "stage 2"):
        run = next((run for (_, which), (run, _) in by_size.items() if which == size and run and run.summary), None)
        read = f" ({run.summary['tokens'] / 1e6:.1f}M)" if run and run.summary and run.summary.get("tokens") else ""
        steps = f"stage 2: 2k, {run.setting('trainer.steps'):,} steps" if run else "stage 2"
        heads.append((f"{size} tokens a step" if size in BATCHES else steps) + read)
    return markdown(["method", *heads], rows)


def _stage_2_of_batch(fair: Fair, model: str, method: str) -> Run | None:
    """The run of stage 2 with the seed of the batch sizes."""
    seeds = {each.seed for each in fair.asked("fair_batch", model)}
    return next((run for run in fair.runs("fair_best", model, method) if run.seed in seeds), None)


def elsewhere(fair: Fair, out: Path) -> str:
    """The methods of another task beside stages 1 and 2 on the same model, and steps between refreshes."""
    there = ranking(fair.elsewhere)
    task = next(iter(there.values()))[0]
    model = str(task.model)
    stage_2_rows = {row.name: row for row in methods(fair, model)}
    rows = []
    for name, runs in there.items():
        best, row = fair.grid(model, name).best, stage_2_rows.get(name)
        rows.append(
            [
                name_of(name),
                f"{values([run.perplexity for run in runs])} ({runs[0].lr:g}, {runs[0].adam_lr:g})",
                _interval(runs[0]),
                f"{linked(best, out)} ({best.lr:g}, {best.adam_lr:g})" if best else NOT_RUN,
                _interval(best) if best else "–",
                spread(row) if row and row.runs else NOT_RUN,
            ]
        )
    steps, rows_of = (int(task.setting(f"trainer.{key}", 0)) for key in ("steps", "batch_size"))
    tokens = rows_of * int(task.setting("data.length", 0))
    head = ["method", f"`{model}`, embedded text, {steps:,} steps of {tokens:,} tokens (rates)", "steps between refreshes",
            "stage 1 (rates)", "steps between refreshes", "stage 2"]  # fmt: skip
    return markdown(head, rows)


def _interval(run: Run) -> str:
    steps = run.setting("optimizer.update_interval")
    return str(steps) if steps else "–"


def lengths(fair: Fair) -> str:
    """Gains over Adam, in nats, by the number of steps of 2k tokens, see `by_length`."""
    found = {model: {name: by_length(fair, model, name) for name in CONTROLLED} for model in fair.models}
    steps = sorted({each for model in found.values() for runs in model.values() for each in runs})
    rows = []
    for model, by_method in found.items():
        for name in CONTROLLED:
            if name == REFERENCE or not by_method[name]:
                continue
            row = [f"`{model}`", name_of(name)]
            for each in steps:
                adam, ours = (by_method[which].get(each) for which in (REFERENCE, name))
                value = gain(adam, ours)
                row.append("–" if value is None or ours is None else f"{value:+.3f} (seed {ours.seed})")
            rows.append(row)
    return markdown(["model", "method", *(f"{each:,} steps" for each in steps)], rows, left=2) if rows else ""


def luck(fair: Fair) -> str:
    """The selected runs of stage 1 beside other seeds of the same configuration, those of the ablations."""
    rows = []
    for model in fair.models:
        for name in (PLAIN, "galore", "racs"):
            best, runs = fair.grid(model, name).best, fair.runs("fair_ablations", model, name)
            if best is not None and runs:
                row = Row(name, runs, len(fair.asked("fair_ablations", model, name)))
                rows.append(
                    [f"`{model}`", name_of(name), units.perplexity(best.perplexity), spread(row), str(len(runs))]
                )
    head = ["model", "method", "selected, seed 42", "other seeds", "how many"]
    return markdown(head, rows, left=2) if rows else ""


def repeat(fair: Fair, out: Path) -> str:
    head = ["model", "method", "first", "again", "difference of loss"]
    rows = []
    for model in fair.models:
        for first, second in repeats(fair, model):
            difference = gain(first, second)
            text = "–" if difference is None else "0, the same number" if difference == 0 else f"{-difference:+.2e}"
            if (then := commit_of(first)) != (now := commit_of(second)):
                text += f" (commits {then} and {now})"
            rows.append([f"`{model}`", name_of(second.optimizer), linked(first, out), linked(second, out), text])
    return markdown(head, rows, left=2) if rows else f"{NOT_RUN.capitalize()}."


def untuned(fair: Fair, model: str, out: Path) -> str:
    """In bold, what the rules ask a grid for."""
    return _changes(untuned_changes(fair, model), out, lambda change: change < -OWED)


def intervals(fair: Fair, model: str, out: Path) -> str:
    """Perplexities by steps between refreshes; below each the loss less that of the row's shortest interval."""
    found = by_interval(fair, model)
    every = sorted({steps for runs in found.values() for steps in runs})
    rows = []
    for name, runs in found.items():
        first = runs.get(every[0])
        cells = []
        for steps in every:
            run = runs.get(steps)
            change = gain(run, first) if steps > every[0] else None
            cells.append((linked(run, out) if run else NOT_RUN) + (f"<br>{change:+.4f}" if change is not None else ""))
        rows.append([name_of(name), *cells])
    return markdown(["method", *(f"{steps} steps" for steps in every)], rows) if rows else ""


def constants(fair: Fair, model: str, out: Path) -> str:
    """What is in fair_constants besides intervals."""
    changes = untuned_changes(fair, model, "fair_constants")
    return _changes([change for change in changes if "_k" not in change[0].name], out, lambda _: False)


def _changes(
    changes: Iterable[tuple[Asked, Run | None, Run | None, float | None]], out: Path, bold: Callable[[float], bool]
) -> str:
    rows = []
    for asked, before, run, change in changes:
        text = "–" if change is None else f"**{change:+.4f}**" if bold(change) else f"{change:+.4f}"
        rows.append(
            [
                f"`{asked.name}`",
                UNTUNED.get(asked.name, "–"),
                linked(before, out) if before else NOT_RUN,
                linked(run, out) if run else NOT_RUN,
                text,
            ]
        )
    return markdown(["variant", "what", "without", "perplexity", "difference of loss"], rows, left=2)


def longer(fair: Fair, model: str, out: Path) -> str:
    adam = lowest(long_runs(fair, model, REFERENCE)[0])
    rows = []
    for asked in fair.asked("fair_long", model):
        run = fair.ended.get(asked.folder)
        rates = [f"{run.lr:g}", f"{run.adam_lr:g}"] if run else ["–", "–"]
        difference = gain(run, adam) if asked.optimizer != REFERENCE else None
        text = "–" if difference is None else f"{difference:+.4f}"
        rows.append([name_of(asked.optimizer), *rates, linked(run, out) if run else NOT_RUN, text])
    return markdown(["method", "matrix rate", "Adam group", "perplexity", "loss less that of Adam's better run"], rows)


# Cells -----------------------------------------------------------------------------------------------------------------


def spread(row: Row) -> str:
    """The mean perplexity and its standard deviation over seeds, or how many seeds diverged."""
    if row.diverged:
        return f"{row.diverged} of {len(row.runs)} diverged"
    return values([run.perplexity for run in row.runs])


def values(perplexities: Sequence[float]) -> str:
    """Mean ± standard deviation; "" without values."""
    middle, around = mean(perplexities), deviation(perplexities)
    if middle is None:
        return ""
    return units.perplexity(middle) + (f" ± {two_digits(around)}" if around is not None else " (one seed)")


def two_digits(number: float) -> str:
    return f"{number:#.2g}".rstrip(".")


def compared(row: Row) -> tuple[str, str, str]:
    """Difference with its interval, p and verdict."""
    if row.pair is None:
        return "reference", "–", "–"
    test, p = row.pair.test, row.pair.p
    if test.why == ONE_SIDE and row.runs:
        return "the reference has not run", "–", "–"
    difference = test.why if test.difference is None else interval(test.difference, test.interval)
    if p is None:
        return difference, "–", test.why if test.difference is not None else "–"
    if row.settled:
        return difference, p_value(p), row.claim or (f"{OPEN}: others' seeds are missing" if row.waiting else NO_CLAIM)
    return difference, p_value(p), f"{OPEN}: seeds are missing"


def same_seeds(row: Row) -> str:
    return "–" if row.paired is None else _lower(row.paired)


def _lower(pairs: Paired) -> str:
    """In how many of the common seeds the loss is lower than the reference's, and the interval of the mean difference."""
    if not pairs.seeds:
        return "–"
    reach = pairs.interval
    return f"{pairs.lower} of {pairs.seeds}" + (f" [{reach[0]:+.4f}, {reach[1]:+.4f}]" if reach else "")


def interval(difference: float, reach: tuple[float, float] | None) -> str:
    return f"{difference:+.4f}" + (f" [{reach[0]:+.4f}, {reach[1]:+.4f}]" if reach else "")


def p_value(p: float) -> str:
    """Of three digits, and of four where these would not show on which side of 0.05 it lies."""
    return "< 0.001" if p < 0.001 else f"{p:.4f}" if 0.0495 <= p < 0.0505 else f"{p:.3f}"


def nats(value: float | None) -> str:
    return NOT_RUN if value is None else f"{value:+.3f}"


def linked(run: Run, out: Path) -> str:
    """A run's perplexity, with a link to its record."""
    return f"[{units.perplexity(run.perplexity)}]({os.path.relpath(run.path, out)})"


def seeds(row: Row, out: Path) -> str:
    links = ", ".join(f"[{run.seed}]({os.path.relpath(run.path, out)})" for run in row.runs)
    return links + (f" ({len(row.runs)} of {row.asked})" if len(row.runs) < row.asked else "") if links else "–"
