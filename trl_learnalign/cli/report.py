"""`trl-learnalign report`: rebuild a run's report, and show its best prompts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trl_learnalign.cli.console import exit_with
from trl_learnalign.records import layout

if TYPE_CHECKING:
    from trl_learnalign.report import Run

COLUMNS = ["rank", "success_rate", "learnability", "alignment", "score", "prompt"]
"""Columns of a stage's table that are shown."""


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        "trl-learnalign report", description="Rewrite report.html of a run."
    )
    parser.add_argument("folder", help="output folder of the run, finished or not")
    parser.add_argument(
        "--top", type=int, default=5, help="prompts to show here for each stage (default: 5)"
    )
    given = parser.parse_args(arguments)
    with exit_with("trl-learnalign report"):
        from trl_learnalign.report import read_run, write_report

        path = write_report(given.folder)
        run = read_run(given.folder)
    console = Console()
    if given.top > 0 and run.scored_stages:
        console.print(prompt_table(run, given.top))
    console.print(Text(f"Report: {path} · figures: {run.folder / layout.FIGURES}"), soft_wrap=True)


def prompt_table(run: Run, top: int) -> Table:
    """The best prompts of each stage. Markup and escapes in dataset text have no effect."""
    from trl_learnalign.markup import general, headline, number, visible

    table = Table(
        title=Text(f"{visible(run.name)}: best prompts of each stage"), box=box.SIMPLE_HEAD
    )
    table.add_column("stage")
    for name in ("rank", "success rate", "learnability", "alignment", "score"):
        table.add_column(name, justify="right")
    table.add_column("prompt")
    for stage in run.scored_stages:
        assert stage.table is not None
        rows = stage.table.select(COLUMNS).to_pylist()
        for row in sorted(rows, key=lambda row: row["rank"])[:top]:
            cells = (
                str(row["rank"]),
                number(row["success_rate"], 2),
                number(row["learnability"], 3),
                general(row["alignment"]),
                general(row["score"]),
            )
            table.add_row(stage.name, *cells, Text(visible(headline(row["prompt"], 80))))
    return table
