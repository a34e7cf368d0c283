"""How the constants of the covering selectors were chosen: on development tasks, before their rows of the table.

    python benchmarks/selection/covering_tuning.py             # 4 pools x 4 seeds x 7 candidates, half an hour of CPU
    python benchmarks/selection/covering_tuning.py --report    # the table of what there is

Each pool is measured once by the warmed-up policy, with features of both halves of each prompt's rollouts, and every
candidate chooses 268 of its 2,000 prompts from the same measurement. `debiased`: the noise of a feature is like
nothing but itself, so that S_ii says too much; there, cos(φ_i, φ_i) = 1 becomes the share of the squared length that
the two halves agree on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

# Run as a script, Python looks for modules beside this file only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from selection.cells import RESULTS_FOLDER, Bench, Cell, Settings, evaluate, tasks, train
from selection.table import REGIMES, WORK, sizes
from trl_learnalign import LearnAlignConfig, plan
from trl_learnalign.data.prompts import dataset_digest
from trl_learnalign.measuring.base import Context
from trl_learnalign.measuring.stage import StageMeasurer
from trl_learnalign.pool import Pool
from trl_learnalign.records.store import write_json
from trl_learnalign.selectors import SELECTORS, Selector, scores
from trl_learnalign.selectors.scores import greedy_cover, nearest

RESULTS = RESULTS_FOLDER / "covering_tuning.json"
SEEDS = (100, 101, 102, 103)
RIDGES = (0.0625, 0.25, 1.0, 4.0, 16.0)

Choose = Callable[[StageMeasurer, Pool, int], np.ndarray]


def chosen_by(name: str, ridge: float) -> Choose:
    """Rows of the pool that a selector of the package takes."""

    def choose(measurer: StageMeasurer, pool: Pool, size: int) -> np.ndarray:
        tuned = replace(pool, config=replace(pool.config, logdet_ridge=ridge))
        return measurer.rank(tuned, SELECTORS[name], size).order[:size]

    return choose


def debiased_coverage(measurer: StageMeasurer, pool: Pool, size: int) -> np.ndarray:
    """Rows of the pool that facility location takes where a prompt covers only what is not noise of itself."""
    shares = np.zeros(len(pool))
    halves = replace(pool.features, half=0)
    for (positions, first), (_, whole) in zip(halves, pool.features, strict=True):
        second = whole - first
        agreed = 4 * (first.double() * second.double()).sum(dim=1)
        shares[positions] = agreed / whole.double().square().sum(dim=1)
    learnability = pool.learnability
    positions = np.flatnonzero(learnability > 0)
    own = torch.from_numpy(np.clip(shares[positions], 0, 1))
    ties = plan.tie_order(pool.seed, pool.phase, len(pool.dataset))
    order = np.argsort(ties[pool.prompts[positions]])

    def greedy(rows: Tensor, weights: Tensor, wanted: int) -> np.ndarray:
        found = nearest(rows, weights, len(rows), len(rows))
        is_own = found.prompts == torch.arange(len(rows)).unsqueeze(1)
        values = found.values.double()
        found.values.copy_(torch.where(is_own, values * own[order].unsqueeze(1), values).int())
        return greedy_cover(found, len(rows), wanted)

    def score(measured: Pool) -> np.ndarray:
        return scores.gains_by(measured, greedy)

    debiased = Selector("debiased", score, SELECTORS["learnalign"].needs)
    return measurer.rank(pool, debiased, size).order[:size]


CANDIDATES: dict[str, Choose] = {
    "learnalign_coverage": chosen_by("learnalign_coverage", 1.0),
    "learnalign_coverage debiased": debiased_coverage,
    **{f"learnalign_logdet {ridge:g}": chosen_by("learnalign_logdet", ridge) for ridge in RIDGES},
}


class Tuning:
    """Runs the candidates of a pool.

    Args:
        bench (`Bench`): Makes the base model and the warmed-up policies.
    """

    def __init__(self, bench: Bench):
        self.bench = bench

    def run(self, regime: str, seed: int, names: list[str]) -> list[dict[str, Any]]:
        """Train on what each candidate chooses and measure accuracy on development tasks."""
        bench, settings = self.bench, self.bench.settings
        size = sizes(settings)[2]
        cell = Cell(regime, "tuning", size, seed)
        folder = bench.folder / f"{regime}-{seed}" / "tuning"
        measurer, pool = self._measured(cell, folder)
        development = tasks(regime, settings.held_out, 0, "dev")
        found = []
        for name in names:
            rows = np.sort(CANDIDATES[name](measurer, pool, size))
            wanted = settings.steps * settings.prompts_per_step
            order = plan.training_order(seed, "stage_1", rows, 0, wanted)
            trainer, _ = train(settings, bench.base_model, bench.pool(cell), order, folder, seed)
            accuracy = evaluate(trainer, development)["accuracy"]
            common.log(f"{regime} {seed} {name}: {accuracy:.3f}")
            found.append({"candidate": name, "regime": regime, "seed": seed, "accuracy": accuracy})
        return found

    def _measured(self, cell: Cell, folder: Path) -> tuple[StageMeasurer, Pool]:
        bench, settings = self.bench, self.bench.settings
        config = LearnAlignConfig(
            selection_seed=cell.seed,
            feature_dim=settings.feature_dim,
            shard_size=250,
            text_batch_size=250,
            keep_features=True,
            reliability=True,
        )
        nothing = np.empty(0, dtype=np.int64)
        model = bench.warmed_up(cell)
        trainer, _ = train(settings, model, bench.pool(cell), nothing, folder, cell.seed)
        context = Context.of(trainer, config, scoring_batch_prompts=125)
        measurer = StageMeasurer(context, folder, dataset_digest(trainer.train_dataset))
        everything = np.arange(settings.pool)
        pool, _ = measurer.measure("stage_1", 0, everything, [SELECTORS["learnalign"]])
        return measurer, pool


def report(runs: list[dict[str, Any]]) -> None:
    """Print mean accuracies of all candidates."""
    table = pd.DataFrame(runs).pivot_table(index="candidate", columns="regime", values="accuracy")
    table["mean"] = table.mean(axis=1)
    rows = [[name, *map(float, values)] for name, values in table.iterrows()]
    common.table("Accuracy on development tasks", ["candidate", *table.columns], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--report", action="store_true", help="print what there is and end")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of measurements")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file of the runs")
    arguments = parser.parse_args()
    runs: list[dict[str, Any]] = []
    if arguments.output.exists():
        runs = json.loads(arguments.output.read_text())["runs"]
    if not arguments.report:
        torch.set_num_threads(1)
        tuning = Tuning(Bench(Settings(), arguments.work))
        for seed, regime in product(SEEDS, REGIMES):
            done = [
                run["candidate"] for run in runs if (run["regime"], run["seed"]) == (regime, seed)
            ]
            pending = [name for name in CANDIDATES if name not in done]
            if pending:
                runs += tuning.run(regime, seed, pending)
                write_json(arguments.output, {"seeds": SEEDS, "runs": runs})
    report(runs)


if __name__ == "__main__":
    main()
