"""Confidence intervals of accuracies, and paired comparisons of two models.

Axes: `P` problems. A problem's *accuracy* is its share of correct samples (pass@1 of that problem): 0 or 1 with greedy
decoding. Problems are the sampling unit; samples of one problem are not independent of each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special, stats


@dataclass(frozen=True)
class Estimate:
    """A value with an interval.

    Args:
        value (`float`): The value.
        low (`float`): Lower end of the interval.
        high (`float`): Upper end.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.2f} % [{100 * self.low:.2f}, {100 * self.high:.2f}]"


def wilson(right: float, total: float, confidence: float = 0.95) -> Estimate:
    """Proportion of successes with Wilson's score interval.

    Args:
        right (`float`): Successes; an effective number may be fractional.
        total (`float`): Trials, more than 0.
        confidence (`float`, *optional*, defaults to `0.95`): Coverage.
    """
    share = right / total
    z = float(stats.norm.ppf((1 + confidence) / 2))
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    spread = math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    half = z / (1 + z * z / total) * spread
    low = 0.0 if right == 0 else middle - half
    high = 1.0 if right == total else middle + half
    return Estimate(share, low, high)


def clopper_pearson(right: float, total: float, confidence: float = 0.95) -> tuple[float, float]:
    """Exact interval of a proportion: all values that two one-sided binomial tests do not reject.

    Args:
        right (`float`): Successes; an effective number may be fractional.
        total (`float`): Trials.
        confidence (`float`, *optional*, defaults to `0.95`): Minimum coverage.
    """
    wrong = total - right
    tail = (1 - confidence) / 2
    low = special.betaincinv(right, wrong + 1, tail) if right > 0 else 0.0
    high = special.betaincinv(right + 1, wrong, 1 - tail) if wrong > 0 else 1.0
    return float(low), float(high)


def _estimate(value: float, interval: Any = None) -> Estimate:
    """A value with an interval of scipy's; without one there is no variation, and the width is 0."""
    if interval is None:
        return Estimate(value, value, value)
    low = float(interval.low)
    high = float(interval.high)
    return Estimate(value, low, high)


def mean_accuracy(accuracies: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean pass@1 over problems, with Wilson's interval for the effective number of problems.

    A problem with several samples carries more information than one with a single binary result. The effective number
    of problems is the number of binary results whose mean would have the same variance (Korn and Graubard, 1998, with
    their factor for an estimated variance). If each accuracy is 0 or 1, or all are equal, it is the number of
    problems.

    Args:
        accuracies (sequence of `float`): One per problem, `(P,)`.
        confidence (`float`, *optional*, defaults to `0.95`): Coverage.

    Raises:
        `ValueError`: Without problems.
    """
    values = np.asarray(accuracies, dtype=float)
    if not len(values):
        raise ValueError("The mean accuracy needs at least one problem.")
    problems = len(values)
    mean = float(values.mean())
    if np.isin(values, (0.0, 1.0)).all() or np.ptp(values) == 0:
        return wilson(mean * problems, problems, confidence)
    effective = mean * (1 - mean) * problems / float(values.var(ddof=1))
    quantile = (1 + confidence) / 2
    factor = float(stats.norm.ppf(quantile) / stats.t.ppf(quantile, problems - 1)) ** 2
    return wilson(mean * effective * factor, effective * factor, confidence)


@dataclass(frozen=True)
class PairedComparison:
    """A comparison of two models on the same problems.

    Args:
        problems (`int`): P.
        difference (`Estimate`): Mean accuracy of the second model minus that of the first. Its interval excludes 0 if
            and only if `p_value` is below 1 - confidence.
        only_first (`int`): Problems that only the first solves; with several samples, that it solves more often.
        only_second (`int`): The reverse.
        p_value (`float`): Exact McNemar test (binomial test on the problems that differ), two-sided; with several
            samples, the same test on the effective number of problems that differ.
        graded (`bool`): Whether a problem can be partly correct, with several samples of it or several runs.
    """

    problems: int
    difference: Estimate
    only_first: int
    only_second: int
    p_value: float
    graded: bool = False

    def sentence(
        self,
        first: str,
        second: str,
        flexible: PairedComparison | None = None,
    ) -> str:
        """The result of the comparison with its interval, in one sentence.

        Args:
            first (`str`): Name of the first model.
            second (`str`): Name of the second.
            flexible (`PairedComparison`, *optional*): The same comparison with flexible extraction.
        """
        if self.graded:
            counts = f"{first} is correct more often on {self.only_first}, {second} on {self.only_second}"
            test = f"McNemar's test, weighted by the size of the difference, p = {self.p_value:.2g}"
        else:
            counts = (
                f"only {first} is correct on {self.only_first}, only {second} on {self.only_second}"
            )
            test = f"McNemar's exact test p = {self.p_value:.2g}"
        relation = f"{second} {difference_in_words(self.difference)} {first}"
        said = f"On {self.problems:,} paired problems {relation} ({counts}; {test})"
        if flexible is not None:
            relation = difference_in_words(flexible.difference)
            said += f"; by flexible extraction it {relation} it (p = {flexible.p_value:.2g})"
        return f"{said}."


def difference_in_words(difference: Estimate) -> str:
    """A difference of accuracies as a verb phrase: "is 2.0 points [0.5, 3.5] ahead of", or that none is shown.

    Args:
        difference (`Estimate`): Difference of proportions, from -1 to 1.
    """
    points = 100 * difference.value
    low = 100 * difference.low
    high = 100 * difference.high
    interval = f"[{low:+.1f}, {high:+.1f}]"
    if low > 0:
        return f"is {points:.1f} points {interval} ahead of"
    if high < 0:
        return f"is {-points:.1f} points {interval} behind"
    return f"shows no difference ({points:+.1f} points {interval}) from"


@dataclass(frozen=True)
class _Differing:
    """The problems on which two models differ, reduced to equivalent problems with equal differences.

    With binary results, these are the problems that differ. With several samples, `count` is Kish's effective number:
    `count` problems that differ by `size` have the same sum and sum of squares as the differences.

    Args:
        count (`float`): Effective number of problems.
        won (`float`): Number of them that the second model wins.
        size (`float`): Difference of each, a share.
        outer_size (`float`): The same with one additional, unseen problem, which bounds the differences. It is assumed
            to differ by as much as the largest observed one, or by 1 with the probability that a new one is the
            largest.
    """

    count: float
    won: float
    size: float
    outer_size: float

    @classmethod
    def of(cls, differences: np.ndarray) -> _Differing:
        """Create from the difference on each problem, `(P,)`."""
        sizes = np.abs(differences)
        total = float(sizes.sum())
        if total == 0:
            return cls(0.0, 0.0, 1.0, 1.0)
        squares = float((sizes**2).sum())
        size = squares / total
        won = float(sizes[differences > 0].sum())
        largest = float(sizes.max())
        unseen = largest + (1 - largest) / (np.count_nonzero(sizes) + 1)
        outer_size = (squares + unseen**2) / (total + unseen)
        return cls(total / size, won / size, size, outer_size)

    def p_value(self) -> float:
        """McNemar's exact test: if the models were equal, each would win half of these problems."""
        if not self.count:
            return 1.0
        most = max(self.won, self.count - self.won)
        return min(1.0, 2 * float(special.betainc(most, self.count - most + 1, 0.5)))

    def interval(self, problems: int, confidence: float) -> tuple[float, float]:
        """Interval of the mean difference over all problems; see [`compare_paired`]."""
        rare, often = clopper_pearson(self.count, problems, confidence)
        if not self.count:
            return -often, often
        low, high = (2 * share - 1 for share in clopper_pearson(self.won, self.count, confidence))
        direction = 2 * self.won / self.count - 1
        share = (rare, self.count / problems, often)
        lowest = _lower_end(direction, low, share)
        highest = -_lower_end(-direction, -high, share)
        return (
            lowest * (self.size if lowest > 0 else self.outer_size),
            highest * (self.size if highest < 0 else self.outer_size),
        )


def _lower_end(direction: float, low: float, share: tuple[float, float, float]) -> float:
    """Lower end of the interval of share times direction; it has the sign of the direction's own lower end.

    A product δ is in the interval if the interval of `direction - δ / share`, by the method of variance estimates
    recovery (Zou and Donner, 2008), contains 0. Its end is where `(direction - δ r)² = (direction - low)² + (δ e)²`,
    with `r` = 1 / share and `e` the width of the interval of `r` on the relevant side.

    Args:
        direction (`float`): From -1 to 1.
        low (`float`): Lower end of its interval.
        share (`tuple[float, float, float]`): Lower end, value and upper end, above 0.
    """
    rare, usual, often = share
    rate = 1 / usual
    reach = 1 / rare - rate if low > 0 else rate - 1 / often
    square = rate**2 - reach**2
    half = direction * rate
    constant = low * (2 * direction - low)
    root = math.sqrt(half**2 - square * constant)
    # The smaller solution, in the form without cancellation.
    return constant / (half + root) if half > 0 else (half - root) / square


def compare_paired(
    first: Sequence[float],
    second: Sequence[float],
    confidence: float = 0.95,
) -> PairedComparison:
    """Compare two models problem by problem.

    The difference is the share of problems that differ, times the direction in which they differ (from -1 to 1). The
    exact intervals of both (Clopper and Pearson) are combined. The interval of the direction excludes 0 exactly if
    McNemar's exact test rejects the hypothesis that the models are equal, and so does the interval of the difference.
    For binary results its coverage is 93.9 % to 100 %: `benchmarks/paired_comparison.py` enumerates all outcomes.

    Args:
        first (sequence of `float`): Accuracy on each problem, `(P,)`.
        second (sequence of `float`): Accuracy of the other model on the same problems.
        confidence (`float`, *optional*, defaults to `0.95`): Nominal coverage of the interval.

    Raises:
        `ValueError`: Without problems, or if the numbers of problems differ.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(
            f"A comparison of {len(first)} with {len(second)} problems is not possible: give the same problems, at "
            "least one."
        )
    ours = np.asarray(first, dtype=float)
    theirs = np.asarray(second, dtype=float)
    differences = theirs - ours
    differing = _Differing.of(differences)
    low, high = differing.interval(len(differences), confidence)
    return PairedComparison(
        problems=len(differences),
        difference=Estimate(float(differences.mean()), low, high),
        only_first=int((differences < 0).sum()),
        only_second=int((differences > 0).sum()),
        p_value=differing.p_value(),
        graded=not np.isin((ours, theirs), (0.0, 1.0)).all(),
    )


def mean_over_seeds(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean over training seeds with Student's interval.

    Args:
        values (sequence of `float`): One per seed, or the differences of pairs, at least two.
        confidence (`float`, *optional*, defaults to `0.95`): Coverage.

    Raises:
        `ValueError`: With fewer than two values, because one seed gives no information on the spread.
    """
    seeds = np.asarray(values, dtype=float)
    if len(seeds) < 2:
        raise ValueError(f"{len(seeds)} seed(s) given: an interval over seeds needs at least two.")
    mean = float(seeds.mean())
    if np.ptp(seeds) == 0:
        return _estimate(mean)
    test = stats.ttest_1samp(seeds, 0)
    return _estimate(mean, test.confidence_interval(confidence))


def difference_over_seeds(
    first: Sequence[float],
    second: Sequence[float],
    confidence: float = 0.95,
) -> Estimate:
    """Mean of the second seeds minus that of the first, unpaired, with Welch's interval.

    Args:
        first (sequence of `float`): One per seed, at least two.
        second (sequence of `float`): Likewise; the number may differ.
        confidence (`float`, *optional*, defaults to `0.95`): Coverage.
    """
    mean = float(np.mean(second) - np.mean(first))
    spread = np.ptp(first) + np.ptp(second)
    if spread == 0:
        return _estimate(mean)
    test = stats.ttest_ind(second, first, equal_var=False)
    return _estimate(mean, test.confidence_interval(confidence))


def difference_of_shares(first: Estimate, second: Estimate) -> Estimate:
    """The second proportion minus the first, on unpaired problems, from their Wilson intervals.

    Newcombe (1998), "Interval estimation for the difference between independent proportions", method 10.

    Args:
        first (`Estimate`): From [`wilson`].
        second (`Estimate`): Likewise.
    """
    difference = second.value - first.value
    below = math.hypot(second.value - second.low, first.high - first.value)
    above = math.hypot(second.high - second.value, first.value - first.low)
    low = difference - below
    high = difference + above
    return Estimate(difference, low, high)


def spearman(first: np.ndarray, second: np.ndarray) -> float | None:
    """Rank correlation over the candidates that both rank, with average ranks for ties; `None` if one is constant."""
    in_both = ~np.isnan(first) & ~np.isnan(second)
    first, second = first[in_both], second[in_both]
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(stats.spearmanr(first, second).statistic)
