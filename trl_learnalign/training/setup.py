"""Checks and assembles the parts of a run before anything is measured or trained."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.logging import RichHandler
from tqdm.auto import tqdm
from typing_extensions import override

from trl_learnalign.bridge import inference
from trl_learnalign.bridge.compat import check_launch, check_trainer
from trl_learnalign.bridge.inference import sampling_settings
from trl_learnalign.bridge.objective import objective_settings
from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.data.columns import HIDDEN, Grouping, check_embeddings, column_groupings
from trl_learnalign.data.prompts import dataset_digest
from trl_learnalign.distributed import Ranks
from trl_learnalign.measuring import fingerprint
from trl_learnalign.measuring.base import Context, Validation
from trl_learnalign.measuring.generation import planned_scoring_batch_prompts
from trl_learnalign.measuring.text_measures import text_measures
from trl_learnalign.plan import Geometry, Plan, make_plan
from trl_learnalign.preflight import checks
from trl_learnalign.preflight.environment import check_lengths, check_references
from trl_learnalign.records import layout
from trl_learnalign.records.run_record import Header, TrainerEntry
from trl_learnalign.records.store import check_writable
from trl_learnalign.selectors import VALIDATION, Selector, find_selector
from trl_learnalign.training.sampler import find_sampler

if TYPE_CHECKING:
    from trl import GRPOTrainer

logger = logging.getLogger(__name__)


# ---- Console logging ------------------------------------------------------------------------------------------------
# A library does not change the user's logging. If no logging is configured for `trl_learnalign`, its lines are printed
# on the main process. A level or handler that the user set for that logger takes precedence, and so does a handler of
# the root logger that already prints.

PACKAGE = logging.getLogger("trl_learnalign")
PREFIX = "LearnAlign: "


class TerminalHandler(logging.Handler):
    """Prints a line with `tqdm.write`, which removes a progress bar and redraws it below the line.

    On a terminal, long lines are broken between words; a file has no width.

    Args:
        stream (`str`): `"stdout"` or `"stderr"`, looked up when a line is printed.
        prefix (`str`, *optional*): Prefix of each line.
    """

    def __init__(self, stream: Literal["stdout", "stderr"], prefix: str = ""):
        super().__init__()
        self.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
        self.stream_name = stream

    @override
    def emit(self, record: logging.LogRecord) -> None:
        try:
            stream = getattr(sys, self.stream_name)
            line = self.format(record)
            tqdm.write(_broken(line) if stream.isatty() else line, file=stream)
        except Exception:
            self.handleError(record)


def _broken(text: str) -> str:
    """The text in lines of the terminal's width, all but the first of a paragraph indented; words stay whole."""
    width = shutil.get_terminal_size().columns
    wrapper = textwrap.TextWrapper(
        width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(wrapper.fill(paragraph) for paragraph in text.splitlines())


def configure_logging(verbose: bool, is_main: bool) -> None:
    """Print the package's log lines, unless logging is configured for it.

    Args:
        verbose (`bool`): `LearnAlignConfig.verbose`.
        is_main (`bool`): Whether this is the main process; the others only warn.
    """
    ours = [handler for handler in PACKAGE.handlers if isinstance(handler, TerminalHandler)]
    if not verbose or not is_main:
        if ours:  # set by an earlier run of this process
            PACKAGE.removeHandler(ours[0])
            PACKAGE.setLevel(logging.NOTSET)
        return
    root = logging.getLogger()
    is_set_up = PACKAGE.level != logging.NOTSET or PACKAGE.handlers
    if is_set_up or root.level > logging.WARNING:
        return
    PACKAGE.setLevel(logging.INFO)
    if not any(_prints(handler) for handler in root.handlers):
        PACKAGE.addHandler(TerminalHandler("stderr", PREFIX))


def _prints(handler: logging.Handler) -> bool:
    """Whether a handler of the user's prints to the terminal."""
    if isinstance(handler, RichHandler | TerminalHandler):
        return True
    streams = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    return isinstance(handler, logging.StreamHandler) and handler.stream in streams


# ---- Setup ----------------------------------------------------------------------------------------------------------

PlanMaker = Callable[[LearnAlignConfig, int, Geometry], Plan]


@dataclass(frozen=True)
class RunSetup:
    """The assembled parts of a run.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        config (`LearnAlignConfig`): Settings.
        context (`Context`): Options for measuring candidates.
        selectors (`tuple[Selector]`): One for each stage.
        used (`tuple[Selector]`): The selectors among them that score something.
        plan (`Plan`): The plan with its phases.
        folder (`Path`): The record folder.
        validation_dataset (`datasets.Dataset`, *optional*): Trusted prompts, if a selector needs them.
        code (mapping): `fingerprint.code_identity` of the trainer.
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
        """The distributed processes."""
        return self.context.ranks

    @cached_property
    def groupings(self) -> tuple[Grouping, ...]:
        """Columns for the statistics of a selection."""
        return column_groupings(self.trainer.train_dataset, self.config.category_columns)

    @property
    def wants_validation(self) -> bool:
        """Whether a selector compares candidates with trusted prompts."""
        return any(VALIDATION in selector.needs for selector in self.used)

    @property
    def trains_before_scoring(self) -> bool:
        """Whether a measurement follows a training step and therefore depends on how that step was computed."""
        last = self.plan.phases[-1]
        return (last.start if self.plan.stages else last.end) > 0


def set_up(
    trainer: GRPOTrainer,
    config: LearnAlignConfig | None = None,
    validation_dataset: Any = None,
    plan_maker: PlanMaker = make_plan,
) -> RunSetup:
    """Check that trainer, dataset and settings fit together, and plan the run.

    Args:
        trainer (`GRPOTrainer`): The trainer, before `train()`; its `max_steps` become those of the plan.
        config (`LearnAlignConfig`, *optional*): Settings; by default the paper's.
        validation_dataset (`datasets.Dataset`, *optional*): Trusted prompts.
        plan_maker (callable, *optional*): Makes the plan.

    Raises:
        `ValueError`, `TypeError`: If they do not fit together; before any rollout.
        `RuntimeError`: If this version of trl is not supported, or the launched processes do not work together.
    """
    check_trainer(trainer)
    check_launch(trainer)
    config = LearnAlignConfig() if config is None else config
    if not isinstance(config, LearnAlignConfig):
        raise TypeError(f"config is a {type(config).__name__}: give LearnAlignConfig(...).")
    configure_logging(config.verbose, trainer.accelerator.is_main_process)
    _check_prompts(trainer, config)
    selectors = tuple(find_selector(name) for name in config.selectors)
    plan = _planned(trainer, config, plan_maker)
    used = checks.check_selectors(config, trainer.train_dataset, validation_dataset, plan)
    checks.check_objective(trainer.args, used)
    checks.check_adapter(trainer, used)
    context = _context(trainer, config, scores=bool(used))
    for selector in used:
        text_measures(context, selector)  # raises now if a tokenizer does not fit
    if config.needs_belief:
        check_embeddings(config.adaptive_embeddings, trainer.train_dataset)
        if config.adaptive_embeddings == HIDDEN:
            setting = f"adaptive_embeddings={HIDDEN!r}"
            checks.warn_of_unread_images(setting, trainer.train_dataset)
    folder = Path(config.record_dir or layout.record_folder(trainer.args.output_dir))
    if not config.uses_trainer_order:
        _apply_plan_length(trainer, plan, config)
    check_writable(folder)
    warn_of_upload(trainer, folder)
    # A user's reward may hold values of its process (a rank, a device), so the main process's identity counts for all.
    code = context.ranks.from_main(fingerprint.code_identity(trainer))
    parts = trainer, config, context, selectors, tuple(used), plan, folder
    return RunSetup(*parts, validation_dataset, code)


def _check_prompts(trainer: GRPOTrainer, config: LearnAlignConfig) -> None:
    # Reading a large dataset takes a while, and in its own order the trainer handles the prompts itself.
    reads_prompts = not config.uses_trainer_order
    columns, asked_by = config.category_columns, checks.asked_by(trainer)
    takes_images = inference.takes_images(trainer)
    checks.check_dataset(
        trainer.train_dataset, columns, reads_prompts, asked_by, takes_images=takes_images
    )
    if reads_prompts:
        check_lengths(trainer)
    check_references(trainer)


def _context(trainer: GRPOTrainer, config: LearnAlignConfig, scores: bool) -> Context:
    """Return the options for measuring; memory for rollouts is estimated only if candidates are scored."""
    ranks, planned = Ranks(trainer.accelerator), None
    if not scores:
        planned = planned_scoring_batch_prompts(trainer.args, config, ranks.count)
    return Context.of(trainer, config, ranks, planned)


def _planned(trainer: GRPOTrainer, config: LearnAlignConfig, plan_maker: PlanMaker) -> Plan:
    """Make the plan, with the trainer's length if the settings leave it open; custom samplers are imported first."""
    for path in config.own_orders:
        find_sampler(path)
    dataset, asked_by = trainer.train_dataset, checks.asked_by(trainer)
    return checks.planned(config, trainer.args, dataset, asked_by, plan_maker)


def _apply_plan_length(trainer: GRPOTrainer, plan: Plan, config: LearnAlignConfig) -> None:
    """Set the trainer's steps to the plan's, and log it if other lengths were set."""
    checks.check_args(trainer.args, plan, config)
    checks.warn_of_length(trainer.args, plan, config)
    trainer.args.max_steps = plan.total_steps


def warn_of_upload(trainer: GRPOTrainer, folder: Path) -> None:
    """Warn if the records would be uploaded: transformers uploads the output folder except `_*`.

    Args:
        trainer (`GRPOTrainer`): The trainer, with `push_to_hub` and `output_dir`.
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
        "push_to_hub=True also uploads the records in %s: prompts, rollouts and features, and with "
        "after_warmup='restart' weights. To keep them local, choose a record_dir outside of that folder, or inside "
        "it with a name that begins with '_'.",
        folder,
    )


# ---- Identity of a run ----------------------------------------------------------------------------------------------

SELECTION = (
    "stages",
    "stage_epochs",
    "reselect",
    "on_shortfall",
    "selector",
    "unbiased_learnability",
    "exclude_self",
    "zero_learnability",
    "logdet_ridge",
    "pool_sample",
    "gradient_rollouts",
    "validation_dataset",
)
"""Entries about ranking and number of selected prompts, which do not affect the warmed-up policy."""

ALWAYS = (
    "warmup_samples",
    "warmup_epochs",
    "after_warmup",
    *SELECTION[:8],
    "pool_sample",
    "gradient_rollouts",
    "selection_seed",
    "skip_zero_advantages",
)
"""Settings that are compared for every run."""

ADAPTIVE = tuple(
    field.name
    for field in dataclasses.fields(LearnAlignConfig)
    if field.name.startswith("adaptive_")
)
"""Settings that are compared with an adaptive order."""

BUDGET = ("rollout_budget", "budget_rounds", "budget_exponent")
"""Settings that are compared with a rollout budget, in addition to those of its belief."""

BASELINE = ("baseline", "baseline_share", "baseline_pruning")
"""Settings that are compared where the belief is the baseline."""

BELIEF = (
    "adaptive_embeddings",
    "adaptive_feature_dim",
    "adaptive_prior_std",
    "adaptive_drift_std",
    "adaptive_decay",
    "adaptive_prompt_decay",
    "adaptive_concentration",
    "adaptive_concentration_decay",
)
"""Constants of the belief of a rollout budget; the constants of the adaptive order are not among them."""


@dataclasses.dataclass(frozen=True)
class RunIdentity:
    """The identity of a run.

    Args:
        entries (`dict`): The values that are equal for the same run, as plain values.
        measured_with (`dict`): The entries that measurements depend on.
        validation (`Validation`, *optional*): Trusted prompts, with their digest.
    """

    entries: dict[str, Any]
    measured_with: dict[str, Any]
    validation: Validation | None

    @property
    def dataset(self) -> str:
        """Digest of the training dataset."""
        return self.entries["dataset"]


def identify(setup: RunSetup, config: LearnAlignConfig) -> RunIdentity:
    """Return the identity of a run from the current trainer, before its first step.

    Args:
        setup (`RunSetup`): The assembled run.
        config (`LearnAlignConfig`): Settings that are in force for this run.
    """
    validation = None
    if setup.wants_validation:
        validation = Validation(setup.validation_dataset, dataset_digest(setup.validation_dataset))
    measured_with = fingerprint.measured_with(setup.trainer, setup.code)
    entries = {**settings_of_run(setup, config), **measured_with, **trainer_settings(setup)}
    if validation is not None:
        entries["validation_dataset"] = validation.digest
    return RunIdentity(entries, measured_with, validation)


def settings_of_run(setup: RunSetup, config: LearnAlignConfig) -> dict[str, Any]:
    """Return the entries for settings and dataset, by user-facing names; no model is read.

    Args:
        setup (`RunSetup`): The assembled run.
        config (`LearnAlignConfig`): Settings that are in force for this run.
    """
    plan, success = setup.plan, setup.context.success
    names = list(ALWAYS)
    # The others count only where they are used.
    names += ["stage_steps"] if config.stage_steps is not None else []
    names += ["logdet_ridge"] if "learnalign_logdet" in config.selectors else []
    names += ["order"] if config.goes_by_outcomes or config.uses_trainer_order else []
    names += ADAPTIVE if config.is_adaptive else []
    names += ["generation_price"] if config.is_adaptive and config.adaptive_gain_per_cost else []
    names += [*BUDGET, *BELIEF] if config.rollout_budget is not None else []
    names += ["oversample", "max_generation_batches"] if config.samples_dynamically else []
    names += BASELINE if config.baseline != "group" else []
    return {
        **{name: getattr(config, name) for name in names},
        "dataset": dataset_digest(setup.trainer.train_dataset),
        "dataset_size": plan.dataset_size,
        "prompts_per_unit": plan.geometry.unit_prompts,
        "steps_per_unit": plan.geometry.unit_steps,
        "num_generations": plan.geometry.rollouts,
        "success_reward": success.name,
        "success_threshold": success.threshold,
        **({"success_range": list(success.bounds)} if success.bounds else {}),
    }


def trainer_settings(setup: RunSetup) -> dict[str, dict[str, Any]]:
    """Return the trainer's settings that are part of the identity, as groups of entries."""
    args = setup.trainer.args
    groups = {"settings": fingerprint.settings_of(args, fingerprint.MEASURES)}
    if setup.trains_before_scoring:
        groups["training"] = fingerprint.settings_of(args, fingerprint.TRAINS)
    return groups


def warmup_identity(run: RunIdentity, setup: RunSetup, base_weights: str) -> RunIdentity:
    """Return the identity of the warmed-up policy and its pool, without selector and number of prompts.

    Args:
        run (`RunIdentity`): Identity of the warm-up run.
        setup (`RunSetup`): The assembled run.
        base_weights (`str`): Digest of the trainable weights before the warm-up.
    """
    kept = {name: value for name, value in run.entries.items() if name not in SELECTION}
    kept |= {
        "base_weights": base_weights,
        "objective": objective_settings(setup.trainer),
        "sampling": sampling_settings(setup.trainer),
    }
    return dataclasses.replace(run, entries=kept)


def header(
    setup: RunSetup, config: LearnAlignConfig, plan: Plan, scoring_batch_prompts: int
) -> Header:
    """Return the part of a record that is written at the start.

    Args:
        setup (`RunSetup`): The assembled run.
        config (`LearnAlignConfig`): Settings that are in force for this run.
        plan (`Plan`): The current plan.
        scoring_batch_prompts (`int`): Maximum number of prompts of one generation call of scoring.
    """
    trainer, args = setup.trainer, setup.trainer.args
    entry = TrainerEntry(
        model=trainer.model.config.name_or_path,
        reward_funcs=trainer.reward_func_names,
        seed=args.seed,
        learning_rate=args.learning_rate,
        beta=args.beta,
        loss_type=args.loss_type,
        temperature=args.temperature,
        max_completion_length=args.max_completion_length,
        processes=setup.ranks.count,
        distributed_type=str(trainer.accelerator.distributed_type.value),
        scoring_batch_prompts=scoring_batch_prompts,
    )
    return Header(plan=plan, config=dataclasses.asdict(config), trainer=entry)
