"""Recipes take reward functions of one's own."""

import cases
import pytest
import question_files
from trl.rewards import think_format_reward

from trl_learnalign import LearnAlignConfig
from trl_learnalign.cli.arguments import (
    RecipeArguments,
    given_settings,
    success_arguments,
    weight_arguments,
)
from trl_learnalign.cli.problems import check_weights, find_rewards, load_problems
from trl_learnalign.data.answers import accuracy_reward


def test_named_rewards_and_those_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "own_reward.py").write_text(
        "def short(completions, **_):\n    return [-float(len(each)) for each in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    short, accuracy, form = find_rewards(
        ["own_reward:short", "accuracy_reward", "think_format_reward"]
    )
    assert short(["ab"]) == [-2.0]
    assert (accuracy, form) == (accuracy_reward, think_format_reward)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "exact",
            ValueError,
            r"reward_funcs='exact': choose one of 'accuracy_reward', .*TRL's form",
        ),
        (
            "nowhere:f",
            ValueError,
            r"'nowhere:f': nowhere cannot be imported .*start from its folder",
        ),
        ("cases:absent", ValueError, r"reward_funcs='cases:absent': cases has no 'absent'"),
        ("cases:ROOT", TypeError, r"reward_funcs='cases:ROOT' is a \w*Path: name a function"),
    ],
)
def test_what_is_no_reward_is_named(name, error, message):
    with pytest.raises(error, match=message):
        find_rewards([name])


def test_a_recipes_problems_are_graded_by_the_named_rewards(tmp_path):
    question_files.write(tmp_path)
    recipe = RecipeArguments(dataset_name=str(tmp_path / "train.jsonl"))
    assert load_problems(recipe).rewards == [accuracy_reward, think_format_reward]
    recipe.reward_funcs = ["cases:accuracy_reward"]
    assert load_problems(recipe).rewards == [cases.accuracy_reward]
    generated = RecipeArguments(
        dataset_name="generated",
        train_samples=8,
        eval_samples=8,
        reward_funcs=["cases:length_reward"],
    )
    assert load_problems(generated).rewards == [cases.length_reward]


def test_answers_that_only_a_reward_of_ones_own_can_judge_are_taken(tmp_path):
    path = tmp_path / "proofs.jsonl"
    path.write_text(
        '{"question": "Show it.", "answer": "By induction on the number of vertices; the base case is clear."}\n'
        * 4
    )
    recipe = RecipeArguments(dataset_name=str(path), eval_samples=1)
    with pytest.raises(ValueError, match="no gradable answer"):
        load_problems(recipe)
    recipe.reward_funcs = ["cases:accuracy_reward"]
    assert len(load_problems(recipe).train) == 3


def test_weights_of_the_file_are_not_for_other_rewards(tmp_path, caplog):
    from trl import GRPOConfig

    path = tmp_path / "own.yaml"
    path.write_text("reward_weights: [2.0, 1.0]\n")

    def added(*arguments):
        kinds = (RecipeArguments, GRPOConfig)
        return weight_arguments(given_settings(kinds, ["--config", str(path), *arguments]))

    assert added() == []
    assert added("--reward_funcs", "a:b", "--reward_weights", "3") == []
    assert added("--reward_funcs", "a:b", "c:d") == []  # as many as there are weights
    assert caplog.records == []
    assert added("--reward_funcs", "a:b") == ["--reward_weights", "1"]
    assert (
        "reward_weights=[2.0, 1.0] of the file do not apply to a:b: each weight is 1" in caplog.text
    )


def test_the_first_of_ones_own_rewards_decides_success_unless_another_is_named(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("success_reward: accuracy_reward\n")

    def added(*arguments):
        kinds = (RecipeArguments, LearnAlignConfig)
        return success_arguments(given_settings(kinds, ["--config", str(path), *arguments]))

    assert added() == []
    assert added("--reward_funcs", "a:b", "c:d") == ["--success_reward", "b"]
    assert added("--reward_funcs", "a:b", "accuracy_reward") == []
    assert added("--reward_funcs", "a:b", "c:d", "--success_reward", "d") == []


def test_other_counts_of_weights_are_refused_before_a_model_is_loaded():
    check_weights(None, [accuracy_reward])
    check_weights([1.0], [accuracy_reward])
    with pytest.raises(
        ValueError,
        match=r"reward_weights=\[2.0, 1.0\] for 1 .*\(accuracy_reward\).*--reward_weights 1",
    ):
        check_weights([2.0, 1.0], [accuracy_reward])
