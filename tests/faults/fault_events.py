"""What happens in a run, numbered: each file operation, each part of a step. One of them goes wrong."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from trl import GRPOTrainer

# Audit events of Python, and which of their arguments names the file.
_OPERATIONS = {
    "os.rename": 1,
    "os.link": 1,
    "os.remove": 0,
    "os.mkdir": 0,
    "os.rmdir": 0,
    "os.truncate": 0,
    "shutil.rmtree": 0,
}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Fault:
    """What goes wrong in a process: it dies by its own hand, or something happens to its disk.

    Args:
        rank (`int`): Which process.
        number (`int`): At which of its events, counted from 1; the event itself does not happen any more.
        torn (`float`, *optional*): What share is left of the file that was being written; by default all of it.
        command (`list[str]`, *optional*): What is done instead of dying; the event happens.
    """

    rank: int
    number: int
    torn: float | None = None
    command: list[str] | None = None


class Events(TrainerCallback):
    """Numbers the events of this process, and dies at the one that is wanted.

    Args:
        folder (`Path`): The output folder: files elsewhere do not count.
        fault (`Fault`, *optional*): Of this process.
    """

    def __init__(self, folder: Path, fault: Fault | None):
        self.folder = f"{folder}/"
        self.fault = fault
        self.labels: list[str] = []
        self._being_written: str | None = None
        self._removes_tree = False

    def reached(self, label: str, writes: str | None = None) -> None:
        """An event is about to happen.

        Args:
            label (`str`): What it is.
            writes (`str`, *optional*): The file that is written from now on, which a death at the next event tears.
        """
        self.labels.append(label)
        if self.fault is not None and len(self.labels) == self.fault.number:
            if self.fault.command is not None:
                subprocess.run(self.fault.command, check=True)
            else:
                if self.fault.torn is not None and self._being_written is not None:
                    _tear(Path(self._being_written), self.fault.torn)
                os.kill(os.getpid(), signal.SIGKILL)
        self._being_written = writes

    # ---- Files ------------------------------------------------------------------------------------------------------

    def watch_files(self) -> None:
        """Count Python's file operations; what libraries write by themselves is in [`watch_saving`]."""
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # what a thread does comes at another place each time
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & _WRITES and self._is_ours(path):
                self.reached(f"open {self._kind(path)}", writes=str(path))
        elif event in _OPERATIONS:
            path = arguments[_OPERATIONS[event]]
            # What a folder that is being removed contains goes by names relative to it.
            inside = event in ("os.remove", "os.rmdir") and arguments[1] != -1
            if inside and self._removes_tree:
                self.reached(f"{event} in a folder that is removed")
            elif self._is_ours(path):
                self._removes_tree = event == "shutil.rmtree"
                self.reached(f"{event} {self._kind(path)}")

    def _is_ours(self, path: Any) -> bool:
        return isinstance(path, (str, Path)) and str(path).startswith(self.folder)

    def _kind(self, path: Any) -> str:
        """A name without numbers, digests and process ids, so that files of one kind have the same."""
        name = re.sub(r"[0-9a-f]{16,}", "*", str(path).removeprefix(self.folder))
        return re.sub(r"\d+", "N", name)

    def watch_saving(self, trainer: GRPOTrainer) -> None:
        """Count what writes files from outside Python: weights and everything of `torch.save`."""
        save_model, save = trainer.save_model, torch.save

        def watched_model(output_dir: Any = None, *arguments: Any, **options: Any) -> None:
            self.reached("before save_model")
            save_model(output_dir, *arguments, **options)
            if output_dir is not None:
                self._being_written = str(Path(output_dir) / "model.safetensors")
            self.reached("after save_model")

        def watched(value: Any, place: Any, *arguments: Any, **options: Any) -> None:
            name = Path(place).name if isinstance(place, (str, Path)) else "a buffer"
            self.reached(f"before torch.save {name}")
            save(value, place, *arguments, **options)
            self._being_written = str(place) if self._is_ours(place) else None
            self.reached(f"after torch.save {name}")

        trainer.save_model = watched_model
        torch.save = watched

    # ---- Steps ------------------------------------------------------------------------------------------------------

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.reached("training begins")

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.reached("epoch begins")

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.reached("step begins")

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        self.reached("substep ends")

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.reached("optimizer steps")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.reached("step ends")

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.reached("epoch ends")

    def on_save(self, *_: Any, **__: Any) -> None:
        self.reached("saved")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.reached("training ends")

    def watched(self, reward: Callable[..., list[float]]) -> Callable[..., list[float]]:
        """A reward whose calls are events: a generation has been made, and has not been used."""

        def watched_reward(*arguments: Any, **columns: Any) -> list[float]:
            self.reached("rollouts are rewarded")
            return reward(*arguments, **columns)

        watched_reward.__name__ = reward.__name__
        return watched_reward


def _tear(path: Path, share: float) -> None:
    """What a process leaves that dies while it writes."""
    if path.is_file():
        os.truncate(path, int(path.stat().st_size * share))
