"""A stock run and one with the callback under whatever launcher started it; writes what others see of both."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from pathlib import Path
from typing import Any

from distributed_worker import PROCESSES, finish
from stock_cases import shape, trained

COMPLETIONS = 8


def run(folder: Path, order: str, kill_at: int | None, **options: Any) -> dict[str, Any]:
    found = {}
    for name, method in (("stock", None), ("ours", order)):
        each = COMPLETIONS // PROCESSES
        seen = trained(folder / name, method, kill_at, **options, per_device_train_batch_size=each)
        found[name] = seen if order == "trainer" else shape(seen)
        found[name]["weights"] = [float(part.sum()) for part in seen["weights"]]
        if order != "trainer":
            del found[name]["weights"]
    return {"processes": PROCESSES, **found}


def main() -> None:
    faulthandler.dump_traceback_later(float(os.environ["WORKER_SECONDS"]), exit=True)
    folder, scenarios = Path(sys.argv[1]), json.loads(sys.argv[2])
    results = {name: run(folder / name, **scenario) for name, scenario in scenarios.items()}
    finish(folder, results)


if __name__ == "__main__":
    main()
