"""Completions of prompts with transformers or vLLM, without a trainer.

Decoding is determined only by [`Sampling`]. Checkpoints have a `generation_config` with their own settings (penalties,
minimum lengths, banned tokens, …), which training rollouts do not use either. Only its end tokens are used, because
they mark the end of an answer.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import set_seed
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from typing_extensions import override

from trl_learnalign import rng


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of completions.

    Args:
        samples (`int`, *optional*, defaults to `1`): Samples of each prompt, k.
        temperature (`float`, *optional*, defaults to `0.0`): 0 is greedy.
        top_p (`float`, *optional*, defaults to `1.0`): Nucleus sampling.
        max_new_tokens (`int`, *optional*, defaults to `1024`): Maximum completion length.
        seed (`int`, *optional*, defaults to `0`): Seed.

    Raises:
        `ValueError`: Naming the value and the remedy.
    """

    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or self.max_new_tokens < 1:
            raise ValueError(
                f"samples={self.samples}, max_new_tokens={self.max_new_tokens}: give whole numbers of at least 1."
            )
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature={self.temperature}, top_p={self.top_p}: the temperature must be finite and at least "
                "0, and top_p must be above 0 and at most 1."
            )
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"samples={self.samples} with temperature=0 would repeat one greedy sample: give a temperature, "
                "e.g. 0.7, or one sample."
            )


@dataclass(frozen=True)
class Completion:
    """One sample.

    Args:
        text (`str`): The generated text, without special tokens.
        tokens (`int`): Its length, the end token included.
        finished (`bool`): Whether it ended with an end token.
        ids (`list[int]`, *optional*): Its tokens.
    """

    text: str
    tokens: int
    finished: bool
    ids: list[int] = field(default_factory=list)

    def entry(self) -> dict[str, Any]:
        """The entry of a record: without the tokens, which can be recovered from the text."""
        return {"text": self.text, "tokens": self.tokens, "finished": self.finished}


def completion_of(tokenizer: Any, ids: list[int], ends: Collection[int]) -> Completion:
    """The generated completion, up to the first end token."""
    end = next((i for i, token in enumerate(ids) if token in ends), None)
    is_finished = end is not None
    if end is not None:
        ids = ids[: end + 1]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return Completion(text, len(ids), is_finished, ids)


@contextmanager
def plain_decoding(model: Any) -> Iterator[None]:
    """Make `model.generate` use only its arguments.

    For missing arguments, `generate` uses the checkpoint's own `generation_config`. Within this context the config is
    empty, so that missing arguments have transformers' neutral defaults, also for settings of later versions.

    Args:
        model (`torch.nn.Module`): A model with `generate`, also under PEFT; it is restored on exit.
    """
    holders = [module for module in model.modules() if "generation_config" in vars(module)]
    theirs = [module.generation_config for module in holders]
    try:
        for module in holders:
            module.generation_config = GenerationConfig()
        yield
    finally:
        for module, config in zip(holders, theirs, strict=True):
            module.generation_config = config


class Generator(ABC):
    """A model that completes prompts.

    Args:
        tokenizer (tokenizer): Its tokenizer; without a chat template, messages are concatenated.
        chat_template_kwargs (mapping, *optional*): Further arguments of the chat template, as in training
            (`GRPOConfig.chat_template_kwargs`).
    """

    def __init__(self, tokenizer: Any, chat_template_kwargs: Mapping[str, Any] | None = None):
        self.tokenizer = tokenizer
        self.chat_template_kwargs = dict(chat_template_kwargs or {})

    @abstractmethod
    def complete(
        self,
        prompts: Sequence[Any],
        sampling: Sampling,
        key: int,
    ) -> list[list[Completion]]:
        """`k` completions of each prompt.

        Args:
            prompts (sequence): Conversations or strings; one batch.
            sampling (`Sampling`): Settings.
            key (`int`): Number of the batch. It is part of the seed, so that samples do not depend on earlier batches.
        """

    def prompt_ids(self, prompt: Any) -> list[int]:
        """Tokens of a prompt, including the generation prompt."""
        if isinstance(prompt, str):
            return self.tokenizer(prompt)["input_ids"]
        if self.tokenizer.chat_template:
            encoded = self.tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_dict=True, **self.chat_template_kwargs
            )
            return encoded["input_ids"]
        turns = [f"{message['content']}\n\n" for message in prompt]
        return self.tokenizer("".join(turns))["input_ids"]


class TransformersGenerator(Generator):
    """Generation with transformers on one device.

    Args:
        model (`str`): Hub id or folder.
        device (`str`): Torch device.
        dtype (`str`, *optional*, defaults to `"auto"`): As for `from_pretrained`.
        chat_template_kwargs (mapping, *optional*): As for [`Generator`].
    """

    def __init__(
        self,
        model: str,
        device: str,
        dtype: str = "auto",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ):
        tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        super().__init__(tokenizer, chat_template_kwargs)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device).eval()
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @torch.no_grad()
    @override
    def complete(
        self,
        prompts: Sequence[Any],
        sampling: Sampling,
        key: int,
    ) -> list[list[Completion]]:
        rows = [self.prompt_ids(prompt) for prompt in prompts]
        inputs = self.tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
        inputs = inputs.to(self.model.device)
        width, ends = inputs["input_ids"].shape[1], self._end_tokens()
        choice: dict[str, Any] = {"do_sample": False}
        if sampling.temperature:
            choice = {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": 0,  # all tokens
            }
        settings = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            num_return_sequences=sampling.samples,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=sorted(ends),
            **choice,
        )
        set_seed(rng.key(sampling.seed, "evaluation", key) % 2**32)
        with plain_decoding(self.model):
            sequences = self.model.generate(**inputs, generation_config=settings)
        answers = sequences[:, width:].tolist()
        completions = [completion_of(self.tokenizer, ids, ends) for ids in answers]
        # The samples of a prompt are contiguous.
        starts = range(0, len(completions), sampling.samples)
        return [completions[start : start + sampling.samples] for start in starts]

    def _end_tokens(self) -> set[int]:
        """The model's end tokens; chat models have several."""
        of_model = self.model.generation_config.eos_token_id
        tokens = of_model if isinstance(of_model, list) else [of_model]
        return {token for token in (*tokens, self.tokenizer.eos_token_id) if token is not None}


class VLLMGenerator(Generator):
    """Generation with vLLM on the GPUs of this machine.

    Args:
        model (`str`): Hub id or folder.
        dtype (`str`, *optional*, defaults to `"auto"`): As for vLLM.
        tensor_parallel (`int`, *optional*, defaults to `1`): GPUs per copy of the model.
        chat_template_kwargs (mapping, *optional*): As for [`Generator`].

    Raises:
        `ImportError`: If vLLM is not installed.
    """

    def __init__(
        self,
        model: str,
        dtype: str = "auto",
        tensor_parallel: int = 1,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ):
        try:
            from vllm import LLM
        except ImportError as error:
            raise ImportError(
                "use_vllm needs vLLM: pip install 'trl-learnalign[vllm]', on a GPU."
            ) from error
        # With "vllm", only the end tokens of the checkpoint's generation settings are used.
        self.engine = LLM(
            model=model, dtype=dtype, tensor_parallel_size=tensor_parallel, generation_config="vllm"
        )
        super().__init__(self.engine.get_tokenizer(), chat_template_kwargs)

    @override
    def complete(
        self,
        prompts: Sequence[Any],
        sampling: Sampling,
        key: int,
    ) -> list[list[Completion]]:
        from vllm import SamplingParams

        settings = SamplingParams(
            n=sampling.samples,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=-1,
            min_p=0.0,
            repetition_penalty=1.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            min_tokens=0,
            max_tokens=sampling.max_new_tokens,
            seed=rng.key(sampling.seed, "evaluation", key) % 2**31,
        )
        requests = [{"prompt_token_ids": self.prompt_ids(prompt)} for prompt in prompts]
        completions = []
        for answer in self.engine.generate(requests, settings, use_tqdm=False):
            samples = []
            for out in answer.outputs:
                is_finished = out.finish_reason == "stop"
                ids = list(out.token_ids)
                samples.append(Completion(out.text, len(ids), is_finished, ids))
            completions.append(samples)
        return completions
