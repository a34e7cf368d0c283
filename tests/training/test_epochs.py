"""Epochs of staged runs, and what other callbacks may ask for."""

import logging

import cases
import sampling_cases
from stock_cases import Recorder
from transformers import TrainerCallback

from trl_learnalign import LearnAlignCallback, LearnAlignConfig

STAGED = dict(
    stages=[8, 4], stage_epochs=[2], warmup_samples=3, selector="random", order="shuffled"
)


def run(folder, config, callbacks=(), **options):
    trainer = sampling_cases.trainer(
        folder, rows=list(range(16)), evaluated=cases.dataset(4), max_steps=-1, **options
    )
    recorder = Recorder()
    for callback in (recorder, *callbacks):
        trainer.add_callback(callback)
    callback = LearnAlignCallback(trainer, LearnAlignConfig.adaptive(**config))
    trainer.add_callback(callback)
    trainer.train()
    return trainer, callback, recorder.events


def steps_of(events, kind):
    return [event[1] for event in events if event[0] == kind]


def test_each_pass_over_a_stage_is_an_epoch(tmp_path):
    epochs = dict(logging_strategy="epoch", save_strategy="epoch", eval_strategy="epoch")
    trainer, callback, events = run(tmp_path, STAGED, **epochs)
    # Two prompts a step: one pass over three, two over eight, two over four.
    assert [phase.end for phase in callback.plan.phases] == [2, 10, 14]
    ends = [2, 6, 10, 12, 14]
    for kind in ("on_epoch_end", "on_evaluate", "on_save"):
        assert steps_of(events, kind) == ends, kind
    assert steps_of(events, "on_epoch_begin") == [0, *ends[:-1]]
    assert steps_of(events, "on_log")[:-1:2] == ends  # of training, then of evaluation
    assert [event[2] for event in events if event[0] == "on_epoch_end"] == [1, 2, 3, 4, 5]
    assert trainer.state.num_train_epochs == 5


def test_a_boundary_is_saved_once_whatever_else_is(tmp_path):
    for strategy, steps in (("steps", 2), ("steps", 1000), ("epoch", 1000)):
        folder = tmp_path / f"{strategy} {steps}"
        _, callback, events = run(folder, STAGED, save_strategy=strategy, save_steps=steps)
        saved = steps_of(events, "on_save")
        assert len(saved) == len(set(saved))
        assert {phase.end for phase in callback.plan.phases} <= set(saved)


def test_a_wish_for_the_next_epoch_is_answered(tmp_path, caplog):
    class Next(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_epoch_stop = True

    config = dict(order="adaptive", stage_steps=[5])
    with caplog.at_level(logging.WARNING):
        trainer, _, _ = run(tmp_path, config, callbacks=[Next()])
    assert trainer.state.global_step == 5
    assert caplog.text.count("A callback set should_epoch_stop at step 1") == 1
    assert caplog.text.count("should_epoch_stop at") == 1


def test_a_callback_that_is_not_added_changes_nothing(tmp_path):
    trainer = sampling_cases.trainer(tmp_path, rows=list(range(8)))
    LearnAlignCallback(trainer, LearnAlignConfig.adaptive(order="trainer"))
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    assert [event[2] for event in recorder.events if event[0] == "on_step_end"] == [0.25, 0.5]


def test_the_last_of_several_callbacks_for_one_trainer_tells_of_its_passes(tmp_path):
    trainer = sampling_cases.trainer(tmp_path, rows=list(range(8)), max_steps=-1)
    config = dict(skip_zero_advantages=False, order="shuffled")
    LearnAlignCallback(trainer, LearnAlignConfig.adaptive(stage_epochs=[3], **config))
    trainer.args.max_steps = -1
    trainer.add_callback(
        LearnAlignCallback(trainer, LearnAlignConfig.adaptive(stage_epochs=[2], **config))
    )
    trainer.train()
    assert trainer.state.num_train_epochs == trainer.state.epoch == 2
