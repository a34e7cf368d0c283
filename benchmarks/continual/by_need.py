"""Rollouts by need: units of 2 rollouts go to prompts by their marginal gain, on development tasks.

    python benchmarks/continual/by_need.py            # all cells; interrupt it at will and call it again
    python benchmarks/continual/by_need.py --report   # paired differences to groups of 2 and 4

A success rate p is drawn from the belief about each prompt that competes. With n rollouts its worth is the chance
that they are mixed, 1 - p^n - (1 - p)^n, times its expected gain p(1 - p)². Each unit goes to the prompt whose worth
it raises most. Explored prompts have one unit for certain, and compete for more. All rollouts of a prompt in a
generation share one mean and one deviation.

Cells are run until LearnAlign's total compute is spent at each price of a generated token, with 128 rollouts a step,
and evaluated on the split "dev". Constants are compared on the first seed, and lines on the other seeds.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

# Run as a script, Python looks for modules beside this file only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
import torch
from selection.cells import RESULTS_FOLDER, Settings
from selection.report import interval

from continual import pools
from continual.cells import Curve, Line
from continual.group_size import PRICES
from continual.loop import Policy, Rollouts
from continual.quick import STAGE, QuickDriver, Run
from continual.table import LINES, Cell, Rows, run_all, tuning_arguments
from trl_learnalign import rng
from trl_learnalign.adaptive import Outcomes
from trl_learnalign.adaptive.belief import NEVER, Belief, area_under_curve, brier_score
from trl_learnalign.adaptive.order import AdaptiveOrder, expected_gain
from trl_learnalign.config import LearnAlignConfig

RESULTS = RESULTS_FOLDER / "by_need_tuning.parquet"
DRIVER = "continual.by_need:ByNeedDriver"
UNIT = 2
"""Rollouts of a unit."""

SEEDS = range(100, 104)
TUNED_ON = SEEDS[0]
TUNED_REGIMES = ("longtail", pools.RARE)
REGIMES = ("longtail", pools.HARD)
CHOSEN = (8, 0.5)
"""The largest number of units and the share that explores, best on the first seed."""


def named(most: int, exploring: float) -> str:
    """A line's name, e.g. `by need, at most 8, exploring 0.5`."""
    return f"by need, at most {most}, exploring {exploring:g}"


UNIFORM = {name: LINES[name] for name in ("adaptive, G = 2", "adaptive, G = 4")}
BY_NEED = {
    named(most, exploring): Line(
        LearnAlignConfig.adaptive(adaptive_exploration=exploring), rollouts=UNIT, most_units=most
    )
    for most, exploring in ((8, 0.5), (8, 0.25), (4, 0.5))
}


class UnitsByNeed(AdaptiveOrder):
    """The adaptive order of units: a prompt stands in a generation once for each of its units.

    Args:
        most (`int`): Units that a prompt may get.
        pool, count, config, seed, name: As in the class above; `count` units.
    """

    def __init__(self, most: int, *given: Any):
        super().__init__(*given)
        self.most = most

    def draw(self, belief: Belief, generation: int) -> np.ndarray:
        """Rows of a generation's units, `(count,)`; those of one prompt are neighbours."""
        explored = self.explored(generation)
        candidates = np.setdiff1d(self.candidates(generation), explored)
        last = belief.last_rolled_out[candidates]
        candidates = candidates[(last == NEVER) | (generation - last > self.cool_down)]
        rows = np.concatenate([explored, candidates])
        if len(rows) * self.most < self.count:
            return super().draw(belief, generation)
        stream = rng.key(self.seed, "by need", self.name, generation)
        uniforms = ((rng.random_bits(stream, rows) >> np.uint64(11)) + 0.5) * 2.0**-53
        rates = belief.posterior(rows, generation).sample(uniforms)
        gains = marginal_gains(rates, self.most, self.config.adaptive_gain_exponent)
        gains[: len(explored), 0] = np.inf
        return np.repeat(rows, most_worthwhile_units(gains, self.count))


def marginal_gains(rates: np.ndarray, most: int, headroom: float) -> np.ndarray:
    """What each further unit adds to the worth of prompts with these success rates, `(P, most)`; it falls."""
    rollouts = UNIT * np.arange(1, most + 1)
    own = rates[:, np.newaxis]
    mixed = 1 - own**rollouts - (1 - own) ** rollouts
    return np.diff(mixed, axis=1, prepend=0) * expected_gain(own, headroom)


def most_worthwhile_units(gains: np.ndarray, count: int) -> np.ndarray:
    """Units of each prompt, `(P,)`, if the `count` largest of all marginal gains are taken."""
    first = np.argsort(-gains.ravel(), kind="stable")[:count]
    return np.bincount(first // gains.shape[1], minlength=len(gains))


def shared_advantages(rows: np.ndarray, rewards: torch.Tensor) -> torch.Tensor:
    """Advantages of units, `(U, 2)`: all rollouts of a prompt share one mean and one deviation.

    Args:
        rows (`np.ndarray`): `(U,)`, the prompt of each unit.
        rewards (`torch.Tensor`): `(U, 2)`.
    """
    advantages = torch.empty_like(rewards)
    for row in np.unique(rows):
        own = torch.from_numpy(rows == row)
        deviations = rewards[own] - rewards[own].mean()
        advantages[own] = deviations / (rewards[own].std() + 1e-4)
    return advantages


class RunByNeed(Run):
    """A run whose prompts have different numbers of rollouts."""

    def __init__(self, *given: Any):
        super().__init__(*given)
        self.prompts_with = np.zeros(self.line.most_units + 1, dtype=np.int64)
        self.judged: list[np.ndarray] = []

    def _chooser(self, adaptive: LearnAlignConfig) -> tuple[Belief, AdaptiveOrder]:
        belief, order = super()._chooser(adaptive)
        given = order.pool, order.count, adaptive, self.seed, STAGE
        return belief, UnitsByNeed(self.line.most_units, *given)

    def _chosen(self, number: int) -> tuple[Rollouts, torch.Tensor | None]:
        belief, order = self.chooser
        before = self.groups, self.useful
        rollouts = self._roll_out(order.draw(belief, number), number)
        prompts, units = np.unique(rollouts.rows, return_counts=True)
        right, total = np.zeros(len(prompts), dtype=np.int64), UNIT * units
        np.add.at(right, np.searchsorted(prompts, rollouts.rows), rollouts.right)
        self.groups = before[0] + len(prompts)
        self.useful = before[1] + int(((right > 0) & (right < total)).sum())
        self.prompts_with += np.bincount(units, minlength=len(self.prompts_with))
        outcomes = Outcomes.at(number, prompts, right, total - right)
        self.predicted.append(belief.record(outcomes, number).success_rate)
        self.seen.append(right)
        self.judged.append(total)
        return rollouts, shared_advantages(rollouts.rows, rollouts.rewards)

    def notes(self) -> dict[str, Any]:
        """As of any run, and how many prompts had how many units, with their share of right rollouts."""
        predicted, right, total = map(np.concatenate, (self.predicted, self.seen, self.judged))
        units = total // UNIT
        rights = np.bincount(units, right, len(self.prompts_with))
        totals = np.bincount(units, total, len(self.prompts_with))
        return {
            "brier": brier_score(predicted, right, total - right),
            "auc": area_under_curve(predicted, right, total - right),
            "concentration": self.chooser[0].concentration,
            "prompts_with_units": self.prompts_with.tolist(),
            "rate_by_units": (rights / np.maximum(totals, 1)).round(3).tolist(),
        }


class ByNeedDriver(QuickDriver):
    """The quick driver, on the pools of `continual.pools` too, with units by need where a line has them."""

    def __call__(
        self, regime: str, seed: int, line: Line, budgets: Mapping[float, float], split: str
    ) -> Curve:
        """As [`continual.cells.Driver`]."""
        self.model = pools.base_model(regime)
        with pools.toy_tasks(regime):
            return super().__call__(regime, seed, line, budgets, split)

    def begun(self, settings: Settings, policy: Policy, regime: str, seed: int, line: Line) -> Run:
        """A run before its first step."""
        kind = RunByNeed if line.most_units > 1 else Run
        return kind(settings, policy, regime, seed, line)


def cells() -> dict[Cell, Line]:
    """The first seed with all constants, then the others, groups of 2 first."""
    lines = {**BY_NEED, **UNIFORM}
    keys = [(TUNED_ON, regime, name) for name, regime in product(BY_NEED, TUNED_REGIMES)]
    keys += product(SEEDS[1:], REGIMES, (named(*CHOSEN), "adaptive, G = 2"))
    keys += product(SEEDS[1:], REGIMES, ("adaptive, G = 4",))
    return {Cell(regime, name, seed): lines[name] for seed, regime, name in keys}


def measures(table: pd.DataFrame) -> pd.DataFrame:
    """Mean accuracy of the curve and its end (the last two marks) of each cell and price."""
    keys = ["regime", "price", "selector", "seed"]
    ends = table[table["mark"] >= 0.9].groupby(keys)["accuracy"].mean()
    return pd.DataFrame({"curve": table.groupby(keys)["accuracy"].mean(), "end": ends})


def paired(table: pd.DataFrame, ours: str, theirs: str) -> pd.DataFrame:
    """Differences of two lines in points, paired by seed, with 95 % intervals, by regime and price.

    Args:
        table (`pd.DataFrame`): Rows of cells.
        ours, theirs (`str`): Names of the lines; what is ahead of `theirs` is positive.
    """
    found = measures(table)
    ours_there, theirs_there = (found.xs(name, level="selector") for name in (ours, theirs))
    differences = 100 * (ours_there - theirs_there).dropna()
    by = differences.groupby(["regime", "price"])
    return by.agg(in_words).assign(seeds=by.size())


def in_words(values: pd.Series) -> str:
    """Mean over seeds and its interval."""
    mean, low, high = interval(values.to_numpy())
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def main() -> None:
    given = tuning_arguments(__doc__, RESULTS)
    rows = Rows(given.output, DRIVER)
    if given.report:
        table = rows.frame()
        tuned = measures(table[table["seed"] == TUNED_ON]).unstack("price").round(4)
        print(tuned.to_string())
        later = table[table["seed"] != TUNED_ON]
        print(measures(later).groupby(["regime", "price", "selector"]).mean().round(4).to_string())
        for theirs in sorted(set(later["selector"]) & set(UNIFORM)):
            print(f"{named(*CHOSEN)} against {theirs}")
            print(paired(later, named(*CHOSEN), theirs).to_string())
        return
    run_all(cells(), rows, DRIVER, "dev", given.workers, PRICES)


if __name__ == "__main__":
    main()
