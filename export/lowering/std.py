"""The `std` lowering: standard ONNX operators, for TensorRT and ONNX Runtime's CUDA provider.

The weights are those of the bundle, where they lie; float16 graphs cast them, and both hosts fold
the cast when they load the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from knnmoe.export.architecture import Architecture
from knnmoe.export.graph import GraphBuilder, StoredTensor
from knnmoe.runtime.bundle import TensorSpec

from .base import Cached, CacheSpecs, Pair, Stream, cache_pair
from .latent import LatentParts
from .ort_weights import EMBEDDING, FINAL_NORM, HEAD, layer_name
from .std_attention import ATTENTION, AttentionRule, Heads
from .std_blocks import BlockOps
from .std_experts import EXPERTS
from .std_ops import Operators, StdOps, StdOptions

OPSETS: dict[Operators, int] = {"primitive": 20, "modern": 24}
BLOCK_OPSET = 21  # the first with blocks in DequantizeLinear
PAST_LENGTHS = TensorSpec("past_lengths", "int64", ("batch",))


class StdLowering:
    """Appends the parts of one model to a graph; see `Lowering`.

    Args:
        g: The graph under construction, of the opset that `OPSETS` has for the operators.
        architecture: The model's.
        stored: Where each weight lies, by its name in `ort_weights`.
        options: What the graph is made for.
        block_size: Of weights in blocks; None where there are none.
    """

    def __init__(
        self,
        g: GraphBuilder,
        architecture: Architecture,
        stored: Mapping[str, StoredTensor],
        options: StdOptions,
        block_size: int | None = None,
    ) -> None:
        self._ops = (
            StdOps(g, architecture, stored, options)
            if block_size is None
            else BlockOps(g, architecture, stored, options, block_size)
        )
        self._options = options
        self._attend = ATTENTION[options.operators]
        self._experts = EXPERTS[options.experts]

    @property
    def step_inputs(self) -> tuple[TensorSpec, ...]:
        """The tokens of each sequence that are in the cache already."""
        return (PAST_LENGTHS,)

    def cache(self, layer: int) -> CacheSpecs:
        """The cache going in; and coming out the same (`modern`), or what is new (`primitive`)."""
        heads, size = self._ops.a.shape.num_kv_heads, self._ops.a.shape.head_size
        capacity = self._options.capacity or "capacity"
        whole, new = (("batch", heads, length, size) for length in (capacity, "sequence"))
        dtype = self._options.precision
        past = cache_pair("past", layer, dtype, whole)
        modern = self._options.operators == "modern"
        name, shape = ("present", whole) if modern else ("new", new)
        after = cache_pair(name, layer, dtype, shape)
        return CacheSpecs(past[:1], after[:1]) if self._ops.a.latent else CacheSpecs(past, after)

    def embed(self, input_ids: ir.Value) -> ir.Value:
        """See `Lowering.embed`."""
        ops = self._ops
        return ops.widen(ops.g.op("Gather", ops.narrow_weight(EMBEDDING), input_ids, axis=0))

    def first_norm(self, hidden: ir.Value, layer: int) -> ir.Value:
        """See `Lowering.first_norm`."""
        return self._ops.norm(hidden, layer_name(layer, "input_norm"))

    def attention(
        self,
        hidden: ir.Value,
        normed: ir.Value,
        layer: int,
        past: Cached,
        step: Sequence[ir.Value],
    ) -> tuple[Stream, Cached]:
        """See `Lowering.attention`."""
        ops, size = self._ops, self._ops.a.shape
        (past_lengths,) = step
        heads = self._heads(normed, layer) if ops.a.latent is None else self._latent(normed, layer)
        attended, cached = self._attend(ops, heads, past, past_lengths, self._rule(layer))
        if ops.a.latent is None:
            rows = ops.flat(attended, ops.a.attended_width)
        else:
            by_head = ops.g.op("Reshape", attended, ops.g.ints(-1, size.num_heads, size.head_size))
            rows = self._latent_parts.values(by_head, layer)
        projected = ops.linear(rows, layer_name(layer, "output"))
        if ops.a.output_bias:
            projected = ops.biased(projected, layer_name(layer, "output_bias"))
        hidden = ops.g.op("Add", hidden, ops.like(projected, hidden))
        router_input = ops.norm(hidden, layer_name(layer, "router_norm"))
        return Stream(hidden, ops.flat(router_input, ops.a.shape.hidden_size)), cached

    def router(self, router_input: ir.Value, layer: int) -> ir.Value:
        """See `Lowering.router`; float32 in every precision, as the router decides."""
        logits = self._logits_of(router_input, layer, "router")
        if self._ops.a.family.tensors.router_bias is None:
            return logits
        return self._ops.biased(logits, layer_name(layer, "router_bias"))

    def experts(
        self, stream: Stream, expert_ids: ir.Value, expert_weights: ir.Value, layer: int
    ) -> ir.Value:
        """See `Lowering.experts`."""
        ops, rows = self._ops, stream.router_input
        mixed = self._experts(ops, rows, expert_ids, expert_weights, layer)
        if ops.a.shared_width is not None:
            shared = ops.gated(rows, layer, "shared", ops.a.shared_width)
            if ops.a.shared_router:
                share = ops.g.op("Sigmoid", self._logits_of(rows, layer, "shared_router"))
                shared = ops.g.op("Mul", share, shared)
            mixed = ops.g.op("Add", mixed, shared)
        return ops.like(mixed, stream.hidden)

    def dense(self, stream: Stream, layer: int) -> ir.Value:
        """See `Lowering.dense`."""
        ops = self._ops
        assert ops.a.dense_width is not None
        mixed = ops.gated(stream.router_input, layer, "dense", ops.a.dense_width)
        return ops.like(mixed, stream.hidden)

    def next_norm(self, hidden: ir.Value, mixed: ir.Value, layer: int) -> Pair:
        """See `Lowering.next_norm`."""
        hidden = self._ops.g.op("Add", hidden, mixed)
        return hidden, self.first_norm(hidden, layer)

    def logits(self, hidden: ir.Value, mixed: ir.Value, logit_rows: ir.Value) -> ir.Value:
        """See `Lowering.logits`."""
        ops = self._ops
        flat = ops.flat(ops.g.op("Add", hidden, mixed), ops.a.shape.hidden_size)
        rows = ops.norm(ops.g.op("Gather", flat, logit_rows, axis=0), FINAL_NORM)
        return ops.linear(rows, EMBEDDING if ops.a.tied_head else HEAD)

    def _logits_of(self, rows: ir.Value, layer: int, part: str) -> ir.Value:
        """Rows [T, D] by a router [n, D], in float32 → [T, n]."""
        weight = self._ops.weight(layer_name(layer, part))
        return self._ops.g.op("Gemm", rows, weight, transB=1)

    def _heads(self, normed: ir.Value, layer: int) -> Heads:
        """normed [B, S, D] → query, key and value by head."""
        g, ops, a = self._ops.g, self._ops, self._ops.a
        widths = (a.query_width, a.kv_width, a.kv_width)
        packed = ops.linear(ops.flat(normed, a.shape.hidden_size), layer_name(layer, "qkv"))
        if a.attention_bias:
            packed = ops.biased(packed, layer_name(layer, "qkv_bias"))
        query, key, value = g.ops("Split", packed, g.ints(*widths), count=3, axis=1)
        if a.head_norms:
            query = ops.norm(self._for_norm(query), layer_name(layer, "query_norm"))
            key = ops.norm(self._for_norm(key), layer_name(layer, "key_norm"))
        batch = g.op("Shape", normed, start=0, end=2)
        parts = []
        for part, width in zip((query, key, value), widths, strict=True):
            if a.clip_qkv is not None:
                part = g.op("Clip", part, ops.number(-a.clip_qkv), ops.number(a.clip_qkv))
            size = g.ints(width // a.shape.head_size, a.shape.head_size)
            parts.append(g.op("Reshape", part, g.op("Concat", batch, size, axis=0)))
        return Heads(*parts)

    @property
    def _latent_parts(self) -> LatentParts:
        ops = self._ops
        return LatentParts(ops.g, ops.a, ops.linear, ops.norm, ops.by_head)

    def _latent(self, normed: ir.Value, layer: int) -> Heads:
        """normed [B, S, D] → queries by head, and the key for all of them that is the value too."""
        g, ops, a = self._ops.g, self._ops, self._ops.a
        heads = self._latent_parts.heads(ops.flat(normed, a.shape.hidden_size), layer)
        batch = g.op("Shape", normed, start=0, end=2)
        query = g.op("Concat", heads.query_rotary, heads.query, axis=2)
        key = g.op("Concat", heads.key_rotary, heads.latent, axis=1)
        parts = []
        for part, count in ((query, a.shape.num_heads), (key, 1)):
            size = g.op("Concat", batch, g.ints(count, a.shape.head_size), axis=0)
            parts.append(g.op("Reshape", part, size))
        return Heads(parts[0], parts[1], None)

    def _rule(self, layer: int) -> AttentionRule:
        ops, name = self._ops, layer_name(layer, "sinks")
        sinks = None if ops.a.family.tensors.sinks is None else ops.weight(name)
        return AttentionRule(ops.a.layers[layer].window, sinks)

    def _for_norm(self, part: ir.Value) -> ir.Value:
        """Queries or keys [T, width] with what a norm is over as their last axis."""
        if not self._ops.a.family.head_norms:
            return part
        return self._ops.g.op("Reshape", part, self._ops.g.ints(0, -1, self._ops.a.shape.head_size))
