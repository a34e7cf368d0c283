"""The quickstart, small: three lines from one base model, equal compute, one comparison."""

import os
import subprocess
import sys

import cases
import numpy as np
import pytest

pytest.importorskip("reasoning_gym")
pytest.importorskip("jinja2")

from trl_learnalign.records.summary import rollouts_of_run
from trl_learnalign.report import read_run

ROOT = cases.ROOT
SMALL = "--train_samples 48 --eval_samples 40 --warmup_samples 8 --output_dir outputs"


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The folder it ran in, and what it printed."""
    folder = tmp_path_factory.mktemp("quickstart")
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "quickstart.py"), *SMALL.split()],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=cases.HANGS,
    )
    assert done.returncode == 0, done.stderr
    return folder / "outputs", done.stdout


@pytest.fixture(scope="module")
def runs(quickstart):
    folder, _ = quickstart
    return {name: read_run(folder / name) for name in ("paper", "shuffled", "adaptive")}


def test_all_lines_spend_what_the_paper_s_selection_takes(runs):
    ledgers = {name: run.ledger for name, run in runs.items()}
    assert {ledger.price for ledger in ledgers.values()} == {8}
    wanted = ledgers["paper"].compute(ledgers["paper"].total)
    for name in ("shuffled", "adaptive"):
        run = runs[name]
        steps = sum(phase.steps for phase in run.phases)
        spent = run.ledger.compute(run.ledger.total)
        # To the end of the step that spends the last of it.
        assert wanted <= spent < wanted + 2 * spent / steps
        assert run.finished


def test_all_lines_begin_with_the_same_model_and_are_asked_the_same(runs):
    assert len({run.accuracies[0].right for run in runs.values()}) == 1
    assert len({run.accuracies[-1].problem_set for run in runs.values()}) == 1


def test_the_control_trains_on_the_whole_pool_as_it_comes(runs):
    assert runs["shuffled"].contents.orders == ["shuffled"]
    assert not runs["shuffled"].contents.selects
    assert runs["adaptive"].contents.orders == ["adaptive"]


def test_only_the_adaptive_line_has_small_groups(runs):
    """All lines roll out as many completions a step."""
    for name, prompts in (("paper", 8), ("shuffled", 8), ("adaptive", 32)):
        rollouts = rollouts_of_run(runs[name].contents)
        assert rollouts.groups == prompts * sum(phase.steps for phase in runs[name].phases)


def test_it_ends_with_the_comparison_on_few_lines(quickstart, runs):
    _, printed = quickstart
    for name, run in runs.items():
        assert f"{100 * np.mean(run.accuracies[-1].right):.1f}" in printed, name
    assert "from the shuffled pool" in printed or "of the shuffled pool" in printed
    assert "trl-learnalign compare outputs/{shuffled,paper,adaptive}" in printed
    assert len(printed.splitlines()) <= 30
