import itertools

import numpy as np
import pytest

from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.plan import (
    Geometry,
    make_plan,
    stage_sizes,
    tie_order,
    training_order,
    warmup_pool,
)
from trl_learnalign.training.sampler import CurriculumSampler

KNOWN_WARMUP = [29, 37, 55, 59, 70]
KNOWN_ORDER = [5, 4, 3, 1, 2, 0, 1, 3]
KNOWN_TIES = [3, 2, 0, 5, 4, 1]


def config(**options):
    return LearnAlignConfig(**{"warmup_samples": 10, **options})


def geometry(prompts=4, rollouts=2, micro_steps=1, accumulation=1):
    return Geometry(prompts, rollouts, micro_steps, accumulation)


@pytest.mark.parametrize("pool", [7, 10, 99, 100, 7473])
def test_fractions_of_any_pool_add_up_to_it(pool):
    sizes = stage_sizes(config(warmup_samples=0), pool)
    assert sum(sizes) == pool
    assert (
        max(abs(size - share * pool) for size, share in zip(sizes, (0.5, 0.3, 0.2), strict=True))
        <= 1
    )


def test_the_papers_gsm8k_stages():
    assert stage_sizes(config(), 7473) == [3737, 2241, 1495]


@pytest.mark.parametrize("size", [100, 500, 1000, 2000, 7473])
def test_any_number_of_prompts_gets_the_same_steps(size):
    plan = make_plan(
        config(stages=[size] if size < 7473 else [1.0], stage_steps=1246),
        7473,
        geometry(6, 8, 6, 6),
    )
    (stage,) = plan.stages
    assert (stage.size, stage.steps) == (size, 1246)
    assert (stage.passes - 1) * size < 1246 * 6 <= stage.passes * size
    assert plan.total_steps == 2 + 1246


def test_steps_of_each_stage_that_another_follows_are_whole_units():
    plan = make_plan(config(warmup_samples=0, stage_steps=[5, 6, 1]), 40, geometry(micro_steps=2))
    assert [phase.steps for phase in plan.phases] == [6, 6, 1]
    assert make_plan(config(stage_steps=0), 40, geometry()) == make_plan(config(), 40, geometry())


def test_reselecting_from_all_takes_each_fraction_of_the_whole_pool():
    assert stage_sizes(config(reselect="all", stages=[0.6, 0.6, 1.0]), 50) == [30, 30, 50]


@pytest.mark.parametrize("micro_steps", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("accumulation", [1, 2, 3, 4])
@pytest.mark.parametrize("passes", [1, 3])
def test_every_prompt_is_trained_at_least_once_a_pass(micro_steps, accumulation, passes):
    plan = make_plan(config(stage_epochs=passes), 37, geometry(4, 2, micro_steps, accumulation))
    for phase in plan.phases:
        trained = phase.steps * accumulation // micro_steps * 4
        assert phase.steps * accumulation % micro_steps == 0
        order = training_order(1, phase.name, np.arange(phase.size), 0, trained)
        assert np.bincount(order, minlength=phase.size).min() >= phase.passes
        assert trained - phase.size * phase.passes < plan.geometry.unit_prompts


def test_phases_follow_each_other_and_epochs_never_straddle_them():
    for pool, prompts, passes in itertools.product((20, 37, 64), (1, 4, 6), (1, 2)):
        plan = make_plan(config(stage_epochs=passes), pool, geometry(prompts, 2, 2, 4))
        assert plan.phases[0].start == 0
        assert all(a.end == b.start for a, b in itertools.pairwise(plan.phases))
        assert all(phase.steps % plan.epoch_steps == 0 for phase in plan.phases)
        for step in range(plan.total_steps):
            assert plan.phase_at(step).start <= step < plan.phase_at(step).end


def test_orders_are_pure_functions_of_seed_phase_and_position():
    pool = np.array([3, 8, 11, 20, 21])
    whole = training_order(5, "stage_1", pool, 0, 23)
    assert sorted(whole[:5]) == sorted(pool)
    assert sorted(whole[5:10]) == sorted(pool)
    for start, count in itertools.product((0, 3, 5, 12), (1, 4, 11)):
        assert (
            training_order(5, "stage_1", pool[::-1], start, count).tolist()
            == whole[start : start + count].tolist()
        )
    assert training_order(6, "stage_1", pool, 0, 23).tolist() != whole.tolist()
    assert training_order(5, "stage_2", pool, 0, 23).tolist() != whole.tolist()


def test_passes_have_orders_of_their_own():
    order = training_order(0, "stage_1", np.arange(50), 0, 100)
    assert order[:50].tolist() != order[50:].tolist()


def test_known_values_do_not_move():
    """Selections of published runs depend on these."""
    assert warmup_pool(42, 100, 5).tolist() == KNOWN_WARMUP
    assert training_order(42, "stage_1", np.arange(6), 0, 8).tolist() == KNOWN_ORDER
    assert tie_order(42, "stage_1", 6).tolist() == KNOWN_TIES


def test_a_larger_warmup_contains_the_smaller_one():
    assert set(warmup_pool(3, 50, 5)) < set(warmup_pool(3, 50, 20))


def test_ending_early_moves_later_phases_up():
    plan = make_plan(config(plateau_patience=5), 40, geometry())
    stage = plan.stages[0]
    cut = plan.ended_early(stage, stage.start + 2)
    assert cut.stages[0].steps == 2
    assert cut.total_steps == plan.total_steps - (stage.steps - 2)
    assert cut.stages[1].start == stage.start + 2
    assert [phase.steps for phase in cut.stages[1:]] == [phase.steps for phase in plan.stages[1:]]


def test_sampler_repeats_each_generation_in_trls_layout():
    plan = make_plan(
        config(warmup_samples=0, stages=[6]), 8, geometry(prompts=3, rollouts=2, micro_steps=2)
    )
    sampler = CurriculumSampler(plan)
    first, second = np.array([4, 0, 5]), np.array([1, 3, 2])
    sampler.begin_epoch(np.concatenate([first, second]))
    indices = list(sampler)
    assert len(indices) == len(sampler) == 2 * 3 * 2 * 2
    assert indices == [
        *np.repeat(first, 2),
        *np.repeat(first, 2),
        *np.repeat(second, 2),
        *np.repeat(second, 2),
    ]


def test_a_sampler_without_a_pool_says_what_drives_it():
    plan = make_plan(config(), 40, geometry())
    with pytest.raises(RuntimeError, match="LearnAlignCallback"):
        list(CurriculumSampler(plan))
