"""Nothing measured for another run is reused without a word, and nothing is refused that fits."""

import ast
import copy
import dataclasses
import importlib
import importlib.util
import json
import re
from pathlib import Path

import cases
import pytest
import torch
from environments import Room, pretend_to_call_tools
from peft import LoraConfig
from transformers import TrainerCallback, TrainingArguments
from trl import GRPOConfig

from trl_learnalign import LearnAlignCallback, LearnAlignConfig, bridge
from trl_learnalign.bridge import compat, hooks
from trl_learnalign.bridge.inference import tokenizer
from trl_learnalign.bridge.policy import sampled_digest
from trl_learnalign.measuring import fingerprint
from trl_learnalign.measuring.fingerprint import COSMETIC, MEASURES, TRAINS, code_digest
from trl_learnalign.records.notes import SelectionNote

FIELDS = sorted(field.name for field in dataclasses.fields(GRPOConfig))
CLASSIFIED = [name for names in fingerprint.FIELDS.values() for name in names.split()]


# ---- Settings -------------------------------------------------------------------------------------------------------


def test_what_is_said_to_be_harmless_is_a_field_and_is_listed_once():
    """All others measure: of a new field of TRL or transformers say in `identity.FIELDS` if it changes less."""
    fields = {*FIELDS, *(field.name for field in dataclasses.fields(TrainingArguments))}
    assert set(CLASSIFIED) <= fields
    assert len(set(CLASSIFIED)) == len(CLASSIFIED)
    older = [name for names in fingerprint.OLDER_FIELDS.values() for name in names.split()]
    assert len({*older, *CLASSIFIED}) == len(older) + len(CLASSIFIED)


def test_where_logs_go_is_no_part_of_a_run():
    """transformers 4 puts the time of day into it."""
    assert fingerprint.field_class("logging_dir") == COSMETIC


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    return cases.grpo_config(tmp_path_factory.mktemp("arguments"))


@pytest.mark.parametrize("name", FIELDS)
def test_a_changed_field_changes_what_it_is_said_to_change(arguments, name):
    changed = copy.copy(arguments)
    setattr(changed, name, {"changed": 1})
    for kind in (MEASURES, TRAINS):
        before, after = (
            fingerprint.settings_of(arguments, kind),
            fingerprint.settings_of(changed, kind),
        )
        assert {key for key in before if before[key] != after[key]} == ({name} & set(before))
        assert (name in before) == (fingerprint.field_class(name) == kind)


def test_a_field_that_nobody_knows_measures(tmp_path):
    @dataclasses.dataclass
    class NewerConfig(GRPOConfig):
        loss_twist: float = 0.5

    args = NewerConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", num_generations=8)
    assert fingerprint.settings_of(args, MEASURES)["loss_twist"] == 0.5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(dtype=torch.bfloat16, device_map=None), {"dtype": "torch.bfloat16"}),
        (dict(dtype="float32", cache_dir="/elsewhere"), {"dtype": "float32"}),
    ],
)
def test_places_of_files_are_no_settings(arguments, options, said):
    changed = copy.copy(arguments)
    changed.model_init_kwargs = options
    settings = fingerprint.settings_of(changed, MEASURES)
    assert settings["model_init_kwargs"] == said
    assert json.loads(json.dumps(settings)) == settings


SECRET = "hf_opensesame"


@dataclasses.dataclass
class LaterConfig(GRPOConfig):
    """Of a TRL that has a field that nobody has classified."""

    judge_api_key: str | None = None
    judge: dict | None = None


def test_no_record_or_manifest_holds_a_secret(tmp_path):
    """At whatever depth it stands, by whatever name people give one, also in a field that is not known."""
    names = ("use_auth_token", "api-key", "Authorization", "accessToken", "PASSWORD", "secrets")
    trainer = cases.trainer(tmp_path, rewards=coin_reward)
    nested = {"config": {"headers": [{name: SECRET} for name in names]}}
    later = trainer.args
    later.__class__ = LaterConfig
    later.hub_token = later.judge_api_key = SECRET
    later.judge = {"token": SECRET, "url": "https://judge"}
    later.model_init_kwargs = {**nested, "revision": "main", "token": SECRET}
    later.generation_kwargs = {"eos_token_id": [1, 2], "stop_tokens": ["end"], "top_p": 0.9}
    trainer.add_callback(
        LearnAlignCallback(trainer, LearnAlignConfig(stages=[4], warmup_samples=0))
    )
    settings = fingerprint.settings_of(later, MEASURES)
    assert SECRET not in json.dumps(settings)
    assert settings["judge"] == {"url": "https://judge"}
    assert settings["model_init_kwargs"]["revision"] == "main"
    assert settings["generation_kwargs"] == later.generation_kwargs
    later.generation_kwargs = None
    trainer.train()
    written = [path for path in tmp_path.rglob("*") if path.suffix in (".json", ".jsonl")]
    assert {"run.json", "manifest.json"} <= {path.name for path in written}
    assert [path.name for path in written if SECRET in path.read_text()] == []


# ---- Runs in one folder ---------------------------------------------------------------------------------------------

CALLS = []


def coin_reward(completions, **_):
    CALLS.append(len(completions))
    return cases.accuracy_reward(completions)


def other_reward(completions, **_):
    CALLS.append(len(completions))
    return [1 - reward for reward in cases.accuracy_reward(completions)]


other_reward.__name__ = other_reward.__qualname__ = "coin_reward"


def run(folder, config=None, policy=None, callbacks=(), prepare=None, **options):
    CALLS.clear()
    trainer = cases.trainer(folder, policy, **{"rewards": coin_reward, **options})
    if prepare is not None:
        prepare(trainer)
    config = config or LearnAlignConfig(stages=[4], warmup_samples=0, feature_dim=64, shard_size=4)
    callback = LearnAlignCallback(trainer, config)
    for extra in (callback, *callbacks):
        trainer.add_callback(extra)
    trainer.train()
    return trainer


LORA = dict(peft_config=LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=True))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run(folder / "full")
    run(folder / "lora", **LORA)
    return folder


def another_chat_template(trainer):
    tokenizer(trainer).chat_template = cases.CHAT_TEMPLATE + " "


def a_generation_default(trainer):
    trainer.model.generation_config.no_repeat_ngram_size = 3


OTHER_RUNS = {
    "mask_truncated_completions": dict(mask_truncated_completions=True),
    "entropy_coef": dict(entropy_coef=0.1),
    "delta": dict(delta=4.0),
    "use_bias_correction_kl": dict(use_bias_correction_kl=False),
    "sapo_temperature_neg": dict(sapo_temperature_neg=1.5),
    "vespo_k_pos": dict(vespo_k_pos=3.0),
    "reward_weights": dict(reward_weights=[0.5]),
    "multi_objective_aggregation": dict(multi_objective_aggregation="normalize_then_sum"),
    "vllm_importance_sampling_clip_max": dict(vllm_importance_sampling_clip_max=2.0),
    "code.rewards.coin_reward": dict(rewards=other_reward),
    "tokenizer.chat_template": dict(prepare=another_chat_template),
    "generation_config.no_repeat_ngram_size": dict(prepare=a_generation_default),
}


@pytest.mark.parametrize("name", OTHER_RUNS)
def test_measurements_of_another_run_are_refused(finished, name):
    with pytest.raises(
        RuntimeError, match=rf"another run: {re.escape(name)} was .* and is .*another output_dir"
    ):
        run(finished / "full", **OTHER_RUNS[name])
    assert not CALLS


def test_another_base_model_under_a_fresh_adapter_is_refused(finished):
    with pytest.raises(RuntimeError, match=r"model\.frozen_weights was '[0-9a-f]{16}' and is"):
        run(finished / "lora", policy=cases.model(seed=1), **LORA)
    other = dict(peft_config=LoraConfig(r=2, lora_alpha=32, target_modules=["q_proj"]))
    with pytest.raises(RuntimeError, match=r"model\.adapter was"):
        run(finished / "lora", **other)


def test_a_shard_store_is_refused_by_itself(finished):
    """The record may be lost; the shards know what they depend on too."""
    path = finished / "full" / "_learnalign" / "run.json"
    record = path.read_text()
    path.unlink()
    try:
        with pytest.raises(
            RuntimeError,
            match=r"gradients contains .*\. delta: the folder has None, this run 4",
        ):
            run(finished / "full", delta=4.0)
    finally:
        path.write_text(record)


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_the_same_run_is_measured_once(finished, adapter):
    """Also with other words in the log, other files kept, and another learning rate where nothing trains before."""
    run(
        finished / adapter,
        **(LORA if adapter == "lora" else {}),
        **dict(logging_steps=5, run_name="again", learning_rate=1e-4, gradient_checkpointing=True),
    )
    assert sum(CALLS) == 4 * 4  # rollouts of the four prompts that are trained on


def warmed(**options):
    return LearnAlignConfig(stages=[4], warmup_samples=4, feature_dim=64, shard_size=4, **options)


def test_another_learning_rate_is_told_before_the_warm_up(tmp_path, caplog):
    run(tmp_path, warmed())
    with pytest.raises(RuntimeError, match=r"another run: learning_rate was 0\.001 and is 0\.01\."):
        run(tmp_path, warmed(), learning_rate=0.01)
    assert not CALLS
    run(tmp_path, warmed())
    assert "a run with these settings reached step" in caplog.text


# ---- Code -----------------------------------------------------------------------------------------------------------

SOURCE = """
import functools
import math
import numpy as np

WEIGHTS = {{"format": {weight}}}
CACHE = {{}}
COUNT = 0


def helper(text):
    return len(text) + {bonus}


def plain(completions, threshold={threshold}, **_):  # {comment}
    return [WEIGHTS["format"] * math.sqrt(helper(text)) for text in completions]


def made(scale):
    def reward(completions, **_):
        return [scale * len(text) for text in completions]
    return reward


class Grader:
    def __init__(self, scale):
        self.scale, self.calls, self.kept = scale, 0, []

    def __call__(self, completions, **_):
        self.calls += 1
        self.kept.append(len(completions))
        return [self.scale * helper(text) for text in completions]


def counting(completions, **_):
    global COUNT
    COUNT += 1
    CACHE[COUNT] = completions
    return [0.0 for _ in completions]


@functools.lru_cache
def cached(completions):
    return helper(completions)


closed, part, grader = made({scale}), functools.partial(plain, threshold={scale}), Grader({scale})
method = Grader({scale}).__call__
"""
WRITTEN = dict(weight=0.5, bonus=1, threshold=2, comment="fine", scale=3)


def module(folder, **changes):
    path = folder / f"rewards_{len(list(folder.iterdir()))}.py"
    path.write_text(SOURCE.format(**{**WRITTEN, **changes}))
    spec = importlib.util.spec_from_file_location("rewards_of_a_test", path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


NAMES = ("plain", "closed", "part", "grader", "method", "counting", "cached")


@pytest.mark.parametrize(
    ("change", "concerned"),
    [
        (dict(comment="another"), ()),
        (dict(weight=0.25), ("plain", "part")),
        (dict(bonus=2), ("plain", "part", "grader", "method", "cached")),
        (dict(threshold=7), ("plain", "part")),
        (dict(scale=4), ("closed", "part", "grader", "method")),
    ],
)
def test_the_digest_of_code_sees_all_that_the_author_wrote(tmp_path, change, concerned):
    before, after = module(tmp_path), module(tmp_path, **change)
    differing = {
        name
        for name in NAMES
        if code_digest(getattr(before, name)) != code_digest(getattr(after, name))
    }
    assert differing == set(concerned)


def test_the_digest_of_code_does_not_count_calls(tmp_path):
    rewards = module(tmp_path)
    before = {name: code_digest(getattr(rewards, name)) for name in NAMES}
    for reward in (rewards.grader, rewards.method, rewards.counting):
        reward(["a", "bc"])
    assert {name: code_digest(getattr(rewards, name)) for name in NAMES} == before


def test_code_without_a_source_has_a_digest():
    spaces = [{}, {}]
    for space, number in zip(spaces, (1, 2), strict=True):
        exec(f"def reward(completions, **_):\n    return [{number}.0 for _ in completions]", space)
    assert code_digest(spaces[0]["reward"]) != code_digest(spaces[1]["reward"])
    assert code_digest(len) == code_digest(len) != code_digest(max)


def test_digests_of_weights_see_a_change_and_not_where_they_lie(tmp_path):
    trainer = cases.trainer(tmp_path)
    one = sampled_digest(trainer, trainer.model.named_parameters())
    assert one == sampled_digest(trainer, reversed(list(trainer.model.named_parameters())))
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight.add_(1)
    assert one != sampled_digest(trainer, trainer.model.named_parameters())


# ---- The edge to TRL ------------------------------------------------------------------------------------------------


BRIDGE = Path(bridge.__file__).parent
FILES = [path for path in sorted(BRIDGE.rglob("*.py")) if path.stem != "__init__"]


def imported(path):
    names = path.relative_to(BRIDGE).with_suffix("").parts
    return importlib.import_module(".".join(["trl_learnalign.bridge", *names]))


def is_declaration(node):
    """Whether a statement declares what a part of its file requires."""
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).endswith("REQUIRES")


def declared(path):
    """What a file requires, part by part."""
    names = vars(imported(path))
    body = ast.parse(path.read_text()).body
    return [names[ast.unparse(node.targets[0])] for node in body if is_declaration(node)]


def owner(node):
    """`trainer` of `trainer._x` and of `self.trainer._x`."""
    return (
        node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
    )


def private_names(path):
    """Private attributes of the trainer that a file of the bridge reads or writes, also by their names."""
    body = [node for node in ast.parse(path.read_text()).body if not is_declaration(node)]
    nodes = [inner for node in body for inner in ast.walk(node)]
    accessed = {
        node.attr for node in nodes if isinstance(node, ast.Attribute) and owner(node) == "trainer"
    }
    named = {
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    private = {name for name in accessed if name.startswith("_") and not name.startswith("__")}
    return private, named


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_file_of_the_bridge_requires_the_private_names_that_it_uses(path):
    of_trainer = {name for part in declared(path) for name in part.of_trainer}
    accessed, named = private_names(path)
    listed = {name for name in of_trainer if name.startswith("_")}
    assert accessed <= listed
    assert listed <= accessed | named
    if path.stem == "borrow":
        assert {*hooks.COLLECTED, *hooks.COUNTERS} <= of_trainer


def test_what_a_file_requires_is_checked():
    """By the attach check, or by that of the one feature that needs it."""
    required = {id(part) for path in FILES for part in declared(path)}
    checked = {id(needs) for needs in (*compat.NEEDS, *compat.OPTIONAL)}
    assert required == checked


def test_a_trainer_without_a_counter_is_refused(tmp_path):
    trainer = cases.trainer(tmp_path)
    del trainer._last_world_entropy
    with pytest.raises(RuntimeError, match="this trainer lacks _last_world_entropy"):
        LearnAlignCallback(trainer)


def test_listed_are_the_harmless_classes():
    assert {kind for kind, _ in fingerprint.FIELDS} == {TRAINS, COSMETIC}


@pytest.mark.parametrize(
    "name", ["temperature", "beta", "loss_type", "bf16", "reward_weights", "delta"]
)
def test_what_decides_rollouts_rewards_or_gradients_measures(name):
    assert fingerprint.field_class(name) == MEASURES


def test_a_scoring_pass_does_not_enter_the_environments_of_training(tmp_path, monkeypatch):
    pretend_to_call_tools(monkeypatch)
    resets = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            resets.append([room.resets for room in trainer._environment_pool[None]])

    options = dict(data=cases.dataset(8, conversational=True), environment_factory=Room)
    trainer = cases.trainer(tmp_path, **options)
    callback = LearnAlignCallback(
        trainer, LearnAlignConfig(stages=[4], warmup_samples=0, feature_dim=64)
    )
    for extra in (callback, Watch()):
        trainer.add_callback(extra)
    trainer.train()
    assert callback.record.get("stage_1", SelectionNote).scored
    assert resets == [
        [0],
        [1] * 8,
    ]  # TRL makes one environment itself, and the others when it first generates


def test_what_an_object_beside_the_function_holds_does_not_count(tmp_path):
    """Arguments of the command line, for one: a resumed attempt has others, and is the same run."""

    class Arguments:
        def __init__(self, resume):
            self.resume = resume

    def reward_with(arguments):
        def reward(completions, **_):
            return [float(arguments.resume is not None) for _ in completions]

        return reward

    assert code_digest(reward_with(Arguments(None))) == code_digest(
        reward_with(Arguments("checkpoint-10"))
    )
