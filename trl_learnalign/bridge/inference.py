"""The policy without gradients: rollouts by the trainer's own generation, and forward passes over texts."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations import deepspeed as hf_deepspeed
from trl.trainer import utils as trl_utils

from trl_learnalign.bridge import rollout_rows
from trl_learnalign.bridge.logs import unbounded
from trl_learnalign.bridge.policy import lm_head, without_peft
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


logger = logging.getLogger(__name__)


GENERATION_REQUIRES = Required(
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
    """Whether the next micro-step continues a generation instead of starting one."""
    return trainer._step % (trainer.args.steps_per_generation * trainer.num_iterations) != 0


def buffered_generation(trainer: GRPOTrainer) -> list[dict[str, Any]] | None:
    """The generation still in use by training, or `None` if the next micro-step starts a new one."""
    return trainer._buffered_inputs if is_mid_generation(trainer) else None


def restore_generation(trainer: GRPOTrainer, batches: list[dict[str, Any]]) -> None:
    """Restore what [`buffered_generation`] returned, on this process's device."""
    device = trainer.accelerator.device
    trainer._buffered_inputs = [
        {
            key: value.to(device) if isinstance(value, torch.Tensor) else value
            for key, value in batch.items()
        }
        for batch in batches
    ]


def training_rows(trainer: GRPOTrainer, dataset: Any, rows: Sequence[int]) -> list[dict[str, Any]]:
    """Rows of a dataset as the trainer's dataloader passes them to generation and rewards.

    The dataset's format or transform is applied, and the columns that `remove_unused_columns` drops are absent.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        dataset (`datasets.Dataset`): The training dataset, or one with the same columns.
        rows (sequence of `int`): Row numbers; a row may occur several times.
    """
    # The dataloader's fetcher makes this call. With the format "pandas", only a list of rows gives dictionaries.
    return trainer._remove_unused_columns(dataset).__getitems__(list(rows))


def roll_out(
    trainer: GRPOTrainer, rows: Sequence[dict[str, Any]], seed: int
) -> tuple[dict[str, Any], torch.Tensor]:
    """Rollouts of `rows` by the trainer's own generation, with rewards and advantages.

    Call it inside [`preserve_trainer_state`]. All processes must call it together with equally many rows, because TRL
    gathers the rewards.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        rows (sequence of `dict`): Dataset rows of this process, each prompt repeated `G` times in succession.
        seed (`int`): Seeds Python, NumPy and torch; a vLLM server keeps its own state.

    Returns:
        TRL's loss inputs without images, and the rewards per function, `(len(rows), F)`, NaN for `None`.
    """
    rewards: list[torch.Tensor] = []
    calculate, scale_rewards = trainer._calculate_rewards, trainer.scale_rewards

    def keep_rewards(*args: Any, **kwargs: Any) -> torch.Tensor:
        try:
            rewards.append(calculate(*args, **kwargs))
        except Exception as error:
            raise RuntimeError(
                f"A reward function failed on rollouts of the scoring pass ({type(error).__name__}: {error}). It "
                f"gets prompts, completions and the other columns {sorted(set().union(*rows) - {'prompt'})} as "
                "keywords and must return a list with one number per completion, or None for a completion that it "
                "cannot judge. Fix it and run the same command again; finished shards are reused."
            ) from error
        return rewards[-1]

    trainer.model.train()  # TRL chooses the number of rollouts by the mode
    set_seed(_seed_of_engine(trainer, seed))
    try:
        trainer._calculate_rewards = keep_rewards  # type: ignore[method-assign]
        # Scaling by the batch's standard deviation would make a prompt's advantages depend on its neighbours. Without
        # it the gradient is the same up to a positive factor; `check_objective` has refused terms that do not scale.
        if scale_rewards == "batch":
            trainer.scale_rewards = "none"
        # A copy, because TRL writes extra fields of a rollout function into the rows.
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
    """Whether several training processes share one vLLM engine (tensor parallelism in colocate mode)."""
    is_here = trainer.use_vllm and trainer.vllm_mode == "colocate"
    return bool(is_here and trainer.vllm_tensor_parallel_size > 1)


def _seed_of_engine(trainer: GRPOTrainer, seed: int) -> int:
    """The seed of the first process of a shared engine, because all of its processes must sample the same tokens."""
    if not has_shared_engine(trainer):
        return seed
    group = trainer.vllm_generation.tp_group
    shared = [seed]
    first = torch.distributed.get_global_rank(group, 0)
    torch.distributed.broadcast_object_list(shared, src=first, group=group)
    return int(shared[0])


def _sums_of_normalized(trainer: GRPOTrainer, rewards: torch.Tensor) -> torch.Tensor:
    """TRL's advantages of `normalize_then_sum`, `(R,)`, before they are scaled by their deviation over the batch.

    Each reward `(R, F)` is normalised within a prompt, so the weighted sum already has mean 0. The last scaling is a
    positive factor common to all prompts of a call, and would make a prompt's advantages depend on its neighbours.
    """
    grouped = rewards.view(-1, trainer.num_generations, rewards.shape[1])
    deviation = trl_utils.nanstd(grouped, dim=1, keepdim=True)
    normalized = (grouped - grouped.nanmean(dim=1, keepdim=True)) / (deviation + 1e-4)
    return (normalized * trainer.reward_weights.to(rewards.device)).nansum(dim=2).flatten()


def generation_model(trainer: GRPOTrainer) -> AbstractContextManager[Any]:
    """Context manager that yields the policy ready for `generate`, prepared as TRL prepares it."""
    from trl.models.utils import unwrap_model_for_generation

    return unwrap_model_for_generation(
        trainer.model_wrapped,
        trainer.accelerator,
        **unwrapping_options(trainer),
    )


# ---- Batches of rollouts --------------------------------------------------------------------------------------------

ROLLOUTS_REQUIRES = Required(trainer=("_calculate_rewards", "_metrics", "_logs", "_tokenizer"))

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class RolledOut:
    """All rollout groups of one generation; identical on every process.

    Args:
        micro_step (`int`): The trainer's micro-step at which the generation begins.
        asked_rows (`np.ndarray`): Additional dataset rows that dynamic sampling rolled out, `int64` `(E,)`.
        rewards (`torch.Tensor`): `(P + E, G, F)`, NaN where a function returned `None`: first the `P` prompts of the
            trainer's sampler in its order, then those of `asked_rows`.
        tokens (`np.ndarray`): Prompt and completion tokens of each rollout, `int64` `(P + E, G, 2)`.
        useful (`np.ndarray`): Which groups have a gradient, `bool` `(P + E,)`: at least one rollout has a nonzero
            advantage, up to rounding, and a token in the loss.
        trained (`np.ndarray`): Which groups are trained on, `bool` `(P + E,)`; exactly `P` of them.
    """

    micro_step: int
    asked_rows: np.ndarray
    rewards: torch.Tensor
    tokens: np.ndarray
    useful: np.ndarray
    trained: np.ndarray


@dataclass(frozen=True)
class RolloutBatch:
    """Rollouts of one batch of prompts; `R` rollouts over all processes.

    Args:
        rows (`dict`): This process's rows of TRL's loss inputs.
        rewards (`torch.Tensor`): Rewards of all processes, `(R, F)`, NaN where a function returned `None`.
        sizes (`np.ndarray`): Absolute advantages of all processes, 0 where no token is in the loss, `(R,)`.
        tokens (`np.ndarray`): Prompt and completion tokens of all processes' rollouts, `int64` `(R, 2)`.
        metrics (`dict`): What TRL collected for its log.
        logs (`dict`): What TRL collected for its table of completions, over all processes.
    """

    rows: Batch
    rewards: torch.Tensor
    sizes: np.ndarray
    tokens: np.ndarray
    metrics: dict[str, list[float]]
    logs: dict[str, Any]


def collect_rollouts(
    trainer: GRPOTrainer, generate: Callable[[Rows], Batch], rows: Rows
) -> RolloutBatch:
    """Roll out a batch of prompts with separate logs; all processes call it together with equally many rows.

    Args:
        trainer (`GRPOTrainer`): The trainer, in training mode.
        generate (callable): Its `_generate_and_score_completions`.
        rows (`list[dict]`): This process's dataset rows, each repeated once per rollout.
    """
    metrics, logs = trainer._metrics, trainer._logs
    trainer._metrics, trainer._logs = unbounded(metrics), unbounded(logs)
    try:
        batch, rewards = generate_rollouts(trainer, generate, rows)
        collected = trainer._metrics["train"], trainer._logs
    finally:
        trainer._metrics, trainer._logs = metrics, logs
    sizes, tokens = gathered_sizes(trainer, batch), gathered_tokens(trainer, batch)
    return RolloutBatch(batch, rewards.cpu(), sizes, tokens, *collected)


def gathered_sizes(trainer: GRPOTrainer, batch: Batch) -> np.ndarray:
    """Absolute advantages of all processes, 0 where no token is in the loss, `(R,)`."""
    counted = rollout_rows.loss_mask(batch).sum(dim=1) > 0
    sizes = trainer.accelerator.gather(rollout_rows.advantage_sizes(batch) * counted)
    return sizes.cpu().numpy()


def gathered_tokens(trainer: GRPOTrainer, batch: Batch) -> np.ndarray:
    """Prompt and completion tokens of the rollouts of all processes, `int64` `(R, 2)`."""
    tokens = rollout_rows.lengths(batch, trainer._tokenizer.pad_token_id)
    return trainer.accelerator.gather(tokens).cpu().numpy()


def generate_rollouts(
    trainer: GRPOTrainer, generate: Callable[[Rows], Batch], rows: Rows
) -> tuple[Batch, torch.Tensor]:
    """TRL's loss inputs, and the rewards of all processes `(R, F)`; advantages are exactly 0 where rewards are equal.

    The floating-point mean of equal rewards can differ from the reward. For eight rewards of 0.1 it is off by one in
    the last place; divided by a deviation of 0 + 1e-4 this gives an advantage of 7e-5 to a prompt without any signal.

    Args:
        trainer (`GRPOTrainer`): The trainer, in training mode.
        generate (callable): Its `_generate_and_score_completions`, or a replacement.
        rows (`list[dict]`): As in [`collect_rollouts`].
    """
    batch, rewards = rewarded(trainer, generate, rows)
    # A replacement may compose a batch of several batches; this function has then processed each of them already.
    if len(rewards) == rollout_rows.row_count(batch) * trainer.accelerator.num_processes:
        _silence(trainer, batch, silent_groups(trainer, rewards))
    return batch, rewards


def rewarded(
    trainer: GRPOTrainer, generate: Callable[[Rows], Batch], rows: Rows
) -> tuple[Batch, torch.Tensor]:
    """As [`generate_rollouts`], with TRL's advantages unchanged; the rewards cover all batches it was composed of."""
    calculate = trainer._calculate_rewards
    rewards: list[torch.Tensor] = []

    def keep_rewards(*args: Any, **kwargs: Any) -> torch.Tensor:
        rewards.append(calculate(*args, **kwargs))
        return rewards[-1]

    with overridden(trainer, "_calculate_rewards", keep_rewards):
        batch = generate(rows)
    return batch, torch.cat(rewards)


def silent_groups(trainer: GRPOTrainer, rewards: torch.Tensor) -> torch.Tensor:
    """Groups whose rollouts all have the same reward, `bool` `(P,)`; their advantages are 0 up to rounding.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        rewards (`torch.Tensor`): `(R, F)`, NaN where a function returned `None`.
    """
    weights = trainer.reward_weights.to(rewards)
    if trainer.multi_objective_aggregation == "sum_then_normalize":
        # The sum is computed as in TRL, so that rewards that are equal there are equal here.
        unscorable = torch.isnan(rewards).all(dim=1)
        total = (rewards * weights).nansum(dim=1)
        rewards = torch.where(unscorable, torch.nan, total).unsqueeze(1)
    groups = rewards.view(-1, trainer.num_generations, rewards.shape[1])
    judged = ~torch.isnan(groups)
    largest = torch.where(judged, groups, -torch.inf).amax(dim=1)
    smallest = torch.where(judged, groups, torch.inf).amin(dim=1)
    return (largest <= smallest).all(dim=1)


def replace_advantages(trainer: GRPOTrainer, batch: Batch, advantages: torch.Tensor) -> None:
    """Replace TRL's advantages, in the batch and in the table of completions.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        batch (`dict`): This process's rows of the loss inputs of a generation.
        advantages (`torch.Tensor`): Those of all processes, `(R,)`.
    """
    advantages = advantages.to(batch["advantages"])
    count = rollout_rows.row_count(batch)
    first = trainer.accelerator.process_index * count
    batch["advantages"] = advantages[first : first + count]
    column = trainer._logs["advantages"]
    for place, value in enumerate(reversed(advantages.tolist()), start=1):
        if place <= len(column):
            column[-place] = value


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
# A group has a gradient if one of its rollouts has a nonzero advantage (beyond the rounding of TRL's means) and a
# token in the loss. This section defines that; `dynamic_sampling` applies it to groups that are not trained on, too.

WATCH_REQUIRES = Required(
    trainer=("_step",),
    calls={
        "_prepare_inputs": Replaced(("generation_batch",)),
        "_generate_and_score_completions": Replaced(("inputs",)),
    },
)
WATCH_NEEDS = (WATCH_REQUIRES, ROLLOUTS_REQUIRES)


Advantages = Callable[[int, torch.Tensor], torch.Tensor | None]
"""Maps a micro-step and the rewards of its generation, `(P, G, F)` of all processes, to advantages, `(P, G)`; `None`
leaves TRL's."""


class Watch:
    """Passes each training generation to an observer, on all processes alike.

    Generations of evaluation and of other callers are not passed on. Training changes only if `advantages` is given.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        observe (callable): Called with what was rolled out, once per generation.
        advantages (callable, *optional*): Replaces TRL's advantages before anything is trained on. It is called before
            `observe`, on all processes together.
    """

    def __init__(
        self,
        trainer: GRPOTrainer,
        observe: Callable[[RolledOut], None],
        advantages: Advantages | None = None,
    ):
        self.trainer = trainer
        self._observe, self._advantages = observe, advantages
        self._has_warned = False
        self._give = trainer._prepare_inputs
        MethodPatch([(trainer, "_prepare_inputs", self._prepare_inputs)])

    def _prepare_inputs(self, generation_batch: Any) -> Batch:
        if not self.trainer.model.training:
            return self._give(generation_batch)
        generate = self.trainer._generate_and_score_completions
        made: list[RolledOut | None] = []

        def generate_and_watch(rows: Rows) -> Batch:
            batch, rewards = rewarded(self.trainer, generate, rows)
            is_replaced = self._replace_advantages(batch, rewards)
            made.append(self._rolled_out(batch, rewards, is_replaced))
            return batch

        with overridden(self.trainer, "_generate_and_score_completions", generate_and_watch):
            inputs = self._give(generation_batch)
        self._show(made)
        return inputs

    def _show(self, made: list[RolledOut | None]) -> None:
        """Pass what one micro-step generated, if anything, to the observer."""
        if len(made) == 1 and made[0] is not None:
            self._observe(made[0])
        elif made and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "The outcomes of generations are not recorded, because a replacement for TRL's own code combines "
                "them."
            )

    def _replace_advantages(self, batch: Batch, rewards: torch.Tensor) -> bool:
        """Replace the advantages of a generation; returns whether they were replaced.

        Raises:
            `RuntimeError`: If the generation does not have TRL's usual form.
        """
        trainer = self.trainer
        if self._advantages is None:
            return False
        if len(rewards) != trainer.args.generation_batch_size or batch["advantages"].ndim != 1:
            raise RuntimeError(
                f"baseline='belief': {type(trainer).__name__} composes generations or advantages in its own way "
                f"({len(rewards)} rewards for {trainer.args.generation_batch_size} rollouts, advantages of shape "
                f"{tuple(batch['advantages'].shape)}). Set baseline='group'."
            )
        groups = rewards.view(-1, trainer.num_generations, rewards.shape[1])
        advantages = self._advantages(trainer._step, groups.cpu())
        if advantages is None:
            return False
        replace_advantages(trainer, batch, advantages.flatten())
        return True

    def _rolled_out(
        self, batch: Batch, rewards: torch.Tensor, is_replaced: bool
    ) -> RolledOut | None:
        """A generation before it is shuffled; `None` if it does not have TRL's usual form."""
        trainer = self.trainer
        if len(rewards) != trainer.args.generation_batch_size:
            return None
        sizes = gathered_sizes(trainer, batch)
        rows = rollout_rows.has_gradient(sizes, float(sizes.max()))
        useful = rows.reshape(-1, trainer.num_generations).any(axis=1)
        if not is_replaced:  # TRL's advantages of equal rewards may be off 0 by rounding
            useful &= ~silent_groups(trainer, rewards).cpu().numpy()
        return RolledOut(
            micro_step=trainer._step,
            asked_rows=np.empty(0, dtype=np.int64),
            rewards=rewards.cpu().view(-1, trainer.num_generations, rewards.shape[1]),
            tokens=gathered_tokens(trainer, batch).reshape(-1, trainer.num_generations, 2),
            useful=useful,
            trained=np.ones(len(useful), dtype=bool),
        )


# ---- Forward passes without gradients -------------------------------------------------------------------------------


@contextmanager
def reading_model(trainer: GRPOTrainer, name: str | None = None) -> Iterator[nn.Module]:
    """A model for forward passes over texts without gradients, in evaluation mode.

    Call it inside [`preserve_trainer_state`].

    Args:
        trainer (`GRPOTrainer`): The trainer.
        name (`str`, *optional*): Hub id or path of a frozen model, which is loaded whole on every process and freed at
            the end. Defaults to the policy, with its parameters sharded as they are.
    """
    with torch.no_grad(), lm_head.untempered():
        if name is None:
            trainer.model.eval()
            with trainer.accelerator.autocast():
                yield trainer.model
        else:
            with _nothing_partitioned():
                model = AutoModelForCausalLM.from_pretrained(name)
                lm_head.prepare_reader(model)
                yield model.eval().requires_grad_(False).to(trainer.accelerator.device)


@contextmanager
def _nothing_partitioned() -> Iterator[None]:
    """Load and run models whole; ZeRO-3 and FSDP would shard them, or leave them empty on all ranks but one."""
    efficient = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    zero, fsdp = hf_deepspeed._hf_deepspeed_config_weak_ref, os.environ.pop(efficient, None)
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = zero
        if fsdp is not None:
            os.environ[efficient] = fsdp


def label_log_probs(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Natural-log probabilities of the labels, computed with the head of a [`reading_model`].

    Args:
        model (`torch.nn.Module`): The model.
        input_ids (`torch.Tensor`): `(R, L)`, padded on the right.
        attention_mask (`torch.Tensor`): `(R, L)`.
        labels (`torch.Tensor`): `(R, L)`, -100 at positions to ignore.

    Returns:
        `torch.Tensor`: `(R, L - 1)`: entry `t` belongs to `labels[:, t + 1]`, and is 0 at ignored positions.
    """
    return lm_head.label_log_probs(model, input_ids, attention_mask, labels)


def last_hidden_states(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """Last hidden layer, after the final norm: `(R, L, H)`. Logits are computed for one position only."""
    kept: list[torch.Tensor] = []

    def shorten(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        kept.append(inputs[0])
        return (inputs[0][:, :1],)

    # Backbones are nested and called in different ways; the head's input is the same in every model family.
    handle = without_peft(model).get_output_embeddings().register_forward_pre_hook(shorten)
    try:
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        handle.remove()
    # Prompt tuning prepends virtual tokens to each row.
    return kept[0][:, -input_ids.shape[1] :]


def next_token_logits(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """Logits after the last token of each row (padded on the right): `(R, V)`."""
    last = attention_mask.sum(dim=1) - 1
    rows = torch.arange(len(last), device=last.device)
    head = without_peft(model).get_output_embeddings()
    # Rows end at different positions; the head computes only these positions instead of all.
    handle = head.register_forward_pre_hook(
        lambda module, inputs: (inputs[0][rows, last].unsqueeze(1),)
    )
    try:
        return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[
            :, 0
        ]
    finally:
        handle.remove()


# ---- Prompts → tokens -----------------------------------------------------------------------------------------------

READING_REQUIRES = Required(
    trainer=("_tokenizer", "_is_vlm", "environment_factories"),
    calls={"_tokenize_prompts": Called(1)},
    later=("_batch_environments",),
)


def sampling_settings(trainer: GRPOTrainer) -> dict[str, Any]:
    """Settings that determine what is sampled."""
    names = (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "max_completion_length",
        "use_vllm",
    )
    settings = {name: getattr(trainer, name) for name in names}
    return {
        **settings,
        "generation_kwargs": trainer.args.generation_kwargs,
        "chat": trainer.chat_template_kwargs,
    }


def pad_token_id(trainer: GRPOTrainer) -> int:
    """Token id of padding."""
    return trainer._tokenizer.pad_token_id


def tokenizer(trainer: GRPOTrainer) -> Any:
    """The policy's tokenizer."""
    return trainer._tokenizer


def takes_images(trainer: GRPOTrainer) -> bool:
    """Whether the policy is a vision-language model with a processor for its images."""
    return bool(trainer._is_vlm)


def chat_settings(trainer: GRPOTrainer) -> dict[str, Any]:
    """What the trainer passes to `apply_chat_template` in addition to the conversation."""
    return {
        "tools": trainer.tools or None,
        "chat_template": trainer.chat_template,
        **trainer.chat_template_kwargs,
    }


def prompt_token_lists(
    trainer: GRPOTrainer, prompts: list[Any], environments: list[str | None] | None = None
) -> list[list[int]]:
    """Token ids of prompts, with the chat template and settings of training; without images.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        prompts (`list`): Conversations or strings.
        environments (`list[str]`, *optional*): The environment of each prompt, whose tools the prompt lists. Defaults
            to the first environment.
    """
    if trainer._is_vlm:
        prompts = list(map(_without_images, prompts))
    if trainer.environment_factories is None:
        return trainer._tokenize_prompts(prompts)[0]
    # TRL sets this for each batch of rollouts, and reads it during tokenization.
    before = vars(trainer).pop("_batch_environments", None)
    first = next(iter(trainer.environment_factories))
    trainer._batch_environments = [first] * len(prompts) if environments is None else environments
    try:
        return trainer._tokenize_prompts(prompts)[0]
    finally:
        trainer._batch_environments = before


def _without_images(prompt: Any) -> Any:
    """A prompt without its image parts and without the placeholders of images from another column."""
    if isinstance(prompt, str):
        return prompt
    messages = []
    for message in prompt:
        content = message.get("content")
        if isinstance(content, list):
            texts = [part for part in content if part.get("type") != "image"]
            message = {**message, "content": texts}
        messages.append(message)
    return messages
