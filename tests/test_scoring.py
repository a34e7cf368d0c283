import numpy as np
import oracles
import pytest
import torch

from trl_learnalign import scoring
from trl_learnalign.plan import tie_order


def random_problem(prompts: int = 40, rollouts: int = 8, dim: int = 32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    rates = torch.rand(prompts, 1, generator=generator)
    successes = (torch.rand(prompts, rollouts, generator=generator) < rates).double()
    successes[0], successes[1] = 0.0, 1.0
    return successes, torch.randn(prompts, dim, generator=generator, dtype=torch.float64) + 0.3


def in_chunks(features: torch.Tensor, size: int):
    places = torch.arange(len(features))
    return [(places[i : i + size], features[i : i + size]) for i in range(0, len(features), size)]


@pytest.mark.parametrize("seed", range(5))
def test_closed_form_equals_the_matrix(seed):
    successes, features = random_problem(seed=seed)
    weights = scoring.learnability(successes)
    scores = scoring.row_average(weights, in_chunks(features, 7), features.shape[1])
    np.testing.assert_allclose(
        scores.numpy(), oracles.row_averages(successes, features), rtol=1e-9, atol=1e-13
    )


def test_scores_do_not_depend_on_chunks_or_order_to_the_last_bit():
    successes, features = random_problem(prompts=64)
    weights = scoring.learnability(successes)
    whole = scoring.row_average(weights, in_chunks(features, 64), 32)
    for size in (1, 5, 64):
        assert torch.equal(scoring.row_average(weights, in_chunks(features, size), 32), whole)
    assert torch.equal(scoring.row_average(weights, in_chunks(features, 5)[::-1], 32), whole)


@pytest.mark.parametrize(("prompts", "dim"), [(40, 8192), (5, 70_000), (3000, 3)])
def test_chunks_do_not_matter_whatever_the_dimension_and_number_of_threads(prompts, dim):
    """Blocks that fit into a cache, rows that torch would split over threads, more rows than a sum is exact for."""
    successes, features = random_problem(prompts=prompts, dim=dim)
    weights, features, threads = (
        scoring.learnability(successes),
        features.float(),
        torch.get_num_threads(),
    )
    whole = scoring.row_average(weights, in_chunks(features, prompts), dim)
    try:
        for torch_threads in (1, 2, 4):
            torch.set_num_threads(torch_threads)
            for size in (1, 3, 17):
                assert torch.equal(
                    scoring.row_average(weights, in_chunks(features, size), dim), whole
                )
    finally:
        torch.set_num_threads(threads)
    directions = torch.nn.functional.normalize(features.double(), dim=1)
    truth = weights * (directions @ (weights @ directions)) / prompts
    np.testing.assert_allclose(whole, truth, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_float64_features_of_any_size_have_a_direction(scale):
    _, features = random_problem()
    np.testing.assert_allclose(
        scoring.normalised(features * scale), scoring.normalised(features), rtol=1e-9
    )


def test_scores_split_over_ranks_are_the_same_to_the_last_bit():
    successes, features = random_problem(prompts=30)
    weights = scoring.learnability(successes)
    whole = scoring.row_average(weights, in_chunks(features, 6), 32)
    chunks = in_chunks(features, 6)
    shares = [chunks[0::2], chunks[1::2]]
    totals = []
    for share in shares:
        total = scoring.FixedPointSum(32)
        for positions, part in share:
            total.add(weights[positions].unsqueeze(1) * scoring.normalised(part))
        totals.append(total.units)
    sums = iter([totals[0] + totals[1], None])

    def all_sum(tensor):
        value = next(sums)
        return tensor if value is None else value

    first = scoring.row_average(weights, shares[0], 32, all_sum)
    own = torch.cat([positions for positions, _ in shares[0]])
    assert torch.equal(first[own], whole[own])


def test_learnability_by_hand():
    successes = torch.tensor(
        [[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.float64
    )
    assert scoring.learnability(successes).tolist() == [0.25, 0.1875, 0.0, 0.0]


def test_fractions_have_their_variance_as_learnability_and_count_in_parts():
    nan = float("nan")
    fractions = torch.tensor(
        [
            [0.5, 0.5, 0.5],
            [0.25, 1, 0],
            [1, 0, nan],
            [0.3, nan, nan],
            [nan, nan, nan],
            [0.7, 0.7, nan],
        ],
        dtype=torch.float64,
    )
    fractions = (fractions * 2**16).round() / 2**16
    judged = [[value for value in row if value == value] for row in fractions.tolist()]
    population = [float(np.var(row)) if row else 0.0 for row in judged]
    sample = [float(np.var(row, ddof=1)) if len(row) > 1 else 0.0 for row in judged]
    assert scoring.learnability(fractions).tolist() == pytest.approx(population, abs=1e-15)
    assert scoring.learnability(fractions, unbiased=True).tolist() == pytest.approx(sample)
    assert (scoring.learnability(fractions) == 0).tolist() == [True, False, False, True, True, True]
    right, wrong, partial = scoring.outcome_sums(fractions, graded=True)
    assert right.tolist() == [sum(row) for row in judged]
    assert (right + wrong).tolist() == [len(row) for row in judged]
    assert partial.tolist() == [sum(x * (1 - x) for x in row) for row in judged]


def test_sums_of_right_and_wrong_rollouts_are_counts():
    successes = torch.tensor([[1.0, 0.0, 1.0], [0.0, float("nan"), 0.0]])
    right, wrong, partial = scoring.outcome_sums(successes, graded=False)
    assert (right.dtype, wrong.dtype) == (np.int64, np.int64)
    assert (right.tolist(), wrong.tolist(), partial.tolist()) == ([2, 0], [1, 2], [0, 0])


def test_unscorable_rollouts_are_left_out_of_the_rate():
    nan = float("nan")
    successes = torch.tensor(
        [[1, 0, nan, nan], [nan, nan, nan, nan], [1, 1, nan, nan]], dtype=torch.float64
    )
    assert scoring.success_rate(successes)[:1].tolist() == [0.5]
    assert torch.isnan(scoring.success_rate(successes)[1])
    assert scoring.learnability(successes).tolist() == [0.25, 0.0, 0.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_scores_zero_and_spoils_nothing(value):
    successes, features = random_problem()
    weights = scoring.learnability(successes)
    weights[5] = 0.25
    broken = features.clone()
    broken[5, 3] = value
    zeroed = features.clone()
    zeroed[5] = 0
    scores = scoring.row_average(weights, in_chunks(broken, 8), 32)
    assert scores[5] == 0
    assert torch.isfinite(scores).all()
    assert torch.equal(scores, scoring.row_average(weights, in_chunks(zeroed, 8), 32))


def test_zero_and_missing_gradients_score_exactly_zero():
    successes, features = random_problem()
    weights = scoring.learnability(successes).clamp(min=0.1)
    features[4] = 0
    keep = [i for i in range(len(features)) if i != 9]
    chunks = [(torch.tensor(keep), features[keep])]
    scores = scoring.row_average(weights, chunks, 32)
    assert scores[4] == 0
    assert scores[9] == 0


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_cosine_does_not_depend_on_gradient_size(scale):
    _, features = random_problem()
    np.testing.assert_allclose(
        scoring.normalised((features * scale).float().double()),
        scoring.normalised(features),
        rtol=1e-5,
        atol=1e-7,
    )


def test_ties_follow_the_seed_and_not_the_file():
    scores = np.zeros(200)
    one, other = (scoring.rank(scores, tie_order(seed, "stage_1", 200)) for seed in (1, 2))
    assert sorted(one) == list(range(200))
    assert not np.array_equal(one, np.arange(200))
    assert not np.array_equal(one, other)
    assert np.array_equal(one, scoring.rank(scores, tie_order(1, "stage_1", 200)))


def test_negative_scores_rank_below_zeros_and_nan_last():
    scores = np.array([0.1, -0.2, 0.0, np.nan, 0.3, 0.0])
    order = scoring.rank(scores, np.array([0, 1, 5, 3, 4, 2]))
    assert order.tolist() == [4, 0, 5, 2, 1, 3]


def test_a_short_pool_is_filled_from_the_zeros_or_shrinks():
    scores = np.array([0.2, 0.0, -0.1, 0.0])
    eligible = np.array([True, False, True, False])
    ties = np.array([0, 3, 2, 1])
    assert scoring.select(scores, eligible, ties, 3, "fill").tolist() == [0, 3, 1]
    assert scoring.select(scores, eligible, ties, 3, "shrink").tolist() == [0, 2]
    assert scoring.select(scores, eligible, ties, 2, "shrink").tolist() == [0, 3]


def test_selections_of_growing_size_are_nested():
    generator = np.random.default_rng(0)
    scores, ties = generator.normal(size=50).round(1), generator.permutation(50)
    eligible = np.ones(50, dtype=bool)
    chosen = [set(scoring.select(scores, eligible, ties, n, "fill").tolist()) for n in (5, 20, 50)]
    assert chosen[0] < chosen[1] < chosen[2]
