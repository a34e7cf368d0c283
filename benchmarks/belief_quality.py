"""How well success rates are predicted for prompts that were never rolled out, as more and more of a pool is seen.

The toy policy trains on its shuffled pool, every prompt once. When 1, 5 and 20 % of the pool have been rolled
out, each method predicts the success rate of all other prompts under the policy as it is then. The truth is exact: in
the toy tasks a rollout is right if it is the answer, so its probability is read off the model.

Methods: `base rate`, the mean of what came out so far (all that a posterior for each prompt alone can say of the
others); `neighbours`, the prior and what came out of the 64 nearest prompts, by centred cosine of embeddings to the
4th power, an eighth of an outcome each; `belief`, the package's with its default settings; and, for comparison,
`mixture`, the mean of the truth over the prompts of the same family and length, which no method is told.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import common
import numpy as np
import pandas as pd
import torch
from continual.loop import Policy, success_rates
from continual.quick import Problems
from scipy import stats
from selection.cells import PUBLISHED_BASE, Settings, tasks

from trl_learnalign import plan
from trl_learnalign.adaptive import Outcomes
from trl_learnalign.adaptive.belief import (
    Belief,
    area_under_curve,
    brier_score,
    calibration_error,
    prompt_features,
    reliability_bins,
)
from trl_learnalign.config import LearnAlignConfig

SEEN = (0.01, 0.05, 0.2)
"""Parts of the pool that have been rolled out."""

MEMORY = 0.97
"""What outcomes still count a generation later, for the methods without a choice of their own."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, write."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    rows = []
    for regime, seed in product(options.regimes, options.seeds):
        common.log(f"{regime} {seed}")
        rows += measured(regime, seed, options)
    table = pd.DataFrame(rows)
    summary = [
        {"regime": regime, "seen": seen, "method": method, **intervals(group)}
        for (regime, seen, method), group in table.groupby(["regime", "seen", "method"], sort=False)
    ]
    header = [
        "regime",
        "seen",
        "method",
        "AUC",
        "±",
        "Brier",
        "±",
        "calibration error",
        "±",
        "explained",
        "±",
    ]
    lines = [
        [
            row["regime"],
            row["seen"],
            row["method"],
            *(row[name][part] for name in METRICS for part in ("mean", "half")),
        ]
        for row in summary
    ]
    common.table(
        "Predicted success rates of prompts never rolled out (95 % intervals over seeds)",
        header,
        lines,
    )
    figures = {
        "summary": summary,
        "runs": rows,
        "belief_settings": str(LearnAlignConfig.adaptive()),
    }
    common.write_json(options.json, figures, options)
    return figures


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = common.parser(__doc__, model=None)
    parser.add_argument(
        "--regimes", nargs="+", default=["sparse", "balanced", "graded", "longtail"]
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=list(range(6)), help="seeds of pool and training"
    )
    parser.add_argument("--pool", type=int, default=2000, help="prompts of a pool")
    return parser.parse_args(arguments)


def measured(regime: str, seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All figures of one training run."""
    settings = Settings()
    policy = Policy(PUBLISHED_BASE, settings.learning_rate, seed)
    pool = tasks(regime, options.pool, seed, "train")
    problems = Problems(policy, pool)
    embeddings = policy.embed(problems.prompts).numpy()
    mixture = np.unique(
        [f"{f} {n}" for f, n in zip(pool["family"], pool["length"], strict=True)],
        return_inverse=True,
    )
    size = max(1, round(SEEN[0] * options.pool))
    order = plan.training_order(
        seed, "belief", np.arange(options.pool), 0, round(SEEN[-1] * options.pool)
    )
    past: list[Outcomes] = []
    found = []
    for generation, rows in enumerate(order[: len(order) // size * size].reshape(-1, size)):
        prompts, answers = (
            [values[row] for row in rows] for values in (problems.prompts, problems.answers)
        )
        rollouts = policy.roll_out(rows, prompts, answers, settings.rollouts, generation)
        past.append(
            Outcomes.at(generation, rows, rollouts.right, settings.rollouts - rollouts.right)
        )
        policy.update(rollouts)
        seen = (generation + 1) * size / options.pool
        if any(abs(seen - share) < 1e-9 for share in SEEN):
            truth = success_rates(policy, problems.prompts, problems.answers)
            unseen = np.setdiff1d(np.arange(options.pool), order[: (generation + 1) * size])
            for name, predict in methods(embeddings, mixture[1], truth).items():
                own = {"regime": regime, "seed": seed, "seen": round(seen, 4), "method": name}
                found.append({**own, **judged(predict(past)[unseen], truth[unseen])})
    return found


def methods(
    embeddings: np.ndarray, mixture: np.ndarray, truth: np.ndarray
) -> dict[str, Callable[[list[Outcomes]], np.ndarray]]:
    """Outcomes so far → predicted success rates of the whole pool, `(n,)`."""
    settings = LearnAlignConfig.adaptive()
    return {
        "base rate": partial(base_rate, len(truth)),
        "neighbours": partial(of_neighbours, embeddings),
        "belief": partial(
            of_belief, prompt_features(embeddings, settings.adaptive_feature_dim), settings
        ),
        "mixture": lambda past: (
            np.bincount(mixture, truth)[mixture] / np.bincount(mixture)[mixture]
        ),
    }


def base_rate(count: int, past: list[Outcomes]) -> np.ndarray:
    """The mean of what came out, older outcomes faded."""
    right, wrong = faded_counts(count, past).sum(axis=0)
    return np.full(count, (0.5 + right) / (1 + right + wrong))


def of_neighbours(embeddings: np.ndarray, past: list[Outcomes]) -> np.ndarray:
    """Prior and outcomes of the nearest prompts."""
    centred = embeddings - embeddings.mean(axis=0)
    units = torch.from_numpy(centred / np.linalg.norm(centred, axis=1, keepdims=True))
    cosines = units @ units.T
    cosines.fill_diagonal_(-torch.inf)
    nearest = torch.topk(cosines, min(64, len(units) - 1), dim=1)
    weights = nearest.values.clamp(min=0).numpy() ** 4 / 8
    counts = faded_counts(len(units), past)
    borrowed = 0.5 + (weights[..., None] * counts[nearest.indices.numpy()]).sum(axis=1)
    return borrowed[:, 0] / borrowed.sum(axis=1)


def of_belief(features: np.ndarray, settings: LearnAlignConfig, past: list[Outcomes]) -> np.ndarray:
    """The package's."""
    belief = Belief(features, settings)
    for outcomes in past:
        belief.record(outcomes, outcomes.step)
    return belief.posterior(np.arange(len(features)), len(past)).success_rate


def faded_counts(count: int, past: list[Outcomes]) -> np.ndarray:
    """Right and wrong of each prompt, `(n, 2)`."""
    counts = np.zeros((count, 2))
    for outcomes in past:
        faded = MEMORY ** (len(past) - outcomes.step)
        counts[outcomes.rows] += faded * np.stack([outcomes.right, outcomes.wrong], axis=1)
    return counts


METRICS = ("auc", "brier", "calibration_error", "explained")


def judged(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Predictions against true rates: each prompt is as many right and wrong rollouts as are to be expected."""
    right, wrong = truth, 1 - truth
    return {
        "auc": area_under_curve(predicted, right, wrong),
        "brier": brier_score(predicted, right, wrong),
        "calibration_error": calibration_error(
            reliability_bins(predicted, 1000 * right, 1000 * wrong)
        ),
        "explained": float(1 - np.mean((predicted - truth) ** 2) / truth.var()),
    }


def intervals(group: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Mean of each figure over seeds, and half the width of its 95 % interval (Student's t)."""
    count = len(group)
    factor = float(stats.t.ppf(0.975, count - 1) / np.sqrt(count)) if count > 1 else float("nan")
    return {
        name: {"mean": float(group[name].mean()), "half": factor * float(group[name].std(ddof=1))}
        for name in METRICS
    }


if __name__ == "__main__":
    main(sys.argv[1:])
