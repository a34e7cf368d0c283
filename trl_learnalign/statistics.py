"""Accuracies with their uncertainty: intervals of one model, paired comparisons of two.

Axes: `P` problems. A problem's *accuracy* is its share of right samples (pass@1 of that problem): 0 or 1 with greedy
decoding. Problems are what is drawn from a population, samples of one problem are not independent of each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A figure and the interval around it.

    Args:
        value (`float`): The figure.
        low (`float`): Lower end of the interval.
        high (`float`): Upper end.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.2f} % [{100 * self.low:.2f}, {100 * self.high:.2f}]"


def wilson(right: int, total: int, confidence: float = 0.95) -> Estimate:
    """Share of successes with Wilson's score interval.

    Args:
        right (`int`): Successes.
        total (`int`): Trials, at least one.
        confidence (`float`, *optional*, defaults to `0.95`): Coverage.
    """
    interval = stats.binomtest(right, total).proportion_ci(confidence, method="wilson")
    return _estimate(right / total, interval)


def _estimate(value: float, interval: Any = None) -> Estimate:
    """A figure with an interval of scipy's; without one nothing varies, and it has no width."""
    if interval is None:
        return Estimate(value, value, value)
    low = float(interval.low)
    high = float(interval.high)
    return Estimate(value, low, high)


def mean_accuracy(accuracies: Sequence[float], confidence: float = 0.95, seed: int = 0) -> Estimate:
    """Mean pass@1 over problems: Wilson's interval if each is 0 or 1, else a BCa bootstrap over problems.

    Args:
        accuracies (sequence of `float`): One for each problem, `(P,)`.
        confidence (`float`, *optional*, defaults to `0.95`): Coverage.
        seed (`int`, *optional*, defaults to `0`): Seed of the bootstrap.

    Raises:
        `ValueError`: Without problems.
    """
    values = np.asarray(accuracies, dtype=float)
    if not len(values):
        raise ValueError("There are no problems to take the mean accuracy of.")
    if np.isin(values, (0.0, 1.0)).all():
        return wilson(int(values.sum()), len(values), confidence)
    return _bootstrap(values, confidence, seed)


def _bootstrap(values: np.ndarray, confidence: float, seed: int) -> Estimate:
    mean = float(values.mean())
    if len(values) < 2 or np.ptp(values) == 0:  # nothing to resample
        return _estimate(mean)
    resampled = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=confidence,
        rng=np.random.default_rng(seed),
    )
    return _estimate(mean, resampled.confidence_interval)


@dataclass(frozen=True)
class PairedComparison:
    """Two models on the same problems.

    Args:
        problems (`int`): P.
        difference (`Estimate`): Mean accuracy of the second model minus that of the first, with a bootstrap interval
            over problems; without a problem that tells the models apart, as far as Wilson's interval for none goes.
        only_first (`int`): Problems on which only the first is right; with several samples, more often right.
        only_second (`int`): The reverse.
        p_value (`float`): Exact McNemar test (binomial test on the problems that differ), two-sided; with several
            samples the sign test, which is the same.
    """

    problems: int
    difference: Estimate
    only_first: int
    only_second: int
    p_value: float

    def sentence(
        self,
        first: str,
        second: str,
        flexible: PairedComparison | None = None,
    ) -> str:
        """What the comparison shows, with its interval, in one sentence.

        Args:
            first (`str`): Name of the first model.
            second (`str`): Name of the second.
            flexible (`PairedComparison`, *optional*): The same by flexible extraction.
        """
        counts = f"only {first} is right on {self.only_first}, only {second} on {self.only_second}"
        test = f"McNemar's exact test p = {self.p_value:.2g}"
        relation = f"{second} {difference_in_words(self.difference)} {first}"
        said = f"On {self.problems:,} paired problems {relation} ({counts}; {test})"
        if flexible is not None:
            relation = difference_in_words(flexible.difference)
            said += f"; by flexible extraction it {relation} it (p = {flexible.p_value:.2g})"
        return f"{said}."


def difference_in_words(difference: Estimate) -> str:
    """A difference of accuracies as a verb: "is 2.0 points [0.5, 3.5] ahead of", or that none is shown.

    Args:
        difference (`Estimate`): Of shares, from -1 to 1.
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


def compare_paired(
    first: Sequence[float],
    second: Sequence[float],
    confidence: float = 0.95,
    seed: int = 0,
) -> PairedComparison:
    """Compare two models problem by problem.

    Args:
        first (sequence of `float`): Accuracy on each problem, `(P,)`.
        second (sequence of `float`): Those of the other model on the same problems.
        confidence (`float`, *optional*, defaults to `0.95`): Coverage of the interval.
        seed (`int`, *optional*, defaults to `0`): Seed of the bootstrap.

    Raises:
        `ValueError`: Without problems, or if there are not equally many.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(
            f"Compared are {len(first)} with {len(second)} problems: give the same ones, at least one."
        )
    ours = np.asarray(first, dtype=float)
    theirs = np.asarray(second, dtype=float)
    differences = theirs - ours
    only_first = int((differences < 0).sum())
    only_second = int((differences > 0).sum())
    # McNemar: were the models equal, each would win half of the problems that tell them apart.
    discordant = only_first + only_second
    if discordant:
        difference = _bootstrap(differences, confidence, seed)
        test = stats.binomtest(only_second, discordant)
        p_value = float(test.pvalue)
    else:
        # Resampling nothing but ties would claim that other problems would all be ties as well.
        most = wilson(0, len(differences), confidence).high
        difference = Estimate(0.0, -most, most)
        p_value = 1.0
    return PairedComparison(
        problems=len(differences),
        difference=difference,
        only_first=only_first,
        only_second=only_second,
        p_value=p_value,
    )


def mean_over_seeds(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean over training seeds with Student's interval.

    Args:
        values (sequence of `float`): One for each seed, or the differences of pairs, at least two.
        confidence (`float`, *optional*, defaults to `0.95`): Coverage.

    Raises:
        `ValueError`: With fewer than two: one seed says nothing about the spread.
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
    """Mean of the second seeds minus that of the first, which are not paired, with Welch's interval.

    Args:
        first (sequence of `float`): One for each seed, at least two.
        second (sequence of `float`): Likewise, also of another number.
        confidence (`float`, *optional*, defaults to `0.95`): Coverage.
    """
    mean = float(np.mean(second) - np.mean(first))
    spread = np.ptp(first) + np.ptp(second)
    if spread == 0:
        return _estimate(mean)
    test = stats.ttest_ind(second, first, equal_var=False)
    return _estimate(mean, test.confidence_interval(confidence))


def difference_of_shares(first: Estimate, second: Estimate) -> Estimate:
    """The second share minus the first, of problems that are not paired, from their Wilson intervals.

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
    """Rank correlation over the candidates that both can rank, ties sharing their ranks; `None` if one is constant."""
    in_both = ~np.isnan(first) & ~np.isnan(second)
    first, second = first[in_both], second[in_both]
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(stats.spearmanr(first, second).statistic)
