"""Reward histories: success rates by prompt and pass, and outcomes of training rollouts.

Every run with `LearnAlignCallback` writes one, `reward_history.parquet` in its record folder ([`HistoryRecorder`]).
There are two file formats, distinguished by the file extension:

`.parquet`, one row per prompt and pass:

| column | meaning |
|---|---|
| `prompt_id` | digest of the prompt's content, as in the records ([`prompts.prompt_id`]); may be missing |
| `prompt` | the prompt itself, instead of `prompt_id` |
| `index` | row of the training dataset; may be missing if `prompt_id` is present |
| `pass` | number of the pass |
| `success_rate` | share of correct rollouts, from 0 to 1; missing if none could be judged |

The file of a run also has `phase` and `step` (phase and optimizer step that rolled the prompt out), `right` and
`wrong` (numbers of rollouts; a rollout that could not be judged is in neither), `useful` (whether the group had a
gradient), `prompt_tokens` and `completion_tokens` (the latter a mean over the rollouts) and, if the run used a belief,
`predicted` (the success rate predicted before the rollout). With a graded reward, `right` and `wrong` are sums of
fractions, and there is `partial` ([`Outcomes`]). Pass numbers continue from phase to phase.

`.json`, the layout of One-Shot-RLVR: `{"index": [rate of the first pass, of the second, …]}`, `null` where unknown.

Prompts are matched by content if the file has `prompt_id` or `prompt`, so that the history of one dataset is valid for
its subsets and shuffled copies. Otherwise they are matched by the row of the file that the dataset was made from (its
column `source_row`, which the recipes keep through the held-out split), or by the row of the dataset itself. Several
values of one prompt in one pass (a pass that wrapped around, equal prompts in several rows) are averaged.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trl_learnalign.adaptive import Outcomes
from trl_learnalign.data.prompts import prompt_id, prompts_of, source_rows
from trl_learnalign.records.store import parquet, read_table, write_atomically

logger = logging.getLogger(__name__)

PROMPT_ID, INDEX, PASS, RATE = "prompt_id", "index", "pass", "success_rate"
PROMPT, PHASE, STEP = "prompt", "phase", "step"
RIGHT, WRONG, PARTIAL, USEFUL, PREDICTED = "right", "wrong", "partial", "useful", "predicted"
PROMPT_TOKENS, COMPLETION_TOKENS = "prompt_tokens", "completion_tokens"


@dataclass(frozen=True)
class RewardHistory:
    """Success rates of prompts over passes. Axes: `M` prompts, `N` passes.

    Args:
        rates (`np.ndarray`): `(M, N)` float64 from 0 to 1, NaN where unknown.
        indices (`np.ndarray`, *optional*): Rows of the dataset, `(M,)` int64.
        prompt_ids (sequence of `str`, *optional*): M digests.

    Raises:
        `ValueError`: If a rate is out of range, or there are neither indices nor ids.
    """

    rates: np.ndarray
    indices: np.ndarray | None = None
    prompt_ids: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.indices is None and self.prompt_ids is None:
            raise ValueError(
                f"A reward history needs a column '{INDEX}' or '{PROMPT_ID}' that identifies its prompts."
            )
        if not self.rates.size:
            raise ValueError("The reward history is empty: it has no prompts or no passes.")
        outside = (self.rates < 0) | (self.rates > 1)  # False for NaN, an unknown rate
        if outside.any():
            wrong = self.rates[outside]
            raise ValueError(
                f"The reward history has the value {wrong[0]:g}, but success rates are between 0 and 1. Convert "
                "rewards on another scale to 1 (correct) and 0 (wrong) first."
            )

    @property
    def mean(self) -> np.ndarray:
        """Mean rate of each pass over its prompts, `(N,)`; NaN for a pass without prompts."""
        return _mean(self.rates)

    def of(self, dataset: Any, prompts: np.ndarray) -> np.ndarray:
        """Rates of the given prompts, `(P, N)`; NaN for prompts that are not in the history.

        Args:
            dataset (`datasets.Dataset`): With a `prompt` column.
            prompts (`np.ndarray`): Rows of it, `(P,)`.
        """
        if self.prompt_ids is not None:
            places: dict[Any, list[int]] = _places(self.prompt_ids)
            keys: list[Any] = [prompt_id(prompt) for prompt in prompts_of(dataset, prompts)]
        else:
            assert self.indices is not None
            places = _places(self.indices.tolist())
            keys = source_rows(dataset, prompts)
        rates = np.full((len(prompts), self.rates.shape[1]), np.nan)
        for row, key in enumerate(keys):
            if key in places:
                rates[row] = _mean(self.rates[places[key]])
        return rates


def _places(keys: Sequence[Any]) -> dict[Any, list[int]]:
    """Key → its positions; equal prompts in several rows share a key."""
    places: dict[Any, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    return places


def _mean(rates: np.ndarray) -> np.ndarray:
    """Mean over the first axis, ignoring NaN; without NumPy's warning for all-NaN columns."""
    is_known = ~np.isnan(rates)
    total = np.where(is_known, rates, 0).sum(axis=0)
    with np.errstate(invalid="ignore"):
        return total / is_known.sum(axis=0)


def read_history(path: str | Path) -> RewardHistory:
    """Read a history file.

    Raises:
        `FileNotFoundError`: If there is none.
        `ValueError`: If it has neither format, naming the file and the problem.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"reward_history={str(path)!r} does not exist: give the file of a previous run."
        )
    if path.suffix not in _READERS:
        raise ValueError(
            f"reward_history={str(path)!r}: the file must end in {' or '.join(_READERS)}."
        )
    try:
        return _READERS[path.suffix](path)
    except (ValueError, TypeError, pa.ArrowException) as error:
        raise ValueError(f"reward_history={str(path)!r} cannot be used: {error}") from error


def _read_parquet(path: Path) -> RewardHistory:
    table = pq.read_table(path)
    columns = set(table.column_names)
    if PROMPT in columns and PROMPT_ID not in columns:
        ids = [prompt_id(prompt) for prompt in table.column(PROMPT).to_pylist()]
        table = table.append_column(PROMPT_ID, pa.array(ids, pa.string()))
        columns.add(PROMPT_ID)
    if not {PASS, RATE} <= columns or not {PROMPT_ID, INDEX} & columns:
        raise ValueError(
            f"it has the columns {sorted(columns)}, but a history needs '{PASS}', '{RATE}', and '{INDEX}' or "
            f"'{PROMPT_ID}'."
        )
    # Rows of equal prompts stay separate if the file distinguishes them; `RewardHistory.of` averages them.
    names = [name for name in (PROMPT_ID, INDEX) if name in columns]
    if any(table.column(name).null_count for name in (*names, PASS)):
        raise ValueError(f"values are missing in {', '.join(map(repr, (*names, PASS)))}.")
    identities = [table.column(name).to_pylist() for name in names]
    keys = list(zip(*identities, strict=True))
    prompts = list(dict.fromkeys(keys))  # distinct keys in file order
    rates = _by_pass(keys, prompts, table.column(PASS).to_pylist(), table.column(RATE).to_pylist())
    indices, prompt_ids = None, None
    if INDEX in names:
        place = names.index(INDEX)
        indices = np.array([key[place] for key in prompts], dtype=np.int64)
    if PROMPT_ID in names:
        place = names.index(PROMPT_ID)
        prompt_ids = [str(key[place]) for key in prompts]
    return RewardHistory(rates, indices, prompt_ids)


def _by_pass(
    keys: Sequence[Any],
    prompts: Sequence[Any],
    passes: Sequence[Any],
    rates: Sequence[float | None],
) -> np.ndarray:
    """Mean rate of each prompt (in the order of `prompts`) in each pass (ascending), `(M, N)`."""
    rows = {key: row for row, key in enumerate(prompts)}
    columns = {number: column for column, number in enumerate(sorted(set(passes)))}
    sums = np.zeros((len(rows), len(columns)))
    counts = np.zeros_like(sums)
    for key, number, rate in zip(keys, passes, rates, strict=True):
        if rate is None or np.isnan(rate):
            continue
        place = rows[key], columns[number]
        sums[place] += rate
        counts[place] += 1
    with np.errstate(invalid="ignore"):  # 0 / 0: unknown
        return sums / counts


def _read_json(path: Path) -> RewardHistory:
    lists = json.loads(path.read_text())
    if not isinstance(lists, dict) or not all(isinstance(rates, list) for rates in lists.values()):
        raise ValueError('it does not have the form {"index": [rate of each pass, …]}.')
    wrong = next((key for key in lists if not key.isdecimal()), None)
    if wrong is not None:
        raise ValueError(f"{wrong!r} is not a row number: keys must be whole numbers from 0.")
    passes = max(map(len, lists.values()), default=0)
    rates = np.full((len(lists), passes), np.nan)
    for row, values in enumerate(lists.values()):
        rates[row, : len(values)] = [np.nan if value is None else float(value) for value in values]
    indices = np.array([int(key) for key in lists], dtype=np.int64)
    return RewardHistory(rates, indices)


_READERS = {".parquet": _read_parquet, ".json": _read_json}


class HistoryRecorder:
    """Records the success rates of a run's training rollouts in a file that [`read_history`] reads.

    Args:
        path (`Path`): `reward_history.parquet`.
        dataset (`datasets.Dataset`): With a `prompt` column.
        writes (`bool`): Whether this rank records.
        graded (`bool`, *optional*, defaults to `False`): Whether outcomes are fractions.
    """

    _schema = pa.schema(
        {
            PROMPT_ID: pa.string(),
            INDEX: pa.int64(),
            PASS: pa.int64(),
            RATE: pa.float64(),
            PHASE: pa.string(),
            STEP: pa.int64(),
            RIGHT: pa.int64(),
            WRONG: pa.int64(),
            USEFUL: pa.bool_(),
            PREDICTED: pa.float64(),
            PROMPT_TOKENS: pa.float64(),
            COMPLETION_TOKENS: pa.float64(),
        }
    )

    def __init__(self, path: Path, dataset: Any, writes: bool, graded: bool = False):
        if graded:
            sums = {name: pa.float64() for name in (RIGHT, WRONG, PARTIAL)}
            kinds = dict(zip(self._schema.names, self._schema.types, strict=True))
            self._schema = pa.schema({**kinds, **sums})
        self.path = path
        self.dataset = dataset
        self.writes = writes
        self._parts: list[pa.Table] = []
        self._ids: dict[int, str] = {}

    def begin(self, content: bytes | None = None) -> None:
        """Start a run, or resume one.

        Args:
            content (`bytes`, *optional*): An earlier return value of [`content`], from which the file is rebuilt.
        """
        self._parts = []
        if self.writes and content is not None:
            self._parts.append(pq.read_table(pa.BufferReader(content), schema=self._schema))
            self.save()

    def table(self) -> pa.Table:
        """Everything recorded so far, as in the file; empty on a rank that does not record."""
        return pa.concat_tables(self._parts) if self._parts else self._schema.empty_table()

    def outcomes(self) -> Outcomes:
        """Everything recorded so far, in the order of recording."""
        return _outcomes(self.table())

    def generations(self) -> list[Outcomes]:
        """Everything recorded so far, in parts as recorded; generations of one step may be one part."""
        return [part for table in self._parts for part in _outcomes(table).by_step()]

    def add(self, outcomes: Outcomes, passes: np.ndarray) -> None:
        """Record a generation.

        Args:
            outcomes ([`Outcomes`]): Its outcomes, with the phase, and predictions if there are any.
            passes (`np.ndarray`): Pass number of each group's prompt, `(P,)`.
        """
        if not self.writes:
            return
        rows, rates, predicted = outcomes.rows, outcomes.success_rates, outcomes.predicted
        unseen = sorted(set(rows.tolist()) - self._ids.keys())
        for row, prompt in zip(unseen, prompts_of(self.dataset, unseen), strict=True):
            self._ids[row] = prompt_id(prompt)
        columns = {
            PROMPT_ID: [self._ids[row] for row in rows.tolist()],
            INDEX: rows,
            PASS: passes,
            RATE: pa.array(rates, mask=np.isnan(rates)),
            PHASE: outcomes.phases,
            STEP: outcomes.steps,
            RIGHT: outcomes.right,
            WRONG: outcomes.wrong,
            PARTIAL: outcomes.partial,
            USEFUL: outcomes.useful,
            PREDICTED: pa.array(predicted, mask=np.isnan(predicted)),
            PROMPT_TOKENS: outcomes.prompt_tokens,
            COMPLETION_TOKENS: outcomes.completion_tokens,
        }
        columns = {name: columns[name] for name in self._schema.names}
        self._parts.append(pa.table(columns, schema=self._schema))

    def content(self) -> bytes:
        """Everything recorded so far, as the bytes of the file."""
        # Keep one chunk from now on, because a run saves at every checkpoint.
        whole = self.table().combine_chunks()
        self._parts = [whole]
        return parquet(whole)

    def save(self) -> None:
        """Write the file; atomically."""
        if self.writes and self._parts:
            write_atomically(self.path, self.content())


def _outcomes(table: pa.Table) -> Outcomes:
    """The outcomes in the table of a run; rows without counts are skipped."""
    table = table.filter(pc.field(RIGHT).is_valid())
    is_graded = PARTIAL in table.column_names
    return Outcomes(
        steps=table[STEP].to_numpy(),
        rows=table[INDEX].to_numpy(),
        right=table[RIGHT].to_numpy(),
        wrong=table[WRONG].to_numpy(),
        partial=table[PARTIAL].to_numpy() if is_graded else np.zeros(len(table)),
        phases=np.array(table[PHASE].to_pylist(), dtype=object),
        useful=table[USEFUL].to_numpy(),
        predicted=table[PREDICTED].to_numpy().astype(np.float64),
        prompt_tokens=table[PROMPT_TOKENS].to_numpy(),
        completion_tokens=table[COMPLETION_TOKENS].to_numpy(),
    )


def first_groups(path: Path) -> Outcomes:
    """Each prompt's first group, from a reward history or stage table; without phases and predictions.

    Raises:
        `ValueError`: If there is no such file, it is damaged, or it has no rollouts.
    """
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist: give reward_history.parquet or the table of a scored stage, from the record "
            "folder of a run."
        )
    table = read_table(path)
    if not {INDEX, RIGHT, WRONG} <= set(table.column_names):
        raise ValueError(f"{path} lacks one of the columns {INDEX}, {RIGHT} and {WRONG}.")
    outcomes = first_groups_of(table.to_pandas())
    if not len(outcomes):
        raise ValueError(f"{path} has no prompt that was rolled out.")
    return outcomes


def first_groups_of(frame: pd.DataFrame) -> Outcomes:
    """Each prompt's first group, from a table with the columns of outcomes; rows without rollouts are left out."""
    is_graded = PARTIAL in frame
    names = [INDEX, RIGHT, WRONG, *([PARTIAL] if is_graded else [])]
    first = frame[names].dropna().drop_duplicates(INDEX)
    kind = np.float64 if is_graded else np.int64
    rows, right, wrong, *partial = (first[name].to_numpy(kind) for name in names)
    return Outcomes.at(0, rows.astype(np.int64), right, wrong, partial=next(iter(partial), None))


def read_outcomes(path: Path) -> Outcomes | None:
    """Read the outcomes from a run's file; `None` if there is no file or it has no counts.

    Raises:
        `ValueError`: If it is damaged.
    """
    if not path.exists():
        return None
    table = read_table(path)
    needed = {PHASE, STEP, INDEX, RIGHT, WRONG, USEFUL, PREDICTED, PROMPT_TOKENS, COMPLETION_TOKENS}
    if not needed <= set(table.column_names):
        return None
    return _outcomes(table)
