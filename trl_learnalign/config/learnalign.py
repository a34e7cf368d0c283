"""The settings of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from trl_learnalign.config import fields
from trl_learnalign.config.fields import (
    Settings,
    as_list,
    at_least,
    decay,
    each,
    interval,
    optional,
    orders,
    ranged,
    rank,
    selector_names,
    setting,
    share,
    shares,
    smoothing,
    text,
)

BACKWARD = 2.0
"""Operations of a backward pass per operation of a forward pass: gradients of activations and of weights."""

WHOLE_POOL: dict[str, Any] = {"warmup_samples": 0, "stages": [1.0]}

ADAPTIVE: dict[str, Any] = {
    **WHOLE_POOL,
    "order": ["auto"],
    "selector": ["learnalign_coverage"],
    "skip_zero_advantages": True,
    "skip_forced_scoring": True,
}
"""Differences between a run in adaptive order and the paper's run."""


@dataclass
class LearnAlignConfig(Settings):
    r"""Settings of warm-up, scoring, selection and stages; the trainer's own settings stay in its `GRPOConfig`.

    The defaults are the paper's staged run (Li et al., *LearnAlign*, Findings of ACL 2026, arXiv 2506.11480): a
    warm-up on 300 prompts, then stages of 50 %, 30 % and 20 % that LearnAlign selects. Learning rate, G, `beta`,
    `epsilon` and the weights of the rewards are set in the trainer; `recipes/configs/gsm8k_staged.yaml` has the
    paper's values. `recipes/configs/table1_gsm8k.yaml` is a cell of its Table 1: N prompts, selected once for the base
    model. Other training modes have constructors: [`LearnAlignConfig.adaptive`], [`LearnAlignConfig.skipping`] and
    [`LearnAlignConfig.control`].

    Field names do not clash with those of `GRPOConfig` and `ModelConfig`, so `TrlParser` reads all of them from one
    command line or YAML file.

    Raises:
        `ValueError`: At construction, if a value is invalid, naming the value and the remedy.
    """

    SECTIONS: ClassVar[dict[str, str]] = {
        "warmup_samples": "Warm-up and stages",
        "selector": "Selection: how a stage's prompts are chosen",
        "solution_column": "Options of single selectors",
        "success_reward": "Success: which rollouts are correct",
        "projection": "Scoring: rollouts and gradients of the candidates",
        "plateau_patience": "Plateau: stages that end early",
        "save_at_phase_end": "Records: what is saved and where, and the seed",
        "order": "Order of training, and the rollouts to train on",
        "adaptive_embeddings": "Constants of the adaptive order",
        "compute_budget": "Equal compute: runs that end at a given cost",
        "verbose": "Console output",
        "rollout_budget": "Rollout budget: score only the candidates expected to be most learnable",
        "category_columns": "Tables of a selection for trackers and reports",
    }

    # ---- Warm-up and stages -----------------------------------------------------------------------------------------

    warmup_samples: Annotated[int, at_least(0)] = setting(
        300,
        "Prompts of the warm-up: a seeded random subset that is trained on before the first scoring. 0: none. "
        "Paper: 300 for GSM8K and MATH, 1000 for DAPO-MATH-17K; none before its staged RL.",
    )
    warmup_epochs: Annotated[int, at_least(1)] = setting(1, "Passes over the warm-up prompts.")
    stages: Annotated[list[float], shares] = setting(
        [0.5, 0.3, 0.2],
        "Prompts of each stage: fractions of the pool (values up to 1), or counts (whole numbers from 2). 1: the "
        "whole pool in one stage, without scoring or selection. One count, e.g. 1000, is the paper's main setting; "
        "0.5 0.3 0.2 its staged RL.",
    )
    stage_epochs: Annotated[list[int] | None, each(at_least(1))] = setting(
        None,
        "Passes over each stage's prompts: one number for all stages, or one per stage. Default: 1; if the whole "
        "pool is one stage without a warm-up, the trainer's own max_steps or num_train_epochs.",
    )
    stage_steps: Annotated[list[int] | None, each(at_least(0))] = setting(
        None,
        "Optimizer steps of each stage instead of passes, so that the length does not depend on the number of "
        "prompts: one number for all stages, or one per stage; 0 uses stage_epochs. With plateau_patience this is "
        "the maximum length of a stage.",
    )
    after_warmup: Literal["continue", "restart"] = setting(
        "continue",
        "'continue': the stages start from the warmed-up policy. 'restart': after scoring, weights, optimizer and "
        "learning-rate schedule are reset to their initial state, so that N selected prompts are all that the "
        "final policy is trained on.",
    )
    reselect: Literal["remaining", "all"] = setting(
        "remaining",
        "'remaining': a stage selects among the prompts that no earlier stage selected (as in the paper), and "
        "averages scores over these. 'all': each stage selects from, and averages over, the whole pool.",
    )
    on_shortfall: Literal["fill", "shrink"] = setting(
        "fill",
        "If too few prompts have learnability above 0: 'fill' the stage with prompts of learnability 0, in seeded "
        "order, or 'shrink' it to the others. The log and the record report either.",
    )
    zero_learnability: Literal["last", "by_score"] = setting(
        "last",
        "Rank of prompts of learnability 0 (p = 0 or 1), which have no gradient and score 0. 'last': behind every "
        "learnable prompt. 'by_score': exactly Eq. 9, ahead of learnable prompts with negative scores (a negative "
        "mean cosine with the pool).",
    )
    skip_forced_scoring: bool = setting(
        False,
        "Do not score a stage that takes every prompt that earlier stages have left (the last of 50/30/20), since "
        "its scores would select nothing. False, as in the paper: score it for its table. A stage of the whole "
        "pool is never scored; one that on_shortfall='shrink' may shorten always is.",
    )

    # ---- Selection: how a stage's prompts are chosen ----------------------------------------------------------------

    selector: Annotated[
        str | list[str], selector_names("give a name, or a list with one name per stage")
    ] = setting(
        ["learnalign"],
        "How prompts are ranked: a name in `trl_learnalign.selectors.SELECTORS`, or your own function (pool) -> "
        "scores as 'package.module:function'. One for all stages, or one per stage.",
    )
    unbiased_learnability: bool = setting(
        False,
        "Learnability k (G - k) / (G (G - 1)), the unbiased estimate of p (1 - p) from k successes in G scorable "
        "rollouts, instead of the paper's plug-in k (G - k) / G^2.",
    )
    exclude_self: bool = setting(
        False,
        "Leave a prompt's alignment with itself (j = i) out of its average over the pool; the paper includes it.",
    )
    reliability: bool = setting(
        False,
        "Also rank by each half of the rollouts, and record how well the two rankings agree and what more rollouts "
        "would improve. Needs no further forward pass but twice the disk space for features; num_generations must "
        "be even.",
    )
    pool_sample: Annotated[int | None, at_least(2)] = setting(
        None,
        "Score only this many of a stage's candidates: a seeded random subset (larger subsets contain smaller "
        "ones). The others have no score and are selected only to fill a stage larger than the subset.",
    )
    gradient_rollouts: Literal["all", "one_correct"] = setting(
        "all",
        "Rollouts that enter a prompt's gradient: 'all', or 'one_correct', its first successful one (with its "
        "advantage in the whole group), at 1/G of the capture cost.",
    )

    # ---- Options of single selectors --------------------------------------------------------------------------------

    solution_column: str | None = setting(
        None,
        "Column with written-out solutions, for selectors that read them. Default: 'reference' if there is one, "
        "else 'solution'.",
    )
    likelihood_model: str | None = setting(
        None,
        "Model (hub id or path) that reads solutions for ppl_top, ppl_middle, ifd and selectit. Default: the "
        "policy as it is when a stage begins.",
    )
    solution_start: Literal["template", "token"] = setting(
        "template",
        "Prefix of a solution that is read without its prompt (ifd): 'template', the chat template's generation "
        "prompt, like '### Response:' in the code of Cherry_LLM; 'token', only a start token, as in its paper.",
    )
    ppl_middle: Literal["value", "rank"] = setting(
        "value",
        "Nearest to the median perplexity by 'value', or by 'rank' (as many below as above: middle percentiles).",
    )
    hidden_text: Literal["prompt", "prompt_and_solution"] = setting(
        "prompt",
        "Text whose hidden states feature_similarity compares: 'prompt', or 'prompt_and_solution' as RDS+ does "
        "on instruction data.",
    )
    selectit_shares: Literal["ratio", "softmax"] = setting(
        "ratio",
        "How selectit turns the probabilities of the five ratings into shares: 'ratio', p / sum(p) as its code; "
        "'softmax', exp(p) / sum(exp(p)) as its paper.",
    )
    reward_history: str | None = setting(
        None,
        "File with success rates of a previous run, for limr and reward_variance: Parquet with columns index (or "
        "prompt_id), pass and success_rate, or JSON {index: [rate of each pass]}.",
    )
    max_text_tokens: Annotated[int, at_least(16)] = setting(
        2048,
        "Maximum tokens of prompt and solution when they are read without rollouts; longer texts are truncated "
        "(never beyond the model's own limit).",
    )
    text_batch_size: Annotated[int, at_least(1)] = setting(
        8,
        "Texts per forward pass when they are read without rollouts, per process. Affects memory and speed, not "
        "the result.",
    )
    logdet_ridge: Annotated[float, ranged(1e-6, 1e6)] = setting(
        1.0,
        "λ of learnalign_logdet's log det(I + S / λ), relative to the mean of the diagonal of S: smaller values "
        "give new directions more weight relative to learnability.",
    )

    # ---- Success: which rollouts are right --------------------------------------------------------------------------

    success_reward: str | None = setting(
        None,
        "Name of the reward function that decides whether a rollout is correct. Default: the only one, or the one "
        "whose name contains 'accuracy'. Other rewards never enter the success rate.",
    )
    success_threshold: float = setting(
        0.5, "A rollout succeeds if its success reward is above this value."
    )
    success_range: Annotated[list[float] | None, interval] = setting(
        None,
        "Lowest and highest value of a graded success reward, e.g. [0, 1]. A rollout's outcome is then the reward's "
        "place in this range, a fraction from 0 to 1, and success_threshold does not count; where a rollout must be "
        "right or wrong (saved texts, gradient_rollouts='one_correct'), it is right above one half. Values outside "
        "count as the nearest end, with a warning. Default: right or wrong.",
    )

    # ---- Scoring: rollouts and gradients of the candidates ----------------------------------------------------------

    projection: Literal["count_sketch", "rademacher", "none"] = setting(
        "count_sketch",
        "Random projection of the gradients: 'count_sketch'; 'rademacher' (dense, for small models); "
        "'none' (the full gradient, for tests).",
    )
    feature_dim: Annotated[int, at_least(16, 2**20)] = setting(
        8192,
        "Dimensions d of a projected gradient. The paper does not state its value; LESS uses 8192.",
    )
    capture_rank: Annotated[int | str | None, rank] = setting(
        None,
        "None: each layer's exact gradient is projected. k: layer inputs and output gradients are folded to about "
        "k dimensions first, which is cheaper and a little noisier; sides below 2k stay exact. 'auto': a k for "
        "each layer by its size; layers of a few hundred dimensions stay exact.",
    )
    capture_max_tokens: Annotated[int, at_least(1)] = setting(
        16384,
        "Token budget (padding included) of one forward pass of gradient capture, per process. Affects memory and "
        "speed, not the result.",
    )
    check_gradients: bool = setting(
        True,
        "Compare the captured gradients of the first two prompts of each scoring, parameter by parameter, with "
        "those of the trainer's own loss, and stop if they differ by more than rounding. Costs three more backward "
        "passes.",
    )
    scoring_batch_prompts: Annotated[int | None, at_least(1)] = setting(
        None,
        "Prompts (times G rollouts) per generation call of scoring, per process; at most a shard. Default by "
        "engine: vLLM gets a whole shard; transformers gets as many as fit into half of the free memory (on a CPU "
        "1 GiB, and at most 512 rollouts), but at least as many as training generates at once. A resumed run keeps "
        "its number.",
    )
    shard_size: Annotated[int, at_least(1, 10**6)] = setting(
        128, "Prompts per shard of scoring: the unit that is written to disk and survives a crash."
    )

    # ---- Plateau: stages that end early -----------------------------------------------------------------------------

    plateau_patience: Annotated[int, at_least(0)] = setting(
        0,
        "End a stage early after this many steps without improvement of the smoothed reward. 0: never.",
    )
    plateau_min_delta: float = setting(
        0.005, "Increase of the smoothed reward that counts as an improvement."
    )
    plateau_smoothing: Annotated[float, smoothing] = setting(
        0.9, "Weight of the past in the smoothed reward, from 0 up to but not including 1."
    )

    # ---- Records: what is kept, where, and the seed -----------------------------------------------------------------

    save_at_phase_end: bool = setting(
        True,
        "Save a checkpoint at the end of each phase, before scoring (unless save_strategy is 'no'). save_strategy "
        "decides about the planned end of the run.",
    )
    keep_features: bool = setting(
        True,
        "Keep a stage's measurements (projected gradients take feature_dim x 4 bytes per learnable prompt) after "
        "its selection; otherwise they are deleted with the first checkpoint that includes the selection.",
    )
    keep_rollout_texts: Annotated[int, at_least(0)] = setting(
        2,
        "Rollouts of each candidate whose text (cut to 4,000 characters) is kept with its measurements, "
        "alternating between correct and wrong ones; the report shows those of the best and worst prompts. 0: none.",
    )
    selection_seed: Annotated[int, at_least(0, 2**63 - 1)] = setting(
        42,
        "Seed of everything random in the selection: warm-up subset, projection, rollouts, ties, order.",
    )
    record_dir: str | None = setting(
        None,
        "Folder of records and features. Default: <output_dir>/_learnalign, which push_to_hub does not upload.",
    )

    # ---- Order of training, and which rollouts are trained on -------------------------------------------------------

    order: Annotated[list[str], orders] = setting(
        ["shuffled"],
        "Order in which a stage trains on its prompts: one for all stages, or one per stage. 'auto': 'adaptive' if "
        "the whole pool is one stage without a warm-up, 'shuffled' for selected prompts. 'shuffled': pass after "
        "pass. 'adaptive': each generation trains on the prompts with the largest expected gain, by a belief about "
        "every prompt's success rate that all rollouts update; with stages=1 and warmup_samples=0 this is "
        "continual selection from the whole pool, without rollouts for scoring. 'trainer': the trainer's own order "
        "and number of steps, for runs that only use skipping or dynamic sampling; needs stages=1 and "
        "warmup_samples=0. 'package.module:Class': a sampler of your own (docs/samplers.md).",
    )
    skip_zero_advantages: bool = setting(
        False,
        "Leave rollouts without an advantage (all of their prompt's rollouts earned the same reward) out of the "
        "forward and backward pass of training. Exact: the gradient is that of the whole batch. Disabled with a "
        "warning where such rollouts have a gradient (beta above 0, an entropy bonus, a load-balancing loss) or "
        "may reach experts that no other rollout does.",
    )
    oversample: Annotated[float, ranged(1, 1000)] = setting(
        1.0,
        "Roll out this many times the prompts that a generation trains on, and train on those whose rollouts are "
        "most informative, using these same rollouts.",
    )
    max_generation_batches: Annotated[int, at_least(1, 1000)] = setting(
        1,
        "Dynamic sampling (DAPO): roll out up to this many batches of prompts per generation, until enough prompts "
        "have a gradient. 1: a single batch.",
    )

    baseline: Literal["group", "belief"] = setting(
        "group",
        "What a rollout's reward is compared with. 'group': the mean of its group, as TRL does. 'belief': the mean of "
        "the group's other rollouts, shrunk to the success rate that the belief predicts by the belief's own weight, "
        "so that a group of equal rewards teaches too if it was not expected; another estimator, not the same "
        "gradient. Needs order='adaptive', and no dynamic sampling. Where TRL would divide by a standard deviation, "
        "advantages are divided by their root mean square over the generation (docs/continual.md).",
    )
    baseline_share: Annotated[float, decay] = setting(
        0.25,
        "With baseline='belief', share of a generation's rollouts that keep their advantages, those with the largest "
        "ones: the most surprising rollouts. The others are pruned, so that skip_zero_advantages can leave them out. "
        "1: none is pruned.",
    )
    baseline_pruning: Literal["drop", "roulette"] = setting(
        "drop",
        "How the others are pruned: 'drop' sets them to 0. 'roulette' raises an advantage of a fraction q of the "
        "smallest one that is kept to that one with probability q and sets it to 0 otherwise: no bias, more noise.",
    )

    # ---- Constants of the adaptive order ----------------------------------------------------------------------------

    adaptive_embeddings: str = setting(
        "hidden",
        "Prompt features that predict success rates before any rollout: 'hidden' (mean last hidden state of the "
        "initial policy over the prompt), 'none' (each prompt is judged by its own rollouts alone), the name of a "
        "column of the dataset with embeddings, or 'package.module:function', which is called with the prompts and "
        "returns one row of numbers per prompt.",
    )
    adaptive_feature_dim: Annotated[int, at_least(1, 2**16)] = setting(
        64, "Features of a prompt: directions of the embeddings that are kept."
    )
    adaptive_prior_std: Annotated[float, ranged(0.01, 100)] = setting(
        4.0, "Prior standard deviation of the logit success rate explained by the features."
    )
    adaptive_drift_std: Annotated[float, ranged(0, 100)] = setting(
        0.05,
        "Standard deviation, per generation, of the drift common to the logits of all prompts.",
    )
    adaptive_concentration: Annotated[list[float], each(ranged(0.01, 1e6))] = setting(
        [4.0, 1.0, 2.0, 8.0, 16.0, 32.0],
        "Weight of the prediction from a prompt's features, as a number of the prompt's own rollouts. Of several "
        "values, the one that would have predicted past outcomes best is used; the first one until there are "
        "outcomes.",
    )
    adaptive_decay: Annotated[float, decay] = setting(
        0.97,
        "Per-generation decay of what was learned from features, since the policy changes. 1: none.",
    )
    adaptive_prompt_decay: Annotated[float, decay] = setting(
        0.99, "Per-generation decay of a prompt's own outcomes."
    )
    adaptive_concentration_decay: Annotated[float, decay] = setting(
        0.99,
        "Per-generation decay of the score by which values of adaptive_concentration are compared.",
    )
    adaptive_exploration: Annotated[float, share] = setting(
        0.5,
        "Share of each generation that comes from the shuffled pool, pass after pass, independent of the belief: "
        "unpractised skills decline, and success rates of prompts without rollouts stay unknown. 1: all of it.",
    )
    adaptive_candidates_per_slot: Annotated[int, at_least(1, 10**6)] = setting(
        8,
        "Prompts that compete for each of the other places of a generation; the pool is traversed in a seeded "
        "order, that many prompts at a time. Larger is greedier; 1: no choice.",
    )
    adaptive_gain_exponent: Annotated[float, ranged(0, 100)] = setting(
        1.0,
        "Expected gain of a prompt with success rate p: p(1 - p)(1 - p)^exponent. 0: its learnability; 1: the "
        "first-order gain in success rate, largest at p = 1/3.",
    )
    adaptive_gain_per_cost: bool = setting(
        False,
        "Divide the expected gain of a prompt by the expected cost of a rollout, predicted from the features and from "
        "the lengths of earlier rollouts, with generation_price for a generated token.",
    )
    adaptive_cool_down: Annotated[int, at_least(0)] = setting(
        8, "Generations that a prompt does not compete in after it was rolled out."
    )

    # ---- Equal compute: runs that end at a given cost ---------------------------------------------------------------

    compute_budget: Annotated[float | None, optional(ranged(1, 1e30))] = setting(
        None,
        "End the last stage once the run has spent this much compute, including warm-up and scoring: in tokens of "
        "a forward pass, like forward_equivalents in the ledger of the run to compare with. stage_steps is then "
        "the maximum length of the stage. Default: its steps end it.",
    )
    generation_price: Annotated[float, ranged(0.01, 1e6)] = setting(
        1.0,
        "Cost of a generated token in tokens of a forward pass, in compute_budget, ledger, plan, report and "
        "comparison. 1: as much as a token that is read; 3 or 8: as if generation took about a half or two thirds "
        "of a step's time (docs/cost.md). Training depends on it through compute_budget and adaptive_gain_per_cost "
        "alone.",
    )

    # ---- Console output ---------------------------------------------------------------------------------------------

    verbose: bool = setting(
        True,
        "Print a summary of warm-up, scoring and each selection, on the main process and above its progress bar. "
        "If Python's logging is configured for `trl_learnalign` (a level or a handler), that configuration decides "
        "instead.",
    )

    # ---- Rollout budget: score few candidates, those expected to be most learnable ----------------------------------

    rollout_budget: Annotated[float | None, decay] = setting(
        None,
        "Share of a stage's candidates that are rolled out to score it, in rounds: first a random sample, then "
        "preferably candidates with a large expected learnability, by all rollouts so far. The others have no "
        "score and are selected only to fill a larger stage. Default: all candidates, as in the paper. The belief "
        "uses adaptive_embeddings and the settings beside it.",
    )
    budget_rounds: Annotated[int, at_least(1)] = setting(
        4, "Rounds in which rollout_budget is spent, equally large. 1: a random sample alone."
    )
    budget_exponent: Annotated[float, ranged(0, 100)] = setting(
        2.0,
        "Prompts of a round after the first are drawn with probabilities in proportion to their expected learnability "
        "to this power. 0 samples uniformly; larger values favour the most learnable prompts and reduce diversity.",
    )

    # ---- Tables of a selection for trackers and reports -------------------------------------------------------------

    category_columns: Annotated[list[str] | None, each(text, may_be_empty=True)] = setting(
        None,
        "Columns of the dataset by which a selection is compared with its pool: the share of each category in "
        "both, and the effective number of categories of each. Default: columns of strings, integers, booleans or "
        "ClassLabel with 2 to 50 values and at least three prompts per value, except prompt and answer. []: none.",
    )
    log_prompt_table: Annotated[int, at_least(0)] = setting(
        20,
        "Number of prompts of each kind in the tables that trackers (wandb, trackio, tensorboard) get: the best and "
        "worst of a selection; in adaptive order, at each checkpoint, those most often rolled out, newly solved and "
        "never right. Tables of category shares accompany them. 0: no tables.",
    )

    @classmethod
    def adaptive(cls, **settings: Any) -> Self:
        """Train on the whole pool in adaptive order, skip zero-advantage rollouts, and score nothing.

        `docs/continual.md` describes this mode.

        With `stages` or `warmup_samples`, `learnalign_coverage` selects a subset. It is trained on pass after pass
        unless `order` is `"adaptive"`.

        Args:
            settings: Settings that override these defaults, by name.

        Raises:
            `TypeError`: If there is no such setting.
            `ValueError`: As at construction.
        """
        return cls(**{**ADAPTIVE, **settings})

    @classmethod
    def skipping(cls, **settings: Any) -> Self:
        """Keep the trainer's own order and number of steps, and skip zero-advantage rollouts.

        Args and errors as in [`LearnAlignConfig.adaptive`].
        """
        return cls(**{**WHOLE_POOL, "order": "trainer", "skip_zero_advantages": True, **settings})

    @classmethod
    def control(cls, **settings: Any) -> Self:
        """Train on the whole pool, shuffled, without scoring and skipping: a baseline with a record and a ledger.

        Args and errors as in [`LearnAlignConfig.adaptive`].
        """
        return cls(**{**WHOLE_POOL, "order": "shuffled", **settings})

    @property
    def stages_are_fractions(self) -> bool:
        """Whether `stages` are fractions of the pool and not counts."""
        return self.stages[0] <= 1

    @property
    def is_whole_pool(self) -> bool:
        """Whether all prompts are one stage without a warm-up, so that only their order can be chosen."""
        return self.stages == [1.0] and self.warmup_samples == 0

    @property
    def has_trainers_length(self) -> bool:
        """Whether the trainer's `max_steps` or `num_train_epochs` set the length of the run."""
        return self.is_whole_pool and self.stage_epochs is None and self.stage_steps is None

    @property
    def selectors(self) -> list[str]:
        """Name of each stage's selector."""
        names = as_list(self.selector)
        return names * len(self.stages) if len(names) == 1 else names

    @property
    def is_adaptive(self) -> bool:
        """Whether a stage is trained on in adaptive order."""
        return "adaptive" in self.order

    @property
    def own_orders(self) -> list[str]:
        """Paths of custom samplers."""
        return [order for order in self.order if ":" in order]

    @property
    def is_graded(self) -> bool:
        """Whether outcomes of rollouts are fractions."""
        return self.success_range is not None

    @property
    def goes_by_outcomes(self) -> bool:
        """Whether outcomes of rollouts decide which prompts a stage trains on next."""
        return self.is_adaptive or bool(self.own_orders)

    @property
    def uses_trainer_order(self) -> bool:
        """Whether the trainer keeps its own sampler and number of steps."""
        return "trainer" in self.order

    @property
    def samples_dynamically(self) -> bool:
        """Whether more prompts are rolled out than are trained on."""
        return self.oversample > 1 or self.max_generation_batches > 1

    @property
    def needs_belief(self) -> bool:
        """Whether a belief about every prompt's success rate is needed, by an adaptive order or a rollout budget."""
        return self.is_adaptive or self.rollout_budget is not None

    def order_of(self, stage: int) -> str:
        """Return the order of a stage, counted from 0."""
        return self.order[0] if len(self.order) == 1 else self.order[stage]

    def extra_prompts(self, prompts: int) -> int:
        """Return the number of prompts that `oversample` rolls out in addition to the `prompts` of a generation."""
        return math.ceil(round((self.oversample - 1) * prompts, 9))

    def _check_together(self) -> None:
        fields.check_stages(self.stages, self.reselect, self.after_warmup, self.warmup_samples)
        fields.check_length(self.stages, self.stage_epochs, self.stage_steps, self.on_shortfall)
        if not any(self.stage_steps or []):
            self.stage_steps = None
        self._match_selectors()
        fields.check_halves(self.reliability, self.gradient_rollouts)
        automatic = "adaptive" if self.is_whole_pool else "shuffled"
        self.order = [automatic if order == "auto" else order for order in self.order]
        fields.check_order(self.order, self.stages, self.warmup_samples)
        fields.check_distinct("adaptive_concentration", self.adaptive_concentration)
        fields.check_budget(self.rollout_budget, self.pool_sample)
        if self.baseline != "group":
            fields.check_baseline(
                self.baseline, self.order, self.oversample, self.max_generation_batches
            )
        if self.uses_trainer_order:
            fields.check_trainers_order(
                rollout_budget=self.rollout_budget,
                compute_budget=self.compute_budget,
                plateau_patience=self.plateau_patience,
            )

    def _match_selectors(self) -> None:
        fields.check_selectors(as_list(self.selector), self.stages)
