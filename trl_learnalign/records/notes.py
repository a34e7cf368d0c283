"""What is noted of the phases of a run: one dataclass for each kind of note.

`phases` of `run.json` holds them by phase and kind: `{"stage_1": {"selection": {…}, "training": {…}}}`. A new kind is
one more dataclass here: with its `kind`, it is written, read back and, if it has a cost, entered into the ledger.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from trl_learnalign.records.entries import OTHERS, Entry, from_json
from trl_learnalign.records.layout import SUBSETS
from trl_learnalign.records.ledger import Cost

BASE = "base"
"""What comes before the first phase: it has metrics, of the policy as it was given."""

SCORING = "scoring"
"""What `trl-learnalign select` notes its measuring under, which serves all selectors."""

SCORING_ACCOUNT, TRAINING_ACCOUNT = "scoring", "training"
"""Accounts of the ledger."""

KINDS: dict[str, type[Note]] = {}
"""Note types by the key that they stand under."""


# ---- Parts of notes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SelectionStatistics(Entry):
    """Counts and means of the candidates that were scored; `None` where nothing is known.

    Args:
        candidates (`int`, *optional*): Candidates that were scored.
        selected (`int`, *optional*): Those of them that were taken.
        success_rate (`float`, *optional*): Mean over the candidates, from 0 to 1.
        success_rate_selected (`float`, *optional*): Mean over the selected.
        success_rate_left_out (`float`, *optional*): Mean over the rest.
        learnable_share (`float`, *optional*): Share of the candidates with learnability above 0.
        unlearnable_selected (`int`, *optional*): Selected ones without learnability.
        learnable_left_out (`int`, *optional*): Learnable ones that were not selected.
        score_selected (`float`, *optional*): Mean score of the selected.
        score_left_out (`float`, *optional*): Mean score of the rest.
        gradients_not_finite (`int`, *optional*): Candidates whose gradient was not finite, which score 0.
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


STATISTICS = [each.name for each in fields(SelectionStatistics) if each.name != OTHERS]
"""Their names."""


@dataclass(frozen=True, kw_only=True)
class CoverageEntry(Entry):
    """Which trainable parameters the gradient features contain.

    Args:
        share (`float`): Share of the trainable entries, from 0 to 1.
        direct (`list[str]`): Parameters that autograd itself gave the gradient of, one prompt at a time.
        missing (`list[str]`): Parameters that are not in the features.
        unfired (`list[str]`): Those of both lists that have a layer rule, which did not fit their use.
    """

    share: float
    direct: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unfired: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class ScoringEntry(Entry):
    """What measuring a pool took; tokens are over all ranks, and over the runs that it continued.

    Args:
        seconds (`float`): Wall time.
        tokens_generated (`int`): Completion tokens of all rollouts.
        tokens_prompt (`int`): Prompt tokens, once for each rollout.
        tokens_captured (`int`): Tokens, prompt and completion, that went through gradient capture.
        tokens_read (`int`): Tokens of texts that were read without rollouts.
        coverage (`CoverageEntry`, *optional*): Of the gradients, where some were captured.
        self_check (mapping): What comparing captured gradients with the trainer's own found.
        measures (mapping): Seconds and tokens of each measure, by its name.
    """

    seconds: float
    tokens_generated: int
    tokens_prompt: int
    tokens_captured: int
    tokens_read: int
    coverage: CoverageEntry | None = None
    self_check: Mapping[str, Any] = field(default_factory=dict)
    measures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Reliability(Entry):
    """How far rankings from two halves of the rollouts agree (`trl_learnalign.ranking.reliability`).

    Args:
        rollouts (`int`): Rollouts of a prompt, G.
        spearman_halves (`float`, *optional*): Rank correlation of the scores of the halves over all candidates;
            `None` if one of them is constant.
        overlap_halves (`float`): Share of the top N that both halves have.
        overlap_by_chance (`float`): N / P for P candidates.
        overlap_size (`int`): N.
        spearman (mapping): Number of rollouts (G, 2 G, 4 G, as text) → predicted correlation of two rankings from so
            many; `None` without a positive one to start from.
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
        unscored_selected (`int`): Prompts that were taken besides, without having been scored (`pool_sample`).
        shortfall (`str`, *optional*): What the choice lacks, in words.
        scoring (`ScoringEntry`, *optional*): What measuring took.
        reliability (`Reliability`, *optional*): How far the ranking would repeat itself, where that was asked for.
    """

    account = SCORING_ACCOUNT

    scored: bool
    overlap: float | None = None
    unscored_selected: int = 0
    shortfall: str | None = None
    scoring: ScoringEntry | None = None
    reliability: Reliability | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingNote(ChargedNote, kind="training"):
    """A phase was trained to its end.

    Args:
        steps (`int`): Optimizer steps, as they came.
        reward (`float`, *optional*): Mean of the logged rewards; `None` if none could be judged.
        training_seconds (`float`, *optional*): Wall time.
    """

    account = TRAINING_ACCOUNT

    steps: int
    reward: float | None = None
    training_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class MetricsNote(Note, kind="metrics"):
    """What `on_phase_end` returned, in `others`: of the policy after a phase, or before the first (`"base"`)."""

    open = True

    @property
    def accuracy(self) -> float | None:
        """Held-out accuracy, if it was measured."""
        return self.others.get("accuracy")

    @property
    def problems(self) -> int:
        """Held-out problems; 0 if it is not said."""
        return int(self.others.get("n_eval", 0))


@dataclass(frozen=True, kw_only=True)
class PolicyNote(Note, kind="policy"):
    """The warmed-up policy that `trl-learnalign select` measures with.

    Args:
        weights (`str`): Digest of its weights.
        rollout_prompts (`int`): Prompts of one generation call.
    """

    weights: str
    rollout_prompts: int


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
        scoring (`ScoringEntry`, *optional*): What measuring took, for all selectors of that call.
    """

    selector: str
    sizes: Mapping[str, int]
    shortfall: str | None = None
    scoring: ScoringEntry | None = None

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
