"""What TRL's losses divide by, and when a row whose advantage is 0 has no gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trl import GRPOTrainer as StockTrainer

from trl_learnalign.bridge.required import Required, stand_in
from trl_learnalign.bridge.versions import releases

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
"""What each loss of TRL is divided by: rows or tokens of the micro-batch, or tokens of the whole generation. All
of them are sums over rows of terms that are proportional to the row's advantage, as long as its sign stays."""

# Where a subclass may change what the loss is, or what it is given.
_LOSS_METHODS = ("_compute_loss", "compute_loss", "get_off_policy_mask", "get_gamma_weights")
_ROW_MIXING_ADAPTERS = {"LILY"}


def skipping_problem(trainer: GRPOTrainer) -> str | None:
    """Why rows cannot be left out of training without changing it, or `None` if they can.

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
        return f"top_entropy_quantile={trainer.top_entropy_quantile}: all rows decide which tokens count"
    if releases.is_before("1.15") and trainer.args.use_liger_kernel:
        return "use_liger_kernel: before trl 1.15 the loss is Liger's, and what it divides by is not known"
    if trainer.loss_type not in DENOMINATORS:
        return f"loss_type={trainer.loss_type!r}: what it divides by is not known"
    if counts_padding(trainer):
        return "loss_type='vespo' with a clip range of the vLLM ratio that leaves 1 out: padding counts"
    return None


def counts_padding(trainer: GRPOTrainer) -> bool:
    """Whether padding enters the weight of a sequence: VESPO sums the logarithms of the ratios of all columns."""
    if trainer.loss_type != "vespo" or not (
        trainer.use_vllm and trainer.vllm_importance_sampling_correction
    ):
        return False
    low, high = trainer.vllm_importance_sampling_clip_min, trainer.vllm_importance_sampling_clip_max
    return (low is not None and low > 1) or (high is not None and high < 1)


def _method_problem(trainer: GRPOTrainer) -> str | None:
    copy = stand_in(trainer)
    if copy is not None:
        return f"{copy} is a rewritten copy of TRL's trainer: what its loss divides by is not known"
    for name in (*_LOSS_METHODS, "_prepare_inputs"):
        if getattr(type(trainer), name) is not getattr(StockTrainer, name):
            return f"{type(trainer).__name__} has a {name} of its own: what its loss divides by is not known"
    for name in _LOSS_METHODS:
        if name in vars(trainer):
            return f"{name} of this trainer was replaced: what its loss divides by is not known"
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
        return f"the adapter {mixing[0]!r}: its router averages over all rows of a pass"
    return None
