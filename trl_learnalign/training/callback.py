"""`LearnAlignCallback` runs warm-up, scoring and stages inside a stock `GRPOTrainer`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from trl_learnalign.bridge.compat import install_sampler
from trl_learnalign.bridge.hooks import (
    EpochEvents,
    Saving,
    SavingHooks,
    StockOrder,
    begin_counting,
)
from trl_learnalign.bridge.inference import RolledOut
from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.distributed import Ranks
from trl_learnalign.plan import STAGE, Phase, Plan
from trl_learnalign.preflight.environment import warn_of_rounding
from trl_learnalign.records.export import card_of, stage_selection, write_selection
from trl_learnalign.records.notes import TrainingNote
from trl_learnalign.records.run_record import RunRecord
from trl_learnalign.records.summary import describe, renew
from trl_learnalign.training.checkpoints import CheckpointReader
from trl_learnalign.training.counters import AnyRows, RolloutFilters, end_line
from trl_learnalign.training.phases import PhaseHook
from trl_learnalign.training.run import (
    Run,
    begin_run,
    check_not_retrained,
    check_settings,
    identified,
)
from trl_learnalign.training.sampler import CurriculumSampler
from trl_learnalign.training.setup import RunIdentity, RunSetup, set_up
from trl_learnalign.training.state import RunPasses, RunState, planned_state

if TYPE_CHECKING:
    import pandas as pd
    from trl import GRPOTrainer

logger = logging.getLogger(__name__)


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


class RunCallback(RunDisplay, TrainerCallback):
    """The hooks of a run in its trainer; each `train()` makes the [`Run`] that they drive.

    Args:
        setup (`RunSetup`): The assembled run.
        on_phase_end (callable, *optional*): See [`LearnAlignCallback`].
    """

    def __init__(self, setup: RunSetup, on_phase_end: PhaseHook | None = None):
        self.setup = setup
        self.trainer, self.config, self.folder = setup.trainer, setup.config, setup.folder
        self.on_phase_end = on_phase_end
        self.runs: list[Run] = []
        """The run of the latest `train()`; empty before the first."""
        self._has_trained = False
        self._reader = CheckpointReader(setup)
        is_in_trainers_order = self.config.uses_trainer_order
        more_rows = AnyRows(setup) if is_in_trainers_order else self._more_rows
        advantages = None if self.config.baseline == "group" else self._advantages
        self.additions = RolloutFilters(setup, more_rows, self._observe, advantages)
        self._saving = self._watch_saving()
        self.sampler = CurriculumSampler(setup.plan)
        self._stock_order: StockOrder | None = None
        if is_in_trainers_order:
            self._stock_order = StockOrder(self.trainer)
        else:
            install_sampler(self.trainer, self.sampler)
            EpochEvents(self.trainer, self, lambda: RunPasses(self.state))

    def _watch_saving(self) -> Saving:
        handler = self.trainer.callback_handler
        hooks = SavingHooks(
            is_active=lambda: self in handler.callbacks,
            training=self._reader.training,
            begin=lambda folder: not self.has_begun or self.run.checkpoints.begin(folder),
            seal=self._seal,
            describe=self._describe,
        )
        return Saving(self.trainer, hooks)

    def _seal(self, folder: Path) -> None:
        if self.has_begun:
            self.run.seal(folder)

    def _describe(self) -> None:
        """Add the section on this run to the model card."""
        if self.has_begun and self.plan.stages:
            describe(Path(self.trainer.args.output_dir), self.record.contents)

    def _more_rows(self, micro_step: int, start: int, count: int) -> np.ndarray:
        return self.run.order.more_rows(micro_step, start, count)

    def _advantages(self, micro_step: int, rewards: torch.Tensor) -> torch.Tensor | None:
        """Return advantages against the belief; `None` before the run begins."""
        return self.run.steps.belief_advantages(micro_step, rewards) if self.has_begun else None

    def _observe(self, rolled_out: RolledOut) -> None:
        if self.has_begun:  # otherwise the callback was constructed but not added
            self.run.steps.observe(rolled_out)

    # ---- The run ----------------------------------------------------------------------------------------------------

    @property
    def has_begun(self) -> bool:
        """Whether training has begun."""
        return bool(self.runs)

    @property
    def run(self) -> Run:
        """The run of the latest `train()`.

        Raises:
            `RuntimeError`: If training has not begun.
        """
        if not self.runs:
            raise RuntimeError(f"{self.folder}: a run and its record begin with train().")
        return self.runs[-1]

    @property
    def record(self) -> RunRecord:
        """The record of the run; there is one from the beginning of training."""
        return self.run.record

    @property
    def state(self) -> RunState:
        """The plan as it stands, and the prompts that stages have selected."""
        return self.run.state if self.has_begun else planned_state(self.setup)

    @property
    def plan(self) -> Plan:
        """The current plan; stages may have ended early."""
        return self.state.plan

    @property
    def ranks(self) -> Ranks:
        """The distributed processes."""
        return self.setup.ranks

    @property
    def is_scoring(self) -> bool:
        """Whether current rollouts are made to score prompts and not to train on them."""
        return self.has_begun and self.run.selection.is_scoring

    def identify(self) -> RunIdentity:
        """Return the identity of this run; collective over all ranks."""
        return identified(self.setup)

    def _check_alone(self) -> None:
        """Check that no other callback selects prompts for the same trainer.

        Raises:
            `ValueError`: If there is one.
        """
        callbacks = self.trainer.callback_handler.callbacks
        found = [type(each).__name__ for each in callbacks if isinstance(each, RunCallback)]
        if len(found) > 1:
            raise ValueError(
                f"This trainer has {len(found)} callbacks that select prompts ({', '.join(found)}), and each would "
                "decide which prompts come next: add one."
            )

    # ---- Events -----------------------------------------------------------------------------------------------------

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._check_alone()
        if not self.config.uses_trainer_order:  # otherwise the trainer's own behaviour is valid
            check_not_retrained(state, self._has_trained)
        if state.max_steps:
            warn_of_rounding(self.trainer)
        identity = self.identify()
        begin_counting(self.trainer)
        if self._stock_order is not None:
            self._stock_order.skip_earlier_epochs()
        kept = self._reader.kept(state)
        self.runs = [begin_run(self.setup, identity, self.additions, kept, self.on_phase_end)]

    @override
    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._saving.keep_random()
        step = state.global_step
        if not self.config.uses_trainer_order:
            # A resumed run enters its virtual epoch in the middle; the sampler always starts at the beginning of the
            # epoch.
            step = step // self.plan.epoch_steps * self.plan.epoch_steps
        phase = self.plan.phase_at(step)
        if state.global_step == phase.start:
            phase = self.run.begin_phase(phase, step)
        if self.config.uses_trainer_order:
            return
        prompts, skipped = self.run.order.begin_epoch(phase, step)
        self.ranks.agree(f"the prompts of {phase.name}", [step, phase.name, prompts.tolist()])
        self.sampler.begin_epoch(prompts, skipped)

    @override
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._saving.step_begins()

    @override
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._has_trained = True
        phase = self.run.steps.end_step()
        if state.global_step >= phase.end:
            self.run.end_phase(phase)
            if not self.config.uses_trainer_order and phase.end >= self.plan.total_steps:
                control.should_training_stop = True
        self.run.checkpoints.end_step(control)

    @override
    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A pass has ended (`bridge.epochs`). The trainer itself saves at the planned end of the run.
        step = state.global_step
        is_boundary = step == self.plan.phase_at(step - 1).end
        is_saved = self.run.checkpoints.last_step == step or step >= state.max_steps
        if is_boundary and not is_saved and self.config.save_at_phase_end:
            control.should_save |= args.save_strategy != "no"

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.run.end()
        if self.plan.stages:
            if self.ranks.is_main:
                renew(Path(args.output_dir), self.record.contents)
            logger.info("%s", end_line(self.record.contents.ledger, self.additions))


class LearnAlignCallback(RunCallback):
    """Selects the prompts that a `GRPOTrainer` trains on next.

    ```python
    trainer = GRPOTrainer(model, reward_funcs=accuracy_reward, args=args, train_dataset=dataset)
    trainer.add_callback(LearnAlignCallback(trainer))
    trainer.train()
    ```

    The callback takes over the order of prompts and the number of steps. At the start of each stage it scores the
    candidates with the current policy and selects some of them. The trainer then trains on the selected prompts. The
    other features are settings: [`LearnAlignConfig.skipping`] and [`LearnAlignConfig.control`] leave more to the
    trainer.

    Args:
        trainer (`GRPOTrainer`): The trainer, before `train()`.
        config (`LearnAlignConfig`, *optional*): Settings; by default the paper's.
        on_phase_end (callable, *optional*): Called on every rank as `on_phase_end(name, step)` with the current
            policy, before the first phase (`"base"`) and after each phase (`"warmup"`, `"stage_1"`, …). If it returns
            a dictionary of numbers and texts, the dictionary is recorded. The call does not change the trainer's
            random state.
        validation_dataset (`datasets.Dataset`, *optional*): Trusted prompts, with the columns of the training dataset.
            `selector="validation_alignment"` compares candidates with them. They are never trained on.

    Raises:
        `ValueError`, `TypeError`: If dataset, settings and rewards do not fit together; before any rollout.
        `RuntimeError`: If this version of trl is not supported.
    """

    def __init__(
        self,
        trainer: GRPOTrainer,
        config: LearnAlignConfig | None = None,
        on_phase_end: PhaseHook | None = None,
        validation_dataset: Any = None,
    ):
        setup = set_up(trainer, config, validation_dataset)
        check_settings(setup)
        super().__init__(setup, on_phase_end)


class AdaptiveOrderCallback(LearnAlignCallback):
    """Draws the prompts of each generation by their expected gain, and skips zero-advantage rollouts.

    ```python
    trainer.add_callback(AdaptiveOrderCallback(trainer))
    ```

    No prompt is scored and no prompt is left out. The length of the run is the trainer's.

    Args:
        trainer (`GRPOTrainer`): The trainer, before `train()`.
        config (`LearnAlignConfig`, *optional*): Settings with an adaptive order; by default
            [`LearnAlignConfig.adaptive`].
        on_phase_end (callable, *optional*): As in [`LearnAlignCallback`].
        validation_dataset (`datasets.Dataset`, *optional*): As in [`LearnAlignCallback`].

    Raises:
        `ValueError`: If no stage is trained on in adaptive order; otherwise as in [`LearnAlignCallback`].
    """

    def __init__(
        self,
        trainer: GRPOTrainer,
        config: LearnAlignConfig | None = None,
        on_phase_end: PhaseHook | None = None,
        validation_dataset: Any = None,
    ):
        config = LearnAlignConfig.adaptive() if config is None else config
        if isinstance(config, LearnAlignConfig) and not config.is_adaptive:
            raise ValueError(
                f"order={config.order}: AdaptiveOrderCallback trains in adaptive order; give "
                "LearnAlignConfig.adaptive(...), or use LearnAlignCallback for other orders."
            )
        super().__init__(trainer, config, on_phase_end, validation_dataset)
