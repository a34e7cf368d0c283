"""The only room with private names of TRL, transformers, accelerate and DeepSpeed.

What it borrows from a `GRPOTrainer` it gives back: every context manager here restores what it changed, also after an
exception. Each file lists the names that it requires, and `check_trainer` proves at attach time that they exist, so
that an unsupported version is an error with a remedy instead of a wrong result.
"""

from trl_learnalign.bridge.attachment import (
    SUPPORTED_TRL,
    check_launch,
    check_trainer,
    install_sampler,
    is_fsdp1,
)
from trl_learnalign.bridge.capturing import gradient_capture, token_log_probs
from trl_learnalign.bridge.dynamic_sampling import (
    DynamicSampler,
    dynamic_sampling_problem,
    install_dynamic_sampling,
)
from trl_learnalign.bridge.epochs import EpochEvents
from trl_learnalign.bridge.generation import (
    buffered_generation,
    generation_model,
    is_mid_generation,
    restore_generation,
    roll_out,
    training_rows,
)
from trl_learnalign.bridge.image_rows import image_counts
from trl_learnalign.bridge.lending import begin_counting, left_as_found, log_apart
from trl_learnalign.bridge.meters import (
    add_metrics,
    cut_share,
    last_reward,
    mean_completion_lengths,
    tokens_seen,
)
from trl_learnalign.bridge.objective import (
    entropy_controller,
    extra_forwards,
    has_regulariser,
    loss_gradient,
    objective_gradients,
    objective_settings,
    reset_entropy_controller,
)
from trl_learnalign.bridge.precision import (
    casts_weights,
    computes_in_16_bits,
    computes_in_float16,
    computes_in_float32,
    sixteen_bit_weights,
)
from trl_learnalign.bridge.reading import (
    label_log_probs,
    last_hidden_states,
    next_token_logits,
    reading_model,
)
from trl_learnalign.bridge.required import stand_in
from trl_learnalign.bridge.rewards import rewards_of
from trl_learnalign.bridge.rollout_batch import RolledOut
from trl_learnalign.bridge.saving import Saving, SavingHooks, micro_steps_made
from trl_learnalign.bridge.skipping import Skipper, TrainedCounts, install_skipping
from trl_learnalign.bridge.stock_order import StockOrder
from trl_learnalign.bridge.texts import (
    chat_settings,
    pad_token_id,
    prompt_token_lists,
    sampling_settings,
    takes_images,
    tokenizer,
)
from trl_learnalign.bridge.trackers import TrackerTables
from trl_learnalign.bridge.watching import Watch
from trl_learnalign.bridge.weights import (
    causal_lm,
    has_virtual_tokens,
    is_fsdp2,
    is_sharded,
    partition_again,
    sampled_digest,
    trainable_sizes,
    weights_changed,
    weights_digest,
    whole,
    zero_stage,
)

__all__ = [
    "SUPPORTED_TRL",
    "DynamicSampler",
    "EpochEvents",
    "RolledOut",
    "Saving",
    "SavingHooks",
    "Skipper",
    "StockOrder",
    "TrackerTables",
    "TrainedCounts",
    "Watch",
    "add_metrics",
    "begin_counting",
    "buffered_generation",
    "casts_weights",
    "causal_lm",
    "chat_settings",
    "check_launch",
    "check_trainer",
    "computes_in_16_bits",
    "computes_in_float16",
    "computes_in_float32",
    "cut_share",
    "dynamic_sampling_problem",
    "entropy_controller",
    "extra_forwards",
    "generation_model",
    "gradient_capture",
    "has_regulariser",
    "has_virtual_tokens",
    "image_counts",
    "install_dynamic_sampling",
    "install_sampler",
    "install_skipping",
    "is_fsdp1",
    "is_fsdp2",
    "is_mid_generation",
    "is_sharded",
    "label_log_probs",
    "last_hidden_states",
    "last_reward",
    "left_as_found",
    "log_apart",
    "loss_gradient",
    "mean_completion_lengths",
    "micro_steps_made",
    "next_token_logits",
    "objective_gradients",
    "objective_settings",
    "pad_token_id",
    "partition_again",
    "prompt_token_lists",
    "reading_model",
    "reset_entropy_controller",
    "restore_generation",
    "rewards_of",
    "roll_out",
    "sampled_digest",
    "sampling_settings",
    "sixteen_bit_weights",
    "stand_in",
    "takes_images",
    "token_log_probs",
    "tokenizer",
    "tokens_seen",
    "trainable_sizes",
    "training_rows",
    "weights_changed",
    "weights_digest",
    "whole",
    "zero_stage",
]
