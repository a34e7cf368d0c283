"""Features of all prompts of a dataset that need no rollout.

The source of the features is the policy before its first step, a column of the dataset, or a user's function. The
features of each prompt are a few numbers. They are saved on disk with digests of their sources and of themselves, and
with the cost of computing them, which is charged to every run that uses them. Checkpoints contain them too: the policy
of a resumed run has moved, so the run reads them from its checkpoint.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from typing_extensions import override

from trl_learnalign import rng
from trl_learnalign.adaptive import belief as prompt_features
from trl_learnalign.adaptive.belief import FITTED, Projection, fit_projection
from trl_learnalign.bridge.inference import last_hidden_states
from trl_learnalign.bridge.policy import weights_digest
from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.data.columns import HIDDEN, NONE, embedding_function
from trl_learnalign.data.prompts import prompts_of
from trl_learnalign.measuring import base
from trl_learnalign.measuring.base import FEATURES, ROWS, Context, MeasureJob, MeasureResult
from trl_learnalign.measuring.text_measures import ReadingMeasure
from trl_learnalign.records import layout
from trl_learnalign.records.store import StoreError, digest_of, fits, seal_of, write_atomically

logger = logging.getLogger(__name__)


PHASE = "embeddings"
_NAME = "features"
_MADE_OF, _WEIGHTS = "made_of", "weights"
_DIGEST, _TOKENS = "digest", "tokens"


@dataclass(frozen=True)
class PromptFeatures:
    """Features of prompts.

    Args:
        values (`np.ndarray`): `(n, D)` float32.
        tokens (`int`): Tokens that were read to compute them, in this run or earlier.
    """

    values: np.ndarray
    tokens: int


class EmbeddingMeasure(ReadingMeasure):
    """Mean of the last hidden layer over the prompt's tokens, `(H,)` each."""

    name = "embeddings"
    small: tuple[str, ...] = ("has_text",)

    @override
    def read(self, model: Any, prompts: np.ndarray, passes: int) -> dict[str, torch.Tensor]:
        limit = self.limit(model)
        texts = self.encoder.prompts(list(prompts_of(self.dataset, prompts)))
        texts = [text[-limit:] for text in texts]  # the question is at the end
        width = int(model.config.get_text_config().hidden_size)
        embeddings = torch.zeros(len(texts), width)
        with_text = [row for row, text in enumerate(texts) if text]
        for batch in self.batches([texts[row] for row in with_text], passes):
            states = last_hidden_states(model, batch.input_ids, batch.attention_mask)
            means = mean_of_tokens(states, batch.attention_mask)
            rows = [with_text[text] for text in batch.texts]
            # The batch may have one more row without a text.
            embeddings[rows] = means[: len(rows)].float().cpu()
        return {
            "has_text": torch.tensor([bool(text) for text in texts], dtype=torch.bool),
            ROWS: torch.arange(len(texts)),
            FEATURES: embeddings,
        }


def mean_of_tokens(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean over the tokens that are not padding, `(R, H)` float64.

    Args:
        hidden (`torch.Tensor`): `(R, L, H)`.
        mask (`torch.Tensor`): `(R, L)`, 0 for padding.
    """
    # Hidden states of padding are arbitrary and may be NaN.
    states = torch.where(mask.bool().unsqueeze(2), hidden.double(), 0.0)
    return states.sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)


def features_of_prompts(
    context: Context,
    folder: Path,
    made_of: str,
    kept: Path | None = None,
) -> PromptFeatures:
    """Return the features of all prompts of the dataset, on every rank; collective over all ranks.

    Args:
        context (`Context`): Trainer and options for measuring.
        folder (`Path`): The record folder.
        made_of (`str`): Digest of everything else than the trainable weights that decides them: dataset, model,
            tokenizer.
        kept (`Path`, *optional*): File in the checkpoint that is resumed from; the file in the record folder is
            rebuilt from it.

    Raises:
        `StoreError`: If a checkpoint lacks the features that its run began with.
        `ValueError`: If embeddings are not finite numbers, one row for each prompt.
    """
    config, ranks = context.config, context.ranks
    if config.adaptive_embeddings == NONE:
        return PromptFeatures(np.zeros((len(context.dataset), 0), dtype=np.float32), 0)
    path = folder / layout.PROMPT_FEATURES
    origin = {_MADE_OF: rng.digest([made_of, *_settings(config)])}
    if kept is None and config.adaptive_embeddings == HIDDEN:
        origin[_WEIGHTS] = weights_digest(context.trainer)
    features = ranks.from_main(_read(kept or path, origin) if ranks.is_main else None)
    if kept is not None:
        if features is None:
            raise StoreError(
                f"{kept} is missing or belongs to another run. The policy has changed since the first step, so the "
                "embeddings cannot be recomputed, and without them the training order cannot be resumed. Restore "
                "that file, or start a new run with another output_dir."
            )
        if ranks.is_main and not fits(path, seal_of(kept)):
            write_atomically(path, kept.read_bytes())
        return features
    if features is None:
        return _measured(context, folder, origin)
    if ranks.is_main:  # the process that wrote them may have died before this step
        shutil.rmtree(folder / PHASE, ignore_errors=True)
    return features


def _measured(context: Context, folder: Path, origin: Mapping[str, str]) -> PromptFeatures:
    ranks = context.ranks
    if context.config.adaptive_embeddings == HIDDEN:
        values, tokens = _of_the_policy(context, folder, origin)
    else:
        values, tokens = _of_the_user(context), 0
    # All ranks use the floating-point numbers of one rank.
    features = PromptFeatures(ranks.from_main(values), tokens)
    if ranks.is_main:
        _write(folder / layout.PROMPT_FEATURES, features, origin)
        # Hidden states of a large pool take gigabytes, and a resumed run reads only the features.
        shutil.rmtree(folder / PHASE, ignore_errors=True)
    ranks.wait()
    return features


def _settings(config: LearnAlignConfig) -> list[Any]:
    return [config.adaptive_embeddings, config.adaptive_feature_dim, config.selection_seed]


def _read(path: Path, origin: Mapping[str, str]) -> PromptFeatures | None:
    """Return the saved features, if their sources match and they are undamaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "np") as file:
            noted = file.metadata() or {}
            if any(noted.get(name) != value for name, value in origin.items()):
                return None
            values = file.get_tensor(_NAME)
        if noted.get(_DIGEST) == _digest(values, noted[_TOKENS]):
            return PromptFeatures(values, int(noted[_TOKENS]))
        reason = "its content does not match its digest"
    except (SafetensorError, OSError, KeyError) as error:
        reason = str(error)
    logger.warning("%s is damaged (%s) and will not be used.", path, reason)
    return None


def _write(path: Path, features: PromptFeatures, origin: Mapping[str, str]) -> None:
    values, tokens = np.ascontiguousarray(features.values), str(features.tokens)
    noted = {**origin, _TOKENS: tokens, _DIGEST: _digest(values, tokens)}
    write_atomically(path, save({_NAME: values}, metadata=noted))


def _digest(values: np.ndarray, tokens: str) -> str:
    return digest_of(f"{values.shape} {tokens} ".encode(), values)


def _of_the_user(context: Context) -> np.ndarray:
    """Return features from the user's embeddings."""
    ranks, config = context.ranks, context.config
    # Computed only once: a function may be slow, or return different values each time.
    embeddings = ranks.from_main(_embeddings_of_the_user(context) if ranks.is_main else None)
    return prompt_features.prompt_features(
        embeddings, config.adaptive_feature_dim, config.selection_seed
    )


def _embeddings_of_the_user(context: Context) -> np.ndarray:
    """Return the embeddings of a column or of a function, `(n, H)` float32."""
    name, dataset = context.config.adaptive_embeddings, context.dataset
    if name in dataset.column_names:
        values = dataset.with_format(None)[name]
        return np.asarray(list(values), dtype=np.float32)
    prompts = list(prompts_of(dataset))
    embeddings = np.asarray(embedding_function(name)(prompts), dtype=np.float32)
    if len(embeddings) != len(prompts):
        raise ValueError(
            f"{name} returned {len(embeddings)} rows for {len(prompts)} prompts: return one row of numbers per "
            "prompt, in their order."
        )
    return embeddings


def _of_the_policy(
    context: Context,
    folder: Path,
    origin: Mapping[str, str],
) -> tuple[np.ndarray, int]:
    config = context.config
    work = MeasureJob(
        name="all prompts",
        candidates=np.arange(len(context.dataset)),
        folder=folder / PHASE,
        fingerprint=origin,
        shard_size=config.shard_size,
        quiet=context.trainer.args.disable_tqdm,
    )
    measured = base.run(work, EmbeddingMeasure(context.of_phase(PHASE)), context.ranks)
    projection = _fitted(context, measured, len(work.candidates))
    parts = [(positions, projection(rows)) for positions, rows in _blocks(measured)]
    features = np.zeros((len(work.candidates), projection.directions.shape[1]), dtype=np.float32)
    for positions, rows in context.ranks.gather(parts):
        features[positions] = rows
    return features, measured.tokens_read


def _fitted(context: Context, measured: MeasureResult, size: int) -> Projection:
    """Fit a projection on a seeded sample of the prompts, since all embeddings may not fit into memory."""
    order = rng.permutation(rng.key(context.config.selection_seed, PHASE), np.arange(size))
    in_sample = np.zeros(size, dtype=bool)
    in_sample[order[:FITTED]] = True
    parts = []
    for positions, rows in _blocks(measured):
        places = in_sample[positions]
        parts.append((positions[places], rows[places]))
    # In the order of the dataset, independent of which rank read which shard.
    sample = sorted(context.ranks.gather(parts), key=lambda part: part[0][:1].tolist())
    projection = None
    if context.ranks.is_main:
        rows = np.concatenate([rows for _, rows in sample])
        projection = fit_projection(rows, context.config.adaptive_feature_dim)
    return context.ranks.from_main(projection)


def _blocks(measured: MeasureResult) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for positions, rows in measured.features:
        yield positions.numpy(), rows.numpy()
