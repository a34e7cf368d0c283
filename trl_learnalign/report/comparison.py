"""Several runs side by side: rows for a table, and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from trl_learnalign.records.contents import RunContents
from trl_learnalign.records.entries import to_json
from trl_learnalign.records.notes import BASE, SCORING_ACCOUNT
from trl_learnalign.records.store import write_atomically
from trl_learnalign.report import text
from trl_learnalign.report.figures import comparison_figure, run_label, svg_of
from trl_learnalign.report.page import environment
from trl_learnalign.report.run import Accuracy, Run, read_run


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Args:
        runs (`dict[str, Run]`): Name → run; names are made distinct.
        rows (`list[dict[str, str]]`): Of each run heading → cell; the first three columns are text.
        notes (`list[str]`): What makes the comparison unfair, in words.
        differences (`list[tuple[str, list]]`): Settings that differ, with the value of each run.
    """

    runs: dict[str, Run]
    rows: list[dict[str, str]]
    notes: list[str]
    differences: list[tuple[str, list[Any]]]

    @property
    def headings(self) -> list[str]:
        """Of the columns."""
        return list(self.rows[0])


def compare(folders: Sequence[str | Path]) -> Comparison:
    """Read runs and put them side by side.

    Args:
        folders (sequence of `str` or `Path`): Output folders.

    Raises:
        `ValueError`: If there are fewer than two.
        `FileNotFoundError`: If one holds no run.
    """
    if len(folders) < 2:
        raise ValueError(
            f"{len(folders)} run(s) given: a comparison needs at least two output folders."
        )
    runs = _named([read_run(folder) for folder in folders])
    rows = [_row(name, run) for name, run in runs.items()]
    return Comparison(runs, rows, _notes(runs), _differences(list(runs.values())))


def _named(runs: list[Run]) -> dict[str, Run]:
    names = [run.name for run in runs]
    full = [str(run.output_dir) if names.count(run.name) > 1 else run.name for run in runs]
    distinct = [
        name if full.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(full, start=1)
    ]
    return dict(zip(distinct, runs, strict=True))


def _row(name: str, run: Run) -> dict[str, str]:
    contents = run.contents
    first, last = (run.accuracies[0], run.accuracies[-1]) if run.accuracies else (None, None)
    best = max((accuracy.value for accuracy in run.accuracies), default=None)
    return {
        "run": name if run.finished else f"{name} (not finished)",
        "selector": contents.selector,
        "stages": text.setting(contents.config["stages"]),
        "seed": str(contents.trainer.seed),
        "base": text.number(first.value if first else None),
        "final accuracy": text.number(last.value if last else None),
        "95 % interval": "{:.3f} – {:.3f}".format(*last.interval) if last else "",
        "best": text.number(best),
        "steps": text.count(sum(phase.steps for phase in run.phases)),
        **_cost_cells(run),
    }


def _cost_cells(run: Run) -> dict[str, str]:
    total, compute = run.ledger.total, run.ledger.total.forward_equivalents
    cells = dict.fromkeys(("rollout tokens", "compute", "scoring", "time"), "")
    if run.ledger.entries:
        cells["rollout tokens"] = text.count(total.tokens_generated)
        cells["compute"] = text.general(compute)
        cells["time"] = f"{total.seconds / 60:.1f} min"
    if compute:
        cells["scoring"] = text.percent(
            run.ledger.sum(SCORING_ACCOUNT).forward_equivalents / compute
        )
    return cells


def _notes(runs: dict[str, Run]) -> list[str]:
    notes = []
    for what, values in (
        (
            "were trained on different datasets",
            {run.contents.identity.get("dataset") for run in runs.values()},
        ),
        ("began from different models", {run.contents.trainer.model for run in runs.values()}),
        (
            "were judged on different numbers of problems",
            {a.count for run in runs.values() for a in run.accuracies},
        ),
    ):
        if len(values) > 1:
            notes.append(f"These runs {what}: their accuracies cannot be compared.")
    return notes


def _differences(runs: list[Run]) -> list[tuple[str, list[Any]]]:
    differences = []
    for settings in zip(*(_settings(run.contents) for run in runs), strict=True):
        for name in dict.fromkeys(name for part in settings for name in part):
            values = [part.get(name) for part in settings]
            if any(value != values[0] for value in values) and name != "record_dir":
                differences.append((name, values))
    return differences


def _settings(contents: RunContents) -> tuple[Mapping[str, Any], ...]:
    return contents.config, to_json(contents.trainer), contents.versions


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
        by_steps = comparison_figure(
            comparison.runs, lambda run, accuracy: accuracy.step, "optimizer step"
        )
        figures.append(
            (
                "Held-out accuracy at equal steps.",
                Markup(svg_of(by_steps, "steps", "accuracy over steps")),
            )
        )
        if all(run.ledger.entries for run in comparison.runs.values()):
            by_cost = comparison_figure(
                comparison.runs, compute_at, "compute (tokens of a forward pass)"
            )
            figures.append(
                (
                    "Held-out accuracy at equal compute, scoring included: a run that selects pays for it.",
                    Markup(svg_of(by_cost, "compute", "accuracy over compute")),
                )
            )
    rows = [
        {"letter": run_label(i), "cells": list(row.values())}
        for i, row in enumerate(comparison.rows)
    ]
    page = (
        environment()
        .get_template("compare.html")
        .render(
            rows=rows,
            headings=comparison.headings,
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
    if accuracy.phase == BASE:
        return used
    for phase in run.phases:
        costs = run.ledger.entries.get(phase.name, {})
        used += sum(cost.forward_equivalents for cost in costs.values())
        if phase.name == accuracy.phase:
            return used
    return None
