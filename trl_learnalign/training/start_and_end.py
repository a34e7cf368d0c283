"""What a run is, in a line when it begins; what it has spent and saved, in a line when it has ended."""

from __future__ import annotations

from collections.abc import Sequence

from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.curriculum import Plan
from trl_learnalign.records.ledger import Ledger
from trl_learnalign.records.notes import SCORING_ACCOUNT
from trl_learnalign.training.additions import Additions
from trl_learnalign.training.setup import RunSetup


def start_line(setup: RunSetup, plan: Plan, additions: Additions) -> str:
    """Method, prompts, what counts as right, and whether rollouts are skipped.

    Args:
        setup (`RunSetup`): What the run is made of.
        plan (`Plan`): Its phases.
        additions (`Additions`): What is skipped.
    """
    success = setup.context.success
    right = f"a rollout is right if {success.name} is above {success.threshold:g}"
    return f"{_method(setup, plan)}; {right}; {_skipping(setup.config, additions)}."


def _method(setup: RunSetup, plan: Plan) -> str:
    config, everything = setup.config, plan.prompts
    if config.leaves_the_order:
        return f"This run trains on {everything} in the trainer's own order"
    orders = " and ".join(dict.fromkeys(config.order))
    if config.is_whole_pool:
        return f"This run trains on {everything} in {orders} order"
    names = ", ".join(dict.fromkeys(selector.name for selector in setup.selectors))
    sizes = [f"{stage.size:,}" for stage in plan.stages]
    chosen = f"This run chooses {_list(sizes)} of {everything} by {names}, in {orders} order"
    if config.warmup_samples:
        chosen += f", after a warm-up on {config.warmup_samples:,}"
    return chosen


def _list(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _skipping(config: LearnAlignConfig, additions: Additions) -> str:
    if additions.skipper is not None:
        return "rollouts without an advantage are not trained on"
    if additions.not_skipped is not None:
        return f"every rollout is trained on: {additions.not_skipped}"
    return f"every rollout is trained on (skip_zero_advantages={config.skip_zero_advantages})"


def end_line(ledger: Ledger, additions: Additions) -> str:
    """What the run has spent, and what skipping has saved.

    Args:
        ledger (`Ledger`): Of all its phases.
        additions (`Additions`): What was skipped.
    """
    total, scoring = ledger.total, ledger.sum(SCORING_ACCOUNT)
    parts = [
        f"{total.tokens_generated:,} tokens generated",
        f"{total.tokens_prompt + total.tokens_forward:,} read",
        f"{total.tokens_trained:,} passed forward and backward",
    ]
    line = f"The run has spent {', '.join(parts)}"
    if compute := ledger.compute(scoring):
        share = compute / ledger.compute(total)
        line += f" ({share:.0%} of the compute to choose prompts)"
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
