"""Selectors on gradient features. `S`, `V`, `φ` as in `trl_learnalign.scoring`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from trl_learnalign import scoring
from trl_learnalign.pool import Pool


def learnalign(pool: Pool) -> np.ndarray:
    """The method: row average of `S_ij = V_i V_j cos(φ_i, φ_j)` (Eq. 9)."""
    return _row_average(pool, pool.learnability)


def alignment(pool: Pool) -> np.ndarray:
    """Row average of `cos(φ_i, φ_j)` alone: the ablation "w/o learnability" (Table 3)."""
    return _row_average(pool, np.ones(len(pool)))


def gradient_dot(pool: Pool) -> np.ndarray:
    """Row average of the raw inner product `⟨φ_i, φ_j⟩` (Eq. 6), which favours large gradients: the length bias.

    Gradients that are not finite count as zero.
    """
    largest = 0.0
    for _, features in pool.features:
        finite = features[torch.isfinite(features).all(dim=1)]
        largest = max(largest, float(finite.abs().max()) if len(finite) else 0.0)
    # One scale for the whole pool keeps inner products comparable and the fixed-point sum in range.
    scale = pool.ranks.most([largest])[0] or 1.0

    def scaled(features: torch.Tensor) -> torch.Tensor:
        finite = torch.isfinite(features).all(dim=1, keepdim=True)
        return torch.where(finite, features.double() / scale, 0.0)

    return _row_average(pool, np.ones(len(pool)), scaled) * scale**2


def validation_alignment(pool: Pool) -> np.ndarray:
    """`V_i cos(φ_i, g)` with the mean gradient `g` of a trusted validation set: the same engine, another target.

    Influence on a validation set as in LESS (Xia et al., 2024), with learnability in the place of the learning rate's
    weighting. `exclude_self` has no meaning here: the validation set is another one.

    Raises:
        `ValueError`: If no validation set was measured.
    """
    if pool.target is None:
        raise ValueError(
            "selector='validation_alignment' compares prompts with the mean gradient of a validation set, and none "
            "was given: pass a validation dataset, or choose 'learnalign', which compares them with each other."
        )
    target = scoring.normalised(pool.target.unsqueeze(0))[0]
    nothing = torch.zeros(len(pool), dtype=torch.float64)
    return pool.learnability * scoring.alignment(target, pool.features, nothing, pool.ranks.all_sum).numpy()


def _row_average(
    pool: Pool, weights: np.ndarray, directions: Callable[[torch.Tensor], torch.Tensor] = scoring.normalised
) -> np.ndarray:
    return scoring.row_average(
        torch.from_numpy(weights),
        pool.features,
        pool.feature_dim,
        pool.ranks.all_sum,
        directions,
        pool.config.exclude_self,
    ).numpy()
