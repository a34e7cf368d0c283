"""A run as everybody else sees it, of a stock trainer and of one with the callback: log, checkpoints, events."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import cases
import sampling_cases
from datasets import IterableDataset
from interruptions import KillAt, Killed
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from trl_learnalign import LearnAlignCallback, LearnAlignConfig

CONFIGS = {
    "trainer": dict(order="trainer", skip_zero_advantages=False),
    "trainer, skipping": dict(order="trainer"),
    "adaptive": dict(),
    "shuffled": dict(order="shuffled", skip_forced_scoring=True),
}
TIMES = ("runtime", "per_second", "step_time")
"""In names of what is measured by the clock."""


class Recorder(TrainerCallback):
    """Everything that a callback of the user's is told, in its order."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []


def _recording(event: str) -> Any:
    def record(self: Recorder, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wishes = control.should_log, control.should_evaluate, control.should_save
        told = (event, state.global_step, state.epoch, state.num_train_epochs, state.max_steps)
        logs = sorted(kwargs["logs"]) if event == "on_log" else []
        own = [name for name in logs if name.startswith("learnalign/")]
        if event != "on_log" or own != [name for name in logs if name != "epoch"]:
            self.events.append((*told, *wishes))

    return record


for _event in (
    *("on_train_begin", "on_epoch_begin", "on_step_begin", "on_substep_end", "on_optimizer_step"),
    *("on_pre_optimizer_step", "on_step_end", "on_epoch_end", "on_train_end"),
    *("on_log", "on_evaluate", "on_save"),
):
    setattr(Recorder, _event, _recording(_event))


def stream(size: int = 12) -> IterableDataset:
    """Prompts of a generator: neither their number nor their columns are known."""
    return IterableDataset.from_generator(lambda: iter(cases.dataset(size)))


class StopAt(TrainerCallback):
    """Somebody who ends training when an optimizer step has been made."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= state.global_step == self.step


def trained(
    folder: Path, order: str | None, kill_at: int | None = None, **options: Any
) -> dict[str, Any]:
    """What a run shows.

    Args:
        folder (`Path`): Its output folder.
        order (`str`, *optional*): A key of `CONFIGS`; `None` is the stock trainer.
        kill_at (`int`, *optional*): Step after which it is killed, and gone on with from its last checkpoint.
        options: Of the `GRPOConfig`; besides `prompts` of the dataset, `groups` that a column tells apart, `stop_at`,
            and whether the prompts are a `stream`.
    """
    if kill_at is not None:
        with contextlib.suppress(Killed):
            _train(folder, order, None, kill_at, options)
        checkpoint = get_last_checkpoint(str(folder))
    return _train(folder, order, checkpoint if kill_at is not None else None, None, options)


def _train(
    folder: Path,
    order: str | None,
    checkpoint: str | None,
    kill_at: int | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    own = dict(options)
    rows, seen, saves = list(range(own.pop("prompts", 12))), [], {}
    groups, stop_at = own.pop("groups", None), own.pop("stop_at", None)
    given = dict(data=stream(len(rows))) if own.pop("stream", False) else dict(rows=rows)

    def right_reward(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
        seen.append((trainer_state.global_step, trainer_state.epoch))
        return sampling_cases.right_reward(completions)

    trainer = sampling_cases.trainer(
        folder, **given, evaluated=cases.dataset(4), rewards=right_reward, **own
    )
    if groups is not None:
        kinds = [f"kind {row % groups}" for row in rows]
        trainer.train_dataset = trainer.train_dataset.add_column("kind", kinds)
    before, after, counter = Recorder(), Recorder(), TrainerCallback()
    counter.on_save = lambda _, state, __, **___: saves.update({state.global_step: len(seen)})
    trainer.add_callback(before)
    if order is not None:
        trainer.add_callback(
            LearnAlignCallback(trainer, LearnAlignConfig.adaptive(**CONFIGS[order]))
        )
    trainer.callback_handler.callbacks += [after, counter]
    if stop_at is not None:
        trainer.add_callback(StopAt(stop_at))
    if kill_at is not None:
        trainer.add_callback(KillAt(kill_at))
    trainer.train(resume_from_checkpoint=checkpoint)
    return {
        "apart": [row for row in trainer.state.log_history if not _is_its_own(row)],
        "log": [_untimed(row) for row in trainer.state.log_history if _is_its_own(row)],
        "checkpoints": sorted(int(path.name[11:]) for path in Path(folder).glob("checkpoint-*")),
        "best": Path(trainer.state.best_model_checkpoint or "none").name,
        "resumed at": int(Path(checkpoint).name[11:]) if checkpoint else None,
        "epochs": (trainer.state.epoch, trainer.state.num_train_epochs, trainer.state.max_steps),
        "rewards": seen,
        "saves": saves,
        "events": before.events,
        "events after": after.events,
        "weights": [parameter.detach().clone() for parameter in trainer.model.parameters()],
    }


def _is_its_own(row: dict[str, Any]) -> bool:
    """Whether a row of the log is the trainer's, not one that we have logged apart."""
    return not {name for name in row if name not in ("step", "epoch")} <= {
        name for name in row if name.startswith("learnalign/")
    }


def _untimed(row: dict[str, Any]) -> dict[str, Any]:
    return {
        name: "a time" if any(time in name for time in TIMES) else value
        for name, value in row.items()
        if not name.startswith("learnalign/")
    }


def shape(run: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on which prompts came: keys of the log, steps, epochs, events."""
    known = ("step", "epoch", "learning_rate")
    rows = [
        {name: value if name in known else None for name, value in row.items()}
        for row in run["log"]
    ]
    return {**run, "log": rows, "weights": None}
