"""How rollouts and gradients of the candidates are taken and projected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from trl_learnalign.config.base import Settings, setting
from trl_learnalign.config.checks import shown, whole


def rank(name: str, value: Any) -> int | str:
    """A rank of folded factors, or `"auto"`."""
    if isinstance(value, str) and value == "auto":
        return value
    try:
        return whole(8, 2**20)(name, value)
    except ValueError:
        raise ValueError(
            f"{name}={shown(value)}: give a whole number of at least 8, 'auto', or nothing; 1,048,576 at most."
        ) from None


@dataclass
class Scoring(Settings):
    """Scoring: rollouts and gradients that the candidates are measured by."""

    projection: Literal["count_sketch", "rademacher", "none"] = setting(
        "count_sketch",
        "Random projection of the gradients: 'count_sketch'; 'rademacher' (dense, for small models); "
        "'none' (the full gradient, for tests).",
    )
    feature_dim: Annotated[int, whole(16, 2**20)] = setting(
        8192, "Dimensions d of a projected gradient. The paper gives none; LESS has 8192."
    )
    capture_rank: Annotated[int | str | None, rank] = setting(
        None,
        "None: each layer's exact gradient is projected. k: layer inputs and output gradients are folded to about "
        "k dimensions first, which is cheaper and a little noisier; sides below 2k stay exact. 'auto': a k for "
        "each layer by its size; layers of a few hundred dimensions stay exact.",
    )
    capture_max_tokens: Annotated[int, whole(1)] = setting(
        16384,
        "Token budget (padding included) of one forward pass of gradient capture, per process. Decides memory and "
        "speed, not the result.",
    )
    check_gradients: bool = setting(
        True,
        "Compare the captured gradients of the first two prompts of each scoring, parameter by parameter, with "
        "those of the loss that the trainer itself computes on them, and stop if they differ by more than "
        "rounding. Costs three more backward passes.",
    )
    scoring_batch_prompts: Annotated[int | None, whole(1)] = setting(
        None,
        "Prompts (times G rollouts) per generation call of scoring, per process; at most a shard. Default, by engine: "
        "vLLM gets a whole shard; transformers as many as half of the free memory holds (on a CPU 1 GiB, and 512 "
        "rollouts), never fewer than training generates at once. A resumed run keeps its number.",
    )
    shard_size: Annotated[int, whole(1, 10**6)] = setting(
        128, "Prompts per shard of scoring: the unit that is written to disk and survives a crash."
    )
