"""Random orders: of the items, whatever their order and their number, and the same for ever."""

import numpy as np
import pytest

from trl_learnalign import rng


def test_a_permutation_is_that_of_the_items_not_of_their_order():
    items = np.array([40, 7, 12, 3, 99])
    found = rng.permutation(rng.key(3, "order"), items)
    assert sorted(found) == sorted(items)
    np.testing.assert_array_equal(found, rng.permutation(rng.key(3, "order"), items[::-1]))


@pytest.mark.parametrize("distinct", [1, 5, 2**63])
def test_equal_draws_keep_the_order_of_the_items(monkeypatch, distinct):
    def draws(_stream, numbers):
        mixed = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return mixed % np.uint64(distinct)

    monkeypatch.setattr(rng, "random_bits", draws)
    items = np.random.default_rng(0).permutation(5000)
    wanted = sorted(range(5000), key=lambda item: (int(draws(0, np.array([item]))[0]), item))
    assert rng.permutation(0, items).tolist() == wanted
