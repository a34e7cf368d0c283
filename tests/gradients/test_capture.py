import itertools

import cases
import oracles
import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from torch import nn

from trl_learnalign.bridge import policy
from trl_learnalign.bridge.hooks import preserve_trainer_state
from trl_learnalign.bridge.inference import last_hidden_states
from trl_learnalign.bridge.policy import gradient_capture, trainable_sizes
from trl_learnalign.gradients.projection import CountSketch, Unprojected
from trl_learnalign.measuring.generation import roll_out
from trl_learnalign.measuring.gradient_features import GradientFeaturizer, plan_micro_batches


def groups_of(trainer, prompts=5, seed=0):
    return roll_out(trainer, list(range(prompts)), seed, oracles.SUCCESS)


def features(trainer, groups, budget=10**6, projection=None):
    projection = projection or Unprojected(trainable_sizes(trainer))
    with gradient_capture(trainer, projection) as capture:
        return GradientFeaturizer(trainer, capture, budget, lambda values: values).features(
            groups
        ), capture


def relative_error(found, truth):
    return float((found - truth).norm() / truth.norm())


def assert_exact(trainer, prompts=5):
    with preserve_trainer_state(trainer):
        groups = groups_of(trainer, prompts)
        truth = torch.stack([oracles.full_gradient(trainer, group) for group in groups])
        assert truth.norm() > 0
        for budget in (
            10**6,
            90,
            20,
        ):  # all prompts at once, a few at a time, rollouts of one prompt split
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


@pytest.mark.parametrize(
    "loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"]
)
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_every_loss_type(tmp_path, loss_type, beta):
    policy = tmp_path / "policy"
    cases.model().save_pretrained(policy)
    from transformers import AutoModelForCausalLM

    trainer = cases.trainer(
        tmp_path, AutoModelForCausalLM.from_pretrained(policy), loss_type=loss_type, beta=beta
    )
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
    with preserve_trainer_state(trainer):
        found, capture = features(trainer, groups_of(trainer))
    places = capture.projection._slices
    zero = {name for name, place in places.items() if (found[:, place] == 0).all()}
    # B has a gradient from the first step on; A has one as soon as B is not zero.
    assert zero == ({name for name in places if "lora_A" in name} if fresh else set())


def test_lora_with_a_trainable_embedding(tmp_path):
    lora = LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM"
    )
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


def partitioned(monkeypatch):
    """Make the package take the parameters for partitioned ones."""
    monkeypatch.setattr(policy, "is_sharded", lambda trainer: True)


def test_without_autograd_they_are_missing_with_their_share(tmp_path, monkeypatch):
    policy = cases.model()
    policy.model.layers[0].mlp = Scaled(policy.model.layers[0].mlp)
    trainer = cases.trainer(tmp_path, policy)
    partitioned(monkeypatch)
    with preserve_trainer_state(trainer):
        groups = groups_of(trainer)
        truth = oracles.trainer_gradients(trainer, groups)
        found, capture = features(trainer, groups)
    total = sum(p.numel() for p in policy.parameters())
    assert capture.coverage.share == pytest.approx(1 - 17 / total)
    assert capture.coverage.missing == ["model.layers.0.mlp.gain", "model.layers.0.mlp.shift"]
    missing = torch.zeros(found.shape[1], dtype=torch.bool)
    for name in capture.coverage.missing:
        missing[capture.projection._slices[name]] = True
    assert (found[:, missing] == 0).all()
    assert relative_error(found[:, ~missing], truth[:, ~missing]) < 1e-5


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


class GroupedRMSNorm(nn.Module):
    """What Qwen4-Exp calls an RMSNorm: over halves of the entries."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(16)), 1e-6

    def forward(self, x):
        halves = x.unflatten(-1, (2, 8))
        normed = halves * torch.rsqrt(halves.square().mean(dim=-1, keepdim=True) + self.eps)
        return normed.flatten(-2) * (1 + self.weight)


class Grouped(nn.Module):
    """The norm on states whose halves differ in size."""

    def __init__(self):
        super().__init__()
        self.norm, self.out = GroupedRMSNorm(), nn.Linear(16, 16)
        self.register_buffer("sizes", torch.tensor([1.0, 5.0]).repeat_interleave(8))

    def forward(self, x):
        return self.out(self.norm(x * self.sizes))


def test_a_norm_that_is_one_by_name_only_is_left_to_autograd(tmp_path):
    coverage = assert_exact(cases.trainer(tmp_path, with_layer(Grouped())))
    assert coverage.direct == ["model.layers.0.mlp.second.norm.weight"]


class Both(nn.Module):
    """The sum of a layer and one beside it."""

    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return self.first(x) + self.second(x)


def with_layer(layer):
    """A model that has one more layer beside an MLP."""
    policy = cases.model()
    policy.model.layers[0].mlp = Both(policy.model.layers[0].mlp, layer)
    return policy


class Experts(nn.Module):
    """One expert per token; those that no token goes to are not called."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(8))

    def forward(self, x):
        routes = (100 * x.sum(dim=-1)).long() % len(self.experts)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            if (routes == number).any():
                out[routes == number] = expert(x[routes == number])
        return out


def test_a_module_that_the_first_pass_does_not_call_counts_once_later(tmp_path):
    coverage = assert_exact(cases.trainer(tmp_path, with_layer(Experts())))
    assert not coverage.direct


@pytest.mark.parametrize("family", ["opt", "biogpt", "xglm", "bart"])
def test_learned_positions_and_scaled_embeddings(tmp_path, family):
    coverage = assert_exact(cases.trainer(tmp_path, cases.model(family)))
    assert not coverage.direct


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "option", [dict(scale_grad_by_freq=True), dict(max_norm=0.5), dict(sparse=True)], ids=str
)
def test_embeddings_without_a_rule_are_captured_by_autograd_and_named(tmp_path, option, tied):
    policy = cases.model(tie_word_embeddings=tied)
    for name, value in option.items():
        setattr(policy.model.embed_tokens, name, value)
    coverage = assert_exact(cases.trainer(tmp_path, policy))
    assert coverage.direct == ["model.embed_tokens.weight"]


VIRTUAL = dict(task_type="CAUSAL_LM", num_virtual_tokens=4)


@pytest.mark.parametrize(
    "peft_config",
    [
        PromptTuningConfig(**VIRTUAL),
        PromptEncoderConfig(**VIRTUAL, encoder_hidden_size=16),
        PrefixTuningConfig(**VIRTUAL),
        PrefixTuningConfig(**VIRTUAL, prefix_projection=True, encoder_hidden_size=16),
    ],
    ids=["prompt", "p", "prefix", "prefix with projection"],
)
def test_virtual_tokens(tmp_path, peft_config):
    assert_exact(cases.trainer(tmp_path, cases.model("llama"), peft_config=peft_config))


class Table(nn.Module):
    """Layers of a buffer: the token embedding does not lead to them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.randn(7, 16))
        self.layers = nn.Sequential(
            nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.LayerNorm(16)
        )

    def forward(self, x):
        return self.layers(self.table).mean(dim=0).expand_as(x)


def test_layers_that_no_token_embedding_leads_to(tmp_path):
    policy = with_layer(Table())
    coverage = assert_exact(cases.trainer(tmp_path, policy))
    assert set(coverage.covered) == {name for name, _ in policy.named_parameters()}


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        return self.linear(x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("prompts", [2, 4, 6])
def test_time_first_layers_do_not_mix_prompts(tmp_path, prompts):
    assert_exact(cases.trainer(tmp_path, with_layer(TimeFirst())), prompts)


def test_a_square_batch_does_not_hide_that_a_layer_is_time_first(tmp_path):
    trainer = cases.trainer(tmp_path, with_layer(TimeFirst()))
    with preserve_trainer_state(trainer):
        groups = groups_of(trainer, 5)
        columns = max(g.inputs["prompt_ids"].shape[1] for g in groups)
        columns += max(g.inputs["completion_ids"].shape[1] for g in groups)
        truth = oracles.trainer_gradients(trainer, groups)
        for group in groups:
            for name in ("prompt_ids", "prompt_mask"):
                group.inputs[name] = nn.functional.pad(group.inputs[name], (20 - columns, 0))
        found, _ = features(trainer, groups)
    assert columns < 20  # 5 prompts of 4 rollouts
    assert relative_error(found, truth) < 1e-5


class SecondUse(nn.Module):
    """Uses the weight of a module that is called elsewhere, without calling it."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self._module = [module]

    def forward(self, x):
        weight = self._module[0].weight
        return torch.tanh(x @ weight.T) @ weight


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("of", ["model.embed_tokens", "model.layers.1.mlp.up_proj"])
def test_a_weight_that_is_used_beside_its_module_counts_every_use_once(tmp_path, of, tied):
    policy = cases.model(tie_word_embeddings=tied)
    policy.model.layers[0].mlp = Both(
        policy.model.layers[0].mlp, SecondUse(policy.get_submodule(of))
    )
    coverage = assert_exact(cases.trainer(tmp_path, policy))
    assert coverage.direct == coverage.unfired == [of + ".weight"]


def test_halves_add_up_when_autograd_captures(tmp_path):
    policy = with_layer(SecondUse(nn.Linear(16, 16)))
    policy.model.layers[1].mlp = Scaled(policy.model.layers[1].mlp)
    trainer = cases.trainer(tmp_path, policy)
    with preserve_trainer_state(trainer):
        groups = groups_of(trainer)
        truth = oracles.trainer_gradients(trainer, groups)
        projection = Unprojected(trainable_sizes(trainer))
        with gradient_capture(trainer, projection) as capture:
            halves = GradientFeaturizer(
                trainer, capture, 10**6, lambda values: values, parts=2
            ).features(groups)
    assert relative_error(halves.sum(dim=1), truth) < 1e-5


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma3"])
def test_prompts_of_the_usual_models_share_passes(tmp_path, family):
    trainer = cases.trainer(tmp_path, cases.model(family))
    with preserve_trainer_state(trainer):
        _, capture = features(trainer, groups_of(trainer))
    assert not capture.one_prompt_at_a_time


@pytest.mark.parametrize("factor", [1.0, 1e-6, 1e4])
def test_small_and_large_coefficients_survive_float16(tmp_path, factor):
    trainer = cases.trainer(tmp_path, cases.model("llama"))
    with preserve_trainer_state(trainer):
        groups = groups_of(trainer)
        truth = oracles.trainer_gradients(trainer, groups)
        for group in groups:
            group.inputs["advantages"] = factor * group.inputs["advantages"]
        trainer.model.half()
        found, _ = features(trainer, groups)
    moving = truth.norm(dim=1) > 0
    assert moving.sum() >= 2
    assert nn.functional.cosine_similarity(found[moving], truth[moving]).min() > 0.9999
    assert torch.allclose(found[moving].norm(dim=1) / factor, truth[moving].norm(dim=1), rtol=0.01)


def test_ranks_with_partitioned_parameters_decide_together_before_the_first_pass(
    tmp_path, monkeypatch
):
    """Or one that finds prompts mixed in the middle of a pass would make more passes than the others."""
    partitioned(monkeypatch)
    for name, layer, others in (
        ("mixes here", Shuffling(nn.Identity()), 0),
        ("mixes elsewhere", nn.Identity(), 1),
    ):
        trainer = cases.trainer(tmp_path / name, with_layer(layer))
        votes, batches = [], []

        def most(values, votes=votes, batches=batches, others=others):
            votes.append((values, len(batches)))
            return [max(values[0], others)] if len(values) == 1 else values

        with preserve_trainer_state(trainer):
            groups = groups_of(trainer)
            truth = oracles.trainer_gradients(trainer, groups)
            with gradient_capture(trainer, Unprojected(trainable_sizes(trainer))) as capture:
                original = capture.features
                capture.features = lambda batch, objective, original=original, batches=batches: (
                    batches.append(batch.prompts) or original(batch, objective)
                )
                found = GradientFeaturizer(trainer, capture, 10**6, most).features(groups)
        assert votes[0] == ([1 - others], 0)
        assert votes[1:] == [
            ([0, len(groups)], 0)
        ]  # one at a time: all passes counted before the first
        assert batches == [1] * len(groups)
        assert capture.coverage.missing == []
        assert relative_error(found, truth) < 1e-5


def test_partitioned_layers_that_mix_rows_unexpectedly_are_named_and_no_pass_is_added(
    tmp_path, monkeypatch
):
    partitioned(monkeypatch)
    trainer = cases.trainer(tmp_path, with_layer(Shuffling(nn.Identity())))
    with preserve_trainer_state(trainer):
        groups = groups_of(trainer)
        with gradient_capture(trainer, Unprojected(trainable_sizes(trainer))) as capture:
            capture.rows_lost = lambda batch: []
            GradientFeaturizer(trainer, capture, 10**6, lambda values: values).features(groups)
    expert = "model.layers.0.mlp.second.expert"
    assert capture.coverage.missing == [expert + ".bias", expert + ".weight"]
    assert capture.coverage.share < 1


@pytest.mark.parametrize("family", ["opt", "gpt2", "qwen2"])
def test_last_hidden_states_are_those_of_the_model(family):
    policy = cases.model(family).eval()
    ids = torch.arange(3, 17).view(2, 7)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        found = last_hidden_states(policy, ids, mask)
        truth = policy(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[
            -1
        ]
    assert torch.allclose(found, truth, atol=1e-6)


def test_features_do_not_depend_on_batch_order_or_padding(tmp_path):
    trainer = cases.trainer(tmp_path)
    with preserve_trainer_state(trainer):
        groups = groups_of(trainer, 8)
        whole, _ = features(trainer, groups, projection=CountSketch(512, 0))
        order = [3, 0, 7, 5, 1, 6, 2, 4]
        shuffled, _ = features(trainer, [groups[i] for i in order], projection=CountSketch(512, 0))
        alone = torch.cat(
            [features(trainer, [group], projection=CountSketch(512, 0))[0] for group in groups]
        )
    assert relative_error(shuffled, whole[order]) < 1e-5
    assert relative_error(alone, whole) < 1e-5


@pytest.mark.parametrize("rank", [None, 8])
def test_sketched_features_are_the_sketch_of_the_full_gradient(tmp_path, rank):
    trainer = cases.trainer(tmp_path, cases.model(hidden=32))
    with preserve_trainer_state(trainer):
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
    with preserve_trainer_state(trainer):
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
    with preserve_trainer_state(trainer):
        features(trainer, groups_of(trainer))
    assert [(dict(m._forward_hooks), m.training) for m in trainer.model.modules()] == before
    assert all(p.grad is None and p.requires_grad for p in trainer.model.parameters())
    from trl.trainer import utils

    assert utils._ChunkedLogProbFunction.__module__.startswith("trl.")


def test_memory_for_intermediate_results_does_not_outlive_the_capture(tmp_path):
    trainer, projection = cases.trainer(tmp_path), CountSketch(64, 0)
    with preserve_trainer_state(trainer):
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
    with pytest.raises(MemoryError, match="no space"), preserve_trainer_state(trainer):
        features(trainer, groups_of(trainer), projection=Failing(64, 0))
    assert [(dict(m._forward_hooks), m.training) for m in trainer.model.modules()] == before
    assert all(p.grad is None for p in trainer.model.parameters())
    with preserve_trainer_state(trainer):
        groups = groups_of(trainer)
        found, _ = features(trainer, groups)
        truth = torch.stack([oracles.full_gradient(trainer, group) for group in groups])
    assert relative_error(found, truth) < 1e-5


def test_passes_cover_every_rollout_once_within_the_budget():
    generator = torch.Generator().manual_seed(0)
    for budget, alone in itertools.product((1, 50, 400, 5000), (False, True)):
        tokens = torch.randint(5, 80, (23,), generator=generator).tolist()
        whole, split = plan_micro_batches(tokens, 4, budget, alone)
        seen = [
            (group, row)
            for work in whole + split
            for group in work.groups
            for row in range(4)[work.rows]
        ]
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
    original = GradientFeaturizer.features

    def counting(self, groups):
        captured.extend(group.prompt for group in groups)
        assert all(0 < group.successes.mean() < 1 for group in groups)
        return original(self, groups)

    monkeypatch.setattr(GradientFeaturizer, "features", counting)

    def accuracy_reward(completions, prompts, **_):
        return [float(i % 2) if prompt < "c" else 1.0 for i, prompt in enumerate(prompts)]

    trainer = cases.trainer(tmp_path, rewards=accuracy_reward, data=cases.dataset(8))
    trainer.add_callback(
        LearnAlignCallback(
            trainer, LearnAlignConfig(warmup_samples=0, stages=[4], check_gradients=False)
        )
    )
    trainer.train()
    learnable = [i for i, prompt in enumerate(cases.dataset(8)["prompt"]) if prompt < "c"]
    assert sorted(captured) == learnable
