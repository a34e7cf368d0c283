"""A sampler of your own: Thompson sampling on each prompt's success rate, prompts of unknown rate first to be tried.

PYTHONPATH=recipes python train.py --order thompson_sampler:ThompsonSampler
"""

import numpy as np

from trl_learnalign.training.sampler import SamplerInputs


class ThompsonSampler:
    """Draws a success rate for each prompt from its Beta posterior, and takes the prompts nearest to one half.

    Args:
        inputs (`SamplerInputs`): Candidates, seed and settings of the stage.
    """

    forget = 0.9
    """Of what a prompt's earlier rollouts counted, when it is rolled out again: the policy learns."""

    def __init__(self, inputs: SamplerInputs):
        self.inputs = inputs
        self.counts = np.ones((2, len(inputs.dataset)))  # right, wrong; Beta(1, 1) to begin with

    def draw(self, step: int, count: int) -> np.ndarray:
        """The candidates whose sampled success rate p has the largest p(1 - p)."""
        rows = self.inputs.candidates
        random = np.random.default_rng(
            [self.inputs.seed, step]
        )  # a function of the step: nothing to save
        rates = random.beta(*self.counts[:, rows])
        return rows[np.argsort(-rates * (1 - rates), kind="stable")[:count]]

    def observe(self, outcomes):
        """Counts right and wrong rollouts; predicted was the posterior mean."""
        rows = outcomes.rows
        predicted = self.counts[0, rows] / self.counts[:, rows].sum(axis=0)
        self.counts[:, rows] = 1 + self.forget * (self.counts[:, rows] - 1)
        np.add.at(self.counts[0], rows, outcomes.right)
        np.add.at(self.counts[1], rows, outcomes.wrong)
        return predicted

    def metrics(self):
        """Share of the candidates that were rolled out at least once."""
        tried = self.counts[:, self.inputs.candidates].sum(axis=0) > 2
        return {"sampler/tried": float(tried.mean())}
