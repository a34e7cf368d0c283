"""The quick part of `make test-exactness`: families, adapters and settings that exercise different rules."""

import architectures
import cases
import exactness
import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from trl_learnalign.gradients import capture, layers

CASES = {case.key: case for case in exactness.every_case()}
RULES = ["qwen2", "gpt2", "gemma3_text", "olmo2", "phi", "opt", "biogpt"]
WITHOUT_RULES = ["mamba", "mixtral", "bloom", "falcon"]
ADAPTERS = ["DoRA", "LoRA, head and embedding saved", "IA3", "LN tuning"]
SETTINGS = [
    "dapo, beta 0.04, entropy_coef",
    "vespo, beta 0.04",
    "luspo, beta 0, sequence level",
    "cispo, beta 0, num_iterations 2",
]


def judged(key, folder):
    found = exactness.judge(CASES[key], folder)
    assert found.status in ("exact", "direct"), (found.status, found.note, found.differing)
    return found


@pytest.mark.parametrize("family", RULES)
def test_rules_give_the_gradient_of_the_loss_of_trl(tmp_path, family):
    found = judged(f"architecture/{family}", tmp_path)
    assert not found.direct


@pytest.mark.parametrize("family", WITHOUT_RULES)
def test_so_does_autograd_where_there_is_no_rule(tmp_path, family):
    judged(f"architecture/{family}", tmp_path)


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(tmp_path, name):
    judged(f"adapter/{name}", tmp_path)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_the_loss(tmp_path, name):
    judged(f"setting/{name}", tmp_path)


def double(rule, layer, activations, output_grads, sink):
    rule(layer, activations, 2 * output_grads, sink)


def drop(rule, layer, activations, output_grads, sink):
    pass


def shift_by_one_prompt(rule, layer, activations, output_grads, sink):
    rows = len(output_grads) // sink.prompts
    rule(layer, activations.roll(rows, dims=0), output_grads.roll(rows, dims=0), sink)


def find_mutated(mutate, parameter):
    """`find_rule` with the rule of one parameter spoilt."""
    find_rule = layers.find_rule

    def find(module, trainable):
        rule = find_rule(module, trainable)

        def mutated(layer, *arguments):
            if layer.names.get("weight") == parameter:
                mutate(rule, layer, *arguments)
            else:
                rule(layer, *arguments)

        return rule and mutated

    return find


def blamed(found):
    return {name.rpartition(".")[0] for name in found.differing}


@pytest.mark.parametrize("mutate", [double, drop, shift_by_one_prompt])
@pytest.mark.parametrize(
    "parameter", ["model.layers.1.self_attn.v_proj.weight", "model.layers.0.input_layernorm.weight"]
)
def test_a_wrong_capture_is_told_by_the_name_of_the_parameter(
    tmp_path, monkeypatch, mutate, parameter
):
    """The comparison itself: each of these must turn the tests above red."""
    monkeypatch.setattr(capture, "find_rule", find_mutated(mutate, parameter))
    found = exactness.judge(CASES["architecture/qwen2"], tmp_path)
    assert found.status == "wrong"
    assert blamed(found) == {parameter.removesuffix(".weight")}


@pytest.mark.parametrize("mutate", [None, drop])
def test_where_padding_counts_equal_lengths_excuse_nothing_else(tmp_path, monkeypatch, mutate):
    layer = "roformer.encoder.layer.1.output.dense"
    if mutate:
        monkeypatch.setattr(capture, "find_rule", find_mutated(mutate, f"{layer}.weight"))
    policy = architectures.minds_padding(len(cases.tokenizer()))
    case = exactness.Case(
        "architecture", "roformer", lambda folder: exactness.trainer(folder, policy)
    )
    found = exactness.judge(case, tmp_path)
    assert found.equal_lengths
    assert (found.status, blamed(found)) == (("wrong", {layer}) if mutate else ("exact", set()))


def test_every_family_of_the_installed_transformers_is_swept_or_left_out_by_name():
    names = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert len(architectures.FAMILIES) >= 35
    assert set(architectures.FAMILIES) | (architectures.LEFT_OUT & names) == names
    assert set(architectures.SETTINGS) <= set(architectures.FAMILIES)
