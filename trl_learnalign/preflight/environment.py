"""Checks of hub, GPU, prompt lengths and weight precision that take seconds."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import HFValidationError
from trl.rewards import accuracy_reward as math_reward

from trl_learnalign.bridge.inference import prompt_token_lists
from trl_learnalign.bridge.policy import casts_weights, sixteen_bit_weights
from trl_learnalign.data.answers import (
    MAX_UNJUDGED,
    Solution,
    accuracy_reward,
    alternatives,
    misjudged,
)
from trl_learnalign.data.prompts import columns_of, has_transform, is_stream, named_rows, prompts_of

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import GRPOTrainer


logger = logging.getLogger(__name__)

_TIMEOUT = 10.0  # seconds per request to the hub
# Approximate maximum tokens that a chat template adds to a prompt; only prompts nearer to the limit are tokenized.
_TEMPLATE_TOKENS = 1024
_BATCH = 1000


def missing_from_hub(name: str, kind: str) -> str | None:
    """Why a hub repository is not available, or `None` if it is (or is a local path).

    Args:
        name (`str`): Hub id or path.
        kind (`str`): `"model"` or `"dataset"`.
    """
    if Path(name).exists():
        return None
    try:
        if kind == "model" and isinstance(try_to_load_from_cache(name, "config.json"), str):
            return None
        api = HfApi()
        if kind == "model":
            api.model_info(name, timeout=_TIMEOUT)
        else:
            api.dataset_info(name, timeout=_TIMEOUT)
    except HFValidationError:
        return f"{kind} {name!r} is neither an existing path nor a hub id"
    except (OfflineModeIsEnabled, LocalEntryNotFoundError):
        return f"{kind} {name!r} is not in the local cache, and offline mode is on"
    except HfHubHTTPError as error:
        answer = error if error.response is None else error.response.status_code
        return f"{kind} {name!r}: the hub answers {answer}"
    except Exception as error:
        # Each version of the client wraps connection failures in other classes. All of them mean that the hub was not
        # reached, which does not matter for a cached dataset.
        if kind == "dataset" and _is_in_cache(name):
            return None
        return f"{kind} {name!r}: the hub cannot be reached ({error})"
    return None


def _is_in_cache(name: str) -> bool:
    from datasets.config import HF_DATASETS_CACHE

    return os.path.isdir(os.path.join(HF_DATASETS_CACHE, name.replace("/", "___")))


def missing_gpu(use_cpu: bool) -> str | None:
    """Why a run meant for a GPU cannot start, or `None` if there is a GPU or the CPU was requested."""
    if use_cpu:
        return None
    backends = (torch.cuda, torch.backends.mps, torch.xpu)
    if any(backend.is_available() for backend in backends):
        return None
    return "no GPU is visible"


def check_references(trainer: GRPOTrainer) -> None:
    r"""Check that the reward accepts the reference answers, if it is TRL's `accuracy_reward` or ours.

    For a bare `3\sqrt{13}` math-verify reads the 3, and for `\sqrt{51}` nothing, so correct rollouts would count as
    wrong or could not be judged. Other rewards may interpret their columns differently, and are not checked.

    Args:
        trainer (`GRPOTrainer`): With reward functions and training dataset.

    Raises:
        `ValueError`: If more than half of the references are not graded correct with themselves as the answer.
    """
    if not any(function in (accuracy_reward, math_reward) for function in trainer.reward_funcs):
        return
    if is_stream(trainer.train_dataset):
        return  # references are not available before training
    if "solution" not in columns_of(trainer.train_dataset):
        return  # TRL raises its own error
    reward = accuracy_reward if accuracy_reward in trainer.reward_funcs else math_reward
    solutions = _solutions(trainer.train_dataset, lists=reward is accuracy_reward)
    wrong = misjudged(solutions, reward=reward)
    if not wrong:
        return
    count = sum(bool(alternatives(solution)) for solution in solutions)
    problem = (
        f"accuracy_reward grades {len(wrong)} of {count} reference answers as wrong against themselves, because it "
        f"reads LaTeX only between delimiters. The first is row {wrong[0]}: "
        f"{alternatives(solutions[wrong[0]])[0][:80]!r}. Add the delimiters: from trl_learnalign.data.answers "
        "import final_answer, reference_answer; dataset = dataset.map(lambda row: "
        f"{{'solution': reference_answer(final_answer(row['solution']))}})."
    )
    # For our reward, the user of `as_prompts` has set there which share may be lost.
    if reward is math_reward and len(wrong) > MAX_UNJUDGED * count:
        raise ValueError(
            f"{problem} To train anyway, give the trainer a function of your own that calls it."
        )
    if trainer.accelerator.is_main_process:
        logger.warning("%s Until then every rollout of these prompts is graded as wrong.", problem)


def _solutions(dataset: Dataset, lists: bool) -> list[Solution]:
    """The column `solution` as training reads it; empty without one. TRL's reward does not support lists."""
    rows = dataset if has_transform(dataset) else dataset.with_format(None)
    solutions = [solution or "" for solution in rows[:]["solution"]]
    if not all(_is_text(solution, lists) for solution in solutions):
        raise ValueError(
            "The column 'solution' has values that are not text, which accuracy_reward cannot read: convert the "
            "final answers to text, e.g. dataset.map(lambda row: {'solution': str(row['solution'])}). The "
            "accuracy_reward of trl_learnalign.data.answers also accepts lists of texts, any of which is correct."
        )
    return solutions


def check_lengths(trainer: GRPOTrainer) -> None:
    """Check that each prompt and its longest completion fit into the model's context.

    Args:
        trainer (`GRPOTrainer`): With model, tokenizer and training dataset.

    Raises:
        `ValueError`: Naming the rows, the limit and the remedy.
    """
    context = _context_length(trainer)
    if context is None:
        return
    limit = context - trainer.args.max_completion_length
    if limit < 1:
        raise ValueError(
            f"max_completion_length={trainer.args.max_completion_length} leaves no room for a prompt in the model's "
            f"context of {context} tokens: lower it."
        )
    # A token has at least one byte, so only prompts with more bytes than the limit can have too many tokens.
    least = limit - _TEMPLATE_TOKENS
    prompts = {
        row: prompt
        for row, prompt in enumerate(prompts_of(trainer.train_dataset))
        if _bytes(prompt) > least
    }
    rows = list(prompts)
    lengths = {}
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        tokens = prompt_token_lists(trainer, [prompts[row] for row in batch])
        for row, ids in zip(batch, tokens, strict=True):
            lengths[row] = len(ids)
    long = [row for row, length in lengths.items() if length > limit]
    if long:
        raise ValueError(
            f"{len(long)} of {len(trainer.train_dataset)} prompts have more than {limit} tokens: {named_rows(long)} "
            f"(row {long[0]} has {lengths[long[0]]}). With "
            f"max_completion_length={trainer.args.max_completion_length} they do not fit into the model's context "
            f"of {context} tokens. Remove them from the dataset, or lower max_completion_length."
        )


def _context_length(trainer: GRPOTrainer) -> int | None:
    config = trainer.model.config.get_text_config()
    of_model = getattr(config, "max_position_embeddings", None)
    of_engine = trainer.args.vllm_max_model_length if trainer.args.use_vllm else None
    # XLNet has -1, which means no limit.
    lengths = [length for length in (of_model, of_engine) if length and length > 0]
    return min(lengths, default=None)


def _bytes(prompt: Any) -> int:
    text = prompt
    if not isinstance(prompt, str):
        text = json.dumps(prompt, ensure_ascii=False, default=str)
    return len(text.encode(errors="surrogatepass"))


def _is_text(solution: Any, lists: bool) -> bool:
    if isinstance(solution, list) and lists:
        return all(answer is None or isinstance(answer, str) for answer in solution)
    return isinstance(solution, str)


# ---- Weight precision -----------------------------------------------------------------------------------------------

_TYPICAL_WEIGHT = 0.02  # standard deviation of the usual initialisation

_REMEDY = (
    "Load the model in float32 and run the forward pass in bfloat16: GRPOConfig(bf16=True, "
    "model_init_kwargs={'dtype': 'float32'}), for recipes --dtype float32 --bf16 true. DeepSpeed ZeRO, "
    "accelerate's FSDP2 with mixed precision, and PEFT's adapters keep float32 copies of their own."
)


def warn_of_rounding(trainer: GRPOTrainer) -> None:
    """Warn, on the main process, if most of what training learns would be rounded away.

    Args:
        trainer (`GRPOTrainer`): The trainer, prepared for training: model wrapped, optimizer made.
    """
    problem = rounding_problem(trainer)
    if problem is not None and trainer.accelerator.is_main_process:
        logger.warning("%s", problem)


def rounding_problem(trainer: GRPOTrainer) -> str | None:
    """Why updates would be rounded away, with the remedy, or `None`.

    Args:
        trainer (`GRPOTrainer`): As in [`warn_of_rounding`].
    """
    if (dtype := casts_weights(trainer)) is not None:
        return (
            f"use_transformers_continuous_batching permanently casts the trained weights to {_name(dtype)} at the "
            f"first generation: {_lost(dtype, trainer.args.learning_rate)} Generate without it, or with vLLM."
        )
    weights = sixteen_bit_weights(trainer)
    if not weights:
        return None
    first, dtype = next(iter(weights.items()))
    return (
        f"{len(weights)} trainable parameters ({first}, ...) are {_name(dtype)}, and the optimizer keeps no float32 "
        f"copy of them: {_lost(dtype, trainer.args.learning_rate)} {_REMEDY}"
    )


def _lost(dtype: torch.dtype, learning_rate: float) -> str:
    spacing = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(_TYPICAL_WEIGHT))
    return (
        f"an update smaller than half the distance between neighbouring numbers is lost. Near {_TYPICAL_WEIGHT} "
        f"that distance is {spacing:.1e}, and an Adam step is about learning_rate={learning_rate:g}."
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
