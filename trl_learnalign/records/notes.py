"""What is noted of the phases of a run: one dataclass for each kind of note.

`phases` of `run.json` holds them by phase and kind: `{"stage_1": {"selection": {…}, "training": {…}}}`. A new kind is
one more dataclass here: with its `kind`, it is written, read back and, if it has a cost, entered into the ledger.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from trl_learnalign.records.entries import Entry, from_json
from trl_learnalign.records.layout import SUBSETS
from trl_learnalign.records.ledger import Cost
from trl_learnalign.records.note_parts import (
    Breadth,
    CalibrationBin,
    Reliability,
    RepeatedPrompt,
    ScoringEntry,
    SelectionStatistics,
)
from trl_learnalign.records.shares import Shares

BASE = "base"
"""What comes before the first phase: it has metrics, of the policy as it was given."""

SCORING = "scoring"
"""What `trl-learnalign select` notes its measuring under, which serves all selectors."""

SCORING_ACCOUNT, TRAINING_ACCOUNT = "scoring", "training"
"""Accounts of the ledger."""

KINDS: dict[str, type[Note]] = {}
"""Note types by the key that they stand under."""


# ---- Notes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Note(Entry):
    """Something that is noted of a phase.

    Args:
        step (`int`): Optimizer step that it was noted at.
    """

    kind: ClassVar[str] = ""
    """Key that notes of this type stand under, once in a phase."""

    account: ClassVar[str | None] = None
    """Account of the ledger that `cost` goes to."""

    is_of_the_end: ClassVar[bool] = False
    """Whether it is noted when a phase has ended, and so is not true of one that goes on."""

    step: int

    def __init_subclass__(cls, kind: str = "") -> None:
        cls.kind = kind
        if kind:
            KINDS[kind] = cls

    @property
    def key(self) -> str:
        """Key that this note stands under."""
        return self.kind

    @property
    def charge(self) -> Cost | None:
        """What it adds to its account."""
        return None


@dataclass(frozen=True, kw_only=True)
class ChargedNote(Note):
    """A note of something that cost tokens and time.

    Args:
        cost (`Cost`, *optional*): `None` where it was free, or a version noted it that kept no ledger.
    """

    cost: Cost | None = None

    @property
    def charge(self) -> Cost | None:
        """The cost."""
        return self.cost


@dataclass(frozen=True, kw_only=True)
class SelectionNote(SelectionStatistics, ChargedNote, kind="selection"):
    """A stage has selected; noted when it begins.

    Args:
        scored (`bool`): Whether candidates were scored, or all taken since there were no more than wanted.
        overlap (`float`, *optional*): Share of the selected that the ranking of the stage before would have taken of
            the same candidates.
        not_scored (`int`): Candidates that were not scored (`pool_sample`, `rollout_budget`).
        unscored_selected (`int`): Those of them that were taken besides.
        shortfall (`str`, *optional*): What the choice lacks, in words.
        no_signal (`str`, *optional*): Why no candidate is learnable, where all rollouts count as right, or none does.
        scoring (`ScoringEntry`, *optional*): What measuring took.
        reliability (`Reliability`, *optional*): How far the ranking would repeat itself, where that was asked for.
        breadth (`Breadth`, *optional*): How broad the choice is, where prompts have features.
        shares (`tuple[Shares]`): Which categories it comes from, by columns and clusters.
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
    breadth: Breadth | None = None
    shares: tuple[Shares, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TrainingNote(ChargedNote, kind="training"):
    """A phase was trained to its end.

    Args:
        steps (`int`): Optimizer steps, as they came.
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
    """What the rollouts that a phase made for training came to; noted when it ends.

    A *group* is the rollouts of one prompt in one generation.

    Args:
        groups (`int`): Groups that were rolled out.
        useful (`int`): Those of them that have a gradient: some rollout has an advantage, and a token in the loss.
        mixed (`int`): Those with both right and wrong rollouts, by the reward that decides success.
        prompts (`int`, *optional*): Different prompts among them; not known in the trainer's own order.
        groups_trained (`int`): Groups that generations were made up of in the end: fewer where more was rolled out
            than trained on (dynamic sampling).
        tokens_given (`int`, *optional*): Where rollouts without an advantage are skipped: tokens of what TRL would
            have trained on, over all passes over it.
        tokens_trained (`int`, *optional*): Tokens of what was trained on.
        tokens_idle (`int`, *optional*): Those of them without a gradient: an optimizer step needs a row, and processes
            equally many.
        not_skipped (`str`, *optional*): Why nothing was skipped although it was asked for.
        repeated (`tuple[RepeatedPrompt]`): In adaptive order: prompts that were rolled out most often.
        shares (`tuple[Shares]`): In adaptive order: which categories of prompts were rolled out, by columns.
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
    shares: tuple[Shares, ...] = ()

    @property
    def useful_share(self) -> float | None:
        """Share of the groups that have a gradient; `None` without any."""
        return self.useful / self.groups if self.groups else None

    @property
    def mixed_share(self) -> float | None:
        """Share of the groups with both right and wrong rollouts; `None` without any."""
        return self.mixed / self.groups if self.groups else None

    @property
    def skipped_share(self) -> float | None:
        """Share of the tokens that was not trained on; `None` where nothing is skipped."""
        if not self.tokens_given or self.tokens_trained is None:
            return None
        return 1 - self.tokens_trained / self.tokens_given

    @property
    def idle_share(self) -> float | None:
        """Share of the tokens that was trained on without a gradient; `None` where nothing is skipped."""
        if not self.tokens_given or self.tokens_idle is None:
            return None
        return self.tokens_idle / self.tokens_given


@dataclass(frozen=True, kw_only=True)
class BeliefNote(Note, kind="belief"):
    """How right the belief about success rates was in a phase (`trl_learnalign.adaptive.calibration`).

    Each rollout is held against what was believed of its prompt before its generation.

    Args:
        rollouts (`int`): Rollouts that could be judged.
        predicted (`float`, *optional*): Mean prediction over them; `None` without any, as the others.
        seen (`float`, *optional*): Share of right ones.
        brier (`float`, *optional*): Mean squared distance of prediction and outcome. Whoever always says `seen` has
            `seen (1 - seen)`.
        auc (`float`, *optional*): Chance that a right rollout was predicted higher than a wrong one; `None` if all
            came out alike.
        calibration_error (`float`, *optional*): Mean distance of predicted and seen over the bins.
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
    """What `on_phase_end` returned, in `others`: of the policy after a phase, or before the first (`"base"`)."""

    open = True
    is_of_the_end = True

    @property
    def accuracy(self) -> float | None:
        """Held-out accuracy, if it was measured."""
        return self.others.get("accuracy")

    @property
    def problems(self) -> int:
        """Held-out problems; 0 if it is not said."""
        return int(self.others.get("n_eval", 0))

    @property
    def right(self) -> list[bool]:
        """Whether each held-out problem was answered rightly, in their order; empty if it is not said."""
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
    """What `trl-learnalign select` has measured in this folder so far, whoever asked for it.

    Args:
        measures (mapping): Seconds and tokens of each measure, by its name.
    """

    account = SCORING_ACCOUNT

    measures: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class EmbeddingNote(ChargedNote, kind="embeddings"):
    """Prompts were read by the initial policy, to tell them apart before anything is rolled out."""

    account = SCORING_ACCOUNT


@dataclass(frozen=True, kw_only=True)
class SubsetNote(SelectionStatistics, Note):
    """The subsets of one selector, under the selector's name in `phases.subsets`.

    Args:
        selector (`str`): Its name.
        sizes (mapping): Size that was asked for, as text → size that was found.
        shortfall (`str`, *optional*): What the largest subset lacks, in words.
        no_signal (`str`, *optional*): Why no candidate is learnable; as in [`SelectionNote`].
        scoring (`ScoringEntry`, *optional*): What measuring took, for all selectors of that call.
        breadth (`Breadth`, *optional*): How broad the largest subset is, where prompts have features.
        shares (`tuple[Shares]`): Which categories the largest subset comes from, by columns and clusters.
    """

    selector: str
    sizes: Mapping[str, int]
    shortfall: str | None = None
    no_signal: str | None = None
    scoring: ScoringEntry | None = None
    breadth: Breadth | None = None
    shares: tuple[Shares, ...] = ()

    @property
    def key(self) -> str:
        """The selector."""
        return self.selector


@dataclass(frozen=True, kw_only=True)
class UnknownNote(Note):
    """A note of a kind that this version does not know: kept, and written back as it came."""


def read_note(phase: str, key: str, values: Any) -> Note:
    """Read a note.

    Args:
        phase (`str`): Phase that it is about.
        key (`str`): Key that it stands under.
        values (mapping): The JSON object.

    Raises:
        `ValueError`: If it lacks a key, naming both.
    """
    kind = SubsetNote if phase == SUBSETS else KINDS.get(key, UnknownNote)
    return from_json(kind, values, f"phases.{phase}.{key}")
