"""Rollout statistics and gradient features of candidates; rollouts are deleted after their gradient."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from trl_learnalign import rng, scoring
from trl_learnalign.bridge import inference
from trl_learnalign.bridge.hooks import preserve_trainer_state
from trl_learnalign.bridge.inference import sampling_settings
from trl_learnalign.bridge.objective import has_regulariser, objective_settings
from trl_learnalign.bridge.policy import gradient_capture, trainable_sizes
from trl_learnalign.gradients.projection import Projection, make_projection
from trl_learnalign.measuring.base import FEATURES, FIRST_HALF, ROWS, Context, Measure, Tally
from trl_learnalign.measuring.generation import RolloutGroup, kept_texts, roll_out
from trl_learnalign.measuring.gradient_features import GradientFeaturizer
from trl_learnalign.measuring.self_check import SelfCheck
from trl_learnalign.pool import TEXTS

logger = logging.getLogger(__name__)


class RolloutMeasure(Measure):
    """`G` rollouts of each prompt: successes, rewards, lengths, and the number of prompt tokens read.

    Args:
        context (`Context`): Trainer and options for measuring.
    """

    name = "rollouts"
    small: tuple[str, ...] = ("successes", "lengths", "rewards", "prompt_tokens")

    def __init__(self, context: Context):
        self.context = context
        self.trainer = context.trainer
        self.config = context.config
        self._looked_at_rewards = False

    @override
    def fingerprint(self) -> dict[str, Any]:
        context = self.context
        return {
            "sampling": sampling_settings(self.trainer),
            "rollouts": self.trainer.num_generations,
            "success": context.success.identity,
            "scoring_batch_prompts": context.scoring_batch_prompts,
            "selection_seed": self.config.selection_seed,
            "phase": context.phase,
        }

    @override
    def calls(self, prompts: np.ndarray) -> int:
        return math.ceil(len(prompts) / self.context.scoring_batch_prompts)

    @override
    @contextmanager
    def session(self) -> Iterator[None]:
        with preserve_trainer_state(self.trainer):
            yield

    @override
    def measure(
        self,
        number: int,
        prompts: np.ndarray,
        calls: int,
        keep: bool,
    ) -> dict[str, Tensor]:
        groups = self.roll_out(number, prompts, calls)
        return {**_statistics(groups), **self.texts(groups)}

    def roll_out(self, number: int, prompts: np.ndarray, calls: int) -> list[RolloutGroup]:
        """Return the rollout groups of a shard."""
        context = self.context
        # Every call has the same number of prompts, on all ranks, since TRL gathers across them. The shard is split
        # into equal parts; if the last part is short, it is filled from its beginning.
        size = math.ceil(len(prompts) / self.calls(prompts))
        padded = np.resize(prompts, calls * size)
        groups: list[RolloutGroup] = []
        names = (self.config.selection_seed, "rollouts", context.phase, number)
        for call in range(calls):
            seed = rng.key(*names, call) % 2**32
            chunk = padded[call * size : (call + 1) * size].tolist()
            groups += roll_out(self.trainer, chunk, seed, context.success, context.dataset)
        groups = groups[: len(prompts)]
        self._check_rewards(groups)
        return groups

    def _check_rewards(self, groups: list[RolloutGroup]) -> None:
        """Check after the first shard whether the success threshold can be met, before the whole pool is measured."""
        if self._looked_at_rewards:
            return
        self._looked_at_rewards = True
        rewards, lengths = (
            torch.stack([getattr(group, name) for group in groups])
            for name in ("rewards", "lengths")
        )
        problem = self.context.no_signal(rewards, lengths)
        self.context.warn_once(problem, f"{self.context.phase}, the first {len(groups)} prompts")

    def texts(self, groups: list[RolloutGroup]) -> dict[str, Tensor]:
        """Return the texts of a few rollouts of each prompt."""
        if not self.config.keep_rollout_texts:
            return {}
        tokenizer = inference.tokenizer(self.trainer)
        decode = functools.partial(tokenizer.decode, skip_special_tokens=True)
        return {TEXTS: kept_texts(groups, self.config.keep_rollout_texts, decode)}

    @override
    def tally(self, prompts: int, result: Mapping[str, Tensor]) -> Tally:
        successes = result["successes"]
        learnable_count = int((scoring.learnability(successes) > 0).sum())
        return Tally(prompts, successes.numel(), learnable_count)


class GradientMeasure(RolloutMeasure):
    """Rollouts and the projected gradients of their objective.

    Args:
        context (`Context`): Trainer and options for measuring.
        only_learnable (`bool`): Capture only the prompts with learnability above 0; otherwise all that have a
            gradient.
    """

    small: tuple[str, ...] = (*RolloutMeasure.small, "finite", "tokens_captured")

    def __init__(self, context: Context, only_learnable: bool):
        super().__init__(context)
        self.only_learnable = only_learnable
        self.name = "gradients" if only_learnable else "gradients_all"
        self.projection: Projection = make_projection(
            self.config.projection,
            self.config.feature_dim,
            self.config.selection_seed,
            self.config.capture_rank,
            trainable_sizes(self.trainer),
        )
        self.coverage: dict[str, Any] = {}
        self.self_check: dict[str, Any] = {}
        self._engine: GradientFeaturizer | None = None
        self._check: SelfCheck | None = None

    @override
    def fingerprint(self) -> dict[str, Any]:
        return {
            **super().fingerprint(),
            "objective": objective_settings(self.trainer),
            "projection": self.projection.version,
            "gradient_rollouts": self.config.gradient_rollouts,
            **({"halves": True} if self.config.reliability else {}),
        }

    @override
    @contextmanager
    def session(self) -> Iterator[None]:
        with super().session(), gradient_capture(self.trainer, self.projection) as capture:
            parts = 2 if self.config.reliability else 1
            self._engine = GradientFeaturizer(
                self.trainer,
                capture,
                self.config.capture_max_tokens,
                self.context.ranks.most,
                parts,
            )
            if self.config.check_gradients:
                self._check = SelfCheck(self.trainer, self._engine, self.context.ranks)
            try:
                yield
                self._note_checks(self._engine)
            finally:
                self._engine = self._check = None
            self._warn_of_gaps()

    def _note_checks(self, engine: GradientFeaturizer) -> None:
        self.coverage = engine.capture.coverage.summary()
        if self._check is None:
            self.self_check = {"not_checked": "check_gradients is off"}
        else:
            self.self_check = self._check.summary

    @override
    def checks(self) -> dict[str, Any]:
        if self._engine is not None:
            self._note_checks(self._engine)
        return {"coverage": self.coverage, "self_check": self.self_check}

    @override
    def take_checks(self, checks: Mapping[str, Any]) -> None:
        self.coverage = dict(checks.get("coverage") or {})
        self.self_check = dict(checks.get("self_check") or {})

    def _warn_of_gaps(self) -> None:
        if self.coverage["missing"]:
            logger.warning(
                "No layer rule covers %s: %.2f %% of the trainable parameters are missing from the gradient "
                "features. docs/exactness.md shows how to add a rule for their modules.",
                self.coverage["missing"],
                100 * (1 - self.coverage["share"]),
            )
        if self.coverage["direct"]:
            logger.warning(
                "No layer rule covers %s. Autograd computes these gradients one prompt at a time, which is slower.",
                self.coverage["direct"],
            )

    @override
    def measure(
        self,
        number: int,
        prompts: np.ndarray,
        calls: int,
        keep: bool,
    ) -> dict[str, Tensor]:
        assert self._engine is not None
        groups = self.roll_out(number, prompts, calls)
        if any(group.images for group in groups):
            raise ValueError(
                "Gradients of rollouts with images cannot be captured, and an environment, a tool or a transform "
                "of the dataset has added images. Choose a selector without gradients, e.g. 'learnability', or the "
                "adaptive order (LearnAlignConfig.adaptive())."
            )
        rows = [i for i, group in enumerate(groups) if keep and self._needs_gradient(group)]
        samples = [self._gradient_rollouts(groups[i]) for i in rows]
        features, halves = self._features(samples)
        # Repeated once if the check finds that prompts must not share a pass.
        while self._check is not None and self._check(samples, features, groups[0]):
            features, halves = self._features(samples)
        is_finite = torch.ones(len(groups), dtype=torch.bool)
        is_finite[rows] = torch.isfinite(features).all(dim=1)
        if not is_finite.all():
            prompts_without = [groups[i].prompt for i in (~is_finite).nonzero().flatten().tolist()]
            logger.warning(
                "The gradients of prompts %s (rows of the dataset) are not finite; these prompts get score 0.",
                prompts_without,
            )
        tokens = torch.zeros(len(groups), dtype=torch.int64)
        for i, sample in zip(rows, samples, strict=True):
            tokens[i] = sample.tokens * sample.rollouts
        return {
            **_statistics(groups),
            **self.texts(groups),
            "finite": is_finite,
            "tokens_captured": tokens,
            ROWS: torch.tensor(rows, dtype=torch.int64),
            FEATURES: features,
            **halves,
        }

    def _features(self, groups: list[RolloutGroup]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return features, and with `reliability` those of the first half of the rollouts."""
        assert self._engine is not None
        features = self._engine.features(groups)
        if not self.config.reliability:
            return features, {}
        return features.sum(dim=1), {FIRST_HALF: features[:, 0]}

    def _gradient_rollouts(self, group: RolloutGroup) -> RolloutGroup:
        """Return the rollouts whose gradient is captured."""
        if self.config.gradient_rollouts == "all":
            return group
        return group.only(int(_trainable_successes(group)[0]))

    def _needs_gradient(self, group: RolloutGroup) -> bool:
        if self.config.gradient_rollouts == "one_correct" and not len(_trainable_successes(group)):
            return False
        if not group.lengths.any():  # the trainer has masked all of it
            return False
        if self.only_learnable:
            return bool(scoring.learnability(group.successes.unsqueeze(0))[0] > 0)
        # Without advantages, only the KL and entropy terms have a gradient.
        return bool(group.inputs["advantages"].any()) or has_regulariser(self.trainer)


def _trainable_successes(group: RolloutGroup) -> Tensor:
    """Return the numbers of the successful rollouts that the trainer has not masked completely."""
    return ((group.successes > 0.5) & (group.lengths > 0)).nonzero().flatten()


def _statistics(groups: list[RolloutGroup]) -> dict[str, Tensor]:
    return {
        name: torch.stack([getattr(group, name) for group in groups])
        for name in RolloutMeasure.small
    }
