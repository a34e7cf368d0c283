"""The only module that touches private names of TRL and transformers.

What it borrows from a `GRPOTrainer` it gives back: every context manager here restores what it changed, also after an
exception. `check_trainer` proves at attach time that each private name exists, so that an unsupported version is an
error with a remedy instead of a wrong result.
"""

from __future__ import annotations

import math
import os
import random
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import trl
from accelerate.utils import DistributedType, set_seed
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import Sampler
from transformers import AutoModelForCausalLM
from transformers.integrations import deepspeed as hf_deepspeed
from trl.trainer import utils as trl_utils

from trl_learnalign import hashing
from trl_learnalign.gradients.capture import GradientCapture, TokenBatch, full_numel
from trl_learnalign.gradients.head import LogitTransform
from trl_learnalign.gradients.sketch import Projection

if TYPE_CHECKING:
    from trl import GRPOTrainer

SUPPORTED_TRL = SpecifierSet(">=1.16,<1.17")

_SIXTEEN_BITS = (torch.bfloat16, torch.float16)
_ROUTE_PROBES = 8  # passes that look for routed experts, where a first one leaves modules out
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_TRAINER_NAMES = (
    "_get_train_sampler",
    "_remove_unused_columns",
    "_tokenize_prompts",
    "_generate_and_score_completions",
    "_calculate_rewards",
    "_compute_loss",
    "_get_per_token_logps_and_entropies",
    "_metrics",
    "_logs",
    "_pending_metrics",
    "_pending_extra_logs",
    "_step",
    "_buffered_inputs",
    "_entropy_bonus_enabled",
    "_entropy_window_stats",
    "_last_world_entropy",
    "_current_train_step_time",
    "_tokenizer",
    "entropy_coef",
    "environments",
    "environment_factories",
    "reward_func_names",
    "aux_loss_enabled",
)
# Only there when something is switched on: attribute → when.
_SOMETIMES: dict[str, Callable[[GRPOTrainer], bool]] = {
    "_environment_pool": lambda trainer: trainer.environment_factories is not None,
    "_last_loaded_step": lambda trainer: trainer.use_vllm,
}
# TRL makes them for a batch of rollouts: nothing can be checked before.
_LATER_NAMES = ("_batch_environments",)
_UTILS_NAMES = ("_ChunkedLogProbFunction", "add_fused_lm_head", "maybe_gather_lm_head_ctx")

# What TRL collects for its next log.
_COLLECTED = ("_metrics", "_logs", "_pending_metrics", "_pending_extra_logs")

# Counters and controller state that generation or the loss move on.
_COUNTERS = (
    "_step",
    "_buffered_inputs",
    "_current_train_step_time",
    "_entropy_window_stats",
    "_last_world_entropy",
    "entropy_coef",
    "environments",
)


def check_trainer(trainer: GRPOTrainer) -> None:
    """Check that this is a `GRPOTrainer`, and that this TRL has what the bridge needs.

    Raises:
        `TypeError`: If it is something else, naming it.
        `RuntimeError`: Naming the installed and the supported versions, and what is missing.
    """
    if not isinstance(trainer, trl.GRPOTrainer):
        raise TypeError(
            f"The first argument is a {type(trainer).__name__}: give a GRPOTrainer, and the settings after it, as in "
            "LearnAlignCallback(trainer, config). Prompts are scored by the rollouts and gradients of GRPO, which "
            "other trainers do not have."
        )
    missing = [name for name in _TRAINER_NAMES if not hasattr(trainer, name)]
    if not missing:
        missing = [name for name, used in _SOMETIMES.items() if used(trainer) and not hasattr(trainer, name)]
    missing += [f"trl.trainer.utils.{name}" for name in _UTILS_NAMES if not hasattr(trl_utils, name)]
    supported = SUPPORTED_TRL.contains(Version(trl.__version__), prereleases=True)
    if missing or not supported:
        raise RuntimeError(
            f"trl {trl.__version__} is installed, and trl_learnalign supports trl{SUPPORTED_TRL}"
            + (f"; this trainer lacks {', '.join(missing)}" if missing else "")
            + f". Install a supported version: pip install 'trl{SUPPORTED_TRL}'."
        )


def check_launch(trainer: GRPOTrainer) -> None:
    """Check that the processes that were launched really work together.

    Raises:
        `RuntimeError`: If each would silently train a model of its own, or partitioning was silently left out.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    found = trainer.accelerator.num_processes
    if launched != found:
        raise RuntimeError(
            f"The launcher started {launched} processes, but this one sees {found}: each would train a model of its "
            "own. On CPUs set use_cpu=True in the GRPOConfig; on GPUs check that every process sees one."
        )
    kind = trainer.accelerator.distributed_type
    if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true" and kind != DistributedType.FSDP:
        raise RuntimeError(
            f"FSDP was asked for, but accelerate runs {kind.value}: it does not partition on CPUs. Use GPUs, or "
            "another accelerate config."
        )
    if is_fsdp1(trainer):
        raise RuntimeError(
            "FSDP version 1 flattens parameters of several layers into one, so their gradients cannot be told apart: "
            "set fsdp_version: 2 in the accelerate config (accelerate_configs/fsdp2.yaml)."
        )


def is_fsdp1(trainer: GRPOTrainer) -> bool:
    """Whether the model is wrapped by FSDP's first version."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    return trainer.is_fsdp_enabled and getattr(plugin, "fsdp_version", 1) == 1


def install_sampler(trainer: GRPOTrainer, sampler: Sampler[int]) -> None:
    """Make the trainer's dataloader draw from `sampler`; the override sits on the instance, not on the class."""
    trainer._get_train_sampler = lambda dataset=None: sampler  # type: ignore[method-assign]


def begin_counting(trainer: GRPOTrainer) -> None:
    """Make the trainer count micro-steps from the run's start, with nothing left of an interrupted `train()`.

    A fresh trainer counts from 0, also after a resume, so a generation that feeds several optimizer steps would
    straddle its successor's place for good, and completions of one pool would be trained on in the next phase. One
    that has trained before goes on counting, and holds completions and metrics of the step it was interrupted in.
    """
    trainer._step = trainer.state.global_step * trainer.args.gradient_accumulation_steps
    trainer._buffered_inputs = None
    trainer._current_train_step_time = 0.0
    trainer._entropy_window_stats = None
    for name in _COLLECTED:
        setattr(trainer, name, _emptied(getattr(trainer, name)))
    weights_changed(trainer)


def is_mid_generation(trainer: GRPOTrainer) -> bool:
    """Whether the next micro-step goes on with a generation rather than beginning one."""
    return trainer._step % (trainer.args.steps_per_generation * trainer.num_iterations) != 0


def buffered_generation(trainer: GRPOTrainer) -> list[dict[str, Any]] | None:
    """The generation that is still being trained on, or `None` if the next micro-step begins a new one."""
    return trainer._buffered_inputs if is_mid_generation(trainer) else None


def restore_generation(trainer: GRPOTrainer, batches: list[dict[str, Any]]) -> None:
    """Put back what [`buffered_generation`] gave, on this process's device."""
    device = trainer.accelerator.device
    trainer._buffered_inputs = [
        {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
        for batch in batches
    ]


@contextmanager
def left_as_found(trainer: GRPOTrainer) -> Iterator[None]:
    """Borrow the trainer: metrics, logs, counters, environments, modes and random states are given back as they were.

    What only its author can give back moves on: the state of reward functions, of tools, of a `rollout_func` and of
    environments outside their own instances, and the random numbers of a vLLM engine. Meanwhile no table of
    completions is written: `log` would overwrite the one of this step with what is borrowed.
    """
    swapped = {name: getattr(trainer, name) for name in _COLLECTED}
    counters = {name: getattr(trainer, name) for name in _COUNTERS}
    tokens_seen = trainer.state.num_input_tokens_seen
    modes = [(module, module.training) for module in trainer.model.modules()]
    random_states = _random_states()
    counters["log_completions"] = trainer.log_completions
    for name, value in swapped.items():
        setattr(trainer, name, _emptied(value))
    trainer.log_completions = False
    if trainer.environment_factories is not None:
        # Environments outlive a rollout. TRL makes more when a pool has too few: training's own are not touched.
        swapped["_environment_pool"] = trainer._environment_pool
        trainer._environment_pool = {name: [] for name in trainer.environment_factories}
    try:
        yield
    finally:
        for name, value in {**swapped, **counters}.items():
            setattr(trainer, name, value)
        trainer.state.num_input_tokens_seen = tokens_seen
        _reshard(trainer)
        for module, training in modes:
            module.training = training
        _restore_random_states(random_states)


def _emptied(value: Any) -> Any:
    """An empty container of the same make."""
    if isinstance(value, defaultdict):
        return defaultdict(value.default_factory)
    if isinstance(value, deque):
        return deque(maxlen=value.maxlen)
    return {key: _emptied(entry) for key, entry in value.items()}


def _random_states() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _restore_random_states(states: tuple[Any, ...]) -> None:
    python, numpy, cpu, cuda = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)


def training_rows(trainer: GRPOTrainer, dataset: Any, rows: Sequence[int]) -> list[dict[str, Any]]:
    """Rows of a dataset as the trainer's dataloader hands them to generation and rewards.

    That is with the dataset's format or transform, and without the columns that `remove_unused_columns` takes away.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        dataset (`datasets.Dataset`): The training dataset, or one with its columns.
        rows (sequence of `int`): Which ones; a row may come several times.
    """
    # What the dataloader's fetcher calls: under the format "pandas" a single row is no dictionary, a list of rows is.
    return trainer._remove_unused_columns(dataset).__getitems__(list(rows))


def roll_out(trainer: GRPOTrainer, rows: Sequence[dict[str, Any]], seed: int) -> tuple[dict[str, Any], torch.Tensor]:
    """Rollouts of `rows` with the trainer's own generation, rewards and advantages. Call inside [`left_as_found`].

    All processes must call it together with equally many rows: TRL gathers the rewards.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        rows (sequence of `dict`): Dataset rows of this process, each prompt `G` times in a row.
        seed (`int`): Seeds Python, NumPy and torch, so that the rollouts depend on nothing that happened before.

    Returns:
        `tuple[dict, torch.Tensor]`: TRL's inputs of the loss, and the rewards per function, `(len(rows), F)`, NaN
        where a function returned `None`.
    """
    rewards: list[torch.Tensor] = []
    calculate, scale_rewards = trainer._calculate_rewards, trainer.scale_rewards

    def keep_rewards(*args: Any, **kwargs: Any) -> torch.Tensor:
        try:
            rewards.append(calculate(*args, **kwargs))
        except Exception as error:
            raise RuntimeError(
                f"A reward function failed on rollouts of the scoring pass ({type(error).__name__}: {error}). It gets "
                "prompts, completions and the other columns as keywords and returns a list with one number, or None "
                "where it cannot judge, for each completion. Mend it and run the same command again: finished shards "
                "stay."
            ) from error
        return rewards[-1]

    trainer.model.train()  # TRL reads the number of rollouts off the mode
    set_seed(seed)
    try:
        trainer._calculate_rewards = keep_rewards  # type: ignore[method-assign]
        # Scaling by the batch's deviation would tie a prompt's advantages to its neighbours. Left out, it is the same
        # gradient up to a positive factor: `check_objective` has refused terms that it would not scale.
        if scale_rewards == "batch":
            trainer.scale_rewards = "none"
        # A copy: TRL writes extra fields of a rollout function into the rows.
        inputs = trainer._generate_and_score_completions([dict(row) for row in rows])
    finally:
        del trainer._calculate_rewards
        trainer.scale_rewards = scale_rewards
    first = trainer.accelerator.process_index * len(rows)
    own = rewards[-1][first : first + len(rows)]
    if trainer.multi_objective_aggregation == "normalize_then_sum":
        inputs["advantages"] = _sums_of_normalized(trainer, own).to(inputs["advantages"])
    return inputs, own


def _sums_of_normalized(trainer: GRPOTrainer, rewards: torch.Tensor) -> torch.Tensor:
    """TRL's advantages of `normalize_then_sum` `(R,)` before it scales them by their deviation over the batch.

    Within a prompt each reward `(R, F)` is normalised, and the weighted sum has mean 0 already. The last scaling is a
    positive factor that all prompts of a call share, and would tie them to their neighbours.
    """
    grouped = rewards.view(-1, trainer.num_generations, rewards.shape[1])
    deviation = trl_utils.nanstd(grouped, dim=1, keepdim=True)
    normalized = (grouped - grouped.nanmean(dim=1, keepdim=True)) / (deviation + 1e-4)
    return (normalized * trainer.reward_weights.to(rewards.device)).nansum(dim=2).flatten()


class _LocalAccelerator:
    """An accelerator that talks to nobody: the loss of one prompt is this process's own business."""

    num_processes = 1
    process_index = 0

    def __init__(self, accelerator: Any):
        self._accelerator = accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(1) if tensor.ndim == 0 else tensor

    gather_for_metrics = gather

    def reduce(self, tensor: torch.Tensor, reduction: str = "sum") -> torch.Tensor:
        return tensor

    def pad_across_processes(self, tensor: torch.Tensor, **_: Any) -> torch.Tensor:
        return tensor


def objective_gradients(
    trainer: GRPOTrainer, inputs: Mapping[str, Any], logps: torch.Tensor, entropies: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradient of the trainer's objective of one prompt (minus its loss) with respect to the log-probabilities.

    The loss is TRL's own `_compute_loss`, with every loss type, KL term and importance ratio, in evaluation mode:
    one prompt is the whole batch, nothing is accumulated. MoE load balancing is no part of the objective.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        inputs (mapping): TRL's inputs of the loss for the prompt's `G` rollouts.
        logps (`torch.Tensor`): `(G, C)`.
        entropies (`torch.Tensor`): `(G, C)`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor | None]`: `(G, C)` each; the second is `None` without an entropy term.
    """
    leaves = [logps.detach().clone().requires_grad_(), entropies.detach().clone().requires_grad_()]
    try:
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (*leaves, None)  # type: ignore[method-assign]
        with _loss_of_one_prompt(trainer), torch.enable_grad():
            objective = -trainer._compute_loss(trainer.model, dict(inputs))
            grads = torch.autograd.grad(objective, leaves, allow_unused=True)
    finally:
        del trainer._get_per_token_logps_and_entropies
    return (torch.zeros_like(logps) if grads[0] is None else grads[0]), grads[1]


@contextmanager
def _loss_of_one_prompt(trainer: GRPOTrainer) -> Iterator[None]:
    """`_compute_loss` takes a prompt of this process for the whole batch, without the load balancing of experts."""
    accelerator, aux_loss_enabled = trainer.accelerator, trainer.aux_loss_enabled
    try:
        trainer.accelerator = _LocalAccelerator(accelerator)
        trainer.aux_loss_enabled = False
        yield
    finally:
        trainer.accelerator = accelerator
        trainer.aux_loss_enabled = aux_loss_enabled


def loss_gradient(
    trainer: GRPOTrainer, rows: Mapping[str, torch.Tensor], take: Callable[[str, torch.Tensor], None]
) -> None:
    """Gradient of the trainer's own loss of one prompt by autograd, in evaluation mode; nothing is accumulated.

    The prompt is the batch, as in [`objective_gradients`]; everything else is TRL's: the rows as it gave them, its
    `_compute_loss`, its forward pass.

    Args:
        trainer (`GRPOTrainer`): The trainer, borrowed with [`left_as_found`]. Parameters may be partitioned by ZeRO-3
            (a collective), not by FSDP2.
        rows (mapping): TRL's inputs of the loss for the prompt's rollouts, see `RolloutGroup.raw`.
        take (callable): Called once as `take(name, gradient)` for each trainable parameter with a gradient. It is let
            go of afterwards: no more than one layer's gradient is held at a time.
    """
    trainer.model.eval()
    parameters = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}

    def handed_over(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def hook(gradient: torch.Tensor) -> torch.Tensor:
            take(name, gradient.detach().float() / scale if scale != 1.0 else gradient.detach())
            return gradient.new_zeros(()).expand_as(gradient)  # takes no memory

        return hook

    device = trainer.accelerator.device
    inputs = {name: value.to(device) for name, value in rows.items()}
    mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
    inputs["num_items_in_batch"] = mask.sum()
    # Losses are means over tokens; in float16 the share of one token would underflow.
    scale = 2.0 ** round(math.log2(mask.numel())) if computes_in_float16(trainer) else 1.0
    if not computes_in_float32(trainer) or _has_dropout(trainer):
        # Here the ratio to the policy that sampled, 1 by construction, is 1 up to noise only.
        inputs.pop("old_per_token_logps", None)
    hooks = [p.register_hook(handed_over(name)) for name, p in parameters.items()]
    try:
        with _loss_of_one_prompt(trainer), torch.enable_grad():
            loss = trainer._compute_loss(trainer.model, inputs)
            torch.autograd.grad(loss * scale, list(parameters.values()), allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()


def computes_in_float32(trainer: GRPOTrainer) -> bool:
    """Whether weights and arithmetic have the precision of float32 (TF32 has not)."""
    tf32 = torch.backends.cuda.matmul.allow_tf32 or torch.get_float32_matmul_precision() != "highest"
    if trainer.accelerator.mixed_precision not in (None, "no") or (tf32 and torch.cuda.is_available()):
        return False
    return all(p.dtype in (torch.float32, torch.float64) for p in trainer.model.parameters())


def computes_in_float16(trainer: GRPOTrainer) -> bool:
    """Whether gradients may overflow and underflow."""
    weights = any(p.dtype == torch.float16 for p in trainer.model.parameters())
    return trainer.accelerator.mixed_precision == "fp16" or weights


def _has_dropout(trainer: GRPOTrainer) -> bool:
    settings = trainer.model.config.to_dict().items()
    functional = any("drop" in name and isinstance(value, float) and value > 0 for name, value in settings)
    return functional or any(isinstance(m, nn.Dropout) and m.p > 0 for m in trainer.model.modules())


def is_fsdp2(trainer: GRPOTrainer) -> bool:
    """Whether parameters are partitioned by FSDP's second version."""
    return any(isinstance(p, DTensor) for p in trainer.model.parameters())


def token_log_probs(trainer: GRPOTrainer, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """The trainer's log-probabilities and entropies of the completion tokens, `(B, C)` each."""
    logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model, batch.input_ids, batch.attention_mask, batch.completion_length, compute_entropy=True
    )
    return logps, entropies


@torch.no_grad()
def unevenly_called(trainer: GRPOTrainer) -> list[str]:
    """Names of modules with parameters of their own that some tokens reach and others do not; in the model's order.

    Found by short forward passes over one repeated token each, the same on all ranks: equal tokens go to the same few
    experts. Modules within a leaf module of ZeRO-3 do not count.

    Args:
        trainer (`GRPOTrainer`): The trainer, prepared for training; all ranks call it together.
    """
    found = dict(_modules_with_parameters(trainer.model))
    head = causal_lm(trainer).get_output_embeddings()  # fused: not called, its weight is used all the same
    ids = tokenizer(trainer)("0 1 2 3 4 5 6 7 8 9 ? a", add_special_tokens=False)["input_ids"]
    first: set[str] | None = None
    with left_as_found(trainer):
        trainer.model.eval()
        for token in list(dict.fromkeys(ids))[:_ROUTE_PROBES]:
            called = _called(trainer, found, token)
            if first is not None and called != first:
                return [name for name in found if name in called ^ first]
            first = called
            if all(name in called or module is head for name, module in found.items()):
                return []
    return []


def _modules_with_parameters(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    if getattr(module, "_z3_leaf", False):
        return
    if any(True for _ in module.parameters(recurse=False)):
        yield prefix.removesuffix("."), module
    for name, child in module.named_children():
        yield from _modules_with_parameters(child, f"{prefix}{name}.")


def _called(trainer: GRPOTrainer, modules: Mapping[str, nn.Module], token: int) -> set[str]:
    """Names of those modules that a pass over four times the same token calls."""
    called: set[str] = set()
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.add(name)) for name, module in modules.items()
    ]
    ids = torch.full((1, 4), token, device=trainer.accelerator.device)
    try:
        token_log_probs(trainer, TokenBatch(ids, torch.ones_like(ids), 2, 1))
    finally:
        for handle in handles:
            handle.remove()
        partition_again(trainer)
    return called


def list_holder(trainer: GRPOTrainer, name: str) -> nn.Module:
    """The module that holds the innermost list or dictionary of modules with the named one; itself without any."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if isinstance(trainer.model.get_submodule(".".join(parts[:end])), (nn.ModuleList, nn.ModuleDict)):
            return trainer.model.get_submodule(".".join(parts[: end - 1]))
    return trainer.model.get_submodule(name)


def causal_lm(trainer: GRPOTrainer) -> Any:
    """The model with an LM head, under PEFT's wrapper if there is one."""
    return _without_peft(trainer.model)


def _without_peft(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def has_virtual_tokens(trainer: GRPOTrainer) -> bool:
    """Whether PEFT puts trained tokens or keys and values before each row (prompt, p- and prefix tuning)."""
    return bool(getattr(getattr(trainer.model, "active_peft_config", None), "is_prompt_learning", False))


def computes_in_16_bits(trainer: GRPOTrainer) -> bool:
    """Whether weights are 16 bits wide, or layers compute so under autocast."""
    weights = any(p.dtype in (torch.bfloat16, torch.float16) for p in trainer.model.parameters())
    return trainer.args.bf16 or trainer.args.fp16 or weights


@contextmanager
def gradient_capture(trainer: GRPOTrainer, projection: Projection) -> Iterator[GradientCapture]:
    """A [`GradientCapture`] of the trainer's policy, with TRL's fused LM head routed through it."""
    _reshard(trainer)
    head = causal_lm(trainer).get_output_embeddings()
    weight, bias = head.weight, getattr(head, "bias", None)
    capture = GradientCapture(
        trainer.model,
        projection,
        lambda batch: token_log_probs(trainer, batch),
        head_weight=weight,
        head_bias=bias,
        materialised=lambda: trl_utils.maybe_gather_lm_head_ctx(weight, bias),
        sharded=is_sharded(trainer),
    )
    with capture, _fused_head(capture), _nothing_reduced(trainer):
        yield capture


@contextmanager
def _nothing_reduced(trainer: GRPOTrainer) -> Iterator[None]:
    """Without the hooks of ZeRO-3's leaf modules: in any backward pass they add to what is reduced next."""
    engine_optimizer = getattr(trainer.model_wrapped, "optimizer", None)
    taken = []
    for handle in getattr(engine_optimizer, "_leaf_module_hooks", ()):
        hooks = handle.hooks_dict_ref()
        taken.append((hooks, handle.id, hooks.pop(handle.id)))
    try:
        yield
    finally:
        for hooks, key, hook in taken:
            hooks[key] = hook


@contextmanager
def _fused_head(capture: GradientCapture) -> Iterator[None]:
    original = trl_utils._ChunkedLogProbFunction

    class CapturingHead:
        """Takes the place of `ChunkedLogProbFunction`; passes on what is not being captured."""

        @staticmethod
        def apply(
            hidden: torch.Tensor,
            weight: torch.Tensor,
            bias: torch.Tensor | None,
            targets: torch.Tensor,
            temperature: float,
            chunk_size: int,
            softcap: float | None = None,
            scale: float = 1.0,
            outputs: tuple[str, ...] = ("entropy",),
        ) -> tuple[torch.Tensor | None, ...]:
            if not capture.is_recording:
                return original.apply(hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, outputs)
            transform = LogitTransform(scale, softcap, temperature)
            return (*capture.head_log_probs(hidden, weight, bias, targets, transform), None, None, None)

    trl_utils._ChunkedLogProbFunction = CapturingHead
    try:
        yield
    finally:
        trl_utils._ChunkedLogProbFunction = original


@contextmanager
def reading_model(trainer: GRPOTrainer, name: str | None = None) -> Iterator[nn.Module]:
    """A model that reads texts without gradients, in evaluation mode. Call inside [`left_as_found`].

    Args:
        trainer (`GRPOTrainer`): The trainer.
        name (`str`, *optional*): Hub id or path of a frozen model, loaded whole on every process and let go of at the
            end. Default: the policy, on whatever its parameters are spread over.
    """
    with torch.no_grad(), _untempered_head():
        if name is None:
            trainer.model.eval()
            with trainer.accelerator.autocast():
                yield trainer.model
        else:
            with _nothing_partitioned():
                model = AutoModelForCausalLM.from_pretrained(name)
                trl_utils.add_fused_lm_head(model)
                yield model.eval().requires_grad_(False).to(trainer.accelerator.device)


@contextmanager
def _nothing_partitioned() -> Iterator[None]:
    """Models are loaded and read whole: ZeRO-3 and FSDP would have them partitioned, or empty on all ranks but one."""
    efficient = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    zero, fsdp = hf_deepspeed._hf_deepspeed_config_weak_ref, os.environ.pop(efficient, None)
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = zero
        if fsdp is not None:
            os.environ[efficient] = fsdp


@contextmanager
def _untempered_head() -> Iterator[None]:
    """TRL's fused head at temperature 1: it divides by the trainer's sampling temperature."""
    original = trl_utils._ChunkedLogProbFunction

    class UntemperedHead:
        """Takes the place of `ChunkedLogProbFunction`."""

        @staticmethod
        def apply(
            hidden: torch.Tensor,
            weight: torch.Tensor,
            bias: torch.Tensor | None,
            targets: torch.Tensor,
            temperature: float,
            *rest: Any,
        ) -> tuple[torch.Tensor | None, ...]:
            return original.apply(hidden, weight, bias, targets, 1.0, *rest)

    trl_utils._ChunkedLogProbFunction = UntemperedHead
    try:
        yield
    finally:
        trl_utils._ChunkedLogProbFunction = original


def label_log_probs(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Natural-log probabilities of the labels with a [`reading_model`]'s fused head.

    Args:
        model (`torch.nn.Module`): The model.
        input_ids (`torch.Tensor`): `(R, L)`, padded on the right.
        attention_mask (`torch.Tensor`): `(R, L)`.
        labels (`torch.Tensor`): `(R, L)`, -100 where nothing is asked.

    Returns:
        `torch.Tensor`: `(R, L - 1)`: entry `t` is of `labels[:, t + 1]`, 0 where nothing is asked.
    """
    return model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True).log_probs


def last_hidden_states(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Last hidden layer, after the final norm: `(R, L, H)`. No logits are computed but those of one position."""
    kept: list[torch.Tensor] = []

    def shorten(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        kept.append(inputs[0])
        return (inputs[0][:, :1],)

    # What the head reads is what every family agrees on: backbones are nested and called in different ways.
    handle = _without_peft(model).get_output_embeddings().register_forward_pre_hook(shorten)
    try:
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        handle.remove()
    # Prompt tuning puts virtual tokens before each row.
    return kept[0][:, -input_ids.shape[1] :]


def next_token_logits(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Logits after the last token of each row (padded on the right): `(R, V)`."""
    last = attention_mask.sum(dim=1) - 1
    rows = torch.arange(len(last), device=last.device)
    head = _without_peft(model).get_output_embeddings()
    # Rows end at different places; the head sees these places alone, instead of all of them.
    handle = head.register_forward_pre_hook(lambda module, inputs: (inputs[0][rows, last].unsqueeze(1),))
    try:
        return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, 0]
    finally:
        handle.remove()


def trainable_sizes(trainer: GRPOTrainer) -> dict[str, int]:
    """Entries of each trainable parameter, in canonical order and under its canonical name."""
    _reshard(trainer)
    return {name: full_numel(p) for name, p in trainer.model.named_parameters() if p.requires_grad}


def sixteen_bit_weights(trainer: GRPOTrainer) -> dict[str, torch.dtype]:
    """Trainable parameters that the optimizer updates in 16 bits, with no float32 copy anywhere.

    What decides is what the optimizer holds: under DeepSpeed its own float32 partitions; under accelerate's FSDP2
    parameters that were cast to float32; on one GPU and under DDP the model's parameters as they are.

    Args:
        trainer (`GRPOTrainer`): The trainer, prepared for training.
    """
    optimizer: Any = trainer.optimizer
    groups = optimizer.param_groups
    while hasattr(optimizer, "optimizer"):  # accelerate and DeepSpeed wrap torch's
        optimizer = optimizer.optimizer
    if getattr(optimizer, "master_weights", False):  # the fused optimizers of Apex and Transformer Engine
        return {}
    # Kahan summation keeps what rounding loses.
    compensated = ("kahan_sum", "use_kahan_summation")
    rounded = [group for group in groups if not any(group.get(name) for name in compensated)]
    updated = {id(parameter) for group in rounded for parameter in group["params"]}
    return {
        name: parameter.dtype
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad and parameter.dtype in _SIXTEEN_BITS and id(parameter) in updated
    }


def casts_weights(trainer: GRPOTrainer) -> torch.dtype | None:
    """What TRL casts the trained weights themselves to when it generates, or `None` if it leaves them alone."""
    args = trainer.args
    if not args.use_transformers_continuous_batching or zero_stage(trainer):
        return None
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def has_regulariser(trainer: GRPOTrainer) -> bool:
    """Whether the objective has terms that do not vanish with the advantages (KL, entropy)."""
    return trainer.beta != 0.0 or trainer._entropy_bonus_enabled


def sampling_settings(trainer: GRPOTrainer) -> dict[str, Any]:
    """Settings that decide what is sampled."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_completion_length", "use_vllm")
    settings = {name: getattr(trainer, name) for name in names}
    return {**settings, "generation_kwargs": trainer.args.generation_kwargs, "chat": trainer.chat_template_kwargs}


def objective_settings(trainer: GRPOTrainer) -> dict[str, Any]:
    """Settings that decide the gradient of a rollout group."""
    names = ("loss_type", "beta", "scale_rewards", "importance_sampling_level", "epsilon_low", "epsilon_high")
    settings = {name: getattr(trainer, name) for name in names}
    weights = trainer.reward_weights.tolist()
    return {**settings, "rewards": dict(zip(trainer.reward_func_names, weights, strict=True))}


@torch.no_grad()
def weights_digest(trainer: GRPOTrainer) -> str:
    """Digest of the trainable weights, bit by bit: the same whatever they are spread over."""
    _reshard(trainer)
    total = 0
    for name, parameter in trainer.model.named_parameters():
        if not parameter.requires_grad:
            continue
        with whole(trainer, parameter) as weights:
            bits = weights.detach().contiguous().view(-1).view(_INTEGERS[weights.element_size()]).long()
        # Positions count, so that swapped entries change the sum; integer addition wraps around and has no order.
        places = torch.arange(1, bits.numel() + 1, device=bits.device)
        total ^= hashing.key(name, int((bits * (2 * places + 1)).sum()))
    return f"{total:016x}"


@torch.no_grad()
def sampled_digest(trainer: GRPOTrainer, parameters: Iterable[tuple[str, nn.Parameter]], most: int = 4096) -> str:
    """Digest of names, shapes and evenly spaced entries of parameters: the same whatever they are spread over.

    For weights that nothing trains: another model differs in nearly all entries, so some of them are enough.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        parameters (iterable): Names and parameters; all ranks call it together with the same ones.
        most (`int`, *optional*, defaults to 4096): Entries of each parameter that are looked at.
    """
    total = 0
    for name, parameter in parameters:
        with whole(trainer, parameter) as weights:
            entries = weights.detach().reshape(-1)
            sample = entries[:: max(1, -(-entries.numel() // most))].contiguous()
            bits = sample.view(_INTEGERS[sample.element_size()]).tolist()
            total ^= hashing.key(name, str(tuple(weights.shape)), str(weights.dtype), str(bits))
    return f"{total:016x}"


def entropy_controller(trainer: GRPOTrainer) -> tuple[float, float]:
    """Where an adaptive entropy coefficient stands: the coefficient, and the entropy that was measured last."""
    return float(trainer.entropy_coef), float(trainer._last_world_entropy)


def reset_entropy_controller(trainer: GRPOTrainer) -> None:
    """The entropy coefficient as it was before the first step."""
    trainer.entropy_coef = trainer.args.entropy_coef
    trainer._last_world_entropy = float("inf")
    trainer._entropy_window_stats = None


@contextmanager
def whole(trainer: GRPOTrainer, parameter: nn.Parameter, write: bool = False) -> Iterator[torch.Tensor]:
    """A parameter's data in one piece, also where it is partitioned; all ranks call it together.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        parameter (`torch.nn.Parameter`): A parameter of its model.
        write (`bool`, *optional*, defaults to `False`): Keep what is written into it; all ranks write the same.
    """
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        full = parameter.full_tensor().detach()
        yield full
        if write:
            parameter.detach().copy_(distribute_tensor(full, mesh, placements))
    elif hasattr(parameter, "ds_id"):  # ZeRO-3, also before the engine is there
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if write else None):
            yield parameter.detach()
    else:
        yield parameter.detach()


def partition_again(trainer: GRPOTrainer) -> None:
    """Let ZeRO-3 take back the weights that a cut backward pass has left whole (those of the embedding)."""
    if zero_stage(trainer) == 3:
        trainer.model_wrapped.empty_partition_cache()


def weights_changed(trainer: GRPOTrainer) -> None:
    """Make a vLLM engine fetch the weights again: it does so only when the step has moved on."""
    if trainer.use_vllm:
        trainer._last_loaded_step = -1


def new_generation(trainer: GRPOTrainer, reward: int) -> tuple[int, torch.Tensor] | None:
    """The generation that the micro-step just taken began with, or `None` if it went on with an older one.

    Args:
        trainer (`GRPOTrainer`): The trainer, at the end of a micro-step.
        reward (`int`): Number of a reward function.

    Returns:
        `tuple[int, torch.Tensor]`: Number of the micro-step, counted from 0, and that function's rewards of all ranks
        in the order of the sampler, NaN where it returned `None`. `None` too if another function has the same name:
        TRL keeps rewards by name.
    """
    micro_step, name = trainer._step - 1, trainer.reward_func_names[reward]
    if micro_step % (trainer.args.steps_per_generation * trainer.num_iterations):
        return None
    # Gathered over ranks, and no more than one generation is kept.
    rewards = torch.tensor(list(trainer._logs["rewards"][name]), dtype=torch.float64)
    whole = len(rewards) == trainer.args.generation_batch_size and trainer.reward_func_names.count(name) == 1
    return (micro_step, rewards) if whole else None


def last_reward(trainer: GRPOTrainer) -> float | None:
    """Mean reward of the latest generation since the last log, if there is one."""
    values = trainer._metrics["train"].get("reward")
    return values[-1] if values else None


def mean_completion_lengths(trainer: GRPOTrainer) -> list[float]:
    """Mean tokens per rollout, over all processes, of each generation since the last log; the trainer's own list."""
    return trainer._metrics["train"].get("completions/mean_length", [])


def tokens_seen(trainer: GRPOTrainer) -> int:
    """Tokens of prompts and completions of all training rollouts so far, over all processes (TRL's `num_tokens`)."""
    return int(trainer.state.num_input_tokens_seen)


def extra_forwards(trainer: GRPOTrainer) -> int:
    """Forward passes without a gradient that TRL makes over each generation: reference policy, sampling policy."""
    args = trainer.args
    aligned = args.gradient_accumulation_steps % (args.steps_per_generation * trainer.num_iterations) == 0
    corrected = args.use_vllm and args.vllm_importance_sampling_correction
    return int(trainer.beta != 0.0) + int(not aligned or corrected)


def log_apart(trainer: GRPOTrainer, metrics: dict[str, float]) -> None:
    """Log metrics of ours without flushing the trainer's, which belong to its next step."""
    with left_as_found(trainer):
        trainer.log(dict(metrics))


def _reshard(trainer: GRPOTrainer) -> None:
    """Undo what a forward pass without a backward pass leaves behind under FSDP2: the root's parameters stay whole.

    While they do, tied weights are two parameters with two names, and nothing is what it was when training began.
    """
    for module in trainer.model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(trainer: GRPOTrainer) -> bool:
    """Whether parameters are partitioned over ranks (ZeRO-3, FSDP): all ranks must make the same forward passes."""
    return zero_stage(trainer) == 3 or is_fsdp2(trainer)


def zero_stage(trainer: GRPOTrainer) -> int:
    """DeepSpeed's ZeRO stage, 0 without DeepSpeed."""
    plugin = trainer.accelerator.state.deepspeed_plugin
    return int(plugin.zero_stage) if plugin is not None else 0


def generation_model(trainer: GRPOTrainer) -> AbstractContextManager[Any]:
    """Context manager that yields the policy ready for `generate`, as TRL itself prepares it."""
    from trl.models.utils import unwrap_model_for_generation

    return unwrap_model_for_generation(
        trainer.model_wrapped,
        trainer.accelerator,
        gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
        gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
    )


def pad_token_id(trainer: GRPOTrainer) -> int:
    """Token id of padding."""
    return trainer._tokenizer.pad_token_id


def tokenizer(trainer: GRPOTrainer) -> Any:
    """The policy's tokenizer."""
    return trainer._tokenizer


def chat_settings(trainer: GRPOTrainer) -> dict[str, Any]:
    """What the trainer passes to `apply_chat_template` besides the conversation."""
    return {
        "tools": trainer.tools or None,
        "chat_template": trainer.chat_template,
        **trainer.chat_template_kwargs,
    }


def prompt_token_lists(
    trainer: GRPOTrainer, prompts: list[Any], environments: list[str | None] | None = None
) -> list[list[int]]:
    """Token ids of prompts, with the chat template and its settings that training uses.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        prompts (`list`): Conversations or strings.
        environments (`list[str]`, *optional*): The environment of each, whose tools its prompt names; by default the
            first.
    """
    if trainer.environment_factories is None:
        return trainer._tokenize_prompts(prompts)[0]
    # TRL sets this for each batch of rollouts, and reads it when it tokenizes.
    before = vars(trainer).pop("_batch_environments", None)
    first = next(iter(trainer.environment_factories))
    trainer._batch_environments = [first] * len(prompts) if environments is None else environments
    try:
        return trainer._tokenize_prompts(prompts)[0]
    finally:
        trainer._batch_environments = before
