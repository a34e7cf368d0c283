"""`trl-learnalign evaluate`: accuracy of a model on benchmarks, with intervals; two models compared in pairs."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trl_learnalign.cli.messages import leave_with
from trl_learnalign.records import layout

if TYPE_CHECKING:
    from trl_learnalign.evaluation.generators import Generator, Sampling

PROG = "trl-learnalign evaluate"
EXAMPLES = """examples:
  trl-learnalign evaluate --model outputs/gsm8k_staged --benchmarks gsm8k math500 amc23
  trl-learnalign evaluate --model FOLDER --benchmarks test.jsonl --device cpu --limit 40
  trl-learnalign evaluate --compare outputs/evaluation/base/gsm8k outputs/evaluation/trained/gsm8k"""


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog, description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", help="hub id or folder")
    made.add_argument(
        "--benchmarks",
        nargs="+",
        default=["gsm8k"],
        metavar="NAME",
        help="gsm8k, math500, amc23, aime24, cruxeval (output prediction only); or a JSONL or Parquet file, a folder "
        "or a hub dataset with questions and answers (default: gsm8k)",
    )
    made.add_argument("--split", help="split of the hub datasets; default: the benchmark's own, or test")
    made.add_argument("--question_column", help="column of the questions; default: found by its name")
    made.add_argument("--answer_column", help="column of the reference answers; default: found by its name")
    made.add_argument(
        "--max_unjudged",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="refuse problems if a larger share of their answers cannot be judged (default: 0.5)",
    )
    made.add_argument("--limit", type=int, help="only the first so many problems of each")
    made.add_argument("--samples", type=int, help="samples per problem, k; default: the benchmark's own, or 1")
    made.add_argument("--temperature", type=float, help="0 is greedy; default: the benchmark's own, or 0")
    made.add_argument("--top_p", type=float, default=1.0, help="nucleus (default: 1)")
    made.add_argument(
        "--max_new_tokens",
        type=int,
        help="longest completion; default: as the recipes train, 1024 for gsm8k and 2048 for all others, or what the "
        "model was trained with if its folder has a record that says more",
    )
    made.add_argument("--system_prompt", help="first message of mathematical problems; default: that of the recipes")
    made.add_argument(
        "--chat_template_kwargs",
        type=_json_object,
        metavar="JSON",
        help="further arguments of the chat template, as in training: '{\"enable_thinking\": false}'",
    )
    made.add_argument("--batch_size", type=int, default=32, help="problems generated at once (default: 32)")
    made.add_argument("--backend", choices=("transformers", "vllm"), default="transformers")
    made.add_argument("--device", help="device of transformers; default: a GPU")
    made.add_argument("--dtype", default="auto", help="weights: auto, bfloat16, float32, … (default: auto)")
    made.add_argument("--tensor_parallel", type=int, default=1, help="GPUs of one copy of the model with vllm")
    made.add_argument("--seed", type=int, default=0, help="seed of sampling (default: 0)")
    made.add_argument(
        "--output_dir", type=Path, help="records; default: outputs/evaluation/<model>. Call again to continue"
    )
    made.add_argument(
        "--compare", nargs=2, type=Path, metavar="FOLDER", help="compare the records of two evaluations; asks nothing"
    )
    return made


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object: write '{{\"name\": value}}'")
    return value


def main(arguments: Sequence[str], prog: str = PROG) -> None:
    """Run the command."""
    reader = parser(prog)
    given = reader.parse_args(arguments)
    if given.compare is None and given.model is None:
        reader.error("give --model, or two folders with --compare")
    with leave_with(prog):
        if given.compare is not None:
            _compare(*given.compare)
        else:
            _check(given)
            _evaluate(given)


def _check(given: argparse.Namespace) -> None:
    """What would fail after a long wait."""
    import torch

    from trl_learnalign.data.questions import is_path
    from trl_learnalign.evaluation.benchmarks import find_benchmark
    from trl_learnalign.planning.preflight import missing_from_hub, missing_gpu

    problem = missing_from_hub(given.model, "model")
    folder_names(given.benchmarks)
    for name in given.benchmarks:
        source = find_benchmark(name).name
        if not is_path(source):
            problem = problem or missing_from_hub(source, "dataset")
    if given.device is None:
        problem = problem or missing_gpu(use_cpu=False)
        given.device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        problem = f"{problem}; --device cpu runs without" if problem == "no GPU is visible" else problem
    if given.batch_size < 1 or (given.limit is not None and given.limit < 1):
        problem = problem or f"batch_size={given.batch_size}, limit={given.limit}: give numbers of at least 1"
    if problem:
        raise ValueError(problem)


def _evaluate(given: argparse.Namespace) -> None:
    from dataclasses import replace

    from trl_learnalign.data.questions import SYSTEM_PROMPT
    from trl_learnalign.evaluation.benchmarks import find_benchmark, load_problems, reward_of
    from trl_learnalign.evaluation.generators import Sampling
    from trl_learnalign.evaluation.records import EvaluationFolder, evaluate

    output = given.output_dir or Path("outputs") / "evaluation" / _slug(given.model)
    trained = _trained_length(given.model)
    system_prompt = SYSTEM_PROMPT if given.system_prompt is None else given.system_prompt
    loaded: list[Generator] = []

    def generator() -> Generator:
        if not loaded:
            loaded.append(_load(given))
        return loaded[0]

    prepared = []
    for name in given.benchmarks:
        benchmark = find_benchmark(name)
        benchmark = replace(benchmark, split=given.split or benchmark.split)
        problems, kind = load_problems(benchmark, given.limit, system_prompt, **_columns(given, name))
        sampling = Sampling(
            benchmark.samples if given.samples is None else given.samples,
            benchmark.temperature if given.temperature is None else given.temperature,
            given.top_p,
            max(benchmark.max_new_tokens, trained) if given.max_new_tokens is None else given.max_new_tokens,
            given.seed,
        )
        prepared.append((name, kind, problems, sampling))
    rows, lines = [], []
    folders = folder_names(given.benchmarks)
    for name, kind, problems, sampling in prepared:
        slug = folders[name]
        folder = EvaluationFolder(output / slug)
        settings = {"model": given.model, "backend": given.backend, "dtype": given.dtype, "grading": kind}
        if given.chat_template_kwargs:
            settings["chat_template_kwargs"] = given.chat_template_kwargs
        summary = evaluate(folder, problems, reward_of(kind), generator, sampling, given.batch_size, settings)
        rows.append((slug, summary, folder.path))
        lines += [
            f"Records of {slug} ({_decoding(sampling)}): {folder.path}",
            *_cut(slug, summary, sampling),
        ]
    console = Console()
    console.print(_table(rows))
    for line in lines:
        console.print(Text(line), soft_wrap=True)


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
    made = summary["problems"] * summary["samples"]
    if not summary["unfinished"]:
        return []
    return [
        f"{name}: {summary['unfinished']:,} of {made:,} completions were cut at {sampling.max_new_tokens:,} tokens "
        "and graded as they stand, most often as wrong; --max_new_tokens allows more, in another --output_dir."
    ]


def _load(given: argparse.Namespace) -> Generator:
    from trl_learnalign.evaluation.generators import TransformersGenerator, VLLMGenerator

    if given.backend == "vllm":
        return VLLMGenerator(given.model, given.dtype, given.tensor_parallel, given.chat_template_kwargs)
    return TransformersGenerator(given.model, given.device, given.dtype, given.chat_template_kwargs)


def _columns(given: argparse.Namespace, name: str) -> dict[str, Any]:
    """What was said about columns, for benchmarks whose columns are not known."""
    from trl_learnalign.evaluation.benchmarks import BENCHMARKS

    if name.lower() in BENCHMARKS:
        return {}
    return {key: getattr(given, key) for key in ("question_column", "answer_column", "max_unjudged")}


def _slug(name: str) -> str:
    return Path(name).stem if Path(name).exists() else name.replace("/", "--")


def folder_names(benchmarks: Sequence[str]) -> dict[str, str]:
    """The folder of each benchmark's records: the stem of its file, with as much of its path as tells it apart.

    Raises:
        `ValueError`: If a benchmark is named twice.
    """
    from trl_learnalign.evaluation.benchmarks import find_benchmark

    sources = {name: _source(find_benchmark(name).name) for name in benchmarks}
    if len(sources) < len(benchmarks) or len(set(sources.values())) < len(sources):
        raise ValueError(f"--benchmarks {' '.join(benchmarks)}: one of them is named twice; leave it out once.")
    made = {name: _slug(name) for name in benchmarks}
    for depth in range(1, max(len(Path(source).parts) for source in sources.values()) + 1):
        for name in _sharing(made):
            made[name] = "--".join([*Path(sources[name]).parent.parts[-depth:], _slug(name)])
    for name in _sharing(made):  # test.json beside test.jsonl
        made[name] += Path(name).suffix
    return made


def _sharing(folders: dict[str, str]) -> list[str]:
    """Files and folders on this machine whose records would lie where others do."""
    counts = Counter(folder.lower() for folder in folders.values())
    return [name for name, folder in folders.items() if counts[folder.lower()] > 1 and Path(name).exists()]


def _source(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).exists() else name


def _table(rows: Sequence[tuple[str, dict[str, Any], Path]]) -> Table:
    from trl_learnalign.statistics import Estimate

    table = Table(box=box.SIMPLE_HEAD, title="Mean pass@1 with 95 % intervals")
    table.add_column("benchmark", overflow="fold")
    for heading in ("problems", "k", "accuracy", "ungraded", "cut off", "tokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, summary, _ in rows:
        estimate = Estimate(summary["accuracy"], summary["low"], summary["high"])
        counts = (summary["problems"], summary["samples"], estimate, summary["unscorable"], summary["unfinished"])
        table.add_row(*map(Text, [name, *map(str, counts), f"{summary['mean_tokens']:.0f}"]))
    return table


def _compare(first: Path, second: Path) -> None:
    from trl_learnalign.evaluation.records import EvaluationFolder, compare, settings_apart

    sides = [EvaluationFolder(first), EvaluationFolder(second)]
    found = compare(*sides)
    console = Console()
    console.print(_table([(str(side.path), side.summary(), side.path) for side in sides]))
    apart = settings_apart(*sides)
    lines = [
        f"Difference (second - first) on {found.problems} problems: {found.difference}, paired bootstrap",
        f"Only the first is right on {found.only_first}, only the second on {found.only_second}: "
        f"McNemar's exact test p = {found.p_value:.3g}",
        *([f"Besides the model, the evaluations differ: {'; '.join(apart)}."] if apart else []),
    ]
    for line in lines:
        console.print(Text(line), soft_wrap=True)
