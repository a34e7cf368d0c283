"""How many prompts scoring generates for at once: by engine, memory, setting and record, and never by chance."""

import json
import logging

import cases
import numpy as np
import pytest
import threaded_ranks
import torch
from transformers import MambaConfig

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.distributed import Ranks
from trl_learnalign.measuring import base, generation, rollouts
from trl_learnalign.measuring.generation import (
    Footprint,
    default_scoring_batch_prompts,
    planned_scoring_batch_prompts,
)
from trl_learnalign.records.store import StoreError

G = 4


def config(**options):
    return LearnAlignConfig.adaptive(**{"warmup_samples": 0, "stages": [4], **options})


def default(trainer, **options):
    return default_scoring_batch_prompts(trainer, config(**options), Ranks())


# ---- By engine ------------------------------------------------------------------------------------------------------


def engine(tmp_path, **options):
    return cases.grpo_config(tmp_path, use_vllm=True, **options)


def test_vllm_gets_a_whole_shard(tmp_path):
    assert planned_scoring_batch_prompts(engine(tmp_path), config(), 6) == 128
    assert planned_scoring_batch_prompts(engine(tmp_path), config(shard_size=40), 6) == 40


@pytest.mark.parametrize(("processes", "prompts"), [(1, 128), (8, 128), (16, 64), (600, 2)])
def test_a_request_to_a_server_holds_the_prompts_of_all_processes(tmp_path, processes, prompts):
    args = engine(tmp_path, vllm_mode="server")
    assert planned_scoring_batch_prompts(args, config(), processes) == prompts
    assert (
        planned_scoring_batch_prompts(engine(tmp_path), config(), processes) == 128
    )  # its own engine


def test_the_plan_gives_the_least_that_transformers_will_generate(tmp_path):
    args = cases.grpo_config(tmp_path, per_device_train_batch_size=24)
    assert planned_scoring_batch_prompts(args, config(), 1) == 24 // G
    trainer = cases.trainer(tmp_path, per_device_train_batch_size=24)
    assert default(trainer) >= 24 // G


def test_a_setting_stands_above_everything(tmp_path):
    settings = config(scoring_batch_prompts=3)
    assert planned_scoring_batch_prompts(engine(tmp_path), settings, 1) == 3
    assert default(cases.trainer(tmp_path), scoring_batch_prompts=3) == 3


def test_ones_own_rollouts_come_in_the_portions_of_training(tmp_path):
    trainer = cases.trainer(tmp_path)
    assert default(trainer) > 8 // G
    trainer.rollout_func = lambda prompts, trainer: {}
    assert default(trainer) == 8 // G


def test_processes_take_the_least_of_theirs(tmp_path, monkeypatch):
    trainer = cases.trainer(tmp_path)
    fitting = iter([64, 16, 32])
    monkeypatch.setattr(generation, "rollouts_that_fit", lambda trainer: next(fitting))
    work = lambda ranks: default_scoring_batch_prompts(trainer, config(), ranks)  # noqa: E731
    assert threaded_ranks.on_ranks(3, work) == [16 // G] * 3


# ---- By memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fits", "prompts"), [(0, 2), (7, 2), (17, 4), (127, 16), (10**6, 32)])
def test_memory_is_used_in_powers_of_two_up_to_a_shard_and_never_below_training(
    tmp_path, monkeypatch, fits, prompts
):
    monkeypatch.setattr(generation, "rollouts_that_fit", lambda trainer: fits)
    assert default(cases.trainer(tmp_path), shard_size=32) == prompts


def test_on_a_cpu_there_are_two_limits(tmp_path, monkeypatch):
    trainer = cases.trainer(tmp_path)
    most = default(trainer, shard_size=1000)
    assert most == generation.CPU_ROLLOUTS // G
    rollout = Footprint.of(trainer).rollout
    monkeypatch.setattr(generation, "CPU_BYTES", 40 * rollout)
    assert default(trainer) == 8  # 32 of the 40 rollouts


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gpt2", "opt"])
def test_the_cache_is_as_large_as_transformers_makes_it(tmp_path, family):
    trainer = cases.trainer(tmp_path, cases.model(family))
    longest = max(len(prompt) for prompt in trainer.train_dataset["prompt"])
    tokens = longest + trainer.max_completion_length
    outputs = trainer.model(torch.ones(1, tokens, dtype=torch.long), use_cache=True)
    layers = outputs.past_key_values.layers
    real = sum(part.nbytes for layer in layers for part in (layer.keys, layer.values))
    assert Footprint.of(trainer).cache == real


def test_a_model_without_attention_generates_as_in_training(tmp_path, monkeypatch):
    trainer = cases.trainer(tmp_path)
    monkeypatch.setattr(trainer.model.config, "get_text_config", MambaConfig)
    assert default(trainer) == 8 // G


def test_on_a_gpu_half_of_what_training_leaves_is_used(tmp_path, monkeypatch):
    trainer = cases.trainer(tmp_path)
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    rollout = Footprint.of(trainer).rollout
    # Weights are float32; gradients and two moments come to 12 bytes more.
    free = 2 * 64 * rollout + 16 * parameters
    monkeypatch.setattr(trainer.accelerator.state, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free - 100, free))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 100)
    assert generation.rollouts_that_fit(trainer) == 64
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, free))
    assert generation.rollouts_that_fit(trainer) == 0  # training itself hardly fits


# ---- What is rolled out ---------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """Prompts of each generation call of scoring; the call of number `fails_at` fails."""
    made = Calls()
    roll_out = generation.roll_out

    def counted(trainer, prompts, *arguments):
        made.sizes.append(len(prompts))
        if len(made.sizes) == made.fails_at:
            raise RuntimeError("stopped here")
        return roll_out(trainer, prompts, *arguments)

    monkeypatch.setattr(rollouts, "roll_out", counted)
    return made


class Calls:
    def __init__(self):
        self.sizes, self.fails_at = [], None


def run(folder, **options):
    trainer = cases.trainer(folder)
    settings = config(**{"shard_size": 4, "selector": "learnability", **options})
    callback = LearnAlignCallback(trainer, settings)
    trainer.add_callback(callback)
    trainer.train()
    return callback


@pytest.mark.parametrize(
    ("shard", "prompts", "sizes"),
    [(128, 64, [12]), (128, 8, [6, 6]), (5, 64, [5, 5, 2]), (5, 4, [3, 3, 3, 3, 2])],
)
def test_a_shard_is_rolled_out_in_equal_calls_without_prompts_to_fill_up(
    tmp_path, calls, shard, prompts, sizes
):
    run(tmp_path, shard_size=shard, scoring_batch_prompts=prompts)
    assert calls.sizes == sizes


def test_ranks_measure_shards_of_one_length_side_by_side():
    """Their calls are collectives of one size, and a shorter shard is the same on any number of ranks."""
    pieces = [np.arange(4), np.arange(4), np.arange(4), np.arange(3)]
    assert list(base.batches(pieces, [0, 1, 2, 3], 2)) == [[0, 1], [2], [3]]
    assert list(base.batches(pieces, [1, 3], 8)) == [[1], [3]]
    assert list(base.batches(pieces, [0, 2], 8)) == [[0, 2]]


def interrupted():
    """A measurement that is interrupted after its first shard."""
    with base.Progress("stage_1", 12, 0, quiet=True) as told:
        told.add(4, base.Tally())
        raise KeyboardInterrupt


def test_what_is_under_way_is_not_kept():
    with pytest.raises(KeyboardInterrupt, match="4 of 12 prompts are kept"):
        interrupted()


# ---- Recorded, and kept ---------------------------------------------------------------------------------------------


@pytest.fixture
def begun_with_two(tmp_path, monkeypatch, calls):
    """A run that ended in its second shard, when there was memory for two prompts; now there is more."""
    monkeypatch.setattr(generation, "CPU_ROLLOUTS", 2 * G)
    calls.fails_at = 4
    with pytest.raises(RuntimeError, match="stopped here"):
        run(tmp_path)
    monkeypatch.setattr(generation, "CPU_ROLLOUTS", 4 * G)
    calls.fails_at = None
    calls.sizes.clear()


@pytest.mark.usefixtures("begun_with_two")
def test_a_run_that_begins_again_keeps_its_number_whatever_memory_there_is(tmp_path, calls):
    callback = run(tmp_path)
    assert calls.sizes == [2] * 4  # the second and the third shard
    noted = json.loads((callback.folder / "run.json").read_text())
    assert noted["trainer"]["scoring_batch_prompts"] == 2
    another = run(tmp_path / "another")
    assert another.record.contents.trainer.scoring_batch_prompts == 4


@pytest.mark.usefixtures("begun_with_two")
def test_a_setting_stands_above_the_record_and_what_was_measured_otherwise_is_refused(tmp_path):
    with pytest.raises(StoreError, match="scoring_batch_prompts: the folder has 2, this run 4"):
        run(tmp_path, scoring_batch_prompts=4)


def test_a_resumed_run_keeps_its_number_unless_it_is_set(tmp_path):
    kept = {"ended": {}, "scoring_batch_prompts": 3}
    state = LearnAlignCallback(cases.trainer(tmp_path), config()).state
    state.load_state_dict(kept)
    assert state.scoring_batch_prompts == 3
    trainer = cases.trainer(tmp_path / "fixed")
    fixed = LearnAlignCallback(trainer, config(scoring_batch_prompts=5)).state
    fixed.load_state_dict(kept)
    assert fixed.scoring_batch_prompts == 5


def test_a_gpu_that_is_too_small_is_told_what_to_lower(tmp_path, monkeypatch, caplog):
    trainer = cases.trainer(tmp_path)
    settings = config(scoring_batch_prompts=4, selector="learnability")
    trainer.add_callback(LearnAlignCallback(trainer, settings))

    def too_much(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer, "_generate_and_score_completions", too_much)
    caplog.set_level(logging.ERROR)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    assert "Set a smaller scoring_batch_prompts (now 4) or capture_max_tokens" in caplog.text
