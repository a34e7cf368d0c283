"""Choices that cover the pool: against brute force, the explicit matrix, and each other."""

import itertools

import cases
import numpy as np
import pytest
import torch

from trl_learnalign import LearnAlignConfig, Pool, plan, scoring
from trl_learnalign.distributed import Ranks
from trl_learnalign.ranking import Ranking
from trl_learnalign.scoring import collect, directions, products
from trl_learnalign.selectors import SELECTORS
from trl_learnalign.selectors.scores import facility_location, log_determinant

COVERING = ("learnalign_coverage", "learnalign_logdet")
RIDGE = 0.5


def drawn(prompts=24, dim=12, seed=0, groups=5):
    """Directions in loose groups, and learnabilities of eight rollouts."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(groups, dim, generator=generator, dtype=torch.float64)
    group = torch.randint(groups, (prompts,), generator=generator)
    noise = torch.randn(prompts, dim, generator=generator, dtype=torch.float64)
    right = torch.randint(1, 8, (prompts,), generator=generator) / 8
    return directions(centres[group] + 0.7 * noise), (right * (1 - right)).double()


def explicit(rows, weights):
    """S, built; cos(φ, φ) is 1 whatever the rounding."""
    scaled = rows.double() * weights.unsqueeze(1)
    matrix = (scaled @ scaled.T).numpy()
    np.fill_diagonal(matrix, weights.square().numpy())
    return matrix


def covered(matrix, chosen):
    return np.maximum(matrix[list(chosen)], 0).max(axis=0).sum() if len(chosen) else 0.0


def log_det(matrix, chosen, ridge=RIDGE):
    part = matrix[np.ix_(list(chosen), list(chosen))]
    scale = ridge * matrix.diagonal().mean()
    return np.linalg.slogdet(np.eye(len(part)) + part / scale)[1] if len(chosen) else 0.0


def slow_greedy(value, matrix, size):
    """The obvious version: every prompt is tried in every place."""
    chosen, gains = [], []
    for _ in range(size):
        rest = [row for row in range(len(matrix)) if row not in chosen]
        added = [round(value(matrix, [*chosen, row]) - value(matrix, chosen), 9) for row in rest]
        chosen.append(rest[int(np.argmax(added))])
        gains.append(max(added))
    return chosen, gains


def fast_coverage(rows, weights, size):
    return facility_location(rows, weights, size)


def fast_log_det(rows, weights, size):
    return log_determinant(rows, weights, size, RIDGE)


BOTH = [
    pytest.param(fast_coverage, covered, id="coverage"),
    pytest.param(fast_log_det, log_det, id="logdet"),
]


def order_of(scores):
    return np.argsort(-scores, kind="stable")


# ---- Directions -----------------------------------------------------------------------------------------------------


def test_products_of_directions_are_exact_however_they_are_cut():
    generator = torch.Generator().manual_seed(3)
    rows = directions(torch.randn(50, 8192, generator=generator, dtype=torch.float64))
    whole = (rows.double() * 2**24).to(torch.int64)
    truth = (whole.unsqueeze(1) * whole.unsqueeze(0)).sum(dim=2)  # in units of 2^-48
    found = products(rows, rows)
    assert torch.equal((found * 2.0**48).to(torch.int64), truth)
    backwards = products(rows.flip(1), rows[7:8].flip(1))
    assert torch.equal(backwards, found[:, 7:8])


def test_directions_are_those_of_the_score():
    generator = torch.Generator().manual_seed(4)
    features = 1e30 * torch.randn(6, 64, generator=generator, dtype=torch.float64)
    features[1], features[2, 3] = 0, float("nan")
    truth = scoring.normalised(features)
    found = directions(features.clone())
    assert torch.equal(found[1:3], torch.zeros(2, 64))
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=2.0**-25)


def test_only_the_candidates_that_are_asked_for_are_collected_in_their_order():
    features = torch.eye(5, 8, dtype=torch.float64) * 3
    chunks = [(torch.tensor([4, 0]), features[[4, 0]]), (torch.tensor([2]), features[[2]])]
    rows = collect(chunks, np.array([2, 3, 4]), 5, 8, Ranks())
    assert rows.argmax(dim=1).tolist() == [2, 0, 4]
    assert rows.norm(dim=1).tolist() == [1, 0, 1]


# ---- Greedy choices -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fast", "value"), BOTH)
@pytest.mark.parametrize("seed", range(5))
def test_the_factor_form_chooses_as_the_explicit_matrix_does(fast, value, seed):
    rows, weights = drawn(seed=seed)
    matrix = explicit(rows, weights)
    chosen, gains = slow_greedy(value, matrix, 10)
    scores = fast(rows, weights, 10)
    assert order_of(scores)[:10].tolist() == chosen
    np.testing.assert_allclose(scores[chosen], gains, atol=1e-8)


@pytest.mark.parametrize(("fast", "value"), BOTH)
@pytest.mark.parametrize("seed", range(5))
def test_the_choice_reaches_its_share_of_the_best_one(fast, value, seed):
    """1 - 1/e of the optimum over all subsets (Nemhauser, Wolsey & Fisher, 1978); here mostly all of it."""
    rows, weights = drawn(prompts=11, dim=5, seed=seed)
    matrix = explicit(rows, weights)
    for size in (2, 4):
        best = max(value(matrix, subset) for subset in itertools.combinations(range(11), size))
        found = value(matrix, order_of(fast(rows, weights, size))[:size])
        assert (1 - 1 / np.e) * best <= found <= best + 1e-9


@pytest.mark.parametrize(("fast", "value"), BOTH)
def test_the_first_of_a_large_choice_are_the_small_choice(fast, value):
    rows, weights = drawn(prompts=200, dim=32, seed=1)
    full = order_of(fast(rows, weights, 200))
    for size in (1, 7, 50, 199):
        assert order_of(fast(rows, weights, size))[:size].tolist() == full[:size].tolist()


@pytest.mark.parametrize(("fast", "value"), BOTH)
def test_who_is_left_out_scores_no_more_than_the_last_who_was_chosen(fast, value):
    rows, weights = drawn(prompts=60, seed=2)
    scores = fast(rows, weights, 20)
    order = order_of(scores)
    assert (np.diff(scores[order]) <= 0).all()
    matrix = explicit(rows, weights)
    chosen = order[:20].tolist()
    for row in order[20:]:
        gain = value(matrix, [*chosen, row]) - value(matrix, chosen)
        assert gain <= scores[row] + 1e-7


@pytest.mark.parametrize(("fast", "value"), BOTH)
def test_of_equal_prompts_the_first_is_chosen_and_its_twins_come_last(fast, value):
    rows = directions(torch.eye(4, dtype=torch.float64)).repeat_interleave(3, dim=0)
    scores = fast(rows, torch.full((12,), 0.25, dtype=torch.float64), 12)
    order = order_of(scores).tolist()
    assert sorted(order[:4]) == [0, 3, 6, 9]
    assert order[:4] == sorted(order[:4])


@pytest.mark.parametrize(("fast", "value"), BOTH)
def test_who_has_no_direction_adds_nothing(fast, value):
    rows, weights = drawn(prompts=8)
    rows[3] = 0
    scores = fast(rows, weights, 8)
    assert scores[3] == 0
    assert (np.delete(scores, 3) >= 0).all()
    assert fast(torch.zeros(3, 4), torch.ones(3, dtype=torch.float64) / 4, 2).tolist() == [0] * 3


def test_few_neighbours_lose_little():
    """K nearest in the place of all: nearly the same value, though not the same sum."""
    rows, weights = drawn(prompts=600, dim=32, groups=30, seed=5)
    matrix = explicit(rows, weights)
    exact = order_of(facility_location(rows, weights, 40))[:40]
    sparse = order_of(facility_location(rows, weights, 40, neighbours=100))[:40]
    assert set(sparse) != set(exact) or sparse.tolist() != exact.tolist()
    assert covered(matrix, sparse) > 0.98 * covered(matrix, exact)


def test_a_sample_that_is_covered_covers_the_rest():
    rows, weights = drawn(prompts=600, dim=32, groups=30, seed=6)
    matrix = explicit(rows, weights)
    exact = order_of(facility_location(rows, weights, 30))[:30]
    sample = order_of(facility_location(rows, weights, 30, covered=200))[:30]
    assert sample.max() >= 200  # anyone may cover them
    assert covered(matrix, sample) > 0.95 * covered(matrix, exact)


# ---- As selectors ---------------------------------------------------------------------------------------------------


def planted(seed=0, like=40, skills=6, each=10, dim=64, rollouts=8, shuffle=None):
    """A pool with one large group of like prompts, `skills` small groups, and two prompts without a signal."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.linalg.qr(
        torch.randn(dim, skills + 1, generator=generator, dtype=torch.float64)
    )[0]
    group = np.repeat(np.arange(skills + 1), [like, *[each] * skills])
    noise = torch.randn(len(group), dim, generator=generator, dtype=torch.float64)
    features = centres.T[group] + 0.3 * noise / dim**0.5
    right = torch.randint(3, 6, (len(group),), generator=generator)
    successes = (torch.arange(rollouts) < right.unsqueeze(1)).double()
    successes[0], successes[1] = 0.0, 1.0
    size = len(group)
    rows = np.arange(size) if shuffle is None else shuffle(size)
    places = torch.arange(size)
    pool = Pool(
        rows,
        cases.dataset(size),
        0,
        "stage_1",
        successes=successes,
        features=[(part, features[part]) for part in places.split(7)],
        feature_dim=dim,
        config=LearnAlignConfig(warmup_samples=0, stages=[4], feature_dim=dim),
    )
    return pool, group


def chosen_by(name, pool, size, wanted=None):
    pool.wanted = wanted
    selector = SELECTORS[name]
    ties = plan.tie_order(pool.seed, pool.phase, len(pool.dataset))
    ranking = Ranking(selector, pool, selector.score(pool), ties)
    return ranking.take(size, pool.prompts, "fill", size).positions


def effective_directions(pool, positions):
    """Participation ratio of the spectrum, by eigenvalues."""
    features = torch.cat([chunk for _, chunk in pool.features])[positions]
    unit = scoring.normalised(features).numpy()
    spectrum = np.linalg.eigvalsh(unit @ unit.T)
    return spectrum.sum() ** 2 / (spectrum**2).sum()


@pytest.mark.parametrize("name", COVERING)
@pytest.mark.parametrize("seed", range(3))
def test_where_the_row_average_takes_one_group_they_cover_all(name, seed):
    pool, group = planted(seed)
    average, cover = (chosen_by(each, pool, 14) for each in ("learnalign", name))
    assert set(group[average]) == {0}
    assert set(group[cover]) == set(range(7))
    assert effective_directions(pool, average) < 2
    assert effective_directions(pool, cover) > 4


@pytest.mark.parametrize("name", COVERING)
def test_prompts_without_learnability_come_last(name):
    pool, _ = planted()
    order = chosen_by(name, pool, len(pool))
    assert set(order[-2:]) == {0, 1}
    scores = SELECTORS[name].score(pool)
    assert scores[:2].tolist() == [0, 0]
    assert SELECTORS[name].only_learnable


@pytest.mark.parametrize("name", COVERING)
def test_a_gradient_that_is_not_finite_adds_nothing(name):
    pool, _ = planted()
    pool.features[2][1][3] = float("inf")
    assert SELECTORS[name].score(pool)[17] == 0


@pytest.mark.parametrize("name", COVERING)
def test_shuffling_the_pool_shuffles_the_choice(name):
    """Rows of the dataset keep their prompts: the pool lists them in another order, cut into other chunks."""
    pool, _ = planted(3)
    features = torch.cat([chunk for _, chunk in pool.features])
    features[10:20] = features[20:30]  # twins: ties have to be broken alike
    pool.features = [(torch.arange(len(pool)), features)]
    truth = pool.prompts[chosen_by(name, pool, 20)]
    order = np.random.default_rng(0).permutation(len(pool))
    places = torch.arange(len(pool))
    other = Pool(
        pool.prompts[order],
        pool.dataset,
        pool.seed,
        pool.phase,
        successes=pool.successes[order],
        features=[(part, features[order][part]) for part in places.split(11)],
        feature_dim=pool.feature_dim,
        config=pool.config,
    )
    assert other.prompts[chosen_by(name, other, 20)].tolist() == truth.tolist()


@pytest.mark.parametrize("name", COVERING)
def test_knowing_how_many_are_wanted_changes_nothing(name):
    pool, _ = planted(4)
    truth = chosen_by(name, pool, len(pool)).tolist()
    for size in (1, 5, 30):
        assert chosen_by(name, pool, size, wanted=size).tolist() == truth[:size]


def test_a_small_ridge_wants_new_directions_a_large_one_learnability():
    rows = directions(torch.tensor([[1.0, 0], [1, 0], [0, 1]], dtype=torch.float64))
    weights = torch.tensor([0.25, 0.24, 0.10], dtype=torch.float64)
    small, large = (
        order_of(log_determinant(rows, weights, 3, ridge)).tolist() for ridge in (0.01, 100)
    )
    assert small == [0, 2, 1]
    assert large == [0, 1, 2]


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), "wide"])
def test_a_ridge_that_is_none(value):
    with pytest.raises(ValueError, match="logdet_ridge="):
        LearnAlignConfig(logdet_ridge=value)


@pytest.mark.parametrize(("fast", "value"), BOTH)
def test_rounding_does_not_decide_between_prompts_of_equal_learnability(fast, value):
    """Apart from each other, all add the same: ties decide, whatever the last bits of their directions' lengths."""
    angles = torch.linspace(0, 1.5, 20, dtype=torch.float64)
    rows = torch.zeros(20, 40, dtype=torch.float64)
    rows[torch.arange(20), torch.arange(20)] = angles.cos()
    rows[torch.arange(20), torch.arange(20, 40)] = angles.sin()
    rows = directions(rows)
    lengths = rows.double().norm(dim=1)
    rows = rows[lengths.argsort()]
    assert lengths.min() < lengths.max()
    scores = fast(rows, torch.full((20,), 0.25, dtype=torch.float64), 20)
    assert order_of(scores).tolist() == list(range(20))


def test_a_tiny_ridge_stands_the_rounding_of_directions():
    rows, _ = drawn(prompts=6, dim=9)
    rows = rows.repeat(3, 1)
    scores = log_determinant(rows, torch.full((18,), 0.25, dtype=torch.float64), 18, 1e-12)
    assert np.isfinite(scores).all()
    assert set(order_of(scores)[:6] % 6) == set(range(6))
