import json

import pytest
from datasets import Dataset
from trl.rewards import accuracy_reward, think_format_reward

from trl_learnalign.data import SYSTEM_PROMPT, as_prompts, final_answer, hold_out, is_path, load_questions

GSM8K = [
    {
        "question": "Tom has 1,000 apples and buys 200. How many?",
        "answer": "1,000 + 200 = <<1000+200=1200>>1,200\n#### 1,200",
    },
    {"question": "Half of 5?", "answer": "5 / 2 = 2.5\n#### 2.5"},
]


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        ("so 7 * 2 = 14\n#### 14", "14"),
        ("#### 1,234,567", "1234567"),
        (r"Thus $x = \boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{1} or rather \boxed{2}", "2"),
        ("(1, 2)", "(1, 2)"),
        (42, "42"),
        (None, ""),
        (r"unclosed \boxed{3", r"unclosed \boxed{3"),
    ],
)
def test_final_answers(written, answer):
    assert final_answer(written) == answer


def test_gsm8k_rows_become_prompts_that_trls_rewards_can_grade():
    prompts = as_prompts(Dataset.from_list(GSM8K))
    assert prompts.column_names == ["prompt", "solution", "reference"]
    assert prompts[0]["prompt"] == [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": GSM8K[0]["question"]},
    ]
    right = [[{"role": "assistant", "content": f"<think>sum</think> \\boxed{{{x}}}"}] for x in ("1200", "2.5")]
    wrong = [
        [{"role": "assistant", "content": "The answer is 1200"}],
        [{"role": "assistant", "content": "\\boxed{2}"}],
    ]
    assert accuracy_reward(right, solution=prompts["solution"][:]) == [1.0, 1.0]
    assert accuracy_reward(wrong, solution=prompts["solution"][:]) == [0.0, 0.0]
    assert think_format_reward(right) == [1.0, 1.0]


def test_math_and_dapo_columns():
    math = as_prompts(Dataset.from_list([{"problem": "1+1?", "solution": r"It is \boxed{2}.", "level": "1"}]), "")
    assert math[0] == {
        "prompt": [{"role": "user", "content": "1+1?"}],
        "solution": "2",
        "reference": r"It is \boxed{2}.",
    }
    dapo = as_prompts(
        Dataset.from_list([{"prompt": [{"role": "user", "content": "2+2?"}], "reward_model": {"ground_truth": "4"}}]),
        "",
    )
    assert dapo[0]["prompt"] == [{"role": "user", "content": "2+2?"}]
    assert dapo[0]["solution"] == "4"


@pytest.mark.parametrize(
    ("row", "question", "answer", "reference"),
    [
        (  # MATH
            {"problem": "1+1?", "level": "Level 1", "type": "Algebra", "solution": r"So \boxed{2}."},
            *("1+1?", "2", r"So \boxed{2}."),
        ),
        (  # MATH-500
            {"problem": "1+1?", "solution": r"So \boxed{2}.", "answer": "2", "subject": "Algebra", "level": 1}
            | {"unique_id": "test/algebra/1.json"},
            *("1+1?", "2", r"So \boxed{2}."),
        ),
        (  # DAPO-MATH-17K
            {"data_source": "math_dapo", "prompt": [{"content": "2+2?", "role": "user"}], "ability": "MATH"}
            | {
                "reward_model": {"ground_truth": "4", "style": "rule-lighteval/MATH_v2"},
                "extra_info": {"index": "9a"},
            },
            *("2+2?", "4", "4"),
        ),
        (  # its processed form
            {"prompt": "2+2?", "solution": "4", "data_source": "math_dapo", "ability": "MATH"}
            | {"source_prompt": [{"content": "Solve ... 2+2?", "role": "user"}]}
            | {
                "reward_model": {"ground_truth": "4", "style": "rule-lighteval/MATH_v2"},
                "extra_info": {"index": "9a"},
            },
            *("2+2?", "4", "4"),
        ),
    ],
    ids=["MATH", "MATH-500", "DAPO", "DAPO processed"],
)
def test_rows_of_the_papers_datasets(row, question, answer, reference):
    (made,) = as_prompts(Dataset.from_list([row]), "")
    assert made == {
        "prompt": [{"role": "user", "content": question}],
        "solution": answer,
        "reference": reference,
    }


def test_missing_columns_are_named():
    with pytest.raises(ValueError, match=r"columns \['text'\].*needs a question.*and an answer"):
        as_prompts(Dataset.from_dict({"text": ["?"]}))


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "json"])
def test_local_files(tmp_path, ending):
    path = tmp_path / f"train.{ending}"
    data = Dataset.from_list(GSM8K)
    if ending == "parquet":
        data.to_parquet(path)
    elif ending == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in GSM8K))
    else:
        path.write_text(json.dumps(GSM8K))
    assert load_questions(str(path)).to_list() == GSM8K
    assert len(load_questions(str(path), split="train[:1]")) == 1


def test_a_saved_folder(tmp_path):
    Dataset.from_list(GSM8K).save_to_disk(tmp_path / "pool")
    assert load_questions(str(tmp_path / "pool")).to_list() == GSM8K


def test_paths_that_are_not_there_or_not_known(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train.jsonl does not exist.*hub id"):
        load_questions(str(tmp_path / "train.jsonl"))
    (tmp_path / "train.txt").write_text("")
    with pytest.raises(ValueError, match=r"files end in .jsonl"):
        load_questions(str(tmp_path / "train.txt"))
    assert not is_path("openai/gsm8k")
    assert is_path("data/train.jsonl")


def test_held_out_rows_are_disjoint_and_depend_on_the_seed():
    data = Dataset.from_dict({"n": list(range(50))})
    rest, held = hold_out(data, 10, seed=1)
    assert sorted(rest["n"][:] + held["n"][:]) == list(range(50))
    assert held["n"][:] == hold_out(data, 10, seed=1)[1]["n"][:]
    assert held["n"][:] != hold_out(data, 10, seed=2)[1]["n"][:]
