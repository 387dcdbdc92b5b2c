"""A model as graphs: one a segment, cut at every gate, or one in all with the gates inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from knnmoe.runtime.bundle import TensorSpec

from .architecture import Architecture
from .blend_function import LENGTHS, RESULTS, memory_specs
from .gate_graphs import GateShape, gate_nodes, routed_specs
from .graph import OPSET, GraphBuilder, StoredTensor
from .lowering.base import Lowering, Pair, Stream
from .lowering.ort import OrtLowering

INPUT_IDS = TensorSpec("input_ids", "int64", ("batch", "sequence"))
LOGIT_ROWS = TensorSpec("logit_rows", "int64", ("rows",))


def _lower_for_ort(plan: ModelPlan, g: GraphBuilder) -> Lowering:
    return OrtLowering(g, plan.architecture, plan.stored, plan.experts_per_token, plan.precision)


@dataclass(frozen=True)
class ModelPlan:
    """All that the graphs are built from.

    Attributes:
        architecture: The model's.
        stored: Where each weight lies, in files beside the graphs.
        experts_per_token: k of the seam.
        precision: Of the experts.
        lower: What the parts of the model become.
        opset: Of the graphs.
    """

    architecture: Architecture
    stored: Mapping[str, StoredTensor]
    experts_per_token: int
    precision: str
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
    return (segment,) if segment < architecture.shape.num_layers else ()


def segment_graph(plan: ModelPlan, segment: int) -> GraphBuilder:
    """The graph of one segment: the experts of the gate before it, up to the gate after it."""
    a = plan.architecture
    g = GraphBuilder(f"segment-{segment:02d}", plan.opset)
    parts = plan.lower(plan, g)
    hidden_spec = TensorSpec("hidden", "float32", ("batch", "sequence", a.shape.hidden_size))
    input_spec = TensorSpec("router_input", "float32", ("tokens", a.shape.hidden_size))
    logits_spec = TensorSpec("router_logits", "float32", ("tokens", a.shape.num_experts))
    last = segment == a.shape.num_gates
    if segment == 0:
        hidden = parts.embed(g.declare(INPUT_IDS))
        normed = parts.first_norm(hidden, 0)
    else:
        stream = Stream(g.declare(hidden_spec), g.declare(input_spec))
        ids, weights = (g.declare(spec) for spec in routed_specs(plan.gate_shape))
        mixed = parts.experts(stream, ids, weights, segment - 1)
        if last:
            logits = parts.logits(stream.hidden, mixed, g.declare(LOGIT_ROWS))
            g.output(logits, _logits_spec(a))
            return g
        hidden, normed = parts.next_norm(stream.hidden, mixed, segment)
    step = [g.declare(spec) for spec in parts.step_inputs]
    cache = parts.cache(segment)
    past = _declare_pair(g, cache.inputs)
    stream, cached = parts.attention(hidden, normed, segment, past, step)
    g.output(stream.hidden, _renamed(hidden_spec, "hidden_out"))
    g.output(stream.router_input, _renamed(input_spec, "router_input_out"))
    logits = parts.router(stream.router_input, segment)
    g.output(logits, _renamed(logits_spec, "router_logits_out"))
    for value, spec in zip(cached, cache.outputs, strict=True):
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
    hidden = parts.embed(input_ids)
    normed = parts.first_norm(hidden, 0)
    gate_outputs: list[tuple[ir.Value, TensorSpec]] = []
    cache_outputs: list[tuple[ir.Value, TensorSpec]] = []
    for layer in range(a.shape.num_layers):
        cache = parts.cache(layer)
        past = _declare_pair(g, cache.inputs)
        memory = [
            g.declare(_of_gate(spec, layer))
            for spec in memory_specs(a.shape.hidden_size, a.shape.num_experts)
        ]
        stream, cached = parts.attention(hidden, normed, layer, past, step)
        cache_outputs.extend(zip(cached, cache.outputs, strict=True))
        logits = parts.router(stream.router_input, layer)
        ids, weights, results = gate_nodes(
            g, stream.router_input, logits, [*memory, lengths], plan.gate_shape, gate
        )
        specs = (*routed_specs(plan.gate_shape), *RESULTS)
        for value, spec in zip((ids, weights, *results), specs, strict=True):
            gate_outputs.append((value, _of_gate(spec, layer)))
        mixed = parts.experts(stream, ids, weights, layer)
        if layer + 1 < a.shape.num_layers:
            hidden, normed = parts.next_norm(stream.hidden, mixed, layer + 1)
    g.output(parts.logits(stream.hidden, mixed, logit_rows), _logits_spec(a))
    for value, spec in (*cache_outputs, *gate_outputs):
        g.output(value, spec)
    return g


def _declare_pair(g: GraphBuilder, specs: tuple[TensorSpec, TensorSpec]) -> Pair:
    key, value = (g.declare(spec) for spec in specs)
    return key, value


def _logits_spec(a: Architecture) -> TensorSpec:
    return TensorSpec("logits", "float32", ("rows", a.shape.vocab_size))


def _renamed(spec: TensorSpec, name: str) -> TensorSpec:
    return TensorSpec(name, spec.dtype, spec.shape)


def _of_gate(spec: TensorSpec, gate: int) -> TensorSpec:
    """A tensor of one gate; memories differ in size, so their dimensions get names of their own."""
    shape = tuple(f"{d}_{gate}" if d in ("entries", "neighbors") else d for d in spec.shape)
    return TensorSpec(f"{spec.name}_{gate}", spec.dtype, shape)
