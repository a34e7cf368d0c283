"""What a run is made of, checked and put together before anything is measured or trained."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_learnalign import bridge
from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.curriculum import Geometry, Plan, make_plan
from trl_learnalign.data.categories import Grouping, column_groupings
from trl_learnalign.distributed import Ranks
from trl_learnalign.measuring import identity
from trl_learnalign.measuring.context import Context
from trl_learnalign.measuring.embeddings import HIDDEN, check_embeddings
from trl_learnalign.measuring.generation_batch import planned_scoring_batch_prompts
from trl_learnalign.measuring.needs import text_measures
from trl_learnalign.planning import checks
from trl_learnalign.planning.preflight import check_lengths, check_references
from trl_learnalign.records import layout
from trl_learnalign.records.store import check_writable
from trl_learnalign.selectors import VALIDATION, Selector, find_selector
from trl_learnalign.training.sampler import find_sampler
from trl_learnalign.training.terminal import tell_story

if TYPE_CHECKING:
    from trl import GRPOTrainer

logger = logging.getLogger(__name__)

PlanMaker = Callable[[LearnAlignConfig, int, Geometry], Plan]


@dataclass(frozen=True)
class RunSetup:
    """What a run is made of.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        config (`LearnAlignConfig`): Settings.
        context (`Context`): How candidates are measured.
        selectors (`tuple[Selector]`): One for each stage.
        used (`tuple[Selector]`): Those of them that score something.
        plan (`Plan`): Its phases.
        folder (`Path`): The record folder.
        validation_dataset (`datasets.Dataset`, *optional*): Trusted prompts, if a selector wants them.
        code (mapping): `identity.code_identity` of the trainer.
    """

    trainer: GRPOTrainer
    config: LearnAlignConfig
    context: Context
    selectors: tuple[Selector, ...]
    used: tuple[Selector, ...]
    plan: Plan
    folder: Path
    validation_dataset: Any
    code: Any

    @property
    def ranks(self) -> Ranks:
        """The processes."""
        return self.context.ranks

    @cached_property
    def groupings(self) -> tuple[Grouping, ...]:
        """Columns by which a choice is told."""
        return column_groupings(self.trainer.train_dataset, self.config.category_columns)

    @property
    def wants_validation(self) -> bool:
        """Whether a selector compares candidates with trusted prompts."""
        return any(VALIDATION in selector.needs for selector in self.used)

    @property
    def trains_before_scoring(self) -> bool:
        """Whether anything is measured after a step of training, and so depends on how that was made."""
        last = self.plan.phases[-1]
        return (last.start if self.plan.stages else last.end) > 0


def set_up(
    trainer: GRPOTrainer,
    config: LearnAlignConfig | None = None,
    validation_dataset: Any = None,
    plan_maker: PlanMaker = make_plan,
) -> RunSetup:
    """Check that trainer, dataset and settings fit, and plan the run.

    Args:
        trainer (`GRPOTrainer`): The trainer, before `train()`; its `max_steps` become those of the plan.
        config (`LearnAlignConfig`, *optional*): Settings; by default the paper's.
        validation_dataset (`datasets.Dataset`, *optional*): Trusted prompts.
        plan_maker (callable, *optional*): What plans the phases.

    Raises:
        `ValueError`, `TypeError`: If they do not fit; before any rollout.
        `RuntimeError`: If this version of trl is not supported, or processes were launched that do not work together.
    """
    bridge.check_trainer(trainer)
    bridge.check_launch(trainer)
    config = LearnAlignConfig() if config is None else config
    if not isinstance(config, LearnAlignConfig):
        raise TypeError(f"config is a {type(config).__name__}: give LearnAlignConfig(...).")
    tell_story(config.verbose, trainer.accelerator.is_main_process)
    # A large dataset takes a while to read, and the trainer's own order leaves prompts to the trainer.
    reads_prompts = not config.leaves_the_order
    columns, asked_by = config.category_columns, checks.asked_by(trainer)
    takes_images = bridge.takes_images(trainer)
    checks.check_dataset(
        trainer.train_dataset, columns, reads_prompts, asked_by, takes_images=takes_images
    )
    if reads_prompts:
        check_lengths(trainer)
    check_references(trainer)
    selectors = tuple(find_selector(name) for name in config.selectors)
    plan = _planned(trainer, config, plan_maker)
    used = checks.check_selectors(config, trainer.train_dataset, validation_dataset, plan)
    checks.check_objective(trainer.args, used)
    checks.check_adapter(trainer, used)
    context = _context(trainer, config, scores=bool(used))
    for selector in used:
        text_measures(context, selector)  # a tokenizer that does not fit is an error now
    if config.keeps_belief:
        check_embeddings(context)
        if config.adaptive_embeddings == HIDDEN:
            setting = f"adaptive_embeddings={HIDDEN!r}"
            checks.warn_of_unread_images(setting, trainer.train_dataset)
    folder = Path(config.record_dir or layout.record_folder(trainer.args.output_dir))
    if not config.leaves_the_order:
        _settle_length(trainer, plan, config)
    check_writable(folder)
    warn_of_upload(trainer, folder)
    # What a reward of the user's holds may name its process (a rank, a device): the main one speaks for all.
    code = context.ranks.from_main(identity.code_identity(trainer))
    parts = trainer, config, context, selectors, tuple(used), plan, folder
    return RunSetup(*parts, validation_dataset, code)


def _context(trainer: GRPOTrainer, config: LearnAlignConfig, scores: bool) -> Context:
    """How candidates are measured; how many rollouts there is memory for is looked up where some are."""
    ranks, planned = Ranks(trainer.accelerator), None
    if not scores:
        planned = planned_scoring_batch_prompts(trainer.args, config, ranks.count)
    return Context.of(trainer, config, ranks, planned)


def _planned(trainer: GRPOTrainer, config: LearnAlignConfig, plan_maker: PlanMaker) -> Plan:
    """The plan, as long as the trainer says where its length is left to it; a user's samplers are found first."""
    for path in config.own_orders:
        find_sampler(path)
    dataset, asked_by = trainer.train_dataset, checks.asked_by(trainer)
    return checks.planned(config, trainer.args, dataset, asked_by, plan_maker)


def _settle_length(trainer: GRPOTrainer, plan: Plan, config: LearnAlignConfig) -> None:
    """The plan's steps are the trainer's; says so where other lengths were asked for."""
    checks.check_args(trainer.args, plan, config)
    checks.warn_of_length(trainer.args, plan, config)
    trainer.args.max_steps = plan.total_steps


def warn_of_upload(trainer: GRPOTrainer, folder: Path) -> None:
    """Say so if the records would go to the hub: transformers uploads all of the output folder but `_*`.

    Args:
        trainer (`GRPOTrainer`): With `push_to_hub` and `output_dir`.
        folder (`Path`): The record folder.
    """
    output_dir = Path(trainer.args.output_dir).resolve()
    place = folder.resolve()
    if not trainer.args.push_to_hub or not place.is_relative_to(output_dir):
        return
    inside = place.relative_to(output_dir).parts
    stays = bool(inside) and inside[0].startswith("_")
    if stays or not trainer.accelerator.is_main_process:
        return
    logger.warning(
        "push_to_hub=True uploads the records in %s too: prompts, rollouts and features, with after_warmup='restart' "
        "also weights. To keep them at home, choose a record_dir outside of it, or one in it whose name begins with "
        "'_'.",
        folder,
    )
