"""Rules for layers of one's own: a right one is exact, a wrong one is stopped, a careless one is refused."""

import functools
import json
import logging

import cases
import exactness
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.bridge.hooks import preserve_trainer_state
from trl_learnalign.gradients import layers
from trl_learnalign.gradients.layers import find_rule, register_rule
from trl_learnalign.measuring.fingerprint import code_identity
from trl_learnalign.measuring.self_check import SelfCheckError

GAIN = "model.layers.0.mlp.scale.weight"


class ChannelScale(nn.Module):
    """Scales each channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x


class ReversedScale(ChannelScale):
    """Another computation under the same roof."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight.flip(0) * x


class Shifted(nn.Embedding):
    """A table that is not looked up at the ids themselves."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return 2 * nn.functional.embedding((ids + 1) % self.num_embeddings, self.weight)


class Scaled(nn.Module):
    """An MLP, and a layer of one's own behind it."""

    def __init__(self, inner: nn.Module, scale: nn.Module):
        super().__init__()
        self.inner = inner
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale(self.inner(x))


def channel_scale(layer, activations, output_grads, sink):
    """`y = w·x`: `dw = Σ g·x`."""
    sink.add_sum(layer.names["weight"], output_grads.float() * activations.float())


def forgetful(layer, activations, output_grads, sink):
    """Leaves out the layer's input."""
    sink.add_sum(layer.names["weight"], output_grads)


def idle(layer, activations, output_grads, sink):
    """Adds nothing."""


def shifted(layer, activations, output_grads, sink):
    module = layer.module
    ids = (activations + 1) % module.num_embeddings
    sink.add_rows(layer.names["weight"], ids, 2 * output_grads, module.num_embeddings)


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(layers, "_registered", {})


def scaled_policy(scale=ChannelScale):
    policy = cases.model()
    policy.model.layers[0].mlp = Scaled(policy.model.layers[0].mlp, scale(16))
    return policy


def verdict(folder, policy):
    """Features of a model against the gradient of TRL's own loss, in every way of batching."""
    made = exactness.trainer(folder, policy)
    with preserve_trainer_state(made):
        truth = exactness.training_gradients(made)
    return exactness.judge_trainer(made, truth)


def train(folder, policy=None, **settings):
    trainer = cases.trainer(folder, policy or scaled_policy())
    options = {"warmup_samples": 0, "stages": [4], "feature_dim": 256, **settings}
    trainer.add_callback(LearnAlignCallback(trainer, LearnAlignConfig(**options)))
    trainer.train()
    note = json.loads((folder / "_learnalign" / "run.json").read_text())["phases"]["stage_1"]
    return note["selection"]["scoring"]


# ---- Right and wrong rules ------------------------------------------------------------------------------------------


def test_without_a_rule_autograd_captures_the_layer(tmp_path):
    found = verdict(tmp_path, scaled_policy())
    assert (found.status, found.direct) == ("direct", [GAIN])


def test_with_a_right_rule_the_features_are_trls_own_gradient(tmp_path):
    register_rule(ChannelScale)(channel_scale)
    found = verdict(tmp_path, scaled_policy())
    assert (found.status, found.direct, found.alone) == ("exact", [], False)


def test_a_rule_for_an_embedding_of_ones_own_gets_the_ids_of_the_call(tmp_path):
    policy = cases.model(tie_word_embeddings=False)
    table = Shifted(len(cases.tokenizer()), 16)
    policy.set_input_embeddings(table)
    register_rule(Shifted, override=True)(shifted)
    assert verdict(tmp_path, policy).status == "exact"


def test_a_run_with_a_right_rule_passes_the_self_check(tmp_path):
    register_rule(ChannelScale)(channel_scale)
    scoring = train(tmp_path)
    assert scoring["coverage"] == {"share": 1.0, "direct": [], "missing": [], "unfired": []}
    assert 0 < scoring["self_check"]["relative_error"] < 1e-5


@pytest.mark.parametrize("rule", [forgetful, idle])
def test_a_wrong_rule_is_stopped_by_the_self_check_and_named(tmp_path, rule):
    register_rule(ChannelScale)(rule)
    with pytest.raises(SelfCheckError) as caught:
        train(tmp_path)
    count = len(list(scaled_policy().parameters()))
    assert f"in 1 of {count} parameters (relative error): {GAIN} (" in str(caught.value)
    assert "Check the rules that were registered for ChannelScale" in str(caught.value)
    record = json.loads((tmp_path / "_learnalign" / "run.json").read_text())
    assert "stage_1" not in record["phases"]


def test_a_rule_that_is_mended_is_not_given_the_features_of_the_wrong_one(tmp_path):
    """Who switches the self-check off has only this."""
    register_rule(ChannelScale)(forgetful)
    trainer = cases.trainer(tmp_path / "a", scaled_policy())
    before = code_identity(trainer)
    register_rule(ChannelScale, override=True)(channel_scale)
    after = code_identity(trainer)
    assert before.keys() == after.keys()
    assert {name for name in after if before[name] != after[name]} == {"layer_rules"}
    assert list(after["layer_rules"]) == ["ChannelScale"]
    # Of no concern to a model that has no such layer.
    assert "layer_rules" not in code_identity(cases.trainer(tmp_path / "b"))


# ---- Whom a rule is for ---------------------------------------------------------------------------------------------


def test_a_rule_is_for_the_class_and_for_subclasses_that_compute_the_same():
    class Named(ChannelScale):
        pass

    assert find_rule(ChannelScale(4), {"weight"}) is None
    assert register_rule(ChannelScale)(channel_scale) is channel_scale
    assert find_rule(ChannelScale(4), {"weight"}) is channel_scale
    assert find_rule(Named(4), {"weight"}) is channel_scale
    assert find_rule(ReversedScale(4), {"weight"}) is None


def test_a_layer_whose_forward_was_replaced_has_no_rule():
    register_rule(ChannelScale)(channel_scale)
    layer = ChannelScale(4)
    layer.forward = lambda x: x
    assert find_rule(layer, {"weight"}) is None


def test_one_rule_for_several_classes():
    register_rule(ChannelScale, ReversedScale)(idle)
    assert find_rule(ChannelScale(4), {"weight"}) is idle
    assert find_rule(ReversedScale(4), {"weight"}) is idle


# ---- Refusals -------------------------------------------------------------------------------------------------------


class MyRMSNorm(nn.Module):
    """Its name is one that a built-in rule looks at."""


@pytest.mark.parametrize(
    ("module_class", "rule"),
    [
        (nn.Linear, "linear"),
        (Conv1D, "conv1d"),
        (nn.Embedding, "embedding"),
        (nn.LayerNorm, "layer_norm"),
        (MyRMSNorm, "rms_norm"),
    ],
)
def test_a_built_in_rule_is_not_replaced_in_silence(module_class, rule):
    name = module_class.__name__
    message = (
        rf"register_rule\({name}\): the layer already has the built-in rule '{rule}'. Pass override"
    )
    with pytest.raises(ValueError, match=message):
        register_rule(module_class)
    register_rule(module_class, override=True)(idle)
    assert layers.registered_rule(module_class) is idle


def test_nor_is_a_registered_one():
    register_rule(ChannelScale)(channel_scale)
    with pytest.raises(
        ValueError, match=r"has the registered rule 'channel_scale'\. Pass override"
    ):
        register_rule(ReversedScale, ChannelScale)
    assert find_rule(ReversedScale(4), {"weight"}) is None  # nothing of it was registered
    register_rule(ChannelScale, override=True)(idle)
    assert find_rule(ChannelScale(4), {"weight"}) is idle


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (channel_scale, r"register_rule\(<function channel_scale .*: give the class of a layer"),
        (ChannelScale(4), r"register_rule\(ChannelScale\(\)\): give the class of a layer"),
        (str, r"register_rule\(<class 'str'>\): give the class of a layer"),
        ("ChannelScale", "give the class of a layer"),
    ],
)
def test_what_is_no_layer_class_is_refused(what, message):
    with pytest.raises(TypeError, match=message):
        register_rule(what)


def test_a_rule_for_no_layer_is_refused():
    with pytest.raises(TypeError, match=r"needs the class of a layer"):
        register_rule()


@pytest.mark.parametrize(
    "rule",
    [None, "channel_scale", lambda layer, activations: None, functools.partial(idle, None)],
    ids=["nothing", "a name", "too few arguments", "too many left"],
)
def test_what_cannot_be_called_as_a_rule_is_refused(rule):
    with pytest.raises(TypeError, match=r"is not a layer rule: a rule is a function"):
        register_rule(ChannelScale)(rule)
    assert find_rule(ChannelScale(4), {"weight"}) is None


def test_a_partial_and_an_object_can_be_rules(caplog):
    class Rule:
        def __call__(self, layer, activations, output_grads, sink):
            pass

    with caplog.at_level(logging.WARNING):
        register_rule(ChannelScale)(Rule())
        register_rule(ReversedScale)(functools.partial(channel_scale))
    assert find_rule(ChannelScale(4), {"weight"}) is not None
