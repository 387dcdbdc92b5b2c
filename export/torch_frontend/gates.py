"""Where the gates of a traced model are, and what crosses them.

A gate is known by its experts: their ids and weights are made of the logits of one linear map,
whose input the experts read too. What stands between that map and the experts is the routing rule;
the segments leave it out, and `rules` finds out which one it is. Behind a gate the model may go on
with the rows that the router read and with one more tensor as wide, the residual stream; and with
what depends on positions alone, which each segment computes for itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.fx import Node

from knnmoe.runtime.errors import CheckpointError

from .loading import OTHER_FAMILY
from .placeholders import ATTENTION, EXPERTS
from .tracing import Trace, descend, is_size, origin

_LINEAR = torch.ops.aten.linear.default


@dataclass(frozen=True)
class Site:
    """One gate in a trace.

    Attributes:
        number: Of the gate.
        logits: The linear map of the router, [T, E] or [B, S, E].
        router_input: What it reads, and the experts too.
        hidden: The residual stream, or the router's input once more where there is no other.
        experts: The experts' node.
    """

    number: int
    logits: Node
    router_input: Node
    hidden: Node
    experts: Node

    @property
    def name(self) -> str:
        """As messages have it."""
        return f"gate {self.number}"


def find_sites(trace: Trace) -> tuple[Site, ...]:
    """The gates of a trace, in order.

    Raises:
        CheckpointError: If what a gate decides by is not the logits of one linear map, the experts
            read something else than it does, or more crosses a gate than a seam has.
    """
    alive = set(trace.needed([trace.output]))
    found: list[Site] = []
    fixed = _positional(trace)
    for number, experts in enumerate(n for n in trace.of(EXPERTS) if n in alive):
        logits = _router(trace, number, experts)
        read, given = (_argument(node, 0) for node in (logits, experts))
        if origin(read) is not origin(given):
            raise _unlike(
                number, "its experts read something else than its router", read.name, given.name
            )
        hidden = _hidden(trace, alive, fixed, number, logits, origin(read))
        found.append(Site(number, logits, origin(read), hidden, experts))
    for before, after in pairwise(found):
        if before.experts not in trace.needed([after.logits]):
            raise _unlike(after.number, "does not follow the gate before it", "one gate a layer")
    return tuple(found)


def _argument(node: Node, index: int) -> Node:
    argument = node.args[index]
    assert isinstance(argument, Node)
    return argument


def _router(trace: Trace, number: int, experts: Node) -> Node:
    """The linear map that ids and weights are made of."""
    decided = [_argument(experts, 1), _argument(experts, 2)]
    for node in descend(decided):
        if node.target is _LINEAR:
            rule = routing_nodes(trace, node, experts)
            leaves = [n for n in rule if n.target in (_LINEAR, EXPERTS, ATTENTION)]
            if not leaves:
                return node
            raise _unlike(
                number,
                "decides by more than the logits of one linear map",
                "ids and weights made of logits [T, E]",
                ", ".join(leaf.name for leaf in leaves[:5]),
            )
    raise _unlike(number, "has no linear map that its logits come from", "a linear router")


def routing_nodes(trace: Trace, logits: Node, experts: Node) -> list[Node]:
    """What makes ids and weights of logits, in order; the logits are not among it."""
    decided = [_argument(experts, 1), _argument(experts, 2)]
    return trace.needed(decided, [logits], sizes=True)


def _positional(trace: Trace) -> set[Node]:
    """The nodes that depend on no token: of weights, constants and positions alone."""
    found: set[Node] = set()
    for node in trace.nodes:
        made = node.op == "call_function" and all(
            n in found or is_size(n) for n in node.all_input_nodes
        )
        if made or (node.op == "placeholder" and node is not trace.input_ids):
            found.add(node)
    return found


def _hidden(
    trace: Trace, alive: set[Node], fixed: set[Node], number: int, logits: Node, router_input: Node
) -> Node:
    """The one tensor beside the router's input that the model goes on with behind a gate."""
    before = set(trace.needed([logits]))
    crossing = {
        origin(node): None
        for node in trace.needed([trace.output])
        if node in before and node not in fixed and not is_size(node)
        for user in node.users
        if user in alive and user not in before
    }
    rest = [node for node in crossing if node is not router_input]
    size = router_input.meta["val"].numel(), router_input.meta["val"].shape[-1]
    for candidate in reversed(rest or [router_input]):
        value = candidate.meta["val"]
        if (value.numel(), value.shape[-1]) != size:
            continue
        others = trace.needed(rest, [candidate, router_input])
        computed = [n for n in others if n not in fixed and not is_size(n)]
        stateful = (ATTENTION, EXPERTS)
        if not any(n is trace.input_ids or n.target in stateful for n in computed):
            return candidate
    raise _unlike(
        number,
        "is crossed by more than the residual stream and the router's input",
        "one tensor beside the router's input",
        ", ".join(f"{n.name} {list(n.meta['val'].shape)}" for n in rest[:5]),
    )


def _unlike(number: int, problem: str, expected: str, found: str | None = None) -> CheckpointError:
    return CheckpointError(
        f"gate {number}", problem, expected=expected, found=found, fix=OTHER_FAMILY
    )
