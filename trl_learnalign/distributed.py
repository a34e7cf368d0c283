"""Collectives between ranks."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator


class Ranks:
    """The processes of a run. Every method except the properties is a collective: all ranks call it together.

    Args:
        accelerator (`Accelerator`, *optional*): The trainer's; without it, this is the only process.
    """

    def __init__(self, accelerator: Accelerator | None = None):
        self._accelerator = accelerator

    @property
    def index(self) -> int:
        """This rank."""
        return 0 if self._accelerator is None else self._accelerator.process_index

    @property
    def count(self) -> int:
        """Number of ranks."""
        return 1 if self._accelerator is None else self._accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this rank writes records and prints messages."""
        return self.index == 0

    def all_sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, on the tensor's device. Exact for integers, and if only one rank has nonzero values."""
        if self._accelerator is None or self.count == 1:
            return tensor
        # Collectives only work on the accelerator's device.
        on_device = tensor.to(self._accelerator.device)
        total = self._accelerator.reduce(on_device, reduction="sum")
        return total.to(tensor.device)

    def most(self, values: list[Any]) -> list[Any]:
        """Elementwise maximum over ranks."""
        return [max(column) for column in zip(*self.gather([values]), strict=True)]

    def gather(self, values: list[Any]) -> list[Any]:
        """Concatenation of the lists of all ranks, on every rank."""
        return gather_object(values) if self.count > 1 else values

    def from_main(self, value: Any) -> Any:
        """The main rank's value."""
        if self.count == 1:
            return value
        return broadcast_object_list([value])[0]

    def wait(self) -> None:
        """Wait until all ranks have reached this call."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()

    def agree(self, what: str, value: Any) -> None:
        """Check that all ranks have the same value.

        Args:
            what (`str`): Name of the value, for the message.
            value (JSON-able): This rank's value.

        Raises:
            `RuntimeError`: On every rank, if they differ.
        """
        content = json.dumps(value, sort_keys=True).encode()
        digest = hashlib.blake2b(content, digest_size=8).hexdigest()
        digests = self.gather([digest])
        if len(set(digests)) > 1:
            raise RuntimeError(
                f"Ranks disagree on {what}: {dict(enumerate(digests))} (rank: digest). All ranks must run the same "
                "script with the same arguments, dataset and library versions."
            )
