"""What recipes print of the trainer's log: a line for each, over the bar or without one."""

import re

import cases
import pytest
from transformers import PrinterCallback, TrainerCallback, TrainerState
from transformers.trainer_callback import ProgressCallback

from trl_learnalign.cli.console import ShortLog, ShortPrinter, log_line, shorten_logs

STATE = TrainerState(global_step=5, max_steps=15)


def test_what_matters_of_a_log_fits_a_line():
    logs = {"loss": 0.1, "reward": 0.41234, "completions/mean_length": 23.6, "epoch": 2.0}
    logs |= {"completions/clipped_ratio": 0.375, "kl": 1e-3, "grad_norm": 0.4321}
    logs |= {"learning_rate": 8.667e-07, "rewards/accuracy_reward/mean": 0.4, "clip_ratio/low": 0}
    line = log_line(logs, STATE)
    assert line == (
        "step 5 of 15: reward 0.412, 24 tokens, 38% cut off, KL 0.001, grad norm 0.432, lr 8.7e-07"
    )
    assert len(line) < 100
    assert log_line({"eval_reward": 0.5, "eval_loss": 0.0}, STATE) == (
        "step 5 of 15: eval reward 0.500"
    )


@pytest.mark.parametrize(
    "logs", [{}, {"train_runtime": 3.0}, {"learnalign/size": 6}, {"reward": None}]
)
def test_what_holds_no_reward_has_no_line(logs):
    assert log_line(logs, STATE) == ""


@pytest.mark.parametrize(
    ("without_bar", "short", "long"),
    [(True, ShortPrinter, PrinterCallback), (False, ShortLog, ProgressCallback)],
)
def test_a_trainer_prints_lines_and_trackers_get_everything(
    tmp_path, capsys, without_bar, short, long
):
    heard = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            heard.append(dict(logs))

    trainer = cases.trainer(tmp_path, disable_tqdm=without_bar, max_steps=3)
    shorten_logs(trainer)
    trainer.add_callback(Tracker())
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert kinds.count(short) == 1
    assert long not in kinds
    trainer.train()
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("step ")]
    assert [re.match(r"step (\d) of 3: reward", line)[1] for line in lines] == ["1", "2", "3"]
    assert "'loss'" not in printed
    assert all("entropy" in logs for logs in heard[:3])
    assert len(trainer.state.log_history) == 4
