"""Runs to make reports of, and what must do them no harm."""

import json

import cases

from trl_learnalign import LearnAlignCallback, LearnAlignConfig

HOSTILE = (
    "<script>alert(1)</script> [bold red]not markup[/] {{ 7 * 7 }} "
    "\x1b[31mred\x1b[0m \x9b31m \u202e<img src=x onerror=y>"
)


def train(folder, accuracies=(0.25, 0.5, 0.75, 0.5, 0.625), **options):
    """A finished run; its held-out accuracy is made up, and everything else is not."""
    trainer = cases.trainer(folder, policy=cases.model())
    left = list(accuracies)

    def evaluate(name, step):
        return {"accuracy": left.pop(0), "n_eval": 8} if left else None

    settings = LearnAlignConfig(
        **{"warmup_samples": 4, "feature_dim": 64, "shard_size": 4, **options}
    )
    callback = LearnAlignCallback(trainer, settings, on_phase_end=evaluate)
    trainer.add_callback(callback)
    trainer.train()
    return trainer, callback


def change(path, edit):
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))
