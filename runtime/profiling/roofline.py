"""The least that a part of a step can cost: bytes that must be moved, and arithmetic.

Counted from what the bundle states and what the gates hold, not from what ran. A part takes at
least max(bytes / bandwidth, flops / peak): the roofline of Williams, Waterman and Patterson
(Communications of the ACM 52(4), 2009). Activations are left out; beside weights, cache and memory
they are small.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..bundle import EXPORT_AGAIN, Bundle, ModelShape
from ..errors import BundleError
from ..gates.base import Gate
from ..gates.numpy import ROWS_AT_ONCE, NumpyGate
from ..gates.onnx import OnnxGate
from ..gates.two_stage import TwoStageGate
from ..manifest import parse_object
from .plan import Shape
from .record import Bound, MachineBounds

EXPERT_PARTS = ("gate_up", "down", "gate_up_bias", "down_bias")
EMBEDDING, HEAD = "embedding", "head"
LOOKED_UP = (EMBEDDING, "cos", "sin")  # a row a token
HEAD_BITS = 8  # where it is stored in blocks
STORED = (".codes", ".scales", ".zero_points")  # a weight in blocks is three tensors
_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1}
_MAX_HEADER = 100 << 20
FLOAT_BYTES = 4


@dataclass(frozen=True)
class Cost:
    """Bytes moved and flops (two a product) of a part."""

    bytes: int = 0
    flops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Weights:
    """What of a segment's weights a step reads; `numbers` are weights, `bytes` as they are stored.

    Attributes:
        dense: Read whole by every step, and multiplied with every token: (bytes, numbers).
        experts: Of all experts of its gate together: (bytes, numbers).
        head: Read whole, and multiplied with the rows whose logits are wanted: (bytes, numbers).
        row_bytes: Of what is looked up, a token.
    """

    dense: tuple[int, int] = (0, 0)
    experts: tuple[int, int] = (0, 0)
    head: tuple[int, int] = (0, 0)
    row_bytes: int = 0

    @property
    def bytes(self) -> int:
        """Stored bytes of all that is multiplied."""
        return self.dense[0] + self.experts[0] + self.head[0]


def read_weights(bundle: Bundle) -> tuple[Weights, ...]:
    """The weights of each segment, from the headers of their files.

    A head that is tied to the embedding lies with it, in the first segment's file; one that is
    linked to the checkpoint is counted by its sizes, at the width of the bundle's floats.

    Raises:
        BundleError: If a file has no such header.
    """
    manifest = bundle.manifest
    bits = 8 if manifest.quantization is None else manifest.quantization.bits
    headers = []
    for segment in manifest.segments:
        file = segment.file.removesuffix(".onnx") + ".safetensors"
        headers.append(_header(bundle.file(file)) if file in manifest.files else {})
    found = [_weights(header, bits) for header in headers]
    if not found[-1].head[0]:
        shape = manifest.architecture
        numbers = shape.vocab_size * shape.hidden_size
        stored = {n: e for n, e in headers[0].items() if n.rsplit(".", 1)[0] == EMBEDDING}
        plain = {n: e for n, e in headers[0].items() if n == EMBEDDING}
        width = 4 if manifest.precision == "fp32" else 2
        size = sum(map(_bytes, (stored or plain).values())) or width * numbers
        found[-1] = replace(found[-1], head=(size, numbers))
    return tuple(found)


def segment_cost(
    weights: Weights,
    layers: int,
    model: ModelShape,
    active: int,
    shape: Shape,
    rows: int,
    cache_item_bytes: int = FLOAT_BYTES,
) -> Cost:
    """What a segment costs at least.

    Args:
        weights: Its own.
        layers: Whose keys and values it holds.
        model: The sizes of the model.
        active: Experts that run a token, k.
        shape: Of the step.
        rows: Of logits, where the segment has the head.
        cache_item_bytes: Of a number in the key-value cache.
    """
    tokens = shape.batch * shape.tokens
    share = expected_experts(model.num_experts, active, tokens) / model.num_experts
    total = Cost(
        weights.dense[0] + weights.head[0] + tokens * weights.row_bytes,
        2 * tokens * weights.dense[1] + 2 * rows * weights.head[1],
    )
    total += Cost(
        round(weights.experts[0] * share),
        2 * tokens * weights.experts[1] * active // model.num_experts,
    )
    for _ in range(layers):
        total += attention_cost(model, shape, cache_item_bytes)
    return total


def attention_cost(model: ModelShape, shape: Shape, item_bytes: int = FLOAT_BYTES) -> Cost:
    """Keys and values of one layer read and written once, and the products with them.

    Token i of S after p sees p + i positions. Sliding windows, which the manifest does not state,
    are not taken into account.
    """
    seen = shape.tokens * shape.past + shape.tokens * (shape.tokens + 1) // 2
    width = model.head_size + (model.latent_size or model.head_size)
    held = (shape.past + 2 * shape.tokens) * model.cache_width * item_bytes
    return Cost(shape.batch * held, shape.batch * 2 * model.num_heads * width * seen)


def expected_experts(experts: int, active: int, tokens: int) -> float:
    """How many of E experts T tokens need, if each chooses k of them evenly and by itself.

    E (1 - (1 - k/E)^T): k of one token, nearly all of many.
    """
    return float(experts * (1 - (1 - active / experts) ** tokens))


def gate_cost(gate: Gate, tokens: int, sequences: int = 1) -> Cost:
    """What a gate's search of T tokens of B sequences costs at least; without a memory, nothing."""
    if isinstance(gate, TwoStageGate) and not gate.searches_exactly(tokens, sequences):
        return _two_stages(gate, tokens)
    if isinstance(gate, NumpyGate):
        if gate.memory is None:
            return Cost()
        passes = -(-tokens // ROWS_AT_ONCE) if gate.backend == NumpyGate.backend else 1
        once = exact_search(gate.memory.keys, gate.memory.values, gate.neighbors, tokens)
        return once + Cost((passes - 1) * int(gate.memory.keys.nbytes))
    if isinstance(gate, OnnxGate):
        found = gate.inputs
        return (
            exact_search(found["keys"], found["values"], gate.neighbors, tokens)
            if found
            else Cost()
        )
    blend: Any = getattr(gate, "blend", None)  # on a device
    if blend is None:
        return Cost()
    return exact_search(blend.scan_keys, blend.values, gate.neighbors, tokens)


def exact_search(keys: Any, values: Any, neighbors: int, tokens: int) -> Cost:
    """All keys [N, D] read once and multiplied with every token, K values [E] read a token."""
    read = int(keys.nbytes) + tokens * neighbors * _row_bytes(values)
    blended = 2 * tokens * neighbors * values.shape[1]
    return Cost(read, 2 * tokens * int(keys.size) + blended)


def _two_stages(gate: TwoStageGate, tokens: int) -> Cost:
    """What is scanned read once, and R keys and K values gathered a token."""
    found = gate.retrieval
    rows = [array for name, array in found.inputs.items() if name.endswith(("keys", "_codes"))]
    gathered = found.candidates * sum(map(_row_bytes, rows))
    gathered += gate.neighbors * _row_bytes(gate.memory.values)
    compared = found.candidates * sum(int(array.shape[1]) for array in rows)
    return Cost(
        found.entries * found.width * found.bits // 8 + tokens * gathered,
        2 * tokens * (found.entries * found.width + compared),
    )


def _row_bytes(rows: Any) -> int:
    """Stored bytes of a row."""
    return int(rows.nbytes) // max(1, len(rows))


def bound(cost: Cost, machine: MachineBounds, working_set: int) -> Bound:
    """The least time: max(bytes / bandwidth, flops / peak).

    The bandwidth is that of the step's whole working set, since a part finds in the caches what the
    step before left there, and no more.
    """
    moving = cost.bytes / machine.read_gb_s(working_set) / 1e6
    computing = cost.flops / machine.gemm_gflop_s / 1e6
    return Bound(cost.bytes, cost.flops, max(moving, computing))


def _bytes(entry: Mapping[str, Any]) -> int:
    return int(math.prod(entry["shape"])) * _ITEM_BYTES[entry["dtype"]]


def _weights(header: Mapping[str, Any], bits: int) -> Weights:
    dense, experts, head = [0, 0], [0, 0], [0, 0]
    row_bytes = 0
    for name, entry in header.items():
        stored = next((kind for kind in STORED if name.endswith(kind)), "")
        part = name.removesuffix(stored).rsplit(".", 1)[-1]
        if part in LOOKED_UP:
            row_bytes += 0 if stored else _bytes(entry) // entry["shape"][0]
            continue
        into = head if part == HEAD else experts if part in EXPERT_PARTS else dense
        into[0] += _bytes(entry)
        count = math.prod(entry["shape"])
        if stored == ".codes":
            into[1] += count * 8 // (HEAD_BITS if part == HEAD else bits)
        elif not stored and len(entry["shape"]) > 1:  # vectors are added, not multiplied
            into[1] += count
    return Weights((dense[0], dense[1]), (experts[0], experts[1]), (head[0], head[1]), row_bytes)


def _header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: name → `dtype`, `shape`."""
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            content = parse_object(stream.read(min(length, _MAX_HEADER)))
        content.pop("__metadata__", None)
        for entry in content.values():
            if min(entry["shape"], default=1) < 1 or entry["dtype"] not in _ITEM_BYTES:
                raise ValueError("a tensor of an unknown type or without numbers")
    except (OSError, struct.error, ValueError, KeyError, TypeError) as error:
        raise BundleError(path, f"has a malformed header ({error})", fix=EXPORT_AGAIN) from error
    return content
