import dataclasses
from functools import partial

import pytest
import yaml
from trl import GRPOConfig, ModelConfig, TrlParser

from trl_learnalign import LearnAlignConfig
from trl_learnalign.config import SELECTOR_NAMES, SubsetConfig
from trl_learnalign.selectors import SELECTORS

BAD = [
    (dict(stages=[0.5, 0.6]), "add up to 1.1"),
    (dict(stages=[0.5, 100]), "mixes fractions"),
    (dict(stages=[]), "stages is empty"),
    (dict(stages=[0.5, -0.1]), "not a positive number"),
    (dict(stages=[100.5]), "stages=100.5"),
    (dict(stages=["half"]), "not a positive number"),
    (dict(stages=[float("nan")]), "not a positive number"),
    (dict(stage_passes=[1, 2]), "for 3 stages"),
    (dict(stage_passes=[0]), "stage_passes=0"),
    (dict(warmup_samples=-1), "warmup_samples=-1"),
    (dict(warmup_samples=2.5), "warmup_samples=2.5"),
    (dict(warmup_passes=0), "warmup_passes=0"),
    (dict(after_warmup="stop"), "after_warmup='stop'.*'continue', 'restart'"),
    (dict(after_warmup="restart", warmup_samples=0), "no warm-up to restart from"),
    (dict(reselect="some"), "reselect='some'"),
    (dict(when_short="grow"), "when_short='grow'"),
    (dict(projection="pca"), "projection='pca'"),
    (dict(feature_dim=4), "feature_dim=4"),
    (dict(feature_dim="many"), "feature_dim='many'"),
    (dict(capture_rank=2), "capture_rank=2: give a whole number of at least 8, 'auto', or nothing"),
    (dict(capture_rank="large"), "capture_rank='large': give a whole number of at least 8, 'auto'"),
    (dict(capture_tokens=0), "capture_tokens=0"),
    (dict(rollout_prompts=0), "rollout_prompts=0"),
    (dict(shard_prompts=0), "shard_prompts=0"),
    (dict(pool_sample=1), "pool_sample=1: give a whole number of at least 2"),
    (dict(pool_sample="half"), "pool_sample='half'"),
    (dict(gradient_rollouts="best"), "gradient_rollouts='best'.*'all', 'one_correct'"),
    (dict(solution_start="prompt"), "solution_start='prompt'.*'template', 'token'"),
    (dict(hidden_text="solution"), "hidden_text='solution'.*'prompt', 'prompt_and_solution'"),
    (dict(ppl_middle="mean"), "ppl_middle='mean'.*'value', 'rank'"),
    (dict(selectit_shares="raw"), "selectit_shares='raw'.*'ratio', 'softmax'"),
    (dict(max_text_tokens=4), "max_text_tokens=4"),
    (dict(forward_rows=0), "forward_rows=0"),
    (dict(stage_steps=-1), "stage_steps=-1"),
    (dict(stage_steps=[5, 5]), r"stage_steps=\[5, 5\] for 3 stage\(s\)"),
    (dict(stage_steps=[5, 0, 5]), r"stage_steps=\[5, 0, 5\] for 3 stage\(s\): give one number above 0"),
    (dict(stage_steps=5, stage_passes=2), r"stage_passes=\[2\] and stage_steps=\[5\] both say.*stage_steps=0"),
    (dict(stage_steps=5, when_short="shrink"), "when_short='shrink' takes steps away"),
    (dict(plateau_patience=-1), "plateau_patience=-1"),
    (dict(plateau_smoothing=1.0), "plateau_smoothing=1.0"),
    (dict(selection_seed=-3), "selection_seed=-3"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message for _, message in BAD])
def test_a_bad_value_is_named_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        LearnAlignConfig(**options)


def test_defaults_are_the_papers_staged_run():
    config = LearnAlignConfig()
    assert config.stages == [0.5, 0.3, 0.2]
    assert (config.warmup_samples, config.feature_dim, config.selector) == (300, 8192, "learnalign")
    beyond = (config.unbiased_learnability, config.exclude_self, config.pool_sample, config.gradient_rollouts)
    assert beyond == (False, False, None, "all")


def test_every_field_has_help():
    for field in dataclasses.fields(LearnAlignConfig):
        assert len(field.metadata.get("help", "")) > 20, field.name


def test_one_parser_reads_all_settings_from_yaml_and_command_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"stages": 1000, "warmup_samples": 20, "output_dir": str(tmp_path), "bf16": False}))
    parser = TrlParser((LearnAlignConfig, GRPOConfig, ModelConfig))
    config, args, _ = parser.parse_args_and_config(["--config", str(path), "--use_cpu", "--stage_passes", "3"])
    assert (config.stages, config.stage_passes, config.warmup_samples) == ([1000], [3], 20)
    assert args.output_dir == str(tmp_path)
    config, _, _ = parser.parse_args_and_config(
        ["--stages", "0.5", "0.5", "--reselect", "all", "--bf16", "false", "--output_dir", str(tmp_path)]
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
        with pytest.raises(ValueError, match=r"selector='learn_align': choose one of 'learnalign', 'learnability'"):
            make(selector="learn_align")
        for path in ("my.module:rank", "my.module.rank"):
            assert make(selector=path).selectors[0] == path
    with pytest.raises(ValueError, match="selector='rnd'"):
        LearnAlignConfig(selector=["random", "rnd"], stages=[4, 4])
