"""Tiny vision-language models, processors that need no torchvision, and prompts with pictures: made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Sequence, Value
from peft import LoraConfig
from PIL import Image as Pillow
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)
from trl import GRPOTrainer

_MODULE = "transformers.models.{0}.image_processing_pil_{0}"


def _without_torchvision(family: str, name: str) -> Any:
    """A processor of images that transformers 5 has beside the one that needs torchvision."""
    module = pytest.importorskip(_MODULE.format(family), reason="older processors need torchvision")
    return getattr(module, name)


Gemma3ImageProcessorPil = _without_torchvision("gemma3", "Gemma3ImageProcessorPil")
Idefics3ImageProcessorPil = _without_torchvision("idefics3", "Idefics3ImageProcessorPil")
LlavaImageProcessorPil = _without_torchvision("llava", "LlavaImageProcessorPil")
Qwen2VLImageProcessorPil = _without_torchvision("qwen2_vl", "Qwen2VLImageProcessorPil")

PLACES = {
    "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "llava": "<image>",
    "idefics3": "<image>",
    "gemma3": "<start_of_image>",
}
"""Families, and what stands in a prompt for a picture. TRL lays the rows of each out differently: patches by a grid,
one picture after another, pictures of a row padded to the most of any row, and one after another with types of tokens.
"""

_TOKENS = [
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<image>",
    "<fake_token_around_image>",
    "<end_of_utterance>",
    "<global-img>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
]
_TEMPLATE = """{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for part in message['content'] %}{% if part['type'] == 'image' %}PLACE{% else %}{{ part['text'] }}{% endif %}\
{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}={% endif %}"""
_SIDE = 8
_PATCH = 4


def _tokenizer(family: str) -> PreTrainedTokenizerFast:
    made = cases.tokenizer()
    made.add_special_tokens({"additional_special_tokens": _TOKENS})
    made.chat_template = _TEMPLATE.replace("PLACE", PLACES[family])
    if family == "gemma3":
        made.boi_token, made.eoi_token = "<start_of_image>", "<end_of_image>"
        made.image_token = "<image_soft_token>"
        made.boi_token_id, made.eoi_token_id, made.image_token_id = made.convert_tokens_to_ids(
            [made.boi_token, made.eoi_token, made.image_token]
        )
    return made


class _QwenProcessor(Qwen2VLProcessor):
    """Without videos, whose processor needs torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str):
        self.image_token = "<|image_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def processor(family: str, mixed: bool = False) -> ProcessorMixin:
    """Of pictures of 8 x 8 pixels, with one token a character.

    Args:
        family (`str`): One of [`PLACES`].
        mixed (`bool`): Whether it takes `None` for no pictures of a text, which TRL passes beside texts with pictures
            and no processor of transformers 5 takes.
    """
    made = _processor(family)
    if mixed:
        made.__class__ = type(type(made).__name__, (_TakesNone, type(made)), {})
    return made


class _TakesNone:
    def __call__(self, images: Any = None, text: Any = None, **options: Any) -> Any:
        given = None if images is None else [row or [] for row in images]
        return super().__call__(images=given, text=text, **options)  # type: ignore[misc]


def _processor(family: str) -> ProcessorMixin:
    tokenizer = _tokenizer(family)
    square = {"height": _SIDE, "width": _SIDE}
    if family == "qwen2_vl":
        pictures = Qwen2VLImageProcessorPil(
            patch_size=_PATCH, size={"shortest_edge": 64, "longest_edge": 256}
        )
        return _QwenProcessor(pictures, tokenizer, tokenizer.chat_template)
    if family == "llava":
        pictures = LlavaImageProcessorPil(size={"shortest_edge": _SIDE}, crop_size=square)
        return LlavaProcessor(
            pictures,
            tokenizer,
            _PATCH,
            "default",
            tokenizer.chat_template,
            num_additional_image_tokens=1,
        )
    if family == "idefics3":
        pictures = Idefics3ImageProcessorPil(
            size={"longest_edge": _SIDE},
            max_image_size={"longest_edge": _SIDE},
            do_image_splitting=False,
        )
        return Idefics3Processor(
            pictures, tokenizer, image_seq_len=1, chat_template=tokenizer.chat_template
        )
    pictures = Gemma3ImageProcessorPil(size=square)
    return Gemma3Processor(pictures, tokenizer, tokenizer.chat_template, image_seq_length=4)


def model(family: str, seed: int = 0) -> PreTrainedModel:
    """A randomly initialised model of two layers, with a vision tower of one."""
    torch.manual_seed(seed)
    tokenizer = _tokenizer(family)
    ids = dict(zip(_TOKENS, tokenizer.convert_tokens_to_ids(_TOKENS), strict=True))
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    vision = dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=_SIDE,
        patch_size=_PATCH,
    )
    if family == "qwen2_vl":
        made = Qwen2VLForConditionalGeneration(
            Qwen2VLConfig(
                text_config={
                    **text,
                    "rope_parameters": {
                        "rope_type": "default",
                        "rope_theta": 1e4,
                        "mrope_section": [1, 1, 2],
                    },
                },
                vision_config=dict(
                    depth=1,
                    embed_dim=16,
                    hidden_size=16,
                    num_heads=2,
                    mlp_ratio=2,
                    patch_size=_PATCH,
                    spatial_merge_size=2,
                    temporal_patch_size=2,
                ),
                image_token_id=ids["<|image_pad|>"],
                video_token_id=ids["<|video_pad|>"],
                vision_start_token_id=ids["<|vision_start|>"],
                vision_end_token_id=ids["<|vision_end|>"],
                tie_word_embeddings=True,
            )
        )
    elif family == "llava":
        made = LlavaForConditionalGeneration(
            LlavaConfig(
                text_config={"model_type": "llama", **text},
                vision_config={
                    "model_type": "clip_vision_model",
                    **vision,
                    "num_hidden_layers": 2,
                    "projection_dim": 16,
                },
                image_token_id=ids["<image>"],
                image_seq_length=4,
                tie_word_embeddings=False,
            )
        )
    elif family == "idefics3":
        made = Idefics3ForConditionalGeneration(
            Idefics3Config(
                text_config={"model_type": "llama", **text},
                vision_config=vision,
                image_token_id=ids["<image>"],
                scale_factor=2,
                pad_token_id=0,
            )
        )
    else:
        made = Gemma3ForConditionalGeneration(
            Gemma3Config(
                text_config={**text, "head_dim": 8, "sliding_window": 32},
                vision_config={**vision, "vision_use_head": False},
                mm_tokens_per_image=4,
                boi_token_index=ids["<start_of_image>"],
                eoi_token_index=ids["<end_of_image>"],
                image_token_index=ids["<image_soft_token>"],
                image_token_id=ids["<image_soft_token>"],
            )
        )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made


def adapter() -> LoraConfig:
    """LoRA of the text model and of the vision tower, not at B = 0, where half of the gradients vanish."""
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj", "qkv"], init_lora_weights=False)


def picture(number: int) -> Pillow.Image:
    """Squares of noise, and for every third number one twice as wide."""
    width = _SIDE * (2 if number % 3 == 0 else 1)
    pixels = np.random.default_rng(number).integers(0, 256, (_SIDE, width, 3), dtype=np.uint8)
    return Pillow.fromarray(pixels)


def dataset(counts: list[int]) -> Dataset:
    """Conversations, with so many pictures each in the column `images`."""
    texts = [f"{'abcdefgh'[: 1 + i % 5]}{i}?" for i in range(len(counts))]
    columns = {
        "prompt": [[{"role": "user", "content": text}] for text in texts],
        "images": [[picture(10 * i + j) for j in range(count)] for i, count in enumerate(counts)],
    }
    columns["number"] = list(range(len(counts)))
    features = Features(
        prompt=[{"role": Value("string"), "content": Value("string")}],
        images=Sequence(Image()),
        number=Value("int64"),
    )
    return Dataset.from_dict(columns, features=features)


def half_idle_reward(completions: list[Any], number: list[int], **_: Any) -> list[float]:
    """A coin for every other prompt, and nothing to be had for the rest."""
    coins = cases.accuracy_reward(completions)
    return [coin * (i % 2) for coin, i in zip(coins, number, strict=True)]


def trainer(folder: Path | str, family: str = "qwen2_vl", **options: Any) -> GRPOTrainer:
    """An unmodified `GRPOTrainer` on a tiny model; `data`, `rewards`, `peft_config`, … are its own arguments."""
    policy = options.pop("policy", None)
    data = options.pop("data", None)
    mixed = options.pop("mixed", False)
    peft_config = options.pop("peft_config", None)
    return GRPOTrainer(
        model=model(family) if policy is None else policy,
        reward_funcs=options.pop("rewards", cases.accuracy_reward),
        args=cases.grpo_config(folder, **options),
        train_dataset=dataset([1] * 12) if data is None else data,
        processing_class=processor(family, mixed),
        peft_config=peft_config,
    )
