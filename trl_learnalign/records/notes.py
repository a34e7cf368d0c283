"""Notes about the phases of a run, one dataclass for each kind, and the compute ledger.

`phases` of `run.json` holds them by phase and kind: `{"stage_1": {"selection": {…}, "training": {…}}}`. To add a kind,
add a dataclass with its `kind` here. It is then written, read back and, if it has a cost, added to the ledger.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from trl_learnalign.config import BACKWARD
from trl_learnalign.records.layout import OTHERS, SUBSETS, Entry, from_json

# ---- Parts of notes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SelectionStatistics(Entry):
    """Counts and means of the scored candidates; `None` marks unknown values.

    Args:
        candidates (`int`, *optional*): Candidates that were scored.
        selected (`int`, *optional*): Those of them that were selected.
        success_rate (`float`, *optional*): Mean over the candidates, from 0 to 1.
        success_rate_selected (`float`, *optional*): Mean over the selected candidates.
        success_rate_left_out (`float`, *optional*): Mean over the others.
        learnable_share (`float`, *optional*): Share of the candidates with learnability above 0.
        unlearnable_selected (`int`, *optional*): Selected candidates with learnability 0.
        learnable_left_out (`int`, *optional*): Candidates with learnability above 0 that were not selected.
        score_selected (`float`, *optional*): Mean score of the selected candidates.
        score_left_out (`float`, *optional*): Mean score of the others.
        gradients_not_finite (`int`, *optional*): Candidates whose gradient was not finite; they have score 0.
    """

    candidates: int | None = None
    selected: int | None = None
    success_rate: float | None = None
    success_rate_selected: float | None = None
    success_rate_left_out: float | None = None
    learnable_share: float | None = None
    unlearnable_selected: int | None = None
    learnable_left_out: int | None = None
    score_selected: float | None = None
    score_left_out: float | None = None
    gradients_not_finite: int | None = None

    @property
    def learnable_share_selected(self) -> float | None:
        """Share of the selected candidates with learnability above 0."""
        if self.unlearnable_selected is None or not self.selected:
            return None
        return 1 - self.unlearnable_selected / self.selected


STATISTICS = [each.name for each in fields(SelectionStatistics) if each.name != OTHERS]
"""Names of the statistics."""


@dataclass(frozen=True, kw_only=True)
class CoverageEntry(Entry):
    """Which trainable parameters the gradient features contain.

    Args:
        share (`float`): Share of the trainable elements, from 0 to 1.
        direct (`list[str]`): Parameters whose gradient was computed by autograd itself, one prompt at a time.
        missing (`list[str]`): Parameters that are not in the features.
        unfired (`list[str]`): Parameters of both lists that have a layer rule which did not apply to their use.
    """

    share: float
    direct: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unfired: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class RoundEntry(Entry):
    """A scoring round within a rollout budget (`trl_learnalign.measuring.stage`).

    Args:
        prompts (`int`): Prompts that were rolled out.
        rollouts (`int`): Their rollouts.
        success_rate (`float`, *optional*): Mean over these prompts. The first round is a random sample, so its mean
            estimates that of all candidates. `None` if no rollout could be judged.
        believed (`float`, *optional*): Predicted success rate before the round; `None` for the random sample.
        learnable_share (`float`): Share of these prompts with learnability above 0.
    """

    prompts: int
    rollouts: int
    success_rate: float | None
    believed: float | None
    learnable_share: float


@dataclass(frozen=True, kw_only=True)
class ScoringEntry(Entry):
    """Cost of measuring a pool; tokens are summed over all ranks and over interrupted runs that it resumed.

    Args:
        seconds (`float`): Wall time.
        tokens_generated (`int`): Completion tokens of all rollouts.
        tokens_prompt (`int`): Prompt tokens, counted once per rollout.
        tokens_captured (`int`): Prompt and completion tokens that went through gradient capture.
        tokens_read (`int`): Tokens of texts that were read without rollouts.
        coverage (`CoverageEntry`, *optional*): Coverage of the gradients, if any were captured.
        self_check (mapping): Results of comparing captured gradients with the trainer's own.
        measures (mapping): Seconds and tokens of each measure, by its name.
        rounds (`tuple[RoundEntry]`): Result of each round, with a rollout budget.
    """

    seconds: float
    tokens_generated: int
    tokens_prompt: int
    tokens_captured: int
    tokens_read: int
    coverage: CoverageEntry | None = None
    self_check: Mapping[str, Any] = field(default_factory=dict)
    measures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    rounds: tuple[RoundEntry, ...] = ()

    @classmethod
    def of(cls, measures: Mapping[str, Mapping[str, float]], **others: Any) -> ScoringEntry:
        """Create from the seconds and tokens of each measure, by the names of the fields, and from other fields."""
        names = ("tokens_generated", "tokens_prompt", "tokens_captured", "tokens_read")
        amounts = list(measures.values())
        seconds = sum((each["seconds"] for each in amounts), 0.0)
        tokens: dict[str, Any] = {
            name: sum(int(each.get(name, 0)) for each in amounts) for name in names
        }
        return cls(seconds=seconds, **tokens, measures=dict(measures), **others)

    def __add__(self, other: ScoringEntry) -> ScoringEntry:
        """Return the entry of two parts of one measurement."""
        measures = {measure: dict(amounts) for measure, amounts in self.measures.items()}
        for measure, amounts in other.measures.items():
            total = measures.setdefault(measure, {})
            for name, amount in amounts.items():
                total[name] = total.get(name, 0) + amount
        return ScoringEntry.of(
            measures,
            coverage=other.coverage or self.coverage,
            self_check=other.self_check or self.self_check,
            rounds=self.rounds + other.rounds,
        )

    def cost(self, extra_forwards: int) -> Cost:
        """Return the cost for the ledger; `extra_forwards` passes without a gradient read each rollout."""
        rollout_tokens = self.tokens_generated + self.tokens_prompt
        return Cost(
            tokens_generated=self.tokens_generated,
            tokens_prompt=self.tokens_prompt,
            tokens_forward=self.tokens_read + extra_forwards * rollout_tokens,
            tokens_trained=self.tokens_captured,
            seconds=self.seconds,
        )


@dataclass(frozen=True, kw_only=True)
class Reliability(Entry):
    """Agreement between the rankings from two halves of the rollouts (`trl_learnalign.ranking`).

    Args:
        rollouts (`int`): Rollouts of a prompt, G.
        spearman_halves (`float`, *optional*): Rank correlation of the scores of the halves over all candidates;
            `None` if one of them is constant.
        overlap_halves (`float`): Share of the top N that both halves have in common.
        overlap_by_chance (`float`): N / P for P candidates.
        overlap_size (`int`): N.
        spearman (mapping): Number of rollouts (G, 2 G, 4 G, as string) → predicted correlation of two rankings from
            that many rollouts each; `None` without a positive correlation to extrapolate from.
    """

    rollouts: int
    spearman_halves: float | None
    overlap_halves: float
    overlap_by_chance: float
    overlap_size: int
    spearman: Mapping[str, float | None]

    @property
    def predicted(self) -> float | None:
        """Predicted correlation of two rankings from G rollouts each."""
        return self.spearman[str(self.rollouts)]


@dataclass(frozen=True, kw_only=True)
class GradientDiversity(Entry):
    """Diversity of a selection, compared with a random selection of equal size (`trl_learnalign.diversity`).

    Args:
        prompts (`int`): Selected prompts that have a feature, and learnability above 0 where that is known.
        directions (`float`): Effective number of gradient directions: participation ratio of the spectrum of the
            normalised features, from 1 (all equal) to `prompts` (all orthogonal).
        directions_random (`float`): The same for the random selection.
        covered (`float`): Share of the pool's signal that the selection represents: `Σ_j max_{i∈A} max(S_ij, 0)`,
            divided by its value with all candidates in place of `A`.
        covered_random (`float`): The same for the random selection.
        similarity (`float`): Mean cosine between a selected prompt and its nearest selected neighbour.
        similarity_random (`float`): The same for the random selection.
    """

    prompts: int
    directions: float
    directions_random: float
    covered: float
    covered_random: float
    similarity: float
    similarity_random: float

    @property
    def narrowness(self) -> str | None:
        """A clause for a warning if the selection is far narrower than a random one; `None` if it is not."""
        if self.directions >= NARROW_DIRECTIONS * self.directions_random:
            return None
        return (
            f"the gradients of the {self.prompts} selected prompts have about {self.directions:.1f} effective "
            f"directions, those of a random selection {self.directions_random:.1f}, so the selection is redundant; "
            "learnalign_coverage and learnalign_logdet select more diverse prompts"
        )


NARROW_DIRECTIONS = 0.5
"""A selection with less than this fraction of a random selection's gradient directions is reported as narrow."""


@dataclass(frozen=True, kw_only=True)
class CalibrationBin(Entry):
    """Predicted success rates in an interval, and the observed rates.

    Args:
        low (`float`): Lower bound, inclusive.
        high (`float`): Upper bound; inclusive only in the last bin.
        groups (`int`): Groups of rollouts whose prediction is in the interval.
        rollouts (`int`): Their rollouts that could be judged.
        predicted (`float`, *optional*): Mean prediction over these rollouts; `None` without any.
        seen (`float`, *optional*): Observed share of correct ones.
    """

    low: float
    high: float
    groups: int
    rollouts: int
    predicted: float | None = None
    seen: float | None = None


@dataclass(frozen=True, kw_only=True)
class RepeatedPrompt(Entry):
    """A prompt that was rolled out repeatedly.

    Args:
        index (`int`): Row of the training dataset.
        prompt (`str`): Its text; the middle of a long text is cut.
        times (`int`): How often it was rolled out.
        first (`float`, *optional*): Share of correct rollouts the first time; `None` if none could be judged.
        last (`float`, *optional*): The same for the last time.
    """

    index: int
    prompt: str
    times: int
    first: float | None = None
    last: float | None = None


# ---- Categories -----------------------------------------------------------------------------------------------------

NARROW_SPREAD = 0.5
"""A selection with less than this fraction of a random selection's spread, beyond one category, is narrow."""


@dataclass(frozen=True, kw_only=True)
class CategoryCount(Entry):
    """A category of prompts.

    Args:
        name (`str`): Value of the column, or the most typical prompt of the cluster.
        pool (`int`): Prompts of the pool in the category.
        chosen (`int`): Selected prompts in the category; for training, groups of rollouts.
    """

    name: str
    pool: int
    chosen: int


@dataclass(frozen=True, kw_only=True)
class GroupDistribution(Entry):
    """Distribution over categories of a selection and of its pool (`trl_learnalign.diversity`).

    The *effective number* of categories is `exp(-Σ s ln s)` of their shares `s`: 12 for 12 categories of equal size, 1
    if all prompts are in one.

    Args:
        by (`str`): The column, or `"prompt_cluster"`.
        pool (`int`): Prompts of the pool that have a category.
        chosen (`int`): Selected prompts that have a category; for training, groups of rollouts.
        distinct (`int`): Number of categories in the pool.
        categories (`tuple[CategoryCount]`): The largest categories, by their prompts in pool and selection.
        effective (`float`): Effective number of categories of the selection.
        effective_pool (`float`): Effective number of categories of the pool.
        effective_random (`float`): Mean over seeded random selections of equal size.
        effective_random_low (`float`): The lowest of these.
    """

    by: str
    pool: int
    chosen: int
    distinct: int
    categories: tuple[CategoryCount, ...]
    effective: float
    effective_pool: float
    effective_random: float
    effective_random_low: float

    @property
    def is_narrow(self) -> bool:
        """Whether the selection covers far fewer categories than random ones."""
        if self.effective >= self.effective_random_low:
            return False
        # The minimum is one category: with two equal categories, a selection from one of them is as narrow as
        # possible.
        return self.effective - 1 < NARROW_SPREAD * (self.effective_random - 1)

    @property
    def narrowness(self) -> str | None:
        """A clause for a warning if the selection is far narrower than a random one; `None` if it is not."""
        if not self.is_narrow:
            return None
        largest = max(self.categories, key=lambda category: category.chosen)
        share = largest.chosen / self.chosen
        share_of_pool = largest.pool / self.pool
        return (
            f"by {self.by}, the selection covers an effective {self.effective:.1f} of {self.distinct} categories, a "
            f"random selection of this size {self.effective_random:.1f}; the largest, {largest.name!r}, has "
            f"{share:.0%} of the selection and {share_of_pool:.0%} of the pool"
        )


def spread_line(shares: GroupDistribution) -> str:
    """A short phrase for the log on how diverse a selection is."""
    return (
        f"variety by {shares.by}: about {shares.effective:.1f} of {shares.distinct} categories "
        f"(a random choice: {shares.effective_random:.1f})"
    )


# ---- Compute ledger -------------------------------------------------------------------------------------------------
# Tokens are counted without padding and over all processes; each rollout of a prompt counts the prompt's tokens once.
# `run.json` has a [`Cost`] for the scoring and the training of each phase, and the total. Methods can thus be compared
# at equal total compute and not only at equal steps: a method that selects pays for its selection.

PRICES = (1.0, 3.0, 8.0)
"""Prices of a generated token that are shown side by side. They correspond to about a quarter, a half and two thirds
of a step's time being spent on generation (`docs/cost.md`)."""


@dataclass(frozen=True)
class Cost:
    """Tokens and time that an operation took.

    Args:
        tokens_generated (`int`): Tokens sampled.
        tokens_prompt (`int`): Prompt tokens read to sample them, counted once per rollout.
        tokens_forward (`int`): Tokens of forward passes without a gradient: reference policy, log-probabilities of the
            sampling policy, and solutions and prompts that selectors read.
        tokens_trained (`int`): Tokens, prompts included, that went through a forward and a backward pass, of training
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
        """Total compute in tokens of a forward pass; a trained token counts 1 + 2 (`BACKWARD`) times.

        This is the usual estimate of 2 operations per parameter and token for the forward pass and 4 for the backward
        pass. Attention, which depends on the length, is left out. Gradient capture counts as a whole backward pass,
        although it costs less.

        Args:
            price (`float`): Forward equivalents of a generated token.
        """
        forward = price * self.tokens_generated + self.tokens_prompt + self.tokens_forward
        return forward + (1 + BACKWARD) * self.tokens_trained

    @property
    def forward_equivalents(self) -> float:
        """[`compute`] if a generated token costs the same as a token that is read."""
        return self.compute(1.0)


@dataclass(frozen=True)
class Ledger:
    """Costs of the phases of a run.

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
        """Sum of an account over all phases."""
        total = Cost()
        for costs in self.entries.values():
            total += costs.get(account, Cost())
        return total

    @property
    def total(self) -> Cost:
        """Sum over all accounts and phases."""
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

    Its state is plain JSON and is saved in checkpoints, so that a resumed run has the same counts as an uninterrupted
    one.

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
        """Start a phase.

        Args:
            seen (`int`): Tokens of prompts and completions that the trainer has counted so far.
        """
        self.load_state_dict({"generated": 0, "seen_before": seen, "seconds": 0.0})

    def add_step(self, mean_lengths: Sequence[float]) -> None:
        """Count what was generated since the last step; call it at the end of each step, before the trainer logs.

        Args:
            mean_lengths (sequence of `float`): Mean completion length of each generation since the last log. This is
                the trainer's own list, which is a new object after each log.
        """
        last_list, last_length = self._last
        # If the list is the same object as at the last step, only the appended values are new; otherwise all of them.
        start = last_length if mean_lengths is last_list else 0
        self._generated += sum(round(mean * self.rollouts) for mean in mean_lengths[start:])
        self._last = mean_lengths, len(mean_lengths)

    def cost(self, seen: int, passes: int = 1, forwards: int = 0) -> Cost:
        """Cost of the phase so far.

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
        """The state as plain JSON values."""
        return {
            "generated": self._generated,
            "seen_before": self._seen_before,
            "seconds": self._seconds(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from [`state_dict`]; the clock starts now."""
        self._generated, self._seen_before = state["generated"], state["seen_before"]
        self._seconds_before, self._began = state["seconds"], self.clock()


BASE = "base"
"""Key for what precedes the first phase: the metrics of the initial policy."""

SCORING = "scoring"
"""Key under which `trl-learnalign select` notes its measurements, which all selectors share."""

SCORING_ACCOUNT, TRAINING_ACCOUNT = "scoring", "training"
"""Accounts of the ledger."""

KINDS: dict[str, type[Note]] = {}
"""Note types by their key."""


# ---- Notes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Note(Entry):
    """Base class of notes on a phase.

    Args:
        step (`int`): Optimizer step at which it was written.
    """

    kind: ClassVar[str] = ""
    """Key of notes of this type, of which a phase has at most one."""

    account: ClassVar[str | None] = None
    """Account of the ledger to which `cost` is added."""

    is_of_the_end: ClassVar[bool] = False
    """Whether it is written at the end of a phase, and is thus invalid for a phase that is resumed."""

    step: int

    def __init_subclass__(cls, kind: str = "") -> None:
        cls.kind = kind
        if kind:
            KINDS[kind] = cls

    @property
    def key(self) -> str:
        """Key under which this note is stored."""
        return self.kind

    @property
    def charge(self) -> Cost | None:
        """The cost that the note adds to its account."""
        return None


@dataclass(frozen=True, kw_only=True)
class ChargedNote(Note):
    """A note with a cost in tokens and time.

    Args:
        cost (`Cost`, *optional*): `None` if it was free, or was written by a version without a ledger.
    """

    cost: Cost | None = None

    @property
    def charge(self) -> Cost | None:
        """The cost."""
        return self.cost


@dataclass(frozen=True, kw_only=True)
class SelectionNote(SelectionStatistics, ChargedNote, kind="selection"):
    """The selection of a stage; written when the stage begins.

    Args:
        scored (`bool`): Whether candidates were scored; otherwise all were taken, because there were not more than
            needed.
        overlap (`float`, *optional*): Share of the selected prompts that the previous stage's ranking would have
            selected from the same candidates.
        not_scored (`int`): Candidates that were not scored (`pool_sample`, `rollout_budget`).
        unscored_selected (`int`): Those of them that were selected in addition.
        shortfall (`str`, *optional*): What the selection lacks, in words.
        no_signal (`str`, *optional*): Why no candidate is learnable, if all rollouts are correct, or none is.
        scoring (`ScoringEntry`, *optional*): Cost of measuring.
        reliability (`Reliability`, *optional*): Repeatability of the ranking, if it was requested.
        breadth (`GradientDiversity`, *optional*): Diversity of the selection, if prompts have features.
        shares (`tuple[GroupDistribution]`): Distribution over categories, by columns and clusters.
    """

    account = SCORING_ACCOUNT

    scored: bool
    overlap: float | None = None
    not_scored: int = 0
    unscored_selected: int = 0
    shortfall: str | None = None
    no_signal: str | None = None
    scoring: ScoringEntry | None = None
    reliability: Reliability | None = None
    breadth: GradientDiversity | None = None
    shares: tuple[GroupDistribution, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TrainingNote(ChargedNote, kind="training"):
    """A completed phase of training.

    Args:
        steps (`int`): Actual optimizer steps.
        reward (`float`, *optional*): Mean of the logged rewards; `None` if none could be judged.
        training_seconds (`float`, *optional*): Wall time.
    """

    account = TRAINING_ACCOUNT
    is_of_the_end = True

    steps: int
    reward: float | None = None
    training_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class RolloutsNote(Note, kind="rollouts"):
    """Statistics of the rollouts that a phase made for training; written when it ends.

    A *group* is the rollouts of one prompt in one generation.

    Args:
        groups (`int`): Groups that were rolled out.
        useful (`int`): Groups with a gradient: at least one rollout has a nonzero advantage and a token in the loss.
        mixed (`int`): Groups with both correct and incorrect rollouts, by the success reward.
        prompts (`int`, *optional*): Distinct prompts among them; unknown in the trainer's own order.
        groups_trained (`int`): Groups in the generations that were trained on. With dynamic sampling this is fewer
            than were rolled out.
        tokens_given (`int`, *optional*): With zero-advantage skipping: tokens that TRL would have trained on, over all
            passes over the rollouts.
        tokens_trained (`int`, *optional*): Tokens that were trained on.
        tokens_idle (`int`, *optional*): Trained tokens without a gradient, in rows that are kept because an optimizer
            step needs a row, and all processes need equally many.
        not_skipped (`str`, *optional*): Why nothing was skipped although skipping was requested.
        repeated (`tuple[RepeatedPrompt]`): In adaptive order: the prompts that were rolled out most often.
        shares (`tuple[GroupDistribution]`): In adaptive order: distribution over categories of prompts, by columns.
    """

    is_of_the_end = True

    groups: int
    useful: int
    mixed: int
    groups_trained: int
    prompts: int | None = None
    tokens_given: int | None = None
    tokens_trained: int | None = None
    tokens_idle: int | None = None
    not_skipped: str | None = None
    repeated: tuple[RepeatedPrompt, ...] = ()
    shares: tuple[GroupDistribution, ...] = ()

    @property
    def useful_share(self) -> float | None:
        """Share of the groups with a gradient; `None` without any group."""
        return self.useful / self.groups if self.groups else None

    @property
    def mixed_share(self) -> float | None:
        """Share of the groups with both correct and incorrect rollouts; `None` without any group."""
        return self.mixed / self.groups if self.groups else None

    @property
    def skipped_share(self) -> float | None:
        """Share of the tokens that was not trained on; `None` without skipping."""
        if not self.tokens_given or self.tokens_trained is None:
            return None
        return 1 - self.tokens_trained / self.tokens_given

    @property
    def idle_share(self) -> float | None:
        """Share of the tokens that was trained on without a gradient; `None` without skipping."""
        if not self.tokens_given or self.tokens_idle is None:
            return None
        return self.tokens_idle / self.tokens_given


@dataclass(frozen=True, kw_only=True)
class BeliefNote(Note, kind="belief"):
    """Accuracy of the predicted success rates in a phase (`trl_learnalign.adaptive.belief`).

    Each rollout is compared with the prediction for its prompt before its generation.

    Args:
        rollouts (`int`): Rollouts that could be judged.
        predicted (`float`, *optional*): Mean prediction over them; like the other values, `None` without any rollout.
        seen (`float`, *optional*): Share of correct rollouts.
        brier (`float`, *optional*): Mean squared difference of prediction and outcome. The constant prediction `seen`
            has `seen (1 - seen)`.
        auc (`float`, *optional*): Probability that a correct rollout had a higher prediction than an incorrect one;
            `None` if all outcomes are equal.
        calibration_error (`float`, *optional*): Mean absolute difference of predicted and observed rates over the
            bins.
        bins (`tuple[CalibrationBin]`): The reliability diagram.
        concentration (`float`): The value of `adaptive_concentration` in use at the end.
    """

    is_of_the_end = True

    rollouts: int
    predicted: float | None
    seen: float | None
    brier: float | None
    auc: float | None
    calibration_error: float | None
    bins: tuple[CalibrationBin, ...]
    concentration: float


@dataclass(frozen=True, kw_only=True)
class MetricsNote(Note, kind="metrics"):
    """Return value of `on_phase_end`, in `others`, for the policy after a phase or before the first (`"base"`)."""

    open = True
    is_of_the_end = True

    @property
    def accuracy(self) -> float | None:
        """Held-out accuracy, if it was measured."""
        return self.others.get("accuracy")

    @property
    def problems(self) -> int:
        """Number of held-out problems; 0 if unknown."""
        return int(self.others.get("n_eval", 0))

    @property
    def right(self) -> list[bool]:
        """Whether each held-out problem was answered correctly, in order; empty if unknown."""
        return [mark == "1" for mark in self.others.get("right", "")]

    @property
    def problem_set(self) -> str | None:
        """Digest of the held-out problems."""
        return self.others.get("problems")


@dataclass(frozen=True, kw_only=True)
class PolicyNote(Note, kind="policy"):
    """The warmed-up policy that `trl-learnalign select` measures with.

    Args:
        weights (`str`): Digest of its weights.
        scoring_batch_prompts (`int`): Prompts of one generation call.
    """

    weights: str
    scoring_batch_prompts: int


@dataclass(frozen=True, kw_only=True)
class MeasuresNote(ChargedNote, kind="measures"):
    """Everything that `trl-learnalign select` has measured in this folder so far, over all calls.

    Args:
        measures (mapping): Seconds and tokens of each measure, by its name.
    """

    account = SCORING_ACCOUNT

    measures: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class EmbeddingNote(ChargedNote, kind="embeddings"):
    """The initial policy has read the prompts for embeddings, before any rollout."""

    account = SCORING_ACCOUNT


@dataclass(frozen=True, kw_only=True)
class SubsetNote(SelectionStatistics, Note):
    """The subsets of one selector, stored under the selector's name in `phases.subsets`.

    Args:
        selector (`str`): Its name.
        sizes (mapping): Requested size, as string → actual size.
        shortfall (`str`, *optional*): What the largest subset lacks, in words.
        no_signal (`str`, *optional*): Why no candidate is learnable; as in [`SelectionNote`].
        scoring (`ScoringEntry`, *optional*): Cost of measuring, for all selectors of that call.
        breadth (`GradientDiversity`, *optional*): Diversity of the largest subset, if prompts have features.
        shares (`tuple[GroupDistribution]`): Distribution of the largest subset over categories, by columns and
            clusters.
    """

    selector: str
    sizes: Mapping[str, int]
    shortfall: str | None = None
    no_signal: str | None = None
    scoring: ScoringEntry | None = None
    breadth: GradientDiversity | None = None
    shares: tuple[GroupDistribution, ...] = ()

    @property
    def key(self) -> str:
        """The selector."""
        return self.selector


@dataclass(frozen=True, kw_only=True)
class UnknownNote(Note):
    """A note of a kind unknown to this version; it is kept, and written back unchanged."""


def read_note(phase: str, key: str, values: Any) -> Note:
    """Read a note.

    Args:
        phase (`str`): Its phase.
        key (`str`): Key under which it is stored.
        values (mapping): The JSON object.

    Raises:
        `ValueError`: If it lacks a key, naming both.
    """
    kind = SubsetNote if phase == SUBSETS else KINDS.get(key, UnknownNote)
    return from_json(kind, values, f"phases.{phase}.{key}")
