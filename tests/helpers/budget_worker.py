"""Scores stages within a rollout budget under whatever launcher started it; writes whom it rolled out and chose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import sampling_cases
from distributed_worker import PROCESSES, policy, work

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.records.layout import to_json
from trl_learnalign.records.notes import SelectionNote

COMPLETIONS = 8


def run(folder: Path, name: str, **settings: Any) -> dict[str, Any]:
    trainer = sampling_cases.trainer(
        folder / name,
        rows=list(range(40)),
        policy=policy(folder, "qwen2", False),
        max_steps=-1,
        per_device_train_batch_size=COMPLETIONS // PROCESSES,
        save_strategy="no",
    )
    config = LearnAlignConfig(
        stages=[6, 6], shard_size=2, scoring_batch_prompts=2, feature_dim=64, **settings
    )
    callback = LearnAlignCallback(trainer, config)
    trainer.add_callback(callback)
    trainer.train()
    trainer.accelerator.wait_for_everyone()
    found: dict[str, Any] = {"processes": trainer.accelerator.num_processes}
    for stage in ("stage_1", "stage_2"):
        note = callback.record.get(stage, SelectionNote)
        assert note is not None
        assert note.scoring is not None
        table = pd.read_parquet(callback.folder / f"{stage}.parquet")
        paths = sorted((callback.folder / stage).glob("round_*/prompts.json"))
        found[stage] = {
            "rounds": [json.loads(path.read_text())["rows"] for path in paths],
            "noted": [to_json(part) for part in note.scoring.rounds],
            "chosen": callback.selected(stage).tolist(),
            "scores": table["score"].tolist(),
            "generated": note.scoring.tokens_generated,
        }
    examples = json.loads((callback.folder / "stage_1_examples.json").read_text())
    found["examples"] = examples["examples"]
    return found


if __name__ == "__main__":
    work(
        lambda folder, scenarios: {
            name: run(folder, name, **scenario) for name, scenario in scenarios.items()
        }
    )
