"""What would fail after minutes of waiting, found in seconds: no hub, no GPU, a lock that nobody
holds, prompts that do not fit into the model's context.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import HFValidationError
from trl.rewards import accuracy_reward as math_reward

from trl_learnalign import bridge
from trl_learnalign.data.answers import (
    MAX_UNJUDGED,
    Solution,
    accuracy_reward,
    alternatives,
)
from trl_learnalign.data.prompts import columns_of, has_transform, named_rows, prompts_of
from trl_learnalign.data.references import misjudged

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import GRPOTrainer

logger = logging.getLogger(__name__)

_TIMEOUT = 10.0  # seconds for one look at the hub
# Seconds; DeepSpeed's extensions take one to four minutes on two busy cores.
_LONGEST_BUILD = 15 * 60.0
# A chat template wraps a prompt in at most about so many tokens; only prompts nearer to the limit are tokenized.
_TEMPLATE_TOKENS = 1024
_BATCH = 1000
_SKEW = 60.0  # seconds by which another rank of this run may be ahead and building already


def missing_from_hub(name: str, kind: str) -> str | None:
    """Why a hub repository cannot be had, or `None` if it can (or is a local path).

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
        return f"{kind} {name!r} is neither a path that exists nor a hub id"
    except (OfflineModeIsEnabled, LocalEntryNotFoundError):
        return f"{kind} {name!r} is not in the local cache, and offline mode is on"
    except HfHubHTTPError as error:
        answer = error if error.response is None else error.response.status_code
        return f"{kind} {name!r}: the hub answers {answer}"
    except Exception as error:
        # Each version of the client wraps connection failures in other classes; whatever they are called, the hub
        # was not reached, unless a cached dataset makes that unimportant.
        if kind == "dataset" and _is_in_cache(name):
            return None
        return f"{kind} {name!r}: the hub cannot be reached ({error})"
    return None


def _is_in_cache(name: str) -> bool:
    from datasets.config import HF_DATASETS_CACHE

    return os.path.isdir(os.path.join(HF_DATASETS_CACHE, name.replace("/", "___")))


def missing_gpu(use_cpu: bool) -> str | None:
    """Why a run meant for a GPU cannot start, or `None` if one is there or the CPU was asked for."""
    if use_cpu:
        return None
    backends = (torch.cuda, torch.backends.mps, torch.xpu)
    if any(backend.is_available() for backend in backends):
        return None
    return "no GPU is visible"


def check_extension_locks() -> None:
    """Refuse a lock that a killed build of a torch extension left behind.

    DeepSpeed compiles its extensions at the first launch of an environment. A process killed meanwhile leaves the file
    `lock`, and every later launch waits for it without a word, forever. A lock too young to tell is warned of.

    Raises:
        `RuntimeError`: If a lock is older than any build takes.
    """
    for lock in _extension_locks():
        try:
            age = time.time() - lock.stat().st_mtime
        except OSError:
            continue  # released meanwhile
        if age > _LONGEST_BUILD:
            raise RuntimeError(
                f"{lock} is {age / 60:.0f} minutes old: a build of this extension was killed, and DeepSpeed would "
                "wait for it forever. Remove the file, unless another job is building right now."
            )
        if age > _SKEW:
            warnings.warn(
                f"{lock} is {age:.0f} seconds old: DeepSpeed waits until another job has built this extension. If "
                "none is building (a killed launch leaves the lock behind), stop this run, remove the file and start "
                "again.",
                stacklevel=2,
            )


def _extension_locks() -> list[Path]:
    """Locks where torch builds extensions for this interpreter, one folder per extension."""
    folder = os.environ.get("TORCH_EXTENSIONS_DIR")
    if folder is not None:
        return sorted(Path(folder).glob("*/lock"))
    from torch.utils.cpp_extension import get_default_build_root

    python = f"py{sys.version_info.major}{sys.version_info.minor}{sys.abiflags}"
    return sorted(Path(get_default_build_root()).glob(f"{python}_*/*/lock"))


def check_routes(trainer: GRPOTrainer) -> None:
    """Refuse modules that only some tokens reach (routed experts, each a module of its own) under ZeRO and FSDP2.

    Both exchange parameters or gradients in the order in which a process used them. Processes whose tokens go
    different ways wait for each other forever, or end without a word, in training as in scoring. Fused experts (one
    parameter) and leaf modules of ZeRO-3 are used by all.

    Args:
        trainer (`GRPOTrainer`): The trainer, prepared for training; all ranks call it together.

    Raises:
        `ValueError`: On all ranks, naming the modules and the remedy.
    """
    stage = bridge.zero_stage(trainer)
    if trainer.accelerator.num_processes == 1 or not (stage or bridge.is_fsdp2(trainer)):
        return
    names = bridge.unevenly_called(trainer)
    if not names:
        return
    strategy, remedy = "FSDP2", "a model whose experts are fused into one parameter"
    if stage:
        strategy = "ZeRO"
        holder = type(bridge.list_holder(trainer, names[0])).__name__
        remedy = (
            f"make {holder} a leaf module of ZeRO-3, whose parameters go together (deepspeed_moe_layer_cls_names: "
            f"{holder} in accelerate's configuration, or deepspeed.utils.set_z3_leaf_modules before the trainer is "
            "made)"
        )
    raise ValueError(
        f"Which modules run depends on the tokens ({', '.join(names[:2])}, …). {strategy} exchanges parameters or "
        "gradients in the order in which a process used them, so processes whose rollouts go different ways would "
        f"wait for each other forever, in training as in scoring. Use DDP, or {remedy}."
    )


def check_references(trainer: GRPOTrainer) -> None:
    r"""Look whether the trainer's reward reads the reference answers, where that is TRL's `accuracy_reward` or ours.

    Of a bare `3\sqrt{13}` math-verify reads the 3, of `\sqrt{51}` nothing: right rollouts would count as wrong, or not
    at all. Other rewards may read their columns as they like, and are not looked at.

    Args:
        trainer (`GRPOTrainer`): With reward functions and training dataset.

    Raises:
        `ValueError`: If more than half of the references are not graded right with themselves as the answer.
    """
    if not any(function in (accuracy_reward, math_reward) for function in trainer.reward_funcs):
        return
    if "solution" not in columns_of(trainer.train_dataset):
        return  # TRL says so itself
    reward = accuracy_reward if accuracy_reward in trainer.reward_funcs else math_reward
    solutions = _solutions(trainer.train_dataset, lists=reward is accuracy_reward)
    wrong = misjudged(solutions, reward=reward)
    if not wrong:
        return
    count = sum(bool(alternatives(solution)) for solution in solutions)
    problem = (
        f"accuracy_reward does not grade {len(wrong)} of {count} reference answers as right when they are the answer "
        f"themselves: it reads LaTeX only where it is marked. The first is row {wrong[0]}: "
        f"{alternatives(solutions[wrong[0]])[0][:80]!r}. Mark them: from trl_learnalign.data.answers import "
        "final_answer, reference_answer; "
        "dataset = dataset.map(lambda row: {'solution': reference_answer(final_answer(row['solution']))})."
    )
    # Whoever takes ours through `as_prompts` has said there what share may be lost.
    if reward is math_reward and len(wrong) > MAX_UNJUDGED * count:
        raise ValueError(
            f"{problem} To go on all the same, give the trainer a function of your own that calls it."
        )
    if trainer.accelerator.is_main_process:
        logger.warning(
            "%s Until then no rollout of these prompts is right, or other answers are.", problem
        )


def _solutions(dataset: Dataset, lists: bool) -> list[Solution]:
    """The column `solution` as training reads it; empty where there is none. TRL's reward reads no lists."""
    rows = dataset if has_transform(dataset) else dataset.with_format(None)
    solutions = [solution or "" for solution in rows[:]["solution"]]
    if not all(_is_text(solution, lists) for solution in solutions):
        raise ValueError(
            "The column 'solution' holds other things than text, which accuracy_reward cannot read: make it the final "
            "answer as text, e.g. dataset.map(lambda row: {'solution': str(row['solution'])}). The accuracy_reward of "
            "trl_learnalign.data.answers also reads lists of texts, of which any is right."
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
    # A token stands for at least one byte: only prompts of more bytes can have too many tokens.
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
        tokens = bridge.prompt_token_lists(trainer, [prompts[row] for row in batch])
        for row, ids in zip(batch, tokens, strict=True):
            lengths[row] = len(ids)
    long = [row for row, length in lengths.items() if length > limit]
    if long:
        raise ValueError(
            f"{len(long)} of {len(trainer.train_dataset)} prompts have more than {limit} tokens: {named_rows(long)} "
            f"(row {long[0]} has {lengths[long[0]]}). With max_completion_length={trainer.args.max_completion_length} "
            f"they do not fit into the model's context of {context} tokens. Leave them out of the dataset, or lower "
            "max_completion_length."
        )


def _context_length(trainer: GRPOTrainer) -> int | None:
    config = trainer.model.config.get_text_config()
    of_model = getattr(config, "max_position_embeddings", None)
    of_engine = trainer.args.vllm_max_model_length if trainer.args.use_vllm else None
    # XLNet says -1: it knows no limit.
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
