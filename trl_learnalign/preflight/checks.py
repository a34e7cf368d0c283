"""Checks a run's inputs and plans it; needs no model."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset

from trl_learnalign.bridge.requires import stand_in
from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.data.columns import check_category_columns
from trl_learnalign.data.loading import has_empty_lists
from trl_learnalign.data.prompts import (
    SOURCE_ROW,
    check_prompts,
    columns_of,
    has_images,
    has_transform,
    is_stream,
    moved_rows,
    rows_are_alike,
)
from trl_learnalign.plan import (
    Geometry,
    Plan,
    is_scored,
    make_plan,
    steps_for,
    trainers_plan,
)
from trl_learnalign.preflight.forecast import geometry, with_trainer_length
from trl_learnalign.records.history import read_history
from trl_learnalign.selectors import (
    GRADIENTS,
    HIDDEN,
    HISTORY,
    LIKELIHOODS,
    RATINGS,
    ROLLOUTS,
    VALIDATION,
    Selector,
    check_columns,
    combined,
    find_selector,
)
from trl_learnalign.success import SuccessRule

if TYPE_CHECKING:
    from trl import GRPOConfig, GRPOTrainer

logger = logging.getLogger(__name__)

# Equal to members of PEFT's enumeration, which are strings; older versions lack some.
_ROW_MIXING_ADAPTERS = {"LILY"}
_IMAGE_COLUMNS = ("image", "images")
_SKIPPING = (
    "LearnAlignConfig.skipping() keeps the trainer's order and skips rollouts without an advantage."
)


def plan_run(
    config: LearnAlignConfig,
    args: GRPOConfig,
    dataset: Any,
    reward_funcs: Any,
    validation_dataset: Any = None,
) -> Plan:
    """Check everything that can be checked without a model, and plan the run.

    Args:
        config (`LearnAlignConfig`): Settings of the selection.
        args (`GRPOConfig`): Settings of the trainer.
        dataset (`datasets.Dataset`): The pool of prompts.
        reward_funcs (callable, `str` or list of them): As given to `GRPOTrainer`.
        validation_dataset (`datasets.Dataset`, *optional*): Trusted prompts, for `validation_alignment`.

    Raises:
        `ValueError`, `TypeError`: Naming the value and the remedy.
    """
    # A stream cannot be read in advance.
    reads_prompts = not (config.uses_trainer_order and is_stream(dataset))
    check_dataset(dataset, config.category_columns, reads_prompts, takes_images=True)
    SuccessRule.of(config, reward_names(reward_funcs))
    plan = planned(config, args, dataset)
    used = check_selectors(config, dataset, validation_dataset, plan)
    check_objective(args, used)
    check_args(args, plan, config)
    return plan


def planned(
    config: LearnAlignConfig,
    args: GRPOConfig,
    dataset: Any,
    asked_by: str | None = None,
    plan_maker: Callable[[LearnAlignConfig, int, Geometry], Plan] = make_plan,
) -> Plan:
    """The plan of a run; if its length is left to the trainer, that of the trainer's settings is used.

    Args:
        config (`LearnAlignConfig`): Settings of the selection.
        args (`GRPOConfig`): Settings of the trainer.
        dataset: The training dataset.
        asked_by (`str`, *optional*): See [`asked_by`].
        plan_maker (callable, *optional*): Plans the phases.

    Raises:
        `ValueError`: If a run on a stream has no length, or as the plan maker does.
    """
    if is_stream(dataset) and args.max_steps <= 0:
        raise ValueError(
            f"max_steps={args.max_steps} with a stream of unknown length: set max_steps to the number of optimizer "
            "steps."
        )
    size = 0 if is_stream(dataset) else len(dataset)
    config = with_trainer_length(config, args, size)
    if config.uses_trainer_order and not are_prompts_counted(dataset, asked_by):
        assert config.stage_steps is not None
        return trainers_plan(config.stage_steps[0], geometry(args))
    return plan_maker(config, size, geometry(args))


def check_dataset(
    dataset: Any,
    category_columns: Sequence[str] | None = None,
    reads_prompts: bool = True,
    asked_by: str | None = None,
    takes_images: bool = False,
) -> None:
    """Check that the pool is indexable and has text prompts, and that the category columns exist.

    Args:
        dataset: The training dataset.
        category_columns (sequence of `str`, *optional*): Columns by which the report groups a selection.
        reads_prompts (`bool`, *optional*, defaults to `True`): Whether each prompt is checked. `False` for the
            trainer's own order, which also supports streams and prompts from an environment.
        asked_by (`str`, *optional*): See [`asked_by`].
        takes_images (`bool`, *optional*, defaults to `False`): Whether the policy is a vision-language model, or
            unknown yet.

    Raises:
        `TypeError`, `ValueError`: Naming what is wrong, and the remedy.
    """
    if is_stream(dataset):
        _check_stream(category_columns, reads_prompts)
        return
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"The training dataset is a {type(dataset).__name__}: give a `datasets.Dataset`, e.g. "
            "Dataset.from_list(rows)."
        )
    if not len(dataset):
        raise ValueError(
            "The training dataset is empty: it needs at least the prompts of one generation batch. Was every row "
            "filtered out, or is this the wrong split?"
        )
    _check_columns(dataset, reads_prompts, asked_by, takes_images)
    if reads_prompts:
        if asked_by is not None:
            _check_rows_differ(dataset, asked_by)
        check_prompts(dataset, with_images=takes_images and bool(image_columns(dataset)))
    check_category_columns(dataset, category_columns)


def _check_columns(
    dataset: Dataset, reads_prompts: bool, asked_by: str | None, takes_images: bool
) -> None:
    columns = columns_of(dataset)
    if "prompt" not in columns and (reads_prompts or asked_by is None):
        raise ValueError(
            f"The training dataset has no 'prompt' column, only {columns}: rename a column or map one, e.g. "
            f"dataset.rename_column('question', 'prompt').{(f' {_SKIPPING}' if asked_by else '')}"
        )
    images = image_columns(dataset)
    if images and not takes_images:
        raise ValueError(
            f"The training dataset has the image column(s) {images}, but the policy only reads text. Give "
            "GRPOTrainer a vision-language model and its processor (processing_class), or remove the columns with "
            "dataset.remove_columns if the task does not need them."
        )


def _check_rows_differ(dataset: Dataset, asked_by: str) -> None:
    if rows_are_alike(dataset):
        raise ValueError(
            f"All {len(dataset)} rows of the training dataset are identical because {asked_by} supplies the task. A "
            f"selection or an adaptive order works by rows, and these rows do not identify a task. {_SKIPPING} To "
            "select or to order, give each task a row of its own that always leads to that task."
        )


def _check_stream(category_columns: Sequence[str] | None, reads_prompts: bool) -> None:
    if reads_prompts:
        raise TypeError(
            "The training dataset is a stream (IterableDataset), but a selection or an adaptive order counts "
            f"prompts and identifies them by row numbers, which a stream does not have. {_SKIPPING} To select or to "
            "order, materialise the stream as an indexable dataset, e.g. Dataset.from_list(list(stream))."
        )
    if category_columns:
        raise ValueError(
            f"category_columns={list(category_columns)}: the training dataset is a stream, so the shares of its "
            "categories are unknown. Leave category_columns unset."
        )


def asked_by(trainer: GRPOTrainer) -> str | None:
    """The trainer's argument that may determine the prompt instead of the rows; `None` if the rows determine it."""
    if trainer.environment_factories is not None:
        return "environment_factory"
    return None if trainer.rollout_func is None else "rollout_func"


def are_prompts_counted(dataset: Any, asked_by: str | None) -> bool:
    """Whether the rows of the training dataset are the prompts, unlike with streams and environments."""
    if is_stream(dataset) or "prompt" not in columns_of(dataset):
        return False
    return asked_by is None or not rows_are_alike(dataset)


def image_columns(dataset: Dataset) -> list[str]:
    """Columns that TRL reads images from. It ignores empty lists in `images`, and fails on `None` in either column.

    Args:
        dataset (`datasets.Dataset`): The training dataset.
    """
    columns = columns_of(dataset)
    names = [name for name in _IMAGE_COLUMNS if name in columns]
    if has_transform(dataset):  # its output is known only row by row
        return names
    names = [name for name in names if name != "images" or not has_empty_lists(dataset, name)]
    in_prompts = "prompt" in columns and has_images(dataset.features["prompt"])
    return [*names, "prompt"] if in_prompts else names


def check_images(dataset: Dataset, selectors: Sequence[Selector]) -> None:
    """Check that no scoring selector needs gradients of prompts with images, which are not supported yet.

    Raises:
        `ValueError`: Naming the selector, the columns with images and the remedy.
    """
    images = image_columns(dataset)
    if not images:
        return
    for selector in selectors:
        if selector.needs & {GRADIENTS, VALIDATION}:
            raise ValueError(
                f"selector={selector.name!r} needs gradients, which cannot be captured for images, but the training "
                f"dataset has the image column(s) {images}. Choose a selector without gradients, e.g. "
                "'learnability', or the adaptive order (LearnAlignConfig.adaptive()); both support images. Or "
                "remove the columns with dataset.remove_columns if the task does not need them."
            )
        if selector.needs & {HIDDEN, LIKELIHOODS, RATINGS}:
            warn_of_unread_images(f"selector={selector.name!r}", dataset)


def warn_of_unread_images(setting: str, dataset: Dataset) -> None:
    """Warn if a setting, such as `"selector='ifd'"`, reads prompts without their images."""
    if images := image_columns(dataset):
        logger.warning(
            "%s reads only the text of prompts and ignores the images of the column(s) %s.",
            setting,
            images,
        )


def drop_unneeded_warmup(config: LearnAlignConfig) -> LearnAlignConfig:
    """The settings without a warm-up if no selector rolls out, because the warm-up would have no effect.

    This applies to runs that restart from the base model after scoring (`after_warmup="restart"`). Other runs continue
    from the warm-up, and are not changed.

    Raises:
        `ValueError`, `TypeError`: If a selector is unknown.
    """
    needs = combined([find_selector(name) for name in config.selectors]).needs
    if config.after_warmup == "continue" or needs & {ROLLOUTS, GRADIENTS, VALIDATION}:
        return config
    return replace(config, warmup_samples=0, after_warmup="continue")


def used_selectors(
    config: LearnAlignConfig, plan: Plan, selectors: Sequence[Selector]
) -> list[Selector]:
    """The selectors that are used for scoring; a stage that takes all its candidates uses none.

    Args:
        config (`LearnAlignConfig`): Settings.
        plan (`Plan`): Plan of the run; without stages for a selection without training, which uses all selectors.
        selectors (sequence of `Selector`): One for each stage.
    """
    if not plan.stages:
        return list(selectors)
    used, remaining = [], plan.dataset_size
    for stage, selector in zip(plan.stages, selectors, strict=True):
        candidates = remaining if config.reselect == "remaining" else plan.dataset_size
        remaining -= stage.size
        if is_scored(config, stage.size, candidates, plan.dataset_size):
            used.append(selector)
    return used


def check_selectors(
    config: LearnAlignConfig,
    dataset: Dataset,
    validation_dataset: Any = None,
    plan: Plan | None = None,
) -> list[Selector]:
    """The selectors that are used for scoring, after checking their inputs.

    Args:
        config (`LearnAlignConfig`): Settings.
        dataset (`datasets.Dataset`): The pool of prompts.
        validation_dataset (`datasets.Dataset`, *optional*): Trusted prompts.
        plan (`Plan`, *optional*): Determines which selectors are used; defaults to all of them.

    Raises:
        `ValueError`, `TypeError`, `FileNotFoundError`: Naming the selector, what is missing and the remedy.
    """
    selectors = [find_selector(name) for name in config.selectors]
    used = selectors if plan is None else used_selectors(config, plan, selectors)
    if validation_dataset is not None:
        check_validation(dataset, validation_dataset)
    for selector in {selector.name: selector for selector in used}.values():
        check_inputs(selector, config, dataset, validation_dataset is not None)
    if isinstance(dataset, Dataset):
        check_images(dataset, used)
    return used


def check_objective(args: GRPOConfig, selectors: Sequence[Selector]) -> None:
    """Check that each prompt has its own gradient, if a selector needs one.

    Raises:
        `ValueError`: If the objective makes a prompt's gradient depend on the rest of its batch, naming the setting.
    """
    if not any(selector.needs & {GRADIENTS, VALIDATION} for selector in selectors):
        return
    remedy = "or choose a selector without gradients."
    if args.top_entropy_quantile < 1:
        raise ValueError(
            f"top_entropy_quantile={args.top_entropy_quantile}: which tokens of a prompt enter the loss depends on "
            f"the other prompts in its batch, so the prompt has no gradient of its own. Set it to 1.0, {remedy}"
        )
    has_regulariser = args.beta != 0 or args.entropy_coef != 0 or args.use_adaptive_entropy
    if args.multi_objective_aggregation == "normalize_then_sum":
        setting = "multi_objective_aggregation='normalize_then_sum'"
        alternative = "multi_objective_aggregation='sum_then_normalize'"
    elif args.scale_rewards == "batch":
        setting = "scale_rewards='batch'"
        alternative = "scale_rewards='group' or 'none'"
    else:
        return
    if has_regulariser:
        raise ValueError(
            f"{setting} with a KL or entropy term (beta={args.beta}, entropy_coef={args.entropy_coef}): advantages "
            "are divided by the standard deviation of their batch but the other term is not, so a prompt's "
            f"gradient depends on the other prompts in its batch. Use {alternative}, set that term to 0, {remedy}"
        )


def check_adapter(trainer: GRPOTrainer, selectors: Sequence[Selector]) -> None:
    """Check that the gradients of rollouts can be captured, if a selector needs them.

    An adapter must not make a rollout's gradient depend on the other rows of its forward pass.

    Raises:
        `ValueError`: Naming the adapter, or the class of the trainer.
    """
    if not any(selector.needs & {GRADIENTS, VALIDATION} for selector in selectors):
        return
    copy = stand_in(trainer)
    if copy is not None:
        raise ValueError(
            f"{copy} is a rewritten copy of TRL's trainer with its own log-probabilities and layers, whose "
            "gradients cannot be captured. Choose a selector without gradients, e.g. 'learnability', an adaptive "
            "order, or TRL's own GRPOTrainer."
        )
    adapters = getattr(trainer.model, "peft_config", {})
    for name, adapter in sorted(adapters.items()):
        if adapter.peft_type not in _ROW_MIXING_ADAPTERS:
            continue
        kind = adapter.peft_type
        raise ValueError(
            f"The adapter {name!r} is of PEFT's type {getattr(kind, 'value', kind)}, whose router averages over all "
            "rows of a forward pass, so a prompt has no gradient of its own. Use another adapter, e.g. LoRA, or "
            "choose a selector without gradients."
        )


def check_validation(dataset: Dataset, validation_dataset: Any) -> None:
    """Check that validation prompts can be rolled out and rewarded like training prompts.

    Raises:
        `TypeError`, `ValueError`: If it is not a dataset, is empty or lacks a column.
    """
    if not isinstance(validation_dataset, Dataset):
        raise TypeError(
            f"validation_dataset is a {type(validation_dataset).__name__}: give a `datasets.Dataset` of prompts."
        )
    if not len(validation_dataset):
        raise ValueError(
            "validation_dataset is empty, so its mean gradient has no direction. Give at least one prompt."
        )
    columns = set(columns_of(dataset)) - {SOURCE_ROW}
    absent = sorted(columns - set(columns_of(validation_dataset)))
    if absent:
        raise ValueError(
            f"validation_dataset lacks the columns {absent} of the training dataset, which the reward functions may "
            "read: add them, or remove them from the training dataset."
        )
    check_prompts(validation_dataset)


def check_inputs(
    selector: Selector,
    config: LearnAlignConfig,
    dataset: Dataset,
    validation: bool = False,
) -> None:
    """Check that a selector's inputs other than the policy exist: columns, a reward history, a validation set.

    Args:
        selector (`Selector`): The selector.
        config (`LearnAlignConfig`): Settings.
        dataset (`datasets.Dataset`): The pool of prompts.
        validation (`bool`, *optional*, defaults to `False`): Whether there is a validation set.

    Raises:
        `ValueError`, `FileNotFoundError`: Naming the selector, what is missing and the remedy.
    """
    check_columns(selector, dataset.column_names, config)
    if HISTORY in selector.needs:
        _check_history(selector, config, dataset)
    if VALIDATION in selector.needs and not validation:
        raise ValueError(
            f"selector={selector.name!r} needs a validation dataset, but none was given: pass validation_dataset "
            "(for recipes --validation_dataset_name), or choose a selector that compares the prompts with each "
            "other, e.g. 'learnalign'."
        )


def _check_history(selector: Selector, config: LearnAlignConfig, dataset: Dataset) -> None:
    if config.reward_history is None:
        raise ValueError(
            f"selector={selector.name!r} ranks prompts by the success rates of a previous run: name the file with "
            "reward_history."
        )
    history = read_history(config.reward_history)
    by_row = history.indices is not None and history.prompt_ids is None
    if not by_row and (images := image_columns(dataset)):
        raise ValueError(
            f"reward_history={str(config.reward_history)!r} identifies prompts by their text, but the training "
            f"dataset has the image column(s) {images}, and prompts with different images may share a text. Use a "
            "history with row numbers."
        )
    if by_row and SOURCE_ROW not in dataset.column_names:
        assert history.indices is not None
        _check_rows(history.indices, config, dataset)
    rates = history.of(dataset, np.arange(len(dataset)))
    if np.isnan(rates).all():
        raise ValueError(
            f"reward_history={config.reward_history!r} has no prompt of the training dataset: was it recorded with "
            "other prompts, e.g. with another system prompt?"
        )


_ROWS_REMEDY = (
    "Record the row numbers before rows are split, removed or shuffled: dataset = dataset.add_column('source_row', "
    "range(len(dataset))). Or use a history with prompt_id, which is matched by content."
)


def _check_rows(indices: np.ndarray, config: LearnAlignConfig, dataset: Dataset) -> None:
    """Check for shifted rows, with which a history by row number would rank other prompts."""
    name, rows = f"reward_history={config.reward_history!r}", len(dataset)
    if indices.max() >= rows:
        raise ValueError(
            f"{name} has row {indices.max()}, but the training dataset has {rows} rows: it belongs to another "
            f"dataset, or rows were removed from this one since. {_ROWS_REMEDY}"
        )
    count, why_moved = len(set(indices.tolist())), moved_rows(dataset)
    if count < rows and why_moved is not None:
        raise ValueError(
            f"{name} identifies {count} of {rows} prompts by row number, but the training dataset's rows are not "
            f"those of its file: {why_moved}. It is therefore unknown which prompt row {indices.max()} means. "
            f"{_ROWS_REMEDY} If the numbers refer to the training dataset as it is now, add the column now."
        )
    if count < rows or why_moved is not None:
        logger.warning(
            "%s identifies prompts by row number, and %s. Make sure that its numbers refer to the rows of the "
            "training dataset as it is now; otherwise the wrong prompts are ranked. %s",
            name,
            why_moved or f"it has {count} of the training dataset's {rows} rows",
            _ROWS_REMEDY,
        )


def reward_names(reward_funcs: Any) -> list[str]:
    """Names of reward functions as `GRPOTrainer` records them."""
    functions = reward_funcs if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    return [_reward_name(function) for function in functions]


def _reward_name(function: str | Callable[..., Any]) -> str:
    if isinstance(function, str):
        return function.split("/")[-1]
    if hasattr(function, "config"):  # a reward model
        return str(function.config.name_or_path).split("/")[-1]
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def check_args(args: GRPOConfig, plan: Plan, config: LearnAlignConfig) -> None:
    """Check trainer settings that would silently break the plan."""
    if config.uses_trainer_order:
        return
    if args.ignore_data_skip:
        raise ValueError(
            "ignore_data_skip=True: a resumed run would repeat some prompts of its epoch and miss others. Leave it "
            "False; skipping data is free here."
        )
    if args.max_steps > 0 and plan.total_steps != args.max_steps:
        raise ValueError(
            f"max_steps={args.max_steps}, but warm-up and stages plan {plan.total_steps} optimizer steps: leave "
            "max_steps at -1 and set the length with stages, stage_epochs or stage_steps, and warmup_samples."
            f"{_smoke_test(args, plan)}"
        )
    if args.accelerator_config.split_batches:
        raise ValueError(
            "accelerator_config.split_batches=True splits the rollouts of one prompt: leave it False."
        )


def _smoke_test(args: GRPOConfig, plan: Plan) -> str:
    """Settings for about the requested number of steps, if it is smaller than planned."""
    if args.max_steps > plan.total_steps:
        return ""
    units = max(1, args.max_steps // plan.geometry.unit_steps)
    prompts = min(plan.dataset_size, max(2, units * plan.geometry.unit_prompts))
    steps = steps_for(prompts, 1, plan.geometry)
    sample = min(plan.dataset_size, 2 * prompts)
    return (
        f" For a smoke test of {steps} step(s): warmup_samples=0, stages=[{prompts}], stage_epochs=[1], "
        f"stage_steps=0, pool_sample={sample}, which scores {sample} prompts."
    )


def warn_of_length(args: GRPOConfig, plan: Plan, config: LearnAlignConfig) -> None:
    """Warn if the plan's length differs from the length in the trainer's settings."""
    if config.has_trainers_length:
        _warn_of_whole_steps(plan)
    else:
        _warn_of_epochs(args, plan)


def _warn_of_whole_steps(plan: Plan) -> None:
    """Report that all steps are whole ones, whereas the trainer's own passes end with a smaller one."""
    micro_steps, accumulation = plan.phases[-1].pass_micro_steps, plan.geometry.accumulation
    if micro_steps % accumulation:
        logger.warning(
            "A pass over the prompts has %d micro-batches, which is not a multiple of "
            "gradient_accumulation_steps=%d: the trainer alone would end each pass with a smaller step of %d. Here "
            "every step has %d; the number of steps is the same.",
            *(micro_steps, accumulation, micro_steps % accumulation, accumulation),
        )


def _warn_of_epochs(args: GRPOConfig, plan: Plan) -> None:
    """Warn that `num_train_epochs` has no effect, if it is not at its default."""
    default = next(item.default for item in fields(args) if item.name == "num_train_epochs")
    if args.num_train_epochs != default and plan.total_steps:
        logger.warning(
            "num_train_epochs=%g has no effect: warm-up and stages plan %d optimizer steps. For more passes over a "
            "stage's prompts set stage_epochs (or stage_steps).",
            args.num_train_epochs,
            plan.total_steps,
        )
