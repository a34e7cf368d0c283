"""The trainer's own loss and rewards, called for one prompt; the normalisers of TRL's losses.

A row with advantage 0 has no gradient for some losses and settings; [`loss_problem`] names the others.
"""

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
import trl
from accelerate import PartialState
from torch import Tensor
from transformers import TrainerState
from trl import GRPOTrainer
from trl import GRPOTrainer as StockTrainer

from trl_learnalign.bridge import requires, rollout_rows
from trl_learnalign.bridge.hooks import preserve_trainer_state
from trl_learnalign.bridge.policy import computes_in_float16, computes_in_float32, has_dropout
from trl_learnalign.bridge.requires import Called, Required, stand_in

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


# ---- Objective of each row ------------------------------------------------------------------------------------------

ROWS_REQUIRES = Required(
    trainer=(
        "_prepare_inputs",
        "_compute_loss",
        "compute_loss",
        "get_off_policy_mask",
        "get_gamma_weights",
        "_entropy_bonus_enabled",
        "aux_loss_enabled",
        "top_entropy_quantile",
        "vllm_importance_sampling_clip_max",
        "vllm_importance_sampling_clip_min",
        "vllm_importance_sampling_correction",
    )
)

ROWS, TOKENS, GENERATION = "rows", "tokens", "generation"
DENOMINATORS = {
    "grpo": ROWS,
    "sapo": ROWS,
    "luspo": ROWS,
    "dr_grpo": ROWS,
    "bnpo": TOKENS,
    "dapo": GENERATION,
    "cispo": GENERATION,
    "vespo": GENERATION,
}
"""The denominator of each TRL loss: rows or tokens of the micro-batch, or tokens of the whole generation. Each loss
is a sum over rows of terms that are proportional to the row's advantage, as long as its sign does not change."""

# Methods by which a subclass may change the loss or its inputs.
_LOSS_METHODS = ("_compute_loss", "compute_loss", "get_off_policy_mask", "get_gamma_weights")
_ROW_MIXING_ADAPTERS = {"LILY"}


def skipping_problem(trainer: GRPOTrainer) -> str | None:
    """Why rows cannot be left out of training without changing the result, or `None` if they can.

    Args:
        trainer (`GRPOTrainer`): The trainer.
    """
    return _objective_problem(trainer) or _method_problem(trainer) or _model_problem(trainer)


def _objective_problem(trainer: GRPOTrainer) -> str | None:
    if trainer.beta != 0.0:
        return f"beta={trainer.beta}: the KL term has a gradient in every row"
    if trainer._entropy_bonus_enabled:
        return "entropy_coef, use_adaptive_entropy: the entropy bonus has a gradient in every row"
    if trainer.aux_loss_enabled:
        return "router_aux_loss_coef: the load balancing of a mixture of experts has a gradient in every row"
    if trainer.top_entropy_quantile < 1.0:
        return f"top_entropy_quantile={trainer.top_entropy_quantile}: which tokens enter the loss depends on all rows"
    if requires.is_before("1.15") and trainer.args.use_liger_kernel:
        return "use_liger_kernel: before trl 1.15 the loss is Liger's, whose normaliser is unknown"
    if trainer.loss_type not in DENOMINATORS:
        return f"loss_type={trainer.loss_type!r}: its normaliser is unknown"
    if counts_padding(trainer):
        return "loss_type='vespo' with a clip range of the vLLM ratio that excludes 1, so padding enters the loss"
    return None


def counts_padding(trainer: GRPOTrainer) -> bool:
    """Whether padding affects the weight of a sequence: VESPO sums the log-ratios of all columns."""
    if trainer.loss_type != "vespo" or not (
        trainer.use_vllm and trainer.vllm_importance_sampling_correction
    ):
        return False
    low, high = trainer.vllm_importance_sampling_clip_min, trainer.vllm_importance_sampling_clip_max
    return (low is not None and low > 1) or (high is not None and high < 1)


def _method_problem(trainer: GRPOTrainer) -> str | None:
    copy = stand_in(trainer)
    if copy is not None:
        return f"{copy} is a rewritten copy of TRL's trainer, whose normaliser is unknown"
    for name in (*_LOSS_METHODS, "_prepare_inputs"):
        if getattr(type(trainer), name) is not getattr(StockTrainer, name):
            return f"{type(trainer).__name__} overrides {name}, so the normaliser of its loss is unknown"
    for name in _LOSS_METHODS:
        if name in vars(trainer):
            return f"{name} of this trainer was replaced, so the normaliser of its loss is unknown"
    return None


def _model_problem(trainer: GRPOTrainer) -> str | None:
    if trainer.args.neftune_noise_alpha:
        return (
            f"neftune_noise_alpha={trainer.args.neftune_noise_alpha}: the noise depends on padding"
        )
    adapters = getattr(trainer.model, "peft_config", {})
    mixing = sorted(
        name for name, adapter in adapters.items() if adapter.peft_type in _ROW_MIXING_ADAPTERS
    )
    if mixing:
        return f"the adapter {mixing[0]!r}, whose router averages over all rows of a forward pass"
    return None


# ---- Check of TRL's loss on synthetic rows --------------------------------------------------------------------------
# Leaving rows out assumes that the loss is a sum over rows, divided by a known number (`DENOMINATORS`), and that
# padding adds nothing. This depends on the release (trl 1.8 averages `luspo` over padding, too), so it is checked at
# run time. The model is not called.

# Rows with a gradient come first. They are shorter than the others, so that columns drop out with the others.
_ADVANTAGES = (1.0, -0.5, 0.0, 0.0)
_LENGTHS = (2, 1, 3, 3)
_USEFUL = 2
_TOLERANCE = 1e-4


def loss_problem(trainer: GRPOTrainer) -> str | None:
    """Why the trainer's loss of some rows is not their share of the loss of all rows, or `None` if it is.

    Args:
        trainer (`GRPOTrainer`): A trainer for whose loss [`skipping_problem`] finds nothing.
    """
    changed = (
        f"trl {trl.__version__} with loss_type={trainer.loss_type!r}: the loss of rows with a gradient depends on "
        "those without one"
    )
    whole = _made_up_rows(trainer)
    try:
        with preserve_trainer_state(trainer):
            trainer.model.eval()
            of_whole = _gradient(trainer, whole)
            of_part = _gradient(trainer, _useful_part(trainer, whole))
    except Exception as error:  # an unknown loss may raise anything
        return f"the loss of trl {trl.__version__} could not be tested ({error!r})"
    expected = of_whole[:_USEFUL, : of_part.shape[1]]
    largest = of_whole.abs().max()
    outside = of_whole.abs().sum() - expected.abs().sum()
    difference = (of_part - expected).abs().max()
    # With `<=`, NaN counts as a difference.
    is_share = difference <= _TOLERANCE * largest and outside.abs() <= _TOLERANCE * largest
    return None if is_share else changed


def _made_up_rows(trainer: GRPOTrainer) -> rollout_rows.Batch:
    device = trainer.accelerator.device
    advantages = torch.tensor(_ADVANTAGES, device=device)
    lengths = torch.tensor(_LENGTHS, device=device)
    rows = len(advantages)
    width = int(lengths.max())
    columns = torch.arange(width, device=device)
    mask = (columns < lengths.unsqueeze(1)).long()
    ids = torch.ones_like(mask)
    prompt = ids[:, :1]
    return {
        "prompt_ids": prompt,
        "prompt_mask": prompt,
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": advantages,
        "num_items_in_batch": mask.sum(),
        # Used when vLLM samples; one number per row is valid in every mode.
        "importance_sampling_ratio": torch.ones(rows, 1, device=device),
    }


def _useful_part(trainer: GRPOTrainer, whole: rollout_rows.Batch) -> rollout_rows.Batch:
    """The rows with a gradient, as skipping would train on them."""
    padding = rollout_rows.padding_of(trainer)
    chosen = rollout_rows.take(whole, range(_USEFUL))
    part = rollout_rows.trim(chosen, padding, trainer.pad_to_multiple_of)
    factor = denominator(trainer.loss_type, part) / denominator(trainer.loss_type, whole)
    part["advantages"] = part["advantages"] * factor
    return part


def denominator(loss_type: str, batch: rollout_rows.Batch) -> float:
    """The number by which TRL divides the loss of a micro-batch, for losses normalised per micro-batch.

    Args:
        loss_type (`str`): The trainer's loss type.
        batch (mapping): The micro-batch.
    """
    kind = DENOMINATORS[loss_type]
    if kind == TOKENS:
        return max(1.0, float(rollout_rows.loss_mask(batch).sum()))
    if kind == ROWS:
        return float(rollout_rows.row_count(batch))
    return 1.0


def _gradient(trainer: GRPOTrainer, batch: rollout_rows.Batch) -> Tensor:
    """Gradient of the objective with respect to synthetic log-probabilities, `(R, C)`."""
    mask = batch["completion_mask"]
    rows, columns = mask.shape
    numbers = torch.arange(rows, device=mask.device).unsqueeze(1)
    places = torch.arange(columns, device=mask.device)
    # The values differ at every position, and are the same in a part as in the whole.
    log_probs = -0.5 - 0.1 * numbers - 0.01 * places
    gradient, _ = objective_gradients(trainer, batch, log_probs, torch.ones_like(log_probs))
    return gradient
