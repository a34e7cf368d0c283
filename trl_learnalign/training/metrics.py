"""Metrics and tracker tables of selections and finished phases."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from trl_learnalign.adaptive import Outcomes
from trl_learnalign.adaptive.belief import (
    area_under_curve,
    brier_score,
    calibration_error,
    reliability_bins,
)
from trl_learnalign.bridge.logs import TrackerTables
from trl_learnalign.data.columns import CLUSTER, Grouping
from trl_learnalign.data.prompts import prompt_text, prompts_of
from trl_learnalign.diversity import cluster_grouping, share_table, shares_of, top_and_bottom
from trl_learnalign.measuring.generation import clipped
from trl_learnalign.ranking import Ranking, Selection
from trl_learnalign.records.notes import (
    STATISTICS,
    BeliefNote,
    CalibrationBin,
    GradientDiversity,
    GroupDistribution,
    MetricsNote,
    RepeatedPrompt,
    RolloutsNote,
    SelectionNote,
    TrainingNote,
    spread_line,
)
from trl_learnalign.selectors import GRADIENTS, ROLLOUTS, Selector

logger = logging.getLogger(__name__)

PREFIX = "learnalign/"

TOLD = 3
"""Maximum number of columns whose shares a log line shows."""

_TRACKED_AS = {"candidates": "pool_size", "selected": "size"}
"""Fields whose metrics have other names, since dashboards use these."""


def selection_metrics(note: SelectionNote, stage: int) -> dict[str, float]:
    """Return the metrics of a scored selection for `report_to`, without unknown values.

    Args:
        note (`SelectionNote`): The scored selection.
        stage (`int`): Number of the stage, from 1.
    """
    values: dict[str, float | None] = {}
    for name in STATISTICS:
        values[_TRACKED_AS.get(name, name)] = getattr(note, name)
    values["overlap"] = note.overlap
    values["stage"] = stage
    if note.scoring is not None:
        values["scoring_seconds"] = note.scoring.seconds
        if note.scoring.coverage is not None:  # None if everything had been measured before
            values["coverage"] = note.scoring.coverage.share
        values["scoring_rounds"] = len(note.scoring.rounds) or None
    values["not_scored"] = note.not_scored or None
    if note.reliability is not None:
        # Without a positive correlation of the halves there is no prediction, but a curve needs a number.
        values["reliability"] = note.reliability.predicted or 0.0
        values["reliability_overlap"] = note.reliability.overlap_halves
    if note.breadth is not None:
        values |= _breadth_metrics(note.breadth)
    for shares in note.shares:
        values |= _share_metrics(shares)
    known = {}
    for name, value in values.items():
        if value is not None:
            known[PREFIX + name] = value
    return known


def _breadth_metrics(breadth: GradientDiversity) -> dict[str, float | None]:
    return {
        "effective_directions": breadth.directions,
        "effective_directions_random": breadth.directions_random,
        "signal_covered": breadth.covered,
        "signal_covered_random": breadth.covered_random,
        "nearest_similarity": breadth.similarity,
        "nearest_similarity_random": breadth.similarity_random,
    }


def _share_metrics(shares: GroupDistribution) -> dict[str, float | None]:
    return {
        f"effective_categories/{shares.by}": shares.effective,
        f"effective_categories_random/{shares.by}": shares.effective_random,
    }


def trained_metrics(note: RolloutsNote) -> dict[str, float]:
    """Return metrics of the categories that a phase has trained on, for `report_to`; empty if none are recorded."""
    values = {}
    for shares in note.shares:
        values[f"{PREFIX}effective_categories_trained/{shares.by}"] = shares.effective
        values[f"{PREFIX}effective_categories_trained_random/{shares.by}"] = shares.effective_random
    return values


def scoring_line(selector: Selector, candidates: int, rollouts: int) -> str:
    """Return the log line that says what is about to be measured.

    Args:
        selector (`Selector`): The selector that ranks the candidates.
        candidates (`int`): Number of candidates.
        rollouts (`int`): Rollouts of each candidate, if the selector needs them.
    """
    line = f"scoring {candidates:,} prompts for {selector.name}"
    if selector.needs & {ROLLOUTS, GRADIENTS}:
        line += f", {rollouts} rollouts each"
    return line


def training_line(note: TrainingNote) -> str:
    """Return the log line of a finished phase."""
    line = f"ended at step {note.step:,}"
    if note.reward is not None:
        line += f", mean reward {note.reward:.3g}"
    return line


def selection_lines(note: SelectionNote) -> list[str]:
    """Return a scored selection as a few log lines, each of which fits a terminal."""
    assert note.scoring is not None
    seconds = note.scoring.seconds
    candidates = f"{note.candidates:,} candidates"
    if note.not_scored:
        candidates += f" ({note.not_scored:,} others were not scored)"
    lines = [f"selected {note.selected:,} of {candidates}, in {seconds:.1f} s"]
    if note.learnable_share is not None:
        share = f"{note.learnable_share:.0%} of the candidates"
        lines.append(f"learnable (solved sometimes, not always): {share}")
    selected, rest = note.success_rate_selected, note.success_rate_left_out
    if selected is not None:
        rates = f"mean success rate: {selected:.2f} of the selected"
        lines.append(rates if rest is None else f"{rates}, {rest:.2f} of the rest")
    if note.overlap is not None:
        share = f"{note.overlap:.0%} of the selected"
        lines.append(f"the ranking of the previous stage would also have selected {share}")
    return lines + _spread_lines(note.shares)


def _spread_lines(shares: Sequence[GroupDistribution]) -> list[str]:
    """Lines of the columns alone: the report has more on clusters and directions."""
    by_column = [one for one in shares if one.by != CLUSTER]
    return [spread_line(one) for one in by_column[:TOLD]]


MENTIONED = 0.005
"""Smallest share of idle tokens that the log mentions."""


def phase_lines(rollouts: RolloutsNote, belief: BeliefNote | None) -> list[str]:
    """Return the log lines of a phase's rollouts, with predicted and observed success rates if there are any."""
    if not rollouts.groups:
        return ["its rollouts were not recorded"]
    line = f"{rollouts.useful_share:.0%} of {rollouts.groups:,} groups had a gradient"
    if rollouts.mixed != rollouts.useful:
        line += f", {rollouts.mixed_share:.0%} both correct and wrong rollouts"
    if belief is not None and belief.predicted is not None:
        line += f" (success rate: predicted {belief.predicted:.2f}, observed {belief.seen:.2f})"
    lines = [line]
    if rollouts.groups_trained != rollouts.groups:
        lines.append(f"{rollouts.groups_trained:,} groups were chosen to be trained on")
    if rollouts.skipped_share is not None:
        skipped = f"{rollouts.skipped_share:.0%} of the tokens were not trained on"
        if rollouts.idle_share and rollouts.idle_share >= MENTIONED:
            skipped += (
                f" ({rollouts.idle_share:.0%} without a gradient were, since a step needs a row)"
            )
        lines.append(skipped)
    return lines + _spread_lines(rollouts.shares)


# ---- Categories and tracker tables ----------------------------------------------------------------------------------

SHORT = {
    "fill": "unlearnable prompts complete the number",
    "shrink": "fewer prompts than requested are used",
}
"""Action taken if too few prompts are learnable, by `LearnAlignConfig.on_shortfall`."""

REMEDY = "learnalign_coverage and learnalign_logdet select more diverse prompts"


def shares_of_choice(
    ranking: Ranking, choice: Selection, candidates: np.ndarray, groupings: Sequence[Grouping]
) -> tuple[GroupDistribution, ...]:
    """Return the distribution of a selection over columns and, if prompts have features, over clusters; collective.

    Args:
        ranking (`Ranking`): The ranking that the selection was taken from.
        choice (`Selection`): The selected prompts.
        candidates (`np.ndarray`): Rows of the dataset that could have been selected, scored or not.
        groupings (sequence of `Grouping`): Groupings by columns.
    """
    pool = ranking.pool
    clusters = cluster_grouping(pool)
    everything = [*groupings]
    if clusters is not None:
        everything.append(clusters)
    return shares_of(everything, candidates, choice.rows, pool.seed, pool.phase)


def warn_of_narrow(name: str, shares: Sequence[GroupDistribution], remedy: str = REMEDY) -> None:
    """Warn if a selection is far narrower than random ones.

    Args:
        name (`str`): Name of the stage.
        shares (sequence of `GroupDistribution`): Distributions over columns and clusters.
        remedy (`str`, *optional*): Advice for the user.
    """
    for one in shares:
        if one.is_narrow:
            logger.warning("%s: %s; %s.", name, one.narrowness, remedy)


def warn_of_shortfall(name: str, shortfall: str | None, on_shortfall: str) -> None:
    """Warn about a shortfall of a selection, if there is one, and say what was done about it.

    Args:
        name (`str`): Name of the stage.
        shortfall (`str`, *optional*): `Ranking.shortfall`.
        on_shortfall (`str`): `LearnAlignConfig.on_shortfall`.
    """
    if shortfall is None:
        return
    done = SHORT[on_shortfall]
    logger.warning("%s: %s (on_shortfall=%r: %s).", name, shortfall, on_shortfall, done)


CHARACTERS = 200
"""Maximum length of a prompt in a table."""


def outcome_table(outcomes: Outcomes, dataset: Any, count: int) -> pd.DataFrame:
    """Return prompts that were rolled out most often, that are newly solved, and that never had a right rollout.

    Args:
        outcomes (`Outcomes`): Groups of rollouts, in the order of training.
        dataset (`datasets.Dataset`): The dataset, with a `prompt` column.
        count (`int`): Maximum number of prompts of each kind; each of them was rolled out more than once.

    Returns:
        `pandas.DataFrame`: Columns `kind`, `index` (row of the dataset), `prompt` (cut), `groups` (how often the
        prompt was rolled out), `first_success_rate` and `last_success_rate`.
    """
    rates = pd.DataFrame({"index": outcomes.rows, "rate": outcomes.success_rates}).dropna()
    found = rates.groupby("index")["rate"].agg(["size", "first", "last", "max"])
    found = found[found["size"] > 1]
    often = found.sort_values("size", ascending=False, kind="stable")
    solved = found[(found["first"] < 1) & (found["last"] == 1)].sort_values("first", kind="stable")
    kinds = {
        "most often": often,
        "newly solved": solved,
        "never right": often[often["max"] == 0],
    }
    tables = [table.head(count).assign(kind=kind) for kind, table in kinds.items()]
    table = pd.concat(tables).reset_index()
    rows = table["index"].to_numpy()
    texts = [prompt_text(prompt) for prompt in prompts_of(dataset, rows)] if len(rows) else []
    return pd.DataFrame(
        {
            "kind": table["kind"],
            "index": rows,
            "prompt": [clipped(text, CHARACTERS) for text in texts],
            "groups": table["size"],
            "first_success_rate": table["first"],
            "last_success_rate": table["last"],
        }
    )


class ChoiceTables:
    """Sends tables of selections to the trackers of `report_to`.

    Args:
        tables (`bridge.TrackerTables`): The trackers.
        count (`int`): Number of prompts at either end of the ranking (`LearnAlignConfig.log_prompt_table`). 0 switches
            the tables off.
        groupings (sequence of `Grouping`): Groupings by columns.
    """

    def __init__(self, tables: TrackerTables, count: int, groupings: Sequence[Grouping]):
        self.tables = tables
        self.count = count
        self.groupings = groupings

    def show(self, name: str, table: pa.Table, shares: Sequence[GroupDistribution]) -> None:
        """Send a stage's best and worst prompts, and its categories.

        Args:
            name (`str`): `Phase.name`.
            table (`pyarrow.Table`): The stage's table.
            shares (sequence of `GroupDistribution`): Its categories.
        """
        if self.count and self.tables.is_on:
            prompts = top_and_bottom(table, self.count, self.groupings)
            self.tables.show(f"learnalign/prompts/{name}", prompts)
        self._show_categories(f"learnalign/categories/{name}", shares)

    def show_rolled_out(self, name: str, outcomes: Outcomes, dataset: Any) -> None:
        """Send prompts that a phase in adaptive order has rolled out so far; see [`outcome_table`].

        Args:
            name (`str`): `Phase.name`.
            outcomes (`Outcomes`): Its groups of rollouts.
            dataset (`datasets.Dataset`): The dataset, with a `prompt` column.
        """
        if self.count and self.tables.is_on:
            prompts = outcome_table(outcomes, dataset, self.count)
            self.tables.show(f"learnalign/prompts_trained/{name}", prompts)

    def show_trained(self, name: str, shares: Sequence[GroupDistribution]) -> None:
        """Send the categories that a phase has trained on."""
        self._show_categories(f"learnalign/categories_trained/{name}", shares)

    def _show_categories(self, name: str, shares: Sequence[GroupDistribution]) -> None:
        if self.count and self.tables.is_on:
            self.tables.show(name, share_table(shares))


# ---- Return value of `on_phase_end` ---------------------------------------------------------------------------------


def measured_metrics(note: MetricsNote) -> dict[str, float]:
    """Return the numbers that `on_phase_end` has returned as metrics for `report_to`."""
    metrics = {}
    for name, value in note.others.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            metrics[f"{PREFIX}phase_end/{name}"] = value
    return metrics


def measured_line(note: MetricsNote) -> str:
    """Return the log line of the numbers that `on_phase_end` has returned; empty if there are none."""
    if isinstance(note.accuracy, float):
        line = f"held-out accuracy {note.accuracy:.3f}"
        return f"{line} on {note.problems:,} problems" if note.problems else line
    named = measured_metrics(note).items()
    return ", ".join(f"{name.rsplit('/', 1)[-1]} {value:.4g}" for name, value in named)


def notable(name: str, step: int, returned: Any) -> dict[str, Any]:
    """Return the named values that are recorded for a phase.

    A value that cannot be recorded is an error before the first step, when nothing is lost by it. Later it is left out
    with a warning, since hours of training are worth more than a value.

    Args:
        name (`str`): Name of the phase, or `"base"`.
        step (`int`): Optimizer step of the current policy.
        returned: Return value of `on_phase_end`.

    Returns:
        `dict`: JSON values by name.

    Raises:
        `TypeError`: Before the first step, if a value cannot be recorded; the message has the remedy.
    """
    problem, values = None, {}
    if isinstance(returned, Mapping):
        values = {str(key): _plain(value) for key, value in returned.items()}
        foreign = [key for key, value in values.items() if not _is_json(value)]
        if foreign:
            problem = f"whose {foreign[0]!r} is a {type(values[foreign[0]]).__name__}"
        values = {key: value for key, value in values.items() if key not in foreign}
    elif returned is not None:
        problem = f"a {type(returned).__name__}"
    if problem is not None:
        message = (
            f"on_phase_end({name!r}, {step}) returned {returned!r}, {problem}: the record takes a dictionary of "
            f"numbers and strings. Return such a dictionary, e.g. {{'accuracy': 0.5}}, or None."
        )
        if step == 0:
            raise TypeError(message)
        logger.warning("%s Other values are left out.", message)
    return values


def _plain(value: Any) -> Any:
    """Convert a NumPy or torch number to a Python number."""
    is_one_number = getattr(value, "shape", None) == () and callable(getattr(value, "item", None))
    return value.item() if is_one_number else value


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


# ---- Notes about rollouts -------------------------------------------------------------------------------------------

REPEATED = 5
"""Number of prompts that are named as rolled out most often."""


CHARACTERS = 500
"""Maximum length of the text of such a prompt."""


def belief_note(step: int, outcomes: Outcomes, concentration: float) -> BeliefNote:
    """Return the calibration of the belief in a phase.

    Args:
        step (`int`): Optimizer step at the end of the phase.
        outcomes (`Outcomes`): Its groups of rollouts.
        concentration (`float`): The value in use.
    """
    held = outcomes.predictions
    predicted, right, wrong = held.predicted, held.right, held.wrong
    rollouts = int(held.judged.sum())
    bins = reliability_bins(predicted, right, wrong)
    entries = tuple(
        CalibrationBin(
            low=one.low,
            high=one.high,
            groups=one.prompts,
            rollouts=one.rollouts,
            predicted=_known(one.predicted),
            seen=_known(one.seen),
        )
        for one in bins
    )
    return BeliefNote(
        step=step,
        rollouts=rollouts,
        predicted=float(predicted @ held.judged / rollouts) if rollouts else None,
        seen=float(right.sum() / rollouts) if rollouts else None,
        brier=_known(brier_score(predicted, right, wrong)),
        auc=_known(area_under_curve(predicted, right, wrong)),
        calibration_error=_known(calibration_error(bins)),
        bins=entries,
        concentration=concentration,
    )


def _known(value: float) -> float | None:
    """Replace NaN by `None`, since JSON has no NaN."""
    return None if math.isnan(value) else value


def most_repeated(outcomes: Outcomes, dataset: Any) -> tuple[RepeatedPrompt, ...]:
    """Return the prompts that were rolled out most often, and more than once; ties in the order of rows.

    Args:
        outcomes (`Outcomes`): Groups of rollouts.
        dataset (`datasets.Dataset`): The dataset, with a `prompt` column.
    """
    rows, counts = np.unique(outcomes.rows, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:REPEATED]
    places = [place for place in order.tolist() if counts[place] > 1]
    texts = prompts_of(dataset, rows[places]) if places else []
    found = []
    for place, prompt in zip(places, texts, strict=True):
        rates = outcomes.success_rates[outcomes.rows == rows[place]]
        entry = RepeatedPrompt(
            index=int(rows[place]),
            prompt=clipped(prompt_text(prompt), CHARACTERS),
            times=int(counts[place]),
            first=_known(float(rates[0])),
            last=_known(float(rates[-1])),
        )
        found.append(entry)
    return tuple(found)
