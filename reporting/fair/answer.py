"""The answer of the fair comparison in a few sentences, made from its numbers and never saying more than they do."""

from __future__ import annotations

import math

from .. import units
from ..paper.numbers import load_paper
from ..records import Run
from ..statistics import Verdict, in_general, mean
from .gains import batch_runs, by_interval, gain, gains, growing, long_runs, owed, settled, untuned_changes
from .records import AGAIN, OWED, PLAIN, REFERENCE, Fair, Row, ablations, again, against_plain, lowest, methods, repeats

CANDIDATES = ("alice", "racs")  # the paper's methods
NO_CLAIM, NOT_TESTED, OPEN = "no difference claimed", "not tested", "open"
# How sentences about the first and about the second stages 1 and 2 begin.
FIRST, SECOND = "With Adam's default beta_2 of 0.999, ", "With beta_2 = 0.95 in every Adam, "
NEAR = 0.03  # of configs/sweep/fair_rates.yaml and fair_control.yaml: pairs so near the best must have neighbours too


def answer(fair: Fair) -> list[str]:
    """A sentence or two for each question; fewer, and saying so, while runs are missing."""
    done, asked = len(fair.runs()), len(fair.asked())
    found = []
    promised = owed(fair)
    if done < asked or promised or growing(fair):
        more = ", and more as the grids of rates grow" if growing(fair) else ""
        found.append(
            f"**Not complete**: {done} of {asked} runs have ended{more}. Differences count only between methods whose seeds "
            "have all run; rates and gains below are provisional where their grids are."
        )
    if promised:
        names = _and([f"{name_of(method)} on `{model}`" for model, method in promised])
        found.append(
            f"Owed by the rules, because other averages of Adam gained more than {OWED:g} nats: grids with beta_2 = 0.95 "
            f"for {names}."
        )
    second = again(fair)
    found += [
        *_whichever(fair, second),
        *_outcome(fair, FIRST, look=True),
        *_bigrams(fair),
        *_beta_2(fair),
        *_adam_anew(fair, second),
    ]
    if len({asked.name for asked in second.asked("fair_best") if asked.folder in second.ended}) > 1:
        found += _outcome(second, SECOND)
    return [*found, *_gains(fair), *_batches(fair), *_longer(fair), *_variants(fair), *_constants(fair)]


def verdicts_in_words(fair: Fair) -> list[str]:
    """What the rule says of the methods, and where it says nothing yet: for a page that has no room for more."""
    second = again(fair)
    found = _whichever(fair, second)
    for form, start in ((fair, FIRST), (second, SECOND)):
        ready, open_ = _by_readiness(form)
        said = [_begun(start, each) for each in _judged(form, ready)]
        where = f" on {_and([f'`{model}`' for model in open_])}" if ready else ""
        missing = (
            f"{start}not all seeds have run{where}, so **no difference is claimed{' there' if ready else ''} yet**."
        )
        found += [*said, *([missing] if open_ else [])]
    return found


def _outcome(fair: Fair, start: str, look: bool = False) -> list[str]:
    """What stage 2 says; `start` begins each sentence.

    Args:
        look: say what stage 1 looks like while stage 2 says nothing.
    """
    ready, open_ = _by_readiness(fair)
    found = [*_leaders(ready), *_judged(fair, ready)]
    if open_ and (text := _so_far(open_)):
        found.append(text)
    if not ready:
        found += [] if found else [f"Stage 2 tells nothing yet: {_NOTHING}."]
        found += _first_look(fair) if look else []
    return [_begun(start, each) for each in found]


def _by_readiness(fair: Fair) -> tuple[dict[str, list[Row]], dict[str, list[Row]]]:
    """Stage 2 of the models on which some method can be held against Adam by the rule, and of the others."""
    tables = {model: methods(fair, model) for model in fair.models}
    ready = {model: rows for model, rows in tables.items() if any(row.pair and row.settled for row in rows)}
    return ready, {model: rows for model, rows in tables.items() if model not in ready}


def _judged(fair: Fair, ready: dict[str, list[Row]]) -> list[str]:
    """What the rule says, against Adam and against Alice."""
    if not ready:
        return []
    against = {model: against_plain(fair, model) for model in ready}
    return [_claims(ready, fair.models, REFERENCE), _claims(against, fair.models, PLAIN)]


def _begun(start: str, sentence: str) -> str:
    return start + sentence[0].lower() + sentence[1:]


def _whichever(*forms: Fair) -> list[str]:
    """The methods that the rule calls better than Adam on both models, whichever beta_2; once all seeds have ended."""
    better = []
    for fair in forms:
        words: dict[str, list[str]] = {}
        for model in fair.models:
            rows = [row for row in methods(fair, model) if row.name != REFERENCE]
            if len(fair.models) < 2 or not rows or not all(row.settled for row in rows):
                return []
            for row in rows:
                words.setdefault(row.name, []).append(word(row))
        better.append([name for name, found in words.items() if set(found) == {"better"}])
    both = [name_of(name) for name in better[0] if all(name in names for names in better[1:])]
    return [f"Better than Adam by the rule, on both models and with either beta_2: {_and(both) or 'none'}."]


_NOTHING = "nothing is claimed about which method is better"


def _so_far(tables: dict[str, list[Row]]) -> str:
    """Stage 2 before any method can be held against Adam: means over the seeds that all have, and that they claim nothing.

    "" without any.
    """
    parts = []
    for model, rows in tables.items():
        ended = {
            row.name: {run.seed or 0: run.perplexity for run in row.runs}
            for row in rows
            if row.runs and not row.diverged
        }
        common = sorted(set.intersection(*map(set, ended.values()))) if ended else []
        if REFERENCE not in ended or len(ended) < 2 or not common:
            continue
        means = {name: sum(by_seed[seed] for seed in common) / len(common) for name, by_seed in ended.items()}
        shown = [
            f"{name_of(name)} {units.perplexity(means[name])}" for name in sorted(means, key=lambda name: means[name])
        ]
        lost = [name_of(row.name) for row in rows if row.diverged]
        seeds = f"{len(common)} of {rows[0].asked} seeds, those that all of these have"
        parts.append(f"on `{model}` ({seeds}) {_and(shown)}{f', diverged {_and(lost)}' if lost else ''}")
    return (
        f"Stage 2 so far, mean perplexities {'; '.join(parts)}. Seeds are missing there: {_NOTHING}." if parts else ""
    )


def _first_look(fair: Fair) -> list[str]:
    """Stage 1 where all its grids have ended: the lowest perplexity, and what lies so near that it says nothing."""
    parts = []
    for model in fair.models:
        grids = [fair.grid(model, name) for name in fair.plans.published]
        best = sorted((grid.best for grid in grids if grid.best), key=lambda run: run.perplexity)
        if best and all(grid.finished for grid in grids):
            near = [run for run in best if run.perplexity <= (1 + NEAR) * best[0].perplexity]
            shown = [f"{name_of(run.optimizer)} {units.perplexity(run.perplexity)}" for run in near]
            parts.append(f"on `{model}` {_and(shown)}")
    within = f"the lowest perplexity and all within {100 * NEAR:g} % of it, too near to read anything from"
    return [f"Stage 1, one seed, {within}: {'; '.join(parts)}."] if parts else []


def _bigrams(fair: Fair) -> list[str]:
    """Where methods are no better than a bigram model that was counted on as many tokens as their runs read."""
    parts = []
    for model in fair.models:
        best = {name: [run] for name in fair.plans.published if (run := fair.grid(model, name).best)}
        stages = {"stage 1": best, "stage 2": {row.name: row.runs for row in methods(fair, model) if row.runs}}
        for stage, by_name in stages.items():
            read = {(run.summary or {}).get("tokens") for runs in by_name.values() for run in runs if run.summary}
            bigram = next((each.bigram for each in fair.ngrams.get(model, ()) if {each.tokens} == read), None)
            if bigram is None:
                continue
            above = [name for name, runs in by_name.items() if (mean([run.perplexity for run in runs]) or 0) >= bigram]
            if above:
                parts.append(f"in {stage} on `{model}` {len(above)} of {len(by_name)} ({units.perplexity(bigram)})")
    if not parts:
        return []
    sentence = f"No better than a bigram model counted on as many tokens (its perplexity in brackets): {_and(parts)}."
    return [_begun(FIRST, sentence)]


def _beta_2(fair: Fair) -> list[str]:
    """What beta_2 = 0.95 does at the rates that were chosen with 0.999."""
    parts = []
    for model in fair.models:
        changes = {asked.name: change for asked, _, _, change in untuned_changes(fair, model) if change is not None}
        gained = {name: -changes[name + AGAIN] for name in (REFERENCE, *CANDIDATES, "muon") if name + AGAIN in changes}
        if gained:
            parts.append(f"on `{model}` {_and([f'{name_of(name)} {value:+.3f}' for name, value in gained.items()])}")
    if not parts:
        return []
    return [
        "With beta_2 = 0.95 in place of Adam's default of 0.999, for all of Adam's parameters and the Adam group of the "
        f"others, at rates chosen without it, 600 steps and one seed: these gain, in nats, {'; '.join(parts)}."
    ]


def _leaders(ready: dict[str, list[Row]]) -> list[str]:
    parts = []
    for model, rows in ready.items():
        ended = [row for row in rows if row.runs and not row.diverged and (row.settled or row.name == REFERENCE)]
        if not ended:
            continue
        first, reference = ended[0], next(row for row in rows if row.name == REFERENCE)
        missing = sum(not row.settled for row in rows)
        among = f", of the {len(rows) - missing} of {len(rows)} methods whose seeds have all ended" if missing else ""
        text = f"{name_of(first.name)} on `{model}` ({units.perplexity(first.perplexity or 0)}"
        if first.name == REFERENCE:
            parts.append(f"{text}{among})")
        else:
            yet = " so far" if first.waiting else ""
            said = "a difference by the rule" if first.claim else f"{NO_CLAIM}{yet}"
            parts.append(f"{text}; Adam {_reference(reference)}: {said}{among})")
    if not parts:
        return []
    count = max(len(row.runs) for rows in ready.values() for row in rows)
    return [
        f"At each method's own best rates, the lowest mean perplexity over {count} seeds has {_and(parts)}. Only "
        "differences from Adam, and from Alice, are tested, not those between the others."
    ]


def _reference(row: Row) -> str:
    return units.perplexity(row.perplexity) if row.perplexity is not None else "not run"


def _claims(ready: dict[str, list[Row]], models: list[str], reference: str) -> str:
    """What holds on all proxies against the reference, what on one alone, and what cannot be said."""
    than = name_of(reference)
    words: dict[str, dict[str, str]] = {}
    for model, rows in ready.items():
        for row in rows:
            first_decides = (row.name, reference) == (REFERENCE, PLAIN)  # Adam and Alice: a test of the first family
            if row.name != reference and not first_decides:
                words.setdefault(row.name, {})[model] = word(row)
    if len(ready) < len(models) or len(models) < 2:
        only = "; ".join(f"on `{model}` {_on_one(words, model, than)}" for model in ready)
        more = " A statement about optimizers in general needs both models." if reference == REFERENCE else ""
        return f"By the rule, {only}.{more}"
    waiting = [name_of(name) for name, by_model in words.items() if OPEN in by_model.values()]
    both = {name: by_model for name, by_model in words.items() if OPEN not in by_model.values()}
    general = {name: in_general([_verdict(word) for word in by_model.values()]) for name, by_model in both.items()}
    better, worse = ([name_of(n) for n, verdict in general.items() if verdict == word] for word in ("better", "worse"))
    neither, untested = (
        [name_of(name) for name, by_model in both.items() if set(by_model.values()) == {word}]
        for word in (NO_CLAIM, NOT_TESTED)
    )
    found = (
        f"By the rule, better than {than} on both models: {_and(better) or 'none'}; worse on both: {_and(worse) or 'none'}; "
        f"{NO_CLAIM} on either: {_and(neither) or 'none'}"
        f"{f'; {NOT_TESTED}, {_because(than)}: {_and(untested)}' if untested else ''}"
    )
    mixed = {name: set(by_model.values()) for name, by_model in both.items() if len(set(by_model.values())) > 1}
    claimed = {name: said & {"better", "worse"} for name, said in mixed.items()}
    for text, count in (("opposite on the two", 2), ("claimed on one of the two alone", 1), ("claimed on neither", 0)):
        names = [name for name, said in claimed.items() if len(said) == count]
        found += f"; {text}: {_and([_by_model(name_of(name), both[name]) for name in names])}" if names else ""
    return f"{found}.{f' Not judged on both yet: {_and(waiting)}.' if waiting else ''}"


def _on_one(words: dict[str, dict[str, str]], model: str, than: str) -> str:
    """What the rule says on one proxy, by its word."""
    parts = []
    for said, text in (
        ("better", f"better than {than}"),
        ("worse", "worse"),
        (NO_CLAIM, NO_CLAIM),
        (NOT_TESTED, f"{NOT_TESTED}, {_because(than)}"),
        (OPEN, "not judged yet"),
    ):
        names = [name_of(name) for name, by_model in words.items() if by_model.get(model) == said]
        if names or said in ("better", "worse"):
            parts.append(f"{text}: {_and(names) or 'none'}")
    return ", ".join(parts)


def _because(than: str) -> str:
    return f"because seeds of these or of {than} diverged"


def _by_model(name: str, words: dict[str, str]) -> str:
    return f"{name} ({', '.join(f'`{model}`: {said}' for model, said in words.items())})"


def word(row: Row) -> str:
    """The verdict on a method or variant."""
    if not row.settled:
        return OPEN
    if row.pair is None or row.pair.p is None:
        return NOT_TESTED
    return row.claim or (OPEN if row.waiting else NO_CLAIM)


def _verdict(word: str) -> Verdict | None:
    return "better" if word == "better" else "worse" if word == "worse" else None


def _gains(fair: Fair) -> list[str]:
    """The comparison that the paper probably makes, and the optimizer's part in it, for the paper's methods."""
    parts, provisional, ends, steps = [], False, False, set()
    for method in CANDIDATES:
        texts = []
        for model in fair.models:
            each = gains(fair, model, method)
            if each.as_paper is None or each.optimizer is None or each.optimizer_low is None:
                continue
            low, high = sorted((each.optimizer, each.optimizer_low))
            own = "" if each.at_own_best is None else f"; each at its own best pair {each.at_own_best:+.2f}"
            texts.append(f"{each.as_paper:+.2f} on `{model}` ({low:+.2f} to {high:+.2f} from the optimizer{own})")
            provisional = provisional or not settled(fair, model, method)
            ends = ends or bool(each.ends & {"as_paper", "optimizer", "optimizer_low", "at_own_best"})
            steps |= {int(run.setting("trainer.steps", 0)) for run in fair.runs("fair_rates", model, method)}
        if texts:
            parts.append(f"{name_of(method)} gains {' and '.join(texts)}")
    if not parts:
        return []
    return [
        "The paper probably compares Adam with all rates at 0.001 with candidates whose Adam group runs at 0.02 (if it shares "
        "the matrices' rate, as in the code base that the paper probably grew from; it does not say). Compared like that, "
        f"{_and([f'{each:,}' for each in sorted(steps)])} steps, in nats of loss: {'; '.join(parts)}. The optimizer's part is "
        "its gain at equal rates of the Adam group, both at 0.02 or both at 0.001, each method at its best matrix rate; the "
        "rest comes from rates. One seed, on which the rates were selected as well, so the best of a grid tends to be lucky"
        f"{'; some best matrix rates are at an end of those tried' if ends else ''}"
        f"{'; provisional: runs of these grids are missing' if provisional else ''}."
    ]


def _batches(fair: Fair) -> list[str]:
    parts = []
    for method in CANDIDATES:
        texts = []
        for model in fair.models:
            by_size = []
            for size in ("2k", "64k"):
                (ours, asked), (adam, of_adam) = (batch_runs(fair, model, n, size) for n in (method, REFERENCE))
                difference = gain(lowest(adam), lowest(ours)) if len(ours) == asked and len(adam) == of_adam else None
                by_size.append(difference)
            if None not in by_size:
                texts.append(f"{by_size[0]:+.2f} to {by_size[1]:+.2f} on `{model}`")
        if texts:
            parts.append(f"{name_of(method)} from {' and '.join(texts)}")
    if not parts:
        return []
    return [
        "From 2k to 64k tokens a step, at equal numbers of steps and so with 32 times the text, the gain over Adam goes, in "
        f"nats with one seed: {'; '.join(parts)}. Of two matrix rates the better counts, and the Adam group keeps its rate "
        "of 2k, so part of that may be rates."
    ]


def _longer(fair: Fair) -> list[str]:
    parts, steps = [], 0
    for model in fair.models:
        by_method = {name: long_runs(fair, model, name) for name in (REFERENCE, *CANDIDATES, "muon")}
        if not all(asked and len(runs) == asked for runs, asked in by_method.values()):
            continue
        best = {name: lowest(runs) for name, (runs, _) in by_method.items()}
        steps = int(next(run for run in best.values() if run).setting("trainer.steps", 0))
        gained = {name: gain(best[REFERENCE], run) for name, run in best.items() if name != REFERENCE}
        texts = [f"{name_of(name)} {value:+.2f}" for name, value in gained.items() if value is not None]
        parts.append(f"on `{model}` {_and(texts)}")
    if not parts:
        return []
    return [
        f"After {steps:,} steps the gain over Adam, each at the better of two matrix rates, is in nats with one seed: "
        f"{'; '.join(parts)}."
    ]


def _variants(fair: Fair) -> list[str]:
    """What the rule says of Alice's parts and of the open choices, once all seeds of all variants have ended."""
    rows = {model: [row for row in ablations(fair, model) if row.pair is not None] for model in fair.models}
    if not all(each and all(row.settled for row in each) for each in rows.values()):
        return []
    claims: dict[str, dict[str, str]] = {}
    for model, each in rows.items():
        for row in each:
            claims.setdefault(row.name, {})[model] = word(row)
    parts = []
    for verdict, text in (
        ("worse", f"worse than plain {name_of(PLAIN)}"),
        ("better", "better"),
        (NO_CLAIM, NO_CLAIM),
        (NOT_TESTED, f"{NOT_TESTED}, {_because(f'plain {name_of(PLAIN)}')}"),
    ):
        names = [variant_name(name) for name, words in claims.items() if set(words.values()) == {verdict}]
        if names or verdict != NOT_TESTED:
            parts.append(f"{text}: {_and(names) or 'none'}")
    mixed = [_by_model(variant_name(name), words) for name, words in claims.items() if len(set(words.values())) > 1]
    models = _and([f"`{model}`" for model in rows])
    return [
        f"Alice's variants by the rule, none tuned by itself, on {models} alike: {'; '.join(parts)}"
        f"{f'; differently on the two: {_and(mixed)}' if mixed else ''}."
    ]


# Under a variant's name in the plan alone one would not see that compensation is missing.
_VARIANTS = {
    "nothing": "none of the three parts",
    "tracking": "tracking only",
    "switch": "switching only",
    "tracking_switch": "no compensation",
    "full_basis": "no compensation (full basis)",
    "gaussian_mix": "no compensation (Gaussian mix)",
    "gaussian": "no compensation (Gaussian)",
    "fira_compensation": "Fira's compensation",
    "fira_plus_compensation": "Fira+'s compensation",
    "alice_last_layer": "last layer by Alice",
    "initial_gaussian": "first basis Gaussian",
    "initial_zeros": "first basis zeros",
    "rotated": "tracked matrix rotated",
    "free_signs": "signs as the solver gives them",
    "zero_based": "GaLore's update times",
    "no_warmup": "no warm-up",
}


def variant_name(name: str) -> str:
    """How pictures and sentences call a variant of Alice."""
    return _VARIANTS.get(name, name.replace("_", " "))


def _adam_anew(first: Fair, second: Fair) -> list[str]:
    """What stage 2 makes of Adam with rates chosen for beta_2 = 0.95, over the seeds that both have."""
    parts = []
    for model in first.models:
        old, new = (
            {run.seed: run.perplexity for run in fair.runs("fair_best", model, REFERENCE)} for fair in (first, second)
        )
        common = [seed for seed in old if seed in new]
        before, after = (mean([by_seed[seed] for seed in common]) for by_seed in (old, new))
        if before is not None and after is not None:
            seeds = f"the {len(common)} seeds that both have" if len(common) > 1 else "one seed"
            parts.append(f"{units.perplexity(after)} instead of {units.perplexity(before)} on `{model}` ({seeds})")
    if not parts:
        return []
    return [f"With rates chosen anew for beta_2 = 0.95, Adam ends stage 2 at a mean perplexity of {_and(parts)}."]


def _constants(fair: Fair) -> list[str]:
    """What other intervals and constants change, and what Alice's tracking and switching bring at each interval."""
    rows = {model: by_interval(fair, model) for model in fair.models}
    first = min((steps for found in rows.values() for runs in found.values() for steps in runs), default=0)
    changed, parts = [], []
    for model, found in rows.items():
        pairs = [
            (f"{name_of(name)} with {steps}", runs.get(first), run)
            for name, runs in found.items()
            for steps, run in runs.items()
            if steps > first
        ]
        other = untuned_changes(fair, model, "fair_constants")
        pairs += [(name_of(asked.name), before, run) for asked, before, run, _ in other if "_k" not in asked.name]
        known = [text for pair in pairs if (text := _change(*pair)) is not None]
        if known:
            missing = f" ({len(known)} of {len(pairs)} are known)" if len(known) < len(pairs) else ""
            changed.append(f"on `{model}` {_and([text for text in known if text]) or 'none'}{missing}")
        with_both, without = (found.get(name, {}) for name in ("tracking_switch", "nothing"))
        brought = {steps: gain(run, without.get(steps)) for steps, run in with_both.items()}
        values = [f"{value:+.2f} with {steps}" for steps, value in brought.items() if value is not None]
        if values:
            parts.append(f"on `{model}` {_and(values)}")
    sentences = []
    if changed:
        sentences.append(
            f"At rates chosen with {first} steps between refreshes, one seed, other intervals and constants change the final "
            f"loss by more than {OWED:g} nats (+: higher) in these cases: {'; '.join(changed)}."
        )
        sentences += _repetition(fair)
    if parts:
        printed = load_paper().tables["table5"]["rows"]
        theirs = math.log(printed["Tracking+Switch"] / printed["No tracking, switch, compen."])
        sentences.append(
            "Without compensation, tracking and switching change Alice's loss, by steps between refreshes (in the paper by "
            f"{theirs:+.2f} with 200): {'; '.join(parts)}."
        )
    return [" ".join(sentences)] if sentences else []


def _repetition(fair: Fair) -> list[str]:
    """The most that a run differs from the same one by other code."""
    pairs = [pair for model in fair.models for pair in repeats(fair, model)]
    differences = [(abs(gain(*pair) or 0.0), pair[1]) for pair in pairs]
    if not differences:
        return []
    largest, run = max(differences, key=lambda difference: difference[0])
    if not largest:
        return []
    return [
        f"One run less another is no finer than this: the same configuration and seed, by code that rounds differently, "
        f"differed by up to {largest:.3f} ({name_of(run.optimizer)} on `{run.model}`)."
    ]


def _change(what: str, before: Run | None, run: Run | None) -> str | None:
    """What has changed, "" if not enough to be named; None if it is not known yet."""
    if run is not None and not math.isfinite(run.perplexity):
        return f"{what} diverges"
    change = gain(run, before)
    if change is None:
        return None
    return f"{what} {change:+.3f}" if abs(change) > OWED else ""


# Variants of the ablations that are named beside methods.
_WITHOUT = {
    "tracking_switch": "Alice without compensation",
    "nothing": "Alice without compensation, tracking and switching",
    "alice_b3_98": "Alice with beta_3 0.98",
    "fira_scaled": "Fira with its code's residual",
}


def name_of(name: str) -> str:
    return _WITHOUT.get(name) or units.optimizer_name(name)


def _and(names: list[str]) -> str:
    return ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + names[-1] if names else ""
