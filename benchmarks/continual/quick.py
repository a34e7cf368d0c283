"""The quick driver: one cell of the continual table with the loop of `continual.loop.py`."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from selection.cells import PUBLISHED_BASE, Settings, tasks

from continual.cells import Curve, Line, Spent
from continual.loop import Policy, Rollouts, group_advantages
from trl_learnalign import plan, rng
from trl_learnalign.adaptive import Outcomes
from trl_learnalign.adaptive.baseline import BeliefBaseline
from trl_learnalign.adaptive.belief import Belief, area_under_curve, brier_score, prompt_features
from trl_learnalign.adaptive.order import AdaptiveOrder, expected_gain
from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.success import SuccessRule

STAGE = "stage_1"

PRODUCT = "continual.product:CallbackDriver"
"""The driver that trains with the package's callback."""


def most_worthwhile(
    right: np.ndarray, wrong: np.ndarray, count: int, headroom: float
) -> np.ndarray:
    """Places of the groups to train on after oversampling, `(count,)`: those of the largest worth that was seen."""
    rates = right / np.maximum(right + wrong, 1)
    # A group without wrong rollouts, or without any that could be judged, is worth nothing.
    worth = np.where(wrong > 0, expected_gain(rates, headroom), 0.0)
    return np.sort(np.argsort(-worth, kind="stable")[:count])


class QuickDriver:
    """Trains cells with the written-out loop.

    Args:
        settings (`Settings`): Of the selection table.
        model (`Path`, *optional*): The base model; default: the published one.
    """

    policy: type[Policy] = Policy

    def __init__(self, settings: Settings, model: Path = PUBLISHED_BASE):
        self.settings = settings
        self.model = model

    def __call__(
        self, regime: str, seed: int, line: Line, budgets: Mapping[float, float], split: str
    ) -> Curve:
        """As [`continual.cells.Driver`].

        Raises:
            `ValueError`: For a line that selects.
        """
        if line.selector is not None:
            raise ValueError(
                f"The quick driver does not select ({line.selector}): --driver {PRODUCT}."
            )
        started = time.process_time()
        settings = line.applied(self.settings)
        policy = self.policy(self.model, settings.learning_rate, seed)
        run = self.begun(settings, policy, regime, seed, line)
        held_out = Problems(policy, tasks(regime, settings.held_out, 0, split))
        curve = Curve(budgets)
        step = 0
        while not curve.finished:
            run.step(step)
            step += 1
            if curve.due(run.spent):
                curve.add(step, run.spent, run.policy.accuracy(held_out.prompts, held_out.answers))
        curve.groups, curve.useful = run.groups, run.useful
        curve.notes = {**run.notes(), "cpu_seconds": time.process_time() - started}
        return curve

    def begun(self, settings: Settings, policy: Policy, regime: str, seed: int, line: Line) -> Run:
        """A run before its first step."""
        return Run(settings, policy, regime, seed, line)


@dataclass(frozen=True)
class Problems:
    """Tasks as the loop takes them."""

    policy: Policy
    dataset: Dataset

    @cached_property
    def prompts(self) -> list[list[int]]:
        """Token lists."""
        return self.policy.tokens_of(self.dataset)

    @cached_property
    def answers(self) -> list[str]:
        """The right answers."""
        return list(self.dataset["answer"])


class Run:
    """One training run of a line; a step is one optimizer step.

    Args:
        settings (`Settings`): Of the selection table.
        policy (`Policy`): What is trained.
        regime (`str`): Mixture of the pool.
        seed (`int`): Seed of pool and order.
        line (`Line`): How prompts are chosen.
    """

    def __init__(self, settings: Settings, policy: Policy, regime: str, seed: int, line: Line):
        self.settings, self.policy, self.line, self.seed = settings, policy, line, seed
        self.problems = Problems(policy, tasks(regime, settings.pool, seed, "train"))
        self.everything = np.arange(settings.pool)
        self.spent = Spent()
        self.groups = self.useful = self.position = 0
        self.chooser = None if line.adaptive is None else self._chooser(line.adaptive)
        self.predicted: list[np.ndarray] = []
        self.seen: list[np.ndarray] = []

    def _chooser(self, adaptive: LearnAlignConfig) -> tuple[Belief, AdaptiveOrder]:
        features = np.empty((len(self.everything), 0))
        if self.line.features:
            features = self._features(adaptive.adaptive_feature_dim)
        count = math.ceil(self.line.oversampling * self.settings.prompts_per_step)
        order = AdaptiveOrder(self.everything, count, adaptive, self.seed, STAGE)
        return Belief(features, adaptive), order

    def _features(self, dimensions: int) -> np.ndarray:
        """Features of the pool, `(n, D)`."""
        return prompt_features(self.policy.embed(self.problems.prompts).numpy(), dimensions)

    def step(self, number: int) -> None:
        """Roll out and train."""
        advantages = None
        if self.line.batches > 1:
            rollouts = self._filled(number)
        else:
            rollouts, advantages = self._chosen(number)
        if advantages is None:
            advantages = group_advantages(rollouts.rewards)
        charged = (advantages != 0) | (not self.line.skip)
        self.spent.trained += int(rollouts.row_tokens[charged].sum())
        self.policy.update(rollouts, advantages)

    def _chosen(self, number: int) -> tuple[Rollouts, torch.Tensor | None]:
        """The groups of a step, as many as are trained on, and their advantages if these are not GRPO's."""
        wanted = self.settings.prompts_per_step
        if self.chooser is None:
            return self._roll_out(self._next_of_pool(), number), None
        belief, order = self.chooser
        rollouts = self._roll_out(order.draw(belief, number), number)
        advantages = self._against(belief, order.config, rollouts, number)
        outcomes = self._outcomes(rollouts, order.config, number)
        before = belief.record(outcomes, number)
        self.predicted.append(before.success_rate)
        self.seen.append(outcomes.right[np.argsort(rollouts.rows)])
        if len(outcomes) == wanted:
            return rollouts, advantages
        places = most_worthwhile(
            outcomes.right, outcomes.wrong, wanted, order.config.adaptive_gain_exponent
        )
        return rollouts.select(places), None if advantages is None else advantages[places]

    def _outcomes(self, rollouts: Rollouts, config: LearnAlignConfig, number: int) -> Outcomes:
        """What the belief sees: right or wrong, or fractions with `success_range`."""
        bounds = None if config.success_range is None else (0.0, 1.0)
        rule = SuccessRule(0, "reward", config.success_threshold, bounds)
        found = rule.of_its_rewards(rollouts.rewards).numpy()
        right = found.sum(axis=1)
        return Outcomes.at(
            number,
            rollouts.rows,
            right,
            self.settings.rollouts - right,
            partial=(found * (1 - found)).sum(axis=1),
            tokens=np.stack([rollouts.read, rollouts.generated], axis=1) / self.settings.rollouts,
        )

    def _against(
        self, belief: Belief, config: LearnAlignConfig, rollouts: Rollouts, number: int
    ) -> torch.Tensor | None:
        """Advantages against the belief, `(P, G)`, if it is the baseline."""
        if config.baseline == "group":
            return None
        baseline = BeliefBaseline(
            success=0,
            weights=np.ones(1),
            scaled=True,
            scaled_each=False,
            share=config.baseline_share,
            roulette=config.baseline_pruning == "roulette",
        )
        rewards, prior = rollouts.rewards.numpy(), belief.posterior(rollouts.rows, number)
        stream = rng.key(self.seed, "roulette", number)
        found = baseline.advantages(rewards[..., None], rewards, prior, stream)
        return torch.from_numpy(found.astype(np.float32))

    def _filled(self, number: int) -> Rollouts:
        """Dynamic sampling: batches of the shuffled pool until there are enough groups with a gradient."""
        wanted, parts, count = self.settings.prompts_per_step, [], 0
        for batch in range(self.line.batches):
            rollouts = self._roll_out(self._next_of_pool(), number * self.line.batches + batch)
            useful = np.flatnonzero(rollouts.mixed)
            parts.append(rollouts.select(useful[: wanted - count]))
            count += len(useful)
            if count >= wanted:
                break
        return Rollouts.joined(parts) if count else rollouts

    def _next_of_pool(self) -> np.ndarray:
        size = self.settings.prompts_per_step
        rows = plan.training_order(self.seed, STAGE, self.everything, self.position, size)
        self.position += size
        return rows

    def _roll_out(self, rows: np.ndarray, number: int) -> Rollouts:
        prompts = [self.problems.prompts[row] for row in rows]
        answers = [self.problems.answers[row] for row in rows]
        rollouts = self.policy.roll_out(rows, prompts, answers, self.settings.rollouts, number)
        self.spent.generated += int(rollouts.generated.sum())
        self.spent.read += int(rollouts.read.sum())
        self.groups += len(rows)
        self.useful += int(rollouts.mixed.sum())
        return rollouts

    def notes(self) -> dict[str, float]:
        """How right the belief was, and what it settled on."""
        if self.chooser is None:
            return {}
        belief, _ = self.chooser
        predicted, right = np.concatenate(self.predicted), np.concatenate(self.seen)
        wrong = self.settings.rollouts - right
        return {
            "brier": brier_score(predicted, right, wrong),
            "auc": area_under_curve(predicted, right, wrong),
            "concentration": belief.concentration,
        }
