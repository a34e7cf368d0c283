"""Rollouts by the trainer's own generation, and the generation that training is using."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import set_seed
from trl.trainer import utils as trl_utils

from trl_learnalign.bridge import rollout_rows
from trl_learnalign.bridge.logs import unbounded
from trl_learnalign.bridge.requires import (
    Called,
    MethodPatch,
    Replaced,
    Required,
    overridden,
    unwrapping_options,
)
from trl_learnalign.bridge.rollout_rows import Batch

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
    inputs = rollout_rows.without_images(inputs)
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


# ---- Batches of rollouts --------------------------------------------------------------------------------------------

ROLLOUTS_REQUIRES = Required(trainer=("_calculate_rewards", "_metrics", "_logs"))

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class RolledOut:
    """All groups of rollouts of one generation, the same on every process.

    Args:
        micro_step (`int`): The trainer's micro-step that the generation begins with.
        asked_rows (`np.ndarray`): Rows of the dataset that dynamic sampling has asked for besides, `int64` `(E,)`.
        rewards (`torch.Tensor`): `(P + E, G, F)`, NaN where a function returned `None`: first the `P` prompts of the
            trainer's sampler in its order, then those of `asked_rows`.
        useful (`np.ndarray`): Which groups have a gradient, `bool` `(P + E,)`: some rollout has an advantage, beyond
            rounding, and a token that the loss is over.
        trained (`np.ndarray`): Which groups are trained on, `bool` `(P + E,)`: `P` of them.
    """

    micro_step: int
    asked_rows: np.ndarray
    rewards: torch.Tensor
    useful: np.ndarray
    trained: np.ndarray


@dataclass(frozen=True)
class RolloutBatch:
    """Rollouts of one batch of prompts; `R` of them over all processes.

    Args:
        rows (`dict`): TRL's inputs of the loss, of this process.
        rewards (`torch.Tensor`): Of all processes, `(R, F)`, NaN where a function returned `None`.
        sizes (`np.ndarray`): Sizes of the advantages of all processes, 0 where no token counts, `(R,)`.
        metrics (`dict`): What TRL collected for its log.
        logs (`dict`): What TRL collected for its table of completions, of all processes.
    """

    rows: Batch
    rewards: torch.Tensor
    sizes: np.ndarray
    metrics: dict[str, list[float]]
    logs: dict[str, Any]


def collect_rollouts(
    trainer: GRPOTrainer, generate: Callable[[Rows], Batch], rows: Rows
) -> RolloutBatch:
    """Roll a batch of prompts out, with logs of its own; all processes call it together, with equally many rows.

    Args:
        trainer (`GRPOTrainer`): The trainer, in training mode.
        generate (callable): Its `_generate_and_score_completions`.
        rows (`list[dict]`): Rows of the dataset of this process, each once for each rollout.
    """
    metrics, logs = trainer._metrics, trainer._logs
    trainer._metrics, trainer._logs = unbounded(metrics), unbounded(logs)
    try:
        batch, rewards = generate_rollouts(trainer, generate, rows)
        collected = trainer._metrics["train"], trainer._logs
    finally:
        trainer._metrics, trainer._logs = metrics, logs
    return RolloutBatch(batch, rewards.cpu(), gathered_sizes(trainer, batch), *collected)


def gathered_sizes(trainer: GRPOTrainer, batch: Batch) -> np.ndarray:
    """Sizes of the advantages of all processes, 0 where no token counts, `(R,)`."""
    counted = rollout_rows.loss_mask(batch).sum(dim=1) > 0
    sizes = trainer.accelerator.gather(rollout_rows.advantage_sizes(batch) * counted)
    return sizes.cpu().numpy()


def generate_rollouts(
    trainer: GRPOTrainer, generate: Callable[[Rows], Batch], rows: Rows
) -> tuple[Batch, torch.Tensor]:
    """TRL's inputs of the loss, and the rewards of all processes `(R, F)`; advantages are 0 where rewards are equal.

    The mean of equal rewards is not always that reward: of eight times 0.1 it is off by one in the last place, and
    divided by a deviation of 0 + 1e-4 that is an advantage of 7e-5, for a prompt of which nothing can be learned.

    Args:
        trainer (`GRPOTrainer`): The trainer, in training mode.
        generate (callable): Its `_generate_and_score_completions`, or what stands for it.
        rows (`list[dict]`): As in [`collect_rollouts`].
    """
    batch, rewards = rewarded(trainer, generate, rows)
    # What stands for it may put a batch together from several; each of them has been here then.
    if len(rewards) == rollout_rows.row_count(batch) * trainer.accelerator.num_processes:
        _silence(trainer, batch, silent_groups(trainer, rewards))
    return batch, rewards


def rewarded(
    trainer: GRPOTrainer, generate: Callable[[Rows], Batch], rows: Rows
) -> tuple[Batch, torch.Tensor]:
    """As [`generate_rollouts`], with the advantages as TRL has them; rewards of all batches that it was made up of."""
    calculate = trainer._calculate_rewards
    rewards: list[torch.Tensor] = []

    def keep_rewards(*args: Any, **kwargs: Any) -> torch.Tensor:
        rewards.append(calculate(*args, **kwargs))
        return rewards[-1]

    with overridden(trainer, "_calculate_rewards", keep_rewards):
        batch = generate(rows)
    return batch, torch.cat(rewards)


def silent_groups(trainer: GRPOTrainer, rewards: torch.Tensor) -> torch.Tensor:
    """Groups whose rollouts all earned the same, `bool` `(P,)`: their advantages are 0 but for rounding.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        rewards (`torch.Tensor`): `(R, F)`, NaN where a function returned `None`.
    """
    weights = trainer.reward_weights.to(rewards)
    if trainer.multi_objective_aggregation == "sum_then_normalize":
        # Added up as TRL does, so that what is equal there is equal here.
        unscorable = torch.isnan(rewards).all(dim=1)
        total = (rewards * weights).nansum(dim=1)
        rewards = torch.where(unscorable, torch.nan, total).unsqueeze(1)
    groups = rewards.view(-1, trainer.num_generations, rewards.shape[1])
    judged = ~torch.isnan(groups)
    largest = torch.where(judged, groups, -torch.inf).amax(dim=1)
    smallest = torch.where(judged, groups, torch.inf).amin(dim=1)
    return (largest <= smallest).all(dim=1)


def _silence(trainer: GRPOTrainer, batch: Batch, silent: torch.Tensor) -> None:
    """Set the advantages of some groups to 0, in the batch and in the table of completions."""
    rows = silent.repeat_interleave(trainer.num_generations)
    count = rollout_rows.row_count(batch)
    first = trainer.accelerator.process_index * count
    own = rows[first : first + count]
    batch["advantages"] = torch.where(own, 0.0, batch["advantages"])
    column = trainer._logs["advantages"]
    for place, is_silent in enumerate(reversed(rows.tolist()), start=1):
        if is_silent and place <= len(column):
            column[-place] = 0.0


# ---- Observation of training's generations --------------------------------------------------------------------------
# A group has a gradient if a rollout of it has an advantage (beyond the rounding of TRL's means) and a token that the
# loss is over. That is said here and nowhere else; `dynamic_sampling` says it of more than is trained on.

logger = logging.getLogger(__name__)

WATCH_REQUIRES = Required(
    trainer=("_step",),
    calls={
        "_prepare_inputs": Replaced(("generation_batch",)),
        "_generate_and_score_completions": Replaced(("inputs",)),
    },
)
WATCH_NEEDS = (WATCH_REQUIRES, ROLLOUTS_REQUIRES)


class Watch:
    """Shows each generation of training, on all processes alike; what is trained on does not change by it.

    Evaluation, and what else calls the trainer's generation, is not shown.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        observe (callable): Is given what was rolled out, once for each generation.
    """

    def __init__(self, trainer: GRPOTrainer, observe: Callable[[RolledOut], None]):
        self.trainer = trainer
        self._observe = observe
        self._has_warned = False
        self._give = trainer._prepare_inputs
        MethodPatch([(trainer, "_prepare_inputs", self._prepare_inputs)])

    def _prepare_inputs(self, generation_batch: Any) -> Batch:
        if not self.trainer.model.training:
            return self._give(generation_batch)
        generate = self.trainer._generate_and_score_completions
        made: list[RolledOut | None] = []

        def generate_and_look(rows: Rows) -> Batch:
            batch, rewards = rewarded(self.trainer, generate, rows)
            made.append(self._rolled_out(batch, rewards))
            return batch

        with overridden(self.trainer, "_generate_and_score_completions", generate_and_look):
            inputs = self._give(generation_batch)
        self._show(made)
        return inputs

    def _show(self, made: list[RolledOut | None]) -> None:
        """Show what was made for one micro-step: nothing, or a generation."""
        if len(made) == 1 and made[0] is not None:
            self._observe(made[0])
        elif made and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "What generations come to is not noted: something else than TRL puts them together."
            )

    def _rolled_out(self, batch: Batch, rewards: torch.Tensor) -> RolledOut | None:
        """A generation before it is shuffled; `None` if it is not as TRL makes it."""
        trainer = self.trainer
        if len(rewards) != trainer.args.generation_batch_size:
            return None
        sizes = gathered_sizes(trainer, batch)
        rows = rollout_rows.has_gradient(sizes, float(sizes.max()))
        silent = silent_groups(trainer, rewards).cpu().numpy()
        useful = rows.reshape(-1, trainer.num_generations).any(axis=1) & ~silent
        return RolledOut(
            micro_step=trainer._step,
            asked_rows=np.empty(0, dtype=np.int64),
            rewards=rewards.cpu().view(-1, trainer.num_generations, rewards.shape[1]),
            useful=useful,
            trained=np.ones(len(useful), dtype=bool),
        )
