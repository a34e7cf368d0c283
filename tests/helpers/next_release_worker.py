"""A short staged run with whatever TRL comes first on the path; writes what became of it as JSON."""

import json
import logging
import sys
from pathlib import Path

import cases
import trl

from trl_learnalign import LearnAlignCallback, LearnAlignConfig


class Lines(logging.Handler):
    """Keeps what is said."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def main(folder, out):
    said = Lines()
    logging.getLogger("trl_learnalign").addHandler(said)
    trainer = cases.trainer(folder)
    weights = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    config = LearnAlignConfig(
        warmup_samples=0, stages=[4], feature_dim=64, skip_zero_advantages=True
    )
    error = None
    try:
        callback = LearnAlignCallback(trainer, config)
        trainer.add_callback(callback)
        trainer.train()
    except RuntimeError as problem:
        error = f"{type(problem).__name__}: {problem}"
    moved = [
        not bool((before == after).all())
        for before, after in zip(weights, trainer.model.parameters(), strict=True)
    ]
    outcome = {
        "version": trl.__version__,
        "file": trl.__file__,
        "error": error,
        "steps": trainer.state.global_step,
        "selected": len(list(Path(folder).rglob("stage_1.parquet"))),
        "trained": any(moved),
        "untested": [line for line in said.lines if "is untested" in line],
    }
    Path(out).write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
