"""What the command `select` prints of its subsets."""

import json
import re
from pathlib import Path

import cases
import pandas as pd
import pytest
import question_files
from datasets import load_from_disk
from subsets import data, roomy

from trl_learnalign.cli import main
from trl_learnalign.cli.arguments import parse
from trl_learnalign.cli.select import MODEL, SelectArguments, in_full, show
from trl_learnalign.training.subset import SubsetConfig, SubsetSelection

SOLVED = range(0, 12, 2)


def half_solved(completions, row, **_):
    """Every second prompt is always solved; of the others every second rollout is."""
    return [1.0 if number in SOLVED else float(i % 2) for i, number in enumerate(row)]


def test_the_learnable_share_is_that_of_each_row_and_the_pools_stands_above(tmp_path, capsys):
    trainer = cases.trainer(tmp_path, roomy(), rewards=half_solved, data=data())
    config = SubsetConfig(selector="learnalign", feature_dim=64, shard_size=4, top=[3, 9])
    selection = SubsetSelection(trainer, config)
    selection.run()
    selection.write(tmp_path / "subsets")
    capsys.readouterr()
    show(selection, seconds=1.0)
    said = capsys.readouterr().out
    scores = pd.read_parquet(tmp_path / "subsets" / "learnalign" / "scores.parquet")
    is_learnable = scores.sort_values("rank")["learnability"] > 0
    assert "learnable in the pool: 0.500" in " ".join(said.split())
    for size in (3, 9):
        row = next(line for line in said.splitlines() if re.search(rf"learnalign\W+{size} ", line))
        assert f"{is_learnable[:size].mean():.3f}" in row.split("│")[-2]
    assert is_learnable[:3].mean() > is_learnable[:9].mean() > 0.5


# ---- A file, and the chosen rows of it ------------------------------------------------------------------------------


def files(folder, rows=None):
    """A model and a file in a folder, and what a run of seconds is told."""
    question_files.write(folder)
    if rows is None:
        rows = [
            {"qid": f"q{i}", **row, "meta": {"level": i % 3, **({"hard": True} if i == 7 else {})}}
            for i, row in enumerate(question_files.questions(20))
        ]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = [*question_files.SMALL, "--warmup_samples", "0", "--beta", "0"]
    return rows, ["--model_name_or_path", "model", *small]


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_the_chosen_rows_of_a_file_are_its_own_in_its_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given, small = files(tmp_path)
    main(
        ["select", "own.jsonl", "-n", "8", "-o", "out.jsonl", "--selector", "token_length", *small]
    )
    chosen = lines("out.jsonl")
    numbers = [row["selection_index"] for row in chosen]
    assert len(chosen) == 8
    assert numbers == sorted(numbers)
    for row in chosen:
        own = {name: value for name, value in row.items() if not name.startswith("selection_")}
        assert own == given[row["selection_index"]]
        assert list(own) == list(given[0])
    assert sorted(row["selection_rank"] for row in chosen) == list(range(1, 9))
    # Nothing was held out, and all are candidates.
    scores = pd.read_parquet("out_selection/subsets/token_length/scores.parquet")
    assert len(scores) == 20
    best = lines("out_selection/subsets/token_length/top_8.jsonl")
    assert [row["selection_rank"] for row in best] == list(range(1, 9))
    assert {row["qid"] for row in best} == {row["qid"] for row in chosen}
    assert list(best[0])[:4] == list(given[0])
    assert "Rows: out.jsonl" in capsys.readouterr().out


def test_sizes_selectors_and_other_endings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given, small = files(tmp_path)
    own = ["select", "own.jsonl", *small, "--output_dir", "out"]
    main([*own, "-n", "3", "6", "--selector", "token_length", "random"])
    for name in ("token_length", "random"):
        first, more = (load_from_disk(f"out/subsets/{name}/top_{size}") for size in (3, 6))
        assert more["qid"][:3] == first["qid"][:]
        assert more.column_names[:4] == list(given[0])
    for ending, read in (("parquet", pd.read_parquet), ("csv", pd.read_csv)):
        main([*own, "-n", "6", "--selector", "token_length", "-o", f"out.{ending}"])
        table = read(f"out.{ending}")
        assert sorted(table["qid"]) == sorted(
            load_from_disk("out/subsets/token_length/top_6")["qid"]
        )
        assert table["selection_index"].is_monotonic_increasing


def test_rows_of_an_earlier_selection_can_be_chosen_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, small = files(tmp_path)
    shared = ["--selector", "token_length", *small]
    main(["select", "own.jsonl", "-n", "8", "-o", "first.jsonl", *shared])
    main(["select", "first.jsonl", "-n", "4", "-o", "second.jsonl", *shared])
    first, second = lines("first.jsonl"), lines("second.jsonl")
    assert [first[row["selection_index"]]["qid"] for row in second] == [
        row["qid"] for row in second
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "3", "-o", "out.txt"], r"output_file='out.txt': the name must end in .jsonl"),
        (["-n", "3", "-o", "no/out.jsonl"], r"the folder no does not exist; create it"),
        (["-n", "3", "4", "-o", "out.jsonl"], r"takes one subset, but top=\[3, 4\]"),
        (["-n", "3", "--selector", "random", "ifd", "-o", "o.csv"], r"selector\(s\) random, ifd"),
        (["-n", "99"], r"top=\[99\], but the pool has 20 prompts"),
        ([], r"The number of prompts to select is missing"),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_is_measured(
    tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    _, small = files(tmp_path)
    monkeypatch.setattr("trl_learnalign.cli.select.make_trainer", lambda *_: pytest.fail("made"))
    monkeypatch.setattr("trl_learnalign.cli.problems.as_prompts", lambda *_, **__: "unread")
    with pytest.raises(SystemExit, match=message):
        main(["select", "own.jsonl", *small, *arguments])


def test_without_a_gpu_the_cpu_does_it_with_a_word(monkeypatch, caplog):
    monkeypatch.setattr(
        "trl_learnalign.cli.select.missing_gpu", lambda use_cpu: "no GPU is visible"
    )
    spelt = in_full(["a.jsonl", "-n", "3"])
    assert spelt[-4:] == ["--use_cpu", "true", "--bf16", "false"]
    assert "No GPU is visible: the CPU is used" in caplog.text
    assert in_full(["a.jsonl", "-n", "3", "--use_cpu=false"])[-1] == "--use_cpu=false"
    monkeypatch.setattr("trl_learnalign.cli.select.missing_gpu", lambda use_cpu: None)
    assert "--use_cpu" not in in_full(["a.jsonl", "-n", "3"])


def test_the_shortest_command_has_a_policy_and_a_place_for_its_records(caplog):
    spelt = in_full(["a.jsonl", "-n", "3", "-o", "there/b.jsonl", "--use_cpu", "true"])
    recipe, config, args, model = parse(
        None, [*spelt, "--bf16", "false"], recipe=SelectArguments, config=SubsetConfig
    )
    assert (recipe.dataset_name, recipe.output_file, config.top) == (
        "a.jsonl",
        "there/b.jsonl",
        [3],
    )
    assert (model.model_name_or_path, args.output_dir) == (MODEL, "there/b_selection")
    assert f"No policy is named: the prompts are selected for {MODEL}" in caplog.text
    assert "--model_name_or_path" not in in_full(["--config", "x.yaml", "--use_cpu", "true"])
