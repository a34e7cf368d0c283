"""The paper's Table 1 at a scale that runs on two CPU cores: pool regimes x selectors x N x seeds, with intervals.

    python benchmarks/selection/table.py --workers 2           # everything; interrupt it at will and call it again
    python benchmarks/selection/table.py --workers 2 --quick   # two regimes, four selectors, two seeds: 4 minutes
    python benchmarks/selection/table.py --covering            # choices that cover, in a file of their own
    python benchmarks/selection/table.py --report              # docs/results/selection.md and its plot
    python benchmarks/selection/table.py --tune                # how the learning rate was chosen, on development tasks

All cells begin with the base model in docs/results/base_model. On one machine a cell repeats to the bit; on another,
floating point differs, and accuracies repeat within intervals: `--quick` compares its cells with those of the table.

One cell is one training run of seconds. Each finished cell is written at once, so an interrupted run loses at most
the cells under way. The most informative cells come first.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from functools import partial
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

from selection.cells import (
    BUDGETED,
    COMPUTE,
    COVERING,
    COVERING_RESULTS,
    FULL,
    NO_WARMUP,
    PASS,
    POLICY_SELECTORS,
    PUBLISHED_BASE,
    RESULTS_FOLDER,
    STAGED,
    STEPS,
    UNTRAINED,
    Bench,
    Cell,
    Settings,
    weights_sha256,
)
from trl_learnalign.records.store import write_json

ROOT = Path(__file__).parents[2]
RESULTS = RESULTS_FOLDER / "selection_table.parquet"
TUNING = RESULTS_FOLDER / "selection_tuning.json"
WORK = ROOT / "outputs" / "selection_table"

REGIMES = ("sparse", "balanced", "graded", "longtail")
SHARES = (100 / 7473, 500 / 7473, 1000 / 7473, 2000 / 7473)
"""The paper's N of GSM8K's 7,473 training problems."""

MAIN = ("random", "learnability", "learnalign", "alignment")
READING = tuple(name for name in POLICY_SELECTORS if name not in (*MAIN, *COVERING))
EXPENSIVE = ("selectit", "limr")
TUNED = {"learning_rate": (1e-4, 2e-4, 4e-4)}
TUNING_SEEDS = (100, 101)


def sizes(settings: Settings) -> list[int]:
    """N of the table for a pool."""
    return [round(share * settings.pool) for share in SHARES]


def cells(settings: Settings, regimes: tuple[str, ...], seeds: tuple[int, ...]) -> Iterator[Cell]:
    """All cells of the table, the most informative first."""
    chosen, pool = sizes(settings), settings.pool
    main = chosen[2]
    others = [n for n in chosen if n != main]

    def block(
        names: tuple[str, ...],
        ns: list[int],
        budget: str = STEPS,
        among: tuple[str, ...] = regimes,
        of: tuple[int, ...] = seeds,
    ) -> Iterator[Cell]:
        # Seeds outermost: what is there of every regime can be compared at any time.
        for seed, regime, n, name in product(of, among, ns, names):
            yield Cell(regime, name, n, seed, budget)

    for regime in regimes:
        yield Cell(regime, UNTRAINED, 0, 0)
    yield from block(MAIN, [main], among=regimes[:1])
    yield from block(MAIN, [main], among=regimes[1:])
    yield from block((*READING, NO_WARMUP), [main])
    yield from block((FULL,), [pool])
    # The regime of the paper's claim once more: five seeds left a difference of a point or two open.
    yield from block(MAIN, [main], among=regimes[:1], of=tuple(seed + len(seeds) for seed in seeds))
    yield from block(MAIN, others)
    yield from block(("random",), [main], COMPUTE)
    yield from block((STAGED, FULL), [pool], PASS)
    yield from block(EXPENSIVE, [main])
    yield from block((FULL,), [pool], COMPUTE)
    yield from block(READING, others)
    yield from block((*EXPENSIVE, NO_WARMUP), others)
    yield from block(("random",), others, COMPUTE)


def covering_cells(
    settings: Settings, regimes: tuple[str, ...], seeds: tuple[int, ...]
) -> Iterator[Cell]:
    """Choices that cover the pool's signal, by three seeds more, with what they are compared with."""
    _, half, main, _ = sizes(settings)
    further = tuple(seed + len(seeds) for seed in seeds[:3])
    for seed, regime, n in product((*seeds, *further), regimes, (main, half)):
        for name in COVERING:
            yield Cell(regime, name, n, seed)
        # Of the other seeds they are in the table, and of these in `sparse` at the larger N.
        if seed in further and (regime != "sparse" or n == half):
            for name in MAIN[:3]:
                yield Cell(regime, name, n, seed)
    for seed, regime, name in product((*seeds, *further), regimes, BUDGETED):
        yield Cell(regime, name, main, seed)
    for seed, regime, name in product((*seeds, *further), regimes, BUDGETED):
        yield Cell(regime, name, main, seed, COMPUTE)
        yield Cell(regime, name, half, seed)


def quick_cells(settings: Settings) -> list[Cell]:
    """A part that finishes well within ten minutes."""
    main = sizes(settings)[2]
    found = [Cell(regime, UNTRAINED, 0, 0) for regime in REGIMES[:2]]
    return found + [Cell(*cell) for cell in product(REGIMES[:2], MAIN, [main], (0, 1))]


class Results:
    """The table on disk: one row per cell, rewritten whole and atomically after each; one process writes.

    Args:
        path (`Path`): Parquet file.
        settings (`Settings`): A file of other settings is refused.
        base_model (`str`, *optional*): Digest of the base model's weights; a file of another is refused. `None`, also
            of a file that names none: not known.

    Raises:
        `ValueError`: If the file was made with other settings or another base model, naming both.
    """

    def __init__(self, path: Path, settings: Settings, base_model: str | None = None):
        self.path = path
        self.settings = dataclasses.asdict(settings)
        self.base_model = base_model
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            table = pq.read_table(path)
            metadata = table.schema.metadata or {}
            before = json.loads(metadata.get(b"settings", b"{}"))
            before["base_model"] = json.loads(metadata.get(b"base_model", b"null"))
            differences = [
                f"{name} was {before.get(name)} and is {value}"
                for name, value in {**self.settings, "base_model": base_model}.items()
                if before.get(name) != value
            ]
            if differences:
                raise ValueError(
                    f"{path} has other settings ({'; '.join(differences)}): name another file with --output"
                )
            self.rows = table.to_pylist()

    @property
    def done(self) -> set[tuple[Any, ...]]:
        """Keys of the finished cells."""
        return {
            tuple(row[name] for name in ("regime", "selector", "n", "seed", "budget"))
            for row in self.rows
        }

    def add(self, row: dict[str, Any]) -> None:
        """Add a cell and write the file."""
        self.rows.append(row)
        table = pa.Table.from_pylist(self.rows)
        origin = {"settings": self.settings, "base_model": self.base_model}
        origin |= {"versions": common.versions(), "machine": common.machine()}
        common.write_table(self.path, table, origin)


def run_cell(bench: Bench, cell: Cell, split: str = "heldout") -> dict[str, Any]:
    """Run one cell in this process."""
    torch.set_num_threads(1)
    return bench.run(cell, split)


def run_all(
    pending: list[Cell],
    results: Results,
    executor: Executor,
    workers: int,
    run: Callable[[Cell], dict[str, Any]],
) -> None:
    """Run cells that are not done; with several workers, two never share a pool at the same time.

    Args:
        pending (`list[Cell]`): The cells, in the order in which they are wanted.
        results (`Results`): Where they go.
        executor (`Executor`): What runs them; it is shut down at the end.
        workers (`int`): How many of them at once.
        run (callable): Runs one cell.
    """
    done = results.done
    pending = [cell for cell in pending if cell.key not in done]
    common.log(f"{len(done)} cells done, {len(pending)} to run")
    started, finished, total = time.perf_counter(), 0, len(pending)
    with executor:
        running: dict[Future[dict[str, Any]], Cell] = {}
        while pending or running:
            busy = {(cell.regime, cell.seed) for cell in running.values()}
            while len(running) < workers:
                free = next(
                    (cell for cell in pending if (cell.regime, cell.seed) not in busy), None
                )
                if free is None:
                    break
                pending.remove(free)
                busy.add((free.regime, free.seed))
                running[executor.submit(run, free)] = free
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell, row = running.pop(future), future.result()
                results.add(row)
                finished += 1
                minutes = (time.perf_counter() - started) / 60
                common.log(
                    f"{finished}/{total} {' '.join(map(str, cell.key))}: {row['accuracy']:.3f} "
                    f"in {row['cell_seconds']:.0f} s, {minutes:.0f} min so far"
                )


def tune(bench: Bench, path: Path) -> None:
    """Learning rate by the mean accuracy of random selection on development tasks, over all regimes."""
    settings = bench.settings
    n = sizes(settings)[2]
    found = []
    for rate, regime, seed in product(TUNED["learning_rate"], REGIMES, TUNING_SEEDS):
        changed = dataclasses.replace(settings, learning_rate=rate)
        tuned = Bench(changed, bench.folder, bench.base_settings)
        row = run_cell(tuned, Cell(regime, "random", n, seed), split="dev")
        found.append(
            {"learning_rate": rate, "regime": regime, "seed": seed, "accuracy": row["accuracy"]}
        )
        common.log(f"{found[-1]}")
    table = pd.DataFrame(found)
    means = table.groupby("learning_rate")["accuracy"].mean()
    best = float(means.idxmax())
    regimes = table.groupby(["regime", "learning_rate"])["accuracy"].mean().unstack()
    common.table(
        "Accuracy on development tasks",
        ["regime", *map(str, regimes.columns)],
        [
            [name, *map(float, values)]
            for name, values in zip(regimes.index, regimes.to_numpy(), strict=True)
        ],
    )
    write_json(
        path, {"best": best, "mean": {str(k): float(v) for k, v in means.items()}, "runs": found}
    )
    common.log(f"best learning rate: {best}; the settings have {settings.learning_rate}")


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="a part of the table, in a few minutes"
    )
    parser.add_argument(
        "--covering", action="store_true", help="choices that cover, and what they lack to compare"
    )
    parser.add_argument(
        "--report", action="store_true", help="write docs/results/selection.md and its plot"
    )
    parser.add_argument(
        "--tune", action="store_true", help="choose the learning rate on the development tasks"
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="processes; one core each (default: 1)"
    )
    parser.add_argument(
        "--regimes", nargs="+", choices=REGIMES, default=REGIMES, help="only these regimes"
    )
    parser.add_argument("--selectors", nargs="+", help="only cells of these (default: all)")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0, 1, … (default: 5)")
    parser.add_argument(
        "--output",
        type=Path,
        help="Parquet file of the results; default: results.parquet or quick.parquet in --work, for --report the "
        "published ones",
    )
    parser.add_argument("--work", type=Path, default=WORK, help="folder of measurements")
    parser.add_argument(
        "--train_base",
        action="store_true",
        help="train a base model in --work instead of taking the published one",
    )
    arguments = parser.parse_args(given)
    settings = Settings()
    if arguments.report:
        from selection import report

        print(report.write(arguments.output or RESULTS))
        return
    bench = Bench(settings, arguments.work, {} if arguments.train_base else None)
    digest = weights_sha256(bench.base_model)  # before several workers want it
    if arguments.tune:
        tune(bench, TUNING)
        return
    among = tuple(arguments.regimes), tuple(range(arguments.seeds))
    wanted, output = list(cells(settings, *among)), arguments.work / "results.parquet"
    if arguments.quick:
        wanted, output = quick_cells(settings), arguments.work / "quick.parquet"
    elif arguments.covering:
        wanted, output = list(covering_cells(settings, *among)), COVERING_RESULTS
    if arguments.selectors:
        wanted = [cell for cell in wanted if cell.selector in arguments.selectors]
    output = arguments.output or output
    results = Results(output, settings, digest)
    executor = ProcessPoolExecutor(
        arguments.workers, mp_context=multiprocessing.get_context("spawn")
    )
    run_all(wanted, results, executor, arguments.workers, partial(run_cell, bench))
    if arguments.quick:
        check_quick(results.rows, None if arguments.train_base else PUBLISHED_BASE)


def check_quick(rows: list[dict[str, Any]], base: Path | None) -> None:
    """Say which cells lie within the table's intervals; end with an error if one does not.

    Args:
        rows (`list[dict]`): Finished cells.
        base (`Path`, *optional*): The published base model, if they began with it.
    """
    from selection.report import expected

    ranges = expected(pq.read_table(RESULTS).to_pandas(), rows, base)
    printed, outside = [], 0
    for row, (low, high) in zip(rows, ranges, strict=True):
        inside = low <= row["accuracy"] <= high
        outside += not inside
        cell = [row[name] for name in ("regime", "selector", "n", "seed")]
        printed.append([*cell, row["accuracy"], low, high, "" if inside else "outside"])
    header = ["regime", "selector", "N", "seed", "accuracy", "from", "to", ""]
    common.table("Accuracy, and where the table's seeds lead one to expect it", header, printed)
    if outside:
        raise SystemExit(
            f"{outside} of {len(rows)} cells lie outside the interval of the published table."
        )
    common.log(f"all {len(rows)} cells lie within the intervals of the published table")


if __name__ == "__main__":
    main()
