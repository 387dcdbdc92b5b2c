"""What a lowering is: each part of a model, turned into the operators of one kind of runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir

from knnmoe.export.graph import GraphBuilder
from knnmoe.runtime.bundle import TensorSpec

Pair = tuple[ir.Value, ir.Value]
Cached = tuple[ir.Value, ...]  # key and value; one value where attention is latent


@dataclass(frozen=True)
class Stream:
    """What flows between the parts.

    Attributes:
        hidden: Residual stream [B, S, D] before the experts.
        router_input: What router and experts read, or a dense layer's own part, [T, D].
    """

    hidden: ir.Value
    router_input: ir.Value


@dataclass(frozen=True)
class CacheSpecs:
    """A layer's cache at the edge of a graph: what goes in and comes out; mostly (key, value)."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def cache_pair(
    prefix: str, layer: int, dtype: str, shape: tuple[int | str, ...]
) -> tuple[TensorSpec, TensorSpec]:
    """The specs of `{prefix}_key_{layer}` and `{prefix}_value_{layer}`."""
    key, value = (f"{prefix}_{part}_{layer}" for part in ("key", "value"))
    return TensorSpec(key, dtype, shape), TensorSpec(value, dtype, shape)


def silu_gated(g: GraphBuilder, packed: ir.Value, width: int) -> ir.Value:
    """gate and up side by side, [T, 2 · width] → silu(gate) · up, [T, width]."""
    gate, up = g.ops("Split", packed, g.ints(width, width), count=2, axis=1)
    return g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)


class Lowering(Protocol):
    """Appends the parts of one model to a graph."""

    @property
    def step_inputs(self) -> tuple[TensorSpec, ...]:
        """Graph inputs that say where in its sequences a step stands."""

    def cache(self, layer: int) -> CacheSpecs:
        """The cache of one layer."""

    def embed(self, input_ids: ir.Value) -> ir.Value:
        """input_ids [B, S] → hidden [B, S, D]."""

    def first_norm(self, hidden: ir.Value, layer: int) -> ir.Value:
        """The norm before attention in the first layer, [B, S, D]."""

    def attention(
        self,
        hidden: ir.Value,
        normed: ir.Value,
        layer: int,
        past: Cached,
        step: Sequence[ir.Value],
    ) -> tuple[Stream, Cached]:
        """Attention, residual sum and the norm after it: (stream, the cache's outputs).

        Args:
            hidden: Residual stream [B, S, D].
            normed: Its norm, [B, S, D].
            layer: Whose attention.
            past: The cache's inputs.
            step: The `step_inputs`.
        """

    def router(self, router_input: ir.Value, layer: int) -> ir.Value:
        """router_input [T, D] → router_logits [T, E]."""

    def experts(
        self, stream: Stream, expert_ids: ir.Value, expert_weights: ir.Value, layer: int
    ) -> ir.Value:
        """The weighted sum of the chosen experts, and the shared one: like hidden, [B, S, D]."""

    def dense(self, stream: Stream, layer: int) -> ir.Value:
        """What a layer without a gate has in place of experts, like hidden, [B, S, D]."""

    def next_norm(self, hidden: ir.Value, mixed: ir.Value, layer: int) -> Pair:
        """Residual sum and the norm before the next attention: (hidden, normed), [B, S, D]."""

    def logits(self, hidden: ir.Value, mixed: ir.Value, logit_rows: ir.Value) -> ir.Value:
        """Residual sum, final norm and head for the rows asked for: [R, V]."""
