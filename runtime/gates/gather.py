"""Parts of the scan graph that gather what is stored of the candidates, and widen it to fp32.

Only the R candidates' rows are read and widened. Codes of 4 bits are taken apart by arithmetic,
because ONNX's operators on bits are newer than the graphs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..compressed import CompressedMemory
from ..engines.onnx_bytes import Node
from ..stored_values import StoredValues, Values

_FLOAT = 1  # ONNX's number of the type


@dataclass(frozen=True)
class Part:
    """Nodes of a graph, and the constants that they read."""

    nodes: list[Node]
    constants: Mapping[str, NDArray[Any]] = field(default_factory=dict)


def key_inputs(memory: CompressedMemory) -> dict[str, NDArray[Any]]:
    """What `key_nodes` reads beside the candidates."""
    if memory.keys is not None:
        return {"keys": memory.keys}
    scan = memory.scan
    return {
        "key_codes": scan.codes,
        "key_directions": scan.projection,
        "key_direction_scales": scan.projection_scales,
    }


def key_nodes(memory: CompressedMemory, output: str) -> Part:
    """Rows of the candidates' keys [T, R, D] but for their multipliers: `CompressedMemory.rows`."""
    if memory.keys is None:
        unpacked = unpack("key_codes", "key_steps", memory.scan.bits, memory.scan.width, "keys")
        middle = np.array(1 << memory.scan.bits - 1, np.float32)
        nodes = [
            *unpacked.nodes,
            Node("Sub", ["key_steps", "keys_middle"], ["key_signed"]),
            # Widened anew at every call: it is small, and in fp32 it would take four times as much.
            Node("DequantizeLinear", ["key_directions", "key_direction_scales"], ["key_matrix"],
                 [("axis", 0)]),
            Node("MatMul", ["key_signed", "key_matrix"], [output]),
        ]  # fmt: skip
        return Part(nodes, {**unpacked.constants, "keys_middle": middle})
    gathered = Node("Gather", ["keys", "candidates"], ["keys_stored"])
    if memory.keys.dtype == np.int8:
        return Part([gathered, Node("Cast", ["keys_stored"], [output], [("to", _FLOAT)])])
    return Part(
        [
            gathered,
            Node("Cast", ["keys_stored"], ["keys_wide"], [("to", _FLOAT)]),
            Node("Sub", ["keys_wide", "center"], [output]),
        ]
    )


def value_inputs(values: Values) -> dict[str, NDArray[Any]]:
    """What `value_nodes` reads beside the candidates."""
    if not isinstance(values, StoredValues):
        return {"values": np.ascontiguousarray(values, np.float32)}
    inputs: dict[str, NDArray[Any]] = {"values": values.codes}
    if values.steps is not None and values.lows is not None:
        inputs |= {"value_steps": values.steps, "value_lows": values.lows}
    return inputs


def value_nodes(values: Values) -> Part:
    """The candidates' values as `candidate_values` [T, R, E]: `StoredValues.__getitem__`."""
    target = "candidate_values"
    if not isinstance(values, StoredValues):
        return Part([Node("Gather", ["values", "candidates"], [target])])
    if values.steps is None:
        return Part(
            [
                Node("Gather", ["values", "candidates"], ["values_stored"]),
                Node("Cast", ["values_stored"], [target], [("to", _FLOAT)]),
            ]
        )
    unpacked = unpack("values", "value_codes", values.bits, values.experts, "values")
    groups = int(values.steps.shape[1])
    shapes: dict[str, NDArray[Any]] = {
        "values_grouped": np.array([0, 0, groups, values.experts // groups], np.int64),
        "values_flat": np.array([0, 0, values.experts], np.int64),
        "values_last": np.array([3], np.int64),
    }
    nodes = [*unpacked.nodes, Node("Reshape", ["value_codes", "values_grouped"], ["value_groups"])]
    for name in ("value_steps", "value_lows"):
        nodes += [
            Node("Gather", [name, "candidates"], [f"{name}_stored"]),
            Node("Cast", [f"{name}_stored"], [f"{name}_wide"], [("to", _FLOAT)]),
            Node("Unsqueeze", [f"{name}_wide", "values_last"], [f"{name}_each"]),
        ]
    nodes += [
        Node("Mul", ["value_groups", "value_steps_each"], ["value_scaled"]),
        Node("Add", ["value_scaled", "value_lows_each"], ["value_widened"]),
        Node("Reshape", ["value_widened", "values_flat"], [target]),
    ]
    return Part(nodes, {**unpacked.constants, **shapes})


def unpack(codes: str, output: str, bits: int, width: int, name: str) -> Part:
    """The candidates' rows of codes [N, C] as numbers [T, R, width] fp32."""
    gathered = [
        Node("Gather", [codes, "candidates"], [f"{name}_bytes"]),
        Node("Cast", [f"{name}_bytes"], [output if bits == 8 else f"{name}_pairs"],
             [("to", _FLOAT)]),
    ]  # fmt: skip
    if bits == 8:
        return Part(gathered)
    constants: dict[str, NDArray[Any]] = {
        f"{name}_sixteenth": np.array(1 / 16, np.float32),
        f"{name}_sixteen": np.array(16, np.float32),
        f"{name}_axis": np.array([3], np.int64),
        f"{name}_row": np.array([0, 0, width], np.int64),
    }
    nodes = [
        *gathered,
        Node("Mul", [f"{name}_pairs", f"{name}_sixteenth"], [f"{name}_shifted"]),
        Node("Floor", [f"{name}_shifted"], [f"{name}_upper"]),
        Node("Mul", [f"{name}_upper", f"{name}_sixteen"], [f"{name}_above"]),
        Node("Sub", [f"{name}_pairs", f"{name}_above"], [f"{name}_lower"]),
        Node("Unsqueeze", [f"{name}_lower", f"{name}_axis"], [f"{name}_first"]),
        Node("Unsqueeze", [f"{name}_upper", f"{name}_axis"], [f"{name}_second"]),
        Node("Concat", [f"{name}_first", f"{name}_second"], [f"{name}_halves"], [("axis", 3)]),
        Node("Reshape", [f"{name}_halves", f"{name}_row"], [output]),
    ]
    return Part(nodes, constants)
