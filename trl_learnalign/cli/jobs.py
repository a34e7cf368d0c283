"""What recipes and commands share: arguments, data, model, the checks before, and the table after."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from accelerate import PartialState
from accelerate.utils import get_int_from_env
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text
from trl import GRPOConfig, GRPOTrainer, ModelConfig, ScriptArguments, get_peft_config
from trl.rewards import think_format_reward

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.cli.batching import ACCUMULATION, COMPLETIONS, settle_batch
from trl_learnalign.cli.command_line import GivenSettings, OneLineParser, given_settings
from trl_learnalign.data.answers import accuracy_reward
from trl_learnalign.data.questions import MAX_UNJUDGED, as_prompts, hold_out, is_path, load_questions, with_source_rows
from trl_learnalign.planning.preflight import missing_from_hub, missing_gpu
from trl_learnalign.records import layout
from trl_learnalign.records.notes import BASE
from trl_learnalign.records.summary import PhaseSummary, accuracies, phase_summaries
from trl_learnalign.report.model_card import add_to_model_card
from trl_learnalign.training.checkpoints import last_complete_checkpoint

GENERATED = "generated"
TINY_MODEL = "microcosm"
TINY_MODEL_FOLDER = Path("outputs") / "microcosm"

logger = logging.getLogger(__name__)

Reward = Callable[..., Sequence[float | None]]


@dataclass
class RecipeArguments(ScriptArguments):
    """Where prompts and held-out problems come from."""

    dataset_name: str | None = field(
        default="openai/gsm8k",
        metadata={
            "help": "Training problems: a hub id, a local file or folder (docs/datasets.md says which), or "
            "'generated' for tasks made on the spot."
        },
    )
    question_column: str | None = field(
        default=None, metadata={"help": "Column of the questions. Default: found by its name."}
    )
    answer_column: str | None = field(
        default=None, metadata={"help": "Column of the reference answers. Default: found by its name."}
    )
    max_unjudged: float = field(
        default=MAX_UNJUDGED,
        metadata={"help": "Refuse a dataset if a larger share of its answers cannot be judged (proofs, programs)."},
    )
    eval_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Held-out problems, likewise. Default: dataset_test_split of a hub dataset; for a file, "
            "eval_samples rows are split off and never trained on."
        },
    )
    eval_dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of eval_dataset_name. Default: none."}
    )
    validation_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Trusted problems that selector validation_alignment compares the pool with, like dataset_name; "
            "never trained on."
        },
    )
    validation_dataset_split: str = field(
        default="train", metadata={"help": "Split of a hub dataset of validation problems, or a slice of it."}
    )
    validation_samples: int | None = field(
        default=None, metadata={"help": "Use only this many validation problems, chosen by split_seed."}
    )
    train_samples: int | None = field(default=None, metadata={"help": "Use only this many training problems."})
    eval_samples: int | None = field(default=None, metadata={"help": "Use only this many held-out problems."})
    generated_regime: str = field(
        default="mixed",
        metadata={"help": "Mixture of the generated tasks: mixed, balanced, sparse, graded, longtail."},
    )
    split_seed: int = field(default=0, metadata={"help": "Seed of generated tasks and of the held-out split."})
    completions_per_step: int | None = field(
        default=None,
        metadata={
            "help": "Completions of one optimizer step over all processes (the paper's batch). "
            "gradient_accumulation_steps follows from it and from the number of processes; where one micro-step of "
            "all processes would be more, per_device_train_batch_size is lowered. gradient_accumulation_steps on the "
            "command line wins over a value in the YAML file. Default: what per_device_train_batch_size, processes "
            "and gradient_accumulation_steps make."
        },
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Print what the run will take (phases, steps, rollouts, disk) and end; loads no model."},
    )
    calibrate: bool = field(
        default=False,
        metadata={"help": "With dry_run: also run a few steps of training and scoring, to say how long it will take."},
    )


@dataclass(frozen=True)
class Problems:
    """Training pool, held-out problems and how they are graded; the first reward decides success."""

    train: Dataset
    held_out: Dataset
    rewards: list[Reward]
    validation: Dataset | None = None


def parse(
    default_config: str | Path | None = None,
    arguments: Sequence[str] | None = None,
    recipe: type[RecipeArguments] = RecipeArguments,
    trainer: type[GRPOConfig] | None = None,
    prog: str | None = None,
    config: type[LearnAlignConfig] = LearnAlignConfig,
) -> tuple[Any, Any, GRPOConfig, ModelConfig]:
    """Command line over YAML over defaults.

    Args:
        default_config (`str` or `Path`, *optional*): The YAML that is read without `--config`.
        arguments (sequence of `str`, *optional*): The command line, without the program's name.
        recipe (`type`, *optional*): Arguments besides those of selection, trainer and model.
        trainer (`type`, *optional*): Settings of the trainer; by default `GRPOConfig`, or with `dry_run` one that
            needs no GPU.
        prog (`str`, *optional*): The program's name in `--help`.
        config (`type`, *optional*): Settings of the selection.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "--config" not in arguments and default_config is not None:
        arguments = ["--config", str(default_config), *arguments]
    with one_line_errors():
        given = given_settings((recipe, config, GRPOConfig, ModelConfig), arguments, prog)
        if trainer is None:
            trainer = GRPOConfig
            if given.values["dry_run"] and not given.values["calibrate"]:
                trainer = planned_config()
        arguments += batch_arguments(given, processes_of(trainer))
    parser = OneLineParser((recipe, config, trainer, ModelConfig), prog=prog)
    try:
        return parser.parse_args_and_config(arguments)
    except ValueError as error:
        # transformers refuses bf16 before anyone could say what is missing.
        if "bf16" in str(error) and (problem := missing_gpu(use_cpu=False)):
            leave(problem)
        leave(str(error), hint="")


def batch_arguments(given: GivenSettings, processes: int) -> list[str]:
    """The trainer's batch settings, where `completions_per_step` is given; says what a user should know of them."""
    values = given.values
    if values[COMPLETIONS] is None:
        return []
    whole_groups = values["generation_batch_size"] is None and values["steps_per_generation"] is None
    group = values["num_generations"] if whole_groups else 1
    names = (COMPLETIONS, ACCUMULATION)
    command_line, file = (
        {name: place[name] for name in names if place.get(name) is not None}
        for place in (given.command_line, given.file)
    )
    batch, remarks = settle_batch(command_line, file, values["per_device_train_batch_size"], processes, group)
    for remark in remarks:
        if os.environ.get("RANK", "0") == "0":
            logger.warning("%s", remark)
    return [f"--{ACCUMULATION}={batch.accumulation}", f"--per_device_train_batch_size={batch.per_device}"]


def processes_of(trainer: type[GRPOConfig]) -> int:
    """Processes that a trainer with settings of this class has: those that were launched, or are planned for."""
    planned: int | None = getattr(trainer, "planned_processes", None)
    return get_int_from_env(_PROCESS_VARIABLES, 1) if planned is None else planned


# As accelerate reads the number of processes off its launchers.
_PROCESS_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def planned_config(processes: int | None = None) -> type[GRPOConfig]:
    """`GRPOConfig` for runs that are only planned: on a machine without GPUs, for any number of processes.

    Args:
        processes (`int`, *optional*): Processes of the planned run; default: as many as were launched.
    """

    @dataclass
    class PlannedConfig(GRPOConfig):
        __doc__ = GRPOConfig.__doc__

        def __post_init__(self) -> None:
            # Both would ask for a GPU at once; neither is part of a plan.
            self.use_cpu, self.bf16, self.fp16, self.tf32 = True, False, False, None
            super().__post_init__()

        @property
        def world_size(self) -> int:
            return super().world_size if processes is None else processes

    PlannedConfig.planned_processes = processes  # type: ignore[attr-defined]
    return PlannedConfig


def leave(problem: str, hint: str | None = None) -> NoReturn:
    """End with one clear line."""
    if hint is None:
        hint = (
            " Try `make quickstart` (no GPU, no downloads), or local files on a CPU: --model_name_or_path FOLDER "
            "--dataset_name train.jsonl --use_cpu true --bf16 false."
        )
    sys.exit(f"{Path(sys.argv[0]).name}: {problem}.{hint}" if hint else f"{Path(sys.argv[0]).name}: {problem}")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Bad input ends the run with its message alone: a traceback would only hide it."""
    try:
        yield
    except (ValueError, TypeError, FileNotFoundError) as error:
        leave(str(error), hint="")


def check_surroundings(recipe: RecipeArguments, args: GRPOConfig, model: ModelConfig) -> None:
    """Leave before minutes are lost if the hub or the GPU that this run needs is not there."""
    problem = missing_gpu(args.use_cpu)
    if not problem and model.model_name_or_path != TINY_MODEL:
        problem = missing_from_hub(str(model.model_name_or_path), "model")
    if problem := problem or missing_dataset(recipe):
        leave(problem)


def missing_dataset(recipe: RecipeArguments) -> str | None:
    """Why the training problems cannot be had, or `None`; a path is looked at when it is loaded."""
    name = str(recipe.dataset_name)
    return None if name == GENERATED or is_path(name) else missing_from_hub(name, "dataset")


def set_up_logging() -> None:
    """One line per phase on the main process; warnings everywhere."""
    level = logging.INFO if PartialState().is_main_process else logging.ERROR
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stdout)
    logging.getLogger("trl_learnalign").setLevel(level)


def load_problems(recipe: RecipeArguments) -> Problems:
    """The problems that the arguments name."""
    if recipe.dataset_name == GENERATED:
        from trl_learnalign import microcosm

        train = microcosm.build_pool(recipe.generated_regime, recipe.train_samples or 400, recipe.split_seed)
        held_out = microcosm.build_pool(
            recipe.generated_regime, recipe.eval_samples or 200, recipe.split_seed, split="heldout"
        )
        validation = None
        if recipe.validation_dataset_name is not None:
            validation = microcosm.build_pool(
                recipe.generated_regime, recipe.validation_samples or 50, recipe.split_seed, split="dev"
            )
        return Problems(train, held_out, [microcosm.accuracy_reward], validation)
    name = str(recipe.dataset_name)
    source = name, recipe.dataset_config, recipe.dataset_train_split
    train = with_source_rows(_prompts(recipe, *source), *source)
    if recipe.eval_dataset_name is not None:
        held_out = _prompts(recipe, recipe.eval_dataset_name, recipe.eval_dataset_config, recipe.dataset_test_split)
    elif is_path(name):
        train, held_out = hold_out(train, recipe.eval_samples or max(1, len(train) // 10), recipe.split_seed)
    else:
        held_out = _prompts(recipe, name, recipe.dataset_config, recipe.dataset_test_split)
    if recipe.train_samples is not None:
        train = hold_out(train, min(recipe.train_samples, len(train)), recipe.split_seed)[1]
    if recipe.eval_samples is not None:
        held_out = held_out.select(range(min(recipe.eval_samples, len(held_out))))
    return Problems(train, held_out, [accuracy_reward, think_format_reward], _validation(recipe))


def _prompts(recipe: RecipeArguments, name: str, config: str | None, split: str) -> Dataset:
    """Prompts of one dataset; the named columns are those of the training problems, and of others that have them."""
    questions = load_questions(name, config, split)
    named = [recipe.question_column, recipe.answer_column]
    if name != recipe.dataset_name:
        named = [column if column in questions.column_names else None for column in named]
    return as_prompts(questions, question_column=named[0], answer_column=named[1], max_unjudged=recipe.max_unjudged)


def _validation(recipe: RecipeArguments) -> Dataset | None:
    if recipe.validation_dataset_name is None:
        return None
    name, split = recipe.validation_dataset_name, recipe.validation_dataset_split
    found = _prompts(recipe, name, recipe.dataset_config if name == recipe.dataset_name else None, split)
    if recipe.validation_samples is None or recipe.validation_samples >= len(found):
        return found
    return hold_out(found, recipe.validation_samples, recipe.split_seed)[1]


def model_path(model: ModelConfig) -> str:
    """The policy's hub id or folder; the tiny model is trained first, once."""
    if model.model_name_or_path != TINY_MODEL:
        return str(model.model_name_or_path)
    with PartialState().local_main_process_first():
        if PartialState().is_local_main_process:
            # In a process of its own: its supervised training is not part of this distributed job.
            alone = {
                k: v for k, v in os.environ.items() if k not in _LAUNCHER_VARIABLES and not k.startswith("ACCELERATE_")
            }
            command = [sys.executable, "-m", "trl_learnalign.microcosm", str(TINY_MODEL_FOLDER)]
            if subprocess.run(command, env=alone).returncode:
                leave("the tiny base model could not be made; see the messages above", hint="")
    return str(TINY_MODEL_FOLDER)


_LAUNCHER_VARIABLES = {
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GROUP_RANK",
}


def make_trainer(args: GRPOConfig, model: ModelConfig, train: Dataset, rewards: list[Reward]) -> GRPOTrainer:
    """An unmodified `GRPOTrainer` whose policy is loaded as in TRL's own scripts.

    Args:
        args (`GRPOConfig`): Settings of the trainer.
        model (`ModelConfig`): The policy, and its adapter if any.
        train (`datasets.Dataset`): The pool of prompts.
        rewards (list of callables): The first one decides success.
    """
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }
    return GRPOTrainer(
        model=model_path(model),
        reward_funcs=rewards,
        args=args,
        train_dataset=train,
        peft_config=get_peft_config(model),
    )


def checkpoint(args: GRPOConfig) -> str | None:
    """What `--resume_from_checkpoint` asks for: a folder, or with `true` the last whole checkpoint if any."""
    wanted = args.resume_from_checkpoint
    if str(wanted).lower() != "true":
        return wanted
    found = last_complete_checkpoint(str(args.output_dir))
    return None if found is None else str(found)


def finish(trainer: GRPOTrainer, callback: LearnAlignCallback, seconds: float) -> None:
    """Write `summary.json` into the output folder, print the table, and [`close`]."""
    if trainer.accelerator.is_main_process:
        _conclude(trainer, callback, seconds)
    close(trainer)


def close(trainer: GRPOTrainer) -> None:
    """Leave the process group: a process that ends with it open may abort, its work done (seen with gloo)."""
    trainer.accelerator.end_training()


def _conclude(trainer: GRPOTrainer, callback: LearnAlignCallback, seconds: float) -> None:
    summary = summarise(callback, seconds)
    path = Path(trainer.args.output_dir) / layout.SUMMARY
    path.write_text(json.dumps(summary, indent=2) + "\n")
    print_table(summary)
    add_to_model_card(trainer, callback)
    said = f"Records: {callback.folder} · summary: {path}"
    if (report := write_report(trainer.args.output_dir)) is not None:
        said += f" · report: {report}"
    Console().print(Text(said), soft_wrap=True)


def write_report(output_dir: str | Path) -> Path | None:
    """Write `report.html` if what it needs is installed. Whatever goes wrong, the job's result is there."""
    again = f"trl-learnalign report {output_dir}"
    try:
        from trl_learnalign.report import write_report as write

        return write(output_dir)
    except ImportError as error:
        logger.info("No report.html: %s Then: %s", error, again)
    except Exception:
        logger.warning("The report could not be written; the records are complete. Try: %s", again, exc_info=True)
    return None


def summarise(callback: LearnAlignCallback, seconds: float) -> dict[str, Any]:
    """Accuracy after each phase and what the phases did, from the run's record."""
    contents = callback.record.contents
    measured = accuracies(contents)
    return {
        "accuracy": {accuracy.phase: accuracy.value for accuracy in measured},
        "n_eval": next((accuracy.count for accuracy in measured if accuracy.count), 0),
        "seconds": seconds,
        "dataset_size": contents.plan.dataset_size,
        "phases": [_phase_entry(phase) for phase in phase_summaries(contents) if phase.name != BASE],
        "records": str(callback.folder),
    }


def _phase_entry(phase: PhaseSummary) -> dict[str, Any]:
    return {
        "name": phase.name,
        "selected": phase.selected,
        "pool_size": phase.selected,  # the older name, for those who read it
        "candidates": phase.candidates,
        "success_rate_selected": phase.success_rate_selected,
        "success_rate_left_out": phase.success_rate_left_out,
        "steps": phase.steps,
        "reward": phase.reward,
        "accuracy": None if phase.accuracy is None else phase.accuracy.value,
    }


def print_table(summary: dict[str, Any]) -> None:
    """One row per phase."""
    table = Table(title=f"Held-out accuracy (greedy, {summary['n_eval']} problems) and what each phase trained on")
    for heading in ("phase", "pool", "p selected", "p left out", "steps", "reward", "accuracy"):
        table.add_column(heading, justify="left" if heading == "phase" else "right")
    base = summary["accuracy"].get(BASE)
    table.add_row("base", "", "", "", "", "", _number(base))
    for phase in summary["phases"]:
        table.add_row(
            phase["name"],
            str(phase["selected"]),
            _number(phase["success_rate_selected"]),
            _number(phase["success_rate_left_out"]),
            str(phase["steps"] or ""),
            _number(phase["reward"]),
            _number(phase["accuracy"]),
        )
    Console().print(table)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
