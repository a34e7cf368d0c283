"""A run → `report.html`: one file, no network, no script; and its figures as PNG."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from trl_learnalign import __version__
from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.records import layout
from trl_learnalign.records.ledger import Cost
from trl_learnalign.records.store import write_atomically
from trl_learnalign.report import citation, text
from trl_learnalign.report.figures import figures_of, svg_of, write_pngs
from trl_learnalign.report.run import Run, Stage, read_run

logger = logging.getLogger(__name__)

GROUP_TITLES = {
    "top": "Top of the ranking",
    "bottom": "Bottom of the ranking",
    "always right": "Always right: nothing left to learn",
    "always wrong": "Always wrong: nothing to learn from",
}


def environment() -> jinja2.Environment:
    """Templates with autoescape; whatever comes from a model or a dataset also goes through `visible`."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("trl_learnalign.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "visible": text.visible,
        "headline": text.headline,
        "num": text.number,
        "count": text.count,
        "pct": text.percent,
        "general": text.general,
        "setting": text.setting,
        "words": text.words,
        "title_of": text.phase_title,
    }
    made.globals["version"] = __version__
    return made


def write_report(folder: str | Path) -> Path:
    """Write `report.html` into a run's output folder, and its figures as PNG into the record folder.

    Args:
        folder (`str` or `Path`): Output folder of a run, finished or not, or its record folder.

    Returns:
        `Path`: The report.

    Raises:
        `FileNotFoundError`, `ValueError`: If there is no run, or its records are damaged.
        `StoreError`: If it cannot be written.
    """
    run = read_run(folder)
    figures = figures_of(run)
    svgs = {name: Markup(svg_of(figure, name, text.words(name))) for name, figure in figures.items()}
    write_pngs(figures, run.folder / layout.FIGURES)
    path = run.output_dir / layout.REPORT
    # What cannot be written as UTF-8 has been replaced by `visible`; this is for the rest.
    write_atomically(path, render(run, svgs).encode("utf-8", errors="replace"))
    return path


def render(run: Run, svgs: Mapping[str, Markup]) -> str:
    """The page.

    Args:
        run (`Run`): The run.
        svgs (mapping): Figures by name.
    """
    scoring, training = run.cost("scoring"), run.cost("training")
    measured = [stage.name for stage in run.scored_stages if stage.has_rollouts]
    selector = run.data["config"]["selector"]
    return (
        environment()
        .get_template("report.html")
        .render(
            run=run,
            svgs=svgs,
            model=run.data["trainer"].get("model") or "a model without a name",
            selector=selector if isinstance(selector, str) else ", ".join(selector),
            cards=_cards(run, scoring, training),
            phase_rows=_phase_rows(run),
            warnings_of=_warnings,
            length_caption=_length_caption,
            groups_of=_groups,
            group_titles=GROUP_TITLES,
            movements=list(itertools.pairwise(measured)),
            cost_share=_share(scoring.forward_equivalents, training.forward_equivalents),
            time_share=_share(scoring.seconds, training.seconds),
            total=scoring + training,
            changed=_changed(run.data["config"]),
            citation=citation.BIBTEX,
        )
    )


def _share(part: float, rest: float) -> float | None:
    return part / (part + rest) if part + rest else None


def _cards(run: Run, scoring: Cost, training: Cost) -> list[dict[str, str]]:
    cards = []
    if run.accuracies:
        first, last = run.accuracies[0], run.accuracies[-1]
        low, high = last.interval
        cards.append(
            {
                "name": f"held-out accuracy, {text.phase_title(last.phase).lower()}",
                "value": f"{last.value:.1%}",
                "detail": f"{low:.1%} to {high:.1%} on {last.count:,} problems",
            }
        )
        if last is not first:
            change = 100 * (last.value - first.value)
            cards.append(
                {
                    "name": f"change from {first.phase}",
                    "value": f"{change:+.1f} points",
                    "detail": f"{first.value:.1%} before",
                }
            )
    stages = run.scored_stages
    if stages:
        share = stages[0].note.get("learnable_share")
        cards.append(
            {
                "name": "pool",
                "value": f"{run.data['plan']['pool_size']:,} prompts",
                "detail": "" if share is None else f"{share:.0%} learnable at first scoring",
            }
        )
    steps = sum(phase["steps"] for phase in run.phases)
    detail = "in 1 phase" if len(run.phases) == 1 else f"in {len(run.phases)} phases"
    cards.append({"name": "training", "value": f"{steps:,} steps", "detail": detail})
    if run.ledger:
        share = _share(scoring.forward_equivalents, training.forward_equivalents)
        cards.append(
            {
                "name": "scoring's share of compute",
                "value": text.percent(share),
                "detail": f"{_duration(scoring.seconds)} of {_duration(scoring.seconds + training.seconds)}",
            }
        )
    return cards


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _phase_rows(run: Run) -> list[dict[str, Any]]:
    by_phase = {accuracy.phase: accuracy for accuracy in run.accuracies}
    rows: list[dict[str, Any]] = []
    if "base" in by_phase:
        rows.append({"name": "base", **dict.fromkeys(("size", "candidates", "selected", "rest", "steps", "reward"))})
    for phase in run.phases:
        selection, training = run.note(phase["name"], "selection"), run.note(phase["name"], "training")
        rows.append(
            {
                "name": phase["name"],
                "size": selection.get("size", phase["size"]),
                "candidates": selection.get("pool_size"),
                "selected": selection.get("success_rate_selected"),
                "rest": selection.get("success_rate_left_out"),
                "steps": phase["steps"],
                "reward": training.get("reward"),
            }
        )
    for row in rows:
        accuracy = by_phase.get(row["name"])
        row["accuracy"] = None if accuracy is None else accuracy.value
        row["interval"] = None if accuracy is None else accuracy.interval
    return rows


def _warnings(stage: Stage) -> list[str]:
    note = stage.note
    found = []
    share = note.get("learnable_share")
    if note.get("shortfall"):
        found.append(f"{note['shortfall'][0].upper()}{note['shortfall'][1:]}.")
    elif share is not None and note["size"] > share * note["pool_size"] + 0.5:  # records of version 0.1
        found.append(
            f"Only {share * note['pool_size']:.0f} of {note['pool_size']:,} candidates were learnable, fewer than the "
            f"{note['size']:,} that were taken: the others were filled in (when_short)."
        )
    if note.get("unscored_selected"):
        found.append(f"{note['unscored_selected']:,} of the selected prompts were not scored (pool_sample).")
    if note.get("gradients_not_finite"):
        found.append(f"The gradients of {note['gradients_not_finite']:,} prompts were not finite; they score 0.")
    coverage = note.get("scoring", {}).get("coverage", {})
    if coverage.get("missing"):
        found.append(
            f"{1 - coverage['share']:.2%} of the trainable entries are missing from the gradient features: "
            f"{', '.join(map(str, coverage['missing']))}."
        )
    return found


def _length_caption(stage: Stage) -> str:
    correlation = stage.length_correlation
    said = "Completion lengths; medians dashed."
    if correlation is not None:
        said += f" Spearman correlation of score and length among learnable prompts: {correlation:+.2f}."
    return said


def _groups(stage: Stage) -> list[tuple[str, list[dict[str, Any]]]]:
    prompts = stage.prompts()
    found = {group: [prompt for prompt in prompts if prompt["group"] == group] for group in GROUP_TITLES}
    return [(group, of) for group, of in found.items() if of]


def _changed(config: Mapping[str, Any]) -> set[str]:
    """Settings that are not at their defaults."""
    defaults = dataclasses.asdict(LearnAlignConfig())
    return {name for name, value in config.items() if name not in defaults or defaults[name] != value}
