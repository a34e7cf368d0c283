"""Several runs side by side: rows for a table, and a page."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from trl_learnalign.records.contents import RunContents
from trl_learnalign.records.entries import to_json
from trl_learnalign.records.notes import BASE, SCORING_ACCOUNT, BeliefNote
from trl_learnalign.records.store import write_atomically
from trl_learnalign.records.summary import rollouts_of_run
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
    rows = _without_empty([_row(name, run) for name, run in runs.items()])
    return Comparison(runs, rows, _notes(runs), _differences(list(runs.values())))


def _named(runs: list[Run]) -> dict[str, Run]:
    """Runs by the name of their folder; by its path or a number too, where names are the same."""
    folders = [run.name for run in runs]
    names = [str(run.output_dir) if folders.count(run.name) > 1 else run.name for run in runs]
    by_name = {}
    for number, (name, run) in enumerate(zip(names, runs, strict=True), start=1):
        key = name if names.count(name) == 1 else f"{name} ({number})"
        by_name[key] = run
    return by_name


def _row(name: str, run: Run) -> dict[str, str]:
    contents = run.contents
    first, last = (run.accuracies[0], run.accuracies[-1]) if run.accuracies else (None, None)
    best = max((accuracy.value for accuracy in run.accuracies), default=None)
    return {
        "run": name if run.finished else f"{name} (not finished)",
        "selector": contents.selector if contents.selects else "none",
        "stages": text.setting(contents.config["stages"]),
        "order": ", ".join(contents.orders),
        "seed": str(contents.trainer.seed),
        "base": text.number(first.value if first else None),
        "final accuracy": text.number(last.value if last else None),
        "95 % interval": "{:.3f} – {:.3f}".format(*last.interval) if last else "",
        "best": text.number(best),
        "steps": text.count(sum(phase.steps for phase in run.phases)),
        **_rollout_cells(contents),
        **_cost_cells(run),
    }


OPTIONAL = (
    "useful groups",
    "tokens skipped",
    "rolled out per trained on",
    "Brier score",
)
"""Columns that are left out if no run has anything in them."""


def _rollout_cells(contents: RunContents) -> dict[str, str]:
    """What the rollouts of a run came to."""
    cells, rollouts = dict.fromkeys(OPTIONAL, ""), rollouts_of_run(contents)
    if rollouts is not None:
        cells["useful groups"] = text.percent(rollouts.useful_share)
        cells["tokens skipped"] = text.percent(rollouts.skipped_share)
        if rollouts.groups_trained and rollouts.groups != rollouts.groups_trained:
            times = rollouts.groups / rollouts.groups_trained
            cells["rolled out per trained on"] = text.number(times, 2)
    notes = [contents.note(phase.name, BeliefNote) for phase in contents.plan.phases]
    beliefs = [note for note in notes if note is not None and note.brier is not None]
    if beliefs:
        total = sum(note.rollouts for note in beliefs)
        score = sum(note.rollouts * (note.brier or 0.0) for note in beliefs) / total
        cells["Brier score"] = text.number(score)
    return cells


def _without_empty(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows without optional columns in which nothing stands, and without the order if all are shuffled."""
    empty = {name for name in OPTIONAL if not any(row[name] for row in rows)}
    if {row["order"] for row in rows} == {"shuffled"}:
        empty.add("order")
    return [{name: cell for name, cell in row.items() if name not in empty} for row in rows]


def _cost_cells(run: Run) -> dict[str, str]:
    total, compute = run.ledger.total, run.ledger.total.forward_equivalents
    cells = dict.fromkeys(("rollout tokens", "compute", "scoring", "time"), "")
    if run.ledger.entries:
        cells["rollout tokens"] = text.count(total.tokens_generated)
        cells["compute"] = text.general(compute)
        cells["time"] = f"{total.seconds / 60:.1f} min"
    if compute:
        scoring = run.ledger.sum(SCORING_ACCOUNT).forward_equivalents
        cells["scoring"] = text.percent(scoring / compute)
    return cells


def _notes(runs: dict[str, Run]) -> list[str]:
    datasets, models, counts = set(), set(), set()
    for run in runs.values():
        datasets.add(run.contents.identity.get("dataset"))
        models.add(run.contents.trainer.model)
        counts |= {accuracy.count for accuracy in run.accuracies}
    values_of: dict[str, set[Any]] = {
        "were trained on different datasets": datasets,
        "began from different models": models,
        "were judged on different numbers of problems": counts,
    }
    return [
        f"These runs {what}: their accuracies cannot be compared."
        for what, values in values_of.items()
        if len(values) > 1
    ]


def _differences(runs: list[Run]) -> list[tuple[str, list[Any]]]:
    differences = []
    groups_of_runs = [_settings(run.contents) for run in runs]
    for settings in zip(*groups_of_runs, strict=True):
        names = dict.fromkeys(itertools.chain.from_iterable(settings))
        for name in names:
            values = [of_run.get(name) for of_run in settings]
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
    rows = []
    for number, row in enumerate(comparison.rows):
        rows.append({"letter": run_label(number), "cells": list(row.values())})
    template = environment().get_template("compare.html")
    page = template.render(
        rows=rows,
        headings=comparison.headings,
        notes=comparison.notes,
        differences=comparison.differences,
        figures=_figures(comparison.runs),
    )
    path = Path(path)
    write_atomically(path, page.encode("utf-8", errors="replace"))
    return path


def _figures(runs: Mapping[str, Run]) -> list[tuple[str, Markup]]:
    """Captions and figures, those that the runs have data for."""
    if not any(run.accuracies for run in runs.values()):
        return []
    by_steps = comparison_figure(runs, lambda run, accuracy: accuracy.step, "optimizer step")
    svg = Markup(svg_of(by_steps, "steps", "accuracy over steps"))
    figures = [("Held-out accuracy at equal steps.", svg)]
    if all(run.ledger.entries for run in runs.values()):
        by_cost = comparison_figure(runs, compute_at, "compute (tokens of a forward pass)")
        svg = Markup(svg_of(by_cost, "compute", "accuracy over compute"))
        caption = (
            "Held-out accuracy at equal compute, scoring included: a run that selects pays for it."
        )
        figures.append((caption, svg))
    return figures


def compute_at(run: Run, accuracy: Accuracy) -> float | None:
    """Compute that a run had used when an accuracy was measured, scoring included."""
    compute = 0.0
    if accuracy.phase == BASE:
        return compute
    for phase in run.phases:
        costs = run.ledger.entries.get(phase.name, {})
        compute += sum(cost.forward_equivalents for cost in costs.values())
        if phase.name == accuracy.phase:
            return compute
    return None
