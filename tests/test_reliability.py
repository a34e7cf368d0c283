"""Reliability of a ranking: two half features per prompt, two rankings, and what their agreement predicts."""

import json

import cases
import numpy as np
import oracles
import pandas as pd
import pytest
import torch
from torch import nn

from trl_learnalign import LearnAlignCallback, LearnAlignConfig, plan_run
from trl_learnalign.bridge.hooks import preserve_trainer_state
from trl_learnalign.bridge.policy import gradient_capture, trainable_sizes
from trl_learnalign.gradients.projection import Unprojected
from trl_learnalign.intervals import spearman
from trl_learnalign.measuring.generation import roll_out
from trl_learnalign.measuring.gradient_features import GradientFeaturizer
from trl_learnalign.pool import Pool
from trl_learnalign.ranking import (
    Ranking,
    _all_equal,
    _HalfFeatures,
    half_pool,
    reliability,
    spearman_brown,
)
from trl_learnalign.selectors import ROLLOUTS, SELECTORS, Selector


def half_gradients(trainer, group):
    """`Σ_i A_i mean_t ∇ log p_it / G` over the rollouts of each half: the gradient of `loss_type="grpo"`."""
    inputs, rows = group.inputs, []
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    for i in range(group.rollouts):
        length = int(inputs["completion_mask"][i].sum())
        prompt, completion = inputs["prompt_ids"][i], inputs["completion_ids"][i, :length]
        logits = trainer.model(torch.cat([prompt, completion]).unsqueeze(0)).logits[
            0, len(prompt) - 1 : -1
        ]
        logps = logits.log_softmax(dim=1).gather(1, completion.unsqueeze(1))
        objective = inputs["advantages"][i] * logps.mean() / group.rollouts
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(objective, parameters)]))
    middle = group.rollouts // 2
    return torch.stack([sum(rows[:middle]), sum(rows[middle:])]).detach()


class Mixing(nn.Module):
    """A layer without a rule, so that its prompts and halves have to be captured one at a time."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.1))

    def forward(self, hidden):
        return hidden * self.scale


@pytest.mark.parametrize("without_rule", [False, True])
def test_half_features_are_the_gradients_of_each_half_and_add_up(tmp_path, without_rule):
    policy = cases.model()
    if without_rule:
        policy.model.layers[0].mlp = nn.Sequential(policy.model.layers[0].mlp, Mixing())
    trainer = cases.trainer(tmp_path, policy, loss_type="grpo", beta=0.0)
    with preserve_trainer_state(trainer):
        groups = [
            group
            for group in roll_out(trainer, list(range(5)), 0, oracles.SUCCESS)
            if group.inputs["advantages"].any()
        ]
        assert len(groups) > 1
        trainer.model.eval()
        truth = torch.stack([half_gradients(trainer, group) for group in groups])
        for budget in (10**6, 20):  # all at once, and rollouts of one half split
            projection = Unprojected(trainable_sizes(trainer))
            with gradient_capture(trainer, projection) as capture:
                halves = GradientFeaturizer(
                    trainer, capture, budget, lambda values: values, parts=2
                ).features(groups)
                whole = GradientFeaturizer(
                    trainer, capture, budget, lambda values: values
                ).features(groups)
            assert halves.shape == truth.shape
            assert (halves - truth).norm() < 1e-5 * truth.norm()
            assert (halves.sum(dim=1) - whole).norm() < 1e-5 * whole.norm()


def run(folder, data=None, **options):
    settings = {
        "warmup_samples": 0,
        "stages": [4],
        "reliability": True,
        "feature_dim": 128,
        "shard_size": 4,
    }
    data = cases.dataset() if data is None else data
    trainer = cases.trainer(folder, data=data, num_generations=8)
    callback = LearnAlignCallback(trainer, LearnAlignConfig(**{**settings, **options}))
    trainer.add_callback(callback)
    trainer.train()
    notes = json.loads((folder / "_learnalign" / "run.json").read_text())["phases"]["stage_1"][
        "selection"
    ]
    return trainer, callback, notes


def test_the_stage_record_and_the_log_tell_the_reliability(tmp_path):
    trainer, _, notes = run(tmp_path)
    found = notes["reliability"]
    assert found["rollouts"] == 8
    assert found["overlap_size"] == 4
    assert found["overlap_by_chance"] == 4 / 12
    assert 0 <= found["overlap_halves"] <= 1
    assert -1 <= found["spearman_halves"] <= 1
    (logged,) = [entry for entry in trainer.state.log_history if "learnalign/reliability" in entry]
    assert logged["learnalign/reliability"] == (found["spearman"]["8"] or 0.0)
    assert logged["learnalign/reliability_overlap"] == found["overlap_halves"]


def test_halves_change_neither_the_scores_nor_the_selection(tmp_path):
    tables = {}
    for reliable in (True, False):
        _, callback, notes = run(tmp_path / str(reliable), reliability=reliable)
        tables[reliable] = pd.read_parquet(callback.folder / "stage_1.parquet")
        assert ("reliability" in notes) == reliable
    np.testing.assert_allclose(tables[True]["score"], tables[False]["score"], rtol=1e-4, atol=1e-9)
    assert tables[True]["selected"].tolist() == tables[False]["selected"].tolist()


def test_selectors_that_use_no_rollouts_have_no_reliability(tmp_path):
    assert "reliability" not in run(tmp_path, selector="random")[2]


def pool_of(successes):
    count = len(successes)
    return Pool(
        np.arange(count),
        None,
        seed=0,
        phase="stage_1",
        successes=torch.as_tensor(successes).double(),
    )


def ranking_of(pool, function=SELECTORS["learnability"].function):
    selector = Selector("some", function, frozenset({ROLLOUTS}))
    return Ranking(selector, pool, selector.score(pool), np.arange(len(pool)))


def test_a_half_has_its_own_rollouts():
    pool = pool_of([[1, 1, 0, 0], [1, 0, 1, 0]])
    assert half_pool(pool, 0).success_rate.tolist() == [1.0, 0.5]
    assert half_pool(pool, 1).success_rate.tolist() == [0.0, 0.5]
    assert pool.success_rate.tolist() == [0.5, 0.5]


def test_a_half_whose_rewards_are_all_equal_has_no_direction():
    nan = float("nan")
    rewards = torch.tensor([[[1.0], [1.0]], [[1.0], [0.0]], [[nan], [1.0]], [[nan], [nan]]])
    assert _all_equal(rewards).tolist() == [True, False, True, True]
    two = torch.tensor([[[1.0, 0.5], [1.0, 0.7]]])  # two reward functions
    assert _all_equal(two).tolist() == [False]
    features = [(torch.tensor([1, 0]), torch.tensor([[2.0, 3.0], [4.0, 5.0]]))]
    ((positions, found),) = _HalfFeatures(features, torch.tensor([True, False]))
    assert positions.tolist() == [1, 0]
    assert found.tolist() == [[2.0, 3.0], [0.0, 0.0]]


def test_equal_halves_agree_and_unrelated_ones_do_not():
    generator = torch.Generator().manual_seed(0)
    half = torch.randint(0, 2, (400, 8), generator=generator)
    same = reliability(ranking_of(pool_of(torch.cat([half, half], dim=1))), 40)
    assert same.spearman_halves == pytest.approx(1)
    assert same.overlap_halves == 1
    assert same.spearman["16"] == pytest.approx(1)
    other = torch.randint(0, 2, (400, 8), generator=generator)
    unrelated = reliability(ranking_of(pool_of(torch.cat([half, other], dim=1))), 40)
    assert abs(unrelated.spearman_halves) < 0.15
    assert unrelated.overlap_halves < 0.3


def test_the_prediction_holds_for_repeated_measurements():
    """Means of G rollouts of prompts of different p: Spearman–Brown from two halves meets two independent draws."""
    generator = torch.Generator().manual_seed(1)
    p = torch.rand(3000, 1, generator=generator)

    def draw():
        return (torch.rand(3000, 8, generator=generator) < p).long()

    ranked = [ranking_of(pool_of(draw()), lambda pool: pool.success_rate) for _ in range(2)]
    predicted = reliability(ranked[0], 300).spearman["8"]
    assert predicted == pytest.approx(spearman(ranked[0].scores, ranked[1].scores), abs=0.02)


def test_spearman_shares_ranks_among_ties_and_leaves_out_what_is_not_ranked():
    assert spearman(np.array([1.0, 2, 3, np.nan]), np.array([10.0, 20, 30, 0])) == pytest.approx(1)
    assert spearman(np.array([0.0, 0, 1]), np.array([0.0, 0, 5])) == pytest.approx(1)
    assert spearman(np.zeros(3), np.arange(3.0)) is None


def test_spearman_brown():
    assert spearman_brown(0.5, 2) == pytest.approx(2 / 3)
    assert spearman_brown(0.5, 1) == 0.5
    assert spearman_brown(-0.1, 2) is None
    assert spearman_brown(None, 2) is None


def test_odd_rollouts_and_single_rollouts_are_refused(tmp_path):
    args = cases.grpo_config(tmp_path, num_generations=3, per_device_train_batch_size=6)
    config = LearnAlignConfig(warmup_samples=0, reliability=True)
    with pytest.raises(
        ValueError, match=r"num_generations=3 is odd: make it even, or set reliability=False"
    ):
        plan_run(config, args, cases.dataset(12), cases.accuracy_reward)
    with pytest.raises(ValueError, match=r"gradient_rollouts='one_correct'"):
        LearnAlignConfig(reliability=True, gradient_rollouts="one_correct")
