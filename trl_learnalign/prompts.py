"""Prompts as users bring them: what cannot be rolled out is named before anything expensive happens.

Rows are never dropped silently: a pool that is not what the user thinks it is would be selected from, reported on and
cited. What can be trained on, however odd (any script, emoji, very long texts that fit, duplicates), is kept as it is.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from trl_learnalign import trainer_bridge as bridge

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import GRPOTrainer

logger = logging.getLogger(__name__)

_NAMED_ROWS = 5
_BATCH = 1000
# A chat template wraps a prompt in at most about so many tokens; only prompts nearer to the limit are tokenized.
_TEMPLATE_TOKENS = 1024


def check_prompts(dataset: Dataset) -> None:
    """Check each prompt: text, or a conversation whose messages have a role and text.

    Duplicates are reported and kept: each is a candidate of its own, with its own rollouts.

    Args:
        dataset (`datasets.Dataset`): With a column `prompt`.

    Raises:
        `ValueError`: Naming the rows, what is wrong with the first of them, and the remedy.
    """
    faults: list[tuple[int, str]] = []
    seen: set[int] = set()
    for row, prompt in _prompts(dataset):
        if fault := _fault(prompt):
            faults.append((row, fault))
        seen.add(hash(json.dumps(prompt, sort_keys=True, default=str)))
    if faults:
        raise ValueError(
            f"{len(faults)} of {len(dataset)} prompts cannot be used: {_rows(row for row, _ in faults)} (row "
            f"{faults[0][0]} {faults[0][1]}). Mend them, or leave them out: dataset = dataset.select([i for i in "
            "range(len(dataset)) if i not in bad_rows])."
        )
    if len(seen) < len(dataset):
        logger.warning(
            "%d of %d prompts are duplicates of others; each is scored and may be selected on its own. Leave them out "
            "if that is not what you want.",
            *(len(dataset) - len(seen), len(dataset)),
        )


def check_lengths(trainer: GRPOTrainer) -> None:
    """Check that each prompt and its longest completion fit into the model's context.

    Args:
        trainer (`GRPOTrainer`): With model, tokenizer and training dataset.

    Raises:
        `ValueError`: Naming the rows, the limit and the remedy.
    """
    context = _context_length(trainer)
    if context is None:
        return
    limit = context - trainer.args.max_completion_length
    if limit < 1:
        raise ValueError(
            f"max_completion_length={trainer.args.max_completion_length} leaves no room for a prompt in the model's "
            f"context of {context} tokens: lower it."
        )
    # A token stands for at least one byte.
    least = limit - _TEMPLATE_TOKENS
    doubtful = [(row, prompt) for row, prompt in _prompts(trainer.train_dataset) if _bytes(prompt) > least]
    lengths = {}
    for start in range(0, len(doubtful), _BATCH):
        part = doubtful[start : start + _BATCH]
        tokens = bridge.prompt_token_lists(trainer, [prompt for _, prompt in part])
        lengths.update({row: len(ids) for (row, _), ids in zip(part, tokens, strict=True)})
    long = [row for row, length in lengths.items() if length > limit]
    if long:
        raise ValueError(
            f"{len(long)} of {len(trainer.train_dataset)} prompts have more than {limit} tokens: {_rows(long)} (row "
            f"{long[0]} has {lengths[long[0]]}). With max_completion_length={trainer.args.max_completion_length} they "
            f"do not fit into the model's context of {context} tokens. Leave them out of the dataset, or lower "
            "max_completion_length."
        )


def _context_length(trainer: GRPOTrainer) -> int | None:
    own = getattr(trainer.model.config.get_text_config(), "max_position_embeddings", None)
    engine = trainer.args.vllm_max_model_length if trainer.args.use_vllm else None
    return min((length for length in (own, engine) if length), default=None)


def _prompts(dataset: Dataset) -> Iterator[tuple[int, Any]]:
    row = 0
    for batch in dataset.select_columns(["prompt"]).iter(batch_size=_BATCH):
        for prompt in batch["prompt"]:
            yield row, prompt
            row += 1


def _fault(prompt: Any) -> str | None:
    """What is wrong with a prompt, continuing "row 7 …"."""
    if prompt is None:
        return "is None"
    if isinstance(prompt, str):
        return None if prompt.strip() else "is empty"
    if not isinstance(prompt, Sequence):
        return f"is a {type(prompt).__name__}, neither text nor a list of messages"
    if not prompt:
        return "is a conversation without messages"
    if isinstance(prompt[0], str):
        return "is a list of strings; messages are dictionaries with role and content"
    for message in prompt:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f"has the message {str(message)[:60]!r} without a role"
    texts = [(message["role"], _text(message.get("content"))) for message in prompt]
    # An assistant's turn may hold tool calls alone.
    if any(text is None and role != "assistant" for role, text in texts):
        return "has a message without text (image and audio parts are not supported)"
    asks = any(text and text.strip() for role, text in texts if role != "system")
    return None if asks else "asks nothing: all its messages but the system's are empty"


def _text(content: Any) -> str | None:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        return None
    if any(part.get("type", "text") != "text" for part in content):
        return None
    return " ".join(part.get("text") or "" for part in content)


def _bytes(prompt: Any) -> int:
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False, default=str)
    return len(text.encode(errors="surrogatepass"))


def _rows(rows: Iterable[int]) -> str:
    rows = list(rows)
    named = ", ".join(map(str, rows[:_NAMED_ROWS]))
    return f"row{'s' if len(rows) > 1 else ''} {named}{', …' if len(rows) > _NAMED_ROWS else ''}"
