"""The prompts of the current virtual epoch, generation by generation, and advantages against the belief about them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from trl_learnalign import rng
from trl_learnalign.adaptive import Outcomes
from trl_learnalign.adaptive.baseline import BeliefBaseline
from trl_learnalign.adaptive.belief import Belief, Posterior
from trl_learnalign.bridge.requires import add_metrics
from trl_learnalign.diversity import feature_grouping, write_categories
from trl_learnalign.measuring.embeddings import features_of_prompts
from trl_learnalign.plan import STAGE, Phase
from trl_learnalign.records.history import HistoryRecorder
from trl_learnalign.records.notes import BASE, Cost, EmbeddingNote, SelectionNote
from trl_learnalign.records.run_record import RunRecord
from trl_learnalign.rng import digest
from trl_learnalign.training.sampler import (
    AdaptiveSampler,
    CheckedSampler,
    PromptSampler,
    SamplerInputs,
    ShuffledSampler,
)
from trl_learnalign.training.setup import RunIdentity, RunSetup
from trl_learnalign.training.state import RunState

Drawn = tuple[np.ndarray, np.ndarray]
"""Prompts to train on and spare prompts for dynamic sampling, one generation after the other."""


class EpochOrder:
    """Prompts of virtual epochs; every method is collective, and all ranks get the same prompts.

    Args:
        setup (`RunSetup`): The assembled run.
        run (`RunState`): Its state.
        history (`HistoryRecorder`): The rollouts of training, from which samplers that learn are rebuilt.
        features (`np.ndarray`): Features of all prompts of the dataset, `(n, D)`; empty if there is no belief.
    """

    def __init__(
        self, setup: RunSetup, run: RunState, history: HistoryRecorder, features: np.ndarray
    ):
        self.config, self.ranks = setup.config, setup.ranks
        self.run, self.history = run, history
        self.geometry = setup.plan.geometry
        self._setup = setup
        self.groupings = setup.groupings
        """Categories for summaries of rollouts: columns, and clusters on the main rank of a run with features."""
        self._own: CheckedSampler | None = None
        self._features = features
        self._drawn: tuple[str, int] | None = None
        self._first_micro_step = 0
        self._prompts = self._more = np.empty((0, 0), dtype=np.int64)
        self.adaptive: AdaptiveSampler | None = None
        """On the main rank of a run with adaptive order."""
        if self.config.is_adaptive and self.ranks.is_main:
            self.adaptive = self._rebuilt(setup.trainer.state.global_step)
            self._add_clusters(features)

    # ---- Samplers ---------------------------------------------------------------------------------------------------

    def _rebuilt(self, step: int) -> AdaptiveSampler:
        """The sampler with everything learned before an optimizer step; on the main rank."""
        sampler = AdaptiveSampler(self._features, self.config, self.geometry)
        for stage in self.run.plan.stages:
            if stage.start < step and stage.name in self.run.scored:
                sampler.observe_scores(stage.start, self.run.scored[stage.name])
        for outcomes in self.history.generations():
            sampler.observe(outcomes)
        return sampler

    def belief_before(self, step: int) -> Belief:
        """Return the belief before an optimizer step; on the main rank."""
        return self._rebuilt(step).before(step)

    def _add_clusters(self, features: np.ndarray) -> None:
        """Add clusters of the features of an adaptive order as categories."""
        seed = self.config.selection_seed
        clusters = feature_grouping(features, self._setup.trainer.train_dataset, seed)
        if clusters is not None:
            self.groupings = (*self._setup.groupings, clusters)
            write_categories(self._setup.folder, self.groupings)

    def order_of(self, phase: Phase) -> str:
        """Return the order of a phase; a warm-up is shuffled."""
        if phase.kind != STAGE:
            return "shuffled"
        return self.config.order_of(self.run.plan.stages.index(phase))

    def learn_from_scores(self, record: RunRecord, phase: Phase) -> None:
        """Learn from a stage's scores before its first prompts are drawn."""
        if not (self.config.needs_belief or self.config.own_orders) or not self.ranks.is_main:
            return
        for scored in scored_outcomes(record, [phase]):
            self.run.scored[phase.name] = scored
        if self.adaptive is not None and phase.name in self.run.scored:
            self.adaptive.observe_scores(phase.start, self.run.scored[phase.name])

    def observe(self, outcomes: Outcomes) -> np.ndarray | None:
        """Pass outcomes to the samplers; returns the predicted success rates, `(P,)`, if there are any."""
        found = [sampler.observe(outcomes) for sampler in self._learning]
        return next((predicted for predicted in found if predicted is not None), None)

    def metrics(self) -> dict[str, float]:
        """Return the samplers' metrics of the generation observed last."""
        found: dict[str, float] = {}
        for sampler in reversed(self._learning):
            found |= sampler.metrics()
        return found

    @property
    def _learning(self) -> list[PromptSampler]:
        """Samplers that learn, on the main rank; the one that draws now is first."""
        return [sampler for sampler in (self._own, self.adaptive) if sampler is not None]

    # ---- Draws ------------------------------------------------------------------------------------------------------

    def begin_epoch(self, phase: Phase, step: int) -> tuple[np.ndarray, int]:
        """Begin a virtual epoch.

        Args:
            phase (`Phase`): The phase that contains it.
            step (`int`): Its first optimizer step.

        Returns:
            `tuple[np.ndarray, int]`: Prompts of the units that contain the epoch, one generation after the other,
            `(P,)`, and the number of micro-steps in these units before the epoch.
        """
        plan, geometry = self.run.plan, self.geometry
        start = plan.unit_start(phase, step)
        self._first_micro_step = start * geometry.accumulation
        units = math.ceil((step + plan.epoch_steps - start) / geometry.unit_steps)
        generations = units * geometry.unit_generations
        if self.order_of(phase) == "shuffled":
            self._set(generations, *self._shuffled(generations, phase, start))
        # A pass, and with it a virtual epoch, may end inside a unit. The unit's prompts are drawn only once.
        elif self._drawn != (phase.name, start):
            self._set(generations, *self._drawn_on_main(generations, phase, start))
            self._drawn = phase.name, start
        return self._prompts.ravel(), (step - start) * geometry.accumulation

    def _set(self, generations: int, prompts: np.ndarray, more: np.ndarray) -> None:
        self._prompts = prompts.reshape(generations, -1)
        self._more = more.reshape(generations, -1)

    def _shuffled(self, generations: int, phase: Phase, step: int) -> Drawn:
        pool, count = self.run.pool_of(phase), generations * self.geometry.prompts_per_generation
        sampler = ShuffledSampler(self.run.plan, phase, pool, self.config.selection_seed)
        prompts = sampler.draw(step, count)
        if not self.config.samples_dynamically:
            return prompts, np.empty(0, dtype=np.int64)
        batches = self.config.max_generation_batches + math.ceil(self.config.oversample)
        by_generation = prompts.reshape(generations, -1)
        return prompts, sampler.spare(step, by_generation, batches * by_generation.shape[1])

    def _drawn_on_main(self, generations: int, phase: Phase, step: int) -> Drawn:
        """Draw the prompts of a unit with a sampler that learns; collective over all ranks.

        Raises:
            `ValueError`: On every rank, if a custom sampler does not return the requested rows.
        """
        drawn: Drawn | None = None
        refused: ValueError | None = None
        if self.ranks.is_main:
            try:
                drawn = self._drawn_by_sampler(generations, phase, step)
            except ValueError as error:
                refused = error  # other ranks wait for the prompts and must get the error
        # Floating-point numbers differ between machines, so all ranks train on what the main rank has drawn.
        drawn, message = self.ranks.from_main((drawn, refused and str(refused)))
        if drawn is None:
            raise refused or ValueError(message)
        return drawn

    def _drawn_by_sampler(self, generations: int, phase: Phase, step: int) -> Drawn:
        config, prompts = self.config, self.geometry.prompts_per_generation
        trained, batches = (
            generations * prompts,
            generations * prompts * config.max_generation_batches,
        )
        first = generations * math.ceil(config.oversample * prompts)
        adaptive = self.adaptive if self.order_of(phase) == "adaptive" else None
        if adaptive is None:
            total = first + batches if config.samples_dynamically else first
            best = self._draw_own(phase, step, total)
            best, others = best[:first], best[first:]
        else:
            adaptive.begin_stage(phase.name, self.run.pool_of(phase))
            best, others = adaptive.draw(step, first), np.empty(0, dtype=np.int64)
            if config.samples_dynamically:
                others = adaptive.spare(step, best, batches)
        spare = [rows.reshape(generations, -1) for rows in (best[trained:], others)]
        return best[:trained], np.concatenate(spare, axis=1)

    def _draw_own(self, phase: Phase, step: int, count: int) -> np.ndarray:
        """Draw with the custom sampler of a stage; it is constructed when the stage begins or resumes.

        After a resume in the middle of a unit, the sampler observes only the outcomes before the unit, draws, and then
        observes the rest. This is the order of calls in an uninterrupted run.
        """
        if self._own is not None and self._own.inputs.stage == phase.name:
            return self._own.draw(step, count)
        inputs = SamplerInputs(
            dataset=self._setup.trainer.train_dataset,
            candidates=self.run.pool_of(phase),
            stage=phase.name,
            rollouts=self.geometry.rollouts,
            prompts_per_generation=self.geometry.prompts_per_generation,
            seed=self.config.selection_seed,
            config=self.config,
        )
        self._own = CheckedSampler(self.order_of(phase), inputs)
        # A stage's scores come before its rollouts.
        scores = [part for part in self.run.scored.values() if len(part)]
        past = sorted([*scores, *self.history.generations()], key=lambda part: part.step)
        scored = {id(part) for part in scores}
        is_before = [part.step < step or id(part) in scored for part in past]
        for part, came_before in zip(past, is_before, strict=True):
            if came_before:
                self._own.observe(part)
        drawn = self._own.draw(step, count)
        for part, came_before in zip(past, is_before, strict=True):
            if not came_before:
                self._own.observe(part)
        return drawn

    def rows_at(self, micro_step: int) -> np.ndarray:
        """Return the prompts of the generation that begins at a micro-step of this epoch, `(P,)`."""
        return self._prompts[self._generation(micro_step)]

    def posterior_at(self, micro_step: int) -> Posterior:
        """Return the belief about the prompts of that generation before it was rolled out; collective."""
        step, found = micro_step // self.geometry.accumulation, None
        if self.adaptive is not None:
            found = self.adaptive.posterior(self.rows_at(micro_step), step)
        posterior: Posterior = self.ranks.from_main(found)
        return posterior

    def more_rows(self, micro_step: int, start: int, count: int) -> np.ndarray:
        """Return extra prompts for dynamic sampling: numbers `start` to `start + count` of that generation."""
        return self._more[self._generation(micro_step), start : start + count]

    def _generation(self, micro_step: int) -> int:
        return (micro_step - self._first_micro_step) // self.geometry.micro_steps_per_generation


def scored_outcomes(record: RunRecord, stages: Sequence[Phase]) -> list[Outcomes]:
    """Return the outcomes that stages have scored, from their tables; on the main rank.

    Args:
        record (`RunRecord`): Record of the run.
        stages (sequence of `Phase`): The stages; those that did not score are left out.
    """
    outcomes = []
    for stage in stages:
        note, table = record.get(stage.name, SelectionNote), record.read_stage(stage.name)
        if note is None or not note.scored or table is None or table["right"].null_count:
            continue
        names = [
            "index",
            "right",
            "wrong",
            *(["partial"] if "partial" in table.column_names else []),
        ]
        rows, right, wrong, *partial = (table[name].to_numpy() for name in names)
        found = Outcomes.at(stage.start, rows, right, wrong, partial=next(iter(partial), None))
        outcomes.append(found.where(found.judged > 0))
    return outcomes


def read_prompts(
    setup: RunSetup, identity: RunIdentity, record: RunRecord, kept: Path | None
) -> np.ndarray:
    """Return the prompt features that are known before the first rollout, `(n, D)`; collective over all ranks.

    Args:
        setup (`RunSetup`): The assembled run.
        identity (`RunIdentity`): Identity of the run.
        record (`RunRecord`): Record to which the cost of reading the prompts is charged, whenever that was.
        kept (`Path`, *optional*): File of the features in the checkpoint that is resumed from.
    """
    made_of = digest([identity.dataset, identity.measured_with])
    features = features_of_prompts(setup.context, setup.folder, made_of, kept)
    if features.tokens:
        record.note(BASE, EmbeddingNote(step=0, cost=Cost(tokens_forward=features.tokens)))
    return features.values


# ---- Advantages against the belief ----------------------------------------------------------------------------------


class BeliefAdvantages:
    """Computes the advantages of a generation against the belief, and logs what the belief explains.

    Args:
        setup (`RunSetup`): The assembled run.
        order (`EpochOrder`): The rolled-out prompts, with the belief about them.
    """

    def __init__(self, setup: RunSetup, order: EpochOrder):
        self.trainer, self.config = setup.trainer, setup.config
        self.success, self.order = setup.context.success, order

    @property
    def _baseline(self) -> BeliefBaseline:
        trainer, config = self.trainer, self.config
        scaled_each = trainer.multi_objective_aggregation == "normalize_then_sum"
        return BeliefBaseline(
            success=self.success.index,
            weights=trainer.reward_weights.double().cpu().numpy(),
            scaled=scaled_each or trainer.scale_rewards != "none",
            scaled_each=scaled_each,
            share=config.baseline_share,
            roulette=config.baseline_pruning == "roulette",
            scale=self.success.width,
        )

    def __call__(self, micro_step: int, rewards: torch.Tensor) -> torch.Tensor:
        """Return advantages; see `bridge.Watch`. Collective: all ranks get the main rank's predictions."""
        prior, baseline = self.order.posterior_at(micro_step), self._baseline
        outcomes = rewards.double().numpy(), self.success.successes(rewards).numpy()
        explained = baseline.explained(*outcomes, prior)
        if explained is not None:
            names = "learnalign/baseline_explained", "learnalign/group_mean_explained"
            add_metrics(self.trainer, dict(zip(names, explained, strict=True)))
        stream = rng.key(self.config.selection_seed, "roulette", micro_step)
        return torch.from_numpy(baseline.advantages(*outcomes, prior, stream))
