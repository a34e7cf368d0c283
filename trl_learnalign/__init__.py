"""Data selection for RL post-training of language models, inside TRL.

`LearnAlignCallback(trainer)` is the paper's method: warm-up, scoring, staged selection.
`AdaptiveOrderCallback(trainer)` trains on the whole pool in adaptive order and scores nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from trl_learnalign.version import __version__ as __version__

if TYPE_CHECKING:
    from trl_learnalign.config import LearnAlignConfig
    from trl_learnalign.pool import Pool
    from trl_learnalign.preflight.checks import plan_run
    from trl_learnalign.selectors import SELECTORS, Selector
    from trl_learnalign.training.callback import AdaptiveOrderCallback, LearnAlignCallback
    from trl_learnalign.training.sampler import CurriculumSampler

__all__ = [
    "SELECTORS",
    "AdaptiveOrderCallback",
    "CurriculumSampler",
    "LearnAlignCallback",
    "LearnAlignConfig",
    "Pool",
    "Selector",
    "plan_run",
]

# Importing the package takes milliseconds: trl and torch are imported with the first name that needs them (PEP 562).
_MODULES = {
    "AdaptiveOrderCallback": "training.callback",
    "LearnAlignCallback": "training.callback",
    "LearnAlignConfig": "config",
    "plan_run": "preflight.checks",
    "Pool": "pool",
    "CurriculumSampler": "training.sampler",
    "SELECTORS": "selectors",
    "Selector": "selectors",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
