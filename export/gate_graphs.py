"""The gate as graphs: the routing rule, and the rule with the blend before or after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from knnmoe.runtime.bundle import FROZEN, TensorSpec
from knnmoe.runtime.calibration import SIMILARITIES, Similarity
from knnmoe.runtime.routing import SIGMOID_EPSILON, RoutingRule

from .blend_function import LENGTHS, RESULTS, blend_function, blend_node, memory_specs
from .graph import OPSET, GraphBuilder


@dataclass(frozen=True)
class GateShape:
    """The sizes a gate graph depends on."""

    hidden_size: int
    num_experts: int
    experts_per_token: int
    routing: RoutingRule


def route(
    g: GraphBuilder, logits: ir.Value, shape: GateShape, bias: ir.Value | None = None
) -> tuple[ir.Value, ir.Value]:
    """Append the routing rule: logits [T, E] → (expert_ids int32, expert_weights), [T, k].

    `bias` [E] is the gate's, where the rule has one. If the seam has room for more experts than the
    rule selects, the rest have weight 0.
    """
    rule = shape.routing
    rule.check_experts(shape.num_experts)
    scores = _scores(g, logits, rule)
    ranking = scores if bias is None else g.op("Add", scores, bias)
    if rule.groups > 1:
        ranking = _in_best_groups(g, ranking, shape)
    weights, ids = g.ops("TopK", ranking, g.ints(shape.experts_per_token), count=2, axis=-1)
    if not rule.selects_by_score:
        weights = g.op("GatherElements", scores, ids, axis=1)
    selected = np.arange(shape.experts_per_token) < rule.top_k
    if rule.score == "softmax-topk":
        if not selected.all():
            beyond = np.where(selected, 0, -np.inf)
            weights = g.op("Add", weights, g.constant(beyond[None, :], np.float32))
        weights = g.op("Softmax", weights, axis=-1)
    elif not selected.all():
        weights = g.op("Mul", weights, g.constant(selected[None, :], np.float32))
    if rule.renormalize:
        total = g.op("ReduceSum", weights, g.ints(-1), keepdims=1)
        if rule.score == "sigmoid":
            total = g.op("Add", total, g.constant(SIGMOID_EPSILON, np.float32))
        weights = g.op("Div", weights, total)
    if rule.scale != 1.0:
        weights = g.op("Mul", weights, g.constant(rule.scale, np.float32))
    return g.op("Cast", ids, to=int(ir.DataType.INT32)), weights


def _scores(g: GraphBuilder, logits: ir.Value, rule: RoutingRule) -> ir.Value:
    """Scores [T, E] of logits [T, E]."""
    if rule.score == "softmax":
        return g.op("Softmax", logits, axis=-1)
    return g.op("Sigmoid", logits) if rule.score == "sigmoid" else logits


def _in_best_groups(g: GraphBuilder, ranking: ir.Value, shape: GateShape) -> ir.Value:
    """The ranking [T, E] with -inf for the experts of all but the best groups."""
    rule = shape.routing
    grouped = g.op("Reshape", ranking, g.ints(0, rule.groups, -1))
    if rule.group_score == "max":
        ranks = g.op("ReduceMax", grouped, g.ints(2), keepdims=0)
    else:
        best, _ = g.ops("TopK", grouped, g.ints(2), count=2, axis=-1)
        ranks = g.op("ReduceSum", best, g.ints(2), keepdims=0)
    _, chosen = g.ops("TopK", ranks, g.ints(rule.top_groups), count=2, axis=-1)
    # [T, groups, top_groups]: whether a group is the n-th that was chosen.
    numbers = g.constant(np.arange(rule.groups)[None, :, None], np.int64)
    same = g.op("Equal", numbers, g.op("Unsqueeze", chosen, g.ints(1)))
    same = g.op("Cast", same, to=int(ir.DataType.INT32))
    inside = g.op("ReduceMax", same, g.ints(2), keepdims=1)
    inside = g.op("Cast", inside, to=int(ir.DataType.BOOL))
    kept = g.op("Where", inside, grouped, g.constant(-np.inf, np.float32))
    return g.op("Reshape", kept, g.ints(0, shape.num_experts))


def _assignments(
    g: GraphBuilder, logits: ir.Value, shape: GateShape, bias: ir.Value | None
) -> ir.Value:
    """The rule's result as dense rows [T, E]."""
    ids, weights = route(g, logits, shape, bias)
    zero = ir.Tensor(np.zeros(1, np.float32))
    zeros = g.op("ConstantOfShape", g.op("Shape", logits), value=zero)
    ids = g.op("Cast", ids, to=int(ir.DataType.INT64))
    return g.op("ScatterElements", zeros, ids, weights, axis=1)


def _heaviest(
    g: GraphBuilder, assignments: ir.Value, shape: GateShape
) -> tuple[ir.Value, ir.Value]:
    """Cut assignments [T, E] to the heaviest experts; what is kept takes the mass of the row."""
    count = shape.experts_per_token
    weights, ids = g.ops("TopK", assignments, g.ints(count), count=2, axis=-1)
    zero, one = g.constant(0.0, np.float32), g.constant(1.0, np.float32)
    kept = g.op("ReduceSum", weights, g.ints(1), keepdims=1)
    total = g.op("ReduceSum", assignments, g.ints(1), keepdims=1)
    nonzero = g.op("Not", g.op("Equal", assignments, zero))
    nonzero = g.op("Cast", nonzero, to=int(ir.DataType.INT32))
    supported = g.op("ReduceSum", nonzero, g.ints(1), keepdims=1)
    beyond = g.op("Greater", supported, g.constant(count, np.int32))
    factor = g.op("Div", total, g.op("Where", g.op("Greater", kept, zero), kept, one))
    weights = g.op("Mul", weights, g.op("Where", beyond, factor, one))
    return g.op("Cast", ids, to=int(ir.DataType.INT32)), weights


def gate_nodes(
    g: GraphBuilder,
    router_input: ir.Value,
    router_logits: ir.Value,
    memory: Sequence[ir.Value],
    shape: GateShape,
    name: str,
    bias: ir.Value | None = None,
) -> tuple[ir.Value, ir.Value, Sequence[ir.Value]]:
    """Append the nodes of gate graph `name`: (expert_ids, expert_weights, [RESULTS]).

    `bias` is declared by `declare_bias`.
    """
    if name == FROZEN:
        return *route(g, router_logits, shape, bias), ()
    similarity = _similarity(name)
    if name == similarity:
        blended, results = blend_node(g, router_input, router_logits, memory, similarity)
        return *route(g, blended, shape, bias), results
    rows = _assignments(g, router_logits, shape, bias)
    blended, results = blend_node(g, router_input, rows, memory, similarity)
    return *_heaviest(g, blended, shape), results


def gate_functions(name: str, opset: int = OPSET) -> list[ir.Function]:
    """The functions that gate graph `name` calls."""
    return [] if name == FROZEN else [blend_function(_similarity(name), opset)]


def gate_graph(name: str, shape: GateShape, opset: int = OPSET) -> GraphBuilder:
    """A gate graph of the bundle, inputs and outputs as in docs/formats.md."""
    g = GraphBuilder(f"gate-{name}", opset)
    x = g.input("router_input", "float32", ("tokens", shape.hidden_size))
    logits = g.input("router_logits", "float32", ("tokens", shape.num_experts))
    bias = declare_bias(g, shape)
    memory: list[ir.Value] = []
    if name != FROZEN:
        specs = (*memory_specs(shape.hidden_size, shape.num_experts), LENGTHS)
        memory = [g.declare(spec) for spec in specs]
    ids, weights, results = gate_nodes(g, x, logits, memory, shape, name, bias)
    for value, spec in zip((ids, weights), routed_specs(shape), strict=True):
        g.output(value, spec)
    for value, spec in zip(results, RESULTS, strict=bool(results)):
        g.output(value, spec)
    return g


def declare_bias(g: GraphBuilder, shape: GateShape, suffix: str = "") -> ir.Value | None:
    """Declare the input `selection_bias` [E], if the rule has one."""
    if not shape.routing.selection_bias:
        return None
    return g.input(f"selection_bias{suffix}", "float32", (shape.num_experts,))


def routed_specs(shape: GateShape) -> tuple[TensorSpec, TensorSpec]:
    """`expert_ids` and `expert_weights` as they cross the seam."""
    size = ("tokens", shape.experts_per_token)
    return TensorSpec("expert_ids", "int32", size), TensorSpec("expert_weights", "float32", size)


def _similarity(name: str) -> Similarity:
    return next(similarity for similarity in SIMILARITIES if name.startswith(similarity))
