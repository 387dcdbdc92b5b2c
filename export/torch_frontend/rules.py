"""Which routing rule a traced gate has, found by trying.

The nodes between a router's logits and its experts are run on random logits, and of all that
`RoutingRule` can say the first that gives the same experts and weights is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.fx import Node
from torch.fx.node import map_arg

from knnmoe.runtime.errors import CheckpointError, SettingError
from knnmoe.runtime.routing import GROUP_SCORES, SCORES, RoutingRule

from .gates import Site, routing_nodes
from .loading import OTHER_FAMILY
from .tracing import Trace, is_size

_ROWS = 256
_FEW = 16  # rows that most rules are out after
_TOLERANCE = 2e-5

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Routing:
    """The rule of one gate, and its selection bias [E] where the rule has one."""

    rule: RoutingRule
    bias: Floats | None


@dataclass(frozen=True)
class Observed:
    """What a gate made of logits [N, E]: experts [N, k], each row in ascending order, weights."""

    logits: Floats
    ids: NDArray[np.int64]
    weights: Floats

    @staticmethod
    def of(logits: Floats, ids: NDArray[Any], weights: Floats) -> Observed:
        """What a gate returned, its experts in any order."""
        order = np.argsort(ids, axis=1)
        ids, weights = (np.take_along_axis(found, order, 1) for found in (ids, weights))
        return Observed(logits, ids, weights)

    def few(self) -> Observed:
        """The first of them."""
        return Observed(self.logits[:_FEW], self.ids[:_FEW], self.weights[:_FEW])


def find_routing(trace: Trace, sites: Sequence[Site]) -> tuple[Routing, ...]:
    """The rules of all gates, which differ in their biases alone.

    Raises:
        CheckpointError: If no rule fits a gate, or gates have several.
    """
    found: list[Routing] = []
    for site in sites:
        observed = _observe(trace, site)
        biases = _biases(trace, site, observed.logits.shape[1])
        routing = find_rule(observed, biases, [gate.rule for gate in found[:1]])
        if routing is None or (found and routing.rule != found[0].rule):
            raise CheckpointError(
                f"router of {site.name}",
                "routes by no rule that is known"
                if routing is None
                else "routes by another rule than gate 0",
                expected=f"scores {', '.join(SCORES)}, with or without groups, a selection bias, "
                "renormalisation and a scale",
                found=None if routing is None else str(routing.rule.to_json()),
                fix=OTHER_FAMILY,
            )
        found.append(routing)
    return tuple(found)


def _observe(trace: Trace, site: Site) -> Observed:
    """Run a gate on logits of many sizes."""
    experts = site.logits.meta["val"].shape[-1]
    rng = np.random.default_rng(0)
    sizes = rng.choice([0.05, 0.5, 2.0, 5.0], (_ROWS, 1))
    logits = (rng.normal(size=(_ROWS, experts)) * sizes).astype(np.float32)
    inputs = (trace.input_ids, trace.position_ids)
    values: dict[Node, Any] = dict.fromkeys(inputs, torch.zeros(1, _ROWS, dtype=torch.long))
    shape = (1, _ROWS, experts) if site.logits.meta["val"].ndim == 3 else (_ROWS, experts)
    values[site.logits] = torch.from_numpy(logits).reshape(shape)

    def given(node: Node) -> Any:
        # What is not computed here lends its dtype alone.
        return values[node] if node in values else torch.empty(0, dtype=node.meta["val"].dtype)

    with torch.no_grad():
        for node in routing_nodes(trace, site.logits, site.experts):
            if node in values:
                continue
            if node.op == "placeholder" and node in trace.tensors:
                values[node] = trace.tensors[node]
                continue
            if not is_size(node) and any(source in inputs for source in node.all_input_nodes):
                raise CheckpointError(
                    f"router of {site.name}", "routes by tokens or positions", fix=OTHER_FAMILY
                )
            assert callable(node.target)
            arguments, named = map_arg((node.args, node.kwargs), given)
            values[node] = node.target(*arguments, **named)
    decided: tuple[Any, ...] = site.experts.args[1:3]
    ids, weights = (values[node].reshape(_ROWS, -1).numpy() for node in decided)
    return Observed.of(logits, ids, weights)


def _biases(trace: Trace, site: Site, experts: int) -> list[Floats]:
    """Constants [E] that take part in a gate."""
    return [
        trace.tensors[node].float().numpy().reshape(-1)
        for node in routing_nodes(trace, site.logits, site.experts)
        if node in trace.tensors and trace.tensors[node].numel() == experts
    ]


def _rules(observed: Observed) -> Iterator[RoutingRule]:
    """All rules but for their scale, the plain ones first."""
    top_k, experts = observed.ids.shape[1], observed.logits.shape[1]
    plain = [
        RoutingRule(top_k, score, renormalize)
        for score in SCORES
        for renormalize in (False, True)
        if not (renormalize and score == "softmax-topk")
    ]
    yield from plain
    for groups in (n for n in range(2, experts + 1) if experts % n == 0):
        for top_groups in range(1, groups):
            for group_score in GROUP_SCORES:
                for rule in plain:
                    grouped = replace(
                        rule, groups=groups, top_groups=top_groups, group_score=group_score
                    )
                    try:
                        grouped.check_experts(experts)
                    except SettingError:
                        continue
                    yield grouped


def find_rule(
    observed: Observed, biases: Sequence[Floats], likely: Sequence[RoutingRule] = ()
) -> Routing | None:
    """The first rule that gives the experts and weights observed; None if no rule does.

    Args:
        observed: Of a gate.
        biases: Constants [E] that may be its selection bias.
        likely: Rules to try before all others.
    """
    for rule in chain(likely, _rules(observed)):
        for bias in (None, *biases):
            tried = replace(rule, selection_bias=bias is not None)
            if _scale(tried, observed.few(), bias) is None:
                continue
            scale = _scale(tried, observed, bias)
            if scale is not None:
                return Routing(replace(tried, scale=scale), bias)
    return None


def _scale(rule: RoutingRule, observed: Observed, bias: Floats | None) -> float | None:
    """What a rule's weights must be multiplied with to be those observed; None if none will do."""
    ids, weights = replace(rule, scale=1.0).apply(observed.logits, bias)
    order = np.argsort(ids, axis=1)
    if not np.array_equal(np.take_along_axis(ids, order, 1), observed.ids):
        return None
    weights = np.take_along_axis(weights, order, 1).astype(np.float64)
    scale = float((weights * observed.weights).sum() / np.square(weights).sum())
    if not np.isfinite(scale) or scale <= 0:
        return None
    scale = float(f"{scale:.5g}")  # as somebody wrote it into a config
    error = np.abs(weights * scale - observed.weights).max()
    return scale if error <= _TOLERANCE * scale else None
