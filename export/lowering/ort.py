"""The `ort` lowering: what the parts of a model become for ONNX Runtime.

GroupQueryAttention with rotary embedding and the key-value cache in place, fused norms, and one
node for all experts of a gate. Residual sums are always written together with the norm that follows
them (SkipSimplifiedLayerNormalization), so that ONNX Runtime finds nothing left to fuse, and the
split and the fused layout compute the same operations in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from knnmoe.export.architecture import Architecture
from knnmoe.export.graph import CONTRIB, GraphBuilder, StoredTensor
from knnmoe.runtime.bundle import TensorSpec

from .base import Cached, CacheSpecs, Pair, Stream, cache_pair, silu_gated
from .latent import LatentParts
from .ort_experts import activation, dense_weights, forced_experts
from .ort_weights import EMBEDDING, FINAL_NORM, HEAD, ROPE_COS, ROPE_SIN, layer_name

SEQLENS_K = TensorSpec("seqlens_k", "int32", ("batch",))
TOTAL_LENGTH = TensorSpec("total_sequence_length", "int32", ())


class OrtLowering:
    """Appends the parts of one model to a graph.

    Args:
        g: The graph under construction.
        architecture: The model's.
        stored: Where each weight lies, by its name in `ort_weights`.
        experts_per_token: k of the seam.
    """

    def __init__(
        self,
        g: GraphBuilder,
        architecture: Architecture,
        stored: Mapping[str, StoredTensor],
        experts_per_token: int,
    ) -> None:
        self._g = g
        self._a = architecture
        self._stored = stored
        self._k = experts_per_token
        self._step_positions: ir.Value | None = None

    @property
    def step_inputs(self) -> tuple[TensorSpec, ...]:
        """Total length of each sequence minus one, and the longest total length."""
        return SEQLENS_K, TOTAL_LENGTH

    def cache(self, layer: int) -> CacheSpecs:
        """The cache; the operator updates it in place where past and present are one buffer."""
        shape = ("batch", self._a.shape.num_kv_heads, "capacity", self._a.shape.head_size)
        past, present = (cache_pair(name, layer, "float32", shape) for name in ("past", "present"))
        return CacheSpecs(past[:1] if self._a.latent else past, present)

    def weight(self, name: str) -> ir.Value:
        """The initializer of a weight."""
        return self._g.weight(name, self._stored[name])

    def embed(self, input_ids: ir.Value) -> ir.Value:
        """input_ids [B, S] → hidden [B, S, D]."""
        return self._g.op("Gather", self.weight(EMBEDDING), input_ids, axis=0)

    def first_norm(self, hidden: ir.Value, layer: int) -> ir.Value:
        """The norm before attention in the first layer, [B, S, D]."""
        return self._norm(hidden, layer_name(layer, "input_norm"))

    def attention(
        self,
        hidden: ir.Value,
        normed: ir.Value,
        layer: int,
        past: Cached,
        step: Sequence[ir.Value],
    ) -> tuple[Stream, Cached]:
        """Attention, residual sum and the norm after it: (stream, (key, value) caches)."""
        g, a = self._g, self._a
        attend = self._attend if a.latent is None else self._attend_latent
        attended, cached = attend(normed, layer, past, step)
        projected = self._linear(attended, layer_name(layer, "output"))
        if a.output_bias:
            projected = g.op("Add", projected, self.weight(layer_name(layer, "output_bias")))
        projected = g.op("Reshape", projected, g.op("Shape", hidden))
        router_input, hidden = self._add_norm(hidden, projected, layer_name(layer, "router_norm"))
        return Stream(hidden, self._flat(router_input, a.shape.hidden_size)), cached

    def _attend(
        self, normed: ir.Value, layer: int, past: Cached, step: Sequence[ir.Value]
    ) -> tuple[ir.Value, Cached]:
        """normed [B, S, D] → (attended [T, Q], the caches)."""
        g, a = self._g, self._a
        window = a.layers[layer].window
        windowed = {} if window is None else {"local_window_size": window}
        sinks: list[ir.Value | None] = []
        if a.family.tensors.sinks is not None:
            sinks = [None, None, self.weight(layer_name(layer, "sinks"))]
        query, key, value = self._query_key_value(normed, layer)
        outputs = g.ops(
            "GroupQueryAttention", query, key, value, *past, *step,
            self.weight(ROPE_COS), self.weight(ROPE_SIN), *sinks,
            count=3, domain=CONTRIB, num_heads=a.shape.num_heads,
            kv_num_heads=a.shape.num_kv_heads, do_rotary=1, **windowed,
        )  # fmt: skip
        return self._flat(outputs[0], a.query_width), (outputs[1], outputs[2])

    def _attend_latent(
        self, normed: ir.Value, layer: int, past: Cached, step: Sequence[ir.Value]
    ) -> tuple[ir.Value, Cached]:
        """As `_attend`, over one key for all heads that is the value as well.

        The operator has no rotary embedding to do: it would turn the key and not the value.
        """
        g, a, parts = self._g, self._a, self._latent_parts
        heads = parts.heads(self._flat(normed, a.shape.hidden_size), layer)
        batch = g.op("Shape", normed, start=0, end=2)
        flat, positions = (
            g.ints(-1, a.shape.num_heads, a.rotary_size),
            self._positions(normed, step),
        )
        turned = self._turned(heads.query_rotary, batch, a.shape.num_heads, positions)
        query = g.op("Concat", g.op("Reshape", turned, flat), heads.query, axis=2)
        turned = self._turned(heads.key_rotary, batch, 1, positions)
        key = g.op("Concat", self._flat(turned, a.rotary_size), heads.latent, axis=1)
        query, key = (
            g.op("Reshape", part, g.op("Concat", batch, g.ints(width), axis=0))
            for part, width in (
                (query, a.shape.num_heads * a.shape.head_size),
                (key, a.shape.head_size),
            )
        )
        (cache,) = past
        outputs = g.ops(
            "GroupQueryAttention", query, key, key, cache, cache, *step,
            count=3, domain=CONTRIB, num_heads=a.shape.num_heads, kv_num_heads=1,
            scale=a.softmax_scale,
        )  # fmt: skip
        attended = g.op("Reshape", outputs[0], g.ints(-1, a.shape.num_heads, a.shape.head_size))
        return parts.values(attended, layer), (outputs[1], outputs[2])

    @property
    def _latent_parts(self) -> LatentParts:
        g = self._g

        def by_head(rows: ir.Value, name: str) -> ir.Value:
            return g.op("MatMul", rows, self.weight(name))

        return LatentParts(g, self._a, self._linear, self._norm, by_head)

    def _turned(self, part: ir.Value, batch: ir.Value, heads: int, positions: ir.Value) -> ir.Value:
        """The rotary embedding of part [T, …] as [B, S, heads · rotary size]."""
        g, a = self._g, self._a
        assert a.latent is not None
        size = g.op("Concat", batch, g.ints(heads * a.rotary_size), axis=0)
        return g.op(
            "RotaryEmbedding", g.op("Reshape", part, size), positions,
            self.weight(ROPE_COS), self.weight(ROPE_SIN),
            domain=CONTRIB, interleaved=int(a.latent.interleaved), num_heads=heads,
        )  # fmt: skip

    def _positions(self, normed: ir.Value, step: Sequence[ir.Value]) -> ir.Value:
        """Positions [B, S] of the tokens of a step, appended once a graph.

        A step with a past has sequences of one length: one sequence, or one token each. So the
        first of S tokens stands at the total length less S, and at 0 without a past.
        """
        if self._step_positions is None:
            g = self._g
            totals = g.op("Add", g.cast(step[0], "int64"), g.ints(1))
            length = g.op("Shape", normed, start=1, end=2)
            start = g.op("Max", g.op("Sub", totals, length), g.ints(0))
            zero, one = (g.constant(number, np.int64) for number in (0, 1))
            offsets = g.op("Range", zero, g.op("Squeeze", length), one)
            self._step_positions = g.op("Add", g.op("Unsqueeze", start, g.ints(1)), offsets)
        return self._step_positions

    def router(self, router_input: ir.Value, layer: int) -> ir.Value:
        """router_input [T, D] → router_logits [T, E]."""
        logits = self._linear(router_input, layer_name(layer, "router"))
        if self._a.family.tensors.router_bias is None:
            return logits
        return self._g.op("Add", logits, self.weight(layer_name(layer, "router_bias")))

    def experts(
        self, stream: Stream, expert_ids: ir.Value, expert_weights: ir.Value, layer: int
    ) -> ir.Value:
        """The weighted sum of the chosen experts, and the shared one: like hidden, [B, S, D]."""
        g, rows = self._g, stream.router_input
        mixed = self.moe(rows, expert_ids, expert_weights, layer)
        if self._a.shared_width is not None:
            shared = self._gated(rows, layer, "shared", self._a.shared_width)
            if self._a.shared_router:
                share = g.op("Sigmoid", self._linear(rows, layer_name(layer, "shared_router")))
                shared = g.op("Mul", share, shared)
            mixed = g.op("Add", mixed, shared)
        return g.op("Reshape", mixed, g.op("Shape", stream.hidden))

    def dense(self, stream: Stream, layer: int) -> ir.Value:
        """What a layer without a gate has in place of experts, like hidden, [B, S, D]."""
        assert self._a.dense_width is not None
        mixed = self._gated(stream.router_input, layer, "dense", self._a.dense_width)
        return self._g.op("Reshape", mixed, self._g.op("Shape", stream.hidden))

    def next_norm(self, hidden: ir.Value, mixed: ir.Value, layer: int) -> Pair:
        """Residual sum and the norm before the next attention: (hidden, normed), [B, S, D]."""
        normed, hidden = self._add_norm(hidden, mixed, layer_name(layer, "input_norm"))
        return hidden, normed

    def logits(self, hidden: ir.Value, mixed: ir.Value, logit_rows: ir.Value) -> ir.Value:
        """Residual sum, final norm and head for the rows asked for: [R, V]."""
        g, a = self._g, self._a
        flat = self._flat(g.op("Add", hidden, mixed), a.shape.hidden_size)
        rows = g.op("Gather", flat, logit_rows, axis=0)
        return self._linear(self._norm(rows, FINAL_NORM), EMBEDDING if a.tied_head else HEAD)

    def moe(
        self, router_input: ir.Value, expert_ids: ir.Value, expert_weights: ir.Value, layer: int
    ) -> ir.Value:
        """Experts in fp32, forced to the given ids and weights; see `forced_experts`."""
        return forced_experts(
            self._g, router_input, expert_ids, expert_weights,
            self.weight(layer_name(layer, "gate_up")), self.weight(layer_name(layer, "down")),
            self._expert_biases(layer), num_experts=self._a.shape.num_experts,
            experts_per_token=self._k, swiglu=self._a.swiglu,
        )  # fmt: skip

    def _expert_biases(self, layer: int) -> tuple[ir.Value | None, ir.Value | None]:
        """Of gate and up, and of down; None where there are none."""
        if not self._a.expert_biases:
            return None, None
        up, down = (self.weight(layer_name(layer, f"{part}_bias")) for part in ("gate_up", "down"))
        return up, down

    def _activation(self) -> dict[str, Any]:
        return activation(self._a.swiglu)

    def _dense_weights(
        self, router_input: ir.Value, expert_ids: ir.Value, expert_weights: ir.Value
    ) -> ir.Value:
        count = self._a.shape.num_experts
        return dense_weights(self._g, router_input, expert_ids, expert_weights, count)

    def _query_key_value(self, normed: ir.Value, layer: int) -> tuple[ir.Value, ir.Value, ir.Value]:
        """normed [B, S, D] → query [B, S, Q], key and value [B, S, KV]."""
        g, a = self._g, self._a
        widths = (a.query_width, a.kv_width, a.kv_width)
        packed = self._linear(self._flat(normed, a.shape.hidden_size), layer_name(layer, "qkv"))
        if a.attention_bias:
            packed = g.op("Add", packed, self.weight(layer_name(layer, "qkv_bias")))
        query, key, value = g.ops("Split", packed, g.ints(*widths), count=3, axis=1)
        if a.head_norms:
            query = self._norm(self._for_norm(query), layer_name(layer, "query_norm"))
            key = self._norm(self._for_norm(key), layer_name(layer, "key_norm"))
        batch = g.op("Shape", normed, start=0, end=2)
        parts = []
        for part, width in zip((query, key, value), widths, strict=True):
            bounded = part if a.clip_qkv is None else self._clip(part, a.clip_qkv)
            shape = g.op("Concat", batch, g.ints(width), axis=0)
            parts.append(g.op("Reshape", bounded, shape))
        return parts[0], parts[1], parts[2]

    def _for_norm(self, part: ir.Value) -> ir.Value:
        """Queries or keys [T, width] with what a norm is over as their last axis."""
        if not self._a.family.head_norms:
            return part
        return self._g.op("Reshape", part, self._g.ints(0, -1, self._a.shape.head_size))

    def _gated(self, rows: ir.Value, layer: int, part: str, width: int) -> ir.Value:
        """down(silu(gate) · up) of a part that every token goes through: rows [T, D] → [T, D]."""
        packed = self._linear(rows, layer_name(layer, f"{part}_gate_up"))
        return self._linear(silu_gated(self._g, packed, width), layer_name(layer, f"{part}_down"))

    def _clip(self, value: ir.Value, bound: float) -> ir.Value:
        low, high = (self._g.constant(b, np.float32) for b in (-bound, bound))
        return self._g.op("Clip", value, low, high)

    def _flat(self, value: ir.Value, width: int) -> ir.Value:
        """[B, S, width] → [T, width]."""
        return self._g.op("Reshape", value, self._g.ints(-1, width))

    def _linear(self, rows: ir.Value, name: str) -> ir.Value:
        """rows [T, in] by a weight [out, in] → [T, out]."""
        return self._g.op("Gemm", rows, self.weight(name), transB=1)

    def _norm(self, value: ir.Value, name: str, epsilon: float | None = None) -> ir.Value:
        return self._g.op(
            "SimplifiedLayerNormalization", value, self.weight(name),
            axis=-1, epsilon=epsilon or self._a.norm_epsilon, stash_type=1,
        )  # fmt: skip

    def _add_norm(self, hidden: ir.Value, added: ir.Value, name: str) -> Pair:
        """(norm of the sum, the sum)."""
        outputs = self._g.ops(
            "SkipSimplifiedLayerNormalization", hidden, added, self.weight(name),
            count=4, domain=CONTRIB, epsilon=self._a.norm_epsilon,
        )  # fmt: skip
        return outputs[0], outputs[3]
