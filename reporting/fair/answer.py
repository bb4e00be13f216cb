"""The answer of the fair comparison in a few sentences, made from its numbers and never saying more than they do."""

from __future__ import annotations

from collections.abc import Iterable

from .. import units
from ..statistics import Verdict, in_general
from .gains import batch_runs, gain, gains, grown, owed, settled
from .records import OWED, REFERENCE, Fair, Row, ablations, lowest, methods

CANDIDATES = ("alice", "racs")  # the paper's methods
NO_CLAIM, NOT_TESTED = "no difference claimed", "not tested"
NEAR = 0.03  # of configs/sweep/fair_rates.yaml and fair_control.yaml: pairs so near the best must have neighbours too


def answer(fair: Fair) -> list[str]:
    """Three to seven sentences; fewer, and saying so, while runs are missing."""
    tables = {model: methods(fair, model) for model in fair.models}
    done, asked = len(fair.runs()), len(fair.asked())
    found = []
    promised = owed(fair)
    if done < asked or promised or not grown(fair):
        more = "" if grown(fair) else ", and more as the grids of rates grow"
        found.append(
            f"**Not complete**: {done} of {asked} runs have ended{more}. Differences count only between methods whose seeds "
            "have all run; rates and gains below are provisional where their grids are."
        )
    if promised:
        names = _and([f"`{name}` on `{model}`" for model, name in promised])
        found.append(f"Owed by the rules: a grid of rates for {names}, which gained more than {OWED:g} nats untuned.")
    ready = {model: rows for model, rows in tables.items() if _settled(rows)}
    if not ready:
        found += [_so_far(tables), *_first_look(fair)]
    else:
        found += [*_leaders(ready), *_claims(ready, fair.models)]
    return [*found, *_gains(fair), *_batches(fair), *_variants(fair)]


def _settled(rows: Iterable[Row]) -> list[Row]:
    """Methods that can be held against Adam by the rule: all seeds of both have ended."""
    return [row for row in rows if row.pair is not None and row.settled]


def _so_far(tables: dict[str, list[Row]]) -> str:
    """Stage 2 before any method can be held against Adam: means over the seeds that all have, and that they claim nothing."""
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
    claims = "nothing is claimed about which method is better"
    if not parts:
        return f"Stage 2 tells nothing yet: {claims}."
    return f"Stage 2 so far, mean perplexities {'; '.join(parts)}. Seeds are missing, so {claims}."


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
    return [f"Stage 1, one seed, {within}: {'; '.join(parts)}.{_bigrams(fair)}"] if parts else []


def _bigrams(fair: Fair) -> str:
    """Where the best runs of stage 1 are no better than a bigram model counted on the same number of tokens."""
    parts = []
    for model in fair.models:
        best = [run for name in fair.plans.published if (run := fair.grid(model, name).best)]
        read = {(run.summary or {}).get("tokens") for run in best}
        bigram = next((each.bigram for each in fair.ngrams.get(model, ()) if {each.tokens} == read), None)
        above = [run for run in best if bigram is not None and run.perplexity >= bigram]
        if above and bigram is not None:
            counted = f"a bigram model counted on as many tokens ({units.perplexity(bigram)})"
            parts.append(
                f"On `{model}`, {len(above)} of the {len(best)} methods' best runs are no better than {counted}."
            )
    return "".join(f" {part}" for part in parts)


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
            said = "a difference by the rule" if first.claim else "no difference claimed"
            parts.append(f"{text}; Adam {_reference(reference)}: {said}{among})")
    if not parts:
        return []
    count = max(len(row.runs) for rows in ready.values() for row in rows)
    return [
        f"With each method at its own best rates, the lowest mean perplexity over {count} seeds has {_and(parts)}; only "
        "differences from Adam, and from Alice, are tested, not those between the others."
    ]


def _reference(row: Row) -> str:
    return units.perplexity(row.perplexity) if row.perplexity is not None else "not run"


def _claims(ready: dict[str, list[Row]], models: list[str]) -> list[str]:
    """What holds on all proxies, where they disagree, and what cannot be said."""
    claims: dict[str, dict[str, str]] = {}
    for model, rows in ready.items():
        for row in _settled(rows):
            tested = row.pair is not None and row.pair.p is not None
            claims.setdefault(row.name, {})[model] = (row.claim or NO_CLAIM) if tested else NOT_TESTED
    if len(ready) < len(models) or len(models) < 2:
        only = [f"{_list(claims, model)} on `{model}`" for model in ready]
        return [f"By the rule, {'; '.join(only)}. A statement about optimizers in general needs both models."]
    both = {name: by_model for name, by_model in claims.items() if len(by_model) == len(models)}
    general = {name: in_general([_verdict(word) for word in by_model.values()]) for name, by_model in both.items()}
    better, worse = ([name_of(n) for n, verdict in general.items() if verdict == word] for word in ("better", "worse"))
    neither, untested = (
        [name_of(name) for name, by_model in both.items() if set(by_model.values()) == {word}]
        for word in (NO_CLAIM, NOT_TESTED)
    )
    found = (
        f"By the rule, better than Adam on both models: {_and(better) or 'none'}; worse on both: {_and(worse) or 'none'}; "
        f"no difference claimed on either: {_and(neither) or 'none'}"
        f"{f'; not tested, because seeds diverged: {_and(untested)}' if untested else ''}."
    )
    names = {row.name for rows in ready.values() for row in rows if row.name != REFERENCE}
    waiting = [name_of(name) for name in sorted(names - both.keys())]
    found += f" Not judged on both yet: {_and(waiting)}." if waiting else ""
    split = {name: by_model for name, by_model in both.items() if len(set(by_model.values())) > 1}
    if not split:
        return [found]
    details = "; ".join(
        f"{name_of(name)} ({', '.join(f'`{model}`: {word}' for model, word in by_model.items())})"
        for name, by_model in split.items()
    )
    return [found, f"The models do not say the same about {details}: no statement in general."]


def _verdict(word: str) -> Verdict | None:
    return "better" if word == "better" else "worse" if word == "worse" else None


def _list(claims: dict[str, dict[str, str]], model: str) -> str:
    names = {word: [name_of(n) for n, by in claims.items() if by.get(model) == word] for word in ("better", "worse")}
    return f"better than Adam: {_and(names['better']) or 'none'}, worse: {_and(names['worse']) or 'none'}"


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


def _variants(fair: Fair) -> list[str]:
    """What the rule says of Alice's parts and of the open choices, once all seeds of all variants have ended."""
    rows = {model: [row for row in ablations(fair, model) if row.pair is not None] for model in fair.models}
    if not all(each and all(row.settled for row in each) for each in rows.values()):
        return []
    claims: dict[str, list[Verdict | None]] = {}
    for each in rows.values():
        for row in each:
            claims.setdefault(row.name, []).append(_verdict(row.claim or ""))
    parts = []
    for word, text in (("worse", "worse than plain Alice"), ("better", "better"), (None, "no difference claimed of")):
        names = [f"`{name}`" for name, words in claims.items() if set(words) == {word}]
        parts.append(f"{text} {_and(names) or 'none'}")
    split = _and([f"`{name}`" for name, words in claims.items() if len(set(words)) > 1])
    models = _and([f"`{model}`" for model in rows])
    return [
        f"Of Alice's variants, none tuned by itself, the rule calls, on {models} alike, {'; '.join(parts)}"
        f"{f'; the models differ about {split}' if split else ''}."
    ]


def name_of(name: str) -> str:
    return units.optimizer_name(name)


def _and(names: list[str]) -> str:
    return ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + names[-1] if names else ""
