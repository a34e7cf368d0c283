"""Skipping against stock TRL: the gradient of every loss, and what a step takes.

Steps are timed at three shares of prompts with a gradient. Generation is the same in all of them, and takes longest:
it is timed once for each model, and its completions are served again to the steps that are timed.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import skipping
import torch
from accelerate.utils import set_seed
from transformers import TrainerCallback
from trl import GRPOTrainer

from gpu_check.record import Record, Setting
from gpu_check.trainers import model_of_shape, number_of, prompts, seconds, shapes, trainer_on
from trl_learnalign.bridge.objective import DENOMINATORS
from trl_learnalign.bridge.skipping import install_skipping

ROUNDING = 1e-4  # float32, sums in another order
ROUNDING_BF16 = 0.05
SHARES = (0.25, 0.5, 1.0)
ROLLOUTS = 8
SEED = 0
VARIANTS = (skipping.STOCK, skipping.SKIPPING)


def run(setting: Setting, record: Record) -> None:
    """Gradients first, then seconds."""
    for loss in losses(setting):
        with record.attempt(f"gradient of {loss}"):
            distance = gradient_distance(setting, loss)
            record.add(f"gradient of {loss}", distance < ROUNDING, distance=distance)
    with record.attempt("gradient of dapo, bf16 autocast"):
        distance = gradient_distance(setting, "dapo", bf16=True)
        record.add("gradient of dapo, bf16 autocast", distance < ROUNDING_BF16, distance=distance)
    for shape in shapes(setting):
        with record.attempt(shape):
            time_steps(setting, record, shape)


def losses(setting: Setting) -> list[str]:
    """Every loss of TRL; of a small check one for each thing that losses are divided by."""
    by_denominator = {denominator: loss for loss, denominator in DENOMINATORS.items()}
    return list(by_denominator.values() if setting.small else DENOMINATORS)


def reward_with_share(share: float) -> Callable[..., list[float]]:
    """Of every four prompts this share has right and wrong rollouts, and the others have none."""

    def reward(prompts: list[str], **_: Any) -> list[float]:
        useful = [number_of(prompt) % 4 < 4 * share for prompt in prompts]
        return [float(is_useful and i % 2) for i, is_useful in enumerate(useful)]

    return reward


# ---- Gradients ------------------------------------------------------------------------------------------------------


class Gradients(TrainerCallback):
    """The gradient of every optimizer step, and the completions that the steps are made of.

    Args:
        trainer (`GRPOTrainer`): Not yet trained, with nothing else installed.
    """

    def __init__(self, trainer: GRPOTrainer):
        self.model = trainer.model
        self.gradients: list[torch.Tensor] = []
        self.completions: list[list[list[int]]] = []
        self._generate = trainer._generate
        trainer._generate = self._watched
        trainer.add_callback(self)

    def _watched(self, *arguments: Any, **options: Any) -> Any:
        found = self._generate(*arguments, **options)
        self.completions.append(copy.deepcopy(found[1]))
        return found

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        parts = [p.grad.flatten().cpu() for p in self.model.parameters() if p.grad is not None]
        self.gradients.append(torch.cat(parts))


def gradients(setting: Setting, skips: bool, loss: str, **options: Any) -> Gradients:
    """Two steps, of which half of the prompts have a gradient."""
    tokens = 6 if setting.small else 16
    options |= dict(loss_type=loss, max_steps=2, max_completion_length=tokens)
    options |= dict(per_device_train_batch_size=8, gradient_accumulation_steps=2)
    policy = model_of_shape("tiny" if setting.small else "small")
    with trainer_on(setting, policy, 4, prompts(8), reward_with_share(0.5), **options) as trainer:
        watched = Gradients(trainer)
        if skips and isinstance(problem := install_skipping(trainer), str):
            raise ValueError(f"skipping is refused: {problem}")
        set_seed(SEED)
        trainer.train()
        return watched


def gradient_distance(setting: Setting, loss: str, **options: Any) -> float:
    """Largest relative distance of a step's gradient with skipping from that without."""
    stock = gradients(setting, False, loss, **options)
    ours = gradients(setting, True, loss, **options)
    if stock.completions != ours.completions:
        raise ValueError("both runs did not sample the same completions: nothing is compared")
    pairs = list(zip(stock.gradients, ours.gradients, strict=True))
    if not all(float(theirs.norm()) > 0 for theirs, _ in pairs):
        raise ValueError("the gradient of a stock step is 0: nothing is compared")
    return max(float((theirs - own).norm() / theirs.norm()) for theirs, own in pairs)


# ---- Seconds --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """What one timed step is made of.

    Args:
        prompts (`int`): Of a step.
        rows (`int`): Rollouts of a micro-batch.
        tokens (`int`): Of every completion.
        steps (`int`): Of a training, the first of which is not timed.
    """

    prompts: int
    rows: int
    tokens: int
    steps: int

    @classmethod
    def of(cls, setting: Setting) -> Sizes:
        """By the size of the check."""
        return cls(4, 8, 6, 2) if setting.small else cls(16, 16, 512, 4)


class Steps(TrainerCallback):
    """Seconds of every optimizer step without its generation; the first generation is kept and served again.

    Args:
        setting (`Setting`): With the device.
        trainer (`GRPOTrainer`): With nothing installed.
    """

    def __init__(self, setting: Setting, trainer: GRPOTrainer):
        self.setting = setting
        self.steps: list[float] = []
        self.generation = 0.0
        self._kept: Any = None
        self._generate = trainer._generate
        trainer._generate = self._served
        trainer.add_callback(self)

    def _served(self, *arguments: Any, **options: Any) -> Any:
        begun = seconds(self.setting)
        if self._kept is None:
            self._kept = self._generate(*arguments, **options)
            self.generation = seconds(self.setting) - begun
        served = copy.deepcopy(self._kept)
        self._within += seconds(self.setting) - begun
        return served

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.steps = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._within, self._begun = 0.0, seconds(self.setting)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append(seconds(self.setting) - self._begun - self._within)


def time_steps(setting: Setting, record: Record, shape: str) -> None:
    """A row for each share of useful prompts."""
    sizes = Sizes.of(setting)
    share = SHARES[0]

    def reward(**given: Any) -> list[float]:
        return reward_with_share(share)(**given)

    options = dict(
        bf16=True,
        max_steps=sizes.steps,
        per_device_train_batch_size=sizes.rows,
        gradient_accumulation_steps=sizes.prompts * ROLLOUTS // sizes.rows,
        max_completion_length=sizes.tokens,
        generation_kwargs={"min_new_tokens": sizes.tokens},
    )
    data = prompts(sizes.prompts * sizes.steps)
    policy = model_of_shape(shape)
    with trainer_on(setting, policy, ROLLOUTS, data, reward, **options) as trainer:
        clock = Steps(setting, trainer)
        skipping.train(trainer, skipping.STOCK)  # warms up, and generates
        for share in SHARES:
            times, left = {}, 1.0
            for variant in VARIANTS:
                counts = skipping.train(trainer, variant)
                times[variant] = statistics.median(clock.steps[1:])
                left = counts.rows_trained / counts.rows_given if counts.rows_given else left
            stock, ours = (times[variant] for variant in VARIANTS)
            record.add(
                f"{shape}, {share:g} of the prompts useful",
                left == share,
                **{
                    "rows left": left,
                    "training, s": stock,
                    "with skipping, s": ours,
                    "training, ratio": ours / stock,
                    "generation, s": clock.generation,
                    "generation's share": clock.generation / (clock.generation + stock),
                    "step, ratio": (clock.generation + ours) / (clock.generation + stock),
                },
            )
