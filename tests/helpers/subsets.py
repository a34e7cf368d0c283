"""Selections without training, as the command `select` makes them."""

from pathlib import Path

import cases

from trl_learnalign.training.subset import SubsetConfig, SubsetSelection


def data(size=12):
    made = cases.dataset(size).add_column(
        "reference", [f"{i * 7}+{'ab' * (i % 4)}" for i in range(size)]
    )
    return made.add_column("row", list(range(size)))


class Watch:
    """A reward that counts rollouts."""

    def __init__(self):
        self.rollouts = 0

    def accuracy_reward(self, completions, **_):
        self.rollouts += len(completions)
        return cases.accuracy_reward(completions)


def select(folder, top=(3, 6), policy=None, validation=None, pool=None, options=None, **settings):
    """Runs as the command does; returns the selection and how many rollouts were rewarded."""
    watch = Watch()
    trainer = cases.trainer(
        folder,
        policy or roomy(),
        rewards=watch.accuracy_reward,
        data=data() if pool is None else pool,
        **(options or {}),
    )
    defaults = {
        "warmup_samples": 4,
        "feature_dim": 64,
        "shard_size": 4,
        "selector": "learnalign",
        "top": list(top),
    }
    selection = SubsetSelection(trainer, SubsetConfig(**{**defaults, **settings}), validation)
    selection.run()
    selection.write(Path(folder) / "subsets")
    return selection, watch.rollouts


def roomy():
    return cases.model(max_position_embeddings=512)
