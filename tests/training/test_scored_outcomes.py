"""What a stage has scored is told to the belief as it was judged, rollout by rollout."""

import cases
import numpy as np
import pytest

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.adaptive.belief import Belief

SCORED = dict(stages=[0.5], order="adaptive", selector="learnability", adaptive_embeddings="none")


class Told:
    """What beliefs were told of each prompt before the first step, and what the reward has said of it."""

    def __init__(self, monkeypatch):
        self.of_belief: dict[int, tuple[int, int]] = {}
        self.of_reward: dict[int, list[float | None]] = {}
        self.callback: LearnAlignCallback | None = None
        record = Belief.record

        def noted(belief, outcomes, generation):
            if generation == 0:
                columns = (outcomes.rows, outcomes.right, outcomes.wrong)
                for row, right, wrong in zip(*columns, strict=True):
                    self.of_belief[int(row)] = (int(right), int(wrong))
            return record(belief, outcomes, generation)

        monkeypatch.setattr(Belief, "record", noted)

    def accuracy_reward(self, completions, row, **_):
        """Judges one rollout of even prompts, none of every fifth, and all of the others."""
        judged = []
        for place, (completion, number) in enumerate(zip(completions, row, strict=True)):
            is_judged = number % 5 and (number % 2 or place % 4 == 0)
            judged.append(cases.accuracy_reward([completion])[0] if is_judged else None)
        if self.callback.is_scoring:
            for number, reward in zip(row, judged, strict=True):
                self.of_reward.setdefault(number, []).append(reward)
        return judged


@pytest.mark.parametrize("options", [SCORED, {**SCORED, "stages": [0.25, 0.5]}])
def test_only_judged_rollouts_of_a_scoring_are_told(tmp_path, monkeypatch, options):
    told = Told(monkeypatch)
    data = cases.dataset(16).add_column("row", list(range(16)))
    trainer = cases.trainer(tmp_path, rewards=told.accuracy_reward, data=data)
    told.callback = LearnAlignCallback(trainer, LearnAlignConfig.adaptive(**options))
    trainer.add_callback(told.callback)
    trainer.train()
    first = {row: rewards[:4] for row, rewards in told.of_reward.items()}
    expected = {
        row: (rewards.count(1.0), rewards.count(0.0))
        for row, rewards in first.items()
        if any(reward is not None for reward in rewards)
    }
    assert told.of_belief == expected
    assert {sum(counts) for counts in expected.values()} == {1, 4}
    table = told.callback.record.read_stage("stage_1").to_pandas().set_index("index")
    for row in first:
        assert tuple(table.loc[row, ["right", "wrong"]]) == expected.get(row, (0, 0))
        assert np.isnan(table.loc[row, "success_rate"]) == (row % 5 == 0)


def test_a_stage_that_rolled_nothing_out_has_no_counts(tmp_path):
    trainer = cases.trainer(tmp_path)
    config = LearnAlignConfig.adaptive(**{**SCORED, "selector": "random"})
    callback = LearnAlignCallback(trainer, config)
    trainer.add_callback(callback)
    trainer.train()
    table = callback.record.read_stage("stage_1")
    assert table["right"].null_count == table["wrong"].null_count == len(table)
