import math

import numpy as np
import pytest
import torch

from trl_learnalign import rng
from trl_learnalign.gradients.projection import (
    CountSketch,
    Rademacher,
    Unprojected,
    layer_rank,
    make_projection,
)

KNOWN_SKETCH = [
    3.0,
    1.0,
    0.0,
    0.0,
    0.0,
    3.0,
    -1.0,
    -3.0,
    1.0,
    2.0,
    -3.0,
    1.0,
    2.0,
    -3.0,
    -1.0,
    -2.0,
]
KNOWN_SIGNS = [-1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
SHAPES = [(64, 64), (96, 33), (3, 300), (3000, 8), (1, 500), (600, 1), (700, 530)]


def factors(rows, columns, prompts=2, tokens=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(prompts, tokens, rows, generator=generator)
    right = torch.randn(prompts, tokens, columns, generator=generator)
    # Gradients are uneven: a few rows and columns hold much of the norm.
    left[..., :2] *= 8
    right[..., : max(1, columns // 20)] *= 8
    return left, right


def projected(projection, left, right, name="layer.weight"):
    out = torch.zeros(len(left), projection.dim)
    projection.add_outer(out, name, left, right)
    return out


def projections(dim=256, seed=3):
    return [
        CountSketch(dim, seed),
        CountSketch(dim, seed, rank=16),
        Rademacher(dim, seed),
        CountSketch(dim, seed, "auto"),
    ]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("which", range(4))
def test_products_explicit_gradients_and_embeddings_go_to_the_same_place(shape, which):
    left, right = factors(*shape)
    projection = projections()[which]
    fast = projected(projection, left, right)
    explicit = torch.zeros_like(fast)
    projection.add_dense(explicit, "layer.weight", torch.einsum("pro,pri->poi", left, right))
    torch.testing.assert_close(fast, explicit, rtol=1e-4, atol=1e-4 * float(fast.abs().max()))
    ids = torch.randint(0, shape[0], (2, 9))
    values = torch.randn(2, 9, shape[1])
    by_rows = torch.zeros_like(fast)
    projection.add_rows(by_rows, "layer.weight", ids, values, shape[0])
    onehot = torch.nn.functional.one_hot(ids, shape[0]).float()
    torch.testing.assert_close(by_rows, projected(projection, onehot, values), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(64, 64), (200, 30), (1500, 20)])
def test_inner_products_are_unbiased_with_the_variance_of_a_count_sketch(shape):
    """400 seeds; the mean within 4 standard errors, the spread at most that of independent signs."""
    (a, x), (b, _) = factors(*shape, prompts=1, seed=1), factors(*shape, prompts=1, seed=2)
    b = b + 0.7 * a
    first, second = (left[0].T @ x[0] for left in (a, b))
    truth = float((first * second).sum())
    dim, found = 512, []
    for seed in range(400):
        sketch = projected(CountSketch(dim, seed), torch.cat([a, b]), torch.cat([x, x]))
        found.append(float(sketch[0] @ sketch[1]))
    error = np.std(found) / math.sqrt(len(found))
    assert abs(np.mean(found) - truth) < 4 * error
    ideal = math.sqrt((float((first**2).sum() * (second**2).sum()) + truth**2) / dim)
    assert np.std(found) < 1.15 * ideal


def test_the_dense_projection_is_unbiased_too():
    (a, x), (b, _) = factors(20, 10, prompts=1, seed=1), factors(20, 10, prompts=1, seed=2)
    truth = float((a[0].T @ x[0]).flatten() @ (b[0].T @ x[0]).flatten())
    found = []
    for seed in range(200):
        sketch = projected(Rademacher(64, seed), torch.cat([a, b]), torch.cat([x, x]))
        found.append(float(sketch[0] @ sketch[1]))
    assert abs(np.mean(found) - truth) < 4 * np.std(found) / math.sqrt(len(found))


def test_folding_is_unbiased_and_its_error_is_that_of_its_rank():
    """300 seeds; both factors folded 64 → 32: errors of 1/32 a side beside the sketch's 1/dim, doubled for a
    gradient's own norm."""
    (a, x), (b, _) = factors(64, 64, prompts=1, seed=1), factors(64, 64, prompts=1, seed=2)
    a, b, x = a / a.std(dim=2, keepdim=True), b / b.std(dim=2, keepdim=True), x
    first, second = (left[0].T @ x[0] for left in (a, b + 0.7 * a))
    truth, found = float((first * second).sum()), []
    for seed in range(300):
        sketch = projected(
            CountSketch(4096, seed, 32), torch.cat([a, b + 0.7 * a]), torch.cat([x, x])
        )
        found.append(float(sketch[0] @ sketch[1]))
    assert abs(np.mean(found) - truth) < 4 * np.std(found) / math.sqrt(len(found))
    assert np.std(found) < math.sqrt(4 / 32) * float(first.norm() * second.norm())
    exact = [
        float(s[0] @ s[1])
        for s in (
            projected(CountSketch(4096, seed), torch.cat([a, b + 0.7 * a]), torch.cat([x, x]))
            for seed in range(50)
        )
    ]
    assert np.std(exact) < np.std(found)


def test_automatic_rank_grows_with_the_layer_and_leaves_small_ones_exact():
    assert layer_rank(None, 5000, 5000) is None
    assert layer_rank(64, 5000, 5000) == 64
    assert [layer_rank("auto", *shape) for shape in [(100, 100), (576, 1536), (4096, 4096)]] == [
        192,
        192,
        512,
    ]
    left, right = factors(300, 200)
    torch.testing.assert_close(
        projected(CountSketch(256, 0, "auto"), left, right),
        projected(CountSketch(256, 0), left, right),
    )


def test_memory_of_intermediate_results_is_given_back():
    projection = CountSketch(256, 0)
    projected(projection, *factors(60, 40))
    assert projection._scratch._buffers
    projection.release()
    assert not projection._scratch._buffers


@pytest.mark.parametrize("dim", [64, 512])
def test_folding_to_more_rows_than_buckets_keeps_the_variance(dim):
    """Rows that meet in all their buckets must not do so with one common sign."""
    left, right = factors(4000, 40, prompts=1)
    norm = float((left[0].T @ right[0]).norm() ** 2)
    found = [
        float(projected(CountSketch(dim, s, 600), left, right).norm() ** 2) / norm
        for s in range(100)
    ]
    assert abs(np.mean(found) - 1) < 4 * np.std(found) / 10
    assert np.std(found) < 1.3 * math.sqrt(2 / dim + 2 / min(dim, 600))


@pytest.mark.parametrize("rank", [None, 32, "auto"])
def test_scale_does_not_depend_on_the_shape_of_a_layer(rank):
    """A two-sided projection scaled by rows instead of dimensions re-weights layers by their shape."""
    for shape in ((256, 256), (1024, 64), (64, 1024), (2000, 33)):
        ratios = []
        for seed in range(30):
            left, right = factors(*shape, prompts=1, seed=seed)
            sketch = projected(CountSketch(2048, seed, rank), left, right)
            ratios.append(float(sketch.norm() ** 2 / (left[0].T @ right[0]).norm() ** 2))
        assert abs(np.mean(ratios) - 1) < 4 * np.std(ratios) / math.sqrt(len(ratios)) + 1e-3


@pytest.mark.parametrize("which", range(4))
def test_a_seed_repeats_and_two_seeds_differ(which):
    left, right = factors(30, 40)
    one, again, other = (projected(projections(seed=s)[which], left, right) for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.allclose(one, other, rtol=0.1)


@pytest.mark.parametrize("which", range(4))
def test_parameters_do_not_share_signs(which):
    left, right = factors(30, 40)
    projection = projections()[which]
    one = projected(projection, left, right, "a.weight")
    assert not torch.allclose(one, projected(projection, left, right, "b.weight"), rtol=0.1)


@pytest.mark.parametrize("which", range(4))
def test_order_and_splitting_do_not_matter(which):
    left, right = factors(50, 70, tokens=8)
    projection = projections()[which]
    whole = projected(projection, left, right)
    order = torch.tensor([5, 2, 7, 0, 1, 3, 6, 4])
    torch.testing.assert_close(
        projected(projection, left[:, order], right[:, order]), whole, rtol=1e-4, atol=1e-3
    )
    parts = projected(projection, left[:, :3], right[:, :3])
    projection.add_outer(parts, "layer.weight", left[:, 3:], right[:, 3:])
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-3)


def test_large_products_are_split_without_changing_the_result(monkeypatch):
    from trl_learnalign.gradients import projection

    left, right = factors(700, 40)
    ids = torch.randint(0, 700, (2, 9))
    whole = projected(CountSketch(256, 0), left, right)
    rows = torch.zeros_like(whole)
    CountSketch(256, 0).add_rows(rows, "w", ids, right[:, :1].expand(2, 9, 40), 700)
    monkeypatch.setattr(projection, "_MAX_ELEMENTS_CPU", 1000)
    torch.testing.assert_close(
        projected(CountSketch(256, 0), left, right), whole, rtol=1e-4, atol=1e-3
    )
    small = torch.zeros_like(whole)
    CountSketch(256, 0).add_rows(small, "w", ids, right[:, :1].expand(2, 9, 40), 700)
    torch.testing.assert_close(small, rows)


@pytest.mark.parametrize("shape", [(20, 300), (300, 20), (40, 40)])
def test_few_and_many_tokens_take_their_signs_in_different_places_with_the_same_result(shape):
    left, right = factors(*shape, tokens=100)
    whole, parts = projected(CountSketch(256, 1), left, right), torch.zeros(2, 256)
    for start in range(0, 100, 10):
        part = slice(start, start + 10)
        CountSketch(256, 1).add_outer(parts, "layer.weight", left[:, part], right[:, part])
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))


def test_known_values_do_not_move():
    """Features on disk stay comparable as long as the version stays the same."""
    left, right = torch.ones(1, 1, 5), torch.arange(1.0, 4.0).view(1, 1, 3)
    assert projected(CountSketch(16, 42), left, right, "w")[0].tolist() == KNOWN_SKETCH
    assert rng.signs(rng.key(1, "x"), 8).tolist() == KNOWN_SIGNS


def test_versions_name_everything_that_matters():
    names = {p.version for p in (*projections(), *projections(dim=128), *projections(seed=4))}
    assert len(names) == 12


def test_none_keeps_the_whole_gradient():
    left, right = factors(4, 3)
    projection = make_projection("none", 0, 0, None, {"first": 2, "layer.weight": 12})
    out = projected(projection, left, right)
    assert isinstance(projection, Unprojected)
    torch.testing.assert_close(out[:, 2:], torch.einsum("pro,pri->poi", left, right).flatten(1))
    assert (out[:, :2] == 0).all()


def test_signs_are_fair_and_streams_independent():
    signs = np.stack([rng.signs(rng.key(0, "s", i), 4096) for i in range(64)])
    assert abs(signs.mean()) < 4 / math.sqrt(signs.size)
    correlations = (signs @ signs.T / 4096)[np.triu_indices(64, 1)]
    assert np.abs(correlations).max() < 6 / math.sqrt(4096)
