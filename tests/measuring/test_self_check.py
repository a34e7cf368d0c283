"""Captured gradients beside those of TRL's own loss: what is honest passes, what is not is named."""

import json

import architectures
import cases
import numpy as np
import oracles
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.bridge.hooks import preserve_trainer_state
from trl_learnalign.bridge.objective import LocalAccelerator, loss_gradient, objective_gradients
from trl_learnalign.bridge.policy import gradient_capture, trainable_sizes, weights_digest
from trl_learnalign.distributed import Ranks
from trl_learnalign.gradients import layers
from trl_learnalign.gradients.capture import GradientCapture
from trl_learnalign.gradients.projection import CountSketch
from trl_learnalign.measuring import base, gradient_features, self_check
from trl_learnalign.measuring.base import Context
from trl_learnalign.measuring.gradient_features import GradientFeaturizer
from trl_learnalign.measuring.rollouts import GradientMeasure
from trl_learnalign.measuring.self_check import (
    PerParameter,
    SelfCheckError,
    Tolerance,
    compared,
    without_padding,
)


def checked(trainer, rows=12, **options):
    """The summary of the check of one shard."""
    settings = LearnAlignConfig(warmup_samples=0, stages=[4], **{"feature_dim": 256, **options})
    measure = GradientMeasure(
        Context.of(trainer, settings, scoring_batch_prompts=6), only_learnable=True
    )
    with measure.session():
        measure.measure(0, np.arange(rows), rows // 6, True)
    return measure.self_check


def moved_policy(folder, **options):
    """A policy away from its reference, which is loaded from where the policy was."""
    cases.model(**options).save_pretrained(folder / "policy")
    policy = AutoModelForCausalLM.from_pretrained(folder / "policy")

    def move():
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))

    return policy, move


# ---- Honest engines pass --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "gpt2"])
def test_two_prompts_agree_with_the_trainer_to_rounding(tmp_path, family):
    found = checked(cases.trainer(tmp_path, cases.model(family)))
    assert len(found["prompts"]) == 2
    assert 0 < found["relative_error"] < 1e-5
    assert found["of_tolerance"] < 0.1
    # GPT-2 takes positions from where tokens stand, and TRL tells it nothing of the padding.
    assert found.get("depends_on_padding", False) == (family == "gpt2")


@pytest.mark.parametrize(
    "settings",
    [
        {"capture_rank": 8},
        {"projection": "rademacher", "feature_dim": 64},
        {"projection": "none"},
        {"gradient_rollouts": "one_correct"},
        {"reliability": True},
        {"capture_max_tokens": 20},
    ],
    ids=str,
)
def test_every_way_to_capture_is_checked(tmp_path, settings):
    found = checked(cases.trainer(tmp_path, cases.model(hidden=32)), **settings)
    assert 0 < found["relative_error"] < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"loss_type": "grpo", "num_iterations": 2},
        {"mask_truncated_completions": True},
        {"entropy_coef": 0.1},
    ],
    ids=str,
)
def test_trainer_settings_pass(tmp_path, options):
    found = checked(cases.trainer(tmp_path, **options))
    assert found["of_tolerance"] < 0.5


def test_float16_weights_pass(tmp_path):
    trainer = cases.trainer(tmp_path, loss_type="dr_grpo", max_completion_length=6)
    trainer.model.half()
    trainer.max_completion_length = (
        2000  # the share of a token in the loss is below what float16 can say
    )
    assert checked(trainer)["of_tolerance"] < 0.5


def test_adapters_and_a_reference_policy_pass(tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    trainer = cases.trainer(tmp_path, peft_config=lora, beta=0.1)
    assert checked(trainer)["relative_error"] < 1e-5


def test_dropout_passes(tmp_path):
    policy = cases.model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    found = checked(cases.trainer(tmp_path, policy, num_iterations=2))
    assert found["relative_error"] < 1e-5


def test_no_more_rows_are_compared_at_once_than_a_capture_may_hold(tmp_path, monkeypatch):
    rows = []
    compute = loss_gradient

    def spy(trainer, inputs, take):
        rows.append(len(inputs["completion_ids"]))
        compute(trainer, inputs, take)

    monkeypatch.setattr(self_check, "loss_gradient", spy)
    checked(cases.trainer(tmp_path), capture_max_tokens=26)  # up to 13 tokens a row
    assert rows == [2, 2]


# ---- What it must catch ---------------------------------------------------------------------------------------------

UP = "model.layers.1.mlp.up_proj.weight"


def doubled(monkeypatch):
    """One layer counts twice."""
    rule = layers.linear

    def twice(layer, activations, output_grads, sink):
        factor = 2 if UP in layer.names.values() else 1
        rule(layer, activations, factor * output_grads, sink)

    monkeypatch.setattr(layers, "linear", twice)


def dropped(monkeypatch):
    """One layer is left out."""
    rule = layers.linear

    def nothing(layer, activations, output_grads, sink):
        if UP not in layer.names.values():
            rule(layer, activations, output_grads, sink)

    monkeypatch.setattr(layers, "linear", nothing)


def shifted(monkeypatch):
    """Each prompt of a pass gets the gradient of the next one."""
    features = GradientCapture.features
    monkeypatch.setattr(
        GradientCapture, "features", lambda *arguments: features(*arguments).roll(1, dims=0)
    )


def negated(monkeypatch):
    """The loss in the place of the objective."""
    gradients = objective_gradients

    def negative(*arguments):
        logps, entropies = gradients(*arguments)
        return -logps, None if entropies is None else -entropies

    monkeypatch.setattr(gradient_features, "objective_gradients", negative)


@pytest.mark.parametrize("break_it", [doubled, dropped, shifted, negated])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_wrong_capture_stops_the_run_and_is_named(tmp_path, monkeypatch, break_it, bf16):
    trainer = cases.trainer(tmp_path, bf16=bf16)
    break_it(monkeypatch)
    with pytest.raises(
        SelfCheckError, match=r"prompts \[\d+, \d+\].*in (\d+) of (\d+) parameters"
    ) as said:
        checked(trainer)
    if break_it in (doubled, dropped):
        assert f"in 1 of 26 parameters (relative error): {UP} (1)" in str(said.value)
    assert "check_gradients=False continues without this check" in str(said.value)
    assert "not_checked" in checked(trainer, check_gradients=False)


def test_an_embedding_that_loses_its_scale_is_named(tmp_path, monkeypatch):
    rule = layers.embedding

    def unscaled(layer, activations, output_grads, sink):
        rule(layer, activations, output_grads / layer.module.embed_scale, sink)

    monkeypatch.setattr(layers, "embedding", unscaled)
    trainer = cases.trainer(tmp_path, cases.model("gemma3", tie_word_embeddings=False))
    with pytest.raises(
        SelfCheckError, match=r"in 1 of \d+ parameters.*: model\.embed_tokens\.weight \(0\.75\)"
    ):
        checked(trainer)


def test_a_wrong_kl_term_is_seen(tmp_path, monkeypatch):
    """The engine's loss, not TRL's, is given another reference policy."""
    policy, move = moved_policy(tmp_path)
    trainer = cases.trainer(tmp_path, policy, beta=0.1)
    move()
    gradients = objective_gradients

    def without_reference(trainer, inputs, logps, entropies):
        return gradients(
            trainer, {**inputs, "ref_per_token_logps": logps.detach()}, logps, entropies
        )

    assert checked(trainer)["relative_error"] < 1e-5
    monkeypatch.setattr(gradient_features, "objective_gradients", without_reference)
    with pytest.raises(SelfCheckError, match="in 26 of 26 parameters"):
        checked(trainer)


class Gate(nn.Module):
    """Mixes prompts where a pass has more than two: what two prompts captured together do not show."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        mixed = x.mean(dim=(0, 1), keepdim=True) if len(x) > 8 else 0.0
        return self.inner(x) + mixed


def test_the_features_that_go_to_disk_are_compared_too(tmp_path):
    policy = cases.model()
    policy.model.layers[1].mlp = Gate(policy.model.layers[1].mlp)
    with pytest.raises(
        SelfCheckError, match=r"a layer mixes the prompts of a batch.*capture_max_tokens=1"
    ):
        checked(cases.trainer(tmp_path, policy))
    assert checked(cases.trainer(tmp_path, policy), capture_max_tokens=1)["relative_error"] < 1e-5


# ---- Padding that the capture brings --------------------------------------------------------------------------------


def roformer(by=0.05):
    return architectures.minds_padding(len(cases.tokenizer()), by)


def lengths(*texts):
    return Dataset.from_dict({"prompt": list(texts), "solution": ["1"] * len(texts)})


SHORT, LONG = [f"{i}?" for i in range(6)], [f"abcdefghijk{i}?" for i in range(6)]


@pytest.mark.parametrize(
    "texts", [(*SHORT[:3], *LONG[:3]), (*SHORT, *LONG)], ids=["of TRL", "of the capture alone"]
)
def test_a_model_that_minds_padding_is_captured_one_prompt_at_a_time(tmp_path, texts):
    trainer = cases.trainer(tmp_path, roformer(), data=lengths(*texts))
    config = LearnAlignConfig(warmup_samples=0, stages=[4], projection="none")
    measure = GradientMeasure(
        Context.of(trainer, config, scoring_batch_prompts=6), only_learnable=True
    )
    groups = []
    roll_out = measure.roll_out
    measure.roll_out = lambda *arguments: groups.extend(roll_out(*arguments)) or groups
    with measure.session():
        found = measure.measure(0, np.arange(len(texts)), len(texts) // 6, True)
        captured = [groups[row] for row in found["feature_rows"].tolist()]
        truth = [
            oracles.trainer_gradient(trainer, without_padding(group.raw)) for group in captured
        ]
    error = (found["features"] - torch.stack(truth)).norm(dim=1) / torch.stack(truth).norm(dim=1)
    assert len(error) > 3
    assert error.max() < 1e-5
    assert measure.self_check["relative_error"] < 1e-5


def test_a_model_that_does_not_mind_is_not(tmp_path):
    trainer = cases.trainer(tmp_path, roformer(0), data=lengths(*SHORT, *LONG))
    config = LearnAlignConfig(warmup_samples=0, stages=[4], feature_dim=64)
    measure = GradientMeasure(
        Context.of(trainer, config, scoring_batch_prompts=6), only_learnable=True
    )
    with measure.session():
        measure.measure(0, np.arange(12), 2, True)
        assert not measure._engine.capture.one_prompt_at_a_time


@pytest.mark.parametrize("break_it", [doubled, dropped, negated])
def test_what_is_wrong_is_not_taken_for_padding(tmp_path, monkeypatch, break_it):
    monkeypatch.setitem(globals(), "UP", "roformer.encoder.layer.1.intermediate.dense.weight")
    trainer = cases.trainer(tmp_path, roformer(), data=lengths(*SHORT, *LONG))
    break_it(monkeypatch)
    with pytest.raises(SelfCheckError, match=r"differ from those of the trainer's own loss"):
        checked(trainer)


# ---- In a run -------------------------------------------------------------------------------------------------------


def test_pools_and_weights_are_the_same_with_and_without_the_check(tmp_path):
    found = []
    for check_gradients in (True, False):
        trainer = cases.trainer(tmp_path / str(check_gradients))
        config = LearnAlignConfig(
            warmup_samples=0,
            stages=[4],
            feature_dim=128,
            shard_size=6,
            check_gradients=check_gradients,
        )
        callback = LearnAlignCallback(trainer, config)
        trainer.add_callback(callback)
        trainer.train()
        table = (tmp_path / str(check_gradients) / "_learnalign" / "stage_1.parquet").read_bytes()
        found.append(
            (
                cases.pools_of(callback),
                weights_digest(trainer),
                table,
            )
        )
        note = json.loads(
            (tmp_path / str(check_gradients) / "_learnalign" / "run.json").read_text()
        )
        said = note["phases"]["stage_1"]["selection"]["scoring"]["self_check"]
        assert said.get("not_checked") == (None if check_gradients else "check_gradients is off")
    assert found[0] == found[1]


def test_nothing_is_left_behind(tmp_path):
    trainer = cases.trainer(tmp_path)
    trainer.model.train()
    state = torch.get_rng_state()
    checked(trainer)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(
        p.grad is None and p.requires_grad and not p._backward_hooks
        for p in trainer.model.parameters()
    )
    assert all(module.training and not module._forward_hooks for module in trainer.model.modules())
    assert not isinstance(trainer.accelerator, LocalAccelerator)
    assert not trainer._metrics["train"]


def test_finished_shards_are_not_checked_again(tmp_path, monkeypatch):

    trainer = cases.trainer(tmp_path)
    settings = LearnAlignConfig(warmup_samples=0, stages=[4], feature_dim=64)
    work = base.MeasureJob("stage_1", np.arange(8), tmp_path / "stage_1", {}, 4, quiet=True)

    def measured():
        measure = GradientMeasure(
            Context.of(trainer, settings, scoring_batch_prompts=4), only_learnable=True
        )
        base.run(work, measure, Ranks())
        return measure.self_check

    found = measured()
    assert len(found["prompts"]) == 2
    doubled(monkeypatch)
    assert measured() == found  # what was found out when they were measured


def test_it_waits_for_the_first_shard_with_a_gradient(tmp_path):
    def accuracy_reward(completions, prompts, **_):
        return [
            float(i % 2) if int("".join(filter(str.isdigit, p))) >= 5 else 1.0
            for i, p in enumerate(prompts)
        ]

    trainer = cases.trainer(tmp_path, rewards=accuracy_reward)
    settings = LearnAlignConfig(warmup_samples=0, stages=[4], feature_dim=64)
    measure = GradientMeasure(
        Context.of(trainer, settings, scoring_batch_prompts=4), only_learnable=True
    )
    with measure.session():
        measure.measure(0, np.arange(4), 1, True)
        assert measure._check.is_pending
        measure.measure(1, np.arange(4, 8), 1, True)
        assert not measure._check.is_pending
    assert measure.self_check["prompts"] == [5, 6]


# ---- Its parts ------------------------------------------------------------------------------------------------------


def test_each_parameter_has_its_own_sketch_whatever_way_it_is_added():
    torch.manual_seed(0)
    projection = PerParameter(CountSketch(64, 0), ["a", "b"], dim=32)
    rows, columns = torch.randn(2, 5, 7), torch.randn(2, 5, 3)
    product, dense = torch.zeros(2, 128), torch.zeros(2, 128)
    projection.add_outer(product, "b", rows, columns)
    projection.add_dense(dense, "b", rows.transpose(1, 2) @ columns)
    np.testing.assert_allclose(product, dense, rtol=1e-5, atol=1e-5)
    assert not product[:, 64:96].any()
    assert projection.of_features(product).shape == (2, 64)
    assert projection.of_parameters(product)["b"].any()


def test_rounding_is_told_from_errors():
    theirs = {"large": torch.ones(1, 4), "small": torch.full((1, 4), 1e-6)}
    tolerance = Tolerance(1e-3, 1e-5)
    close = {"large": 1.0005 * theirs["large"], "small": torch.zeros(1, 4)}
    assert compared(close, theirs, tolerance).errors == {}
    far = compared({"large": 1.002 * theirs["large"], "small": theirs["small"]}, theirs, tolerance)
    assert far.errors == {"large": pytest.approx(0.002, rel=1e-3)}
    broken = compared(
        {"large": torch.full((1, 4), torch.nan), "small": theirs["small"]}, theirs, tolerance
    )
    assert "large" in broken.errors


# ---- The whole batch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss_type", ["grpo", "dr_grpo", "bnpo", "dapo", "cispo", "sapo", "vespo", "luspo"]
)
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_features_of_a_generation_add_up_to_the_gradient_of_its_training_step(
    tmp_path, loss_type, beta
):
    """TRL's loss of the whole generation in training mode is a weighted sum of the losses of its prompts."""
    policy, move = moved_policy(tmp_path)
    level = "sequence" if loss_type == "luspo" else "token"
    trainer = cases.trainer(
        tmp_path,
        policy,
        loss_type=loss_type,
        beta=beta,
        per_device_train_batch_size=20,
        importance_sampling_level=level,
    )
    move()
    with preserve_trainer_state(trainer):
        from trl_learnalign.measuring.generation import roll_out

        kept = []
        generate = trainer._generate_and_score_completions
        trainer._generate_and_score_completions = lambda rows: (
            kept.append(generate(rows)) or kept[-1]
        )
        groups = roll_out(trainer, list(range(5)), 0, oracles.SUCCESS)
        features = captured_features(trainer, groups)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        (batch,) = kept
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=None)
        gradients = torch.autograd.grad(loss, list(trainer.model.parameters()))
    step = -torch.cat([gradient.flatten() for gradient in gradients])
    tokens = torch.stack([group.raw["completion_mask"].sum() for group in groups]).float()
    by_tokens = loss_type in ("bnpo", "dapo", "cispo", "vespo")
    weights = tokens / tokens.sum() if by_tokens else torch.full((5,), 1 / 5)
    if by_tokens:
        assert len(tokens.unique()) > 1
    assert step.norm() > 0
    assert (weights @ features - step).norm() < 1e-5 * step.norm()


def captured_features(trainer, groups):
    from trl_learnalign.gradients.projection import Unprojected

    projection = Unprojected(trainable_sizes(trainer))
    with gradient_capture(trainer, projection) as capture:
        return GradientFeaturizer(trainer, capture, 10**6, lambda values: values).features(groups)


def test_the_reference_is_the_oracle(tmp_path):
    """Parameter by parameter, in the trainer's order."""
    from trl_learnalign.measuring.generation import roll_out

    trainer = cases.trainer(tmp_path)
    with preserve_trainer_state(trainer):
        for group in roll_out(trainer, [0, 1], 0, oracles.SUCCESS):
            taken = {}
            loss_gradient(trainer, group.raw, taken.__setitem__)
            found = torch.cat(
                [taken[name].flatten() for name, _ in trainer.model.named_parameters()]
            )
            np.testing.assert_allclose(
                -found, oracles.full_gradient(trainer, group), rtol=1e-5, atol=1e-9
            )
