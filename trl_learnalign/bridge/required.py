"""Names of TRL that are not its public interface, declared beside their use, with how they are used."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import trl
from trl import GRPOTrainer as StockTrainer

if TYPE_CHECKING:
    from trl import GRPOTrainer


_MODULE = "trl.trainer.grpo_trainer"
"""Where TRL's own `GRPOTrainer` is defined."""


def stand_in(trainer: GRPOTrainer) -> str | None:
    """Name of a trainer's class if it is a rewritten copy of TRL's, as Unsloth's; `None` if TRL's own is its base.

    Args:
        trainer (`GRPOTrainer`): The trainer.
    """
    kinds = type(trainer).__mro__
    return None if any(kind.__module__ == _MODULE for kind in kinds) else kinds[0].__name__


@dataclass(frozen=True)
class Called:
    """A function of TRL's that the bridge calls.

    Args:
        positional (`int`): Arguments that are given by their place.
        keywords (`tuple[str]`): Arguments that are given by name.
    """

    positional: int
    keywords: tuple[str, ...] = ()

    def problem(self, name: str, function: Callable[..., Any]) -> str | None:
        """Why the function cannot be called so, or `None` if it can."""
        signature = inspect.signature(function)
        places = (None,) * self.positional
        names = dict.fromkeys(self.keywords)
        try:
            signature.bind(*places, **names)
        except TypeError as error:
            return f"{name}{_short(signature)} cannot be called as before ({error})"
        return None


@dataclass(frozen=True)
class Replaced:
    """A function of TRL's whose place one of the bridge takes, and which TRL calls.

    Args:
        parameters (`tuple[str]`): Names of the parameters that the bridge's one accepts, in order, without `self`.
    """

    parameters: tuple[str, ...]

    def problem(self, name: str, function: Callable[..., Any]) -> str | None:
        """Why TRL may call something else than the bridge's one accepts, or `None`."""
        signature = inspect.signature(function)
        found = [parameter for parameter in signature.parameters if parameter != "self"]
        if tuple(found) == self.parameters:
            return None
        return f"{name}{_short(signature)} is not called as before ({', '.join(self.parameters)})"


Use = Called | Replaced


@dataclass(frozen=True)
class Required:
    """What a file of the bridge needs of TRL.

    Args:
        trainer (`tuple[str]`): Attributes and methods of the trainer.
        calls (mapping): Methods of the trainer whose signature matters, by name.
        functions (mapping): Functions elsewhere in TRL, by their place, `"trl.trainer.utils.pad"`.
        sometimes (mapping): Attributes that are there when something is switched on: name → when.
        later (`tuple[str]`): Attributes that TRL makes for a batch of rollouts; nothing can be checked before.
    """

    trainer: tuple[str, ...] = ()
    calls: Mapping[str, Use] = field(default_factory=dict)
    functions: Mapping[str, Use] = field(default_factory=dict)
    sometimes: Mapping[str, Callable[[GRPOTrainer], bool]] = field(default_factory=dict)
    later: tuple[str, ...] = ()

    @property
    def of_trainer(self) -> set[str]:
        """All attributes of the trainer, whenever they are there."""
        return {*self.trainer, *self.calls, *self.sometimes, *self.later}


def missing_names(trainer: GRPOTrainer, needs: Iterable[Required]) -> list[str]:
    """What this trainer, or this TRL, lacks or has in another form; sorted.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        needs (iterable of `Required`): What the files need.
    """
    needs = list(needs)
    missing: set[str] = set()
    for need in needs:
        missing.update(_absent(trainer, (*need.trainer, *need.calls)))
    if not missing:  # whether something is switched on is asked of the trainer's other attributes
        for need in needs:
            switched = [name for name, is_used in need.sometimes.items() if is_used(trainer)]
            missing.update(_absent(trainer, switched))
    for need in needs:
        missing.update(_changed_methods(trainer, need.calls))
        missing.update(_changed_functions(need.functions))
    return sorted(missing)


def lacking(trainer: GRPOTrainer, needs: Iterable[Required]) -> str | None:
    """Why something that is not needed by everything else cannot be done with this TRL, or `None`.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        needs (iterable of `Required`): What it needs.
    """
    missing = missing_names(trainer, needs)
    return f"trl {trl.__version__} lacks {'; '.join(missing)}" if missing else None


def _absent(trainer: GRPOTrainer, names: Iterable[str]) -> list[str]:
    return [name for name in names if not hasattr(trainer, name)]


def _changed_methods(trainer: GRPOTrainer, calls: Mapping[str, Use]) -> Iterator[str]:
    for name, use in calls.items():
        # What TRL's own code passes is told by TRL's own method, whatever a subclass makes of it.
        is_replaced = isinstance(use, Replaced)
        method = _named(name) if is_replaced else getattr(type(trainer), name, None)
        if method is None:
            continue
        unbound = use
        if isinstance(use, Called):
            unbound = Called(use.positional + 1, use.keywords)
        problem = unbound.problem(name, method)
        if problem is not None:
            yield problem


def _named(name: str) -> Callable[..., Any] | None:
    """TRL's method: where one stands before it that accepts and passes on anything, the one behind it."""
    methods = [vars(kind)[name] for kind in StockTrainer.__mro__ if name in vars(kind)]
    passes_on = inspect.Parameter.VAR_POSITIONAL
    for method in methods:
        if all(p.kind != passes_on for p in inspect.signature(method).parameters.values()):
            return method
    return methods[0] if methods else None


def _changed_functions(functions: Mapping[str, Use]) -> Iterator[str]:
    for place, use in functions.items():
        function = _found(place)
        if function is None:
            yield place
            continue
        problem = use.problem(place, function)
        if problem is not None:
            yield problem


def _found(place: str) -> Any:
    """What is at a place such as `trl.trainer.utils.pad`, or `None`."""
    module_name, _, rest = place.partition(":")
    found: Any = importlib.import_module(module_name)
    for name in rest.split("."):
        found = getattr(found, name, None)
    return found


def _short(signature: inspect.Signature) -> str:
    """Names of the parameters alone."""
    return f"({', '.join(signature.parameters)})"
