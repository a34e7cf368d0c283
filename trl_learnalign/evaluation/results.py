"""Records of an evaluation, one line per problem, written during the evaluation, so that it can be resumed.

A folder has `settings.json` (model, problems, sampling: what the records depend on), `records.jsonl` and, when all
problems are done, `summary.json`. A record:

| key | meaning |
|---|---|
| `index` | number of the problem |
| `prompt_id` | digest of the prompt's content, as in `trl_learnalign.records.run_record` |
| `prompt`, `solution` | the prompt, and the reference answer |
| `completions` | the k samples: `text`, `tokens`, `finished` |
| `rewards` | the reward of each; `null` if it could not be judged |
| `right` | whether each is correct: a reward above the threshold, the strict figure |
| `answers` | the strictly extracted answer of each; `null` if there is none |
| `flexible_right` | whether the flexibly extracted answer of each is correct |
| `flexible_answers` | that answer |

The last three are missing with a user-defined reward.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm

from trl_learnalign.data.prompts import dataset_digest, prompt_id
from trl_learnalign.evaluation.generators import Generator, Sampling
from trl_learnalign.evaluation.grading import Grader, Verdict
from trl_learnalign.intervals import PairedComparison, compare_paired, mean_accuracy
from trl_learnalign.records import layout
from trl_learnalign.records.lock import sweep
from trl_learnalign.records.run_record import versions
from trl_learnalign.records.store import StoreError, write_atomically, write_json, writing

FLEXIBLE = "flexible"
"""Key of the flexible figures in a summary."""


@dataclass(frozen=True)
class EvaluationFolder:
    """Folder of an evaluation's records.

    Args:
        path (`Path`): The folder.
    """

    path: Path

    @property
    def records_path(self) -> Path:
        """Path of `records.jsonl`."""
        return self.path / layout.EVALUATION_RECORDS

    def settings(self) -> dict[str, Any]:
        """The settings that the records depend on; empty if there are none."""
        place = self.path / layout.EVALUATION_SETTINGS
        return json.loads(place.read_text())["settings"] if place.exists() else {}

    def begin(self, settings: dict[str, Any]) -> None:
        """Start or resume an evaluation.

        Raises:
            `StoreError`: If the folder holds an evaluation with other settings; names the differences.
        """
        place = self.path / layout.EVALUATION_SETTINGS
        if place.exists():
            # Convert to what JSON reads back, e.g. lists for tuples.
            as_stored = json.loads(json.dumps(settings))
            differences = [
                f"{name} was {was!r} and is {now!r}"
                for name, was, now in _differences(self.settings(), as_stored)
            ]
            if differences:
                raise StoreError(
                    f"{self.path} contains another evaluation: {'; '.join(differences)}. Choose another folder with "
                    "--output_dir, or move or delete this one."
                )
        else:
            write_json(place, {"settings": settings, "versions": versions()})
        self._drop_torn_line()
        sweep(self.path)

    def _drop_torn_line(self) -> None:
        """Remove the incomplete last line left by a process that died while writing."""
        if not self.records_path.exists():
            return
        content = self.records_path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            write_atomically(self.records_path, whole)

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Append records and sync them to disk."""
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        with writing(self.records_path), open(self.records_path, "ab") as file:
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
                        "again. Only its problem will be generated again."
                    ) from error
                records[record["index"]] = record
        return [records[index] for index in sorted(records)]

    def summary(self) -> dict[str, Any]:
        """Mean pass@1 of the existing records with its interval, and how completions ended."""
        records = self.read()
        summary = {
            "problems": len(records),
            "samples": len(records[0]["completions"]),
            **_figures(records, "right", "answers"),
            "confidence": 0.95,
            "unscorable": _all(records, "rewards").count(None),
            **_endings(records),
        }
        if all("flexible_right" in record for record in records):
            summary[FLEXIBLE] = _figures(records, "flexible_right", "flexible_answers")
        return summary


def _endings(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How completions ended, if known."""
    tokens = []
    finished = []
    for completion in _all(records, "completions"):
        if "tokens" not in completion:
            return {}
        tokens.append(completion["tokens"])
        finished.append(completion["finished"])
    return {"unfinished": finished.count(False), "mean_tokens": fmean(tokens)}


def _all(records: Sequence[dict[str, Any]], key: str) -> list[Any]:
    """The values of a key, over all samples of all problems."""
    values = []
    for record in records:
        values.extend(record[key])
    return values


def _figures(records: Sequence[dict[str, Any]], right: str, answers: str) -> dict[str, Any]:
    """Accuracy by one way of extracting answers, and the number of completions without an extracted answer."""
    accuracies = [accuracy_of(record, right) for record in records]
    estimate = mean_accuracy(accuracies)
    figures = {
        "accuracy": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
    }
    if all(answers in record for record in records):
        found = _all(records, answers)
        figures["no_answer"] = found.count(None)
    return figures


def _differences(first: dict[str, Any], second: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Settings that differ between the two, by name."""
    apart = []
    for name in sorted({*first, *second}):
        ours = first.get(name)
        theirs = second.get(name)
        if ours != theirs:
            apart.append((name, ours, theirs))
    return apart


def settings_apart(first: EvaluationFolder, second: EvaluationFolder) -> list[str]:
    """Settings other than the model in which two evaluations differ, and which may explain their difference."""
    apart = []
    for name, ours, theirs in _differences(first.settings(), second.settings()):
        if name not in ("model", "problems"):
            apart.append(f"{name} was {ours!r} and {theirs!r}")
    return apart


def accuracy_of(record: dict[str, Any], right: str = "right") -> float:
    """Share of a problem's samples that are correct; samples that could not be judged count as wrong.

    Args:
        record (`dict`): Record of a problem.
        right (`str`, *optional*, defaults to `"right"`): Or `"flexible_right"`.
    """
    return sum(record[right]) / len(record[right])


def evaluate(
    folder: EvaluationFolder,
    problems: Dataset,
    grader: Grader,
    make_generator: Callable[[], Generator],
    sampling: Sampling,
    batch_size: int,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Generate, grade and record the problems that are not recorded yet.

    Args:
        folder (`EvaluationFolder`): Folder of the records.
        problems (`Dataset`): Columns `prompt` and `solution`, or what the grader's reward reads.
        grader (`Grader`): Grades completions.
        make_generator (callable): Loads the model; not called if all problems are done.
        sampling (`Sampling`): Sampling settings.
        batch_size (`int`): Problems of a batch.
        settings (`dict`): Further settings that the records depend on: model, backend, …

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
            # If a part of a batch is missing, the whole batch is repeated, because samples depend on its composition.
            records = _records(generator, problems, batch, grader, sampling)
            folder.append([record for record in records if record["index"] not in recorded])
    summary = folder.summary()
    write_json(folder.path / layout.SUMMARY, summary)
    return summary


def _batches(size: int, batch_size: int) -> list[range]:
    batches = []
    for start in range(0, size, batch_size):
        end = min(start + batch_size, size)
        batches.append(range(start, end))
    return batches


def _records(
    generator: Generator,
    problems: Dataset,
    batch: range,
    grader: Grader,
    sampling: Sampling,
) -> list[dict[str, Any]]:
    """Records of the problems of a batch, which are generated and graded together."""
    rows = [problems[i] for i in batch]
    completions = generator.complete([row["prompt"] for row in rows], sampling, batch.start)
    row_of_each = [row for row in rows for _ in range(sampling.samples)]
    samples = list(itertools.chain.from_iterable(completions))
    texts, ids = [each.text for each in samples], [each.ids for each in samples]
    verdicts = grader.verdicts(row_of_each, texts, ids)
    records = []
    for place, index in enumerate(batch):
        start = place * sampling.samples
        of_problem = verdicts[start : start + sampling.samples]
        row = rows[place]
        record = {
            "index": index,
            "prompt_id": prompt_id(row["prompt"]),
            "prompt": row["prompt"],
            "solution": row.get("solution", row.get("answer")),
            "completions": [sample.entry() for sample in completions[place]],
            **_columns(of_problem, grader.extracts),
        }
        records.append(record)
    return records


def _columns(verdicts: Sequence[Verdict], extracted: bool) -> dict[str, list[Any]]:
    """The verdicts on a problem's samples in the form of a record."""
    columns: dict[str, list[Any]] = {
        "rewards": [verdict.reward for verdict in verdicts],
        "right": [verdict.right for verdict in verdicts],
    }
    if extracted:
        columns["answers"] = [verdict.answer for verdict in verdicts]
        columns["flexible_right"] = [verdict.flexible_right for verdict in verdicts]
        columns["flexible_answers"] = [verdict.flexible_answer for verdict in verdicts]
    return columns


def compare(
    first: EvaluationFolder, second: EvaluationFolder, right: str = "right"
) -> PairedComparison:
    """Compare two models on the problems of their records.

    Args:
        first (`EvaluationFolder`): Records of one.
        second (`EvaluationFolder`): Records of the other.
        right (`str`, *optional*, defaults to `"right"`): Or `"flexible_right"`.

    Raises:
        `ValueError`: If they share no problem, or only some.
    """
    ours, theirs = _accuracies(first, right), _accuracies(second, right)
    if ours.keys() != theirs.keys():
        in_both = len(ours.keys() & theirs.keys())
        raise ValueError(
            f"{first.path} has {len(ours)} problems, {second.path} has {len(theirs)}, and {in_both} are in both. A "
            "paired comparison needs the same problems with the same prompts."
        )
    problems = sorted(ours)
    accuracies = [ours[problem] for problem in problems]
    accuracies_too = [theirs[problem] for problem in problems]
    return compare_paired(accuracies, accuracies_too)


def _accuracies(folder: EvaluationFolder, right: str) -> dict[tuple[int, str], float]:
    """Accuracy on each problem, identified by its number and its prompt."""
    accuracies = {}
    for record in folder.read():
        problem = (record["index"], record["prompt_id"])
        accuracies[problem] = accuracy_of(record, right)
    return accuracies


def comparison_lines(first: EvaluationFolder, second: EvaluationFolder) -> list[str]:
    """Other possible causes of the difference between two evaluations, and finally the result, in one sentence each.

    Args:
        first (`EvaluationFolder`): The reference.
        second (`EvaluationFolder`): The evaluation compared with it.

    Raises:
        `ValueError`: If they are not of the same problems.
    """
    lines = []
    differences = settings_apart(first, second)
    if differences:
        lines.append(f"The evaluations differ in more than the model: {'; '.join(differences)}.")
    flexible = None
    if all(FLEXIBLE in side.summary() for side in (first, second)):
        flexible = compare(first, second, "flexible_right")
    ours, theirs = _names(first, second)
    lines.append(compare(first, second).sentence(ours, theirs, flexible))
    return lines


def _names(first: EvaluationFolder, second: EvaluationFolder) -> tuple[str, str]:
    """The models by the shortest distinguishing part of their paths, or the folders if the models are the same."""
    ours = first.settings().get("model")
    theirs = second.settings().get("model")
    if ours is None or theirs is None or ours == theirs:
        return str(first.path), str(second.path)
    short = (Path(ours).name, Path(theirs).name)
    return (ours, theirs) if short[0] == short[1] else short
