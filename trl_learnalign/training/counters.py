"""What a phase leaves out and counts: skipping, dynamic sampling, rewards, groups; and what a run says of itself.

Checkpoints contain the counts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trl_learnalign import rng, scoring
from trl_learnalign.adaptive import Outcomes
from trl_learnalign.adaptive.order import expected_gain, group_sizes
from trl_learnalign.bridge.dynamic_sampling import DynamicSampler, install_dynamic_sampling
from trl_learnalign.bridge.inference import Advantages, RolledOut, Watch
from trl_learnalign.bridge.requires import tokens_seen
from trl_learnalign.bridge.skipping import ZeroAdvantageFilter, install_skipping
from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.plan import Plan
from trl_learnalign.records.notes import SCORING_ACCOUNT, Cost, Ledger, TrainingMeter
from trl_learnalign.records.store import check_keys
from trl_learnalign.success import CutOff, SuccessRule
from trl_learnalign.training.setup import RunSetup

logger = logging.getLogger(__name__)


# ---- Skipping and dynamic sampling ----------------------------------------------------------------------------------

SKIPPING, SAMPLING = "skipping", "sampling"


class RolloutFilters:
    """Skipping and dynamic sampling, where they are enabled and possible.

    Args:
        setup (`RunSetup`): The assembled run.
        more_rows (callable): See `bridge.install_dynamic_sampling`.
        observe (callable): Called with all rollouts, once for each generation.
        advantages (callable, *optional*): Replaces TRL's advantages; see `bridge.Watch`.

    Raises:
        `ValueError`: If dynamic sampling is enabled and not possible, with the remedy.
    """

    def __init__(
        self,
        setup: RunSetup,
        more_rows: Callable[[int, int, int], Any],
        observe: Callable[[RolledOut], None],
        advantages: Advantages | None = None,
    ):
        config, trainer = setup.config, setup.trainer
        self.trainer = trainer
        self.sampler: DynamicSampler | None = None
        self._skipping: ZeroAdvantageFilter | str | None = None
        headroom = config.adaptive_gain_exponent if config.is_adaptive else 0.0
        if config.samples_dynamically:
            self.sampler = install_dynamic_sampling(
                trainer,
                more_rows,
                config.oversample,
                config.max_generation_batches,
                observe,
                lambda rewards: observed_gain(setup.context.success.successes(rewards), headroom),
            )
        else:
            Watch(trainer, observe, advantages)
        if config.skip_zero_advantages:
            self._skipping = install_skipping(trainer)
        self._begun = self._counts()

    @property
    def skipper(self) -> ZeroAdvantageFilter | None:
        """The filter that skips rollouts, if skipping is active."""
        skipping = self._skipping
        return (
            skipping
            if isinstance(skipping, ZeroAdvantageFilter) and skipping.problem is None
            else None
        )

    @property
    def not_skipped(self) -> str | None:
        """Why skipping is enabled but inactive; for some models this is known only after training has begun."""
        skipping = self._skipping
        return skipping.problem if isinstance(skipping, ZeroAdvantageFilter) else skipping

    def begin_phase(self) -> None:
        """Reset the counts at the start of a phase."""
        self._begun = self._counts()

    def corrected(self, cost: Cost) -> Cost:
        """Correct the cost of the phase so far for skipped rollouts and for those of dynamic sampling.

        Args:
            cost (`Cost`): The cost if all rollouts were trained on, and no extra ones were made.
        """
        now, changed = self._counts(), vars(cost).copy()
        if self.sampler is not None:
            for name in ("tokens_generated", "tokens_prompt"):
                changed[name] = now[SAMPLING][name] - self._begun[SAMPLING][name]
            chosen = now[SAMPLING]["tokens_chosen"] - self._begun[SAMPLING]["tokens_chosen"]
            changed["tokens_trained"] = self.trainer.num_iterations * chosen
        if self.skipper is not None:
            trained = now[SKIPPING]["tokens_trained"] - self._begun[SKIPPING]["tokens_trained"]
            changed["tokens_trained"] = trained
        return Cost(**changed)

    def skipped(self) -> dict[str, int]:
        """Tokens of the phase so far: `tokens_given`, `tokens_trained`, `tokens_idle`; empty without skipping."""
        if self.skipper is None:
            return {}
        now, begun = self._counts()[SKIPPING], self._begun[SKIPPING]
        return {name: now[name] - begun[name] for name in now if name.startswith("tokens_")}

    def _counts(self) -> dict[str, dict[str, int]]:
        parts = {SKIPPING: self.skipper, SAMPLING: self.sampler}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def state_dict(self) -> dict[str, Any]:
        """Return the counts so far, and those before the phase, as plain JSON values."""
        return {name: [counts, self._begun[name]] for name, counts in self._counts().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state of [`state_dict`].

        Raises:
            `ValueError`: If other filters were enabled when the state was saved.
        """
        check_keys("skipping and sampling", state, self._counts())
        for name, part in ((SKIPPING, self.skipper), (SAMPLING, self.sampler)):
            if part is not None:
                counts, self._begun[name] = state[name]
                part.load_state_dict(counts)


def observed_gain(successes: torch.Tensor, headroom: float) -> np.ndarray:
    """Return the gain of training on groups of rollouts, `(P,)`: the variance, times the remaining headroom.

    Args:
        successes (`torch.Tensor`): `(P, G)` from 0 to 1, and NaN where a rollout could not be judged.
        headroom (`float`): As in `adaptive.order.expected_gain`.
    """
    rates = scoring.success_rate(successes).nan_to_num(nan=0.0)
    return expected_gain(rates.numpy(), headroom, scoring.learnability(successes).numpy())


class AnyRows:
    """Extra prompts for runs in the trainer's own order: drawn from the whole dataset, seeded by the run's position.

    The trainer's own count of micro-steps restarts when a run is resumed. So the position is the optimizer step, and
    the distance of the generation from the first one that asked for prompts within that step.

    Args:
        setup (`RunSetup`): The assembled run.
    """

    def __init__(self, setup: RunSetup):
        self._trainer = setup.trainer
        self._seed = setup.config.selection_seed
        self._step, self._first_micro_step = -1, 0

    def __call__(self, micro_step: int, start: int, count: int) -> np.ndarray:
        """See `bridge.install_dynamic_sampling`."""
        step = self._trainer.state.global_step
        if step != self._step:
            self._step, self._first_micro_step = step, micro_step
        place = micro_step - self._first_micro_step
        stream = rng.key(self._seed, "more prompts", step, place)
        everything = np.arange(len(self._trainer.train_dataset))
        order = rng.permutation(stream, everything)
        return order[np.arange(start, start + count) % len(order)]


# ---- Plateau --------------------------------------------------------------------------------------------------------


class Plateau:
    """Detects a plateau of the training reward in one stage.

    Args:
        config (`LearnAlignConfig`): Settings, with `plateau_patience`, `plateau_min_delta` and `plateau_smoothing`.
    """

    def __init__(self, config: LearnAlignConfig):
        self.patience = config.plateau_patience
        self.min_delta = config.plateau_min_delta
        self.smoothing = config.plateau_smoothing
        self.begin()

    def begin(self) -> None:
        """Forget the previous stage."""
        self._sum = self._weight = 0.0
        self._best: float | None = None
        self._waited = 0

    def add(self, reward: float | None) -> bool:
        """Count a step.

        Args:
            reward (`float`, *optional*): Mean reward of the step, if there is a new one.

        Returns:
            `bool`: Whether the reward has not risen by `min_delta` for `patience` steps.
        """
        if reward is not None:
            # An exponential mean with bias correction: it is not pulled towards 0 by a start at 0.
            self._sum = self.smoothing * self._sum + (1 - self.smoothing) * reward
            self._weight = self.smoothing * self._weight + (1 - self.smoothing)
            smoothed = self._sum / self._weight
            if self._best is None or smoothed > self._best + self.min_delta:
                self._best, self._waited = smoothed, 0
                return False
        self._waited += 1
        return self._waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain JSON values."""
        return {
            "sum": self._sum,
            "weight": self._weight,
            "best": self._best,
            "waited": self._waited,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state of [`state_dict`].

        Raises:
            `ValueError`: If the state is of another version.
        """
        check_keys("the plateau", state, ("sum", "weight", "best", "waited"))
        self._sum, self._weight = state["sum"], state["weight"]
        self._best, self._waited = state["best"], state["waited"]


# ---- Group counts in the trainer's own order ------------------------------------------------------------------------


@dataclass
class Tally:
    """Counts of a phase; plain JSON values, for a checkpoint.

    Args:
        groups (`int`): Groups that were rolled out.
        useful (`int`): Groups among them that have a gradient.
        mixed (`int`): Groups with both right and wrong rollouts.
        trained (`int`): Groups that were trained on.
    """

    groups: int = 0
    useful: int = 0
    mixed: int = 0
    trained: int = 0

    def begin(self) -> None:
        """Reset the counts at the start of a phase."""
        self.load_state_dict(dict.fromkeys(asdict(self), 0))

    def add(self, useful: np.ndarray, successes: torch.Tensor, trained: int) -> None:
        """Count a generation.

        Args:
            useful (`np.ndarray`): Whether each group has a gradient, `bool` `(P,)`.
            successes (`torch.Tensor`): `(P, G)` from 0 to 1, and NaN where a rollout could not be judged.
            trained (`int`): Number of the groups that are trained on.
        """
        most = successes.nan_to_num(nan=-torch.inf).amax(dim=1)
        is_mixed = most > successes.nan_to_num(nan=torch.inf).amin(dim=1)
        self.groups += len(successes)
        self.useful += int(useful.sum())
        self.mixed += int(is_mixed.sum())
        self.trained += trained

    def state_dict(self) -> dict[str, int]:
        """Return the state as plain JSON values."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore a state of [`state_dict`].

        Raises:
            `ValueError`: If the state is of another version.
        """
        check_keys("the tally", state, asdict(self))
        for name in asdict(self):
            setattr(self, name, state[name])


# ---- Check of the first rewards -------------------------------------------------------------------------------------

ROLLOUTS = 128
"""Number of rewards that are checked: a reward with both right and wrong rollouts has shown both by then."""


GROUPS = 64
"""Number of groups that are checked: the standard error of a share is at most 6 %."""


class RewardSanityCheck:
    """Warns once if all, or none, of the first rollouts count as right.

    Without this warning, an adaptive order would run to the end with nothing to distinguish prompts by. Runs that
    score their candidates are warned by the scoring.

    Args:
        success (`SuccessRule`): The rule for right rollouts.
        wanted (`bool`): Whether the check is enabled.
        limit (`int`): `max_completion_length`.
    """

    def __init__(self, success: SuccessRule, wanted: bool, limit: int):
        self.success, self.limit = success, limit
        self._cut_off = 0.0
        self._rewards: list[Tensor] = []
        self._left = ROLLOUTS if wanted else 0

    def add(self, rewards: Tensor, cut_share: float) -> None:
        """Count the judged rollouts of a generation.

        Args:
            rewards (`torch.Tensor`): Values of the deciding reward function, of any shape; NaN where it could not
                judge.
            cut_share (`float`): Share of truncated rollouts, from 0 to 1.
        """
        if self._left <= 0:
            return
        self._rewards.append(rewards.detach().flatten().cpu())
        self._left -= rewards.numel()
        self._cut_off += cut_share * rewards.numel()
        if self._left > 0:
            return
        seen = torch.cat(self._rewards)
        self._rewards.clear()
        cut_off = CutOff(self._cut_off / len(seen), self.limit)
        problem = self.success.problem_of(seen, cut_off)
        if problem is not None:
            logger.warning("The first %d rollouts of training: %s", len(seen), problem)


class GroupLook:
    """Logs once how the number of rollouts affects the share of mixed groups, and whether fewer would suffice.

    Args:
        wanted (`bool`): Whether the line is enabled.
        graded (`bool`, *optional*, defaults to `False`): Whether outcomes are fractions.
    """

    def __init__(self, wanted: bool, graded: bool = False):
        self._wanted, self._graded = wanted, graded
        self._successes: list[Tensor] = []

    def add(self, successes: Tensor) -> None:
        """Count the judged rollouts of a generation.

        Args:
            successes (`torch.Tensor`): From 0 to 1, or NaN, `(P, G)` for P prompts.
        """
        if not self._wanted:
            return
        self._successes.append(successes.detach().cpu())
        if sum(map(len, self._successes)) < GROUPS:
            return
        self._wanted = False
        seen = torch.cat(self._successes)
        self._successes.clear()
        right, wrong, partial = scoring.outcome_sums(seen, self._graded)
        outcomes = Outcomes.at(0, np.arange(len(seen)), right, wrong, partial=partial)
        sizes = group_sizes(outcomes, own=seen.shape[1])
        for line in () if sizes is None else sizes.lines:
            logger.info("%s", line)


# ---- Counters of a phase --------------------------------------------------------------------------------------------


class PhaseCounters:
    """What is counted in the current phase; checkpoints contain it.

    Args:
        setup (`RunSetup`): The assembled run.
        additions (`RolloutFilters`): Skipping and dynamic sampling, which count for themselves.
    """

    def __init__(self, setup: RunSetup, additions: RolloutFilters):
        self.additions = additions
        self.plateau = Plateau(setup.config)
        self.meter = TrainingMeter(setup.trainer.args.generation_batch_size)
        self.tally = Tally()
        self._trainer = setup.trainer
        self._own = ["plateau", "meter", *(["tally"] if setup.config.uses_trainer_order else [])]

    def begin_phase(self) -> None:
        """Reset costs and rewards at the start of a phase."""
        self.plateau.begin()
        self.tally.begin()
        self.meter.begin(tokens_seen(self._trainer))
        self.additions.begin_phase()

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain JSON values."""
        own = {name: getattr(self, name).state_dict() for name in self._own}
        return {**own, **self.additions.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state of [`state_dict`].

        Raises:
            `ValueError`: If the state is of another version.
        """
        additions = {name: part for name, part in state.items() if name not in self._own}
        check_keys("the steps", state, (*self._own, *additions))
        self.additions.load_state_dict(additions)
        for name in self._own:
            getattr(self, name).load_state_dict(state[name])


# ---- Start and end line ---------------------------------------------------------------------------------------------


def start_line(setup: RunSetup, plan: Plan, additions: RolloutFilters) -> str:
    """Return the start line: method, number of prompts, success rule, and whether rollouts are skipped."""
    rule = setup.context.success.sentence
    return f"{_method(setup, plan)}; {rule}; {_skipping(setup.config, additions)}."


def _method(setup: RunSetup, plan: Plan) -> str:
    config, everything = setup.config, plan.prompts
    if config.uses_trainer_order:
        return f"This run trains on {everything} in the trainer's own order"
    orders = " and ".join(dict.fromkeys(config.order))
    if config.is_whole_pool:
        return f"This run trains on {everything} in {orders} order"
    names = ", ".join(dict.fromkeys(selector.name for selector in setup.selectors))
    sizes = [f"{stage.size:,}" for stage in plan.stages]
    chosen = f"This run selects {_list(sizes)} of {everything} by {names}, in {orders} order"
    if config.warmup_samples:
        chosen += f", after a warm-up on {config.warmup_samples:,}"
    return chosen


def _list(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _skipping(config: LearnAlignConfig, additions: RolloutFilters) -> str:
    if additions.skipper is not None:
        return "rollouts without an advantage are not trained on"
    if additions.not_skipped is not None:
        return f"every rollout is trained on ({additions.not_skipped})"
    return f"every rollout is trained on (skip_zero_advantages={config.skip_zero_advantages})"


def end_line(ledger: Ledger, additions: RolloutFilters) -> str:
    """Return the end line: the cost of the run, and what skipping has saved."""
    total, scoring = ledger.total, ledger.sum(SCORING_ACCOUNT)
    parts = [
        f"{total.tokens_generated:,} tokens generated",
        f"{total.tokens_prompt + total.tokens_forward:,} read",
        f"{total.tokens_trained:,} passed forward and backward",
    ]
    line = f"The run has spent {', '.join(parts)}"
    if compute := ledger.compute(scoring):
        share = compute / ledger.compute(total)
        line += f" ({share:.0%} of the compute to select prompts)"
    if additions.skipper is None:
        return f"{line}; nothing was skipped."
    counts = additions.skipper.counts
    tokens = counts.tokens_given - counts.tokens_trained
    rows = counts.rows_given - counts.rows_trained
    share = tokens / max(1, counts.tokens_given)
    return (
        f"{line}; skipping has saved {tokens:,} of {counts.tokens_given:,} tokens ({share:.0%}) and {rows:,} of "
        f"{counts.rows_given:,} rows of training."
    )
