"""What is known of a prompt before any rollout: a few numbers for each, from embeddings.

Axes: `n` prompts, `H` entries of an embedding, `D` features.

Embeddings of large models have a few entries that dwarf the rest, and more entries than a young run has outcomes. So
every entry is centred and brought to one scale, and the directions of largest variance are kept. The projection is
fitted on a sample; embeddings can then be projected a block at a time and need never be in memory together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BLOCK = 8192
"""Prompts projected at a time."""

FITTED = 20_000
"""Prompts that a projection is fitted on at most."""


@dataclass(frozen=True)
class Projection:
    """An affine map from embeddings to features of mean squared length 1.

    Args:
        centre (`np.ndarray`): `(H,)` float64.
        directions (`np.ndarray`): `(H, D)` float64; of no columns if all prompts are alike.
    """

    centre: np.ndarray
    directions: np.ndarray

    def __call__(self, embeddings: np.ndarray) -> np.ndarray:
        """Features of prompts, `(P, D)` float32.

        Args:
            embeddings (`np.ndarray`): `(P, H)`.

        Raises:
            `ValueError`: If they are not finite, or have another width than those of the fit.
        """
        embeddings = checked(embeddings)
        if embeddings.shape[1] != len(self.centre):
            raise ValueError(
                f"Embeddings have {embeddings.shape[1]} entries, and the projection was fitted on {len(self.centre)}: "
                "embed all prompts of the pool with the same model."
            )
        blocks = [
            (embeddings[start : start + BLOCK] - self.centre) @ self.directions
            for start in range(0, len(embeddings), BLOCK)
        ]
        return np.concatenate(blocks).astype(np.float32)


def fit_projection(embeddings: np.ndarray, dimensions: int = 64) -> Projection:
    """Principal components of standardised embeddings.

    Args:
        embeddings (`np.ndarray`): `(P, H)` of the pool, or of a random sample of it: some 20,000 are plenty.
        dimensions (`int`, *optional*, defaults to `64`): D; fewer if the embeddings do not vary in so many directions.

    Raises:
        `ValueError`: If the embeddings are not finite or of another shape, or `dimensions` is below 1.
    """
    if dimensions < 1:
        raise ValueError(f"dimensions={dimensions}: give a number of at least 1.")
    embeddings = checked(embeddings).astype(np.float64)
    centre = embeddings.mean(axis=0)
    deviations = embeddings - centre
    spread = deviations.std(axis=0)
    # What equal numbers leave after centring is rounding.
    varies = spread > 1e-9 * np.abs(embeddings).max(axis=0)
    scale = np.where(varies, 1 / np.where(varies, spread, 1), 0)
    deviations *= scale
    variances, axes = np.linalg.eigh(deviations.T @ deviations / len(deviations))
    largest = np.argsort(-variances, kind="stable")[:dimensions]
    largest = largest[variances[largest] > 1e-9 * max(variances.max(), 1e-300)]
    directions = scale[:, None] * axes[:, largest]
    length = np.sqrt(variances[largest].sum())
    return Projection(centre, directions / length if length > 0 else directions)


def prompt_features(embeddings: np.ndarray, dimensions: int = 64, seed: int = 0) -> np.ndarray:
    """Features of a pool whose embeddings are in memory, `(n, D)` float32.

    Args:
        embeddings (`np.ndarray`): `(n, H)`.
        dimensions (`int`, *optional*, defaults to `64`): D at most.
        seed (`int`, *optional*, defaults to `0`): Decides which `FITTED` prompts of a larger pool are fitted on.

    Raises:
        `ValueError`: As in [`fit_projection`].
    """
    sample = embeddings
    if len(embeddings) > FITTED:
        order = np.random.default_rng(seed).permutation(len(embeddings))
        sample = embeddings[np.sort(order[:FITTED])]
    return fit_projection(sample, dimensions)(embeddings)


def checked(embeddings: np.ndarray) -> np.ndarray:
    """Embeddings as an array.

    Raises:
        `ValueError`: If they are no finite floating-point numbers, `(P, H)`.
    """
    embeddings = np.asarray(embeddings)
    is_matrix = embeddings.ndim == 2 and len(embeddings) > 0
    if not is_matrix or not np.issubdtype(embeddings.dtype, np.floating):
        raise ValueError(
            f"Embeddings have the shape {embeddings.shape} and the type {embeddings.dtype}: give floating-point "
            "numbers, one row for each prompt."
        )
    for start in range(0, len(embeddings), BLOCK):
        is_finite = np.isfinite(embeddings[start : start + BLOCK]).all(axis=1)
        if not is_finite.all():
            row = start + int(np.argmin(is_finite))
            raise ValueError(
                f"The embedding of prompt {row} is not finite: leave such prompts out, or embed them with another "
                "model or in float32."
            )
    return embeddings
