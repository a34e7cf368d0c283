"""The page of tested versions is made of the results, and says what the library says."""

import ast
import json
from pathlib import Path
from xml.etree import ElementTree

import compatibility
import pytest
from packaging.requirements import Requirement

from trl_learnalign.bridge import requires

RESULTS = compatibility.read_results()
CONSTRAINTS = compatibility.ROOT / "constraints.txt"
TESTS = [name for _, tests in compatibility.FEATURES.values() for name in tests]


def test_the_page_is_of_the_results():
    assert compatibility.PAGE.read_text() == compatibility.page(RESULTS), (
        "run python scripts/compatibility.py --page"
    )


def test_the_page_names_the_lowest_versions_that_were_not_run():
    said = compatibility.PAGE.read_text()
    for name in compatibility.NOT_RUN:
        assert f"`{next(r for r in compatibility.dependencies() if r.name == name)}`" in said
    assert ("were not run in *oldest*" in said) == bool(compatibility.NOT_RUN)


def test_nothing_failed():
    assert RESULTS
    for name, result in RESULTS.items():
        assert compatibility.count(result, "failed") == 0, name
        assert compatibility.count(result, "passed") > 0, name


def test_the_releases_that_are_called_tested_were_tested():
    tested = [name.removeprefix("trl-") for name in RESULTS if name.startswith("trl-")]
    assert tuple(tested) == requires.TESTED


def test_the_transformers_that_vllm_takes_were_tested_with_the_latest_release():
    for minor in compatibility.VLLM_TAKES:
        versions = RESULTS[f"transformers-{minor}"]["versions"]
        assert versions["transformers"].startswith(f"{minor}.")
        assert versions["trl"].startswith(f"{requires.TESTED[-1]}.")


def test_the_constraints_are_the_versions_of_the_latest_release():
    latest = RESULTS[f"trl-{requires.TESTED[-1]}"]["versions"]
    pins = {
        name.lower().replace("_", "-"): version
        for name, equals, version in (
            line.partition("==") for line in CONSTRAINTS.read_text().splitlines()
        )
        if equals and not name.startswith("#")
    }
    unlike = {
        name: (version, pins.get(name))
        for name, version in latest.items()
        if version.partition("+")[0] != pins.get(name)
    }
    assert not unlike, "run python scripts/compatibility.py --only, --again for the latest release"


def test_the_lowest_versions_are_those_that_were_tested():
    if "oldest" not in RESULTS:
        pytest.skip("scripts/compatibility.py --only oldest has no result yet")
    versions = RESULTS["oldest"]["versions"]
    required = {
        requirement.name.lower().replace("_", "-"): requirement
        for requirement in compatibility.dependencies()
    }
    assert {name for name in required if name not in versions} == set(compatibility.NOT_RUN)
    for name in required.keys() & versions.keys():
        requirement = required[name]
        lowest = Requirement(compatibility.lowest(requirement))
        assert versions[name] in lowest.specifier, name
    assert f">={requires.OLDEST}" == str(
        next(r.specifier for r in compatibility.dependencies() if r.name == "trl")
    )


@pytest.mark.parametrize("name", TESTS)
def test_every_test_that_is_named_exists(name):
    path, _, case = name.partition("::")
    function = case.partition("[")[0]
    tree = ast.parse((compatibility.ROOT / path).read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_tests_need_no_more_than_their_environments_have():
    """No reasoning-gym, which `trl_learnalign.toy` imports."""
    files = {compatibility.ROOT / name.partition("::")[0] for name in TESTS}
    files |= set((compatibility.ROOT / "tests" / "helpers").glob("*.py"))
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{each.name}" for each in node.names)]
            for name in names:
                assert not name.startswith(("reasoning_gym", "trl_learnalign.toy")), file


def test_the_latest_of_each_minor_release_is_tested():
    versions = ["1.10.0", "1.8.0", "1.9.2", "1.9.10", "1.7.1", "1.11.0rc1", "2.0.0"]
    found = compatibility.latest_of_each_minor(versions, "1.8.0")
    assert found == ["1.8.0", "1.9.10", "1.10.0", "2.0.0"]


def test_the_lowest_version_is_that_of_the_bound():
    assert compatibility.lowest(Requirement("trl>=1.8,!=1.9")) == "trl==1.8"


REPORT = """<testsuite>
<testcase classname="tests.bridge.test_release" name="test_everything_that_is_needed_is_there"/>
<testcase classname="tests.gradients.test_capture" name="test_lora[True]"/>
<testcase classname="tests.gradients.test_capture" name="test_lora[False]"><failure/></testcase>
<testcase classname="tests.measuring.test_measures"
    name="test_lora_policies_are_read_with_their_adapters[ratings]"><skipped/></testcase>
</testsuite>"""


def test_results_are_counted_by_feature():
    cases = list(ElementTree.fromstring(REPORT).iter("testcase"))
    assert compatibility.of_feature("names", cases) == {"passed": 1, "failed": 0, "skipped": 0}
    assert compatibility.of_feature("lora", cases) == {
        "passed": 1,
        "failed": 1,
        "skipped": 1,
        "failures": ["tests/gradients/test_capture.py::test_lora[False]"],
    }


def test_a_package_that_came_later_is_not_in_older_results():
    ours = compatibility.packages()
    older = {"torch": "2.13.0+cpu"}
    results = {
        name: {
            "features": {},
            "head": "PlainHead",
            "python": "3.11.7",
            "environment": "fresh",
            "versions": versions,
        }
        for name, versions in (("trl-1.8", older), ("oldest", dict.fromkeys(ours, "1.0")))
    }
    lines = compatibility.page(results).splitlines()
    assert "| torch | 2.13.0+cpu | 1.0 |" in lines
    for name in ours[1:]:
        assert f"| {name} | – | 1.0 |" in lines


class MadeError(Exception):
    """An environment would be made now."""


def test_what_has_a_result_is_not_run_again(tmp_path, monkeypatch):
    def prepared(folder, pins):
        raise MadeError

    monkeypatch.setattr(compatibility, "RESULTS", tmp_path)
    monkeypatch.setattr(compatibility, "prepared", prepared)
    done = {feature: {"passed": 1, "failed": 0, "skipped": 0} for feature in compatibility.FEATURES}
    done.pop("zero3")
    Path(tmp_path / "trl-9.9.json").write_text(json.dumps({"features": done}))
    compatibility.bring_up_to_date("trl-9.9", ["trl==9.9"], ["zero3"], again=False)
    with pytest.raises(MadeError):
        compatibility.bring_up_to_date("trl-9.9", ["trl==9.9"], [], again=False)


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (None, "–"),
        ({"passed": 3, "failed": 0, "skipped": 0}, "3"),
        ({"passed": 3, "failed": 1, "skipped": 0}, "3, 1 ✗"),
        ({"passed": 0, "failed": 0, "skipped": 2}, "∅"),
    ],
)
def test_cells(outcome, expected):
    assert compatibility.cell(outcome) == expected
