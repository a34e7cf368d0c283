"""Scoring and training with vLLM: against a transformers model behind vLLM's own interface (`fake_vllm`).

Its random numbers are torch's, as those of an engine in the trainer's process are, so that rollouts can be compared
with those of transformers one by one.
"""

import cases
import pytest
import torch
import vllm_cases
from accelerate.utils import set_seed
from peft import LoraConfig

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.bridge.hooks import preserve_trainer_state
from trl_learnalign.bridge.inference import roll_out, training_rows
from trl_learnalign.records.notes import SelectionNote

pytestmark = [vllm_cases.SPOKEN, pytest.mark.usefixtures("vllm")]


def config(**options):
    """A warm-up, and two stages, so that policies of three moments roll out."""
    defaults = dict(warmup_samples=4, stages=[4, 4], shard_size=4, verbose=False)
    return LearnAlignConfig.adaptive(**{**defaults, **options})


def trained(trainer, settings):
    """A run from random numbers of its own: engines seed those of the process when they are made."""
    callback = LearnAlignCallback(trainer, settings)
    trainer.add_callback(callback)
    set_seed(11)
    trainer.train()
    return callback


def with_vllm(folder, checkpoint, settings, **options):
    return trained(vllm_cases.trainer(folder, checkpoint, **options), settings)


def with_transformers(folder, checkpoint, settings, **options):
    return trained(cases.trainer(folder, vllm_cases.policy_of(checkpoint), **options), settings)


def weights(callback):
    return torch.cat([p.detach().flatten() for p in callback.trainer.model.parameters()])


def scored(callback, stage):
    return callback.record.get(stage, SelectionNote).scoring


def assert_same_run(one, other):
    """The same rollouts scored, the same prompts selected, and trained to the same weights but for rounding."""
    for stage in ("stage_1", "stage_2"):
        ours, theirs = one.record.read_stage(stage), other.record.read_stage(stage)
        for column in ("success_rate", "mean_completion_length", "rank", "selected"):
            assert ours[column].to_pylist() == theirs[column].to_pylist()
        ours_scores = torch.tensor(ours["score"].to_pylist())
        assert torch.allclose(ours_scores, torch.tensor(theirs["score"].to_pylist()), atol=1e-5)
        assert sum(ours_scores > 0) > 2  # there is something to compare
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=1e-4)


def test_a_run_is_the_one_that_transformers_generates(tmp_path, checkpoint):
    settings = config(scoring_batch_prompts=2)
    engine = with_vllm(tmp_path / "vllm", checkpoint, settings)
    assert_same_run(engine, with_transformers(tmp_path / "plain", checkpoint, settings))


@pytest.mark.slow
def test_a_shard_is_one_call(tmp_path, checkpoint):
    callback = with_vllm(tmp_path, checkpoint, config())
    rows = vllm_cases.core(callback.trainer).rows
    assert rows == [8, 8, *[16] * 3, 8, 8, *[16] * 2, 8, 8]


# ---- Weights --------------------------------------------------------------------------------------------------------


class Moments:
    """Digests of the trainer's weights when it generates, and whether that was for scoring."""

    def __init__(self, trainer):
        self.model, self.digests = trainer.model, []
        generation = trainer.vllm_generation
        self.generate = generation.generate
        generation.generate = self.noted

    def noted(self, *arguments, **named):
        # The module is known only while vLLM is installed.
        from vllm.engine.core import digest

        self.digests.append(digest(self.model.named_parameters()))
        return self.generate(*arguments, **named)


@pytest.mark.parametrize(
    "after_warmup", [pytest.param("continue", marks=pytest.mark.slow), "restart"]
)
def test_every_generation_is_by_the_weights_of_its_moment(tmp_path, checkpoint, after_warmup):
    """After a restart the step is the same and the weights are others, which TRL alone would not see."""
    trainer = vllm_cases.trainer(tmp_path, checkpoint)
    moments = Moments(trainer)
    trained(trainer, config(after_warmup=after_warmup))
    assert moments.digests == vllm_cases.core(trainer).generations
    before_training, scoring, first_step = (moments.digests[i] for i in (0, 2, 5))
    assert scoring != before_training
    assert (first_step == before_training) == (after_warmup == "restart")


@pytest.mark.parametrize("sleeps", [pytest.param(False, marks=pytest.mark.slow), True])
def test_training_goes_on_as_if_nothing_had_been_scored(tmp_path, checkpoint, sleeps):
    """All that is left is taken, scored or not: the same steps, generations and weights, to the last bit."""
    runs = []
    for skips in (False, True):
        settings = config(
            warmup_samples=0,
            stages=[4, 8],
            selector=["random", "learnalign"],
            skip_forced_scoring=skips,
        )
        folder = tmp_path / str(skips)
        callback = with_vllm(folder, checkpoint, settings, vllm_enable_sleep_mode=sleeps)
        runs.append(callback)
    with_scoring, without = (vllm_cases.core(run.trainer) for run in runs)
    assert len(with_scoring.rows) == len(without.rows) + 2
    of_training = with_scoring.generations[:2] + with_scoring.generations[4:]
    assert of_training == without.generations
    assert torch.equal(weights(runs[0]), weights(runs[1]))
    if not sleeps:  # an engine that slept is given its weights again anyway
        assert with_scoring.loads == without.loads


@pytest.mark.slow
def test_adapters_are_merged_for_the_engine_alone(tmp_path, checkpoint):
    lora = dict(peft_config=LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    settings = config(scoring_batch_prompts=2)
    engine = with_vllm(tmp_path / "vllm", checkpoint, settings, **lora)
    plain = with_transformers(tmp_path / "plain", checkpoint, settings, **lora)
    assert_same_run(engine, plain)
    model = engine.trainer.model
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    engine.trainer.vllm_generation.sync_weights()
    projection = model.base_model.model.model.layers[0].self_attn.q_proj
    change = projection.lora_B["default"].weight @ projection.lora_A["default"].weight
    assert change.any()
    merged = projection.base_layer.weight + projection.scaling["default"] * change
    of_engine = vllm_cases.core(engine.trainer).model.model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(of_engine, merged)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, before[name])


def test_rollouts_of_scoring_are_drawn_by_the_seed_of_their_call(tmp_path, checkpoint):
    """An engine in the trainer's process draws from its random numbers: what was drawn before does not matter."""
    trainer = vllm_cases.trainer(tmp_path, checkpoint)
    rows = training_rows(trainer, trainer.train_dataset, [3] * 4)

    def drawn(seed):
        with preserve_trainer_state(trainer):
            inputs, _rewards = roll_out(trainer, rows, seed)
        return inputs["completion_ids"].tolist()

    first = drawn(1)
    assert drawn(2) != first
    assert drawn(1) == first


# ---- An engine that rounds otherwise --------------------------------------------------------------------------------


@pytest.fixture
def rounding(monkeypatch):
    """The engine computes with weights of 16 bits: its probabilities are not quite the trainer's."""
    from vllm.engine.core import Core

    monkeypatch.setattr(Core, "dtype", torch.bfloat16)


@pytest.mark.usefixtures("rounding")
@pytest.mark.parametrize(
    "mode", ["sequence_mask", pytest.param("token_truncate", marks=pytest.mark.slow)]
)
def test_features_are_gradients_of_trls_corrected_loss(tmp_path, checkpoint, mode):
    trainer = vllm_cases.trainer(tmp_path, checkpoint, vllm_importance_sampling_mode=mode)
    ratios = []
    score = trainer._generate_and_score_completions

    def noted(rows):
        inputs = score(rows)
        ratios.append(inputs["importance_sampling_ratio"])
        return inputs

    trainer._generate_and_score_completions = noted
    callback = trained(trainer, config())
    largest = max(float((ratio - 1).abs().max()) for ratio in ratios)
    assert largest > 1e-3  # the correction is not a multiplication by 1
    for stage in ("stage_1", "stage_2"):
        checked = scored(callback, stage).self_check
        assert checked["prompts"]
        assert checked["relative_error"] < 1e-5


CONTINUAL = dict(
    warmup_samples=0,
    stages=[1.0],
    order="adaptive",
    oversample=2.0,
    max_generation_batches=2,
)


def continual(folder, run, checkpoint, skips):
    settings = LearnAlignConfig.adaptive(**CONTINUAL, skip_zero_advantages=skips, verbose=False)
    return run(folder, checkpoint, settings)


def order_of(callback):
    history = callback.run.steps.history.table()
    return history["index"].to_pylist(), history["success_rate"].to_pylist()


def test_continual_selection_is_the_one_that_transformers_generates(tmp_path, checkpoint):
    engine = continual(tmp_path / "vllm", with_vllm, checkpoint, skips=True)
    plain = continual(tmp_path / "plain", with_transformers, checkpoint, skips=True)
    assert order_of(engine) == order_of(plain)
    torch.testing.assert_close(weights(engine), weights(plain), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("rounding")
def test_skipping_stays_exact_with_the_correction(tmp_path, checkpoint):
    skipped = continual(tmp_path / "skipped", with_vllm, checkpoint, skips=True)
    whole = continual(tmp_path / "whole", with_vllm, checkpoint, skips=False)
    assert order_of(skipped) == order_of(whole)
    torch.testing.assert_close(weights(skipped), weights(whole), rtol=0, atol=1e-4)
