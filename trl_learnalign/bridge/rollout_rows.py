"""The rows of a generation, one per rollout: join, select, trim and move them between processes.

A *batch* is the input of TRL's loss, as `_generate_and_score_completions` returns it: entries with one row per
rollout, and numbers that hold for all rows (`num_items_in_batch`). Axes: `R` rows, `Q` prompt and `C` completion
columns. Its image entries are arranged by row ([`by_row`]).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from trl.trainer import utils as trl_utils

from trl_learnalign.bridge.policy import causal_lm, has_virtual_tokens
from trl_learnalign.bridge.requires import Called, Required
from trl_learnalign.distributed import Ranks

if TYPE_CHECKING:
    from trl import GRPOTrainer


# ---- Which rows are trained on, and on which process ----------------------------------------------------------------

Source = tuple[int, int]


@dataclass(frozen=True)
class RowPlan:
    """Rows of an optimizer step, by process and micro-batch.

    Args:
        rows (`list`): For each rank the rows that it trains on, micro-batch after micro-batch.
        sizes (`list[int]`): Rows of each micro-batch, the same on every rank, because TRL gathers one value per row.
            The first ones may be empty; the last one is not.
    """

    rows: list[list[Source]]
    sizes: list[int]

    def slices(self) -> list[slice]:
        """The micro-batches, as slices of a rank's rows."""
        parts = []
        end = 0
        for size in self.sizes:
            parts.append(slice(end, end + size))
            end += size
        return parts


def plan_rows(
    useful: Sequence[np.ndarray],
    tokens: Sequence[np.ndarray],
    in_loss: Sequence[np.ndarray],
    micro_batches: int,
    movable: bool,
) -> RowPlan | None:
    """Distribute the rows with a gradient evenly over ranks, and over as few micro-batches as possible.

    Every rank trains on equally many rows in every micro-batch, because the forward and backward passes of all ranks
    are synchronised and the fullest rank determines the time. A rank with too few such rows also takes rows without a
    gradient. If no rank has a row with a gradient, each takes one without: the shortest of those with a token in the
    loss, so that the loss metrics have values. No micro-batch gets larger than before. The micro-batches in use are
    the last ones, because gradients are exchanged at their end. Rows of similar length share a micro-batch.

    Args:
        useful (sequence of `np.ndarray`): For each rank, which of its rows have a gradient: `bool` `(R,)`.
        tokens (sequence of `np.ndarray`): For each rank, the tokens of its rows: `int64` `(R,)`.
        in_loss (sequence of `np.ndarray`): For each rank, the tokens of its rows that are in the loss: `int64` `(R,)`.
        micro_batches (`int`): Number of micro-batches that a rank's rows form.
        movable (`bool`): Whether rows may move to another rank.

    Returns:
        `RowPlan`, *optional*: `None` if no row could be left out.
    """
    share = _share(useful, movable)
    rows_before = len(useful[0])
    if share >= rows_before:
        return None
    sources: list[Source] = []
    for rank, flags in enumerate(useful):
        sources += _places(rank, flags)
    rows = spread(sources, len(useful), share)
    for rank, chosen in enumerate(rows):
        missing = share - len(chosen)
        idle = sorted(
            _places(rank, ~useful[rank]),
            key=lambda source: (not _length(in_loss, source), _length(tokens, source), source),
        )
        chosen += idle[:missing]
        chosen.sort(key=lambda source: (-_length(tokens, source), source))
    return RowPlan(rows, _sizes(share, rows_before, micro_batches))


def with_an_image(
    useful: Sequence[np.ndarray], images: Sequence[np.ndarray], tokens: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """The rows with a gradient; if none of them has an image but other rows do, also the shortest row with an image.

    Args:
        useful (sequence of `np.ndarray`): For each rank, which of its rows have a gradient: `bool` `(R,)`.
        images (sequence of `np.ndarray`): For each rank, the number of images of its rows: `int64` `(R,)`.
        tokens (sequence of `np.ndarray`): For each rank, the tokens of its rows: `int64` `(R,)`.
    """
    flags = [np.array(rows) for rows in useful]
    shown = [source for rank, counts in enumerate(images) for source in _places(rank, counts > 0)]
    if shown and not any(flags[rank][place] for rank, place in shown):
        rank, place = min(shown, key=lambda source: (_length(tokens, source), source))
        flags[rank][place] = True
    return flags


def _share(useful: Sequence[np.ndarray], movable: bool) -> int:
    """Number of rows that each rank trains on; at least one."""
    counts = [int(flags.sum()) for flags in useful]
    fullest = max(counts)
    if movable:
        fullest = math.ceil(sum(counts) / len(counts))
    return max(1, fullest)


def _sizes(share: int, rows_before: int, micro_batches: int) -> list[int]:
    """Rows of each micro-batch: the last ones are filled evenly, as few as possible; the others are empty."""
    most = math.ceil(rows_before / micro_batches)
    needed = math.ceil(share / most)
    least, more = divmod(share, needed)
    empty = [0] * (micro_batches - needed)
    larger = [least + 1] * more
    smaller = [least] * (needed - more)
    return empty + larger + smaller


def _places(rank: int, flags: np.ndarray) -> list[Source]:
    return [(rank, int(place)) for place in np.flatnonzero(flags)]


def _length(tokens: Sequence[np.ndarray], source: Source) -> int:
    rank, place = source
    return int(tokens[rank][place])


def spread(sources: Sequence[Source], ranks: int, share: int) -> list[list[Source]]:
    """Assign up to `share` rows to each rank: its own first, then the surplus of other ranks.

    Args:
        sources (sequence of `(int, int)`): Rows as (rank, row), at most `ranks * share`.
        ranks (`int`): Number of ranks.
        share (`int`): Maximum number of rows per rank.
    """
    here: list[list[Source]] = [[] for _ in range(ranks)]
    surplus: list[Source] = []
    for source in sources:
        rank, _ = source
        has_room = len(here[rank]) < share
        (here[rank] if has_room else surplus).append(source)
    for rows in here:
        room = share - len(rows)
        rows += surplus[:room]
        surplus = surplus[room:]
    return here


def choose_groups(
    useful: np.ndarray, learnability: np.ndarray, batches: np.ndarray, count: int
) -> np.ndarray:
    """Choose the rollout groups to train on; the result is in order of arrival.

    Groups with a gradient have priority, batch by batch. Within the batch that has too many, those with the highest
    learnability are chosen; ties are broken by arrival. If there are too few, groups without a gradient are added.

    Args:
        useful (`np.ndarray`): Which groups have a gradient, in order of arrival: `bool` `(P,)`.
        learnability (`np.ndarray`): Learnability of each group, such as p(1 - p): `float64` `(P,)`.
        batches (`np.ndarray`): The batch in which each group was rolled out: `int64` `(P,)`.
        count (`int`): Groups to choose, at most `P`.

    Returns:
        `np.ndarray`: Indices of the groups, ascending: `int64` `(count,)`.
    """
    arrival = np.arange(len(useful))
    # Equal success rates may give values that differ in their last bits.
    best_first = -np.round(learnability, 12)
    # `lexsort` uses the last key first. Groups without a gradient are sorted by arrival only.
    keys = (
        arrival,
        np.where(useful, best_first, 0.0),
        np.where(useful, batches, 0),
        ~useful,
    )
    order = np.lexsort(keys)
    return np.sort(order[:count])


# ---- Image entries by row -------------------------------------------------------------------------------------------
# A row has no image, one or several. Processors use different layouts: the patches of all images concatenated, all
# images concatenated, tiles, or for each row as many images as the fullest row has. TRL itself splits and joins all of
# these before it shuffles a generation (`split_pixel_values_by_grid`), and this module does the same.
# Token types (`token_type_ids`) have a column for each prompt and completion token. Prompts and completions are padded
# on different sides, so their types are split into two entries.

IMAGES_REQUIRES = Required(
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
"""Image entries of a batch by rows; a batch without images lacks them."""

PADDED = ("pixel_values", "pixel_attention_mask")
"""The image entries that in some layouts have as many images per row as the fullest row has: `(R, N, …)`."""


def by_row(batch: Mapping[str, Any]) -> Batch:
    """A batch whose image entries have one row per rollout.

    Args:
        batch (mapping): TRL's batch with `R` rows, `Q` prompt and `C` completion columns.
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
    """The inverse of [`by_row`]; drops pixel entries without images (see [`without_empty_images`])."""
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
    """A batch without pixel entries if none of its rows has an image, because a vision tower fails on empty input.

    TRL keeps the empty entries in such a micro-batch if other rows of the generation have images.
    """
    if any(batch.get(COUNTS) or ()):
        return dict(batch)
    return {name: value for name, value in batch.items() if name not in _PIXELS}


def without_images(batch: Mapping[str, Any]) -> Batch:
    """TRL's batch without its image entries, except for the image counts."""
    names = {*_PIXELS, *_TOKEN_TYPES}
    return {name: value for name, value in batch.items() if name not in names}


def image_counts(rows: Mapping[str, Any]) -> list[int]:
    """Number of images of each row, `R` numbers."""
    return list(rows.get(COUNTS) or [0] * len(rows["advantages"]))


def layout(rows: Mapping[str, Any]) -> list[str]:
    """The properties in which batches by rows must agree to be joined; empty without images.

    The image size is not one of them if the model receives the size of each image.
    """
    if not any(image_counts(rows)):
        return []
    names = sorted(name for name in rows if name in NAMES)
    kinds = [f"{name} of {type(rows[name]).__name__}" for name in names]
    if "pixel_values" not in rows or not _SIZES.isdisjoint(names):
        return kinds
    return [*kinds, f"pixels of {_size(rows['pixel_values'], _is_padded(rows))}"]


def completed(batches: Sequence[Mapping[str, Any]]) -> list[Batch]:
    """Batches by rows with the same entries: batches without images get empty image entries.

    Args:
        batches (sequence of mappings): Batches with the same [`layout`].
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
    """An empty image entry for a batch without images, modelled on a batch that has some."""
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
    """Whether each row has as many image slots as the fullest row (Idefics, SmolVLM).

    TRL treats them as concatenated images if their number equals the number of rows.
    """
    return "pixel_attention_mask" in batch and "spatial_shapes" not in batch


def _size(pixels: Any, is_padded: bool) -> tuple[int, ...]:
    example = pixels[0] if isinstance(pixels, list) else pixels
    return tuple(example.shape[2 if is_padded else 1 :])


def _of_one_shape(pieces: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Images of several batches, `(N, …)` each, padded at the end of each axis as a processor pads within a batch."""
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


# ---- Rows -----------------------------------------------------------------------------------------------------------

REQUIRES = Required(trainer=("_tokenizer", "pad_to_multiple_of", "vllm_importance_sampling_mode"))

Padding = dict[str, "tuple[str, float] | None"]

ROUNDING = 8 * torch.finfo(torch.float32).eps
"""An advantage below this fraction of the generation's largest counts as 0, because it is due to rounding."""

LEFT, RIGHT, IMAGES = "left", "right", "images"
IMAGE_PADDING: Padding = {
    **dict.fromkeys(NAMES),
    **dict.fromkeys(PADDED, (IMAGES, 0)),
    **dict.fromkeys(PROMPT_TYPES, (LEFT, 0)),
    **dict.fromkeys(COMPLETION_TYPES, (RIGHT, 0)),
}
"""Padding of image entries that are tensors."""

# Attention that depends only on the distances between tokens.
_RELATIVE_LAYERS = {"full_attention", "sliding_attention"}
# Rotary embeddings that do not depend on the length of the longest row.
_CONSTANT_ROPE = {"default", "linear", "llama3", "yarn"}


def padding_of(trainer: GRPOTrainer) -> Padding:
    """Padding of the known entries: side and fill value; `None` for entries that are not padded."""
    token = trainer._tokenizer.pad_token_id
    # A sequence-level ratio is one number per row; a token-level ratio is 1 at padding.
    by_token = trainer.use_vllm and trainer.vllm_importance_sampling_mode.startswith("token")
    return {
        "prompt_ids": (LEFT, token),
        "prompt_mask": (LEFT, 0),
        "completion_ids": (RIGHT, token),
        "completion_mask": (RIGHT, 0),
        "tool_mask": (RIGHT, 1),
        "old_per_token_logps": (RIGHT, 0.0),
        "sampling_per_token_logps": (RIGHT, 0.0),
        "ref_per_token_logps": (RIGHT, 0.0),
        "importance_sampling_ratio": (RIGHT, 1.0) if by_token else None,
        "advantages": None,
        **IMAGE_PADDING,
    }


def has_rows(value: Any) -> bool:
    """Whether an entry has one row per rollout; other entries hold for the whole generation."""
    return value is not None and not (isinstance(value, torch.Tensor) and value.ndim == 0)


def unknown_entries(batch: Mapping[str, Any], padding: Padding) -> list[str]:
    """Entries whose rows cannot be selected: image layouts that TRL does not split, and entries of subclasses."""
    rows = row_count(batch)
    strange = [
        name
        for name, value in batch.items()
        if has_rows(value) and (name not in padding or len(value) != rows)
    ]
    if _by_token(batch):
        strange.append(f"advantages of shape {tuple(batch['advantages'].shape)}")
    return sorted(strange)


def _by_token(batch: Mapping[str, Any]) -> bool:
    """Whether advantages are per token, `(R, C)`, as in some subclasses of the trainer."""
    return batch["advantages"].ndim > 1


def row_count(batch: Mapping[str, Any]) -> int:
    """Number of rows, `R`."""
    return len(batch["advantages"])


def loss_mask(batch: Mapping[str, Any]) -> torch.Tensor:
    """Mask of the tokens in the loss, `(R, C)`: completions that are not masked, without tool outputs."""
    return batch["completion_mask"] * batch.get("tool_mask", 1)


def row_tokens(batch: Mapping[str, Any]) -> torch.Tensor:
    """Number of tokens of each row, prompt included and padding excluded, `(R,)`."""
    return batch["prompt_mask"].sum(dim=1) + batch["completion_mask"].sum(dim=1)


def lengths(batch: Mapping[str, Any], pad_token: int) -> torch.Tensor:
    """Number of tokens of each row's prompt and of its completion, padding excluded, `int64` `(R, 2)`.

    Args:
        batch (`dict`): Loss inputs.
        pad_token (`int`): Id of the tokenizer's padding token.
    """
    completion = batch["completion_mask"].sum(dim=1)
    # TRL empties the mask of a truncated completion if it is left out of the loss. Such a completion has no padding.
    written = (batch["completion_ids"] != pad_token).sum(dim=1)
    completion = torch.where(completion > 0, completion, written)
    return torch.stack([batch["prompt_mask"].sum(dim=1), completion], dim=1).long()


def advantage_sizes(batch: Mapping[str, Any]) -> torch.Tensor:
    """Absolute advantages, `(R,)`."""
    return (
        batch["advantages"].abs().flatten(start_dim=1).amax(dim=1)
        if _by_token(batch)
        else batch["advantages"].abs()
    )


def has_gradient(sizes: Any, peak: float) -> Any:
    """Which rows have a gradient, by their absolute advantages.

    Values that are 0 up to rounding count as 0. `multi_objective_aggregation="normalize_then_sum"` centres advantages
    over the whole batch, so those of a prompt without a signal differ from 0 in their last bits.

    Args:
        sizes (`torch.Tensor` or `np.ndarray`): Absolute advantages, any shape.
        peak (`float`): The largest in the generation, over all processes.
    """
    return sizes > ROUNDING * peak


def take(batch: Mapping[str, Any], places: Sequence[int]) -> Batch:
    """Select rows in this order; values that hold for the whole generation are kept."""
    index = torch.tensor(places, dtype=torch.long, device=batch["advantages"].device)
    taken: Batch = {}
    for name, value in batch.items():
        if isinstance(value, list):
            taken[name] = [value[place] for place in places]
        else:
            taken[name] = value[index] if has_rows(value) else value
    return taken


def join(batches: Sequence[Mapping[str, Any]], padding: Padding) -> Batch:
    """Concatenate the rows of several batches, padded to the widest; generation-wide numbers are the first batch's.

    Args:
        batches (sequence of `dict`): At least one, with the same entries.
        padding (`dict`): [`padding_of`] the trainer.
    """
    whole: Batch = {}
    batches = completed(batches)
    for name, value in batches[0].items():
        if isinstance(value, list):
            whole[name] = [row for batch in batches for row in batch[name]]
        elif has_rows(value):
            values = [batch[name] for batch in batches]
            whole[name] = torch.cat(_of_one_width(values, padding[name]))
        else:
            whole[name] = value
    return whole


def _of_one_width(values: list[torch.Tensor], rule: tuple[str, float] | None) -> list[torch.Tensor]:
    if rule is None:
        return values
    side, fill = rule
    inner = [0, 0] * (values[0].ndim - 2)
    widest = max(value.shape[1] for value in values)
    widened = []
    for value in values:
        missing = widest - value.shape[1]
        ends = [*inner, missing, 0] if side == LEFT else [*inner, 0, missing]
        widened.append(nn.functional.pad(value, ends, value=fill))
    return widened


def trim(batch: Mapping[str, Any], padding: Padding, multiple: int | None = None) -> Batch:
    """Drop the columns that are padding in every row; one column of each kind is kept, so that shapes stay valid.

    Args:
        batch (mapping): The batch.
        padding (`dict`): [`padding_of`] the trainer.
        multiple (`int`, *optional*): Keep widths a multiple of this (`pad_to_multiple_of`).
    """
    prompt_mask = batch["prompt_mask"].flip(1)  # padded on the left
    widths = {
        LEFT: _needed_width(prompt_mask, multiple),
        RIGHT: _needed_width(batch["completion_mask"], multiple),
    }
    trimmed = dict(batch)
    for name, value in batch.items():
        rule = padding.get(name)
        if rule is None or rule[0] == IMAGES or not has_rows(value):
            continue
        side, _ = rule
        width = widths[side]
        trimmed[name] = value[:, -width:] if side == LEFT else value[:, :width]
    return trimmed


def _needed_width(mask: torch.Tensor, multiple: int | None) -> int:
    """Number of columns up to the last one that a row uses; at least one."""
    columns = torch.nonzero(mask.any(dim=0))
    needed = int(columns[-1]) + 1 if len(columns) else 1
    if multiple is not None:
        needed = math.ceil(needed / multiple) * multiple
    return min(needed, mask.shape[1])


def assemble(
    ranks: Ranks, batch: Mapping[str, Any], wanted: Sequence[Sequence[Source]], padding: Padding
) -> Batch:
    """Collect the rows assigned to this process from all processes. All processes call it together.

    Only rows that move between processes are sent, as one object per pair of processes. This works with every backend
    of torch.distributed, even if processes have padded to different widths.

    Args:
        ranks (`Ranks`): The processes.
        batch (mapping): This process's rows.
        wanted (sequence of sequences of `(int, int)`): For each process the rows assigned to it, as (rank, row) of
            their current location. The same on every process.
        padding (`dict`): [`padding_of`] the trainer.
    """
    outgoing = _outgoing(ranks, batch, wanted)
    stays = all(source == rank for rank, sources in enumerate(wanted) for source, _ in sources)
    incoming = [] if stays else ranks.gather(outgoing)
    device = batch["advantages"].device
    parts: list[Mapping[str, Any]] = [batch]
    sources = [(ranks.index, place) for place in range(row_count(batch))]
    for parcel in incoming:
        if parcel.to == ranks.index:
            parts.append(_moved(parcel.rows, device))
            sources += parcel.sources
    place_of = {source: place for place, source in enumerate(sources)}
    return take(join(parts, padding), [place_of[source] for source in wanted[ranks.index]])


@dataclass(frozen=True)
class _Parcel:
    """Rows to send: target rank, original location, and content on the CPU."""

    to: int
    sources: list[Source]
    rows: Batch


def _outgoing(
    ranks: Ranks, batch: Mapping[str, Any], wanted: Sequence[Sequence[Source]]
) -> list[_Parcel]:
    """What this rank sends, one parcel per rank that needs some of its rows."""
    rows = {name: value for name, value in batch.items() if has_rows(value)}
    parcels = []
    for rank, sources in enumerate(wanted):
        asked = [source for source in sources if source[0] == ranks.index]
        if rank == ranks.index or not asked:
            continue
        chosen = take(rows, [place for _, place in asked])
        parcels.append(_Parcel(rank, asked, _moved(chosen, torch.device("cpu"))))
    return parcels


def _moved(rows: Batch, device: torch.device) -> Batch:
    """The rows on another device."""
    return {
        name: [_on(item, device) for item in value]
        if isinstance(value, list)
        else _on(value, device)
        for name, value in rows.items()
    }


def _on(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def ignores_padding(trainer: GRPOTrainer) -> bool:
    """Whether a row's log-probabilities do not depend, up to rounding, on the amount of padding.

    TRL passes no position ids, so models that count positions from the left edge (GPT-2) see other positions when a
    row is padded to a longer prompt. Rotary attention depends only on distances between tokens and is not affected.
    Every architecture not known to be of that kind is assumed to be affected: convolutions and recurrences, attention
    in fixed chunks, rotary embeddings that depend on the longest row, virtual tokens in front of the padding.
    """
    model = causal_lm(trainer)
    settings = model.config.get_text_config().to_dict()
    rope = settings.get("rope_parameters")
    if rope is None and "rope_theta" in settings:  # before transformers 5
        rope = settings.get("rope_scaling") or {"rope_type": "default"}
    if not rope or has_virtual_tokens(trainer):
        return False
    # There is one setting for the model, or one for each type of layer.
    rotations = [entry for entry in rope.values() if isinstance(entry, dict)] or [rope]
    rope_types = {rotation.get("rope_type", "default") for rotation in rotations}
    layer_types = set(settings.get("layer_types") or ())
    convolves = any(isinstance(module, nn.Conv1d) for module in model.modules())
    return rope_types <= _CONSTANT_ROPE and layer_types <= _RELATIVE_LAYERS and not convolves
