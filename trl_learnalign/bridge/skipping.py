"""Zero-advantage skipping: train without rows of advantage 0; the gradient stays the same up to rounding.

Without a KL term and an entropy bonus, a rollout with advantage 0 (all rollouts of its prompt have the same reward)
contributes nothing to the gradient. Such rows are removed after TRL has counted, shuffled and split a generation, and
within the rows of one optimizer step. The remaining rows are spread evenly over processes and fill as few
micro-batches as possible; the model is not called for the others. Where TRL divides a loss by a number that depends on
the micro-batch, each advantage is scaled by the ratio of the new denominator to the original one (`row_losses`).
If no row with a gradient has an image but other rows do, the shortest row with an image is trained on as well. The
vision tower's gradient is then 0 instead of `None`, and the optimizer treats the two differently
([`routing_problem`]). Advantages that TRL's arithmetic leaves slightly off 0 although all rewards are equal are set to
0 (`generate_rollouts`).

A step without any useful row is the one place where rounding shows: its gradient in stock TRL may be 1e-9 and not 0,
and an optimizer that divides by the gradient's own size (AdamW) turns that into a full step in a random direction.

Effect on TRL's log: the means over tokens and rows that the loss reports (`entropy`, `clip_ratio/…`,
`cispo_clip_ratio`, `vespo/…`) cover only the trained rows, and `step_time` is shorter. If no row has a gradient, one
row is kept, because an optimizer step needs one, and the means are those of that row. If all rows are masked, they are
not reported. Rewards, completion lengths, `frac_reward_zero_std` and `num_tokens` still cover everything rolled out.
A new metric is `learnalign/tokens_skipped`, the share of tokens that is not trained on.

Dropout draws different random numbers, as it would with any other order of rows.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_learnalign.bridge import inference, objective, rollout_rows
from trl_learnalign.bridge.hooks import preserve_trainer_state
from trl_learnalign.bridge.inference import Rows, generate_rollouts, tokenizer
from trl_learnalign.bridge.logs import remove_added_metrics
from trl_learnalign.bridge.objective import denominator, loss_problem, skipping_problem
from trl_learnalign.bridge.policy import causal_lm, is_sharded, partition_again, token_log_probs
from trl_learnalign.bridge.requires import MethodPatch, Replaced, Required, lacking, overridden
from trl_learnalign.bridge.rollout_rows import Batch, RowPlan, plan_rows, with_an_image
from trl_learnalign.distributed import Ranks
from trl_learnalign.gradients.capture import TokenBatch

if TYPE_CHECKING:
    from trl import GRPOTrainer

logger = logging.getLogger(__name__)


# ---- Routed experts -------------------------------------------------------------------------------------------------

# Passes that look for routed experts, if the first one does not reach all modules.
_ROUTE_PROBES = 8


@torch.no_grad()
def unevenly_called(trainer: GRPOTrainer) -> list[str]:
    """Names of modules with their own parameters that only some tokens reach (routed experts); in the model's order.

    They are found by short forward passes over one repeated token each, the same on all ranks, because equal tokens
    are routed to the same few experts. Modules within a leaf module of ZeRO-3 are excluded.

    Args:
        trainer (`GRPOTrainer`): The trainer, prepared for training; all ranks call it together.
    """
    found = dict(_modules_with_parameters(trainer.model))
    head = causal_lm(
        trainer
    ).get_output_embeddings()  # a fused head is not called, but its weight is used
    ids = tokenizer(trainer)("0 1 2 3 4 5 6 7 8 9 ? a", add_special_tokens=False)["input_ids"]
    first: set[str] | None = None
    with preserve_trainer_state(trainer):
        trainer.model.eval()
        for token in list(dict.fromkeys(ids))[:_ROUTE_PROBES]:
            called = _called(trainer, found, token)
            if first is not None and called != first:
                return [name for name in found if name in called ^ first]
            first = called
            if all(name in called or module is head for name, module in found.items()):
                return []
    return []


def routing_problem(trainer: GRPOTrainer) -> str | None:
    """Why rows without a gradient matter if no other row reaches some modules, or `None` if they do not.

    With such rows the gradient of these modules is 0, without them it is `None`. With a gradient of 0, momentum and
    weight decay still change the weights.

    Args:
        trainer (`GRPOTrainer`): The trainer, prepared for training; all ranks call it together.
    """
    modules = dict(trainer.model.named_modules())
    trained = [
        name
        for name in unevenly_called(trainer)
        if any(parameter.requires_grad for parameter in modules[name].parameters(recurse=False))
    ]
    if not trained:
        return None
    return (
        f"which modules run depends on the tokens ({', '.join(trained[:2])}, …); the optimizer treats a gradient of "
        "0 differently from no gradient, since momentum and weight decay still move the weights"
    )


def _modules_with_parameters(
    module: nn.Module, prefix: str = ""
) -> Iterator[tuple[str, nn.Module]]:
    if getattr(module, "_z3_leaf", False):
        return
    if any(True for _ in module.parameters(recurse=False)):
        yield prefix.removesuffix("."), module
    for name, child in module.named_children():
        yield from _modules_with_parameters(child, f"{prefix}{name}.")


def _called(trainer: GRPOTrainer, modules: Mapping[str, nn.Module], token: int) -> set[str]:
    """Names of the modules that are called in a pass over the same token, repeated four times."""
    called: set[str] = set()
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, module in modules.items()
    ]
    ids = torch.full((1, 4), token, device=trainer.accelerator.device)
    try:
        token_log_probs(trainer, TokenBatch(ids, torch.ones_like(ids), 2, 1))
    finally:
        for handle in handles:
            handle.remove()
        partition_again(trainer)
    return called


# ---- Skipping -------------------------------------------------------------------------------------------------------

REQUIRES = Required(
    trainer=(
        "_buffered_inputs",
        "_step",
        "_metrics",
        "pad_to_multiple_of",
    ),
    calls={
        "_prepare_inputs": Replaced(("generation_batch",)),
        "_generate_and_score_completions": Replaced(("inputs",)),
    },
)
NEEDS = (
    REQUIRES,
    rollout_rows.IMAGES_REQUIRES,
    inference.ROLLOUTS_REQUIRES,
    rollout_rows.REQUIRES,
    objective.ROWS_REQUIRES,
)
"""Requirements of this module and those that it uses; without them, everything else works."""


@dataclass(frozen=True)
class TrainedCounts:
    """Rows and tokens of training, over all processes; counted once per pass over a generation.

    Args:
        rows_given (`int`): Rows that TRL would have trained on.
        rows_trained (`int`): Rows that went through a forward and a backward pass.
        tokens_given (`int`): Tokens of `rows_given`, prompts included and padding excluded. Completions that
            `mask_truncated_completions` masks count as 0 tokens.
        tokens_trained (`int`): Tokens of `rows_trained`.
        tokens_idle (`int`): Tokens of trained rows without a gradient. Such rows are trained on because an optimizer
            step needs a row, and all processes need equally many.
    """

    rows_given: int = 0
    rows_trained: int = 0
    tokens_given: int = 0
    tokens_trained: int = 0
    tokens_idle: int = 0

    def __add__(self, other: TrainedCounts) -> TrainedCounts:
        return TrainedCounts(
            **{name: value + getattr(other, name) for name, value in asdict(self).items()}
        )


@dataclass(frozen=True)
class _Rows:
    """What ranks exchange about their rows of a window, `R` on each; arrays are `(R,)`."""

    sizes: np.ndarray
    peak: float
    tokens: np.ndarray
    in_loss: np.ndarray
    denominators: np.ndarray
    images: np.ndarray
    layouts: list[list[str]]
    entries: list[str]
    unknown: list[str]


class _Empty(dict[str, Any]):
    """A micro-batch without rows, which no process trains on."""


class _Masked(dict[str, Any]):
    """A micro-batch whose rows are masked completely on all processes, so that the loss has no metrics."""


@dataclass(frozen=True)
class _Regrouped:
    """The micro-batches to train on, and their counts over all ranks."""

    batches: list[Batch]
    counts: TrainedCounts


def install_skipping(trainer: GRPOTrainer) -> ZeroAdvantageFilter | str:
    """Leave rows without a gradient out of the trainer's training from now on; all processes call it together.

    Args:
        trainer (`GRPOTrainer`): The trainer.

    Returns:
        `ZeroAdvantageFilter` or `str`: The installed filter, which also counts; or the reason why nothing is skipped,
        which is logged as well, with the trainer unchanged. Problems that only a forward pass reveals are found when
        training begins (`ZeroAdvantageFilter.problem`).

    Raises:
        `RuntimeError`: If the trainer already skips.
    """
    if any(
        isinstance(callback, ZeroAdvantageFilter) for callback in trainer.callback_handler.callbacks
    ):
        raise RuntimeError(
            "Skipping is already installed on this trainer, e.g. by its LearnAlignCallback: use that one, or "
            "create a new trainer."
        )
    problem = lacking(trainer, NEEDS) or skipping_problem(trainer) or loss_problem(trainer)
    if problem is not None:
        _log_disabled(problem)
        return problem
    return ZeroAdvantageFilter(trainer)


def _log_disabled(problem: str) -> None:
    logger.warning(
        "Skipping is off, and rollouts without an advantage are trained on like the others: %s.",
        problem,
    )


class ZeroAdvantageFilter(TrainerCallback):
    """Provides micro-batches without the rows that have no gradient, until it is detached.

    TRL's buffer is unchanged: checkpoints keep whole generations, from which the skipped rows are recomputed.
    Evaluation and other callers of the trainer's generation and loss are not affected.

    Args:
        trainer (`GRPOTrainer`): The trainer, for which [`skipping_problem`] finds none.

    Attributes:
        problem (`str`, *optional*): Why nothing is skipped after all; known when training begins.
    """

    def __init__(self, trainer: GRPOTrainer):
        self.trainer = trainer
        self.ranks = Ranks(trainer.accelerator)
        self.counts = TrainedCounts()
        self.problem: str | None = None
        self._padding = rollout_rows.padding_of(trainer)
        self._ignores_padding = rollout_rows.ignores_padding(trainer)
        self._optimizer_step_began: int | None = None
        self._generation: list[Batch] | None = None
        self._windows: dict[tuple[int, int], _Regrouped] = {}
        self._has_warned = self._is_empty = False
        self._give, self._loss_of = trainer._prepare_inputs, trainer.compute_loss
        self._go_back = trainer.accelerator.backward
        self._overrides = MethodPatch(
            [
                (trainer, "_prepare_inputs", self._prepare_inputs),
                (trainer, "compute_loss", self._compute_loss),
                (trainer.accelerator, "backward", self._backward),
            ]
        )
        trainer.add_callback(self)

    def detach(self) -> None:
        """Restore the trainer's methods.

        Raises:
            `RuntimeError`: If something else has replaced them since.
        """
        self._overrides.give_back()
        self.trainer.remove_callback(self)

    def state_dict(self) -> dict[str, int]:
        """The counts as plain JSON values, for a checkpoint."""
        return asdict(self.counts)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue counting from [`state_dict`]."""
        self.counts = TrainedCounts(**state)

    def on_train_begin(  # noqa: D102
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.problem = routing_problem(self.trainer)
        if self.problem is not None:
            _log_disabled(self.problem)

    def on_step_begin(  # noqa: D102
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._optimizer_step_began = self.trainer._step

    def _prepare_inputs(self, generation_batch: Any) -> Batch:
        if self.problem is not None or not self.trainer.model.training:
            return self._give(generation_batch)
        generate = self.trainer._generate_and_score_completions

        def generate_without_rounding(rows: Rows) -> Batch:
            batch, _ = generate_rollouts(self.trainer, generate, rows)
            return batch

        with overridden(self.trainer, "_generate_and_score_completions", generate_without_rounding):
            self._give(generation_batch)
        if self.trainer._buffered_inputs is not self._generation:
            self._begin_generation()
        number = self.trainer._step % self.trainer.args.steps_per_generation
        first, end = self._window(number)
        if (first, end) not in self._windows:
            self._windows[first, end] = self._regroup(self.trainer._buffered_inputs[first:end])
        regrouped = self._windows[first, end]
        if number == first:
            self._count(regrouped.counts)
        return regrouped.batches[number - first]

    def _compute_loss(
        self, model: Any, inputs: Batch, *arguments: Any, **options: Any
    ) -> torch.Tensor:
        self._is_empty = isinstance(inputs, _Empty)
        if self._is_empty:
            return torch.zeros((), device=self.trainer.accelerator.device)
        if isinstance(inputs, _Masked):
            with remove_added_metrics(self.trainer._metrics["train"]):
                return self._loss_of(model, inputs, *arguments, **options)
        return self._loss_of(model, inputs, *arguments, **options)

    def _backward(self, loss: torch.Tensor, **options: Any) -> None:
        # DeepSpeed counts backward passes; one without a forward pass of its engine would break the count.
        if not self._is_empty:
            self._go_back(loss, **options)
        self._is_empty = False

    def _begin_generation(self) -> None:
        self._generation = self.trainer._buffered_inputs
        self._windows = {}

    def _window(self, number: int) -> tuple[int, int]:
        """The micro-batches of the buffer in this one's optimizer step: first, and end (exclusive)."""
        began, micro_step = self._optimizer_step_began, self.trainer._step
        if began is None:  # steps are made by other code than `train`
            return number, number + 1
        count = self.trainer.current_gradient_accumulation_steps
        if not began <= micro_step < began + count:
            return number, number + 1
        first = max(0, number - (micro_step - began))
        end = min(self.trainer.args.steps_per_generation, number + began + count - micro_step)
        return first, end

    def _count(self, counts: TrainedCounts) -> None:
        self.counts += counts
        skipped = 1 - counts.tokens_trained / max(1, counts.tokens_given)
        self.trainer._metrics["train"]["learnalign/tokens_skipped"].append(skipped)

    def _regroup(self, batches: Sequence[Batch]) -> _Regrouped:
        given, batches = batches, [rollout_rows.by_row(batch) for batch in batches]
        everyone = self.ranks.gather([self._describe(batches)])
        plan = None if self._is_whole(everyone) else self._plan(everyone, len(batches))
        rows = sum(len(rows.tokens) for rows in everyone)
        tokens = sum(int(rows.tokens.sum()) for rows in everyone)
        flagged = zip(everyone, self._useful(everyone), strict=True)
        useful = sum(int(rows.tokens[flags].sum()) for rows, flags in flagged)
        if plan is None:
            counts = TrainedCounts(rows, rows, tokens, tokens, tokens - useful)
            return _Regrouped(list(map(rollout_rows.without_empty_images, given)), counts)
        sources = [source for chosen in plan.rows for source in chosen]
        trained = sum(int(everyone[rank].tokens[place]) for rank, place in sources)
        counts = TrainedCounts(rows, len(sources), tokens, trained, trained - useful)
        return _Regrouped(self._built(batches, everyone, plan), counts)

    def _describe(self, batches: Sequence[Batch]) -> _Rows:
        masks = [rollout_rows.loss_mask(batch).sum(dim=1) for batch in batches]
        sizes = [rollout_rows.advantage_sizes(batch) for batch in batches]
        counts = [denominator(self.trainer.loss_type, batch) for batch in batches]
        return _Rows(
            sizes=np.concatenate(
                [_array(size * (mask > 0)) for size, mask in zip(sizes, masks, strict=True)]
            ),
            peak=max(
                float(rollout_rows.advantage_sizes(batch).max())
                for batch in self.trainer._buffered_inputs
            ),
            tokens=np.concatenate([_array(rollout_rows.row_tokens(batch)) for batch in batches]),
            in_loss=np.concatenate([_array(mask) for mask in masks]),
            denominators=np.repeat(counts, [len(size) for size in sizes]),
            images=np.concatenate([rollout_rows.image_counts(batch) for batch in batches]),
            layouts=[layout for layout in map(rollout_rows.layout, batches) if layout][:1],
            entries=sorted(
                name
                for name, value in batches[0].items()
                if rollout_rows.has_rows(value) and name not in rollout_rows.NAMES
            ),
            unknown=rollout_rows.unknown_entries(batches[0], self._padding),
        )

    def _is_whole(self, everyone: Sequence[_Rows]) -> bool:
        """Whether a generation is trained on without skipping; logs the reason once."""
        reason = self._reason_for_the_whole(everyone)
        if reason is not None and not self._has_warned:
            logger.warning(
                "Rollouts without an advantage are trained on like the others, because a generation has %s.",
                reason,
            )
            self._has_warned = True
        return reason is not None

    def _reason_for_the_whole(self, everyone: Sequence[_Rows]) -> str | None:
        unknown = sorted({name for rows in everyone for name in rows.unknown})
        if unknown:
            return f"unknown entries, {unknown}"
        layouts = [layout for rows in everyone for layout in rows.layouts]
        if any(rows.entries != everyone[0].entries for rows in everyone) or any(
            layout != layouts[0] for layout in layouts
        ):
            return "different entries on different processes"
        images = np.concatenate([rows.images for rows in everyone])
        if images.any() and not images.all() and is_sharded(self.trainer):
            return "rows with and without images, while processes that share weights must run the same modules"
        return None

    def _useful(self, everyone: Sequence[_Rows]) -> list[np.ndarray]:
        """For each rank, the mask of its rows that have a gradient, `bool` `(R,)`."""
        peak = max(rows.peak for rows in everyone)
        return [rollout_rows.has_gradient(rows.sizes, peak) for rows in everyone]

    def _plan(self, everyone: Sequence[_Rows], micro_batches: int) -> RowPlan | None:
        tokens = [rows.tokens for rows in everyone]
        return plan_rows(
            with_an_image(self._useful(everyone), [rows.images for rows in everyone], tokens),
            tokens,
            [rows.in_loss for rows in everyone],
            micro_batches,
            self._ignores_padding,
        )

    def _built(
        self, batches: Sequence[Batch], everyone: Sequence[_Rows], plan: RowPlan
    ) -> list[Batch]:
        """This process's micro-batches according to the plan."""
        whole = rollout_rows.join(batches, self._padding)
        own = rollout_rows.assemble(self.ranks, whole, plan.rows, self._padding)
        sources = plan.rows[self.ranks.index]
        before = np.array([everyone[rank].denominators[place] for rank, place in sources])
        built: list[Batch] = []
        for part in plan.slices():
            if part.start == part.stop:
                built.append(_Empty())
                continue
            batch = rollout_rows.take(own, range(part.start, part.stop))
            if self._ignores_padding:
                batch = rollout_rows.trim(batch, self._padding, self.trainer.pad_to_multiple_of)
            now = denominator(self.trainer.loss_type, batch)
            factors = torch.from_numpy(now / before[part])
            batch["advantages"] = batch["advantages"] * factors.to(batch["advantages"])
            batch = rollout_rows.for_loss(batch)
            in_loss = (
                everyone[rank].in_loss[place] for rows in plan.rows for rank, place in rows[part]
            )
            built.append(batch if any(in_loss) else _Masked(batch))
        return built


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.cpu().numpy()
