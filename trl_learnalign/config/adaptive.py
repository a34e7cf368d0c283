"""Constants of the adaptive order; each was chosen on development tasks (`docs/continual.md`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from trl_learnalign.config.base import Settings, setting
from trl_learnalign.config.checks import each, memory, ranged, share, whole


@dataclass
class Adaptive(Settings):
    """Constants of the adaptive order."""

    adaptive_embeddings: str = setting(
        "hidden",
        "What tells prompts apart before anything is rolled out: 'hidden' (mean last hidden state of the initial "
        "policy over the prompt), 'none' (each prompt is judged by its own rollouts alone), the name of a column of "
        "the dataset that holds embeddings, or 'package.module:function', called with the prompts and returning one "
        "row of numbers for each.",
    )
    adaptive_feature_dim: Annotated[int, whole(1, 2**16)] = setting(
        64, "Features of a prompt: directions of the embeddings that are kept."
    )
    adaptive_prior_std: Annotated[float, ranged(0.01, 100)] = setting(
        4.0, "Standard deviation of the success rates' logits that features are expected to tell."
    )
    adaptive_drift_std: Annotated[float, ranged(0, 100)] = setting(
        0.05,
        "Standard deviation of what the logits of all prompts are expected to move together in a generation.",
    )
    adaptive_concentration: Annotated[list[float], each(ranged(0.01, 1e6))] = setting(
        [4.0, 1.0, 2.0, 8.0, 16.0, 32.0],
        "How many rollouts of its own the prediction from a prompt's features weighs as much as. Of several values "
        "the one is used that would have predicted past outcomes best; the first one to begin with.",
    )
    adaptive_decay: Annotated[float, memory] = setting(
        0.97,
        "What features have told counts so much less in each generation: success rates move while the policy learns.",
    )
    adaptive_prompt_decay: Annotated[float, memory] = setting(
        0.99, "The same for what a prompt's own rollouts have told."
    )
    adaptive_concentration_decay: Annotated[float, memory] = setting(
        0.99, "The same for the score by which several values are compared."
    )
    adaptive_exploration: Annotated[float, share] = setting(
        0.5,
        "Share of each generation that comes from the shuffled pool, pass after pass, whatever is believed: skills "
        "that are not practised decline, and what is not rolled out is not known. 1: all of it.",
    )
    adaptive_candidates_per_slot: Annotated[int, whole(1, 10**6)] = setting(
        8,
        "Prompts that compete for each of the other places of a generation; the pool passes by in a seeded order, so "
        "many at a time. The more, the greedier; 1: no choice.",
    )
    adaptive_gain_exponent: Annotated[float, ranged(0, 100)] = setting(
        1.0,
        "What a prompt of success rate p is worth: p(1 - p)(1 - p)^headroom. 0: its learnability; 1: the first-order "
        "gain in success rate, largest at p = 1/3.",
    )
    adaptive_cool_down: Annotated[int, whole(0)] = setting(
        8, "Generations that a prompt does not compete in after it was rolled out."
    )

    def _check_together(self) -> None:
        super()._check_together()
        values = self.adaptive_concentration
        if len(set(values)) < len(values):
            raise ValueError(
                f"adaptive_concentration={values}: give numbers that differ from each other."
            )
