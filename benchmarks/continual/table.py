"""Continual selection at equal total compute: lines x regimes x seeds, curves over compute, at prices of a token.

    python benchmarks/continual/table.py --workers 2   # all cells; interrupt it at will and call it again
    python benchmarks/continual/table.py --tune        # how the constants were chosen, on development tasks
    python benchmarks/continual/table.py --report      # docs/results/continual.md and its plots

A cell is one training run with one line's choice of prompts (`continual.cells.LINES`), until LearnAlign's total
compute of the selection table is spent. Each finished cell is written at once, the most informative first.

Constants are chosen on the split "dev" with seeds of their own, by the quick driver (`continual.quick`): candidates
are compared by their mean accuracy over regimes, prices and fifths of the budget. Cells of the table are run by the
package's callback (`continual.product`), or by another driver that `--driver` names: a dotted path to a class that
takes `Settings`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

# Run as a script, Python looks for modules beside this file only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from selection.cells import RESULTS_FOLDER, Settings

from continual import report
from continual.cells import (
    LINES,
    PRICES,
    SHOWN,
    SMALL_GROUPS,
    Curve,
    Driver,
    Line,
    learnalign_compute,
)
from continual.quick import PRODUCT
from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.records.store import write_json

ROOT = Path(__file__).parents[2]
RESULTS = RESULTS_FOLDER / "continual_table.parquet"
TUNING = RESULTS_FOLDER / "continual_tuning.json"
WORK = ROOT / "outputs" / "continual_table"
QUICK = "continual.quick:QuickDriver"

REGIMES = ("sparse", "balanced", "longtail", "graded")
KEYS = ("regime", "selector", "seed")


@dataclass(frozen=True)
class Cell:
    """One training run.

    Args:
        regime (`str`): Mixture of the pool.
        selector (`str`): Name of the line.
        seed (`int`): Seed of pool, order and rollouts.
    """

    regime: str
    selector: str
    seed: int


def cells(regimes: tuple[str, ...], seeds: range) -> Iterator[Cell]:
    """All cells, in three rounds; seeds outermost, so that what is there can be compared at any time."""
    at_eight = [name for name in LINES if name not in SMALL_GROUPS]
    headline = ["adaptive, G = 2", "full, G = 4", "skip, G = 2"]
    others = [name for name in SMALL_GROUPS if name not in headline]
    for names in (at_eight, headline, others):
        for seed, regime, name in product(seeds, regimes, names):
            yield Cell(regime, name, seed)


def driver_of(path: str) -> Driver:
    """The driver that a dotted path names.

    Raises:
        `ValueError`: If the path has no colon.
    """
    module, colon, name = path.partition(":")
    if not colon:
        raise ValueError(f"--driver {path}: give module:class, like {QUICK}.")
    return getattr(importlib.import_module(module), name)(Settings())


def run_cell(
    driver: str, cell: Cell, line: Line, split: str, prices: tuple[float, ...]
) -> list[dict[str, Any]]:
    """The rows of a cell: one for each price and mark of the budget."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    curve: Curve = driver_of(driver)(
        cell.regime, cell.seed, line, learnalign_compute(cell.regime, prices), split
    )
    common_values = {
        **asdict(cell),
        "rollouts": line.rollouts,
        "budget": "compute",
        "useful": curve.useful / curve.groups,
        "cell_seconds": time.perf_counter() - started,
        "notes": json.dumps(curve.notes),
    }
    return [{**common_values, **row} for row in curve.rows()]


class Rows:
    """Finished cells on disk, a Parquet file that is rewritten whole after each.

    Args:
        path (`Path`): The file.
        driver (`str`, *optional*): What the cells are run by.

    Raises:
        `ValueError`: If the file's cells were run by another driver.
    """

    def __init__(self, path: Path, driver: str = PRODUCT):
        self.path, self.driver = path, driver
        described = (pq.read_schema(path).metadata or {}) if path.exists() else {}
        before = json.loads(described.get(b"origin", b"{}"))
        if before.get("driver", driver) != driver:
            raise ValueError(
                f"{path} holds cells of {before['driver']}: name another file with --output, or that --driver."
            )
        self.rows: list[dict[str, Any]] = (
            pd.read_parquet(path).to_dict("records") if path.exists() else []
        )

    @property
    def done(self) -> set[tuple[Any, ...]]:
        """Keys of the finished cells."""
        return {tuple(row[name] for name in KEYS) for row in self.rows}

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Add a cell and write the file."""
        self.rows += rows
        origin = {
            "driver": self.driver,
            "settings": asdict(Settings()),
            "adaptive": asdict(LearnAlignConfig.adaptive()),
            "versions": common.versions(),
            "machine": common.machine(),
        }
        table = pa.Table.from_pandas(self.frame())
        common.write_table(self.path, table, {"origin": origin})

    def frame(self) -> pd.DataFrame:
        """All rows, with `compute_to_full` of each cell and price."""
        table = pd.DataFrame(self.rows)
        return table if table.empty else report.with_compute_to_full(table)


def run_all(
    pending: Mapping[Cell, Line],
    rows: Rows,
    driver: str,
    split: str,
    workers: int,
    prices: tuple[float, ...] = PRICES,
) -> None:
    """Run the cells that are not done yet; each is on disk as soon as it has finished."""
    done = rows.done
    wanted = [
        (cell, line) for cell, line in pending.items() if tuple(asdict(cell).values()) not in done
    ]
    common.log(f"{len(pending) - len(wanted)} cells done, {len(wanted)} to run")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as executor:
        futures = {
            executor.submit(run_cell, driver, cell, line, split, prices): cell
            for cell, line in wanted
        }
        try:
            for number, future in enumerate(as_completed(futures), start=1):
                rows.add(future.result())
                common.log(f"{number}/{len(wanted)} {described(futures[future], future.result())}")
        except BaseException:
            executor.shutdown(
                cancel_futures=True
            )  # cells that have not begun would run, and be lost
            raise


def described(cell: Cell, rows: list[dict[str, Any]]) -> str:
    """A cell and its curve at price 1."""
    shown = [f"{row['accuracy']:.3f}" for row in rows if row["price"] == 1 and row["mark"] in SHOWN]
    return f"{cell.regime} {cell.selector} {cell.seed}: {' '.join(shown)}"


# ---- Tuning ---------------------------------------------------------------------------------------------------------

TUNED_REGIMES = REGIMES[:3]
TUNING_SEEDS = range(100, 104)

BASE = LearnAlignConfig.adaptive(
    adaptive_exploration=0.5, adaptive_candidates_per_slot=8, adaptive_gain_exponent=1.0
)
"""What the candidates differ from, each by what its name says."""


def candidates() -> dict[str, Line]:
    """What was compared."""
    return {
        "skip": LINES["skip"],
        "posterior": LINES["posterior"],
        "base": Line(BASE),
        "exploration 0": Line(replace(BASE, adaptive_exploration=0.0)),
        "candidates 4": Line(replace(BASE, adaptive_candidates_per_slot=4)),
        "headroom 0": Line(replace(BASE, adaptive_gain_exponent=0.0)),
        "no features": Line(BASE, features=False),
        "oversampling 1.5": Line(BASE, oversampling=1.5),
    }


def tune(rows: Rows, workers: int, path: Path) -> None:
    """Run all candidates on development tasks and write what came out."""
    pending = {
        Cell(regime, name, seed): line
        for seed, regime, (name, line) in product(TUNING_SEEDS, TUNED_REGIMES, candidates().items())
    }
    run_all(pending, rows, QUICK, "dev", workers)
    write_json(path, tuning_summary(rows.frame()))


def tuning_summary(table: pd.DataFrame) -> dict[str, Any]:
    """Mean accuracy of each candidate by regime, price and fifth of the budget, and over all of them."""
    shown = table[table["mark"].isin(SHOWN)]
    means = (
        shown.groupby(["selector", "regime", "price", "mark"])["accuracy"].mean().unstack("mark")
    )
    overall = shown.groupby(["selector", "regime"])["accuracy"].mean().unstack("regime")
    overall["mean"] = overall.mean(axis=1)
    curves = [
        {
            "candidate": name,
            "regime": regime,
            "price": price,
            "accuracy": [round(value, 4) for value in values],
        }
        for (name, regime, price), values in zip(
            means.index, means.to_numpy().tolist(), strict=True
        )
    ]
    settings = {name: str(line.adaptive) for name, line in candidates().items()}
    order = overall.sort_values("mean", ascending=False).round(4)
    return {
        "criterion": "mean accuracy over regimes, prices and fifths of the budget, on development tasks",
        "seeds": sorted({int(seed) for seed in table["seed"]}),
        "marks": list(SHOWN),
        "order": [{"candidate": name, **values} for name, values in order.to_dict("index").items()],
        "curves": curves,
        "settings": settings,
    }


def tuning_arguments(description: str, results: Path) -> argparse.Namespace:
    """Read the command line of a benchmark on development tasks.

    Args:
        description (`str`): Docstring of the benchmark.
        results (`Path`): Default file of its cells.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=1, help="processes; one core each")
    parser.add_argument("--report", action="store_true", help="print the tables")
    parser.add_argument("--output", type=Path, default=results, help="Parquet file of the cells")
    return parser.parse_args()


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tune", action="store_true", help="compare settings on the development tasks"
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="processes; one core each (default: 1)"
    )
    parser.add_argument(
        "--regimes", nargs="+", choices=REGIMES, default=REGIMES, help="only these regimes"
    )
    parser.add_argument("--seeds", type=int, default=8, help="seeds 0, 1, … (default: 8)")
    parser.add_argument(
        "--driver", default=PRODUCT, help=f"module:class that trains a cell (default: {PRODUCT})"
    )
    parser.add_argument(
        "--report", action="store_true", help="write docs/results/continual.md and its plots"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help=f"Parquet file of the cells (default: {RESULTS.name} of the docs)",
    )
    parser.add_argument("--work", type=Path, default=WORK, help="folder of unfinished results")
    arguments = parser.parse_args(given)
    if arguments.tune:
        rows = Rows(arguments.output or arguments.work / "tuning.parquet", QUICK)
        tune(rows, arguments.workers, TUNING)
        return
    output = arguments.output or RESULTS
    if arguments.report:
        print(report.write(output))
        return
    pending = {
        cell: LINES[cell.selector]
        for cell in cells(tuple(arguments.regimes), range(arguments.seeds))
    }
    rows = Rows(output, arguments.driver)
    run_all(pending, rows, arguments.driver, "heldout", arguments.workers)


if __name__ == "__main__":
    main()
