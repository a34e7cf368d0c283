"""The engine checks itself: captured gradients beside those that autograd gives for the trainer's own loss.

Layer rules describe what layers usually compute. Whether these layers do is seen once in each measurement: the first
prompts with a gradient are captured again with a sketch for each parameter, and the loss that TRL itself computes on
the rows as TRL gave them is differentiated by autograd. Sketches are linear, so both agree to rounding, parameter by
parameter, and so do the features as they go to disk.

Axes: `P` prompts, `N` trainable parameters, `D` feature dimensions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from trl_learnalign import bridge
from trl_learnalign.distributed import Ranks
from trl_learnalign.gradients.sketch import CountSketch, Projection
from trl_learnalign.measuring.features import FeatureEngine
from trl_learnalign.measuring.groups import RolloutGroup

if TYPE_CHECKING:
    from trl import GRPOTrainer

logger = logging.getLogger(__name__)

PROMPTS = 2  # one alone cannot tell rows that slipped from one prompt to the next
PADDING = 9  # columns that are added where it is asked whether padding matters
_SKETCH_DIM = 512  # norms of differences to about 6 %
_SHOWN = 8  # parameters that a message names


class SelfCheckError(RuntimeError):
    """Captured gradients are not those of the trainer's loss."""


@dataclass(frozen=True)
class Tolerance:
    """How far two computations of one gradient may be apart: `relative · ‖its own‖ + floor · ‖the whole one‖`.

    Args:
        relative (`float`): Share of the parameter's own norm.
        floor (`float`): Share of the norm over all parameters.
    """

    relative: float
    floor: float

    @classmethod
    def of(cls, trainer: GRPOTrainer) -> Tolerance:
        """What rounding explains in the precision of this trainer."""
        return cls(1e-3, 1e-5) if bridge.computes_in_float32(trainer) else cls(0.4, 0.01)


class PerParameter(Projection):
    """A sketch of each parameter in columns of its own, behind those of another projection.

    Args:
        features (`Projection`): Fills the first D columns.
        names (sequence of `str`): Canonical names of all parameters.
        dim (`int`, *optional*): Columns of each parameter.
    """

    def __init__(self, features: Projection, names: Sequence[str], dim: int = _SKETCH_DIM):
        super().__init__(features.dim + dim * len(names), features.seed)
        self.features = features
        self._sketch = CountSketch(dim, features.seed)
        starts = {name: features.dim + dim * number for number, name in enumerate(names)}
        self._columns = {name: slice(start, start + dim) for name, start in starts.items()}

    @property
    @override
    def version(self) -> str:
        return f"per parameter, {self.features.version}"

    @override
    def release(self) -> None:
        self._sketch.release()
        self.features.release()

    @override
    def add_dense(self, out: torch.Tensor, name: str, gradients: torch.Tensor) -> None:
        self.features.add_dense(out[:, : self.features.dim], name, gradients)
        self._sketch.add_dense(out[:, self._columns[name]], name, gradients)

    @override
    def add_outer(
        self, out: torch.Tensor, name: str, rows: torch.Tensor, columns: torch.Tensor
    ) -> None:
        self.features.add_outer(out[:, : self.features.dim], name, rows, columns)
        self._sketch.add_outer(out[:, self._columns[name]], name, rows, columns)

    @override
    def add_rows(
        self,
        out: torch.Tensor,
        name: str,
        indices: torch.Tensor,
        columns: torch.Tensor,
        row_count: int,
    ) -> None:
        self.features.add_rows(out[:, : self.features.dim], name, indices, columns, row_count)
        self._sketch.add_rows(out[:, self._columns[name]], name, indices, columns, row_count)

    def of_features(self, sketches: torch.Tensor) -> torch.Tensor:
        """The columns of the features, `(P, D)`."""
        return sketches[:, : self.features.dim]

    def of_parameters(self, sketches: torch.Tensor) -> dict[str, torch.Tensor]:
        """The columns of each parameter, `(P, dim)`, by name."""
        return {name: sketches[:, columns] for name, columns in self._columns.items()}


@dataclass
class Finding:
    """What one rank found.

    Args:
        prompts (`list[int]`): Rows of the dataset that were compared.
        errors (`dict[str, float]`): Relative error of each parameter that differs by more than rounding.
        largest (`float`): Largest difference of a parameter, as a multiple of what is tolerated.
        relative_error (`float`): Largest relative error of a whole gradient.
        unpadded (`bool`): The rows agree without their padding only: with it, the trainer's loss is another one.
        of_features (`bool`): Every parameter agrees, the features of the shard's own batches do not.
    """

    prompts: list[int] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    largest: float = 0.0
    relative_error: float = 0.0
    unpadded: bool = False
    of_features: bool = False


def compared(
    captured: Mapping[str, torch.Tensor],
    reference: Mapping[str, torch.Tensor],
    tolerance: Tolerance,
) -> Finding:
    """Compare gradients parameter by parameter.

    Args:
        captured (mapping of `str` to `torch.Tensor`): Sketches of each parameter, `(P, dim)`.
        reference (mapping of `str` to `torch.Tensor`): The same of the trainer's gradient.
        tolerance (`Tolerance`): What rounding explains.

    Returns:
        `Finding`: With `errors` in the order of the differences, largest first.
    """
    theirs = torch.stack(list(reference.values())).double()  # (N, P, dim)
    difference = (torch.stack([captured[name] for name in reference]).double() - theirs).norm(dim=2)
    norms = theirs.norm(dim=2)
    totals = norms.norm(dim=0)
    multiples = difference / (tolerance.relative * norms + tolerance.floor * totals).clamp(
        min=1e-300
    )
    # Written so that NaN is a difference.
    apart = (~(multiples <= 1)).any(dim=1)
    order = difference.amax(dim=1).argsort(descending=True).tolist()
    relative = (difference / norms).nan_to_num(posinf=torch.inf).amax(dim=1)
    names = list(reference)
    return Finding(
        errors={names[i]: float(relative[i]) for i in order if apart[i]},
        largest=float(multiples.max()),
        relative_error=float((difference.norm(dim=0) / totals).max()),
    )


class SelfCheck:
    """Compares the first prompts with a gradient, once; all ranks call it together.

    Args:
        trainer (`GRPOTrainer`): The trainer, borrowed with `trainer_bridge.left_as_found`.
        engine (`FeatureEngine`): The engine, with an entered capture.
        ranks (`Ranks`): The processes.
    """

    def __init__(self, trainer: GRPOTrainer, engine: FeatureEngine, ranks: Ranks):
        self.trainer = trainer
        self.engine = engine
        self.ranks = ranks
        self.is_pending = True
        self.summary: dict[str, Any] = {"not_checked": "no prompt had a gradient"}
        self._padding_matters = False
        self._tolerance = Tolerance.of(trainer)
        if bridge.is_fsdp2(trainer):
            self.is_pending = False
            self.summary = {"not_checked": "FSDP2 gives autograd no gradient of parameters"}
            if ranks.is_main:
                logger.warning(
                    "The captured gradients are not checked against those of the trainer's own loss: %s.",
                    self.summary["not_checked"],
                )

    def __call__(
        self, groups: Sequence[RolloutGroup], features: torch.Tensor, spare: RolloutGroup
    ) -> bool:
        """Check a shard, unless an earlier one has been.

        Args:
            groups (sequence of `RolloutGroup`): The captured groups of this rank, P of them, also none.
            features (`torch.Tensor`): Their features, `(P, D)`.
            spare (`RolloutGroup`): Any group, for passes that only keep other ranks company.

        Returns:
            `bool`: Whether prompts that shared a pass were padded by each other, which this model minds: from now on
                the engine captures one at a time. The caller captures the shard again, and calls this again.

        Raises:
            `SelfCheckError`: On all ranks, if gradients differ on any of them.
        """
        if not self.is_pending:
            return False
        chosen = [i for i, group in enumerate(groups) if _has_gradient(group, features[i])][
            :PROMPTS
        ]
        sharded = self.engine.capture.sharded
        passes = self.ranks.most([len(chosen)])[0] if sharded else len(chosen)
        checked = [groups[i] for i in chosen]
        found = self._found(checked, features[chosen], spare, passes)
        if self._is_padding(found, checked, spare, passes):
            self._padding_matters = self.engine.capture.one_prompt_at_a_time = True
            return True
        self._conclude(self.ranks.gather([found]))
        return False

    def _is_padding(
        self, found: Finding, groups: list[RolloutGroup], spare: RolloutGroup, passes: int
    ) -> bool:
        """Whether differences may come from padding: the trainer's own gradient then depends on it."""
        differs = bool(found.errors) or found.of_features
        if self._padding_matters or not self.ranks.most([int(differs)])[0]:
            return False
        projection = PerParameter(
            self.engine.capture.projection, list(bridge.trainable_sizes(self.trainer))
        )
        cut = [self._cut(group) for group in groups]
        plain = self._reference(projection, cut, spare, passes, without_padding)
        padded = self._reference(projection, cut, spare, passes, with_padding)
        differs = bool(cut) and bool(self._judged(projection, padded, plain).errors)
        return bool(self.ranks.most([int(differs)])[0])

    def _found(
        self, groups: list[RolloutGroup], features: torch.Tensor, spare: RolloutGroup, passes: int
    ) -> Finding:
        projection = PerParameter(
            self.engine.capture.projection, list(bridge.trainable_sizes(self.trainer))
        )
        cut = [self._cut(group) for group in groups]
        captured = self._captured(projection, cut) if passes else torch.zeros(0, projection.dim)
        found = Finding()
        for rows in (dict, without_padding):
            reference = self._reference(projection, cut, spare, passes, rows)
            if cut:
                found = self._judged(projection, captured, reference)
                found.unpadded = rows is without_padding
            # The second time without padding, if the first one differs on any rank.
            if not self.ranks.most([len(found.errors)])[0]:
                break
        found.prompts = [group.prompt for group in groups]
        whole = [i for i, group in enumerate(groups) if cut[i].rollouts == group.rollouts]
        if whole and not found.errors:
            expected = projection.of_features(reference[whole])
            error = (features[whole] - expected).norm(dim=1) / expected.norm(dim=1)
            found.of_features = not bool(
                (error <= self._tolerance.relative + self._tolerance.floor).all()
            )
        return found

    def _cut(self, group: RolloutGroup) -> RolloutGroup:
        """As many rollouts as one pass of the capture may hold, those with an advantage first."""
        most = max(1, self.engine.token_budget // group.tokens)
        if most >= group.rollouts:
            return group
        still = (group.inputs["advantages"] == 0) | (group.lengths == 0)
        return group.take(still.long().argsort(stable=True)[:most].sort().values)

    def _captured(self, projection: PerParameter, groups: list[RolloutGroup]) -> torch.Tensor:
        capture = self.engine.capture
        usual, parts = capture.projection, self.engine.parts
        try:
            capture.projection, self.engine.parts = projection, 1
            return self.engine.features(groups)
        finally:
            capture.projection, self.engine.parts = usual, parts

    def _reference(
        self,
        projection: PerParameter,
        groups: list[RolloutGroup],
        spare: RolloutGroup,
        passes: int,
        rows: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]],
    ) -> torch.Tensor:
        """Sketches of the gradient of the trainer's loss of each group's raw rows, as `rows` makes them."""
        device = self.trainer.accelerator.device
        sketches = torch.zeros(max(passes, len(groups)), projection.dim, device=device)
        missing = set(self.engine.capture.coverage.missing)
        for i, group in enumerate([*groups, *[spare] * (passes - len(groups))]):

            def take(
                name: str, gradient: torch.Tensor, out: torch.Tensor = sketches[i : i + 1]
            ) -> None:
                if name not in missing:
                    projection.add_dense(out, name, gradient.unsqueeze(0))

            bridge.loss_gradient(self.trainer, rows(group.raw), take)
        projection.release()
        bridge.partition_again(self.trainer)
        return -sketches[
            : len(groups)
        ].cpu()  # features are of the objective, which is minus the loss

    def _judged(
        self, projection: PerParameter, captured: torch.Tensor, reference: torch.Tensor
    ) -> Finding:
        return compared(
            projection.of_parameters(captured), projection.of_parameters(reference), self._tolerance
        )

    def _conclude(self, findings: list[Finding]) -> None:
        for found in findings:
            if found.errors or found.of_features:
                raise SelfCheckError(_explained(found, len(bridge.trainable_sizes(self.trainer))))
        prompts = [prompt for found in findings for prompt in found.prompts]
        if not prompts:
            return
        self.is_pending = False
        self.summary = {
            "prompts": prompts,
            "relative_error": max(found.relative_error for found in findings),
            "of_tolerance": max(found.largest for found in findings),
        }
        if any(found.unpadded for found in findings):
            self.summary["depends_on_padding"] = True
            if self.ranks.is_main:
                logger.warning(
                    "The trainer's loss depends on padding: TRL passes no position ids, and this model takes "
                    "positions from where a token stands in the batch. Features are of each prompt by itself, as it "
                    "was rolled out; training sees it beside longer ones."
                )


def _has_gradient(group: RolloutGroup, features: torch.Tensor) -> bool:
    # Without advantages there may be a KL term alone, and near the reference policy it is nothing but rounding.
    moves = (group.inputs["advantages"] != 0) & (group.lengths > 0)
    return bool(moves.any() and features.any() and features.isfinite().all())


def without_padding(rows: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The rows without the columns of prompt padding that all of them share."""
    first = int(rows["prompt_mask"].any(dim=0).long().argmax())
    return {
        name: value[:, first:] if name.startswith("prompt_") else value
        for name, value in rows.items()
    }


def with_padding(rows: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The rows with more columns of prompt padding; what stands in them is masked."""
    wider = {
        name: torch.nn.functional.pad(rows[name], (PADDING, 0))
        for name in ("prompt_ids", "prompt_mask")
    }
    return {**rows, **wider}


def _explained(found: Finding, parameters: int) -> str:
    rows = f"of prompts {found.prompts} (rows of the dataset)"
    if found.of_features:
        return (
            f"self_check: the features {rows} are not the projected gradients of the trainer's loss when more prompts "
            "share a pass, although every parameter agrees when two do: a layer mixes the prompts of a batch. Nothing "
            "was selected. capture_tokens=1 captures one at a time. Please report it with the model's name."
        )
    named = [f"{name} ({error:.2g})" for name, error in list(found.errors.items())[:_SHOWN]]
    more = len(found.errors) - len(named)
    return (
        f"self_check: the captured gradients {rows} are not those of the loss that the trainer itself computes, in "
        f"{len(found.errors)} of {parameters} parameters (relative error): {', '.join(named)}"
        + (f" and {more} more" if more else "")
        + ". Their layers compute something else than the capture's rules say, so scores would be wrong; nothing was "
        "selected. Please report it with the model's name (docs/adding_a_layer_rule.md: how a layer gets a rule). "
        "self_check=False goes on all the same."
    )
