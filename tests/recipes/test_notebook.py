"""The notebook, run cell by cell: what it shows is what its runs have left on disk."""

import json
import re
import shutil
import tomllib

import cases
import pandas as pd
import pytest

pytest.importorskip("reasoning_gym")
pytest.importorskip("jinja2")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

import nbclient
import nbformat

from trl_learnalign.toy.tasks import build_pool

NOTEBOOK = cases.ROOT / "recipes" / "quickstart.ipynb"
STEPS, PROMPTS_PER_STEP = 100, 8


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As in a checkout: the notebook in a folder of its own, beside docs."""
    checkout = tmp_path_factory.mktemp("checkout")
    folder = checkout / "recipes"
    folder.mkdir()
    shutil.copy(NOTEBOOK, folder)
    (checkout / "docs").symlink_to(cases.ROOT / "docs")
    return folder


@pytest.fixture(scope="module")
def notebook(folder):
    """The notebook with its outputs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(cases.ROOT))
        client = nbclient.NotebookClient(
            read(), timeout=cases.HANGS, resources={"metadata": {"path": str(folder)}}
        )
        return client.execute()


def shown(notebook, code, kind):
    """What the cell with this piece of code has shown at its end, as text or HTML."""
    (cell,) = [cell for cell in notebook.cells if cell.cell_type == "code" and code in cell.source]
    (result,) = [output for output in cell.outputs if output.output_type == "execute_result"]
    return result.data[f"text/{kind}"]


def test_it_is_kept_without_outputs():
    cells = [cell for cell in read().cells if cell.cell_type == "code"]
    assert len(cells) >= 10
    for cell in cells:
        assert cell.outputs == []
        assert cell.execution_count is None


def test_colab_opens_this_file_and_installs_from_where_it_is():
    first, install = read().cells[:2]
    project = tomllib.loads((cases.ROOT / "pyproject.toml").read_text())["project"]
    place = project["urls"]["Documentation"].removesuffix("#readme")
    repository = place.removeprefix("https://github.com/")
    path = NOTEBOOK.relative_to(cases.ROOT)
    assert f"colab.research.google.com/github/{repository}/blob/main/{path})" in first.source
    assert f"git clone -q {place}\n" in install.source
    extras = re.search(r"\[(.*)\]", install.source)[1].split(",")
    assert set(extras) <= set(project["optional-dependencies"])


def test_training_in_adaptive_order_makes_the_model_better(notebook, folder):
    text = (folder / "outputs/notebook/adaptive/_learnalign/run.json").read_text()
    phases = json.loads(text)["phases"]
    before, after = (phases[name]["metrics"]["right"].count("1") for name in ("base", "stage_1"))
    assert after > before
    table = shown(notebook, "run.accuracies", "plain")
    for count in (before, after):
        assert f"{count / 400:.4f}" in table


def test_families_are_shown_as_often_as_they_were_rolled_out(notebook, folder):
    history = pd.read_parquet(
        folder / "outputs/notebook/adaptive/_learnalign/reward_history.parquet"
    )
    families = build_pool("mixed", 240, seed=0)["family"]
    wanted = history["index"].map(lambda row: families[row]).value_counts().to_dict()
    table = shown(notebook, "by_family", "plain")
    found = dict(re.findall(r"^(\w+) +(\d+) +[\d.]+ +[\d.]+$", table, re.MULTILINE))
    assert {family: int(times) for family, times in found.items()} == wanted
    assert sum(wanted.values()) == STEPS * PROMPTS_PER_STEP


def rows_of(table):
    """The cells of an HTML table, row by row, without its head."""
    body = table.split("<tbody>")[1]
    rows = re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in rows]


def test_the_table_shows_the_best_of_what_is_kept(notebook, folder):
    kept = pd.read_parquet(folder / "outputs/notebook/choice/_learnalign/stage_1.parquet")
    best = kept.sort_values("rank").head(10)
    pool = build_pool("mixed", 240, seed=0)
    rows = rows_of(shown(notebook, "table[columns]", "html"))
    assert len(rows) == 10
    for row, (_, wanted) in zip(rows, best.iterrows(), strict=True):
        index, rank, selected, prompt, rate, learnability, _ = row
        assert (int(index), int(rank)) == (wanted["index"], wanted["rank"])
        assert pool[int(index)]["prompt"][0]["content"] in prompt
        assert float(rate) == pytest.approx(wanted["success_rate"], abs=1e-3)
        assert (float(rate) * 8).is_integer()
        assert float(learnability) == pytest.approx(float(rate) * (1 - float(rate)), abs=1e-5)
        assert selected == str(wanted["selected"])


def test_what_was_chosen_is_what_was_trained_on(notebook, folder):
    records = folder / "outputs/notebook/choice/_learnalign"
    kept = pd.read_parquet(records / "stage_1.parquet")
    history = pd.read_parquet(records / "reward_history.parquet")
    chosen = set(kept.loc[kept["selected"], "index"])
    assert len(chosen) == 60
    assert set(history["index"]) == chosen
    assert "60 of 240" in shown(notebook, 'selector="learnalign_coverage"', "plain")


def test_the_report_is_shown_in_place(notebook, folder):
    frame = shown(notebook, "write_report(", "html")
    assert "srcdoc=" in frame
    assert "choice – LearnAlign report" in frame
    assert len(frame) > (folder / "outputs/notebook/choice/report.html").stat().st_size
