"""Rollouts with the trainer's own generation, rewards and advantages, and the generation that is under way."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import set_seed
from trl.trainer import utils as trl_utils

from trl_learnalign.bridge import image_rows
from trl_learnalign.bridge.required import Called, Required
from trl_learnalign.bridge.versions.generation_options import unwrapping_options

if TYPE_CHECKING:
    from trl import GRPOTrainer

REQUIRES = Required(
    trainer=(
        "_calculate_rewards",
        "_step",
        "_buffered_inputs",
    ),
    calls={
        "_remove_unused_columns": Called(1),
        "_generate_and_score_completions": Called(1),
    },
    functions={"trl.trainer.utils:nanstd": Called(1, ("dim", "keepdim"))},
    sometimes={"vllm_generation": lambda trainer: has_shared_engine(trainer)},
)


def is_mid_generation(trainer: GRPOTrainer) -> bool:
    """Whether the next micro-step goes on with a generation rather than beginning one."""
    return trainer._step % (trainer.args.steps_per_generation * trainer.num_iterations) != 0


def buffered_generation(trainer: GRPOTrainer) -> list[dict[str, Any]] | None:
    """The generation that is still being trained on, or `None` if the next micro-step begins a new one."""
    return trainer._buffered_inputs if is_mid_generation(trainer) else None


def restore_generation(trainer: GRPOTrainer, batches: list[dict[str, Any]]) -> None:
    """Put back what [`buffered_generation`] gave, on this process's device."""
    device = trainer.accelerator.device
    trainer._buffered_inputs = [
        {
            key: value.to(device) if isinstance(value, torch.Tensor) else value
            for key, value in batch.items()
        }
        for batch in batches
    ]


def training_rows(trainer: GRPOTrainer, dataset: Any, rows: Sequence[int]) -> list[dict[str, Any]]:
    """Rows of a dataset as the trainer's dataloader hands them to generation and rewards.

    That is with the dataset's format or transform, and without the columns that `remove_unused_columns` takes away.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        dataset (`datasets.Dataset`): The training dataset, or one with its columns.
        rows (sequence of `int`): Which ones; a row may come several times.
    """
    # What the dataloader's fetcher calls: under the format "pandas" a single row is no dictionary, a list of rows is.
    return trainer._remove_unused_columns(dataset).__getitems__(list(rows))


def roll_out(
    trainer: GRPOTrainer, rows: Sequence[dict[str, Any]], seed: int
) -> tuple[dict[str, Any], torch.Tensor]:
    """Rollouts of `rows` with the trainer's own generation, rewards and advantages. Call inside [`left_as_found`].

    All processes must call it together with equally many rows: TRL gathers the rewards.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        rows (sequence of `dict`): Dataset rows of this process, each prompt `G` times in a row.
        seed (`int`): Seeds Python, NumPy and torch: nothing that was before matters, but to a vLLM server.

    Returns:
        `tuple[dict, torch.Tensor]`: TRL's inputs of the loss, of images their numbers alone, and the rewards per
        function, `(len(rows), F)`, NaN where a function returned `None`.
    """
    rewards: list[torch.Tensor] = []
    calculate, scale_rewards = trainer._calculate_rewards, trainer.scale_rewards

    def keep_rewards(*args: Any, **kwargs: Any) -> torch.Tensor:
        try:
            rewards.append(calculate(*args, **kwargs))
        except Exception as error:
            raise RuntimeError(
                f"A reward function failed on rollouts of the scoring pass ({type(error).__name__}: {error}). It gets "
                "prompts, completions and the other columns as keywords and returns a list with one number, or None "
                "where it cannot judge, for each completion. Mend it and run the same command again: finished shards "
                "stay."
            ) from error
        return rewards[-1]

    trainer.model.train()  # TRL reads the number of rollouts off the mode
    set_seed(_seed_of_engine(trainer, seed))
    try:
        trainer._calculate_rewards = keep_rewards  # type: ignore[method-assign]
        # Scaling by the batch's deviation would tie a prompt's advantages to its neighbours. Left out, it is the same
        # gradient up to a positive factor: `check_objective` has refused terms that it would not scale.
        if scale_rewards == "batch":
            trainer.scale_rewards = "none"
        # A copy: TRL writes extra fields of a rollout function into the rows.
        inputs = trainer._generate_and_score_completions([dict(row) for row in rows])
    finally:
        del trainer._calculate_rewards
        trainer.scale_rewards = scale_rewards
    inputs = image_rows.without_images(inputs)
    first = trainer.accelerator.process_index * len(rows)
    own = rewards[-1][first : first + len(rows)]
    if trainer.multi_objective_aggregation == "normalize_then_sum":
        inputs["advantages"] = _sums_of_normalized(trainer, own).to(inputs["advantages"])
    return inputs, own


def has_shared_engine(trainer: GRPOTrainer) -> bool:
    """Whether several processes are one vLLM engine (tensor parallelism within the trainer's own processes)."""
    is_here = trainer.use_vllm and trainer.vllm_mode == "colocate"
    return bool(is_here and trainer.vllm_tensor_parallel_size > 1)


def _seed_of_engine(trainer: GRPOTrainer, seed: int) -> int:
    """The seed of the first of the processes that are one engine: each of them has to draw the same tokens."""
    if not has_shared_engine(trainer):
        return seed
    group = trainer.vllm_generation.tp_group
    shared = [seed]
    first = torch.distributed.get_global_rank(group, 0)
    torch.distributed.broadcast_object_list(shared, src=first, group=group)
    return int(shared[0])


def _sums_of_normalized(trainer: GRPOTrainer, rewards: torch.Tensor) -> torch.Tensor:
    """TRL's advantages of `normalize_then_sum` `(R,)` before it scales them by their deviation over the batch.

    Within a prompt each reward `(R, F)` is normalised, and the weighted sum has mean 0 already. The last scaling is a
    positive factor that all prompts of a call share, and would tie them to their neighbours.
    """
    grouped = rewards.view(-1, trainer.num_generations, rewards.shape[1])
    deviation = trl_utils.nanstd(grouped, dim=1, keepdim=True)
    normalized = (grouped - grouped.nanmean(dim=1, keepdim=True)) / (deviation + 1e-4)
    return (normalized * trainer.reward_weights.to(rewards.device)).nansum(dim=2).flatten()


def generation_model(trainer: GRPOTrainer) -> AbstractContextManager[Any]:
    """Context manager that yields the policy ready for `generate`, as TRL itself prepares it."""
    from trl.models.utils import unwrap_model_for_generation

    return unwrap_model_for_generation(
        trainer.model_wrapped,
        trainer.accelerator,
        **unwrapping_options(trainer),
    )
