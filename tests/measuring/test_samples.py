import json

import cases
import numpy as np
import pandas as pd
import pytest
import torch

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.distributed import Ranks
from trl_learnalign.measuring.generation import MAX_CHARACTERS, RolloutGroup, clipped, kept_texts
from trl_learnalign.pool import TEXTS, RolloutTexts
from trl_learnalign.ranking import representative_positions
from trl_learnalign.records.store import ShardStore


def group(successes, completions):
    width = max(map(len, completions))
    ids = torch.tensor([[ord(c) for c in text] + [0] * (width - len(text)) for text in completions])
    inputs = {"completion_ids": ids, "completion_mask": (ids > 0).long()}
    lengths = torch.tensor([len(text) for text in completions])
    return RolloutGroup(
        0, inputs, torch.zeros(len(completions), 1), torch.tensor(successes), lengths
    )


def decode(ids):
    return "".join(map(chr, ids))


def kept(groups, count):
    return json.loads(bytes(kept_texts(groups, count, decode).tolist()))


def test_right_and_wrong_rollouts_are_kept_in_turn():
    of = group([0.0, 0.0, 1.0, float("nan"), 1.0], ["a", "b", "ccc", "d", "e"])
    assert [sample["text"] for sample in kept([of], 3)[0]] == ["ccc", "a", "e"]
    assert kept([of], 5)[0][-1] == {"text": "d", "right": None, "tokens": 1}
    assert kept([of], 2)[0][0] == {"text": "ccc", "right": True, "tokens": 3}
    assert [sample["text"] for sample in kept([group([1.0, 1.0], ["x", "y"])], 9)[0]] == ["x", "y"]


def test_long_texts_keep_beginning_and_end():
    text = "b" * 5000 + "the answer is 42"
    short = clipped(text)
    assert short.startswith("b" * 3000 + "\n… 1,016 characters left out …\n")
    assert short.endswith("the answer is 42")
    assert clipped("x" * MAX_CHARACTERS) == "x" * MAX_CHARACTERS


def test_texts_come_back_from_the_shards_that_hold_them(tmp_path):
    store = ShardStore(tmp_path, {}, shards=3)
    for number in (0, 2):
        groups = [group([1.0], [f"shard {number} prompt {i}"]) for i in range(4)]
        store.write(number, {TEXTS: kept_texts(groups, 1, decode)})
    store.write(1, {"features": torch.zeros(1)})  # measured with keep_rollout_texts=0
    texts = RolloutTexts(store, (0, 1, 2), 4, Ranks()).of([9, 2, 5])
    assert {position: samples[0]["text"] for position, samples in texts.items()} == {
        9: "shard 2 prompt 1",
        2: "shard 0 prompt 2",
    }


def test_telling_positions():
    rate = np.array([0.5, 1.0, 0.0, 0.25, 1.0, 0.75, np.nan])
    order = [3, 0, 5, 1, 4, 2, 6]
    found = representative_positions(order, (rate > 0) & (rate < 1), rate, best=2, extremes=1)
    assert found == {"top": [3, 0], "bottom": [5], "always right": [1], "always wrong": [2]}
    assert representative_positions([0, 1], [True, True], [np.nan, np.nan]) == {"top": [0, 1]}


@pytest.mark.parametrize("keep", [0, 3])
def test_examples_in_the_record_are_rollouts_of_their_prompts(tmp_path, keep):
    trainer = cases.trainer(tmp_path)
    settings = LearnAlignConfig(
        warmup_samples=0,
        stages=[6],
        shard_size=4,
        feature_dim=64,
        keep_rollout_texts=keep,
        reselect="all",
    )
    trainer.add_callback(LearnAlignCallback(trainer, settings))
    trainer.train()
    examples = json.loads((tmp_path / "_learnalign" / "stage_1_examples.json").read_text())[
        "examples"
    ]
    table = pd.read_parquet(tmp_path / "_learnalign" / "stage_1.parquet").set_index("index")
    assert {"top", "bottom"} <= {example["group"] for example in examples}
    assert table.loc[examples[0]["index"], "rank"] == 1
    for example in examples:
        assert len(example["rollouts"]) == keep
        for rollout in example["rollouts"]:
            # The reward of the tests is a coin that the text throws.
            assert rollout["right"] == bool(cases.accuracy_reward([rollout["text"]])[0])
    logged = json.loads((tmp_path / "_learnalign" / "log_history.json").read_text())
    assert [entry["step"] for entry in logged if "reward" in entry] == [1, 2, 3]


def test_kept_rollouts_do_not_change_the_selection(tmp_path):
    pools = []
    for keep in (0, 2):
        trainer = cases.trainer(tmp_path / str(keep), policy=cases.model())
        settings = LearnAlignConfig(
            warmup_samples=4, stages=[6], feature_dim=64, keep_rollout_texts=keep
        )
        callback = LearnAlignCallback(trainer, settings)
        trainer.add_callback(callback)
        trainer.train()
        pools.append(callback.selected("stage_1").tolist())
    assert pools[0] == pools[1]
