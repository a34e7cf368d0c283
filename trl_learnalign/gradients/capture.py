"""Per-prompt gradient features from one forward and one backward pass over several prompts.

A forward hook on each module with trainable parameters keeps its input; a tensor hook on its output receives the
output gradient, forms each prompt's weight gradient over all tokens of its rollouts, projects it and lets it go. The
backward pass starts and ends at activations (log-probabilities and embedding outputs): nothing accumulates into
parameters, autograd skips the weight gradients by itself, and gradients never mix across ranks, whatever wraps the
model. Hooks are gone when the context ends, also after an exception.

Axes: `P` prompts, `G` rollouts each, `B = P·G` rows, `L` tokens of a padded row, `C` completion tokens, `D` features.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from trl_learnalign.gradients.head import CapturedLogProbs, HeadContext, LogitTransform
from trl_learnalign.gradients.layers import Layer, RowsLostError, Rule, Sink, find_rule
from trl_learnalign.gradients.sketch import Projection

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenBatch:
    """Padded rollouts of `P` prompts, the rows of one prompt together.

    Args:
        input_ids (`torch.Tensor`): `(B, L)`: prompt padded on the left, completion on the right.
        attention_mask (`torch.Tensor`): `(B, L)`.
        completion_length (`int`): C, the last tokens of each row.
        prompts (`int`): P.
        parts (`int`, *optional*, defaults to `1`): Parts into which each prompt's rows are cut, one after the other
            and equally long; each has a feature of its own, and they add up to the prompt's.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    completion_length: int
    prompts: int
    parts: int = 1

    @property
    def segments(self) -> int:
        """How many features the batch gives, `P · parts`."""
        return self.prompts * self.parts

    @property
    def scored(self) -> torch.Tensor:
        """`(B, L - 1)` bool: positions whose next token is a completion token."""
        scored = self.attention_mask[:, 1:].bool().clone()
        scored[:, : -self.completion_length] = False
        return scored


@dataclass
class Coverage:
    """Which trainable parameters the features contain.

    Args:
        covered (`list[str]`): By a layer rule.
        direct (`list[str]`): By autograd itself, one prompt at a time: no rule covers them.
        missing (`list[str]`): Not at all (no rule, and sharded so that autograd cannot help).
        sizes (`dict[str, int]`): Entries of every trainable parameter.
        unfired (`list[str]`): Modules with a rule that the forward pass never called.
    """

    covered: list[str] = field(default_factory=list)
    direct: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    unfired: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Share of the trainable entries that the features contain."""
        missing = sum(self.sizes[name] for name in self.missing)
        return 1 - missing / max(1, sum(self.sizes.values()))

    def summary(self) -> dict[str, Any]:
        """For the record: the share, and the names that were not captured in the usual way."""
        return {"share": self.share, "direct": self.direct, "missing": self.missing, "unfired": self.unfired}


LogProbs = Callable[[TokenBatch], tuple[torch.Tensor, torch.Tensor]]
Objective = Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]


class GradientCapture:
    """Context manager that turns token batches into gradient features.

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
        materialised (callable, *optional*): Context manager in which partitioned head weights are whole.
        sharded (`bool`, *optional*, defaults to `False`): Parameters are partitioned over ranks, so gradients with
            respect to them cannot be asked from autograd.
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
        # Tied parameters are listed once, under their first name: the canonical one.
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        names = {id(p): name for name, p in self._parameters.items()}
        self._head_names = tuple(names.get(id(p)) for p in (head_weight, head_bias))
        self.coverage = Coverage(sizes={name: full_numel(p) for name, p in self._parameters.items()})
        self._layers = self._find_layers(names)
        self.one_prompt_at_a_time = bool(self.coverage.direct)
        self._exit = ExitStack()
        self._fired: set[nn.Module] = set()
        self._probed = False
        self._sink: Sink | None = None
        self._batch: TokenBatch | None = None
        self._leaves: list[torch.Tensor] = []

    def _find_layers(self, names: dict[int, str]) -> list[tuple[Layer, Rule | None]]:
        layers: list[tuple[Layer, Rule | None]] = []
        without_rule: set[str] = set()
        for module in self.model.modules():
            own = {
                attribute: names[id(p)]
                for attribute, p in module.named_parameters(recurse=False)
                if p.requires_grad and id(p) in names
            }
            rule = find_rule(module, set(own)) if own else None
            if own and rule is None:
                without_rule |= set(own.values())
            # Frozen embeddings have no gradient, but the backward pass ends at their output.
            if rule is not None or isinstance(module, nn.Embedding):
                layers.append((Layer(module, own), rule))
        self._set_uncovered(sorted(without_rule))
        return layers

    def _set_uncovered(self, uncovered: Sequence[str]) -> None:
        known = set(self.coverage.direct) | set(self.coverage.missing)
        (self.coverage.missing if self.sharded else self.coverage.direct).extend(
            n for n in uncovered if n not in known
        )
        known |= set(uncovered)
        self.coverage.covered = [name for name in self._parameters if name not in known]

    def __enter__(self) -> GradientCapture:
        with ExitStack() as stack:
            for layer, rule in self._layers:
                stack.callback(layer.module.register_forward_hook(self._hook(layer, rule)).remove)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._sink = self._batch = None
        self._leaves = []
        self.projection.release()
        self._exit.close()

    @property
    def is_recording(self) -> bool:
        """Whether the forward pass under way is captured."""
        return self._sink is not None

    def _hook(self, layer: Layer, rule: Rule | None) -> Callable[..., torch.Tensor | None]:
        is_embedding = isinstance(layer.module, nn.Embedding)

        def keep(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
            if self._sink is None:
                return None
            self._fired.add(module)
            if is_embedding:
                output = output.detach().requires_grad_()
                self._leaves.append(output)
            if rule is not None and output.requires_grad:
                sink, activations = self._sink, inputs[0].detach()

                def project(output_grads: torch.Tensor) -> None:
                    rule(layer, activations, output_grads.detach(), sink)

                output.register_hook(project)
            return output if is_embedding else None

        return keep

    def head_log_probs(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        transform: LogitTransform,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a fused head computes, with the head's gradient captured.

        Args:
            hidden (`torch.Tensor`): `(N, H)`: all `B·(L-1)` positions or the scored ones only, in row order.
            weight (`torch.Tensor`): `(V, H)`.
            bias (`torch.Tensor`, *optional*): `(V,)`.
            targets (`torch.Tensor`): `(N,)`.
            transform (`LogitTransform`): Applied to the logits.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Log-probabilities and entropies, `(N,)` each; 0 where not scored.
        """
        assert self._batch is not None
        scored = self._batch.scored
        flat = scored.flatten().to(hidden.device)
        every_position = len(hidden) == len(flat)
        ends = scored.sum(dim=1).view(self._batch.segments, -1).sum(dim=1).cumsum(0).tolist()
        segments = [slice(start, end) for start, end in itertools.pairwise([0, *ends])]
        context = HeadContext(transform, segments, self._add_head_gradient, self.materialised)
        if not every_position:
            return CapturedLogProbs.apply(hidden, weight, bias, targets, context)
        logps, entropies = CapturedLogProbs.apply(hidden[flat], weight, bias, targets[flat], context)
        zeros = hidden.new_zeros(len(hidden), dtype=logps.dtype)
        return zeros.masked_scatter(flat, logps), zeros.masked_scatter(flat, entropies)

    def _add_head_gradient(self, p: int, logit_grads: torch.Tensor, hidden: torch.Tensor) -> None:
        weight, bias = self._head_names
        if self._sink is None or (weight is None and bias is None):
            return
        out = self._sink.out[p : p + 1]
        if weight is not None:
            self.projection.add_outer(out, weight, logit_grads.unsqueeze(0), hidden.detach().unsqueeze(0))
        if bias is not None:
            self.projection.add_dense(out, bias, logit_grads.float().sum(dim=0, keepdim=True))

    def features(self, batch: TokenBatch, objective: Objective) -> torch.Tensor:
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
        device = batch.input_ids.device
        sink = Sink(self.projection, torch.zeros(batch.segments, self.projection.dim, device=device))
        with self._recording(batch, sink), torch.enable_grad():
            logps, entropies = self.log_probs(batch)
            self._check_fired()
            direct = [self._parameters[name] for name in self.coverage.direct]
            if direct and batch.segments > 1:
                raise RowsLostError(f"{self.coverage.direct} have no layer rule")
            outputs, grads = self._output_gradients(batch, logps, entropies, objective)
            gradients = torch.autograd.grad(outputs, [*direct, *self._leaves], grads, allow_unused=True)
        for name, gradient in zip(self.coverage.direct, gradients[: len(direct)], strict=True):
            if gradient is not None:
                self.projection.add_dense(sink.out, name, gradient.unsqueeze(0))
        return sink.out

    @contextmanager
    def _recording(self, batch: TokenBatch, sink: Sink) -> Iterator[None]:
        self._batch, self._sink, self._leaves = batch, sink, []
        try:
            yield
        finally:
            self._batch, self._sink, self._leaves = None, None, []

    def _output_gradients(
        self, batch: TokenBatch, logps: torch.Tensor, entropies: torch.Tensor, objective: Objective
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Outputs to start the backward pass from, with the gradients of the sum of all prompts' objectives."""
        rows = len(logps) // batch.prompts
        parts = []
        for p in range(batch.prompts):
            own = slice(p * rows, (p + 1) * rows)
            parts.append(objective(p, logps[own].detach(), entropies[own].detach()))
        outputs, grads = [logps], [torch.cat([part[0] for part in parts]).to(logps)]
        if entropies.requires_grad and any(part[1] is not None for part in parts):
            outputs.append(entropies)
            grads.append(torch.cat([_or_zeros(part[1], part[0]) for part in parts]).to(entropies))
        return outputs, grads

    def _check_fired(self) -> None:
        """After the first forward pass: parameters of modules that were never called have no gradient from a hook."""
        if self._probed:
            return
        self._probed = True
        quiet = [layer for layer, rule in self._layers if rule is not None and layer.module not in self._fired]
        by_head = {name for name in self._head_names if name is not None}
        heard = {name for layer, _ in self._layers if layer.module in self._fired for name in layer.names.values()}
        lost = sorted({name for layer in quiet for name in layer.names.values()} - by_head - heard)
        if lost:
            self.coverage.unfired = lost
            self._set_uncovered(lost)
            self.one_prompt_at_a_time = bool(self.coverage.direct)


def full_numel(parameter: torch.Tensor) -> int:
    """Entries of a parameter, also where DeepSpeed ZeRO-3 has partitioned it away."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _or_zeros(gradient: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like) if gradient is None else gradient
