"""The fair comparison's report on records whose perplexities are known."""

import json
import math
import re
import shutil
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from scipy import stats
from scipy.optimize import minimize_scalar

from reporting.fair import readme
from reporting.fair.answer import FIRST, SECOND, answer, verdicts_in_words
from reporting.fair.axes import unfinished
from reporting.fair.circumstances import made, progress
from reporting.fair.deviations import effect, fill
from reporting.fair.figures import available, draw
from reporting.fair.gains import at_end, batch_runs, best_at, gains, owed, settled
from reporting.fair.page import list_of_runs, page, summary, write
from reporting.fair.records import (
    Fair,
    Grid,
    Row,
    ablations,
    against_plain,
    load_fair,
    methods,
    missed,
    repeats,
    wall_clock,
)
from reporting.fair.tables import (
    CHOICES,
    PARTS,
    batch,
    both_betas,
    constants,
    elsewhere,
    gains_table,
    intervals,
    lengths,
    longer,
    luck,
    p_value,
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
from scripts.fair_report import plans
from tests.reporting.fair_plans import BEST, MODELS, STEPS, perplexity, write_plans
from tests.reporting.fair_records import write_fair
from tests.reporting.synthetic import write_run

TINY, TINY_4K = MODELS


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    write_fair(root / "runs", write_plans(root / "plans"), perplexity)
    return root


@pytest.fixture(scope="module")
def fair(whole):
    return load(whole)


def load(root: Path) -> Fair:
    return load_fair(root / "runs", plans(root / "runs", root / "plans"))


def without(fair: Fair, *patterns: str) -> Fair:
    """The comparison before some runs had ended."""
    gone = {folder for folder in fair.ended for pattern in patterns if fnmatch(folder, pattern)}
    assert gone
    return Fair(fair.plans, {folder: run for folder, run in fair.ended.items() if folder not in gone})


def changed(fair: Fair, folder: str, diverged: int | None = None, **summary: float) -> Fair:
    """The comparison with another outcome of one run."""
    run = fair.ended[folder]
    other = (
        replace(run, summary={**run.summary, **summary})
        if diverged is None
        else replace(run, diverged={"step": diverged})
    )
    return Fair(fair.plans, {**fair.ended, folder: other})


def cells(table: str, start: str) -> list[str]:
    """The cells of the row that starts so, without links."""
    line = next(line for line in table.splitlines() if line.startswith(f"| {start} |"))
    return [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", cell.strip()) for cell in line.strip("|").split("|")]


def by_name(rows: list[Row]) -> dict[str, Row]:
    return {row.name: row for row in rows}


# Stage 1 ---------------------------------------------------------------------------------------------------------------


def test_the_best_pair_of_a_grid_that_has_grown(fair):
    grid = fair.grid(TINY, "racs")
    assert (grid.best.lr, grid.best.adam_lr) == BEST["racs"][:2]
    assert grid.finished and grid.interior
    assert len(grid.runs) == grid.asked > 9
    assert max(grid.profile()) == 0.6  # a worse neighbour beyond the best


def test_the_range_of_matrix_rates_near_the_best():
    def grid_of(profile):
        runs = [SimpleNamespace(lr=lr, adam_lr=0.02, perplexity=value) for lr, value in profile.items()]
        return Grid(runs, len(runs), finished=True, interior=True)

    assert grid_of({1.0: 104.0, 3.0: 100.0, 10.0: 105.0, 30.0: 106.0}).flat() == (1.0, 10.0, True)
    assert grid_of({1.0: 106.0, 3.0: 100.0, 10.0: 106.0, 30.0: 101.0}).flat() == (3.0, 3.0, False)  # in one piece
    assert grid_of({1.0: math.inf, 3.0: math.inf}).flat() is None


def test_stage_1_names_best_pair_and_published_rate(fair, whole):
    row = cells(stage_1(fair, TINY, whole), "RACS")
    there = 61 * math.exp(0.1 * math.log(10))
    assert row[1:6] == ["0.2", "0.02", "61.00", str(len(fair.grid(TINY, "racs").runs)), "yes"]
    assert row[-2:] == ["0.02", f"{there:.2f}"]


def test_rates_near_the_best_at_an_end_of_the_grid_are_said(fair, whole):
    def near(profile):
        runs = [
            SimpleNamespace(lr=lr, adam_lr=0.02, perplexity=value, path=whole / "run", optimizer="racs")
            for lr, value in profile.items()
        ]
        plans = SimpleNamespace(published={"racs": 0.02})
        known = SimpleNamespace(
            plans=plans, grid=lambda model, name: Grid(runs, len(runs), finished=True, interior=True)
        )
        return cells(stage_1(known, TINY, whole), "RACS")[6]

    assert near({0.006: 60.0, 0.02: 50.0, 0.06: 60.0}) == "0.02 alone"
    assert near({0.02: 50.0, 0.06: 60.0}) == "0.02 alone, an end of the grid"
    assert near({0.006: 60.0, 0.02: 50.0, 0.06: 51.0, 0.2: 70.0}) == "0.02 to 0.06 (× 3)"
    assert near({0.006: 60.0, 0.02: 50.0, 0.06: 51.0}) == "0.02 to 0.06 (× 3), an end of the grid"


def test_an_unfinished_grid_is_provisional_and_counts_its_runs(whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "runs/fair_rates/llama_tiny/alice-lr0.02-adam0.006-s42")  # the best
    fair = load(tmp_path)
    row = cells(stage_1(fair, TINY, tmp_path), "Alice")
    assert row[4:6] == ["8 of 9", "provisional"]
    assert unfinished(fair) == ["alice"]
    assert not settled(fair, TINY, "alice") and settled(fair, TINY_4K, "alice")


def test_a_grid_in_which_everything_diverged_says_so(tmp_path):
    value = lambda sweep, job, name: math.inf if job.optimizer == "racs" else perplexity(sweep, job, name)  # noqa: E731
    write_fair(tmp_path / "runs", write_plans(tmp_path / "plans"), value)
    fair = load(tmp_path)
    row = cells(stage_1(fair, TINY, tmp_path), "RACS")
    assert row[3] == "all diverged" and row[4] == "9 of 9, 9 diverged"
    assert "Not run: RACS." in stage_2(fair, TINY, tmp_path)


# Stage 2 ---------------------------------------------------------------------------------------------------------------


def test_differences_are_those_of_mean_losses_with_welch_and_holm(fair):
    rows = by_name(methods(fair, TINY))
    losses = {name: [math.log(run.perplexity) for run in row.runs] for name, row in rows.items()}
    p = {name: stats.ttest_ind(losses[name], losses["adam"], equal_var=False).pvalue for name in ("alice", "racs")}
    assert rows["alice"].pair.test.difference == pytest.approx(math.log(50 / 60))
    assert rows["alice"].pair.p == pytest.approx(2 * p["alice"])  # the smaller of two
    assert rows["racs"].pair.p == pytest.approx(max(2 * p["alice"], p["racs"]))
    assert [row.name for row in methods(fair, TINY)] == ["alice", "adam", "racs"]
    assert rows["alice"].claim == "better" and rows["racs"].claim == "worse" and rows["adam"].pair is None


def test_the_speedup_is_counted_in_evaluations_of_the_mean_curve(fair):
    rows = by_name(methods(fair, TINY))
    target = sum(run.perplexity for run in rows["adam"].runs) / 3
    curves = [dict(zip(run.evals["step"], run.evals["perplexity"], strict=True)) for run in rows["alice"].runs]
    first = next(step for step in curves[0] if sum(curve[step] for curve in curves) / 3 <= target)
    assert 2 < first < STEPS
    assert rows["alice"].speedup == STEPS / first
    assert rows["adam"].speedup == 1
    assert rows["racs"].speedup is None


def test_the_speedup_is_over_the_references_same_seeds(fair):
    whole_row = by_name(methods(fair, TINY))["alice"]
    fair = changed(fair, "fair_best/llama_tiny/adam-s45", perplexity=1e9)  # a target that anything reaches at once
    assert by_name(methods(fair, TINY))["alice"].first < whole_row.first
    row = by_name(methods(without(fair, "fair_best/llama_tiny/alice-s45"), TINY))["alice"]
    assert row.first == pytest.approx(whole_row.first, abs=2), "seeds 43 and 44 of both"


def test_the_table_of_stage_2_shows_spread_and_c4(fair, whole):
    table = stage_2(fair, TINY, whole)
    values = [50 * math.exp(0.005 * seed) for seed in (-1, 0, 1)]
    mean, deviation = sum(values) / 3, (sum((v - sum(values) / 3) ** 2 for v in values) / 2) ** 0.5
    row = cells(table, "Alice")
    assert row[3] == f"{mean:.2f} ± {deviation:.2f}"
    assert row[6] == "better"
    there = f"<br>{row[4]}"  # all perplexities are multiples, so all differences of losses are the same
    beside = stage_2_beside(fair, TINY, whole)
    row = cells(beside, "Alice")
    assert row[1] == f"{1.5 * mean:.2f} ± {1.5 * deviation:.2f}{there}", "without the rows on which rates were chosen"
    assert row[2] == f"{2 * mean:.1f} ± {2 * deviation:.2f}{there}"
    assert "<br>" not in cells(beside, "Adam")[1]
    assert row[-1] == "43, 44, 45" and cells(beside, "RACS")[3] == "never"
    assert "(runs/fair_best/llama_tiny/alice-s44)" in beside


def test_bigrams_counted_on_as_much_text_as_a_run_reads_stand_below_the_table(whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "runs/fair_ngrams").mkdir()
    summary = load(tmp_path).runs("fair_rates", TINY)[0].summary
    read, targets = summary["tokens"], summary["validation_tokens"]
    cases = [{"tokens": n, "unigram": 300.0, "bigram": b} for n, b in ((read - 1, 70.0), (read, 65.5), (None, 59.5))]
    record = tmp_path / f"runs/fair_ngrams/{TINY}.json"
    record.write_text(json.dumps({"cases": cases, "validation_tokens": targets + 1}))
    assert "For comparison" not in write(page(load(tmp_path), tmp_path / "fair", []))  # of other rows
    record.write_text(json.dumps({"cases": cases, "validation_tokens": targets}))
    text = write(page(load(tmp_path), tmp_path / "fair", []))
    line = next(line for line in text.splitlines() if line.startswith("For comparison"))
    assert "a run reads has 65.50" in line and "all training text 59.50" in line and "unigram 300.0" in line
    assert f"](../runs/fair_ngrams/{TINY}.json)" in line
    record.write_text("{}")
    with pytest.raises(ValueError, match=r"no record of scripts/ngrams\.py: restore it\."):
        load(tmp_path)


def test_no_difference_is_claimed_while_seeds_are_missing(fair, whole):
    fair = without(fair, "fair_best/llama_tiny/adam-s45")
    assert by_name(methods(fair, TINY))["alice"].pair.verdict == "better"  # by what is there
    assert by_name(methods(fair, TINY))["alice"].claim is None
    assert cells(stage_2(fair, TINY, whole), "Alice")[6] == "open: seeds are missing"
    assert cells(stage_2_beside(fair, TINY, whole), "Adam")[-1] == "43, 44 (2 of 3)"


def test_alice_is_the_reference_of_a_second_family(fair, whole):
    table = stage_2_against_plain(fair, TINY, whole)
    assert cells(table, "Alice")[1] == "reference"
    adam = by_name(against_plain(fair, TINY))["adam"]
    assert adam.pair.test.difference == pytest.approx(math.log(60 / 50)) and adam.claim == "worse"
    assert "| Adam |" not in table, "the first family decides on Adam and Alice"
    assert cells(table, "RACS")[3] == "worse"


def test_a_method_that_has_not_run_makes_no_other_claim_easier(fair, whole):
    before = by_name(methods(fair, TINY))["alice"].pair.p
    fair = without(fair, "fair_best/llama_tiny/racs-*")
    assert by_name(methods(fair, TINY))["alice"].pair.p == pytest.approx(before)
    assert "Not run: RACS." in stage_2(fair, TINY, whole)


def test_without_adam_nothing_is_compared(fair, whole):
    alone = without(fair, "fair_best/llama_tiny/adam-*")
    assert cells(stage_2(alone, TINY, whole), "Alice")[4:] == ["the reference has not run", "–", "–", "–"]
    assert cells(stage_2_beside(alone, TINY, whole), "Alice")[3] == "–"


def test_seeds_are_counted_against_the_references_run_with_the_same_seed(fair, whole):
    assert [by_name(methods(fair, TINY))[name].paired.lower for name in ("alice", "racs")] == [3, 0]
    fair = changed(fair, "fair_best/llama_tiny/alice-s44", perplexity=70.0)  # above Adam's 60
    fair = without(fair, "fair_best/llama_tiny/adam-s45")
    assert by_name(methods(fair, TINY))["alice"].paired.seeds == 2
    assert cells(stage_2(fair, TINY, whole), "Alice")[7].startswith("1 of 2 [-")
    assert cells(stage_2(fair, TINY, whole), "Adam")[7] == "–"
    assert cells(stage_2_against_plain(fair, TINY, whole), "RACS")[4].startswith("1 of 3 [-")


def test_a_diverged_seed_is_neither_averaged_nor_claimed(fair, whole):
    fair = changed(fair, "fair_best/llama_tiny/alice-s44", diverged=7)
    row = cells(stage_2(fair, TINY, whole), "Alice")
    assert row[3] == "1 of 3 diverged" and "1 of 3 diverged: no test" in row[4]
    assert cells(stage_2_beside(fair, TINY, whole), "Alice")[1:3] == ["–", "–"]
    assert by_name(methods(fair, TINY))["alice"].claim is None
    assert "has Adam on `llama_tiny` (60.00)" in " ".join(answer(fair))  # not Alice, whose mean is infinite
    assert "diverged at step 7" in write(list_of_runs(fair, whole))


def test_a_reference_that_diverged_has_run(fair, whole):
    fair = changed(fair, "fair_best/llama_tiny/adam-s44", diverged=7)
    assert cells(stage_2(fair, TINY, whole), "Alice")[4] == "1 of 3 of the reference diverged: no test"
    assert "`llama_tiny`: not tested" in " ".join(answer(fair))
    text = " ".join(answer(changed(fair, "fair_best/llama_tiny_4k/adam-s44", diverged=7)))
    assert "not tested, because seeds of these or of Adam diverged: Alice and RACS" in text
    assert "no difference claimed on either: none" in text


def test_the_lowest_mean_is_said_to_be_of_those_that_have_ended(fair):
    text = " ".join(answer(without(fair, "fair_best/llama_tiny/alice-s45")))
    assert "has Adam on `llama_tiny` (60.00, of the 2 of 3 methods whose seeds have all ended)" in text
    assert "Not judged on both yet: Alice." in text


def test_how_far_a_parabola_through_the_grid_lies_below_its_best(fair):
    assert missed(fair) < 0.03  # straight lines down to the best pair, with equal slopes
    value = 50.0 * math.exp(0.001)  # nearly as good as the best: the lowest point is about half way
    low = changed(fair, "fair_rates/llama_tiny/alice-lr0.06-adam0.006-s42", perplexity=value)
    x = [math.log(lr / 0.02) for lr in (0.006, 0.02, 0.06)]
    y = [math.log(perplexity / 50.0) for perplexity in low.grid(TINY, "alice").profile().values()]
    by_lagrange = minimize_scalar(
        lambda t: sum(y[i] * math.prod((t - x[j]) / (x[i] - x[j]) for j in range(3) if j != i) for i in range(3)),
        bounds=(x[0], x[2]),
        options={"xatol": 1e-9},
    )
    assert -by_lagrange.fun > 0.01
    assert missed(low) == pytest.approx(-by_lagrange.fun, rel=1e-6)


def test_times_count_only_where_the_machine_was_shared_equally(fair):
    for seed in (43, 44, 45):
        fair = changed(fair, f"fair_best/llama_tiny/alice-s{seed}", training_seconds=200.0)  # of 100 for Adam
    rows = methods(fair, TINY)
    found, why = wall_clock(rows)
    assert why == "" and found["alice"] == pytest.approx(by_name(rows)["alice"].speedup / 2)
    assert found["adam"] == 1
    found, why = wall_clock(methods(changed(fair, "fair_best/llama_tiny/alice-s44", training_seconds=300.0), TINY))
    assert not found and "1.5 times as long" in why and "Alice" in why


# Gains -----------------------------------------------------------------------------------------------------------------


def test_the_papers_gain_is_the_rates_and_the_optimizers(fair):
    found = gains(fair, TINY, "alice")
    group = 0.05 * math.log(20)  # Adam's loss at 0.001 less that at 0.02
    equal = math.log(60 / 50) - 0.05 * math.log(0.02 / 0.006)
    assert found.rates == pytest.approx(group)
    assert found.optimizer == pytest.approx(equal)
    assert found.as_paper == pytest.approx(group + equal)
    assert found.at_own_best == pytest.approx(math.log(60 / 50))
    assert found.within == pytest.approx(0.05 * math.log(6))
    assert gains(fair, TINY_4K, "alice").optimizer == pytest.approx(equal - math.log(3))
    assert best_at(fair, TINY, "racs", 0.02).lr == 0.2


def test_gains_are_none_where_runs_are_missing(fair):
    fair = without(fair, "fair_control/llama_tiny/adam-lr0.001-*")
    found = gains(fair, TINY, "alice")
    assert found.as_paper is None and found.rates is None and found.optimizer is not None
    assert gains(fair, TINY, "muon").optimizer is None


def test_gains_made_with_a_rate_at_the_end_of_its_grid_are_marked(fair, whole):
    assert "as_paper" not in gains(fair, TINY, "racs").ends and at_end(fair, TINY, best_at(fair, TINY, "racs", 0.001))
    # Without the largest rate RACS's best one, 0.2, is an end at 0.02; Adam's is none there.
    fair = without(fair, "fair_rates/llama_tiny/racs-lr0.6-adam0.02-s42")
    assert gains(fair, TINY, "racs").ends >= {"as_paper", "optimizer", "at_own_best", "within"}
    assert "rates" not in gains(fair, TINY, "racs").ends
    rows = [line for line in gains_table(fair).splitlines() if line.startswith("| `llama_tiny` | RACS")]
    shown = [cell.strip() for cell in rows[0].strip("|").split("|")][2:]
    assert [cell.endswith("†") for cell in shown] == [True, False, True, True, True, True]
    assert "some best matrix rates are at an end of those tried" in " ".join(answer(fair))


def test_gains_by_length_are_of_the_same_pair_and_name_their_seed(fair):
    table = lengths(fair)
    assert table.splitlines()[0] == f"| model | method | 12 steps | {STEPS} steps | {2 * STEPS} steps |"
    row = next(line for line in table.splitlines() if line.startswith("| `llama_tiny` | Alice"))
    gained = f"{math.log(60 / 50):+.3f}"
    late = f"{math.log(60 / 50) + 0.1 * math.log(0.3):+.3f} (seed 43) |"  # of alice_lr03, its only run of that length
    assert row.count(gained) == 2 and row.endswith(late), row
    assert lengths(without(fair, "fair_long/llama_tiny/alice_lr03-*")).splitlines()[2].endswith("| – |")
    assert lengths(without(fair, "fair_rates/*/adam-*")).count("| – |") > 0


def test_the_luck_of_the_selected_runs(fair, whole):
    row = next(line for line in luck(fair).splitlines() if line.startswith("| `llama_tiny` | Alice"))
    assert row == "| `llama_tiny` | Alice | 50.00 | 50.00 ± 0.25 | 3 |"
    assert "how lucky" in write(page(fair, whole, []))
    assert "how lucky" not in write(page(without(fair, "fair_ablations/*"), whole, []))


# Ablations, batch, repetitions -------------------------------------------------------------------------------------------


def test_variants_are_held_against_plain_alice(fair, whole):
    rows = by_name(ablations(fair, TINY))
    assert set(rows) == {"alice", "nothing", "tracking_switch", "no_warmup"}  # RACS's are not of this family
    assert rows["nothing"].pair.test.difference == pytest.approx(math.log(1.2))
    assert rows["nothing"].claim == "worse" and rows["no_warmup"].claim is None
    assert cells(variants(fair, PARTS, whole), "`alice`")[3] == "reference"
    shown = cells(variants(fair, CHOICES, whole), "`no_warmup`")
    assert shown[3].startswith("-0.0101")
    assert "; no difference claimed; same seeds: lower in 3 of 3 [" in shown[3]
    assert cells(variants(fair, CHOICES, whole), "`rotated`")[2:4] == ["not run", "–"]


def test_signs_are_compared_with_the_papers(fair):
    table = steps_table(fair)
    compensation = next(line for line in table.splitlines() if "`tracking_switch` | `alice`" in line)
    assert "25.11 → 21.96 | -0.1344" in compensation
    assert compensation.count("as the paper") == 2
    averages = next(line for line in table.splitlines() if "`racs_no_ema`" in line)
    assert "22.67 → 29.75" in averages and averages.count("opposite") == 2
    assert next(line for line in table.splitlines() if "`gaussian` |" in line).count("not run") == 2


def test_the_better_rate_counts_at_each_batch(fair, whole):
    row = cells(batch(fair, TINY, whole), "Alice")
    assert row[1].startswith("50.00 (0.02)") and row[2] == "not run"
    assert row[3] == f"20.00 (0.06)<br>{math.log(20 / 30):+.4f}"  # 64k: three times the rate, against Adam's better
    assert len(batch_runs(fair, TINY, "alice", "64k")[0]) == 2
    # Beside them the run of stage 2 with the same seed: 43 is the first of three, half a per cent below the middle.
    assert row[4] == f"{50 * math.exp(-0.005):.2f} (0.02)<br>{math.log(50 / 60):+.4f}"
    assert f"stage 2: 2k, {STEPS} steps (" in batch(fair, TINY, whole)
    assert cells(batch(without(fair, "fair_best/llama_tiny/alice-s43"), TINY, whole), "Alice")[4] == "not run"


def test_one_of_two_rates_at_a_batch_is_said(fair, whole):
    fair = without(fair, "fair_batch/llama_tiny/alice_64k_lr3-*")
    assert "(0.02, 1 of 2 rates)" in cells(batch(fair, TINY, whole), "Alice")[3]


def test_another_task_stands_beside_both_stages(fair, whole, tmp_path):
    assert "## Other text, other steps\n\nNot run." in write(page(fair, whole, []))
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    for name, value in (("adam", 30.0), ("racs", 31.0), ("alice", 40.0), ("muon", 20.0)):
        for seed in (42, 43):
            folder = tmp_path / f"runs/compare/{name}-s{seed}"
            write_run(folder, name, 0.02, 0.005, seed, perplexity=value + seed - 42.5, steps=12)
    fair = load(tmp_path)
    assert "](../runs/compare)" in write(page(fair, tmp_path / "fair", []))
    table = elsewhere(fair, tmp_path)
    assert re.findall(r"^\| (\w+) \|", table, re.M) == ["method", "Muon", "Adam", "RACS", "Alice"], "the best first"
    row = cells(table, "Alice")
    assert row[1] == "40.00 ± 0.71 (0.02, 0.005)" and row[3] == "50.00 (0.02, 0.006)" and row[5] == "50.00 ± 0.25"
    assert cells(table, "Muon")[3] == cells(table, "Muon")[5] == "not run"


def test_repetitions_are_paired_by_configuration_and_seed(fair, whole):
    names = [("fair_repeat", TINY, "adam-s42"), ("fair_repeat", TINY, "alice-s42")]
    assert [run.path.parts[-3:] for _, run in repeats(fair, TINY)] == names, "the same number by the same code: once"
    other = changed(fair, "fair_again/llama_tiny/adam-s42", perplexity=60.5)
    assert [run.path.parts[-3:] for _, run in repeats(other, TINY)] == [*names, ("fair_again", TINY, "adam-s42")]
    assert all(first.path.parent.parent.name == "fair_rates" for first, _ in repeats(fair, TINY))
    fair = changed(fair, "fair_repeat/llama_tiny/alice-s42", perplexity=50.5)
    table = repeat(fair, whole).splitlines()
    assert table[2].endswith("| 0, the same number |")
    assert table[3].endswith(f"| {math.log(50.5 / 50):+.2e} |")


def test_a_repetition_by_another_version_is_paired_and_says_so(fair, whole):
    """A setting that one of the two does not have came with the newer version."""
    folder = "fair_repeat/llama_tiny/alice-s42"
    fair = without(fair, "fair_again/*")
    again = fair.ended[folder]
    newer = replace(
        again,
        config={**again.config, "trainer": {**again.config["trainer"], "new": True}},
        environment={**again.environment, "commit": "f" * 40},
    )
    fair = Fair(fair.plans, {**fair.ended, folder: newer})
    assert [run.optimizer for _, run in repeats(fair, TINY)] == ["adam", "alice"]
    assert f"and {'f' * 10})" in repeat(fair, whole).splitlines()[3]
    assert "rounds differently" not in write(page(fair, whole, []))  # the same number
    assert "rounds differently" in write(page(changed(fair, folder, perplexity=50.5), whole, []))
    other = replace(again, config={**again.config, "trainer": {**again.config["trainer"], "warmup_fraction": 0.5}})
    fair = Fair(fair.plans, {**fair.ended, folder: other})
    assert [run.optimizer for _, run in repeats(fair, TINY)] == ["adam"]


def test_what_was_not_tuned_is_held_against_stage_1_and_longer_runs_are_listed(fair, whole):
    fair = changed(fair, "fair_adam/llama_tiny/adam_b95-s42", perplexity=57.0)
    fair.plans = replace(fair.plans, finished=dict(fair.plans.finished))
    row = cells(untuned(fair, TINY, whole), "`adam_b95`")
    assert row[2:] == ["60.00", "57.00", f"**{math.log(57 / 60):+.4f}**"]
    assert owed(fair) == [], "its grid has run"
    del fair.plans.finished["fair_rates_b95", TINY, "adam"]
    assert owed(fair) == [(TINY, "adam")]
    assert "Owed by the rules, because other averages of Adam gained more than 0.02 nats" in " ".join(answer(fair))
    assert "**Not complete**" in " ".join(answer(fair))
    once_more = changed(
        fair, "fair_again/llama_tiny/adam-s42", perplexity=62.0
    )  # which is what a change is held against
    row = cells(untuned(once_more, TINY, whole), "`adam_b95`")
    assert row[2:] == ["62.00", "57.00", f"**{math.log(57 / 62):+.4f}**"]
    row = cells(untuned(without(once_more, "fair_again/*"), TINY, whole), "`adam_b95`")
    assert row[2:] == ["60.00", "57.00", f"**{math.log(57 / 60):+.4f}**"]
    other = changed(fair, "fair_adam/llama_tiny/adam_b95-s42", perplexity=59.0)  # 0.017 nats
    assert cells(untuned(other, TINY, whole), "`adam_b95`")[4] == f"{math.log(59 / 60):+.4f}" and not owed(other)
    assert cells(untuned(without(fair, "fair_adam/*"), TINY, whole), "`adam_b95`")[3:] == ["not run", "–"]
    assert cells(longer(fair, TINY, whole), "Alice")[1:3] == ["0.006", "0.006"]  # 0.3 times its best rate
    slower = 50 * math.exp(0.1 * math.log(1 / 0.3) - 0.005)
    assert cells(longer(fair, TINY, whole), "Alice")[3:] == [f"{slower:.2f}", f"{math.log(slower / 60) + 0.005:+.4f}"]
    text = write(page(without(fair, "fair_long/*"), whole, []))
    assert "## Longer runs\n\nNot run." in text and "| `adam_b95` |" in text


def test_steps_between_refreshes_are_held_against_the_same_row_and_named_in_the_answer_if_they_matter(fair, whole):
    fair = changed(fair, "fair_constants/llama_tiny/alice_k200-s42", perplexity=55.0)
    fair = changed(fair, "fair_constants/llama_tiny/nothing_k200-s42", perplexity=77.0)
    rows = intervals(fair, TINY, whole)
    assert rows.splitlines()[0] == "| method | 12 steps | 50 steps | 200 steps |"
    longest = math.log(55 / 50)
    assert cells(rows, "Alice")[1:] == ["50.00", "50.00<br>+0.0000", f"55.00<br>{longest:+.4f}"]
    assert cells(rows, "Alice without compensation")[1:] == ["55.00", "not run", "55.00<br>+0.0000"]
    text = " ".join(answer(fair))
    alone = math.log(77 / 60)
    changes = (
        f"Alice with 200 {longest:+.3f} and Alice without compensation, tracking and switching with 200 {alone:+.3f}"
    )
    assert f"(+: higher) in these cases: on `llama_tiny` {changes}; on `llama_tiny_4k` none." in text
    brought = f"{math.log(55 / 60):+.2f} with 12 and {math.log(55 / 77):+.2f} with 200"
    assert f"(in the paper by {math.log(25.11 / 26.96):+.2f} with 200): on `llama_tiny` {brought};" in text
    assert cells(constants(fair, TINY, whole), "`alice_b3_98`")[2:] == ["50.00", "50.00", "+0.0000"]
    assert "alice_k200" not in constants(fair, TINY, whole)
    assert "differed by up to" not in text, "the repetitions are equal"
    again = changed(fair, "fair_repeat/llama_tiny/alice-s42", perplexity=49.5)
    again = changed(again, "fair_again/llama_tiny/adam-s42", perplexity=61.0)
    assert f"differed by up to {math.log(61 / 60):.3f} (Adam on `llama_tiny`)" in " ".join(answer(again))
    lost = changed(fair, "fair_constants/llama_tiny/alice_k50-s42", perplexity=math.inf)
    lost = changed(lost, "fair_constants/llama_tiny/nothing_k200-s42", perplexity=math.inf)
    text = " ".join(answer(lost))
    assert f"on `llama_tiny` Alice with 50 diverges, Alice with 200 {longest:+.3f} and Alice without compensation, tracking " \
           "and switching with 200 diverges; on" in text  # fmt: skip
    assert f"on `llama_tiny` {math.log(55 / 60):+.2f} with 12;" in text
    partly = " ".join(answer(without(fair, "fair_constants/llama_tiny/*_k12-*")))
    assert f"on `llama_tiny` Alice with 200 {longest:+.3f} (3 of 5 are known); on `llama_tiny_4k` none." in partly
    text = " ".join(answer(without(fair, "fair_constants/*")))
    assert "(+: higher)" not in text and "Without compensation" not in text


def test_the_readmes_table_is_of_the_seeds_that_all_methods_have(fair, whole):
    text = readme.fill(f"# Title\n{readme.BEGIN}old\n{readme.END}\nrest", fair, whole)
    assert text.startswith(f"# Title\n{readme.BEGIN}\n- ") and text.endswith(f"|\n\n{readme.END}\nrest")
    assert readme.fill(text, fair, whole) == text
    with pytest.raises(ValueError, match="lost <!-- end of stage 2 -->: put it back"):
        readme.fill(text.replace(readme.END, ""), fair, whole)
    head, _, alice, *_ = (line for line in text.splitlines() if line.startswith("|"))
    assert "`llama_tiny`, 3 seeds | `llama_tiny_4k`, 3 seeds | `llama_tiny`, beta_2 0.95, 3 seeds" in head
    assert alice.startswith("| Alice | [50.00 ± 0.25](")
    [link, *_] = re.findall(r"\]\(([^)]*)\)", alice)
    assert (whole / link).is_dir() and link.endswith("llama_tiny/alice-s43")
    text = readme.table(without(fair, "fair_best/llama_tiny/racs-s44"), whole)
    assert "`llama_tiny`, 2 seeds" in text.splitlines()[0] and "50.00 ± 0.35" in cells(text, "Alice")[1]
    assert text.endswith("Columns are of different seeds, so none can be read against another; [this "
                         f"table]({readme.PAIRED}) can.")  # fmt: skip
    lost = changed(fair, "fair_best/llama_tiny/racs-s44", perplexity=math.inf)
    assert cells(readme.table(lost, whole), "RACS")[1] == "1 of 3 diverged"


# The answer and the page -------------------------------------------------------------------------------------------------


def test_the_answer_says_what_holds_on_both_models_and_where_they_disagree(fair):
    text = " ".join(answer(fair))
    assert 3 <= len(answer(fair)) <= 13
    assert "Not complete" not in text
    assert "lowest mean perplexity over 3 seeds has Alice on `llama_tiny` (50.00; Adam 60.00: a difference" in text
    assert "and Adam on `llama_tiny_4k` (60.00)" in text
    assert "better than Adam on both models: none; worse on both: RACS; no difference claimed on either: none" in text
    assert "; opposite on the two: Alice (`llama_tiny`: better, `llama_tiny_4k`: worse)." in text
    against_alice = text[text.index("better than Alice on both models") :]
    assert "models: none; worse on both: none; no difference claimed on either: none; opposite" in against_alice
    assert "RACS (`llama_tiny`: worse, `llama_tiny_4k`: better)" in text
    assert text.count("With beta_2 = 0.95 in every Adam, by the rule, better than Adam on both models: none") == 1
    found = gains(fair, TINY, "alice")
    low, high = sorted((found.optimizer, found.optimizer_low))
    assert f"{found.as_paper:+.2f} on `llama_tiny` ({low:+.2f} to {high:+.2f} from the optimizer; each at its" in text
    assert f"own best pair {math.log(60 / 50):+.2f})" in text and "Compared like that, 12 steps" in text
    gain_64k = math.log(30 / 20)
    assert f"Alice from {math.log(60 / 50):+.2f} to {gain_64k:+.2f} on `llama_tiny`" in text


def test_better_than_adam_without_more_means_with_either_beta_2(fair, whole):
    """Alice made better on both models, then on the second model of one form alone."""
    said = "Better than Adam by the rule, on both models and with either beta_2: "
    assert said + "none." in answer(fair)
    for sweep in ("fair_best", "fair_best_b95"):
        for seed, value in ((43, 40.0), (44, 40.1), (45, 40.2)):
            fair = changed(fair, f"{sweep}/{TINY_4K}/alice-s{seed}", perplexity=value)
    assert said + "Alice." in answer(fair)
    shown = cells(verdicts(fair), "Alice")
    assert shown == ["Alice", "better", "better", "–", "–", "better", "better", "–", "–"]
    assert cells(verdicts(fair), "RACS")[1:3] == ["worse", "worse"]
    for seed in (43, 44, 45):
        fair = changed(fair, f"fair_best_b95/{TINY_4K}/alice-s{seed}", perplexity=60.0 + seed / 100)
    assert said + "none." in answer(fair)
    some = without(fair, "fair_best_b95/llama_tiny/racs-s45")
    assert not any(each.startswith(said) for each in answer(some))
    assert cells(verdicts(some), "RACS")[5] == "open"


def test_both_values_of_beta_2_stand_side_by_side_over_common_seeds(fair, whole):
    for seed, value in ((43, 40.0), (44, 41.0), (45, 60.0)):
        fair = changed(fair, f"fair_best_b95/{TINY}/alice-s{seed}", perplexity=value)
    differences = [math.log(value / 50) - 0.005 * seed for seed, value in ((-1, 40.0), (0, 41.0), (1, 60.0))]
    low, high = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    row = cells(both_betas(fair, TINY, whole), "Alice")
    assert row == ["Alice", "50.00 ± 0.25", "47.00 ± 11", f"2 of 3 [{low:+.4f}, {high:+.4f}]"]
    row = cells(both_betas(without(fair, "fair_best_b95/llama_tiny/alice-s45"), TINY, whole), "Alice")
    assert row[1:3] == ["49.88 ± 0.18", "40.50 ± 0.71"] and row[3].startswith("2 of 2")


def test_adam_with_rates_chosen_anew_is_told_before_any_other_method(fair):
    for seed, value in ((43, 40.0), (44, 41.0), (45, 60.0)):
        fair = changed(fair, f"fair_best_b95/{TINY}/adam-s{seed}", perplexity=value)
    some = without(fair, "fair_best_b95/*/alice-*", "fair_best_b95/*/racs-*", f"fair_best_b95/{TINY}/adam-s45")
    some = without(some, f"fair_best_b95/{TINY_4K}/*")
    said = (
        "Adam ends stage 2 at a mean perplexity of 40.50 instead of 59.85 on `llama_tiny` (the 2 seeds that both have)."
    )
    assert any(each.endswith(said) for each in answer(some))
    assert not any("in every Adam" in each for each in answer(some)) and "curves_b95" not in available(some)


def test_a_claim_is_not_lost_when_other_methods_end(fair):
    """RACS's p of 0.03, alone in being settled, would be corrected less beside a provisional p that may yet grow."""
    some = without(fair, "fair_best/llama_tiny/alice-s45")
    for seed, value in ((43, 60.3), (44, 60.5), (45, 61.2)):
        some = changed(some, f"fair_best/llama_tiny/racs-s{seed}", perplexity=value)
    row = by_name(methods(some, TINY))["racs"]
    assert row.settled and row.pair.p == pytest.approx(2 * row.pair.test.p)
    assert (
        not by_name(methods(some, TINY))["alice"].settled and by_name(methods(some, TINY))["alice"].pair.p is not None
    )


def test_what_the_paper_does_not_say_is_not_stated_as_a_fact(fair, whole):
    said = next(sentence for sentence in answer(fair) if "0.02" in sentence)
    assert "probably compares" in said and "it does not say" in said and "rates were selected as well" in said
    text = write(page(fair, whole, []))
    assert "if they share the matrices' rate as in the code base that the paper probably grew from" in text
    assert "Wikipedia in C4's file layout, not C4" in text.split("##")[0]


def test_commits_are_listed_by_part(fair, whole):
    run = fair.ended["fair_repeat/llama_tiny/alice-s42"]
    other = replace(run, environment={**run.environment, "commit": "0123456789abcdef"})
    text = made(Fair(fair.plans, {**fair.ended, "fair_repeat/llama_tiny/alice-s42": other}))
    lines = {name: line for line in text.splitlines() for name in re.findall("^- Commits, ([^:]*):", line)}
    asked = [
        "stage 1",
        "control",
        "stage 2",
        "ablations",
        "batch size",
        "the same run twice",
        "the same run by later code",
    ]
    again = [f"stage {number} with beta_2 = 0.95" for number in (1, 2)]
    assert list(lines) == [*asked, "Adam's averages", "constants", "longer runs", *again]
    assert [name for name, line in lines.items() if "0123456789" in line] == ["the same run twice"]


def test_the_control_grows_as_well(fair):
    assert "Not complete" not in " ".join(answer(fair)) and "grids grow" not in progress(fair)
    assert "; control asks for more while grids grow." in progress(
        without(fair, "fair_control/llama_tiny/alice-lr0.06-*")
    )


def test_the_answer_of_an_unfinished_comparison_claims_nothing_in_general(fair):
    text = " ".join(answer(without(fair, "fair_best/llama_tiny_4k/*", "fair_best_b95/*")))
    assert "**Not complete**: " in text and "on both models" not in text
    assert "by the rule, on `llama_tiny` better than Adam: Alice, worse: RACS. A statement about optimizers in" in text
    assert text.count("A statement about optimizers in general needs both models.") == 1
    some = without(fair, "fair_best/llama_tiny_4k/*-s45", "fair_best_b95/*")
    text = " ".join(answer(some))
    assert (
        "stage 2 so far, mean perplexities on `llama_tiny_4k` (2 of 3 seeds" in text
        and "mean perplexities on `llama_tiny` (" not in text
    )
    said = verdicts_in_words(some)
    assert said[0].startswith(f"{FIRST}by the rule, on `llama_tiny` better than Adam: Alice, worse: RACS.")
    assert said[2:] == [
        f"{FIRST}not all seeds have run on `llama_tiny_4k`, so **no difference is claimed there yet**.",
        f"{SECOND}not all seeds have run, so **no difference is claimed yet**.",
    ]


def test_what_is_not_claimed_stays_open_while_other_methods_may_end(fair, whole):
    """Holm's correction counts a missing method as p = 1: RACS's p may fall below 0.05 when Alice's small one joins."""
    near = fair
    for seed, value in ((43, 60.3), (44, 60.9), (45, 61.4)):
        near = changed(near, f"fair_best/llama_tiny/racs-s{seed}", perplexity=value)
    assert cells(stage_2(near, TINY, whole), "RACS")[6] == "no difference claimed"
    assert cells(verdicts(near), "RACS")[1] == "no difference claimed"
    some = without(near, "fair_best/llama_tiny/alice-s45")
    assert cells(stage_2(some, TINY, whole), "RACS")[6] == "open: others' seeds are missing"
    assert cells(stage_2(some, TINY, whole), "Alice")[6] == "open: seeds are missing"
    assert cells(verdicts(some), "RACS")[1] == cells(verdicts(some), "Alice")[1] == "open"
    assert "Not judged on both yet: " in " ".join(answer(some))
    only = without(some, "fair_best/llama_tiny_4k/*")
    assert "on `llama_tiny` better than Adam: none, worse: none, not judged yet: " in " ".join(answer(only))


def test_a_method_that_is_tested_on_one_model_alone_and_claims_nothing_there_is_said_so(fair):
    for seed, value in ((43, 60.3), (44, 60.9), (45, 61.4)):
        fair = changed(fair, f"fair_best/llama_tiny/racs-s{seed}", perplexity=value)
    fair = changed(fair, "fair_best/llama_tiny_4k/racs-s44", diverged=7)
    words = "claimed on neither: RACS (`llama_tiny`: no difference claimed, `llama_tiny_4k`: not tested)"
    assert words in " ".join(answer(fair))


def test_the_side_of_one_twentieth_shows():
    assert [p_value(p) for p in (0.0004, 0.041, 0.04961, 0.0504, 0.0506)] == [
        "< 0.001",
        "0.041",
        "0.0496",
        "0.0504",
        "0.051",
    ]


def test_what_stage_2_shows_before_it_claims_anything(fair):
    fair = without(fair, "fair_best_b95/*", "fair_ablations/*")
    text = " ".join(answer(without(fair, "fair_best/llama_tiny/*-s45", "fair_best/llama_tiny_4k/*")))
    assert "on `llama_tiny` (2 of 3 seeds, those that all of these have) Alice 49.88, Adam 59.85" in text
    assert "Seeds are missing there: nothing is claimed" in text and "better than" not in text
    some = without(fair, "fair_best/llama_tiny/*-s45", "fair_best/llama_tiny/racs-s44", "fair_best/llama_tiny_4k/*")
    # Seed 43 alone, half a per cent below the middle: no method is shown with a seed that another lacks.
    assert "(1 of 3 seeds, those that all of these have) Alice 49.75, Adam 59.70" in " ".join(answer(some))
    lost = changed(some, "fair_best/llama_tiny/racs-s43", diverged=7)
    assert "Adam 59.85, diverged RACS. Seeds" in " ".join(answer(lost))


def test_the_page_without_any_record_claims_nothing(whole, tmp_path):
    fair = load_fair(tmp_path, plans(tmp_path, whole / "plans"))
    assert available(fair) == []
    text = write(page(fair, tmp_path, []))
    assert f"0 of {len(fair.asked())} runs have ended, and more" in text
    assert "nothing is claimed" in text
    assert text.count("Not run.") >= 5 and "better than" not in text.split("##")[0]


def test_links_lead_to_records_and_no_path_of_this_machine_is_shown(fair, whole):
    out = whole / "somewhere" / "fair"
    text = write(page(fair, out, [whole / "figures" / "curves.png"])) + write(list_of_runs(fair, out))
    links = set(re.findall(r"\]\(([^)]*runs/[^)]*)\)", text))
    assert len(links) == len(fair.runs())
    assert all((out / link).resolve().joinpath("config.yaml").is_file() for link in links)
    assert str(whole) not in text and "/home/" not in text
    assert "![Validation perplexity over steps, all methods, both models](../../figures/curves.png)" in text


def test_another_page_shows_the_answer_with_links_from_its_own_folder(fair, whole):
    text = summary(fair, whole, whole / "fair/README.md", [whole / "figures/fair/curves.png"])
    assert "[all of it](fair/README.md)" in text and "](figures/fair/curves.png)" in text and "gains.png" not in text
    assert all(f"- {sentence}" in text for sentence in answer(fair))


# Pictures --------------------------------------------------------------------------------------------------------------


def test_only_pictures_with_data_are_there(fair):
    every = ["curves", "curves_b95", "speedup", "memory", "group_rate", "sensitivity", "gains", "ablations"]
    assert available(fair) == every
    fair = without(fair, "fair_control/*/adam-lr0.001-*", "fair_ablations/*")
    assert available(fair) == [name for name in every if name not in ("gains", "ablations")]


def test_pictures_have_the_same_bytes_every_time(fair, tmp_path):
    first = [path.read_bytes() for path in draw("gains", fair, tmp_path / "a")]
    second = [path.read_bytes() for path in draw("gains", fair, tmp_path / "b")]
    assert first == second
    assert b"svg" in first[1] and b"<dc:date>" not in first[1]


def test_pictures_are_drawn_of_what_there_is(fair, tmp_path):
    # One model has not begun; no spread and so no intervals of the ablations.
    fair = without(fair, "*/llama_tiny_4k/*", "fair_ablations/llama_tiny/*-s4[45]")
    drawn = partial(draw, fair=fair, folder=tmp_path)
    for name in ("curves", "speedup", "memory", "group_rate", "sensitivity", "ablations"):
        assert all(path.stat().st_size > 1000 for path in drawn(name))
    assert b"evaluated every" in (tmp_path / "speedup.svg").read_bytes()
    alone = without(fair, *(f"fair_best/{TINY}/{name}-*" for name in ("alice", "racs")))
    draw("speedup", alone, tmp_path)
    assert b"evaluated every" not in (tmp_path / "speedup.svg").read_bytes(), "there is nothing beside Adam"


def test_what_the_rule_says_of_variants_once_all_have_run(fair):
    """Of the small world's, `nothing` and `tracking_switch` are worse by far, no_warmup better by less than the spread."""
    (text,) = [each for each in answer(fair) if "variants" in each]
    assert (
        "on `llama_tiny` and `llama_tiny_4k` alike: worse than plain Alice: none of the three parts and no compensation; "
        "better: none; " in text
    )
    assert text.endswith("no difference claimed: no warm-up.")
    assert not any("variants" in each for each in answer(without(fair, "fair_ablations/llama_tiny/nothing-s45")))
    other = fair
    for seed, value in ((43, 40.0), (44, 40.1), (45, 40.2)):
        other = changed(other, f"fair_ablations/{TINY}/no_warmup-s{seed}", perplexity=value)
    words = "differently on the two: no warm-up (`llama_tiny`: better, `llama_tiny_4k`: no difference claimed)."
    assert any(words in each for each in answer(other))
    lost = fair
    for model in MODELS:
        lost = changed(lost, f"fair_ablations/{model}/no_warmup-s43", diverged=5)
    assert any(each.endswith("seeds of these or of plain Alice diverged: no warm-up.") for each in answer(lost))


# docs/deviations.md ------------------------------------------------------------------------------------------------------


def short(text: str) -> str:
    """Without intervals: a spread of 1e-17 has one too."""
    return re.sub(r" \[[^]]*]", "", text)


def test_the_effects_of_open_choices_are_filled_in(fair):
    """Perplexities of the small world: no_warmup 0.99 times plain Alice's, nothing 1.2 times, whatever the seed."""
    text = (
        "# `nothing`\n| What | Effect |\n|---|---|\n| a | `no_warmup`, `nothing` |\n| b | `alice` is plain |\n| c | – |"
    )
    filled = fill(text, fair)
    assert short(filled) == text.replace(
        "`no_warmup`, `nothing`", "`no_warmup`: -0.010 / -0.010; `nothing`: +0.182 / +0.182"
    )
    assert fill(filled, fair) == filled
    less = without(fair, f"*/{TINY_4K}/no_warmup-*")
    assert "| a | `no_warmup`: -0.010 / not run; `nothing`: +0.182 / +0.182 |" in short(fill(filled, less))


def test_an_effect_is_that_of_common_seeds_with_its_own_interval(fair):
    few = without(fair, f"*/{TINY}/no_warmup-s45", f"*/{TINY_4K}/alice-*")
    assert short(effect(few, "no_warmup")) == "-0.010 (2 of 3 seeds) / not run"
    folders = [f"fair_ablations/{TINY}/no_warmup-s{seed}" for seed in (43, 44, 45)]
    spread = fair
    for folder, factor in zip(folders, (1.0, 1.1, 1.2), strict=True):
        spread = changed(spread, folder, perplexity=fair.ended[folder].perplexity * factor)
    logs = [math.log(0.99 * factor) for factor in (1.0, 1.1, 1.2)]
    low, high = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    assert effect(spread, "no_warmup").startswith(f"{sum(logs) / 3:+.3f} [{low:+.3f}, {high:+.3f}] / ")
    assert effect(changed(fair, folders[0], diverged=5), "no_warmup").startswith("1 of 3 diverged / ")
    lost = changed(fair, f"fair_ablations/{TINY}/alice-s43", diverged=5)
    assert effect(lost, "no_warmup").startswith("0 of 3 diverged, of the default 1 / ")
    with pytest.raises(ValueError, match="no_warmop is no variant of fair_ablations: correct the line"):
        fill("| a | `no_warmop`, `nothing` |", fair)


def test_every_open_choice_of_the_plan_has_its_effect_in_the_docs():
    page = (Path(__file__).parents[2] / "docs/deviations.md").read_text(encoding="utf-8")
    last = [line.removesuffix("|").rpartition("|")[2] for line in page.splitlines() if line.startswith("|")]
    filled = {name for cell in last for name in re.findall(r"`(\w+)`: ", cell)}
    assert filled == {*CHOICES, "alice_last_layer", "galore_last_layer", "racs_no_ema"}
