"""Rows of a dataset → token ids, for the measures that read texts instead of rolling out.

A text is put together from token lists (prompt, then solution), never tokenized as a whole: what belongs to the
solution is then exact, whatever merges a tokenizer would make across the border.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import AutoTokenizer

from trl_learnalign import bridge
from trl_learnalign.data.prompts import prompt_contents

if TYPE_CHECKING:
    from trl import GRPOTrainer

_CONVERSATION = [{"role": "user", "content": "?"}]


class PromptEncoder:
    """Tokens of prompts and other texts, as one model reads them.

    Args:
        trainer (`GRPOTrainer`): The trainer; its policy's tokenizer, chat template and template settings are used.
        name (`str`, *optional*): Hub id or path of another model, to use its own. Conversations become plain text
            (contents, an empty line after each) if it has no chat template.
    """

    def __init__(self, trainer: GRPOTrainer, name: str | None = None):
        self._encode: Callable[[list[Any]], list[list[int]]]
        self._chat: dict[str, Any]
        if name is None:
            self.tokenizer = bridge.tokenizer(trainer)
            self._chat = bridge.chat_settings(trainer)
            self._encode = functools.partial(bridge.prompt_token_lists, trainer)
        else:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            self._chat = {}
            self._encode = self._prompts_of_other_model

    def prompts(self, prompts: Sequence[Any]) -> list[list[int]]:
        """Prompts as for generation: with chat template and generation prompt, or with special tokens."""
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
        """A text in the middle of things: without special tokens."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @property
    def special_start(self) -> list[int]:
        """The token that the tokenizer itself puts before a text, `[]` if it puts none."""
        first = self.tokenizer("")["input_ids"][:1]
        return first if first and first[0] == self.tokenizer.bos_token_id else []

    @property
    def start(self) -> list[int]:
        """One token that can precede a text: the start token, or, in models without, the end token."""
        token = self.tokenizer.bos_token_id
        return [self.tokenizer.eos_token_id if token is None else token]

    def before_solution(self, prompt: Any, kind: str) -> list[int]:
        """What a solution is read after when it is read without its prompt; never empty.

        Args:
            prompt (`str` or conversation): Any prompt of the dataset.
            kind (`str`): `"template"`: what the chat template puts between prompt and answer, after the start token
                if prompts begin with it; `"token"`, or without a chat template: [`start`] alone.
        """
        if kind == "token" or isinstance(prompt, str) or not self._has_template:
            return self.start
        # The generation prompt is what the template adds to a conversation when asked for it.
        (bare,) = self._templated([_CONVERSATION], False)
        (asking,) = self._templated([_CONVERSATION], True)
        generation_prompt = asking[len(bare) :]
        if asking[: len(bare)] != bare or not generation_prompt:
            return self.start
        begins_with_start = asking[:1] == [self.tokenizer.bos_token_id]
        return self.start + generation_prompt if begins_with_start else generation_prompt


def solutions(dataset: Any, prompts: np.ndarray, column: str) -> list[str | None]:
    """Reference solutions of some rows; `None` where there is none or it is blank."""
    values = dataset.with_format(None).select_columns([column])[prompts.tolist()][column]
    texts = ["" if value is None else str(value).strip() for value in values]
    return [text or None for text in texts]
