"""Whether a prompt has a gradient of its own: settings that tie it to its neighbours, and rollouts that are masked."""

import cases
import numpy as np
import oracles
import pytest
import torch

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.bridge.hooks import preserve_trainer_state
from trl_learnalign.distributed import Ranks
from trl_learnalign.measuring.base import Context
from trl_learnalign.measuring.generation import roll_out
from trl_learnalign.measuring.rollouts import GradientMeasure
from trl_learnalign.pool import Pool


def config(**options):
    return LearnAlignConfig(**{"warmup_samples": 0, "stages": [4], "feature_dim": 64, **options})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            dict(scale_rewards="batch", beta=0.1),
            r"scale_rewards='batch' with a KL or entropy term \(beta=0\.1.*'none'",
        ),
        (
            dict(scale_rewards="batch", entropy_coef=0.1),
            "scale_rewards='batch' with a KL or entropy term",
        ),
        (
            dict(multi_objective_aggregation="normalize_then_sum", beta=0.1),
            "'normalize_then_sum' with a KL or entropy term.*'sum_then_normalize'",
        ),
        (dict(top_entropy_quantile=0.4), r"top_entropy_quantile=0\.4.*Set it to 1\.0"),
    ],
    ids=str,
)
def test_objectives_that_tie_a_prompt_to_its_batch_are_refused_when_the_callback_is_made(
    tmp_path, options, says
):
    policy = tmp_path / "policy"
    cases.model().save_pretrained(policy)
    from transformers import AutoModelForCausalLM

    trainer = cases.trainer(tmp_path, AutoModelForCausalLM.from_pretrained(policy), **options)
    with pytest.raises(ValueError, match=says):
        LearnAlignCallback(trainer, config())
    LearnAlignCallback(trainer, config(selector="learnability"))


@pytest.mark.parametrize(
    "options", [dict(scale_rewards="batch"), dict(multi_objective_aggregation="normalize_then_sum")]
)
def test_without_such_a_term_they_are_accepted(tmp_path, options):
    LearnAlignCallback(cases.trainer(tmp_path, **options), config())


def some_reward(completions, **_):
    """Missing now and then."""
    return [
        None if len(text) % 3 == 0 else float(ord(text[0]) % 5)
        for text in map(cases.text, completions)
    ]


def test_summed_advantages_do_not_depend_on_the_neighbours(tmp_path):
    """Each is of its own four rollouts: TRL's, up to a positive factor that it takes from the whole call."""
    trainer = cases.trainer(
        tmp_path,
        rewards=[cases.accuracy_reward, cases.length_reward, some_reward],
        multi_objective_aggregation="normalize_then_sum",
        reward_weights=[1.0, 0.5, 2.0],
    )
    kept = []
    generate = trainer._generate_and_score_completions

    def keep(rows):
        kept.append(generate(rows)["advantages"].clone())
        return generate(rows)

    with preserve_trainer_state(trainer):
        groups = roll_out(trainer, list(range(5)), 3, oracles.SUCCESS)
        trainer._generate_and_score_completions = keep
        roll_out(trainer, list(range(5)), 3, oracles.SUCCESS)
        del trainer._generate_and_score_completions
    found = torch.cat([group.inputs["advantages"] for group in groups])
    for group in groups:
        normalized = []
        for column, weight in zip(group.rewards.T.double().numpy(), (1.0, 0.5, 2.0), strict=True):
            deviation = np.nanstd(column, ddof=1)
            normalized.append(weight * (column - np.nanmean(column)) / (deviation + 1e-4))
        truth = np.nansum(normalized, axis=0)
        np.testing.assert_allclose(group.inputs["advantages"], truth, atol=1e-5)
    factor = float(found @ kept[0] / (kept[0] @ kept[0]))
    assert factor > 0
    np.testing.assert_allclose(found, factor * kept[0], atol=1e-4)


def test_prompts_whose_rollouts_are_all_masked_are_not_learnable(tmp_path):
    trainer = cases.trainer(tmp_path, mask_truncated_completions=True)
    measure = GradientMeasure(
        Context.of(trainer, config(), scoring_batch_prompts=6), only_learnable=True
    )
    with measure.session():
        result = measure.measure(0, np.arange(12), 2, True)
    mixed = (result["successes"].mean(dim=1) % 1 != 0).numpy()
    masked = (result["lengths"] == 0).all(dim=1).numpy()
    assert (mixed & masked).any()
    assert (mixed & ~masked).any()
    assert result["feature_rows"].tolist() == np.flatnonzero(mixed & ~masked).tolist()
    pool = Pool(np.arange(12), trainer.train_dataset, 0, "stage_1", Ranks(), config())
    pool.successes, pool.lengths = result["successes"], result["lengths"]
    assert np.flatnonzero(pool.learnability).tolist() == result["feature_rows"].tolist()
