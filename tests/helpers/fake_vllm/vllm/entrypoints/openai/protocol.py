"""`/v1/completions`: the fields of vLLM's request, and its answer."""

from typing import Any

from ...outputs import CompletionOutput
from ...sampling_params import RequestOutputKind, SamplingParams

_FIELDS = """
model prompt echo frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop
stream stream_options suffix temperature top_p user use_beam_search top_k min_p
repetition_penalty watermarking length_penalty stop_token_ids include_stop_str_in_output
ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens
truncation_side allowed_token_ids prompt_logprobs logprob_token_ids bad_words prompt_embeds
add_special_tokens response_format structured_outputs priority request_id session_id
return_tokens_as_token_ids return_token_ids routed_experts_prompt_start return_token_offsets
cache_salt kv_transfer_params ec_transfer_params vllm_xargs repetition_detection
thinking_token_budget stream_interval
"""
FIELDS = frozenset(_FIELDS.split())
"""Of `CompletionRequest`."""

NOT_OF_SAMPLING = {"model", "prompt", "return_token_ids", "return_tokens_as_token_ids"}


def sampling_params(body: dict[str, Any]) -> SamplingParams:
    unknown = body.keys() - FIELDS
    if unknown:
        raise ValueError(f"unknown fields: {sorted(unknown)}")
    given = {name: value for name, value in body.items() if name not in NOT_OF_SAMPLING}
    return SamplingParams(**given, output_kind=RequestOutputKind.FINAL_ONLY, skip_clone=True)


def choice(
    number: int, prompt: list[int], completion: CompletionOutput, body: dict[str, Any]
) -> dict[str, Any]:
    with_ids = body.get("return_token_ids", False)
    return {
        "index": number,
        "text": completion.text,
        "logprobs": _logprobs(completion, body),
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "token_ids": completion.token_ids if with_ids else None,
        "prompt_logprobs": None,
        "prompt_token_ids": prompt if with_ids else None,
        "routed_experts": None,
    }


def _logprobs(completion: CompletionOutput, body: dict[str, Any]) -> dict[str, Any] | None:
    if completion.logprobs is None:
        return None
    if not body.get("return_tokens_as_token_ids"):
        raise NotImplementedError("tokens as texts")
    tokens, own, most_likely = [], [], []
    for token, entries in zip(completion.token_ids, completion.logprobs, strict=True):
        tokens.append(f"token_id:{token}")
        own.append(entries[token].logprob)
        ranked = sorted(entries.items(), key=lambda pair: pair[1].rank)
        # One more than was asked for if the sampled token is not among them.
        most_likely.append({f"token_id:{other}": entry.logprob for other, entry in ranked})
    return {
        "text_offset": [],
        "token_logprobs": own,
        "tokens": tokens,
        "top_logprobs": most_likely,
    }
