"""What trackers see of a run: TensorBoard's event files and a local trackio run, read back."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import cases
import pytest
from transformers import PrinterCallback, TrainerCallback

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.records.notes import SelectionNote

PER_STAGE = {
    "stage",
    "pool_size",
    "size",
    "success_rate",
    "success_rate_selected",
    "learnable_share",
    "score_selected",
    "coverage",
    "scoring_seconds",
}


def train(folder, report_to, **options):
    trainer = cases.trainer(folder, report_to=report_to, run_name="run", **options)
    settings = LearnAlignConfig(warmup_samples=4, feature_dim=64)
    callback = LearnAlignCallback(trainer, settings)
    trainer.add_callback(callback)
    trainer.train()
    return trainer, callback


def boundaries(callback):
    return [phase.start for phase in callback.plan.stages]


def test_tensorboard_shows_each_stage_once_at_its_step(tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    trainer, callback = train(tmp_path, "tensorboard")
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = event_accumulator.EventAccumulator(str(file))
    events.Reload()

    def series(tag):
        return [(event.step, event.value) for event in events.Scalars(tag)]

    tags = {
        tag.removeprefix("train/learnalign/")
        for tag in events.Tags()["scalars"]
        if "learnalign" in tag
    }
    assert tags >= PER_STAGE
    for name in PER_STAGE:
        assert [step for step, _ in series(f"train/learnalign/{name}")] == boundaries(callback), (
            name
        )
    assert [value for _, value in series("train/learnalign/stage")] == [1, 2, 3]
    for name in ("success_rate", "learnable_share", "score_selected"):
        seen = [value for _, value in series(f"train/learnalign/{name}")]
        noted = [getattr(callback.record.get(f"stage_{k}", SelectionNote), name) for k in (1, 2, 3)]
        assert seen == pytest.approx(noted, rel=1e-5), name
    # The trainer's own metrics: once a step, every step, in order.
    for name in ("reward", "loss", "completions/mean_length"):
        steps = [step for step, _ in series(f"train/{name}")]
        assert [step for step in steps if step <= trainer.state.global_step] == list(range(1, 9)), (
            name
        )


def test_nothing_is_logged_twice(tmp_path):
    trainer, callback = train(tmp_path, "none", logging_steps=3)
    ours = [entry for entry in trainer.state.log_history if "learnalign/stage" in entry]
    assert [entry["step"] for entry in ours] == boundaries(callback)
    # Ours come alone: they do not flush the trainer's, which belong to the next step that is logged.
    assert all("reward" not in entry and "loss" not in entry for entry in ours)
    theirs = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
    assert theirs == [3, 6]
    steps = [entry["step"] for entry in trainer.state.log_history]
    assert steps == sorted(steps)


TRACKIO = """
import sys
from pathlib import Path

sys.path += sys.argv[2:]
import test_metrics

if __name__ == "__main__":
    test_metrics.train(Path(sys.argv[1]), "trackio", project="learnalign-test")
"""


@pytest.mark.slow
def test_a_local_trackio_run_holds_them(tmp_path):
    pytest.importorskip("trackio")
    script = tmp_path / "run.py"
    script.write_text(TRACKIO)
    paths = (Path(__file__).parent, cases.ROOT / "tests" / "helpers", cases.ROOT)
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "out"), *map(str, paths)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=cases.HANGS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    read = subprocess.run(
        [sys.executable, "-c", READ],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=cases.HANGS,
    )
    assert read.returncode == 0, read.stderr
    logs = json.loads(read.stdout.splitlines()[-1])
    stages = [entry for entry in logs if any("learnalign/stage" in name for name in entry)]
    assert [entry["train/learnalign/stage"] for entry in stages] == [1, 2, 3]
    # Trackio counts log calls by itself; the step axis is the metric that transformers sends along.
    assert [entry["train/global_step"] for entry in stages] == [2, 5, 7]
    assert {name.removeprefix("train/learnalign/") for name in stages[0]} >= PER_STAGE
    rewards = [
        entry["train/global_step"]
        for entry in logs
        if "train/reward" in entry and "train/loss" in entry
    ]
    assert rewards == list(range(1, 9))


READ = """
import json
from trackio.sqlite_storage import SQLiteStorage

print(json.dumps(SQLiteStorage.get_logs("learnalign-test", "run"), default=str))
"""


def test_a_selection_reaches_callbacks_and_history_and_is_not_printed_twice(tmp_path, capsys):
    """The trainer prints each log as a dictionary; of a selection the story says it in words."""
    heard = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            heard.append(dict(logs))

    class OwnPrinter(PrinterCallback):
        """What a user has made of it goes on to print."""

    for disable_tqdm in (True, False):
        heard.clear()
        trainer = cases.trainer(tmp_path / str(disable_tqdm), disable_tqdm=disable_tqdm)
        settings = LearnAlignConfig.adaptive(warmup_samples=4, stages=[6], feature_dim=64)
        trainer.add_callback(LearnAlignCallback(trainer, settings))
        trainer.add_callback(Tracker())
        before = list(trainer.callback_handler.callbacks)
        trainer.train()
        assert trainer.callback_handler.callbacks == before
        printed = capsys.readouterr().out
        assert "'reward':" in printed  # the trainer's own logs are, as ever
        assert "learnalign/size" not in printed
        assert sum("learnalign/size" in logs for logs in heard) == 1
        assert sum("learnalign/size" in logs for logs in trainer.state.log_history) == 1
    trainer = cases.trainer(tmp_path / "own")
    trainer.add_callback(LearnAlignCallback(trainer, settings))
    trainer.add_callback(OwnPrinter())
    trainer.train()
    assert "learnalign/size" in capsys.readouterr().out


def test_what_is_measured_after_a_phase_is_logged(tmp_path, caplog):
    """The last measurement is made when most trackers are closed; TensorBoard still gets it."""
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    trainer = cases.trainer(tmp_path, report_to="tensorboard", run_name="run")
    values = {"base": 0.25, "stage_1": 0.5}
    callback = LearnAlignCallback(
        trainer,
        LearnAlignConfig.control(stage_steps=2),
        on_phase_end=lambda name, step: {"accuracy": values[name], "n_eval": 8, "right": "10"},
    )
    trainer.add_callback(callback)
    with caplog.at_level(logging.INFO, "trl_learnalign"):
        trainer.train()
    assert "base: held-out accuracy 0.250 on 8 problems" in caplog.messages
    assert "stage_1: held-out accuracy 0.500 on 8 problems" in caplog.messages
    name = "learnalign/phase_end/accuracy"
    logged = [(each["step"], each[name]) for each in trainer.state.log_history if name in each]
    assert logged == [(0, 0.25), (2, 0.5)]
    shown = []
    for file in tmp_path.rglob("events.out.tfevents.*"):
        events = event_accumulator.EventAccumulator(str(file))
        events.Reload()
        if f"train/{name}" in events.Tags()["scalars"]:
            shown += [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
    assert sorted(shown) == logged
