"""Commands and recipes read questions as text: a dataset with pictures is refused by each, with the column's name."""

import json
import runpy
import sys

import cases
import pytest
import question_files

from trl_learnalign.cli import main

RECIPES = cases.ROOT / "recipes"


def command(name, arguments):
    main([name, *arguments])


def recipe(name, arguments):
    sys.argv = [str(RECIPES / name), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


POOL = ["--dataset_name", "own.jsonl", "--model_name_or_path", "model", *question_files.SMALL]
WAYS = {
    "select": (command, ["own.jsonl", *POOL[2:], "-n", "3"]),
    "plan": (command, ["--config", str(RECIPES / "configs" / "gsm8k_staged.yaml"), *POOL]),
    "evaluate": (command, ["--benchmarks", "own.jsonl", *POOL[2:4], "--use_cpu", "true"]),
    "gsm8k_staged.py": (recipe, POOL),
    "train_subset.py": (recipe, POOL),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image_path": "a.png"}, r"images in the columns 'image_path'"),
        ({"images": ["a.png"]}, r"images in the columns 'images'"),
        ({}, r"has an image placeholder in its text but no image"),
    ],
)
def test_pictures_are_refused(tmp_path, monkeypatch, way, columns, message):
    question_files.write(tmp_path)
    row = {"question": "<image>Find x.", "answer": "#### 3", **columns}
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(20)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["trl-learnalign"])
    run, arguments = WAYS[way]
    with pytest.raises(SystemExit, match=message):
        run(way, arguments)
