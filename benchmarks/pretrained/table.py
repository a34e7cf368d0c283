"""GRPO of a real pretrained model on one CPU core: the shuffled pool against skipping and the adaptive order.

    python benchmarks/pretrained/table.py --model DIR                      # every line, seeds 0 to 2
    python benchmarks/pretrained/table.py --model DIR --lines full --seeds 3 4
    python benchmarks/pretrained/table.py --model DIR --lines full --seeds 100 --split dev --output dev.parquet
    python benchmarks/pretrained/table.py --report                         # the published curves as tables

DIR holds SmolLM2-135M-Instruct, or another small model (a hub id works as well). A cell (line and seed) takes a
quarter of an hour of CPU time. Its curve is written after each evaluation; an interrupted cell begins anew, finished
ones stay. Processes that are given different cells may run side by side: each cell has a file of its own in --work,
and --output is put together from all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shutil
import sys
from itertools import product
from pathlib import Path
from typing import Any

# Run as a script, Python looks for modules beside this file only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import stats
from transformers.utils import cached_file

from pretrained.cells import LINES, MARKS, Cell, Row, Settings, run_cell

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "pretrained_table.parquet"
WORK = ROOT / "outputs" / "pretrained_table"


class CellFiles:
    """Curves of the cells, a file each, and the table that is put together from them.

    Args:
        folder (`Path`): Where the files of the cells lie.
        output (`Path`): The table.
        origin (`dict`): What all curves must have in common: settings, split, model.
    """

    def __init__(self, folder: Path, output: Path, origin: dict[str, Any]):
        self.folder, self.output = folder, output
        self.origin = json.loads(json.dumps(origin))

    def is_done(self, cell: Cell) -> bool:
        """Whether the curve of a cell has all its points.

        Raises:
            `ValueError`: If it was made with other settings, another split or another model.
        """
        path = self._path(cell)
        if not path.exists():
            return False
        before = json.loads((pq.read_schema(path).metadata or {}).get(b"origin", b"{}"))
        if before != self.origin:
            raise ValueError(
                f"{path} was made with {before} and this run has {self.origin}: name another folder with --work."
            )
        return pq.read_table(path).column("mark").to_pylist()[-1] == MARKS[-1]

    def write(self, cell: Cell, rows: list[Row]) -> None:
        """Write the curve of a cell as far as it goes, and the table."""
        origin = {"origin": self.origin, "versions": common.versions(), "machine": common.machine()}
        common.write_table(self._path(cell), pa.Table.from_pylist(rows), origin)
        tables = [pq.read_table(path) for path in sorted(self.folder.glob("*.parquet"))]
        common.write_table(self.output, pa.concat_tables(tables), origin)

    def _path(self, cell: Cell) -> Path:
        return self.folder / f"{cell.selector}-{cell.seed:03d}.parquet"


def weights_digest(model: str) -> str:
    """SHA-256 of the weights of a checkpoint folder or hub model."""
    path = Path(cached_file(model, "model.safetensors"))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run(cells: list[Cell], files: CellFiles, settings: Settings, model: str, split: str) -> None:
    """Run the cells that are not done, one after the other."""
    pending = [cell for cell in cells if not files.is_done(cell)]
    common.log(f"{len(cells) - len(pending)} cells done, {len(pending)} to run")
    for cell in pending:
        rows: list[Row] = []

        def write(row: Row, cell: Cell = cell, rows: list[Row] = rows) -> None:
            rows.append(row)
            files.write(cell, rows)
            common.log(
                f"{cell.selector} {cell.seed}, step {row['step']}: accuracy {row['accuracy']:.3f}, probability "
                f"{row['probability']:.3f}, {row['compute']:.0f} tokens, {row['cpu_seconds'] / 60:.1f} CPU min"
            )

        scratch = files.folder / f"scratch-{cell.selector}-{cell.seed}"
        run_cell(cell, settings, model, split, scratch, write)
        shutil.rmtree(scratch, ignore_errors=True)


# ---- report ---------------------------------------------------------------------------------------------------------


def report(table: pd.DataFrame) -> None:
    """Print the curves and how they compare.

    Args:
        table (`pd.DataFrame`): The table; unfinished cells are left out.
    """
    ends = table[table["mark"] == MARKS[-1]].set_index(["selector", "seed"])
    table = table.set_index(["selector", "seed"])
    table = table[table.index.isin(ends.index)].reset_index()
    for measure in ("accuracy", "probability"):
        means = table.pivot_table(index="selector", columns="mark", values=measure)
        rows = [
            [name, *map(float, values)]
            for name, values in zip(means.index, means.to_numpy(), strict=True)
        ]
        header = ["line", *(f"{100 * mark:.0f} %" for mark in means.columns)]
        common.table(f"Held-out {measure} over parts of the budget, mean over seeds", header, rows)
    header = [
        "line",
        "seeds",
        "steps",
        "useful groups",
        "CPU minutes",
        "compute to full",
        "CPU to full",
    ]
    header += ["accuracy − full", "from", "to", "probability − full", "from", "to"]
    goal = float(ends.loc["full", "probability"].mean())
    common.table(
        "At the end of the budget",
        header,
        [_ending(table, ends, name, goal) for name in means.index],
    )


def _ending(table: pd.DataFrame, ends: pd.DataFrame, line: str, goal: float) -> list[Any]:
    """One line at its end, against the shuffled pool of the same seeds."""
    last = ends.loc[line]
    row = [line, len(last), float(last["step"].mean())]
    row += [
        float(last["useful_groups"].sum() / last["groups"].sum()),
        float(last["cpu_seconds"].mean() / 60),
    ]
    curve = (
        table[table["selector"] == line]
        .groupby("mark")[["probability", "compute", "cpu_seconds"]]
        .mean()
    )
    full = ends.loc["full"]
    row += [
        _quotient(curve, spent, goal, float(full[spent].mean()))
        for spent in ("compute", "cpu_seconds")
    ]
    for measure in ("accuracy", "probability"):
        differences = (last[measure] - full[measure]).dropna()
        row += _with_interval(differences) if line != "full" else [None] * 3
    return row


def _quotient(curve: pd.DataFrame, spent: str, goal: float, whole: float) -> float | None:
    """What the mean curve spends until it first reaches a goal, interpolated, over a whole."""
    above = curve["probability"].to_numpy() >= goal
    if not above.any():
        return None
    i = int(above.argmax())
    if i == 0:
        return 0.0
    before, after = curve.iloc[i - 1], curve.iloc[i]
    share = (goal - before["probability"]) / (after["probability"] - before["probability"])
    return float(before[spent] + share * (after[spent] - before[spent])) / whole


def _with_interval(differences: pd.Series) -> list[float | None]:
    """Mean over seeds and its 95 % interval by Student's t."""
    mean, count = float(differences.mean()), len(differences)
    if count < 2:
        return [mean, None, None]
    half = float(stats.t.ppf(0.975, count - 1) * differences.std() / count**0.5)
    return [mean, mean - half, mean + half]


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="checkpoint folder or hub id of the pretrained model")
    parser.add_argument(
        "--lines", nargs="+", choices=LINES, default=list(LINES), help="only these lines"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument(
        "--split", choices=("heldout", "dev"), default="heldout", help="tasks of the evaluation"
    )
    parser.add_argument(
        "--report", action="store_true", help="print the tables of --output and end"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="Parquet file of the results")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the cells' files")
    for setting in dataclasses.fields(Settings):
        parser.add_argument(
            f"--{setting.name}", type=type(setting.default), default=setting.default
        )
    arguments = parser.parse_args(given)
    if arguments.report:
        report(pq.read_table(arguments.output).to_pandas())
        return
    if arguments.model is None:
        parser.error(
            "name the pretrained model: --model FOLDER, or --model HuggingFaceTB/SmolLM2-135M-Instruct"
        )
    settings = Settings(
        **{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Settings)}
    )
    origin = {
        **dataclasses.asdict(settings),
        "split": arguments.split,
        "weights": weights_digest(arguments.model),
    }
    cells = [Cell(line, seed) for seed, line in product(arguments.seeds, arguments.lines)]
    run(
        cells,
        CellFiles(arguments.work / arguments.split, arguments.output, origin),
        settings,
        arguments.model,
        arguments.split,
    )


if __name__ == "__main__":
    main()
