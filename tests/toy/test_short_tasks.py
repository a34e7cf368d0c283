"""The short tasks for pretrained models: what a pool holds, that splits are apart, and what earns a reward."""

from collections import Counter

import pytest

pytest.importorskip("reasoning_gym")

from trl_learnalign.toy.short_tasks import (
    END,
    SHORT_FAMILIES,
    SPLITS,
    build_short_pool,
    short_answer_reward,
    short_questions,
)


def parts(prompt, end=END):
    """Examples and question of a prompt, read as a model reads it."""
    *examples, question = prompt.split(f"{end}\n")
    assert question.endswith(" ->")
    return [tuple(example.split(" -> ")) for example in examples], question.removesuffix(" ->")


@pytest.fixture(scope="module")
def pools():
    return {split: list(build_short_pool(300, 1, split)) for split in SPLITS}


def test_no_question_of_another_split_is_seen_in_training_not_even_as_an_example(pools):
    seen = set()
    for row in pools["train"]:
        examples, question = parts(row["prompt"])
        seen |= {
            (row["family"], text) for text in (question, *(example for example, _ in examples))
        }
    for split in ("dev", "heldout"):
        asked = {(row["family"], parts(row["prompt"])[1]) for row in pools[split]}
        assert asked
        assert not asked & seen
    dev, held_out = (
        {(row["family"], parts(row["prompt"])[1]) for row in pools[split]}
        for split in ("dev", "heldout")
    )
    assert not dev & held_out


def test_examples_and_answers_follow_the_rule_of_their_family(pools):
    rules = {
        "copy_number": lambda text: text,
        "sum": lambda text: str(eval(text)),
        "product": lambda text: str(eval(text)),
        "large_product": lambda text: str(eval(text)),
        "larger": lambda text: str(max(map(int, text.split(", ")))),
        "next_number": lambda text: str(int(text) + 1),
        "last_word": lambda text: text.split()[-1],
        "backward": lambda text: text[::-1],
    }
    for row in [row for rows in pools.values() for row in rows]:
        examples, question = parts(row["prompt"])
        assert len(examples) == SHORT_FAMILIES[row["family"]].examples
        assert question not in dict(examples), "the answer would stand in the prompt"
        if row["family"] in rules:
            for text, answer in [*examples, (question, row["answer"])]:
                assert answer == rules[row["family"]](text)


def test_capitals_of_several_words_are_written_as_words():
    capitals = {
        name: city for split in SPLITS for name, city in short_questions("capital", split).items()
    }
    assert capitals["India"] == "New Delhi"
    assert capitals["France"] == "Paris"
    assert not any("_" in city for city in capitals.values())


def test_plurals_follow_the_spelling():
    plurals = {
        word: text for split in SPLITS for word, text in short_questions("plural", split).items()
    }
    expected = {
        "dog": "dogs",
        "box": "boxes",
        "baby": "babies",
        "key": "keys",
        "branch": "branches",
    }
    assert {word: plurals[word] for word in expected} == expected
    assert not {"mouse", "child", "milk", "potato"} & set(plurals)


def test_a_pool_has_different_prompts_in_the_proportions_of_the_weights():
    pool = build_short_pool(1000)
    assert len(set(pool["prompt"])) == len(pool) == 1000
    assert Counter(pool["family"]) == {
        name: 10 * family.weight for name, family in SHORT_FAMILIES.items()
    }


def test_two_thirds_can_be_learned_and_the_rest_is_known_or_hopeless():
    groups = Counter(build_short_pool(1000)["group"])
    assert groups == {"easy": 150, "learnable": 630, "hopeless": 220}


def test_the_seed_alone_decides_the_pool():
    assert build_short_pool(60, 3).to_list() == build_short_pool(60, 3).to_list()
    assert build_short_pool(60, 3)["prompt"] != build_short_pool(60, 4)["prompt"]


def test_examples_end_with_the_end_token_of_the_model_that_reads_them():
    for row in build_short_pool(40, end="</s>"):
        examples, _ = parts(row["prompt"], "</s>")
        assert examples
        assert END not in row["prompt"]


def test_only_the_answer_alone_earns_the_reward():
    completions = [" 13", "13", " 13\n14", "13.", " 1", "", " The answer is 13"]
    assert short_answer_reward(completions, ["13"] * 7) == [1, 1, 0, 0, 0, 0, 0]
    conversation = [{"role": "assistant", "content": " New Delhi"}]
    assert short_answer_reward([conversation], ["New Delhi"]) == [1]


def test_an_unknown_split_and_a_pool_that_is_too_small_are_refused():
    with pytest.raises(
        ValueError, match=r"unknown split 'test': choose one of 'train', 'dev', 'heldout'"
    ):
        build_short_pool(100, split="test")
    with pytest.raises(
        ValueError, match=r"size=19: a pool of ten families needs at least 20 prompts"
    ):
        build_short_pool(19)
