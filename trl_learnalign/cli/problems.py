"""Loads the dataset, the model and the rewards that the arguments name."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from trl import ModelConfig
from trl.rewards import think_format_reward

from trl_learnalign.cli.arguments import RecipeArguments
from trl_learnalign.cli.console import exit_with_error
from trl_learnalign.data.answers import accuracy_reward
from trl_learnalign.data.loading import (
    as_prompts,
    hold_out,
    is_path,
    load_questions,
    with_source_rows,
)
from trl_learnalign.data.prompts import SOURCE_ROW
from trl_learnalign.evaluation.grading import Reward, load_reward
from trl_learnalign.preflight.environment import missing_from_hub
from trl_learnalign.ranking import FileRows

# ---- Reward functions -----------------------------------------------------------------------------------------------

NAMED: dict[str, Reward] = {
    "accuracy_reward": accuracy_reward,
    "think_format_reward": think_format_reward,
}
"""Reward functions of the recipes, by name."""


def find_rewards(names: Sequence[str]) -> list[Reward]:
    """Reward functions by name or import path.

    Args:
        names (sequence of `str`): Each in [`NAMED`], or `"package.module:function"`, also in the current folder.

    Raises:
        `ValueError`: Naming what is unknown, cannot be imported, or does not exist.
        `TypeError`: If it is not a function.
    """
    found = []
    for name in names:
        if name not in NAMED and ":" not in name:
            raise ValueError(
                f"reward_funcs={name!r}: choose one of {', '.join(map(repr, NAMED))}, or name a function of your own "
                "in TRL's form, (completions, **columns) -> rewards, as 'package.module:function'."
            )
        found.append(NAMED[name] if name in NAMED else load_reward(name, "reward_funcs"))
    return found


def check_weights(weights: Sequence[float] | None, rewards: Sequence[Reward]) -> None:
    """Check the trainer's `reward_weights` against the rewards, before a model is loaded.

    Raises:
        `ValueError`: If the numbers of weights and rewards differ.
    """
    if weights is not None and len(weights) != len(rewards):
        names = [getattr(reward, "__name__", type(reward).__name__) for reward in rewards]
        raise ValueError(
            f"reward_weights={list(weights)} for {len(rewards)} reward function(s) ({', '.join(names)}): give one "
            "weight for each, e.g. --reward_weights " + " ".join(["1"] * len(rewards)) + "."
        )


# ---- Dataset and model ----------------------------------------------------------------------------------------------

GENERATED = "generated"
TOY_MODEL = "toy"
TOY_MODEL_FOLDER = Path("outputs") / "toy"

LAUNCHER_VARIABLES = {
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GROUP_RANK",
}
"""Environment variables that make a process part of a distributed job."""


@dataclass(frozen=True)
class Problems:
    """Training pool, held-out problems and their rewards; the first reward defines success."""

    train: Dataset
    held_out: Dataset
    rewards: list[Reward]
    validation: Dataset | None = None


def missing_dataset(recipe: RecipeArguments) -> str | None:
    """Why the training problems are not available, or `None`; a local path is checked when it is loaded."""
    name = str(recipe.dataset_name)
    if name == GENERATED or is_path(name):
        return None
    return missing_from_hub(name, "dataset")


def load_problems(recipe: RecipeArguments) -> Problems:
    """Load the problems that the arguments name.

    Args:
        recipe (`RecipeArguments`): Names, splits, columns, sizes and the seed of the held-out split.

    Raises:
        `ValueError`: If a dataset has no questions, or no gradable answers.
        `FileNotFoundError`: If a file does not exist.
    """
    return _generated(recipe) if recipe.dataset_name == GENERATED else _loaded(recipe)


def _generated(recipe: RecipeArguments) -> Problems:
    from trl_learnalign.toy.tasks import accuracy_reward, build_pool

    regime, seed = recipe.generated_regime, recipe.split_seed
    train = build_pool(regime, recipe.train_samples or 400, seed)
    held_out = build_pool(regime, recipe.eval_samples or 200, seed, split="heldout")
    validation = None
    if recipe.validation_dataset_name is not None:
        validation = build_pool(regime, recipe.validation_samples or 50, seed, split="dev")
    rewards: list[Reward] = [accuracy_reward]
    if recipe.reward_funcs is not None:
        rewards = find_rewards(recipe.reward_funcs)
    return Problems(train, held_out, rewards, validation)


def _loaded(recipe: RecipeArguments) -> Problems:
    name, config, seed = str(recipe.dataset_name), recipe.dataset_config, recipe.split_seed
    train = _prompts(recipe, name, config, recipe.dataset_train_split)
    train = with_source_rows(train, name, config, recipe.dataset_train_split)
    if recipe.eval_dataset_name is not None:
        held_out = _prompts(
            recipe, recipe.eval_dataset_name, recipe.eval_dataset_config, recipe.dataset_test_split
        )
    elif is_path(name):
        train, held_out = hold_out(train, recipe.eval_samples or max(1, len(train) // 10), seed)
    else:
        held_out = _prompts(recipe, name, config, recipe.dataset_test_split)
    if recipe.train_samples is not None:
        train = _sample(train, min(recipe.train_samples, len(train)), seed)
    if recipe.eval_samples is not None:
        held_out = held_out.select(range(min(recipe.eval_samples, len(held_out))))
    rewards = find_rewards(recipe.reward_funcs or list(NAMED))
    return Problems(train, held_out, rewards, _validation(recipe))


@dataclass(frozen=True)
class Pool:
    """The pool that a subset is selected from; nothing is held out, because nothing is evaluated.

    Args:
        train (`datasets.Dataset`): The prompts.
        rewards (list of callables): The first one defines success.
        validation (`datasets.Dataset`, *optional*): Trusted problems.
        originals (`FileRows`, *optional*): The source rows of the prompts; `None` for generated ones.
    """

    train: Dataset
    rewards: list[Reward]
    validation: Dataset | None
    originals: FileRows | None


def load_pool(recipe: RecipeArguments, check: Callable[[int], None]) -> Pool:
    """Load the pool that a subset is selected from.

    Args:
        recipe (`RecipeArguments`): As for [`load_problems`]; its settings of held-out problems are ignored.
        check (callable): Called with the number of prompts before they are examined.

    Raises:
        `ValueError`, `FileNotFoundError`: As [`load_problems`].
    """
    if recipe.dataset_name == GENERATED:
        found = _generated(recipe)
        check(len(found.train))
        return Pool(found.train, found.rewards, found.validation, None)
    name, config, split = (
        str(recipe.dataset_name),
        recipe.dataset_config,
        recipe.dataset_train_split,
    )
    questions = load_questions(name, config, split)
    wanted = len(questions) if recipe.train_samples is None else recipe.train_samples
    check(min(wanted, len(questions)))
    train = with_source_rows(_as_prompts(recipe, name, questions), name, config, split)
    originals = FileRows(questions, np.array(train[SOURCE_ROW][:]))
    if wanted < len(train):
        train = _sample(train, wanted, recipe.split_seed)
    rewards = find_rewards(recipe.reward_funcs or list(NAMED))
    return Pool(train, rewards, _validation(recipe), originals)


def load_subset(recipe: RecipeArguments, name: str) -> Dataset:
    """Load a subset written by the select command, as prompts.

    Args:
        recipe (`RecipeArguments`): The arguments it was selected with.
        name (`str`): Folder or file.
    """
    if recipe.dataset_name == GENERATED:  # its rows are prompts already
        return load_questions(name)
    return _prompts(recipe, name, None, "train")


def _validation(recipe: RecipeArguments) -> Dataset | None:
    name, wanted = recipe.validation_dataset_name, recipe.validation_samples
    if name is None:
        return None
    config = recipe.dataset_config if name == recipe.dataset_name else None
    problems = _prompts(recipe, name, config, recipe.validation_dataset_split)
    if wanted is None or wanted >= len(problems):
        return problems
    return _sample(problems, wanted, recipe.split_seed)


def _prompts(recipe: RecipeArguments, name: str, config: str | None, split: str) -> Dataset:
    return _as_prompts(recipe, name, load_questions(name, config, split))


def _as_prompts(recipe: RecipeArguments, name: str, questions: Dataset) -> Dataset:
    """Prompts of one dataset; named columns apply to the training problems, and to other datasets that have them."""
    columns = [recipe.question_column, recipe.answer_column]
    if name != recipe.dataset_name:
        columns = [column if column in questions.column_names else None for column in columns]
    question, answer = columns
    # The recipes' reward judges answers; other rewards may interpret them differently.
    judged = recipe.reward_funcs is None or "accuracy_reward" in recipe.reward_funcs
    return as_prompts(
        questions,
        question_column=question,
        answer_column=answer,
        max_unjudged=recipe.max_unjudged if judged else 1.0,
    )


def _sample(problems: Dataset, count: int, seed: int) -> Dataset:
    """A random sample of `count` problems."""
    _, sample = hold_out(problems, count, seed)
    return sample


def model_path(model: ModelConfig) -> str:
    """The policy's hub id or folder; the toy model is trained first, if it does not exist yet."""
    if model.model_name_or_path != TOY_MODEL:
        return str(model.model_name_or_path)
    with PartialState().local_main_process_first():
        if PartialState().is_local_main_process:
            _make_toy_model()
    return str(TOY_MODEL_FOLDER)


def _make_toy_model() -> None:
    # Run in a separate process, because its supervised training is not part of this distributed job.
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHER_VARIABLES and not name.startswith("ACCELERATE_")
    }
    command = [sys.executable, "-m", "trl_learnalign.toy.model", str(TOY_MODEL_FOLDER)]
    if subprocess.run(command, env=environment).returncode:
        exit_with_error("the toy base model could not be created; see the messages above", hint="")
