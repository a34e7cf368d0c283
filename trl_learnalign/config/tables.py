"""What is told of a choice, prompt by prompt and category by category."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from trl_learnalign.config.base import Settings, setting
from trl_learnalign.config.checks import each, text, whole


@dataclass
class Tables(Settings):
    """Tables: by which categories a choice is told, and how many of its prompts trackers show."""

    category_columns: Annotated[list[str] | None, each(text, may_be_empty=True)] = setting(
        None,
        "Columns of the dataset by which a choice is held against its pool: the share of each category in both, and "
        "how many categories each is spread over. Default: columns of texts, whole numbers, switches or ClassLabel "
        "with 2 to "
        "50 values and three prompts a value or more, but for prompt and answer. []: none.",
    )
    log_prompt_table: Annotated[int, whole(0)] = setting(
        20,
        "Best and worst prompts of each selection, so many of either, that the trackers of report_to (wandb, trackio, "
        "tensorboard) get as a table, and beside it the shares of the categories. 0: no tables.",
    )
