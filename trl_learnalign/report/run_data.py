"""Reads a run's record, tables and log for report and comparison.

Axes: `P` candidates of a stage.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from trl_learnalign.adaptive import Outcomes
from trl_learnalign.intervals import spearman
from trl_learnalign.plan import Phase
from trl_learnalign.records import layout
from trl_learnalign.records.history import read_outcomes
from trl_learnalign.records.notes import Ledger, SelectionNote, SubsetNote, TrainingNote
from trl_learnalign.records.run_record import RunContents, read_contents, warn_of_unknown_keys
from trl_learnalign.records.store import read_table
from trl_learnalign.records.summary import Accuracy, accuracies


@dataclass(frozen=True)
class Stage:
    """A stage's selection.

    Args:
        name (`str`): `"stage_1"`, …
        note (`SelectionNote`): Its note in `run.json`.
        table (`pyarrow.Table`, *optional*): Its candidates; `None` if they were not scored.
        examples (`list[dict]`): Example prompts with rollouts.
    """

    name: str
    note: SelectionNote
    table: pa.Table | None
    examples: list[dict[str, Any]]

    def column(self, name: str) -> np.ndarray:
        """A numeric column, `(P,)`, NaN where missing."""
        assert self.table is not None
        return self.table[name].to_numpy().astype(np.float64)

    @cached_property
    def selected(self) -> np.ndarray:
        """Mask of the selected candidates, `(P,)` bool."""
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
        is_learnable = self.column("learnability") > 0
        scores = self.column("score")[is_learnable]
        lengths = self.column("mean_completion_length")[is_learnable]
        return spearman(scores, lengths)

    def mean(self, column: str, selected: bool) -> float | None:
        """Mean of a column over the selected candidates, or over the others."""
        if self.table is None:
            return None
        values = self.column(column)[self.selected == selected]
        values = values[np.isfinite(values)]
        return float(values.mean()) if len(values) else None

    def prompts(self) -> list[dict[str, Any]]:
        """The example prompts with their figures; from the table alone if no rollouts were kept."""
        if self.table is None:
            return []
        columns = (
            "index",
            "prompt",
            "success_rate",
            "learnability",
            "alignment",
            "score",
            "rank",
            "selected",
            "mean_completion_length",
        )
        rows = {row["index"]: row for row in self.table.select(columns).to_pylist()}
        examples = self.examples
        if not examples:
            examples = _ends(sorted(rows.values(), key=lambda row: row["rank"]))
        prompts = []
        for example in examples:
            # The folder may have a table and examples of different runs.
            if example["index"] in rows:
                prompts.append({**rows[example["index"]], **example})
        return prompts


def _ends(rows: list[dict[str, Any]], count: int = 5) -> list[dict[str, Any]]:
    """The top and the bottom of a ranking, as examples without rollouts."""
    groups = {"top": rows[:count], "bottom": rows[max(count, len(rows) - count) :]}
    examples = []
    for group, members in groups.items():
        for row in members:
            examples.append({"group": group, "index": row["index"], "rollouts": []})
    return examples


@dataclass(frozen=True)
class Run:
    """A run's records.

    Args:
        folder (`Path`): The record folder, with `run.json`.
        output_dir (`Path`): The run's output folder, for the report.
        contents (`RunContents`): `run.json`.
        stages (`tuple[Stage]`): The stages that have selected, in order.
        log (`list[dict]`): The trainer's log.
        outcomes (`Outcomes`, *optional*): Outcomes of the training rollouts; `None` if they were not recorded.
        agreement (mapping): For `trl-learnalign select` with several selectors: `"correlations"` and `"overlaps"`,
            each a square `pandas.DataFrame` by selector. Empty for other runs.
    """

    folder: Path
    output_dir: Path
    contents: RunContents
    stages: tuple[Stage, ...]
    log: list[dict[str, Any]]
    outcomes: Outcomes | None = None
    agreement: Mapping[str, pd.DataFrame] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the output folder."""
        return self.output_dir.resolve().name

    @property
    def phases(self) -> list[Phase]:
        """The planned phases, with actual steps."""
        phases: list[Phase] = []
        for phase in self.contents.plan.phases:
            training = self.contents.note(phase.name, TrainingNote)
            steps = phase.steps if training is None else training.steps
            start = phases[-1].end if phases else 0
            phases.append(replace(phase, start=start, steps=steps))
        return phases

    @property
    def subsets(self) -> dict[str, SubsetNote]:
        """Notes of `trl-learnalign select` on each selector; empty for other runs."""
        return self.contents.subsets

    @property
    def finished(self) -> bool:
        """Whether the last phase was trained to its end; of a run of select, whether it has chosen."""
        if not self.contents.plan.stages:
            return bool(self.subsets)
        last = self.contents.plan.phases[-1]
        return self.contents.note(last.name, TrainingNote) is not None

    @cached_property
    def accuracies(self) -> list[Accuracy]:
        """Held-out accuracy before the first phase and after each phase, where it was measured."""
        return accuracies(self.contents)

    @property
    def final_accuracy(self) -> Accuracy | None:
        """The last measured accuracy; `None` without any."""
        return self.accuracies[-1] if self.accuracies else None

    @property
    def seed(self) -> int:
        """Training seed."""
        return self.contents.trainer.seed

    @cached_property
    def rewards(self) -> tuple[list[int], list[float]]:
        """Steps and mean training rewards, as logged."""
        entries = [entry for entry in self.log if entry.get("reward") is not None]
        steps = [entry["step"] for entry in entries]
        return steps, [entry["reward"] for entry in entries]

    @property
    def scored_stages(self) -> list[Stage]:
        """Stages with a table."""
        return [stage for stage in self.stages if stage.table is not None]

    def at_price(self, price: float) -> Run:
        """The run with its compute counted at another price of a generated token."""
        config = {**self.contents.config, "generation_price": price}
        return replace(self, contents=replace(self.contents, config=config))

    @cached_property
    def ledger(self) -> Ledger:
        """Cost of scoring and training of each phase; empty for old records without a ledger."""
        return self.contents.ledger


def read_run(folder: str | Path) -> Run:
    """Read a run's records.

    Args:
        folder (`str` or `Path`): Its output folder, or the record folder in it.

    Raises:
        `FileNotFoundError`: If there is no `run.json`.
        `ValueError`: If it cannot be read.
    """
    folder = Path(folder)
    places = (layout.record_folder(folder), folder)
    records = next((place for place in places if (place / layout.RUN).is_file()), None)
    if records is None:
        raise FileNotFoundError(
            f"{folder} is not the folder of a run: it has neither {layout.RUN} nor {layout.RECORDS}/{layout.RUN}. "
            "Give the output_dir (or record_dir) of a run with LearnAlignCallback."
        )
    path = records / layout.RUN
    try:
        contents = read_contents(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): {layout.REMEDY}.") from error
    warn_of_unknown_keys(contents, path)
    output_dir = layout.output_folder(records)
    return Run(
        folder=records,
        output_dir=output_dir,
        contents=contents,
        stages=_read_stages(records, contents),
        log=_read_log(layout.inside(records, layout.LOG)),
        outcomes=read_outcomes(layout.inside(records, layout.HISTORY)),
        agreement=_read_agreement(output_dir),
    )


def _read_stages(records: Path, contents: RunContents) -> tuple[Stage, ...]:
    stages = []
    for phase in contents.plan.stages:
        note = contents.note(phase.name, SelectionNote)
        if note is None:  # not selected yet
            continue
        path = layout.inside(records, layout.stage_table(phase.name))
        table = read_table(path) if path.exists() else None
        kept = _read_json(layout.inside(records, layout.stage_examples(phase.name)), {})
        stages.append(Stage(phase.name, note, table, kept.get("examples", [])))
    return tuple(stages)


def _read_agreement(output_dir: Path) -> dict[str, pd.DataFrame]:
    tables = {}
    for name in (layout.CORRELATIONS, layout.OVERLAPS):
        path = layout.inside(output_dir, layout.SUBSETS, f"{name}.parquet")
        if path.exists():
            tables[name] = read_table(path).to_pandas().set_index("selector")
    return tables


def _read_log(path: Path) -> list[dict[str, Any]]:
    """The trainer's log: one object per entry, with its step."""
    entries = _read_json(path, [])
    if not isinstance(entries, list) or not all(map(_is_entry, entries)):
        raise ValueError(f"{path} is damaged (it is not a list of entries): {layout.REMEDY}.")
    return entries


def _is_entry(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("step", 0), int):
        return False
    reward = value.get("reward")
    return reward is None or (isinstance(reward, int | float) and "step" in value)


def _read_json(path: Path, default: Any) -> Any:
    if not path.exists():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): {layout.REMEDY}.") from error
