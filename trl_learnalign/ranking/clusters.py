"""Categories of like prompts, by the features that were measured: k-means.

The clusters are found in a seeded sample of the pool; everybody then belongs to the cluster whose mean is nearest.
What a stage has measured gives directions, spread over ranks; what an adaptive order tells prompts apart by are a few
numbers for each, which one rank holds.

Axes: `P` candidates, `n` of them in the sample, `D` dimensions, `K` coordinates, `L` clusters.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from datasets import Dataset
from scipy.cluster.vq import kmeans2, vq
from scipy.linalg import eigh
from torch import Tensor

from trl_learnalign import hashing
from trl_learnalign.data.categories import CLUSTER, Grouping
from trl_learnalign.data.prompts import prompt_question, prompts_of
from trl_learnalign.directions import chunk_directions, collect, has_direction, products
from trl_learnalign.exact_sum import Chunks
from trl_learnalign.pool import Pool

CLUSTERS = 8
"""Clusters that are looked for."""

SAMPLE = 1024
"""Prompts among which they are looked for, at most."""

LEAST = 32
"""Prompts with a feature, at least; with fewer there are no clusters."""

COORDINATES = 16
"""In which directions are compared: those in which the sample varies most."""

STARTS = 10
"""Of k-means; the best is taken."""

CHARACTERS = 60
"""Of the prompt that a cluster is called by."""


# ---- Of what a stage has measured -----------------------------------------------------------------------------------


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
    is_present = has_direction(chunks, len(pool), pool.ranks)
    candidates = np.flatnonzero(is_present)
    stream = hashing.key(pool.seed, "clusters", pool.phase)
    sample = _sample(stream, candidates)
    if len(sample) < LEAST:
        return None
    rows = collect(chunks, sample, len(pool), dim, pool.ranks)
    found = None
    if pool.ranks.is_main:
        found = _centres(rows, stream)
    centres, typical = pool.ranks.from_main(found)
    if len(centres) < 2:
        return None
    nearest = _nearest(pool, chunks, centres)
    size = len(pool.dataset)
    codes = np.full(size, -1, dtype=np.int64)
    members = pool.prompts[candidates]
    codes[members] = nearest[candidates]
    examples = pool.prompts[sample[typical]]
    names = _names(pool.dataset, examples)
    return Grouping(CLUSTER, names, codes)


def _features(pool: Pool) -> tuple[Chunks, int]:
    if pool.feature_dim:
        return pool.features, pool.feature_dim
    return pool.hidden, pool.hidden_dim


def _sample(stream: int, items: np.ndarray) -> np.ndarray:
    """Some of the items, in their order."""
    shuffled = hashing.permutation(stream, items)
    return np.sort(shuffled[:SAMPLE])


def _centres(rows: Tensor, stream: int) -> tuple[Tensor, np.ndarray]:
    """Mean directions of the clusters of a sample, `(L, D)` float64, and its most typical prompt of each, `(L,)`."""
    coordinates = _coordinates(rows)
    codes = _partition(coordinates, stream)
    centres = []
    typical = []
    for code in np.unique(codes):
        members = np.flatnonzero(codes == code)
        inside = rows[torch.from_numpy(members)]
        inside = inside.double()
        mean = inside.mean(dim=0)
        length = mean.norm()
        centre = mean / length.clamp(min=1e-12)
        centres.append(centre)
        cosines = inside @ centre
        best = int(cosines.argmax())
        typical.append(members[best])
    return torch.stack(centres), np.array(typical)


def _coordinates(rows: Tensor) -> np.ndarray:
    """Principal coordinates of directions, `(n, K)`: of the centred matrix of their inner products."""
    gram = products(rows, rows).numpy()
    means = gram.mean(axis=0)
    columns = means[:, None]
    centred = gram - means - columns + means.mean()
    size = len(centred)
    first = max(0, size - COORDINATES)
    largest = [first, size - 1]
    values, vectors = eigh(centred, subset_by_index=largest)
    positive = np.maximum(values, 0)
    return vectors * np.sqrt(positive)


def _nearest(pool: Pool, chunks: Chunks, centres: Tensor) -> np.ndarray:
    """The cluster whose centre is nearest to each candidate, `(P,)`."""
    found = torch.zeros(len(pool), dtype=torch.int64)
    for positions, rows in chunk_directions(chunks):
        cosines = rows.double() @ centres.T
        found[positions] = cosines.argmax(dim=1)
    of_all_ranks = pool.ranks.all_sum(found)
    return of_all_ranks.numpy()


# ---- Of what an adaptive order knows --------------------------------------------------------------------------------


def feature_grouping(features: np.ndarray, dataset: Dataset, seed: int) -> Grouping | None:
    """Clusters of all prompts of a dataset.

    Args:
        features (`np.ndarray`): `(P, D)`, as an adaptive order knows prompts (`trl_learnalign.adaptive.features`).
        dataset (`datasets.Dataset`): The P prompts.
        seed (`int`): `LearnAlignConfig.selection_seed`.

    Returns:
        `Grouping` or `None`: `None` where there are no features, too few prompts, or all alike.
    """
    size, dim = features.shape
    stream = hashing.key(seed, "clusters", "all prompts")
    everybody = np.arange(size)
    sample = _sample(stream, everybody)
    if not dim or len(sample) < LEAST:
        return None
    rows = features[sample].astype(np.float64)
    codes = _partition(rows, stream)
    means = []
    for code in np.unique(codes):
        mean = rows[codes == code].mean(axis=0)
        means.append(mean)
    if len(means) < 2:
        return None
    points = features.astype(np.float64)
    nearest, distances = vq(points, np.stack(means))
    examples = []
    for code in range(len(means)):
        members = np.flatnonzero(nearest == code)
        best = distances[members].argmin()
        examples.append(members[best])
    names = _names(dataset, np.array(examples))
    return Grouping(CLUSTER, names, nearest.astype(np.int64))


# ---- Of both --------------------------------------------------------------------------------------------------------


def _partition(points: np.ndarray, stream: int) -> np.ndarray:
    """Cluster of each point, `(n,)`: the best of several starts."""
    best = np.zeros(len(points), dtype=np.int64)
    least = np.inf
    for start in range(STARTS):
        seed = hashing.key(stream, start)
        with warnings.catch_warnings():
            # A cluster that loses all its points is one cluster less.
            warnings.simplefilter("ignore")
            centres, codes = kmeans2(points, CLUSTERS, minit="++", rng=seed)
        distances = points - centres[codes]
        spread = float(np.square(distances).sum())
        if spread < least:
            best = codes
            least = spread
    return best


def _names(dataset: Dataset, rows: np.ndarray) -> tuple[str, ...]:
    """What clusters are called: a number, and what their most typical prompt asks."""
    names = []
    prompts = prompts_of(dataset, rows)
    for number, prompt in enumerate(prompts, start=1):
        question = prompt_question(prompt)
        text = " ".join(question.split())
        if len(text) > CHARACTERS:
            text = text[: CHARACTERS - 1] + "…"
        names.append(f"{number}: {text}")
    return tuple(names)
