"""The process that compares formulas: ended when it takes too long, gone when nobody asks any more."""

import os
import signal
import subprocess
import sys
import threading
import time

import cases
import psutil
import pytest
from trl.rewards import accuracy_reward as trls_reward

from trl_learnalign.data.answers import accuracy_reward
from trl_learnalign.data.mathematics import OutOfTimeError, Worker
from trl_learnalign.data.mathematics_worker import equal

SLOW = r"\boxed{\sqrt{2}^{5^{5^{5^{5}}}}}"


@pytest.fixture
def worker():
    worker = Worker()
    yield worker
    worker.end()


def ask(worker, seconds=3.0):
    return worker.equal(r"\boxed{\sqrt{8}}", r"\boxed{2\sqrt{2}}", seconds).right


def is_gone(pid):
    """Whether a process ends within a while, and nobody has to wait for it."""
    for _ in range(200):
        if not psutil.pid_exists(pid):
            return True
        time.sleep(0.1)
    return False


def test_a_slow_question_ends_and_the_next_is_answered(worker):
    with pytest.raises(OutOfTimeError):
        worker.equal(r"\boxed{\sqrt{2}}", SLOW, 0.2)
    assert ask(worker)


def test_a_training_run_outlives_answers_that_take_forever(tmp_path, caplog):
    steps = []

    def slow_reward(completions, **_):
        steps.append(len(completions))
        return accuracy_reward([SLOW] * len(completions), ["x+1"] * len(completions), None, 0.2)

    trainer = cases.trainer(tmp_path, rewards=slow_reward, data=cases.dataset(6), max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2
    assert steps
    assert caplog.text.count("exceeded the time limit of math-verify") <= 1


@pytest.mark.skipif(os.name != "posix", reason="stops a process by a signal")
def test_a_process_that_hears_nothing_is_ended_and_another_started(worker, caplog):
    assert ask(worker)
    deaf = worker.pid
    for _ in range(2):
        os.kill(worker.pid, signal.SIGSTOP)
        with pytest.raises(OutOfTimeError):
            ask(worker, seconds=0.1)
        assert worker.pid is None
        assert ask(worker)
    assert not psutil.pid_exists(deaf)
    assert caplog.text.count("crashed or stopped math-verify") == 1
    os.kill(worker.pid, signal.SIGKILL)
    assert is_gone(worker.pid) or psutil.Process(worker.pid).status() == psutil.STATUS_ZOMBIE
    assert ask(worker)


def test_it_answers_several_threads_at_once(worker):
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(ask(worker))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 4


# No guard around what the main module does, as in a notebook: another process must not do it again.
SCRIPT = r"""
import os, sys
from trl_learnalign.data import mathematics
from trl_learnalign.data.answers import accuracy_reward
print("grades", accuracy_reward([r"\boxed{\sqrt{8}}"], [r"\boxed{2\sqrt{2}}"]), flush=True)
print("pid", mathematics.WORKER.pid, flush=True)
"""
FORK = r"""
child = os.fork()
if child == 0:
    print("child", accuracy_reward([r"\boxed{\sqrt{12}}"], [r"\boxed{2\sqrt{3}}"]), flush=True)
    mathematics.WORKER.end()
    os._exit(0)
os.waitpid(child, 0)
print("parent", accuracy_reward([r"\boxed{\sqrt{20}}"], [r"\boxed{2\sqrt{5}}"]), flush=True)
"""


def start_script(text, *arguments):
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(cases.ROOT)},
    )


def pid_in(output):
    return int(output.split("pid ")[1].split()[0])


@pytest.mark.parametrize("way", ["file", "no file"])
def test_a_script_without_a_guard_runs_once_and_leaves_nothing(tmp_path, way):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    script = start_script(SCRIPT, str(path) if way == "file" else "-")
    output, _ = script.communicate(SCRIPT if way == "no file" else "")
    assert script.returncode == 0
    assert output.count("grades [1.0]") == 1
    assert is_gone(pid_in(output))


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_a_fork_asks_a_process_of_its_own():
    script = start_script(SCRIPT, "-")
    output, _ = script.communicate(SCRIPT + FORK)
    assert script.returncode == 0
    assert "child [1.0]" in output
    assert "parent [1.0]" in output


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_it_goes_with_a_process_that_is_killed():
    script = start_script(SCRIPT, "-c", f"{SCRIPT}\nimport time; time.sleep(600)")
    lines = [script.stdout.readline() for _ in range(2)]
    script.kill()
    script.communicate()
    assert is_gone(pid_in("".join(lines)))


def test_it_is_small():
    """Torch and trl would take half a minute and a gigabyte."""
    script = start_script("", "-")
    output, _ = script.communicate(
        "import sys\n"
        "from trl_learnalign.data.mathematics_worker import equal\n"
        r"print(equal(r'\boxed{\sqrt{8}}', r'\boxed{2\sqrt{2}}'))" + "\n"
        "print({'torch', 'trl', 'transformers', 'datasets'} & set(sys.modules))\n"
    )
    assert output.split() == ["True", "set()"]


def test_what_it_needs_is_named(monkeypatch):
    monkeypatch.setattr(sys, "path", [place for place in sys.path if "site-packages" not in place])
    with pytest.raises(
        RuntimeError, match=r"math_verify.*must be a Python that can import math_verify"
    ):
        ask(Worker())


def test_its_verdicts_are_those_of_trls_reward():
    """But for small numbers, where math-verify takes all for zero."""
    formulas = [
        r"\sqrt{2}",
        r"\frac{\sqrt{8}}{2}",
        "x+1",
        "1+x",
        "y+1",
        r"\pi/2",
        "0.5",
        r"\frac12",
        "50%",
        r"\sin x",
    ]
    pairs = [(first, second) for first in formulas for second in formulas]
    solutions = [rf"\boxed{{{first}}}" for first, _ in pairs]
    said = [rf"\boxed{{{second}}}" for _, second in pairs]
    trls = trls_reward([[{"content": text}] for text in said], solutions)
    assert [float(equal(*pair)) for pair in zip(solutions, said, strict=True)] == trls
    assert not equal(r"\boxed{\frac{\pi}{2^{99}}}", r"\boxed{\frac{\pi}{2^{98}}}")
