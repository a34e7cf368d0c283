"""Answers found in completions, and what they are worth."""

import json
import os
import re
from pathlib import Path

import cases
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_learnalign.cli import evaluate as command
from trl_learnalign.evaluation.grading import (
    BOXED,
    MARKED,
    Grader,
    flexible_answer,
    graded_answers,
    load_reward,
    strict_answer,
)
from trl_learnalign.toy.tasks import accuracy_reward, build_pool

BASE_MODEL = cases.ROOT / "docs" / "results" / "base_model"


@pytest.mark.parametrize(
    ("text", "reference", "strict", "flexible"),
    [
        (r"So \boxed{18} it is", "18", "18", "18"),
        ("18 - 9 = 9\n#### 9", "9", "9", "9"),
        ("#### 180\nThe answer is: 180", "180", "180", "180"),
        ("Therefore, the answer is $18.", "18", "$18", "18"),
        ("I add them up.\n**Answer:** 7 apples", "7", "7 apples", "7"),
        ("The final answer is 7 + 1 = 8 years.", "8", "7 + 1 = 8 years", "8"),
        ("That makes 5 and 6.\nShe has 1,250 dollars in the end.", "1250", None, "1,250"),
        ("That is -3.5 degrees, and this is all that I can say", "-3.5", None, "-3.5"),
        ("1234", "1234", "1234", "1234"),
        ("  Addis Ababa. ", "Addis Ababa", "Addis Ababa", "Addis Ababa"),
        ("The capital of Ethiopia is called Addis Ababa.", "Addis Ababa", None, "Addis Ababa"),
        ("I choose (B) because A cat is none of them.", "B", None, "B"),
        (
            "We know that it must be $x^2$, hence $\\frac{1}{2}$, if all is well",
            "\\boxed{\\frac{1}{2}}",
            None,
            "\\frac{1}{2}",
        ),
        ("<think>The answer is 4</think>After all I would say it is 5 rather", "5", None, "5"),
        ("ANSWER: A … but actually, ANSWER: B", "B", "B", "B"),
        ("ANSWER: A … but actually, ANSWER: B", "A", "B", "B"),
        ("The answer is A. No, the answer is b.", "B", "b", "b"),
        ("The answer: 5\nAnswer:\n**7**", "7", "7", "7"),
        ("My answer isn't any of these, I fear that", "7", None, None),
        ("#### 5\n####", "5", "5", "5"),
        (r"\boxed{1} and \boxed{2}", "2", "2", "2"),
        (r"\boxed{4} and then \boxed{5", "4", None, "5"),
        ("", "5", None, None),
        ("There is no number in this sentence of mine.", "5", None, None),
        (r"\boxed{}", "5", None, None),
    ],
)
def test_where_answers_are_found(text, reference, strict, flexible):
    assert strict_answer(text) == strict
    assert flexible_answer(text, reference) == flexible


@pytest.mark.parametrize(
    ("answer", "reference", "reward"),
    [
        ("18 dollars", "18", 1.0),
        ("1,250", "1250", 1.0),
        ("18.0", "18", 1.0),
        (r"\frac12", "\\boxed{0.5}", 1.0),
        ("19", "18", 0.0),
        ("b", "B", 1.0),
        ("D, 12", "D", 1.0),
        ("9" * 20_000, "18", 0.0),
        ("elppa", "\\boxed{apple}", 0.0),  # a product of the same variables to a parser of formulas
        ("Apple", "\\boxed{apple}", 1.0),
        ("049", "49", 1.0),
        (None, "49", 0.0),
        ("49", "", None),
    ],
)
def test_answers_are_compared_by_value(answer, reference, reward):
    assert graded_answers([answer], [reference]) == [reward]


def test_of_several_references_any_is_right():
    assert graded_answers(["lutetia", "9", "9"], [["Paris", "Lutetia"], ["7", "8"], []]) == [
        1,
        0,
        None,
    ]
    rows = [
        {"prompt": "?", "solution": several} for several in (["Paris", "8"], ["8", "Paris"], [])
    ]
    texts = ["I would say that it was 8 when I saw Paris"] * 3
    for grader in (Grader(BOXED), Grader(MARKED)):
        verdicts = grader.verdicts(rows, texts)
        assert [verdict.flexible_right for verdict in verdicts] == [True, True, False]
        assert [verdict.flexible_answer for verdict in verdicts] == ["Paris", "8", None]


def test_strings_of_digits_are_the_same_strings_for_the_strict_figure():
    (verdict,) = Grader(MARKED).verdicts([{"prompt": "copy 049", "solution": "049"}], ["49"])
    assert (verdict.right, verdict.flexible_right) == (False, True)


def test_where_a_box_was_asked_for_the_strict_figure_is_the_reward_of_training():
    rows = [{"prompt": "1 + 1?", "solution": "2"}] * 3
    texts = [r"\boxed{2}", "It is 2.", "No idea."]
    verdicts = Grader(BOXED).verdicts(rows, texts)
    assert [verdict.right for verdict in verdicts] == [True, False, False]
    assert [verdict.flexible_right for verdict in verdicts] == [True, True, False]
    assert [verdict.answer for verdict in verdicts] == ["2", None, None]
    assert [verdict.flexible_answer for verdict in verdicts] == ["2", "2", None]


# ---- rewards of one's own -------------------------------------------------------------------------------------------


def test_a_reward_is_found_by_its_path_also_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(
        "def long(completions, **_):\n    return [len(text) for text in completions]\nnumber = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_reward("own_rewards:long")(["ab", "c"]) == [2, 1]
    assert load_reward("trl_learnalign.toy.tasks:accuracy_reward") is accuracy_reward
    with pytest.raises(ValueError, match=r"own_rewards has no 'short'"):
        load_reward("own_rewards:short")
    with pytest.raises(ValueError, match=r"nowhere cannot be imported .* or start from its folder"):
        load_reward("nowhere:reward")
    with pytest.raises(ValueError, match=r"as 'package.module:function'"):
        load_reward("own_rewards")
    with pytest.raises(TypeError, match=r"is a int: name a function"):
        load_reward("own_rewards:number")


# ---- figures against an independent count ---------------------------------------------------------------------------


def continued(model, tokenizer, text, most):
    """Greedy, one token after the other, with the model's forward pass alone."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(most):
        with torch.no_grad():
            following = model(ids).logits[0, -1].argmax()
        ids = torch.cat([ids, following[None, None]], dim=1)
        if following == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def run(arguments, capsys):
    command.main(arguments)
    return " ".join(capsys.readouterr().out.split())


def test_sixty_tasks_of_the_quickstart_are_counted_as_by_hand(tmp_path, capsys):
    tasks = build_pool("mixed", 60, 42, split="heldout")
    path = tmp_path / "tasks.jsonl"
    rows = [{"question": task["prompt"][0]["content"], "answer": task["answer"]} for task in tasks]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = AutoModelForCausalLM.from_pretrained(BASE_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    said = [continued(model, tokenizer, f"{row['question']}=", 10) for row in rows]
    same = sum(text == row["answer"] for text, row in zip(said, rows, strict=True))
    equal = sum(int(text) == int(row["answer"]) for text, row in zip(said, rows, strict=True))
    assert 0 < same < equal < 60
    shared = [
        "--model_name_or_path",
        str(BASE_MODEL),
        "--benchmarks",
        str(path),
        "--use_cpu",
        "true",
    ]
    shared += ["--max_completion_length", "10"]
    printed = run([*shared, "--output_dir", str(tmp_path / "found")], capsys)
    assert f"strict {100 * same / 60:.2f} %" in printed
    assert f"flexible {100 * equal / 60:.2f} %" in printed
    reward = ["--reward_funcs", "trl_learnalign.toy.tasks:accuracy_reward"]
    printed = run([*shared, *reward, "--output_dir", str(tmp_path / "graded")], capsys)
    assert f"as graded {100 * same / 60:.2f} %" in printed
    records = (tmp_path / "found" / "tasks" / "records.jsonl").read_text().splitlines()
    assert [json.loads(line)["completions"][0]["text"] for line in records] == said


def test_completions_without_an_answer_are_counted(tmp_path, capsys, monkeypatch):
    from trl_learnalign.evaluation.generators import Completion, TransformersGenerator

    texts = iter(
        ["It is hard to say what this might be.", "I believe that it comes to 7 or so.", "8"]
    )

    def complete(self, prompts, sampling, key):
        return [[Completion(next(texts), 9, True)] for _ in prompts]

    monkeypatch.setattr(TransformersGenerator, "complete", complete)
    path = tmp_path / "q.jsonl"
    rows = [{"question": f"{i} + 6?", "answer": str(i + 6)} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = [
        "--model_name_or_path",
        str(BASE_MODEL),
        "--benchmarks",
        str(path),
        "--use_cpu",
        "true",
    ]
    printed = run([*shared, "--output_dir", str(tmp_path)], capsys)
    assert re.search(r"strict 33.33 % \[[^]]*\] 2 ", printed)
    assert re.search(r"flexible 66.67 % \[[^]]*\] 1 ", printed)
    summary = json.loads((tmp_path / "q" / "summary.json").read_text())
    assert (summary["no_answer"], summary["flexible"]["no_answer"]) == (2, 1)


# ---- a pretrained model on GSM8K ------------------------------------------------------------------------------------


def number(text):
    digits = re.sub(r"[^\d.-]", "", text).strip(".")
    return float(digits) if re.search(r"\d", digits) else None


def by_hand(text, reference):
    """Strict and flexible, with patterns of lm-evaluation-harness rather than those of the package."""
    marked = re.findall(r"(?:#### |[Aa]nswer is:? |boxed\{)\$?(-?[0-9.,]+)", text)
    everywhere = re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", text)
    strict = bool(marked) and number(marked[-1]) == number(reference)
    return strict, strict or (bool(everywhere) and number(everywhere[-1]) == number(reference))


def test_gsm8k_is_counted_as_by_hand(tmp_path, pretrained, gsm8k_file, capsys):
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("".join(gsm8k_file.read_text().splitlines(keepends=True)[:20]))
    arguments = ["--model_name_or_path", pretrained, "--benchmarks", str(path), "--use_cpu", "true"]
    arguments += [
        "--max_completion_length",
        "96",
        "--dtype",
        "float32",
        "--output_dir",
        str(tmp_path),
    ]
    run(arguments, capsys)
    records = (tmp_path / "gsm8k" / "records.jsonl").read_text().splitlines()
    for record in map(json.loads, records):
        counted = by_hand(record["completions"][0]["text"], record["solution"])
        assert (record["right"][0], record["flexible_right"][0]) == counted


@pytest.fixture
def gsm8k_file():
    folder = os.environ.get("GSM8K_FOLDER")
    if folder is None:
        pytest.skip("needs GSM8K's test.jsonl: set GSM8K_FOLDER")
    return Path(folder) / "test.jsonl"


@pytest.fixture
def pretrained():
    if "PRETRAINED_FOLDER" not in os.environ:
        pytest.skip("needs a pretrained chat model: set PRETRAINED_FOLDER")
    return os.environ["PRETRAINED_FOLDER"]
