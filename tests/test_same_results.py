"""The script that says whether a refactor changed anything: it says so when nothing did, and sees what did."""

import shutil

import cases
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import same_results
import torch
from safetensors.torch import save_file


def test_equal_results_have_no_differences():
    results = {"pools": {"stage_1": [1, 2]}, "weights": "ab"}
    assert same_results.differences(results, {"weights": "ab", "pools": {"stage_1": [1, 2]}}) == []


def test_each_difference_is_named_by_its_place():
    ours = {"pools": {"stage_1": [1, 2], "stage_2": [3]}, "weights": "ab"}
    theirs = {"pools": {"stage_1": [2, 1], "stage_2": [3]}, "losses": []}
    assert same_results.differences(ours, theirs) == [
        "/losses: None here, [] there",
        "/pools/stage_1: [1, 2] here, [2, 1] there",
    ]
    assert same_results.additions(ours, theirs) == ["/weights: new here"]


HISTORY = {"index": [4, 2, 4], "success_rate": [0.1 + 0.2, None, float("nan")]}
SHARD = {"rewards": torch.tensor([[0.0, 1.0]]), "seconds": torch.tensor([1.5])}


def records(folder, history=HISTORY, shard=SHARD, checksum="0" * 32):
    """What the script keeps of a record folder with a table and a shard."""
    (folder / "stage_1").mkdir(parents=True)
    pq.write_table(pa.table(history), folder / "reward_history.parquet")
    save_file(shard, folder / "stage_1" / f"shard-00000-{checksum}.safetensors")
    return same_results.tables(folder)


def test_equal_tables_and_shards_are_the_same_whatever_their_seconds(tmp_path):
    slower = {**SHARD, "seconds": torch.tensor([2.5])}
    ours = records(tmp_path / "ours", shard=slower, checksum="1" * 32)
    theirs = records(tmp_path / "theirs")
    assert same_results.differences(ours, theirs) == []
    assert same_results.additions(ours, theirs) == []


def test_the_record_folder_is_the_same_by_its_older_name(tmp_path):
    records(tmp_path / "ours" / "_learnalign")
    records(tmp_path / "theirs" / "learnalign")
    ours, theirs = (same_results.tables(tmp_path / side) for side in ("ours", "theirs"))
    assert ours == theirs
    assert "_learnalign/reward_history.parquet" in ours


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("index", [4, 4, 2]),  # the same values in another order
        ("success_rate", [0.3, None, float("nan")]),  # the last bit
        ("success_rate", [0.1 + 0.2, float("nan"), None]),
    ],
)
def test_a_changed_value_of_a_table_is_a_difference_of_its_column(tmp_path, name, values):
    ours = records(tmp_path / "ours", {**HISTORY, name: values})
    lines = same_results.differences(ours, records(tmp_path / "theirs"))
    assert [line.split(":")[0] for line in lines] == [f"/reward_history.parquet/{name}"]


@pytest.mark.parametrize(
    "values", [[[0.0, 1.0 + 2**-23]], [[0.0], [1.0]]], ids=["the last bit", "another shape"]
)
def test_a_changed_tensor_of_a_shard_is_a_difference(tmp_path, values):
    ours = records(tmp_path / "ours", shard={"rewards": torch.tensor(values)})
    lines = same_results.differences(ours, records(tmp_path / "theirs"))
    places = [line.split(":")[0] for line in lines]
    assert places == ["/stage_1/shard-00000.safetensors/rewards"]


def test_a_dropped_column_is_a_difference(tmp_path):
    ours = records(tmp_path / "ours", {"index": HISTORY["index"]})
    (line,) = same_results.differences(ours, records(tmp_path / "theirs"))
    assert line.startswith("/reward_history.parquet/success_rate: None here, ")


def test_a_new_column_is_new_and_no_difference(tmp_path):
    ours = records(tmp_path / "ours", {"right": [1, 0, 0], **HISTORY})
    theirs = records(tmp_path / "theirs")
    assert same_results.differences(ours, theirs) == []
    assert same_results.additions(ours, theirs) == ["/reward_history.parquet/right: new here"]


def test_a_new_column_hides_no_changed_one(tmp_path):
    changed = {**HISTORY, "right": [1, 0, 0], "index": [4, 2, 5]}
    ours, theirs = records(tmp_path / "ours", changed), records(tmp_path / "theirs")
    (line,) = same_results.differences(ours, theirs)
    assert line.startswith("/reward_history.parquet/index: ")


def test_a_missing_file_is_a_difference(tmp_path):
    ours = records(tmp_path / "ours")
    theirs = {**ours, "stage_1/scores.parquet": {"score": "ab"}}
    assert same_results.differences(ours, theirs) == [
        "/stage_1/scores.parquet: None here, {'score': 'ab'} there"
    ]
    assert same_results.additions(theirs, ours) == ["/stage_1/scores.parquet: new here"]


@pytest.mark.parametrize(
    ("changed", "code"), [([], 0), (["/weights: ab here, cd there"], 1)], ids=["new", "changed"]
)
def test_the_command_fails_for_what_changed_and_not_for_what_is_new(
    monkeypatch, capsys, changed, code
):
    new = ["/files/reward_history.parquet/right: new here"]
    monkeypatch.setattr(same_results, "against", lambda revision: (changed, new))
    monkeypatch.setattr("sys.argv", ["same_results.py", "--against", "abc"])
    with pytest.raises(SystemExit) as ended:
        same_results.main()
    assert ended.value.code == code
    verdict = [] if changed else ["the same results as abc"]
    assert capsys.readouterr().out.splitlines() == [*changed, *new, *verdict]


def copy_checkout(folder):
    for part in ("trl_learnalign", "scripts", "tests/helpers", "tests/stored"):
        shutil.copytree(cases.ROOT / part, folder / part)


@pytest.fixture(scope="module")
def ours():
    return same_results.results_of(cases.ROOT)


@pytest.mark.slow
def test_an_unchanged_package_gives_the_same_results(tmp_path, ours):
    copy_checkout(tmp_path)
    theirs = same_results.results_of(tmp_path)
    assert same_results.differences(ours, theirs) == []
    assert same_results.additions(ours, theirs) == []
    assert len(ours["staged"]["losses"]) > 5
    assert len(ours["staged"]["files"]) > 5
    assert {*same_results.RUNS, "resumed", "two processes", "selectors", "subsets"} < {*ours}
    assert len(ours["report"]) > 100


@pytest.mark.slow
def test_a_changed_selector_is_seen_and_nothing_else_is_blamed(tmp_path, ours):
    copy_checkout(tmp_path)
    file = tmp_path / "trl_learnalign" / "selectors" / "simple.py"
    source = file.read_text()
    assert source.count("np.linspace(1, 0,") == 1
    file.write_text(source.replace("np.linspace(1, 0,", "np.linspace(0, 1,"))
    lines = same_results.differences(ours, same_results.results_of(tmp_path))
    places = {line.split(":")[0] for line in lines}
    assert places == {"/selectors/random/pool", "/selectors/random/weights"}


@pytest.mark.slow
def test_a_changed_adaptive_order_is_seen_in_each_run_that_goes_by_it(tmp_path, ours):
    copy_checkout(tmp_path)
    file = tmp_path / "trl_learnalign" / "adaptive" / "order.py"
    source = file.read_text()
    assert source.count("success_rates * left * left**headroom") == 1
    changed = "success_rates * success_rates * left**headroom"
    file.write_text(source.replace("success_rates * left * left**headroom", changed))
    lines = same_results.differences(ours, same_results.results_of(tmp_path))
    kinds = {line.split("/")[1] for line in lines}
    assert {"adaptive", "dynamic sampling", "resumed", "two processes"} <= kinds
    assert not kinds & {"staged", "restarted", "selectors", "subsets", "report"}
