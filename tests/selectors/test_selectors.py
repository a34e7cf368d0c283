import itertools
import json
import logging
import math
import sys
from pathlib import Path

import cases
import numpy as np
import oracles
import pandas as pd
import pytest
import torch
from datasets import Dataset
from histories import write_history

from trl_learnalign import LearnAlignCallback, LearnAlignConfig, Pool, plan, plan_run, scoring
from trl_learnalign.bridge.hooks import preserve_trainer_state
from trl_learnalign.bridge.policy import gradient_capture, trainable_sizes
from trl_learnalign.gradients.projection import Unprojected
from trl_learnalign.measuring.base import Context, MeasureJob
from trl_learnalign.measuring.generation import roll_out
from trl_learnalign.measuring.gradient_features import GradientFeaturizer
from trl_learnalign.measuring.measure_pool import measure_pool
from trl_learnalign.measuring.rollouts import GradientMeasure
from trl_learnalign.records.history import RewardHistory
from trl_learnalign.selectors import SELECTORS, Selector, check_columns, find_selector

NAN = float("nan")


def config(**options):
    return LearnAlignConfig(**{"warmup_samples": 0, "stages": [4], "feature_dim": 64, **options})


def pool(size=4, settings=None, **measured):
    return Pool(
        np.arange(size), cases.dataset(size), 0, "stage_1", config=settings or config(), **measured
    )


def score(name, *args, **measured):
    return find_selector(name).score(pool(*args, **measured))


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def random_features(prompts=20, rollouts=8, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    successes = (
        torch.rand(prompts, rollouts, generator=generator)
        < torch.rand(prompts, 1, generator=generator)
    ) * 1.0
    successes[0], successes[1] = 0.0, 1.0
    return successes.double(), torch.randn(
        prompts, dim, generator=generator, dtype=torch.float64
    ) + 0.2


def chunks(features, size=6):
    places = torch.arange(len(features))
    return [(places[i : i + size], features[i : i + size]) for i in range(0, len(features), size)]


# ---- Solutions ------------------------------------------------------------------------------------------------------


def test_token_length_by_hand():
    assert score("token_length", solution_tokens=torch.tensor([3, 0, 12, 7])).tolist()[::2] == [
        3,
        12,
    ]
    assert np.isnan(score("token_length", solution_tokens=torch.tensor([3, 0, 12, 7]))[1])


def test_perplexities_by_hand():
    nll = tensor(math.log(2), math.log(8), NAN, math.log(3))
    np.testing.assert_allclose(score("ppl_top", nll=nll), [2, 8, NAN, 3])
    # The median of 2, 3 and 8 is 3.
    np.testing.assert_allclose(score("ppl_middle", nll=nll), [-1, -5, NAN, 0])


def test_the_middle_perplexity_by_value_and_by_rank():
    nll = torch.log(tensor(1, 2, 3, 10, 100, NAN))
    np.testing.assert_allclose(
        score("ppl_middle", 6, nll=nll), [-2, -1, 0, -7, -97, NAN], atol=1e-9
    )
    # Whatever the rounding, the two in the middle of an even number are equally far from the median.
    for seed in range(20):
        drawn = torch.randn(6, generator=torch.Generator().manual_seed(seed))
        best = np.sort(score("ppl_middle", 6, nll=drawn))[-2:]
        assert best[0] == best[1]
    by_rank = config(ppl_middle="rank")
    np.testing.assert_allclose(score("ppl_middle", 6, by_rank, nll=nll), [-2, -1, 0, -1, -2, NAN])
    # Two in the middle, and equal ones share a rank.
    np.testing.assert_allclose(
        score("ppl_middle", 4, by_rank, nll=torch.log(tensor(4, 1, 2, 3))), [-1.5, -1.5, -0.5, -0.5]
    )
    np.testing.assert_allclose(
        score("ppl_middle", 3, by_rank, nll=torch.log(tensor(5, 5, 7))), [-0.5, -0.5, -1]
    )
    assert np.isnan(score("ppl_middle", 2, nll=tensor(NAN, NAN))).all()


def test_ifd_by_hand():
    """A ratio of losses; above 1, cut or without a solution: dropped."""
    given, alone = tensor(1.0, 3.0, 2.0, 1.0, NAN, 2.0), tensor(2.0, 2.0, 2.0, 4.0, NAN, 4.0)
    cut = torch.tensor([False, False, False, False, False, True])
    found = score("ifd", 6, nll=given, nll_alone=alone, truncated=cut)
    np.testing.assert_allclose(found, [0.5, NAN, 1.0, 0.25, NAN, NAN])


def test_selectit_by_hand():
    sure = [0.0, 0.0, 0.0, 0.0, 0.5]  # shares 0, 0, 0, 0, 1: 5 · (4 · 1) / 4 = 5
    split = [0.1, 0.0, 0.3, 0.0, 0.0]  # shares 1/4, 0, 3/4: 3 · (2/4 + 3 · 3/4) / 4 = 33/16
    ratings = tensor([sure] * 5, [split] * 5, [sure, split, sure, split, sure])
    mean = (3 * 5 + 2 * 33 / 16) / 5
    std = math.sqrt(0.6 * (5 - mean) ** 2 + 0.4 * (33 / 16 - mean) ** 2)
    np.testing.assert_allclose(
        score("selectit", 3, ratings=ratings), [5, 33 / 16, mean / (1 + 0.2 * std)]
    )


@pytest.mark.parametrize("shares", ["ratio", "softmax"])
def test_selectit_equals_the_formula(shares):
    generator = torch.Generator().manual_seed(0)
    ratings = torch.rand(30, 5, 5, generator=generator, dtype=torch.float64) / 6
    ratings[7] = NAN
    found = score("selectit", 30, config(selectit_shares=shares), ratings=ratings)
    truth = [oracles.selectit_score(rating.tolist(), shares == "softmax") for rating in ratings[:7]]
    np.testing.assert_allclose(found[:7], truth)
    assert np.isnan(found).nonzero()[0].tolist() == [7]


# ---- Reward history -------------------------------------------------------------------------------------------------


def test_limr_by_hand():
    rates = np.array([[0.0, 0.5], [0.5, 1.0], [1.0, 0.0], [NAN, NAN]])
    means = np.array([0.5, 0.5])
    # Σ (1 - 1/2)² = 1/2; distances 1/4, 1/4 and 1/2.
    np.testing.assert_allclose(
        score("limr", history=rates, history_mean=means), [0.5, 0.5, 0.0, NAN]
    )


def test_limr_equals_the_formula_and_skips_gaps():
    generator = np.random.default_rng(0)
    rates = generator.integers(0, 9, (25, 6)) / 8
    means = rates.mean(axis=0)
    truth = [oracles.limr_score(row.tolist(), means.tolist()) for row in rates]
    np.testing.assert_allclose(score("limr", 25, history=rates, history_mean=means), truth)
    gap = rates.copy()
    gap[3, 2] = NAN
    found = score("limr", 25, history=gap, history_mean=means)
    others = [0, 1, 3, 4, 5]
    assert found[3] == pytest.approx(
        oracles.limr_score(rates[3, others].tolist(), means[others].tolist())
    )
    np.testing.assert_allclose(np.delete(found, 3), np.delete(truth, 3))


def test_limr_cannot_rank_what_is_always_solved():
    assert np.isnan(score("limr", 2, history=np.ones((2, 3)), history_mean=np.ones(3))).all()


def test_reward_variance_by_hand():
    rates = np.array([[0.0, 1.0, 0.5], [0.25, 0.25, 0.25], [0.0, 1.0, NAN], [NAN, NAN, NAN]])
    np.testing.assert_allclose(
        score("reward_variance", history=rates), [math.sqrt(1 / 6), 0, 0.5, NAN]
    )


def test_a_history_of_a_previous_run_ranks_a_dataset(tmp_path):
    path = tmp_path / "history.json"
    rates = {"0": [0.0, 0.5], "2": [0.5, 1.0], "5": [1.0, 0.0], "7": [0.5, 0.5]}
    path.write_text(json.dumps(rates))
    trainer = cases.trainer(tmp_path)
    trainer.add_callback(
        callback := LearnAlignCallback(trainer, config(selector="limr", reward_history=str(path)))
    )
    trainer.train()
    table = pd.read_parquet(tmp_path / "_learnalign" / "stage_1.parquet").set_index("index")[
        "score"
    ]
    means = [0.5, 0.5]
    for row, values in rates.items():
        assert table[int(row)] == pytest.approx(oracles.limr_score(values, means))
    assert table.isna().sum() == 8
    assert callback.selected("stage_1").tolist() == [0, 2, 5, 7]


def test_the_mean_is_of_the_whole_recorded_run(tmp_path):
    """Not of the candidates alone: a stage with a part of the prompts ranks them as all of them would be ranked."""
    write_history(
        tmp_path / "h.parquet", RewardHistory(np.array([[0.0], [0.0], [0.9]]), np.array([0, 1, 2]))
    )
    trainer = cases.trainer(tmp_path, data=cases.dataset(4))
    settings = config(reward_history=str(tmp_path / "h.parquet"))
    work = MeasureJob("stage_1", np.array([1, 2]), tmp_path / "stage_1", {}, 10, quiet=True)
    found, _ = measure_pool(
        Context.of(trainer, settings, scoring_batch_prompts=2), find_selector("limr"), work
    )
    np.testing.assert_allclose(found.history, [[0.0], [0.9]])
    np.testing.assert_allclose(found.history_mean, [0.3])


# ---- Features -------------------------------------------------------------------------------------------------------


def test_feature_similarity_equals_the_matrix():
    successes, features = random_features()
    has_text = torch.ones(20, dtype=torch.bool)
    found = score(
        "feature_similarity",
        20,
        successes=successes,
        hidden=chunks(features),
        hidden_dim=16,
        has_text=has_text,
    )
    np.testing.assert_allclose(
        found, oracles.row_averages(successes, features), rtol=1e-9, atol=1e-13
    )
    has_text[5] = False
    found = score(
        "feature_similarity",
        20,
        successes=successes,
        hidden=chunks(features),
        hidden_dim=16,
        has_text=has_text,
    )
    assert np.isnan(found).nonzero()[0].tolist() == [5]


def test_validation_alignment_equals_the_cosine():
    successes, features = random_features()
    target = torch.randn(16, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 1e3
    found = score(
        "validation_alignment",
        20,
        successes=successes,
        features=chunks(features),
        feature_dim=16,
        target=target,
    )
    for i, (row, feature) in enumerate(zip(successes.tolist(), features, strict=True)):
        p = sum(row) / len(row)
        cosine = float(feature @ target / feature.norm() / target.norm())
        assert found[i] == pytest.approx(p * (1 - p) * cosine, abs=1e-14)
    assert found[0] == found[1] == 0


def test_validation_alignment_needs_a_validation_set(tmp_path):
    successes, features = random_features()
    with pytest.raises(ValueError, match="none was given: pass validation_dataset"):
        score(
            "validation_alignment",
            20,
            successes=successes,
            features=chunks(features),
            feature_dim=16,
        )
    trainer = cases.trainer(tmp_path)
    with pytest.raises(
        ValueError, match="selector='validation_alignment' needs a validation dataset"
    ):
        LearnAlignCallback(trainer, config(selector="validation_alignment"))


def three_prompts():
    """Lengths 5, 1 and 2; cosines 3/5, 4/5 and 0; success rates 1/2, 1/4 and 1."""
    successes = tensor([1, 1, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1])
    return dict(
        successes=successes, features=chunks(tensor([3, 4], [1, 0], [0, 2]), 2), feature_dim=2
    )


@pytest.mark.parametrize(
    ("name", "truth"),
    [
        # V = 1/4, 3/16, 0
        ("learnalign", [(1 / 16 + 3 / 64 * 0.6) / 3, (9 / 256 + 3 / 64 * 0.6) / 3, 0]),
        ("alignment", [(1 + 0.6 + 0.8) / 3, (0.6 + 1 + 0) / 3, (0.8 + 0 + 1) / 3]),
        ("gradient_dot", [(25 + 3 + 8) / 3, (3 + 1 + 0) / 3, (8 + 0 + 4) / 3]),
        ("learnability", [1 / 4, 3 / 16, 0]),
    ],
)
def test_gradient_selectors_by_hand(name, truth):
    np.testing.assert_allclose(score(name, 3, **three_prompts()), truth, atol=1e-12)


@pytest.mark.parametrize("name", ["learnalign", "alignment", "gradient_dot"])
def test_gradient_selectors_equal_the_matrix(name):
    successes, features = random_features()
    features[7] *= 1e4
    found = score(name, 20, successes=successes, features=chunks(features), feature_dim=16)
    if name == "gradient_dot":
        truth = [sum(float(a @ b) for b in features) / 20 for a in features]
    elif name == "alignment":
        truth = [sum(float(a @ b / a.norm() / b.norm()) for b in features) / 20 for a in features]
    else:
        truth = oracles.row_averages(successes, features)
    np.testing.assert_allclose(found, truth, rtol=1e-6, atol=1e-10)


def test_random_is_a_seeded_permutation():
    def drawn(seed, phase="stage_1", size=40):
        candidates = Pool(np.arange(size), cases.dataset(size), seed, phase, config=config())
        return find_selector("random").score(candidates)

    first = drawn(0)
    assert len(set(first.tolist())) == 40
    assert drawn(0).tolist() == first.tolist()
    assert drawn(1).tolist() != first.tolist()
    assert drawn(0, "stage_2").tolist() != first.tolist()
    # Each prompt is in the first quarter as often as any other: 400 draws, standard deviation 8.7.
    taken = sum(drawn(seed) > np.sort(drawn(seed))[-11] for seed in range(400))
    assert taken.sum() == 4000
    assert np.abs(taken - 100).max() < 5 * 8.7


# ---- Options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["learnalign", "alignment", "gradient_dot", "feature_similarity"])
def test_a_prompt_can_be_left_out_of_its_own_average(name):
    successes, features = random_features()
    features[4] = 0
    measured = dict(
        features=chunks(features), feature_dim=16, hidden=chunks(features), hidden_dim=16
    )
    measured |= dict(successes=successes, has_text=torch.ones(20, dtype=torch.bool))
    found = score(name, 20, config(exclude_self=True), **measured)
    if name == "alignment":
        successes = torch.tensor([[1.0, 0.0]]).expand(20, 2)
    if name == "gradient_dot":
        products = features @ features.T
        truth = (products.sum(dim=1) - products.diagonal()) / 19
    else:
        truth = oracles.row_averages_without_self(successes, features) * (
            16 if name == "alignment" else 1
        )
    np.testing.assert_allclose(found, truth, rtol=1e-8, atol=1e-11)
    assert found[4] == 0


def test_a_prompt_alone_has_nobody_to_agree_with():
    measured = dict(
        successes=tensor([1, 0]), features=chunks(torch.ones(1, 4).double()), feature_dim=4
    )
    assert abs(score("learnalign", 1, config(exclude_self=True), **measured)[0]) < 1e-12
    assert score("learnalign", 1, **measured)[0] == pytest.approx(1 / 16)


def test_unbiased_learnability_by_hand():
    successes = tensor(
        [1, 1, 0, 0], [1, 0, NAN, NAN], [1, 0, 0, NAN], [1, NAN, NAN, NAN], [NAN] * 4, [1, 1, 1, 1]
    )
    found = scoring.learnability(successes, unbiased=True)
    assert found.tolist() == [2 * 2 / 12, 1 / 2, 2 / 6, 0, 0, 0]
    assert (
        pool(6, config(unbiased_learnability=True), successes=successes).learnability.tolist()
        == found.tolist()
    )
    assert (
        pool(6, successes=successes).learnability.tolist()
        == scoring.learnability(successes).tolist()
    )


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_unbiased_learnability_is_unbiased(p):
    """Over all outcomes of five rollouts; the plug-in estimate is low by a factor of 4/5."""
    outcomes = torch.tensor(list(itertools.product((0.0, 1.0), repeat=5)), dtype=torch.float64)
    chances = torch.prod(p * outcomes + (1 - p) * (1 - outcomes), dim=1)
    assert float(chances @ scoring.learnability(outcomes, unbiased=True)) == pytest.approx(
        p * (1 - p)
    )
    assert float(chances @ scoring.learnability(outcomes)) == pytest.approx(p * (1 - p) * 4 / 5)


@pytest.mark.parametrize(
    "options", [{}, {"loss_type": "grpo"}, {"mask_truncated_completions": True}], ids=str
)
def test_the_gradient_of_one_right_rollout(tmp_path, options):
    trainer = cases.trainer(
        tmp_path, rewards=[cases.accuracy_reward, cases.length_reward], **options
    )
    settings = config(gradient_rollouts="one_correct", projection="none")
    measure = GradientMeasure(
        Context.of(trainer, settings, scoring_batch_prompts=6), only_learnable=True
    )
    with measure.session():
        groups = measure.roll_out(0, np.arange(12), 2)
        found = measure.measure(0, np.arange(12), 2, True)
        everything = measure.measure(0, np.arange(12), 2, False)
    assert len(everything["features"]) == 0
    captured = found["feature_rows"].tolist()
    assert captured
    for place, row in enumerate(captured):
        group = groups[row]
        assert 0 < group.successes.mean() < 1
        first = min(i for i in range(4) if group.successes[i] == 1 and group.lengths[i] > 0)
        # The same loss of that row alone, with the advantage that all four gave it.
        alone = {name: value[first : first + 1] for name, value in group.raw.items() if value.ndim}
        with preserve_trainer_state(trainer):
            truth = oracles.trainer_gradient(trainer, alone)
        np.testing.assert_allclose(found["features"][place], truth, rtol=1e-4, atol=1e-6)
    skipped = set(range(12)) - set(captured)
    assert all(
        not 0 < groups[i].successes.mean() < 1 or not (groups[i].lengths > 0).all() for i in skipped
    )
    # What is said of the rollouts is said of all of them.
    assert found["successes"].shape == (12, 4)
    assert found["tokens_captured"][captured].max() < groups[0].inputs["prompt_ids"].shape[1] + 20


def test_one_rollout_is_cut_to_its_own_length(tmp_path):
    trainer = cases.trainer(tmp_path)
    with preserve_trainer_state(trainer):
        groups = roll_out(trainer, list(range(6)), 0, oracles.SUCCESS)
        for group, row in itertools.product(groups, range(4)):
            alone = group.only(row)
            assert (alone.rollouts, alone.prompt) == (1, group.prompt)
            assert alone.inputs["completion_ids"].shape == (1, max(1, int(group.lengths[row])))
            assert alone.inputs["advantages"] == group.inputs["advantages"][row]
            assert alone.inputs["num_items_in_batch"] == group.lengths[row]
        with gradient_capture(trainer, Unprojected(trainable_sizes(trainer))) as capture:
            engine = GradientFeaturizer(trainer, capture, 10**6, lambda values: values)
            together = engine.features(groups)
            parts = [engine.features([group.only(row) for group in groups]) for row in range(4)]
    # With the token-level loss, a group's gradient is the mean of its rollouts' by tokens.
    lengths = torch.stack([group.lengths for group in groups]).double()
    mean = sum(parts[row] * (lengths[:, row] / lengths.sum(dim=1)).unsqueeze(1) for row in range(4))
    np.testing.assert_allclose(mean, together, rtol=1e-4, atol=1e-6)


def test_samples_of_growing_size_are_nested_and_seeded():
    candidates = np.arange(3, 90, 2)
    draw = [
        plan.scored_sample(1, "stage_1", candidates, size) for size in (5, 20, 43, 44, 500, None)
    ]
    sets = [set(sample.tolist()) for sample in draw]
    assert [len(found) for found in sets] == [5, 20, 43, 44, 44, 44]
    assert sets[0] < sets[1] < sets[2] < sets[3]
    assert all((np.diff(sample) > 0).all() for sample in draw)
    assert sets[1] != set(plan.scored_sample(2, "stage_1", candidates, 20).tolist())
    assert sets[1] != set(plan.scored_sample(1, "stage_2", candidates, 20).tolist())


def run(tmp_path, settings, data=None, **options):
    data = cases.dataset() if data is None else data
    trainer = cases.trainer(tmp_path, data=data, **options)
    trainer.add_callback(callback := LearnAlignCallback(trainer, settings))
    trainer.train()
    table = pd.read_parquet(tmp_path / "_learnalign" / "stage_1.parquet")
    note = json.loads((tmp_path / "_learnalign" / "run.json").read_text())["phases"]["stage_1"][
        "selection"
    ]
    return callback.selected("stage_1"), table, note


def test_only_the_sample_is_scored_and_selected(tmp_path):
    chosen, table, note = run(tmp_path, config(pool_sample=6, selector="token_length"))
    sample = plan.scored_sample(42, "stage_1", np.arange(12), 6)
    assert table["index"].tolist() == sample.tolist()
    assert set(chosen) < set(sample.tolist())
    assert (len(chosen), note["unscored_selected"]) == (4, 0)


@pytest.mark.parametrize(("on_shortfall", "size"), [("fill", 8), ("shrink", 3)])
def test_a_stage_larger_than_the_sample_is_filled_or_shrinks(tmp_path, caplog, on_shortfall, size):
    settings = config(pool_sample=3, stages=[8], selector="token_length", on_shortfall=on_shortfall)
    with caplog.at_level(logging.WARNING, "trl_learnalign"):
        chosen, table, note = run(tmp_path, settings)
    assert len(table) == 3
    assert set(table["index"]) <= set(chosen.tolist())
    assert len(chosen) == size
    assert note["unscored_selected"] == size - 3
    assert "only 3 of 3 candidates have a score, fewer than the requested 8" in caplog.text
    assert ("5 unscored" in caplog.text) == (on_shortfall == "fill")


# ---- Names, own functions and missing inputs ------------------------------------------------------------------------


OWN = """
import numpy as np
import torch
from trl_learnalign.selectors import HIDDEN, Selector

def hardest(pool):
    return 1 - pool.success_rate

def as_tensor(pool):
    return torch.arange(len(pool))

def too_short(pool):
    return np.zeros(len(pool) - 1)

def words(pool):
    return ["good"] * len(pool)

def looked_up(pool):
    return pool.prompts.reshape(-1, 1)

asks = Selector("asks", as_tensor, frozenset({HIDDEN}))
number = 3
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "__init__.py").touch()
    (tmp_path / "own" / "ranking.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield "own.ranking"
    for name in [name for name in sys.modules if name.split(".")[0] == "own"]:
        del sys.modules[name]


def test_your_own_function_is_found_by_its_path(own_module):
    successes = tensor([1, 0], [1, 1], [0, 0], [1, 1])
    for path in ("own.ranking:hardest", "own.ranking.hardest"):
        selector = find_selector(path)
        assert selector.needs == {"rollouts"}
        assert selector.score(pool(successes=successes)).tolist() == [0.5, 0, 1, 0]
    converted = find_selector("own.ranking:as_tensor").score(pool())
    assert converted.dtype == np.float64
    assert converted.tolist() == [0, 1, 2, 3]
    assert find_selector("own.ranking:asks").needs == {"hidden"}


def test_your_own_function_selects(own_module, tmp_path):
    chosen, table, _ = run(tmp_path / "run", config(selector="own.ranking:hardest"))
    np.testing.assert_allclose(table["score"], 1 - table["success_rate"])
    assert table.set_index("index").loc[chosen, "rank"].max() == 4


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (
            "too_short",
            ValueError,
            r"'own.ranking:too_short' returned scores of shape \(3,\) for 4 candidates",
        ),
        ("looked_up", ValueError, r"shape \(4, 1\) for 4 candidates: return shape \(4,\)"),
        (
            "words",
            TypeError,
            r"'own.ranking:words' returned <U4 values \(list\): return one real number",
        ),
    ],
)
def test_scores_of_the_wrong_form_are_refused(own_module, function, error, message):
    with pytest.raises(error, match=message):
        find_selector(f"own.ranking:{function}").score(pool())


def test_paths_that_lead_nowhere(own_module):
    with pytest.raises(
        ValueError, match=r"selector='elsewhere:f': elsewhere cannot be imported .*PYTHONPATH"
    ):
        find_selector("elsewhere:f")
    with pytest.raises(ValueError, match=r"own.ranking has no 'missing'"):
        find_selector("own.ranking:missing")
    with pytest.raises(TypeError, match=r"'own.ranking:number' is a int: name a function"):
        find_selector("own.ranking:number")
    with pytest.raises(
        ValueError, match=r"choose one of 'learnalign', .*or name a function of your own"
    ):
        find_selector("learnaling")
    with pytest.raises(
        ValueError, match=r"'mine' needs \['gradient'\]: choose from 'rollouts', 'gradients'"
    ):
        Selector("mine", len, frozenset({"gradient"}))


def test_the_table_holds_what_the_paper_compares_and_more():
    named = "learnalign learnability alignment gradient_dot feature_similarity random"
    named += " token_length ppl_top ppl_middle ifd learnalign_coverage learnalign_logdet"
    assert set(SELECTORS) == {
        *named.split(),
        "selectit",
        "limr",
        "reward_variance",
        "validation_alignment",
    }


READS_SOLUTIONS = ("token_length", "ppl_top", "ppl_middle", "ifd", "selectit")


@pytest.mark.parametrize("name", READS_SOLUTIONS)
def test_a_missing_solution_column_is_an_error_before_any_model_call(tmp_path, name):
    data = Dataset.from_dict({"prompt": ["a?"] * 12, "target": ["1"] * 12})
    message = rf"selector='{name}' reads the reference solutions .* no column 'reference' or 'solution', only .*"
    message += "'target'"
    with pytest.raises(
        ValueError, match=message + r".*solution_column, or choose .*learnalign.*random"
    ):
        plan_run(config(selector=name), cases.grpo_config(tmp_path), data, cases.accuracy_reward)
    trainer = cases.trainer(tmp_path, data=data)
    trainer.model.forward = None
    with pytest.raises(ValueError, match=message):
        LearnAlignCallback(trainer, config(selector=name))
    LearnAlignCallback(trainer, config(selector=name, solution_column="target"))
    with pytest.raises(ValueError, match=r"solution_column='goal' is not one of its columns"):
        LearnAlignCallback(trainer, config(selector=name, solution_column="goal"))


def test_hidden_states_need_solutions_only_if_they_are_to_be_read():
    selector = find_selector("feature_similarity")
    check_columns(selector, ["prompt"], config())
    with pytest.raises(
        ValueError, match="selector='feature_similarity' reads the reference solutions"
    ):
        check_columns(selector, ["prompt"], config(hidden_text="prompt_and_solution"))


def test_a_written_out_solution_is_preferred(tmp_path):
    data = cases.dataset(4).add_column("reference", ["12345"] * 4)  # beside the final answers
    trainer = cases.trainer(tmp_path, data=data)
    selector = find_selector("token_length")
    for column, length in ((None, 5), ("solution", 1)):
        work = MeasureJob("stage_1", np.arange(4), tmp_path / str(column), {}, 10, quiet=True)
        context = Context.of(trainer, config(solution_column=column), scoring_batch_prompts=2)
        found, _ = measure_pool(context, selector, work)
        assert found.solution_tokens.tolist() == [length] * 4


def test_a_missing_or_foreign_history_is_an_error_before_any_model_call(tmp_path):
    def plan(**options):
        plan_run(
            config(selector="limr", **options),
            cases.grpo_config(tmp_path),
            cases.dataset(12),
            cases.accuracy_reward,
        )

    with pytest.raises(
        ValueError,
        match="selector='limr' ranks prompts by the success rates of a previous run: name the file",
    ):
        plan()
    with pytest.raises(FileNotFoundError, match=r"reward_history='nowhere.json' does not exist"):
        plan(reward_history="nowhere.json")
    path = str(tmp_path / "history.json")
    write_history(Path(path), RewardHistory(np.array([[0.5]]), np.array([40])))
    with pytest.raises(
        ValueError, match="has row 40, but the training dataset has 12 rows: it belongs to another"
    ):
        plan(reward_history=path)
    path = str(tmp_path / "history.parquet")
    write_history(Path(path), RewardHistory(np.array([[0.5]]), None, ["0" * 16]))
    with pytest.raises(ValueError, match="has no prompt of the training dataset"):
        plan(reward_history=path)


def test_a_tokenizer_without_ratings_is_an_error_before_any_model_call(tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "ALPHABET", cases.ALPHABET.replace("3", ""))
    trainer = cases.trainer(tmp_path)
    with pytest.raises(ValueError, match="has no five distinct ones"):
        LearnAlignCallback(trainer, config(selector="selectit"))


# ---- All of them ----------------------------------------------------------------------------------------------------


def test_rankings_do_not_depend_on_batches_and_shards(tmp_path):
    policy = cases.model(max_position_embeddings=512)
    data = cases.dataset(10).add_column(
        "reference", [f"{i * 7}+{'ab' * (i % 4)}" for i in range(10)]
    )
    trainer = cases.trainer(tmp_path, policy, data=data)
    write_history(
        tmp_path / "h.parquet", RewardHistory(np.arange(20).reshape(10, 2) / 20, np.arange(10))
    )
    for name in [name for name in SELECTORS if name != "validation_alignment"]:
        selector = find_selector(name)
        found = []
        for rows, tokens, shard_size in ((1, 40, 10), (4, 4000, 10), (4, 4000, 3)):
            settings = config(
                text_batch_size=rows,
                capture_max_tokens=tokens,
                reward_history=str(tmp_path / "h.parquet"),
            )
            folder = tmp_path / f"{rows}-{tokens}-{shard_size}"
            work = MeasureJob("stage_1", np.arange(10), folder, {}, shard_size, quiet=True)
            context = Context.of(trainer, settings, scoring_batch_prompts=2)
            found.append(selector.score(measure_pool(context, selector, work)[0]))
        np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-7, err_msg=name)
        if not selector.needs & {
            "rollouts",
            "gradients",
        }:  # a shard is the unit of seeds, so it decides the rollouts
            np.testing.assert_allclose(found[2], found[0], rtol=1e-4, atol=1e-7, err_msg=name)
        ties = plan.tie_order(0, "stage_1", 10)
        assert scoring.rank(found[1], ties).tolist() == scoring.rank(found[0], ties).tolist(), name
