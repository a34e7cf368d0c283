"""Routed experts, each a module of its own."""

import cases
import pytest

from trl_learnalign.bridge.skipping import unevenly_called


def test_modules_that_only_some_tokens_reach_are_found(tmp_path):
    trainer = cases.trainer(tmp_path, cases.model("routed"))
    found = unevenly_called(trainer)
    assert found
    assert all(name.startswith("model.layers.0.mlp.experts.") for name in found)
    trainer.model.model.layers[0].mlp._z3_leaf = True  # as DeepSpeed marks it
    assert unevenly_called(trainer) == []


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma3", "mixtral"])
def test_no_module_of_the_usual_models_is_reached_by_some_tokens_only(tmp_path, family):
    assert unevenly_called(cases.trainer(tmp_path, cases.model(family))) == []
