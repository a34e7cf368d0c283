import json

import cases
import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from histories import write_history
from interruptions import KillAt, Killed

from trl_learnalign import LearnAlignCallback, LearnAlignConfig, Pool
from trl_learnalign.cli.arguments import RecipeArguments
from trl_learnalign.cli.problems import load_problems
from trl_learnalign.data.prompts import dataset_digest, prompt_id
from trl_learnalign.preflight import checks
from trl_learnalign.ranking import Ranking, subset_of
from trl_learnalign.records.history import RewardHistory, read_history
from trl_learnalign.selectors import SELECTORS
from trl_learnalign.training.checkpoints import last_complete_checkpoint

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
    frame = pd.DataFrame(
        {"index": [3, 3, 5, 3], "pass": [9, 9, 9, 4], "success_rate": [0.0, 0.5, 1.0, 0.75]}
    )
    frame.to_parquet(tmp_path / "history.parquet")
    found = read_history(tmp_path / "history.parquet")
    assert found.indices.tolist() == [3, 5]
    assert same(found.rates, [[0.75, 0.25], [np.nan, 1.0]])
    assert same(found.mean, [0.75, 0.625])


def test_prompts_are_matched_by_content_where_possible():
    data = Dataset.from_dict({"prompt": ["b?", "new?", "a?", "b?"]})
    history = RewardHistory(
        RATES, np.array([0, 1, 2]), [prompt_id("a?"), prompt_id("b?"), prompt_id("z?")]
    )
    assert same(history.of(data, np.array([0, 1, 2])), [RATES[1], [np.nan] * 3, RATES[0]])
    assert same(history.of(data, np.array([3])), RATES[[1]])  # an equal prompt in another row


def test_equal_prompts_of_several_rows_are_averaged():
    data = Dataset.from_dict({"prompt": ["a?"]})
    history = RewardHistory(RATES, np.array([0, 1, 2]), [prompt_id("a?")] * 3)
    assert same(history.of(data, np.array([0])), [[0.125, 0.5, 0.75]])


def test_prompts_are_matched_by_row_otherwise():
    history = RewardHistory(RATES, np.array([5, 0, 3]))
    assert same(
        history.of(cases.dataset(6), np.array([0, 3, 4])), [RATES[1], RATES[2], [np.nan] * 3]
    )


def test_conversations_are_matched_as_they_come_from_the_dataset(tmp_path):
    data = cases.dataset(4, conversational=True)
    ids = [prompt_id(row["prompt"]) for row in data]
    write_history(tmp_path / "history.parquet", RewardHistory(np.full((4, 1), 0.5), None, ids))
    shuffled = data.shuffle(seed=1)
    assert same(
        read_history(tmp_path / "history.parquet").of(shuffled, np.arange(4)), np.full((4, 1), 0.5)
    )


PROBLEMS = [{"question": f"{i} + {i}?", "answer": f"#### {2 * i}"} for i in range(20)]


@pytest.fixture
def by_row(tmp_path):
    """A file of problems, and a history by its rows: row `i` has rates `i / 20` and 0."""
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in PROBLEMS))
    path = tmp_path / "history.json"
    path.write_text(json.dumps({str(i): [i / 20, 0.0] for i in range(20)}))
    return tmp_path / "train.jsonl", read_history(path)


def number(row):
    return int(row["prompt"][-1]["content"].split()[0])


@pytest.mark.parametrize(
    ("options", "first", "count"),
    [
        ({"eval_dataset_name": "train.jsonl"}, 0, 20),
        ({"eval_samples": 5}, 0, 15),
        ({"eval_samples": 5, "train_samples": 6}, 0, 6),
        ({"eval_samples": 3, "dataset_train_split": "train[8:]"}, 8, 9),
        ({"eval_samples": 2, "dataset_train_split": "train[50%:90%]"}, 10, 6),
    ],
)
def test_rows_of_a_history_are_those_of_the_file_whatever_is_split_off(
    by_row, options, first, count, monkeypatch
):
    file, history = by_row
    monkeypatch.chdir(file.parent)
    train = load_problems(RecipeArguments(dataset_name="train.jsonl", **options)).train
    assert len(train) == count
    numbers = [number(row) for row in train]
    assert min(numbers) >= first
    if count < 20 - first:
        assert numbers != list(range(first, first + count))  # rows have shifted
    assert same(history.of(train, np.arange(count))[:, 0], np.array(numbers) / 20)
    settings = LearnAlignConfig(
        selector="reward_variance", warmup_samples=0, reward_history="history.json", stages=[3]
    )
    checks.check_selectors(settings, train)
    pool = Pool(np.arange(count), train, 0, "stage_1", history=history.of(train, np.arange(count)))
    scores = SELECTORS["reward_variance"].score(pool)
    found = Ranking(SELECTORS["reward_variance"], pool, scores, np.arange(count))
    choice = found.take(3, np.arange(count), "fill", 1)
    subset = subset_of(train, found.table(choice), choice.rows)
    assert (
        subset["selection_index"][:]
        == sorted(numbers, reverse=True)[:3]
        == [number(row) for row in subset]
    )
    assert "source_row" not in subset.column_names
    # What identifies a run does not depend on it.
    assert dataset_digest(train) == dataset_digest(train.remove_columns("source_row"))


# ---- By row number, in a script of one's own ------------------------------------------------------------------------


def as_prompt(row):
    return {"prompt": row["question"]}


def split_off(data):
    return data.train_test_split(test_size=4, seed=1)["train"]


def own_script(file, change):
    """What a script makes of the file: its rows as prompts, changed first, the row noted or not."""
    return change(Dataset.from_json(str(file))).map(as_prompt)


def checked(folder, data, rates):
    (folder / "own.json").write_text(json.dumps(rates))
    config = LearnAlignConfig(
        selector="reward_variance",
        warmup_samples=0,
        reward_history=str(folder / "own.json"),
        stages=[3],
    )
    checks.check_selectors(config, data)


SPARSE = {str(i): [i / 20, 0.0] for i in range(0, 16, 3)}


def test_rows_that_a_script_split_off_are_not_taken_for_others(by_row, tmp_path):
    """Row 3 of the history is another prompt of the dataset by now, though all of its numbers are there."""
    data = own_script(by_row[0], split_off)
    assert [int(prompt.split()[0]) for prompt in data["prompt"]] != list(range(16))
    with pytest.raises(
        ValueError,
        match=r"6 of 16 prompts by row number.*it has 16 of the 20 rows that were loaded.*'source_row'",
    ):
        checked(tmp_path, data, SPARSE)
    with pytest.raises(
        ValueError, match=r"has row 18.*rows were removed.*add_column\('source_row'"
    ):
        checked(tmp_path, data, {"18": [0.5, 0.0]})


def test_the_remedy_matches_them(by_row, tmp_path, caplog):
    data = own_script(
        by_row[0], lambda rows: split_off(rows.add_column("source_row", range(len(rows))))
    )
    checked(tmp_path, data, {str(i): [i / 20, 0.0] for i in range(20)})
    numbers = [int(prompt.split()[0]) for prompt in data["prompt"]]
    assert same(by_row[1].of(data, np.arange(16))[:, 0], np.array(numbers) / 20)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("change", "rows", "said"),
    [
        (split_off, range(16), "it has 16 of the 20 rows that were loaded"),
        (lambda data: data, range(18), "has 18 of the training dataset's 20 rows"),
        (lambda data: data, range(20), None),
    ],
    ids=["as many as are left", "fewer than there are", "all"],
)
def test_doubtful_rows_are_warned_of(by_row, tmp_path, caplog, change, rows, said):
    checked(tmp_path, own_script(by_row[0], change), {str(i): [0.5, 0.0] for i in rows})
    assert (
        (said in caplog.text and "otherwise the wrong prompts are ranked" in caplog.text)
        if said
        else caplog.text == ""
    )


def test_another_order_is_seen(by_row, tmp_path, caplog):
    data = own_script(by_row[0], lambda rows: rows).shuffle(seed=1)
    checked(tmp_path, data, {str(i): [0.5, 0.0] for i in range(20)})
    assert "its rows were reordered" in caplog.text
    with pytest.raises(ValueError, match="its rows were reordered"):
        checked(tmp_path, data, SPARSE)


def test_a_history_that_holds_the_prompts_themselves(tmp_path):
    prompts = [[{"role": "user", "content": f"{i}?"}] for i in range(3)] * 2
    columns = {
        "prompt": prompts,
        "pass": [0] * 3 + [1] * 3,
        "success_rate": [0.0, 0.5, 1.0, 0.25, 0.75, 0.5],
    }
    Dataset.from_dict(columns).to_parquet(tmp_path / "history.parquet")
    found = read_history(tmp_path / "history.parquet")
    data = Dataset.from_dict({"prompt": prompts[:3][::-1]})
    assert same(found.of(data, np.arange(3)), [[1.0, 0.5], [0.5, 0.75], [0.0, 0.25]])


BAD_JSON = [
    ([1, 2], "does not have the form"),
    ({"0": 0.5}, "does not have the form"),
    ({"a0": [0.5]}, "'a0' is not a row number"),
    ({"-1": [0.5]}, "'-1' is not a row"),
    (
        {"0": [1.5]},
        "has the value 1.5, but success rates are between 0 and 1.*1 .correct. and 0 .wrong.",
    ),
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
    (
        {"index": [0], "pass": [0]},
        r"has the columns \['index', 'pass'\], but a history needs 'pass', 'success_rate', and",
    ),
    ({"pass": [0], "success_rate": [0.5]}, "and 'index' or 'prompt_id'"),
    (
        {"index": [0, None], "pass": [0, 0], "success_rate": [0.5, 0.5]},
        "values are missing in 'index', 'pass'",
    ),
    ({"index": [0], "pass": [0], "success_rate": [-1.0]}, "has the value -1"),
    ({"index": [], "pass": [], "success_rate": []}, "is empty"),
]


@pytest.mark.parametrize(("columns", "message"), BAD_TABLES)
def test_bad_tables_are_named(tmp_path, columns, message):
    pd.DataFrame(columns).to_parquet(tmp_path / "history.parquet")
    with pytest.raises(ValueError, match=rf"history.parquet' cannot be used: .*{message}"):
        read_history(tmp_path / "history.parquet")


def test_files_that_are_no_histories(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"none.json' does not exist: give the file of a previous run"
    ):
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


def test_a_history_has_something_to_know_prompts_by():
    with pytest.raises(ValueError, match="that identifies its prompts"):
        RewardHistory(RATES)


# ---- Recorded by a run ----------------------------------------------------------------------------------------------


class Watch:
    """A success reward that notes every group of four rollouts that training asked it about."""

    def __init__(self):
        self.groups: list[tuple[int, str, float]] = []
        self.callback: LearnAlignCallback | None = None

    def accuracy_reward(self, completions, prompts, trainer_state, **_):
        values = [
            None if len(text) == 1 else value
            for text, value in zip(completions, cases.accuracy_reward(completions), strict=True)
        ]
        if not self.callback.is_scoring:
            for i in range(0, len(prompts), 4):
                assert len(set(prompts[i : i + 4])) == 1
                judged = [value for value in values[i : i + 4] if value is not None]
                rate = np.mean(judged) if judged else np.nan
                self.groups.append((trainer_state.global_step, prompts[i], rate))
        return values


def run(folder, kill_at=None, resume=False, settings=None, size=6, **options):
    watch = Watch()
    rewards = [cases.length_reward, watch.accuracy_reward]
    trainer = cases.trainer(folder, rewards=rewards, data=cases.dataset(size), **options)
    config = LearnAlignConfig(
        **{
            "warmup_samples": 0,
            "stages": [1.0],
            "stage_epochs": 3,
            "selector": "random",
            "feature_dim": 64,
        }
        | (settings or {})
    )
    callback = watch.callback = LearnAlignCallback(trainer, config)
    trainer.add_callback(callback)
    if kill_at is not None:
        trainer.add_callback(KillAt(kill_at))
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder) if resume else None)
    return callback, watch


def recorded(folder):
    return pd.read_parquet(folder / "_learnalign" / "reward_history.parquet")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2, "steps_per_generation": 1},
        {"num_iterations": 2, "steps_per_generation": 2},
        {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": cases.dataset(2)},
    ],
    ids=["plain", "two generations a step", "a generation for four steps", "evaluation between"],
)
def test_a_plain_run_leaves_the_success_rate_of_each_prompt_in_each_pass(tmp_path, options):
    evaluated = options.pop("eval_dataset", None)
    if evaluated is not None:
        make = cases.GRPOTrainer
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                cases, "GRPOTrainer", lambda **named: make(eval_dataset=evaluated, **named)
            )
            callback, watch = run(tmp_path, **options)
    else:
        callback, watch = run(tmp_path, **options)
    table = recorded(tmp_path)
    data = callback.trainer.train_dataset
    # One group for each prompt of each pass; evaluation's groups come between, in the order of the evaluation set.
    trained = [
        group for group in watch.groups if evaluated is None or group[1] not in evaluated["prompt"]
    ]
    if evaluated is None:
        assert [(step, prompt) for step, prompt, _ in trained] == [
            (step, data[row]["prompt"])
            for step, row in zip(table["step"], table["index"], strict=True)
        ]
        same(table["success_rate"], [rate for _, _, rate in trained])
    else:
        others = table[~table["index"].isin([0, 1])]
        same(others["success_rate"], [rate for _, _, rate in trained])
    assert table["prompt_id"].tolist() == [prompt_id(data[row]["prompt"]) for row in table["index"]]
    assert table.groupby("pass")["index"].agg(sorted).tolist()[:2] == [list(range(6))] * 2
    assert set(table["pass"]) == {0, 1, 2}
    found = read_history(tmp_path / "_learnalign" / "reward_history.parquet").of(data, np.arange(6))
    assert found.shape == (6, 3)
    truth = table.groupby(["index", "pass"])["success_rate"].mean().unstack()
    np.testing.assert_allclose(found, truth)


def test_passes_count_on_from_phase_to_phase(tmp_path):
    settings = {
        "warmup_samples": 3,
        "stages": [4, 2],
        "stage_epochs": [2, 1],
        "selector": "learnability",
    }
    callback, watch = run(tmp_path, settings=settings)
    table = recorded(tmp_path)
    assert table.groupby("phase")["pass"].agg(set).to_dict() == {
        "warmup": {0},
        "stage_1": {1, 2},
        "stage_2": {3},
    }
    same(table["success_rate"], [rate for _, _, rate in watch.groups])
    for stage in ("stage_1", "stage_2"):
        assert set(table.loc[table["phase"] == stage, "index"]) == set(
            callback.selected(stage).tolist()
        )
    # Three prompts of the warm-up, two a step: its last step begins the pool again, in the same pass.
    assert (table["phase"] == "warmup").sum() == 4


@pytest.mark.parametrize("options", [{}, {"num_iterations": 2, "steps_per_generation": 2}])
def test_a_resumed_run_leaves_the_history_of_an_uninterrupted_one(tmp_path, options):
    options |= {
        "save_strategy": "steps",
        "save_steps": 2,
        "settings": {"warmup_samples": 2, "stage_epochs": 2},
    }
    run(tmp_path / "whole", **options)
    whole = recorded(tmp_path / "whole")
    for step in (3, 5):
        with pytest.raises(Killed):
            run(tmp_path / str(step), kill_at=step, **options)
        run(tmp_path / str(step), resume=True, **options)
        pd.testing.assert_frame_equal(recorded(tmp_path / str(step)), whole)


def test_a_lost_history_is_made_anew_from_the_checkpoint(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    run(tmp_path / "whole", **options)
    with pytest.raises(Killed):
        run(tmp_path, kill_at=3, **options)
    (tmp_path / "_learnalign" / "reward_history.parquet").unlink()
    run(tmp_path, resume=True, **options)
    pd.testing.assert_frame_equal(recorded(tmp_path), recorded(tmp_path / "whole"))


@pytest.mark.parametrize("selector", ["limr", "reward_variance"])
def test_a_run_selects_by_the_history_of_another(tmp_path, selector):
    run(tmp_path / "full", size=8)
    path = tmp_path / "full" / "_learnalign" / "reward_history.parquet"
    settings = {"selector": selector, "reward_history": str(path), "stages": [4], "stage_epochs": 1}
    # Shuffled, and with prompts that the full run did not have.
    trainer = cases.trainer(tmp_path / "subset", data=cases.dataset(10).shuffle(seed=3))
    callback = LearnAlignCallback(trainer, LearnAlignConfig(warmup_samples=0, **settings))
    trainer.add_callback(callback)
    trainer.train()
    chosen = {trainer.train_dataset[int(row)]["prompt"] for row in callback.selected("stage_1")}
    rates = recorded(tmp_path / "full").groupby(["index", "pass"])["success_rate"].mean().unstack()
    if selector == "limr":
        means = rates.mean()
        scores = 1 - ((rates - means) ** 2).sum(axis=1) / (rates.notna() * (1 - means) ** 2).sum(
            axis=1
        )
    else:
        scores = rates.std(axis=1, ddof=0)
    ranked = scores.sort_values(ascending=False)
    data = cases.dataset(8)
    surely = {
        data[int(row)]["prompt"] for row, value in ranked.items() if value > ranked.iloc[4] + 1e-9
    }
    possibly = {
        data[int(row)]["prompt"] for row, value in ranked.items() if value >= ranked.iloc[3] - 1e-9
    }
    assert surely <= chosen <= possibly
