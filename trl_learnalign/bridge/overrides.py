"""Methods of one object that are replaced for a while; its class stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

Method = tuple[Any, str, Callable[..., Any]]
"""Object, name of its method, and what takes the method's place."""


class Overrides:
    """Methods that are replaced until they are given back.

    Args:
        methods (sequence of `(object, str, callable)`): What takes whose place.
    """

    def __init__(self, methods: Sequence[Method]):
        self._methods = list(methods)
        self._before = [vars(owner).get(name) for owner, name, _ in methods]
        for owner, name, function in methods:
            setattr(owner, name, function)

    def give_back(self) -> None:
        """Put back what was there before.

        Raises:
            `RuntimeError`: If something else has taken one of the places since.
        """
        for owner, name, function in self._methods:
            if vars(owner).get(name) is not function:
                raise RuntimeError(
                    f"{type(owner).__name__}.{name} was replaced once more since: give that back first, then this."
                )
        for (owner, name, _), before in zip(self._methods, self._before, strict=True):
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)


@contextmanager
def overridden(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """A method that is replaced within the context."""
    override = Overrides([(owner, name, function)])
    try:
        yield
    finally:
        override.give_back()
