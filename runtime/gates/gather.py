"""Parts of graphs that gather what is stored of entries, and widen it to fp32.

Only the rows asked for are read and widened. Codes of 4 bits are taken apart by arithmetic,
because ONNX's operators on bits are newer than the graphs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..compressed import CompressedMemory
from ..engines.onnx_bytes import FLOAT, NodeList
from ..projection import ProjectedKeys
from ..stored_values import StoredValues, Values


def key_inputs(memory: CompressedMemory) -> dict[str, NDArray[Any]]:
    """What is read of keys beside the entries."""
    if memory.keys is not None:
        return {"keys": memory.keys}
    inputs: dict[str, NDArray[Any]] = {}
    for name, part in _projections(memory).items():
        inputs |= {
            f"{name}_codes": part.codes,
            f"{name}_directions": part.projection,
            f"{name}_direction_scales": part.projection_scales,
        }
        if memory.parts:
            inputs[f"{name}_sizes"] = part.scales
    return inputs


def _projections(memory: CompressedMemory) -> dict[str, ProjectedKeys]:
    """What stands for full keys, by the name of its inputs."""
    if not memory.parts:
        return {"key": memory.scan}
    return {f"part_{number}": part for number, part in enumerate(memory.parts)}


@dataclass(frozen=True)
class CodeSteps:
    """Names of what projected keys of some entries are made of.

    Attributes:
        steps: [T, R, W].
        matrix: P [W, D].
        sizes: [T, R] of the steps; None where the keys' multipliers have them.
    """

    steps: str
    matrix: str
    sizes: str | None


def append_code_steps(g: NodeList, memory: CompressedMemory, entries: str) -> list[CodeSteps]:
    """Of projected keys: what the keys of entries [T, R] are the sum of."""
    found = []
    for name, part in _projections(memory).items():
        codes = append_unpacked(g, f"{name}_codes", entries, part.bits, part.width)
        steps = g.op("Sub", codes, g.number(1 << part.bits - 1))
        # Widened anew at every call: it is small, and in fp32 it would take four times as much.
        matrix = g.op("DequantizeLinear", f"{name}_directions", f"{name}_direction_scales", axis=0)
        sizes = g.op("Gather", f"{name}_sizes", entries) if memory.parts else None
        found.append(CodeSteps(steps, matrix, sizes))
    return found


def value_inputs(values: Values) -> dict[str, NDArray[Any]]:
    """What `append_values` reads beside the entries."""
    if not isinstance(values, StoredValues):
        return {"values": np.ascontiguousarray(values, np.float32)}
    inputs: dict[str, NDArray[Any]] = {"values": values.codes}
    if values.steps is not None and values.lows is not None:
        inputs |= {"value_steps": values.steps, "value_lows": values.lows}
    return inputs


def append_values(g: NodeList, values: Values, entries: str, out: str) -> str:
    """The values of entries [T, R] as [T, R, E] fp32: `StoredValues.__getitem__`."""
    if not isinstance(values, StoredValues):
        return g.op("Gather", "values", entries, out=out)
    if values.steps is None:
        return g.op("Cast", g.op("Gather", "values", entries), to=FLOAT, out=out)
    codes = append_unpacked(g, "values", entries, values.bits, values.experts)
    groups = int(values.steps.shape[1])
    grouped = g.op("Reshape", codes, g.ints(0, 0, groups, values.experts // groups))
    steps, lows = (
        g.op("Unsqueeze", g.op("Cast", g.op("Gather", name, entries), to=FLOAT), g.ints(3))
        for name in ("value_steps", "value_lows")
    )
    widened = g.op("Add", g.op("Mul", grouped, steps), lows)
    return g.op("Reshape", widened, g.ints(0, 0, values.experts), out=out)


def append_unpacked(g: NodeList, codes: str, entries: str, bits: int, width: int) -> str:
    """Rows of codes [N, C] of entries [T, R] as numbers [T, R, width] fp32."""
    pairs = g.op("Cast", g.op("Gather", codes, entries), to=FLOAT)
    if bits == 8:
        return pairs
    upper = g.op("Floor", g.op("Mul", pairs, g.number(1 / 16)))
    lower = g.op("Sub", pairs, g.op("Mul", upper, g.number(16)))
    halves = (g.op("Unsqueeze", half, g.ints(3)) for half in (lower, upper))
    return g.op("Reshape", g.op("Concat", *halves, axis=3), g.ints(0, 0, width))
