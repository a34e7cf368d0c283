"""Which parameters of a forward pass the layer rules account for, read off the autograd graph.

A parameter may be used by a layer's own call, which a rule knows, and anywhere else: by a fused kernel that takes the
weight without calling the module, by a layer without a rule, by a second layer that it is tied to. Names of modules do
not tell; the graph of the pass does. Walking it also finds where the backward pass has to end so that it runs through
every call with a rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge


@dataclass(eq=False)
class Call:
    """One call of a layer whose parameters' gradients come from a rule.

    Args:
        names (mapping of `int` to `str`): Canonical names of its trainable parameters by `id` of the tensor used.
        output (`GradientEdge`): Where the graph of the call begins, seen from the loss.
        input (`Node`, *optional*): Where it ends; `None` if the layer's input needs no gradient.
    """

    names: Mapping[int, str]
    output: GradientEdge
    input: Node | None

    @classmethod
    def of(cls, names: Mapping[int, str], activations: Tensor, output: Tensor) -> Call:
        """The call that made `output`, which needs a gradient, of `activations`."""
        start = get_gradient_edge(activations).node if activations.requires_grad else None
        return cls(names, get_gradient_edge(output), start)


@dataclass
class Reached:
    """What the backward pass of some outputs would meet.

    Args:
        calls (`list[Call]`): Calls with a rule.
        ends (`list[GradientEdge]`): Outputs of those that nothing lies behind but their own parameters.
        leaves (`list[Tensor]`): Leaves that are no parameters of a call with a rule, each once.
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
        [`Reached`]: A leaf is listed if some way to it leads through no call that it belongs to, so that the rules do
        not have all of its gradient.
    """
    by_output = {call.output.node: call for call in calls}
    reached = Reached()
    leaves: dict[int, Tensor] = {}
    with_input: set[Call] = set()
    # A node inside a call is another place than the same node outside: autocast makes one copy of a tied weight.
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
    """The leaf that a node accumulates into, if it is one that does."""
    return getattr(node, "variable", None) if node.name().endswith("AccumulateGrad") else None
