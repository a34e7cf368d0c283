"""What the installed release of TRL must be like. Run with every release that is supported (make test-compat)."""

import inspect

import cases
import pytest
import skipping_cases
import trl
from trl import GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration

from trl_learnalign.bridge import compat, requires
from trl_learnalign.bridge.compat import check_trainer
from trl_learnalign.bridge.dynamic_sampling import dynamic_sampling_problem
from trl_learnalign.bridge.objective import DENOMINATORS
from trl_learnalign.bridge.requires import missing_names
from trl_learnalign.bridge.skipping import install_skipping


def test_everything_that_is_needed_is_there(tmp_path):
    trainer = cases.trainer(tmp_path)
    check_trainer(trainer)
    assert missing_names(trainer, compat.OPTIONAL) == []
    assert dynamic_sampling_problem(trainer) is None


@pytest.mark.parametrize("loss_type", DENOMINATORS)
def test_skipped_rows_change_no_gradient_or_are_not_skipped(tmp_path, loss_type):
    """trl 1.8 and 1.9 average one loss over padding, too."""
    settings = dict(loss_type=loss_type, gradient_accumulation_steps=2, steps_per_generation=2)
    problem = install_skipping(cases.trainer(tmp_path / "tried", **settings))
    if loss_type == "luspo" and requires.is_before("1.10"):
        assert problem == (
            f"trl {trl.__version__} with loss_type='luspo': the loss of rows with a gradient depends on those "
            "without one"
        )
        return
    assert not isinstance(problem, str), problem
    _, stock, _ = skipping_cases.trained(tmp_path / "stock", False, max_steps=2, **settings)
    _, ours, _ = skipping_cases.trained(tmp_path / "ours", True, max_steps=2, **settings)
    assert sum(ours.rows) < sum(stock.rows)
    assert max(skipping_cases.distances(stock.gradients, ours.gradients)) < skipping_cases.ROUNDING


def test_a_generation_is_counted_or_dynamic_sampling_is_refused(tmp_path):
    problem = dynamic_sampling_problem(cases.trainer(tmp_path, mask_truncated_completions=True))
    assert (problem is not None) == requires.is_before("1.9")
    assert problem is None or "trl 1.8 also counts masked tokens in its normaliser" in problem


def test_vllm_fetches_weights_by_the_step():
    """What makes the engine fetch weights again that were changed between two steps (`weights_changed`)."""
    code = inspect.getsource(GRPOTrainer)
    assert "self._last_loaded_step = -1" in code
    assert "self.state.global_step != self._last_loaded_step" in code
    assert list(inspect.signature(VLLMGeneration.sync_weights).parameters) == ["self"]
