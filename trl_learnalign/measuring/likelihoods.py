"""How likely a model finds the reference solutions: natural logarithms, temperature 1, per token.

The solution is read twice. *Given the prompt*: after the prompt as for generation, with chat template and generation
prompt; the last prompt token predicts the first solution token. *Alone* (Cherry_LLM): what predicts the first token is
decided by `solution_start`:

- `"template"`: the chat template's generation prompt (after the start token, if templated prompts begin with one), as
  the code of Cherry_LLM has `### Response:` before the solution. Prompts that are plain text have no template, and
  then it is the same as
- `"token"`: the tokenizer's start token alone, or its end token if it has no start token. The formula of the paper
  has a first token that nothing precedes; a model needs something there.

Both means are over the same tokens, the first one included and no end token added: their ratio compares like with
like. A solution that is too long together with its prompt is cut in both readings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
from trl_learnalign.measuring.measure import Measure
from trl_learnalign.measuring.progress import Tally
from trl_learnalign.measuring.reading import ReadingMeasure
from trl_learnalign.measuring.texts import PromptEncoder, solutions


@dataclass(frozen=True)
class _Reading:
    """A solution behind something else.

    Args:
        tokens (`list[int]`): Of both.
        solution_length (`int`): How many of them, at the end, are the solution's.
        place (`tuple[int, int]`): Which prompt's it is, and 0 behind the prompt, 1 alone.
    """

    tokens: list[int]
    solution_length: int
    place: tuple[int, int]


class LikelihoodMeasure(ReadingMeasure):
    """Mean negative log-likelihood of each solution, given its prompt and alone."""

    name = "likelihoods"
    small: tuple[str, ...] = ("nll", "nll_alone", "solution_tokens", "truncated")
    texts_per_prompt = 2

    @override
    def fingerprint(self) -> dict[str, Any]:
        return {**super().fingerprint(), "solution_start": self.config.solution_start}

    @override
    def read(self, model: nn.Module, prompts: np.ndarray, passes: int) -> dict[str, Tensor]:
        assert self.column is not None
        dataset, limit = self.dataset, self.limit(model)
        prompt_tokens = self.encoder.prompts(list(prompts_of(dataset, prompts)))
        first_prompt = next(prompts_of(dataset, [0]))
        alone = self.encoder.before_solution(first_prompt, self.config.solution_start)
        answers = [
            self.encoder.text(text or "") for text in solutions(dataset, prompts, self.column)
        ]
        readings: list[_Reading] = []
        lengths = []  # of the solutions as they are read
        for row, (before, answer) in enumerate(zip(prompt_tokens, answers, strict=True)):
            before = before or self.encoder.start
            room = limit - max(len(before), len(alone))
            length = max(0, min(len(answer), room))
            lengths.append(length)
            if length:
                readings.append(_Reading(before + answer[:length], length, (row, 0)))
                readings.append(_Reading(alone + answer[:length], length, (row, 1)))
        nll = torch.full((len(prompts), 2), torch.nan, dtype=torch.float64)
        for reading, value in self._mean_nll(model, readings, passes):
            nll[reading.place] = value
        whole_lengths = torch.tensor([len(answer) for answer in answers], dtype=torch.int64)
        return {
            "nll": nll[:, 0],
            "nll_alone": nll[:, 1],
            "solution_tokens": whole_lengths,
            "truncated": torch.tensor(lengths, dtype=torch.int64) < whole_lengths,
        }

    def _mean_nll(
        self,
        model: nn.Module,
        readings: list[_Reading],
        passes: int,
    ) -> Iterator[tuple[_Reading, float]]:
        for batch in self.batches([reading.tokens for reading in readings], passes):
            labels = torch.full_like(batch.input_ids, -100)  # no label
            for row, number in enumerate(batch.texts):
                end = len(readings[number].tokens)
                solution = slice(end - readings[number].solution_length, end)
                labels[row, solution] = batch.input_ids[row, solution]
            log_probs = bridge.label_log_probs(model, batch.input_ids, batch.attention_mask, labels)
            sums = log_probs.double().sum(dim=1).tolist()
            for row, number in enumerate(batch.texts):
                yield readings[number], -sums[row] / readings[number].solution_length

    @override
    def tally(self, prompts: int, result: Mapping[str, Tensor]) -> Tally:
        mean = float(torch.nanmean(result["nll"]))
        return Tally(prompts, note=f"{mean:.2f} nats per token")


class LengthMeasure(Measure):
    """Tokens of each solution, by the policy's tokenizer. No model is run.

    Args:
        context (`Context`): The trainer that measures, and how.
        column (`str`): Column of reference solutions.
    """

    name = "lengths"
    small: tuple[str, ...] = ("solution_tokens",)

    def __init__(self, context: Context, column: str):
        self.dataset = context.dataset
        self.column = column
        self.encoder = PromptEncoder(context.trainer)

    @override
    def fingerprint(self) -> dict[str, Any]:
        vocabulary = hashing.digest(self.encoder.tokenizer.get_vocab())
        return {"solution_column": self.column, "vocabulary": vocabulary}

    @override
    def calls(self, prompts: np.ndarray) -> int:
        return 0

    @override
    @contextmanager
    def session(self) -> Iterator[None]:
        yield

    @override
    def measure(
        self,
        number: int,
        prompts: np.ndarray,
        calls: int,
        keep: bool,
    ) -> dict[str, Tensor]:
        texts = solutions(self.dataset, prompts, self.column)
        counts = [len(self.encoder.text(text or "")) for text in texts]
        return {"solution_tokens": torch.tensor(counts)}
