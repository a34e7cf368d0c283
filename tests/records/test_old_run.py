"""A run directory of version 0.1.0 still reports and compares (tests/stored/run_0_1)."""

import json
import shutil

import cases
import pytest

from trl_learnalign.cli.main import main

STORED = cases.STORED_RUN


@pytest.fixture
def run(tmp_path):
    shutil.copytree(STORED, tmp_path / "run")
    return tmp_path / "run"


def test_it_is_reported(run):
    main(["report", str(run / "whole")])
    page = (run / "whole" / "report.html").read_text()
    record = json.loads((run / "whole" / "learnalign" / "run.json").read_text())
    for stage in ("stage_1", "stage_2", "stage_3"):
        assert f"{record['phases'][stage]['selection']['success_rate_selected']:.3f}" in page


def test_it_is_compared(run, capsys):
    main(
        [
            "compare",
            str(run / "whole"),
            str(run / "interrupted"),
            "--html",
            str(run / "comparison.html"),
        ]
    )
    assert (run / "comparison.html").exists()
    shown = capsys.readouterr().out
    assert "0.215 – 0.785" in shown  # held-out accuracy at the end
    assert "1,401" in shown  # mean tokens of both: 1,610 of the run that ended
