import gzip
import json
import shlex

import pytest
from datasets import Dataset, DatasetDict
from trl.rewards import accuracy_reward, think_format_reward

from trl_learnalign.data.answers import final_answer
from trl_learnalign.data.loading import SYSTEM_PROMPT, as_prompts, hold_out, is_path, load_questions

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
    right = [
        [{"role": "assistant", "content": f"<think>sum</think> \\boxed{{{x}}}"}]
        for x in ("1200", "2.5")
    ]
    wrong = [
        [{"role": "assistant", "content": "The answer is 1200"}],
        [{"role": "assistant", "content": "\\boxed{2}"}],
    ]
    assert accuracy_reward(right, solution=prompts["solution"][:]) == [1.0, 1.0]
    assert accuracy_reward(wrong, solution=prompts["solution"][:]) == [0.0, 0.0]
    assert think_format_reward(right) == [1.0, 1.0]


def test_math_and_dapo_columns():
    math = as_prompts(
        Dataset.from_list([{"problem": "1+1?", "solution": r"It is \boxed{2}.", "level": "1"}]), ""
    )
    assert math[0] == {
        "prompt": [{"role": "user", "content": "1+1?"}],
        "solution": "2",
        "reference": r"It is \boxed{2}.",
    }
    dapo = as_prompts(
        Dataset.from_list(
            [
                {
                    "prompt": [{"role": "user", "content": "2+2?"}],
                    "reward_model": {"ground_truth": "4"},
                }
            ]
        ),
        "",
    )
    assert dapo[0]["prompt"] == [{"role": "user", "content": "2+2?"}]
    assert dapo[0]["solution"] == "4"


@pytest.mark.parametrize(
    ("row", "question", "answer", "reference"),
    [
        (  # MATH
            {
                "problem": "1+1?",
                "level": "Level 1",
                "type": "Algebra",
                "solution": r"So \boxed{2}.",
            },
            *("1+1?", "2", r"So \boxed{2}."),
        ),
        (  # MATH-500
            {
                "problem": "1+1?",
                "solution": r"So \boxed{2}.",
                "answer": "2",
                "subject": "Algebra",
                "level": 1,
            }
            | {"unique_id": "test/algebra/1.json"},
            *("1+1?", "2", r"So \boxed{2}."),
        ),
        (  # DAPO-MATH-17K
            {
                "data_source": "math_dapo",
                "prompt": [{"content": "2+2?", "role": "user"}],
                "ability": "MATH",
            }
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


@pytest.mark.parametrize(
    ("row", "question", "solution"),
    [
        ({"prompt": "2+2?", "reward_model": '{"ground_truth": "4", "style": "rule"}'}, "2+2?", "4"),
        ({"prompt": "2+2?", "reward_model": "{'ground_truth': '4'}"}, "2+2?", "4"),
        (
            {"prompt": "2+2?", "reward_model": {"ground_truth": '["\\\\frac12"]'}},
            "2+2?",
            r"\boxed{\frac12}",
        ),
        ({"prompt": "2+2?", "reward_model": {"style": "model"}, "answer": "4"}, "2+2?", "4"),
        ({"prompt": "2+2?", "reward_model": None, "answer": 4}, "2+2?", "4"),
        ({"prompt": '[{"role": "user", "content": "2+2?"}]', "answer": 4.0}, "2+2?", "4.0"),
        (
            {"question": "Roots?", "final_answer": ["$-2$", "$3$"], "solution": ["Factor it."]},
            "Roots?",
            r"\boxed{-2, 3}",
        ),
        ({"question": "Range?", "answer": "[2, 7]"}, "Range?", r"\boxed{[2, 7]}"),
        (
            {"question": "How many?", "body": "Seven apples and two.", "answer": "9 (apples)"},
            "Seven apples and two.\nHow many?",
            "9",
        ),
        (
            {"Body": "Seven and two.", "Question": "Sum?", "Answer": 9.0},
            "Seven and two.\nSum?",
            "9.0",
        ),
        ({"question": "2+2?", "answer": "It is even, so 4.\nThe answer is: 4."}, "2+2?", "4"),
        ({"problem": "2+2?", "solution": r"Hence $\boxed 4$."}, "2+2?", "4"),
    ],
)
def test_other_forms_of_questions_and_answers(row, question, solution):
    (made,) = as_prompts(Dataset.from_list([row]), "")
    assert made["prompt"] == [{"role": "user", "content": question}]
    assert made["solution"] == solution


CHOICES = "2+2?\n\nA) 3\nB) 4\nC) 5\n\nGive the letter of the right option."


@pytest.mark.parametrize(
    "row",
    [
        {"question": "2+2?", "choices": ["3", "4", "5"], "answer": 1},  # MMLU
        {
            "question": "2+2?",
            "options": ["3", "4", "5"],
            "answer": "B",
            "answer_index": 1,
        },  # MMLU-Pro
        {
            "question": "2+2?",
            "options": ["A)3", "B)4", "C)5"],
            "rationale": "",
            "correct": "B",
        },  # AQuA
        {
            "question": "2+2?",
            "choices": {"text": ["3", "4", "5"], "label": ["1", "2", "3"]},
            "answerKey": "2",
        },  # ARC
        {"question": "2+2?", "options": "A) 3 B) 4 C) 5", "Answer": "B"},  # SAT
        {"question": "2+2?", "choices": ["3", "4", "5"], "answer": "4"},
        {
            "question": "2+2?",
            "options": {"A": "3", "B": "4", "C": "5"},
            "label": "B",
            "answer": None,
        },  # AGIEval
    ],
    ids=["MMLU", "MMLU-Pro", "AQuA", "ARC", "SAT", "text", "AGIEval"],
)
def test_multiple_choice_asks_for_the_letter(row):
    (made,) = as_prompts(Dataset.from_list([row]), "")
    assert made["prompt"] == [{"role": "user", "content": CHOICES}]
    assert made["solution"] == r"\boxed{B}"


def test_gpqa_has_its_options_in_an_order_that_says_nothing():
    rows = [
        {"Question": f"{n}+1?", "Correct Answer": f"{n + 1}\n"}
        | {f"Incorrect Answer {i}": str(n - i) for i in (1, 2, 3)}
        for n in range(40)
    ]
    made = as_prompts(Dataset.from_list(rows), "")
    assert made["solution"][:] == as_prompts(Dataset.from_list(rows), "")["solution"][:]
    for number, row in enumerate(made):
        assert f"{row['solution'][-2]}) {number + 1}\n" in row["prompt"][0]["content"]
    assert set(made["solution"]) == {rf"\boxed{{{letter}}}" for letter in "ABCD"}


DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\nRemember to put your answer on its "
    'own line after "Answer:".'
)
VERL = '{} Let\'s think step by step and output the final answer after "####".'


@pytest.mark.parametrize("template", [DAPO, VERL], ids=["DAPO-MATH-17K", "verl's GSM8K"])
def test_the_answer_is_asked_for_in_one_place(template):
    question = "In triangle $ABC$, find $x$.\n\nGive it exactly."
    row = {
        "prompt": [{"role": "user", "content": template.format(question)}],
        "reward_model": {"ground_truth": "34"},
    }
    (made,) = as_prompts(Dataset.from_list([row]))
    assert made["prompt"] == [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": question},
    ]


def test_conversations_keep_their_turns():
    turns = [
        {"role": "system", "content": "Answer after ####."},
        *({"role": "user", "content": "Take 2."}, {"role": "assistant", "content": "Yes."}),
        {"role": "user", "content": "Add 2."},
    ]
    (made,) = as_prompts(Dataset.from_list([{"prompt": turns, "answer": "4"}]))
    assert made["prompt"] == [{"role": "system", "content": SYSTEM_PROMPT}, *turns[1:]]


def test_missing_columns_are_named_with_what_to_write_on_the_command_line():
    with pytest.raises(ValueError, match=r"columns \['text'\].*needs a question.*and an answer"):
        as_prompts(Dataset.from_dict({"text": ["?"]}))
    data = Dataset.from_dict({"The input": ["2+2?"], "target": ["4"]})
    with pytest.raises(
        ValueError, match=r"--question_column 'The input' --answer_column target"
    ) as raised:
        as_prompts(data)
    words = shlex.split(str(raised.value).split("e.g. ")[1].split(", or rename")[0])
    given = dict(zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True))
    assert as_prompts(data, "", **given)["solution"][:] == ["4"]
    with pytest.raises(
        ValueError,
        match=r"answer_column='x' is not a column of the dataset, which has \['The input",
    ):
        as_prompts(data, answer_column="x")


@pytest.mark.parametrize(
    "column", ["test_list", "canonical_solution", "input_output", "public_tests"]
)
def test_datasets_of_programs_are_refused(column):
    row = {"prompt": "Sort a list.", "solution": "sorted", column: "assert f([2, 1]) == [1, 2]"}
    with pytest.raises(
        ValueError, match=rf"{column} contain programs or unit tests.*--answer_column NAME"
    ):
        as_prompts(Dataset.from_list([row]))


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "json", "jsonl.gz"])
def test_local_files(tmp_path, ending):
    path = tmp_path / f"train.{ending}"
    data = Dataset.from_list(GSM8K)
    if ending == "parquet":
        data.to_parquet(path)
    elif ending == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in GSM8K))
    elif ending == "jsonl.gz":
        path.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in GSM8K).encode()))
    else:
        path.write_text(json.dumps(GSM8K))
    assert load_questions(str(path)).to_list() == GSM8K
    assert len(load_questions(str(path), split="train[:1]")) == 1


def test_a_saved_folder(tmp_path):
    Dataset.from_list(GSM8K).save_to_disk(tmp_path / "pool")
    assert load_questions(str(tmp_path / "pool")).to_list() == GSM8K
    assert load_questions(str(tmp_path / "pool"), split="train[1:]").to_list() == GSM8K[1:]


def test_a_saved_folder_of_splits(tmp_path):
    data = Dataset.from_list(GSM8K)
    folder = str(tmp_path / "both")
    DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(folder)
    assert load_questions(folder).to_list() == GSM8K
    assert load_questions(folder, split="train[:1]").to_list() == GSM8K[:1]
    assert load_questions(folder, split="test").to_list() == GSM8K[1:]
    with pytest.raises(
        ValueError, match=r"has no split 'dev', only train, test: .*--dataset_train_split train"
    ):
        load_questions(folder, split="dev")
    DatasetDict({"validation": data}).save_to_disk(tmp_path / "one")
    assert load_questions(str(tmp_path / "one")).to_list() == GSM8K


def test_a_folder_of_files(tmp_path):
    for number, row in enumerate(GSM8K):
        Dataset.from_list([row]).to_parquet(
            tmp_path / "parts" / "data" / f"train-0000{number}-of-00002.parquet"
        )
    assert load_questions(str(tmp_path / "parts")).to_list() == GSM8K
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty cannot be read as a dataset"):
        load_questions(str(tmp_path / "empty"))


def test_paths_that_are_not_there_or_not_known(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train.jsonl does not exist.*hub id"):
        load_questions(str(tmp_path / "train.jsonl"))
    (tmp_path / "train.txt").write_text("")
    with pytest.raises(ValueError, match=r"has an unsupported ending: .* one of .jsonl"):
        load_questions(str(tmp_path / "train.txt"))
    assert not is_path("openai/gsm8k")
    assert is_path("data/train.jsonl")


def test_held_out_rows_are_disjoint_and_depend_on_the_seed():
    data = Dataset.from_dict({"n": list(range(50))})
    rest, held = hold_out(data, 10, seed=1)
    assert sorted(rest["n"][:] + held["n"][:]) == list(range(50))
    assert held["n"][:] == hold_out(data, 10, seed=1)[1]["n"][:]
    assert held["n"][:] != hold_out(data, 10, seed=2)[1]["n"][:]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"question": "1?"}\n\nnull\n'),
        ("a.jsonl.gz", gzip.compress(b'{"question": "1?"}\nnull', mtime=0)),
        ("a.json", b'[{"question": "1?"}, null]'),
    ],
)
def test_a_row_of_a_file_that_is_null_is_named(tmp_path, name, content):
    """Pyarrow would end the process."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"row 1 is null; it must be an object"):
        load_questions(str(tmp_path / name))
    with pytest.raises(ValueError, match=r"row 1 is null; it must be an object"):
        load_questions(str(tmp_path))
