"""A stock trainer beside our orders, on two processes."""

import cases
import pytest
from launches import launch

from trl_learnalign.bridge import requires

pytestmark = pytest.mark.distributed

WORKER = cases.ROOT / "tests" / "helpers" / "stock_worker.py"
EPOCHS = dict(logging_strategy="epoch", save_strategy="epoch", eval_strategy="epoch")
BEST = dict(load_best_model_at_end=True, metric_for_best_model="eval_reward")
STEPS = dict(logging_steps=1, save_strategy="steps", save_steps=2)
ADAPTIVE = dict(order="adaptive", kill_at=7, **EPOCHS, **BEST)
OWN = dict(order="trainer", kill_at=5, **STEPS, steps_per_generation=2)
SHUFFLED = dict(order="shuffled", kill_at=None, **EPOCHS, gradient_accumulation_steps=2)


STREAM = dict(order="trainer", kill_at=3, max_steps=5, stream=True, prompts=24, **STEPS)


def assert_as_stock(tmp_path, backend, scenarios):
    length = dict(max_steps=-1, num_train_epochs=2)
    scenarios = {name: {**length, **options} for name, options in scenarios.items()}
    for name, found in launch(backend, tmp_path, scenarios, worker=WORKER).items():
        assert found["processes"] == 2
        for part, seen in found["stock"].items():
            assert found["ours"][part] == seen, (name, part)


def test_nobody_else_sees_a_difference_on_two_processes(tmp_path):
    assert_as_stock(tmp_path, "ddp", {"adaptive": ADAPTIVE})


@pytest.mark.slow
@pytest.mark.skipif(requires.is_before("1.9"), reason="trl trains on streams since 1.9")
def test_nobody_else_sees_a_difference_on_two_processes_that_share_a_stream(tmp_path):
    skipping = {**STREAM, "order": "trainer, skipping"}
    assert_as_stock(tmp_path, "ddp", {"all": STREAM, "skipping": skipping})


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "zero2"])
def test_nobody_else_sees_a_difference_on_two_processes_in_any_order(tmp_path, backend):
    scenarios = {"adaptive": ADAPTIVE, "trainer": OWN, "shuffled": SHUFFLED}
    assert_as_stock(tmp_path, backend, scenarios)
