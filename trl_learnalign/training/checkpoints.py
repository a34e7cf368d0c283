"""What a checkpoint of transformers lacks: the generation under way, a moving reference, and a sign that it is whole.

A generation may feed several optimizer steps. A run that stops between them must go on with the same completions, so
each process keeps its own with the checkpoint. A reference model that follows the policy (`sync_ref_model`) is part
of the objective, and TRL does not save it. And a process that dies while it saves leaves a folder that looks like
a checkpoint: resuming picks the last one in which everything is there.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

from trl_learnalign import bridge
from trl_learnalign.records.layout import COMPLETE, REFERENCE, generation
from trl_learnalign.records.store import write_atomically, write_json

if TYPE_CHECKING:
    from trl import GRPOTrainer

logger = logging.getLogger(__name__)


def checkpoint_folder(trainer: GRPOTrainer) -> Path:
    """Where transformers saves the checkpoint of the current step."""
    return Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"


def resumed_folder(trainer: GRPOTrainer) -> Path | None:
    """The checkpoint that a run was resumed from: transformers does not tell its callbacks."""
    for folder in (trainer.args.resume_from_checkpoint, checkpoint_folder(trainer)):
        state = _read_json(Path(str(folder)) / "trainer_state.json")
        if state is not None and state.get("global_step") == trainer.state.global_step:
            return Path(str(folder))
    return None


def save_generation(trainer: GRPOTrainer, folder: Path) -> None:
    """Keep this process's generation under way, if there is one; all processes call it together.

    Args:
        trainer (`GRPOTrainer`): The trainer, right after it has saved a checkpoint.
        folder (`Path`): The checkpoint.
    """
    accelerator = trainer.accelerator
    batches = bridge.buffered_generation(trainer)
    if batches is not None:
        tensors = {
            f"{i}/{name}": value.detach().cpu().clone()  # slices of a generation may share memory
            for i, batch in enumerate(batches)
            for name, value in batch.items()
            if isinstance(value, torch.Tensor)
        }
        write_atomically(_generation_path(folder, accelerator.process_index), save(tensors))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(
            folder / COMPLETE,
            {"processes": accelerator.num_processes, "mid_generation": batches is not None},
        )


def load_generation(trainer: GRPOTrainer) -> None:
    """Go on with the generation that the resumed checkpoint was saved in, if it was saved in the middle of one.

    With another number of processes the completions of the others are out of reach: the same prompts are rolled out
    again.
    """
    if not bridge.is_mid_generation(trainer):
        return
    folder = resumed_folder(trainer)
    mark = _read_json(folder / COMPLETE) if folder else None
    path = _generation_path(folder, trainer.accelerator.process_index) if folder else None
    if (
        path is None
        or not path.exists()
        or not mark
        or mark["processes"] != trainer.accelerator.num_processes
    ):
        logger.warning(
            "Step %d is in the middle of a generation, and its completions were not saved for %d process(es): the "
            "same prompts are rolled out again.",
            *(trainer.state.global_step, trainer.accelerator.num_processes),
        )
        return
    batches: dict[int, dict[str, Any]] = {}
    for key, value in load_file(path).items():
        number, name = key.split("/", 1)
        batches.setdefault(int(number), {})[name] = value
    bridge.restore_generation(trainer, [batches[i] for i in sorted(batches)])


def save_weights(
    trainer: GRPOTrainer, path: Path, parameters: Iterable[tuple[str, nn.Parameter]]
) -> None:
    """Write parameters in one piece each; all processes call it together, the main one writes."""
    weights = {}
    for name, parameter in parameters:
        with bridge.whole(trainer, parameter) as whole:
            if trainer.accelerator.is_main_process:
                weights[name] = whole.cpu().clone()
    if trainer.accelerator.is_main_process:
        write_atomically(path, save(weights))
    trainer.accelerator.wait_for_everyone()


@torch.no_grad()
def load_reference(trainer: GRPOTrainer, path: Path) -> None:
    """Give the reference model the weights that [`save_weights`] wrote; all processes call it together."""
    weights = load_file(path)
    for name, parameter in trainer.ref_model.named_parameters():
        with bridge.whole(trainer, parameter, write=True) as whole:
            whole.copy_(weights[name])


def _has_moved_reference(trainer: GRPOTrainer) -> bool:
    """Whether the reference has followed the policy by now: it does so at every `ref_model_sync_steps`-th step."""
    return (
        trainer.args.sync_ref_model
        and trainer.state.global_step >= trainer.args.ref_model_sync_steps
    )


def save_reference(trainer: GRPOTrainer, folder: Path) -> None:
    """Keep a reference that has moved with the checkpoint; all processes call it together."""
    if _has_moved_reference(trainer):
        save_weights(trainer, folder / REFERENCE, trainer.ref_model.named_parameters())


def restore_reference(trainer: GRPOTrainer) -> None:
    """Go on with the reference that the resumed checkpoint was saved with; all processes call it together.

    Raises:
        `ValueError`: If the reference has moved and was not kept.
    """
    if not _has_moved_reference(trainer):
        return
    folder = resumed_folder(trainer)
    if folder is None or not (folder / REFERENCE).exists():
        raise ValueError(
            f"The checkpoint at step {trainer.state.global_step} cannot be resumed with sync_ref_model=True: by then "
            f"the reference model had moved, TRL does not save it, and {REFERENCE} is not in the checkpoint (an "
            "earlier version wrote it). The objective would be another one. Start anew with another output_dir, or "
            "set sync_ref_model=False."
        )
    load_reference(trainer, folder / REFERENCE)


def _generation_path(folder: Path, rank: int) -> Path:
    return folder / generation(rank)


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The checkpoint with the highest step that is whole, or `None`; says so about those that are not."""
    found = []
    for folder in Path(output_dir).glob("checkpoint-*"):
        if match := re.fullmatch(r"checkpoint-(\d+)", folder.name):
            found.append((int(match[1]), folder))
    for _, folder in sorted(found, reverse=True):
        if (problem := incompleteness(folder)) is None:
            return folder
        logger.warning("%s is not used: %s; its save was interrupted.", folder, problem)
    return None


def incompleteness(folder: Path) -> str | None:
    """What a checkpoint lacks, or `None` if it is whole."""
    mark = _read_json(folder / COMPLETE)
    if mark is None:
        return f"{COMPLETE} is missing or cannot be read"
    if _read_json(folder / "trainer_state.json") is None:
        return "trainer_state.json is missing or cannot be read"
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{path.name} cannot be read ({error})"
    return None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
