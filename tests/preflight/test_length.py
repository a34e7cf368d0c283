"""How long a run is where nothing is chosen but the order: as long as the trainer would have made it."""

import cases
import pytest

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.preflight import checks

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
    config = LearnAlignConfig.adaptive(feature_dim=64)
    assert steps_of(tmp_path / "ours", config, **options) == stock


GEOMETRIES = [
    {"steps_per_generation": 2},
    {"num_iterations": 3},
    {"gradient_accumulation_steps": 3, "steps_per_generation": 2},
    {"gradient_accumulation_steps": 4, "steps_per_generation": 1},
    {"gradient_accumulation_steps": 2, "steps_per_generation": 3, "num_iterations": 3},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_a_length_is_not_rounded_to_whole_generations(tmp_path, geometry):
    """transformers' own count, without training."""
    data = cases.dataset(14)
    trainer = cases.trainer(tmp_path, data=data, **geometry)
    loader = trainer.get_train_dataloader()
    for steps, epochs in ((1, 3.0), (3, 3.0), (7, 3.0), (-1, 0.1), (-1, 1.5), (-1, 2.0)):
        trainer.args.max_steps, trainer.args.num_train_epochs = steps, epochs
        *_, expected = trainer.set_initial_training_values(trainer.args, loader)
        for order in ("adaptive", "shuffled", "trainer"):
            config = LearnAlignConfig.adaptive(order=order)
            plan = checks.plan_run(config, trainer.args, data, cases.accuracy_reward)
            assert plan.total_steps == expected, (steps, epochs, order)


def test_whole_steps_are_said_where_the_trainers_own_passes_end_with_smaller_ones(tmp_path, caplog):
    options = {"gradient_accumulation_steps": 4, "steps_per_generation": 1, "max_steps": 2}
    for data, said in ((cases.dataset(14), True), (cases.dataset(16), False)):
        caplog.clear()
        trainer = cases.trainer(tmp_path, data=data, **options)
        LearnAlignCallback(trainer, LearnAlignConfig.adaptive())
        line = (
            "A pass over the prompts has 7 micro-batches, which is not a multiple of gradient_accumulation_steps=4: "
            "the trainer alone would end each pass with a smaller step of 3."
        )
        assert (line in caplog.text) == said


def test_epochs_that_decide_nothing_are_said_to(tmp_path, caplog):
    trainer = cases.trainer(tmp_path / "passes", data=cases.dataset(12), num_train_epochs=2)
    callback = LearnAlignCallback(trainer, LearnAlignConfig.adaptive(stage_epochs=[1]))
    assert "num_train_epochs=2 has no effect" in caplog.text
    passes = callback.plan.total_steps
    trainer = cases.trainer(tmp_path / "epochs", data=cases.dataset(12), num_train_epochs=2)
    assert LearnAlignCallback(trainer, LearnAlignConfig.adaptive()).plan.total_steps == 2 * passes
