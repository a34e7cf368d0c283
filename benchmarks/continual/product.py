"""Cells of the continual table as a user would run them: an unmodified `GRPOTrainer` with the package's callback.

What was spent is what the callback's ledger says: warm-up, reading and scoring of prompts included.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from datasets import Dataset
from selection.cells import Settings, graded, published_base_model, tasks, trainer_args
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import GRPOTrainer

from continual.cells import CHOSEN, Curve, Line, Spent
from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.adaptive import Outcomes
from trl_learnalign.records.notes import BeliefNote, Cost, TrainingNote
from trl_learnalign.toy.tasks import accuracy_reward
from trl_learnalign.training.metrics import belief_note

STEPS = 2000
"""More than any budget lasts for: runs are stopped when it is spent, and the learning rate is constant."""


class CallbackDriver:
    """Trains cells with [`LearnAlignCallback`].

    Args:
        settings (`Settings`): Of the selection table.
        model (`Path`, *optional*): The base model; default: the published one.
    """

    def __init__(self, settings: Settings, model: Path | None = None):
        self.settings = settings
        self.model = model or published_base_model()

    def __call__(
        self, regime: str, seed: int, line: Line, budgets: Mapping[float, float], split: str
    ) -> Curve:
        """As [`continual.cells.Driver`]."""
        started = time.process_time()
        settings = line.applied(self.settings)
        curve = Curve(budgets)
        with tempfile.TemporaryDirectory() as folder:
            pool = tasks(regime, settings.pool, seed, "train")
            trainer = self._trainer(settings, pool, folder, seed)
            callback = LearnAlignCallback(trainer, self._config(line, seed))
            held_out = tasks(regime, self.settings.held_out, 0, split)
            trainer.add_callback(callback)
            trainer.add_callback(CurveCallback(trainer, callback, curve, held_out))
            trainer.train()
            outcomes = callback.run.steps.history.outcomes()
        curve.groups, curve.useful = len(outcomes), int(outcomes.useful.sum())
        curve.notes = {"cpu_seconds": time.process_time() - started}
        if callback.run.order.adaptive is not None:
            curve.notes |= self._belief(callback, outcomes)
        return curve

    def _trainer(self, settings: Settings, pool: Dataset, folder: str, seed: int) -> GRPOTrainer:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        trainer = GRPOTrainer(
            model=str(self.model),
            reward_funcs=accuracy_reward,
            args=trainer_args(settings, Path(folder), seed, settings.prompts_per_step, -1),
            train_dataset=pool,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _config(self, line: Line, seed: int) -> LearnAlignConfig:
        options: dict[str, Any] = {"stages": [1.0], "warmup_samples": 0}
        if line.selector is not None:
            settings = self.settings
            options = {
                "selector": line.selector,
                "stages": [round(CHOSEN / Settings().pool * settings.pool)],
                "warmup_samples": settings.warmup,
                "feature_dim": settings.feature_dim,
                "zero_learnability": "by_score",  # the letter of Eq. 9, as in the selection table
            }
        if line.adaptive is not None:
            names = [field.name for field in fields(line.adaptive)]
            options |= {
                name: getattr(line.adaptive, name)
                for name in names
                if name.startswith(("adaptive_", "baseline", "generation_price"))
            }
            options |= {"order": "adaptive"}
            options |= {} if line.features else {"adaptive_embeddings": "none"}
        return LearnAlignConfig(
            **options,
            stage_steps=[STEPS],
            skip_forced_scoring=True,
            skip_zero_advantages=line.skip,
            oversample=line.oversampling,
            max_generation_batches=line.batches,
            selection_seed=seed,
            shard_size=250,
            scoring_batch_prompts=125,
        )

    def _belief(self, callback: LearnAlignCallback, outcomes: Outcomes) -> dict[str, Any]:
        assert callback.run.order.adaptive is not None
        step = callback.trainer.state.global_step
        note: BeliefNote = belief_note(
            step, outcomes, callback.run.order.adaptive.belief.concentration
        )
        names = "predicted", "seen", "brier", "auc", "calibration_error", "concentration"
        return {name: getattr(note, name) for name in names}


class CurveCallback(TrainerCallback):
    """Evaluates where a mark of the budget is passed, and ends the run where all are.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        callback (`LearnAlignCallback`): The callback, which is called before this one.
        curve (`Curve`): What evaluations are noted in.
        held_out (`Dataset`): Tasks that are answered greedily.
    """

    def __init__(
        self, trainer: GRPOTrainer, callback: LearnAlignCallback, curve: Curve, held_out: Dataset
    ):
        self.trainer, self.callback, self.curve, self.held_out = trainer, callback, curve, held_out

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        spent = Spent.of(self.cost_so_far())
        if self.curve.due(spent):
            accuracy = float(graded(self.trainer, self.held_out).mean())
            self.curve.add(state.global_step, spent, accuracy)
        if self.curve.finished:
            control.should_training_stop = True

    def cost_so_far(self) -> Cost:
        """Of everything: phases that have ended, scoring, and the phase that is being trained."""
        callback = self.callback
        total = callback.record.contents.ledger.total
        phase = callback.plan.phase_at(self.trainer.state.global_step - 1)
        if callback.record.get(phase.name, TrainingNote) is None:
            total += callback.run.steps.cost()
        return total
