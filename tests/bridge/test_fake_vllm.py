"""The stand-in for vLLM: as strict as vLLM, and with its signatures wherever the real one is installed to compare."""

import dataclasses
import importlib
import importlib.util
import inspect
import sys

import pytest
import torch
import vllm_cases
from transformers import set_seed


@pytest.fixture(scope="module")
def fake():
    """The package, by another name than the real one's."""
    place = vllm_cases.PACKAGE / "vllm" / "__init__.py"
    spec = importlib.util.spec_from_file_location(
        "fake_vllm", place, submodule_search_locations=[str(place.parent)]
    )
    package = sys.modules["fake_vllm"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    yield package
    for name in [name for name in sys.modules if name.split(".")[0] == "fake_vllm"]:
        del sys.modules[name]


def part(name):
    return importlib.import_module(f"fake_vllm.{name}")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return vllm_cases.saved_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def core(fake, checkpoint):
    made = part("engine.core").Core(str(checkpoint), 0, None, "processed_logprobs")
    made.load_weights(vllm_cases.policy_of(checkpoint).named_parameters())
    made.reset_prefix_cache()
    return made


# ---- As strict as vLLM ----------------------------------------------------------------------------------------------


def test_arguments_that_vllm_does_not_know_are_errors(fake, checkpoint):
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_modell_len'"):
        fake.LLM(str(checkpoint), max_modell_len=8)
    with pytest.raises(NotImplementedError, match="enable_lora is not acted on"):
        fake.LLM(str(checkpoint), enable_lora=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'top'"):
        fake.SamplingParams(top=3)
    with pytest.raises(NotImplementedError, match="presence_penalty is not acted on"):
        fake.SamplingParams(presence_penalty=1.0)
    with pytest.raises(ValueError, match="unknown fields: \\['token_ids'\\]"):
        part("entrypoints.openai.protocol").sampling_params({"prompt": [[1]], "token_ids": True})


def test_weights_that_were_never_loaded_are_noticed(fake, checkpoint):
    core = part("engine.core").Core(str(checkpoint), 0, None, "processed_logprobs")
    weights = list(vllm_cases.policy_of(checkpoint).named_parameters())
    core.load_weights(weights[1:])
    core.reset_prefix_cache()
    with pytest.raises(RuntimeError, match=f"{weights[0][0]} was never loaded"):
        core.generate([[5, 6]], [fake.SamplingParams()])
    with pytest.raises(KeyError, match="another: this model has no such weight"):
        core.load_weights([("another", torch.zeros(1))])


def test_sleeping_engines_and_old_caches_are_noticed(fake, core):
    core.load_weights([])
    with pytest.raises(RuntimeError, match="reset_prefix_cache was not called"):
        core.generate([[5, 6]], [fake.SamplingParams()])
    core.sleep(2)
    with pytest.raises(RuntimeError, match="engine that sleeps"):
        core.load_weights([])
    core.wake_up(["weights"])
    with pytest.raises(RuntimeError, match="the engine sleeps: \\['kv_cache'\\]"):
        core.generate([[5, 6]], [fake.SamplingParams()])
    core.wake_up(["kv_cache"])
    core.reset_prefix_cache()
    with pytest.raises(RuntimeError, match="was never loaded"):
        core.generate([[5, 6]], [fake.SamplingParams()])


# ---- It does what it is asked for -----------------------------------------------------------------------------------


def completions(core, **params):
    given = part("sampling_params").SamplingParams(**{"max_tokens": 5, "logprobs": 0, **params})
    outputs = core.generate([[5, 6, 7], [8]], [given] * 2)
    return [completion for output in outputs for completion in output.outputs]


def test_log_probabilities_are_those_of_the_model(core, checkpoint):
    model = vllm_cases.policy_of(checkpoint)
    set_seed(3)
    (first, *_) = completions(core, n=2, temperature=0.7)
    tokens = torch.tensor([[5, 6, 7, *first.token_ids]])
    logprobs = (model(tokens).logits[0, 2:-1] / 0.7).log_softmax(dim=-1)
    expected = logprobs.gather(1, tokens[0, 3:].unsqueeze(1)).flatten().tolist()
    given = [
        entry[token].logprob for entry, token in zip(first.logprobs, first.token_ids, strict=True)
    ]
    assert given == pytest.approx(expected, abs=1e-5)
    assert first.cumulative_logprob == pytest.approx(sum(expected), abs=1e-4)


@pytest.mark.parametrize(
    "greedy", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}]
)
def test_the_likeliest_tokens_by_every_parameter_that_asks_for_them(core, checkpoint, greedy):
    model = vllm_cases.policy_of(checkpoint)
    found = [completion.token_ids for completion in completions(core, **greedy)]
    for prompt, tokens in zip(([5, 6, 7], [8]), found, strict=True):
        ids = torch.tensor([prompt])
        best = model.generate(ids, do_sample=False, max_new_tokens=5, pad_token_id=0)
        assert tokens == best[0, len(prompt) :].tolist()


def test_draws_follow_the_seed_of_the_process_or_of_the_request(core):
    def draws(of_process, **params):
        set_seed(of_process)
        return [completion.token_ids for completion in completions(core, n=4, **params)]

    assert draws(1) == draws(1) != draws(2)
    assert draws(1, seed=5) == draws(2, seed=5)
    first, second = draws(1)[:2]
    assert first != second


# ---- The real signatures --------------------------------------------------------------------------------------------

CALLED = {
    "": ["LLM.__init__", "LLM.generate", "LLM.sleep", "LLM.wake_up", "LLM.reset_prefix_cache"],
    "outputs": ["RequestOutput.__init__"],
    "utils.network_utils": ["get_ip"],
    "distributed.weight_transfer.nccl_common": ["trainer_init"],
    "distributed.weight_transfer.packed_tensor": ["packed_nccl_broadcast_producer"],
}


def _named(module, path):
    for name in path.split("."):
        module = getattr(module, name)
    return module


@pytest.mark.parametrize(("place", "path"), [(p, n) for p, names in CALLED.items() for n in names])
def test_signatures_are_those_of_vllm(fake, place, path):
    real = importlib.import_module(pytest.importorskip("vllm").__name__ + (place and f".{place}"))
    ours = importlib.import_module("fake_vllm" + (place and f".{place}"))
    parameters = [inspect.signature(_named(module, path)).parameters for module in (ours, real)]
    kinds, real_kinds = ({n: p.kind for n, p in each.items()} for each in parameters)
    assert set(kinds) <= set(real_kinds)
    assert all(kinds[name] == real_kinds[name] for name in kinds)
    # Those that vLLM has besides have defaults.
    missing = [parameters[1][name] for name in set(real_kinds) - set(kinds)]
    without_default = [
        p
        for p in missing
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    assert without_default == []


def test_fields_are_those_of_vllm(fake):
    pytest.importorskip("vllm")
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.outputs import CompletionOutput
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams

    ours = part("sampling_params")
    assert {part.name for part in dataclasses.fields(EngineArgs)} >= part("engine.arg_utils").NAMES
    assert set(CompletionRequest.model_fields) >= part("entrypoints.openai.protocol").FIELDS
    assert _fields(ours.SamplingParams) <= set(SamplingParams.__struct_fields__)
    assert _fields(ours.StructuredOutputsParams) <= _fields(StructuredOutputsParams)
    assert _fields(part("outputs").CompletionOutput) <= _fields(CompletionOutput)


def _fields(kind):
    return {part.name for part in dataclasses.fields(kind)}
