"""Accuracies of evaluations as a table: one row for each way of extracting answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

TITLE = "Mean pass@1 with 95 % intervals"


def print_summaries(rows: Sequence[tuple[str, dict[str, Any]]], lines: Sequence[str]) -> None:
    """Print a table, and what is to be said about it.

    Args:
        rows (sequence): Name and summary of each evaluation.
        lines (sequence of `str`): Printed below.
    """
    console = Console()
    console.print(summary_table(rows))
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def summary_table(rows: Sequence[tuple[str, dict[str, Any]]]) -> Table:
    """Strict and flexible accuracy below each other, with the completions that no answer was found in.

    Args:
        rows (sequence): Name and summary of each evaluation.
    """
    table = Table(box=box.SIMPLE_HEAD, title=TITLE)
    table.add_column("benchmark", overflow="fold")
    table.add_column("problems", justify="right", no_wrap=True)
    table.add_column("answer", no_wrap=True)
    table.add_column("accuracy", justify="right", no_wrap=True)
    table.add_column("no answer", justify="right", no_wrap=True)
    for name, summary in rows:
        problems = str(summary["problems"])
        flexible = summary.get("flexible")
        if flexible is None:
            cells = [name, problems, "as graded", *_cells(summary)]
            table.add_row(*map(Text, cells))
            continue
        cells = [name, problems, "strict", *_cells(summary)]
        table.add_row(*map(Text, cells))
        cells = ["", "", "flexible", *_cells(flexible)]
        table.add_row(*map(Text, cells))
    return table


def _cells(figures: Mapping[str, Any]) -> list[str]:
    from trl_learnalign.statistics import Estimate

    accuracy = Estimate(
        value=figures["accuracy"],
        low=figures["low"],
        high=figures["high"],
    )
    found_none = figures.get("no_answer", "")
    return [str(accuracy), str(found_none)]
