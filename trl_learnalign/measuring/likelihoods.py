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
from typing import Any

import numpy as np
import torch
from torch import nn
from typing_extensions import override

from trl_learnalign import bridge, hashing
from trl_learnalign.data.prompts import prompts_of
from trl_learnalign.measuring.context import Context
from trl_learnalign.measuring.measure import Measure
from trl_learnalign.measuring.progress import Tally
from trl_learnalign.measuring.reading import ReadingMeasure
from trl_learnalign.measuring.texts import PromptEncoder, solutions


class LikelihoodMeasure(ReadingMeasure):
    """Mean negative log-likelihood of each solution, given its prompt and alone."""

    name = "likelihoods"
    small: tuple[str, ...] = ("nll", "nll_alone", "solution_tokens", "truncated")
    texts_per_prompt = 2

    @override
    def fingerprint(self) -> dict[str, Any]:
        return {**super().fingerprint(), "solution_start": self.config.solution_start}

    @override
    def read(self, model: nn.Module, prompts: np.ndarray, passes: int) -> dict[str, torch.Tensor]:
        assert self.column is not None
        dataset, limit = self.dataset, self.limit(model)
        given = self.encoder.prompts(list(prompts_of(dataset, prompts)))
        alone = self.encoder.before_solution(
            next(prompts_of(dataset, [0])), self.config.solution_start
        )
        answers = [
            self.encoder.text(text or "") for text in solutions(dataset, prompts, self.column)
        ]
        texts: list[list[int]] = []
        scored: list[int] = []  # last tokens of each text that are the solution's
        of: list[tuple[int, int]] = []  # which prompt, and whether alone
        kept = []
        for row, (before, answer) in enumerate(zip(given, answers, strict=True)):
            before = before or self.encoder.start
            kept.append(max(0, min(len(answer), limit - max(len(before), len(alone)))))
            if kept[row]:
                texts += [before + answer[: kept[row]], alone + answer[: kept[row]]]
                scored += [kept[row]] * 2
                of += [(row, 0), (row, 1)]
        nll = torch.full((len(prompts), 2), torch.nan, dtype=torch.float64)
        for number, value in self._mean_nll(model, texts, scored, passes):
            nll[of[number]] = value
        lengths = torch.tensor([len(answer) for answer in answers], dtype=torch.int64)
        return {
            "nll": nll[:, 0],
            "nll_alone": nll[:, 1],
            "solution_tokens": lengths,
            "truncated": torch.tensor(kept, dtype=torch.int64) < lengths,
        }

    def _mean_nll(
        self, model: nn.Module, texts: list[list[int]], scored: list[int], passes: int
    ) -> Iterator[tuple[int, float]]:
        for batch in self.batches(texts, passes):
            labels = torch.full_like(batch.input_ids, -100)
            for row, text in enumerate(batch.texts):
                own = slice(len(texts[text]) - scored[text], len(texts[text]))
                labels[row, own] = batch.input_ids[row, own]
            log_probs = bridge.label_log_probs(model, batch.input_ids, batch.attention_mask, labels)
            sums = log_probs.double().sum(dim=1).tolist()
            for row, text in enumerate(batch.texts):
                yield text, -sums[row] / scored[text]

    @override
    def tally(self, prompts: int, result: Mapping[str, torch.Tensor]) -> Tally:
        return Tally(prompts, note=f"{float(torch.nanmean(result['nll'])):.2f} nats per token")


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
        self, number: int, prompts: np.ndarray, calls: int, keep: bool
    ) -> dict[str, torch.Tensor]:
        texts = solutions(self.dataset, prompts, self.column)
        return {
            "solution_tokens": torch.tensor([len(self.encoder.text(text or "")) for text in texts])
        }
