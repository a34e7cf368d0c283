"""Images of a generation by rows: TRL's entries for them split so that each row has its own, and put back together.

A row has no image, one or several, and processors lay them out in different ways: patches of all images one after the
other, all images one after the other, tiles, or for each row as many images as the fullest row has. TRL splits and
joins all of these itself before it shuffles a generation (`split_pixel_values_by_grid`), and so does this file. Types
of tokens (`token_type_ids`) have a column for each token of prompt and completion. The two are padded on different
sides, so that their types become two entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from trl.trainer import utils as trl_utils

from trl_learnalign.bridge.required import Called, Required

REQUIRES = Required(
    functions={
        "trl.trainer.utils:split_pixel_values_by_grid": Called(1),
        "trl.trainer.utils:unsplit_pixel_values_by_grid": Called(1),
    }
)

Batch = dict[str, Any]

COUNTS = "num_images"
_NUMBERS = (COUNTS, "num_tiles")
_PIXELS = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "image_position_ids",
)
_SIZES = {"image_sizes", "spatial_shapes"}
_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
PROMPT_TYPES = tuple(f"{name} of prompts" for name in _TOKEN_TYPES)
COMPLETION_TYPES = tuple(f"{name} of completions" for name in _TOKEN_TYPES)
NAMES = frozenset((*_NUMBERS, *_PIXELS, *PROMPT_TYPES, *COMPLETION_TYPES))
"""Entries that a batch by rows has for its images; one whose rows have none lacks them."""

PADDED = ("pixel_values", "pixel_attention_mask")
"""Those of them with as many images for each row as the fullest row has, in some layouts: `(R, N, …)`."""


def by_row(batch: Mapping[str, Any]) -> Batch:
    """A batch whose entries for images have a row for each rollout.

    Args:
        batch (mapping): TRL's, of `R` rows, `Q` prompt and `C` completion columns.
    """
    rows = dict(batch)
    if not _is_padded(rows) and rows.get(COUNTS) is not None:
        rows = dict(trl_utils.split_pixel_values_by_grid(rows))
    width = rows["prompt_ids"].shape[1]
    both = width + rows["completion_ids"].shape[1]
    for name, of_prompts, of_completions in zip(
        _TOKEN_TYPES, PROMPT_TYPES, COMPLETION_TYPES, strict=True
    ):
        types = rows.get(name)
        if types is not None and types.shape[1] == both:
            rows[of_prompts], rows[of_completions] = types[:, :width], types[:, width:]
            del rows[name]
    return rows


def for_loss(rows: Mapping[str, Any]) -> Batch:
    """The inverse of [`by_row`], without pixels of no image (see [`without_empty_images`])."""
    batch = dict(rows)
    for name, of_prompts, of_completions in zip(
        _TOKEN_TYPES, PROMPT_TYPES, COMPLETION_TYPES, strict=True
    ):
        if of_prompts in batch:
            parts = batch.pop(of_prompts), batch.pop(of_completions)
            batch[name] = torch.cat(parts, dim=1)
    batch = without_empty_images(batch)
    for name in _PIXELS:
        if isinstance(batch.get(name), list):
            batch[name] = _of_one_shape(batch[name])
    return dict(trl_utils.unsplit_pixel_values_by_grid(batch))


def without_empty_images(batch: Mapping[str, Any]) -> Batch:
    """A batch without pixels where none of its rows has an image: a vision tower fails on pixels of no image.

    TRL leaves them in a micro-batch of a generation in which other rows have images.
    """
    if any(batch.get(COUNTS) or ()):
        return dict(batch)
    return {name: value for name, value in batch.items() if name not in _PIXELS}


def without_images(batch: Mapping[str, Any]) -> Batch:
    """TRL's batch without its entries for images, but for their numbers."""
    names = {*_PIXELS, *_TOKEN_TYPES}
    return {name: value for name, value in batch.items() if name not in names}


def image_counts(rows: Mapping[str, Any]) -> list[int]:
    """Images of each row, `R` numbers."""
    return list(rows.get(COUNTS) or [0] * len(rows["advantages"]))


def layout(rows: Mapping[str, Any]) -> list[str]:
    """What batches by rows must agree in to be joined; empty without images.

    The size of images is no part of it where the model is given it for each of them.
    """
    if not any(image_counts(rows)):
        return []
    names = sorted(name for name in rows if name in NAMES)
    kinds = [f"{name} of {type(rows[name]).__name__}" for name in names]
    if "pixel_values" not in rows or not _SIZES.isdisjoint(names):
        return kinds
    return [*kinds, f"pixels of {_size(rows['pixel_values'], _is_padded(rows))}"]


def completed(batches: Sequence[Mapping[str, Any]]) -> list[Batch]:
    """Batches by rows with the same entries: rows without images get the entries of those with some, empty.

    Args:
        batches (sequence of mappings): Of one [`layout`].
    """
    whole = next((batch for batch in batches if any(image_counts(batch))), None)
    if whole is None:
        return [{k: v for k, v in batch.items() if k not in NAMES} for batch in batches]
    names = [name for name in whole if name in NAMES]
    return [
        {
            **{name: _nothing(name, whole[name], batch) for name in names if name not in batch},
            **batch,
        }
        for batch in batches
    ]


def _nothing(name: str, example: Any, batch: Mapping[str, Any]) -> Any:
    """An entry of a batch without images, after that of one with some."""
    rows = len(batch["advantages"])
    if name in _NUMBERS:
        return [0] * rows
    if isinstance(example, list):
        return [example[0][:0]] * rows
    if name in PROMPT_TYPES:
        return torch.zeros_like(batch["prompt_ids"])
    if name in COMPLETION_TYPES:
        return torch.zeros_like(batch["completion_ids"])
    return example.new_zeros((rows, 0, *example.shape[2:]))


def _is_padded(batch: Mapping[str, Any]) -> bool:
    """Whether there are as many images for each row as the fullest row has (Idefics, SmolVLM).

    TRL takes them for one image after the other where their number is that of the rows.
    """
    return "pixel_attention_mask" in batch and "spatial_shapes" not in batch


def _size(pixels: Any, is_padded: bool) -> tuple[int, ...]:
    example = pixels[0] if isinstance(pixels, list) else pixels
    return tuple(example.shape[2 if is_padded else 1 :])


def _of_one_shape(pieces: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Images of several batches, `(N, …)` each, padded at the end of each axis as a processor pads those of one."""
    if len({piece.shape[1:] for piece in pieces}) == 1:
        return list(pieces)
    shapes = torch.tensor([piece.shape[1:] for piece in pieces])
    largest = shapes.amax(dim=0)
    padded = []
    for piece, shape in zip(pieces, shapes, strict=True):
        missing = (largest - shape).flip(0).tolist()
        ends = [end for number in missing for end in (0, number)]
        padded.append(nn.functional.pad(piece, ends) if any(missing) else piece)
    return padded
