"""What a checkpoint of a described family turns out to be."""

from __future__ import annotations

import math
from dataclasses import dataclass

from knnmoe.runtime.bundle import ModelShape
from knnmoe.runtime.routing import RoutingRule

from .family import Family
from .latent import Latent
from .rope import Rope


@dataclass(frozen=True)
class Swiglu:
    """What an expert makes of gate and up: gate · σ(alpha · gate) · (up + shift).

    Attributes:
        alpha, shift: Of the formula; as they are here it is silu(gate) · up.
        limit: Before that, gate is cut off above it, and up above it and below its negative; None
            for no limit.
    """

    alpha: float = 1.0
    shift: float = 0.0
    limit: float | None = None


@dataclass(frozen=True)
class Layer:
    """What sets one layer apart from the others.

    Attributes:
        gate: Number of its gate; None for a dense layer.
        window: Tokens that a query sees, itself the last of them; None for all before it.
    """

    gate: int | None
    window: int | None


@dataclass(frozen=True)
class Architecture:
    """A checkpoint's sizes and constants, checked; `shape` and `routing` go into the manifest.

    `mxfp4` says whether the checkpoint's experts are in that format; no bundle has them so.
    """

    family: Family
    shape: ModelShape
    routing: RoutingRule
    layers: tuple[Layer, ...]
    expert_width: int
    dense_width: int | None  # of the layers without experts
    shared_width: int | None  # of the expert that every token goes through
    attention_bias: bool
    head_norms: bool  # whether query and key have norms
    latent: Latent | None  # sizes of latent attention; `shape` says what it caches
    rotary_size: int  # numbers of a head that the rotary embedding turns, the first ones
    further_layers: int  # of the checkpoint, behind the last one: they predict more tokens
    norm_epsilon: float
    rope: Rope
    clip_qkv: float | None
    tied_head: bool
    swiglu: Swiglu = Swiglu()  # of the experts behind a gate
    mxfp4: bool = False

    @property
    def query_width(self) -> int:
        """Width of all query heads."""
        return self.shape.num_heads * (self.latent.query if self.latent else self.shape.head_size)

    @property
    def attended_width(self) -> int:
        """Width of what all heads make of the values."""
        return self.shape.num_heads * (self.latent.value if self.latent else self.shape.head_size)

    @property
    def softmax_scale(self) -> float:
        """What the products of queries and keys are multiplied with."""
        if self.latent is None:
            return 1 / math.sqrt(self.shape.head_size)
        return self.rope.softmax / math.sqrt(self.latent.query)

    @property
    def kv_width(self) -> int:
        """Width of all key (or value) heads."""
        return self.shape.num_kv_heads * self.shape.head_size

    @property
    def gate_layers(self) -> tuple[int, ...]:
        """The layer of each gate."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.gate is not None)

    @property
    def expert_biases(self) -> bool:
        """Whether the experts' linear maps have biases."""
        return self.family.tensors.stacked_gate_up_bias is not None

    @property
    def output_bias(self) -> bool:
        """Whether the linear map after attention has a bias."""
        return self.attention_bias and self.family.tensors.output_bias is not None

    @property
    def interleaved(self) -> bool:
        """Whether the numbers that the rotary embedding turns as a pair are neighbours."""
        return self.latent is not None and self.latent.interleaved

    @property
    def shared_router(self) -> bool:
        """Whether a router of its own says how much of the shared expert is added."""
        return self.family.tensors.shared_router is not None

    def segment_layers(self, segment: int) -> range:
        """The layers whose attention a segment holds: behind one gate, up to the next."""
        ends = [0, *(layer + 1 for layer in self.gate_layers), len(self.layers)]
        return range(ends[segment], ends[segment + 1])
