"""A model and problems on the disk, as commands and recipes read them."""

from __future__ import annotations

import json
from pathlib import Path

import cases

SMALL = [
    *("--use_cpu", "true", "--bf16", "false", "--dtype", "float32"),
    *("--gradient_checkpointing", "false", "--per_device_train_batch_size", "8"),
    *("--gradient_accumulation_steps", "1", "--num_generations", "4"),
    *("--max_completion_length", "6", "--warmup_samples", "4", "--disable_tqdm", "true"),
]
"""Arguments of a run of seconds on a CPU."""


def questions(count: int) -> list[dict[str, str]]:
    """Problems in GSM8K's form."""
    return [
        {"question": f"what is {i} plus {i}?", "answer": f"{i}+{i}={2 * i}\n#### {2 * i}"}
        for i in range(count)
    ]


def write(folder: Path) -> None:
    """A tiny model in `model`, 20 problems in `train.jsonl`, five of them in `test.jsonl`."""
    cases.model(max_position_embeddings=512).save_pretrained(folder / "model")
    cases.tokenizer().save_pretrained(folder / "model")
    rows = questions(20)
    for name, part in (("train.jsonl", rows), ("test.jsonl", rows[:5])):
        lines = [json.dumps(row) for row in part]
        (folder / name).write_text("\n".join(lines))
