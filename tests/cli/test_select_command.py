"""What the command `select` prints of its subsets."""

import re

import cases
import pandas as pd
from subsets import data, roomy

from trl_learnalign.cli.select import show
from trl_learnalign.config import SubsetConfig
from trl_learnalign.training.select_only import SubsetSelection

SOLVED = range(0, 12, 2)


def half_solved(completions, row, **_):
    """Every second prompt is always solved; of the others every second rollout is."""
    return [1.0 if number in SOLVED else float(i % 2) for i, number in enumerate(row)]


def test_the_learnable_share_is_that_of_each_row_and_the_pools_stands_above(tmp_path, capsys):
    trainer = cases.trainer(tmp_path, roomy(), rewards=half_solved, data=data())
    config = SubsetConfig.paper(warmup_samples=0, feature_dim=64, shard_prompts=4, top=[3, 9])
    selection = SubsetSelection(trainer, config)
    selection.run()
    selection.write(tmp_path / "subsets")
    capsys.readouterr()
    show(selection, seconds=1.0)
    said = capsys.readouterr().out
    scores = pd.read_parquet(tmp_path / "subsets" / "learnalign" / "scores.parquet")
    is_learnable = scores.sort_values("rank")["learnability"] > 0
    assert "learnable in the pool: 0.500" in " ".join(said.split())
    for size in (3, 9):
        row = next(line for line in said.splitlines() if re.search(rf"learnalign\W+{size} ", line))
        assert f"{is_learnable[:size].mean():.3f}" in row.split("│")[-2]
    assert is_learnable[:3].mean() > is_learnable[:9].mean() > 0.5
