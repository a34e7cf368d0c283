"""One optimizer step's completions, on any number of processes: settings as given → the trainer's own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

ACCUMULATION = "gradient_accumulation_steps"
COMPLETIONS = "completions_per_step"


@dataclass(frozen=True)
class Batch:
    """How one optimizer step is put together.

    Args:
        per_device (`int`): Completions of one process's micro-step, `per_device_train_batch_size`.
        processes (`int`): Processes.
        accumulation (`int`): Micro-steps of one optimizer step, `gradient_accumulation_steps`.
    """

    per_device: int
    processes: int
    accumulation: int

    @property
    def completions(self) -> int:
        """Completions of one optimizer step, over all processes."""
        return self.per_device * self.processes * self.accumulation

    def __str__(self) -> str:
        return f"{self.per_device} per device x {self.processes} process(es) x {self.accumulation} accumulated"


def batch_of(completions: int, per_device: int, processes: int, group: int) -> Batch:
    """The batch with these completions per optimizer step, or with the nearest number that these processes can have.

    Args:
        completions (`int`): Wanted completions per optimizer step.
        per_device (`int`): Most completions of one process's micro-step: what fits into its memory.
        processes (`int`): Processes; each gets the same share of a step.
        group (`int`): A step holds a multiple of this many: `num_generations`, since TRL keeps the rollouts of a
            prompt in one batch; 1 if `steps_per_generation` or `generation_batch_size` say how many that is.

    Raises:
        `ValueError`: If a number is below 1, or `completions` is no multiple of `group`.
    """
    counts = {COMPLETIONS: completions, "per_device_train_batch_size": per_device}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}={value}: give a whole number of at least 1.")
    if completions % group:
        lower = completions // group * group
        nearest = f"{lower} or {lower + group}" if lower else str(group)
        raise ValueError(
            f"completions_per_step={completions} is no multiple of num_generations={group}: all rollouts of a prompt "
            f"belong to one step. Set it to {nearest}."
        )
    # So many on each process make whole groups over all of them.
    unit = group // math.gcd(group, processes)
    units = math.floor(completions / (unit * processes) + 0.5)  # the nearest; a half is rounded up
    share = max(1, units) * unit
    micro_steps = range(1, min(per_device, share) + 1)
    largest = max(size for size in micro_steps if share % size == 0)
    return Batch(largest, processes, share // largest)


def settle_batch(
    command_line: Mapping[str, int],
    file: Mapping[str, int],
    per_device: int,
    processes: int,
    group: int,
) -> tuple[Batch, list[str]]:
    """The batch of a run whose `completions_per_step`, `gradient_accumulation_steps` or both are given.

    The command line wins over the file; at the same place the two must agree.

    Args:
        command_line (mapping): Those of the two settings that are given on the command line.
        file (mapping): Those that are given in the YAML file.
        per_device (`int`): `per_device_train_batch_size`.
        processes (`int`): Processes.
        group (`int`): As in [`batch_of`].

    Returns:
        `tuple[Batch, list[str]]`: The batch, and what a user should know about it.

    Raises:
        `ValueError`: If the two contradict each other, or as in [`batch_of`].
    """
    # completions_per_step counts where it stands first; an accumulation on the command line overrules one from a file.
    is_in_file = COMPLETIONS not in command_line
    source = file if is_in_file else command_line
    wanted = source.get(COMPLETIONS, 0)
    batch = batch_of(wanted, per_device, processes, group)

    overruling = command_line.get(ACCUMULATION, batch.accumulation)
    if is_in_file and overruling != batch.accumulation:
        by_hand = Batch(per_device, processes, overruling)
        return by_hand, [
            f"gradient_accumulation_steps={overruling} was given on the command line: an optimizer step has "
            f"{by_hand.completions} completions ({by_hand}), not the {wanted} of completions_per_step."
        ]
    accumulation = source.get(ACCUMULATION, batch.accumulation)
    if accumulation != batch.accumulation:
        raise ValueError(_contradiction(wanted, batch, Batch(per_device, processes, accumulation)))
    return batch, _remarks(wanted, batch, per_device)


def _contradiction(wanted: int, batch: Batch, by_hand: Batch) -> str:
    return (
        f"completions_per_step={wanted} means gradient_accumulation_steps={batch.accumulation} ({batch}), but "
        f"gradient_accumulation_steps={by_hand.accumulation} is given too, which makes {by_hand.completions} "
        f"completions ({by_hand}): leave one of the two out."
    )


def _remarks(wanted: int, batch: Batch, per_device: int) -> list[str]:
    """What a user does not get as it was asked for."""
    if batch.completions != wanted:
        return [
            f"completions_per_step={wanted} cannot be had with {batch.processes} processes: an optimizer step has "
            f"{batch.completions} completions ({batch}). Take a number of processes that divides {wanted} to train "
            "with the same batch."
        ]
    share = wanted // batch.processes
    if batch.per_device < min(per_device, share):
        return [
            f"per_device_train_batch_size={per_device} does not divide the {share} completions of "
            f"a process's share of a step: taking {batch.per_device} ({batch})."
        ]
    return []
