"""`trl-learnalign compare`: runs side by side."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trl_learnalign.cli.messages import leave_with

if TYPE_CHECKING:
    from trl_learnalign.report.comparison import Comparison


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser("trl-learnalign compare", description="Put runs side by side.")
    parser.add_argument("folders", nargs="+", help="output folders of two or more runs")
    parser.add_argument("--html", help="also write a page with figures here, e.g. compare.html")
    given = parser.parse_args(arguments)
    with leave_with("trl-learnalign compare"):
        from trl_learnalign.report import compare, write_comparison

        comparison = compare(given.folders)
        path = write_comparison(comparison, given.html) if given.html else None
    console = Console()
    console.print(comparison_table(comparison))
    from trl_learnalign.report.text import setting, visible

    for note in comparison.notes:
        console.print(Text(note), soft_wrap=True)
    for name, values in comparison.differences:
        console.print(
            Text(f"{name}: {' | '.join(visible(setting(value)) for value in values)}"),
            soft_wrap=True,
        )
    if path:
        console.print(Text(f"Page: {path}"), soft_wrap=True)


def comparison_table(comparison: Comparison) -> Table:
    """One column per run: there are more figures than fit side by side."""
    from trl_learnalign.report.text import visible

    table = Table(box=box.SIMPLE_HEAD)
    first, *others = comparison.headings
    table.add_column(first)
    for row in comparison.rows:
        table.add_column(Text(visible(row[first])), justify="right", overflow="fold")
    for heading in others:
        table.add_row(heading, *(Text(visible(row[heading])) for row in comparison.rows))
    return table
