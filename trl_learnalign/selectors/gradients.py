"""Selectors on gradient features. `S`, `V`, `φ` as in `trl_learnalign.scoring`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

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
    # One scale for the whole pool keeps inner products comparable and the fixed-point sum in range.
    scale = scoring.largest_entry(pool.features, pool.ranks.most)
    scaling = partial(scoring.keep_finite, scale=1 / scale)
    return _row_average(pool, np.ones(len(pool)), scaling) * scale**2


def validation_alignment(pool: Pool) -> np.ndarray:
    """`V_i cos(φ_i, g)` with the mean gradient `g` of a trusted validation set: the same engine, another target.

    Influence on a validation set as in LESS (Xia et al., 2024), with learnability in the place of the learning rate's
    weighting. `g` is the mean of the validation prompts' own gradients, not of their directions, as in LESS: prompts
    on which there is more to learn count for more. `exclude_self` has no meaning here: the validation set is another
    one.

    Raises:
        `ValueError`: If no validation set was measured.
    """
    if pool.target is None:
        raise ValueError(
            "selector='validation_alignment' compares prompts with the mean gradient of a validation set, and none "
            "was given: pass a validation dataset, or choose 'learnalign', which compares them with each other."
        )
    target = scoring.normalised(pool.target.unsqueeze(0))[0]
    no_self = torch.zeros(len(pool), dtype=torch.float64)
    cosines = scoring.alignment(target, pool.features, no_self, pool.ranks.all_sum)
    return pool.learnability * cosines.numpy()


def _row_average(
    pool: Pool,
    weights: np.ndarray,
    scaling: Callable[[Tensor], Tensor] = scoring.inverse_norms,
) -> np.ndarray:
    return scoring.row_average(
        torch.from_numpy(weights),
        pool.features,
        pool.feature_dim,
        pool.ranks.all_sum,
        scaling,
        pool.config.exclude_self,
    ).numpy()
