"""Does the split-half reliability of a ranking predict how well a second, independent scoring agrees with it?

    python benchmarks/ranking_reliability.py --json docs/results/ranking_reliability.json

For each regime a pool is scored twice with the same warmed-up policy and other rollouts. The recorded prediction
(Spearman-Brown from two halves of the first scoring) stands beside the rank correlation of the two.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from selection.cells import Bench, Cell, Settings, train
from selection.table import REGIMES, WORK

from trl_learnalign import LearnAlignConfig
from trl_learnalign.data.prompts import dataset_digest
from trl_learnalign.intervals import spearman
from trl_learnalign.measuring.base import Context
from trl_learnalign.measuring.stage import StageMeasurer
from trl_learnalign.ranking import Ranking, reliability
from trl_learnalign.records.layout import to_json
from trl_learnalign.selectors import SELECTORS

NAMES = ("learnability", "alignment", "learnalign")


def score_twice(
    bench: Bench, cell: Cell, folder: Path
) -> tuple[dict[str, Ranking], dict[str, Ranking]]:
    """Two rankings of a pool by each selector, from rollouts of their own."""
    # The letter of Eq. 9, by which the published figures were made.
    config = LearnAlignConfig(
        selection_seed=cell.seed, reliability=True, shard_size=250, zero_learnability="by_score"
    )
    nothing = np.empty(0, dtype=np.int64)
    trainer, _ = train(
        bench.settings,
        bench.warmed_up(cell),
        bench.pool(cell),
        nothing,
        folder / "trainer",
        cell.seed,
    )
    digest = dataset_digest(trainer.train_dataset)
    scorer = StageMeasurer(Context.of(trainer, config, scoring_batch_prompts=125), folder, digest)
    rankings = []
    for stage in ("first", "second"):  # the name of the stage is part of the rollouts' seeds
        pool, _ = scorer.measure(
            stage, 0, np.arange(bench.settings.pool), [SELECTORS[name] for name in NAMES]
        )
        rankings.append({name: scorer.rank(pool, SELECTORS[name]) for name in NAMES})
    return rankings[0], rankings[1]


def main(given: list[str] | None = None) -> dict[str, Any]:
    parser = common.parser(__doc__, model=False)
    parser.add_argument("--pool", type=int, default=400, help="prompts of a pool")
    parser.add_argument(
        "--share", type=float, default=0.134, help="N of the top-N overlap as a share of the pool"
    )
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=REGIMES)
    parser.add_argument(
        "--work", type=Path, default=WORK / "reliability", help="folder of scorings"
    )
    arguments = parser.parse_args(given)
    torch.set_num_threads(arguments.threads)
    bench = Bench(dataclasses.replace(Settings(), pool=arguments.pool), arguments.work)
    size = round(arguments.share * arguments.pool)
    figures, rows = {}, []
    for regime in arguments.regimes:
        cell = Cell(regime, "learnalign", size, arguments.seed)
        first, second = score_twice(
            bench, cell, arguments.work / f"{regime}-{arguments.seed}-twice"
        )
        for name in NAMES:
            found = reliability(first[name], size)
            assert found is not None
            actual = spearman(first[name].scores, second[name].scores)
            shared = len(set(first[name].order[:size]) & set(second[name].order[:size])) / size
            figures[f"{regime}/{name}"] = {
                **to_json(found),
                "actual_spearman": actual,
                "actual_overlap": shared,
            }
            halves = [found.spearman_halves, found.predicted, actual]
            overlaps = [found.overlap_halves, shared, found.overlap_by_chance]
            rows.append([regime, name, *halves, *overlaps, *list(found.spearman.values())[1:]])
        common.log(f"{regime} done")
    header = ["regime", "selector", "ρ of halves", "predicted for G", "ρ of two scorings"]
    header += [f"top {size} of halves", "of two scorings", "by chance", "predicted 2 G", "4 G"]
    common.table("Reliability of a ranking", header, rows)
    del arguments.work  # a place on this machine, not a setting
    common.write_json(arguments.json, figures, arguments)
    return figures


if __name__ == "__main__":
    main()
