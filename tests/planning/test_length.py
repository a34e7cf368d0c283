"""How long a run is where nothing is chosen but the order: as long as the trainer would have made it."""

import cases
import pytest

from trl_learnalign import LearnAlignCallback, LearnAlignConfig

LENGTHS = [
    {"max_steps": 3},
    {"num_train_epochs": 2},
    {"num_train_epochs": 0.5},
    {},
    {"max_steps": 5, "gradient_accumulation_steps": 2},
]


def steps_of(folder, config, **options):
    """Steps that a trainer ends at, with the callback or without."""
    trainer = cases.trainer(folder, data=cases.dataset(12), **options)
    if config is not None:
        trainer.add_callback(LearnAlignCallback(trainer, config))
    trainer.train()
    return trainer.state.global_step


@pytest.mark.parametrize("options", LENGTHS, ids=str)
def test_a_callback_without_settings_leaves_the_length_of_a_run(tmp_path, options):
    stock = steps_of(tmp_path / "stock", None, **options)
    config = LearnAlignConfig(feature_dim=64)
    assert steps_of(tmp_path / "ours", config, **options) == stock


def test_where_a_generation_is_several_steps_it_is_not_broken_off(tmp_path, caplog):
    options = {"max_steps": 3, "steps_per_generation": 2}
    config = LearnAlignConfig(feature_dim=64)
    assert steps_of(tmp_path, config, **options) == 4
    assert "max_steps=3 is no whole number of generations, of 2 optimizer steps each" in caplog.text


def test_epochs_that_decide_nothing_are_said_to(tmp_path, caplog):
    trainer = cases.trainer(tmp_path / "passes", data=cases.dataset(12), num_train_epochs=2)
    callback = LearnAlignCallback(trainer, LearnAlignConfig(stage_passes=[1]))
    assert "num_train_epochs=2 has no effect" in caplog.text
    passes = callback.plan.total_steps
    trainer = cases.trainer(tmp_path / "epochs", data=cases.dataset(12), num_train_epochs=2)
    assert LearnAlignCallback(trainer, LearnAlignConfig()).plan.total_steps == 2 * passes
