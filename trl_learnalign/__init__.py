"""Data selection for RL post-training of language models, inside TRL."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_learnalign.callback import LearnAlignCallback
    from trl_learnalign.config import LearnAlignConfig
    from trl_learnalign.planning import plan_run
    from trl_learnalign.pool import Pool
    from trl_learnalign.sampler import CurriculumSampler
    from trl_learnalign.selectors import SELECTORS, Selector

__version__ = "0.1.0"
__all__ = ["SELECTORS", "CurriculumSampler", "LearnAlignCallback", "LearnAlignConfig", "Pool", "Selector", "plan_run"]

# Importing the package takes milliseconds: trl and torch are imported with the first name that needs them (PEP 562).
_MODULES = {
    "LearnAlignCallback": "callback",
    "LearnAlignConfig": "config",
    "plan_run": "planning",
    "Pool": "pool",
    "CurriculumSampler": "sampler",
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
