"""The trainer's own loss, of one prompt: its gradients, its settings, and what it carries along."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from trl_learnalign.bridge.precision import computes_in_float16, computes_in_float32, has_dropout
from trl_learnalign.bridge.required import Called, Required

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
    """An accelerator that talks to nobody: the loss of one prompt is this process's own business."""

    num_processes = 1
    process_index = 0

    def __init__(self, accelerator: Any):
        self._accelerator = accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """What this process has."""
        return tensor.reshape(1) if tensor.ndim == 0 else tensor

    gather_for_metrics = gather

    def reduce(self, tensor: torch.Tensor, reduction: str = "sum") -> torch.Tensor:
        """As it is."""
        return tensor

    def pad_across_processes(self, tensor: torch.Tensor, **_: Any) -> torch.Tensor:
        """As it is."""
        return tensor


def objective_gradients(
    trainer: GRPOTrainer, inputs: Mapping[str, Any], logps: torch.Tensor, entropies: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradient of the trainer's objective of one prompt (minus its loss) with respect to the log-probabilities.

    The loss is TRL's own `_compute_loss`, with every loss type, KL term and importance ratio, in evaluation mode:
    one prompt is the whole batch, nothing is accumulated. MoE load balancing is no part of the objective.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        inputs (mapping): TRL's inputs of the loss for the prompt's `G` rollouts.
        logps (`torch.Tensor`): `(G, C)`.
        entropies (`torch.Tensor`): `(G, C)`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor | None]`: `(G, C)` each; the second is `None` without an entropy term.
    """
    # In 16 bits, as some releases give them, the loss would round.
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
    """`_compute_loss` takes a prompt of this process for the whole batch, without the load balancing of experts."""
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

    The prompt is the batch, as in [`objective_gradients`]; everything else is TRL's: the rows as it gave them, its
    `_compute_loss`, its forward pass.

    Args:
        trainer (`GRPOTrainer`): The trainer, borrowed with [`left_as_found`]. Parameters may be partitioned by ZeRO-3
            (a collective), not by FSDP2.
        rows (mapping): TRL's inputs of the loss for the prompt's rollouts, see `RolloutGroup.raw`.
        take (callable): Called once as `take(name, gradient)` for each trainable parameter with a gradient. It is let
            go of afterwards: no more than one layer's gradient is held at a time.
    """
    trainer.model.eval()
    parameters = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}

    def handed_over(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def hook(gradient: torch.Tensor) -> torch.Tensor:
            take(name, gradient.detach().float() / scale if scale != 1.0 else gradient.detach())
            return gradient.new_zeros(()).expand_as(gradient)  # takes no memory

        return hook

    device = trainer.accelerator.device
    inputs = {name: value.to(device) for name, value in rows.items()}
    mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
    inputs["num_items_in_batch"] = mask.sum().clamp(min=1)  # trl 1.8 divides by it as it is
    # Losses are means over tokens; in float16 the share of one token would underflow.
    scale = 2.0 ** round(math.log2(mask.numel())) if computes_in_float16(trainer) else 1.0
    if not computes_in_float32(trainer) or has_dropout(trainer):
        # Here the ratio to the policy that sampled, 1 by construction, is 1 up to noise only.
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
    """Settings that decide the gradient of a rollout group."""
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
    """Where an adaptive entropy coefficient stands: the coefficient, and the entropy that was measured last."""
    return float(trainer.entropy_coef), float(trainer._last_world_entropy)


def reset_entropy_controller(trainer: GRPOTrainer) -> None:
    """The entropy coefficient as it was before the first step."""
    trainer.entropy_coef = trainer.args.entropy_coef
    trainer._last_world_entropy = float("inf")
    trainer._entropy_window_stats = None


def extra_forwards(trainer: GRPOTrainer) -> int:
    """Forward passes without a gradient that TRL makes over each generation: reference policy, sampling policy."""
    args = trainer.args
    aligned = (
        args.gradient_accumulation_steps % (args.steps_per_generation * trainer.num_iterations) == 0
    )
    corrected = args.use_vllm and args.vllm_importance_sampling_correction
    return int(trainer.beta != 0.0) + int(not aligned or corrected)
