"""Settings of a run: declared once, checked at construction."""

from trl_learnalign.config.fields import SELECTOR_NAMES, Settings, sections_of, setting
from trl_learnalign.config.learnalign import BACKWARD, LearnAlignConfig

__all__ = [
    "BACKWARD",
    "SELECTOR_NAMES",
    "LearnAlignConfig",
    "Settings",
    "sections_of",
    "setting",
]
