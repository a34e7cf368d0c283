"""Measurements that read texts and generate nothing: likelihoods, ratings, hidden states.

A text is concatenated from token lists (prompt, then solution) and never tokenized as a whole. So the tokens of the
solution are exact, and no tokenizer can merge characters across the border.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer
from typing_extensions import override

from trl_learnalign import rng
from trl_learnalign.bridge.hooks import preserve_trainer_state
from trl_learnalign.bridge.inference import (
    chat_settings,
    label_log_probs,
    last_hidden_states,
    next_token_logits,
    pad_token_id,
    prompt_token_lists,
    reading_model,
    tokenizer,
)
from trl_learnalign.data.prompts import prompt_contents, prompt_question, prompts_of
from trl_learnalign.measuring.base import FEATURES, ROWS, TOKENS_READ, Context, Measure, Tally
from trl_learnalign.selectors import (
    HIDDEN,
    LENGTHS,
    LIKELIHOODS,
    RATINGS,
    Selector,
    solution_column,
)

if TYPE_CHECKING:
    from trl import GRPOTrainer


_CONVERSATION = [{"role": "user", "content": "?"}]


class PromptEncoder:
    """Tokenizes prompts and other texts for one model.

    Args:
        trainer (`GRPOTrainer`): The trainer; its policy's tokenizer, chat template and template settings are used.
        name (`str`, *optional*): Hub id or path of another model, to use its tokenizer. If that has no chat template,
            conversations become plain text (contents, an empty line after each).
    """

    def __init__(self, trainer: GRPOTrainer, name: str | None = None):
        self._encode: Callable[[list[Any]], list[list[int]]]
        self._chat: dict[str, Any]
        if name is None:
            self.tokenizer = tokenizer(trainer)
            self._chat = chat_settings(trainer)
            self._encode = functools.partial(prompt_token_lists, trainer)
        else:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            self._chat = {}
            self._encode = self._prompts_of_other_model

    def prompts(self, prompts: Sequence[Any]) -> list[list[int]]:
        """Tokenize prompts as for generation: with chat template and generation prompt, or with special tokens."""
        return self._encode(list(prompts)) if prompts else []

    def _prompts_of_other_model(self, prompts: list[Any]) -> list[list[int]]:
        if isinstance(prompts[0], str):
            return self.tokenizer(prompts)["input_ids"]
        if self._has_template:
            return self._templated(prompts, True)
        texts = []
        for prompt in prompts:
            turns = [f"{text}\n\n" for text in prompt_contents(prompt)]
            texts.append("".join(turns))
        return self.tokenizer(texts)["input_ids"]

    @property
    def _has_template(self) -> bool:
        return bool(self._chat.get("chat_template") or self.tokenizer.chat_template)

    def _templated(self, conversations: list[Any], generation_prompt: bool) -> list[list[int]]:
        return self.tokenizer.apply_chat_template(
            conversations,
            add_generation_prompt=generation_prompt,
            tokenize=True,
            return_dict=True,
            **self._chat,
        )["input_ids"]

    def text(self, text: str) -> list[int]:
        """Tokenize a text without special tokens, for use inside a sequence."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @property
    def special_start(self) -> list[int]:
        """Return the token that the tokenizer itself puts before a text, `[]` if there is none."""
        first = self.tokenizer("")["input_ids"][:1]
        return first if first and first[0] == self.tokenizer.bos_token_id else []

    @property
    def start(self) -> list[int]:
        """Return one token that can precede a text: the start token, or the end token in models without one."""
        token = self.tokenizer.bos_token_id
        return [self.tokenizer.eos_token_id if token is None else token]

    def before_solution(self, prompt: Any, kind: str) -> list[int]:
        """Return the tokens that precede a solution that is read without its prompt; never empty.

        Args:
            prompt (`str` or conversation): Any prompt of the dataset.
            kind (`str`): `"template"`: the chat template's tokens between prompt and answer, after the start token
                if prompts begin with it; `"token"`, or without a chat template: [`start`] alone.
        """
        if kind == "token" or isinstance(prompt, str) or not self._has_template:
            return self.start
        # The generation prompt is what the template adds to a conversation on request.
        (bare,) = self._templated([_CONVERSATION], False)
        (asking,) = self._templated([_CONVERSATION], True)
        generation_prompt = asking[len(bare) :]
        if asking[: len(bare)] != bare or not generation_prompt:
            return self.start
        begins_with_start = asking[:1] == [self.tokenizer.bos_token_id]
        return self.start + generation_prompt if begins_with_start else generation_prompt


def solutions(dataset: Any, prompts: np.ndarray, column: str) -> list[str | None]:
    """Return the reference solutions of some rows; `None` for missing or blank ones."""
    values = dataset.with_format(None).select_columns([column])[prompts.tolist()][column]
    texts = ["" if value is None else str(value).strip() for value in values]
    return [text or None for text in texts]


# ---- Batches of texts -----------------------------------------------------------------------------------------------
# Texts are padded on the right. So the positions of a text, and with a causal model everything that is computed from
# it, do not depend on its neighbours. A pass has a fixed number of texts, whatever their lengths. So all ranks know
# the number of passes in advance, and make equally many.


@dataclass(frozen=True)
class TextBatch:
    """Texts of one forward pass.

    Args:
        texts (`tuple[int]`): Numbers of the texts, `R'` of them; the batch may have one more row without a text.
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
    """Yield batches of texts of similar length, then empty batches until there are `passes`.

    Args:
        texts (sequence of token lists): Texts, none of them empty.
        rows (`int`): Texts per batch.
        passes (`int`): Number of batches, at least as many as the texts take.
        pad_token_id (`int`): Padding token.
        device (`torch.device`): Device of the batches.
    """
    # Longest first, so that an out-of-memory error occurs at once.
    order = sorted(range(len(texts)), key=lambda i: (-len(texts[i]), i))
    for first in range(0, passes * rows, rows):
        numbers = order[first : first + rows]
        # An empty batch still needs a row for the forward pass.
        tokens = [list(texts[i]) for i in numbers] or [[pad_token_id, pad_token_id]]
        width = max(map(len, tokens))
        ids = torch.tensor([row + [pad_token_id] * (width - len(row)) for row in tokens])
        lengths = torch.tensor([len(row) for row in tokens])
        mask = (torch.arange(width) < lengths.unsqueeze(1)).long()
        yield TextBatch(tuple(numbers), ids.to(device), mask.to(device))


class ReadingMeasure(Measure):
    """Reads a few texts per prompt with a model.

    Args:
        context (`Context`): Trainer and options for measuring.
        column (`str`, *optional*): Column of reference solutions, for measures that read them.
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
        # The tokens of one prompt identify the tokenizer, the chat template and its settings.
        sample = self.encoder.prompts(list(prompts_of(self.dataset, [0])))
        return {
            "read_by": self.model_name or "policy",
            "tokens": rng.digest(sample),
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
            preserve_trainer_state(self.trainer),
            reading_model(self.trainer, self.model_name) as model,
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
        """Measure some prompts, or none, in exactly `passes` forward passes."""

    def limit(self, model: Any) -> int:
        """Return the maximum number of tokens of a text that settings and model allow."""
        most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        return min(self.config.max_text_tokens, most or self.config.max_text_tokens)

    def batches(self, texts: Sequence[Sequence[int]], passes: int) -> Iterator[TextBatch]:
        """Yield the texts in forward passes."""
        self._tokens_read += sum(map(len, texts))
        # Padding is masked, so any token of another model's vocabulary works.
        pad = pad_token_id(self.trainer) if self.model_name is None else 0
        device = self.trainer.accelerator.device
        return text_batches(texts, self.config.text_batch_size, passes, pad, device)


# ---- Likelihood of reference solutions ------------------------------------------------------------------------------
# The solution is read twice. *Given the prompt*: after the prompt as for generation, with chat template and generation
# prompt. The last prompt token predicts the first solution token. *Alone* (Cherry_LLM): `solution_start` decides what
# predicts the first token:
#
# - `"template"`: the chat template's generation prompt (after the start token, if templated prompts begin with one).
#   The code of Cherry_LLM likewise has `### Response:` before the solution. Prompts in plain text have no template;
#   for them it equals `"token"`.
# - `"token"`: the tokenizer's start token alone, or its end token if it has no start token. In the paper's formula
#   nothing precedes the first token, but a model needs an input there.
#
# Both means are over the same tokens, including the first one and without an end token, so their ratio is meaningful.
# A solution that is too long together with its prompt is cut in both readings.


@dataclass(frozen=True)
class _Reading:
    """Tokens of context and solution, the solution's length, and the result's place (prompt; 0 given, 1 alone)."""

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
        lengths = []  # of the solutions, after cutting
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
            labels = torch.full_like(batch.input_ids, -100)  # ignored by the loss
            for row, number in enumerate(batch.texts):
                end = len(readings[number].tokens)
                solution = slice(end - readings[number].solution_length, end)
                labels[row, solution] = batch.input_ids[row, solution]
            log_probs = label_log_probs(model, batch.input_ids, batch.attention_mask, labels)
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
        context (`Context`): Trainer and options for measuring.
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
        vocabulary = rng.digest(self.encoder.tokenizer.get_vocab())
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


# ---- Ratings (SelectIT) ---------------------------------------------------------------------------------------------
# Each pair of question and solution is shown below five wordings of the same request, and the probabilities of "1" to
# "5" as the next token are saved. As in SelectIT, the text is plain: there is no chat template, and system messages
# are left out. The wordings are ours.

RATING_TEXTS = ("1", "2", "3", "4", "5")
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
            "rating_prompts": rng.digest([*RATING_PROMPTS, _ENDING]),
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
        probabilities = torch.zeros(len(texts), len(RATING_TEXTS), dtype=torch.float64)
        for batch in self.batches(texts, passes):
            logits = next_token_logits(model, batch.input_ids, batch.attention_mask)
            chances = torch.softmax(logits.float(), dim=1)[:, self.rating_ids]
            # The batch may have one more row without a text.
            probabilities[list(batch.texts)] = chances[: len(batch.texts)].double().cpu()
        shape = (len(RATING_PROMPTS), len(RATING_TEXTS))
        ratings = torch.full((len(prompts), *shape), torch.nan, dtype=torch.float64)
        ratings[rows] = probabilities.view(len(rows), *shape)
        return {"ratings": ratings}

    def _text(self, wording: str, pair: str, limit: int) -> list[int]:
        """Return the tokens of a rating prompt; if it is too long, the end of the response is cut."""
        ending = self.encoder.text(_ENDING)
        body = [*self.encoder.special_start, *self.encoder.text(f"{wording}\n\n{pair}")]
        room = max(0, limit - len(ending))
        return body[:room] + ending


def rating_ids(encoder: PromptEncoder) -> list[int]:
    """Return the token ids of the ratings after a rating prompt.

    Raises:
        `ValueError`: If a rating is not a single token, or two ratings share one.
    """
    tokenizer = encoder.tokenizer
    before = encoder.text(_ENDING)
    texts = [encoder.text(_ENDING + rating) for rating in RATING_TEXTS]
    # A merge across the border would change the tokens before it.
    is_apart = all(tokens[: len(before)] == before for tokens in texts)
    after = [tokens[len(before) :] for tokens in texts]
    ids = [tokens[0] for tokens in after if len(tokens) == 1]
    are_distinct = len(set(ids)) == len(RATING_TEXTS) and tokenizer.unk_token_id not in ids
    if is_apart and are_distinct:
        return ids
    readings = ", ".join(
        f"{rating!r}: {tokenizer.convert_ids_to_tokens(tokens)}"
        for rating, tokens in zip(RATING_TEXTS, after, strict=True)
    )
    raise ValueError(
        "selectit needs each rating from 1 to 5 to be one token, but the tokenizer of "
        f"{tokenizer.name_or_path or 'the policy'} has no five distinct ones ({readings}): name a model that has "
        "them with likelihood_model, or choose another selector."
    )


# ---- Hidden states (RDS+) -------------------------------------------------------------------------------------------


class HiddenMeasure(ReadingMeasure):
    """Position-weighted mean of the policy's last hidden layer, normalised (RDS+, Ivison et al., 2025).

    The layer is taken after the final norm (`last_hidden_state` in transformers). Token `i` of `n` has weight
    `i / (1 + … + n)`: with a causal model, later tokens have seen more context. Padding has no weight.

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
            states = last_hidden_states(model, batch.input_ids, batch.attention_mask)
            means = position_weighted_mean(states, batch.attention_mask)
            directions = torch.nn.functional.normalize(means, dim=1)
            # An empty batch only keeps collectives in sync.
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
        """Return H."""
        return int(model.config.get_text_config().hidden_size)


def position_weighted_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return `Σ_i i h_i / Σ_i i` over the tokens that are not padding, in float64.

    Args:
        hidden (`torch.Tensor`): `(R, L, H)`.
        mask (`torch.Tensor`): `(R, L)`, 0 for padding on the right.

    Returns:
        `torch.Tensor`: `(R, H)`.
    """
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    weights = mask.double() * places
    weights = weights / weights.sum(dim=1, keepdim=True)
    # Hidden states of padding are arbitrary and may be NaN.
    states = torch.where(mask.bool().unsqueeze(2), hidden.double(), 0.0)
    return (states * weights.unsqueeze(2)).sum(dim=1)


def text_measures(context: Context, selector: Selector) -> list[Measure]:
    """Return the measures that read texts for a selector; no model is loaded.

    Raises:
        `ValueError`, `OSError`: If a tokenizer does not fit, or cannot be loaded.
    """
    column = solution_column(context.dataset.column_names, context.config)
    reader = context.config.likelihood_model
    measures: list[Measure] = []
    if LIKELIHOODS in selector.needs:
        measures.append(LikelihoodMeasure(context, column, reader))
    if RATINGS in selector.needs:
        measures.append(RatingMeasure(context, column, reader))
    if HIDDEN in selector.needs:
        measures.append(HiddenMeasure(context, column))
    if LENGTHS in selector.needs and LIKELIHOODS not in selector.needs:
        assert column is not None
        measures.append(LengthMeasure(context, column))
    return measures
