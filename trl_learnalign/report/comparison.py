"""Several runs side by side: rows for a table, and a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from trl_learnalign.records.store import write_atomically
from trl_learnalign.report import text
from trl_learnalign.report.figures import comparison_figure, run_label, svg_of
from trl_learnalign.report.page import environment
from trl_learnalign.report.run import Accuracy, Run, read_run

HEADINGS = (
    *("run", "selector", "stages"),
    *("seed", "base", "final accuracy", "95 % interval", "best"),
    *("steps", "rollout tokens", "compute", "scoring", "time"),
)
"""Columns; the first three are text."""


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Args:
        runs (`dict[str, Run]`): Name → run; names are made distinct.
        rows (`list[tuple[str]]`): Cells under [`HEADINGS`].
        notes (`list[str]`): What makes the comparison unfair, in words.
        differences (`list[tuple[str, list]]`): Settings that differ, with the value of each run.
    """

    runs: dict[str, Run]
    rows: list[tuple[str, ...]]
    notes: list[str]
    differences: list[tuple[str, list[Any]]]


def compare(folders: Sequence[str | Path]) -> Comparison:
    """Read runs and put them side by side.

    Args:
        folders (sequence of `str` or `Path`): Output folders.

    Raises:
        `ValueError`: If there are fewer than two.
        `FileNotFoundError`: If one holds no run.
    """
    if len(folders) < 2:
        raise ValueError(f"{len(folders)} run(s) given: a comparison needs at least two output folders.")
    runs = _named([read_run(folder) for folder in folders])
    rows = [_row(name, run) for name, run in runs.items()]
    return Comparison(runs, rows, _notes(runs), _differences(list(runs.values())))


def _named(runs: list[Run]) -> dict[str, Run]:
    names = [run.name for run in runs]
    full = [str(run.output_dir) if names.count(run.name) > 1 else run.name for run in runs]
    distinct = [name if full.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(full, start=1)]
    return dict(zip(distinct, runs, strict=True))


def _row(name: str, run: Run) -> tuple[str, ...]:
    config = run.data["config"]
    selector = config["selector"]
    first, last = (run.accuracies[0], run.accuracies[-1]) if run.accuracies else (None, None)
    best = max((accuracy.value for accuracy in run.accuracies), default=None)
    scoring, training = run.cost("scoring"), run.cost("training")
    total = scoring + training
    return (
        name if run.finished else f"{name} (not finished)",
        selector if isinstance(selector, str) else ", ".join(selector),
        text.setting(config["stages"]),
        str(run.data["trainer"].get("seed", "")),
        text.number(first.value if first else None),
        text.number(last.value if last else None),
        "{:.3f} – {:.3f}".format(*last.interval) if last else "",
        text.number(best),
        text.count(sum(phase["steps"] for phase in run.phases)),
        text.count(total.tokens_generated) if run.ledger else "",
        text.general(total.forward_equivalents) if run.ledger else "",
        text.percent(scoring.forward_equivalents / total.forward_equivalents) if total.forward_equivalents else "",
        f"{total.seconds / 60:.1f} min" if run.ledger else "",
    )


def _notes(runs: dict[str, Run]) -> list[str]:
    notes = []
    for what, values in (
        ("were trained on different datasets", {run.data["identity"].get("dataset") for run in runs.values()}),
        ("began from different models", {run.data["trainer"].get("model") for run in runs.values()}),
        ("were judged on different numbers of problems", {a.count for run in runs.values() for a in run.accuracies}),
    ):
        if len(values) > 1:
            notes.append(f"These runs {what}: their accuracies cannot be compared.")
    return notes


def _differences(runs: list[Run]) -> list[tuple[str, list[Any]]]:
    found = []
    for part in ("config", "trainer", "versions"):
        names = dict.fromkeys(name for run in runs for name in run.data.get(part, {}))
        for name in names:
            values = [run.data.get(part, {}).get(name) for run in runs]
            if any(value != values[0] for value in values) and name != "record_dir":
                found.append((name, values))
    return found


def write_comparison(comparison: Comparison, path: str | Path) -> Path:
    """Write a comparison as one self-contained page.

    Args:
        comparison (`Comparison`): The runs.
        path (`str` or `Path`): The page.

    Raises:
        `StoreError`: If it cannot be written.
    """
    figures = []
    if any(run.accuracies for run in comparison.runs.values()):
        by_steps = comparison_figure(comparison.runs, lambda run, accuracy: accuracy.step, "optimizer step")
        figures.append(("Held-out accuracy at equal steps.", Markup(svg_of(by_steps, "steps", "accuracy over steps"))))
        if all(run.ledger for run in comparison.runs.values()):
            by_cost = comparison_figure(comparison.runs, compute_at, "compute (tokens of a forward pass)")
            figures.append(
                (
                    "Held-out accuracy at equal compute, scoring included: a run that selects pays for it.",
                    Markup(svg_of(by_cost, "compute", "accuracy over compute")),
                )
            )
    rows = [{"letter": run_label(i), "cells": cells} for i, cells in enumerate(comparison.rows)]
    page = (
        environment()
        .get_template("compare.html")
        .render(
            rows=rows,
            headings=HEADINGS,
            notes=comparison.notes,
            differences=comparison.differences,
            figures=figures,
        )
    )
    path = Path(path)
    write_atomically(path, page.encode("utf-8", errors="replace"))
    return path


def compute_at(run: Run, accuracy: Accuracy) -> float | None:
    """Compute that a run had used when an accuracy was measured, scoring included."""
    used = 0.0
    if accuracy.phase == "base":
        return used
    for phase in run.phases:
        costs = run.ledger.get(phase["name"], {})
        used += sum(cost.forward_equivalents for cost in costs.values())
        if phase["name"] == accuracy.phase:
            return used
    return None
