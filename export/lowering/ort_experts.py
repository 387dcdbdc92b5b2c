"""The experts of a gate for ONNX Runtime: one node, made to take the experts it is given."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from knnmoe.export.architecture import Swiglu
from knnmoe.export.graph import CONTRIB, GraphBuilder


def forced_experts(
    g: GraphBuilder,
    rows: ir.Value,
    expert_ids: ir.Value,
    expert_weights: ir.Value,
    gate_up: ir.Value,
    down: ir.Value,
    biases: tuple[ir.Value | None, ir.Value | None],
    *,
    num_experts: int,
    experts_per_token: int,
    swiglu: Swiglu,
) -> ir.Value:
    """Experts in fp32 through com.microsoft.MoE, forced to the given ids and weights.

    The node selects by itself, from logits. Given log(w), and -inf for the experts not chosen,
    its softmax returns w / Σw and its selection the experts given; the sum is multiplied back.

    Args:
        rows: [T, D].
        expert_ids, expert_weights: [T, k].
        gate_up: [E, 2F, D], a row of gate, then the one of up, and so on.
        down: [E, D, F].
        biases: Of gate_up [E, 2F] and of down [E, D], where there are any.
    """
    dense = dense_weights(g, rows, expert_ids, expert_weights, num_experts)
    total = g.op("ReduceSum", expert_weights, g.ints(1), keepdims=1)
    # A token whose weights are all 0 would be all -inf, and its softmax NaN.
    some = g.op("Greater", total, g.constant(0.0, np.float32))
    forced = g.op("Where", some, g.op("Log", dense), g.constant(0.0, np.float32))
    last = [] if biases[1] is None else [biases[1]]
    mixed = g.op(
        "MoE", rows, forced, gate_up, biases[0], down, *last,
        domain=CONTRIB, k=experts_per_token, normalize_routing_weights=1, **activation(swiglu),
    )  # fmt: skip
    return g.op("Mul", mixed, total)


def activation(found: Swiglu) -> dict[str, Any]:
    """The experts' activation, as attributes of com.microsoft's nodes."""
    limit = {} if found.limit is None else {"swiglu_limit": found.limit}
    return {
        "activation_type": "swiglu", "swiglu_fusion": 1,
        "activation_alpha": found.alpha, "activation_beta": found.shift, **limit,
    }  # fmt: skip


def dense_weights(
    g: GraphBuilder,
    rows: ir.Value,
    expert_ids: ir.Value,
    expert_weights: ir.Value,
    num_experts: int,
) -> ir.Value:
    """Ids and weights [T, k] as weights of all experts [T, E], 0 for those not chosen."""
    experts = g.constant([num_experts], np.int64)
    tokens = g.op("Shape", rows, start=0, end=1)
    empty = g.op(
        "ConstantOfShape",
        g.op("Concat", tokens, experts, axis=0),
        value=ir.Tensor(np.zeros(1, np.float32)),
    )
    # Added, so that an id that is there twice (as padding of weight 0) does no harm.
    ids = g.op("Cast", expert_ids, to=int(ir.DataType.INT64))
    return g.op("ScatterElements", empty, ids, expert_weights, axis=1, reduction="add")
