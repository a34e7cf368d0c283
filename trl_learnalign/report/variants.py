"""Runs grouped by their configuration: what differs in nothing but seeds is one variant, with mean and interval."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.records.contents import RunContents
from trl_learnalign.records.entries import to_json
from trl_learnalign.report import text
from trl_learnalign.report.run import Accuracy, Run
from trl_learnalign.statistics import Estimate, mean_over_seeds

SEEDS = ("seed", "selection_seed")
_PLACES = ("record_dir",)
_AMOUNTS = ("compute_budget",)  # of another seed's run, say; what was spent is a column of its own

_TELLING = ("selector", "order", "stages")
"""Settings that tell the most, and stand first among those that differ."""

_ORDERS = {
    "adaptive": "adaptive order",
    "trainer": "the trainer's own order",
    "shuffled": "shuffled",
}
_SELECTORS = {"learnalign": "LearnAlign"}

Differences = list[tuple[str, list[Any]]]


@dataclass(frozen=True)
class Variant:
    """Runs of one configuration, which differ in their seeds alone.

    Args:
        name (`str`): Method and folder, "adaptive order, skipping (outputs/adaptive)"; after them the settings that
            set it apart from others of its method.
        runs (`list[Run]`): At least one.
    """

    name: str
    runs: list[Run]

    @property
    def contents(self) -> RunContents:
        """`run.json` of its first run."""
        return self.runs[0].contents

    @property
    def folders(self) -> str:
        """Names of its runs' folders, the first and the last of many."""
        return _folders(self.runs, 1)

    @cached_property
    def _finals(self) -> list[Accuracy]:
        finals = [run.final_accuracy for run in self.runs]
        return [final for final in finals if final is not None]

    @cached_property
    def by_seed(self) -> dict[int, list[float]]:
        """Final accuracies of the runs with each seed of training."""
        found: dict[int, list[float]] = {}
        for run in self.runs:
            final = run.final_accuracy
            if final is not None:
                values = found.setdefault(run.seed, [])
                values.append(final.value)
        return found

    @cached_property
    def seeds(self) -> dict[int, float]:
        """Final accuracy by seed; runs that repeat a seed are averaged."""
        return {seed: fmean(values) for seed, values in self.by_seed.items()}

    @cached_property
    def accuracy(self) -> Estimate | None:
        """Final accuracy: over seeds if there are several, else over problems; `None` if it was not measured."""
        return estimate_of(self._finals) if self._finals else None

    @property
    def basis(self) -> str:
        """What the interval is over, and so what it covers."""
        if not self._finals:
            return ""
        if len(self._finals) > 1:
            return f"{len(self._finals)} runs"
        (only,) = self._finals
        return f"{only.count:,} problems"

    def mean(self, figure: Callable[[Run], float | None]) -> float | None:
        """Mean of a figure over the runs that have it; `None` if none has.

        Args:
            figure (callable): Run → figure.
        """
        figures = [figure(run) for run in self.runs]
        known = [each for each in figures if each is not None]
        return fmean(known) if known else None

    def curve(
        self, place: Callable[[Run, Accuracy], float | None]
    ) -> tuple[list[float], list[Estimate]]:
        """Places and estimates of the accuracy after each phase that all its runs have measured.

        Args:
            place (callable): Where a measurement of a run lies; `None` leaves the phase out.
        """
        places = []
        estimates = []
        of_runs = [run.accuracies for run in self.runs]
        # A run that is not finished ends its variant's line.
        for measured in zip(*of_runs, strict=False):
            found = list(map(place, self.runs, measured))
            known = [each for each in found if each is not None]
            if len(known) < len(found):
                continue
            places.append(fmean(known))
            estimates.append(estimate_of(measured))
        return places, estimates


def estimate_of(measured: Sequence[Accuracy]) -> Estimate:
    """Accuracy of one run with an interval over problems, or the mean of several with one over runs.

    Runs that agree to the last problem have that of one run.

    Args:
        measured (sequence of `Accuracy`): At least one.
    """
    values = [accuracy.value for accuracy in measured]
    if np.ptp(values) > 0:
        return mean_over_seeds(values)
    # One run, or several that agree by chance (or before training): that is no certainty.
    low, high = measured[0].interval
    return Estimate(values[0], low, high)


def variants_of(runs: Sequence[Run]) -> tuple[list[Variant], Differences]:
    """Runs by configuration, in the order in which they came, and what differs between the configurations.

    Args:
        runs (sequence of `Run`): The runs.

    Returns:
        `tuple`: The variants; and of each setting that is not the same everywhere its value in each of them.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        configuration = _configuration(run.contents)
        key = json.dumps(configuration, sort_keys=True, default=str)
        group = groups.setdefault(key, [])
        group.append(run)
    members = list(groups.values())
    differences = _differences([group[0].contents for group in members])
    names = _names(members)
    variants = [Variant(name, group) for name, group in zip(names, members, strict=True)]
    return variants, differences


def _configuration(contents: RunContents) -> list[Mapping[str, Any]]:
    parts: list[Mapping[str, Any]] = []
    for settings in (contents.config, to_json(contents.trainer)):
        kept = {}
        for name, value in settings.items():
            if name not in (*SEEDS, *_PLACES, *_AMOUNTS):
                kept[name] = value
        parts.append(kept)
    return parts


def _differences(contents: Sequence[RunContents]) -> Differences:
    parts = []
    for each in contents:
        configuration = _configuration(each)
        parts.append([*configuration, each.versions])
    differences = []
    for settings in zip(*parts, strict=True):
        names = dict.fromkeys(itertools.chain.from_iterable(settings))
        for name in names:
            values = [of_run.get(name) for of_run in settings]
            others = [value for value in values if value != values[0]]
            if others:
                differences.append((name, values))
    # Sorting keeps the order of the others.
    return sorted(differences, key=_place)


def setting_shown(value: Any) -> str:
    """A setting as text; of a list of one, a setting of all stages, what it holds.

    Args:
        value: The setting.
    """
    is_single = isinstance(value, list) and len(value) == 1
    return text.setting(value[0] if is_single else value)


def _place(difference: tuple[str, list[Any]]) -> int:
    name, _ = difference
    return _TELLING.index(name) if name in _TELLING else len(_TELLING)


def _names(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Method and folder of each group, and as few settings as tell those of one method apart."""
    methods = [method_of(group[0].contents) for group in groups]
    places = _places([run.output_dir for group in groups for run in group])
    names = []
    for group, method in zip(groups, methods, strict=True):
        alike = [other for other, its in zip(groups, methods, strict=True) if its == method]
        apart = _apart(alike)[alike.index(group)]
        folders = _folders(group, places)
        names.append(f"{method} ({folders}; {apart})" if apart else f"{method} ({folders})")
    return names


def method_of(contents: RunContents) -> str:
    """What a run did, in words: what chose its prompts, in which order they came, whether rows were skipped.

    Args:
        contents (`RunContents`): The run.
    """
    is_shuffled = contents.orders == ["shuffled"]
    orders = ", then ".join(_ORDERS.get(order, order) for order in dict.fromkeys(contents.orders))
    parts = []
    if contents.selects:
        name = _SELECTORS.get(contents.selector, contents.selector)
        is_staged = is_shuffled and contents.config["stages"] == LearnAlignConfig().stages
        parts.append(f"{name}, the paper's stages" if is_staged else name)
        parts += [] if is_shuffled else [orders]
    else:
        parts.append("the whole pool, shuffled" if is_shuffled else orders)
    if contents.config.get("skip_zero_advantages"):
        parts.append("skipping")
    return ", ".join(parts)


def _places(folders: Sequence[Path]) -> int:
    """How many of the last parts of their paths tell folders apart."""
    resolved = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, resolved))):
        if len({parts[-count:] for parts in resolved}) == len(set(resolved)):
            return count
    return max(map(len, resolved))


def _folders(runs: Sequence[Run], parts: int) -> str:
    """The last parts of the paths of the runs' folders, the first and the last of many."""
    names = ["/".join(run.output_dir.resolve().parts[-parts:]) for run in runs]
    return f"{names[0]} … {names[-1]}" if len(names) > 2 else ", ".join(names)


def _apart(groups: Sequence[Sequence[Run]]) -> list[str]:
    """As few differing settings as tell groups apart; nothing of a group that is alone."""
    found = [""] * len(groups)
    for setting, values in _differences([group[0].contents for group in groups]):
        longer = []
        for words, value in zip(found, values, strict=True):
            shown = f"{setting} {setting_shown(value)}"
            longer.append(f"{words}, {shown}" if words else shown)
        # What tells no more of them apart is left out.
        if len(set(longer)) > len(set(found)):
            found = longer
    return found
