"""Latent attention in the absorbed form, as far as both lowerings share it.

A head's score of a token is q·(U c) = (Uᵀq)·c, with c the token's latent, and its output is
Σ w (V c) = V (Σ w c). So the queries are multiplied by U, the outputs by V, and what attention
itself sees is one key for all heads, of which a part is also the value (arXiv 2405.04434, section
2.1.2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from knnmoe.export.architecture import Architecture
from knnmoe.export.graph import GraphBuilder
from knnmoe.export.latent import LATENT_EPSILON, Latent

from .ort_weights import layer_name


@dataclass(frozen=True)
class LatentHeads:
    """What latent attention computes with, before the rotary embedding.

    Attributes:
        query_rotary: [T, heads, rotary].
        query: [T, heads, rank], multiplied by each head's U.
        key_rotary: [T, rotary].
        latent: [T, rank], normed.
    """

    query_rotary: ir.Value
    query: ir.Value
    key_rotary: ir.Value
    latent: ir.Value


@dataclass(frozen=True)
class LatentParts:
    """Appends latent attention to a graph in the operators of one lowering.

    Attributes:
        g: The graph.
        architecture: The model's.
        linear: Rows [T, in] by a named weight [out, in] → [T, out].
        norm: Root-mean-square norm of rows with a named weight and an epsilon.
        by_head: [heads, T, in] by a named weight [heads, in, out] → [heads, T, out].
    """

    g: GraphBuilder
    architecture: Architecture
    linear: Callable[[ir.Value, str], ir.Value]
    norm: Callable[[ir.Value, str, float], ir.Value]
    by_head: Callable[[ir.Value, str], ir.Value]

    @property
    def sizes(self) -> Latent:
        """Of the model's attention."""
        assert self.architecture.latent is not None
        return self.architecture.latent

    def heads(self, rows: ir.Value, layer: int) -> LatentHeads:
        """Normed rows [T, D] → what attention computes with."""
        g, sizes, heads = self.g, self.sizes, self.architecture.shape.num_heads

        def name(part: str) -> str:
            return layer_name(layer, part)

        packed = self.linear(rows, name("qkv"))
        first = sizes.query_rank or heads * sizes.query
        widths = g.ints(first, sizes.rank, sizes.rotary)
        query, latent, key_rotary = g.ops("Split", packed, widths, count=3, axis=1)
        if sizes.query_rank is not None:
            query = self.norm(query, name("query_norm"), LATENT_EPSILON)
            query = self.linear(query, name("query_up"))
        query = g.op("Reshape", query, g.ints(-1, heads, sizes.query))
        widths = g.ints(sizes.plain, sizes.rotary)
        plain, query_rotary = g.ops("Split", query, widths, count=2, axis=2)
        absorbed = self.by_head(_turned(g, plain), name("key_up"))
        latent = self.norm(latent, name("latent_norm"), LATENT_EPSILON)
        return LatentHeads(query_rotary, _turned(g, absorbed), key_rotary, latent)

    def values(self, attended: ir.Value, layer: int) -> ir.Value:
        """Attended keys [T, heads, cached] → the heads' outputs, [T, heads · value]."""
        g, sizes, heads = self.g, self.sizes, self.architecture.shape.num_heads
        widths = g.ints(sizes.rotary, sizes.rank)
        _, latents = g.ops("Split", attended, widths, count=2, axis=2)
        values = self.by_head(_turned(g, latents), layer_name(layer, "value_up"))
        return g.op("Reshape", _turned(g, values), g.ints(-1, heads * sizes.value))


def _turned(g: GraphBuilder, value: ir.Value) -> ir.Value:
    """[T, heads, n] ↔ [heads, T, n]."""
    return g.op("Transpose", value, perm=[1, 0, 2])
