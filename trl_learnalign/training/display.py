"""`repr`, notebook tables, and the start and end line of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.plan import STAGE, Phase, Plan
from trl_learnalign.records.export import card_of, stage_selection, write_selection
from trl_learnalign.records.notes import SCORING_ACCOUNT, Ledger, TrainingNote
from trl_learnalign.records.run_record import RunRecord
from trl_learnalign.training.setup import RunSetup
from trl_learnalign.training.state import RunState
from trl_learnalign.training.steps import RolloutFilters

if TYPE_CHECKING:
    import pandas as pd


FIRST_COLUMNS = [
    *("rank", "selected", "prompt", "success_rate", "learnability", "alignment", "score"),
]
"""Columns of [`RunDisplay.table`]; `trl_learnalign.records.run_record` describes the others."""


class RunDisplay:
    """Views of a run, during and after training."""

    setup: RunSetup

    @property
    def has_begun(self) -> bool:
        """Whether training has begun."""
        raise NotImplementedError

    @property
    def record(self) -> RunRecord:
        """The record of the run; there is one from the beginning of training."""
        raise NotImplementedError

    @property
    def state(self) -> RunState:
        """The plan as it stands, and the prompts that stages have selected."""
        raise NotImplementedError

    def selected(self, stage: str) -> np.ndarray:
        """Rows of the training dataset that a stage selected, ascending.

        Args:
            stage (`str`): `"stage_1"`, `"stage_2"`, …

        Raises:
            `KeyError`: If that stage has not selected yet.
        """
        self.check_selected(stage)
        return self.state.pools[stage].copy()

    def table(self, stage: str) -> pd.DataFrame:
        """Return the candidates of a stage, best first; the index is the row of the training dataset.

        Columns: `rank`, `selected`, `prompt`, `success_rate` (p), `learnability` (V), `alignment`, `score`, then the
        other columns of `stage_K.parquet`.

        Args:
            stage (`str`): `"stage_1"`, `"stage_2"`, …

        Raises:
            `KeyError`: If that stage has not selected yet, or took all prompts without scoring them.
        """
        self.check_selected(stage)
        table = self.record.read_stage(stage)
        if table is None:
            raise KeyError(f"{stage} took its prompts without scoring them, so it has no table.")
        frame = table.to_pandas()
        frame = frame.set_index("index")
        frame = frame.sort_values("rank")
        return frame[[*FIRST_COLUMNS, *frame.columns.difference(FIRST_COLUMNS, sort=False)]]

    def save_selection(self, folder: str | Path, stage: str | None = None) -> Path:
        """Write the selected prompts of a stage as a dataset with a card; collective over all ranks.

        `folder/data/train.parquet` has all columns of the dataset, and the columns `selection_index`,
        `selection_rank`, `selection_score`, `selection_success_rate`, `selection_learnability` and
        `selection_alignment`. The best prompt is first. `folder/README.md` describes how the prompts were selected.
        Load the folder with `datasets.load_dataset(folder)`.

        Args:
            folder (`str` or `Path`): Target folder; it is empty or was written by an earlier call.
            stage (`str`, *optional*): `"stage_1"`, …; by default the last stage that has selected.

        Raises:
            `ValueError`: If that stage has not selected, or the folder holds other files.
            `RuntimeError`: If the run has not begun.
        """
        ranks = self.setup.ranks
        path = Path(folder)
        if ranks.is_main:
            contents = self.record.contents
            selection = stage_selection(self.record.folder, contents, stage)
            write_selection(path, selection, card_of(contents, selection))
        ranks.wait()
        return path

    def check_selected(self, stage: str) -> None:
        """Check that a stage has selected.

        Raises:
            `KeyError`: If it has not, naming the stages that have.
        """
        if stage in self.state.pools:
            return
        stages = ", ".join(phase.name for phase in self.state.plan.stages)
        known = ", ".join(self.state.pools) or "none"
        raise KeyError(
            f"{stage!r} has no selection. Stages of this run: {stages}; with a selection so far: {known}."
        )

    def __repr__(self) -> str:
        phases = " → ".join(self._description(phase) for phase in self.state.plan.phases)
        return f"<LearnAlignCallback: {phases}; {self._status()}>"

    def _status(self) -> str:
        """The progress of the run and the folder of its records."""
        state = self.setup.trainer.state
        steps = self.state.plan.total_steps
        config = self.setup.config
        names = [selector.name for selector in self.setup.selectors]
        selection = ", ".join(dict.fromkeys(names))
        if config.is_whole_pool:  # nothing is scored
            selection = f"{config.order[0]} order"
        folder = self.setup.folder
        return f"{selection}; step {state.global_step} of {steps}; records in {folder}"

    def _description(self, phase: Phase) -> str:
        """A phase with its number of prompts and its progress."""
        prompts = f"{phase.size:,} prompts" if phase.size else self.state.plan.prompts
        state = "planned"
        if phase.kind == STAGE and not self.setup.config.uses_trainer_order:
            state = "selects later"
        pool = self.state.pools.get(phase.name)
        if pool is not None:
            prompts = f"{len(pool):,} of {self.state.plan.prompts}"
            state = "selected"
        note = self.record.get(phase.name, TrainingNote) if self.has_begun else None
        if note is not None:
            state = "trained" if note.reward is None else f"trained, reward {note.reward:.3g}"
        return f"{phase.name} ({prompts}, {state})"


# ---- Start and end line ---------------------------------------------------------------------------------------------


def start_line(setup: RunSetup, plan: Plan, additions: RolloutFilters) -> str:
    """Return the start line: method, number of prompts, success rule, and whether rollouts are skipped."""
    rule = setup.context.success.sentence
    return f"{_method(setup, plan)}; {rule}; {_skipping(setup.config, additions)}."


def _method(setup: RunSetup, plan: Plan) -> str:
    config, everything = setup.config, plan.prompts
    if config.uses_trainer_order:
        return f"This run trains on {everything} in the trainer's own order"
    orders = " and ".join(dict.fromkeys(config.order))
    if config.is_whole_pool:
        return f"This run trains on {everything} in {orders} order"
    names = ", ".join(dict.fromkeys(selector.name for selector in setup.selectors))
    sizes = [f"{stage.size:,}" for stage in plan.stages]
    chosen = f"This run selects {_list(sizes)} of {everything} by {names}, in {orders} order"
    if config.warmup_samples:
        chosen += f", after a warm-up on {config.warmup_samples:,}"
    return chosen


def _list(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _skipping(config: LearnAlignConfig, additions: RolloutFilters) -> str:
    if additions.skipper is not None:
        return "rollouts without an advantage are not trained on"
    if additions.not_skipped is not None:
        return f"every rollout is trained on ({additions.not_skipped})"
    return f"every rollout is trained on (skip_zero_advantages={config.skip_zero_advantages})"


def end_line(ledger: Ledger, additions: RolloutFilters) -> str:
    """Return the end line: the cost of the run, and what skipping has saved."""
    total, scoring = ledger.total, ledger.sum(SCORING_ACCOUNT)
    parts = [
        f"{total.tokens_generated:,} tokens generated",
        f"{total.tokens_prompt + total.tokens_forward:,} read",
        f"{total.tokens_trained:,} passed forward and backward",
    ]
    line = f"The run has spent {', '.join(parts)}"
    if compute := ledger.compute(scoring):
        share = compute / ledger.compute(total)
        line += f" ({share:.0%} of the compute to select prompts)"
    if additions.skipper is None:
        return f"{line}; nothing was skipped."
    counts = additions.skipper.counts
    tokens = counts.tokens_given - counts.tokens_trained
    rows = counts.rows_given - counts.rows_trained
    share = tokens / max(1, counts.tokens_given)
    return (
        f"{line}; skipping has saved {tokens:,} of {counts.tokens_given:,} tokens ({share:.0%}) and {rows:,} of "
        f"{counts.rows_given:,} rows of training."
    )
