"""Tokenization as in training, and forward passes over texts without gradients."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations import deepspeed as hf_deepspeed

from trl_learnalign.bridge.lm_head import lm_head
from trl_learnalign.bridge.requires import Called, Required
from trl_learnalign.bridge.weights import without_peft

if TYPE_CHECKING:
    from trl import GRPOTrainer


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

REQUIRES = Required(
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
