"""One rule per layer type: computes the weight gradient from layer input and output gradient, for a projection.

Terms: `activations` is a layer's input, `(B, T, …)`; `output_grads` is the gradient of the objective with respect to
its output; there are `B = P·G` rows of `P` prompts, with `T` tokens. Both are regrouped to `(P, R, …)` with the `R`
tokens of a prompt's rows together, so that a prompt's weight gradient is formed once over all of them.

A rule applies only to calls of the form that it supports ([`activations_of`]). Autograd captures other uses of a
parameter.

To add a rule, write a function `(layer, activations, output_grads, sink) -> None` and register it for the layer's
class with [`register_rule`]. [`built_in_rule`] finds the rules of this module.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from trl_learnalign.gradients.projection import Projection


@dataclass
class Sink:
    """Accumulates the gradients of one micro-batch.

    Args:
        projection (`Projection`): Projects what is added.
        out (`torch.Tensor`): `(P, D)` float32 features, added to.
        rows (`int`, *optional*): B, the rows of the micro-batch, those of a prompt together. Needed if P > 1.
        left_out (set of `str`): Parameters whose gradient does not come from layers in this pass; what is added for
            them is dropped.
    """

    projection: Projection
    out: Tensor
    rows: int | None = None
    left_out: set[str] = field(default_factory=set)

    @property
    def prompts(self) -> int:
        """P."""
        return len(self.out)

    def keeps_rows(self, values: Tensor) -> bool:
        """Whether values are `(B, T, …, C)`, so that prompts can be separated (always true for one prompt)."""
        if self.prompts == 1:
            return True
        # Values with two axes could be routed tokens whose number happens to be B.
        return values.ndim >= 3 and values.shape[0] == self.rows

    def grouped(self, values: Tensor) -> Tensor:
        """Reshape `(B, T, …, C)` to `(P, R, C)`.

        Raises:
            `RowsLostError`: If the rows of the micro-batch cannot be separated.
        """
        if not self.keeps_rows(values):
            raise RowsLostError(
                f"a layer received values of shape {tuple(values.shape)}, which cannot be split into the "
                f"{self.rows} rows of {self.prompts} prompts"
            )
        return values.reshape(self.prompts, -1, values.shape[-1])

    def add_outer(self, name: str, rows: Tensor, columns: Tensor) -> None:
        """Add the gradient `Σ rows ⊗ columns` of a matrix; both `(B, T, …)`."""
        if name in self.left_out:
            return
        rows, columns = self.grouped(rows), self.grouped(columns)
        self.projection.add_outer(self.out, name, rows, columns)

    def add_sum(self, name: str, values: Tensor, weights: Tensor | None = None) -> None:
        """Add the gradient `Σ values` of a vector, `(B, T, …, C)`, or `Σ weights·values` with weights `(B, T, …)`."""
        if name in self.left_out:
            return
        grouped = self.grouped(values).float()
        if weights is None:
            sums = grouped.sum(dim=1)
        else:
            row = weights.reshape(self.prompts, 1, -1)
            sums = torch.bmm(row, grouped).squeeze(1)
        self.projection.add_dense(self.out, name, sums)

    def add_rows(self, name: str, indices: Tensor, values: Tensor, row_count: int) -> None:
        """Add the gradient `Σ onehot(indices) ⊗ values` of a table; `(B, T, …)` and `(B, T, …, C)`."""
        if name in self.left_out:
            return
        ids = self.grouped(indices.unsqueeze(-1)).squeeze(-1)
        columns = self.grouped(values)
        self.projection.add_rows(self.out, name, ids, columns, row_count)


class RowsLostError(Exception):
    """A layer mixed the rows of the micro-batch (routed experts, packed tokens): capture one prompt at a time."""


@dataclass(frozen=True)
class Layer:
    """A module with its own trainable parameters.

    Args:
        module (`torch.nn.Module`): The module.
        names (mapping of `str` to `str`): Canonical names of its trainable parameters by attribute, e.g.
            `{"weight": "model.layers.0.self_attn.q_proj.weight"}`.
    """

    module: nn.Module
    names: Mapping[str, str]


Rule = Callable[[Layer, Tensor, Tensor, Sink], None]


def linear(layer: Layer, activations: Tensor, output_grads: Tensor, sink: Sink) -> None:
    """`y = x Wᵀ + b`: `dW = gᵀ x`, `db = Σ g`."""
    if "weight" in layer.names:
        sink.add_outer(layer.names["weight"], output_grads, activations)
    if "bias" in layer.names:
        sink.add_sum(layer.names["bias"], output_grads)


def conv1d(layer: Layer, activations: Tensor, output_grads: Tensor, sink: Sink) -> None:
    """GPT-2's `y = x W + b`: `dW = xᵀ g`, `db = Σ g`."""
    if "weight" in layer.names:
        sink.add_outer(layer.names["weight"], activations, output_grads)
    if "bias" in layer.names:
        sink.add_sum(layer.names["bias"], output_grads)


def embedding(layer: Layer, activations: Tensor, output_grads: Tensor, sink: Sink) -> None:
    """`y = s·W[ids]`: `dW[id] += s·g`. `activations` are the token ids, `(B, T)` or `(1, T)`."""
    module = layer.module
    assert isinstance(module, nn.Embedding)
    # Position ids have one row for the whole batch.
    ids = activations.expand(output_grads.shape[:-1])
    grads = output_grads.float() * _embed_scale(module)
    if module.padding_idx is not None:  # torch computes no gradient for this row
        is_token = (ids != module.padding_idx).unsqueeze(-1)
        grads = grads * is_token
    sink.add_rows(layer.names["weight"], ids, grads, module.num_embeddings)


def _embed_scale(module: nn.Embedding) -> float | Tensor:
    """The internal scale of Gemma (a tensor, rounded to the weight's dtype), BART and XGLM (a number)."""
    scale = getattr(module, "embed_scale", 1.0)
    if isinstance(scale, Tensor):
        return scale.to(module.weight.dtype).float()
    return float(scale)


def rms_norm(layer: Layer, activations: Tensor, output_grads: Tensor, sink: Sink) -> None:
    """`y = w·x̂` or `(1 + w)·x̂` with `x̂ = x / rms(x)`: `dw = Σ g·x̂` either way."""
    x = activations.float()
    norms = torch.linalg.vector_norm(x, dim=-1)
    mean_square = norms.square() / x.shape[-1]
    # 1 / rms is a weight of the sum, because normalising the activations would take another pass over memory.
    weights = torch.rsqrt(mean_square + (_epsilon(layer.module) or 0.0))
    sink.add_sum(layer.names["weight"], output_grads.float() * x, weights)


def layer_norm(layer: Layer, activations: Tensor, output_grads: Tensor, sink: Sink) -> None:
    """`y = w·x̂ + b` with `x̂ = (x - mean) / std`: `dw = Σ g·x̂`, `db = Σ g`."""
    module = layer.module
    assert isinstance(module, nn.LayerNorm)
    if "weight" in layer.names:
        x = nn.functional.layer_norm(activations.float(), module.normalized_shape, eps=module.eps)
        sink.add_sum(layer.names["weight"], output_grads.float() * x)
    if "bias" in layer.names:
        sink.add_sum(layer.names["bias"], output_grads)


_registered: dict[type[nn.Module], Rule] = {}


def register_rule(
    *module_classes: type[nn.Module],
    override: bool = False,
) -> Callable[[Rule], Rule]:
    """Decorator that registers a function as the rule for user-defined layers.

    The rule applies to modules of these classes, and of subclasses that do not override `forward`, if they are called
    with one tensor and return one. Autograd captures other uses of their parameters. The self-check compares the
    rule's result with the gradient of the trainer's own loss, as for built-in rules. Register a rule on every rank
    before the callback is created.

    ```python
    @register_rule(ChannelScale)
    def channel_scale(layer, activations, output_grads, sink):
        sink.add_sum(layer.names["weight"], output_grads.float() * activations.float())
    ```

    Args:
        module_classes (`type[torch.nn.Module]`): The layers' classes.
        override (`bool`, *optional*, defaults to `False`): Replace the existing rule of a class, built in or
            registered.

    Returns:
        callable: The decorator, which returns the function unchanged.

    Raises:
        `TypeError`: If no module class is given, or the decorated object cannot be called as a rule.
        `ValueError`: If a class has a rule, and `override` is not set.
    """
    if not module_classes:
        raise TypeError("register_rule() needs the class of a layer: register_rule(MyLayer).")
    for module_class in module_classes:
        _check_layer_class(module_class, override)

    def register(rule: Rule) -> Rule:
        _check_rule(rule)
        _registered.update(dict.fromkeys(module_classes, rule))
        return rule

    return register


def _check_layer_class(module_class: Any, override: bool) -> None:
    if not isinstance(module_class, type) or not issubclass(module_class, nn.Module):
        raise TypeError(
            f"register_rule({module_class!r}): give the class of a layer (a subclass of torch.nn.Module), as in "
            "@register_rule(MyLayer) above the rule."
        )
    rule = _registered.get(module_class) or built_in_rule(module_class)
    if rule is not None and not override:
        kind = "registered" if module_class in _registered else "built-in"
        raise ValueError(
            f"register_rule({module_class.__name__}): the layer already has the {kind} rule {_name_of(rule)!r}. "
            "Pass override=True to replace it."
        )


def _check_rule(rule: Any) -> None:
    """Raise a `TypeError` if an object cannot be called as a rule."""
    if callable(rule) and _takes_four_arguments(rule):
        return
    raise TypeError(
        f"{_name_of(rule)!r} is not a layer rule: a rule is a function (layer, activations, output_grads, sink) -> "
        "None (docs/exactness.md)."
    )


def _takes_four_arguments(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind("layer", "activations", "output_grads", "sink")
    except TypeError:
        return False
    return True


def _name_of(rule: Any) -> str:
    return getattr(rule, "__name__", repr(rule))


def registered_rule(module_class: type[nn.Module]) -> Rule | None:
    """The rule registered for a class, or for the class that it inherits `forward` from; `None` without one."""
    for owner in module_class.__mro__:
        if owner in _registered and owner.forward is module_class.forward:
            return _registered[owner]
    return None


def registered_rules(model: nn.Module) -> dict[str, Rule]:
    """The registered rules that apply to a model's layers, by class name, sorted by name."""
    classes = {type(module) for module in model.modules()}
    rules = {kind.__qualname__: registered_rule(kind) for kind in classes}
    return {name: rule for name, rule in sorted(rules.items()) if rule is not None}


def built_in_rule(module_class: type[nn.Module]) -> Rule | None:
    """The built-in rule for calls of a class, `None` without one; it may not apply to every module of the class.

    `forward` must be the known one, because a subclass that computes something else has another gradient.
    """
    name, forward = module_class.__name__, module_class.forward
    if issubclass(module_class, nn.Linear) and forward is nn.Linear.forward:
        return linear
    if issubclass(module_class, Conv1D) and forward is Conv1D.forward:
        return conv1d
    if issubclass(module_class, nn.Embedding):
        return embedding
    # LayerNorm1P is y = (1 + w)·x̂ + b and has the same gradients.
    known_norm = forward is nn.LayerNorm.forward or name.endswith("LayerNorm1P")
    if issubclass(module_class, nn.LayerNorm) and known_norm:
        return layer_norm
    # Each model family has its own RMSNorm class; they share the name, one weight vector and an epsilon.
    if name.endswith("RMSNorm"):
        return rms_norm
    return None


def find_rule(module: nn.Module, trainable: set[str]) -> Rule | None:
    """The rule for a module, or `None`.

    Args:
        module (`torch.nn.Module`): A module with its own trainable parameters.
        trainable (set of `str`): Their attribute names.
    """
    # An instance whose forward was replaced has another gradient. accelerate's wrapper, which only moves devices, is
    # identified by its hook.
    if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
        return None
    rule = registered_rule(type(module))
    if rule is not None:
        return rule
    rule = built_in_rule(type(module))
    return rule if _has_expected_form(module, trainable, rule) else None


def _has_expected_form(module: nn.Module, trainable: set[str], rule: Rule | None) -> bool:
    """Whether a module of a class with a built-in rule has the configuration that the rule assumes."""
    if rule is embedding:
        assert isinstance(module, nn.Embedding)
        changes_weight = module.max_norm is not None
        other_gradient = module.scale_grad_by_freq or module.sparse
        return trainable == {"weight"} and not changes_weight and not other_gradient
    if rule is layer_norm:
        assert isinstance(module, nn.LayerNorm)
        return len(module.normalized_shape) == 1
    if rule is rms_norm:
        has_epsilon = _epsilon(module) is not None
        return trainable == {"weight"} and has_epsilon and _is_rms_norm(module)
    return True


def _is_rms_norm(module: nn.Module) -> bool:
    """Whether a class of that name really computes RMSNorm: not over groups (Qwen4-Exp), nor anything else.

    A module that takes more than one tensor is checked at each call instead.
    """
    weight: Any = module.weight
    shape = getattr(weight, "ds_shape", weight.shape)  # ZeRO-3 stores the shape separately
    if len(shape) != 1:
        return False
    size, device = shape[0], weight.device
    x = torch.linspace(-1, 2, 2 * size, device=device).view(2, size) ** 3
    ramp = torch.linspace(1, 3, size, device=device)
    # Run its forward with other weights, without hooks and gathering. FSDP2 modules cannot be copied.
    alone = object.__new__(type(module))
    outputs = []
    for values in (torch.zeros_like(ramp), ramp):
        vars(alone).update(vars(module), _parameters={**module._parameters, "weight": values})
        try:
            outputs.append(type(module).forward(alone, x))
        except Exception:
            return True
    # The difference of the outputs is the difference of the weights times x̂, for both w·x̂ and (1 + w)·x̂.
    difference = (outputs[1] - outputs[0]).float()
    mean_square = x.square().mean(dim=-1, keepdim=True)
    normalised = x * torch.rsqrt(mean_square + (_epsilon(module) or 0.0))
    return torch.allclose(difference, ramp * normalised, rtol=1e-2, atol=1e-3)


def activations_of(
    module: nn.Module,
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    output: Tensor,
) -> Tensor | None:
    """The input tensor of a call that a rule needs, or `None` if the rule does not support the form of the call.

    Args:
        module (`torch.nn.Module`): A module with a rule.
        inputs (`tuple`): Positional arguments of the call.
        kwargs (mapping): Keyword arguments.
        output (`torch.Tensor`): The output of the call.
    """
    has_known_call = registered_rule(type(module)) is not None
    if isinstance(module, nn.Embedding) and not has_known_call and not _takes_ids(module):
        # Learned positions (OPT, BART, BioGPT) compute the ids internally in different ways; autograd stores them.
        lookup = output.grad_fn
        is_plain = lookup is not None and lookup.name() == "EmbeddingBackward0"
        return getattr(lookup, "_saved_indices", None) if is_plain else None
    arguments = [*inputs, *kwargs.values()]
    if len(arguments) == 1 and isinstance(arguments[0], Tensor):
        return arguments[0]
    return None


def _takes_ids(module: nn.Embedding) -> bool:
    return type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")


def _epsilon(module: nn.Module) -> float | None:
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return float(epsilon) if epsilon is not None else None


# ---- The head of a language model -----------------------------------------------------------------------------------
# Log-probabilities through the LM head, with the head's own gradient passed on instead of accumulated.
#
# TRL's fused head multiplies hidden states by the head's weight directly, so no hook on the head module fires. During
# capture [`CapturedLogProbs`] replaces it. It computes the same numbers in token chunks, and its backward pass gives
# each prompt's output gradients to the projection without forming a weight gradient of its own.
#
# Axes: `N` scored tokens, `H` hidden dimensions, `V` vocabulary.

# Maximum number of logits that are kept for the backward pass, or computed at once: 128 MiB in float32.
_MAX_LOGITS = 1 << 25


@dataclass(frozen=True)
class LogitTransform:
    """The transform of logits before the softmax in model and TRL: `softcap(scale · z) / temperature`.

    Args:
        scale (`float`): Factor of the architecture, 1 for most.
        softcap (`float`, *optional*): Gemma's `cap · tanh(z / cap)`.
        temperature (`float`): Sampling temperature.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __call__(self, logits: Tensor) -> Tensor:
        """Transformed logits."""
        logits = logits * self.scale if self.scale != 1.0 else logits
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits / self.temperature if self.temperature != 1.0 else logits

    def derivative(self, transformed: Tensor) -> Tensor | float:
        """Derivative of the transform at a point, computed from its value there."""
        slope = self.scale / self.temperature
        if self.softcap is None:
            return slope
        return slope * (1 - (transformed * self.temperature / self.softcap) ** 2)


@dataclass(frozen=True)
class HeadContext:
    """Non-tensor arguments of the head's backward pass.

    Args:
        transform (`LogitTransform`): Applied to the logits.
        segments (sequence of `slice`): The tokens of each prompt, in order, without gaps.
        on_gradient (callable): Called as `on_gradient(p, logit_grads, hidden)` with prompt number, `(r, V)` and
            `(r, H)`, at least once per prompt.
        materialised (callable): Context manager in which the weight is gathered (ZeRO-3 partitions it).
    """

    transform: LogitTransform
    segments: Sequence[slice]
    on_gradient: Callable[[int, Tensor, Tensor], None]
    materialised: Callable[[], AbstractContextManager[Any]]


class CapturedLogProbs(torch.autograd.Function):
    """Log-probabilities and entropies of target tokens; see the module."""

    @override
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        context: HeadContext,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        device = hidden.device.type
        dtype = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        )
        logps = torch.empty(len(hidden), device=hidden.device)
        entropies = torch.empty(len(hidden), device=hidden.device)
        # For few tokens, the softmax inputs are kept and not computed twice.
        keeps_logits = len(hidden) * len(weight) <= _MAX_LOGITS
        buffers: list[Tensor] = []
        for part in _chunks(slice(0, len(hidden)), len(weight)):
            logits = _logits(hidden[part], weight, bias, dtype, context.transform)
            log_p = logits.log_softmax(dim=-1)
            indices = targets[part].unsqueeze(-1)
            logps[part] = log_p.gather(-1, indices).squeeze(-1)
            entropies[part] = -(log_p.exp() * log_p).sum(dim=-1)
            if keeps_logits:
                # Without a softcap the gradient does not need the logits themselves.
                buffers.append(log_p if context.transform.softcap is None else logits)
        ctx.save_for_backward(hidden, weight, bias, targets, entropies, *buffers)
        ctx.context, ctx.dtype, ctx.keeps_logits = context, dtype, keeps_logits
        return logps, entropies

    @override
    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor | None, grad_entropies: Tensor | None) -> Any:
        hidden, weight, bias, targets, entropies, *buffers = ctx.saved_tensors
        context: HeadContext = ctx.context
        dtype, transform = ctx.dtype, context.transform
        grad_hidden = torch.zeros_like(hidden)
        with context.materialised():
            for p, segment in enumerate(context.segments):
                for part in _chunks(segment, len(weight)):
                    if ctx.keeps_logits:
                        logits = buffers[0][part]
                    else:
                        logits = _logits(hidden[part], weight, bias, dtype, transform)
                    if ctx.keeps_logits and transform.softcap is None:
                        log_p = logits  # kept from the forward pass
                    else:
                        log_p = logits.log_softmax(dim=-1)
                    grads = _logit_grads(
                        log_p, targets[part], grad_logps, grad_entropies, entropies, part
                    )
                    grads *= transform.derivative(logits)
                    context.on_gradient(p, grads, hidden[part])
                    grad_part = grads.to(dtype) @ weight.to(dtype)
                    grad_hidden[part] = grad_part.to(hidden.dtype)
        return grad_hidden, None, None, None, None


def _chunks(tokens: slice, vocabulary: int) -> list[slice]:
    step = max(1, _MAX_LOGITS // vocabulary)
    return [
        slice(start, min(start + step, tokens.stop))
        for start in range(tokens.start, tokens.stop, step)
    ]


def _logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    transform: LogitTransform,
) -> Tensor:
    bias = None if bias is None else bias.to(dtype)
    logits = nn.functional.linear(hidden.to(dtype), weight.to(dtype), bias)
    return transform(logits.float())


def _logit_grads(
    log_p: Tensor,
    targets: Tensor,
    grad_logps: Tensor | None,
    grad_entropies: Tensor | None,
    entropies: Tensor,
    part: slice,
) -> Tensor:
    """Gradient with respect to the transformed logits, `(r, V)`.

    `∂ log p_t / ∂z_j = [j = t] - p_j`; `∂H / ∂z_j = -p_j (log p_j + H)`.
    """
    p = log_p.exp()
    if grad_logps is None:
        grads = torch.zeros_like(p)
    else:
        of_target = grad_logps[part].unsqueeze(-1)
        grads = p * -of_target
        grads.scatter_add_(-1, targets.unsqueeze(-1), of_target.to(grads))
    if grad_entropies is not None:
        of_entropy = grad_entropies[part].unsqueeze(-1)
        grads -= of_entropy * p * (log_p + entropies[part].unsqueeze(-1))
    return grads
