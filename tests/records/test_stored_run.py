"""A stored run directory reports and compares (tests/stored/run)."""

import json
import shutil

import cases
import pytest

from trl_learnalign.cli import main
from trl_learnalign.records.run_record import check_seal, read_contents


@pytest.fixture
def run(tmp_path):
    shutil.copytree(cases.STORED_RUN, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("name", ["whole", "interrupted"])
def test_it_is_of_the_form_that_is_written(run, name):
    path = run / name / "_learnalign" / "run.json"
    check_seal(path)
    stored, contents = json.loads(path.read_text()), read_contents(path)
    stored.pop("digest")
    assert contents.to_json() == stored
    assert contents.unknown_keys() == []


def test_it_is_reported(run):
    main(["report", str(run / "whole")])
    page = (run / "whole" / "report.html").read_text()
    record = json.loads((run / "whole" / "_learnalign" / "run.json").read_text())
    for stage in ("stage_1", "stage_2", "stage_3"):
        assert f"{record['phases'][stage]['selection']['success_rate_selected']:.3f}" in page


def test_it_is_compared(run, capsys):
    folders = [str(run / name) for name in ("whole", "interrupted")]
    main(["compare", *folders, "--html", str(run / "comparison.html")])
    assert (run / "comparison.html").exists()
    shown = capsys.readouterr().out
    assert "0.237 – 0.763" in shown  # Wilson's interval of 5 of 10
    assert "1,448" in shown  # mean tokens of both: 1,606 and 1,291
    assert "7 (1 not finished)" in shown
