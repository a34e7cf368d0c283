"""`after_warmup="restart"`: weights, optimizer and schedule back to their initial state, as if no warm-up had been.

The initial trainable weights are kept on disk, so that a run that is interrupted during warm-up or scoring can still
go back to them.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from trl_learnalign.store import StoreError, write_atomically

if TYPE_CHECKING:
    from trl import GRPOTrainer

logger = logging.getLogger(__name__)


class InitialState:
    """The trainable weights and the optimizer as they were before the first step.

    Args:
        trainer (`GRPOTrainer`): The trainer, prepared for training.
        path (`Path`): Where the weights are kept.
    """

    def __init__(self, trainer: GRPOTrainer, path: Path):
        self.trainer = trainer
        self.path = path

    def save(self) -> None:
        """Keep the weights; called before the first step."""
        if self.trainer.accelerator.is_main_process:
            weights = {name: p.detach().cpu().contiguous() for name, p in self._trainable()}
            write_atomically(self.path, save(weights))
        self.trainer.accelerator.wait_for_everyone()

    def restore(self) -> None:
        """Put weights and optimizer back.

        Raises:
            `StoreError`: If the kept weights are missing.
        """
        if not self.path.exists():
            raise StoreError(
                f"{self.path} is missing, so after_warmup='restart' cannot go back to the initial weights: restore "
                "that file, or start the run anew."
            )
        weights = load_file(self.path)
        with torch.no_grad():
            for name, parameter in self._trainable():
                parameter.copy_(weights[name])
        optimizer = self.trainer.optimizer
        assert optimizer is not None
        # Loading a state dict without state is how every torch optimizer is told to begin anew.
        fresh = copy.deepcopy({"state": {}, "param_groups": optimizer.state_dict()["param_groups"]})
        optimizer.load_state_dict(fresh)
        optimizer.zero_grad()

    def _trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.trainer.model.named_parameters() if p.requires_grad]


def split_schedule(trainer: GRPOTrainer, boundary: int, total: int) -> None:
    """Give warm-up and stages a learning-rate schedule each: the trainer's own, over their own number of steps.

    The schedule stays a pure function of the step, so it needs no state of its own to resume.

    Args:
        trainer (`GRPOTrainer`): The trainer, prepared for training.
        boundary (`int`): First step after the warm-up.
        total (`int`): Steps of the run.

    Raises:
        `ValueError`: If the schedule is not one that can be restarted.
    """
    scheduler = trainer.lr_scheduler
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"after_warmup='restart' cannot restart a schedule of type {type(scheduler).__name__} "
            f"(lr_scheduler_type={trainer.args.lr_scheduler_type}): choose one that depends on the step alone, e.g. "
            "'linear' or 'cosine', leave it out of the DeepSpeed config, or use after_warmup='continue'."
        )
    before, after = _multiplier(trainer, boundary), _multiplier(trainer, total - boundary)

    def multiplier(step: int) -> float:
        return before(step) if step < boundary else after(step - boundary)

    scheduler.lr_lambdas = [multiplier for _ in scheduler.lr_lambdas]
    rates = [base * multiplier(scheduler.last_epoch) for base in scheduler.base_lrs]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def _multiplier(trainer: GRPOTrainer, steps: int) -> Any:
    """Step → factor of the learning rate, as the trainer would make it for a run of `steps` steps."""
    args = trainer.args
    # Some schedules read the initial rate off the optimizer.
    stand_in = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    made = get_scheduler(
        args.lr_scheduler_type,
        optimizer=stand_in,
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    return made.lr_lambdas[0]
