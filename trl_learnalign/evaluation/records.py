"""Records of an evaluation, one line per problem, written as it goes: an interrupted evaluation continues.

A folder holds `settings.json` (model, problems, sampling: what the records depend on), `records.jsonl` and, when all
problems are done, `summary.json`. A record:

| key | meaning |
|---|---|
| `index` | number of the problem |
| `prompt_id` | digest of the prompt's content, as in `trl_learnalign.records.run` |
| `prompt`, `solution` | what was asked, and the right answer |
| `completions` | the k samples: `text`, `tokens`, `finished` |
| `rewards` | the reward of each; `null` where it could not be judged |
| `right` | whether each is right, one above the threshold |
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm

from trl_learnalign.data.prompts import dataset_digest, prompt_id
from trl_learnalign.evaluation.generators import Generator, Sampling
from trl_learnalign.evaluation.held_out import grade
from trl_learnalign.records import layout
from trl_learnalign.records.run import versions
from trl_learnalign.records.store import StoreError, write_atomically, write_json
from trl_learnalign.statistics import PairedComparison, compare_paired, mean_accuracy

THRESHOLD = 0.5
"""A completion is right above this reward, as in training (`LearnAlignConfig.success_threshold`)."""


@dataclass(frozen=True)
class EvaluationFolder:
    """Where an evaluation's records lie.

    Args:
        path (`Path`): The folder.
    """

    path: Path

    @property
    def records_path(self) -> Path:
        """`records.jsonl`."""
        return self.path / layout.EVALUATION_RECORDS

    def settings(self) -> dict[str, Any]:
        """What the records depend on; empty if there are none."""
        place = self.path / layout.EVALUATION_SETTINGS
        return json.loads(place.read_text())["settings"] if place.exists() else {}

    def begin(self, settings: dict[str, Any]) -> None:
        """Begin or continue an evaluation.

        Raises:
            `StoreError`: If the folder holds an evaluation of other settings, naming both sides.
        """
        place = self.path / layout.EVALUATION_SETTINGS
        if place.exists():
            # As JSON gives them back: lists for tuples, and the like.
            as_stored = json.loads(json.dumps(settings))
            differences = [
                f"{name} was {was!r} and is {now!r}"
                for name, was, now in _differences(self.settings(), as_stored)
            ]
            if differences:
                raise StoreError(
                    f"{self.path} holds another evaluation: {'; '.join(differences)}. Name another folder with "
                    "--output_dir, or move or delete that one."
                )
        else:
            write_json(place, {"settings": settings, "versions": versions()})
        self._drop_torn_line()

    def _drop_torn_line(self) -> None:
        """A process that died while it wrote leaves half a line."""
        if not self.records_path.exists():
            return
        content = self.records_path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            write_atomically(self.records_path, whole)

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Add records, on the disk before this returns."""
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        with open(self.records_path, "ab") as file:
            file.write("".join(lines).encode())
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """All records, by index.

        Raises:
            `FileNotFoundError`: If there are none.
            `ValueError`: If a line is damaged, naming it.
        """
        if not self.records_path.exists():
            raise FileNotFoundError(
                f"{self.records_path} does not exist: give the output folder of an evaluation."
            )
        records: dict[int, dict[str, Any]] = {}
        with open(self.records_path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise ValueError(
                        f"{self.records_path}, line {number} is damaged ({error}): delete that line and evaluate "
                        "again; only its problem is asked anew."
                    ) from error
                records[record["index"]] = record
        return [records[index] for index in sorted(records)]

    def summary(self) -> dict[str, Any]:
        """Mean pass@1 of the records that are there, with its interval, and how completions ended."""
        records = self.read()
        estimate = mean_accuracy([accuracy_of(record) for record in records])
        completions = [completion for record in records for completion in record["completions"]]
        tokens = sum(completion["tokens"] for completion in completions)
        return {
            "problems": len(records),
            "samples": len(records[0]["completions"]),
            "accuracy": estimate.value,
            "low": estimate.low,
            "high": estimate.high,
            "confidence": 0.95,
            "unscorable": sum(reward is None for record in records for reward in record["rewards"]),
            "unfinished": sum(not completion["finished"] for completion in completions),
            "mean_tokens": tokens / len(completions),
        }


def _differences(first: dict[str, Any], second: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Settings that are not the same on both sides, by name."""
    pairs = [(name, first.get(name), second.get(name)) for name in sorted({*first, *second})]
    return [(name, ours, theirs) for name, ours, theirs in pairs if ours != theirs]


def settings_apart(first: EvaluationFolder, second: EvaluationFolder) -> list[str]:
    """How two evaluations differ besides the model: what else their difference may be due to."""
    apart = _differences(first.settings(), second.settings())
    return [
        f"{name} was {ours!r} and {theirs!r}"
        for name, ours, theirs in apart
        if name not in ("model", "problems")
    ]


def accuracy_of(record: dict[str, Any]) -> float:
    """Share of a problem's samples that are right; those that could not be judged are not."""
    return sum(record["right"]) / len(record["right"])


def evaluate(
    folder: EvaluationFolder,
    problems: Dataset,
    reward: Callable[..., Sequence[float | None]],
    make_generator: Callable[[], Generator],
    sampling: Sampling,
    batch_size: int,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Ask, grade and record what is not recorded yet.

    Args:
        folder (`EvaluationFolder`): Where the records go.
        problems (`Dataset`): Columns `prompt` and `solution`.
        reward (callable): Reward function in TRL's form, the one of training.
        make_generator (callable): Loads the model; not called if all problems are done.
        sampling (`Sampling`): How completions are drawn.
        batch_size (`int`): Problems of a batch.
        settings (`dict`): What else the records depend on: model, backend, …

    Returns:
        `dict`: The summary, also written to `summary.json`.

    Raises:
        `StoreError`: If the folder holds another evaluation.
    """
    digest = dataset_digest(problems)
    folder.begin({**settings, **asdict(sampling), "batch_size": batch_size, "problems": digest})
    recorded: set[int] = set()
    if folder.records_path.exists():
        recorded = {record["index"] for record in folder.read()}
    batches = _batches(len(problems), batch_size)
    open_batches = [batch for batch in batches if not recorded.issuperset(batch)]
    if open_batches:
        generator = make_generator()
        closed = len(batches) - len(open_batches)
        for batch in tqdm(open_batches, desc="Evaluating", unit="batch", initial=closed):
            # The whole batch again if a part of it is missing: samples depend on its composition.
            records = _records(generator, problems, batch, reward, sampling)
            folder.append([record for record in records if record["index"] not in recorded])
    summary = folder.summary()
    write_json(folder.path / layout.SUMMARY, summary)
    return summary


def _batches(size: int, batch_size: int) -> list[range]:
    starts = range(0, size, batch_size)
    return [range(start, min(start + batch_size, size)) for start in starts]


def _records(
    generator: Generator,
    problems: Dataset,
    batch: range,
    reward: Callable[..., Sequence[float | None]],
    sampling: Sampling,
) -> Iterator[dict[str, Any]]:
    """Records of the problems of a batch, generated and graded together."""
    rows = [problems[i] for i in batch]
    completions = generator.complete([row["prompt"] for row in rows], sampling, batch.start)
    row_of_each = [row for row in rows for _ in range(sampling.samples)]
    texts = [sample.text for samples in completions for sample in samples]
    values = iter(grade(reward, row_of_each, texts))
    for index, row, samples in zip(batch, rows, completions, strict=True):
        rewards = list(itertools.islice(values, len(samples)))
        yield {
            "index": index,
            "prompt_id": prompt_id(row["prompt"]),
            "prompt": row["prompt"],
            "solution": row["solution"],
            "completions": [asdict(sample) for sample in samples],
            "rewards": rewards,
            "right": [value is not None and value > THRESHOLD for value in rewards],
        }


def compare(first: EvaluationFolder, second: EvaluationFolder) -> PairedComparison:
    """Compare two models on the problems that both have records of.

    Raises:
        `ValueError`: If they share no problem, or only some.
    """
    ours, theirs = _accuracies(first), _accuracies(second)
    if ours.keys() != theirs.keys():
        in_both = len(ours.keys() & theirs.keys())
        raise ValueError(
            f"{first.path} has {len(ours)} problems and {second.path} has {len(theirs)}, and they share {in_both}: "
            "only evaluations of the same problems, with the same prompts, can be compared pair by pair."
        )
    problems = sorted(ours)
    return compare_paired(
        [ours[problem] for problem in problems], [theirs[problem] for problem in problems]
    )


def _accuracies(folder: EvaluationFolder) -> dict[tuple[int, str], float]:
    """Accuracy on each problem, which is known by its number and its prompt."""
    return {(record["index"], record["prompt_id"]): accuracy_of(record) for record in folder.read()}
