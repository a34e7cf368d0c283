"""What gradient capture and projection take over plain forward and backward passes of the same rollouts."""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import capture_cost
import common

from gpu_check.record import Record, Setting
from gpu_check.trainers import (
    free_gigabytes,
    model_of_shape,
    peak_gigabytes,
    prompts,
    seconds,
    shapes,
    trainer_on,
)
from trl_learnalign.measuring.generation import RolloutGroup

ROLLOUTS, DIM, SEED = 8, 8192, 0
PROMPT_TOKENS = 32
MOST_PROMPTS = 32
"""Of a micro-batch: 148,000 tokens; more would take longer and show nothing else."""

ROUNDS = 2


def run(setting: Setting, record: Record) -> None:
    """Each shape, and each way to capture."""
    for shape in shapes(setting):
        with record.attempt(shape):
            measure(setting, record, shape)


def reward_in_turn(completions: list[Any], **_: Any) -> list[float]:
    """Right and wrong in turn."""
    return [float(i % 2) for i in range(len(completions))]


def measure(setting: Setting, record: Record, shape: str) -> None:
    """A row for the plain pass, and one for each capture."""
    policy = model_of_shape(shape)
    options = dict(bf16=True, max_steps=1, max_completion_length=4)
    with trainer_on(setting, policy, ROLLOUTS, prompts(1), reward_in_turn, **options) as trainer:
        trainer.train()  # the model is prepared, and the optimizer has its moments, as when scoring begins
        together = prompts_that_fit(setting, trainer)
        bench = bench_of(trainer, rollouts(setting, trainer, together), together)
        methods = {
            "plain": bench.plain,
            "floor": lambda: bench.capture(common.Nothing(DIM, SEED)),
            "exact": lambda: bench.capture(bench.exact),
            "capture_rank auto": lambda: bench.capture(bench.factored),
        }
        plain: dict[str, Any] = {}
        for name, method in methods.items():
            found = timed(setting, trainer, method)
            plain = plain or found
            features = found.pop("features")
            is_finite = None if features is None else bool(features.isfinite().all())
            over = {f"{key} over plain": ratio(found[key], plain[key]) for key in ("s", "GB")}
            record.add(f"{shape}, {name}", is_finite, prompts=together, **found, **over)


def rollouts(setting: Setting, trainer: Any, count: int) -> list[RolloutGroup]:
    """Made-up rollouts of so many prompts."""
    tokens = 8 if setting.small else 544
    vocabulary = trainer.model.config.vocab_size
    prompt_tokens = 4 if setting.small else PROMPT_TOKENS
    return common.made_up_groups(count, ROLLOUTS, prompt_tokens, tokens, vocabulary, SEED)


def bench_of(trainer: Any, groups: list[RolloutGroup], together: int) -> capture_cost.Bench:
    """The methods of `benchmarks/capture_cost.py` on this trainer."""
    options = Namespace(rollouts=ROLLOUTS, micro_batch=together, dim=DIM, seed=SEED, rank="auto")
    return capture_cost.Bench(trainer, groups, options)


def prompts_that_fit(setting: Setting, trainer: Any) -> int:
    """A power of two of prompts whose plain pass takes up to two thirds of the memory that is left."""
    bench = bench_of(trainer, rollouts(setting, trainer, 1), 1)
    bench.plain()
    one = peak_gigabytes(setting, bench.plain)
    fitting = int(free_gigabytes(setting) * 2 / 3 / max(one or 0.0, 1e-6))
    most = 2 if setting.small else MOST_PROMPTS
    return min(most, 1 << (max(1, fitting).bit_length() - 1))


def timed(setting: Setting, trainer: Any, method: Callable[[], Any]) -> dict[str, Any]:
    """Median seconds, and peak memory of the first call beyond weights and the optimizer's moments."""
    trainer.model.zero_grad(set_to_none=True)
    result: list[Any] = []
    memory = peak_gigabytes(setting, lambda: result.append(method()))
    times = []
    for _ in range(ROUNDS):
        begun = seconds(setting)
        method()
        times.append(seconds(setting) - begun)
    return {"s": statistics.median(times), "GB": memory, "features": result[0]}


def ratio(value: float | None, base: float | None) -> float | None:
    """A quotient, if both are known."""
    return value / base if value is not None and base else None
