"""How far a measurement is: a bar in a terminal or notebook, now and then a plain line in a log file."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass
from types import TracebackType

from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

LINES = 10
"""Plain lines per measurement, about."""


@dataclass
class Tally:
    """What a shard's result holds.

    Args:
        prompts (`int`): Prompts.
        rollouts (`int`): Rollouts of them.
        learnable (`int`): Prompts with learnability above 0.
        note (`str`): Anything else worth saying of the last shard.
    """

    prompts: int = 0
    rollouts: int = 0
    learnable: int = 0
    note: str = ""

    def add(self, other: Tally) -> None:
        """Add a shard's."""
        self.prompts += other.prompts
        self.rollouts += other.rollouts
        self.learnable += other.learnable
        self.note = other.note


def is_interactive() -> bool:
    """Whether a bar that redraws itself can be seen: in a terminal, or in a notebook."""
    return sys.stderr.isatty() or _is_notebook()


def _is_notebook() -> bool:
    """Whether a Jupyter kernel runs this; that its package has been imported says nothing."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


class Progress:
    """Counts prompts of one measurement; a context manager. An interruption inside it says how many are kept.

    Args:
        name (`str`): Stage and measure.
        total (`int`): Prompts, over all ranks.
        done (`int`): Those that were measured before.
        quiet (`bool`): Say nothing.
        interactive (`bool`, *optional*): A bar rather than lines; by default if there is someone to see it.
    """

    def __init__(
        self, name: str, total: int, done: int, quiet: bool, interactive: bool | None = None
    ):
        self.name, self.total, self.done = name, total, done
        self._at_start = self._at_last_line = done
        self._tally = Tally()
        self._began = time.perf_counter()
        bar = is_interactive() if interactive is None else interactive
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=name,
            unit=" prompts",
            disable=quiet or not bar,
            dynamic_ncols=True,
        )
        self._lines = not quiet and not bar

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
        if kind is KeyboardInterrupt:
            kept = f"{self.done:,} of {self.total:,} prompts are kept"
            raise KeyboardInterrupt(f"{self.name}: interrupted, {kept}") from None

    def add(self, prompts: int, tally: Tally) -> None:
        """A batch of shards is done.

        Args:
            prompts (`int`): Its prompts, over all ranks.
            tally (`Tally`): Of this rank's shard.
        """
        self.done += prompts
        self._tally.add(tally)
        self._bar.set_postfix_str(self._details(), refresh=False)
        self._bar.update(prompts)
        since_last_line = self.done - self._at_last_line
        if self._lines and (self.done >= self.total or since_last_line * LINES >= self.total):
            self._at_last_line = self.done
            logger.info("%s", self.line())

    def line(self) -> str:
        """Where it stands, in words."""
        parts = [
            f"{self.done:,} of {self.total:,} prompts ({self.done / self.total:.0%})",
            self._details(),
        ]
        if self.done < self.total:
            left = (self.total - self.done) / self._rate()
            parts.append(f"{tqdm.format_interval(left)} left")
        return f"{self.name}: " + ", ".join(part for part in parts if part)

    def _rate(self) -> float:
        """Prompts per second."""
        seconds = time.perf_counter() - self._began
        return (self.done - self._at_start) / max(seconds, 1e-9)

    def _details(self) -> str:
        tally = self._tally
        parts = []
        if tally.rollouts:
            # The other ranks have made as many for each of their prompts.
            rollouts_per_prompt = tally.rollouts / tally.prompts
            parts.append(f"{self._rate() * rollouts_per_prompt:.3g} rollouts/s")
            parts.append(f"{tally.learnable / tally.prompts:.0%} learnable")
        if tally.note:
            parts.append(tally.note)
        return ", ".join(parts)
