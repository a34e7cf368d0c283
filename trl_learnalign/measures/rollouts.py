"""Rollout statistics, and with them gradient features: rollouts are made once and let go after their gradient."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trl_learnalign import hashing, scoring
from trl_learnalign import trainer_bridge as bridge
from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.distributed import Ranks
from trl_learnalign.gradients.features import FeatureEngine
from trl_learnalign.gradients.sketch import Projection, make_projection
from trl_learnalign.measures.runner import FEATURES, FIRST_HALF, ROWS, Measure
from trl_learnalign.measures.self_check import SelfCheck
from trl_learnalign.progress import Tally
from trl_learnalign.rollouts import RolloutGroup, roll_out, threshold_problem
from trl_learnalign.samples import TEXTS, kept_texts

if TYPE_CHECKING:
    from trl import GRPOTrainer

logger = logging.getLogger(__name__)


class RolloutMeasure(Measure):
    """`G` rollouts of each prompt: successes, rewards and lengths, and the prompt tokens that they read.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        config (`LearnAlignConfig`): Settings.
        ranks (`Ranks`): The processes.
        phase (`str`): `Phase.name`, part of the seeds.
        success_index (`int`): Which reward function decides success.
        rollout_prompts (`int`): Prompts of one generation call.
        dataset (`datasets.Dataset`, *optional*): Where the prompts are; default: the training dataset.
    """

    name = "rollouts"
    small: tuple[str, ...] = ("successes", "lengths", "rewards", "prompt_tokens")

    def __init__(
        self,
        trainer: GRPOTrainer,
        config: LearnAlignConfig,
        ranks: Ranks,
        phase: str,
        success_index: int,
        rollout_prompts: int,
        dataset: Any = None,
    ):
        self.trainer = trainer
        self.config = config
        self.ranks = ranks
        self.phase = phase
        self.success_index = success_index
        self.rollout_prompts = rollout_prompts
        self.dataset = trainer.train_dataset if dataset is None else dataset
        self._looked_at_rewards = False

    def fingerprint(self) -> dict[str, Any]:  # noqa: D102
        return {
            "sampling": bridge.sampling_settings(self.trainer),
            "rollouts": self.trainer.num_generations,
            "success": [self.trainer.reward_func_names[self.success_index], self.config.success_threshold],
            "rollout_prompts": self.rollout_prompts,
            "selection_seed": self.config.selection_seed,
            "phase": self.phase,
        }

    def calls(self, prompts: np.ndarray) -> int:  # noqa: D102
        return math.ceil(len(prompts) / self.rollout_prompts)

    @contextmanager
    def session(self) -> Iterator[None]:  # noqa: D102
        with bridge.left_as_found(self.trainer):
            yield

    def measure(self, number: int, prompts: np.ndarray, calls: int, keep: bool) -> dict[str, torch.Tensor]:  # noqa: D102
        groups = self.roll_out(number, prompts, calls)
        return {**_statistics(groups), **self.texts(groups)}

    def roll_out(self, number: int, prompts: np.ndarray, calls: int) -> list[RolloutGroup]:
        """The rollout groups of a shard."""
        size = self.rollout_prompts
        # Every call has the same number of prompts (TRL gathers across ranks): the last ones repeat the first.
        padded = np.resize(prompts, calls * size)
        groups: list[RolloutGroup] = []
        for call in range(calls):
            seed = hashing.key(self.config.selection_seed, "rollouts", self.phase, number, call) % 2**32
            chunk = padded[call * size : (call + 1) * size].tolist()
            groups += roll_out(
                self.trainer, chunk, seed, self.success_index, self.config.success_threshold, self.dataset
            )
        self._look_at_rewards(groups)
        return groups[: len(prompts)]

    def _look_at_rewards(self, groups: list[RolloutGroup]) -> None:
        """After the first shard, before the whole pool is rolled out in vain: can the threshold be met?"""
        if self._looked_at_rewards:
            return
        self._looked_at_rewards = True
        rewards = torch.stack([group.rewards[:, self.success_index] for group in groups])
        name = self.trainer.reward_func_names[self.success_index]
        said = threshold_problem(rewards, self.config.success_threshold, name)
        if said is not None:
            logger.warning("%s, the first %d prompts: %s", self.phase, len(groups), said)

    def texts(self, groups: list[RolloutGroup]) -> dict[str, torch.Tensor]:
        """A few rollouts of each prompt to look at."""
        if not self.config.keep_rollouts:
            return {}
        tokenizer = bridge.tokenizer(self.trainer)
        return {
            TEXTS: kept_texts(
                groups, self.config.keep_rollouts, lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
            )
        }

    def tally(self, prompts: int, result: Mapping[str, torch.Tensor]) -> Tally:  # noqa: D102
        successes = result["successes"]
        return Tally(prompts, successes.numel(), int((scoring.learnability(successes) > 0).sum()))


class GradientMeasure(RolloutMeasure):
    """Rollouts and the projected gradients of their objective.

    Args:
        only_learnable (`bool`): Capture the prompts with learnability above 0 only; else all that have a gradient.
    """

    small: tuple[str, ...] = (*RolloutMeasure.small, "finite", "tokens_captured")

    def __init__(self, *arguments: Any, only_learnable: bool):
        super().__init__(*arguments)
        self.only_learnable = only_learnable
        self.name = "gradients" if only_learnable else "gradients_all"
        self.projection: Projection = make_projection(
            self.config.projection,
            self.config.feature_dim,
            self.config.selection_seed,
            self.config.capture_rank,
            bridge.trainable_sizes(self.trainer),
        )
        self.coverage: dict[str, Any] = {}
        self.self_check: dict[str, Any] = {}
        self._engine: FeatureEngine | None = None
        self._check: SelfCheck | None = None

    def fingerprint(self) -> dict[str, Any]:  # noqa: D102
        return {
            **super().fingerprint(),
            "objective": bridge.objective_settings(self.trainer),
            "projection": self.projection.version,
            "gradient_rollouts": self.config.gradient_rollouts,
            **({"halves": True} if self.config.reliability else {}),
        }

    @contextmanager
    def session(self) -> Iterator[None]:  # noqa: D102
        with super().session(), bridge.gradient_capture(self.trainer, self.projection) as capture:
            parts = 2 if self.config.reliability else 1
            self._engine = FeatureEngine(self.trainer, capture, self.config.capture_tokens, self.ranks.most, parts)
            self._check = SelfCheck(self.trainer, self._engine, self.ranks) if self.config.self_check else None
            try:
                yield
                self.self_check = self._check.summary if self._check else {"not_checked": "self_check is off"}
            finally:
                self._engine = self._check = None
            self.coverage = capture.coverage.summary()
            self._warn_of_gaps()

    def _warn_of_gaps(self) -> None:
        if self.coverage["missing"]:
            logger.warning(
                "No layer rule captures %s: %.2f %% of the trainable entries are missing from the gradient features. "
                "Their modules: see docs/adding_a_layer_rule.md.",
                *(self.coverage["missing"], 100 * (1 - self.coverage["share"])),
            )
        if self.coverage["direct"]:
            logger.warning(
                "No layer rule captures %s: autograd does, one prompt at a time, which is slower.",
                self.coverage["direct"],
            )

    def measure(self, number: int, prompts: np.ndarray, calls: int, keep: bool) -> dict[str, torch.Tensor]:  # noqa: D102
        assert self._engine is not None
        groups = self.roll_out(number, prompts, calls)
        captured = [i for i, group in enumerate(groups) if keep and self._needs_gradient(group)]
        shown = [self._shown(groups[i]) for i in captured]
        features, halves = self._features(shown)
        while self._check is not None and self._check(shown, features, groups[0]):
            features, halves = self._features(shown)
        finite = torch.ones(len(groups), dtype=torch.bool)
        finite[captured] = torch.isfinite(features).all(dim=1)
        if not finite.all():
            bad = [group.prompt for group, is_finite in zip(groups, finite.tolist(), strict=True) if not is_finite]
            logger.warning("The gradients of prompts %s (rows of the dataset) are not finite; they score 0.", bad)
        tokens = torch.zeros(len(groups), dtype=torch.int64)
        tokens[captured] = torch.tensor([group.tokens * group.rollouts for group in shown], dtype=torch.int64)
        return {
            **_statistics(groups),
            **self.texts(groups),
            "finite": finite,
            "tokens_captured": tokens,
            ROWS: torch.tensor(captured, dtype=torch.int64),
            FEATURES: features,
            **halves,
        }

    def _features(self, groups: list[RolloutGroup]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Features, and with `reliability` those of the first half of the rollouts."""
        assert self._engine is not None
        features = self._engine.features(groups)
        if not self.config.reliability:
            return features, {}
        return features.sum(dim=1), {FIRST_HALF: features[:, 0]}

    def _shown(self, group: RolloutGroup) -> RolloutGroup:
        """The rollouts that the gradient is taken of."""
        if self.config.gradient_rollouts == "all":
            return group
        return group.only(int(_trainable_successes(group)[0]))

    def _needs_gradient(self, group: RolloutGroup) -> bool:
        if self.config.gradient_rollouts == "one_correct" and not len(_trainable_successes(group)):
            return False
        if not group.lengths.any():  # the trainer has masked all of it away
            return False
        if self.only_learnable:
            return bool(scoring.learnability(group.successes.unsqueeze(0))[0] > 0)
        # Without advantages only the KL and entropy terms have a gradient.
        return bool(group.inputs["advantages"].any()) or bridge.has_regulariser(self.trainer)


def _trainable_successes(group: RolloutGroup) -> torch.Tensor:
    """Numbers of the successful rollouts that the trainer has not masked away altogether."""
    return ((group.successes == 1) & (group.lengths > 0)).nonzero().flatten()


def _statistics(groups: list[RolloutGroup]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([getattr(group, name) for group in groups]) for name in RolloutMeasure.small}
