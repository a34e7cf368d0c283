"""From trl 1.16 on, unwrapping a model for generation takes the settings of gradient checkpointing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trl_learnalign.bridge.required import Called, Required
from trl_learnalign.bridge.versions import releases

if TYPE_CHECKING:
    from trl import GRPOTrainer

_ALWAYS = ("gather_deepspeed3_params",)
_SINCE_1_16 = ("gradient_checkpointing_kwargs",)

NAMES = _ALWAYS if releases.is_before("1.16") else (*_ALWAYS, *_SINCE_1_16)

REQUIRES = Required(functions={"trl.models.utils:unwrap_model_for_generation": Called(2, NAMES)})


def unwrapping_options(trainer: GRPOTrainer) -> dict[str, Any]:
    """Keywords of `trl.models.utils.unwrap_model_for_generation`, as TRL gives them itself."""
    options = {
        "gather_deepspeed3_params": trainer.args.ds3_gather_for_generation,
        "gradient_checkpointing_kwargs": trainer.args.gradient_checkpointing_kwargs,
    }
    return {name: options[name] for name in NAMES}
