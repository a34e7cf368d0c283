"""Prompts with images: adaptive order, dynamic sampling, selectors without gradients, and what is refused."""

import logging
from collections import Counter

import cases
import pandas as pd
import picture_cases
import pytest
import torch
from adaptive_cases import history, weights
from datasets import Dataset, Features, Value
from interruptions import KillAt, Killed

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.bridge.dynamic_sampling import install_dynamic_sampling
from trl_learnalign.data.prompts import dataset_digest, prompt_id, prompt_text
from trl_learnalign.training.checkpoints import last_complete_checkpoint

LEAVES = dict(warmup_samples=0, stages=[1.0], stage_epochs=[1])
ADAPTIVE = dict(LEAVES, order="adaptive", skip_zero_advantages=True)
SEVERAL = [2, 1, 3, 1] * 3


def run(folder, config, kill_at=None, resume=False, family="qwen2_vl", counts=SEVERAL, **options):
    defaults = dict(
        data=picture_cases.dataset(counts),
        rewards=picture_cases.half_idle_reward,
        save_strategy="steps",
        save_steps=1,
        mixed=0 in counts,
    )
    trainer = picture_cases.trainer(folder, family, **{**defaults, **options})
    callback = LearnAlignCallback(trainer, config)
    trainer.add_callback(callback)
    if kill_at is not None:
        trainer.add_callback(KillAt(kill_at))
    found = last_complete_checkpoint(folder) if resume else None
    trainer.train(resume_from_checkpoint=None if found is None else str(found))
    return trainer, callback


# ---- Order ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"oversample": 1.5, "max_generation_batches": 2}, marks=pytest.mark.slow),
        pytest.param({"adaptive_embeddings": "none"}, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_in_adaptive_order_goes_on_bit_by_bit(tmp_path, caplog, settings):
    """Of Idefics: transformers 5.23 saves the others' vision towers under names that it does not load again."""
    config = LearnAlignConfig(**ADAPTIVE, **settings)
    with caplog.at_level(logging.WARNING):
        trainer, callback = run(tmp_path / "whole", config, family="idefics3")
    expected = history(callback), weights(trainer)
    assert len(expected[0])
    said = [message for message in caplog.messages if "only the text of prompts" in message]
    assert len(said) == (settings == {} or "oversample" in settings)
    for step in (1, callback.plan.total_steps - 1):
        folder = tmp_path / f"killed-{step}"
        with pytest.raises(Killed):
            run(folder, config, kill_at=step, family="idefics3")
        trainer, callback = run(folder, config, resume=True, family="idefics3")
        pd.testing.assert_frame_equal(history(callback), expected[0])
        assert all(torch.equal(a, b) for a, b in zip(weights(trainer), expected[1], strict=True))


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name != "gemma3"))
        for name in picture_cases.PLACES
    ],
)
def test_rows_with_and_without_images_share_an_order(tmp_path, family):
    """Micro-batches of one row: many have no image, on which TRL alone fails."""
    counts = [1, 0, 0] * 4
    options = dict(per_device_train_batch_size=1, gradient_accumulation_steps=8)
    trainer, callback = run(
        tmp_path, LearnAlignConfig(**ADAPTIVE), family=family, counts=counts, **options
    )
    assert trainer.state.global_step == callback.plan.total_steps
    assert set(history(callback)["index"]) <= set(range(12))


def test_the_trainers_own_order_takes_images(tmp_path):
    trainer, _ = run(
        tmp_path, LearnAlignConfig.adaptive(order="trainer"), max_steps=2, counts=[1] * 12
    )
    assert trainer.state.global_step == 2


# ---- Dynamic sampling -----------------------------------------------------------------------------------------------


def read(trainer, batch):
    """Each row's tokens, advantage and log-probability, by one pass over the batch as TRL makes it."""
    names = ("pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "image_sizes")
    images = {
        name: batch[name]
        for name in (*names, "token_type_ids", "mm_token_type_ids")
        if name in batch
    }
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    width = batch["completion_ids"].shape[1]
    with torch.no_grad():
        logps, *_ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, width, **images
        )
    totals = (logps * batch["completion_mask"]).sum(dim=1)
    tokens = [tuple(row[kept.bool()].tolist()) for row, kept in zip(ids, mask, strict=True)]
    numbers = zip(batch["advantages"].tolist(), totals.tolist(), strict=True)
    return list(zip(tokens, numbers, strict=True))


@pytest.mark.parametrize("family", list(picture_cases.PLACES))
def test_rollouts_of_several_batches_keep_their_images(tmp_path, family):
    """Each chosen row means to the model what it meant in the batch that it was rolled out in."""
    trainer = picture_cases.trainer(
        tmp_path,
        family,
        policy=picture_cases.model(family).double(),
        data=picture_cases.dataset([1, 2, 3, 1, 1, 2, 3, 1, 1, 2, 3, 1]),
        rewards=picture_cases.half_idle_reward,
        learning_rate=0.0,
        max_steps=3,
    )
    generate, made, chosen = trainer._generate_and_score_completions, [], []

    def kept(rows):
        batch = generate(rows)
        made.extend(read(trainer, batch))
        return batch

    trainer._generate_and_score_completions = kept
    sampler = install_dynamic_sampling(
        trainer,
        lambda step, start, count: [(5 * step + start + i) % 12 for i in range(count)],
        2.0,
        2,
    )
    sample = sampler._sample

    def kept_choice(*arguments):
        batch = sample(*arguments)
        chosen.extend(read(trainer, batch))
        return batch

    sampler._sample = kept_choice
    trainer.train()
    assert len(made) > len(chosen) == 24
    assert sum(advantage != 0 for _, (advantage, _) in chosen) > 12
    known = {}
    for tokens, numbers in made:
        known.setdefault(tokens, []).append(numbers)
    for tokens, numbers in chosen:
        distances = [
            max(abs(a - b) for a, b in zip(numbers, other, strict=True)) for other in known[tokens]
        ]
        assert min(distances) < 1e-4


# ---- Selectors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", ["learnability", "random"])
def test_selectors_without_gradients_select_from_images(tmp_path, selector):
    config = LearnAlignConfig(selector=selector, warmup_samples=0, stages=[4], stage_epochs=[1])
    trainer, callback = run(tmp_path, config)
    (pool,) = cases.pools_of(callback).values()
    assert len(pool) == 4
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("selector", ["feature_similarity", "ppl_top", "token_length"])
@pytest.mark.slow
def test_selectors_that_read_text_say_that_they_see_no_images(tmp_path, caplog, selector):
    data = picture_cases.dataset(SEVERAL).add_column("solution", ["1"] * 12)
    config = LearnAlignConfig(selector=selector, warmup_samples=0, stages=[4], stage_epochs=[1])
    with caplog.at_level(logging.WARNING):
        run(tmp_path, config, data=data)
    said = Counter("only the text of prompts" in message for message in caplog.messages)
    assert said[True] == (selector != "token_length")


# ---- Refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", ["learnalign", "alignment", "learnalign_coverage"])
def test_gradients_of_images_are_refused(tmp_path, selector):
    trainer = picture_cases.trainer(tmp_path)
    refused = rf"selector='{selector}' needs gradients.*cannot be captured for images.*\['images'\].*learnability"
    with pytest.raises(ValueError, match=refused):
        LearnAlignCallback(trainer, LearnAlignConfig(selector=selector, warmup_samples=0))


def test_images_that_no_column_shows_are_refused_where_gradients_are_taken(tmp_path):
    data = picture_cases.dataset([1] * 12).rename_column("images", "drawn")
    config = LearnAlignConfig(warmup_samples=0, stages=[4], stage_epochs=[1])
    trainer = picture_cases.trainer(tmp_path, data=data, remove_unused_columns=False)
    generate = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda rows: generate(
        [{**row, "images": row["drawn"]} for row in rows]
    )
    trainer.add_callback(LearnAlignCallback(trainer, config))
    with pytest.raises(ValueError, match="rollouts with images cannot be captured"):
        trainer.train()


def test_images_for_a_policy_of_texts_are_refused(tmp_path):
    trainer = cases.trainer(tmp_path, data=picture_cases.dataset([1] * 12))
    for order in ("adaptive", "trainer"):
        with pytest.raises(ValueError, match=r"image column\(s\) \['images'\].*only reads text"):
            LearnAlignCallback(trainer, LearnAlignConfig.adaptive(order=order))


def test_a_reward_history_by_texts_is_refused(tmp_path):
    """Prompts with other images may have the same text."""
    file = tmp_path / "history.parquet"
    prompts = picture_cases.dataset([1] * 12)["prompt"][:]
    ids = list(map(prompt_id, prompts))
    table = {"pass": [1] * 12, "success_rate": [1.0] * 12, "prompt_id": ids}
    pd.DataFrame(table).to_parquet(file)
    config = LearnAlignConfig(
        selector="limr", reward_history=str(file), warmup_samples=0, stages=[4], stage_epochs=[1]
    )
    with pytest.raises(ValueError, match=r"identifies prompts by their text.*\['images'\]"):
        LearnAlignCallback(picture_cases.trainer(tmp_path / "run"), config)


# ---- What a dataset is ----------------------------------------------------------------------------------------------


def with_places(parts):
    content = [{"type": "image", "text": None}, {"type": "text", "text": "what?"}, *parts]
    data = picture_cases.dataset([1] * 12)
    part = {"type": Value("string"), "text": Value("string")}
    features = Features({**data.features, "prompt": [{"role": Value("string"), "content": [part]}]})
    columns = {name: data[name][:] for name in ("images", "number")}
    prompts = [[{"role": "user", "content": content}]] * 12
    return Dataset.from_dict({"prompt": prompts, **columns}, features=features)


def test_prompts_with_places_of_images_are_prompts(tmp_path):
    trainer, callback = run(tmp_path, LearnAlignConfig(**ADAPTIVE), data=with_places([]))
    assert trainer.state.global_step == callback.plan.total_steps
    assert prompt_text(trainer.train_dataset[0]["prompt"]) == "user: <image> what?"


def test_other_parts_are_refused(tmp_path):
    trainer = picture_cases.trainer(tmp_path, data=with_places([{"type": "audio", "text": None}]))
    with pytest.raises(ValueError, match=r"without text \(audio parts are not supported\)"):
        LearnAlignCallback(trainer, LearnAlignConfig(**ADAPTIVE))


def test_the_digest_of_a_dataset_knows_its_images():
    one, same = (picture_cases.dataset([1, 2, 0]) for _ in range(2))
    assert dataset_digest(one) == dataset_digest(same)
    assert dataset_digest(one) != dataset_digest(picture_cases.dataset([1, 1, 0]))
