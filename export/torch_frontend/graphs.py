"""A trace as graphs: one a segment, cut at every gate, or one in all with the gates inside.

The seam is that of the described families (`export/seam.py`), so the runtime cannot tell the
bundles apart.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch.fx import Node

from knnmoe.export.blend_function import LENGTHS
from knnmoe.export.gate_graphs import GateShape, routed_specs
from knnmoe.export.graph import CONTRIB, GraphBuilder, StoredTensor
from knnmoe.export.lowering.base import cache_pair
from knnmoe.export.lowering.ort import SEQLENS_K, TOTAL_LENGTH
from knnmoe.export.lowering.ort_experts import forced_experts
from knnmoe.export.seam import (
    INPUT_IDS,
    LOGIT_ROWS,
    Outputs,
    inner_gate,
    logits_spec,
    stream_outputs,
    stream_specs,
)
from knnmoe.runtime.bundle import ModelShape
from knnmoe.runtime.errors import CheckpointError

from .aten import DTYPES, SPLITS, TABLE, split
from .experts import Experts
from .gates import Site
from .loading import OTHER_FAMILY
from .placeholders import ATTENTION, EXPERTS
from .tracing import Trace, origin

_SIZES = {"Mul": "Mul", "Add": "Add"}  # of sympy, in which torch writes sizes → of ONNX
_INLINE_BYTES = 1 << 12  # constants up to this size lie in the graph, not beside it


@dataclass(frozen=True)
class Pieces:
    """All that graphs are made of but for where the weights lie.

    Attributes:
        trace: The model.
        sites: Its gates.
        experts: What stands behind each.
        layers: Every attention, in order; a layer of the cache each.
        windows: How far each sees.
        shape: Sizes of the model.
    """

    trace: Trace
    sites: tuple[Site, ...]
    experts: tuple[Experts, ...]
    layers: tuple[Node, ...]
    windows: tuple[int | None, ...]
    shape: ModelShape

    def given(self, segment: int) -> tuple[Node, ...]:
        """What a segment is handed by the one before it."""
        if segment == 0:
            return ()
        site = self.sites[segment - 1]
        return site.hidden, site.router_input

    def outputs(self, segment: int) -> tuple[Node, ...]:
        """What a segment computes for the next, or the logits."""
        if segment == len(self.sites):
            return (self.trace.output,)
        site = self.sites[segment]
        return site.hidden, site.router_input, site.logits

    def nodes(self, segment: int) -> list[Node]:
        """What a segment computes, in order."""
        return self.trace.needed(self.outputs(segment), self.given(segment))

    def segment_layers(self, segment: int) -> tuple[int, ...]:
        """The layers whose cache a segment holds."""
        return tuple(self.layers.index(n) for n in self.nodes(segment) if n.target is ATTENTION)


def is_inline(tensor: torch.Tensor) -> bool:
    """Whether a constant lies in the graphs, not in a file beside them."""
    small = tensor.ndim < 2 and tensor.numel() * tensor.element_size() <= _INLINE_BYTES
    return small or not tensor.is_floating_point()


def segment_graph(
    pieces: Pieces,
    names: Mapping[Node, str],
    stored: Mapping[str, StoredTensor],
    gate: GateShape,
    segment: int,
) -> GraphBuilder:
    """The graph of one segment: the experts of the gate before it, up to the gate after it."""
    g = GraphBuilder(f"segment-{segment:02d}")
    writer = _Writer(g, pieces, names, stored, gate)
    if segment == 0:
        writer.embed(g.declare(INPUT_IDS))
    else:
        site = pieces.sites[segment - 1]
        stream, rows = (g.declare(spec) for spec in stream_specs(gate))
        writer.measure(stream)
        writer.give(site.router_input, rows)
        if site.hidden is not site.router_input:
            writer.give(site.hidden, stream)
        ids, weights = (g.declare(spec) for spec in routed_specs(gate))
        writer.route(site.number, ids, weights)
    if any(n is pieces.trace.position_ids or n.target is ATTENTION for n in pieces.nodes(segment)):
        writer.step(*(g.declare(spec) for spec in (SEQLENS_K, TOTAL_LENGTH)))
    if segment == len(pieces.sites):
        writer.head(g.declare(LOGIT_ROWS))
    else:
        site = pieces.sites[segment]
        writer.write([site.hidden, site.router_input, site.logits])
        rows, stream = writer.rows(site.router_input), writer.stream(site.hidden)
        for value, spec in stream_outputs(gate, stream, rows, writer.rows(site.logits)):
            g.output(value, spec)
    writer.close()
    return g


def fused_graph(
    pieces: Pieces,
    names: Mapping[Node, str],
    stored: Mapping[str, StoredTensor],
    gate: GateShape,
    name: str,
) -> GraphBuilder:
    """The whole model in one graph, with the nodes of gate graph `name` at every gate."""
    g = GraphBuilder("fused")
    writer = _Writer(g, pieces, names, stored, gate)
    writer.embed(g.declare(INPUT_IDS))
    writer.step(*(g.declare(spec) for spec in (SEQLENS_K, TOTAL_LENGTH)))
    logit_rows, lengths = g.declare(LOGIT_ROWS), g.declare(LENGTHS)
    gate_outputs: Outputs = []
    for site in pieces.sites:
        writer.write([site.hidden, site.router_input, site.logits])
        rows, logits = writer.rows(site.router_input), writer.rows(site.logits)
        ids, weights, outputs = inner_gate(g, name, site.number, gate, rows, logits, lengths)
        writer.route(site.number, ids, weights)
        gate_outputs += outputs
    writer.head(logit_rows)
    writer.close()
    for value, spec in gate_outputs:
        g.output(value, spec)
    return g


class _Writer:
    """Writes nodes of a trace into one graph."""

    def __init__(
        self,
        g: GraphBuilder,
        pieces: Pieces,
        names: Mapping[Node, str],
        stored: Mapping[str, StoredTensor],
        gate: GateShape,
    ) -> None:
        self.g = g
        self._names = names
        self._pieces, self._stored, self._gate = pieces, stored, gate
        self._values: dict[Node, Any] = {}
        self._routed: dict[Node, tuple[ir.Value, ir.Value]] = {}
        self._cached: Outputs = []
        self._weights: dict[str, ir.Value] = {}
        self._lengths: dict[Any, ir.Value] = {}
        self._vectors: dict[tuple[Any, ...], ir.Value] = {}
        self._step: tuple[ir.Value, ir.Value] | None = None
        ids = pieces.trace.input_ids.meta["val"]
        self._batch, self._length = (size.node.expr for size in ids.shape)

    def embed(self, input_ids: ir.Value) -> None:
        """Take the token ids [B, S]."""
        self._values[self._pieces.trace.input_ids] = input_ids
        self.measure(input_ids)

    def measure(self, of: ir.Value) -> None:
        """Take batch and length from a value [B, S, ...]."""
        self._lengths = {
            self._batch: self.g.op("Shape", of, start=0, end=1),
            self._length: self.g.op("Shape", of, start=1, end=2),
        }

    def give(self, node: Node, value: ir.Value) -> None:
        """Take the value of a node as it crossed a gate, whatever its shape there."""
        self._values[node] = self.g.op("Reshape", value, self.sizes(node))

    def route(self, gate: int, ids: ir.Value, weights: ir.Value) -> None:
        """Take what a gate decided."""
        self._routed[self._pieces.sites[gate].experts] = ids, weights

    def step(self, seqlens: ir.Value, total: ir.Value) -> None:
        """Take where in its sequences a step stands; positions [B, S] follow from it.

        A step with a past has sequences of one length: one sequence, or one token each. So the
        first of S tokens stands at the total length less S, and at 0 without a past.
        """
        g, length = self.g, self._lengths[self._length]
        self._step = seqlens, total
        totals = g.op("Add", g.cast(seqlens, "int64"), g.ints(1))
        start = g.op("Max", g.op("Sub", totals, length), g.ints(0))
        zero, one = (g.constant(number, np.int64) for number in (0, 1))
        offsets = g.op("Range", zero, g.op("Squeeze", length), one)
        positions = g.op("Add", g.op("Unsqueeze", start, g.ints(1)), offsets)
        self._values[self._pieces.trace.position_ids] = positions

    def write(self, outputs: Iterable[Node]) -> None:
        """Append all that some nodes are computed of, and they themselves."""
        for node in self._pieces.trace.needed(outputs, self._values):
            self._values[node] = self._written(node)

    def stream(self, node: Node) -> ir.Value:
        """A value as [B, S, D]."""
        width = node.meta["val"].shape[-1]
        leading = (self._lengths[size] for size in (self._batch, self._length))
        size = self.g.op("Concat", *leading, self.g.ints(int(width)), axis=0)
        return self.g.op("Reshape", self._values[node], size)

    def rows(self, node: Node) -> ir.Value:
        """A value as [T, D]."""
        width = int(node.meta["val"].shape[-1])
        return self.g.op("Reshape", self._values[node], self.g.ints(-1, width))

    def head(self, logit_rows: ir.Value) -> None:
        """The logits of some rows [R, V], declared an output: no other meets the head."""
        g, trace = self.g, self._pieces.trace
        head = _head(trace)
        source = origin(head.args[0])  # type: ignore[arg-type]  # a node by the schema
        self.write([source])
        width = int(source.meta["val"].shape[-1])
        flat = g.op("Reshape", self._values[source], g.ints(-1, width))
        rows = g.op("Gather", flat, logit_rows, axis=0)
        # As one sequence, so that what follows finds the axes that it has in the trace.
        self._lengths = {
            self._batch: g.ints(1),
            self._length: g.op("Shape", logit_rows, start=0, end=1),
        }
        self._vectors = {}
        tail = trace.needed([trace.output], [source])
        for node in tail:
            self._values.pop(node, None)
        self._values[source] = g.op("Reshape", rows, self.sizes(source))
        self.write([trace.output])
        g.output(self.rows(trace.output), logits_spec(self._pieces.shape.vocab_size))

    def close(self) -> None:
        """Declare the caches outputs."""
        for value, spec in self._cached:
            self.g.output(value, spec)

    # What the table of operators writes with.

    def value(self, argument: Any) -> ir.Value:
        """The value of a node."""
        if argument not in self._values:
            raise NotImplementedError("a number that depends on the text's length")
        found: ir.Value = self._values[argument]
        return found

    def table(self, argument: Any) -> ir.Value:
        """The value of a weight whose rows are looked up, as it is stored."""
        trace = self._pieces.trace
        if argument not in trace.tensors or is_inline(trace.tensors[argument]):
            return self.value(argument)
        name = self._names[argument]
        return self.g.weight(name, self._stored[name])

    def weight(self, name: str) -> ir.Value:
        """A stored weight in fp32."""
        if name not in self._weights:
            stored = self._stored[name]
            value = self.g.weight(name, stored)
            wide = value if stored.dtype == "float32" else self.g.cast(value, "float32")
            self._weights[name] = wide
        return self._weights[name]

    def sizes(self, node: Node, source: Node | None = None) -> ir.Value:
        """The shape of a node's result, to which `source` is to be reshaped."""
        sizes = node.meta["val"].shape
        known = () if source is None else source.meta["val"].shape
        parts: list[Any] = []
        for index, size in enumerate(sizes):
            expression = _expression(size)
            if isinstance(expression, int):
                parts.append(expression)
            elif index < len(known) and _expression(known[index]) == expression:
                parts.append(0)  # as it was
            else:
                parts.append(expression)
        free = [index for index, part in enumerate(parts) if not isinstance(part, int)]
        if len(free) == 1:
            parts[free[0]] = -1
        return self._vector(parts)

    def lengths(self, node: Node) -> ir.Value:
        """The shape of a node's result in numbers, none of them -1 or 0."""
        return self._vector([_expression(size) for size in node.meta["val"].shape])

    def _vector(self, parts: Sequence[Any]) -> ir.Value:
        key = tuple(parts)
        if key not in self._vectors:
            if all(isinstance(part, int) for part in parts):
                self._vectors[key] = self.g.ints(*(int(part) for part in parts))
            else:
                values = [self.g.ints(p) if isinstance(p, int) else self._size(p) for p in parts]
                self._vectors[key] = self.g.op("Concat", *values, axis=0)
        return self._vectors[key]

    def _size(self, expression: Any) -> ir.Value:
        """A size that depends on batch and length, as a vector of one."""
        if expression not in self._lengths:
            if expression.is_Integer:
                return self.g.ints(int(expression))
            combine = _SIZES.get(expression.func.__name__)
            if combine is None:
                raise NotImplementedError(f"a size of {expression}")
            first, *rest = (self._size(argument) for argument in expression.args)
            for value in rest:
                first = self.g.op(combine, first, value)
            self._lengths[expression] = first
        return self._lengths[expression]

    def _written(self, node: Node) -> Any:
        trace = self._pieces.trace
        if node in trace.tensors:
            return self._constant(node)
        if node in trace.norms:
            norm = trace.norms[node]
            return self.g.op(
                "SimplifiedLayerNormalization", self.value(norm.rows), self.value(norm.scale),
                axis=-1, epsilon=norm.epsilon, stash_type=1,
            )  # fmt: skip
        special = {ATTENTION: self._attention, EXPERTS: self._experts}.get(node.target)
        try:
            if special is not None:
                return special(node)
            if node.target is operator.getitem:
                return self._values[node.args[0]][node.args[1]]  # type: ignore[index]
            if node.target in SPLITS:
                return split(self, node)
            if node.target in TABLE:
                return TABLE[node.target](self, node)
            problem = "has an operator that has no counterpart here"
        except NotImplementedError as error:
            problem = f"has an operator that is used in a way that has no counterpart: {error}"
        raise CheckpointError(
            f"{node.name} in the trace",
            problem,
            found=str(node.target),
            fix=OTHER_FAMILY,
        )

    def _constant(self, node: Node) -> ir.Value:
        trace = self._pieces.trace
        tensor = trace.tensors[node]
        if not is_inline(tensor):
            return self.weight(self._names[node])
        if tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"constant {self._names[node]}", "is of a dtype that has no counterpart",
                found=tensor.dtype, fix=OTHER_FAMILY,
            )  # fmt: skip
        return self.g.constant(tensor.detach().numpy(), DTYPES[tensor.dtype][1])

    def _attention(self, node: Node) -> ir.Value:
        """GroupQueryAttention over queries and keys that are turned already: [B, S, H, N]."""
        g, layer = self.g, self._pieces.layers.index(node)
        query, key, value, sinks, scale, softcap = node.args
        shape = self._pieces.shape
        heads, width = shape.num_heads, shape.head_size
        value_width = int(value.meta["val"].shape[-1])  # type: ignore[union-attr]
        flat = [
            self._by_token(argument, count, width)
            for argument, count in (
                (query, heads), (key, shape.num_kv_heads), (value, shape.num_kv_heads)
            )
        ]  # fmt: skip
        cache = ("batch", shape.num_kv_heads, "capacity", width)
        past = [g.declare(spec) for spec in cache_pair("past", layer, "float32", cache)]
        assert self._step is not None
        window = self._pieces.windows[layer]
        settings: dict[str, Any] = {} if window is None else {"local_window_size": window}
        if softcap:
            settings["softcap"] = softcap
        more = [] if sinks is None else [None, None, None, None, self.value(sinks)]
        attended, *cached = g.ops(
            "GroupQueryAttention", *flat, *past, *self._step, *more,
            count=3, domain=CONTRIB, num_heads=heads, kv_num_heads=shape.num_kv_heads,
            scale=scale, **settings,
        )  # fmt: skip
        specs = cache_pair("present", layer, "float32", cache)
        self._cached += list(zip(cached, specs, strict=True))
        by_head = g.op("Reshape", attended, g.ints(0, 0, heads, width))
        if value_width == width:
            return by_head
        return g.op("Slice", by_head, g.ints(0), g.ints(value_width), g.ints(3))

    def _by_token(self, argument: Any, heads: int, width: int) -> ir.Value:
        """[B, heads, S, N] → [B, S, heads · width], filled up with zeros where N is less."""
        g, found = self.g, int(argument.meta["val"].shape[-1])
        value = g.op("Transpose", self.value(argument), perm=[0, 2, 1, 3])
        if found != width:
            pads = g.ints(0, 0, 0, 0, 0, 0, 0, width - found)
            value = g.op("Pad", value, pads)
        return g.op("Reshape", value, g.ints(0, 0, heads * width))

    def _experts(self, node: Node) -> ir.Value:
        source = node.args[0]
        experts = next(
            e for e, s in zip(self._pieces.experts, self._pieces.sites, strict=True)
            if s.experts is node
        )  # fmt: skip
        gate_up, down = (self.weight(experts.name(part)) for part in ("gate_up", "down"))
        gate_up_bias, down_bias = (
            self.weight(experts.name(f"{part}_bias")) if experts.biases else None
            for part in ("gate_up", "down")
        )
        return forced_experts(
            self.g, self.value(source), *self._routed[node], gate_up, down,
            (gate_up_bias, down_bias),
            num_experts=self._gate.num_experts,
            experts_per_token=self._gate.experts_per_token, swiglu=experts.swiglu,
        )  # fmt: skip


def _head(trace: Trace) -> Node:
    """The linear map that the logits come from."""
    node = trace.output
    width = node.meta["val"].shape[-1]
    while node.target is not torch.ops.aten.linear.default:
        sources = [
            n for n in node.all_input_nodes
            if isinstance(n.meta.get("val"), torch.Tensor) and n.meta["val"].shape[-1:] == (width,)
            and n not in trace.tensors
        ]  # fmt: skip
        if len(sources) != 1:
            raise CheckpointError(
                "logits", "do not come from one linear map", found=node.name, fix=OTHER_FAMILY
            )
        node = sources[0]
    return node


def _expression(size: Any) -> Any:
    if isinstance(size, int):
        return size
    found = size.node.expr
    return int(found) if found.is_Integer else found
