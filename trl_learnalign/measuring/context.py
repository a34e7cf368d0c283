"""What all measures of a stage share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.distributed import Ranks
from trl_learnalign.measuring.generation_batch import default_rollout_prompts
from trl_learnalign.success import SuccessRule

if TYPE_CHECKING:
    from trl import GRPOTrainer


@dataclass(frozen=True)
class Context:
    """The trainer that measures, and how.

    Args:
        trainer (`GRPOTrainer`): The trainer; measures leave it as found.
        config (`LearnAlignConfig`): Settings.
        success (`SuccessRule`): Which rollouts are right.
        ranks (`Ranks`): The processes.
        rollout_prompts (`int`): Prompts of one generation call, at most.
        phase (`str`): `Phase.name`, part of all seeds.
        dataset (`datasets.Dataset`): Where the prompts are.
    """

    trainer: GRPOTrainer
    config: LearnAlignConfig
    success: SuccessRule
    ranks: Ranks
    rollout_prompts: int
    phase: str
    dataset: Any

    @staticmethod
    def of(
        trainer: GRPOTrainer,
        config: LearnAlignConfig,
        ranks: Ranks | None = None,
        rollout_prompts: int | None = None,
        phase: str = "stage_1",
    ) -> Context:
        """The context of a trainer's own dataset.

        Args:
            trainer (`GRPOTrainer`): The trainer.
            config (`LearnAlignConfig`): Settings.
            ranks (`Ranks`, *optional*): The processes; default: this one alone.
            rollout_prompts (`int`, *optional*): Default: [`generation_batch.default_rollout_prompts`], which all
                ranks ask for together.
            phase (`str`, *optional*, defaults to `"stage_1"`): `Phase.name`.

        Raises:
            `ValueError`: If it is not clear which reward function decides success.
        """
        ranks = Ranks() if ranks is None else ranks
        if rollout_prompts is None:
            rollout_prompts = default_rollout_prompts(trainer, config, ranks)
        return Context(
            trainer=trainer,
            config=config,
            success=SuccessRule.of(config, trainer.reward_func_names),
            ranks=ranks,
            rollout_prompts=rollout_prompts,
            phase=phase,
            dataset=trainer.train_dataset,
        )

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
