"""What training moves: the weights after it, on the recipes' own path, with the precision settings of each recipe."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import cases
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.cli.arguments import parse
from trl_learnalign.cli.recipe import close, make_trainer
from trl_learnalign.preflight import environment
from trl_learnalign.training.subset import SubsetConfig

CONFIGS = cases.ROOT / "recipes" / "configs"
# Those of the paper, by its learning rate: the quickstart has a larger one.
RECIPES = sorted(
    path.stem
    for path in CONFIGS.glob("*.yaml")
    if yaml.safe_load(path.read_text())["learning_rate"] == 1e-6
)
STEPS = 8
# For a process of its own: where the package and the helpers are.
PATHS = os.pathsep.join(map(str, (cases.ROOT, cases.ROOT / "tests" / "helpers")))


def save_model(folder):
    """A tiny Qwen2 whose matrices are as large as those of a real one, and its tokenizer."""
    made = cases.model(max_position_embeddings=512)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.02, generator=generator)
    made.save_pretrained(folder / "model")
    cases.tokenizer().save_pretrained(folder / "model")


def share_moved(folder, recipe, *arguments):
    """Share of the weights' entries that a run with a recipe's settings moves, and the run's trainer."""
    small = [
        "--model_name_or_path",
        folder / "model",
        "--use_cpu",
        "true",
        "--max_completion_length",
        "4",
    ]
    small += [
        "--per_device_train_batch_size",
        "64",
        "--gradient_checkpointing",
        "false",
        "--save_strategy",
        "no",
    ]
    small += ["--disable_tqdm", "true", "--output_dir", folder / "out"]
    settings = SubsetConfig if recipe.startswith("select") else LearnAlignConfig
    _, _, args, model = parse(
        CONFIGS / f"{recipe}.yaml", [*map(str, small), *arguments], config=settings
    )
    prompts = args.generation_batch_size // args.num_generations  # of one step
    rewards = [cases.accuracy_reward, cases.length_reward]
    trainer = make_trainer(args, model, cases.dataset(prompts), rewards)
    before = {
        name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()
    }
    config = LearnAlignConfig(warmup_samples=0, stages=[1.0], stage_epochs=STEPS, selector="random")
    trainer.add_callback(LearnAlignCallback(trainer, config))
    trainer.train()
    assert trainer.state.global_step == STEPS
    after = dict(trainer.model.named_parameters())
    moved = sum(int((after[name] != before[name]).sum()) for name in before)
    return moved / sum(entries.numel() for entries in before.values()), trainer


def test_all_recipes_with_the_papers_learning_rate_are_here():
    assert RECIPES == [
        "dapo_math_17k",
        "gsm8k_staged",
        "select_gsm8k",
        "table1_gsm8k",
        "table2_math",
    ]


@pytest.mark.parametrize("recipe", RECIPES)
def test_training_moves_the_weights(tmp_path, caplog, recipe):
    save_model(tmp_path)
    moved, trainer = share_moved(tmp_path, recipe)
    assert trainer.args.bf16  # passes in bfloat16, weights in float32
    assert moved > 0.99
    assert "no float32 copy" not in caplog.text


def test_in_bfloat16_they_hardly_move_and_it_is_said(tmp_path, caplog):
    save_model(tmp_path)
    moved, _ = share_moved(tmp_path, "gsm8k_staged", "--dtype", "bfloat16")
    assert moved < 0.1
    assert caplog.text.count("keeps no float32 copy") == 1
    assert "that distance is 1.2e-04, and an Adam step is about learning_rate=1e-06" in caplog.text
    assert "model_init_kwargs={'dtype': 'float32'}" in caplog.text


def lora(model, adapters):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(model, config, autocast_adapter_dtype=adapters is torch.float32)


@pytest.mark.parametrize(
    ("base", "adapters", "problem"),
    [
        (torch.bfloat16, None, "parameters (model.embed_tokens.weight, ...) are bfloat16"),
        (torch.float32, None, None),
        (torch.bfloat16, torch.float32, None),
        (torch.bfloat16, torch.bfloat16, "8 trainable parameters"),
        (torch.float32, torch.float32, None),
    ],
)
def test_who_is_warned(tmp_path, caplog, base, adapters, problem):
    model = cases.model().to(base)
    if adapters is not None:
        model = lora(model, adapters)
    trainer = cases.trainer(tmp_path, model, bf16=True)
    config = LearnAlignConfig(warmup_samples=0, stages=[2], selector="random")
    trainer.add_callback(LearnAlignCallback(trainer, config))
    with caplog.at_level(logging.WARNING, "trl_learnalign"):
        trainer.train()
    assert "no float32 copy" in caplog.text if problem else "no float32 copy" not in caplog.text
    assert (problem or "") in caplog.text


def test_optimizers_that_keep_what_rounding_loses(tmp_path):
    trainer = cases.trainer(tmp_path, cases.model().to(torch.bfloat16))
    trainer.create_optimizer()
    assert "no float32 copy" in environment.rounding_problem(trainer)
    trainer.optimizer.master_weights = True  # Apex, Transformer Engine
    assert environment.rounding_problem(trainer) is None
    trainer.optimizer.master_weights = False
    for group in trainer.optimizer.param_groups:
        group["kahan_sum"] = True  # torch-optimi
    assert environment.rounding_problem(trainer) is None
    for group in trainer.optimizer.param_groups:  # as DeepSpeed does
        group["kahan_sum"] = None
        group["params"] = [parameter.detach().float() for parameter in group["params"]]
    assert environment.rounding_problem(trainer) is None


def test_generation_that_casts_the_trained_weights(tmp_path):
    trainer = cases.trainer(tmp_path, bf16=True)
    trainer.create_optimizer()
    assert environment.rounding_problem(trainer) is None
    trainer.args.use_transformers_continuous_batching = True
    assert "casts the trained weights to bfloat16" in environment.rounding_problem(trainer)


@pytest.mark.slow
@pytest.mark.distributed
def test_training_moves_the_weights_of_two_processes(tmp_path):
    """As above, under DDP."""
    save_model(tmp_path)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    done = subprocess.run(
        [*command, __file__, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    said = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("moved ")]
    assert len(said) == 2
    for processes, completions, share in said:
        assert (processes, completions) == ("2", "48")
        assert float(share) > 0.99


if __name__ == "__main__":
    share, trained = share_moved(Path(sys.argv[1]), "gsm8k_staged")
    print(
        f"moved {trained.accelerator.num_processes} {trained.args.generation_batch_size} {share}\n",
        flush=True,
    )
    close(trained)
