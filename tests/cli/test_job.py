"""How a recipe ends when it is interrupted or refused."""

import cases
import pytest

from trl_learnalign.cli.recipe import INTERRUPTED, exit_cleanly
from trl_learnalign.records.store import Mark, StoreError, sealed_files, write_mark
from trl_learnalign.training.checkpoints import RESUME


def end(trainer, error):
    with pytest.raises(SystemExit) as ended, exit_cleanly(trainer):
        raise error
    return ended.value


def test_ctrl_c_in_training_is_one_sentence_and_the_shells_exit_code(tmp_path, caplog):
    trainer = cases.trainer(tmp_path)
    trainer.state.global_step = 3
    ended = end(trainer, KeyboardInterrupt())
    assert ended.code == INTERRUPTED == 130
    assert ended.__suppress_context__ or ended.__cause__ is None
    assert [record.message for record in caplog.records] == [
        "Interrupted at step 3; no checkpoint was saved, so the same command starts again at step 0."
    ]
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    (folder / "trainer_state.json").write_text('{"global_step": 2}')
    write_mark(folder, Mark("run", 2, 1, False, True, sealed_files(folder)))
    caplog.clear()
    end(trainer, KeyboardInterrupt())
    assert caplog.messages == [
        f"Interrupted at step 3; {folder} was saved: the same command with resume ({RESUME}) continues there."
    ]


def test_what_scoring_has_said_already_is_not_said_again(tmp_path, caplog):
    kept = KeyboardInterrupt("stage_1: gradients: interrupted, 8 of 14 prompts are kept")
    assert end(cases.trainer(tmp_path), kept).code == INTERRUPTED
    assert caplog.messages == []


def test_a_folder_of_another_run_is_one_line(tmp_path):
    said = end(cases.trainer(tmp_path), StoreError("run.json was written by another run"))
    assert str(said).endswith(": run.json was written by another run")


def test_other_errors_keep_their_traceback(tmp_path):
    with pytest.raises(RuntimeError, match="a fault"), exit_cleanly(cases.trainer(tmp_path)):
        raise RuntimeError("a fault")
