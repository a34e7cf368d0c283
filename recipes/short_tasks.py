"""GRPO of a real pretrained model on short generated tasks: minutes on one CPU core.

    python recipes/short_tasks.py                                # SmolLM2-135M-Instruct from the hub
    python recipes/short_tasks.py --model_name_or_path FOLDER    # a local checkpoint

Every field of the YAML file can be overridden on the command line; `--help` lists all.
"""

import time
from pathlib import Path

from transformers import AutoTokenizer

from trl_learnalign import LearnAlignCallback, plan_run
from trl_learnalign.cli import plan
from trl_learnalign.cli.arguments import parse
from trl_learnalign.cli.console import one_line_errors, set_up_logging
from trl_learnalign.cli.recipe import (
    check_surroundings,
    checkpoint,
    exit_cleanly,
    finish,
    make_trainer,
)
from trl_learnalign.evaluation.held_out import held_out_accuracy
from trl_learnalign.toy.short_tasks import build_short_pool, short_answer_reward


def main() -> None:
    started = time.perf_counter()
    recipe, config, args, model = parse(Path(__file__).parent / "configs" / "short_tasks.yaml")
    if recipe.dry_run:
        plan.show(recipe, config, args, model, recipe.train_samples, recipe.eval_samples or 0)
        return
    check_surroundings(recipe, args, model)
    set_up_logging()
    with one_line_errors():
        end = AutoTokenizer.from_pretrained(model.model_name_or_path).eos_token
        pool = build_short_pool(recipe.train_samples or 1000, recipe.split_seed, end=end)
        held_out = build_short_pool(recipe.eval_samples or 400, recipe.split_seed, "heldout", end)
        plan_run(config, args, pool, [short_answer_reward])

    trainer = make_trainer(args, model, pool, [short_answer_reward])
    with one_line_errors():
        callback = LearnAlignCallback(
            trainer,
            config,
            on_phase_end=lambda name, step: held_out_accuracy(
                trainer, held_out, short_answer_reward
            ),
        )
    trainer.add_callback(callback)
    with exit_cleanly(trainer):
        trainer.train(resume_from_checkpoint=checkpoint(args))
    trainer.save_model(args.output_dir)
    finish(trainer, callback, time.perf_counter() - started)


if __name__ == "__main__":
    main()
