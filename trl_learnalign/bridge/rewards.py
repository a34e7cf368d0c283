"""A reward function called as the trainer calls it, by the trainer's own code, in training or without a trainer."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerState
from trl import GRPOTrainer

from trl_learnalign.bridge.required import Called, Required

REQUIRES = Required(
    trainer=(
        "reward_processing_classes",
        "reward_func_names",
        "environments",
        "_pending_extra_logs",
        "_pending_metrics",
    ),
    calls={"_calculate_rewards": Called(4)},
    sometimes={"async_loop": lambda trainer: "async_loop" in vars(trainer)},
)


def rewards_of(
    function: Any,
    rows: Sequence[dict[str, Any]],
    completions: Sequence[Any],
    completion_ids: Sequence[list[int]],
    trainer: GRPOTrainer | None = None,
) -> list[float | None]:
    """Rewards of completions by one function, in every form that TRL takes.

    Functions may be async, and get `prompts`, `completions`, `completion_ids`, the rows' other columns,
    `trainer_state`, `log_extra` and `log_metric`. What they log is dropped: it is no part of training.

    Args:
        function (callable or `torch.nn.Module`): The reward; a module only with a trainer that has it.
        rows (sequence of `dict`): Dataset rows, with `prompt`.
        completions (sequence): One for each row, in the form of its prompt.
        completion_ids (sequence of `list[int]`): Their tokens.
        trainer (`GRPOTrainer`, *optional*): Whose state and settings the function sees; all its processes call this
            together, with equally many rows. Without it the state is that of a new trainer.

    Returns:
        `list`: One for each row, in float32 as in training; `None` where the function returned `None` or NaN.

    Raises:
        `RuntimeError`: If the function fails or returns something else, naming it and what it has to return.
    """
    own = _without_training() if trainer is None else copy(trainer)
    own.reward_processing_classes = [_processor(trainer, function)]
    own.reward_funcs, own.reward_func_names = [function], [_name(function)]
    found = _calculated(own, list(rows), list(completions), list(completion_ids))
    first = own.accelerator.process_index * len(rows)
    values = found[first : first + len(rows), 0].tolist()
    return [None if math.isnan(value) else value for value in values]


def _calculated(
    trainer: GRPOTrainer, rows: list[dict[str, Any]], completions: list[Any], ids: list[list[int]]
) -> torch.Tensor:
    """Rewards of all processes, `(rows, 1)`, by a trainer that is given up afterwards."""
    # Rewards log into these; the trainer's own would end in its next table of completions.
    trainer._pending_extra_logs, trainer._pending_metrics = defaultdict(list), defaultdict(list)
    calculate = trainer._calculate_rewards
    prompts = [row["prompt"] for row in rows]
    with _running_loop(trainer), _silent(calculate.__module__):
        try:
            return calculate(rows, prompts, completions, ids)
        except Exception as error:
            (name,) = trainer.reward_func_names
            raise RuntimeError(
                f"The reward function {name!r} failed ({type(error).__name__}: {error}). It is called in TRL's form, "
                "with prompts, completions, completion_ids and the columns of the dataset as keywords, and returns a "
                "list with one number, or None where it cannot judge, for each completion."
            ) from error


def _name(function: Any) -> str:
    inner = getattr(function, "func", function)  # functools.partial
    return str(getattr(inner, "__name__", type(inner).__name__))


def _processor(trainer: GRPOTrainer | None, function: Any) -> Any:
    """The tokenizer of a reward model, which the trainer has beside it."""
    if trainer is None:
        return None
    pairs = zip(trainer.reward_funcs, trainer.reward_processing_classes, strict=True)
    return next((processor for each, processor in pairs if each is function), None)


def _without_training() -> GRPOTrainer:
    """What TRL's code needs of a trainer to call a function, and nothing else."""
    PartialState()  # TRL's logger wants it
    bare = object.__new__(GRPOTrainer)
    bare.accelerator = SimpleNamespace(
        device=torch.device("cpu"), is_main_process=True, process_index=0
    )
    bare.args = SimpleNamespace(report_to=[])
    bare.state, bare.environments, bare.chat_template_kwargs = TrainerState(), None, {}
    return bare


@contextmanager
def _running_loop(trainer: GRPOTrainer) -> Iterator[None]:
    """The loop in which async functions run: the trainer's, to which their clients may be bound, or a new one."""
    if "async_loop" in vars(trainer):
        yield
        return
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    trainer.async_loop = loop
    try:
        yield
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextmanager
def _silent(name: str) -> Iterator[None]:
    """Without TRL's warning for each call in which some row has no reward: whoever asks here counts them."""
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
