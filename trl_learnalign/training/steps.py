"""Records outcomes and costs after each step, and ends phases."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from trl_learnalign import rng, scoring
from trl_learnalign.adaptive import Outcomes
from trl_learnalign.adaptive.baseline import BeliefBaseline
from trl_learnalign.adaptive.belief import (
    area_under_curve,
    brier_score,
    calibration_error,
    reliability_bins,
)
from trl_learnalign.adaptive.order import expected_gain
from trl_learnalign.bridge.borrow import log_apart
from trl_learnalign.bridge.dynamic_sampling import DynamicSampler, install_dynamic_sampling
from trl_learnalign.bridge.inference import Advantages, RolledOut, Watch
from trl_learnalign.bridge.logs import TrackerTables
from trl_learnalign.bridge.objective import extra_forwards
from trl_learnalign.bridge.requires import (
    add_metrics,
    cut_share,
    last_reward,
    mean_completion_lengths,
    tokens_seen,
)
from trl_learnalign.bridge.skipping import ZeroAdvantageFilter, install_skipping
from trl_learnalign.data.prompts import prompt_text, prompts_of
from trl_learnalign.diversity import shares_of
from trl_learnalign.measuring.generation import clipped
from trl_learnalign.plan import STAGE, Phase, pass_numbers
from trl_learnalign.records.history import HistoryRecorder
from trl_learnalign.records.notes import (
    BeliefNote,
    CalibrationBin,
    Cost,
    GroupDistribution,
    Note,
    RepeatedPrompt,
    RolloutsNote,
    TrainingMeter,
    TrainingNote,
)
from trl_learnalign.training.epoch_order import EpochOrder
from trl_learnalign.training.metrics import (
    ChoiceTables,
    phase_lines,
    trained_metrics,
    training_line,
    warn_of_narrow,
)
from trl_learnalign.training.setup import RunSetup
from trl_learnalign.training.state import (
    ComputeBudget,
    GroupLook,
    Plateau,
    RewardSanityCheck,
    RunState,
    Tally,
    check_keys,
)

logger = logging.getLogger(__name__)

# ---- Skipping and dynamic sampling ----------------------------------------------------------------------------------

SKIPPING, SAMPLING = "skipping", "sampling"


class RolloutFilters:
    """Skipping and dynamic sampling, where they are enabled and possible.

    Args:
        setup (`RunSetup`): The assembled run.
        more_rows (callable): See `bridge.install_dynamic_sampling`.
        observe (callable): Called with all rollouts, once for each generation.
        advantages (callable, *optional*): Replaces TRL's advantages; see `bridge.Watch`.

    Raises:
        `ValueError`: If dynamic sampling is enabled and not possible, with the remedy.
    """

    def __init__(
        self,
        setup: RunSetup,
        more_rows: Callable[[int, int, int], Any],
        observe: Callable[[RolledOut], None],
        advantages: Advantages | None = None,
    ):
        config, trainer = setup.config, setup.trainer
        self.trainer = trainer
        self.sampler: DynamicSampler | None = None
        self._skipping: ZeroAdvantageFilter | str | None = None
        headroom = config.adaptive_gain_exponent if config.is_adaptive else 0.0
        if config.samples_dynamically:
            self.sampler = install_dynamic_sampling(
                trainer,
                more_rows,
                config.oversample,
                config.max_generation_batches,
                observe,
                lambda rewards: observed_gain(setup.context.success.successes(rewards), headroom),
            )
        else:
            Watch(trainer, observe, advantages)
        if config.skip_zero_advantages:
            self._skipping = install_skipping(trainer)
        self._begun = self._counts()

    @property
    def skipper(self) -> ZeroAdvantageFilter | None:
        """The filter that skips rollouts, if skipping is active."""
        skipping = self._skipping
        return (
            skipping
            if isinstance(skipping, ZeroAdvantageFilter) and skipping.problem is None
            else None
        )

    @property
    def not_skipped(self) -> str | None:
        """Why skipping is enabled but inactive; for some models this is known only after training has begun."""
        skipping = self._skipping
        return skipping.problem if isinstance(skipping, ZeroAdvantageFilter) else skipping

    def begin_phase(self) -> None:
        """Reset the counts at the start of a phase."""
        self._begun = self._counts()

    def corrected(self, cost: Cost) -> Cost:
        """Correct the cost of the phase so far for skipped rollouts and for those of dynamic sampling.

        Args:
            cost (`Cost`): The cost if all rollouts were trained on, and no extra ones were made.
        """
        now, changed = self._counts(), vars(cost).copy()
        if self.sampler is not None:
            for name in ("tokens_generated", "tokens_prompt"):
                changed[name] = now[SAMPLING][name] - self._begun[SAMPLING][name]
            chosen = now[SAMPLING]["tokens_chosen"] - self._begun[SAMPLING]["tokens_chosen"]
            changed["tokens_trained"] = self.trainer.num_iterations * chosen
        if self.skipper is not None:
            trained = now[SKIPPING]["tokens_trained"] - self._begun[SKIPPING]["tokens_trained"]
            changed["tokens_trained"] = trained
        return Cost(**changed)

    def skipped(self) -> dict[str, int]:
        """Tokens of the phase so far: `tokens_given`, `tokens_trained`, `tokens_idle`; empty without skipping."""
        if self.skipper is None:
            return {}
        now, begun = self._counts()[SKIPPING], self._begun[SKIPPING]
        return {name: now[name] - begun[name] for name in now if name.startswith("tokens_")}

    def _counts(self) -> dict[str, dict[str, int]]:
        parts = {SKIPPING: self.skipper, SAMPLING: self.sampler}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def state_dict(self) -> dict[str, Any]:
        """Return the counts so far, and those before the phase, as plain JSON values."""
        return {name: [counts, self._begun[name]] for name, counts in self._counts().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state of [`state_dict`].

        Raises:
            `ValueError`: If other filters were enabled when the state was saved.
        """
        check_keys("skipping and sampling", state, self._counts())
        for name, part in ((SKIPPING, self.skipper), (SAMPLING, self.sampler)):
            if part is not None:
                counts, self._begun[name] = state[name]
                part.load_state_dict(counts)


def observed_gain(successes: torch.Tensor, headroom: float) -> np.ndarray:
    """Return the gain of training on groups of rollouts, `(P,)`: the variance, times the remaining headroom.

    Args:
        successes (`torch.Tensor`): `(P, G)` from 0 to 1, and NaN where a rollout could not be judged.
        headroom (`float`): As in `adaptive.order.expected_gain`.
    """
    rates = scoring.success_rate(successes).nan_to_num(nan=0.0)
    return expected_gain(rates.numpy(), headroom, scoring.learnability(successes).numpy())


class AnyRows:
    """Extra prompts for runs in the trainer's own order: drawn from the whole dataset, seeded by the run's position.

    The trainer's own count of micro-steps restarts when a run is resumed. So the position is the optimizer step, and
    the distance of the generation from the first one that asked for prompts within that step.

    Args:
        setup (`RunSetup`): The assembled run.
    """

    def __init__(self, setup: RunSetup):
        self._trainer = setup.trainer
        self._seed = setup.config.selection_seed
        self._step, self._first_micro_step = -1, 0

    def __call__(self, micro_step: int, start: int, count: int) -> np.ndarray:
        """See `bridge.install_dynamic_sampling`."""
        step = self._trainer.state.global_step
        if step != self._step:
            self._step, self._first_micro_step = step, micro_step
        place = micro_step - self._first_micro_step
        stream = rng.key(self._seed, "more prompts", step, place)
        everything = np.arange(len(self._trainer.train_dataset))
        order = rng.permutation(stream, everything)
        return order[np.arange(start, start + count) % len(order)]


# ---- Advantages against the belief ----------------------------------------------------------------------------------


class BeliefAdvantages:
    """Computes the advantages of a generation against the belief, and logs what the belief explains.

    Args:
        setup (`RunSetup`): The assembled run.
        order (`EpochOrder`): The rolled-out prompts, with the belief about them.
    """

    def __init__(self, setup: RunSetup, order: EpochOrder):
        self.trainer, self.config = setup.trainer, setup.config
        self.success, self.order = setup.context.success, order

    @property
    def _baseline(self) -> BeliefBaseline:
        trainer, config = self.trainer, self.config
        scaled_each = trainer.multi_objective_aggregation == "normalize_then_sum"
        return BeliefBaseline(
            success=self.success.index,
            weights=trainer.reward_weights.double().cpu().numpy(),
            scaled=scaled_each or trainer.scale_rewards != "none",
            scaled_each=scaled_each,
            threshold=config.baseline_threshold,
            roulette=config.baseline_pruning == "roulette",
            scale=self.success.width,
        )

    def __call__(self, micro_step: int, rewards: torch.Tensor) -> torch.Tensor:
        """Return advantages; see `bridge.Watch`. Collective: all ranks get the main rank's predictions."""
        prior, baseline = self.order.posterior_at(micro_step), self._baseline
        outcomes = rewards.double().numpy(), self.success.successes(rewards).numpy()
        explained = baseline.explained(*outcomes, prior)
        if explained is not None:
            names = "learnalign/baseline_explained", "learnalign/group_mean_explained"
            add_metrics(self.trainer, dict(zip(names, explained, strict=True)))
        stream = rng.key(self.config.selection_seed, "roulette", micro_step)
        return torch.from_numpy(baseline.advantages(*outcomes, prior, stream))


# ---- End of a phase -------------------------------------------------------------------------------------------------

REPEATED = 5
"""Number of prompts that are named as rolled out most often."""

CHARACTERS = 500
"""Maximum length of the text of such a prompt."""


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


def belief_note(step: int, outcomes: Outcomes, concentration: float) -> BeliefNote:
    """Return the calibration of the belief in a phase.

    Args:
        step (`int`): Optimizer step at the end of the phase.
        outcomes (`Outcomes`): Its groups of rollouts.
        concentration (`float`): The value in use.
    """
    held = outcomes.predictions
    predicted, right, wrong = held.predicted, held.right, held.wrong
    rollouts = int(held.judged.sum())
    bins = reliability_bins(predicted, right, wrong)
    entries = tuple(
        CalibrationBin(
            low=one.low,
            high=one.high,
            groups=one.prompts,
            rollouts=one.rollouts,
            predicted=_known(one.predicted),
            seen=_known(one.seen),
        )
        for one in bins
    )
    return BeliefNote(
        step=step,
        rollouts=rollouts,
        predicted=float(predicted @ held.judged / rollouts) if rollouts else None,
        seen=float(right.sum() / rollouts) if rollouts else None,
        brier=_known(brier_score(predicted, right, wrong)),
        auc=_known(area_under_curve(predicted, right, wrong)),
        calibration_error=_known(calibration_error(bins)),
        bins=entries,
        concentration=concentration,
    )


def _known(value: float) -> float | None:
    """Replace NaN by `None`, since JSON has no NaN."""
    return None if math.isnan(value) else value


def most_repeated(outcomes: Outcomes, dataset: Any) -> tuple[RepeatedPrompt, ...]:
    """Return the prompts that were rolled out most often, and more than once; ties in the order of rows.

    Args:
        outcomes (`Outcomes`): Groups of rollouts.
        dataset (`datasets.Dataset`): The dataset, with a `prompt` column.
    """
    rows, counts = np.unique(outcomes.rows, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:REPEATED]
    places = [place for place in order.tolist() if counts[place] > 1]
    texts = prompts_of(dataset, rows[places]) if places else []
    found = []
    for place, prompt in zip(places, texts, strict=True):
        rates = outcomes.success_rates[outcomes.rows == rows[place]]
        entry = RepeatedPrompt(
            index=int(rows[place]),
            prompt=clipped(prompt_text(prompt), CHARACTERS),
            times=int(counts[place]),
            first=_known(float(rates[0])),
            last=_known(float(rates[-1])),
        )
        found.append(entry)
    return tuple(found)


# ---- Counters of a phase --------------------------------------------------------------------------------------------


class PhaseCounters:
    """What is counted in the current phase; checkpoints contain it.

    Args:
        setup (`RunSetup`): The assembled run.
        additions (`RolloutFilters`): Skipping and dynamic sampling, which count for themselves.
    """

    def __init__(self, setup: RunSetup, additions: RolloutFilters):
        self.additions = additions
        self.plateau = Plateau(setup.config)
        self.meter = TrainingMeter(setup.trainer.args.generation_batch_size)
        self.tally = Tally()
        self._trainer = setup.trainer
        self._own = ["plateau", "meter", *(["tally"] if setup.config.uses_trainer_order else [])]

    def begin_phase(self) -> None:
        """Reset costs and rewards at the start of a phase."""
        self.plateau.begin()
        self.tally.begin()
        self.meter.begin(tokens_seen(self._trainer))
        self.additions.begin_phase()

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain JSON values."""
        own = {name: getattr(self, name).state_dict() for name in self._own}
        return {**own, **self.additions.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state of [`state_dict`].

        Raises:
            `ValueError`: If the state is of another version.
        """
        additions = {name: part for name, part in state.items() if name not in self._own}
        check_keys("the steps", state, (*self._own, *additions))
        self.additions.load_state_dict(additions)
        for name in self._own:
            getattr(self, name).load_state_dict(state[name])


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
        self._record(rolled_out.micro_step, rows, successes, useful)

    def _record(
        self, micro_step: int, rows: np.ndarray, successes: torch.Tensor, useful: np.ndarray
    ) -> None:
        plan, geometry = self.run.plan, self.run.plan.geometry
        step = micro_step // geometry.accumulation
        phase = plan.phase_at(step)
        right, wrong, partial = scoring.outcome_sums(successes, self.config.is_graded)
        outcomes = Outcomes.at(step, rows, right, wrong, phase.name, useful, partial)
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
