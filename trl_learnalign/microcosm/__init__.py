"""A small world on which reinforcement learning works within seconds: tasks, their rewards and a base model."""

from trl_learnalign.microcosm.base_model import (
    MAX_COMPLETION_LENGTH,
    TINY,
    BaseModelSettings,
    make_base_model,
    make_tokenizer,
)
from trl_learnalign.microcosm.tasks import (
    FAMILIES,
    REGIMES,
    SPLITS,
    Family,
    StringTask,
    StringTaskConfig,
    accuracy_reward,
    build_pool,
    split_of,
)

__all__ = [
    "FAMILIES",
    "MAX_COMPLETION_LENGTH",
    "REGIMES",
    "SPLITS",
    "TINY",
    "BaseModelSettings",
    "Family",
    "StringTask",
    "StringTaskConfig",
    "accuracy_reward",
    "build_pool",
    "make_base_model",
    "make_tokenizer",
    "split_of",
]
