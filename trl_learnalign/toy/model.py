"""A tiny base model: made once by supervised training, then an ordinary checkpoint folder.

A model of this size learns little by reinforcement from scratch. What it can do, as models of full size do, is to
prefer one of the procedures it already holds. So its supervised data shows right and wrong procedures side by side,
in the proportions of each family's *competence*, and reinforcement learning finds p anywhere between 0 and 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from random import Random
from typing import Any

import torch
from datasets import Dataset
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PrinterCallback, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from trl import SFTConfig, SFTTrainer

from trl_learnalign.toy.tasks import FAMILIES, SPLITS, strings_of

logger = logging.getLogger(__name__)

FINGERPRINT_FILE = "toy.json"

MAX_COMPLETION_LENGTH = 10
"""Tokens enough for any answer and its end token: what to give a trainer as `max_completion_length`."""

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"

# The shortest template that marks where the answer begins and ends: "sort 3142=1234<eos>". The generation markers let
# `assistant_only_loss` find the answer.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "={% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)

LESSON_SHARE = 0.7
"""Share of the training steps that are lessons: there, a skill is shown rightly at least `LESSON_COMPETENCE` of the
time, or the rare ones would not be learned. The remaining steps bring every competence to its own value."""

LESSON_COMPETENCE = 0.5


@dataclass(frozen=True)
class BaseModelSettings:
    """What a base model is made from; together with the families' table it decides whether a folder can be reused.

    Args:
        seed (`int`, *optional*, defaults to `0`): Seed of the weights and of the supervised data.
        steps (`int`, *optional*, defaults to `1800`): Optimizer steps. `0` leaves the weights random.
        batch_size (`int`, *optional*, defaults to `32`): Examples in each step.
        learning_rate (`float`, *optional*, defaults to `2e-3`): Peak learning rate.
        num_layers (`int`, *optional*, defaults to `3`): Transformer layers.
        hidden_size (`int`, *optional*, defaults to `96`): Width; a multiple of 8. The MLP is twice as wide.
    """

    seed: int = 0
    steps: int = 1800
    batch_size: int = 32
    learning_rate: float = 2e-3
    num_layers: int = 3
    hidden_size: int = 96

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError(f"steps={self.steps} must not be negative")
        if self.batch_size < 1 or self.num_layers < 1:
            raise ValueError(
                f"batch_size={self.batch_size} and num_layers={self.num_layers} must be at least 1"
            )
        if self.hidden_size < 8 or self.hidden_size % 8:
            raise ValueError(f"hidden_size={self.hidden_size} must be a multiple of 8")


TINY: dict[str, int] = {"steps": 0, "num_layers": 1, "hidden_size": 32}
"""Settings of a model with random weights, made at once: ``make_base_model(folder, **TINY)``."""


def make_base_model(folder: str | os.PathLike[str], **settings: Any) -> Path:
    """Make the base model, unless the folder already holds it.

    Training takes one to two minutes on one CPU thread. The folder appears complete or not at all.

    Args:
        folder (`str` or `os.PathLike`): Checkpoint folder, readable with `from_pretrained`.
        **settings: Fields of [`BaseModelSettings`].

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: If the folder holds something else: another file tree, or a base model of other settings.
    """
    folder, base = Path(folder), BaseModelSettings(**settings)
    if _is_finished(folder, base):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        model = Path(scratch) / "model"
        _build(base, model, Path(scratch) / "trainer")
        try:
            model.replace(folder)
        except OSError:  # another process was faster
            if not _is_finished(folder, base):
                raise
    return folder


def _fingerprint(settings: BaseModelSettings) -> dict[str, Any]:
    families = {
        # A sample of both procedures: a changed one needs a new model as well.
        name: {
            "competence": list(family.competence),
            "31415": [family.right("31415"), family.wrong("31415")],
        }
        for name, family in FAMILIES.items()
    }
    lessons = {"lesson_share": LESSON_SHARE, "lesson_competence": LESSON_COMPETENCE}
    return {
        **asdict(settings),
        **lessons,
        "chat_template": CHAT_TEMPLATE,
        "splits": SPLITS,
        "families": families,
    }


def _is_finished(folder: Path, settings: BaseModelSettings) -> bool:
    """Whether the folder holds this base model; an absent or empty folder does not."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    file = folder / FINGERPRINT_FILE
    if not file.is_file():
        raise ValueError(
            f"{folder} is not a toy base model (it has no {FINGERPRINT_FILE}): choose another folder"
        )
    theirs, ours = json.loads(file.read_text()), _fingerprint(settings)
    if theirs == ours:
        return True
    differences = []
    for name in {**ours, **theirs}:
        before, now = theirs.get(name), ours.get(name)
        if before != now:
            differences.append(f"{name}: {before!r}, now {now!r}")
    raise ValueError(
        f"{folder} contains a base model with other settings ({'; '.join(differences)}): choose another folder or "
        "delete this one"
    )


def _build(settings: BaseModelSettings, folder: Path, scratch: Path) -> None:
    """Train and save everything into `folder`."""
    tokenizer = make_tokenizer()
    model = _random_model(settings, tokenizer)
    if settings.steps:
        logger.info(
            "Training the toy base model once: %d supervised steps, one or two minutes.",
            settings.steps,
        )
        _train(model, tokenizer, settings, scratch)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / FINGERPRINT_FILE).write_text(json.dumps(_fingerprint(settings), indent=2))


def make_tokenizer() -> Qwen2Tokenizer:
    """Tokenizer of single bytes, plus one token for each command with its space: ``sort 3142=`` is six tokens.

    Returns:
        `Qwen2Tokenizer`: With pad, bos and eos tokens and a chat template. Text is padded on the left; nothing is
        added to it.
    """
    # A class of Qwen2's own, since `AutoTokenizer` reads the tokenizer of a Qwen2 checkpoint as one whatever its files
    # say, and replaces any other rule for splitting text. Without merges it splits into bytes.
    vocabulary = [PAD, BOS, EOS, *sorted(ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)},
        merges=[],
        unk_token=None,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.add_tokens([AddedToken(f"{name} ", normalized=False) for name in FAMILIES])
    return tokenizer


def _random_model(settings: BaseModelSettings, tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=2 * settings.hidden_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        # Texts are short: the usual base of 10,000 spends most frequencies on distances that never occur, and the
        # procedures, which live on positions, take longer to learn.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers are not ours to move
        torch.manual_seed(settings.seed)
        return Qwen2ForCausalLM(config)


def supervised_data(tokenizer: Qwen2Tokenizer, settings: BaseModelSettings) -> Dataset:
    """Supervised examples, in the order of training.

    Args:
        tokenizer (`Qwen2Tokenizer`): From [`make_tokenizer`].
        settings ([`BaseModelSettings`]): Seed, steps and batch size.

    Returns:
        `Dataset`: `steps` × `batch_size` rows of `input_ids` and `labels` (`-100` on the prompt). Strings are of the
        split `"train"`.
    """
    rng = Random(f"{settings.seed}/supervised")
    cells = [(name, length) for name, family in FAMILIES.items() for length in family.lengths]
    size = settings.steps * settings.batch_size
    prompts, answers = [], []
    for index in range(size):
        name, length = rng.choice(cells)
        family, string = FAMILIES[name], rng.choice(strings_of(name, length, "train"))
        competence = family.competence_at(length)
        if competence > 0 and index < LESSON_SHARE * size:
            competence = max(competence, LESSON_COMPETENCE)
        procedure = family.right if rng.random() < competence else family.wrong
        # The chat template, written out: rendering 100,000 takes a minute.
        prompts.append(f"{name} {string}=")
        answers.append(procedure(string) + EOS)
    prompt_ids, answer_ids = tokenizer(prompts)["input_ids"], tokenizer(answers)["input_ids"]
    input_ids, labels = [], []
    for prompt, answer in zip(prompt_ids, answer_ids, strict=True):
        input_ids.append(prompt + answer)
        labels.append([-100] * len(prompt) + answer)  # the prompt is no lesson
    return Dataset.from_dict({"input_ids": input_ids, "labels": labels})


CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(SFTConfig, "activation_checkpointing")
    else "gradient_checkpointing"
)
"""Name of the setting in this transformers; the old one warns where there is the new one."""


def _train(
    model: Qwen2ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    settings: BaseModelSettings,
    scratch: Path,
) -> None:
    """Supervised training, in place."""
    arguments = SFTConfig(
        output_dir=str(scratch),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(50, settings.steps // 10),
        adam_beta2=0.99,
        train_sampling_strategy="sequential",  # lessons first
        dataset_kwargs={"skip_prepare_dataset": True},  # the examples are tokens already
        seed=settings.seed,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=not logger.isEnabledFor(logging.INFO),
        **{CHECKPOINTING: False},
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=supervised_data(tokenizer, settings),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)  # it prints the run's speed
    trainer.train()


def main() -> None:
    """Make a base model from the command line: ``python -m trl_learnalign.toy.model FOLDER``."""
    parser = argparse.ArgumentParser(
        description="Create the toy tasks' base model, unless the folder already contains it."
    )
    parser.add_argument("folder", type=Path, help="checkpoint folder")
    for field in fields(BaseModelSettings):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    settings = vars(parser.parse_args())
    logging.basicConfig(format="%(message)s")
    logging.getLogger("trl_learnalign").setLevel(logging.INFO)
    make_base_model(settings.pop("folder"), **settings)


if __name__ == "__main__":
    main()
