"""What is added to the trainer beside an order: rollouts that are skipped, and rollouts that are made besides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from trl_learnalign import bridge, hashing, scoring
from trl_learnalign.adaptive.order import worth_of
from trl_learnalign.records.ledger import Cost
from trl_learnalign.training.setup import RunSetup
from trl_learnalign.training.states import check_keys

SKIPPING, SAMPLING = "skipping", "sampling"


class Additions:
    """Skipping and dynamic sampling, where they are switched on and possible.

    Args:
        setup (`RunSetup`): What the run is made of.
        more_rows (callable): See `bridge.install_dynamic_sampling`.
        observe (callable): Is given everything that is rolled out, once for each generation.

    Raises:
        `ValueError`: If dynamic sampling is asked for and not possible, with the remedy.
    """

    def __init__(
        self,
        setup: RunSetup,
        more_rows: Callable[[int, int, int], Any],
        observe: Callable[[bridge.RolledOut], None],
    ):
        config, trainer = setup.config, setup.trainer
        self.trainer = trainer
        self.sampler: bridge.DynamicSampler | None = None
        self._skipping: bridge.Skipper | str | None = None
        headroom = config.adaptive_gain_exponent if config.is_adaptive else 0.0
        if config.samples_dynamically:
            self.sampler = bridge.install_dynamic_sampling(
                trainer,
                more_rows,
                config.oversample,
                config.max_generation_batches,
                observe,
                lambda rewards: worth_seen(setup.context.success.successes(rewards), headroom),
            )
        else:
            bridge.Watch(trainer, observe)
        if config.skip_zero_advantages:
            self._skipping = bridge.install_skipping(trainer)
        self._begun = self._counts()

    @property
    def skipper(self) -> bridge.Skipper | None:
        """What skips, if anything is skipped."""
        skipping = self._skipping
        return (
            skipping if isinstance(skipping, bridge.Skipper) and skipping.problem is None else None
        )

    @property
    def not_skipped(self) -> str | None:
        """Why nothing is skipped although it was asked for; of some models only training that has begun can tell."""
        skipping = self._skipping
        return skipping.problem if isinstance(skipping, bridge.Skipper) else skipping

    def begin_phase(self) -> None:
        """A phase begins: costs are counted anew."""
        self._begun = self._counts()

    def corrected(self, cost: Cost) -> Cost:
        """The cost of the phase so far, with what was skipped left out and what was rolled out besides counted.

        Args:
            cost (`Cost`): As if all rollouts were trained on, and no others made.
        """
        now, changed = self._counts(), vars(cost).copy()
        if self.sampler is not None:
            for name in ("tokens_generated", "tokens_prompt"):
                changed[name] = now[SAMPLING][name] - self._begun[SAMPLING][name]
            chosen = now[SAMPLING]["tokens_chosen"] - self._begun[SAMPLING]["tokens_chosen"]
            changed["tokens_trained"] = self.trainer.num_iterations * chosen
        if self.skipper is not None:
            trained = now[SKIPPING]["tokens_trained"] - self._begun[SKIPPING]["tokens_trained"]
            changed["tokens_trained"] = trained
        return Cost(**changed)

    def skipped(self) -> dict[str, int]:
        """Tokens of the phase so far: `tokens_given`, `tokens_trained`, `tokens_idle`; nothing without skipping."""
        if self.skipper is None:
            return {}
        now, begun = self._counts()[SKIPPING], self._begun[SKIPPING]
        return {name: now[name] - begun[name] for name in now if name.startswith("tokens_")}

    def _counts(self) -> dict[str, dict[str, int]]:
        parts = {SKIPPING: self.skipper, SAMPLING: self.sampler}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def state_dict(self) -> dict[str, Any]:
        """As plain JSON values: what was counted so far, and before the phase."""
        return {name: [counts, self._begun[name]] for name, counts in self._counts().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from [`state_dict`].

        Raises:
            `ValueError`: If other things were switched on when the state was kept.
        """
        check_keys("skipping and sampling", state, self._counts())
        for name, part in ((SKIPPING, self.skipper), (SAMPLING, self.sampler)):
            if part is not None:
                counts, self._begun[name] = state[name]
                part.load_state_dict(counts)


def worth_seen(successes: torch.Tensor, headroom: float) -> np.ndarray:
    """What training on groups of rollouts is worth, `(P,)`: p(1 - p), times what is left to gain.

    Args:
        successes (`torch.Tensor`): `(P, G)` of 0, 1 and NaN where a rollout could not be judged.
        headroom (`float`): As in `adaptive.order.worth_of`.
    """
    rates = scoring.success_rate(successes).nan_to_num(nan=0.0)
    return worth_of(rates.numpy(), headroom)


class AnyRows:
    """Prompts besides for runs in the trainer's own order: of the whole dataset, seeded by where the run is.

    The trainer's own count of micro-steps begins anew in a run that is resumed. Where it is, it tells by the optimizer
    step, and by how far a generation is from the first one that asked within it.

    Args:
        setup (`RunSetup`): What the run is made of.
    """

    def __init__(self, setup: RunSetup):
        self._trainer = setup.trainer
        self._seed = setup.config.selection_seed
        self._step, self._first_micro_step = -1, 0

    def __call__(self, micro_step: int, start: int, count: int) -> np.ndarray:
        """See `bridge.install_dynamic_sampling`."""
        step = self._trainer.state.global_step
        if step != self._step:
            self._step, self._first_micro_step = step, micro_step
        place = micro_step - self._first_micro_step
        stream = hashing.key(self._seed, "more prompts", step, place)
        everything = np.arange(len(self._trainer.train_dataset))
        order = hashing.permutation(stream, everything)
        return order[np.arange(start, start + count) % len(order)]
