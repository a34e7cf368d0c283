import ast
import functools
import logging
import re

import cases
import pytest
import trl
from datasets import Dataset, IterableDataset
from peft import LilyConfig

from trl_learnalign import AdaptiveOrderCallback, LearnAlignCallback, LearnAlignConfig, plan_run
from trl_learnalign.bridge.compat import check_trainer
from trl_learnalign.bridge.policy import weights_digest
from trl_learnalign.success import success_index


def plan(tmp_path, data=None, rewards=cases.accuracy_reward, settings=None, **options):
    """Everything that is checked without a model."""
    args = cases.grpo_config(tmp_path, **options)
    return plan_run(
        settings or LearnAlignConfig(warmup_samples=4),
        args,
        data or cases.dataset(12),
        rewards,
    )


def test_a_plan_needs_no_model(tmp_path):
    planned = plan(tmp_path)
    assert [(phase.name, phase.size, phase.steps) for phase in planned.phases] == [
        ("warmup", 4, 2),
        ("stage_1", 6, 3),
        ("stage_2", 4, 2),
        ("stage_3", 2, 1),
    ]


def test_pool_smaller_than_a_generation_batch(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"pool has 1 prompts, but one generation batch needs 2 .*enlarge the pool",
    ):
        plan(tmp_path, cases.dataset(1))


def test_more_prompts_wanted_than_the_pool_has(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"stages=\[10, 5\] add up to 15 prompts, but the pool has 12.*reselect='all'",
    ):
        plan(tmp_path, settings=LearnAlignConfig(warmup_samples=0, stages=[10, 5]))
    with pytest.raises(ValueError, match=r"stages=\[20\] reach 20 prompts, but the pool has 12"):
        plan(tmp_path, settings=LearnAlignConfig(warmup_samples=0, stages=[20], reselect="all"))


def test_warmup_larger_than_the_pool(tmp_path):
    with pytest.raises(ValueError, match=r"warmup_samples=300, but the pool has 12 prompts"):
        plan(tmp_path, settings=LearnAlignConfig())


def test_a_fraction_without_a_whole_prompt(tmp_path):
    with pytest.raises(ValueError, match=r"0.01 of a pool of 12 prompts is less than one prompt"):
        plan(tmp_path, settings=LearnAlignConfig(warmup_samples=0, stages=[0.01]))


def test_unknown_success_reward(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"success_reward='correct' is not a reward function of .*'accuracy_reward', 'length_reward'",
    ):
        plan(
            tmp_path,
            rewards=[cases.accuracy_reward, cases.length_reward],
            settings=LearnAlignConfig(warmup_samples=4, success_reward="correct"),
        )


def graded_by(scale):
    def graded(completions, **_):
        return [scale * len(cases.text(completion)) for completion in completions]

    return graded


DOUBLED = (
    "2 of the reward functions have the name 'graded', so their rewards cannot be distinguished"
)


@pytest.mark.parametrize("order", ["auto", "shuffled", "trainer"])
def test_two_rewards_of_one_name_of_which_one_decides_are_refused(tmp_path, order):
    """By closures and partials; before they taught the order nothing, without a word."""
    functions = [graded_by(0.1), functools.partial(graded_by(0.5))]
    config = LearnAlignConfig.adaptive(success_reward="graded", order=order)
    trainer = cases.trainer(tmp_path, rewards=functions)
    with pytest.raises(ValueError, match=DOUBLED) as caught:
        LearnAlignCallback(trainer, config)
    assert "def accuracy(**columns): return yours(**columns)" in str(caught.value)
    with pytest.raises(ValueError, match=DOUBLED):
        plan_run(config, cases.grpo_config(tmp_path), cases.dataset(), functions)


def test_two_rewards_of_one_name_of_which_none_decides_are_none_of_our_business():
    assert success_index(LearnAlignConfig.adaptive(), ["graded", "accuracy", "graded"]) == 1


def test_unclear_success_reward():
    with pytest.raises(ValueError, match="Name it with success_reward"):
        success_index(LearnAlignConfig(), ["format", "length"])
    assert success_index(LearnAlignConfig(), ["format", "math_accuracy"]) == 1
    assert success_index(LearnAlignConfig(), ["anything"]) == 0
    assert success_index(LearnAlignConfig(success_reward="length"), ["format", "length"]) == 1


def test_missing_prompt_column(tmp_path):
    with pytest.raises(ValueError, match=r"no 'prompt' column, only \['question'\].*rename_column"):
        plan(tmp_path, Dataset.from_dict({"question": ["a?"] * 12}))


def test_streams_are_refused_where_prompts_are_ordered(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter([{"prompt": "a?"}]))
    with pytest.raises(TypeError, match=r"is a stream.*by row numbers.*Dataset.from_list"):
        plan(tmp_path, stream)


@pytest.mark.parametrize(
    ("column", "pictures"),
    [
        ("image", [None, b"x"]),
        ("image", [None, None]),
        ("images", [[], [b"x"]]),
        ("images", [None, []]),
    ],
)
def test_images_are_refused_for_a_policy_of_texts_and_what_trl_fails_on_as_it_does_on_none(
    tmp_path, column, pictures
):
    data = cases.dataset(12, conversational=True).add_column(column, pictures * 6)
    refused = rf"selector='learnalign' needs gradients, which cannot be captured.*image column\(s\) \['{column}'\]"
    with pytest.raises(ValueError, match=refused):
        plan(tmp_path, data)
    with pytest.raises(ValueError, match=rf"image column\(s\) \['{column}'\].*only reads text"):
        LearnAlignCallback(cases.trainer(tmp_path, data=data), LearnAlignConfig.adaptive())
    if b"x" not in pictures and [b"x"] not in pictures:
        with pytest.raises(KeyError, match="pixel_values"):
            cases.trainer(tmp_path / "plain", data=data, max_steps=1).train()


def test_a_column_of_no_images_is_trained_on_as_by_plain_trl(tmp_path):
    """As in files of verl."""
    data = cases.dataset(12).add_column("images", [[]] * 12)
    digests = []
    for name in ("plain", "own", "adaptive"):
        trainer = cases.trainer(tmp_path / name, data=data, max_steps=2)
        if name != "plain":
            config = LearnAlignConfig.adaptive(
                order=dict(own="trainer").get(name, name), skip_zero_advantages=False
            )
            trainer.add_callback(LearnAlignCallback(trainer, config))
        trainer.train()
        digests.append(weights_digest(trainer))
    assert digests[0] == digests[1]


LILY = LilyConfig(r=2, target_modules=["q_proj"], stride_A=1, num_B=2, task_type="CAUSAL_LM")
NO_GRADIENT_OF_ITS_OWN = {
    "top_entropy_quantile": dict(top_entropy_quantile=0.2),
    "normalize_then_sum": dict(multi_objective_aggregation="normalize_then_sum", entropy_coef=0.01),
    "scale_rewards": dict(scale_rewards="batch", entropy_coef=0.01),
    "LILY": dict(peft_config=LILY),
}
NOTHING_IS_SCORED = {
    "default": {},
    "own": dict(order="trainer"),
    "shuffled": dict(order="shuffled", skip_forced_scoring=True),
    "dynamic": dict(max_generation_batches=2),
}


@pytest.mark.parametrize("case", NO_GRADIENT_OF_ITS_OWN)
@pytest.mark.parametrize("way", NOTHING_IS_SCORED)
def test_where_no_gradient_is_captured_nobody_asks_for_one(tmp_path, case, way):
    options = NO_GRADIENT_OF_ITS_OWN[case]
    trainer = cases.trainer(tmp_path, max_steps=1, **options)
    callback = LearnAlignCallback(trainer, LearnAlignConfig.adaptive(**NOTHING_IS_SCORED[way]))
    if way in ("default", "own"):
        trainer.add_callback(callback)
        trainer.train()
        assert trainer.state.global_step == 1
    assert callback.additions.skipper is None
    assert callback.additions.not_skipped
    if case != "LILY":
        args = cases.grpo_config(tmp_path, **options)
        plan_run(callback.config, args, cases.dataset(), cases.accuracy_reward)


@pytest.mark.parametrize("case", NO_GRADIENT_OF_ITS_OWN)
def test_where_one_is_captured_it_has_to_be_there(tmp_path, case):
    trainer = cases.trainer(tmp_path, **NO_GRADIENT_OF_ITS_OWN[case])
    with pytest.raises(
        ValueError, match=f"{case}.*no gradient of its own|prompt's gradient depends"
    ):
        LearnAlignCallback(trainer, LearnAlignConfig.adaptive(stages=[4], warmup_samples=2))


def test_what_a_selector_reads_is_asked_for_where_it_is_used(tmp_path):
    """A history, a validation set, a column of answers."""
    data = Dataset.from_dict({"prompt": cases.dataset()["prompt"]})
    for selector in ("limr", "validation_alignment", "ifd"):
        config = LearnAlignConfig.adaptive(selector=selector)
        LearnAlignCallback(cases.trainer(tmp_path, data=data), config)
        with pytest.raises((ValueError, TypeError, FileNotFoundError), match=selector):
            plan(
                tmp_path,
                data,
                settings=LearnAlignConfig(selector=selector, stages=[2], warmup_samples=0),
            )


def test_ignore_data_skip(tmp_path):
    with pytest.raises(ValueError, match=r"ignore_data_skip=True.*Leave it False"):
        plan(tmp_path, ignore_data_skip=True)


def test_max_steps(tmp_path):
    with pytest.raises(
        ValueError, match=r"max_steps=100, but warm-up and stages plan 8 optimizer steps.*at -1"
    ):
        plan(tmp_path, max_steps=100)
    assert plan(tmp_path, max_steps=8).total_steps == 8


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 4}, {"num_iterations": 2}])
def test_a_smoke_test_is_offered_and_works(tmp_path, options):
    data, asked = cases.dataset(40), 3
    args = cases.grpo_config(tmp_path, max_steps=asked, **options)
    with pytest.raises(ValueError, match=r"max_steps=3.*For a smoke test of \d+ step") as refusal:
        plan_run(LearnAlignConfig(warmup_samples=0), args, data, cases.accuracy_reward)
    said = str(refusal.value).split("For a smoke test of ")[1]
    steps = int(said.split()[0])
    settings = re.findall(r"(\w+)=([\[\]\d]+)", said)
    config = LearnAlignConfig(**{name: ast.literal_eval(value) for name, value in settings})
    made = plan_run(config, cases.grpo_config(tmp_path, **options), data, cases.accuracy_reward)
    assert made.total_steps == steps
    assert steps <= asked or made.phases[-1].size == 2
    assert config.stages[0] < config.pool_sample <= 40
    with pytest.raises(ValueError, match=r"max_steps=999.*warmup_samples\.$"):
        plan_run(config, cases.grpo_config(tmp_path, max_steps=999), data, cases.accuracy_reward)


def test_epochs_that_decide_nothing_are_said(tmp_path, caplog):
    for epochs, said in ((None, False), (5, True), (0.5, True)):
        caplog.clear()
        options = {} if epochs is None else {"num_train_epochs": epochs}
        with caplog.at_level(logging.WARNING, "trl_learnalign"):
            LearnAlignCallback(
                cases.trainer(tmp_path, **options), LearnAlignConfig(warmup_samples=0)
            )
        assert ("num_train_epochs" in caplog.text) == said
    assert (
        "num_train_epochs=0.5 has no effect: warm-up and stages plan 6 optimizer steps."
        in caplog.text
    )


@pytest.mark.parametrize("wrong", [LearnAlignConfig(), "model", None])
def test_what_is_no_grpo_trainer_is_named(wrong):
    with pytest.raises(
        TypeError,
        match=rf"is a {type(wrong).__name__}: give a GRPOTrainer.*Callback\(trainer, config",
    ):
        AdaptiveOrderCallback(wrong)


def test_another_trainer_and_settings_of_another_kind_are_named(tmp_path):
    args = trl.SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    data = Dataset.from_dict({"text": ["a", "b"]})
    trainer = trl.SFTTrainer(
        cases.model(), args=args, train_dataset=data, processing_class=cases.tokenizer()
    )
    with pytest.raises(
        TypeError,
        match=r"is a SFTTrainer: give a GRPOTrainer.*GRPO's rollouts and gradients, which other trainers do not have",
    ):
        AdaptiveOrderCallback(trainer)
    with pytest.raises(TypeError, match=r"config is a dict: give LearnAlignConfig\(\.\.\.\)"):
        LearnAlignCallback(cases.trainer(tmp_path), {"stages": [4]})


def test_an_asynchronous_trainer_is_named_with_what_it_can_have():
    from trl.experimental.async_grpo import AsyncGRPOTrainer

    class Own(AsyncGRPOTrainer):
        """As axolotl has one; it is not set up, which takes an engine."""

    with pytest.raises(
        TypeError,
        match=r"is a Own, an AsyncGRPOTrainer, .*ahead.*Use GRPOTrainer .*, or .*trl-learnalign select",
    ):
        AdaptiveOrderCallback(object.__new__(Own))


def test_unsupported_trl(tmp_path, monkeypatch):
    trainer = cases.trainer(tmp_path)
    monkeypatch.setattr(trl, "__version__", "0.19.0")
    with pytest.raises(
        RuntimeError, match=r"trl 0.19.0 is installed.*supports trl.*pip install 'trl"
    ):
        LearnAlignCallback(trainer, LearnAlignConfig(warmup_samples=0))


def test_a_private_name_that_is_gone(tmp_path, monkeypatch):
    trainer = cases.trainer(tmp_path)
    del trainer._buffered_inputs
    with pytest.raises(RuntimeError, match=r"this trainer lacks _buffered_inputs"):
        check_trainer(trainer)


def test_the_callback_checks_the_same(tmp_path):
    trainer = cases.trainer(tmp_path, data=cases.dataset(12))
    with pytest.raises(ValueError, match="warmup_samples=300"):
        LearnAlignCallback(trainer, LearnAlignConfig())
    with pytest.raises(ValueError, match=r"selector='best': choose one of 'learnalign'"):
        LearnAlignCallback(trainer, LearnAlignConfig(warmup_samples=0, selector="best"))


def test_two_callbacks_do_not_decide_on_the_same_prompts(tmp_path):
    trainer = cases.trainer(tmp_path, data=cases.dataset(12))
    trainer.add_callback(AdaptiveOrderCallback(trainer))
    with pytest.raises(RuntimeError, match="by its LearnAlignCallback"):
        AdaptiveOrderCallback(trainer)
    trainer.add_callback(
        LearnAlignCallback(trainer, LearnAlignConfig.adaptive(skip_zero_advantages=False))
    )
    with pytest.raises(
        ValueError, match=r"\(AdaptiveOrderCallback, LearnAlignCallback\).*: add one"
    ):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_context_without_a_limit_is_no_limit(tmp_path):
    """XLNet's configuration says -1."""
    trainer = cases.trainer(tmp_path)
    trainer.model.config.max_position_embeddings = -1
    assert (
        LearnAlignCallback(trainer, LearnAlignConfig(warmup_samples=0, stages=[4])).plan.total_steps
        > 0
    )


def test_an_adapter_that_mixes_rows_is_refused_before_a_rollout(tmp_path):
    lily = pytest.importorskip("peft").LilyConfig(
        r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"
    )
    trainer = cases.trainer(tmp_path, peft_config=lily)
    with pytest.raises(ValueError, match="'default' is of PEFT's type LILY"):
        LearnAlignCallback(trainer, LearnAlignConfig(warmup_samples=0, stages=[4]))
    LearnAlignCallback(
        trainer, LearnAlignConfig(warmup_samples=0, stages=[4], selector="learnability")
    )
