"""What the number of prompts in a generation call (`scoring_batch_prompts`) does for the seconds of scoring.

One trainer, one policy, the same prompts: a round scores them once with each call size, rollouts and gradient capture,
and every other round in reverse order. Quotients are medians over the rounds of the quotient within a round, against
the smallest size.

- `toy`: the quickstart's trained model of 0.3 M parameters on its own tasks;
- a folder given with `--checkpoint`: any causal LM, on short questions, whose rollouts are right by a coin.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOTrainer

from trl_learnalign import LearnAlignConfig
from trl_learnalign.measuring.base import Context
from trl_learnalign.measuring.rollouts import GradientMeasure, RolloutMeasure
from trl_learnalign.toy.model import MAX_COMPLETION_LENGTH
from trl_learnalign.toy.tasks import accuracy_reward, build_pool

BASE_MODEL = Path(__file__).parent.parent / "docs" / "results" / "base_model"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, write."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    clock_name, clock = common.clock_for(options.threads)
    sizes = [size for size in options.sizes if size <= options.prompts]
    with trainer_of(options) as trainer:
        rolled = {f"rollouts {size}": scoring(trainer, size, options, False) for size in sizes}
        scored = {}
        if not options.generation_alone:
            scored = {f"all {size}": scoring(trainer, size, options, True) for size in sizes}
        timing = common.interleaved({**rolled, **scored}, options.repeats, clock)
    smallest = sizes[0]
    rows = []
    for size in sizes:
        row = {
            "prompts": size,
            "rollouts": size * options.rollouts,
            "generation": timing.ratio(f"rollouts {size}", f"rollouts {smallest}"),
            "generation s": timing.median(f"rollouts {size}"),
        }
        if scored:
            row["scoring"] = timing.ratio(f"all {size}", f"all {smallest}")
            row["scoring s"] = timing.median(f"all {size}")
        rows.append(row)
    common.table(
        f"Scoring {options.prompts} prompts, {options.rollouts} rollouts each",
        list(rows[0]),
        [list(row.values()) for row in rows],
    )
    figures = {"clock": clock_name, "rows": rows, "seconds": timing.seconds}
    common.write_json(options.json, figures, options)
    return figures


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = common.parser(__doc__, model=None)
    parser.add_argument("--checkpoint", type=Path, help="a causal LM; default: the quickstart's")
    parser.add_argument("--prompts", type=int, default=128, help="prompts that are scored")
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64, 128], help="call sizes"
    )
    parser.add_argument("--rollouts", type=int, default=8, help="rollouts of a prompt, G")
    parser.add_argument("--completion-tokens", type=int, default=32, help="with --checkpoint")
    parser.add_argument("--generation-alone", action="store_true", help="capture no gradients")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    return parser.parse_args(arguments)


@contextmanager
def trainer_of(options: argparse.Namespace) -> Iterator[GRPOTrainer]:
    """The trainer that scores."""
    folder = options.checkpoint or BASE_MODEL
    length = options.completion_tokens
    dataset, reward = questions(options.prompts), coin
    if options.checkpoint is None:
        length = MAX_COMPLETION_LENGTH
        dataset = build_pool("mixed", options.prompts, options.seed)
        reward = accuracy_reward
    with common.make_trainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        options.rollouts,
        AutoTokenizer.from_pretrained(folder),
        dataset,
        reward,
        max_completion_length=length,
        temperature=1.0,
    ) as trainer:
        yield trainer


def questions(count: int) -> Dataset:
    """Short questions."""
    prompts = []
    for number in range(count):
        text = common.SUMS[number % len(common.SUMS)].format(a=number + 2, b=2 * number + 1)
        prompts.append([{"role": "user", "content": text}])
    return Dataset.from_dict({"prompt": prompts})


def coin(completions: list[Any], **_: Any) -> list[float]:
    """Right or wrong by a coin that the text throws."""
    return [float(sum(map(ord, turns[0]["content"])) % 2) for turns in completions]


def scoring(
    trainer: GRPOTrainer, size: int, options: argparse.Namespace, gradients: bool
) -> Callable[[], Any]:
    """What scores all prompts, in calls of some size.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        size (`int`): Prompts of a call.
        options (`argparse.Namespace`): Command line.
        gradients (`bool`): Capture gradients too.
    """
    config = LearnAlignConfig.adaptive(check_gradients=False, verbose=False)
    context = Context.of(trainer, config, scoring_batch_prompts=size)
    measure = GradientMeasure(context, True) if gradients else RolloutMeasure(context)
    prompts = np.arange(options.prompts)
    calls = math.ceil(options.prompts / size)

    def score() -> None:
        with measure.session():
            measure.measure(0, prompts, calls, True)

    return score


if __name__ == "__main__":
    main()
