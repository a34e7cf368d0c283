"""`trl-learnalign select`: select a subset of a dataset for any trainer."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import set_seed

from trl_learnalign.cli.arguments import RecipeArguments, parse
from trl_learnalign.cli.console import exit_with_error, one_line_errors, set_up_logging
from trl_learnalign.cli.problems import load_pool
from trl_learnalign.cli.recipe import (
    check_surroundings,
    close,
    exit_cleanly,
    make_trainer,
    print_places,
    write_report,
)
from trl_learnalign.config import setting
from trl_learnalign.preflight import checks
from trl_learnalign.preflight.environment import missing_gpu
from trl_learnalign.records.export import PREFIX
from trl_learnalign.records.layout import CORRELATIONS, SUBSETS
from trl_learnalign.records.notes import spread_line
from trl_learnalign.records.store import write_atomically, write_table
from trl_learnalign.success import SuccessRule
from trl_learnalign.training.subset import SubsetConfig, SubsetSelection, check_sizes

logger = logging.getLogger(__name__)

# ---- Subset as one file ---------------------------------------------------------------------------------------------

ENDINGS = (".jsonl", ".parquet", ".csv")


def check_file(name: str) -> None:
    """Check that a file of this name can be written.

    Raises:
        `ValueError`: If it has an unsupported extension, or is a folder.
        `FileNotFoundError`: If its folder does not exist.
    """
    path = Path(name)
    if path.suffix not in ENDINGS or path.is_dir():
        raise ValueError(f"output_file={name!r}: the name must end in {', '.join(ENDINGS)}.")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"output_file={name!r}: the folder {path.parent} does not exist; create it."
        )


def write_file(path: Path, subset: Dataset, source: str) -> None:
    """Write a subset, with its rows in the order of the source file.

    Args:
        path (`Path`): The target; its extension determines the format.
        subset (`datasets.Dataset`): As returned by `SubsetSelection.subset`.
        source (`str`): The file, folder or hub dataset that it was selected from.
    """
    in_order = subset.sort(f"{PREFIX}index")
    if path.suffix == ".parquet":
        write_table(path, in_order.with_format("arrow")[:])
    elif path.suffix == ".csv":
        write_atomically(path, in_order.to_pandas().to_csv(index=False).encode())
    else:
        written = _as_written(Path(source), in_order[f"{PREFIX}index"][:])
        lines = []
        for row in in_order:
            said = {name: value for name, value in row.items() if name.startswith(PREFIX)}
            own = {**written[row[f"{PREFIX}index"]], **said} if written else row
            lines.append(json.dumps(own, ensure_ascii=False, default=str) + "\n")
        write_atomically(path, "".join(lines).encode(errors="surrogatepass"))


def _as_written(source: Path, numbers: list[int]) -> Mapping[int, dict[str, Any]]:
    """Rows of a JSONL file exactly as written; tables would add keys of other objects, and parse dates.

    Empty for other files, and if lines are not rows.
    """
    if source.suffix != ".jsonl" or not source.is_file():
        return {}
    wanted = set(numbers)
    rows = {}
    with open(source, encoding="utf-8") as file:
        for number, line in enumerate(line for line in file if line.strip()):
            if number in wanted:
                row = json.loads(line)
                if not isinstance(row, dict):
                    return {}
                rows[number] = {
                    name: value for name, value in row.items() if not name.startswith(PREFIX)
                }
    return rows if rows.keys() == wanted else {}


# ---- Select ---------------------------------------------------------------------------------------------------------

USAGE = """usage: trl-learnalign select FILE -n N [-o OUT] [--model_name_or_path MODEL] [any setting]
       trl-learnalign select --config FILE [--selector NAME ...] [--top N ...] [any setting]

Trains the warm-up, scores the pool and selects, without holding out any rows. OUT (.jsonl, .parquet or .csv) has
the selected rows of FILE, unchanged and in their order, with columns selection_rank, selection_score and others.
Each subset is also written below <output_dir>/subsets as a folder for datasets.load_from_disk, as Parquet and as
JSONL, best first. A second run with another -n or --selector in the same output_dir reuses the measurements.

  FILE                        JSONL, JSON, Parquet, CSV, a folder or a hub dataset (--dataset_name)
  -n N ..., --top N ...       sizes of the nested subsets
  -o OUT, --output_file OUT   the subset as one file, for one selector and one size
  --model_name_or_path MODEL  the policy that will train on the selection (default without --config: {model})
  --selector NAME ...         one or several of {names}, or your own as package.module:function
  --push_to_hub_id ID         also push the subsets to a dataset repository of the hub
"""

MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
"""The default policy: small enough for a machine without a GPU."""

SHORT = {"-n": "--top", "-o": "--output_file"}


@dataclass
class SelectArguments(RecipeArguments):
    """Source of the prompts, and target of the selected ones."""

    output_file: str | None = setting(
        None,
        "Write the selected rows to this file, in the order of the input (.jsonl, .parquet, .csv).",
    )


def main(arguments: Sequence[str], default_config: str | Path | None = None) -> None:
    """Run the command.

    Args:
        arguments (sequence of `str`): The command line, without the program's name.
        default_config (`str` or `Path`, *optional*): The YAML file to read if `--config` is not given.
    """
    from trl_learnalign.selectors import SELECTORS

    if {"-h", "--help"} & set(arguments) or not (arguments or default_config):
        print(USAGE.format(names=", ".join(SELECTORS), model=MODEL))
        return
    started = time.perf_counter()
    spelt = in_full(arguments, has_file=default_config is not None)
    recipe, config, args, model = parse(
        default_config, spelt, recipe=SelectArguments, config=SubsetConfig
    )
    if recipe.dry_run:
        exit_with_error(
            "--dry_run plans training runs, but select only trains the warm-up", hint=""
        )
    with one_line_errors():
        check_output(recipe, config)
    check_surroundings(recipe, args, model)
    set_up_logging()
    with one_line_errors():
        pool = load_pool(recipe, lambda size: check_sizes(config, size))
        checks.check_dataset(pool.train, config.category_columns)
        checks.check_selectors(config, pool.train, pool.validation)
        SuccessRule.of(config, checks.reward_names(pool.rewards))
    set_seed(args.seed)  # so that new adapters are the same in every run
    trainer = make_trainer(args, model, pool.train, pool.rewards)
    with one_line_errors():
        selection = SubsetSelection(trainer, config, pool.validation, pool.originals)
    with exit_cleanly(trainer):
        selection.run()
    selection.write(Path(args.output_dir) / SUBSETS)
    if trainer.accelerator.is_main_process:
        if recipe.output_file is not None:
            (ranking,) = selection.rankings
            (choice,) = selection.choices(ranking).values()
            subset = selection.subset(ranking, choice)
            write_file(Path(recipe.output_file), subset, str(recipe.dataset_name))
        show(selection, time.perf_counter() - started, recipe.output_file)
    close(trainer)


def in_full(arguments: Sequence[str], has_file: bool = False) -> list[str]:
    """Expand the command line: short options in full, default settings, and the CPU if there is no GPU.

    Args:
        arguments (sequence of `str`): As given.
        has_file (`bool`, *optional*, defaults to `False`): Whether a YAML file is read without `--config`.
    """
    spelt = [SHORT.get(argument, argument) for argument in arguments]
    if spelt and not spelt[0].startswith("-"):
        spelt = ["--dataset_name", *spelt]
    given = {argument.partition("=")[0].replace("-", "_") for argument in spelt}
    if not (has_file or "__config" in given):
        spelt = [*_open_settings(spelt, given), *spelt]
    if not given & {"__use_cpu", "__bf16", "__fp16"} and missing_gpu(use_cpu=False):
        logger.warning("No GPU is visible: the CPU is used, which is slow for models of any size.")
        spelt += ["--use_cpu", "true", "--bf16", "false"]
    return spelt


def _open_settings(spelt: Sequence[str], given: Container[str]) -> list[str]:
    """Default settings for a command line without a file; they precede the given ones."""
    settings = [] if "__reward_funcs" in given else ["--success_reward", "accuracy_reward"]
    if "__model_name_or_path" not in given:
        logger.warning(
            "No policy is named: the prompts are selected for %s. Name your policy with --model_name_or_path.",
            MODEL,
        )
        settings += ["--model_name_or_path", MODEL]
    if "--output_file" in spelt[:-1] and "__output_dir" not in given:
        out = Path(spelt[spelt.index("--output_file") + 1])
        settings += ["--output_dir", str(out.with_name(f"{out.stem}_selection"))]
    return settings


def check_output(recipe: SelectArguments, config: SubsetConfig) -> None:
    """Check the requested output file, before anything is measured.

    Raises:
        `ValueError`: If it cannot be written, or there would be several subsets for it.
    """
    if recipe.output_file is None:
        return
    check_file(recipe.output_file)
    if len(config.selectors) > 1 or len(config.sizes) > 1:
        raise ValueError(
            f"output_file={recipe.output_file!r} takes one subset, but top={config.sizes} with the selector(s) "
            f"{', '.join(config.selectors)} make several: give one of each, or remove output_file; all subsets are "
            "written below <output_dir>/subsets."
        )


def show(selection: SubsetSelection, seconds: float, output_file: str | None = None) -> None:
    """Print one row per subset, and its location."""
    title = f"Selected of {selection.plan.dataset_size} prompts in {seconds:.0f} s"
    table = Table(title=title + _learnable_in_pool(selection))
    for heading in ("selector", "N", "p selected", "p left out", "learnable"):
        table.add_column(
            heading, justify="left" if heading == "selector" else "right", overflow="fold"
        )
    for ranking in selection.rankings:
        for choice in selection.choices(ranking).values():
            summary = ranking.summary(choice)
            figures = (
                summary.success_rate_selected,
                summary.success_rate_left_out,
                summary.learnable_share_selected,
            )
            cells = ["" if value is None else f"{value:.3f}" for value in figures]
            table.add_row(Text(ranking.selector.name), str(len(choice)), *cells)
    console = Console()
    console.print(table)
    for note in selection.record.contents.subsets.values():
        for shares in note.shares:
            line = f"{note.selector}, the largest: {spread_line(shares)}"
            console.print(Text(line), soft_wrap=True)
    output_dir = Path(selection.trainer.args.output_dir)
    folder = output_dir / SUBSETS
    print_places(
        {
            "Rows": output_file,
            "Subsets": folder / "<selector>" / "top_<N>",
            "records": selection.folder,
            "rank correlations": folder / f"{CORRELATIONS}.csv"
            if len(selection.rankings) > 1
            else None,
            "report": write_report(output_dir),
        }
    )


def _learnable_in_pool(selection: SubsetSelection) -> str:
    """The pool's value to compare the column with; empty without rollouts."""
    for ranking in selection.rankings:
        pool = ranking.summary(selection.choices(ranking)[selection.config.sizes[-1]])
        if pool.learnable_share is not None:
            return f"; learnable in the pool: {pool.learnable_share:.3f}"
    return ""
