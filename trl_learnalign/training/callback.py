"""`LearnAlignCallback` runs warm-up, scoring and stages inside a stock `GRPOTrainer`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from trl_learnalign.bridge.borrow import begin_counting
from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.plan import Phase
from trl_learnalign.preflight.environment import warn_of_rounding
from trl_learnalign.records.run import RunRecord
from trl_learnalign.training.display import end_line, start_line
from trl_learnalign.training.model_card import renew
from trl_learnalign.training.order import read_prompts
from trl_learnalign.training.phases import PhaseHook, StageSelection
from trl_learnalign.training.setup import set_up

if TYPE_CHECKING:
    from trl import GRPOTrainer


from trl_learnalign.training.run import (
    TrainingRun,
    check_alone,
    check_not_retrained,
    check_settings,
)

logger = logging.getLogger(__name__)


class LearnAlignCallback(TrainingRun):
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
        check_settings(setup, setup.config, RunRecord(setup.folder, setup.ranks.is_main))
        self._put_together(setup, on_phase_end)

    # ---- Start and resume -------------------------------------------------------------------------------------------

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        check_alone(self.trainer, self)
        if not self.config.uses_trainer_order:  # otherwise the trainer's own behaviour is valid
            check_not_retrained(state, self._has_trained)
        self.run.begin()
        if self.config.uses_trainer_order:
            self.run.keep_length(state.max_steps)
        if self.plan.total_steps:
            warn_of_rounding(self.trainer)
        identity = self.identify()
        begin_counting(self.trainer)
        if self._stock_order is not None:
            self._stock_order.go_on()
        kept = self.checkpoints.begin_run(state)
        if kept is None:
            self._begin_anew(identity, state.global_step)
        else:
            self._go_on(identity, kept, state)
        self.steps.begin()
        self.phases.begin_run()
        if self.plan.stages:  # for a warm-up alone, the code that selects after it logs the end
            logger.info("%s", start_line(self.setup, self.plan, self.steps.additions))
        features = np.empty((0, 0))
        if self.config.needs_belief:
            place = None if kept is None else kept.features
            features = read_prompts(self.setup, identity, self.record, place)
        self.order.begin(features, state.global_step)
        groupings = self.setup.groupings
        self._selection = StageSelection(self.measurer(), self.record, self.plan, groupings)

    # ---- Phases -----------------------------------------------------------------------------------------------------

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
            assert self._selection is not None
            phase = self.phases.begin(phase, step, self._selection)
            self.order.learn_from_scores(self.record, phase)
            self.steps.begin_phase()
        if self.config.uses_trainer_order:
            return
        prompts, skipped = self.order.begin_epoch(phase, step)
        self.ranks.agree(f"the prompts of {phase.name}", [step, phase.name, prompts.tolist()])
        self.sampler.begin_epoch(prompts, skipped)

    # ---- Steps ------------------------------------------------------------------------------------------------------

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
        phase = self.steps.end_step()
        if state.global_step >= phase.end:
            self._end_phase(phase, args, control)
        self.checkpoints.end_step(control)

    def _end_phase(self, phase: Phase, args: TrainingArguments, control: TrainerControl) -> None:
        self._note_training(phase)
        if not self.config.uses_trainer_order and phase.end >= self.plan.total_steps:
            control.should_training_stop = True

    @override
    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A pass has ended (`bridge.epochs`). The trainer itself saves at the planned end of the run.
        is_boundary = state.global_step == self.plan.phase_at(state.global_step - 1).end
        is_saved = self._saved_at == state.global_step or state.global_step >= state.max_steps
        if is_boundary and not is_saved and self.config.save_at_phase_end:
            control.should_save |= args.save_strategy != "no"

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._note_what_was_cut(state.global_step)
        self.phases.end_run()
        if self.plan.stages:
            if self.ranks.is_main:
                renew(Path(args.output_dir), self.record.contents)
            logger.info("%s", end_line(self.record.contents.ledger, self.steps.additions))


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
