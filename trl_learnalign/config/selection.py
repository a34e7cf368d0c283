"""How the prompts of a stage are chosen among its candidates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from trl_learnalign.config.base import setting
from trl_learnalign.config.checks import (
    Check,
    as_list,
    did_you_mean,
    is_function_path,
    shown,
    whole,
)
from trl_learnalign.config.stages import Stages

SELECTOR_NAMES = (
    "learnalign",
    "learnalign_coverage",
    "learnalign_logdet",
    "learnability",
    "alignment",
    "gradient_dot",
    "validation_alignment",
    "feature_similarity",
    "random",
    "token_length",
    "ppl_top",
    "ppl_middle",
    "ifd",
    "selectit",
    "limr",
    "reward_variance",
)
"""What `trl_learnalign.selectors.SELECTORS` holds, known here so that a slip of the pen is found out at once."""


def selector_names(remedy: str) -> Check:
    """A selector's name or several: a name by itself if it is the only one, else a list.

    A name is in the table, or a dotted path, which is looked at when a run begins.

    Args:
        remedy (`str`): What to give instead of something that is no name.
    """

    def check_names(name: str, value: Any) -> str | list[str]:
        names = as_list(value)
        if not names or not all(isinstance(item, str) and item for item in names):
            raise ValueError(f"{name}={shown(value)}: {remedy}.")
        for item in names:
            if item not in SELECTOR_NAMES and not is_function_path(item):
                raise ValueError(
                    f"{name}={shown(item)}: choose one of {', '.join(map(repr, SELECTOR_NAMES))}, or name a function "
                    f"of your own as 'package.module:function'{did_you_mean(item, SELECTOR_NAMES)}"
                )
        return names[0] if len(names) == 1 else names

    return check_names


ForEachStage = Annotated[
    str | list[str], selector_names("give a name, or a list with one name for each stage")
]


@dataclass
class Selection(Stages):
    """Selection: how a stage's prompts are chosen.

    Builds on [`Stages`], since selectors can be given for each stage.
    """

    selector: ForEachStage = setting(
        ["learnalign_coverage"],
        "How prompts are ranked: a name in `trl_learnalign.selectors.SELECTORS`, or your own function "
        "(pool) -> scores as 'package.module:function'. One for all stages, or one for each.",
    )
    unbiased_learnability: bool = setting(
        False,
        "Learnability k (G - k) / (G (G - 1)), the unbiased estimate of p (1 - p) from k successes in G scorable "
        "rollouts, instead of the paper's plug-in k (G - k) / G^2.",
    )
    exclude_self: bool = setting(
        False,
        "Leave a prompt's alignment with itself (j = i) out of its average over the pool; the paper includes it.",
    )
    reliability: bool = setting(
        False,
        "Also rank by each half of the rollouts, and record how well the two rankings agree and what more "
        "rollouts would give. Costs no further pass, and twice the disk of the features; num_generations must be "
        "even.",
    )
    pool_sample: Annotated[int | None, whole(2)] = setting(
        None,
        "Score only this many of a stage's candidates: a seeded random subset, larger ones containing the smaller "
        "ones. The others have no score and are selected only to fill a stage larger than the subset.",
    )
    gradient_rollouts: Literal["all", "one_correct"] = setting(
        "all",
        "Rollouts that a prompt's gradient is taken of: 'all', or 'one_correct', its first successful one (with "
        "the advantage that the group gave it): 1/G of the capture cost.",
    )

    @property
    def selectors(self) -> list[str]:
        """Name of each stage's selector."""
        names = as_list(self.selector)
        return names * len(self.stages) if len(names) == 1 else names

    def _check_together(self) -> None:
        super()._check_together()
        self._match_selectors()
        if self.reliability and self.gradient_rollouts == "one_correct":
            raise ValueError(
                "reliability=True compares gradients of two halves of the rollouts, and "
                "gradient_rollouts='one_correct' takes a single one: set gradient_rollouts='all' or reliability=False."
            )

    def _match_selectors(self) -> None:
        names = as_list(self.selector)
        if len(names) not in (1, len(self.stages)):
            raise ValueError(
                f"selector={names} for {len(self.stages)} stage(s): give one name, or one for each stage."
            )
