"""`trl-learnalign compare`: compare runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trl_learnalign.cli.console import exit_with
from trl_learnalign.cli.evaluate import compare_evaluations
from trl_learnalign.records import layout

if TYPE_CHECKING:
    from trl_learnalign.report.comparison import Comparison

DESCRIPTION = "Compare runs, or two evaluations of the same problems, and print the conclusion."


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser("trl-learnalign compare", description=DESCRIPTION)
    parser.add_argument(
        "folders", nargs="+", help="output folders of two or more runs, or of two evaluations"
    )
    parser.add_argument("--html", help="also write a page with figures here, e.g. compare.html")
    parser.add_argument(
        "--generation_price",
        type=float,
        help="cost of a generated token in tokens of a forward pass, in all runs (default: as their settings say)",
    )
    given = parser.parse_args(arguments)
    with exit_with("trl-learnalign compare"):
        folders = [Path(folder) for folder in given.folders]
        if all((folder / layout.EVALUATION_RECORDS).is_file() for folder in folders):
            _check_evaluations(folders, given)
            compare_evaluations(*folders)
            return
        from trl_learnalign.report import compare, write_comparison

        comparison = compare(folders, given.generation_price)
        path = write_comparison(comparison, given.html) if given.html else None
    _print(comparison, path)


def _check_evaluations(folders: Sequence[Path], given: argparse.Namespace) -> None:
    if given.generation_price is not None:
        raise ValueError("--generation_price applies to runs, but these are evaluations.")
    if len(folders) != 2 or given.html is not None:
        raise ValueError(
            f"{len(folders)} evaluations given{' with --html' if given.html else ''}: exactly two can be "
            "compared, and only on the terminal."
        )


def _print(comparison: Comparison, path: Path | None) -> None:
    """Print the table, why it may be unfair, the settings that differ, and finally the conclusion."""
    from trl_learnalign.markup import visible

    console = Console()
    console.print(comparison_table(comparison))
    lines = [comparison.legend, *comparison.notes]
    for name, values in comparison.differences_in_words:
        lines.append(f"{name}: {visible(values)}")
    if path is not None:
        lines.append(f"Page: {path}")
    lines.append(visible(comparison.conclusion))
    for line in lines:
        console.print(Text(line), soft_wrap=not console.is_terminal)  # a file has no width


def comparison_table(comparison: Comparison) -> Table:
    """A table with one column per variant; for many variants the main figures, with one row per variant."""
    from trl_learnalign.markup import visible
    from trl_learnalign.report.comparison import run_label

    if comparison.is_broad:
        return _broad_table(comparison)
    table = Table(box=box.SIMPLE_HEAD)
    first, *others = comparison.headings
    table.add_column(first)
    for number, row in enumerate(comparison.rows):
        name = f"{run_label(number)}: {visible(row[first])}"
        table.add_column(Text(name), justify="right", overflow="fold")
    for heading in others:
        table.add_row(heading, *(Text(visible(row[heading])) for row in comparison.rows))
    return table


def _broad_table(comparison: Comparison) -> Table:
    """Rows labelled by letters, because names are long; the names are listed below."""
    from trl_learnalign.markup import visible
    from trl_learnalign.report.comparison import run_label

    name, *figures = comparison.main_headings
    labels = [run_label(number) for number in range(len(comparison.rows))]
    legend = [
        f"{label}: {visible(row[name])}" for label, row in zip(labels, comparison.rows, strict=True)
    ]
    caption = Text("\n".join([*legend, "All figures: --html FILE"]))
    table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
    table.add_column(name)
    for heading in figures:
        # Figures are never truncated, and headings are only broken between words.
        shown = (*(row[heading] for row in comparison.rows), *heading.split())
        table.add_column(heading, justify="right", width=max(map(len, shown)))
    for label, row in zip(labels, comparison.rows, strict=True):
        table.add_row(label, *(Text(visible(row[heading])) for heading in figures))
    return table
