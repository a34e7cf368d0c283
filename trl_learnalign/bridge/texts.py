"""From prompts to tokens, with the templates and settings that training uses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trl_learnalign.bridge.required import Called, Required

if TYPE_CHECKING:
    from trl import GRPOTrainer

REQUIRES = Required(
    trainer=("_tokenizer", "_is_vlm", "environment_factories"),
    calls={"_tokenize_prompts": Called(1)},
    later=("_batch_environments",),
)


def sampling_settings(trainer: GRPOTrainer) -> dict[str, Any]:
    """Settings that decide what is sampled."""
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
    """What the trainer passes to `apply_chat_template` besides the conversation."""
    return {
        "tools": trainer.tools or None,
        "chat_template": trainer.chat_template,
        **trainer.chat_template_kwargs,
    }


def prompt_token_lists(
    trainer: GRPOTrainer, prompts: list[Any], environments: list[str | None] | None = None
) -> list[list[int]]:
    """Token ids of prompts, with the chat template and its settings that training uses; without images.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        prompts (`list`): Conversations or strings.
        environments (`list[str]`, *optional*): The environment of each, whose tools its prompt names; by default the
            first.
    """
    if trainer._is_vlm:
        prompts = list(map(_without_images, prompts))
    if trainer.environment_factories is None:
        return trainer._tokenize_prompts(prompts)[0]
    # TRL sets this for each batch of rollouts, and reads it when it tokenizes.
    before = vars(trainer).pop("_batch_environments", None)
    first = next(iter(trainer.environment_factories))
    trainer._batch_environments = [first] * len(prompts) if environments is None else environments
    try:
        return trainer._tokenize_prompts(prompts)[0]
    finally:
        trainer._batch_environments = before


def _without_images(prompt: Any) -> Any:
    """A prompt without the parts that are images, or the places of images that come in another column."""
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
