"""One rule per layer type: layer input and output gradient → weight gradient, handed to a projection.

The same words everywhere: `activations` is a layer's input, `(B, T, …)`; `output_grads` the gradient of the objective
with respect to its output; `B = P·G` rows of `P` prompts, `T` tokens. Both are regrouped to `(P, R, …)` with the `R`
tokens of a prompt's rows together, so that a prompt's weight gradient is formed once over all of them.

A rule is for calls as it knows them ([`activations_of`]); what a parameter does elsewhere, autograd captures.

To add a rule: write a function `(layer, activations, output_grads, sink) -> None` and enter it in `find_rule`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from trl_learnalign.gradients.sketch import Projection


@dataclass
class Sink:
    """Where the gradients of one micro-batch go.

    Args:
        projection (`Projection`): Projects what is added.
        out (`torch.Tensor`): `(P, D)` float32 features, added to.
        rows (`int`, *optional*): B, the rows of the micro-batch, those of a prompt together. Needed if P > 1.
        left_out (set of `str`): Parameters whose gradient does not come from layers in this pass: what is added for
            them is dropped.
    """

    projection: Projection
    out: torch.Tensor
    rows: int | None = None
    left_out: set[str] = field(default_factory=set)

    @property
    def prompts(self) -> int:
        """P."""
        return len(self.out)

    def keeps_rows(self, values: torch.Tensor) -> bool:
        """Whether values are `(B, T, …, C)`, so that prompts can be told apart (always, if there is one)."""
        # Two axes could be routed tokens whose number happens to be B.
        return self.prompts == 1 or (values.ndim >= 3 and values.shape[0] == self.rows)

    def grouped(self, values: torch.Tensor) -> torch.Tensor:
        """`(B, T, …, C)` as `(P, R, C)`.

        Raises:
            `RowsLostError`: If the rows of the micro-batch cannot be told apart.
        """
        if not self.keeps_rows(values):
            raise RowsLostError(
                f"a layer saw values of shape {tuple(values.shape)}, in which the {self.rows} rows of {self.prompts} "
                "prompts cannot be told apart"
            )
        return values.reshape(self.prompts, -1, values.shape[-1])

    def add_outer(self, name: str, rows: torch.Tensor, columns: torch.Tensor) -> None:
        """Add the gradient `Σ rows ⊗ columns` of a matrix; both `(B, T, …)`."""
        if name not in self.left_out:
            self.projection.add_outer(self.out, name, self.grouped(rows), self.grouped(columns))

    def add_sum(self, name: str, values: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add the gradient `Σ values` of a vector, `(B, T, …, C)`, or `Σ weights·values` with weights `(B, T, …)`."""
        if name in self.left_out:
            return
        grouped = self.grouped(values).float()
        if weights is None:
            sums = grouped.sum(dim=1)
        else:
            sums = torch.bmm(weights.reshape(self.prompts, 1, -1), grouped).squeeze(1)
        self.projection.add_dense(self.out, name, sums)

    def add_rows(self, name: str, indices: torch.Tensor, values: torch.Tensor, row_count: int) -> None:
        """Add the gradient `Σ onehot(indices) ⊗ values` of a table; `(B, T, …)` and `(B, T, …, C)`."""
        if name not in self.left_out:
            ids = self.grouped(indices.unsqueeze(-1)).squeeze(-1)
            self.projection.add_rows(self.out, name, ids, self.grouped(values), row_count)


class RowsLostError(Exception):
    """A layer mixed the rows of the micro-batch (routed experts, packed tokens): capture one prompt at a time."""


@dataclass(frozen=True)
class Layer:
    """A module with trainable parameters of its own.

    Args:
        module (`torch.nn.Module`): The module.
        names (mapping of `str` to `str`): Canonical names of its trainable parameters by attribute, e.g.
            `{"weight": "model.layers.0.self_attn.q_proj.weight"}`.
    """

    module: nn.Module
    names: Mapping[str, str]


Rule = Callable[[Layer, torch.Tensor, torch.Tensor, Sink], None]


def linear(layer: Layer, activations: torch.Tensor, output_grads: torch.Tensor, sink: Sink) -> None:
    """`y = x Wᵀ + b`: `dW = gᵀ x`, `db = Σ g`."""
    if "weight" in layer.names:
        sink.add_outer(layer.names["weight"], output_grads, activations)
    if "bias" in layer.names:
        sink.add_sum(layer.names["bias"], output_grads)


def conv1d(layer: Layer, activations: torch.Tensor, output_grads: torch.Tensor, sink: Sink) -> None:
    """GPT-2's `y = x W + b`: `dW = xᵀ g`, `db = Σ g`."""
    if "weight" in layer.names:
        sink.add_outer(layer.names["weight"], activations, output_grads)
    if "bias" in layer.names:
        sink.add_sum(layer.names["bias"], output_grads)


def embedding(layer: Layer, activations: torch.Tensor, output_grads: torch.Tensor, sink: Sink) -> None:
    """`y = s·W[ids]`: `dW[id] += s·g`. `activations` are the token ids, `(B, T)` or `(1, T)`."""
    module = layer.module
    assert isinstance(module, nn.Embedding)
    # Position ids come as one row for the whole batch.
    ids = activations.expand(output_grads.shape[:-1])
    grads = output_grads.float() * _embed_scale(module)
    if module.padding_idx is not None:  # torch leaves this row without gradient
        grads = grads * (ids != module.padding_idx).unsqueeze(-1)
    sink.add_rows(layer.names["weight"], ids, grads, module.num_embeddings)


def _embed_scale(module: nn.Embedding) -> float | torch.Tensor:
    """The factor that Gemma (a tensor, rounded to the weight's type), BART and XGLM (a number) multiply by inside."""
    scale = getattr(module, "embed_scale", 1.0)
    return scale.to(module.weight.dtype).float() if isinstance(scale, torch.Tensor) else float(scale)


def rms_norm(layer: Layer, activations: torch.Tensor, output_grads: torch.Tensor, sink: Sink) -> None:
    """`y = w·x̂` or `(1 + w)·x̂` with `x̂ = x / rms(x)`: `dw = Σ g·x̂` either way."""
    x = activations.float()
    # 1 / rms enters as a weight of the sum: normalised activations would be one more pass over memory.
    mean_square = torch.linalg.vector_norm(x, dim=-1).square() / x.shape[-1]
    weights = torch.rsqrt(mean_square + (_epsilon(layer.module) or 0.0))
    sink.add_sum(layer.names["weight"], output_grads.float() * x, weights)


def layer_norm(layer: Layer, activations: torch.Tensor, output_grads: torch.Tensor, sink: Sink) -> None:
    """`y = w·x̂ + b` with `x̂ = (x - mean) / std`: `dw = Σ g·x̂`, `db = Σ g`."""
    module = layer.module
    assert isinstance(module, nn.LayerNorm)
    if "weight" in layer.names:
        x = nn.functional.layer_norm(activations.float(), module.normalized_shape, eps=module.eps)
        sink.add_sum(layer.names["weight"], output_grads.float() * x)
    if "bias" in layer.names:
        sink.add_sum(layer.names["bias"], output_grads)


def find_rule(module: nn.Module, trainable: set[str]) -> Rule | None:
    """The rule for a module, or `None`.

    Args:
        module (`torch.nn.Module`): A module with trainable parameters of its own.
        trainable (set of `str`): Their attribute names.
    """
    # The forward must be the known one: a subclass that computes something else has another gradient. So has an
    # instance whose forward was replaced; accelerate's wrapper, which moves devices, is known by its hook.
    if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
        return None
    forward = type(module).forward
    if isinstance(module, nn.Linear) and forward is nn.Linear.forward:
        return linear
    if isinstance(module, Conv1D) and forward is Conv1D.forward:
        return conv1d
    if isinstance(module, nn.Embedding) and trainable == {"weight"}:
        plain = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
        return embedding if plain else None
    known_norm = forward is nn.LayerNorm.forward or type(module).__name__.endswith("LayerNorm1P")  # y = (1 + w)·x̂ + b
    if isinstance(module, nn.LayerNorm) and known_norm and len(module.normalized_shape) == 1:
        return layer_norm
    # Each model family brings its own RMSNorm class; they share the name, one weight vector and an epsilon.
    if type(module).__name__.endswith("RMSNorm") and trainable == {"weight"} and _epsilon(module) is not None:
        return rms_norm if _is_rms_norm(module) else None
    return None


def _is_rms_norm(module: nn.Module) -> bool:
    """Whether a class of that name computes it: not over groups of entries (Qwen4-Exp), nor anything else.

    One that takes more than a tensor is left to each call, which tells.
    """
    weight: Any = module.weight
    shape = getattr(weight, "ds_shape", weight.shape)  # ZeRO-3 holds the shape apart
    if len(shape) != 1:
        return False
    x = torch.linspace(-1, 2, 2 * shape[0], device=weight.device).view(2, -1) ** 3
    ramp = torch.linspace(1, 3, shape[0], device=weight.device)
    alone = object.__new__(type(module))  # its forward with other weights: no hooks, no gathering
    outputs = []
    for values in (torch.zeros_like(ramp), ramp):
        vars(alone).update(vars(module), _parameters={**module._parameters, "weight": values})
        try:
            outputs.append(type(module).forward(alone, x))
        except Exception:
            return True
    expected = ramp * x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + (_epsilon(module) or 0.0))
    return torch.allclose((outputs[1] - outputs[0]).float(), expected, rtol=1e-2, atol=1e-3)


def activations_of(
    module: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], output: torch.Tensor
) -> torch.Tensor | None:
    """The one tensor that a rule needs of a call, or `None` if the call is not what the rule supposes.

    Args:
        module (`torch.nn.Module`): A module with a rule.
        inputs (`tuple`): Positional arguments of the call.
        kwargs (mapping): Keyword arguments.
        output (`torch.Tensor`): What came out.
    """
    if isinstance(module, nn.Embedding) and not _takes_ids(module):
        # Learned positions (OPT, BART, BioGPT) make the ids inside, each in its own way; autograd keeps them.
        lookup = output.grad_fn
        is_plain = lookup is not None and lookup.name() == "EmbeddingBackward0"
        return getattr(lookup, "_saved_indices", None) if is_plain else None
    arguments = [*inputs, *kwargs.values()]
    if len(arguments) == 1 and isinstance(arguments[0], torch.Tensor):
        return arguments[0]
    return None


def _takes_ids(module: nn.Embedding) -> bool:
    return type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")


def _epsilon(module: nn.Module) -> float | None:
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return float(epsilon) if epsilon is not None else None
