"""Fingerprints of measurements: settings, model, texts and code, each under a name for messages.

Settings are included by default: every field of the trainer's arguments counts, unless [`FIELDS`] gives a reason why
it does not. A field that is not listed (of a newer TRL, or of a user's subclass) can at worst cause existing
measurements to be rejected and repeated.
"""

from __future__ import annotations

import ast
import dataclasses
import dis
import functools
import hashlib
import inspect
import json
import sysconfig
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from trl_learnalign import rng
from trl_learnalign.bridge import inference
from trl_learnalign.bridge.objective import entropy_controller
from trl_learnalign.bridge.policy import causal_lm, sampled_digest
from trl_learnalign.gradients.layers import registered_rules
from trl_learnalign.records.layout import (
    plain,
    without_secrets,
)

if TYPE_CHECKING:
    from trl import GRPOTrainer


# ---- Digest of code -------------------------------------------------------------------------------------------------
# Installed code (the standard library, site-packages) is included by name; `run.json` records its versions. State from
# earlier calls of a function (counters, caches, open files) is excluded, so the same script has the same digest when
# it is started again.

_CONSTANTS = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis))
_INSTALLED = tuple(
    {str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "purelib", "platlib")}
)
_CONTAINERS = (dict, list, set)
_MAKERS = ("__init__", "__post_init__", "__new__")
_CHANGERS = (
    "append",
    "extend",
    "insert",
    "add",
    "update",
    "setdefault",
    "pop",
    "popitem",
    "remove",
    "discard",
    "clear",
)
CONTENTS = "[…]"
_PACKAGE = __name__.partition(".")[0]


def code_digest(function: Any) -> str:
    """Return the digest of a function, method, class, `functools.partial` or callable object: 16 hex digits."""
    reader = _Reader()
    reader.read("", function, always=True)
    digest = hashlib.blake2b(digest_size=8)
    for line in reader.lines:
        digest.update(line.encode(errors="surrogatepass"))
        digest.update(b"\0")
    return digest.hexdigest()


class _Reader:
    """Lists everything that the code of an object refers to, each thing once, in the order of use."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        # Keyed by `id`. The objects are kept as well, since an id is only valid while its object exists.
        self._seen: dict[int, Any] = {}

    def read(self, role: str, value: Any, always: bool = False) -> None:
        """List `value` under a `role`; with `always`, also if it is installed code."""
        if isinstance(value, dict):
            self._read_all(role, {str(key): entry for key, entry in value.items()})
        elif isinstance(value, set | frozenset):
            self.lines.append(f"{role} = {sorted(map(repr, value))}")
        elif isinstance(value, list | tuple):
            self._read_all(role, dict(_indexed(tuple(value))))
        elif isinstance(value, _CONSTANTS):
            self.lines.append(f"{role} = {value!r}")
        elif isinstance(value, types.MethodType):
            self.read(role, value.__func__, always)
            self.read(f"{role} of", value.__self__, always)
        elif isinstance(value, functools.partial):
            self.read(role, value.func, always)
            self._read_all(f"{role} given", {"arguments": value.args, **value.keywords})
        elif isinstance(value, types.FunctionType | type):
            self._read_source(role, value, always)
        else:
            self._read_object(role, value, always)

    def _read_all(self, role: str, values: Mapping[str, Any]) -> None:
        for name in sorted(values):
            self.read(f"{role}.{name}", values[name])

    def _read_source(self, role: str, value: Any, always: bool) -> None:
        self.lines.append(f"{role} is {value.__module__}.{value.__qualname__}")
        if id(value) in self._seen or (_is_installed(value) and not always):
            return
        self._seen[id(value)] = value
        self.lines.append(_source(value))
        if isinstance(value, type):
            self._read_class(value)
        else:
            self._read_function(value)

    def _read_class(self, value: type) -> None:
        for base in value.__bases__:
            self.read("base", base)
        for method in _functions_of(value):
            self._read_function(method)

    def _read_function(self, function: types.FunctionType) -> None:
        self._read_all("default", dict(_indexed(function.__defaults__)))
        self._read_all("default", function.__kwdefaults__ or {})
        changing = _changing(function.__code__)
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        names = sorted(_names(function.__code__))
        values = {}
        for name in names:
            if name in function.__globals__:
                values[name] = function.__globals__[name]
        for name, cell in cells:
            values[name] = _content(cell)
        for name, value in values.items():
            if isinstance(value, types.ModuleType):
                self._read_module(name, value, names)
            elif not _is_changed(name, value, changing):
                self.read(name, value)

    def _read_module(self, role: str, module: types.ModuleType, names: list[str]) -> None:
        """List the functions and classes of a module whose names a function uses."""
        self.lines.append(f"{role} is module {module.__name__}")
        if not _is_file_here(getattr(module, "__file__", None)):
            return
        for name in names:
            value = getattr(module, name, None)
            if isinstance(value, types.FunctionType | type):
                self.read(name, value)

    def _read_object(self, role: str, value: Any, always: bool) -> None:
        """List an instance: its class, and those of its attributes that are plain and constant."""
        wrapped = getattr(value, "__wrapped__", None)  # e.g. functools.lru_cache
        if isinstance(wrapped, types.FunctionType):
            self.read(role, wrapped, always)
            return
        # A builtin is identified by its name.
        name = getattr(value, "__qualname__", None) or getattr(value, "__name__", "")
        self.lines.append(f"{role} is {name}")
        self.read(role, type(value), always)
        # Attributes of other objects (command-line arguments, clients, trainers, models) say too little about the
        # function's code, and they may differ in another attempt at the same run.
        if always and not _is_installed(type(value)) and not _is_ours(type(value)):
            self._read_attributes(value)

    def _read_attributes(self, value: Any) -> None:
        changing: set[str] = set()
        for method in _functions_of(type(value)):
            if method.__name__ not in _MAKERS:
                changing |= _changing(method.__code__)
        for name, entry in sorted(getattr(value, "__dict__", {}).items()):
            if not _is_changed(name, entry, changing):
                self.read(name, entry)


def _indexed(values: tuple[Any, ...] | None) -> Iterator[tuple[str, Any]]:
    """Yield `("0", first)`, `("1", second)`, …; nothing for `None`."""
    for i, value in enumerate(values or ()):
        yield str(i), value


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _functions_of(owner: type) -> list[types.FunctionType]:
    members = [getattr(member, "__func__", member) for _, member in sorted(vars(owner).items())]
    return [member for member in members if isinstance(member, types.FunctionType)]


def _is_changed(name: str, value: Any, changing: set[str]) -> bool:
    """Whether functions change this value, see [`_changing`]; all entries of a container count as one."""
    return name in changing or (CONTENTS in changing and isinstance(value, _CONTAINERS))


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield a function's code and that of its inner functions."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _names(code: types.CodeType) -> set[str]:
    return {name for part in _codes(code) for name in part.co_names}


def _changing(code: types.CodeType) -> set[str]:
    """Return the outside names that a function changes: counters and caches, not constants.

    The result contains `CONTENTS` if the function assigns to an entry of some container.
    """
    changing = set()
    for part in _codes(code):
        before: Any = None
        for step in dis.get_instructions(part):
            if step.opname in ("STORE_GLOBAL", "STORE_DEREF", "STORE_ATTR"):
                changing.add(step.argval)
            elif step.opname in ("STORE_SUBSCR", "DELETE_SUBSCR"):
                changing.add(CONTENTS)
            elif step.opname in ("LOAD_ATTR", "LOAD_METHOD") and step.argval in _CHANGERS:
                changing.add(before)
            before = step.argval
            # An instruction that does two things at once has two names.
            if isinstance(before, tuple) and before:
                before = before[-1]
    return {name for name in changing if isinstance(name, str)}


def _is_ours(value: Any) -> bool:
    return str(value.__module__).partition(".")[0] == _PACKAGE


def _is_installed(value: Any) -> bool:
    """Whether a function or class belongs to Python or a library; our graders count as the user's."""
    if _is_ours(value):
        return False
    path = _file_of(value)
    if path is None:  # a builtin, or defined in an interpreter
        return isinstance(value, type) and value.__module__ != "__main__"
    return not _is_file_here(path)


def _file_of(value: Any) -> str | None:
    if isinstance(value, types.FunctionType):
        return value.__code__.co_filename
    try:
        return inspect.getsourcefile(value)
    except (TypeError, OSError):  # its module was loaded but not registered
        return next((method.__code__.co_filename for method in _functions_of(value)), None)


def _is_file_here(path: str | None) -> bool:
    return path is not None and not str(Path(path).resolve()).startswith(_INSTALLED)


def _source(value: Any) -> str:
    """Return the source without comments and layout; the bytecode if there is no source."""
    try:
        # Looked up by code object: for a function with `__wrapped__`, inspect would return the source of the wrapped
        # one.
        source = inspect.getsource(getattr(value, "__code__", value))
    except (OSError, TypeError):
        if isinstance(value, type):
            return "\n".join(_source(method) for method in _functions_of(value))
        return repr([_bytecode(part) for part in _codes(value.__code__)])
    try:
        return ast.unparse(ast.parse(textwrap.dedent(source)))
    except SyntaxError:  # the line of a lambda may end in the middle of an expression
        return source


def _bytecode(code: types.CodeType) -> tuple[Any, ...]:
    constants = []
    for constant in code.co_consts:
        # Inner functions are read separately; the repr of their code contains an address.
        if not isinstance(constant, types.CodeType):
            constants.append(constant)
    return code.co_code, code.co_names, code.co_varnames, constants


# ---- Settings, model and texts --------------------------------------------------------------------------------------

MEASURES = "measures"  # changes rollouts, rewards or gradients of given weights
TRAINS = "trains"  # changes the weights, whose digest is compared, and nothing else
COSMETIC = "cosmetic"  # changes neither: only where and how the work is done and reported

# Class and reason → fields of `GRPOConfig`, including those of `TrainingArguments`.
FIELDS: dict[tuple[str, str], str] = {
    (TRAINS, "the optimizer"): """
        learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1
        adam_beta2 adam_epsilon optim_target_modules max_grad_norm""",
    (TRAINS, "random numbers of training"): "seed data_seed",
    (TRAINS, "updates per generation"): "num_iterations",
    (
        TRAINS,
        "the training loss alone",
    ): "router_aux_loss_coef label_smoothing_factor average_tokens_across_devices",
    (TRAINS, "moves the reference, which has a digest of its own"): """
        sync_ref_model ref_model_mixup_alpha ref_model_sync_steps""",
    (TRAINS, "batches of accelerate"): "accelerator_config ignore_data_skip",
    (COSMETIC, "cuts the batch among processes and passes; its size is in the plan"): """
        per_device_train_batch_size gradient_accumulation_steps generation_batch_size steps_per_generation
        auto_find_batch_size""",
    (COSMETIC, "the plan decides it"): """
        num_train_epochs max_steps shuffle_dataset train_sampling_strategy length_column_name dataloader_drop_last""",
    (COSMETIC, "spreads weights and work over devices"): """
        deepspeed fsdp fsdp_config parallelism_config ds3_gather_for_generation ddp_find_unused_parameters
        ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout local_rank""",
    (COSMETIC, "memory: the same numbers are computed again"): """
        gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing activation_checkpointing_kwargs
        torch_empty_cache_steps""",
    (COSMETIC, "where the engine runs"): """
        vllm_enable_sleep_mode vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout
        vllm_group_port vllm_gpu_memory_utilization vllm_tensor_parallel_size""",
    (COSMETIC, "loading of rows"): """
        dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
        dataloader_multiprocessing_context dataloader_in_order label_names""",
    (COSMETIC, "evaluation"): """
        num_generations_eval bf16_full_eval fp16_full_eval eval_strategy eval_steps eval_delay
        per_device_eval_batch_size prediction_loss_only eval_on_start eval_do_concat_batches eval_use_gather_object
        eval_accumulation_steps include_for_metrics batch_eval_metrics do_eval do_predict metric_for_best_model
        greater_is_better load_best_model_at_end""",
    (COSMETIC, "saving and resuming"): """
        output_dir save_only_model save_strategy save_steps save_on_each_node save_total_limit enable_jit_checkpoint
        resume_from_checkpoint restore_callback_states_from_checkpoint do_train""",
    (COSMETIC, "logging"): """
        log_completions log_multimodal num_completions_to_print log_unique_prompts log_completions_hub_repo
        logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter
        include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name project
        trackio_space_id trackio_bucket_id trackio_static_space_id debug skip_memory_metrics""",
    (COSMETIC, "the hub"): """
        push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision""",
}

# The same for fields of transformers 4.
OLDER_FIELDS: dict[str, str] = {
    TRAINS: "adafactor warmup_ratio",
    COSMETIC: """
        _n_gpu fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap group_by_length include_inputs_for_metrics
        include_tokens_per_second logging_dir mp_parameters overwrite_output_dir per_gpu_eval_batch_size
        per_gpu_train_batch_size push_to_hub_model_id push_to_hub_organization push_to_hub_token ray_scope
        save_safetensors tpu_metrics_debug tpu_num_cores use_legacy_prediction_loop""",
}


def _classes() -> dict[str, str]:
    """Return the class of each field."""
    classes: dict[str, str] = {}
    for kind, names in OLDER_FIELDS.items():
        classes |= dict.fromkeys(names.split(), kind)
    for (kind, _), names in FIELDS.items():
        classes |= dict.fromkeys(names.split(), kind)
    return classes


_CLASSES = _classes()

# Entries of `model_init_kwargs` about locations of files. TRL itself sets `device_map` in distributed runs.
_PLACES = (
    "device_map",
    "cache_dir",
    "token",
    "local_files_only",
    "force_download",
    "max_memory",
    "offload_folder",
)
# Entries of a model's configuration. Its name is recorded separately, the trainer switches the cache, and saving the
# model writes the last two.
_PASSING = (
    "_name_or_path",
    "transformers_version",
    "use_cache",
    "_from_model_config",
    "architectures",
    "dtype",
)


def field_class(name: str) -> str:
    """Return `"measures"`, `"trains"` or `"cosmetic"`; a field that is not classified counts as `"measures"`."""
    return _CLASSES.get(name, MEASURES)


def settings_of(args: Any, kind: str) -> dict[str, Any]:
    """Return the fields of a `GRPOConfig` of one class as plain JSON values, without secrets at any depth."""
    names = [field.name for field in dataclasses.fields(args) if field_class(field.name) == kind]
    settings = without_secrets({name: plain(getattr(args, name)) for name in sorted(names)})
    loading = settings.get("model_init_kwargs")
    if loading:
        settings["model_init_kwargs"] = {key: loading[key] for key in loading if key not in _PLACES}
    return settings


def code_identity(trainer: GRPOTrainer) -> dict[str, Any]:
    """Return names and digests of a user's own code: rewards, tools, `rollout_func`, layer rules, ….

    It is computed before anything has run, since state from earlier calls must not count as identity. The function is
    collective over all processes, since a reward model may be partitioned.
    """
    identity: dict[str, Any] = {
        "rewards": _numbered(
            trainer.reward_func_names, [_code(trainer, reward) for reward in trainer.reward_funcs]
        ),
        "tools": _digests(trainer.tools),
        "environments": {
            str(name): code_digest(factory)
            for name, factory in (trainer.environment_factories or {}).items()
        },
    }
    if trainer.rollout_func is not None:
        identity["rollout_func"] = code_digest(trainer.rollout_func)
    # Built-in rules belong to the package, whose version is recorded; rules of a user may change during development.
    rules = registered_rules(trainer.model)
    if rules:
        identity["layer_rules"] = {name: code_digest(rule) for name, rule in rules.items()}
    return identity


def _code(trainer: GRPOTrainer, reward: Any) -> str:
    if isinstance(reward, nn.Module):
        return sampled_digest(trainer, reward.named_parameters())
    return code_digest(reward)


def _digests(functions: Sequence[Callable[..., Any]]) -> dict[str, str]:
    names = [getattr(function, "__name__", type(function).__name__) for function in functions]
    return _numbered(names, [code_digest(function) for function in functions])


def _numbered(names: Sequence[str], values: Sequence[str]) -> dict[str, str]:
    """Map names to values; equal names are distinguished by a number."""
    unique = [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names)]
    return dict(zip(unique, values, strict=True))


def measured_with(trainer: GRPOTrainer, code: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return everything that measurements depend on other than trainable weights and prompts; collective.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        code (mapping): Its [`code_identity`].

    Returns:
        `dict[str, dict]`: Plain values: `settings`, `model`, `tokenizer`, `generation_config`, `code`.
    """
    return {
        "settings": settings_of(trainer.args, MEASURES),
        "model": _model(trainer),
        "tokenizer": _tokenizer(trainer),
        "generation_config": _lasting(causal_lm(trainer).generation_config.to_dict()),
        "code": plain(code),
    }


def _model(trainer: GRPOTrainer) -> dict[str, Any]:
    config = causal_lm(trainer).config
    frozen_weights = [
        (name, weights)
        for name, weights in trainer.model.named_parameters()
        if not weights.requires_grad
    ]
    identity = {
        "name": config.name_or_path,
        "config": rng.digest(_lasting(config.to_dict())),
        "frozen_weights": (sampled_digest(trainer, frozen_weights) if frozen_weights else None),
    }
    adapters = getattr(trainer.model, "peft_config", None)
    if adapters:
        identity["adapter"] = rng.digest(
            {name: _lasting(adapter.to_dict()) for name, adapter in adapters.items()}
        )
    # A reference that follows the policy is no setting: `moving_identity` is computed at each stage.
    if trainer.ref_model is not None and not trainer.args.sync_ref_model:
        identity["reference"] = sampled_digest(trainer, trainer.ref_model.named_parameters())
    return identity


def _tokenizer(trainer: GRPOTrainer) -> dict[str, Any]:
    tokenizer = inference.tokenizer(trainer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # The JSON of a fast tokenizer is complete, except that padding and truncation are those of its last call.
    rules = (
        json.loads(backend.to_str())
        if backend is not None
        else {"vocabulary": tokenizer.get_vocab()}
    )
    rules = {name: rule for name, rule in rules.items() if name not in ("padding", "truncation")}
    return {
        "rules": rng.digest([rules, tokenizer.special_tokens_map]),
        "chat_template": rng.digest([tokenizer.chat_template, trainer.chat_template]),
    }


def _lasting(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: plain(value) for name, value in config.items() if name not in _PASSING}


def moving_identity(trainer: GRPOTrainer) -> dict[str, dict[str, Any]]:
    """Return the identity of what moves with the policy and also decides its gradients; collective over all processes.

    Returns:
        `dict[str, dict]`: `{"moving": …}` with the digest of a reference that follows the policy and the state of an
        adaptive entropy coefficient; `{}` if there are neither.
    """
    moving: dict[str, Any] = {}
    if trainer.args.sync_ref_model:
        moving["reference"] = sampled_digest(trainer, trainer.ref_model.named_parameters())
    if trainer.args.use_adaptive_entropy:
        moving["entropy"] = [str(number) for number in entropy_controller(trainer)]
    return {"moving": moving} if moving else {}
