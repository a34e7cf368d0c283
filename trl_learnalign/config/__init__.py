"""What a LearnAlign run can be told: one file for each part of the settings, checked where it is declared."""

from trl_learnalign.config.base import Settings, parts_of, setting
from trl_learnalign.config.learnalign import LearnAlignConfig
from trl_learnalign.config.selection import SELECTOR_NAMES
from trl_learnalign.config.subset import SubsetConfig

__all__ = ["SELECTOR_NAMES", "LearnAlignConfig", "Settings", "SubsetConfig", "parts_of", "setting"]
