"""In trl 1.8, losses over a generation are divided by all tokens that were generated; since 1.9 by those that count.

The two differ where completions are masked for being cut off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trl_learnalign.bridge.versions import releases

if TYPE_CHECKING:
    from trl import GRPOTrainer


def token_count_problem(trainer: GRPOTrainer) -> str | None:
    """Why the tokens of a generation that was put together cannot be counted as TRL counts them, or `None`."""
    if releases.is_before("1.9") and trainer.mask_truncated_completions:
        return (
            "mask_truncated_completions: trl 1.8 divides by tokens that it masks, of completions that would not be "
            "there any more (trl 1.9 does not)"
        )
    return None
