"""What a model thinks of the reference solutions: SelectIT's rating prompts.

Each pair of question and solution is shown below five wordings of the same request, and the probabilities of "1" to
"5" as the next token are kept. As in SelectIT, the text is plain: no chat template, system messages left out. The
wordings are ours.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from trl_learnalign import bridge, hashing
from trl_learnalign.data.prompts import prompt_question, prompts_of
from trl_learnalign.measuring.context import Context
from trl_learnalign.measuring.reading import ReadingMeasure
from trl_learnalign.measuring.texts import PromptEncoder, solutions

RATINGS = ("1", "2", "3", "4", "5")
RATING_PROMPTS = (
    "Rate how accurately the response answers the instruction on a scale from 1 (worst) to 5 (best). "
    "Reply with the number alone.",
    "How well does the response below do what the instruction asks? Give a single grade between 1 and 5, "
    "where 5 means that it is fully correct.",
    "You are a strict examiner. Judge whether the response is right and complete, and state your mark from 1 to 5 "
    "without an explanation.",
    "On a scale of 1 to 5, how correct and helpful is the following response to its instruction? Answer with one "
    "digit.",
    "Compare the response with what the instruction requires and assign it a quality score of 1, 2, 3, 4 or 5; the "
    "higher, the better.",
)
_ENDING = "\nRating:\n"


class RatingMeasure(ReadingMeasure):
    """Next-token probabilities of the five ratings after each of the five rating prompts.

    Raises:
        `ValueError`: At construction, if the ratings are not five distinct single tokens of the tokenizer.
    """

    name = "ratings"
    small: tuple[str, ...] = ("ratings",)
    texts_per_prompt = len(RATING_PROMPTS)

    def __init__(self, context: Context, column: str | None = None, model: str | None = None):
        super().__init__(context, column, model)
        self.rating_ids = rating_ids(self.encoder)

    @override
    def fingerprint(self) -> dict[str, Any]:
        return {
            **super().fingerprint(),
            "rating_prompts": hashing.digest([*RATING_PROMPTS, _ENDING]),
        }

    @override
    def read(self, model: nn.Module, prompts: np.ndarray, passes: int) -> dict[str, Tensor]:
        assert self.column is not None
        answers = solutions(self.dataset, prompts, self.column)
        rows = [row for row, answer in enumerate(answers) if answer is not None]
        questions = [prompt_question(prompt) for prompt in prompts_of(self.dataset, prompts)]
        limit = self.limit(model)
        texts = []
        for row in rows:
            pair = f"Instruction: {questions[row]}\nResponse: {answers[row]}"
            texts += [self._text(wording, pair, limit) for wording in RATING_PROMPTS]
        probabilities = torch.zeros(len(texts), len(RATINGS), dtype=torch.float64)
        for batch in self.batches(texts, passes):
            logits = bridge.next_token_logits(model, batch.input_ids, batch.attention_mask)
            chances = torch.softmax(logits.float(), dim=1)[:, self.rating_ids]
            # The batch may have one more row that is no text.
            probabilities[list(batch.texts)] = chances[: len(batch.texts)].double().cpu()
        shape = (len(RATING_PROMPTS), len(RATINGS))
        ratings = torch.full((len(prompts), *shape), torch.nan, dtype=torch.float64)
        ratings[rows] = probabilities.view(len(rows), *shape)
        return {"ratings": ratings}

    def _text(self, wording: str, pair: str, limit: int) -> list[int]:
        """A rating prompt; if it is too long, the end of the response is cut."""
        ending = self.encoder.text(_ENDING)
        body = [*self.encoder.special_start, *self.encoder.text(f"{wording}\n\n{pair}")]
        room = max(0, limit - len(ending))
        return body[:room] + ending


def rating_ids(encoder: PromptEncoder) -> list[int]:
    """Ids of the ratings as they follow a rating prompt.

    Raises:
        `ValueError`: If one of them is not a single token, or two share one.
    """
    tokenizer = encoder.tokenizer
    before = encoder.text(_ENDING)
    texts = [encoder.text(_ENDING + rating) for rating in RATINGS]
    # A merge across the border would change what comes before.
    is_apart = all(tokens[: len(before)] == before for tokens in texts)
    after = [tokens[len(before) :] for tokens in texts]
    ids = [tokens[0] for tokens in after if len(tokens) == 1]
    are_distinct = len(set(ids)) == len(RATINGS) and tokenizer.unk_token_id not in ids
    if is_apart and are_distinct:
        return ids
    readings = ", ".join(
        f"{rating!r}: {tokenizer.convert_ids_to_tokens(tokens)}"
        for rating, tokens in zip(RATINGS, after, strict=True)
    )
    raise ValueError(
        f"selectit asks for a rating from 1 to 5 as one token, and the tokenizer of "
        f"{tokenizer.name_or_path or 'the policy'} has no five distinct ones ({readings}): name a model that "
        "has them with likelihood_model, or choose another selector."
    )
