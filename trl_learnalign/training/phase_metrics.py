"""What `on_phase_end` returned, as a record can keep it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)


def notable(name: str, step: int, returned: Any) -> dict[str, Any]:
    """The named values that are noted of a phase.

    What cannot be noted is an error before the first step, where nothing is lost by it. Later it is left out with a
    warning: hours of training are worth more than a figure.

    Args:
        name (`str`): Of the phase, or `"base"`.
        step (`int`): Optimizer step that the policy has reached.
        returned: What `on_phase_end` returned.

    Returns:
        `dict`: JSON values by name.

    Raises:
        `TypeError`: Before the first step, if something cannot be noted; with the remedy.
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
        told = (
            f"on_phase_end({name!r}, {step}) returned {returned!r}, {problem}: the record keeps numbers and texts by "
            "name. Return a dictionary of them, as {'accuracy': 0.5}, or None."
        )
        if step == 0:
            raise TypeError(told)
        logger.warning("%s What it cannot keep is left out.", told)
    return values


def _plain(value: Any) -> Any:
    """A number of NumPy or torch as Python has it."""
    is_one_number = getattr(value, "shape", None) == () and callable(getattr(value, "item", None))
    return value.item() if is_one_number else value


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
