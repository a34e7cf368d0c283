"""What a run will take, counted from its plan before any model is loaded.

All counts are upper bounds: stages may end early (`plateau_patience`, `when_short="shrink"`), completions may end
before `max_completion_length`, and prompts with learnability 0 need no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.curriculum import STAGE, Geometry, Phase, Plan
from trl_learnalign.selectors import GRADIENTS, HIDDEN, LIKELIHOODS, RATINGS, ROLLOUTS, Selector

BYTES = 4  # features are kept in float32

# Forward passes, in units of one forward pass over a completion: sampling it, and one update on it (forward, and
# backward at twice the cost). Gradient capture costs about as much as an update.
_SAMPLE, _UPDATE = 1, 3


@dataclass(frozen=True)
class PhaseForecast:
    """What one phase takes, over all processes.

    Args:
        name (`str`): `Phase.name`.
        prompts (`int`): Prompts of its pool.
        passes (`int`): Passes over them.
        start (`int`): First optimizer step.
        steps (`int`): Optimizer steps.
        training_rollouts (`int`): Rollouts that are trained on.
        candidates (`int`): Prompts that it is chosen from; 0 for the warm-up.
        measured (`int`): Candidates that are measured; 0 where nothing is.
        scoring_rollouts (`int`): Rollouts of the measured ones.
        captured_rollouts (`int`): Those whose gradients are captured, if every prompt is learnable.
        feature_bytes (`int`, *optional*): Disk for their features, `None` if it depends on the model.
    """

    name: str
    prompts: int
    passes: int
    start: int
    steps: int
    training_rollouts: int
    candidates: int = 0
    measured: int = 0
    scoring_rollouts: int = 0
    captured_rollouts: int = 0
    feature_bytes: int | None = 0


@dataclass(frozen=True)
class Forecast:
    """What a run takes.

    Args:
        phases (`tuple[PhaseForecast]`): In order.
        max_completion_length (`int`): Most tokens of a completion.
        iterations (`int`): Updates on each trained rollout (`num_iterations`).
        reference (`bool`): Whether the objective has a KL term, whose reference model adds a forward pass.
        held_out (`int`): Completions of each evaluation.
        completions_per_step (`int`): Completions of one optimizer step, over all processes; 0 if not known.
    """

    phases: tuple[PhaseForecast, ...]
    max_completion_length: int
    iterations: int = 1
    reference: bool = False
    held_out: int = 0
    completions_per_step: int = 0

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return sum(phase.steps for phase in self.phases)

    @property
    def training_rollouts(self) -> int:
        """Rollouts that are trained on."""
        return sum(phase.training_rollouts for phase in self.phases)

    @property
    def scoring_rollouts(self) -> int:
        """Rollouts that are made to score."""
        return sum(phase.scoring_rollouts for phase in self.phases)

    @property
    def evaluation_rollouts(self) -> int:
        """Held-out completions: before the first phase and after each."""
        return self.held_out * (len(self.phases) + 1) if self.held_out else 0

    @property
    def max_completion_tokens(self) -> int:
        """Most completion tokens of the run."""
        rollouts = self.training_rollouts + self.scoring_rollouts + self.evaluation_rollouts
        return rollouts * self.max_completion_length

    @property
    def feature_bytes(self) -> int | None:
        """Disk for the features of all stages; they are kept."""
        sizes = [phase.feature_bytes for phase in self.phases]
        return None if None in sizes else sum(size or 0 for size in sizes)

    def scoring_share(self, learnable: float) -> float:
        """Scoring's share of the compute of training and scoring.

        Counted in forward passes over completions of one length: 1 to sample, 3 for an update (and for a capture),
        1 more for the reference model of a KL term. In wall time sampling weighs more than its share, so the share of
        time lies nearer to that of the rollouts.

        Args:
            learnable (`float`): Share of the measured prompts that gradients are captured of, from 0 to 1.
        """
        update = _UPDATE + self.reference
        training = self.training_rollouts * (_SAMPLE + self.iterations * update)
        captured = learnable * sum(phase.captured_rollouts for phase in self.phases)
        scoring = self.scoring_rollouts * _SAMPLE + captured * update
        return scoring / (scoring + training) if scoring else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, totals included."""
        totals = {
            "steps": self.steps,
            "completions_per_step": self.completions_per_step,
            "training_rollouts": self.training_rollouts,
            "scoring_rollouts": self.scoring_rollouts,
            "evaluation_rollouts": self.evaluation_rollouts,
            "max_completion_tokens": self.max_completion_tokens,
            "scoring_share_of_rollouts": self.scoring_rollouts
            / (self.scoring_rollouts + self.training_rollouts),
            "scoring_share_of_compute": [self.scoring_share(0.0), self.scoring_share(1.0)],
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
) -> Forecast:
    """Count what a plan takes.

    Args:
        plan (`Plan`): The plan.
        config (`LearnAlignConfig`): Its settings.
        selectors (sequence of `Selector`): One for each stage; they say what is measured.
        max_completion_length (`int`): `GRPOConfig.max_completion_length`.
        iterations (`int`, *optional*, defaults to `1`): `GRPOConfig.num_iterations`.
        beta (`float`, *optional*, defaults to `0.0`): `GRPOConfig.beta`.
        held_out (`int`, *optional*, defaults to `0`): Held-out problems.
        completions_per_step (`int`, *optional*, defaults to `0`): Completions of one optimizer step, over all
            processes.
    """
    phases, taken = [], 0
    needs = iter([selector.needs for selector in selectors])
    for phase in plan.phases:
        if phase.kind == STAGE:
            candidates = plan.dataset_size - (taken if config.reselect == "remaining" else 0)
            phases.append(_forecast(phase, candidates, plan.geometry, config, next(needs)))
            taken += phase.size
        else:
            phases.append(_forecast(phase, 0, plan.geometry, config, frozenset()))
    return Forecast(
        tuple(phases),
        max_completion_length,
        iterations,
        beta != 0.0,
        held_out,
        completions_per_step,
    )


def _forecast(
    phase: Phase,
    candidates: int,
    geometry: Geometry,
    config: LearnAlignConfig,
    needs: frozenset[str],
) -> PhaseForecast:
    forced = config.skip_forced_scoring and candidates <= phase.size
    measured = 0
    if needs & {ROLLOUTS, GRADIENTS, LIKELIHOODS, RATINGS, HIDDEN} and not forced:
        measured = min(candidates, config.pool_sample or candidates)
    rollouts = measured * geometry.rollouts if needs & {ROLLOUTS, GRADIENTS} else 0
    features: int | None = 0
    if measured and GRADIENTS in needs:
        features = None if config.projection == "none" else measured * config.feature_dim * BYTES
    elif measured and HIDDEN in needs:
        features = None
    captured = rollouts if GRADIENTS in needs else 0
    if config.gradient_rollouts == "one_correct":
        captured //= geometry.rollouts
    return PhaseForecast(
        name=phase.name,
        prompts=phase.size,
        passes=phase.passes,
        start=phase.start,
        steps=phase.steps,
        training_rollouts=phase.steps
        // geometry.unit_steps
        * geometry.unit_prompts
        * geometry.rollouts,
        candidates=candidates,
        measured=measured,
        scoring_rollouts=rollouts,
        captured_rollouts=captured,
        feature_bytes=features,
    )
