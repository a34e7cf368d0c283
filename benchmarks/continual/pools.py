"""Pools of benchmarks on development tasks: toy tasks that the package does not have.

    python benchmarks/continual/pools.py           # the base models' success rates and lengths on them
    python benchmarks/continual/pools.py lengths   # on one of them

In `rare` and `hard` three fifths of the prompts have a success rate of a few percent; the others are in reach in
`rare`, and solved in `hard`. `lengths`: answers of one digit and of nine, equally often and about equally hard, with a
base model of its own. `large` is the package's `longtail` without strings of three digits, of which there are too few
for a pool of 20,000.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

# Run as a script, Python looks for modules beside this file only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd
from selection.cells import PUBLISHED_BASE, tasks

from continual.loop import Policy, success_rates
from trl_learnalign.toy.model import make_base_model
from trl_learnalign.toy.tasks import FAMILIES, REGIMES, Family

WORK = Path(__file__).parents[2] / "outputs" / "continual_pools"

RARE, HARD, LENGTHS, LARGE = "rare", "hard", "lengths", "large"

SHORT = {
    "largest": Family(max, lambda s: s[0], (0.5,)),
    "least": Family(min, lambda s: s[-1], (0.3,)),
    "second": Family(lambda s: s[1], lambda s: s[-1], (0.2,)),
    "last": Family(lambda s: s[-1], lambda s: s[0], (0.1,)),
}
"""Answers of one digit."""

LONG = {
    "thrice": Family(lambda s: s * 3, lambda s: s + s[::-1] + s, (0.5,)),
    "triple": Family(lambda s: "".join(digit * 3 for digit in s), lambda s: s * 3, (0.3,)),
    "echo": Family(lambda s: s[::-1] * 3, lambda s: s * 3, (0.2,)),
    "weave": Family(lambda s: s + s[::-1] + s, lambda s: s[::-1] * 3, (0.1,)),
}
"""Answers of nine digits."""

FEW_PERCENT = {"back": (0.0, 5.0), "tail": (0.0, 4.0), "unique": (0.0, 0.0, 3.0)}


def without_shortest(family: str, weight: float) -> tuple[float, ...]:
    """Weights of the lengths of a family: none for the shortest strings, equal ones for the others."""
    others = len(FAMILIES[family].competence) - 1
    return (0.0, *[weight / others] * others)


POOLS: dict[str, Mapping[str, float | tuple[float, ...]]] = {
    RARE: {**FEW_PERCENT, "rotate": 3.0, "swap": 3.0, "descend": 2.0},
    HARD: {**FEW_PERCENT, "reverse": 6.0, "ends": 2.0},
    LENGTHS: dict.fromkeys((*SHORT, *LONG), 1.0),
    LARGE: {name: without_shortest(name, weight) for name, weight in REGIMES["longtail"].items()},
}
"""Weights as in `trl_learnalign.toy.tasks.REGIMES`."""


@contextmanager
def toy_tasks(regime: str) -> Iterator[None]:
    """Have the toy tasks of a pool for a while; a regime of the package is there already.

    Args:
        regime (`str`): A key of `POOLS`, or any other.
    """
    families = {**SHORT, **LONG} if regime == LENGTHS else dict(FAMILIES)
    before = dict(FAMILIES), dict(REGIMES)
    try:
        for table, entries in ((FAMILIES, families), (REGIMES, {**REGIMES, **POOLS})):
            table.clear()
            table.update(entries)
        yield
    finally:
        for table, entries in zip((FAMILIES, REGIMES), before, strict=True):
            table.clear()
            table.update(entries)


def base_model(regime: str, folder: Path = WORK, **settings: int) -> Path:
    """The base model that runs on a pool begin with; that of `lengths` is trained once, in two minutes.

    Args:
        regime (`str`): The pool.
        folder (`Path`): Where it is kept.
        settings: Of [`trl_learnalign.toy.model.BaseModelSettings`].
    """
    if regime != LENGTHS:
        return PUBLISHED_BASE
    with toy_tasks(regime):
        return make_base_model(folder / regime, **settings)


def described(regime: str, size: int, seed: int) -> pd.DataFrame:
    """The base model's success rates and mean lengths of prompts and rollouts, by family and length of the string.

    Args:
        regime (`str`): The pool.
        size (`int`): Prompts of it.
        seed (`int`): Seed of it and of one rollout of each prompt.
    """
    policy = Policy(base_model(regime), 0.0, seed)
    with toy_tasks(regime):
        pool = tasks(regime, size, seed, "train")
    prompts, answers = policy.tokens_of(pool), list(pool["answer"])
    rollouts = policy.roll_out(range(size), prompts, answers, 1, 0)
    frame = pd.DataFrame(
        {
            "family": pool["family"],
            "digits": pool["length"],
            "rate": success_rates(policy, prompts, answers),
            "prompt": [len(prompt) for prompt in prompts],
            "completion": rollouts.generated,
        }
    )
    frame["hard"] = (frame["rate"] < 0.05).astype(float)
    by = frame.groupby(["family", "digits"])
    found = by.mean()
    found.insert(0, "prompts", by.size())
    found.loc[("all", 0), :] = [size, *frame[list(found)[1:]].mean()]
    return found.round(3)


def main() -> None:
    for regime in sys.argv[1:] or POOLS:
        print(f"{regime}\n{described(regime, 2000, 100).to_string()}")


if __name__ == "__main__":
    main()
