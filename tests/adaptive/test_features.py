"""Features: a few numbers for each prompt, of one scale, whatever the embeddings look like."""

import numpy as np
import pytest

from trl_learnalign.adaptive.belief import FITTED, fit_projection, prompt_features


def embeddings(rows=300, entries=12, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(rows, 4)) @ rng.normal(size=(4, entries)) + 3).astype(np.float32)


def test_features_are_centred_and_have_mean_squared_length_one():
    features = prompt_features(embeddings(), 3)
    assert features.shape == (300, 3)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features.mean(axis=0), 0, atol=1e-5)
    assert (features.astype(float) ** 2).sum(axis=1).mean() == pytest.approx(1, rel=1e-5)


def test_directions_of_largest_variance_come_first_and_no_empty_ones():
    features = prompt_features(embeddings(), 12)
    assert features.shape == (300, 4)  # the embeddings vary in four directions
    spread = features.std(axis=0)
    assert (np.diff(spread) <= 0).all()
    np.testing.assert_allclose(np.corrcoef(features.T), np.eye(4), atol=1e-3)


def test_all_directions_together_keep_the_standardised_geometry():
    vectors = embeddings(50)
    standard = (vectors - vectors.mean(axis=0)) / vectors.std(axis=0)
    features = prompt_features(vectors, 12).astype(float)
    products = standard @ standard.T
    found = features @ features.T
    np.testing.assert_allclose(found / np.trace(found), products / np.trace(products), atol=1e-5)


def test_an_entry_that_dwarfs_the_others_does_not_count_for_more():
    vectors = embeddings()
    plain, scaled = (
        prompt_features(vectors, 4),
        prompt_features(vectors * np.array([1e4] + [1] * 11), 4),
    )
    np.testing.assert_allclose(np.abs(scaled), np.abs(plain), atol=1e-3)


def test_a_pool_can_be_projected_shard_by_shard():
    vectors = embeddings()
    projection = fit_projection(vectors, 3)
    shards = np.concatenate(
        [projection(vectors[start : start + 70]) for start in range(0, 300, 70)]
    )
    np.testing.assert_allclose(shards, projection(vectors), rtol=1e-5, atol=1e-6)


def test_a_large_pool_is_fitted_on_a_seeded_sample():
    vectors = np.random.default_rng(0).normal(size=(FITTED + 500, 3)).astype(np.float32)
    np.testing.assert_array_equal(
        prompt_features(vectors, 2, seed=1), prompt_features(vectors, 2, seed=1)
    )
    assert (prompt_features(vectors, 2, seed=1) != prompt_features(vectors, 2, seed=2)).any()


def test_renamed_rows_have_renamed_features():
    vectors, order = embeddings(), np.random.default_rng(1).permutation(300)
    plain, renamed = prompt_features(vectors, 3), prompt_features(vectors[order], 3)
    np.testing.assert_allclose(
        np.abs(renamed), np.abs(plain[order]), atol=1e-4
    )  # axes have no sign


@pytest.mark.parametrize("alike", [np.zeros((6, 4)), np.full((6, 4), 0.1), np.ones((1, 4))])
def test_prompts_that_are_all_alike_have_no_features(alike):
    assert prompt_features(alike, 3).shape == (len(alike), 0)


def test_equal_prompts_have_equal_features():
    features = prompt_features(np.repeat(embeddings(40), 2, axis=0), 4)
    np.testing.assert_array_equal(features[0::2], features[1::2])


def test_embeddings_that_are_none_are_refused():
    broken = embeddings(5)
    broken[3, 2] = np.nan
    with pytest.raises(
        ValueError, match="embedding of prompt 3 is not finite: remove such prompts"
    ):
        prompt_features(broken)
    with pytest.raises(
        ValueError, match=r"shape \(5,\) and the type float32: give floating-point numbers"
    ):
        prompt_features(broken[:, 0])
    with pytest.raises(ValueError, match="give floating-point numbers"):
        prompt_features(np.ones((3, 2), dtype=int))
    with pytest.raises(ValueError, match="one row for each prompt"):
        prompt_features(np.ones((0, 2)))
    with pytest.raises(ValueError, match="dimensions=0: give a number of at least 1"):
        prompt_features(embeddings(5), 0)
    with pytest.raises(ValueError, match="have 3 entries, but the projection was fitted on 12"):
        fit_projection(embeddings())(np.ones((2, 3)))
