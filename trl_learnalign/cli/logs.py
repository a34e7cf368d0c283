"""What recipes print of the trainer's log: one line for each, where the trainer would print a dictionary of thirty."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from typing_extensions import override

if TYPE_CHECKING:
    from trl import GRPOTrainer

SHOWN = {
    "reward": "reward {:.3f}",
    "eval_reward": "eval reward {:.3f}",
    "completions/mean_length": "{:.0f} tokens",
    "completions/clipped_ratio": "{:.0%} cut off",
    "kl": "KL {:.3g}",
    "grad_norm": "grad norm {:.3g}",
    "learning_rate": "lr {:.1e}",
}
"""Names of the log that are worth a place on the terminal, and how; trackers get all of them."""

_TELLING = ("reward", "eval_reward")


def log_line(logs: Mapping[str, Any], state: TrainerState) -> str:
    """A log as a line; empty where it holds no reward.

    Args:
        logs (mapping): What the trainer logs.
        state (`TrainerState`): How far it is.
    """
    if all(logs.get(name) is None for name in _TELLING):
        return ""
    parts = []
    for name, form in SHOWN.items():
        value = logs.get(name)
        if isinstance(value, int | float):
            parts.append(form.format(value))
    return f"step {state.global_step} of {state.max_steps}: {', '.join(parts)}"


class ShortLog(ProgressCallback):
    """The trainer's bar, with [`log_line`] above it."""

    @override
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Any = None,
        **kwargs: Any,
    ) -> None:
        line = log_line(logs, state)
        if line and self.training_bar is not None:
            self.training_bar.write(line)


class ShortPrinter(PrinterCallback):
    """[`log_line`] without a bar."""

    @override
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Any = None,
        **kwargs: Any,
    ) -> None:
        line = log_line(logs, state)
        if line and state.is_local_process_zero:
            print(line)


def shorten_logs(trainer: GRPOTrainer) -> None:
    """Let a trainer print its logs in lines.

    Args:
        trainer (`GRPOTrainer`): As it was made.
    """
    for long, short in ((ProgressCallback, ShortLog), (PrinterCallback, ShortPrinter)):
        if trainer.pop_callback(long) is not None:
            trainer.add_callback(short())
