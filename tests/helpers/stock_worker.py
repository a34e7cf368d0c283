"""A stock run and one with the callback under whatever launcher started it; writes what others see of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distributed_worker import PROCESSES, work
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


if __name__ == "__main__":
    work(
        lambda folder, scenarios: {
            name: run(folder / name, **scenario) for name, scenario in scenarios.items()
        }
    )
