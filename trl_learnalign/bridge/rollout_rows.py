"""The rows of a generation, one for each rollout: joined, taken, cut, and handed from process to process.

A *batch* is what TRL's loss reads, as `_generate_and_score_completions` returns it: entries with one row for each
rollout, and numbers that hold for all of them (`num_items_in_batch`). Axes: `R` rows, `Q` prompt and `C` completion
columns. Its images are by rows (`image_rows.by_row`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trl_learnalign.bridge import image_rows
from trl_learnalign.bridge.required import Required
from trl_learnalign.bridge.weights import causal_lm, has_virtual_tokens
from trl_learnalign.distributed import Ranks

if TYPE_CHECKING:
    from trl import GRPOTrainer

REQUIRES = Required(trainer=("_tokenizer", "pad_to_multiple_of", "vllm_importance_sampling_mode"))

Batch = dict[str, Any]
Padding = dict[str, "tuple[str, float] | None"]
Source = tuple[int, int]
"""Where a row is: rank, and place in that rank's batch."""

ROUNDING = 8 * torch.finfo(torch.float32).eps
"""An advantage below this share of the generation's largest is 0 but for rounding."""

LEFT, RIGHT, IMAGES = "left", "right", "images"
IMAGE_PADDING: Padding = {
    **dict.fromkeys(image_rows.NAMES),
    **dict.fromkeys(image_rows.PADDED, (IMAGES, 0)),
    **dict.fromkeys(image_rows.PROMPT_TYPES, (LEFT, 0)),
    **dict.fromkeys(image_rows.COMPLETION_TYPES, (RIGHT, 0)),
}
"""How the entries of images are padded where they are tensors."""

# Attention that sees distances between tokens and nothing else.
_RELATIVE_LAYERS = {"full_attention", "sliding_attention"}
# Rotations that do not change with the length of the longest row.
_CONSTANT_ROPE = {"default", "linear", "llama3", "yarn"}


def padding_of(trainer: GRPOTrainer) -> Padding:
    """How the entries that are known are padded: side and fill; `None` for those that are not padded."""
    token = trainer._tokenizer.pad_token_id
    # A ratio of sequences is one number for each row; one of tokens is 1 where there is no token.
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
    """Whether an entry has a row for each rollout; the others hold for the whole generation."""
    return value is not None and not (isinstance(value, torch.Tensor) and value.ndim == 0)


def unknown_entries(batch: Mapping[str, Any], padding: Padding) -> list[str]:
    """Entries of which nobody knows how to take rows: layouts of images that TRL does not split, and those that
    subclasses add.
    """
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
    """Whether there is an advantage for each token, `(R, C)`: subclasses of the trainer do that."""
    return batch["advantages"].ndim > 1


def row_count(batch: Mapping[str, Any]) -> int:
    """Rows, `R`."""
    return len(batch["advantages"])


def loss_mask(batch: Mapping[str, Any]) -> torch.Tensor:
    """The tokens that the loss is over, `(R, C)`: completions that are not masked, without what tools said."""
    return batch["completion_mask"] * batch.get("tool_mask", 1)


def row_tokens(batch: Mapping[str, Any]) -> torch.Tensor:
    """Tokens that each row takes part with, prompt included and padding left out, `(R,)`."""
    return batch["prompt_mask"].sum(dim=1) + batch["completion_mask"].sum(dim=1)


def advantage_sizes(batch: Mapping[str, Any]) -> torch.Tensor:
    """Absolute advantages, `(R,)`."""
    return (
        batch["advantages"].abs().flatten(start_dim=1).amax(dim=1)
        if _by_token(batch)
        else batch["advantages"].abs()
    )


def has_gradient(sizes: Any, peak: float) -> Any:
    """Which rows have a gradient, by the sizes of their advantages.

    Sizes that are 0 but for rounding count as 0: `multi_objective_aggregation="normalize_then_sum"` centres advantages
    over the whole batch, so that those of a prompt without a signal differ from 0 in their last bits.

    Args:
        sizes (`torch.Tensor` or `np.ndarray`): Absolute advantages, any shape.
        peak (`float`): The largest in the generation, over all processes.
    """
    return sizes > ROUNDING * peak


def take(batch: Mapping[str, Any], places: Sequence[int]) -> Batch:
    """Some rows, in this order; what holds for the whole generation stays."""
    index = torch.tensor(places, dtype=torch.long, device=batch["advantages"].device)
    taken: Batch = {}
    for name, value in batch.items():
        if isinstance(value, list):
            taken[name] = [value[place] for place in places]
        else:
            taken[name] = value[index] if has_rows(value) else value
    return taken


def join(batches: Sequence[Mapping[str, Any]], padding: Padding) -> Batch:
    """The rows of several batches one after the other, padded to the widest; the first one's numbers stay.

    Args:
        batches (sequence of `dict`): At least one, with the same entries.
        padding (`dict`): [`padding_of`] the trainer.
    """
    whole: Batch = {}
    batches = image_rows.completed(batches)
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
    """The batch without the columns that are padding in every row; one of each kind stays, so that shapes are valid.

    Args:
        batch (mapping): The batch.
        padding (`dict`): [`padding_of`] the trainer.
        multiple (`int`, *optional*): Widths stay a multiple of this (`pad_to_multiple_of`).
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
    """Columns up to the last one that a row needs, at least one."""
    columns = torch.nonzero(mask.any(dim=0))
    needed = int(columns[-1]) + 1 if len(columns) else 1
    if multiple is not None:
        needed = math.ceil(needed / multiple) * multiple
    return min(needed, mask.shape[1])


def assemble(
    ranks: Ranks, batch: Mapping[str, Any], wanted: Sequence[Sequence[Source]], padding: Padding
) -> Batch:
    """The rows that this process is to have, its own and others'. All processes call it together.

    Only rows that change their process are sent, as one object for each pair of processes: that works with every
    backend of torch.distributed, and however wide each process has padded.

    Args:
        ranks (`Ranks`): The processes.
        batch (mapping): The rows that are here.
        wanted (sequence of sequences of `(int, int)`): For each process the rows it is to have: the rank where each
            is now, and its place in the batch there. The same on every process.
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
    """Rows on their way: to which rank, where they were, and what they are, on the CPU."""

    to: int
    sources: list[Source]
    rows: Batch


def _outgoing(
    ranks: Ranks, batch: Mapping[str, Any], wanted: Sequence[Sequence[Source]]
) -> list[_Parcel]:
    """What this rank sends, one parcel for each rank that wants something of it."""
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
    """Whether a row's log-probabilities are the same, up to rounding, however far it is padded.

    TRL passes no position ids, so the models that count positions from the left edge (GPT-2) see other positions
    beside a longer prompt. What sees distances between tokens alone does not: rotary attention. Whatever is not known
    to be of that kind counts as the other: convolutions and recurrences, attention in fixed chunks, rotations that
    depend on the longest row, virtual tokens that stand before the padding.
    """
    model = causal_lm(trainer)
    settings = model.config.get_text_config().to_dict()
    rope = settings.get("rope_parameters")
    if rope is None and "rope_theta" in settings:  # before transformers 5
        rope = settings.get("rope_scaling") or {"rope_type": "default"}
    if not rope or has_virtual_tokens(trainer):
        return False
    # One for the model, or one for each kind of its layers.
    rotations = [entry for entry in rope.values() if isinstance(entry, dict)] or [rope]
    rope_types = {rotation.get("rope_type", "default") for rotation in rotations}
    layer_types = set(settings.get("layer_types") or ())
    convolves = any(isinstance(module, nn.Conv1d) for module in model.modules())
    return rope_types <= _CONSTANT_ROPE and layer_types <= _RELATIVE_LAYERS and not convolves
