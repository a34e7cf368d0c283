"""Why LearnAlign is behind random on one skill of graded difficulty: which answers it chooses, and which are learned.

    python benchmarks/selection/collapse.py --json docs/results/selection_collapse.json

In the regime `graded` every task is to sort a string of digits, so a choice cannot narrow to one skill. It can narrow
inside the skill: here tasks are grouped by the first digit of the answer, the first token that the policy has to get
right. The share of trained prompts whose rollouts were all right or all wrong tells how soon a choice is used up. Uses
what `table.py` measured, and trains the cells again (same seeds, same weights).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

# Run as a script, Python looks for modules beside this file only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import numpy as np
import torch
from scipy import stats

from selection.cells import Bench, Cell, Settings, graded, tasks, train
from selection.table import SHARES, WORK
from trl_learnalign import plan

REGIME = "graded"
NAMES = ("random", "learnability", "learnalign", "alignment")
COMMON = ("0", "1")
"""First digits of most sorted strings: 61 % of the pool."""


def main(given: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, write."""
    parser = common.parser(__doc__, model=False)
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0, 1, …")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of measurements")
    arguments = parser.parse_args(given)
    torch.set_num_threads(arguments.threads)
    settings = Settings()
    bench, n = Bench(settings, arguments.work), round(SHARES[2] * settings.pool)
    held_out = tasks(REGIME, settings.held_out, 0, "heldout")
    first = np.array([answer[0] in COMMON for answer in held_out["answer"]])
    runs = []
    for seed in range(arguments.seeds):
        for name in NAMES:
            cell = Cell(REGIME, name, n, seed)
            chosen, _ = bench.choose(cell)
            wanted = settings.steps * settings.prompts_per_step
            order = plan.training_order(seed, "stage_1", chosen, 0, wanted)
            scratch = arguments.work / "scratch" / f"collapse-{name}-{seed}"
            trainer, _ = train(settings, bench.base_model, bench.pool(cell), order, scratch, seed)
            right = graded(trainer, held_out)
            # One log entry at the end of training holds the means over all steps.
            trained = next(
                entry
                for entry in reversed(trainer.state.log_history)
                if "frac_reward_zero_std" in entry
            )
            answers = bench.pool(cell).select(chosen)["answer"]
            runs.append(
                {
                    "selector": name,
                    "seed": seed,
                    "chosen_common": float(np.mean([answer[0] in COMMON for answer in answers])),
                    "accuracy_common": float(right[first].mean()),
                    "accuracy_rest": float(right[~first].mean()),
                    "trained_without_signal": float(trained["frac_reward_zero_std"]),
                    "training_reward": float(trained["reward"]),
                }
            )
            common.log(str(runs[-1]))
    rows = []
    for name in NAMES:
        own = [run for run in runs if run["selector"] == name]
        row = [name]
        for key in (
            "chosen_common",
            "accuracy_common",
            "accuracy_rest",
            "trained_without_signal",
            "training_reward",
        ):
            values = 100 * np.array([run[key] for run in own])
            half = (
                stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
                if len(values) > 1
                else float("nan")
            )
            row.append(f"{values.mean():.1f} ± {half:.1f}")
        rows.append(row)
    common.table(
        f"Answers that begin with 0 or 1, {len(held_out)} held-out tasks, {arguments.seeds} seeds; in %",
        [
            "selector",
            "of those chosen",
            "accuracy on them",
            "on the rest",
            "trained without signal",
            "reward",
        ],
        rows,
    )
    del arguments.work  # a place on this machine, not a setting
    figures = {"runs": runs}
    common.write_json(arguments.json, figures, arguments)
    return figures


if __name__ == "__main__":
    main()
