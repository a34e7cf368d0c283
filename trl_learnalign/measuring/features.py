"""Rollout groups → gradient features: batching by token budget, splitting, and equal passes on all ranks.

Features do not depend on the batching: prompts share a forward pass only to save time, and a prompt whose rollouts do
not fit into one pass is captured in several, its projection (which is linear) adding up in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from trl_learnalign import bridge
from trl_learnalign.gradients.capture import GradientCapture, TokenBatch
from trl_learnalign.gradients.layers import RowsLostError
from trl_learnalign.measuring.groups import RolloutGroup, token_batch

if TYPE_CHECKING:
    from trl import GRPOTrainer

# Columns of padding that the probe adds.
_PROBE_PADDING = 9

Coefficients = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class Pass:
    """One forward pass: some rows of some groups.

    Args:
        groups (`tuple[int]`): Numbers of the groups.
        rows (`slice`): Their rollouts.
    """

    groups: tuple[int, ...]
    rows: slice = field(default_factory=lambda: slice(None))


def plan_passes(
    tokens: Sequence[int], rollouts: int, budget: int, one_at_a_time: bool, parts: int = 1
) -> tuple[list[Pass], list[Pass]]:
    """Batch groups of like length up to a token budget.

    Args:
        tokens (sequence of `int`): Tokens of a row of each group.
        rollouts (`int`): Rows of each group, G.
        budget (`int`): Tokens of a pass, padding included.
        one_at_a_time (`bool`): Never put two prompts, or two parts of one, into one pass.
        parts (`int`, *optional*, defaults to `1`): Equal parts of the rows of a group that have features of their own.

    Returns:
        `tuple[list[Pass], list[Pass]]`: Passes of whole groups, and passes of groups that had to be split.
    """
    whole: list[Pass] = []
    split: list[Pass] = []
    batch: list[int] = []
    # Longest first: if memory runs out, it does so at once.
    for group in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
        if tokens[group] * rollouts > budget or (one_at_a_time and parts > 1):
            step, part = max(1, budget // tokens[group]), rollouts // parts
            for start in range(0, rollouts, part):
                ends = range(start, start + part, step)
                split += [
                    Pass((group,), slice(first, min(first + step, start + part))) for first in ends
                ]
            continue
        longest = tokens[batch[0]] if batch else tokens[group]
        if batch and (one_at_a_time or longest * rollouts * (len(batch) + 1) > budget):
            whole.append(Pass(tuple(batch)))
            batch = []
        batch.append(group)
    return whole + ([Pass(tuple(batch))] if batch else []), split


class FeatureEngine:
    """Turns rollout groups into features with one capture; see `trainer_bridge.gradient_capture`.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        capture (`GradientCapture`): An entered capture of its policy.
        token_budget (`int`): `LearnAlignConfig.capture_tokens`.
        most (callable): Maximum over ranks of a list of numbers; all ranks call it together.
        parts (`int`, *optional*, defaults to `1`): Features per prompt, of equal parts of its rollouts; they add up to
            the prompt's. The objective is that of the whole group: a part's advantages compare with all rollouts.
    """

    def __init__(
        self,
        trainer: GRPOTrainer,
        capture: GradientCapture,
        token_budget: int,
        most: Callable[[list[int]], list[int]],
        parts: int = 1,
    ):
        self.trainer = trainer
        self.capture = capture
        self.token_budget = token_budget
        self.most = most
        self.parts = parts
        self._device = trainer.accelerator.device
        self._pad = bridge.pad_token_id(trainer)
        self._decided = False

    def features(self, groups: Sequence[RolloutGroup]) -> torch.Tensor:
        """Features of some groups; with partitioned parameters, all ranks must call it together.

        Args:
            groups (sequence of `RolloutGroup`): Any number, also none, with equally many rollouts each.

        Returns:
            `torch.Tensor`: `(len(groups), parts, D)` float32 on the CPU, in the order of `groups`; without the middle
                axis if there is one part.
        """
        # Rollouts are made in training mode; here dropout would add noise, activation checkpointing would hide layers
        # from the hooks, and the loss would be scaled for gradient accumulation.
        self.trainer.model.eval()
        out = torch.zeros(len(groups), self.parts, self.capture.projection.dim)
        if not self._decided:
            self._decide()
        whole, split = self._plan(groups)
        # With partitioned parameters each pass is a collective: ranks that have fewer run empty ones.
        forwards, captures = len(split), len(whole) + len(split)
        empty_forwards = empty_captures = 0
        if self.capture.sharded:
            most_forwards, most_captures = self.most([forwards, captures])
            empty_forwards, empty_captures = most_forwards - forwards, most_captures - captures
        coefficients = self._split_coefficients(groups, split)
        for _ in range(empty_forwards):
            self._log_probs(self._empty_batch())
        for work in whole:
            self._capture_whole(groups, work, out)
        for work in split:
            self._capture_split(groups, work, coefficients[work.groups[0]], out)
        for _ in range(empty_captures):
            self.capture.features(
                self._empty_batch(), lambda _, logps, __: (torch.zeros_like(logps), None)
            )
        bridge.partition_again(self.trainer)
        return out if self.parts > 1 else out.squeeze(1)

    def _decide(self) -> None:
        """Before the first pass, whether passes may hold several prompts; partitioned, all ranks decide together.

        A rank that found out in the middle of a pass would go on with more passes than the others, which would wait.
        """
        alone = self._padding_matters()
        if self.capture.sharded:
            alone = alone or bool(self.capture.rows_lost(self._probe_batch(rows=2)))
            alone = bool(self.most([int(alone)])[0])
        self.capture.one_prompt_at_a_time = alone
        self._decided = True

    def _padding_matters(self) -> bool:
        """Whether padding on the left, which only a longer prompt in the pass brings, moves the log-probabilities.

        TRL gives no position ids, so it does with positions that count columns (GPT-2, BART, XGLM), with virtual
        tokens before the padding (prompt tuning) and in recurrent models.
        """
        if bridge.has_virtual_tokens(self.trainer):
            return True
        batch = self._probe_batch(rows=1)
        ids = torch.nn.functional.pad(batch.input_ids, (_PROBE_PADDING, 0), value=self._pad)
        mask = torch.nn.functional.pad(batch.attention_mask, (_PROBE_PADDING, 0))
        plain, _ = self._log_probs(batch)
        padded, _ = self._log_probs(replace(batch, input_ids=ids, attention_mask=mask))
        # Not a number counts as different. What 16 bits round is no position.
        return not float((plain - padded).abs().mean()) < (
            3e-2 if bridge.computes_in_16_bits(self.trainer) else 1e-4
        )

    def _plan(self, groups: Sequence[RolloutGroup]) -> tuple[list[Pass], list[Pass]]:
        if not groups:
            return [], []
        tokens, rollouts, budget = (
            [group.tokens for group in groups],
            groups[0].rollouts,
            self.token_budget,
        )
        if self.capture.whole_prompts:
            budget = max(budget, max(tokens) * rollouts)
        return plan_passes(tokens, rollouts, budget, self.capture.one_prompt_at_a_time, self.parts)

    def _capture_whole(self, groups: Sequence[RolloutGroup], work: Pass, out: torch.Tensor) -> None:
        chosen = [groups[i] for i in work.groups]

        def objective(p: int, logps: torch.Tensor, entropies: torch.Tensor) -> Coefficients:
            return self._coefficients(chosen[p], logps, entropies)

        batch = replace(token_batch(chosen, self._device, self._pad), parts=self.parts)
        try:
            if (
                batch.segments > 1 and self.capture.one_prompt_at_a_time
            ):  # found out after this pass was planned
                raise RowsLostError
            features = self.capture.features(batch, objective)
        except RowsLostError:
            if batch.segments == 1:
                raise
            self.capture.one_prompt_at_a_time = True
            for i in work.groups:
                self._capture_alone(groups, i, out)
            return
        out[list(work.groups)] += features.view(len(chosen), self.parts, -1).cpu()

    def _capture_alone(self, groups: Sequence[RolloutGroup], i: int, out: torch.Tensor) -> None:
        if self.parts == 1:
            self._capture_whole(groups, Pass((i,)), out)
            return
        _, split = self._plan([groups[i]])
        passes = [Pass((i,), work.rows) for work in split]
        coefficients = self._split_coefficients(groups, passes)
        for work in passes:
            self._capture_split(groups, work, coefficients[i], out)

    def _capture_split(
        self,
        groups: Sequence[RolloutGroup],
        work: Pass,
        coefficients: Coefficients,
        out: torch.Tensor,
    ) -> None:
        group = groups[work.groups[0]]
        own = tuple(None if part is None else part[work.rows] for part in coefficients)
        features = self.capture.features(
            token_batch([group], self._device, self._pad, work.rows),
            lambda *_: own,  # type: ignore[arg-type,return-value]
        )
        part = work.rows.start * self.parts // group.rollouts
        out[work.groups[0], part] += features[0].cpu()

    def _split_coefficients(
        self, groups: Sequence[RolloutGroup], split: Sequence[Pass]
    ) -> dict[int, Coefficients]:
        """The objective's gradient for groups that take several passes: its terms may tie all rollouts together."""
        parts: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for work in split:
            group = groups[work.groups[0]]
            batch = token_batch([group], self._device, self._pad, work.rows)
            parts.setdefault(work.groups[0], []).append(self._log_probs(batch))
        return {
            i: self._coefficients(
                groups[i],
                torch.cat([part[0] for part in found]),
                torch.cat([part[1] for part in found]),
            )
            for i, found in parts.items()
        }

    def _coefficients(
        self, group: RolloutGroup, logps: torch.Tensor, entropies: torch.Tensor
    ) -> Coefficients:
        own = group.inputs["completion_ids"].shape[1]
        padding = (0, logps.shape[1] - own)
        inputs = {name: value.to(self._device) for name, value in group.inputs.items()}
        grads = bridge.objective_gradients(self.trainer, inputs, logps[:, :own], entropies[:, :own])
        padded = [
            None if grad is None else torch.nn.functional.pad(grad, padding) for grad in grads
        ]
        assert padded[0] is not None
        return padded[0], padded[1]

    @torch.no_grad()
    def _log_probs(self, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
        return bridge.token_log_probs(self.trainer, batch)

    def _probe_batch(self, rows: int) -> TokenBatch:
        """Rows of a prompt each, the same on all ranks, with more tokens than rows."""
        tokens = bridge.tokenizer(self.trainer)("0 1 2 3 4 5 6 7 8 9", add_special_tokens=False)[
            "input_ids"
        ]
        ids = torch.tensor([tokens] * rows, device=self._device)
        return TokenBatch(ids, torch.ones_like(ids), ids.shape[1] // 2, rows)

    def _empty_batch(self) -> TokenBatch:
        ids = torch.full((1, 2), self._pad, device=self._device)
        return TokenBatch(ids, torch.ones_like(ids), 1, 1)
