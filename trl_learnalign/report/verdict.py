"""What a comparison shows, in one sentence with its intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trl_learnalign.report.run import Run
from trl_learnalign.report.variants import Variant
from trl_learnalign.statistics import (
    Estimate,
    compare_paired,
    difference_in_words,
    difference_of_shares,
    difference_over_seeds,
    mean_over_seeds,
)

FEW = 3
"""Variants that one sentence can set against each other in full, and that fit side by side."""

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
