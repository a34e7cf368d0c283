"""Groups runs by configuration, and states the result of a comparison."""

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
from trl_learnalign.records.layout import to_json
from trl_learnalign.records.run_record import RunContents
from trl_learnalign.records.summary import Accuracy
from trl_learnalign.report.run_data import Run

SEEDS = ("seed", "selection_seed")
_PLACES = ("record_dir",)
_AMOUNTS = ("compute_budget",)  # e.g. that of another seed's run; compute has its own column

_TELLING = ("selector", "order", "stages")
"""The most informative settings, which come first among those that differ."""

_OF_SELECTION = (
    *("selector", "reselect", "on_shortfall", "zero_learnability", "skip_forced_scoring"),
    *("unbiased_learnability", "exclude_self", "reliability", "pool_sample", "gradient_rollouts"),
    *("rollout_budget", "budget_rounds", "budget_exponent", "scoring_batch_prompts", "shard_size"),
)
"""Settings without effect on a run that selects nothing."""

_ORDERS = {
    "adaptive": "adaptive order",
    "trainer": "the trainer's own order",
    "shuffled": "shuffled",
}
_SELECTORS = {"learnalign": "LearnAlign"}

Differences = list[tuple[str, list[Any]]]


@dataclass(frozen=True)
class Variant:
    """Runs of one configuration, which differ only in their seeds.

    Args:
        name (`str`): Method and folder, "adaptive order, skipping (outputs/adaptive)", followed by the settings that
            distinguish it from other variants with the same method.
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
        """Names of its runs' folders; of many, the first and the last."""
        return _folders(self.runs, 1)

    @cached_property
    def _finals(self) -> list[Accuracy]:
        finals = [run.final_accuracy for run in self.runs]
        return [final for final in finals if final is not None]

    @cached_property
    def by_seed(self) -> dict[int, list[float]]:
        """Final accuracies of the runs, grouped by training seed."""
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
        """Final accuracy with its interval over seeds, or over problems for one seed; `None` if not measured."""
        return estimate_of(self._finals) if self._finals else None

    @property
    def basis(self) -> str:
        """The sampling unit of the interval, which determines what it covers."""
        if not self._finals:
            return ""
        if len(self._finals) > 1:
            return f"{len(self._finals)} runs"
        (only,) = self._finals
        return f"{only.count:,} problems"

    def mean(self, figure: Callable[[Run], float | None]) -> float | None:
        """Mean of a figure over the runs that have it; `None` if none has.

        Args:
            figure (callable): Maps a run to the figure.
        """
        figures = [figure(run) for run in self.runs]
        known = [each for each in figures if each is not None]
        return fmean(known) if known else None

    def curve(
        self, place: Callable[[Run, Accuracy], float | None]
    ) -> tuple[list[float], list[Estimate]]:
        """Positions and accuracy estimates after each phase that all its runs have measured.

        Args:
            place (callable): Maps a run and a measurement to its x value; `None` omits the phase.
        """
        places = []
        estimates = []
        of_runs = [run.accuracies for run in self.runs]
        # An unfinished run ends the line of its variant.
        for measured in zip(*of_runs, strict=False):
            found = list(map(place, self.runs, measured))
            known = [each for each in found if each is not None]
            if len(known) < len(found):
                continue
            places.append(fmean(known))
            estimates.append(estimate_of(measured))
        return places, estimates


def estimate_of(measured: Sequence[Accuracy]) -> Estimate:
    """Accuracy of one run with an interval over problems, or the mean of several runs with an interval over runs.

    Runs with identical accuracy get the interval of a single run.

    Args:
        measured (sequence of `Accuracy`): At least one.
    """
    values = [accuracy.value for accuracy in measured]
    if np.ptp(values) > 0:
        return mean_over_seeds(values)
    # One run, or several that agree by chance (or before training); a zero-width interval would be misleading.
    low, high = measured[0].interval
    return Estimate(values[0], low, high)


def variants_of(runs: Sequence[Run]) -> tuple[list[Variant], Differences]:
    """Group runs by configuration, in the order of the runs, and find the settings that differ.

    Args:
        runs (sequence of `Run`): The runs.

    Returns:
        `tuple`: The variants; and for each differing setting its value in each variant.
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
    left_out = {*SEEDS, *_PLACES, *_AMOUNTS, *_without_effect(contents)}
    for settings in (contents.config, to_json(contents.trainer)):
        kept = {}
        for name, value in settings.items():
            if name not in left_out:
                kept[name] = value
        parts.append(kept)
    return parts


def _without_effect(contents: RunContents) -> set[str]:
    """Settings that have no effect on a run: of the selection, or of the belief, where there is none."""
    names = set() if contents.selects else set(_OF_SELECTION)
    if "adaptive" not in contents.orders and contents.config.get("rollout_budget") is None:
        names |= {name for name in contents.config if name.startswith("adaptive_")}
    return names


def _differences(contents: Sequence[RunContents]) -> Differences:
    """Settings that differ between the runs on which they have an effect; `None` for the other runs."""
    parts = []
    for each in contents:
        configuration = _configuration(each)
        parts.append([*configuration, each.versions])
    unused = [_without_effect(each) for each in contents]
    differences = []
    for settings in zip(*parts, strict=True):
        names = dict.fromkeys(itertools.chain.from_iterable(settings))
        for name in names:
            values = [of_run.get(name) for of_run in settings]
            used = [value for value, names in zip(values, unused, strict=True) if name not in names]
            if any(value != used[0] for value in (values if name in _TELLING else used)):
                differences.append((name, values))
    # The sort is stable and keeps the order of the other settings.
    return sorted(differences, key=_place)


def setting_shown(value: Any) -> str:
    """A setting as text; a list with one element, a setting for all stages, is shown as that element.

    Args:
        value: The setting; `None` where it is not set or has no effect.
    """
    if value is None:
        return "–"
    is_single = isinstance(value, list) and len(value) == 1
    return markup.setting(value[0] if is_single else value)


def _place(difference: tuple[str, list[Any]]) -> int:
    name, _ = difference
    return _TELLING.index(name) if name in _TELLING else len(_TELLING)


def _names(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Method and folder of each group, and the minimal settings that distinguish groups with the same method."""
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
    """The method of a run, in words: its selector, training order, and whether rows were skipped.

    Args:
        contents (`RunContents`): The run.
    """
    is_shuffled = contents.orders == ["shuffled"]
    orders = ", then ".join(_ORDERS.get(order, order) for order in dict.fromkeys(contents.orders))
    parts = []
    if contents.selects:
        name = _SELECTORS.get(contents.selector, contents.selector)
        is_staged = is_shuffled and contents.config["stages"] == LearnAlignConfig().stages
        stages = contents.plan.stages
        if is_staged:
            name += ", the paper's stages"
        elif len(stages) == 1:
            name += f", {stages[0].size:,} prompts"
        parts.append(name)
        parts += [] if is_shuffled else [orders]
    else:
        parts.append("the whole pool, shuffled" if is_shuffled else orders)
    if contents.config.get("skip_zero_advantages"):
        parts.append("skipping")
    return ", ".join(parts)


def _places(folders: Sequence[Path]) -> int:
    """The number of trailing path components that distinguish the folders."""
    resolved = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, resolved))):
        if len({parts[-count:] for parts in resolved}) == len(set(resolved)):
            return count
    return max(map(len, resolved))


def _folders(runs: Sequence[Run], parts: int) -> str:
    """Trailing path components of the runs' folders; of many, the first and the last."""
    names = ["/".join(run.output_dir.resolve().parts[-parts:]) for run in runs]
    return f"{names[0]} … {names[-1]}" if len(names) > 2 else ", ".join(names)


def _apart(groups: Sequence[Sequence[Run]]) -> list[str]:
    """The minimal differing settings that distinguish groups; empty for a single group."""
    found = [""] * len(groups)
    for setting, values in _differences([group[0].contents for group in groups]):
        longer = []
        for words, value in zip(found, values, strict=True):
            shown = f"{setting} {setting_shown(value)}"
            longer.append(f"{words}, {shown}" if words else shown)
        # A setting that distinguishes no further groups is omitted.
        if len(set(longer)) > len(set(found)):
            found = longer
    return found


# ---- Conclusion -----------------------------------------------------------------------------------------------------

FEW = 3
"""Maximum number of variants that one sentence compares in full, and that fit side by side."""

_NO_SPREAD = "the spread over seeds is unknown"
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Contrast:
    """The difference between two variants.

    Args:
        difference (`Estimate`): Final accuracy of the second minus that of the first.
        basis (`str`): The sampling unit of the interval, in words.
    """

    difference: Estimate
    basis: str

    @property
    def points(self) -> str:
        """The difference and its interval, in percentage points."""
        found = self.difference
        return f"{100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def contrast(first: Variant, second: Variant) -> Contrast | None:
    """The difference between two variants, paired by seed if possible, else by problem, else unpaired.

    Seeds have priority, because over problems alone the randomness of training would appear as a difference. If all
    pairs of seeds have the same difference, which happens with few problems, their spread is not informative, and
    problems are used.

    Args:
        first (`Variant`): The reference.
        second (`Variant`): The variant compared with it.

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
    """Whether an interval over seeds is possible, which requires two values and some spread."""
    return len(values) > 1 and np.ptp(values) > _ROUNDING


def _by_problem(runs: Sequence[Run]) -> list[float]:
    """Mean final accuracy on each problem."""
    finals = [run.final_accuracy for run in runs]
    outcomes = [final.right for final in finals if final is not None]
    by_problem = np.mean(outcomes, axis=0)
    return by_problem.tolist()


def _same_problems(first: Variant, second: Variant) -> bool:
    """Whether all runs have recorded results per problem, for the same problems."""
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
    """One sentence that compares each other variant with the first, with interval and relative compute.

    For many variants, the sentence names those that are ahead and behind.

    Args:
        variants (sequence of `Variant`): The others are compared with the first.
        notes (sequence of `str`): Why the runs cannot be compared, if so.
    """
    if notes:
        return f"No conclusion: {notes[0][0].lower()}{notes[0][1:]}"
    first, *others = variants
    if not others:
        return _of_one(first)
    found = {}
    for second in others:
        difference = contrast(first, second)
        if difference is None:
            return "No conclusion: held-out accuracy was not measured in every run."
        found[second.name] = difference
    if len(variants) > FEW:
        return _of_many(first, found)
    bases = [found[second.name].basis for second in others]
    reserve = ""
    if len(bases) > 1 and all(basis.endswith(_NO_SPREAD) for basis in bases):
        # A remark that applies to all is stated once.
        bases = [basis.removesuffix(f"; {_NO_SPREAD}") for basis in bases]
        reserve = f" {_NO_SPREAD[0].upper()}{_NO_SPREAD[1:]}."
    clauses = []
    for second, basis in zip(others, bases, strict=True):
        relation = difference_in_words(found[second.name].difference)
        clause = f"{second.name} {relation} {first.name} ({basis})"
        clauses.append(clause + _at_compute(first, second))
    return "; ".join(clauses) + "." + reserve


def _of_many(first: Variant, found: Mapping[str, Contrast]) -> str:
    """The variants that are ahead of or behind the first, with an interval that excludes 0."""
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
        return "No conclusion: held-out accuracy was not measured."
    return f"Only the seeds differ: the {len(variant.runs)} runs reach {variant.accuracy} over {variant.basis}."


def _at_compute(first: Variant, second: Variant) -> str:
    """Compute and time of the second as multiples of the first, as far as known."""
    found = []
    for name, figure in (("compute", compute_of), ("time", seconds_of)):
        ours = first.mean(figure)
        theirs = second.mean(figure)
        if ours and theirs:
            found.append(f"{theirs / ours:.2f} times the {name}")
    return f", at {' and '.join(found)}" if found else ""


def compute_of(run: Run) -> float | None:
    """Compute of a run, scoring included, in tokens of a forward pass; `None` if it has no ledger."""
    return run.ledger.compute(run.ledger.total) if run.ledger.entries else None


def seconds_of(run: Run) -> float | None:
    """Seconds of scoring and training; `None` if the run has no ledger."""
    return run.ledger.total.seconds if run.ledger.entries else None
