"""Runs in adaptive order, whose rollouts are a function of the prompt's number."""

import pandas as pd
import sampling_cases
from interruptions import KillAt

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.training.checkpoints import last_complete_checkpoint

LEAVES = dict(warmup_samples=0, stages=[1.0])


def settings(**options):
    return LearnAlignConfig(
        **{
            **LEAVES,
            "order": "adaptive",
            "skip_zero_advantages": True,
            "feature_dim": 64,
            **options,
        }
    )


def go(folder, config, kill_at=None, resume=False, prompts=24, **options):
    """A run whose rollouts are a function of the prompt's number."""
    options = {"max_steps": -1, "save_strategy": "steps", "save_steps": 1, **options}
    trainer = sampling_cases.trainer(folder, rows=list(range(prompts)), **options)
    callback = LearnAlignCallback(trainer, config)
    trainer.add_callback(callback)
    if kill_at is not None:
        trainer.add_callback(KillAt(kill_at))
    found = last_complete_checkpoint(folder) if resume else None
    trainer.train(resume_from_checkpoint=None if found is None else str(found))
    return trainer, callback


def history(callback):
    return pd.read_parquet(callback.folder / "reward_history.parquet")


def weights(trainer):
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]
