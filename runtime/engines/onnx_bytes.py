"""ONNX graphs of a few nodes, written as bytes: the runtime has no ONNX package to build them with.

The numbers are the field numbers of the messages in ONNX's own onnx.proto, of which only what a
small graph needs is here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike, NDArray

IR_VERSION = 10
OPSETS = (("", 20), ("com.microsoft", 1))
FLOAT = 1  # ONNX's number of the type
_TYPES = {"float32": FLOAT, "uint8": 2, "int8": 3, "int64": 7, "float16": 10}
_EXTERNAL = 1

Dimension = int | str


@dataclass(frozen=True)
class Node:
    """One operator: names in, names out, integer attributes."""

    op: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    attributes: Sequence[tuple[str, int]] = ()
    domain: str = ""


@dataclass(frozen=True)
class Tensor:
    """An input or output: its name, dtype and dimensions, of which a name is any size."""

    name: str
    dtype: DTypeLike
    shape: Sequence[Dimension]


class NodeList:
    """Nodes in the order they run, each naming what it leaves, and the constants they take.

    Attributes:
        nodes: As `graph_bytes` takes them.
        constants: By name.
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.constants: dict[str, NDArray[np.generic]] = {}

    def op(
        self, op: str, *inputs: str, out: str | None = None, domain: str = "", **attributes: int
    ) -> str:
        """Append an operator with one output and return its name: `out`, or one of its own."""
        out = out or f"{op}_{len(self.nodes)}"
        return self.ops(op, *inputs, out=(out,), domain=domain, **attributes)[0]

    def ops(
        self, op: str, *inputs: str, out: Sequence[str], domain: str = "", **attributes: int
    ) -> Sequence[str]:
        """The same with the outputs named in `out`."""
        self.nodes.append(Node(op, inputs, out, tuple(attributes.items()), domain))
        return out

    def number(self, content: float) -> str:
        """A scalar fp32 constant."""
        return self.constant(f"number_{content!r}", np.array(content, np.float32))

    def ints(self, *content: int) -> str:
        """A constant row of int64."""
        name = "ints_" + "_".join(map(str, content))
        return self.constant(name, np.array(content, np.int64))

    def constant(self, name: str, content: NDArray[np.generic]) -> str:
        """A constant, and its name again."""
        self.constants[name] = content
        return name


def graph_bytes(
    nodes: Iterable[Node],
    inputs: Iterable[Tensor],
    outputs: Iterable[Tensor],
    constants: dict[str, NDArray[np.generic]],
    external: dict[str, NDArray[np.generic]],
) -> bytes:
    """A model of one graph.

    Args:
        nodes: In the order they run.
        inputs, outputs: Of the graph.
        constants: Initializers that are written into the model.
        external: Initializers that whoever loads the model brings along.
    """
    graph = b"".join(
        (
            *(_message(1, _node(node)) for node in nodes),
            _text(2, "graph"),
            *(_message(5, _constant(name, array)) for name, array in constants.items()),
            *(_message(5, _external(name, array)) for name, array in external.items()),
            *(_message(11, _value_info(tensor)) for tensor in inputs),
            *(_message(12, _value_info(tensor)) for tensor in outputs),
        )
    )
    opsets = (_message(8, _text(1, domain) + _integer(2, version)) for domain, version in OPSETS)
    return _integer(1, IR_VERSION) + _message(7, graph) + b"".join(opsets)


def _node(node: Node) -> bytes:
    return b"".join(
        (
            *(_text(1, name) for name in node.inputs),
            *(_text(2, name) for name in node.outputs),
            _text(4, node.op),
            *(
                _message(5, _text(1, name) + _integer(3, number) + _integer(20, 2))
                for name, number in node.attributes
            ),
            _text(7, node.domain),
        )
    )


def _constant(name: str, array: NDArray[np.generic]) -> bytes:
    return _tensor_head(name, array) + _message(9, array.tobytes())


def _external(name: str, array: NDArray[np.generic]) -> bytes:
    location = _text(1, "location") + _text(2, name)
    return _tensor_head(name, array) + _message(13, location) + _integer(14, _EXTERNAL)


def _tensor_head(name: str, array: NDArray[np.generic]) -> bytes:
    dims = b"".join(_integer(1, size) for size in array.shape)
    return dims + _integer(2, _TYPES[array.dtype.name]) + _text(8, name)


def _value_info(tensor: Tensor) -> bytes:
    dims = b"".join(
        _message(1, _text(2, size) if isinstance(size, str) else _integer(1, size))
        for size in tensor.shape
    )
    kind = _integer(1, _TYPES[np.dtype(tensor.dtype).name]) + _message(2, dims)
    return _text(1, tensor.name) + _message(2, _message(1, kind))


def _integer(field: int, number: int) -> bytes:
    return _varint(field << 3) + _varint(number & (2**64 - 1))


def _text(field: int, text: str) -> bytes:
    return _message(field, text.encode())


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    """Seven bits a byte, lowest first; the eighth says that more follow."""
    groups = bytearray()
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    groups.append(number)
    return bytes(groups)
