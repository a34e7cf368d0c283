"""Other settings in the folder of an earlier run are refused by their names when the callback is made."""

import cases
import pytest
from datasets import Dataset

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.records.store import StoreError

CONFIG = dict(stages=[6], warmup_samples=2, selector="learnability")


def made(folder, config=None, data=None, **options):
    data = cases.dataset() if data is None else data
    trainer = cases.trainer(folder, data=data, **options)
    return trainer, LearnAlignCallback(
        trainer, LearnAlignConfig.adaptive(**{**CONFIG, **(config or {})})
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer, callback = made(folder)
    trainer.add_callback(callback)
    trainer.train()
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(per_device_train_batch_size=16), r"per_device_train_batch_size.* was 2 and is 4"),
        (dict(gradient_accumulation_steps=2), r"gradient_accumulation_steps.* was 2 and is 4"),
        (dict(num_generations=2), r"num_generations was 4 and is 2"),
        (dict(temperature=0.5), r"; temperature was 1.0 and is 0.5|: temperature was 1.0 and is"),
        (dict(learning_rate=0.5), r"learning_rate was 0.001 and is 0.5"),
        (dict(data=cases.dataset(13)), "the number of rows of train_dataset was 12 and is 13"),
        (dict(config=dict(stages=[7])), r"stages was \[6\] and is \[7\]"),
        (dict(config=dict(warmup_samples=4)), "warmup_samples was 2 and is 4"),
        (dict(config=dict(success_threshold=0.25)), "success_threshold was 0.5 and is 0.25"),
        (dict(config=dict(skip_zero_advantages=False)), "skip_zero_advantages was True and is Fa"),
        (dict(config=dict(order="adaptive")), r"order was None and is \['adaptive'\]"),
        (dict(config=dict(oversample=2)), "oversample was None and is 2"),
    ],
)
def test_a_changed_setting_is_refused_before_training(folder, change, said):
    with pytest.raises(
        StoreError, match=f"{said}.*another output_dir.*restore these settings"
    ) as refused:
        made(folder, **change)
    assert "per_unit" not in str(refused.value)


def test_the_same_settings_are_taken(folder):
    made(folder)


def test_a_folder_whose_record_is_damaged_waits_for_training(folder, tmp_path):
    (tmp_path / "_learnalign").mkdir()
    (tmp_path / "_learnalign" / "run.json").write_text("{")
    made(tmp_path)


def test_an_empty_dataset_is_refused_in_words(tmp_path):
    with pytest.raises(ValueError, match="The training dataset is empty: it needs"):
        made(tmp_path, data=Dataset.from_dict({"prompt": [], "solution": []}))
