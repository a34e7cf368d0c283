"""Options of `trl-learnalign evaluate`, with the names that TRL and the other commands use."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

PROG = "trl-learnalign evaluate"
DESCRIPTION = "Accuracy of a model on benchmarks, with intervals; two models compared in pairs."
EXAMPLES = """examples:
  trl-learnalign evaluate --model_name_or_path outputs/gsm8k_staged --benchmarks gsm8k math500 amc23
  trl-learnalign evaluate --model_name_or_path FOLDER --benchmarks test.jsonl --use_cpu true --eval_samples 40
  trl-learnalign evaluate --model_name_or_path FOLDER --benchmarks test.jsonl --reward_funcs my_rewards:exact
  trl-learnalign evaluate --model_name_or_path FOLDER --harness hendrycks_math500 my_task.yaml
  trl-learnalign compare outputs/evaluation/base/gsm8k outputs/evaluation/trained/gsm8k"""

RECIPE = "recipe"
"""Value of the option that selects the recipes' system prompt."""


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The argument parser.

    Args:
        prog (`str`, *optional*): The program's name in `--help`.
    """
    arguments = argparse.ArgumentParser(
        prog,
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    arguments.add_argument("--model_name_or_path", dest="model", help="hub id or folder")
    _add_problems(arguments)
    _add_sampling(arguments)
    _add_backend(arguments)
    arguments.add_argument(
        "--output_dir",
        type=Path,
        help="records; default: outputs/evaluation/<model>. Call again to continue",
    )
    arguments.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar="FOLDER",
        help="the same as trl-learnalign compare FOLDER FOLDER",
    )
    return arguments


def _add_problems(arguments: argparse.ArgumentParser) -> None:
    arguments.add_argument(
        "--benchmarks",
        nargs="+",
        default=["gsm8k"],
        metavar="NAME",
        help="gsm8k, math500, amc23, aime24; or a JSONL or Parquet file, a folder or a hub dataset with questions and "
        "answers (default: gsm8k)",
    )
    arguments.add_argument(
        "--harness",
        nargs="+",
        metavar="TASK",
        help="tasks of lm-evaluation-harness instead, by name or as YAML files; prompts and grading are those of "
        "the harness",
    )
    arguments.add_argument(
        "--reward_funcs",
        dest="reward",
        metavar="MODULE:FUNCTION",
        help="grade by a reward function in TRL's form, with the file's columns, instead of extracting answers",
    )
    arguments.add_argument(
        "--dataset_test_split",
        dest="split",
        help="split of the hub datasets; default: the benchmark's own, or test",
    )
    arguments.add_argument(
        "--question_column", help="column of the questions; default: found by its name"
    )
    arguments.add_argument(
        "--answer_column", help="column of the reference answers; default: found by its name"
    )
    arguments.add_argument(
        "--max_unjudged",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="refuse problems if a larger share of their answers cannot be graded (default: 0.5)",
    )
    arguments.add_argument(
        "--eval_samples",
        dest="limit",
        type=int,
        help="number of problems of each benchmark, from its beginning (default: all)",
    )


def _add_sampling(arguments: argparse.ArgumentParser) -> None:
    arguments.add_argument(
        "--num_generations",
        dest="samples",
        type=int,
        help="samples per problem, k; default: the benchmark's own, or 1",
    )
    arguments.add_argument(
        "--temperature", type=float, help="0 is greedy; default: the benchmark's own, or 0"
    )
    arguments.add_argument("--top_p", type=float, default=1.0, help="nucleus (default: 1)")
    arguments.add_argument(
        "--max_completion_length",
        dest="max_new_tokens",
        type=int,
        help="maximum length of a completion; default: as in the recipes, 1024 for gsm8k and 2048 for all others, "
        "or the length that the model was trained with if its folder has a record of a larger one",
    )
    arguments.add_argument(
        "--system_prompt",
        help="first message of each problem; 'recipe' is that of the recipes. Default: 'recipe' for gsm8k, math500, "
        "amc23 and aime24, none for files and hub datasets",
    )
    arguments.add_argument(
        "--chat_template_kwargs",
        type=_json_object,
        metavar="JSON",
        help="further arguments of the chat template, as in training: '{\"enable_thinking\": false}'",
    )


def _add_backend(arguments: argparse.ArgumentParser) -> None:
    arguments.add_argument(
        "--per_device_eval_batch_size",
        dest="batch_size",
        type=int,
        default=32,
        help="problems generated at once (default: 32)",
    )
    _add_switch(arguments, "--use_vllm", "generate with vLLM instead of transformers")
    _add_switch(arguments, "--use_cpu", "run without a GPU")
    arguments.add_argument(
        "--dtype", default="auto", help="weights: auto, bfloat16, float32, … (default: auto)"
    )
    arguments.add_argument(
        "--vllm_tensor_parallel_size",
        dest="tensor_parallel",
        type=int,
        default=1,
        help="GPUs of one copy of the model with vLLM",
    )
    arguments.add_argument("--seed", type=int, default=0, help="seed of sampling (default: 0)")


def _add_switch(arguments: argparse.ArgumentParser, name: str, text: str) -> None:
    """Add a flag that also accepts true or false as its value, like those of TRL's settings."""
    arguments.add_argument(
        name, nargs="?", type=_truth, const=True, default=False, metavar="BOOL", help=text
    )


def _truth(text: str) -> bool:
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r}: give true or false")
    return words[text.lower()]


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f"""{text!r} is not a JSON object: write '{{"name": value}}'"""
        )
    return value
