"""Dynamic sampling (DAPO, arXiv 2503.14476, Eq. 11): roll out more prompts than needed and train on useful groups.

A generation starts with the prompts of the trainer's sampler, or with `oversample` times as many prompts. While fewer
groups of rollouts have a gradient than the generation trains on, another batch of prompts is rolled out, up to
`max_batches`. The generation is then composed of the groups with a gradient, with the rollouts that were made, and
of groups without a gradient if there are too few. TRL sees a generation of its usual size, and shuffles and splits it.

Every rollout keeps the advantage that TRL computed within the rollout's own batch. The denominator of losses
(`num_items_in_batch`) is counted over the trained rollouts. In TRL's log, rewards and lengths cover everything rolled
out in a generation, and the table of completions shows what is trained on. Two metrics are added:
`learnalign/useful_rolled_out`, the share of rolled-out groups with a gradient, and `learnalign/batches_rolled_out`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import IterableDataset

from trl_learnalign.bridge import inference, logs, objective, requires, rollout_rows
from trl_learnalign.bridge.inference import (
    RolledOut,
    RolloutBatch,
    Rows,
    collect_rollouts,
    training_rows,
)
from trl_learnalign.bridge.objective import counts_padding, extra_forwards
from trl_learnalign.bridge.requires import (
    MethodPatch,
    Replaced,
    Required,
    lacking,
    overridden,
    stand_in,
    token_count_problem,
    tokens_seen,
)
from trl_learnalign.bridge.rollout_rows import Batch, Source, choose_groups, spread
from trl_learnalign.distributed import Ranks

if TYPE_CHECKING:
    from trl import GRPOTrainer

REQUIRES = Required(
    trainer=(
        "_step",
        "_metrics",
        "_logs",
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
    logs.REQUIRES,
    rollout_rows.REQUIRES,
    objective.ROWS_REQUIRES,
)
"""Requirements of this module and those that it uses; without them, everything else works."""

MoreRows = Callable[[int, int, int], Sequence[int]]


@dataclass(frozen=True)
class SampledCounts:
    """Counts of everything rolled out so far, over all processes.

    Args:
        generations (`int`): Generations.
        batches (`int`): Batches, at least one for each generation.
        rollouts (`int`): Rollouts.
        tokens_generated (`int`): Tokens of their completions.
        tokens_prompt (`int`): Tokens of their prompts, counted once per rollout.
        tokens_chosen (`int`): Tokens, prompts included, of the rollouts that were chosen for training, counted once
            per generation. Completions that `mask_truncated_completions` masks count as 0 tokens.
    """

    generations: int = 0
    batches: int = 0
    rollouts: int = 0
    tokens_generated: int = 0
    tokens_prompt: int = 0
    tokens_chosen: int = 0

    def __add__(self, other: SampledCounts) -> SampledCounts:
        return SampledCounts(
            **{name: value + getattr(other, name) for name, value in asdict(self).items()}
        )


def dynamic_sampling_problem(trainer: GRPOTrainer) -> str | None:
    """The reason why generations cannot be composed of several batches, or `None` if they can.

    Args:
        trainer (`GRPOTrainer`): The trainer.
    """
    lacks = lacking(trainer, NEEDS)
    if lacks is not None:
        return lacks
    copy = stand_in(trainer)
    if copy is not None:
        return f"{copy} is a rewritten copy of TRL's trainer, whose layout of rollouts is unknown"
    if isinstance(trainer.train_dataset, IterableDataset):
        return (
            "the training dataset is a stream, whose prompts cannot be requested by row (materialise it, e.g. "
            "Dataset.from_list(list(stream)))"
        )
    if extra_forwards(trainer) and not rollout_rows.ignores_padding(trainer):
        return (
            "this model's log-probabilities depend on padding, and those of the sampling or reference policy were "
            "computed in another batch (set beta=0, num_iterations=1 and steps_per_generation to "
            "gradient_accumulation_steps or a divisor of it)"
        )
    if counts_padding(trainer):
        return "loss_type='vespo' with a clip range of the vLLM ratio that excludes 1, so padding enters the loss"
    return token_count_problem(trainer)


def install_dynamic_sampling(
    trainer: GRPOTrainer,
    more_rows: MoreRows,
    oversample: float = 1.0,
    max_batches: int = 1,
    observe: Callable[[RolledOut], None] | None = None,
    learnability: Callable[[torch.Tensor], np.ndarray] | None = None,
) -> DynamicSampler:
    """Install dynamic sampling in the trainer; all processes call it together with the same arguments.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        more_rows (callable): `more_rows(micro_step, start, count)` returns `count` further rows of the dataset to roll
            out; `start` rows were already returned for the generation that begins at `micro_step`. It must be a pure
            function of its arguments and the same on all processes, so that a resumed run gets the same rows.
        oversample (`float`, *optional*, defaults to 1.0): Size of the first batch as a multiple of the prompts that
            are trained on, rounded up.
        max_batches (`int`, *optional*, defaults to 1): Maximum number of batches of a generation.
        observe (callable, *optional*): Called with everything that was rolled out, once per generation.
        learnability (callable, *optional*): Maps rewards `(P, G, F)` to the learnability of each group, `(P,)`. If a
            batch has too many useful groups, those with the highest values are kept. Defaults to the variance of the
            reward, which is p(1 - p) for a 0/1 reward.

    Raises:
        `ValueError`: If the trainer does not support it, or a number is out of range, with the remedy.
    """
    if oversample < 1 or max_batches < 1:
        raise ValueError(
            f"oversample={oversample}, max_batches={max_batches}: give numbers of at least 1."
        )
    if oversample == 1 and max_batches == 1:
        raise ValueError(
            "oversample=1, max_batches=1: no additional prompts would be rolled out. Increase one of them."
        )
    problem = dynamic_sampling_problem(trainer)
    if problem is not None:
        raise ValueError(
            f"Dynamic sampling is not possible here: {problem}. Change that, or switch dynamic sampling off."
        )
    return DynamicSampler(trainer, more_rows, oversample, max_batches, observe, learnability)


class DynamicSampler:
    """Composes generations of several batches, until it is detached; see [`install_dynamic_sampling`].

    Evaluation, and other callers of the trainer's generation, are not affected.
    """

    def __init__(
        self,
        trainer: GRPOTrainer,
        more_rows: MoreRows,
        oversample: float,
        max_batches: int,
        observe: Callable[[RolledOut], None] | None,
        learnability: Callable[[torch.Tensor], np.ndarray] | None,
    ):
        self.trainer = trainer
        self.ranks = Ranks(trainer.accelerator)
        self.counts = SampledCounts()
        self.prompts = trainer.args.generation_batch_size // trainer.num_generations
        self.first_extra = math.ceil(round((oversample - 1) * self.prompts, 9))
        # This many groups make rows that divide evenly among the processes. The groups that pad the first batch to
        # such a size are never chosen, because the choice would otherwise depend on the number of processes.
        unit = self.ranks.count // math.gcd(self.ranks.count, trainer.num_generations)
        self.fillers = -self.first_extra % unit
        self.max_batches = max_batches
        self._more_rows, self._observe = more_rows, observe
        self._learnability = self._reward_variance if learnability is None else learnability
        self._padding = rollout_rows.padding_of(trainer)
        self._ignores_padding = rollout_rows.ignores_padding(trainer)
        self._give = trainer._prepare_inputs
        self._overrides = MethodPatch([(trainer, "_prepare_inputs", self._prepare_inputs)])

    def detach(self) -> None:
        """Restore the trainer's methods.

        Raises:
            `RuntimeError`: If something else has replaced them since.
        """
        self._overrides.give_back()

    def state_dict(self) -> dict[str, int]:
        """The counts as plain JSON values, for a checkpoint."""
        return asdict(self.counts)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue counting from [`state_dict`]."""
        self.counts = SampledCounts(**state)

    def _prepare_inputs(self, generation_batch: Any) -> Batch:
        if not self.trainer.model.training:
            return self._give(generation_batch)
        generate = self.trainer._generate_and_score_completions
        with overridden(
            self.trainer,
            "_generate_and_score_completions",
            lambda rows: self._sample(generate, rows),
        ):
            return self._give(generation_batch)

    # ---- Rolling out ------------------------------------------------------------------------------------------------

    def _sample(self, generate: Callable[[Rows], Batch], rows: Rows) -> Batch:
        """Compose a generation in place of TRL's; returns this process's rows of the loss inputs."""
        seen = tokens_seen(self.trainer)
        asked: list[int] = []
        batches = [collect_rollouts(self.trainer, generate, self._first_rows(rows, asked))]
        self._check_count(batches[0].rows)
        while len(batches) < self.max_batches and self._useful(batches).sum() < self.prompts:
            batches.append(collect_rollouts(self.trainer, generate, self._ask(self.prompts, asked)))
        seen = tokens_seen(self.trainer) - seen
        useful = self._useful(batches)
        rewards = torch.cat([batch.rewards for batch in batches])
        real = self._is_real(batches)
        grouped = rewards.view(-1, self.trainer.num_generations, rewards.shape[1])[real]
        numbers = np.repeat(np.arange(len(batches)), [self._groups(batch) for batch in batches])
        groups = choose_groups(useful, self._learnability(grouped), numbers[real], self.prompts)
        trained = np.isin(np.arange(len(real)), np.flatnonzero(real)[groups])
        self._log(batches, useful, trained)
        if self._observe is not None:
            rows_asked = np.array(asked, dtype=np.int64)
            tokens = np.concatenate([batch.tokens for batch in batches])
            tokens = tokens.reshape(-1, self.trainer.num_generations, 2)[real]
            self._observe(
                RolledOut(self.trainer._step, rows_asked, grouped, tokens, useful, trained[real])
            )
        chosen = batches[0].rows if trained.all() else self._combine(batches, trained)
        self._count(batches, seen, chosen)
        return chosen

    def _first_rows(self, rows: Rows, asked: list[int]) -> Rows:
        """This process's rows of the first batch: the sampler's prompts, then the additional ones."""
        if not self.first_extra:
            return rows
        given = self.ranks.gather(rows)
        more = self._numbers(self.first_extra, asked)
        more += more[-1:] * (self.fillers * self.trainer.num_generations)
        first, end = self._share(len(given) + len(more))
        numbers = more[max(0, first - len(given)) : max(0, end - len(given))]
        return given[first:end] + training_rows(self.trainer, self.trainer.train_dataset, numbers)

    def _ask(self, count: int, asked: list[int]) -> Rows:
        """This process's rows of another batch."""
        numbers = self._numbers(count, asked)
        first, end = self._share(len(numbers))
        return training_rows(self.trainer, self.trainer.train_dataset, numbers[first:end])

    def _numbers(self, count: int, asked: list[int]) -> list[int]:
        """Dataset rows of `count` further prompts, each repeated per rollout; appends them to `asked`."""
        numbers = [int(row) for row in self._more_rows(self.trainer._step, len(asked), count)]
        if len(numbers) != count:
            raise ValueError(
                f"more_rows returned {len(numbers)} rows, but {count} were requested: return exactly that many."
            )
        asked += numbers
        return [row for row in numbers for _ in range(self.trainer.num_generations)]

    def _share(self, count: int) -> tuple[int, int]:
        each = count // self.ranks.count
        return self.ranks.index * each, (self.ranks.index + 1) * each

    # ---- Choosing ---------------------------------------------------------------------------------------------------

    def _groups(self, batch: RolloutBatch) -> int:
        return len(batch.sizes) // self.trainer.num_generations

    def _is_real(self, batches: Sequence[RolloutBatch]) -> np.ndarray:
        """Mask of the groups that may be chosen; groups that only pad the first batch may not."""
        real = np.ones(sum(self._groups(batch) for batch in batches), dtype=bool)
        end = self.prompts + self.first_extra
        real[end : end + self.fillers] = False
        return real

    def _useful(self, batches: Sequence[RolloutBatch]) -> np.ndarray:
        """Mask, over the groups that may be chosen, of those with a gradient; in order of arrival."""
        sizes = np.concatenate([batch.sizes for batch in batches])
        rows = rollout_rows.has_gradient(sizes, float(sizes.max()))
        groups = rows.reshape(-1, self.trainer.num_generations).any(axis=1)
        return groups[self._is_real(batches)]

    def _reward_variance(self, rewards: torch.Tensor) -> np.ndarray:
        """Variance of the weighted reward over each group's rollouts, `(P,)`; ignores rollouts without any reward."""
        weighted = (rewards * self.trainer.reward_weights.to(rewards)).double()
        judged = ~torch.isnan(weighted).all(dim=2)
        total = torch.where(judged, weighted.nansum(dim=2), torch.nan)
        deviation = total - total.nanmean(dim=1, keepdim=True)
        return np.nan_to_num(deviation.square().nanmean(dim=1).numpy())

    def _combine(self, batches: Sequence[RolloutBatch], trained: np.ndarray) -> Batch:
        """This process's share of the trained rows."""
        trainer = self.trainer
        parts = [rollout_rows.by_row(batch.rows) for batch in batches]
        self._check_parts(parts)
        rows = rollout_rows.join(parts, self._padding)
        share = self.prompts * trainer.num_generations // self.ranks.count
        wanted = spread(self._sources(batches, trained), self.ranks.count, share)
        chosen = rollout_rows.assemble(self.ranks, rows, wanted, self._padding)
        if self._ignores_padding:
            chosen = rollout_rows.trim(chosen, self._padding, trainer.pad_to_multiple_of)
        # The denominator of losses covers what is trained on, counted the way TRL counts it.
        return {
            **rollout_rows.for_loss(chosen),
            "num_items_in_batch": self._tokens_that_count(chosen),
        }

    def _check_parts(self, parts: Sequence[Batch]) -> None:
        """Raise unless the batches of all processes can be joined row by row."""
        entries = [
            sorted(name for name in part if name not in rollout_rows.NAMES) for part in parts
        ]
        self.ranks.agree("the entries of rollouts", entries)
        layouts = [
            layout for layout in self.ranks.gather(list(map(rollout_rows.layout, parts))) if layout
        ]
        unknown = rollout_rows.unknown_entries(parts[0], self._padding)
        differ = any(names != entries[0] for names in entries) or any(
            layout != layouts[0] for layout in layouts
        )
        if unknown or differ:
            raise ValueError(
                f"Dynamic sampling cannot combine these rollouts: their entries are {entries + layouts}, and "
                f"{unknown or 'they differ from batch to batch'}. Switch it off (oversample=1, "
                "max_generation_batches=1)."
            )

    def _tokens_that_count(self, rows: Batch) -> torch.Tensor:
        """Loss tokens of all processes."""
        tokens = rollout_rows.loss_mask(rows).sum()
        return self.trainer.accelerator.gather(tokens).sum()

    def _check_count(self, rows: Batch) -> None:
        """Raise if an untested release counts tokens differently from the tested ones."""
        if requires.is_tested():
            return
        ours = int(self._tokens_that_count(rows))
        theirs = int(rows["num_items_in_batch"])
        if ours != theirs:
            raise ValueError(
                f"Dynamic sampling: {requires.installed()} of trl counts {theirs} tokens of a generation in its "
                f"loss, but {ours} were expected. Switch it off (oversample=1, max_generation_batches=1)."
            )

    def _sources(self, batches: Sequence[RolloutBatch], trained: np.ndarray) -> list[Source]:
        """Locations (rank, row) of the trained rows, in order of arrival."""
        sources: list[Source] = []
        before = 0
        for batch, rows in zip(batches, self._rows_of(batches, trained), strict=True):
            here = rollout_rows.row_count(batch.rows)
            sources += [
                (int(row) // here, before + int(row) % here) for row in np.flatnonzero(rows)
            ]
            before += here
        return sources

    def _rows_of(self, batches: Sequence[RolloutBatch], groups: np.ndarray) -> list[np.ndarray]:
        """For each batch, the mask of the rows that belong to these groups, `bool` `(R,)`."""
        ends = np.cumsum([len(batch.sizes) for batch in batches])
        return np.split(np.repeat(groups, self.trainer.num_generations), ends[:-1])

    # ---- Noting -----------------------------------------------------------------------------------------------------

    def _count(self, batches: Sequence[RolloutBatch], tokens: int, chosen: Batch) -> None:
        means = [batch.metrics["completions/mean_length"][-1] for batch in batches]
        generated = sum(
            round(mean * len(batch.sizes)) for mean, batch in zip(means, batches, strict=True)
        )
        rollouts = sum(len(batch.sizes) for batch in batches)
        kept = self.trainer.accelerator.gather(rollout_rows.row_tokens(chosen).sum()).sum()
        self.counts += SampledCounts(
            1, len(batches), rollouts, generated, tokens - generated, int(kept)
        )

    def _log(
        self, batches: Sequence[RolloutBatch], useful: np.ndarray, trained: np.ndarray
    ) -> None:
        metrics = self.trainer._metrics["train"]
        collected = [batch.metrics for batch in batches]
        logs.add_metrics(metrics, collected, [len(batch.sizes) for batch in batches])
        rewards = torch.cat([batch.rewards for batch in batches])
        for name, value in logs.reward_metrics(self.trainer, rewards).items():
            metrics[name][-1] = value
        metrics["learnalign/useful_rolled_out"].append(float(useful.mean()))
        metrics["learnalign/batches_rolled_out"].append(float(len(batches)))
        rows = self._rows_of(batches, trained)
        logs.add_rows(self.trainer._logs, [batch.logs for batch in batches], rows)
