"""What makes two runs the same, and what a record says of a run from its beginning."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from trl_learnalign import bridge
from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.curriculum import Plan
from trl_learnalign.data.prompts import dataset_digest
from trl_learnalign.measuring import identity
from trl_learnalign.measuring.context import Context, Validation
from trl_learnalign.measuring.rounds import Prior
from trl_learnalign.measuring.stage import StageMeasurer
from trl_learnalign.records.contents import Header, TrainerEntry
from trl_learnalign.training.setup import RunSetup

SELECTION = (
    "stages",
    "selector",
    "learnability",
    "logdet_ridge",
    "scored",
    "zero_learnability",
    "validation_dataset",
)
"""Entries of who ranks the prompts and how many are taken: none of a warmed-up policy's business."""


BELIEF = (
    "adaptive_embeddings",
    "adaptive_dimensions",
    "adaptive_spread",
    "adaptive_drift",
    "adaptive_memory",
    "adaptive_own_memory",
    "adaptive_concentration",
    "adaptive_score_memory",
)
"""Constants of the belief, which a rollout budget is spent by; those of the adaptive order are not among them."""


@dataclasses.dataclass(frozen=True)
class RunIdentity:
    """A run among others.

    Args:
        entries (`dict`): What makes two runs the same, as plain values.
        measured_with (`dict`): Those of them that measurements depend on.
        validation (`Validation`, *optional*): Trusted prompts, with their digest.
    """

    entries: dict[str, Any]
    measured_with: dict[str, Any]
    validation: Validation | None

    @property
    def dataset(self) -> str:
        """Digest of the training dataset."""
        return self.entries["dataset"]

    def measurer(self, context: Context, folder: Path, prior: Prior | None = None) -> StageMeasurer:
        """What measures and ranks candidates in this run.

        Args:
            context (`Context`): The trainer that measures, and how.
            folder (`Path`): The record folder.
            prior (callable, *optional*): What is believed before a step, for a rollout budget.
        """
        return StageMeasurer(
            context=context,
            folder=folder,
            dataset_digest=self.dataset,
            validation=self.validation,
            measured_with=self.measured_with,
            prior=prior,
        )


def identify(setup: RunSetup, config: LearnAlignConfig) -> RunIdentity:
    """The identity of a run with the trainer as it is now; before its first step.

    Args:
        setup (`RunSetup`): What the run is made of.
        config (`LearnAlignConfig`): Settings, as they hold for this run.
    """
    validation = None
    if setup.wants_validation:
        validation = Validation(setup.validation_dataset, dataset_digest(setup.validation_dataset))
    measured_with = identity.measured_with(setup.trainer, setup.code)
    entries = {**_settings(setup, config), **measured_with}
    entries["zero_learnability"] = config.zero_learnability
    if validation is not None:
        entries["validation_dataset"] = validation.digest
    if setup.trains_before_scoring:
        entries["training"] = identity.settings_of(setup.trainer.args, identity.TRAINS)
    return RunIdentity(entries, measured_with, validation)


def _settings(setup: RunSetup, config: LearnAlignConfig) -> dict[str, Any]:
    """What is known before any model is looked at."""
    plan, success = setup.plan, setup.context.success
    entries = {
        "dataset": dataset_digest(setup.trainer.train_dataset),
        "dataset_size": plan.dataset_size,
        "prompts_per_unit": plan.geometry.unit_prompts,
        "steps_per_unit": plan.geometry.unit_steps,
        "rollouts": plan.geometry.rollouts,
        "warmup": [config.warmup_samples, config.warmup_passes, config.after_warmup],
        "stages": [config.stages, config.stage_passes, config.reselect, config.when_short],
        "selector": config.selector,
        "learnability": [config.unbiased_learnability, config.exclude_self],
        "scored": [config.pool_sample, config.gradient_rollouts],
        "success": [success.name, success.threshold],
        "selection_seed": config.selection_seed,
    }
    if config.stage_steps is not None:
        entries["stage_steps"] = config.stage_steps
    if "learnalign_logdet" in config.selectors:
        entries["logdet_ridge"] = config.logdet_ridge
    # Only where they are used: runs without them are those that earlier versions made.
    if config.is_adaptive:
        names = [
            part.name for part in dataclasses.fields(config) if part.name.startswith("adaptive_")
        ]
        entries["order"] = [config.order, {name: getattr(config, name) for name in names}]
    if config.leaves_the_order:
        entries["order"] = config.order
    if config.rollout_budget is not None:
        known = [getattr(config, name) for name in BELIEF]
        spent = [config.rollout_budget, config.budget_rounds, config.budget_focus]
        entries["rollout_budget"] = [*spent, known]
    if config.samples_dynamically:
        entries["sampling_besides"] = [config.oversample, config.max_generation_batches]
    if config.skip_zero_advantages:
        entries["skip_zero_advantages"] = True
    return entries


def of_the_policy(run: RunIdentity, setup: RunSetup, base_weights: str) -> RunIdentity:
    """What makes the warmed-up policy and its pool the same; not who ranks it, and how many are taken.

    Args:
        run (`RunIdentity`): Of the run that warms it up.
        setup (`RunSetup`): What that is made of.
        base_weights (`str`): Digest of the trainable weights before the warm-up.
    """
    kept = {name: value for name, value in run.entries.items() if name not in SELECTION}
    kept |= {
        "base_weights": base_weights,
        "objective": bridge.objective_settings(setup.trainer),
        "sampling": bridge.sampling_settings(setup.trainer),
    }
    return dataclasses.replace(run, entries=kept)


def header(setup: RunSetup, config: LearnAlignConfig, plan: Plan, rollout_prompts: int) -> Header:
    """What a record says from the beginning.

    Args:
        setup (`RunSetup`): What the run is made of.
        config (`LearnAlignConfig`): Settings, as they hold for this run.
        plan (`Plan`): The plan as it stands.
        rollout_prompts (`int`): Prompts of one generation call of scoring, at most.
    """
    trainer, args = setup.trainer, setup.trainer.args
    entry = TrainerEntry(
        model=trainer.model.config.name_or_path,
        reward_funcs=trainer.reward_func_names,
        seed=args.seed,
        learning_rate=args.learning_rate,
        beta=args.beta,
        loss_type=args.loss_type,
        temperature=args.temperature,
        max_completion_length=args.max_completion_length,
        processes=setup.ranks.count,
        distributed_type=str(trainer.accelerator.distributed_type.value),
        rollout_prompts=rollout_prompts,
    )
    return Header(plan=plan, config=dataclasses.asdict(config), trainer=entry)
