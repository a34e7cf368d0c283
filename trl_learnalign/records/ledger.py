"""The compute ledger: what each phase of a run cost, scoring included.

Tokens are counted without padding and over all processes; a rollout that continues a prompt reads that prompt once.
`run.json` holds a [`Cost`] for the scoring and the training of each phase and their total, so that methods can be
compared at equal total compute, not only at equal steps: a method that selects pays for its selecting.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

BACKWARD = 2.0
"""Operations of a backward pass per operation of a forward pass: gradients of activations and of weights."""

PRICES = (1.0, 3.0, 8.0)
"""Prices of a generated token that stand side by side: about a quarter, a half and two thirds of a step's time spent
on generation (`docs/cost.md`)."""


@dataclass(frozen=True)
class Cost:
    """What something took.

    Args:
        tokens_generated (`int`): Tokens sampled.
        tokens_prompt (`int`): Prompt tokens read to sample them, once for each rollout.
        tokens_forward (`int`): Tokens of forward passes without a gradient: reference policy, log-probabilities of the
            policy that sampled, solutions and prompts that selectors read.
        tokens_trained (`int`): Tokens, prompts included, that went through a forward and a backward pass: of training,
            or of gradient capture.
        seconds (`float`): Wall time.
    """

    tokens_generated: int = 0
    tokens_prompt: int = 0
    tokens_forward: int = 0
    tokens_trained: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        ours, theirs = asdict(self), asdict(other)
        return Cost(**{name: ours[name] + theirs[name] for name in ours})

    def compute(self, price: float) -> float:
        """All of it in tokens of a forward pass: a token that is trained on counts 1 + 2 (`BACKWARD`) times.

        The usual estimate of 2 operations per parameter and token forward and 4 backward; attention, which depends on
        the length, is left out, and gradient capture counts as a whole backward pass, though it is less.

        Args:
            price (`float`): Forward equivalents of a generated token.
        """
        forward = price * self.tokens_generated + self.tokens_prompt + self.tokens_forward
        return forward + (1 + BACKWARD) * self.tokens_trained

    @property
    def forward_equivalents(self) -> float:
        """[`compute`] where a generated token costs what a token costs that is read."""
        return self.compute(1.0)


@dataclass(frozen=True)
class Ledger:
    """What the phases of a run cost.

    Args:
        entries (`dict[str, dict[str, Cost]]`): Phase → account → cost; an account is `"scoring"` or `"training"`.
        price (`float`): Forward equivalents of a generated token (`LearnAlignConfig.generation_price`).
    """

    entries: dict[str, dict[str, Cost]] = field(default_factory=dict)
    price: float = 1.0

    def charge(self, phase: str, account: str, cost: Cost) -> None:
        """Add a cost to an account of a phase."""
        accounts = self.entries.setdefault(phase, {})
        accounts[account] = accounts.get(account, Cost()) + cost

    def compute(self, cost: Cost) -> float:
        """A cost in tokens of a forward pass, at the ledger's price."""
        return cost.compute(self.price)

    def sum(self, account: str) -> Cost:
        """Of an account over all phases."""
        total = Cost()
        for costs in self.entries.values():
            total += costs.get(account, Cost())
        return total

    @property
    def total(self) -> Cost:
        """Of everything."""
        total = Cost()
        for costs in self.entries.values():
            total = sum(costs.values(), total)
        return total

    def to_json(self) -> dict[str, Any]:
        """The costs of each phase, and their `total` with its `forward_equivalents` at the ledger's price."""
        values: dict[str, Any] = {}
        for phase, costs in self.entries.items():
            values[phase] = {account: asdict(cost) for account, cost in costs.items()}
        total = self.total
        values["total"] = asdict(total)
        values["total"]["forward_equivalents"] = self.compute(total)
        return values


class TrainingMeter:
    """Counts the tokens of a phase's training from the trainer's own counters.

    Its state is plain JSON and belongs into the checkpoint: a resumed run then counts what an uninterrupted one does.

    Args:
        rollouts (`int`): Rollouts of a generation, over all processes.
        clock (callable, *optional*): Time in seconds.
    """

    def __init__(self, rollouts: int, clock: Callable[[], float] = time.perf_counter):
        self.rollouts = rollouts
        self.clock = clock
        self._generated = 0
        self._seen_before = 0
        self._seconds_before, self._began = 0.0, clock()
        self._last: tuple[Sequence[float] | None, int] = (None, 0)

    def begin(self, seen: int) -> None:
        """A phase begins.

        Args:
            seen (`int`): Tokens of prompts and completions that the trainer has counted so far.
        """
        self.load_state_dict({"generated": 0, "seen_before": seen, "seconds": 0.0})

    def add_step(self, mean_lengths: Sequence[float]) -> None:
        """Count what was generated since the last step; call at each step's end, before the trainer logs.

        Args:
            mean_lengths (sequence of `float`): Mean completion length of each generation since the last log: the
                trainer's own list, another one after each log.
        """
        last_list, last_length = self._last
        # The same list as at the last step: what has been added to it. Another one: all of it.
        start = last_length if mean_lengths is last_list else 0
        self._generated += sum(round(mean * self.rollouts) for mean in mean_lengths[start:])
        self._last = mean_lengths, len(mean_lengths)

    def cost(self, seen: int, passes: int = 1, forwards: int = 0) -> Cost:
        """Of the phase so far.

        Args:
            seen (`int`): As in [`begin`].
            passes (`int`): How often each rollout is trained on (`num_iterations`).
            forwards (`int`): Forward passes without a gradient over each rollout.
        """
        tokens = seen - self._seen_before
        return Cost(
            tokens_generated=self._generated,
            tokens_prompt=tokens - self._generated,
            tokens_forward=forwards * tokens,
            tokens_trained=passes * tokens,
            seconds=self._seconds(),
        )

    def _seconds(self) -> float:
        return self._seconds_before + self.clock() - self._began

    def state_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "generated": self._generated,
            "seen_before": self._seen_before,
            "seconds": self._seconds(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from [`state_dict`], now."""
        self._generated, self._seen_before = state["generated"], state["seen_before"]
        self._seconds_before, self._began = state["seconds"], self.clock()
