"""The settings of a run, put together from their parts."""

from __future__ import annotations

from dataclasses import dataclass

from trl_learnalign.config.adaptive import Adaptive
from trl_learnalign.config.budget import Budget
from trl_learnalign.config.ordering import Ordering
from trl_learnalign.config.plateau import Plateau
from trl_learnalign.config.records import Records
from trl_learnalign.config.rollout_budget import RolloutBudget
from trl_learnalign.config.scoring import Scoring
from trl_learnalign.config.selection import Selection
from trl_learnalign.config.selector_options import SelectorOptions
from trl_learnalign.config.story import Story
from trl_learnalign.config.success import Success


# Read from below: a dataclass has the fields of its last base first (Selection's begin with those of Stages). A new
# part goes to the top, so that the settings of before keep their places.
@dataclass
class LearnAlignConfig(
    RolloutBudget,
    Story,
    Budget,
    Adaptive,
    Ordering,
    Records,
    Plateau,
    Scoring,
    Success,
    SelectorOptions,
    Selection,
):
    r"""Settings of warm-up, scoring, selection and stages; the trainer's own settings stay in its `GRPOConfig`.

    Field names do not clash with those of `GRPOConfig` and `ModelConfig`, so `TrlParser` reads all of them from one
    command line or YAML file. Method and defaults: Li et al., *LearnAlign*, Findings of ACL 2026 (arXiv 2506.11480).

    Raises:
        `ValueError`: At construction, naming the value and the remedy.
    """
