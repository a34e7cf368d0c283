"""Computes the cost of a run from its plan, before a model is loaded.

All counts are upper bounds. Stages may end early (`plateau_patience`, `compute_budget`) or select fewer prompts
(`on_shortfall="shrink"`), which then are candidates of the next stage. Completions may end before
`max_completion_length`, prompts with learnability 0 need no gradient, and `skip_zero_advantages` skips rollouts
without an advantage. Dynamic sampling rolls out until there are enough useful prompts, so its rollouts have two
bounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from trl_learnalign.adaptive.order import budget_size
from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.plan import (
    STAGE,
    Geometry,
    Phase,
    Plan,
    is_scored,
    pass_steps,
)
from trl_learnalign.selectors import (
    GRADIENTS,
    HIDDEN,
    LIKELIHOODS,
    RATINGS,
    ROLLOUTS,
    Selector,
)

if TYPE_CHECKING:
    from trl import GRPOConfig

BYTES = 4  # features are float32

# Cost of one update on a completion (forward, and backward at twice the cost), in forward passes over it. Gradient
# capture costs about as much as an update; sampling costs `generation_price`.
_UPDATE = 3


def with_trainer_length(
    config: LearnAlignConfig, args: GRPOConfig, dataset_size: int
) -> LearnAlignConfig:
    """The settings with the run length from the trainer, if it is left to the trainer; otherwise unchanged."""
    if not (config.uses_trainer_order or config.has_trainers_length):
        return config
    if args.max_steps > 0:
        return replace(config, stage_steps=[args.max_steps], stage_epochs=[1])
    steps = math.ceil(args.num_train_epochs * pass_steps(dataset_size, geometry(args)))
    return replace(config, stage_steps=[max(1, steps)], stage_epochs=[1])


def geometry(args: GRPOConfig) -> Geometry:
    """How the trainer's settings turn prompts into steps."""
    return Geometry(
        prompts_per_generation=args.generation_batch_size // args.num_generations,
        rollouts=args.num_generations,
        micro_steps_per_generation=args.steps_per_generation * args.num_iterations,
        accumulation=args.gradient_accumulation_steps,
    )


@dataclass(frozen=True)
class PhaseForecast:
    """Cost of one phase, over all processes.

    Args:
        name (`str`): `Phase.name`.
        prompts (`int`): Prompts of its pool.
        passes (`int`): Passes over them.
        start (`int`): First optimizer step.
        steps (`int`): Optimizer steps.
        training_rollouts (`int`): Rollouts that are trained on.
        least_rolled_out (`int`): Minimum number of rollouts from which these are chosen: the same number without
            dynamic sampling.
        most_rolled_out (`int`): Maximum number.
        candidates (`int`): Prompts that it selects from; 0 for the warm-up.
        measured (`int`): Candidates that are measured; 0 if none are.
        scoring_rollouts (`int`): Rollouts of the measured candidates.
        captured_rollouts (`int`): Rollouts whose gradients are captured, if every prompt is learnable.
        feature_bytes (`int`, *optional*): Disk space of their features, `None` if it depends on the model.
    """

    name: str
    prompts: int
    passes: int
    start: int
    steps: int
    training_rollouts: int
    least_rolled_out: int
    most_rolled_out: int
    candidates: int = 0
    measured: int = 0
    scoring_rollouts: int = 0
    captured_rollouts: int = 0
    feature_bytes: int | None = 0


@dataclass(frozen=True)
class Forecast:
    """Cost of a run.

    Args:
        phases (`tuple[PhaseForecast]`): In order.
        max_completion_length (`int`): Maximum tokens of a completion.
        iterations (`int`): Updates on each trained rollout (`num_iterations`).
        reference (`bool`): Whether the objective has a KL term, whose reference model adds a forward pass.
        held_out (`int`): Completions of each evaluation.
        completions_per_step (`int`): Completions of one optimizer step, over all processes; 0 if unknown.
        prompts_read (`int`): Prompts that the initial policy reads once, without sampling, for embeddings.
        generation_price (`float`): Forward equivalents of a generated token.
    """

    phases: tuple[PhaseForecast, ...]
    max_completion_length: int
    iterations: int = 1
    reference: bool = False
    held_out: int = 0
    completions_per_step: int = 0
    prompts_read: int = 0
    generation_price: float = 1.0

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return sum(phase.steps for phase in self.phases)

    @property
    def training_rollouts(self) -> int:
        """Rollouts that are trained on."""
        return sum(phase.training_rollouts for phase in self.phases)

    @property
    def least_rolled_out(self) -> int:
        """Minimum number of rollouts for training."""
        return sum(phase.least_rolled_out for phase in self.phases)

    @property
    def most_rolled_out(self) -> int:
        """Maximum number of rollouts for training."""
        return sum(phase.most_rolled_out for phase in self.phases)

    @property
    def scoring_rollouts(self) -> int:
        """Rollouts for scoring."""
        return sum(phase.scoring_rollouts for phase in self.phases)

    @property
    def evaluation_rollouts(self) -> int:
        """Held-out completions: before the first phase and after each."""
        return self.held_out * (len(self.phases) + 1) if self.held_out else 0

    @property
    def max_completion_tokens(self) -> int:
        """Maximum number of completion tokens of the run."""
        rollouts = self.most_rolled_out + self.scoring_rollouts + self.evaluation_rollouts
        return rollouts * self.max_completion_length

    @property
    def feature_bytes(self) -> int | None:
        """Disk space of the features of all stages, which are kept."""
        sizes = [phase.feature_bytes for phase in self.phases]
        return None if None in sizes else sum(size or 0 for size in sizes)

    def scoring_share(self, learnable: float, rolled_out: int | None = None) -> float:
        """Scoring's share of the compute of training and scoring.

        The unit is a forward pass over a completion, all of one length: `generation_price` for sampling, 3 for an
        update (or a capture), 1 more for the reference model of a KL term. Every rollout chosen for training counts as
        trained on; with skipping the share is larger.

        Args:
            learnable (`float`): Share of the measured prompts whose gradients are captured, from 0 to 1.
            rolled_out (`int`, *optional*): Rollouts for training; defaults to the minimum.
        """
        update = _UPDATE + self.reference
        sampled = self.least_rolled_out if rolled_out is None else rolled_out
        training = (
            sampled * self.generation_price + self.training_rollouts * self.iterations * update
        )
        captures = learnable * sum(phase.captured_rollouts for phase in self.phases)
        scoring = self.scoring_rollouts * self.generation_price + captures * update
        return scoring / (scoring + training) if scoring else 0.0

    @property
    def scoring_share_bounds(self) -> tuple[float, float]:
        """Scoring's share if no prompt is learnable and the maximum is rolled out, and for the opposite case."""
        return self.scoring_share(0.0, self.most_rolled_out), self.scoring_share(1.0)

    @property
    def times_plain_rollouts(self) -> tuple[float, float]:
        """Rollouts as a multiple of those of plain GRPO with as many optimizer steps: minimum and maximum."""
        plain = max(1, self.training_rollouts)
        least = self.least_rolled_out + self.scoring_rollouts
        most = self.most_rolled_out + self.scoring_rollouts
        return least / plain, most / plain

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, totals included."""
        rollouts = self.scoring_rollouts + self.least_rolled_out
        totals = {
            "steps": self.steps,
            "completions_per_step": self.completions_per_step,
            "training_rollouts": self.training_rollouts,
            "least_rolled_out": self.least_rolled_out,
            "most_rolled_out": self.most_rolled_out,
            "prompts_read": self.prompts_read,
            "scoring_rollouts": self.scoring_rollouts,
            "evaluation_rollouts": self.evaluation_rollouts,
            "max_completion_tokens": self.max_completion_tokens,
            "times_plain_rollouts": list(self.times_plain_rollouts),
            "scoring_share_of_rollouts": self.scoring_rollouts / rollouts,
            "generation_price": self.generation_price,
            "scoring_share_of_compute": list(self.scoring_share_bounds),
            "feature_bytes": self.feature_bytes,
        }
        return {"phases": [asdict(phase) for phase in self.phases], "totals": totals}


def make_forecast(
    plan: Plan,
    config: LearnAlignConfig,
    selectors: Sequence[Selector],
    *,
    max_completion_length: int,
    iterations: int = 1,
    beta: float = 0.0,
    held_out: int = 0,
    completions_per_step: int = 0,
    processes: int = 1,
) -> Forecast:
    """Compute the cost of a plan.

    Args:
        plan (`Plan`): The plan.
        config (`LearnAlignConfig`): Its settings.
        selectors (sequence of `Selector`): One for each stage; they determine what is measured.
        max_completion_length (`int`): `GRPOConfig.max_completion_length`.
        iterations (`int`, *optional*, defaults to `1`): `GRPOConfig.num_iterations`.
        beta (`float`, *optional*, defaults to `0.0`): `GRPOConfig.beta`.
        held_out (`int`, *optional*, defaults to `0`): Held-out problems.
        completions_per_step (`int`, *optional*, defaults to `0`): Completions of one optimizer step, over all
            processes.
        processes (`int`, *optional*, defaults to `1`): Processes; dynamic sampling pads batches to divide evenly among
            them.
    """
    reads_prompts = config.needs_belief and config.adaptive_embeddings == "hidden"
    return Forecast(
        phases=tuple(_phase_forecasts(plan, config, selectors, processes)),
        max_completion_length=max_completion_length,
        iterations=iterations,
        reference=beta != 0.0,
        held_out=held_out,
        completions_per_step=completions_per_step,
        prompts_read=plan.dataset_size if reads_prompts else 0,
        generation_price=config.generation_price,
    )


def _phase_forecasts(
    plan: Plan,
    config: LearnAlignConfig,
    selectors: Sequence[Selector],
    processes: int,
) -> Iterator[PhaseForecast]:
    remaining = plan.dataset_size
    selector_of = dict(zip(plan.stages, selectors, strict=True))
    for phase in plan.phases:
        rollouts = _training_rollouts(phase, plan.geometry, config, processes)
        candidates, needs = 0, frozenset[str]()
        if phase.kind == STAGE:
            candidates = remaining if config.reselect == "remaining" else plan.dataset_size
            remaining -= _least_taken(phase, plan.geometry, config)
            if is_scored(config, phase.size, candidates, plan.dataset_size):
                needs = selector_of[phase].needs
        yield _forecast(phase, candidates, plan.geometry, config, needs, rollouts)


def _least_taken(phase: Phase, geometry: Geometry, config: LearnAlignConfig) -> int:
    """Minimum number of prompts that a stage selects; the next stage may score the rest."""
    if config.on_shortfall == "fill":
        return phase.size
    return min(phase.size, geometry.prompts_per_generation)


def _training_rollouts(
    phase: Phase, geometry: Geometry, config: LearnAlignConfig, processes: int
) -> tuple[int, int, int]:
    """Rollouts that a phase trains on, and the minimum and maximum that it makes for this."""
    generations = geometry.generations_in(phase.steps)
    prompts = geometry.prompts_per_generation
    extra = config.extra_prompts(prompts)
    even = processes // math.gcd(processes, geometry.rollouts)
    first = prompts + extra + -extra % even
    most = first + (config.max_generation_batches - 1) * prompts
    each = generations * geometry.rollouts
    return each * prompts, each * first, each * most


def scored_prompts(candidates: int, config: LearnAlignConfig, needs: frozenset[str]) -> int:
    """Number of a stage's candidates that are measured.

    Args:
        candidates (`int`): Number of candidates.
        config (`LearnAlignConfig`): With `pool_sample` and `rollout_budget`.
        needs (`frozenset[str]`): The measurements that the selector needs.
    """
    if needs & {ROLLOUTS, GRADIENTS} and config.rollout_budget is not None:
        return budget_size(candidates, config.rollout_budget)
    if needs & {ROLLOUTS, GRADIENTS, LIKELIHOODS, RATINGS, HIDDEN}:
        return min(candidates, config.pool_sample or candidates)
    return 0


def _forecast(
    phase: Phase,
    candidates: int,
    geometry: Geometry,
    config: LearnAlignConfig,
    needs: frozenset[str],
    training_rollouts: tuple[int, int, int],
) -> PhaseForecast:
    prompts = scored_prompts(candidates, config, needs)
    rollouts = prompts * geometry.rollouts if needs & {ROLLOUTS, GRADIENTS} else 0
    feature_bytes: int | None = 0
    if prompts and GRADIENTS in needs:
        feature_bytes = prompts * config.feature_dim * BYTES
        if config.projection == "none":  # the size of the gradient is unknown
            feature_bytes = None
    elif prompts and HIDDEN in needs:
        feature_bytes = None
    captures = rollouts if GRADIENTS in needs else 0
    if config.gradient_rollouts == "one_correct":
        captures //= geometry.rollouts
    return PhaseForecast(
        name=phase.name,
        prompts=phase.size,
        passes=phase.passes,
        start=phase.start,
        steps=phase.steps,
        training_rollouts=training_rollouts[0],
        least_rolled_out=training_rollouts[1],
        most_rolled_out=training_rollouts[2],
        candidates=candidates,
        measured=prompts,
        scoring_rollouts=rollouts,
        captured_rollouts=captures,
        feature_bytes=feature_bytes,
    )
