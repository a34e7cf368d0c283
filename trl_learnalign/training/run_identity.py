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
    "stage_epochs",
    "reselect",
    "on_shortfall",
    "selector",
    "unbiased_learnability",
    "exclude_self",
    "zero_learnability",
    "logdet_ridge",
    "pool_sample",
    "gradient_rollouts",
    "validation_dataset",
)
"""Entries of who ranks the prompts and how many are taken: none of a warmed-up policy's business."""

ALWAYS = (
    "warmup_samples",
    "warmup_epochs",
    "after_warmup",
    *SELECTION[:8],
    "pool_sample",
    "gradient_rollouts",
    "selection_seed",
    "skip_zero_advantages",
)
"""Settings of any run."""

ADAPTIVE = tuple(
    field.name
    for field in dataclasses.fields(LearnAlignConfig)
    if field.name.startswith("adaptive_")
)
"""Settings of an adaptive order."""

BUDGET = ("rollout_budget", "budget_rounds", "budget_exponent")
"""Settings of a rollout budget, beside its belief."""

BELIEF = (
    "adaptive_embeddings",
    "adaptive_feature_dim",
    "adaptive_prior_std",
    "adaptive_drift_std",
    "adaptive_decay",
    "adaptive_prompt_decay",
    "adaptive_concentration",
    "adaptive_concentration_decay",
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
    entries = {**settings_of_run(setup, config), **measured_with, **trainer_settings(setup)}
    if validation is not None:
        entries["validation_dataset"] = validation.digest
    return RunIdentity(entries, measured_with, validation)


def settings_of_run(setup: RunSetup, config: LearnAlignConfig) -> dict[str, Any]:
    """The entries that are settings or the dataset, by the names that a user knows; no model is looked at.

    Args:
        setup (`RunSetup`): What the run is made of.
        config (`LearnAlignConfig`): Settings, as they hold for this run.
    """
    plan, success = setup.plan, setup.context.success
    names = list(ALWAYS)
    # The others only where they are used.
    names += ["stage_steps"] if config.stage_steps is not None else []
    names += ["logdet_ridge"] if "learnalign_logdet" in config.selectors else []
    names += ["order"] if config.goes_by_outcomes or config.leaves_the_order else []
    names += ADAPTIVE if config.is_adaptive else []
    names += [*BUDGET, *BELIEF] if config.rollout_budget is not None else []
    names += ["oversample", "max_generation_batches"] if config.samples_dynamically else []
    return {
        **{name: getattr(config, name) for name in names},
        "dataset": dataset_digest(setup.trainer.train_dataset),
        "dataset_size": plan.dataset_size,
        "prompts_per_unit": plan.geometry.unit_prompts,
        "steps_per_unit": plan.geometry.unit_steps,
        "num_generations": plan.geometry.rollouts,
        "success_reward": success.name,
        "success_threshold": success.threshold,
    }


def trainer_settings(setup: RunSetup) -> dict[str, dict[str, Any]]:
    """The trainer's settings that count, as groups of entries."""
    args = setup.trainer.args
    groups = {"settings": identity.settings_of(args, identity.MEASURES)}
    if setup.trains_before_scoring:
        groups["training"] = identity.settings_of(args, identity.TRAINS)
    return groups


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


def header(
    setup: RunSetup, config: LearnAlignConfig, plan: Plan, scoring_batch_prompts: int
) -> Header:
    """What a record says from the beginning.

    Args:
        setup (`RunSetup`): What the run is made of.
        config (`LearnAlignConfig`): Settings, as they hold for this run.
        plan (`Plan`): The plan as it stands.
        scoring_batch_prompts (`int`): Prompts of one generation call of scoring, at most.
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
        scoring_batch_prompts=scoring_batch_prompts,
    )
    return Header(plan=plan, config=dataclasses.asdict(config), trainer=entry)
