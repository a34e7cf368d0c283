"""What a LearnAlign run can be told, checked where it is declared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

AFTER_WARMUP = ("continue", "restart")
RESELECT = ("remaining", "all")
WHEN_SHORT = ("fill", "shrink")
ZERO_LEARNABILITY = ("last", "by_score")
PROJECTIONS = ("count_sketch", "rademacher", "none")
GRADIENT_ROLLOUTS = ("all", "one_correct")
SOLUTION_START = ("template", "token")
HIDDEN_TEXT = ("prompt", "prompt_and_solution")
PPL_MIDDLE = ("value", "rank")
SELECTIT_SHARES = ("ratio", "softmax")
SELECTOR_NAMES = (
    "learnalign",
    "learnability",
    "alignment",
    "gradient_dot",
    "validation_alignment",
    "feature_similarity",
    "random",
    "token_length",
    "ppl_top",
    "ppl_middle",
    "ifd",
    "selectit",
    "limr",
    "reward_variance",
)
"""What `trl_learnalign.selectors.SELECTORS` holds, known here so that a slip of the pen is found out at once."""


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class LearnAlignConfig:
    r"""Settings of warm-up, scoring, selection and stages; the trainer's own settings stay in its `GRPOConfig`.

    Field names do not clash with those of `GRPOConfig` and `ModelConfig`, so `TrlParser` reads all of them from one
    command line or YAML file. Method and defaults: Li et al., *LearnAlign*, Findings of ACL 2026 (arXiv 2506.11480).

    Raises:
        `ValueError`, `TypeError`: At construction, naming the value and the remedy.
    """

    warmup_samples: int = field(
        default=300,
        metadata=_help(
            "Prompts of the warm-up: a seeded random subset that is trained on before the first scoring. 0: none. "
            "Paper: 300 for GSM8K and MATH, 1000 for DAPO-MATH-17K; none before its staged RL."
        ),
    )
    warmup_passes: int = field(default=1, metadata=_help("Passes over the warm-up prompts."))
    stages: list[float] = field(
        default_factory=lambda: [0.5, 0.3, 0.2],
        metadata=_help(
            "Prompts of each stage: fractions of the pool (values up to 1), or counts (whole numbers from 2). "
            "Default: the paper's staged RL, halves first. One value, e.g. 1000, is its main setting."
        ),
    )
    stage_passes: list[int] = field(
        default_factory=lambda: [1],
        metadata=_help("Passes over each stage's prompts: one number for all stages, or one for each."),
    )
    stage_steps: list[int] | None = field(
        default=None,
        metadata=_help(
            "Optimizer steps of each stage instead of passes, so that any number of prompts is trained on equally "
            "long: one number for all stages, or one for each; 0 counts stage_passes. With plateau_patience it is the "
            "most that a stage takes."
        ),
    )
    after_warmup: str = field(
        default="continue",
        metadata=_help(
            "'continue': the stages start from the warmed-up policy. 'restart': after scoring, weights, optimizer and "
            "learning-rate schedule go back to their initial state, so that N samples means N."
        ),
    )
    reselect: str = field(
        default="remaining",
        metadata=_help(
            "'remaining': a stage chooses among the prompts that no earlier stage chose (as the paper), and averages "
            "scores over these. 'all': each stage chooses from, and averages over, the whole pool."
        ),
    )
    when_short: str = field(
        default="fill",
        metadata=_help(
            "When fewer prompts than wanted have learnability above 0: 'fill' from the zeros in seeded order, "
            "or 'shrink' the stage to those that have it. Either is said in the log and the record."
        ),
    )
    zero_learnability: str = field(
        default="last",
        metadata=_help(
            "Where prompts of learnability 0 (p = 0 or 1) rank, whose rewards teach nothing and whose score is 0. "
            "'last': behind every learnable prompt. 'by_score': the letter of Eq. 9, ahead of learnable prompts of "
            "negative score (a negative mean cosine with the pool)."
        ),
    )
    skip_forced_scoring: bool = field(
        default=False,
        metadata=_help(
            "Do not score a stage that has to take every remaining prompt anyway (the last of 50/30/20). Saves that "
            "stage's scoring; its record then holds no scores."
        ),
    )
    selector: str | list[str] = field(
        default_factory=lambda: ["learnalign"],
        metadata=_help(
            "How prompts are ranked: a name in `trl_learnalign.selectors.SELECTORS`, or your own function "
            "(pool) -> scores as 'package.module:function'. One for all stages, or one for each."
        ),
    )
    unbiased_learnability: bool = field(
        default=False,
        metadata=_help(
            "Learnability k (G - k) / (G (G - 1)), the unbiased estimate of p (1 - p) from k successes in G scorable "
            "rollouts, instead of the paper's plug-in k (G - k) / G^2."
        ),
    )
    exclude_self: bool = field(
        default=False,
        metadata=_help(
            "Leave a prompt's alignment with itself (j = i) out of its average over the pool; the paper includes it."
        ),
    )
    reliability: bool = field(
        default=False,
        metadata=_help(
            "Also rank by each half of the rollouts, and record how well the two rankings agree and what more "
            "rollouts would give. Costs no further pass, and twice the disk of the features; num_generations must be "
            "even."
        ),
    )
    pool_sample: int | None = field(
        default=None,
        metadata=_help(
            "Score only this many of a stage's candidates: a seeded random subset, larger ones containing the smaller "
            "ones. The others have no score and are selected only to fill a stage larger than the subset."
        ),
    )
    gradient_rollouts: str = field(
        default="all",
        metadata=_help(
            "Rollouts that a prompt's gradient is taken of: 'all', or 'one_correct', its first successful one (with "
            "the advantage that the group gave it): 1/G of the capture cost."
        ),
    )
    solution_column: str | None = field(
        default=None,
        metadata=_help(
            "Column with written-out solutions, for selectors that read them. Default: 'reference' if there is one, "
            "else 'solution'."
        ),
    )
    likelihood_model: str | None = field(
        default=None,
        metadata=_help(
            "Model (hub id or path) that reads solutions for ppl_top, ppl_middle, ifd and selectit. Default: the "
            "policy as it is when a stage begins."
        ),
    )
    solution_start: str = field(
        default="template",
        metadata=_help(
            "What precedes a solution read without its prompt (ifd): 'template', the chat template's generation "
            "prompt, as '### Response:' in the code of Cherry_LLM; 'token', only a start token, as in its paper."
        ),
    )
    ppl_middle: str = field(
        default="value",
        metadata=_help(
            "Nearest to the median perplexity by 'value', or by 'rank' (as many below as above: middle percentiles)."
        ),
    )
    hidden_text: str = field(
        default="prompt",
        metadata=_help(
            "Text whose hidden states feature_similarity compares: 'prompt', or 'prompt_and_solution' as RDS+ does "
            "on instruction data."
        ),
    )
    selectit_shares: str = field(
        default="ratio",
        metadata=_help(
            "How selectit turns the probabilities of the five ratings into shares: 'ratio', p / sum(p) as its code; "
            "'softmax', exp(p) / sum(exp(p)) as its paper."
        ),
    )
    reward_history: str | None = field(
        default=None,
        metadata=_help(
            "File with success rates of a previous run, for limr and reward_variance: Parquet with columns index (or "
            "prompt_id), pass and success_rate, or JSON {index: [rate of each pass]}."
        ),
    )
    max_text_tokens: int = field(
        default=2048,
        metadata=_help(
            "Tokens of prompt and solution that are read without rollouts; longer texts are cut there (and never "
            "beyond the model's own limit)."
        ),
    )
    forward_rows: int = field(
        default=8,
        metadata=_help(
            "Texts per forward pass when they are read without rollouts, per process. Decides memory and speed, not "
            "the result."
        ),
    )
    success_reward: str | None = field(
        default=None,
        metadata=_help(
            "Name of the reward function that says whether a rollout is right. Default: the only one, or the one "
            "whose name contains 'accuracy'. Other rewards never enter the success rate."
        ),
    )
    success_threshold: float = field(
        default=0.5, metadata=_help("A rollout succeeds if its success reward is above this value.")
    )
    projection: str = field(
        default="count_sketch",
        metadata=_help(
            "Random projection of the gradients: 'count_sketch'; 'rademacher' (dense, for small models); "
            "'none' (the full gradient, for tests)."
        ),
    )
    feature_dim: int = field(
        default=8192, metadata=_help("Dimensions d of a projected gradient. The paper gives none; LESS has 8192.")
    )
    capture_rank: int | str | None = field(
        default=None,
        metadata=_help(
            "None: each layer's exact gradient is projected. k: layer inputs and output gradients are folded to about "
            "k dimensions first, which is cheaper and a little noisier; sides below 2k stay exact. 'auto': a k for "
            "each layer by its size; layers of a few hundred dimensions stay exact."
        ),
    )
    capture_tokens: int = field(
        default=16384,
        metadata=_help(
            "Token budget (padding included) of one forward pass of gradient capture, per process. Decides memory and "
            "speed, not the result."
        ),
    )
    self_check: bool = field(
        default=True,
        metadata=_help(
            "Compare the captured gradients of the first two prompts of each scoring, parameter by parameter, with "
            "those of the loss that the trainer itself computes on them, and stop if they differ by more than "
            "rounding. Costs three more backward passes."
        ),
    )
    rollout_prompts: int | None = field(
        default=None,
        metadata=_help(
            "Prompts (times G rollouts) per generation call of scoring, per process. Default: as many as the "
            "trainer generates at once per process."
        ),
    )
    shard_prompts: int = field(
        default=128,
        metadata=_help("Prompts per shard of scoring: the unit that is written to disk and survives a crash."),
    )
    plateau_patience: int = field(
        default=0,
        metadata=_help(
            "End a stage early after this many steps without improvement of the smoothed reward. 0: never."
        ),
    )
    plateau_min_delta: float = field(
        default=0.005, metadata=_help("Rise of the smoothed reward that counts as improvement.")
    )
    plateau_smoothing: float = field(
        default=0.9, metadata=_help("Weight of the past in the smoothed reward, from 0 up to but not including 1.")
    )
    save_at_boundaries: bool = field(
        default=True,
        metadata=_help("Save a checkpoint at the end of each phase (unless save_strategy is 'no'), before scoring."),
    )
    keep_features: bool = field(
        default=True,
        metadata=_help(
            "Keep a stage's measurements (projected gradients take feature_dim x 4 bytes per learnable prompt) after "
            "its selection; otherwise they go with the first checkpoint that knows its pool."
        ),
    )
    keep_rollouts: int = field(
        default=2,
        metadata=_help(
            "Rollouts of each candidate whose text (cut to 4,000 characters) is kept with its measurements, right and "
            "wrong ones in turn, so that the report can show those of the best and worst prompts. 0: none."
        ),
    )
    selection_seed: int = field(
        default=42,
        metadata=_help(
            "Seed of everything random in the selection: warm-up subset, projection, rollouts, ties, order."
        ),
    )
    record_dir: str | None = field(
        default=None, metadata=_help("Folder of records and features. Default: <output_dir>/learnalign.")
    )

    def __post_init__(self) -> None:
        self._check_types()
        self.stages = _as_list(self.stages)
        self._check_selector()
        self.stage_passes = [_whole("stage_passes", value, 1) for value in _as_list(self.stage_passes)]
        for name, least in (
            ("warmup_samples", 0),
            ("warmup_passes", 1),
            ("feature_dim", 16),
            ("capture_tokens", 1),
            ("shard_prompts", 1),
            ("max_text_tokens", 16),
            ("forward_rows", 1),
            ("plateau_patience", 0),
            ("keep_rollouts", 0),
            ("selection_seed", 0),
        ):
            setattr(self, name, _whole(name, getattr(self, name), least))
        self._check_capture_rank()
        for name, least in (("rollout_prompts", 1), ("pool_sample", 2)):
            if getattr(self, name) is not None:
                setattr(self, name, _whole(name, getattr(self, name), least))
        for name, allowed in (
            ("after_warmup", AFTER_WARMUP),
            ("reselect", RESELECT),
            ("when_short", WHEN_SHORT),
            ("zero_learnability", ZERO_LEARNABILITY),
            ("projection", PROJECTIONS),
            ("gradient_rollouts", GRADIENT_ROLLOUTS),
            ("solution_start", SOLUTION_START),
            ("ppl_middle", PPL_MIDDLE),
            ("hidden_text", HIDDEN_TEXT),
            ("selectit_shares", SELECTIT_SHARES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(map(repr, allowed))}.")
        self._check_stages()
        self._check_stage_steps()
        if not 0 <= self.plateau_smoothing < 1:
            raise ValueError(
                f"plateau_smoothing={self.plateau_smoothing}: choose a value from 0 up to, not including, 1."
            )
        if self.reliability and self.gradient_rollouts == "one_correct":
            raise ValueError(
                "reliability=True compares gradients of two halves of the rollouts, and "
                "gradient_rollouts='one_correct' takes a single one: set gradient_rollouts='all' or reliability=False."
            )
        if self.after_warmup == "restart" and self.warmup_samples == 0:
            raise ValueError(
                "after_warmup='restart' with warmup_samples=0: there is no warm-up to restart from; "
                "set after_warmup='continue' or warmup_samples above 0."
            )

    def _check_types(self) -> None:
        # What YAML and command lines make of a slip of the pen: "off" for a switch, a list for a name.
        for item in fields(self):
            value, kind = getattr(self, item.name), str(item.type)
            if kind == "bool" and not isinstance(value, bool):
                raise ValueError(f"{item.name}={value!r}: give true or false.")
            if kind == "float" and (
                isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value)
            ):
                raise ValueError(f"{item.name}={value!r}: give a number.")
            if kind in ("str", "str | None") and not isinstance(value, str) and not (value is None and "None" in kind):
                raise ValueError(f"{item.name}={value!r}: give a text.")

    def _check_capture_rank(self) -> None:
        if self.capture_rank in (None, "auto"):
            return
        try:
            self.capture_rank = _whole("capture_rank", self.capture_rank, 8)
        except ValueError:
            raise ValueError(
                f"capture_rank={self.capture_rank!r}: give a whole number of at least 8, 'auto', or nothing."
            ) from None

    def _check_stages(self) -> None:
        if not self.stages:
            raise ValueError("stages is empty: give at least one fraction or count, e.g. stages=[1000].")
        for value in self.stages:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"stages={self.stages}: {value!r} is not a positive number.")
        fractions = [value <= 1 for value in self.stages]
        if any(fractions) and not all(fractions):
            raise ValueError(
                f"stages={self.stages} mixes fractions (up to 1) and counts (from 2): give all as one or the other."
            )
        if all(fractions):
            self.stages = [float(value) for value in self.stages]
            if self.reselect == "remaining" and sum(self.stages) > 1 + 1e-9:
                raise ValueError(
                    f"stages={self.stages} add up to {sum(self.stages):g} of the pool: with reselect='remaining' the "
                    "fractions must add up to at most 1; lower them, or use reselect='all'."
                )
        else:
            self.stages = [_whole("stages", value, 2) for value in self.stages]
        if len(self.stage_passes) not in (1, len(self.stages)):
            raise ValueError(
                f"stage_passes={self.stage_passes} for {len(self.stages)} stages: give one number, or one for each."
            )

    def _check_stage_steps(self) -> None:
        if self.stage_steps is None:
            return
        steps = [_whole("stage_steps", value, 0) for value in _as_list(self.stage_steps)]
        self.stage_steps = steps if any(steps) else None
        if self.stage_steps is None:
            return
        if len(steps) not in (1, len(self.stages)) or not all(steps):
            raise ValueError(
                f"stage_steps={steps} for {len(self.stages)} stage(s): give one number above 0, or one for each; 0 "
                "alone counts stage_passes instead."
            )
        if any(passes != 1 for passes in self.stage_passes):
            raise ValueError(
                f"stage_passes={self.stage_passes} and stage_steps={steps} both say how long a stage is: set "
                "stage_steps=0 to count passes, or leave stage_passes at 1."
            )
        if self.when_short == "shrink":
            raise ValueError(
                f"stage_steps={steps} gives a stage its steps whatever the number of its prompts, and "
                "when_short='shrink' takes steps away with the prompts: set when_short='fill', or count stage_passes."
            )

    def _check_selector(self) -> None:
        names = _as_list(self.selector)
        if not names or not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"selector={self.selector!r}: give a name, or a list with one name for each stage.")
        _check_names(names)
        if len(names) not in (1, len(self.stages)):
            raise ValueError(
                f"selector={names} for {len(self.stages)} stage(s): give one name, or one for each stage."
            )
        self.selector = names[0] if len(names) == 1 else names

    @property
    def selectors(self) -> list[str]:
        """Name of each stage's selector."""
        names = _as_list(self.selector)
        return names * len(self.stages) if len(names) == 1 else names

    @property
    def stages_are_fractions(self) -> bool:
        """Whether `stages` are fractions of the pool rather than counts."""
        return self.stages[0] <= 1


@dataclass
class SubsetConfig(LearnAlignConfig):
    """Settings of a selection without training; settings of stages have no effect.

    Raises:
        `ValueError`, `TypeError`: At construction, naming the value and the remedy.
    """

    top: list[int] | None = field(
        default=None,
        metadata=_help(
            "Sizes of the subsets, e.g. 100 500 1000 2000: nested, from one scoring pass. Default: stages, if they "
            "are counts."
        ),
    )
    push_to_hub_id: str | None = field(
        default=None,
        metadata=_help(
            "Push the subsets to this dataset repository of the hub, as configurations <selector>_top_<N>."
        ),
    )

    def __post_init__(self) -> None:
        if self.top is None:
            counts: list[Any] = [value for value in _as_list(self.stages) if isinstance(value, (int, float))]
            counts = [value for value in counts if value > 1]
            if not counts:
                raise ValueError("How many prompts are to be selected? Give their number with top, e.g. top=[1000].")
            self.top = counts
        self.top = sorted({_whole("top", value, 1) for value in _as_list(self.top)})
        self.stages, self.stage_passes, self.stage_steps = [max(2, self.top[-1])], [1], None
        self.after_warmup = "continue"  # nothing comes after it
        super().__post_init__()

    def _check_selector(self) -> None:
        names = list(dict.fromkeys(_as_list(self.selector)))
        if not names or not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"selector={self.selector!r}: give one name, or several.")
        _check_names(names)
        self.selector = names[0] if len(names) == 1 else names

    @property
    def selectors(self) -> list[str]:
        """Names of the selectors; all rank the same pool."""
        return _as_list(self.selector)

    @property
    def sizes(self) -> list[int]:
        """Sizes of the subsets, ascending."""
        return _as_list(self.top)


def _check_names(names: Sequence[str]) -> None:
    """Selectors are names of the table, or dotted paths, which are looked at when a run begins."""
    for name in names:
        if name not in SELECTOR_NAMES and not {".", ":"} & set(name):
            raise ValueError(
                f"selector={name!r}: choose one of {', '.join(map(repr, SELECTOR_NAMES))}, or name a function of your "
                "own as 'package.module:function'."
            )


def _as_list(value: Any) -> list[Any]:
    # YAML scalars ("stages: 1000") reach a list field as they are.
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _whole(name: str, value: Any, least: int) -> int:
    try:
        number = int(value)
        if isinstance(value, bool) or number != float(value):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name}={value!r}: give a whole number of at least {least}.") from None
    if number < least:
        raise ValueError(f"{name}={value!r}: give a whole number of at least {least}.")
    return number
