"""vLLM's interface as TRL uses it, with the names and signatures of vLLM 0.31, in front of a transformers model.

For tests on machines without a GPU. What is asked of it is done for real: prompts are generated for, with the sampling
parameters that were given, log-probabilities are those of the tokens, and weights are only those that were loaded. An
argument that vLLM does not know is an error, and so is one that this package does not act on. Not modelled: paging and
scheduling of memory, kernels and their rounding, and all that TRL does not call.

It stands in a folder of its own, so that nothing finds a `vllm` that does not ask for it (`vllm_cases.py`).
"""

from .entrypoints.llm import LLM
from .outputs import CompletionOutput, RequestOutput
from .sampling_params import SamplingParams

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams"]

__version__ = "0.31.0"
