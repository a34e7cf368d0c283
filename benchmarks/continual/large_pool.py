"""A pool of which a run sees less than a tenth: 20,000 prompts, and eight hundredths of the continual table's budget.

    python benchmarks/continual/large_pool.py --workers 2   # all cells; interrupt it at will and call it again
    python benchmarks/continual/large_pool.py --report      # the tables, from the finished cells

Learning rates are compared on development tasks (seed 100); the other seeds are on held-out tasks, at each line's best
rate. The belief's features are `given`, so they cost nothing, or the untrained policy reads the prompts, which is paid
for: the whole pool `first`, or (`lazy`) a sample for the projection, and then each prompt when it becomes a candidate.
A prompt of these tasks is longer than its completion, and so reading is expensive.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

# Run as a script, Python looks for modules beside this file only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
from selection.cells import RESULTS_FOLDER, Settings

from continual import pools
from continual.by_need import in_words, measures
from continual.cells import Curve, Line
from continual.group_size import PRICES, named
from continual.loop import Policy
from continual.quick import QuickDriver, Run
from continual.table import LINES, Cell, Rows, run_all, tuning_arguments
from trl_learnalign import rng
from trl_learnalign.adaptive.belief import fit_projection

RESULTS = RESULTS_FOLDER / "large_pool.parquet"
DRIVER = "continual.large_pool:LargePoolDriver"
POOL = 20_000
SHARE = 0.08
"""Part of the table's budget."""
SAMPLE = 512
"""Prompts that the projection of lazily read features is fitted on."""


@dataclass(frozen=True)
class ReadingLine(Line):
    """A line whose belief has features.

    Args:
        reads (`str`): `"given"`, `"first"` or `"lazy"`.
    """

    reads: str = "given"


READS = ("given", "first", "lazy")
WAYS = {
    "full": LINES["full"],
    "skip": LINES["skip"],
    "posterior": LINES["posterior"],
    **{reads: ReadingLine(**vars(LINES["adaptive"]), reads=reads) for reads in READS},
}
SIZES = {"full": (2, 4, 8), "skip": (2,), "posterior": (2,), "given": (2, 4), "lazy": (2,)}
RATES = (1.0, 2.0, 4.0)
TUNED_ON, SEEDS = 100, range(8)
DEV, HELD_OUT = "dev", "heldout"


def line(way: str, rollouts: int, rate: float) -> Line:
    """A way with a group size and a multiple of the learning rate."""
    return replace(WAYS[way], rollouts=rollouts, rate=rate)


class ReadingRun(Run):
    """A run that pays for what its belief reads.

    Args:
        model (`Path`): The base model.
        settings, policy, regime, seed, line: As in the class above.
    """

    def __init__(self, model: Path, settings: Settings, *given: Any):
        self.model, self.is_read = model, np.zeros(settings.pool, dtype=bool)
        super().__init__(settings, *given)

    def _features(self, dimensions: int) -> np.ndarray:
        self.reader = Policy(self.model, 0.0, self.seed)
        first = self.everything
        if self.line.reads == "lazy":
            first = rng.permutation(rng.key(self.seed, "projection"), first)[:SAMPLE]
        embeddings = self._embed(first)
        self.projection = fit_projection(embeddings, dimensions)
        self.features = np.zeros(
            (len(self.everything), self.projection.directions.shape[1]), dtype=np.float32
        )
        self.features[first] = self.projection(embeddings)
        return self.features

    def step(self, number: int) -> None:
        """Read what may be drawn, roll out and train."""
        if self.line.adaptive is not None and self.line.features:
            _, order = self.chooser
            wanted = np.union1d(order.explored(number), order.candidates(number))
            new = wanted[~self.is_read[wanted]]
            if len(new):
                self.features[new] = self.projection(self._embed(new))
        super().step(number)

    def _embed(self, rows: np.ndarray) -> np.ndarray:
        """Embeddings of prompts, `(P, H)`; their tokens are charged unless they were given."""
        prompts = [self.problems.prompts[row] for row in rows]
        self.is_read[rows] = True
        if self.line.reads != "given":
            self.spent.forward += sum(map(len, prompts))
        return self.reader.embed(prompts).numpy()

    def notes(self) -> dict[str, Any]:
        """As of any run, and the share of the pool that was rolled out, and that was read."""
        shares = {"seen": self.groups / len(self.everything), "read": float(self.is_read.mean())}
        return {**super().notes(), **shares}


class LargePoolDriver(QuickDriver):
    """The quick driver on the large pool, with a small budget."""

    def __init__(self, settings: Settings, size: int = POOL):
        super().__init__(replace(settings, pool=size))

    def __call__(
        self, regime: str, seed: int, line: Line, budgets: Mapping[float, float], split: str
    ) -> Curve:
        """As [`continual.cells.Driver`]."""
        budgets = {price: SHARE * budget for price, budget in budgets.items()}
        with pools.toy_tasks(regime):
            return super().__call__(regime, seed, line, budgets, split)

    def begun(self, settings: Settings, policy: Policy, regime: str, seed: int, line: Line) -> Run:
        """A run before its first step."""
        return ReadingRun(self.model, settings, policy, regime, seed, line)


def tuning() -> dict[Cell, Line]:
    """Each line at each rate."""
    return {
        Cell(pools.LARGE, named(way, size, rate), TUNED_ON): line(way, size, rate)
        for rate, (way, sizes) in product(RATES, SIZES.items())
        for size in sizes
    }


def best_rates(table: pd.DataFrame) -> Iterator[tuple[str, int, float]]:
    """Way, group size and the rate with the best mean of the curve over the prices, on the development tasks."""
    means = table[table["seed"] == TUNED_ON].groupby("selector")["accuracy"].mean()
    for way, sizes in SIZES.items():
        for size in sizes:
            yield way, size, max(RATES, key=lambda rate: means[named(way, size, rate)])


def report(table: pd.DataFrame) -> str:
    """Means of the lines at each price, and differences to the others' best, paired by seed."""
    tuned = table[table["seed"] == TUNED_ON].groupby(["selector", "price"])["accuracy"].mean()
    found = measures(table[table["seed"] != TUNED_ON])
    parts = [tuned.unstack("price").round(4).to_string()]
    for measure in ("curve", "end"):
        own = found[measure].droplevel("regime").unstack("selector")
        parts.append(f"{measure}:\n{own.groupby('price').mean().T.round(4).to_string()}")
        ours = [name for name in own if name.startswith(("given, G = 2", "lazy, G = 2"))]
        for name in ours:
            differences = (100 * own.drop(columns=name).rsub(own[name], axis=0)).stack()
            words = differences.groupby(["selector", "price"]).agg(in_words).unstack("price")
            parts.append(f"{name} minus the others, {measure}:\n{words.to_string()}")
    return "\n".join(parts)


def main() -> None:
    given = tuning_arguments(__doc__, RESULTS)
    rows = Rows(given.output, DRIVER)
    if given.report:
        print(report(rows.frame()))
        return
    run_all(tuning(), rows, DRIVER, DEV, given.workers, PRICES)
    chosen = list(best_rates(rows.frame()))
    pending = {
        Cell(pools.LARGE, named(*key), seed): line(*key) for seed, key in product(SEEDS, chosen)
    }
    run_all(pending, rows, DRIVER, HELD_OUT, given.workers, PRICES)


if __name__ == "__main__":
    main()
