"""Time and memory of continual selection on large pools: features, the belief's update, the draw of a generation.

Embeddings are random points around random centres, success rates follow from the centres, and what is rolled out are
coin flips. Everything else is the package's own, with its default settings.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Run as a script, Python looks for modules beside this file only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import numpy as np
import torch

from trl_learnalign.adaptive import Outcomes
from trl_learnalign.adaptive.belief import Belief, prompt_features
from trl_learnalign.adaptive.order import AdaptiveOrder
from trl_learnalign.config import LearnAlignConfig


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, write."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    clock_name, clock = common.clock_for(options.threads)
    rows = [measured(size, options, clock) for size in options.sizes]
    names = {
        "n": "prompts",
        "features_seconds": "features, s",
        "features_mb": "MB",
        "belief_mb": "belief, MB",
        "record_ms": "record, ms",
        "draw_ms": "draw, ms",
        "longest_draw_ms": "longest draw, ms",
        "replay_seconds": "replay, s",
    }
    title = f"Generations of {options.count} prompts, embeddings of {options.dim} numbers; {clock_name} time"
    common.table(title, list(names.values()), [[row[name] for name in names] for row in rows])
    figures = {
        "rows": rows,
        "clock": clock_name,
        "default_settings": str(LearnAlignConfig.adaptive()),
    }
    common.write_json(options.json, figures, options)
    return figures


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = common.parser(__doc__, model=None)
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="pool sizes"
    )
    parser.add_argument("--dim", type=int, default=576, help="entries of an embedding, H")
    parser.add_argument("--count", type=int, default=128, help="prompts of a generation")
    parser.add_argument("--rollouts", type=int, default=8, help="G")
    parser.add_argument(
        "--generations", type=int, default=200, help="generations that are drawn and recorded"
    )
    return parser.parse_args(arguments)


def synthetic_pool(size: int, options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings `(n, H)` float32 around centres, and success rates `(n,)`."""
    rng = np.random.default_rng(options.seed)
    centres = rng.normal(size=(200, options.dim)).astype(np.float32)
    of_centre = rng.beta(0.4, 0.6, size=len(centres))
    own = rng.integers(0, len(centres), size)
    embeddings = centres[own]
    for start in range(0, size, 50_000):
        part = embeddings[start : start + 50_000]
        part += 0.5 * rng.standard_normal(size=part.shape, dtype=np.float32)
    return embeddings, np.clip(of_centre[own] + 0.1 * rng.normal(size=size), 0, 1)


def measured(size: int, options: argparse.Namespace, clock: Callable[[], float]) -> dict[str, Any]:
    """All figures of one pool size."""
    common.log(f"{size} prompts: features")
    embeddings, rates = synthetic_pool(size, options)
    settings = LearnAlignConfig.adaptive()
    found: list[np.ndarray] = []
    seconds: list[float] = []

    def build() -> None:
        start = clock()
        found.append(prompt_features(embeddings, settings.adaptive_feature_dim))
        seconds.append(clock() - start)

    peak = common.peak_megabytes(build)
    beliefs: list[Belief] = []
    belief_peak = common.peak_megabytes(lambda: beliefs.append(Belief(found[0], settings)))
    common.log(f"{size} prompts: {options.generations} generations")
    return {
        "n": size,
        "features_seconds": seconds[0],
        "features_mb": found[0].nbytes / 1e6,
        "features_peak_mb": peak,
        "belief_mb": belief_peak,
        **generations(beliefs[0], rates, options, clock),
    }


def generations(
    belief: Belief, rates: np.ndarray, options: argparse.Namespace, clock: Callable[[], float]
) -> dict[str, float]:
    """Milliseconds to draw and to record a generation, seconds to replay all, and how learnable the prompts were."""
    rng, settings = np.random.default_rng(options.seed), belief.config
    order = AdaptiveOrder(np.arange(len(rates)), options.count, settings, options.seed, "stage_1")
    draws, records, learnability, past = [], [], [], []
    for generation in range(options.generations):
        start = clock()
        rows = order.draw(belief, generation)
        drawn = clock()
        right = rng.binomial(options.rollouts, rates[rows])
        past.append(Outcomes.at(generation, rows, right, options.rollouts - right))
        before = clock()
        belief.record(past[-1], past[-1].step)
        records.append(clock() - before)
        draws.append(drawn - start)
        learnability.append(float((rates[rows] * (1 - rates[rows])).mean()))
    start = clock()
    again = Belief(belief.features, settings)
    for outcomes in past:
        again.record(outcomes, outcomes.step)
    return {
        "draw_ms": 1000 * statistics.median(draws),
        "longest_draw_ms": 1000 * max(draws),
        "record_ms": 1000 * statistics.median(records),
        "replay_seconds": clock() - start,
        "learnability_of_pool": float((rates * (1 - rates)).mean()),
        "learnability_of_drawn": statistics.mean(learnability[len(learnability) // 2 :]),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
