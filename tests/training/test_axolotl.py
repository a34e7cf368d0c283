"""The plugin of axolotl, by axolotl's own order of calls, on a stock trainer."""

import importlib.util
import inspect
import sys

import axolotl_base
import cases
import pandas as pd
import pytest
import yaml
from axolotl_base import Settings

pytest.importorskip("pydantic")

from trl_learnalign import AdaptiveOrderCallback, LearnAlignConfig

MODULE = "trl_learnalign.axolotl"
YAML = f"""
rl: grpo
plugins:
  - {MODULE}.LearnAlignPlugin
learnalign:
  warmup_samples: 0
  stages: [4]
  shard_size: 4
  feature_dim: 64
"""
HAS_AXOLOTL = importlib.util.find_spec("axolotl") is not None


@pytest.fixture
def plugin(monkeypatch):
    """The plugin as the YAML file names it, under axolotl's base class or what stands for it."""
    if not HAS_AXOLOTL:
        for name, module in axolotl_base.modules().items():
            monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield axolotl_base.load_plugin(yaml.safe_load(YAML)["plugins"][0])
    sys.modules.pop(MODULE, None)


def test_a_run_trains_on_what_the_section_chooses(plugin, tmp_path):
    trainer = cases.trainer(tmp_path)
    cfg = Settings(yaml.safe_load(YAML))
    for callback in plugin.add_callbacks_post_trainer(cfg, trainer):
        trainer.add_callback(callback)
    trainer.train()
    records = tmp_path / "_learnalign"
    table = pd.read_parquet(records / "stage_1.parquet")
    chosen = set(table.loc[table["selected"], "index"])
    assert len(chosen) == 4
    assert set(pd.read_parquet(records / "reward_history.parquet")["index"]) == chosen


def test_without_a_section_the_papers_settings_hold(plugin, tmp_path):
    with pytest.raises(ValueError, match="warmup_samples=300, but the pool has 12 prompts"):
        plugin.add_callbacks_post_trainer(Settings(), cases.trainer(tmp_path))


def test_the_other_plugin_trains_in_adaptive_order(plugin, tmp_path):
    plugin = sys.modules[MODULE].AdaptiveOrderPlugin()
    (callback,) = plugin.add_callbacks_post_trainer(Settings(), cases.trainer(tmp_path))
    assert isinstance(callback, AdaptiveOrderCallback)
    assert callback.config == LearnAlignConfig.adaptive()


def test_the_section_is_accepted_by_a_settings_class_with_the_plugin_s_own_mixed_in(plugin):
    from pydantic import BaseModel, ConfigDict, ValidationError

    module, _, name = plugin.get_input_args().rpartition(".")

    class Own(BaseModel):
        model_config = ConfigDict(extra="forbid")
        rl: str

    given = {"rl": "grpo", "learnalign": {"stages": [1000]}}
    with pytest.raises(ValidationError):
        Own(**given)
    merged = type("Merged", (Own, getattr(sys.modules[module], name)), {})
    assert merged(**given).model_dump() == given


def test_an_unknown_setting_is_named_with_the_nearest(plugin, tmp_path):
    cfg = Settings(learnalign={"stagess": [4]})
    with pytest.raises(ValueError, match=r"'stagess' is not a setting; did you mean stages\?"):
        plugin.add_callbacks_post_trainer(cfg, cases.trainer(tmp_path))


@pytest.mark.parametrize("name", ["async_prefetch", "use_data_producer"])
def test_rollouts_that_are_made_ahead_are_refused(plugin, tmp_path, name):
    cfg = Settings(trl={name: True})
    with pytest.raises(ValueError, match=f"trl: {name}: true generates rollouts in advance"):
        plugin.add_callbacks_post_trainer(cfg, cases.trainer(tmp_path))


def test_context_parallelism_is_refused(plugin, tmp_path):
    cfg = Settings(context_parallel_size=2)
    with pytest.raises(
        ValueError, match=r"context_parallel_size: 2 loads prompts .* leave it at 1"
    ):
        plugin.add_callbacks_post_trainer(cfg, cases.trainer(tmp_path))


def names(function):
    return list(inspect.signature(function).parameters)


def test_the_plugin_overrides_hooks_that_there_are(plugin):
    hooks = dict(inspect.getmembers(axolotl_base.BasePlugin, inspect.isfunction))
    own = {name: value for name, value in vars(type(plugin)).items() if inspect.isfunction(value)}
    assert own
    for name, function in own.items():
        assert names(function) == names(hooks[name])


# ---- axolotl itself, where it is installed --------------------------------------------------------------------------

needs_axolotl = pytest.mark.skipif(not HAS_AXOLOTL, reason="axolotl is not installed")


@needs_axolotl
def test_the_stand_in_has_axolotl_s_signatures(plugin):
    from axolotl.integrations.base import BasePlugin

    assert isinstance(plugin, BasePlugin)
    for name, function in inspect.getmembers(axolotl_base.BasePlugin, inspect.isfunction):
        assert names(function) == names(getattr(BasePlugin, name)), name


@needs_axolotl
def test_what_is_refused_are_settings_of_axolotl_s():
    from axolotl.utils.schemas.config import AxolotlInputConfig
    from axolotl.utils.schemas.trl import TRLConfig

    assert {"async_prefetch", "use_data_producer"} <= TRLConfig.model_fields.keys()
    assert {"context_parallel_size", "plugins", "trl"} <= AxolotlInputConfig.model_fields.keys()
    assert "learnalign" not in AxolotlInputConfig.model_fields


@needs_axolotl
@pytest.mark.parametrize("name", ["LearnAlignPlugin", "AdaptiveOrderPlugin"])
def test_axolotl_s_own_trainer_is_given_the_callback_by_its_manager(tmp_path, name):
    from axolotl.core.trainers.grpo.args import AxolotlGRPOConfig
    from axolotl.core.trainers.grpo.trainer import AxolotlGRPOTrainer
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.dict import DictDefault

    manager = PluginManager.get_instance()
    manager.register(f"{MODULE}.{name}")
    assert f"{MODULE}.LearnAlignArgs" in manager.get_input_args()
    section = yaml.safe_load(YAML)["learnalign"] if name == "LearnAlignPlugin" else {}
    cfg = DictDefault(rl="grpo", plugins=[f"{MODULE}.{name}"], learnalign=section)
    trainer = AxolotlGRPOTrainer(
        model=cases.model(),
        reward_funcs=cases.accuracy_reward,
        args=cases.grpo_config(tmp_path, AxolotlGRPOConfig),
        train_dataset=cases.dataset(),
        processing_class=cases.tokenizer(),
    )
    try:
        (callback,) = manager.plugins[f"{MODULE}.{name}"].add_callbacks_post_trainer(cfg, trainer)
    finally:
        del manager.plugins[f"{MODULE}.{name}"]
    trainer.add_callback(callback)
    trainer.train()
    assert callback.additions.not_skipped is None
    assert trainer.state.global_step == callback.plan.total_steps > 0
