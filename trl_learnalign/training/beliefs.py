"""The belief of a run, and the order that follows from it; the main rank holds it and tells the others.

The belief's generations are *units* (`curriculum`): a unit's prompts are drawn before any of it is rolled out, and its
outcomes are counted together before the next one is drawn. Generation 0 is before the first unit. So the belief is a
function of what the reward history and the stages' scores say, and a resumed run rebuilds it from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trl_learnalign.adaptive.belief import Belief, Outcomes
from trl_learnalign.adaptive.order import AdaptiveOrder
from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.curriculum import Geometry, Phase
from trl_learnalign.hashing import digest
from trl_learnalign.measuring.embeddings import features_of_prompts
from trl_learnalign.records.history import HistoryRecorder, RolledOutPrompts
from trl_learnalign.records.ledger import Cost
from trl_learnalign.records.notes import BASE, EmbeddingNote, SelectionNote
from trl_learnalign.records.run import RunRecord
from trl_learnalign.training.run_identity import RunIdentity
from trl_learnalign.training.run_state import RunState
from trl_learnalign.training.setup import RunSetup


class BeliefKeeper:
    """Draws prompts by what is believed of them, and learns from what comes out.

    Args:
        features (`np.ndarray`): Of all prompts of the dataset, `(n, D)`.
        config (`LearnAlignConfig`): Settings.
        geometry (`Geometry`): The trainer's batching.
    """

    def __init__(self, features: np.ndarray, config: LearnAlignConfig, geometry: Geometry):
        self.config, self.geometry = config, geometry
        self.belief = Belief(features, config)
        self._pending: dict[int, list[RolledOutPrompts]] = {}
        self._orders: dict[str, AdaptiveOrder] = {}

    def add(self, rolled_out: RolledOutPrompts) -> np.ndarray:
        """Learn from outcomes once their unit is over.

        Args:
            rolled_out (`RolledOutPrompts`): Prompts of a step that is not before those that were added so far.

        Returns:
            `np.ndarray`: What was believed of their success rates, `(P,)`.
        """
        generation = self._generation(rolled_out.step)
        self._settle(generation)
        self._pending.setdefault(generation, []).append(rolled_out)
        return self.belief.posterior(rolled_out.rows, generation).success_rate

    def add_scored(self, scored: RolledOutPrompts) -> None:
        """Learn from what a stage has scored before its first step, `scored.step`."""
        self._pending.setdefault(self._generation(scored.step) - 1, []).append(scored)

    def before(self, step: int) -> Belief:
        """What is believed before the unit that begins with an optimizer step."""
        self._settle(self._generation(step))
        return self.belief

    def draw(self, pool: np.ndarray, name: str, step: int, count: int) -> np.ndarray:
        """Prompts of the unit that begins with an optimizer step, the most wanted first.

        Args:
            pool (`np.ndarray`): Rows of the dataset to draw from, `(N,)`; always the same under one name.
            name (`str`): What is drawn for, e.g. `Phase.name`; part of every seed.
            step (`int`): The step.
            count (`int`): How many, always the same under one name; of a smaller pool they come again.

        Returns:
            `np.ndarray`: `(count,)` int64.
        """
        generation = self._generation(step)
        self._settle(generation)
        if name not in self._orders:
            distinct, seed = min(count, len(pool)), self.config.selection_seed
            self._orders[name] = AdaptiveOrder(pool, distinct, self.config, seed, name)
        return np.resize(self._orders[name].draw(self.belief, generation), count)

    def _generation(self, step: int) -> int:
        return step // self.geometry.unit_steps + 1

    def _settle(self, generation: int) -> None:
        """Count the outcomes of all generations before this one."""
        for past in sorted(number for number in self._pending if number < generation):
            parts = self._pending.pop(past)
            columns = [[part.rows, part.right, part.wrong] for part in parts]
            rows, right, wrong = (np.concatenate(values) for values in zip(*columns, strict=True))
            self.belief.record(Outcomes(past, rows, right, wrong))


def scored_outcomes(record: RunRecord, stages: Sequence[Phase]) -> list[RolledOutPrompts]:
    """What stages have scored, by their tables; on the main rank.

    Args:
        record (`RunRecord`): Of the run.
        stages (sequence of `Phase`): The stages; those that did not score are left out.
    """
    outcomes = []
    for stage in stages:
        note, table = record.get(stage.name, SelectionNote), record.read_stage(stage.name)
        if note is None or not note.scored or table is None or table["right"].null_count:
            continue
        rows, right, wrong = (table[name].to_numpy() for name in ("index", "right", "wrong"))
        judged = right + wrong > 0
        outcomes.append(RolledOutPrompts(stage.start, rows[judged], right[judged], wrong[judged]))
    return outcomes


class RunBeliefs:
    """Beliefs of a run, rebuilt from what it has recorded; of the features of all prompts, they are functions.

    Args:
        features (`np.ndarray`): Of all prompts of the dataset, `(n, D)`.
        config (`LearnAlignConfig`): Settings.
        run (`RunState`): Where the run stands.
        history (`HistoryRecorder`): What training has rolled out.
    """

    def __init__(
        self,
        features: np.ndarray,
        config: LearnAlignConfig,
        run: RunState,
        history: HistoryRecorder,
    ):
        self.features, self.config = features, config
        self.run, self.history = run, history

    def keeper(self, step: int) -> BeliefKeeper:
        """What has been learned before an optimizer step; on the main rank."""
        plan = self.run.plan
        geometry = plan.geometry
        keeper = BeliefKeeper(self.features, self.config, geometry)
        for stage in plan.stages:
            if stage.start < step and stage.name in self.run.scored:
                keeper.add_scored(self.run.scored[stage.name])
        for rolled_out in self.history.outcomes():
            keeper.add(rolled_out)
        return keeper

    def before(self, step: int) -> Belief:
        """What is believed before an optimizer step; on the main rank."""
        return self.keeper(step).before(step)


def read_prompts(
    setup: RunSetup, identity: RunIdentity, record: RunRecord, kept: Path | None
) -> np.ndarray:
    """What tells prompts apart before the first rollout, `(n, D)`; all ranks call it together.

    Args:
        setup (`RunSetup`): What the run is made of.
        identity (`RunIdentity`): The run among others.
        record (`RunRecord`): Where reading the prompts is charged, whenever that was.
        kept (`Path`, *optional*): What the checkpoint that is gone on with has kept of it.
    """
    made_of = digest([identity.dataset, identity.measured_with])
    features = features_of_prompts(setup.context, setup.folder, made_of, kept)
    if features.tokens:
        record.note(BASE, EmbeddingNote(step=0, cost=Cost(tokens_forward=features.tokens)))
    return features.values
