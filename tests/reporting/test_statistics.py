"""Welch's test against closed forms, permutations of its definition and a published example; Holm; the rule."""

import math
import statistics
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from reporting import load_run
from reporting.statistics import (
    Paired,
    against_reference,
    deviation,
    final_losses,
    holm,
    in_general,
    mean,
    paired,
    welch,
)
from tests.reporting.synthetic import write_run

losses = st.floats(0, 20).map(lambda x: round(x, 4))
samples = st.lists(losses, min_size=2, max_size=6)
p_values = st.lists(st.none() | st.floats(0, 1), max_size=8)


def test_mean_and_standard_deviation():
    assert mean([1, 2, 6]) == 3
    assert deviation([1, 2, 6]) == pytest.approx(math.sqrt((4 + 1 + 9) / 2))
    assert deviation([0.1] * 3) == 0  # and not the rounding of a sum
    assert deviation([3.0]) is None
    assert mean([]) is None
    assert mean([4.0, math.inf]) == math.inf
    assert deviation([4.0, math.inf]) is None


def test_welch_on_a_published_example():
    """The first example of the encyclopaedia's article on Welch's t-test: t = -2.46, 25.0 degrees of freedom, p = 0.021."""
    first = [27.5, 21.0, 19.0, 23.6, 17.0, 17.9, 16.9, 20.1, 21.9, 22.6, 23.1, 19.6, 19.0, 21.7, 21.4]
    second = [27.1, 22.0, 20.8, 23.4, 23.4, 23.5, 25.8, 22.0, 24.8, 20.2, 21.9, 22.1, 22.9, 20.5, 24.4]
    test = welch(first, second)
    assert test.freedom == pytest.approx(25.0, abs=0.05)
    assert test.p == pytest.approx(0.021, abs=0.0005)
    assert test.difference == pytest.approx(statistics.fmean(second) - statistics.fmean(first))


def test_welch_with_two_degrees_of_freedom_has_a_closed_form():
    """Equal variances of two samples of 2: P(|T| > t) = 1 - t / sqrt(2 + t^2), and t = 4.3027 at 0.05."""
    test = welch([1.0, 2.0], [4.0, 5.0])
    t = 3 / math.sqrt(0.5 / 2 + 0.5 / 2)
    assert test.freedom == pytest.approx(2)
    assert test.p == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-9)
    assert test.interval == pytest.approx((3 - 4.30265273 * math.sqrt(0.5), 3 + 4.30265273 * math.sqrt(0.5)))


def test_welch_with_one_degree_of_freedom_is_cauchy():
    """All variance in one sample of 2: P(|T| > t) = 1 - 2/pi arctan(t)."""
    test = welch([7.0, 7.0, 7.0], [4.0, 5.0])
    t = 2.5 / 0.5
    assert test.freedom == pytest.approx(1)
    assert test.p == pytest.approx(1 - 2 / math.pi * math.atan(t), rel=1e-9)


def test_welch_against_the_integral_of_the_density():
    first, second = [4.41, 4.43, 4.40, 4.45], [4.26, 4.37, 4.29]
    v1, v2 = statistics.variance(first) / 4, statistics.variance(second) / 3
    t = abs(statistics.fmean(first) - statistics.fmean(second)) / math.sqrt(v1 + v2)
    nu = (v1 + v2) ** 2 / (v1**2 / 3 + v2**2 / 2)
    x = np.linspace(-t, t, 200_001)
    constant = math.gamma((nu + 1) / 2) / (math.sqrt(nu * math.pi) * math.gamma(nu / 2))
    inside = float(np.trapezoid(constant * (1 + x * x / nu) ** (-(nu + 1) / 2), x))
    test = welch(first, second)
    assert test.freedom == pytest.approx(nu)
    assert test.p == pytest.approx(1 - inside, abs=1e-9)


@given(samples, samples)
@settings(deadline=None)
def test_welch_is_symmetric_and_bounded(first, second):
    one, other = welch(first, second), welch(second, first)
    assert one.difference == pytest.approx(-other.difference, abs=1e-12)
    if one.p is None:
        assert one.why == other.why == "no spread at all: the test does not apply"
        assert len(set(first)) == len(set(second)) == 1
        return
    assert one.p == pytest.approx(other.p)
    assert 0 <= one.p <= 1
    assert min(len(first), len(second)) - 1 - 1e-9 <= one.freedom <= len(first) + len(second) - 2 + 1e-9
    low, high = one.interval
    assert low <= one.difference <= high
    assert other.interval == pytest.approx((-high, -low), abs=1e-9)


@given(samples, samples, st.floats(0.01, 0.99))
@settings(deadline=None)
def test_the_interval_excludes_zero_where_p_is_below_the_level(first, second, alpha):
    test = welch(first, second, level=1 - alpha)
    assume(test.p is not None and abs(test.p - alpha) > 1e-6)
    low, high = test.interval
    assert (low > 0 or high < 0) == (test.p < alpha)


def test_what_cannot_be_tested_says_why():
    assert welch([4.0], [3.0, 3.1]).why == "one seed: no spread known"
    assert welch([4.0], [3.0, 3.1]).difference == pytest.approx(-0.95)
    assert welch([], []).why == "no run has ended"
    assert welch([], [3.0, 3.1]).why == "one of them has no run that has ended"
    assert welch([4.0, 4.1], []).difference is None
    assert welch([4.0, 4.1], [3.0, math.inf, math.inf]).why == "2 of 3 diverged: no test"
    assert welch([math.inf, 4.1], [math.inf, 3.0, 3.1]).why == "1 of 2 of the reference and 1 of 3 diverged: no test"
    assert welch([4.0, 4.0], [3.0, 3.0]).why == "no spread at all: the test does not apply"
    for first, second in (([4.0], [3.0]), ([], []), ([math.inf], [4.0, 4.0]), ([4.0, 4.0], [4.0, 4.0])):
        test = welch(first, second)
        assert (test.p, test.interval) == (None, None)
        assert test.difference is None or math.isfinite(test.difference)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5]) == [0.5]
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_pair_without_a_test_counts_in_the_family():
    assert holm([None, 0.02, 0.01]) == [None, pytest.approx(0.04), pytest.approx(0.03)]


@given(p_values)
def test_holm_keeps_the_order_and_only_raises(values):
    corrected = holm(values)
    pairs = [(p, q) for p, q in zip(values, corrected, strict=True) if p is not None]
    assert [p is None for p in values] == [q is None for q in corrected]
    assert all(p <= q <= 1 and q <= min(1, len(values) * p) for p, q in pairs)
    assert all(one[1] <= two[1] for one, two in pairwise(sorted(pairs)))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.001, 0.5))
def test_holm_rejects_what_its_step_down_procedure_rejects(values, alpha):
    rejected = set()
    for k, i in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        if (len(values) - k) * values[i] >= alpha:
            break
        rejected.add(i)
    assert {i for i, p in enumerate(holm(values)) if p < alpha} == rejected


def test_the_rule_names_better_worse_and_nothing():
    reference = [4.40, 4.41, 4.42]
    found = against_reference(
        reference,
        {
            "good": [4.10, 4.11, 4.12],
            "bad": [4.70, 4.71, 4.72],
            "same": [4.39, 4.41, 4.44],
            "gone": [3.0, 3.1, math.inf],
        },
    )
    assert {name: pair.verdict for name, pair in found.items()} == {
        "good": "better",
        "bad": "worse",
        "same": None,
        "gone": None,
    }
    assert found["good"].p == pytest.approx(4 * found["good"].test.p)


def test_the_correction_can_take_a_claim_away():
    reference, candidate = [4.40, 4.41, 4.42], [4.37, 4.38, 4.39]
    alone = against_reference(reference, {"a": candidate})["a"]
    assert alone.verdict == "better"
    assert 0.02 < alone.test.p < 0.025
    among = against_reference(reference, {"a": candidate, "b": [4.3, 4.5, 4.4], "c": [4.3, 4.5, 4.4]})["a"]
    assert among.verdict is None
    assert among.test.p == alone.test.p


def test_a_general_statement_needs_both_proxies_in_one_direction():
    assert in_general(["better", "better"]) == "better"
    assert in_general(["worse", "worse"]) == "worse"
    assert in_general(["better", "worse"]) is None
    assert in_general(["better", None]) is None
    assert in_general([None, None]) is None
    assert in_general(["better"]) is None
    assert in_general([]) is None


def test_final_losses_are_one_for_each_seed(tmp_path):
    runs = [
        write_run(tmp_path / "c", seed=44, perplexity=math.exp(4.0), steps=4),
        write_run(tmp_path / "a", seed=42, perplexity=math.exp(3.0), steps=4),
        write_run(tmp_path / "b", seed=43, diverged=2, steps=4),
        write_run(tmp_path / "d", seed=45, finished=False, steps=4),
        write_run(tmp_path / "e", seed=44, perplexity=math.exp(5.0), steps=4),  # the repeat of a seed
    ]
    assert final_losses(map(load_run, runs)) == [pytest.approx(3.0), math.inf, pytest.approx(4.5)]


def test_an_impossible_perplexity_is_named(tmp_path):
    run = load_run(write_run(tmp_path / "run", steps=4, summary={"perplexity": 0}))
    with pytest.raises(ValueError, match=r"run/summary\.json has a perplexity of 0: restore the file"):
        final_losses([run])


def test_paired_differences_have_students_interval():
    adam, alice = {43: 4.41, 44: 4.43, 45: 4.40, 46: 4.0}, {45: 4.27, 44: 4.44, 43: 4.20, 47: 1.0}
    found = paired(adam, alice)
    theirs = stats.ttest_rel([4.20, 4.44, 4.27], [4.41, 4.43, 4.40]).confidence_interval(0.95)
    assert (found.lower, found.seeds) == (2, 3)
    assert found.interval == pytest.approx((theirs.low, theirs.high), rel=1e-12)
    assert paired(adam, {43: 4.0}) == Paired(1, 1)
    assert paired(adam, {43: math.inf, 44: 4.0}) == Paired(1, 2)  # one diverged: no interval
    assert paired(adam, adam) == Paired(0, 4) and paired({}, adam) == Paired(0, 0)
