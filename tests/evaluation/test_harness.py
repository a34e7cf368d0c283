"""Tasks of lm-evaluation-harness: run offline on a tiny model where it is installed, records converted everywhere."""

import json
import re
import sys

import cases
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_learnalign.cli import compare as compare_command
from trl_learnalign.cli import evaluate as command
from trl_learnalign.evaluation.benchmarks import evaluate_tasks, records_of, task_name
from trl_learnalign.toy.tasks import build_pool

BASE_MODEL = cases.ROOT / "docs" / "results" / "base_model"

TASK = r"""
task: string_tasks
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: []
  do_sample: false
  max_gen_toks: 10
filter_list:
  - name: strict-match
    filter:
      - function: regex
        regex_pattern: "^([0-4]\\d*)$"
      - function: take_first
  - name: flexible-extract
    filter:
      - function: regex
        group_select: -1
        regex_pattern: "(\\d+)"
      - function: take_first
metric_list:
  - metric: exact_match
"""
"""The strict filter finds answers that begin with 0 to 4 alone, so that the two figures differ."""


def sample(problem, name, found, right, **others):
    return {
        "doc_id": problem,
        "filter": name,
        "filtered_resps": [found],
        "resps": [["It is 7."]],
        "target": "7",
        "arguments": {"gen_args_0": {"arg_0": f"question {problem}"}},
        "metrics": ["exact_match"],
        "exact_match": right,
        **others,
    }


def test_samples_of_the_harness_become_records():
    samples = [
        sample(1, "flexible-extract", "7", 1.0),
        sample(0, "flexible-extract", "[invalid]", 0.0),
        sample(0, "strict-match", "[invalid]", 0.0),
        sample(1, "strict-match", "[invalid]", 0.0),
    ]
    first, second = records_of(samples)
    assert (first["index"], second["index"]) == (0, 1)
    assert (first["right"], first["flexible_right"]) == ([False], [False])
    assert (second["right"], second["flexible_right"]) == ([False], [True])
    assert (second["answers"], second["flexible_answers"]) == ([None], ["7"])
    assert second["completions"] == [{"text": "It is 7."}]
    (only,) = records_of([sample(0, "none", "7", 1.0)])
    assert only["right"] == [True]
    assert "flexible_right" not in only


def test_files_of_tasks_say_their_names(tmp_path):
    path = tmp_path / "task.yaml"
    path.write_text(TASK.format(file="q.jsonl"))
    assert task_name(str(path)) == "string_tasks"
    assert task_name("gsm8k") == "gsm8k"
    path.write_text("dataset_path: json\n")
    with pytest.raises(ValueError, match="no line `task: NAME`"):
        task_name(str(path))
    with pytest.raises(FileNotFoundError, match=r"none.yaml does not exist"):
        task_name("none.yaml")


def test_the_harness_that_is_not_installed_is_explained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'trl-learnalign\[lm-eval\]'"):
        evaluate_tasks(["gsm8k"], str(BASE_MODEL), tmp_path)


def test_the_harness_counts_what_the_model_says(tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness")
    tasks = build_pool("mixed", 40, 7, split="heldout")
    rows = [{"question": task["prompt"][0]["content"], "answer": task["answer"]} for task in tasks]
    file = tmp_path / "tasks.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(TASK.format(file=file))
    model = AutoModelForCausalLM.from_pretrained(BASE_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    said = []
    for row in rows:
        ids = tokenizer(f"{row['question']}=", return_tensors="pt")
        made = model.generate(**ids, max_new_tokens=10, do_sample=False)[0]
        said.append(tokenizer.decode(made[ids["input_ids"].shape[1] :], skip_special_tokens=True))
    right = [text == row["answer"] for text, row in zip(said, rows, strict=True)]
    begins = [hit and text[0] in "01234" for hit, text in zip(right, said, strict=True)]
    assert 0 < sum(begins) < sum(right) < 40
    shared = ["--model_name_or_path", str(BASE_MODEL), "--harness", str(tmp_path / "task.yaml")]
    shared += ["--use_cpu", "true", "--dtype", "float32"]
    for name in ("one", "two"):
        command.main([*shared, "--output_dir", str(tmp_path / name)])
    printed = " ".join(capsys.readouterr().out.split())
    assert f"strict {100 * sum(begins) / 40:.2f} %" in printed
    assert f"flexible {100 * sum(right) / 40:.2f} %" in printed
    lines = (tmp_path / "one" / "string_tasks" / "records.jsonl").read_text().splitlines()
    assert [json.loads(line)["flexible_right"][0] for line in lines] == right
    compare_command.main([str(tmp_path / name / "string_tasks") for name in ("one", "two")])
    assert re.search(
        r"On 40 paired problems \S+/two/\S+ shows no difference", capsys.readouterr().out
    )
    with pytest.raises(SystemExit, match="limit was None and is 3"):
        command.main([*shared, "--eval_samples", "3", "--output_dir", str(tmp_path / "one")])
    with pytest.raises(SystemExit, match="harness=no_such_task is not a task"):
        command.main([*shared[:2], "--harness", "no_such_task", "--use_cpu", "true"])
