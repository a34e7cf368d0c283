"""Time and memory of the selectors that cover the pool, beside the row average, and how broad their choices are.

Features are made up: groups of like prompts, a few large and many small (sizes fall as 1 / rank), a direction that all
share, and noise. Each selector runs once for each pool size, with the features in memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import common
import numpy as np
import torch

from trl_learnalign.diversity import breadth
from trl_learnalign.plan import tie_order
from trl_learnalign.pool import Pool
from trl_learnalign.ranking import Ranking
from trl_learnalign.rng import key, random_bits
from trl_learnalign.selectors import SELECTORS

ROLLOUTS = 8
NAMES = ("learnalign", "learnalign_coverage", "learnalign_logdet")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, write."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    clock_name, clock = common.clock_for(options.threads)
    rows = []
    for size in options.sizes:
        pool = pool_of(size, options)
        for name in NAMES:
            common.log(f"{name}: {pool.wanted} of {size}")
            rows.append(measured(name, pool, clock))
    figures = {"rows": rows, "clock": clock_name, "dim": options.dim}
    columns = (
        "selector",
        "n",
        "chosen",
        "seconds",
        "peak_mb",
        "directions",
        "directions_random",
        "covered",
        "covered_random",
        "breadth_seconds",
    )
    lines = [[row[column] for column in columns] for row in rows]
    common.table(f"Choices, d = {options.dim}; {clock_name} seconds", columns, lines)
    common.write_json(options.json, figures, options)
    return figures


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = common.parser(__doc__, model=None)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2_000, 20_000], help="pool sizes")
    parser.add_argument("--share", type=float, default=0.1, help="share that is chosen")
    parser.add_argument("--dim", type=int, default=8192, help="feature dimensions, d")
    parser.add_argument("--groups", type=int, default=200, help="groups of like prompts")
    return parser.parse_args(arguments)


def pool_of(size: int, options: argparse.Namespace) -> Pool:
    """A pool of made-up features and successes; cosines are about 0.1 across groups, 0.4 within one."""
    generator = torch.Generator().manual_seed(options.seed)
    centres = torch.randn(options.groups, options.dim, generator=generator)
    shared = torch.randn(options.dim, generator=generator)
    sizes = 1 / torch.arange(1, options.groups + 1, dtype=torch.float64)
    group = torch.multinomial(sizes, size, replacement=True, generator=generator)
    chunks = []
    for positions in torch.arange(size).split(1024):
        noise = torch.randn(len(positions), options.dim, generator=generator)
        features = 0.6**0.5 * noise + 0.3**0.5 * centres[group[positions]] + 0.1**0.5 * shared
        chunks.append((positions, features))
    difficulty = torch.rand(size, 1, generator=generator)
    successes = (torch.rand(size, ROLLOUTS, generator=generator) < difficulty).double()
    return Pool(
        prompts=np.arange(size),
        dataset=range(size),
        seed=options.seed,
        phase="stage_1",
        successes=successes,
        features=chunks,
        feature_dim=options.dim,
        wanted=round(options.share * size),
    )


def measured(name: str, pool: Pool, clock: Callable[[], float]) -> dict[str, Any]:
    """One selector on one pool: seconds, peak memory beside the features, and how broad its choice is."""
    found = []

    def score() -> None:
        start = clock()
        scores = SELECTORS[name].score(pool)
        found.append((clock() - start, scores))

    peak = common.peak_megabytes(score)
    seconds, scores = found[0]
    ties = tie_order(pool.seed, pool.phase, len(pool))
    ranking = Ranking(SELECTORS[name], pool, scores, ties)
    choice = ranking.take(pool.wanted, pool.prompts, "fill", pool.wanted)
    start = clock()
    broad = asdict(breadth(pool, choice.positions))
    broad.pop("others")
    return {
        "selector": name,
        "n": len(pool),
        "chosen": len(choice),
        "seconds": seconds,
        "peak_mb": peak,
        "breadth_seconds": clock() - start,
        "digest": f"{int(random_bits(key(*choice.rows.tolist()), np.zeros(1))[0]):016x}",
        **broad,
    }


if __name__ == "__main__":
    main()
