import io
import logging

import cases
import pytest

from trl_learnalign.measuring.base import Progress, Tally, is_interactive


def lines(caplog, total=100, batch=5, quiet=False, done=0, tally=None):
    caplog.set_level(logging.INFO, "trl_learnalign.measuring.base")
    with Progress("stage_1: gradients", total, done, quiet, interactive=False) as progress:
        while progress.done < total:
            progress.add(batch, tally or Tally(batch, 4 * batch, batch - 2))
    return [record.message for record in caplog.records]


def test_plain_lines_about_ten_and_the_last_one_complete(caplog, capfd):
    said = lines(caplog)
    assert len(said) == 10
    assert said[0].startswith("stage_1: gradients: 10 of 100 prompts (10%), ")
    assert "rollouts/s, 60% learnable, " in said[0]
    assert said[0].endswith(" left")
    assert said[-1].startswith("stage_1: gradients: 100 of 100 prompts (100%)")
    assert "left" not in said[-1]
    assert capfd.readouterr().err == ""  # no bar


def test_a_resumed_measurement_begins_where_it_stood(caplog):
    assert lines(caplog, done=90)[0].startswith("stage_1: gradients: 100 of 100")


def test_what_is_read_without_rollouts_has_a_note(caplog):
    assert "1.25 nats per token" in lines(caplog, tally=Tally(5, note="1.25 nats per token"))[0]
    assert "rollouts" not in caplog.text


def test_other_ranks_are_quiet(caplog, capfd):
    assert lines(caplog, quiet=True) == []
    assert capfd.readouterr().err == ""


def test_a_terminal_gets_one_bar_and_no_lines(caplog, capfd):
    caplog.set_level(logging.INFO, "trl_learnalign.measuring.base")
    with Progress("stage_1: gradients", 10, 0, quiet=False, interactive=True) as progress:
        progress.add(5, Tally(5, 20, 5))
        progress.add(5, Tally(5, 20, 0))
    bar = capfd.readouterr().err
    assert "stage_1: gradients: 100%" in bar
    assert "50% learnable" in bar
    assert caplog.records == []


def test_a_notebook_sees_a_bar_and_a_script_that_has_imported_its_kernel_does_not(monkeypatch):
    pytest.importorskip("ipykernel")
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("PYTHONPATH", str(cases.ROOT))
    code = "from trl_learnalign.measuring.base import is_interactive; is_interactive()"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    run = nbclient.NotebookClient(notebook, timeout=cases.HANGS).execute()
    (output,) = [one for one in run.cells[0].outputs if one.output_type == "execute_result"]
    assert output.data["text/plain"] == "True"
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert not is_interactive()
