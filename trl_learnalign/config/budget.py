"""How much a run may spend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from trl_learnalign.config.base import setting
from trl_learnalign.config.checks import optional, ranged
from trl_learnalign.config.ordering import Ordering


@dataclass
class Budget(Ordering):
    """Equal compute: runs that end when so much is spent."""

    compute_budget: Annotated[float | None, optional(ranged(1, 1e30))] = setting(
        None,
        "End the last stage once the run has spent this much compute, warm-up and scoring included: in tokens of a "
        "forward pass, like forward_equivalents in the ledger of another run, which it can then be compared with. "
        "stage_steps is the most that the stage takes. Default: its steps end it.",
    )
