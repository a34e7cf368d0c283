"""Declaration of settings: a dataclass field with its help, a check of its value, and checks across settings."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

Check = Callable[[str, Any], Any]
"""`check(name, value)` returns the value to use, or raises a `ValueError` with setting, value and remedy."""

MOST = 10**9
"""Default maximum of whole numbers: larger than any number of prompts, steps or tokens of a run."""

ORDERS = ("auto", "shuffled", "adaptive", "trainer")
"""Orders of training that a stage can have."""

SELECTOR_NAMES = (
    "learnalign",
    "learnalign_coverage",
    "learnalign_logdet",
    "learnability",
    "alignment",
    "gradient_dot",
    "validation_alignment",
    "feature_similarity",
    "random",
    "token_length",
    "ppl_top",
    "ppl_middle",
    "ifd",
    "selectit",
    "limr",
    "reward_variance",
)
"""Names in `trl_learnalign.selectors.SELECTORS`, repeated here so that typos fail at construction."""


def setting(default: Any, text: str) -> Any:
    """Declare a setting.

    Args:
        default: Default value; a list is copied for each object.
        text (`str`): Text for `--help` and docs/configuration.md.
    """
    metadata = {"help": text}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class Settings:
    """Base class of settings: the declared type of each field decides how its value is checked ([`check_of`]).

    Raises:
        `ValueError`: At construction, if a value is invalid, naming the setting, its value and the remedy.
    """

    SECTIONS: ClassVar[dict[str, str]] = {}
    """First setting of each section → its title, for `--help` and docs/configuration.md."""

    def __post_init__(self) -> None:
        # `field.type` is not used, since transformers' parser overwrites it with a type without `Annotated`.
        kinds = get_type_hints(type(self), include_extras=True)
        for field in dataclasses.fields(self):
            check = check_of(kinds[field.name])
            setattr(self, field.name, check(field.name, getattr(self, field.name)))
        self._check_together()

    def _check_together(self) -> None:
        """Check settings against each other; an override calls `super()` first."""


def sections_of(config: type[Settings]) -> dict[str, list[str]]:
    """Return the titles of the settings' sections, with the names of the settings in each, in order.

    Args:
        config (`type`): `LearnAlignConfig`, or a similar class; the first setting begins a section.
    """
    sections: dict[str, list[str]] = {}
    title = ""
    for field in dataclasses.fields(config):
        title = config.SECTIONS.get(field.name, title)
        sections.setdefault(title, []).append(field.name)
    return sections


def check_of(kind: Any) -> Check:
    """Return the check of a setting, by its declared type.

    Args:
        kind: `Annotated[type, check]` names its check; `Literal[...]`, `bool`, `float`, `str` and `str | None` have
            default checks. A type that allows `None` is checked for all other values.

    Raises:
        `TypeError`: If there is no check for the type.
    """
    if get_origin(kind) is Annotated:
        plain, check = get_args(kind)
        return optional(check) if type(None) in get_args(plain) else check
    if get_origin(kind) is Literal:
        return one_of(get_args(kind))
    if kind == str | None:
        return optional(text)
    if kind not in _CHECKS:
        raise TypeError(
            f"{kind}: declare the setting as Annotated[type, check], with a check of config/fields.py."
        )
    return _CHECKS[kind]


def optional(check: Check) -> Check:
    """Allow `None`, or what the check allows."""

    def check_unless_none(name: str, value: Any) -> Any:
        return None if value is None else check(name, value)

    return check_unless_none


def shown(value: Any) -> str:
    """Return any value as text for messages: at most 200 characters."""
    try:
        whole = repr(value)
    except Exception:  # an integer with more digits than Python prints, or an object of the user's
        whole = f"<{type(value).__name__}>"
    return whole if len(whole) <= 200 else f"{whole[:197]}..."


def at_least(least: int, most: int = MOST) -> Check:
    """Allow a whole number from `least` to `most`, as an `int`; texts and floats with such a value are converted."""

    def check_whole(name: str, value: Any) -> int:
        try:
            number = int(value)
            is_whole = not isinstance(value, bool | bytes | bytearray) and number == float(value)
        except (TypeError, ValueError, OverflowError):
            is_whole = False
        if not is_whole or number < least:
            raise ValueError(f"{name}={shown(value)}: give a whole number of at least {least}.")
        if number > most:
            raise ValueError(f"{name}={shown(value)}: give a whole number of at most {most:,}.")
        return number

    return check_whole


def each(check: Check, may_be_empty: bool = False) -> Check:
    """Allow a list of values that the check allows; a single value becomes a list."""

    def check_each(name: str, value: Any) -> list[Any]:
        values = as_list(value)
        if not values and not may_be_empty:
            raise ValueError(f"{name}={shown(value)} is empty: give at least one value.")
        return [check(name, item) for item in values]

    return check_each


def one_of(choices: Sequence[str]) -> Check:
    """Allow one of these texts."""

    def check_choice(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(
                f"{name}={shown(value)}: choose one of {', '.join(map(repr, choices))}."
            )
        return value

    return check_choice


def switch(name: str, value: Any) -> bool:
    """Allow true or false, and no text that resembles them: YAML reads `off` as a boolean, but `"off"` as a text."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={shown(value)}: give true or false.")
    return value


def number(name: str, value: Any) -> float:
    """Allow a finite number; returns a Python number."""
    try:
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        is_number = is_number and math.isfinite(value)
    except OverflowError:
        is_number = False
    if not is_number:
        raise ValueError(f"{name}={shown(value)}: give a number.")
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def ranged(least: float, most: float) -> Check:
    """Allow a number from `least` to `most`."""

    def check_range(name: str, value: Any) -> float:
        given = number(name, value)
        if given < least:
            raise ValueError(f"{name}={shown(value)}: give a number of at least {least:g}.")
        if given > most:
            raise ValueError(f"{name}={shown(value)}: give a number of at most {most:g}.")
        return given

    return check_range


def interval(name: str, value: Any) -> list[float]:
    """Allow two numbers, the second above the first."""
    ends = [number(name, end) for end in as_list(value)]
    if len(ends) != 2 or not ends[0] < ends[1]:
        raise ValueError(
            f"{name}={shown(value)}: give the lowest and the highest value, e.g. [0, 1]."
        )
    return ends


def share(name: str, value: Any) -> float:
    """Allow a share from 0 to 1."""
    given = number(name, value)
    if not 0 <= given <= 1:
        raise ValueError(f"{name}={shown(value)}: give a share from 0 to 1.")
    return given


def decay(name: str, value: Any) -> float:
    """Allow a share above 0 and at most 1."""
    given = number(name, value)
    if not 0 < given <= 1:
        raise ValueError(f"{name}={shown(value)}: give a number above 0 and at most 1.")
    return given


def text(name: str, value: Any) -> str:
    """Allow a text that can be written to a file, since records contain it."""
    if not isinstance(value, str):
        raise ValueError(f"{name}={shown(value)}: give a string.")
    if not value.strip() or not _is_writable(value):
        raise ValueError(f"{name}={shown(value)}: give a text with visible characters.")
    return value


def _is_writable(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in value


def is_function_path(value: str) -> bool:
    """Whether a text may name a function: `"package.module:function"`, or with a dot instead of the colon."""
    module, _, attribute = value.rpartition(":" if ":" in value else ".")
    return all(part.isidentifier() for part in (*module.split("."), attribute))


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return the end of a sentence about an unknown name: the nearest known name, or an empty text.

    Args:
        name (`str`): The given name.
        names (iterable of `str`): The known names.
    """
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {near[0]}?" if near else "."


def as_list(value: Any) -> list[Any]:
    """Return a list of the values: a scalar in YAML (`stages: 1000`) is not converted for a setting that is a list."""
    is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)
    return list(value) if is_list else [value]


def shares(name: str, value: Any) -> list[Any]:
    """Allow sizes of stages: all fractions (up to 1, as floats) or all counts (from 2, as whole numbers)."""
    sizes = as_list(value)
    if not sizes:
        raise ValueError(
            f"{name}={shown(value)} is empty: give at least one fraction or count, e.g. {name}=[1000]."
        )
    for size in sizes:
        try:
            is_positive = number(name, size) > 0
        except ValueError:
            is_positive = False
        if not is_positive:
            raise ValueError(
                f"{name}={shown(sizes)}: {shown(size)} is not a positive number. Give fractions of the pool, e.g. "
                "0.5, or counts, e.g. 1000."
            )
    fractions = [size <= 1 for size in sizes]
    if all(fractions):
        return [float(size) for size in sizes]
    if any(fractions):
        raise ValueError(
            f"{name}={shown(sizes)} mixes fractions (up to 1) and counts (from 2): give all as one or the other."
        )
    return each(at_least(2))(name, sizes)


def _order(name: str, value: Any) -> str:
    """Allow the name of an order, or the path of a custom sampler."""
    if isinstance(value, str) and (value in ORDERS or (":" in value and is_function_path(value))):
        return value
    names = ", ".join(map(repr, ORDERS))
    raise ValueError(
        f"{name}={shown(value)}: choose one of {names}, or name a sampler of your own as 'package.module:Class'."
    )


def orders(name: str, value: Any) -> list[str]:
    """Allow names of orders, one or several."""
    names = [_order(name, item) for item in as_list(value)]
    if not names:
        raise ValueError(
            f"{name}={value!r} is empty: choose one of {', '.join(map(repr, ORDERS))}."
        )
    return names


def selector_names(remedy: str) -> Check:
    """Allow a selector's name or several: a single name is returned as a text, several as a list.

    A name is in the table of selectors or a dotted path, which is imported when a run begins.

    Args:
        remedy (`str`): Advice for a value that is no name.
    """

    def check_names(name: str, value: Any) -> str | list[str]:
        names = as_list(value)
        if not names or not all(isinstance(item, str) and item for item in names):
            raise ValueError(f"{name}={shown(value)}: {remedy}.")
        for item in names:
            if item not in SELECTOR_NAMES and not is_function_path(item):
                raise ValueError(
                    f"{name}={shown(item)}: choose one of {', '.join(map(repr, SELECTOR_NAMES))}, or name a function "
                    f"of your own as 'package.module:function'{did_you_mean(item, SELECTOR_NAMES)}"
                )
        return names[0] if len(names) == 1 else names

    return check_names


def rank(name: str, value: Any) -> int | str:
    """Allow a rank of folded factors, or `"auto"`."""
    if isinstance(value, str) and value == "auto":
        return value
    try:
        return at_least(8, 2**20)(name, value)
    except ValueError:
        raise ValueError(
            f"{name}={shown(value)}: give a whole number from 8 to 1,048,576, 'auto', or nothing."
        ) from None


def smoothing(name: str, value: Any) -> float:
    """Allow the weight of the past in a running mean."""
    weight = number(name, value)
    if not 0 <= weight < 1:
        raise ValueError(f"{name}={shown(value)}: choose a value of at least 0 and below 1.")
    return weight


_CHECKS: dict[Any, Check] = {bool: switch, float: number, str: text}


# ---- Checks across settings -----------------------------------------------------------------------------------------


def check_stages(
    stages: Sequence[float], reselect: str, after_warmup: str, warmup_samples: int
) -> None:
    """Check that the stages fit into the pool, and that there is a warm-up to restart after."""
    total = sum(stages)
    # Guards against floating-point error: three tenths and seven tenths are not exactly one.
    if stages[0] <= 1 and reselect == "remaining" and total > 1 + 1e-9:
        raise ValueError(
            f"stages={stages} add up to {total:g} of the pool: with reselect='remaining' the fractions must add up to "
            "at most 1; lower them, or use reselect='all'."
        )
    if after_warmup == "restart" and warmup_samples == 0:
        raise ValueError(
            "after_warmup='restart' with warmup_samples=0: there is no warm-up to restart from; set "
            "after_warmup='continue' or warmup_samples above 0."
        )


def check_length(
    stages: Sequence[float],
    stage_epochs: Sequence[int] | None,
    stage_steps: Sequence[int] | None,
    on_shortfall: str,
) -> None:
    """Check that passes or steps, but not both, define the length of each stage."""
    if stage_epochs is not None and len(stage_epochs) not in (1, len(stages)):
        raise ValueError(
            f"stage_epochs={stage_epochs} for {len(stages)} stage(s): give one number, or one per stage."
        )
    if stage_steps is None or not any(stage_steps):
        return
    if len(stage_steps) not in (1, len(stages)) or not all(stage_steps):
        raise ValueError(
            f"stage_steps={stage_steps} for {len(stages)} stage(s): give one number above 0, or one per stage; a "
            "single 0 uses stage_epochs instead."
        )
    if any(passes != 1 for passes in stage_epochs or [1]):
        raise ValueError(
            f"stage_epochs={stage_epochs} and stage_steps={stage_steps} both set the length of a stage: set "
            "stage_steps=0 to use stage_epochs, or leave stage_epochs at 1."
        )
    if on_shortfall == "shrink":
        raise ValueError(
            f"stage_steps={stage_steps} fixes a stage's steps, but on_shortfall='shrink' reduces them with the "
            "number of prompts: set on_shortfall='fill', or use stage_epochs."
        )


def check_selectors(names: Sequence[str], stages: Sequence[float]) -> None:
    """Check that there is one selector, or one for each stage."""
    if len(names) not in (1, len(stages)):
        raise ValueError(
            f"selector={names} for {len(stages)} stage(s): give one name, or one per stage."
        )


def check_halves(reliability: bool, gradient_rollouts: str) -> None:
    """Check that both halves of the rollouts have gradients if they are compared."""
    if reliability and gradient_rollouts == "one_correct":
        raise ValueError(
            "reliability=True compares the gradients of two halves of the rollouts, but "
            "gradient_rollouts='one_correct' uses only one rollout: set gradient_rollouts='all' or "
            "reliability=False."
        )


def check_order(order: Sequence[str], stages: Sequence[float], warmup_samples: int) -> None:
    """Check that there is one order, or one for each stage; the trainer's own order uses the whole pool."""
    if len(order) not in (1, len(stages)):
        raise ValueError(
            f"order={order} for {len(stages)} stage(s): give one order, or one per stage."
        )
    if "trainer" not in order:
        return
    if (len(order), list(stages)) != (1, [1.0]):
        raise ValueError(
            f"order={order} with stages={stages}: the trainer's own order trains on all prompts and selects none; "
            "set stages=1, or choose 'shuffled' or 'adaptive'."
        )
    if warmup_samples:
        raise ValueError(
            f"order='trainer' with warmup_samples={warmup_samples}: this order selects nothing, so it has no use "
            "for a warm-up; set warmup_samples=0, or choose 'shuffled' or 'adaptive'."
        )


def check_distinct(name: str, values: Sequence[float]) -> None:
    """Check that no value is repeated."""
    if len(set(values)) < len(values):
        raise ValueError(f"{name}={values}: give distinct numbers.")


def check_budget(rollout_budget: float | None, pool_sample: int | None) -> None:
    """Check that only one setting limits the number of scored candidates."""
    if rollout_budget is not None and pool_sample is not None:
        raise ValueError(
            f"rollout_budget={rollout_budget} and pool_sample={pool_sample} both limit how many candidates are "
            "scored: leave one of them unset."
        )


def check_baseline(
    baseline: str, order: Sequence[str], oversample: float, max_generation_batches: int
) -> None:
    """Check that there is a belief, and that no group is chosen or discarded for its own mean."""
    if "adaptive" not in order:
        raise ValueError(
            f"baseline={baseline!r} with order={order}: there is no belief to compare rewards with; set "
            "order='adaptive', or leave baseline='group'."
        )
    if oversample > 1 or max_generation_batches > 1:
        raise ValueError(
            f"baseline={baseline!r} with oversample={oversample:g} and max_generation_batches="
            f"{max_generation_batches}: dynamic sampling discards groups of equal rewards, and those have a gradient "
            "here; set both to 1, or baseline='group'."
        )


def check_trainers_order(
    rollout_budget: float | None, compute_budget: float | None, plateau_patience: int
) -> None:
    """Check that in the trainer's own order nothing is scored and no stage ends early."""
    if rollout_budget is not None:
        raise ValueError(
            f"rollout_budget={rollout_budget} with order='trainer': this order scores nothing; leave rollout_budget "
            "unset, or choose 'shuffled' or 'adaptive'."
        )
    for name, value in [("compute_budget", compute_budget), ("plateau_patience", plateau_patience)]:
        if value:
            raise ValueError(
                f"{name}={value:g} with order='trainer': the trainer sets the number of steps of such a run. Choose "
                "order='shuffled', which also trains on the whole pool."
            )
