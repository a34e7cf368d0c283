"""The settings of a selection without training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from trl_learnalign.config.fields import as_list, at_least, each, selector_names, setting
from trl_learnalign.config.learnalign import LearnAlignConfig


@dataclass
class SubsetConfig(LearnAlignConfig):
    """Settings of a selection without training; settings of stages have no effect.

    Raises:
        `ValueError`: At construction, if a value is invalid, naming the value and the remedy.
    """

    SECTIONS: ClassVar[dict[str, str]] = {
        **LearnAlignConfig.SECTIONS,
        "top": "Subsets: their sizes and where they are written",
    }

    warmup_samples: Annotated[int, at_least(0)] = setting(
        0,
        "Prompts of a warm-up before scoring: a seeded random subset that is trained on. 0: none.",
    )
    selector: Annotated[str | list[str], selector_names("give one name, or several")] = setting(
        ["learnalign_coverage"],
        "How prompts are ranked: names in `trl_learnalign.selectors.SELECTORS`, or your own functions "
        "(pool) -> scores as 'package.module:function'. All of them rank the same pool.",
    )
    top: Annotated[list[int] | None, each(at_least(1))] = setting(
        None,
        "Sizes of the subsets, e.g. 100 500 1000 2000: nested, from one scoring pass. Default: stages, if they "
        "are counts.",
    )
    push_to_hub_id: str | None = setting(
        None,
        "Push the subsets to this dataset repository of the hub, as configurations <selector>_top_<N>.",
    )

    def __post_init__(self) -> None:
        asked = _counts(self.stages) if self.top is None else self.top
        if asked == []:
            raise ValueError(
                "The number of prompts to select is missing: give it with top, e.g. top=[1000]."
            )
        sizes = each(at_least(1))("top", asked)
        self.top = sorted(set(sizes))
        self.stages, self.stage_epochs, self.stage_steps = [max(2, self.top[-1])], [1], None
        self.after_warmup = "continue"  # no phase follows the warm-up
        super().__post_init__()

    def _match_selectors(self) -> None:
        names = list(dict.fromkeys(as_list(self.selector)))
        self.selector = names[0] if len(names) == 1 else names

    @property
    def selectors(self) -> list[str]:
        """Names of the selectors; all rank the same pool."""
        return as_list(self.selector)

    @property
    def sizes(self) -> list[int]:
        """Sizes of the subsets, ascending."""
        return as_list(self.top)


def _counts(stages: Any) -> list[Any]:
    """Return the values of `stages` that are counts; other values are no sizes."""
    return [value for value in as_list(stages) if isinstance(value, (int, float)) and value > 1]
