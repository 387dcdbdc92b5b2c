"""A model as graphs: one a segment, cut at every gate, or one in all with the gates inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from .architecture import Architecture
from .blend_function import LENGTHS
from .gate_graphs import GateShape, routed_specs
from .graph import OPSET, GraphBuilder, StoredTensor
from .lowering.base import Lowering, Stream
from .lowering.ort import OrtLowering
from .seam import (
    INPUT_IDS,
    LOGIT_ROWS,
    Outputs,
    inner_gate,
    logits_spec,
    stream_outputs,
    stream_specs,
)


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


def segment_graph(plan: ModelPlan, segment: int) -> GraphBuilder:
    """The graph of one segment: the experts of the gate before it, up to the gate after it."""
    a = plan.architecture
    g = GraphBuilder(f"segment-{segment:02d}", plan.opset)
    parts = plan.lower(plan, g)
    mixed: ir.Value | None = None  # what a layer adds to `hidden` behind its attention
    if segment == 0:
        hidden = parts.embed(g.declare(INPUT_IDS))
    else:
        stream = Stream(*(g.declare(spec) for spec in stream_specs(plan.gate_shape)))
        ids, weights = (g.declare(spec) for spec in routed_specs(plan.gate_shape))
        mixed = parts.experts(stream, ids, weights, a.gate_layers[segment - 1])
        hidden = stream.hidden
    layers = a.segment_layers(segment)
    step = [g.declare(spec) for spec in parts.step_inputs] if layers else []
    cache_outputs: Outputs = []
    for layer in layers:
        stream, cached = _attention(g, parts, hidden, mixed, layer, step)
        cache_outputs += cached
        hidden, mixed = stream.hidden, None
        if a.layers[layer].gate is None:
            mixed = parts.dense(stream, layer)
    if segment == a.shape.num_gates:
        assert mixed is not None
        logits = parts.logits(hidden, mixed, g.declare(LOGIT_ROWS))
        outputs = [(logits, logits_spec(a.shape.vocab_size))]
    else:
        logits = parts.router(stream.router_input, layers[-1])
        outputs = stream_outputs(plan.gate_shape, stream.hidden, stream.router_input, logits)
    for value, spec in (*outputs, *cache_outputs):
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
    gate_outputs: Outputs = []
    cache_outputs: Outputs = []
    for layer, kind in enumerate(a.layers):
        stream, cached = _attention(g, parts, hidden, mixed, layer, step)
        cache_outputs += cached
        hidden = stream.hidden
        if kind.gate is None:
            mixed = parts.dense(stream, layer)
            continue
        logits = parts.router(stream.router_input, layer)
        ids, weights, outputs = inner_gate(
            g, gate, kind.gate, plan.gate_shape, stream.router_input, logits, lengths
        )
        gate_outputs += outputs
        mixed = parts.experts(stream, ids, weights, layer)
    assert mixed is not None
    g.output(parts.logits(hidden, mixed, logit_rows), logits_spec(a.shape.vocab_size))
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
) -> tuple[Stream, Outputs]:
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
