"""Make the stored run that tests read: `python scripts/stored_run.py` writes tests/stored/run anew."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from trl_learnalign import LearnAlignCallback, LearnAlignConfig

ROOT = Path(__file__).resolve().parent.parent
ACCURACIES = {"base": 0.4, "warmup": 0.45, "stage_1": 0.5, "stage_2": 0.5, "stage_3": 0.5}
INTERRUPTED_AT = 10


class StopAt(TrainerCallback):
    """Ends a run at an optimizer step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
        """End the run there."""
        control.should_training_stop = state.global_step >= self.step


def accuracy(phase: str, _step: int) -> dict[str, Any]:
    """What a held-out set of ten problems would say."""
    return {"accuracy": ACCURACIES[phase], "n_eval": 10}


def make(folder: Path, stop: int | None) -> Path:
    """Warm-up and three stages over 24 prompts, until a step; the record folder."""
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    import cases

    trainer = cases.trainer(folder, data=cases.dataset(24), max_completion_length=6)
    config = LearnAlignConfig(
        warmup_samples=4,
        stages=[0.5, 0.25, 0.25],
        selector="learnalign",
        feature_dim=64,
        keep_rollout_texts=1,
        reliability=True,
    )
    trainer.add_callback(LearnAlignCallback(trainer, config, on_phase_end=accuracy))
    if stop is not None:
        trainer.add_callback(StopAt(stop))
    trainer.train()
    return folder / "_learnalign"


def main() -> None:
    """Make both runs, and keep their records."""
    target = ROOT / "tests" / "stored" / "run"
    shutil.rmtree(target, ignore_errors=True)
    for name, stop in (("whole", None), ("interrupted", INTERRUPTED_AT)):
        with tempfile.TemporaryDirectory() as scratch:
            records = make(Path(scratch) / name, stop)
            shutil.copytree(records, target / name / "_learnalign")


if __name__ == "__main__":
    main()
