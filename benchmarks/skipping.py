"""What leaving out rows without a gradient saves in time: the same run with and without it, in turn.

Each cell is one trainer on one or two processes. A round is two short trainings with the same random numbers, one of
them with skipping; every other round begins with the other one. The learning rate is 0, so that all rounds roll out
with the same policy, and everything else of a step is done: generation, rewards, loss, AdamW. What is measured is CPU
time of the optimizer steps; quotients are medians over the rounds of the quotient within a round.

- `microcosm`: the quickstart's trained model of 0.3 M parameters on its own tasks; how many prompts have a gradient is
  what the policy makes of the mixture. 16 prompts a step, 8 rollouts each, in one micro-batch.
- `smollm`: random weights of SmolLM2-135M's shape; one prompt in four has a gradient, by decree. 4 prompts a step,
  8 rollouts each, 8 rows a micro-batch.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import common
import torch
from accelerate.utils import set_seed
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOTrainer

from trl_learnalign.bridge.skipping import TrainedCounts, ZeroAdvantageFilter, install_skipping
from trl_learnalign.distributed import Ranks
from trl_learnalign.toy.tasks import accuracy_reward, build_pool

BASE_MODEL = Path(__file__).parent.parent / "docs" / "results" / "base_model"
STOCK, SKIPPING = "stock", "skipping"
USEFUL_EVERY = 4
CELLS = ("microcosm/sparse", "microcosm/balanced", "microcosm/longtail", "smollm/quarter")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, write."""
    options = parse(arguments)
    if options.cell is not None:
        torch.set_num_threads(options.threads)
        return measure(options)
    rows = [
        launch(options, name, processes)
        for name in options.cells
        for processes in options.processes
    ]
    figures = {"rows": rows, "clock": "cpu"}
    report(rows)
    common.write_json(options.json, figures, options)
    return figures


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = common.parser(__doc__, model=None)
    parser.add_argument(
        "--cells",
        nargs="+",
        choices=[*CELLS, "tiny/quarter"],
        default=CELLS,
        help="what to measure",
    )
    parser.add_argument(
        "--processes", nargs="+", type=int, default=(1, 2), help="numbers of processes"
    )
    parser.add_argument("--rounds", type=int, default=7, help="rounds, besides one that warms up")
    parser.add_argument(
        "--steps", type=int, help="optimizer steps of a training; default: 8, of smollm 2"
    )
    parser.add_argument("--cell", help=argparse.SUPPRESS)  # what a launched process measures
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


# ---- One cell, on every process -------------------------------------------------------------------------------------


class Clock(TrainerCallback):
    """CPU seconds of this process's optimizer steps, and those of their generations.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        seed (`int`): Seed of the next training's random numbers.
    """

    def __init__(self, trainer: GRPOTrainer, seed: int):
        self.seed = seed
        self.steps = self.generation = self._began = 0.0
        self._generate = trainer._generate_and_score_completions
        trainer._generate_and_score_completions = self._timed
        trainer.add_callback(self)

    def _timed(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        began = time.process_time()
        batch = self._generate(rows)
        self.generation += time.process_time() - began
        return batch

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.steps = self.generation = 0.0
        set_seed(self.seed, device_specific=True)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps += time.process_time() - self._began


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One cell; the main process writes its figures."""
    model, kind = options.cell.split("/")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    steps = options.steps or (2 if model == "smollm" else 8)
    with trainer_of(model, kind, processes, steps, options.seed) as trainer:
        clock, ranks = Clock(trainer, options.seed), Ranks(trainer.accelerator)
        seconds: dict[str, list[dict[str, list[float]]]] = {STOCK: [], SKIPPING: []}
        counts = TrainedCounts()
        for number in range(options.rounds + 1):
            clock.seed = options.seed + 1000 * number
            for variant in (STOCK, SKIPPING) if number % 2 else (SKIPPING, STOCK):
                counted = train(trainer, variant)
                spent = {
                    "step": ranks.gather([clock.steps / steps]),
                    "training": ranks.gather([(clock.steps - clock.generation) / steps]),
                }
                if number > 0:  # the first round warms up
                    seconds[variant].append(spent)
                    counts += counted
            if ranks.is_main:
                common.log(
                    f"{options.cell}, {processes} process(es): round {number} of {options.rounds}"
                )
        figures = {
            "cell": options.cell,
            "processes": ranks.count,
            "steps": steps,
            **asdict(counts),
            "seconds": seconds,
        }
        if ranks.is_main:
            options.out.write_text(json.dumps(figures))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return figures


def train(trainer: GRPOTrainer, variant: str) -> TrainedCounts:
    """A short training; what it went through, if it skipped."""
    skipper = install_skipping(trainer) if variant == SKIPPING else None
    trainer.train()
    if not isinstance(skipper, ZeroAdvantageFilter):
        return TrainedCounts()
    skipper.detach()
    return skipper.counts


@contextmanager
def trainer_of(
    model: str, kind: str, processes: int, steps: int, seed: int
) -> Iterator[GRPOTrainer]:
    """The trainer of a cell."""
    shared = dict(
        max_steps=steps, learning_rate=0.0, logging_steps=10**6, shuffle_dataset=False, seed=seed
    )
    if model == "microcosm":
        policy = AutoModelForCausalLM.from_pretrained(BASE_MODEL, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
        data: Dataset = build_pool(kind, 16 * steps, seed, "dev")
        reward: Callable[..., list[float]] = accuracy_reward
        settings = dict(per_device_train_batch_size=128 // processes, max_completion_length=10)
    else:
        policy, tokenizer = common.make_model(model, seed), common.tokenizer()
        data = Dataset.from_dict({"prompt": [f"question {i:6d}?" for i in range(4 * steps)]})
        reward = by_decree
        settings = dict(
            per_device_train_batch_size=8,
            gradient_accumulation_steps=4 // processes,
            max_completion_length=16,
        )
    with common.make_trainer(
        policy, 8, tokenizer, data, reward, **{**shared, **settings}
    ) as trainer:
        yield trainer


def by_decree(prompts: list[str], **_: Any) -> list[float]:
    """Every other rollout of every fourth prompt is right, and nothing else."""
    numbers = [int(prompt.removeprefix("question ").removesuffix("?")) for prompt in prompts]
    return [float(number % USEFUL_EVERY == 0 and i % 2) for i, number in enumerate(numbers)]


# ---- All cells ------------------------------------------------------------------------------------------------------


def launch(options: argparse.Namespace, name: str, processes: int) -> dict[str, Any]:
    """Measure a cell in processes of its own."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    torchrun += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    launcher = [sys.executable] if processes == 1 else torchrun
    numbers = {"--threads": options.threads, "--seed": options.seed, "--rounds": options.rounds}
    if options.steps is not None:
        numbers["--steps"] = options.steps
    settings = [str(part) for pair in numbers.items() for part in pair]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "cell.json"
        command = [*launcher, str(Path(__file__)), *settings, "--cell", name, "--out", str(out)]
        subprocess.run(
            command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        )
        return summary(json.loads(out.read_text()))


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Medians and quotients of a cell."""
    seconds = found.pop("seconds")
    figures = dict(found)
    figures["rows_share"] = found["rows_trained"] / found["rows_given"]
    figures["tokens_share"] = found["tokens_trained"] / found["tokens_given"]
    for part in ("step", "training"):
        # Of all processes together; and of the slowest one, for which the others wait.
        for kind, over in (("", sum), ("_slowest", max)):
            by_variant = {
                variant: [over(spent[part]) for spent in rounds]
                for variant, rounds in seconds.items()
            }
            quotients = [
                b / a for a, b in zip(by_variant[STOCK], by_variant[SKIPPING], strict=True)
            ]
            figures[f"{part}{kind}_seconds"] = {
                name: statistics.median(times) for name, times in by_variant.items()
            }
            figures[f"{part}{kind}_ratio"] = statistics.median(quotients)
            figures[f"{part}{kind}_ratio_range"] = [min(quotients), max(quotients)]
    return figures


def report(rows: Sequence[dict[str, Any]]) -> None:
    """The table."""
    header = [
        "cell",
        "processes",
        "rows left",
        "tokens left",
        "step, s",
        "step",
        "training",
        "training, slowest",
    ]
    common.table(
        "CPU seconds of an optimizer step without skipping, and quotients of with over without",
        header,
        [
            [
                row["cell"],
                row["processes"],
                row["rows_share"],
                row["tokens_share"],
                row["step_seconds"][STOCK],
                row["step_ratio"],
                row["training_ratio"],
                row["training_slowest_ratio"],
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
