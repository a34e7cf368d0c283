"""The table of selectors, and the measurements that each one needs.

A selector takes a [`Pool`] and returns a score for each candidate, `(P,)` float64. Higher is better. NaN means that
the prompt cannot be ranked; such prompts come last. A selector declares the measurements that it needs.

The setting `selector="package.module:name"` names a custom selector, where `name` is

- a function `pool -> scores`: rollouts are measured for it, so it can use `pool.success_rate`; or
- a [`Selector`], which declares its measurements: `Selector("mine", function, frozenset({GRADIENTS, HIDDEN}))`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.pool import Pool
from trl_learnalign.selectors import scores

ROLLOUTS = "rollouts"
GRADIENTS = "gradients"
VALIDATION = "validation"
HIDDEN = "hidden"
LIKELIHOODS = "likelihoods"
LENGTHS = "lengths"
RATINGS = "ratings"
HISTORY = "history"

NEEDS = {
    ROLLOUTS: "successes, lengths and rewards of G rollouts",
    GRADIENTS: "gradient features; includes rollouts",
    VALIDATION: "the mean gradient feature of a validation set",
    HIDDEN: "hidden-state features",
    LIKELIHOODS: "log-likelihoods of the reference solution",
    LENGTHS: "tokens of the reference solution; no model is run",
    RATINGS: "the policy's ratings of the reference solution",
    HISTORY: "success rates per pass of a previous run",
}
"""Everything that can be measured, or read from a file."""

SOLUTION_COLUMNS = ("reference", "solution")
"""Columns that are searched for reference solutions: full solutions first, then the final answer alone."""


@dataclass(frozen=True)
class Selector:
    """A method of ranking prompts.

    Args:
        name (`str`): As in `LearnAlignConfig.selector`.
        function (callable): `Pool -> (P,)` scores; collective over all ranks.
        needs (`frozenset[str]`): Required measurements, from [`NEEDS`].
        only_learnable (`bool`): Prompts with learnability 0 score exactly 0, so their gradients are not needed, and
            only prompts with learnability above 0 count as ranked.
        aligns (`str`, *optional*): How scores contain the alignment of gradients: `"score"`, they are equal;
            `"weighted"`, scores are alignment times learnability. Default: not at all.

    Raises:
        `ValueError`: If `needs` has an unknown measurement.
    """

    name: str
    function: Callable[[Pool], Any]
    needs: frozenset[str] = frozenset()
    only_learnable: bool = False
    aligns: str | None = None

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.needs) - set(NEEDS)):
            raise ValueError(
                f"Selector {self.name!r} needs {unknown}: choose from {', '.join(map(repr, NEEDS))}."
            )

    def alignment(self, pool: Pool, scores: np.ndarray) -> np.ndarray:
        """Return the alignment of each prompt's gradient according to the scores, `(P,)`.

        Args:
            pool (`Pool`): The candidates.
            scores (`np.ndarray`): `(P,)`, from [`score`].

        Returns:
            `np.ndarray`: NaN where a prompt has no finite gradient, and everywhere if the selector compares no
                gradients.
        """
        if self.aligns is None:
            return np.full(len(pool), np.nan)
        learnability = pool.learnability
        has_gradient = (learnability > 0) | (scores != 0)
        if pool.finite is not None:
            has_gradient &= pool.finite.numpy()
        weights = np.ones(len(pool))
        if self.aligns == "weighted":
            weights = np.where(learnability > 0, learnability, 1)
        return np.where(has_gradient, scores / weights, np.nan)

    def score(self, pool: Pool) -> np.ndarray:
        """Return the scores of the candidates, `(P,)` float64.

        Raises:
            `TypeError`, `ValueError`: If the function returns anything else, naming it.
        """
        values = self.function(pool)
        if isinstance(values, torch.Tensor):
            scores = values.detach().cpu().numpy()
        else:
            scores = np.asarray(values)
        if scores.dtype.kind not in "fiub":
            raise TypeError(
                f"Selector {self.name!r} returned {scores.dtype} values ({type(values).__name__}): return one real "
                "number per candidate, NaN for those that cannot be ranked."
            )
        if scores.shape != (len(pool),):
            raise ValueError(
                f"Selector {self.name!r} returned scores of shape {scores.shape} for {len(pool)} candidates: return "
                f"shape ({len(pool)},), in the order of pool.prompts."
            )
        return scores.astype(np.float64)


SELECTORS: dict[str, Selector] = {
    selector.name: selector
    for selector in (
        Selector(
            "learnalign",
            scores.learnalign,
            frozenset({GRADIENTS}),
            only_learnable=True,
            aligns="weighted",
        ),
        Selector(
            "learnalign_coverage",
            scores.learnalign_coverage,
            frozenset({GRADIENTS}),
            only_learnable=True,
        ),
        Selector(
            "learnalign_logdet",
            scores.learnalign_logdet,
            frozenset({GRADIENTS}),
            only_learnable=True,
        ),
        Selector("learnability", scores.learnability, frozenset({ROLLOUTS}), only_learnable=True),
        Selector("alignment", scores.alignment, frozenset({GRADIENTS}), aligns="score"),
        Selector("gradient_dot", scores.gradient_dot, frozenset({GRADIENTS})),
        Selector(
            "validation_alignment",
            scores.validation_alignment,
            frozenset({GRADIENTS, VALIDATION}),
            only_learnable=True,
            aligns="weighted",
        ),
        Selector(
            "feature_similarity",
            scores.feature_similarity,
            frozenset({ROLLOUTS, HIDDEN}),
            only_learnable=True,
        ),
        Selector("random", scores.random),
        Selector("token_length", scores.token_length, frozenset({LENGTHS})),
        Selector("ppl_top", scores.ppl_top, frozenset({LIKELIHOODS})),
        Selector("ppl_middle", scores.ppl_middle, frozenset({LIKELIHOODS})),
        Selector("ifd", scores.ifd, frozenset({LIKELIHOODS})),
        Selector("selectit", scores.selectit, frozenset({RATINGS})),
        Selector("limr", scores.limr, frozenset({HISTORY})),
        Selector("reward_variance", scores.reward_variance, frozenset({HISTORY})),
    )
}


def find_selector(name: str) -> Selector:
    """Return the selector of a name, or a custom one at `"package.module:name"` or `"package.module.name"`.

    Raises:
        `ValueError`: If there is none, listing the valid names or naming the problem with the path.
        `TypeError`: If the object at the path is neither a function nor a [`Selector`].
    """
    if name in SELECTORS:
        return SELECTORS[name]
    module_name, _, attribute = name.rpartition(":" if ":" in name else ".")
    if not module_name or not attribute:
        raise ValueError(
            f"selector={name!r}: choose one of {', '.join(map(repr, SELECTORS))}, or name a function of your own as "
            "'package.module:function'."
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"selector={name!r}: {module_name} cannot be imported ({error}). Install it or add its folder to "
            "PYTHONPATH."
        ) from error
    if attribute not in vars(module):
        raise ValueError(f"selector={name!r}: {module_name} has no {attribute!r}.")
    value = vars(module)[attribute]
    if isinstance(value, Selector):
        return value
    if not callable(value):
        raise TypeError(
            f"selector={name!r} is a {type(value).__name__}: name a function (pool) -> scores."
        )
    return Selector(name, value, frozenset({ROLLOUTS}))


def combined(selectors: Sequence[Selector]) -> Selector:
    """Return the combined needs of several selectors, so that they are measured once; it has no scores."""
    if len(selectors) == 1:
        return selectors[0]
    needs: frozenset[str] = frozenset()
    for selector in selectors:
        needs |= selector.needs
    # A selector that ranks all prompts by gradient needs all gradients; selectors without gradients are ignored here.
    with_gradients = [selector for selector in selectors if GRADIENTS in selector.needs]
    return Selector(
        "+".join(selector.name for selector in selectors),
        _no_scores,
        needs,
        only_learnable=all(selector.only_learnable for selector in with_gradients),
    )


def _no_scores(pool: Pool) -> Any:
    raise RuntimeError(
        "a combination of selectors has no scores of its own: call each of its selectors"
    )


def needs_solutions(selector: Selector, config: LearnAlignConfig) -> bool:
    """Whether a selector reads reference solutions."""
    return bool(selector.needs & {LIKELIHOODS, LENGTHS, RATINGS}) or (
        HIDDEN in selector.needs and config.hidden_text == "prompt_and_solution"
    )


def solution_column(columns: Sequence[str], config: LearnAlignConfig) -> str | None:
    """Return the column of reference solutions, or `None` if there is none."""
    names = SOLUTION_COLUMNS if config.solution_column is None else (config.solution_column,)
    return next((name for name in names if name in columns), None)


def check_columns(selector: Selector, columns: Sequence[str], config: LearnAlignConfig) -> None:
    """Check that the dataset has the columns that a selector reads.

    Args:
        selector (`Selector`): The selector.
        columns (sequence of `str`): `dataset.column_names`.
        config (`LearnAlignConfig`): Settings, with `solution_column` and `hidden_text`.

    Raises:
        `ValueError`: If a column is missing, naming the selector, the column and the remedy.
    """
    if not needs_solutions(selector, config) or solution_column(columns, config) is not None:
        return
    without = [name for name, other in SELECTORS.items() if not needs_solutions(other, config)]
    if config.solution_column is None:
        problem = f"it has no column {' or '.join(map(repr, SOLUTION_COLUMNS))}"
    else:
        problem = f"solution_column={config.solution_column!r} is not one of its columns"
    raise ValueError(
        f"selector={selector.name!r} reads the reference solutions of the training dataset, but {problem}, only "
        f"{list(columns)}. Add such a column, name yours with solution_column, or choose a selector that needs "
        f"none: {', '.join(without)}."
    )
