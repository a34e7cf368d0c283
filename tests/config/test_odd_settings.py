"""Whatever is given as a setting is taken, or refused by its name, its value and a remedy."""

import dataclasses
import math
import re
import tempfile
from decimal import Decimal
from fractions import Fraction

import cases
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.config.fields import shown

NAMES = [field.name for field in dataclasses.fields(LearnAlignConfig)]
REMEDY = r"\b(give|choose|set|lower|use|name|leave|rename|make|increase|pass|remove)\b"
FUZZ = dict(derandomize=True, deadline=None, database=None)


class Unprintable:
    def __repr__(self):
        raise RuntimeError("no words for it")


SINGLE = strategies.one_of(
    strategies.none(),
    strategies.booleans(),
    strategies.integers(-3, 70),
    strategies.integers(),
    strategies.floats(),
    strategies.floats(0, 1),
    strategies.text(max_size=6),
    strategies.binary(max_size=4),
    strategies.sampled_from(
        [
            *("auto", "hidden", "shuffled", "adaptive", "trainer", "random", "learnalign", "all"),
            *(
                ":x",
                "x:",
                ".",
                "a.b:c.d",
                "nobody.knows:me",
                "\0",
                "\ud800",
                " ",
                "1",
                "1e3",
                "nan",
            ),
            *(1e30, 1e308, 5e-324, 1e-320, -0.0, 10**400, -(10**400), 10**5000, math.inf, math.nan),
            *(np.float32(0.5), np.int64(3), np.bool_(True), np.array([0.5]), np.array([1, 2])),
            *(Decimal("0.5"), Fraction(1, 2), Fraction(10**400), 1j, object(), Unprintable(), int),
            *({}, {"a": 1}, {0.5}, b"", b"ab", bytearray(b"ab"), range(3), (0.5, 0.5), ((),)),
        ]
    ),
)
VALUES = strategies.one_of(SINGLE, strategies.lists(SINGLE, max_size=3))


def made(**options):
    """The settings, or `None` if they are refused in words."""
    try:
        return LearnAlignConfig.adaptive(**options)
    except (ValueError, TypeError) as error:
        said = str(error)
    assert any(f"{name}=" in said for name in options), said
    assert re.search(REMEDY, said, re.IGNORECASE), said
    assert len(said) < 2000
    return None


@pytest.mark.parametrize("name", NAMES)
@hypothesis.settings(max_examples=60, **FUZZ)
@hypothesis.given(value=VALUES)
def test_any_value_is_taken_or_refused_in_words(name, value):
    config = made(**{name: value})
    if config is not None:
        dataclasses.replace(config)  # what was taken is taken again


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(adaptive_prior_std=1e30), r"adaptive_prior_std=1e\+30: give a number of at most 100"),
        (dict(feature_dim=1e308), r"feature_dim=1e\+308: give a whole number of at most 1,048,576"),
        (dict(oversample=1e9), "oversample=1000000000.0: give a number of at most 1000"),
        (dict(logdet_ridge=1e-320), "logdet_ridge=1e-320: give a number of at least 1e-06"),
        (dict(logdet_ridge=math.inf), "logdet_ridge=inf: give a number"),
        (dict(adaptive_concentration=[]), r"adaptive_concentration=\[\] is empty: give at least"),
        (dict(adaptive_concentration=[4, 4.0]), r"\[4, 4.0\]: give distinct numbers"),
        (dict(stage_steps=[]), r"stage_steps=\[\] is empty"),
        (dict(stages=b"ab"), "stages=.*b'ab' is not a positive number.*Give fractions"),
        (dict(category_columns=b"ab"), "category_columns=b'ab': give a string"),
        (dict(selector=":x"), "selector=':x': choose one of"),
        (dict(selector="x:"), "selector='x:': choose one of"),
        (dict(selection_seed=10**5000), "selection_seed=<int>: give a whole number"),
        (dict(record_dir="\ud800"), "record_dir=.*give a text with visible characters"),
        (dict(record_dir=""), "record_dir='': give a text with visible characters"),
        (dict(order=np.array(["shuffled", "auto"])), "order=array.*: choose one of"),
        (dict(projection=Unprintable()), "projection=<Unprintable>: choose one of"),
    ],
)
def test_what_cannot_be_used_is_refused_where_it_is_declared(options, said):
    with pytest.raises(ValueError, match=said):
        LearnAlignConfig.adaptive(**options)


def test_numbers_of_other_kinds_become_plain_ones():
    config = LearnAlignConfig.adaptive(
        adaptive_prior_std=np.float32(0.5), logdet_ridge=Fraction(1, 2)
    )
    assert (type(config.adaptive_prior_std), config.adaptive_prior_std) == (float, 0.5)
    assert (type(config.logdet_ridge), config.logdet_ridge) == (float, 0.5)
    assert LearnAlignConfig.adaptive(category_columns=[]).category_columns == []


def test_a_long_value_is_cut():
    assert len(shown("x" * 10_000)) == 200


def near(field):
    """Values that a field may well take: its choices, its default and neighbours, and the ends of what it takes."""
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    values = [default, 0, 1, 2, 5, 16, 0.5, 1000, 1e6, 10**9, 1e-6, 100, True, False, None]
    values += ["all", "none", "rademacher", "random", "learnability", "column", "shuffled", "fill"]
    return strategies.sampled_from(values)


FIELDS = {
    field.name: near(field)
    for field in dataclasses.fields(LearnAlignConfig)
    if field.name != "record_dir"
}


# Most values that are drawn for a setting are refused; those that are taken are what this test is about.
@hypothesis.settings(
    max_examples=15, suppress_health_check=[hypothesis.HealthCheck.filter_too_much], **FUZZ
)
@hypothesis.given(data=strategies.data())
def test_what_is_taken_makes_a_callback_or_is_refused_in_words(data):
    names = data.draw(
        strategies.lists(strategies.sampled_from(sorted(FIELDS)), max_size=4, unique=True)
    )
    options = {name: data.draw(FIELDS[name]) for name in names}
    config = made(**options)
    hypothesis.assume(config is not None)
    with tempfile.TemporaryDirectory() as folder:
        construct(folder, config, names)


def construct(folder, config, names):
    trainer = cases.trainer(folder, data=cases.dataset(12))
    said = None
    try:
        LearnAlignCallback(trainer, config)
    except (ValueError, TypeError, FileNotFoundError) as error:
        said = str(error)
    if said is not None:
        assert any(name in said for name in names), said
        assert re.search(REMEDY, said, re.IGNORECASE), said


RAGGED = [
    ([[0.0, 1.0], [0.0]] * 6, r"row 1 of the column has \[0.0\], .*of length 2, as in row 0"),
    ([[0.0, 1.0]] * 11 + [[math.nan, 1.0]], r"row 11 of the column has \[nan, 1.0\]"),
    ([[0.0, 1.0]] * 5 + [None] + [[0.0, 1.0]] * 6, "row 5 of the column has None"),
    ([[]] * 12, r"row 0 of the column has \[\]"),
    ([None] + [[0.0, 1.0]] * 11, "row 0 of the column has None"),
]


@pytest.mark.parametrize(("column", "said"), RAGGED)
def test_a_column_of_embeddings_that_are_none_is_refused_by_name_and_row(tmp_path, column, said):
    trainer = cases.trainer(tmp_path, data=cases.dataset(12).add_column("mine", column))
    with pytest.raises(ValueError, match=f"adaptive_embeddings='mine': {said}.*Name a"):
        LearnAlignCallback(trainer, LearnAlignConfig.adaptive(adaptive_embeddings="mine"))


def test_embeddings_by_no_path_are_refused(tmp_path):
    trainer = cases.trainer(tmp_path)
    for name, said in [
        (":x", "is not 'hidden', 'none'"),
        ("math:pi", "is a float: name a function"),
    ]:
        with pytest.raises(ValueError, match=f"adaptive_embeddings='{name}' {said}"):
            LearnAlignCallback(trainer, LearnAlignConfig.adaptive(adaptive_embeddings=name))
