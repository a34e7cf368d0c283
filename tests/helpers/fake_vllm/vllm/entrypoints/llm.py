"""`vllm.LLM`: the engine in the trainer's own process."""

import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from ..engine.arg_utils import ACTED_ON, NAMES, WITHOUT_EFFECT
from ..engine.core import Core
from ..outputs import RequestOutput
from ..sampling_params import SamplingParams


class LLM:
    def __init__(
        self,
        model: str,
        *,
        runner: Any = "auto",
        convert: Any = "auto",
        tokenizer: str | None = None,
        tokenizer_mode: Any = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        allowed_local_media_path: str = "",
        allowed_media_domains: list[str] | None = None,
        tensor_parallel_size: int = 1,
        dtype: Any = "auto",
        quantization: Any = None,
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        chat_template: Any = None,
        seed: int = 0,
        gpu_memory_utilization: float = 0.92,
        cpu_offload_gb: float = 0,
        offload_group_size: int = 0,
        offload_num_in_group: int = 1,
        offload_prefetch_step: int = 1,
        offload_params: set[str] | None = None,
        enforce_eager: bool = False,
        enable_return_routed_experts: bool = False,
        return_sampling_mask: bool = False,
        disable_custom_all_reduce: bool = False,
        hf_token: bool | str | None = None,
        hf_overrides: Any = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
        pooler_config: Any = None,
        structured_outputs_config: Any = None,
        profiler_config: Any = None,
        attention_config: Any = None,
        kv_cache_memory_bytes: int | None = None,
        compilation_config: Any = None,
        quantization_config: Any = None,
        logits_processors: Any = None,
        spec_method: str | None = None,
        spec_model: str | None = None,
        spec_tokens: int | None = None,
        **kwargs: Any,
    ) -> None:
        for name in kwargs:
            if name not in NAMES:
                raise TypeError(f"EngineArgs got an unexpected keyword argument {name!r}")
            if name not in ACTED_ON | WITHOUT_EFFECT:
                raise NotImplementedError(f"{name} is not acted on here")
        if kwargs.get("distributed_executor_backend") != "external_launcher":
            raise NotImplementedError("only an engine in the trainer's process, as TRL asks for it")
        if os.environ["WORLD_SIZE"] != str(_world_size()):
            raise RuntimeError("WORLD_SIZE does not fit the processes that were launched")
        self._can_sleep = kwargs.get("enable_sleep_mode", False)
        self._tensor_parallel_size = tensor_parallel_size
        self.core = Core(
            model,
            seed,
            kwargs.get("max_model_len"),
            kwargs.get("logprobs_mode", "raw_logprobs"),
        )
        # The path that weights are loaded by.
        runner_of_model = SimpleNamespace(model=self.core)
        executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner_of_model))
        config = SimpleNamespace(max_model_len=self.core.max_model_len)
        self.llm_engine = SimpleNamespace(model_executor=executor, model_config=config)

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: Any = True,
        lora_request: Any = None,
        priority: list[int] | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        if lora_request or priority or tokenization_kwargs or mm_processor_kwargs:
            raise NotImplementedError("not acted on here")
        token_ids = []
        for prompt in prompts:
            if set(prompt) != {"prompt_token_ids"}:
                raise NotImplementedError(f"a prompt of {sorted(prompt)}")
            token_ids.append(list(prompt["prompt_token_ids"]))
        if isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(token_ids)
        outputs = self.core.generate(token_ids, list(sampling_params or ()))
        self._check_that_the_group_agrees(outputs)
        return outputs

    def _check_that_the_group_agrees(self, outputs: list[RequestOutput]) -> None:
        """Ranks of one tensor-parallel group run one model: each has to draw the same tokens, or all is lost."""
        if self._tensor_parallel_size == 1:
            return
        if self._tensor_parallel_size != torch.distributed.get_world_size():
            raise NotImplementedError("one group of all processes")
        drawn = [completion.token_ids for output in outputs for completion in output.outputs]
        everyones: list[Any] = [None] * self._tensor_parallel_size
        torch.distributed.all_gather_object(everyones, drawn)
        if any(others != drawn for others in everyones):
            raise RuntimeError("the ranks of a tensor-parallel group have drawn different tokens")

    def sleep(self, level: int = 1, mode: Any = "abort") -> None:
        if not self._can_sleep:
            raise ValueError("enable_sleep_mode is off")
        self.core.sleep(level)

    def wake_up(self, tags: list[str] | None = None) -> None:
        if not self._can_sleep:
            raise ValueError("enable_sleep_mode is off")
        self.core.wake_up(tags)

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        return self.core.reset_prefix_cache()


def _world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
