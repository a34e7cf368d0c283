"""`after_warmup="restart"`: weights, optimizer and schedule back to their initial state, as if no warm-up had been.

So are what moved with them: a reference that follows the policy (`sync_ref_model`), an adaptive entropy coefficient.
The initial trainable weights are kept on disk, so that a run that is interrupted during warm-up or scoring can still
go back to them.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from trl_learnalign import bridge
from trl_learnalign.records.layout import INITIAL_REFERENCE, INITIAL_WEIGHTS
from trl_learnalign.records.run import RunRecord
from trl_learnalign.records.store import StoreError
from trl_learnalign.training.moving_reference import load_reference, save_weights

if TYPE_CHECKING:
    from trl import GRPOTrainer

logger = logging.getLogger(__name__)


class InitialState:
    """The trainable weights and the optimizer as they were before the first step.

    Args:
        trainer (`GRPOTrainer`): The trainer, prepared for training.
        record (`RunRecord`): In whose folder the weights are kept.
    """

    def __init__(self, trainer: GRPOTrainer, record: RunRecord):
        self.trainer = trainer
        self.record = record

    def save(self) -> None:
        """Keep the weights; called before the first step, by all processes together."""
        save_weights(self.trainer, self._trainable(), partial(self._write, INITIAL_WEIGHTS))
        if self.trainer.args.sync_ref_model:
            parameters = self.trainer.ref_model.named_parameters()
            save_weights(self.trainer, parameters, partial(self._write, INITIAL_REFERENCE))
        self.record.save()

    def _write(self, name: str, content: bytes) -> None:
        self.record.write_file(name, content)

    def check(self) -> None:
        """Check what is kept; on the main process.

        Raises:
            `StoreError`: If it is missing or damaged, naming the file.
        """
        names = [
            INITIAL_WEIGHTS,
            *([INITIAL_REFERENCE] if self.trainer.args.sync_ref_model else []),
        ]
        for path in [self.record.folder / name for name in names]:
            problem = self.record.problem_of(path)
            if problem is not None:
                raise StoreError(
                    f"{path} {problem}, so after_warmup='restart' cannot go back to the initial weights: restore "
                    "that file, or start the run anew with another output_dir."
                )

    def restore(self) -> None:
        """Put weights, optimizer, a moving reference and the entropy coefficient back; by all processes together.

        Raises:
            `StoreError`: If the kept weights are missing or damaged.
        """
        if self.record.writes:
            self.check()
        weights = load_file(self.record.folder / INITIAL_WEIGHTS)
        with torch.no_grad():
            for name, parameter in self._trainable():
                with bridge.whole(self.trainer, parameter, write=True) as whole:
                    whole.copy_(weights[name])
                if bridge.zero_stage(self.trainer):
                    _write_master_copy(parameter, weights[name])
        if bridge.zero_stage(self.trainer):
            _reset_partitioned_states(self.trainer.optimizer)
        else:
            optimizer = self.trainer.optimizer
            # Loading a state dict without state is how every torch optimizer is told to begin anew.
            optimizer.load_state_dict(
                {"state": {}, "param_groups": optimizer.state_dict()["param_groups"]}
            )
        bridge.weights_changed(self.trainer)
        if self.trainer.args.sync_ref_model:
            load_reference(self.trainer, self.record.folder / INITIAL_REFERENCE)
        bridge.reset_entropy_controller(self.trainer)

    def _trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.trainer.model.named_parameters() if p.requires_grad]


def _write_master_copy(parameter: nn.Parameter, weights: torch.Tensor) -> None:
    """DeepSpeed ZeRO trains a float32 copy of its own, which the next step would write over the weights."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if hasattr(parameter, "ds_tensor"):
        # The full setter refuses parameters that do not divide evenly among the ranks; the local one takes the piece
        # (padding included) that the weights just written were cut into.
        safe_set_local_fp32_param(parameter, parameter.ds_tensor.detach().float())
    else:
        safe_set_full_fp32_param(parameter, weights.float().to(parameter.device))


def _reset_partitioned_states(optimizer: Any) -> None:
    """Moments and step counters of a ZeRO optimizer back to zero, in place: DeepSpeed holds views of them."""
    while hasattr(optimizer, "optimizer"):  # accelerate wraps DeepSpeed, which wraps torch's
        optimizer = optimizer.optimizer
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                value.zero_()
            elif name == "step":
                state[name] = 0
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = 0


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
