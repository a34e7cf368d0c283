"""A model that reads texts without gradients: the policy, or a frozen one."""

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
from trl_learnalign.bridge.weights import without_peft

if TYPE_CHECKING:
    from trl import GRPOTrainer


@contextmanager
def reading_model(trainer: GRPOTrainer, name: str | None = None) -> Iterator[nn.Module]:
    """A model that reads texts without gradients, in evaluation mode. Call inside [`left_as_found`].

    Args:
        trainer (`GRPOTrainer`): The trainer.
        name (`str`, *optional*): Hub id or path of a frozen model, loaded whole on every process and let go of at the
            end. Default: the policy, on whatever its parameters are spread over.
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
    """Models are loaded and read whole: ZeRO-3 and FSDP would have them partitioned, or empty on all ranks but one."""
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
    """Natural-log probabilities of the labels with a [`reading_model`]'s head.

    Args:
        model (`torch.nn.Module`): The model.
        input_ids (`torch.Tensor`): `(R, L)`, padded on the right.
        attention_mask (`torch.Tensor`): `(R, L)`.
        labels (`torch.Tensor`): `(R, L)`, -100 where nothing is asked.

    Returns:
        `torch.Tensor`: `(R, L - 1)`: entry `t` is of `labels[:, t + 1]`, 0 where nothing is asked.
    """
    return lm_head.label_log_probs(model, input_ids, attention_mask, labels)


def last_hidden_states(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """Last hidden layer, after the final norm: `(R, L, H)`. No logits are computed but those of one position."""
    kept: list[torch.Tensor] = []

    def shorten(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        kept.append(inputs[0])
        return (inputs[0][:, :1],)

    # What the head reads is what every family agrees on: backbones are nested and called in different ways.
    handle = without_peft(model).get_output_embeddings().register_forward_pre_hook(shorten)
    try:
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        handle.remove()
    # Prompt tuning puts virtual tokens before each row.
    return kept[0][:, -input_ids.shape[1] :]


def next_token_logits(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """Logits after the last token of each row (padded on the right): `(R, V)`."""
    last = attention_mask.sum(dim=1) - 1
    rows = torch.arange(len(last), device=last.device)
    head = without_peft(model).get_output_embeddings()
    # Rows end at different places; the head sees these places alone, instead of all of them.
    handle = head.register_forward_pre_hook(
        lambda module, inputs: (inputs[0][rows, last].unsqueeze(1),)
    )
    try:
        return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[
            :, 0
        ]
    finally:
        handle.remove()
