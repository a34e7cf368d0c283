"""Every generation that training makes, as it was rolled out: rewards by function, and which groups have a gradient.

A group has a gradient if a rollout of it has an advantage (beyond the rounding of TRL's means) and a token that the
loss is over. That is said here and nowhere else; `dynamic_sampling` says it of more than is trained on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trl_learnalign.bridge import rollout_batch, rollout_rows
from trl_learnalign.bridge.overrides import Overrides, overridden
from trl_learnalign.bridge.required import Replaced, Required
from trl_learnalign.bridge.rollout_batch import RolledOut, Rows, rewarded, silent_groups
from trl_learnalign.bridge.rollout_rows import Batch

if TYPE_CHECKING:
    from trl import GRPOTrainer

logger = logging.getLogger(__name__)

REQUIRES = Required(
    trainer=("_step",),
    calls={
        "_prepare_inputs": Replaced(("generation_batch",)),
        "_generate_and_score_completions": Replaced(("inputs",)),
    },
)
NEEDS = (REQUIRES, rollout_batch.REQUIRES)


class Watch:
    """Shows each generation of training, on all processes alike; what is trained on does not change by it.

    Evaluation, and what else calls the trainer's generation, is not shown.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        observe (callable): Is given what was rolled out, once for each generation.
    """

    def __init__(self, trainer: GRPOTrainer, observe: Callable[[RolledOut], None]):
        self.trainer = trainer
        self._observe = observe
        self._has_warned = False
        self._give = trainer._prepare_inputs
        Overrides([(trainer, "_prepare_inputs", self._prepare_inputs)])

    def _prepare_inputs(self, generation_batch: Any) -> Batch:
        if not self.trainer.model.training:
            return self._give(generation_batch)
        generate = self.trainer._generate_and_score_completions
        made: list[RolledOut | None] = []

        def generate_and_look(rows: Rows) -> Batch:
            batch, rewards = rewarded(self.trainer, generate, rows)
            made.append(self._rolled_out(batch, rewards))
            return batch

        with overridden(self.trainer, "_generate_and_score_completions", generate_and_look):
            inputs = self._give(generation_batch)
        self._show(made)
        return inputs

    def _show(self, made: list[RolledOut | None]) -> None:
        """Show what was made for one micro-step: nothing, or a generation."""
        if len(made) == 1 and made[0] is not None:
            self._observe(made[0])
        elif made and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "What generations come to is not noted: something else than TRL puts them together."
            )

    def _rolled_out(self, batch: Batch, rewards: torch.Tensor) -> RolledOut | None:
        """A generation before it is shuffled; `None` if it is not as TRL makes it."""
        trainer = self.trainer
        if len(rewards) != trainer.args.generation_batch_size:
            return None
        sizes = rollout_batch.gathered_sizes(trainer, batch)
        rows = rollout_rows.has_gradient(sizes, float(sizes.max()))
        silent = silent_groups(trainer, rewards).cpu().numpy()
        useful = rows.reshape(-1, trainer.num_generations).any(axis=1) & ~silent
        return RolledOut(
            micro_step=trainer._step,
            asked_rows=np.empty(0, dtype=np.int64),
            rewards=rewards.cpu().view(-1, trainer.num_generations, rewards.shape[1]),
            useful=useful,
            trained=np.ones(len(useful), dtype=bool),
        )
