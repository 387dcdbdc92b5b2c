"""Small building blocks on onnx-ir: a graph under construction, and its values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike

from knnmoe import __version__
from knnmoe.runtime.bundle import TensorSpec

# Opset 21 and IR version 10 are what the oldest supported ONNX Runtime (1.23) and TensorRT 10 read.
OPSET = 21
# Opset → IR version: the oldest that allows it, but not below what the bundle's own graphs have.
IR_VERSIONS = {20: 10, 21: 10, 24: 12}
CONTRIB = "com.microsoft"
KNNMOE = "knnmoe"

_DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "int64": ir.DataType.INT64,
    "int32": ir.DataType.INT32,
    "int8": ir.DataType.INT8,
    "uint8": ir.DataType.UINT8,
    "int4": ir.DataType.INT4,
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a weight lies: `length` bytes from `offset` in the file `location`."""

    location: str
    offset: int
    length: int
    shape: tuple[int, ...]
    dtype: str = "float32"  # a key of _DTYPES


class GraphBuilder:
    """Collects inputs, nodes, weights and outputs; `model` or `function` closes the graph.

    Args:
        name: Of the graph, or of the function.
        opset: Of the standard operators; a key of `IR_VERSIONS`.
    """

    def __init__(self, name: str, opset: int = OPSET) -> None:
        self._name = name
        self._opset = opset
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._nodes: list[ir.Node] = []
        self._weights: dict[str, ir.Value] = {}
        self._domains: set[str] = {""}
        self.input_specs: list[TensorSpec] = []
        self.output_specs: list[TensorSpec] = []

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> ir.Value:
        """Declare a graph input."""
        value = _typed(ir.Value(name=name), dtype, shape)
        self._inputs.append(value)
        self.input_specs.append(TensorSpec(name, dtype, tuple(shape)))
        return value

    def declare(self, spec: TensorSpec) -> ir.Value:
        """Declare a graph input by its spec."""
        return self.input(spec.name, spec.dtype, spec.shape)

    def output(self, value: ir.Value, spec: TensorSpec) -> None:
        """Declare `value` an output; it takes the name of the spec."""
        value.name = spec.name
        self._outputs.append(_typed(value, spec.dtype, spec.shape))
        self.output_specs.append(spec)

    def weight(self, name: str, stored: StoredTensor) -> ir.Value:
        """An initializer whose bytes lie in a file beside the graph."""
        if name not in self._weights:
            tensor = ir.ExternalTensor(
                stored.location,
                stored.offset,
                stored.length,
                _DTYPES[stored.dtype],
                shape=ir.Shape(stored.shape),
                name=name,
            )
            value = _typed(ir.Value(name=name, const_value=tensor), stored.dtype, stored.shape)
            self._weights[name] = value
        return self._weights[name]

    def cast(self, value: ir.Value, dtype: str) -> ir.Value:
        """Append a conversion to `float32`, `float16`, `int64` or `int32`."""
        return self.op("Cast", value, to=int(_DTYPES[dtype]))

    def constant(self, content: ArrayLike, dtype: type[np.generic]) -> ir.Value:
        """A constant, as a node, so that it may stand in a function body."""
        tensor = ir.Tensor(np.asarray(content, dtype=dtype))
        return self.op("Constant", value=tensor)

    def ints(self, *content: int) -> ir.Value:
        """A constant int64 vector."""
        return self.constant(content, np.int64)

    def op(
        self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any
    ) -> ir.Value:
        """Append a node with one output."""
        return self.ops(op_type, *inputs, count=1, domain=domain, **attributes)[0]

    def ops(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        count: int,
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """Append a node with `count` outputs."""
        node = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=count)
        self._nodes.append(node)
        self._domains.add(domain)
        return node.outputs

    def model(self, functions: Sequence[ir.Function] = ()) -> ir.Model:
        """Close the graph as a model."""
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=list(self._weights.values()),
            opset_imports=self._opsets(),
            name=self._name,
        )
        return ir.Model(
            graph,
            ir_version=IR_VERSIONS[self._opset],
            producer_name="knnmoe",
            producer_version=__version__,
            functions=functions,
        )

    def function(self, domain: str, attributes: Mapping[str, str]) -> ir.Function:
        """Close the graph as a function of the graph's name, with string attributes."""
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            opset_imports=self._opsets(),
            name=self._name,
        )
        declared = [ir.AttrString(name, default) for name, default in attributes.items()]
        return ir.Function(domain, self._name, graph=graph, attributes=declared)

    def _opsets(self) -> dict[str, int]:
        return {domain: 1 if domain else self._opset for domain in sorted(self._domains)}


def keep_names_apart(function: ir.Function) -> ir.Function:
    """Give a function's inner values names that no graph has.

    They are names of the function's own, but TensorRT's parser looks them up among those of the
    graph that calls it: where both have a name, it connects the wrong tensors.
    """
    outputs = set(function.outputs)
    for node in function:
        node.name = f"{function.name}/{node.name}"
        for value in node.outputs:
            if value not in outputs:
                value.name = f"{function.name}/{value.name}"
    return function


def save(model: ir.Model, path: Path) -> None:
    """Write a model; its weights stay where they are."""
    ir.save(model, path)


def _typed(value: ir.Value, dtype: str, shape: Sequence[int | str]) -> ir.Value:
    value.type = ir.TensorType(_DTYPES[dtype])
    value.shape = ir.Shape(shape)
    return value
