import dataclasses
import re
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml
from trl import GRPOConfig, ModelConfig, TrlParser

from trl_learnalign import LearnAlignConfig
from trl_learnalign.config import SELECTOR_NAMES, sections_of, setting
from trl_learnalign.config.fields import at_least, check_of
from trl_learnalign.selectors import SELECTORS
from trl_learnalign.training.subset import SubsetConfig

BAD = [
    (dict(stages=[0.5, 0.6]), "add up to 1.1"),
    (dict(stages=[0.5, 100]), "mixes fractions"),
    (dict(stages=[]), r"stages=\[\] is empty"),
    (dict(stages=[0.5, -0.1]), "not a positive number"),
    (dict(stages=[100.5]), "stages=100.5"),
    (dict(stages=["half"]), "not a positive number"),
    (dict(stages=[float("nan")]), "not a positive number"),
    (dict(stage_epochs=[1, 2]), r"for 3 stage\(s\)"),
    (dict(stage_epochs=[0]), "stage_epochs=0"),
    (dict(warmup_samples=-1), "warmup_samples=-1"),
    (dict(warmup_samples=2.5), "warmup_samples=2.5"),
    (dict(warmup_epochs=0), "warmup_epochs=0"),
    (dict(after_warmup="stop"), "after_warmup='stop'.*'continue', 'restart'"),
    (dict(after_warmup="restart", warmup_samples=0), "no warm-up to restart from"),
    (dict(reselect="some"), "reselect='some'"),
    (dict(on_shortfall="grow"), "on_shortfall='grow'"),
    (dict(projection="pca"), "projection='pca'"),
    (dict(feature_dim=4), "feature_dim=4"),
    (dict(feature_dim="many"), "feature_dim='many'"),
    (
        dict(capture_rank=2),
        "capture_rank=2: give a whole number from 8 to 1,048,576, 'auto', or nothing",
    ),
    (
        dict(capture_rank="large"),
        "capture_rank='large': give a whole number from 8 to 1,048,576, 'auto'",
    ),
    (dict(capture_max_tokens=0), "capture_max_tokens=0"),
    (dict(scoring_batch_prompts=0), "scoring_batch_prompts=0"),
    (dict(shard_size=0), "shard_size=0"),
    (dict(pool_sample=1), "pool_sample=1: give a whole number of at least 2"),
    (dict(pool_sample="half"), "pool_sample='half'"),
    (dict(rollout_budget=0), "rollout_budget=0: give a number above 0 and at most 1"),
    (dict(rollout_budget=1.5), "rollout_budget=1.5: give a number above 0 and at most 1"),
    (dict(rollout_budget=0.4, pool_sample=9), "rollout_budget=0.4 and pool_sample=9 both limit"),
    (
        dict(rollout_budget=0.4, order="trainer", stages=1.0, warmup_samples=0),
        "rollout_budget=0.4 with order='trainer': this order scores nothing",
    ),
    (dict(budget_rounds=0), "budget_rounds=0: give a whole number of at least 1"),
    (dict(budget_exponent=-1), "budget_exponent=-1: give a number of at least 0"),
    (dict(gradient_rollouts="best"), "gradient_rollouts='best'.*'all', 'one_correct'"),
    (dict(solution_start="prompt"), "solution_start='prompt'.*'template', 'token'"),
    (dict(hidden_text="solution"), "hidden_text='solution'.*'prompt', 'prompt_and_solution'"),
    (dict(ppl_middle="mean"), "ppl_middle='mean'.*'value', 'rank'"),
    (dict(selectit_shares="raw"), "selectit_shares='raw'.*'ratio', 'softmax'"),
    (dict(max_text_tokens=4), "max_text_tokens=4"),
    (dict(text_batch_size=0), "text_batch_size=0"),
    (dict(stage_steps=-1), "stage_steps=-1"),
    (dict(stage_steps=[5, 5]), r"stage_steps=\[5, 5\] for 3 stage\(s\)"),
    (
        dict(stage_steps=[5, 0, 5]),
        r"stage_steps=\[5, 0, 5\] for 3 stage\(s\): give one number above 0",
    ),
    (
        dict(stage_steps=5, stage_epochs=2),
        r"stage_epochs=\[2\] and stage_steps=\[5\] both set the length of a stage.*stage_steps=0",
    ),
    (dict(stage_steps=5, on_shortfall="shrink"), "on_shortfall='shrink' reduces them"),
    (dict(plateau_patience=-1), "plateau_patience=-1"),
    (dict(baseline="mean"), "baseline='mean'.*'group', 'belief'"),
    (dict(baseline="belief"), r"baseline='belief' with order=\['shuffled'\]: there is no belief"),
    (
        dict(baseline="belief", order="adaptive", oversample=1.5),
        "baseline='belief' with oversample=1.5 and max_generation_batches=1: dynamic sampling",
    ),
    (
        dict(baseline="belief", order="adaptive", max_generation_batches=2),
        "oversample=1 and max_generation_batches=2.*set both to 1",
    ),
    (dict(baseline_share=0), "baseline_share=0: give a number above 0 and at most 1"),
    (dict(baseline_pruning="some"), "baseline_pruning='some'.*'drop', 'roulette'"),
    (dict(compute_budget=0), "compute_budget=0"),
    (dict(generation_price=0), "generation_price=0: give a number of at least 0.01"),
    (
        dict(compute_budget=5, order="trainer", stages=1, warmup_samples=0),
        "compute_budget=5 with order='trainer'",
    ),
    (dict(adaptive_feature_dim=0), "adaptive_feature_dim=0: give a whole number of at least 1"),
    (dict(adaptive_cool_down=2.5), "adaptive_cool_down=2.5: give a whole number"),
    (dict(adaptive_prior_std=0.0), "adaptive_prior_std=0.0: give a number of at least 0.01"),
    (dict(adaptive_drift_std=-0.1), "adaptive_drift_std=-0.1: give a number of at least 0"),
    (dict(adaptive_gain_exponent=-1.0), "adaptive_gain_exponent=-1.0: give a number of at least 0"),
    (dict(adaptive_candidates_per_slot=0), "adaptive_candidates_per_slot=0: give a whole number"),
    (dict(adaptive_exploration=1.5), "adaptive_exploration=1.5: give a share from 0 to 1"),
    (dict(adaptive_concentration=[0.5, 0.0]), "adaptive_concentration=0.0: give a number"),
    (dict(adaptive_decay=0.0), "adaptive_decay=0.0: give a number above 0 and at most 1"),
    (dict(adaptive_prompt_decay=1.5), "adaptive_prompt_decay=1.5: give a number above 0"),
    (dict(adaptive_concentration_decay=0.0), "adaptive_concentration_decay=0.0: give a number"),
    (dict(plateau_smoothing=1.0), "plateau_smoothing=1.0"),
    (dict(selection_seed=-3), "selection_seed=-3"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message for _, message in BAD])
def test_a_bad_value_is_named_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        LearnAlignConfig(**options)


def test_the_whole_pool_in_adaptive_order_has_a_name():
    config = LearnAlignConfig.adaptive()
    assert (config.stages, config.warmup_samples, config.order) == ([1.0], 0, ["adaptive"])
    assert config.skip_zero_advantages
    assert config.has_trainers_length


@pytest.mark.parametrize(
    ("options", "order"),
    [
        ({"stages": [1000]}, ["shuffled"]),
        ({"stages": [0.5, 0.5]}, ["shuffled"]),
        ({"warmup_samples": 300}, ["shuffled"]),
        ({"stages": [0.5, 0.5], "order": ["auto", "adaptive"]}, ["shuffled", "adaptive"]),
        ({"stages": 1, "stage_steps": 60}, ["adaptive"]),
    ],
)
def test_what_was_chosen_comes_in_passes(options, order):
    config = LearnAlignConfig.adaptive(**options)
    assert config.order == order
    assert not config.has_trainers_length


def test_a_subset_is_chosen_by_a_selector_that_covers():
    assert LearnAlignConfig.adaptive(stages=[1000]).selector == "learnalign_coverage"
    assert SubsetConfig(top=[1000]).selector == "learnalign_coverage"


def test_the_defaults_are_the_papers():
    config = LearnAlignConfig()
    assert config.stages == [0.5, 0.3, 0.2]
    assert (config.warmup_samples, config.feature_dim, config.selector) == (300, 8192, "learnalign")
    assert (config.order, config.skip_zero_advantages) == (["shuffled"], False)
    assert LearnAlignConfig(stages=[1000]).stages == [1000]
    with pytest.raises(TypeError, match="stagees"):
        LearnAlignConfig(stagees=[1000])
    beyond = (
        config.unbiased_learnability,
        config.exclude_self,
        config.pool_sample,
        config.rollout_budget,
        config.gradient_rollouts,
    )
    assert beyond == (False, False, None, None, "all")


def test_the_trainers_own_order_with_skipping_has_a_name():
    config = LearnAlignConfig.skipping()
    assert (config.stages, config.warmup_samples, config.order) == ([1.0], 0, ["trainer"])
    assert config.skip_zero_advantages
    assert config.has_trainers_length


def test_the_control_has_a_name():
    config = LearnAlignConfig.control(selection_seed=3)
    assert (config.stages, config.warmup_samples, config.order) == ([1.0], 0, ["shuffled"])
    assert not config.skip_zero_advantages
    assert config.has_trainers_length
    assert config.selection_seed == 3
    with pytest.raises(TypeError, match="stagees"):
        LearnAlignConfig.control(stagees=[1000])


def test_every_field_has_help():
    for field in dataclasses.fields(LearnAlignConfig):
        assert len(field.metadata.get("help", "")) > 20, field.name


def test_one_parser_reads_all_settings_from_yaml_and_command_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump(
            {"stages": 1000, "warmup_samples": 20, "output_dir": str(tmp_path), "bf16": False}
        )
    )
    parser = TrlParser((LearnAlignConfig, GRPOConfig, ModelConfig))
    config, args, _ = parser.parse_args_and_config(
        ["--config", str(path), "--use_cpu", "--stage_epochs", "3"]
    )
    assert (config.stages, config.stage_epochs, config.warmup_samples) == ([1000], [3], 20)
    assert args.output_dir == str(tmp_path)
    config, _, _ = parser.parse_args_and_config(
        [
            "--stages",
            "0.5",
            "0.5",
            "--reselect",
            "all",
            "--bf16",
            "false",
            "--output_dir",
            str(tmp_path),
        ]
    )
    assert config.stages == [0.5, 0.5]


@pytest.mark.parametrize(("given", "understood"), [("auto", "auto"), ("256", 256), (None, None)])
def test_capture_rank_from_a_command_line(given, understood):
    arguments = [] if given is None else ["--capture_rank", given]
    (config,) = TrlParser((LearnAlignConfig,)).parse_args_and_config(args=arguments)
    assert config.capture_rank == understood


def test_names_of_selectors_are_checked_at_once():
    assert set(SELECTOR_NAMES) == set(SELECTORS)
    for make in (LearnAlignConfig, partial(SubsetConfig, top=[3])):
        with pytest.raises(
            ValueError,
            match=r"selector='learn_align': choose one of 'learnalign', 'learnalign_coverage'",
        ):
            make(selector="learn_align")
        for path in ("my.module:rank", "my.module.rank"):
            assert make(selector=path).selectors[0] == path
    with pytest.raises(ValueError, match="selector='rnd'"):
        LearnAlignConfig(selector=["random", "rnd"], stages=[4, 4])


# ---- choices --------------------------------------------------------------------------------------------------------

HINTS = get_type_hints(LearnAlignConfig)
CHOICES = {name: get_args(hint) for name, hint in HINTS.items() if get_origin(hint) is Literal}


def test_choices_are_listed_by_help():
    assert len(CHOICES) == 12
    said = TrlParser((LearnAlignConfig,)).format_help()
    for name, choices in CHOICES.items():
        assert re.search(rf"--{name}\b[^\n]*\s+\{{{','.join(choices)}\}}", said), name


def read(tmp_path, name, value, spelling):
    """A setting as a run reads it from one of the places where it can be given."""
    order = "adaptive" if value == "belief" else "shuffled"
    if spelling == "python":
        return LearnAlignConfig(**{name: value, "order": order})
    arguments = [f"--{name.replace('_', '-') if spelling == 'hyphens' else name}", value]
    if spelling == "yaml":
        (tmp_path / "run.yaml").write_text(f"{name}: {value}\n")
        arguments = ["--config", str(tmp_path / "run.yaml")]
    arguments += ["--warmup_samples", "4", "--order", order]
    (config,) = TrlParser((LearnAlignConfig,)).parse_args_and_config(arguments)
    return config


@pytest.mark.parametrize("spelling", ["python", "command line", "hyphens", "yaml"])
@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_can_be_given_everywhere(tmp_path, name, spelling):
    for choice in CHOICES[name]:
        assert getattr(read(tmp_path, name, choice, spelling), name) == choice


def test_a_wrong_choice_is_named_everywhere(tmp_path, capsys):
    for spelling in ("python", "yaml"):
        with pytest.raises(
            ValueError, match="projection='pca': choose one of 'count_sketch', 'rademacher', 'none'"
        ):
            read(tmp_path, "projection", "pca", spelling)
    with pytest.raises(SystemExit):
        read(tmp_path, "projection", "pca", "command line")
    said = capsys.readouterr().err
    assert re.search(
        r"--projection: invalid choice: 'pca' \(choose from '?count_sketch'?, '?rademacher'?, ",
        said,
    )


@pytest.mark.parametrize(
    "options",
    [dict(skip_forced_scoring="off"), dict(success_threshold=float("nan")), dict(record_dir=3)],
)
def test_values_are_checked_also_after_a_parser_has_read_the_fields(options):
    TrlParser((LearnAlignConfig,))  # overwrites the fields' types
    with pytest.raises(ValueError, match=next(iter(options))):
        LearnAlignConfig(**options)


# ---- sections -------------------------------------------------------------------------------------------------------


def test_every_setting_belongs_to_one_section_and_the_sections_keep_their_order():
    names = [name for names in sections_of(LearnAlignConfig).values() for name in names]
    assert names == [field.name for field in dataclasses.fields(LearnAlignConfig)]


@dataclass
class WithBudget(LearnAlignConfig):
    """All settings and one section more."""

    SECTIONS: ClassVar[dict[str, str]] = {
        **LearnAlignConfig.SECTIONS,
        "least_rollouts": "Budget: what a run may take",
    }

    least_rollouts: Annotated[int, at_least(0)] = setting(
        0, "Rollouts that scoring takes at least. 0: any number."
    )
    when_spent: Literal["stop", "random"] = setting(
        "stop", "What a stage does when the budget is spent."
    )

    def _check_together(self):
        super()._check_together()
        if self.least_rollouts == 0 and self.when_spent == "random":
            raise ValueError(
                "when_spent='random' with least_rollouts=0: a budget that is never spent."
            )


def test_a_section_more_is_a_subclass():
    (config,) = TrlParser((WithBudget,)).parse_args_and_config(
        ["--least_rollouts", "8", "--when-spent", "random"]
    )
    assert (config.least_rollouts, config.when_spent, config.stages) == (
        8,
        "random",
        [0.5, 0.3, 0.2],
    )
    assert list(sections_of(WithBudget).items()) == [
        *sections_of(LearnAlignConfig).items(),
        ("Budget: what a run may take", ["least_rollouts", "when_spent"]),
    ]
    for options, message in [
        (dict(least_rollouts=-1), "least_rollouts=-1: give a whole number of at least 0"),
        (dict(when_spent="go"), "when_spent='go': choose one of 'stop', 'random'"),
        (dict(when_spent="random"), "a budget that is never spent"),
        (dict(stages=[0.5, 0.6]), "add up to 1.1"),
    ]:
        with pytest.raises(ValueError, match=message):
            WithBudget(**options)


def test_a_setting_whose_type_says_nothing_of_its_values_cannot_be_declared():
    with pytest.raises(TypeError, match=r"int.*: declare the setting as Annotated\[type, check\]"):
        check_of(int)


def test_a_selector_that_is_none_names_the_nearest_when_the_settings_are_made():
    with pytest.raises(ValueError, match=r"selector='learn_align': .*; did you mean learnalign\?$"):
        LearnAlignConfig(selector="learn_align")
    with pytest.raises(ValueError, match=r"selector='best': .*'package.module:function'\.$"):
        LearnAlignConfig(selector="best")
