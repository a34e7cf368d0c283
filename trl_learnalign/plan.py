"""The plan of a run: phases, their sizes, steps and prompt orders, as pure functions of (config, sizes, seed, step).

Terms: a *generation* is one batch of prompts that are rolled out together (`generation_batch_size / num_generations`
prompts). It feeds `steps_per_generation * num_iterations` micro-steps. `gradient_accumulation_steps` micro-steps make
one optimizer step. A *unit* is the smallest whole number of generations that is also a whole number of optimizer
steps. A phase (warm-up or stage) with a phase after it is a whole number of units, so a pool never changes inside a
generation or an accumulation.
Orders count in prompts, never in ranks or batches: the same plan holds for any number of processes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from trl_learnalign import rng
from trl_learnalign.config import LearnAlignConfig

WARMUP = "warmup"
STAGE = "stage"


@dataclass(frozen=True)
class Geometry:
    """How a trainer turns prompts into optimizer steps; all numbers are global, over all processes.

    Args:
        prompts_per_generation (`int`): Distinct prompts of one generation.
        rollouts (`int`): Rollouts per prompt, `G`.
        micro_steps_per_generation (`int`): Micro-steps fed by one generation,
            `steps_per_generation * num_iterations`.
        accumulation (`int`): Micro-steps per optimizer step.
    """

    prompts_per_generation: int
    rollouts: int
    micro_steps_per_generation: int
    accumulation: int

    @property
    def unit_micro_steps(self) -> int:
        """Micro-steps of one unit."""
        return math.lcm(self.micro_steps_per_generation, self.accumulation)

    @property
    def unit_steps(self) -> int:
        """Optimizer steps of one unit."""
        return self.unit_micro_steps // self.accumulation

    @property
    def unit_generations(self) -> int:
        """Generations of one unit."""
        return self.unit_micro_steps // self.micro_steps_per_generation

    @property
    def unit_prompts(self) -> int:
        """Prompts (with repetition over passes) of one unit."""
        return self.unit_generations * self.prompts_per_generation

    def generations_in(self, steps: int) -> int:
        """Return the number of generations that `steps` optimizer steps begin."""
        return math.ceil(steps * self.accumulation / self.micro_steps_per_generation)

    def prompts_in(self, steps: int) -> int:
        """Return the number of prompts (with repetition over passes) that `steps` optimizer steps begin."""
        return self.generations_in(steps) * self.prompts_per_generation


@dataclass(frozen=True)
class Phase:
    """A period of training on one pool of prompts.

    Args:
        index (`int`): Position in the plan.
        name (`str`): `"warmup"`, `"stage_1"`, `"stage_2"`, …; part of every seed of this phase, so that the order of
            a stage does not depend on whether there was a warm-up.
        kind (`str`): `"warmup"` or `"stage"`.
        size (`int`): Number of prompts of its pool.
        passes (`int`): Passes over the pool; if the steps were given, the passes that they begin.
        start (`int`): First optimizer step.
        steps (`int`): Number of optimizer steps.
        pass_micro_steps (`int`, *optional*, defaults to 0): Micro-steps of a pass, if the whole pool is trained on for
            a given number of steps. They are those of the trainer's own pass, which leaves out prompts that fill no
            generation. 0: a pass ends with the unit in which every prompt has occurred once more.
    """

    index: int
    name: str
    kind: str
    size: int
    passes: int
    start: int
    steps: int
    pass_micro_steps: int = 0

    @property
    def end(self) -> int:
        """First optimizer step after the phase."""
        return self.start + self.steps


@dataclass(frozen=True)
class Plan:
    """All phases of a run, in order.

    Args:
        phases (`tuple[Phase]`): In order, without gaps.
        geometry (`Geometry`): The trainer's batching.
        dataset_size (`int`): Number of prompts of the dataset; 0 if they cannot be counted (a stream, an environment).
        epoch_steps (`int`): Optimizer steps of a *virtual epoch*. Transformers computes the epoch length once, before
            training. So all virtual epochs have this length, and phases and passes change between them. They are
            internal: users see passes instead (`bridge.epochs`).
    """

    phases: tuple[Phase, ...]
    geometry: Geometry
    dataset_size: int
    epoch_steps: int

    @property
    def prompts(self) -> str:
        """The prompts of the dataset as a phrase."""
        return f"{self.dataset_size:,} prompts" if self.dataset_size else "a stream of prompts"

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.phases[-1].end

    @property
    def stages(self) -> tuple[Phase, ...]:
        """The phases that select."""
        return tuple(phase for phase in self.phases if phase.kind == STAGE)

    def unit_start(self, phase: Phase, step: int) -> int:
        """Return the first optimizer step of the unit of `phase` that contains a step."""
        return step - (step - phase.start) % self.geometry.unit_steps

    def phase_at(self, step: int) -> Phase:
        """Return the phase of optimizer step `step` (counted from 0); after the end of the run, the last phase."""
        for phase in self.phases:
            if step < phase.end:
                return phase
        return self.phases[-1]

    def prompts_before(self, phase: Phase, step: int) -> int:
        """Return the prompts (with repetition) that `phase` has used before optimizer step `step`."""
        units, rest = divmod(step - phase.start, self.geometry.unit_steps)
        if rest:
            raise ValueError(
                f"step {step} is inside a unit of {self.geometry.unit_steps} steps, not at its start"
            )
        return units * self.geometry.unit_prompts

    def ended_early(self, phase: Phase, step: int) -> Plan:
        """Return this plan with `phase` cut at `step` and the later phases moved up."""
        earlier = self.phases[: phase.index]
        cut = replace(phase, steps=step - phase.start)
        later = [
            replace(other, start=other.start - (phase.end - step))
            for other in self.phases[phase.index + 1 :]
        ]
        return replace(self, phases=(*earlier, cut, *later))


def stage_sizes(config: LearnAlignConfig, dataset_size: int) -> list[int]:
    """Return the number of prompts of each stage.

    Fractions are of the original pool and rounded on their running sum, so 50/30/20 of any pool sum to the pool.

    Raises:
        `ValueError`: If a stage would be empty, or the stages need more prompts than the pool has.
    """
    if config.stages_are_fractions:
        sizes = _sizes_of_fractions(config, dataset_size)
    else:
        sizes = [int(value) for value in config.stages]
    for value, size in zip(config.stages, sizes, strict=True):
        if size < 1:
            raise ValueError(
                f"stages={config.stages}: {value:g} of a pool of {dataset_size} prompts is less than one prompt; "
                "raise the fraction or enlarge the pool."
            )
    if config.reselect == "remaining":
        size, verb, remedy = sum(sizes), "add up to", ", or use reselect='all'."
    else:
        size, verb, remedy = max(sizes), "reach", "."
    if size > dataset_size:
        raise ValueError(
            f"stages={config.stages} {verb} {size} prompts, but the pool has {dataset_size}: lower them, enlarge "
            f"the pool{remedy}"
        )
    return sizes


def is_scored(config: LearnAlignConfig, size: int, candidates: int, dataset_size: int) -> bool:
    """Whether a stage scores its candidates: scores decide, or they are wanted although the selection is forced.

    Args:
        config (`LearnAlignConfig`): Settings, with `on_shortfall` and `skip_forced_scoring`.
        size (`int`): Number of prompts of the stage.
        candidates (`int`): Number of prompts that it may select.
        dataset_size (`int`): Number of prompts of the dataset. A stage of all of them selects nothing, and follows no
            selection.
    """
    if candidates > size or config.on_shortfall == "shrink":
        return True
    return size < dataset_size and not config.skip_forced_scoring


def _sizes_of_fractions(config: LearnAlignConfig, dataset_size: int) -> list[int]:
    remaining = config.reselect == "remaining"
    running = np.cumsum(config.stages) if remaining else np.asarray(config.stages)
    # Halves are rounded up; the last summand absorbs the rounding error of the running sum.
    ends = [math.floor(value * dataset_size + 0.5 + 1e-9) for value in running]
    if not remaining:
        return ends
    return [int(end - start) for start, end in itertools.pairwise([0, *ends])]


def steps_for(size: int, passes: int, geometry: Geometry) -> int:
    """Return the optimizer steps that train on `size` prompts at least `passes` times each, in whole units."""
    return math.ceil(size * passes / geometry.unit_prompts) * geometry.unit_steps


def pass_micro_steps(size: int, geometry: Geometry) -> int:
    """Return the micro-steps of the trainer's own pass over `size` prompts: TRL drops those filling no generation."""
    generations = max(1, size // geometry.prompts_per_generation)
    return generations * geometry.micro_steps_per_generation


def pass_steps(size: int, geometry: Geometry) -> int:
    """Return the optimizer steps of such a pass: transformers makes a step of an incomplete last accumulation."""
    return math.ceil(pass_micro_steps(size, geometry) / geometry.accumulation)


def pass_end(phase: Phase, size: int, number: int, geometry: Geometry) -> int:
    """Return the optimizer steps from the start of a phase to the end of its pass `number`, counted from 1.

    Args:
        phase (`Phase`): The phase.
        size (`int`): Number of prompts that it trains on.
        number (`int`): Number of the pass; 0 is the start.
        geometry (`Geometry`): The trainer's batching.
    """
    if phase.pass_micro_steps:
        return number * math.ceil(phase.pass_micro_steps / geometry.accumulation)
    return steps_for(size, number, geometry)


def passes_ended(phase: Phase, size: int, steps: int, geometry: Geometry) -> int:
    """Return the passes that end within the first `steps` optimizer steps of a phase; arguments as in [`pass_end`]."""
    if phase.pass_micro_steps:
        return steps // math.ceil(phase.pass_micro_steps / geometry.accumulation)
    if not size:  # a warm-up of no prompts
        return 0
    return steps // geometry.unit_steps * geometry.unit_prompts // size


def in_whole_units(steps: int, geometry: Geometry) -> int:
    """Return at least `steps` optimizer steps, in whole units."""
    return math.ceil(steps / geometry.unit_steps) * geometry.unit_steps


def passes_in(steps: int, size: int, geometry: Geometry) -> int:
    """Return the number of passes over `size` prompts that `steps` optimizer steps begin."""
    return math.ceil(geometry.prompts_in(steps) / size)


def check_pool(config: LearnAlignConfig, dataset_size: int, geometry: Geometry) -> None:
    """Check that there are enough prompts for a generation and for the warm-up.

    Raises:
        `ValueError`: If there are too few, naming both numbers and the remedy.
    """
    if dataset_size < geometry.prompts_per_generation:
        raise ValueError(
            f"The pool has {dataset_size} prompts, but one generation batch needs {geometry.prompts_per_generation} "
            "(generation_batch_size / num_generations): enlarge the pool, or lower per_device_train_batch_size, "
            "steps_per_generation or gradient_accumulation_steps."
        )
    if config.reliability and geometry.rollouts % 2:
        raise ValueError(
            "reliability=True splits the rollouts of each prompt into two halves, but "
            f"num_generations={geometry.rollouts} is odd: make it even, or set reliability=False."
        )
    if config.warmup_samples > dataset_size:
        raise ValueError(
            f"warmup_samples={config.warmup_samples}, but the pool has {dataset_size} prompts: lower it to at most "
            "that."
        )


def warmup_plan(config: LearnAlignConfig, dataset_size: int, geometry: Geometry) -> Plan:
    """Return the plan of a run that ends after its warm-up; it has no steps if there is no warm-up.

    Raises:
        `ValueError`: As in [`check_pool`].
    """
    check_pool(config, dataset_size, geometry)
    size, passes = config.warmup_samples, config.warmup_epochs
    warmup = Phase(0, WARMUP, WARMUP, size, passes, 0, steps_for(size, passes, geometry))
    return Plan((warmup,), geometry, dataset_size, warmup.steps or geometry.unit_steps)


def trainers_plan(steps: int, geometry: Geometry) -> Plan:
    """Return the plan of a run in the trainer's own order whose prompts cannot be counted.

    Args:
        steps (`int`): Number of optimizer steps.
        geometry (`Geometry`): The trainer's batching.
    """
    stage = Phase(index=0, name=f"{STAGE}_1", kind=STAGE, size=0, passes=1, start=0, steps=steps)
    return Plan((stage,), geometry, dataset_size=0, epoch_steps=steps)


def make_plan(config: LearnAlignConfig, dataset_size: int, geometry: Geometry) -> Plan:
    """Return the plan of a run; see the terms in the module's docstring.

    A pool that is not a multiple of the prompts per unit wraps around. Each prompt is trained on at least `passes`
    times, and the last unit is filled with prompts of the next pass.

    Raises:
        `ValueError`: If the pool is smaller than one generation or the warm-up, or a stage is impossible.
    """
    check_pool(config, dataset_size, geometry)
    phases: list[Phase] = []
    if config.warmup_samples:
        size, passes = config.warmup_samples, config.warmup_epochs
        phases.append(Phase(0, WARMUP, WARMUP, size, passes, 0, steps_for(size, passes, geometry)))
    lengths = _stage_lengths(config, dataset_size, geometry)
    for number, (size, passes, steps) in enumerate(lengths, start=1):
        start = phases[-1].end if phases else 0
        # A given number of steps for the whole pool is a trainer's length, so the passes are a trainer's passes too.
        is_own = config.is_whole_pool and config.stage_steps is not None
        own = pass_micro_steps(size, geometry) if is_own else 0
        name = f"{STAGE}_{number}"
        phases.append(Phase(len(phases), name, STAGE, size, passes, start, steps, own))
    return Plan(tuple(phases), geometry, dataset_size, _epoch_steps(config, phases, geometry))


def _epoch_steps(config: LearnAlignConfig, phases: Sequence[Phase], geometry: Geometry) -> int:
    """Return the steps of a virtual epoch, which divide every pass and every phase but the last.

    Stages that may become shorter can end after any unit, and a sampler that learns draws before each unit. Without
    either, longer epochs are used, since they create fewer iterators.
    """
    can_end_early = config.plateau_patience > 0 or config.compute_budget is not None
    elastic = can_end_early or config.on_shortfall == "shrink" or config.goes_by_outcomes
    ends = set()
    for phase in phases:
        passes = passes_ended(phase, phase.size, phase.steps, geometry)
        if phase.pass_micro_steps:  # all of equal length
            passes = min(passes, 1)
        ends |= {pass_end(phase, phase.size, number, geometry) for number in range(1, passes + 1)}
        if phase is not phases[-1]:
            ends.add(phase.steps)
    if elastic:
        return math.gcd(geometry.unit_steps, *ends)
    return math.gcd(*ends) or phases[-1].steps


def _stage_lengths(
    config: LearnAlignConfig,
    dataset_size: int,
    geometry: Geometry,
) -> list[tuple[int, int, int]]:
    """Return prompts, passes and optimizer steps of each stage."""
    sizes = stage_sizes(config, dataset_size)
    if config.stage_steps is not None:
        *earlier, last = _for_each(config.stage_steps, sizes)
        steps = [
            *(in_whole_units(value, geometry) for value in earlier),
            last,
        ]  # no phase follows the last stage
        lengths = zip(sizes, steps, strict=True)
        passes = [passes_in(stage_steps, size, geometry) for size, stage_steps in lengths]
    else:
        passes = _for_each(config.stage_epochs or [1], sizes)
        rounds = zip(sizes, passes, strict=True)
        steps = [steps_for(size, stage_epochs, geometry) for size, stage_epochs in rounds]
    return list(zip(sizes, passes, steps, strict=True))


def _for_each(values: list[int], sizes: list[int]) -> list[int]:
    """Return one value for each stage."""
    return values * len(sizes) if len(values) == 1 else values


def warmup_pool(seed: int, dataset_size: int, size: int) -> np.ndarray:
    """Return the seeded random subset of the warm-up, ascending; a larger subset contains the smaller ones."""
    order = rng.permutation(rng.key(seed, "warmup"), np.arange(dataset_size))
    return np.sort(order[:size])


def scored_sample(seed: int, phase: str, candidates: np.ndarray, size: int | None) -> np.ndarray:
    """Return the candidates of a stage that are scored, ascending: all, or a seeded random subset (`pool_sample`).

    A larger subset contains the smaller ones. Each stage draws a new subset, so that a later stage does not score only
    prompts that an earlier stage has left over.
    """
    if size is None or size >= len(candidates):
        return candidates
    order = rng.permutation(rng.key(seed, "scored sample", phase), candidates)
    return np.sort(order[:size])


def tie_order(seed: int, phase: str, dataset_size: int) -> np.ndarray:
    """Return the rank of each prompt in a seeded permutation, `(dataset_size,)`, to break ties.

    The position in the file never breaks a tie.
    """
    order = rng.permutation(rng.key(seed, "ties", phase), np.arange(dataset_size))
    ranks = np.empty(dataset_size, dtype=np.int64)
    ranks[order] = np.arange(dataset_size)
    return ranks


def training_order(
    seed: int,
    phase: str,
    pool: Sequence[int] | np.ndarray,
    start: int,
    count: int,
) -> np.ndarray:
    """Return prompts number `start` to `start + count` of a phase: pass after pass, each in its own seeded order.

    Args:
        seed (`int`): `LearnAlignConfig.selection_seed`.
        phase (`str`): `Phase.name`.
        pool (sequence of `int`): The phase's prompts, in any order.
        start (`int`): Position in prompts from the start of the phase.
        count (`int`): Number of prompts.

    Returns:
        `np.ndarray`: `int64` of shape `(count,)`.
    """
    pool = np.asarray(pool, dtype=np.int64)
    first, last = start // len(pool), (start + count - 1) // len(pool)
    orders = [np.empty(0, dtype=np.int64)]  # there is no pass without prompts
    for number in range(first, last + 1):
        stream = rng.key(seed, "order", phase, number)
        orders.append(rng.permutation(stream, pool))
    offset = start - first * len(pool)
    return np.concatenate(orders)[offset : offset + count]


def pass_numbers(plan: Plan, phase: Phase, places: np.ndarray, pool_size: int) -> np.ndarray:
    """Return the number of each prompt's pass, counted over all phases.

    Args:
        plan (`Plan`): The run's plan.
        phase (`Phase`): The phase of the prompts.
        places (`np.ndarray`): Positions in prompts from the start of the phase.
        pool_size (`int`): Number of prompts of the phase's pool.

    Returns:
        `np.ndarray`: `int64`, shape of `places`. Prompts that only fill the phase's last unit belong to its last pass.
    """
    before = sum(earlier.passes for earlier in plan.phases[: phase.index])
    return before + np.minimum(places // pool_size, phase.passes - 1)
