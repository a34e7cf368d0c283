"""What a run left behind, read back: `run.json`, the stages' tables, the log and the telling prompts.

Axes: `P` candidates of a stage.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from trl_learnalign.records import layout
from trl_learnalign.records.layout import CORRELATIONS, OVERLAPS, SUBSETS
from trl_learnalign.records.ledger import Cost
from trl_learnalign.statistics import spearman, wilson

BASE = "base"


@dataclass(frozen=True)
class Accuracy:
    """Held-out accuracy after a phase.

    Args:
        phase (`str`): `"base"`, `"warmup"`, `"stage_1"`, …
        step (`int`): Optimizer steps done.
        value (`float`): Share of right answers.
        count (`int`): Problems.
    """

    phase: str
    step: int
    value: float
    count: int

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of a binomial share (Wilson): of the problems, not of training seeds."""
        if not self.count:
            return 0.0, 1.0
        found = wilson(round(self.value * self.count), self.count)
        return found.low, found.high


@dataclass(frozen=True)
class Stage:
    """A stage's selection.

    Args:
        name (`str`): `"stage_1"`, …
        note (mapping): Its `selection` note in `run.json`.
        table (`pyarrow.Table`, *optional*): Its candidates; `None` if they were not scored.
        examples (`list[dict]`): Telling prompts with rollouts.
    """

    name: str
    note: Mapping[str, Any]
    table: pa.Table | None
    examples: list[dict[str, Any]]

    def column(self, name: str) -> np.ndarray:
        """A column of numbers, `(P,)`, NaN where missing."""
        assert self.table is not None
        return self.table[name].to_numpy().astype(np.float64)

    @cached_property
    def selected(self) -> np.ndarray:
        """`(P,)` bool."""
        return self.column("selected").astype(bool)

    @cached_property
    def has_rollouts(self) -> bool:
        """Whether success rates were measured."""
        return self.table is not None and bool(np.isfinite(self.column("success_rate")).any())

    @property
    def length_correlation(self) -> float | None:
        """Spearman correlation of score and mean completion length among prompts with learnability above 0."""
        if not self.has_rollouts:
            return None
        learnable = self.column("learnability") > 0
        return spearman(self.column("score")[learnable], self.column("mean_completion_length")[learnable])

    def mean(self, column: str, selected: bool) -> float | None:
        """Mean of a column over the selected candidates, or over the rest."""
        if self.table is None:
            return None
        values = self.column(column)[self.selected == selected]
        values = values[np.isfinite(values)]
        return float(values.mean()) if len(values) else None

    def prompts(self) -> list[dict[str, Any]]:
        """The telling prompts, with what is known of each; of the table alone, if no rollouts were kept."""
        if self.table is None:
            return []
        columns = ("index", "prompt", "success_rate", "score", "rank", "selected", "mean_completion_length")
        rows = {row["index"]: row for row in self.table.select(columns).to_pylist()}
        examples = self.examples or [
            {"group": group, "index": row["index"], "rollouts": []}
            for group, row in _ends(sorted(rows.values(), key=lambda row: row["rank"]))
        ]
        return [{**rows[example["index"]], **example} for example in examples if example["index"] in rows]


def _ends(rows: list[dict[str, Any]], count: int = 5) -> list[tuple[str, dict[str, Any]]]:
    top, bottom = rows[:count], rows[max(count, len(rows) - count) :]
    return [*(("top", row) for row in top), *(("bottom", row) for row in bottom)]


@dataclass(frozen=True)
class Run:
    """A run's records.

    Args:
        folder (`Path`): The record folder, with `run.json`.
        output_dir (`Path`): Where the report goes: the run's output folder.
        data (mapping): `run.json`.
        stages (`tuple[Stage]`): In order; those that have selected.
        log (`list[dict]`): The trainer's log.
        agreement (mapping): Of `trl-learnalign select` with several selectors: `"correlations"` and `"overlaps"`,
            each a square `pandas.DataFrame` by selector. Empty for other runs.
    """

    folder: Path
    output_dir: Path
    data: Mapping[str, Any]
    stages: tuple[Stage, ...]
    log: list[dict[str, Any]]
    agreement: Mapping[str, pd.DataFrame] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the output folder."""
        return self.output_dir.resolve().name

    @property
    def phases(self) -> list[dict[str, Any]]:
        """Phases as they were planned, with steps as they came: `name`, `kind`, `start`, `end`."""
        phases, start = [], 0
        for phase in self.data["plan"]["phases"]:
            steps = self.note(phase["name"], "training").get("steps", phase["steps"])
            phases.append({**phase, "start": start, "steps": steps, "end": start + steps})
            start += steps
        return phases

    def note(self, phase: str, kind: str) -> Mapping[str, Any]:
        """What was noted of a phase: `kind` is `"selection"`, `"training"` or `"metrics"`."""
        return self.data.get("phases", {}).get(phase, {}).get(kind, {})

    @property
    def subsets(self) -> dict[str, Mapping[str, Any]]:
        """Notes of `trl-learnalign select` on each selector; empty for other runs."""
        return dict(self.data.get("phases", {}).get(SUBSETS, {}))

    @property
    def finished(self) -> bool:
        """Whether the last phase was trained to its end."""
        return bool(self.note(self.data["plan"]["phases"][-1]["name"], "training"))

    @cached_property
    def accuracies(self) -> list[Accuracy]:
        """Held-out accuracy before the first phase and after each, as far as it was measured."""
        names = [BASE, *(phase["name"] for phase in self.data["plan"]["phases"])]
        notes = ((name, self.note(name, "metrics")) for name in names)
        return [
            Accuracy(name, note["step"], note["accuracy"], int(note.get("n_eval", 0)))
            for name, note in notes
            if "accuracy" in note
        ]

    @cached_property
    def rewards(self) -> tuple[list[int], list[float]]:
        """Steps and mean training rewards, as logged."""
        logged = [(entry["step"], entry["reward"]) for entry in self.log if entry.get("reward") is not None]
        return [step for step, _ in logged], [reward for _, reward in logged]

    @property
    def scored_stages(self) -> list[Stage]:
        """Stages with a table."""
        return [stage for stage in self.stages if stage.table is not None]

    @cached_property
    def ledger(self) -> dict[str, dict[str, Cost]]:
        """Cost of scoring and training of each phase; empty for records without a ledger."""
        return {
            phase: {kind: Cost.of(cost) for kind, cost in costs.items()}
            for phase, costs in self.data.get("ledger", {}).items()
            if phase != "total"
        }

    def cost(self, kind: str) -> Cost:
        """Sum of the ledger: `"scoring"` or `"training"`."""
        return sum((costs[kind] for costs in self.ledger.values() if kind in costs), Cost())


def read_run(folder: str | Path) -> Run:
    """Read a run's records.

    Args:
        folder (`str` or `Path`): Its output folder, or the record folder in it.

    Raises:
        `FileNotFoundError`: If there is no `run.json`.
        `ValueError`: If it cannot be read.
    """
    folder = Path(folder)
    records = next((place for place in (layout.record_folder(folder), folder) if (place / layout.RUN).is_file()), None)
    if records is None:
        raise FileNotFoundError(
            f"{folder} holds no run: neither run.json nor learnalign/run.json is there. Give the output_dir (or "
            "record_dir) of a run with LearnAlignCallback."
        )
    data = _read_json(records / layout.RUN, None)
    if not isinstance(data, dict) or "plan" not in data:
        raise ValueError(f"{records / layout.RUN} is damaged, or not of trl_learnalign: it has no plan.")
    names = [phase["name"] for phase in data["plan"]["phases"] if phase["kind"] == "stage"]
    stages = tuple(
        _read_stage(records, name, data["phases"][name]["selection"])
        for name in names
        if "selection" in data.get("phases", {}).get(name, {})
    )
    output_dir = records.parent if records.name == layout.RECORDS else records
    log = _read_json(records / layout.LOG, [])
    return Run(records, output_dir, data, stages, log, _read_agreement(output_dir / SUBSETS))


def _read_stage(records: Path, name: str, note: Mapping[str, Any]) -> Stage:
    path = records / layout.stage_table(name)
    examples = _read_json(records / layout.stage_examples(name), {}).get("examples", [])
    return Stage(name, note, pq.read_table(path) if path.exists() else None, examples)


def _read_agreement(folder: Path) -> dict[str, pd.DataFrame]:
    paths = {name: folder / f"{name}.parquet" for name in (CORRELATIONS, OVERLAPS)}
    return {name: pd.read_parquet(path).set_index("selector") for name, path in paths.items() if path.exists()}


def _read_json(path: Path, default: Any) -> Any:
    if not path.exists():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, or run again from a checkpoint.") from error
