"""What the tests with vLLM begin with."""

import pytest


@pytest.fixture(scope="module")
def vllm():
    """vLLM's interface in front of a transformers model, for the tests of a file."""
    import vllm_cases  # needs TRL 1.16, which other tests of this folder do not

    with vllm_cases.installed():
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    import vllm_cases

    return vllm_cases.saved_policy(tmp_path_factory.mktemp("policy"))
