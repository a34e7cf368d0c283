"""Nothing that a model can write raises an error in grading, nor takes longer than a set time."""

import logging
import re
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trl_learnalign.data import answers, mathematics
from trl_learnalign.data.answers import accuracy_reward, boxed_answer, compared, final_answer
from trl_learnalign.data.notation import TooLargeError, compact, exact_value, tidy
from trl_learnalign.evaluation.grading import BOXED, MARKED, Grader, flexible_answer, strict_answer

REFERENCES = [
    *(
        "7",
        "-3.5",
        "1250",
        "007",
        "A",
        "A, C",
        "Paris",
        r"\boxed{\frac{1}{2}}",
        r"\boxed{\sqrt{13}}",
        "2^{10}",
    ),
    *(
        r"\boxed{x=1, y=2}",
        r"\boxed{\{1,2\}}",
        r"\boxed{(1,2)}",
        r"\boxed{x \ge 5}",
        r"\boxed{25\%}",
        "1011_2",
    ),
    *(
        r"\boxed{n=3k, k\in\mathbb{Z}}",
        r"\boxed{6:30 \text{ p.m.}}",
        r"\boxed{\pm 5}",
        "so 3 + 4 is 7",
        "$x$ is 3",
    ),
    *(
        r"\boxed{1,2,3,4,5,6,7,8,9}",
        r"0.\overline{3}",
        "",
        "5 million",
        r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
    ),
]
PIECES = [
    *(
        "0",
        "1",
        "9",
        "12",
        ",",
        ".",
        "-",
        "+",
        "/",
        "*",
        "^",
        "!",
        "%",
        "=",
        "<",
        "(",
        ")",
        "[",
        "]",
        "{",
        "}",
        "|",
    ),
    *(
        " ",
        "\n",
        "\t",
        "$",
        "$$",
        "\\",
        "#",
        "####",
        "**",
        "_",
        ":",
        ";",
        "'",
        "x",
        "A",
        "(B)",
        "e",
        "E",
        "and ",
    ),
    *(
        r"\frac",
        r"\frac{1}",
        r"\boxed",
        r"\boxed{",
        r"\fbox{",
        r"\sqrt",
        r"\sqrt[",
        r"\overline{",
        r"\overline{3}",
    ),
    *(
        r"\,",
        r"\!",
        r",\!",
        "{,}",
        r"\left(",
        r"\right)",
        r"\{",
        r"\}",
        r"\text{",
        r"\text{ and }",
        r"\pm",
        r"\le",
    ),
    *(
        "^{9",
        "^{9^{9}}",
        "5^{5^{",
        "1,000",
        "0.000",
        "1e9",
        r"\times 10^{",
        r"\cdot",
        r"\in",
        r"\mathbb{Z}",
        "×",
        "√",
    ),
    *(
        "²",
        "½",
        "–",
        "≥",
        "π",
        "∞",
        "é",
        "\u202f",
        "\x00",
        "\ud800",
        "0.3",
        "The answer is ",
        "answer:",
        "</think>",
    ),
    *(
        r"\begin{pmatrix}",
        "&",
        r"\\",
        r"\lfloor",
        r"\binom{9}{",
        r"\int_0^",
        r"\sum_{n=1}^{",
        r"\log_",
        "i",
        "pi",
    ),
]
COUNTS = [1, 1, 1, 2, 3, 24, 400, 4301, 20_000]


@st.composite
def texts(draw):
    """Up to 20,000 characters of pieces, some of them many times over, in a box or not."""
    piece = st.sampled_from(PIECES) | st.text(max_size=5)
    parts = draw(st.lists(st.tuples(piece, st.sampled_from(COUNTS)), max_size=8))
    text = "".join(part * count for part, count in parts)[:20_000]
    return draw(
        st.sampled_from(["{}", r"\boxed{{{}}}", r"So \boxed{{{}}} it is.", "#### {}"])
    ).format(text)


class Deaf:
    """In place of math-verify: says no, to look at our own part alone."""

    def equal(self, reference, answer, seconds):
        return mathematics.Verdict(False, 0.0)


@pytest.fixture
def deaf(monkeypatch):
    monkeypatch.setattr(mathematics, "WORKER", Deaf())
    answers._judged.cache_clear()
    yield
    answers._judged.cache_clear()


def check_grades(text, references, **options):
    rewards = accuracy_reward([text] * len(references), references, **options)
    assert all(reward is None or 0 <= reward <= 1 for reward in rewards)
    assert accuracy_reward([text], [list(filter(None, references))], **options) == [
        max(reward for reward in rewards if reward is not None)
    ]


FUZZ = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


references = st.lists(st.sampled_from(REFERENCES), min_size=4, max_size=4, unique=True)


@settings(FUZZ, max_examples=200)
@given(texts(), references)
def test_any_text_is_graded(deaf, text, references):
    check_grades(text, references)
    rows = [{"prompt": "?", "solution": reference} for reference in references]
    for grader in (Grader(BOXED), Grader(MARKED)):
        assert len(grader.verdicts(rows, [text] * len(rows))) == len(rows)
    final_answer(text)


@settings(FUZZ, max_examples=30)
@given(texts(), references)
def test_any_text_is_graded_by_math_verify_too(text, references):
    check_grades(text, references, grading_seconds=0.05)


# ---- time in proportion to the length -------------------------------------------------------------------------------

REPEATED = [
    *(
        "9",
        ",",
        ".",
        "-",
        "^",
        "(",
        "[",
        "{",
        "{}",
        " ",
        "\n",
        "$",
        "\\",
        "#",
        "*",
        "_",
        ":",
        "x",
        "A",
        "(B)",
        "9.",
    ),
    *(
        "1,",
        "(1,",
        "a b ",
        "answer: \n",
        "answer ",
        "The answer is ",
        r"1,\!",
        r"\,",
        r"\frac",
        r"\frac{",
        r"\sqrt[",
    ),
    *(
        r"\( ",
        r"\[",
        r"\boxed{",
        r"\boxed{1} ",
        r"\text{",
        r"\overline{3}",
        "5^{",
        "1,000",
        "²",
        "√",
        "–",
        "option A ",
    ),
]
SHORT, LONG = 2_000, 16_000


def family(piece, length):
    """Texts of a length that are mostly repetition, with and without an end that no pattern likes."""
    repeated = piece * (length // len(piece))
    return [
        repeated,
        "1" + repeated,
        f"x{repeated}1",
        f"\\boxed{{{repeated}}}",
        f"The answer is {repeated}",
    ]


def found(text):
    final_answer(text)
    boxed_answer(text)
    strict_answer(text)
    for reference in ("7", "A", "Paris", r"\boxed{\sqrt{2}}"):
        flexible_answer(text, reference)


STEPS = {
    "found": found,
    "one notation": lambda text: compact(tidy(text)),
    "no mathematics": lambda text: (
        compared("A", text),
        compared("Paris", text),
        compared("1_2", text),
    ),
    "reward": lambda text: accuracy_reward([text] * 2, ["7", r"\boxed{\{1,2\}}"]),
}


def processor_seconds(step, all_texts):
    answers._judged.cache_clear()
    start = time.process_time()
    for text in all_texts:
        step(text)
    return time.process_time() - start


def grows_too_fast(step, piece):
    """Whether eight times the text takes much more than eight times as long: 64 times if it grows with the square."""
    short = processor_seconds(step, family(piece, SHORT))
    return processor_seconds(step, family(piece, LONG)) > 24 * short + 0.02


@pytest.mark.parametrize("name", STEPS)
def test_grading_takes_time_in_proportion_to_the_length(deaf, name):
    step = STEPS[name]
    suspects = [piece for piece in REPEATED if grows_too_fast(step, piece)]
    # A measurement may be disturbed once.
    assert [piece for piece in suspects if all(grows_too_fast(step, piece) for _ in range(3))] == []


def test_what_grew_with_the_square_is_seen():
    """The test above can fail."""

    assert grows_too_fast(re.compile(r"\s*\$").search, " ")


@pytest.mark.parametrize(
    "reference", ["7", r"\boxed{\{" + "1,2," * 60 + r"3\}}", r"\boxed{\sqrt{2}}"]
)
def test_the_longest_answers_take_milliseconds(deaf, reference):
    for piece in REPEATED:
        text = f"\\boxed{{{(piece * answers.LONGEST)[: answers.LONGEST]}}}"
        assert (
            processor_seconds(lambda text: accuracy_reward([text], [reference]), [text]) < 0.25
        ), piece


# ---- numbers that nobody should compute -----------------------------------------------------------------------------


@pytest.mark.parametrize("length", [400, 990, 4301, 20_000])
@pytest.mark.parametrize(
    "number",
    [
        lambda length: "9" * length,
        lambda length: "-" + "9" * length,
        lambda length: "0." + "0" * length + "1",
        lambda length: "1" + ",000" * (length // 4),
        lambda length: "1" + r",\!000" * (length // 6),
        lambda length: "1" + "{,}000" * (length // 6),
        lambda length: "1e" + "9" * length,
        lambda length: "9" * length + "e9",
        lambda length: "10^{" + "9" * length + "}",
        lambda length: "9" * length + r" \times 10^{9}",
        lambda length: r"9 \times 10^{-" + "9" * length + "}",
        lambda length: r"0.\overline{" + "9" * length + "}8",
        lambda length: "0." + "9" * length + r"\overline{3}",
        lambda length: r"\frac{" + "9" * length + "}{2}",
        lambda length: "2/" + "9" * length,
        lambda length: "5^{" * (length // 4) + "5" + "}" * (length // 4),
        lambda length: "5" + "!" * length,
        lambda length: "9" * length + "%",
        lambda length: "9" * length + " million",
        lambda length: "9" * length + " dollars",
        lambda length: "²" * length,
        lambda length: "2√" + "3" * length,
    ],
)
def test_numbers_of_any_length_are_wrong(deaf, number, length):
    said = f"\\boxed{{{number(length)}}}"
    assert accuracy_reward([said] * 3, ["7", "0.5", r"\boxed{2^{10}}"]) == [0.0] * 3


def test_towers_are_too_large_and_not_computed():
    for text in ("5^{5^{5^{5}}}", "9^{9^{9}}", "10^{-99999}", "1001!", "((9!)!)!", "9" * 1001):
        with pytest.raises(TooLargeError):
            exact_value(text)
    assert exact_value("1^{99999999}") == 1
    assert exact_value("2^{-3}") == 0.125
    assert (
        exact_value("1/0") is exact_value("2^{1/2}") is exact_value("x") is exact_value("") is None
    )


def test_an_answer_that_takes_too_long_is_wrong_and_is_mentioned_once(caplog):
    slow = [rf"\boxed{{\sqrt{{{i}}}^{{5^{{5^{{5^{{5}}}}}}}}}}" for i in (2, 3)]
    start = time.process_time()
    with caplog.at_level(logging.WARNING, "trl_learnalign"):
        rewards = accuracy_reward(
            [*slow, r"\boxed{\frac{2}{\sqrt{2}}}"], [r"\boxed{\sqrt{2}}"] * 3, grading_seconds=0.3
        )
    assert rewards == [0.0, 0.0, 1.0]
    assert (
        caplog.text.count(
            "An answer was graded as wrong because it exceeded the time limit of math-verify"
        )
        <= 1
    )
    assert time.process_time() - start < 1  # it is another process that is busy


def test_a_call_has_so_much_patience():
    """Of answers that take too long the first five have all the time, the others a tenth."""
    asked = []

    class Busy:
        def equal(self, reference, answer, seconds):
            asked.append(seconds)
            raise mathematics.OutOfTimeError

    answers._judged.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mathematics, "WORKER", Busy())
        said = [rf"\boxed{{\sqrt{{{i}}}}}" for i in range(2, 12)]
        assert accuracy_reward(said, ["x+y"] * 10, grading_seconds=2.0) == [0.0] * 10
    answers._judged.cache_clear()
    assert asked == [2.0] * 5 + [0.2] * 5
