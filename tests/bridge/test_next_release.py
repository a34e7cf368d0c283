"""A release of TRL that nobody has tested: it runs if everything needed is there and right, and stops if not."""

import logging

import cases
import next_release
import pytest
import trl
from trl import GRPOTrainer

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.bridge import compat, requires
from trl_learnalign.bridge.compat import check_trainer
from trl_learnalign.bridge.dynamic_sampling import (
    dynamic_sampling_problem,
    install_dynamic_sampling,
)
from trl_learnalign.bridge.requires import Called, Replaced, Required, missing_names
from trl_learnalign.bridge.skipping import ZeroAdvantageFilter, install_skipping

NEXT = f"1.{int(requires.TESTED[-1].split('.')[1]) + 1}.0"
LOSS = "    def _compute_loss(self, model, inputs):\n"
DECAYED = (
    LOSS
    + """\
        weights = sum(parameter.square().sum() for parameter in model.parameters())
        return self._loss_before(model, inputs) + 0.1 * weights

    def _loss_before(self, model, inputs):
"""
)

# ---- A copy under another version -----------------------------------------------------------------------------------


def test_the_next_release_runs_if_nothing_else_has_changed(tmp_path):
    said = next_release.run_with(tmp_path, NEXT, {})
    assert said["version"] == NEXT
    assert said["file"].startswith(str(tmp_path))
    assert said["error"] is None
    assert said["selected"] == 1
    assert said["steps"] > 0
    assert said["trained"]
    (line,) = said["untested"]
    assert f"trl {NEXT} is untested: trl_learnalign was tested with 1.8, " in line


def test_a_release_that_has_renamed_a_private_name_is_refused(tmp_path):
    said = next_release.run_with(tmp_path, NEXT, {"_buffered_inputs": "_held_inputs"})
    assert f"RuntimeError: trl {NEXT} is installed" in said["error"]
    assert "this trainer lacks _buffered_inputs. Install a tested version: pip" in said["error"]
    assert said["steps"] == said["selected"] == 0
    assert not said["trained"]


def test_a_release_with_another_loss_is_stopped_by_the_self_check(tmp_path):
    """The loss has a term that no log-probability leads to: what is captured is not its gradient."""
    said = next_release.run_with(tmp_path, NEXT, {LOSS: DECAYED})
    assert "SelfCheckError" in said["error"]
    assert "differ from those of the trainer's own loss" in said["error"]
    assert said["selected"] == 0
    assert not said["trained"]


# ---- Releases -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.7.1", "0.19.0"])
def test_releases_before_the_oldest_are_refused(tmp_path, monkeypatch, version):
    trainer = cases.trainer(tmp_path)
    monkeypatch.setattr(trl, "__version__", version)
    with pytest.raises(RuntimeError, match=rf"trl {version} is installed.*supports trl>=1\.8"):
        check_trainer(trainer)


def test_only_untested_releases_are_said_to_be(tmp_path, monkeypatch, caplog):
    trainer = cases.trainer(tmp_path)
    for version, lines in ((f"{requires.TESTED[0]}.5", 0), (NEXT, 1), ("2.0.0.dev0", 1)):
        caplog.clear()
        monkeypatch.setattr(trl, "__version__", version)
        with caplog.at_level(logging.WARNING):
            check_trainer(trainer)
        assert sum("is untested" in message for message in caplog.messages) == lines


def test_a_development_version_is_not_older_than_its_release(monkeypatch):
    monkeypatch.setattr(trl, "__version__", "1.15.0.dev0")
    assert not requires.is_before("1.15")
    assert requires.is_before("1.16")


def test_the_release_that_needs_triton_says_so(tmp_path, monkeypatch):
    trainer = cases.trainer(tmp_path)
    monkeypatch.setattr(trl, "__version__", "1.15.0")
    del trainer._step
    with pytest.raises(RuntimeError, match=r"lacks _step.*only with Triton"):
        check_trainer(trainer)


# ---- Signatures -----------------------------------------------------------------------------------------------------


def test_a_method_that_takes_other_arguments_is_named(tmp_path, monkeypatch):
    trainer = cases.trainer(tmp_path)

    def compute_loss(self, model, inputs, weights):
        raise AssertionError

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", compute_loss)
    with pytest.raises(
        RuntimeError,
        match=r"_compute_loss\(self, model, inputs, weights\) has an incompatible signature "
        r"\(missing a required argument: 'weights'\)",
    ):
        LearnAlignCallback(trainer, LearnAlignConfig(warmup_samples=0, stages=[4]))


def test_a_method_that_is_called_with_more_than_what_replaces_it_is_named(tmp_path, monkeypatch):
    def get_train_sampler(self, dataset=None, seed=0):
        raise AssertionError

    trainer = cases.trainer(tmp_path)
    monkeypatch.setattr(GRPOTrainer, "_get_train_sampler", get_train_sampler)
    with pytest.raises(
        RuntimeError,
        match=r"_get_train_sampler\(self, dataset, seed\) is no longer called with \(dataset\)",
    ):
        check_trainer(trainer)


@pytest.mark.parametrize(
    ("place", "use", "expected"),
    [
        ("trl.trainer.utils:nanstd", Called(1, ("dim",)), []),
        ("trl.trainer.utils:nanstd", Called(1, ("axis",)), ["has an incompatible signature"]),
        ("trl.trainer.utils:nanstd", Replaced(("tensor",)), ["is no longer called with (tensor)"]),
        ("trl.trainer.utils:no_such", Called(1), ["trl.trainer.utils:no_such"]),
        ("trl.trainer.utils:nanstd.no_such", Called(1), ["trl.trainer.utils:nanstd.no_such"]),
    ],
)
def test_functions_elsewhere_are_checked_too(tmp_path, place, use, expected):
    found = missing_names(cases.trainer(tmp_path), [Required(functions={place: use})])
    assert len(found) == len(expected)
    for line, part in zip(found, expected, strict=True):
        assert part in line


# ---- Features that are refused alone --------------------------------------------------------------------------------


@pytest.fixture
def without_gamma_weights(tmp_path, monkeypatch):
    monkeypatch.delattr(GRPOTrainer, "get_gamma_weights")
    return cases.trainer(tmp_path)


def test_what_one_feature_lacks_is_refused_there_and_the_rest_works(without_gamma_weights, caplog):
    trainer = without_gamma_weights
    assert "get_gamma_weights" not in {name for need in compat.NEEDS for name in need.of_trainer}
    reason = f"trl {trl.__version__} lacks get_gamma_weights"
    assert dynamic_sampling_problem(trainer) == reason
    with pytest.raises(ValueError, match=f"Dynamic sampling is not possible here: {reason}"):
        install_dynamic_sampling(trainer, lambda *_: [0], 2.0)
    with caplog.at_level(logging.WARNING):
        assert install_skipping(trainer) == reason
    callback = LearnAlignCallback(
        trainer, LearnAlignConfig(warmup_samples=0, stages=[4], feature_dim=64)
    )
    trainer.add_callback(callback)
    trainer.train()
    assert trainer.state.global_step == callback.plan.total_steps


# ---- The loss that skipping relies on -------------------------------------------------------------------------------


def times(factor):
    """TRL's loss, multiplied by something."""
    loss = GRPOTrainer._compute_loss

    def _compute_loss(self, model, inputs):
        return loss(self, model, inputs) * factor(inputs)

    return _compute_loss


CHANGED = {
    "by the number of rows": lambda inputs: len(inputs["advantages"]),
    "by the tokens of all rows": lambda inputs: inputs["completion_mask"].sum(),
    "by the width": lambda inputs: inputs["completion_mask"].shape[1],
    "by nothing": lambda inputs: inputs["advantages"].abs().sum() * float("nan"),
}


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo"])
@pytest.mark.parametrize("change", CHANGED)
def test_rows_are_not_skipped_under_a_loss_that_divides_otherwise(
    tmp_path, monkeypatch, loss_type, change
):
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", times(CHANGED[change]))
    trainer = cases.trainer(tmp_path, loss_type=loss_type, beta=0.0)
    before = dict(vars(trainer))
    problem = install_skipping(trainer)
    assert "the loss of rows with a gradient depends on those without one" in problem
    assert vars(trainer) == before


def test_rows_are_skipped_under_a_loss_that_is_only_scaled(tmp_path, monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", times(lambda inputs: 3.0))
    assert isinstance(install_skipping(cases.trainer(tmp_path, beta=0.0)), ZeroAdvantageFilter)


def test_a_loss_that_cannot_be_tried_is_not_skipped_under(tmp_path, monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", times(lambda inputs: inputs["no_such"]))
    problem = install_skipping(cases.trainer(tmp_path, beta=0.0))
    assert problem.endswith("could not be tested (KeyError('no_such'))")
