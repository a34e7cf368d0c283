"""The trainer's own order of prompts, gone on with where a resumed run stands.

TRL's sampler draws a new order for each epoch from a generator of its own, which no checkpoint keeps: a stock run that
is resumed in its second epoch trains on the first one's order again. The sampler stays TRL's; in a resumed run the
orders of the epochs before are drawn, and thrown away.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch.utils.data import Sampler
from transformers.trainer_utils import has_length
from trl.trainer.utils import RepeatSampler

from trl_learnalign.bridge.required import Replaced, Required

if TYPE_CHECKING:
    from trl import GRPOTrainer

REQUIRES = Required(calls={"_get_train_sampler": Replaced(("dataset",))})


class StockOrder:
    """Remembers the sampler that a trainer makes for its training.

    Args:
        trainer (`GRPOTrainer`): The trainer, before `train()`.
    """

    def __init__(self, trainer: GRPOTrainer):
        self.trainer = trainer
        self._sampler: Sampler[int] | None = None
        self._make = trainer._get_train_sampler
        trainer._get_train_sampler = self._remembered  # type: ignore[method-assign]

    def _remembered(self, dataset: Any = None) -> Sampler[int] | None:
        self._sampler = self._make(dataset)
        return self._sampler

    def go_on(self) -> None:
        """A run is resumed: leave the sampler as the epochs before would have; before the first batch is drawn."""
        passes, _ = passes_made(self.trainer)
        if isinstance(self._sampler, RepeatSampler):
            for _ in range(passes):
                next(iter(self._sampler), None)


def passes_made(trainer: GRPOTrainer) -> tuple[int, int]:
    """Epochs of the trainer's loop that are over, and micro-steps that have been made in all of its training."""
    steps, accumulation = trainer.state.global_step, trainer.args.gradient_accumulation_steps
    loader = trainer.callback_handler.train_dataloader
    if loader is None or not has_length(loader):
        return 0, steps * accumulation
    # The last step of an epoch takes what is left of it.
    passes, rest = divmod(steps, max(1, math.ceil(len(loader) / accumulation)))
    return passes, passes * len(loader) + rest * accumulation
