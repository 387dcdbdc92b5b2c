"""The first stage of the gate `two-stage`: graphs that find the candidates of router inputs.

A graph is made of a few operators over one memory when the memory is put in place. What it scans
are weights of it, because ONNX Runtime multiplies by int8 and int4 at speed only what it could
rearrange beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..blend import RBF_CLIP, GateMemory
from ..compressed import CompressedMemory
from ..engines.base import Engine, Run
from ..engines.onnx_bytes import NodeList, Tensor, graph_bytes
from ..engines.onnxruntime import OrtEngine
from ..projection import block_size
from ..stored_values import dense
from ..two_stage import quantize_keys
from .base import Lap, unwatched
from .gather import append_keys, append_values, key_inputs, value_inputs

_QUANTIZED_AT_ONCE = 1 << 22  # elements


@dataclass(frozen=True)
class Candidates:
    """R candidates of each of T tokens, and what is stored of them.

    Attributes:
        entries: [T, R] int64, in rising order.
        keys: [T, R, D] fp32, as queries are compared with them.
        key_scales: [T, R, 2] fp32: multiplier, squared norm.
        values: [T, R, E] fp32.
    """

    entries: NDArray[np.int64]
    keys: NDArray[np.float32]
    key_scales: NDArray[np.float32]
    values: NDArray[np.float32]

    @staticmethod
    def empty(tokens: int, candidates: int, size: int, experts: int) -> Candidates:
        """Buffers for that many."""
        rows = (tokens, candidates)
        return Candidates(
            np.zeros(rows, np.int64),
            np.zeros((*rows, size), np.float32),
            np.zeros((*rows, 2), np.float32),
            np.zeros((*rows, experts), np.float32),
        )


class Scan(Protocol):
    """Finds candidates in one memory."""

    @property
    def candidates(self) -> int:
        """R, at most N."""

    @property
    def width(self) -> int:
        """Numbers of a key that are scanned."""

    @property
    def bits(self) -> int:
        """Of such a number."""

    def bind(self, x: NDArray[np.float32], found: Candidates, lap: Lap = unwatched) -> Run:
        """Fix router inputs [T, D] and buffers, and return what fills these.

        `lap` is told when the stage `scan` is done; what follows is gathering.
        """


@dataclass(frozen=True)
class Int8Scan:
    """The scan of a memory whose int8 keys are made of its keys.

    Args:
        engine: `scan_engine` of the memory.
        memory: Its keys are read at every call.
        candidates: R.
    """

    engine: Engine
    memory: GateMemory
    candidates: int

    bits = 8

    @property
    def width(self) -> int:
        """See `Scan.width`."""
        return int(self.memory.keys.shape[1])

    def bind(self, x: NDArray[np.float32], found: Candidates, lap: Lap = unwatched) -> Run:
        """See `Scan.bind`."""
        scan = self.engine.bind({"router_input": x}, {"candidates": found.entries})
        memory, entries = self.memory, found.entries
        values = dense(memory.values)

        def run() -> None:
            scan()
            lap("scan")
            for source, target in (
                (memory.keys, found.keys),
                (memory.key_scales, found.key_scales),
                (values, found.values),
            ):
                source.take(entries, axis=0, out=target, mode="clip")

        return run


@dataclass(frozen=True)
class ProjectedScan:
    """The scan of a compressed memory, whose projected keys are there.

    Args:
        engine: `projected_scan_engine` of the memory.
        inputs: Of the engine beside the router inputs: what candidates are gathered from.
        candidates: R.
        width: Dimensions of the projection.
        bits: Of a projected number.
    """

    engine: Engine
    inputs: Mapping[str, NDArray[Any]]
    candidates: int
    width: int
    bits: int

    @staticmethod
    def over(
        memory: CompressedMemory, candidates: int, *, threads: int | None = None
    ) -> ProjectedScan:
        """The scan of one memory for R candidates."""
        inputs: dict[str, NDArray[Any]] = {
            **key_inputs(memory),
            "multipliers": memory.multipliers,
            "key_scales": np.stack([np.ones_like(memory.norms), memory.norms], axis=1),
            **value_inputs(memory.values),
        }
        engine = projected_scan_engine(memory, inputs, candidates, threads=threads)
        return ProjectedScan(engine, inputs, candidates, memory.scan.width, memory.scan.bits)

    def bind(self, x: NDArray[np.float32], found: Candidates, lap: Lap = unwatched) -> Run:
        """See `Scan.bind`: the graph gathers too, so all of it is `scan`."""
        outputs = {
            "candidates": found.entries,
            "candidate_keys": found.keys,
            "candidate_scales": found.key_scales,
            "candidate_values": found.values,
        }
        scan = self.engine.bind({"router_input": x, **self.inputs}, outputs)

        def run() -> None:
            scan()
            lap("scan")

        return run


def projected_scan_engine(
    memory: CompressedMemory,
    inputs: Mapping[str, NDArray[Any]],
    candidates: int,
    *,
    threads: int | None = None,
) -> OrtEngine:
    """What finds the candidates [T, R] of router inputs [T, D] and gathers what belongs to them.

    Projection and scan are products with 8 or 4 bits (`MatMulNBits`), for which the queries are
    rounded to int8 in blocks: `two_stage.projected_scores` with `int8_queries`. The keys' norms,
    where they count, and the mask of entries from n_valid are the second product's bias.
    """
    g = NodeList()
    size, experts = memory.size, memory.values.shape[1]
    g.constant("center", np.ascontiguousarray(memory.center, np.float32))
    queries = _centred(g, RBF_CLIP)
    scores, weights = projected_scores(g, memory, queries, memory.entries)
    _best(g, scores, candidates)
    rows = append_keys(g, memory, "candidates", "rows")
    g.op("Mul", rows, g.op("Gather", "multipliers", "candidates"), out="candidate_keys")
    append_values(g, memory.values, "candidates", "candidate_values")
    g.op("Gather", "key_scales", "candidates", out="candidate_scales")
    graph = graph_bytes(
        g.nodes,
        [
            Tensor("router_input", np.float32, ("tokens", size)),
            *(Tensor(name, array.dtype, array.shape) for name, array in inputs.items()),
        ],
        [
            Tensor("candidates", np.int64, ("tokens", candidates)),
            Tensor("candidate_keys", np.float32, ("tokens", candidates, size)),
            Tensor("candidate_scales", np.float32, ("tokens", candidates, 2)),
            Tensor("candidate_values", np.float32, ("tokens", candidates, experts)),
        ],
        g.constants,
        weights,
    )
    return OrtEngine(graph, threads=threads, weights=weights)


def projected_scores(
    g: NodeList, memory: CompressedMemory, queries: str, count: int
) -> tuple[str, dict[str, NDArray[Any]]]:
    """Append the scan of projected keys: scores [T, count], and the weights it multiplies by.

    Args:
        g: Where to.
        memory: Its projection is scanned.
        queries: Centred router inputs [T, D]; for cosine of any length.
        count: N or more; what is more has a score of -inf.
    """
    size, scan, rbf = memory.size, memory.scan, memory.similarity == "rbf"
    bias = -memory.norms if rbf else np.zeros(memory.entries, np.float32)
    bias = np.where(np.arange(len(bias)) < memory.n_valid, bias, -np.inf).astype(np.float32)
    missing = (0, count - len(bias))
    codes = np.pad(scan.codes, (missing, (0, 0)))
    scales = np.pad(memory.scan_scales() * np.float32(2 if rbf else 1), missing)
    directions = scan.projection.view(np.uint8) ^ np.uint8(128)  # the same steps from 128
    weights: dict[str, NDArray[Any]] = {
        "directions": _in_blocks(directions, size, 1),
        "direction_scales": _block_scales(scan.projection_scales, size),
        "codes": _in_blocks(codes, scan.width, 8 // scan.bits),
        "code_scales": _block_scales(scales, scan.width),
        "bias": np.pad(bias, missing, constant_values=-np.inf),
    }
    projected = _bits_product(g, [queries, "directions", "direction_scales"], (scan.width, size), 8)
    scores = _bits_product(
        g, [projected, "codes", "code_scales", "", "", "bias"], (count, scan.width), scan.bits
    )
    return scores, weights


def scan_engine(memory: GateMemory, candidates: int, *, threads: int | None = None) -> OrtEngine:
    """What finds the candidates [T, R] of router inputs [T, D], entries in rising order.

    Rows of int8 queries times columns of int8 keys, exact in integers; the sums become scores as
    `two_stage.scan_scores` has them, those of cosine but for the length of the query.
    """
    g = NodeList()
    g.constant("center", np.ascontiguousarray(memory.center, np.float32))
    cosine = memory.similarity == "cosine"
    queries = _centred(g, float(np.finfo(np.float32).max) if cosine else RBF_CLIP)
    scores, weights = int8_scores(g, memory, queries)
    _best(g, scores, candidates)
    graph = graph_bytes(
        g.nodes,
        [Tensor("router_input", np.float32, ("tokens", memory.keys.shape[1]))],
        [Tensor("candidates", np.int64, ("tokens", candidates))],
        g.constants,
        weights,
    )
    return OrtEngine(graph, threads=threads, weights=weights, precise_int8=int8_is_cut_off())


def int8_scores(
    g: NodeList, memory: GateMemory, queries: str
) -> tuple[str, dict[str, NDArray[Any]]]:
    """Append the scan of int8 keys: scores [T, N], and the weights it multiplies by.

    Args:
        g: Where to.
        memory: Its keys are made int8 now.
        queries: Centred router inputs [T, D]; for cosine of any length.
    """
    keys, scales, norms = _scan_weights(memory)
    valid = np.arange(len(memory.keys)) < memory.n_valid
    largest = g.op("ReduceMax", g.op("Abs", queries), g.ints(1))
    positive = g.op("Greater", largest, g.number(0))
    unit = g.op("Div", queries, g.op("Where", positive, largest, g.number(1)))
    step, middle = g.number(1 / 127), g.constant("middle", np.array(128, np.uint8))
    rounded = g.op("QuantizeLinear", unit, step, middle)
    weights: dict[str, NDArray[Any]] = {"int8_keys": keys, "int8_scales": scales}
    factors = [rounded, "int8_keys", step, "int8_scales", middle]
    if memory.similarity == "cosine":
        # Of one query all scores may be as many times too large: the mask can ride in the product.
        mask = g.constant("mask", np.where(valid, 0, -np.inf).astype(np.float32))
        return _times(g, [*factors, "", mask]), weights
    g.constant("norms", np.where(valid, norms, np.inf).astype(np.float32))
    nearness = g.op("Mul", _times(g, factors), g.op("Add", largest, largest))
    return g.op("Sub", nearness, "norms"), weights


def _centred(g: NodeList, bound: float) -> str:
    """Router inputs [T, D] minus the centre, within a bound."""
    centred = g.op("Sub", "router_input", "center")
    return g.op("Clip", centred, g.number(-bound), g.number(bound))


@cache
def int8_is_cut_off() -> bool:
    """Whether this processor cuts off sums of large products of bytes, found out by trying."""
    size, count = 64, 16
    weights: dict[str, NDArray[Any]] = {
        "keys": np.full((size, count), 127, np.int8),
        "scales": np.ones(count, np.float32),
    }
    g = NodeList()
    step, middle = g.number(1), g.constant("middle", np.array(128, np.uint8))
    products = _times(g, ["bytes", "keys", step, "scales", middle])
    graph = graph_bytes(
        g.nodes,
        [Tensor("bytes", np.uint8, (1, size))],
        [Tensor(products, np.float32, (1, count))],
        g.constants,
        weights,
    )
    got = np.zeros((1, count), np.float32)
    queries = np.full((1, size), 255, np.uint8)
    OrtEngine(graph, threads=1, weights=weights).bind({"bytes": queries}, {products: got})()
    return bool((got != size * 127 * 127).any())


def _times(g: NodeList, inputs: list[str]) -> str:
    return g.op("MatMulIntegerToFloat", *inputs, domain="com.microsoft")


def _scan_weights(
    memory: GateMemory,
) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.float32]]:
    """int8 keys [D, N], their multipliers and squared norms [N]; zeros from n_valid."""
    count, size = memory.keys.shape
    keys = np.zeros((size, count), np.int8)
    scales = np.zeros((count, 2), np.float32)
    rows = max(1, _QUANTIZED_AT_ONCE // size)
    for start in range(0, memory.n_valid, rows):
        piece = slice(start, min(start + rows, memory.n_valid))
        scan = quantize_keys(memory.keys[piece])
        keys[:, piece] = scan.keys.T
        scales[piece] = scan.scales
    return keys, np.ascontiguousarray(scales[:, 0]), scales[:, 1]


def _best(g: NodeList, scores: str, candidates: int) -> None:
    """The R entries with the best scores [T, N], in rising order: `candidates` [T, R]."""
    r = g.ints(candidates)
    ranked = g.ops("TopK", scores, r, out=("best", "ranked"), axis=1, sorted=0)[1]
    g.ops("TopK", ranked, r, out=("candidates", "order"), axis=1, largest=0)


def _bits_product(g: NodeList, inputs: list[str], shape: tuple[int, int], bits: int) -> str:
    """A product of fp32 rows [T, K], rounded to int8, with weights [N, K] of some bits."""
    outer, inner = shape
    return g.op(
        "MatMulNBits", *inputs, K=inner, N=outer, bits=bits, block_size=block_size(inner),
        accuracy_level=4, domain="com.microsoft",
    )  # fmt: skip


def _in_blocks(codes: NDArray[np.uint8], width: int, a_byte: int) -> NDArray[np.uint8]:
    """Codes [N, K / codes a byte] as [N, blocks, bytes]."""
    blocks = width // block_size(width)
    return np.ascontiguousarray(codes).reshape(len(codes), blocks, block_size(width) // a_byte)


def _block_scales(scales: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """Scales of rows [N] as those of their blocks [N, blocks]."""
    blocks = width // block_size(width)
    return np.repeat(scales.astype(np.float32)[:, None], blocks, axis=1)
