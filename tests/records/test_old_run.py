"""A run directory of version 0.1.0 still resumes, reports and compares (tests/stored/run_0_1)."""

import json
import shutil

import cases
import pytest

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.cli.main import main

STORED = cases.STORED_RUN


@pytest.fixture
def run(tmp_path):
    shutil.copytree(STORED, tmp_path / "run")
    return tmp_path / "run"


def test_it_resumes_in_the_middle_of_a_stage(run):
    trainer = cases.trainer(
        run / "interrupted",
        data=cases.dataset(24),
        save_strategy="steps",
        save_steps=1000,
        save_total_limit=1,
        max_completion_length=6,
    )
    config = LearnAlignConfig.paper(
        warmup_samples=4,
        stages=[0.5, 0.25, 0.25],
        feature_dim=64,
        save_at_boundaries=False,
        keep_rollouts=1,
        reliability=True,
    )
    callback = LearnAlignCallback(trainer, config)
    trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=str(run / "interrupted" / "checkpoint-10"))
    expected = json.loads((run / "expected.json").read_text())
    assert trainer.state.global_step == 14
    assert {name: callback.selected(name).tolist() for name in expected["pools"]} == expected[
        "pools"
    ]
    record = json.loads((run / "interrupted" / "learnalign" / "run.json").read_text())
    assert record["phases"]["stage_3"]["training"]["steps"] == 3
    assert record["phases"]["stage_1"]["training"]["steps"] == 6  # noted by the old version


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
