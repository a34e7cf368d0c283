"""The script that says whether a refactor changed anything: it says so when nothing did, and sees what did."""

import shutil

import cases
import pytest
import same_results

PACKAGE = cases.ROOT / "trl_learnalign"


def test_equal_results_have_no_differences():
    results = {"pools": {"stage_1": [1, 2]}, "weights": "ab"}
    assert same_results.differences(results, {"weights": "ab", "pools": {"stage_1": [1, 2]}}) == []


def test_each_difference_is_named_by_its_place():
    ours = {"pools": {"stage_1": [1, 2], "stage_2": [3]}, "weights": "ab"}
    theirs = {"pools": {"stage_1": [2, 1], "stage_2": [3]}, "losses": []}
    assert same_results.differences(ours, theirs) == [
        "/losses: None here, [] there",
        "/pools/stage_1: [1, 2] here, [2, 1] there",
        "/weights: ab here, None there",
    ]


@pytest.fixture(scope="module")
def ours():
    return same_results.results_of(cases.ROOT)


@pytest.mark.slow
def test_an_unchanged_package_gives_the_same_results(tmp_path, ours):
    shutil.copytree(PACKAGE, tmp_path / "trl_learnalign")
    theirs = same_results.results_of(tmp_path)
    assert same_results.differences(ours, theirs) == []
    assert len(ours["staged"]["losses"]) > 5
    assert len(ours["staged"]["files"]) > 5
    assert len(ours["report"]) > 100


@pytest.mark.slow
def test_a_changed_selector_is_seen_and_nothing_else_is_blamed(tmp_path, ours):
    shutil.copytree(PACKAGE, tmp_path / "trl_learnalign")
    file = tmp_path / "trl_learnalign" / "selectors" / "simple.py"
    source = file.read_text()
    assert source.count("np.linspace(1, 0,") == 1
    file.write_text(source.replace("np.linspace(1, 0,", "np.linspace(0, 1,"))
    lines = same_results.differences(ours, same_results.results_of(tmp_path))
    places = {line.split(":")[0] for line in lines}
    assert places == {"/selectors/random/pool", "/selectors/random/weights"}
