r"""Warm-up, scoring, selection and staged RL (50 % / 30 % / 20 %) in one job.

    accelerate launch recipes/gsm8k_staged.py                                          # the paper's GSM8K run
    accelerate launch recipes/gsm8k_staged.py --config recipes/configs/quickstart.yaml # minutes on a CPU
    accelerate launch --config_file accelerate_configs/zero2.yaml recipes/gsm8k_staged.py
    accelerate launch recipes/gsm8k_staged.py --order adaptive --stages 1 --warmup_samples 0 \
        --skip_zero_advantages true --beta 0    # no scoring: docs/continual.md

Every field of the YAML file can be overridden on the command line; `--help` lists all.
"""

import time
from pathlib import Path

from trl_learnalign import LearnAlignCallback, plan_run
from trl_learnalign.cli import plan
from trl_learnalign.cli.arguments import parse
from trl_learnalign.cli.console import one_line_errors, set_up_logging
from trl_learnalign.cli.problems import load_problems
from trl_learnalign.cli.recipe import (
    check_surroundings,
    checkpoint,
    exit_cleanly,
    finish,
    make_trainer,
)
from trl_learnalign.evaluation.held_out import held_out_accuracy
from trl_learnalign.preflight.checks import drop_unneeded_warmup


def main() -> None:
    started = time.perf_counter()
    recipe, config, args, model = parse(Path(__file__).parent / "configs" / "gsm8k_staged.yaml")
    with one_line_errors():
        config = drop_unneeded_warmup(config)
    if recipe.dry_run:
        plan.show(recipe, config, args, model)
        return
    check_surroundings(recipe, args, model)
    set_up_logging()
    with one_line_errors():
        problems = load_problems(recipe)
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
