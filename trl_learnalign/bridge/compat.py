"""Checks of the trainer, the launch and the TRL release; installs the sampler."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import trl
from accelerate.utils import DistributedType
from packaging.specifiers import SpecifierSet
from torch.utils.data import Sampler

from trl_learnalign.bridge import (
    dynamic_sampling,
    hooks,
    inference,
    objective,
    policy,
    requires,
    skipping,
)
from trl_learnalign.bridge.requires import Replaced, Required, missing_names

if TYPE_CHECKING:
    from trl import GRPOTrainer

logger = logging.getLogger(__name__)

REQUIRES = Required(calls={"_get_train_sampler": Replaced(("dataset",))})
NEEDS = (
    REQUIRES,
    *inference.WATCH_NEEDS,
    hooks.ORDER_REQUIRES,
    hooks.REQUIRES,
    hooks.EPOCHS_REQUIRES,
    hooks.SAVING_REQUIRES,
    inference.GENERATION_REQUIRES,
    policy.CAPTURE_REQUIRES,
    policy.LM_HEAD_REQUIRES,
    objective.REQUIRES,
    objective.REWARDS_REQUIRES,
    inference.READING_REQUIRES,
    requires.METRICS_REQUIRES,
    requires.UNWRAP_REQUIRES,
    policy.WEIGHTS_REQUIRES,
)
"""Requirements of the modules without which nothing works."""

OPTIONAL = (*dynamic_sampling.NEEDS, *skipping.NEEDS)
"""Requirements of optional features, which `dynamic_sampling_problem` and `install_skipping` refuse separately."""

SUPPORTED_TRL = SpecifierSet(f">={requires.OLDEST}")


def check_trainer(trainer: GRPOTrainer) -> None:
    """Check that this is a `GRPOTrainer`, and that the installed TRL has the names and signatures the bridge needs.

    An untested release that has all of them is used, with one warning line.

    Raises:
        `TypeError`: If it is something else, naming it.
        `RuntimeError`: Naming the installed and the supported versions, and what is missing.
    """
    if any(kind.__name__ == "AsyncGRPOTrainer" for kind in type(trainer).__mro__):
        raise TypeError(
            f"The first argument is a {type(trainer).__name__}, an AsyncGRPOTrainer, which generates rollouts ahead "
            "of training for prompts that are not selected yet. Use GRPOTrainer with this callback, or select a "
            "subset beforehand with trl-learnalign select and give AsyncGRPOTrainer that dataset."
        )
    if not isinstance(trainer, trl.GRPOTrainer):
        raise TypeError(
            f"The first argument is a {type(trainer).__name__}: give a GRPOTrainer, and then the settings, as in "
            "LearnAlignCallback(trainer, config). Prompts are scored by GRPO's rollouts and gradients, which other "
            "trainers do not have."
        )
    installed = (
        f"trl {trl.__version__} is installed, but trl_learnalign supports trl{SUPPORTED_TRL}"
    )
    if requires.is_before(requires.OLDEST):
        raise RuntimeError(f"{installed}. Install a tested version: {requires.REMEDY}.")
    missing = missing_names(trainer, NEEDS)
    if missing:
        raise RuntimeError(
            f"{installed} if all names that it needs exist; this trainer lacks {'; '.join(missing)}. Install a "
            f"tested version: {requires.REMEDY}.{requires.hint()}"
        )
    if not requires.is_tested() and trainer.accelerator.is_main_process:
        logger.warning("%s", requires.untested_notice())


def check_launch(trainer: GRPOTrainer) -> None:
    """Check that the launched processes train one model together.

    Raises:
        `RuntimeError`: If each process would silently train its own model, or sharding was silently not applied.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    found = trainer.accelerator.num_processes
    if launched != found:
        raise RuntimeError(
            f"The launcher started {launched} processes, but this one sees {found}, so each would train a model of "
            "its own. On CPUs set use_cpu=True in the GRPOConfig; on GPUs check that every process sees one."
        )
    kind = trainer.accelerator.distributed_type
    if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true" and kind != DistributedType.FSDP:
        raise RuntimeError(
            f"FSDP was requested, but accelerate runs {kind.value}, since it does not shard on CPUs. Use GPUs, or "
            "another accelerate config."
        )
    if is_fsdp1(trainer):
        raise RuntimeError(
            "FSDP version 1 flattens the parameters of several layers into one, so their gradients cannot be "
            "separated: set fsdp_version: 2 in the accelerate config (accelerate_configs/fsdp2.yaml)."
        )


def is_fsdp1(trainer: GRPOTrainer) -> bool:
    """Whether the model is wrapped by FSDP's first version."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    return trainer.is_fsdp_enabled and getattr(plugin, "fsdp_version", 1) == 1


def install_sampler(trainer: GRPOTrainer, sampler: Sampler[int]) -> None:
    """Make the trainer's dataloader draw from `sampler`; the override is on the instance, not on the class."""
    trainer._get_train_sampler = lambda dataset=None: sampler  # type: ignore[method-assign]
