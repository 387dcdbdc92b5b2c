"""What the parts of the `std` lowering are made of: casts, norms and products of one precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from knnmoe.export.architecture import Architecture
from knnmoe.export.graph import GraphBuilder, StoredTensor

from .base import silu_gated
from .ort_weights import layer_name

Operators = Literal["primitive", "modern"]
Precision = Literal["float32", "float16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "float16")
Experts = Literal["gathered", "dense", "moe"]
Host = Literal["onnxruntime", "tensorrt"]
HOSTS: tuple[Host, ...] = ("onnxruntime", "tensorrt")


@dataclass(frozen=True)
class StdOptions:
    """What a std graph is made for.

    Attributes:
        operators: `primitive` is opset 20 without any operator made for transformers, which
            TensorRT 10.3 and newer parse; `modern` is opset 24 with RMSNormalization,
            RotaryEmbedding, TensorScatter and Attention (TensorRT 10.15, TensorRT-RTX 1.7).
        precision: Of matrix products and the key-value cache. The residual stream, norms, softmax,
            the router and all that crosses the seam are float32 either way.
        experts: `gathered` reads the weights of each token's own experts (few tokens); `dense` runs
            every expert on every token and weighs (many tokens); `moe` is TensorRT's own layer, the
            one operator that is not standard (TensorRT 11 on compute capability 10.x and 11.x).
        capacity: Tokens that the key-value cache has room for, or None to leave it free. TensorRT
            takes `modern` graphs with a capacity only.
        host: Whose optimizer the graph is written for; it is standard ONNX either way. Weights in
            blocks lie for `tensorrt` in files of their own (`signed_codes`).
    """

    operators: Operators = "primitive"
    precision: Precision = "float32"
    experts: Experts = "gathered"
    capacity: int | None = None
    host: Host = "onnxruntime"


class StdOps:
    """Appends operators to a graph; values are float32 unless they were narrowed.

    Args:
        g: The graph under construction.
        architecture: The model's.
        stored: Where each weight lies, by its name in `ort_weights`.
        options: What the graph is made for.
    """

    def __init__(
        self,
        g: GraphBuilder,
        architecture: Architecture,
        stored: Mapping[str, StoredTensor],
        options: StdOptions,
    ) -> None:
        self.g = g
        self.a = architecture
        self.dtype = options.precision
        self.host = options.host
        self._stored = stored
        self._rms_norm = options.operators == "modern"
        self._made: dict[str, ir.Value] = {}

    def once(self, name: str, make: Callable[[], ir.Value]) -> ir.Value:
        """What `make` appends, appended once a graph."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def weight(self, name: str) -> ir.Value:
        """A weight, float32."""
        return self._weight(name, "float32")

    def narrow_weight(self, name: str) -> ir.Value:
        """A weight of a matrix product, in the precision of those."""
        return self._weight(name, self.dtype)

    def _weight(self, name: str, dtype: str) -> ir.Value:
        """A weight, cast if it is stored otherwise. Both hosts fold the cast as they load it."""
        stored = self._stored[name]
        value = self.g.weight(name, stored)
        if stored.dtype == dtype:
            return value
        return self.once(f"{dtype} {name}", lambda: self.g.cast(value, dtype))

    def narrow(self, value: ir.Value) -> ir.Value:
        """A float32 value in the precision of the matrix products."""
        return value if self.dtype == "float32" else self.g.cast(value, self.dtype)

    def widen(self, value: ir.Value) -> ir.Value:
        """A narrowed value in float32."""
        return value if self.dtype == "float32" else self.g.cast(value, "float32")

    def number(self, content: float) -> ir.Value:
        """A float32 scalar."""
        return self.g.constant(content, np.float32)

    def linear(self, rows: ir.Value, name: str) -> ir.Value:
        """rows [T, in] by a weight [out, in] → [T, out]."""
        return self.matrix_product(rows, self.narrow_weight(name))

    def matrix_product(self, rows: ir.Value, weight: ir.Value) -> ir.Value:
        """rows [T, K] by a narrow weight [N, K] → [T, N], float32."""
        return self.widen(self.g.op("Gemm", self.narrow(rows), weight, transB=1))

    def stack_linear(self, rows: ir.Value, name: str, *, columns: bool = False) -> ir.Value:
        """Rows by the weights [E, N, K] of all experts as one matrix, float32.

        Args:
            rows: [T, K]; with `columns` [T, E · K].
            name: Of the weights.
            columns: Whether they lie side by side, [N, E · K], and not one on another, [E · N, K].
        """
        g, weight = self.g, self.narrow_weight(name)
        count, out, width = self._stored[name].shape
        if columns:
            weight = g.op("Transpose", weight, perm=[1, 0, 2])
        shape = (out, count * width) if columns else (count * out, width)
        return self.matrix_product(rows, g.op("Reshape", weight, g.ints(*shape)))

    def chosen_linear(self, rows: ir.Value, name: str, ids: ir.Value) -> ir.Value:
        """rows [T, 1 or k, K] by the weights [E, N, K] of the experts ids [T, k] → [T, k, N].

        For TensorRT a product of elements and a sum, of which it makes one kernel with the look-up:
        it reads each weight once. Before a matrix product it would write out what it looked up.
        """
        g, weights = self.g, self.g.op("Gather", self.narrow_weight(name), ids, axis=0)
        if self.host == "tensorrt":
            return self.summed(self.widen(weights), g.op("Unsqueeze", rows, g.ints(2)))
        column = g.op("Unsqueeze", self.narrow(rows), g.ints(3))
        return self.widen(g.op("Squeeze", g.op("MatMul", weights, column), g.ints(3)))

    def summed(self, weights: ir.Value, rows: ir.Value, *axes: int) -> ir.Value:
        """The sum of float32 products of elements, over the last axis if none are named."""
        return self.g.op(
            "ReduceSum", self.g.op("Mul", weights, rows), self.g.ints(*axes or (-1,)), keepdims=0
        )

    def biased(self, rows: ir.Value, name: str) -> ir.Value:
        """Rows [T, n] and a bias [n], float32."""
        return self.g.op("Add", rows, self.weight(name))

    def gated(self, rows: ir.Value, layer: int, part: str, width: int) -> ir.Value:
        """down(silu(gate) · up) of a part that every token goes through: rows [T, D] → [T, D]."""
        packed = self.linear(rows, layer_name(layer, f"{part}_gate_up"))
        return self.linear(silu_gated(self.g, packed, width), layer_name(layer, f"{part}_down"))

    def by_head(self, rows: ir.Value, name: str) -> ir.Value:
        """rows [heads, T, in] by a weight [heads, in, out] → [heads, T, out]."""
        return self.widen(self.g.op("MatMul", self.narrow(rows), self.narrow_weight(name)))

    def norm(self, value: ir.Value, name: str, epsilon: float | None = None) -> ir.Value:
        """Root-mean-square norm over the last axis, times the weight."""
        g, epsilon = self.g, epsilon or self.a.norm_epsilon
        if self._rms_norm:
            return g.op("RMSNormalization", value, self.weight(name), axis=-1, epsilon=epsilon)
        mean = g.op("ReduceMean", g.op("Mul", value, value), g.ints(-1), keepdims=1)
        size = g.op("Sqrt", g.op("Add", mean, self.number(epsilon)))
        return g.op("Mul", g.op("Div", value, size), self.weight(name))

    def flat(self, value: ir.Value, width: int) -> ir.Value:
        """[B, S, …] → [T, width]."""
        return self.g.op("Reshape", value, self.g.ints(-1, width))

    def like(self, rows: ir.Value, hidden: ir.Value) -> ir.Value:
        """rows [T, D] in the shape of hidden, [B, S, D]."""
        return self.g.op("Reshape", rows, self.g.op("Shape", hidden))

    def axis_range(self, value: ir.Value, axis: int) -> ir.Value:
        """0, 1, … up to the size of one axis of `value`, int64."""
        size = self.g.op("Squeeze", self.g.op("Shape", value, start=axis, end=axis + 1))
        zero, one = (self.g.constant(number, np.int64) for number in (0, 1))
        return self.g.op("Range", zero, size, one)

    def expert_range(self) -> ir.Value:
        """The ids of all experts, int32 [E]."""
        return self.g.constant(np.arange(self.a.shape.num_experts), np.int32)
