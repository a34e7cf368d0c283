"""What each step leaves: outcomes of rollouts, costs, and whether the reward has stopped rising."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from trl_learnalign import bridge, curriculum
from trl_learnalign.curriculum import STAGE, Phase
from trl_learnalign.records.history import HistoryRecorder, RolledOutPrompts
from trl_learnalign.records.ledger import Cost, TrainingMeter
from trl_learnalign.records.notes import Note, RolloutsNote, TrainingNote
from trl_learnalign.training.additions import Additions, AnyRows
from trl_learnalign.training.compute_budget import ComputeBudget
from trl_learnalign.training.first_look import FirstLook, GroupLook
from trl_learnalign.training.metrics import trained_metrics, training_line
from trl_learnalign.training.order import EpochOrder
from trl_learnalign.training.phase_end import PhaseEnd
from trl_learnalign.training.plateau import Plateau
from trl_learnalign.training.reasons import ChoiceTables, warn_of_narrow
from trl_learnalign.training.run_state import RunState
from trl_learnalign.training.setup import RunSetup
from trl_learnalign.training.states import check_keys
from trl_learnalign.training.tally import Tally

logger = logging.getLogger(__name__)

BROADER_ORDER = "a larger adaptive_exploration comes back to the others more often"


class StepRecorder:
    """Watches the steps of a run.

    Args:
        setup (`RunSetup`): What the run is made of.
        run (`RunState`): Where it stands.
        order (`EpochOrder`): Which prompts were rolled out.
        history (`HistoryRecorder`): Where outcomes go.
        budget (`ComputeBudget`): What the run may spend.
    """

    def __init__(
        self,
        setup: RunSetup,
        run: RunState,
        order: EpochOrder,
        history: HistoryRecorder,
        budget: ComputeBudget,
    ):
        self.trainer, self.config, self.success = setup.trainer, setup.config, setup.context.success
        self.ranks = setup.ranks
        self.run = run
        self.order = order
        self.history = history
        self.budget = budget
        self.plateau = Plateau(setup.config)
        limit = self.trainer.args.max_completion_length
        self.first_look = FirstLook(self.success, self._order_goes_by_success, limit)
        trains_on_few = self.config.is_adaptive or self.config.skip_zero_advantages
        self.group_look = GroupLook(trains_on_few and self.ranks.is_main)
        self.meter = TrainingMeter(setup.trainer.args.generation_batch_size)
        more_rows = AnyRows(setup) if self.config.leaves_the_order else order.more_rows
        self.additions = Additions(setup, more_rows, self.observe)
        self.tally = Tally()
        self._has_begun = False
        trackers = bridge.TrackerTables(self.trainer)
        self.tables = ChoiceTables(trackers, self.config.log_prompt_table, setup.groupings)
        self.phase_end = PhaseEnd(
            self.trainer.train_dataset, order, history, self.additions, self.tally
        )

    def begin(self) -> None:
        """A run begins, or goes on: what is rolled out from now on is its own."""
        self._has_begun = True
        if self.trainer.state.global_step:
            self.group_look.leave()

    @property
    def _order_goes_by_success(self) -> bool:
        """Whether what is right decides, on this rank, on what is trained: a scored stage has a look of its own."""
        decides = self.config.goes_by_outcomes or self.config.samples_dynamically
        return decides and self.ranks.is_main

    def begin_phase(self) -> None:
        """A phase begins: costs and rewards are counted anew."""
        self.plateau.begin()
        self.tally.begin()
        self.meter.begin(bridge.tokens_seen(self.trainer))
        self.additions.begin_phase()

    def observe(self, rolled_out: bridge.RolledOut) -> None:
        """Note what was rolled out for a generation, by whomever."""
        if not self._has_begun:  # a callback that was made and not added
            return
        useful = rolled_out.useful
        share = float(useful[rolled_out.trained].mean())
        bridge.add_metrics(self.trainer, {"learnalign/useful_groups": share})
        successes = self.success.successes(rolled_out.rewards)
        judged = rolled_out.rewards[..., self.success.index]
        self.first_look.add(judged, bridge.cut_share(self.trainer))
        self.group_look.add(successes)
        if self.config.leaves_the_order:
            self.tally.add(useful, successes, int(rolled_out.trained.sum()))
            return
        rows = self.order.rows_at(rolled_out.micro_step)
        rows = np.concatenate([rows, rolled_out.asked_rows])
        self._record(rolled_out.micro_step, rows, successes, useful)

    def _record(
        self, micro_step: int, rows: np.ndarray, successes: torch.Tensor, useful: np.ndarray
    ) -> None:
        plan, geometry = self.run.plan, self.run.plan.geometry
        step = micro_step // geometry.accumulation
        phase = plan.phase_at(step)
        right, wrong = ((successes == value).sum(dim=1).numpy() for value in (1, 0))
        rolled_out = RolledOutPrompts(step, rows, right, wrong)
        predicted = self.order.observe(rolled_out)
        bridge.add_metrics(self.trainer, self.order.metrics())
        generation = (
            micro_step - phase.start * geometry.accumulation
        ) // geometry.micro_steps_per_generation
        places = np.arange(len(rows)).clip(max=geometry.prompts_per_generation - 1)
        places += generation * geometry.prompts_per_generation
        passes = curriculum.pass_numbers(plan, phase, places, len(self.run.pool_of(phase)))
        self.history.add(phase.name, rolled_out, passes, useful, predicted)

    def end_step(self) -> Phase:
        """An optimizer step has been made; returns its phase, which may have ended with it.

        Phases end early by `plateau_patience` or `compute_budget`.
        """
        self.meter.add_step(bridge.mean_completion_lengths(self.trainer))
        step = self.trainer.state.global_step
        phase = self.run.plan.phase_at(step - 1)
        reason = self._reason_to_end(phase)
        in_whole_units = (step - phase.start) % self.run.plan.geometry.unit_steps == 0
        if reason is None or not in_whole_units or step >= phase.end:
            return phase
        logger.info(
            "%s: %s; ended at step %d instead of %d.",
            phase.name,
            reason,
            step,
            phase.end,
        )
        return self.run.end(phase, step)

    def _reason_to_end(self, phase: Phase) -> str | None:
        if self._has_plateaued(phase):
            return "the reward has stopped rising"
        if not self.budget.is_limited(self.run.plan, phase):
            return None
        is_spent = self.budget.is_spent(self.cost())
        return "compute_budget is spent" if self.ranks.from_main(is_spent) else None

    def _has_plateaued(self, phase: Phase) -> bool:
        """Count the step that was just made; whether the stage has taught what it can."""
        if not self.config.plateau_patience or phase.kind != STAGE:
            return False
        return self.ranks.from_main(self.plateau.add(bridge.last_reward(self.trainer)))

    def cost(self) -> Cost:
        """What the training of the phase took so far."""
        cost = self.meter.cost(
            bridge.tokens_seen(self.trainer),
            passes=self.trainer.num_iterations,
            forwards=bridge.extra_forwards(self.trainer),
        )
        return self.additions.corrected(cost)

    def notes(self, phase: Phase) -> list[Note]:
        """What a phase that has just ended was; all ranks call it together and get the same."""
        training = self._training(phase)
        logger.info("%s: %s", phase.name, training_line(training))
        notes = self.phase_end.notes(phase)
        for note in notes:
            if isinstance(note, RolloutsNote) and note.shares:
                self._tell_categories(phase, note)
        return [training, *notes]

    def _tell_categories(self, phase: Phase, note: RolloutsNote) -> None:
        """Which categories of prompts a phase has trained on, to log and trackers; all ranks call it together."""
        if self.ranks.is_main:
            warn_of_narrow(phase.name, note.shares, BROADER_ORDER)
        bridge.log_apart(self.trainer, trained_metrics(note))
        self.tables.show_trained(phase.name, note.shares)

    def _training(self, phase: Phase) -> TrainingNote:
        trainer = self.trainer
        logged = [
            entry for entry in trainer.state.log_history if phase.start < entry["step"] <= phase.end
        ]
        # TRL logs None where no reward function could judge a single completion.
        rewards = [entry["reward"] for entry in logged if entry.get("reward") is not None]
        cost = self.cost()
        return TrainingNote(
            step=trainer.state.global_step,
            steps=phase.steps,
            reward=float(np.mean(rewards)) if rewards else None,
            training_seconds=cost.seconds,
            cost=cost,
        )

    def state_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "plateau": self.plateau.state_dict(),
            "meter": self.meter.state_dict(),
            **({"tally": self.tally.state_dict()} if self.config.leaves_the_order else {}),
            **self.additions.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from [`state_dict`].

        Raises:
            `ValueError`: If the state is of another version.
        """
        own = ["plateau", "meter", *(["tally"] if self.config.leaves_the_order else [])]
        additions = {name: part for name, part in state.items() if name not in own}
        check_keys("the steps", state, (*own, *additions))
        self.additions.load_state_dict(additions)
        self.meter.load_state_dict(state["meter"])
        if self.config.leaves_the_order:
            self.tally.load_state_dict(state["tally"])
        self.plateau.load_state_dict(state["plateau"])
