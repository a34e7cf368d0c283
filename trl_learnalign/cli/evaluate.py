"""`trl-learnalign evaluate`: accuracy of a model on benchmarks, with intervals; two models compared in pairs."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trl_learnalign.cli.evaluate_options import PROG, parser
from trl_learnalign.cli.messages import leave_with
from trl_learnalign.records import layout

if TYPE_CHECKING:
    from datasets import Dataset

    from trl_learnalign.evaluation.benchmarks import Benchmark
    from trl_learnalign.evaluation.generators import Generator, Sampling


def main(arguments: Sequence[str], prog: str = PROG) -> None:
    """Run the command.

    Args:
        arguments (sequence of `str`): The command line, without the program's name.
        prog (`str`, *optional*): The program's name in messages.
    """
    command_line = parser(prog)
    given = command_line.parse_args(arguments)
    if given.compare is None and given.model is None:
        command_line.error("give --model, or two folders with --compare")
    with leave_with(prog):
        if given.compare is not None:
            _compare(*given.compare)
        else:
            _check(given)
            _evaluate(given)


def _check(given: argparse.Namespace) -> None:
    """What would fail after a long wait; settles the device."""
    from trl_learnalign.data.questions import is_path
    from trl_learnalign.evaluation.benchmarks import find_benchmark
    from trl_learnalign.planning.preflight import missing_from_hub

    folder_names(given.benchmarks)
    problem = missing_from_hub(given.model, "model")
    for name in given.benchmarks:
        source = find_benchmark(name).name
        if not is_path(source):
            problem = problem or missing_from_hub(source, "dataset")
    if given.device is None:
        given.device, missing = _device()
        problem = problem or missing
    if given.batch_size < 1 or (given.limit is not None and given.limit < 1):
        problem = (
            problem
            or f"batch_size={given.batch_size}, limit={given.limit}: give numbers of at least 1"
        )
    if problem:
        raise ValueError(problem)


def _device() -> tuple[str, str | None]:
    """The device of this machine, and what is missing on it if anything."""
    import torch

    from trl_learnalign.planning.preflight import missing_gpu

    problem = missing_gpu(use_cpu=False)
    if problem == "no GPU is visible":
        problem += "; --device cpu runs without"
    if torch.cuda.is_available():
        return "cuda", problem
    return ("mps" if torch.backends.mps.is_available() else "cpu"), problem


@dataclass(frozen=True)
class _Job:
    """A benchmark that is ready to be asked.

    Args:
        slug (`str`): Name of its folder of records.
        kind (`str`): How it is graded.
        problems (`datasets.Dataset`): Prompts and reference answers.
        sampling (`Sampling`): How completions are drawn.
    """

    slug: str
    kind: str
    problems: Dataset
    sampling: Sampling


def _evaluate(given: argparse.Namespace) -> None:
    from trl_learnalign.evaluation.benchmarks import reward_of
    from trl_learnalign.evaluation.records import EvaluationFolder, evaluate

    output = given.output_dir or Path("outputs") / "evaluation" / _slug(given.model)
    generator = functools.cache(
        lambda: _load(given)
    )  # one for all, and none if everything is recorded already
    rows, lines = [], []
    for job in _jobs(given):
        folder = EvaluationFolder(output / job.slug)
        settings = {
            "model": given.model,
            "backend": given.backend,
            "dtype": given.dtype,
            "grading": job.kind,
        }
        if given.chat_template_kwargs:
            settings["chat_template_kwargs"] = given.chat_template_kwargs
        summary = evaluate(
            folder,
            job.problems,
            reward_of(job.kind),
            generator,
            job.sampling,
            given.batch_size,
            settings,
        )
        rows.append((job.slug, summary))
        lines.append(f"Records of {job.slug} ({_decoding(job.sampling)}): {folder.path}")
        lines += _cut(job.slug, summary, job.sampling)
    _print(_table(rows), lines)


def _jobs(given: argparse.Namespace) -> list[_Job]:
    """All benchmarks, loaded before the first one is asked: a bad one should not wait for the others."""
    from trl_learnalign.data.questions import SYSTEM_PROMPT
    from trl_learnalign.evaluation.benchmarks import find_benchmark, load_problems

    system_prompt = SYSTEM_PROMPT if given.system_prompt is None else given.system_prompt
    trained_length = _trained_length(given.model)
    slugs = folder_names(given.benchmarks)
    jobs = []
    for name in given.benchmarks:
        benchmark = find_benchmark(name)
        benchmark = dataclasses.replace(benchmark, split=given.split or benchmark.split)
        problems, kind = load_problems(
            benchmark, given.limit, system_prompt, **_columns(given, name)
        )
        jobs.append(_Job(slugs[name], kind, problems, _sampling(given, benchmark, trained_length)))
    return jobs


def _sampling(given: argparse.Namespace, benchmark: Benchmark, trained_length: int) -> Sampling:
    """What was asked for; for the rest the benchmark's own, and never shorter than the model was trained."""
    from trl_learnalign.evaluation.generators import Sampling

    longest = max(benchmark.max_new_tokens, trained_length)
    return Sampling(
        samples=benchmark.samples if given.samples is None else given.samples,
        temperature=benchmark.temperature if given.temperature is None else given.temperature,
        top_p=given.top_p,
        max_new_tokens=longest if given.max_new_tokens is None else given.max_new_tokens,
        seed=given.seed,
    )


def _trained_length(model: str) -> int:
    """Longest completion of the training that the model comes from, by the record in its folder; 0 without one."""
    from trl_learnalign.records.contents import read_contents

    for folder in (Path(model), Path(model).parent):  # a checkpoint lies in the run's folder
        record = layout.record_folder(folder) / layout.RUN
        if Path(model).is_dir() and record.is_file():
            return read_contents(record).trainer.max_completion_length
    return 0


def _decoding(sampling: Sampling) -> str:
    kind = f"temperature {sampling.temperature:g}" if sampling.temperature else "greedy"
    return f"{kind}, at most {sampling.max_new_tokens:,} tokens"


def _cut(name: str, summary: dict[str, Any], sampling: Sampling) -> list[str]:
    """A remark on completions that did not end by themselves."""
    unfinished = summary["unfinished"]
    completions = summary["problems"] * summary["samples"]
    if not unfinished:
        return []
    return [
        f"{name}: {unfinished:,} of {completions:,} completions were cut at {sampling.max_new_tokens:,} tokens "
        "and graded as they stand, most often as wrong; --max_new_tokens allows more, in another --output_dir."
    ]


def _load(given: argparse.Namespace) -> Generator:
    from trl_learnalign.evaluation.generators import TransformersGenerator, VLLMGenerator

    if given.backend == "vllm":
        return VLLMGenerator(
            given.model, given.dtype, given.tensor_parallel, given.chat_template_kwargs
        )
    return TransformersGenerator(given.model, given.device, given.dtype, given.chat_template_kwargs)


def _columns(given: argparse.Namespace, name: str) -> dict[str, Any]:
    """What was said about columns, for benchmarks whose columns are not known."""
    from trl_learnalign.evaluation.benchmarks import BENCHMARKS

    if name.lower() in BENCHMARKS:
        return {}
    return {
        key: getattr(given, key) for key in ("question_column", "answer_column", "max_unjudged")
    }


def _slug(name: str) -> str:
    return Path(name).stem if Path(name).exists() else name.replace("/", "--")


def folder_names(benchmarks: Sequence[str]) -> dict[str, str]:
    """The folder of each benchmark's records: the stem of its file, with as much of its path as tells it apart.

    Args:
        benchmarks (sequence of `str`): Names, files and folders.

    Raises:
        `ValueError`: If a benchmark is named twice.
    """
    from trl_learnalign.evaluation.benchmarks import find_benchmark

    sources = {name: _source(find_benchmark(name).name) for name in benchmarks}
    if len(sources) < len(benchmarks) or len(set(sources.values())) < len(sources):
        raise ValueError(
            f"--benchmarks {' '.join(benchmarks)}: one of them is named twice; leave it out once."
        )
    folders = {name: _slug(name) for name in benchmarks}
    deepest = max(len(Path(source).parts) for source in sources.values())
    for depth in range(1, deepest + 1):
        for name in _sharing(folders):
            parents = Path(sources[name]).parent.parts[-depth:]
            folders[name] = "--".join([*parents, _slug(name)])
    for name in _sharing(folders):  # test.json beside test.jsonl
        folders[name] += Path(name).suffix
    return folders


def _sharing(folders: dict[str, str]) -> list[str]:
    """Files and folders on this machine whose records would lie where others do."""
    counts = Counter(folder.lower() for folder in folders.values())
    return [
        name
        for name, folder in folders.items()
        if counts[folder.lower()] > 1 and Path(name).exists()
    ]


def _source(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).exists() else name


def _table(rows: Sequence[tuple[str, dict[str, Any]]]) -> Table:
    """One row for each name and its summary."""
    from trl_learnalign.statistics import Estimate

    table = Table(box=box.SIMPLE_HEAD, title="Mean pass@1 with 95 % intervals")
    table.add_column("benchmark", overflow="fold")
    for heading in ("problems", "k", "accuracy", "ungraded", "cut off", "tokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, summary in rows:
        accuracy = Estimate(summary["accuracy"], summary["low"], summary["high"])
        cells = [
            name,
            str(summary["problems"]),
            str(summary["samples"]),
            str(accuracy),
            str(summary["unscorable"]),
            str(summary["unfinished"]),
            f"{summary['mean_tokens']:.0f}",
        ]
        table.add_row(*map(Text, cells))
    return table


def _print(table: Table, lines: Sequence[str]) -> None:
    console = Console()
    console.print(table)
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def _compare(first: Path, second: Path) -> None:
    from trl_learnalign.evaluation.records import EvaluationFolder, compare, settings_apart

    sides = [EvaluationFolder(first), EvaluationFolder(second)]
    comparison = compare(*sides)
    lines = [
        f"Difference (second - first) on {comparison.problems} problems: {comparison.difference}, paired bootstrap",
        f"Only the first is right on {comparison.only_first}, only the second on {comparison.only_second}: "
        f"McNemar's exact test p = {comparison.p_value:.3g}",
    ]
    differences = settings_apart(*sides)
    if differences:
        lines.append(f"Besides the model, the evaluations differ: {'; '.join(differences)}.")
    _print(_table([(str(side.path), side.summary()) for side in sides]), lines)
