"""The page of the fair comparison, results/fair/README.md, as sections: tables first, how it was made last.

sections = page(fair, out, figures)          out: folder of the page, which its links start from
sections = list_of_runs(fair, out)           of the page beside it, runs.md
text = summary(fair, out, own, figures)      for another page
text = write(sections)
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .. import units
from ..statistics import RULE
from ..text import NOT_RUN, anchor
from .answer import NEAR, answer, name_of
from .circumstances import commit_of, everything, made, progress
from .gains import CANDIDATE_RATE, gain
from .records import FLAT, OWED, REFERENCE, Fair, again, methods, missed, repeats, wall_clock
from .tables import (
    CHOICES,
    PARTS,
    batch,
    both_betas,
    constants,
    elsewhere,
    gains_table,
    group_rates,
    intervals,
    lengths,
    longer,
    luck,
    repeat,
    stage_1,
    stage_2,
    stage_2_against_plain,
    stage_2_beside,
    steps_table,
    untuned,
    variants,
    verdicts,
)

RUNS = "runs.md"  # the page of all runs, beside this one


@dataclass(frozen=True)
class Section:
    """A heading and the markdown under it; the first section's title is the page's."""

    title: str
    body: str


@dataclass(frozen=True)
class Source:
    """What sections are made from: the records, the folder of the page, and its pictures by name, as links."""

    fair: Fair
    out: Path
    pictures: Mapping[str, str]

    def picture(self, name: str, alt: str) -> str:
        """A picture, or "" if there is none."""
        return f"![{alt}]({self.pictures[name]})" if name in self.pictures else ""

    def by_model(self, table: Callable[[Fair, str, Path], str], sweep: str) -> str:
        """A table for each model that has runs of the sweep, where there is anything to show."""
        models = [model for model in self.fair.models if self.fair.runs(sweep, model)]
        tables = {model: table(self.fair, model, self.out) for model in models}
        return _join(*(_join(f"**`{model}`**", text) for model, text in tables.items() if text))

    def part(self, sweep: str, *texts: str) -> str:
        """The body of a section whose tables need a sweep."""
        return _join(*texts) if self.fair.runs(sweep) else f"{NOT_RUN.capitalize()}."


def page(fair: Fair, out: Path, figures: Iterable[Path]) -> list[Section]:
    """The sections of the page in the folder `out`; `figures`: the pictures that there are, as PNG."""
    source = Source(fair, out, {path.stem: os.path.relpath(path, out) for path in figures})
    rest = [
        Section("Stage 2: each method at its best rates", _stage_2(source)),
        Section("Again with beta_2 = 0.95", _again(source)),
        Section("Stage 1: rates", _stage_1(source)),
        Section("What the optimizer gains, and what the Adam group's rate gains", _gains(source)),
        Section("Ablations: the parts of Alice", _parts(source)),
        Section("Open choices", _choices(source)),
        Section("Batch size", _batch(source)),
        Section("Other text, other steps", _elsewhere(source)),
        Section("The same run twice", _repeat(source)),
        Section("What was not tuned", _untuned(source)),
        Section("Steps between refreshes, and other constants", _constants(source)),
        Section("Longer runs", _longer(source)),
        Section("How it was made", _join(made(fair), f"[Every run]({RUNS}) with its rates, result and record.")),
    ]
    contents = "\n".join(f"- [{section.title}](#{anchor(section.title)})" for section in rest)
    return [Section("The fair comparison: what came out", _join(_beginning(source), contents)), *rest]


def list_of_runs(fair: Fair, out: Path) -> list[Section]:
    """The sections of the page with all runs."""
    return [Section("The fair comparison: every run", everything(fair, out))]


def summary(fair: Fair, out: Path, own: Path, figures: Iterable[Path]) -> str:
    """The answer and its pictures for another page, in the folder `out`; `own`: the page of the fair comparison."""
    source = Source(fair, out, {path.stem: os.path.relpath(path, out) for path in figures})
    return _join(
        "What the paper's comparison leaves open: eleven methods tuned alike on two small models, on other text, at the "
        f"beginning of training ([all of it]({os.path.relpath(own, out)}), [rules](../docs/fair_comparison.md)).",
        "\n".join(f"- {sentence}" for sentence in answer(fair)),
        source.picture("curves", "Validation perplexity over steps, all methods, both models"),
        source.picture("gains", "What the rates gain and what the optimizer gains"),
    )


def _beginning(source: Source) -> str:
    return _join(
        "Every method tuned alike on two small models; [the rules](../../docs/fair_comparison.md) say when each of them was "
        "fixed. `llama_tiny` has 3.7M parameters, 86 % of them in attention and MLP matrices, `llama_tiny_4k` 1.8M and 43 %. "
        "A method updates those matrices, at its matrix rate; all else (embeddings, norms, last layer), the Adam group, is "
        "updated by Adam at a rate of its own. The text is Wikipedia in C4's file layout, not C4. This page is made from the "
        "records by `python scripts/fair_report.py`.",
        "\n".join(f"- {sentence}" for sentence in answer(source.fair)),
        _with_words(
            "The rule's verdicts: is the method better or worse than the one that heads the column?",
            verdicts(source.fair),
        ),
        progress(source.fair),
    )


def _stage_2(source: Source) -> str:
    return source.part(
        "fair_best",
        f"{_budget(source.fair, 'fair_best')} Perplexity on held-out text of the same source: mean ± standard deviation over "
        "seeds. Difference: mean final loss less Adam's, in nats (0.01 is about 1 % of perplexity), with its 95 % interval.",
        f"> {RULE}",
        source.by_model(_with_ngrams(stage_2, "fair_best"), "fair_best"),
        "The same held against plain Alice, a family of tests of its own, in which Adam counts: the two are not corrected "
        "together, and on Adam and Alice the first decides.",
        source.by_model(stage_2_against_plain, "fair_best"),
        source.picture("curves", "Validation perplexity over steps, all methods, both models"),
        "**How to read these.** p is after Holm's correction over all methods of the table. Tests and intervals are over "
        "seeds, at fixed rates and on the same validation rows. Runs of one seed share initialisation and text, which Welch's "
        "test does not use: it mostly finds less than a test of pairs would, and no claimed difference is not equality. "
        "Same seeds: in how many of the seeds that both have the loss is lower, and the interval of the mean difference "
        "between runs of one seed; a description, of which no claim is made. A grid with factors of 3, chosen at 600 steps, "
        "can miss a method's best rates by some hundredths of a nat (a parabola through the best matrix rate and its "
        f"neighbours in stage 1 lies up to {missed(source.fair):.2f} below the best), so a difference smaller than that may "
        "be one of rates even where the rule claims it.",
        "**The same runs on other text, their speed and memory.** Unseen rows: other validation rows of the same source, on "
        "which no rate was chosen; C4: its validation text, out of the domain. Below the perplexity the difference of losses "
        "to Adam's there, with its interval. Speed-up: all steps over the steps to the first evaluation (every 100) at or "
        "under Adam's final mean perplexity, so up to 100 steps too late: at least so much. States are the optimizer's, all "
        "parameters together. Seeds link to their records.",
        source.by_model(stage_2_beside, "fair_best"),
        *_clock_notes(source.fair),
        source.picture("speedup", "Speed-up over Adam in steps and in time"),
        source.picture("memory", "Final perplexity against the memory of optimizer states"),
    )


def _again(source: Source) -> str:
    """Stages 1 and 2 with the other beta_2: the tables of the first, from other runs."""
    second = replace(source, fair=again(source.fair))
    return second.part(
        "fair_rates",
        "Adam's default beta_2 of 0.999 averages over 1,000 steps, more than stage 1 has, and other values gained "
        "([below](#what-was-not-tuned)); Muon's and SOAP's own code have 0.95 where these have Adam. So both stages run a "
        "second time with beta_2 = 0.95 in every Adam: Adam and AdamW, "
        "the moments of GaLore, Fira and both Apollos, and the Adam group of every method. The betas that Alice (0.9) and "
        "SOAP (0.95) have published for their matrices stay; SOAP has its published interval of 10 steps instead of 12 and 24. "
        "Grids, seeds and rule are the same; Adam and Alice of this section are the references here.",
        second.by_model(_with_ngrams(stage_2, "fair_best"), "fair_best"),
        second.by_model(stage_2_against_plain, "fair_best"),
        _with_words(
            "Both values side by side, each with the rates chosen for it (SOAP's interval differs as well): perplexities over "
            "the seeds that both have, in how many of these 0.95 has the lower loss, and the interval of the mean difference "
            "between runs of one seed. No test is made.",
            source.by_model(both_betas, "fair_best_b95"),
        ),
        source.picture("curves_b95", "Validation perplexity over steps with beta_2 = 0.95"),
        _with_words("The runs of these tables:", second.by_model(stage_2_beside, "fair_best")),
        "The grids of rates:",
        second.by_model(stage_1, "fair_rates"),
    )


def _with_ngrams(table: Callable[[Fair, str, Path], str], sweep: str) -> Callable[[Fair, str, Path], str]:
    """The table, and below it what n-gram models reach that were counted on as much text as its runs read."""

    def both(fair: Fair, model: str, out: Path) -> str:
        ended = [run.summary for run in fair.runs(sweep, model) if run.summary]
        read, targets = ({summary.get(key) for summary in ended} for key in ("tokens", "validation_tokens"))
        by_tokens = {each.tokens: each for each in fair.ngrams.get(model, ()) if {each.targets} == targets}
        equal, whole = by_tokens.get(next(iter(read))) if len(read) == 1 else None, by_tokens.get(None)
        if equal is None or whole is None:
            return table(fair, model, out)
        return _join(
            table(fair, model, out),
            "For comparison: an interpolated bigram model counted on as many tokens as a run reads has "
            f"{units.perplexity(equal.bigram)}, counted on all training text {units.perplexity(whole.bigram)}; a unigram "
            f"{units.perplexity(equal.unigram)} ([record]({os.path.relpath(equal.path, out)})).",
        )

    return both


def _stage_1(source: Source) -> str:
    return source.part(
        "fair_rates",
        f"{_budget(source.fair, 'fair_rates')} A grid of matrix rate by rate of the Adam group for each method, grown until "
        f"the best pair, and every pair within {100 * NEAR:g} % of its perplexity, has neighbours on all four sides, or the "
        "last rates allowed are reached. A grid that has grown is no full rectangle: its matrix rates have been tried with "
        "unequal numbers of rates of the Adam group. Interior: the best pair has worse neighbours on all four sides. The "
        "best of many runs with one seed tends to be lucky: no difference is claimed here. Near the best: the matrix rates "
        f"whose best perplexity is at most {100 * (FLAT - 1):.0f} % higher; where they reach the first or the last rate "
        f"tried, an end of the grid, there may be more. At the published matrix rate: with {CANDIDATE_RATE:g} for the Adam "
        "group.",
        source.by_model(_with_ngrams(stage_1, "fair_rates"), "fair_rates"),
        source.picture("group_rate", "Final perplexity against the rate of the Adam group"),
        source.picture("sensitivity", "Final perplexity against the matrix rate over its best value"),
        _with_words(
            "Seed 42, on which rates were selected, beside other seeds at the same rates, from the ablations: how easy that "
            "seed is, and how lucky the selected runs are.",
            luck(source.fair),
        ),
    )


def _with_words(words: str, table: str) -> str:
    return _join(words, table) if table else ""


def _gains(source: Source) -> str:
    return source.part(
        "fair_rates",
        "The paper's Adam has one rate, 0.001 (1.3B: 0.0007), for everything. Its candidates train embeddings, norms and last "
        "layer at 0.02, if they share the matrices' rate as in the code base that the paper probably grew from (it does "
        "not say). Lowest perplexity over matrix rates (in brackets: that rate) at each rate of the Adam group, one seed. "
        "†: the smallest or largest of the matrix rates tried there, or the only one.",
        source.by_model(group_rates, "fair_rates"),
        "Gains in nats of final loss, positive is better; one seed, on which the rates were selected as well. *As the paper "
        "probably compares*: Adam with both rates at 0.001 against the method with its Adam group at 0.02 and its best "
        "matrix rate. That is the sum of *from the rates* (the same Adam with its Adam group at 0.02 and its best matrix "
        "rate there) and *from the optimizer* (against that Adam). With the optimizer changed first, both Adam groups still "
        "at 0.001, its part is *optimizer, groups at 0.001*, and the rates have the rest: how the sum divides depends on "
        "that order, so the optimizer's part is given as a range. *Group rate within the method*: from 0.001 to its best rate "
        "of the Adam group. †: made with a best matrix rate that is marked above.",
        gains_table(source.fair),
        source.picture("gains", "What the rates gain and what the optimizer gains"),
        _with_words(
            "How the gain over Adam changes with the number of steps of 2k tokens, each method at its best pair of stage 1, "
            "which was chosen at 600 steps, of the longest runs the better of two matrix rates, single seeds:",
            lengths(source.fair),
        ),
    )


def _parts(source: Source) -> str:
    return source.part(
        "fair_ablations",
        f"{_budget(source.fair, 'fair_ablations')} Every variant at the best rates of stage 1 of its method (Alice, in the "
        "last table GaLore and RACS too), none tuned by itself: a variant that makes the update smaller or larger, as all "
        "without compensation do, is judged at a rate that suits another. Difference to plain Alice in nats of final loss with "
        "its 95 % interval, which does not pair seeds; p after Holm's correction over all of Alice's variants, here and in the "
        "next section; then in how many of the seeds that both have the loss is lower, and the interval of the mean "
        "difference between runs of one seed, a description. Negative is better. Variants of RACS and of GaLore, and steps "
        "from variant to variant, are in no family of tests.",
        variants(source.fair, PARTS, source.out),
        source.picture("ablations", "Difference of each variant to plain Alice"),
        "**The steps that the paper's Table 5 and Figure 5 show**, at 130M there and here: final perplexities before "
        "and after (mean ± standard deviation), and the difference of losses in nats. Intervals are of single comparisons, "
        "without correction: no significance is claimed; where one holds 0 the sign is not told apart. In "
        "Figures 5a to 5c the paper's Alice trains the last layer itself, "
        'ours leaves it to Adam; in 5d the paper\'s "lm head" means that Adam trains it.',
        steps_table(source.fair),
    )


def _choices(source: Source) -> str:
    return source.part(
        "fair_ablations",
        "What the paper leaves open ([deviations](../../docs/deviations.md)): the other choice against plain Alice, as "
        "above and in the same family of tests.",
        variants(source.fair, CHOICES, source.out),
    )


def _batch(source: Source) -> str:
    return source.part(
        "fair_batch",
        f"{_budget(source.fair, 'fair_batch')} The better of the best matrix rate of stage 1 and three times it, with "
        "the rate in brackets, and below it the loss less Adam's at the same batch. Of two rates the better one is always at "
        "an end of those tried: a still larger or smaller one may be better. Steps are equal, so larger batches see more "
        "text: in brackets, in all. Alice refreshes its bases every 4 steps here, every 24 in stage 2. The last column, of "
        "stage 2, is for a comparison with 16k at more nearly equal text; the "
        "[longer runs](#longer-runs) read about as much as 64k does. No significance is claimed.",
        source.by_model(batch, "fair_batch"),
    )


def _elsewhere(source: Source) -> str:
    fair = source.fair
    if not fair.elsewhere or not fair.runs("fair_rates"):
        return f"{NOT_RUN.capitalize()}."
    return _join(
        f"The same methods in `make compare` ([records]({os.path.relpath(fair.elsewhere[0].path.parent, source.out)})): the "
        "embedded text instead of Wikipedia, larger steps and fewer of them, Alice's bases refreshed less often, each method "
        "at the best pair of a grid of nine that did not grow, its rate of the Adam group for all the largest one tried. All "
        "of that differs at once, so no cause can be named; it shows how far an order holds. No significance is claimed.",
        elsewhere(fair, source.out),
    )


def _repeat(source: Source) -> str:
    fair = source.fair
    pairs = [pair for model in fair.models for pair in repeats(fair, model)]
    text = "Equal configuration and seed, run again: what repetition alone changes."
    if any(gain(*pair) and commit_of(pair[0]) != commit_of(pair[1]) for pair in pairs):
        text += (
            " Where commits and numbers differ, the code of a step has become faster in between and rounds differently: "
            "that is what rounding grows to within a run, and a smaller difference between two runs means nothing."
        )
    text += (
        " What [was not tuned](#what-was-not-tuned) and [constants](#steps-between-refreshes-and-other-constants) ran by the "
        "code of the second and are held against it; its rates and seed are still those that were selected."
    )
    return source.part("fair_repeat", text, repeat(fair, source.out))


def _once_more(fair: Fair) -> str:
    """What a change at one seed is held against; see gains.unchanged."""
    missing = len(fair.runs("fair_again")) < len(fair.asked("fair_again"))
    rest = "; until that has ended, stage 1's" if missing else ""
    return f"[run once more](#the-same-run-twice) by the same code{rest}"


def _untuned(source: Source) -> str:
    return source.part(
        "fair_adam",
        f"{_budget(source.fair, 'fair_adam')} Adam's averages and SOAP's published interval, at the best pair of stage 1; "
        f"difference to the run of the same seed without the change ({_once_more(source.fair)}): negative is better. Adam has "
        f"seven tries here, the others one or two. For gains of more than {OWED:g} nats (bold) the rules ask for a grid and a "
        "row: those "
        "[with beta_2 = 0.95](#again-with-beta_2--095). No significance is claimed.",
        source.by_model(untuned, "fair_adam"),
    )


def _constants(source: Source) -> str:
    return source.part(
        "fair_constants",
        f"{_budget(source.fair, 'fair_constants')} At the best pair of stage 1, which was chosen with 12 steps between "
        "refreshes; Alice, GaLore, Fira and Apollo publish 200. Below each perplexity the loss less that of the same row with "
        f"12 ({_once_more(source.fair)}). A description: no significance is claimed, no rate was chosen again, no other table "
        "changes.",
        source.by_model(intervals, "fair_constants"),
        _with_words(
            "Other constants, with 12 steps; difference to the run of the same seed without the change:",
            source.by_model(constants, "fair_constants"),
        ),
    )


def _longer(source: Source) -> str:
    return source.part(
        "fair_long",
        f"{_budget(source.fair, 'fair_long')} Ten times those of stage 1, at its best rates and at 0.3 times the matrix rate. "
        "No significance is claimed.",
        source.by_model(longer, "fair_long"),
    )


def write(sections: Sequence[Section]) -> str:
    return (
        "\n\n".join(f"{'##' if i else '#'} {section.title}\n\n{section.body}" for i, section in enumerate(sections))
        + "\n"
    )


def _budget(fair: Fair, sweep: str) -> str:
    """Steps, tokens a step and seeds of a sweep, from its records."""
    runs = fair.runs(sweep)
    if not runs:
        return f"{NOT_RUN.capitalize()} yet."
    steps = "; ".join(f"{step:,}" for step in sorted({int(run.setting("trainer.steps", 0)) for run in runs}))
    seeds = {(asked.model, asked.name, asked.seed) for asked in fair.asked(sweep) if asked.folder in fair.ended}
    counts = Counter((model, name) for model, name, _ in seeds).values()
    low, high = min(counts), max(counts)
    number = f"{low} to {high} seeds" if low < high else "one seed" if high == 1 else f"{high} seeds"
    return f"{steps} steps, {number}."


def _clock_notes(fair: Fair) -> list[str]:
    notes = []
    for model in fair.models:
        rows = methods(fair, model)
        found, why = wall_clock(rows)
        if why and any(row.runs for row in rows):
            notes.append(f"Speed-up in time on `{model}` is not shown: {why}.")
        elif parts := [f"{name_of(name)} {value:.2f}" for name, value in found.items() if name != REFERENCE]:
            notes.append(
                f"Speed-up in seconds of training on `{model}` (runs at once and hardware: below): {', '.join(parts)}. "
                "Small models on a CPU say little about a method's cost on large ones."
            )
    return notes


def _join(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)
