"""What the measures that read texts share: one forward pass per batch of texts, nothing generated.

Texts are padded on the right, so that the positions of a text, and with a causal model all that is computed of it, do
not depend on its neighbours. A pass has a fixed number of texts, whatever their lengths: all ranks can tell how many
passes there will be, and make equally many.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from trl_learnalign import bridge, hashing
from trl_learnalign.data.prompts import prompts_of
from trl_learnalign.measuring.context import Context
from trl_learnalign.measuring.measure import TOKENS_READ, Measure
from trl_learnalign.measuring.texts import PromptEncoder


@dataclass(frozen=True)
class TextBatch:
    """Texts of one forward pass.

    Args:
        texts (`tuple[int]`): Numbers of the texts, `R'` of them; the batch may have one more row that is none.
        input_ids (`torch.Tensor`): `(R, L)`, padded on the right.
        attention_mask (`torch.Tensor`): `(R, L)`.
    """

    texts: tuple[int, ...]
    input_ids: Tensor
    attention_mask: Tensor


def text_batches(
    texts: Sequence[Sequence[int]],
    rows: int,
    passes: int,
    pad_token_id: int,
    device: torch.device,
) -> Iterator[TextBatch]:
    """Batches of texts of like length, and batches of nothing until there are `passes`.

    Args:
        texts (sequence of token lists): Texts, none of them empty.
        rows (`int`): Texts per batch.
        passes (`int`): Batches, at least as many as the texts take.
        pad_token_id (`int`): Fills the padding.
        device (`torch.device`): Where the batches go.
    """
    # Longest first: if memory runs out, it does so at once.
    order = sorted(range(len(texts)), key=lambda i: (-len(texts[i]), i))
    for first in range(0, passes * rows, rows):
        numbers = order[first : first + rows]
        # A batch of nothing still needs a row to go through the model.
        tokens = [list(texts[i]) for i in numbers] or [[pad_token_id, pad_token_id]]
        width = max(map(len, tokens))
        ids = torch.tensor([row + [pad_token_id] * (width - len(row)) for row in tokens])
        lengths = torch.tensor([len(row) for row in tokens])
        mask = (torch.arange(width) < lengths.unsqueeze(1)).long()
        yield TextBatch(tuple(numbers), ids.to(device), mask.to(device))


class ReadingMeasure(Measure):
    """Reads a few texts per prompt with a model.

    Args:
        context (`Context`): The trainer that measures, and how.
        column (`str`, *optional*): Column of reference solutions, for those that read them.
        model (`str`, *optional*): Hub id or path of the model; default: the policy.
    """

    texts_per_prompt = 1

    def __init__(self, context: Context, column: str | None = None, model: str | None = None):
        self.trainer = context.trainer
        self.config = context.config
        self.dataset = context.dataset
        self.column = column
        self.model_name = model
        self.encoder = PromptEncoder(context.trainer, model)
        self._model: Any = None

    @override
    def fingerprint(self) -> dict[str, Any]:
        # Tokens of one prompt stand for the tokenizer, the chat template and its settings.
        sample = self.encoder.prompts(list(prompts_of(self.dataset, [0])))
        return {
            "read_by": self.model_name or "policy",
            "tokens": hashing.digest(sample),
            "max_text_tokens": self.config.max_text_tokens,
            "solution_column": self.column,
        }

    @override
    def calls(self, prompts: np.ndarray) -> int:
        return math.ceil(len(prompts) * self.texts_per_prompt / self.config.text_batch_size)

    @override
    @contextmanager
    def session(self) -> Iterator[None]:
        with (
            bridge.left_as_found(self.trainer),
            bridge.reading_model(self.trainer, self.model_name) as model,
        ):
            self._model = model
            try:
                yield
            finally:
                self._model = None

    @override
    def measure(
        self,
        number: int,
        prompts: np.ndarray,
        calls: int,
        keep: bool,
    ) -> dict[str, Tensor]:
        self._tokens_read = 0
        result = self.read(self._model, prompts if keep else prompts[:0], calls)
        return {**result, TOKENS_READ: torch.tensor([self._tokens_read])}

    @abstractmethod
    def read(self, model: nn.Module, prompts: np.ndarray, passes: int) -> dict[str, Tensor]:
        """Measure some prompts, or none, in so many forward passes."""

    def limit(self, model: Any) -> int:
        """Tokens of a text that the settings and the model allow."""
        most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        return min(self.config.max_text_tokens, most or self.config.max_text_tokens)

    def batches(self, texts: Sequence[Sequence[int]], passes: int) -> Iterator[TextBatch]:
        """The texts in forward passes."""
        self._tokens_read += sum(map(len, texts))
        # Masked, so that any token of another model's vocabulary does.
        pad = bridge.pad_token_id(self.trainer) if self.model_name is None else 0
        device = self.trainer.accelerator.device
        return text_batches(texts, self.config.text_batch_size, passes, pad, device)
