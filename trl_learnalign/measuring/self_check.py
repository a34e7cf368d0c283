"""Compares captured gradients with autograd's gradients of the trainer's own loss.

Layer rules describe what layers usually compute. Each measurement checks once whether they hold for the model's
layers. The first prompts with a gradient are captured again with a separate projection for each parameter. Autograd
then differentiates TRL's own loss on TRL's own rows. Projections are linear, so both must agree up to rounding,
parameter by parameter, and so must the features as they are written to disk.

Axes: `P` prompts, `N` trainable parameters, `D` feature dimensions.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from trl_learnalign.bridge.objective import loss_gradient
from trl_learnalign.bridge.policy import (
    computes_in_float32,
    is_fsdp2,
    partition_again,
    trainable_sizes,
)
from trl_learnalign.distributed import Ranks
from trl_learnalign.gradients.layers import registered_rules
from trl_learnalign.gradients.projection import CountSketch, Projection
from trl_learnalign.measuring.generation import RolloutGroup
from trl_learnalign.measuring.gradient_features import GradientFeaturizer

if TYPE_CHECKING:
    from trl import GRPOTrainer

logger = logging.getLogger(__name__)

PROMPTS = 2  # a single one could not show rows assigned to the wrong prompt
PADDING = 9  # columns that are added to test whether padding matters
_SKETCH_DIM = 512  # gives norms of differences to about 6 %
_SHOWN = 8  # number of parameters that a message names


class SelfCheckError(RuntimeError):
    """Captured gradients differ from those of the trainer's loss."""


@dataclass(frozen=True)
class Tolerance:
    """Tolerated difference of two computations of one gradient: `relative · ‖its own‖ + floor · ‖the whole one‖`.

    Args:
        relative (`float`): Share of the parameter's own norm.
        floor (`float`): Share of the norm over all parameters.
    """

    relative: float
    floor: float

    @classmethod
    def of(cls, trainer: GRPOTrainer) -> Tolerance:
        """Return the tolerance for rounding in the precision of this trainer."""
        return cls(1e-3, 1e-5) if computes_in_float32(trainer) else cls(0.4, 0.01)


class PerParameter(Projection):
    """A projection of each parameter in separate columns, after those of another projection.

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
    def add_dense(self, out: Tensor, name: str, gradients: Tensor) -> None:
        self.features.add_dense(out[:, : self.features.dim], name, gradients)
        self._sketch.add_dense(out[:, self._columns[name]], name, gradients)

    @override
    def add_outer(
        self,
        out: Tensor,
        name: str,
        rows: Tensor,
        columns: Tensor,
    ) -> None:
        self.features.add_outer(out[:, : self.features.dim], name, rows, columns)
        self._sketch.add_outer(out[:, self._columns[name]], name, rows, columns)

    @override
    def add_rows(
        self,
        out: Tensor,
        name: str,
        indices: Tensor,
        columns: Tensor,
        row_count: int,
    ) -> None:
        self.features.add_rows(out[:, : self.features.dim], name, indices, columns, row_count)
        self._sketch.add_rows(out[:, self._columns[name]], name, indices, columns, row_count)

    def of_features(self, sketches: Tensor) -> Tensor:
        """Return the columns of the features, `(P, D)`."""
        return sketches[:, : self.features.dim]

    def of_parameters(self, sketches: Tensor) -> dict[str, Tensor]:
        """Return the columns of each parameter, `(P, dim)`, by name."""
        return {name: sketches[:, columns] for name, columns in self._columns.items()}


@dataclass
class Finding:
    """The result of one rank.

    Args:
        prompts (`list[int]`): Rows of the dataset that were compared.
        errors (`dict[str, float]`): Relative error of each parameter that differs by more than rounding.
        largest (`float`): Largest difference of a parameter, as a multiple of its tolerance.
        relative_error (`float`): Largest relative error of a whole gradient.
        unpadded (`bool`): The rows agree only without their padding: padding changes the trainer's loss.
        of_features (`bool`): Every parameter agrees, but the features of the shard's own batches do not.
    """

    prompts: list[int] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    largest: float = 0.0
    relative_error: float = 0.0
    unpadded: bool = False
    of_features: bool = False


def compared(
    captured: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    tolerance: Tolerance,
) -> Finding:
    """Compare gradients parameter by parameter.

    Args:
        captured (mapping of `str` to `torch.Tensor`): Projections of each parameter, `(P, dim)`.
        reference (mapping of `str` to `torch.Tensor`): The same of the trainer's gradient.
        tolerance (`Tolerance`): Tolerated rounding.

    Returns:
        `Finding`: With `errors` in the order of the differences, largest first.
    """
    names = list(reference)
    theirs = torch.stack([reference[name] for name in names]).double()  # (N, P, dim)
    ours = torch.stack([captured[name] for name in names]).double()
    difference = (ours - theirs).norm(dim=2)
    norms = theirs.norm(dim=2)
    totals = norms.norm(dim=0)
    allowance = tolerance.relative * norms + tolerance.floor * totals
    multiples = difference / allowance.clamp(min=1e-300)  # two zero gradients are equal
    # Written so that NaN counts as a difference.
    apart = (~(multiples <= 1)).any(dim=1)
    order = difference.amax(dim=1).argsort(descending=True).tolist()
    relative = (difference / norms).nan_to_num(posinf=torch.inf).amax(dim=1)
    of_whole = difference.norm(dim=0) / totals
    return Finding(
        errors={names[i]: float(relative[i]) for i in order if apart[i]},
        largest=float(multiples.max()),
        relative_error=float(of_whole.max()),
    )


class SelfCheck:
    """Compares the first prompts with a gradient, once; collective over all ranks.

    Args:
        trainer (`GRPOTrainer`): The trainer, borrowed with `bridge.preserve_trainer_state`.
        engine (`GradientFeaturizer`): The engine, with an entered capture.
        ranks (`Ranks`): The distributed processes.
    """

    def __init__(self, trainer: GRPOTrainer, engine: GradientFeaturizer, ranks: Ranks):
        self.trainer = trainer
        self.engine = engine
        self.ranks = ranks
        self.is_pending = True
        self.summary: dict[str, Any] = {"not_checked": "no prompt had a gradient"}
        self._padding_matters = False
        self._tolerance = Tolerance.of(trainer)
        if is_fsdp2(trainer):
            self.is_pending = False
            self.summary = {"not_checked": "FSDP2 gives autograd no gradient of parameters"}
            if ranks.is_main:
                logger.warning(
                    "The captured gradients are not compared with those of the trainer's own loss: %s.",
                    self.summary["not_checked"],
                )

    def __call__(
        self,
        groups: Sequence[RolloutGroup],
        features: Tensor,
        spare: RolloutGroup,
    ) -> bool:
        """Check a shard, unless an earlier shard was checked.

        Args:
            groups (sequence of `RolloutGroup`): The captured groups of this rank, P of them, also none.
            features (`torch.Tensor`): Their features, `(P, D)`.
            spare (`RolloutGroup`): Any group, for dummy passes that keep collectives in sync.

        Returns:
            `bool`: Whether prompts in a shared pass were padded by each other, and padding changes this model's
                results. From then on the engine captures one prompt at a time. The caller captures the shard again and
                repeats this call.

        Raises:
            `SelfCheckError`: On all ranks, if gradients differ on any of them.
        """
        if not self.is_pending:
            return False
        rows = [i for i, group in enumerate(groups) if _has_gradient(group, features[i])][:PROMPTS]
        # With partitioned parameters each pass is a collective: this rank makes as many as the others.
        passes = len(rows)
        if self.engine.capture.sharded:
            passes = self.ranks.most([passes])[0]
        sample = [groups[i] for i in rows]
        finding = self._finding(sample, features[rows], spare, passes)
        if self._is_padding(finding, sample, spare, passes):
            self._padding_matters = self.engine.capture.one_prompt_at_a_time = True
            return True
        self._conclude(self.ranks.gather([finding]))
        return False

    def _is_padding(
        self,
        finding: Finding,
        groups: list[RolloutGroup],
        spare: RolloutGroup,
        passes: int,
    ) -> bool:
        """Whether padding may cause the differences, since the trainer's own gradient depends on it."""
        differs = bool(finding.errors) or finding.of_features
        if self._padding_matters or not self.ranks.most([int(differs)])[0]:
            return False
        projection = self._per_parameter()
        samples = [self._fitting(group) for group in groups]
        plain = self._reference(projection, samples, spare, passes, without_padding)
        padded = self._reference(projection, samples, spare, passes, with_padding)
        differs = bool(samples) and bool(self._compared(projection, padded, plain).errors)
        return bool(self.ranks.most([int(differs)])[0])

    def _per_parameter(self) -> PerParameter:
        names = list(trainable_sizes(self.trainer))
        return PerParameter(self.engine.capture.projection, names)

    def _finding(
        self,
        groups: list[RolloutGroup],
        features: Tensor,
        spare: RolloutGroup,
        passes: int,
    ) -> Finding:
        """Compare this rank's captured gradients with the trainer's own: by parameter, then as features."""
        projection = self._per_parameter()
        samples = [self._fitting(group) for group in groups]
        captured = self._captured(projection, samples) if passes else torch.zeros(0, projection.dim)
        finding = Finding()
        for rows in (dict, without_padding):
            reference = self._reference(projection, samples, spare, passes, rows)
            if samples:
                finding = self._compared(projection, captured, reference)
                finding.unpadded = rows is without_padding
            # The second comparison is without padding if the first one differs on any rank.
            if not self.ranks.most([len(finding.errors)])[0]:
                break
        finding.prompts = [group.prompt for group in groups]
        # Features are of all rollouts, so groups with omitted rollouts are not comparable.
        whole = [i for i, group in enumerate(groups) if samples[i].rollouts == group.rollouts]
        if whole and not finding.errors:
            # In float64, since squares of large gradients would exceed float32's range.
            expectation = projection.of_features(reference[whole]).double()
            difference = features[whole].double() - expectation
            error = difference.norm(dim=1) / expectation.norm(dim=1)
            tolerance = self._tolerance.relative + self._tolerance.floor
            finding.of_features = not bool((error <= tolerance).all())
        return finding

    def _fitting(self, group: RolloutGroup) -> RolloutGroup:
        """Return as many rollouts as one pass of the capture may hold, those with an advantage first."""
        most = max(1, self.engine.token_budget // group.tokens)
        if most >= group.rollouts:
            return group
        is_still = (group.inputs["advantages"] == 0) | (group.lengths == 0)
        moving_first = is_still.long().argsort(stable=True)
        return group.take(moving_first[:most].sort().values)

    def _captured(self, projection: PerParameter, groups: list[RolloutGroup]) -> Tensor:
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
        rows: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
    ) -> Tensor:
        """Return projections of the gradient of the trainer's loss on each group's raw rows, transformed by `rows`."""
        device = self.trainer.accelerator.device
        sketches = torch.zeros(max(passes, len(groups)), projection.dim, device=device)
        left_out = set(self.engine.capture.coverage.missing)
        company = [spare] * (passes - len(groups))
        for i, group in enumerate([*groups, *company]):

            def take(
                name: str,
                gradient: Tensor,
                out: Tensor = sketches[i : i + 1],
            ) -> None:
                if name not in left_out:
                    projection.add_dense(out, name, gradient.unsqueeze(0))

            loss_gradient(self.trainer, rows(group.raw), take)
        projection.release()
        partition_again(self.trainer)
        # Features are of the objective, which is the negative loss.
        return -sketches[: len(groups)].cpu()

    def _compared(
        self,
        projection: PerParameter,
        captured: Tensor,
        reference: Tensor,
    ) -> Finding:
        ours = projection.of_parameters(captured)
        theirs = projection.of_parameters(reference)
        return compared(ours, theirs, self._tolerance)

    def _conclude(self, findings: list[Finding]) -> None:
        for finding in findings:
            if finding.errors or finding.of_features:
                parameter_count = len(trainable_sizes(self.trainer))
                rules = list(registered_rules(self.engine.capture.model))
                raise SelfCheckError(_explained(finding, parameter_count, rules))
        prompts = [prompt for finding in findings for prompt in finding.prompts]
        if not prompts:
            return
        self.is_pending = False
        self.summary = {
            "prompts": prompts,
            "relative_error": max(finding.relative_error for finding in findings),
            "of_tolerance": max(finding.largest for finding in findings),
        }
        if any(finding.unpadded for finding in findings):
            self.summary["depends_on_padding"] = True
            if self.ranks.is_main:
                logger.warning(
                    "The trainer's loss depends on padding, because TRL passes no position ids and this model "
                    "derives positions from the padded batch. The gradient features are of each prompt without "
                    "padding, but training pads it to the longest one in its batch."
                )


def _has_gradient(group: RolloutGroup, features: Tensor) -> bool:
    # Without advantages the loss may be a KL term alone, which is only rounding near the reference policy.
    moves = (group.inputs["advantages"] != 0) & (group.lengths > 0)
    return bool(moves.any() and features.any() and features.isfinite().all())


def without_padding(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the rows without the columns of prompt padding that all of them share."""
    is_used = rows["prompt_mask"].any(dim=0)
    first = int(is_used.long().argmax())
    narrow = dict(rows)
    for name, value in rows.items():
        if name.startswith("prompt_"):
            narrow[name] = value[:, first:]
    return narrow


def with_padding(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the rows with additional, masked columns of prompt padding."""
    wide = dict(rows)
    for name in ("prompt_ids", "prompt_mask"):
        wide[name] = torch.nn.functional.pad(rows[name], (PADDING, 0))
    return wide


def _explained(finding: Finding, parameter_count: int, registered: Sequence[str]) -> str:
    """Return a message with the differing parameters and the remedies."""
    rows = f"of prompts {finding.prompts} (rows of the dataset)"
    if finding.of_features:
        return (
            f"check_gradients: the features {rows} differ from the projected gradients of the trainer's loss when "
            "several prompts share a forward pass, although every parameter agrees for two prompts: a layer mixes "
            "the prompts of a batch. Nothing was selected. Set capture_max_tokens=1 to capture one prompt at a "
            "time, and please report it with the model's name."
        )
    largest = itertools.islice(finding.errors.items(), _SHOWN)
    names = ", ".join(f"{name} ({error:.2g})" for name, error in largest)
    rest = len(finding.errors) - _SHOWN
    if rest > 0:
        names += f" and {rest} more"
    if registered:
        remedy = f"Check the rules that were registered for {', '.join(registered)}"
    else:
        remedy = "Please report it with the model's name"
    return (
        f"check_gradients: the captured gradients {rows} differ from those of the trainer's own loss in "
        f"{len(finding.errors)} of {parameter_count} parameters (relative error): {names}. The rules of these "
        f"layers do not match what the layers compute, so the scores would be wrong; nothing was selected. {remedy} "
        "(docs/exactness.md explains layer rules). check_gradients=False continues without this check."
    )
