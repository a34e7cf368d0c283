import itertools

import cases
import oracles
import pytest
import torch
from peft import LoraConfig
from torch import nn

from trl_learnalign import trainer_bridge as bridge
from trl_learnalign.gradients.features import FeatureEngine, plan_passes
from trl_learnalign.gradients.sketch import CountSketch, Unprojected
from trl_learnalign.rollouts import roll_out


def groups_of(trainer, prompts=5, seed=0):
    return roll_out(trainer, list(range(prompts)), seed, 0, 0.5)


def features(trainer, groups, budget=10**6, projection=None):
    projection = projection or Unprojected(bridge.trainable_sizes(trainer))
    with bridge.gradient_capture(trainer, projection) as capture:
        return FeatureEngine(trainer, capture, budget, lambda values: values).features(groups), capture


def relative_error(found, truth):
    return float((found - truth).norm() / truth.norm())


def assert_exact(trainer, prompts=5):
    with bridge.left_as_found(trainer):
        groups = groups_of(trainer, prompts)
        truth = torch.stack([oracles.full_gradient(trainer, group) for group in groups])
        assert truth.norm() > 0
        for budget in (10**6, 90, 20):  # all prompts at once, a few at a time, rollouts of one prompt split
            found, capture = features(trainer, groups, budget)
            assert relative_error(found, truth) < 1e-5, budget
    return capture.coverage


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("tied", [True, False])
def test_hooks_equal_autograd_for_every_parameter(tmp_path, family, tied):
    policy = cases.model(family, tie_word_embeddings=tied)
    coverage = assert_exact(cases.trainer(tmp_path, policy))
    assert set(coverage.covered) == {name for name, _ in policy.named_parameters()}
    assert coverage.share == 1


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_every_loss_type(tmp_path, loss_type, beta):
    policy = tmp_path / "policy"
    cases.model().save_pretrained(policy)
    from transformers import AutoModelForCausalLM

    trainer = cases.trainer(tmp_path, AutoModelForCausalLM.from_pretrained(policy), loss_type=loss_type, beta=beta)
    with torch.no_grad():  # away from the reference, or the KL term has no gradient
        for parameter in trainer.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    assert_exact(trainer)


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=0.6),
        dict(entropy_coef=0.1),
        dict(top_entropy_quantile=0.4),
        dict(importance_sampling_level="sequence", loss_type="grpo"),
        dict(mask_truncated_completions=True),
        dict(scale_rewards="none"),
        dict(num_iterations=2, steps_per_generation=2),
        dict(gradient_checkpointing=True),
        dict(cast_lm_head_to_fp32=True),
    ],
    ids=str,
)
def test_trainer_settings(tmp_path, options):
    assert_exact(cases.trainer(tmp_path, **options))


def test_dropout_does_not_enter_the_features(tmp_path):
    policy = cases.model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    assert_exact(cases.trainer(tmp_path, policy))


@pytest.mark.parametrize("fresh", [True, False])
def test_lora(tmp_path, fresh):
    """At B = 0 the gradient of A is exactly zero."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    trainer = cases.trainer(tmp_path, peft_config=lora, beta=0.0)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name and not fresh:
                parameter.add_(0.1 * torch.randn_like(parameter))
    coverage = assert_exact(trainer)
    assert all("lora" in name for name in coverage.covered)
    with bridge.left_as_found(trainer):
        found, capture = features(trainer, groups_of(trainer))
    columns = dict(zip(capture.projection._slices, capture.projection._slices.values(), strict=True))
    zero = [name for name, place in columns.items() if (found[:, place] == 0).all()]
    assert all(("lora_A" in name) == fresh for name in columns if name in zero or ("lora_A" in name and fresh))


def test_lora_with_a_trainable_embedding(tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    trainer = cases.trainer(tmp_path, cases.model("llama"), peft_config=lora)
    assert_exact(trainer)


def test_frozen_parameters_are_left_out(tmp_path):
    policy = cases.model("llama")
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_("layers.1" in name or "norm" in name)
    coverage = assert_exact(cases.trainer(tmp_path, policy))
    assert not any("embed" in name or "lm_head" in name for name in coverage.covered)


class Scaled(nn.Module):
    """A layer that no rule knows."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.gain = nn.Parameter(torch.tensor(1.3))
        self.shift = nn.Parameter(torch.full((16,), 0.1))

    def forward(self, x):
        return self.inner(x) * self.gain + self.shift * x.mean(dim=-1, keepdim=True)


def test_parameters_without_a_rule_are_captured_by_autograd_and_named(tmp_path):
    policy = cases.model()
    policy.model.layers[0].mlp = Scaled(policy.model.layers[0].mlp)
    coverage = assert_exact(cases.trainer(tmp_path, policy))
    assert coverage.direct == ["model.layers.0.mlp.gain", "model.layers.0.mlp.shift"]
    assert coverage.missing == []


def test_without_autograd_they_are_missing_with_their_share(tmp_path):
    policy = cases.model()
    policy.model.layers[0].mlp = Scaled(policy.model.layers[0].mlp)
    trainer = cases.trainer(tmp_path, policy)
    with bridge.left_as_found(trainer):
        groups = groups_of(trainer)
        projection = Unprojected(bridge.trainable_sizes(trainer))
        with bridge.gradient_capture(trainer, projection) as capture:
            capture.sharded = True
            capture.coverage.direct, capture.coverage.missing = [], capture.coverage.direct
            capture.one_prompt_at_a_time = False
            found = FeatureEngine(trainer, capture, 10**6, lambda values: values).features(groups)
    total = sum(p.numel() for p in policy.parameters())
    assert capture.coverage.share == pytest.approx(1 - 17 / total)
    assert (found[:, projection._slices["model.layers.0.mlp.shift"]] == 0).all()


def test_modules_that_are_never_called_are_named(tmp_path):
    policy = cases.model()
    mlp = policy.model.layers[1].mlp
    weight = mlp.gate_proj.weight

    def fused(x):  # what a fused kernel does: it uses the weight, not the module
        return mlp.down_proj(mlp.act_fn(x @ weight.T) * mlp.up_proj(x))

    mlp.forward = fused
    coverage = assert_exact(cases.trainer(tmp_path, policy))
    assert coverage.unfired == ["model.layers.1.mlp.gate_proj.weight"]
    assert coverage.direct == coverage.unfired


class Shuffling(nn.Module):
    """Routes tokens away from their rows, as a mixture of experts does."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.expert = nn.Linear(16, 16)

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        order = flat.sum(dim=-1).argsort()
        routed = torch.zeros_like(flat)
        routed[order] = self.expert(flat[order])
        return self.inner(x) + routed.view_as(x)


def test_layers_that_mix_rows_are_captured_one_prompt_at_a_time(tmp_path):
    policy = cases.model()
    policy.model.layers[0].mlp = Shuffling(policy.model.layers[0].mlp)
    coverage = assert_exact(cases.trainer(tmp_path, policy))
    assert "model.layers.0.mlp.expert.weight" in coverage.covered


def test_features_do_not_depend_on_batch_order_or_padding(tmp_path):
    trainer = cases.trainer(tmp_path)
    with bridge.left_as_found(trainer):
        groups = groups_of(trainer, 8)
        whole, _ = features(trainer, groups, projection=CountSketch(512, 0))
        order = [3, 0, 7, 5, 1, 6, 2, 4]
        shuffled, _ = features(trainer, [groups[i] for i in order], projection=CountSketch(512, 0))
        alone = torch.cat([features(trainer, [group], projection=CountSketch(512, 0))[0] for group in groups])
    assert relative_error(shuffled, whole[order]) < 1e-5
    assert relative_error(alone, whole) < 1e-5


@pytest.mark.parametrize("rank", [None, 8])
def test_sketched_features_are_the_sketch_of_the_full_gradient(tmp_path, rank):
    trainer = cases.trainer(tmp_path, cases.model(hidden=32))
    with bridge.left_as_found(trainer):
        groups = groups_of(trainer)
        found, _ = features(trainer, groups, projection=CountSketch(512, 5, rank))
        full = torch.stack([oracles.full_gradient(trainer, group) for group in groups])
    sketch, out, start = CountSketch(512, 5, rank), torch.zeros(len(groups), 512), 0
    for name, parameter in trainer.model.named_parameters():
        part = full[:, start : start + parameter.numel()].view(len(groups), *parameter.shape)
        sketch.add_dense(out, name, part)
        start += parameter.numel()
    assert relative_error(found, out) < 1e-5


def test_bf16_autocast_gives_float32_features_close_to_float32(tmp_path):
    trainer = cases.trainer(tmp_path, bf16=True)
    with bridge.left_as_found(trainer):
        groups = groups_of(trainer)
        found, _ = features(trainer, groups)
        trainer.model.float()
        exact = torch.stack([oracles.full_gradient(trainer, group) for group in groups])
    assert found.dtype == torch.float32
    moving = exact.norm(dim=1) > 0
    assert moving.sum() >= 2
    assert nn.functional.cosine_similarity(found[moving], exact[moving]).min() > 0.99


def test_nothing_is_left_behind(tmp_path):
    trainer = cases.trainer(tmp_path)
    before = [(dict(m._forward_hooks), m.training) for m in trainer.model.modules()]
    with bridge.left_as_found(trainer):
        features(trainer, groups_of(trainer))
    assert [(dict(m._forward_hooks), m.training) for m in trainer.model.modules()] == before
    assert all(p.grad is None and p.requires_grad for p in trainer.model.parameters())
    from trl.trainer import utils

    assert utils._ChunkedLogProbFunction.__module__.startswith("trl.")


def test_memory_for_intermediate_results_does_not_outlive_the_capture(tmp_path):
    trainer, projection = cases.trainer(tmp_path), CountSketch(64, 0)
    with bridge.left_as_found(trainer):
        features(trainer, groups_of(trainer), projection=projection)
    assert not projection._scratch._buffers


def test_nothing_is_left_behind_after_an_exception_in_the_middle_of_a_backward_pass(tmp_path):
    class Failing(CountSketch):
        def add_outer(self, *args):
            if next(calls) == 5:
                raise MemoryError("no space for the product")
            super().add_outer(*args)

    calls = itertools.count()
    trainer = cases.trainer(tmp_path)
    before = [(dict(m._forward_hooks), m.training) for m in trainer.model.modules()]
    with pytest.raises(MemoryError, match="no space"), bridge.left_as_found(trainer):
        features(trainer, groups_of(trainer), projection=Failing(64, 0))
    assert [(dict(m._forward_hooks), m.training) for m in trainer.model.modules()] == before
    assert all(p.grad is None for p in trainer.model.parameters())
    with bridge.left_as_found(trainer):
        groups = groups_of(trainer)
        found, _ = features(trainer, groups)
        truth = torch.stack([oracles.full_gradient(trainer, group) for group in groups])
    assert relative_error(found, truth) < 1e-5


def test_passes_cover_every_rollout_once_within_the_budget():
    generator = torch.Generator().manual_seed(0)
    for budget, alone in itertools.product((1, 50, 400, 5000), (False, True)):
        tokens = torch.randint(5, 80, (23,), generator=generator).tolist()
        whole, split = plan_passes(tokens, 4, budget, alone)
        seen = [(group, row) for work in whole + split for group in work.groups for row in range(4)[work.rows]]
        assert sorted(seen) == [(group, row) for group in range(23) for row in range(4)]
        for work in whole:
            assert max(tokens[i] for i in work.groups) * 4 * len(work.groups) <= budget
            assert len(work.groups) == 1 or not alone
        for work in split:
            rows = len(range(4)[work.rows])
            assert rows == 1 or rows * tokens[work.groups[0]] <= budget


def test_prompts_without_learnability_never_enter_a_forward_pass(tmp_path, monkeypatch):
    from trl_learnalign import LearnAlignCallback, LearnAlignConfig

    captured = []
    original = FeatureEngine.features

    def counting(self, groups):
        captured.extend(group.prompt for group in groups)
        assert all(0 < group.successes.mean() < 1 for group in groups)
        return original(self, groups)

    monkeypatch.setattr(FeatureEngine, "features", counting)

    def accuracy_reward(completions, prompts, **_):
        return [float(i % 2) if prompt < "c" else 1.0 for i, prompt in enumerate(prompts)]

    trainer = cases.trainer(tmp_path, rewards=accuracy_reward, data=cases.dataset(8))
    trainer.add_callback(LearnAlignCallback(trainer, LearnAlignConfig(warmup_samples=0, stages=[4])))
    trainer.train()
    learnable = [i for i, prompt in enumerate(cases.dataset(8)["prompt"]) if prompt < "c"]
    assert sorted(captured) == learnable
