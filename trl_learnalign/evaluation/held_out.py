"""Accuracy on held-out prompts, graded by the same reward function as training."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from trl_learnalign.bridge import inference
from trl_learnalign.bridge.inference import generation_model, pad_token_id, prompt_token_lists
from trl_learnalign.data.prompts import dataset_digest
from trl_learnalign.distributed import Ranks
from trl_learnalign.evaluation.generators import Completion, completion_of, plain_decoding
from trl_learnalign.evaluation.grading import grade

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import GRPOTrainer

logger = logging.getLogger(__name__)


def held_out_accuracy(
    trainer: GRPOTrainer,
    dataset: Dataset,
    reward: Callable[..., Any],
    threshold: float = 0.5,
) -> dict[str, Any]:
    """Greedy accuracy of the current policy; all ranks call it together.

    Prompts and the maximum completion length are those of training (`chat_template_kwargs`, `max_completion_length`).
    Decoding is greedy without penalties, regardless of the checkpoint's `generation_config`.

    Args:
        trainer (`GRPOTrainer`): The trainer; call this inside `preserve_trainer_state` (the callback does).
        dataset (`Dataset`): Held-out rows with the columns of training.
        reward (callable): The success reward, in any form that TRL accepts; it is called as in training.
        threshold (`float`, *optional*, defaults to `0.5`): A completion is correct above this value.

    Returns:
        `dict`: `accuracy` (share of correct rows among all rows), `n_eval`, `unscorable` (rows whose reward was
            `None`;
        they count as wrong), `unfinished` (completions truncated at `max_completion_length`; they are graded as they
        are), `right` (a string with `1` for each correct row and `0` for each other, in order) and `problems` (digest
        of the rows). The last two pair runs problem by problem.

    Raises:
        `ValueError`: If the trainer has tools or environments, which one greedy answer does not call.
    """
    _check_single_turn(trainer)
    ranks = Ranks(trainer.accelerator)
    outcomes = _outcomes(trainer, dataset, reward, ranks)
    values = [value for value, _ in outcomes]
    finished = [is_finished for _, is_finished in outcomes]
    right = [value is not None and value > threshold for value in values]
    unfinished = finished.count(False)
    if unfinished and ranks.is_main:
        logger.warning(
            "Held-out accuracy: %d of %d completions were cut off at max_completion_length=%d and graded without "
            "their end.",
            unfinished,
            len(dataset),
            trainer.max_completion_length,
        )
    return {
        "accuracy": sum(right) / len(dataset),
        "n_eval": len(dataset),
        "unscorable": values.count(None),
        "unfinished": unfinished,
        "right": "".join("1" if is_right else "0" for is_right in right),
        "problems": dataset_digest(dataset),
    }


def _outcomes(
    trainer: GRPOTrainer,
    dataset: Dataset,
    reward: Callable[..., Any],
    ranks: Ranks,
) -> list[tuple[float | None, bool]]:
    """Reward of each row, and whether its completion ended with an end token; each rank processes its share."""
    share = math.ceil(len(dataset) / ranks.count)
    # All ranks generate equally often, some repeat a row: with sharded weights generation is a collective.
    first = ranks.index * share
    numbers = [number % len(dataset) for number in range(first, first + share)]
    rows = [dataset[number] for number in numbers]
    completions = complete_greedily(trainer, [row["prompt"] for row in rows])
    texts = [completion.text for completion in completions]
    values = grade(reward, rows, texts, [completion.ids for completion in completions], trainer)
    outcomes = []
    for number, value, completion in zip(numbers, values, completions, strict=True):
        outcomes.append((number, (value, completion.finished)))
    by_row = dict(ranks.gather(outcomes))
    return [by_row[number] for number in range(len(dataset))]


def _check_single_turn(trainer: GRPOTrainer) -> None:
    """Refuse policies that call tools, which one greedy answer per prompt does not measure."""
    if not trainer.tools and trainer.environment_factories is None:
        return
    names = [tool.__name__ for tool in trainer.tools]
    what = "environments" if trainer.environment_factories is not None else "tools"
    raise ValueError(
        f"held_out_accuracy generates one answer per prompt and does not call tools, but this trainer has {what} "
        f"({', '.join(names)}): remove it from on_phase_end and use TRL's own evaluation (eval_dataset, "
        "eval_strategy), which calls them."
    )


def greedy_completions(trainer: GRPOTrainer, prompts: Sequence[Any]) -> list[str]:
    """Texts of [`complete_greedily`]."""
    return [completion.text for completion in complete_greedily(trainer, prompts)]


@torch.no_grad()
def complete_greedily(trainer: GRPOTrainer, prompts: Sequence[Any]) -> list[Completion]:
    """Greedy completions of prompts, in batches of `per_device_eval_batch_size` with similar lengths.

    Args:
        trainer (`GRPOTrainer`): The trainer; its model is left in evaluation mode.
        prompts (sequence): Conversations or strings.
    """
    tokens = prompt_token_lists(trainer, list(prompts))
    tokenizer, device = inference.tokenizer(trainer), trainer.accelerator.device
    pad, ends = pad_token_id(trainer), trainer.eos_token_ids
    settings = GenerationConfig(
        max_new_tokens=trainer.max_completion_length,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=ends,
    )
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    completions: dict[int, Completion] = {}
    size = trainer.args.per_device_eval_batch_size
    trainer.model.eval()
    with generation_model(trainer) as model, plain_decoding(model):
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            width = max(len(tokens[i]) for i in batch)
            ids = [[pad] * (width - len(tokens[i])) + tokens[i] for i in batch]
            mask = [[0] * (width - len(tokens[i])) + [1] * len(tokens[i]) for i in batch]
            sequences = model.generate(
                input_ids=torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                generation_config=settings,
            )
            answers = sequences[:, width:].tolist()
            for i, answer in zip(batch, answers, strict=True):
                completions[i] = completion_of(tokenizer, answer, ends)
    return [completions[i] for i in range(len(tokens))]
