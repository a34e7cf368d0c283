"""Measures a stage's candidates shard by shard.

A shard is a fixed list of prompts. It is measured with a fixed number of model calls, each with its own seed. So the
result of a shard does not depend on the number of processes, on the process that made it, or on earlier interruptions.
(Rollouts of a vLLM server, or of an engine that several processes share, do depend on them.) Ranks take shards in
turn, and finished shards on disk are reused.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch

from trl_learnalign.distributed import Ranks
from trl_learnalign.measuring.base import (
    SECONDS,
    TOKENS_READ,
    Measure,
    MeasureJob,
    MeasureResult,
    Progress,
    Tally,
)
from trl_learnalign.pool import FeatureChunks
from trl_learnalign.records.layout import CHECKS
from trl_learnalign.records.store import ShardStore, StoreError, write_json
from trl_learnalign.rng import digest

logger = logging.getLogger(__name__)


def store_of(work: MeasureJob, measure: Measure) -> ShardStore:
    """Return the store of a measure for a job."""
    return ShardStore(
        work.folder / measure.name,
        {**work.fingerprint, **measure.fingerprint()},
        shards=len(work.shards),
    )


def is_finished(work: MeasureJob, measure: Measure, ranks: Ranks) -> bool:
    """Whether a matching store with all shards exists; collective over all ranks."""
    if not ranks.is_main:
        return bool(ranks.from_main(None))
    store = store_of(work, measure)
    whole = (
        store.manifest_path.exists()
        and not store.differences()
        and len(store.finished()) == len(work.shards)
    )
    return bool(ranks.from_main(whole))


def run(work: MeasureJob, measure: Measure, ranks: Ranks) -> MeasureResult:
    """Measure the missing shards; collective over all ranks.

    Raises:
        `StoreError`: If the folder holds another run's shards, or cannot be written.
    """
    store = store_of(work, measure)
    _open(store, ranks)
    finished = set(ranks.from_main(sorted(store.finished())))
    missing = [number for number in range(len(work.shards)) if number not in finished]
    if missing:
        with measure.session():
            _measure(work, measure, ranks, store, missing)
        if ranks.is_main:
            _keep_checks(store, measure)
    else:
        measure.take_checks(ranks.from_main(_checks_of(store) if ranks.is_main else None) or {})
    ranks.wait()
    # Each rank reads every `count`-th shard, and all ranks share the small results.
    numbers = tuple(range(ranks.index, len(work.shards), ranks.count))
    names = (*measure.small, SECONDS, TOKENS_READ)
    parts = []
    for number, shard in store.read_all(numbers):
        parts.append((number, {name: shard[name] for name in names}))
    by_number = dict(ranks.gather(parts))
    values = {}
    for name in names:
        values[name] = torch.cat([by_number[number][name] for number in range(len(work.shards))])
    seconds = float(values.pop(SECONDS).sum())
    tokens_read = int(values.pop(TOKENS_READ).sum())
    features = FeatureChunks(store, numbers, work.shard_size)
    return MeasureResult(values, features, seconds, tokens_read)


def _keep_checks(store: ShardStore, measure: Measure) -> None:
    """Write the checks made so far; they are written before the shards, so that every finished store has them."""
    checks = measure.checks()
    if checks != _checks_of(store):
        write_json(store.folder / CHECKS, {"checks": checks, "digest": digest(checks)})


def _checks_of(store: ShardStore) -> dict[str, Any] | None:
    """Return the checks made when the shards were measured; `None` if they are missing or damaged."""
    try:
        found = json.loads((store.folder / CHECKS).read_text())
        is_whole = found["digest"] == digest(found["checks"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return found["checks"] if is_whole else None


def _open(store: ShardStore, ranks: Ranks) -> None:
    problem = None
    if ranks.is_main:
        if differences := store.differences():
            problem = (
                f"{store.folder} contains measurements of another run. {'; '.join(differences)}. Give this run "
                "another output_dir, or move or delete that folder to measure again."
            )
        elif not store.manifest_path.exists():
            store.create()
    if problem := ranks.from_main(problem):
        raise StoreError(problem)


def _measure(
    work: MeasureJob,
    measure: Measure,
    ranks: Ranks,
    store: ShardStore,
    missing: list[int],
) -> None:
    shards = work.shards
    total = len(work.candidates)
    ready = total - sum(len(shards[number]) for number in missing)
    title = f"{work.name}: {measure.name}"
    if ready and ranks.is_main:
        logger.info("%s: %s of %s prompts are already measured", title, f"{ready:,}", f"{total:,}")
    interactive = False if work.quiet else None  # log lines instead of a bar
    with Progress(title, total, ready, not ranks.is_main, interactive) as progress:
        for batch in batches(shards, missing, ranks.count):
            calls = measure.calls(shards[batch[0]])
            # A rank without a shard makes the same calls, since they may be collectives.
            keep = ranks.index < len(batch)
            number = batch[ranks.index] if keep else batch[0]
            began = time.perf_counter()
            try:
                result = measure.measure(number, shards[number], calls, keep)
            except Exception as error:
                _tell_of_memory(error, measure)
                logger.error(
                    "%s: rank %d failed while measuring shard %d of %s; the other ranks will stop too. Finished "
                    "shards are kept: fix the cause and run the same command again to continue.",
                    measure.name,
                    ranks.index,
                    number,
                    work.name,
                )
                raise
            if ranks.is_main:
                _keep_checks(store, measure)
            tally = Tally()
            if keep:
                # Ranks work in parallel, so each shard of a batch is charged its share of the batch's time.
                seconds = (time.perf_counter() - began) / len(batch)
                amounts = {SECONDS: torch.tensor([seconds], dtype=torch.float64)}
                nothing = {TOKENS_READ: torch.zeros(1, dtype=torch.int64)}
                store.write(number, {**nothing, **result, **amounts})
                tally = measure.tally(len(shards[number]), result)
            progress.add(sum(len(shards[number]) for number in batch), tally)


def batches(
    shards: Sequence[np.ndarray], missing: Sequence[int], ranks: int
) -> Iterator[list[int]]:
    """Yield shards that ranks measure in parallel, one each, of equal length, so that their calls have equal sizes.

    Args:
        shards (sequence of `np.ndarray`): The candidates of each shard; the last may be shorter than the others.
        missing (sequence of `int`): Numbers of those to measure, ascending.
        ranks (`int`): Number of ranks.
    """
    for _length, numbers in groupby(missing, key=lambda number: len(shards[number])):
        alike = list(numbers)
        for first in range(0, len(alike), ranks):
            yield alike[first : first + ranks]


def _tell_of_memory(error: Exception, measure: Measure) -> None:
    """Log the remedy for a GPU out of memory: a smaller call samples differently, so it is not made silently."""
    if isinstance(error, torch.OutOfMemoryError):
        logger.error(
            "%s: the GPU ran out of memory. Set a smaller scoring_batch_prompts (now %s) or capture_max_tokens, "
            "and first move this stage's folder away, since its rollouts were generated in larger batches.",
            measure.name,
            measure.fingerprint().get("scoring_batch_prompts", "not used"),
        )
