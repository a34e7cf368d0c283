"""The selector on hidden states."""

from __future__ import annotations

import numpy as np
import torch

from trl_learnalign import scoring
from trl_learnalign.pool import Pool


def feature_similarity(pool: Pool) -> np.ndarray:
    """Row average of `V_i V_j cos(h_i, h_j)` with RDS+ representations `h` in the place of gradients (Table 3).

    `h` is the position-weighted mean of the last hidden layer (RDS+, Ivison et al., 2025, after SGPT). The paper does
    not say of which text. `hidden_text="prompt"` (default) is ours: an RL prompt comes without a response;
    `"prompt_and_solution"` is what RDS+ does with instruction data, and there a prompt without a solution cannot be
    ranked. RDS+ also gives weight to padding; here the result does not depend on it.
    """
    assert pool.has_text is not None
    scores = scoring.row_average(
        torch.from_numpy(pool.learnability),
        pool.hidden,
        pool.hidden_dim,
        pool.ranks.all_sum,
        exclude_self=pool.config.exclude_self,
    ).numpy()
    return np.where(pool.has_text.numpy(), scores, np.nan)
