"""What a prompt is, in every form that TRL trains on."""

import glob

import cases
import pandas as pd
import pytest
from datasets import Dataset

from trl_learnalign import LearnAlignCallback, LearnAlignConfig, rng
from trl_learnalign.data.prompts import (
    columns_of,
    dataset_digest,
    message_text,
    prompt_contents,
    prompt_id,
    prompt_question,
    prompt_text,
    prompts_of,
)
from trl_learnalign.preflight.checks import check_dataset
from trl_learnalign.training.phases import StageSelection

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
WITH_A_CALL = [
    {"role": "system", "content": "be brief"},
    {
        "role": "user",
        "content": [{"type": "text", "text": "1+1?"}, {"type": "text", "text": "now"}],
    },
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "2"},
]


def config(**options):
    return LearnAlignConfig(
        **{"warmup_samples": 2, "stages": [4], "feature_dim": 64, "shard_size": 4, **options}
    )


def train(folder, data, settings=None, rewards=cases.accuracy_reward, **options):
    trainer = cases.trainer(folder, data=data, rewards=rewards, **options)
    callback = LearnAlignCallback(trainer, settings or config())
    trainer.add_callback(callback)
    trainer.train()
    return trainer, callback


# ---- What a prompt says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("a", "a"),
        ("", ""),
        (None, None),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "a b"),
        ([{"type": "text", "text": None}, {"text": "b"}, {"type": None, "text": "c"}], " b c"),
        ([], ""),
        ([{"type": "image"}], None),
        (["a"], None),
        (7, None),
    ],
)
def test_the_text_of_a_message(content, text):
    assert message_text({"role": "user", "content": content}) == text


def test_a_turn_without_text_is_empty_everywhere():
    assert prompt_text(WITH_A_CALL) == "system: be brief\nuser: 1+1? now\nassistant: \ntool: 2"
    assert prompt_contents(WITH_A_CALL) == ["be brief", "1+1? now", "", "2"]
    assert prompt_question(WITH_A_CALL) == "1+1? now\n\n2"
    assert prompt_text("1+1?") == prompt_question("1+1?") == "1+1?"
    assert (
        prompt_text([{"role": "user", "content": "a"}, {"role": "assistant"}])
        == "user: a\nassistant: "
    )


def test_ids_are_those_of_earlier_versions():
    """They are in the records, fingerprints and reward histories of earlier runs."""
    conversation = [{"role": "user", "content": "1+1? é ☃"}]
    assert [prompt_id("1+1?"), prompt_id(conversation), rng.digest([3, 1, 2])] == [
        *("c82410e2818e2496", "b70794f2b54b51f0", "6d867a3c560fc8cc")
    ]
    assert rng.digest({"b": 1, "a": 2}) == rng.digest({"a": 2, "b": 1})
    assert dataset_digest(cases.dataset(5)) == "3e8b5c80b2c2cb2e"


def test_a_run_on_conversations_with_a_turn_without_text(tmp_path):
    # Rows differ in which turns have text.
    prompts = [
        [
            {"role": "user", "content": f"{i}+1?"},
            {"role": "assistant", "content": None if i % 2 else "wait"},
            {"role": "user", "content": "now?"},
        ]
        for i in range(8)
    ]
    template = "{% for message in messages %}{{ message['content'] or '' }}{% endfor %}="
    data = Dataset.from_dict({"prompt": prompts, "solution": ["1"] * 8})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cases, "CHAT_TEMPLATE", template)
        train(tmp_path, data)
    table = pd.read_parquet(tmp_path / "_learnalign" / "stage_1.parquet")
    assert table["prompt"][1] == "user: 1+1?\nassistant: \nuser: now?"


# ---- Formats and transforms -----------------------------------------------------------------------------------------


def upper(batch):
    """Reads another column than `prompt`, and makes prompts that the table does not hold."""
    return {
        "prompt": [
            f"{text}{solution}"
            for text, solution in zip(batch["question"], batch["solution"], strict=True)
        ],
        "solution": batch["solution"],
    }


def transformed(size=12):
    return cases.dataset(size).rename_column("prompt", "question").with_transform(upper)


@pytest.mark.parametrize("kind", ["pandas", "torch", "numpy", "transform"])
def test_a_dataset_with_a_format_trains_as_in_trl_alone(tmp_path, kind):
    def data():
        return transformed() if kind == "transform" else cases.dataset().with_format(kind)

    cases.trainer(tmp_path / "alone", data=data(), max_steps=1).train()
    _, callback = train(tmp_path / "ours", data(), config(selector=["learnalign"]))
    table = pd.read_parquet(tmp_path / "ours" / "_learnalign" / "stage_1.parquet")
    plain = (
        [row["prompt"] for row in transformed()]
        if kind == "transform"
        else cases.dataset()["prompt"][:]
    )
    assert table["prompt"].tolist() == plain
    assert table["prompt_id"].tolist() == [prompt_id(prompt) for prompt in plain]
    history = pd.read_parquet(tmp_path / "ours" / "_learnalign" / "reward_history.parquet")
    assert history["prompt_id"].tolist() == [prompt_id(plain[row]) for row in history["index"]]
    if kind != "transform":
        _, without = train(tmp_path / "plain", cases.dataset(), config(selector=["learnalign"]))
        assert callback.selected("stage_1").tolist() == without.selected("stage_1").tolist()
        assert dataset_digest(data()) == dataset_digest(cases.dataset())


def test_a_transform_counts_by_the_prompts_that_it_makes():
    data = transformed()
    assert columns_of(data) == ["prompt", "solution"]
    check_dataset(data)
    assert dataset_digest(data) == dataset_digest(transformed())
    plain = cases.dataset().rename_column("prompt", "question")
    other = plain.with_transform(
        lambda batch: {"prompt": [text + "!" for text in batch["question"]]}
    )
    assert len({dataset_digest(data), dataset_digest(other), dataset_digest(plain)}) == 3
    assert list(prompts_of(other, [3, 1])) == ["abcd3?!", "ab1?!"]
    with pytest.raises(ValueError, match=r"no 'prompt' column, only \['question'\]"):
        check_dataset(plain.with_transform(lambda batch: {"question": batch["question"]}))


def test_a_transform_that_changes_its_prompts_is_refused():
    count = iter(range(99))
    data = cases.dataset().with_transform(
        lambda batch: {"prompt": [f"{next(count)}?"] * len(batch["prompt"])}
    )
    with pytest.raises(
        ValueError,
        match=r"different prompts each time it is read.*dataset.map instead of with_transform",
    ):
        check_dataset(data)


# ---- As in training -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remove", [True, False])
def test_rewards_see_the_columns_in_scoring_that_they_see_in_training(tmp_path, remove):
    seen = {True: set(), False: set()}
    callback = None

    def accuracy_reward(completions, **columns):
        assert "trainer_state" in columns
        scoring = callback is not None and callback.is_scoring
        seen[scoring].add(tuple(sorted(columns)))
        return cases.accuracy_reward(completions)

    trainer = cases.trainer(tmp_path, rewards=accuracy_reward, remove_unused_columns=remove)
    callback = LearnAlignCallback(trainer, config())
    trainer.add_callback(callback)
    trainer.train()
    assert len(seen[True]) == 1
    assert seen[True] == seen[False]
    assert ("solution" in next(iter(seen[True]))) is not remove


def test_scoring_leaves_the_tables_of_completions_alone(tmp_path, monkeypatch):
    """TRL writes one at each log; scoring logs at the step of a boundary."""
    printed = {}

    def go(name):
        printed[name] = []
        monkeypatch.setattr(
            "trl.trainer.grpo_trainer.print_prompt_completions_sample",
            lambda prompts, *rest, **_: printed[name].append((list(prompts), rest[3])),
        )
        return train(tmp_path / name, cases.dataset(), config(stages=[4, 4]), log_completions=True)[
            1
        ]

    callback = go("with")
    pools = {phase.name: callback.selected(phase.name) for phase in callback.plan.stages}
    monkeypatch.setattr(StageSelection, "select", lambda self, phase, *_: pools[phase.name])
    go("without")
    paths = sorted(glob.glob(str(tmp_path / "with" / "completions" / "*.parquet")))
    steps = [path[-13:-8] for path in paths]
    assert steps == [f"{step:05d}" for step in range(1, callback.plan.total_steps + 1)]
    for step in steps:
        one, other = (
            pd.read_parquet(tmp_path / name / "completions" / f"completions_{step}.parquet")
            for name in ("with", "without")
        )
        assert len(one) == 8
        pd.testing.assert_frame_equal(one, other)
    assert printed["with"] == printed["without"]
