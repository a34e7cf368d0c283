"""What stands behind the interface: a transformers model that knows no weights but those that were loaded."""

import hashlib
import random
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ..logprobs import Logprob
from ..outputs import CompletionOutput, RequestOutput
from ..sampling_params import SamplingParams

GREEDY = 1e-5
"""Temperatures below it."""


class Core:
    """An engine.

    Random numbers are those of torch's default generator, the state of the process, as in vLLM's model runner V1 (V2
    draws a seed for each request from NumPy's): a draw for all rows of a step at once.

    Args:
        model (`str`): Folder of a checkpoint; its config, tokenizer and end tokens are read, and no weights.
        seed (`int`): Seeds Python, NumPy and torch, as vLLM does when it has loaded its model.
        max_model_len (`int`, *optional*): Tokens of prompt and completion.
        logprobs_mode (`str`): `"raw_logprobs"` or `"processed_logprobs"`.
    """

    dtype = torch.float32
    """Weights are rounded to it: another one makes the engine differ from the trainer, as real ones do."""

    def __init__(self, model: str, seed: int, max_model_len: int | None, logprobs_mode: str):
        if logprobs_mode not in ("raw_logprobs", "processed_logprobs"):
            raise NotImplementedError(f"logprobs_mode={logprobs_mode!r}")
        config = AutoConfig.from_pretrained(model)
        self.model = AutoModelForCausalLM.from_config(config).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        ends = GenerationConfig.from_pretrained(model).eos_token_id
        self.end_tokens = {ends} if isinstance(ends, int) else set(ends or ())
        self.max_model_len = max_model_len or config.max_position_embeddings
        self.logprobs_mode = logprobs_mode
        self.generations: list[str] = []
        """The digest of the weights of each call."""
        self.rows: list[int] = []
        """The completions of each call."""
        self.loads = 0
        self._asleep: set[str] = set()
        self._has_old_cache = False
        self._forget()
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    # ---- Weights --------------------------------------------------------------------------------------------------

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        if "weights" in self._asleep:
            raise RuntimeError(
                "weights were written to an engine that sleeps: wake_up(tags=['weights'])"
            )
        own = dict(self.model.named_parameters())
        loaded = set()
        for name, tensor in weights:
            if name not in own:
                raise KeyError(f"{name}: this model has no such weight")
            if own[name].shape != tensor.shape:
                raise ValueError(
                    f"{name} is {tuple(own[name].shape)}, and got {tuple(tensor.shape)}"
                )
            with torch.no_grad():
                own[name].copy_(tensor.to(self.dtype))
            loaded.add(name)
        self.loads += 1
        self._has_old_cache = True
        return loaded

    def reset_prefix_cache(self) -> bool:
        self._has_old_cache = False
        return True

    def weights_digest(self) -> str:
        return digest(self.model.named_parameters())

    @torch.no_grad()
    def _forget(self) -> None:
        for parameter in self.model.parameters():
            parameter.fill_(torch.nan)

    # ---- Sleep ----------------------------------------------------------------------------------------------------

    def sleep(self, level: int) -> None:
        self._asleep = {"weights", "kv_cache"}
        if level == 2:
            self._forget()

    def wake_up(self, tags: list[str] | None) -> None:
        self._asleep -= {"weights", "kv_cache"} if tags is None else set(tags)

    # ---- Generation -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self, prompts: list[list[int]], params: list[SamplingParams]
    ) -> list[RequestOutput]:
        self._check(prompts, params)
        self.generations.append(self.weights_digest())
        self.rows.append(sum(given.n for given in params))
        rows = [
            Row(prompt, given, number)
            for prompt, given in zip(prompts, params, strict=True)
            for number in range(given.n)
        ]
        self._complete(rows)
        outputs, first = [], 0
        for number, (prompt, given) in enumerate(zip(prompts, params, strict=True)):
            own = rows[first : first + given.n]
            first += given.n
            completions = [row.output(self.tokenizer) for row in own]
            outputs.append(RequestOutput(str(number), None, prompt, None, completions, True))
        return outputs

    def _check(self, prompts: list[list[int]], params: list[SamplingParams]) -> None:
        if self._asleep:
            raise RuntimeError(f"the engine sleeps: {sorted(self._asleep)}")
        if self._has_old_cache:
            raise RuntimeError("new weights were loaded, and reset_prefix_cache was not called")
        for name, parameter in self.model.named_parameters():
            if parameter.isnan().any():
                raise RuntimeError(f"{name} was never loaded")
        for prompt, given in zip(prompts, params, strict=True):
            if len(prompt) + (given.max_tokens or 1) > self.max_model_len:
                raise ValueError(f"{len(prompt)} tokens and {given.max_tokens} more do not fit")

    def _complete(self, rows: list["Row"]) -> None:
        while not all(row.finish_reason for row in rows):
            width = max(len(row.tokens) for row in rows)
            ids = torch.zeros(len(rows), width, dtype=torch.long)
            mask = torch.zeros(len(rows), width, dtype=torch.long)
            for number, row in enumerate(rows):
                ids[number, width - len(row.tokens) :] = torch.tensor(row.tokens)
                mask[number, width - len(row.tokens) :] = 1
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
            outputs = self.model(ids, attention_mask=mask, position_ids=positions, use_cache=False)
            logits = outputs.logits[:, -1].float()
            self._append(rows, logits)

    def _append(self, rows: list["Row"], logits: Tensor) -> None:
        processed = torch.stack(
            [row.processed(row_logits) for row, row_logits in zip(rows, logits, strict=True)]
        )
        drawn = torch.multinomial(processed.softmax(dim=-1), 1).flatten().tolist()
        is_raw = self.logprobs_mode == "raw_logprobs"
        logprobs = (logits if is_raw else processed).log_softmax(dim=-1)
        for number, row in enumerate(rows):
            if not row.finish_reason:
                token = row.token(processed[number], drawn[number])
                row.append(token, logprobs[number], self.end_tokens)


class Row:
    """One completion under way."""

    def __init__(self, prompt: list[int], params: SamplingParams, number: int):
        self.params, self.number = params, number
        self.prompt_length = len(prompt)
        self.tokens = list(prompt)
        self.logprobs: list[dict[int, Logprob]] = []
        self.finish_reason: str | None = None
        self._generator = None
        if params.seed is not None:
            self._generator = torch.Generator().manual_seed(params.seed + number)

    def processed(self, logits: Tensor) -> Tensor:
        """Logits `(V,)` after penalties, temperature and truncation."""
        params = self.params
        if params.repetition_penalty != 1:
            seen = torch.tensor(sorted(set(self.tokens)))
            values = logits[seen]
            scaled = torch.where(
                values > 0, values / params.repetition_penalty, values * params.repetition_penalty
            )
            logits = logits.index_copy(0, seen, scaled)
        if params.temperature >= GREEDY:
            logits = logits / params.temperature
        if params.top_k > 0:
            least = logits.topk(min(params.top_k, len(logits))).values[-1]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if params.top_p < 1:
            ordered, places = logits.softmax(dim=-1).sort(descending=True)
            before = ordered.cumsum(dim=-1) - ordered
            logits = logits.index_fill(0, places[before >= params.top_p], -torch.inf)
        if params.min_p > 0:
            probabilities = logits.softmax(dim=-1)
            least = params.min_p * probabilities.max()
            logits = logits.masked_fill(probabilities < least, -torch.inf)
        return logits

    def token(self, processed: Tensor, drawn: int) -> int:
        if self.params.temperature < GREEDY:
            return int(processed.argmax())
        if self._generator is None:
            return drawn
        return int(torch.multinomial(processed.softmax(dim=-1), 1, generator=self._generator))

    def append(self, token: int, logprobs: Tensor, end_tokens: set[int]) -> None:
        wanted = {token}
        if self.params.logprobs:
            count = len(logprobs) if self.params.logprobs == -1 else self.params.logprobs
            wanted |= set(logprobs.topk(count).indices.tolist())
        entries = {}
        for other in sorted(wanted):
            rank = 1 + int((logprobs > logprobs[other]).sum())
            entries[other] = Logprob(float(logprobs[other]), rank)
        self.logprobs.append(entries)
        self.tokens.append(token)
        length = len(self.tokens) - self.prompt_length
        if token in end_tokens and not self.params.ignore_eos:
            self.finish_reason = "stop"
        elif length == self.params.max_tokens:
            self.finish_reason = "length"

    def output(self, tokenizer) -> CompletionOutput:
        token_ids = self.tokens[self.prompt_length :]
        wants_logprobs = self.params.logprobs is not None
        total = sum(
            entry[token].logprob for entry, token in zip(self.logprobs, token_ids, strict=True)
        )
        return CompletionOutput(
            index=self.number,
            text=tokenizer.decode(token_ids, skip_special_tokens=True),
            token_ids=token_ids,
            cumulative_logprob=total if wants_logprobs else None,
            logprobs=self.logprobs if wants_logprobs else None,
            finish_reason=self.finish_reason,
        )


def digest(named_parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Of names and float32 weights, in the order of the names."""
    found = hashlib.sha256()
    for name, parameter in sorted(named_parameters, key=lambda pair: pair[0]):
        found.update(name.encode())
        found.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]
