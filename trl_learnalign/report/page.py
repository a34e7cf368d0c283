"""Writes `report.html` for a run, one file without network access and scripts; and its figures as PNG."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from trl_learnalign import markup, version
from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.records import layout
from trl_learnalign.records.layout import to_json
from trl_learnalign.records.notes import PRICES, SCORING_ACCOUNT, TRAINING_ACCOUNT, Cost
from trl_learnalign.records.run_record import RunContents
from trl_learnalign.records.store import write_atomically
from trl_learnalign.records.summary import phase_summaries, rollouts_of_run
from trl_learnalign.report import sections
from trl_learnalign.report.contrast import method_of
from trl_learnalign.report.figures import figures_of, svg_of, write_pngs
from trl_learnalign.report.run_data import Run, Stage, read_run
from trl_learnalign.report.sections import SelectionExplanation, categories_of
from trl_learnalign.version import __version__

logger = logging.getLogger(__name__)


def environment() -> jinja2.Environment:
    """Templates with autoescape; text from a model or a dataset also goes through `visible`."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("trl_learnalign.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        "visible": markup.visible,
        "headline": markup.headline,
        "num": markup.number,
        "count": markup.count,
        "pct": markup.percent,
        "general": markup.general,
        "setting": markup.setting,
        "words": markup.words,
        "title_of": markup.phase_title,
    }
    templates.globals["version"] = __version__
    return templates


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
    svgs = {}
    for name, figure in figures.items():
        svgs[name] = Markup(svg_of(figure, name, markup.words(name)))
    write_pngs(figures, layout.inside(run.folder, layout.FIGURES))
    path = run.output_dir / layout.REPORT
    # `visible` has already replaced model and dataset text that UTF-8 cannot encode; this handles the rest.
    write_atomically(path, render(run, svgs).encode("utf-8", errors="replace"))
    return path


def render(run: Run, svgs: Mapping[str, Markup]) -> str:
    """The page.

    Args:
        run (`Run`): The run.
        svgs (mapping): Figures by name.
    """
    contents = run.contents
    scoring, training = run.ledger.sum(SCORING_ACCOUNT), run.ledger.sum(TRAINING_ACCOUNT)
    with_rollouts = [stage.name for stage in run.scored_stages if stage.has_rollouts]
    template = environment().get_template("report.html")
    return template.render(
        run=run,
        svgs=svgs,
        contents=contents,
        trainer=to_json(contents.trainer),
        geometry=to_json(contents.plan.geometry),
        model=contents.trainer.model or "an unnamed model",
        cards=_cards(run, scoring, training),
        phase_rows=phase_summaries(contents),
        budget_of=sections.budget_sentence,
        stage_section=sections,
        shown_stages=_shown_stages(run),
        movements=list(itertools.pairwise(with_rollouts)),
        unit_of_compute=markup.unit_of_compute(run.ledger.price),
        cost_shares={price: _compute_share(scoring, training, price) for price in _prices(run)},
        time_share=_share(scoring.seconds, training.seconds),
        total=scoring + training,
        changed=_changed(contents.config),
        method=method_of(contents),
        order_rows=sections.phase_rows(contents),
        order_sentence=sections.order_sentence(contents),
        not_skipped=sections.reason_for_no_skipping(contents),
        why=SelectionExplanation(run),
        share_categories_of=categories_of,
        citation=version.BIBTEX,
    )


def _shown_stages(run: Run) -> list[Stage]:
    """Stages with a section of their own; a single stage that took the whole pool has nothing to show."""
    if len(run.stages) == 1 and run.stages[0].table is None:
        return []
    return list(run.stages)


def _share(part: float, rest: float) -> float | None:
    return part / (part + rest) if part + rest else None


def _cards(run: Run, scoring: Cost, training: Cost) -> list[dict[str, str]]:
    """The summary figures at the top of the page."""
    cards = _accuracy_cards(run)
    stages = run.scored_stages
    if stages:
        share = sections.pool_learnable_share(stages[0].note)
        size = f"{run.contents.plan.dataset_size:,} prompts"
        detail = "" if share is None else f"{share:.0%} learnable at first scoring"
        cards.append(_card("pool", size, detail))
    cards += _order_cards(run.contents)
    steps = sum(phase.steps for phase in run.phases)
    detail = "in 1 phase" if len(run.phases) == 1 else f"in {len(run.phases)} phases"
    cards.append(_card("training", f"{steps:,} steps", detail))
    if run.ledger.entries:
        cards.append(_cost_card(scoring, training, run.ledger.price))
    return cards


def _prices(run: Run) -> list[float]:
    """Prices of a generated token for which scoring's share is shown, the run's own first."""
    return list(dict.fromkeys((run.ledger.price, *PRICES)))


def _compute_share(scoring: Cost, training: Cost, price: float) -> float | None:
    return _share(scoring.compute(price), training.compute(price))


def _cost_card(scoring: Cost, training: Cost, price: float) -> dict[str, str]:
    whole = _duration(scoring.seconds + training.seconds)
    if not scoring.compute(price):
        return _card("time", whole, "nothing was scored")
    share = _compute_share(scoring, training, price)
    detail = f"{_duration(scoring.seconds)} of {whole}"
    return _card("compute to choose prompts", markup.percent(share), detail)


def _accuracy_cards(run: Run) -> list[dict[str, str]]:
    if not run.accuracies:
        return []
    first, last = run.accuracies[0], run.accuracies[-1]
    low, high = last.interval
    name = "held-out accuracy"
    if len(run.phases) > 1:
        name += f", {markup.phase_title(last.phase).lower()}"
    detail = f"{low:.1%} to {high:.1%} on {last.count:,} problems"
    cards = [_card(name, f"{last.value:.1%}", detail)]
    if last is not first:
        change = 100 * (last.value - first.value)
        detail = f"{first.value:.1%} before"
        cards.append(_card(f"change from {first.phase}", f"{change:+.1f} points", detail))
    return cards


def _order_cards(contents: RunContents) -> list[dict[str, str]]:
    """Cards of runs with continual selection."""
    rollouts = rollouts_of_run(contents) if contents.is_continual else None
    if rollouts is None:
        return []
    detail = f"of {rollouts.groups:,} rolled out: they have a gradient"
    cards = [_card("useful groups", markup.percent(rollouts.useful_share), detail)]
    if rollouts.skipped_share is not None:
        share = markup.percent(rollouts.skipped_share)
        cards.append(_card("not trained on", share, "of the tokens, without a gradient"))
    return cards


def _card(name: str, value: str, detail: str) -> dict[str, str]:
    return {"name": name, "value": value, "detail": detail}


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _changed(config: Mapping[str, Any]) -> set[str]:
    """Settings that differ from their defaults."""
    defaults = dataclasses.asdict(LearnAlignConfig())
    nothing = object()  # equal to no value: the default of an unknown setting
    return {name for name, value in config.items() if defaults.get(name, nothing) != value}
