"""What a part of the check is given: where it runs, and where it notes what came out. It imports nothing heavy."""

from __future__ import annotations

import gc
import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Errors that leave a CUDA context unusable: nothing after them can run in the same process.
LASTING = ("AcceleratorError", "CUDA error", "device-side assert")


class PartSkippedError(Exception):
    """A part that cannot run here; the message says why."""


@dataclass(frozen=True)
class Setting:
    """Where and how large a part runs.

    Args:
        device (`str`): `"cuda"` or `"cpu"`.
        small (`bool`): Tiny models: for the control flow alone.
        folder (`Path`): For what the part writes; deleted at the end of the check.
        other_gpu (`str`, *optional*): A second GPU of the machine, as CUDA_VISIBLE_DEVICES names it.
    """

    device: str
    small: bool
    folder: Path
    other_gpu: str | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether the device is CUDA."""
        return self.device == "cuda"


class Record:
    """Lines about the parts, which the watching process reads.

    Args:
        path (`Path`): The file; lines are appended.
    """

    def __init__(self, path: Path):
        self.path = path

    def write(self, event: str, **content: Any) -> None:
        """Append one line."""
        with self.path.open("a") as file:
            file.write(json.dumps({"event": event, **content}, default=str) + "\n")

    def add(self, check: str, passed: bool | None = None, **figures: Any) -> None:
        """Note one check.

        Args:
            check (`str`): What was checked.
            passed (`bool`, *optional*): How it came out; `None` for figures that are not judged.
            figures: By name, for the table.
        """
        print(f"{check}: {passed} {figures}", flush=True)
        self.write("check", check=check, passed=passed, figures=figures)

    @contextmanager
    def attempt(self, check: str) -> Iterator[None]:
        """An exception inside is the result of this check, and the part goes on; lasting CUDA errors end the part."""
        release_memory()
        try:
            yield
        except PartSkippedError as reason:
            self.add(check, None, note=f"skipped: {reason}")
        except Exception as error:
            traceback.print_exc()
            self.add(check, False, note=described(error))
            if any(sign in f"{type(error).__name__} {error}" for sign in LASTING):
                raise


def described(error: BaseException) -> str:
    """Type, message on one line, and the place that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:300]} ({Path(frame.filename).name}:{frame.lineno})"


def release_memory() -> None:
    """Let go of what an earlier check has left, on the GPU as well."""
    torch = sys.modules.get("torch")
    gc.collect()
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
