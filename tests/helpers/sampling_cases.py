"""Rollouts that are a function of the prompt's number and nothing else, so that any trainer makes the same."""

from __future__ import annotations

from typing import Any

import cases
import torch
from skipping_cases import Steps, number_of
from trl import GRPOTrainer

ROLLOUTS = 4


def successes(number: int) -> int:
    """How many of a prompt's four rollouts are right: 0 and 4 teach nothing."""
    return number % 5


def completion(number: int, rollout: int) -> str:
    """Right ones begin with y; all have lengths and letters of their own."""
    right = (rollout + number) % ROLLOUTS < successes(number)
    length = 1 + (7 * number + 3 * rollout) % 6
    letters = [
        chr(ord("a") + (number * number + rollout * 5 + place * 3) % 24) for place in range(length)
    ]
    return ("y" if right else "n") + "".join(letters)


def roll_out(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
    first = trainer.accelerator.process_index * len(prompts)
    count = trainer.num_generations
    texts = [completion(number_of(prompt), (first + i) % count) for i, prompt in enumerate(prompts)]
    encode = trainer.processing_class
    return {
        "prompt_ids": [encode(prompt).input_ids for prompt in prompts],
        "completion_ids": [[*encode(text).input_ids, encode.eos_token_id] for text in texts],
        "logprobs": None,
    }


def right_reward(completions: list[str], **_: Any) -> list[float]:
    return [float(text.startswith("y")) for text in completions]


GRADES = [-1.0, 2.0]
"""Range of [`graded_reward`]."""


def graded_reward(completions: list[str], **_: Any) -> list[float]:
    """The best grade if right; else one of two lower ones, which differ in some groups without a right rollout."""
    lowest, highest = GRADES
    letters = [
        text.replace(" ", "") for text in completions
    ]  # the tokenizer puts spaces between them
    return [
        highest if text[0] == "y" else lowest + (0.7 if text[1] < "i" else 1.4) for text in letters
    ]


def trainer(
    folder: Any, rows: list[int] | None = None, policy: Any = None, **options: Any
) -> GRPOTrainer:
    """A trainer that takes prompts in the order given, and rolls them out as [`roll_out`] does."""
    data = options.pop("data", None) or cases.dataset(100)
    rewards = options.pop("rewards", right_reward)
    defaults = dict(
        shuffle_dataset=False,
        max_steps=2,
        logging_steps=100,
        max_grad_norm=0.0,
        learning_rate=1e-2,
        num_generations=4,
    )
    peft_config = options.pop("peft_config", None)
    evaluated = options.pop("evaluated", None)
    rollout_func = options.pop("rollout_func", roll_out)
    return GRPOTrainer(
        model=cases.model().double() if policy is None else policy,
        reward_funcs=rewards,
        args=cases.grpo_config(folder, **{**defaults, **options}),
        train_dataset=data if rows is None else data.select(rows),
        eval_dataset=evaluated,
        processing_class=cases.tokenizer(),
        rollout_func=rollout_func,
        peft_config=peft_config,
    )


class Trained(Steps):
    """Which rollouts went through the model, besides [`Steps`]: prompt and completion as one text, step by step."""

    def __init__(self, made: GRPOTrainer):
        super().__init__(made)
        self.texts: list[list[str]] = []
        self.tokenizer = made.processing_class
        made.model.register_forward_pre_hook(self._read, with_kwargs=True)

    def on_step_begin(self, *arguments: Any, **options: Any) -> None:
        super().on_step_begin(*arguments, **options)
        self.texts.append([])

    def _read(self, module: torch.nn.Module, arguments: Any, inputs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
                text = self.tokenizer.decode(ids[mask.bool()], skip_special_tokens=True)
                self.texts[-1].append(text.replace(" ", ""))


def texts_of(rows: list[int]) -> list[str]:
    """All rollouts of some rows of the dataset, as [`Trained`] reads them."""
    data = cases.dataset(100)
    return sorted(
        data[row]["prompt"] + completion(row, rollout)
        for row in rows
        for rollout in range(ROLLOUTS)
    )


class More:
    """Rows 50, 51, …; notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, int]] = []

    def __call__(self, micro_step: int, start: int, count: int) -> list[int]:
        self.asked.append((micro_step, start, count))
        return [50 + (7 * micro_step + start + i) % 50 for i in range(count)]


def embeddings(prompts: list[str]) -> list[list[float]]:
    """Of prompts, by their number: those of like number are alike."""
    numbers = [number_of(prompt) for prompt in prompts]
    return [[float(number % 5 == kind) for kind in range(5)] for number in numbers]
