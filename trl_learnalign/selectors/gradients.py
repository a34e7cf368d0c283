"""Selectors on gradient features. `S`, `V`, `φ` as in `trl_learnalign.scoring`."""

from __future__ import annotations

import numpy as np
import torch

from trl_learnalign import scoring
from trl_learnalign.pool import Pool


def learnalign(pool: Pool) -> np.ndarray:
    """The method: row average of `S_ij = V_i V_j cos(φ_i, φ_j)` (Eq. 9)."""
    weights = torch.from_numpy(pool.learnability)
    return scoring.row_average(weights, pool.features, pool.feature_dim, pool.ranks.all_sum).numpy()


def alignment(pool: Pool) -> np.ndarray:
    """Row average of `cos(φ_i, φ_j)` alone: the ablation "w/o learnability" (Table 3)."""
    weights = torch.ones(len(pool), dtype=torch.float64)
    return scoring.row_average(weights, pool.features, pool.feature_dim, pool.ranks.all_sum).numpy()


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

    weights = torch.ones(len(pool), dtype=torch.float64)
    return scoring.row_average(weights, pool.features, pool.feature_dim, pool.ranks.all_sum, scaled).numpy() * scale**2
