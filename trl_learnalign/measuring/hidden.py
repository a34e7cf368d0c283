"""RDS+ representations: what the policy makes of a text, as one vector."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from trl_learnalign import bridge
from trl_learnalign.data.prompts import prompts_of
from trl_learnalign.measuring.context import Context
from trl_learnalign.measuring.measure import FEATURES, ROWS
from trl_learnalign.measuring.reading import ReadingMeasure
from trl_learnalign.measuring.texts import solutions


class HiddenMeasure(ReadingMeasure):
    """Position-weighted mean of the last hidden layer of the policy, normalised (RDS+, Ivison et al., 2025).

    The layer is taken after the final norm, what transformers calls `last_hidden_state`. Token `i` of `n` has weight
    `i / (1 + … + n)`: with a causal model, later tokens have read more. Padding has no weight.

    The text is the prompt as for generation (`hidden_text="prompt"`, our default for RL), or the prompt and its
    reference solution (`"prompt_and_solution"`, as RDS+ reads instruction data).
    """

    small: tuple[str, ...] = ("has_text",)

    def __init__(self, context: Context, column: str | None = None, model: str | None = None):
        super().__init__(context, column, model)
        self.name = "hidden" if self.config.hidden_text == "prompt" else "hidden_with_solution"

    @override
    def read(self, model: Any, prompts: np.ndarray, passes: int) -> dict[str, Tensor]:
        limit = self.limit(model)
        texts = [text[:limit] for text in self._texts(prompts)]
        rows = [row for row, text in enumerate(texts) if text]
        features = torch.zeros(len(rows), self.dimensions(model))
        for batch in self.batches([texts[row] for row in rows], passes):
            states = bridge.last_hidden_states(model, batch.input_ids, batch.attention_mask)
            means = position_weighted_mean(states, batch.attention_mask)
            directions = torch.nn.functional.normalize(means, dim=1)
            # A batch of nothing keeps other ranks company.
            if batch.texts:
                features[list(batch.texts)] = directions.float().cpu()
        return {
            "has_text": torch.tensor([bool(text) for text in texts], dtype=torch.bool),
            ROWS: torch.tensor(rows, dtype=torch.int64),
            FEATURES: features,
        }

    def _texts(self, prompts: np.ndarray) -> list[list[int]]:
        dataset = self.dataset
        tokens = self.encoder.prompts(list(prompts_of(dataset, prompts)))
        if self.config.hidden_text == "prompt":
            return tokens
        assert self.column is not None
        answers = solutions(dataset, prompts, self.column)
        texts = []
        for prompt, answer in zip(tokens, answers, strict=True):
            texts.append([] if answer is None else prompt + self.encoder.text(answer))
        return texts

    @staticmethod
    def dimensions(model: Any) -> int:
        """H."""
        return int(model.config.get_text_config().hidden_size)


def position_weighted_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """`Σ_i i h_i / Σ_i i` over the tokens that are no padding, in float64.

    Args:
        hidden (`torch.Tensor`): `(R, L, H)`.
        mask (`torch.Tensor`): `(R, L)`, 0 for padding on the right.

    Returns:
        `torch.Tensor`: `(R, H)`.
    """
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    weights = mask.double() * places
    weights = weights / weights.sum(dim=1, keepdim=True)
    # The padding's own states may be anything, also NaN.
    states = torch.where(mask.bool().unsqueeze(2), hidden.double(), 0.0)
    return (states * weights.unsqueeze(2)).sum(dim=1)
