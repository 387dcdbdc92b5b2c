"""The experts of a gate: SwiGLU, with each token's own experts and weights.

Stored are gate and up as [E, 2F, D], their rows taking turns, and down as [E, D, F]; biases, which
some families have, as [E, 2F] and [E, D].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from knnmoe.export.architecture import Swiglu

from .ort_weights import layer_name
from .std_ops import Experts, StdOps

TENSORRT = "trt"  # TensorRT's parser knows its own operators by name, in any domain
_SILU = 1  # of `activation_type`; without it there is no activation


def gathered_experts(
    ops: StdOps, rows: ir.Value, ids: ir.Value, weights: ir.Value, layer: int
) -> ir.Value:
    """rows [T, D], ids and weights [T, k] → [T, D], with k experts' weights gathered a token.

    It reads and computes what a token needs and no more; but T tokens read k·T experts, whether
    they share them or not.
    """
    g, width = ops.g, ops.a.expert_width
    one = g.op("Unsqueeze", rows, g.ints(1))  # [T, 1, D]
    product = ops.chosen_linear(one, layer_name(layer, "gate_up"), ids)
    product = g.op("Reshape", product, g.ints(0, -1))  # [T, k · 2F]
    count = g.op("Shape", ids)
    biases = _gate_up_biases(ops, layer)
    biases = tuple(g.op("Gather", bias, ids, axis=0) for bias in biases)
    inner = _activated(ops, product, biases, weights, g.op("Concat", count, g.ints(width), axis=0))
    outer = ops.chosen_linear(inner, layer_name(layer, "down"), ids)  # [T, k, D]
    mixed = g.op("ReduceSum", outer, g.ints(1), keepdims=0)
    if not ops.a.expert_biases:
        return mixed
    bias = g.op("Gather", ops.weight(layer_name(layer, "down_bias")), ids, axis=0)  # [T, k, D]
    bias = g.op("MatMul", g.op("Unsqueeze", weights, g.ints(1)), bias)
    return g.op("Add", mixed, g.op("Squeeze", bias, g.ints(1)))


def dense_experts(
    ops: StdOps, rows: ir.Value, ids: ir.Value, weights: ir.Value, layer: int
) -> ir.Value:
    """rows [T, D], ids and weights [T, k] → [T, D], with every expert run on every token.

    Two products over the weights of all experts, as of one wide layer: every weight is read once
    a step, however many tokens there are.
    """
    g, width, count = ops.g, ops.a.expert_width, ops.a.shape.num_experts
    product = ops.stack_linear(rows, layer_name(layer, "gate_up"))
    shares = _by_expert(ops, ids, weights)
    biases = _gate_up_biases(ops, layer)
    inner = _activated(ops, product, biases, shares, g.ints(-1, count, width))
    inner = g.op("Reshape", inner, g.ints(-1, count * width))
    mixed = ops.stack_linear(inner, layer_name(layer, "down"), columns=True)
    if not ops.a.expert_biases:
        return mixed
    bias = g.op("MatMul", shares, ops.weight(layer_name(layer, "down_bias")))
    return g.op("Add", mixed, bias)


def moe_experts(
    ops: StdOps, rows: ir.Value, ids: ir.Value, weights: ir.Value, layer: int
) -> ir.Value:
    """rows [T, D], ids and weights [T, k] → [T, D], by TensorRT's mixture-of-experts layer.

    It wants all tokens as one sequence, all but the ids in one precision, and matrices to multiply
    from the right: gate and up [E, D, F], down [E, F, D]; then, where there are any, the biases of
    each. They are constants made of the stored weights, to be folded when the engine is built.
    """
    g = ops.g
    axis, end, two = g.ints(1), g.ints(np.iinfo(np.int64).max), g.ints(2)
    gate_up = ops.narrow_weight(layer_name(layer, "gate_up"))
    stored = [g.op("Slice", gate_up, g.ints(first), end, axis, two) for first in (0, 1)]
    stored.append(ops.narrow_weight(layer_name(layer, "down")))
    constants = [g.op("Transpose", weight, perm=[0, 2, 1]) for weight in stored]
    if ops.a.expert_biases:
        constants += map(ops.narrow, _gate_up_biases(ops, layer))
        constants.append(ops.narrow_weight(layer_name(layer, "down_bias")))
    parts = (ops.narrow(rows), _used(ops, ids, weights), ops.narrow(weights))
    one = g.ints(0)
    tokens = [g.op("Unsqueeze", part, one) for part in parts]
    mixed = g.op(
        "TRT_MoE", *tokens, *constants,
        domain=TENSORRT, activation_type=_SILU, **_tensorrt_swiglu(ops.a.swiglu),
    )  # fmt: skip
    return ops.widen(g.op("Squeeze", mixed, one))


ExpertsOf = Callable[[StdOps, ir.Value, ir.Value, ir.Value, int], ir.Value]

EXPERTS: dict[Experts, ExpertsOf] = {
    "gathered": gathered_experts,
    "dense": dense_experts,
    "moe": moe_experts,
}


def _tensorrt_swiglu(swiglu: Swiglu) -> dict[str, float]:
    """The activation as attributes of TensorRT's layer, which has the plain one by default."""
    if swiglu == Swiglu():
        return {}
    limit = {} if swiglu.limit is None else {"swiglu_limit": swiglu.limit}
    return {"swiglu_alpha": swiglu.alpha, "swiglu_beta": swiglu.shift, **limit}


def _gate_up_biases(ops: StdOps, layer: int) -> tuple[ir.Value, ...]:
    """The biases of gate and of up, [E, F] each, float32; or none."""
    if not ops.a.expert_biases:
        return ()
    g, bias = ops.g, ops.weight(layer_name(layer, "gate_up_bias"))
    axis, end, two = g.ints(1), g.ints(np.iinfo(np.int64).max), g.ints(2)
    return tuple(g.op("Slice", bias, g.ints(first), end, axis, two) for first in (0, 1))


def _activated(
    ops: StdOps,
    product: ir.Value,
    biases: Sequence[ir.Value],
    weights: ir.Value,
    shape: ir.Value,
) -> ir.Value:
    """SwiGLU of gate and up with their biases, times the weight: [T, n, F] of that shape.

    The weight is multiplied in before the down projection, which is linear. An expert of weight 0
    contributes exactly nothing: in float16 it may have overflowed on a token that is not its own.

    Args:
        product: [T, n · 2F], gate and up taking turns.
        biases: None, or those of gate and of up as they are added to [T, n, F].
        weights: [T, n].
    """
    g, swiglu = ops.g, ops.a.swiglu
    axis, end, two = g.ints(1), g.ints(np.iinfo(np.int64).max), g.ints(2)
    parts = [
        g.op("Reshape", g.op("Slice", product, g.ints(first), end, axis, two), shape)
        for first in (0, 1)
    ]
    for index, bias in enumerate(biases):
        parts[index] = g.op("Add", parts[index], bias)
    gate, up = parts
    if swiglu.limit is not None:
        gate = g.op("Min", gate, ops.number(swiglu.limit))
        up = g.op("Clip", up, ops.number(-swiglu.limit), ops.number(swiglu.limit))
    if swiglu.shift:
        up = g.op("Add", up, ops.number(swiglu.shift))
    raised = gate if swiglu.alpha == 1 else g.op("Mul", gate, ops.number(swiglu.alpha))
    weights = g.op("Unsqueeze", weights, g.ints(2))
    active = g.op("Mul", g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", raised)), up), weights)
    unused = g.op("Equal", weights, ops.number(0.0))
    return g.op("Where", unused, ops.number(0.0), active)


def _used(ops: StdOps, ids: ir.Value, weights: ir.Value) -> ir.Value:
    """ids [T, k] with the token's first, which has the largest weight, for those of weight 0.

    So no expert is read for nothing, nor one that overflows on a token that is not its own.
    """
    g = ops.g
    first = g.op("Slice", ids, g.ints(0), g.ints(1), g.ints(1))
    return g.op("Where", g.op("Equal", weights, ops.number(0.0)), first, ids)


def _by_expert(ops: StdOps, ids: ir.Value, weights: ir.Value) -> ir.Value:
    """ids and weights [T, k] → weights [T, E]; those of an id that is there twice are added."""
    g = ops.g
    chosen = g.op("Equal", g.op("Unsqueeze", ids, g.ints(2)), ops.expert_range())  # [T, k, E]
    weights = g.op("Where", chosen, g.op("Unsqueeze", weights, g.ints(2)), ops.number(0.0))
    return g.op("ReduceSum", weights, g.ints(1), keepdims=0)
