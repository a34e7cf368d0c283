"""Time and memory of scoring a pool from features on disk, beside the matrix that the formula is written in.

Scores are row averages of `S_ij = V_i V_j cos(φ_i, φ_j)`. The package reads the features twice and never forms `S`;
here its selector runs on shards in its own format, once for each pool size. For comparison all n×n entries are formed,
block by block in float32 with the features in memory, at one size, and both must select the same prompts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

from trl_learnalign import scoring
from trl_learnalign.pool import FeatureChunks, Pool
from trl_learnalign.records.store import ShardStore
from trl_learnalign.selectors.scores import learnalign

ROLLOUTS = 8


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, write."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    largest = max(*options.sizes, options.matrix)
    if options.million:
        options.sizes = [*options.sizes, 1_000_000]
    clock_name, clock = common.clock_for(options.threads)
    with features_on_disk(min(largest, options.distinct), options) as store:
        rows = [scored(store, size, options, clock) for size in options.sizes]
        # Beside the matrix, before and after it: a busy machine slows both.
        before = scored(store, options.matrix, options, clock)
        common.log(f"forming the {options.matrix} x {options.matrix} matrix")
        matrix_seconds, theirs = matrix(store, options.matrix, options, clock)
        after = scored(store, options.matrix, options, clock)
    ours = after.pop("scores")
    our_seconds = statistics.median(before["runs"] + after["runs"])
    for row in rows:
        row.pop("scores", None)
    wanted = options.matrix // 10
    same = top(ours, wanted) == top(theirs, wanted)
    figures = {
        "rows": rows,
        f"speedup_over_matrix_{options.matrix}": matrix_seconds / our_seconds,
        "matrix": {
            "n": options.matrix,
            "seconds": matrix_seconds,
            "ours": our_seconds,
            "selected": wanted,
            "same_selection": same,
        },
        "clock": clock_name,
        "dim": options.dim,
    }
    header = (
        "prompts",
        "seconds",
        "of it reading",
        "peak MB beside the pool",
        "features on disk, MB",
    )
    lines = [
        [row[k] for k in ("n", "seconds", "read_seconds", "peak_mb", "features_mb")] for row in rows
    ]
    common.table(
        f"Scores from features on disk, d = {options.dim}; {clock_name} seconds", header, lines
    )
    print(
        f"\nAll {options.matrix}² entries: {matrix_seconds:.1f} s, "
        f"{figures[f'speedup_over_matrix_{options.matrix}']:.0f} times as long; "
        f"top {wanted} {'the same' if same else 'DIFFERENT'}"
    )
    common.write_json(options.json, figures, options)
    return figures


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = common.parser(__doc__, model=None)
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[1_000, 10_000, 20_000, 100_000], help="pool sizes"
    )
    parser.add_argument("--million", action="store_true", help="also one million prompts")
    parser.add_argument("--matrix", type=int, default=20_000, help="pool size of the matrix")
    parser.add_argument("--dim", type=int, default=8192, help="feature dimensions, d")
    parser.add_argument(
        "--shard",
        type=int,
        default=128,
        help="prompts in a shard, as LearnAlignConfig.shard_size",
    )
    parser.add_argument(
        "--distinct",
        type=int,
        default=100_000,
        help="prompts on disk; larger pools read them again",
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each pool size")
    parser.add_argument(
        "--folder", type=Path, help="where the shards go; default: a temporary folder"
    )
    return parser.parse_args(arguments)


@contextmanager
def features_on_disk(count: int, options: argparse.Namespace) -> Iterator[ShardStore]:
    """Random features with a common direction, in the package's own shards."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        store = ShardStore(Path(folder), {"benchmark": count}, -(-count // options.shard))
        store.create()
        generator = torch.Generator().manual_seed(options.seed)
        common_direction = torch.randn(options.dim, generator=generator)
        common.log(f"writing {count} features to disk")
        for number in range(store.shards):
            rows = min(options.shard, count - number * options.shard)
            noise = torch.randn(rows, options.dim, generator=generator)
            strength = torch.rand(rows, 1, generator=generator)
            store.write(
                number,
                {
                    "feature_rows": torch.arange(rows),
                    "features": noise + 0.3 * strength * common_direction,
                },
            )
        yield store


class Repeated:
    """Chunks of a pool that may be larger than what is on disk: the shards are then read again and again.

    Args:
        chunks (`FeatureChunks`): All shards.
        count (`int`): Prompts on disk.
        size (`int`): Prompts of the pool, P.
    """

    def __init__(self, chunks: FeatureChunks, count: int, size: int):
        self.chunks = chunks
        self.count = count
        self.size = size

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for first in range(0, self.size, self.count):
            for positions, features in self.chunks:
                room = self.size - first - int(positions[0])
                if room <= 0:
                    break
                yield positions[:room] + first, features[:room]


def pool_of(store: ShardStore, size: int, options: argparse.Namespace) -> Pool:
    """A pool of `size` prompts with random successes and the features on disk."""
    generator = torch.Generator().manual_seed(options.seed + 1)
    difficulty = torch.rand(size, 1, generator=generator)
    successes = (torch.rand(size, ROLLOUTS, generator=generator) < difficulty).double()
    count = store.fingerprint["benchmark"]
    shards = -(-min(size, count) // options.shard)
    chunks = FeatureChunks(store, tuple(range(shards)), options.shard)
    return Pool(
        prompts=np.arange(size),
        dataset=None,
        seed=options.seed,
        phase="stage1",
        successes=successes,
        features=Repeated(chunks, min(size, count), size),
        feature_dim=options.dim,
    )


def scored(
    store: ShardStore, size: int, options: argparse.Namespace, clock: Callable[[], float]
) -> dict[str, Any]:
    """Score a pool; the checksums of its shards were verified when it was gathered, as in a scoring pass."""
    pool = pool_of(store, size, options)
    common.log(f"scoring {size} prompts")
    verify_seconds, read_seconds = (read(pool, clock) for _ in range(2))
    runs, found = [], []

    def score() -> None:
        start = clock()
        found.append(learnalign(pool))
        runs.append(clock() - start)

    peak = common.peak_megabytes(score)
    for _ in range(options.repeats - 1):
        score()
    assert all(np.array_equal(scores, found[0]) for scores in found)
    return {
        "n": size,
        "seconds": statistics.median(runs),
        "runs": runs,
        "read_seconds": 2 * read_seconds,
        "first_read_seconds": verify_seconds,
        "peak_mb": peak,
        "features_mb": size * options.dim * 4 / 1e6,
        "scores": found[0],
    }


def read(pool: Pool, clock: Callable[[], float]) -> float:
    """Seconds to go through all features once."""
    started = clock()
    for _, features in pool.features:
        features.sum()
    return clock() - started


def matrix(
    store: ShardStore, size: int, options: argparse.Namespace, clock: Callable[[], float]
) -> tuple[float, np.ndarray]:
    """Row averages of the matrix with all its entries, and the seconds to form it; reading is not counted."""
    pool = pool_of(store, size, options)
    features = torch.empty(size, options.dim)
    for positions, part in pool.features:
        features[positions] = part
    weights = torch.from_numpy(pool.learnability)
    scores = torch.empty(size, dtype=torch.float64)
    started = clock()
    features /= features.norm(dim=1, keepdim=True)
    features *= weights.float().unsqueeze(1)
    for first in range(0, size, 2048):
        block = features[first : first + 2048] @ features.T
        scores[first : first + 2048] = block.mean(dim=1, dtype=torch.float64)
    return clock() - started, scores.numpy()


def top(scores: np.ndarray, count: int) -> set[int]:
    """The best `count`, as a stage selects them."""
    return set(scoring.rank(scores, np.arange(len(scores)))[:count].tolist())


if __name__ == "__main__":
    main(sys.argv[1:])
