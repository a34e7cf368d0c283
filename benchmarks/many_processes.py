"""What continual selection moves about between many processes, without having them: rows, broadcasts, the history.

The plan of an optimizer step's rows, the order that the main process sends and the history that it keeps are the
package's own; which prompts have a gradient, and how long rollouts are, is drawn at random.
"""

from __future__ import annotations

import argparse
import pickle
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import numpy as np
from datasets import Dataset

from trl_learnalign.adaptive import Outcomes
from trl_learnalign.bridge.rollout_rows import plan_rows
from trl_learnalign.records.history import HistoryRecorder


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, write."""
    options = parse(arguments)
    clock_name, clock = common.clock_for(options.threads)
    rows = [balance(share, options, clock) for share in options.useful]
    rows_each = options.prompts * options.rollouts // options.processes
    title = f"{options.processes} processes of {rows_each} rows each; medians over {options.steps} steps"
    names = {
        "useful": "prompts with a gradient",
        "fullest_unmoved": "rows of the fullest, unmoved",
        "rows_each": "rows of each, moved",
        "moved_share": "share that moves",
        "most_sent": "most that one sends",
        "plan_ms": f"plan, {clock_name} ms",
    }
    common.table(title, list(names.values()), [[row[name] for name in names] for row in rows])
    figures = {"rows": rows, "clock": clock_name, "broadcast_bytes": broadcast_bytes(options)}
    figures |= history(options, clock)
    for name in ("broadcast_bytes", "history_bytes_a_prompt", "history_save_seconds"):
        print(f"{name}: {figures[name]:.4g}")
    common.write_json(options.json, figures, options)
    return figures


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = common.parser(__doc__, model=None)
    parser.add_argument("--processes", type=int, default=64, help="processes")
    parser.add_argument("--prompts", type=int, default=1024, help="prompts of a generation")
    parser.add_argument("--rollouts", type=int, default=8, help="G")
    parser.add_argument(
        "--useful", type=float, nargs="+", default=[0.25, 0.5, 0.75], help="share of prompts"
    )
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps that are planned")
    parser.add_argument("--generations", type=int, default=200, help="generations of the history")
    return parser.parse_args(arguments)


def balance(
    share: float, options: argparse.Namespace, clock: Callable[[], float]
) -> dict[str, float]:
    """Rows of each process where this share of the prompts has a gradient."""
    rng = np.random.default_rng(options.seed)
    found: dict[str, list[float]] = {}
    for _ in range(options.steps):
        useful = np.repeat(rng.random(options.prompts) < share, options.rollouts)
        lengths = rng.integers(256, 2049, len(useful))
        flags = np.split(useful, options.processes)
        tokens = np.split(lengths, options.processes)
        for name, value in planned(flags, tokens, clock).items():
            found.setdefault(name, []).append(value)
    return {"useful": share, **{name: statistics.median(values) for name, values in found.items()}}


def planned(
    flags: list[np.ndarray], tokens: list[np.ndarray], clock: Callable[[], float]
) -> dict[str, float]:
    """One optimizer step: what is planned, and what has to move for it."""
    start = clock()
    plan = plan_rows(flags, tokens, tokens, micro_batches=len(flags[0]), movable=True)
    seconds = clock() - start
    # `None`: nothing is skipped, nothing moves.
    rows = [] if plan is None else plan.rows
    sent = [0] * len(flags)
    for rank, sources in enumerate(rows):
        for source, _ in sources:
            sent[source] += source != rank
    total = sum(int(useful.sum()) for useful in flags)
    return {
        "fullest_unmoved": max(int(useful.sum()) for useful in flags),
        "rows_each": len(rows[0]) if rows else len(flags[0]),
        "moved_share": sum(sent) / max(1, total),
        "most_sent": max(sent),
        "plan_ms": 1000 * seconds,
    }


def broadcast_bytes(options: argparse.Namespace) -> int:
    """What the main process sends of a virtual epoch of one generation: its prompts, and none besides."""
    rows = np.random.default_rng(options.seed).permutation(1_000_000)[: options.prompts]
    return len(pickle.dumps((rows.astype(np.int64), np.empty(0, dtype=np.int64))))


def history(options: argparse.Namespace, clock: Callable[[], float]) -> dict[str, float]:
    """Bytes of the history for each prompt of each generation, and seconds to write it whole."""
    rng = np.random.default_rng(options.seed)
    size = (
        options.generations * options.prompts
    )  # each prompt once: nothing repeats that could be packed
    order = rng.permutation(size).reshape(options.generations, options.prompts)
    data = Dataset.from_dict({"prompt": [f"What is {row} + {row}?" for row in range(size)]})
    with tempfile.TemporaryDirectory() as folder:
        recorder = HistoryRecorder(Path(folder) / "history.parquet", data, writes=True)
        for step in range(options.generations):
            rows = order[step]
            right = rng.binomial(options.rollouts, rng.beta(0.4, 0.6, len(rows)))
            wrong = options.rollouts - right
            outcomes = Outcomes.at(step, rows, right, wrong, "stage_1", useful=right > 0)
            passes = np.zeros(len(rows), dtype=np.int64)
            recorder.add(replace(outcomes, predicted=rng.random(len(rows))), passes)
        start = clock()
        recorder.save()
        seconds = clock() - start
        size_on_disk = recorder.path.stat().st_size
    return {
        "history_bytes_a_prompt": size_on_disk / size,
        "history_save_seconds": seconds,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
