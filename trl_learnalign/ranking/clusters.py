"""Groups of like prompts, by the features that were measured: k-means on directions.

The clusters are found in a seeded sample of the pool, in the few coordinates in which it varies most; everybody then
belongs to the cluster whose mean direction is nearest. Both are the main rank's work.

Axes: `P` candidates, `n` of them in the sample, `D` dimensions, `K` coordinates, `L` clusters.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from scipy.linalg import eigh
from torch import Tensor

from trl_learnalign import hashing
from trl_learnalign.data.groups import CLUSTER, Grouping
from trl_learnalign.data.prompts import prompt_question, prompts_of
from trl_learnalign.directions import chunk_directions, collect, products
from trl_learnalign.exact_sum import Chunks
from trl_learnalign.pool import Pool

CLUSTERS = 8
"""Clusters that are looked for."""

SAMPLE = 1024
"""Prompts among which they are looked for, at most."""

MEMBERS = 4
"""Prompts of the sample for each cluster, at least; with fewer there are no clusters."""

COORDINATES = 16
STARTS = 10
CHARACTERS = 60
"""Of the prompt that a cluster is called by."""


def cluster_grouping(pool: Pool) -> Grouping | None:
    """Clusters of a pool's prompts; all ranks call it together and get the same.

    Args:
        pool (`Pool`): The candidates, P, with features of gradients, or else of hidden states.

    Returns:
        `Grouping` or `None`: Of all rows of the dataset; those without a feature are in no cluster. `None` where there
        are no features, too few of them, or all alike.
    """
    chunks, dim = _features(pool)
    if not dim:
        return None
    has_direction = _present(pool, chunks)
    candidates = np.flatnonzero(has_direction)
    stream = hashing.key(pool.seed, "clusters", pool.phase)
    sample = np.sort(hashing.permutation(stream, candidates)[:SAMPLE])
    if len(sample) < MEMBERS * CLUSTERS:
        return None
    rows = collect(chunks, sample, len(pool), dim, pool.ranks)
    found = None
    if pool.ranks.is_main:
        found = _centres(rows, stream)
    centres, typical = pool.ranks.from_main(found)
    if len(centres) < 2:
        return None
    nearest = _nearest(pool, chunks, centres)
    codes = np.full(len(pool.dataset), -1, dtype=np.int64)
    codes[pool.prompts[candidates]] = nearest[candidates]
    return Grouping(CLUSTER, _names(pool, sample[typical]), codes)


def _features(pool: Pool) -> tuple[Chunks, int]:
    if pool.feature_dim:
        return pool.features, pool.feature_dim
    return pool.hidden, pool.hidden_dim


def _present(pool: Pool, chunks: Chunks) -> np.ndarray:
    """`(P,)` bool: has a direction, on whatever rank."""
    found = torch.zeros(len(pool), dtype=torch.int64)
    for positions, rows in chunk_directions(chunks):
        found[positions] = rows.any(dim=1).long()
    return pool.ranks.all_sum(found).numpy() > 0


def _centres(rows: Tensor, stream: int) -> tuple[Tensor, np.ndarray]:
    """Mean directions of the clusters of a sample, `(L, D)` float64, and its most typical prompt of each, `(L,)`."""
    codes = _partition(_coordinates(rows), stream)
    centres = []
    typical = []
    for code in np.unique(codes).tolist():
        members = np.flatnonzero(codes == code)
        inside = rows[torch.from_numpy(members)].double()
        centre = inside.mean(dim=0)
        centre = centre / centre.norm().clamp(min=1e-12)
        centres.append(centre)
        best = int((inside @ centre).argmax())
        typical.append(int(members[best]))
    return torch.stack(centres), np.array(typical)


def _coordinates(rows: Tensor) -> np.ndarray:
    """Principal coordinates of directions, `(n, K)`: of the centred matrix of their inner products."""
    gram = products(rows, rows).numpy()
    means = gram.mean(axis=0)
    centred = gram - means - means[:, None] + means.mean()
    size = len(centred)
    last = max(0, size - COORDINATES)
    values, vectors = eigh(centred, subset_by_index=[last, size - 1])
    scales = np.sqrt(np.maximum(values, 0))
    return vectors * scales


def _partition(coordinates: np.ndarray, stream: int) -> np.ndarray:
    """Cluster of each point, `(n,)`: the best of several starts."""
    best = None
    least = np.inf
    for start in range(STARTS):
        seed = hashing.key(stream, start)
        with warnings.catch_warnings():
            # A cluster that loses all its points is one cluster less.
            warnings.simplefilter("ignore")
            centres, codes = kmeans2(coordinates, CLUSTERS, minit="++", rng=seed)
        spread = float(((coordinates - centres[codes]) ** 2).sum())
        if best is None or spread < least:
            best = codes
            least = spread
    assert best is not None
    return best


def _nearest(pool: Pool, chunks: Chunks, centres: Tensor) -> np.ndarray:
    """The cluster whose centre is nearest to each candidate, `(P,)`."""
    found = torch.zeros(len(pool), dtype=torch.int64)
    for positions, rows in chunk_directions(chunks):
        cosines = rows.double() @ centres.T
        found[positions] = cosines.argmax(dim=1)
    return pool.ranks.all_sum(found).numpy()


def _names(pool: Pool, positions: np.ndarray) -> tuple[str, ...]:
    """What clusters are called: a number, and what their most typical prompt asks."""
    names = []
    prompts = prompts_of(pool.dataset, pool.prompts[positions])
    for number, prompt in enumerate(prompts, start=1):
        words = " ".join(prompt_question(prompt).split())
        if len(words) > CHARACTERS:
            words = words[: CHARACTERS - 1] + "…"
        names.append(f"{number}: {words}")
    return tuple(names)
