"""What the benchmark of the rollout budget counts."""

import numpy as np
import pytest
from loading import benchmark_modules


@pytest.fixture(scope="module")
def overlap():
    with benchmark_modules("budget_overlap", "common") as modules:
        yield modules["budget_overlap"]


@pytest.fixture
def pool(overlap):
    """A third is always right, a third always wrong, a third is right half of the time; features tell which."""
    kinds = np.arange(300) % 3
    return overlap.PoolOfRates(
        rates=np.array([0.0, 0.5, 1.0])[kinds],
        features=np.eye(3, dtype=np.float32)[kinds],
        kinds=kinds,
        seed=3,
        size=90,
    )


def test_all_methods_but_the_first_have_as_many_rollouts_at_most(overlap, pool):
    found = {name: overlap.judged(pool, spend(pool)) for name, spend in overlap.methods(8).items()}
    assert [found[name]["rollouts"] for name in found] == [2400, 900, 960, 960]


def test_what_features_tell_is_found(overlap, pool):
    found = {name: overlap.judged(pool, spend(pool)) for name, spend in overlap.methods(8).items()}
    assert found["sample"]["signal"] == pytest.approx(0.4, abs=0.1)
    assert found["budget"]["signal"] > 0.85
    assert found["budget"]["overlap"] > found["sample"]["overlap"] + 0.2
    assert found["budget"]["kinds"] == pytest.approx(1)


def test_a_second_group_is_of_the_same_budget(overlap, pool):
    right, total = overlap.in_rounds(pool, 0.4, 4, 2.0, 8, again=0.25)
    assert total.sum() == 960
    assert set(total.tolist()) == {0, 8, 16}
    assert (right <= total).all()
    assert (total == 16).sum() == 30
