"""Rollout groups → gradient features, with batching by tokens and equal work on all ranks.

Features do not depend on the batching: prompts share a forward pass only to save time. If the rollouts of a prompt do
not fit into one pass, the prompt is captured in several passes, and its projections (which are linear) are summed in
float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from trl_learnalign.bridge import inference
from trl_learnalign.bridge.inference import pad_token_id
from trl_learnalign.bridge.objective import objective_gradients
from trl_learnalign.bridge.policy import (
    computes_in_16_bits,
    has_virtual_tokens,
    partition_again,
    token_log_probs,
)
from trl_learnalign.gradients.capture import GradientCapture, TokenBatch
from trl_learnalign.gradients.layers import RowsLostError
from trl_learnalign.measuring.generation import RolloutGroup, token_batch

if TYPE_CHECKING:
    from trl import GRPOTrainer

# Columns of padding that the probe adds.
_PROBE_PADDING = 9

Coefficients = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass: rows `rows` of the groups `groups`."""

    groups: tuple[int, ...]
    rows: slice = field(default_factory=lambda: slice(None))


def plan_micro_batches(
    tokens: Sequence[int],
    rollouts: int,
    budget: int,
    one_at_a_time: bool,
    parts: int = 1,
) -> tuple[list[MicroBatch], list[MicroBatch]]:
    """Batch groups of similar length up to a token budget.

    Args:
        tokens (sequence of `int`): Tokens of a row of each group.
        rollouts (`int`): Rows of each group, G.
        budget (`int`): Tokens of a pass, padding included.
        one_at_a_time (`bool`): Never put two prompts, or two parts of one, into one pass.
        parts (`int`, *optional*, defaults to `1`): Equal parts of the rows of a group that get separate features.

    Returns:
        `tuple[list[MicroBatch], list[MicroBatch]]`: Passes of whole groups, and passes of groups that had to be split.
    """
    whole: list[MicroBatch] = []
    split: list[MicroBatch] = []
    batch: list[int] = []
    # Longest first, so that an out-of-memory error occurs at once.
    for group in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
        if tokens[group] * rollouts > budget or (one_at_a_time and parts > 1):
            rows_at_once = max(1, budget // tokens[group])
            split += [MicroBatch((group,), rows) for rows in _cuts(rollouts, parts, rows_at_once)]
            continue
        if batch:
            # All are padded to the first, which is the longest.
            tokens_with_it = tokens[batch[0]] * rollouts * (len(batch) + 1)
            if one_at_a_time or tokens_with_it > budget:
                whole.append(MicroBatch(tuple(batch)))
                batch = []
        batch.append(group)
    if batch:
        whole.append(MicroBatch(tuple(batch)))
    return whole, split


def _cuts(rollouts: int, parts: int, rows_at_once: int) -> Iterator[slice]:
    """Yield the rows of a group in passes of at most `rows_at_once`; no pass crosses the border of two parts."""
    size = rollouts // parts
    for start in range(0, rollouts, size):
        for first in range(start, start + size, rows_at_once):
            yield slice(first, min(first + rows_at_once, start + size))


class GradientFeaturizer:
    """Turns rollout groups into features with one capture; see `bridge.gradient_capture`.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        capture (`GradientCapture`): An entered capture of its policy.
        token_budget (`int`): `LearnAlignConfig.capture_max_tokens`.
        most (callable): Maximum over ranks of a list of numbers; collective over all ranks.
        parts (`int`, *optional*, defaults to `1`): Features per prompt, one for each equal part of its rollouts. They
            sum to the prompt's features. The objective is that of the whole group: a part's advantages compare with
            all rollouts.
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
        self._pad_id = pad_token_id(trainer)
        self._decided = False

    def features(self, groups: Sequence[RolloutGroup]) -> Tensor:
        """Return the features of some groups; collective over all ranks if parameters are partitioned.

        Args:
            groups (sequence of `RolloutGroup`): Any number, also none, with equally many rollouts each.

        Returns:
            `torch.Tensor`: `(len(groups), parts, D)` float32 on the CPU, in the order of `groups`; without the middle
                axis if there is one part.
        """
        # Rollouts are made in training mode. Here, dropout would add noise, activation checkpointing would hide layers
        # from the hooks, and the loss would be scaled for gradient accumulation.
        self.trainer.model.eval()
        out = torch.zeros(len(groups), self.parts, self.capture.projection.dim)
        if not self._decided:
            self._decide()
        whole, split = self._plan(groups)
        empty_forwards, empty_captures = self._empty_passes(len(whole), len(split))
        coefficients = self._split_coefficients(groups, split)
        for _ in range(empty_forwards):
            self._log_probs(self._empty_batch())
        for work in whole:
            self._capture_whole(groups, work, out)
        for work in split:
            self._capture_split(groups, work, coefficients[work.groups[0]], out)
        for _ in range(empty_captures):
            self.capture.features(self._empty_batch(), _no_objective)
        partition_again(self.trainer)
        return out if self.parts > 1 else out.squeeze(1)

    def _empty_passes(self, whole: int, split: int) -> tuple[int, int]:
        """Return how many dummy forward passes and captures this rank makes to keep collectives in sync.

        With partitioned parameters each pass is a collective, and other ranks may have more passes.
        """
        if not self.capture.sharded:
            return 0, 0
        forwards, captures = split, whole + split
        most_forwards, most_captures = self.most([forwards, captures])
        return most_forwards - forwards, most_captures - captures

    def _decide(self) -> None:
        """Decide before the first pass whether passes may hold several prompts; collective if sharded.

        A rank that decided this in the middle of a pass would make more passes than the others, and wait for them.
        """
        alone = self._padding_matters()
        if self.capture.sharded:
            alone = alone or bool(self.capture.rows_lost(self._probe_batch(rows=2)))
            alone = bool(self.most([int(alone)])[0])
        self.capture.one_prompt_at_a_time = alone
        self._decided = True

    def _padding_matters(self) -> bool:
        """Whether left padding, which only a longer prompt in the pass causes, changes the log-probabilities.

        TRL passes no position ids. So padding matters with positions that count columns (GPT-2, BART, XGLM), with
        virtual tokens before the padding (prompt tuning), and in recurrent models.
        """
        if has_virtual_tokens(self.trainer):
            return True
        batch = self._probe_batch(rows=1)
        ids = pad(batch.input_ids, (_PROBE_PADDING, 0), value=self._pad_id)
        mask = pad(batch.attention_mask, (_PROBE_PADDING, 0))
        plain, _ = self._log_probs(batch)
        padded, _ = self._log_probs(replace(batch, input_ids=ids, attention_mask=mask))
        difference = float((plain - padded).abs().mean())
        # 16-bit rounding alone must not count as a difference.
        tolerance = 3e-2 if computes_in_16_bits(self.trainer) else 1e-4
        # Written so that NaN counts as different.
        return not difference < tolerance

    def _plan(self, groups: Sequence[RolloutGroup]) -> tuple[list[MicroBatch], list[MicroBatch]]:
        if not groups:
            return [], []
        tokens = [group.tokens for group in groups]
        rollouts = groups[0].rollouts
        budget = self.token_budget
        if self.capture.whole_prompts:
            budget = max(budget, max(tokens) * rollouts)
        one_at_a_time = self.capture.one_prompt_at_a_time
        return plan_micro_batches(tokens, rollouts, budget, one_at_a_time, self.parts)

    def _capture_whole(self, groups: Sequence[RolloutGroup], work: MicroBatch, out: Tensor) -> None:
        members = [groups[i] for i in work.groups]

        def objective(p: int, logps: Tensor, entropies: Tensor) -> Coefficients:
            return self._coefficients(members[p], logps, entropies)

        batch = replace(token_batch(members, self._device, self._pad_id), parts=self.parts)
        try:
            # An earlier pass may have shown, after this one was planned, that each prompt needs its own pass.
            if batch.segments > 1 and self.capture.one_prompt_at_a_time:
                raise RowsLostError
            features = self.capture.features(batch, objective)
        except RowsLostError:
            if batch.segments == 1:
                raise
            self.capture.one_prompt_at_a_time = True
            for i in work.groups:
                self._capture_alone(groups, i, out)
            return
        out[list(work.groups)] += features.view(len(members), self.parts, -1).cpu()

    def _capture_alone(self, groups: Sequence[RolloutGroup], i: int, out: Tensor) -> None:
        if self.parts == 1:
            self._capture_whole(groups, MicroBatch((i,)), out)
            return
        _, split = self._plan([groups[i]])
        passes = [MicroBatch((i,), work.rows) for work in split]
        coefficients = self._split_coefficients(groups, passes)
        for work in passes:
            self._capture_split(groups, work, coefficients[i], out)

    def _capture_split(
        self,
        groups: Sequence[RolloutGroup],
        work: MicroBatch,
        coefficients: Coefficients,
        out: Tensor,
    ) -> None:
        group = groups[work.groups[0]]
        of_logps, of_entropies = coefficients
        of_logps = of_logps[work.rows]
        of_entropies = None if of_entropies is None else of_entropies[work.rows]

        def objective(p: int, logps: Tensor, entropies: Tensor) -> Coefficients:
            return of_logps, of_entropies

        batch = token_batch([group], self._device, self._pad_id, work.rows)
        features = self.capture.features(batch, objective)
        part = work.rows.start * self.parts // group.rollouts
        out[work.groups[0], part] += features[0].cpu()

    def _split_coefficients(
        self,
        groups: Sequence[RolloutGroup],
        split: Sequence[MicroBatch],
    ) -> dict[int, Coefficients]:
        """Return the objective's gradient for groups that take several passes: its terms may couple all rollouts."""
        logps: dict[int, list[Tensor]] = {}
        entropies: dict[int, list[Tensor]] = {}
        for work in split:
            i = work.groups[0]
            batch = token_batch([groups[i]], self._device, self._pad_id, work.rows)
            batch_logps, batch_entropies = self._log_probs(batch)
            logps.setdefault(i, []).append(batch_logps)
            entropies.setdefault(i, []).append(batch_entropies)
        return {
            i: self._coefficients(groups[i], torch.cat(logps[i]), torch.cat(entropies[i]))
            for i in logps
        }

    def _coefficients(
        self,
        group: RolloutGroup,
        logps: Tensor,
        entropies: Tensor,
    ) -> Coefficients:
        """Return the objective's gradient for a group in a batch that may be padded to others' longer completions."""
        length = group.inputs["completion_ids"].shape[1]
        padding = (0, logps.shape[1] - length)
        inputs = {name: value.to(self._device) for name, value in group.inputs.items()}
        of_logps, of_entropies = objective_gradients(
            self.trainer, inputs, logps[:, :length], entropies[:, :length]
        )
        of_logps = pad(of_logps, padding)
        return of_logps, None if of_entropies is None else pad(of_entropies, padding)

    @torch.no_grad()
    def _log_probs(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        return token_log_probs(self.trainer, batch)

    def _probe_batch(self, rows: int) -> TokenBatch:
        """Return a batch with a prompt in each row, the same on all ranks, with more tokens than rows."""
        tokenizer = inference.tokenizer(self.trainer)
        tokens = tokenizer("0 1 2 3 4 5 6 7 8 9", add_special_tokens=False)["input_ids"]
        ids = torch.tensor([tokens] * rows, device=self._device)
        completion_length = ids.shape[1] // 2
        return TokenBatch(ids, torch.ones_like(ids), completion_length, prompts=rows)

    def _empty_batch(self) -> TokenBatch:
        ids = torch.full((1, 2), self._pad_id, device=self._device)
        return TokenBatch(ids, torch.ones_like(ids), completion_length=1, prompts=1)


def _no_objective(p: int, logps: Tensor, entropies: Tensor) -> Coefficients:
    return torch.zeros_like(logps), None
