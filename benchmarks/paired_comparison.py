"""How often `compare` finds a difference where there is none, and how often where there is one.

    python benchmarks/paired_comparison.py --json docs/results/paired_comparison.json

One sample of each problem: every outcome is counted with its probability, so the figures are exact. Several samples
and several seeds: drawn, from models of equal and of different skill. A claim is a sentence that says "ahead of" or
"behind": its interval leaves 0 out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import common
import numpy as np
from scipy import stats

from trl_learnalign.intervals import Estimate, compare_paired
from trl_learnalign.records.summary import Accuracy
from trl_learnalign.report.contrast import Variant, contrast

PROBLEMS = (30, 100, 500)
DISCORDANT = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3)
"""Shares of the problems that only one of the two models solves."""
DIRECTIONS = (0.0, 0.3, 0.6, 1.0)
"""Of these, what the second model wins minus what the first does: 0 for equal models."""
SAMPLES = (2, 4, 16)
SEEDS = (2, 3, 5)
HELD_OUT = 100
"""Problems that runs of several seeds are judged on."""
UNSURE = (0.02, 0.2)
"""Shares of the problems that a model solves in some of its runs only."""
LUCK = 0.5
"""Standard deviation of the skill of runs that differ in their seeds alone, in logits; none with one run each, whose
interval says nothing of other seeds."""
_NEGLIGIBLE = 1e-12


# ---- One sample of each problem: exact ------------------------------------------------------------------------------


def interval(problems: int, differ: int, won: int) -> Estimate:
    """Of the difference of two models, of which the second wins some of the problems that differ."""
    same = problems - differ
    second = [1.0] * won + [0.0] * (differ - won) + [0.0] * same
    first = [0.0] * won + [1.0] * (differ - won) + [0.0] * same
    return compare_paired(first, second).difference


def outcomes(problems: int, shares: Sequence[float]) -> Iterator[tuple[int, int, Estimate]]:
    """All outcomes that any of the shares makes likely enough: problems that differ, those won, the interval."""
    most = int(stats.binom.isf(_NEGLIGIBLE, problems, max(shares)))
    for differ in range(min(problems, most) + 1):
        for won in range(differ // 2 + 1):
            found = interval(problems, differ, won)
            yield differ, won, found
            if won != differ - won:
                yield differ, differ - won, Estimate(-found.value, -found.high, -found.low)


def one_sample(
    problems: int, shares: Sequence[float], directions: Sequence[float]
) -> list[dict[str, float]]:
    """Claims and coverage for each share of problems that differ and each direction; sums over all outcomes."""
    differ, won, found = zip(*outcomes(problems, shares), strict=True)
    low = np.array([each.low for each in found])
    high = np.array([each.high for each in found])
    rows = []
    for share in shares:
        for direction in directions:
            differing = stats.binom.pmf(differ, problems, share)
            chance = differing * stats.binom.pmf(won, differ, (1 + direction) / 2)
            truth = share * direction
            rows.append(
                {
                    "problems": problems,
                    "discordant": share,
                    "difference": truth,
                    "ahead": float(chance[low > 0].sum()),
                    "behind": float(chance[high < 0].sum()),
                    "coverage": float(chance[(low <= truth) & (truth <= high)].sum()),
                }
            )
    return rows


# ---- Several samples of each problem: drawn -------------------------------------------------------------------------


def several_samples(
    problems: int, samples: int, unsure: float, shift: float, draws: int, seed: int
) -> dict[str, float]:
    """The same of models that solve some problems in some of their samples only.

    Args:
        problems (`int`): P.
        samples (`int`): Of each problem, by each model.
        unsure (`float`): Share of the problems that are neither always nor never solved.
        shift (`float`): By how much the second model is better at these, in logits.
        draws (`int`): Comparisons.
        seed (`int`): Of the draws.
    """
    rng = np.random.default_rng(seed)
    ahead = behind = covered = 0
    truth = unsure * _mean_rate_gained(shift)
    for _ in range(draws):
        rates = _rates(rng, problems, unsure, (0.0, shift))
        first, second = rng.binomial(samples, rates) / samples
        found = compare_paired(first, second).difference
        ahead += found.low > 0
        behind += found.high < 0
        covered += found.low <= truth <= found.high
    return {
        "problems": problems,
        "samples": samples,
        "unsure": unsure,
        "difference": truth,
        "ahead": ahead / draws,
        "behind": behind / draws,
        "coverage": covered / draws,
    }


def _rates(
    rng: np.random.Generator, problems: int, unsure: float, skills: Sequence[float]
) -> np.ndarray:
    """How often each model solves each problem, `(M, P)`: never, or by the logit of an unsure one and its skill."""
    is_unsure = rng.random(problems) < unsure
    logits = rng.normal(0, 1, problems)
    rates = [np.where(is_unsure, 1 / (1 + np.exp(-logits - skill)), 0.0) for skill in skills]
    return np.array(rates)


def _mean_rate_gained(shift: float) -> float:
    """Mean over a standard normal logit of what a shift adds to the rate."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    gained = 1 / (1 + np.exp(-nodes - shift)) - 1 / (1 + np.exp(-nodes))
    return float(gained @ weights / math.sqrt(2 * math.pi))


# ---- Several seeds: drawn -------------------------------------------------------------------------------------------

KINDS = ("paired", "other seeds", "other problems")
"""Of two variants: the same seeds; other seeds; one seed each, judged on other problems."""


def several_seeds(
    kind: str, problems: int, seeds: int, unsure: float, shift: float, draws: int, seed: int
) -> dict[str, Any]:
    """Claims of the sentence about two variants of several runs, each run with luck of its own.

    Args:
        kind (`str`): Of [`KINDS`].
        problems (`int`): Held-out problems, each answered once.
        seeds (`int`): Runs of each variant.
        unsure (`float`): Share of the problems that are neither always nor never solved.
        shift (`float`): By how much the second variant is better at these, in logits.
        draws (`int`): Comparisons.
        seed (`int`): Of the draws.
    """
    rng = np.random.default_rng(seed)
    ahead = behind = 0
    for _ in range(draws):
        luck = rng.normal(0, LUCK if seeds > 1 else 0, 2 * seeds)
        skills = luck + np.repeat([0.0, shift], seeds)
        rates = _rates(rng, problems, unsure, skills)
        if kind == "other problems":
            rates[seeds:] = _rates(rng, problems, unsure, skills)[seeds:]
        right = rng.random(rates.shape) < rates
        numbers = range(seeds, 2 * seeds) if kind == "other seeds" else range(seeds)
        own = "others" if kind == "other problems" else "the same"
        first = _variant(right[:seeds], range(seeds), "the same")
        second = _variant(right[seeds:], numbers, own)
        found = contrast(first, second)
        assert found is not None
        ahead += found.difference.low > 0
        behind += found.difference.high < 0
    return {
        "kind": kind,
        "problems": problems,
        "seeds": seeds,
        "unsure": unsure,
        "shift": shift,
        "ahead": ahead / draws,
        "behind": behind / draws,
    }


def _variant(right: np.ndarray, seeds: Sequence[int], problem_set: str) -> Variant:
    runs = []
    for number, row in zip(seeds, right, strict=True):
        final = Accuracy("stage_1", 1, float(row.mean()), len(row), tuple(row), problem_set)
        runs.append(SimpleNamespace(seed=number, final_accuracy=final))
    return Variant("", runs)


# ---- All of it ------------------------------------------------------------------------------------------------------


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark."""
    parser = common.parser(__doc__ or "", model=None)
    parser.add_argument("--problems", type=int, nargs="+", default=PROBLEMS)
    parser.add_argument("--draws", type=int, default=1000, help="comparisons of each drawn setting")
    arguments = parser.parse_args(given)
    figures: dict[str, Any] = {"one_sample": [], "several_samples": [], "several_seeds": []}
    for problems in arguments.problems:
        figures["one_sample"] += one_sample(problems, DISCORDANT, DIRECTIONS)
        common.log(f"{problems} problems, one sample: done")
        for unsure in UNSURE:
            for shift in (0.0, 1.0):
                for samples in SAMPLES:
                    row = several_samples(
                        problems, samples, unsure, shift, arguments.draws, arguments.seed
                    )
                    figures["several_samples"].append(row)
        common.log(f"{problems} problems, several samples: done")
    for kind, seeds in _seed_settings():
        for unsure in UNSURE:
            for shift in (0.0, 1.0):
                row = several_seeds(
                    kind, HELD_OUT, seeds, unsure, shift, arguments.draws, arguments.seed
                )
                figures["several_seeds"].append(row)
    common.log("several seeds: done")
    for name, rows in figures.items():
        cells = [[_shown(value) for value in row.values()] for row in rows]
        common.table(name.replace("_", " "), list(rows[0]), cells)
    common.write_json(arguments.json, figures, arguments)
    return figures


def _seed_settings() -> list[tuple[str, int]]:
    settings = [(kind, seeds) for kind in ("paired", "other seeds") for seeds in SEEDS]
    return [*settings, ("other problems", 1)]


def _shown(value: Any) -> Any:
    return f"{value:.4f}" if isinstance(value, float) else value


if __name__ == "__main__":
    main()
