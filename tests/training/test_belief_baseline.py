"""The belief as baseline inside the trainer: what its loss sees, against a stock trainer that is given the same."""

import math

import baselines
import numpy as np
import pandas as pd
import pytest
import sampling_cases
import torch
from adaptive_cases import go, history, settings, weights
from interruptions import Killed
from sampling_cases import completion
from skipping_cases import ROUNDING, Steps, distances, number_of
from transformers import TrainerCallback
from trl import GRPOTrainer

from trl_learnalign import LearnAlignCallback
from trl_learnalign.adaptive import Outcomes
from trl_learnalign.adaptive.belief import Belief
from trl_learnalign.records.store import StoreError

SHARE = 0.5
BELIEF = dict(
    baseline="belief",
    baseline_share=SHARE,
    adaptive_embeddings="sampling_cases:embeddings",
    stage_steps=4,
)


def style_reward(completions, **_):
    """Of its own mind about every fourth, and silent about some."""
    lengths = [len(text.replace(" ", "")) for text in completions]
    return [None if length == 3 else length / 4 for length in lengths]


REWARDS = [style_reward, sampling_cases.right_reward]


def seeded_rollouts(prompts, trainer):
    """TRL then shuffles the generation alike in both runs, whatever else has drawn random numbers."""
    torch.manual_seed(sum(map(number_of, prompts)))
    return sampling_cases.roll_out(prompts, trainer)


class Given(GRPOTrainer):
    """TRL's trainer, except that somebody else has the advantages: generation after generation, `(R,)`."""

    given: list[torch.Tensor]

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        batch["advantages"] = self.given.pop(0).to(batch["advantages"])
        return batch


def generations(callback):
    """The history's rows by generation, and the belief about them before their unit."""
    geometry, table = callback.plan.geometry, history(callback)
    belief = Belief(callback.run.order.adaptive.belief.features, callback.config)
    size = geometry.prompts_per_generation
    parts = [table.iloc[start : start + size] for start in range(0, len(table), size)]
    length = geometry.unit_generations
    for number in range(len(parts) // length):
        unit, generation = parts[number * length : (number + 1) * length], number + 1
        for part in unit:
            yield part, belief.posterior(part["index"].to_numpy(), generation)
        seen = pd.concat(unit)
        columns = [seen[name].to_numpy() for name in ("index", "right", "wrong")]
        belief.record(Outcomes.at(generation, *columns), generation)


def rewards_of(rows, rollouts, functions):
    texts = [[completion(int(row), k) for k in range(rollouts)] for row in rows]
    columns = [[function(group) for function in functions] for group in texts]
    return [
        [[np.nan if x is None else x for x in rollout] for rollout in zip(*group, strict=True)]
        for group in columns
    ]


def expected_advantages(trainer, callback, functions, share=SHARE):
    """Of each generation, by the second implementation, from the history alone."""
    found = []
    for part, belief in generations(callback):
        rewards = rewards_of(part["index"], trainer.num_generations, functions)
        each = trainer.multi_objective_aggregation == "normalize_then_sum"
        values = baselines.advantages(
            rewards,
            len(functions) - 1,
            belief.right.tolist(),
            belief.wrong.tolist(),
            trainer.reward_weights.tolist(),
            scaled=trainer.scale_rewards != "none",
            scaled_each=each,
            share=share,
        )
        found.append(torch.tensor(values).flatten())
    return found


def ours(folder, config, **options):
    given = dict(rows=list(range(24)), rollout_func=seeded_rollouts, max_steps=-1)
    trainer = sampling_cases.trainer(folder, **given, **options)
    steps = Steps(trainer)
    callback = LearnAlignCallback(trainer, config)
    trainer.add_callback(callback)
    trainer.train()
    return trainer, callback, steps


def stock(folder, monkeypatch, rows, advantages, **options):
    with monkeypatch.context() as patched:
        patched.setattr(sampling_cases, "GRPOTrainer", Given)
        given = dict(rows=rows, rollout_func=seeded_rollouts, max_steps=4)
        trainer = sampling_cases.trainer(folder, **given, **options)
    trainer.given = list(advantages)
    steps = Steps(trainer)
    trainer.train()
    return steps


PAIRS = dict(num_generations=2)
TWO = dict(rewards=REWARDS, reward_weights=[0.4, 1.0])
CASES = {
    "dapo": dict(**PAIRS),
    "grpo": dict(loss_type="grpo", scale_rewards="batch", **TWO),
    "bnpo": dict(loss_type="bnpo", scale_rewards="none", gradient_accumulation_steps=2, **TWO),
    "dr_grpo": dict(loss_type="dr_grpo", scale_rewards="none", steps_per_generation=2, **PAIRS),
    "sapo": dict(loss_type="sapo", num_iterations=2, **PAIRS, **TWO),
    "luspo": dict(loss_type="luspo", gradient_accumulation_steps=4, steps_per_generation=2),
    "cispo": dict(loss_type="cispo", multi_objective_aggregation="normalize_then_sum", **TWO),
    "vespo": dict(loss_type="vespo", scale_rewards="batch", steps_per_generation=2, **PAIRS, **TWO),
}


ALL = [(name, skips) for skips in (True, False) for name in CASES]
SLOW = [(name, False) for name in list(CASES)[1:]]  # the advantages do not depend on skipping


@pytest.mark.parametrize(
    ("name", "skips"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (case in SLOW)) for case in ALL],
)
def test_the_loss_sees_the_advantages_of_plain_loops(tmp_path, monkeypatch, name, skips):
    options, functions = CASES[name], CASES[name].get("rewards", [sampling_cases.right_reward])
    config = settings(**BELIEF, success_reward="right_reward", skip_zero_advantages=skips)
    trainer, callback, own = ours(tmp_path / "ours", config, **options)
    expected = expected_advantages(trainer, callback, functions)
    rows = history(callback)["index"].tolist()
    reference = stock(tmp_path / "stock", monkeypatch, rows, expected, **options)
    assert max(distances(reference.gradients, own.gradients)) < ROUNDING
    if not skips:
        assert own.rows == reference.rows
    kept = sum(int((values != 0).sum()) for values in expected)
    given = sum(map(len, expected))
    assert 0 < kept < given
    assert sum(own.rows) == (kept if skips else given) * trainer.num_iterations
    useful = [
        (group != 0).any().item() for x in expected for group in x.view(-1, trainer.num_generations)
    ]
    assert history(callback)["useful"].tolist() == useful


SEVERAL = dict(steps_per_generation=2, num_iterations=2)
ROULETTE = dict(baseline_pruning="roulette", baseline_share=0.4, stage_steps=8)


def test_an_interrupted_run_goes_on_bit_by_bit(tmp_path):
    """Killed within a unit; after it comes a generation by the belief that was rebuilt."""
    config = settings(**{**BELIEF, **ROULETTE})
    trainer, callback = go(tmp_path / "whole", config, **SEVERAL)
    with pytest.raises(Killed):
        go(tmp_path / "killed", config, kill_at=2, **SEVERAL)
    resumed, again = go(tmp_path / "killed", config, resume=True, **SEVERAL)
    pd.testing.assert_frame_equal(history(again), history(callback))
    pairs = zip(weights(resumed), weights(trainer), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_roulette_is_another_draw_in_each_generation_and_keeps_the_large_ones(tmp_path):
    config = settings(**{**BELIEF, **ROULETTE, "stage_steps": 6})
    made, whole = seen_advantages(tmp_path, config)
    pruned = raised = 0
    for x, y in zip(made, whole, strict=True):
        least = y.abs().sort(descending=True).values[math.ceil(0.4 * len(y)) - 1]
        is_large = y.abs() > least - 1e-6
        is_raised = (x != 0) & ~is_large
        torch.testing.assert_close(x[is_large], y[is_large], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(x[is_raised].abs(), least.expand(int(is_raised.sum())))
        pruned += int((~is_large & (y != 0)).sum())
        raised += int(is_raised.sum())
    assert 0 < raised < pruned


def seen_advantages(folder, config):
    """What TRL's table of completions has of each generation, and what it would be without pruning."""
    trainer = sampling_cases.trainer(folder, rows=list(range(24)), max_steps=-1)
    callback, table = LearnAlignCallback(trainer, config), []
    trainer.add_callback(callback)
    keep = TrainerCallback()
    keep.on_step_end = lambda *_, **__: table.append(torch.tensor(trainer._logs["advantages"]))
    trainer.add_callback(keep)
    trainer.train()
    functions = [sampling_cases.right_reward]
    return table, expected_advantages(trainer, callback, functions, share=1.0)


def test_the_log_says_what_belief_and_group_explain(tmp_path):
    trainer, callback, _ = ours(tmp_path, settings(**BELIEF), **PAIRS, logging_steps=1)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for (part, belief), entry in zip(generations(callback), logged, strict=True):
        rewards = rewards_of(part["index"], 2, [sampling_cases.right_reward])
        flat = np.array(rewards)[..., 0]
        for name, a, b in (
            ("baseline", belief.right, belief.wrong),
            ("group_mean", [0] * 4, [0] * 4),
        ):
            parts = baselines.differences(rewards, 0, a, b, 0.5)
            squares = np.mean(np.array(parts, dtype=float) ** 2)
            if flat.var():
                expected = pytest.approx(1 - squares / flat.var(), abs=1e-6)
                assert entry[f"learnalign/{name}_explained"] == expected
    assert any("learnalign/baseline_explained" in entry for entry in logged)


def test_a_trainer_that_composes_generations_itself_is_refused(tmp_path, monkeypatch):
    class Token(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            batch["advantages"] = batch["advantages"][:, None] * batch["completion_mask"]
            return batch

    monkeypatch.setattr(sampling_cases, "GRPOTrainer", Token)
    with pytest.raises(RuntimeError, match=r"Token composes .* Set baseline='group'"):
        ours(tmp_path, settings(**BELIEF, skip_zero_advantages=False))


def test_another_baseline_in_the_same_folder_is_another_run(tmp_path):
    ours(tmp_path, settings(**{**BELIEF, "stage_steps": 1}))
    with pytest.raises(StoreError, match=r"baseline_share was 0\.5 and is 0\.4"):
        ours(tmp_path, settings(**{**BELIEF, "stage_steps": 1, "baseline_share": 0.4}))
