"""How prompts are ranked: one function each, and one table of names.

A selector takes a [`Pool`] and returns a score for each candidate, `(P,)` float64: higher is better, NaN means that
the prompt cannot be ranked. What it needs to be measured is declared beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trl_learnalign.pool import Pool
from trl_learnalign.selectors.gradients import alignment, gradient_dot, learnalign
from trl_learnalign.selectors.simple import learnability, random

ROLLOUTS = "rollouts"
GRADIENTS = "gradients"


@dataclass(frozen=True)
class Selector:
    """A way to rank prompts.

    Args:
        name (`str`): As in `LearnAlignConfig.selector`.
        score (callable): `Pool -> (P,) float64`.
        needs (`frozenset[str]`): What has to be measured: `"rollouts"`, `"gradients"` (which brings rollouts).
        only_learnable (`bool`): Prompts with learnability 0 score exactly 0, so their gradients are not needed.
    """

    name: str
    score: Callable[[Pool], np.ndarray]
    needs: frozenset[str] = frozenset()
    only_learnable: bool = False


SELECTORS: dict[str, Selector] = {
    selector.name: selector
    for selector in (
        Selector("learnalign", learnalign, frozenset({GRADIENTS}), only_learnable=True),
        Selector("learnability", learnability, frozenset({ROLLOUTS}), only_learnable=True),
        Selector("alignment", alignment, frozenset({GRADIENTS})),
        Selector("gradient_dot", gradient_dot, frozenset({GRADIENTS})),
        Selector("random", random),
    )
}


def find_selector(name: str) -> Selector:
    """The selector of a name.

    Raises:
        `ValueError`: Listing the valid names.
    """
    if name not in SELECTORS:
        raise ValueError(f"selector={name!r}: choose one of {', '.join(map(repr, SELECTORS))}.")
    return SELECTORS[name]
