"""The `ort` lowering over weights that are not all fp32.

Linear layers in blocks run as com.microsoft.MatMulNBits, experts as com.microsoft.QMoE. Weights
stored as fp16 are cast: ONNX Runtime's CPU provider multiplies in fp32, and does the cast once, as
it loads the graph. The embedding's rows are cast when they have been looked up.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from knnmoe.export.architecture import Architecture
from knnmoe.export.graph import CONTRIB, GraphBuilder, StoredTensor
from knnmoe.export.storage import CODES, SCALES, ZERO_POINTS
from knnmoe.runtime.bundle import Quantization

from .ort import OrtLowering
from .ort_weights import EMBEDDING, layer_name


class QuantizedOrtLowering(OrtLowering):
    """Appends the parts of one model to a graph.

    Args:
        g: The graph under construction.
        architecture: The model's.
        stored: Where each weight lies, by its name in `ort_weights`, with the suffixes of `storage`
            where it is in blocks.
        experts_per_token: k of the seam.
        quantization: How weights in blocks are; None where there are none.
    """

    def __init__(
        self,
        g: GraphBuilder,
        architecture: Architecture,
        stored: Mapping[str, StoredTensor],
        experts_per_token: int,
        quantization: Quantization | None,
    ) -> None:
        super().__init__(g, architecture, stored, experts_per_token)
        self._cast: dict[str, ir.Value] = {}
        self._quantization = quantization

    def weight(self, name: str) -> ir.Value:
        """A weight as fp32, however it is stored."""
        value = super().weight(name)
        if self._stored[name].dtype != "float16":
            return value
        if name not in self._cast:
            self._cast[name] = self._g.cast(value, "float32")
        return self._cast[name]

    def embed(self, input_ids: ir.Value) -> ir.Value:
        """input_ids [B, S] → hidden [B, S, D]."""
        rows = self._g.op("Gather", super().weight(EMBEDDING), input_ids, axis=0)
        return self._g.cast(rows, "float32")

    def moe(
        self, router_input: ir.Value, expert_ids: ir.Value, expert_weights: ir.Value, layer: int
    ) -> ir.Value:
        """Experts in blocks through com.microsoft.QMoE, forced to the given ids and weights.

        The node takes the k largest of its second input, and as their weights what its last input
        says of them: both are the dense weights [T, E], in which all other experts are 0.
        """
        found = self._quantization
        if found is None:
            return super().moe(router_input, expert_ids, expert_weights, layer)
        dense = self._dense_weights(router_input, expert_ids, expert_weights)
        up, down = layer_name(layer, "gate_up"), layer_name(layer, "down")
        up_bias, down_bias = self._expert_biases(layer)
        return self._g.op(
            "QMoE", router_input, dense,
            self.weight(up + CODES), self.weight(up + SCALES), up_bias,
            self.weight(down + CODES), self.weight(down + SCALES), down_bias,
            None, None, None,
            self._zero_points(up), self._zero_points(down), None,
            dense,
            domain=CONTRIB, k=self._k, normalize_routing_weights=0, **self._activation(),
            expert_weight_bits=found.bits, block_size=found.block_size,
            accuracy_level=found.accuracy_level,
        )  # fmt: skip

    def _linear(self, rows: ir.Value, name: str) -> ir.Value:
        """rows [T, in] by a weight [out, in] → [T, out]."""
        found = self._quantization
        if found is None or name + CODES not in self._stored:
            return super()._linear(rows, name)
        out, blocks, block_bytes = self._stored[name + CODES].shape
        return self._g.op(
            "MatMulNBits", rows, self.weight(name + CODES), self.weight(name + SCALES),
            *([self._zero_points(name)] if found.zero_points else []),
            domain=CONTRIB, N=out, K=blocks * found.block_size,
            bits=block_bytes * 8 // found.block_size, block_size=found.block_size,
            accuracy_level=found.accuracy_level,
        )  # fmt: skip

    def _zero_points(self, name: str) -> ir.Value | None:
        assert self._quantization is not None
        return self.weight(name + ZERO_POINTS) if self._quantization.zero_points else None
