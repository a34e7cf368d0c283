"""Ctrl-C while one's own script trains: a sentence that says what is kept, and goes on there."""

import logging
import signal

import cases
import pytest
from transformers import TrainerCallback

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.cli.job import INTERRUPTED, one_sentence_end
from trl_learnalign.training.interruption import RESUME


class CtrlC(TrainerCallback):
    """Sends the signal at the end of a step, as a terminal does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            signal.raise_signal(signal.SIGINT)


def trainer(folder, step=None, **options):
    made = cases.trainer(folder, data=cases.dataset(12), max_steps=6, **options)
    made.add_callback(LearnAlignCallback(made, LearnAlignConfig(feature_dim=64)))
    if step is not None:
        made.add_callback(CtrlC(step))
    return made


@pytest.fixture(autouse=True)
def pythons_handler():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_it_ends_with_a_sentence_that_is_true(tmp_path, caplog):
    interrupted = trainer(tmp_path, step=3, save_strategy="steps", save_steps=2)
    with pytest.raises(KeyboardInterrupt) as ended:
        interrupted.train()
    kept = tmp_path / "checkpoint-2"
    told = f"Interrupted at step 3; {kept} is kept: the same command with resume ({RESUME}) goes on there."
    assert str(ended.value) == told
    assert told in caplog.messages
    again = trainer(tmp_path, save_strategy="steps", save_steps=2)
    with caplog.at_level(logging.INFO, "trl_learnalign"):
        again.train(resume_from_checkpoint=True)
    assert "Resumed at step 2 of 6." in caplog.messages
    assert again.state.global_step == 6


def test_a_recipe_says_it_once(tmp_path, caplog):
    interrupted = trainer(tmp_path, step=3)
    with pytest.raises(SystemExit) as ended, one_sentence_end(interrupted):
        interrupted.train()
    assert ended.value.code == INTERRUPTED
    told = [message for message in caplog.messages if "Interrupted at step 3" in message]
    assert told == [
        "Interrupted at step 3; no checkpoint was saved, so the same command begins anew."
    ]


def test_outside_of_training_ctrl_c_is_pythons_own(tmp_path, caplog):
    broken = trainer(tmp_path)
    broken.add_callback(Fault())
    with pytest.raises(ValueError, match="a fault"):
        broken.train()
    with pytest.raises(KeyboardInterrupt) as ended:
        signal.raise_signal(signal.SIGINT)
    assert not ended.value.args
    assert "Interrupted" not in caplog.text


def test_after_training_the_handler_is_pythons_again(tmp_path):
    trainer(tmp_path).train()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_ones_own_is_left_alone(tmp_path):
    def own(number, frame):
        pass

    signal.signal(signal.SIGINT, own)
    trainer(tmp_path, step=3).train()
    assert signal.getsignal(signal.SIGINT) is own


class Fault(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise ValueError("a fault")
