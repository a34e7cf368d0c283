"""A script of one's own tells its story without any set-up, and once; a user's logging goes before."""

import io
import logging
import os
import re
import subprocess
import sys

import cases
import pytest
from rich.logging import RichHandler
from transformers import TrainerCallback

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.records.store import ShardStore
from trl_learnalign.training import setup
from trl_learnalign.training.checkpoints import last_complete_checkpoint

SCRIPT = """
import logging, sys
import cases
from trl_learnalign import LearnAlignCallback, LearnAlignConfig

for line in sys.argv[1:]:
    exec(line)
trainer = cases.trainer("out", data=cases.dataset(14), disable_tqdm=False)
config = LearnAlignConfig(warmup_samples=4, stages=[6], shard_size=4, feature_dim=64)
trainer.add_callback(LearnAlignCallback(trainer, config))
trainer.train()
"""

FIRST, LAST = "This run selects 6 of 14 prompts by learnalign", "The run has spent "

STORY = [
    FIRST,
    "warmup: 4 prompts",
    "warmup: ended at step 2, mean reward",
    "stage_1: scoring 14 prompts for learnalign, 4 rollouts each",
    "stage_1: gradients: 4 of 14 prompts",
    "stage_1: gradients: 14 of 14 prompts (100%)",
    "stage_1: selected 6 of 14 candidates",
    "stage_1: learnable (solved sometimes, not always): ",
    "stage_1: mean success rate: ",
    "stage_1: 6 prompts, 1 pass, steps 3 to 5 of 5",
    "stage_1: ended at step 5",
    "Step 5 of 5 reached. Records: out/_learnalign",
    "To see what was selected and why: trl-learnalign report out",
    LAST,
]


def script(folder, *lines, **streams):
    path = folder / "train.py"
    path.write_text(SCRIPT)
    places = [str(cases.ROOT), str(cases.ROOT / "tests" / "helpers")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "COLUMNS": "100"}
    command = [sys.executable, str(path), *lines]
    return subprocess.run(
        command, cwd=folder, env=environment, check=True, timeout=cases.HANGS, **streams
    )


def told(text, begins="LearnAlign: "):
    """Lines of the story; each must begin its line once the bar before it is taken away."""
    lines = [re.split(r"\r *\r", line)[-1] for line in text.split("\n") if begins in line]
    assert all(line.startswith(begins) for line in lines)
    return [line.removeprefix(begins) for line in lines]


def assert_in_order(lines, parts=STORY):
    rest = iter(lines)
    for part in parts:
        assert any(line.startswith(part) for line in rest), f"{part!r} is missing, or out of order"


def test_a_log_file_holds_the_whole_story(tmp_path):
    with open(tmp_path / "log", "w") as log:
        script(tmp_path, stdout=log, stderr=subprocess.STDOUT)
    text = (tmp_path / "log").read_bytes().decode()
    assert "\r" in text  # the trainer's own bar: what there is to be kept apart from
    lines = told(text)
    assert_in_order(lines)
    assert all(line.isprintable() for line in lines)
    assert len(lines) == len(set(lines))
    short = [line for line in lines if not line.startswith((FIRST, LAST))]
    assert max(map(len, short)) + len("LearnAlign: ") <= 100
    # The trainer's own rows have the share of useful groups; the rest is said in words, and trackers have the figures.
    figures = set(re.findall(r"'learnalign/\w+'", text))
    assert figures == {"'learnalign/useful_groups'"}


def test_a_bar_is_taken_away_for_a_line_and_drawn_again(capfd):
    handler = setup.TerminalHandler("stderr", "> ")
    with setup.tqdm(total=4, initial=1, desc="steps", ncols=60):
        handler.emit(logging.makeLogRecord({"msg": "a line"}))
    before, after = capfd.readouterr().err.split("> a line\n")
    assert re.search(r"\r *\r$", before)
    assert "steps:  25%" in before
    assert "steps:  25%" in after


def test_a_user_who_logs_gets_each_line_once_and_in_the_own_form(tmp_path):
    own = 'logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout)'
    done = script(tmp_path, own, capture_output=True, text=True)
    assert "LearnAlign: " not in done.stdout + done.stderr
    lines = told(re.sub(r"[^\n]*\r", "", done.stdout), "INFO ")
    assert_in_order(lines)
    assert len(lines) == len(set(lines))


# ---- Who has set up logging -----------------------------------------------------------------------------------------


@pytest.fixture
def untouched(monkeypatch):
    """The loggers as a new process has them."""
    package, root = logging.getLogger("trl_learnalign"), logging.getLogger()
    level, handlers = package.level, list(root.handlers)
    monkeypatch.setattr(package, "handlers", [])
    monkeypatch.setattr(root, "level", logging.WARNING)
    package.setLevel(logging.NOTSET)
    yield package, root
    package.setLevel(level)
    root.handlers[:] = handlers


def own_handlers(package):
    return [type(handler).__name__ for handler in package.handlers]


def test_without_any_set_up_one_handler_is_added_and_the_root_is_left_alone(untouched):
    package, root = untouched
    before = list(root.handlers)
    for _ in range(2):  # a second callback adds no second one
        setup.configure_logging(verbose=True, is_main=True)
    assert own_handlers(package) == ["TerminalHandler"]
    assert package.level == logging.INFO
    assert root.handlers == before
    setup.configure_logging(verbose=False, is_main=True)
    assert (package.handlers, package.level) == ([], logging.NOTSET)


@pytest.mark.parametrize(
    "handler", [logging.StreamHandler(), RichHandler()], ids=["stream", "rich"]
)
def test_a_root_that_prints_is_told_and_no_handler_added(untouched, handler):
    package, root = untouched
    root.addHandler(handler)
    setup.configure_logging(verbose=True, is_main=True)
    assert package.level == logging.INFO
    assert package.handlers == []


def test_a_log_file_of_the_user_gets_the_story_beside_the_terminal(untouched, tmp_path):
    package, root = untouched
    root.addHandler(logging.FileHandler(tmp_path / "own.log"))
    setup.configure_logging(verbose=True, is_main=True)
    logging.getLogger("trl_learnalign.training").info("selected")
    assert own_handlers(package) == ["TerminalHandler"]
    assert (tmp_path / "own.log").read_text() == "selected\n"


def test_a_level_of_the_user_is_not_taken_back(untouched):
    package, _ = untouched
    package.setLevel(logging.INFO)
    setup.configure_logging(verbose=False, is_main=True)
    assert package.level == logging.INFO


@pytest.mark.parametrize("who", ["level", "handler", "root level", "another process", "verbose"])
def test_what_was_set_up_decides(untouched, who):
    package, root = untouched
    if who == "level":
        package.setLevel(logging.ERROR)
    elif who == "handler":
        package.addHandler(logging.NullHandler())
    elif who == "root level":
        root.level = logging.ERROR
    before = list(package.handlers), package.level
    setup.configure_logging(verbose=who != "verbose", is_main=who != "another process")
    assert (package.handlers, package.level) == before


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_lines_of_its_width_and_a_file_gets_whole_ones(monkeypatch):
    text = "eighteen characters " * 8 + "/a/path-that-is-not-broken"
    monkeypatch.setenv("COLUMNS", "60")
    for stream, count in ((Terminal(), 4), (io.StringIO(), 1)):
        monkeypatch.setattr(sys, "stdout", stream)
        handler = setup.TerminalHandler("stdout", "> ")
        handler.emit(logging.makeLogRecord({"msg": text}))
        lines = stream.getvalue().splitlines()
        assert len(lines) == count
        assert " ".join(line.strip() for line in lines) == f"> {text}"
        assert count == 1 or max(map(len, lines)) <= 60
        assert all(line.startswith("  ") for line in lines[1:])


def test_streams_without_a_file_are_written_to(monkeypatch):
    """As those of a notebook."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    handler = setup.TerminalHandler("stdout")
    handler.emit(logging.makeLogRecord({"msg": "a line"}))
    assert sys.stdout.getvalue() == "a line\n"


# ---- Ctrl-C and resume ----------------------------------------------------------------------------------------------


def go(folder, resume=False, warmup=4, **options):
    trainer = cases.trainer(folder, data=cases.dataset(14), **options)
    config = LearnAlignConfig(warmup_samples=warmup, stages=[6], shard_size=4, feature_dim=64)
    trainer.add_callback(LearnAlignCallback(trainer, config))
    found = last_complete_checkpoint(folder) if resume else None
    trainer.train(resume_from_checkpoint=None if found is None else str(found))
    return trainer


@pytest.fixture
def interrupted(monkeypatch):
    """Ctrl-C when the third shard has been measured; returns how many were written so far."""
    write, written = ShardStore.write, []

    def interrupt(self, number, tensors):
        if len(written) == 2:
            written.append(None)
            raise KeyboardInterrupt
        write(self, number, tensors)
        written.append(number)

    monkeypatch.setattr(ShardStore, "write", interrupt)


SAVED = dict(save_strategy="steps", save_steps=1)


@pytest.mark.parametrize(
    ("warmup", "options", "way"),
    [
        (
            4,
            SAVED,
            r"the same command with resume \(resume_from_checkpoint=True, .*\) continues there",
        ),
        (0, {}, "the same command continues there"),
        (4, {}, "no checkpoint has the current policy .*: the same command trains again"),
    ],
    ids=["checkpoint", "first scoring", "no checkpoint"],
)
def test_ctrl_c_in_scoring_says_what_is_kept_and_how_to_go_on(
    tmp_path, caplog, interrupted, warmup, options, way
):
    with pytest.raises(KeyboardInterrupt, match="8 of 14 prompts are kept") as end:
        go(tmp_path, warmup=warmup, **options)
    assert type(end.value) is KeyboardInterrupt  # which the interpreter ends with its own exit code
    assert re.search(way, str(end.value))  # the last line of a traceback, where one is printed
    assert not [entry for entry in end.traceback if "measuring" in str(entry.path)]
    said = [record.message for record in caplog.records if "kept" in record.message]
    assert len(said) == 1
    pattern = rf"stage_1: gradients: interrupted, 8 of 14 prompts are kept; {way}.*\."
    assert re.fullmatch(pattern, said[0])
    caplog.clear()
    caplog.set_level(logging.INFO, "trl_learnalign")
    go(tmp_path, resume=bool(options), warmup=warmup, **options)
    assert "stage_1: gradients: 8 of 14 prompts are already measured" in caplog.text
    assert ("Resumed at step 2 of 5." in caplog.text) == bool(options)


class Stop(TrainerCallback):
    """Ctrl-C at the beginning of the second step."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 1:
            raise KeyboardInterrupt


def test_ctrl_c_in_training_says_once_what_is_kept_and_how_to_resume(tmp_path, caplog):
    trainer = cases.trainer(tmp_path, save_strategy="steps", save_steps=1)
    trainer.add_callback(LearnAlignCallback(trainer, LearnAlignConfig.control(stage_steps=2)))
    trainer.add_callback(Stop())
    said = r"Interrupted at step 1; .*checkpoint-1 was saved: .*resume_from_checkpoint=True"
    with pytest.raises(KeyboardInterrupt, match=said) as end:
        trainer.train()
    assert caplog.messages.count(str(end.value)) == 1
