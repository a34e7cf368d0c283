"""Every bad input gets what the table says; fuzzing for those nobody thought of."""

import dataclasses
import json
import math

import bad_inputs
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trl_learnalign import LearnAlignConfig, scoring
from trl_learnalign.data.prompts import check_prompts, prompt_id, prompt_text
from trl_learnalign.success import SuccessRule

# Two runs each; what they damage is tested in parts by test_store and test_resume too.
CASES = [
    pytest.param(case, marks=pytest.mark.slow if case.area == "folder" else ())
    for case in bad_inputs.CASES
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_bad_input_gets_what_the_table_says(tmp_path, case):
    bad_inputs.outcome(case, tmp_path)


def test_the_table_has_many_different_cases():
    assert len(bad_inputs.CASES) >= 60
    assert len({str(case) for case in bad_inputs.CASES}) == len(bad_inputs.CASES)


def refusal(attempt, otherwise):
    """What a `ValueError` says; `otherwise` if there is none."""
    try:
        attempt()
    except ValueError as error:
        return str(error)
    return otherwise


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**20),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.floats(), max_size=3),
)
FIELDS = sorted(field.name for field in dataclasses.fields(LearnAlignConfig))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(name=st.sampled_from(FIELDS), value=ANYTHING)
def test_any_value_of_any_field_is_taken_or_named(name, value):
    assert name in refusal(lambda: LearnAlignConfig(**{name: value}), name)


REWARD = st.one_of(st.floats(), st.sampled_from([0.0, 1.0, math.nan, math.inf, -math.inf]))


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(
    rewards=st.integers(1, 6).flatmap(
        lambda g: st.lists(st.lists(REWARD, min_size=g, max_size=g), min_size=1)
    ),
    seed=st.integers(0, 99),
)
def test_no_reward_and_no_feature_makes_a_ranking_without_an_order(rewards, seed):
    found = SuccessRule(0, "reward", 0.0).of_its_rewards(torch.tensor(rewards, dtype=torch.float64))
    weights = scoring.learnability(found)
    assert ((weights >= 0) & (weights <= 0.25)).all()
    features = torch.randn(len(rewards), 8, generator=torch.Generator().manual_seed(seed))
    odd = torch.tensor([0.0, math.nan, math.inf, -math.inf, 1e38, 1e-45])
    features[seed % len(rewards), seed % 8] = odd[seed % 6]
    scores = scoring.row_average(weights, [(torch.arange(len(rewards)), features)], 8).numpy()
    assert np.isfinite(scores).all()
    assert (scores[weights.numpy() == 0] == 0).all()
    order = scoring.rank(scores, np.arange(len(rewards)))
    assert sorted(order) == list(range(len(rewards)))


MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text()}
)
PROMPT = st.one_of(st.none(), st.text(), st.lists(MESSAGE, max_size=3))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(prompts=st.lists(PROMPT, min_size=1, max_size=4))
def test_any_prompt_is_taken_or_its_row_is_named(prompts):
    class Rows:
        @property
        def format(self):
            return {"type": None}

        def with_format(self, _):
            return self

        def select_columns(self, _):
            return self

        def __getitem__(self, rows):
            found = prompts[rows] if isinstance(rows, slice) else [prompts[row] for row in rows]
            return {"prompt": found}

        def __len__(self):
            return len(prompts)

    said = refusal(lambda: check_prompts(Rows()), "")
    if said:
        assert "row" in said
        assert "remove them" in said
    else:
        for prompt in prompts:
            json.dumps(prompt_text(prompt))
            assert len(prompt_id(prompt)) == 16
