"""What each step leaves: outcomes of rollouts, costs, and whether the reward has stopped rising."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from trl_learnalign import bridge, curriculum, scoring
from trl_learnalign.curriculum import STAGE, Phase
from trl_learnalign.records.history import HistoryRecorder
from trl_learnalign.records.ledger import TrainingMeter
from trl_learnalign.records.notes import TrainingNote
from trl_learnalign.training.plateau import Plateau
from trl_learnalign.training.run_state import RunState
from trl_learnalign.training.setup import RunSetup
from trl_learnalign.training.states import check_keys


class StepRecorder:
    """Watches the steps of a run.

    Args:
        setup (`RunSetup`): What the run is made of.
        run (`RunState`): Where it stands.
        history (`HistoryRecorder`): Where outcomes go.
    """

    def __init__(self, setup: RunSetup, run: RunState, history: HistoryRecorder):
        self.trainer, self.config, self.success = setup.trainer, setup.config, setup.context.success
        self.ranks = setup.ranks
        self.run = run
        self.history = history
        self.plateau = Plateau(setup.config)
        self.meter = TrainingMeter(setup.trainer.args.generation_batch_size)

    def begin_phase(self) -> None:
        """A phase begins: costs and rewards are counted anew."""
        self.plateau.begin()
        self.meter.begin(bridge.tokens_seen(self.trainer))

    def record_outcomes(self) -> None:
        """Note how often each prompt was solved, if the micro-step just taken began with a new generation."""
        made = bridge.new_generation(self.trainer, self.success.index)
        if made is None:
            return
        micro_step, rewards = made
        plan, geometry = self.run.plan, self.run.plan.geometry
        step = micro_step // geometry.accumulation
        phase = plan.phase_at(step)
        pool = self.run.pool_of(phase)
        generation = (
            micro_step - phase.start * geometry.accumulation
        ) // geometry.micro_steps_per_generation
        places = generation * geometry.prompts_per_generation + np.arange(
            geometry.prompts_per_generation
        )
        seed = self.config.selection_seed
        rows = curriculum.training_order(seed, phase.name, pool, int(places[0]), len(places))
        successes = self.success.of_its_rewards(rewards).view(len(rows), -1)
        passes = curriculum.pass_numbers(plan, phase, places, len(pool))
        self.history.add(phase.name, step, rows, passes, scoring.success_rate(successes).numpy())

    def end_step(self) -> None:
        """An optimizer step has been made."""
        self.record_outcomes()
        self.meter.add_step(bridge.mean_completion_lengths(self.trainer))

    def has_plateaued(self, phase: Phase) -> bool:
        """Count the step that was just made; whether the stage has taught what it can (`plateau_patience`)."""
        if not self.config.plateau_patience or phase.kind != STAGE:
            return False
        return self.ranks.from_main(self.plateau.add(bridge.last_reward(self.trainer)))

    def summary(self, phase: Phase) -> TrainingNote:
        """What a phase that has just ended was."""
        trainer = self.trainer
        logged = [
            entry for entry in trainer.state.log_history if phase.start < entry["step"] <= phase.end
        ]
        # TRL logs None where no reward function could judge a single completion.
        rewards = [entry["reward"] for entry in logged if entry.get("reward") is not None]
        cost = self.meter.cost(
            bridge.tokens_seen(trainer),
            passes=trainer.num_iterations,
            forwards=bridge.extra_forwards(trainer),
        )
        return TrainingNote(
            step=trainer.state.global_step,
            steps=phase.steps,
            reward=float(np.mean(rewards)) if rewards else None,
            training_seconds=cost.seconds,
            cost=cost,
        )

    def state_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"plateau": self.plateau.state_dict(), "meter": self.meter.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from [`state_dict`].

        Raises:
            `ValueError`: If the state is of another version.
        """
        check_keys("the steps", state, ("plateau", "meter"))
        self.meter.load_state_dict(state["meter"])
        if state["plateau"] is not None:  # version 0.1 wrote none before the first stage
            self.plateau.load_state_dict(state["plateau"])
