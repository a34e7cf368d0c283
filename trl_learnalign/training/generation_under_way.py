"""The generation under way, kept with a checkpoint: it may feed several optimizer steps.

A run that stops between them goes on with the same completions, so each process keeps its own.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save

from trl_learnalign import bridge
from trl_learnalign.records.layout import generation
from trl_learnalign.records.seal import Mark
from trl_learnalign.records.store import write_atomically

if TYPE_CHECKING:
    from trl import GRPOTrainer

logger = logging.getLogger(__name__)


def save_generation(trainer: GRPOTrainer, folder: Path) -> None:
    """Keep this process's generation under way, if there is one.

    Args:
        trainer (`GRPOTrainer`): The trainer, between two steps.
        folder (`Path`): The checkpoint.
    """
    batches = bridge.buffered_generation(trainer)
    if batches is None:
        return
    tensors = {
        f"{i}/{name}": value.detach().cpu().clone()  # slices of a generation may share memory
        for i, batch in enumerate(batches)
        for name, value in batch.items()
        if isinstance(value, torch.Tensor)
    }
    write_atomically(folder / generation(trainer.accelerator.process_index), save(tensors))


def load_generation(trainer: GRPOTrainer, folder: Path, mark: Mark) -> None:
    """Go on with the generation that a checkpoint was saved in, if it was saved in the middle of one.

    With another number of processes the completions of the others are out of reach: the same prompts are rolled out
    again.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        folder (`Path`): The checkpoint.
        mark (`Mark`): Its mark.
    """
    if not bridge.is_mid_generation(trainer):
        return
    if not mark.mid_generation or mark.processes != trainer.accelerator.num_processes:
        logger.warning(
            "Step %d is in the middle of a generation, and its completions were saved for %d process(es), not %d: the "
            "same prompts are rolled out again.",
            *(trainer.state.global_step, mark.processes, trainer.accelerator.num_processes),
        )
        return
    batches: dict[int, dict[str, Any]] = {}
    path = folder / generation(trainer.accelerator.process_index)
    for key, value in load_file(path).items():
        number, name = key.split("/", 1)
        batches.setdefault(int(number), {})[name] = value
    bridge.restore_generation(trainer, [batches[i] for i in sorted(batches)])
