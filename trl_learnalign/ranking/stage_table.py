"""The table of a stage, one row per candidate, and how two compare; its columns: `trl_learnalign.records.run`."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from trl_learnalign.data.prompts import prompt_id, prompt_text, prompts_of
from trl_learnalign.pool import Pool


def stage_table(
    pool: Pool,
    scores: np.ndarray,
    alignment: np.ndarray,
    order: np.ndarray,
    selected: np.ndarray,
) -> pa.Table:
    """The table of a stage.

    Args:
        pool (`Pool`): Its candidates.
        scores (`np.ndarray`): `(P,)`.
        alignment (`np.ndarray`): Mean alignment of each gradient, `(P,)`; NaN where there is none.
        order (`np.ndarray`): Positions from best to worst, `(P,)`.
        selected (`np.ndarray`): Positions of the selected ones.
    """
    size = len(pool)
    ranks = np.empty(size, dtype=np.int64)
    ranks[order] = np.arange(1, size + 1)
    is_selected = np.zeros(size, dtype=bool)
    is_selected[selected] = True
    prompts = list(prompts_of(pool.dataset, pool.prompts))
    lengths = np.full(size, np.nan)
    if pool.lengths is not None:
        lengths = pool.lengths.double().mean(dim=1).numpy()
    is_finite = np.ones(size, dtype=bool) if pool.finite is None else pool.finite.numpy()
    right, wrong = (_count(pool, outcome) for outcome in (1, 0))
    return pa.table(
        {
            "index": pool.prompts,
            "prompt_id": [prompt_id(prompt) for prompt in prompts],
            "prompt": [prompt_text(prompt) for prompt in prompts],
            "right": right,
            "wrong": wrong,
            "success_rate": _nullable(pool.success_rate),
            "learnability": _nullable(pool.learnability),
            "alignment": _nullable(alignment),
            "score": _nullable(scores),
            "rank": ranks,
            "selected": is_selected,
            "mean_completion_length": _nullable(lengths),
            "gradient_finite": is_finite,
        }
    )


def _count(pool: Pool, outcome: int) -> pa.Array:
    """Rollouts of each prompt with an outcome, 1 or 0; nulls where none were made."""
    if pool.successes is None:
        return pa.nulls(len(pool), pa.int64())
    return pa.array((pool.successes == outcome).sum(dim=1).numpy())


def _nullable(values: np.ndarray) -> pa.Array:
    return pa.array(values, mask=np.isnan(values))


def overlap(previous: pa.Table, selected: np.ndarray, candidates: np.ndarray) -> float | None:
    """Share of the chosen prompts that the previous stage's ranking would have taken of the same candidates.

    Args:
        previous (`pyarrow.Table`): The previous stage's table.
        selected (`np.ndarray`): Rows of the dataset that are chosen now.
        candidates (`np.ndarray`): Rows that could be.

    Returns:
        `float`, *optional*: `None` where there was no choice, or the previous stage scored none of the candidates.
    """
    rows, ranks = previous["index"].to_pylist(), previous["rank"].to_pylist()
    rank_of = dict(zip(rows, ranks, strict=True))
    in_both = [row for row in candidates.tolist() if row in rank_of]
    in_both.sort(key=rank_of.__getitem__)
    now = set(selected.tolist()) & set(in_both)
    if not now or len(now) == len(in_both):
        return None
    then = set(in_both[: len(now)])
    return len(now & then) / len(now)
