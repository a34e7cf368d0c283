"""Diversity of a selection: directions of its gradients, and categories beside the pool's.

A choice of many like prompts teaches one thing many times. Each figure stands beside that of a seeded random choice of
as many prompts, since all of them depend on how many are chosen.
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
from trl_learnalign.data.categories import CLUSTER, Grouping
from trl_learnalign.data.prompts import prompt_question, prompts_of
from trl_learnalign.pool import Pool
from trl_learnalign.records import layout
from trl_learnalign.records.notes import CategoryCount, GradientDiversity, GroupDistribution
from trl_learnalign.records.store import read_table, write_table
from trl_learnalign.scoring import Chunks, chunk_directions, collect, has_direction, products

COMPARED = 2048
"""Prompts of a choice that are compared with each other at most: a seeded sample."""

STOOD_FOR = 1024
"""Prompts that a choice should stand for at most: a seeded sample."""


def breadth(pool: Pool, chosen: np.ndarray) -> GradientDiversity | None:
    """Breadth of a choice by the features that were measured; all ranks call it together.

    Args:
        pool (`Pool`): The candidates, P.
        chosen (`np.ndarray`): Positions of the chosen ones.

    Returns:
        `Breadth` or `None`: `None` without features, or with fewer than two among the chosen.
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
    """Some of the positions, in a seeded order of their prompts; all of them if there are no more."""
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
    """Features of a pool, those of this rank.

    Args:
        pool (`Pool`): The pool.
        chunks (iterable of pairs): `(positions (c,), features (c, D))`.
        dim (`int`): D.
    """

    pool: Pool
    chunks: Chunks
    dim: int

    @classmethod
    def of(cls, pool: Pool) -> _Features | None:
        """Those of gradients, else those of hidden states, else none."""
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
        """Directions of some candidates, `(n, D)`, on every rank."""
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
        """`Σ_j max_{i∈A} max(S_ij, 0)` over some prompts, as a share of what the whole pool reaches, for each choice.

        Args:
            targets (`np.ndarray`): Positions of the prompts that should be stood for.
            choices (`np.ndarray`): Positions of each choice.
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
                # Zeros in the place of the others: less than 0 does not count anyhow.
                of_members = similarities * is_member
                best[number] = torch.maximum(best[number], of_members.amax(dim=1))
        largest = pool.ranks.most(best.flatten().tolist())
        of_all_ranks = torch.tensor(largest, dtype=torch.float64)
        # The weight of the prompt that is stood for is a factor of all its similarities.
        target_weights = weights[torch.from_numpy(targets)]
        values = of_all_ranks.view_as(best) @ target_weights
        shares = values[:-1] / values[-1]
        return shares.tolist()

    def compared(self, positions: np.ndarray) -> _Compared:
        """Directions of some prompts among each other.

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
# A choice of one category's prompts alone may have every prompt of a high score and still leave most of the pool
# untaught. How many categories it is spread over depends on how many prompts it has: the effective number of its
# categories stands beside that of seeded random choices.
#
# Axes: `n` rows of the dataset, `L` categories.

DRAWS = 100
"""Random choices that a choice is held against."""

NOTED = 50
"""Categories that are noted one by one at most: the largest."""


def effective_number(counts: np.ndarray) -> float:
    """`exp` of the entropy of shares: how many equal categories are spread as far.

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
    """A choice by categories, beside its pool.

    Args:
        groupings (sequence of `Grouping`): Ways to put prompts into categories.
        pool (`np.ndarray`): Rows that might have been chosen, distinct.
        chosen (`np.ndarray`): Rows that were; a row may come several times, as training comes back to it.
        seed (`int`): `LearnAlignConfig.selection_seed`.
        purpose (`str`): What is chosen for, e.g. `Phase.name`; part of the random choices' seeds.

    Returns:
        `tuple[Shares]`: One for each grouping that knows a prompt of the pool and one of the choice.
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
    """Members of each category in a random choice, `(L,)`: whole passes over the pool, and a part of the next one."""
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
    """The categories of pool or choice, those with the largest share in either first."""
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
# The clusters are found in a seeded sample of the pool; everybody then belongs to the cluster whose mean is nearest.
# What a stage has measured gives directions, spread over ranks; what an adaptive order tells prompts apart by are a
# few numbers for each, which one rank holds.
#
# Axes: `P` candidates, `n` of them in the sample, `D` dimensions, `K` coordinates, `L` clusters.

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

NAME_CHARACTERS = 60
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
    """Some of the items, in their order."""
    shuffled = rng.permutation(stream, items)
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
        features (`np.ndarray`): `(P, D)`, as an adaptive order knows prompts (`trl_learnalign.adaptive.belief`).
        dataset (`datasets.Dataset`): The P prompts.
        seed (`int`): `LearnAlignConfig.selection_seed`.

    Returns:
        `Grouping` or `None`: `None` where there are no features, too few prompts, or all alike.
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


# ---- Of both --------------------------------------------------------------------------------------------------------


def _partition(points: np.ndarray, stream: int) -> np.ndarray:
    """Cluster of each point, `(n,)`: the best of several starts."""
    best = np.zeros(len(points), dtype=np.int64)
    least = np.inf
    for start in range(STARTS):
        seed = rng.key(stream, start)
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
        if len(text) > NAME_CHARACTERS:
            text = text[: NAME_CHARACTERS - 1] + "…"
        names.append(f"{number}: {text}")
    return tuple(names)


# ---- Tables of prompts ----------------------------------------------------------------------------------------------
# What the trackers of `report_to` are shown, and the report.

PROMPT_CHARACTERS = 300
"""Of a prompt's text."""

PROMPT_FIGURES = ["success_rate", "learnability", "alignment", "score", "rank", "selected"]


def top_and_bottom(table: pa.Table, count: int, groupings: Sequence[Grouping] = ()) -> pd.DataFrame:
    """The best and the worst prompts of a stage.

    Prompts that teach nothing (learnability and score 0) and those without a score are at neither end.

    Args:
        table (`pyarrow.Table`): The stage's table (`trl_learnalign.records.run`).
        count (`int`): Prompts at either end, at most.
        groupings (sequence of `Grouping`, *optional*): What to name each prompt's categories by.

    Returns:
        `pandas.DataFrame`: Columns `end` (`"top"` or `"bottom"`), `index` (row of the dataset), `prompt` (cut),
        `success_rate`, `learnability`, `alignment`, `score`, `rank`, `selected`, `categories`; best first.
    """
    frame = table.to_pandas()
    frame = frame.sort_values("rank")
    has_score = frame["score"].notna()
    teaches = frame["learnability"] != 0  # true where it is not known
    is_alive = teaches | (frame["score"] != 0)
    ranked = frame[has_score & is_alive]
    top = ranked.head(count)
    others = ranked.iloc[len(top) :]
    bottom = others.tail(count)
    both = pd.concat([top, bottom])
    rows = both["index"].tolist()
    told = pd.DataFrame(
        {
            "end": ["top"] * len(top) + ["bottom"] * len(bottom),
            "index": rows,
            "prompt": [_cut(text) for text in both["prompt"]],
            "categories": [_categories(groupings, row) for row in rows],
        }
    )
    for name in PROMPT_FIGURES:
        told[name] = both[name].to_numpy()
    return told


def share_table(shares: Sequence[GroupDistribution]) -> pd.DataFrame:
    """The categories of a choice.

    Args:
        shares (sequence of `Shares`): By column or cluster.

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
    """A prompt's text in one line; long ones without their middle, since the question is mostly at the end."""
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
# One row for each of the dataset, in its order; one column of texts for each grouping, named as the dataset's column.
# With it, a report says which categories a run has trained on without the dataset, also of a run that is under way.


def write_categories(folder: Path, groupings: Sequence[Grouping]) -> None:
    """Write the file, where there is a grouping; on the main rank.

    Args:
        folder (`Path`): The record folder.
        groupings (sequence of `Grouping`): By columns of the dataset.
    """
    if not groupings:
        return
    columns = {grouping.by: grouping.names() for grouping in groupings}
    write_table(folder / layout.CATEGORIES, pa.table(columns))


def read_categories(folder: Path) -> list[Grouping]:
    """Read the file; empty if there is none.

    Raises:
        `ValueError`: If it is damaged.
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
