"""Private names that the bridge needs, how it uses them, and which releases of TRL have them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import trl
from packaging.version import Version
from trl import GRPOTrainer as StockTrainer

if TYPE_CHECKING:
    from trl import GRPOTrainer


_MODULE = "trl.trainer.grpo_trainer"
"""Where TRL's own `GRPOTrainer` is defined."""


def stand_in(trainer: GRPOTrainer) -> str | None:
    """Class name of a trainer that is a rewritten copy of TRL's, such as Unsloth's; `None` if it derives from TRL's.

    Args:
        trainer (`GRPOTrainer`): The trainer.
    """
    kinds = type(trainer).__mro__
    return None if any(kind.__module__ == _MODULE for kind in kinds) else kinds[0].__name__


@dataclass(frozen=True)
class Called:
    """A TRL function that the bridge calls.

    Args:
        positional (`int`): Number of positional arguments.
        keywords (`tuple[str]`): Names of keyword arguments.
    """

    positional: int
    keywords: tuple[str, ...] = ()

    def problem(self, name: str, function: Callable[..., Any]) -> str | None:
        """Why the function cannot be called this way, or `None` if it can."""
        signature = inspect.signature(function)
        places = (None,) * self.positional
        names = dict.fromkeys(self.keywords)
        try:
            signature.bind(*places, **names)
        except TypeError as error:
            return f"{name}{_short(signature)} has an incompatible signature ({error})"
        return None


@dataclass(frozen=True)
class Replaced:
    """A TRL function that TRL calls and that the bridge replaces.

    Args:
        parameters (`tuple[str]`): Names of the parameters that the replacement accepts, in order, without `self`.
    """

    parameters: tuple[str, ...]

    def problem(self, name: str, function: Callable[..., Any]) -> str | None:
        """Why TRL may call it with arguments that the replacement does not accept, or `None`."""
        signature = inspect.signature(function)
        found = [parameter for parameter in signature.parameters if parameter != "self"]
        if tuple(found) == self.parameters:
            return None
        return f"{name}{_short(signature)} is no longer called with ({', '.join(self.parameters)})"


Use = Called | Replaced


@dataclass(frozen=True)
class Required:
    """What a module of the bridge needs of TRL.

    Args:
        trainer (`tuple[str]`): Attributes and methods of the trainer.
        calls (mapping): Methods of the trainer whose signature matters, by name.
        functions (mapping): Functions elsewhere in TRL, by qualified name, e.g. `"trl.trainer.utils.pad"`.
        sometimes (mapping): Attributes that exist only when a setting is enabled: name → setting.
        later (`tuple[str]`): Attributes that TRL creates for a batch of rollouts, and that cannot be checked earlier.
    """

    trainer: tuple[str, ...] = ()
    calls: Mapping[str, Use] = field(default_factory=dict)
    functions: Mapping[str, Use] = field(default_factory=dict)
    sometimes: Mapping[str, Callable[[GRPOTrainer], bool]] = field(default_factory=dict)
    later: tuple[str, ...] = ()

    @property
    def of_trainer(self) -> set[str]:
        """All attributes of the trainer, including those that exist only at times."""
        return {*self.trainer, *self.calls, *self.sometimes, *self.later}


def missing_names(trainer: GRPOTrainer, needs: Iterable[Required]) -> list[str]:
    """Names that this trainer or this TRL lacks or has with another signature; sorted.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        needs (iterable of `Required`): The requirements of the modules.
    """
    needs = list(needs)
    missing: set[str] = set()
    for need in needs:
        missing.update(_absent(trainer, (*need.trainer, *need.calls)))
    if not missing:  # other attributes of the trainer tell whether a setting is enabled
        for need in needs:
            switched = [name for name, is_used in need.sometimes.items() if is_used(trainer)]
            missing.update(_absent(trainer, switched))
    for need in needs:
        missing.update(_changed_methods(trainer, need.calls))
        missing.update(_changed_functions(need.functions))
    return sorted(missing)


def lacking(trainer: GRPOTrainer, needs: Iterable[Required]) -> str | None:
    """Why an optional feature cannot work with this TRL, or `None` if it can.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        needs (iterable of `Required`): Its requirements.
    """
    missing = missing_names(trainer, needs)
    return f"trl {trl.__version__} lacks {'; '.join(missing)}" if missing else None


def _absent(trainer: GRPOTrainer, names: Iterable[str]) -> list[str]:
    return [name for name in names if not hasattr(trainer, name)]


def _changed_methods(trainer: GRPOTrainer, calls: Mapping[str, Use]) -> Iterator[str]:
    for name, use in calls.items():
        # TRL's own method determines what TRL's code passes, even if a subclass overrides it.
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
    """TRL's method; if a wrapper that accepts anything stands in front of it, the wrapped one."""
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
    """The object with a qualified name such as `trl.trainer.utils.pad`, or `None`."""
    module_name, _, rest = place.partition(":")
    found: Any = importlib.import_module(module_name)
    for name in rest.split("."):
        found = getattr(found, name, None)
    return found


def _short(signature: inspect.Signature) -> str:
    """The parameter names of a signature."""
    return f"({', '.join(signature.parameters)})"


# ---- Methods of one object, replaced temporarily --------------------------------------------------------------------

Method = tuple[Any, str, Callable[..., Any]]
"""Object, name of its method, and replacement of the method."""


class MethodPatch:
    """Methods that are replaced until they are restored.

    Args:
        methods (sequence of `(object, str, callable)`): Owner, name and replacement.
    """

    def __init__(self, methods: Sequence[Method]):
        self._methods = list(methods)
        self._before = [vars(owner).get(name) for owner, name, _ in methods]
        for owner, name, function in methods:
            setattr(owner, name, function)

    def give_back(self) -> None:
        """Restore the original methods.

        Raises:
            `RuntimeError`: If something else has replaced one of them since.
        """
        for owner, name, function in self._methods:
            if vars(owner).get(name) is not function:
                raise RuntimeError(
                    f"{type(owner).__name__}.{name} was replaced again in the meantime: undo the later replacement "
                    "first."
                )
        for (owner, name, _), before in zip(self._methods, self._before, strict=True):
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)


@contextmanager
def overridden(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Replace a method within the context."""
    override = MethodPatch([(owner, name, function)])
    try:
        yield
    finally:
        override.give_back()


# ---- Counters of the trainer ----------------------------------------------------------------------------------------

METRICS_REQUIRES = Required(trainer=("_metrics",))


def last_reward(trainer: GRPOTrainer) -> float | None:
    """Mean reward of the latest generation since the last log, if there is one."""
    values = trainer._metrics["train"].get("reward")
    return values[-1] if values else None


def mean_completion_lengths(trainer: GRPOTrainer) -> list[float]:
    """Mean tokens per rollout, over all processes, of each generation since the last log; the trainer's own list."""
    return trainer._metrics["train"].get("completions/mean_length", [])


def cut_share(trainer: GRPOTrainer) -> float:
    """Share of completions of the latest generation that were truncated, from 0 to 1; 0 if unknown."""
    values = trainer._metrics["train"].get("completions/clipped_ratio")
    return values[-1] if values else 0.0


def add_metrics(trainer: GRPOTrainer, metrics: Mapping[str, float]) -> None:
    """Add metrics to the trainer's next log, which averages over the steps since its last log."""
    for name, value in metrics.items():
        trainer._metrics["train"][name].append(value)


def tokens_seen(trainer: GRPOTrainer) -> int:
    """Tokens of prompts and completions of all training rollouts so far, over all processes (TRL's `num_tokens`)."""
    return int(trainer.state.num_input_tokens_seen)


# ---- Releases of TRL ------------------------------------------------------------------------------------------------

OLDEST = "1.8"
"""Older releases lack the entropy bonus and multiple environments, which the bridge reads."""

TESTED = (
    "1.8",
    "1.9",
    "1.10",
    "1.11",
    "1.12",
    "1.13",
    "1.14",
    "1.15",
    "1.16",
)
"""Minor releases listed in docs/compatibility.md, oldest first."""

REMEDY = f"pip install 'trl>={OLDEST},<={TESTED[-1]}.99'"


def installed() -> Version:
    """The installed release."""
    return Version(trl.__version__)


def is_before(release: str) -> bool:
    """Whether the installed release is older than e.g. `"1.9"`; development versions of 1.9 are not older."""
    return installed().release < Version(release).release


def is_tested() -> bool:
    """Whether the installed minor release was tested."""
    found = installed()
    return f"{found.major}.{found.minor}" in TESTED


def untested_notice() -> str:
    """One line with what is known about an untested release."""
    return (
        f"trl {trl.__version__} is untested: trl_learnalign was tested with {', '.join(TESTED)}. All names and "
        "signatures that it needs exist. The gradient features of the first prompts are compared with the gradient "
        "of TRL's own loss (check_gradients), and nothing is selected if they differ."
    )


def hint() -> str:
    """Another possible reason for missing names."""
    if is_before("1.15") or not is_before("1.16"):
        return ""
    return " trl 1.15 computes log-probabilities only with Triton, so it cannot run where Triton is not installed."


# ---- trl 1.16: unwrapping a model for generation --------------------------------------------------------------------

_ALWAYS = ("gather_deepspeed3_params",)
_SINCE_1_16 = ("gradient_checkpointing_kwargs",)

NAMES = _ALWAYS if is_before("1.16") else (*_ALWAYS, *_SINCE_1_16)

UNWRAP_REQUIRES = Required(
    functions={"trl.models.utils:unwrap_model_for_generation": Called(2, NAMES)}
)


def unwrapping_options(trainer: GRPOTrainer) -> dict[str, Any]:
    """Keyword arguments of `trl.models.utils.unwrap_model_for_generation`, as TRL itself passes them."""
    options = {
        "gather_deepspeed3_params": trainer.args.ds3_gather_for_generation,
        "gradient_checkpointing_kwargs": trainer.args.gradient_checkpointing_kwargs,
    }
    return {name: options[name] for name in NAMES}


# ---- trl 1.8: the number of tokens by which losses are divided ------------------------------------------------------
# The two counts differ where truncated completions are masked.


def token_count_problem(trainer: GRPOTrainer) -> str | None:
    """Why the tokens of a composed generation cannot be counted the way TRL counts them, or `None`."""
    if is_before("1.9") and trainer.mask_truncated_completions:
        return (
            "mask_truncated_completions: trl 1.8 also counts masked tokens in its normaliser, including those of "
            "completions that skipping would remove (trl 1.9 does not)"
        )
    return None
