"""A model as graphs: one a segment, cut at every gate, or one in all with the gates inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from knnmoe.runtime.bundle import TensorSpec

from .architecture import Architecture
from .blend_function import LENGTHS, RESULTS, memory_specs
from .gate_graphs import GateShape, declare_bias, gate_nodes, routed_specs
from .graph import OPSET, GraphBuilder, StoredTensor
from .lowering.base import Lowering, Stream
from .lowering.ort import OrtLowering

INPUT_IDS = TensorSpec("input_ids", "int64", ("batch", "sequence"))
LOGIT_ROWS = TensorSpec("logit_rows", "int64", ("rows",))


def _lower_for_ort(plan: ModelPlan, g: GraphBuilder) -> Lowering:
    return OrtLowering(g, plan.architecture, plan.stored, plan.experts_per_token)


@dataclass(frozen=True)
class ModelPlan:
    """All that the graphs are built from.

    Attributes:
        architecture: The model's.
        stored: Where each weight lies, in files beside the graphs.
        experts_per_token: k of the seam.
        lower: What the parts of the model become.
        opset: Of the graphs.
    """

    architecture: Architecture
    stored: Mapping[str, StoredTensor]
    experts_per_token: int
    lower: Callable[[ModelPlan, GraphBuilder], Lowering] = _lower_for_ort
    opset: int = OPSET

    @property
    def gate_shape(self) -> GateShape:
        """The sizes of the gates."""
        shape = self.architecture.shape
        return GateShape(
            shape.hidden_size, shape.num_experts, self.experts_per_token, self.architecture.routing
        )


def segment_layers(architecture: Architecture, segment: int) -> tuple[int, ...]:
    """The layers whose key-value cache a segment holds."""
    return tuple(architecture.segment_layers(segment))


def segment_graph(plan: ModelPlan, segment: int) -> GraphBuilder:
    """The graph of one segment: the experts of the gate before it, up to the gate after it."""
    a = plan.architecture
    g = GraphBuilder(f"segment-{segment:02d}", plan.opset)
    parts = plan.lower(plan, g)
    hidden_spec = TensorSpec("hidden", "float32", ("batch", "sequence", a.shape.hidden_size))
    input_spec = TensorSpec("router_input", "float32", ("tokens", a.shape.hidden_size))
    logits_spec = TensorSpec("router_logits", "float32", ("tokens", a.shape.num_experts))
    mixed: ir.Value | None = None  # what a layer adds to `hidden` behind its attention
    if segment == 0:
        hidden = parts.embed(g.declare(INPUT_IDS))
    else:
        stream = Stream(g.declare(hidden_spec), g.declare(input_spec))
        ids, weights = (g.declare(spec) for spec in routed_specs(plan.gate_shape))
        mixed = parts.experts(stream, ids, weights, a.gate_layers[segment - 1])
        hidden = stream.hidden
    layers = a.segment_layers(segment)
    step = [g.declare(spec) for spec in parts.step_inputs] if layers else []
    cache_outputs: list[tuple[ir.Value, TensorSpec]] = []
    for layer in layers:
        stream, cached = _attention(g, parts, hidden, mixed, layer, step)
        cache_outputs += cached
        hidden, mixed = stream.hidden, None
        if a.layers[layer].gate is None:
            mixed = parts.dense(stream, layer)
    if segment == a.shape.num_gates:
        assert mixed is not None
        logits = parts.logits(hidden, mixed, g.declare(LOGIT_ROWS))
        g.output(logits, _logits_spec(a))
    else:
        g.output(stream.hidden, _renamed(hidden_spec, "hidden_out"))
        g.output(stream.router_input, _renamed(input_spec, "router_input_out"))
        logits = parts.router(stream.router_input, layers[-1])
        g.output(logits, _renamed(logits_spec, "router_logits_out"))
    for value, spec in cache_outputs:
        g.output(value, spec)
    return g


def fused_graph(plan: ModelPlan, gate: str) -> GraphBuilder:
    """The whole model in one graph, with the nodes of gate graph `gate` at every gate.

    Memory inputs and gate outputs carry the suffix `_{g}`; `lengths` is shared.
    """
    a = plan.architecture
    g = GraphBuilder("fused", plan.opset)
    parts = plan.lower(plan, g)
    input_ids = g.declare(INPUT_IDS)
    step = [g.declare(spec) for spec in parts.step_inputs]
    logit_rows = g.declare(LOGIT_ROWS)
    lengths = g.declare(LENGTHS)
    hidden, mixed = parts.embed(input_ids), None
    gate_outputs: list[tuple[ir.Value, TensorSpec]] = []
    cache_outputs: list[tuple[ir.Value, TensorSpec]] = []
    for layer, kind in enumerate(a.layers):
        stream, cached = _attention(g, parts, hidden, mixed, layer, step)
        cache_outputs += cached
        hidden = stream.hidden
        if kind.gate is None:
            mixed = parts.dense(stream, layer)
            continue
        memory = [
            g.declare(_of_gate(spec, kind.gate))
            for spec in memory_specs(a.shape.hidden_size, a.shape.num_experts)
        ]
        bias = declare_bias(g, plan.gate_shape, f"_{kind.gate}")
        logits = parts.router(stream.router_input, layer)
        ids, weights, results = gate_nodes(
            g, stream.router_input, logits, [*memory, lengths], plan.gate_shape, gate, bias
        )
        specs = (*routed_specs(plan.gate_shape), *RESULTS)
        for value, spec in zip((ids, weights, *results), specs, strict=True):
            gate_outputs.append((value, _of_gate(spec, kind.gate)))
        mixed = parts.experts(stream, ids, weights, layer)
    assert mixed is not None
    g.output(parts.logits(hidden, mixed, logit_rows), _logits_spec(a))
    for value, spec in (*cache_outputs, *gate_outputs):
        g.output(value, spec)
    return g


def _attention(
    g: GraphBuilder,
    parts: Lowering,
    hidden: ir.Value,
    mixed: ir.Value | None,
    layer: int,
    step: Sequence[ir.Value],
) -> tuple[Stream, list[tuple[ir.Value, TensorSpec]]]:
    """One layer up to its experts: (stream, the outputs of its cache).

    Args:
        mixed: What the layer before adds to `hidden`; None in the first layer.
    """
    if mixed is None:
        normed = parts.first_norm(hidden, layer)
    else:
        hidden, normed = parts.next_norm(hidden, mixed, layer)
    cache = parts.cache(layer)
    past = tuple(g.declare(spec) for spec in cache.inputs)
    stream, cached = parts.attention(hidden, normed, layer, past, step)
    return stream, list(zip(cached, cache.outputs, strict=True))


def _logits_spec(a: Architecture) -> TensorSpec:
    return TensorSpec("logits", "float32", ("rows", a.shape.vocab_size))


def _renamed(spec: TensorSpec, name: str) -> TensorSpec:
    return TensorSpec(name, spec.dtype, spec.shape)


def _of_gate(spec: TensorSpec, gate: int) -> TensorSpec:
    """A tensor of one gate; memories differ in size, so their dimensions get names of their own."""
    shape = tuple(f"{d}_{gate}" if d in ("entries", "neighbors") else d for d in spec.shape)
    return TensorSpec(f"{spec.name}_{gate}", spec.dtype, shape)
