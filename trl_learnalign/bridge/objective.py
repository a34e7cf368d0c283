"""The trainer's own loss and rewards, called for one prompt."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from transformers import TrainerState
from trl import GRPOTrainer

from trl_learnalign.bridge.policy import computes_in_float16, computes_in_float32, has_dropout
from trl_learnalign.bridge.requires import Called, Required

if TYPE_CHECKING:
    from trl import GRPOTrainer


REQUIRES = Required(
    trainer=(
        "_get_per_token_logps_and_entropies",
        "_entropy_bonus_enabled",
        "_entropy_window_stats",
        "_last_world_entropy",
        "entropy_coef",
        "reward_func_names",
        "aux_loss_enabled",
    ),
    calls={"_compute_loss": Called(2)},
)


class LocalAccelerator:
    """An accelerator without communication, because the loss of one prompt is local to this process."""

    num_processes = 1
    process_index = 0

    def __init__(self, accelerator: Any):
        self._accelerator = accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The local tensor."""
        return tensor.reshape(1) if tensor.ndim == 0 else tensor

    gather_for_metrics = gather

    def reduce(self, tensor: torch.Tensor, reduction: str = "sum") -> torch.Tensor:
        """The tensor, unchanged."""
        return tensor

    def pad_across_processes(self, tensor: torch.Tensor, **_: Any) -> torch.Tensor:
        """The tensor, unchanged."""
        return tensor


def objective_gradients(
    trainer: GRPOTrainer, inputs: Mapping[str, Any], logps: torch.Tensor, entropies: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradient of the trainer's objective of one prompt (minus its loss) with respect to the log-probabilities.

    The loss is TRL's own `_compute_loss`, with every loss type, KL term and importance ratio, in evaluation mode. One
    prompt is the whole batch, and nothing is accumulated. MoE load balancing is not part of the objective.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        inputs (mapping): TRL's loss inputs for the prompt's `G` rollouts.
        logps (`torch.Tensor`): `(G, C)`.
        entropies (`torch.Tensor`): `(G, C)`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor | None]`: `(G, C)` each; the second is `None` without an entropy term.
    """
    # Some releases return 16-bit values, in which the loss would be rounded.
    leaves = []
    for values in (logps, entropies):
        precise = torch.promote_types(values.dtype, torch.float32)
        copy = values.detach().to(precise, copy=True)
        leaves.append(copy.requires_grad_())
    try:
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (*leaves, None)  # type: ignore[method-assign]
        with _loss_of_one_prompt(trainer), torch.enable_grad():
            objective = -trainer._compute_loss(trainer.model, dict(inputs))
            grads = torch.autograd.grad(objective, leaves, allow_unused=True)
    finally:
        del trainer._get_per_token_logps_and_entropies
    return (torch.zeros_like(leaves[0]) if grads[0] is None else grads[0]), grads[1]


@contextmanager
def _loss_of_one_prompt(trainer: GRPOTrainer) -> Iterator[None]:
    """Make `_compute_loss` treat one local prompt as the whole batch, without the load balancing of experts."""
    accelerator, aux_loss_enabled = trainer.accelerator, trainer.aux_loss_enabled
    try:
        trainer.accelerator = LocalAccelerator(accelerator)
        trainer.aux_loss_enabled = False
        yield
    finally:
        trainer.accelerator = accelerator
        trainer.aux_loss_enabled = aux_loss_enabled


def loss_gradient(
    trainer: GRPOTrainer,
    rows: Mapping[str, torch.Tensor],
    take: Callable[[str, torch.Tensor], None],
) -> None:
    """Gradient of the trainer's own loss of one prompt by autograd, in evaluation mode; nothing is accumulated.

    The prompt is the batch, as in [`objective_gradients`]. The rows, `_compute_loss` and the forward pass are TRL's.

    Args:
        trainer (`GRPOTrainer`): The trainer, inside [`preserve_trainer_state`]. Parameters may be sharded by ZeRO-3
            (the call is then a collective), not by FSDP2.
        rows (mapping): TRL's loss inputs for the prompt's rollouts, see `RolloutGroup.raw`.
        take (callable): Called once as `take(name, gradient)` for each trainable parameter with a gradient. The
            gradient is freed afterwards, so at most one layer's gradient is held at a time.
    """
    trainer.model.eval()
    parameters = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}

    def handed_over(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def hook(gradient: torch.Tensor) -> torch.Tensor:
            take(name, gradient.detach().float() / scale if scale != 1.0 else gradient.detach())
            return gradient.new_zeros(()).expand_as(gradient)  # uses no memory

        return hook

    device = trainer.accelerator.device
    inputs = {name: value.to(device) for name, value in rows.items()}
    mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
    inputs["num_items_in_batch"] = mask.sum().clamp(min=1)  # trl 1.8 divides by it unchanged
    # Losses are means over tokens; in float16 the contribution of one token would underflow.
    scale = 2.0 ** round(math.log2(mask.numel())) if computes_in_float16(trainer) else 1.0
    if not computes_in_float32(trainer) or has_dropout(trainer):
        # Here the ratio to the sampling policy, 1 by construction, would differ from 1 only by noise.
        inputs.pop("old_per_token_logps", None)
    hooks = [p.register_hook(handed_over(name)) for name, p in parameters.items()]
    try:
        with _loss_of_one_prompt(trainer), torch.enable_grad():
            loss = trainer._compute_loss(trainer.model, inputs)
            torch.autograd.grad(loss * scale, list(parameters.values()), allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()


def has_regulariser(trainer: GRPOTrainer) -> bool:
    """Whether the objective has terms that do not vanish with the advantages (KL, entropy)."""
    return trainer.beta != 0.0 or trainer._entropy_bonus_enabled


def objective_settings(trainer: GRPOTrainer) -> dict[str, Any]:
    """Settings that determine the gradient of a rollout group."""
    names = (
        "loss_type",
        "beta",
        "scale_rewards",
        "importance_sampling_level",
        "epsilon_low",
        "epsilon_high",
    )
    settings = {name: getattr(trainer, name) for name in names}
    weights = trainer.reward_weights.tolist()
    return {**settings, "rewards": dict(zip(trainer.reward_func_names, weights, strict=True))}


def entropy_controller(trainer: GRPOTrainer) -> tuple[float, float]:
    """State of an adaptive entropy coefficient: the coefficient, and the last measured entropy."""
    return float(trainer.entropy_coef), float(trainer._last_world_entropy)


def reset_entropy_controller(trainer: GRPOTrainer) -> None:
    """Reset the entropy coefficient to its value before the first step."""
    trainer.entropy_coef = trainer.args.entropy_coef
    trainer._last_world_entropy = float("inf")
    trainer._entropy_window_stats = None


def extra_forwards(trainer: GRPOTrainer) -> int:
    """Forward passes without a gradient that TRL runs on each generation: reference policy, sampling policy."""
    args = trainer.args
    aligned = (
        args.gradient_accumulation_steps % (args.steps_per_generation * trainer.num_iterations) == 0
    )
    corrected = args.use_vllm and args.vllm_importance_sampling_correction
    return int(trainer.beta != 0.0) + int(not aligned or corrected)


# ---- Rewards --------------------------------------------------------------------------------------------------------

REWARDS_REQUIRES = Required(
    trainer=(
        "reward_processing_classes",
        "reward_func_names",
        "environments",
        "_pending_extra_logs",
        "_pending_metrics",
    ),
    calls={"_calculate_rewards": Called(4)},
    sometimes={"async_loop": lambda trainer: "async_loop" in vars(trainer)},
)


def rewards_of(
    function: Any,
    rows: Sequence[dict[str, Any]],
    completions: Sequence[Any],
    completion_ids: Sequence[list[int]],
    trainer: GRPOTrainer | None = None,
) -> list[float | None]:
    """Rewards of completions by one function, in every form that TRL accepts.

    Functions may be async. They receive `prompts`, `completions`, `completion_ids`, the other columns of the rows,
    `trainer_state`, `log_extra` and `log_metric`. What they log is dropped, because it is not part of training.

    Args:
        function (callable or `torch.nn.Module`): The reward; a module only with a trainer that has it.
        rows (sequence of `dict`): Dataset rows, with `prompt`.
        completions (sequence): One for each row, in the form of its prompt.
        completion_ids (sequence of `list[int]`): Their tokens.
        trainer (`GRPOTrainer`, *optional*): Provides the state and settings that the function sees; all its processes
            call this together, with equally many rows. Without it the state is that of a new trainer.

    Returns:
        `list`: One for each row, in float32 as in training; `None` where the function returned `None` or NaN.

    Raises:
        `RuntimeError`: If the function fails or returns something else, naming it and what it has to return.
    """
    own = _without_training() if trainer is None else copy(trainer)
    own.reward_processing_classes = [_processor(trainer, function)]
    own.reward_funcs, own.reward_func_names = [function], [_name(function)]
    found = _calculated(own, list(rows), list(completions), list(completion_ids))
    first = own.accelerator.process_index * len(rows)
    values = found[first : first + len(rows), 0].tolist()
    return [None if math.isnan(value) else value for value in values]


def _calculated(
    trainer: GRPOTrainer, rows: list[dict[str, Any]], completions: list[Any], ids: list[list[int]]
) -> torch.Tensor:
    """Rewards of all processes, `(rows, 1)`, by a trainer object that is discarded afterwards."""
    # Rewards log into these; the trainer's own would end up in its next table of completions.
    trainer._pending_extra_logs, trainer._pending_metrics = defaultdict(list), defaultdict(list)
    calculate = trainer._calculate_rewards
    prompts = [row["prompt"] for row in rows]
    with _running_loop(trainer), _silent(calculate.__module__):
        try:
            return calculate(rows, prompts, completions, ids)
        except Exception as error:
            (name,) = trainer.reward_func_names
            raise RuntimeError(
                f"The reward function {name!r} failed ({type(error).__name__}: {error}). It is called like TRL "
                "calls it, with prompts, completions, completion_ids and the columns of the dataset as keywords, "
                "and must return a list with one number per completion, or None for a completion that it cannot "
                "judge."
            ) from error


def _name(function: Any) -> str:
    inner = getattr(function, "func", function)  # functools.partial
    return str(getattr(inner, "__name__", type(inner).__name__))


def _processor(trainer: GRPOTrainer | None, function: Any) -> Any:
    """The tokenizer of a reward model, which the trainer stores separately."""
    if trainer is None:
        return None
    pairs = zip(trainer.reward_funcs, trainer.reward_processing_classes, strict=True)
    return next((processor for each, processor in pairs if each is function), None)


def _without_training() -> GRPOTrainer:
    """A bare trainer with only what TRL's code needs to call a function."""
    PartialState()  # required by TRL's logger
    bare = object.__new__(GRPOTrainer)
    bare.accelerator = SimpleNamespace(
        device=torch.device("cpu"), is_main_process=True, process_index=0
    )
    bare.args = SimpleNamespace(report_to=[])
    bare.state, bare.environments, bare.chat_template_kwargs = TrainerState(), None, {}
    return bare


@contextmanager
def _running_loop(trainer: GRPOTrainer) -> Iterator[None]:
    """The event loop for async functions: the trainer's, to which their clients may be bound, or a new one."""
    if "async_loop" in vars(trainer):
        yield
        return
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    trainer.async_loop = loop
    try:
        yield
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextmanager
def _silent(name: str) -> Iterator[None]:
    """Suppress TRL's warning for each call in which a row has no reward; the callers count them."""
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
