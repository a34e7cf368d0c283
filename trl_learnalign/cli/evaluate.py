"""`trl-learnalign evaluate`: accuracy of a model on benchmarks, with intervals, and paired comparison of models."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trl_learnalign.cli.console import exit_with
from trl_learnalign.cli.evaluate_options import PROG, RECIPE, parser
from trl_learnalign.records import layout

if TYPE_CHECKING:
    from datasets import Dataset

    from trl_learnalign.evaluation.benchmarks import Benchmark
    from trl_learnalign.evaluation.generators import Generator, Sampling
    from trl_learnalign.evaluation.grading import Grader


# ---- Table of accuracies --------------------------------------------------------------------------------------------

TITLE = "Mean pass@1 with 95 % intervals"


def print_summaries(rows: Sequence[tuple[str, dict[str, Any]]], lines: Sequence[str]) -> None:
    """Print a table and remarks below it.

    Args:
        rows (sequence): Name and summary of each evaluation.
        lines (sequence of `str`): Printed below.
    """
    console = Console()
    console.print(summary_table(rows))
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def summary_table(rows: Sequence[tuple[str, dict[str, Any]]]) -> Table:
    """A table of strict and flexible accuracy, with the number of completions without an extracted answer.

    Args:
        rows (sequence): Name and summary of each evaluation.
    """
    table = Table(box=box.SIMPLE_HEAD, title=TITLE)
    table.add_column("benchmark", overflow="fold")
    table.add_column("problems", justify="right", no_wrap=True)
    table.add_column("answer", no_wrap=True)
    table.add_column("accuracy", justify="right", no_wrap=True)
    table.add_column("no answer", justify="right", no_wrap=True)
    for name, summary in rows:
        problems = str(summary["problems"])
        flexible = summary.get("flexible")
        if flexible is None:
            cells = [name, problems, "as graded", *_cells(summary)]
            table.add_row(*map(Text, cells))
            continue
        cells = [name, problems, "strict", *_cells(summary)]
        table.add_row(*map(Text, cells))
        cells = ["", "", "flexible", *_cells(flexible)]
        table.add_row(*map(Text, cells))
    return table


def _cells(figures: Mapping[str, Any]) -> list[str]:
    from trl_learnalign.intervals import Estimate

    accuracy = Estimate(
        value=figures["accuracy"],
        low=figures["low"],
        high=figures["high"],
    )
    found_none = figures.get("no_answer", "")
    return [str(accuracy), str(found_none)]


# ---- Evaluate -------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str], prog: str = PROG) -> None:
    """Run the command.

    Args:
        arguments (sequence of `str`): The command line, without the program's name.
        prog (`str`, *optional*): The program's name in messages.
    """
    command_line = parser(prog)
    given = command_line.parse_args(arguments)
    if given.compare is None and given.model is None:
        command_line.error("give --model_name_or_path, or two folders with --compare")
    with exit_with(prog):
        if given.compare is not None:
            compare_evaluations(*given.compare)
            return
        _check(given)
        if given.harness:
            _evaluate_tasks(given)
        else:
            _evaluate(given)


def _check(given: argparse.Namespace) -> None:
    """Check what would otherwise fail after a long wait; sets the device."""
    from trl_learnalign.data.loading import is_path
    from trl_learnalign.evaluation.benchmarks import find_benchmark
    from trl_learnalign.preflight.environment import missing_from_hub

    folder_names(given.benchmarks)
    problem = missing_from_hub(given.model, "model")
    for name in () if given.harness else given.benchmarks:
        source = find_benchmark(name).name
        if not is_path(source):
            problem = problem or missing_from_hub(source, "dataset")
    given.backend = "vllm" if given.use_vllm else "transformers"
    given.device = "cpu"
    if not given.use_cpu:
        given.device, missing = _device()
        problem = problem or missing
    if given.batch_size < 1 or (given.limit is not None and given.limit < 1):
        problem = (
            problem
            or f"per_device_eval_batch_size={given.batch_size}, eval_samples={given.limit}: give numbers of at least 1"
        )
    if problem:
        raise ValueError(problem)


def _device() -> tuple[str, str | None]:
    """The device of this machine, and what is missing on it if anything."""
    import torch

    from trl_learnalign.preflight.environment import missing_gpu

    problem = missing_gpu(use_cpu=False)
    if problem == "no GPU is visible":
        problem += "; --use_cpu true runs without"
    if torch.cuda.is_available():
        return "cuda", problem
    return ("mps" if torch.backends.mps.is_available() else "cpu"), problem


@dataclass(frozen=True)
class _Job:
    """A benchmark that is ready to run."""

    slug: str
    grader: Grader
    problems: Dataset
    sampling: Sampling
    system_prompt: str


def _evaluate(given: argparse.Namespace) -> None:
    from trl_learnalign.evaluation.results import EvaluationFolder, evaluate

    output = given.output_dir or Path("outputs") / "evaluation" / _slug(given.model)
    generator = functools.cache(
        lambda: _load(given)
    )  # shared by all benchmarks, and not loaded if everything is recorded already
    rows, lines = [], []
    for job in _jobs(given):
        folder = EvaluationFolder(output / job.slug)
        settings = {
            "model": given.model,
            "backend": given.backend,
            "dtype": given.dtype,
            "grading": job.grader.name,
        }
        if given.chat_template_kwargs:
            settings["chat_template_kwargs"] = given.chat_template_kwargs
        summary = evaluate(
            folder,
            job.problems,
            job.grader,
            generator,
            job.sampling,
            given.batch_size,
            settings,
        )
        rows.append((job.slug, summary))
        lines.append(f"Records of {job.slug} ({_sampling_text(job, summary)}): {folder.path}")
        lines += _remarks(job.slug, summary, job.sampling)
    print_summaries(rows, lines)


def _evaluate_tasks(given: argparse.Namespace) -> None:
    """Evaluate tasks of lm-evaluation-harness."""
    from trl_learnalign.evaluation.benchmarks import evaluate_tasks

    output = given.output_dir or Path("outputs") / "evaluation" / _slug(given.model)
    options: dict[str, Any] = {"batch_size": given.batch_size, "limit": given.limit}
    model_args: dict[str, Any] = {"dtype": given.dtype}
    if given.backend == "vllm":
        model_args["tensor_parallel_size"] = given.tensor_parallel
    else:
        options["device"] = given.device
    folders = evaluate_tasks(
        given.harness,
        given.model,
        output,
        given.backend,
        model_args,
        _system_prompt(given, default="") or None,
        **options,
    )
    rows = []
    lines = []
    for name, folder in folders.items():
        rows.append((name, folder.summary()))
        lines.append(f"Records of {name}: {folder.path}")
    print_summaries(rows, lines)


def _system_prompt(given: argparse.Namespace, default: str) -> str:
    from trl_learnalign.data.loading import SYSTEM_PROMPT

    if given.system_prompt is None:
        return default
    return SYSTEM_PROMPT if given.system_prompt == RECIPE else given.system_prompt


def _jobs(given: argparse.Namespace) -> list[_Job]:
    """All benchmarks, loaded before the first one runs, so that a bad one fails immediately."""
    from trl_learnalign.evaluation.benchmarks import find_benchmark, load_problems, load_rows
    from trl_learnalign.evaluation.grading import BOXED, MARKED, Grader, load_reward

    trained_length = _trained_length(given.model)
    slugs = folder_names(given.benchmarks)
    reward = None if given.reward is None else load_reward(given.reward)
    jobs = []
    for name in given.benchmarks:
        benchmark = find_benchmark(name)
        system_prompt = _system_prompt(given, benchmark.system_prompt)
        benchmark = dataclasses.replace(
            benchmark, split=given.split or benchmark.split, system_prompt=system_prompt
        )
        if reward is not None:
            grader = Grader(given.reward, reward)
            problems = load_rows(benchmark, given.limit, given.question_column)
        else:
            # If the prompt asks for a box, only a box counts.
            grader = Grader(BOXED if "\\boxed" in system_prompt else MARKED)
            problems = load_problems(benchmark, given.limit, **_columns(given, name))
        sampling = _sampling(given, benchmark, trained_length)
        jobs.append(_Job(slugs[name], grader, problems, sampling, system_prompt))
    return jobs


def _sampling(given: argparse.Namespace, benchmark: Benchmark, trained_length: int) -> Sampling:
    """The requested sampling; defaults are the benchmark's, with at least the completion length of training."""
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
    """Longest completion in the training of the model, from the record in its folder; 0 without a record."""
    from trl_learnalign.records.run_record import read_contents

    for folder in (Path(model), Path(model).parent):  # a checkpoint is inside the run's folder
        record = layout.record_folder(folder) / layout.RUN
        if Path(model).is_dir() and record.is_file():
            return read_contents(record).trainer.max_completion_length
    return 0


def _sampling_text(job: _Job, summary: dict[str, Any]) -> str:
    """How a benchmark was prompted and sampled, in words."""
    sampling = job.sampling
    kind = "greedy"
    if sampling.temperature:
        kind = f"{sampling.samples} sample(s) at temperature {sampling.temperature:g}"
    lengths = f"at most {sampling.max_new_tokens:,} tokens, {summary['mean_tokens']:.0f} on average"
    prompt = "with a system prompt" if job.system_prompt else "no system prompt"
    return f"{kind}, {lengths}, {prompt}"


def _remarks(name: str, summary: dict[str, Any], sampling: Sampling) -> list[str]:
    """Remarks that qualify a figure."""
    remarks = []
    unfinished = summary["unfinished"]
    unscorable = summary["unscorable"]
    completions = summary["problems"] * summary["samples"]
    if unfinished:
        remarks.append(
            f"{name}: {unfinished:,} of {completions:,} completions were cut off at {sampling.max_new_tokens:,} "
            "tokens and graded without their end, usually as wrong; a larger --max_completion_length allows more, "
            "in another --output_dir."
        )
    if unscorable:
        remarks.append(
            f"{name}: {unscorable:,} of {completions:,} completions could not be graded and count as wrong."
        )
    return remarks


def _load(given: argparse.Namespace) -> Generator:
    from trl_learnalign.evaluation.generators import TransformersGenerator, VLLMGenerator

    if given.backend == "vllm":
        return VLLMGenerator(
            given.model, given.dtype, given.tensor_parallel, given.chat_template_kwargs
        )
    return TransformersGenerator(given.model, given.device, given.dtype, given.chat_template_kwargs)


def _columns(given: argparse.Namespace, name: str) -> dict[str, Any]:
    """The given column options, for benchmarks with unknown columns."""
    from trl_learnalign.evaluation.benchmarks import BENCHMARKS

    if name.lower() in BENCHMARKS:
        return {}
    return {
        key: getattr(given, key) for key in ("question_column", "answer_column", "max_unjudged")
    }


def _slug(name: str) -> str:
    return Path(name).stem if Path(name).exists() else name.replace("/", "--")


def folder_names(benchmarks: Sequence[str]) -> dict[str, str]:
    """The record folder of each benchmark: the stem of its file, with as much of its path as makes it unique.

    Args:
        benchmarks (sequence of `str`): Names, files and folders.

    Raises:
        `ValueError`: If a benchmark is given twice.
    """
    from trl_learnalign.evaluation.benchmarks import find_benchmark

    sources = {name: _source(find_benchmark(name).name) for name in benchmarks}
    if len(sources) < len(benchmarks) or len(set(sources.values())) < len(sources):
        raise ValueError(
            f"--benchmarks {' '.join(benchmarks)}: a benchmark is named twice; remove one of the two."
        )
    folders = {name: _slug(name) for name in benchmarks}
    deepest = max(len(Path(source).parts) for source in sources.values())
    for depth in range(1, deepest + 1):
        for name in _sharing(folders):
            parents = Path(sources[name]).parent.parts[-depth:]
            folders[name] = "--".join([*parents, _slug(name)])
    for name in _sharing(folders):  # e.g. test.json and test.jsonl
        folders[name] += Path(name).suffix
    return folders


def _sharing(folders: dict[str, str]) -> list[str]:
    """Local files and folders whose record folder is also that of another benchmark."""
    counts = Counter(folder.lower() for folder in folders.values())
    return [
        name
        for name, folder in folders.items()
        if counts[folder.lower()] > 1 and Path(name).exists()
    ]


def _source(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).exists() else name


def compare_evaluations(first: Path, second: Path) -> None:
    """Compare two evaluations of the same problems and print the result.

    Args:
        first (`Path`): Folder of records.
        second (`Path`): Another.
    """
    from trl_learnalign.evaluation.results import EvaluationFolder, comparison_lines

    sides = [EvaluationFolder(first), EvaluationFolder(second)]
    lines = comparison_lines(*sides)
    rows = []
    for side in sides:
        rows.append((str(side.path), side.summary()))
    print_summaries(rows, lines)
