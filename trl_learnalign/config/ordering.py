"""In which order a pool is trained on, and which rollouts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

from trl_learnalign.config.base import setting
from trl_learnalign.config.checks import as_list, one_of, ranged, whole
from trl_learnalign.config.stages import Stages

ORDERS = ("auto", "shuffled", "adaptive", "trainer")


def orders(name: str, value: Any) -> list[str]:
    """Orders by name, one or several."""
    names = [one_of(ORDERS)(name, item) for item in as_list(value)]
    if not names:
        raise ValueError(
            f"{name}={value!r} is empty: choose one of {', '.join(map(repr, ORDERS))}."
        )
    return names


@dataclass
class Ordering(Stages):
    """Continual selection: which prompts come next, and which rollouts are trained on."""

    order: Annotated[list[str], orders] = setting(
        ["auto"],
        "In which order a stage trains on its prompts: one for all stages, or one for each. 'auto': 'adaptive' where "
        "the whole pool is one stage without a warm-up, 'shuffled' for prompts that were chosen. 'shuffled': pass "
        "after pass. 'adaptive': for each generation those of the largest expected gain, by a belief about every "
        "prompt's success rate that all rollouts so far feed; with stages=1 and warmup_samples=0 this is continual "
        "selection from the whole pool, and nothing is rolled out for scoring alone. 'trainer': the trainer's own "
        "order and number of steps, for runs that only skip or sample dynamically; needs stages=1 and "
        "warmup_samples=0.",
    )
    skip_zero_advantages: bool = setting(
        True,
        "Leave rollouts without an advantage (all of their prompt's earned the same) out of the forward and backward "
        "pass of training. Exact: the gradient is that of the whole batch. Off, with a word, where such rollouts have "
        "a gradient all the same (beta above 0, an entropy bonus, a load-balancing loss) or may reach experts that no "
        "other does.",
    )
    oversample: Annotated[float, ranged(1, 1000)] = setting(
        1.0,
        "Roll out this many times the prompts that a generation trains on, and train on those whose rollouts teach "
        "most, with those very rollouts.",
    )
    max_generation_batches: Annotated[int, whole(1, 1000)] = setting(
        1,
        "Dynamic sampling (DAPO): roll out up to this many batches of prompts for a generation, until as many as it "
        "trains on have a gradient. 1: no more than one.",
    )

    @property
    def is_adaptive(self) -> bool:
        """Whether a stage is trained on in the order of what is believed."""
        return "adaptive" in self.order

    @property
    def leaves_the_order(self) -> bool:
        """Whether the trainer keeps its own sampler and number of steps."""
        return "trainer" in self.order

    @property
    def samples_dynamically(self) -> bool:
        """Whether more is rolled out than is trained on."""
        return self.oversample > 1 or self.max_generation_batches > 1

    def extra_prompts(self, prompts: int) -> int:
        """Prompts that `oversample` rolls out besides the `prompts` that a generation trains on."""
        return math.ceil(round((self.oversample - 1) * prompts, 9))

    def _check_together(self) -> None:
        super()._check_together()
        automatic = "adaptive" if self.is_whole_pool else "shuffled"
        self.order = [automatic if order == "auto" else order for order in self.order]
        if len(self.order) not in (1, len(self.stages)):
            raise ValueError(
                f"order={self.order} for {len(self.stages)} stage(s): give one order, or one for each."
            )
        if self.leaves_the_order and (len(self.order), self.stages) != (1, [1.0]):
            raise ValueError(
                f"order={self.order} with stages={self.stages}: in the trainer's own order all prompts are trained on "
                "and none selected; set stages=1, or choose 'shuffled' or 'adaptive'."
            )
        if self.leaves_the_order and self.warmup_samples:
            raise ValueError(
                f"order='trainer' with warmup_samples={self.warmup_samples}: nothing is selected, so there is nothing "
                "to warm up for; set warmup_samples=0, or choose 'shuffled' or 'adaptive'."
            )

    def order_of(self, stage: int) -> str:
        """The order of a stage, counted from 0."""
        return self.order[0] if len(self.order) == 1 else self.order[stage]
