import json
import re
from pathlib import Path

import cases
import pytest
from datasets import Dataset

from trl_learnalign import cli
from trl_learnalign.commands.plan import size_text

ROOT = Path(__file__).parent.parent
STAGED = ["--config", str(ROOT / "recipes" / "configs" / "gsm8k_staged.yaml")]
QUICKSTART = ["--config", str(ROOT / "recipes" / "configs" / "quickstart.yaml")]


def plan(capsys, *arguments):
    capsys.readouterr()  # what libraries said while files were made
    cli.main(["plan", *map(str, arguments)])
    return capsys.readouterr().out


def test_a_gpu_run_is_planned_without_gpu_model_or_dataset(capsys):
    said = plan(capsys, *STAGED, "--pool_size", 7473, "--eval_size", 1319)
    rows = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line.split()[:1]}
    assert rows["warmup"] == ["300", "×", "1", "50", "2,400"]
    assert rows["stage_1"] == ["3,737", "×", "1", "623", "29,904", "7,473", "59,784", "234", "MiB"]
    assert "--skip_forced_scoring would save its 11,960 rollouts" in said
    assert "6,595 to evaluate" in said


def test_processes_multiply_the_batch(capsys):
    one = json.loads(plan(capsys, *STAGED, "--pool_size", 7473, "--json"))
    six = json.loads(
        plan(capsys, *STAGED, "--pool_size", 7473, "--json", "--processes", 6, "--gradient_accumulation_steps", 1)
    )
    assert one == six
    bigger = json.loads(plan(capsys, *STAGED, "--pool_size", 7473, "--json", "--processes=6"))
    assert bigger["totals"]["steps"] == pytest.approx(one["totals"]["steps"] / 6, rel=0.01)
    assert "calibration" not in one


def test_generated_tasks_are_planned_with_their_own_sizes(capsys):
    said = plan(capsys, *QUICKSTART)
    assert "microcosm on generated: 480 prompts" in said
    assert re.search(r"total +132 +8,448 +816 +6,528", said)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pool_size", "200"], r"warmup_samples=300, but the pool has 200 prompts"),
        (["--processes", "none", "--pool_size", "200"], r"--processes none: give a whole number of at least 1"),
        (["--processes", "2", "--calibrate"], r"--calibrate measures this one.*accelerate launch --module trl_learn"),
        (["--dataset_name", "missing.jsonl"], r"missing.jsonl does not exist"),
        (["--dataset_name", "no/such"], r"'no/such'.*trl-learnalign plan --pool_size N"),
    ],
)
def test_bad_input_ends_with_one_line(arguments, message):
    with pytest.raises(SystemExit, match=message):
        cli.main(["plan", *STAGED, *arguments])


def test_a_pool_that_is_not_there_cannot_be_calibrated():
    with pytest.raises(SystemExit, match=r"--calibrate rolls out real prompts: leave pool_size out"):
        cli.main(["plan", *QUICKSTART, "--calibrate", "--pool_size", "100"])


def test_help(capsys):
    assert "--pool_size N" in plan(capsys, "--help")
    cli.main(["--help"])
    assert re.search(r"plan +what a run will take", capsys.readouterr().out)


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (1536, "1.5 KiB"), (350 * 2**20, "350 MiB"), (None, "?")])
def test_sizes(size, text):
    assert size_text(size) == text


def test_calibration_measures_this_machine(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cases.model(max_position_embeddings=512).save_pretrained(tmp_path / "model")
    cases.tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"question": f"what is {i} plus {i}?", "answer": str(2 * i)} for i in range(40)]
    Dataset.from_list(rows).to_json(tmp_path / "train.jsonl")
    found = json.loads(
        plan(
            capsys,
            *(
                "--model_name_or_path",
                "model",
                "--dataset_name",
                "train.jsonl",
                "--use_cpu",
                "true",
                "--bf16",
                "false",
            ),
            *("--dtype", "float32", "--warmup_samples", 4),
            *("--per_device_train_batch_size", 8, "--num_generations", 4),
            *("--max_completion_length", 6, "--gradient_checkpointing", "false", "--calibrate", "--json"),
        )
    )
    measured, minutes = found["calibration"], found["minutes"]
    assert measured["prompts"] == 8
    assert measured["completion_length"] == pytest.approx(6, abs=1)
    assert minutes["training"] == pytest.approx(measured["step"] * found["totals"]["steps"] / 60)
    assert minutes["scoring"] == pytest.approx(measured["prompt"] * (36 + 18 + 7) / 60)
    assert all(value > 0 for value in minutes.values())
    # It leaves nothing behind but the model and the data it was given (and no run was begun).
    assert {path.name for path in tmp_path.iterdir()} == {"model", "train.jsonl"}
