"""A reference model that follows the policy (`sync_ref_model`): part of the objective, and TRL does not save it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save
from torch import nn

from trl_learnalign import bridge
from trl_learnalign.records.layout import REFERENCE
from trl_learnalign.records.store import write_atomically

if TYPE_CHECKING:
    from trl import GRPOTrainer


def save_weights(
    trainer: GRPOTrainer,
    parameters: Iterable[tuple[str, nn.Parameter]],
    write: Callable[[bytes], object],
) -> None:
    """Write parameters in one piece each; all processes call it together, the main one writes."""
    weights = {}
    for name, parameter in parameters:
        with bridge.whole(trainer, parameter) as whole:
            if trainer.accelerator.is_main_process:
                weights[name] = whole.cpu().clone()
    if trainer.accelerator.is_main_process:
        write(save(weights))
    trainer.accelerator.wait_for_everyone()


@torch.no_grad()
def load_reference(trainer: GRPOTrainer, path: Path) -> None:
    """Give the reference model the weights that [`save_weights`] wrote; all processes call it together."""
    weights = load_file(path)
    for name, parameter in trainer.ref_model.named_parameters():
        with bridge.whole(trainer, parameter, write=True) as whole:
            whole.copy_(weights[name])


def save_reference(trainer: GRPOTrainer, folder: Path) -> None:
    """Keep a reference that has moved with the checkpoint; all processes call it together."""
    if _has_moved(trainer):
        write = partial(write_atomically, folder / REFERENCE)
        save_weights(trainer, trainer.ref_model.named_parameters(), write)


def restore_reference(trainer: GRPOTrainer, folder: Path) -> None:
    """Go on with the reference that the checkpoint was saved with; all processes call it together.

    Raises:
        `ValueError`: If the reference had moved and was not kept.
    """
    if not _has_moved(trainer):
        return
    if not (folder / REFERENCE).exists():
        raise ValueError(
            f"The checkpoint at step {trainer.state.global_step} cannot be resumed with sync_ref_model=True: by then "
            f"the reference model had moved, TRL does not save it, and {REFERENCE} is not in the checkpoint. The "
            "objective would be another one. Start anew with another output_dir, or set sync_ref_model=False."
        )
    load_reference(trainer, folder / REFERENCE)


def _has_moved(trainer: GRPOTrainer) -> bool:
    """Whether the reference has followed the policy by now: it does so at every `ref_model_sync_steps`-th step."""
    return (
        trainer.args.sync_ref_model
        and trainer.state.global_step >= trainer.args.ref_model_sync_steps
    )
