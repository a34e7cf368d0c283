"""Records of others lead neither `report` nor `export` out of their folder, and no form of theirs is a crash."""

import json
import shutil

import pytest
from reports import change, train

from trl_learnalign.cli import main


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(folder, stages=[6, 4], selector="learnability")
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def refusal(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    assert ended.value.code not in (0, None)
    return str(ended.value)


def exit_code(*arguments):
    """What a command ends with; `None` if it goes through."""
    try:
        main(list(map(str, arguments)))
    except SystemExit as ended:
        return ended.code
    return None


def commands(run):
    return (["report", run], ["export", run, run.parent / "chosen"])


def named(name):
    """Calls the first stage so, in the plan and in the notes."""

    def edit(data):
        for phase in data["plan"]["phases"]:
            if phase["name"] == "stage_1":
                phase["name"] = name
        data["phases"][name] = data["phases"].pop("stage_1")

    return edit


@pytest.mark.parametrize(
    "name", ["../../mine/stage_1", "/tmp/mine", "..", "stage_1/../../x", "stage_", "stage_0", "", 7]
)
def test_a_phase_of_another_name_is_refused_before_anything_is_read_or_written(run, tmp_path, name):
    mine = tmp_path / "mine"
    mine.mkdir()
    for path in (run / "_learnalign").glob("stage_1*.*"):
        shutil.copy(path, mine / path.name)
    (mine / "stage_1_success_rate.png").write_bytes(b"mine")
    before = sorted(mine.iterdir())
    record = run / "_learnalign" / "run.json"
    change(record, named(name) if isinstance(name, str) else lambda data: None)
    if not isinstance(name, str):
        change(record, lambda data: data["plan"]["phases"][1].update(name=name))
    for command in commands(run):
        assert "its plan has a phase" in refusal(*command)
    assert sorted(mine.iterdir()) == before
    assert (mine / "stage_1_success_rate.png").read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["stage_1.parquet", "stage_1_examples.json", "log_history.json"])
def test_a_link_that_leads_out_is_not_read(run, tmp_path, name):
    path = run / "_learnalign" / name
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert f"{name} is a link to" in refusal("report", run)


def test_an_export_reads_nothing_outside(run, tmp_path):
    path = run / "_learnalign" / "stage_2_selected.parquet"
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert "is a link to" in refusal("export", run, tmp_path / "chosen")
    assert not (tmp_path / "chosen").exists()


def test_pictures_are_not_written_outside(run, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    figures = run / "_learnalign" / "figures"
    figures.symlink_to(tmp_path / "mine")
    assert "figures is a link to" in refusal("report", run)
    assert not list((tmp_path / "mine").iterdir())
    figures.unlink()
    figures.mkdir()
    (tmp_path / "mine.png").write_bytes(b"mine")
    (figures / "training.png").symlink_to(tmp_path / "mine.png")
    main(["report", str(run)])
    assert (tmp_path / "mine.png").read_bytes() == b"mine"
    assert (figures / "training.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("log", [7, {"step": 1}, [1], ["a"], [{"step": "one", "reward": 1.0}]])
def test_a_log_of_another_form_is_named(run, log):
    (run / "_learnalign" / "log_history.json").write_text(json.dumps(log))
    assert "log_history.json is damaged (it is not a list of entries)" in refusal("report", run)


def test_a_table_that_is_a_folder_is_named(run):
    path = run / "_learnalign" / "stage_1.parquet"
    path.unlink()
    path.mkdir()
    assert "stage_1.parquet is damaged" in refusal("report", run)
    path.rmdir()
    selected = run / "_learnalign" / "stage_2_selected.parquet"
    selected.unlink()
    selected.mkdir()
    assert "stage_2_selected.parquet is damaged" in refusal("export", run, run.parent / "chosen")


def places(value, at=()):
    """Every place in a JSON value."""
    yield at
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        yield from places(inner, (*at, key))


def put(value, place, other):
    if not place:
        return other
    *way, last = place
    inner = value
    for key in way:
        inner = inner[key]
    inner[last] = other
    return value


def test_no_part_of_another_kind_is_a_traceback(run):
    """Parts of the record in turn are of another kind: each command goes on, or ends with a sentence."""
    record = run / "_learnalign" / "run.json"
    whole = record.read_text()
    odd = [None, "x", -1, [], {}, [{}], 1e400]
    for number, place in enumerate(list(places(json.loads(whole)))[::9]):
        other = odd[number % len(odd)]
        record.write_text(json.dumps(put(json.loads(whole), place, other)))
        code = exit_code("export", run, run.parent / "chosen")
        assert code is None or isinstance(code, str), place
