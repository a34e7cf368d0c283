"""What a run leaves on disk, and its seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from trl_learnalign.config.base import Settings, setting
from trl_learnalign.config.checks import whole


@dataclass
class Records(Settings):
    """Records: what is kept, where, and by which seed it comes again."""

    save_at_phase_end: bool = setting(
        True,
        "Save a checkpoint at the end of each phase (unless save_strategy is 'no'), before scoring. The planned end "
        "of the run is saved as save_strategy says.",
    )
    keep_features: bool = setting(
        True,
        "Keep a stage's measurements (projected gradients take feature_dim x 4 bytes per learnable prompt) after "
        "its selection; otherwise they go with the first checkpoint that knows its pool.",
    )
    keep_rollout_texts: Annotated[int, whole(0)] = setting(
        2,
        "Rollouts of each candidate whose text (cut to 4,000 characters) is kept with its measurements, right and "
        "wrong ones in turn, so that the report can show those of the best and worst prompts. 0: none.",
    )
    selection_seed: Annotated[int, whole(0, 2**63 - 1)] = setting(
        42,
        "Seed of everything random in the selection: warm-up subset, projection, rollouts, ties, order.",
    )
    record_dir: str | None = setting(
        None,
        "Folder of records and features. Default: <output_dir>/_learnalign, which push_to_hub leaves at home.",
    )
