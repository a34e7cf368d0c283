"""Records outcomes and costs after each step, and ends phases."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from trl_learnalign import scoring
from trl_learnalign.adaptive import Outcomes
from trl_learnalign.bridge.hooks import log_apart
from trl_learnalign.bridge.inference import RolledOut
from trl_learnalign.bridge.logs import TrackerTables
from trl_learnalign.bridge.objective import extra_forwards
from trl_learnalign.bridge.requires import (
    add_metrics,
    cut_share,
    last_reward,
    mean_completion_lengths,
    tokens_seen,
)
from trl_learnalign.diversity import shares_of
from trl_learnalign.plan import STAGE, Phase, pass_numbers
from trl_learnalign.records.history import HistoryRecorder
from trl_learnalign.records.notes import (
    BeliefNote,
    Cost,
    GroupDistribution,
    Note,
    RepeatedPrompt,
    RolloutsNote,
    TrainingNote,
)
from trl_learnalign.training.counters import (
    GroupLook,
    PhaseCounters,
    RewardSanityCheck,
    RolloutFilters,
    Tally,
)
from trl_learnalign.training.epoch_order import BeliefAdvantages, EpochOrder
from trl_learnalign.training.metrics import (
    ChoiceTables,
    belief_note,
    most_repeated,
    phase_lines,
    trained_metrics,
    training_line,
    warn_of_narrow,
)
from trl_learnalign.training.setup import RunSetup
from trl_learnalign.training.state import ComputeBudget, RunState

logger = logging.getLogger(__name__)

# ---- End of a phase -------------------------------------------------------------------------------------------------


class PhaseSummarizer:
    """Summarises the rollouts of phases.

    Args:
        dataset (`datasets.Dataset`): The dataset, with a `prompt` column.
        order (`EpochOrder`): The rolled-out prompts, with predictions.
        history (`HistoryRecorder`): The outcomes.
        additions (`RolloutFilters`): The skipped rollouts.
        tally (`Tally`): Counts where the history has no outcomes, in the trainer's own order.
    """

    def __init__(
        self,
        dataset: Any,
        order: EpochOrder,
        history: HistoryRecorder,
        additions: RolloutFilters,
        tally: Tally,
    ):
        self.dataset = dataset
        self.order, self.history, self.additions, self.tally = order, history, additions, tally

    def notes(self, phase: Phase) -> list[Note]:
        """Return the notes of a phase that has just ended; collective, and equal on all ranks."""
        ranks, found = self.order.ranks, None
        if ranks.is_main:
            outcomes = self.history.outcomes().of_phase(phase.name)
            rollouts, belief = self._rollouts(phase, outcomes), self._belief(phase, outcomes)
            found = [rollouts] if belief is None else [rollouts, belief]
            config = self.order.config
            if config.goes_by_outcomes or config.skip_zero_advantages or config.samples_dynamically:
                for line in phase_lines(rollouts, belief):
                    logger.info("%s: %s", phase.name, line)
        return ranks.from_main(found)

    def _belief(self, phase: Phase, outcomes: Outcomes) -> BeliefNote | None:
        if self.order.adaptive is None:
            return None
        belief = self.order.adaptive.belief
        return belief_note(phase.end, outcomes, belief.concentration)

    def _rollouts(self, phase: Phase, outcomes: Outcomes) -> RolloutsNote:
        geometry = self.order.geometry
        tokens: dict[str, Any] = {**self.additions.skipped()}
        repeated: tuple[RepeatedPrompt, ...] = ()
        shares: tuple[GroupDistribution, ...] = ()
        if self.order.order_of(phase) not in ("shuffled", "trainer"):
            repeated = most_repeated(outcomes, self.dataset)
            pool, seed = self.order.run.pool_of(phase), self.order.config.selection_seed
            shares = shares_of(self.order.groupings, pool, outcomes.rows, seed, phase.name)
        if self.order.config.uses_trainer_order:
            return RolloutsNote(
                step=phase.end,
                groups=self.tally.groups,
                useful=self.tally.useful,
                mixed=self.tally.mixed,
                groups_trained=self.tally.trained,
                **tokens,
                not_skipped=self.additions.not_skipped,
            )
        return RolloutsNote(
            step=phase.end,
            groups=len(outcomes),
            useful=int(outcomes.useful.sum()),
            mixed=int(outcomes.mixed.sum()),
            prompts=len(np.unique(outcomes.rows)),
            groups_trained=geometry.prompts_in(phase.steps),
            **tokens,
            not_skipped=self.additions.not_skipped,
            repeated=repeated,
            shares=shares,
        )


# ---- Steps ----------------------------------------------------------------------------------------------------------

BROADER_ORDER = "a larger adaptive_exploration draws the others more often"


class TrainingMonitor:
    """Monitors the steps of a run.

    Args:
        setup (`RunSetup`): The assembled run.
        run (`RunState`): Its state.
        order (`EpochOrder`): The rolled-out prompts.
        history (`HistoryRecorder`): The history that outcomes are added to.
        counters (`PhaseCounters`): What is counted in a phase.
        budget (`ComputeBudget`): The budget of the run.
    """

    def __init__(
        self,
        setup: RunSetup,
        run: RunState,
        order: EpochOrder,
        history: HistoryRecorder,
        counters: PhaseCounters,
        budget: ComputeBudget,
    ):
        self.trainer, self.config, self.success = setup.trainer, setup.config, setup.context.success
        self.ranks = setup.ranks
        self.run = run
        self.order = order
        self.history = history
        self.budget = budget
        self.counters, self.additions = counters, counters.additions
        limit = self.trainer.args.max_completion_length
        self.first_look = RewardSanityCheck(self.success, self._order_goes_by_success, limit)
        trains_on_few = self.config.is_adaptive or self.config.skip_zero_advantages
        by_group = self.config.baseline == "group"  # otherwise groups of equal rewards teach too
        # A resumed run may have learned to draw more mixed groups than the pool has.
        is_new = not self.trainer.state.global_step
        looks_at_groups = trains_on_few and by_group and is_new and self.ranks.is_main
        self.group_look = GroupLook(looks_at_groups, self.config.is_graded)
        self.belief_advantages = BeliefAdvantages(setup, order)
        self._shown_at = -1
        trackers = TrackerTables(self.trainer)
        self.tables = ChoiceTables(trackers, self.config.log_prompt_table, setup.groupings)
        self.phase_end = PhaseSummarizer(
            self.trainer.train_dataset, order, history, self.additions, counters.tally
        )

    @property
    def _order_goes_by_success(self) -> bool:
        """Whether success decides, on this rank, what is trained on; a scored stage has its own check."""
        decides = self.config.goes_by_outcomes or self.config.samples_dynamically
        return decides and self.ranks.is_main

    def observe(self, rolled_out: RolledOut) -> None:
        """Record the rollouts of a generation, whatever code made them."""
        useful = rolled_out.useful
        share = float(useful[rolled_out.trained].mean())
        add_metrics(self.trainer, {"learnalign/useful_groups": share})
        successes = self.success.successes(rolled_out.rewards)
        judged = rolled_out.rewards[..., self.success.index]
        self.first_look.add(judged, cut_share(self.trainer))
        self.group_look.add(successes)
        if self.config.uses_trainer_order:
            self.counters.tally.add(useful, successes, int(rolled_out.trained.sum()))
            return
        rows = self.order.rows_at(rolled_out.micro_step)
        rows = np.concatenate([rows, rolled_out.asked_rows])
        tokens = rolled_out.tokens.mean(axis=1)
        self._record(rolled_out.micro_step, rows, successes, useful, tokens)

    def _record(
        self,
        micro_step: int,
        rows: np.ndarray,
        successes: torch.Tensor,
        useful: np.ndarray,
        tokens: np.ndarray,
    ) -> None:
        plan, geometry = self.run.plan, self.run.plan.geometry
        step = micro_step // geometry.accumulation
        phase = plan.phase_at(step)
        right, wrong, partial = scoring.outcome_sums(successes, self.config.is_graded)
        outcomes = Outcomes.at(step, rows, right, wrong, phase.name, useful, partial, tokens)
        predicted = self.order.observe(outcomes)
        if predicted is not None:
            outcomes = replace(outcomes, predicted=predicted)
        add_metrics(self.trainer, self.order.metrics())
        generation = (
            micro_step - phase.start * geometry.accumulation
        ) // geometry.micro_steps_per_generation
        places = np.arange(len(rows)).clip(max=geometry.prompts_per_generation - 1)
        places += generation * geometry.prompts_per_generation
        passes = pass_numbers(plan, phase, places, len(self.run.pool_of(phase)))
        self.history.add(outcomes, passes)

    def end_step(self) -> Phase:
        """End an optimizer step; returns its phase, which may have ended with it.

        Phases end early by `plateau_patience` or `compute_budget`.
        """
        self.counters.meter.add_step(mean_completion_lengths(self.trainer))
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
            return "the reward has stopped improving"
        if not self.budget.is_limited(self.run.plan, phase):
            return None
        is_spent = self.budget.is_spent(self.cost())
        return "compute_budget is spent" if self.ranks.from_main(is_spent) else None

    def _has_plateaued(self, phase: Phase) -> bool:
        """Count the step that was just made; returns whether the stage's reward has reached a plateau."""
        if not self.config.plateau_patience or phase.kind != STAGE:
            return False
        return self.ranks.from_main(self.counters.plateau.add(last_reward(self.trainer)))

    def cost(self) -> Cost:
        """The cost of training in the phase so far."""
        cost = self.counters.meter.cost(
            tokens_seen(self.trainer),
            passes=self.trainer.num_iterations,
            forwards=extra_forwards(self.trainer),
        )
        return self.additions.corrected(cost)

    def notes(self, phase: Phase) -> list[Note]:
        """Return the notes of a phase that has just ended; collective, and equal on all ranks."""
        training = self._training(phase)
        logger.info("%s: %s", phase.name, training_line(training))
        notes = self.phase_end.notes(phase)
        for note in notes:
            if isinstance(note, RolloutsNote) and note.shares:
                self._log_categories(phase, note)
        self.show_prompts()
        return [training, *notes]

    def _log_categories(self, phase: Phase, note: RolloutsNote) -> None:
        """Send the categories that a phase has trained on to log and trackers; collective over all ranks."""
        if self.ranks.is_main:
            warn_of_narrow(phase.name, note.shares, BROADER_ORDER)
        log_apart(self.trainer, trained_metrics(note))
        self.tables.show_trained(phase.name, note.shares)

    def show_prompts(self) -> None:
        """Send the prompts that the current phase has rolled out to the trackers, if its order is by outcomes."""
        step = self.trainer.state.global_step
        phase = self.run.plan.phase_at(max(0, step - 1))
        orders_by_outcomes = self.order.order_of(phase) not in ("shuffled", "trainer")
        if self.ranks.is_main and orders_by_outcomes and step != self._shown_at:
            self._shown_at = step
            outcomes = self.history.outcomes().of_phase(phase.name)
            self.tables.show_rolled_out(phase.name, outcomes, self.trainer.train_dataset)

    def _training(self, phase: Phase) -> TrainingNote:
        trainer = self.trainer
        logged = [
            entry for entry in trainer.state.log_history if phase.start < entry["step"] <= phase.end
        ]
        # TRL logs None if no reward function could judge any completion.
        rewards = [entry["reward"] for entry in logged if entry.get("reward") is not None]
        cost = self.cost()
        return TrainingNote(
            step=trainer.state.global_step,
            steps=phase.steps,
            reward=float(np.mean(rewards)) if rewards else None,
            training_seconds=cost.seconds,
            cost=cost,
        )
