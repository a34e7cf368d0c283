import json
import re

import cases
import pandas as pd
import pytest
from datasets import Dataset

from trl_learnalign import cli
from trl_learnalign.cli.plan import size_text

ROOT = cases.ROOT
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


@pytest.mark.parametrize("name", ["gsm8k_staged", "table1_gsm8k", "table2_math", "dapo_math_17k"])
def test_the_papers_batch_is_the_same_on_any_number_of_processes(capsys, name):
    config = [
        "--config",
        str(ROOT / "recipes" / "configs" / f"{name}.yaml"),
        "--pool_size",
        7473,
        "--json",
    ]
    one = json.loads(plan(capsys, *config))
    assert one["totals"]["completions_per_step"] == (64 if name == "dapo_math_17k" else 48)
    assert "calibration" not in one
    for processes in (2, 8, 16):
        assert json.loads(plan(capsys, *config, "--processes", processes)) == one


@pytest.mark.parametrize(
    ("selector", "phases"), [("random", ["stage_1"]), ("learnalign", ["warmup", "stage_1"])]
)
def test_a_warm_up_that_the_recipe_leaves_out_is_not_planned(capsys, selector, phases):
    table1 = ["--config", str(ROOT / "recipes" / "configs" / "table1_gsm8k.yaml")]
    said = plan(capsys, *table1, "--selector", selector, "--pool_size", 7473)
    assert re.findall(r"^ *(warmup|stage_\d) ", said, re.MULTILINE) == phases


def test_a_batch_that_processes_cannot_have_is_warned_of(capsys, caplog):
    nearest = json.loads(plan(capsys, *STAGED, "--pool_size", 7473, "--json", "--processes=7"))
    assert nearest["totals"]["completions_per_step"] == 56
    assert "completions_per_step=48 is not possible with 7 processes" in caplog.text
    assert "of 48 completions each" in plan(
        capsys, *STAGED, "--pool_size", 7473, "--gradient_accumulation_steps", 6
    )
    by_hand = plan(
        capsys, *STAGED, "--pool_size", 7473, "--processes", 8, "--gradient_accumulation_steps", 2
    )
    assert "of 128 completions each" in by_hand
    assert "an optimizer step has 128 completions" in caplog.text


def test_generated_tasks_are_planned_with_their_own_sizes(capsys):
    said = plan(capsys, *QUICKSTART)
    assert "toy on generated: 480 prompts" in said
    assert re.search(r"total +132 +8,448 +816 +6,528", said)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pool_size", "200"], r"warmup_samples=300, but the pool has 200 prompts"),
        (
            ["--processes", "six", "--pool_size", "200"],
            r"argument --processes: invalid int value: 'six'",
        ),
        (
            ["--processes", "0", "--pool_size", "200"],
            r"processes=0: give a whole number of at least 1",
        ),
        (
            ["--completions_per_step", "50"],
            r"completions_per_step=50 is not a multiple of num_generations=8",
        ),
        (["--config", "missing.yaml"], r"--config missing.yaml: the file does not exist"),
        (
            ["--processes", "2", "--calibrate"],
            r"--calibrate measures this one.*accelerate launch --module trl_learn",
        ),
        (["--dataset_name", "missing.jsonl"], r"missing.jsonl does not exist"),
        (["--dataset_name", "no/such"], r"'no/such'.*trl-learnalign plan --pool_size N"),
    ],
)
def test_bad_input_ends_with_one_line(arguments, message):
    config = [] if "--config" in arguments else STAGED
    with pytest.raises(SystemExit, match=message):
        cli.main(["plan", *config, *arguments])


def test_switches_are_read_and_not_searched_for(capsys):
    assert "1,297" in plan(capsys, *STAGED, "--pool_size", 7473, "--calibrate", "false")
    with pytest.raises(SystemExit, match="--calibrate rolls out real prompts"):
        cli.main(["plan", *QUICKSTART, "--pool_size", "100", "--calibrate=true"])


def test_a_pool_that_is_not_there_cannot_be_calibrated():
    with pytest.raises(SystemExit, match=r"--calibrate rolls out real prompts: remove --pool_size"):
        cli.main(["plan", *QUICKSTART, "--calibrate", "--pool_size", "100"])


def test_help(capsys):
    assert "--pool_size N" in plan(capsys, "--help")
    cli.main(["--help"])
    assert re.search(r"plan +print steps, rollouts and disk of a run", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1536, "1.5 KiB"), (350 * 2**20, "350 MiB"), (None, "?")]
)
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
            *("--dtype", "float32", "--warmup_samples", 4, "--stages", 0.5, 0.3, 0.2),
            *("--per_device_train_batch_size", 8, "--num_generations", 4),
            *(
                "--max_completion_length",
                6,
                "--gradient_checkpointing",
                "false",
                "--calibrate",
                "--json",
            ),
        )
    )
    measured, minutes = found["calibration"], found["minutes"]
    assert measured["prompts"] == 8
    assert measured["completion_length"] == pytest.approx(6, abs=1)
    assert minutes["training"] == pytest.approx(measured["step"] * found["totals"]["steps"] / 60)
    assert minutes["scoring"] == pytest.approx(measured["prompt"] * (36 + 18) / 60)
    assert all(value > 0 for value in minutes.values())
    # It leaves nothing behind but the model and the data it was given (and no run was begun).
    assert {path.name for path in tmp_path.iterdir()} == {"model", "train.jsonl"}


def test_a_run_is_held_against_plain_training_of_as_many_steps(capsys):
    said = plan(capsys, *STAGED, "--pool_size", 7473)
    totals = json.loads(plan(capsys, *STAGED, "--pool_size", 7473, "--json"))["totals"]
    plain = totals["steps"] * totals["completions_per_step"]
    ratio = (totals["training_rollouts"] + totals["scoring_rollouts"]) / plain
    assert totals["times_plain_rollouts"] == [ratio, ratio] == pytest.approx([2.63, 2.63], abs=0.01)
    low, high = (1 / (1 - share) for share in totals["scoring_share_of_compute"])
    assert f"optimizer steps: 2.63 times the rollouts, {low:.2f} to {high:.2f} times the" in said
    unscored = ["--selector", "random"]
    said = plan(capsys, *STAGED, "--pool_size", 7473, *unscored)
    assert (
        "The number of rollouts is that of plain GRPO with the same number of optimizer steps."
        in said
    )


def test_scorings_share_is_said_at_each_price_of_a_generated_token(capsys):
    def bounds(price):
        options = [*STAGED, "--pool_size", 7473, "--generation_price", price, "--json"]
        low, high = json.loads(plan(capsys, *options))["totals"]["scoring_share_of_compute"]
        return f"{low:.0%}", f"{high:.0%}"

    said = plan(capsys, *STAGED, "--pool_size", 7473, "--generation_price", 8)
    assert f"{bounds(8)[0]} of the compute if no prompt is learnable, {bounds(8)[1]} if" in said
    others = ", ".join(f"{price}: {' to '.join(bounds(price))}" for price in (1, 3))
    assert (
        f"(sampling counts 8 and an update or a capture 3; with generation_price {others})" in said
    )


def test_what_num_generations_does_is_said_by_an_earlier_runs_outcomes(capsys, tmp_path):
    path = tmp_path / "reward_history.parquet"
    # Forty prompts; what came out of a prompt later is not the pool's.
    rows = {"index": [*range(40), *range(40)], "right": [4] * 40 + [0] * 40}
    pd.DataFrame({**rows, "wrong": [4] * 40 + [8] * 40}).to_parquet(path)
    options = [*STAGED, "--pool_size", 7473, "--outcomes", path]
    said = plan(capsys, *options)
    assert "57% at 2, 97% at 4, 100% at 8, " in said
    assert "(estimated from 40 groups of 8)" in said
    assert "num_generations=2 instead of 8" in said
    found = json.loads(plan(capsys, *options, "--json"))["group_sizes"]
    assert found["smaller"] == 2
    assert found["shares"]["2"] == pytest.approx(16 / 28)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (None, "does not exist: give reward_history.parquet"),
        ({"index": [1], "right": [1]}, "lacks one of the columns index, right and wrong"),
        ({"index": [1], "right": [None], "wrong": [None]}, "has no prompt that was rolled out"),
    ],
)
def test_a_file_without_outcomes_is_refused(capsys, tmp_path, columns, said):
    path = tmp_path / "history.parquet"
    if columns is not None:
        pd.DataFrame(columns).to_parquet(path)
    with pytest.raises(SystemExit, match=said):
        plan(capsys, *STAGED, "--pool_size", 7473, "--outcomes", path)


# ---- Continual selection --------------------------------------------------------------------------------------------

CONTINUAL = ["--order", "adaptive", "--stages", 1, "--warmup_samples", 0]


def test_an_adaptive_order_is_planned_without_scoring(capsys):
    said = plan(capsys, *STAGED, "--pool_size", 7473, *CONTINUAL, "--beta", 0)
    assert "scored" not in said
    assert "59,808 to train, 0 to score" in said
    assert "7,473 prompts are read once by the initial policy" in said
    assert "Dynamic sampling" not in said
    totals = json.loads(plan(capsys, *STAGED, "--pool_size", 7473, *CONTINUAL, "--json"))["totals"]
    assert totals["prompts_read"] == 7473
    assert totals["scoring_share_of_compute"] == [0, 0]


def test_what_skipping_saves_is_said_to_show_only_in_the_run(capsys):
    skipping = [*CONTINUAL, "--skip_zero_advantages", "true"]
    said = plan(capsys, *STAGED, "--pool_size", 7473, *skipping, "--beta", 0)
    assert "these numbers are upper bounds of training" in said
    # The paper's beta gives every rollout a gradient.
    said = plan(capsys, *STAGED, "--pool_size", 7473, *skipping)
    assert "skip_zero_advantages skips nothing" in said
    assert "upper bounds" not in said


def test_dynamic_sampling_is_planned_from_least_to_most(capsys):
    sampling = [*CONTINUAL, "--oversample", 1.5, "--max_generation_batches", 3]
    said = plan(capsys, *STAGED, "--pool_size", 7473, *sampling)
    assert "rollouts: 89,712 to 209,328 to train" in said
    assert "1.50 to 3.50 times as many rollouts" in said
    assert "optimizer steps: 1.50 to 3.50 times the rollouts." in said
    assert re.search(r"stage_1 +7,473 × 1 +1,246 +59,808 +209,328", said)


def test_the_trainers_own_order_is_planned_with_its_own_length(capsys):
    own = ["--order", "trainer", "--stages", 1, "--warmup_samples", 0]
    said = plan(capsys, *STAGED, "--pool_size", 7473, *own, "--max_steps", 20)
    assert "Optimizer steps: 20 of 48" in said
    assert "the order is not recorded" in said
    assert "plain GRPO" not in said


def test_it_says_how_much_scoring_generates_at_once(capsys):
    given = [*STAGED, "--pool_size", 7473, "--processes", 6]
    least = "Scoring generates at least 8 rollouts in a call, and more if memory allows"
    assert least in plan(capsys, *given)
    shard = "Scoring generates up to 1,024 rollouts in a call (128 prompts), in each process"
    assert shard in plan(capsys, *given, "--use_vllm", "true")
    three = "Scoring generates up to 24 rollouts in a call (3 prompts), in each process"
    assert three in plan(capsys, *given, "--scoring_batch_prompts", 3)
    assert "scoring_batch_prompts" not in plan(
        capsys, *given, "--stages", 1.0, "--skip_forced_scoring"
    )
