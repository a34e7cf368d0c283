"""The settings of a run, put together from their parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from trl_learnalign.config.adaptive import Adaptive
from trl_learnalign.config.budget import Budget
from trl_learnalign.config.ordering import Ordering
from trl_learnalign.config.plateau import Plateau
from trl_learnalign.config.records import Records
from trl_learnalign.config.rollout_budget import RolloutBudget
from trl_learnalign.config.scoring import Scoring
from trl_learnalign.config.selection import Selection
from trl_learnalign.config.selector_options import SelectorOptions
from trl_learnalign.config.story import Story
from trl_learnalign.config.success import Success
from trl_learnalign.config.tables import Tables

PAPER: dict[str, Any] = {
    "warmup_samples": 300,
    "stages": [0.5, 0.3, 0.2],
    "stage_epochs": [1],
    "selector": "learnalign",
    "order": "shuffled",
    "skip_zero_advantages": False,
    "skip_forced_scoring": False,
}
"""Where the paper's staged run differs from the defaults."""


# Read from below: a dataclass has the fields of its last base first (Selection's begin with those of Stages). A new
# part goes to the top, so that the settings of before keep their places.
@dataclass
class LearnAlignConfig(
    Tables,
    RolloutBudget,
    Story,
    Budget,
    Adaptive,
    Ordering,
    Records,
    Plateau,
    Scoring,
    Success,
    SelectorOptions,
    Selection,
):
    r"""Settings of warm-up, scoring, selection and stages; the trainer's own settings stay in its `GRPOConfig`.

    By default the whole pool is trained on in adaptive order, as long as the trainer says, and rollouts without an
    advantage are left out of the backward pass: what did best at equal compute (`docs/results.md`). With `stages` a
    subset is chosen. [`LearnAlignConfig.paper`] has the paper's settings: Li et al., *LearnAlign*, Findings of ACL
    2026 (arXiv 2506.11480).

    Field names do not clash with those of `GRPOConfig` and `ModelConfig`, so `TrlParser` reads all of them from one
    command line or YAML file.

    Raises:
        `ValueError`: At construction, naming the value and the remedy.
    """

    @classmethod
    def paper(cls, **settings: Any) -> Self:
        """The paper's staged run: warm-up on 300 prompts, then stages of 50 %, 30 % and 20 % chosen by LearnAlign.

        Learning rate, G, `beta`, `epsilon` and the weights of the rewards are the trainer's: the paper's stand in
        `recipes/configs/gsm8k_staged.yaml`. A cell of its Table 1, N prompts chosen once for the base model, is
        `recipes/configs/table1_gsm8k.yaml`.

        Args:
            settings: Settings by name that are to differ.

        Raises:
            `TypeError`: If there is no such setting.
            `ValueError`: As at construction.
        """
        return cls(**{**PAPER, **settings})

    def _check_together(self) -> None:
        super()._check_together()
        for name in ("compute_budget", "plateau_patience"):
            value = getattr(self, name)
            if value and self.leaves_the_order:
                raise ValueError(
                    f"{name}={value:g} with order='trainer': in the trainer's own order a run has the trainer's own "
                    "number of steps. Choose order='shuffled', which trains on the whole pool likewise."
                )
