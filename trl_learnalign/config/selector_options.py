"""What only some selectors ask for: files, models, texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from trl_learnalign.config.base import Settings, setting
from trl_learnalign.config.checks import ranged, whole


@dataclass
class SelectorOptions(Settings):
    """Options of single selectors."""

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
        "What precedes a solution read without its prompt (ifd): 'template', the chat template's generation "
        "prompt, as '### Response:' in the code of Cherry_LLM; 'token', only a start token, as in its paper.",
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
    max_text_tokens: Annotated[int, whole(16)] = setting(
        2048,
        "Tokens of prompt and solution that are read without rollouts; longer texts are cut there (and never "
        "beyond the model's own limit).",
    )
    text_batch_size: Annotated[int, whole(1)] = setting(
        8,
        "Texts per forward pass when they are read without rollouts, per process. Decides memory and speed, not "
        "the result.",
    )
    logdet_ridge: Annotated[float, ranged(1e-6, 1e6)] = setting(
        1.0,
        "λ of learnalign_logdet's log det(I + S / λ), over the mean of the diagonal of S: the smaller, the more a new "
        "direction counts beside learnability.",
    )
