"""Data selection for RL post-training of language models, inside TRL."""

from trl_learnalign.callback import LearnAlignCallback
from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.planning import plan_run
from trl_learnalign.pool import Pool
from trl_learnalign.sampler import CurriculumSampler
from trl_learnalign.selectors import SELECTORS, Selector

__version__ = "0.1.0"
__all__ = ["SELECTORS", "CurriculumSampler", "LearnAlignCallback", "LearnAlignConfig", "Pool", "Selector", "plan_run"]
