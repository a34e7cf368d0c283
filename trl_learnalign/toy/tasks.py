"""Small verifiable tasks: a command and a string of digits, e.g. ``sort 3142`` → ``1234``.

Twelve families of prompts, each with a *right* procedure, a typical *wrong* one, and a *competence* for every string
length: the probability with which the supervised data of the base model shows the right procedure. A base model
trained on that data holds both procedures and answers right about as often as it was shown to, so the success rate
p of a prompt is set by these tables, from trivial to hopeless. Reinforcement learning then *elicits* the right
procedure, as it does in models of full size, and does so within seconds.

Families are served through `reasoning_gym`: [`StringTask`] is one of its procedural datasets, registered under the
name ``"microcosm"``, and its `score_answer` grades.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any, TypeVar

from datasets import Dataset

try:
    from reasoning_gym.factory import DATASETS, ProceduralDataset, register_dataset
except ImportError as error:  # an optional dependency: the selection itself needs no task generator
    raise ImportError(
        "trl_learnalign.toy needs the package reasoning-gym: pip install 'trl-learnalign[quickstart]'"
    ) from error

T = TypeVar("T")

DATASET_NAME = (
    "microcosm"  # in the rows, so a new name would change the dataset digest of stored runs
)

SHORTEST = 3
"""Digits in the shortest strings: below it, right and wrong procedures agree too often."""

MAX_STRINGS = 20_000
"""Strings kept for each length. All of them up to four digits, a fixed random subset beyond."""

SPLITS = {"train": 0.6, "dev": 0.15, "heldout": 0.25}
"""Share of the strings in each split. A string belongs to one split in all families at once."""


# ---- procedures -----------------------------------------------------------------------------------------------------


def _copy(s: str) -> str:
    return s


def _reverse(s: str) -> str:
    return s[::-1]


def _ends(s: str) -> str:
    return s[0] + s[-1]


def _first_two(s: str) -> str:
    return s[:2]


def _rotate(s: str) -> str:
    return s[1:] + s[0]


def _back(s: str) -> str:
    return s[-1] + s[:-1]


def _swap(s: str) -> str:
    return "".join(s[i : i + 2][::-1] for i in range(0, len(s), 2))


def _sort(s: str) -> str:
    return "".join(sorted(s))


def _descend(s: str) -> str:
    return "".join(sorted(s, reverse=True))


def _unique(s: str) -> str:
    return "".join(dict.fromkeys(s))


def _double(s: str) -> str:
    return "".join(2 * digit for digit in s)


def _tail(s: str) -> str:
    return s[1:]


def _nines(s: str) -> str:
    return "".join(str(9 - int(digit)) for digit in s)


def _riffle(s: str) -> str:
    half = (len(s) + 1) // 2
    return "".join(s[i : i + 1] + s[half + i : half + i + 1] for i in range(half))


# ---- families -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """One kind of task.

    Args:
        right (`Callable[[str], str]`): The procedure that is graded as right.
        wrong (`Callable[[str], str]`): The typical mistake.
        competence (`tuple[float, ...]`):
            Probability that the base model's supervised data shows the right procedure, for strings of
            `SHORTEST`, `SHORTEST + 1`, … digits.
    """

    right: Callable[[str], str]
    wrong: Callable[[str], str]
    competence: tuple[float, ...]

    @property
    def lengths(self) -> range:
        """String lengths (digits) of this family."""
        return range(SHORTEST, SHORTEST + len(self.competence))

    def competence_at(self, length: int) -> float:
        """Probability that a string of `length` digits is shown with the right answer."""
        return self.competence[length - SHORTEST]


FAMILIES: dict[str, Family] = {
    # trivial
    "reverse": Family(_reverse, _copy, (0.98, 0.97, 0.96)),
    "ends": Family(_ends, _first_two, (0.98, 0.97, 0.96)),
    # within reach: the model is often right
    "rotate": Family(_rotate, _copy, (0.80, 0.70, 0.60)),
    "sort": Family(_sort, _copy, (0.80, 0.55, 0.30)),
    "swap": Family(_swap, _reverse, (0.55, 0.45)),
    "unique": Family(_unique, _copy, (0.45, 0.35, 0.25)),
    "descend": Family(_descend, _sort, (0.50, 0.35)),
    "double": Family(_double, _copy, (0.40, 0.30)),
    # rare
    "tail": Family(_tail, _copy, (0.20, 0.10)),
    "back": Family(_back, _rotate, (0.15, 0.10)),
    # hopeless: the right procedure is never shown
    "nines": Family(_nines, _copy, (0.0, 0.0)),
    "riffle": Family(_riffle, _copy, (0.0, 0.0)),
}

REGIMES: dict[str, Mapping[str, float | tuple[float, ...]]] = {
    # trivial to hopeless in grades
    "mixed": dict.fromkeys(FAMILIES, 1.0),
    # several equally frequent skills of intermediate p
    "balanced": dict.fromkeys(("swap", "unique", "descend", "double", "rotate"), 1.0),
    # mostly trivial and hopeless prompts, few that can be learned
    "sparse": {"reverse": 6.0, "swap": 1.0, "unique": 1.0, "descend": 1.0, "nines": 9.0},
    # one skill whose p falls with the length of the string; there are only a thousand strings of three digits
    "graded": {"sort": (1.0, 2.0, 2.0)},
    # many skills, most of them rare: Zipf's law
    "longtail": {
        name: 1 / rank
        for rank, name in enumerate(
            (
                "rotate",
                "swap",
                "descend",
                "unique",
                "sort",
                "double",
                "tail",
                "back",
                "reverse",
                "ends",
            ),
            start=1,
        )
    },
}
"""Weights of the families in each regime. Within a family all string lengths are equally frequent, unless there is a
weight for each of them. Every regime has pools of 2,000 prompts and 500 held-out ones."""


# ---- strings and their splits ---------------------------------------------------------------------------------------


def split_of(string: str) -> str:
    """Split a string of digits belongs to: a function of the string alone, so that splits cannot overlap.

    Args:
        string (`str`): String of digits.

    Returns:
        `str`: A key of `SPLITS`.
    """
    digest = hashlib.blake2b(string.encode(), digest_size=8).digest()
    draw = int.from_bytes(digest, "little") / 2**64
    for split, share in SPLITS.items():
        if draw < share:
            return split
        draw -= share
    return next(iter(SPLITS))  # reached by rounding only


@cache
def _split_strings(length: int) -> dict[str, tuple[str, ...]]:
    """Strings of one length by split."""
    numbers: Sequence[int] = range(10**length)
    if len(numbers) > MAX_STRINGS:
        numbers = Random(length).sample(numbers, MAX_STRINGS)
    strings: dict[str, list[str]] = {split: [] for split in SPLITS}
    for number in numbers:
        string = f"{number:0{length}d}"
        strings[split_of(string)].append(string)
    return {split: tuple(members) for split, members in strings.items()}


@cache
def strings_of(family: str, length: int, split: str) -> tuple[str, ...]:
    """Strings a family can be asked about, in a fixed order.

    Strings on which the typical mistake gives the right answer are left out (``sort 1234`` by copying), so that a
    right answer means the right procedure.

    Args:
        family (`str`): A key of `FAMILIES`.
        length (`int`): Digits of the strings.
        split (`str`): A key of `SPLITS`.

    Returns:
        `tuple[str, ...]`: The strings.

    Raises:
        ValueError: If the family or the split is unknown, or the family has no strings of this length.
    """
    procedures = _entry("family", family, FAMILIES)
    lengths = procedures.lengths
    if length not in lengths:
        raise ValueError(
            f"family {family!r} has strings of {lengths[0]} to {lengths[-1]} digits, not {length}"
        )
    _entry("split", split, SPLITS)
    members = _split_strings(length)[split]
    return tuple(s for s in members if procedures.right(s) != procedures.wrong(s))


def _entry(kind: str, name: str, table: Mapping[str, T]) -> T:
    """What stands under a name; unlike indexing, with an error that lists the names."""
    if name not in table:
        raise ValueError(f"unknown {kind} {name!r}: choose one of {', '.join(map(repr, table))}")
    return table[name]


# ---- the dataset of reasoning_gym -----------------------------------------------------------------------------------


@dataclass
class StringTaskConfig:
    """Configuration of [`StringTask`].

    Args:
        family (`str`, *optional*, defaults to `"reverse"`): A key of `FAMILIES`.
        min_length (`int`, *optional*): Digits of the shortest strings; by default the family's shortest.
        max_length (`int`, *optional*): Digits of the longest strings; by default the family's longest.
        split (`str`, *optional*, defaults to `"train"`): A key of `SPLITS`.
        size (`int`, *optional*, defaults to `100`): Number of tasks, all different.
        seed (`int`, *optional*, defaults to `0`): Decides which strings are asked about, and their order.
    """

    family: str = "reverse"
    min_length: int | None = None
    max_length: int | None = None
    split: str = "train"
    size: int = 100
    seed: int | None = 0

    def lengths(self) -> range:
        """String lengths (digits), the family's own where none are given."""
        of_family = _entry("family", self.family, FAMILIES).lengths
        shortest = of_family[0] if self.min_length is None else self.min_length
        longest = of_family[-1] if self.max_length is None else self.max_length
        return range(shortest, longest + 1)

    def validate(self) -> None:
        """Refuse what the family does not have."""
        lengths, of_family = self.lengths(), FAMILIES[self.family].lengths
        _entry("split", self.split, SPLITS)
        if not lengths or lengths[0] < of_family[0] or lengths[-1] > of_family[-1]:
            raise ValueError(
                f"family {self.family!r} has strings of {of_family[0]} to {of_family[-1]} digits, "
                f"not of {lengths.start} to {lengths.stop - 1}"
            )


class StringTask(ProceduralDataset):
    """Tasks of one family; string lengths take turns.

    Args:
        config ([`StringTaskConfig`]): Family, lengths, split, size and seed.

    Raises:
        ValueError: If `config.size` exceeds the number of different prompts.
    """

    def __init__(self, config: StringTaskConfig):
        super().__init__(config=config, seed=config.seed, size=config.size)
        lengths = config.lengths()
        counts = [len(strings_of(config.family, length, config.split)) for length in lengths]
        # Lengths take turns, so that the one with the fewest strings ends it.
        largest = len(lengths) * min(counts)
        if config.size > largest:
            raise ValueError(
                f"size={config.size}: family {config.family!r} has only {largest} different prompts of "
                f"{lengths[0]} to {lengths[-1]} digits in split {config.split!r}"
            )
        rows = math.ceil(config.size / len(lengths))
        self._columns = [self._draw(length, rows) for length in lengths]

    def _draw(self, length: int, count: int) -> list[str]:
        """Different strings of one length, in random order."""
        name, split = self.config.family, self.config.split
        strings = strings_of(name, length, split)
        return Random(f"{self.seed}/{name}/{length}/{split}").sample(strings, count)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        """Task `idx` as `reasoning_gym` has it: question, answer and metadata."""
        if not 0 <= idx < self.size:
            raise IndexError(f"task {idx} of {self.size}")
        row, column = divmod(idx, len(self._columns))
        string = self._columns[column][row]
        return {
            "question": f"{self.config.family} {string}",
            "answer": FAMILIES[self.config.family].right(string),
            "metadata": {
                "source_dataset": DATASET_NAME,
                "source_index": idx,
                "family": self.config.family,
                "string": string,
                "difficulty": {"length": len(string)},
            },
        }

    def score_answer(self, answer: str | None, entry: dict[str, Any]) -> float:
        """1.0 for the right answer and 0.0 for any other: no credit for answers that contain the right one."""
        return float(isinstance(answer, str) and answer.strip() == entry["answer"])


if DATASET_NAME not in DATASETS:  # a reloaded module must not register twice
    register_dataset(DATASET_NAME, StringTask, StringTaskConfig)


# ---- pools ----------------------------------------------------------------------------------------------------------


def build_pool(regime: str, size: int, seed: int = 0, split: str = "train") -> Dataset:
    """Pool of different prompts in the proportions of a regime.

    Args:
        regime (`str`): A key of `REGIMES`.
        size (`int`): Number of prompts.
        seed (`int`, *optional*, defaults to `0`): Decides which strings are asked about, and their order.
        split (`str`, *optional*, defaults to `"train"`):
            A key of `SPLITS`. No string occurs in two splits, and the base model has seen those of `"train"` alone.

    Returns:
        `Dataset`: Columns `prompt` (conversational), `answer`, `solution` (the expected completion), `family`,
        `length` (digits of the string) and `task` (the entry of `reasoning_gym` as JSON).

    Raises:
        ValueError: If the regime or the split is unknown, or has fewer than `size` different prompts.
    """
    weights = _cell_weights(_entry("regime", regime, REGIMES))
    capacities = [len(strings_of(family, length, split)) for family, length in weights]
    quotas = _apportion(size, list(weights.values()))
    if size < 1 or not _fit(quotas, capacities):
        largest = _largest_size(list(weights.values()), capacities)
        raise ValueError(
            f"size={size}: a pool of regime {regime!r}, split {split!r}, has 1 to {largest} prompts"
        )
    tasks: list[dict[str, Any]] = []
    for (family, length), quota in zip(weights, quotas, strict=True):
        config = StringTaskConfig(
            family, min_length=length, max_length=length, split=split, size=quota, seed=seed
        )
        tasks.extend(StringTask(config))
    Random(f"{seed}/{regime}/{split}").shuffle(tasks)
    return Dataset.from_list([_row(task) for task in tasks])


def _row(task: dict[str, Any]) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": task["question"]}],
        "answer": task["answer"],
        "solution": task["answer"],
        "family": task["metadata"]["family"],
        "length": task["metadata"]["difficulty"]["length"],
        "task": json.dumps(task),
    }


def _cell_weights(regime: Mapping[str, float | tuple[float, ...]]) -> dict[tuple[str, int], float]:
    """Weight of each (family, length): its own, or a family's weight in equal parts over its lengths."""
    weights: dict[tuple[str, int], float] = {}
    for family, weight in regime.items():
        lengths = FAMILIES[family].lengths
        parts = weight if isinstance(weight, tuple) else (weight / len(lengths),) * len(lengths)
        for length, part in zip(lengths, parts, strict=True):
            weights[family, length] = part
    return weights


def _fit(quotas: Sequence[int], capacities: Sequence[int]) -> bool:
    return all(quota <= capacity for quota, capacity in zip(quotas, capacities, strict=True))


def _apportion(size: int, weights: list[float]) -> list[int]:
    """Whole numbers that sum to `size`, proportional to `weights` by the largest remainders."""
    shares = [size * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(weights)), key=lambda i: (counts[i] - shares[i], i))
    for i in by_remainder[: size - sum(counts)]:
        counts[i] += 1
    return counts


def _largest_size(weights: list[float], capacities: list[int]) -> int:
    """Largest pool whose quotas all fit."""
    total = sum(weights)
    pairs = zip(weights, capacities, strict=True)
    bound = min(capacity * total / weight for weight, capacity in pairs)
    size = int(bound) + len(weights)  # rounding moves a quota by less than one
    while not _fit(_apportion(size, weights), capacities):
        size -= 1
    return size


# ---- grading --------------------------------------------------------------------------------------------------------

_GRADER = StringTask(StringTaskConfig(size=1))


def accuracy_reward(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
    """Reward function for TRL's trainers: 1.0 where the completion is the answer, else 0.0.

    Args:
        completions (`list`): Conversations (`[{"role": "assistant", "content": ...}]`) or plain strings.
        answer (`list[str]`): The right answer to each.
        **kwargs: The dataset's other columns and the trainer's own arguments, which are not needed.

    Returns:
        `list[float]`: One reward for each completion.
    """
    texts = [
        completion if isinstance(completion, str) else completion[-1]["content"]
        for completion in completions
    ]
    pairs = zip(texts, answer, strict=True)
    return [_GRADER.score_answer(text, {"answer": right}) for text, right in pairs]
