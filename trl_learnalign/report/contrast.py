"""Groups runs by configuration, and states what a comparison shows."""

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

from trl_learnalign import markup
from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.intervals import (
    Estimate,
    compare_paired,
    difference_in_words,
    difference_of_shares,
    difference_over_seeds,
    mean_over_seeds,
)
from trl_learnalign.records.export import Accuracy
from trl_learnalign.records.layout import to_json
from trl_learnalign.records.run import RunContents
from trl_learnalign.report.run import Run

SEEDS = ("seed", "selection_seed")
_PLACES = ("record_dir",)
_AMOUNTS = ("compute_budget",)  # of another seed's run, say; what was spent is a column of its own

_TELLING = ("selector", "order", "stages")
"""The most informative settings, which come first among those that differ."""

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
    return markup.setting(value[0] if is_single else value)


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


# ---- Verdict --------------------------------------------------------------------------------------------------------

FEW = 3
"""Maximum number of variants that one sentence compares in full, and that fit side by side."""

_NO_SPREAD = "how far other seeds would differ is not known"
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Contrast:
    """The difference of two variants.

    Args:
        difference (`Estimate`): Final accuracy of the second minus that of the first.
        basis (`str`): What it is over, in words.
    """

    difference: Estimate
    basis: str

    @property
    def points(self) -> str:
        """The difference and its interval, in percentage points."""
        found = self.difference
        return f"{100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def contrast(first: Variant, second: Variant) -> Contrast | None:
    """The difference of two variants, paired as far as it goes: by seed, else by problem, else not at all.

    Several seeds come first: over problems alone, the luck of training would be taken for a difference. Where all
    pairs of seeds differ by the same, which a few problems bring about, their spread is no measure, and problems are.

    Args:
        first (`Variant`): What is compared with.
        second (`Variant`): What is compared.

    Returns:
        `Contrast`: `None` if one has no accuracy.
    """
    if not first.seeds or not second.seeds:
        return None
    shared = [seed for seed in first.seeds if seed in second.seeds]
    differences = [second.seeds[seed] - first.seeds[seed] for seed in shared]
    if _varies(differences):
        return Contrast(mean_over_seeds(differences), f"paired over {len(shared)} seeds")
    ours = list(first.seeds.values())
    theirs = list(second.seeds.values())
    if _varies(ours) and _varies(theirs) and len(shared) < 2:
        difference = difference_over_seeds(ours, theirs)
        return Contrast(difference, f"over {len(ours)} and {len(theirs)} seeds, not paired")
    if _same_problems(first, second):
        paired = compare_paired(_by_problem(first.runs), _by_problem(second.runs))
        basis = f"{paired.problems:,} paired problems, McNemar p = {paired.p_value:.2g}"
        return Contrast(paired.difference, f"{basis}; {_NO_SPREAD}")
    assert first.accuracy is not None
    assert second.accuracy is not None
    difference = difference_of_shares(first.accuracy, second.accuracy)
    return Contrast(difference, f"not paired; {_NO_SPREAD}")


def _varies(values: Sequence[float]) -> bool:
    """Whether an interval over seeds can be had: it takes two, and some spread."""
    return len(values) > 1 and np.ptp(values) > _ROUNDING


def _by_problem(runs: Sequence[Run]) -> list[float]:
    """Mean final accuracy on each problem."""
    finals = [run.final_accuracy for run in runs]
    outcomes = [final.right for final in finals if final is not None]
    by_problem = np.mean(outcomes, axis=0)
    return by_problem.tolist()


def _same_problems(first: Variant, second: Variant) -> bool:
    """Whether all runs have kept their results on each problem, of the same ones."""
    kept = set()
    for run in (*first.runs, *second.runs):
        final = run.final_accuracy
        if final is not None:
            kept.add((final.problem_set, len(final.right)))
    if len(kept) != 1:
        return False
    problem_set, count = kept.pop()
    return problem_set is not None and count > 0


def conclusion(variants: Sequence[Variant], notes: Sequence[str]) -> str:
    """One sentence: each other variant against the first, with interval and relative compute; of many, who is ahead.

    Args:
        variants (sequence of `Variant`): The first is what the others are compared with.
        notes (sequence of `str`): Why the runs cannot be compared, if they cannot.
    """
    if notes:
        return f"No conclusion, for {notes[0][0].lower()}{notes[0][1:]}"
    first, *others = variants
    if not others:
        return _of_one(first)
    found = {}
    for second in others:
        difference = contrast(first, second)
        if difference is None:
            return "No conclusion, for held-out accuracy was not measured in every run."
        found[second.name] = difference
    if len(variants) > FEW:
        return _of_many(first, found)
    bases = [found[second.name].basis for second in others]
    reserve = ""
    if len(bases) > 1 and all(basis.endswith(_NO_SPREAD) for basis in bases):
        # What holds for all is said once.
        bases = [basis.removesuffix(f"; {_NO_SPREAD}") for basis in bases]
        reserve = f" {_NO_SPREAD[0].upper()}{_NO_SPREAD[1:]}."
    clauses = []
    for second, basis in zip(others, bases, strict=True):
        relation = difference_in_words(found[second.name].difference)
        clause = f"{second.name} {relation} {first.name} ({basis})"
        clauses.append(clause + _at_compute(first, second))
    return "; ".join(clauses) + "." + reserve


def _of_many(first: Variant, found: Mapping[str, Contrast]) -> str:
    """Who is ahead of the first and who behind, beyond the interval of each."""
    ahead = []
    behind = []
    for name, each in found.items():
        if each.difference.low > 0:
            ahead.append(f"{name} ({each.points} points)")
        elif each.difference.high < 0:
            behind.append(f"{name} ({each.points} points)")
    unclear = len(found) - len(ahead) - len(behind)
    if unclear == len(found):
        return f"None of the {unclear} others shows a difference from {first.name}."
    clauses = []
    if ahead:
        clauses.append(f"ahead of {first.name}: {', '.join(ahead)}")
    if behind:
        clauses.append(
            f"behind it: {', '.join(behind)}"
            if ahead
            else f"behind {first.name}: {', '.join(behind)}"
        )
    clauses.append(f"no difference shown: {unclear} of {len(found)}")
    clauses.append("one interval in twenty misses by chance")
    sentence = "; ".join(clauses)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _of_one(variant: Variant) -> str:
    if variant.accuracy is None:
        return "No conclusion, for held-out accuracy was not measured."
    return f"Nothing differs but seeds: the {len(variant.runs)} runs reach {variant.accuracy} over {variant.basis}."


def _at_compute(first: Variant, second: Variant) -> str:
    """Compute and time of the second as multiples of those of the first, as far as they are known."""
    found = []
    for name, figure in (("compute", compute_of), ("time", seconds_of)):
        ours = first.mean(figure)
        theirs = second.mean(figure)
        if ours and theirs:
            found.append(f"{theirs / ours:.2f} times the {name}")
    return f", at {' and '.join(found)}" if found else ""


def compute_of(run: Run) -> float | None:
    """Compute of a run, scoring included, in tokens of a forward pass; `None` if it kept no ledger."""
    return run.ledger.compute(run.ledger.total) if run.ledger.entries else None


def seconds_of(run: Run) -> float | None:
    """Seconds of scoring and training; `None` if it kept no ledger."""
    return run.ledger.total.seconds if run.ledger.entries else None
