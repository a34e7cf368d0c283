"""Names of TRL that are not its public interface, declared beside their use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trl.trainer import utils as trl_utils

if TYPE_CHECKING:
    from trl import GRPOTrainer


@dataclass(frozen=True)
class Required:
    """What a file of the bridge needs of TRL.

    Args:
        trainer (`tuple[str]`): Attributes and methods of the trainer.
        utils (`tuple[str]`): Names in `trl.trainer.utils`.
        sometimes (mapping): Attributes that are there when something is switched on: name → when.
        later (`tuple[str]`): Attributes that TRL makes for a batch of rollouts; nothing can be checked before.
    """

    trainer: tuple[str, ...] = ()
    utils: tuple[str, ...] = ()
    sometimes: Mapping[str, Callable[[GRPOTrainer], bool]] = field(default_factory=dict)
    later: tuple[str, ...] = ()

    @property
    def of_trainer(self) -> set[str]:
        """All attributes of the trainer, whenever they are there."""
        return {*self.trainer, *self.sometimes, *self.later}


def missing_names(trainer: GRPOTrainer, needs: Iterable[Required]) -> list[str]:
    """Names that this trainer, or this TRL, lacks; sorted.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        needs (iterable of `Required`): What the files need.
    """
    needs = list(needs)
    missing = {name for need in needs for name in need.trainer if not hasattr(trainer, name)}
    if not missing:  # whether something is switched on is asked of the trainer's other attributes
        switched = {
            name for need in needs for name, used in need.sometimes.items() if used(trainer)
        }
        missing = {name for name in switched if not hasattr(trainer, name)}
    missing |= {
        f"trl.trainer.utils.{name}"
        for need in needs
        for name in need.utils
        if not hasattr(trl_utils, name)
    }
    return sorted(missing)
