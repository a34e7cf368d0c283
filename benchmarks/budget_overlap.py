"""What a rollout budget finds of a pool, against as many rollouts spread evenly and a reference of 64 for each prompt.

    python benchmarks/budget_overlap.py --json docs/results/budget_overlap.json
    python benchmarks/budget_overlap.py --tune --json docs/results/budget_tuning.json   # pools of other seeds

Pools and warmed-up policies are those of the selection table. In the toy tasks a rollout is right if it is the
answer, so a prompt's success rate is read off the model, and rollouts are drawn from it. The rounds are the package's
own, with what tells prompts apart read by the base model, and nothing known of the warm-up's rollouts.

Methods: `uniform G'`, G' rollouts of every prompt; `sample`, G rollouts of a random sample (`pool_sample`); `budget`,
as many in rounds (`rollout_budget`). Figures: `overlap`, of the N prompts of largest p(1 - p) found and those of the
reference; `signal`, the pool's p(1 - p) that lies in the rolled-out prompts; `learnable`, prompts found with both
right and wrong rollouts; `kinds`, the effective number of families and lengths among these (exponential of the
entropy).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import common
import numpy as np
import pandas as pd
import torch
from continual.loop import Policy, success_rates
from continual.quick import Problems
from scipy import stats
from selection.cells import BUDGET, Bench, Cell, Settings
from selection.table import REGIMES, TUNING_SEEDS, WORK

from trl_learnalign import plan, rng
from trl_learnalign.adaptive import Outcomes
from trl_learnalign.adaptive.belief import Belief, prompt_features
from trl_learnalign.adaptive.order import (
    after_rounds,
    budget_size,
    round_sizes,
    sample_by_learnability,
)
from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.rng import key

REFERENCE = 64
"""Rollouts of a prompt that the choice is held against."""

FIGURES = ("overlap", "signal", "learnable", "kinds")
DEFAULTS = LearnAlignConfig(**BUDGET)


@dataclass(frozen=True)
class PoolOfRates:
    """A pool whose rollouts are drawn. Axis: `n` prompts.

    Args:
        rates (`np.ndarray`): Success rates under the warmed-up policy, `(n,)`.
        features (`np.ndarray`): What tells prompts apart beforehand, `(n, D)`.
        kinds (`np.ndarray`): Number of the family and length of each, `(n,)`.
        seed (`int`): Of everything drawn.
        size (`int`): N.
    """

    rates: np.ndarray
    features: np.ndarray
    kinds: np.ndarray
    seed: int
    size: int

    def right(self, name: str, rows: np.ndarray, rollouts: int) -> np.ndarray:
        """Right rollouts of some prompts."""
        rng = np.random.default_rng(key(self.seed, name))
        return rng.binomial(rollouts, self.rates)[rows]

    @property
    def everybody(self) -> np.ndarray:
        """All rows."""
        return np.arange(len(self.rates))

    def best(self, learnability: np.ndarray) -> set[int]:
        """The N prompts of the largest learnability, ties in seeded order."""
        ties = plan.tie_order(self.seed, "overlap", len(self.rates))
        return set(np.lexsort((ties, -learnability))[: self.size].tolist())


def read_pool(bench: Bench, regime: str, seed: int, size: int) -> PoolOfRates:
    """A pool of the selection table with its warmed-up policy."""
    cell = Cell(regime, "budget", size, seed)
    pool, rate = bench.pool(cell), bench.settings.learning_rate
    base = Policy(bench.base_model, rate, seed)
    problems = Problems(base, pool)
    warmed_up = Policy(bench.warmed_up(cell), rate, seed)
    names = [f"{name} {size}" for name, size in zip(pool["family"], pool["length"], strict=True)]
    return PoolOfRates(
        rates=success_rates(warmed_up, problems.prompts, problems.answers),
        features=prompt_features(base.embed(problems.prompts).numpy()),
        kinds=np.unique(names, return_inverse=True)[1],
        seed=seed,
        size=size,
    )


Counts = tuple[np.ndarray, np.ndarray]
"""Right rollouts and rollouts of each prompt, `(n,)` each."""


def uniform(pool: PoolOfRates, rollouts: int) -> Counts:
    """As many rollouts of every prompt."""
    right = pool.right("uniform", pool.everybody, rollouts)
    return right, np.full(len(right), rollouts)


def in_rounds(
    pool: PoolOfRates,
    share: float,
    rounds: int,
    focus: float,
    rollouts: int,
    again: float = 0.0,
) -> Counts:
    """Within a budget, as `trl_learnalign.measuring.stage`.

    Args:
        pool (`PoolOfRates`): The pool.
        share (`float`): `rollout_budget`.
        rounds (`int`): `budget_rounds`.
        focus (`float`): `budget_exponent`.
        rollouts (`int`): G.
        again (`float`, *optional*): Part of the budget that goes to a second group of the prompts that seem best.
    """
    everybody = pool.everybody
    before = Belief(pool.features, LearnAlignConfig.adaptive())
    right = np.zeros(len(everybody), dtype=np.int64)
    total = np.zeros(len(everybody), dtype=np.int64)
    told: list[Outcomes] = []
    for number, size in enumerate(round_sizes(len(everybody), share * (1 - again), rounds), 1):
        if told:
            belief = after_rounds(before, told, before.generation + 1)
            stream = rng.key(pool.seed, "round", "stage_1", number)
            rows = sample_by_learnability(belief, np.flatnonzero(total == 0), size, focus, stream)
        else:
            rows = plan.scored_sample(pool.seed, "stage_1", everybody, size)
        found = pool.right("rounds", rows, rollouts)
        right[rows], total[rows] = found, rollouts
        told.append(Outcomes.at(before.generation + 1, rows, found, rollouts - found))
    if again:
        rates = right / np.maximum(total, 1)
        ties = plan.tie_order(pool.seed, "again", len(everybody))
        best = np.lexsort((ties, -rates * (1 - rates)))
        rows = best[: budget_size(len(everybody), share) - int((total > 0).sum())]
        right[rows] += pool.right("again", rows, rollouts)
        total[rows] += rollouts
    return right, total


def judged(pool: PoolOfRates, counts: Counts) -> dict[str, float]:
    """The figures of a way to spend rollouts."""
    right, total = counts
    rates = right / np.maximum(total, 1)
    learnability = np.where(total > 0, rates * (1 - rates), -1.0)
    reference = pool.right("reference", pool.everybody, REFERENCE) / REFERENCE
    shared = pool.best(learnability) & pool.best(reference * (1 - reference))
    truth = pool.rates * (1 - pool.rates)
    of_kind = np.bincount(pool.kinds[learnability > 0])
    shares = of_kind[of_kind > 0] / of_kind.sum()
    return {
        "rollouts": int(total.sum()),
        "overlap": len(shared) / pool.size,
        "signal": float(truth[total > 0].sum() / truth.sum()),
        "learnable": int((learnability > 0).sum()),
        "kinds": float(np.exp(-(shares * np.log(shares)).sum())),
    }


def methods(rollouts: int) -> dict[str, Callable[[PoolOfRates], Counts]]:
    """What is compared, at equal rollouts but for the first."""
    share = DEFAULTS.rollout_budget
    assert share is not None
    few = int(share * rollouts)
    rounds = partial(in_rounds, share=share, rollouts=rollouts)
    defaults = {"rounds": DEFAULTS.budget_rounds, "focus": DEFAULTS.budget_exponent}
    return {
        f"uniform {rollouts}": partial(uniform, rollouts=rollouts),
        f"uniform {few}": partial(uniform, rollouts=few),
        "sample": partial(rounds, rounds=1, focus=0.0),
        "budget": partial(rounds, **defaults),
    }


def variants(rollouts: int) -> dict[str, Callable[[PoolOfRates], Counts]]:
    """What the defaults were chosen among."""
    found = {}
    for share, rounds, focus, again in (
        *product((0.4,), (4,), (0.5, 1.0, 2.0, 4.0, 8.0, 100.0), (0.0,)),
        *product((0.4,), (2, 8), (2.0,), (0.0,)),
        *product((0.25, 0.3), (4,), (2.0,), (0.0,)),
        *product((0.4,), (4, 8), (2.0,), (0.25, 0.5)),
    ):
        name = f"share {share}, rounds {rounds}, focus {focus}, again {again}"
        options = {"share": share, "rounds": rounds, "focus": focus, "again": again}
        found[name] = partial(in_rounds, rollouts=rollouts, **options)
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, write."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    settings = Settings()
    bench = Bench(settings, options.work)
    compared = variants(settings.rollouts) if options.tune else methods(settings.rollouts)
    rows = []
    for regime, seed in product(options.regimes, options.seeds):
        pool = read_pool(bench, regime, seed, options.size)
        for name, spend in compared.items():
            rows.append(
                {"regime": regime, "seed": seed, "method": name} | judged(pool, spend(pool))
            )
        common.log(f"{regime} {seed}")
    table = pd.DataFrame(rows)
    summary = []
    for (regime, name), group in table.groupby(["regime", "method"], sort=False):
        row: dict[str, Any] = {"regime": regime, "method": name}
        for figure in FIGURES:
            row[figure], row[f"{figure}_half"] = interval(group[figure].to_numpy())
        summary.append(row)
    if not options.tune:
        summary += differences(table)
    header = ["regime", "method", *(part for name in FIGURES for part in (name, "±"))]
    common.table(
        f"Found within a budget (N = {options.size}, 95 % intervals over seeds)",
        header,
        [list(row.values()) for row in summary],
    )
    del options.work  # a place on this machine, not a setting
    figures = {"summary": summary, "runs": rows}
    common.write_json(options.json, figures, options)
    return figures


def differences(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Budget less the others, paired by pool."""
    found = []
    for regime, group in table.groupby("regime", sort=False):
        by_method = dict(list(group.groupby("method", sort=False)))
        ours = by_method.pop("budget")
        for name, theirs in by_method.items():
            row: dict[str, Any] = {"regime": regime, "method": f"budget - {name}"}
            for figure in FIGURES:
                paired = ours[figure].to_numpy() - theirs[figure].to_numpy()
                row[figure], row[f"{figure}_half"] = interval(paired)
            found.append(row)
    return found


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean over seeds, and half the width of its 95 % interval (Student's t)."""
    count = len(values)
    if count < 2:
        return float(values.mean()), float("nan")
    factor = float(stats.t.ppf(0.975, count - 1) / np.sqrt(count))
    return float(values.mean()), factor * float(values.std(ddof=1))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = common.parser(__doc__, model=None)
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=REGIMES)
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 to 7, or those to tune on")
    parser.add_argument("--size", type=int, default=268, help="N")
    parser.add_argument("--tune", action="store_true", help="compare variants of the budget")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of warmed-up policies")
    options = parser.parse_args(arguments)
    if options.seeds is None:
        options.seeds = list(TUNING_SEEDS) if options.tune else list(range(8))
    return options


if __name__ == "__main__":
    main(sys.argv[1:])
