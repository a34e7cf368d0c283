"""Parts of notes: what several kinds of notes have in common, and what would crowd one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from trl_learnalign.records.entries import OTHERS, Entry


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

    @property
    def learnable_share_selected(self) -> float | None:
        """Share of the selected with learnability above 0."""
        if self.unlearnable_selected is None or not self.selected:
            return None
        return 1 - self.unlearnable_selected / self.selected


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
class RoundEntry(Entry):
    """A round of scoring within a rollout budget (`trl_learnalign.measuring.rounds`).

    Args:
        prompts (`int`): Prompts that were rolled out.
        rollouts (`int`): Their rollouts.
        success_rate (`float`, *optional*): Mean over them; of the first round, which is a random sample, an estimate
            for all candidates. `None` if none could be judged.
        believed (`float`, *optional*): What was believed of it before; `None` for the random sample.
        learnable_share (`float`): Share of them with learnability above 0.
    """

    prompts: int
    rollouts: int
    success_rate: float | None
    believed: float | None
    learnable_share: float


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
        rounds (`tuple[RoundEntry]`): What each round came to, with a rollout budget.
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


@dataclass(frozen=True, kw_only=True)
class Breadth(Entry):
    """How broad a choice is, beside a random choice of as many prompts (`trl_learnalign.ranking.breadth`).

    Args:
        prompts (`int`): Chosen prompts that have a feature, and learnability where that is known.
        directions (`float`): Effective number of their directions: participation ratio of the spectrum of their
            normalised features, from 1 (all alike) to `prompts` (no two alike).
        directions_random (`float`): The same of the random choice.
        covered (`float`): Share of the pool's signal that the choice stands for: `Σ_j max_{i∈A} max(S_ij, 0)` over its
            value with all candidates in the place of `A`.
        covered_random (`float`): The same of the random choice.
        similarity (`float`): Mean cosine of a chosen prompt and the chosen one nearest to it.
        similarity_random (`float`): The same of the random choice.
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
        """What is wrong with a choice far narrower than a random one, as a sentence's end; `None` if it is not."""
        if self.directions >= NARROW * self.directions_random:
            return None
        return (
            f"the {self.prompts} chosen prompts point in about {self.directions:.1f} directions, as many random ones "
            f"in {self.directions_random:.1f}: they teach much the same; learnalign_coverage and learnalign_logdet "
            "choose more broadly"
        )


NARROW = 0.5
"""Of the directions of a random choice: a choice with fewer is far narrower."""


@dataclass(frozen=True, kw_only=True)
class CalibrationBin(Entry):
    """Predicted success rates between two bounds, and what came out.

    Args:
        low (`float`): Lower bound, included.
        high (`float`): Upper bound; included in the last bin alone.
        groups (`int`): Groups of rollouts whose prediction lies in it.
        rollouts (`int`): Their rollouts that could be judged.
        predicted (`float`, *optional*): Mean prediction over these rollouts; `None` without any.
        seen (`float`, *optional*): Share of right ones.
    """

    low: float
    high: float
    groups: int
    rollouts: int
    predicted: float | None = None
    seen: float | None = None


@dataclass(frozen=True, kw_only=True)
class RepeatedPrompt(Entry):
    """A prompt that was rolled out again and again.

    Args:
        index (`int`): Row of the training dataset.
        prompt (`str`): Its text; long ones without their middle.
        times (`int`): How often it was rolled out.
        first (`float`, *optional*): Share of right rollouts when it was for the first time; `None` if none could be
            judged.
        last (`float`, *optional*): The same for the last time.
    """

    index: int
    prompt: str
    times: int
    first: float | None = None
    last: float | None = None
