"""One cell of the pretrained table: train a real pretrained model with one line's choice of prompts, on short tasks.

All lines have the same stock `GRPOTrainer`, pool, held-out tasks and budget of compute; what makes a line is attached
by [`attach`]. What a cell spends is counted from outside, the same way for all of them: rollouts where they are
graded, training where the model is called with a gradient. The learning rate is constant, so one run gives the whole
curve.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import GRPOConfig, GRPOTrainer

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.bridge.hooks import preserve_trainer_state
from trl_learnalign.evaluation.grading import grade
from trl_learnalign.evaluation.held_out import complete_greedily
from trl_learnalign.records.notes import Cost
from trl_learnalign.toy import short_tasks
from trl_learnalign.toy.model import CHECKPOINTING

Row = dict[str, Any]

MARKS = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
"""Parts of the budget at which a curve is evaluated, besides the untrained model."""

MOST_STEPS = 1000
"""More than any line takes: the budget ends a cell."""

WHOLE_POOL: dict[str, Any] = {"warmup_samples": 0, "stages": [1.0], "skip_zero_advantages": True}

LINES: dict[str, dict[str, Any] | None] = {
    "full": None,
    "skip": {**WHOLE_POOL, "order": "trainer"},
    "adaptive": {**WHOLE_POOL, "order": "adaptive", "stage_steps": [MOST_STEPS]},
}
"""Settings of `LearnAlignConfig` that make a line; `None`: the stock trainer, which shuffles the pool."""


@dataclass(frozen=True)
class Settings:
    """What all cells share; decided once, on the development tasks.

    Args:
        pool (`int`): Prompts of a pool.
        held_out (`int`): Tasks of the evaluation.
        prompts_per_step (`int`): Prompts of an optimizer step.
        rollouts (`int`): G.
        learning_rate (`float`): Constant learning rate of all parameters.
        budget (`float`): Compute of a cell, in tokens of a forward pass.
    """

    pool: int = 1000
    held_out: int = 400
    prompts_per_step: int = 8
    rollouts: int = 8
    learning_rate: float = 3e-5
    budget: float = 480_000


@dataclass(frozen=True)
class Cell:
    """One training run.

    Args:
        selector (`str`): A key of `LINES`.
        seed (`int`): Seed of pool, order and rollouts.
    """

    selector: str
    seed: int


def attach(trainer: GRPOTrainer, cell: Cell) -> None:
    """Turn a stock trainer into a line of the table.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        cell (`Cell`): Line and seed.

    Raises:
        `ValueError`: If there is no such line.
    """
    if cell.selector not in LINES:
        raise ValueError(f"unknown line {cell.selector!r}: choose one of {', '.join(LINES)}")
    settings = LINES[cell.selector]
    if settings is not None:
        config = LearnAlignConfig.adaptive(**settings, selection_seed=cell.seed)
        trainer.add_callback(LearnAlignCallback(trainer, config))


def trainer_args(settings: Settings, folder: Path, seed: int) -> GRPOConfig:
    """Weights and optimizer in float32, forward and backward passes in bfloat16, on one process of a CPU."""
    return GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=settings.prompts_per_step * settings.rollouts,
        num_generations=settings.rollouts,
        max_steps=MOST_STEPS,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        beta=0.0,
        temperature=1.0,
        max_completion_length=short_tasks.MAX_COMPLETION_LENGTH,
        per_device_eval_batch_size=100,
        model_init_kwargs={"dtype": "float32"},
        use_cpu=True,
        bf16=True,
        **{CHECKPOINTING: False},
        save_strategy="no",
        logging_steps=10**6,
        disable_tqdm=True,
        report_to="none",
        seed=seed,
    )


# ---- what a cell spends ---------------------------------------------------------------------------------------------


class Meter:
    """Counts tokens where they pass, whoever sent them; time runs from [`start`], without what is [`paused`].

    Its reward function is the tasks' own.

    Args:
        rollouts (`int`): G.
    """

    def __init__(self, rollouts: int):
        self.rollouts = rollouts
        self.generated = self.prompt = self.forward = self.trained = 0
        self.groups = self.useful_groups = 0
        self._is_paused = False
        self.start()

    def start(self) -> None:
        """Time runs from here."""
        self._began, self._cpu_began = time.perf_counter(), time.process_time()

    def accuracy_reward(
        self,
        completions: list[Any],
        answer: list[str],
        completion_ids: list[list[int]],
        prompt_tokens: list[int],
        **_: Any,
    ) -> list[float]:
        """The tasks' reward; every rollout passes here, trained on or not."""
        self.generated += sum(map(len, completion_ids))
        self.prompt += sum(prompt_tokens)
        rewards = short_tasks.short_answer_reward(completions, answer)
        groups = np.reshape(rewards, (-1, self.rollouts))
        self.groups += len(groups)
        self.useful_groups += int((np.ptp(groups, axis=1) > 0).sum())
        return rewards

    def watch(self, model: torch.nn.Module) -> None:
        """Count the tokens of a model's forward passes: with a gradient, and without one outside of decoding."""
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        # transformers 5.24 calls the argument "cache".
        is_decoding = any(kwargs.get(name) is not None for name in ("past_key_values", "cache"))
        if self._is_paused or is_decoding:
            return
        mask = kwargs.get("attention_mask")
        tokens = kwargs["input_ids"].numel() if mask is None else int(mask.sum())
        if torch.is_grad_enabled():
            self.trained += tokens
        else:
            self.forward += tokens

    def paused(self, task: Callable[[], Row]) -> Row:
        """The result of something that is not charged: an evaluation."""
        began, cpu_began = time.perf_counter(), time.process_time()
        self._is_paused = True
        result = task()
        self._is_paused = False
        self._began += time.perf_counter() - began
        self._cpu_began += time.process_time() - cpu_began
        return result

    def cost(self) -> Cost:
        """So far."""
        seconds = time.perf_counter() - self._began
        return Cost(self.generated, self.prompt, self.forward, self.trained, seconds)

    @property
    def cpu_seconds(self) -> float:
        """CPU time so far."""
        return time.process_time() - self._cpu_began


# ---- evaluation -----------------------------------------------------------------------------------------------------


def evaluate(trainer: GRPOTrainer, tasks: Dataset) -> Row:
    """Accuracy on tasks that were never trained on, over all of them and by family.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        tasks (`datasets.Dataset`): A pool of another split.

    Returns:
        `dict`: `accuracy`, of greedy answers; `probability`, the mean chance of the right answer at temperature 1, in
        its usual tokens: what a rollout earns, without the noise of sampling; `n_eval`; both by family as JSON.
    """
    rows = list(tasks)
    with preserve_trainer_state(trainer):
        completions = complete_greedily(trainer, [row["prompt"] for row in rows])
        probabilities = answer_probabilities(trainer, rows)
    texts = [completion.text for completion in completions]
    ids = [completion.ids for completion in completions]
    right = grade(short_tasks.short_answer_reward, rows, texts, ids)
    return {
        "accuracy": float(np.mean(right)),
        "probability": float(np.mean(probabilities)),
        "n_eval": len(rows),
        "family_accuracy": json.dumps(_by_family(rows, right)),
        "family_probability": json.dumps(_by_family(rows, probabilities)),
    }


def _by_family(rows: Sequence[Row], values: Sequence[float | None]) -> dict[str, float]:
    families = defaultdict(list)
    for row, value in zip(rows, values, strict=True):
        families[row["family"]].append(value)
    return {name: round(float(np.mean(members)), 4) for name, members in sorted(families.items())}


@torch.no_grad()
def answer_probabilities(trainer: GRPOTrainer, rows: Sequence[Row]) -> list[float]:
    """Chance that a completion of each task is a space, the answer and the end, at temperature 1."""
    tokenizer, model = trainer.processing_class, trainer.model
    model.eval()
    probabilities: dict[int, float] = {}
    size = trainer.args.per_device_eval_batch_size
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]["prompt"]))
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        prompts = [tokenizer(rows[row]["prompt"]).input_ids for row in batch]
        answers = [
            tokenizer(f" {rows[row]['answer']}{tokenizer.eos_token}").input_ids for row in batch
        ]
        width = max(
            len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)
        )
        longest = max(map(len, answers))
        ids = torch.full((len(batch), width), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            ids[i, width - len(prompt) - len(answer) :] = torch.tensor(prompt + answer)
            mask[i, width - len(prompt) - len(answer) :] = 1
        logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=longest + 1).logits[
            :, :-1
        ]
        chosen = logits.float().log_softmax(dim=-1).gather(2, ids[:, -longest:, None])[:, :, 0]
        for i, (row, answer) in enumerate(zip(batch, answers, strict=True)):
            probabilities[row] = math.exp(chosen[i, -len(answer) :].sum().item())
    return [probabilities[row] for row in range(len(rows))]


# ---- a cell ---------------------------------------------------------------------------------------------------------


class Curve(TrainerCallback):
    """Evaluates whenever a part of the budget is spent, and ends the training with the budget.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        meter (`Meter`): What was spent.
        settings (`Settings`): Settings.
        tasks (`datasets.Dataset`): Tasks of the evaluation.
        write (callable): Takes each row of the curve as soon as it is there.
    """

    def __init__(
        self,
        trainer: GRPOTrainer,
        meter: Meter,
        settings: Settings,
        tasks: Dataset,
        write: Callable[[Row], None],
    ):
        self.trainer, self.meter, self.settings, self.tasks, self.write = (
            trainer,
            meter,
            settings,
            tasks,
            write,
        )
        self.marks = list(MARKS)

    def point(self, mark: float, step: int) -> None:
        """Evaluate and hand the row over."""
        cost, cpu_seconds = self.meter.cost(), self.meter.cpu_seconds
        found = self.meter.paused(lambda: evaluate(self.trainer, self.tasks))
        row = {"mark": mark, "step": step, **found, **asdict(cost), "cpu_seconds": cpu_seconds}
        groups = {"groups": self.meter.groups, "useful_groups": self.meter.useful_groups}
        self.write({**row, "compute": cost.forward_equivalents, **groups})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        share = self.meter.cost().forward_equivalents / self.settings.budget
        passed = [mark for mark in self.marks if share >= mark]
        if passed:
            self.marks = self.marks[len(passed) :]
            self.point(passed[-1], state.global_step)
        if not self.marks:
            control.should_training_stop = True


def run_cell(
    cell: Cell,
    settings: Settings,
    model: str,
    split: str,
    scratch: Path,
    write: Callable[[Row], None],
) -> None:
    """Train a cell and write its curve.

    Args:
        cell (`Cell`): Line and seed.
        settings (`Settings`): Settings.
        model (`str`): Checkpoint folder or hub id of the pretrained model.
        split (`str`): `"heldout"`, or `"dev"` to choose settings by.
        scratch (`Path`): The trainer's output folder.
        write (callable): Takes each row of the curve as soon as it is there.
    """
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model)
    pool = short_tasks.build_short_pool(settings.pool, cell.seed, end=tokenizer.eos_token)
    lengths = [len(ids) for ids in tokenizer(list(pool["prompt"])).input_ids]
    meter = Meter(settings.rollouts)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=meter.accuracy_reward,
        args=trainer_args(settings, scratch, cell.seed),
        train_dataset=pool.add_column("prompt_tokens", lengths),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    tasks = short_tasks.build_short_pool(settings.held_out, 0, split, tokenizer.eos_token)
    curve = Curve(trainer, meter, settings, tasks, lambda row: write({**asdict(cell), **row}))
    meter.watch(trainer.model)
    curve.point(0.0, 0)
    meter.start()
    attach(trainer, cell)
    trainer.add_callback(curve)
    trainer.train()
