import json

import cases
import numpy as np
import pandas as pd
import pytest
from datasets import Dataset

from trl_learnalign.history import RewardHistory, read_history, write_history
from trl_learnalign.records import prompt_id

RATES = np.array([[0.0, 0.5, 1.0], [0.25, np.nan, 0.75], [np.nan, np.nan, 0.5]])
IDS = ["aa", "bb", "cc"]


def same(left, right):
    np.testing.assert_array_equal(left, right)
    return True


@pytest.mark.parametrize("ending", ["parquet", "json"])
def test_histories_come_back_as_they_were(tmp_path, ending):
    path = tmp_path / f"history.{ending}"
    write_history(path, RewardHistory(RATES, np.array([4, 7, 2]), IDS))
    found = read_history(path)
    assert same(found.rates, RATES)
    assert found.indices.tolist() == [4, 7, 2]
    assert found.prompt_ids == (IDS if ending == "parquet" else None)


def test_the_parquet_form_is_one_row_per_prompt_and_pass(tmp_path):
    write_history(tmp_path / "history.parquet", RewardHistory(RATES[:2], np.array([4, 7]), IDS[:2]))
    table = pd.read_parquet(tmp_path / "history.parquet")
    assert list(table.columns) == ["prompt_id", "index", "pass", "success_rate"]
    assert table["pass"].tolist() == [0, 1, 2, 0, 1, 2]
    assert table["index"].tolist() == [4, 4, 4, 7, 7, 7]
    assert table["success_rate"].isna().tolist() == [False, False, False, False, True, False]


def test_the_layout_of_one_shot_rlvr(tmp_path):
    path = tmp_path / "acc_step_500.json"
    path.write_text(json.dumps({"0": [0.125, 0.5], "12": [1.0, None, 0.75]}))
    found = read_history(path)
    assert found.indices.tolist() == [0, 12]
    assert same(found.rates, [[0.125, 0.5, np.nan], [1.0, np.nan, 0.75]])


def test_several_values_of_a_pass_are_averaged(tmp_path):
    """A pass that wrapped around, in any order of rows, with passes that count from anywhere."""
    frame = pd.DataFrame({"index": [3, 3, 5, 3], "pass": [9, 9, 9, 4], "success_rate": [0.0, 0.5, 1.0, 0.75]})
    frame.to_parquet(tmp_path / "history.parquet")
    found = read_history(tmp_path / "history.parquet")
    assert found.indices.tolist() == [3, 5]
    assert same(found.rates, [[0.75, 0.25], [np.nan, 1.0]])
    assert same(found.mean, [0.75, 0.625])


def test_prompts_are_matched_by_content_where_possible():
    data = Dataset.from_dict({"prompt": ["b?", "new?", "a?", "b?"]})
    history = RewardHistory(RATES, np.array([0, 1, 2]), [prompt_id("a?"), prompt_id("b?"), prompt_id("z?")])
    assert same(history.of(data, np.array([0, 1, 2])), [RATES[1], [np.nan] * 3, RATES[0]])
    assert same(history.of(data, np.array([3])), RATES[[1]])  # an equal prompt in another row


def test_equal_prompts_of_several_rows_are_averaged():
    data = Dataset.from_dict({"prompt": ["a?"]})
    history = RewardHistory(RATES, np.array([0, 1, 2]), [prompt_id("a?")] * 3)
    assert same(history.of(data, np.array([0])), [[0.125, 0.5, 0.75]])


def test_prompts_are_matched_by_row_otherwise():
    history = RewardHistory(RATES, np.array([5, 0, 3]))
    assert same(history.of(cases.dataset(6), np.array([0, 3, 4])), [RATES[1], RATES[2], [np.nan] * 3])


def test_conversations_are_matched_as_they_come_from_the_dataset(tmp_path):
    data = cases.dataset(4, conversational=True)
    ids = [prompt_id(row["prompt"]) for row in data]
    write_history(tmp_path / "history.parquet", RewardHistory(np.full((4, 1), 0.5), None, ids))
    shuffled = data.shuffle(seed=1)
    assert same(read_history(tmp_path / "history.parquet").of(shuffled, np.arange(4)), np.full((4, 1), 0.5))


BAD_JSON = [
    ([1, 2], "is not of the form"),
    ({"0": 0.5}, "is not of the form"),
    ({"a0": [0.5]}, "'a0' is not a row of the dataset"),
    ({"-1": [0.5]}, "'-1' is not a row"),
    ({"0": [1.5]}, "holds 1.5: success rates lie between 0 and 1.*right .1. and wrong .0."),
    ({"0": [{}]}, "cannot be used"),
    ({}, "is empty"),
    ({"0": []}, "is empty"),
]


@pytest.mark.parametrize(("content", "message"), BAD_JSON)
def test_bad_json_is_named(tmp_path, content, message):
    path = tmp_path / "history.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"history.json' cannot be used: .*{message}|{message}"):
        read_history(path)


BAD_TABLES = [
    ({"index": [0], "pass": [0]}, r"has columns \['index', 'pass'\]; a history needs 'pass', 'success_rate', and"),
    ({"pass": [0], "success_rate": [0.5]}, "and 'index' or 'prompt_id'"),
    ({"index": [0, None], "pass": [0, 0], "success_rate": [0.5, 0.5]}, "a value of 'index', 'pass' is missing"),
    ({"index": [0], "pass": [0], "success_rate": [-1.0]}, "holds -1"),
    ({"index": [], "pass": [], "success_rate": []}, "is empty"),
]


@pytest.mark.parametrize(("columns", "message"), BAD_TABLES)
def test_bad_tables_are_named(tmp_path, columns, message):
    pd.DataFrame(columns).to_parquet(tmp_path / "history.parquet")
    with pytest.raises(ValueError, match=rf"history.parquet' cannot be used: .*{message}"):
        read_history(tmp_path / "history.parquet")


def test_files_that_are_no_histories(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.json' does not exist: give the file of a previous run"):
        read_history(tmp_path / "none.json")
    (tmp_path / "history.csv").write_text("index\n")
    with pytest.raises(ValueError, match=r"history.csv'.*end in .parquet or .json"):
        read_history(tmp_path / "history.csv")
    (tmp_path / "history.parquet").write_text("no table")
    with pytest.raises(ValueError, match=r"history.parquet' cannot be used"):
        read_history(tmp_path / "history.parquet")
    (tmp_path / "history.json").write_text("{")
    with pytest.raises(ValueError, match=r"history.json' cannot be used"):
        read_history(tmp_path / "history.json")


def test_what_cannot_be_written_is_said(tmp_path):
    with pytest.raises(ValueError, match="prompt ids alone"):
        write_history(tmp_path / "history.json", RewardHistory(RATES, None, IDS))
    with pytest.raises(ValueError, match=r"end in .parquet or .json"):
        write_history(tmp_path / "history.csv", RewardHistory(RATES, np.arange(3)))
    with pytest.raises(ValueError, match="to know its prompts by"):
        RewardHistory(RATES)
