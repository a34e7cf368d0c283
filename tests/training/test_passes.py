"""Passes as epochs, against a count of prompts by hand."""

import itertools

import pytest

from trl_learnalign import LearnAlignConfig
from trl_learnalign.plan import Geometry, make_plan
from trl_learnalign.training.state import RunPasses, RunState

GEOMETRIES = [
    Geometry(prompts, 2, micro_steps, accumulation)
    for prompts, micro_steps, accumulation in itertools.product((1, 4, 6), (1, 2, 3), (1, 2, 4))
]


def passes_of(size, geometry, **options):
    config = LearnAlignConfig.adaptive(**options)
    plan = make_plan(config, size, geometry)
    run = RunState(plan, config, scoring_batch_prompts=1)
    return plan, RunPasses(run), run


def by_hand(phase, size, geometry):
    """Steps at which every prompt of a phase has come once more: unit after unit."""
    ends, given = [], 0
    for step in range(geometry.unit_steps, phase.steps + 1, geometry.unit_steps):
        given += geometry.unit_prompts
        ends += [step] * (given // size - len(ends))
    return ends


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_passes_of_stages_end_where_every_prompt_has_come_once_more(geometry):
    options = dict(warmup_samples=7, warmup_epochs=2, stages=[20, 9], stage_epochs=[3, 1])
    plan, passes, _ = passes_of(40, geometry, selector="random", **options)
    ends, number = {0.0: 0}, 0
    for phase in plan.phases:
        for end in by_hand(phase, phase.size, geometry)[: phase.passes]:
            number += 1
            ends[float(number)] = phase.start + end
    assert passes.count >= number  # of fewer prompts than a unit, more come than are wanted
    last = [passes.epoch_at(step) for step in range(1, plan.total_steps + 1)]
    assert last == sorted(last)
    for end in set(ends.values()) - {0}:
        assert passes.ends_at(end)
        assert passes.epoch_at(end) == int(passes.epoch_at(end))
        assert end % plan.epoch_steps == 0
    for step in set(range(1, plan.total_steps)) - set(ends.values()):
        assert passes.epoch_at(step) % 1 or any(
            phase.size < geometry.unit_prompts for phase in plan.phases
        )


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("order", ["adaptive", "shuffled"])
def test_passes_over_the_whole_pool_are_those_of_transformers(geometry, order):
    """Its arithmetic: `_run_epoch` and `set_initial_training_values`."""
    plan, passes, _ = passes_of(14, geometry, order=order, stage_steps=[31])
    micro_steps = 14 // geometry.prompts_per_generation * geometry.micro_steps_per_generation
    steps = -(-micro_steps // geometry.accumulation)
    assert passes.count == -(-31 // steps)
    for step in range(1, 32):
        epoch, inside = divmod(step - 1, steps)
        done = min((inside + 1) * geometry.accumulation, micro_steps)
        assert passes.epoch_at(step) == epoch + done / micro_steps
        assert passes.ends_at(step) == (inside + 1 == steps or step == 31)
        assert not passes.ends_at(step) or step % plan.epoch_steps == 0 or step == 31


def test_a_phase_that_ends_early_leaves_a_fraction_and_the_next_one_a_whole_number():
    plan, passes, run = passes_of(
        40, Geometry(2, 2, 1, 1), stages=[12, 8], stage_epochs=[2], selector="random"
    )
    assert [phase.end for phase in plan.phases] == [12, 20]
    run.end(plan.phases[0], 9)
    assert [passes.epoch_at(step) for step in (6, 9, 10, 13)] == [1.0, 1.5, 2.25, 3.0]
    assert passes.count == 4
    assert [step for step in range(18) if passes.ends_at(step)] == [6, 9, 13, 17]


def test_a_stage_that_found_fewer_prompts_has_shorter_passes():
    plan, passes, run = passes_of(
        40,
        Geometry(2, 2, 1, 1),
        stages=[12],
        stage_epochs=[2],
        selector="random",
        on_shortfall="shrink",
    )
    run.select(plan.phases[0], range(8))
    assert [step for step in range(10) if passes.ends_at(step)] == [4, 8]
