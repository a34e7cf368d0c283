"""What `plan` says is never less than what a run makes, whatever its settings."""

import tempfile

import cases
import hypothesis
from hypothesis import strategies

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.plan import STAGE
from trl_learnalign.preflight.forecast import geometry, make_forecast
from trl_learnalign.selectors import find_selector


@strategies.composite
def settings(draw):
    """Small runs whose stages may shrink, be forced, choose of a sample, or train on the whole pool."""
    fractions = strategies.sampled_from(
        [[1.0], [0.5, 0.5], [0.5, 0.3, 0.2], [0.25, 0.5], [0.25, 0.25, 0.5], [0.75, 0.25]]
    )
    stages = draw(fractions)
    selector = strategies.sampled_from(["learnability", "learnalign", "random", "token_length"])
    options = {
        "stages": stages,
        "stage_epochs": [draw(strategies.integers(1, 2))],
        "warmup_samples": draw(strategies.sampled_from([0, 3])),
        "selector": [draw(selector) for _ in stages],
        "on_shortfall": draw(strategies.sampled_from(["fill", "shrink"])),
        "reselect": draw(strategies.sampled_from(["remaining", "all"])),
        "order": draw(strategies.sampled_from(["shuffled", "adaptive"])),
        "skip_forced_scoring": draw(strategies.booleans()),
    }
    limit = draw(strategies.sampled_from([{}, {"pool_sample": 5}, {"rollout_budget": 0.4}]))
    return {**options, **limit}


def hard(share):
    """A reward that few rollouts earn: most prompts teach nothing, and stages shrink."""

    def accuracy_reward(completions, **_):
        codes = [sum(map(ord, cases.text(completion))) for completion in completions]
        return [float(code % share == 0) for code in codes]

    return accuracy_reward


@hypothesis.settings(
    derandomize=True,
    max_examples=16,
    deadline=None,
    database=None,
    phases=[hypothesis.Phase.generate],  # to shrink an example takes minutes
)
@hypothesis.given(options=settings(), share=strategies.sampled_from([2, 7, 40]))
def test_a_run_makes_no_more_rollouts_than_were_planned(options, share):
    made = {"training": 0, "scoring": 0}
    callbacks = []
    reward = hard(share)

    def accuracy_reward(completions, **_):
        made["scoring" if callbacks[0].is_scoring else "training"] += len(completions)
        return reward(completions)

    config = LearnAlignConfig.adaptive(
        feature_dim=16, adaptive_embeddings="none", check_gradients=False, verbose=False, **options
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = cases.trainer(folder, rewards=accuracy_reward, data=cases.dataset(13))
        callback = LearnAlignCallback(trainer, config)
        callbacks.append(callback)
        trainer.add_callback(callback)
        plan = callback.plan
        trainer.train()
    assert plan.geometry == geometry(trainer.args)
    forecast = make_forecast(
        plan,
        config,
        [find_selector(name) for name in config.selectors],
        max_completion_length=trainer.args.max_completion_length,
    )
    assert made["training"] <= forecast.most_rolled_out
    assert made["scoring"] <= forecast.scoring_rollouts
    for phase, planned in zip(callback.plan.phases, forecast.phases, strict=True):
        if phase.kind == STAGE:
            assert len(callback.selected(phase.name)) <= planned.prompts
