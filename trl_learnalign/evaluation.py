"""Accuracy on held-out prompts, graded by the same reward function as training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from trl_learnalign import trainer_bridge as bridge
from trl_learnalign.distributed import Ranks

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import GRPOTrainer


def held_out_accuracy(
    trainer: GRPOTrainer,
    dataset: Dataset,
    reward: Callable[..., Sequence[float | None]],
    threshold: float = 0.5,
) -> dict[str, Any]:
    """Greedy accuracy of the policy as it is; all ranks call it together.

    Args:
        trainer (`GRPOTrainer`): The trainer; borrow it with `trainer_bridge.left_as_found` (the callback does).
        dataset (`Dataset`): Held-out rows with the columns of training.
        reward (callable): The success reward, in TRL's form.
        threshold (`float`, *optional*, defaults to `0.5`): A completion is right above this value.

    Returns:
        `dict`: `accuracy` (share of right ones among all rows), `n_eval`, `unscorable` (rows whose reward was `None`;
        they count as wrong).
    """
    ranks = Ranks(trainer.accelerator)
    share = math.ceil(len(dataset) / ranks.count)
    # All ranks generate equally often: with partitioned weights generation is a collective.
    own = [(ranks.index * share + i) % len(dataset) for i in range(share)]
    rows = [dataset[i] for i in own]
    completions = greedy_completions(trainer, [row["prompt"] for row in rows])
    judged = list(zip(own, grade(reward, rows, completions), strict=True))
    by_row = dict(ranks.gather(judged))
    right = sum(value is not None and value > threshold for value in by_row.values())
    unscorable = sum(value is None for value in by_row.values())
    return {"accuracy": right / len(dataset), "n_eval": len(dataset), "unscorable": unscorable}


def grade(
    reward: Callable[..., Sequence[float | None]], rows: Sequence[dict[str, Any]], completions: Sequence[str]
) -> list[float | None]:
    """Rewards of completions, called in TRL's form: lists per column, completions like the prompts.

    Args:
        reward (callable): TRL reward function.
        rows (sequence of `dict`): Dataset rows.
        completions (sequence of `str`): One for each row.
    """
    columns = {name: [row[name] for row in rows] for name in rows[0] if name not in ("prompt", "completion")}
    conversational = not isinstance(rows[0]["prompt"], str)
    shaped = [[{"role": "assistant", "content": text}] if conversational else text for text in completions]
    values = reward(prompts=[row["prompt"] for row in rows], completions=shaped, **columns)
    return [None if value is None or math.isnan(value) else float(value) for value in values]


@torch.no_grad()
def greedy_completions(trainer: GRPOTrainer, prompts: Sequence[Any]) -> list[str]:
    """Greedy completions of prompts, in batches of `per_device_eval_batch_size`, of like length together."""
    tokens = bridge.prompt_token_lists(trainer, list(prompts))
    pad, eos = bridge.pad_token_id(trainer), trainer.eos_token_ids
    settings = GenerationConfig(
        max_new_tokens=trainer.max_completion_length, do_sample=False, pad_token_id=pad, eos_token_id=eos
    )
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    texts = [""] * len(tokens)
    size = trainer.args.per_device_eval_batch_size
    trainer.model.eval()
    with bridge.generation_model(trainer) as model:
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            width = max(len(tokens[i]) for i in batch)
            ids = torch.tensor([[pad] * (width - len(tokens[i])) + tokens[i] for i in batch])
            mask = torch.tensor([[0] * (width - len(tokens[i])) + [1] * len(tokens[i]) for i in batch])
            made = model.generate(
                input_ids=ids.to(trainer.accelerator.device),
                attention_mask=mask.to(trainer.accelerator.device),
                generation_config=settings,
            )
            decoded = trainer.processing_class.batch_decode(made[:, width:], skip_special_tokens=True)
            for i, text in zip(batch, decoded, strict=True):
                texts[i] = text
    return texts
