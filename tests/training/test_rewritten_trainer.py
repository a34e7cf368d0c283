"""A trainer that another package has rewritten, as Unsloth does: what runs on it, and what is refused."""

import json
import subprocess
import sys

import cases
import pytest
import rewritten_trainer
import sampling_cases
import torch
from adaptive_cases import history, settings, weights

from trl_learnalign import AdaptiveOrderCallback, LearnAlignCallback, LearnAlignConfig
from trl_learnalign.bridge import objective, requires
from trl_learnalign.records.notes import RolloutsNote
from trl_learnalign.report.run_data import read_run

COPY = "UnslothGRPOTrainer is a rewritten copy of TRL's trainer"


@pytest.fixture(params=["ours first", "ours afterwards"])
def rewritten(request, monkeypatch):
    """The class in the place of TRL's, put there after our package was imported, or as if before."""
    made = rewritten_trainer.put_in_place(monkeypatch.setattr)
    modules = [sampling_cases, cases]
    if request.param == "ours afterwards":
        modules += [requires, objective]
    for module in modules:
        for name in ("GRPOTrainer", "StockTrainer"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, made)
    return made


def trained(folder, config=None, **options):
    trainer = sampling_cases.trainer(folder, rows=list(range(24)), **options)
    callback = None
    if config is not None:
        callback = LearnAlignCallback(trainer, config)
        trainer.add_callback(callback)
    trainer.train()
    return trainer, callback


def assert_same_weights(one, other):
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """What TRL's own trainer comes to in adaptive order, with every rollout trained on."""
    folder = tmp_path_factory.mktemp("stock")
    return trained(folder, settings(skip_zero_advantages=False), max_steps=4)


def test_its_adaptive_order_is_that_of_trl_s_own_trainer(stock, rewritten, tmp_path):
    trainer, callback = trained(tmp_path, settings(), max_steps=4)
    assert type(trainer) is rewritten
    assert_same_weights(trainer, stock[0])
    assert history(callback).equals(history(stock[1]))


def test_its_rollouts_are_not_skipped_and_the_record_says_why(rewritten, tmp_path, caplog):
    plain, _ = trained(tmp_path / "plain", max_steps=3)
    ours, _ = trained(tmp_path / "ours", LearnAlignConfig.skipping(), max_steps=3)
    assert_same_weights(plain, ours)
    assert (
        f"Skipping is off, and rollouts without an advantage are trained on like the others: {COPY}"
        in caplog.text
    )
    note = read_run(tmp_path / "ours").contents.note("stage_1", RolloutsNote)
    assert note.not_skipped.startswith(COPY)
    assert note.groups > note.useful


def test_a_selector_without_gradients_chooses_what_it_chooses_elsewhere(rewritten, tmp_path):
    _, callback = trained(tmp_path, subset("learnability"), max_steps=-1)
    right = [sampling_cases.successes(row) for row in range(24)]
    assert sorted(right[row] for row in callback.state.pools["stage_1"]) == [2] * 4


def subset(selector):
    return LearnAlignConfig.adaptive(stages=[4], selector=selector)


@pytest.mark.parametrize("selector", ["learnalign", "learnalign_coverage"])
def test_a_selector_with_gradients_is_refused(rewritten, tmp_path, selector):
    trainer = sampling_cases.trainer(tmp_path, rows=list(range(24)), max_steps=-1)
    with pytest.raises(ValueError, match=rf"{COPY}.*without gradients"):
        LearnAlignCallback(trainer, subset(selector))


def test_dynamic_sampling_is_refused(rewritten, tmp_path):
    trainer = sampling_cases.trainer(tmp_path, rows=list(range(24)))
    with pytest.raises(ValueError, match=rf"Dynamic sampling is not possible here: {COPY}"):
        AdaptiveOrderCallback(trainer, settings(max_generation_batches=2))


FIRST = """
import json, sys
sys.path[:0] = {paths!r}
import rewritten_trainer
rewritten_trainer.put_in_place()
import trl_learnalign, sampling_cases
from adaptive_cases import settings
assert sampling_cases.GRPOTrainer.__name__ == rewritten_trainer.NAME
trainer = sampling_cases.trainer({folder!r}, rows=list(range(24)), max_steps=4)
trainer.add_callback(trl_learnalign.LearnAlignCallback(trainer, settings()))
trainer.train()
print(json.dumps([p.double().sum().item() for p in trainer.model.parameters()]))
"""


@pytest.mark.slow
def test_a_trainer_that_is_rewritten_before_anything_else_is_imported(stock, tmp_path):
    """As where `import unsloth` comes first."""
    code = FIRST.format(paths=[str(cases.ROOT / "tests" / "helpers")], folder=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=cases.HANGS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    sums = [parameter.double().sum().item() for parameter in stock[0].model.parameters()]
    assert json.loads(done.stdout.splitlines()[-1]) == sums
