"""Tables that tell a choice: its best and worst prompts, and its categories beside the pool's.

What the trackers of `report_to` are shown, and the report.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import pyarrow as pa

from trl_learnalign.data.categories import Grouping
from trl_learnalign.records.shares import Shares

CHARACTERS = 300
"""Of a prompt's text."""

PROMPT_FIGURES = ["success_rate", "learnability", "alignment", "score", "rank", "selected"]


def ends(table: pa.Table, count: int, groupings: Sequence[Grouping] = ()) -> pd.DataFrame:
    """The best and the worst prompts of a stage.

    Prompts that teach nothing (learnability and score 0) and those without a score are at neither end.

    Args:
        table (`pyarrow.Table`): The stage's table (`trl_learnalign.records.run`).
        count (`int`): Prompts at either end, at most.
        groupings (sequence of `Grouping`, *optional*): What to name each prompt's categories by.

    Returns:
        `pandas.DataFrame`: Columns `end` (`"top"` or `"bottom"`), `index` (row of the dataset), `prompt` (cut),
        `success_rate`, `learnability`, `alignment`, `score`, `rank`, `selected`, `categories`; best first.
    """
    frame = table.to_pandas()
    frame = frame.sort_values("rank")
    has_score = frame["score"].notna()
    teaches = frame["learnability"] != 0  # true where it is not known
    is_alive = teaches | (frame["score"] != 0)
    ranked = frame[has_score & is_alive]
    top = ranked.head(count)
    others = ranked.iloc[len(top) :]
    bottom = others.tail(count)
    both = pd.concat([top, bottom])
    rows = both["index"].tolist()
    told = pd.DataFrame(
        {
            "end": ["top"] * len(top) + ["bottom"] * len(bottom),
            "index": rows,
            "prompt": [_cut(text) for text in both["prompt"]],
            "categories": [_categories(groupings, row) for row in rows],
        }
    )
    for name in PROMPT_FIGURES:
        told[name] = both[name].to_numpy()
    return told


def share_table(shares: Sequence[Shares]) -> pd.DataFrame:
    """The categories of a choice.

    Args:
        shares (sequence of `Shares`): By column or cluster.

    Returns:
        `pandas.DataFrame`: Columns `by`, `category`, `pool` and `chosen` (counts), `share_of_pool`, `share_of_choice`,
        `ratio` (of the shares; above 1 is over-represented; missing for a category that the pool lacks).
    """
    rows = []
    for one in shares:
        for category in one.categories:
            in_pool = category.pool / one.pool
            in_choice = category.chosen / one.chosen
            row = {
                "by": one.by,
                "category": category.name,
                "pool": category.pool,
                "chosen": category.chosen,
                "share_of_pool": in_pool,
                "share_of_choice": in_choice,
                "ratio": in_choice / in_pool if in_pool else None,
            }
            rows.append(row)
    return pd.DataFrame(rows)


def _cut(text: str) -> str:
    """A prompt's text in one line; long ones without their middle, since the question is mostly at the end."""
    line = " ".join(text.split())
    if len(line) <= CHARACTERS:
        return line
    half = CHARACTERS // 2
    return f"{line[:half]} … {line[-half:]}"


def _categories(groupings: Sequence[Grouping], row: int) -> str:
    parts = []
    for grouping in groupings:
        code = grouping.codes[row]
        if code >= 0:
            parts.append(f"{grouping.by}: {grouping.labels[code]}")
    return "; ".join(parts)
