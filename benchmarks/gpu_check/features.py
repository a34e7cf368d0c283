"""Captured features against the gradient of TRL's own loss, in each precision that training on a GPU has."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import cosine_similarity
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from trl import GRPOTrainer

from gpu_check.record import PartSkippedError, Record, Setting
from gpu_check.trainers import prompts, trainer_on
from trl_learnalign.bridge.hooks import preserve_trainer_state
from trl_learnalign.bridge.objective import loss_gradient
from trl_learnalign.bridge.policy import gradient_capture, trainable_sizes
from trl_learnalign.gradients.projection import Unprojected
from trl_learnalign.measuring.generation import RolloutGroup, roll_out
from trl_learnalign.measuring.gradient_features import GradientFeaturizer
from trl_learnalign.success import SuccessRule
from trl_learnalign.toy.model import CHECKPOINTING

PROMPTS, ROLLOUTS, SEED = 4, 4, 0
ERROR, ANGLE = 1e-3, 0.01
"""Float32 agrees to rounding; in bfloat16 the order of sums alone changes a gradient by about 1 %."""


FLOOR = 0.01
"""Of the largest prompt's gradient: against so much at least are differences measured."""


@dataclass(frozen=True)
class Case:
    """A trainer to compare on.

    Args:
        name (`str`): For the table.
        sixteen_bits (`bool`): Whether anything is computed in bfloat16.
        options (`dict`): For `GRPOConfig`.
        dtype (`torch.dtype`): Of the weights.
        lora (`bool`): Train an adapter.
        softcap (`bool`): A Gemma 3, whose head caps its logits.
    """

    name: str
    sixteen_bits: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    lora: bool = False
    softcap: bool = False


AUTOCAST = dict(bf16=True)
CASES = (
    Case("float32"),
    Case("float32, temperature 0.7", options=dict(temperature=0.7)),
    Case("float32, logits capped", softcap=True),
    Case("float32, gradient checkpointing", options={CHECKPOINTING: True}),
    Case("float32, LoRA", lora=True),
    Case("bf16 autocast", True, AUTOCAST),
    Case("bf16 autocast, gradient checkpointing", True, {**AUTOCAST, CHECKPOINTING: True}),
    Case("bf16 autocast, LoRA", True, AUTOCAST, lora=True),
    Case("bf16 weights", True, dtype=torch.bfloat16),
    Case("bf16 weights, float32 head", True, dict(cast_lm_head_to_fp32=True), torch.bfloat16),
)


def run(setting: Setting, record: Record) -> None:
    """Compare every case."""
    with record.attempt("TRL's head"):
        record.add("TRL's head", triton_is_used(setting) or None, note=head(setting))
    for case in CASES:
        with record.attempt(case.name):
            errors = compare(setting, case)
            is_close = (
                errors["1 - cosine"] < ANGLE if case.sixteen_bits else errors["error"] < ERROR
            )
            record.add(case.name, is_close, **errors)


def triton_is_used(setting: Setting) -> bool:
    """Whether TRL's own loss takes its log-probabilities from a Triton kernel here."""
    try:
        from trl.kernels.chunked_logprob import _use_triton
    except ImportError:
        return False
    return _use_triton(torch.device(setting.device))


def head(setting: Setting) -> str:
    """What computes log-probabilities in TRL's own loss."""
    return "Triton kernels" if triton_is_used(setting) else "torch alone"


def reward_in_turn(completions: list[Any], **_: Any) -> list[float]:
    """Neither all right nor all wrong in any group, whatever was generated."""
    return [(1.0, 0.0, 0.5, 0.2)[i % ROLLOUTS] for i in range(len(completions))]


def policy_of(setting: Setting, case: Case) -> PreTrainedModel:
    """A small model with the vocabulary of a large one: the head's kernels go over it block by block."""
    torch.manual_seed(SEED)
    hidden, vocabulary, layers = (16, 300, 2) if setting.small else (128, 49152, 4)
    shape = dict(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    if case.softcap:
        config = Gemma3TextConfig(**shape, head_dim=hidden // 2, final_logit_softcapping=5.0)
        made: PreTrainedModel = Gemma3ForCausalLM(config)
    else:
        made = Qwen2ForCausalLM(Qwen2Config(**shape))
    return with_adapter(made) if case.lora else made.to(case.dtype)


def with_adapter(policy: PreTrainedModel) -> Any:
    """LoRA on three projections."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise PartSkippedError("peft is not installed") from None
    targets = ["q_proj", "v_proj", "down_proj"]
    return get_peft_model(policy, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))


@contextmanager
def trainer_of(setting: Setting, case: Case) -> Iterator[GRPOTrainer]:
    """A trainer that is as it is in the middle of training: prepared, its weights away from where they began."""
    policy = policy_of(setting, case)
    torch.manual_seed(SEED)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    # One token in eight ends its completion, so that the rows are of different lengths.
    end = case.options.get("temperature", 1.0) * math.log(policy.config.vocab_size / 8)
    options = dict(max_steps=1, max_completion_length=8 if setting.small else 32)
    options |= dict(generation_kwargs={"sequence_bias": [[[1], end]]}, **case.options)
    data = prompts(PROMPTS)
    with trainer_on(setting, policy, ROLLOUTS, data, reward_in_turn, **options) as trainer:
        trainer.train()
        yield trainer


def compare(setting: Setting, case: Case) -> dict[str, Any]:
    """How far features are from TRL's gradient: all prompts in one pass, and one prompt a pass."""
    success = SuccessRule(0, reward_in_turn.__name__, 0.5)
    with trainer_of(setting, case) as trainer, preserve_trainer_state(trainer):
        groups = roll_out(trainer, range(PROMPTS), SEED, success)
        truth = torch.stack([gradient_of_loss(trainer, group) for group in groups])
        budgets = (10**6, ROLLOUTS * max(group.tokens for group in groups))
        found = [features_of(trainer, groups, budget) for budget in budgets]
    norms = truth.norm(dim=1)
    if not float(norms.max()) > 0:
        raise ValueError("TRL's own gradient is 0: nothing is compared")
    # Where all rollouts of a prompt are the same, their advantages cancel, and the gradient is nothing but rounding.
    moving = norms > FLOOR * norms.max()
    scale = norms.clamp(min=FLOOR * float(norms.max()))
    errors = [((ours - truth).norm(dim=1) / scale).max() for ours in found]
    cosines = [cosine_similarity(ours, truth, dim=1)[moving].min() for ours in found]
    return {
        "error": float(max(errors)),
        "1 - cosine": max(0.0, 1 - float(min(cosines))),
        "completion tokens": int(sum(group.lengths.sum() for group in groups)),
    }


def features_of(trainer: GRPOTrainer, groups: list[RolloutGroup], tokens: int) -> torch.Tensor:
    """Unprojected features, `(P, parameters)`, on the CPU."""
    projection = Unprojected(trainable_sizes(trainer))
    with gradient_capture(trainer, projection) as capture:
        return (
            GradientFeaturizer(trainer, capture, tokens, lambda values: values)
            .features(groups)
            .cpu()
        )


def gradient_of_loss(trainer: GRPOTrainer, group: RolloutGroup) -> torch.Tensor:
    """What the features of a prompt should be: autograd's gradient of minus TRL's loss of its rows, on the CPU."""
    sizes = trainable_sizes(trainer)
    parts = {name: torch.zeros(size) for name, size in sizes.items()}

    def take(name: str, gradient: torch.Tensor) -> None:
        parts[name] -= gradient.flatten().float().cpu()

    loss_gradient(trainer, group.raw, take)
    return torch.cat(list(parts.values()))
