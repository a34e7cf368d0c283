"""Two processes with the installed release of TRL: the short form of tests/training/test_distributed.py."""

import functools
import json

import pytest
from launches import launch

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    @functools.cache
    def run(backend):
        folder = tmp_path_factory.mktemp(backend)
        return folder, launch(backend, folder, {"full": {"fsdp": False}})["full"]

    return run


@pytest.mark.parametrize("backend", ["ddp", "zero3_partitioned"])
def test_two_processes_select_what_one_selects(launched, backend):
    _, one = launched("single")
    folder, two = launched(backend)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["sharded"] == (backend != "ddp")
    assert two["pools"] == one["pools"]
    record = json.loads((folder / "full" / "_learnalign" / "run.json").read_text())
    checked = record["phases"]["stage_1"]["selection"]["scoring"]["self_check"]
    assert checked["relative_error"] < 1e-5
