"""The `std` lowering over weights in blocks of 4- or 8-bit codes.

Activations stay as they are. What the codes stand for is computed in one of two ways:

* For TensorRT a whole weight is a constant behind DequantizeLinear, and the engine holds codes. A
  matrix product by 4-bit codes reads them as they are. In front of one by 8-bit codes TensorRT
  writes out the whole weight; where tokens are few the product is a sum, which reads codes.
* Otherwise the graph takes the codes apart by arithmetic: for ONNX Runtime, which folds it when it
  loads the graph, and of experts that are looked up. TensorRT looks up no 4- or 8-bit constants,
  but int32 ones: the same bytes, read as words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from knnmoe.export.architecture import Architecture
from knnmoe.export.graph import GraphBuilder, StoredTensor
from knnmoe.export.signed_codes import signed
from knnmoe.export.storage import CODES, SCALES, ZERO_POINTS

from .std_ops import StdOps, StdOptions

WORD, HALF, BYTE = 32, 16, 8  # bits


@dataclass(frozen=True)
class Blocks:
    """How a weight [N, K], or one [E, N, K] of experts, is cut.

    Attributes:
        outer: [N] or [E, N].
        count: Blocks of a row.
        size: Weights of a block.
        bits: Of a code.
    """

    outer: tuple[int, ...]
    count: int
    size: int
    bits: int

    @property
    def middle(self) -> int:
        """The zero point of blocks that have none of their own."""
        return 1 << (self.bits - 1)

    def matrix(self, *, columns: bool) -> tuple[int, int]:
        """Rows of one matrix of all, and blocks of its row; those of experts as `stack_linear`."""
        if columns:
            experts, rows = self.outer
            return rows, experts * self.count
        return math.prod(self.outer), self.count


class BlockOps(StdOps):
    """`StdOps` for a model of which some weights are in blocks.

    Args:
        g, architecture, stored, options: As of `StdOps`.
        block_size: Weights that share a scale.
    """

    def __init__(
        self,
        g: GraphBuilder,
        architecture: Architecture,
        stored: Mapping[str, StoredTensor],
        options: StdOptions,
        block_size: int,
    ) -> None:
        super().__init__(g, architecture, stored, options)
        self._block_size = block_size
        self._few_tokens = options.experts == "gathered"

    def linear(self, rows: ir.Value, name: str) -> ir.Value:
        """See `StdOps.linear`."""
        if name + CODES not in self._stored:
            return super().linear(rows, name)
        return self._linear(rows, name, columns=False)

    def stack_linear(self, rows: ir.Value, name: str, *, columns: bool = False) -> ir.Value:
        """See `StdOps.stack_linear`."""
        return self._linear(rows, name, columns=columns)

    def chosen_linear(self, rows: ir.Value, name: str, ids: ir.Value) -> ir.Value:
        """See `StdOps.chosen_linear`; a sum on every host."""
        blocks = self._blocks(name)
        by_block = self.g.ints(0, 0, 1, blocks.count, blocks.size)
        return self.summed(self._numbers(name, ids), self.g.op("Reshape", rows, by_block), 3, 4)

    def _linear(self, rows: ir.Value, name: str, *, columns: bool) -> ir.Value:
        """rows [T, K] by a weight as one matrix [N, K] → [T, N], float32."""
        if self.host != "tensorrt":
            weight = self.narrow(self._matrix(self._numbers(name), name, columns=columns))
            return self.matrix_product(rows, weight)
        g, blocks = self.g, self._blocks(name)
        out, count = blocks.matrix(columns=columns)
        codes = signed(
            self._stored[name + CODES], (out, count * blocks.size), blocks.bits, columns=columns
        )
        scales = self._matrix(self.narrow_weight(name + SCALES), name, columns=columns)
        weight = g.op(
            "DequantizeLinear", g.weight(name + CODES, codes), scales,
            axis=1, block_size=blocks.size,
        )  # fmt: skip
        if blocks.bits == BYTE and self._few_tokens:
            product = self.summed(self.widen(weight), g.op("Unsqueeze", rows, g.ints(1)))
        else:
            product = self.matrix_product(rows, weight)
        if name + ZERO_POINTS not in self._stored:
            return product
        # What its own zero point adds to each weight of a block, times the sum of what they meet.
        shift = g.op("Sub", self.number(blocks.middle), self._zero_points(name))
        shift = g.op("Mul", self._matrix(shift, name, columns=columns), self.widen(scales))
        sums = g.op("Reshape", rows, g.ints(0, count, blocks.size))
        sums = g.op("ReduceSum", sums, g.ints(2), keepdims=0)
        return g.op("Add", product, self.matrix_product(sums, self.narrow(shift)))

    def _numbers(self, name: str, ids: ir.Value | None = None) -> ir.Value:
        """What the codes stand for, float32 [N, blocks, block]; [E, N, …] or [T, k, N, …]."""
        g, blocks = self.g, self._blocks(name)
        stored = self._stored[name + CODES]
        shape = (*blocks.outer, blocks.count, blocks.size * blocks.bits // WORD)
        words = g.weight(name + CODES, replace(stored, shape=shape, dtype="int32"))
        codes = self._digits(_halves(g, self._chosen(words, ids)), HALF, blocks.bits)
        leading = len(blocks.outer) + (ids is not None)
        codes = g.op("Reshape", codes, g.ints(*[0] * leading, blocks.count, blocks.size))
        last = g.ints(-1)
        zero_points = self.number(blocks.middle)
        if name + ZERO_POINTS in self._stored:
            zero_points = g.op("Unsqueeze", self._zero_points(name, ids), last)
        scales = self.widen(self._chosen(self.narrow_weight(name + SCALES), ids))
        return g.op("Mul", g.op("Sub", codes, zero_points), g.op("Unsqueeze", scales, last))

    def _zero_points(self, name: str, ids: ir.Value | None = None) -> ir.Value:
        """Those of every block, float32 [N, blocks]; [E, N, blocks] or [T, k, N, blocks]."""
        g, blocks = self.g, self._blocks(name)
        packed = g.weight(name + ZERO_POINTS, self._stored[name + ZERO_POINTS])
        points = g.cast(self._chosen(packed, ids), "float32")
        if blocks.bits == BYTE:
            return points
        leading = len(blocks.outer) + (ids is not None)
        points = self._digits(points, BYTE, blocks.bits)
        points = g.op("Reshape", points, g.ints(*[0] * leading, -1))
        return g.op("Slice", points, g.ints(0), g.ints(blocks.count), g.ints(-1))

    def _digits(self, numbers: ir.Value, width: int, bits: int) -> ir.Value:
        """Whole numbers [...] of so many bits, float32, as digits [..., digits], lowest first."""
        g = self.g
        powers = np.float32(2.0) ** -np.arange(0, width + bits, bits, dtype=np.float32)
        numbers = g.op("Unsqueeze", numbers, g.ints(-1))
        at, above = (
            g.op("Floor", g.op("Mul", numbers, g.constant(part, np.float32)))
            for part in (powers[:-1], powers[1:])
        )
        return g.op("Sub", at, g.op("Mul", above, self.number(1 << bits)))

    def _chosen(self, value: ir.Value, ids: ir.Value | None) -> ir.Value:
        return value if ids is None else self.g.op("Gather", value, ids, axis=0)

    def _matrix(self, value: ir.Value, name: str, *, columns: bool) -> ir.Value:
        """A value for every block [(E,) N, blocks], or weight [(E,) N, blocks, block]; a matrix."""
        g, (rows, _) = self.g, self._blocks(name).matrix(columns=columns)
        if columns:
            value = g.op("Reshape", value, g.ints(0, 0, -1))
            value = g.op("Transpose", value, perm=[1, 0, 2])
        return g.op("Reshape", value, g.ints(rows, -1))

    def _blocks(self, name: str) -> Blocks:
        *outer, count = self._stored[name + SCALES].shape
        weights = math.prod(outer) * count * self._block_size
        bits = self._stored[name + CODES].length * 8 // weights
        return Blocks(tuple(outer), count, self._block_size, bits)


def _halves(g: GraphBuilder, words: ir.Value) -> ir.Value:
    """int32 words [...] → the unsigned halves of each [..., 2], lower first, float32.

    A remainder has the sign of its divisor, so none is below 0 whatever the word's sign.
    """
    half, last = g.constant(1 << HALF, np.int32), g.ints(-1)
    low = g.op("Mod", words, half)
    high = g.op("Mod", g.op("Div", g.op("Sub", words, low), half), half)
    halves = [g.op("Unsqueeze", part, last) for part in (low, high)]
    return g.cast(g.op("Concat", *halves, axis=-1), "float32")
