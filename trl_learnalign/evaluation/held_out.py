"""Accuracy on held-out prompts, graded by the same reward function as training."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from trl_learnalign import bridge
from trl_learnalign.distributed import Ranks
from trl_learnalign.evaluation.generators import Completion, completion_of, plain_decoding

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import GRPOTrainer

logger = logging.getLogger(__name__)


def held_out_accuracy(
    trainer: GRPOTrainer,
    dataset: Dataset,
    reward: Callable[..., Sequence[float | None]],
    threshold: float = 0.5,
) -> dict[str, Any]:
    """Greedy accuracy of the policy as it is; all ranks call it together.

    Prompts and the longest completion are those of training (`chat_template_kwargs`, `max_completion_length`);
    decoding is greedy without penalties, whatever the checkpoint's `generation_config` says.

    Args:
        trainer (`GRPOTrainer`): The trainer; borrow it with `trainer_bridge.left_as_found` (the callback does).
        dataset (`Dataset`): Held-out rows with the columns of training.
        reward (callable): The success reward, in TRL's form.
        threshold (`float`, *optional*, defaults to `0.5`): A completion is right above this value.

    Returns:
        `dict`: `accuracy` (share of right ones among all rows), `n_eval`, `unscorable` (rows whose reward was `None`;
        they count as wrong), `unfinished` (completions cut at `max_completion_length`; they are graded as they stand).

    Raises:
        `ValueError`: If the trainer has tools or environments: one greedy answer calls none.
    """
    _check_single_turn(trainer)
    ranks = Ranks(trainer.accelerator)
    share = math.ceil(len(dataset) / ranks.count)
    # All ranks generate equally often: with partitioned weights generation is a collective.
    own = [(ranks.index * share + i) % len(dataset) for i in range(share)]
    rows = [dataset[i] for i in own]
    completions = complete_greedily(trainer, [row["prompt"] for row in rows])
    values = grade(reward, rows, [completion.text for completion in completions])
    judged = zip(values, (completion.finished for completion in completions), strict=True)
    by_row = dict(ranks.gather(list(zip(own, judged, strict=True)))).values()
    right = sum(value is not None and value > threshold for value, _ in by_row)
    unscorable = sum(value is None for value, _ in by_row)
    unfinished = sum(not finished for _, finished in by_row)
    if unfinished and ranks.is_main:
        logger.warning(
            "Held-out accuracy: %d of %d completions were cut at max_completion_length=%d and graded as they stand.",
            *(unfinished, len(dataset), trainer.max_completion_length),
        )
    return {
        "accuracy": right / len(dataset),
        "n_eval": len(dataset),
        "unscorable": unscorable,
        "unfinished": unfinished,
    }


def _check_single_turn(trainer: GRPOTrainer) -> None:
    """One greedy answer for each prompt is no measure of a policy that calls tools in between."""
    if not trainer.tools and trainer.environment_factories is None:
        return
    names = [tool.__name__ for tool in trainer.tools]
    what = "environments" if trainer.environment_factories is not None else "tools"
    raise ValueError(
        f"held_out_accuracy generates one answer for each prompt and calls no tools, and this trainer has {what} "
        f"({', '.join(names)}): leave it out of on_phase_end and use TRL's own evaluation (eval_dataset, "
        "eval_strategy), which runs them."
    )


def grade(
    reward: Callable[..., Sequence[float | None]],
    rows: Sequence[dict[str, Any]],
    completions: Sequence[str],
) -> list[float | None]:
    """Rewards of completions, called in TRL's form: lists per column, completions like the prompts.

    Args:
        reward (callable): TRL reward function.
        rows (sequence of `dict`): Dataset rows.
        completions (sequence of `str`): One for each row.
    """
    columns = {
        name: [row[name] for row in rows]
        for name in rows[0]
        if name not in ("prompt", "completion")
    }
    conversational = not isinstance(rows[0]["prompt"], str)
    shaped = [
        [{"role": "assistant", "content": text}] if conversational else text for text in completions
    ]
    values = reward(prompts=[row["prompt"] for row in rows], completions=shaped, **columns)
    return [None if value is None or math.isnan(value) else float(value) for value in values]


def greedy_completions(trainer: GRPOTrainer, prompts: Sequence[Any]) -> list[str]:
    """Texts of [`complete_greedily`]."""
    return [completion.text for completion in complete_greedily(trainer, prompts)]


@torch.no_grad()
def complete_greedily(trainer: GRPOTrainer, prompts: Sequence[Any]) -> list[Completion]:
    """Greedy completions of prompts, in batches of `per_device_eval_batch_size`, of like length together.

    Args:
        trainer (`GRPOTrainer`): The trainer; its model is left in evaluation mode.
        prompts (sequence): Conversations or strings.
    """
    tokens = bridge.prompt_token_lists(trainer, list(prompts))
    pad, ends = bridge.pad_token_id(trainer), trainer.eos_token_ids
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
    with bridge.generation_model(trainer) as model, plain_decoding(model):
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            width = max(len(tokens[i]) for i in batch)
            ids = torch.tensor([[pad] * (width - len(tokens[i])) + tokens[i] for i in batch])
            mask = torch.tensor(
                [[0] * (width - len(tokens[i])) + [1] * len(tokens[i]) for i in batch]
            )
            made = model.generate(
                input_ids=ids.to(trainer.accelerator.device),
                attention_mask=mask.to(trainer.accelerator.device),
                generation_config=settings,
            )
            for i, row in zip(batch, made[:, width:].tolist(), strict=True):
                completions[i] = completion_of(bridge.tokenizer(trainer), row, ends)
    return [completions[i] for i in range(len(tokens))]
