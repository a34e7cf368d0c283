"""Every reference answer, in a box, is right; the next problem's is wrong: by the rewards that recipes train with."""

import json
import logging
import os
import threading
from pathlib import Path

import cases
import pytest
from answers import ANSWERS
from datasets import Dataset
from trl.rewards import accuracy_reward as trls_reward

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.cli.arguments import RecipeArguments
from trl_learnalign.cli.problems import load_problems
from trl_learnalign.data.answers import (
    accuracy_reward,
    final_answer,
    misjudged,
    read_literally,
    reference_answer,
    why_not_gradable,
)
from trl_learnalign.data.loading import as_prompts
from trl_learnalign.data.notation import tidy

ALL = [answer for answers in ANSWERS.values() for answer in answers]


def boxed(answers):
    texts = [f"<think>So 1.</think>\n\\boxed{{{answer}}}" for answer in answers]
    return [[{"role": "assistant", "content": text}] for text in texts]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def grade(reward, answers, solutions):
    """Rewards of each reference's own answer, and of the next one's."""
    own = reward(boxed(answers), solution=list(solutions))
    following = reward(boxed([*answers[1:], answers[0]]), solution=list(solutions))
    return own, following


def test_each_reference_is_right_and_the_next_is_wrong_by_the_rewards_of_the_recipes(tmp_path):
    rows = [
        {"problem": f"Problem {i}?", "solution": f"Thus \\boxed{{{answer}}}."}
        for i, answer in enumerate(ALL)
    ]
    path = write_rows(tmp_path / "math.jsonl", rows)
    recipe = RecipeArguments(
        dataset_name=path, eval_dataset_name=path, dataset_test_split="train[:40]"
    )
    problems = load_problems(recipe)
    success, *_ = problems.rewards
    assert success.__name__ == "accuracy_reward"  # success_reward of users' YAML files
    own, following = grade(success, ALL, problems.train["solution"][:])
    assert [answer for answer, reward in zip(ALL, own, strict=True) if reward != 1.0] == []
    assert [answer for answer, reward in zip(ALL, following, strict=True) if reward != 0.0] == []
    assert problems.held_out["solution"][:] == problems.train["solution"][:40]
    assert success is accuracy_reward  # which is the strict figure of evaluations


def test_trls_own_reward_reads_the_same_solutions():
    """It takes completions as written: braceless fractions and currencies are beyond it, and nothing else."""
    own = trls_reward(boxed(ALL), [reference_answer(final_answer(answer)) for answer in ALL])
    lost = {answer for answer, reward in zip(ALL, own, strict=True) if reward != 1.0}
    assert lost == {
        *(r"\frac59", r"\frac{14}3", r"5\frac34", r"\sqrt2"),
        *(r"2\!\,000", r"1\,500", r"\text{\$}19", "€40", "0.75 dollars"),
    }


SAME = [
    (r"3\sqrt{13}", r"\sqrt{117}"),
    (r"\frac59", r"\frac{5}{9}"),
    (r"\frac{5}{9}", r"\frac59"),
    (r"\sqrt2", r"\sqrt{2}"),
    (r"5\frac34", r"\frac{23}{4}"),
    (r"2\frac{1}{3}", "7/3"),
    ("1,234", "1234"),
    ("1234", r"1{,}234"),
    ("1234", r"1\,234"),
    (r"\text{Evelyn}", "Evelyn"),
    ("Evelyn", r"\text{Evelyn}"),
    (r"\text{Yes}", "yes"),
    (r"\text{a circle}", "circle"),
    ("D", r"\textbf{(D)}\ 15"),
    (r"\text{(D)}", "D. 15"),
    ("B, C, E", "E,B,C"),
    ("AC", "A, C"),
    ("x = 5", "5"),
    ("2x+3", "y = 2x+3"),
    ("-3, 8", "8, -3"),
    (r"2 \text{ and } 6", "6, 2"),
    (r"\pm 5", "5,-5"),
    (r"25\%", "25"),
    ("25", r"25\%"),
    (r"45^\circ", "45"),
    ("30°", r"30^\circ"),
    ("18", r"\$18.00"),
    ("18", "18 dollars"),
    ("9 (apples)", "9"),
    (r"12\text{ cm}^2", "12"),
    (r"x\in[-2,7]", "[-2,7]"),
    (r"\frac{1}{3}", r"0.\overline{3}"),
    ("p - q", "-q+p"),
    ("1011_2", "1011"),
    ("6:30 p.m.", r"6\!:\!30\text{ PM}"),
    ("2.88e-19", r"2.880\times 10^{-19}"),
    ("0.00005", r"5\times 10^{-5}"),
    ("0.5", r"\frac12"),
    (["$2$", "$3$"], "3, 2"),
    ("x", "x"),
]

DIFFERENT = [
    (r"3\sqrt{13}", "3"),
    (r"3\sqrt{13}", r"\sqrt{13}"),
    ("2^{10}", "10"),
    ("p - q", "p"),
    ("p - q", "q - p"),
    (r"(3, \frac{\pi}{2})", "3"),
    ("1, 2, 5", "5"),
    ("1, 2, 5", "1, 2"),
    ("1,234", "1"),
    ("1,234", "234"),
    (r"2\frac{1}{3}", r"\frac{2}{3}"),
    (r"5\frac34", r"\frac{15}{4}"),
    (r"\text{Evelyn}", r"\text{Briana}"),
    ("Navin", "Vinan"),
    (r"\text{two lines}", r"\text{three lines}"),
    ("D", "A"),
    ("A", "A, C"),
    ("A, C", "A"),
    ("D", "(A) or (D)"),
    ("D", "A. 3, D. 4"),
    (r"\pm 5", "5"),
    ("5", r"\pm 5"),
    (r"25\%", "2.5"),
    (r"\$1,200", "200"),
    ("(2,7)", "[2,7]"),
    ("(1,2)", "(2,1)"),
    ("x < 3", r"x \le 3"),
    ("1011_2", "1011_3"),
    ("3:4", "3"),
    (r"6:30 \text{ p.m.}", r"6:30 \text{ a.m.}"),
    ("10^{-6}", "0"),
    ("2.88e-19", "1.325e-27"),
    ("0.0000003", "0.0000004"),
    (r"0.\overline{3}", "0.3"),
    (r"1.2\overline{5}", "1.25"),
    (
        r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
        r"\begin{pmatrix} 1 & 2 \\ 3 & 5 \end{pmatrix}",
    ),
    ("3+4i", "3"),
    (r"\log_2 5", "5"),
    (r"\{-4, 4\}", "4"),
    ("x=1, y=2", "x=1"),
    ("5 million", "5"),
    ("7", ""),
    (["$2$", "$3$"], "2"),
]


def rewards_of(pairs):
    solutions = [reference_answer(final_answer(reference)) for reference, _ in pairs]
    assert all(solutions)
    return accuracy_reward([f"\\boxed{{{answer}}}" for _, answer in pairs], solutions)


def test_other_ways_to_write_an_answer_are_right():
    assert [
        pair for pair, reward in zip(SAME, rewards_of(SAME), strict=True) if reward != 1.0
    ] == []


def test_parts_of_answers_and_other_answers_are_wrong():
    assert [
        pair for pair, reward in zip(DIFFERENT, rewards_of(DIFFERENT), strict=True) if reward != 0.0
    ] == []


def gsm8k():
    """The whole test file, where it is at hand: GSM8K_FOLDER, or a folder of shared data beside the checkout."""
    places = [Path(os.environ["GSM8K_FOLDER"])] if "GSM8K_FOLDER" in os.environ else []
    places += [parent / "shared" / "data" / "gsm8k" for parent in list(cases.ROOT.parents)[:2]]
    return next(
        (place / "test.jsonl" for place in places if (place / "test.jsonl").is_file()), None
    )


@pytest.mark.skipif(gsm8k() is None, reason="needs GSM8K's test.jsonl: set GSM8K_FOLDER")
def test_all_of_gsm8k():
    rows = [json.loads(line) for line in gsm8k().read_text().splitlines()]
    written = [row["answer"].rsplit("####", 1)[1].strip() for row in rows]
    solutions = as_prompts(Dataset.from_list(rows))["solution"][:]
    own, following = grade(accuracy_reward, written, solutions)
    assert own == [1.0] * 1319
    same = [float(a == b) for a, b in zip(solutions, solutions[1:] + solutions[:1], strict=True)]
    assert following == same


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (r"\boxed{5}", 1.0),
        (
            r"It is \boxed{4}. No, having checked it all once more from the very beginning to the end, \boxed{5}",
            1.0,
        ),
        (r"\boxed{4} or \boxed{5}", 1.0),
        (r"\boxed{5} or \boxed{4}", 0.0),
        (r"\boxed{\boxed{5}}", 1.0),
        (r"\boxed 5", 1.0),
        (r"\fbox{5}", 1.0),
        (r"\boxed{4} and now \boxed{5", 0.0),
        ("The answer is 5", 0.0),
        ("", 0.0),
        (r"\boxed{5", 0.0),
        (r"\boxed{" + "9" * 2000 + "}", 0.0),
    ],
)
def test_what_a_completion_answers(completion, reward):
    assert accuracy_reward([completion], ["5"]) == [reward]
    assert accuracy_reward(
        [[{"role": "assistant", "content": completion}]], solution=["5"], other=1
    ) == [reward]


def test_it_grades_in_any_thread_and_logs_what_it_read():
    logged, rewards = {}, []

    def work():
        rewards.extend(accuracy_reward(boxed(["2", "3"]), ["2", ""], log_extra=logged.__setitem__))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert rewards == [1.0, None]
    assert logged == {"solution": ["2", ""], "answer": ["2", "3"]}


def test_several_boxes_are_a_list_where_the_reference_is_one():
    said = r"The roots are \boxed{2} and \boxed{-3}."
    assert accuracy_reward([said] * 4, ["-3, 2", "-3", "2", "2, 3"]) == [1.0, 1.0, 0.0, 0.0]


def test_of_several_right_answers_any_is_right():
    several = [["Paris", "City of Light"], ["7", r"\boxed{\frac{1}{2}}"], [], ["", None], None]
    said = [r"\boxed{city of light}", r"\boxed{0.5}", *[r"\boxed{7}"] * 3]
    assert accuracy_reward(said, several) == [1.0, 1.0, None, None, None]
    assert accuracy_reward([r"\boxed{London}", r"\boxed{8}"], several[:2]) == [0.0, 0.0]
    assert misjudged([["7", r"3\sqrt{13} and more"], [r"3\sqrt{13} and more"], None]) == [1]


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("", "no answer"),
        ("nan", "no answer"),
        ("proof", "no answer"),
        ('{"inputs": ["1"], "outputs": ["2"]}', "tests of a program"),
        (
            "Let $a$ be the least such number; then by induction the claim holds for all.",
            "text rather than",
        ),
        ("x+" * 300 + "1", "text rather than"),
    ],
)
def test_what_cannot_be_compared_is_no_reference(answer, why):
    assert why in why_not_gradable(answer)
    assert reference_answer(answer) == ""


def test_references_that_the_grader_does_not_read_are_found():
    assert misjudged(["1", "", "2", r"\boxed{3\sqrt{13}}"]) == []
    assert misjudged([r"3\sqrt{13} and more", "4"]) == [0]  # not in a box: read as a part


def test_references_that_are_read_as_they_are_written_only_are_named(caplog):
    """A second notation shows what the same text on both sides hides."""
    read = ["7", "A", r"\boxed{\text{odd}}", "", None, ["Paris", r"\boxed{\frac{\sqrt{3}}{4}}"]]
    read += [
        rf"\boxed{{{answer}}}"
        for answer in ("pi/6", "2√3", r"5\frac{3}{4}", r"x \ge 5", r"(1, \frac{\pi}{2})")
    ]
    assert read_literally(read) == []
    unread = r"\boxed{\frac{d x}{d t}=k x-a}"
    assert misjudged([*read, unread]) == []
    assert read_literally([*read, unread]) == [len(read)]
    rows = [{"question": f"{i}?", "answer": answer} for i, answer in enumerate(["7", unread])]
    as_prompts(Dataset.from_list(rows))
    assert (
        "recognises 1 of the sampled reference answers only in their exact notation" in caplog.text
    )
    assert "The first is row 1" in caplog.text


def test_only_so_many_references_are_graded(caplog):
    """Of many, plain numbers and those that differ in digits alone by examples; and it is said."""
    graded = []

    def reward(completions, solution):
        graded.extend(solution)
        return [float("y" not in text) for text in solution]

    letters = [f"\\boxed{{x_{{{a}{b}}}}}" for a in "abcdefgh" for b in "abcdefgh"]
    alike = [f"\\boxed{{{letter}+{i}}}" for letter in "xy" for i in range(50)]
    solutions = [str(i % 1000) for i in range(20_000)] + letters + alike
    with caplog.at_level(logging.INFO, "trl_learnalign"):
        assert misjudged(solutions, most=200, reward=reward) == list(
            range(20_114, 20_164)
        )  # all with a y
    assert 150 < len([solution for solution in graded if "box" not in solution]) <= 200
    assert (
        len([solution for solution in graded if "box" in solution]) == 164
    )  # no more than 200: every one
    assert "a sample of" not in caplog.text
    graded.clear()
    with caplog.at_level(logging.INFO, "trl_learnalign"):
        assert misjudged(solutions, most=100, reward=reward) == list(
            range(20_114, 20_164)
        )  # by three of them
    assert len([solution for solution in graded if "box" in solution]) == 64 + 3 + 3
    assert "There are 1164 distinct reference answers; a sample of 70 was graded" in caplog.text
    graded.clear()
    misjudged(solutions, most=20, reward=reward)
    assert 10 < len([solution for solution in graded if "box" in solution]) <= 20


# ---- A dataset and a trainer of one's own ---------------------------------------------------------------------------

BARE = [r"\sqrt{51}", r"3\sqrt{13}", "12", r"\frac{1}{2}", "7"]
READ = [r"\boxed{\sqrt{51}}", r"$3\sqrt{13}$", "12", r"\frac{1}{2}", "so 3 + 4 = 7.\n#### 7"]


def own_trainer(folder, solutions, reward):
    """A stock trainer on conversations with these solutions."""
    rows = [
        {"prompt": [{"role": "user", "content": f"{i}?"}], "solution": text}
        for i, text in enumerate(solutions)
    ]
    return cases.trainer(folder, rewards=reward, data=Dataset.from_list(rows))


def attach(trainer):
    LearnAlignCallback(trainer, LearnAlignConfig(warmup_samples=0, stages=[2]))


def test_bare_latex_in_a_dataset_of_ones_own_is_seen_before_any_rollout(tmp_path, caplog):
    """TRL's reward does not read it; ours does."""
    trainer = own_trainer(tmp_path, BARE, trls_reward)
    attach(trainer)
    assert (
        "accuracy_reward grades 2 of 5 reference answers as wrong against themselves" in caplog.text
    )
    assert r"The first is row 0: '\\sqrt{51}'" in caplog.text
    # The line that it names mends them.
    mended = trainer.train_dataset.map(
        lambda row: {"solution": reference_answer(final_answer(row["solution"]))}
    )
    caplog.clear()
    attach(cases.trainer(tmp_path / "mended", rewards=trls_reward, data=mended))
    attach(own_trainer(tmp_path / "ours", BARE, accuracy_reward))
    assert "as wrong against themselves" not in caplog.text
    assert accuracy_reward([r"\boxed{\sqrt{117}}", r"\boxed{3}"], BARE[1:2] * 2) == [1.0, 0.0]


@pytest.mark.parametrize("reward", [trls_reward, accuracy_reward], ids=["of TRL", "ours"])
def test_answers_that_are_read_as_they_are_are_not_warned_of(tmp_path, caplog, reward):
    attach(own_trainer(tmp_path, READ, reward))
    assert "as wrong against themselves" not in caplog.text


def test_a_dataset_whose_answers_mostly_cannot_be_read_is_refused(tmp_path, caplog):
    def own(completions, solution, **_):
        return trls_reward(completions, solution)

    trainer = own_trainer(tmp_path, [*BARE[:2], *BARE[:1]], trls_reward)
    with pytest.raises(
        ValueError,
        match=r"grades 3 of 3 reference answers as wrong.*reference_answer.*function of your own",
    ):
        attach(trainer)
    attach(own_trainer(tmp_path / "own", BARE[:2], own))  # it may read them as it likes
    assert "as wrong against themselves" not in caplog.text


def test_lists_of_right_answers_are_for_our_reward(tmp_path, caplog):
    attach(own_trainer(tmp_path, [["7", "seven"], ["12"]], accuracy_reward))
    assert "as wrong against themselves" not in caplog.text
    with pytest.raises(ValueError, match=r"also accepts lists of texts, any of which is correct"):
        attach(own_trainer(tmp_path / "trls", [["7", "seven"], ["12"]], trls_reward))


def test_answers_that_are_no_text_are_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"'solution' has values that are not text.*str\(row\['solution'\]\)"
    ):
        attach(own_trainer(tmp_path, [1, 2, 3], trls_reward))


@pytest.mark.parametrize(
    "answer", ["x", "5 ab", "3 percent", "2 and 6", "A", r"\frac{1}{2}", "f(x)", "5 million"]
)
def test_tidying_leaves_mathematics_alone(answer):
    assert tidy(answer) == answer


PROOF = "We proceed by induction on the number of vertices, the base case being clear."


def test_rows_that_cannot_be_judged_are_counted_and_shown(caplog):
    rows = [{"question": f"{i}?", "answer": "7" if i < 3 else PROOF} for i in range(4)]
    made = as_prompts(Dataset.from_list(rows))
    assert made["solution"][:] == ["7", "7", "7", ""]
    assert "1 of 4 rows have no gradable answer (1 text rather than a final answer)" in caplog.text
    assert "the first is row 3: 'We proceed by induction" in caplog.text


def test_datasets_of_proofs_and_programs_are_refused_by_name():
    proofs = Dataset.from_list(
        [{"question": f"{i}?", "answer": "7" if i == 2 else PROOF} for i in range(4)]
    )
    with pytest.raises(
        ValueError, match=r"3 of 4 rows .*text rather than a final answer.*row 0.*--max_unjudged 1"
    ):
        as_prompts(proofs)
    assert len(as_prompts(proofs, max_unjudged=1.0)) == 4
    with pytest.raises(ValueError, match=r"max_unjudged=0.1"):
        as_prompts(proofs.select([0, 2]), max_unjudged=0.1)
    with pytest.raises(ValueError, match=r"max_unjudged=20: give a share"):
        as_prompts(proofs, max_unjudged=20)
    tests = json.dumps({"inputs": ["1"], "outputs": ["2"]})
    code = Dataset.from_list(
        [{"prompt": "Write a program.", "reward_model": {"ground_truth": tests}}]
    )
    with pytest.raises(ValueError, match="unit tests of a program, which are not executed"):
        as_prompts(code)


def test_a_recipe_refuses_them_before_anything_is_generated(tmp_path):
    path = write_rows(
        tmp_path / "proofs.jsonl", [{"problem": f"{i}?", "solution": PROOF} for i in range(20)]
    )
    with pytest.raises(ValueError, match="20 of 20 rows"):
        load_problems(RecipeArguments(dataset_name=path))
