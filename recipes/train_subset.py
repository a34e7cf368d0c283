"""Train on N prompts: chosen here (warm-up, scoring, back to the base model, training), or a subset chosen before.

    accelerate launch recipes/train_subset.py                                         # LearnAlign, N = 1000, GSM8K
    accelerate launch recipes/train_subset.py --selector random --stages 500          # any cell of the paper's Table 1
    accelerate launch recipes/train_subset.py --subset outputs/select_gsm8k/subsets/learnalign/top_1000
    accelerate launch recipes/train_subset.py --config recipes/configs/table2_math.yaml

A warm-up serves the selectors that roll out; the others read the base model, or none, and are trained without one.
Every field of the YAML file can be overridden on the command line; `--help` lists all.
"""

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path

from trl_learnalign import LearnAlignCallback, plan_run
from trl_learnalign.cli import plan
from trl_learnalign.cli.arguments import RecipeArguments, parse
from trl_learnalign.cli.console import one_line_errors, set_up_logging
from trl_learnalign.cli.problems import load_problems, load_subset
from trl_learnalign.cli.recipe import (
    check_surroundings,
    checkpoint,
    exit_cleanly,
    finish,
    make_trainer,
)
from trl_learnalign.evaluation.held_out import held_out_accuracy
from trl_learnalign.preflight.checks import drop_unneeded_warmup


@dataclass
class SubsetArguments(RecipeArguments):
    """Where prompts and held-out problems come from."""

    subset: str | None = field(
        default=None,
        metadata={
            "help": "A subset written by the select command: train on all of it, without warm-up and scoring."
        },
    )


def main() -> None:
    started = time.perf_counter()
    default = Path(__file__).parent / "configs" / "table1_gsm8k.yaml"
    recipe, config, args, model = parse(default, recipe=SubsetArguments)
    if recipe.subset is not None:
        config = dataclasses.replace(config, selector="random", stages=[1.0])
    with one_line_errors():
        config = drop_unneeded_warmup(config)
    if recipe.dry_run:
        plan.show(recipe, config, args, model)
        return
    check_surroundings(recipe, args, model)
    set_up_logging()
    with one_line_errors():
        problems = load_problems(recipe)
        if recipe.subset is not None:
            problems = dataclasses.replace(problems, train=load_subset(recipe, recipe.subset))
        plan_run(config, args, problems.train, problems.rewards, problems.validation)

    trainer = make_trainer(args, model, problems.train, problems.rewards)
    with one_line_errors():
        callback = LearnAlignCallback(
            trainer,
            config,
            on_phase_end=lambda name, step: held_out_accuracy(
                trainer, problems.held_out, problems.rewards[0]
            ),
            validation_dataset=problems.validation,
        )
    trainer.add_callback(callback)
    with exit_cleanly(trainer):
        trainer.train(resume_from_checkpoint=checkpoint(args))
    trainer.save_model(args.output_dir)
    finish(trainer, callback, time.perf_counter() - started)


if __name__ == "__main__":
    main()
