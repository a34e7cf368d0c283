"""Per-prompt gradient features from one forward and one backward pass over several prompts.

A forward hook on each module with trainable parameters keeps its input. A tensor hook on its output receives the
output gradient, forms each prompt's weight gradient over all tokens of its rollouts, projects it and frees it. The
backward pass starts and ends at activations (log-probabilities and embedding outputs). Nothing accumulates into
parameters, autograd skips the weight gradients, and gradients never mix across ranks, whatever wraps the model. Hooks
are removed when the context ends, also after an exception.

The graph of each pass shows which parameter uses the hooks account for ([`walk`]). A parameter with any other use is
left entirely to autograd in that pass, which then holds one prompt; the hooks add nothing for it.

Axes: `P` prompts, `G` rollouts each, `B = P·G` rows, `L` tokens of a padded row, `C` completion tokens, `D` features.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from trl_learnalign.gradients.layers import (
    CapturedLogProbs,
    HeadContext,
    Layer,
    LogitTransform,
    RowsLostError,
    Rule,
    Sink,
    activations_of,
    find_rule,
)
from trl_learnalign.gradients.projection import Projection

# ---- Parameters that layer rules account for ------------------------------------------------------------------------
# A parameter may be used by its layer's own call, which a rule handles, and in other places: by a fused kernel that
# uses the weight without calling the module, by a layer without a rule, or by a second layer that it is tied to.
# Module names do not reveal this, but the graph of the pass does. Walking the graph also finds where the backward pass
# has to end so that it runs through every call with a rule.


@dataclass(eq=False)
class Call:
    """One call of a layer whose parameter gradients are computed by a rule.

    Args:
        names (mapping of `int` to `str`): Canonical names of its trainable parameters by `id` of the tensor used.
        output (`GradientEdge`): Where the call's graph begins, seen from the loss.
        input (`Node`, *optional*): Where it ends; `None` if the layer's input needs no gradient.
    """

    names: Mapping[int, str]
    output: GradientEdge
    input: Node | None

    @classmethod
    def of(cls, names: Mapping[int, str], activations: Tensor, output: Tensor) -> Call:
        """The call that computed `output`, which needs a gradient, from `activations`."""
        start = get_gradient_edge(activations).node if activations.requires_grad else None
        return cls(names, get_gradient_edge(output), start)


@dataclass
class Reached:
    """What the backward pass from some outputs would reach.

    Args:
        calls (`list[Call]`): Calls with a rule.
        ends (`list[GradientEdge]`): Outputs of calls behind which there are only their own parameters.
        leaves (`list[Tensor]`): Leaves that are not parameters of a call with a rule, each once.
    """

    calls: list[Call] = field(default_factory=list)
    ends: list[GradientEdge] = field(default_factory=list)
    leaves: list[Tensor] = field(default_factory=list)


def walk(outputs: Sequence[Tensor], calls: Sequence[Call]) -> Reached:
    """Walk the graph of `outputs`.

    Args:
        outputs (sequence of `torch.Tensor`): Where the backward pass starts.
        calls (sequence of [`Call`]): Calls with a rule.

    Returns:
        [`Reached`]: A leaf is listed if some path to it goes through no call that it belongs to, so that the rules do
        not compute all of its gradient.
    """
    by_output = {call.output.node: call for call in calls}
    reached = Reached()
    leaves: dict[int, Tensor] = {}
    with_input: set[Call] = set()
    # A node inside a call and the same node outside are different states: autocast makes one copy of a tied weight.
    places: set[tuple[Node, Call | None]] = {
        (output.grad_fn, None) for output in outputs if output.grad_fn is not None
    }
    stack = list(places)
    while stack:
        node, inside = stack.pop()
        if inside is None and node in by_output:
            inside = by_output[node]
            reached.calls.append(inside)
        leaf = leaf_of(node)
        if leaf is not None and (inside is None or id(leaf) not in inside.names):
            leaves[id(leaf)] = leaf
        for following, _ in node.next_functions:
            if following is None:
                continue
            place = (following, inside)
            if inside is not None and following is inside.input:
                with_input.add(inside)
                place = (following, None)
            if place not in places:
                places.add(place)
                stack.append(place)
    reached.ends = [call.output for call in reached.calls if call not in with_input]
    reached.leaves = list(leaves.values())
    return reached


def leaf_of(node: Node) -> Tensor | None:
    """The leaf that a node accumulates into, if any."""
    return getattr(node, "variable", None) if node.name().endswith("AccumulateGrad") else None


# ---- Capture --------------------------------------------------------------------------------------------------------

# Float16 loses gradients below 6e-8 and above 65,504, and the coefficients of a long rollout are small. They are
# scaled to this power of two for the backward pass. Gradients within the model are mostly smaller, in the first layers
# larger; if one overflows, the pass is repeated with the next exponent.
_HALF_EXPONENTS = (3, -3, -9)


@dataclass(frozen=True)
class TokenBatch:
    """Padded rollouts of `P` prompts; the rows of one prompt are contiguous.

    Args:
        input_ids (`torch.Tensor`): `(B, L)`: prompt padded on the left, completion on the right.
        attention_mask (`torch.Tensor`): `(B, L)`.
        completion_length (`int`): C, the last tokens of each row.
        prompts (`int`): P.
        parts (`int`, *optional*, defaults to `1`): Number of contiguous parts of equal size into which each prompt's
            rows are divided; each part has its own feature, and the features sum to the prompt's.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_length: int
    prompts: int
    parts: int = 1

    @property
    def segments(self) -> int:
        """Number of features of the batch, `P · parts`."""
        return self.prompts * self.parts

    @property
    def scored(self) -> Tensor:
        """`(B, L - 1)` bool: positions whose next token is a completion token."""
        is_scored = self.attention_mask[:, 1:].bool().clone()
        is_scored[:, : -self.completion_length] = False
        return is_scored


@dataclass
class Coverage:
    """Which trainable parameters the features contain.

    Args:
        covered (`list[str]`): Parameters covered by a layer rule in every pass.
        direct (`list[str]`): Parameters whose gradient autograd computed, one prompt at a time, because in some pass
            no rule covered all of their uses.
        missing (`list[str]`): Parameters that are not contained, or not in every pass: without a rule, and sharded so
            that autograd cannot be used.
        sizes (`dict[str, int]`): Number of elements of every trainable parameter.
        unfired (`list[str]`): Parameters of `direct` and `missing` whose module has a rule. The module was not called
            in the way that the rule supports, or its parameters are also used outside it.
    """

    covered: list[str] = field(default_factory=list)
    direct: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    unfired: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Share of the trainable elements that the features contain."""
        missing = sum(self.sizes[name] for name in self.missing)
        return 1 - missing / max(1, sum(self.sizes.values()))

    def summary(self) -> dict[str, Any]:
        """For the record: the share, and the names that were not captured by rules."""
        return {
            "share": self.share,
            "direct": self.direct,
            "missing": self.missing,
            "unfired": self.unfired,
        }


LogProbs = Callable[[TokenBatch], tuple[Tensor, Tensor]]
Objective = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor | None]]


class GradientCapture:
    """Context manager that computes gradient features of token batches.

    ```python
    with GradientCapture(model, projection, log_probs) as capture:
        features = capture.features(batch, objective)  # (P, D)
    ```

    Args:
        model (`torch.nn.Module`): The model that `log_probs` runs, in evaluation mode, without wrappers that change
            parameter names.
        projection (`Projection`): Projects each weight gradient.
        log_probs (callable): The trainer's log-probabilities and entropies of the completion tokens,
            `TokenBatch -> ((B, C), (B, C))`, with a graph.
        head_weight (`torch.nn.Parameter`, *optional*): Weight of the LM head; its gradient comes through
            [`head_log_probs`] if the trainer's head is fused.
        head_bias (`torch.nn.Parameter`, *optional*): Bias of the LM head.
        materialised (callable, *optional*): Context manager in which sharded head weights are gathered.
        sharded (`bool`, *optional*, defaults to `False`): Whether parameters are sharded over ranks, so that autograd
            cannot compute gradients with respect to them.
    """

    def __init__(
        self,
        model: nn.Module,
        projection: Projection,
        log_probs: LogProbs,
        *,
        head_weight: nn.Parameter | None = None,
        head_bias: nn.Parameter | None = None,
        materialised: Callable[[], AbstractContextManager[Any]] = nullcontext,
        sharded: bool = False,
    ):
        self.model = model
        self.projection = projection
        self.log_probs = log_probs
        self.materialised = materialised
        self.sharded = sharded
        # Tied parameters are listed once, under their first (canonical) name.
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        names = {id(p): name for name, p in self._parameters.items()}
        self._head_names = tuple(names.get(id(p)) for p in (head_weight, head_bias))
        self.coverage = Coverage(
            sizes={name: full_numel(p) for name, p in self._parameters.items()}
        )
        layers = [Layer(module, _trainable_names(module, names)) for module in model.modules()]
        self._rules = [
            (layer, find_rule(layer.module, set(layer.names))) for layer in layers if layer.names
        ]
        self._without_rule = set(self._parameters) - set(self._head_names)
        for layer, rule in self._rules:
            if rule is not None:
                self._without_rule.difference_update(layer.names.values())
        # Each pass determines what autograd has to compute. Without autograd, missing ones are known here.
        self._note(self.coverage.missing, self._without_rule if sharded else ())
        self.one_prompt_at_a_time = False
        # A rollout's gradient then depends on the other rows of its pass, so a prompt's rows are kept together.
        self.whole_prompts = any(
            getattr(layer.module, "scale_grad_by_freq", False) for layer, _ in self._rules
        )
        self._exit = ExitStack()
        self._pass: _Pass | None = None

    def _note(self, kind: list[str], names: Iterable[str]) -> None:
        """Record names that rules did not cover under `coverage.direct` or `coverage.missing`."""
        coverage = self.coverage
        kind.extend(sorted(set(names) - set(kind)))
        uncovered = {*coverage.direct, *coverage.missing}
        coverage.covered = [name for name in self._parameters if name not in uncovered]
        with_rule = uncovered - self._without_rule
        coverage.unfired = [name for name in self._parameters if name in with_rule]

    def __enter__(self) -> GradientCapture:
        with ExitStack() as stack:
            for layer, rule in self._rules:
                hook = self._hook(layer, rule)
                handle = layer.module.register_forward_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            # Only after all registrations succeeded; on failure the stack removes the earlier hooks.
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._pass = None
        self.projection.release()
        self._exit.close()

    @property
    def is_recording(self) -> bool:
        """Whether the current forward pass is captured."""
        return self._pass is not None

    def _hook(self, layer: Layer, rule: Rule | None) -> Callable[..., None]:
        def keep(
            module: nn.Module,
            inputs: tuple[Any, ...],
            kwargs: dict[str, Any],
            output: Any,
        ) -> None:
            if self._pass is None or not isinstance(output, Tensor):
                return
            if rule is not None and not self._pass.sink.keeps_rows(output):
                self._pass.mixed.update(layer.names.values())
            if not output.requires_grad:
                return
            # Under FSDP2 these tensors are not the parameters that the model lists.
            names = {
                id(getattr(module, attribute)): name for attribute, name in layer.names.items()
            }
            self._pass.names.update(names)
            activations = None if rule is None else activations_of(module, inputs, kwargs, output)
            if rule is None or activations is None:
                return
            self._pass.half |= output.dtype == torch.float16
            self._pass.calls.append(Call.of(names, activations, output))
            project = _projecting(rule, layer, activations.detach(), self._pass.sink)
            output.register_hook(project)

        return keep

    def head_log_probs(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: LogitTransform,
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of a fused head, with the head's gradient captured.

        Args:
            hidden (`torch.Tensor`): `(N, H)`: all `B·(L-1)` positions or the scored ones only, in row order.
            weight (`torch.Tensor`): `(V, H)`.
            bias (`torch.Tensor`, *optional*): `(V,)`.
            targets (`torch.Tensor`): `(N,)`.
            transform (`LogitTransform`): Applied to the logits.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Log-probabilities and entropies, `(N,)` each; 0 where not scored.
        """
        assert self._pass is not None
        batch = self._pass.batch
        segments = _segments_of_scored(batch)
        context = HeadContext(transform, segments, self._add_head_gradient, self.materialised)
        if not hidden.requires_grad:
            # Only the head is trained, and the backward pass ends before it.
            hidden = hidden.detach().requires_grad_()
        is_scored = _scored_positions(batch, len(hidden))
        if is_scored is None:
            logps, entropies = CapturedLogProbs.apply(hidden, weight, bias, targets, context)
            self._keep_head_call(weight, bias, hidden, logps)
            return logps, entropies
        is_scored = is_scored.to(hidden.device)
        inputs, targets = hidden[is_scored], targets[is_scored]
        logps, entropies = CapturedLogProbs.apply(inputs, weight, bias, targets, context)
        self._keep_head_call(weight, bias, inputs, logps)
        zeros = hidden.new_zeros(len(hidden), dtype=logps.dtype)
        return zeros.masked_scatter(is_scored, logps), zeros.masked_scatter(is_scored, entropies)

    def _keep_head_call(
        self,
        weight: Tensor,
        bias: Tensor | None,
        hidden: Tensor,
        logps: Tensor,
    ) -> None:
        assert self._pass is not None
        if not logps.requires_grad:
            return
        # Under FSDP2 the weight comes from a gather, whose graph ends at the parameter.
        self._pass.half |= hidden.dtype == torch.float16
        pairs = zip((weight, bias), self._head_names, strict=True)
        names = {_leaf_id(p): name for p, name in pairs if p is not None and name is not None}
        self._pass.calls.append(Call.of(names, hidden, logps))

    def _add_head_gradient(self, p: int, logit_grads: Tensor, hidden: Tensor) -> None:
        weight, bias = self._head_names
        if self._pass is None or (weight is None and bias is None):
            return
        out = self._pass.sink.out[p : p + 1]
        if weight is not None:
            rows, columns = logit_grads.unsqueeze(0), hidden.detach().unsqueeze(0)
            self.projection.add_outer(out, weight, rows, columns)
        if bias is not None:
            gradient = logit_grads.float().sum(dim=0, keepdim=True)
            self.projection.add_dense(out, bias, gradient)

    def features(self, batch: TokenBatch, objective: Objective) -> Tensor:
        """Projected gradient of each prompt's objective.

        Args:
            batch (`TokenBatch`): Rollouts of P prompts.
            objective (callable): `(p, logps, entropies) -> (d objective / d logps, d objective / d entropies)` for
                prompt number `p`, with `(G, C)` tensors.

        Returns:
            `torch.Tensor`: `(P · parts, D)` float32 on the model's device.

        Raises:
            `RowsLostError`: If a layer mixes the rows of several prompts or parts; call again with one a batch.
        """
        for exponent in _HALF_EXPONENTS:
            features, half = self._attempt(_with_odd_shape(batch), objective, exponent)
            # With sharded parameters, a further pass on this rank alone would make the others hang.
            if not half or self.sharded or torch.isfinite(features).all():
                break
        return features

    def rows_lost(self, batch: TokenBatch) -> list[str]:
        """Names of parameters whose layers mix the rows of several prompts; takes one forward pass.

        Args:
            batch (`TokenBatch`): Two prompts or more.
        """
        with self._recording(_with_odd_shape(batch)) as current, torch.no_grad():
            self.log_probs(current.batch)
            return sorted(current.mixed)

    def _attempt(
        self,
        batch: TokenBatch,
        objective: Objective,
        exponent: int,
    ) -> tuple[Tensor, bool]:
        """One forward and one backward pass: the features, and whether any layer computed in float16."""
        with self._recording(batch) as current, torch.enable_grad():
            logps, entropies = self.log_probs(batch)
            outputs, grads = self._output_gradients(batch, logps, entropies, objective)
            reached = walk(outputs, current.calls)
            direct, leaves = self._share_out(current, reached)
            scales = _half_scales(grads, batch.segments, exponent) if current.half else None
            ends: list[Any] = [*direct.values(), *leaves, *reached.ends]
            gradients: Sequence[Tensor | None] = ()
            if ends:
                scaled = _scaled(grads, scales)
                # Cast to the outputs' type only after scaling, because float16 would lose small values.
                starts = [grad.to(output) for grad, output in zip(scaled, outputs, strict=True)]
                gradients = torch.autograd.grad(outputs, ends, starts, allow_unused=True)
            # The gradients of `direct` come first; the hooks have processed all others.
            for name, gradient in zip(direct, gradients, strict=False):
                if gradient is not None:
                    gradient = gradient.to_dense() if gradient.is_sparse else gradient
                    self.projection.add_dense(current.sink.out, name, gradient.unsqueeze(0))
        features = current.sink.out
        if scales is not None:
            features = features / scales.unsqueeze(-1)
        return features, current.half

    def _share_out(
        self,
        current: _Pass,
        reached: Reached,
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Parameters for autograd, and other leaves that end the backward pass.

        Raises:
            `RowsLostError`: If the pass holds several prompts, and autograd or a layer cannot separate them.
        """
        names = {id(p): name for name, p in self._parameters.items()} | current.names
        outside = {names[id(leaf)]: leaf for leaf in reached.leaves if id(leaf) in names}
        others = [leaf for leaf in reached.leaves if id(leaf) not in names]
        mixed = current.mixed if current.batch.segments > 1 else set()
        if self.sharded:
            # Autograd cannot compute a gradient with respect to a shard, and a pass on this rank alone would make the
            # others hang.
            self._note(self.coverage.missing, {*outside, *mixed, *self._uncalled(current, others)})
            current.sink.left_out |= set(self.coverage.missing)
            return {}, [leaf for leaf in others if not isinstance(leaf, nn.Parameter)]
        if current.batch.segments > 1 and (outside or mixed):
            parameters = sorted({*outside, *mixed})
            raise RowsLostError(f"the gradients of {parameters} cannot be separated by prompt")
        self._note(self.coverage.direct, outside)
        current.sink.left_out |= set(outside)
        return outside, others

    def _uncalled(self, current: _Pass, leaves: list[Tensor]) -> set[str]:
        """If parameters are gathered for use: those of modules never called, if one of them is among the leaves."""
        if not any(isinstance(leaf, nn.Parameter) for leaf in leaves):
            return set()
        return set(self._parameters) - set(current.names.values()) - set(self._head_names)

    @contextmanager
    def _recording(self, batch: TokenBatch) -> Iterator[_Pass]:
        out = torch.zeros(batch.segments, self.projection.dim, device=batch.input_ids.device)
        self._pass = _Pass(batch, Sink(self.projection, out, len(batch.input_ids)))
        try:
            yield self._pass
        finally:
            self._pass = None

    def _output_gradients(
        self,
        batch: TokenBatch,
        logps: Tensor,
        entropies: Tensor,
        objective: Objective,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs from which the backward pass starts, with the gradients of the sum of all prompts' objectives."""
        rollouts = len(logps) // batch.prompts
        of_logps, of_entropies = [], []
        for p in range(batch.prompts):
            rows = slice(p * rollouts, (p + 1) * rollouts)
            for_logps, for_entropies = objective(p, logps[rows].detach(), entropies[rows].detach())
            of_logps.append(for_logps)
            of_entropies.append(for_entropies)
        outputs, grads = [logps], [torch.cat(of_logps)]
        if entropies.requires_grad and any(grad is not None for grad in of_entropies):
            pairs = zip(of_entropies, of_logps, strict=True)
            whole = [torch.zeros_like(like) if grad is None else grad for grad, like in pairs]
            outputs.append(entropies)
            grads.append(torch.cat(whole))
        return outputs, grads


@dataclass
class _Pass:
    """Intermediate results of one forward pass for its backward pass."""

    batch: TokenBatch
    sink: Sink
    calls: list[Call] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    mixed: set[str] = field(default_factory=set)
    half: bool = False


def _trainable_names(module: nn.Module, names: Mapping[int, str]) -> dict[str, str]:
    """Canonical names of a module's own parameters by attribute, for those whose `id` is in `names`."""
    parameters = module.named_parameters(recurse=False, remove_duplicate=False)
    return {attribute: names[id(p)] for attribute, p in parameters if id(p) in names}


def _projecting(rule: Rule, layer: Layer, activations: Tensor, sink: Sink) -> Callable[[Any], None]:
    """A tensor hook; it must not reference the graph, because the graph references the hook."""
    parameters = set(layer.names.values())

    def project(output_grads: Tensor | None) -> None:
        if output_grads is not None and not parameters <= sink.left_out:
            rule(layer, activations, output_grads.detach(), sink)

    return project


def _leaf_id(tensor: Tensor) -> int:
    """`id` of the leaf that a tensor is, or is derived from by a chain of single-input nodes."""
    node = tensor.grad_fn
    while node is not None:
        if (leaf := leaf_of(node)) is not None:
            return id(leaf)
        node = node.next_functions[0][0] if node.next_functions else None
    return id(tensor)


def _segments_of_scored(batch: TokenBatch) -> list[slice]:
    """The positions of each segment's tokens among all scored ones, in row order."""
    counts = batch.scored.sum(dim=1)
    ends = counts.view(batch.segments, -1).sum(dim=1).cumsum(0).tolist()
    return [slice(start, end) for start, end in itertools.pairwise([0, *ends])]


def _scored_positions(batch: TokenBatch, count: int) -> Tensor | None:
    """`(count,)` bool: which of the positions that the head sees are scored; `None` if it sees only these.

    Raises:
        `ValueError`: If the head sees neither these nor all positions.
    """
    is_scored = batch.scored
    if count == int(is_scored.sum()):
        return None
    rows, length = is_scored.shape
    # Prompt tuning prepends virtual tokens to each row.
    virtual = count // rows - length
    if count % rows or virtual < 0:
        raise ValueError(
            f"The LM head receives {count} positions, but {rows} rows of {length} tokens have "
            f"{int(is_scored.sum())} scored tokens: trl_learnalign cannot match positions with tokens in this model."
        )
    return nn.functional.pad(is_scored, (virtual, 0)).flatten()


def _with_odd_shape(batch: TokenBatch) -> TokenBatch:
    """Add a column of padding to a square batch, whose time-first and batch-first layers would look alike."""
    ids, mask = batch.input_ids, batch.attention_mask
    if batch.segments == 1 or ids.shape[0] != ids.shape[1]:
        return batch
    ids = torch.cat([ids[:, :1], ids], dim=1)
    mask = nn.functional.pad(mask, (1, 0))
    return replace(batch, input_ids=ids, attention_mask=mask)


def _half_scales(grads: list[Tensor], segments: int, exponent: int) -> Tensor:
    """Power of two for each segment that brings its largest coefficient between `2^exponent` and twice that."""
    maxima = [grad.float().abs().reshape(segments, -1).amax(dim=1) for grad in grads]
    largest = torch.stack(maxima).amax(dim=0)
    scales = torch.exp2(exponent - torch.floor(torch.log2(largest)))
    # A segment without a gradient has no exponent.
    return torch.where(torch.isfinite(scales), scales, 1.0)


def _scaled(grads: list[Tensor], scales: Tensor | None) -> list[Tensor]:
    if scales is None:
        return grads
    scaled = []
    for grad in grads:
        rows = len(grad) // len(scales)
        scaled.append(grad * scales.repeat_interleave(rows).unsqueeze(-1))
    return scaled


def full_numel(parameter: Tensor) -> int:
    """Number of elements of a parameter, also if DeepSpeed ZeRO-3 has partitioned it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
