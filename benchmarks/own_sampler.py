r"""Does a sampler of one's own beat shuffling? The quickstart's pool and base model, equal steps, several seeds.

    PYTHONPATH=recipes python benchmarks/own_sampler.py --seeds 4 --steps 60

Prints held-out accuracy per seed and the mean difference with its 95 % interval over seeds (Welch).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from transformers.utils import logging as transformers_logging

from trl_learnalign import LearnAlignCallback
from trl_learnalign.cli.arguments import parse
from trl_learnalign.cli.problems import load_problems
from trl_learnalign.cli.recipe import close, make_trainer
from trl_learnalign.evaluation.held_out import held_out_accuracy
from trl_learnalign.intervals import difference_over_seeds
from trl_learnalign.toy.model import make_base_model

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ROOT / "recipes" / "configs" / "quickstart.yaml"
BASE_MODEL = ROOT / "docs" / "results" / "base_model"


def accuracy(order: str, seed: int, steps: int) -> float:
    """Held-out accuracy after so many steps in an order.

    Args:
        order (`str`): `LearnAlignConfig.order`.
        seed (`int`): Of the trainer and of the selection.
        steps (`int`): Optimizer steps.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = (
            f"--stages 1 --warmup_samples 0 --stage_epochs 1 --stage_steps {steps} --order {order}"
        )
        given += f" --seed {seed} --selection_seed {seed} --output_dir {folder} --disable_tqdm true"
        recipe, config, args, model = parse(SETTINGS, given.split())
        model.model_name_or_path = str(make_base_model(BASE_MODEL))
        problems = load_problems(recipe)
        trainer = make_trainer(args, model, problems.train, problems.rewards)
        trainer.add_callback(LearnAlignCallback(trainer, config))
        trainer.train()
        found = held_out_accuracy(trainer, problems.held_out, problems.rewards[0])
        close(trainer)
    return float(found["accuracy"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--order", default="thompson_sampler:ThompsonSampler")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    found: dict[str, list[float]] = {"shuffled": [], options.order: []}
    for seed in range(options.seeds):
        for order, values in found.items():
            values.append(accuracy(order, seed, options.steps))
            print(f"seed {seed}, {order}: {100 * values[-1]:.1f} %", flush=True)
    print(difference_over_seeds(found["shuffled"], found[options.order]))


if __name__ == "__main__":
    main()
