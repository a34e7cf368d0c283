"""`trl-learnalign select`: a subset of a dataset for any trainer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import set_seed

from trl_learnalign.cli.arguments import parse
from trl_learnalign.cli.job import (
    check_surroundings,
    close,
    make_trainer,
    one_sentence_end,
    print_places,
    write_report,
)
from trl_learnalign.cli.messages import leave, one_line_errors, set_up_logging
from trl_learnalign.cli.problems import load_problems
from trl_learnalign.config import SubsetConfig
from trl_learnalign.planning import checks
from trl_learnalign.records.layout import CORRELATIONS, SUBSETS
from trl_learnalign.records.shares import spread_line
from trl_learnalign.success import SuccessRule
from trl_learnalign.training.select_only import SubsetSelection, check_sizes

USAGE = """usage: trl-learnalign select --config FILE [--selector NAME ...] [--top N ...] [any setting]

Warms up, scores the pool and selects, and trains no further. Writes each subset below <output_dir>/subsets as a
folder for datasets.load_from_disk, as Parquet and as JSONL, best prompt first. Run again with another --top or
--selector in the same output_dir: what is measured already is not measured again.

  --selector NAME ...   one or several of {names}, or your own as package.module:function
  --top N ...           sizes of the nested subsets
  --push_to_hub_id ID   also push them to a dataset repository of the hub
"""


def main(arguments: Sequence[str], default_config: str | Path | None = None) -> None:
    """Run the command.

    Args:
        arguments (sequence of `str`): The command line, without the program's name.
        default_config (`str` or `Path`, *optional*): The YAML that is read without `--config`.
    """
    from trl_learnalign.selectors import SELECTORS

    if {"-h", "--help"} & set(arguments) or not (arguments or default_config):
        print(USAGE.format(names=", ".join(SELECTORS)))
        return
    started = time.perf_counter()
    recipe, config, args, model = parse(default_config, arguments, config=SubsetConfig)
    if recipe.dry_run:
        leave("--dry_run plans training runs; select trains no further than the warm-up", hint="")
    check_surroundings(recipe, args, model)
    set_up_logging()
    with one_line_errors():
        problems = load_problems(recipe)
        checks.check_dataset(problems.train, config.group_columns)
        checks.check_selectors(config, problems.train, problems.validation)
        SuccessRule.of(config, checks.reward_names(problems.rewards))
        check_sizes(config, len(problems.train))
    set_seed(args.seed)  # new adapters are the same in every run
    trainer = make_trainer(args, model, problems.train, problems.rewards)
    with one_line_errors():
        selection = SubsetSelection(trainer, config, problems.validation)
    with one_sentence_end(trainer):
        selection.run()
    selection.write(Path(args.output_dir) / SUBSETS)
    if trainer.accelerator.is_main_process:
        show(selection, time.perf_counter() - started)
    close(trainer)


def show(selection: SubsetSelection, seconds: float) -> None:
    """Print one row for each subset."""
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
            "Subsets": folder / "<selector>" / "top_<N>",
            "records": selection.folder,
            "rank correlations": folder / f"{CORRELATIONS}.csv"
            if len(selection.rankings) > 1
            else None,
            "report": write_report(output_dir),
        }
    )


def _learnable_in_pool(selection: SubsetSelection) -> str:
    """What the column is to be compared with; nothing where no rollouts were made."""
    for ranking in selection.rankings:
        pool = ranking.summary(selection.choices(ranking)[selection.config.sizes[-1]])
        if pool.learnable_share is not None:
            return f"; learnable in the pool: {pool.learnable_share:.3f}"
    return ""
