"""What crosses the edges of a bundle's graphs, be they built of a description or of a trace.

docs/design.md has the tables; caches are the lowerings' own (`CacheSpecs`).
"""

from __future__ import annotations

import onnx_ir as ir

from knnmoe.runtime.bundle import TensorSpec

from .blend_function import RESULTS, memory_specs
from .gate_graphs import GateShape, declare_bias, gate_nodes, routed_specs
from .graph import GraphBuilder

INPUT_IDS = TensorSpec("input_ids", "int64", ("batch", "sequence"))
LOGIT_ROWS = TensorSpec("logit_rows", "int64", ("rows",))

Outputs = list[tuple[ir.Value, TensorSpec]]


def stream_specs(shape: GateShape) -> tuple[TensorSpec, TensorSpec]:
    """`hidden` and `router_input`, as a segment reads them."""
    return (
        TensorSpec("hidden", "float32", ("batch", "sequence", shape.hidden_size)),
        TensorSpec("router_input", "float32", ("tokens", shape.hidden_size)),
    )


def stream_outputs(
    shape: GateShape, hidden: ir.Value, router_input: ir.Value, router_logits: ir.Value
) -> Outputs:
    """What a segment leaves for a gate and for the segment behind it, with its specs."""
    logits = TensorSpec("router_logits", "float32", ("tokens", shape.num_experts))
    specs = (*stream_specs(shape), logits)
    named = [TensorSpec(f"{spec.name}_out", spec.dtype, spec.shape) for spec in specs]
    return list(zip((hidden, router_input, router_logits), named, strict=True))


def logits_spec(vocab_size: int) -> TensorSpec:
    """The logits of the rows asked for."""
    return TensorSpec("logits", "float32", ("rows", vocab_size))


def inner_gate(
    g: GraphBuilder,
    name: str,
    number: int,
    shape: GateShape,
    router_input: ir.Value,
    router_logits: ir.Value,
    lengths: ir.Value,
) -> tuple[ir.Value, ir.Value, Outputs]:
    """Append gate `number` to a fused graph: (expert_ids, expert_weights, the gate's outputs).

    Its memory is declared here; memory inputs and gate outputs carry the suffix `_{number}`.
    """
    specs = memory_specs(shape.hidden_size, shape.num_experts)
    memory = [g.declare(_of_gate(spec, number)) for spec in specs]
    bias = declare_bias(g, shape, f"_{number}")
    ids, weights, results = gate_nodes(
        g, router_input, router_logits, [*memory, lengths], shape, name, bias
    )
    found = zip((ids, weights, *results), (*routed_specs(shape), *RESULTS), strict=True)
    return ids, weights, [(value, _of_gate(spec, number)) for value, spec in found]


def _of_gate(spec: TensorSpec, gate: int) -> TensorSpec:
    """A tensor of one gate; memories differ in size, so their dimensions get names of their own."""
    shape = tuple(f"{d}_{gate}" if d in ("entries", "neighbors") else d for d in spec.shape)
    return TensorSpec(f"{spec.name}_{gate}", spec.dtype, shape)
