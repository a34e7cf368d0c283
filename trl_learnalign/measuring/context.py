"""What all measures of a stage share."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.distributed import Ranks
from trl_learnalign.measuring.generation_batch import default_scoring_batch_prompts
from trl_learnalign.success import CutOff, SuccessRule

if TYPE_CHECKING:
    from trl import GRPOTrainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Context:
    """The trainer that measures, and how.

    Args:
        trainer (`GRPOTrainer`): The trainer; measures leave it as found.
        config (`LearnAlignConfig`): Settings.
        success (`SuccessRule`): Which rollouts are right.
        ranks (`Ranks`): The processes.
        scoring_batch_prompts (`int`): Prompts of one generation call, at most.
        phase (`str`): `Phase.name`, part of all seeds.
        dataset (`datasets.Dataset`): Where the prompts are.
        told (`set[str]`): Phases of which it was said already that no prompt is learnable.
    """

    trainer: GRPOTrainer
    config: LearnAlignConfig
    success: SuccessRule
    ranks: Ranks
    scoring_batch_prompts: int
    phase: str
    dataset: Any
    told: set[str] = field(default_factory=set)

    @staticmethod
    def of(
        trainer: GRPOTrainer,
        config: LearnAlignConfig,
        ranks: Ranks | None = None,
        scoring_batch_prompts: int | None = None,
        phase: str = "stage_1",
    ) -> Context:
        """The context of a trainer's own dataset.

        Args:
            trainer (`GRPOTrainer`): The trainer.
            config (`LearnAlignConfig`): Settings.
            ranks (`Ranks`, *optional*): The processes; default: this one alone.
            scoring_batch_prompts (`int`, *optional*): Default:
                [`generation_batch.default_scoring_batch_prompts`], which all ranks ask for together.
            phase (`str`, *optional*, defaults to `"stage_1"`): `Phase.name`.

        Raises:
            `ValueError`: If it is not clear which reward function decides success.
        """
        ranks = Ranks() if ranks is None else ranks
        if scoring_batch_prompts is None:
            scoring_batch_prompts = default_scoring_batch_prompts(trainer, config, ranks)
        return Context(
            trainer=trainer,
            config=config,
            success=SuccessRule.of(config, trainer.reward_func_names),
            ranks=ranks,
            scoring_batch_prompts=scoring_batch_prompts,
            phase=phase,
            dataset=trainer.train_dataset,
        )

    def no_signal(self, rewards: Tensor | None, lengths: Tensor | None) -> str | None:
        """Why no prompt is learnable, in a sentence with the remedy; `None` if some may be, or nothing was rolled out.

        Args:
            rewards (`torch.Tensor`, *optional*): Of rollouts, `(P, G, F)`.
            lengths (`torch.Tensor`, *optional*): Tokens of their completions that are trained on, `(P, G)`.
        """
        if rewards is None or lengths is None:
            return None
        args = self.trainer.args
        limit = args.max_completion_length
        is_cut = lengths == 0 if args.mask_truncated_completions else lengths >= limit
        return self.success.problem(rewards, CutOff(float(is_cut.double().mean()), limit))

    def tell(self, problem: str | None, of: str) -> None:
        """Say that no prompt of the phase is learnable, once.

        Args:
            problem (`str`, *optional*): As [`no_signal`] says.
            of (`str`): What was looked at.
        """
        if problem is not None and self.phase not in self.told:
            self.told.add(self.phase)
            logger.warning("%s: %s", of, problem)

    def of_phase(self, phase: str, dataset: Any = None) -> Context:
        """The same for another phase, and for another dataset if one is given."""
        return replace(self, phase=phase, dataset=self.dataset if dataset is None else dataset)


@dataclass(frozen=True)
class Validation:
    """A trusted validation set.

    Args:
        dataset (`datasets.Dataset`): Its prompts, with the columns of training.
        digest (`str`): `dataset_digest` of it.
    """

    dataset: Any
    digest: str
