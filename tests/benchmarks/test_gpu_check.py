"""The check of a GPU: all of its control flow on a CPU, and what becomes of parts that fail, hang or die."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import cases
import pytest
import torch
import vllm_cases
from loading import benchmark_modules

COMMAND = [sys.executable, str(cases.ROOT / "benchmarks" / "gpu_check" / "check.py")]
MODULES = [f"gpu_check.{name}" for name in ("check", "record", "features", "steps", "engines")]
OTHERS = ["features", "skipping", "capture", "resume", "vllm"]


@pytest.fixture(scope="module")
def modules():
    with benchmark_modules(*MODULES) as found:
        yield {name.partition(".")[2]: module for name, module in found.items()}


def checked(folder, parts):
    """The command at its small size: what it wrote and printed."""
    path = folder / "found" / "check.json"
    # Limits are real; a busy machine should not reach them.
    command = [*COMMAND, "--device", "cpu", "--small", "--minutes", "60", "--json", str(path)]
    done = subprocess.run(
        [*command, "--parts", *parts], capture_output=True, text=True, timeout=cases.HANGS
    )
    log = path.with_suffix(".log").read_text() if path.exists() else ""
    assert done.returncode == 0, done.stdout + done.stderr + log[-3000:]
    assert path.with_suffix(".md").read_text().strip() == done.stdout.strip()
    return json.loads(path.read_text()), done.stdout


@pytest.mark.slow
def test_all_parts_but_the_quickstart(tmp_path):
    found, printed = checked(tmp_path, OTHERS)
    parts = {part["part"]: part for part in found["parts"]}
    assert list(parts) == OTHERS
    no_engine = parts["vllm"]
    assert (no_engine["status"], no_engine["note"]) == ("skipped", "vLLM is not installed")
    assert all(parts[name]["status"] == "passed" for name in OTHERS if name != "vllm")
    counts = {name: len(part["checks"]) for name, part in parts.items()}
    assert counts == {"features": 11, "skipping": 7, "capture": 4, "resume": 3, "vllm": 0}
    resumed = parts["resume"]["checks"][0]["figures"]
    assert resumed["weights apart"] == 0
    assert resumed["note"] == "killed at step 3 of 5, resumed at checkpoint-2"
    left = [check["figures"].get("rows left") for check in parts["skipping"]["checks"][-3:]]
    assert left == [0.25, 0.5, 1.0]
    assert "nothing here was run on a GPU" in printed
    assert "| float32, LoRA | passed |" in printed


@pytest.mark.slow
def test_the_quickstart_beside_itself(tmp_path):
    pytest.importorskip("reasoning_gym")
    found, _ = checked(tmp_path, ["quickstart"])
    (part,) = found["parts"]
    lines = {check["check"]: check["figures"] for check in part["checks"]}
    assert list(lines) == ["paper", "shuffled", "adaptive"]
    for figures in lines.values():
        assert figures["after"] == figures["after, CPU"]
        assert figures["steps"] == figures["steps, CPU"] > 0


# ---- Parts that go wrong --------------------------------------------------------------------------------------------

BAD_PARTS = """
import os, subprocess, time

def good(setting, record):
    record.add("sum", 1 + 1 == 2, sum=2, where=f"{setting.device} {setting.small}")

def differs(setting, record):
    with record.attempt("division"):
        1 / 0
    record.add("comparison", False, error=0.5)

def raises(setting, record):
    record.add("before", True)
    raise ValueError("of | no use")

def hangs(setting, record):
    child = subprocess.Popen(["sleep", "1800"])
    record.add("child", None, pid=child.pid)
    time.sleep(1800)

def dies(setting, record):
    os._exit(7)
"""


@pytest.fixture
def bad(modules, tmp_path, monkeypatch):
    """Runs parts of a module of its own; status and JSON."""
    (tmp_path / "bad_parts.py").write_text(BAD_PARTS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check = modules["check"]
    names = ("good", "differs", "raises", "hangs", "dies")
    parts = {name: check.Part(name.title(), f"bad_parts:{name}", 1000) for name in names}
    parts["hangs"] = check.Part("Hangs", "bad_parts:hangs", 5)
    monkeypatch.setattr(check, "PARTS", parts)

    def run(*names, minutes=8):
        path = tmp_path / "check.json"
        given = ["--device", "cpu", "--small", "--json", str(path), "--minutes", str(minutes)]
        status = check.main([*given, "--parts", *names])
        return status, {part["part"]: part for part in json.loads(path.read_text())["parts"]}

    return run


def is_running(pid):
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks for a process in /proc")
def test_a_part_that_goes_wrong_is_noted_and_the_others_go_on(bad, capsys):
    status, parts = bad("differs", "raises", "hangs", "dies", "good")
    assert status == 1
    results = {name: (part["status"], part["note"]) for name, part in parts.items()}
    assert results == {
        "differs": ("failed", "2 of 2 checks failed"),
        "raises": ("failed", "ValueError: of | no use (bad_parts.py:14)"),
        "hangs": ("stopped", "at its limit of 5 seconds"),
        "dies": ("failed", "the process ended with code 7"),
        "good": ("passed", ""),
    }
    division, comparison = parts["differs"]["checks"]
    assert division["figures"]["note"].startswith("ZeroDivisionError: division by zero")
    assert comparison["figures"] == {"error": 0.5}
    assert [check["check"] for check in parts["raises"]["checks"]] == ["before"]
    assert parts["good"]["checks"][0]["figures"] == {"sum": 2, "where": "cpu True"}
    pid = parts["hangs"]["checks"][0]["figures"]["pid"]
    deadline = time.monotonic() + cases.HANGS
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(pid)
    printed = capsys.readouterr().out
    assert "| Raises | failed |" in printed
    assert "of / no use" in printed


def test_it_is_0_if_nothing_failed(bad):
    status, parts = bad("good", "good")
    assert status == 0
    assert list(parts) == ["good"]


def test_all_ends_with_its_minutes(bad):
    status, parts = bad("hangs", "good", minutes=1e-6)
    assert status == 1
    assert parts["good"]["status"] == "not run"
    assert parts["good"]["note"] == "the 1e-06 minutes were over"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--device", "cpu"], "--device cpu takes hours at full size; give --small as well."),
        (["--minutes", "0"], "--minutes 0 is not between 0 and 60."),
        (["--minutes", "nan"], "--minutes nan is not between 0 and 60."),
        (["--parts", "feature"], "invalid choice: 'feature'"),
        (["--json", "found.txt"], "--json found.txt has to end in .json"),
        (["--json", "/proc/none/found.json"], "--json /proc/none/found.json cannot be written"),
    ],
)
def test_arguments_that_cannot_be(modules, arguments, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        modules["check"].main(arguments)
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(modules, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        modules["check"].main(["--json", str(tmp_path / "found.json")])
    assert ended.value.code == 2
    assert "torch sees no CUDA device here; --device cpu --small runs" in capsys.readouterr().err


# ---- Checks that can fail -------------------------------------------------------------------------------------------


@pytest.fixture
def small(modules, tmp_path):
    """A setting, a record, and what is in the record."""
    record = modules["record"].Record(tmp_path / "lines")

    def lines():
        return [json.loads(line) for line in record.path.read_text().splitlines()]

    return modules["record"].Setting("cpu", True, tmp_path), record, lines


def test_features_that_are_no_gradient_fail(modules, small, monkeypatch):
    setting, record, lines = small
    features = modules["features"]
    right = features.features_of
    monkeypatch.setattr(features, "CASES", features.CASES[:1])
    monkeypatch.setattr(features, "features_of", lambda *given: right(*given).roll(1, dims=1))
    features.run(setting, record)
    assert [line["passed"] for line in lines()] == [None, False]


def test_skipping_that_changes_the_gradient_fails(modules, small, monkeypatch):
    setting, record, lines = small

    def doubles(trainer):
        for parameter in trainer.model.parameters():
            parameter.register_hook(lambda gradient: 2 * gradient)

    steps = modules["steps"]
    monkeypatch.setattr(steps, "install_skipping", doubles)
    monkeypatch.setattr(steps, "losses", lambda setting: ["dapo"])
    monkeypatch.setattr(steps, "shapes", lambda setting: ())
    steps.run(setting, record)
    for line in lines():
        assert line["passed"] is False
        assert line["figures"]["distance"] == pytest.approx(1, abs=0.01)


def test_a_lasting_error_ends_the_part(small):
    _, record, lines = small
    with record.attempt("memory"):
        raise RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="illegal"), record.attempt("kernel"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    assert [line["passed"] for line in lines()] == [False, False]


@vllm_cases.SPOKEN
def test_vllm_in_the_process(modules, small):
    """With a transformers model behind vLLM's interface; a real engine needs a GPU."""
    setting, record, lines = small
    with vllm_cases.installed():
        modules["engines"].run(setting, record)
    colocate, server = lines()
    assert colocate["passed"] is True, colocate
    assert colocate["figures"]["prompts selected"] == 8
    assert server["figures"]["note"] == "skipped: a server needs a second GPU, and there is one"


def test_a_worker_sees_one_gpu_and_hears_of_another(modules, monkeypatch):
    check = modules["check"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpus = check.gpus_of({"gpu": "H200", "gpus": 3})
    assert gpus == ["0", "1", "2"]
    assert check.environment(gpus)["CUDA_VISIBLE_DEVICES"] == "0"
    assert check.environment([])["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert check.gpus_of({"gpu": "H200", "gpus": 2}) == ["5", "7"]
    assert check.gpus_of({}) == []
    assert str(cases.ROOT / "benchmarks") in check.environment(gpus)["PYTHONPATH"].split(os.pathsep)
