"""The sampler interface, the two samplers of the package, custom samplers, and the dataloader's indices.

The setting `order="package.module:Class"` names a custom sampler (`docs/samplers.md`).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Sampler

from trl_learnalign import plan, rng
from trl_learnalign.adaptive import Outcomes
from trl_learnalign.adaptive.belief import Belief, CostModel, Posterior, brier_score
from trl_learnalign.adaptive.order import AdaptiveOrder
from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.plan import Geometry, Phase, Plan


class PromptSampler(Protocol):
    """Selects the prompts of a stage that are rolled out next, on the main rank.

    A sampler draws the prompts of a unit before any of the unit is rolled out. A unit is the smallest number of
    generations that makes a whole number of optimizer steps. The sampler observes each generation once its rewards are
    known. A draw must depend only on the constructor's arguments, the step and the outcomes. A resumed run constructs
    the sampler again and replays the recorded outcomes, but not the earlier draws.
    """

    def draw(self, step: int, count: int) -> np.ndarray:
        """Return the prompts to roll out from an optimizer step on.

        Args:
            step (`int`): The step, counted from 0.
            count (`int`): Number of prompts; at most the number of candidates.

        Returns:
            `np.ndarray`: `(count,)` different rows of the dataset, best first. With dynamic sampling, the last ones
                are rolled out only if they are needed.
        """

    def observe(self, outcomes: Outcomes) -> np.ndarray | None:
        """Learn from outcomes.

        Args:
            outcomes ([`Outcomes`]): Rollouts of one step, never earlier than those of previous calls.

        Returns:
            `np.ndarray`, *optional*: The predicted success rate of each prompt, `(P,)` from 0 to 1, for log and
                history.
        """

    def metrics(self) -> dict[str, float]:
        """Return numbers for the trainer's log, after a generation was observed."""


@dataclass(frozen=True)
class SamplerInputs:
    """The constructor argument of a custom sampler, made when its stage begins.

    Args:
        dataset (`datasets.Dataset`): The training dataset, for columns that the sampler may use.
        candidates (`np.ndarray`): Rows that the stage trains on, `(N,)` int64, ascending.
        stage (`str`): Name of the stage, e.g. `"stage_1"`.
        rollouts (`int`): Rollouts of each prompt.
        prompts_per_generation (`int`): Number of prompts that a generation trains on.
        seed (`int`): `LearnAlignConfig.selection_seed`.
        config (`LearnAlignConfig`): All settings.
    """

    dataset: Any
    candidates: np.ndarray
    stage: str
    rollouts: int
    prompts_per_generation: int
    seed: int
    config: LearnAlignConfig


class ShuffledSampler:
    """The prompts of a phase, pass after pass, each pass in its own seeded order; all ranks draw the same.

    Args:
        plan (`Plan`): The current plan.
        phase (`Phase`): The phase.
        pool (`np.ndarray`): Its rows of the dataset, `(N,)`.
        seed (`int`): `LearnAlignConfig.selection_seed`.
    """

    def __init__(self, plan: Plan, phase: Phase, pool: np.ndarray, seed: int):
        self.plan, self.phase, self.pool, self.seed = plan, phase, pool, seed

    def draw(self, step: int, count: int) -> np.ndarray:
        """Return the next prompts of the passes; a prompt may occur twice where two passes meet."""
        start = self.plan.prompts_before(self.phase, step)
        return plan.training_order(self.seed, self.phase.name, self.pool, start, count)

    def spare(self, step: int, drawn: np.ndarray, count: int) -> np.ndarray:
        """Return prompts for dynamic sampling, in a separate order that leaves the passes unchanged.

        The order goes through the whole pool, from one generation to the next. A generation does not get the prompts
        that it has drawn itself, unless the pool has no others.

        Args:
            step (`int`): The first step of the generations.
            drawn (`np.ndarray`): What they have drawn, `(generations, P)`.
            count (`int`): Number of prompts for each of them.

        Returns:
            `np.ndarray`: `(generations, count)`.
        """
        stream = rng.key(self.seed, "more prompts", self.phase.name, step)
        order = rng.permutation(stream, self.pool)
        generations, own = drawn.shape
        starts = count * np.arange(generations)
        # Of so many prompts, `count` at least are not its own.
        candidates = order[(starts[:, np.newaxis] + np.arange(count + own)) % len(order)]
        found = np.empty((generations, count), dtype=np.int64)
        for generation, rows in enumerate(candidates):
            others = rows[~np.isin(rows, drawn[generation])]
            found[generation] = np.resize(others if len(others) else rows, count)
        return found

    def observe(self, outcomes: Outcomes) -> np.ndarray | None:
        """Do nothing: the order is fixed."""
        return None

    def metrics(self) -> dict[str, float]:
        """Return no metrics."""
        return {}


class AdaptiveSampler:
    """Draws prompts by the posterior of their success rates, and updates it with outcomes.

    The belief's generations are *units* (`plan`). A unit's prompts are drawn before any of the unit is rolled out. Its
    outcomes are counted together, before the next unit is drawn. Generation 0 is before the first unit. So the belief
    is a function of the reward history and the stages' scores, and a resumed run rebuilds it from them. All stages
    share one belief.

    Args:
        features (`np.ndarray`): Features of all prompts of the dataset, `(n, D)`.
        config (`LearnAlignConfig`): Settings.
        geometry (`Geometry`): The trainer's batching.
    """

    def __init__(self, features: np.ndarray, config: LearnAlignConfig, geometry: Geometry):
        self.config, self.geometry = config, geometry
        self.belief = Belief(features, config)
        self._pending: dict[int, list[Outcomes]] = {}
        self._orders: dict[str, AdaptiveOrder] = {}
        self._metrics: dict[str, float] = {}
        self.begin_stage("", np.arange(len(features)))

    def begin_stage(self, name: str, pool: np.ndarray) -> None:
        """Draw for a stage from now on.

        Args:
            name (`str`): Its name, part of every seed.
            pool (`np.ndarray`): Its rows of the dataset, `(N,)`; a name always has the same pool.
        """
        self._name, self._pool = name, pool

    def draw(self, step: int, count: int) -> np.ndarray:
        """Return the prompts of the unit that begins with an optimizer step, the largest expected gain first.

        Args:
            step (`int`): The step.
            count (`int`): Number of prompts, constant in a stage; a pool with fewer prompts is repeated.
        """
        return self._draw(self._name, step, count)

    def spare(self, step: int, drawn: np.ndarray, count: int) -> np.ndarray:
        """Return prompts other than those drawn, in a separate order; `(count,)`."""
        others = self._draw(f"{self._name}, more", step, count)
        is_new = ~np.isin(others, drawn)
        return np.resize(others[is_new] if is_new.any() else others, count)

    def _draw(self, name: str, step: int, count: int) -> np.ndarray:
        generation = self._generation(step)
        self._settle(generation)
        if name not in self._orders:
            distinct, seed = min(count, len(self._pool)), self.config.selection_seed
            self._orders[name] = AdaptiveOrder(self._pool, distinct, self.config, seed, name)
        return np.resize(self._orders[name].draw(self.belief, generation), count)

    def observe(self, outcomes: Outcomes) -> np.ndarray:
        """Learn from outcomes once their unit is over; returns the success rates that were predicted, `(P,)`."""
        predicted = self.posterior(outcomes.rows, outcomes.step).success_rate
        self._pending.setdefault(self._generation(outcomes.step), []).append(outcomes)
        self._metrics = prediction_metrics(predicted, outcomes)
        if self.belief.cost is not None:
            self._metrics |= cost_metrics(
                self.belief.cost, outcomes, self._generation(outcomes.step)
            )
        return predicted

    def posterior(self, rows: np.ndarray, step: int) -> Posterior:
        """Return the belief about prompts before the unit that contains an optimizer step."""
        generation = self._generation(step)
        self._settle(generation)
        return self.belief.posterior(rows, generation)

    def observe_scores(self, step: int, scored: Outcomes) -> None:
        """Learn from the scores of a stage, before its first step."""
        self._pending.setdefault(self._generation(step) - 1, []).append(scored)

    def metrics(self) -> dict[str, float]:
        """Return predicted and observed success rates of the generation observed last."""
        return self._metrics

    def before(self, step: int) -> Belief:
        """Return the belief before the unit that begins with an optimizer step."""
        self._settle(self._generation(step))
        return self.belief

    def _generation(self, step: int) -> int:
        return step // self.geometry.unit_steps + 1

    def _settle(self, generation: int) -> None:
        """Count the outcomes of all earlier generations."""
        for past in sorted(number for number in self._pending if number < generation):
            self.belief.record(Outcomes.joined(self._pending.pop(past)), past)


def prediction_metrics(predicted: np.ndarray, outcomes: Outcomes) -> dict[str, float]:
    """Compare predicted and observed success rates of a generation, for the log; empty if no rollout could be judged.

    Args:
        predicted (`np.ndarray`): Predictions for its prompts, `(P,)`.
        outcomes (`Outcomes`): Their outcomes.
    """
    right, wrong, judged = outcomes.right, outcomes.wrong, outcomes.judged
    total = judged.sum()
    if not total:
        return {}
    return {
        "learnalign/predicted_success_rate": float(predicted @ judged / total),
        "learnalign/observed_success_rate": float(right.sum() / total),
        "learnalign/belief_brier": brier_score(predicted, right, wrong),
    }


def cost_metrics(model: CostModel, outcomes: Outcomes, generation: int) -> dict[str, float]:
    """Compare predicted and observed costs of a generation's rollouts, for the log; empty if no length is known.

    Args:
        model (`CostModel`): Before the generation is recorded.
        outcomes (`Outcomes`): Its outcomes.
        generation (`int`): Its number.
    """
    observed = model.observed(outcomes)
    known = observed > 0
    if not known.any():
        return {}
    predicted = model.expected(outcomes.rows[known], generation)
    return {
        "learnalign/predicted_rollout_cost": float(predicted.mean()),
        "learnalign/observed_rollout_cost": float(observed[known].mean()),
    }


def find_sampler(path: str) -> type[PromptSampler]:
    """Import the custom class at `"package.module:Class"`.

    Raises:
        `ValueError`: If it cannot be imported, is not a class, or lacks a method, naming that method.
    """
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"order={path!r}: {module_name} cannot be imported ({error}). Install it or add its folder to "
            "PYTHONPATH."
        ) from error
    found = vars(module).get(attribute)
    if not isinstance(found, type):
        raise ValueError(
            f"order={path!r}: {module_name} has no class {attribute!r}. Name a class with the methods draw, observe "
            "and metrics (docs/samplers.md)."
        )
    missing = [
        name for name in ("draw", "observe", "metrics") if not callable(getattr(found, name, None))
    ]
    if missing:
        raise ValueError(
            f"order={path!r}: the class has no method {', '.join(missing)}. A sampler has draw(step, count), "
            "observe(outcomes) and metrics() (docs/samplers.md)."
        )
    return found


class CheckedSampler:
    """A custom sampler of a stage; its return values are checked.

    Args:
        path (`str`): `"package.module:Class"`.
        inputs (`SamplerInputs`): Its constructor argument.

    Raises:
        `ValueError`: As in [`find_sampler`].
    """

    def __init__(self, path: str, inputs: SamplerInputs):
        self.path, self.inputs = path, inputs
        self.sampler = find_sampler(path)(inputs)  # type: ignore[call-arg]
        self._predicted: dict[str, float] = {}

    def draw(self, step: int, count: int) -> np.ndarray:
        """Return `count` rows, best first; fewer candidates are repeated.

        Raises:
            `ValueError`: If the sampler does not return what was requested.
        """
        candidates = self.inputs.candidates
        wanted = min(count, len(candidates))
        drawn = np.asarray(self.sampler.draw(step, wanted))
        if drawn.shape != (wanted,) or drawn.dtype.kind not in "iu":
            raise self._refused(
                f"an array of shape {drawn.shape} and type {drawn.dtype}",
                f"{wanted} whole numbers, shape ({wanted},)",
            )
        rows, counts = np.unique(drawn, return_counts=True)
        if (foreign := rows[~np.isin(rows, candidates)]).size:
            raise self._refused(
                f"row {foreign[0]}, which is not a candidate", "rows of inputs.candidates"
            )
        if len(rows) < wanted:
            row = rows[counts > 1][0]
            raise self._refused(f"row {row} {counts.max()} times", "each row once")
        return np.resize(drawn.astype(np.int64), count)

    def observe(self, outcomes: Outcomes) -> np.ndarray | None:
        """Pass outcomes to the sampler.

        Raises:
            `ValueError`: If the predictions are not one number from 0 to 1 for each prompt.
        """
        returned = self.sampler.observe(outcomes)
        self._predicted = {}
        if returned is None:
            return None
        predicted = np.asarray(returned, dtype=np.float64)
        if (
            predicted.shape != outcomes.rows.shape
            or not ((predicted >= 0) & (predicted <= 1)).all()
        ):
            raise ValueError(
                f"order={self.path!r}: observe returned {predicted.tolist()!r:.200} for {len(outcomes.rows)} prompts. "
                "Return None, or one success rate from 0 to 1 for each prompt."
            )
        self._predicted = prediction_metrics(predicted, outcomes)
        return predicted

    def metrics(self) -> dict[str, float]:
        """Return the sampler's own metrics, and the quality of its predictions."""
        return {**self._predicted, **self.sampler.metrics()}

    def _refused(self, found: str, wanted: str) -> ValueError:
        return ValueError(f"order={self.path!r}: draw returned {found}. Return {wanted}.")


class CurriculumSampler(Sampler[int]):
    """Yields one virtual epoch of prompt indices, in the layout that TRL's generation batches expect.

    Each micro-step lists the prompts of its generation, every prompt `G` times in a row (TRL's `RepeatSampler`
    layout). The length never changes, since transformers reads it only once.

    Args:
        plan (`Plan`): The run's plan.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self.prompts = np.empty(0, dtype=np.int64)
        self._skipped = 0

    def begin_epoch(self, prompts: np.ndarray, skipped: int = 0) -> None:
        """Set the prompts of the next iteration.

        Args:
            prompts (`np.ndarray`): Rows of the dataset, one generation after the other, `(P,)`.
            skipped (`int`, *optional*, defaults to 0): Micro-steps of the first generations that an earlier epoch has
                already done.
        """
        self.prompts = np.asarray(prompts, dtype=np.int64)
        self._skipped = skipped

    @property
    def _micro_steps(self) -> int:
        return self.plan.epoch_steps * self.plan.geometry.accumulation

    def __iter__(self) -> Iterator[int]:
        if not len(self.prompts):
            raise RuntimeError(
                "CurriculumSampler has no prompts yet: add its LearnAlignCallback to the trainer."
            )
        geometry = self.plan.geometry
        generations = self.prompts.reshape(-1, geometry.prompts_per_generation)
        for micro_step in range(self._skipped, self._skipped + self._micro_steps):
            generation = generations[micro_step // geometry.micro_steps_per_generation]
            yield from np.repeat(generation, geometry.rollouts).tolist()

    def __len__(self) -> int:
        geometry = self.plan.geometry
        return self._micro_steps * geometry.prompts_per_generation * geometry.rollouts
