"""What rows of datasets say: options, answers with aliases, conversations, and rows of which nothing can be made."""

import json
import shlex

import pytest
from datasets import Dataset, Features, Image, Value

from trl_learnalign.data.loading import as_prompts, load_questions


def asked(row, *others, **named):
    """The question of the first of some rows, and its solution."""
    made = as_prompts(Dataset.from_list([row, *others]), "", **named)
    return made[0]["prompt"][-1]["content"], made[0]["solution"]


def shown(*options):
    lines = [f"{letter}) {option}" for letter, option in zip("ABCDEFGHIJ", options, strict=False)]
    return "\n".join(["Which?", "", *lines, "", "Give the letter of the right option."])


# ---- Options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "bare"),
    [
        (["E. coli", "S. aureus"], ["E. coli", "S. aureus"]),
        (["J. S. Bach", "W. A. Mozart"], ["J. S. Bach", "W. A. Mozart"]),
        (["A. thaliana", "E. coli"], ["A. thaliana", "E. coli"]),  # the first has its own by chance
        (["A. five", "B. six"], ["five", "six"]),
        (["(A) five", "(B) six"], ["five", "six"]),
        (["a) five", "b) six"], ["five", "six"]),
        (["A.", "B."], ["A.", "B."]),
        (["B) five", "A) six"], ["B) five", "A) six"]),  # labels of others
        ({"text": ["C. five", "D. six"], "label": ["C", "D"]}, ["five", "six"]),
        ({"text": ["1.5", "2.5"], "label": ["1", "2"]}, ["1.5", "2.5"]),
        ("A) f(X) = 1 B) f(X) = 2", ["f(X) = 1", "f(X) = 2"]),
        ("A) vitamin (C) B) vitamin (D)", ["vitamin (C)", "vitamin (D)"]),
    ],
)
def test_a_label_is_taken_off_where_it_is_the_options_own_and_all_have_one(options, bare):
    question, _ = asked({"question": "Which?", "options": options, "answer": 0})
    assert question == shown(*bare)


def test_options_that_arrow_fills_up_are_none(tmp_path):
    rows = [
        {"question": "Which?", "options": {"A": "one", "B": "two"}, "answer": "B"},
        {"question": "Which?", "options": {"A": "one", "B": "two", "C": "three"}, "answer": "C"},
    ]
    path = tmp_path / "padded.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    made = as_prompts(load_questions(str(path)), "")
    texts = [prompt[0]["content"] for prompt in made["prompt"]]
    assert texts == [shown("one", "two"), shown("one", "two", "three")]
    assert made["solution"][:] == [r"\boxed{B}", r"\boxed{C}"]


@pytest.mark.parametrize(
    ("options", "answer", "letter"),
    [
        (["one", None, "three", "  "], 2, "B"),
        (["one", None, "three", ""], "three", "B"),
        ({"A": "one", "B": None, "C": "three"}, "C", "B"),
        ({"text": ["one", "", "three"], "label": ["A", "B", "C"]}, "C", "B"),
    ],
)
def test_missing_options_are_left_out_wherever_they_stand(options, answer, letter):
    row = {"question": "Which?", "options": options, "answer": answer}
    assert asked(row) == (shown("one", "three"), rf"\boxed{{{letter}}}")


def test_a_right_option_that_is_missing_is_no_answer():
    row = {"question": "Which?", "options": ["one", None, "three"], "answer": 1}
    with pytest.raises(ValueError, match="No row of the dataset has an answer"):
        asked(row)


def test_missing_options_of_gpqa_are_none():
    row = {"Question": "Which?", "Correct Answer": "one", "Incorrect Answer 1": "two"}
    row |= {"Incorrect Answer 2": None, "Incorrect Answer 3": " "}
    question, solution = asked(row)
    assert "None" not in question
    assert question in (shown("one", "two"), shown("two", "one"))
    assert f"{solution[-2]}) one" in question


def test_blanks_around_options_do_not_mark_the_right_one():
    row = {"question": "Which?", "options": ["one", " two", "three "], "answer": "B"}
    assert asked(row) == (shown("one", "two", "three"), r"\boxed{B}")


def test_an_open_question_may_stand_among_those_with_options():
    open_one = {"question": "How many?", "options": [], "answer": "9"}
    choice = {"question": "Which?", "options": ["one", "two"], "answer": "A"}
    assert asked(open_one, choice) == ("How many?", "9")


def test_options_for_which_there_are_no_letters():
    row = {"question": "Which?", "options": [str(number) for number in range(27)], "answer": "1"}
    with pytest.raises(
        ValueError, match=r"row 0 has 27 options, more than the 26 supported letters"
    ):
        asked(row)


# ---- Answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        {"answer": ["Paris", "paris", "Paris"]},
        {"answer": '["Paris", "paris"]'},
        {"golden_answers": ["Paris", "paris"]},
        {"reward_model": {"ground_truth": {"target": ["Paris", "paris"]}}},
        {"reward_model": json.dumps({"ground_truth": {"target": ["Paris", "paris"]}})},
        {"answer": {"value": "Paris", "aliases": ["paris"]}},
        {"answers": {"text": ["Paris", "paris"], "answer_start": [3, 9]}},
    ],
    ids=["list", "JSON", "golden", "verl", "verl's JSON", "TriviaQA", "SQuAD"],
)
def test_any_of_several_answers_is_right(answer):
    _, solution = asked({"question": "Where is the Louvre?", **answer})
    assert solution == [r"\boxed{Paris}", r"\boxed{paris}"]


def test_rows_of_one_and_of_several_answers_share_a_column():
    rows = [{"question": "1+1?", "answer": ["2"]}, {"question": "Sign?", "answer": ["Yes", "yes"]}]
    made = as_prompts(Dataset.from_list(rows), "")
    assert made["solution"][:] == [["2"], [r"\boxed{Yes}", r"\boxed{yes}"]]
    assert made["reference"][:] == ["2", "Yes"]


def test_the_parts_of_one_answer_are_one_answer():
    assert asked({"question": "Roots?", "final_answer": ["$-2$", "$3$"]})[1] == r"\boxed{-2, 3}"


# ---- Questions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "question"), [("3 and 4", "Add.\n\n3 and 4"), ("", "Add."), (None, "Add.")]
)
def test_what_an_instruction_is_about_is_part_of_the_question(given, question):
    row = {"instruction": "Add.", "input": given, "output": "7"}
    assert asked(row, {**row, "input": "x"}, answer_column="output") == (question, "7")


def test_an_input_that_is_the_answer_is_not_part_of_the_question():
    row = {"instruction": "Add 3 and 4.", "input": "7"}
    assert asked(row, answer_column="input")[0] == "Add 3 and 4."


def test_turns_of_sharegpt_have_their_roles():
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Take 2."},
        {"from": "gpt", "value": "Yes."},
        {"from": "human", "value": "Add 2."},
    ]
    row = {"conversations": turns, "answer": "4"}
    (made,) = as_prompts(Dataset.from_list([row]), "", question_column="conversations")
    assert made["prompt"] == [
        {"role": "user", "content": "Take 2."},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Add 2."},
    ]


USER = {"role": "user", "content": "1+1?"}


@pytest.mark.parametrize(
    ("question", "fault"),
    [
        (None, "row 1 has an empty question"),
        ("", "row 1 has an empty question"),
        (" \n", "row 1 has an empty question"),
        (["1+", "1?"], "row 1 has a list of texts as its question .* join them"),
        (7, "row 1 has a value of type int as its question .7.: a question is a text"),
        ({"text": "1+1?"}, "row 1 has an object as its question .*: a question is a text"),
        ([], "row 1 has no question: all turns"),
        ([{"role": "user", "content": " "}], "row 1 has no question: all turns"),
        ([{"role": "system", "content": "Be brief."}], "row 1 has no question: all turns"),
        (
            [{"content": "1+1?"}],
            "row 1 has the turn .* without a role: turns need the keys role and",
        ),
        (
            [{"from": "oracle", "value": "1+1?"}],
            "row 1 has a turn from the unknown speaker 'oracle': use one of human",
        ),
        ([{"role": "user", "content": None}], "row 1 has a turn of the user without text"),
        ([USER, {"role": "assistant", "content": "2"}], "row 1 ends with a turn of the assistant"),
    ],
)
def test_a_row_of_which_nothing_can_be_made_is_named(question, fault):
    class Rows(Dataset):
        """Rows as a column of mixed types would have them, which Arrow has not."""

        def iter(self, batch_size):
            yield {"question": ["2+2?", question], "answer": ["4", "2"]}

    rows = Dataset.from_list([{"question": "2+2?", "answer": "4"}] * 2)
    mixed = Rows(rows._data)
    with pytest.raises(ValueError, match=rf"1 of 2 rows cannot be used: row 1 \({fault}"):
        as_prompts(mixed)


@pytest.mark.parametrize("question", [None, "", 7, [["a", "b"]], {"text": "1+1?"}])
def test_a_column_of_which_nothing_can_be_made_is_refused(question):
    rows = [{"question": question, "answer": "2"}] * 3
    with pytest.raises(
        ValueError, match=r"3 of 3 rows cannot be used: rows 0, 1, 2 \(row 0 .*Fix them"
    ):
        as_prompts(Dataset.from_list(rows))


def test_a_dataset_of_such_rows_alone_is_not_read_to_its_end():
    data = Dataset.from_dict({"question": [""] * 2500, "answer": ["2"] * 2500})
    with pytest.raises(
        ValueError, match=r"1,000 of 2,500 rows .*reading stopped after 1,000 of them"
    ):
        as_prompts(data)


def test_a_dataset_without_rows():
    with pytest.raises(ValueError, match="has no rows"):
        as_prompts(Dataset.from_list([{"question": "1+1?", "answer": "2"}]).select([]))


# ---- Pictures -------------------------------------------------------------------------------------------------------

PICTURE = {"bytes": b"\x89PNG", "path": None}


@pytest.mark.parametrize(
    ("name", "feature", "cells"),
    [
        ("images", None, [["a.png"], None]),
        ("image", None, [None, "a.png"]),
        ("Image", None, ["", "a.png"]),
        ("image_url", None, [None, "https://example.org/a.png"]),
        ("decoded_image", None, [PICTURE, None]),
        ("image_2", None, [None, PICTURE]),
        ("figure", Image(), [PICTURE, None]),
        ("figures", [Image()], [[], [PICTURE]]),
    ],
)
def test_a_dataset_with_pictures_is_refused(name, feature, cells):
    features = Features({"problem": Value("string"), "answer": Value("string")})
    columns = {"problem": ["<image>Find x.", "1+1?"], "answer": ["3", "2"]}
    if feature is None:
        data = Dataset.from_dict({**columns, name: cells})
    else:
        data = Dataset.from_dict(
            {**columns, name: cells}, features=Features({**features, name: feature})
        )
    with pytest.raises(
        ValueError, match=rf"images in the columns '{name}', but questions are read as text.*Leave"
    ):
        as_prompts(data)


@pytest.mark.parametrize("cells", [[None, None], ["", None], [[], []]])
def test_a_column_of_pictures_that_is_empty_throughout_is_none(cells):
    rows = {"problem": ["2+2?", "1+1?"], "answer": ["4", "2"], "images": cells}
    assert as_prompts(Dataset.from_dict(rows))["solution"][:] == ["4", "2"]


def test_the_place_of_a_picture_without_the_picture_is_named():
    rows = {"problem": ["1+1?", "<image>Find x."], "answer": ["4", "2"]}
    for columns in ({}, {"images": [[], []]}):
        with pytest.raises(ValueError, match=r"row 1 \(row 1 has an image placeholder in its text"):
            as_prompts(Dataset.from_dict({**rows, **columns}))


def test_columns_about_pictures_are_no_pictures():
    rows = {
        "problem": ["2+2?"],
        "answer": ["4"],
        "image_id": [3],
        "imagery": ["a"],
        "has_image": [0],
    }
    assert as_prompts(Dataset.from_dict(rows))["solution"][:] == ["4"]


# ---- Columns that may be meant --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "meant"),
    [
        (
            {"id": "q7", "query": "What is 1+1?", "gold": "2", "source": "web"},
            {"question_column": "query", "answer_column": "gold"},
        ),
        (
            {"uid": 7, "gold label": "2", "level": 3, "user query": "What is 1+1?"},
            {"question_column": "user query", "answer_column": "gold label"},
        ),
        (
            {"idx": 7, "y": "2", "x": "What is 1+1 if both are counted?", "split": "train"},
            {"question_column": "x", "answer_column": "y"},
        ),
        (
            {
                "target": 2,
                "conversations": [{"from": "human", "value": "What is 1+1?"}],
                "source": "x",
            },
            {"question_column": "conversations", "answer_column": "target"},
        ),
        ({"id": 7, "question": "What is 1+1?", "wanted": "2"}, {"answer_column": "wanted"}),
    ],
)
def test_the_hint_names_the_columns_that_are_meant(row, meant):
    data = Dataset.from_list([row] * 3)
    with pytest.raises(ValueError, match="Name the columns on the command line") as raised:
        as_prompts(data)
    words = shlex.split(str(raised.value).split("e.g. ")[1].split(", or rename")[0])
    pairs = zip(words[::2], words[1::2], strict=True)
    given = {name.removeprefix("--"): column for name, column in pairs}
    assert given == meant
    assert len(as_prompts(data, **given)) == 3
