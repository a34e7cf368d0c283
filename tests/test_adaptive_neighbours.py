"""Neighbours: who is alike, to the bit."""

import builtins

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_learnalign.adaptive.neighbours import (
    LARGEST_SUM,
    Neighbours,
    largest_in_rows,
    nearest_neighbours,
    whole_units,
)


def embeddings(rows, entries=12, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, entries)).astype(np.float32) + 3


def obvious(vectors, count, power):
    """Pair by pair, in float64."""
    centred = vectors.astype(float) - vectors.astype(float).mean(axis=0)
    lengths = np.linalg.norm(centred, axis=1)
    weights = np.zeros((len(vectors), count))
    for i, vector in enumerate(centred):
        cosines = [
            max(0.0, float(vector @ other) / (lengths[i] * lengths[j])) if j != i else -1.0
            for j, other in enumerate(centred)
        ]
        weights[i] = np.sort(cosines)[::-1][:count] ** power
    return weights


@pytest.mark.parametrize("power", [1.0, 4.0])
def test_weights_are_those_of_the_most_similar_prompts(power):
    vectors = embeddings(60)
    found = nearest_neighbours(vectors, count=7, power=power)
    # Unit vectors are rounded to some 1/4000.
    np.testing.assert_allclose(found.weights, obvious(vectors, 7, power), atol=2e-3)
    assert (np.diff(found.weights, axis=1) <= 0).all()
    assert not (found.rows == np.arange(60)[:, None]).any()


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(2, 40), block=st.integers(1, 50), seed=st.integers(0, 5), distinct=st.integers(1, 40))
def test_any_block_size_finds_the_same_bits(rows, block, seed, distinct):
    vectors = embeddings(rows, seed=seed)[np.arange(rows) % distinct]  # with equal prompts
    one, other = (nearest_neighbours(vectors, 5, block_rows=size) for size in (block, 256))
    np.testing.assert_array_equal(one.rows, other.rows)
    np.testing.assert_array_equal(one.weights, other.weights)


def test_products_are_exact_whole_numbers_in_float32():
    vectors = torch.from_numpy(embeddings(50, entries=3000))
    units, scale = whole_units(vectors)
    exact = units.numpy().astype(np.int64) @ units.numpy().astype(np.int64).T
    assert exact.max() < LARGEST_SUM
    assert np.abs(units.numpy()).astype(np.int64).max() <= scale
    np.testing.assert_array_equal((units @ units.T).numpy(), exact)
    backwards = units.flip(1).contiguous()
    np.testing.assert_array_equal((backwards @ backwards.T).numpy(), exact)


def test_renamed_rows_have_renamed_neighbours():
    vectors = embeddings(80)
    order = np.random.default_rng(1).permutation(80)
    plain, renamed = nearest_neighbours(vectors, 6), nearest_neighbours(vectors[order], 6)
    # Row i of the second is prompt order[i] of the first.
    np.testing.assert_array_equal(order[renamed.rows], plain.rows[order])
    np.testing.assert_array_equal(renamed.weights, plain.weights[order])


def test_equally_similar_prompts_come_in_the_order_of_their_rows():
    vectors = np.repeat(embeddings(4), 5, axis=0)
    found = nearest_neighbours(vectors, 4)
    np.testing.assert_array_equal(found.rows[7], [5, 6, 8, 9])
    np.testing.assert_allclose(found.weights, 1, atol=1e-3)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(-2, 2), min_size=9, max_size=9), min_size=1, max_size=6), st.integers(1, 9))
def test_the_largest_of_rows_are_found_with_the_lowest_columns_of_equal_ones(rows, count):
    block = torch.tensor(rows, dtype=torch.float32)
    values, columns = largest_in_rows(block, count)
    for row, own, found in zip(rows, values.tolist(), columns.tolist(), strict=True):
        wanted = sorted(range(9), key=lambda column: (-row[column], column))[:count]
        assert found == wanted
        assert own == [row[column] for column in wanted]


def test_few_prompts_have_as_many_neighbours_as_there_are_others():
    assert nearest_neighbours(embeddings(5), 64).rows.shape == (5, 4)
    assert nearest_neighbours(embeddings(1), 64).rows.shape == (1, 0)
    assert nearest_neighbours(embeddings(5), 0).rows.shape == (5, 0)


def test_prompts_in_the_centre_have_no_weight():
    alike = np.full((6, 4), 0.1, dtype=np.float32)
    assert not nearest_neighbours(alike, 3).weights.any()
    assert not nearest_neighbours(np.zeros((6, 4), dtype=np.float32), 3).weights.any()
    # Two opposite vectors and one between them.
    found = nearest_neighbours(np.array([[1.0, 0], [-1, 0], [0, 0]]), 2)
    assert not found.weights.any()


def test_torch_and_low_precision_embeddings_are_read():
    vectors = torch.from_numpy(embeddings(30)).to(torch.bfloat16)
    np.testing.assert_array_equal(
        nearest_neighbours(vectors, 4).rows, nearest_neighbours(vectors.float().numpy(), 4).rows
    )


def test_embeddings_that_are_none_are_refused():
    broken = embeddings(5)
    broken[3, 2] = np.nan
    with pytest.raises(ValueError, match="embedding of prompt 3 is not finite: leave such prompts out"):
        nearest_neighbours(broken)
    with pytest.raises(ValueError, match=r"shape \(5,\).*give floating-point numbers"):
        nearest_neighbours(broken[:, 0])
    with pytest.raises(ValueError, match="give floating-point"):
        nearest_neighbours(np.ones((3, 2), dtype=int))
    with pytest.raises(ValueError, match="one row for each prompt"):
        nearest_neighbours(np.ones((0, 2)))


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="method='fast': choose one of 'auto', 'exact', 'approximate'"):
        nearest_neighbours(embeddings(5), method="fast")
    with pytest.raises(ValueError, match="count=-1: give a number of at least 0"):
        nearest_neighbours(embeddings(5), count=-1)
    with pytest.raises(ValueError, match="block_rows=0: give a number of at least 1"):
        nearest_neighbours(embeddings(5), block_rows=0)
    with pytest.raises(ValueError, match="power=0: give a number above 0"):
        nearest_neighbours(embeddings(5), power=0)


def test_neighbours_that_are_none_are_refused():
    with pytest.raises(ValueError, match="must both be"):
        Neighbours(np.zeros((3, 2), dtype=np.int32), np.zeros((3, 1), dtype=np.float32))
    with pytest.raises(ValueError, match="numbered 0 to 3, and there are 3 prompts"):
        Neighbours(np.array([[0], [1], [3]], dtype=np.int32), np.zeros((3, 1), dtype=np.float32))


def test_the_approximate_search_finds_most_of_the_nearest():
    pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(40, 16))
    vectors = (centres[rng.integers(0, 40, 3000)] + 0.5 * rng.normal(size=(3000, 16))).astype(np.float32)
    exact = nearest_neighbours(vectors, 10, method="exact")
    close = nearest_neighbours(vectors, 10, method="approximate")
    again = nearest_neighbours(vectors, 10, method="approximate")
    np.testing.assert_array_equal(close.rows, again.rows)
    shared = [len(set(a) & set(b)) for a, b in zip(exact.rows.tolist(), close.rows.tolist(), strict=True)]
    assert np.mean(shared) > 8
    assert not (close.rows == np.arange(3000)[:, None]).any()
    # Where the same prompts were compared, the weights are the same to the bit.
    same = (exact.rows == close.rows).all(axis=1)
    assert same.mean() > 0.3
    np.testing.assert_array_equal(exact.weights[same], close.weights[same])


def test_without_faiss_the_approximate_search_says_what_to_do(monkeypatch):
    real = builtins.__import__

    def importing(name, *arguments, **named):
        if name == "faiss":
            raise ImportError(name)
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", importing)
    with pytest.raises(ImportError, match="pip install faiss-cpu, or compare all pairs with method='exact'"):
        nearest_neighbours(embeddings(20), method="approximate")
