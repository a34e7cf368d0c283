"""The normalisers of TRL's losses, and when a row with advantage 0 has no gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import trl
from torch import Tensor
from trl import GRPOTrainer as StockTrainer

from trl_learnalign.bridge import requires, rollout_rows
from trl_learnalign.bridge.borrow import preserve_trainer_state
from trl_learnalign.bridge.objective import objective_gradients
from trl_learnalign.bridge.requires import Required, stand_in

if TYPE_CHECKING:
    from trl import GRPOTrainer


REQUIRES = Required(
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
