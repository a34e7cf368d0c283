"""Arguments of recipes and commands: the command line overrides the YAML file, which overrides defaults."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from accelerate.utils import get_int_from_env
from trl import GRPOConfig, ModelConfig, ScriptArguments

from trl_learnalign.cli.console import (
    OneLineParser,
    exit_with_error,
    one_line_errors,
    with_file_apart,
)
from trl_learnalign.config import LearnAlignConfig, setting
from trl_learnalign.config.fields import did_you_mean
from trl_learnalign.data.answers import MAX_UNJUDGED
from trl_learnalign.preflight.environment import missing_gpu

logger = logging.getLogger(__name__)

# ---- Batch sizes ----------------------------------------------------------------------------------------------------

ACCUMULATION = "gradient_accumulation_steps"
COMPLETIONS = "completions_per_step"


@dataclass(frozen=True)
class Batch:
    """Composition of one optimizer step.

    Args:
        per_device (`int`): Completions of one process's micro-step, `per_device_train_batch_size`.
        processes (`int`): Processes.
        accumulation (`int`): Micro-steps of one optimizer step, `gradient_accumulation_steps`.
    """

    per_device: int
    processes: int
    accumulation: int

    @property
    def completions(self) -> int:
        """Completions of one optimizer step, over all processes."""
        return self.per_device * self.processes * self.accumulation

    def __str__(self) -> str:
        return f"{self.per_device} per device x {self.processes} process(es) x {self.accumulation} accumulated"


def batch_of(completions: int, per_device: int, processes: int, group: int) -> Batch:
    """The batch with this number of completions per optimizer step, or the nearest possible number.

    Args:
        completions (`int`): Requested completions per optimizer step.
        per_device (`int`): Maximum completions of one process's micro-step, limited by its memory.
        processes (`int`): Processes; each gets the same share of a step.
        group (`int`): A step has a multiple of this number of completions: `num_generations`, because TRL keeps the
            rollouts of a prompt in one batch; 1 if `steps_per_generation` or `generation_batch_size` is given.

    Raises:
        `ValueError`: If a number is below 1, or `completions` is not a multiple of `group`.
    """
    counts = {COMPLETIONS: completions, "per_device_train_batch_size": per_device}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}={value}: give a whole number of at least 1.")
    if completions % group:
        lower = completions // group * group
        nearest = f"{lower} or {lower + group}" if lower else str(group)
        raise ValueError(
            f"completions_per_step={completions} is not a multiple of num_generations={group}: all rollouts of a "
            f"prompt must be in one step. Set it to {nearest}."
        )
    # With a multiple of this number on each process, there are whole groups over all processes.
    unit = group // math.gcd(group, processes)
    units = math.floor(completions / (unit * processes) + 0.5)  # nearest, half rounded up
    share = max(1, units) * unit
    micro_steps = range(1, min(per_device, share) + 1)
    largest = max(size for size in micro_steps if share % size == 0)
    return Batch(largest, processes, share // largest)


def resolve_batch(
    command_line: Mapping[str, int],
    file: Mapping[str, int],
    per_device: int,
    processes: int,
    group: int,
) -> tuple[Batch, list[str]]:
    """The batch of a run for which `completions_per_step`, `gradient_accumulation_steps` or both are given.

    The command line overrides the file; within one of them, the two settings must agree.

    Args:
        command_line (mapping): Those of the two settings that are given on the command line.
        file (mapping): Those that are given in the YAML file.
        per_device (`int`): `per_device_train_batch_size`.
        processes (`int`): Processes.
        group (`int`): As in [`batch_of`].

    Returns:
        `tuple[Batch, list[str]]`: The batch, and remarks for the user.

    Raises:
        `ValueError`: If the two contradict each other, or as in [`batch_of`].
    """
    # completions_per_step has priority where it is given; on the command line, an accumulation overrides the file.
    is_in_file = COMPLETIONS not in command_line
    source = file if is_in_file else command_line
    wanted = source.get(COMPLETIONS, 0)
    batch = batch_of(wanted, per_device, processes, group)

    overruling = command_line.get(ACCUMULATION, batch.accumulation)
    if is_in_file and overruling != batch.accumulation:
        by_hand = Batch(per_device, processes, overruling)
        return by_hand, [
            f"gradient_accumulation_steps={overruling} was given on the command line: an optimizer step has "
            f"{by_hand.completions} completions ({by_hand}), not the {wanted} of completions_per_step."
        ]
    accumulation = source.get(ACCUMULATION, batch.accumulation)
    if accumulation != batch.accumulation:
        raise ValueError(_contradiction(wanted, batch, Batch(per_device, processes, accumulation)))
    return batch, _remarks(wanted, batch, per_device)


def _contradiction(wanted: int, batch: Batch, by_hand: Batch) -> str:
    return (
        f"completions_per_step={wanted} means gradient_accumulation_steps={batch.accumulation} ({batch}), but "
        f"gradient_accumulation_steps={by_hand.accumulation} is also given, which means {by_hand.completions} "
        f"completions ({by_hand}): remove one of the two."
    )


def _remarks(wanted: int, batch: Batch, per_device: int) -> list[str]:
    """Remarks on how the batch differs from the request."""
    if batch.completions != wanted:
        return [
            f"completions_per_step={wanted} is not possible with {batch.processes} processes: an optimizer step has "
            f"{batch.completions} completions ({batch}). Use a number of processes that divides {wanted} to train "
            "with the same batch."
        ]
    share = wanted // batch.processes
    if batch.per_device < min(per_device, share):
        return [
            f"per_device_train_batch_size={per_device} does not divide the {share} completions of "
            f"a process's share of a step: taking {batch.per_device} ({batch})."
        ]
    return []


# ---- Arguments ------------------------------------------------------------------------------------------------------

# The variables from which accelerate reads the number of processes of its launchers.
PROCESS_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass
class RecipeArguments(ScriptArguments):
    """Sources of prompts and held-out problems."""

    dataset_name: str | None = setting(
        "openai/gsm8k",
        "Training problems: a hub id, a local file or folder (docs/datasets.md lists the formats), or 'generated' "
        "for generated toy tasks.",
    )
    question_column: str | None = setting(
        None, "Column of the questions. Default: detected by its name."
    )
    answer_column: str | None = setting(
        None, "Column of the reference answers. Default: detected by its name."
    )
    max_unjudged: float = setting(
        MAX_UNJUDGED,
        "Refuse a dataset if a larger share of its answers cannot be graded (proofs, programs).",
    )
    reward_funcs: list[str] | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Reward functions: accuracy_reward, think_format_reward, or your own in TRL's form as "
            "'package.module:function'. The first one grades held-out problems and, unless success_reward is "
            "set, decides whether a rollout is correct. Default: both named ones; for generated tasks their "
            "own."
        },
    )
    eval_dataset_name: str | None = setting(
        None,
        "Held-out problems, in the forms of dataset_name. Default: dataset_test_split of a hub dataset; for a "
        "file, eval_samples rows are split off and never trained on.",
    )
    eval_dataset_config: str | None = setting(
        None, "Configuration of eval_dataset_name. Default: none."
    )
    validation_dataset_name: str | None = setting(
        None,
        "Trusted problems with which selector validation_alignment compares the pool, in the forms of "
        "dataset_name; never trained on.",
    )
    validation_dataset_split: str = setting(
        "train", "Split of a hub dataset of validation problems, or a slice of it."
    )
    validation_samples: int | None = setting(
        None, "Use only this many validation problems, chosen by split_seed."
    )
    train_samples: int | None = setting(None, "Use only this many training problems.")
    eval_samples: int | None = setting(None, "Use only this many held-out problems.")
    generated_regime: Literal["mixed", "balanced", "sparse", "graded", "longtail"] = setting(
        "mixed", "Mixture of the generated tasks."
    )
    split_seed: int = setting(0, "Seed of generated tasks and of the held-out split.")
    completions_per_step: int | None = setting(
        None,
        "Completions of one optimizer step over all processes (the paper's batch). gradient_accumulation_steps "
        "follows from it and from the number of processes; per_device_train_batch_size is lowered if one "
        "micro-step of all processes would have more. gradient_accumulation_steps on the command line overrides "
        "the YAML file. Default: the product of per_device_train_batch_size, processes and "
        "gradient_accumulation_steps.",
    )
    dry_run: bool = setting(
        False,
        "Print the plan of the run (phases, steps, rollouts, disk) and exit; loads no model.",
    )
    calibrate: bool = setting(
        False,
        "With dry_run: also run a few steps of training and scoring, to predict how long the run will take.",
    )


# ---- Given settings -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GivenSettings:
    """Settings by name, before dataclasses are created, because some determine how others are parsed.

    Args:
        values (`dict`): All settings: command line over YAML file over defaults.
        command_line (`dict`): Those given on the command line.
        file (`dict`): Those given in the YAML file.
    """

    values: dict[str, Any]
    command_line: dict[str, Any]
    file: dict[str, Any]


def given_settings(
    classes: Sequence[type], arguments: Sequence[str], prog: str | None = None
) -> GivenSettings:
    """Read the command line, and the YAML file named by `--config`, without creating dataclasses.

    Args:
        classes (sequence of `type`): The dataclasses.
        arguments (sequence of `str`): The command line, without the program's name.
        prog (`str`, *optional*): The program's name in `--help`.

    Raises:
        `ValueError`: If an argument is unknown or has a value of the wrong type, or the file cannot be read.
    """
    parser = OneLineParser(classes, prog=prog)
    remaining, file = _without_file(with_file_apart(arguments))
    names = {item.name for cls in classes for item in dataclasses.fields(cls)}
    for name in file:
        if name not in names:
            raise ValueError(f"--config: {name!r} is not a setting{did_you_mean(name, names)}")
    parser.set_defaults_with_config(**file)
    values = vars(parser.parse_args(remaining))
    # Settings that are unset after parsing with this default were not given on the command line.
    unset = object()
    blank = argparse.Namespace(**dict.fromkeys(names, unset))
    second = vars(parser.parse_args(remaining, blank))
    command_line = {name: value for name, value in second.items() if value is not unset}
    return GivenSettings(values, command_line, file)


def _without_file(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The command line without `--config`, and the settings in that file."""
    remaining = list(arguments)
    if "--config" not in remaining:
        return remaining, {}
    place = remaining.index("--config")
    if place + 1 == len(remaining):
        raise ValueError("--config: name a YAML file.")
    path = Path(remaining[place + 1])
    del remaining[place : place + 2]
    if not path.is_file():
        raise ValueError(f"--config {path}: the file does not exist.")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"--config {path} is not a readable YAML file: {why}.") from error
    if not isinstance(settings, dict):
        raise ValueError(
            f"--config {path}: the file must contain settings, one `name: value` per line."
        )
    settings.pop("env", None)  # environment variables, which TRL's parser sets
    return remaining, settings


# ---- Settings as objects --------------------------------------------------------------------------------------------


def parse(
    default_config: str | Path | None = None,
    arguments: Sequence[str] | None = None,
    recipe: type[RecipeArguments] = RecipeArguments,
    trainer: type[GRPOConfig] | None = None,
    prog: str | None = None,
    config: type[LearnAlignConfig] = LearnAlignConfig,
) -> tuple[Any, Any, GRPOConfig, ModelConfig]:
    """Parse command line over YAML over defaults; invalid input ends the process with a one-line message.

    Args:
        default_config (`str` or `Path`, *optional*): The YAML file to read if `--config` is not given.
        arguments (sequence of `str`, *optional*): The command line, without the program's name.
        recipe (`type`, *optional*): Arguments in addition to those of selection, trainer and model.
        trainer (`type`, *optional*): Settings of the trainer; defaults to `GRPOConfig`, or with `dry_run` a class that
            needs no GPU.
        prog (`str`, *optional*): The program's name in `--help`.
        config (`type`, *optional*): Settings of the selection.
    """
    arguments = with_file_apart(sys.argv[1:] if arguments is None else arguments)
    if "--config" not in arguments and default_config is not None:
        arguments = ["--config", str(default_config), *arguments]
    with one_line_errors():
        given = given_settings((recipe, config, GRPOConfig, ModelConfig), arguments, prog)
        check_counts(given)
        if trainer is None:
            is_planned = given.values["dry_run"] and not given.values["calibrate"]
            trainer = planned_config() if is_planned else GRPOConfig
        arguments += batch_arguments(given, processes_of(trainer))
        arguments += weight_arguments(given)
        arguments += success_arguments(given)
        arguments += checkpointing_arguments(given)
    parser = OneLineParser((recipe, config, trainer, ModelConfig), prog=prog)
    try:
        parsed = parser.parse_args_and_config(arguments)
        check_numbers(parsed[2])
        return parsed
    except Exception as error:
        # transformers rejects bf16 before our own check for a GPU can run.
        if "bf16" in str(error) and (problem := missing_gpu(use_cpu=False)):
            exit_with_error(problem)
        if isinstance(error, ValueError):
            exit_with_error(str(error), hint="")
        # What TRL and transformers compute from settings can raise many errors, all due to their values.
        why = f"{type(error).__name__}: {error}"
        exit_with_error(
            f"TRL refuses these settings ({why}): one of the trainer's settings has an invalid value",
            hint="",
        )


_MAY_BE_INFINITE = ("max_grad_norm", "vllm_importance_sampling_cap")
"""Settings for which infinity means no limit."""


def check_numbers(args: GRPOConfig) -> None:
    """Check that the trainer's numeric settings are valid numbers.

    Raises:
        `ValueError`: Naming the first that is not.
    """
    for item in dataclasses.fields(args):
        value = getattr(args, item.name)
        if not isinstance(value, float) or math.isfinite(value):
            continue
        if math.isnan(value) or item.name not in _MAY_BE_INFINITE:
            raise ValueError(f"{item.name}={value}: give a finite number.")


def check_counts(given: GivenSettings) -> None:
    """Check the counts that TRL uses as divisors.

    Raises:
        `ValueError`: Naming the first that is below 1.
    """
    for name in ("num_generations", "per_device_train_batch_size", ACCUMULATION, "num_iterations"):
        value = given.values.get(name)
        if isinstance(value, int) and value < 1:
            raise ValueError(f"{name}={value}: give a whole number of at least 1.")


def planned_config(processes: int | None = None) -> type[GRPOConfig]:
    """A `GRPOConfig` class for runs that are only planned: without GPUs, and for any number of processes.

    Args:
        processes (`int`, *optional*): Processes of the planned run; defaults to the number of launched processes.
    """

    @dataclass
    class PlannedConfig(GRPOConfig):
        __doc__ = GRPOConfig.__doc__

        def __post_init__(self) -> None:
            # These settings would require a GPU, and a plan does not depend on them.
            self.use_cpu, self.bf16, self.fp16, self.tf32 = True, False, False, None
            super().__post_init__()

        @property
        def world_size(self) -> int:
            return super().world_size if processes is None else processes

    PlannedConfig.planned_processes = processes  # type: ignore[attr-defined]
    return PlannedConfig


def processes_of(trainer: type[GRPOConfig]) -> int:
    """Number of processes for settings of this class: the planned number, or that of launched processes."""
    planned: int | None = getattr(trainer, "planned_processes", None)
    return get_int_from_env(PROCESS_VARIABLES, 1) if planned is None else planned


def batch_arguments(given: GivenSettings, processes: int) -> list[str]:
    """The trainer's batch settings if `completions_per_step` is given; logs remarks for the user."""
    values = given.values
    if values[COMPLETIONS] is None:
        return []
    # The rollouts of a prompt are in one step, unless the number of rows generated at once is given.
    is_grouped = values["generation_batch_size"] is None and values["steps_per_generation"] is None
    batch, remarks = resolve_batch(
        _batch_settings(given.command_line),
        _batch_settings(given.file),
        values["per_device_train_batch_size"],
        processes,
        values["num_generations"] if is_grouped else 1,
    )
    if os.environ.get("RANK", "0") == "0":
        for remark in remarks:
            logger.warning("%s", remark)
    return [
        f"--{ACCUMULATION}={batch.accumulation}",
        f"--per_device_train_batch_size={batch.per_device}",
    ]


def weight_arguments(given: GivenSettings) -> list[str]:
    """The trainer's reward weights if the given rewards do not match the weights in the file; logs the change."""
    values, own = given.values, given.command_line
    rewards: list[str] = values.get("reward_funcs") or []
    weights: list[float] = values.get("reward_weights") or []
    is_for_others = "reward_funcs" in own and "reward_weights" not in own
    if not is_for_others or not weights or len(weights) == len(rewards):
        return []
    if os.environ.get("RANK", "0") == "0":
        logger.warning(
            "reward_weights=%s of the file do not apply to %s: each weight is 1, unless --reward_weights sets "
            "others.",
            weights,
            ", ".join(rewards),
        )
    return ["--reward_weights", *(["1"] * len(rewards))]


def success_arguments(given: GivenSettings) -> list[str]:
    """`success_reward` if rewards are given: the first of them, unless it already names one of them."""
    rewards = given.values.get("reward_funcs")
    if not rewards or given.command_line.get("success_reward") is not None:
        return []
    names = [reward.rpartition(":")[2] for reward in rewards]
    if given.values.get("success_reward") in names:
        return []
    return ["--success_reward", names[0]]


def checkpointing_arguments(given: GivenSettings) -> list[str]:
    """`gradient_checkpointing` under its name in transformers 5, because TRL's default causes a warning."""
    arguments = []
    for ending in ("", "_kwargs"):
        old, new = (f"{word}_checkpointing{ending}" for word in ("gradient", "activation"))
        value = given.values.get(old)
        if new in given.values and given.values[new] is None and value is not None:
            arguments += [f"--{new}={json.dumps(value)}"]
    return arguments


def _batch_settings(place: Mapping[str, Any]) -> dict[str, int]:
    return {
        name: place[name] for name in (COMPLETIONS, ACCUMULATION) if place.get(name) is not None
    }
