"""One rule per layer type: layer input and output gradient → weight gradient, handed to a projection.

The same words everywhere: `activations` is a layer's input, `(B, T, …)`; `output_grads` the gradient of the objective
with respect to its output; `B = P·G` rows of `P` prompts, `T` tokens. Both are regrouped to `(P, R, …)` with the `R`
tokens of a prompt's rows together, so that a prompt's weight gradient is formed once over all of them.

To add a rule: write a function `(layer, activations, output_grads, sink) -> None` and enter it in `find_rule`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

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
    """

    projection: Projection
    out: torch.Tensor

    @property
    def prompts(self) -> int:
        """P."""
        return len(self.out)

    def grouped(self, values: torch.Tensor) -> torch.Tensor:
        """`(B, T, …, C)` as `(P, R, C)`.

        Raises:
            `RowsLostError`: If the rows of the micro-batch cannot be told apart.
        """
        if self.prompts > 1 and (values.ndim < 3 or values.shape[0] % self.prompts):
            raise RowsLostError(
                f"a layer saw values of shape {tuple(values.shape)}, in which {self.prompts} prompts cannot be told "
                "apart"
            )
        return values.reshape(self.prompts, -1, values.shape[-1])

    def add_outer(self, name: str, rows: torch.Tensor, columns: torch.Tensor) -> None:
        """Add the gradient `Σ rows ⊗ columns` of a matrix; both `(B, T, …)`."""
        self.projection.add_outer(self.out, name, self.grouped(rows), self.grouped(columns))

    def add_sum(self, name: str, values: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add the gradient `Σ values` of a vector, `(B, T, …, C)`, or `Σ weights·values` with weights `(B, T, …)`."""
        grouped = self.grouped(values).float()
        if weights is None:
            sums = grouped.sum(dim=1)
        else:
            sums = torch.bmm(weights.reshape(self.prompts, 1, -1), grouped).squeeze(1)
        self.projection.add_dense(self.out, name, sums)


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
    ids = activations.expand(output_grads.shape[:-1]).unsqueeze(-1)
    ids, grads = sink.grouped(ids).squeeze(-1), sink.grouped(output_grads).float()
    if (scale := getattr(module, "embed_scale", None)) is not None:  # Gemma multiplies inside the module
        grads = grads * scale.to(grads)
    if module.padding_idx is not None:  # torch leaves this row without gradient
        grads = grads * (ids != module.padding_idx).unsqueeze(-1)
    sink.projection.add_rows(sink.out, layer.names["weight"], ids, grads, module.num_embeddings)


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
    # The forward must be the known one: a subclass that computes something else has another gradient.
    forward = type(module).forward
    if isinstance(module, nn.Linear) and forward is nn.Linear.forward:
        return linear
    if isinstance(module, Conv1D) and forward is Conv1D.forward:
        return conv1d
    if isinstance(module, nn.Embedding) and (forward is nn.Embedding.forward or hasattr(module, "embed_scale")):
        plain = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
        return embedding if plain else None
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        return layer_norm
    # Each model family brings its own RMSNorm class; they share the name, one weight vector and an epsilon.
    if type(module).__name__.endswith("RMSNorm") and trainable == {"weight"} and _epsilon(module) is not None:
        return rms_norm
    return None


def _epsilon(module: nn.Module) -> float | None:
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return float(epsilon) if epsilon is not None else None
