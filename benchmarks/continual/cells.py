"""One cell of the continual table: train with one line's choice of prompts until the budget is spent, curve recorded.

The learning rate is constant, so one run gives the whole curve for every price of a generated token: what was spent is
noted at each evaluation, and priced afterwards. The budget is what LearnAlign takes in all in the selection table
(warm-up, scoring of the pool, training on 13 % of it), at the same price.

How a cell is trained is the driver's part: a function of (regime, seed, line, budgets) that gives a [`Curve`].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from typing import Any, Protocol

import pyarrow.parquet as pq
from selection.cells import RESULTS_FOLDER, Settings

from trl_learnalign.config import BACKWARD, LearnAlignConfig
from trl_learnalign.records.notes import Cost

PRICES = (1, 3)
"""Forward equivalents of a generated token: as the ledger counts it, and as decoding costs on a GPU."""

MARKS = tuple(k / 10 for k in range(1, 11))
"""Parts of the budget at which a curve is evaluated."""

SHOWN = (0.2, 0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class Line:
    """How a line of the table chooses prompts, and what it is charged.

    Args:
        adaptive (`LearnAlignConfig`, *optional*): Of the adaptive order; `None`: the shuffled pool, pass after pass.
        features (`bool`): The belief generalises over prompts.
        oversampling (`float`): Prompts rolled out for each one that is trained on.
        batches (`int`): Generations rolled out at most until a step has enough groups with a gradient.
        skip (`bool`): Rows without a gradient are not charged for training.
        selector (`str`, *optional*): After a warm-up, that selector's choice of 13 % of the pool is trained on, pass
            after pass; `None`: the whole pool.
        rollouts (`int`): G; as many rollouts a step as with the settings' G, so more prompts if it is smaller.
        rate (`float`): Multiple of the settings' learning rate.
        most_units (`int`): Groups that a prompt may get in one generation; above 1 they are given by need
            (`continual.by_need.py`).
    """

    adaptive: LearnAlignConfig | None = None
    features: bool = True
    oversampling: float = 1.0
    batches: int = 1
    skip: bool = True
    selector: str | None = None
    rollouts: int = Settings.rollouts
    rate: float = 1.0
    most_units: int = 1

    def applied(self, settings: Settings) -> Settings:
        """The settings with this line's group size and learning rate."""
        completions = settings.prompts_per_step * settings.rollouts
        return replace(
            settings,
            rollouts=self.rollouts,
            prompts_per_step=completions // self.rollouts,
            learning_rate=settings.learning_rate * self.rate,
        )


PER_PROMPT = LearnAlignConfig.adaptive(
    adaptive_concentration=(1.0,),
    adaptive_exploration=0.0,
    adaptive_candidates_per_slot=10**6,
    adaptive_gain_exponent=0.0,
)
"""Of a posterior for each prompt, whose prior is the mean rate: Thompson sampling of p(1 - p) over the whole pool."""

LINES = {
    "full": Line(skip=False),
    "skip": Line(),
    "dynamic_sampling": Line(batches=4),
    "posterior": Line(PER_PROMPT, features=False),
    "adaptive": Line(LearnAlignConfig.adaptive()),
    "adaptive_oversampled": Line(LearnAlignConfig.adaptive(), oversampling=1.5),
    "learnalign": Line(selector="learnalign", skip=False),
    "learnalign_adaptive": Line(LearnAlignConfig.adaptive(), selector="learnalign"),
    "learnalign_coverage": Line(selector="learnalign_coverage", skip=False),
    "learnalign_coverage_adaptive": Line(
        LearnAlignConfig.adaptive(), selector="learnalign_coverage"
    ),
}

SMALL_GROUPS = {
    f"{name}, G = {rollouts}": replace(LINES[name], rollouts=rollouts)
    for rollouts in (2, 4)
    for name in ("adaptive", "skip", "full")
} | {
    "posterior, G = 2": replace(LINES["posterior"], rollouts=2),
    "dynamic_sampling, G = 2": replace(LINES["dynamic_sampling"], rollouts=2, rate=2.0),
    "belief, G = 2": Line(LearnAlignConfig.adaptive(baseline="belief"), rollouts=2),
}
"""Lines with fewer rollouts for more prompts. Each has the learning rate that was best for it on development tasks
(`continual.group_size.py`): of a half, one and two times that of the settings."""
LINES |= SMALL_GROUPS

CHOSEN = 268
"""Prompts that a selector chooses, of 2,000."""


@dataclass
class Spent:
    """Tokens so far.

    Args:
        generated (`int`): Tokens sampled.
        read (`int`): Prompt tokens read to sample them, once for each rollout.
        trained (`int`): Tokens, prompts included, of rows that were trained on and are charged.
        forward (`int`): Tokens of other forward passes.
    """

    generated: int = 0
    read: int = 0
    trained: int = 0
    forward: int = 0

    @staticmethod
    def of(cost: Cost) -> Spent:
        """What a ledger says."""
        return Spent(
            cost.tokens_generated, cost.tokens_prompt, cost.tokens_trained, cost.tokens_forward
        )

    def compute(self, price: float) -> float:
        """Forward equivalents if a generated token costs `price` of them."""
        forward = price * self.generated + self.read + self.forward
        return forward + (1 + BACKWARD) * self.trained


@dataclass
class Curve:
    """Accuracy over what was spent.

    Args:
        budgets (mapping): Forward equivalents to spend, for each price.
        points (`list[dict]`): `step`, the fields of [`Spent`] and `accuracy` of each evaluation.
        groups (`int`): Groups rolled out.
        useful (`int`): Of them those with right and wrong rollouts.
        notes (`dict`): What else a driver has to say.
    """

    budgets: Mapping[float, float]
    points: list[dict[str, Any]] = field(default_factory=list)
    groups: int = 0
    useful: int = 0
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._reached = dict.fromkeys(self.budgets, 0)

    def due(self, spent: Spent) -> bool:
        """Whether a mark of any price has been passed since the last evaluation."""
        passed = False
        for price, budget in self.budgets.items():
            count = sum(spent.compute(price) >= mark * budget for mark in MARKS)
            passed |= count > self._reached[price]
            self._reached[price] = count
        return passed

    @property
    def finished(self) -> bool:
        """Whether the budgets of all prices are spent."""
        return all(count == len(MARKS) for count in self._reached.values())

    def add(self, step: int, spent: Spent, accuracy: float) -> None:
        """Note an evaluation."""
        self.points.append({"step": step, **asdict(spent), "accuracy": accuracy})

    def at(self, price: float, mark: float) -> dict[str, Any]:
        """The first evaluation at which this part of a budget is spent."""
        wanted = mark * self.budgets[price]
        return next(point for point in self.points if _spent(point).compute(price) >= wanted)

    def rows(self) -> list[dict[str, Any]]:
        """One row for each price and mark."""
        return [
            {
                "price": price,
                "mark": mark,
                **self.at(price, mark),
                "budget_compute": self.budgets[price],
            }
            for price in self.budgets
            for mark in MARKS
        ]


def _spent(point: Mapping[str, Any]) -> Spent:
    return Spent(**{entry.name: point[entry.name] for entry in fields(Spent)})


class Driver(Protocol):
    """Trains one cell."""

    def __call__(
        self, regime: str, seed: int, line: Line, budgets: Mapping[float, float], split: str
    ) -> Curve:
        """Train until all budgets are spent, evaluated on `split`."""


BUDGET_OF = dict.fromkeys(("rare", "hard", "lengths", "large"), "longtail")
"""The pools of `continual.pools.py` are not in the selection table: runs on them spend as much as on another one."""


@cache
def learnalign_compute(regime: str, prices: tuple[float, ...] = PRICES) -> dict[float, float]:
    """What LearnAlign takes in all on a pool of 2,000, mean of the published seeds, for each price."""
    regime = BUDGET_OF.get(regime, regime)
    table = pq.read_table(RESULTS_FOLDER / "selection_table.parquet").to_pandas()
    cells = table[
        (table["selector"] == "learnalign") & (table["n"] == CHOSEN) & (table["regime"] == regime)
    ]
    generated = cells["tokens_generated"] + cells["selecting_tokens_generated"]
    # The table's compute has a generated token at price 1.
    return {price: float((cells["compute"] + (price - 1) * generated).mean()) for price in prices}


def compute_to_reach(
    compute: Sequence[float], accuracy: Sequence[float], wanted: float
) -> float | None:
    """Compute at which a curve first reaches an accuracy, straight lines between its points; `None` if it does not.

    Args:
        compute (sequence of `float`): Ascending.
        accuracy (sequence of `float`): At each of them.
        wanted (`float`): The accuracy.
    """
    for place, value in enumerate(accuracy):
        if value < wanted:
            continue
        if place == 0:
            return float(compute[0])
        before = accuracy[place - 1]
        share = (wanted - before) / (value - before)
        return float(compute[place - 1] + share * (compute[place] - compute[place - 1]))
    return None
