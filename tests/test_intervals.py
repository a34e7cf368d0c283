"""Accuracies and their differences: intervals against other computations, and how often they mislead, counted."""

import math
from itertools import product

import numpy as np
import pytest
from loading import benchmark_modules
from scipy import stats

from trl_learnalign.intervals import compare_paired, difference_in_words, mean_accuracy, wilson


@pytest.fixture(scope="module")
def counted():
    with benchmark_modules("paired_comparison", "common") as modules:
        yield modules["paired_comparison"]


def pair(problems, only_first, only_second):
    """Accuracies of two models that differ on so many problems, and are both right on the others."""
    same = problems - only_first - only_second
    first = [1] * only_first + [0] * only_second + [1] * same
    second = [0] * only_first + [1] * only_second + [1] * same
    return first, second


def claims(problems, only_first, only_second):
    words = difference_in_words(compare_paired(*pair(problems, only_first, only_second)).difference)
    return "ahead of" in words or "behind" in words


# ---- One model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "total"), [(0, 5), (3, 40), (1016, 1319), (30, 30)])
def test_wilsons_interval_is_that_of_scipy(right, total):
    interval = stats.binomtest(right, total).proportion_ci(0.95, method="wilson")
    found = wilson(right, total)
    assert found.value == right / total
    assert found.low == pytest.approx(max(0, interval.low), abs=1e-12)
    assert found.high == pytest.approx(min(1, interval.high), abs=1e-12)


def test_mean_pass_at_1_of_several_samples_has_an_interval_over_problems():
    accuracies = [0.25, 0.5, 0.0, 1.0, 0.75] * 20
    found = mean_accuracy(accuracies)
    assert found.value == 0.5
    error = np.std(accuracies) / math.sqrt(100)
    assert found.low == pytest.approx(0.5 - 1.96 * error, abs=0.02)
    assert found.high == pytest.approx(0.5 + 1.96 * error, abs=0.02)
    assert mean_accuracy([1.0, 0.0]) == wilson(1, 2)
    with pytest.raises(ValueError, match="at least one problem"):
        mean_accuracy([])


def test_problems_that_agree_are_no_certainty():
    found = mean_accuracy([0.25, 0.25])
    assert found == wilson(0.5, 2)
    assert found.low < 0.1
    assert found.high > 0.7


def test_the_interval_of_a_mean_holds_where_few_problems_are_ever_solved():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        rates = rng.beta(0.1, 2, 40)  # mostly hopeless
        found = mean_accuracy(rng.binomial(4, rates) / 4)
        covered += found.low <= 0.1 / 2.1 <= found.high
    assert covered / 300 > 0.88


# ---- Two models, one sample of each problem -------------------------------------------------------------------------


def test_mcnemar_counts_all_outcomes_of_the_problems_that_differ():
    first = [1] * 6 + [0] * 3 + [1] * 5
    second = [0] * 5 + [1] + [1, 0, 0] + [1] * 5
    found = compare_paired(first, second)
    assert (found.only_first, found.only_second, found.problems) == (5, 1, 14)
    outcomes = [sum(coins) for coins in product((0, 1), repeat=6)]
    assert found.p_value == pytest.approx(sum(k <= 1 or k >= 5 for k in outcomes) / len(outcomes))
    assert found.difference.value == pytest.approx(-4 / 14)
    assert found.difference.low < -4 / 14 < found.difference.high


def test_equal_models_do_not_differ():
    found = compare_paired([1, 0, 1], [1, 0, 1])
    assert found.p_value == 1
    # What three ties say about other problems: the exact upper end of none of three, in either direction.
    most = stats.binomtest(0, 3).proportion_ci(0.95).high
    assert found.difference.value == 0
    assert found.difference.high == -found.difference.low == pytest.approx(most)
    with pytest.raises(ValueError, match="3 with 2 problems"):
        compare_paired([1, 0, 1], [1, 0])


def test_three_problems_in_a_hundred_show_nothing():
    found = compare_paired(*pair(100, 0, 3))
    assert found.p_value == 0.25
    assert "shows no difference (+3.0 points [-" in found.sentence("a", "b")


@pytest.mark.parametrize("problems", [13, 30])
def test_the_sentence_claims_what_the_exact_test_shows_and_nothing_else(problems):
    for differ in range(1, problems + 1):
        for won in range(differ + 1):
            p_value = stats.binomtest(won, differ).pvalue
            found = compare_paired(*pair(problems, differ - won, won))
            assert found.p_value == pytest.approx(p_value, abs=1e-12)
            assert claims(problems, differ - won, won) == (p_value < 0.05), (differ, won)


@pytest.mark.parametrize("won", [1, 6, 20, 100])
def test_where_one_model_wins_all_the_upper_end_is_that_of_a_share(won):
    exact = stats.binomtest(won, 100).proportion_ci(0.95)
    found = compare_paired(*pair(100, 0, won)).difference
    assert found.high == pytest.approx(exact.high)
    turned = compare_paired(*pair(100, won, 0)).difference
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))


@pytest.mark.parametrize(
    ("problems", "only_first", "only_second"), [(1319, 90, 130), (5000, 600, 600)]
)
def test_with_many_problems_the_interval_is_the_usual_one(problems, only_first, only_second):
    found = compare_paired(*pair(problems, only_first, only_second)).difference
    difference = (only_second - only_first) / problems
    error = math.sqrt((only_first + only_second) / problems - difference**2) / math.sqrt(problems)
    half = 1.96 * error
    assert found.low == pytest.approx(difference - half, abs=0.1 * half)
    assert found.high == pytest.approx(difference + half, abs=0.1 * half)


@pytest.mark.parametrize("problems", [30, 100])
def test_level_and_coverage_hold_exactly(counted, problems):
    """Sums over all outcomes: nothing is drawn."""
    rows = counted.one_sample(problems, (0.01, 0.05, 0.1, 0.3), (0.0, 0.6, 1.0))
    assert len(rows) == 12
    for row in rows:
        assert row["coverage"] >= 0.939, row
        if row["difference"] == 0:
            assert row["ahead"] + row["behind"] <= 0.05, row
            assert row["ahead"] == pytest.approx(row["behind"])
    powers = [row["ahead"] for row in rows if row["discordant"] == 0.3]
    assert powers == sorted(powers)
    assert powers[-1] > 0.9


# ---- Several samples ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes",
    [
        [1, 1, 1, 1],
        [4, 1, 1, 1, 1, 1, 1, 1],
        [1, 2, 3, 4, 1, 2, 3, 4, 4],
        [2] * 10,
        [4, 4, 1, 1, 1, 3] * 2,
    ],
)
def test_equal_models_with_several_samples_are_told_apart_in_one_case_in_twenty_at_most(sizes):
    """Equal models differ on a problem by as much in either direction: all directions are counted."""
    sizes = np.array(sizes) / 4
    told_apart = 0
    for directions in product((-1, 1), repeat=len(sizes)):
        differences = np.concatenate([sizes * directions, np.zeros(60)])
        first = np.maximum(-differences, 0)
        found = compare_paired(first, first + differences)
        low, high = found.difference.low, found.difference.high
        assert (low > 0 or high < 0) == (found.p_value < 0.05)
        told_apart += low > 0 or high < 0
    assert told_apart / 2 ** len(sizes) <= 0.05


def test_half_the_difference_on_each_problem_is_as_certain():
    first, second = pair(40, 2, 14)
    whole = compare_paired(first, second)
    half = compare_paired(np.array(first) / 2, np.array(second) / 2)
    assert half.p_value == whole.p_value
    assert half.difference.low == whole.difference.low / 2
    assert half.difference.value == whole.difference.value / 2
    # The other end is for problems that were not seen, which may differ by more.
    assert whole.difference.high / 2 < half.difference.high < whole.difference.high
    said = half.sentence("a", "b")
    assert "(a is correct more often on 2, b on 14; McNemar's test, weighted by the size" in said
    assert "only a is correct on 2, only b on 14; McNemar's exact test p" in whole.sentence(
        "a", "b"
    )


@pytest.mark.parametrize(("samples", "unsure"), [(2, 0.1), (4, 0.3), (16, 0.02)])
def test_intervals_of_several_samples_hold_where_few_problems_differ(counted, samples, unsure):
    draws = 120
    allowed = 3 * math.sqrt(0.05 * 0.95 / draws)
    better = counted.several_samples(100, samples, unsure, 1.0, draws, seed=1)
    assert better["coverage"] >= 0.95 - allowed
    equal = counted.several_samples(100, samples, unsure, 0.0, draws, seed=1)
    assert equal["ahead"] + equal["behind"] <= 0.05 + allowed


# ---- Several seeds --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "seeds"), [("paired", 2), ("paired", 5), ("other seeds", 3), ("other problems", 1)]
)
def test_equal_variants_are_told_apart_in_one_case_in_twenty(counted, kind, seeds):
    draws = 80
    equal = counted.several_seeds(kind, 100, seeds, 0.1, 0.0, draws, seed=2)
    assert equal["ahead"] + equal["behind"] <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / draws)
    better = counted.several_seeds(kind, 100, seeds, 0.3, 3.0, draws, seed=2)
    assert better["ahead"] > equal["ahead"] + equal["behind"]
    assert better["behind"] < 0.05
