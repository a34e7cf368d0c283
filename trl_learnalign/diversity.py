"""Diversity of a selection: the directions of its gradients, and its categories compared with the pool's.

A selection of many similar prompts teaches the same thing many times. Each statistic is reported with that of a seeded
random selection of the same size, since all of them depend on the size.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from datasets import Dataset
from scipy.cluster.vq import kmeans2, vq
from scipy.linalg import eigh
from torch import Tensor

from trl_learnalign import rng
from trl_learnalign.data.columns import CLUSTER, Grouping
from trl_learnalign.data.prompts import prompt_question, prompts_of
from trl_learnalign.pool import Pool
from trl_learnalign.records import layout
from trl_learnalign.records.notes import CategoryCount, GradientDiversity, GroupDistribution
from trl_learnalign.records.store import read_table, write_table
from trl_learnalign.scoring import Chunks, chunk_directions, collect, has_direction, products

COMPARED = 2048
"""Maximum number of selected prompts that are compared with each other: a seeded sample."""

STOOD_FOR = 1024
"""Maximum number of prompts that a selection should cover: a seeded sample."""


def breadth(pool: Pool, chosen: np.ndarray) -> GradientDiversity | None:
    """Return the diversity of a selection by the measured features; collective over all ranks.

    Args:
        pool (`Pool`): The candidates, P.
        chosen (`np.ndarray`): Positions of the selected prompts.

    Returns:
        `GradientDiversity` or `None`: `None` without features, or with fewer than two among the selected prompts.
    """
    features = _Features.of(pool)
    if features is None:
        return None
    is_present = features.present()
    chosen = chosen[is_present[chosen]]
    size = len(chosen)
    if size < 2:
        return None
    candidates = np.flatnonzero(is_present)
    at_random = _drawn(pool, "random choice", candidates, size)
    targets = _drawn(pool, "stood for", candidates, STOOD_FOR)
    covered, covered_random = features.covered(targets, chosen, at_random)
    sample = _drawn(pool, "compared", chosen, COMPARED)
    ours = features.compared(sample)
    random = features.compared(at_random[:COMPARED])
    return GradientDiversity(
        prompts=size,
        directions=ours.directions,
        directions_random=random.directions,
        covered=covered,
        covered_random=covered_random,
        similarity=ours.similarity,
        similarity_random=random.similarity,
    )


def _drawn(
    pool: Pool,
    purpose: str,
    positions: np.ndarray,
    size: int,
) -> np.ndarray:
    """Return a sample of the positions, in a seeded order of their prompts; all of them if there are no more."""
    stream = rng.key(pool.seed, purpose, pool.phase)
    rows = pool.prompts[positions]
    shuffled = rng.permutation(stream, rows)
    position_of = dict(zip(rows.tolist(), positions.tolist(), strict=True))
    sample = [position_of[row] for row in shuffled[:size].tolist()]
    return np.array(sample, dtype=np.int64)


@dataclass(frozen=True)
class _Compared:
    directions: float
    similarity: float


@dataclass(frozen=True)
class _Features:
    """Features of a pool on this rank: chunks of `(positions (c,), features (c, D))`."""

    pool: Pool
    chunks: Chunks
    dim: int

    @classmethod
    def of(cls, pool: Pool) -> _Features | None:
        """Return those of gradients, otherwise those of hidden states, otherwise `None`."""
        if pool.feature_dim:
            return cls(pool, pool.features, pool.feature_dim)
        if pool.hidden_dim:
            return cls(pool, pool.hidden, pool.hidden_dim)
        return None

    def present(self) -> np.ndarray:
        """`(P,)` bool: has a direction, and learnability if that is known."""
        found = has_direction(self.chunks, len(self.pool), self.pool.ranks)
        has_weight = self._weights() > 0
        return has_weight & found

    def _weights(self) -> np.ndarray:
        if self.pool.successes is None:
            return np.ones(len(self.pool))
        return self.pool.learnability

    def _collected(self, positions: np.ndarray) -> Tensor:
        """Return directions of some candidates, `(n, D)`, on every rank."""
        pool = self.pool
        return collect(
            self.chunks,
            positions,
            len(pool),
            self.dim,
            pool.ranks,
            everywhere=True,
        )

    def covered(self, targets: np.ndarray, *choices: np.ndarray) -> list[float]:
        """Return each selection's `Σ_j max_{i∈A} max(S_ij, 0)` over some prompts, as a share of the whole pool's.

        Args:
            targets (`np.ndarray`): Positions of the prompts to cover.
            choices (`np.ndarray`): Positions of each selection.
        """
        pool = self.pool
        rows = self._collected(targets).double()  # converted once, not for each block
        weights = torch.from_numpy(self._weights())
        everyone = np.arange(len(pool))
        groups = [np.isin(everyone, choice) for choice in (*choices, everyone)]
        best = torch.zeros(len(groups), len(targets), dtype=torch.float64)
        for positions, block in chunk_directions(self.chunks):
            similarities = products(rows, block)
            similarities *= weights[positions]
            for number, group in enumerate(groups):
                is_member = torch.from_numpy(group[positions.numpy()])
                # Others get zeros, which is valid because values below 0 do not count.
                of_members = similarities * is_member
                best[number] = torch.maximum(best[number], of_members.amax(dim=1))
        largest = pool.ranks.most(best.flatten().tolist())
        of_all_ranks = torch.tensor(largest, dtype=torch.float64)
        # The weight of the covered prompt is a factor of all its similarities.
        target_weights = weights[torch.from_numpy(targets)]
        values = of_all_ranks.view_as(best) @ target_weights
        shares = values[:-1] / values[-1]
        return shares.tolist()

    def compared(self, positions: np.ndarray) -> _Compared:
        """Compare the directions of some prompts with each other.

        Args:
            positions (`np.ndarray`): Positions in the pool, two or more.
        """
        rows = self._collected(np.sort(positions))
        cosines = products(rows, rows)
        # Participation ratio of the spectrum λ of the Gram matrix: (Σ λ)² / Σ λ², and Σ λ² = Σ_ij cos².
        trace = float(cosines.diagonal().sum())
        squares = float(cosines.square().sum())
        nearest = cosines.fill_diagonal_(-1).amax(dim=1)
        return _Compared(trace**2 / squares, float(nearest.mean()))


# ---- Categories of a selection --------------------------------------------------------------------------------------
# A selection from a single category may have all the prompts with high scores and still leave most of the pool
# untrained. The number of categories in a selection depends on its size. So the effective number of its categories is
# compared with that of seeded random selections.
#
# Axes: `n` rows of the dataset, `L` categories.

DRAWS = 100
"""Number of random selections for comparison."""

NOTED = 50
"""Maximum number of categories that are recorded one by one: the largest."""


def effective_number(counts: np.ndarray) -> float:
    """Return `exp` of the entropy of shares: the number of equal categories with the same spread.

    Args:
        counts (`np.ndarray`): Members of each category, `(L,)`, one or more in all.
    """
    shares = counts[counts > 0] / counts.sum()
    entropy = -(shares * np.log(shares)).sum()
    return float(np.exp(entropy))


def shares_of(
    groupings: Sequence[Grouping],
    pool: np.ndarray,
    chosen: np.ndarray,
    seed: int,
    purpose: str,
) -> tuple[GroupDistribution, ...]:
    """Return the categories of a selection, compared with its pool.

    Args:
        groupings (sequence of `Grouping`): Groupings of prompts into categories.
        pool (`np.ndarray`): Rows that could have been selected, distinct.
        chosen (`np.ndarray`): Selected rows; a row may occur several times, since training repeats prompts.
        seed (`int`): `LearnAlignConfig.selection_seed`.
        purpose (`str`): Purpose of the selection, e.g. `Phase.name`; part of the random selections' seeds.

    Returns:
        `tuple[GroupDistribution]`: One for each grouping that contains a prompt of the pool and one of the selection.
    """
    found = []
    for grouping in groupings:
        pool_codes = _known(grouping.codes[pool])
        chosen_codes = _known(grouping.codes[chosen])
        if not len(pool_codes) or not len(chosen_codes):
            continue
        found.append(_shares(grouping, pool_codes, chosen_codes, rng.key(seed, "groups", purpose)))
    return tuple(found)


def _known(codes: np.ndarray) -> np.ndarray:
    return codes[codes >= 0]


def _shares(
    grouping: Grouping, pool_codes: np.ndarray, chosen_codes: np.ndarray, stream: int
) -> GroupDistribution:
    length = len(grouping.labels)
    in_pool = np.bincount(pool_codes, minlength=length)
    in_choice = np.bincount(chosen_codes, minlength=length)
    size = len(chosen_codes)
    at_random = [
        effective_number(_random_counts(in_pool, pool_codes, size, rng.key(stream, draw)))
        for draw in range(DRAWS)
    ]
    return GroupDistribution(
        by=grouping.by,
        pool=len(pool_codes),
        chosen=size,
        distinct=int((in_pool > 0).sum()),
        categories=_largest(grouping.labels, in_pool, in_choice),
        effective=effective_number(in_choice),
        effective_pool=effective_number(in_pool),
        effective_random=float(np.mean(at_random)),
        effective_random_low=min(at_random),
    )


def _random_counts(
    in_pool: np.ndarray, pool_codes: np.ndarray, size: int, stream: int
) -> np.ndarray:
    """Return the members of each category in a random selection, `(L,)`: whole passes and a partial one."""
    passes, rest = divmod(size, len(pool_codes))
    counts = passes * in_pool
    if rest:
        draws = rng.random_bits(stream, np.arange(len(pool_codes)))
        places = np.argpartition(draws, rest - 1)[:rest]
        counts = counts + np.bincount(pool_codes[places], minlength=len(in_pool))
    return counts


def _largest(
    labels: Sequence[str], in_pool: np.ndarray, in_choice: np.ndarray
) -> tuple[CategoryCount, ...]:
    """Return the categories of pool or selection, those with the largest share in either first."""
    shares = np.maximum(in_pool / in_pool.sum(), in_choice / in_choice.sum())
    order = np.argsort(-shares, kind="stable")[:NOTED]
    counts = []
    for code in order.tolist():
        if shares[code] > 0:
            count = CategoryCount(
                name=labels[code], pool=int(in_pool[code]), chosen=int(in_choice[code])
            )
            counts.append(count)
    return tuple(counts)


# ---- Clusters of prompts --------------------------------------------------------------------------------------------
# The clusters are fitted on a seeded sample of the pool. Every prompt then belongs to the cluster with the nearest
# mean. Measurements of a stage give directions, which are spread over ranks. The features of an adaptive order are a
# few numbers for each prompt, which one rank holds.
#
# Axes: `P` candidates, `n` of them in the sample, `D` dimensions, `K` coordinates, `L` clusters.

CLUSTERS = 8
"""Number of clusters."""

SAMPLE = 1024
"""Maximum number of prompts that the clusters are fitted on."""

LEAST = 32
"""Minimum number of prompts with a feature; with fewer there are no clusters."""

COORDINATES = 16
"""Number of principal coordinates in which directions are compared."""

STARTS = 10
"""Number of starts of k-means; the best result is used."""

NAME_CHARACTERS = 60
"""Maximum length of the prompt text in a cluster's name."""


# ---- Clusters of a stage's measurements -----------------------------------------------------------------------------


def cluster_grouping(pool: Pool) -> Grouping | None:
    """Return clusters of a pool's prompts; collective, and equal on all ranks.

    Args:
        pool (`Pool`): The candidates, P, with features of gradients, or else of hidden states.

    Returns:
        `Grouping` or `None`: For all rows of the dataset; rows without a feature are in no cluster. `None` if there
        are no features, too few of them, or all of them are equal.
    """
    chunks, dim = _features(pool)
    if not dim:
        return None
    is_present = has_direction(chunks, len(pool), pool.ranks)
    candidates = np.flatnonzero(is_present)
    stream = rng.key(pool.seed, "clusters", pool.phase)
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
    """Return a sample of the items, in their order."""
    shuffled = rng.permutation(stream, items)
    return np.sort(shuffled[:SAMPLE])


def _centres(rows: Tensor, stream: int) -> tuple[Tensor, np.ndarray]:
    """Return mean directions of a sample's clusters, `(L, D)` float64, and the most typical prompt of each, `(L,)`."""
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
    """Return principal coordinates of directions, `(n, K)`, from the centred matrix of their inner products."""
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
    """Return the cluster with the nearest centre for each candidate, `(P,)`."""
    found = torch.zeros(len(pool), dtype=torch.int64)
    for positions, rows in chunk_directions(chunks):
        cosines = rows.double() @ centres.T
        found[positions] = cosines.argmax(dim=1)
    of_all_ranks = pool.ranks.all_sum(found)
    return of_all_ranks.numpy()


# ---- Clusters of an adaptive order's features -----------------------------------------------------------------------


def feature_grouping(features: np.ndarray, dataset: Dataset, seed: int) -> Grouping | None:
    """Return clusters of all prompts of a dataset.

    Args:
        features (`np.ndarray`): `(P, D)`, features of an adaptive order (`trl_learnalign.adaptive.belief`).
        dataset (`datasets.Dataset`): The P prompts.
        seed (`int`): `LearnAlignConfig.selection_seed`.

    Returns:
        `Grouping` or `None`: `None` if there are no features, too few prompts, or all features are equal.
    """
    size, dim = features.shape
    stream = rng.key(seed, "clusters", "all prompts")
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


# ---- Shared by both -------------------------------------------------------------------------------------------------


def _partition(points: np.ndarray, stream: int) -> np.ndarray:
    """Return the cluster of each point, `(n,)`: the best result of several starts."""
    best = np.zeros(len(points), dtype=np.int64)
    least = np.inf
    for start in range(STARTS):
        seed = rng.key(stream, start)
        with warnings.catch_warnings():
            # A cluster may lose all its points; then there is one cluster less.
            warnings.simplefilter("ignore")
            centres, codes = kmeans2(points, CLUSTERS, minit="++", rng=seed)
        distances = points - centres[codes]
        spread = float(np.square(distances).sum())
        if spread < least:
            best = codes
            least = spread
    return best


def _names(dataset: Dataset, rows: np.ndarray) -> tuple[str, ...]:
    """Return the names of clusters: a number, and the text of their most typical prompt."""
    names = []
    prompts = prompts_of(dataset, rows)
    for number, prompt in enumerate(prompts, start=1):
        question = prompt_question(prompt)
        text = " ".join(question.split())
        if len(text) > NAME_CHARACTERS:
            text = text[: NAME_CHARACTERS - 1] + "…"
        names.append(f"{number}: {text}")
    return tuple(names)


# ---- Tables of prompts ----------------------------------------------------------------------------------------------
# These tables are for the trackers of `report_to` and for the report.

PROMPT_CHARACTERS = 300
"""Maximum length of a prompt's text."""

PROMPT_FIGURES = ["success_rate", "learnability", "alignment", "score", "rank", "selected"]


def top_and_bottom(table: pa.Table, count: int, groupings: Sequence[Grouping] = ()) -> pd.DataFrame:
    """Return the best and the worst prompts of a stage.

    Prompts without a signal (learnability and score 0) and those without a score are at neither end.

    Args:
        table (`pyarrow.Table`): The stage's table (`trl_learnalign.records.run_record`).
        count (`int`): Maximum number of prompts at either end.
        groupings (sequence of `Grouping`, *optional*): Groupings for the column `categories`.

    Returns:
        `pandas.DataFrame`: Columns `end` (`"top"` or `"bottom"`), `index` (row of the dataset), `prompt` (cut),
        `success_rate`, `learnability`, `alignment`, `score`, `rank`, `selected`, `categories`; best first.
    """
    frame = table.to_pandas()
    frame = frame.sort_values("rank")
    has_score = frame["score"].notna()
    teaches = frame["learnability"] != 0  # true where it is unknown
    is_alive = teaches | (frame["score"] != 0)
    ranked = frame[has_score & is_alive]
    top = ranked.head(count)
    others = ranked.iloc[len(top) :]
    bottom = others.tail(count)
    both = pd.concat([top, bottom])
    rows = both["index"].tolist()
    ends = pd.DataFrame(
        {
            "end": ["top"] * len(top) + ["bottom"] * len(bottom),
            "index": rows,
            "prompt": [_cut(text) for text in both["prompt"]],
            "categories": [_categories(groupings, row) for row in rows],
        }
    )
    for name in PROMPT_FIGURES:
        ends[name] = both[name].to_numpy()
    return ends


def share_table(shares: Sequence[GroupDistribution]) -> pd.DataFrame:
    """Return the categories of a selection.

    Args:
        shares (sequence of `GroupDistribution`): Distributions over columns and clusters.

    Returns:
        `pandas.DataFrame`: Columns `by`, `category`, `pool` and `chosen` (counts), `share_of_pool`, `share_of_choice`,
        `ratio` (of the shares; above 1 is over-represented; missing for a category that the pool lacks).
    """
    rows = []
    for one in shares:
        for category in one.categories:
            in_pool = category.pool / one.pool
            in_choice = category.chosen / one.chosen
            row = {
                "by": one.by,
                "category": category.name,
                "pool": category.pool,
                "chosen": category.chosen,
                "share_of_pool": in_pool,
                "share_of_choice": in_choice,
                "ratio": in_choice / in_pool if in_pool else None,
            }
            rows.append(row)
    return pd.DataFrame(rows)


def _cut(text: str) -> str:
    """Return a prompt's text in one line; a long text loses its middle, since the question is mostly at the end."""
    line = " ".join(text.split())
    if len(line) <= PROMPT_CHARACTERS:
        return line
    half = PROMPT_CHARACTERS // 2
    return f"{line[:half]} … {line[-half:]}"


def _categories(groupings: Sequence[Grouping], row: int) -> str:
    parts = []
    for grouping in groupings:
        code = grouping.codes[row]
        if code >= 0:
            parts.append(f"{grouping.by}: {grouping.labels[code]}")
    return "; ".join(parts)


# ---- File of categories ---------------------------------------------------------------------------------------------
# The file has one row for each row of the dataset, in the same order, and one text column for each grouping, named as
# the dataset's column. With it, a report shows the categories that a run has trained on without the dataset, even
# during the run.


def write_categories(folder: Path, groupings: Sequence[Grouping]) -> None:
    """Write the file, if there is a grouping; on the main rank.

    Args:
        folder (`Path`): The record folder.
        groupings (sequence of `Grouping`): Groupings by columns of the dataset.
    """
    if not groupings:
        return
    columns = {grouping.by: grouping.names() for grouping in groupings}
    write_table(folder / layout.CATEGORIES, pa.table(columns))


def read_categories(folder: Path) -> list[Grouping]:
    """Read the file; the result is empty if there is none.

    Raises:
        `ValueError`: If the file is damaged.
    """
    path = folder / layout.CATEGORIES
    if not path.exists():
        return []
    table = read_table(path)
    groupings = []
    for name in table.column_names:
        texts = table[name].to_pylist()
        grouping = Grouping.of(name, texts)
        groupings.append(grouping)
    return groupings
